"""One way to compute the surprise of every token, in a process of its own: the contenders of `surprise.py`.

    python surprise_worker.py CONTENDER SHAPE THREADS GIB

reads {"length": N, "out": FILE} a line, runs the model over N tokens, writes the surprise of tokens 1..N-1 to FILE and
answers with seconds and memory. GIB limits the memory of the process; beyond that the answer is {"not_run": reason}.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers as tf

import harness
from longlens.hf import attach
from longlens.hf.documents import Document, windows
from longlens.hf.language_heads import language_head
from longlens.hf.surprise import MLP_CHUNK, read_windows

LONGEST = 131_072
# "dry" is for tests: layers, width, heads, vocabulary, positions
SHAPES = {"gpt2": (12, 768, 12, 50_257, 131_072), "dry": (2, 32, 2, 300, 1024)}


def build(shape: str) -> Any:
    """A GPT-2 of random weights, the same each time; wider than GPT-2's 0.02, so that attention is not uniform."""
    layers, width, heads, vocabulary, positions = SHAPES[shape]
    torch.manual_seed(0)
    config = tf.GPT2Config(
        vocab_size=vocabulary, n_embd=width, n_layer=layers, n_head=heads, n_positions=positions, bos_token_id=None,
        eos_token_id=None, pad_token_id=None, initializer_range=0.05,
    )  # fmt: skip
    return tf.GPT2LMHeadModel(config).eval().requires_grad_(False)


def tokens(length: int, vocabulary: int) -> torch.Tensor:
    """(N,) token numbers with the frequencies of words (Zipf): a shorter text is the beginning of a longer one."""
    generator = torch.Generator().manual_seed(1)
    weights = 1 / torch.arange(1, vocabulary + 1, dtype=torch.float64)
    return torch.multinomial(weights, LONGEST, replacement=True, generator=generator)[:length]


def ours(model: Any, ids: torch.Tensor) -> np.ndarray:
    """longlens: exact attention, feed-forward parts and head in chunks."""
    head = language_head(model)
    count = len(ids)
    places = np.arange(count)
    document = Document("", ids.numpy(), places, places, (), ())
    with attach(model, mlp_chunk=MLP_CHUNK):
        found = read_windows(head, document, windows(count, count, count, causal=True))
    return found.surprise[1:]


def theirs(model: Any, ids: torch.Tensor) -> np.ndarray:
    """transformers as its documentation evaluates: the logits of all tokens, then their cross entropy."""
    with torch.no_grad():
        logits = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0, :-1]
        return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none").numpy()


def contender(name: str, shape: str) -> Callable[[int], np.ndarray]:
    """A function of the number of tokens."""
    model = build(shape)
    vocabulary = SHAPES[shape][3]
    if name == "longlens":
        return lambda length: ours(model, tokens(length, vocabulary))
    model.set_attn_implementation(name.rpartition(" ")[2])
    return lambda length: theirs(model, tokens(length, vocabulary))


def main() -> None:
    name, shape, threads, gib = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    torch.set_num_threads(threads)
    compute = contender(name, shape)
    most = int(gib * harness.GIB)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    compute(min(256, SHAPES[shape][4]))
    now = harness.clock()
    for line in sys.stdin:
        asked = json.loads(line)
        before = harness.reset_peak()
        begun = now()
        try:
            surprise = compute(asked["length"])
        except (RuntimeError, MemoryError) as error:
            reason = "out of memory" if "alloc" in str(error) or isinstance(error, MemoryError) else str(error)
            print(json.dumps({"not_run": f"{reason[:120]} ({gib:g} GiB allowed)"}), flush=True)
            continue
        seconds = now() - begun
        np.save(asked["out"], surprise)
        peak = harness.peak_bytes()
        print(json.dumps({
            "seconds": seconds, "peak_mib": peak / harness.MIB, "growth_mib": (peak - before) / harness.MIB,
            "mean": float(np.mean(surprise)),
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
