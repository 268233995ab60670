"""`longlens models`: every published model of the registry with what it can do, and what is not served."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from longlens.cli.main import cli
from longlens.jobs.memory import parameter_count
from longlens.models.families.entries import ConfigEntries
from longlens.models.families.others import OTHERS
from longlens.models.families.registry import FAMILIES


def printed(monkeypatch, width, *options):
    monkeypatch.delenv("COLUMNS", raising=False)
    if width is not None:
        monkeypatch.setenv("COLUMNS", str(width))
    result = CliRunner().invoke(cli, ["models", *options])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("width", [None, 60, 80, 119, 120, 200])
def test_every_model_is_listed_and_nothing_is_cut_off(monkeypatch, width):
    text = printed(monkeypatch, width)
    for family in FAMILIES:
        for known in family.known:
            assert f"{known.name}" in text
            assert known.licence in text
    for other in OTHERS:
        assert f"  {other.name}: {other.reason}" in text
    assert "…" not in text
    assert "\x1b" not in text


def test_json_says_what_each_can_do(monkeypatch):
    listed = json.loads(printed(monkeypatch, None, "--json"))
    rows = {row["model"]: row for row in listed["served"]}
    assert len(rows) == sum(len(family.known) for family in FAMILIES)
    assert rows["facebook/esm1v_t33_650M_UR90S_3"]["limit"] == 1022
    assert rows["biohub/ESMC-300M"]["contacts"] == "fitted"
    assert rows["facebook/esm2_t33_650M_UR50D"] | {"note": ""} == {
        "model": "facebook/esm2_t33_650M_UR50D", "family": "ESM-2", "parameters": "651 M", "layers": 33, "width": 1280,
        "heads": 20, "limit": None, "licence": "MIT", "score": True, "surprise": True, "contacts": "own",
        "note": "",
    }  # fmt: skip
    others = {row["model"]: row for row in listed["not_served"]}
    assert others["ProtGPT2"]["attach"] is True
    assert others["ProGen2"]["attach"] is False


def test_parameters_that_are_listed_are_those_of_the_sizes():
    """What a family's reader makes of a configuration with the listed sizes has about the listed parameters."""
    entries = {
        "ESM-2": ("esm", {"position_embedding_type": "rotary", "vocab_size": 33}, 4),
        "SaProt": ("esm", {"position_embedding_type": "rotary", "vocab_size": 446}, 4),
        "ESM-1b/ESM-1v": ("esm", {"vocab_size": 33}, 4),
        "AMPLIFY": ("AMPLIFY", {"vocab_size": 27}, 4),
        "ESM-C": ("esmc", {"vocab_size": 64}, 8 / 3),
        "BERT": ("bert", {"vocab_size": 30}, 4),
    }
    for family in FAMILIES:
        if family.name not in entries:
            continue
        kind, more, times = entries[family.name]
        for known in family.known:
            wide = -(-int(times * known.width) // 256) * 256 if family.name == "ESM-C" else times * known.width
            config = family.config(ConfigEntries(
                {"model_type": kind, "num_hidden_layers": known.layers, "hidden_size": known.width,
                 "num_attention_heads": known.heads, "intermediate_size": int(wide),
                 "max_position_embeddings": (known.limit or 1024) + 2 + 2 * (kind == "esm"), **more}, known.name,
            ))  # fmt: skip
            number, unit = known.parameters.split()
            assert parameter_count(config) == pytest.approx(float(number) * {"M": 1e6, "B": 1e9}[unit], rel=0.06), known
