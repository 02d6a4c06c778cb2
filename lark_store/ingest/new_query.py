"""Sketch texts from outside the store: `top --prompt … --response …`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from lark_store.core.device import pick_device
from lark_store.core.paths import is_file
from lark_store.errors import InputError
from lark_store.gradients.paths.batched import hook_path
from lark_store.gradients.sketch.accumulate import GradientSketcher
from lark_store.gradients.sketch.layout import fingerprint, is_masked, oporp_of, placements_of, sketched_parameters
from lark_store.ingest.correction_store import corrector_for
from lark_store.modeling.checkpoints import verify
from lark_store.modeling.encoded import UnusableSampleError
from lark_store.modeling.forms.rows import make_sample
from lark_store.modeling.loading import context_length, load_model, load_tokenizer
from lark_store.modeling.predicted_answers import AnswerPredictor
from lark_store.modeling.rendering import Renderer
from lark_store.readers import is_data_file, read_rows
from lark_store.schema.catalog import Checkpoint, FormatVariant
from lark_store.schema.database import find, find_sketcher

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from lark_store.gradients.paths.hooks import Sketch, SketchPath
    from lark_store.modeling.sample import Sample
    from lark_store.modeling.tokens import Tokens
    from lark_store.schema.database import Database
    from lark_store.specs import Compute

V = TypeVar("V")
_NEW = "new"


@dataclass(frozen=True)
class NewQuery:
    """A new query: its sketch, the fingerprint of comparable sketches, its text, notes for the user, its tokens."""

    sketch: Sketch
    fingerprint: str
    text: str
    notes: tuple[str, ...] = ()
    tokens: Tokens | None = None


def sample_of(row: dict[str, Any]) -> Sample:
    """Build a sample from `prompt` and `response`, or from `text`.

    Raises
    ------
    InputError
        A field is missing or empty.
    """
    filled = {key: value for key, value in row.items() if value is not None}
    sample = make_sample(type(row)(filled | {"sample_id": _NEW}), {})  # a StructRow stays one
    if sample is None:
        raise InputError("the query is empty", "give `--prompt` and `--response`, or `--text`")
    return sample


def read_sample(path: Path) -> Sample:
    """Read a query: the first row of a data file, or the exact text of any other file.

    Raises
    ------
    InputError
        The file does not exist, is empty or is not UTF-8.
    """
    if not is_file(path):
        raise InputError(f"there is no file `{path}`", "give a text file, or a .jsonl, .parquet or .csv file")
    if is_data_file(path):
        row = next(iter(read_rows(str(path), None, None)), None)
        if row is None:
            raise InputError(f"`{path}` has no rows", "the first row is the query")
        return sample_of(row)
    try:
        return sample_of({"text": path.read_bytes().decode("utf-8-sig")})  # keep line endings
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"`{path}` can't be read as text: {error}", "save it as UTF-8") from error


class NewQuerySketcher:
    """Sketches samples from outside the store with a checkpoint's model, which it loads. Nothing is written.

    Raises
    ------
    NameUnknownError, CheckpointChangedError, CheckpointError
    """

    def __init__(self, db: Database, *, sketcher: str | None, checkpoint: str, variant: str, compute: Compute) -> None:
        with db.session() as session:
            self._sketcher, self._checkpoint = find_sketcher(session, sketcher), find(session, Checkpoint, checkpoint)
            self._variant = find(session, FormatVariant, variant)
        self._db, self._device, self._compute = db, pick_device(compute.device), compute
        folder = verify(self._checkpoint).model
        self.model = load_model(folder, self._device, compute.precision, compute.attention)
        self.renderer = Renderer(self._variant, load_tokenizer(folder), context_length(self.model))
        self.predict = AnswerPredictor(self.model, self.renderer.tokenizer)

    def sketch(self, samples: Sequence[Sample]) -> list[NewQuery]:
        """Sketch samples, one by one.

        Raises
        ------
        InputError
            A sample can't be sketched.
        """
        row = self._sketcher
        placements = placements_of(row, self.model)
        corrector, factors = corrector_for(self._db, row, self._checkpoint, placements, self._device)
        sink = GradientSketcher(oporp_of(row), placements, self._device, corrector)
        path = hook_path(self.model, sketched_parameters(row, self.model), sink, masked=is_masked(row))
        comparable = fingerprint(row, placements)
        try:
            given = (list(samples), comparable, factors)
            sketched = self.once("sketches", given, lambda: [self._sketched(path, sample) for sample in samples])
        finally:
            path.close()
        pairs = zip(sketched, samples, strict=True)
        return [
            NewQuery(sketch, comparable, sample.whole, _notes(tokens), tokens) for (sketch, tokens), sample in pairs
        ]

    def once(self, name: str, given: object, make: Callable[[], V]) -> V:
        """Return what was made last, if it was from the same; else make it. A ranking's other side asks again."""
        rows = [(row.id, row.created_at) for row in (self._sketcher, self._checkpoint, self._variant)]
        return self._db.remember(f"new {name}", (rows, self._compute, given), make)

    def _sketched(self, path: SketchPath, sample: Sample) -> tuple[Sketch, Tokens]:
        try:
            tokens = self.renderer.render(sample, self.predict)
            (sketch,) = path.sketch([tokens])
        except UnusableSampleError as error:
            raise InputError(
                f"the query can't be sketched: {error}", "see its format with `lark-store variant show`"
            ) from error
        if isinstance(sketch, UnusableSampleError):
            raise InputError(f"the query can't be sketched: {sketch}", "try another checkpoint or text")
        return sketch, tokens


def _notes(tokens: Tokens) -> tuple[str, ...]:
    """Return a note about a truncated query."""
    if not tokens.n_cut:
        return ()
    n_whole = len(tokens.input_ids) + tokens.n_cut
    return (f"the query was truncated: {tokens.n_cut} of {n_whole} tokens were cut",)
