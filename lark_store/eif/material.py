"""The samples and queries of a measurement: chosen by seed, rendered, and divided into the draws of a domain."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from sqlalchemy import select

from lark_store.errors import InputError
from lark_store.modeling.checkpoints import verify
from lark_store.modeling.loading import context_length, load_model, load_tokenizer, meta_model
from lark_store.modeling.predicted_answers import AnswerPredictor
from lark_store.modeling.rendering import Renderer
from lark_store.modeling.sample import SAMPLE_COLUMNS, Sample
from lark_store.modeling.tokens import Tokens
from lark_store.schema.catalog import Checkpoint, FormatVariant, Source
from lark_store.schema.database import find
from lark_store.schema.vectors import where

if TYPE_CHECKING:
    from collections.abc import Iterable

    import torch

    from lark_store.modeling.predicted_answers import AnswerPrompt
    from lark_store.schema.database import Database
    from lark_store.specs import EifSpec

DRAW = "draw"  # the key of the metadata


@dataclass(frozen=True)
class Rows:
    """The rows of the catalog that a measurement names."""

    checkpoint: Checkpoint
    source: Source
    variant: FormatVariant
    queries: Source
    query_variant: FormatVariant

    @property
    def label(self) -> str:
        """The measurement in one line."""
        return f"{self.checkpoint.name}: {self.source.name} on {self.queries.name}"


def find_rows(db: Database, spec: EifSpec) -> Rows:
    """Return the rows of the catalog that a measurement names.

    Raises
    ------
    NameUnknownError, InputError
    """
    with db.session() as session:
        name = spec.queries
        if name is None:
            names = list(session.scalars(select(Source.name).filter_by(stage="query").order_by(Source.name)))
            if len(names) != 1:
                has = ", ".join(f"`{each}`" for each in names) or "none"
                fact = f"the store has {len(names)} sources of stage `query`: {has}"
                raise InputError(fact, "choose one with `--queries`")
            name = names[0]
        return Rows(
            find(session, Checkpoint, spec.checkpoint),
            find(session, Source, spec.source),
            find(session, FormatVariant, spec.variant),
            find(session, Source, name),
            find(session, FormatVariant, spec.query_variant or spec.variant),
        )


class Loaded:
    """A checkpoint's tokenizer, and its model, loaded when it is needed, with the parameters to train."""

    def __init__(self, checkpoint: Checkpoint, device: torch.device, precision: str, attention: str) -> None:
        self._folder, self._settings = verify(checkpoint).model, (device, precision, attention)
        self.context = context_length(meta_model(self._folder))

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return load_tokenizer(self._folder)

    @cached_property
    def model(self) -> Any:
        """The model in evaluation mode; adapters alone are trained if it has any."""
        from lark_store.gradients.paths.hooks import choose_parameters

        model = load_model(self._folder, *self._settings)
        model.requires_grad_(False)
        for _, parameter in choose_parameters(model, None, None):
            parameter.requires_grad_(True)
        return model

    def predict(self, prompt: AnswerPrompt) -> list[int]:
        """Answer a prompt, for the target rule `predicted-answer`."""
        return AnswerPredictor(self.model, self.tokenizer)(prompt)


class Texts:
    """The samples of a source in a format variant, rendered when they are needed."""

    def __init__(self, db: Database, source: Source, variant: FormatVariant, loaded: Loaded) -> None:
        rows = db.vectors.read("samples", SAMPLE_COLUMNS, where(source=source.name)).sort("sample_id")
        self.source, self.variant = source.name, variant
        self._samples = {row["sample_id"]: Sample.of_row(row) for row in rows.iter_rows(named=True)}
        self._loaded, self._tokens = loaded, dict[str, Tokens | str]()
        self._renderer = Renderer(variant, loaded.tokenizer, loaded.context)

    @property
    def template_sha256(self) -> str:
        """The hash of the template."""
        return self._renderer.sha256

    def draw(self, n: int | None, seed: int) -> list[str]:
        """Return the ids of `n` samples drawn at random (None: all), in order: those that evaluations draw."""
        ids = list(self._samples)
        if n is None or n >= len(ids):
            return ids
        drawn = np.random.default_rng(seed).choice(len(ids), n, replace=False)
        return [ids[i] for i in sorted(drawn)]

    def first(self, n: int | None) -> list[str]:
        """Return the first `n` ids (None: all)."""
        return list(self._samples)[:n]

    def draw_of(self, sample_id: str) -> int | None:
        """Return the number of a statement's draw; None: it has none."""
        number = self._samples[sample_id].meta.get(DRAW)
        return number if isinstance(number, int) and not isinstance(number, bool) else None

    def attempt(self, sample_id: str) -> Tokens | str:
        """Return a rendered sample, or the reason why it can't be."""
        if sample_id not in self._tokens:
            tokens = self._renderer.attempt(self._samples[sample_id], self._loaded.predict)
            self._tokens[sample_id] = tokens if isinstance(tokens, Tokens) else str(tokens)
        return self._tokens[sample_id]

    def tokens(self, sample_id: str) -> Tokens:
        """Return a rendered sample that can be.

        Raises
        ------
        InputError
        """
        tokens = self.attempt(sample_id)
        if isinstance(tokens, str):
            raise InputError(f"`{sample_id}` of `{self.source}` can't be rendered: {tokens}", "choose another variant")
        return tokens

    def measured_tokens(self, sample_id: str) -> Tokens:
        """Return a rendered query: its loss is the mean over its targets, whatever the variant says.

        Raises
        ------
        InputError
        """
        tokens = self.tokens(sample_id)
        if tokens.rule == "predicted":
            raise InputError(
                f"the targets of `{sample_id}` as `{self.variant.name}` are the model's own predictions, and training "
                "changes them: their loss has no before and after",
                "add a variant with other targets, such as `lark-store variant add text --template raw --targets text`",
            )
        return replace(tokens, is_summed=False)


@dataclass(frozen=True)
class Part:
    """The samples and queries of one matrix: all of them, or those of one draw."""

    draw: int | None
    samples: list[str]
    queries: list[str]


@dataclass(frozen=True)
class Material:
    """What is measured: samples, queries, the matrices they make, and those left out, with the reason."""

    samples: Texts
    queries: Texts
    parts: list[Part]
    failures: list[tuple[str, str, str]]


def gather(db: Database, spec: EifSpec, rows: Rows, loaded: Loaded) -> Material:
    """Choose and render the samples and queries of a measurement.

    Raises
    ------
    InputError
        There are none that can be rendered, or with `by_draw` one has no draw.
    """
    samples = Texts(db, rows.source, rows.variant, loaded)
    queries = Texts(db, rows.queries, rows.query_variant, loaded)
    failures: dict[tuple[str, str], str] = {}
    chosen = [
        _usable(samples, samples.draw(spec.max_samples, spec.seed), failures),
        _usable(queries, queries.first(spec.max_queries), failures),
    ]
    for texts, ids in zip((samples, queries), chosen, strict=True):
        if not ids:
            reason = next(iter(failures.values()), "it has none")
            raise InputError(f"no sample of `{texts.source}` can be used: {reason}", "choose another source or variant")
    for query in chosen[1]:
        queries.measured_tokens(query)
    parts = _by_draw(samples, queries, *chosen) if spec.by_draw else [Part(None, *chosen)]
    return Material(samples, queries, parts, [(*key, reason) for key, reason in failures.items()])


def _usable(texts: Texts, ids: Iterable[str], failures: dict[tuple[str, str], str]) -> list[str]:
    usable = []
    for sample_id in ids:
        tokens = texts.attempt(sample_id)
        if isinstance(tokens, str):
            failures[texts.source, sample_id] = tokens
        else:
            usable.append(sample_id)
    return usable


def _by_draw(samples: Texts, queries: Texts, sample_ids: list[str], query_ids: list[str]) -> list[Part]:
    parts: dict[int, Part] = {}
    for texts, ids in ((samples, sample_ids), (queries, query_ids)):
        for sample_id in ids:
            draw = texts.draw_of(sample_id)
            if draw is None:
                raise InputError(
                    f"`{sample_id}` of `{texts.source}` has no `draw` in its metadata",
                    "use statements of `domain make`, or leave `--by-draw` out",
                )
            part = parts.setdefault(draw, Part(draw, [], []))
            (part.samples if texts is samples else part.queries).append(sample_id)
    whole = [parts[draw] for draw in sorted(parts) if parts[draw].samples and parts[draw].queries]
    if not whole:
        raise InputError("no draw has both samples and queries", "use the same domain for both")
    return whole
