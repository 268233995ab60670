"""ESM-2's contact maps for a transformers model, in place of its own `predict_contacts`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from longlens.errors import InputError
from longlens.hf.modules import attention_modules
from longlens.hf.observe import ObservedModel
from longlens.lens.contacts import ContactObserver, Regression, WholeMap


@torch.no_grad()
def predict_contacts(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Tensor]:
    """Contact probabilities (L, L) float32 of each row of a batch, as `EsmModel.predict_contacts` defines them.

    Holds one map for each row and not layers x heads of them; rows are cut to their own residues.

    Args:
        model: `EsmModel`, `EsmForMaskedLM` or another of transformers' ESM models that keeps the contact head.
        input_ids, attention_mask: (B, N), start and end tokens included, padded on the right.

    The model is in evaluation mode meanwhile: no other thread may train it.

    Raises:
        InputError: the model has no contact head, or the mask has another form.
    """
    head = next((module for name, module in model.named_modules() if name.endswith("contact_head")), None)
    if head is None:
        raise InputError(f"expected an ESM model with its contact_head, got {type(model).__name__}, which has none")
    lengths = _lengths(input_ids, attention_mask)
    layers = len(attention_modules(model))
    regression: Any = head.regression
    weight = regression.weight.detach().float().cpu().view(layers, -1)
    maps = [
        WholeMap(length - 2, Regression(weight, float(regression.bias.detach())), input_ids.device)
        for length in lengths
    ]

    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with ObservedModel(model).observed(ContactObserver(maps, lengths), "exact"):
            model(input_ids, attention_mask=attention_mask)
    finally:
        for module, was in training.items():
            module.training = was
    return [contact_map.finish() for contact_map in maps]


def _lengths(input_ids: Tensor, attention_mask: Tensor | None) -> list[int]:
    """The number of tokens in each row, including start and end."""
    if input_ids.ndim != 2:
        raise InputError(f"expected input_ids (B, N), got {tuple(input_ids.shape)}")
    keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if keep.shape != input_ids.shape:
        raise InputError(f"expected an attention_mask {tuple(input_ids.shape)}, got {tuple(keep.shape)}")
    lengths = keep.long().sum(1)
    place = torch.arange(input_ids.shape[1], device=keep.device)
    if not torch.equal(keep.bool(), place < lengths.unsqueeze(1)) or int(lengths.min()) < 3:
        raise InputError("expected rows of at least one residue between start and end tokens, padded on the right")
    return [int(length) for length in lengths]
