"""The tools for agents, through the protocol's own client."""

from __future__ import annotations

import asyncio
import json
import os
import sys

import pytest
from helpers.explorer import HOSTILE
from helpers.program import PROGRAM, lark

from lark_store import Store
from lark_store.agents import CHARACTERS, ROWS, Tools
from lark_store.errors import InputError


def spoken(path, *calls):
    """Return the names of the tools, and the answer of each call: (name, arguments) to (is an error, text)."""
    from mcp import ClientSession, StdioServerParameters, stdio_client

    async def talk():
        server = StdioServerParameters(command=str(PROGRAM), args=["mcp", "--store", str(path)], env=dict(os.environ))
        async with stdio_client(server) as (read, write), ClientSession(read, write) as session:
            await session.initialize()
            names = [tool.name for tool in (await session.list_tools()).tools]
            answers = [await session.call_tool(*call) for call in calls]
            return names, [(bool(answer.is_error), answer.content[0].text) for answer in answers]

    return asyncio.run(talk())


def test_agent_reads_a_store(explored_path):
    names, answers = spoken(
        explored_path,
        ("show", {}),
        ("sql", {"query": "SELECT count(*) AS n FROM samples"}),
        ("top", {"query": "q100", "checkpoint": "epoch-1", "sketcher": "small", "k": 3}),
        ("top", {"query": "nobody", "checkpoint": "epoch-1", "sketcher": "small"}),
        ("sql", {"query": "DELETE FROM samples"}),
        ("explain", {"query": "q100", "sample": "finetune/q2", "checkpoint": "epoch-1", "sketcher": "small"}),
    )
    assert names == ["show", "sql", "top", "explain"]
    assert [error for error, _ in answers] == [False, False, False, True, True, False]
    shown, counted, ranked, unknown, refused, explained = (text for _, text in answers)
    with Store.open(explored_path) as store:
        hits = store.top("q100", checkpoint="epoch-1", sketcher="small", k=3)
        exact = store.explain("q100", "finetune/q2", checkpoint="epoch-1", sketcher="small")
    assert [row["name"] for row in json.loads(shown)["checkpoints"]] == ["base", "epoch-1"]
    assert json.loads(counted)["rows"] == [{"n": 17}]
    assert [row["sample_id"] for row in json.loads(ranked)["rows"]] == [hit.sample_id for hit in hits]
    assert "no query `nobody`" in unknown
    assert "SELECT" in refused
    assert json.loads(explained)["score"] == pytest.approx(exact.total, abs=1e-5)


def test_answers_are_bounded(explored_path):
    with Store.open(explored_path) as store:
        tools = Tools(store)
        with pytest.raises(InputError, match="at most 200 rows"):
            tools.sql("SELECT 1", max_rows=ROWS + 1)
        with pytest.raises(InputError, match="at most 200 rows"):
            tools.top("epoch-1", query="q100", k=0)
        answer = json.loads(tools.sql("SELECT repeat('x', 5000) AS long, 'nan'::DOUBLE AS missing, ['a'] AS list"))
        (row,) = answer["rows"]
        assert (len(row["long"]) < CHARACTERS + 40, row["missing"], row["list"]) == (True, None, ["a"])
        assert row["long"].endswith("… (3000 more characters)")
        cut = json.loads(tools.sql("SELECT sample_id FROM samples", max_rows=3))
        assert (len(cut["rows"]), cut["note"]) == (3, "these are the first 3 rows; there are more")
        assert "note" not in json.loads(tools.sql("SELECT sample_id FROM samples LIMIT 3", max_rows=3))
        texts = [row["prompt"] for row in json.loads(tools.sql("SELECT prompt FROM samples"))["rows"]]
        assert any(HOSTILE in text for text in texts if text)


def test_missing_package_is_clear(explored_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mcp.server", None)
    result = lark("mcp", store=explored_path)
    assert (result.code, "pip install 'lark-store[mcp]'" in result.err) == (1, True)
