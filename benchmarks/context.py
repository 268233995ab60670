"""What the estimate of `longlens context` is worth, beside attention: rank correlations with the exact effect.

    python examples/surprise.py FOLDER                       trains the decoder of text, some minutes
    python benchmarks/context.py FOLDER                      about ten minutes on two cores
    python benchmarks/context.py FOLDER --parts text figures     some of it again; the rest from the newest results

For each target the exact change of its surprise is computed for every stretch, side by side, and compared by Spearman's
rank correlation with the softmax-exact estimate, its linear form, the attention rollout, the attention of the last
layer, nearness, and the estimate by the same model with the numbers of each weight matrix in random order. On
`tiny` (two proteins), AntiBERTy (four antibodies; package antiberty), and the decoder of examples/surprise.py (a text
that it has not seen). In the copy task of tests/copy_task.py the stretch is known that carried the prediction.

Writes benchmarks/results/context_<date>.json, the tables in docs/context.md, and its figures.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

import longlens
from harness import DOCS, facts, fill, newest, rounded, table, today, write_json
from longlens.hf.documents import read_document
from longlens.hf.hiding import TextContext
from longlens.hf.language_heads import language_head
from longlens.hf.texts import load_text_model
from longlens.io.fasta import read_fasta
from longlens.jobs.context_protein import ProteinContext
from longlens.jobs.context_regions import hidden_from, regular_spans
from longlens.lens import rollout
from longlens.models.encoder import Packed

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
PARTS = ("tiny", "AntiBERTy", "text", "copy", "figures")
sys.path.append(str(HERE.parent / "tests"))

import copy_task  # noqa: E402

MEASURES = ("softmax-exact", "linear", "rollout", "last layer", "nearness", "other weights")
SHOWN = {
    "softmax-exact": "estimate", "linear": "linear form", "rollout": "rollout", "last layer": "last layer's attention",
    "nearness": "nearness", "other weights": "estimate by shuffled weights",
}  # fmt: skip


def least(rows: Sequence[dict[str, Any]], name: str) -> int:
    """The least of a count."""
    return min(row[name] for row in rows)


def most(rows: Sequence[dict[str, Any]], name: str) -> int:
    """The largest of a count."""
    return max(row[name] for row in rows)


def middle(rows: Sequence[dict[str, Any]], name: str) -> str:
    """The median."""
    return f"{np.median([row[name] for row in rows]):.2f}"


# further lines of the table, of the rows of a model
FACTS: dict[str, Callable[[Sequence[dict[str, Any]]], str]] = {
    "targets, stretches of each": lambda own: f"{len(own)}, {least(own, 'stretches')}-{most(own, 'stretches')}",
    "median surprise, strongest effect (nats)": lambda own: f"{middle(own, 'surprise')}, {middle(own, 'strongest')}",
    "strongest stretch within one width of the target": lambda own: (
        f"{sum(row['away'] <= row['width'] for row in own)}"
    ),
    "strongest stretch among the eight of largest estimate": lambda own: f"{sum(row['found'] for row in own)}",
    "forward, backward passes for all stretches": lambda own: f"{most(own, 'forward')}, {most(own, 'backward')}",
}


@dataclass(frozen=True)
class Case:
    """A sequence and a model, the same model with shuffled weights, targets and the width of the stretches."""

    name: str
    subject: Any
    other: Any
    targets: Sequence[int]
    width: int


def shuffled(model: torch.nn.Module) -> Any:
    """A copy of a model with the numbers of each weight matrix in random order."""
    generator, out = torch.Generator().manual_seed(0), copy.deepcopy(model)
    for parameter in out.parameters():
        if parameter.ndim == 2:
            order = torch.randperm(parameter.numel(), generator=generator)
            parameter.data = parameter.data.flatten()[order].view_as(parameter)
    return out


def spread_over(first: int, last: int, count: int) -> list[int]:
    """`count` tokens, evenly spaced."""
    return [int(token) for token in np.linspace(first, last, count).round()]


def cases(part: str, folder: Path) -> Iterator[Case]:
    """All sequences of a model: "tiny", "AntiBERTy" or "decoder of text"."""
    if part == "tiny":
        tiny = longlens.load("tiny", dtype="float32", device="cpu")
        other = shuffled(tiny)
        for name in ("sp|P15755|RT12_PARTE", "tr|A0A0E3H805|A0A0E3H805_MYCSY"):
            text = proteins()[name]
            subjects = ProteinContext(tiny, text), ProteinContext(other, text)
            yield Case(part, *subjects, spread_over(8, len(text) - 8, 8), 12)
    if part == "AntiBERTy":
        antiberty = longlens.load("antiberty", dtype="float32", device="cpu")
        other = shuffled(antiberty)
        for text in antibodies().values():
            subjects = ProteinContext(antiberty, text), ProteinContext(other, text)
            yield Case(part, *subjects, spread_over(8, len(text) - 8, 4), 6)
    if part == "decoder of text":
        text_model = load_text_model(str(folder / "python-help"), dtype="float32", device="cpu")
        other = replace(text_model, model=shuffled(text_model.model))
        first, second = (text_context(model, section(folder)) for model in (text_model, other))
        yield Case(part, first, second, spread_over(len(first) // 2, len(first) - 1, 16), 8)


def proteins() -> dict[str, str]:
    """The example proteins by their ids."""
    return {record.id: record.sequence for record in read_fasta(EXAMPLES / "proteins.fasta.gz")}


def antibodies() -> dict[str, str]:
    """The example antibodies by their ids."""
    return {record.id: record.sequence for record in read_fasta(EXAMPLES / "antibodies.fasta")}


def section(folder: Path) -> str:
    """A section of the text that the decoder has not seen, shorter than the 256 tokens that it was trained on."""
    text = (folder / "held-out.txt").read_text()
    start = text.index('"except" clause')
    return text[start : start + 760].rpartition(".")[0] + "."


def text_context(model: Any, text: str) -> TextContext:
    """A text and a model."""
    head = language_head(model.model)
    return TextContext(model, head, read_document(model, text, "text", causal=head.causal))


def attention_of(subject: Any, target: int) -> tuple[np.ndarray, np.ndarray]:
    """(N,) each: the row of the rollout, and of the last layer's attention (mean over heads), of the query that
    predicts the target."""
    reader = target - 1 if subject.causal else target
    with torch.no_grad():
        if subject.causal:
            with longlens.record(subject.model.model) as calls:
                subject.head.hidden(subject.ids[None, :target])
        else:
            packed = subject.model.pack("".join(subject.labels[1:-1]))
            tokens = packed.tokens.clone()
            tokens[target] = subject.model.alphabet.mask
            with longlens.record(subject.model) as calls:
                subject.model(Packed(tokens, packed.cu_seqlens))
        rolled = rollout(calls, queries=[reader]).values.flatten().numpy()
        last = calls[-1]
        groups = last.query.shape[1] // last.key.shape[1]
        key = last.key.repeat_interleave(groups, 1)[0, :, : reader + 1 if subject.causal else None]
        scores = torch.einsum("hd,hnd->hn", last.query[0, :, reader], key) * last.settings["scale"]
        row = scores.softmax(-1).mean(0).numpy()
    out = np.zeros((2, len(subject)))
    out[0, : len(rolled)], out[1, : len(row)] = rolled, row
    return out[0], out[1]


def measured(case: Case, target: int) -> dict[str, Any]:
    """Rank correlations of each measure with the exact effect of one target's stretches, and with its size."""
    subject = case.subject
    able = [place for place, special in enumerate(subject.special) if not special]
    spans = hidden_from(subject, target, regular_spans(able, case.width))
    before = replace(subject.passes)
    estimate = subject.estimate([target], spans)
    read = subject.surprise([target] * (1 + len(spans)), [None, *spans])
    exact = read[1:] - read[0]
    rolled, last = attention_of(subject, target)
    keys = estimate.keys[0].copy()
    keys[target] = 0.0
    values = {
        "softmax-exact": estimate.spans[0],
        "linear": np.array([keys[slice(*span)].sum() for span in spans]),
        "rollout": np.array([rolled[slice(*span)].sum() for span in spans]),
        "last layer": np.array([last[slice(*span)].sum() for span in spans]),
        "nearness": np.array([-abs((start + stop - 1) / 2 - target) for start, stop in spans]),
        "other weights": case.other.estimate([target], spans).spans[0],
    }
    start, stop = spans[int(np.abs(exact).argmax())]
    row: dict[str, Any] = {
        "model": case.name, "target": target, "surprise": float(read[0]), "stretches": len(spans), "width": case.width,
        "strongest": float(np.abs(exact).max()), "away": max(0, start - target, target - stop + 1),
        "forward": subject.passes.forward - before.forward, "backward": subject.passes.backward - before.backward,
        # the strongest of all stretches is among the eight of largest estimate, which the command hides
        "found": bool(np.abs(exact).argmax() in np.argsort(-np.abs(estimate.spans[0]))[:8]),
    }  # fmt: skip
    for name, value in values.items():
        row[name] = float(spearmanr(value, exact).statistic)
        # nearness has no sign: the nearer, the larger
        size = value if name == "nearness" else np.abs(value)
        row[f"{name}, size"] = float(spearmanr(size, np.abs(exact)).statistic)
    return row


COPY_MEASURES = {
    "exact": "exact", "estimate": "estimate", "rollout": "rollout", "last layer": "last layer's attention",
    "correlation": "rank correlation of estimate and exact",
}  # fmt: skip


def copied(seeds: int = 5, examples: int = 100) -> dict[str, dict[str, list[float]]]:
    """For each of several models: the share of examples of the copy task in which each measure is largest at the copied
    stretch, and the mean rank correlation of estimate and exact effect over the four stretches."""
    found: dict[str, dict[str, list[float]]] = {}
    for name, make in {"trained": copy_task.trained, "untrained": copy_task.untrained}.items():
        found[name] = {measure: [] for measure in COPY_MEASURES}
        for seed in range(seeds):
            shares = copied_by(make(seed), examples)
            for measure, share in shares.items():
                found[name][measure].append(float(f"{share:.5g}"))
    return found


def copied_by(model: Any, examples: int) -> dict[str, float]:
    """The same of one model."""
    hits: dict[str, list[float]] = {measure: [] for measure in COPY_MEASURES}
    target, spans = copy_task.LENGTH, copy_task.SPANS
    for sequence, stretch in copy_task.draw(np.random.default_rng(1), examples):
        subject = ProteinContext(model, sequence)
        rolled, last = attention_of(subject, target)
        values = {
            "exact": subject.surprise([target] * len(spans), spans),
            "estimate": subject.estimate([target], spans).spans[0],
            "rollout": [rolled[slice(*span)].sum() for span in spans],
            "last layer": [last[slice(*span)].sum() for span in spans],
        }
        for measure, value in values.items():
            hits[measure].append(int(np.argmax(value)) == stretch)
        hits["correlation"].append(spearmanr(values["estimate"], values["exact"]).statistic)
    return {measure: float(np.mean(hit)) for measure, hit in hits.items()}


def correlations(rows: Sequence[dict[str, Any]]) -> str:
    """The table of rank correlations: the mean over targets and its standard deviation."""
    lines = []
    models = list(dict.fromkeys(row["model"] for row in rows))
    for measure in MEASURES:
        cells = []
        for model in models:
            own = [row for row in rows if row["model"] == model]
            signed, size = (np.array([row[name] for row in own]) for name in (measure, f"{measure}, size"))
            cells.append(f"{signed.mean():.2f} (sd {signed.std():.2f}); {size.mean():.2f}")
        lines.append([SHOWN[measure], *cells])
    for name, of in FACTS.items():
        lines.append([name, *(of([row for row in rows if row["model"] == model]) for model in models)])
    return table(["", *models], lines)


@dataclass(frozen=True)
class Figure:
    """A run of `longlens context`: a model, its input and options, and the figure of it that the page has, if any."""

    model: str
    source: Any
    options: dict[str, Any]
    figure: str = ""
    name: str = ""


def page_runs(folder: Path, rows: Sequence[dict[str, Any]]) -> list[Figure]:
    """What the page shows in figures and in its last table."""
    carried = max((row for row in rows if row["model"] == "decoder of text"), key=lambda row: row["strongest"])
    mouse, seen = "tr|B9EKC1|B9EKC1_MOUSE", antibodies()
    decoder, text = str(folder / "python-help"), {"input": "text"}
    words = {"spans": 8, "exact": "all", **text}
    every = {"spans": 6, "exact": "all"}
    return [
        Figure("tiny", {mouse: proteins()[mouse]}, {"curve": 48, "targets": 600, "exact": 1}),
        Figure("antiberty", {"trastuzumab": seen["trastuzumab"]}, {"curve": 120, "targets": "C96", **every}),
        Figure("antiberty", {"bevacizumab": seen["bevacizumab"]}, {"curve": 0, "targets": 79, **every},
            "context_79.png", "context-antiberty.png"),
        Figure(decoder, section(folder), {"curve": 0, "targets": carried["target"], **words}),
        # "clauses" after the word "except"
        Figure(decoder, section(folder), {"curve": 0, "targets": 125, **words}, "context_125.png", "context-text.png"),
        Figure(decoder, (folder / "held-out.txt").read_text(), {
            "curve": 10_000, "most_surprising": 1, "exact": 1, **text}, "curve.png", "context-curve.png"),
    ]  # fmt: skip


def explained(run: Figure, images: Path) -> dict[str, Any]:
    """The targets, stretches and curve of a run; its figure is put into `images`."""
    with tempfile.TemporaryDirectory() as out:
        drawn = {"figures": bool(run.figure), "halve": int(bool(run.figure))}
        found = longlens.context(run.source, model=run.model, output=Path(out) / "out", **drawn, **run.options)
        if run.figure:
            images.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found.path(0) / run.figure, images / run.name)
        tables = {name: {key: column.tolist() for key, column in table.items()} for name, table in found[0].items()}
    spans = tables["spans"]
    return {
        "model": Path(run.model).name, "figure": run.name, "target": tables["targets"]["target"][0],
        "token": tables["targets"]["token"][0], "surprise": tables["targets"]["surprise"][0],
        "spans": [
            [spans["start"][place], spans["stop"][place], spans["tokens"][place], spans["estimate"][place], exact]
            for place, exact in enumerate(spans["exact"]) if np.isfinite(exact)
        ],
        **({key: tables["curve"][key] for key in ("context", "tokens")} if "curve" in tables else {}),
        **({"means": tables["curve"]["surprise"]} if "curve" in tables else {}),
    }  # fmt: skip


def curves(runs: Sequence[dict[str, Any]]) -> str:
    """The table of the context curves."""
    lines = []
    for run in runs:
        if "means" in run:
            cells = ", ".join(
                f"{length:,}: {mean:.2f}" for length, mean in zip(run["context"], run["means"], strict=True)
            )
            lines.append([run["model"], f"{run['tokens'][0]:,}", cells])
    return table(["model", "tokens", "mean surprise (nats) by tokens of context"], lines)


def copies(task: dict[str, dict[str, list[float]]]) -> str:
    """The table of the copy task: the mean over models, the least and the largest."""
    lines = []
    for model, found in task.items():
        values = [np.array(found[measure]) for measure in COPY_MEASURES]
        lines.append([model, *(f"{row.mean():.2f} ({row.min():.2f} to {row.max():.2f})" for row in values)])
    return table(["model", *COPY_MEASURES.values()], lines)


def measure(folder: Path, parts: Sequence[str], data: dict[str, Any]) -> dict[str, Any]:
    """The parts anew, in place of those in `data`, results of an earlier run."""
    rows = data.get("rows", [])
    for part, name in {"tiny": "tiny", "AntiBERTy": "AntiBERTy", "text": "decoder of text"}.items():
        if part in parts:
            anew = [rounded(measured(case, target)) for case in cases(name, folder) for target in case.targets]
            rows = [row for row in rows if row["model"] != name] + anew
    task = copied() if "copy" in parts else data.get("copy_task", {})
    runs = data.get("runs", [])
    if "figures" in parts:
        runs = [explained(run, DOCS / "images") for run in page_runs(folder, rows)]
    return {"machine": facts(), "rows": rows, "copy_task": task, "runs": runs}


def dry() -> dict[str, Any]:
    """A few targets of `tiny`, and a short curve."""
    case = next(cases("tiny", HERE))
    rows = [rounded(measured(replace(case, width=32), target)) for target in case.targets[:2]]
    protein = "".join(case.subject.labels[1:41])
    options = {"curve": 4, "targets": 20, "spans": 16, "exact": "all"}
    with tempfile.TemporaryDirectory() as images:
        runs = [explained(Figure("tiny", {"a": protein}, options, "context_20.png", "a.png"), Path(images))]
        assert (Path(images) / "a.png").stat().st_size > 0
    return {"rows": rows, "copy_task": {}, "runs": runs}


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, write the results and fill the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", help="the folder of examples/surprise.py")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="measured anew")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dry-run", action="store_true", help="a little of `tiny`; results and page are left alone")
    chosen = parser.parse_args(argv)
    torch.set_num_threads(chosen.threads)
    if chosen.dry_run:
        return dry()
    if chosen.folder is None or not (chosen.folder / "held-out.txt").exists():
        parser.error(f"expected the folder of examples/surprise.py, got {chosen.folder}")
    last = newest("context")
    data = measure(chosen.folder, chosen.parts, json.loads(last.read_text()) if last else {})
    write_json(today("context")[0], data)
    page = DOCS / "context.md"
    fill(page, "context.py correlations", correlations(data["rows"]))
    fill(page, "context.py copy", copies(data["copy_task"]))
    fill(page, "context.py curves", curves(data["runs"]))
    return data


if __name__ == "__main__":
    main()
