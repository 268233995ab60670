"""BERT (Devlin et al. 2019, arXiv:1810.04805) over residues: ProtBert, AntiBERTy and models like them."""

from __future__ import annotations

from pathlib import Path

from longlens.errors import CheckpointError
from longlens.io.alphabet import Alphabet
from longlens.models.config import EncoderConfig
from longlens.models.families.entries import ConfigEntries, sizes_of
from longlens.models.families.family import HF_LAYER, HF_PARTS, Family, Known, modern_name, read_vocabulary
from longlens.models.families.names import TensorNames
from longlens.models.parts.positions import LearnedPositions

TRANSFORMERS_BERT = TensorNames(
    embedding="bert.embeddings.word_embeddings.weight",
    norm="bert.embeddings.LayerNorm",
    layer={
        "qkv": tuple(f"bert.{HF_LAYER}attention.self.{part}" for part in ("query", "key", "value")),
        "attention_norm": f"bert.{HF_LAYER}attention.output.LayerNorm",
        "out": f"bert.{HF_LAYER}attention.output.dense",
        "feed_norm": f"bert.{HF_LAYER}output.LayerNorm",
        "up": f"bert.{HF_LAYER}intermediate.dense",
        "down": f"bert.{HF_LAYER}output.dense",
    },
    head={
        "dense": "cls.predictions.transform.dense",
        "norm": "cls.predictions.transform.LayerNorm",
        "bias": "cls.predictions.bias",
    },
    prefix="bert.",
    bare=HF_PARTS,
    rename=modern_name,
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


def _config(settings: ConfigEntries) -> EncoderConfig:
    entries = settings.entries
    positions = entries.get("position_embedding_type", "absolute")
    settings.refuse("BERT's encoder with gelu", {
        "is_decoder": (bool(entries.get("is_decoder")), "a decoder"),
        "position_embedding_type": (positions != "absolute", "a BERT with other positions"),
        "hidden_act": (entries.get("hidden_act", "gelu") != "gelu", "a BERT with another activation"),
    })  # fmt: skip
    return EncoderConfig(
        **sizes_of(settings), pre_norm=False, positions=LearnedPositions(settings.size("max_position_embeddings")),
        token_dropout=False,
    )  # fmt: skip


def bert_alphabet(vocabulary: Path) -> Alphabet:
    """The tokens of a vocab.txt. Raises `CheckpointError` if special tokens are missing."""
    tokens = read_vocabulary(vocabulary)
    place = {token: number for number, token in enumerate(tokens)}
    special = ("[CLS]", "[SEP]", "[MASK]", "[UNK]", "[PAD]")
    missing = [token for token in special if token not in place]
    if missing:
        raise CheckpointError(f"{vocabulary}: expected the tokens {', '.join(special)}, got none of {missing}")
    start, end, mask, unknown, pad = (place[token] for token in special)
    return Alphabet(tokens, start=start, end=end, mask=mask, unknown=unknown, pad=pad)


BERT = Family(
    "BERT", lambda entries: entries.get("model_type") == "bert", _config, (TRANSFORMERS_BERT,),
    lambda folder, config: bert_alphabet(folder / "vocab.txt"),
    known=(
        Known("Rostlab/prot_bert", 30, 1024, 16, "420 M", licence="AFL-3.0", limit=39_998),
        Known("Rostlab/prot_bert_bfd", 30, 1024, 16, "420 M", licence="AFL-3.0", limit=39_998),
        Known("antiberty", 8, 512, 8, "26 M", licence="MIT", limit=510, note="pip install antiberty==0.1.3 --no-deps"),
    ),
)  # fmt: skip
