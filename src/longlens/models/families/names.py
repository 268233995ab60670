"""The names of the tensors of `MaskedLM` in one kind of checkpoint.

A table gives, for each tensor of `MaskedLM`, the tensors of the checkpoint that make it up: one, or three that are
stacked (queries, keys, values). Reading is therefore complete: a tensor that no line names is reported as extra.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from longlens.models.config import EncoderConfig


@dataclass(frozen=True)
class TensorNames:
    """The names of one kind of checkpoint; `{i}` stands for the layer.

    `prefix` begins the encoder's names; checkpoints of the encoder alone leave it out, and their names begin with one
    of `bare`. `rename` gives the name here of a name in the file, or None for what is no tensor of the model.
    `reorder` gives a tensor here of a tensor in the file, and `restore` the one in the file. `frequencies`: rotary
    frequencies, any of these. `tied`: copies of other tensors that must agree, as (copy, original). `ignored`:
    beginnings of names that mean nothing to a masked language model, such as heads that were fine-tuned.
    """

    embedding: str
    norm: str
    # name of a layer's part here -> there; where several are stacked in ours, all of them
    layer: dict[str, str | tuple[str, ...]]
    head: dict[str, str]
    contact: str | None = None
    prefix: str = ""
    position: str | None = None
    position_norm: str | None = None
    relative: str | None = None
    token_type: str | None = None
    frequencies: tuple[str, ...] = ()
    tied: tuple[tuple[str, str], ...] = ()
    ignored: tuple[str, ...] = ()
    bare: tuple[str, ...] = ()
    rename: Callable[[str], str | None] | None = None
    reorder: Callable[[str, Tensor, EncoderConfig], Tensor] | None = None
    restore: Callable[[str, Tensor, EncoderConfig], Tensor] | None = None

    def name(self, written: str) -> str | None:
        """The name here of a tensor of a file, None for one that means nothing."""
        return self.rename(written) if self.rename else written

    def table(
        self, config: EncoderConfig, *, predicts: bool = True, contacts: bool = True
    ) -> dict[str, tuple[str, ...]]:
        """Name in `MaskedLM` -> names in the checkpoint, without the frequencies.

        `predicts`: with the language model's head. `contacts`: with the contact head, in formats that have one.
        """
        table: dict[str, tuple[str, ...]] = {"encoder.embedding.weight": (self.embedding,)}
        if self.position:
            table["encoder.position.weight"] = (self.position,)
        if self.relative:
            table["encoder.relative.weight"] = (self.relative,)
        for kind in ("weight", "bias"):
            table[f"encoder.norm.{kind}"] = (f"{self.norm}.{kind}",)
            if self.position_norm:
                table[f"encoder.position_norm.{kind}"] = (f"{self.position_norm}.{kind}",)
            for i in range(config.layers):
                for ours, theirs in self.layer.items():
                    parts = (theirs,) if isinstance(theirs, str) else theirs
                    table[f"encoder.layers.{i}.{ours}.{kind}"] = tuple(f"{part.format(i=i)}.{kind}" for part in parts)
            if self.contact and contacts:
                table[f"contact_head.regression.{kind}"] = (f"{self.contact}.{kind}",)
        return table | (self.head_table() if predicts else {})

    def head_table(self) -> dict[str, tuple[str, ...]]:
        """The tensors of `table` that belong to the language model's head; `decoder` is a weight, `bias` its bias."""
        table: dict[str, tuple[str, ...]] = {
            f"head.{ours}.{kind}": (f"{self.head[ours]}.{kind}",)
            for kind in ("weight", "bias")
            for ours in ("dense", "norm")
            if ours in self.head
        }
        if "decoder" in self.head:
            table["head.decoder.weight"] = (self.head["decoder"],)
        return table | ({"head.bias": (self.head["bias"],)} if "bias" in self.head else {})

    def frequency_names(self, config: EncoderConfig) -> list[str]:
        """Every name that rotary frequencies may have."""
        return [name.format(i=i) for name in self.frequencies for i in range(config.layers)]
