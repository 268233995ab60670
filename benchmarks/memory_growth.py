"""Peak memory growth of every method from 8,192 to 65,536 tokens, forward and backward: is linear linear?

    python benchmarks/memory_growth.py                 every method in tests/methods.py and the usual sizes of some
    python benchmarks/memory_growth.py window:256      some

B=1, H=4 (1 where time is quadratic), D=32, float32. Each method runs in fresh processes, one forward and one
backward; the growth over the inputs is the median of the runs. One run of a peak is good to some 5 %, so a row above
the limit is measured again with five runs, whose median stands. Results go to
benchmarks/results/memory_growth_<device>_<date>.json after every method; some methods alone replace their rows there.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from itertools import pairwise

from harness import HERE, MIB, facts, today, write_json
from longlens import BlockSparse, CosFormer
from longlens.errors import LonglensError
from longlens.testing import claims_of, peak_growths
from longlens.testing.memory import LINEAR

LENGTHS = (8192, 16384, 32768, 65536)
USUAL = ("window:256", "longformer:256", "bigbird", "performer:256", "nystrom", "linformer", "scatterbrain")
# one head where time is quadratic; otherwise enough for the growth to stand far above a page or two of noise
QUADRATIC = ("exact", "strided", "fixed")
# runs of a row that one run found above the limit
AGAIN = 5


def heads_of(method: str) -> int:
    """Heads to measure a method with."""
    return 1 if method.split(":")[0] in QUADRATIC else 4


def measure(method: str, causal: bool, backward: bool, device: str, runs: int) -> dict[str, object]:
    """One line of the results."""
    cases = [
        {
            "function": "longlens:attention",
            "length": length,
            "heads": heads_of(method),
            "width": 32,
            "device": device,
            "causal": causal,
            "backward": backward,
            "keywords": {"method": method},
        }
        for length in LENGTHS
    ]
    started = time.perf_counter()
    row: dict[str, object] = {
        "method": method, "heads": heads_of(method), "causal": causal, "backward": backward, "runs": runs,
    }  # fmt: skip
    try:
        growth = peak_growths(
            "longlens.testing.memory:attention_call",
            cases,
            device=device,
            warm_up={"length": 128},
            runs=runs,
            timeout=1800,
        )
    except LonglensError as error:
        return row | {"not_run": str(error).splitlines()[0]}
    ratios = [round(later / max(1, earlier), 3) for earlier, later in pairwise(growth)]
    return row | {
        "mib": [round(each / MIB, 2) for each in growth],
        "ratios": ratios,
        "linear": max(ratios) <= LINEAR,
        "seconds": round(time.perf_counter() - started, 1),
    }


def listed() -> list[str]:
    """The tests' methods, and the usual sizes of some."""
    sys.path.insert(0, str(HERE.parent / "tests"))
    from methods import METHODS, band

    # parameters that must reach over the length
    long = {"blocksparse": BlockSparse(band(512), 128), "cosformer": CosFormer(65536)}
    return list(dict.fromkeys([*(str(long.get(method.name, method)) for method in METHODS), *USUAL]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="string forms; all where none is given")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--runs", type=int, default=1, help="measured runs of each; the median counts")
    chosen = parser.parse_args()
    target, record = today(f"memory_growth_{chosen.device}")
    record["machine"] = facts(chosen.device)
    record["task"] = {"batch": 1, "width": 32, "dtype": "float32", "lengths": LENGTHS, "runs": chosen.runs}
    rows = [row for row in record["rows"] if chosen.methods and row["method"] not in chosen.methods]
    for method in chosen.methods or listed():
        # quadratic in time: one mode
        slow = method.split(":")[0] == "exact"
        modes = [False] if slow or claims_of(method).causal is None else [False, True]
        for causal in modes:
            for backward in (False, True):
                row = measure(method, causal, backward, chosen.device, chosen.runs)
                if row.get("linear") is False and chosen.runs < AGAIN:
                    row = measure(method, causal, backward, chosen.device, AGAIN)
                rows.append(row)
                print(json.dumps(row), flush=True)
                write_json(target, record | {"rows": rows})
    if any(not row.get("linear") for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
