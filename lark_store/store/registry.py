"""`Store`, the managed objects: checkpoints, sources, format variants, sketchers."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from lark_store.core.names import check_name
from lark_store.results import CheckpointInfo, CheckpointRun, SketcherInfo, VariantInfo
from lark_store.schema.database import add_named, find, find_same
from lark_store.schema.locks import removing, working
from lark_store.specs import CheckpointSpec, SketcherSpec, SourceSpec, VariantSpec
from lark_store.store.base import Part, keywords, public

if TYPE_CHECKING:
    from pathlib import Path
    from typing import Unpack

    import polars as pl

    from lark_store.core.objects import ModelObject, TokenizerObject
    from lark_store.modeling.add_checkpoints import Added
    from lark_store.readers.inputs import SourceData
    from lark_store.results import Inventory, RenderedSample, SourceReport
    from lark_store.specs import (
        BaseCheckpointOptions,
        CheckpointOptions,
        SketcherOptions,
        SourceOptions,
        VariantOptions,
    )

Info = TypeVar("Info", CheckpointInfo, VariantInfo, SketcherInfo)


class RegistryMethods(Part):
    """The methods that add and show."""

    @keywords(CheckpointSpec)
    def checkpoint_add(
        self,
        name: str,
        path: str | Path | None = None,
        *,
        model: str | ModelObject | None = None,
        tokenizer: str | Path | TokenizerObject | None = None,
        metrics: dict[str, float] | None = None,
        **options: Unpack[BaseCheckpointOptions],
    ) -> CheckpointInfo:
        """Add a checkpoint: a folder made by `save_pretrained`, or a hub name with an optional `revision`.

        Hashes its weights and tokenizer; the files stay where they are. Adding the same checkpoint again is harmless
        and sets the given metrics. A folder saved by Trainer has the step, epoch, learning rate and metrics in its
        `trainer_state.json`; arguments take precedence. `tokenizer` and `config` locate these files elsewhere: a folder
        or a hub name. `model` is the model's name, if its config has none.

        `model` may also be a model, as in `model=trainer.model`, and `tokenizer` a tokenizer: both are saved to `path`,
        by default a folder of the store.

        Raises
        ------
        CheckpointError, InputError, NameTakenError, NameInvalidError
        """
        from lark_store.modeling.add_checkpoints import add_checkpoint
        from lark_store.modeling.save_objects import save_objects

        db = self._writable
        place, objects = save_objects(db, name, path, model, tokenizer)
        spec = CheckpointSpec(metrics=metrics or {}, model=objects["model"], tokenizer=objects["tokenizer"], **options)
        return _checkpoint_info(add_checkpoint(db, name, place, spec))

    @keywords(CheckpointSpec)
    def checkpoint_add_run(
        self,
        name: str,
        path: str | Path,
        *,
        metrics: dict[str, float] | None = None,
        **options: Unpack[CheckpointOptions],
    ) -> CheckpointRun:
        """Add the checkpoints of a Trainer's run: a folder with `checkpoint-500`, `checkpoint-1000` and so on.

        They are named `NAME-500`, `NAME-1000` and added in order of step, each with the facts in its
        `trainer_state.json`. A model in the run's folder itself is `NAME-final`, unless a checkpoint has its weights.
        `path` may be a glob pattern of folders, too; folders with other names are `NAME-folder`. Incomplete folders are
        skipped and listed. Adding the run again adds its new checkpoints. The folder of a single checkpoint is added as
        `checkpoint_add` does; only there are `step`, `epoch`, `learning_rate`, `metrics` and `revision` allowed.

        Raises
        ------
        CheckpointError, InputError, NameTakenError, NameInvalidError
        """
        from lark_store.modeling.add_checkpoints import add_run

        report = add_run(self._writable, name, str(path), CheckpointSpec(metrics=metrics or {}, **options))
        return CheckpointRun(
            tuple(_checkpoint_info(one) for one in report.added),
            frozenset(one.row.name for one in report.added if one.is_new),
            report.skipped,
            report.notes,
        )

    def checkpoint_distance(self, name: str, origin: str, *, layers: str = "all") -> float:
        """Return the distance of a checkpoint's weights θ from another's: ‖θ − θ₀‖ / ‖θ₀‖ over all tensors.

        With `layers="linear"` it is over the weights of the linear layers of MLPs and attention alone: no embeddings,
        output head, norms and biases.

        Measured once from the files, tensor by tensor, and cached in the store. Influence across two training stages
        assumes a small distance.

        Raises
        ------
        InputError, NameUnknownError
        CheckpointError, CheckpointChangedError
            The files are missing or changed, one is a LoRA adapter, the two belong to different models, or the names of
            their tensors don't tell the linear layers.
        """
        from lark_store.modeling.weight_distance import distance

        return distance(self._db, name, origin, layers)

    @keywords(SourceSpec)
    def source_add(
        self,
        name: str,
        uri: SourceData,
        *,
        stage: str,
        columns: dict[str, str] | None = None,
        **options: Unpack[SourceOptions],
    ) -> SourceReport:
        """Add a source from files, folders, a Hugging Face dataset, or Python objects.

        `uri` is a path, a pattern (`data/*.jsonl`), a hub name, a list of them, or rows: a list or an iterator of
        dicts, a frame of polars, pandas or Arrow (anything with `__arrow_c_stream__`), or a dataset of `datasets`. Rows
        are streamed.

        Rows have one of the forms of the page "My data looks like this": chats (`messages`, `conversations`), `prompt`
        with `completion` or `response`, `instruction` and `output`, `chosen` and `rejected`, `question` and `answer`,
        or `text`. `columns` maps fields to columns (`{"text": "abstract", "context": "context.contexts"}`), keys of
        messages (`{"messages.role": "speaker"}`) and roles (`{"role.user": "Customer"}`). Texts and ids are kept byte
        for byte. Ids come from the column `sample_id` or `id`, in every row or in none, or are derived from the
        content.

        Adding a source again adds its new samples only. A row with an existing id but other content is reported and
        skipped; with `replace` it replaces the old sample and removes its sketches and influence, as `sample_remove`
        does: ingest and attribute again. Older versions stripped the white space around texts: a row that differs only
        by this counts as existing and in `n_stripped`; `replace` stores its full text under the same id. `dry_run`
        reads all rows and writes nothing.

        Raises
        ------
        InputError, NameTakenError, NameInvalidError, StoreBusyError
        """
        from lark_store.ingest.sources import add_source
        from lark_store.maintenance.remove import forget_samples

        spec = SourceSpec(stage=stage, columns=columns or {}, **options)
        if spec.dry_run:
            return add_source(self._db, name, uri, spec)
        db = self._writable
        if spec.replace:
            with removing(db.location, "source", name):
                return add_source(db, name, uri, spec, forget=partial(forget_samples, db, name))
        with working(db.location, f"add-{check_name(name)}", f"adding to source `{name}`", {"source": [name]}):
            return add_source(db, name, uri, spec)

    @keywords(VariantSpec)
    def variant_add(self, name: str, **options: Unpack[VariantOptions]) -> VariantInfo:
        """Add a format variant: a template (`chatml`, `raw` or a Jinja file), a target rule and a length in tokens.

        Target rules: `response` (loss on the response's tokens), `assistant` (on all assistant turns of a chat, except
        messages with `weight: 0`), `last` (on the last one), `assistant+end` and `last+end` (with the end-of-turn token
        of each), `text` (on all tokens), `predicted` (on all tokens, with the model's own most likely tokens as
        labels), `predicted-answer` (below), `auto` (`response` or `assistant` where a sample has one, else
        `predicted`). `loss` is the `mean` over a sample's targets or their `sum`; the cosine of two gradients is the
        same.

        With `predicted-answer`, the loss is on the answer that the checkpoint itself predicts: the paper's formatted
        pretraining text. A text becomes the `{document}` of `prompt`, whose `{question}` is `question` or the text's
        metadata value `question_column`; a prompt or a chat is asked as it is, and its own answer is not used. The
        answer is the most likely of `labels`, by the sum of log-probabilities over their tokens, or decoded greedily,
        up to `max_answer` tokens. It is stored with each sketch: see the SQL view `predictions`.

        Raises
        ------
        InputError, NameTakenError, NameInvalidError
        """
        from lark_store.modeling.predicted_answers import AnswerSettings
        from lark_store.modeling.rendering import make_variant

        spec = VariantSpec(**options)
        answers = AnswerSettings.of_spec(spec)
        variant = make_variant(name, str(spec.template), spec.targets, spec.max_length, spec.loss, answers)
        with self._writable.session() as session:
            row = add_named(session, variant, ("template", "template_text", "targets", "max_length", "loss", "answers"))
        return replace(_info(VariantInfo, row), loss=spec.loss)

    def variant_show(
        self, name: str, *, sample: str, source: str | None = None, checkpoint: str | None = None
    ) -> RenderedSample:
        """Render one sample as the model sees it, with its targets marked.

        `checkpoint` provides the tokenizer (default: the latest checkpoint). `source` is needed if several sources have
        this id.

        Raises
        ------
        NameUnknownError, InputError
        """
        from lark_store.ingest.preview import preview

        return preview(self._db, name, sample, source, checkpoint)

    @keywords(SketcherSpec)
    def sketcher_add(self, name: str, **options: Unpack[SketcherOptions]) -> SketcherInfo:
        r"""Add a sketcher: OPORP with `k` bins (a power of two, 256 to 1,048,576), stored as float16 or float32.

        `parameters` is a regular expression that selects the model's parameters by name (default: all); `exclude` is
        one that removes some again. `min_ndim=2` keeps matrices only, no norms or biases.

        `correction` is `none` (the paper's), `adam` (each gradient in the geometry of Adam's step: multiplied by
        V^(−1/4), with V the second moments at the checkpoint, factored into rows and columns), `adam2` (V^(−1/2)),
        `tensor` (each parameter's gradient scaled to norm 1), `kfac` or `ekfac` (only the weights of linear layers,
        multiplied by (G + λ)^(−power), with G the curvature at the checkpoint). `damping` times the mean of V or G is
        added to it (default: 0.1). `power` is 0.5 (default: the dot product of two sketches is g_qᵀ (G + λ)⁻¹ g_z) or 1
        (for queries and samples at different checkpoints: multi-stage influence). `mask_template` leaves out the
        contribution of the template's positions and of the first position.

        Raises
        ------
        InputError, NameTakenError, NameInvalidError
        """
        from lark_store.gradients.sketch.layout import make_sketcher

        sketcher = make_sketcher(name, **options)
        identity = tuple("positions" if f.name == "mask_template" else f.name for f in fields(SketcherSpec))
        with self._writable.session() as session:
            row = add_named(session, sketcher, identity)
        return _info(SketcherInfo, row)

    def sketcher_default(self, name: str) -> None:
        """Set the default sketcher, used where a method is given none. Existing sketches stay as they are.

        Raises
        ------
        NameUnknownError
        """
        from lark_store.schema.catalog import Sketcher, StoreMeta

        with self._writable.session() as session:
            row = find(session, Sketcher, name)
            meta = session.get(StoreMeta, 1)
            assert meta is not None
            meta.sketcher = row.name

    @property
    @public
    def default_sketcher(self) -> str:
        """The name of the default sketcher."""
        return self._db.default_sketcher

    def sketcher_show(self, name: str, *, checkpoint: str) -> pl.DataFrame:
        """Return a row per parameter of a checkpoint's model, with its shape and whether a sketcher includes it.

        Columns: parameter, shape, coordinates, sketched.

        Raises
        ------
        NameUnknownError, CheckpointError, InputError
        """
        from lark_store.ingest.preview import list_parameters

        return list_parameters(self._db, name, checkpoint)

    def study_keep(
        self,
        name: str,
        *,
        recipe: dict[str, Any],
        environment: dict[str, Any],
        hashes: dict[str, str],
        finished: bool = False,
    ) -> None:
        """Record a study in the view `studies`. Recording it again updates its values.

        Raises
        ------
        NameInvalidError, NameTakenError
            The name belongs to another recipe.
        """
        from lark_store.schema.catalog import Study
        from lark_store.schema.catalog_base import now

        row = Study(name=name, recipe=recipe, environment=environment, hashes=hashes)
        with self._writable.session() as session:
            stored = add_named(session, row, ("recipe",))
            stored.environment, stored.hashes = environment, hashes
            stored.finished_at = now() if finished else None

    def evaluation_check(self, name: str, *, kind: str, recipe: dict[str, Any]) -> None:
        """Check, before computing its scores, that an evaluation can be stored under a name.

        Raises
        ------
        NameInvalidError, NameTakenError
            The name belongs to another recipe.
        StoreError
            A snapshot is read-only.
        """
        from lark_store.schema.catalog import Evaluation

        with self._writable.session() as session:
            find_same(session, Evaluation(name=name, kind=kind, recipe=recipe, environment={}), ("kind", "recipe"))

    def evaluation_keep(
        self, name: str, *, kind: str, recipe: dict[str, Any], environment: dict[str, Any], scores: pl.DataFrame
    ) -> None:
        """Store an evaluation's scores in the view `evaluations`, replacing earlier ones in one transaction.

        `scores` has the columns method, measure, query_id, trial (both may be null) and value.

        Raises
        ------
        NameInvalidError, NameTakenError
            The name belongs to another recipe.
        """
        from sqlalchemy import delete

        from lark_store.schema.catalog import Evaluation, EvaluationScore
        from lark_store.schema.catalog_base import now

        columns = ("method", "measure", "query_id", "trial", "value")
        row = Evaluation(name=name, kind=kind, recipe=recipe, environment=environment)
        with self._writable.session() as session:
            stored = add_named(session, row, ("kind", "recipe"))
            stored.environment, stored.finished_at = environment, now()
            session.execute(delete(EvaluationScore).where(EvaluationScore.evaluation_id == stored.id))
            rows = scores.select(columns).to_dicts()
            session.add_all([EvaluationScore(evaluation_id=stored.id, **row) for row in rows])

    def checkpoint_list(self) -> pl.DataFrame:
        """Return a row per checkpoint, by epoch, as in `show`."""
        return self._listed("checkpoints")

    def source_list(self) -> pl.DataFrame:
        """Return a row per source with its number of samples, as in `show`."""
        return self._listed("sources")

    def variant_list(self) -> pl.DataFrame:
        """Return a row per format variant, as in `show`."""
        return self._listed("variants")

    def sketcher_list(self) -> pl.DataFrame:
        """Return a row per sketcher, as in `show`; `is_default` marks the default one."""
        return self._listed("sketchers")

    def _listed(self, kind: str) -> pl.DataFrame:
        from lark_store.query.answers.inventory import listed

        return listed(self._db, kind)

    def show(self) -> Inventory:
        """Return the store's contents."""
        from lark_store.query.answers.inventory import inventory

        return inventory(self._db)


def _checkpoint_info(added: Added) -> CheckpointInfo:
    metrics = {metric.name: metric.value for metric in added.row.metrics}
    return _info(CheckpointInfo, added.row, metrics=metrics, notes=added.notes)


def _info(kind: type[Info], row: object, **extra: Any) -> Info:
    names = {field.name for field in fields(kind)} - extra.keys()
    values: dict[str, Any] = {name: getattr(row, name) for name in names}
    return kind(**values, **extra)
