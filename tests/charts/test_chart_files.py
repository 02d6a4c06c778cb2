"""Charts as files: formats, reproducible bytes, and texts with control characters."""

from __future__ import annotations

import subprocess
import sys
from xml.etree import ElementTree as ET

import altair as alt
import polars as pl
import pytest

from lark_store.charts.files import FORMATS, save
from lark_store.charts.readable import readable, visible, visible_spec
from lark_store.charts.style import data, styled

CONTROLS = [*map(chr, range(9)), "\x0b", "\x0c", *map(chr, range(14, 32)), "\x7f", "\x9b", "\ufffe", "\uffff"]
HURT = "q" + "".join(CONTROLS)


def bars(names):
    frame = pl.DataFrame({"name": names, "value": [float(i) for i in range(len(names))]})
    return styled(alt.Chart(data(frame)).mark_bar().encode(x="value:Q", y=alt.Y("name:N", title=names[0])))


def test_each_format_is_written_with_the_same_bytes_each_time(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    first, second = (save(bars(["a", "b"]), tmp_path / folder, "bars") for folder in ("one", "two"))
    assert [path.name for path in first] == [f"bars.{kind}" for kind in FORMATS]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    starts = dict(zip(FORMATS, (path.read_bytes()[:16] for path in first), strict=True))
    assert starts["svg"].startswith(b"<svg")
    assert starts["png"].startswith(b"\x89PNG")
    assert b"<!DOCTYPE html>"[:9] in starts["html"]


def test_control_characters_are_drawn_as_their_codes(tmp_path):
    (path,) = save(bars([HURT, "plain"]), tmp_path, "bars", ["svg"])
    drawn = path.read_text(encoding="utf-8")
    texts = "".join(ET.fromstring(drawn).itertext())  # noqa: S314  # our own file
    assert "<U+0000><U+0001>" in texts
    assert not set(CONTROLS) & set(drawn)
    assert save(bars([HURT]), tmp_path, "bars", ["png", "html"])[0].stat().st_size > 1000


def test_vl_convert_aborts_on_them_without_that():
    """The reason for `readable`: when this fails, vl-convert has learned to do without."""
    code = (
        "import vl_convert as v; v.vegalite_to_svg({'data': {'values': [{'a': 'x\\x1by'}]}, 'mark': 'bar', "
        "'encoding': {'y': {'field': 'a', 'type': 'nominal'}}})"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode < 0


@pytest.mark.parametrize("character", [*CONTROLS, "\ud800"])
def test_the_code_names_its_character(character):
    shown = visible(f"a{character}b")
    assert shown.isprintable()
    assert shown == f"a<U+{ord(character):04X}>b"


def test_texts_without_control_characters_stay():
    text = "naïve\ttext\nof two lines, 日本語 \\x1b"
    frame = pl.DataFrame({"text": [text, None], "n": [1, 2]})
    assert visible(text) == text
    assert readable(frame).equals(frame)
    spec = {"title": [text], "width": 3, "datasets": {"a": [{"b": text, "c": None}]}}
    assert visible_spec(spec) == spec


def test_ids_that_differ_in_a_control_character_stay_apart():
    frame = pl.DataFrame({"id": ["q\x01", "q\x02", "q"]})
    assert readable(frame)["id"].to_list() == ["q<U+0001>", "q<U+0002>", "q"]
