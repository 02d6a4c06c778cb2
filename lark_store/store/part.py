"""What every part of `Store` stands on: the open database."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lark_store.schema.database import Database

DEFAULT_SKETCHER = "lark"


class Part:
    """A part of `Store`: its methods share the open database."""

    _db: Database
