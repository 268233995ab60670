"""The names of the tensors of `MaskedLM` in each kind of checkpoint: transformers' ESM and BERT, and fair-esm.

A table gives, for each tensor of `MaskedLM`, the tensors of the checkpoint that make it up: one, or three that are
stacked (queries, keys, values). Reading is therefore complete: a tensor that no line names is reported as extra.
"""

from __future__ import annotations

from dataclasses import dataclass

from longlens.models.encoder import EncoderConfig


@dataclass(frozen=True)
class TensorNames:
    """The names of one kind of checkpoint; `{i}` stands for the layer.

    `prefix` begins the encoder's names; checkpoints of the encoder alone leave it out. `frequencies`: rotary
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


_HF_LAYER = "encoder.layer.{i}."

TRANSFORMERS_ESM = TensorNames(
    embedding="esm.embeddings.word_embeddings.weight",
    norm="esm.encoder.emb_layer_norm_after",
    layer={
        "qkv": tuple(f"esm.{_HF_LAYER}attention.self.{part}" for part in ("query", "key", "value")),
        "attention_norm": f"esm.{_HF_LAYER}attention.LayerNorm",
        "out": f"esm.{_HF_LAYER}attention.output.dense",
        "feed_norm": f"esm.{_HF_LAYER}LayerNorm",
        "up": f"esm.{_HF_LAYER}intermediate.dense",
        "down": f"esm.{_HF_LAYER}output.dense",
    },
    head={"dense": "lm_head.dense", "norm": "lm_head.layer_norm", "bias": "lm_head.bias"},
    contact="esm.contact_head.regression",
    prefix="esm.",
    # transformers 4; transformers 5 in memory; 5 on disk, where the name has a literal star (as of 5.23)
    frequencies=(
        f"esm.{_HF_LAYER}attention.self.rotary_embeddings.inv_freq",
        "esm.rotary_embeddings.inv_freq",
        "esm.encoder.layer.*.attention.self.rotary_embeddings.inv_freq",
    ),
    tied=(
        ("lm_head.decoder.weight", "esm.embeddings.word_embeddings.weight"),
        ("lm_head.decoder.bias", "lm_head.bias"),
    ),
    # rotary checkpoints have unused learned positions too; classifiers of sequences and of residues
    ignored=("esm.embeddings.position_ids", "esm.embeddings.position_embeddings.", "esm.pooler.", "classifier."),
)

TRANSFORMERS_BERT = TensorNames(
    embedding="bert.embeddings.word_embeddings.weight",
    norm="bert.embeddings.LayerNorm",
    layer={
        "qkv": tuple(f"bert.{_HF_LAYER}attention.self.{part}" for part in ("query", "key", "value")),
        "attention_norm": f"bert.{_HF_LAYER}attention.output.LayerNorm",
        "out": f"bert.{_HF_LAYER}attention.output.dense",
        "feed_norm": f"bert.{_HF_LAYER}output.LayerNorm",
        "up": f"bert.{_HF_LAYER}intermediate.dense",
        "down": f"bert.{_HF_LAYER}output.dense",
    },
    head={
        "dense": "cls.predictions.transform.dense",
        "norm": "cls.predictions.transform.LayerNorm",
        "bias": "cls.predictions.bias",
    },
    prefix="bert.",
    position="bert.embeddings.position_embeddings.weight",
    token_type="bert.embeddings.token_type_embeddings.weight",
    tied=(
        ("cls.predictions.decoder.weight", "bert.embeddings.word_embeddings.weight"),
        ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ),
    # next-sentence and AntiBERTy's classification heads; classifiers of sequences and of residues
    ignored=(
        "bert.embeddings.position_ids", "bert.pooler.", "classifier.",
        "cls.seq_relationship.", "cls.species.", "cls.chain.", "cls.graft.",
    ),
)  # fmt: skip

FAIR_ESM = TensorNames(
    embedding="embed_tokens.weight",
    norm="emb_layer_norm_after",
    layer={
        "qkv": tuple(f"layers.{{i}}.self_attn.{part}_proj" for part in "qkv"),
        "attention_norm": "layers.{i}.self_attn_layer_norm",
        "out": "layers.{i}.self_attn.out_proj",
        "feed_norm": "layers.{i}.final_layer_norm",
        "up": "layers.{i}.fc1",
        "down": "layers.{i}.fc2",
    },
    head={"dense": "lm_head.dense", "norm": "lm_head.layer_norm", "bias": "lm_head.bias"},
    contact="contact_head.regression",
    frequencies=("layers.{i}.self_attn.rot_emb.inv_freq",),
    tied=(("lm_head.weight", "embed_tokens.weight"),),
)
