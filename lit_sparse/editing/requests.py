"""Edit requests, and how the usual files of them are read."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.fabric.utilities import rank_zero_warn

from lit_sparse.errors import UsageError
from lit_sparse.json_text import parse


@dataclass(frozen=True)
class Probe:
    """A prompt, and the texts that answer it.

    Args:
        prompt: What the model goes on from.
        answers: Names of the same thing, any of which is right; at least one.
    """

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class EditRequest:
    """A fact to change, and what to measure the change by.

    Args:
        index: Number of the record in its file, from 0.
        prompt: What the model goes on from.
        target_new: What it is to go on with.
        subject: What the fact is about; empty if the file does not say.
        rephrases: Other wordings of the prompt, which are to have the same answer.
        portability: Kind (such as ``Reasoning``) to probes that follow from the new fact.
        locality: Kind (such as ``Relation_Specificity``) to probes that the new fact has nothing to do with.
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

    A record is told by its fields: KnowEdit's (``prompt``, ``target_new``, and for WikiBio ``text``, ``labels``), those
    of ZsRE as MEND and EasyEdit have it (``src``, ``alt``), of CounterFact (``requested_rewrite``), and of EasyEdit's
    flat files (``prompt`` with ``locality_prompt``). Fields that a record may lack (rephrased prompts, portability,
    locality, each of their kinds) are measured where they are.

    Args:
        file: A list of records as JSON, or JSON Lines.

    Returns:
        The requests, in the order of the file. Records of ZsRE without a new answer are left out, as EasyEdit does,
        with a warning.

    Raises:
        UsageError: If the file cannot be read or is empty, or a record lacks a field or has something else in it; the
            message names the record, counted from 0, and the field.
    """
    path = Path(file)
    records = _records(path)
    unchanged = [i for i, record in enumerate(records) if isinstance(record, dict) and record.get("alt") == ""]
    if unchanged:
        rank_zero_warn(f"{path}: {len(unchanged)} records have an empty new answer (alt) and are left out.")
    requests = [_request(path, i, record) for i, record in enumerate(records) if i not in set(unchanged)]
    if not requests:
        raise UsageError(f"{path} holds no edit request.")
    return requests


def _records(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The edit requests {str(path)!r} cannot be read: {error}.") from error
    try:
        if path.suffix == ".jsonl":
            # Not splitlines(): texts may have other ends of lines in them.
            return [parse(line) for line in text.split("\n") if line.strip()]
        records = parse(text)
    except ValueError as error:
        raise UsageError(f"The edit requests {str(path)!r} are no JSON: {error}.") from error
    if not isinstance(records, list):
        raise UsageError(f"{path} must be a list of records; it is a {type(records).__name__}.")
    return records


@dataclass(frozen=True)
class _Record:
    """One record, with its place for messages."""

    path: Path
    index: int
    content: Mapping[str, Any]

    def fail(self, name: str, what: str) -> UsageError:
        return UsageError(f"{self.path}, record {self.index} (counted from 0), field {name!r}: {what}.")

    def text(self, *names: str) -> str:
        """The text in the first of these fields that there is."""
        name = next((name for name in names if name in self.content), None)
        if name is None:
            raise self.fail(names[0], f"is missing; the record has {sorted(self.content)}")
        return self.as_text(name, self.content[name])

    def as_text(self, name: str, value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            raise self.fail(name, f"must be a text; it is {_short(value)}")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """The texts of a field that may be missing, or one text."""
        value = self.content.get(name)
        if value is None or value == "":
            return ()
        return tuple(self.as_text(name, text) for text in (value if isinstance(value, list) else [value]))

    def probes(self, name: str) -> dict[str, tuple[Probe, ...]]:
        """Kind to probes; empty where the record has none."""
        kinds = self.content.get(name)
        if kinds is None:
            return {}
        if not isinstance(kinds, dict):
            raise self.fail(name, f"must map kinds to lists of probes; it is {_short(kinds)}")
        found = {kind: tuple(self._listed(f"{name}.{kind}", probes)) for kind, probes in kinds.items() if probes}
        return {kind: probes for kind, probes in found.items() if probes}

    def _listed(self, name: str, probes: Any) -> Iterator[Probe]:
        if not isinstance(probes, list):
            raise self.fail(name, f"must be a list of probes; it is {_short(probes)}")
        for number, probe in enumerate(probes):
            place = f"{name}[{number}]"
            if not isinstance(probe, dict):
                raise self.fail(place, f"must have prompt and ground_truth; it is {_short(probe)}")
            prompts = probe.get("prompt")
            for prompt in prompts if isinstance(prompts, list) and prompts else [prompts]:
                yield self.probe(place, prompt, probe.get("ground_truth"))

    def probe(self, name: str, prompt: Any, answers: Any) -> Probe:
        """A probe, whose answers may be nested lists of names."""
        return Probe(
            self.as_text(f"{name}.prompt", prompt), tuple(dict.fromkeys(self._answers(f"{name}.ground_truth", answers)))
        )

    def _answers(self, name: str, value: Any) -> list[str]:
        if isinstance(value, list) and value:
            return [text for part in value for text in self._answers(name, part)]
        return [self.as_text(name, value)]


def _request(path: Path, index: int, content: Any) -> EditRequest:
    record = _Record(path, index, content)
    if not isinstance(content, dict):
        raise UsageError(f"{path}, record {index} (counted from 0), must be an object; it is {_short(content)}.")
    read = next((read for mark, read in _FORMATS.items() if mark in content), None)
    if read is None:
        raise record.fail("prompt", f"is missing, and no other format is known with the fields {sorted(content)}")
    return read(record)


def _knowedit(record: _Record) -> EditRequest:
    locality = record.probes("locality")
    if "locality_prompt" in record.content:  # EasyEdit's flat files
        answers = record.content.get("locality_ground_truth")
        locality["Neighborhood"] = (record.probe("locality", record.content["locality_prompt"], answers),)
    return EditRequest(
        record.index,
        record.text("prompt"),
        record.text("target_new"),
        "".join(record.texts("subject")),
        (*record.texts("rephrase"), *record.texts("rephrase_prompt")),
        record.probes("portability"),
        locality,
    )


def _wikibio(record: _Record) -> EditRequest:
    return EditRequest(
        record.index,
        record.text("text"),
        record.text("labels"),
        "".join(record.texts("concept")),
        portability=record.probes("portability"),
        locality=record.probes("locality"),
    )


def _mend(record: _Record) -> EditRequest:
    content = record.content
    portability: dict[str, tuple[Probe, ...]] = {}
    asked = content.get("portability")
    if asked is not None:
        if not isinstance(asked, dict):
            raise record.fail("portability", f"must have New Question and New Answer; it is {_short(asked)}")
        portability["Reasoning"] = (record.probe("portability", asked.get("New Question"), asked.get("New Answer")),)
    locality: dict[str, tuple[Probe, ...]] = {}
    if "loc" in content:
        locality["Neighborhood"] = (record.probe("loc", content["loc"], content.get("loc_ans")),)
    return EditRequest(
        record.index,
        record.text("src"),
        record.text("alt"),
        "".join(record.texts("subject")),
        record.texts("rephrase"),
        portability,
        locality,
    )


def _counterfact(record: _Record) -> EditRequest:
    rewrite = record.content["requested_rewrite"]
    if not isinstance(rewrite, dict):
        raise record.fail("requested_rewrite", f"must be an object; it is {_short(rewrite)}")
    inner = _Record(record.path, record.index, rewrite)
    subject = inner.text("subject")
    targets = {
        name: inner.as_text(f"{name}.str", value.get("str") if isinstance(value, dict) else value)
        for name, value in rewrite.items()
        if name in ("target_new", "target_true")
    }
    if "target_new" not in targets:
        raise inner.fail("target_new", "is missing")
    neighbours = record.texts("neighborhood_prompts")
    if neighbours and "target_true" not in targets:
        raise inner.fail("target_true", "is missing, which is the answer to neighborhood_prompts")
    probes = tuple(Probe(prompt, (targets["target_true"],)) for prompt in neighbours)
    return EditRequest(
        record.index,
        inner.text("prompt").replace("{}", subject),
        targets["target_new"],
        subject,
        record.texts("paraphrase_prompts"),
        locality={"Neighborhood": probes} if probes else {},
    )


# Told by a field that those after it lack.
_FORMATS: dict[str, Callable[[_Record], EditRequest]] = {
    "requested_rewrite": _counterfact,
    "src": _mend,
    "prompt": _knowedit,
    "labels": _wikibio,
}


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
