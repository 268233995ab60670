"""Transformers over long proteins and texts in memory linear in their length, with a lens that shows what they attend
to and how surprised they are.

    longlens.attention(query, key, value, method="window:256")

Names are resolved on first use, so that importing the package is quick and the command line's help needs no torch.
Layout, masks and positions: `longlens.shapes`.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from longlens import errors as errors
    from longlens import hf as hf
    from longlens import lens as lens
    from longlens import testing as testing
    from longlens.diagnosis.doctor import doctor as doctor
    from longlens.io.reading import Results as Results
    from longlens.io.reading import open_results as open_results
    from longlens.jobs.compare_job import compare_models as compare_models
    from longlens.jobs.contacts import contacts as contacts
    from longlens.jobs.context_call import context as context
    from longlens.jobs.embed import embed as embed
    from longlens.jobs.evaluate_contacts import evaluate_contacts as evaluate_contacts
    from longlens.jobs.finetune import finetune as finetune
    from longlens.jobs.look_job import look as look
    from longlens.jobs.paint import paint as paint
    from longlens.jobs.predict import predict as predict
    from longlens.jobs.proteingym_job import score_proteingym as score_proteingym
    from longlens.jobs.score_job import score as score
    from longlens.jobs.surprise_job import surprise as surprise
    from longlens.lens.scan import scan as scan
    from longlens.models.pretrained import load as load
    from longlens.ops.approximate.cosformer import CosFormer as CosFormer
    from longlens.ops.approximate.linear import Linear as Linear
    from longlens.ops.approximate.linformer import Linformer as Linformer
    from longlens.ops.approximate.nystrom import Nystrom as Nystrom
    from longlens.ops.approximate.performer import Performer as Performer
    from longlens.ops.approximate.scatterbrain import Scatterbrain as Scatterbrain
    from longlens.ops.approximate.taylor import Taylor as Taylor
    from longlens.ops.attention import attention as attention
    from longlens.ops.biases import Alibi as Alibi
    from longlens.ops.biases import RelativePosition as RelativePosition
    from longlens.ops.exact.exact import Exact as Exact
    from longlens.ops.explain import explain as explain
    from longlens.ops.masks import Causal as Causal
    from longlens.ops.masks import Predicate as Predicate
    from longlens.ops.masks import Prefix as Prefix
    from longlens.ops.masks import SameDocument as SameDocument
    from longlens.ops.registry import parse_method as parse_method
    from longlens.ops.sparse.bigbird import BigBird as BigBird
    from longlens.ops.sparse.block_sparse import BlockSparse as BlockSparse
    from longlens.ops.sparse.dilated import Dilated as Dilated
    from longlens.ops.sparse.fixed import Fixed as Fixed
    from longlens.ops.sparse.global_tokens import Global as Global
    from longlens.ops.sparse.longformer import Longformer as Longformer
    from longlens.ops.sparse.lsh import LSH as LSH
    from longlens.ops.sparse.random_blocks import Random as Random
    from longlens.ops.sparse.strided import Strided as Strided
    from longlens.ops.sparse.window import Window as Window
    from longlens.watching import observe as observe
    from longlens.watching import record as record
    from longlens.watching import trajectories as trajectories
    from longlens.watching import watch as watch

# every public name and where it lives; the submodules that are names themselves map to None
_HOMES: dict[str, str | None] = {
    "Alibi": "longlens.ops.biases",
    "BigBird": "longlens.ops.sparse.bigbird",
    "BlockSparse": "longlens.ops.sparse.block_sparse",
    "Causal": "longlens.ops.masks",
    "CosFormer": "longlens.ops.approximate.cosformer",
    "Dilated": "longlens.ops.sparse.dilated",
    "Exact": "longlens.ops.exact.exact",
    "Fixed": "longlens.ops.sparse.fixed",
    "Global": "longlens.ops.sparse.global_tokens",
    "LSH": "longlens.ops.sparse.lsh",
    "Linear": "longlens.ops.approximate.linear",
    "Linformer": "longlens.ops.approximate.linformer",
    "Longformer": "longlens.ops.sparse.longformer",
    "Nystrom": "longlens.ops.approximate.nystrom",
    "Performer": "longlens.ops.approximate.performer",
    "Predicate": "longlens.ops.masks",
    "Prefix": "longlens.ops.masks",
    "Random": "longlens.ops.sparse.random_blocks",
    "RelativePosition": "longlens.ops.biases",
    "Results": "longlens.io.reading",
    "SameDocument": "longlens.ops.masks",
    "Scatterbrain": "longlens.ops.approximate.scatterbrain",
    "Strided": "longlens.ops.sparse.strided",
    "Taylor": "longlens.ops.approximate.taylor",
    "Window": "longlens.ops.sparse.window",
    "attention": "longlens.ops.attention",
    "compare_models": "longlens.jobs.compare_job",
    "contacts": "longlens.jobs.contacts",
    "context": "longlens.jobs.context_call",
    "doctor": "longlens.diagnosis.doctor",
    "embed": "longlens.jobs.embed",
    "errors": None,
    "evaluate_contacts": "longlens.jobs.evaluate_contacts",
    "explain": "longlens.ops.explain",
    "finetune": "longlens.jobs.finetune",
    "hf": None,
    "lens": None,
    "load": "longlens.models.pretrained",
    "observe": "longlens.watching",
    "look": "longlens.jobs.look_job",
    "open_results": "longlens.io.reading",
    "paint": "longlens.jobs.paint",
    "parse_method": "longlens.ops.registry",
    "predict": "longlens.jobs.predict",
    "record": "longlens.watching",
    "scan": "longlens.lens.scan",
    "score": "longlens.jobs.score_job",
    "score_proteingym": "longlens.jobs.proteingym_job",
    "surprise": "longlens.jobs.surprise_job",
    "testing": None,
    "trajectories": "longlens.watching",
    "watch": "longlens.watching",
}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]

try:
    __version__ = version("longlens")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'longlens' has no attribute {name!r}")
    home = _HOMES[name]
    value = import_module(f"longlens.{name}") if home is None else getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
