"""What importing longlens brings in, each asked of a fresh Python."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = (
    "torch",
    "numpy",
    "jaxtyping",
    "transformers",
    "triton",
    "ray",
    "matplotlib",
    "pandas",
    "beartype",
    "hypothesis",
    "pytest",
)
CLI_ONLY = ("click", "rich")
OPTIONAL = ("transformers", "triton", "ray", "matplotlib", "pandas", "beartype", "hypothesis", "pytest", *CLI_ONLY)


def modules_after(code: str) -> set[str]:
    """Top-level modules that a fresh Python holds after running `code`; what `code` prints is dropped."""
    report = "import sys; print('MODULES', *{name.partition('.')[0] for name in sys.modules})"
    run = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.splitlines()[-1].split()[1:])


@pytest.mark.parametrize(
    "code",
    [
        "import longlens",
        "import longlens; longlens.__version__; dir(longlens)",
        "import longlens.errors",
        "import longlens.ops.registry",
    ],
)
def test_importing_longlens_is_light(code: str) -> None:
    found = modules_after(code)
    assert "longlens" in found
    assert not found & {*HEAVY, *CLI_ONLY}


def test_torch_itself_brings_what_is_left_out_of_the_next_test() -> None:
    # a guard for the test below: were torch to import one of these, it would have to look at `longlens` modules instead
    assert not modules_after("import torch") & set(OPTIONAL)


def test_attention_brings_torch_and_no_optional_package() -> None:
    found = modules_after(
        "import torch, longlens\n"
        "x = torch.randn(1, 1, 8, 4)\n"
        "longlens.attention(x, x, x, is_causal=True)\n"
        "longlens.attention(x, x, x, method='window:2')\n"
        "longlens.attention(x, x, x, method='linear')"
    )
    assert "torch" in found
    assert not found & set(OPTIONAL)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["methods"], ["methods", "--json"], ["explain", "--help"]]
)
def test_help_and_the_registry_need_no_torch(arguments: list[str]) -> None:
    found = modules_after(
        "import sys\n"
        f"sys.argv = ['longlens', *{arguments!r}]\n"
        "from longlens.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit as stop:\n    assert stop.code == 0"
    )
    assert "click" in found
    assert not found & set(HEAVY)
    assert arguments[0] == "methods" or "rich" not in found
