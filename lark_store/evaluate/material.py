"""What an evaluation is about: queries and candidate samples as the store has them, and models of its checkpoints."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from lark_store.errors import InputError, NameUnknownError
from lark_store.ingest.sources import Sample
from lark_store.ingest.variants import Renderer, Tokens
from lark_store.schema.catalog import Checkpoint, FormatVariant

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

    from lark_store.store import Store


@dataclass(frozen=True)
class Text:
    """A sample of a source in a format variant: a query, or a candidate."""

    source: str
    variant: str
    sample: Sample

    @property
    def id(self) -> str:
        """The sample's id."""
        return self.sample.sample_id

    @property
    def whole(self) -> str:
        """The text, a prompt and its response as one, as BM25 reads it."""
        return self.sample.whole


@dataclass(frozen=True)
class Material:
    """The queries (Q) and the candidate samples (N) of an evaluation; a matrix of scores is (Q, N) in their order."""

    store: Store
    queries: list[Text]
    samples: list[Text]

    @property
    def query_ids(self) -> list[str]:
        """The queries' ids."""
        return [query.id for query in self.queries]

    def own(self, key: str) -> NDArray[np.bool_]:
        """Tell which samples have the value of metadata `key` that each query has, (Q, N) bool.

        A value that is missing or empty is nobody's.
        """
        numbers: dict[str, int] = {}

        def number(text: Text, nobody: int) -> int:
            found = text.sample.meta.get(key)
            if found is None or found == "":
                return nobody
            return numbers.setdefault(json.dumps(found, sort_keys=True), len(numbers))

        of_queries = np.array([number(query, -1) for query in self.queries])
        of_samples = np.array([number(sample, -2) for sample in self.samples])
        found: NDArray[np.bool_] = of_queries[:, None] == of_samples[None, :]
        return found


def gather(
    store: Store,
    *,
    sources: Sequence[str],
    variants: Sequence[str],
    queries: str | None,
    query_variant: str,
    max_queries: int | None = None,
    max_samples: int | None = None,
    seed: int = 0,
) -> Material:
    """Read the queries and the candidates, each source in each variant, in the order of the sources, then of the ids.

    `max_queries` takes the first; `max_samples` as many samples at random, drawn with `seed`.

    Raises
    ------
    NameUnknownError, InputError
    """
    stages = dict(store.sql("select name, stage from sources").iter_rows())
    known = set(store.sql("select name from variants")["name"])
    for what, names, there in (("source", sources, stages), ("variant", [*variants, query_variant], known)):
        for name in names:
            if name not in there:
                raise NameUnknownError.of(what, name, there, f"add it with `lark-store {what} add`")
    if not sources or not variants:
        raise InputError("an evaluation needs samples", "name a source and a variant of theirs")
    asking = queries or _only([name for name, stage in stages.items() if stage == "query"])
    if asking not in stages:
        raise NameUnknownError.of("source", asking, stages, "add it with `lark-store source add --stage query`")
    asked = [Text(asking, query_variant, sample) for sample in _samples(store, asking)][:max_queries]
    found = [
        Text(name, variant, sample) for name in sources for variant in variants for sample in _samples(store, name)
    ]
    if max_samples is not None and max_samples < len(found):
        drawn = np.random.default_rng(seed).choice(len(found), max_samples, replace=False)
        found = [found[i] for i in sorted(drawn)]
    if not asked or not found:
        raise InputError(
            f"there are {len(asked)} queries and {len(found)} samples", "an evaluation needs some of either"
        )
    return Material(store, asked, found)


def _only(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    has = ", ".join(f"`{name}`" for name in names) or "none"
    raise InputError(f"the store has {len(names)} sources of stage `query`: {has}", "name one with `--queries`")


def _samples(store: Store, source: str) -> list[Sample]:
    rows = store.sql(
        "select sample_id, prompt, response, text, label, meta from samples where source = ? order by sample_id",
        [source],
    )
    return [
        Sample(row["sample_id"], row["prompt"], row["response"], row["text"], row["label"], json.loads(row["meta"]))
        for row in rows.iter_rows(named=True)
    ]


# --- models --------------------------------------------------------------------------------------------------------


def folder_of(store: Store, checkpoint: str) -> Path:
    """Return the folder of a checkpoint whose files are those that were added.

    Raises
    ------
    NameUnknownError, CheckpointError, CheckpointChangedError
    """
    from lark_store.ingest.checkpoints import verify

    found = store.sql(
        "select name, path, revision, weights_sha256, tokenizer_sha256 from checkpoints where name = ?", [checkpoint]
    )
    if found.is_empty():
        known = store.sql("select name from checkpoints")["name"]
        raise NameUnknownError.of("checkpoint", checkpoint, known, "add it with `lark-store checkpoint add`")
    return verify(Checkpoint(**found.row(0, named=True))).folder


@dataclass(frozen=True)
class Loaded:
    """A checkpoint's model and tokenizer, loaded when they are first looked at."""

    store: Store
    folder: Path
    device: torch.device
    precision: str = "float32"

    @cached_property
    def model(self) -> Any:
        """The model, in evaluation mode."""
        from lark_store.ingest.models import load_model

        return load_model(self.folder, self.device, self.precision)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        from lark_store.ingest.models import load_tokenizer

        return load_tokenizer(self.folder)

    def tokens(self, texts: Iterable[Text]) -> list[Tokens]:
        """Render texts, each in its variant; takes no weights.

        Raises
        ------
        InputError
            One of them can't be rendered.
        """
        from lark_store.ingest.models import context_length, meta_model

        context, renderers, made = context_length(meta_model(self.folder)), {}, []
        for text in texts:
            if text.variant not in renderers:
                renderers[text.variant] = Renderer(_variant(self.store, text.variant), self.tokenizer, context)
            found = renderers[text.variant].attempt(text.sample)
            if not isinstance(found, Tokens):
                raise InputError(
                    f"`{text.id}` of `{text.source}` can't be used as `{text.variant}`: {found}",
                    "choose another variant, or leave the sample out",
                )
            made.append(found)
        return made


def _variant(store: Store, name: str) -> FormatVariant:
    found = store.sql(
        "select name, template, template_text, targets, max_length, sha256 from variants where name = ?", [name]
    )
    return FormatVariant(**found.row(0, named=True))


def load(store: Store, checkpoint: str, device: str = "auto", precision: str = "float32") -> Loaded:
    """Return the model of a checkpoint, whose files are compared with those that were added.

    Raises
    ------
    NameUnknownError, CheckpointError, CheckpointChangedError, InputError
    """
    from lark_store.ingest.gradients import pick_device

    return Loaded(store, folder_of(store, checkpoint), pick_device(device), precision)
