"""`longlens explain`: what it says is what `longlens.explain` says of the same request."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import longlens
from longlens.cli.explain import explain, read_mask
from longlens.errors import InputError, MaskError, MethodError

SHAPE = (2, 4, 256, 64)


def said(*arguments: str, shape: str = "2,4,256,64") -> dict[str, Any]:
    result = CliRunner().invoke(explain, ["--shape", shape, *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


@pytest.mark.parametrize(
    ("arguments", "keywords"),
    [
        ([], {}),
        (["--dtype", "bfloat16", "--grad"], {"dtype": torch.bfloat16, "requires_grad": True}),
        (["--device", "cuda"], {"device": "cuda"}),
        (["--method", "window:16", "--causal"], {"method": "window:16", "is_causal": True}),
        (["--method", "linear", "--padded"], {"method": "linear", "key_mask": True}),
        (["--dropout", "0.1", "--lse"], {"dropout_p": 0.1, "return_lse": True}),
        (["--softcap", "30"], {"softcap": 30.0}),
        (["--sinks", "--method", "window:16"], {"sinks": True, "method": "window:16"}),
        (["--bias", "alibi"], {"bias": longlens.Alibi(4)}),
        (["--bias", "tensor"], {"bias": torch.zeros(1, 4, 256, 256)}),
        (["--mask", "window:16"], {"attn_mask": longlens.Window(16)}),
        (["--mask", "tensor"], {"attn_mask": torch.ones(1, 1, 256, 256, dtype=torch.bool)}),
        (["--mask", "prefix:9 & window:16"], {"attn_mask": longlens.Prefix(9) & longlens.Window(16)}),
        (["--key-shape", "2,2,512,64"], {"key": (2, 2, 512, 64)}),
        (["--value-width", "32"], {"key": SHAPE, "value": (2, 4, 256, 32)}),
        (["--method", "linear", "--bias", "alibi"], {"method": "linear", "bias": longlens.Alibi(4)}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_options_ask_for_what_the_keywords_do(arguments: list[str], keywords: dict[str, Any]) -> None:
    assert said(*arguments) == asdict(longlens.explain(SHAPE, **keywords))


def test_packed_lays_sequences_end_to_end() -> None:
    bounds = torch.tensor([0, 33, 66, 100], dtype=torch.int32)
    assert said("--packed", "3", shape="1,4,100,64") == asdict(longlens.explain((1, 4, 100, 64), cu_seqlens=bounds))


def test_the_text_is_the_explanation_within_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "72")
    result = CliRunner().invoke(explain, ["--shape", "2,4,256,64", "--bias", "alibi"])
    lines = result.output.splitlines()
    assert max(map(len, lines)) <= 72
    assert result.output.split() == str(longlens.explain(SHAPE, bias=longlens.Alibi(4))).split()


@pytest.mark.parametrize("shape", ["", "1,2,3", "1,2,3,4,5", "1,2,x,4", "1,2,-3,4"])
def test_a_shape_that_is_none_is_wrong_usage(shape: str) -> None:
    result = CliRunner().invoke(explain, ["--shape", shape])
    assert result.exit_code == 2
    assert "expected batch, heads, length and width" in result.output


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["--method", "windw"], MethodError),
        (["--mask", "linear"], MaskError),
        (["--mask", "window:16 &"], MethodError),
        (["--dropout", "1.5"], InputError),
        (["--packed", "2"], MaskError),
        (["--key-shape", "2,3,256,64"], InputError),
    ],
)
def test_what_cannot_be_asked_raises_an_error_of_ours(arguments: list[str], error: type[Exception]) -> None:
    result = CliRunner().invoke(explain, ["--shape", "2,4,256,64", *arguments])
    assert isinstance(result.exception, error)


def test_a_mask_that_names_a_tensor_holds_no_memory() -> None:
    mask = read_mask("tensor", (1, 1, 1 << 20, 64), (1, 1, 1 << 20, 64))
    assert isinstance(mask, torch.Tensor)
    assert mask.device.type == "meta"
