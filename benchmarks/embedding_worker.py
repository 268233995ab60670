"""One contender of the embedding benchmark, in a process of its own that stays alive between rounds.

Reads a task in one line of standard input, loads its model and says "ready". Then, for each further line, embeds the
proteins in it and answers with the seconds that this took; start-up and loading are never timed. It imports nothing
that the contender does not need, so that its peak of memory is its own and that peers can run in another Python.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from typing import Any

from harness import MIB, peak_bytes

Batch = list[str]
# embeds a batch: the mean vector of each protein; returns the sum of their squares, by which contenders are compared
Forward = Callable[[Batch], "float | None"]


def batches_of(groups: list[Batch], task: dict[str, Any]) -> list[Batch]:
    """The proteins of a round in the contender's own batches.

    `task["batching"]`: "one" by one; "sorted", a batch to a group of neighbours in length; "mixed", as many to a batch
    in an order without regard to length; "tokens", in order of length up to `task["tokens"]`.
    """
    flat = [text for group in groups for text in group]
    if task["batching"] == "one":
        return [[text] for text in flat]
    if task["batching"] == "sorted":
        return groups
    if task["batching"] == "mixed":
        random.Random(0).shuffle(flat)
        size = len(groups[0])
        return [flat[start : start + size] for start in range(0, len(flat), size)]
    batches: list[Batch] = [[]]
    for text in sorted(flat, key=len):
        if batches[-1] and sum(len(t) + 2 for t in batches[-1]) + len(text) + 2 > task["tokens"]:
            batches.append([])
        batches[-1].append(text)
    return batches


def longlens(task: dict[str, Any]) -> Forward:
    import torch

    import longlens

    torch.set_num_threads(task["threads"])
    model = longlens.load(task["model"], dtype=task["dtype"], device="cpu")

    def forward(batch: Batch) -> float:
        with torch.inference_mode():
            packed = model.pack(batch)
            lengths = packed.cu_seqlens.diff().long()
            means = torch.segment_reduce(model(packed).last.float(), "mean", lengths=lengths, unsafe=True)
            return means.square().sum().item()

    return forward


def transformers(task: dict[str, Any]) -> Forward:
    import torch
    from transformers import EsmModel

    torch.set_num_threads(task["threads"])
    model = EsmModel.from_pretrained(
        task["model"], dtype=getattr(torch, task["dtype"]), add_pooling_layer=False, attn_implementation="sdpa"
    ).eval()
    numbers = {letter: 4 + place for place, letter in enumerate("LAGVSERTIDPKQNFYMHWCXBUZO")}

    def forward(batch: Batch) -> float:
        longest = max(map(len, batch)) + 2
        ids = torch.ones(len(batch), longest, dtype=torch.int64)
        for row, text in enumerate(batch):
            ids[row, : len(text) + 2] = torch.tensor([0, *(numbers[letter] for letter in text), 2])
        keep = ids != 1
        with torch.inference_mode():
            hidden = model(ids, attention_mask=keep.long()).last_hidden_state
            means = (hidden.float() * keep.unsqueeze(-1)).sum(1).div(keep.sum(1, keepdim=True))
            return means.square().sum().item()

    return forward


def fair_esm(task: dict[str, Any]) -> Forward:
    import torch
    from esm.data import Alphabet
    from esm.model.esm2 import ESM2

    torch.set_num_threads(task["threads"])
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


MAKERS: dict[str, Callable[[dict[str, Any]], Forward]] = {
    "longlens": longlens, "transformers": transformers, "fair-esm": fair_esm, "esm-cpp": esm_cpp,
}  # fmt: skip


def main() -> None:
    task = json.loads(sys.stdin.readline())
    forward = MAKERS[task["package"]](task)
    print(json.dumps({"ready": True, "loaded_mib": peak_bytes() / MIB}), flush=True)
    for line in sys.stdin:
        batches = batches_of(json.loads(line), task)
        begun = time.perf_counter()
        checks = [forward(batch) for batch in batches]
        seconds = time.perf_counter() - begun
        check = None if None in checks else sum(value for value in checks if value is not None)
        answer = {"seconds": seconds, "batches": len(batches), "peak_mib": peak_bytes() / MIB, "check": check}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
