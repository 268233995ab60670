"""The benchmark of fine-tuning, on a few peptides: its rows and the table of the page."""

from __future__ import annotations

import json

import finetuning
from harness import DOCS, newest


def test_a_dry_run_measures_and_makes_the_table():
    data = finetuning.main(["--dry-run"])
    (row,) = data["rows"]
    assert list(row["test"]) == ["majority", "length", "composition", "nearest", "probe", "head", "lora"]
    text = finetuning.page_text(data)
    lines = text.split("```")[1].splitlines()
    assert lines[1].split() == ["mcc", "macro_f1", "pr_auc", "accuracy"]
    assert [line.split()[0] for line in lines[2:]] == list(row["test"])
    assert f"(MCC {row['test']['lora']['mcc']['value']:.2f} with 1 seeds" in text


def test_the_page_has_the_figures_of_the_newest_results():
    found = newest("finetuning")
    assert found is not None
    assert finetuning.page_text(json.loads(found.read_text())) in (DOCS / "finetuning.md").read_text()
