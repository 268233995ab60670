"""How surprised a model is by each token: prediction error, its expectation, and the rank of the truth.

For log-probabilities log p (rows, V) and the truth t of each row:

    surprise = -log p_t                  negative log-likelihood, in nats
    entropy  = -sum_v p_v log p_v        the surprise that the model itself expects
    excess   = surprise - entropy        error beyond what was expected; 0 on average where the model is calibrated
    rank     = place of the truth among the tokens by probability (1: the model's first choice)

Rows are given a chunk at a time, so that no (T, V) matrix exists.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longlens.errors import InputError


@dataclass(frozen=True)
class Surprise:
    """One value per row, float32 (rank: int32)."""

    surprise: Tensor
    entropy: Tensor
    excess: Tensor
    rank: Tensor


def surprise(log_probabilities: Tensor, truth: Tensor) -> Surprise:
    """`log_probabilities` (rows, V) that sum to 1 in each row, `truth` (rows,) int64. Formulas: the module's docstring.

    Raises `InputError` where the shapes do not fit.
    """
    if log_probabilities.ndim != 2 or truth.shape != log_probabilities.shape[:1]:
        raise InputError(
            f"expected log-probabilities (rows, V) and truth (rows,), got {tuple(log_probabilities.shape)} and "
            f"{tuple(truth.shape)}"
        )
    log_p = log_probabilities.float()
    of_truth = log_p.gather(1, truth.unsqueeze(1))
    # 0 log 0 = 0
    entropy = torch.special.entr(log_p.exp()).sum(1)
    error = -of_truth.squeeze(1)
    return Surprise(error, entropy, error - entropy, 1 + (log_p > of_truth).sum(1, dtype=torch.int32))
