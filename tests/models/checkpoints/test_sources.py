"""Where models come from: names of the hub and the package antiberty."""

from __future__ import annotations

import importlib
import sys

import pytest

from longlens.errors import CheckpointError
from longlens.models.pretrained import load


@pytest.mark.parametrize("name", ["esm2_t6_8M_UR50D", "esm2_t33_650M_UR50D"])
def test_the_organisation_is_hinted_at_for_names_of_fair_esm(name):
    with pytest.raises(CheckpointError, match=f"is called facebook/{name}"):
        load(name)


def test_a_version_of_antiberty_without_weights_names_the_one_that_has_them(tmp_path, monkeypatch):
    (tmp_path / "antiberty").mkdir()
    (tmp_path / "antiberty" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "antiberty", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(CheckpointError, match=r"as version 0\.1\.3 has them, .*; pip install antiberty==0\.1\.3"):
        load("antiberty")
