"""One contender of the lens benchmark, in a process of its own: reads a task on standard input, prints figures.

Imports nothing that the contender does not need, so that peaks of memory are its own and peers with other needs can run
in an environment of their own. Prints "ready" once the model stands and a short warm-up has run.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import torch
import transformers

from harness import MIB, peak_bytes, ratio, reset_peak

# looks at all layers and heads on token numbers (1, N); returns what it found, and what the first token received in the
# last layer, the mean over heads, by which contenders are compared
Look = Callable[[torch.Tensor], tuple[object, float | None]]
PACKAGES = {"longlens": "longlens", "bertviz": "bertviz", "attnread": "attnread", "nnsight": "nnsight",
            "inseq": "inseq", "flash-colreduce": "flash-colreduce", "naive": "flash-colreduce"}  # fmt: skip


def build_model(task: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    layers, heads, width = task["shape"]
    config = transformers.GPT2Config(
        vocab_size=task["vocabulary"], n_embd=width, n_layer=layers, n_head=heads, n_positions=max(task["length"], 64),
        attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config).eval()


def run(model: Any, ids: torch.Tensor, **more: Any) -> Any:
    """A forward pass that makes no logits but the last token's."""
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False, logits_to_keep=1, **more)


def forward(model: Any) -> Look:
    """Nothing is looked at: what the model costs by itself."""
    return lambda ids: (run(model, ids), None)


def longlens(model: Any) -> Look:
    """The standard set: log-sum-exp, entropy, largest weight, distance, attention received, top 8 keys."""
    import longlens

    def look(ids: torch.Tensor) -> tuple[object, float]:
        with longlens.watch(model) as seen:
            run(model, ids)
        return seen, float(seen.received[seen.layers[-1]][0, :, 0].mean())

    return look


def bertviz(model: Any) -> Look:
    """The page of its head view."""
    from bertviz import head_view

    model.set_attn_implementation("eager")

    def look(ids: torch.Tensor) -> tuple[object, float]:
        attentions = list(run(model, ids, output_attentions=True).attentions)
        names = [str(number) for number in ids[0].tolist()]
        return head_view(attentions, names, html_action="return"), float(attentions[-1][0, :, :, 0].sum(1).mean())

    return look


def attnread(model: Any) -> Look:
    """The weights of all heads."""
    from attnread import extract_attention

    layer = model.config.n_layer - 1

    def look(ids: torch.Tensor) -> tuple[object, float]:
        found = extract_attention(model, {"input_ids": ids})
        received = [found["text", layer, head][0, :, 0].sum() for head in range(model.config.n_head)]
        return found, float(torch.stack(received).mean())

    return look


def nnsight(model: Any) -> Look:
    """Attention received and entropy, written by its user: one layer's weights are alive at a time."""
    from nnsight import NNsight

    model.set_attn_implementation("eager")
    wrapped = NNsight(model)

    def look(ids: torch.Tensor) -> tuple[object, float]:
        with torch.no_grad(), wrapped.trace(input_ids=ids, use_cache=False, logits_to_keep=1):
            found = list().save()  # noqa: C408
            for layer in wrapped.transformer.h:
                weights = layer.attn.output[1]
                found.append((weights.sum(-2), torch.special.entr(weights).sum(-1)))
        return found, float(found[-1][0][0, :, 0].mean())

    return look


def inseq(model: Any) -> Look:
    """Attention of each token to those before it, as it predicts the next: the weights of all layers in one tensor."""
    import inseq
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(4, model.config.vocab_size))]
    words = Tokenizer(models.WordLevel({name: number for number, name in enumerate(names)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    model.set_attn_implementation("eager")
    attributed = inseq.load_model(model, "attention", tokenizer=tokenizer)

    def look(ids: torch.Tensor) -> tuple[object, float]:
        text = [names[number] for number in ids[0].tolist()]
        found = attributed.attribute(text[0], " ".join(text), show_progress=False)
        weights = found.sequence_attributions[0].target_attributions
        assert weights.shape[:2] == (len(text), len(text) - 1), weights.shape
        # the last token predicts none
        return found, float(weights[0, :, -1].nansum(0).mean())

    return look


def naive(model: Any) -> Look:
    """flash-colreduce's reference on the CPU: attention received, from the weights of one layer at a time."""
    from flash_colreduce import naive_colreduce

    found: list[torch.Tensor] = []

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **given: Any) -> tuple[Any, None]:
        found.append(naive_colreduce(query, key, "sum", is_causal=True))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return out.transpose(1, 2).contiguous(), None

    transformers.AttentionInterface.register("column_sums", attend)
    transformers.AttentionMaskInterface.register("column_sums", lambda **given: None)
    model.set_attn_implementation("column_sums")

    def look(ids: torch.Tensor) -> tuple[object, float]:
        found.clear()
        run(model, ids)
        return list(found), float(found[-1][0, :, 0].mean())

    return look


def flash_colreduce(model: Any) -> Look:
    """Its kernel, which says itself what it needs."""
    from flash_colreduce import flash_colreduce

    query = torch.zeros(1, 1, 64, 32)
    flash_colreduce(query, query, reduction="sum")
    raise SystemExit("expected a machine without a GPU: this worker measures on the CPU")


MAKERS: dict[str, Callable[[Any], Look]] = {
    "forward": forward, "longlens": longlens, "bertviz": bertviz, "attnread": attnread, "nnsight": nnsight,
    "inseq": inseq, "flash-colreduce": flash_colreduce, "naive": naive,
}  # fmt: skip


def measure(task: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(task["threads"])
    # a model of the same weights that nobody looks at: what a contender is compared with, round by round
    alone, look = forward(build_model(task)), MAKERS[task["contender"]](build_model(task))
    ids = torch.randint(4, task["vocabulary"], (1, task["length"]), generator=torch.Generator().manual_seed(1))
    look(ids[:, :16])
    start = reset_peak()
    print("ready", flush=True)
    times: dict[str, list[float]] = {"look": [], "alone": []}
    growth, check = 0, None
    while len(times["look"]) < 3 and sum(times["look"]) < 10:
        begun = time.perf_counter()
        found, check = look(ids)
        times["look"].append(time.perf_counter() - begun)
        if len(times["look"]) == 1:
            growth = peak_bytes() - start
        del found
        begun = time.perf_counter()
        alone(ids)
        times["alone"].append(time.perf_counter() - begun)
    return {
        "seconds": statistics.median(times["look"]), "runs": len(times["look"]), "growth_mib": growth / MIB,
        "check": check, "times_model": ratio(times["look"], times["alone"]),
    }  # fmt: skip


def main() -> None:
    task = json.load(sys.stdin)
    resource.setrlimit(resource.RLIMIT_DATA, (task["memory"], resource.getrlimit(resource.RLIMIT_DATA)[1]))
    names = [name for name in (PACKAGES.get(task["contender"]), "torch", "transformers") if name]
    answer: dict[str, Any] = {"versions": {name: version(name) for name in names}}
    try:
        answer |= measure(task)
    except MemoryError:
        answer["not_run"] = "out of memory"
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        answer["not_run"] = "out of memory"
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
