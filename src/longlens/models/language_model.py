"""A masked language model over residues: encoder, head, alphabet, and what it was loaded from."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor, nn

from longlens.io.alphabet import Alphabet
from longlens.models.encoder import Attend, Encoded, Encoder, EncoderConfig, Packed, pack
from longlens.models.heads import ContactHead, MaskedLMHead

# tokens whose logits are held at a time
CHUNK = 4096


class MaskedLM(nn.Module):
    """Residue vectors and predictions of packed proteins.

    model = longlens.load("tiny")
    encoded = model(model.pack(["MKTAYIAK", "GAVLI"]))
    encoded.last                    # (T, d), start and end tokens included
    model.logits(encoded.last)      # (T, V)
    """

    def __init__(self, config: EncoderConfig, alphabet: Alphabet, *, contacts: bool = True) -> None:
        super().__init__()
        self.config = config
        self.alphabet = alphabet
        self.encoder = Encoder(config)
        self.head = MaskedLMHead(config.width, config.vocabulary, config.norm_eps)
        self.contact_head = ContactHead(config.layers, config.heads) if contacts else None
        # where the weights came from, as results say it
        self.source = "untrained"

    def pack(self, sequences: Sequence[str]) -> Packed:
        """Cleaned sequences (`longlens.io.alphabet.clean_protein`) as tokens, on the model's device."""
        return pack(self.alphabet.encode(sequence) for sequence in sequences).to(self.device)

    def forward(self, packed: Packed, *, attend: Attend | None = None, keep: Collection[int] = ()) -> Encoded:
        """`Encoder.forward`: hidden vectors (T, d) of the last layer, and of those in `keep`."""
        return self.encoder(packed, attend=attend, keep=keep)

    def logits(self, hidden: Tensor) -> Tensor:
        """(T, d) of the last layer -> (T, V)."""
        return self.head(hidden, self.encoder.embedding.weight)

    def log_probabilities(self, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Log-softmax of the logits, float32, a chunk of tokens at a time: (rows, (rows, V)), never (T, V)."""
        for start in range(0, len(hidden), CHUNK):
            rows = slice(start, min(start + CHUNK, len(hidden)))
            yield rows, torch.log_softmax(self.logits(hidden[rows]).float(), -1)

    @property
    def device(self) -> torch.device:
        return self.head.bias.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.bias.dtype
