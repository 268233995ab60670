"""Write a `Profile` to disk: tables of all numbers, and the figures."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from longlens.lens.profile import Profile
from longlens.report.figures import save


def write_profile(
    profile: Profile,
    folder: Path,
    tokens: Sequence[int],
    maps: Sequence[tuple[int, int]],
    *,
    draw: bool,
    about: Mapping[str, str],
) -> list[Path]:
    """Write, as far as they were collected, overview.csv, tokens.parquet, rows.parquet (layer x head x token),
    top_keys.parquet, top_queries.parquet, pooled.npz, and with `draw` overview, tracks, maps and partners as .png and
    .svg. `about` (the model, versions) goes into the tables' metadata."""
    paths = [folder / "overview.csv", folder / "tokens.parquet"]
    paths[0].write_text(_csv(profile.overview_rows()), encoding="utf-8")
    metadata = {"longlens": json.dumps(dict(about))}
    pq.write_table(pa.table(profile.token_rows()).replace_schema_metadata(metadata), paths[1])
    labels = profile.sequence.labels
    if profile.by_token:
        paths.append(folder / "rows.parquet")
        _write(paths[-1], profile.head_rows(), {"token": "label"}, labels, metadata)
    for links, name, ends in (
        (profile.keys, "top_keys", ("query", "key")),
        (profile.queries, "top_queries", ("key", "query")),
    ):
        if links is not None:
            paths.append(folder / f"{name}.parquet")
            _write(paths[-1], profile.link_rows(links, ends), {end: f"{end}_label" for end in ends}, labels, metadata)
    if profile.maps is not None:
        paths.append(folder / "pooled.npz")
        pooled = profile.maps
        told: dict[str, Any] = {f"about/{name}": np.array(text) for name, text in about.items()}
        np.savez_compressed(
            paths[-1], values=pooled.values, query_edges=pooled.queries, key_edges=pooled.keys,
            layers=np.array(profile.layers), heads=np.array(profile.heads),
            **told,
        )  # fmt: skip
    if draw:
        for name, figure in profile.draw(tokens, maps):
            paths += save(figure, folder, name)
    return paths


def _write(
    path: Path,
    tables: Iterable[dict[str, Any]],
    named: dict[str, str],
    labels: Sequence[str],
    metadata: dict[str, str],
) -> None:
    """Concatenate tables of the same columns; after each column of tokens in `named` comes one of their labels."""
    words = pa.array(labels, pa.string())
    writer = None
    for table in tables:
        columns: dict[str, Any] = {}
        for name, values in table.items():
            small = name in ("layer", "head", "place")
            columns[name] = pa.array(values.astype(np.int16) if small else values)
            if name in named:
                # no dictionary encoding, with which the writer would write uninitialised bytes, so that files differ
                columns[named[name]] = words.take(pa.array(values))
        arrow = pa.table(columns).replace_schema_metadata(metadata)
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
