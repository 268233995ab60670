"""Similarity, clusters and splits: families stay together, leaks are counted, nothing grows with the square."""

from __future__ import annotations

import random

import numpy as np
import pytest

from esm_peer import protein
from longlens.errors import InputError, SequenceError
from longlens.finetuning import similarity
from longlens.finetuning.comparison import Comparison, refuse_missing
from longlens.finetuning.similarity import WordIndex, greedy_clusters, local_identity, local_pairs, nearest
from longlens.finetuning.splits import choose_kind, make_split, read_clusters
from longlens.finetuning.targets import CAP, class_weights, make_targets, parse_task
from longlens.io.fasta import FastaRecord
from longlens.io.targets import LabelledProtein

STANDARD = "ACDEFGHIKLMNPQRSTVWY"


def mutated(sequence, share, seed):
    draw = random.Random(seed)
    return "".join(draw.choice(STANDARD) if draw.random() < share else residue for residue in sequence)


@pytest.fixture(scope="module")
def families():
    """Twelve families of five proteins, the members about 70 % identical to the first."""
    first = [protein(90 + 3 * number, 50 + number) for number in range(12)]
    return [mutated(start, 0.3, 7 * number + member) if member else start
            for number, start in enumerate(first) for member in range(5)]  # fmt: skip


def test_identity_over_the_shorter_sequence():
    a = protein(80, 1)
    assert local_identity(a, a) == 1.0
    assert local_identity(a, a[20:60]) == 1.0
    assert local_identity(a[:40], a + protein(40, 2)) == 1.0
    changed = a[:30] + "W" + a[31:]
    assert local_identity(a, changed) == pytest.approx(79 / 80, abs=1e-9)
    # an insertion is no mismatch
    assert local_identity(a, a[:40] + "GGG" + a[40:]) == 1.0
    assert [int(x) for x in local_pairs(a, a[:40] + "GGG" + a[40:])[60]] == [60, 63]


def test_unrelated_proteins_are_unlike_however_short():
    found = [local_identity(protein(25, seed), protein(25, seed + 500)) for seed in range(60)]
    assert max(found) < 0.3
    assert np.mean(np.array(found) == 0) > 0.95


def test_long_pairs_are_estimated_without_a_matrix(monkeypatch):
    a = "".join(random.Random(1).choices(STANDARD, k=4000))
    b = mutated(a, 0.2, 3)
    exact = local_identity(a, b)
    monkeypatch.setattr(similarity, "CELLS", 1000)
    assert local_identity(a, b) == pytest.approx(exact, abs=0.03)


@pytest.mark.parametrize(("length", "found_at_least"), [(80, 0.7), (150, 0.85), (300, 0.95), (700, 0.95)])
def test_the_filter_finds_distant_relatives_and_few_others(length, found_at_least):
    draw = random.Random(length)
    found, others = [], []
    for seed in range(40):
        ancestor = "".join(draw.choices(STANDARD, k=length))
        relative = mutated(ancestor, 0.65, seed)
        index = WordIndex()
        index.add(0, ancestor)
        if local_identity(ancestor, relative) >= 0.3:
            found.append(index.candidates(relative) == [0])
        others.append(index.candidates("".join(draw.choices(STANDARD, k=length))) == [0])
    assert len(found) >= 10
    assert np.mean(found) >= found_at_least
    assert np.mean(others) < 0.1


def test_families_are_clusters(families):
    clusters = greedy_clusters(families, 0.3)
    for number in range(12):
        assert len(set(clusters[5 * number : 5 * number + 5].tolist())) == 1
    assert len(set(clusters.tolist())) == 12
    # the representative is the longest
    assert all(len(families[own]) >= len(families[member]) for member, own in enumerate(clusters))
    assert greedy_clusters(families, 0.99).tolist() != clusters.tolist()


def test_the_nearest_training_protein(families):
    training = [number for number in range(60) if number % 5 != 2]
    queries = [number for number in range(60) if number % 5 == 2]
    found = nearest(families, queries, training)
    assert all(neighbour.number // 5 == query // 5 for query, neighbour in zip(queries, found, strict=True))
    for query, neighbour in zip(queries, found, strict=True):
        brute = max(local_identity(families[query], families[other]) for other in training)
        assert neighbour.identity == brute
    assert nearest(["WWWWWWWW", "AAAAAAAA"], [0], [1])[0].number == -1


def compare(families, given, kind, **more):
    return Comparison.make(families, given, kind, more.get("clusters"), more.get("seed", 0), lambda done: None)


def test_clusters_never_lie_on_both_sides_and_a_random_split_leaks(families):
    none = [""] * 60
    for seed in range(3):
        comparison = compare(families, none, "clusters", seed=seed)
        split = comparison.split
        assert [len(split.members(name)) for name in ("train", "validation", "test")] == [40, 10, 10]
        for number in range(12):
            assert len(set(split.sets[5 * number : 5 * number + 5])) == 1
        assert comparison.warnings() == []
        assert comparison.leaks()["test"].alike == 0
    leaking = compare(families, none, "random")
    count = leaking.leaks()["test"].alike
    # by definition: a relative among the training proteins
    relatives = [
        any(leaking.split.sets[other] == "train" for other in range(60) if other // 5 == number // 5)
        for number in leaking.split.members("test")
    ]
    assert count == sum(relatives) >= 7
    random_warning, _, test_warning = leaking.warnings()
    twins = [leaking.leaks()[name].near_twins for name in ("validation", "test")]
    assert "the split is random" in random_warning
    assert f"{twins[0]} of 9 validation and {twins[1]} of 9 test proteins are near twins" in random_warning
    assert f"{count} of 9 test proteins are 30% or more identical" in test_warning
    assert "50% to 70%" in test_warning
    again = Comparison.from_json(leaking.as_json())
    assert (again.split, again.neighbours, again.warnings()) == (leaking.split, leaking.neighbours, leaking.warnings())


def test_a_given_split_is_kept_and_its_leaks_are_counted(families):
    given = ["test" if number % 5 == 4 else "train" for number in range(60)]
    comparison = compare(families, given, "given")
    split = comparison.split
    assert split.members("test") == [number for number in range(60) if number % 5 == 4]
    validation = split.members("validation")
    assert 4 <= len(validation) <= 12
    # whole clusters of the training proteins
    for number in validation:
        assert all(split.sets[other] != "train" for other in range(60) if other // 5 == number // 5)
    assert comparison.leaks()["test"].alike == sum(
        any(split.sets[other] == "train" for other in range(60) if other // 5 == number // 5)
        for number in split.members("test")
    )


@pytest.mark.parametrize(
    ("kind", "given", "said"),
    [
        ("given", ["train", "train", "train"], "expected proteins of SET=test, got none"),
        ("given", ["test", "test", "test"], "expected proteins of SET=train, got none"),
        ("clusters", ["", "", ""], "none for validation and test: the 3 proteins form 1 clusters"),
    ],
)
def test_empty_sets_are_refused(kind, given, said):
    with pytest.raises(InputError, match=said):
        make_split(kind, given, np.zeros(3, np.int64), 0)


def test_kinds_of_splits():
    assert choose_kind("auto", ["", ""]) == "clusters"
    assert choose_kind("auto", ["train", "test"]) == "given"
    with pytest.raises(InputError, match=r"expected SET=train and SET=test in the file"):
        choose_kind("given", ["", ""])
    with pytest.raises(InputError, match=r"expected a split of auto, given, clusters, random, got 'rnd'"):
        choose_kind("rnd", [""])


def test_clusters_of_mmseqs(tmp_path):
    path = tmp_path / "c.tsv"
    path.write_text("a\ta\na\tb\nc\tc\n")
    assert read_clusters(path, ["a", "c", "b"]).tolist() == [0, 1, 0]
    with pytest.raises(SequenceError, match="expected every protein in a cluster, 1 are not, the first 'd'"):
        read_clusters(path, ["a", "d"])
    path.write_text("a\ta\na b c\n")
    with pytest.raises(SequenceError, match="line 2: expected a representative and a member"):
        read_clusters(path, ["a"])
    with pytest.raises(SequenceError, match="expected MMseqs2's table"):
        read_clusters(tmp_path / "none.tsv", ["a"])


def labelled(*targets, name="sequence_to_class"):
    proteins = [
        LabelledProtein(FastaRecord(str(number), "", "MK", "f", number), "MK", target, "", f"f, line {number}")
        for number, target in enumerate(targets, 1)
    ]
    return make_targets(parse_task(name), proteins)


def test_classes_and_values():
    targets = labelled(*[("b",)] * 3, *[("a",)] * 4)
    assert targets.classes == ("a", "b")
    assert [values[0] for values in targets.values] == [1, 1, 1, 0, 0, 0, 0]
    # of two, the rarer one is the second, by targets and not by proteins
    assert labelled(*[("a",)] * 3, *[("b",)] * 4).classes == ("b", "a")
    assert labelled(*[("a", "a", "b")] * 3, name="residue_to_class").classes == ("a", "b")
    assert labelled(*[("b", "b", "a")] * 3, name="residue_to_class").classes == ("b", "a")
    assert labelled(*[("a",)] * 3, *[("b",)] * 4, *[("c",)] * 5).classes == ("a", "b", "c")
    with pytest.raises(SequenceError, match="expected values that differ, got the same value for all proteins"):
        labelled(("2",), ("2.0",), name="sequence_to_value")
    with pytest.raises(SequenceError, match="expected values that differ"):
        # whose standard deviation in float64 is 5.6e-17
        labelled(*[("0.3",)] * 30, name="sequence_to_value")
    values = labelled(("1.5", ""), ("nan", "-2"), name="residue_to_value").values
    np.testing.assert_array_equal(values, [[1.5, np.nan], [np.nan, -2]])
    with pytest.raises(
        SequenceError, match=r"line 4: expected each class in at least 3 proteins, got 1 with class 'b'"
    ):
        labelled(*[("a",)] * 3, ("b",))
    with pytest.raises(SequenceError, match="for numbers use sequence_to_value"):
        labelled(*[(str(number / 7),) for number in range(9)])
    with pytest.raises(SequenceError, match="expected at least 2 classes, got a"):
        labelled(("a",), ("a",))
    with pytest.raises(SequenceError, match="line 1: expected a number as target of residue 2, got 'x'"):
        labelled(("1", "x"), name="residue_to_value")
    with pytest.raises(
        SequenceError, match=r"line 2: expected a number between -1e\+30 and 1e\+30 as target, got '-1e31'"
    ):
        labelled(("1",), ("-1e31",), name="sequence_to_value")
    with pytest.raises(SequenceError, match=r"differ by more than 1e-30, got a standard deviation of 5.0e-41"):
        labelled(("1e-40",), ("2e-40",), name="sequence_to_value")
    assert [values[0] for values in labelled(("1e-200",), ("1",), name="sequence_to_value").values] == [1e-200, 1]
    with pytest.raises(SequenceError, match=r"line 1: expected a known target, got none"):
        labelled(("", "nan"), name="residue_to_value")
    with pytest.raises(InputError, match=r"expected a task of sequence_to_class, .* got 'regression'"):
        parse_task("regression")


def test_weights_of_classes_are_capped():
    targets = labelled(*[("a",)] * 997, *[("b",)] * 3)
    weights = class_weights(targets, range(1000))
    assert (weights * [997, 3]).sum() == pytest.approx(1000)
    assert weights[1] / weights[0] == pytest.approx(CAP / (1000 / (2 * 997)))
    even = class_weights(labelled(*[("a",)] * 6, *[("b",)] * 3), range(9))
    assert even[0] * 6 == pytest.approx(even[1] * 3)


def test_a_class_that_training_lacks(families):
    targets = labelled(*[("a",)] * 3, *[("b",)] * 3)
    split = make_split("given", ["train", "train", "validation", "test", "test", "test"], np.arange(6), 0)
    with pytest.raises(InputError, match="expected every class among the training proteins, got none of b"):
        refuse_missing(split, targets)
