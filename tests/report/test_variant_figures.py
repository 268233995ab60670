"""The heat map of all substitutions shows each score where it belongs."""

from __future__ import annotations

import numpy as np
import pytest

from longlens.errors import InputError
from longlens.io.alphabet import STANDARD
from longlens.report import variants
from longlens.report.variants import RESIDUES, ROWS, draw_substitutions, save_substitutions

mpl = pytest.importorskip("matplotlib")
RNG = np.random.default_rng(0)


def made(length):
    """A random protein and a score for each substitution, 0 where the residue stays."""
    sequence = "".join(RNG.choice(list(STANDARD), length))
    scores = RNG.normal(-2, 2, (length, 20))
    scores[np.arange(length), [STANDARD.index(residue) for residue in sequence]] = 0
    return scores, sequence


def panels(figure):
    """The axes that hold a heat map, with its picture."""
    return [(ax, ax.images[0]) for ax in figure.axes if ax.images]


def test_the_columns_are_those_of_the_alphabet():
    assert RESIDUES == STANDARD
    assert sorted(ROWS) == sorted(STANDARD)


@pytest.mark.parametrize("length", [1, 7, 60, 100, 101, 250])
def test_each_score_stands_in_its_residues_row_at_its_position(length):
    scores, sequence = made(length)
    figure = draw_substitutions(scores, sequence, title="a protein; model tiny", first=25)
    shown = np.concatenate([image.get_array() for _, image in panels(figure)], 1)
    assert shown.shape == (20, length)
    for row, residue in enumerate(ROWS):
        np.testing.assert_array_equal(shown[row], scores[:, STANDARD.index(residue)])
    # the picture's edges are half a position beyond the first and the last
    assert panels(figure)[0][1].get_extent()[0] == 24.5
    assert panels(figure)[-1][1].get_extent()[1] == 25 + length - 0.5
    assert figure.get_suptitle() == "Effects of all substitutions\na protein; model tiny"


def test_the_wild_type_is_marked_at_every_position():
    scores, sequence = made(130)
    figure = draw_substitutions(scores, sequence, title="")
    marked = {}
    for ax, _ in panels(figure):
        marked |= {int(x): ROWS[int(y)] for x, y in ax.lines[0].get_xydata()}
    assert marked == dict(enumerate(sequence, 1))
    letters = [label.get_text() for ax, _ in panels(figure) for label in ax.child_axes[0].get_xticklabels()]
    assert "".join(letters) == sequence


def test_a_long_protein_is_shown_in_cells_of_means_without_the_wild_type():
    length = variants.WRAPPED + 1
    scores, sequence = made(length)
    figure = draw_substitutions(scores, sequence, title="")
    ((ax, image),) = panels(figure)
    width = -(-length // variants.CELLS)
    assert "each cell above: the mean of 3 positions" in figure.axes[1].get_xlabel()
    wild = np.array([[residue == column for column in STANDARD] for residue in sequence])
    effects = np.where(wild, np.nan, scores)[:width, STANDARD.index(ROWS[4])]
    np.testing.assert_allclose(image.get_array()[4, 0], np.nanmean(effects))
    # the last cell is narrower, and what would lie beyond the protein is cut off
    assert figure.axes[1].get_xlim() == (0.5, length + 0.5)
    assert ax.get_xlim() == figure.axes[1].get_xlim()
    mean = figure.axes[1].lines[1].get_ydata()
    np.testing.assert_allclose(mean, np.nanmean(np.where(wild, np.nan, scores), 1))


def test_colours_are_even_on_both_sides_of_zero_and_outliers_do_not_rule_them():
    scores, sequence = made(60)
    scores[3, 4] = -1000.0
    _, image = panels(draw_substitutions(scores, sequence, title=""))[0]
    low, high = image.get_clim()
    assert low == -high
    assert high < 20


@pytest.mark.parametrize("length", [12, 700])
def test_missing_scores_have_a_colour_of_their_own(length):
    scores, sequence = made(length)
    scores[2] = np.nan
    scores[6:10] = np.nan
    figure = draw_substitutions(scores, "X" + sequence[1:], title="")
    figure.draw_without_rendering()
    (_, image), *_ = panels(figure)
    bad = image.get_array().mask
    assert bad.any()
    colors = image.to_rgba(image.get_array())
    assert len(np.unique(colors[bad], axis=0)) == 1
    assert not (colors[~bad] == colors[bad][0]).all(-1).any()


def test_files_and_refusals(tmp_path):
    scores, sequence = made(12)
    path = save_substitutions(scores, sequence, tmp_path / "effects.png", title="a $protein$")
    again = save_substitutions(scores, sequence, tmp_path / "again.png", title="a $protein$")
    assert path == tmp_path / "effects.png"
    assert path.read_bytes() == again.read_bytes()
    assert save_substitutions(scores, sequence, tmp_path / "effects.svg", title="").stat().st_size > 0
    with pytest.raises(InputError, match=r"ends in \.png or \.svg"):
        save_substitutions(scores, sequence, tmp_path / "effects.pdf", title="")
    with pytest.raises(InputError, match=r"expected scores \(L, 20\).*got \(12, 20\) for a sequence of 11"):
        draw_substitutions(scores, sequence[1:], title="")
    with pytest.raises(InputError, match="at least one residue"):
        draw_substitutions(np.empty((0, 20)), "", title="")
