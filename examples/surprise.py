"""Train a small decoder on the help texts of Python, and draw how surprised it is by one that it has not seen.

    python examples/surprise.py FOLDER [--steps 400]

It needs no download: the texts are in every Python, the tokenizer is trained too. FOLDER receives the model in
transformers' format, the held-out text, and tables and figures of surprise by word and by token. Some minutes on a CPU.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

import longlens
from longlens.hf import attach

END = "<|end|>"
LENGTH = 256
BATCH = 16
# the topic that is left out of the training, and the part of it that is drawn
HELD_OUT, SHOWN = "try", 400


def help_texts() -> dict[str, str]:
    """Python's help texts by topic."""
    from pydoc_data.topics import topics

    return dict(topics)


def repeated(text: str, other: str) -> float:
    """The share of a text's long lines that another one has too."""
    lines = [line.strip() for line in text.splitlines() if len(line.strip()) > 40]
    return sum(line in other for line in lines) / max(len(lines), 1)


def train_tokenizer(texts: list[str]) -> tf.PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of 1,024 tokens with leading blanks, as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(texts, BpeTrainer(vocab_size=1024, special_tokens=[END], initial_alphabet=alphabet))
    return tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END)


def train_model(tokenizer: tf.PreTrainedTokenizerFast, texts: list[str], steps: int) -> tf.PreTrainedModel:
    """A Llama of 4 layers of width 128, on longlens' attention."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_hidden_layers=4, num_attention_heads=4, intermediate_size=384,
        max_position_embeddings=4096, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(config)
    ids = torch.tensor([number for text in texts for number in (tokenizer.bos_token_id, *tokenizer(text)["input_ids"])])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps)
    with attach(model):
        for step in range(steps):
            starts = torch.randint(0, len(ids) - LENGTH, (BATCH,)).tolist()
            batch = torch.stack([ids[start : start + LENGTH] for start in starts])
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if step % 50 == 0 or step == steps - 1:
                print(f"step {step + 1} of {steps}: {loss.item():.2f} nats a token", flush=True)
    return model.eval()


def main() -> None:
    """Train, and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    chosen = parser.parse_args()
    folder: Path = chosen.folder
    texts = help_texts()
    held_out = texts.pop(HELD_OUT)
    # other topics repeat whole sections, under other headings
    known = [text for text in texts.values() if repeated(held_out, text) < 0.1]
    random.Random(0).shuffle(known)
    tokenizer = train_tokenizer(known)
    model = train_model(tokenizer, known, chosen.steps)
    name = folder / "python-help"
    model.save_pretrained(name)
    tokenizer.save_pretrained(name)
    (folder / "held-out.txt").write_text(held_out)
    (folder / "beginning.txt").write_text(held_out[:SHOWN].rsplit(" ", 1)[0])
    windows = {"context": LENGTH, "stride": LENGTH // 2}
    for text, output, options in (
        ("held-out.txt", "whole.csv", {}),
        ("held-out.txt", "windows.csv", windows),
        ("beginning.txt", "words.csv", {"by": "word"}),
    ):
        found = longlens.surprise(folder / text, model=name, output=folder / output, figure=True, **options)
        print(f"{output}: {found}")


if __name__ == "__main__":
    main()
