"""The note on the distance between the checkpoints of queries and samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lark_store.schema.database import Database


def distance_note(db: Database, query_checkpoint: str, checkpoints: Sequence[str]) -> str | None:
    """Return a note with the distance of the queries' checkpoint from the samples'; None where it is one of them.

    Scoring needs no checkpoint files, so if they are missing the note says why the distance is unknown.
    """
    if query_checkpoint in checkpoints:
        return None
    from lark_store.modeling.weight_distance import distance

    distances = []
    for name in checkpoints:
        try:
            value = distance(db, query_checkpoint, name)
            distances.append(f"{value:.4g} from `{name}`{_linear(db, query_checkpoint, name)}")
        except CheckpointError as error:
            distances.append(f"unknown from `{name}` ({error.fact})")
    return f"distance of `{query_checkpoint}`, ‖θ − θ₀‖ / ‖θ₀‖: {', '.join(distances)}"


def _linear(db: Database, query_checkpoint: str, name: str) -> str:
    """Return the distance over linear layers in parentheses, empty where it is unknown."""
    from lark_store.modeling.weight_distance import distance

    try:
        return f" ({distance(db, query_checkpoint, name, 'linear'):.4g} over the linear layers)"
    except CheckpointError:
        return ""
