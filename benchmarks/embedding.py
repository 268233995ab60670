"""Embedding proteins: longlens, transformers, fair-esm and esm-cpp on equal work.

    python benchmarks/embedding.py PROTEINS.fasta.gz --minutes 60      resumes where an earlier run stopped
    python benchmarks/embedding.py PROTEINS.fasta.gz --models 35M --only longlens "one by one"
    python benchmarks/embedding.py examples/proteins.fasta.gz --dry-run

All contenders embed the same fixed sample of the proteins in the file (`proteins.py`: stratified over length, the same
for the same file and seed) with the same random weights. The sample comes in rounds. In every round each contender
embeds that round's proteins, one contender after the other, in an order that rotates; what is compared is the ratio of
seconds within a round, and its median and range over the rounds are reported. Each contender is a process that stays
alive: loading is not timed, and a first pass over a round's proteins warms its memory. Contenders return the sum of
squares of the proteins' mean vectors, and one that is off is not reported.

Run it alone on the machine. A line is written to benchmarks/results/embedding_<machine>_<date>.jsonl as soon as it is
measured; the summary goes to the .json beside it and to docs/benchmarks.md. fair-esm and esm-cpp take part where they
are installed, or where a Python that has them is named with --peer-python.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import harness
from checkpoints import SHAPES, make_model, operations, shape_of
from harness import (
    DOCS,
    HERE,
    Conversation,
    Row,
    append_line,
    cores,
    facts,
    order_of,
    product_rate,
    ratio,
    read_lines,
    table,
)
from proteins import Protein, describe, draw, read

MODELS = ("8M", "35M", "150M")
Round = list[list[Protein]]


@dataclass(frozen=True)
class Contender:
    """A package in a precision, with its way to make batches (`embedding_worker.batches_of`).

    `apart`: how far the sum of squares may be from that of longlens in float32, relative; None where it has none.
    """

    name: str
    package: str
    dtype: str
    batching: str
    tokens: int = 0
    apart: float | None = None
    optional: bool = False


OURS = {dtype: f"longlens, packed, {dtype}" for dtype in ("bfloat16", "float32")}
ONE_BY_ONE = {dtype: f"transformers, one by one, {dtype}" for dtype in ("bfloat16", "float32")}
CONTENDERS = (
    *(Contender(OURS[dtype], "longlens", dtype, "tokens", 16_384, apart)
      for dtype, apart in (("bfloat16", 0.1), ("float32", 1e-3))),
    *(Contender(f"transformers, {label}, {dtype}", "transformers", dtype, batching, 0, apart)
      for label, batching in (("one by one", "one"), ("8 padded", "mixed"), ("8 padded, sorted", "sorted"))
      for dtype, apart in (("bfloat16", 0.1), ("float32", 1e-3))),
    Contender("fair-esm, 4,096 tokens padded, float32", "fair-esm", "float32", "tokens", 4096, optional=True),
    Contender("fair-esm, one by one, float32", "fair-esm", "float32", "one", optional=True),
    Contender("esm-cpp, packed, float32", "esm-cpp", "float32", "tokens", 4096, optional=True),
    Contender("esm-cpp, packed, int8", "esm-cpp", "int8", "tokens", 4096, optional=True),
)  # fmt: skip
MODULES = {"longlens": "longlens", "transformers": "transformers", "fair-esm": "esm.model.esm2", "esm-cpp": "esm_cpp"}


# ---- a contender's process


class Process(Conversation):
    """A contender that is loaded and waits for proteins."""

    def __init__(self, contender: Contender, python: str, model: str, folder: Path, threads: int) -> None:
        super().__init__([python, str(HERE / "embedding_worker.py")])
        self.loaded = self.ask({
            "package": contender.package, "dtype": contender.dtype, "batching": contender.batching,
            "tokens": contender.tokens, "model": str(folder), "shape": SHAPES[model], "threads": threads,
        })  # fmt: skip

    def embed(self, groups: Round) -> Row:
        """Embed a round's proteins."""
        return self.ask([[protein.sequence for protein in group] for group in groups])


# ---- rounds


def completed(rows: Sequence[Row], model: str, names: Sequence[str]) -> dict[int, dict[str, Row]]:
    """Whole rounds in which all of `names` were measured, or failed, in one run: round -> contender -> row.

    A round is whole when the rates of products that end it are there. Of several runs of a round the latest counts.
    """
    mine = [row for row in rows if row.get("model") == model]
    whole = {(row["rates_of_round"], row["run"]) for row in mine if "rates_of_round" in row}
    runs: dict[tuple[int, str], dict[str, Row]] = {}
    for row in mine:
        if (row.get("round"), row["run"]) in whole:
            runs.setdefault((row["round"], row["run"]), {})[row["contender"]] = row
    return {turn: cells for (turn, _), cells in runs.items() if set(names) <= set(cells)}


def work_of(model: str, turn: Round) -> float:
    """Operations of one pass over a round's proteins."""
    return operations(shape_of(model), [len(protein.sequence) for group in turn for protein in group])


def expected_seconds(
    rows: Sequence[Row], model: str, turn: int, rounds: Sequence[Round], names: Sequence[str]
) -> float:
    """What a round will take, from the rounds in the log and their operations; 0 where there are none yet.

    Rounds of this model count before those of another.
    """
    for other in dict.fromkeys([model, *(row["model"] for row in reversed(rows) if "round" in row)]):
        whole = completed(rows, other, names)
        if whole:
            seconds = sum(cells[name].get("seconds", 0.0) for cells in whole.values() for name in names)
            return seconds / sum(work_of(other, rounds[at]) for at in whole) * work_of(model, rounds[turn])
    return 0.0


def measure_rounds(
    model: str,
    rounds: Sequence[Round],
    processes: dict[str, Process],
    log: Path,
    deadline: float,
) -> None:
    """All rounds that are not in the log yet; one that the deadline would cut is left for the next run."""
    names = list(processes)
    done = completed(read_lines(log), model, names)
    run = time.strftime("%Y-%m-%dT%H:%M:%S")
    todo = [turn for turn in range(len(rounds)) if turn not in done]
    warm = False
    for turn in todo:
        begun = time.monotonic()
        # the first round of a process runs twice
        seconds = expected_seconds(read_lines(log), model, turn, rounds, names) * (1 if warm else 2)
        if begun + seconds > deadline:
            print(f"{model}: round {turn} and those after it are left for the next run", flush=True)
            return
        for name in order_of(names, turn):
            process = processes[name]
            answer = process.loaded if "not_run" in process.loaded else process.embed(rounds[turn])
            if not warm and "not_run" not in answer:
                # the first pass touched memory for the first time: it does not count
                answer = process.embed(rounds[turn])
            if "not_run" in answer:
                process.loaded = answer
            residues = sum(len(protein.sequence) for group in rounds[turn] for protein in group)
            row = {"model": model, "round": turn, "run": run, "contender": name, "residues": residues, **answer}
            append_line(log, harness.rounded(row))
            if time.monotonic() > deadline + 600:
                print(f"{model}: round {turn} was cut off and will be measured again", flush=True)
                return
        config = shape_of(model)
        rates = {
            dtype: product_rate(dtype, (4096, config.width, config.feed_forward)) for dtype in ("float32", "bfloat16")
        }
        append_line(log, harness.rounded({"model": model, "rates_of_round": turn, "run": run, **rates}))
        warm = True
        print(f"{model}: round {turn} of {len(rounds)} in {time.monotonic() - begun:.0f} s", flush=True)


# ---- summary


def summarise(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """One row for each model and contender: rate over all complete rounds, and ratios within the rounds."""
    summary = []
    for model in dict.fromkeys(row["model"] for row in rows if "round" in row):
        mine = [row for row in rows if row.get("model") == model]
        present = [name for name in names if any(row.get("contender") == name for row in mine)]
        rates = [row for row in mine if "rates_of_round" in row]
        for contender in (contender for contender in CONTENDERS if contender.name in present):
            name = contender.name
            # a peer that was measured in a later run is compared with ours of that run
            rounds = completed(rows, model, [name, *(ours for ours in OURS.values() if ours in present)])
            cells = [turn[name] for turn in rounds.values()]
            row: Row = {"model": model, "contender": name, "rounds": len(cells)}
            failed = next((cell["not_run"] for cell in cells if "not_run" in cell), None) or off(contender, rounds)
            if failed or not cells:
                summary.append(row | {"not_run": failed or "time was up"})
                continue
            seconds = [cell["seconds"] for cell in cells]
            residues = sum(cell["residues"] for cell in cells)
            row |= {"residues_per_second": residues / sum(seconds), "peak_mib": max(cell["peak_mib"] for cell in cells)}
            for dtype, ours in OURS.items():
                if all("seconds" in turn.get(ours, {}) for turn in rounds.values()):
                    row[f"by_{dtype}"] = ratio(seconds, [turn[ours]["seconds"] for turn in rounds.values()])
            # whole numbers stand beside float32
            kind = "bfloat16" if contender.dtype == "bfloat16" else "float32"
            row["product_gflops"] = statistics.median(rate[kind] for rate in rates)
            summary.append(row)
    return summary


def off(contender: Contender, rounds: dict[int, dict[str, Row]]) -> str:
    """What is wrong with a contender's vectors, by their sum of squares; "" where nothing is known to be."""
    for turn in rounds.values():
        own, ours = turn[contender.name].get("check"), turn.get(OURS["float32"], {}).get("check")
        if contender.apart is not None and own is not None and ours is not None:
            apart = abs(own / ours - 1)
            if not apart <= contender.apart:
                return f"other vectors than longlens in float32: sums of squares {apart:.1e} apart"
    return ""


def sample_text(sample: Row, fasta: str) -> str:
    """The sample as titles name it."""
    part, whole = sample["sample"], sample["file"]
    return (
        f"{part['proteins']:,} proteins that represent the {whole['proteins']:,} of {fasta} (mean length "
        f"{part['mean']:.0f}, in the file {whole['mean']:.0f}; longest {part['longest']:,}, in the file "
        f"{whole['longest']:,})"
    )


def page_text(data: Row) -> str:
    """The tables, as docs/benchmarks.md has them."""
    parts = [
        f"{harness.machine_line(data['machine'])}, {data['threads']} threads; torch "
        f"{data['machine']['packages']['torch']}, transformers {data['machine']['packages']['transformers']}. "
        f"Sample: {sample_text(data['sample'], data['fasta'])}, seed {data['seed']}."
    ]
    for model in dict.fromkeys(row["model"] for row in data["rows"]):
        mine = [row for row in data["rows"] if row["model"] == model]
        rates = data["rates"][model]
        config = shape_of(model)
        lines = []
        for row in mine:
            if "not_run" in row:
                lines.append([row["contender"], "not run: " + row["not_run"].replace("|", "/"), "", "", "", ""])
                continue
            compared = [harness.show_ratio(row[key]) if (key := f"by_{dtype}") in row else "" for dtype in OURS]
            work = row["residues_per_second"] * operations(config, data["lengths"]) / sum(data["lengths"]) / 1e9
            lines.append([
                row["contender"], f"{row['residues_per_second']:,.0f}", *compared, f"{row['peak_mib']:,.0f}",
                f"{work / row['product_gflops']:.0%}",
            ])  # fmt: skip
        head = [
            "", "residues/s", *(f"longlens {dtype} is faster by" for dtype in OURS), "peak MiB of the process",
            "share of the matrix-product rate",
        ]  # fmt: skip
        proteins = data["sample"]["sample"]["proteins"]
        parts.append(
            f"**ESM-2 {model}, random weights, {proteins} proteins in {data['sample']['rounds']} rounds** "
            f"({min(row['rounds'] for row in mine)} measured). The largest matrix product of this model runs at "
            f"{rates['bfloat16']:,.0f} GFLOP/s in bfloat16 and {rates['float32']:,.0f} in float32 here, a ratio of "
            f"{rates['bfloat16'] / rates['float32']:.1f}.\n\n" + table(head, lines)
        )
    return "\n\n".join(parts)


def conclude(log: Path, rounds: Sequence[Round], page: Path | None) -> Row:
    """The summary of a log, written beside it and to the page."""
    rows = read_lines(log)
    about = next(row for row in rows if "sample" in row)
    measured = [row for row in rows if "rates_of_round" in row]
    rates = {
        model: {
            dtype: statistics.median(row[dtype] for row in measured if row["model"] == model)
            for dtype in ("float32", "bfloat16")
        }
        for model in dict.fromkeys(row["model"] for row in measured)
    }
    summary = [row for row in summarise(rows, [c.name for c in CONTENDERS]) if row["model"] in rates]
    lengths = [len(protein.sequence) for turn in rounds for group in turn for protein in group]
    data = {**about, "lengths": lengths, "rates": rates, "rows": summary}
    harness.write_json(log.with_suffix(".json"), data)
    if page is not None and summary:
        harness.fill(page, "embedding.py", page_text(data))
    return data


# ---- the command


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("fasta", type=Path)
    parser.add_argument("--minutes", type=float, default=60.0, help="no round is begun that would end later")
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(SHAPES))
    parser.add_argument("--only", nargs="+", default=[""], help="contenders whose names hold one of these")
    parser.add_argument("--rounds", type=int, default=6, help="rounds of the sample")
    parser.add_argument("--groups", type=int, default=4, help="groups of 8 proteins in a round")
    parser.add_argument("--seed", type=int, default=0, help="of the sample")
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--peer-python", default=None, help="a Python that has fair-esm or esm-cpp")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of the results")
    parser.add_argument("--fresh", action="store_true", help="begin anew instead of going on with the newest file")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model and sample; the page is left alone")
    chosen = parser.parse_args(argv)
    if chosen.dry_run:
        chosen.models, chosen.rounds, chosen.groups = ["dry"], min(chosen.rounds, 2), 2
    return chosen


def python_of(contender: Contender, peer: str | None) -> str | None:
    """The Python that has a contender's package; None where it is an optional one that is absent."""
    for python in filter(None, (sys.executable, peer if contender.optional else None)):
        if not contender.optional:
            return python
        call = [python, "-c", f"import {MODULES[contender.package]}"]
        if subprocess.run(call, capture_output=True, check=False).returncode == 0:
            return python
    return None


def library_digest() -> str:
    """Of longlens' own files: rounds of two versions must not stand in one table."""
    import longlens

    files = sorted(Path(longlens.__file__).parent.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def main(argv: Sequence[str] | None = None) -> None:
    chosen = parse(argv)
    deadline = time.monotonic() + 60 * chosen.minutes
    whole = read(chosen.fasta)
    rounds = draw(whole, chosen.rounds, chosen.groups, chosen.seed)
    digest = hashlib.sha256(json.dumps(rounds).encode()).hexdigest()[:16]
    library = library_digest()
    theme = "embedding-dry" if chosen.dry_run else "embedding"
    stem = f"{theme}_{harness.hardware()}_"
    fresh = chosen.out / f"{stem}{time.strftime('%Y-%m-%d')}.jsonl"
    log = fresh if chosen.fresh else max(chosen.out.glob(f"{stem}*.jsonl"), default=fresh)
    if chosen.fresh:
        log.unlink(missing_ok=True)
    about = {
        "machine": facts(), "fasta": chosen.fasta.name, "seed": chosen.seed, "digest": digest,
        "library": library, "threads": chosen.threads, "sample": describe(rounds, whole),
    }  # fmt: skip
    earlier = next((row for row in read_lines(log) if "sample" in row), None)
    if earlier is None:
        append_line(log, about)
    elif (earlier["digest"], earlier["threads"], earlier["library"]) != (digest, chosen.threads, library):
        raise SystemExit(
            f"{log.name} is of another sample, number of threads or version of longlens: ask for the same, or begin "
            "anew with --fresh"
        )
    page = None if chosen.dry_run else DOCS / "benchmarks.md"
    asked = [contender for contender in CONTENDERS if any(part in contender.name for part in chosen.only)]
    pythons = {
        contender.name: python for contender in asked
        if (python := python_of(contender, chosen.peer_python)) is not None
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        for model in chosen.models:
            if time.monotonic() > deadline:
                print(f"{model}: left for the next run", flush=True)
                continue
            if len(completed(read_lines(log), model, list(pythons))) == len(rounds):
                continue
            folder = make_model(model, Path(place))
            processes: dict[str, Process] = {}
            try:
                for contender in (contender for contender in CONTENDERS if contender.name in pythons):
                    python = pythons[contender.name]
                    processes[contender.name] = Process(contender, python, model, folder, chosen.threads)
                measure_rounds(model, rounds, processes, log, deadline)
            finally:
                for process in processes.values():
                    process.close()
            conclude(log, rounds, page)
    data = conclude(log, rounds, page)
    for row in data["rows"]:
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
