"""Declare an option once: its default, its help, and its form on the command line."""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

S = TypeVar("S")
_KEY = "option"


@dataclass(frozen=True, kw_only=True)
class Option:
    """An option on the command line.

    `flags` are its names there (default: `--` and the field's name). A value is given in multiples of `unit`. Without
    `help`, the command line generates it from a registry.
    """

    help: str | None
    flags: tuple[str, ...] = ()
    metavar: str | None = None
    unit: int | None = None


def option(
    default: Any,
    *,
    help: str | None = None,  # noqa: A002  typer's name
    flags: str = "",
    metavar: str | None = None,
    unit: int | None = None,
) -> Any:
    """Declare a field of a spec, with its default; `flags` are separated by spaces."""
    return field(
        default=default, metadata={_KEY: Option(help=help, flags=tuple(flags.split()), metavar=metavar, unit=unit)}
    )


def like(spec: Any, name: str) -> Any:
    """Declare a field as another spec does."""
    (declared,) = fields_named([name], [spec])
    return field(default=declared.default, metadata=declared.metadata)


def option_of(declared: Field[Any]) -> Option:
    """Return the option of a spec's field."""
    found: Option = declared.metadata[_KEY]
    return found


def fields_named(names: Iterable[str], specs: Iterable[Any]) -> list[Field[Any]]:
    """Return the fields with these names, each from the first spec that declares it as an option."""
    declared: dict[str, Field[Any]] = {}
    for spec in specs:
        for candidate in fields(spec):
            if _KEY in candidate.metadata:
                declared.setdefault(candidate.name, candidate)
    return [declared[name] for name in names]


def build(spec: type[S], options: Mapping[str, Any], **values: Any) -> S:
    """Build a spec from the options that are its fields, and from further values.

    >>> from lark_store.specs import RankSpec
    >>> build(RankSpec, {"k": 3, "queries": "test"}, opponents=True)
    RankSpec(k=3, opponents=True, where=None, null=None, approximate=False)
    """
    names = {declared.name for declared in fields(spec)}  # type: ignore[arg-type]
    return spec(**{name: value for name, value in options.items() if name in names}, **values)
