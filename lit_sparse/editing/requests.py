"""Edit requests, and readers for the files in which they are published."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lightning.fabric.utilities import rank_zero_warn

from lit_sparse.editing.records import Probe as Probe
from lit_sparse.editing.records import Probes, Record, read_records
from lit_sparse.errors import UsageError


@dataclass(frozen=True)
class EditRequest:
    """A fact to change, and the probes that measure the change.

    Args:
        index: Number of the record in its file, from 0.
        prompt: Text that the model continues.
        target_new: The new continuation.
        subject: Subject of the fact; empty if the file does not give it.
        rephrases: Other wordings of the prompt, with the same answer.
        portability: Kind (such as ``Reasoning``) → probes that follow from the new fact.
        locality: Kind (such as ``Relation_Specificity``) → probes that are unrelated to the new fact.
    """

    index: int
    prompt: str
    target_new: str
    subject: str = ""
    rephrases: tuple[str, ...] = ()
    portability: Mapping[str, tuple[Probe, ...]] = field(default_factory=dict)
    locality: Mapping[str, tuple[Probe, ...]] = field(default_factory=dict)


def read_requests(file: str | os.PathLike[str]) -> list[EditRequest]:
    """Read a file of edit requests as it was published.

    The fields of a record tell its format: KnowEdit (``prompt``, ``target_new``; for WikiBio ``text``, ``labels``),
    ZsRE as in MEND and EasyEdit (``src``, ``alt``), CounterFact (``requested_rewrite``), CKnowEdit (lists of probes
    with ``answer``), or EasyEdit's flat files (``prompt`` with ``locality_prompt``, or with the names of its arguments:
    ``rephrase_prompts``, ``portability_inputs``, ``locality_inputs``). Rephrased prompts, portability and locality are
    optional. ``{}`` in a prompt stands for the subject. A warning names fields that are not read, but for those which
    published files have beside the request.

    Args:
        file: A list of records as JSON; JSON Lines; CSV or TSV, whose columns are flat fields; or the arguments of
            EasyEdit's ``edit`` as a JSON object, with a list for ``prompts``.

    Returns:
        The requests, in the order of the file. As in EasyEdit, ZsRE records without a new answer are left out, with a
        warning.

    Raises:
        UsageError: If the file cannot be read or is empty, or a field of a record is missing or wrong. The message
            names the record, counted from 0, and the field.
    """
    path = Path(file)
    unread: set[str] = set()
    requests, unchanged = [], 0
    for index, content in enumerate(read_records(path)):
        if not isinstance(content, dict):
            raise UsageError(f"{path}, record {index} (counted from 0), must be an object; it is {content!r:.60}.")
        if content.get("alt") == "":
            unchanged += 1
            continue
        record = Record(path, index, content)
        requests.append(_reader(record)(record))
        unread |= {name for name in set(content) - record.read - _BESIDE if content[name]}
    if unchanged:
        rank_zero_warn(f"{path}: {unchanged} records have an empty new answer (alt) and are left out.")
    if unread:
        rank_zero_warn(
            f"{path}: the fields {', '.join(sorted(unread))} are not read. docs/editing.md describes those that are."
        )
    if not requests:
        raise UsageError(f"{path} holds no edit request.")
    return requests


def _reader(record: Record) -> Callable[[Record], EditRequest]:
    for mark, reader in _FORMATS.items():
        if mark in record.content:
            return reader
    raise record.error("prompt", f"is missing, and no other format has the fields {sorted(record.content)}")


def _knowedit(record: Record) -> EditRequest:
    subject = "".join(record.texts("subject") or record.texts("concept"))
    probes = {
        name: {**record.probes(name), **record.inputs(f"{name}_inputs"), **record.flat(name, kind)}
        for name, kind in (("portability", "Reasoning"), ("locality", "Neighborhood"))
    }
    return EditRequest(
        index=record.index,
        prompt=_about(subject, record.text("prompt", "text")),
        target_new=record.text("target_new", "labels"),
        subject=subject,
        rephrases=tuple(
            _about(subject, text) for text in record.texts("rephrase", "rephrase_prompt", "rephrase_prompts")
        ),
        **probes,
    )


def _mend(record: Record) -> EditRequest:
    portability: Probes = {}
    value = record.get("portability")
    if value is not None:
        asked = record.mapping("portability", value, "New Question and New Answer")
        portability["Reasoning"] = (record.probe("portability", asked.get("New Question"), asked.get("New Answer")),)
    locality: Probes = {}
    if "loc" in record.content:
        locality["Neighborhood"] = (record.probe("loc", record.get("loc"), record.get("loc_ans")),)
    return EditRequest(
        index=record.index,
        prompt=record.text("src"),
        target_new=record.text("alt"),
        subject="".join(record.texts("subject")),
        rephrases=record.texts("rephrase"),
        portability=portability,
        locality=locality,
    )


def _counterfact(record: Record) -> EditRequest:
    rewrite = record.mapping("requested_rewrite", record.get("requested_rewrite"), "prompt, subject and target_new")
    inner = Record(record.path, record.index, rewrite)
    subject = inner.text("subject")
    neighbours = record.texts("neighborhood_prompts")

    def answer(name: str) -> str:
        value = rewrite.get(name)
        return inner.as_text(f"{name}.str", value.get("str") if isinstance(value, dict) else value)

    probes = tuple(Probe(prompt, (answer("target_true"),)) for prompt in neighbours)
    return EditRequest(
        index=record.index,
        prompt=_about(subject, inner.text("prompt")),
        target_new=answer("target_new"),
        subject=subject,
        rephrases=record.texts("paraphrase_prompts"),
        locality={"Neighborhood": probes} if probes else {},
    )


def _about(subject: str, prompt: str) -> str:
    """Put the subject, if there is one, in the place of ``{}``."""
    return prompt.replace("{}", subject) if subject else prompt


# What published files have beside the request: old answers, numbers, relations, and prompts of other metrics.
_BESIDE = frozenset(
    {
        *("answers", "attribute_prompts", "case_id", "cond", "generation_prompts"),
        *("ground_truth", "id", "pararel_idx", "pred", "target_old"),
    }
)

# A field that marks the format → reader. The first match counts.
_FORMATS: dict[str, Callable[[Record], EditRequest]] = {
    "requested_rewrite": _counterfact,
    "src": _mend,
    "prompt": _knowedit,
    "labels": _knowedit,
}
