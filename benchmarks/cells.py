"""Runs that several processes share: each is a cell of a file of results, made once."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from variants import provenance

Found = dict[str, dict[str, Any]]
"""Results by the keys of their cells."""


def run_missing(
    store: Store, missing: Callable[[Found], dict[str, Any]], run: Callable[[Any], dict[str, Any]], processes: int
) -> None:
    """Run cells until none is missing; functions of modules, or partials of them, for they go to other processes.

    Args:
        store: Where results are kept.
        missing: The cells that can be run now and are not in the results, by their keys.
        run: Makes a cell's result.
        processes: How many take cells at a time.
    """
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_work, args=(store, missing, run)) for _ in range(processes - 1)]
    for other in others:
        other.start()
    _work(store, missing, run)
    for other in others:
        other.join()


def _work(store: Store, missing: Callable[[Found], dict[str, Any]], run: Callable[[Any], dict[str, Any]]) -> None:
    idle = 0
    parent = multiprocessing.parent_process()
    while idle < 2:  # a second look takes over what a killed process had claimed
        if parent is not None and not parent.is_alive():
            return  # who killed the command wants no more of its cells
        cells = missing(store.read())
        key = store.claim(list(cells))
        if key is None:
            idle += 1
            continue
        idle = 0
        try:
            if key not in store.read():  # else another finished it between our two looks
                result = {**run(cells[key]), **_made_by()}
                store.add(key, result)
                print(f"{key}: {result['score']:.2f}, {result['seconds']:.0f} s", flush=True)
        finally:
            store.release(key)


def _made_by() -> dict[str, Any]:
    """Versions, machine and commit; the command would tell where somebody keeps the data."""
    return {name: value for name, value in provenance().items() if name != "command"}


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return True


class Store:
    """Results in one file, to which several processes add, and claims of cells that are being run."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.claims = file.with_suffix(".claims")

    def read(self) -> Found:
        return json.loads(self.file.read_text()) if self.file.exists() else {}

    def add(self, key: str, result: dict[str, Any]) -> None:
        while not self._claim("store"):
            time.sleep(0.1)
        try:
            content = {**self.read(), key: result}
            beside = self.file.with_suffix(".new")
            beside.write_text(json.dumps(dict(sorted(content.items())), indent=1) + "\n")
            beside.replace(self.file)
        finally:
            self.release("store")

    def claim(self, keys: Sequence[str]) -> str | None:
        """The key of a cell that nobody else runs, if there is one."""
        return next((key for key in keys if self._claim(key)), None)

    def release(self, key: str) -> None:
        self._path(key).unlink(missing_ok=True)

    def _claim(self, key: str) -> bool:
        self.claims.mkdir(parents=True, exist_ok=True)
        path = self._path(key)
        try:
            with path.open("x") as file:
                file.write(str(os.getpid()))
            return True
        except FileExistsError:
            owner = path.read_text() if path.exists() else ""
            if owner.isdigit() and not _alive(int(owner)):
                path.unlink(missing_ok=True)  # left by a process that was killed
            return False

    def _path(self, key: str) -> Path:
        return self.claims / key.replace("/", "_")
