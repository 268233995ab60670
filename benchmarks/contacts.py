"""Contact maps: ours beside transformers' `predict_contacts`, and one of a giant protein.

    python benchmarks/contacts.py PROTEINS.fasta.gz [side_by_side] [giant]     about twelve minutes on two cores

Random weights in ESM-2's architectures. Side by side: the same protein of 1,022 residues through the 150M
architecture, float32. Both contenders are processes that stay alive and make the map in turn, round after round; the
first round of each warms up, and its growth of the peak beyond the loaded model is the memory. The ratio is the median
over the other rounds. Giant: 34,350 residues (real proteins joined) through the 8M architecture by `longlens contacts`,
sparse output, whole process. Writes benchmarks/results/contacts_<date>.json and the table in docs/contacts.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import longlens
from checkpoints import make_model
from harness import (
    DOCS,
    GIB,
    MIB,
    Conversation,
    facts,
    fill,
    limit_memory,
    machine_line,
    order_of,
    peak_bytes,
    ratio,
    reset_peak,
    run_measured,
    show_ratio,
    table,
    today,
    write_json,
)
from proteins import joined

RESIDUES, GIANT, ROUNDS = 1022, 34_350, 5


def ours(model: Path, sequence: str) -> Callable[[], torch.Tensor]:
    loaded = longlens.load(model, dtype="float32", device="cpu")
    return lambda: loaded.predict_contacts([sequence])[0]


def theirs(model: Path, sequence: str) -> Callable[[], torch.Tensor]:
    from transformers import AutoTokenizer, EsmForMaskedLM

    loaded = EsmForMaskedLM.from_pretrained(model, attn_implementation="eager").eval()
    tokens = AutoTokenizer.from_pretrained(model)(sequence, return_tensors="pt")["input_ids"]
    keep = torch.ones_like(tokens)

    def run() -> torch.Tensor:
        with torch.inference_mode():
            return loaded.predict_contacts(tokens, keep)[0]  # type: ignore[no-any-return]

    return run


CONTENDERS = {"longlens": ours, "transformers": theirs}


def serve() -> None:
    """One contender in this process: seconds and growth of the peak for each line; the map to a file."""
    task = json.loads(sys.stdin.readline())
    run = CONTENDERS[task["contender"]](Path(task["model"]), task["sequence"])
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        before = reset_peak()
        begun = time.perf_counter()
        contact_map = run()
        seconds = time.perf_counter() - begun
        torch.save(contact_map, task["target"])
        print(json.dumps({"seconds": seconds, "growth_mib": (peak_bytes() - before) / MIB}), flush=True)


def side_by_side(fasta: Path, folder: Path, model: str = "150M", residues: int = RESIDUES) -> dict[str, Any]:
    """Both contenders on one protein, in rounds."""
    place, sequence = make_model(model, folder), joined(fasta, residues)
    processes = {name: Conversation([sys.executable, __file__, "--serve"]) for name in CONTENDERS}
    taken: dict[str, list[dict[str, Any]]] = {name: [] for name in CONTENDERS}
    try:
        for name, process in processes.items():
            task = {"contender": name, "model": str(place), "sequence": sequence, "target": str(folder / f"{name}.pt")}
            process.ask(task)
        for turn in range(1 + ROUNDS):
            for name in order_of(list(processes), turn):
                answer = processes[name].ask({})
                if "not_run" in answer:
                    raise SystemExit(f"{name}: {answer['not_run']}")
                taken[name].append(answer)
    finally:
        for process in processes.values():
            process.close()
    seconds = {name: [answer["seconds"] for answer in answers[1:]] for name, answers in taken.items()}
    growth = {name: answers[0]["growth_mib"] for name, answers in taken.items()}
    maps = [torch.load(folder / f"{name}.pt", weights_only=True) for name in CONTENDERS]
    return {
        "model": model, "residues": residues, "dtype": "float32", "rounds": ROUNDS,
        **{name: {"seconds": statistics.median(seconds[name]), "growth_mib": growth[name]} for name in CONTENDERS},
        "largest_difference": float((maps[0] - maps[1]).abs().max()),
        "times_faster": ratio(seconds["transformers"], seconds["longlens"]),
        "times_less_memory": growth["transformers"] / growth["longlens"],
    }  # fmt: skip


def giant(fasta: Path, folder: Path) -> dict[str, Any]:
    """A protein of titin's length by the command line."""
    model = make_model("8M", folder)
    (folder / "giant.fasta").write_text(f">giant\n{joined(fasta, GIANT)}\n")
    done = run_measured([
        sys.executable, "-m", "longlens", "contacts", str(folder / "giant.fasta"), "-o", str(folder / "maps"),
        "--model", str(model), "--top", "16", "--max-memory", "4G",
    ])  # fmt: skip
    if done.status:
        raise SystemExit(f"the giant failed: {done.status}")
    print(done.output, flush=True)
    return {
        "model": "8M", "residues": GIANT, "dtype": "float32", "output": "each residue's 16 strongest partners",
        "seconds": done.seconds, "peak_gib": done.peak / GIB,
        # without places
        "said": [line for line in done.output.splitlines() if not line.startswith("results")],
    }  # fmt: skip


def page_text(data: dict[str, Any]) -> str:
    """The table, as docs/contacts.md has it."""
    pair, far = data["side_by_side"], data["giant"]
    whole = 4 * far["residues"] ** 2
    lines = [[name, f"{pair[name]['seconds']:.1f} s", f"{pair[name]['growth_mib']:,.0f} MiB"] for name in CONTENDERS]
    return "\n".join([
        f"{machine_line(data['machine'])}; random weights, {pair['dtype']}; peak memory is growth beyond the "
        "loaded model.",
        "",
        table([f"{pair['model']} architecture, {pair['residues']:,} residues", "time", "peak memory"], lines),
        f"longlens is {show_ratio(pair['times_faster'])} as fast, the median and range of {pair['rounds']} rounds, in "
        f"1/{pair['times_less_memory']:.0f} of the memory; the maps differ by at most "
        f"{pair['largest_difference']:.0e}. A protein of {far['residues']:,} residues through the {far['model']} "
        f"architecture, keeping {far['output']}, takes {far['seconds'] / 60:.1f} minutes and {far['peak_gib']:.1f} GiB "
        f"for the whole process; its map alone would be {whole / GIB:.1f} GiB, and those of all layers and heads "
        f"{120 * whole / GIB:,.0f} GiB.",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fasta", type=Path, nargs="?")
    parser.add_argument("parts", nargs="*", default=["side_by_side", "giant"])
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="a tiny model, side by side; nothing is written")
    chosen = parser.parse_args()
    limit_memory()
    if chosen.serve:
        serve()
        return
    if chosen.fasta is None:
        parser.error("expected a FASTA file of proteins")
    target, data = today("contacts")
    data["machine"] = facts()
    data.pop("rows", None)
    with tempfile.TemporaryDirectory() as folder:
        if chosen.dry_run:
            print(json.dumps(side_by_side(chosen.fasta, Path(folder), "dry", 200)))
            return
        for name, part in (("side_by_side", side_by_side), ("giant", giant)):
            if name in chosen.parts:
                data[name] = part(chosen.fasta, Path(folder))
                write_json(target, data)
    if "side_by_side" in data and "giant" in data:
        fill(DOCS / "contacts.md", "contacts.py", page_text(data))


if __name__ == "__main__":
    main()
