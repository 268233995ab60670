"""Contact maps: ours beside transformers' `predict_contacts`, and one of a giant protein.

    python benchmarks/contacts.py UNIPROT.fasta.gz [side_by_side] [giant]

Random weights in ESM-2's architectures. Side by side: 1,022 residues, 150M architecture, float32, each contender in a
process of its own; time is the median of three maps after one, memory the growth of the peak beyond the loaded model.
Giant: 34,350 residues (real proteins joined) through the 8M architecture by `longlens contacts`, sparse output, whole
process. Writes benchmarks/results/contacts_<date>.json and the table in docs/contacts.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch

import measure
from longlens.io.alphabet import ESM
from longlens.io.survey import read_cleaned
from longlens.models.encoder import EncoderConfig
from longlens.models.language_model import MaskedLM
from longlens.models.pretrained import load, save

HERE = Path(__file__).resolve().parent
SHAPES = {"8M": (6, 320, 20), "150M": (30, 640, 20)}
RESIDUES, GIANT = 1022, 34_350
START, END = "<!-- made by benchmarks/contacts.py -->", "<!-- end -->"


def make_model(name: str, folder: Path) -> Path:
    """A checkpoint of random weights in the hub's format, with a contact head of random values."""
    layers, width, heads = SHAPES[name]
    torch.manual_seed(0)
    config = EncoderConfig(
        vocabulary=len(ESM), layers=layers, width=width, heads=heads, feed_forward=4 * width, mask_token=ESM.mask
    )
    model = MaskedLM(config, ESM)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 1.2 * width**-0.5)
        assert model.contact_head is not None
        model.contact_head.regression.weight.normal_(0, 1.0)
        model.contact_head.regression.bias.fill_(-2.0)
    save(model, folder / name)
    return folder / name


def joined(fasta: Path, residues: int) -> str:
    """Real proteins, one after the other, cut to a length."""
    text = ""
    for sequence in read_cleaned([fasta]):
        text += sequence
        if len(text) >= residues:
            return text[:residues]
    raise SystemExit(f"{fasta} holds only {len(text)} residues")


def peak() -> int:
    """Peak resident bytes of this process."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def ours(model: Path, sequence: str) -> Callable[[], torch.Tensor]:
    loaded = load(model)
    return lambda: loaded.predict_contacts([sequence])[0]


def theirs(model: Path, sequence: str) -> Callable[[], torch.Tensor]:
    from transformers import EsmForMaskedLM

    loaded = EsmForMaskedLM.from_pretrained(model, attn_implementation="eager").eval()
    tokens = torch.from_numpy(ESM.encode(sequence)).unsqueeze(0)
    keep = torch.ones_like(tokens)

    def run() -> torch.Tensor:
        with torch.inference_mode():
            return loaded.predict_contacts(tokens, keep)[0]  # type: ignore[no-any-return]

    return run


def child(contender: str, model: str, fasta: str, target: str) -> None:
    """Time and memory of one contender, in this process; its map to a file, to be compared."""
    run = {"longlens": ours, "transformers": theirs}[contender](Path(model), joined(Path(fasta), RESIDUES))
    before, seconds = peak(), []
    for _ in range(4):
        begun = time.perf_counter()
        found = run()
        seconds.append(time.perf_counter() - begun)
    torch.save(found, target)
    print(json.dumps({"seconds": statistics.median(seconds[1:]), "growth_mib": (peak() - before) / 2**20}))


def side_by_side(fasta: Path, folder: Path) -> dict[str, Any]:
    model = make_model("150M", folder)
    rows: dict[str, Any] = {}
    maps = []
    for contender in ("longlens", "transformers"):
        target = folder / f"{contender}.pt"
        call = [sys.executable, __file__, str(fasta), "--child", contender, str(model), str(target)]
        done = subprocess.run(call, capture_output=True, text=True, check=True)
        rows[contender] = json.loads(done.stdout.splitlines()[-1])
        maps.append(torch.load(target, weights_only=True))
        print(contender, rows[contender], flush=True)
    return {
        "model": "150M", "residues": RESIDUES, "dtype": "float32", **rows,
        "largest_difference": float((maps[0] - maps[1]).abs().max()),
        "times_faster": rows["transformers"]["seconds"] / rows["longlens"]["seconds"],
        "times_less_memory": rows["transformers"]["growth_mib"] / rows["longlens"]["growth_mib"],
    }  # fmt: skip


def giant(fasta: Path, folder: Path) -> dict[str, Any]:
    model = make_model("8M", folder)
    (folder / "giant.fasta").write_text(f">giant\n{joined(fasta, GIANT)}\n")
    call = [sys.executable, "-m", "longlens", "contacts", str(folder / "giant.fasta"), "-o", str(folder / "maps"),
            "--model", str(model), "--top", "16", "--max-memory", "4G"]  # fmt: skip
    begun = time.perf_counter()
    process = subprocess.Popen(call, stdout=subprocess.PIPE, text=True)
    said = process.stdout.read() if process.stdout else ""
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"the giant failed: {status}")
    print(said, flush=True)
    return {
        "model": "8M", "residues": GIANT, "dtype": "float32", "output": "each residue's 16 strongest partners",
        "seconds": time.perf_counter() - begun, "peak_gib": usage.ru_maxrss / 2**20, "said": list(lines(said)),
    }  # fmt: skip


def lines(said: str) -> Iterator[str]:
    """What the command said, without places."""
    return (line for line in said.splitlines() if not line.startswith("results"))


def write_page(data: dict[str, Any]) -> None:
    """The table in docs/contacts.md, between its marks."""
    page = HERE.parent / "docs" / "contacts.md"
    text = page.read_text()
    machine, pair, far = data["machine"], data["side_by_side"], data["giant"]
    whole = 4 * far["residues"] ** 2
    rows = [
        f"{machine['cpu']}, {machine['cores']} cores, {machine['date']}; random weights, {pair['dtype']}; peak memory "
        "is growth beyond the loaded model.",
        "",
        f"| {pair['model']} architecture, {pair['residues']:,} residues | time | peak memory |",
        "|---|---:|---:|",
        *(
            f"| {name} | {pair[name]['seconds']:.1f} s | {pair[name]['growth_mib']:,.0f} MiB |"
            for name in ("longlens", "transformers")
        ),
        "",
        f"That is {pair['times_faster']:.1f} times as fast in a {pair['times_less_memory']:.0f}th of the memory; the "
        f"maps differ by at most {pair['largest_difference']:.0e}. A protein of {far['residues']:,} residues through "
        f"the {far['model']} architecture, keeping {far['output']}, takes {far['seconds'] / 60:.1f} minutes and "
        f"{far['peak_gib']:.1f} GiB for the whole process; its map alone would be "
        f"{whole / 2**30:.1f} GiB, and all layers' and heads' {120 * whole / 2**30:,.0f}.",
    ]
    before, rest = text.split(START, 1)
    page.write_text(before + START + "\n\n" + "\n".join(rows) + "\n\n" + END + rest.split(END, 1)[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fasta", type=Path)
    parser.add_argument("parts", nargs="*", default=["side_by_side", "giant"])
    parser.add_argument("--child", nargs=3, metavar=("CONTENDER", "MODEL", "TARGET"))
    given = parser.parse_args()
    if given.child:
        child(given.child[0], given.child[1], str(given.fasta), given.child[2])
        return
    target = HERE / "results" / f"contacts_{date.today()}.json"
    data = json.loads(target.read_text()) if target.exists() else {}
    data["machine"] = measure.facts("cpu")
    with tempfile.TemporaryDirectory() as folder:
        for name, part in (("side_by_side", side_by_side), ("giant", giant)):
            if name in given.parts:
                data[name] = part(given.fasta, Path(folder))
                target.write_text(json.dumps(data, indent=1) + "\n")
    if "side_by_side" in data and "giant" in data:
        write_page(data)


if __name__ == "__main__":
    main()
