"""What `longlens doctor` says is true, and it says what is wrong."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import longlens
from longlens.cli.main import cli
from longlens.diagnosis import doctor as under_test
from longlens.diagnosis import machine, models, packages, speed
from longlens.models.pretrained import choose_device, choose_dtype
from longlens.ops.explain import explain

REQUIRES = [
    "torch>=2.9",
    "numpy>=1.26",
    "h5py>=999",
    "nosuchpackage<3,>=2",
    "transformers>=5.0; extra == 'hf'",
    "nosuchzarr>=3; extra == 'zarr'",
    "matplotlib>=999; python_version >= '3.11' and extra == 'plot'",
    "pytest>=8; extra == 'test'",
    "longlens[docs]; extra == 'check'",
]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "PRODUCT", {"cpu": (16, 16, 16), "cuda": (16, 16, 16)})
    monkeypatch.setattr(speed, "ATTENTION", {"cpu": (1, 16, 8), "cuda": (1, 16, 8)})
    monkeypatch.setattr(speed, "SECONDS", 0.001)


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def well(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation whose metadata do not depend on when this source tree was installed."""
    monkeypatch.setattr(packages, "requires", lambda _: ["torch>=2.9", "numpy>=1", "transformers>=5; extra == 'hf'"])


def run(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["doctor", *arguments], standalone_mode=False)


def test_it_says_what_is_here(well: None, empty_cache: Path) -> None:
    found = longlens.doctor()
    assert found.longlens == longlens.__version__
    assert found.torch == torch.__version__
    # without the import of the models, which takes a second
    assert found.device == choose_device("auto").type
    assert found.dtype == str(choose_dtype("auto", choose_device("auto"))).removeprefix("torch.")
    assert found.problems == ()
    assert [package.name for package in found.packages.required] == ["torch", "numpy"]
    assert found.packages.extras["hf"][0].version == importlib.metadata.version("transformers")
    assert found.machine.threads == torch.get_num_threads()
    assert 0 < found.machine.free <= found.machine.memory
    assert set(found.rates) == {"float32", "bfloat16", "float16"}
    assert found.kernels is not None
    assert "float32" in found.kernels.cpu
    assert "tiny" in [model.name for model in found.models]


def test_the_calls_are_what_explain_says(well: None, empty_cache: Path) -> None:
    found = longlens.doctor()
    for name, options in speed.CALLS.items():
        said = explain(speed.SHAPE, dtype=getattr(torch, found.dtype), device=found.device, **options)
        assert found.calls[name] == said
        assert f"{said.method}: {said.path}" in str(found)


def test_the_command_prints_the_text_and_the_same_as_json(well: None, empty_cache: Path) -> None:
    text, data = run(), run("--json")
    assert (text.return_value, data.return_value) == (0, 0)
    for label in ("longlens", "needs", "extras", "CPU", "memory", "device", "products", "kernels", "calls", "models"):
        assert f"\n{label:<10}" in f"\n{text.stdout}"
    assert "\nproblems  none" in text.stdout
    assert max(map(len, text.stdout.splitlines())) <= 120
    found = longlens.doctor()
    read = json.loads(data.stdout)
    assert read["models"] == json.loads(json.dumps(asdict(found)["models"]))
    assert list(read) == list(asdict(found))


def test_packages_that_are_missing_or_too_old_are_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch, empty_cache: Path
) -> None:
    monkeypatch.setattr(packages, "requires", lambda _: REQUIRES)
    result = run()
    assert result.return_value == 1
    text = " ".join(result.stdout.split())
    assert "nosuchpackage missing; pip install 'h5py>=999' 'nosuchpackage<3,>=2'" in text
    assert f"h5py {importlib.metadata.version('h5py')} is too old, needs >=999" in text
    assert "problem extra plot: matplotlib" in text
    # an extra that is not there is no problem
    assert "zarr nosuchzarr missing: pip install 'longlens[zarr]'" in text
    found = packages.find_packages()
    assert [package.state for package in found.required] == ["present", "present", "too old", "missing"]
    assert sorted(found.extras) == ["hf", "plot", "zarr"]


@pytest.mark.parametrize(
    ("have", "needs", "state"),
    [
        ("2.9", ">=2.9", "present"),
        ("2.13.0+cpu", ">=2.9", "present"),
        ("2.9.0", ">=2.9", "present"),
        ("2.9", ">=2.9.0", "present"),
        ("2.8.9", ">=2.9", "too old"),
        ("10", ">=9.1", "present"),
        ("1.0", "", "present"),
        ("3.0rc1", ">=3", "present"),
    ],
)
def test_versions_are_compared_as_numbers(monkeypatch: pytest.MonkeyPatch, have: str, needs: str, state: str) -> None:
    monkeypatch.setattr(packages, "version", lambda _: have)
    assert packages.inspect_package("some", needs).state == state


def test_a_source_tree_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch, empty_cache: Path) -> None:
    def absent(_: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(packages, "requires", absent)
    assert "needs     unknown: longlens runs from a source tree that is not installed" in str(longlens.doctor())


@pytest.mark.parametrize("error", ["ImportError('libtorch.so is of another kind')", "OSError('libcudart.so.13')"])
def test_a_pytorch_that_cannot_be_imported_is_said(error: str) -> None:
    code = f"""
import sys
class Broken:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            raise {error}
sys.meta_path.insert(0, Broken())
sys.argv = ["longlens", "doctor"]
from longlens.cli.main import main
main()
"""
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 1, ran.stderr
    assert f"problem   PyTorch cannot be imported ({error[:-2].partition(chr(39))[2]})" in ran.stdout
    assert "CPU       " in ran.stdout
    assert "Traceback" not in ran.stderr


def test_advice_fits_the_machine(well: None, empty_cache: Path) -> None:
    found = longlens.doctor()
    here = replace(found.machine, driver=True, gpus=(), threads=8, cores=2, free=2**28)
    rates = {"float32": speed.Rate(10.0, 1.0), "bfloat16": speed.Rate(30.0, 1.0)}
    kernels = speed.Kernels((), {}, False)
    said = "\n".join(under_test._advice(torch, here, "cpu", rates, kernels))
    assert "a driver of NVIDIA's GPUs is here, but this PyTorch" in said
    assert "OMP_NUM_THREADS=2" in said
    assert "only 0.2 GiB of memory are free" in said
    assert "no fused CPU attention that passes our check" in said
    assert "bfloat16 computes matrix products 3.0 times as fast" in said
    fine = replace(here, driver=False, threads=1, free=2**34)
    level = {"float32": speed.Rate(10.0, 1.0), "bfloat16": speed.Rate(9.0, 1.0)}
    quiet = list(under_test._advice(torch, fine, "cpu", level, speed.Kernels(("float32",), {}, False)))
    assert [line for line in quiet if "Apple" not in line] == []


def test_kernels_of_a_gpu_are_listed_with_what_they_do(well: None, empty_cache: Path) -> None:
    cuda = {"flash": ("log-sum-exp", "packed sequences"), "cudnn": ()}
    found = replace(longlens.doctor(), device="cuda", kernels=speed.Kernels(("float32",), cuda, True))
    assert "          CUDA: flash (log-sum-exp, packed sequences), cudnn; exact:flex can compile\n" in str(found)
    # what asks a device for them says no where it has none
    assert list(speed._abilities("flash", torch.bfloat16, torch.device("cpu"))) == []


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_described_with_its_kernels(well: None, empty_cache: Path) -> None:
    found = longlens.doctor()
    assert found.machine.gpus[0].name == torch.cuda.get_device_name(0)
    assert 0 < found.machine.gpus[0].free <= found.machine.gpus[0].memory
    assert found.device == "cuda"
    assert found.kernels is not None
    assert set(found.kernels.cuda) & {"flash", "efficient", "cudnn"}
    assert "CUDA: " in str(found)
    assert "GPU       none" not in str(found)


def test_the_processor_is_read_where_linux_writes_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512_bf16 sse\n")
    monkeypatch.setattr(machine, "CPU_INFO", info)
    found = machine.inspect_machine(torch)
    assert (found.cpu, found.instructions) == ("Some CPU", ("avx2", "avx512_bf16"))
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "nothing")
    assert machine.inspect_machine(None).cpu


def hub_model(cache: Path, name: str, config: str | None, weights: int, commit: str = "abc") -> None:
    folder = cache / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    if config is not None:
        (snapshot / "config.json").write_text(config)
    if weights:
        (snapshot / "model.safetensors").write_bytes(bytes(weights))


def test_the_cache_of_the_hub_is_listed_with_what_is_wrong(well: None, empty_cache: Path) -> None:
    esm = {"model_type": "esm", "vocab_size": 33, "num_hidden_layers": 1, "hidden_size": 32, "mask_token_id": 32,
           "num_attention_heads": 4, "intermediate_size": 64, "position_embedding_type": "rotary"}  # fmt: skip
    hub_model(empty_cache, "facebook/esm2", json.dumps(esm), 3 * 2**20)
    hub_model(empty_cache, "gpt2", '{"model_type": "gpt2"}', 5)
    hub_model(empty_cache, "who/half", json.dumps(esm), 0)
    hub_model(empty_cache, "who/broken", "{", 5)
    hub_model(empty_cache, "who/none", None, 0)
    hub_model(empty_cache, "who/lost", json.dumps(esm), 7)
    (empty_cache / "models--who--lost" / "refs" / "main").write_text("../../..")
    (empty_cache / "models--who--empty").mkdir()
    found = {model.name: model for model in longlens.doctor().models}
    assert found["facebook/esm2"] == models.LocalModel("facebook/esm2", "load", "architecture esm", 3 * 2**20)
    assert found["gpt2"].served == "attach"
    assert found["who/lost"].bytes == 7
    wrong = {"who/half": "no weights", "who/broken": "a configuration that cannot be read",
             "who/none": "no configuration", "who/empty": "no configuration"}  # fmt: skip
    assert {name: found[name].note for name in wrong} == wrong
    text = str(longlens.doctor())
    assert "facebook/esm2: architecture esm, 3.0 MiB\n" in text
    assert "gpt2: architecture gpt2, 5 B; not for load, but longlens.hf.attach may take it\n" in text
    assert "who/half: no weights; incomplete\n" in text


def test_a_long_cache_is_cut_in_the_text_and_whole_in_json(well: None, empty_cache: Path) -> None:
    for number in range(20):
        hub_model(empty_cache, f"who/model{number:02}", '{"model_type": "gpt2"}', 5)
    found = longlens.doctor()
    assert f"and {len(found.models) - under_test.SHOWN} more" in str(found)
    assert len(found.models) >= 20


@pytest.mark.parametrize(
    ("variables", "folder"),
    [
        ({"HF_HUB_CACHE": "/a", "HF_HOME": "/b"}, "/a"),
        ({"HUGGINGFACE_HUB_CACHE": "/c"}, "/c"),
        ({"HF_HOME": "/b"}, "/b/hub"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/huggingface/hub"),
    ],
)
def test_the_cache_is_where_the_hub_keeps_it(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], folder: str
) -> None:
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert models.hub_cache() == Path(folder)


def test_offline_is_said(monkeypatch: pytest.MonkeyPatch, well: None, empty_cache: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(under_test, "installed_version", lambda _: "1.0")
    assert "hub       is switched off by HF_HUB_OFFLINE" in str(longlens.doctor())


@pytest.mark.parametrize("arguments", [["extra"], ["--jsn"], ["--json=yes"]])
def test_wrong_usage_is_2(arguments: list[str]) -> None:
    result = CliRunner().invoke(cli, ["doctor", *arguments])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error: " in result.stderr


def test_it_reaches_for_no_network(well: None, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert run().return_value == 0
