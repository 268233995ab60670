"""A contact head for a model that has none: `longlens contacts fit`.

Logistic regression with an L1 penalty on the corrected attention of every layer and head at sampled pairs (Rao et al.
2020, section 3.2): the pairs in contact, and a sample of the others, weighted for those that were left out, so that
probabilities stay calibrated. Memory: one number for each channel and sampled pair.

The reported precision is that of held-out proteins: heads are fitted to four fifths of the proteins at a time and
applied to the others (`contact_precision`); the head that is written is fitted to all of them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as save_tensors
from torch import Tensor

from longlens.errors import CheckpointError, InputError
from longlens.io.results import write_whole
from longlens.io.structures import ProteinContacts, read_pairs, read_structure
from longlens.jobs.contact_precision import (
    LONG_RANGE,
    Precision,
    ScoredPairs,
    held_out_folds,
    measure_precision,
    similar_groups,
)
from longlens.lens.contacts import ContactObserver, PairFeatures, Regression
from longlens.models.encoder import attend_with
from longlens.models.heads import ContactHead
from longlens.models.language_model import MaskedLM

TABLES = (".csv", ".tsv")
# the entry that identifies the file of a contact head
HEAD = "longlens contact head"
STRUCTURES = (".pdb", ".ent", ".cif", ".mmcif")


@dataclass(frozen=True)
class FitOptions:
    """`strength`: scikit-learn's C. `separation`: the least |i - j|. `negatives`: most other pairs of each protein."""

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
class FittedHead:
    """The head, the pairs to which it was fitted, and its precision.

    `precision` is that of all pairs and of long-range pairs if there are any. It is measured on held-out proteins, or,
    if `held_out` is False because all proteins are nearly alike, on those to which the head was fitted.
    """

    regression: Regression
    contacts: int
    others: int
    precision: tuple[Precision, ...]
    held_out: bool


def read_examples(paths: Sequence[Path], fasta: Path | None) -> list[ProteinContacts]:
    """Structures and tables of contacts; raises `InputError` for other files."""
    examples: list[ProteinContacts] = []
    tables = [path for path in paths if path.suffix.lower() in TABLES]
    for path in paths:
        if path.suffix.lower() in STRUCTURES:
            examples += read_structure(path)
        elif path not in tables:
            raise InputError(f"expected files of {', '.join(STRUCTURES + TABLES)}, got {path}")
    if tables and fasta is None:
        raise InputError("expected --fasta with the proteins of the contact lists")
    if tables and fasta is not None:
        examples += read_pairs(tables, fasta)
    return examples


def sample_pairs(
    example: ProteinContacts, options: FitOptions, generator: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.float64]]:
    """(M, 2) pairs of a protein, whether each is in contact, and how many pairs each represents."""
    length, gap = len(example.sequence), options.separation
    contacts = example.contacts[example.contacts[:, 1] - example.contacts[:, 0] >= gap]
    total = max(0, length - gap) * (max(0, length - gap) + 1) // 2
    in_contact = {(int(i), int(j)) for i, j in contacts}
    others: list[tuple[int, int]] = []
    sample_size = min(options.negatives, total - len(in_contact))
    if sample_size * 2 >= total:
        candidates = [(i, j) for i in range(length) for j in range(i + gap, length) if (i, j) not in in_contact]
        order = generator.permutation(len(candidates))[:sample_size]
        others = [candidates[place] for place in sorted(order)]
    else:
        seen = set(in_contact)
        while len(others) < sample_size:
            i, j = sorted(int(place) for place in generator.integers(0, length, 2))
            if j - i >= gap and (i, j) not in seen:
                seen.add((i, j))
                others.append((i, j))
    pairs = np.array([*map(tuple, contacts), *others], np.int64).reshape(-1, 2)
    truth = np.arange(len(pairs)) < len(contacts)
    share = (total - len(contacts)) / max(1, len(others))
    return pairs, truth, np.where(truth, 1.0, share)


def fit_head(model: MaskedLM, examples: Sequence[ProteinContacts], options: FitOptions) -> FittedHead:
    """Fit the head, and measure its precision on held-out proteins.

    Raises:
        InputError: scikit-learn is missing, no pair is in contact, or no head of the model separates contacts from
            other pairs: all weights are 0, or on held-out proteins the head is no better than chance.
    """
    require_sklearn()
    samples = [
        SampledFeatures(
            example.sequence, *sampled, pair_features(model, example.sequence, torch.from_numpy(sampled[0])).numpy()
        )
        for example, sampled in zip(examples, sample_examples(examples, options), strict=True)
    ]
    return fit_samples(model, samples, options)


def require_sklearn() -> None:
    """Raise `InputError` if scikit-learn is not installed; called before any computation."""
    if find_spec("sklearn") is None:
        raise InputError("expected scikit-learn to be installed to fit a head; install longlens[fit]")


def fit_samples(model: MaskedLM, samples: Sequence[SampledFeatures], options: FitOptions) -> FittedHead:
    """`fit_head` with features that are already computed."""
    contacts = sum(int(sample.truth.sum()) for sample in samples)
    others = sum(len(sample.truth) for sample in samples) - contacts
    if not contacts or not others:
        raise InputError(
            f"expected pairs in contact and pairs that are not, at least {options.separation} apart, in "
            f"{len(samples)} proteins, got {contacts} and {others}"
        )
    weight, bias = _fit(samples, options)
    scored = _score_held_out(samples, options)
    held_out = bool(scored)
    scored = scored or [sample.scored(weight, bias) for sample in samples]
    separations = sorted({options.separation, max(options.separation, LONG_RANGE)})
    precision = [part for gap in separations if (part := measure_precision(scored, gap)) is not None]
    useless = "" if weight.any() else "every weight is 0"
    if not useless and held_out and precision and precision[0].mean <= precision[0].chance:
        useless = (
            f"of the L strongest pairs of held-out proteins, {precision[0].mean:.3f} are in contact, "
            f"and {precision[0].chance:.3f} by chance"
        )
    if useless:
        raise InputError(
            f"no head of {model.source} tells contacts from other pairs: {useless} ({contacts:,} contacts of "
            f"{len(samples)} proteins, strength {options.strength:g}); give more proteins, a larger --strength, or a "
            "model that was trained on proteins"
        )
    shape = (model.config.layers, model.config.heads)
    regression = Regression(torch.from_numpy(weight).float().view(shape), bias)
    return FittedHead(regression, contacts, others, tuple(precision), held_out)


@dataclass(frozen=True)
class SampledFeatures:
    """A protein's sampled pairs, as in `ScoredPairs`, and their features (M, channels)."""

    sequence: str
    pairs: NDArray[np.int64]
    truth: NDArray[np.bool_]
    weights: NDArray[np.float64]
    features: NDArray[np.float32]

    def scored(self, weight: NDArray[np.float64], bias: float) -> ScoredPairs:
        """The pairs with the scores of a head."""
        scores = self.features @ weight + bias
        return ScoredPairs(len(self.sequence), self.pairs, self.truth, self.weights, scores)


def sample_examples(
    examples: Sequence[ProteinContacts], options: FitOptions
) -> list[tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.float64]]]:
    """`sample_pairs` of each protein, with one random generator for all of them."""
    generator = np.random.default_rng(options.seed)
    return [sample_pairs(example, options, generator) for example in examples]


def _fit(samples: Sequence[SampledFeatures], options: FitOptions) -> tuple[NDArray[np.float64], float]:
    """Weights (channels,) and bias of the regression."""
    from sklearn.linear_model import LogisticRegression

    regression = LogisticRegression(
        l1_ratio=1.0, C=options.strength, solver="liblinear", random_state=options.seed, max_iter=1000
    )
    regression.fit(
        np.concatenate([sample.features for sample in samples]),
        np.concatenate([sample.truth for sample in samples]),
        sample_weight=np.concatenate([sample.weights for sample in samples]),
    )
    return regression.coef_[0], float(regression.intercept_[0])


def _score_held_out(samples: Sequence[SampledFeatures], options: FitOptions) -> list[ScoredPairs]:
    """Each protein scored by a head fitted to others; empty if all are nearly alike or the others have no contact."""
    scored = []
    for held_out in held_out_folds(similar_groups([sample.sequence for sample in samples]), options.seed):
        training = [sample for sample, out in zip(samples, held_out, strict=True) if not out]
        truth = np.concatenate([sample.truth for sample in training])
        if truth.any() and not truth.all():
            weight, bias = _fit(training, options)
            scored += [sample.scored(weight, bias) for sample, out in zip(samples, held_out, strict=True) if out]
    return scored


@torch.inference_mode()
def pair_features(model: MaskedLM, sequence: str, pairs: Tensor) -> Tensor:
    """Corrected attention F_c of each channel (layer-major) at pairs (M, 2): (M, L H) float32."""
    config = model.config
    features = PairFeatures(len(sequence), config.layers, config.heads, pairs.to(model.device))
    observer = ContactObserver([features], before=model.alphabet.before)
    model(model.pack([sequence]), attend=attend_with("exact"), observers=[observer])
    return features.features().cpu()


# ---- the file of a head


def save_head(model: MaskedLM, fitted: FittedHead, path: Path) -> None:
    """Write the head, with the shape of its model."""
    shape = list(fitted.regression.weight.shape)
    tensors = {"weight": fitted.regression.weight.contiguous(), "bias": torch.tensor([fitted.regression.bias])}
    path.parent.mkdir(parents=True, exist_ok=True)
    # one entry: safetensors writes several in an order that differs from run to run
    metadata = {HEAD: json.dumps({"model": model.source, "shape": shape})}
    write_whole(path, save_tensors(tensors, metadata=metadata))


def load_head(model: MaskedLM, path: Path) -> None:
    """Give a model the head of a file. Raises `CheckpointError` for a head of another shape and for other files."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get(HEAD, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path}: expected a contact head made by `longlens contacts fit`; {error}") from None
    expected_shape = (model.config.layers, model.config.heads)
    if about is None or set(tensors) != {"weight", "bias"}:
        raise CheckpointError(f"{path}: expected a contact head made by `longlens contacts fit`, got another file")
    if tuple(tensors["weight"].shape) != expected_shape:
        raise CheckpointError(
            f"{path}: expected a head of (layers, heads) {expected_shape} for {model.source}, got "
            f"{tuple(tensors['weight'].shape)}, made for {about['model']}"
        )
    head = ContactHead(*expected_shape)
    head.regression.weight.data = tensors["weight"].view(1, -1)
    head.regression.bias.data = tensors["bias"]
    # float32 in every dtype of the model, since it is applied to float32 sums
    model.contact_head = head.requires_grad_(False)
