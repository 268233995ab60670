"""Random-weight T5 encoders of transformers in the shapes of ProtT5, ProstT5 and Ankh, and their tokenizers' files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5LayerNorm

from family_peer import randomise
from longlens.models.families.t5 import PROT_T5

SHAPES: dict[str, dict[str, Any]] = {
    "ProtT5": {"feed_forward_proj": "relu", "vocab_size": 128, "num_heads": 8, "d_kv": 16, "num_layers": 3},
    "ProstT5": {"feed_forward_proj": "relu", "vocab_size": 150, "num_heads": 8, "d_kv": 16, "num_layers": 2},
    "Ankh": {
        "feed_forward_proj": "gated-gelu", "vocab_size": 144, "num_heads": 4, "d_kv": 8, "num_layers": 3,
        "relative_attention_num_buckets": 64,
    },
    "Ankh 3": {
        "feed_forward_proj": "gated-silu", "vocab_size": 256, "num_heads": 2, "d_kv": 12, "num_layers": 2,
        "relative_attention_num_buckets": 64,
    },
}  # fmt: skip


def config_of(name: str, **changes: Any) -> T5Config:
    return T5Config(**({"d_model": 32, "d_ff": 80, "dropout_rate": 0.0} | SHAPES[name] | changes))


def encoder(name: str, **changes: Any) -> T5EncoderModel:
    """Weights large enough for every part to matter, the bias of distances among them."""
    model = T5EncoderModel(config_of(name, **changes)).eval()
    randomise(model)
    return model


def in_float64(model: T5EncoderModel) -> T5EncoderModel:
    """The model in float64 throughout: its norms would take the mean square in float32."""
    for module in list(model.modules()):
        for name, norm in module.named_children():
            if isinstance(norm, T5LayerNorm):
                exact = nn.RMSNorm(len(norm.weight), eps=norm.variance_epsilon)
                exact.weight = norm.weight
                setattr(module, name, exact)
    return model.double()


def states_of(model: nn.Module) -> Callable[[Tensor], list[Tensor]]:
    """Hidden states of an encoder for one protein."""

    def states(tokens: Tensor) -> list[Tensor]:
        one = tokens.unsqueeze(0)
        out = model(input_ids=one, attention_mask=torch.ones_like(one), output_hidden_states=True)
        return [state[0] for state in out.hidden_states]

    return states


def with_decoder(name: str) -> T5ForConditionalGeneration:
    model = T5ForConditionalGeneration(config_of(name, num_decoder_layers=1)).eval()
    randomise(model)
    return model


def pieces_of(name: str) -> list[str]:
    """What a tokenizer of this model holds; residues are words for ProtT5 and plain letters for Ankh."""
    pieces = list(PROT_T5)
    if name.startswith("Ankh"):
        pieces = [piece.removeprefix("▁") for piece in pieces]
    size = SHAPES[name]["vocab_size"]
    pieces += [f"<extra_id_{size - 1 - number}>" for number in range(len(pieces), size)]
    if name == "ProstT5":
        pieces[128:148] = list("▁acdefghiklmnpqrstvwy")[1:]
        pieces[148:150] = ["<fold2AA>", "<AA2fold>"]
    if name == "Ankh 3":
        pieces[30:32] = ["[NLU]", "[S2S]"]
    return pieces


def write_json(folder: Path, name: str) -> None:
    vocabulary = [[piece, -float(number)] for number, piece in enumerate(pieces_of(name))]
    content = {"version": "1.0", "added_tokens": [], "model": {"type": "Unigram", "unk_id": 2, "vocab": vocabulary}}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")


def write_sentencepiece(path: Path, pieces: list[str]) -> None:
    """A `spiece.model`: pieces with scores and kinds, and after them a message that is none."""

    def number(value: int) -> bytes:
        out = b""
        while value > 127:
            out += bytes([value & 127 | 128])
            value >>= 7
        return out + bytes([value])

    def field(place: int, content: bytes) -> bytes:
        return number(place << 3 | 2) + number(len(content)) + content

    data = b""
    for piece in pieces:
        # text, score (four bytes), kind (a number)
        data += field(1, field(1, piece.encode()) + bytes([2 << 3 | 5, 0, 0, 128, 191]) + bytes([3 << 3, 1]))
    # the trainer's settings, longer than 127 bytes
    path.write_bytes(data + field(2, b"x" * 300))


def save(model: T5EncoderModel | T5ForConditionalGeneration, folder: Path, name: str) -> Path:
    """In the hub's format, with a tokenizer."""
    model.save_pretrained(folder)
    write_json(folder, name)
    return folder
