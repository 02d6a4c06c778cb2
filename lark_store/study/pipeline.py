"""The steps of a study, from recipe to report; each step does only missing work."""

from __future__ import annotations

import json
import platform
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from lark_store.core.atomic_files import writing
from lark_store.core.hashing import file_hash
from lark_store.errors import InputError, LarkStoreError, StoreError
from lark_store.store import Store
from lark_store.store.base import locked
from lark_store.study import recipe as recipes
from lark_store.study.groups import SKETCHER
from lark_store.study.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import polars as pl

    from lark_store.results import OnProgress
    from lark_store.study.results import Results

    Say = Callable[[str], None]

NAME = "study"
HITS = 100  # per query and group, if not every rank is needed
REPORT = "report.html"


def run(path: str | Path, *, on_progress: OnProgress | None = None, say: Say | None = None) -> Results:
    """Build pools, fine-tune, evaluate, ingest, score, and write tables, figures and report into the study's folder.

    Resumable at any moment. `say` receives a line as each step begins.

    Raises
    ------
    InputError
        The recipe is invalid, or differs from the study's first run; a source has too few samples.
    CheckpointError, StoreBusyError, and the errors of `Store`
    """
    recipe = recipes.read(path)
    with (
        _disk(recipe),
        _open(recipe) as store,
        locked(recipe.store, NAME, f"running the study of `{path}`"),
    ):
        study = _Study(recipe, store, on_progress or (lambda _: None), say or (lambda _: None))
        study.compute()
        return study.publish(recipe.root / REPORT)


def report(path: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a finished study from its store (default: into the study's folder).

    Raises
    ------
    InputError
        The study is unfinished, or was run with another recipe.
    """
    from pathlib import Path

    recipe = recipes.read(path)
    if not recipe.store.exists():
        raise InputError(f"the study of `{path}` has not been run", f"run `lark-store study run {path}`")
    with Store.open(recipe.store) as store:
        finished_at = store.sql("select finished_at from studies where name = ?", [NAME])
        if finished_at.is_empty() or finished_at.item() is None:
            raise InputError(f"the study of `{path}` is not finished", f"run `lark-store study run {path}`")
        study = _Study(recipe, store, lambda _: None, lambda _: None)
        study.stored_hashes()
        target = Path(output) if output else recipe.root / REPORT
        study.write_report(study.collect(), target)
        return target


@contextmanager
def _disk(recipe: Recipe) -> Iterator[None]:
    """Turn errors of a full disk or an unwritable folder into a `StoreError`."""
    try:
        yield
    except LarkStoreError:  # some are an OSError too
        raise
    except OSError as error:
        raise StoreError(
            f"`{error.filename or recipe.root}` can't be read or written: {error.strerror or error}",
            "check free space and permissions, then run the study again: it resumes",
        ) from error


def _open(recipe: Recipe) -> Store:
    return Store.open(recipe.store) if recipe.store.exists() else Store.create(recipe.store)


@dataclass
class _Study:
    """A running study."""

    recipe: Recipe
    store: Store
    on_progress: OnProgress
    say: Say

    def compute(self) -> None:
        """Do all missing work up to the scores."""
        self._begin()
        self._pool()
        self._train()
        self._evaluate()
        self._ingest()
        self._score()

    def _begin(self) -> None:
        """Draw the pools and, after the preflight checks, keep the recipe."""
        from lark_store.study import pools, preflight

        stored = self.stored_hashes()
        self.say("pools: drawing the samples")
        if stored is None:
            if (self.recipe.root / "checkpoints").exists():
                raise InputError(
                    f"`{self.recipe.root / 'checkpoints'}` exists, but does not belong to this study",
                    "set `folder` of the recipe to a new folder",
                )
            pools.remove(self.recipe)
            preflight.check(self.recipe, self._pools)
            self._store_study()
            return
        for name, path in self._pools.items():
            if stored.get(f"pools/{path.name}", file_hash(path)) != file_hash(path):
                raise InputError(
                    f"the pool of `{name}` has changed since the study began: `{path}`",
                    "restore the file, or set another `folder` in the recipe to start over",
                )

    def stored_hashes(self) -> dict[str, str] | None:
        """Return the stored hashes, None before the study began; refuse a changed recipe."""
        rows = self.store.sql("select recipe, hashes from studies where name = ?", [NAME])
        if rows.is_empty():
            return None
        recipe, hashes = map(json.loads, rows.row(0))
        changed = _changes(_with_defaults(recipe), json.loads(json.dumps(self.recipe.identity)))
        if changed:
            raise InputError(
                f"the study was started with another recipe: {', '.join(f'`{key}`' for key in changed)} changed",
                "restore these keys, or set another `folder` in the new recipe",
            )
        return dict(hashes)

    def _store_study(self, *, finished: bool = False) -> None:
        self.store.study_keep(
            NAME, recipe=self.recipe.identity, environment=self.environment, hashes=self.hashes(), finished=finished
        )

    @cached_property
    def environment(self) -> dict[str, Any]:
        """The software versions and the machine."""
        from importlib.metadata import version

        from lark_store.core.device import device_name, pick_device
        from lark_store.core.versions import versions

        packages = {name: version(name) for name in ("accelerate", "bm25s", "numpy", "polars", "rank-bm25")}
        device = device_name(pick_device(self.recipe.device))
        return versions() | packages | {"device": device, "platform": platform.platform()}

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of the existing pools, checkpoint weights and tables."""
        file_hashes = {}
        for path in sorted((*self.recipe.root.glob("pools/*.jsonl"), *self.recipe.root.glob("tables/*.csv"))):
            file_hashes[str(path.relative_to(self.recipe.root))] = file_hash(path)
        rows = self.store.sql("select name, weights_sha256 from checkpoints order by epoch")
        return file_hashes | {f"weights of {name}": weights for name, weights in rows.iter_rows()}

    def _pool(self) -> None:
        for source in self.recipe.source:
            self.store.source_add(
                source.name,
                self._pools[source.name],
                stage=source.stage,
                domain=source.domain,
                licence=source.licence,
            )

    @cached_property
    def _pools(self) -> dict[str, Path]:
        from lark_store.study import pools

        return pools.build(self.recipe)

    def _train(self) -> None:
        from lark_store.modeling.checkpoints import examine
        from lark_store.study.finetune import finetune
        from lark_store.study.pools import read
        from lark_store.study.render import add_variants

        add_variants(self.store, self.recipe)
        model = self.recipe.model
        path = self.recipe.place(model.path)
        self.say(f"fine-tuning: {self.recipe.epochs} epochs of `{self.recipe.tuning.name}`")
        self.store.checkpoint_add("base", path, revision=model.revision, model=self.recipe.model_name, epoch=0, step=0)
        base = examine(path, model.revision).folder
        finetune(self.store, self.recipe, base, read(self._pools[self.recipe.tuning.name]), self.on_progress)

    def _evaluate(self) -> None:
        """Evaluate every checkpoint not yet evaluated, and store its figures."""
        if self.recipe.evaluate is None:
            return
        from lark_store.modeling.checkpoints import examine
        from lark_store.study import evaluate, pools

        samples = pools.read(self._pools[recipes.EVALUATION])
        self.say(f"evaluation: {len(samples)} questions at each checkpoint")
        folders = self.store.sql("select name, path, revision from checkpoints").rows_by_key("name", unique=True)
        for name in self.recipe.checkpoints:
            path, revision = folders[name]
            target = self.recipe.root / "evaluation" / f"{name}.csv"
            if not target.is_file():
                folder = examine(path, revision).folder
                predictions = evaluate.predict(self.recipe, name, folder, samples, self.on_progress)
                with writing(target) as draft:
                    predictions.write_csv(draft)
            labels, seed = self.recipe.evaluate.labels, self.recipe.seed
            figures = evaluate.figures(_predictions([target]), labels, seed)
            self.store.checkpoint_add(name, path, revision=revision, metrics=figures)

    def _ingest(self) -> None:
        part = self.recipe.sketch
        self.store.sketcher_add(SKETCHER, **part.sketcher)
        self.say("ingest: a sketch of every sample at every checkpoint")
        alike: dict[tuple[str, ...], list[str]] = {}
        for source in self.recipe.source:
            alike.setdefault(tuple(source.variants), []).append(source.name)
        for checkpoint in self.recipe.checkpoints:
            for variants, sources in alike.items():
                self.store.ingest(
                    [checkpoint],
                    sources,
                    variants,
                    sketcher=SKETCHER,
                    device=self.recipe.device,
                    precision=part.precision,
                    batch_tokens=part.batch_tokens,
                    gradient_checkpointing=part.gradient_checkpointing,
                    on_progress=self.on_progress,
                )

    def _score(self) -> None:
        self.say(f"scores: {', '.join(self.recipe.compare.methods)}")
        n = self.store.sql("select max(n) from (select count(*) as n from samples group by source)").item()
        for method in self.recipe.compare.methods:
            self.store.attribute(
                self.recipe.checkpoints,
                queries=self.recipe.queries.name,
                query_variant=self.recipe.queries.variant,
                sketcher=SKETCHER,
                method=method,
                hits=int(n) if self.recipe.truth else HITS,
                device=self.recipe.device,
                on_progress=self.on_progress,
            )

    def collect(self) -> Results:
        """Return the tables, computed from the store."""
        from lark_store.study import tables

        predictions = _predictions([self.recipe.root / "evaluation" / f"{n}.csv" for n in self.recipe.checkpoints])
        stored = self.store.sql("select environment, hashes from studies where name = ?", [NAME]).row(0)
        environment, hashes = map(json.loads, stored)
        return tables.collect(self.store, self.recipe, predictions=predictions, environment=environment, hashes=hashes)

    def publish(self, target: Path) -> Results:
        """Write tables, figures and report, and keep their hashes."""
        from lark_store.study.charts import figures, save
        from lark_store.study.page import save_tables

        self.say("tables, figures and report")
        self.store.db_optimize(keep_versions_days=0)  # before measuring the sketches' size on disk
        results = self.collect()
        save_tables(results, self.recipe.root / "tables")
        self._store_study(finished=True)
        results = replace(results, environment=self.environment, hashes=self.hashes())
        save(figures(results), self.recipe.root / "figures")
        self.write_report(results, target)
        return results

    def write_report(self, results: Results, target: Path) -> None:
        """Write the report."""
        from lark_store.study.conclusions import findings
        from lark_store.study.page import write

        write(results, findings(results), self.store, target)


def _predictions(paths: list[Path]) -> pl.DataFrame:
    """Read the checkpoints' predictions; empty without an evaluation."""
    import polars as pl

    columns = ("checkpoint", "query_id", "label", "prediction")
    existing = [path for path in paths if path.is_file()]
    if not existing:
        return pl.DataFrame(schema=dict.fromkeys(columns, pl.String) | {"correct": pl.Boolean})
    frames = [pl.read_csv(path, infer_schema=False).select(columns) for path in existing]
    return pl.concat(frames).with_columns(correct=pl.col("label") == pl.col("prediction"))


def _with_defaults(stored: dict[str, Any]) -> dict[str, Any]:
    """Return a stored recipe with the keys that later versions added, at their defaults."""
    try:
        recipe = Recipe.model_validate(stored | {"title": "", "folder": "."})
    except ValidationError:  # it has a key that no version knows any more
        return stored
    whole: dict[str, Any] = json.loads(json.dumps(recipe.identity))
    return whole


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the keys that differ between two recipes; `a.b` within a part or a list of named parts."""
    changed = []
    for key in sorted(old.keys() | new.keys()):
        left, right = old.get(key), new.get(key)
        sides = [_named_parts(left), _named_parts(right)]
        if left != right and all(isinstance(side, dict) for side in sides):
            changed += [f"{key}.{name}" for name in _changes(*sides)] or [key]  # only the order differs
        elif left != right:
            changed.append(key)
    return changed


def _named_parts(part: Any) -> Any:
    """Return a list of named parts as a dict."""
    if not isinstance(part, list) or not all(isinstance(item, dict) and "name" in item for item in part):
        return part
    return {item["name"]: item for item in part}
