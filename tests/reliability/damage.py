"""Damage at rest: a store with a file of every kind, and ways to damage each file or value of it."""

from __future__ import annotations

import os
import random
import shutil
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from helpers.checkpoints import save_checkpoint
from helpers.texts import qa_rows, text_rows, write_jsonl

from lark_store import Store
from lark_store.schema.checksums import with_checksums

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

CHECKPOINTS = ["base", "tuned"]
EMBEDDINGS = "embeddings_0123456789abcdef"


def make_store(folder: Path) -> Path:
    """Make a small store with a file of each kind: several versions, deletions, a snapshot, factors, embeddings."""
    path = folder / "lark.store"
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    with Store.create(path) as store:
        for number, name in enumerate(CHECKPOINTS):
            model = save_checkpoint(folder / name, seed=number, **shape)
            facts = {"accuracy": 0.5 + number / 8}
            store.checkpoint_add(name, model, epoch=number, learning_rate=1e-3, step=7 * number, metrics=facts)
        files = {
            "finetune": write_jsonl(folder / "finetune.jsonl", [row | {"topic": row["id"]} for row in qa_rows(5)]),
            "test": write_jsonl(folder / "test.jsonl", qa_rows(3, start=100)),
            "songs": write_jsonl(folder / "songs.jsonl", text_rows(6)),
            "more": write_jsonl(folder / "more.jsonl", text_rows(8)),
        }
        store.source_add("finetune", files["finetune"], stage="finetune", domain="medical")
        store.source_add("test", files["test"], stage="query")
        store.source_add("songs", files["songs"], stage="pretrain", domain="entertainment")
        store.sketcher_add("small", k=256)
        store.sketcher_add("corrected", k=256, correction="adam")
        score(store)
        _fail(store, folder)
        store.snapshot_create("then")
        store.source_add("songs", files["more"], stage="pretrain", domain="entertainment")
        store.sample_remove("songs", ["sea-1"])
        store.correction_fit("base", kind="adam", samples=4)
        _embed(store)
        score(store)
        store.index_build("small")
        store.study_keep("facts", recipe={"seed": 1}, environment={"device": "cpu"}, hashes={"table": "0" * 64})
    return path


def score(store: Store) -> None:
    """Ingest and score everything that is missing."""
    store.ingest(CHECKPOINTS, ["finetune", "test"], ["chatml"], sketcher="small")
    store.ingest(CHECKPOINTS, ["songs"], ["raw", "chatml"], sketcher="small")
    if "adam" in store.sql("SELECT DISTINCT kind FROM corrections")["kind"]:
        store.ingest(["base"], ["finetune"], ["chatml"], sketcher="corrected")
    store.attribute(CHECKPOINTS, queries="test", sketcher="small", hits=4)
    store.attribute(CHECKPOINTS, queries="test", sketcher="small", method="dot", over_checkpoints="sum", hits=4)


def _fail(store: Store, folder: Path) -> None:
    """Ingest a sample that fails: its target is cut off."""
    odd = [{"id": "long", "prompt": "why?" * 50, "response": "because"}, {"id": "ok", "prompt": "a", "response": "b"}]
    store.source_add("odd", write_jsonl(folder / "odd.jsonl", odd), stage="finetune")
    store.variant_add("short", template="chatml", max_length=64)
    store.ingest(["base"], ["odd"], ["short"], sketcher="small")


def _embed(store: Store) -> None:
    """Store embeddings as a sentence encoder would."""
    vectors = store._db.vectors
    rows = vectors.read("samples", ["source", "sample_id", "content_sha256"])
    drawn = np.random.default_rng(0).normal(size=(len(rows), 8)).astype(np.float32)
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    table = vectors.embeddings(EMBEDDINGS, 8)
    kind = table.schema.field("vector").type
    array = pa.FixedSizeListArray.from_arrays(pa.array(drawn.reshape(-1)), type=kind)
    result = rows.to_arrow().append_column(table.schema.field("vector"), array)
    vectors.append(table, with_checksums(result).cast(table.schema))
    vectors.refresh_indices(table)


# --- the files -----------------------------------------------------------------------------------------------------

_FOLDERS = {
    "data": "data file",
    "_indices": "index page",
    "_versions": "manifest",
    "_transactions": "transaction",
    "_deletions": "deletion file",
    "_refs": "tag",
}


def kind_of(path: Path) -> str | None:
    """Return the kind of a file, given below the store; None for those that may be lost (an empty lock)."""
    parts = path.parts
    if parts[0] == "vectors" and len(parts) > 2 and parts[1].endswith(".lance"):
        return _FOLDERS.get(parts[2], "other Lance file")
    if parts[0] == "vectors":
        return "factors" if parts[1] == "corrections" else "other Lance file"
    if parts[0] == "snapshots":
        return "snapshot's catalog" if path.suffix == ".sqlite" else "snapshot's record"
    if parts[0] == "locks":
        return None
    return {"catalog.sqlite": "catalog", "catalog.sqlite-wal": "log", "catalog.sqlite-shm": "log"}.get(parts[0])


def files_of(store: Path) -> dict[str, list[Path]]:
    """Return the files of a store by kind; of the manifests the newest of each table are a kind of their own."""
    results: dict[str, list[Path]] = {}
    for path in sorted(store.rglob("*")):
        kind = kind_of(path.relative_to(store)) if path.is_file() else None
        if kind == "manifest" and path == newest_manifest(path.parent):
            kind = "newest manifest"
        if kind:
            results.setdefault(kind, []).append(path.relative_to(store))
    return results


def newest_manifest(folder: Path) -> Path:
    """Return the newest manifest in a folder `_versions`: Lance names them so that the newest sorts first."""
    return min(folder.glob("*.manifest"))


# --- the damage ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """One damage: the kind of file, the manner, the place, and the function which damages a store's folder."""

    kind: str
    how: str
    where: str
    act: Callable[[Path], None]


def _rewritten(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    """Return a function which rewrites a file: files of a copied store may be links to the original's."""

    def act(path: Path) -> None:
        content = change(path.read_bytes())
        path.unlink()
        path.write_bytes(content)

    return act


def _flipped(place: float, bit: int) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        offset = int(place * len(content))
        return content[:offset] + bytes([content[offset] ^ (1 << bit)]) + content[offset + 1 :] if content else content

    return change


def _older(path: Path) -> None:
    """Put the next file of the same folder and ending in the place of a file, as a wrong restore would."""
    others = sorted(p for p in path.parent.iterdir() if p.suffix == path.suffix and p != path)
    if others:
        content = others[0].read_bytes()
        path.unlink()
        path.write_bytes(content)


def _zeroed(place: float) -> Callable[[bytes], bytes]:
    def change(content: bytes) -> bytes:
        offset = int(place * len(content)) // 512 * 512
        return content[:offset] + bytes(len(content[offset : offset + 512])) + content[offset + 512 :]

    return change


def ways(rng: random.Random) -> dict[str, Callable[[Path], None]]:
    """Return the ways to damage a file; places are drawn."""
    return {
        "emptied": _rewritten(lambda _: b""),
        "cut in half": _rewritten(lambda content: content[: len(content) // 2]),
        "a byte short": _rewritten(lambda content: content[:-1]),
        "a bit flipped": _rewritten(_flipped(rng.random(), rng.randrange(8))),
        "512 bytes zeroed": _rewritten(_zeroed(rng.random())),
        "removed": Path.unlink,
        "an older file's content": _older,
    }


def file_damages(store: Path, rng: random.Random, *, flips: int = 1) -> Iterator[Damage]:
    """Yield a damage of each kind and manner, in a random file; bit flips `flips` times."""
    for kind, paths in files_of(store).items():
        for manner in ways(rng):
            if (kind, manner) == ("snapshot's record", "removed"):
                continue  # that is how a snapshot is removed
            for _ in range(flips if manner == "a bit flipped" else 1):
                path, way = rng.choice(paths), ways(rng)[manner]
                yield Damage(kind, manner, str(path), lambda root, p=path, w=way: w(root / p))  # type: ignore[misc]
    for table in sorted((store / "vectors").glob("*.lance")):
        for folder in sorted(path for path in table.iterdir() if path.is_dir()):
            below = folder.relative_to(store)
            kind = _FOLDERS.get(folder.name, "other Lance file")
            yield Damage(kind, "folder removed", str(below), lambda root, p=below: shutil.rmtree(root / p))  # type: ignore[misc]
        if table.name.startswith("embeddings_"):
            continue  # such a table may be removed: `ingest` makes it again where it needs one
        below = table.relative_to(store)
        yield Damage("table", "folder removed", str(below), lambda root, p=below: shutil.rmtree(root / p))  # type: ignore[misc]


# Values of the catalog which lark-store never writes, and plausible changed values.
STATEMENTS = {
    "a recipe that is not JSON": "UPDATE ingest_run SET recipe = '{\"precision\": ' WHERE id = 2",
    "a recipe that is a list": "UPDATE ingest_run SET recipe = '[1]' WHERE id = 2",
    "a recipe without its keys": "UPDATE score_run SET recipe = '{}' WHERE id = 2",
    "a score's recipe that is not JSON": "UPDATE score_run SET recipe = 'x' WHERE id = 2",
    "versions that are not JSON": "UPDATE score_run SET versions = '' WHERE id = 1",
    "columns that are not JSON": "UPDATE source SET columns = 'null]' WHERE name = 'songs'",
    "a time that is none": "UPDATE checkpoint SET created_at = '2026-13-01T00:00:00+00:00' WHERE name = 'base'",
    "a time of a run that is none": "UPDATE ingest_run SET started_at = 'yesterday' WHERE id = 1",
    "a store's time that is none": "UPDATE store_meta SET created_at = 'then'",
    "an index's time that is none": "UPDATE search_index SET built_at = '0'",
    "a time without its zone": "UPDATE score_run SET finished_at = '2026-01-01T00:00:00' WHERE id = 1",
    "a time of an upgrade": "UPDATE correction SET created_at = ''",
    "a correction's recipe": "UPDATE correction SET recipe = '{'",
    "a study's hashes": "UPDATE study SET hashes = '{'",
    "a negative count": "UPDATE ingest_run SET n_sketched = -3 WHERE id = 1",
    "a negative duration": "UPDATE ingest_run SET seconds = -5.0 WHERE id = 1",
    "a run that ended before it began": "UPDATE ingest_run SET finished_at = '1999-01-01T00:00:00.000000+00:00'",
    "another learning rate": "UPDATE checkpoint SET learning_rate = 3e-3 WHERE name = 'base'",
    "another metric": "UPDATE checkpoint_metric SET value = 0.75 WHERE name = 'accuracy'",
    "another domain": "UPDATE source SET domain = 'entertainmenu' WHERE name = 'songs'",
    "another stage": "UPDATE source SET stage = 'pretrain' WHERE name = 'finetune'",
    "another name": "UPDATE source SET name = 'sonhs' WHERE name = 'songs'",
    "another fingerprint": "UPDATE ingest_run SET fingerprint = '0' || substr(fingerprint, 2) WHERE id = 1",
    "another status": "UPDATE score_run SET status = 'superseded' WHERE id = 3",
    "another k": "UPDATE sketcher SET k = 257 WHERE name = 'small'",
    "another default": "UPDATE store_meta SET sketcher = 'smell'",
    "another hash": "UPDATE checkpoint SET weights_sha256 = 'f' || substr(weights_sha256, 2)",
    "another count of samples": "UPDATE score_run SET n_samples = n_samples + 1 WHERE id = 3",
    "no row of the store": "DELETE FROM store_meta",
    "a run that is gone": "DELETE FROM ingest_run WHERE id = 2",
}


def value_damages() -> Iterator[Damage]:
    """Yield the damages to values of the catalog."""
    for manner, statement in STATEMENTS.items():
        yield Damage("catalog's value", manner, statement, lambda root, s=statement: _execute(root, s))  # type: ignore[misc]


def _execute(root: Path, statement: str) -> None:
    with closing(sqlite3.connect(root / "catalog.sqlite", isolation_level=None)) as catalog:
        catalog.execute(statement)


def log_damages(rng: random.Random) -> Iterator[Damage]:
    """Yield the damages to a write-ahead log that holds a commit which is in no page yet."""
    for manner, way in ways(rng).items():
        for name in ("catalog.sqlite-wal", "catalog.sqlite-shm"):
            yield Damage("log", manner, name, lambda root, n=name, w=way: _log(root, n, w))  # type: ignore[misc]


def _log(root: Path, name: str, way: Callable[[Path], None]) -> None:
    """Leave a log as a killed process does, and damage it. The commit in it changes nothing."""
    kept = root.with_name(f"{root.name}.log")
    with closing(sqlite3.connect(root / "catalog.sqlite", isolation_level=None)) as catalog:
        catalog.execute("UPDATE source SET domain = domain")
        shutil.copytree(root, kept, ignore=shutil.ignore_patterns("vectors", "locks", "snapshots"))
    for path in kept.glob("catalog.sqlite*"):
        shutil.copy(path, root / path.name)
    shutil.rmtree(kept)
    way(root / name)


def note_damages() -> Iterator[Damage]:
    """Yield damaged notes of work."""
    for manner, text in {"emptied": "", "not JSON": "{", "a list": "[]", "without its keys": "{}"}.items():
        yield Damage("lock note", manner, "locks/ingest-dead.json", lambda root, t=text: _note(root, t))  # type: ignore[misc]


def _note(root: Path, text: str) -> None:
    (root / "locks").mkdir(exist_ok=True)
    (root / "locks" / "ingest-dead.json").write_text(text, encoding="utf-8")


def damages(store: Path, seed: int, *, flips: int = 1) -> list[Damage]:
    """Return damages of every kind, drawn by a seed."""
    rng = random.Random(seed)  # noqa: S311  no secret
    results = [*file_damages(store, rng, flips=flips), *value_damages(), *log_damages(rng), *note_damages()]
    rng.shuffle(results)
    return results


def linked(source: Path, target: Path) -> Path:
    """Copy a store; Lance's files, which never change, as hard links."""

    def copy(old: str, new: str) -> None:
        if f"{os.sep}vectors{os.sep}" in old:
            Path(new).hardlink_to(old)
        else:
            shutil.copy2(old, new)

    shutil.copytree(source, target, copy_function=copy, ignore=shutil.ignore_patterns("locks"))
    return target
