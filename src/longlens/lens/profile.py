"""The profile of a sequence: the standard statistics of all layers, summarised per token, head and layer.

Layers, heads and tokens are counted from 0; a token that marks a start or end is a token as others are, so that in a
protein that begins with one, a residue's number (from 1) is its token's.

    with longlens.watch(model, collectors(["entropy", "received"], pool=256, links=8)) as seen:
        model(packed)
    summary = profile(seen, "esm2_t6_8M_UR50D", tokens, heads=range(20), predicted={})
    summary.overview()                    # (L, H) by name
    summary.draw_overview()               # the same as a figure
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from longlens.errors import InputError
from longlens.lens.collect.collector import Collector
from longlens.lens.collect.columns import ColumnEntropy, Received, ReceivedMax, ReceivedMean, TopQueries
from longlens.lens.collect.maps import DistanceHistogram, Pooled
from longlens.lens.collect.rows import Distance, DistanceSpread, EffectiveKeys, Entropy, LogSumExp, TopKeys
from longlens.lens.watch import Seen
from longlens.report import profile as figures
from longlens.report import tables
from longlens.report.arrow import ArrowTable, arrow_table
from longlens.report.figures import has_matplotlib, inline, span
from longlens.report.labels import TokenLabels as TokenLabels

if TYPE_CHECKING:
    from longlens.report.figures import Figure

# one number for each layer, head and token
BY_TOKEN: tuple[Collector, ...] = (
    Entropy(), EffectiveKeys(), LogSumExp(), Distance(), DistanceSpread(), Received(), ReceivedMean(), ReceivedMax(),
    ColumnEntropy(),
)  # fmt: skip
# signed distances j - i that the overview tells apart
NEAR = {"previous": -1, "self": 0, "next": 1}
# a head that spends less than this on something does not stand out by it
NOTABLE = 0.2
# maps and tokens in figures where none were chosen, and partners of each token
MAPS = 6
TOKENS = 4
PARTNERS = 6


@dataclass(frozen=True)
class Links:
    """The strongest weights of each query (or key): `index` (L, H, N, k), -1 where absent, and `weight`."""

    index: NDArray[np.int64]
    weight: NDArray[np.float32]

    def strongest(self, token: int, count: int) -> list[tuple[int, int, int, float]]:
        """(other token, layer's place, head's place, weight) of the `count` other tokens with the largest weight in
        any head, largest first. Exact while count <= k: what is among the first k over all heads is so in its own."""
        index, weight = self.index[:, :, token], self.weight[:, :, token]
        partners: dict[int, tuple[int, int, int, float]] = {}
        for flat in np.argsort(weight, axis=None, kind="stable")[::-1]:
            layer, head, place = np.unravel_index(flat, weight.shape)
            other = int(index[layer, head, place])
            if other >= 0 and other not in partners:
                partners[other] = (other, int(layer), int(head), float(weight[layer, head, place]))
            if len(partners) == count:
                break
        return list(partners.values())


@dataclass(frozen=True)
class Maps:
    """Pooled matrices: `values` (L, H, R, C), NaN where no pair may attend; row cell r holds queries `queries`[r] to
    `queries`[r + 1], and columns likewise."""

    values: NDArray[np.float32]
    queries: NDArray[np.int64]
    keys: NDArray[np.int64]


@dataclass(frozen=True)
class Profile(ArrowTable):
    """All that was collected of one sequence by one model; None or absent where it was not collected.

    `by_token` (L, H, N) by statistic; `near` (L, H): mean weight on the previous token, on itself, on the next;
    `predicted` (N,): surprise, expected, rank, with NaN (rank -1) where nothing was predicted.
    """

    model: str
    sequence: TokenLabels
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    by_token: Mapping[str, NDArray[np.float32]]
    near: Mapping[str, NDArray[np.float64]] = field(default_factory=dict)
    keys: Links | None = None
    queries: Links | None = None
    maps: Maps | None = None
    predicted: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @property
    def about(self) -> str:
        """The line under every figure's title: the sequence, the model and N."""
        return f"{self.sequence.name}; model {self.model}, N = {len(self.sequence):,} tokens"

    def overview(self) -> dict[str, NDArray[Any]]:
        """(L, H) by name: means over tokens, and mean weight on the first token, on other special tokens
        ("separators"), on the previous token, on itself and on the next."""
        table = {f"mean_{name}": values.mean(-1, dtype=np.float64) for name, values in self.by_token.items()}
        # on average a key receives 1, whatever the head does
        table.pop("mean_received", None)
        received = self.by_token.get("received")
        if received is not None:
            share = received.astype(np.float64) / len(self.sequence)
            others = self.sequence.special.copy()
            others[0] = False
            table["first"], table["separators"] = share[..., 0], share[..., others].sum(-1)
        return table | dict(self.near)

    def overview_rows(self) -> dict[str, NDArray[Any]]:
        """The overview as a table: layer, head, and a column for each number."""
        shape = (len(self.layers), len(self.heads))
        table = {
            "layer": np.broadcast_to(np.array(self.layers)[:, None], shape),
            "head": np.broadcast_to(np.array(self.heads), shape),
        } | self.overview()
        return {name: column.ravel() for name, column in table.items()}

    def token_rows(self) -> dict[str, Any]:
        """One row for each token: what it is, what it receives on average over layers and heads, and what was
        predicted of it."""
        table: dict[str, Any] = {
            "token": np.arange(len(self.sequence)),
            "label": list(self.sequence.labels),
            "special": self.sequence.special,
        }
        if "received" in self.by_token:
            table["received"] = self.by_token["received"].mean((0, 1), dtype=np.float64)
        return table | dict(self.predicted)

    def head_rows(self) -> Iterator[dict[str, NDArray[Any]]]:
        """For each layer a table with one row for each head and token."""
        count = len(self.sequence)
        for place, layer in enumerate(self.layers):
            yield {
                "layer": np.full(len(self.heads) * count, layer),
                "head": np.repeat(self.heads, count),
                "token": np.tile(np.arange(count), len(self.heads)),
                **{name: values[place].ravel() for name, values in self.by_token.items()},
            }

    def link_rows(self, links: Links, names: tuple[str, str]) -> Iterator[dict[str, NDArray[Any]]]:
        """For each layer a table of `names` (token, the other), place from 0, weight; absent places are left out."""
        for place, layer in enumerate(self.layers):
            index, weight = links.index[place], links.weight[place]
            heads, tokens, places = np.indices(index.shape, sparse=False).reshape(3, -1)
            there = index.ravel() >= 0
            yield {
                "layer": np.full(there.sum(), layer),
                "head": np.array(self.heads)[heads[there]],
                names[0]: tokens[there],
                "place": places[there],
                names[1]: index.ravel()[there],
                "weight": weight.ravel()[there],
            }

    def most_received(self, count: int) -> list[int]:
        """The tokens, special ones apart, that receive most on average over layers and heads, in their order."""
        received = self.by_token["received"].mean((0, 1), dtype=np.float64)
        ranked = np.argsort(np.where(self.sequence.special, -1.0, received), kind="stable")[::-1]
        return sorted(int(token) for token in ranked[:count] if not self.sequence.special[token])

    def outstanding_heads(self, count: int) -> list[tuple[int, int, str]]:
        """(layer's place, head's place, why) of heads that stand out: the largest weight on the first token, on
        separators, on a neighbour, on the token itself, the longest reach, the narrowest and the widest attention."""
        table = self.overview()
        ends = "the end" if self.sequence.residues else "separators"
        asked = [
            ("first", 1, "most on the first token"), ("previous", 1, "most on the previous token"),
            ("next", 1, "most on the next token"), ("separators", 1, f"most on {ends}"),
            ("mean_entropy", 1, "widest"), ("mean_distance", 1, "farthest reach"), ("self", 1, "most on itself"),
            ("mean_entropy", -1, "narrowest"),
        ]  # fmt: skip
        chosen: dict[tuple[int, int], str] = {}
        for name, sign, why in asked:
            share = not name.startswith("mean")
            if name not in table or len(chosen) == count or (share and float(table[name].max()) < NOTABLE):
                continue
            order = np.argsort(-sign * table[name], axis=None, kind="stable")
            places = (tuple(map(int, np.unravel_index(flat, table[name].shape))) for flat in order)
            # the first that is not shown for another reason already
            best = next((place for place in places if place not in chosen), None)
            if best is not None:
                chosen[best[0], best[1]] = f"{why} ({table[name][best]:.2f})" if share else why
        return [(layer, head, why) for (layer, head), why in chosen.items()]

    def to_frame(self) -> Any:
        """The overview as a pandas DataFrame: a row for each layer and head."""
        return tables.to_frame(self.overview_rows())

    def _arrow(self) -> Any:
        return arrow_table(self.overview_rows())

    def _repr_html_(self) -> str:
        table = self.overview_rows()
        picture = None
        if has_matplotlib() and set(table) & set(figures.PANELS):
            picture = inline(self.draw_overview())
        return tables.html_table(table, title=self.about, total=len(table["layer"]), picture=picture)

    def draw_overview(self) -> Figure:
        """Layer x head: mean entropy and distance, and how much goes to the first token, separators and neighbours."""
        return figures.draw_overview(self.overview(), self.layers, self.heads, about=self.about)

    def draw_tracks(self, tokens: Sequence[int] = ()) -> Figure:
        """Along the sequence: attention received, averaged over the layers and heads, and surprise; `tokens` are named
        beside those that stand out."""
        received = self.by_token.get("received")
        return figures.draw_tracks(
            self.sequence,
            received=None if received is None else received.mean((0, 1), dtype=np.float64),
            surprise=self.predicted.get("surprise"), expected=self.predicted.get("expected"), named=tokens,
            subject=f"layers {span(self.layers)}, heads {span(self.heads)}", about=self.about,
        )  # fmt: skip

    def draw_maps(self, heads: Sequence[tuple[int, int, str]]) -> Figure:
        """Pooled maps of heads, given as (layer's place, head's place, why it is shown)."""
        if self.maps is None:
            raise InputError("expected pooled to be collected for maps, got none")
        shown = [
            (self.maps.values[layer, head], f"layer {self.layers[layer]}, head {self.heads[head]}\n{why}")
            for layer, head, why in heads
        ]
        return figures.draw_maps(shown, self.maps.queries, self.maps.keys, about=self.about)

    def draw_partners(self, tokens: Sequence[int], count: int = PARTNERS) -> Figure:
        """The strongest links of each of `tokens` in any layer and head: what it looks at, and what looks at it."""
        sides = [
            (verb, [self._partners(links, token, count) for token in tokens])
            for verb, links in (("looks at", self.keys), ("is looked at by", self.queries))
            if links is not None
        ]
        return figures.draw_partners(self.sequence, tokens, sides, count=count, about=self.about)

    def _partners(self, links: Links, token: int, count: int) -> list[figures.Partner]:
        return [
            figures.Partner(other, weight, f"layer {self.layers[layer]}, head {self.heads[head]}")
            for other, layer, head, weight in links.strongest(token, count)
        ]

    def draw(self, tokens: Sequence[int] = (), maps: Sequence[tuple[int, int]] = ()) -> Iterable[tuple[str, Figure]]:
        """Name and figure, one at a time, of those that there are numbers for. `tokens` are those whose partners are
        shown, `maps` (layer, head) those whose maps are; chosen where empty."""
        # a protein of a few residues has little to compare, one without received attention nothing to choose by
        chosen = list(tokens) or (self.most_received(TOKENS) if "received" in self.by_token else [])
        if set(self.overview()) & set(figures.PANELS):
            yield "overview", self.draw_overview()
        if "received" in self.by_token or "surprise" in self.predicted:
            yield "tracks", self.draw_tracks(chosen)
        places = [(self.layers.index(layer), self.heads.index(head), "") for layer, head in maps]
        places = places or self.outstanding_heads(MAPS)
        if self.maps is not None and places:
            yield "maps", self.draw_maps(places)
        if (self.keys is not None or self.queries is not None) and chosen:
            yield "partners", self.draw_partners(chosen)


def collectors(names: Sequence[str], pool: int, links: int) -> list[Collector]:
    """Collectors by name: those of `BY_TOKEN`, top_keys, top_queries, pooled, neighbours. Raises `InputError`."""
    known: dict[str, Collector] = {collector.name: collector for collector in BY_TOKEN}
    known |= {"top_keys": TopKeys(links), "top_queries": TopQueries(links), "pooled": Pooled(pool)}
    known["neighbours"] = DistanceHistogram(octaves=2)
    odd = [name for name in names if name not in known]
    if odd or not names:
        raise InputError(
            f"expected what to collect, of {', '.join(known)} and surprise, got {', '.join(odd) or 'none'}"
        )
    return [known[name] for name in dict.fromkeys(names)]


def profile(
    seen: Seen, model: str, sequence: TokenLabels, heads: Sequence[int], predicted: Mapping[str, NDArray[Any]]
) -> Profile:
    """The profile from the last call that `watch` saw, of batch row 0. `model` is the model's name as figures give it;
    `heads` are those that were watched; `predicted` as in `Profile`."""
    names = set(next(iter(seen.calls[-1].values())))
    layers = seen.layers

    def stack(name: str, part: str = "values") -> Any:
        return np.stack([_numpy(getattr(getattr(seen, name)[layer], part))[0] for layer in layers])

    maps = None
    if "pooled" in names:
        first = seen.pooled[layers[0]]
        maps = Maps(stack("pooled"), first.query_edges.cpu().numpy(), first.key_edges.cpu().numpy())
    return Profile(
        model, sequence, layers, tuple(heads),
        by_token={collector.name: stack(collector.name) for collector in BY_TOKEN if collector.name in names},
        near=_near(seen, len(sequence)) if "distance_histogram" in names else {},
        keys=Links(stack("top_keys", "index"), stack("top_keys", "weight")) if "top_keys" in names else None,
        queries=Links(stack("top_queries", "index"), stack("top_queries", "weight"))
        if "top_queries" in names else None,
        maps=maps, predicted=predicted,
    )  # fmt: skip


def _near(seen: Seen, count: int) -> dict[str, NDArray[np.float64]]:
    """(L, H) by name: the mean over queries of the weight at each of the distances `NEAR`."""
    histograms = [seen.distance_histogram[layer] for layer in seen.layers]
    edges = histograms[0].edges.cpu().numpy()
    mass = np.stack([_numpy(histogram.mass)[0] for histogram in histograms]).astype(np.float64)
    # distances 0 and 1 have bins of their own
    bins = {name: int(np.searchsorted(edges, distance)) - 1 for name, distance in NEAR.items()}
    return {name: mass[..., place] / count for name, place in bins.items()}


def _numpy(tensor: Tensor) -> NDArray[Any]:
    return (tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy()
