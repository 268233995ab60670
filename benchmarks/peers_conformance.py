"""Other packages' attention through the conformance suite, and our own methods beside them.

    python benchmarks/peers_conformance.py                  run, write benchmarks/results/ and docs/conformance.md
    python benchmarks/peers_conformance.py performer-pytorch   run one and print its table

Needs the packages of the extra `bench`. The packages' attention layers are run as they are released: their
projections are set so that queries, keys and values come through unchanged, and their masks go in as their own callers
give them. What each is held to is what its package offers.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor, nn

from harness import DOCS, HERE, facts, fill, today, write_json
from longlens import attention
from longlens.testing import (
    Claims,
    ConformanceReport,
    check_names,
    claims_of,
    measure_errors,
    run_conformance,
    run_method,
)

PAGE = DOCS / "conformance.md"
LANDMARKS, RANK, LONGEST = 16, 32, 16384


def performer(
    query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool = False, mask: Tensor | None = None
) -> Tensor:
    """performer-pytorch's `Attention`; `mask` (B, N), True = keep."""
    layer = _performer(query.shape[1], query.shape[3], is_causal, query.dtype)
    return _through(layer, query, key, value, mask=mask)


def linformer(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """linformer's `LinformerSelfAttention` for up to 16,384 tokens; `mask` is what its keywords take."""
    return _through(_linformer(query.shape[1], query.shape[3], query.dtype), query, key, value, mask=mask)


def nystrom(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """nystrom-attention's `NystromAttention` without its convolution; `mask` (B, N), True = keep."""
    return _through(_nystrom(query.shape[1], query.shape[3], query.dtype), query, key, value, mask=mask)


def _through(layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Run a self-attention layer on tokens that hold query, key and value side by side."""
    heads = query.shape[1]
    tokens = torch.cat([tensor.transpose(1, 2).flatten(2) for tensor in (query, key, value)], -1)
    out = layer(tokens, mask=mask)[..., : heads * query.shape[3]]
    return out.unflatten(-1, (heads, -1)).transpose(1, 2)


def _pick(layer: nn.Linear, part: int) -> None:
    """Make a projection pick a third of its input, 0 = query, 1 = key, 2 = value."""
    with torch.no_grad():
        layer.weight.zero_()
        rows = layer.weight.shape[0]
        layer.weight[:, part * rows : (part + 1) * rows] = torch.eye(rows, dtype=layer.weight.dtype)


def _pass_out(layer: nn.Linear) -> None:
    """Make the output projection lay its input in front of zeros."""
    with torch.no_grad():
        layer.weight.copy_(torch.eye(*layer.weight.shape, dtype=layer.weight.dtype))
        layer.bias.zero_()


@lru_cache
def _performer(heads: int, width: int, causal: bool, dtype: torch.dtype) -> nn.Module:
    from performer_pytorch.performer_pytorch import Attention

    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that its CUDA extension is absent
        layer = Attention(3 * heads * width, causal=causal, heads=heads, dim_head=width, nb_features=64).to(dtype)
    for part, projection in enumerate((layer.to_q, layer.to_k, layer.to_v)):
        _pick(projection, part)
    _pass_out(layer.to_out)
    return layer.eval().requires_grad_(False)


@lru_cache
def _linformer(heads: int, width: int, dtype: torch.dtype) -> nn.Module:
    from linformer.linformer import LinformerSelfAttention

    torch.manual_seed(0)
    layer = LinformerSelfAttention(3 * heads * width, LONGEST, k=RANK, heads=heads, dim_head=width).to(dtype)
    for part, projection in enumerate((layer.to_q, layer.to_k, layer.to_v)):
        _pick(projection, part)
    _pass_out(layer.to_out)
    return layer.eval().requires_grad_(False)


@lru_cache
def _nystrom(heads: int, width: int, dtype: torch.dtype) -> nn.Module:
    from nystrom_attention import NystromAttention

    layer = NystromAttention(
        3 * heads * width, dim_head=width, heads=heads, num_landmarks=LANDMARKS, residual=False
    ).to(dtype)
    with torch.no_grad():
        layer.to_qkv.weight.copy_(torch.eye(3 * heads * width, dtype=dtype))
    _pass_out(layer.to_out[0])
    return layer.eval().requires_grad_(False)


_LAYER = Claims(
    kind="approximate",
    key_mask="mask",
    scale=False,
    value_width=False,
    cross_lengths=False,
    dtypes=("float32", "float64"),
    memory="N",
)
_BIDIRECTIONAL = replace(_LAYER, causal=None)

# name: (function, its name here, claims)
PEERS = {
    "performer-pytorch": (performer, "peers_conformance:performer", _LAYER),
    "linformer": (linformer, "peers_conformance:linformer", _BIDIRECTIONAL),
    "nystrom-attention": (nystrom, "peers_conformance:nystrom", _BIDIRECTIONAL),
    "torch SDPA": (
        nn.functional.scaled_dot_product_attention,
        "torch.nn.functional:scaled_dot_product_attention",
        Claims(
            causal="top-left",
            key_mask="attn_mask",
            key_mask_shape="B11N",
            attn_mask=True,
            masks_with_causal=False,
            grouped=True,
            dtypes=("float32", "bfloat16", "float16", "float64"),
            dropout=True,
            memory="N",
            keywords={"enable_gqa": True},
        ),
    ),
    "torch SDPA, our causal": (
        nn.functional.scaled_dot_product_attention,
        "torch.nn.functional:scaled_dot_product_attention",
        Claims(dtypes=("float32", "float64")),
    ),
}


def run_peer(name: str) -> ConformanceReport:
    function, target, claims = PEERS[name]
    only = ["cross lengths", "causality", "masked NaN"] if name.endswith("our causal") else None
    return run_conformance(function, claims=claims, target=target, name=name, checks=only)


def run_ours() -> list[ConformanceReport]:
    sys.path.insert(0, str(HERE.parent / "tests"))
    from methods import METHODS

    found = []
    for method in METHODS:
        quick = [check for check in check_names() if not check.startswith("memory")]
        report = run_method(method, checks=quick)
        found.append(replace(report, errors=measure_errors(attention, claims_of(method))))
    return found


def main() -> None:
    torch.set_num_threads(2)
    if len(sys.argv) > 1:
        for name in sys.argv[1:]:
            print(run_peer(name).table(), "\n")
        return
    peers = [run_peer(name) for name in PEERS]
    ours = run_ours()
    target, record = today("conformance_cpu")
    record |= {
        "machine": facts(),
        "peers": [json.loads(report.to_json()) for report in peers],
        "ours": [json.loads(report.to_json()) for report in ours],
    }
    record.pop("rows", None)
    write_json(target, record)
    fill(PAGE, "peers_conformance.py: peers", _peer_table(peers))
    fill(PAGE, "peers_conformance.py: ours", _our_table(ours))
    for report in peers:
        print(report.table(), "\n")
    for report in ours:
        print(report.subject, "ok" if report.ok else [result.check for result in report.failures])


WORDS = {"pass": "pass", "fail": "**FAIL**", "not claimed": "-", "not run": "not run"}


def _peer_table(reports: list[ConformanceReport]) -> str:
    reports = [report for report in reports if len(report.results) > 5]
    lines = ["| check | " + " | ".join(report.subject for report in reports) + " |"]
    lines.append("|---" * (len(reports) + 1) + "|")
    for place, result in enumerate(reports[0].results):
        words = [WORDS[report.results[place].status] for report in reports]
        lines.append(f"| {result.check} | " + " | ".join(words) + " |")
    for mode in ("bidirectional", "causal"):
        cells = [f"{report.errors[mode]:.2g}" if mode in report.errors else "-" for report in reports]
        lines.append(f"| error, {mode} | " + " | ".join(cells) + " |")
    for report in reports:
        lines += ["", f"{report.subject}:", "", "```"]
        lines += [f"{result.check}: {result.describe()}" for result in report.failures]
        lines.append("```")
    return "\n".join(lines)


def _our_table(reports: list[ConformanceReport]) -> str:
    lines = ["| method | passed | failed | not claimed | error, bidirectional | error, causal |", "|---" * 6 + "|"]
    for report in reports:
        count = {word: sum(result.status == word for result in report.results) for word in WORDS}
        failed = ", ".join(result.check for result in report.failures) or "none"
        errors = [
            f"{report.errors[mode]:.2g}" if mode in report.errors else "-" for mode in ("bidirectional", "causal")
        ]
        name = report.subject if len(report.subject) < 40 else report.subject[:37] + "..."
        lines.append(f"| `{name}` | {count['pass']} | {failed} | {count['not claimed']} | " + " | ".join(errors) + " |")
    return "\n".join(line.replace("|global", "\\|global").replace("|dilated", "\\|dilated") for line in lines)


if __name__ == "__main__":
    main()
