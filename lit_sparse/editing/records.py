"""The fields of edit requests; errors name the record and the field."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_sparse.data.csv_rows import texts_of
from lit_sparse.data.files import ending
from lit_sparse.errors import UsageError, parse_json

Probes = dict[str, tuple["Probe", ...]]
"""Kind → probes."""


@dataclass(frozen=True)
class Probe:
    """A prompt and the texts that answer it.

    Args:
        prompt: Text that the model continues.
        answers: Accepted answers, such as several names of one thing; at least one.
    """

    prompt: str
    answers: tuple[str, ...]


def read_records(path: Path) -> list[Any]:
    """The records of a file: JSON, JSON Lines, CSV or TSV with a header, or EasyEdit's arguments as one JSON object.

    Raises:
        UsageError: If the file cannot be read, or holds no records.
    """
    try:
        if ending(path) in (".csv", ".tsv"):
            return [row for table in texts_of(path) for row in table.to_pylist()]
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".jsonl":
            # Not splitlines(): texts may contain other line separators.
            return [parse_json(line) for line in text.split("\n") if line.strip()]
        records = parse_json(text)
    except (OSError, ValueError) as error:  # a UnicodeDecodeError is a ValueError
        kind = ending(path).removeprefix(".").upper() if ending(path) in (".csv", ".tsv") else "JSON"
        raise UsageError(f"The edit requests {str(path)!r} cannot be read as {kind}: {error}.") from error
    if isinstance(records, dict) and "prompts" in records:
        return _of_arguments(path, records)
    if not isinstance(records, list):
        raise UsageError(f"{path} must be a list of records; it is a {type(records).__name__}.")
    return records


def _of_arguments(path: Path, arguments: Mapping[str, Any]) -> list[Any]:
    """Records of the arguments of EasyEdit's ``edit``, which are lists with an entry for each prompt."""
    prompts = arguments["prompts"]
    count = len(prompts) if isinstance(prompts, list) else 0

    def entries(name: str, values: Any) -> list[Any]:
        if not count or not isinstance(values, list) or len(values) != count:
            raise UsageError(f"{path}, field {name!r}: must be a list with one entry for each of the {count} prompts.")
        return values

    records: list[Any] = [{"prompt": prompt} for prompt in entries("prompts", prompts)]
    for name, value in arguments.items():
        if name in ("locality_inputs", "portability_inputs") and isinstance(value, dict):
            for kind, probes in value.items():
                found = probes if isinstance(probes, dict) else {}
                pairs = [entries(f"{name}.{kind}.{part}", found.get(part)) for part in ("prompt", "ground_truth")]
                for record, prompt, answer in zip(records, *pairs, strict=True):
                    if prompt:  # EasyEdit's own scripts write None or "" where a request has no probe
                        record.setdefault(name, {})[kind] = {"prompt": prompt, "ground_truth": answer}
        elif name != "prompts" and value is not None:
            for record, entry in zip(records, entries(name, value), strict=True):
                record[name] = entry
    return records


@dataclass(frozen=True)
class Record:
    """One record, its place in the file, and the names of the fields that were read."""

    path: Path
    index: int
    content: Mapping[str, Any]
    read: set[str] = field(default_factory=set)

    def get(self, name: str) -> Any:
        """The value of a field; None if it is missing."""
        self.read.add(name)
        return self.content.get(name)

    def error(self, name: str, problem: str) -> UsageError:
        """An error about a field."""
        return UsageError(f"{self.path}, record {self.index} (counted from 0), field {name!r}: {problem}.")

    def text(self, *names: str) -> str:
        """The text in the first of these fields that the record has."""
        name = next((name for name in names if name in self.content), None)
        if name is None:
            raise self.error(names[0], f"is missing; the record has {sorted(self.content)}")
        return self.as_text(name, self.get(name))

    def as_text(self, name: str, value: Any) -> str:
        """``value``, if it is a text that is not blank."""
        if not isinstance(value, str) or not value.strip():
            raise self.error(name, f"must be a text; it is {reprlib.repr(value)}")
        return value

    def texts(self, *names: str) -> tuple[str, ...]:
        """The texts of all these fields, each of which may be missing, one text, or a list."""
        found: list[str] = []
        for name in names:
            value = self.get(name)
            values = value if isinstance(value, list) else [] if value in (None, "") else [value]
            found += [self.as_text(name, text) for text in values]
        return tuple(found)

    def probe(self, name: str, prompt: Any, answers: Any) -> Probe:
        """A probe. ``answers`` is a text or a list, which may be nested."""
        texts = dict.fromkeys(self._flat(f"{name}.ground_truth", answers))
        return Probe(self.as_text(f"{name}.prompt", prompt), tuple(texts))

    def _flat(self, name: str, value: Any) -> list[str]:
        if isinstance(value, list) and value:
            return [text for part in value for text in self._flat(name, part)]
        return [self.as_text(name, value)]

    def mapping(self, name: str, value: Any, keys: str) -> Mapping[str, Any]:
        """``value``, if it is an object; ``keys`` says which keys it should have."""
        if not isinstance(value, dict):
            raise self.error(name, f"must have {keys}; it is {reprlib.repr(value)}")
        return value

    def probes(self, name: str) -> Probes:
        """Probes in KnowEdit's form, kind → list of probes, or CKnowEdit's, a list of probes."""
        value = self.get(name)
        if isinstance(value, list):  # EasyEdit names the kind like this
            value = {f"{name[:3]}_hop": [probe for probe in value if probe]}
        return self._kinds(name, value, self._listed)

    def inputs(self, name: str) -> Probes:
        """Probes in the form of EasyEdit's arguments: kind → a list of prompts and a list of as many answers."""
        return self._kinds(name, self.get(name), self._paired)

    def flat(self, name: str, kind: str) -> Probes:
        """The probe of flat files, a prompt and its answer in fields of their own."""
        prompt, answers = self.get(f"{name}_prompt"), self.get(f"{name}_ground_truth")
        return {} if prompt is None and answers is None else {kind: (self.probe(name, prompt, answers),)}

    def _kinds(self, name: str, value: Any, read: Callable[[str, Any], Iterator[Probe]]) -> Probes:
        kinds = {} if value is None else self.mapping(name, value, "kinds of probes as its keys")
        found = {kind: tuple(read(f"{name}.{kind}", probes)) for kind, probes in kinds.items() if probes}
        return {kind: probes for kind, probes in found.items() if probes}

    def _listed(self, name: str, probes: Any) -> Iterator[Probe]:
        if not isinstance(probes, list):
            raise self.error(name, f"must be a list of probes; it is {reprlib.repr(probes)}")
        for number, value in enumerate(probes):
            place = f"{name}[{number}]"
            probe = self.mapping(place, value, "prompt and ground_truth")
            prompts = probe.get("prompt")
            for prompt in prompts if isinstance(prompts, list) and prompts else [prompts]:
                yield self.probe(place, prompt, probe.get("ground_truth", probe.get("answer")))

    def _paired(self, name: str, value: Any) -> Iterator[Probe]:
        pair = self.mapping(name, value, "prompt and ground_truth")
        prompts, answers = pair.get("prompt"), pair.get("ground_truth")
        if not isinstance(prompts, list):
            prompts, answers = [prompts], [answers]
        if not isinstance(answers, list) or len(answers) != len(prompts):
            raise self.error(f"{name}.ground_truth", f"must have {len(prompts)} answers, one for each prompt")
        for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            yield self.probe(f"{name}[{number}]", prompt, answer)
