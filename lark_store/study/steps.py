"""A study from its recipe to its report, one step after another; each does only what is missing."""

from __future__ import annotations

import json
import platform
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from lark_store.errors import InputError, LarkStoreError, StoreError
from lark_store.schema.hashes import file_hash
from lark_store.schema.location import Location
from lark_store.schema.locks import working
from lark_store.store import Store
from lark_store.study import recipe as recipes
from lark_store.study.files import writing
from lark_store.study.groups import SKETCHER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import polars as pl

    from lark_store.schema.records import OnProgress
    from lark_store.study.recipe import Recipe
    from lark_store.study.results import Results

    Say = Callable[[str], None]

NAME = "study"
HITS = 100  # of each query and group, where not every rank is needed
REPORT = "report.html"


def run(path: str | Path, *, on_progress: OnProgress | None = None, say: Say | None = None) -> Results:
    """Fine-tune, evaluate, build pools, ingest, score, and write tables, figures and report into the study's folder.

    Stopped at any moment and run again, it goes on. `say` is told what begins.

    Raises
    ------
    InputError
        The recipe is wrong, or not the one that the study was begun with; a source has too few samples.
    CheckpointError, StoreBusyError, and what `Store` raises
    """
    recipe = recipes.read(path)
    with (
        _disk(recipe),
        _open(recipe) as store,
        working(Location.of(recipe.store), NAME, f"running the study of `{path}`"),
    ):
        study = _Study(recipe, store, on_progress or (lambda _: None), say or (lambda _: None))
        study.compute()
        return study.publish(recipe.root / REPORT)


def report(path: str | Path, output: str | Path | None = None) -> Path:
    """Write the report of a study that has run, from its store and its answers (default: into the study's folder).

    Raises
    ------
    InputError
        The study has not been run to its end, or was run with another recipe.
    """
    from pathlib import Path

    recipe = recipes.read(path)
    if not recipe.store.exists():
        raise InputError(f"the study of `{path}` has not been run", f"run `lark-store study run {path}`")
    with Store.open(recipe.store) as store:
        kept = store.sql("select finished_at from studies where name = ?", [NAME])
        if kept.is_empty() or kept.item() is None:
            raise InputError(f"the study of `{path}` has not come to its end", f"run `lark-store study run {path}`")
        study = _Study(recipe, store, lambda _: None, lambda _: None)
        study.kept()
        target = Path(output) if output else recipe.root / REPORT
        study.write_report(study.collect(), target)
        return target


@contextmanager
def _disk(recipe: Recipe) -> Iterator[None]:
    """Make a clear error of a disk that is full, or a folder that can't be written."""
    try:
        yield
    except LarkStoreError:  # some are an OSError too
        raise
    except OSError as error:
        raise StoreError(
            f"`{error.filename or recipe.root}` can't be read or written: {error.strerror or error}",
            "see to room and permissions, then run the study again: it goes on where it stopped",
        ) from error


def _open(recipe: Recipe) -> Store:
    return Store.open(recipe.store) if recipe.store.exists() else Store.create(recipe.store)


@dataclass
class _Study:
    """A study at work."""

    recipe: Recipe
    store: Store
    on_progress: OnProgress
    say: Say

    def compute(self) -> None:
        """Do what is missing, up to the scores."""
        self._begin()
        self._pool()
        self._train()
        self._evaluate()
        self._ingest()
        self._score()

    def _begin(self) -> None:
        """Draw the pools and, once all that can be known beforehand is right with them, keep the recipe."""
        from lark_store.study import check, pools

        kept = self.kept()
        self.say("pools: drawing the samples")
        if kept is None:
            if (self.recipe.root / "checkpoints").exists():
                raise InputError(
                    f"`{self.recipe.root / 'checkpoints'}` is there already, and not of this study",
                    "give the recipe a `folder` of its own",
                )
            pools.forget(self.recipe)
            check.check(self.recipe, self._pools)
            self._keep()
            return
        for name, path in self._pools.items():
            if kept.get(f"pools/{path.name}", file_hash(path)) != file_hash(path):
                raise InputError(
                    f"the pool of `{name}` is not the one that the study was begun with: `{path}`",
                    "put it back as it was, or give the recipe another `folder` to begin again",
                )

    def kept(self) -> dict[str, str] | None:
        """Return the hashes kept if the study was begun; refuse a recipe that it was not begun with."""
        kept = self.store.sql("select recipe, hashes from studies where name = ?", [NAME])
        if kept.is_empty():
            return None
        recipe, hashes = map(json.loads, kept.row(0))
        changed = _changes(recipe, json.loads(json.dumps(self.recipe.identity)))
        if changed:
            raise InputError(
                f"the study was begun with another recipe: {', '.join(f'`{key}`' for key in changed)} changed",
                "set them back, or give the new recipe another `folder`",
            )
        return dict(hashes)

    def _keep(self, *, finished: bool = False) -> None:
        self.store.study_keep(
            NAME, recipe=self.recipe.identity, environment=self.environment, hashes=self.hashes(), finished=finished
        )

    @cached_property
    def environment(self) -> dict[str, Any]:
        """The versions and the machine that this runs on."""
        from importlib.metadata import version

        from lark_store.ingest import ledger
        from lark_store.ingest.gradients import pick_device

        more = {name: version(name) for name in ("accelerate", "bm25s", "numpy", "polars")}
        device = ledger.device_name(pick_device(self.recipe.device))
        return ledger.versions() | more | {"device": device, "platform": platform.platform()}

    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of the pools, the checkpoints' weights and the tables that are there."""
        found = {}
        for path in sorted((*self.recipe.root.glob("pools/*.jsonl"), *self.recipe.root.glob("tables/*.csv"))):
            found[str(path.relative_to(self.recipe.root))] = file_hash(path)
        rows = self.store.sql("select name, weights_sha256 from checkpoints order by epoch")
        return found | {f"weights of {name}": weights for name, weights in rows.iter_rows()}

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
        from lark_store.ingest.checkpoints import examine
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
        """Ask every checkpoint that was not asked yet, and set its figures."""
        if self.recipe.evaluate is None:
            return
        from lark_store.ingest.checkpoints import examine
        from lark_store.study import evaluate, pools

        samples = pools.read(self._pools[recipes.EVALUATION])
        self.say(f"evaluation: {len(samples)} questions at each checkpoint")
        folders = self.store.sql("select name, path, revision from checkpoints").rows_by_key("name", unique=True)
        for name in self.recipe.checkpoints:
            path, revision = folders[name]
            target = self.recipe.root / "evaluation" / f"{name}.csv"
            if not target.is_file():
                folder = examine(path, revision).folder
                found = evaluate.predict(self.recipe, name, folder, samples, self.on_progress)
                with writing(target) as draft:
                    found.write_csv(draft)
            labels, seed = self.recipe.evaluate.labels, self.recipe.seed
            figures = evaluate.figures(_predictions([target]), labels, seed)
            self.store.checkpoint_add(name, path, revision=revision, metrics=figures)

    def _ingest(self) -> None:
        how = self.recipe.sketch
        self.store.sketcher_add(SKETCHER, k=how.k, seed=how.seed, parameters=how.parameters, exclude=how.exclude)
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
                    precision=how.precision,
                    batch_tokens=how.batch_tokens,
                    gradient_checkpointing=how.gradient_checkpointing,
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
        kept = self.store.sql("select environment, hashes from studies where name = ?", [NAME]).row(0)
        environment, hashes = map(json.loads, kept)
        return tables.collect(self.store, self.recipe, predictions=predictions, environment=environment, hashes=hashes)

    def publish(self, target: Path) -> Results:
        """Write tables, figures and report, and keep their hashes."""
        from lark_store.study.figures import figures, save
        from lark_store.study.page import save_tables

        self.say("tables, figures and report")
        self.store.db_optimize(keep_versions_days=0)  # what sketches take on disk is measured next
        results = self.collect()
        save_tables(results, self.recipe.root / "tables")
        self._keep(finished=True)
        results = replace(results, environment=self.environment, hashes=self.hashes())
        save(figures(results), self.recipe.root / "figures")
        self.write_report(results, target)
        return results

    def write_report(self, results: Results, target: Path) -> None:
        """Write the report."""
        from lark_store.study.findings import findings
        from lark_store.study.page import write

        write(results, findings(results), self.store, target)


def _predictions(paths: list[Path]) -> pl.DataFrame:
    """Read what checkpoints answered; empty if nothing was asked."""
    import polars as pl

    columns = ("checkpoint", "query_id", "label", "prediction")
    kept = [path for path in paths if path.is_file()]
    if not kept:
        return pl.DataFrame(schema=dict.fromkeys(columns, pl.String) | {"correct": pl.Boolean})
    frames = [pl.read_csv(path, infer_schema=False).select(columns) for path in kept]
    return pl.concat(frames).with_columns(correct=pl.col("label") == pl.col("prediction"))


def _changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the keys of two recipes that differ, `a.b` within a part or a list of parts that have names."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        left, right = old.get(key), new.get(key)
        sides = [_by_name(left), _by_name(right)]
        if left != right and all(isinstance(side, dict) for side in sides):
            found += [f"{key}.{name}" for name in _changes(*sides)] or [key]  # an order alone, say of sources
        elif left != right:
            found.append(key)
    return found


def _by_name(part: Any) -> Any:
    """Return a list of named parts as a dict."""
    if not isinstance(part, list) or not all(isinstance(each, dict) and "name" in each for each in part):
        return part
    return {each["name"]: each for each in part}
