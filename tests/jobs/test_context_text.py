"""`longlens context` for texts: results, cost, resuming, bad input."""

import csv
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

import longlens
import text_models as texts
from longlens.cli.main import cli
from longlens.errors import LonglensError
from longlens.jobs import context_job
from longlens.testing import peak_growths


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {
        "gpt2": texts.gpt2_folder(root / "gpt2"),
        "bare": texts.gpt2_folder(root / "bare", bos=False),
        "bert": texts.bert_folder(root / "bert"),
        "headless": texts.bert_folder(root / "headless", headless=True),
    }


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(texts.TEXT)
    return path


@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_a_text_is_explained_by_its_words(folders, text, name):
    found = longlens.context(
        text, model=folders[name], targets="nothing", spans=6, exact="all", halve=1, curve=5, figures=False
    )
    tables = found["text"]
    targets, spans = tables["targets"], tables["spans"]
    assert "nothing".startswith(targets["token"][0].strip().lstrip("#")[:3])
    columns = longlens.surprise(text, model=folders[name]).columns()
    # both number a token alike, and read the whole file, its last line feed included
    place = columns["token"].tolist().index(targets["target"][0])
    assert columns["text"][place] == targets["token"][0]
    assert targets["surprise"][0] == pytest.approx(columns["surprise"][place], abs=1e-4)
    whole = (spans["target"] == targets["target"][0]) & (spans["halvings"] == 0)
    assert np.isfinite(spans["exact"]).all()
    assert spans["start"][whole].min() == 1
    if name == "gpt2":
        # nothing behind a target carries it
        assert (spans["stop"] < spans["target"]).all()
    (passes,) = found.passes
    assert passes["forward"] <= passes["predicted_forward"]
    assert passes["backward"] == passes["predicted_backward"] == len(targets["target"])
    assert passes["pieces"] <= passes["predicted_pieces"]


def test_the_most_surprising_tokens_take_one_pass_of_a_causal_model(folders, text):
    found = longlens.context(
        text, model=folders["gpt2"], most_surprising=1, spans=8, exact=2, halve=0, curve=0, figures=False
    )
    (passes,) = found.passes
    # all tokens; the estimate, the prefix, two stretches
    assert passes["forward"] == passes["predicted_forward"] == 1 + 2 + 2
    surprise = found["text"]["surprise"]["surprise"]
    assert int(found["text"]["targets"]["target"][0]) == int(np.nanargmax(surprise))
    assert passes["tokens"] < passes["forward"] * len(surprise)


def test_the_curve_of_a_causal_model_reads_each_piece_once(folders, text):
    found = longlens.context(text, model=folders["gpt2"], targets=12, exact=1, halve=0, curve=1000, figures=False)
    (passes,) = found.passes
    curve = found["text"]["curve"]
    # two cuts of the whole text for each length, however many tokens are predicted
    most = 2 * (curve["tokens"][0] + 1) * len(curve["context"])
    assert 0 < passes["pieces"] <= passes["predicted_pieces"] <= most
    assert curve["tokens"][0] > 40


def test_an_interrupted_job_continues_to_the_same_bytes(folders, text, tmp_path, monkeypatch):
    options = {"model": folders["gpt2"], "most_surprising": 2, "spans": 8, "exact": 2, "curve": 4}
    longlens.context(text, output=tmp_path / "whole", **options)
    before, calls = context_job.target_context, []

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return before(*arguments)

    monkeypatch.setattr(context_job, "target_context", failing)
    with pytest.raises(KeyboardInterrupt, match="run the same command again"):
        longlens.context(text, output=tmp_path / "cut", **options)
    longlens.context(text, output=tmp_path / "cut", **options)
    assert len(calls) == 3
    for path in (tmp_path / "whole").rglob("*"):
        if path.is_file() and path.name != "manifest.json":
            assert (tmp_path / "cut" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes(), path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "nowhere"}, "a word of the text, got 'nowhere'"),
        ({"targets": 0}, "targets in 1-"),
        ({"targets": 5000}, "targets in 1-"),
        ({"targets": 5000, "model": "bare"}, "targets in 1-"),
        ({"targets": 0, "model": "bare"}, "from 1 on, got 0: nothing comes before"),
        ({"spans": "20-30", "targets": 9}, "or what comes after it"),
        ({"spans": "0-4"}, "spans within 1-"),
        ({"model": "headless"}, "head"),
        ({"model": "tiny"}, "a model of text"),
        ({"input": "words"}, "'auto', 'proteins' or 'text'"),
        ({"input": "proteins"}, "expected"),
        ({"max_memory": "1M"}, "raise --max-memory"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_written(folders, text, tmp_path, options, message):
    model = options.pop("model", "gpt2")
    with pytest.raises(LonglensError, match=message):
        longlens.context(
            text, model=folders.get(model, model), output=tmp_path / "out", curve=0, figures=False, **options
        )
    assert not (tmp_path / "out").exists()


def test_a_text_beyond_the_positions_is_refused(tmp_path):
    folder = texts.gpt2_folder(tmp_path / "short", positions=16)
    with pytest.raises(LonglensError, match="at most 16 tokens, as many as"):
        longlens.context(texts.TEXT, input="text", model=folder, figures=False)


@pytest.mark.parametrize("figures", [False, True])
def test_a_stretch_that_leaves_nothing_to_predict_from_has_no_value_and_a_note(folders, text, figures):
    found = longlens.context(
        text, model=folders["bare"], targets=9, spans="0-8,2-4", exact="all", halve=1, curve=0, figures=figures
    )
    spans = found["text"]["spans"]
    row = (spans["start"] == 0) & (spans["stop"] == 8)
    assert row.sum() == 1
    assert np.isnan(spans["exact"][row]).all()
    assert np.isnan(spans["estimate"][row]).all()
    assert spans["note"][row].tolist() == [
        "not defined: the query that predicts the target has no key left to attend to"
    ]
    assert np.isfinite(spans["exact"][~row]).all()
    assert set(spans["note"][~row]) == {""}
    # halves of the other one
    assert spans["halvings"].max() > 0
    with (found.path(0) / "spans.csv").open(newline="", encoding="utf-8") as file:
        written = next(line for line in csv.DictReader(file) if line["stop"] == "8")
    assert (written["estimate"], written["exact"]) == ("", "")
    # nor is there anything where it is the only stretch
    alone = longlens.context(text, model=folders["bare"], targets=9, spans="0-8", curve=0, figures=figures)
    assert np.isnan(alone["text"]["spans"]["exact"]).all()
    assert np.isfinite(alone["text"]["targets"]["surprise"]).all()
    assert np.abs(alone["text"]["keys"]["estimate"]).sum() > 0


def test_stretches_are_shown_as_they_stand_in_the_text(folders, text):
    found = longlens.context(text, model=folders["bert"], targets="nothing", spans=6, halve=0, curve=0, figures=False)
    shown = found["text"]["spans"]["tokens"]
    assert all(stretch in texts.TEXT for stretch in shown)
    assert sum(" " in stretch for stretch in shown) > 3


def test_the_command_takes_texts_and_standard_input(folders, tmp_path):
    arguments = ["context", "-", "-o", tmp_path / "out", "-m", folders["gpt2"], "--targets", "12", "--spans", "4",
                 "--exact", "2", "--curve", "0", "--no-figures"]  # fmt: skip
    result = CliRunner().invoke(cli, list(map(str, arguments)), input=texts.TEXT, catch_exceptions=False)
    assert result.exit_code == 0
    assert "1 backward passes" in result.output


@pytest.mark.memory
def test_memory_is_linear_in_the_tokens():
    cases = [{"tokens": tokens} for tokens in (2000, 4000)]
    here = str(Path(__file__).parent)
    found = peak_growths("context_pass:of_text", cases, path=[here], warm_up={"tokens": 64}, runs=1)
    assert found[1] <= 2.15 * found[0]
