"""The context of a baseline, and its settings, parsed from its name."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from lark_store.errors import InputError
from lark_store.evaluate.baselines.preparation import Preparation
from lark_store.evaluate.dataset import folder_of, load
from lark_store.results import Progress

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from lark_store.evaluate.dataset import Loaded, Material
    from lark_store.modeling.checkpoints import ModelFolder
    from lark_store.modeling.tokens import Tokens
    from lark_store.results import OnProgress

    Matrix = NDArray[Any]

S = TypeVar("S")


@dataclass(frozen=True)
class BaselineContext:
    """A baseline's inputs besides queries and samples: the parts of its name, and compute settings.

    `spec` is the whole name, `argument` the part after `:`, `checkpoints` the parts after `@`, `queries_at` the
    queries' checkpoint after `>`, None if it is the samples'. `note` receives notes for readers of the figures.
    `folder` stores slow scores, None for nowhere. `preparation` holds a score's clock and its results for all trials.
    """

    device: str = "auto"
    precision: str = "float32"
    seed: int = 0
    on_progress: OnProgress = lambda _: None
    note: Callable[[str], None] = lambda _: None
    spec: str = ""
    argument: str | None = None
    checkpoints: tuple[str, ...] = ()
    folder: Path | None = None
    attention: str = "auto"
    queries_at: str | None = None
    preparation: Preparation = field(default_factory=Preparation)

    def for_score(
        self, spec: str, argument: str | None, checkpoints: list[str], queries_at: str | None = None
    ) -> BaselineContext:
        """Return the context of one baseline."""
        return replace(self, spec=spec, argument=argument, checkpoints=tuple(checkpoints), queries_at=queries_at)

    def with_note(self, note: Callable[[str], None]) -> BaselineContext:
        """Return a context with another receiver of notes."""
        return replace(self, note=note)

    def for_new_score(self) -> BaselineContext:
        """Return a context with nothing prepared."""
        return replace(self, preparation=Preparation())

    @property
    def name(self) -> str:
        """The baseline's name without settings and checkpoints."""
        return self.spec.split("@")[0].split(":")[0]

    def folders(self, material: Material) -> list[ModelFolder]:
        """Return the model folders of the checkpoints.

        Raises
        ------
        InputError
            The name has no checkpoint.
        """
        self._need_checkpoint()
        return [folder_of(material.store, name) for name in self.checkpoints]

    def loaded(self, material: Material) -> Loaded:
        """Load the model of the single checkpoint.

        Raises
        ------
        InputError
            The name has no checkpoint or several.
        NameUnknownError, CheckpointError, CheckpointChangedError
        """
        self._need_checkpoint()
        if len(self.checkpoints) > 1:
            raise InputError(
                f"`{self.name}` takes one checkpoint, not {len(self.checkpoints)}", "give one score per checkpoint"
            )
        return self._load(material, self.checkpoints[0])

    def loaded_for_queries(self, material: Material, of_samples: Loaded) -> Loaded:
        """Load the model of the queries: that of the samples, unless the name has `>CHECKPOINT`.

        Raises
        ------
        NameUnknownError, CheckpointError, CheckpointChangedError
        """
        return of_samples if self.queries_at is None else self._load(material, self.queries_at)

    def tokens(self, loaded: Loaded, material: Material) -> tuple[list[Tokens], list[Tokens]]:
        """Render the queries and the candidates, the latter on the candidates' time.

        Raises
        ------
        InputError
            A text can't be rendered.
        """
        with self.preparation.candidates():
            samples = loaded.tokens(material.samples)
        return loaded.tokens(material.queries), samples

    def _load(self, material: Material, checkpoint: str) -> Loaded:
        return load(material.store, checkpoint, self.device, self.precision, self.attention)

    def _need_checkpoint(self) -> None:
        if not self.checkpoints:
            raise InputError(f"`{self.spec}` needs a model", f"use `{self.spec}@CHECKPOINT`")

    def settings(self, kind: type[S]) -> S:
        """Parse the argument into a dataclass: `0.1,samples=100`; a bare value sets the first field.

        Raises
        ------
        InputError
            A setting is unknown, repeated or invalid.
        """
        from pydantic import TypeAdapter, ValidationError

        names = [each.name for each in fields(kind)]  # type: ignore[arg-type]
        values: dict[str, str] = {}
        for word in (self.argument or "").split(",") if self.argument else ():
            name, is_named, value = word.partition("=")
            name, value = (name, value) if is_named else (names[0], word)
            if name not in names or name in values:
                fault = "given twice" if name in values else f"not a setting of `{self.name}`"
                raise InputError(f"`{self.spec}`: `{name}` is {fault}", self._usage(names))
            values[name] = value
        try:
            return TypeAdapter(kind).validate_python(values)
        except ValidationError as error:
            first = error.errors()[0]
            setting = ".".join(map(str, first["loc"][:1]))
            fact = first["msg"][:1].lower() + first["msg"][1:]
            raise InputError(f"`{self.spec}`: `{setting}`: {fact}", self._usage(names)) from error

    def _usage(self, names: list[str]) -> str:
        rest = "".join(f"[,{name}=…]" for name in names[1:])
        return f"use `{self.name}:{names[0].upper()}{rest}@CHECKPOINT`"

    def say(self, stage: str, n_done: int, total: int) -> None:
        """Report progress."""
        self.on_progress(Progress(f"{self.name}: {stage}", n_done, total))
