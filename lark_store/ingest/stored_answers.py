"""The answers that checkpoints predicted, as stored with the sketches."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from lark_store.schema.table_schemas import ANSWERS, SKETCH_PREFIX
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from lark_store.schema.database import Database


def stored_answers(db: Database, names: dict[str, str]) -> dict[str, list[int]]:
    """Return the tokens of each sample's stored answer, by any sketcher.

    `names` are values of `checkpoint`, `source`, `variant` and maybe `sample_id`.
    """
    answers: dict[str, list[int]] = {}
    for table in db.vectors.table_names():
        if table.startswith(SKETCH_PREFIX) and set(ANSWERS) <= set(db.vectors.table(table).schema.names):
            condition = f"{where(**names)} AND answer_tokens IS NOT NULL"
            rows = db.vectors.read(table, ["sample_id", "answer_tokens"], condition)
            answers |= {sample_id: json.loads(tokens) for sample_id, tokens in rows.iter_rows()}
    return answers
