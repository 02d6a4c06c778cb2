"""The recipe of a study: a TOML file, read and checked."""

from __future__ import annotations

import os
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from lark_store.core.names import check_name
from lark_store.core.paths import exists, is_file
from lark_store.errors import InputError, StoreExistsError, masked
from lark_store.modeling.forms import check_columns
from lark_store.query.methods import METHODS
from lark_store.readers import READERS
from lark_store.specs import TARGET_RULES, SketcherOptions, SketcherSpec, VariantSpec

if TYPE_CHECKING:
    MethodName = str
    TargetRule = str
else:
    MethodName = Literal[tuple(METHODS)]
    TargetRule = Literal[TARGET_RULES]

BUILT_IN = ("raw", "chatml")
MAIN = ("formatted", "chatml")  # a pretraining source's main variant, the first that it has
EVALUATION = "evaluation"  # the pool of evaluation questions
TEMPLATE = Path(__file__).with_name("recipe.toml")
_FILES = {*READERS, ".json", ".txt", ".jinja"}


def _refuse_duplicates(names: list[str], label: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"the {label} have `{twice[0]}` twice")


class _Part(BaseModel):
    """A part of a recipe: immutable, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(_Part):
    """The model before fine-tuning: a folder or a hub name."""

    path: str = Field(min_length=1)
    revision: str | None = None
    name: str | None = None


class Finetune(_Part):
    """Full fine-tuning on the sketched loss, with a learning rate per epoch."""

    learning_rates: list[float] = Field(min_length=1)
    batch_size: int = Field(default=4, ge=1)
    micro_batch_size: int | None = Field(default=None, ge=1)
    optimizer: str = "adamw_torch"
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _rates(self) -> Self:
        if not all(0 < rate < 1 for rate in self.learning_rates):
            raise ValueError("learning rates must be between 0 and 1")
        if self.batch_size % (self.micro_batch_size or self.batch_size):
            raise ValueError("`batch_size` must be a multiple of `micro_batch_size`")
        return self


class Evaluate(_Part):
    """The labels, how the model answers with one of them, and the number of evaluated samples of the query file.

    `by`: `likelihood` compares the labels' likelihoods; `generation` decodes an answer greedily, up to `max_answer`
    tokens, and reads its first word.
    """

    labels: list[str] = Field(min_length=2)
    samples: int | None = Field(default=None, ge=2)
    by: Literal["likelihood", "generation"] = "likelihood"
    max_answer: int = Field(default=16, ge=1)

    @model_validator(mode="after")
    def _check_labels(self) -> Self:
        if any(not label or label != label.strip() for label in self.labels):
            raise ValueError("labels must be non-empty, without surrounding space")
        _refuse_duplicates(self.labels, "labels")
        return self


class Sketch(_Part):
    """Sketching options: see `Store.sketcher_add` and `Store.ingest`."""

    k: int = SketcherSpec.k
    seed: int = Field(default=0, ge=0, lt=1 << 31)
    dtype: Literal["float16", "float32"] = "float16"
    parameters: str | None = None
    exclude: str | None = None
    min_ndim: int | None = None
    correction: str = SketcherSpec.correction
    damping: float | None = None
    power: float | None = None
    mask_template: bool = False
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_tokens: int | None = Field(default=None, ge=1)
    gradient_checkpointing: bool = False

    @property
    def sketcher(self) -> dict[str, Any]:
        """The keywords of `Store.sketcher_add`."""
        return {name: getattr(self, name) for name in SketcherOptions.__annotations__}


class Compare(_Part):
    """The comparisons of the tables."""

    against: str | None = None
    epoch: int | None = Field(default=None, ge=0)
    methods: list[MethodName] = ["cosine", "bm25-okapi", "bm25"]

    @model_validator(mode="after")
    def _cosine(self) -> Self:
        if "cosine" not in self.methods:
            raise ValueError("`methods` must have `cosine`, the method of most tables")
        return self


class Truth(_Part):
    """A metadata column with equal values for a query and the samples stating its answer."""

    column: str


class Variant(_Part):
    """A custom format variant: see `Store.variant_add`."""

    name: str
    template: str = "chatml"
    targets: TargetRule = "auto"
    max_length: int = Field(default=1024, ge=2)
    loss: Literal["mean", "sum"] = "mean"
    question: str | None = None
    question_column: str | None = None
    prompt: str = VariantSpec.prompt
    labels: tuple[str, ...] = ()
    max_answer: int = VariantSpec.max_answer
    _slug = field_validator("name")(check_name)


class Source(_Part):
    """A source, and its draw from a file or dataset: see `Store.source_add`."""

    name: str
    stage: Literal["finetune", "pretrain", "query"]
    uri: str = Field(min_length=1)
    config: str | None = None
    split: str | None = None
    columns: dict[str, str] = {}
    domain: str | None = None
    licence: str | None = None
    samples: int | None = Field(default=None, ge=1)
    skip: int = Field(default=0, ge=0)
    choose: Literal["first", "random", "bm25-okapi", "bm25"] = "first"
    variants: list[str] = Field(default=["chatml"], min_length=1)
    _slug = field_validator("name")(check_name)

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        _refuse_duplicates(self.variants, "variants")
        try:
            check_columns(sorted(self.columns))
        except InputError as error:
            raise ValueError(f"`columns`: {error.fact}; {error.hint}") from error
        if self.name == EVALUATION:
            raise ValueError(f"no source can be named `{EVALUATION}`: it is the name of the evaluation pool")
        return self

    @property
    def variant(self) -> str:
        """The main variant: the first, but for pretraining sources `formatted` or else `chatml` if present."""
        main = next((name for name in MAIN if name in self.variants), self.variants[0])
        return main if self.stage == "pretrain" else self.variants[0]


class Recipe(_Part):
    """A study's recipe. Its paths are relative to the folder of the recipe file."""

    title: str
    folder: Path
    seed: int = Field(default=0, ge=0, lt=1 << 32)
    device: str = "auto"
    model: Model
    finetune: Finetune
    evaluate: Evaluate | None = None
    sketch: Sketch = Sketch()
    compare: Compare = Compare()
    truth: Truth | None = None
    variant: list[Variant] = []
    source: list[Source]
    _home: Path = PrivateAttr(Path())

    @model_validator(mode="after")
    def _check_consistency(self) -> Self:
        names = [source.name for source in self.source]
        if len(set(names)) < len(names):
            raise ValueError("two sources have the same name")
        for stage, many in (("finetune", "one source"), ("query", "one source"), ("pretrain", "at least one source")):
            n = sum(source.stage == stage for source in self.source)
            if n < 1 or (n > 1 and stage != "pretrain"):
                raise ValueError(f"a study needs {many} of stage `{stage}`, but this one has {n}")
        if self.against not in [source.name for source in self.pretraining]:
            raise ValueError(f"`compare.against` is `{self.against}`, which is not a source of stage `pretrain`")
        if self.queries.choose.startswith("bm25"):
            raise ValueError("queries can't be chosen by similarity to themselves: use `first` or `random`")
        custom = [variant.name for variant in self.variant]
        _refuse_duplicates([*BUILT_IN, *custom], "variants, with the built-in ones,")
        variants = {*BUILT_IN, *custom}
        unknown = sorted({name for source in self.source for name in source.variants} - variants)
        if unknown:
            raise ValueError(f"there is no format variant `{unknown[0]}`: use `raw`, `chatml` or a `[[variant]]`")
        if not 0 <= self.epoch <= self.epochs:
            raise ValueError(f"`compare.epoch` is {self.epoch}, but there are {self.epochs} epochs")
        return self

    def _sources(self, stage: str) -> list[Source]:
        return [source for source in self.source if source.stage == stage]

    @property
    def tuning(self) -> Source:
        """The source of stage `finetune`."""
        return self._sources("finetune")[0]

    @property
    def queries(self) -> Source:
        """The source of stage `query`."""
        return self._sources("query")[0]

    @property
    def pretraining(self) -> list[Source]:
        """The sources of stage `pretrain`."""
        return self._sources("pretrain")

    @property
    def against(self) -> str:
        """The pretraining source of Table II (default: the first)."""
        return self.compare.against or self.pretraining[0].name

    @property
    def shown_as(self) -> dict[str, str]:
        """The main variant of each source."""
        return {source.name: source.variant for source in self.source}

    @property
    def epochs(self) -> int:
        """The number of training epochs."""
        return len(self.finetune.learning_rates)

    @property
    def epoch(self) -> int:
        """The epoch of Tables I and IV (default: the last)."""
        return self.epochs if self.compare.epoch is None else self.compare.epoch

    @property
    def checkpoints(self) -> list[str]:
        """The checkpoints' names: `base`, then `epoch-1` and so on."""
        return ["base", *(f"epoch-{n}" for n in range(1, self.epochs + 1))]

    @property
    def model_name(self) -> str:
        """The model's display name."""
        return self.model.name or self.model.path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def root(self) -> Path:
        """The study's folder: store, checkpoints, pools, tables, figures, report."""
        return self._home / self.folder

    @property
    def store(self) -> Path:
        """The store's path."""
        return self.root / "lark.store"

    def place(self, name: str) -> str:
        """Resolve a path of the recipe; return a hub name unchanged."""
        path = self._home / os.path.expanduser(name)  # noqa: PTH111  Path's raises an error for an unknown user
        is_path = Path(name).suffix in _FILES or name.startswith((".", "~")) or exists(Path(name))
        return str(path) if exists(path) or is_path else name

    @property
    def identity(self) -> dict[str, Any]:
        """The keys which determine the sketches: all except title, device and comparisons."""
        return self.model_dump(mode="json", exclude={"title", "device", "folder", "compare", "truth"})


def init(path: str | Path) -> Path:
    """Write the commented recipe of the reference experiment to a new file.

    Raises
    ------
    StoreExistsError, InputError
    """
    target = Path(path)
    text = TEMPLATE.read_text(encoding="utf-8")
    try:
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise StoreExistsError(f"`{target}` exists already", "choose another name") from error
    except OSError as error:
        raise InputError(f"`{target}` can't be written: {error.strerror}", "choose another location") from error
    return target


def read(path: str | Path) -> Recipe:
    """Read and check a recipe; its paths are relative to its folder, and so is `folder` (default: the recipe's name).

    Raises
    ------
    InputError
        The file is missing or not valid TOML, a key or value is wrong (the error names the key), or `folder` is a file.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"the recipe `{path}` can't be read: {error.strerror}", f"write one with `lark-store study init {path}`"
        ) from error
    except (ValueError, RecursionError) as error:  # errors of TOML and UTF-8; deeply nested brackets
        raise InputError(f"`{path}` is not valid TOML: {error}", "see `lark-store study init NEW.toml`") from error
    values.setdefault("folder", path.stem)
    values.setdefault("title", path.stem)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise _explained(path, error) from error
    recipe._home = path.absolute().parent  # noqa: SLF001 (a pydantic private attribute)
    for name in (recipe.model.path, *(source.uri for source in recipe.source)):
        if masked(name) != name:
            raise InputError(
                f"`{name}` contains a password or token, which the store and the report would keep",
                "remove it from the recipe, and log in with `hf auth login`",
            )
    if is_file(recipe.root):
        raise InputError(
            f"the study's folder can't be `{recipe.root}`: it is a file",
            "give the recipe the suffix `.toml`, or set `folder`",
        )
    for name in (recipe.model.path, *(source.uri for source in recipe.source)):
        if Path(recipe.place(name)).resolve().is_relative_to(recipe.root.resolve() / "pools"):
            raise InputError(f"`{name}` is inside the study's pools folder", "set `folder` to another folder")
    return recipe


def _explained(path: Path, error: ValidationError) -> InputError:
    """Return one error for an invalid recipe: an unknown key or the first fault, and the number of others."""
    first, *remaining = sorted(error.errors(include_url=False), key=lambda fault: fault["type"] != "extra_forbidden")
    location = ".".join(f"{part + 1}" if isinstance(part, int) else part for part in first["loc"])
    problem = first["msg"].removeprefix("Value error, ")
    hint: str | None = "write a recipe with every key explained with `lark-store study init NEW.toml`"
    if first["type"] == "extra_forbidden":
        problem = "unknown key"
        near = get_close_matches(str(first["loc"][-1]), _keys(first["loc"]), n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else hint
    rest = f" (and {len(remaining)} more)" if remaining else ""
    return InputError(f"`{path}`: {f'`{location}`: ' if location else ''}{problem}{rest}", hint)


def _keys(location: tuple[int | str, ...]) -> list[str]:
    """Return the valid keys at the location of an unknown one."""
    kind: Any = Recipe
    for part in location[:-1]:
        if isinstance(part, str):
            kind = _PARTS.get(part, kind)
    return list(kind.model_fields)


_PARTS: dict[str, type[_Part]] = {
    "model": Model,
    "finetune": Finetune,
    "evaluate": Evaluate,
    "sketch": Sketch,
    "compare": Compare,
    "truth": Truth,
    "source": Source,
    "variant": Variant,
}
