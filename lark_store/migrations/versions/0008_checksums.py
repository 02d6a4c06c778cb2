"""Checksums of catalog rows; `lark_store.schema.missing_columns` adds those of the vector tables."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
BIG: sa.types.TypeEngine[int] = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TABLES = (
    "store_meta",
    "checkpoint",
    "checkpoint_metric",
    "source",
    "format_variant",
    "sketcher",
    "correction",
    "ingest_run",
    "score_run",
    "search_index",
    "study",
    "evaluation",
    "evaluation_score",
)


def upgrade() -> None:
    for table in TABLES:
        op.add_column(table, sa.Column("checksum", BIG, nullable=True))
    op.add_column("source", sa.Column("is_stripped", sa.Integer(), server_default="0", nullable=False))
    op.execute("UPDATE source SET is_stripped = 1")
