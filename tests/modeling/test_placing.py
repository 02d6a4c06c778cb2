"""Placing the parts of a sample in what a template prints, with templates that are plain functions."""

from __future__ import annotations

import pytest

from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.parts import plain_parts
from lark_store.modeling.placing import place_parts
from lark_store.modeling.sample import Sample

PAIR = Sample("x", prompt="ask", response="say")


def placed(run, sample=PAIR):
    return place_parts(plain_parts(sample), run, lambda name: UnusableSampleError(f"without {name}"), lists=True)


def test_parts_are_found_and_blank_ones_may_be_omitted():
    whole = placed(lambda v: f"<{v['prompt']}|{v['response']}>")
    assert [(s.part.name, s.start, s.end) for s in whole.spans] == [("prompt", 1, 4), ("response", 5, 8)]
    assert (whole.text, whole.omitted) == ("<ask|say>", ())
    blank = placed(lambda v: f"<{v['response']}>", Sample("x", prompt=" ", response="say"))
    assert ([s.part.name for s in blank.spans], blank.omitted) == (["response"], ())


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (lambda v: v["prompt"], "without response"),
        (lambda v: v["response"], "without prompt"),
        (lambda v: v["prompt"] * 2 + v["response"], "prints `prompt` 2 times; targets need it exactly once"),
        (lambda v: v["prompt"] + v["response"] + "!" * v["prompt"].count("k"), "rewrites the sample's text"),
    ],
)
def test_parts_that_are_omitted_repeated_or_rewritten_are_refused(run, reason):
    with pytest.raises(UnusableSampleError, match=reason):
        placed(run)


def test_a_template_of_a_mebicharacter_is_the_longest():
    def run(n):
        return placed(lambda v: v["prompt"] + "x" * n + v["response"])

    assert run(1 << 20).spans[1].start == (1 << 20) + 3
    for n in ((1 << 20) + 1, (1 << 20) + 9):
        with pytest.raises(UnusableSampleError, match=f"the template alone makes {n:,} characters"):
            run(n)
