"""Probes of facts and measured influence: their runs.

`lark_store.schema.missing_columns` adds the tables `probes` and `eif`.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
BIG: sa.types.TypeEngine[int] = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
REAL: sa.types.TypeEngine[float] = sa.Double().with_variant(sa.REAL(), "sqlite")
STATUSES = "status IN ('running', 'done', 'interrupted', 'failed', 'superseded')"


def upgrade() -> None:
    _create(
        "probe_run",
        {"checkpoint_id": "checkpoint", "source_id": "source", "variant_id": "format_variant"},
        sa.Column("decoding", sa.Text(), nullable=False),
        sa.Column("temperature", REAL, nullable=True),
        sa.Column("n_samples", sa.Integer(), nullable=False),
        sa.Column("seed", sa.Integer(), nullable=True),
        sa.Column("n_probed", sa.Integer(), nullable=False),
        sa.Column("n_failed", sa.Integer(), nullable=False),
        sa.CheckConstraint("decoding IN ('greedy', 'sampled')", name=op.f("ck_probe_run_decoding")),
    )
    _create(
        "eif_run",
        {
            "checkpoint_id": "checkpoint",
            "source_id": "source",
            "variant_id": "format_variant",
            "queries_id": "source",
            "query_variant_id": "format_variant",
        },
        sa.Column("mode", sa.Text(), nullable=False),
        sa.Column("optimizer", sa.Text(), nullable=True),
        sa.Column("learning_rate", REAL, nullable=True),
        sa.Column("draw", sa.Integer(), nullable=True),
        sa.Column("n_samples", sa.Integer(), nullable=False),
        sa.Column("n_queries", sa.Integer(), nullable=False),
        sa.CheckConstraint("mode IN ('finetune', 'context')", name=op.f("ck_eif_run_mode")),
    )


def _create(table: str, keys: dict[str, str], *own: sa.Column[Any] | sa.CheckConstraint) -> None:
    """Create a table of runs: its foreign keys, its own columns, and those of all runs."""
    op.create_table(
        table,
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        *(sa.Column(name, sa.Integer(), nullable=False) for name in keys),
        *own,
        sa.Column("recipe", sa.Text(), nullable=False),
        sa.Column("versions", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("lance_version", sa.Integer(), nullable=True),
        sa.Column("started_at", sa.Text(), nullable=False),
        sa.Column("finished_at", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("checksum", BIG, nullable=True),
        sa.CheckConstraint(STATUSES, name=op.f(f"ck_{table}_status")),
        *(sa.ForeignKeyConstraint([name], [f"{to}.id"], name=op.f(f"fk_{table}_{name}")) for name, to in keys.items()),
        sa.PrimaryKeyConstraint("id", name=op.f(f"pk_{table}")),
        sqlite_strict=True,
    )
    op.create_index(op.f(f"ix_{table}_checkpoint_id"), table, ["checkpoint_id"])
