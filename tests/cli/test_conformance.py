from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from longlens.cli.main import cli

SDPA = "torch.nn.functional:scaled_dot_product_attention"


def run(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(cli, ["conformance", *words])
    return result.exit_code, result.output


def test_a_method_of_ours_passes() -> None:
    code, output = run("--method", "window:16", "--check", "agreement", "--check", "causality")
    assert code == 0, output
    assert output.splitlines()[0] == "window:16"
    assert "2 pass" in output


def test_a_claim_that_fails_exits_with_1() -> None:
    code, output = run(SDPA, "--check", "cross lengths")
    assert code == 1
    assert "cross lengths  FAIL     Nq=5, Nk=64, causal: expected error <=" in output


def test_claims_one_by_one() -> None:
    code, output = run(SDPA, "--claim", "causal=top-left", "--check", "cross lengths")
    assert code == 0, output


def test_a_module_in_the_current_folder_and_a_report_in_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_attention_here.py").write_text(
        "import torch\n"
        "from longlens.testing import Claims\n"
        "CLAIMS = Claims(kind='approximate', causal=None, scale=False)\n"
        "def attend(query, key, value):\n"
        "    return value.mean(2, keepdim=True).expand_as(query).contiguous()\n"
    )
    monkeypatch.chdir(tmp_path)
    code, output = run(
        "my_attention_here:attend", "--claims", "my_attention_here:CLAIMS", "--check", "batch", "--check", "scale",
        "--check", "agreement", "--json", "report.json",
    )  # fmt: skip
    assert code == 0, output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ok"] is True
    assert [(result["check"], result["status"]) for result in report["results"]] == [
        ("agreement", "not claimed"),
        ("scale", "not claimed"),
        ("batch", "pass"),
    ]


@pytest.mark.parametrize("words", [("--method", "window:16"), (SDPA,)], ids=["method", "function"])
def test_a_file_in_the_current_folder_hides_no_module(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "colorsys.py").write_text("raise RuntimeError('a stranger')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(sys.path))
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    code, output = run(*words, "--check", "agreement")
    assert code == 0, output
    importlib.import_module("colorsys")
    assert (str(tmp_path) in sys.path) == (words == (SDPA,))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "expected either MODULE:FUNCTION or --method"),
        (("torch",), "expected MODULE:FUNCTION, got 'torch'"),
        (("no_such_module_here:f",), "no module 'no_such_module_here'"),
        (("torch:no_such_name",), "module 'torch' has no 'no_such_name'"),
        (("torch:float32",), "is a dtype, not a function"),
        (("--method", "windw"), "did you mean 'window'"),
        (("--method", "window:8", "--claim", "causal=None"), "a method's claims are in the registry"),
        ((SDPA, "--claim", "colour=red"), "expected --claim NAME=VALUE with a name among kind"),
        ((SDPA, "--claim", "causal=middle"), "expected causal 'bottom-right', 'top-left' or None"),
        ((SDPA, "--claims", "torch:float32"), "to name a longlens.testing.Claims, got a dtype"),
        ((SDPA, "--check", "beauty"), ", got beauty"),
    ],
)
def test_what_is_asked_wrongly_exits_with_2(words: tuple[str, ...], message: str) -> None:
    code, output = run(*words)
    assert code == 2
    assert message in output
