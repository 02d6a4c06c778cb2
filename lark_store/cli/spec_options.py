"""Give a command the options of specs, and groups of options."""

from __future__ import annotations

import inspect
from dataclasses import fields, is_dataclass
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_type_hints

import typer

from lark_store.gradients.corrections import correction_help, kinds_help
from lark_store.query.methods import method_help
from lark_store.query.nulls import null_help
from lark_store.specs import fields_named, option_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from dataclasses import Field

# Help of the options whose values are the entries of a registry.
_GENERATED: dict[str, Callable[[], str]] = {
    "correction": correction_help,
    "kind": lambda: f"{kinds_help()}.",
    "method": method_help,
    "null": null_help,
}
_TYPES = {"Sequence": list, "Path": str}  # what typer reads for a type of a spec


def takes(*specs: type, **helps: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command: make typer options from its `**options` and from its groups of options.

    `**options: Unpack[D]` takes the fields of the specs that are keys of the TypedDict D. It receives those with a
    value, so the method's own defaults apply. A parameter whose type is a dataclass is a group: its fields are options,
    and it receives an instance. `helps` replaces the help of an option in this command.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters.values()
        keywords = next((p.annotation for p in own if p.kind is p.VAR_KEYWORD), None)
        names = get_args(keywords)[0].__annotations__ if keywords else ()
        declared = {field.name: field for field in fields_named(names, specs)}
        groups: dict[str, Any] = {p.name: p.annotation for p in own if is_dataclass(p.annotation)}
        parameters = [
            p.replace(kind=p.KEYWORD_ONLY) for p in own if p.name not in groups and p.kind is not p.VAR_KEYWORD
        ]
        parameters += [_parameter(field, helps.get(field.name)) for field in declared.values()]
        parameters += [p for group in reversed(groups.values()) for p in _members(group, helps)]

        @wraps(command)
        def run(**values: Any) -> None:
            for name, field in declared.items():
                value, unit = values.pop(name), option_of(field).unit
                if value not in (None, []):
                    values[name] = value * unit if unit else value
            for name, group in groups.items():
                values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
            command(**values)

        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        return run

    return decorate


def declared(spec: type, name: str) -> Any:
    """Return a spec's field as a typer option, for `Annotated`."""
    (field,) = fields_named([name], [spec])
    return _option(field)


def _option(field: Field[Any], text: str | None = None) -> Any:
    option = option_of(field)
    flags = option.flags or (f"--{field.name.replace('_', '-')}",)
    return typer.Option(*flags, help=text or option.help or _GENERATED[field.name](), metavar=option.metavar)


def _parameter(field: Field[Any], text: str | None) -> inspect.Parameter:
    """Return a spec's field as a parameter for typer."""
    default: Any = field.default
    unit = option_of(field).unit
    if isinstance(default, tuple):  # a list has no default in the help
        default = None
    elif unit:
        default //= unit
    kind: Any = eval(str(field.type), {}, _TYPES)  # noqa: S307  # our own types
    annotation: Any = Annotated[kind | None if default is None else kind, _option(field, text)]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _members(group: Any, helps: dict[str, str]) -> list[inspect.Parameter]:
    """Return the fields of a group of options as parameters for typer."""
    hints = get_type_hints(group, include_extras=True)
    for name in helps.keys() & hints.keys():
        kind, option = get_args(hints[name])
        hints[name] = Annotated[kind, typer.Option(*option.param_decls or (), help=helps[name], metavar=option.metavar)]
    return [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
        )
        for field in fields(group)
    ]
