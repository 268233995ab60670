"""Every family that is listed has its row in the parity table, and each is as near to its reference as is said."""

from __future__ import annotations

from pathlib import Path

import pytest

import parity
from longlens.models.families.registry import FAMILIES

PAGE = Path(parity.ROOT) / "docs" / "models.md"


# the licence of Ankh's weights, which `load` says
@pytest.mark.filterwarnings("ignore:.*non-commercial.*:longlens.errors.LonglensWarning")
@pytest.mark.parametrize("case", parity.cases(), ids=lambda case: case.family)
def test_each_family_equals_its_reference(case):
    found = parity.measure(case)
    for value in (found["float64"].embedding, found["float64"].layers, found["float64"].logits or 0.0):
        # parts that are rounded to float32, as the page says
        assert value < (1e-6 if case.family in ("BERT", "ESM-2", "SaProt") else 1e-12)
    for value in (found["float32"].embedding, found["float32"].layers, found["float32"].logits or 0.0):
        assert value < 1e-5
    row = next(
        line for line in PAGE.read_text().splitlines() if line.startswith(f"| {case.family} | {case.reference} |")
    )
    # an embedding may be equal to the last bit, and not every family has logits
    assert row.count("e-") >= (4 if found["float64"].logits is not None else 2)


def test_every_listed_family_is_measured():
    measured = {case.family for case in parity.cases()}
    assert measured == {name for family in FAMILIES for name in family.name.split("/")}


def test_the_page_names_every_listed_model():
    text = PAGE.read_text()
    for family in FAMILIES:
        assert all(known.name in text or known.name[:-1] in text for known in family.known)
