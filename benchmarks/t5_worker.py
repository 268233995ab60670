"""One way to run a T5 encoder, in a process of its own: the contenders of `t5.py`.

    python t5_worker.py CONTENDER SHAPE THREADS GIB

reads {"length": N, "out": FILE} a line, encodes one protein of N tokens, writes the vectors (N, d) to FILE and answers
with seconds and memory. GIB limits the memory of the process; beyond that the answer is {"not_run": reason}.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as tf

import harness
from longlens.models.encoder import Packed
from longlens.models.pretrained import load

# layers, width, heads, width of a head, feed-forward width; "dry" is for tests
SHAPES = {"ProtT5, 4 of its 24 layers": (4, 1024, 32, 128, 16_384), "dry": (2, 32, 4, 16, 64)}
VOCABULARY = 128


def build(shape: str) -> Any:
    """transformers' encoder of this shape, of random weights, the same each time."""
    layers, width, heads, head, wide = SHAPES[shape]
    torch.manual_seed(0)
    config = tf.T5Config(
        vocab_size=VOCABULARY, num_layers=layers, d_model=width, num_heads=heads, d_kv=head, d_ff=wide,
        feed_forward_proj="relu", dropout_rate=0.0,
    )  # fmt: skip
    model = tf.T5EncoderModel(config).eval().requires_grad_(False)
    # the initial table is small, and trained ones are not
    model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.normal_(0, 1)
    return model


def protein(length: int) -> torch.Tensor:
    """(N,) tokens of residues and `</s>`; a shorter protein is the beginning of a longer one."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 23, (2**17,), generator=generator)[:length].clone()
    tokens[-1] = 1
    return tokens


def contender(name: str, shape: str) -> Callable[[int], torch.Tensor]:
    """A function of the number of tokens that gives the last vectors (N, d)."""
    theirs = build(shape)
    if name != "longlens":
        theirs.set_attn_implementation(name.rpartition(" ")[2])

        def by_transformers(length: int) -> torch.Tensor:
            with torch.inference_mode():
                return theirs(input_ids=protein(length).unsqueeze(0)).last_hidden_state[0]

        return by_transformers
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = load(Path(folder), dtype="float32", device="cpu")

    def by_longlens(length: int) -> torch.Tensor:
        bounds = torch.tensor([0, length], dtype=torch.int32)
        with torch.inference_mode():
            return ours(Packed(protein(length), bounds)).last

    return by_longlens


def main() -> None:
    name, shape, threads, gib = sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    compute = contender(name, shape)
    most = int(gib * harness.GIB)
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    compute(64)
    now = harness.clock()
    for line in sys.stdin:
        asked = json.loads(line)
        before = harness.reset_peak()
        begun = now()
        try:
            vectors = compute(asked["length"])
        except (RuntimeError, MemoryError) as error:
            reason = "out of memory" if "alloc" in str(error) or isinstance(error, MemoryError) else str(error)
            print(json.dumps({"not_run": f"{reason[:120]} ({gib:g} GiB allowed)"}), flush=True)
            continue
        seconds = now() - begun
        growth = harness.peak_bytes() - before
        np.save(asked["out"], vectors.numpy())
        print(json.dumps({"seconds": seconds, "growth_mib": growth / harness.MIB}), flush=True)


if __name__ == "__main__":
    main()
