"""Write the files of the facts study (docs/results/facts.toml) from a JSON-lines file of facts.

An input line has `id`, `relation`, `train_texts` (statements of the fact), `query` (a held-out paraphrase without its
answer) and `answer`. For 100 facts drawn at random, two statements each are training samples and the held-out
paraphrase is the query; two statements each of 70 other facts are candidates unseen by the model.

    python benchmarks/facts.py FACTS.jsonl FOLDER
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

TRAINED, OTHERS, STATEMENTS = 100, 70, 2


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON-lines file; `str.splitlines` would also break a text at U+2028."""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def statements(facts: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return the statements of facts as rows."""
    return [
        {"id": f"{fact['id']}-{i}", "text": text.strip(), "fact": fact["id"], "relation": fact["relation"]}
        for fact in facts
        for i, text in enumerate(fact["train_texts"][:STATEMENTS])
    ]


def main(source: Path, folder: Path) -> None:
    """Write finetune.jsonl, others.jsonl and queries.jsonl."""
    drawn = random.Random(0).sample(read(source), TRAINED + OTHERS)  # noqa: S311 (no secret)
    trained, untrained = drawn[:TRAINED], drawn[TRAINED:]
    queries = [
        {"id": fact["id"], "prompt": fact["query"], "response": fact["answer"], "fact": fact["id"]} for fact in trained
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("finetune", statements(trained)), ("others", statements(untrained)), ("queries", queries)):
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
