"""PyTorch's fused attention on CUDA: the operators behind `scaled_dot_product_attention` and `varlen_attn`, by name.

Called by their own names they give the log-sum-exp too (natural logarithm), and take packed sequences in one launch.
The names are private to PyTorch, so each is checked against float64 at first use on a device, and left alone where it
is absent or gives something else.

    cudnn      half precision, no mask        flash      half precision, no mask, packed sequences
    efficient  also float32 and key masks; packed sequences
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend

KERNELS = {
    SDPBackend.FLASH_ATTENTION.value: "flash",
    SDPBackend.EFFICIENT_ATTENTION.value: "efficient",
    SDPBackend.CUDNN_ATTENTION.value: "cudnn",
}
# flash attention reads rows of whole eights of numbers, and of at most so many
EIGHT, WIDEST = 8, 256
# a mask's rows begin at multiples of so many numbers
MASK_STEP = 16


def attend_dense(
    kernel: str, query: Tensor, key: Tensor, value: Tensor, scale: float, *, causal: bool, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Output (B, H, Nq, D) and log-sum-exp (B, H, Nq), float32 and without gradient, by the kernel of that name.

    Widths must be equal and numbers within a row adjacent; `mask` (B, 1, 1, Nk) bool, for "efficient" alone, leaves
    every row a key. Heads may be grouped for the other two. Ask `gives_lse` first.
    """
    if kernel == "flash":
        output, lse = _flash(_to_eights(query), _to_eights(key), _to_eights(value), scale, causal)
    elif kernel == "cudnn":
        output, lse = _cudnn(query, key, value, scale, causal)
    else:
        bias = None if mask is None else _additive(mask, query)
        output, lse = _efficient(_aligned(query), _aligned(key), _aligned(value), bias, scale, causal)
    # the rows may be padded to a whole number of the kernel's blocks
    lse = lse.squeeze(3) if lse.ndim == 4 else lse
    return output[..., : query.shape[3]], lse[..., : query.shape[2]]


def attend_packed(
    kernel: str, query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float, *,
    causal: bool, need_lse: bool,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Packed sequences in one launch: output (T, H, D) of query, key and value (T, H, D), and log-sum-exp (H, T).

    bounds: (S + 1,) int32 on the device; longest: the tokens of the longest sequence. "flash" takes half precision and
    grouped heads, "efficient" also float32. Both are differentiable in query, key and value. Ask `packs` first.
    """
    if kernel == "flash":
        parts = (_to_eights(query), _to_eights(key), _to_eights(value))
        output, lse = _flash_packed(*parts, bounds, longest, scale, causal)
        return output[..., : query.shape[2]], lse[:, : len(query)] if need_lse else None
    parts = (_aligned(query)[None], _aligned(key)[None], _aligned(value)[None])
    keep = need_lse or (torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)))
    output, padded = _efficient_packed(*parts, bounds, longest, scale, causal, keep)
    return output.squeeze(0), _unpadded(padded, bounds, len(query)) if need_lse else None


@cache
def gives_lse(kernel: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the dense kernel exists there and gives what we take it to give; False for a kernel of another name."""
    if kernel not in KERNELS.values():
        return False

    def run(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor | None]:
        return attend_dense(kernel, query, key, key, 0.5, causal=False)

    return _right(run, dtype, device)


@cache
def packs(kernel: str, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the packed kernel exists there and gives what we take it to give."""

    def run(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor | None]:
        # one sequence, and before it another that must not count
        queries, keys = (torch.cat([one[0, :, :7], one[0]], 1).transpose(0, 1) for one in (query, key))
        bounds = torch.tensor([0, 7, 7 + query.shape[2]], dtype=torch.int32, device=device)
        output, lse = attend_packed(
            kernel, queries, keys, keys, bounds, query.shape[2], 0.5, causal=False, need_lse=True
        )
        assert lse is not None
        return output[7:].transpose(0, 1).unsqueeze(0), lse[:, 7:].unsqueeze(0)

    return _right(run, dtype, device)


def _right(
    run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]], dtype: torch.dtype, device: torch.device
) -> bool:
    # no random numbers, which belong to the caller
    query = torch.linspace(-2.0, 2.0, 2 * 64 * 16, device=device).view(1, 2, 64, 16).to(dtype)
    key = torch.linspace(1.0, -90.0, 2 * 64 * 16, device=device).sin().view(1, 2, 64, 16).to(dtype)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            output, lse = run(query, key)
        except (AttributeError, IndexError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return False
        scores = query.double() @ key.double().mT * 0.5
        if lse is None or lse.dtype != torch.float32 or lse.shape != scores.shape[:3] or output.shape != query.shape:
            return False
        weights = torch.softmax(scores, -1)
        apart = (lse.double() - torch.logsumexp(scores, -1)).abs().max()
        return bool(apart < 1e-2 and (output - weights @ key.double()).abs().max() < 5e-2)


# ---- the operators, each by the name that PyTorch gives it


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    operator = torch.ops.aten._scaled_dot_product_flash_attention
    output, lse = operator(query, key, value, 0.0, causal, False, scale=scale)[:2]
    return output, lse


def _cudnn(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> tuple[Tensor, Tensor]:
    operator = torch.ops.aten._scaled_dot_product_cudnn_attention
    output, lse = operator(query, key, value, None, True, 0.0, causal, False, scale=scale)[:2]
    return output, lse


def _efficient(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    operator = torch.ops.aten._scaled_dot_product_efficient_attention
    output, lse = operator(query, key, value, bias, True, 0.0, causal, scale=scale)[:2]
    return output, lse


def _flash_packed(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    operator = torch.ops.aten._flash_attention_forward
    output, lse = operator(
        query, key, value, bounds, bounds, longest, longest, 0.0, causal, False, scale=scale
    )[:2]  # fmt: skip
    return output, lse


def _efficient_packed(
    query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float, causal: bool, keep: bool
) -> tuple[Tensor, Tensor]:
    # custom_mask_type: 0 is none, 1 causal from the top left, which in a sequence of its own is the one there is
    operator = torch.ops.aten._efficient_attention_forward
    output, lse = operator(
        query, key, value, None, bounds, bounds, longest, longest, 0.0, int(causal), keep, scale=scale
    )[:2]  # fmt: skip
    return output, lse


# ---- what the operators ask of their arguments


def _to_eights(tensor: Tensor) -> Tensor:
    """Zeros up to a width that 8 divides: they change no score, and the columns of zeros are cut off again."""
    short = -tensor.shape[-1] % EIGHT
    return F.pad(tensor, (0, short)) if short else tensor


def _aligned(tensor: Tensor) -> Tensor:
    """The tensor with memory that begins at a multiple of 16 bytes: a copy where a slice begins elsewhere."""
    return tensor if tensor.is_meta or tensor.data_ptr() % 16 == 0 else tensor.clone()


def _additive(mask: Tensor, query: Tensor) -> Tensor:
    """(B, 1, 1, Nk) bool as 0 and -inf, (B, H, Nq, Nk): a view of B rows, of a length that the kernel can load."""
    batch, keys = mask.shape[0], mask.shape[3]
    rows = query.new_zeros(batch, 1, 1, keys + -keys % MASK_STEP)[..., :keys]
    return rows.masked_fill_(~mask, -torch.inf).expand(batch, query.shape[1], query.shape[2], keys)


def _unpadded(lse: Tensor, bounds: Tensor, tokens: int) -> Tensor:
    """(S, H, most rows) of each sequence apart -> (H, T)."""
    place = torch.arange(tokens, device=lse.device)
    sequence = torch.bucketize(place, bounds[1:], right=True)
    return lse[sequence, :, place - bounds[sequence]].T
