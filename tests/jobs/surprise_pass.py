"""Surprise of a long text, as the memory meter runs it in a process of its own."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import transformers as tf

from longlens.hf import attach
from longlens.hf.documents import Document, windows
from longlens.hf.language_heads import language_head
from longlens.hf.surprise import read_windows


def surprise_pass(length: int) -> Callable[[], None]:
    """A GPT-2 of two layers of width 32 and 4,096 words over `length` tokens."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = tf.GPT2Config(vocab_size=4096, n_embd=32, n_layer=2, n_head=1, n_positions=length, bos_token_id=None,
                           eos_token_id=None)  # fmt: skip
    model = tf.GPT2LMHeadModel(config).eval()
    head = language_head(model)
    places = np.arange(length)
    document = Document("", np.arange(length) % 4096, places, places, (), ())

    def call() -> None:
        with attach(model, mlp_chunk=1024):
            read_windows(head, document, windows(length, length, length, causal=True))

    return call
