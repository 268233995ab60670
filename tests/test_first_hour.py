"""docs/first-hour.md, from the wheel in an empty environment to its last line.

No hub can be reached here: a cache of the hub is made, which holds ESM-2's architecture of 8 million parameters with
random weights under the name that the page uses.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from esm_peer import SIZES, esm, save
from longlens.io.alphabet import ESM

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "first-hour.md"
MODEL = "facebook/esm2_t6_8M_UR50D"


@pytest.fixture
def hub(tmp_path):
    """A cache of the hub, as `huggingface_hub` lays it out."""
    repository = tmp_path / "hub" / f"models--{MODEL.replace('/', '--')}"
    commit = "0" * 40
    theirs = esm(*SIZES["8M"])
    torch.manual_seed(0)
    theirs.esm.contact_head.regression.weight.data.normal_(0, 3)
    snapshot = save(theirs, repository / "snapshots" / commit)
    (snapshot / "vocab.txt").write_text("\n".join(ESM.tokens) + "\n")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    return tmp_path / "hub"


def call(*command, **keywords):
    run = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, **keywords)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return run.stdout


# an installation of PyTorch
@pytest.mark.timeout(900)
def test_from_the_wheel_in_an_empty_environment_to_the_last_line(hub, tmp_path):
    wheel, install = re.findall(r"^pip (wheel .*|install 'dist/.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    source = tmp_path / "checkout"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    call(sys.executable, "-m", "venv", tmp_path / "env")
    python = tmp_path / "env" / "bin" / "python"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    call(python, "-m", "pip", *wheel.split(), cwd=source, env=environment)
    target = install.removeprefix("install ").strip("'")
    call(python, "-m", "pip", "install", "-c", ROOT / "constraints.txt", target, cwd=source, env=environment)
    work = tmp_path / "work"
    work.mkdir()
    printed = call(
        python, ROOT / "tests" / "notebook_page.py", PAGE, cwd=work,
        env=environment | {"HF_HUB_CACHE": str(hub), "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"},
    )  # fmt: skip
    assert " 0 wrong" in printed
    assert {"surprise.png", "contacts.png", "substitutions.png", "results", "looked"} <= {
        path.name for path in work.iterdir()
    }
