"""`Store`, what people manage: checkpoints, sources, format variants, sketchers."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from lark_store.schema.database import add_named, find
from lark_store.schema.locks import removing, working
from lark_store.schema.names import check_name
from lark_store.schema.records import CheckpointInfo, SketcherInfo, VariantInfo
from lark_store.store.part import Part, clear

if TYPE_CHECKING:
    from pathlib import Path

    import polars as pl

    from lark_store.schema.records import Inventory, RenderedSample, SourceReport

Info = TypeVar("Info", CheckpointInfo, VariantInfo, SketcherInfo)


class Manage(Part):
    """The methods that add and show."""

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
            self._writable,
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

    def checkpoint_distance(self, name: str, origin: str) -> float:
        """Return how far a checkpoint's weights θ are from another's: ‖θ − θ₀‖ / ‖θ₀‖ over all tensors.

        Measured once, from their files, tensor by tensor, and kept in the store's cache. Influence over two stages of
        training supposes that it is small.

        Raises
        ------
        NameUnknownError
        CheckpointError, CheckpointChangedError
            The files are gone or others, one is LoRA adapters, or the two are not of one model.
        """
        from lark_store.ingest.distance import distance

        return distance(self._db, name, origin)

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
        replace: bool = False,
    ) -> SourceReport:
        """Add a source from a .jsonl, .parquet, .csv or .tsv file, a dataset folder or a Hugging Face dataset name.

        Rows have `prompt` and `response`, or `question`, `answer` and maybe `context`, or `text`; `columns` maps these
        names, `sample_id` and `label` to others (`{"text": "abstract", "context": "context.contexts"}`). The id is the
        column `sample_id` or `id`, else it is made from the content. Adding a source again adds its new samples only;
        a row whose id is there with other content is reported and not taken. With `replace` it takes the old sample's
        place, whose sketches and influence go as with `sample_remove`: ingest and attribute again.

        Raises
        ------
        InputError, NameTakenError, NameInvalidError, StoreBusyError
        """
        from lark_store.ingest.sources import add_source
        from lark_store.upkeep.remove import forget_samples

        db = self._writable
        options: dict[str, Any] = {"stage": stage, "domain": domain, "licence": licence, "columns": columns}
        options |= {"config": config, "split": split}
        if replace:
            with removing(db.location, "source", name):
                return add_source(db, name, str(uri), **options, forget=partial(forget_samples, db, name))
        with working(db.location, f"add-{check_name(name)}", f"adding to source `{name}`", {"source": [name]}):
            return add_source(db, name, str(uri), **options)

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
        with self._writable.session() as session:
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
        correction: str = "none",
        damping: float | None = None,
        power: float | None = None,
        min_ndim: int | None = None,
        mask_template: bool = False,
    ) -> SketcherInfo:
        r"""Add a sketcher: OPORP with `k` bins (a power of two, 256 to 1,048,576), stored as float16 or float32.

        `parameters` is a regular expression searched for in the names of a model's parameters (default: all are
        sketched), `exclude` one that takes some out again; `min_ndim=2` takes matrices alone, no norms and biases.

        `correction` is `none` (the paper's), `adam` (each gradient in the geometry of Adam's step: multiplied by
        V^(−1/4), V the second moments at the checkpoint, factored into rows and columns), `adam2` (V^(−1/2)),
        `tensor` (each parameter's gradient scaled to norm 1), `kfac` or `ekfac` (the weights of linear layers alone,
        multiplied by (G + λ)^(−power), G the curvature at the checkpoint). `damping` times its mean is added to V or
        G (default: 0.1). `power` is 0.5 (default: the dot product of two sketches is g_qᵀ (G + λ)⁻¹ g_z) or 1 (for
        queries and samples at different checkpoints: multi-stage influence).
        `mask_template` leaves out what the positions of the template and the first position say.

        Raises
        ------
        InputError, NameTakenError, NameInvalidError
        """
        from lark_store.ingest.sketchers import make_sketcher

        wanted = make_sketcher(
            name,
            k=k,
            seed=seed,
            dtype=dtype,
            parameters=parameters,
            exclude=exclude,
            correction=correction,
            damping=damping,
            power=power,
            min_ndim=min_ndim,
            mask_template=mask_template,
        )
        same = (
            "k",
            "seed",
            "dtype",
            "parameters",
            "exclude",
            "correction",
            "damping",
            "power",
            "min_ndim",
            "positions",
        )
        with self._writable.session() as session:
            row = add_named(session, wanted, same)
        return _info(SketcherInfo, row)

    def sketcher_default(self, name: str) -> None:
        """Set the sketcher that every method uses where none is named. What is sketched already stays as it is.

        Raises
        ------
        NameUnknownError
        """
        from lark_store.schema.catalog import Sketcher, StoreMeta

        with self._writable.session() as session:
            found = find(session, Sketcher, name)
            meta = session.get(StoreMeta, 1)
            assert meta is not None
            meta.sketcher = found.name

    @property
    @clear
    def default_sketcher(self) -> str:
        """The name of the sketcher that is used where none is named."""
        return self._db.default_sketcher

    def sketcher_show(self, name: str, *, checkpoint: str) -> pl.DataFrame:
        """Return what a sketcher takes of a checkpoint's model: a row per parameter with its shape, and what it leaves.

        Columns: parameter, shape, coordinates, sketched.

        Raises
        ------
        NameUnknownError, CheckpointError, InputError
        """
        from lark_store.ingest.preview import taken

        return taken(self._db, name, checkpoint)

    def study_keep(
        self,
        name: str,
        *,
        recipe: dict[str, Any],
        environment: dict[str, Any],
        hashes: dict[str, str],
        finished: bool = False,
    ) -> None:
        """Keep what a study is made of beside its rows, in the view `studies`; keeping it again takes the new values.

        Raises
        ------
        NameInvalidError, NameTakenError
            The name stands for another recipe.
        """
        from lark_store.schema.catalog import Study, now

        row = Study(name=name, recipe=recipe, environment=environment, hashes=hashes)
        with self._writable.session() as session:
            kept = add_named(session, row, ("recipe",))
            kept.environment, kept.hashes = environment, hashes
            kept.finished_at = now() if finished else None

    def evaluation_keep(
        self, name: str, *, kind: str, recipe: dict[str, Any], environment: dict[str, Any], scores: pl.DataFrame
    ) -> None:
        """Keep an evaluation's figures in the view `evaluations`, all at once; those kept before are replaced.

        `scores` has the columns method, measure, query_id, trial (both may be null) and value.

        Raises
        ------
        NameInvalidError, NameTakenError
            The name stands for another recipe.
        """
        from sqlalchemy import delete, insert

        from lark_store.schema.catalog import Evaluation, EvaluationScore, now

        columns = ("method", "measure", "query_id", "trial", "value")
        row = Evaluation(name=name, kind=kind, recipe=recipe, environment=environment)
        with self._writable.session() as session:
            kept = add_named(session, row, ("kind", "recipe"))
            kept.environment, kept.finished_at = environment, now()
            session.execute(delete(EvaluationScore).where(EvaluationScore.evaluation_id == kept.id))
            rows = scores.select(columns).with_columns(evaluation_id=kept.id).to_dicts()
            if rows:
                session.execute(insert(EvaluationScore), rows)

    def show(self) -> Inventory:
        """Return what the store holds."""
        from lark_store.query.inventory import inventory

        return inventory(self._db)


def _info(kind: type[Info], row: object, **more: Any) -> Info:
    names = {field.name for field in fields(kind)} - more.keys()
    values: dict[str, Any] = {name: getattr(row, name) for name in names}
    return kind(**values, **more)
