"""What of a gradient is sketched, and how: the sketcher's row, and the fingerprint that it gets with a model."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

from lark_store.errors import InputError
from lark_store.ingest.gradients import choose_parameters, compile_pattern
from lark_store.ingest.oporp import MAP_VERSION, Oporp, check_k, place
from lark_store.schema.catalog import Sketcher

if TYPE_CHECKING:
    import torch

    from lark_store.ingest.oporp import Placement

IMPORTED = "imported"  # the `correction` and `positions` of a sketcher whose sketches were made elsewhere


def make_sketcher(
    name: str,
    *,
    k: int = 65_536,
    seed: int = 0,
    dtype: str = "float16",
    parameters: str | None = None,
    exclude: str | None = None,
) -> Sketcher:
    """Build a sketcher; the defaults are the paper's.

    Raises
    ------
    InputError
        k, the storage type or an expression is unusable.
    """
    if dtype not in {"float16", "float32"}:
        raise InputError(f"sketches can't be stored as `{dtype}`", "`float16` or `float32`")
    if not 0 <= seed < 1 << 31:
        raise InputError(f"seed {seed} is not from 0 to 2^31 − 1", "the paper's sketcher has seed 0")
    compile_pattern(parameters)
    compile_pattern(exclude)
    return Sketcher(
        name=name,
        k=check_k(k),
        seed=seed,
        map_version=MAP_VERSION,
        dtype=dtype,
        parameters=parameters,
        exclude=exclude,
        correction="none",
        positions="all",
    )


def make_imported(name: str, k: int, dtype: str) -> Sketcher:
    """Build the sketcher of vectors that were made elsewhere: k dimensions, whatever they are, and no map of ours."""
    what = {"parameters": None, "exclude": None, "correction": IMPORTED, "positions": IMPORTED}
    return Sketcher(name=name, k=k, seed=0, map_version=0, dtype=dtype, **what)


def check_ours(sketcher: Sketcher) -> Sketcher:
    """Return a sketcher if it is a map of lark-store's own, by which sketches can be made.

    Raises
    ------
    InputError
        Its sketches were imported.
    """
    if sketcher.correction != IMPORTED:
        return sketcher
    raise InputError(
        f"the sketches of `{sketcher.name}` were made elsewhere and imported; lark-store can't make them",
        "add more with `lark-store sketcher import`",
    )


def imported_fingerprint(sketcher: Sketcher) -> str:
    """Return what tells comparable sketches of an imported sketcher: those under one name, whatever the model."""
    identity = {"name": sketcher.name, "k": sketcher.k, "dtype": sketcher.dtype, "made": IMPORTED}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def oporp_of(sketcher: Sketcher) -> Oporp:
    """Return a sketcher's map."""
    return Oporp(sketcher.k, sketcher.seed)


def placements_of(sketcher: Sketcher, model: torch.nn.Module) -> list[Placement]:
    """Return what a sketcher takes of a model, laid out."""
    chosen = choose_parameters(model, sketcher.parameters, sketcher.exclude)
    return place([(name, tuple(p.shape)) for name, p in chosen], sketcher.k)


def sketch_bytes(sketcher: Sketcher) -> int:
    """Return the size of one stored vector."""
    return sketcher.k * (2 if sketcher.dtype == "float16" else 4)


def fingerprint(sketcher: Sketcher, placements: list[Placement]) -> str:
    """Return what tells comparable sketches: the map, what is sketched, and the parameters' layout."""
    identity = {
        "name": sketcher.name,  # a table holds one sketcher's sketches
        "k": sketcher.k,
        "seed": sketcher.seed,
        "map_version": sketcher.map_version,
        "dtype": sketcher.dtype,
        "correction": sketcher.correction,
        "positions": sketcher.positions,
        "layout": [(p.name, p.shape, p.first_chunk) for p in placements],
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
