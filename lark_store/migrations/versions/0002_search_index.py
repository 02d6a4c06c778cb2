"""The measurements of `index build`."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

REAL: sa.types.TypeEngine[float] = sa.Double().with_variant(sa.REAL(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "search_index",
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("candidates", sa.Integer(), nullable=False),
        sa.Column("recall", REAL, nullable=False),
        sa.Column("n_queries", sa.Integer(), nullable=False),
        sa.Column("n_rows", sa.Integer(), nullable=False),
        sa.Column("built_at", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("fingerprint", name=op.f("pk_search_index")),
        sqlite_strict=True,
    )
