"""Rows of small text sources, and the JSON-lines files which hold them."""

from __future__ import annotations

import json
from pathlib import Path


def write_jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def qa_rows(n: int, start: int = 0) -> list[dict[str, object]]:
    """Make questions with answers."""
    answers = ("yes", "no", "maybe")
    return [
        {
            "id": f"q{i}",
            "question": f"Is organ {i} affected?",
            "context": f"Seen in {i}.",
            "answer": answers[i % 3],
        }
        for i in range(start, start + n)
    ]


def text_rows(n: int, topic: str = "sea") -> list[dict[str, object]]:
    """Make plain texts."""
    return [
        {"id": f"{topic}-{i}", "text": f"A song about the {topic} number {i} and the night train."} for i in range(n)
    ]
