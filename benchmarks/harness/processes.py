"""Processes of their own: peaks of memory, and contenders that stay alive between rounds."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import subprocess
import sys
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


def reset_peak(*, collect: bool = True) -> int:
    """Let the peak begin anew; returns the bytes that are resident now. `collect`: after dead objects are gone."""
    if collect:
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


# A process begins with the peak of the one that started it, as `wait4` tells it (the kernel carries it over `exec`): a
# small one in between keeps the peak of a large parent out of the figure.
_BETWEEN = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[2:])
_, status, usage = os.wait4(process.pid, 0)
os.write(int(sys.argv[1]), f"{os.waitstatus_to_exitcode(status)} {usage.ru_maxrss}".encode())
os._exit(0)
"""


def run_measured(command: Sequence[str]) -> Finished:
    """Run a command in a process of its own; its errors go to the terminal."""
    reading, writing = os.pipe()
    call = [sys.executable, "-S", "-c", _BETWEEN, str(writing), *command]
    begun = time.perf_counter()
    process = subprocess.Popen(call, stdout=subprocess.PIPE, text=True, pass_fds=[writing])
    os.close(writing)
    output = process.communicate()[0]
    seconds = time.perf_counter() - begun
    with os.fdopen(reading) as told:
        status, peak = told.read().split()
    return Finished(int(status), seconds, int(peak) * 1024, output)


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
        for pipe in (self._process.stdin, self._process.stdout, self._errors):
            if pipe is not None:
                # what was not read any more is lost with the process
                with contextlib.suppress(OSError):
                    pipe.close()
