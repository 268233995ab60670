"""A forward and backward pass of BERT, as the memory meter runs it in a process of its own."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import BertConfig, BertModel

from longlens.hf import attach


def bert_pass(length: int, padded: int, attached: bool) -> Callable[[], None]:
    """One layer of one head of width 64 on `length` tokens, of which `padded` are none."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    config = BertConfig(
        vocab_size=30, hidden_size=64, num_hidden_layers=1, num_attention_heads=1, intermediate_size=64,
        max_position_embeddings=length, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model = BertModel(config, add_pooling_layer=False)
    ids = torch.randint(0, 30, (1, length))
    mask = torch.ones(1, length, dtype=torch.long)
    mask[:, length - padded :] = 0
    if attached:
        attach(model)

    def call() -> None:
        model(input_ids=ids, attention_mask=mask).last_hidden_state.sum().backward()
        model.zero_grad()

    return call
