"""The sketcher that a store uses where none is named: the paper's in every store that is older than the choice."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("store_meta", sa.Column("sketcher", sa.Text(), server_default="lark", nullable=False))
