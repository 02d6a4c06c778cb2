"""Stores to measure queries on: real gradients of a small model, and more rows made from them.

    python benchmarks/stores.py real OUT --queries Q.jsonl --texts A.jsonl B.jsonl …   # trains a model, ingests
    python benchmarks/stores.py synthetic OUT --from REAL --rows 100000                # rows mixed from REAL's
    python benchmarks/stores.py subset OUT --from REAL --rows 1000                     # some of REAL's own rows
    python benchmarks/stores.py describe STORE                                         # what the vectors look like

`real` takes text files as `source add` does. It trains a tokenizer and a small Llama on them for a moment, so that the
gradients are not those of a random net, and ingests every text as `raw`, `chatml` and `text` (raw, the loss on all
tokens) until there are `--rows` rows. The model stays beside the store, in OUT.model.

A row of `synthetic` is wa + (1 − w)b of two rows of one source and variant, w uniform, filled up to norm 1 with the
coordinates of a third whose signs are drawn anew: as heavy-tailed as the real ones, in the same bins, orthogonal to
everything. So cosines within a group stay about as large as they were. Queries are real everywhere: the sources
`queries-1`, `queries-16`, `queries-64` and so on hold the first of them.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is fetched

import numpy as np
import torch
from sqlalchemy import select

from lark_store import Store
from lark_store.ingest import ledger
from lark_store.ingest.gradients import Sketch
from lark_store.ingest.ranks import Ranks
from lark_store.ingest.variants import Tokens
from lark_store.ingest.writer import SketchWriter
from lark_store.query.groups import committed_groups
from lark_store.schema.catalog import Checkpoint, FormatVariant, Sketcher, Source
from lark_store.schema.database import find
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lark_store.query.groups import Group

CHECKPOINT = "trained"
SKETCHER = "lark"
VARIANTS = ("raw", "chatml", "text")
QUERY_COUNTS = (1, 16, 64, 500)
CONTEXT = 1024
COLUMNS = ("sample_id", "n_tokens", "n_loss_tokens", "loss", "grad_norm")
CHATML = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"


@dataclass(frozen=True)
class Rows:
    """Rows of one group: the scalars by column (N each), and `vectors` (N, K) as stored, of norm √K."""

    scalars: dict[str, list[Any]]
    vectors: np.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.vectors)

    def only(self, chosen: list[int]) -> Rows:
        """Return some of the rows."""
        some = {name: [values[i] for i in chosen] for name, values in self.scalars.items()}
        return Rows(some, self.vectors[chosen])


def write(store: Store, like: Group, source: str, blocks: Iterable[Rows], recipe: dict[str, Any]) -> None:
    """Write rows as an ingest does, through its own writer: the same columns, commits, files and indices."""
    db = store._db  # noqa: SLF001 - there is no public way to write vectors that no model made
    with db.session() as session:
        kinds = {"sketcher": Sketcher, "checkpoint": Checkpoint, "variant": FormatVariant}
        ids = {f"{k}_id": find(session, kind, getattr(like, k).name).id for k, kind in kinds.items()}
        ids["source_id"] = find(session, Source, source).id
        sketcher = find(session, Sketcher, like.sketcher.name)
    how = {"recipe": recipe, "versions": ledger.versions(), "device": "made, not sketched"}
    run = ledger.begin(db, {"fingerprint": like.fingerprint, **ids}, how, 0)
    names = {"checkpoint": like.checkpoint.name, "source": source, "variant": like.variant.name}
    writer = SketchWriter(db, run, like.fingerprint, sketcher, names, Ranks())
    start = time.perf_counter()
    for block in blocks:
        for row, vector in enumerate(block.vectors):
            sample_id, n_tokens, n_loss, loss, norm = (block.scalars[name][row] for name in COLUMNS)
            tokens = Tokens([0] * n_tokens, [i < n_loss for i in range(n_tokens)], "text")
            writer.add(sample_id, tokens, Sketch(torch.from_numpy(vector).float(), norm, loss))
    writer.finish("done", time.perf_counter() - start)


def groups_of(store: Store) -> list[Group]:
    """Return the store's groups of sketches, queries among them."""
    with store._db.session() as session:  # noqa: SLF001 - a benchmark looks inside
        return committed_groups(session, find(session, Sketcher, SKETCHER), find(session, Checkpoint, CHECKPOINT))


def read(store: Store, group: Group) -> Rows:
    """Read a group whole."""
    scalars: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    parts = []
    for batch in store._db.vectors.scan(group.table, [*COLUMNS, "vector"], group.filter, 64):  # noqa: SLF001
        for name in COLUMNS:
            scalars[name] += batch.column(name).to_pylist()
        column = batch.column("vector")
        parts.append(column.flatten().to_numpy(zero_copy_only=True).reshape(-1, column.type.list_size))
    return Rows(scalars, np.concatenate(parts))


# --- real rows -----------------------------------------------------------------------------------------------------


def lines_of(path: Path) -> list[str]:
    """Return a file's lines, each with its end; a text may hold other line breaks."""
    return [f"{line}\n" for line in path.read_text(encoding="utf-8").split("\n") if line]


def read_texts(paths: list[Path]) -> list[str]:
    """Return what the files say, a string per row."""
    found = []
    for path in paths:
        for line in lines_of(path):
            row = json.loads(line)
            parts = [row.get(name) for name in ("prompt", "question", "context", "response", "answer", "text")]
            found.append("\n".join(part for part in parts if part))
    return found


def save_tokenizer(folder: Path, texts: list[str], vocabulary: int) -> Any:
    """Train a byte-level BPE tokenizer with a ChatML template, save it and return it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=marks, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=marks[0], eos_token=marks[1], pad_token=marks[1]
    )
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
    return fast


def train(folder: Path, texts: list[str], options: argparse.Namespace) -> None:
    """Train a small Llama on the texts, in windows of 128 tokens, and save it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = save_tokenizer(folder, texts, options.vocabulary)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=options.hidden, intermediate_size=options.hidden * 8 // 3,
        num_hidden_layers=options.layers, num_attention_heads=options.hidden // 32,
        max_position_embeddings=CONTEXT, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    stream = torch.tensor([i for text in texts for i in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)])
    windows = stream[: len(stream) // 128 * 128].view(-1, 128)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, options.steps)
    for step in range(options.steps):
        batch = windows[torch.randint(len(windows), (16,))]
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == options.steps - 1:
            print(f"step {step}: {loss.item():.3f} nats", flush=True)
    model.eval().save_pretrained(folder)


def counts(n: int) -> list[int]:
    """Return how many queries each source of queries holds."""
    return [*(c for c in QUERY_COUNTS if c < n), n]


def make_real(options: argparse.Namespace) -> None:
    """Train, add sources until there are enough rows, ingest; run again after a kill, it goes on."""
    model = options.out.with_name(f"{options.out.name}.model")
    if not (model / "config.json").is_file():
        train(model, read_texts([*options.texts, options.queries]), options)
    with Store.open(options.out) if options.out.exists() else Store.create(options.out) as store:
        store.checkpoint_add(CHECKPOINT, model)
        store.variant_add("text", template="raw", targets="text")
        left, sources = options.rows // len(VARIANTS), []
        with tempfile.TemporaryDirectory() as folder:
            for path in options.texts:
                lines = lines_of(path)[:left]
                if lines:
                    part = Path(folder) / path.name
                    part.write_text("".join(lines), encoding="utf-8")
                    added = store.source_add(path.stem, part, stage="pretrain")
                    left -= added.n_added + added.n_existing
                    sources.append(path.stem)
            lines = lines_of(options.queries)
            asked = [f"queries-{n}" for n in counts(len(lines))]
            for name, n in zip(asked, counts(len(lines)), strict=True):
                part = Path(folder) / f"{name}.jsonl"
                part.write_text("".join(lines[:n]), encoding="utf-8")
                store.source_add(name, part, stage="query")
        for names, variants in ((asked, ["chatml"]), (sources, list(VARIANTS))):
            report = store.ingest([CHECKPOINT], names, variants, batch_tokens=options.batch_tokens)
            print(report.units, flush=True)
    describe(options)


# --- rows made from others -----------------------------------------------------------------------------------------


def spread(total: int, sizes: list[int]) -> list[int]:
    """Share `total` out in proportion to `sizes`, exactly."""
    ends = [round(total * end / sum(sizes)) for end in itertools.accumulate(sizes)]
    return [end - start for start, end in itertools.pairwise([0, *ends])]


def evenly(rows: Rows, n: int) -> Rows:
    """Return n of the rows, evenly spaced."""
    if n > len(rows):
        raise SystemExit(f"a group of {len(rows)} rows has not {n}\n\nhint: `synthetic` makes more rows than there are")
    return rows.only([i * len(rows) // n for i in range(n)])


def mixed(rows: Rows, n: int, source: str, generator: np.random.Generator) -> Iterator[Rows]:
    """Yield n rows mixed from a group's, in blocks; see the top of the file."""
    k, names = rows.vectors.shape[1], names_of(source, n)
    for start in range(0, n, 64):
        size = min(64, n - start)
        i, j, m = generator.integers(len(rows), size=(3, size))
        a, b, c = (torch.from_numpy(rows.vectors[pick]).float() * k**-0.5 for pick in (i, j, m))
        w = torch.from_numpy(generator.random((size, 1), dtype=np.float32))
        mix = w * a + (1 - w) * b
        bits = np.frombuffer(generator.bytes(size * k // 8), np.uint8)
        signs = torch.from_numpy(np.unpackbits(bits)).view(size, k).float().mul_(2).sub_(1)
        mix += (1 - mix.square().sum(1, keepdim=True)).clamp(min=0).sqrt() * c * signs
        mix *= k**0.5 / mix.norm(dim=1, keepdim=True)
        scalars = {name: [rows.scalars[name][at] for at in i] for name in COLUMNS}
        scalars["sample_id"] = names[start : start + size]
        yield Rows(scalars, mix.to(torch.float16).numpy() if rows.vectors.dtype == np.float16 else mix.numpy())


def names_of(source: str, n: int) -> list[str]:
    """Return the ids of n made-up rows."""
    return [f"{source}-{number:07d}" for number in range(n)]


def add_samples(store: Store, name: str, samples: Iterable[dict[str, Any]], stage: str) -> None:
    """Add a source of these samples."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.jsonl"
        path.write_text("".join(f"{json.dumps(sample)}\n" for sample in samples), encoding="utf-8")
        store.source_add(name, path, stage=stage)


def samples_of(store: Store, source: str, ids: list[str]) -> list[dict[str, Any]]:
    """Read samples as they were added."""
    columns = ["sample_id", "prompt", "response", "text"]
    found = store._db.vectors.read("samples", columns, where(source=source))  # noqa: SLF001 - a benchmark looks inside
    wanted = set(ids)
    return [{k: v for k, v in row.items() if v is not None} for row in found.to_dicts() if row["sample_id"] in wanted]


def make_from(options: argparse.Namespace) -> None:
    """Make a store of `--rows` rows from another: mixed anew, or some of them as they are."""
    synthetic = options.what == "synthetic"
    with Store.open(options.source) as real, Store.create(options.out) as out:
        groups = groups_of(real)
        _copy_names(real, out, groups)
        wanted = spread(options.rows, [_size(real, g) if g.source.stage != "query" else 0 for g in groups])
        for number, (group, n) in enumerate(zip(groups, wanted, strict=True)):
            rows = read(real, group)
            name = group.source.name
            if synthetic and group.source.stage != "query":
                made, ids = "mixed", names_of(name, n)
                samples = [{"sample_id": each, "text": f"row {each} of {name}"} for each in ids]
                blocks = mixed(rows, n, name, np.random.default_rng([options.seed, number]))
            else:
                some = rows if group.source.stage == "query" else evenly(rows, n)
                made, ids, blocks = "copied", some.scalars["sample_id"], iter([some])
                samples = samples_of(real, name, ids)
            add_samples(out, name, samples, group.source.stage)
            write(out, group, name, blocks, {"benchmark": made, "rows": len(ids)})
            print(f"{name} · {group.variant.name}: {len(ids)} rows {made}", flush=True)
    describe(options)


def _size(store: Store, group: Group) -> int:
    return int(store._db.vectors.table(group.table).count_rows(group.filter))  # noqa: SLF001 - a benchmark looks inside


def _copy_names(real: Store, out: Store, groups: list[Group]) -> None:
    """Add the checkpoint, the variants and the sketcher of another store."""
    with real._db.session() as session:  # noqa: SLF001 - a benchmark looks inside
        checkpoint = find(session, Checkpoint, CHECKPOINT)
        variants = list(session.scalars(select(FormatVariant)))
    out.checkpoint_add(CHECKPOINT, checkpoint.path)
    for variant in variants:
        out.variant_add(variant.name, template=variant.template, targets=variant.targets, max_length=variant.max_length)
    by = groups[0].sketcher
    out.sketcher_add(by.name, k=by.k, seed=by.seed, dtype=by.dtype, parameters=by.parameters, exclude=by.exclude)


# --- what they look like -------------------------------------------------------------------------------------------


def describe(options: argparse.Namespace) -> None:
    """Print, group by group, how alike the rows are, how heavy their tails, and how near the queries come."""
    with Store.open(options.out) as store:
        groups = groups_of(store)
        asked = max((g for g in groups if g.source.stage == "query"), key=lambda g: _size(store, g))
        queries = _unit(read(store, asked).vectors[:64])
        print("| group | rows | cosine within | energy in 1% of bins | best cosine with a query | 10th |")
        print("|---|---|---|---|---|---|")
        total = 0
        for group in groups:
            rows = read(store, group).vectors
            total += len(rows) if group.source.stage != "query" else 0
            some = _unit(rows[:: max(1, len(rows) // 200)])
            among = some @ some.T
            alike = (among.sum() - among.trace()) / max(1, len(some) * (len(some) - 1))
            energy = some.square().sort(dim=1, descending=True).values[:, : some.shape[1] // 100].sum(1).mean()
            scores = [queries @ _unit(rows[start : start + 1024]).T for start in range(0, len(rows), 1024)]
            best = torch.cat(scores, dim=1).topk(min(10, len(rows)), dim=1).values.mean(0)
            cells = (alike.item(), energy.item(), best[0].item(), best[-1].item())
            name = f"{group.source.name} · {group.variant.name}"
            print(f"| {name} | {len(rows)} | {' | '.join(f'{cell:.3f}' for cell in cells)} |", flush=True)
    print(f"\n{total} rows and the queries\n")


def _unit(vectors: np.ndarray[Any, Any]) -> torch.Tensor:
    rows = torch.from_numpy(vectors).float()
    return rows.div_(rows.norm(dim=1, keepdim=True))


def main() -> None:
    """Make or describe a store."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_subparsers(dest="what", required=True)
    real = kinds.add_parser("real")
    real.add_argument("out", type=Path, help="the store to make")
    real.add_argument("--texts", type=Path, nargs="+", required=True, help="files of samples (.jsonl)")
    real.add_argument("--queries", type=Path, required=True, help="a file of queries (.jsonl)")
    real.add_argument("--rows", type=int, default=15_000)
    real.add_argument("--vocabulary", type=int, default=8192)
    real.add_argument("--hidden", type=int, default=128)
    real.add_argument("--layers", type=int, default=4)
    real.add_argument("--steps", type=int, default=300, help="of training, 16 × 128 tokens each")
    real.add_argument("--batch-tokens", type=int)
    for name in ("synthetic", "subset"):
        other = kinds.add_parser(name)
        other.add_argument("out", type=Path, help="the store to make")
        other.add_argument("--from", dest="source", type=Path, required=True, help="a store made by `real`")
        other.add_argument("--rows", type=int, required=True)
        other.add_argument("--seed", type=int, default=0)
    kinds.add_parser("describe").add_argument("out", type=Path, help="a store")
    options = parser.parse_args()
    if options.what == "real":
        make_real(options)
    elif options.what == "describe":
        describe(options)
    else:
        make_from(options)


if __name__ == "__main__":
    main()
