"""Vectors of proteins as an AnnData object, which scanpy and the tools around it take.

anndata (extra `anndata`) is imported in this module alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from longlens.errors import InputError


def to_anndata(
    vectors: NDArray[Any],
    names: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    *,
    further: Mapping[str, NDArray[Any]],
    about: Mapping[str, str],
) -> Any:
    """An AnnData object that `write_h5ad` can write.

    Args:
        vectors: (proteins, d); X, as float32.
        names: of the observations, each once.
        columns: of `obs`; a missing text is "", a missing number NaN.
        further: other vectors of the same proteins, for `obsm`.
        about: texts for `uns["longlens"]`.

    Raises:
        InputError: anndata is not installed.
    """
    try:
        import anndata
    except ImportError:
        raise InputError(
            "to_anndata() needs anndata, which is not installed; pip install 'longlens[anndata]'"
        ) from None
    import pandas as pd

    # texts as plain objects: anndata 0.12 does not write the Arrow strings that pandas 3 makes by default
    typed = {name: _typed(values) for name, values in columns.items()}
    obs = pd.DataFrame({name: pd.Series(array, dtype=array.dtype) for name, array in typed.items()}).set_index(
        pd.Index(list(names), dtype=object)
    )
    var = pd.DataFrame(index=pd.Index([str(place) for place in range(vectors.shape[1])], dtype=object))
    return anndata.AnnData(
        np.asarray(vectors, np.float32), obs=obs, var=var, uns={"longlens": dict(about)},
        obsm={name: np.asarray(array, np.float32) for name, array in further.items()},
    )  # fmt: skip


def _typed(values: Sequence[Any]) -> NDArray[Any]:
    """Whole numbers, numbers with NaN for missing ones, or texts with "" for missing ones."""
    present = [value for value in values if value is not None]
    if not present or isinstance(present[0], str):
        return np.array(["" if value is None else value for value in values], object)
    whole = len(present) == len(values) and isinstance(present[0], int)
    return np.array(values, np.int64 if whole else np.float64)
