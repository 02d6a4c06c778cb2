"""The parts of a sample and their places, and the tokens that the places cover: without a template or a tokenizer."""

from __future__ import annotations

import json

import pytest

from lark_store.modeling.encoded import Encoded, UnusableSampleError, chosen_answers, encode, special_ids
from lark_store.modeling.parts import (
    DocumentParts,
    Part,
    Span,
    chat_parts,
    find_spans,
    inserted,
    mark,
    parts_of,
    plain_parts,
    search_spans,
)
from lark_store.modeling.sample import Sample

# --- parts ------------------------------------------------------------------------------------------------------------


def test_fields_of_a_sample_are_its_parts():
    parts = plain_parts(Sample("x", prompt=" ", response="yes")).parts
    assert parts == (Part("prompt", " ", is_optional=True), Part("response", "yes", is_answer=True))
    assert plain_parts(Sample("x", prompt="a", completion="b")).parts[1] == Part("response", "b", is_answer=True)
    assert plain_parts(Sample("x", text="a")).parts == (Part("text", "a"),)
    assert plain_parts(Sample("x", prompt="a", response="")).parts == (Part("prompt", "a"),)


def test_variables_have_the_given_texts():
    pair = plain_parts(Sample("x", prompt="a", response="b")).variables(["1", "2"])
    assert (pair["prompt"], pair["response"], pair["text"] == None) == ("1", "2", True)  # noqa: E711  # its own equality
    assert pair["messages"] == [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    text = plain_parts(Sample("x", text="a")).variables(["1"])
    assert (text["text"], text["messages"]) == ("1", [{"role": "user", "content": "1"}])
    assert not text["prompt"]


def test_document_stands_within_its_prompt():
    parts = DocumentParts("Read: ", "abc", " True?", "yes")
    assert parts.parts == (Part("text", "abc"), Part("response", "yes", is_answer=True))
    variables = parts.variables(["1", "2"])
    assert (variables["prompt"], variables["response"]) == ("Read: 1 True?", "2")
    assert variables["messages"][0] == {"role": "user", "content": "Read: 1 True?"}


THOUGHTS = "<think>\na\n</think>b<think>c</think>\n\nd</other>"
TURNS = [
    {"role": "system", "content": "S"},
    {"role": "developer", "content": "D"},
    {"role": "user", "content": "</think>u"},
    {"role": "assistant", "content": THOUGHTS, "weight": 1},
    {"role": "assistant", "content": [{"type": "text", "text": "e"}], "reasoning_content": "r", "weight": 0},
    {"role": "tool", "content": " "},
]


def test_parts_of_a_chat():
    chat = parts_of(Sample("x", messages=json.dumps(TURNS), tools='[{"name": "f"}]'))
    reasoning = {"turn": 3, "is_answer": True, "is_optional": True}
    assert chat.parts == (
        Part("content of message 1 (system)", "S", 0, is_fixed=True),
        Part("content of message 2 (developer)", "D", 1, is_fixed=True),
        Part("content of message 3 (user)", "</think>u", 2),
        Part("reasoning of message 4 (assistant)", "\na\n", **reasoning),
        Part("reasoning of message 4 (assistant)", "b", **reasoning),
        Part("reasoning of message 4 (assistant)", "c", **reasoning),
        Part("content of message 4 (assistant)", "\n\nd</other>", 3, is_answer=True),
        Part("reasoning of message 5 (assistant)", "r", 4),  # the last turn's reasoning must be printed
        Part("content of message 5 (assistant)", "e", 4),
    )
    assert chat.tools == [{"name": "f"}]
    assert chat.pieces[3, "content"] == ["", "<think>", 3, "</think>", 4, "<think>", 5, "</think>", 6]
    assert chat_parts(Sample("x", messages="[]")).parts == ()
    odd = chat_parts(Sample("x", messages='[{"role": "user", "content": "a", "reasoning_content": "r"}]')).parts
    assert [part.is_optional for part in odd] == [True, False]  # no assistant's turn must be printed


def test_variables_of_a_chat():
    call = [{"function": {"name": "f"}}]
    turns = [*TURNS[3:5], {"role": "assistant", "content": None, "tool_calls": call}, {"role": "user", "content": "v"}]
    chat = parts_of(Sample("x", messages=json.dumps(turns)))
    assert chat.tool_turns == (2,)
    given = chat.variables(list("1234567"))
    assert given["messages"] == [
        {"role": "assistant", "content": "<think>1</think>2<think>3</think>4"},
        {"role": "assistant", "content": "6", "reasoning_content": "5"},
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "user", "content": "7"},
    ]
    assert "tools" not in given
    others = chat.variables(list("1234567"), as_lists=True, without_calls=2)["messages"]
    assert others[1] == {"role": "assistant", "content": [{"type": "text", "text": "6"}], "reasoning_content": "5"}
    assert others[2] == {"role": "assistant", "content": ""}


# --- places -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "text"), [(0, "abc"), (7, "a longer text"), (12, "abcd")])
def test_mark_is_as_long_as_its_text(number, text):
    assert len(mark(number, text)) == len(text)
    assert str(number) in mark(number, text)


def test_marks_differ_and_no_mark_is_within_another():
    marks = [mark(number, text) for number, text in enumerate(["", "a", "ab", "abc", "a" * 30] * 5)]
    assert all((one in other) == (one is other) for one in marks for other in marks)


def find(template, texts, rendered):
    """Return the texts at the places of parts named by their numbers, for a template of `{0}`, `{1}`, …"""
    parts = [Part(str(n), text) for n, text in enumerate(texts)]
    marks = [mark(n, text) for n, text in enumerate(texts)]
    spans = find_spans(parts, marks, template.format(*marks), rendered)
    return spans and [(span.part.name, span.start, span.end) for span in spans]


@pytest.mark.parametrize(
    ("template", "texts", "rendered", "places"),
    [
        ("<{0}>", ["a"], "<a>", [("0", 1, 2)]),
        ("{1}-{0}", ["a", "bc"], "bc-a", [("1", 0, 2), ("0", 3, 4)]),
        ("x{1}", ["a", "b"], "xb", [("1", 1, 2)]),  # a part that the template omits
        ("x", ["a"], "x", []),
        ("x", ["a"], "xy", None),
        ("<{0}>", [" a\n"], "<a>", [("0", 1, 2)]),
        ("<{0}>", [" a\n"], "<a\n>", [("0", 1, 3)]),
        ("<{0}>", [" a\n"], "< a>", [("0", 1, 3)]),
        ("<{0}>", ["\n a \n"], "< a >", [("0", 1, 4)]),
        ("<{0}>", ['"a"'], '<\\"a\\">', [("0", 1, 6)]),  # within JSON
        ("<{0}>", ["ä\n"], "<ä\\n>", [("0", 1, 4)]),
        ("<{0}>", ["a"], "<a>>", None),
        ("<{0}>", ["a"], "(a>", None),
        ("<{0}>", ["a"], "<b>", None),
        ("<{0}>\n{1}", ["a\n", "b"], "<a>\nb", [("0", 1, 2), ("1", 4, 5)]),
        # the first form that fits leaves no place for the next part: another form of the first is tried
        ("{0}{1}!", ["a ", " b"], "a  b!", [("0", 0, 2), ("1", 2, 4)]),
        ("{0}{1}!", ["a ", " b"], "a b!", [("0", 0, 2), ("1", 2, 3)]),
        ("{0}{1}{2}!", ["a\n", "\nb", "\nb"], "a\nb\nb!", [("0", 0, 2), ("1", 2, 3), ("2", 3, 5)]),
        ("{0}{1}!", ["a\n", "\n\n b"], "a\n\n b!", [("0", 0, 1), ("1", 1, 5)]),
        ("{0}{1}{2}!", ["a\n", "c", "\n\n b"], "a\nc\n\n b!", [("0", 0, 2), ("1", 2, 3), ("2", 3, 7)]),
        ("{0}{1}!", ["a\n", "\n\n b"], "a\n\n\n b!", [("0", 0, 2), ("1", 2, 6)]),
        ("{0}{1}!", ["a\n", "\n\n b"], "a\n\n c!", None),
        ("{0}x{1}", [" x", "y"], " xxy", [("0", 0, 2), ("1", 3, 4)]),
        ("{0}{1}", ["a ", "  b"], "a  b", [("0", 0, 1), ("1", 1, 4)]),
        ("{0}|{1}{2}!", ["x", "a ", " b"], "x|a b!", [("0", 0, 1), ("1", 2, 4), ("2", 4, 5)]),
    ],
)
def test_places_follow_from_the_marks(template, texts, rendered, places):
    assert find(template, texts, rendered) == places


def test_another_form_of_an_earlier_part_is_tried():
    # the literal "\n" follows only the trimmed "a"
    assert find("{0}\n{1}.", ["a\n", "b"], "a\nb.") == [("0", 0, 1), ("1", 2, 3)]
    assert find("{0}{1}{2}.", ["a ", " ", "b"], "a  b.") == [("0", 0, 2), ("1", 2, 3), ("2", 3, 4)]
    assert find("{0}{1}|", [" a ", " c"], "a c|") == [("0", 0, 1), ("1", 1, 3)]


def test_texts_are_searched_if_each_occurs_once():
    parts = [Part("a", " one\n"), Part("b", "two"), Part("c", "  "), Part("d", "lost", is_optional=True)]
    spans = search_spans(parts, "[one] two")
    assert [(span.part.name, span.start, span.end) for span in spans] == [("a", 1, 4), ("b", 6, 9)]
    assert search_spans(parts, "[one] two two") is None
    assert search_spans(parts, "[one]") is None
    assert search_spans(parts, "[one] two lost lost") is None  # an optional part at two places
    assert [span.part.name for span in search_spans(parts, "one two lost")] == ["a", "b", "d"]


@pytest.mark.parametrize(
    ("rendered", "without", "place"),
    [
        ("abXYcd", "abcd", (2, 4)),
        ("XYcd", "cd", (0, 2)),
        ("abXY", "ab", (2, 4)),
        ("ab", "", (0, 2)),
        ("same", "same", (0, 0)),
        ("aXb", "a b", (1, 2)),  # blanks may differ
        ("aXb", "ayb", None),
        ("aXbYc", "abc", None),
        ("aab", "ab", (0, 1)),
        ("abab", "ab", (0, 2)),
    ],
)
def test_inserted_text_is_the_difference(rendered, without, place):
    assert inserted(rendered, without) == place


# --- tokens -----------------------------------------------------------------------------------------------------------

ANSWER = Part("response", "answer", turn=1, is_answer=True)
OTHER = Part("prompt", "other", turn=0)


def coded(*offsets, ids=None):
    return Encoded(list(ids or range(len(offsets))), list(offsets))


def test_tokens_with_a_character_of_a_span_are_covered():
    tokens = coded((0, 2), (2, 2), (2, 4), (4, 4), (4, 6), (6, 9))
    assert tokens.covered([Span(OTHER, 2, 4)]) == [False, False, True, False, False, False]
    assert tokens.covered([Span(OTHER, 3, 5)]) == [False, False, True, False, True, False]
    assert tokens.covered([Span(OTHER, 1, 2), Span(OTHER, 8, 20)]) == [True, False, False, False, False, True]
    assert tokens.covered([Span(OTHER, 0, 9)]) == [True, False, True, False, True, True]
    assert tokens.covered([]) == [False] * 6


def test_tokens_after_the_text_are_removed():
    tokens = Encoded([5, 6, 7, 8], [(0, 0), (0, 3), (3, 3), (0, 0)], ("note",))
    assert tokens.without_end() == Encoded([5, 6], [(0, 0), (0, 3)], ("note",))
    assert Encoded([5], [(0, 0)]).without_end() == Encoded([], [])
    whole = coded((0, 1), (1, 2))
    assert whole.without_end() == whole


def test_a_turns_end_is_the_first_special_token_after_it():
    # prompt 0-2, answer 2-4, "\n" 4-5, end 5-6, "\n" 6-7, end 7-8
    tokens = coded((0, 2), (2, 4), (4, 5), (5, 6), (6, 7), (7, 8), ids=[1, 2, 3, 9, 3, 9])
    answer, prompt = Span(ANSWER, 2, 4), Span(OTHER, 0, 2)
    targets = tokens.covered([answer])
    assert tokens.with_ends(targets, [answer], [prompt, answer], {9}) == [False, True, True, True, False, False]
    assert targets == [False, True, False, False, False, False]  # left as they were
    with pytest.raises(UnusableSampleError, match="no end-of-turn token follows"):
        tokens.with_ends(targets, [answer], [prompt, answer], {8})
    with pytest.raises(UnusableSampleError, match="no end-of-turn token follows"):  # the end is of a later part
        tokens.with_ends(targets, [answer], [answer, Span(OTHER, 5, 6)], {9})
    after = tokens.with_ends(targets, [answer], [answer, Span(OTHER, 6, 7)], {9})
    assert after == [False, True, True, True, False, False]


def test_each_turn_has_its_end_after_its_last_span():
    # reasoning 0-1, content 2-3, end 3-4, then an answer 4-5 of another turn, end 5-6
    tokens = coded((0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), ids=[1, 9, 2, 9, 3, 9])
    first = [Span(Part("a", "a", turn=1, is_answer=True), 0, 1), Span(Part("b", "b", turn=1, is_answer=True), 2, 3)]
    last = Span(Part("c", "c", turn=3, is_answer=True), 4, 5)
    spans = [*first, last]
    extended = tokens.with_ends(tokens.covered(spans), spans, spans, {9})
    assert extended == [True, False, True, True, True, True]
    assert tokens.with_ends(tokens.covered([last]), [last], spans, {9}) == [False] * 4 + [True] * 2


def test_generated_runs_are_kept_unless_all_their_parts_are_excluded():
    tokens = coded((0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7))
    chosen, excluded = Span(ANSWER, 1, 2), Span(ANSWER, 5, 6)
    mask = [0, 1, 1, 0, 0, 1, 1]
    spans = [chosen, excluded]
    assert tokens.generated(mask, [chosen], spans) == [False, True, True, False, False, False, False]
    assert tokens.generated(mask, spans, spans) == [bool(bit) for bit in mask]
    assert tokens.generated(mask, [chosen], [chosen]) == [bool(bit) for bit in mask]  # a run of no part is kept
    both = [Span(ANSWER, 1, 2), Span(OTHER, 2, 3)]
    assert tokens.generated(mask, both[:1], both)[1:3] == [True, True]
    with pytest.raises(UnusableSampleError, match="belong to another text"):
        tokens.generated(mask[1:], [chosen], spans)
    with pytest.raises(UnusableSampleError, match="belong to another text"):
        tokens.generated([*mask, 0], [chosen], spans)


class Tokenizer:
    """A tokenizer of one token a letter, which begins each text with token 0."""

    bos_token, bos_token_id, all_special_ids = "^", 0, [0]
    added_tokens_decoder = {  # noqa: RUF012
        7: type("Added", (), {"special": True}),
        8: type("Added", (), {"special": False}),
    }

    def __call__(self, text, *, add_special_tokens, **_):
        ids, offsets = [0 if c == "^" else ord(c) for c in text], [(n, n + 1) for n in range(len(text))]
        if add_special_tokens:
            ids, offsets = [0, *ids], [(0, 0), *offsets]
        return {"input_ids": ids, "offset_mapping": offsets}


def test_own_beginning_of_text_replaces_the_tokenizers():
    assert encode(Tokenizer(), "a", add_special_tokens=True) == Encoded([0, 97], [(0, 0), (0, 1)])
    own = encode(Tokenizer(), "^a", add_special_tokens=True)
    assert (own.ids, own.offsets) == ([0, 97], [(0, 1), (1, 2)])
    assert own.notes == ("the text begins with `^`, so the tokenizer's own is left out",)
    assert encode(Tokenizer(), "^a", add_special_tokens=False) == Encoded([0, 97], [(0, 1), (1, 2)])
    assert encode(Tokenizer(), "^^a", add_special_tokens=False).ids == [0, 0, 97]  # the text's own stay
    assert special_ids(Tokenizer()) == {0, 7}


def test_last_rules_choose_the_spans_of_the_last_answer():
    one, two = (Span(Part("a", "a", turn=turn, is_answer=True), turn, turn + 1) for turn in (1, 3))
    other = Span(Part("u", "u", turn=4), 4, 5)
    spans = [one, two, other, Span(two.part, 6, 7)]
    assert chosen_answers(spans, "assistant") == [one, two, spans[3]]
    assert chosen_answers(spans, "last") == chosen_answers(spans, "last+end") == [two, spans[3]]
    assert chosen_answers([other], "last") == []
