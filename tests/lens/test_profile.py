"""The figures of a profile say what they show, legibly: from a profile made by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from longlens.errors import InputError
from longlens.lens.profile import Links, Maps, Profile, TokenLabels
from longlens.report import figures

mpl = pytest.importorskip("matplotlib")

LAYERS, HEADS, N = (1, 4), (0, 2, 3), 60


def made(residues=True, labels=None, causal=False):
    """Random weights of a sequence of 60 tokens, and all that is made of them."""
    rng = np.random.default_rng(0)
    weights = rng.dirichlet(np.full(N, 0.1), size=(len(LAYERS), len(HEADS), N))
    if causal:
        weights = np.tril(weights) + 1e-9 * np.tri(N)
        weights /= weights.sum(-1, keepdims=True)
    special = np.zeros(N, bool)
    special[[0, -1]] = True
    labels = labels or ("<cls>", *rng.choice(list("ACDEFGHIK"), N - 2), "<eos>")
    positions = np.arange(N)
    allowed = np.tri(N, dtype=bool) if causal else np.ones((N, N), bool)
    order = np.argsort(-weights, -1)[..., :8]
    back = np.argsort(-weights.swapaxes(-1, -2), -1)[..., :8]
    return Profile(
        "a model", TokenLabels("a protein", tuple(labels), special, residues), LAYERS, HEADS,
        by_token={
            "entropy": -(weights * np.log(np.where(weights > 0, weights, 1))).sum(-1).astype(np.float32),
            "distance": (weights * np.abs(positions[:, None] - positions)).sum(-1).astype(np.float32),
            "received": weights.sum(-2).astype(np.float32),
        },
        near={name: weights.diagonal(k, 2, 3).sum(-1) / N for name, k in (("previous", -1), ("self", 0), ("next", 1))},
        keys=Links(order, np.take_along_axis(weights, order, -1).astype(np.float32)),
        queries=Links(back, np.take_along_axis(weights.swapaxes(-1, -2), back, -1).astype(np.float32)),
        maps=Maps(np.where(allowed, weights, np.nan).astype(np.float32), np.arange(N + 1), np.arange(N + 1)),
        predicted={"surprise": rng.random(N).astype(np.float32), "expected": rng.random(N).astype(np.float32),
                   "rank": np.ones(N, int)},
    ), weights  # fmt: skip


def words(figure):
    return " ".join(text.get_text() for text in figure.findobj(mpl.text.Text))


def drawn(profile):
    places = profile.outstanding_heads(6)
    return {
        "overview": profile.draw_overview(), "tracks": profile.draw_tracks((5, 40)),
        "maps": profile.draw_maps(places), "partners": profile.draw_partners(profile.most_received(4)),
    }  # fmt: skip


def test_every_figure_says_what_model_and_length():
    for figure in drawn(made()[0]).values():
        said = figure.get_suptitle()
        assert "a protein; model a model, N = 60 tokens" in said
        assert said.splitlines()[0]


def test_overview_shows_means_and_shares():
    profile, weights = made()
    table = profile.overview()
    np.testing.assert_allclose(table["first"], weights[..., 0].mean(-1), rtol=1e-5)
    np.testing.assert_allclose(table["separators"], weights[..., -1].mean(-1), rtol=1e-5)
    figure = profile.draw_overview()
    images = [image.get_array() for image in figure.findobj(mpl.image.AxesImage)]
    for shown, name in zip(images, ("mean_entropy", "mean_distance", "first", "separators"), strict=False):
        np.testing.assert_allclose(shown, table[name])
    # layers and heads go by their own numbers
    ticks = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert ticks == ["0", "2", "3"]


def test_partners_are_the_largest_weights_in_any_head():
    profile, weights = made()
    for token in (0, 7, 59):
        for links, dense in ((profile.keys, weights[:, :, token]), (profile.queries, weights[:, :, :, token])):
            most = dense.max((0, 1))
            found = links.strongest(token, 6)
            assert [other for other, *_ in found] == list(np.argsort(-most)[:6])
            for other, layer, head, weight in found:
                assert weight == np.float32(dense[layer, head, other]) == np.float32(most[other])


def test_masked_cells_have_a_colour_of_their_own():
    profile, _ = made(causal=True)
    figure = profile.draw_maps([(0, 1, "")])
    ax, mesh = figure.axes[0], figure.axes[0].collections[0]
    assert isinstance(mesh.norm, mpl.colors.LogNorm)
    shown = mesh.get_array().reshape(N, N)
    assert (shown.mask == ~np.tri(N, dtype=bool)).all()
    figure.draw_without_rendering()
    colors = mesh.to_rgba(mesh.get_array()).reshape(N * N, 4)
    face = np.array(ax.get_facecolor())
    # transparent where masked, so that the ground shows, whose colour no weight has
    assert (colors[shown.mask.ravel(), 3] == 0).all()
    assert np.abs(colors[~shown.mask.ravel(), :3] - face[:3]).max(-1).min() > 0.1
    assert "may not attend" in figure.get_suptitle()
    assert "may not attend" not in made()[0].draw_maps([(0, 1, "")]).get_suptitle()
    assert "log scale" in words(figure)


def test_one_scale_serves_all_maps():
    figure = made()[0].draw_maps([(0, 0, ""), (1, 2, "why it is shown")])
    limits = {mesh.get_clim() for ax in figure.axes[:2] for mesh in ax.collections}
    assert len(limits) == 1
    assert "layer 4, head 3\nwhy it is shown" in words(figure)


@pytest.mark.parametrize("residues", [True, False])
def test_no_name_covers_another(residues):
    profile, _ = made(residues)
    if not residues:
        labels = ("[CLS]", *(f"neighbourhood{k}"[: 3 + k % 14] for k in range(N - 2)), "[SEP]")
        profile = replace(profile, sequence=replace(profile.sequence, labels=labels))
    for name, figure in drawn(profile).items():
        figure.draw_without_rendering()
        for ax in figure.axes:
            legend = ax.get_legend().get_texts() if ax.get_legend() else []
            texts = [*ax.texts, *ax.get_yticklabels(), *ax.get_xticklabels(), *legend]
            texts = [text for text in texts if text.get_text().strip()]
            # labels of ticks beyond the axis are not drawn
            whole = figure.bbox
            boxes = [box for box in (text.get_window_extent() for text in texts) if whole.contains(box.x0, box.y0)]
            for place, box in enumerate(boxes):
                for other in boxes[place + 1 :]:
                    overlap = box.x1 - other.x0 > 1 and other.x1 - box.x0 > 1
                    overlap = overlap and box.y1 - other.y0 > 1 and other.y1 - box.y0 > 1
                    assert not overlap, (name, box, other)
            for box in boxes:
                assert box.x1 <= whole.x1 + 1, name


def test_long_lines_are_drawn_as_running_means_too():
    profile, _ = made()
    count = 1200
    special = np.arange(count) % (count - 1) == 0
    long = replace(
        profile, sequence=TokenLabels("long", ("<cls>", *"A" * (count - 2), "<eos>"), special, True),
        by_token={"received": np.tile(np.arange(count, dtype=np.float32) + 1, (2, 3, 1))},
        predicted={name: np.where(np.arange(count) == 0, np.nan, 2.0) for name in ("surprise", "expected")},
    )  # fmt: skip
    axes = long.draw_tracks().axes
    mean = axes[0].lines[1].get_ydata()
    np.testing.assert_allclose(mean[3:-3], np.arange(count)[3:-3] + 1, atol=0.51)
    # what was not predicted is left out of the mean
    np.testing.assert_allclose(axes[1].lines[1].get_ydata(), 2.0)
    assert "mean of 6 tokens" in words(axes[0].figure)


def test_letters_of_formulas_are_letters():
    labels = ("[CLS]", "$", "\\frac", "$x_{", *(["a"] * (N - 5)), "\n")
    profile, _ = made(residues=False, labels=labels)
    figure = profile.draw_partners((1, 2, 3, N - 1))
    figure.draw_without_rendering()
    assert "(blank)" in words(figure) or "\\n" in words(figure)


def test_tracks_name_the_tokens_asked_for():
    figure = made()[0].draw_tracks((5, 40))
    profile, _ = made()
    for token in (5, 40):
        assert profile.sequence.caption(token) in words(figure)
    bare = replace(profile, predicted={})
    assert len(bare.draw_tracks().axes) == 1
    with pytest.raises(InputError, match="received or surprise"):
        replace(bare, by_token={}).draw_tracks()


def test_files_are_the_same_every_time(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        paths = figures.save(made()[0].draw_maps([(0, 1, "")]), tmp_path / name, "maps")
    assert [path.name for path in paths] == ["maps.png", "maps.svg"]
    for path in paths:
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()


def test_a_notebook_shows_the_overview(monkeypatch):
    profile, _ = made()
    page = profile._repr_html_()
    assert "a protein; model a model, N = 60 tokens" in page
    assert "<td>4</td><td>2</td>" in page
    assert "data:image/png" in page
    frame = profile.to_frame()
    assert list(frame["layer"]) == [1, 1, 1, 4, 4, 4]
    assert frame["first"].to_numpy() == pytest.approx(profile.overview()["first"].ravel())
    bare = replace(profile, by_token={}, near={})
    assert "<img" not in bare._repr_html_()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    page = profile._repr_html_()
    assert "<table>" in page
    assert "<img" not in page
