"""The recipe of a study: a TOML file, read and checked."""

from __future__ import annotations

import os
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator

from lark_store.errors import InputError, StoreExistsError, masked
from lark_store.ingest.sources import FIELDS
from lark_store.schema.names import check_name
from lark_store.schema.paths import exists, is_file

BUILT_IN = ("raw", "chatml")
EVALUATION = "evaluation"  # the pool of the questions that checkpoints are asked
TEMPLATE = Path(__file__).with_name("recipe.toml")
_FILES = {".jsonl", ".ndjson", ".parquet", ".csv", ".tsv", ".json", ".txt", ".jinja"}


def _once(names: list[str], what: str) -> None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"the {what} have `{twice[0]}` twice")


class _Part(BaseModel):
    """A part of a recipe: it can't be changed, and a key that it does not know is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Model(_Part):
    """The model before fine-tuning: a folder or a hub name."""

    path: str = Field(min_length=1)
    revision: str | None = None
    name: str | None = None


class Finetune(_Part):
    """Full fine-tuning: one learning rate for each epoch, and the loss that is sketched."""

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
            raise ValueError("a learning rate lies between 0 and 1")
        if self.batch_size % (self.micro_batch_size or self.batch_size):
            raise ValueError("`batch_size` must be a multiple of `micro_batch_size`")
        return self


class Evaluate(_Part):
    """The answers whose likelihoods are compared, and how many of the query file's samples are asked."""

    labels: list[str] = Field(min_length=2)
    samples: int | None = Field(default=None, ge=2)

    @model_validator(mode="after")
    def _told_apart(self) -> Self:
        if any(not label or label != label.strip() for label in self.labels):
            raise ValueError("a label is a word or more, without space around it")
        _once(self.labels, "labels")
        return self


class Sketch(_Part):
    """What is sketched, and how: see `Store.sketcher_add` and `Store.ingest`."""

    k: int = 65_536
    seed: int = Field(default=0, ge=0, lt=1 << 31)
    parameters: str | None = None
    exclude: str | None = None
    precision: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    batch_tokens: int | None = Field(default=None, ge=1)
    gradient_checkpointing: bool = False


class Compare(_Part):
    """What the tables hold against what."""

    against: str | None = None
    epoch: int | None = Field(default=None, ge=0)
    methods: list[Literal["cosine", "dot", "whitened", "centred", "bm25", "bm25-okapi", "bm25plus", "hybrid"]] = [
        "cosine",
        "bm25",
    ]

    @model_validator(mode="after")
    def _cosine(self) -> Self:
        if "cosine" not in self.methods:
            raise ValueError("`methods` must have `cosine`, which the tables are made of")
        return self


class Truth(_Part):
    """A metadata column by which a query and the samples that state its answer have the same value."""

    column: str


class Variant(_Part):
    """A format variant of the study's own: see `Store.variant_add`."""

    name: str
    template: str
    targets: Literal["auto", "response", "text", "predicted"] = "auto"
    max_length: int = Field(default=1024, ge=2)
    _slug = field_validator("name")(check_name)


class Source(_Part):
    """A set of samples and how it is drawn from a file or dataset: see `Store.source_add`."""

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
    choose: Literal["first", "random", "bm25"] = "first"
    variants: list[str] = Field(default=["chatml"], min_length=1)
    _slug = field_validator("name")(check_name)

    @model_validator(mode="after")
    def _words(self) -> Self:
        _once(self.variants, "variants")
        unknown = sorted(self.columns.keys() - set(FIELDS))
        if unknown:
            raise ValueError(f"`columns` has `{unknown[0]}`, which is no field of a sample: {', '.join(FIELDS)}")
        if self.name == EVALUATION:
            raise ValueError(f"no source can be named `{EVALUATION}`: the pool of the questions asked is")
        return self

    @property
    def variant(self) -> str:
        """The variant that stands for it: the first one, but of pretraining `chatml` where it has that."""
        return "chatml" if self.stage == "pretrain" and "chatml" in self.variants else self.variants[0]


class Recipe(_Part):
    """A study's recipe. Its paths are relative to the folder that the recipe's file lies in."""

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
    def _whole(self) -> Self:
        names = [source.name for source in self.source]
        if len(set(names)) < len(names):
            raise ValueError("two sources have one name")
        for stage, many in (("finetune", "one source"), ("query", "one source"), ("pretrain", "at least one source")):
            n = sum(source.stage == stage for source in self.source)
            if n < 1 or (n > 1 and stage != "pretrain"):
                raise ValueError(f"a study has {many} of stage `{stage}`, this one has {n}")
        if self.against not in [source.name for source in self.pretraining]:
            raise ValueError(f"`compare.against` is `{self.against}`, which is no source of stage `pretrain`")
        if self.queries.choose == "bm25":
            raise ValueError("the queries can't be chosen by their likeness to themselves: `first` or `random`")
        own = [variant.name for variant in self.variant]
        _once([*BUILT_IN, *own], "variants, with the built-in ones,")
        known = {*BUILT_IN, *own}
        unknown = sorted({name for source in self.source for name in source.variants} - known)
        if unknown:
            raise ValueError(f"there is no format variant `{unknown[0]}`: `raw`, `chatml`, or one of `[[variant]]`")
        if not 0 <= self.epoch <= self.epochs:
            raise ValueError(f"`compare.epoch` is {self.epoch}, of {self.epochs} epochs")
        return self

    def _of(self, stage: str) -> list[Source]:
        return [source for source in self.source if source.stage == stage]

    @property
    def tuning(self) -> Source:
        """The source of stage `finetune`."""
        return self._of("finetune")[0]

    @property
    def queries(self) -> Source:
        """The source of stage `query`."""
        return self._of("query")[0]

    @property
    def pretraining(self) -> list[Source]:
        """The sources of stage `pretrain`."""
        return self._of("pretrain")

    @property
    def against(self) -> str:
        """The pretraining source of Table II (default: the first)."""
        return self.compare.against or self.pretraining[0].name

    @property
    def shown_as(self) -> dict[str, str]:
        """The variant that stands for each source."""
        return {source.name: source.variant for source in self.source}

    @property
    def epochs(self) -> int:
        """How many epochs are trained."""
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
        """What the model is called."""
        return self.model.name or self.model.path.rstrip("/").rsplit("/", 1)[-1]

    @property
    def root(self) -> Path:
        """The study's own folder: store, checkpoints, pools, tables, figures, report."""
        return self._home / self.folder

    @property
    def store(self) -> Path:
        """Where the store lies."""
        return self.root / "lark.store"

    def place(self, name: str) -> str:
        """Return a path that stands in the recipe as it is from here; a hub name as it is."""
        here = self._home / os.path.expanduser(name)  # noqa: PTH111  Path's raises an error for an unknown user
        is_path = Path(name).suffix in _FILES or name.startswith((".", "~")) or exists(Path(name))
        return str(here) if exists(here) or is_path else name

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the sketches: all but the title, the device and what the tables compare."""
        return self.model_dump(mode="json", exclude={"title", "device", "folder", "compare", "truth"})


def init(path: str | Path) -> Path:
    """Write a commented recipe, that of the reference experiment, to a new file.

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
        raise StoreExistsError(f"there is something at `{target}` already", "choose another name") from error
    except OSError as error:
        raise InputError(f"`{target}` can't be written: {error.strerror}", "choose another place") from error
    return target


def read(path: str | Path) -> Recipe:
    """Read and check a recipe; paths in it are relative to its own folder, and so is `folder` (default: its name).

    Raises
    ------
    InputError
        The file is not there, no TOML, or a key or value is wrong (it names the key); a file is where its folder is.
    """
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(
            f"the recipe `{path}` can't be read: {error.strerror}", f"write one with `lark-store study init {path}`"
        ) from error
    except (ValueError, RecursionError) as error:  # errors of TOML and of UTF-8; a value in a thousand brackets
        raise InputError(f"`{path}` is no TOML: {error}", "`lark-store study init NEW.toml` shows its form") from error
    values.setdefault("folder", path.stem)
    values.setdefault("title", path.stem)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        raise _explained(path, error) from error
    recipe._home = path.absolute().parent  # noqa: SLF001 (pydantic's way to keep what is no key)
    for name in (recipe.model.path, *(source.uri for source in recipe.source)):
        if masked(name) != name:
            raise InputError(
                f"the recipe has a password or a token in `{name}`, and it is kept in the store and the report",
                "take it out: `hf auth login` keeps tokens",
            )
    if is_file(recipe.root):
        raise InputError(
            f"the study's folder can't be `{recipe.root}`: that is a file",
            "name the recipe with `.toml` at its end, or set `folder`",
        )
    for name in (recipe.model.path, *(source.uri for source in recipe.source)):
        if Path(recipe.place(name)).resolve().is_relative_to(recipe.root.resolve() / "pools"):
            raise InputError(f"`{name}` lies where the study writes its pools", "set `folder` to another one")
    return recipe


def _explained(path: Path, error: ValidationError) -> InputError:
    """Make one clear error of what is wrong in a recipe: an unknown key or else the first fault, and how many more."""
    first, *others = sorted(error.errors(include_url=False), key=lambda fault: fault["type"] != "extra_forbidden")
    where = ".".join(f"{part + 1}" if isinstance(part, int) else part for part in first["loc"])
    what = first["msg"].removeprefix("Value error, ")
    hint: str | None = "`lark-store study init NEW.toml` writes a recipe with every key explained"
    if first["type"] == "extra_forbidden":
        what = "there is no such key"
        near = get_close_matches(str(first["loc"][-1]), _keys(first["loc"]), n=1, cutoff=0.5)
        hint = f"did you mean `{near[0]}`?" if near else hint
    more = f" (and {len(others)} more)" if others else ""
    return InputError(f"`{path}`: {f'`{where}`: ' if where else ''}{what}{more}", hint)


def _keys(location: tuple[int | str, ...]) -> list[str]:
    """Return the keys that are known where an unknown one stands."""
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
