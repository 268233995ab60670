"""What the memory tests measure: the estimate of one target of a protein."""

from __future__ import annotations

from collections.abc import Callable

import torch

from longlens.io.alphabet import ESM
from longlens.jobs.context_protein import ProteinContext
from longlens.jobs.context_regions import regular_spans
from longlens.models.encoder import EncoderConfig
from longlens.models.language_model import MaskedLM

CONFIG = EncoderConfig(vocabulary=33, layers=3, width=320, heads=4, feed_forward=1280)
SPANS = 64


def model() -> MaskedLM:
    return MaskedLM(CONFIG, ESM, contacts=False).eval().requires_grad_(False)


def estimate(length: int) -> Callable[[], object]:
    torch.set_num_threads(1)
    subject = ProteinContext(model(), "A" * length, budget=1)
    spans = regular_spans(range(1, length + 1), -(-length // SPANS))
    return lambda: subject.estimate([length // 2], spans)


def of_text(tokens: int) -> Callable[[], object]:
    """The estimate of the last token of a text, and its surprise with a stretch hidden."""
    import numpy as np
    import transformers as tf

    from longlens.hf.documents import Document
    from longlens.hf.hiding import TextContext
    from longlens.hf.language_heads import language_head
    from longlens.hf.texts import TextModel

    torch.set_num_threads(1)
    config = tf.GPT2Config(vocab_size=50, n_embd=128, n_layer=2, n_head=2, n_positions=8192)
    causal = tf.GPT2LMHeadModel(config).eval().requires_grad_(False)

    class Tokenizer:
        mask_token_id = None

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return list(map(str, ids))

    ids = np.arange(tokens, dtype=np.int64) % 50
    document = Document("a" * tokens, ids, np.arange(tokens), np.arange(tokens) + 1, (), ())
    subject = TextContext(TextModel(causal, Tokenizer(), "made", None), language_head(causal), document, 1)
    target, spans = tokens - 1, regular_spans(range(tokens - 1), -(-tokens // SPANS))

    def call() -> object:
        subject.begin()
        return subject.estimate([target], spans), subject.surprise([target] * 2, [spans[0], spans[-1]])

    return call
