"""Check the arguments of public methods against their type hints before doing anything.

The type hints are the only declaration. A list of names may be given as a single name. NumPy numbers become Python
numbers, because SQLite would store them as bytes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import cache
from numbers import Integral, Real
from os import PathLike
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin

from lark_store.core.objects import ModelObject, TokenizerObject
from lark_store.errors import InputError
from lark_store.results import NewText

_LARGEST = 1 << 63
_LONGEST_SHOWN = 60
_WORDS: dict[Any, str] = {
    str: "a text",
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    Path: "a path",
    NoneType: "None",
    NewText: "a NewText",
    ModelObject: "a model",
    TokenizerObject: "a tokenizer",
}


class _MismatchError(Exception):
    """A value doesn't match its type hint."""


class _SourceData:
    """Stands for `SourceData` in type hints: a path, or an object that may hold rows."""


class _Names(dict[str, Any]):
    """The names used in type hints. Imports polars only for a method with a frame."""

    def __missing__(self, name: str) -> Any:
        if name == "pl":
            import polars as pl

            return pl
        raise KeyError(name)


_NAMES = _Names(
    Any=Any,
    Mapping=Mapping,
    ModelObject=ModelObject,
    NewText=NewText,
    OnProgress=Callable,
    Path=Path,
    Sequence=Sequence,
    SourceData=_SourceData,
    TokenizerObject=TokenizerObject,
)


def check_arguments(
    method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments, converted to the types of the method's hints.

    Raises
    ------
    InputError
        An argument's type doesn't match its hint.
    TypeError
        An argument is missing or unknown.
    """
    signature = _signature(method)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"Store.{method.__name__}(): {error}") from None
    for name, value in bound.arguments.items():
        hint = _hints(method).get(name)
        if hint is not None:
            default = signature.parameters[name].default
            bound.arguments[name] = default if value is None and default == () else _checked(name, value, hint)
    return bound.args, bound.kwargs


@cache
def _signature(method: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(method)


@cache
def _hints(method: Callable[..., Any]) -> dict[str, Any]:
    """Return the type hints of a method's parameters."""
    parameters = _signature(method).parameters.items()
    written = {name: parameter.annotation for name, parameter in parameters if name not in {"self", "cls"}}
    return {
        name: eval(hint, {}, _NAMES) if isinstance(hint, str) else hint  # noqa: S307  # our own hints
        for name, hint in written.items()
        if hint is not inspect.Parameter.empty
    }


def _checked(name: str, value: Any, hint: Any) -> Any:
    try:
        return _convert(value, hint)
    except _MismatchError:
        wrong = _first_wrong(value, hint)
        if isinstance(wrong, Integral) and abs(int(wrong)) >= _LARGEST and int in {hint, *get_args(hint)}:
            raise InputError(f"`{name}` {wrong} doesn't fit in 64 bits", "use a smaller number") from None
        place = "" if wrong is value else " in its values"
        raise InputError(
            f"`{name}` must be {_describe(hint)}, not {_show(wrong)}{place}", _example(name, hint)
        ) from None


def _convert(value: Any, hint: Any) -> Any:
    """Return a value converted to the type of its hint."""
    origin = get_origin(hint)
    if origin in {UnionType, Union}:
        return _convert_to_one(value, get_args(hint))
    if hint in _SCALARS:
        return _SCALARS[hint](value)
    if origin is Sequence:
        return _convert_all(value, *get_args(hint))
    if origin in {dict, Mapping}:
        key, inner = get_args(hint)
        items = _require(value, fits=isinstance(value, Mapping)).items()
        return {_convert(k, key): _convert(v, inner) for k, v in items}
    _require(value, fits=isinstance(value, hint))
    return _convert_fields(value) if is_dataclass(value) and not isinstance(value, type) else value


def _convert_to_one(value: Any, hints: Sequence[Any]) -> Any:
    for hint in hints:
        try:
            return _convert(value, hint)
        except _MismatchError:
            continue
    raise _MismatchError


def _convert_all(value: Any, inner: Any) -> list[Any]:
    if isinstance(value, str) and inner is str:
        return [_text(value)]
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise _MismatchError
    return [_convert(item, inner) for item in value]


def _convert_fields(value: Any) -> Any:
    changed = {}
    for field in fields(value):
        hint = eval(field.type, {}, _NAMES) if isinstance(field.type, str) else field.type  # noqa: S307
        changed[field.name] = _checked(field.name, getattr(value, field.name), hint)
    return replace(value, **changed)


def _require(value: Any, *, fits: bool) -> Any:
    if not fits:
        raise _MismatchError
    return value


def _text(value: Any) -> str:
    _require(value, fits=isinstance(value, str))
    text = str.__str__(value)
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, or a file name in another encoding
        raise _MismatchError from None
    return text


def _whole(value: Any) -> int:
    _require(value, fits=isinstance(value, Integral) and not isinstance(value, bool))
    return int(_require(value, fits=-_LARGEST <= int(value) < _LARGEST))


def _number(value: Any) -> float:
    _require(value, fits=isinstance(value, Real) and not isinstance(value, bool))
    try:
        return float(value)  # the method checks the range, and nan
    except OverflowError:
        raise _MismatchError from None


def _truth(value: Any) -> bool:
    return bool(_require(value, fits=isinstance(value, bool) or type(value).__name__ in {"bool_", "bool"}))


def _path(value: Any) -> Path:
    _require(value, fits=isinstance(value, PathLike))
    text = value.__fspath__()
    return Path(_text(_require(text, fits="\0" not in text if isinstance(text, str) else False)))


def _source_data(value: Any) -> Any:
    if isinstance(value, str):
        return _text(value)
    if isinstance(value, PathLike):
        return _path(value)
    is_data = isinstance(value, Iterable) or any(hasattr(value, name) for name in ("__arrow_c_stream__", "collect"))
    return _require(value, fits=is_data and not isinstance(value, bytes | bytearray))


def _nothing(value: Any) -> None:
    _require(value, fits=value is None)


def _function(value: Any) -> Any:
    return _require(value, fits=callable(value))


_SCALARS: dict[Any, Callable[[Any], Any]] = {
    Any: lambda value: value,
    Callable: _function,
    str: _text,
    int: _whole,
    float: _number,
    bool: _truth,
    Path: _path,
    NoneType: _nothing,
    _SourceData: _source_data,
}
_WORDS[_SourceData] = "a path, a list of dicts, a frame or a dataset"


# --- messages ------------------------------------------------------------------------------------------------------


def _describe(hint: Any) -> str:
    """Describe the values a hint accepts.

    >>> _describe(str | Sequence[str]), _describe(int | None)
    ('a text or a list of texts', 'a whole number or None')
    """
    origin = get_origin(hint)
    if origin in {UnionType, Union}:
        return " or ".join(_describe(option) for option in get_args(hint))
    if origin is Sequence:
        (inner,) = get_args(hint)
        return "a list" if inner is Any else f"a list of {_describe(inner).removeprefix('a ')}s"
    if origin in {dict, Mapping}:
        return "a dict" if get_args(hint)[1] is Any else f"a dict of {_describe(get_args(hint)[1]).removeprefix('a ')}s"
    if hint is Callable:
        return "a function"
    return _WORDS.get(hint) or f"a {getattr(hint, '__name__', hint)}"


def _show(value: Any) -> str:
    """Format a value for a message, with its type.

    >>> _show("5"), _show(None)
    ("`'5'` (str)", 'None')
    """
    if value is None:
        return "None"
    text = ascii(value) if isinstance(value, str) else repr(value)
    text = " ".join(text.split())
    if len(text) > _LONGEST_SHOWN:
        text = f"{text[:_LONGEST_SHOWN]}…"
    return f"`{text}` ({type(value).__name__})"


def _first_wrong(value: Any, hint: Any) -> Any:
    """Return the first mismatching element of a list or dict, or the value itself."""
    for option in get_args(hint) if get_origin(hint) in {UnionType, Union} else (hint,):
        origin, inner = get_origin(option), get_args(option)
        elements: Iterable[Any] = ()
        if origin is Sequence and isinstance(value, Sequence) and not isinstance(value, str | bytes):
            elements = value
        elif origin in {dict, Mapping} and isinstance(value, Mapping):
            elements = value.values()
        for element in elements:
            try:
                _convert(element, inner[-1])
            except _MismatchError:
                return element
    return value


def _example(name: str, hint: Any) -> str | None:
    """Return an example for a list of names; None for other values."""
    for option in get_args(hint) if get_origin(hint) in {UnionType, Union} else (hint,):
        if get_origin(option) is Sequence and get_args(option) == (str,):
            return f'for example `{name}=["NAME"]`'
    return None
