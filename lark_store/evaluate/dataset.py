"""The queries, candidate samples and models of an evaluation, read from the store."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from lark_store.errors import InputError, NameUnknownError, StoreBusyError
from lark_store.modeling.rendering import Renderer
from lark_store.modeling.sample import Sample
from lark_store.modeling.tokens import Tokens

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import torch
    from numpy.typing import NDArray

    from lark_store.modeling.checkpoints import ModelFolder
    from lark_store.modeling.predicted_answers import AnswerPrompt
    from lark_store.store import Store


@dataclass(frozen=True)
class Text:
    """A query or candidate: a sample of a source in a format variant."""

    source: str
    variant: str
    sample: Sample

    @property
    def id(self) -> str:
        """The sample's id."""
        return self.sample.sample_id

    @property
    def whole(self) -> str:
        """The full text as BM25 reads it: prompt and response joined."""
        return self.sample.whole


@dataclass(frozen=True)
class Material:
    """The queries (Q) and candidate samples (N) of an evaluation; score matrices are (Q, N) in this order."""

    store: Store
    queries: list[Text]
    samples: list[Text]

    @property
    def query_ids(self) -> list[str]:
        """The queries' ids."""
        return [query.id for query in self.queries]

    def check(self) -> None:
        """Check that the queries and samples in the store are unchanged.

        Raises
        ------
        StoreBusyError
        """
        texts = [*self.queries, *self.samples]
        for source in dict.fromkeys(text.source for text in texts):
            contents = {sample.sample_id: _contents(sample) for sample in _samples(self.store, source)}
            changed = next((t for t in texts if t.source == source and contents.get(t.id) != _contents(t.sample)), None)
            if changed is not None:
                raise StoreBusyError(
                    f"sample `{changed.id}` of `{source}` was changed or removed during the evaluation",
                    "run the evaluation again",
                )

    def own(self, key: str) -> NDArray[np.bool_]:
        """Return which samples share each query's value of the metadata `key`, (Q, N) bool.

        Missing and empty values match nothing.
        """
        numbers: dict[str, int] = {}

        def number(text: Text, nobody: int) -> int:
            value = text.sample.meta.get(key)
            if value is None or value == "":
                return nobody
            return numbers.setdefault(json.dumps(value, sort_keys=True), len(numbers))

        of_queries = np.array([number(query, -1) for query in self.queries])
        of_samples = np.array([number(sample, -2) for sample in self.samples])
        matches: NDArray[np.bool_] = of_queries[:, None] == of_samples[None, :]
        return matches


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
    """Read queries and candidates: each source in each variant, ordered by source, then by id.

    `max_queries` takes the first queries, `max_samples` a random subset of the candidates drawn with `seed`.

    Raises
    ------
    NameUnknownError, InputError
    """
    stages = dict(store.sql("select name, stage from sources").iter_rows())
    variant_names = set(store.sql("select name from variants")["name"])
    for kind, names, known in (("source", sources, stages), ("variant", [*variants, query_variant], variant_names)):
        for name in names:
            if name not in known:
                raise NameUnknownError.of(kind, name, known, f"add it with `lark-store {kind} add`")
    if not sources or not variants:
        raise InputError("an evaluation needs samples", "give at least one source and one variant")
    query_source = queries or _only([name for name, stage in stages.items() if stage == "query"])
    if query_source not in stages:
        raise NameUnknownError.of("source", query_source, stages, "add it with `lark-store source add --stage query`")
    query_texts = [Text(query_source, query_variant, sample) for sample in _samples(store, query_source)][:max_queries]
    candidates = [
        Text(name, variant, sample) for name in sources for variant in variants for sample in _samples(store, name)
    ]
    if max_samples is not None and max_samples < len(candidates):
        drawn = np.random.default_rng(seed).choice(len(candidates), max_samples, replace=False)
        candidates = [candidates[i] for i in sorted(drawn)]
    if not query_texts or not candidates:
        raise InputError(
            f"there are {len(query_texts)} queries and {len(candidates)} samples", "give at least one of each"
        )
    return Material(store, query_texts, candidates)


def draw(pool: Material, max_queries: int | None, max_samples: int | None, seed: Sequence[int]) -> Material:
    """Return a trial's material: as many queries and candidates, drawn at random; all queries share the candidates."""
    rng = np.random.default_rng(seed)

    def drawn(texts: list[Text], n: int | None) -> list[Text]:
        if n is None or n >= len(texts):
            return texts
        return [texts[i] for i in sorted(rng.choice(len(texts), n, replace=False))]

    return Material(pool.store, drawn(pool.queries, max_queries), drawn(pool.samples, max_samples))


def _contents(sample: Sample) -> tuple[str, str | None, str]:
    return sample.content_sha256, sample.label, json.dumps(sample.meta, sort_keys=True)


def _only(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    has = ", ".join(f"`{name}`" for name in names) or "none"
    raise InputError(f"the store has {len(names)} sources of stage `query`: {has}", "choose one with `--queries`")


def _samples(store: Store, source: str) -> list[Sample]:
    rows = store.sql(
        "select * exclude (source, content_sha256) from samples where source = ? order by sample_id", [source]
    )
    return [Sample(**row | {"meta": json.loads(row["meta"])}) for row in rows.iter_rows(named=True)]


# --- models --------------------------------------------------------------------------------------------------------


def folder_of(store: Store, checkpoint: str) -> ModelFolder:
    """Return a checkpoint's folders after verifying that its files are unchanged.

    Raises
    ------
    NameUnknownError, CheckpointError, CheckpointChangedError
    """
    from lark_store.modeling.checkpoints import verify_row

    rows = store.sql(
        "select name, path, revision, weights_sha256, tokenizer_sha256, parts from checkpoints where name = ?",
        [checkpoint],
    )
    if rows.is_empty():
        names = store.sql("select name from checkpoints")["name"]
        raise NameUnknownError.of("checkpoint", checkpoint, names, "add it with `lark-store checkpoint add`")
    return verify_row(rows.row(0, named=True)).model


@dataclass(frozen=True)
class Loaded:
    """A checkpoint's model and tokenizer, loaded on first access."""

    store: Store
    folder: ModelFolder
    device: torch.device
    precision: str = "float32"
    attention: str = "auto"

    @cached_property
    def model(self) -> Any:
        """The model, in evaluation mode."""
        from lark_store.modeling.loading import load_model

        return load_model(self.folder, self.device, self.precision, self.attention)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        from lark_store.modeling.loading import load_tokenizer

        return load_tokenizer(self.folder)

    def _predict(self, prompt: AnswerPrompt) -> list[int]:
        """Answer a prompt, which loads the weights."""
        from lark_store.modeling.predicted_answers import AnswerPredictor

        return AnswerPredictor(self.model, self.tokenizer)(prompt)

    def tokens(self, texts: Iterable[Text]) -> list[Tokens]:
        """Render each text in its variant. Weights are loaded for predicted answers only.

        Raises
        ------
        InputError
            A text can't be rendered.
        """
        from lark_store.modeling.loading import context_length, meta_model

        context, renderers, rendered = context_length(meta_model(self.folder)), {}, []
        for text in texts:
            if text.variant not in renderers:
                renderers[text.variant] = Renderer.of_row(_variant(self.store, text.variant), self.tokenizer, context)
            tokens = renderers[text.variant].attempt(text.sample, self._predict)
            if not isinstance(tokens, Tokens):
                raise InputError(
                    f"`{text.id}` of `{text.source}` can't be used as `{text.variant}`: {tokens}",
                    "choose another variant, or remove the sample",
                )
            rendered.append(tokens)
        return rendered


def _variant(store: Store, name: str) -> dict[str, Any]:
    rows = store.sql(
        "select name, template, template_text, targets, max_length, sha256, loss, answers from variants where name = ?",
        [name],
    )
    return rows.row(0, named=True)


def load(
    store: Store, checkpoint: str, device: str = "auto", precision: str = "float32", attention: str = "auto"
) -> Loaded:
    """Return a checkpoint's model after verifying that its files are unchanged.

    Raises
    ------
    NameUnknownError, CheckpointError, CheckpointChangedError, InputError
    """
    from lark_store.core.device import pick_device

    return Loaded(store, folder_of(store, checkpoint), pick_device(device), precision, attention)
