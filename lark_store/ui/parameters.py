"""The parameters in a page's URL, checked."""

from __future__ import annotations

from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from starlette.convertors import StringConvertor, register_url_convertor
from starlette.datastructures import QueryParams

from lark_store.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Collection

    from starlette.requests import Request

_LARGEST = 1 << 20  # bytes of a form


class _Any(StringConvertor):
    """Any text in a path: an id may hold slashes and line breaks."""

    regex = r"(?s:.+)"


register_url_convertor("any", _Any())


class Parameters:
    """The parameters of a request: an empty one counts as absent."""

    def __init__(self, given: QueryParams) -> None:
        self._given = given

    def text(self, name: str) -> str | None:
        """Return a parameter, None if it is absent or empty."""
        return self._given.get(name) or None

    def several(self, name: str, choices: Collection[str]) -> list[str]:
        """Return all values of a parameter, which are among the choices.

        Raises
        ------
        InputError
            One is something else.
        """
        return [_among(name, value, choices) for value in self._given.getlist(name) if value]

    def exact(self, name: str) -> str | None:
        """Return a parameter as it is, None if it is absent."""
        return self._given.get(name)

    def required(self, name: str) -> str:
        """Return a parameter.

        Raises
        ------
        InputError
            It is absent or empty.
        """
        value = self.text(name)
        if value is None:
            raise InputError(f"`{name}` is missing", "fill in the form again")
        return value

    def one_of(self, name: str, choices: Collection[str], default: str) -> str:
        """Return a parameter that is one of the choices.

        Raises
        ------
        InputError
            It is something else.
        """
        return _among(name, self.text(name) or default, choices)

    def whole(self, name: str, default: int, least: int, most: int) -> int:
        """Return a whole number within limits.

        Raises
        ------
        InputError
            It is something else.
        """
        value = self.text(name)
        if value is None:
            return default
        if not value.isascii() or not value.isdigit() or len(value) > 9 or not least <= int(value) <= most:
            raise InputError(f"`{name}` must be a number from {least} to {most:,}, not `{value}`", "change it")
        return int(value)


def _among(name: str, value: str, choices: Collection[str]) -> str:
    if value not in choices:
        listed = ", ".join(f"`{choice}`" for choice in choices)
        raise InputError(f"`{name}` can't be `{value}`", f"it is one of {listed}" if choices else "leave it out")
    return value


async def form_of(request: Request) -> Parameters:
    """Return the parameters of a form.

    Raises
    ------
    InputError
        It is larger than 1 MiB, or not UTF-8.
    """
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > _LARGEST:
            raise InputError("the form is larger than 1 MiB", "use the command below instead")
    try:
        return Parameters(QueryParams(parse_qsl(body.decode(), keep_blank_values=True, errors="strict")))
    except UnicodeDecodeError as error:
        raise InputError("the form is not UTF-8", "send it from this page") from error
