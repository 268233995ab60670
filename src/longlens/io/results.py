"""A folder of results that is safe against being killed: what is in it, how far it got, and its final files.

While a job runs, `.work/` holds raw arrays and a journal; a unit of work counts once its rows are on the disk and its
line is in the journal. `manifest.json` says what the job was; going on with another model, option or input is refused.
At the end the raw arrays become the files of the chosen format, each moved into place whole, and `.work/` goes.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longlens.errors import InputError
from longlens.io.flat import FlatArray

MANIFEST = "manifest.json"
WORK = ".work"
JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class ArraySpec:
    """An array of the results: one row for each protein (`axis` "protein") or residue ("residue")."""

    name: str
    axis: str
    row: tuple[int, ...]
    dtype: str = "float32"


class ResultFolder:
    """One job's folder. `identity` is everything that decides the result, as plain JSON."""

    def __init__(self, path: Path, identity: dict[str, Any], specs: list[ArraySpec], settled: dict[str, Any]) -> None:
        """Open or make the folder. `settled`: choices made for this run that a later one must take over.

        Raises `InputError` where the folder holds another job, with the difference, or something else altogether.
        """
        self.path, self.specs = path, specs
        manifest = path / MANIFEST
        if manifest.is_file():
            before = json.loads(manifest.read_text(encoding="utf-8"))
            _refuse_difference(path, before["job"], identity)
            self.settled: dict[str, Any] = before["settled"]
            self.complete: bool = before["complete"]
        else:
            if path.exists() and (not path.is_dir() or any(path.iterdir())):
                raise InputError(f"expected {path} to be empty, new or a longlens result, found other files in it")
            self.settled, self.complete = settled, False
            path.mkdir(parents=True, exist_ok=True)
            self._identity = identity
            write_whole(manifest, _as_json({"job": identity, "settled": settled, "complete": False}))
        self._identity = identity
        self.work = path / WORK
        self.arrays: dict[str, FlatArray] = {}
        if not self.complete:
            self.work.mkdir(exist_ok=True)
            self._mend_journal()
            self.arrays = {
                spec.name: FlatArray(self.work / f"{number:02d}.raw", spec.dtype, spec.row)
                for number, spec in enumerate(specs)
            }

    def _mend_journal(self) -> None:
        """Drop a last line that a crash cut off."""
        journal = self.work / JOURNAL
        lines = journal.read_bytes() if journal.is_file() else b""
        if lines and not lines.endswith(b"\n"):
            write_whole(journal, lines[: lines.rfind(b"\n") + 1])

    def done(self) -> int:
        """Units of work that are complete, from the first on."""
        journal = self.work / JOURNAL
        return journal.read_bytes().count(b"\n") if journal.is_file() else 0

    def commit(self, unit: int) -> None:
        """Count unit `unit` as done: its rows go to the disk first, then its line."""
        for array in self.arrays.values():
            array.sync()
        journal = self.work / JOURNAL
        if journal.is_file() and journal.read_bytes()[-1:] not in (b"", b"\n"):
            whole = journal.read_bytes()
            write_whole(journal, whole[: whole.rfind(b"\n") + 1])
        with journal.open("ab") as file:
            file.write(json.dumps({"unit": unit}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Say that the results are complete, and remove what was needed to make them."""
        for array in self.arrays.values():
            array.close()
        whole = {"job": self._identity, "settled": self.settled, "complete": True}
        write_whole(self.path / MANIFEST, _as_json(whole))
        self.complete = True
        shutil.rmtree(self.work, ignore_errors=True)


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file in one step: after a crash there is the old one or the new one."""
    half = path.with_name(f"{path.name}.half")
    with half.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)


def _as_json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _refuse_difference(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    flat_before, flat_now = _flatten(before), _flatten(json.loads(json.dumps(now)))
    changed = [
        f"{name}: was {flat_before.get(name, 'absent')}, is {flat_now.get(name, 'absent')}"
        for name in sorted({*flat_before, *flat_now}) if flat_before.get(name) != flat_now.get(name)
    ]  # fmt: skip
    if changed:
        listed = "\n  ".join(changed)
        raise InputError(f"{path} holds the results of another job; give another folder, or what differs:\n  {listed}")


def _flatten(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {
            k: v for key, part in value.items() for k, v in _flatten(part, f"{name}.{key}" if name else key).items()
        }
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        return {k: v for place, part in enumerate(value) for k, v in _flatten(part, f"{name}[{place}]").items()}
    return {name: value}
