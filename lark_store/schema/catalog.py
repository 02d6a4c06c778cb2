"""The catalog: what people manage, as SQLAlchemy tables. It stays small.

The tables are built by the migrations alone; `tests/test_migrations.py` holds the two against each other.
Column types are those that SQLite's STRICT tables and PostgreSQL share.
"""

from __future__ import annotations

import datetime as dt
import json
from typing import TYPE_CHECKING, Any

from sqlalchemy import REAL, CheckConstraint, Double, ForeignKey, MetaData, Text, TypeDecorator, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

if TYPE_CHECKING:
    from sqlalchemy import Dialect
    from sqlalchemy.types import TypeEngine

NAMING = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "ck": "ck_%(table_name)s_%(constraint_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}
STRICT = {"sqlite_strict": True}
Real: TypeEngine[float] = Double().with_variant(REAL(), "sqlite")

STAGES = ("finetune", "pretrain", "query")
TARGET_RULES = ("response", "text", "predicted", "auto")
RUN_STATUSES = ("running", "done", "interrupted", "failed", "superseded")


def one_of(column: str, values: tuple[str, ...]) -> str:
    """Return the SQL condition that a text column holds one of `values`."""
    return f"{column} IN ({', '.join(repr(v) for v in values)})"


class Json(TypeDecorator[dict[str, Any]]):
    """A JSON object kept as text."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: dict[str, Any] | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        """Write the object as text with sorted keys."""
        return None if value is None else json.dumps(value, sort_keys=True, ensure_ascii=False)

    def process_result_value(self, value: str | None, dialect: Dialect) -> dict[str, Any] | None:  # noqa: ARG002
        """Read the object back."""
        return None if value is None else json.loads(value)


class UtcTime(TypeDecorator[dt.datetime]):
    """A point in time, kept as ISO 8601 text in UTC."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: dt.datetime | None, dialect: Dialect) -> str | None:  # noqa: ARG002
        """Write the time in UTC with microseconds, so that text order is time order."""
        return None if value is None else value.astimezone(dt.UTC).isoformat(timespec="microseconds")

    def process_result_value(self, value: str | None, dialect: Dialect) -> dt.datetime | None:  # noqa: ARG002
        """Read the time back."""
        return None if value is None else dt.datetime.fromisoformat(value)


def now() -> dt.datetime:
    """Return the time now, in UTC."""
    return dt.datetime.now(dt.UTC)


class Base(DeclarativeBase):
    """Base of the catalog's tables."""

    metadata = MetaData(naming_convention=NAMING)
    type_annotation_map = {str: Text, float: Real, dict[str, Any]: Json, dt.datetime: UtcTime}  # noqa: RUF012


class StoreMeta(Base):
    """One row that tells one store from another. `vectors` is where its tables are; None: beside the catalog.

    `sketcher` is the one that is used where none is named.
    """

    __tablename__ = "store_meta"
    __table_args__ = (CheckConstraint("id = 1", name="one_row"), STRICT)

    id: Mapped[int] = mapped_column(primary_key=True)
    store_uuid: Mapped[str]
    created_at: Mapped[dt.datetime] = mapped_column(default=now)
    created_with: Mapped[str]
    vectors: Mapped[str | None] = mapped_column(default=None)
    sketcher: Mapped[str] = mapped_column(server_default="lark")


class WorkNote(Base):
    """What a piece of work under way touches, where no folder has it as a file."""

    __tablename__ = "work"
    __table_args__ = STRICT

    key: Mapped[str] = mapped_column(primary_key=True)
    doing: Mapped[str]
    touches: Mapped[dict[str, Any] | None]


class SnapshotCopy(Base):
    """A snapshot where no folder has it as files: its record, and a copy of the catalog as a SQLite file."""

    __tablename__ = "snapshot"
    __table_args__ = STRICT

    name: Mapped[str] = mapped_column(primary_key=True)
    record: Mapped[dict[str, Any]]
    catalog: Mapped[bytes]


class Named(Base):
    """What is managed by name: the columns that those tables share."""

    __abstract__ = True

    id: Mapped[int] = mapped_column(primary_key=True, sort_order=-2)
    name: Mapped[str] = mapped_column(unique=True, sort_order=-1)
    created_at: Mapped[dt.datetime] = mapped_column(default=now, sort_order=1)


class Checkpoint(Named):
    """A model's weights at one moment of its training."""

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
    metrics: Mapped[list[CheckpointMetric]] = relationship(cascade="all, delete-orphan")


class CheckpointMetric(Base):
    """One figure that was measured at a checkpoint, such as its accuracy."""

    __tablename__ = "checkpoint_metric"
    __table_args__ = STRICT

    checkpoint_id: Mapped[int] = mapped_column(ForeignKey("checkpoint.id", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    value: Mapped[float]


class Source(Named):
    """A named set of samples; a query is a sample of a source whose stage is `query`."""

    __tablename__ = "source"
    __table_args__ = (CheckConstraint(one_of("stage", STAGES), name="stage"), STRICT)

    stage: Mapped[str]
    domain: Mapped[str | None]
    uri: Mapped[str]
    licence: Mapped[str | None]
    columns: Mapped[dict[str, Any]]


class FormatVariant(Named):
    """How a sample becomes text, and which of its tokens are targets."""

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


class Sketcher(Named):
    """What is sketched and how: the part of a sketch's identity that is chosen before a model is met."""

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


class Correction(Base):
    """The factors by which gradients at one checkpoint are corrected; `sha256` is that of their file's content.

    A checkpoint has one set of a kind, so that all sketches made there by one sketcher can be compared.
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
    """The columns that both kinds of run share."""

    id: Mapped[int] = mapped_column(primary_key=True, sort_order=-2)
    status: Mapped[str] = mapped_column(sort_order=-1)
    fingerprint: Mapped[str] = mapped_column(sort_order=1)
    recipe: Mapped[dict[str, Any]] = mapped_column(sort_order=1)
    versions: Mapped[dict[str, Any]] = mapped_column(sort_order=1)
    device: Mapped[str] = mapped_column(sort_order=1)
    lance_version: Mapped[int | None] = mapped_column(sort_order=1)
    started_at: Mapped[dt.datetime] = mapped_column(default=now, sort_order=1)
    finished_at: Mapped[dt.datetime | None] = mapped_column(sort_order=1)
    error: Mapped[str | None] = mapped_column(sort_order=1)


class IngestRun(Run, Base):
    """The sketching of one source, in one variant, at one checkpoint, by one sketcher."""

    __tablename__ = "ingest_run"
    __table_args__ = (CheckConstraint(one_of("status", RUN_STATUSES), name="status"), STRICT)

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


class ScoreRun(Run, Base):
    """The scoring of one group (source and variant) of sketches against one set of queries."""

    __tablename__ = "score_run"
    __table_args__ = (CheckConstraint(one_of("status", RUN_STATUSES), name="status"), STRICT)

    method: Mapped[str]
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


class SearchIndex(Base):
    """What `index build` found about the codes of one sketch table: how far an approximate search can be trusted.

    `candidates` sketches are read for each query; `recall` is the share of the exact ten best that were among them, on
    queries that had no part in choosing that number.
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
    """An experiment whose tables come from this store: its recipe, where it ran, hashes of what it read and made."""

    __tablename__ = "study"
    __table_args__ = STRICT

    recipe: Mapped[dict[str, Any]]
    environment: Mapped[dict[str, Any]]
    hashes: Mapped[dict[str, Any]]
    finished_at: Mapped[dt.datetime | None]


class Evaluation(Named):
    """How true some methods' scores were found to be, by one kind of evaluation."""

    __tablename__ = "evaluation"
    __table_args__ = STRICT

    kind: Mapped[str]
    recipe: Mapped[dict[str, Any]]
    environment: Mapped[dict[str, Any]]
    finished_at: Mapped[dt.datetime | None]


class EvaluationScore(Base):
    """One figure of an evaluation: a method's value by one measure, of one query in one trial where there are such."""

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
