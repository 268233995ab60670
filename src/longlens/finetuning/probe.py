"""The linear probe: ridge regression in closed form, or logistic regression, on vectors that stay as they are.

The strength of the penalty is the one with the least loss on validation rows. scikit-learn fits.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from longlens.finetuning.rows import Rows
from longlens.finetuning.targets import Targets

# penalties of ridge, for each training row; scikit-learn's C of logistic regression
RIDGE = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
LOGISTIC = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Linear:
    """outputs = ((x - mean) / scale) weight^T + bias; weight (C, d). Logits of classes, or values in units of the
    training targets' standard deviation from their mean (`centre`, `spread`)."""

    mean: Floats
    scale: Floats
    weight: Floats
    bias: Floats
    centre: float
    spread: float
    strength: float

    def __call__(self, inputs: NDArray[np.floating]) -> Floats:
        """(R, d) -> (R, C)."""
        return ((inputs - self.mean) / self.scale) @ self.weight.T + self.bias


def fit_probe(targets: Targets, training: Rows, validation: Rows) -> Linear:
    """The probe whose penalty has the least loss on the validation rows (the stronger one of equals)."""
    mean = training.inputs.mean(0, dtype=np.float64)
    scale = training.inputs.std(0, dtype=np.float64)
    # numbers that never change carry nothing
    scale = np.where(scale > 1e-6, scale, 1.0)
    values = not targets.task.classes
    centre = float(np.average(training.truth, weights=training.weights)) if values else 0.0
    spread = float(training.truth.std()) if values else 1.0
    spread = spread if spread > 0 else 1.0
    x = ((training.inputs - mean) / scale).astype(np.float64)
    best: tuple[float, Linear] | None = None
    strengths = tuple(reversed(RIDGE)) if values else LOGISTIC
    for strength in strengths:
        if values:
            weight, bias = _ridge(x, (training.truth - centre) / spread, training.weights, strength)
        else:
            weight, bias = _logistic(x, training.truth, training.weights, strength, len(targets.classes))
        probe = Linear(mean, scale, weight, bias, centre, spread, strength)
        loss = row_loss(targets, probe(validation.inputs), validation, centre, spread)
        if best is None or loss < best[0]:
            best = (loss, probe)
    assert best is not None
    return best[1]


def row_loss(targets: Targets, outputs: Floats, rows: Rows, centre: float, spread: float) -> float:
    """The weighted mean of cross entropy or of the squared error in units of `spread`."""
    if targets.task.classes:
        shifted = outputs - outputs.max(1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
        losses = -log_p[np.arange(len(log_p)), rows.truth.astype(np.int64)]
    else:
        losses = (outputs[:, 0] - (rows.truth - centre) / spread) ** 2
    return float(np.average(losses, weights=rows.weights))


def _ridge(x: Floats, y: Floats, weights: Floats, strength: float) -> tuple[Floats, Floats]:
    from sklearn.linear_model import Ridge

    ridge = Ridge(alpha=strength * len(x), solver="cholesky").fit(x, y, sample_weight=weights)
    return ridge.coef_.reshape(1, -1), np.atleast_1d(np.asarray(ridge.intercept_, np.float64))


def _logistic(x: Floats, y: Floats, weights: Floats, strength: float, classes: int) -> tuple[Floats, Floats]:
    """Weights (C, d) and biases (C,); a class without training rows gets a bias that never wins."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings():
        # more iterations do not change which penalty is chosen
        warnings.simplefilter("ignore", ConvergenceWarning)
        fitted = LogisticRegression(C=strength, max_iter=300).fit(x, y, sample_weight=weights)
    if len(fitted.classes_) == 2:
        rows, biases = np.stack([-fitted.coef_[0] / 2, fitted.coef_[0] / 2]), np.array([-0.5, 0.5]) * fitted.intercept_
    else:
        rows, biases = fitted.coef_, fitted.intercept_
    weight, bias = np.zeros((classes, x.shape[1])), np.full(classes, -20.0)
    weight[fitted.classes_.astype(int)], bias[fitted.classes_.astype(int)] = rows, biases
    return weight, bias
