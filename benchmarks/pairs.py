"""Write terms and their identifiers as benchmarks/truth.py reads facts.

A line of the input has `id`, `text` (the one statement), `source` (the ontology), `query` (asks for the identifier by a
synonym of the term) and `answer`. Pairs without a synonym are left out: their query has the statement's own words.

    python benchmarks/pairs.py ONTOLOGY_PAIRS.jsonl FACTS.jsonl
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from facts import read


def main(source: Path, target: Path) -> None:
    """Write the pairs that have a query of other words."""
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
