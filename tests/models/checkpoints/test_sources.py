"""Where models come from: names of the hub and the package antiberty."""

from __future__ import annotations

import importlib
import json
import sys
from types import SimpleNamespace

import pytest

from esm_peer import esm, save
from longlens.errors import CheckpointError
from longlens.models.pretrained import load, read_config


@pytest.mark.parametrize("name", ["esm2_t6_8M_UR50D", "esm1b_t33_650M_UR50S", "esm1v_t33_650M_UR90S_1"])
def test_the_organisation_is_hinted_at_for_names_of_fair_esm(name):
    with pytest.raises(CheckpointError, match=f"is called facebook/{name}"):
        load(name)


@pytest.mark.parametrize(
    ("name", "meant"),
    [("tinny", "tiny"), ("esm2_t12_35M", "facebook/esm2_t12_35M_UR50D"), ("ESMC-300M", "biohub/ESMC-300M"),
     ("prot_t5_xl_half_uniref50", "Rostlab/prot_t5_xl_half_uniref50-enc")],
)  # fmt: skip
def test_a_name_like_a_models_is_corrected_without_asking_the_hub(name, meant, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    with pytest.raises(CheckpointError, match=f"did you mean {meant}\\?; `longlens models` lists"):
        load(name)
    with pytest.raises(CheckpointError, match=r"expected a model, found no file or folder 'xyzzy', .* a slash; `longl"):
        load("xyzzy")


def test_a_hub_that_is_not_reached_is_asked_for_once_and_said_in_one_line(monkeypatch):
    asked = []

    def snapshot_download(name, **options):
        asked.append(name)
        raise OSError("no network\nand a second line")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    said_in_it = r"could not get 'facebook/esm2_t12' \(no network and a second line\).* did you mean facebook"
    with pytest.raises(CheckpointError, match=said_in_it) as said:
        load("facebook/esm2_t12")
    assert asked == ["facebook/esm2_t12"]
    assert "\n" not in str(said.value)


def test_a_version_of_antiberty_without_weights_names_the_one_that_has_them(tmp_path, monkeypatch):
    (tmp_path / "antiberty").mkdir()
    (tmp_path / "antiberty" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "antiberty", raising=False)
    importlib.invalidate_caches()
    with pytest.raises(CheckpointError, match=r"as version 0\.1\.3 has them, .*; pip install antiberty==0\.1\.3"):
        load("antiberty")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of one model, NAME/model, that is not asked over a network; and what was fetched of it."""
    folder, fetched = save(esm(1, 32, 4), tmp_path / "model"), []

    def snapshot_download(name, *, allow_patterns, ignore_patterns):
        assert name == "somebody/model"
        fetched.append(allow_patterns)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    listed = SimpleNamespace(siblings=[SimpleNamespace(rfilename="model.safetensors")])
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda self, name, timeout: listed)
    return folder, fetched


def test_a_model_of_the_hub_goes_by_its_name(hub):
    assert load("somebody/model").source == "somebody/model"
    assert read_config("somebody/model").width == 32


def test_the_configuration_is_read_without_fetching_weights(hub):
    folder, fetched = hub
    (folder / "model.safetensors").unlink()
    assert read_config("somebody/model").width == 32
    assert fetched == [["config.json", "vocab.txt"]]
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"somebody/model: expected .* config.json, found none"):
        read_config("somebody/model")


def test_another_architecture_of_the_hub_is_refused_before_its_weights_are_fetched(hub):
    folder, fetched = hub
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaModel"]}))
    with pytest.raises(
        CheckpointError, match=r"somebody/model: expected SaProt, ESM-2, .* got model_type 'llama' \(LlamaModel\)"
    ):
        load("somebody/model")
    assert fetched == [["config.json", "vocab.txt"]]
