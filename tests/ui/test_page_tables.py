"""Tables, samples as texts, and the equivalent lines."""

from __future__ import annotations

import json
import shlex
import subprocess
from types import SimpleNamespace
from urllib.parse import unquote

import polars as pl
import pytest

from lark_store.ui.equivalent import lines
from lark_store.ui.scope import id_of, segment
from lark_store.ui.tables import Cell, containing, parts_of, pieces, table, visible, with_text

CHAT = json.dumps(
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Is it "}, {"type": "text", "text": "red?"}]},
        {"role": "assistant", "reasoning_content": "Look.", "content": "Yes."},
    ]
)
EMPTY = dict.fromkeys(("prompt", "response", "completion", "text", "messages", "tools"))


def test_parts_of_a_chat_are_its_messages():
    parts = parts_of(EMPTY | {"messages": CHAT, "tools": '[{"name": "look"}]'}, frozenset({"red"}))
    assert [(part.name, "".join(text for text, _ in part.pieces)) for part in parts] == [
        ("tools", '[{"name": "look"}]'),
        ("system", "Be brief."),
        ("user", "Is it red?"),
        ("assistant", "Look.\nYes."),
    ]
    assert parts[2].pieces == [("Is it ", False), ("red", True), ("?", False)]


def test_parts_of_other_samples_are_in_order():
    assert [part.name for part in parts_of(EMPTY | {"prompt": "a", "completion": "b"})] == ["prompt", "completion"]
    assert [part.name for part in parts_of(EMPTY | {"response": "", "prompt": "a"})] == ["prompt", "response"]
    assert [part.name for part in parts_of(EMPTY | {"text": "a"})] == ["text"]


def test_marks_are_whole_words_of_any_case():
    assert pieces("Kidney kidneys, KIDNEY", frozenset({"kidney"})) == [
        ("Kidney", True),
        (" kidneys, ", False),
        ("KIDNEY", True),
    ]


def test_control_characters_are_replaced():
    assert visible("a\x00\x1b[31m\u202eb\tc\nd") == "a��[31m�b\tc\nd"


def test_text_of_a_chat_is_its_dialogue():
    frame = pl.DataFrame([EMPTY | {"sample_id": "c", "messages": CHAT}, EMPTY | {"sample_id": "t", "text": "Hello"}])
    texts = with_text(frame.cast(pl.String))["text"].to_list()
    assert texts == ["system: Be brief.\nuser: Is it red?\nassistant: Look.\nYes.", "Hello"]


def test_table_links_shortens_and_counts():
    frame = pl.DataFrame({"name": ["a" * 300, "b", "c"], "score": [-0.5, 0.25, None]})
    made = table(frame, {"score": lambda row: f"/{row['name']}"}, most=2)
    assert [(head.name, head.is_number) for head in made.heads] == [("name", False), ("score", True)]
    assert (made.rows[0][0].text, made.rows[0][0].whole) == ("a" * 220 + "…", "a" * 300)
    assert made.rows[1] == [Cell("b"), Cell("0.25", "/b")]
    assert (made.rows[0][1].text, made.n_more) == ("−0.50", 1)


def test_lines_spell_odd_values():
    explorer = SimpleNamespace(store=SimpleNamespace(place="a b/lark.store"), snapshot="s1")
    made = lines(explorer, "top", "-q 1'", checkpoint=["a", "b"], where="-1 < n", k=3, opponents=True, method=None)
    assert shlex.split(made.command) == [
        "lark-store", "top", "--checkpoint", "a", "--checkpoint", "b", "--where=-1 < n", "-k", "3", "--opponents",
        "--store", "a b/lark.store", "--snapshot", "s1", "--", "-q 1'",
    ]  # fmt: skip
    assert made.python.endswith(
        """store = lark_store.Store.open('a b/lark.store', snapshot='s1')\n"""
        """store.top("-q 1'", checkpoint=['a', 'b'], where='-1 < n', k=3, opponents=True)"""
    )
    new = lines(explorer, "top", new={"prompt": "Is it?", "response": "-no"}, checkpoint="a")
    assert "--prompt 'Is it?' --response=-no" in new.command
    assert "new=lark_store.NewText(prompt='Is it?', response='-no')" in new.python


@pytest.mark.parametrize(
    "name", ["a\tb", "\x1b[31mred", "it's \x7f", "\u202eback\\slash", "\U000e0001tag", "a\nb", "\x85x"]
)
def test_command_with_control_characters_names_the_sample(name):
    explorer = SimpleNamespace(store=SimpleNamespace(place="lark.store"), snapshot=None)
    made = lines(explorer, "top", name, checkpoint="a")
    assert visible(made.command) == made.command
    printed = subprocess.run(
        ["/bin/bash", "-c", f"printf '%s\\0' {made.command}"],
        capture_output=True,
        check=True,
        env={"LC_ALL": "C.UTF-8"},
    )
    assert printed.stdout.decode().split("\0")[2] == name
    assert eval(made.python.splitlines()[-1].replace("store.top", "(lambda name, **_: name)")) == name  # noqa: S307


def test_no_command_is_given_where_none_can_name_the_sample():
    explorer = SimpleNamespace(store=SimpleNamespace(place="lark.store"), snapshot=None)
    made = lines(explorer, "top", "a\0b", checkpoint="a")
    assert made.command.startswith("# no command")
    assert "'a\\x00b'" in made.python


@pytest.mark.parametrize("name", ["..", ".", "~", "~..", "a/../b", "../x", "é\n\x1b", "%2e%2e"])
def test_address_of_an_id_is_one_segment_that_stays(name):
    part = segment(name)
    assert unquote(part) not in {".", ".."}
    assert "/" not in part
    assert id_of(unquote(part)) == name


def test_chats_are_searched_in_their_turns_alone():
    tools = [{"function": {"name": "look", "arguments": {"where": "left"}}}]
    chat = json.dumps([*json.loads(CHAT), {"role": "assistant", "content": None, "tool_calls": tools}])
    frame = pl.DataFrame(
        [EMPTY | {"query_id": "c", "messages": chat}, EMPTY | {"query_id": "t-red", "text": "Hello"}]
    ).cast(pl.String)
    found = {word: containing(frame, word)["query_id"].to_list() for word in ("RED", "brief", "Look.", "hello")}
    assert found == {"RED": ["c", "t-red"], "brief": ["c"], "Look.": ["c"], "hello": ["t-red"]}
    for key in ("content", "role", "assistant", "arguments", '"'):
        assert containing(frame, key).is_empty()


def test_columns_of_long_texts_are_wide():
    made = table(pl.DataFrame({"name": ["a"], "text": ["word " * 20], "n": [1]}))
    assert [head.is_long for head in made.heads] == [False, True, False]
