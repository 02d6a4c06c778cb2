"""Write terms and their identifiers as facts, for benchmarks/truth.py.

An input line has `id`, `text` (the statement), `source` (the ontology), `query` (with a synonym of the term) and
`answer` (the identifier). Pairs without a synonym are skipped: their query would repeat the statement's words.

    python benchmarks/pairs.py ONTOLOGY_PAIRS.jsonl FACTS.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from facts import read


def main(source: Path, target: Path) -> None:
    """Write the pairs with a synonym."""
    rows = [
        {
            "id": pair["id"],
            "relation": pair["source"],
            "train_texts": [pair["text"]],
            "query": pair["query"],
            "answer": pair["answer"],
        }
        for pair in read(source)
        if pair["query"] is not None
    ]
    target.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{target}: {len(rows)} rows")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
