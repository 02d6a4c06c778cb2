"""The interactive SQL shell: SELECTs over one open store, with completion and history."""

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

from lark_store.cli.formats import Format
from lark_store.cli.output import emit, say
from lark_store.display.table import About
from lark_store.errors import LarkStoreError
from lark_store.query.sql.functions import FUNCTIONS
from lark_store.query.sql.overview import described, overview
from lark_store.query.sql.views import VIEWS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from prompt_toolkit.completion import CompleteEvent
    from prompt_toolkit.document import Document
    from prompt_toolkit.input import Input
    from prompt_toolkit.output import Output

    from lark_store.cli.sql import QueryRunner

HELP = r"""End a query with `;`; it may span several lines.
\d         list the views       \d VIEW    list its columns
\f FORMAT  table, json, jsonl, csv or md
\w         print tables in full, or fitted to the terminal again
\q         quit (or Ctrl-D)     Ctrl-C     stop the query, or clear the input"""
_COMMANDS = (r"\d", r"\f", r"\w", r"\q", r"\?")
_KEYWORDS = """
SELECT DISTINCT FROM WHERE GROUP BY ALL HAVING ORDER ASC DESC NULLS FIRST LAST LIMIT OFFSET QUALIFY WINDOW OVER
PARTITION WITH RECURSIVE AS JOIN LEFT RIGHT FULL OUTER INNER CROSS LATERAL ASOF ON USING UNION EXCEPT INTERSECT EXCLUDE
REPLACE
AND OR NOT IN IS NULL LIKE ILIKE BETWEEN EXISTS CASE WHEN THEN ELSE END CAST FILTER VALUES PIVOT UNPIVOT EXPLAIN
ANALYZE DESCRIBE SUMMARIZE TRUE FALSE ROWS RANGE PRECEDING FOLLOWING UNBOUNDED CURRENT ROW SAMPLE
count sum avg min max median quantile_cont stddev_pop corr any_value arg_max arg_min string_agg list unnest row_number
rank lag lead coalesce round abs sqrt lower upper length substr regexp_matches
"""
_TABLE_POSITION = re.compile(r"\b(?:from|join)\s+(?:\w+\s*,\s*)*\w*$", re.IGNORECASE)
_QUALIFIED_COLUMN = re.compile(r"(\w+)\.\w*$")
_TABLES = re.compile(rf"\b({'|'.join(VIEWS)})\b(?:\s+(?:as\s+)?(\w+))?", re.IGNORECASE)
_QUOTED_OR_COMMENT = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|--[^\n]*|/\*.*?\*/", re.DOTALL)


def is_complete(text: str) -> bool:
    r"""Tell whether the input can be run as it is.

    >>> [is_complete(text) for text in ("select 1", "select 1;", "select ';", "from samples; -- all", r"\d", "")]
    [False, True, False, True, True, True]
    """
    bare = _QUOTED_OR_COMMENT.sub("", text).strip()
    return not bare or bare.startswith("\\") or (bare.endswith(";") and not {"'", '"'} & set(bare))


class SqlCompleter(Completer):
    """Completes views after FROM and JOIN, columns after `view.` or an alias, and all matches elsewhere."""

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterator[Completion]:  # noqa: ARG002
        """Yield completions of the word before the cursor."""
        before = document.text_before_cursor
        word = document.get_word_before_cursor(pattern=re.compile(r"\\?\w+|\\"))
        kinds: dict[str, str] = {}
        for candidate, kind in self._candidates(before.lstrip(), document.text):
            kinds.setdefault(candidate, kind)
        for candidate, kind in kinds.items():
            if candidate.lower().startswith(word.lower()) and candidate != word:
                yield Completion(candidate, start_position=-len(word), display_meta=kind)

    def _candidates(self, before: str, text: str) -> Iterator[tuple[str, str]]:
        """Yield words and their kind, the most likely first."""
        tables = dict.fromkeys(VIEWS, "view") | dict.fromkeys(FUNCTIONS, "function")
        schemas = VIEWS | FUNCTIONS
        aliases = {alias or view: view.lower() for view, alias in _TABLES.findall(text)}
        aliases |= {view.lower(): view.lower() for view, _ in _TABLES.findall(text)}
        qualifier = _QUALIFIED_COLUMN.search(before)
        if before.startswith("\\"):
            yield from _words(before, tables)
        elif qualifier and qualifier[1].lower() in aliases | tables:
            table = aliases.get(qualifier[1], qualifier[1].lower())
            yield from ((column, facts.type.lower()) for column, facts in schemas[table].columns.items())
        elif _TABLE_POSITION.search(before):
            yield from tables.items()
        else:
            candidates = dict.fromkeys(aliases.values()) or dict.fromkeys(schemas)
            yield from {column: "column" for table in candidates for column in schemas[table].columns}.items()
            yield from tables.items()
            yield from ((keyword, "") for keyword in _KEYWORDS.split())


def _words(before: str, tables: dict[str, str]) -> Iterable[tuple[str, str]]:
    r"""Return the completions of a shell command, such as `\d` or `\f`."""
    if " " not in before:
        return [(command, "command") for command in _COMMANDS]
    return [(form.value, "format") for form in Format] if before.startswith(r"\f") else tables.items()


def history_path() -> Path:
    """Return the history file, in the user's state directory."""
    state = os.environ.get("XDG_STATE_HOME", "")
    root = Path(state) if Path(state).is_absolute() else Path.home() / ".local" / "state"
    return root / "lark-store" / "sql_history"


def _history() -> History:
    """Open the history, readable by its owner only; keep it in memory if the file can't be written."""
    path = history_path()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        with path.open("a", encoding="utf-8"):
            return FileHistory(path)
    except OSError as error:
        say(f"the history is not saved: `{path}` can't be written ({error.strerror})")
        return InMemoryHistory()


class Shell:
    """Reads queries and commands and prints their results; an error ends only its query."""

    def __init__(
        self,
        runner: QueryRunner,
        form: str,
        *,
        terminal_input: Input | None = None,
        terminal_output: Output | None = None,
    ) -> None:
        self._runner = runner
        runner.about = About(complete=r"`\w` prints everything")
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
        r"""Read and run input until `\q` or Ctrl-D."""
        say(f"{self._runner.store.place}: end a query with `;`; \\d lists the views, \\? shows help, \\q quits")
        while True:
            try:
                text = self._session.prompt().strip()
                if text in {r"\q", "quit", "exit"}:
                    return
                self._execute(text)
            except EOFError:
                return
            except KeyboardInterrupt:
                say("interrupted")
            except LarkStoreError as error:
                say(f"error: {error.command_line}")

    def _execute(self, text: str) -> None:
        """Run one query, or one backslash command."""
        if text.startswith("\\"):
            self._command(*text.rstrip("; ").split(maxsplit=1))
        elif _QUOTED_OR_COMMENT.sub("", text).strip("; \n"):
            self._runner.run(text, self._form)

    def _command(self, name: str, argument: str = "") -> None:
        forms = [form.value for form in Format]
        if name == r"\d":
            emit(described(argument) if argument else overview(), Format.table, About(whole=["meaning"]))
        elif name == r"\f" and argument in forms:
            self._form = argument
        elif name == r"\w":
            self._runner.wide = not self._runner.wide
            say("tables are printed in full" if self._runner.wide else "tables fit into the terminal")
        elif name == r"\f":
            say(f"the format is {self._form}; `\\f FORMAT` takes {', '.join(forms)}")
        else:
            say(HELP if name in {r"\?", r"\h"} else f"`{name}` is not a command\n\nhint: \\? lists the commands")
