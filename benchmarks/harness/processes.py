"""Processes of their own: peaks of memory, and contenders that stay alive between rounds."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


def status_bytes(field: str) -> int:
    """A figure of /proc/self/status, "VmHWM" (the peak) or "VmRSS" (now), in bytes.

    `getrusage` is not used: in a child it begins at the peak of the parent.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def peak_bytes() -> int:
    """The most resident memory that this process has held, or has held since `reset_peak`."""
    return status_bytes("VmHWM")


def reset_peak() -> int:
    """Let the peak begin anew; returns the bytes that are resident now."""
    gc.collect()
    with contextlib.suppress(OSError):  # where the kernel forbids it the peak of the whole process counts
        Path("/proc/self/clear_refs").write_text("5")
    return status_bytes("VmRSS")


class Finished(NamedTuple):
    """A command that has run: exit status, wall seconds, peak resident bytes, what it printed."""

    status: int
    seconds: float
    peak: int
    output: str


def run_measured(command: Sequence[str]) -> Finished:
    """Run a command in a process of its own; its errors go to the terminal."""
    begun = time.perf_counter()
    process = subprocess.Popen(list(command), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    # the process has been waited for: tell its object, which would wait again
    process.returncode = os.waitstatus_to_exitcode(status)
    return Finished(process.returncode, time.perf_counter() - begun, usage.ru_maxrss * 1024, output)


class Conversation:
    """A process that reads a JSON line, answers with one, and stays alive between them."""

    def __init__(self, command: Sequence[str]) -> None:
        # not a pipe: a full one would stop the process while its answer is waited for
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            list(command), text=True, bufsize=1,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
        )  # fmt: skip

    def ask(self, line: Any) -> dict[str, Any]:
        """Send a line, wait for the answer; {"not_run": reason} where the process has ended instead."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return self._why()
        for answer in self._process.stdout:
            # packages print too
            if answer.startswith('{"'):
                return json.loads(answer)
        return self._why()

    def _why(self) -> dict[str, Any]:
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines() or [f"ended with {status}"]
        return {"not_run": lines[-1][:200]}

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        self._errors.close()
