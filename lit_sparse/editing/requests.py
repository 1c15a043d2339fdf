"""Edit requests, and how the usual files of them are read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.fabric.utilities import rank_zero_warn

from lit_sparse.editing.records import Probe as Probe
from lit_sparse.editing.records import Record, read_records, short
from lit_sparse.errors import UsageError


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
    of ZsRE as MEND and EasyEdit have it (``src``, ``alt``), of CounterFact (``requested_rewrite``), of CKnowEdit (lists
    of probes, with ``answer``), and of EasyEdit's flat files (``prompt`` with ``locality_prompt``, or with the names of
    its arguments: ``rephrase_prompts``, ``portability_inputs``, ``locality_inputs``). Fields that a record may lack
    (rephrased prompts, portability, locality, each of their kinds) are measured where they are. ``{}`` in a prompt
    stands for the subject. Other fields are left alone; a warning names those that look like probes.

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
    records = read_records(path)
    unchanged = [i for i, record in enumerate(records) if isinstance(record, dict) and record.get("alt") == ""]
    if unchanged:
        rank_zero_warn(f"{path}: {len(unchanged)} records have an empty new answer (alt) and are left out.")
    ignored: set[str] = set()
    requests = [_request(path, i, record, ignored) for i, record in enumerate(records) if i not in set(unchanged)]
    if ignored:
        rank_zero_warn(
            f"{path}: the fields {', '.join(sorted(ignored))} are not read, though they look like prompts to measure "
            "by. Those that are read: rephrase, portability and locality, as docs/editing.md describes them."
        )
    if not requests:
        raise UsageError(f"{path} holds no edit request.")
    return requests


def _request(path: Path, index: int, content: Any, ignored: set[str]) -> EditRequest:
    """The request of a record; the names of fields that it should perhaps have had are added to ``ignored``."""
    record = Record(path, index, content)
    if not isinstance(content, dict):
        raise UsageError(f"{path}, record {index} (counted from 0), must be an object; it is {short(content)}.")
    read = next((read for mark, read in _FORMATS.items() if mark in content), None)
    if read is None:
        raise record.fail("prompt", f"is missing, and no other format is known with the fields {sorted(content)}")
    request = read(record)
    ignored |= {name for name in set(content) - record.asked if content[name] and _PROBES.search(name)}
    return request


def _knowedit(record: Record) -> EditRequest:
    locality = {**record.probes("locality"), **record.inputs("locality_inputs")}
    if "locality_prompt" in record.content:  # EasyEdit's flat files
        prompt, answers = record.get("locality_prompt"), record.get("locality_ground_truth")
        locality["Neighborhood"] = (record.probe("locality", prompt, answers),)
    subject = "".join(record.texts("subject"))
    rephrases = [text for name in ("rephrase", "rephrase_prompt", "rephrase_prompts") for text in record.texts(name)]
    return EditRequest(
        record.index,
        _about(subject, record.text("prompt")),
        record.text("target_new"),
        subject,
        tuple(_about(subject, text) for text in rephrases),
        {**record.probes("portability"), **record.inputs("portability_inputs")},
        locality,
    )


def _about(subject: str, prompt: str) -> str:
    """``prompt`` with the subject in the place of ``{}``, where there is one."""
    return prompt.replace("{}", subject) if subject else prompt


def _wikibio(record: Record) -> EditRequest:
    return EditRequest(
        record.index,
        record.text("text"),
        record.text("labels"),
        "".join(record.texts("concept")),
        portability=record.probes("portability"),
        locality=record.probes("locality"),
    )


def _mend(record: Record) -> EditRequest:
    content = record.content
    portability: dict[str, tuple[Probe, ...]] = {}
    asked = record.get("portability")
    if asked is not None:
        if not isinstance(asked, dict):
            raise record.fail("portability", f"must have New Question and New Answer; it is {short(asked)}")
        portability["Reasoning"] = (record.probe("portability", asked.get("New Question"), asked.get("New Answer")),)
    locality: dict[str, tuple[Probe, ...]] = {}
    if "loc" in content:
        locality["Neighborhood"] = (record.probe("loc", record.get("loc"), record.get("loc_ans")),)
    return EditRequest(
        record.index,
        record.text("src"),
        record.text("alt"),
        "".join(record.texts("subject")),
        record.texts("rephrase"),
        portability,
        locality,
    )


def _counterfact(record: Record) -> EditRequest:
    rewrite = record.get("requested_rewrite")
    if not isinstance(rewrite, dict):
        raise record.fail("requested_rewrite", f"must be an object; it is {short(rewrite)}")
    inner = Record(record.path, record.index, rewrite)
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
        _about(subject, inner.text("prompt")),
        targets["target_new"],
        subject,
        record.texts("paraphrase_prompts"),
        locality={"Neighborhood": probes} if probes else {},
    )


_PROBES = re.compile("local|portab|rephras|paraphras|neighbo", re.IGNORECASE)

# Told by a field that those after it lack.
_FORMATS: dict[str, Callable[[Record], EditRequest]] = {
    "requested_rewrite": _counterfact,
    "src": _mend,
    "prompt": _knowedit,
    "labels": _wikibio,
}
