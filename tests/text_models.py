"""Transformers folders of small language models with tokenizers, of random weights."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer, WordPieceTrainer

TEXT = (
    "The quick brown fox jumps over the lazy dog.\nThen it sleeps, and the dog watches it.\n\nNa\u00efve caf\u00e9s: "
    "\u4f60\u597d, the fox said; the dog said nothing.\n"
)


@cache
def byte_level(*, bos: bool = True, trained_on: str = TEXT, size: int = 320) -> tf.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer as GPT-2 has, of leading blanks; `bos`: with a start token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = BpeTrainer(
        vocab_size=size, special_tokens=["<|end|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator([trained_on], trainer)
    special = {"bos_token": "<|end|>"} if bos else {}
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", **special)


# training is not the same each time
@cache
def word_piece() -> tf.PreTrainedTokenizerFast:
    """A WordPiece tokenizer as BERT has."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator([TEXT], WordPieceTrainer(vocab_size=120, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, tokenizer.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def save(model: tf.PreTrainedModel, tokenizer: tf.PreTrainedTokenizerFast, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def gpt2_folder(folder: Path, *, positions: int = 512, bos: bool = True, seed: int = 0) -> Path:
    tokenizer = byte_level(bos=bos)
    torch.manual_seed(seed)
    config = tf.GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=4, n_positions=positions, initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return save(tf.GPT2LMHeadModel(config), tokenizer, folder)


def llama_folder(folder: Path, *, seed: int = 0, **more) -> Path:
    tokenizer = byte_level()
    torch.manual_seed(seed)
    config = tf.LlamaConfig(**{
        "vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 48, "initializer_range": 0.3, "max_position_embeddings": 512,
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, **more,
    })  # fmt: skip
    return save(tf.LlamaForCausalLM(config), tokenizer, folder)


def bert_folder(folder: Path, *, headless: bool = False, seed: int = 0) -> Path:
    tokenizer = word_piece()
    torch.manual_seed(seed)
    config = tf.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
        initializer_range=0.3, max_position_embeddings=128, pad_token_id=0,
    )  # fmt: skip
    return save((tf.BertModel if headless else tf.BertForMaskedLM)(config), tokenizer, folder)
