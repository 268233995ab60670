"""`longlens methods`: every registry entry, in every width."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from longlens.cli.methods import LEGEND, methods
from longlens.ops.registry import METHOD_INFOS


def lines(monkeypatch: pytest.MonkeyPatch, width: int | None) -> list[str]:
    if width is None:
        monkeypatch.delenv("COLUMNS", raising=False)
    else:
        monkeypatch.setenv("COLUMNS", str(width))
    result = CliRunner().invoke(methods)
    assert result.exit_code == 0
    return result.output.splitlines()


@pytest.mark.parametrize("width", [None, 40, 80, 100, 120, 200])
def test_every_method_has_its_line_and_nothing_is_cut_off(monkeypatch: pytest.MonkeyPatch, width: int | None) -> None:
    printed = lines(monkeypatch, width)
    text = "\n".join(printed)
    for entry in METHOD_INFOS:
        row = next(line.split() for line in printed if line.startswith(f"{entry.name} "))
        assert row[1:3] == [entry.family, entry.exact]
        assert entry.time in text
        assert entry.paper.split(", ")[0] in text
    assert "…" not in text
    assert "\x1b" not in text
    assert max(map(len, printed)) <= max(78, width or 120)
    assert not any(line.endswith(" ") for line in printed)


def test_json_holds_every_capability() -> None:
    result = CliRunner().invoke(methods, ["--json"])
    rows = json.loads(result.output)
    assert [row["name"] for row in rows] == [entry.name for entry in METHOD_INFOS]
    for row, entry in zip(rows, METHOD_INFOS, strict=True):
        assert "path" not in row
        assert all(getattr(entry, key) == value for key, value in row.items())
        assert row.keys() >= {
            "family",
            "exact",
            "causal",
            "masks",
            "bias",
            "dropout",
            "lse",
            "softcap",
            "sinks",
            "second_derivatives",
            "paper",
        }


def test_the_legend_is_right_about_softcap_and_sinks() -> None:
    assert "softcap and sinks go with all that\n        are not approximations" in LEGEND
    assert all(entry.softcap == entry.sinks == (entry.exact != "no") for entry in METHOD_INFOS)
