"""What libraries that look at attention show, how long an input they take, and at what time and memory.

    python benchmarks/lens_peers.py --python PEERS/bin/python --attnread-python ATTNREAD/bin/python [--only longlens]

The same random-weight GPT-2 and tokens for all (attnread knows no BERT), all layers and heads, on the CPU. Each cell is
a process of its own with 16 GiB of memory and 120 s for the call; a contender that fails at one length is not asked for
a longer one. Beside the contender the process runs the model alone, in turn with it: the ratio of the two, within a
round, is what contenders are compared by, since they cannot share a process. All contenders of one length come one
after the other, before the next length. Peers are named by the Python that has them: bertviz, flash-colreduce, nnsight
and inseq in one environment, attnread with its own torch and transformers in another. Run it alone on the machine.
Results go to benchmarks/results/lens_peers_<date>.json, a row as soon as it is measured; a second run goes on. The
table in docs/lens-peers.md is made from them.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from typing import Any

from harness import DOCS, HERE, cores, facts, fill, show_ratio, today, write_json

LENGTHS = (512, 2048, 8192, 16_384)
SHAPE = (6, 12, 384)
VOCABULARY = 1000
MEMORY = 16 * 2**30
SECONDS = 120
# how the worker's last line begins
ANSWER = '{"versions"'
# how far the sum of the first token's column may be from ours: inseq leaves out the last query
ALIKE = {"inseq": 2e-2}
# contender -> how it is called in the table, what it shows
CONTENDERS = {
    "forward": ("the model alone", "nothing"),
    "longlens": (
        "longlens `watch`",
        "of every row: log-sum-exp, entropy, largest weight, mean distance, top 8 keys; of every column: attention "
        "received",
    ),
    "bertviz": ("BertViz `head_view`", "every weight, as lines between tokens in a web page"),
    "attnread": ("attnread `extract_attention`", "every weight, as an N x N tensor for each head"),
    "flash-colreduce": ("flash-colreduce", "sum, mean or maximum of every column, from queries and keys"),
    "naive": ("flash-colreduce `naive_colreduce`", "the same on the CPU, by the N x N matrix of a layer"),
    "nnsight": ("nnsight `trace`", "what its user writes; here entropy and attention received, of eager weights"),
    "inseq": ("inseq `attention`", "for each token the weights with which the next one is predicted"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=None, help="has bertviz, flash-colreduce, nnsight, inseq")
    parser.add_argument("--attnread-python", default=None, help="has attnread")
    parser.add_argument("--only", default="", help="contenders whose name holds this")
    parser.add_argument("--lengths", type=int, nargs="*", default=LENGTHS)
    chosen = parser.parse_args()
    target, data = today("lens_peers")
    data.setdefault("machine", facts())
    data["task"] = {"shape": SHAPE, "vocabulary": VOCABULARY, "memory": MEMORY, "seconds": SECONDS}
    contenders = [name for name in CONTENDERS if chosen.only in name]
    for length in chosen.lengths:
        for contender in list(contenders):
            row = find(data, contender, length)
            if row is None and python_of(contender, chosen) is None:
                print(f"{contender}: no Python given that has it")
                contenders.remove(contender)
                continue
            if row is None:
                row = {"contender": contender, "length": length, **run(contender, length, chosen)}
                data["rows"].append(row)
                write_json(target, data)
                print(json.dumps(row), flush=True)
            if "not_run" in row:
                contenders.remove(contender)
    compare(data)
    fill(DOCS / "lens-peers.md", "lens_peers.py", page_text(data))


def find(data: dict[str, Any], contender: str, length: int) -> dict[str, Any] | None:
    """The row of one cell, if it was measured."""
    return next((row for row in data["rows"] if (row["contender"], row["length"]) == (contender, length)), None)


def python_of(contender: str, chosen: argparse.Namespace) -> str | None:
    """The Python that has it, where one was named."""
    own = {"forward": sys.executable, "longlens": sys.executable, "attnread": chosen.attnread_python}
    return own.get(contender, chosen.python)


def run(contender: str, length: int, chosen: argparse.Namespace) -> dict[str, Any]:
    """One cell; what it says, or why there is none."""
    python = python_of(contender, chosen)
    assert python is not None
    task = {
        "contender": contender, "length": length, "shape": SHAPE, "vocabulary": VOCABULARY, "memory": MEMORY,
        "threads": cores(),
    }  # fmt: skip
    with tempfile.TemporaryFile("w+") as errors:
        # a file, since a full pipe would stop the worker while its output is waited for
        worker = subprocess.Popen(
            [python, str(HERE / "lens_peers_worker.py")], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip
        # the clock starts when the model stands
        said = _ready(worker, json.dumps(task))
        try:
            rest, _ = worker.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            worker.kill()
            worker.communicate()
            return {"not_run": f"more than {SECONDS} s"}
        if worker.returncode:
            errors.seek(0)
            return {"not_run": reason(worker.returncode, errors.read())}
    lines = [line for line in [said, *rest.splitlines()] if line.startswith(ANSWER)]
    return json.loads(lines[-1])


def _ready(worker: subprocess.Popen[str], task: str) -> str:
    """Hand over the task and wait for the line "ready" (or the answer, or the end); returns it."""
    assert worker.stdin is not None
    assert worker.stdout is not None
    worker.stdin.write(task)
    worker.stdin.close()
    worker.stdin = None
    return next((line for line in worker.stdout if line == "ready\n" or line.startswith(ANSWER)), "")


def reason(status: int, errors: str) -> str:
    """Why a worker ended badly, in a few words."""
    last = (errors.strip() or f"exit {status}").splitlines()[-1]
    if "must be on CUDA" in last:
        return "needs a GPU"
    if -status == signal.SIGKILL or any(word in errors for word in ("MemoryError", "allocate memory", "bad_alloc")):
        return "out of memory"
    return f"ended by {signal.Signals(-status).name}" if status < 0 else last


def compare(data: dict[str, Any]) -> None:
    """Contenders that saw other weights than we did are not reported."""
    for row in data["rows"]:
        ours = find(data, "longlens", row["length"])
        if ours is None or "check" not in ours or row.get("check") is None:
            continue
        apart = abs(row["check"] / ours["check"] - 1)
        if apart > ALIKE.get(row["contender"], 1e-4):
            raise SystemExit(f"{row['contender']} at {row['length']}: the first column's sum is {apart:.1e} from ours")


def page_text(data: dict[str, Any]) -> str:
    """The table, as docs/lens-peers.md has it."""
    machine, (layers, heads, width) = data["machine"], data["task"]["shape"]
    lengths = sorted({row["length"] for row in data["rows"]})
    versions = {}
    for row in data["rows"]:
        versions |= {name: number for name, number in row.get("versions", {}).items() if name not in versions}
    named = ", ".join(f"{name} {number}" for name, number in versions.items() if name != "longlens")
    said = (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']:.0f} GiB, {machine['date']}; {named}. "
        f"GPT-2 with {layers} layers, {heads} heads, width {width}, float32, all layers and heads. Seconds, how many "
        f"times as long as the model alone (median and range of the rounds), and growth of the process's peak "
        f"memory; at most {data['task']['memory'] // 2**30} GiB and {data['task']['seconds']} s."
    )
    lines = [
        "| | shows | " + " | ".join(f"N = {length:,}" for length in lengths) + " | largest N that ran |",
        "|---|---|" + "---:|" * (len(lengths) + 1),
    ]
    for contender, (name, shows) in CONTENDERS.items():
        rows = [find(data, contender, length) for length in lengths]
        ran = [row["length"] for row in rows if row is not None and "seconds" in row]
        largest = f"{max(ran):,}" if ran else ""
        lines.append(f"| {name} | {shows} | " + " | ".join(map(cell, rows)) + f" | {largest} |")
    return said + "\n\n" + "\n".join(lines)


def cell(row: dict[str, Any] | None) -> str:
    """Time and memory, or why there is none."""
    if row is None:
        return ""
    if "not_run" in row:
        return row["not_run"].replace("|", "/")
    beside = f", {show_ratio(row['times_model'])}" if "times_model" in row else ""
    return f"{row['seconds']:.2g} s{beside}, {row['growth_mib']:,.0f} MiB"


if __name__ == "__main__":
    main()
