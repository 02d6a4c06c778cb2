"""The stored scores that an answer reads: at one checkpoint, or across two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lark_store.core.names import SUM_SEPARATOR
from lark_store.errors import InputError
from lark_store.schema.catalog import Checkpoint, FormatVariant
from lark_store.schema.database import Database, find

if TYPE_CHECKING:
    from lark_store.query.methods import Method


@dataclass(frozen=True)
class ScoreFilter:
    """The stored scores to measure: samples' checkpoints (empty: all), method, and the queries' side.

    Without `query_checkpoint`, the scores have samples and queries at one checkpoint; with it, only those at another.
    """

    checkpoints: list[str]
    method: Method
    query_checkpoint: str | None = None
    query_variant: str | None = None

    @property
    def is_across(self) -> bool:
        """Whether samples and queries are at two checkpoints."""
        return self.query_checkpoint is not None and self.checkpoints != [self.query_checkpoint]

    @property
    def summed(self) -> str | None:
        """The summed checkpoints, if named, as `base + epoch-1`."""
        return SUM_SEPARATOR.join(self.checkpoints) if self.method.over and len(self.checkpoints) > 1 else None

    @property
    def at(self) -> list[str]:
        """The checkpoints of the stored scores; of a sum, its last."""
        return self.checkpoints[-1:] if self.summed else self.checkpoints

    def check(self, db: Database) -> None:
        """Check the names.

        Raises
        ------
        NameUnknownError
        InputError
            The scores at one checkpoint and across two would be mixed.
        """
        with db.session() as session:
            for name in (*self.checkpoints, self.query_checkpoint):
                if name is not None:
                    find(session, Checkpoint, name)
            if self.query_variant is not None:
                find(session, FormatVariant, self.query_variant)
        if self.is_across and self.query_checkpoint in self.checkpoints:
            raise InputError(
                f"with the queries at `{self.query_checkpoint}`, the scores at `{self.query_checkpoint}` are at one "
                "checkpoint and the others across two",
                f"ask for `{self.query_checkpoint}` alone, or leave it out of `--checkpoint`",
            )
