"""The shape of an encoder: sizes, and the parts that it is made of."""

from __future__ import annotations

from dataclasses import dataclass, field

from longlens.errors import InputError
from longlens.models.parts.feed_forward import FeedForward
from longlens.models.parts.head import Head
from longlens.models.parts.norm import Norm
from longlens.models.parts.positions import LearnedPositions, Positions, RotaryPositions
from longlens.models.parts.projections import Projections


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes and parts of an encoder; those of ESM-2 where nothing else is given.

    `feed_forward`: width of the feed-forward block, and `feed` its form. `pre_norm`: `norm` stands before each block,
    and `last_norm` (`norm` where None) after the last; otherwise `norm` stands after each block and after the embedding
    (BERT). `residual_divisor`: what a block adds is divided by it. `token_dropout`: ESM-2's rescaling by the share of
    masked tokens, `mask_token`. `head`: that of the language model; None where the family has none.
    """

    vocabulary: int
    layers: int
    width: int
    heads: int
    feed_forward: int
    norm: Norm = field(default_factory=Norm)
    last_norm: Norm | None = None
    pre_norm: bool = True
    projections: Projections = field(default_factory=Projections)
    feed: FeedForward = field(default_factory=FeedForward)
    positions: Positions | None = field(default_factory=RotaryPositions)
    residual_divisor: float = 1.0
    token_dropout: bool = True
    mask_token: int = 32
    head: Head | None = field(default_factory=Head)

    def __post_init__(self) -> None:
        if self.projections.head_width is None and self.width % self.heads:
            raise InputError(f"expected the width to be a multiple of the heads, got {self.width} and {self.heads}")
        if self.rotary and self.head_width % 2:
            raise InputError(f"expected an even width of each head for rotary positions, got {self.head_width}")

    @property
    def head_width(self) -> int:
        """The width of one head."""
        return self.projections.head_width or self.width // self.heads

    @property
    def inner(self) -> int:
        """The width of all heads together, which need not be that of the residual stream (T5)."""
        return self.heads * self.head_width

    @property
    def scale(self) -> float:
        """The factor of the scores."""
        scale = self.projections.scale
        return self.head_width**-0.5 if scale is None else scale

    @property
    def rotary(self) -> bool:
        return isinstance(self.positions, RotaryPositions)

    @property
    def max_length(self) -> int | None:
        """The most tokens of a sequence; None where there is no limit."""
        return self.positions.limit if isinstance(self.positions, LearnedPositions) else None
