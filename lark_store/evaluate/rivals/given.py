"""What a rival is given beside queries and samples, and how its settings are read from its name."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypeVar

from lark_store.errors import InputError
from lark_store.evaluate.material import folder_of, load
from lark_store.schema.records import Progress

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from lark_store.evaluate.material import Loaded, Material
    from lark_store.schema.records import OnProgress

    Matrix = NDArray[Any]

S = TypeVar("S")


@dataclass(frozen=True)
class Given:
    """What a rival is given beside queries and samples: what its name was followed by, and how to compute.

    `spec` is the whole name, `argument` what follows `:`, `checkpoints` what follows `@`. `note` takes what a
    reader of the figures has to know.
    """

    device: str = "auto"
    precision: str = "float32"
    seed: int = 0
    on_progress: OnProgress = lambda _: None
    note: Callable[[str], None] = lambda _: None
    spec: str = ""
    argument: str | None = None
    checkpoints: tuple[str, ...] = ()

    def of(self, spec: str, argument: str | None, checkpoints: list[str]) -> Given:
        """Return the same for one rival."""
        return replace(self, spec=spec, argument=argument, checkpoints=tuple(checkpoints))

    @property
    def name(self) -> str:
        """The rival's name without settings and checkpoints."""
        return self.spec.split("@")[0].split(":")[0]

    def folders(self, material: Material) -> list[Path]:
        """Return the folders of the models of the checkpoints.

        Raises
        ------
        InputError
            No checkpoint is named.
        """
        self._need_checkpoint()
        return [folder_of(material.store, name) for name in self.checkpoints]

    def loaded(self, material: Material) -> Loaded:
        """Load the model of the one checkpoint.

        Raises
        ------
        InputError
            None or several are named.
        NameUnknownError, CheckpointError, CheckpointChangedError
        """
        self._need_checkpoint()
        if len(self.checkpoints) > 1:
            raise InputError(
                f"`{self.name}` looks at one checkpoint, not at {len(self.checkpoints)}", "ask for it once for each"
            )
        return load(material.store, self.checkpoints[0], self.device, self.precision)

    def _need_checkpoint(self) -> None:
        if not self.checkpoints:
            raise InputError(f"`{self.spec}` needs a model", f"say `{self.spec}@CHECKPOINT`")

    def settings(self, kind: type[S]) -> S:
        """Read the argument as the fields of a dataclass: `0.1,samples=100`; one without a name is the first field's.

        Raises
        ------
        InputError
            There is no such setting, it is said twice, or its value is none.
        """
        from pydantic import TypeAdapter, ValidationError

        known = [each.name for each in fields(kind)]  # type: ignore[arg-type]
        said: dict[str, str] = {}
        for word in (self.argument or "").split(",") if self.argument else ():
            name, is_named, value = word.partition("=")
            name, value = (name, value) if is_named else (known[0], word)
            if name not in known or name in said:
                fault = "said twice" if name in said else f"no setting of `{self.name}`"
                raise InputError(f"`{self.spec}`: `{name}` is {fault}", self._usage(known))
            said[name] = value
        try:
            return TypeAdapter(kind).validate_python(said)
        except ValidationError as error:
            first = error.errors()[0]
            which = ".".join(map(str, first["loc"][:1]))
            fact = first["msg"][:1].lower() + first["msg"][1:]
            raise InputError(f"`{self.spec}`: `{which}`: {fact}", self._usage(known)) from error

    def _usage(self, known: list[str]) -> str:
        rest = "".join(f"[,{name}=…]" for name in known[1:])
        return f"say `{self.name}:{known[0].upper()}{rest}@CHECKPOINT`"

    def say(self, what: str, done: int, of: int) -> None:
        """Report how far it is."""
        self.on_progress(Progress(f"{self.name}: {what}", done, of))
