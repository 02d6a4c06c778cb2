"""A text that is not in the store, sketched on the spot: `top --prompt … --response …`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lark_store.errors import InputError
from lark_store.ingest.batched import hook_path
from lark_store.ingest.checkpoints import verify
from lark_store.ingest.factors import corrector_for
from lark_store.ingest.gradients import Sketch, pick_device
from lark_store.ingest.models import context_length, load_model, load_tokenizer
from lark_store.ingest.oporp import GradientSketcher
from lark_store.ingest.readers import READERS, read_rows
from lark_store.ingest.sketchers import chosen_of, fingerprint, is_masked, oporp_of, placements_of
from lark_store.ingest.sources import Sample, make_sample
from lark_store.ingest.variants import Renderer, UnusableSampleError
from lark_store.schema.catalog import Checkpoint, FormatVariant, Sketcher
from lark_store.schema.database import find
from lark_store.schema.paths import is_file

if TYPE_CHECKING:
    from pathlib import Path

    from lark_store.schema.database import Database

_NEW = "new"


@dataclass(frozen=True)
class NewQuery:
    """A new query's sketch, the fingerprint of the table it can be compared with, and its text."""

    sketch: Sketch
    fingerprint: str
    text: str


def sample_of(row: dict[str, Any]) -> Sample:
    """Turn what was typed into a sample: `prompt` and `response`, or `text`.

    Raises
    ------
    InputError
        A part is missing or empty.
    """
    sample = make_sample({key: value for key, value in row.items() if value is not None} | {"id": _NEW}, {})
    if sample is None:
        raise InputError("the query is empty", "give `--prompt` and `--response`, or `--text`")
    return sample


def read_sample(path: Path) -> Sample:
    """Read a query from a file: the first row of one that a source can be made of, else its whole text.

    Raises
    ------
    InputError
        There is no such file, or it holds nothing.
    """
    if not is_file(path):
        raise InputError(f"there is no file `{path}`", "a .jsonl, .parquet or .csv file's first row, or a text file")
    if path.suffix.lower() in READERS:
        row = next(iter(read_rows(str(path), None, None)), None)
        if row is None:
            raise InputError(f"`{path}` holds no row", "its first row is the query")
        return sample_of(row)
    try:
        return sample_of({"text": path.read_text(encoding="utf-8")})
    except (UnicodeDecodeError, OSError) as error:
        raise InputError(f"`{path}` can't be read as text: {error}", "save it as UTF-8") from error


def sketch_new(
    db: Database, sample: Sample, *, sketcher: str, checkpoint: str, variant: str, device: str, precision: str
) -> NewQuery:
    """Sketch a sample that is not in the store; nothing is written.

    Raises
    ------
    NameUnknownError, CheckpointChangedError, CheckpointError
    InputError
        The sample can't be sketched.
    """
    with db.session() as session:
        by, at = find(session, Sketcher, sketcher), find(session, Checkpoint, checkpoint)
        form = find(session, FormatVariant, variant)
    on = pick_device(device)
    folder = verify(at).folder
    model = load_model(folder, on, precision)
    placements = placements_of(by, model)
    corrector, _ = corrector_for(db, by, at, placements, on)
    taker = GradientSketcher(oporp_of(by), placements, on, corrector)
    path = hook_path(model, chosen_of(by, model), taker, masked=is_masked(by))
    try:
        tokens = Renderer(form, load_tokenizer(folder), context_length(model)).render(sample)
        (made,) = path.sketch([tokens])
    except UnusableSampleError as error:
        raise InputError(f"the query can't be sketched: {error}", "`lark-store variant show` shows a format") from error
    finally:
        path.close()
    if isinstance(made, UnusableSampleError):
        raise InputError(f"the query can't be sketched: {made}", "another checkpoint or text may do")
    return NewQuery(made, fingerprint(by, placements), sample.whole)
