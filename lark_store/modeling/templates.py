"""Jinja templates of format variants: a sandbox that never prints missing fields."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from lark_store.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jinja2 import Template, Undefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment


def compile_template(text: str) -> Template:
    """Compile a template.

    Raises
    ------
    InputError
        The template is not valid Jinja; the error names the line.
    """
    from jinja2 import TemplateSyntaxError

    try:
        return _environment().from_string(text)
    except TemplateSyntaxError as error:
        raise InputError(
            f"line {error.lineno} of the template: {error.message}", "templates use Jinja syntax"
        ) from error


def or_missing(parts: Mapping[str, str | None]) -> dict[str, Any]:
    """Replace each None by a value that templates can test (`if`, `is none`, `default`) but not print."""
    return {name: _missing()(_reason(name)) if part is None else part for name, part in parts.items()}


def _reason(name: str) -> str:
    return f"it prints `{name}`, which this sample lacks; write `{{% if {name} %}}{{{{ {name} }}}}{{% endif %}}`"


@cache
def _missing() -> type[Undefined]:
    """Create the type of a missing field: false, equal to None, an error when printed."""
    from jinja2 import Undefined

    class Missing(Undefined):
        def __eq__(self, value: object) -> bool:
            return value is None or isinstance(value, Missing)

        def __str__(self) -> str:
            return self._fail_with_undefined_error()

        __repr__ = __str__
        __hash__ = Undefined.__hash__

    return Missing


def _printable(value: Any) -> Any:
    """Return a value to print; refuse None, which would print the word."""
    if value is None:
        from jinja2 import UndefinedError

        raise UndefinedError("it prints a value that is None")
    return value


@cache
def _environment() -> ImmutableSandboxedEnvironment:
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, finalize=_printable)
    environment.tests["none"] = lambda value: value is None or isinstance(value, _missing())
    return environment
