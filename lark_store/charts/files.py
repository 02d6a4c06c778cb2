"""Render a chart as svg, png or html; the same chart gives the same bytes."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

import vl_convert

from lark_store.charts.readable import visible_spec
from lark_store.core.atomic_files import writing
from lark_store.core.text import joined
from lark_store.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from lark_store.charts.style import Figure

HOVER = "hover"  # name of the parts of a chart that only react to a pointer


def svg(spec: dict[str, Any], name: str) -> str:
    """Return a chart as SVG, with reproducible ids which are unique across charts."""
    drawn = vl_convert.vegalite_to_svg(static_spec(spec))
    for n, svg_id in enumerate(dict.fromkeys(re.findall(r'\bid="([^"]+)"', drawn))):
        drawn = re.sub(rf'(\bid="|url\(#|href="#){re.escape(svg_id)}(?=["\)])', rf"\g<1>{name}-{n}", drawn)
    return drawn


def png(spec: dict[str, Any]) -> bytes:
    """Return a chart as PNG, at double size."""
    return vl_convert.vegalite_to_png(static_spec(spec), scale=2)


def html(spec: dict[str, Any]) -> str:
    """Return a page with a chart and the scripts that draw it; it loads nothing."""
    return vl_convert.vegalite_to_html(json.dumps(visible_spec(spec)), bundle=True)


FORMATS: dict[str, Callable[[dict[str, Any], str], bytes]] = {
    "svg": lambda spec, name: svg(spec, name).encode(),
    "png": lambda spec, _: png(spec),
    "html": lambda spec, _: html(spec).encode(),
}


def check_format(path: Path) -> str:
    """Return the format that a file's suffix names.

    Raises
    ------
    InputError
        No format has it.
    """
    kind = path.suffix.removeprefix(".").lower()
    if kind not in FORMATS:
        raise InputError(f"`{path}` is no {joined((f'.{name}' for name in FORMATS), 'or')} file", "choose one of these")
    return kind


def write(chart: Figure, path: Path) -> Path:
    """Write a chart in the format of the file's suffix, and return the path.

    Raises
    ------
    InputError
        The suffix is unknown, or the file can't be written.
    """
    content = FORMATS[check_format(path)](chart.to_dict(), "chart")
    try:
        with writing(path) as draft:
            draft.write_bytes(content)
    except OSError as error:
        raise InputError(f"`{path}` can't be written: {error.strerror}", "choose another location") from error
    return path


def save(chart: Figure, folder: Path, name: str, formats: Iterable[str] = FORMATS) -> list[Path]:
    """Write a chart as NAME.svg and so on, and return the paths. Keys of `FORMATS` select the files."""
    spec = chart.to_dict()
    written = []
    for kind in formats:
        path = folder / f"{name}.{kind}"
        content = FORMATS[kind](spec, name)
        with writing(path) as draft:
            draft.write_bytes(content)
        written.append(path)
    return written


def static_spec(spec: dict[str, Any]) -> dict[str, Any]:
    """Return a chart's specification without its hover elements, and with readable texts."""

    def clean(part: Any) -> Any:
        if isinstance(part, list):
            return [clean(x) for x in part if not (isinstance(x, dict) and x.get("name") == HOVER)]
        if isinstance(part, dict):
            gone = {"params", "condition"} if "params" in spec else set()
            return {k: v if k == "datasets" else clean(v) for k, v in part.items() if k not in gone}
        return part

    cleaned: dict[str, Any] = clean(visible_spec(spec))
    return json.loads(json.dumps(cleaned))  # type: ignore[no-any-return]
