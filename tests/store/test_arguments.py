"""The arguments of every public method: a wrong type is an error naming the parameter, in Python terms."""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest

import lark_store
from lark_store import Store
from lark_store.errors import InputError, LarkStoreError
from lark_store.results import NewText
from lark_store.store.arguments import _hints
from lark_store.store.spelling import in_python

NOTHING = object()
VALUES = {
    "text": "x",
    "one": 1,
    "half": 0.5,
    "true": True,
    "none": None,
    "list of texts": ["x"],
    "list of numbers": [1],
    "dict": {"x": 1},
    "bytes": b"x",
    "path": Path("x"),
    "nan": float("nan"),
    "huge": 1 << 70,
    "surrogate": "\udcff",
    "object": NOTHING,
    "function": print,
}
# Values accepted by each type hint; all others must be refused.
TAKES = {
    "str": {"text"},
    "int": {"one"},
    "float": {"one", "half", "huge", "nan"},
    "bool": {"true"},
    "str | None": {"text", "none"},
    "int | None": {"one", "none"},
    "float | None": {"one", "half", "huge", "nan", "none"},
    "str | Path": {"text", "path"},
    "str | Path | None": {"text", "path", "none"},
    "Sequence[str]": {"text", "list of texts"},
    "Sequence[str] | None": {"text", "list of texts", "none"},
    "str | Sequence[str]": {"text", "list of texts"},
    "str | Sequence[str] | None": {"text", "list of texts", "none"},
    "dict[str, float] | None": {"dict", "none"},
    "dict[str, str] | None": {"none"},
    "dict[str, str]": set(),
    "dict[str, Any]": {"dict"},
    "Sequence[Any] | Mapping[str, Any] | None": {"list of texts", "list of numbers", "dict", "none"},
    "OnProgress | None": {"function", "none"},
    "NewText | None": {"none"},
    "NewText | Sequence[NewText] | None": {"none"},
    "str | ModelObject | None": {"text", "none"},
    "str | Path | TokenizerObject | None": {"text", "path", "none"},
    "pl.DataFrame": set(),
    "SourceData": {"text", "path", "list of texts", "list of numbers", "dict"},  # rows are checked as they are read
}


def public_methods():
    """Yield the name and function of every public method of Store."""
    for name in sorted(dir(Store)):
        member = inspect.getattr_static(Store, name)
        function = member.__func__ if isinstance(member, staticmethod | classmethod) else member
        if inspect.isfunction(function) and not name.startswith("_"):
            yield name, function


METHODS = dict(public_methods())
PARAMETERS = [
    (method, parameter)
    for method, function in METHODS.items()
    for parameter in inspect.signature(function).parameters
    if parameter not in {"self", "cls"}
]


def valid_value(hint: str) -> object:
    """Return a value accepted by a hint."""
    if hint == "pl.DataFrame":
        return pl.DataFrame()
    return {} if hint == "dict[str, str]" else VALUES[min(TAKES[hint])]


def test_public_parameters_have_known_type_hints():
    assert len(METHODS) > 35
    assert len(PARAMETERS) > 180
    assert {p.annotation for f in METHODS.values() for n, p in inspect.signature(f).parameters.items()
            if n not in {"self", "cls"}} <= TAKES.keys()  # fmt: skip


@pytest.mark.parametrize(("method", "parameter"), PARAMETERS)
def test_wrong_type_is_an_error_naming_the_parameter(scored, method, parameter):
    parameters = inspect.signature(METHODS[method]).parameters
    needed = {
        name: valid_value(p.annotation)
        for name, p in parameters.items()
        if p.default is p.empty and name not in {"self", "cls", parameter}
    }
    wrong = VALUES.keys() - TAKES[parameters[parameter].annotation]
    if parameters[parameter].default == ():
        wrong -= {"none"}  # as much as to leave it out
    for kind in sorted(wrong):
        with pytest.raises(
            InputError, match=rf"^`{parameter}` must be |^`{parameter}` {1 << 70} doesn't fit"
        ) as caught:
            getattr(scored, method)(**needed, **{parameter: VALUES[kind]})
        assert caught.value.hint in {None, "use a smaller number"} or f"{parameter}=" in caught.value.hint


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.top("q100", checkpoint="base", k="5"), "`k` must be a whole number, not `'5'` (str)"),
        (lambda s: s.top("q100", checkpoint="base", k=True), "`k` must be a whole number, not `True` (bool)"),
        (
            lambda s: s.top("q100", checkpoint=["base", 1]),
            "`checkpoint` must be a text or a list of texts or None, not `1` (int) in its values",
        ),
        (lambda s: s.attribute("base", queries=["test"]), "`queries` must be a text or None, not `['test']` (list)"),
        (lambda s: s.top(checkpoint="base", new=NewText(text=3)), "`text` must be a text or None, not `3` (int)"),
        (lambda s: s.source_add("x", "x", stage=None), "`stage` must be a text, not None"),
        (lambda s: s.sql("SELECT 1", timeout="1"), "`timeout` must be a number or None, not `'1'` (str)"),
        (
            lambda _: Store("lark.store"),
            "`Store(...)` takes no path: use `Store.open` to open a store or `Store.create` to create one",
        ),
        (lambda _: Store.open(3), "`path` must be a text or a path or None, not `3` (int)"),
    ],
)  # fmt: skip
def test_message_states_expected_and_actual_value(scored, call, message):
    with pytest.raises(InputError) as caught:
        call(scored)
    assert caught.value.fact == message


def test_single_name_counts_as_a_list(scored_copy):
    for one, many in (("base", ["base"]), ("base", ("base",)), (np.str_("base"), pl.Series(["base"]))):
        of_one = scored_copy.self_influence(checkpoints=one, sources="songs", sketcher="small")
        assert of_one["sample_id"].unique().sort().to_list() == [f"sea-{i}" for i in range(5)]
        assert of_one.equals(scored_copy.self_influence(checkpoints=many, sources=["songs"], sketcher="small"))
    hits = scored_copy.top("q100", checkpoint="base", sources="songs", variants="raw", sketcher="small")
    assert set(hits.frame["source"]) == {"songs"}
    assert set(hits.frame["variant"]) == {"raw"}
    report = scored_copy.attribute("epoch-1", sources="medical", queries="test", sketcher="small")
    assert set(report["checkpoint"]) == {"epoch-1"}
    assert set(report["source"]) == {"medical"}
    plan = scored_copy.ingest("base", "songs", "raw", sketcher="small")
    assert plan.units.select("n_existing", "n_sketched").rows() == [(5, 0)]
    gone = scored_copy.sample_remove("songs", "sea-3")
    assert gone.filter(table="samples")["rows"].to_list() == [1]


def test_numpy_numbers_are_accepted(scored_copy):
    hits = scored_copy.top("q100", checkpoint="base", k=np.int64(3), sketcher="small", opponents=np.bool_(True))
    assert len(hits.frame) == 3
    assert scored_copy.sketcher_add("n", k=np.int32(256), seed=np.uint8(7), damping=None).seed == 7
    assert scored_copy.sql("SELECT typeof(seed) t, seed FROM sketchers WHERE name = 'n'").row(0) == ("BIGINT", 7)


@pytest.mark.parametrize(
    "call",
    [
        *(lambda s, k=k: s.top("q100", checkpoint="base", k=k, sketcher="small") for k in (0, -1)),
        *(lambda s, k=k: s.similar_text(text="kidney", k=k) for k in (0, -1)),
        *(lambda s, k=k: s.self_influence(k=k, sketcher="small") for k in (0, -1)),
        *(lambda s, n=n: s.top("q100", checkpoint="base", null=n, sketcher="small") for n in ("", "no", "None")),
        *(lambda s, m=m: s.top("q100", checkpoint="base", method=m, sketcher="small") for m in ("", "Cosine", "x")),
        lambda s: s.top("q100", checkpoint="base", over_checkpoints="mean", sketcher="small"),
        lambda s: s.top("q100", checkpoint=[], sketcher="small"),
        lambda s: s.top("q100", checkpoint="", sketcher="small"),
        lambda s: s.top("", checkpoint="base", sketcher="small"),
        lambda s: s.top("q100", checkpoint="base", where=" ", sketcher="small"),
        lambda s: s.top("q100", checkpoint="base", device="gpu9", sketcher="small"),
        lambda s: s.metrics(view="none", sketcher="small"),
        lambda s: s.attribute("base", queries="test", sketcher="small", hits=0),
        lambda s: s.ingest("base", "songs", "raw", sketcher="small", limit=-1),
        lambda s: s.ingest("base", "songs", "raw", sketcher="small", batch_tokens=0),
        lambda s: s.ingest("base", "songs", "raw", sketcher="small", candidates=0, queries="test"),
        lambda s: s.sketcher_add("z", k=1000),
        lambda s: s.sketcher_add("z", seed=-1),
        lambda s: s.sketcher_add("z", dtype="float8"),
        lambda s: s.sketcher_add("z", correction="none", damping=float("inf")),
        lambda s: s.variant_add("z", template="raw", max_length=0),
        lambda s: s.variant_add("z", template="raw", targets="all"),
        lambda s: s.source_add("z", "z.jsonl", stage="train"),
        lambda s: s.correction_fit("base", kind="none"),
        lambda s: s.correction_fit("base", samples=0),
        lambda s: s.db_optimize(keep_versions_days=-1),
        lambda s: s.db_check(deep=-1),
        lambda s: s.verify(sketches=0, sketcher="small"),
        lambda s: s.sample_remove("songs", []),
        lambda s: s.sql("SELECT 1", memory=""),
        lambda s: s.sql("SELECT 1", max_rows=-1),
        lambda s: s.sql("SELECT 1", timeout=-1),
        lambda s: s.sql("SELECT 1", timeout=float("nan")),
        lambda s: s.db_optimize(keep_versions_days=float("nan")),
        lambda s: s.sketcher_add("z", correction="kfac", power=float("nan")),
        lambda s: s.sketcher_add("z", correction="kfac", damping=float("nan")),
    ],
)  # fmt: skip
def test_value_out_of_range_is_an_own_error(scored, call):
    with pytest.raises(LarkStoreError):
        call(scored)


# --- spelling ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "message", "python"),
    [
        ("top", "try `-k 10`", "try `k=10`"),
        ("top", "give it with `--checkpoint NAME`", "give it with `checkpoint=NAME`"),
        ("attribute", "give it with `--checkpoint NAME`", "give it with `checkpoints=[NAME]`"),
        ("ingest", "add `--by embedding`", 'add `by="embedding"`'),
        ("export", "replace a file with `--overwrite`", "replace a file with `overwrite=True`"),
        ("source_add", "`--column text=abstract`", '`columns={"text": "abstract"}`'),
        ("top", "give `--prompt` and `--response`", "give `new=NewText(prompt=...)` and `new=NewText(response=...)`"),
        ("top", 'for example `--where "n_tokens < 300"`', 'for example `where="n_tokens < 300"`'),
        (None, "`lark-store attribute` scores", "`store.attribute(...)` scores"),
        (None, "`lark-store show` lists", "`store.show()` lists"),
        (None, "`lark-store db upgrade`", "`Store.db_upgrade(...)`"),
        (None, "`lark-store ingest --sketcher small`", '`store.ingest(sketcher="small", ...)`'),
        (
            None,
            "`lark-store attribute --checkpoint a --checkpoint b --queries q`",
            '`store.attribute(checkpoints=["a", "b"], queries="q", ...)`',
        ),
        (None, "`lark-store init` makes one", "`Store.create(...)` makes one"),
        (None, "make one with `lark-store study run`", "make one with `lark-store study run`"),
        (None, "a `--` in text, a `name`", "a `--` in text, a `name`"),
    ],
)  # fmt: skip
def test_commands_and_options_become_calls_and_arguments(method, message, python):
    assert in_python(message, method) == python


def test_errors_use_the_callers_spelling(scored):
    with pytest.raises(InputError) as caught:
        scored.top("q100", checkpoint=[])
    assert str(caught.value) == "no checkpoint is given\n\nhint: add `checkpoint=NAME`"
    assert caught.value.command_line == "no checkpoint is given\n\nhint: add `--checkpoint NAME`"


CLI_ONLY = {"study", "evaluate"}  # options without a method of `Store`
OTHERS = {"--attribute_tokens", "--aggregation none"}  # bergson's own options


def quoted_commands():
    """Yield command-line text in backticks from all string constants of the packages."""
    root = Path(lark_store.__file__).parent
    for room in ("store", "schema", "query", "ingest", "eif", "migrations", "upkeep"):
        for path in (root / room).rglob("*.py"):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            docs = {ast.get_docstring(node, clean=False) for node in ast.walk(tree)
                    if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)}  # fmt: skip
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in docs:
                    for code in re.findall(r"`((?:lark-store |--?[a-z])[^`]*)`", node.value):
                        yield path.name, code


def test_python_errors_never_use_command_line_spelling():
    results = [(name, code) for name, code in quoted_commands() if code.split()[1:2] != [] or code.startswith("-")]
    assert len(results) > 60
    kept = [
        (name, code)
        for name, code in results
        if re.search(r"lark-store |^`?--?[a-z]", in_python(f"`{code}`").strip("`"))
        and code.split()[1:2] not in ([word] for word in CLI_ONLY)
        and name != "spelling.py"
        and code not in OTHERS
    ]
    assert kept == []


def test_hints_are_evaluated_once_for_each_method():
    for function in METHODS.values():
        names = set(inspect.signature(function).parameters) - {"self", "cls"}
        assert set(_hints(inspect.unwrap(function))) == names


def test_empty_list_is_an_error_and_repeated_names_count_once(scored_copy):
    for method in (scored_copy.ingest, scored_copy.plan):
        with pytest.raises(InputError, match=r"^no checkpoint is given"):
            method([], ["songs"], ["raw"], sketcher="small")
        with pytest.raises(InputError, match=r"^no source is given\n\nhint: add `source"):
            method(["base"], [], ["raw"], sketcher="small")
        with pytest.raises(InputError, match=r"^no variant is given"):
            method(["base"], ["songs"], [], sketcher="small")
    with pytest.raises(InputError, match=r"^no checkpoint is given"):
        scored_copy.attribute([], queries="test", sketcher="small")
    report = scored_copy.attribute(["base", "base"], queries="test", sketcher="small")
    assert len(report) == len(scored_copy.attribute("base", queries="test", sketcher="small")) == 5


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda store: store.ft_pt(), r"Store\.ft_pt\(\): missing a required argument: 'checkpoint'"),
        (lambda store: store.metrics(wrong="x"), r"Store\.metrics\(\): got an unexpected keyword argument 'wrong'"),
        (lambda store: store.db_check(1, 2, 3), r"Store\.db_check\(\): too many positional arguments"),
    ],
)
def test_missing_or_unknown_argument_names_the_method(scored, call, message):
    with pytest.raises(TypeError, match=message):
        call(scored)
