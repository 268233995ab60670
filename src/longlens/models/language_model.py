"""A masked language model over residues: encoder, heads, alphabet, and the source of its weights."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from copy import copy
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from longlens.errors import InputError
from longlens.io.alphabet import Alphabet, clean_proteins
from longlens.lens.contacts import ContactObserver, Regression, WholeMap
from longlens.models.encoder import Attend, Encoded, Encoder, EncoderConfig, Packed, attend_with, pack
from longlens.models.families.written import WrittenForm
from longlens.models.heads import ContactHead
from longlens.models.parts.head import MaskedLMHead
from longlens.ops.method import Method
from longlens.ops.observe import Observer

# tokens whose logits are held at a time
CHUNK = 4096


class MaskedLM(nn.Module):
    """Residue vectors and predictions of packed proteins.

    model = longlens.load("tiny")
    encoded = model(model.pack(["MKTAYIAK", "GAVLI"]))
    encoded.last                    # (T, d), start and end tokens included
    model.logits(encoded.last)      # (T, V)
    """

    def __init__(
        self, config: EncoderConfig, alphabet: Alphabet, *, contacts: bool = True, predicts: bool = True
    ) -> None:
        super().__init__()
        self.config = config
        self.alphabet = alphabet
        self.encoder = Encoder(config)
        self.head = MaskedLMHead(config.head, config.width, config.vocabulary) if config.head and predicts else None
        self.contact_head = ContactHead(config.layers, config.heads) if contacts else None
        # the source of the weights, which results name
        self.source = "untrained"
        # of the folder that it was read from; None for other files and for models that were not read
        self.written: WrittenForm | None = None

    def pack(self, sequences: str | Iterable[str]) -> Packed:
        """One protein (a string) or several as tokens, on the model's device.

        Sequences are cleaned as the command line cleans them (`longlens.io.alphabet.clean_protein`): upper case,
        without blanks, gaps and trailing stops, J and inner stops as X. Gaps and changed residues cause a warning. A
        model of complexes (ESM-C) takes chains with `|` or `:` between them: none attends to another, and positions run
        on.

        Raises:
            SequenceError: no protein, an empty one, or a character that is not a residue; gives sequence and position.
        """
        cleaned = clean_proteins(sequences, chains=self.alphabet.chain_break is not None)
        return self.pack_tokens([self.alphabet.encode(sequence) for sequence in cleaned])

    def pack_tokens(
        self, sequences: Sequence[NDArray[np.int64]], unmasked: Sequence[NDArray[np.int64]] | None = None
    ) -> Packed:
        """Token numbers of sequences, end to end, on the model's device. `unmasked`: what they were before tokens were
        hidden, where some were.

        Where any has several chains, the boundaries of chains are told: chains stand apart by `CHAIN_BREAK`, which
        belongs to the chain before it, also where it is hidden.
        """
        packed = pack(sequences)
        seen = packed.tokens if unmasked is None else pack(unmasked).tokens
        if self.alphabet.chain_break is None or self.alphabet.chain_break not in seen:
            return packed.to(self.device)
        breaks = seen.eq(self.alphabet.chain_break).nonzero().squeeze(1) + 1
        with torch.inference_mode(False):
            bounds = torch.cat([packed.cu_seqlens, breaks.int()]).sort().values
        return packed._replace(chains=bounds).to(self.device)

    def with_alphabet(self, alphabet: Alphabet) -> MaskedLM:
        """This model, with the same parameters in memory, reading sequences by another alphabet of the same tokens."""
        other = copy(self)
        other.alphabet = alphabet
        return other

    def forward(
        self,
        packed: Packed,
        *,
        attend: Attend | None = None,
        keep: Collection[int] = (),
        observers: Sequence[Observer] = (),
    ) -> Encoded:
        """`Encoder.forward`: hidden vectors (T, d) of the last layer, and of those in `keep`."""
        return self.encoder(packed, attend=attend, keep=keep, observers=observers)

    def attentions(self) -> Sequence[str]:
        """Names of the layers, as observers receive them."""
        return self.encoder.attentions()

    def observed(self, observer: Observer, method: Method | str | None = None) -> AbstractContextManager[None]:
        """`Encoder.observed`."""
        return self.encoder.observed(observer, method)

    def logits(self, hidden: Tensor) -> Tensor:
        """(T, d) of the last layer -> (T, V). Raises `InputError` if the model has no head (`require_head`)."""
        return self.require_head()(hidden, self.encoder.embedding.weight)

    @property
    def predicts(self) -> bool:
        """Whether the model has a language model's head: logits, surprise and variant scores need it."""
        return self.head is not None

    def require_head(self) -> MaskedLMHead:
        """The language model's head. Raises `InputError` if there is none."""
        if self.head is None and self.config.head is None:
            raise InputError(
                f"expected a model with a language model's head, got {self.source}, an encoder whose training had a "
                "decoder (T5): it gives vectors and attention, but no logits, surprise or scores; use a masked "
                "language model, such as ESM-2"
            )
        if self.head is None:
            raise InputError(
                f"expected a model with a language model's head, got {self.source}, which gives vectors and attention "
                "but no logits, surprise or scores; use the model that it was fine-tuned from, or one saved as "
                "...ForMaskedLM"
            )
        return self.head

    def log_probabilities(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Log-softmax of the logits, float32, a chunk of tokens at a time: (rows, (rows, V)), never (T, V)."""
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, min(start + CHUNK, len(hidden)))
            yield rows, torch.log_softmax(self.logits(hidden[rows]).float(), -1)

    @torch.no_grad()
    def predict_contacts(self, proteins: Packed | str | Iterable[str]) -> list[Tensor]:
        """Probability of contact of each pair of residues, (L, L) float32 for each protein, by ESM-2's contact head.

        `proteins` are packed, or what `pack` takes: a string is one protein. Holds 4 L^2 bytes for each protein, not
        layers x heads times that; `longlens contacts` needs even less. Values at |i - j| < 6 are given too, but the
        head was not fitted to them.

        Raises:
            InputError: the model has no contact head.
            SequenceError: sequences that `pack` refuses.
        """
        packed = proteins if isinstance(proteins, Packed) else self.pack(proteins)
        regression = self.contact_regression()
        if packed.chains is not None:
            raise InputError("expected single chains: no attention passes between the chains of a complex")
        bounds = packed.cu_seqlens.tolist()
        around = self.alphabet.around
        maps = [WholeMap(stop - start - around, regression, self.device) for start, stop in pairwise(bounds)]
        self(packed, attend=attend_with("exact"), observers=[ContactObserver(maps, before=self.alphabet.before)])
        return [contact_map.finish() for contact_map in maps]

    def contact_regression(self) -> Regression:
        """The contact head's weights. Raises `InputError` if there is none."""
        if self.contact_head is None:
            raise InputError(
                f"{self.source} has no contact head: fair-esm keeps it in a file of its own, "
                "NAME-contact-regression.pt, to be laid beside the weights; for a model that never had one, "
                "`longlens contacts fit` fits one"
            )
        return self.contact_head.weights()

    def initialise(self) -> None:
        """Initial weights for training: normal, deviation 0.02, smaller by sqrt(2 L) at a block's end (GPT-2, 2.3)."""
        deep = (2 * self.config.layers) ** -0.5
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                last = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 * (deep if last else 1.0))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    @property
    def device(self) -> torch.device:
        return self.encoder.embedding.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.embedding.weight.dtype
