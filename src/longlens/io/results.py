"""A folder of results that is safe against being killed: what is in it, how far it got, and its final files.

While a job runs, `.work/` holds raw arrays and a journal; a unit of work counts once its rows are on the disk and its
line is in the journal. `manifest.json` says what the job was; going on with another model, option or input is refused.
At the end the raw arrays become the files of the chosen format, each moved into place whole, and `.work/` goes.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from longlens.errors import InputError
from longlens.io.row_array import FlatArray

MANIFEST = "manifest.json"
WORK = ".work"
JOURNAL = "journal.jsonl"
LOCK = "lock"


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
            # half a manifest is what a run leaves that was killed while it began
            begun = path / f"{MANIFEST}.half"
            if path.exists() and (not path.is_dir() or set(path.iterdir()) - {begun, path / WORK}):
                raise InputError(f"expected {path} to be empty, new or a longlens result, found other files in it")
            self.settled, self.complete = settled, False
            path.mkdir(parents=True, exist_ok=True)
            write_whole(manifest, _as_json({"job": identity, "settled": settled, "complete": False}))
        self._identity = identity
        self.work = path / WORK
        self.arrays: dict[str, FlatArray] = {}
        self._locked: IO[str] | None = None
        if self.complete:
            self._refuse_missing(before["files"])
            # left by a run that was killed at its very end
            shutil.rmtree(self.work, ignore_errors=True)
        else:
            self.work.mkdir(exist_ok=True)
            self._lock()
            self._mend_journal()
            self.arrays = {
                spec.name: FlatArray(self.work / f"{number:02d}.raw", spec.dtype, spec.row)
                for number, spec in enumerate(specs)
            }

    def _lock(self) -> None:
        """Keep other processes out until this one ends, however it ends."""
        self._locked = (self.work / LOCK).open("w")
        try:
            fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise InputError(
                f"another process is at work in {self.path}; wait for it, or give another folder"
            ) from None

    def _refuse_missing(self, sizes: dict[str, int]) -> None:
        gone = [name for name, count in sizes.items() if _bytes_of(self.path / name) != count]
        if gone:
            raise InputError(
                f"{self.path} is marked complete, but {', '.join(gone)} was removed or changed since; give another "
                f"folder, or remove {self.path / MANIFEST} and what is left to make it anew"
            )

    def _mend_journal(self) -> None:
        """Drop a last line that a crash cut off."""
        journal = self.work / JOURNAL
        lines = journal.read_bytes() if journal.is_file() else b""
        if lines and not lines.endswith(b"\n"):
            write_whole(journal, lines[: lines.rfind(b"\n") + 1])

    def done(self) -> int:
        """Units of work that are complete, from the first on."""
        journal = self.work / JOURNAL
        lines = journal.read_text(encoding="utf-8").splitlines() if journal.is_file() else []
        for number, line in enumerate(lines):
            if json.loads(line) != {"unit": number}:
                raise InputError(
                    f"{journal}: expected unit {number} in line {number + 1}, got {line}; the folder cannot be "
                    "gone on with: give another"
                )
        return len(lines)

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

    def close(self) -> None:
        """Let go of the folder, whether the job is done or not."""
        for array in self.arrays.values():
            array.close()
        self.arrays = {}
        if self._locked is not None:
            self._locked.close()

    def finish(self, files: list[Path]) -> None:
        """Say that the results, `files` moved into place, are complete, and remove what was needed to make them."""
        sync_tree(self.path)
        sizes = {path.name: _bytes_of(path) for path in files}
        whole = {"job": self._identity, "settled": self.settled, "complete": True, "files": sizes}
        write_whole(self.path / MANIFEST, _as_json(whole))
        self.complete = True
        self.close()
        shutil.rmtree(self.work, ignore_errors=True)


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file in one step: after a crash there is the old one or the new one."""
    half = path.with_name(f"{path.name}.half")
    with half.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)


def sync_tree(path: Path) -> None:
    """Have a file, or a folder and all within, on the disk before going on."""
    for part in (path, *(path.rglob("*") if path.is_dir() else ())):
        handle = os.open(part, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _bytes_of(path: Path) -> int:
    """Bytes in a file, or in all files of a folder; -1 where there is neither."""
    if path.is_dir():
        return sum(part.stat().st_size for part in path.rglob("*") if part.is_file())
    return path.stat().st_size if path.is_file() else -1


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
