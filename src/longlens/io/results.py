"""A folder of results from which an interrupted job continues: its contents, its progress and its final files.

While a job runs, `.work/` holds raw arrays and a journal; a unit of work counts once its rows are on the disk and its
line is in the journal. `manifest.json` describes the job; continuing with another model, option or input is refused.
At the end the raw arrays become the files of the chosen format, each moved into place whole, and `.work/` is removed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from longlens.errors import InputError, LonglensWarning
from longlens.io.row_array import RowArray

MANIFEST = "manifest.json"
WORK = ".work"
JOURNAL = "journal.jsonl"
LOCK = "lock"
# the entry of a key for options that the final files depend on, and the units do not
FINISH = "finish"


@dataclass(frozen=True)
class ArraySpec:
    """An array of the results: one row for each protein (`axis` "protein") or residue ("residue")."""

    name: str
    axis: str
    row: tuple[int, ...]
    dtype: str = "float32"


# differences between two jobs that a message lists, at most
LISTED = 10


class ResultFolder:
    """One job's folder. `key` is everything that decides the result, as plain JSON."""

    def __init__(
        self,
        path: Path,
        key: dict[str, Any],
        specs: list[ArraySpec],
        first_run_choices: dict[str, Any],
        about: dict[str, Any] | None = None,
        run: dict[str, Any] | None = None,
    ) -> None:
        """Open or make the folder. `first_run_choices`: choices of the first run that later ones take over.

        `about` describes the results and `run` this run of the command; the manifest keeps both, and they may differ
        between runs. Raises `InputError` if the folder holds results of another job, with the difference, or files that
        are not results. A folder of another job in which no unit of work is complete yet is started again.
        """
        self.path, self.specs, self.work = path, specs, path / WORK
        self.arrays: dict[str, RowArray] = {}
        self._locked: IO[str] | None = None
        before = job_before(path, key)
        self._key, self._about = key, about or {}
        self.complete: bool = before is not None and before["complete"]
        if before is not None and self.complete:
            self.first_run_choices: dict[str, Any] = before["first_run_choices"]
            self.runs: list[dict[str, Any]] = before.get("runs", [])
            self._refuse_missing(before["files"])
            # left by a run that was killed just before its end
            shutil.rmtree(self.work, ignore_errors=True)
            return
        self.work.mkdir(parents=True, exist_ok=True)
        # released when this process ends, however it ends
        self._locked = lock(self.work / LOCK, path)
        if before is None:
            for path_ in self.work.iterdir():
                if path_.name != LOCK:
                    shutil.rmtree(path_) if path_.is_dir() else path_.unlink()
        self.first_run_choices = first_run_choices if before is None else before["first_run_choices"]
        self.runs = [] if before is None else before.get("runs", [])
        self._mend_journal()
        self.runs.append({"first_unit": self.done(), **(run or {})})
        self._write_manifest(complete=False)
        self.arrays = {
            spec.name: RowArray(self.work / f"{number:02d}.raw", spec.dtype, spec.row)
            for number, spec in enumerate(specs)
        }

    def _write_manifest(self, *, complete: bool, files: dict[str, int] | None = None) -> None:
        manifest = {
            "job": self._key,
            "first_run_choices": self.first_run_choices,
            "complete": complete,
            "runs": self.runs,
            **self._about,
        }
        if files is not None:
            manifest["files"] = files
        write_whole(self.path / MANIFEST, as_json(manifest))

    def _refuse_missing(self, sizes: dict[str, int]) -> None:
        gone = [name for name, count in sizes.items() if _bytes_of(self.path / name) != count]
        if gone:
            raise InputError(
                f"{self.path} is marked complete, but {', '.join(gone)} was removed or changed since; give another "
                f"folder, or remove {self.path / MANIFEST} and the other files to compute the results again"
            )

    def _mend_journal(self) -> None:
        """Remove a last line that a crash cut off."""
        journal = self.work / JOURNAL
        lines = journal.read_bytes() if journal.is_file() else b""
        if lines and not lines.endswith(b"\n"):
            write_whole(journal, lines[: lines.rfind(b"\n") + 1])

    def done(self) -> int:
        """How many units of work are complete; these are the first ones."""
        return _units_done(self.work)

    def commit(self, unit: int) -> None:
        """Record unit `unit` as done: its rows are written to the disk first, then its line in the journal."""
        for array in self.arrays.values():
            array.sync()
        journal = self.work / JOURNAL
        if journal.is_file() and _last_byte(journal) not in (b"", b"\n"):
            whole = journal.read_bytes()
            write_whole(journal, whole[: whole.rfind(b"\n") + 1])
        with journal.open("ab") as file:
            file.write(json.dumps({"unit": unit}).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def place(self, path: Path) -> Path:
        """Move a file or folder made in `work` into the result folder, whole; returns its new path."""
        sync_tree(path)
        target = self.path / path.name
        if target.is_dir():
            # left by a run that was killed after this move and before the unit was recorded
            shutil.rmtree(target)
        path.replace(target)
        return target

    def describe(self, more: dict[str, Any]) -> None:
        """Add to what the manifest of the finished job says of its results."""
        self._about = {**self._about, **more}

    def close(self) -> None:
        """Release the folder, whether the job is done or not."""
        for array in self.arrays.values():
            array.close()
        self.arrays = {}
        if self._locked is not None:
            self._locked.close()

    def finish(self, files: list[Path], finished: str | None = None) -> None:
        """Mark the results, `files` moved into place, as complete, and remove what was needed to make them.

        `finished`: the date for the manifest.
        """
        sync_tree(self.path)
        if finished is not None:
            self.runs[-1]["finished"] = finished
        self._write_manifest(complete=True, files={path.name: _bytes_of(path) for path in files})
        self.complete = True
        self.close()
        shutil.rmtree(self.work, ignore_errors=True)


def lock(path: Path, folder: Path) -> IO[str]:
    """Lock the file `path` until the result is closed or the process ends. Raises `InputError` if another process has
    locked it: `folder` is in use."""
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise InputError(
            f"expected a folder that no other process uses, got {folder}; wait for the other process, or give another "
            "folder"
        ) from None
    except OSError as error:
        warnings.warn(
            f"{folder}: its file system has no locks ({error.strerror}); do not let two processes work in it",
            LonglensWarning,
            stacklevel=2,
        )
    return file


@contextmanager
def writing(output: Path, kept: str = "nothing is lost") -> Iterator[None]:
    """Turn an error of the disk into an `InputError` that says what is not lost (`kept`) and what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = f"{kept}: free some space and run the same command again"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = "give a folder that you may write to, or change its permissions"
        else:
            advice = f"{kept}: mend this and run the same command again"
        raise InputError(f"{output}: cannot be written ({reason}); {advice}") from error


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder. Raises `InputError` if it is not one that longlens wrote."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: expected a manifest written by longlens, got a broken one ({error})") from None
    if not isinstance(manifest, dict) or not {"complete", "job"} <= manifest.keys():
        raise InputError(f"{path}: expected a manifest written by longlens, got another file")
    return manifest


def job_before(path: Path, key: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of the same job in a folder; None if there is nothing to continue. Writes nothing.

    Raises `InputError` if the folder holds results of another job, or files that are not results.
    """
    manifest = path / MANIFEST
    if manifest.is_file():
        before = read_manifest(path)
        if before["complete"]:
            _refuse_difference(path, before["job"], key)
            return before
        if _units_done(path / WORK):
            # what the end of the job alone depends on may change until then
            _refuse_difference(path, *({**part, FINISH: None} for part in (before["job"], key)))
            return before
        return before if _changes(before["job"], key) == [] else None
    # a run that was killed while it wrote its manifest leaves this file
    partial_manifest = path / f"{MANIFEST}.half"
    if path.exists() and (not path.is_dir() or set(path.iterdir()) - {partial_manifest, path / WORK}):
        raise InputError(f"expected {path} to be empty, new or a longlens result, found other files in it")
    return None


def _units_done(work: Path) -> int:
    """Units in the journal; a last line that is cut off does not count. Raises `InputError` if one is missing."""
    journal = work / JOURNAL
    text = journal.read_text(encoding="utf-8") if journal.is_file() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    for number, line in enumerate(lines):
        if json.loads(line) != {"unit": number}:
            raise InputError(
                f"{journal}: expected unit {number} in line {number + 1}, got {line}; the job in this folder cannot "
                "be continued: give another folder"
            )
    return len(lines)


def write_whole(path: Path, data: bytes) -> None:
    """Replace a file in one step: after a crash there is the old one or the new one."""
    half = path.with_name(f"{path.name}.half")
    with half.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    half.replace(path)


def sync_tree(path: Path) -> None:
    """Flush a file, or a folder and everything in it, to the disk."""
    for part in (path, *(path.rglob("*") if path.is_dir() else ())):
        handle = os.open(part, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _bytes_of(path: Path) -> int:
    """Bytes in a file, or in all files of a folder; -1 if there is neither."""
    if path.is_dir():
        return sum(part.stat().st_size for part in path.rglob("*") if part.is_file())
    return path.stat().st_size if path.is_file() else -1


def _last_byte(path: Path) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
        return file.read(1)


def as_json(value: dict[str, Any]) -> bytes:
    """A manifest as the text of its file."""
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def plain_json(value: Any) -> Any:
    """A value for JSON: None for every number that is not finite, which JSON has no number for."""
    if isinstance(value, Mapping):
        return {name: plain_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    flat_before, flat_now = _flatten(before), _flatten(json.loads(json.dumps(now)))
    return [
        f"{name}: was {flat_before.get(name, 'absent')}, is {flat_now.get(name, 'absent')}"
        for name in sorted({*flat_before, *flat_now}) if flat_before.get(name) != flat_now.get(name)
    ]  # fmt: skip


def _refuse_difference(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    changed = _changes(before, now)
    if changed:
        more = f"\n  and {len(changed) - LISTED:,} more" if len(changed) > LISTED else ""
        listed = "\n  ".join(changed[:LISTED]) + more
        raise InputError(f"{path} holds the results of another job; give another output, or what differs:\n  {listed}")


def _flatten(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {
            k: v for key, part in value.items() for k, v in _flatten(part, f"{name}.{key}" if name else key).items()
        }
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        return {k: v for place, part in enumerate(value) for k, v in _flatten(part, f"{name}[{place}]").items()}
    return {name: value}
