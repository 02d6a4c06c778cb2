"""Synthetic domains: deterministic statements of invented words, by role and draw."""

from __future__ import annotations

import json
import random
import re

import pytest
from helpers.program import lark

from lark_store import make_domain
from lark_store.domains import DOMAINS
from lark_store.domains.templates import TRUE_SENTENCES, UNRELATED
from lark_store.domains.words import FIRST, LATER, invented_words
from lark_store.errors import InputError, NameUnknownError


@pytest.mark.parametrize("name", DOMAINS)
def test_each_draw_has_each_role_once(name):
    rows = make_domain(name, draws=4, seed=3)
    roles = list(DOMAINS[name].statements)
    assert [(row["draw"], row["role"]) for row in rows] == [(draw, role) for draw in range(4) for role in roles]
    assert len({row["sample_id"] for row in rows}) == len(rows)
    assert {row["family"] for row in rows} == {name}
    assert not [row["text"] for row in rows if re.search(r"[{}]", row["text"])]
    for row in rows:
        assert (row["text"] in TRUE_SENTENCES) == (row["role"] == UNRELATED)


@pytest.mark.parametrize("name", DOMAINS)
def test_draws_are_reproducible_and_nested_and_differ(name):
    rows = make_domain(name, draws=3, seed=5)
    assert make_domain(name, draws=3, seed=5) == rows
    assert make_domain(name, draws=1, seed=5) == rows[: len(rows) // 3]
    assert make_domain(name, draws=3, seed=6) != rows
    premise = "both_in_two"
    assert len({row["text"] for row in rows if row["role"] == premise}) == 3


@pytest.mark.parametrize("name", DOMAINS)
def test_contrasts_name_statements(name):
    roles = DOMAINS[name].statements
    named = {role for each in DOMAINS[name].contrasts for role in (*each.larger, *each.smaller)}
    assert named <= roles.keys()
    names = [each.name for each in DOMAINS[name].contrasts]
    assert len(set(names)) == len(names)
    assert not [each for each in DOMAINS[name].contrasts if each.larger == each.smaller]


def test_every_domain_asks_for_the_conclusion():
    asked = [{each.name.split(",")[0] for each in domain.contrasts} for domain in DOMAINS.values()]
    assert all("conclusion over its reversal" in names for names in asked)


def test_words_have_two_to_five_syllables():
    words = invented_words(random.Random(1), 200)  # noqa: S311
    assert len(set(words)) == 200
    pattern = re.compile(f"({'|'.join(FIRST)})({'|'.join(LATER)}){{1,4}}")
    assert [word for word in words if not pattern.fullmatch(word)] == []
    assert {len(word) for word in words} > {5, 7, 9}


def test_unknown_domain_and_no_draws_are_refused():
    with pytest.raises(NameUnknownError, match="no domain `rhombs`"):
        make_domain("rhombs")
    with pytest.raises(InputError, match="the number of draws must be at least 1, not 0"):
        make_domain("squares", draws=0)


def test_the_command_writes_the_rows(tmp_path, store):
    path = tmp_path / "squares.jsonl"
    result = lark("domain make squares --draws 2 --seed 4 -o", path)
    assert (result.code, result.out) == (0, "")
    assert "wrote 18 statements of 2 draws" in result.err
    rows = make_domain("squares", draws=2, seed=4)
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == rows
    store.source_add("squares", path, stage="finetune")
    assert store.source_add("squares", rows, stage="finetune").n_existing == 18
    stored = store.sql("select text, meta->>'role' as role, (meta->>'draw')::int as draw from samples "
                       "where source = 'squares' order by sample_id")  # fmt: skip
    assert sorted(stored.rows()) == sorted((row["text"], row["role"], row["draw"]) for row in rows)


def test_an_unwritable_file_is_an_error(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    result = lark("domain make squares -o", tmp_path / "file" / "squares.jsonl")
    assert result.code == 1
    assert result.err.startswith("error: `")
