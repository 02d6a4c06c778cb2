"""lark-store: the database of training-data attribution.

>>> import lark_store
>>> with lark_store.Store.open("lark.store") as store:  # doctest: +SKIP
...     hits = store.top("21645374", checkpoint="epoch-2", k=10)
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lark_store import errors
    from lark_store.callback import LarkStoreCallback
    from lark_store.domains import make_domain
    from lark_store.errors import LarkStoreError
    from lark_store.gradients.measured_influence import measure_influence
    from lark_store.results import (
        ExplainedToken,
        Explanation,
        Hit,
        Hits,
        IngestReport,
        Inventory,
        NewText,
        Progress,
        ScoreMatrix,
        SourceReport,
        Trace,
    )
    from lark_store.store import Store
    from lark_store.store.explain import Explainer
    from lark_store.store.rankings import Rankings

__version__ = version("lark-store")

_MODULES = {
    "ExplainedToken": "lark_store.results",
    "Explainer": "lark_store.store.explain",
    "Explanation": "lark_store.results",
    "Hit": "lark_store.results",
    "Hits": "lark_store.results",
    "IngestReport": "lark_store.results",
    "Inventory": "lark_store.results",
    "LarkStoreCallback": "lark_store.callback",
    "LarkStoreError": "lark_store.errors",
    "NewText": "lark_store.results",
    "Progress": "lark_store.results",
    "Rankings": "lark_store.store.rankings",
    "ScoreMatrix": "lark_store.results",
    "SourceReport": "lark_store.results",
    "Store": "lark_store.store",
    "Trace": "lark_store.results",
    "make_domain": "lark_store.domains",
    "measure_influence": "lark_store.gradients.measured_influence",
}

__all__ = [
    "ExplainedToken",
    "Explainer",
    "Explanation",
    "Hit",
    "Hits",
    "IngestReport",
    "Inventory",
    "LarkStoreCallback",
    "LarkStoreError",
    "NewText",
    "Progress",
    "Rankings",
    "ScoreMatrix",
    "SourceReport",
    "Store",
    "Trace",
    "__version__",
    "errors",
    "make_domain",
    "measure_influence",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that importing lark_store loads neither torch nor lancedb."""
    if name == "errors":
        return import_module("lark_store.errors")
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module `lark_store` has no attribute `{name}`")
