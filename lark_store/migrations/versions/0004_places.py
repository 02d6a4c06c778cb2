"""The location of the vectors; notes of work and snapshots in catalogs without a folder."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("store_meta", sa.Column("vectors", sa.Text(), nullable=True))
    op.create_table(
        "work",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("doing", sa.Text(), nullable=False),
        sa.Column("touches", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_work")),
        sqlite_strict=True,
    )
    op.create_table(
        "snapshot",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("record", sa.Text(), nullable=False),
        sa.Column("catalog", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_snapshot")),
        sqlite_strict=True,
    )
