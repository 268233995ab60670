"""A contact head for a model that has none: `longlens contacts fit`.

Logistic regression with an L1 penalty on the corrected attention of every layer and head at sampled pairs (Rao et al.
2020, section 3.2): the pairs in contact, and a sample of the others, weighted for those that were left out, so that
probabilities stay probabilities. Memory: one number for each channel and sampled pair.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from longlens.errors import CheckpointError, InputError
from longlens.io.results import write_whole
from longlens.io.structures import Example, read_pairs, read_structure
from longlens.lens.contacts import ContactObserver, PairFeatures, Regression
from longlens.models.heads import ContactHead
from longlens.models.language_model import MaskedLM

TABLES = (".csv", ".tsv")
STRUCTURES = (".pdb", ".ent", ".cif", ".mmcif")


@dataclass(frozen=True)
class FitOptions:
    """`strength`: scikit-learn's C. `separation`: the least |i - j|. `negatives`: others from each protein at most."""

    strength: float = 0.15
    separation: int = 6
    negatives: int = 20_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.strength <= 0 or self.separation < 1 or self.negatives < 1:
            raise InputError(
                f"expected a strength above 0, a separation and negatives of at least 1, got {self.strength}, "
                f"{self.separation} and {self.negatives}"
            )


@dataclass(frozen=True)
class Fitted:
    """The head, the pairs it was fitted to, and the precision of the T strongest pairs among them."""

    regression: Regression
    contacts: int
    others: int
    precision: float


def read_examples(paths: Sequence[Path], fasta: Path | None) -> list[Example]:
    """Structures and tables of contacts; raises `InputError` for other files."""
    found: list[Example] = []
    tables = [path for path in paths if path.suffix.lower() in TABLES]
    for path in paths:
        if path.suffix.lower() in STRUCTURES:
            found += read_structure(path)
        elif path not in tables:
            raise InputError(f"expected files of {', '.join(STRUCTURES + TABLES)}, got {path}")
    if tables and fasta is None:
        raise InputError("expected --fasta with the proteins of the contact lists")
    if tables and fasta is not None:
        found += read_pairs(tables, fasta)
    return found


def sample_pairs(
    example: Example, options: FitOptions, generator: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.float64]]:
    """(M, 2) pairs of a protein, whether each is in contact, and how many pairs each stands for."""
    length, gap = len(example.sequence), options.separation
    contacts = example.contacts[example.contacts[:, 1] - example.contacts[:, 0] >= gap]
    total = max(0, length - gap) * (max(0, length - gap) + 1) // 2
    taken = {(int(i), int(j)) for i, j in contacts}
    others: list[tuple[int, int]] = []
    wanted = min(options.negatives, total - len(taken))
    if wanted * 2 >= total:
        rest = [(i, j) for i in range(length) for j in range(i + gap, length) if (i, j) not in taken]
        order = generator.permutation(len(rest))[:wanted]
        others = [rest[place] for place in sorted(order)]
    else:
        seen = set(taken)
        while len(others) < wanted:
            i, j = sorted(int(place) for place in generator.integers(0, length, 2))
            if j - i >= gap and (i, j) not in seen:
                seen.add((i, j))
                others.append((i, j))
    pairs = np.array([*map(tuple, contacts), *others], np.int64).reshape(-1, 2)
    truth = np.arange(len(pairs)) < len(contacts)
    share = (total - len(contacts)) / max(1, len(others))
    return pairs, truth, np.where(truth, 1.0, share)


def fit_head(model: MaskedLM, examples: Sequence[Example], options: FitOptions) -> Fitted:
    """Fit the head. Raises `InputError` without scikit-learn, or where nothing is in contact."""
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise InputError("expected scikit-learn to be installed to fit a head; install longlens[fit]") from None
    generator = np.random.default_rng(options.seed)
    features, truths, weights, owners = [], [], [], []
    for number, example in enumerate(examples):
        pairs, truth, weight = sample_pairs(example, options, generator)
        features.append(pair_features(model, example.sequence, torch.from_numpy(pairs)).numpy())
        truths.append(truth)
        weights.append(weight)
        owners.append(np.full(len(pairs), number))
    truth = np.concatenate(truths) if truths else np.empty(0, bool)
    if not truth.any() or truth.all():
        raise InputError(
            f"expected pairs in contact and pairs that are not, at least {options.separation} apart, in "
            f"{len(examples)} proteins, got {int(truth.sum())} and {int((~truth).sum())}"
        )
    table = np.concatenate(features)
    regression = LogisticRegression(
        l1_ratio=1.0, C=options.strength, solver="liblinear", random_state=options.seed, max_iter=1000
    )
    regression.fit(table, truth, sample_weight=np.concatenate(weights))
    config = model.config
    weight_ = torch.from_numpy(regression.coef_[0]).float().view(config.layers, config.heads)
    found = Regression(weight_, float(regression.intercept_[0]))
    scores, owner = regression.decision_function(table), np.concatenate(owners)
    hits = asked = 0
    for number, example in enumerate(examples):
        own = np.flatnonzero(owner == number)
        best = own[np.argsort(-scores[own], kind="stable")[: len(example.sequence)]]
        hits, asked = hits + int(truth[best].sum()), asked + len(best)
    return Fitted(found, int(truth.sum()), int((~truth).sum()), hits / max(1, asked))


@torch.inference_mode()
def pair_features(model: MaskedLM, sequence: str, pairs: Tensor) -> Tensor:
    """Corrected attention F_c of each channel (layer-major) at pairs (M, 2): (M, L H) float32."""
    config = model.config
    kept = PairFeatures(len(sequence), config.layers, config.heads, pairs.to(model.device))
    model(model.pack([sequence]), observers=[ContactObserver([kept])])
    return kept.features().cpu()


# ---- the file


def save_head(model: MaskedLM, fitted: Fitted, path: Path) -> None:
    """Write the head, with the shape of the model that it belongs to."""
    shape = list(fitted.regression.weight.shape)
    tensors = {"weight": fitted.regression.weight.contiguous(), "bias": torch.tensor([fitted.regression.bias])}
    path.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "longlens contact head", "model": model.source, "shape": json.dumps(shape)}
    write_whole(path, save_tensors(tensors, metadata=metadata))


def load_head(model: MaskedLM, path: Path) -> None:
    """Give a model the head of a file; raises `CheckpointError` for one of another shape or kind."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: expected a contact head made by `longlens contacts fit`; {error}") from None
    wanted = (model.config.layers, model.config.heads)
    if metadata.get("format") != "longlens contact head" or set(tensors) != {"weight", "bias"}:
        raise CheckpointError(f"{path}: expected a contact head made by `longlens contacts fit`, got another file")
    if tuple(tensors["weight"].shape) != wanted:
        raise CheckpointError(
            f"{path}: expected a head of (layers, heads) {wanted} for {model.source}, got "
            f"{tuple(tensors['weight'].shape)}, made for {metadata.get('model')}"
        )
    head = ContactHead(*wanted)
    head.regression.weight.data = tensors["weight"].view(1, -1)
    head.regression.bias.data = tensors["bias"]
    # float32 whatever the model's dtype: it is applied to float32 sums
    model.contact_head = head.requires_grad_(False)
