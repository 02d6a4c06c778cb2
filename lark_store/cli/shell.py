"""The interactive SQL shell: many SELECTs over one open store, with completion and a history."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from prompt_toolkit import PromptSession
from prompt_toolkit.application import get_app
from prompt_toolkit.completion import Completer, Completion
from prompt_toolkit.filters import Condition
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.lexers import PygmentsLexer
from pygments.lexers.sql import SqlLexer

from lark_store.cli.options import Format
from lark_store.cli.output import emit, say
from lark_store.errors import LarkStoreError
from lark_store.query.sql.functions import FUNCTIONS
from lark_store.query.sql.views import VIEWS, described, overview

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.document import Document
    from prompt_toolkit.input import Input
    from prompt_toolkit.output import Output

    from lark_store.cli.sql import Asker

HELP = r"""A query ends with `;` and may take several lines.
\d         the views            \d VIEW    its columns
\f FORMAT  table, json, jsonl, csv or md
\q         end, as Ctrl-D       Ctrl-C     end a query, or drop what is typed"""
_COMMANDS = (r"\d", r"\f", r"\q", r"\?")
_KEYWORDS = """
SELECT DISTINCT FROM WHERE GROUP BY ALL HAVING ORDER ASC DESC NULLS FIRST LAST LIMIT OFFSET QUALIFY WINDOW OVER
PARTITION WITH RECURSIVE AS JOIN LEFT RIGHT FULL OUTER INNER CROSS LATERAL ASOF ON USING UNION EXCEPT INTERSECT EXCLUDE
REPLACE
AND OR NOT IN IS NULL LIKE ILIKE BETWEEN EXISTS CASE WHEN THEN ELSE END CAST FILTER VALUES PIVOT UNPIVOT EXPLAIN
ANALYZE DESCRIBE SUMMARIZE TRUE FALSE ROWS RANGE PRECEDING FOLLOWING UNBOUNDED CURRENT ROW SAMPLE
count sum avg min max median quantile_cont stddev_pop corr any_value arg_max arg_min string_agg list unnest row_number
rank lag lead coalesce round abs sqrt lower upper length substr regexp_matches
"""
_TABLE_COMES = re.compile(r"\b(?:from|join)\s+(?:\w+\s*,\s*)*\w*$", re.IGNORECASE)
_OF_A_TABLE = re.compile(r"(\w+)\.\w*$")
_TABLES = re.compile(rf"\b({'|'.join(VIEWS)})\b(?:\s+(?:as\s+)?(\w+))?", re.IGNORECASE)
_QUIET = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|--[^\n]*|/\*.*?\*/", re.DOTALL)


def is_complete(text: str) -> bool:
    r"""Tell whether what is typed is to be run, not gone on with.

    >>> [is_complete(text) for text in ("select 1", "select 1;", "select ';", "from samples; -- all", r"\d", "")]
    [False, True, False, True, True, True]
    """
    bare = _QUIET.sub("", text).strip()
    return not bare or bare.startswith("\\") or (bare.endswith(";") and not {"'", '"'} & set(bare))


class SqlCompleter(Completer):
    """Completes views after FROM and JOIN, columns after `view.` or an alias, elsewhere everything that fits."""

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:  # noqa: ARG002
        """Yield what the word before the cursor may become."""
        before = document.text_before_cursor
        word = document.get_word_before_cursor(pattern=re.compile(r"\\?\w+|\\"))
        kinds: dict[str, str] = {}
        for candidate, kind in self._candidates(before.lstrip(), document.text):
            kinds.setdefault(candidate, kind)
        for candidate, kind in kinds.items():
            if candidate.lower().startswith(word.lower()) and candidate != word:
                yield Completion(candidate, start_position=-len(word), display_meta=kind)

    def _candidates(self, before: str, text: str) -> Iterator[tuple[str, str]]:
        """Yield words and their kind, the likeliest first."""
        tables = dict.fromkeys(VIEWS, "view") | dict.fromkeys(FUNCTIONS, "function")
        known = VIEWS | FUNCTIONS
        named = {alias or view: view.lower() for view, alias in _TABLES.findall(text)}
        named |= {view.lower(): view.lower() for view, _ in _TABLES.findall(text)}
        of_a_table = _OF_A_TABLE.search(before)
        if before.startswith("\\"):
            yield from _words(before, tables)
        elif of_a_table and of_a_table[1].lower() in named | tables:
            table = named.get(of_a_table[1], of_a_table[1].lower())
            yield from ((column, facts.type.lower()) for column, facts in known[table].columns.items())
        elif _TABLE_COMES.search(before):
            yield from tables.items()
        else:
            here = dict.fromkeys(named.values()) or dict.fromkeys(known)
            yield from {column: "column" for table in here for column in known[table].columns}.items()
            yield from tables.items()
            yield from ((keyword, "") for keyword in _KEYWORDS.split())


def _words(before: str, tables: dict[str, str]) -> Iterable[tuple[str, str]]:
    r"""Return what may follow in a command, as after `\d` or `\f`."""
    if " " not in before:
        return [(command, "command") for command in _COMMANDS]
    return [(form.value, "format") for form in Format] if before.startswith(r"\f") else tables.items()


def history_path() -> Path:
    """Return the file of the queries that were typed, in the user's state directory."""
    state = os.environ.get("XDG_STATE_HOME", "")
    root = Path(state) if Path(state).is_absolute() else Path.home() / ".local" / "state"
    return root / "lark-store" / "sql_history"


def _history() -> History:
    """Open the history, for its owner alone to read; where it can't be kept, it lasts as long as the shell."""
    path = history_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        with path.open("a", encoding="utf-8"):
            return FileHistory(path)
    except OSError as error:
        say(f"no history is kept: `{path}` can't be written ({error.strerror})")
        return InMemoryHistory()


class Shell:
    """Reads queries and commands, one after the other, and prints their answers; an error ends none but its query."""

    def __init__(
        self, asker: Asker, form: str, *, terminal_input: Input | None = None, terminal_output: Output | None = None
    ) -> None:
        self._asker = asker
        self._form = form
        self._session: PromptSession[str] = PromptSession(
            "lark> ",
            multiline=Condition(lambda: not is_complete(get_app().current_buffer.text)),
            prompt_continuation="   -> ",
            lexer=PygmentsLexer(SqlLexer),
            completer=SqlCompleter(),
            complete_while_typing=False,
            history=_history(),
            input=terminal_input,
            output=terminal_output,
        )

    def run(self) -> None:
        r"""Answer until `\q` or Ctrl-D."""
        say(f"{self._asker.store.place}: a query ends with `;`; \\d lists the views, \\? helps, \\q ends")
        while True:
            try:
                text = self._session.prompt().strip()
                if text in {r"\q", "quit", "exit"}:
                    return
                self._answer(text)
            except EOFError:
                return
            except KeyboardInterrupt:
                say("interrupted")
            except LarkStoreError as error:
                say(f"error: {error}")

    def _answer(self, text: str) -> None:
        """Run one query, or one command that starts with a backslash."""
        if text.startswith("\\"):
            self._command(*text.rstrip("; ").split(maxsplit=1))
        elif _QUIET.sub("", text).strip("; \n"):
            self._asker.ask(text, self._form)

    def _command(self, name: str, argument: str = "") -> None:
        forms = [form.value for form in Format]
        if name == r"\d":
            emit(described(argument) if argument else overview(), Format.table)
        elif name == r"\f" and argument in forms:
            self._form = argument
        elif name == r"\f":
            say(f"the format is {self._form}; `\\f FORMAT` takes {', '.join(forms)}")
        else:
            say(HELP if name in {r"\?", r"\h"} else f"`{name}` is no command\n\nhint: \\? lists them")
