"""Forms of rows: the sample that each becomes, and the errors of rows that are none."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

from lark_store.errors import InputError
from lark_store.modeling.forms import FORMS, check_columns, fields_of_forms, forms_help
from lark_store.modeling.forms.alpaca import WITH_INPUT, WITHOUT_INPUT
from lark_store.modeling.forms.base import Form
from lark_store.modeling.forms.rows import RowReader, make_sample, make_samples, samples_of
from lark_store.modeling.forms.summary import Summary
from lark_store.modeling.sample import Sample
from lark_store.readers.base import StructRow


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def form_of(row, columns=None):
    form, samples = make_samples(row, columns or {})
    return (form.name if form else None), samples


def content_of(row, columns=None):
    """Return what the one sample of a row holds, messages and tools as objects."""
    (sample,) = form_of(row, columns)[1]
    parts = {name: getattr(sample, name) for name in ("prompt", "response", "text", "completion")}
    parts |= {name: json.loads(getattr(sample, name) or "null") for name in ("messages", "tools")}
    return {name: part for name, part in parts.items() if part is not None}


CHAT = [{"role": "system", "content": "Be brief."}, user(" Is it?\n"), assistant("Yes. ", reasoning_content="Hm.")]
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
CALLS = [user("Weather?"), assistant(None, tool_calls=[CALL]), {"role": "tool", "content": "3"}, assistant("Cold.")]
TOOL = {"name": "weather", "parameters": {}}
ALPACA = {"instruction": "Add {it}.", "input": "1 + 1", "output": "2"}
CASES = [
    ("messages", {"messages": CHAT}, {"messages": CHAT}),
    ("messages", {"messages": json.dumps(CHAT), "text": "unused"}, {"messages": CHAT}),
    ("messages", {"messages": CALLS, "tools": [TOOL]}, {"messages": CALLS, "tools": [TOOL]}),
    ("messages", {"messages": CALLS, "tools": json.dumps([TOOL])}, {"messages": CALLS, "tools": [TOOL]}),
    (
        "messages",
        {"messages": CALLS, "functions": [TOOL]},
        {"messages": CALLS, "tools": [{"type": "function", "function": TOOL}]},
    ),
    (
        "messages",
        {"messages": [user([{"type": "text", "text": "a"}])]},
        {"messages": [user([{"type": "text", "text": "a"}])]},
    ),
    ("messages", {"messages": [{"from": "human", "value": "a"}]}, {"messages": [user("a")]}),
    (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "weight": 0}]},
        {"messages": [user("a"), assistant("b", weight=0)]},
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "user", "value": "a"}, {"value": "b", "from": "model"}], "system": "S"},
        {"messages": [{"role": "system", "content": "S"}, user("a"), assistant("b")]},
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "system", "value": "S"}, {"from": "observation", "value": "3"}]},
        {"messages": [{"role": "system", "content": "S"}, {"role": "tool", "content": "3"}]},
    ),
    ("sharegpt", {"conversations": CHAT}, {"messages": CHAT}),
    ("completion", {"prompt": "Is it?\n", "completion": " yes"}, {"prompt": "Is it?\n", "completion": " yes"}),
    (
        "completion",
        {"prompt": "List:", "completion": '[{"role": 1}]'},
        {"prompt": "List:", "completion": '[{"role": 1}]'},
    ),
    (
        "completion",
        {"prompt": [user("1"), assistant("2"), user("3")], "completion": [assistant("4")]},
        {"messages": [user("1"), assistant("2", weight=0), user("3"), assistant("4")]},
    ),
    ("completion", {"prompt": ["a", "b"], "completion": ["c"]}, {"prompt": "a\nb", "completion": "c"}),
    ("alpaca", ALPACA, {"prompt": WITH_INPUT.format(instruction="Add {it}.", input="1 + 1"), "completion": "2"}),
    ("alpaca", ALPACA | {"input": None}, {"prompt": WITHOUT_INPUT.format(instruction="Add {it}."), "completion": "2"}),
    ("response", {"prompt": "a", "response": "b"}, {"prompt": "a", "response": "b"}),
    (
        "question",
        {"question": "a", "context": "c", "answer": "b"},
        {"prompt": "Context: c\n\nQuestion: a", "response": "b"},
    ),
    ("text", {"text": " a\n"}, {"text": " a\n"}),
    ("text", {"text": "a", "messages": None, "prompt": "", "tools": []}, {"text": "a"}),
    ("text", {"text": "a", "messages": 3}, {"text": "a"}),
]


@pytest.mark.parametrize(("name", "row", "content"), CASES)
def test_row_of_each_form_becomes_its_sample(name, row, content):
    assert form_of(row)[0] == name
    assert content_of(row) == content


def test_the_alpaca_prompt_is_that_of_the_trainers():
    assert content_of(ALPACA)["prompt"] == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {it}.\n\n### Input:\n1 + 1\n\n### Response:\n"
    )
    assert content_of(ALPACA | {"input": " "})["prompt"] == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd {it}.\n\n### Response:\n"
    )


CHOSEN = {"messages": [user("a"), assistant("yes")]}
REJECTED = {"messages": [user("a"), assistant("no")]}
LONG = [user("1"), assistant("2"), user("3")]
CONTEXT = [user("1"), assistant("2", weight=0), user("3")]
HH = "\n\nHuman: Hi!\n\nAssistant:"
PAIRS = [
    (
        {"prompt": "a\n", "chosen": " yes", "rejected": " no"},
        {"prompt": "a\n", "completion": " yes"},
        {"prompt": "a\n", "completion": " no"},
    ),
    (
        {"chosen": f"{HH} yes", "rejected": f"{HH} no"},
        {"prompt": HH, "completion": " yes"},
        {"prompt": HH, "completion": " no"},
    ),
    (
        {"chosen": f"{HH} yes", "rejected": f"{HH} yes, sure"},
        {"prompt": HH, "completion": " yes"},
        {"prompt": HH, "completion": " yes, sure"},
    ),
    ({"chosen": "a b", "rejected": "a c"}, {"prompt": "a", "completion": " b"}, {"prompt": "a", "completion": " c"}),
    (
        {"chosen": "a\nb", "rejected": "a\nc"},
        {"prompt": "a\n", "completion": "b"},
        {"prompt": "a\n", "completion": "c"},
    ),
    ({"chosen": "yes", "rejected": "no"}, {"text": "yes"}, {"text": "no"}),
    ({"prompt": "a", "chosen": [assistant("yes")], "rejected": [assistant("no")]}, CHOSEN, REJECTED),
    ({"prompt": [user("a")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}, CHOSEN, REJECTED),
    ({"prompt": "a", "chosen": CHOSEN["messages"], "rejected": REJECTED["messages"]}, CHOSEN, REJECTED),
    ({"chosen": json.dumps(CHOSEN["messages"]), "rejected": json.dumps(REJECTED["messages"])}, CHOSEN, REJECTED),
    (
        {"chosen": [*LONG, assistant("4")], "rejected": [*LONG, assistant("5")]},
        {"messages": [*CONTEXT, assistant("4")]},
        {"messages": [*CONTEXT, assistant("5")]},
    ),
    (  # one side continues the other
        {"chosen": [user("1"), assistant("2")], "rejected": [*LONG, assistant("4")]},
        {"messages": [user("1"), assistant("2")]},
        {"messages": [*LONG, assistant("4")]},
    ),
    (  # all turns that are shared are context, up to the last
        {
            "chosen": [user("1"), assistant("2"), assistant("3")],
            "rejected": [user("1"), assistant("2"), assistant("4")],
        },
        {"messages": [user("1"), assistant("2", weight=0), assistant("3")]},
        {"messages": [user("1"), assistant("2", weight=0), assistant("4")]},
    ),
    (  # both sides are whole, though they begin with an assistant's turn
        {"prompt": "a", "chosen": [assistant("0"), user("a"), assistant("4")], "rejected": [assistant("0"), user("a")]},
        {"messages": [assistant("0", weight=0), user("a"), assistant("4")]},
        {"messages": [assistant("0", weight=0), user("a")]},
    ),
    (
        {"prompt": LONG, "chosen": [assistant("4")], "rejected": [assistant("5")]},
        {"messages": [*CONTEXT, assistant("4")]},
        {"messages": [*CONTEXT, assistant("5")]},
    ),
]


@pytest.mark.parametrize(("row", "chosen", "rejected"), PAIRS)
def test_preference_is_two_samples_of_a_pair(row, chosen, rejected):
    name, samples = form_of({"id": "7", "score": 3, **row})
    assert name == "preference"
    assert [sample.sample_id for sample in samples] == ["7#chosen", "7#rejected"]
    assert [sample.meta for sample in samples] == [
        {"score": 3, "pair": "7", "side": side} for side in ("chosen", "rejected")
    ]
    expected = [
        Sample("", **{k: json.dumps(v) if isinstance(v, list) else v for k, v in side.items()})
        for side in (chosen, rejected)
    ]
    assert [sample.content_sha256 for sample in samples] == [sample.content_sha256 for sample in expected]


def test_ids_of_a_pair_follow_from_both_contents():
    row = {"prompt": "a", "chosen": "yes", "rejected": "no", "pair": "own"}
    ids = [sample.sample_id for sample in form_of(row)[1]]
    assert ids == [sample.sample_id for sample in form_of(row)[1]]
    assert {name.partition("#")[0] for name in ids} != {
        form_of(row | {"rejected": "b"})[1][0].sample_id.partition("#")[0]
    }
    assert form_of(row)[1][0].meta == {"pair_": "own", "pair": ids[0].partition("#")[0], "side": "chosen"}


@pytest.mark.parametrize(
    ("prompt", "is_kept"),
    [("template", True), ([user("a"), user("b")], True), ([user("b"), user("a")], False), ("a", False)],
)
def test_a_prompt_outside_the_conversation_is_kept_as_metadata(prompt, is_kept):
    row = {"id": "1", "prompt": prompt, "chosen": CHOSEN["messages"], "rejected": [user("c"), assistant("no")]}
    for sample in form_of(row)[1]:
        assert sample.meta.get("prompt") == (prompt if is_kept else None)


def test_texts_and_ids_are_exact_unless_stripped():
    row = {"id": " 1", "text": "a\n"}
    exact, stripped = make_sample(row, {}), make_sample(row, {}, strip=True)
    assert (exact.sample_id, exact.text) == (" 1", "a\n")
    assert (stripped.sample_id, stripped.text) == ("1", "a")
    assert make_sample({"text": " "}, {}) is None
    own = make_sample({"text": "a"}, {})
    assert make_sample({"text": "a\n"}, {}, strip=True).sample_id == own.sample_id == own.content_sha256[:16]


def test_pair_is_no_single_sample():
    with pytest.raises(InputError, match="this row is a pair of samples"):
        make_sample({"prompt": "a", "chosen": "b", "rejected": "c"}, {})


BLANK = [
    {"messages": []},
    {"messages": [user(" ")]},
    {"messages": None},
    {"conversations": []},
    {"prompt": "a", "completion": " "},
    {"prompt": [user("a")], "completion": []},
    {"prompt": [user("a")], "completion": [assistant(" ")]},
    {"prompt": [user(" ")], "completion": [assistant("b")]},
    {"prompt": "a", "response": " "},
    {"prompt": "\n", "response": "b"},
    {"question": " ", "answer": "b"},
    {"question": "a", "answer": ""},
    {"instruction": "", "output": "b"},
    {"instruction": "a", "output": None},
    {"chosen": "a", "rejected": None},
]


@pytest.mark.parametrize("row", BLANK)
def test_row_without_text_is_empty(row):
    assert form_of(row) == (None, [])


def chat_error(message):
    return {"messages": [user("Hi!"), message]}


WRONG = [
    (chat_error({"role": "human", "content": "a"}), "it has the unknown role `human`", "`--column role.user=human`"),
    (chat_error({"role": 3, "content": "a"}), "it has a number as its role", "the roles are `system`"),
    (chat_error({"content": "a"}), "it has no `role`", "`--column messages.role=KEY`"),
    (chat_error({"role": "user", "content": 4}), "its `content` is a number, not text", "in quotes"),
    (chat_error({"role": "user"}), "it has no `content`", "`--column messages.content=KEY`"),
    (chat_error(assistant(None)), "it has no `content`", "only a message with `tool_calls` may lack it"),
    (chat_error(user([{"type": "image_url", "image_url": {}}])), "a part of type `image_url`", "only text"),
    (chat_error(user([{"type": "input_audio"}])), "a part of type `input_audio`", "only text"),
    (chat_error(user(["a"])), "a part that is text, not a text part", '{"type": "text", "text": "…"}'),
    (chat_error(user([{"type": "text", "text": 3}])), "a part that is of type `text`", '{"type": "text"'),
    (chat_error(assistant("a", weight=0.5)), "its `weight` is `0.5`", "0 (context only) or 1"),
    (chat_error(assistant("a", weight=True)), "its `weight` is `True`", "0 (context only) or 1"),
    (chat_error(assistant("a", tool_calls={})), "its `tool_calls` are not a list of objects", "for example"),
    (chat_error(assistant("a", reasoning_content=3)), "its `reasoning_content` is a number", "as text"),
    (chat_error("Hello"), "message 2 of column `messages`: it is text, not an object", '{"role": "user"'),
    ({"messages": "Hello"}, "column `messages` is not JSON", "a list of objects"),
    ({"messages": '[{"role": "a", "role": "b"}]'}, "column `messages` repeats the key `role`", "rename"),
    ({"messages": {"turns": []}}, "column `messages` holds an object, not a list", "`--column messages=messages.KEY`"),
    ({"messages": [user("a")], "tools": ["b"]}, "column `tools` is not a list of objects", "a tool is an object"),
    (
        {"conversations": [{"from": "Bot", "value": "a"}]},
        "it is from `Bot`, an unknown role",
        "`--column role.user=Bot`",
    ),
    ({"conversations": [{"from": "", "value": "a"}]}, "it is from ``", "; translate another with `--column role.user="),
    ({"conversations": [{"from": "a\n", "value": "a"}]}, "it is from `a\n`", "; translate another with `--column"),
    ({"conversations": [{"from": "human", "value": 3}]}, "its `content` is a number", "in quotes"),
    (
        {"prompt": "a", "completion": [assistant("b")]},
        "column `prompt` is text, but the other of `prompt` and `completion` is a list of messages",
        "both as messages",
    ),
    ({"messages": [user("a") | {"at": 1j}]}, "the chat can't be written as JSON: ", "use texts, numbers"),
    ({"messages": [user("a") | {"at": float("nan")}]}, "the chat can't be written as JSON: ", "use texts, numbers"),
    ({"chosen": "a", "rejected": [assistant("b")]}, "column `chosen` is text, but the other", "both as messages"),
    ({"body": "a"}, "a row needs `messages`, or `conversations`, or `chosen` and `rejected`", "--column text=abstract"),
]


@pytest.mark.parametrize(("row", "fact", "hint"), WRONG)
def test_invalid_row_is_an_error_with_a_hint(row, fact, hint):
    with pytest.raises(InputError) as caught:
        make_samples(row, {})
    assert fact in caught.value.fact
    assert hint in caught.value.hint


STRUCTS = [
    {"messages": CHAT, "tools": None},
    {"messages": CALLS, "tools": [TOOL | {"parameters": {"city": "text"}}]},
    {"messages": [user([{"type": "text", "text": "a"}])], "tools": None},
    {"messages": [user("a"), assistant("b", weight=0), assistant("c", weight=1)], "tools": None},
]


@pytest.mark.parametrize("row", STRUCTS)
def test_keys_that_a_struct_adds_are_left_out(row):
    table = pa.Table.from_pylist([row])
    (struct,) = table.to_pylist()
    if row is not STRUCTS[2]:
        assert struct != row  # null keys
    assert make_sample(StructRow(struct), {}).content_sha256 == make_sample(row, {}).content_sha256


def test_null_keys_of_a_json_row_are_kept():
    row = {"messages": [user("a") | {"name": None}]}
    assert content_of(row) == row


def test_null_contents_of_structs_within_a_message_are_left_out():
    calls = [{"function": {"name": "f", "content": None}}]
    (sample,) = make_samples(StructRow({"messages": [assistant(None, tool_calls=calls, at=None)]}), {})[1]
    assert json.loads(sample.messages) == [assistant(None, tool_calls=[{"function": {"name": "f"}}])]


@pytest.mark.parametrize("weight", [0, 1])
def test_weights_that_became_floats_are_whole_numbers(weight):
    (sample,) = make_samples({"messages": [assistant("ä", weight=float(weight))]}, {})[1]
    assert sample.messages == f'[{{"role": "assistant", "content": "ä", "weight": {weight}}}]'


# --- mapping -------------------------------------------------------------------------------------------------------


MAPPED = [
    (
        {"abstract": {"sections": [{"text": "One."}, {"text": "Two."}]}},
        {"text": "abstract.sections.1.text"},
        {"text": "Two."},
    ),
    ({"a.b": "x", "a": {"b": "y"}}, {"text": "a.b"}, {"text": "x"}),
    ({"log": {"turns": CHAT}}, {"messages": "log.turns"}, {"messages": CHAT}),
    (
        {"dialog": [{"speaker": "Customer", "said": "a", "at": 3}, {"speaker": "Agent", "said": "b"}]},
        {
            "messages": "dialog",
            "messages.role": "speaker",
            "messages.content": "said",
            "role.user": "Customer",
            "role.assistant": "Agent",
        },
        {"messages": [user("a") | {"at": 3}, assistant("b")]},
    ),
    ({"conversations": [{"from": "Bob", "value": "a"}]}, {"role.user": "Bob"}, {"messages": [user("a")]}),
    (
        {"instruction": "a", "output": "b"},
        {"prompt": "instruction", "response": "output"},
        {"prompt": "a", "response": "b"},
    ),
    ({"instruction": "a", "output": "b", "text": "c"}, {"text": "text"}, {"text": "c"}),
    ({"messages": CHAT, "body": "c"}, {"text": "body"}, {"text": "c"}),
    ({"instruction": "a", "context": "c", "response": "b"}, {"input": "context", "output": "response"}, None),
]


@pytest.mark.parametrize(("row", "columns", "content"), MAPPED)
def test_mapped_columns_reach_into_lists_structs_and_messages(row, columns, content):
    expected = content or {"prompt": WITH_INPUT.format(instruction="a", input="c"), "completion": "b"}
    assert content_of(row, columns) == expected


def test_a_place_behind_the_end_of_a_list_is_null():
    assert form_of({"parts": [], "id": "1"}, {"text": "parts.0"}) == (None, [])
    with pytest.raises(InputError, match=r"there is no column `parts.x`"):
        make_samples({"parts": []}, {"text": "parts.x"})


def test_the_rest_of_a_mapped_column_is_metadata():
    row = {"paper": {"parts": [{"text": "a", "n": 1}, {"text": "b", "n": 2}], "year": 3}, "messages": "note"}
    columns = {"prompt": "paper.parts.0.text", "response": "paper.parts.1.text"}
    assert make_sample(row, columns).meta == {"paper": {"parts": [{"n": 1}, {"n": 2}], "year": 3}, "messages": "note"}
    columns = {"prompt": "p.0", "response": "p.1"}
    assert make_sample({"p": ["a", "b", "c"]}, columns).meta == {"p": ["c"]}


def test_columns_of_other_forms_are_metadata():
    row = {"messages": [user("a")], "prompt": "p", "output": {"n": 1}, "input": "", "system": None}
    assert make_sample(row, {}).meta == {"prompt": "p", "output": {"n": 1}}


@pytest.mark.parametrize(
    ("name", "fact"), [("body", "sample field `body`"), ("text.a", "`text.a`"), ("role.x", "role `x`")]
)
def test_unknown_field_of_a_mapping_is_refused(name, fact):
    with pytest.raises(InputError, match="unknown") as caught:
        check_columns([name])
    assert fact in caught.value.fact
    check_columns(["text", "messages.role", "messages.anything", "role.user"])


# --- summaries and the registry ------------------------------------------------------------------------------------


def test_summary_counts_forms_turns_and_system_prompts():
    summary = Summary()
    rows = [
        {"messages": CHAT},
        {"messages": [user("a")]},
        *(row for row, *_ in PAIRS[:2]),
        {"text": "a"},
        {"text": "b"},
    ]
    rows += [{"prompt": "a", "response": "b"}, ALPACA, ALPACA, {"text": ""}]
    for row in rows:
        summary.add(*make_samples(row, {}))
    assert summary.line() == (
        "2 chats, 1.5 turns on average, 50% with a system prompt, 1 without an assistant turn (no targets); "
        "2 preference pairs; 2 texts; 1 prompt with a response; 2 prompts with completions"
    )
    assert summary.rows == {"messages": 2, "preference": 2, "text": 2, "response": 1, "alpaca": 2}
    assert [note.partition(":")[0] for note in summary.notes()] == ["Alpaca rows get the prompt of Alpaca's trainers"]


def test_a_new_form_is_an_entry_in_the_registry(monkeypatch):
    poem = Form(
        name="poem",
        needed=("verses",),
        looks_like="`verses`",
        meaning="a poem",
        read=lambda fields: [Sample("", text=fields.text("verses"))],
    )
    monkeypatch.setitem(FORMS, "poem", poem)
    assert make_sample({"verses": ["a", "b"], "year": 1}, {}) == Sample(
        make_sample({"verses": ["a", "b"]}, {}).sample_id, text="a\nb", meta={"year": 1}
    )
    assert "- `verses` → a poem" in forms_help()
    assert "verses" in fields_of_forms()
    with pytest.raises(InputError, match="or `verses`; this one"):
        make_samples({"body": 1}, {})


def test_rows_are_numbered_and_pairs_yield_two_samples():
    rows = [{"text": "a"}, {"text": ""}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    numbers = [(number, sample is not None) for number, _, sample in samples_of(rows, {}, "x")]
    assert numbers == [(1, True), (2, False), (3, True), (3, True)]
    with pytest.raises(InputError, match="`x`, row 2: message 1 of column `messages`: it has no `role`"):
        list(samples_of([{"text": "a"}, {"messages": [{}]}], {}, "x"))


@pytest.mark.parametrize(
    ("first", "second", "fact"),
    [
        ({"id": 1}, {}, "it has no id, but row 1 has one in `id`"),
        ({}, {"id": 1}, "it has an id in `id`, but row 1 has none"),
        ({"sample_id": 1}, {"id": 1}, "its id is in `id`, but the id of row 1 is in `sample_id`"),
    ],
)
def test_rows_have_their_ids_in_one_column(first, second, fact):
    rows = [first | {"text": "a"}, {"text": ""}, {"id": 2, "text": ""}, second | {"text": "b"}]
    with pytest.raises(InputError) as caught:
        list(RowReader({}).read(rows, "x"))
    assert caught.value.fact == f"`x`, row 4: {fact}"


def test_the_first_rows_file_is_named_if_it_is_another():
    reader = RowReader({})
    assert [number for number, *_ in reader.read([{"text": ""}, {"id": 1, "text": "a"}], "x")] == [1, 2]
    for other in ("w", "y"):
        with pytest.raises(InputError, match=f"`{other}`, row 1: it has no id, but row 2 of `x` has one in `id`"):
            list(reader.read([{"text": "b"}], other))


def test_metadata_nested_too_deeply_is_refused():
    deep = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(InputError, match="`x`, row 1: its metadata is nested too deeply"):
        list(samples_of([{"text": "a", "extra": deep}], {}, "x"))
