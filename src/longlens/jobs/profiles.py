"""A `Sight` on disk: tables of all numbers, and the figures."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from longlens.report import figures
from longlens.report.profile import Sight

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# maps and tokens in figures where none were chosen
MAPS = 6
TOKENS = 4


def write_sight(
    sight: Sight, folder: Path, tokens: Sequence[int], maps: Sequence[tuple[int, int]], *, draw: bool
) -> list[Path]:
    """Write what there is: overview.csv, tokens.parquet, rows.parquet (layer x head x token), top_keys.parquet,
    top_queries.parquet, pooled.npz, and with `draw` overview, tracks, maps and partners as .png and .svg."""
    paths = [folder / "overview.csv", folder / "tokens.parquet"]
    paths[0].write_text(_csv(sight.overview_rows()), encoding="utf-8")
    pq.write_table(pa.table(sight.token_rows()), paths[1])
    labels = sight.sequence.labels
    if sight.by_token:
        paths.append(folder / "rows.parquet")
        _write(paths[-1], sight.head_rows(), {"token": "label"}, labels)
    for links, name, ends in (
        (sight.keys, "top_keys", ("query", "key")),
        (sight.queries, "top_queries", ("key", "query")),
    ):
        if links is not None:
            paths.append(folder / f"{name}.parquet")
            _write(paths[-1], sight.link_rows(links, ends), {end: f"{end}_label" for end in ends}, labels)
    if sight.maps is not None:
        paths.append(folder / "pooled.npz")
        found = sight.maps
        np.savez_compressed(
            paths[-1], values=found.values, query_edges=found.queries, key_edges=found.keys,
            layers=np.array(sight.layers), heads=np.array(sight.heads),
        )  # fmt: skip
    if draw:
        for name, figure in drawn(sight, tokens, maps):
            paths += figures.save(figure, folder, name)
    return paths


def drawn(sight: Sight, tokens: Sequence[int], maps: Sequence[tuple[int, int]]) -> Iterable[tuple[str, Figure]]:
    """Name and figure, one at a time, of those that there are numbers for."""
    # a protein of a few residues has little to compare, one without received attention nothing to choose by
    chosen = list(tokens) or (sight.most_received(TOKENS) if "received" in sight.by_token else [])
    if set(sight.overview()) & set(figures.PANELS):
        yield "overview", figures.overview(sight)
    if "received" in sight.by_token or "surprise" in sight.predicted:
        yield "tracks", figures.tracks(sight, chosen)
    places = [(sight.layers.index(layer), sight.heads.index(head), "") for layer, head in maps]
    places = places or sight.telling_heads(MAPS)
    if sight.maps is not None and places:
        yield "maps", figures.maps(sight, places)
    if (sight.keys is not None or sight.queries is not None) and chosen:
        yield "partners", figures.partners(sight, chosen)


def _write(path: Path, tables: Iterable[dict[str, Any]], named: dict[str, str], labels: Sequence[str]) -> None:
    """Tables of one form, one after the other; each column of tokens in `named` is followed by one of their labels."""
    words = pa.array(labels, pa.string())
    writer = None
    for table in tables:
        columns: dict[str, Any] = {}
        for name, values in table.items():
            small = name in ("layer", "head", "place")
            columns[name] = pa.array(values.astype(np.int16) if small else values)
            if name in named:
                # plain: given a dictionary, the writer lets through bytes that nobody set, and files differ
                columns[named[name]] = words.take(pa.array(values))
        arrow = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, arrow.schema)
        writer.write_table(arrow)
    if writer is not None:
        writer.close()


def _csv(table: dict[str, Any]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(table)
    for row in zip(*table.values(), strict=True):
        writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in row])
    return text.getvalue()
