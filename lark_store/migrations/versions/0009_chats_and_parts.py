"""Target rules of chats, the reduction of a variant's loss (null: mean), and the parts of checkpoints.

The parts are the locations of a checkpoint's config and tokenizer outside its folder.
`lark_store.schema.missing_columns` adds completions, messages and tools to the samples.
"""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
BIG: sa.types.TypeEngine[int] = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
RULES = "'response', 'text', 'predicted', 'auto', 'assistant', 'assistant+end', 'last', 'last+end'"
TARGETS = "ck_format_variant_targets"


def upgrade() -> None:
    variants = sa.Table(
        "format_variant",
        sa.MetaData(),
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("template", sa.Text(), nullable=False),
        sa.Column("template_text", sa.Text(), nullable=False),
        sa.Column("targets", sa.Text(), nullable=False),
        sa.Column("max_length", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Text(), nullable=False),
        sa.Column("checksum", BIG, nullable=True),
        sa.CheckConstraint("max_length > 1", name=op.f("ck_format_variant_max_length")),
        sa.CheckConstraint("targets IN ('response')", name=op.f(TARGETS)),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_format_variant")),
        sa.UniqueConstraint("name", name=op.f("uq_format_variant_name")),
        sqlite_strict=True,
    )
    with op.batch_alter_table("format_variant", copy_from=variants) as batch:
        batch.drop_constraint(op.f(TARGETS), type_="check")
        batch.create_check_constraint(op.f(TARGETS), f"targets IN ({RULES})")
        batch.add_column(sa.Column("loss", sa.Text(), nullable=True))
    op.add_column("checkpoint", sa.Column("parts", sa.Text(), nullable=True))
