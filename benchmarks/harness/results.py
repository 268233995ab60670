"""Results files: JSON of a theme, machine and date; JSON lines where a run may be cut off."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from harness.machine import HERE, Row, facts, hardware

RESULTS = HERE / "results"


def rounded(row: Mapping[str, Any]) -> Row:
    """A row with its floats at five digits."""
    return {name: float(f"{value:.5g}") if isinstance(value, float) else value for name, value in row.items()}


def brief(error: BaseException) -> str:
    """An error in one line, without paths of this machine."""
    text = " ".join(str(error).split())
    for hidden in (str(HERE.parent), str(Path.home()), sys.prefix):
        if len(hidden) > 1:
            text = text.replace(hidden, "")
    return f"{type(error).__name__}: {text[:200]}"


def newest(stem: str, folder: Path | None = None) -> Path | None:
    """The newest of the results files STEM_<date>.json; "attention_*" is the theme on any machine."""
    files = (folder or RESULTS).glob(f"{stem}_????-??-??.json")
    return max(files, key=lambda path: path.stem.rsplit("_", 1)[-1], default=None)


def results_path(theme: str, device: str = "cpu", *, fresh: bool = False) -> Path:
    """The newest file of this theme and this machine, to go on with; with `fresh` or where there is none, today's."""
    stem = f"{theme}_{hardware(device)}"
    today = RESULTS / f"{stem}_{time.strftime('%Y-%m-%d')}.json"
    if fresh:
        today.unlink(missing_ok=True)
        return today
    return newest(stem) or today


def today(theme: str) -> tuple[Path, Row]:
    """The file of a theme's run of today, and what is in it: {"machine": ..., "rows": []} in a new one."""
    path = RESULTS / f"{theme}_{time.strftime('%Y-%m-%d')}.json"
    return path, json.loads(path.read_text()) if path.exists() else {"machine": facts(), "rows": []}


def write_json(path: Path, data: Any) -> None:
    """Written whole and then renamed: a run that is cut off leaves no half of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".part")
    fresh.write_text(json.dumps(data, indent=1) + "\n")
    fresh.replace(path)


def read_lines(path: Path) -> list[Row]:
    """The rows of a JSON-lines file; a last line that was cut off is left out, and none are there without a file."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:  # the line that was being written when the run was ended
            continue
    return rows


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """One more row of a JSON-lines file; on disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * torn + json.dumps(row) + "\n")


class Tables:
    """A results file of several tables: {"machine": ..., "commits": [...], NAME: [rows], ...}; a row to a line."""

    def __init__(self, path: Path, names: Sequence[str], device: str = "cpu") -> None:
        self.path, self.names = path, tuple(names)
        about = facts(device)
        self.data: Row = json.loads(path.read_text()) if path.exists() else {"machine": about, "commits": []}
        if about["commit"] not in self.data["commits"]:
            self.data["commits"].append(about["commit"])
        for name in names:
            self.data.setdefault(name, [])

    def save(self) -> None:
        """Write the file, whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        head = json.dumps({"machine": self.data["machine"], "commits": self.data["commits"]}, indent=1)
        parts = [head.rstrip().removesuffix("}").rstrip()]
        for name in self.names:
            rows = ",\n  ".join(json.dumps(row) for row in self.data[name])
            parts.append(f'\n "{name}": ' + (f"[\n  {rows}\n ]" if rows else "[]"))
        fresh = self.path.with_suffix(".part")
        fresh.write_text(",".join(parts) + "\n}\n")
        fresh.replace(self.path)

    def put(self, table: str, row: Row, keys: tuple[str, ...]) -> None:
        """Add a row in place of an older one of the same keys, and save."""
        rows = self.data[table]
        rows[:] = [old for old in rows if any(old[key] != row[key] for key in keys)]
        rows.append(row)
        self.save()

    def find(self, table: str, **keys: Any) -> Row | None:
        """The row of these keys."""
        return next((row for row in self.data[table] if all(row[key] == keys[key] for key in keys)), None)
