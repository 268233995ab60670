"""`longlens.context` for proteins: exact hiding, its estimate, the copy task, the cost, resuming, bad input."""

import copy
import csv
from pathlib import Path
from types import SimpleNamespace

import context_pass
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from scipy.stats import spearmanr

import copy_task
import longlens
from longlens.cli.main import cli
from longlens.errors import InputError
from longlens.jobs import context_job
from longlens.jobs.context import curve_lengths, curve_pieces, most_surprising
from longlens.jobs.context_protein import HidingAttend, ProteinContext, protein_bytes
from longlens.jobs.context_regions import chosen_targets, hidden_from, parse_ranges, read_bed, regular_spans
from longlens.testing import peak_growths

# heavy chain of trastuzumab, and the beginning of E. coli's chorismate mutase
VH = (
    "EVQLVESGGGLVQPGGSLRLSCAASGFNIKDTYIHWVRQAPGKGLEWVARIYPTNGYTRYADSVKGRFTISADTSKNTAYLQMNSLRAEDTAVYYCSRWGGDG"
    "FYAMDYWGQGTLVTVSS"
)
MUTASE = "MTSENPLLALREKISALDEKLLALLAERRELAVEVGKAKLLSHRPVRDIDRERDLLERLITLGKAHHLDAHYITRLFQLIIEDSVLTQQALLQQHLNKINP"


@pytest.fixture(scope="module")
def tiny():
    return longlens.load("tiny")


@pytest.fixture(scope="module")
def copying():
    return copy_task.trained()


def _dense(keep):
    """Attention by its definition in float64, with hidden keys; `keep` (N,)."""

    def attend(query, key, value, *, layer, scale, cu_seqlens):
        scores = (scale * query @ key.transpose(2, 3)).masked_fill(~keep, -torch.inf)
        return scores.softmax(-1) @ value

    return attend


@pytest.mark.parametrize("name", ["tiny", "antiberty"])
def test_the_exact_form_is_the_model_with_the_stretch_masked(name):
    model = longlens.load(name)
    double = copy.deepcopy(model).double()
    subject, wide = (ProteinContext(each, MUTASE[:60]) for each in (model, double))
    spans = [(1, 9), (20, 33), (33, 34), (1, 61)]
    got, got_wide = (each.surprise([30, 30, 12, 12], spans) for each in (subject, wide))
    for place, (target, span) in enumerate(zip([30, 30, 12, 12], spans, strict=True)):
        keep = torch.ones(62, dtype=torch.bool)
        keep[slice(*span)] = False
        keep[target] = True
        tokens = double.pack([MUTASE[:60]])
        truth = tokens.tokens[target].item()
        tokens.tokens[target] = double.alphabet.mask
        logits = double.logits(double(tokens, attend=_dense(keep)).last)[target]
        expected = -torch.log_softmax(logits, 0)[truth].item()
        assert got_wide[place] == pytest.approx(expected, rel=1e-9)
        assert got[place] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def _correlations(subject, targets, spans, estimating=None):
    """Spearman of estimate and exact for each target; `estimating`: another subject that gives the estimate."""
    estimate = (estimating or subject).estimate(targets, spans).spans
    base = subject.surprise(targets)
    out = []
    for row, target in enumerate(targets):
        exact = subject.surprise([target] * len(spans), spans) - base[row]
        out.append(spearmanr(estimate[row], exact).statistic)
    return np.array(out)


def _shuffled(model):
    """The model with the weights of each matrix in random order."""
    generator, out = torch.Generator().manual_seed(0), copy.deepcopy(model)
    for parameter in out.parameters():
        if parameter.ndim == 2:
            order = torch.randperm(parameter.numel(), generator=generator)
            parameter.data = parameter.data.flatten()[order].view_as(parameter)
    return out


@pytest.mark.parametrize(
    ("name", "sequence", "targets", "width", "least"),
    [("tiny", MUTASE, [9, 41, 64, 95], 8, 0.9), ("antiberty", VH, [30, 95], 12, 0.7)],
)
def test_the_estimate_ranks_stretches_as_hiding_them_does(name, sequence, targets, width, least):
    model = longlens.load(name)
    subject = ProteinContext(model, sequence)
    spans = regular_spans(range(1, len(sequence) + 1), width)
    correlations = _correlations(subject, targets, spans)
    assert correlations.mean() > least
    broken = _correlations(subject, targets, spans, ProteinContext(_shuffled(model), sequence))
    assert abs(broken.mean()) < 0.4


def test_in_a_copy_task_both_forms_point_at_what_is_copied(copying):
    examples = copy_task.draw(np.random.default_rng(1), 24)
    shares, correlations = {}, {}
    for name, model in {"trained": copying, "untrained": copy_task.untrained()}.items():
        exact, estimate, ranks = [], [], []
        for sequence, stretch in examples:
            subject = ProteinContext(model, sequence)
            target = copy_task.LENGTH
            hidden = subject.surprise([target] * len(copy_task.SPANS), copy_task.SPANS)
            exact.append(int(hidden.argmax()) == stretch)
            estimated = subject.estimate([target], copy_task.SPANS).spans[0]
            estimate.append(int(estimated.argmax()) == stretch)
            ranks.append(spearmanr(estimated, hidden).statistic)
        shares[name], correlations[name] = (np.mean(exact), np.mean(estimate)), np.mean(ranks)
    assert shares["trained"][0] > 0.9
    # one of four by chance; the estimate depends on the model more than the exact form does
    assert shares["trained"][1] > 0.5
    assert correlations["trained"] > 0.3
    assert max(shares["untrained"]) < 0.6


def test_the_cost_is_as_stated(tiny):
    """Counted at the model's embedding: each packed sequence of the whole length is a pass."""
    counted = {"forward": 0, "pieces": 0}
    length = 40

    def count(module, args):
        lengths = args[0].cu_seqlens.diff().tolist()
        whole = sum(number == length + 2 for number in lengths)
        counted["forward"] += whole
        counted["pieces"] += sum(lengths) - whole * (length + 2)

    model = copy.deepcopy(tiny)
    model.encoder.register_forward_pre_hook(count)
    said = []
    found = longlens.context(
        {"a": MUTASE[:length]}, model=model, targets=[7, 23], spans=8, exact=3, curve=4, figures=False,
        progress=lambda event: said.append(str(event)),
    )  # fmt: skip
    (passes,) = found.passes
    assert passes["forward"] == passes["predicted_forward"] == 2 * (2 + 3 + 2 * 3)
    assert passes["backward"] == passes["predicted_backward"] == 2
    # the curve's last pieces are the whole
    assert counted["forward"] == passes["forward"] + 4
    assert counted["pieces"] == passes["pieces"] - 4 * (length + 2)
    assert passes["pieces"] <= passes["predicted_pieces"]
    assert any("at most 22 forward and 2 backward passes" in line for line in said)


def test_results_agree_with_the_parts(tiny):
    found = longlens.context({"a": MUTASE}, model=tiny, targets="L7,L8", spans=16, exact="all", curve=0, figures=False)
    spans, keys = found["a"]["spans"], found["a"]["keys"]
    subject = ProteinContext(tiny, MUTASE)
    whole = spans["halvings"] == 0
    for target in (7, 8):
        rows = whole & (spans["target"] == target)
        regular = regular_spans(range(1, len(MUTASE) + 1), 16)
        estimate = subject.estimate([target], regular)
        np.testing.assert_allclose(spans["estimate"][rows], estimate.spans[0], atol=1e-5)
        np.testing.assert_allclose(keys["estimate"][keys["target"] == target], estimate.keys[0], atol=1e-5)
        exact = subject.surprise([target] * len(regular), regular) - subject.surprise([target])[0]
        np.testing.assert_allclose(spans["exact"][rows], exact, atol=1e-4)
    # halves: two of 8, two of 4, two of 2, two of 1
    halves = spans["stop"][~whole & (spans["target"] == 7)] - spans["start"][~whole & (spans["target"] == 7)] + 1
    assert halves.tolist() == [8, 8, 4, 4, 2, 2, 1, 1]
    assert found["a"]["targets"]["token"].tolist() == ["L", "L"]
    assert found.to_frame("a", "targets")["target"].tolist() == [7, 8]


def test_the_most_surprising_are_the_default(tiny):
    found = longlens.context(
        {"a": MUTASE[:50]}, model=tiny, most_surprising=2, exact=1, halve=0, curve=0, figures=False
    )
    surprise = found["a"]["surprise"]["surprise"]
    assert np.isnan(surprise[[0, -1]]).all()
    expected = longlens.embed({"a": MUTASE[:50]}, model=tiny, include=["surprise"], surprise="masked")
    np.testing.assert_allclose(surprise[1:-1], expected.residues("surprise", "a"), atol=1e-4)
    assert found["a"]["targets"]["target"].tolist() == most_surprising(surprise, 2)
    assert found["a"]["targets"]["surprise"][0] == pytest.approx(np.nanmax(surprise), abs=1e-4)


def test_the_curve_shows_each_token_so_many_tokens(tiny):
    assert curve_lengths(100) == [16, 32, 64, 100]
    assert curve_lengths(3000) == [64, 128, 256, 512, 1024, 2048, 3000]
    for causal in (False, True):
        for target in range(100):
            for length in (16, 32):
                ((start, stop),) = curve_pieces([target], 100, length, causal=causal)
                assert start <= target < stop
                assert stop - start <= length
                before, after = target - start, stop - 1 - target
                assert start == 0 or before >= (length // 2 if causal else length // 4)
                assert causal or stop == 100 or after >= length // 4 - 1
    found = longlens.context({"a": MUTASE}, model=tiny, targets=5, exact=1, halve=0, curve=500, figures=False)
    curve, tokens = found["a"]["curve"], found["a"]["curve_tokens"]
    assert curve["context"].tolist() == [16, 32, 64, len(MUTASE) + 2]
    assert curve["tokens"].tolist() == [len(MUTASE)] * 4
    whole = tokens["surprise"][tokens["context"] == len(MUTASE) + 2]
    masked = longlens.embed({"a": MUTASE}, model=tiny, include=["surprise"], surprise="masked").residues(
        "surprise", "a"
    )
    np.testing.assert_allclose(whole, masked, atol=1e-4)
    np.testing.assert_allclose(curve["gain"][1:], -np.diff(curve["surprise"]), atol=2e-6)
    # a piece is a part of the token sequence, without start and end tokens of its own
    row = (tokens["context"] == 16) & (tokens["token"] == 40)
    ((start, stop),) = curve_pieces([40], len(MUTASE) + 2, 16, causal=False)
    packed = tiny.pack([MUTASE])
    piece = packed.tokens[start:stop].clone()
    piece[40 - start] = tiny.alphabet.mask
    hidden = tiny(type(packed)(piece, torch.tensor([0, stop - start], dtype=torch.int32))).last
    expected = -torch.log_softmax(tiny.logits(hidden)[40 - start], 0)[packed.tokens[40]].item()
    assert tokens["surprise"][row].item() == pytest.approx(expected, abs=1e-4)


def test_an_interrupted_job_continues_to_the_same_bytes(tiny, tmp_path, monkeypatch):
    proteins = {"a": MUTASE[:20], "b": VH[:20]}
    options = {"model": tiny, "most_surprising": 2, "spans": 8, "exact": 2, "curve": 4}
    longlens.context(proteins, output=tmp_path / "whole", **options)
    before = context_job.target_context
    calls = []

    def failing(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return before(*args)

    monkeypatch.setattr(context_job, "target_context", failing)
    with pytest.raises(KeyboardInterrupt, match="run the same command again"):
        longlens.context(proteins, output=tmp_path / "cut", **options)
    longlens.context(proteins, output=tmp_path / "cut", **options)
    # four targets, one of which was begun twice
    assert len(calls) == 5
    files = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*") if path.is_file())
    assert {path.name for path in files} >= {"spans.csv", "keys.parquet", "curve.png", "curve.parquet", "passes.csv"}
    for path in files:
        if path.name != "manifest.json":
            assert (tmp_path / "cut" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes(), path


def _subject(labels="<MKTA>", *, causal=False):
    special = np.array([label in "<>" for label in labels])
    return SimpleNamespace(labels=list(labels), special=special, causal=causal, find=lambda word: [])


def test_targets_and_stretches_are_read():
    assert chosen_targets(_subject(), ["2", "K2", "3-4", "t3"], "x") == [2, 3, 4]
    assert parse_ranges("10-20, 40", "stretches") == [(10, 21), (40, 41)]
    assert hidden_from(_subject(), 3, [(1, 3), (3, 4), (3, 5)]) == [(1, 3), (3, 5)]
    assert hidden_from(_subject(causal=True), 3, [(1, 3), (2, 5), (3, 5), (1, 4)]) == [(1, 3), (2, 3)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": 41}, r"targets in 1-40, got 41"),
        ({"targets": "0"}, r"targets in 1-40, got 0"),
        ({"targets": "K1"}, "expected K at 1, as in K1, found M"),
        ({"targets": "5-99999999999"}, "targets in 1-40"),
        ({"targets": "here"}, "expected a target as a number"),
        ({"targets": ""}, "expected a target as a number"),
        ({"targets": "9-5"}, "their first number first"),
        ({"spans": "30-41"}, "spans within 1-40, got 30-41"),
        ({"spans": "0-5"}, "spans within 1-40, got 0-5"),
        ({"spans": "5-"}, "expected spans as numbers and ranges"),
        ({"spans": 0}, "expected spans of at least 1 token, got 0"),
        ({"spans": "0"}, "expected spans of at least 1 token, got 0"),
        ({"spans": True}, "expected spans of at least 1 token, got True"),
        ({"most_surprising": 0}, "expected most_surprising as a whole number of at least 1, got 0"),
        ({"tokens_per_batch": 0}, "expected tokens_per_batch as a whole number of at least 1, got 0"),
        ({"spans": [(5,)]}, "pairs of first and last"),
        ({"spans": [(9, 5)]}, "their first number first"),
        ({"spans": "7", "targets": 7, "exact": 0}, "exact as a whole number of at least 1"),
        ({"exact": "some"}, "expected exact, .* or 'all', got 'some'"),
        ({"curve": -1}, "curve as a whole number of at least 0"),
        ({"spans": "7-7", "targets": 7}, "7 alone"),
        ({"max_memory": "1M"}, "--max-memory"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(tiny, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        longlens.context({"a": MUTASE[:40]}, model=tiny, output=tmp_path / "out", figures=False, **options)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--most-surprising", "0"), ("--exact", "0"), ("--exact", "some"), ("--halve", "-1"), ("--curve", "-1"),
        ("--tokens-per-batch", "0"), ("--spans", "0"), ("--spans", "5-"), ("--spans", "9-5"),
    ],
)  # fmt: skip
def test_the_command_names_the_option_that_was_typed(tmp_path, option, value):
    fasta = tmp_path / "a.fasta"
    fasta.write_text(f">one\n{MUTASE[:30]}\n")
    arguments = ["context", str(fasta), "-o", str(tmp_path / "out"), "-m", "tiny", option, value]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 2
    assert f"Invalid value for '{option}'" in result.stderr
    assert value.lstrip("-") in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_bed_file_names_stretches_by_sequence(tiny, tmp_path):
    bed = tmp_path / "regions.bed"
    bed.write_text("# regions\na\t4\t9\tloop\nb\t0\t3\n")
    assert read_bed(bed) == {"a": [(5, 10)], "b": [(1, 4)]}
    found = longlens.context({"a": MUTASE[:40]}, model=tiny, targets=20, spans=bed, halve=0, curve=0, figures=False)
    assert found["a"]["spans"]["tokens"].tolist() == [MUTASE[4:9]]
    with pytest.raises(InputError, match="a line with its id"):
        longlens.context({"c": MUTASE[:40]}, model=tiny, spans=bed, figures=False)
    bed.write_text("a\t9\t4\n")
    with pytest.raises(InputError, match=r"regions\.bed, line 1"):
        longlens.context({"a": MUTASE[:40]}, model=tiny, spans=bed, figures=False)
    with pytest.raises(InputError, match="nothing"):
        longlens.context({"a": MUTASE[:40]}, model=tiny, spans=tmp_path / "nothing.bed", figures=False)


def test_a_model_without_a_head_is_refused(tiny):
    headless = copy.deepcopy(tiny)
    headless.head = None
    with pytest.raises(InputError, match="language model's head"):
        longlens.context({"a": MUTASE[:40]}, model=headless, figures=False)


def test_the_weights_keep_their_gradients(tiny):
    """A model that is being trained gets no gradients from an estimate."""
    model = copy.deepcopy(tiny).requires_grad_(True)
    ProteinContext(model, MUTASE[:30]).estimate([5], [(10, 15)])
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.encoder.recompute


def test_copies_do_not_depend_on_how_they_are_packed(tiny):
    spans = regular_spans(range(1, 41), 8)
    one, many = (ProteinContext(tiny, MUTASE[:40], budget) for budget in (1, 10_000))
    targets = [7] * len(spans)
    np.testing.assert_allclose(one.surprise(targets, spans), many.surprise(targets, spans), atol=1e-5)
    assert HidingAttend(3).keep is None


def test_the_command_writes_and_says_what_it_took(tmp_path):
    fasta = tmp_path / "a.fasta"
    fasta.write_text(f">one\n{MUTASE[:30]}\n")
    out = tmp_path / "out"
    arguments = ["context", str(fasta), "-o", str(out), "-m", "tiny", "--targets", "5", "--spans", "8", "--exact", "2",
                 "--halve", "0", "--curve", "0", "--no-figures"]  # fmt: skip
    result = CliRunner().invoke(cli, arguments, catch_exceptions=False)
    assert result.exit_code == 0
    assert "4 forward and 1 backward passes" in result.output
    with (out / "1_one" / "spans.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 4
    wrong = [*arguments[:6], "--targets", "31", "--no-figures", "-o", str(tmp_path / "other")]
    with pytest.raises(InputError, match="targets in 1-30"):
        CliRunner().invoke(cli, wrong, catch_exceptions=False)


@pytest.mark.memory
def test_memory_of_the_estimate_is_linear_and_near_what_was_predicted():
    cases = [{"length": length} for length in (1000, 2000)]
    here = str(Path(__file__).parent)
    found = peak_growths("context_pass:estimate", cases, path=[here], warm_up={"length": 64}, runs=1)
    assert found[1] <= 2.1 * found[0]
    for case, growth in zip(cases, found, strict=True):
        predicted = protein_bytes(context_pass.model(), case["length"] + 2, 1, context_pass.SPANS)
        assert 0.5 * predicted <= growth <= 1.05 * predicted
