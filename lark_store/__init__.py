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
    from lark_store.errors import LarkStoreError
    from lark_store.schema.records import Hits, IngestReport, Inventory, Progress, ScoreMatrix, SourceReport
    from lark_store.store import Store

__version__ = version("lark-store")

_HOMES = {
    "Hits": "lark_store.schema.records",
    "IngestReport": "lark_store.schema.records",
    "Inventory": "lark_store.schema.records",
    "LarkStoreCallback": "lark_store.callback",
    "LarkStoreError": "lark_store.errors",
    "Progress": "lark_store.schema.records",
    "ScoreMatrix": "lark_store.schema.records",
    "SourceReport": "lark_store.schema.records",
    "Store": "lark_store.store",
}

__all__ = [
    "Hits",
    "IngestReport",
    "Inventory",
    "LarkStoreCallback",
    "LarkStoreError",
    "Progress",
    "ScoreMatrix",
    "SourceReport",
    "Store",
    "__version__",
    "errors",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used: importing lark_store loads neither torch nor lancedb."""
    if name == "errors":
        return import_module("lark_store.errors")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module `lark_store` has no attribute `{name}`")
