"""Random-weight checkpoints of transformers' ESM-2, and what it computes from them: the literal implementation."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import EsmConfig, EsmForMaskedLM

RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
SIZES = {"8M": (6, 320, 20), "35M": (12, 480, 20)}


def esm(layers: int, width: int, heads: int, seed: int = 0) -> EsmForMaskedLM:
    """An ESM-2 whose weights are large enough for every part to matter, with frequencies rounded to float16."""
    torch.manual_seed(seed)
    config = EsmConfig(
        vocab_size=33, mask_token_id=32, pad_token_id=1, hidden_size=width, num_hidden_layers=layers,
        num_attention_heads=heads, intermediate_size=4 * width, layer_norm_eps=1e-5, token_dropout=True,
        position_embedding_type="rotary", emb_layer_norm_before=False, max_position_embeddings=1026,
    )  # fmt: skip
    model = EsmForMaskedLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1.2 * noise * width**-0.5) if parameter.ndim > 1 else parameter.add_(0.1 * noise)
        frequencies = model.esm.rotary_embeddings.inv_freq
        frequencies.copy_(frequencies.half().float())
    return model


def save(model: EsmForMaskedLM, folder: Path) -> Path:
    """In the hub's format."""
    model.save_pretrained(folder)
    return folder


def literal(model: EsmForMaskedLM, tokens: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """Hidden states (L + 1 of (n, d)) and logits (n, V) of one sequence, alone."""
    with torch.no_grad():
        one = tokens.unsqueeze(0)
        out = model(one, attention_mask=torch.ones_like(one), output_hidden_states=True)
    return tuple(state[0] for state in out.hidden_states), out.logits[0]


def protein(length: int, seed: int) -> str:
    """Random residues, rare ones among them."""
    generator = torch.Generator().manual_seed(seed)
    letters = RESIDUES * 4 + "XBUZO"
    return "".join(letters[i] for i in torch.randint(len(letters), (length,), generator=generator))
