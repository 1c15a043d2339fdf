"""Records of edit requests: their fields, with messages that name record and field."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_sparse.errors import UsageError, parse_json


@dataclass(frozen=True)
class Probe:
    """A prompt, and the texts that answer it.

    Args:
        prompt: What the model goes on from.
        answers: Names of the same thing, any of which is right; at least one.
    """

    prompt: str
    answers: tuple[str, ...]


def read_records(path: Path) -> list[Any]:
    """The records of a file of JSON or JSON Lines.

    Raises:
        UsageError: If it cannot be read, or is no list.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The edit requests {str(path)!r} cannot be read: {error}.") from error
    try:
        if path.suffix == ".jsonl":
            # Not splitlines(): texts may have other ends of lines in them.
            return [parse_json(line) for line in text.split("\n") if line.strip()]
        records = parse_json(text)
    except ValueError as error:
        raise UsageError(f"The edit requests {str(path)!r} are no JSON: {error}.") from error
    if not isinstance(records, list):
        raise UsageError(f"{path} must be a list of records; it is a {type(records).__name__}.")
    return records


@dataclass(frozen=True)
class Record:
    """One record, with its place for messages, and the names of the fields that were asked for."""

    path: Path
    index: int
    content: Mapping[str, Any]
    asked: set[str] = field(default_factory=set)

    def get(self, name: str) -> Any:
        """The value of a field; None if it is missing."""
        self.asked.add(name)
        return self.content.get(name)

    def fail(self, name: str, what: str) -> UsageError:
        """The error that says what is wrong with a field."""
        return UsageError(f"{self.path}, record {self.index} (counted from 0), field {name!r}: {what}.")

    def text(self, *names: str) -> str:
        """The text in the first of these fields that there is."""
        name = next((name for name in names if name in self.content), None)
        if name is None:
            raise self.fail(names[0], f"is missing; the record has {sorted(self.content)}")
        return self.as_text(name, self.get(name))

    def as_text(self, name: str, value: Any) -> str:
        """``value``, if it is a text that is not blank."""
        if not isinstance(value, str) or not value.strip():
            raise self.fail(name, f"must be a text; it is {short(value)}")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """The texts of a field that may be missing, or one text."""
        value = self.get(name)
        if value is None or value == "":
            return ()
        return tuple(self.as_text(name, text) for text in (value if isinstance(value, list) else [value]))

    def probes(self, name: str) -> dict[str, tuple[Probe, ...]]:
        """Kind to probes; empty where the record has none."""
        kinds = self.get(name)
        if kinds is None:
            return {}
        if isinstance(kinds, list):  # CKnowEdit; the kind has the name that EasyEdit gives it
            kinds = {f"{name[:3]}_hop": [probe for probe in kinds if probe]}
        if not isinstance(kinds, dict):
            raise self.fail(name, f"must map kinds to lists of probes; it is {short(kinds)}")
        found = {kind: tuple(self._listed(f"{name}.{kind}", probes)) for kind, probes in kinds.items() if probes}
        return {kind: probes for kind, probes in found.items() if probes}

    def inputs(self, name: str) -> dict[str, tuple[Probe, ...]]:
        """Kind to probes, from an argument of EasyEdit's: kind to a list of prompts and one of their answers."""
        kinds = self.get(name)
        if kinds is None:
            return {}
        if not isinstance(kinds, dict):
            raise self.fail(name, f"must map kinds to prompt and ground_truth; it is {short(kinds)}")
        return {kind: tuple(self._paired(f"{name}.{kind}", pair)) for kind, pair in kinds.items() if pair}

    def _paired(self, name: str, pair: Any) -> Iterator[Probe]:
        if not isinstance(pair, dict):
            raise self.fail(name, f"must have prompt and ground_truth; it is {short(pair)}")
        prompts, answers = pair.get("prompt"), pair.get("ground_truth")
        if not isinstance(prompts, list):
            prompts, answers = [prompts], [answers]
        if not isinstance(answers, list) or len(answers) != len(prompts):
            raise self.fail(f"{name}.ground_truth", f"must have {len(prompts)} answers, one for each prompt")
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            yield self.probe(f"{name}[{number}]", prompt, answer)

    def _listed(self, name: str, probes: Any) -> Iterator[Probe]:
        if not isinstance(probes, list):
            raise self.fail(name, f"must be a list of probes; it is {short(probes)}")
        for number, probe in enumerate(probes):
            place = f"{name}[{number}]"
            if not isinstance(probe, dict):
                raise self.fail(place, f"must have prompt and ground_truth; it is {short(probe)}")
            prompts = probe.get("prompt")
            for prompt in prompts if isinstance(prompts, list) and prompts else [prompts]:
                yield self.probe(place, prompt, probe.get("ground_truth", probe.get("answer")))

    def probe(self, name: str, prompt: Any, answers: Any) -> Probe:
        """A probe, whose answers may be nested lists of names."""
        return Probe(
            self.as_text(f"{name}.prompt", prompt), tuple(dict.fromkeys(self._answers(f"{name}.ground_truth", answers)))
        )

    def _answers(self, name: str, value: Any) -> list[str]:
        if isinstance(value, list) and value:
            return [text for part in value for text in self._answers(name, part)]
        return [self.as_text(name, value)]


def short(value: Any) -> str:
    """What a value is, in a message."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
