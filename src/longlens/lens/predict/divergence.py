"""How far the predictions of two models lie apart for each token, in one sweep over both heads: no (T, V) matrix.

For logits s and u (V,) of one token, p = softmax(s) and q = softmax(u):

    KL(p||q) = sum_v p_v (log p_v - log q_v) = D / l_p - log l_p + log l_q
    D = sum_v e^(s_v - m_p) ((s_v - m_p) - (u_v - m_q)),   m the largest logit, l = sum e^(s - m)

and the same with p and q exchanged; inf where q_v is 0, its logit -inf, and p_v is not. As in
`longlens.lens.predict.vocabulary`, tokens are walked in chunks, a large vocabulary in blocks, and the sums are rescaled
when m moves. KL(p||q) is what q costs, in nats beyond p's entropy, where tokens come from p.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longlens.errors import InputError
from longlens.lens.predict.vocabulary import FLOOR, HELD, MOST, Head, State, logit_blocks


@dataclass(frozen=True)
class Divergence:
    """(T,) each, float64, nats: surprise (NaN at targets of -100) and entropy of both models, KL both ways; `agree`
    bool: both have the same first choice."""

    surprise_p: Tensor
    surprise_q: Tensor
    entropy_p: Tensor
    entropy_q: Tensor
    kl_pq: Tensor
    kl_qp: Tensor
    agree: Tensor


@torch.no_grad()
def divergence(
    hidden_p: Tensor,
    head_p: Head,
    hidden_q: Tensor,
    head_q: Head,
    targets: Tensor,
    *,
    chunk: int | None = None,
    block: int | None = None,
) -> Divergence:
    """Compare the predictions of two models for each row of their hidden vectors (T, d_p) and (T, d_q).

    `targets` (T,) int64, -100 where there is none. `chunk` tokens and `block` of the vocabulary at a time, chosen so
    that about 2^23 logits of each are held where None.

    Raises `InputError` for heads of different vocabularies, or different numbers of rows.
    """
    vocabulary = len(head_p.weight)
    if len(head_q.weight) != vocabulary:
        raise InputError(f"expected two heads of one vocabulary, got {vocabulary:,} and {len(head_q.weight):,} tokens")
    if not len(hidden_p) == len(hidden_q) == len(targets):
        raise InputError(
            f"expected as many rows of both models as targets, got {len(hidden_p)}, {len(hidden_q)}, {len(targets)}"
        )
    block = min(block or HELD // 32, vocabulary)
    chunk = chunk or min(max(HELD // block, 1), MOST)
    spans = [slice(start, min(start + block, vocabulary)) for start in range(0, vocabulary, block)]
    parts: list[list[Tensor]] = []
    for start in range(0, len(targets), chunk):
        rows = slice(start, start + chunk)
        parts.append(_of_chunk(hidden_p[rows], head_p, hidden_q[rows], head_q, targets[rows], spans))
    if not parts:
        nothing = targets.new_empty(0, dtype=torch.float64)
        return Divergence(nothing, nothing, nothing, nothing, nothing, nothing, nothing.bool())
    return Divergence(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


def _of_chunk(
    hidden_p: Tensor, head_p: Head, hidden_q: Tensor, head_q: Head, targets: Tensor, spans: list[slice]
) -> list[Tensor]:
    """The fields of `Divergence` for one chunk of rows."""
    states: list[State] = []
    d_pq = d_qp = torch.zeros(len(targets), dtype=torch.float64, device=targets.device)
    # the largest logit of one model among the tokens that the other excludes
    only_p = only_q = torch.full_like(d_pq, -torch.inf)
    both = (logit_blocks(head_p, hidden_p, spans)(), logit_blocks(head_q, hidden_q, spans)())
    for span, *logits in zip(spans, *both, strict=True):
        states = states or [State(each, targets, 1, False, None) for each in logits]
        p, q = states
        only_p = torch.maximum(only_p, _largest_excluded(*logits))
        only_q = torch.maximum(only_q, _largest_excluded(*reversed(logits)))
        before = [(state.m.clone(), state.l.clone()) for state in states]
        for state, each in zip(states, logits, strict=True):
            state.take_target(each, span)
            state.add(each, span)
        moved_p, moved_q = (
            (old - state.m).clamp(min=FLOOR).double() for (old, _), state in zip(before, states, strict=True)
        )
        x, y = ((each - state.m.unsqueeze(1)).clamp_(min=FLOOR) for state, each in zip(states, logits, strict=True))
        apart = x - y
        shift = moved_p - moved_q
        # e^x of p takes x's place, and so for q
        d_pq = moved_p.exp() * (d_pq + shift * before[0][1]) + x.exp_().mul_(apart).sum(1)
        d_qp = moved_q.exp() * (d_qp - shift * before[1][1]) - y.exp_().mul_(apart).sum(1)
    log_p, log_q = p.l.log(), q.l.log()
    found_p, found_q = p.fields(), q.fields()
    # rounding alone makes them negative
    kl_pq = (d_pq / p.l - log_p + log_q).clamp(min=0.0)
    kl_qp = (d_qp / q.l - log_q + log_p).clamp(min=0.0)
    kl_pq = kl_pq.masked_fill((only_p - p.m).to(p.m.dtype).exp() > 0, torch.inf)
    kl_qp = kl_qp.masked_fill((only_q - q.m).to(q.m.dtype).exp() > 0, torch.inf)
    return [
        found_p["surprise"].double(), found_q["surprise"].double(), found_p["entropy"].double(),
        found_q["entropy"].double(), kl_pq, kl_qp, (found_p["top"] == found_q["top"])[:, 0],
    ]  # fmt: skip


def _largest_excluded(logits: Tensor, others: Tensor) -> Tensor:
    """(rows,): the largest of `logits` (rows, W) where `others` are -inf."""
    return torch.where(others == -torch.inf, logits, -torch.inf).amax(1)
