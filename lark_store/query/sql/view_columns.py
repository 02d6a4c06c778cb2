"""What the SQL views have in common: their declaration, and columns of several views."""

from __future__ import annotations

from dataclasses import dataclass

from lark_store.query.sql.columns import Column, columns, text

TIME = "TIMESTAMP WITH TIME ZONE"


@dataclass(frozen=True)
class View:
    """A view: the meaning of a row, its columns in order, and its SELECT."""

    meaning: str
    columns: dict[str, Column]
    sql: str


def whole(**meanings: str) -> dict[str, Column]:
    """Return BIGINT columns."""
    return columns("BIGINT", **meanings)


def single(**meanings: str) -> dict[str, Column]:
    """Return FLOAT columns."""
    return columns("FLOAT", **meanings)


ADDED = columns(TIME, created_at="when it was added, UTC")
STATUS = text(status="running, done, interrupted, failed or superseded")
SKETCHER = text(sketcher="name of the sketcher")
CHECKPOINT = text(checkpoint="name of the checkpoint of the samples' gradients")
GROUP = text(source="name of the samples' source", variant="name of the samples' format variant")
SAMPLE = text(sample_id="id of the sample within its source")
INGEST_RUN = whole(ingest_run="number of the ingest run")
SCORE_RUN = whole(score_run="number of the score run")
METHOD = text(method="as in `--method`, such as cosine; for sums cosine-sum …")
OVER = text(over_checkpoints="summed checkpoints, as base + epoch-1; else null")
QUERIES = text(queries="name of the queries' source")
QUERY = QUERIES | text(query_id="id of the query, a sample of that source")
QUERY_SIDE = text(
    query_checkpoint="name of the checkpoint of the queries' gradients",
    query_variant="name of the queries' format variant",
)
HOW_SCORED = METHOD | OVER | SKETCHER | QUERY_SIDE | SCORE_RUN
FINGERPRINT = text(fingerprint="sha256 of sketcher and layout; comparable if equal")
DEVICE = text(device="device of the run")
ENDING = (
    text(recipe="settings, JSON", versions="versions of the software, JSON")
    | whole(lance_version="version of the Lance table with its rows")
    | columns(TIME, started_at="when it started, UTC", finished_at="when it ended, UTC")
    | text(error="error that ended it, if it failed")
)
RUN = DEVICE | FINGERPRINT | ENDING
