"""What is said of two checkpoints wherever samples at one are held against queries at the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lark_store.schema.database import Database


def distance_note(db: Database, query_checkpoint: str, checkpoints: Sequence[str]) -> str | None:
    """Say how far the queries' checkpoint is from the samples'; None where it is one of them.

    A score needs no files of a checkpoint: where they can't be had, the note
    says why the distance is not known.
    """
    if query_checkpoint in checkpoints:
        return None
    from lark_store.ingest.distance import distance

    said = []
    for name in checkpoints:
        try:
            said.append(f"{distance(db, query_checkpoint, name):.4g} from `{name}`")
        except CheckpointError as error:
            said.append(f"not known from `{name}` ({error.fact})")
    return f"distance of `{query_checkpoint}`, ‖θ − θ₀‖ / ‖θ₀‖: {', '.join(said)}"
