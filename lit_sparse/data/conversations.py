"""Read conversations from rows of the usual formats."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_warn

from lit_sparse.data.chat_template import ChatTemplate, Message
from lit_sparse.data.csv_rows import other_delimiter
from lit_sparse.data.labels import list_in
from lit_sparse.data.readers import RowError, per_row
from lit_sparse.data.sources import require_text
from lit_sparse.errors import UsageError, parse_json

Format = Literal["messages", "sharegpt", "prompt_completion", "alpaca"]

ROLES = ("system", "developer", "user", "assistant", "tool")

# Format → the columns of a conversation with the answer, and of the prompt alone.
_COLUMNS: Mapping[Format, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ("messages",)),
    "sharegpt": (("conversations",), ("conversations",)),
    "prompt_completion": (("prompt", "completion"), ("prompt",)),
    "alpaca": (("instruction", "output"), ("instruction",)),
}
_SHAREGPT = {
    **{name: name for name in ROLES},
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "function_response": "tool",
    "observation": "tool",
}


def recognised(columns: Sequence[str], split: str, labelled: bool, wanted: Format | None = None) -> Format:
    """The format of a split's rows.

    Args:
        columns: The columns of the rows.
        split: Name of the split, for errors.
        labelled: Whether rows need an answer. A prompt without its answer is recognised only if they do not.
        wanted: The format that the user named; None: the one whose columns are there.

    Raises:
        UsageError: If no format has these columns, or several have.
    """
    complete = [name for name, (all_columns, _) in _COLUMNS.items() if set(all_columns) <= set(columns)]
    prompts = [name for name, (_, some) in _COLUMNS.items() if set(some) <= set(columns)] if not labelled else []
    found: list[Format] = complete or prompts
    if wanted is not None:
        found = [wanted] if wanted in (*complete, *prompts) else []
    if len(found) == 1:
        return found[0]
    known = "; ".join(f"{name} ({', '.join(needed)})" for name, (needed, _) in _COLUMNS.items())
    if wanted is not None:
        reason = f"does not have the columns of the format {wanted!r}"
    elif found:
        reason = f"has the columns of several formats ({', '.join(found)}), so name one as format"
    else:
        reason = f"has the columns of no format{other_delimiter(columns)}"
    raise UsageError(f"The split {split!r} {reason}. Its columns are {list(columns)}; the formats are {known}.")


def read_row(row: Mapping[str, Any], form: Format, labelled: bool) -> tuple[list[Message], int]:
    """The turns of a row, with the text of its column ``system`` first, and the number of the first not in its prompt.

    Args:
        row: Values by column.
        form: The format of the row.
        labelled: Whether the answer of a row with a prompt is read too.

    Raises:
        RowError: If a turn has an unknown role, or no text where it needs one, or there are two system prompts.
    """
    turns, first = _own_turns(row, form, labelled)
    whole = with_system(turns, row)
    return whole, first + len(whole) - len(turns)


def with_system(turns: list[Message], row: Mapping[str, Any]) -> list[Message]:
    """The turns of a row, with the text of its column ``system`` first.

    Raises:
        RowError: If that is no text, or the turns have another system prompt.
    """
    if row.get("system") in (None, ""):
        return turns
    system = {"role": "system", "content": require_text(row["system"], "system", blank=True)}
    if turns[0]["role"] not in ("system", "developer"):
        return [system, *turns]
    if turns[0]["content"] != system["content"]:
        raise RowError("has one system prompt in the column 'system' and another as its first turn: keep one.")
    return turns


def suited(turns: list[Message], template: ChatTemplate, tools: list[Any] | None) -> list[Message]:
    """The turns as the template can take them: where it knows no developer, that is the system.

    Args:
        turns: The turns.
        template: The chat template.
        tools: JSON schemas of the tools that the assistant may call.

    Raises:
        RowError: If a turn calls tools, and the template writes no calls: the assistant would learn to be silent.
    """
    source = template.source(tools)
    if tools and "tools" not in source:
        rank_zero_warn("The chat template does not mention tools: the column 'tools' has no effect.")
    if "tool_calls" not in source and any(turn.get("tool_calls") for turn in turns):
        raise RowError(
            "has tool_calls, and the chat template does not write them: give a chat_template that does, or remove the "
            "row."
        )
    if "developer" in source:
        return turns
    return [{**turn, "role": "system"} if turn["role"] == "developer" else turn for turn in turns]


def _own_turns(row: Mapping[str, Any], form: Format, labelled: bool) -> tuple[list[Message], int]:
    if form in ("messages", "sharegpt"):
        (column,), _ = _COLUMNS[form]
        return turns_of(row[column], column), 0
    if form == "prompt_completion":
        prompt = turns_of(row["prompt"], "prompt", role="user")
        answer = turns_of(row["completion"], "completion", role="assistant") if labelled else []
        return prompt + answer, len(prompt)
    question = require_text(row["instruction"], "instruction")
    if str(row.get("input") or "").strip():
        question += "\n" + require_text(row["input"], "input")
    turns = [{"role": "user", "content": question}]
    if labelled:
        turns.append({"role": "assistant", "content": require_text(row["output"], "output")})
    return turns, 1


def turns_of(value: object, column: str, role: str | None = None) -> list[Message]:
    """The turns in a cell: of the form of OpenAI (role, content) or ShareGPT (from, value), as JSON too, or a text.

    Args:
        value: The cell.
        column: Its column, for errors.
        role: Role of a cell that is one text; None: it must hold turns, and a text is their JSON, as in a CSV.

    Raises:
        RowError: If it holds no turns, or one of them has an unknown role or no text where it needs one.
    """
    if role is not None and isinstance(value, str):
        return [{"role": role, "content": require_text(value, column)}]
    turns = list_in(value)
    if not turns:
        raise RowError(f"has {value!r} in the column {column!r}, not a list of turns: fill it in or remove the row.")
    numbers = range(len(turns))
    return per_row(_turn, turns, [f"has in the column {column!r} a turn {i} (counted from 0) that" for i in numbers])


def tools_of(value: object) -> list[Any] | None:
    """The JSON schemas of tools in a cell, which may hold them as JSON text; None if there are none.

    Raises:
        RowError: If it holds anything else.
    """
    if not value:
        return None
    try:
        found = parse_json(value) if isinstance(value, str) else _without_nulls(value)
    except ValueError as error:
        raise RowError(f"has no JSON in the column 'tools' ({error}): write a list of schemas.") from error
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise RowError(f"has {value!r} in the column 'tools', not a list of JSON schemas.")
    return found or None


def _turn(value: object) -> Message:
    if not isinstance(value, dict):
        raise RowError(f"is {value!r}, not an object with role and content.")
    turn = _without_nulls(value)
    if "from" in turn and "role" not in turn:
        turn = {"role": turn.pop("from"), "content": turn.pop("value", None), **turn}
        if turn["role"] == "function_call":
            turn["tool_calls"] = _calls_of(turn.pop("content"))
        turn["role"] = _SHAREGPT.get(str(turn["role"]), turn["role"])
    if turn.get("role") not in ROLES:
        raise RowError(f"has the role {turn.get('role')!r}: the roles are {', '.join(ROLES)}.")
    if turn.get("weight", 1) not in (0, 1):
        raise RowError(f"has the weight {turn['weight']!r}: a turn is trained (1) or not (0).")
    text = _text_of(turn.get("content"))
    calls = turn["role"] == "assistant" and turn.get("tool_calls")
    if text is None and not calls:
        raise RowError("has no content: fill it in or remove the row.")
    if turn["role"] == "assistant" and not calls and not str(text).strip():
        raise RowError("is an assistant's turn without text: fill it in or remove the row.")
    return {**turn, "content": text or ""}


def _calls_of(value: object) -> list[Any]:
    """The calls of tools in the value of a ShareGPT turn: the JSON of one, or of several."""
    try:
        found = parse_json(value) if isinstance(value, str) else value
    except ValueError:
        found = None
    calls = found if isinstance(found, list) else [found]
    if not all(isinstance(call, dict) and "name" in call for call in calls):
        raise RowError(f"calls a tool by {value!r}: write JSON with name and arguments.")
    return [{"type": "function", "function": call} for call in calls]


def _text_of(content: object) -> str | None:
    """The text of a turn, its parts joined; None if it has none."""
    if content is None or isinstance(content, str):
        return content
    parts: list[Any] = content if isinstance(content, list) else [content]
    for part in parts:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RowError(f"has content that is not text: {part!r}. Write a text, or parts of type text.")
    return "".join(part["text"] for part in parts)


def _without_nulls(value: Any) -> Any:
    """``value`` without the keys that are null: a table fills in those that other rows have."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
