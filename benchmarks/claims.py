"""The figures that longlens promises, each against the named peer, measured in one run.

    python benchmarks/claims.py                 all, about six minutes on two cores
    python benchmarks/claims.py speed_exact     some

Speeds are taken in rounds, ours and the peer's call one after the other; a ratio is the median over the rounds of peer
time by our time, and its spread is the lowest and the highest round. Each figure is written as soon as it is there; a
run goes on with the newest file unless `--fresh` is given.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import harness
import worker
from correctness import prepare
from harness import GIB, MIB, Row, Tables, brief, peak_bytes, results_path, rounded, spread
from tasks import Task

MILLION = 1_048_576


# ---- the claims: each yields (key, function that measures and returns a row)


def million_tokens() -> Iterator[tuple[str, Callable[[], Row]]]:
    """1,048,576 tokens forward, H=8, D=64, bfloat16: peak resident memory under 20 GiB."""
    for method in ("window:256", "linear"):
        yield method, lambda method=method: _million(method)


def _million(method: str) -> Row:
    child = harness.run_measured([sys.executable, str(Path(__file__).resolve()), "--child", method])
    if child.status:
        return {"not_run": f"ended with {child.status}"}
    found = json.loads(child.output.splitlines()[-1])
    return {**found, "wanted": "peak under 20 GiB", "holds": found["peak_gib"] < 20}


def million_child(method: str) -> None:
    """One forward pass in this process; its inputs and its output count, and so does torch itself."""
    import torch

    call = prepare(f"longlens {method}", asdict(Task(MILLION, 8, dtype="bfloat16")))
    started = time.perf_counter()
    out = call()
    seconds = time.perf_counter() - started
    assert isinstance(out, torch.Tensor)
    finite = all(bool(part.isfinite().all()) for part in out.split(65536, 2))
    peak = round(peak_bytes() / GIB, 2)
    print(json.dumps({"seconds": seconds, "peak_gib": peak, "finite": finite, "tokens": MILLION}))


def peak_memory() -> Iterator[tuple[str, Callable[[], Row]]]:
    """N=16,384, B=1, H=1, D=64, float32 forward: peak growth of at most 40 MiB where PyTorch turns quadratic."""
    pairs = {
        "dropout": ("longlens exact, dropout 0.1", "torch SDPA, dropout 0.1"),
        "value width 32": ("longlens exact, value width 32", "torch SDPA, value width 32"),
        "padding": ("longlens exact, padding", "torch SDPA, padding"),
        "window": ("longlens window:256", "torch SDPA, window mask"),
    }
    for what, (ours, peer) in pairs.items():
        yield what, lambda ours=ours, peer=peer: _growth(ours, peer)


def _growth(ours: str, peer: str) -> Row:
    task = Task(16384, 1)
    mine, other = (worker.memory(name, [task])[0] / MIB for name in (ours, peer))
    return {
        "ours": ours, "peer": peer, "ours_mib": round(mine, 1), "peer_mib": round(other, 1),
        "ratio": round(other / mine, 1), "wanted": "at most 40 MiB", "holds": mine <= 40,
    }  # fmt: skip


def speed_exact() -> Iterator[tuple[str, Callable[[], Row]]]:
    """Exact attention against PyTorch's fused kernel, which it calls: 0.95x in float32 and bfloat16; H=8, D=64."""
    for dtype, least in (("float32", 0.95), ("bfloat16", 0.95)):
        for length in (2048, 8192):
            task = Task(length, 8, dtype=dtype)
            yield (
                f"{dtype}, N={length}",
                lambda task=task, least=least: _speed(
                    task, "longlens exact", "torch SDPA", least, most=21 if task.length < 4096 else 7
                ),
            )


def speed_window() -> Iterator[tuple[str, Callable[[], Row]]]:
    """Window(256) at N=16,384, H=8, D=64 against compiled FlexAttention: 1.0x and, in bfloat16, 1.3x."""
    for dtype, least in (("float32", 1.0), ("bfloat16", 1.3)):
        task = Task(16384, 8, dtype=dtype)
        yield (
            dtype,
            lambda task=task, least=least: _speed(
                task, "longlens window:256", "torch flex, window 256", least, most=11
            ),
        )
    yield "training on a CPU", _trains


def _trains() -> Row:
    task = Task(16384, 8, backward=True)
    row: Row = {"ours": "longlens window:256", "peer": "torch flex, window 256", "wanted": "ours gives gradients"}
    request = {
        "task": asdict(task), "contenders": [row["ours"], row["peer"]], "seconds": 1.0, "most": 3, "errors": False,
    }  # fmt: skip
    for event in worker.Worker(patience=180).run(request):
        which = "ours" if event["name"] == row["ours"] else "peer"
        if event["at"] == "done":
            row |= {f"{which}_{name}": value for name, value in spread(event["times"]).items()}
        else:
            row[f"{which}_says"] = event["reason"]
    return {**row, "holds": "ours_median_s" in row}


def speed_approximate() -> Iterator[tuple[str, Callable[[], Row]]]:
    """Approximators against their peer packages at N=8,192, H=8, D=64: 1.5x."""
    pairs = {
        "Performer": ("longlens performer:256", "performer-pytorch"),
        "Performer, ReLU": ("longlens performer:256,kernel=relu", "performer-pytorch, ReLU"),
        "Linear": ("longlens linear", "performer-pytorch, elu + 1"),
        "Nystrom": ("longlens nystrom:64", "nystrom-attention"),
        "Nystrom, transformers": ("longlens nystrom:64", "HF Nystromformer"),
        "Linformer, learned": ("longlens linformer:256, learned", "linformer"),
        "Linformer, pooled": ("longlens linformer:256", "linformer"),
    }
    for what, (ours, peer) in pairs.items():
        yield what, lambda ours=ours, peer=peer: _speed(Task(8192, 8), ours, peer, 1.5, most=15)


def speed_sparse() -> Iterator[tuple[str, Callable[[], Row]]]:
    """Sparse patterns against packages with the same pattern, N=16,384, H=8, D=64, float32. No figure is promised."""
    pairs = {
        "window": ("longlens window:256", "local-attention"),
        "window, transformers": ("longlens window:256", "HF Longformer"),
        "Longformer": ("longlens longformer:256,global_tokens=(0,)", "HF Longformer, 1 global"),
        "BigBird": ("longlens bigbird:block=64,random=3", "HF BigBird"),
    }
    for what, (ours, peer) in pairs.items():
        yield what, lambda ours=ours, peer=peer: _speed(Task(16384, 8), ours, peer, None, most=7)


def _speed(task: Task, ours: str, peer: str, least: float | None, *, most: int) -> Row:
    """Ours and the peer in alternation; refused where one of them does not compute what it says."""
    row: Row = {
        "ours": ours, "peer": peer, "length": task.length, "heads": task.heads, "dtype": task.dtype,
        "wanted": None if least is None else f"at least {least}x",
    }  # fmt: skip
    asked = worker.gate([ours, peer], [task.dtype], [False])
    for event in worker.Worker(patience=180).run({"contenders": asked, "gate": True}):
        wrong = event.get("wrong", event.get("reason", ""))
        if wrong:
            return {**row, "not_run": f"quick check of {json.loads(event['name'])['name']} failed: {wrong}"}
    times: dict[str, list[float]] = {}
    request = {"task": asdict(task), "contenders": [ours, peer], "seconds": 1.0, "most": most, "even": True}
    for event in worker.Worker(patience=180).run(request):
        if event["at"] == "failed":
            return {**row, "not_run": f"{event['name']}: {event['reason']}"}
        if event["at"] != "done":
            continue
        which = "ours" if event["name"] == ours else "peer"
        times[which] = event["times"]
        row |= {f"{which}_{name}": value for name, value in spread(event["times"]).items()}
        row |= {f"{which}_first_s": event["first"], f"{which}_error": event.get("error")}
    row |= harness.ratio(times["peer"], times["ours"])
    return {**row, "holds": None if least is None else row["ratio"] >= least}


CLAIMS: dict[str, Callable[[], Iterator[tuple[str, Callable[[], Row]]]]] = {
    claim.__name__: claim
    for claim in (peak_memory, speed_exact, speed_window, speed_approximate, speed_sparse, million_tokens)
}


# ---- the command


def run_all(names: list[str] | None = None, *, deadline: float | None = None, fresh: bool = False) -> None:
    """Measure the claims called `names`, or all, into the newest claims file of this hardware."""
    results = Tables(results_path("claims", fresh=fresh), ("claims",))
    for name in names or list(CLAIMS):
        for what, measured in CLAIMS[name]():
            found = results.find("claims", claim=name, what=what)
            if found is not None and "not_run" not in found and not names:
                continue
            if deadline is not None and time.monotonic() > deadline:
                print(f"{name}: {what}: time is up")
                continue
            try:
                row = measured()
            except Exception as error:
                row = {"not_run": brief(error)}
            row = rounded({"claim": name, "what": what, **row})
            results.put("claims", row, ("claim", "what"))
            print(f"{name}: {what}: {said(row)}", flush=True)


def said(row: Row) -> str:
    """One line for the terminal."""
    if "not_run" in row:
        return f"not run: {row['not_run']}"
    verdict = {True: "holds", False: "MISSED", None: "no figure promised"}[row["holds"]]
    wanted = f", wanted {row['wanted']}" if row["wanted"] else ""
    if "ratio_low" in row:
        return f"{row['ratio']:.2f}x ({row['ratio_low']:.2f} to {row['ratio_high']:.2f}){wanted}: {verdict}"
    if "ours_mib" in row:
        return f"{row['ours_mib']} MiB, {row['peer']} {row['peer_mib']} MiB{wanted}: {verdict}"
    if "peak_gib" in row:
        return f"{row['seconds']:.0f} s, peak {row['peak_gib']} GiB{wanted}: {verdict}"
    return f"{verdict}; peer: {row.get('peer_says', 'gives gradients too')}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claims", nargs="*", help=", ".join(CLAIMS))
    parser.add_argument("--fresh", action="store_true", help="begin a new file")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    harness.limit_memory()
    if arguments.child:
        million_child(arguments.child)
        return 0
    unknown = [name for name in arguments.claims if name not in CLAIMS]
    if unknown:
        parser.error(f"unknown claims {unknown}; expected some of {list(CLAIMS)}")
    run_all(arguments.claims, fresh=arguments.fresh)
    return 0


if __name__ == "__main__":
    sys.exit(main())
