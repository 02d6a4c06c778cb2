"""The default sketcher of a store; older stores use the paper's."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("store_meta", sa.Column("sketcher", sa.Text(), server_default="lark", nullable=False))
