"""The catalog: SQLAlchemy models of all named objects and runs. It stays small.

Only migrations create the tables; `tests/migrations/test_migrations.py` compares them with the models.
"""

from __future__ import annotations

import datetime as dt  # noqa: TC003  # SQLAlchemy reads the annotations
from typing import Any

from sqlalchemy import CheckConstraint, ForeignKey, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column, relationship

from lark_store.schema.catalog_base import STRICT, UNCHECKED, Base, Checked, Named, now, one_of
from lark_store.specs import TARGET_RULES

STAGES = ("finetune", "pretrain", "query")
RUN_STATUSES = ("running", "done", "interrupted", "failed", "superseded")
DECODINGS = ("greedy", "sampled")
EIF_MODES = ("finetune", "context")


class StoreMeta(Checked):
    """The single row that identifies a store.

    `vectors`: location of the Lance tables (None: next to the catalog). `sketcher`: the default sketcher.
    """

    __tablename__ = "store_meta"
    __table_args__ = (CheckConstraint("id = 1", name="one_row"), STRICT)

    id: Mapped[int] = mapped_column(primary_key=True)
    store_uuid: Mapped[str]
    created_at: Mapped[dt.datetime] = mapped_column(default=now)
    created_with: Mapped[str]
    vectors: Mapped[str | None] = mapped_column(default=None, info={UNCHECKED: "differs in a copy of the store"})
    sketcher: Mapped[str] = mapped_column(server_default="lark")


class WorkNote(Base):
    """A note on running work, in catalogs without a folder: the names it touches."""

    __tablename__ = "work"
    __table_args__ = STRICT

    key: Mapped[str] = mapped_column(primary_key=True)
    doing: Mapped[str]
    touches: Mapped[dict[str, Any] | None]


class SnapshotCopy(Base):
    """A snapshot, in catalogs without a folder: its record and a copy of the catalog as a SQLite file."""

    __tablename__ = "snapshot"
    __table_args__ = STRICT

    name: Mapped[str] = mapped_column(primary_key=True)
    record: Mapped[dict[str, Any]]
    catalog: Mapped[bytes]


class Checkpoint(Named):
    """A model's weights at one step of its training.

    `parts` are the locations of its config and tokenizer, if they are outside `path`: `path` and `revision` of each.
    """

    __tablename__ = "checkpoint"
    __table_args__ = STRICT

    model: Mapped[str]
    path: Mapped[str]
    revision: Mapped[str | None]
    weights_sha256: Mapped[str]
    tokenizer_sha256: Mapped[str]
    epoch: Mapped[float | None]
    step: Mapped[int | None]
    learning_rate: Mapped[float | None]
    parts: Mapped[dict[str, Any] | None]
    metrics: Mapped[list[CheckpointMetric]] = relationship(cascade="all, delete-orphan")


class CheckpointMetric(Checked):
    """A metric of a checkpoint, such as its accuracy."""

    __tablename__ = "checkpoint_metric"
    __table_args__ = STRICT

    checkpoint_id: Mapped[int] = mapped_column(ForeignKey("checkpoint.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[float]


class Source(Named):
    """A named set of samples; a query is a sample of a source whose stage is `query`.

    `is_stripped` is 1 if a version before schema 0008 may have stripped white space around texts and ids.
    """

    __tablename__ = "source"
    __table_args__ = (CheckConstraint(one_of("stage", STAGES), name="stage"), STRICT)

    stage: Mapped[str]
    domain: Mapped[str | None]
    uri: Mapped[str]
    licence: Mapped[str | None]
    columns: Mapped[dict[str, Any]]
    is_stripped: Mapped[int] = mapped_column(default=0, server_default="0")


class FormatVariant(Named):
    """A template that formats samples, the rule for their target tokens, and the loss over these (None: mean).

    `answers` are the settings of the rule `predicted-answer`: see `lark_store.modeling.predicted_answers`.
    """

    __tablename__ = "format_variant"
    __table_args__ = (
        CheckConstraint(one_of("targets", TARGET_RULES), name="targets"),
        CheckConstraint("max_length > 1", name="max_length"),
        STRICT,
    )

    template: Mapped[str]
    template_text: Mapped[str]
    targets: Mapped[str]
    max_length: Mapped[int]
    sha256: Mapped[str]
    loss: Mapped[str | None] = mapped_column(default=None)
    answers: Mapped[dict[str, Any] | None] = mapped_column(default=None)


class Sketcher(Named):
    """The configuration of sketches, independent of any model: bins, seed, parameters and correction."""

    __tablename__ = "sketcher"
    __table_args__ = (CheckConstraint(one_of("dtype", ("float16", "float32")), name="dtype"), STRICT)

    k: Mapped[int]
    seed: Mapped[int]
    map_version: Mapped[int]
    dtype: Mapped[str]
    parameters: Mapped[str | None]
    exclude: Mapped[str | None]
    correction: Mapped[str]
    positions: Mapped[str]
    damping: Mapped[float | None]
    min_ndim: Mapped[int | None]
    power: Mapped[float | None]


class Correction(Checked):
    """The factors that correct gradients at one checkpoint; `sha256` is the hash of their file.

    A checkpoint has one set per kind, so that all its sketches by one sketcher are comparable.
    """

    __tablename__ = "correction"
    __table_args__ = (UniqueConstraint("checkpoint_id", "kind"), STRICT)

    id: Mapped[int] = mapped_column(primary_key=True)
    checkpoint_id: Mapped[int] = mapped_column(ForeignKey("checkpoint.id"))
    kind: Mapped[str]
    origin: Mapped[str]
    sha256: Mapped[str]
    n_bytes: Mapped[int]
    sources: Mapped[str | None]
    n_samples: Mapped[int | None]
    samples_sha256: Mapped[str | None]
    recipe: Mapped[dict[str, Any]]
    created_at: Mapped[dt.datetime] = mapped_column(default=now)

    checkpoint: Mapped[Checkpoint] = relationship()


class Run:
    """The common columns of all runs."""

    id: Mapped[int] = mapped_column(primary_key=True, sort_order=-2)
    status: Mapped[str] = mapped_column(sort_order=-1)
    recipe: Mapped[dict[str, Any]] = mapped_column(sort_order=1)
    versions: Mapped[dict[str, Any]] = mapped_column(sort_order=1)
    device: Mapped[str] = mapped_column(sort_order=1)
    lance_version: Mapped[int | None] = mapped_column(sort_order=1)
    started_at: Mapped[dt.datetime] = mapped_column(default=now, sort_order=1)
    finished_at: Mapped[dt.datetime | None] = mapped_column(sort_order=1)
    error: Mapped[str | None] = mapped_column(sort_order=1)


class IngestRun(Run, Checked):
    """The sketching of one source in one variant, at one checkpoint, by one sketcher."""

    __tablename__ = "ingest_run"
    __table_args__ = (CheckConstraint(one_of("status", RUN_STATUSES), name="status"), STRICT)

    fingerprint: Mapped[str]
    sketcher_id: Mapped[int] = mapped_column(ForeignKey("sketcher.id"))
    checkpoint_id: Mapped[int] = mapped_column(ForeignKey("checkpoint.id"), index=True)
    source_id: Mapped[int] = mapped_column(ForeignKey("source.id"))
    variant_id: Mapped[int] = mapped_column(ForeignKey("format_variant.id"))
    n_existing: Mapped[int] = mapped_column(default=0)
    n_sketched: Mapped[int] = mapped_column(default=0)
    n_failed: Mapped[int] = mapped_column(default=0)
    seconds: Mapped[float | None]

    sketcher: Mapped[Sketcher] = relationship()
    checkpoint: Mapped[Checkpoint] = relationship()
    source: Mapped[Source] = relationship()
    variant: Mapped[FormatVariant] = relationship()


class ScoreRun(Run, Checked):
    """The scoring of one group (source and variant) of sketches against one set of queries."""

    __tablename__ = "score_run"
    __table_args__ = (CheckConstraint(one_of("status", RUN_STATUSES), name="status"), STRICT)

    method: Mapped[str]
    fingerprint: Mapped[str]
    sketcher_id: Mapped[int] = mapped_column(ForeignKey("sketcher.id"))
    checkpoint_id: Mapped[int] = mapped_column(ForeignKey("checkpoint.id"), index=True)
    query_checkpoint_id: Mapped[int] = mapped_column(ForeignKey("checkpoint.id"))
    queries_id: Mapped[int] = mapped_column(ForeignKey("source.id"))
    query_variant_id: Mapped[int] = mapped_column(ForeignKey("format_variant.id"))
    source_id: Mapped[int] = mapped_column(ForeignKey("source.id"))
    variant_id: Mapped[int] = mapped_column(ForeignKey("format_variant.id"))
    n_queries: Mapped[int] = mapped_column(default=0)
    n_samples: Mapped[int] = mapped_column(default=0)
    over_checkpoints: Mapped[str | None]

    sketcher: Mapped[Sketcher] = relationship()
    checkpoint: Mapped[Checkpoint] = relationship(foreign_keys=[checkpoint_id])
    query_checkpoint: Mapped[Checkpoint] = relationship(foreign_keys=[query_checkpoint_id])
    queries: Mapped[Source] = relationship(foreign_keys=[queries_id])
    query_variant: Mapped[FormatVariant] = relationship(foreign_keys=[query_variant_id])
    source: Mapped[Source] = relationship(foreign_keys=[source_id])
    variant: Mapped[FormatVariant] = relationship(foreign_keys=[variant_id])


class ProbeRun(Run, Checked):
    """The probing of one source's facts in one variant at one checkpoint; its rows are in the table `probes`.

    A fact is a sample with a prompt and a response. `decoding` is `greedy`, or `sampled` if `n_samples` answers per
    fact were sampled too, at `temperature` and with `seed`.
    """

    __tablename__ = "probe_run"
    __table_args__ = (
        CheckConstraint(one_of("status", RUN_STATUSES), name="status"),
        CheckConstraint(one_of("decoding", DECODINGS), name="decoding"),
        STRICT,
    )

    checkpoint_id: Mapped[int] = mapped_column(ForeignKey("checkpoint.id"), index=True)
    source_id: Mapped[int] = mapped_column(ForeignKey("source.id"))
    variant_id: Mapped[int] = mapped_column(ForeignKey("format_variant.id"))
    decoding: Mapped[str]
    temperature: Mapped[float | None]
    n_samples: Mapped[int] = mapped_column(default=0)
    seed: Mapped[int | None]
    n_probed: Mapped[int] = mapped_column(default=0)
    n_failed: Mapped[int] = mapped_column(default=0)

    checkpoint: Mapped[Checkpoint] = relationship()
    source: Mapped[Source] = relationship()
    variant: Mapped[FormatVariant] = relationship()


class EifRun(Run, Checked):
    """The measured influence of a source's samples on queries at one checkpoint; its rows are in the table `eif`.

    `mode` is `finetune` (a step of training on the sample) or `context` (the sample in the prompt; no optimizer).
    `draw` is the number of a domain's draw.
    """

    __tablename__ = "eif_run"
    __table_args__ = (
        CheckConstraint(one_of("status", RUN_STATUSES), name="status"),
        CheckConstraint(one_of("mode", EIF_MODES), name="mode"),
        STRICT,
    )

    checkpoint_id: Mapped[int] = mapped_column(ForeignKey("checkpoint.id"), index=True)
    source_id: Mapped[int] = mapped_column(ForeignKey("source.id"))
    variant_id: Mapped[int] = mapped_column(ForeignKey("format_variant.id"))
    queries_id: Mapped[int] = mapped_column(ForeignKey("source.id"))
    query_variant_id: Mapped[int] = mapped_column(ForeignKey("format_variant.id"))
    mode: Mapped[str]
    optimizer: Mapped[str | None]
    learning_rate: Mapped[float | None]
    draw: Mapped[int | None]
    n_samples: Mapped[int] = mapped_column(default=0)
    n_queries: Mapped[int] = mapped_column(default=0)

    checkpoint: Mapped[Checkpoint] = relationship()
    source: Mapped[Source] = relationship(foreign_keys=[source_id])
    variant: Mapped[FormatVariant] = relationship(foreign_keys=[variant_id])
    queries: Mapped[Source] = relationship(foreign_keys=[queries_id])
    query_variant: Mapped[FormatVariant] = relationship(foreign_keys=[query_variant_id])


class SearchIndex(Checked):
    """The measured recall of approximate search on one sketch table, from `index build`.

    A search reads `candidates` sketches per query. `recall` is the share of the exact top 10 among them, measured on
    queries that did not choose `candidates`.
    """

    __tablename__ = "search_index"
    __table_args__ = STRICT

    fingerprint: Mapped[str] = mapped_column(primary_key=True)
    candidates: Mapped[int]
    recall: Mapped[float]
    n_queries: Mapped[int]
    n_rows: Mapped[int]
    built_at: Mapped[dt.datetime] = mapped_column(default=now)


class Study(Named):
    """An experiment on this store: its recipe, its environment, and hashes of its inputs and outputs."""

    __tablename__ = "study"
    __table_args__ = STRICT

    recipe: Mapped[dict[str, Any]]
    environment: Mapped[dict[str, Any]]
    hashes: Mapped[dict[str, Any]]
    finished_at: Mapped[dt.datetime | None]


class Evaluation(Named):
    """One evaluation of attribution scores."""

    __tablename__ = "evaluation"
    __table_args__ = STRICT

    kind: Mapped[str]
    recipe: Mapped[dict[str, Any]]
    environment: Mapped[dict[str, Any]]
    finished_at: Mapped[dt.datetime | None]


class EvaluationScore(Checked):
    """One value of an evaluation: a method's result in one measure, per query and trial if they apply."""

    __tablename__ = "evaluation_score"
    __table_args__ = STRICT

    id: Mapped[int] = mapped_column(primary_key=True)
    evaluation_id: Mapped[int] = mapped_column(ForeignKey("evaluation.id", ondelete="CASCADE"), index=True)
    method: Mapped[str]
    measure: Mapped[str]
    query_id: Mapped[str | None]
    trial: Mapped[int | None]
    value: Mapped[float]

    evaluation: Mapped[Evaluation] = relationship()


METADATA = Base.metadata  # with all tables: `catalog_base` alone has none
