"""The plan and the limit mean the whole process, compared with processes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from packed_pass import CONFIG

from esm_peer import protein
from longlens.errors import InputError
from longlens.io.alphabet import ESM
from longlens.jobs.memory import (
    MIB,
    WRITING,
    batch_limit,
    model_size,
    parameter_count,
    predict_peak,
    process_bytes,
    refuse_large_model,
    total_limit,
)
from longlens.jobs.plan import BatchOutputs
from longlens.models.language_model import MaskedLM
from longlens.models.parts.positions import LearnedPositions
from longlens.models.pretrained import load, save

# the child of a child of this process: RUSAGE_CHILDREN's peak would be that of an earlier test
MEASURE = """
import resource, subprocess, sys
code = subprocess.run([sys.executable, "-m", "longlens", *sys.argv[1:]], stdout=sys.stderr).returncode
print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
"""


def measured(*arguments: object) -> tuple[int, int, str]:
    """Exit code, peak resident bytes and messages of a command."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    child = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    code, peak = map(int, child.stdout.split()[-2:])
    return code, peak, child.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 46 MiB, and proteins."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    save(MaskedLM(replace(CONFIG, layers=10), ESM), path / "weights")
    (path / "p.fasta").write_text("".join(f">p{i}\n{protein(600, i)}\n" for i in range(8)))
    return path


@pytest.mark.memory
@pytest.mark.skipif(sys.platform != "linux", reason="RSS is counted in another way")
def test_a_process_stays_within_its_limit_and_near_its_plan(folder):
    common = (folder / "p.fasta", "-m", folder / "weights", "--max-memory", "700M")
    _, _, text = measured("plan", *common)
    amount, unit = re.search(r"about ([\d.]+) (MiB|GiB) for the whole process", text).groups()
    planned = float(amount) * {"MiB": 2**20, "GiB": 2**30}[unit]
    code, peak, text = measured("embed", *common, "-o", folder / "out")
    assert code == 0, text
    assert peak <= 700 * MIB
    # 100 MiB less where the files of libraries are not in the page cache: fewer of their pages are mapped then
    assert planned / 1.5 <= peak <= planned
    # not even the weights fit: said before they are read
    code, peak, text = measured(
        "embed", folder / "p.fasta", "-m", folder / "weights", "--max-memory", "400M", "-o", "no"
    )
    assert code == 2
    assert "loading the model takes about" in text
    assert peak <= 400 * MIB


@pytest.mark.memory
@pytest.mark.skipif(sys.platform != "linux", reason="RSS is counted in another way")
@pytest.mark.parametrize(
    ("command", "enough", "too_little", "words"),
    [
        (("look", "--no-figures"), "780M", "600M", "(p0), 600 residues: needs about"),
        (("score", "--all", "--sequence", protein(120, 0)), "650M", "540M", "tokens of masked copies: needs about"),
    ],
)
def test_every_job_stays_within_its_limit(folder, tmp_path, command, enough, too_little, words):
    name, *more = command
    (tmp_path / "q.fasta").write_text(f">p0\n{protein(600, 0)}\n")
    given = [tmp_path / "q.fasta"] if name == "look" else []
    common = (name, *given, *more, "-m", folder / "weights", "-o", tmp_path / "out")
    code, _, text = measured(*common, "--max-memory", too_little)
    assert code == 2, text
    assert words in text
    assert not (tmp_path / "out").exists()
    code, peak, text = measured(*common, "--max-memory", enough)
    assert code == 0, text
    assert peak <= int(enough[:-1]) * MIB


def test_parameters_are_counted_from_the_configuration(folder):
    absolute = replace(CONFIG, positions=LearnedPositions(64), pre_norm=False)
    for config in (CONFIG, replace(CONFIG, width=64, heads=2, feed_forward=100), absolute):
        model = MaskedLM(config, ESM)
        assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())
    size = model_size(folder / "weights", "bfloat16", "cpu")
    model = load(folder / "weights", dtype="bfloat16", device="cpu")
    assert size.weights == sum(parameter.nbytes for parameter in model.parameters())
    assert size.largest >= 4 * max(parameter.numel() for parameter in model.parameters())


def test_limits_leave_room_for_all_that_comes_beside_a_batch(folder):
    cpu = torch.device("cpu")
    size = model_size(folder / "weights", "float32", "cpu")
    peak = predict_peak(size, 4000, BatchOutputs(0, 1))
    assert peak.total == peak.libraries + peak.weights + max(peak.loading, peak.batch, peak.writing)
    held = 500 * MIB
    room = batch_limit(2**30, held, cpu)
    assert 0 < room < 2**30 - held
    with pytest.raises(InputError, match="raise --max-memory"):
        batch_limit(held + WRITING - 1, held, cpu)
    assert total_limit("2G", cpu) == 2**31
    assert total_limit(None, cpu) > process_bytes()
    refuse_large_model(size, "64G")
    with pytest.raises(InputError, match=r"loading the model takes about .* allowed for the whole process"):
        refuse_large_model(size, "50M")
