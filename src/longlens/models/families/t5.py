"""T5's encoder (Raffel et al. 2020, arXiv:1910.10683) over residues: ProtT5 and ProstT5; Ankh, with gated blocks.

RMSNorm before each block and at the end, no biases, scores without a factor, and a learned bias of distances that all
layers share. Heads together may be wider than the residual stream. One residue is one token; no token stands at the
start, save the one that tells ProstT5 and Ankh 3 their task, and `</s>` stands at the end. The decoder of a checkpoint,
and its head, are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from longlens.errors import CheckpointError
from longlens.io.alphabet import RARE, STANDARD, Alphabet
from longlens.models.config import EncoderConfig
from longlens.models.families.entries import ConfigEntries
from longlens.models.families.family import Family, Known
from longlens.models.families.names import TensorNames
from longlens.models.families.pieces import FILES, read_pieces
from longlens.models.parts.feed_forward import FeedForward
from longlens.models.parts.norm import Norm
from longlens.models.parts.positions import RelativePositions
from longlens.models.parts.projections import Projections

# feed_forward_proj of a configuration -> function, gated; T5's "gated-gelu" is the approximation by tanh
_FEED = {
    "relu": ("relu", False), "gelu": ("gelu", False), "gated-relu": ("relu", True), "gated-gelu": ("gelu_tanh", True),
    "gated-silu": ("silu", True),
}  # fmt: skip
# vocabularies of proteins have 128 to 256 tokens, those of texts tens of thousands
MOST_TOKENS = 1024
# ProtT5's pieces 0..27; the last 100 of its 128 tokens are sentinels
PROT_T5 = ("<pad>", "</s>", "<unk>", *(f"▁{letter}" for letter in "ALGVSREDTIPKFQNYMHWCXBOUZ"))
PROT_T5_TOKENS = 128
# the tokens that tell a model its task, which its authors put before residues whose vectors are wanted
PREFIXES = ("<AA2fold>", "[NLU]")
# the vocabularies that have such a token
PREFIXED = {150: "<AA2fold>", 256: "[NLU]"}
FLOAT16 = (
    "T5 was trained in bfloat16, and its activations exceed what float16 holds; use --dtype bfloat16 or float32, which "
    "a checkpoint in float16 is read into as well"
)


def _names(embedding: str, up: str | tuple[str, ...]) -> TensorNames:
    attention, block = "encoder.block.{i}.layer.0", "encoder.block.{i}.layer.1"
    return TensorNames(
        embedding=embedding,
        norm="encoder.final_layer_norm",
        layer={
            "attention_norm": f"{attention}.layer_norm",
            "qkv": tuple(f"{attention}.SelfAttention.{part}" for part in "qkv"),
            "out": f"{attention}.SelfAttention.o",
            "feed_norm": f"{block}.layer_norm",
            "up": f"{block}.DenseReluDense.{up}" if isinstance(up, str)
            else tuple(f"{block}.DenseReluDense.{part}" for part in up),
            "down": f"{block}.DenseReluDense.wo",
        },
        head={},
        relative="encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        tied=(("encoder.embed_tokens.weight", "shared.weight"),) if embedding == "shared.weight" else (),
        ignored=("decoder.", "lm_head.", "classification_head.", "classifier."),
    )  # fmt: skip


def _layouts(up: str | tuple[str, ...]) -> tuple[TensorNames, ...]:
    return _names("shared.weight", up), _names("encoder.embed_tokens.weight", up)


def _config(settings: ConfigEntries) -> EncoderConfig:
    entries = settings.entries
    form = entries.get("feed_forward_proj", "relu")
    vocabulary, heads = settings.size("vocab_size"), settings.size("num_heads")
    settings.refuse("a T5 of proteins", {
        "vocab_size": (vocabulary > MOST_TOKENS, "a T5 of texts"),
        "feed_forward_proj": (not isinstance(form, str) or form not in _FEED, "a T5 with another activation"),
    })  # fmt: skip
    function, gated = _FEED[form]
    reach = settings.size("relative_attention_max_distance") if "relative_attention_max_distance" in entries else 128
    buckets = settings.size("relative_attention_num_buckets")
    if buckets % 4 or reach <= buckets // 4:
        raise CheckpointError(
            f"{settings.where}: expected a multiple of 4 buckets, a quarter of which is below the largest distance, "
            f"got {buckets} and {reach}"
        )
    return EncoderConfig(
        vocabulary, settings.size("num_layers"), settings.size("d_model"), heads, settings.size("d_ff"),
        norm=Norm("rms", settings.epsilon("layer_norm_epsilon", 1e-6)),
        projections=Projections(bias=False, head_width=settings.size("d_kv"), scale=1.0),
        feed=FeedForward(function, gated, bias=False), positions=RelativePositions(buckets, reach),
        token_dropout=False, head=None,
    )  # fmt: skip


def t5_alphabet(folder: Path, config: EncoderConfig, replaced: str = "") -> Alphabet:
    """The tokens of a folder's tokenizer; `replaced` residues are read as X.

    Without files of a tokenizer the fixed table of ProtT5 serves a vocabulary of its size. Raises `CheckpointError` for
    any other, and where a token is missing.
    """
    size = config.vocabulary
    pieces = read_pieces(folder)
    if not pieces:
        if size != PROT_T5_TOKENS:
            raise CheckpointError(
                f"expected {folder} to hold a tokenizer's {' or '.join(FILES[:2])}, which number the {size} tokens of "
                "this model, found neither"
            )
        pieces = {piece: number for number, piece in enumerate(PROT_T5)}
    prefix = next((token for token in PREFIXES if token in pieces), None)
    # sentencepiece marks the beginning of a word, which each residue is
    letters = {
        letter: pieces[piece] for letter in STANDARD + RARE
        if letter not in replaced and (piece := f"▁{letter}" if f"▁{letter}" in pieces else letter) in pieces
    }  # fmt: skip
    needed = ["<pad>", "</s>", "<unk>", *([PREFIXED[size]] if size in PREFIXED else [])]
    missing = [token for token in needed if token not in pieces] + [c for c in STANDARD if c not in letters]
    if missing:
        raise CheckpointError(f"{folder}: expected the tokenizer to have {', '.join(missing)}, found none")
    names = [f"<unused_{number}>" for number in range(size)]
    used = {piece: number for piece, number in pieces.items() if piece not in letters} | letters
    for piece, number in used.items():
        if not 0 <= number < size:
            raise CheckpointError(f"{folder}: expected tokens below the vocabulary of {size}, got {number} for {piece}")
    for piece, number in pieces.items():
        # a residue that is read as X keeps its piece, under a name that no residue has
        names[number] = f"▁{piece}" if piece in replaced else piece
    for letter, number in letters.items():
        names[number] = letter
    return Alphabet(
        tuple(names), start=None if prefix is None else pieces[prefix], end=pieces["</s>"], mask=None,
        unknown=letters.get("X", pieces["<unk>"]), pad=pieces["<pad>"],
    )  # fmt: skip


def _gated(entries: Mapping[str, Any]) -> bool:
    return str(entries.get("feed_forward_proj", "relu")).startswith("gated")


PROTT5 = Family(
    "ProtT5", lambda entries: entries.get("model_type") == "t5" and not _gated(entries), _config, _layouts("wi"),
    # as its authors do
    lambda folder, config: t5_alphabet(folder, config, replaced="UZOB"),
    known=(
        Known("Rostlab/prot_t5_xl_half_uniref50-enc", 24, 1024, 32, "1.2 B", licence="AFL-3.0"),
        Known("Rostlab/prot_t5_xl_uniref50", 24, 1024, 32, "1.2 B", licence="AFL-3.0"),
        Known("Rostlab/ProstT5", 24, 1024, 32, "1.2 B", licence="see its page",
              note="<AA2fold> stands before the residues"),
    ),
    predicts=False,
)  # fmt: skip

ANKH = Family(
    "Ankh", lambda entries: entries.get("model_type") == "t5" and _gated(entries), _config, _layouts(("wi_0", "wi_1")),
    t5_alphabet,
    known=(
        Known("ElnaggarLab/ankh-base", 48, 768, 12, "453 M", licence="CC BY-NC-SA 4.0"),
        Known("ElnaggarLab/ankh-large", 48, 1536, 16, "1.2 B", licence="CC BY-NC-SA 4.0"),
        Known("ElnaggarLab/ankh3-large", 48, 1536, 16, "1.2 B", licence="CC BY-NC-SA 4.0",
              note="[NLU] stands before the residues"),
    ),
    predicts=False,
    notice="Ankh's published weights may be used for non-commercial purposes only (CC BY-NC-SA 4.0)",
)  # fmt: skip
