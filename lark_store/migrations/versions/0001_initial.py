"""The first schema: checkpoints, sources, format variants, sketchers and runs."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

REAL: sa.types.TypeEngine[float] = sa.Double().with_variant(sa.REAL(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "checkpoint",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("path", sa.Text(), nullable=False),
        sa.Column("revision", sa.Text(), nullable=True),
        sa.Column("weights_sha256", sa.Text(), nullable=False),
        sa.Column("tokenizer_sha256", sa.Text(), nullable=False),
        sa.Column("epoch", REAL, nullable=True),
        sa.Column("step", sa.Integer(), nullable=True),
        sa.Column("learning_rate", REAL, nullable=True),
        sa.Column("created_at", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_checkpoint")),
        sa.UniqueConstraint("name", name=op.f("uq_checkpoint_name")),
        sqlite_strict=True,
    )
    op.create_table(
        "format_variant",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("template", sa.Text(), nullable=False),
        sa.Column("template_text", sa.Text(), nullable=False),
        sa.Column("targets", sa.Text(), nullable=False),
        sa.Column("max_length", sa.Integer(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Text(), nullable=False),
        sa.CheckConstraint(
            "targets IN ('response', 'text', 'predicted', 'auto')", name=op.f("ck_format_variant_targets")
        ),
        sa.CheckConstraint("max_length > 1", name=op.f("ck_format_variant_max_length")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_format_variant")),
        sa.UniqueConstraint("name", name=op.f("uq_format_variant_name")),
        sqlite_strict=True,
    )
    op.create_table(
        "sketcher",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("k", sa.Integer(), nullable=False),
        sa.Column("seed", sa.Integer(), nullable=False),
        sa.Column("map_version", sa.Integer(), nullable=False),
        sa.Column("dtype", sa.Text(), nullable=False),
        sa.Column("parameters", sa.Text(), nullable=True),
        sa.Column("exclude", sa.Text(), nullable=True),
        sa.Column("correction", sa.Text(), nullable=False),
        sa.Column("positions", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Text(), nullable=False),
        sa.CheckConstraint("dtype IN ('float16', 'float32')", name=op.f("ck_sketcher_dtype")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sketcher")),
        sa.UniqueConstraint("name", name=op.f("uq_sketcher_name")),
        sqlite_strict=True,
    )
    op.create_table(
        "source",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("stage", sa.Text(), nullable=False),
        sa.Column("domain", sa.Text(), nullable=True),
        sa.Column("uri", sa.Text(), nullable=False),
        sa.Column("licence", sa.Text(), nullable=True),
        sa.Column("columns", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Text(), nullable=False),
        sa.CheckConstraint("stage IN ('finetune', 'pretrain', 'query')", name=op.f("ck_source_stage")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_source")),
        sa.UniqueConstraint("name", name=op.f("uq_source_name")),
        sqlite_strict=True,
    )
    op.create_table(
        "store_meta",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("store_uuid", sa.Text(), nullable=False),
        sa.Column("created_at", sa.Text(), nullable=False),
        sa.Column("created_with", sa.Text(), nullable=False),
        sa.CheckConstraint("id = 1", name=op.f("ck_store_meta_one_row")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_store_meta")),
        sqlite_strict=True,
    )
    op.create_table(
        "checkpoint_metric",
        sa.Column("checkpoint_id", sa.Integer(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", REAL, nullable=False),
        sa.ForeignKeyConstraint(
            ["checkpoint_id"],
            ["checkpoint.id"],
            name=op.f("fk_checkpoint_metric_checkpoint_id"),
            ondelete="CASCADE",
        ),
        sa.PrimaryKeyConstraint("checkpoint_id", "name", name=op.f("pk_checkpoint_metric")),
        sqlite_strict=True,
    )
    op.create_table(
        "ingest_run",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("sketcher_id", sa.Integer(), nullable=False),
        sa.Column("checkpoint_id", sa.Integer(), nullable=False),
        sa.Column("source_id", sa.Integer(), nullable=False),
        sa.Column("variant_id", sa.Integer(), nullable=False),
        sa.Column("n_existing", sa.Integer(), nullable=False),
        sa.Column("n_sketched", sa.Integer(), nullable=False),
        sa.Column("n_failed", sa.Integer(), nullable=False),
        sa.Column("seconds", REAL, nullable=True),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("recipe", sa.Text(), nullable=False),
        sa.Column("versions", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("lance_version", sa.Integer(), nullable=True),
        sa.Column("started_at", sa.Text(), nullable=False),
        sa.Column("finished_at", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.CheckConstraint(
            "status IN ('running', 'done', 'interrupted', 'failed', 'superseded')",
            name=op.f("ck_ingest_run_status"),
        ),
        sa.ForeignKeyConstraint(["checkpoint_id"], ["checkpoint.id"], name=op.f("fk_ingest_run_checkpoint_id")),
        sa.ForeignKeyConstraint(["sketcher_id"], ["sketcher.id"], name=op.f("fk_ingest_run_sketcher_id")),
        sa.ForeignKeyConstraint(["source_id"], ["source.id"], name=op.f("fk_ingest_run_source_id")),
        sa.ForeignKeyConstraint(["variant_id"], ["format_variant.id"], name=op.f("fk_ingest_run_variant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_ingest_run")),
        sqlite_strict=True,
    )
    op.create_index(op.f("ix_ingest_run_checkpoint_id"), "ingest_run", ["checkpoint_id"], unique=False)
    op.create_table(
        "score_run",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("status", sa.Text(), nullable=False),
        sa.Column("method", sa.Text(), nullable=False),
        sa.Column("sketcher_id", sa.Integer(), nullable=False),
        sa.Column("checkpoint_id", sa.Integer(), nullable=False),
        sa.Column("query_checkpoint_id", sa.Integer(), nullable=False),
        sa.Column("queries_id", sa.Integer(), nullable=False),
        sa.Column("query_variant_id", sa.Integer(), nullable=False),
        sa.Column("source_id", sa.Integer(), nullable=False),
        sa.Column("variant_id", sa.Integer(), nullable=False),
        sa.Column("n_queries", sa.Integer(), nullable=False),
        sa.Column("n_samples", sa.Integer(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("recipe", sa.Text(), nullable=False),
        sa.Column("versions", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("lance_version", sa.Integer(), nullable=True),
        sa.Column("started_at", sa.Text(), nullable=False),
        sa.Column("finished_at", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.CheckConstraint(
            "status IN ('running', 'done', 'interrupted', 'failed', 'superseded')",
            name=op.f("ck_score_run_status"),
        ),
        sa.ForeignKeyConstraint(["checkpoint_id"], ["checkpoint.id"], name=op.f("fk_score_run_checkpoint_id")),
        sa.ForeignKeyConstraint(["queries_id"], ["source.id"], name=op.f("fk_score_run_queries_id")),
        sa.ForeignKeyConstraint(
            ["query_checkpoint_id"], ["checkpoint.id"], name=op.f("fk_score_run_query_checkpoint_id")
        ),
        sa.ForeignKeyConstraint(
            ["query_variant_id"], ["format_variant.id"], name=op.f("fk_score_run_query_variant_id")
        ),
        sa.ForeignKeyConstraint(["sketcher_id"], ["sketcher.id"], name=op.f("fk_score_run_sketcher_id")),
        sa.ForeignKeyConstraint(["source_id"], ["source.id"], name=op.f("fk_score_run_source_id")),
        sa.ForeignKeyConstraint(["variant_id"], ["format_variant.id"], name=op.f("fk_score_run_variant_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_score_run")),
        sqlite_strict=True,
    )
    op.create_index(op.f("ix_score_run_checkpoint_id"), "score_run", ["checkpoint_id"], unique=False)
