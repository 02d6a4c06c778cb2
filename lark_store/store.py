"""`Store`, the public face: make, open and close a store, and one method for each command."""

from __future__ import annotations

import os
import shutil
import tempfile
import uuid
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

from lark_store import migrations
from lark_store.errors import StoreError, StoreExistsError
from lark_store.schema.catalog import StoreMeta
from lark_store.schema.database import Database, Location, add_named, exists, is_file
from lark_store.schema.records import CheckpointInfo, SketcherInfo, VariantInfo

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    import polars as pl

    from lark_store.schema.records import (
        Hits,
        IngestReport,
        Inventory,
        OnProgress,
        PlanReport,
        RenderedSample,
        SourceReport,
    )

Info = TypeVar("Info", CheckpointInfo, VariantInfo, SketcherInfo)
DEFAULT_PATH = "lark.store"
ENVIRONMENT = "LARK_STORE"
DEFAULT_SKETCHER = "lark"


class Store:
    """An open store. Make one with `Store.create`, open one with `Store.open`; use it as a context manager.

    Names are slugs (`a-z`, `0-9`, `.`, `_`, `-`). Every method raises a `LarkStoreError` with a hint for a foreseeable
    fault; a name or an input that is wrong changes nothing.
    """

    def __init__(self, database: Database) -> None:
        self._db = database

    # --- open and close -------------------------------------------------------------------------------------------

    @classmethod
    def create(cls, path: str | Path | None = None) -> Self:
        """Make a fresh store with the variants `raw` and `chatml` and the sketcher `lark`, and open it.

        `path` is a folder that does not exist yet (default: `LARK_STORE` or `./lark.store`).

        Raises
        ------
        StoreExistsError
            There is something at `path` already.
        """
        location = _location(path)
        if exists(location.root):
            is_store = is_file(location.catalog)
            raise StoreExistsError(
                f"there is {'a store' if is_store else 'something'} at `{location.root}` already",
                "use it as it is" if is_store else "name another path with `--store PATH`",
            )
        try:
            location.root.parent.mkdir(parents=True, exist_ok=True)
            draft = Location(Path(tempfile.mkdtemp(prefix=f".{location.root.name}.", dir=location.root.parent)))
        except OSError as error:
            raise StoreError(
                f"a store can't be made at `{location.root}`: {error.strerror}", "name another path with `--store PATH`"
            ) from error
        try:
            _build(draft)
            draft.root.chmod(0o755)
            draft.root.rename(location.root)
        finally:
            shutil.rmtree(draft.root, ignore_errors=True)
        return cls.open(location.root)

    @classmethod
    def open(cls, path: str | Path | None = None) -> Self:
        """Open a store; never changes its schema.

        Raises
        ------
        NotAStoreError, OlderSchemaError, NewerSchemaError
        """
        location = _location(path)
        migrations.check(location)
        return cls(Database(location))

    @staticmethod
    def db_status(path: str | Path | None = None) -> tuple[str, str]:
        """Return the schema version of the store at `path` and that of this lark-store."""
        return migrations.version(_location(path)), migrations.newest()

    @staticmethod
    def db_upgrade(path: str | Path | None = None) -> Path | None:
        """Bring an older store up to date; returns the backup of its catalog, None if there was nothing to do."""
        return migrations.upgrade(_location(path))

    def close(self) -> None:
        """Let go of the store's files."""
        self._db.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r})"

    @property
    def path(self) -> Path:
        """The store's folder."""
        return self._db.location.root

    # --- what people manage ---------------------------------------------------------------------------------------

    def checkpoint_add(
        self,
        name: str,
        path: str | Path,
        *,
        model: str | None = None,
        revision: str | None = None,
        epoch: float | None = None,
        step: int | None = None,
        learning_rate: float | None = None,
        metrics: dict[str, float] | None = None,
    ) -> CheckpointInfo:
        """Add a checkpoint: a folder made by `save_pretrained`, or a hub name with an optional `revision`.

        Its weights and tokenizer are hashed; the files stay where they are. Adding the same checkpoint again is
        harmless and sets the metrics given.

        Raises
        ------
        CheckpointError, NameTakenError, NameInvalidError
        """
        from lark_store.ingest.checkpoints import add_checkpoint

        row = add_checkpoint(
            self._db,
            name,
            str(path),
            model=model,
            revision=revision,
            epoch=epoch,
            step=step,
            learning_rate=learning_rate,
            metrics=metrics or {},
        )
        return _info(CheckpointInfo, row, metrics={m.name: m.value for m in row.metrics})

    def source_add(
        self,
        name: str,
        uri: str | Path,
        *,
        stage: str,
        domain: str | None = None,
        licence: str | None = None,
        columns: dict[str, str] | None = None,
        config: str | None = None,
        split: str | None = None,
    ) -> SourceReport:
        """Add a source from a .jsonl, .parquet, .csv or .tsv file, a dataset folder or a Hugging Face dataset name.

        Rows have `prompt` and `response`, or `question`, `answer` and maybe `context`, or `text`; `columns` maps these
        names, `sample_id` and `label` to others (`{"text": "abstract", "context": "context.contexts"}`). The id is the
        column `sample_id` or `id`, else it is made from the content. Adding a source again adds its new samples only;
        a row whose id is there with other content is reported and not taken.

        Raises
        ------
        InputError, NameTakenError, NameInvalidError
        """
        from lark_store.ingest.sources import add_source

        options: dict[str, Any] = {"stage": stage, "domain": domain, "licence": licence, "columns": columns}
        return add_source(self._db, name, str(uri), **options, config=config, split=split)

    def variant_add(
        self, name: str, *, template: str | Path, targets: str = "auto", max_length: int = 1024
    ) -> VariantInfo:
        """Add a format variant: a template (`raw`, `chatml` or a Jinja file), a target rule and a length in tokens.

        Target rules: `response` (the loss on the response's tokens), `text` (on all tokens), `predicted` (on all, with
        the model's own most likely tokens as labels), `auto` (`response` where a sample has one, else `predicted`).

        Raises
        ------
        InputError, NameTakenError, NameInvalidError
        """
        from lark_store.ingest.variants import make_variant

        variant = make_variant(name, str(template), targets, max_length)
        with self._db.session() as session:
            row = add_named(session, variant, ("template", "template_text", "targets", "max_length"))
        return _info(VariantInfo, row)

    def variant_show(
        self, name: str, *, sample: str, source: str | None = None, checkpoint: str | None = None
    ) -> RenderedSample:
        """Render one sample as a model sees it, with its targets marked.

        `checkpoint` gives the tokenizer (default: the one added last); `source` is needed if several have the sample.

        Raises
        ------
        NameUnknownError, InputError
        """
        from lark_store.ingest.preview import preview

        return preview(self._db, name, sample, source, checkpoint)

    def sketcher_add(
        self,
        name: str,
        *,
        k: int = 65_536,
        seed: int = 0,
        dtype: str = "float16",
        parameters: str | None = None,
        exclude: str | None = None,
    ) -> SketcherInfo:
        r"""Add a sketcher: OPORP with `k` bins (a power of two, 256 to 1,048,576), stored as float16 or float32.

        `parameters` is a regular expression searched for in the names of a model's parameters (default: all are
        sketched), `exclude` one that takes some out again.

        Raises
        ------
        InputError, NameTakenError, NameInvalidError
        """
        from lark_store.ingest.sketchers import make_sketcher

        wanted = make_sketcher(name, k=k, seed=seed, dtype=dtype, parameters=parameters, exclude=exclude)
        with self._db.session() as session:
            row = add_named(session, wanted, ("k", "seed", "dtype", "parameters", "exclude"))
        return _info(SketcherInfo, row)

    def sketcher_show(self, name: str, *, checkpoint: str) -> pl.DataFrame:
        """Return what a sketcher takes of a checkpoint's model: a row per parameter with its shape, and what it leaves.

        Columns: parameter, shape, coordinates, sketched.

        Raises
        ------
        NameUnknownError, CheckpointError, InputError
        """
        from lark_store.ingest.preview import taken

        return taken(self._db, name, checkpoint)

    # --- the main job ---------------------------------------------------------------------------------------------

    def ingest(
        self,
        checkpoints: Sequence[str],
        sources: Sequence[str],
        variants: Sequence[str],
        *,
        sketcher: str = DEFAULT_SKETCHER,
        limit: int | None = None,
        device: str = "auto",
        precision: str = "auto",
        batch_tokens: int | None = None,
        gradient_checkpointing: bool = False,
        on_progress: OnProgress | None = None,
    ) -> IngestReport:
        """Sketch the loss gradient of every sample that is not sketched yet.

        Idempotent and resumable: killed at any moment and run again, it goes on where it stopped. `limit` takes the
        first samples of each source; `precision` is the model's (`auto`: as saved on a GPU, float32 elsewhere).

        Samples of like length go through the model together, at most `batch_tokens` tokens with their padding (default:
        1,024 on a CPU, 8,192 on CUDA); a batch that does not fit into memory is halved. `gradient_checkpointing` takes
        less memory and more time. A model with layers that can't be batched goes one sample at a time,
        and the report's `notes` say so. Under `torchrun` the samples are shared out among the processes, all of which
        must call it.

        Raises
        ------
        NameUnknownError, CheckpointChangedError, CheckpointError, StoreBusyError, InputError
        """
        from lark_store.ingest.run import Request, ingest

        names = (list(checkpoints), list(sources), list(variants), sketcher)
        request = Request(*names, limit, device, precision, batch_tokens, gradient_checkpointing)
        return ingest(self._db, request, on_progress)

    def plan(
        self,
        checkpoints: Sequence[str],
        sources: Sequence[str],
        variants: Sequence[str],
        *,
        sketcher: str = DEFAULT_SKETCHER,
        limit: int | None = None,
        device: str = "auto",
        precision: str = "auto",
        batch_tokens: int | None = None,
        gradient_checkpointing: bool = False,
        on_progress: OnProgress | None = None,
    ) -> PlanReport:
        """Say what an `ingest` with the same arguments would take: sketches, bytes, time and memory.

        Nothing is written and no weights are loaded: a few batches of the samples' lengths are run through a model of
        the checkpoint's config.

        Raises
        ------
        NameUnknownError, CheckpointChangedError, CheckpointError, InputError
        """
        from lark_store.ingest.plan import plan
        from lark_store.ingest.run import Request

        names = (list(checkpoints), list(sources), list(variants), sketcher)
        request = Request(*names, limit, device, precision, batch_tokens, gradient_checkpointing)
        return plan(self._db, request, on_progress)

    def verify(
        self,
        *,
        sketches: int = 20,
        sketcher: str | None = None,
        checkpoint: str | None = None,
        device: str = "auto",
        precision: str = "auto",
        on_progress: OnProgress | None = None,
    ) -> pl.DataFrame:
        """Compute stored sketches again, each sample alone, and compare.

        Takes `sketches` rows at random (always the same ones) of the sketcher and checkpoint asked for (default: of
        all). Returns a row each: sketcher, checkpoint, source, variant, sample_id, cosine, norm_ratio (new / stored),
        limit and ok. The limit is a cosine of 0.9999 for gradients made in float32, 0.999 for half precision.

        Raises
        ------
        NameUnknownError, CheckpointChangedError, CheckpointError, InputError
        """
        from lark_store.ingest.verify import verify

        return verify(self._db, sketches, sketcher, checkpoint, device, precision, on_progress)

    def attribute(
        self,
        checkpoints: Sequence[str],
        *,
        queries: str | None = None,
        sources: Sequence[str] = (),
        query_checkpoint: str | None = None,
        query_variant: str | None = None,
        sketcher: str = DEFAULT_SKETCHER,
        method: str | None = None,
        hits: int = 100,
        on_progress: OnProgress | None = None,
    ) -> pl.DataFrame:
        """Score queries against sources, group by group, where sketches were added since the last time.

        Writes the tables `influence` (the best `hits` samples per query and group) and `source_influence`. Influence is
        signed: above 0, training on the sample lowers the query's loss. `method` is `cosine` or `dot`; `dot` is the
        default when the queries' sketches come from another checkpoint, the two-stage dot product of the multi-stage
        literature. Returns a row per group: scored, or current already.

        Raises
        ------
        NameUnknownError, NothingToScoreError, InputError
        """
        from lark_store.query.attribute import attribute
        from lark_store.query.groups import ask

        questions = [
            question
            for checkpoint in checkpoints
            for question in ask(
                self._db,
                checkpoint=checkpoint,
                queries=queries,
                sources=sources,
                query_checkpoint=query_checkpoint,
                query_variant=query_variant,
                sketcher=sketcher,
                method=method,
            )
        ]
        return attribute(self._db, questions, hits=hits, on_progress=on_progress)

    # --- answers --------------------------------------------------------------------------------------------------

    def top(
        self,
        query: str,
        *,
        checkpoint: str,
        k: int = 10,
        sources: Sequence[str] = (),
        variants: Sequence[str] = (),
        opponents: bool = False,
        queries: str | None = None,
        query_checkpoint: str | None = None,
        query_variant: str | None = None,
        sketcher: str = DEFAULT_SKETCHER,
        method: str | None = None,
    ) -> Hits:
        """Return the `k` samples with the highest (`opponents`: the lowest) influence on a query, with their text.

        Exact, from the sketches themselves; `attribute` need not have run.

        Raises
        ------
        NameUnknownError, NothingToScoreError, InputError
        """
        from lark_store.query.groups import ask
        from lark_store.query.top import top

        questions = ask(
            self._db,
            checkpoint=checkpoint,
            queries=queries,
            sources=sources,
            variants=variants,
            query_checkpoint=query_checkpoint,
            query_variant=query_variant,
            sketcher=sketcher,
            method=method,
        )
        return top(self._db, query, questions, k=k, opponents=opponents)

    def metrics(
        self,
        *,
        checkpoint: str | None = None,
        view: str = "all",
        method: str = "cosine",
        sketcher: str = DEFAULT_SKETCHER,
        query_variant: str | None = None,
    ) -> pl.DataFrame:
        """Return metrics of what `attribute` scored, with 95% bootstrap intervals over queries.

        `view` is `all` (a row per figure: mean_max_influence, ft_pt_ratio, ft_wins, pt_dominance, format_effect),
        `influence` (the paper's Table I) or `dominance` (Table II). Definitions: `lark_store.query.metrics`.

        Raises
        ------
        NameUnknownError, NothingToScoreError, InputError
        """
        from lark_store.query.measure import measure

        return measure(self._db, checkpoint, view, method, sketcher, query_variant)

    def sql(self, query: str) -> pl.DataFrame:
        """Run one SELECT (DuckDB's SQL) over the store's views, read-only.

        Views: checkpoints, checkpoint_metrics, sources, variants, sketchers, samples, sketches (without vectors),
        ingest_runs, failures, score_runs, influence, source_influence.

        Raises
        ------
        QueryError
        """
        from lark_store.query.sql import run

        return run(self._db, query)

    def show(self) -> Inventory:
        """Return what the store holds."""
        from lark_store.query.inventory import inventory

        return inventory(self._db)


def _location(path: str | Path | None) -> Location:
    root = Path(path or os.environ.get(ENVIRONMENT) or DEFAULT_PATH)
    if "?" in str(root.absolute()):
        raise StoreError(f"a store can't be at `{root}`: LanceDB reads `?` as part of a URL", "name another path")
    return Location(root)


def _build(location: Location) -> None:
    """Build a fresh store: the catalog by the migrations, the empty tables, the built-in variants and sketcher."""
    from lark_store.ingest.sketchers import make_sketcher
    from lark_store.ingest.variants import BUILT_IN, DEFAULT_MAX_LENGTH, make_variant

    migrations.create(location)
    database = Database(location)
    database.vectors.create()
    with database.session() as session:
        session.add(StoreMeta(id=1, store_uuid=str(uuid.uuid4()), created_with=version("lark-store")))
        session.add_all(make_variant(name, name, "auto", DEFAULT_MAX_LENGTH) for name in BUILT_IN)
        session.add(make_sketcher(DEFAULT_SKETCHER))
    database.close()


def _info(kind: type[Info], row: object, **more: Any) -> Info:
    names = {field.name for field in fields(kind)} - more.keys()
    values: dict[str, Any] = {name: getattr(row, name) for name in names}
    return kind(**values, **more)
