"""Stores for query benchmarks: real gradients of a small model, and rows synthesised from them.

    python benchmarks/stores.py real OUT --queries Q.jsonl --texts A.jsonl B.jsonl …   # trains a model, ingests
    python benchmarks/stores.py synthetic OUT --from REAL --rows 100000                # rows mixed from REAL's
    python benchmarks/stores.py subset OUT --from REAL --rows 1000                     # some of REAL's rows
    python benchmarks/stores.py describe STORE                                         # statistics of the vectors

`real` takes text files like `source add`. It briefly trains a tokenizer and a small Llama on them, so that gradients
differ from those of a random net, and ingests every text as `raw`, `chatml` and `text` (raw, the loss on all tokens) up
to `--rows` rows. The model is in OUT.model.

A row of `synthetic` is wa + (1 − w)b of two rows of one source and variant, w uniform, filled up to norm 1 with the
coordinates of a third row under random signs: as heavy-tailed as the real rows, in the same bins, orthogonal to all
others. So cosines within a group keep their size. Queries are always real: the sources `queries-1`, `queries-16`,
`queries-64` and so on have the first of them.
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

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no downloads

import numpy as np
import torch
from sqlalchemy import select

from lark_store import Store
from lark_store.core.versions import versions
from lark_store.gradients.paths.hooks import Sketch
from lark_store.ingest import ingest_runs
from lark_store.ingest.distributed import Ranks
from lark_store.ingest.writer import SketchWriter
from lark_store.modeling.tokens import Tokens
from lark_store.query.select.resolve import committed_groups
from lark_store.schema.catalog import Checkpoint, FormatVariant, Sketcher, Source
from lark_store.schema.database import find
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from lark_store.query.select.resolve import Group

CHECKPOINT = "trained"
SKETCHER = "lark"
VARIANTS = ("raw", "chatml", "text")
QUERY_COUNTS = (1, 16, 64, 500)
CONTEXT = 1024
COLUMNS = ("sample_id", "n_tokens", "n_loss_tokens", "loss", "grad_norm")
CHATML = "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"


@dataclass(frozen=True)
class Rows:
    """Rows of one group: scalars by column (N each), and `vectors` (N, K) as stored, of norm √K."""

    scalars: dict[str, list[Any]]
    vectors: np.ndarray[Any, Any]

    def __len__(self) -> int:
        return len(self.vectors)

    def only(self, indices: list[int]) -> Rows:
        """Return a subset of the rows."""
        scalars = {name: [values[i] for i in indices] for name, values in self.scalars.items()}
        return Rows(scalars, self.vectors[indices])


def write(store: Store, like: Group, source: str, blocks: Iterable[Rows], recipe: dict[str, Any]) -> None:
    """Write rows through ingest's writer: the same columns, commits, files and indices."""
    db = store._db  # noqa: SLF001 - no public API writes vectors without a model
    with db.session() as session:
        kinds = {"sketcher": Sketcher, "checkpoint": Checkpoint, "variant": FormatVariant}
        ids = {f"{k}_id": find(session, kind, getattr(like, k).name).id for k, kind in kinds.items()}
        ids["source_id"] = find(session, Source, source).id
        sketcher = find(session, Sketcher, like.sketcher.name)
    run_options = {"recipe": recipe, "versions": versions(), "device": "made, not sketched"}
    run = ingest_runs.begin(db, {"fingerprint": like.fingerprint, **ids}, run_options, 0)
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
    """Return the store's groups of sketches, including queries."""
    with store._db.session() as session:  # noqa: SLF001 - internal access
        return committed_groups(session, find(session, Sketcher, SKETCHER), find(session, Checkpoint, CHECKPOINT))


def read(store: Store, group: Group) -> Rows:
    """Read all rows of a group."""
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
    """Return a file's lines with their ends; texts may contain other line breaks."""
    return [f"{line}\n" for line in path.read_text(encoding="utf-8").split("\n") if line]


def read_texts(paths: list[Path]) -> list[str]:
    """Return the files' texts, a string per row."""
    texts = []
    for path in paths:
        for line in lines_of(path):
            row = json.loads(line)
            parts = [row.get(name) for name in ("prompt", "question", "context", "response", "answer", "text")]
            texts.append("\n".join(part for part in parts if part))
    return texts


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
    """Return the number of queries in each source of queries."""
    return [*(c for c in QUERY_COUNTS if c < n), n]


def make_real(options: argparse.Namespace) -> None:
    """Train, add sources up to the number of rows, ingest; resumable."""
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
            query_sources = [f"queries-{n}" for n in counts(len(lines))]
            for name, n in zip(query_sources, counts(len(lines)), strict=True):
                part = Path(folder) / f"{name}.jsonl"
                part.write_text("".join(lines[:n]), encoding="utf-8")
                store.source_add(name, part, stage="query")
        for names, variants in ((query_sources, ["chatml"]), (sources, list(VARIANTS))):
            report = store.ingest([CHECKPOINT], names, variants, batch_tokens=options.batch_tokens)
            print(report.units, flush=True)
    describe(options)


# --- synthetic rows ------------------------------------------------------------------------------------------------


def spread(total: int, sizes: list[int]) -> list[int]:
    """Split `total` exactly, in proportion to `sizes`."""
    ends = [round(total * end / sum(sizes)) for end in itertools.accumulate(sizes)]
    return [end - start for start, end in itertools.pairwise([0, *ends])]


def evenly(rows: Rows, n: int) -> Rows:
    """Return n of the rows, evenly spaced."""
    if n > len(rows):
        raise SystemExit(f"a group has {len(rows)} rows, but {n} are needed\n\nhint: create more with `synthetic`")
    return rows.only([i * len(rows) // n for i in range(n)])


def mixed(rows: Rows, n: int, source: str, generator: np.random.Generator) -> Iterator[Rows]:
    """Yield blocks of n rows mixed from a group's rows; see the module's docstring."""
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
        scalars = {name: [rows.scalars[name][index] for index in i] for name in COLUMNS}
        scalars["sample_id"] = names[start : start + size]
        yield Rows(scalars, mix.to(torch.float16).numpy() if rows.vectors.dtype == np.float16 else mix.numpy())


def names_of(source: str, n: int) -> list[str]:
    """Return the ids of n synthetic rows."""
    return [f"{source}-{number:07d}" for number in range(n)]


def add_samples(store: Store, name: str, samples: Iterable[dict[str, Any]], stage: str) -> None:
    """Add a source with these samples."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.jsonl"
        path.write_text("".join(f"{json.dumps(sample)}\n" for sample in samples), encoding="utf-8")
        store.source_add(name, path, stage=stage)


def samples_of(store: Store, source: str, ids: list[str]) -> list[dict[str, Any]]:
    """Read samples as they were added."""
    columns = ["sample_id", "prompt", "response", "text"]
    rows = store._db.vectors.read("samples", columns, where(source=source))  # noqa: SLF001 - internal access
    keep = set(ids)
    return [{k: v for k, v in row.items() if v is not None} for row in rows.to_dicts() if row["sample_id"] in keep]


def make_from(options: argparse.Namespace) -> None:
    """Create a store of `--rows` rows from another one: mixed, or a subset."""
    synthetic = options.what == "synthetic"
    with Store.open(options.source) as real, Store.create(options.out) as out:
        groups = groups_of(real)
        _copy_names(real, out, groups)
        row_counts = spread(options.rows, [_size(real, g) if g.source.stage != "query" else 0 for g in groups])
        for number, (group, n) in enumerate(zip(groups, row_counts, strict=True)):
            rows = read(real, group)
            name = group.source.name
            if synthetic and group.source.stage != "query":
                origin, ids = "mixed", names_of(name, n)
                samples = [{"sample_id": sample_id, "text": f"row {sample_id} of {name}"} for sample_id in ids]
                blocks = mixed(rows, n, name, np.random.default_rng([options.seed, number]))
            else:
                selected = rows if group.source.stage == "query" else evenly(rows, n)
                origin, ids, blocks = "copied", selected.scalars["sample_id"], iter([selected])
                samples = samples_of(real, name, ids)
            add_samples(out, name, samples, group.source.stage)
            write(out, group, name, blocks, {"benchmark": origin, "rows": len(ids)})
            print(f"{name} · {group.variant.name}: {len(ids)} rows {origin}", flush=True)
    describe(options)


def _size(store: Store, group: Group) -> int:
    return int(store._db.vectors.table(group.table).count_rows(group.filter))  # noqa: SLF001 - internal access


def _copy_names(real: Store, out: Store, groups: list[Group]) -> None:
    """Add the checkpoint, the variants and the sketcher of another store."""
    with real._db.session() as session:  # noqa: SLF001 - internal access
        checkpoint = find(session, Checkpoint, CHECKPOINT)
        variants = list(session.scalars(select(FormatVariant)))
    out.checkpoint_add(CHECKPOINT, checkpoint.path)
    for variant in variants:
        out.variant_add(variant.name, template=variant.template, targets=variant.targets, max_length=variant.max_length)
    s = groups[0].sketcher
    out.sketcher_add(s.name, k=s.k, seed=s.seed, dtype=s.dtype, parameters=s.parameters, exclude=s.exclude)


# --- statistics ----------------------------------------------------------------------------------------------------


def describe(options: argparse.Namespace) -> None:
    """Print statistics per group: the rows' similarity, their heavy tails, and the queries' best cosines."""
    with Store.open(options.out) as store:
        groups = groups_of(store)
        largest = max((g for g in groups if g.source.stage == "query"), key=lambda g: _size(store, g))
        queries = _unit(read(store, largest).vectors[:64])
        print("| group | rows | cosine within | energy in 1% of bins | best cosine with a query | 10th |")
        print("|---|---|---|---|---|---|")
        total = 0
        for group in groups:
            rows = read(store, group).vectors
            total += len(rows) if group.source.stage != "query" else 0
            part = _unit(rows[:: max(1, len(rows) // 200)])
            among = part @ part.T
            alike = (among.sum() - among.trace()) / max(1, len(part) * (len(part) - 1))
            energy = part.square().sort(dim=1, descending=True).values[:, : part.shape[1] // 100].sum(1).mean()
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
    """Create or describe a store."""
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
        derived = kinds.add_parser(name)
        derived.add_argument("out", type=Path, help="the store to make")
        derived.add_argument("--from", dest="source", type=Path, required=True, help="a store made by `real`")
        derived.add_argument("--rows", type=int, required=True)
        derived.add_argument("--seed", type=int, default=0)
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
