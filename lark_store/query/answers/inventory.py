"""`show`: the contents of a store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lark_store.query.sql.connection import connect, fetch
from lark_store.results import Inventory

if TYPE_CHECKING:
    import polars as pl

    from lark_store.schema.database import Database

_FRAMES = {
    "checkpoints": """
        SELECT c.name, c.model, c.epoch, c.step, c.learning_rate, m.metrics, c.path, c.weights_sha256[:12] AS weights
        FROM checkpoints c LEFT JOIN (
            SELECT checkpoint, string_agg(name || ' ' || round(value, 4), ', ' ORDER BY name) AS metrics
            FROM checkpoint_metrics GROUP BY ALL
        ) m ON m.checkpoint = c.name JOIN _checkpoint USING (name) ORDER BY c.epoch NULLS FIRST, id""",
    "sources": """
        SELECT s.name, stage, domain, coalesce(n, 0) AS samples, licence, uri
        FROM _source s LEFT JOIN (SELECT source, count(*) AS n FROM samples GROUP BY ALL) x ON x.source = s.name
        ORDER BY s.id""",
    "variants": "SELECT name, template, targets, max_length, coalesce(loss, 'mean') AS loss FROM _variant ORDER BY id",
    "sketchers": """
        SELECT name, k, seed, dtype, parameters, exclude, correction, damping, min_ndim, positions,
               name = (SELECT sketcher FROM _meta) AS is_default
        FROM _sketcher ORDER BY id""",
    "sketches": """
        WITH failed AS (
            SELECT checkpoint, source, variant, ingest_run, count(*) AS n FROM failures GROUP BY ALL
        )
        SELECT r.sketcher, r.checkpoint, r.source, r.variant, sum(r.n_sketched)::BIGINT AS sketches,
               any_value(w.n_samples) AS samples, any_value(w.chosen) AS chosen,
               coalesce(last(f.n ORDER BY r.ingest_run), 0) AS failed,
               last(r.status ORDER BY r.ingest_run) AS status,
               sum(r.n_sketched * k.k * CASE k.dtype WHEN 'float16' THEN 2 ELSE 4 END)::BIGINT AS bytes
        FROM ingest_runs r JOIN sketchers k ON k.name = r.sketcher LEFT JOIN failed f USING (ingest_run)
        LEFT JOIN coverage w ON (w.sketcher, w.checkpoint, w.source, w.variant)
                              = (r.sketcher, r.checkpoint, r.source, r.variant)
        GROUP BY ALL ORDER BY min(r.ingest_run)""",
}


def listed(db: Database, kind: str) -> pl.DataFrame:
    """Return one of the frames of the inventory."""
    connection = connect(db, query=_FRAMES[kind])
    try:
        return fetch(connection, _FRAMES[kind])
    finally:
        connection.close()


def inventory(db: Database) -> Inventory:
    """Count everything; see `Store.show`."""
    connection = connect(db, query="\n".join(_FRAMES.values()))
    try:
        frames = {name: fetch(connection, query) for name, query in _FRAMES.items()}
    finally:
        connection.close()
    return Inventory(path=db.location.label, **frames)
