"""One contender of the embedding benchmark, in a process of its own: reads a task on standard input, prints figures.

Imports nothing that the contender does not need, so that peaks of memory are its own and peers with other needs can run
in an environment of their own.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Batch = list[str]
Forward = Callable[[Batch], None]


def batches_of(task: dict[str, Any]) -> list[Batch]:
    """Sequences in the contender's batches, in a random order that is the same for all: a run that the clock cuts off
    has then seen a fair sample."""
    sequences: list[str] = task["sequences"]
    order = sorted(sequences, key=len) if task["sorted"] else sequences
    if task["tokens"]:
        batches: list[Batch] = [[]]
        for text in order:
            if batches[-1] and sum(len(t) + 2 for t in batches[-1]) + len(text) + 2 > task["tokens"]:
                batches.append([])
            batches[-1].append(text)
    else:
        batches = [order[i : i + task["batch"]] for i in range(0, len(order), task["batch"])]
    random.Random(0).shuffle(batches)
    return batches


def longlens(task: dict[str, Any]) -> Forward:
    import torch

    from longlens.models.pretrained import load

    model = load(task["model"], dtype=task["dtype"], device="cpu")

    def forward(batch: Batch) -> None:
        with torch.inference_mode():
            packed = model.pack(batch)
            hidden = model(packed).last
            torch.segment_reduce(
                hidden.float(), "mean", lengths=packed.cu_seqlens.diff().long(), unsafe=True
            ).sum().item()

    return forward


def transformers(task: dict[str, Any]) -> Forward:
    import torch
    from transformers import EsmModel

    model = EsmModel.from_pretrained(
        task["model"], dtype=getattr(torch, task["dtype"]), add_pooling_layer=False, attn_implementation="sdpa"
    ).eval()
    numbers = {letter: 4 + place for place, letter in enumerate("LAGVSERTIDPKQNFYMHWCXBUZO")}

    def forward(batch: Batch) -> None:
        longest = max(map(len, batch)) + 2
        ids = torch.ones(len(batch), longest, dtype=torch.int64)
        for row, text in enumerate(batch):
            ids[row, : len(text) + 2] = torch.tensor([0, *(numbers[letter] for letter in text), 2])
        keep = ids != 1
        with torch.inference_mode():
            hidden = model(ids, attention_mask=keep.long()).last_hidden_state
            (hidden.float() * keep.unsqueeze(-1)).sum(1).div(keep.sum(1, keepdim=True)).sum().item()

    return forward


def fair_esm(task: dict[str, Any]) -> Forward:
    import torch
    from esm.data import Alphabet
    from esm.model.esm2 import ESM2

    alphabet = Alphabet.from_architecture("ESM-1b")
    layers, width, heads = task["shape"]
    model = ESM2(layers, width, heads, alphabet).eval()
    convert = alphabet.get_batch_converter()

    def forward(batch: Batch) -> None:
        _, _, tokens = convert([("", text) for text in batch])
        with torch.no_grad():
            hidden = model(tokens, repr_layers=[layers])["representations"][layers]
            for row, text in enumerate(batch):
                hidden[row, 1 : len(text) + 1].mean(0).sum().item()

    return forward


def esm_cpp(task: dict[str, Any]) -> Forward:
    import esm_cpp
    import numpy as np

    model = esm_cpp.Model.load_from_safetensors(f"{task['model']}/esm-cpp.safetensors")
    if task["dtype"] == "int8":
        model.quantize_weights()
    tokenizer = esm_cpp.Tokenizer()

    def forward(batch: Batch) -> None:
        ids = [np.array(tokenizer.encode(text, truncate=False), dtype=np.int32) for text in batch]
        assert all(len(row) == len(text) + 2 for row, text in zip(ids, batch))  # noqa: B905
        model.forward_scheduled(ids)

    return forward


MAKERS = {"longlens": longlens, "transformers": transformers, "fair-esm": fair_esm, "esm-cpp": esm_cpp}


def peak() -> float:
    """MiB of this process's own peak: what getrusage says begins at the peak of the parent."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024


def main() -> None:
    task = json.load(sys.stdin)
    forward = MAKERS[task["contender"]](task)
    batches = batches_of(task)
    loaded = peak()
    forward(min(batches, key=lambda batch: abs(sum(map(len, batch)) - 1000)))
    begun, residues, done = time.perf_counter(), 0, 0
    for batch in batches:
        forward(batch)
        residues, done = residues + sum(map(len, batch)), done + 1
        if time.perf_counter() - begun > task["seconds"]:
            break
    seconds = time.perf_counter() - begun
    print(json.dumps({
        "residues_per_second": residues / seconds, "seconds": seconds, "residues": residues, "batches": done,
        "batches_in_all": len(batches), "peak_mib": peak(), "loaded_mib": loaded,
    }))  # fmt: skip


if __name__ == "__main__":
    main()
