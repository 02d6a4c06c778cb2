"""What of a gradient is sketched, and how: the sketcher's row, and the fingerprint that it gets with a model.

What a fingerprint must tell apart, and what not. Two sketches can be compared if the map, the parameters' layout and
the kind of correction are the same; these, with the damping and the positions, are in it. The factors of a correction,
which belong to one checkpoint, are not: with them in it, each checkpoint would have a table of its own, and neither
`tracin` (a sum over checkpoints of what is compared within each) nor a dot product across two checkpoints could be
asked for. Both stay true without: the map is the same, so sketches of D₁g₁ and D₂g₂ estimate g₁ᵀ D₁ D₂ g₂, a dot
product in a geometry between the two. What must not happen is that samples and queries at *one* checkpoint are
corrected by different factors. So a checkpoint has one set of factors of a kind (unique in the catalog, known by the
hash of its content); each ingest run has that hash in its recipe; and a set that a run was made with is never replaced.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from lark_store.errors import InputError
from lark_store.ingest.corrections import ALL, CONTENT, CORRECTIONS, CURVATURES, DEFAULT_DAMPING, FACTORS
from lark_store.ingest.curvature import DEFAULT_POWER, linear_weights
from lark_store.ingest.gradients import choose_parameters, compile_pattern
from lark_store.ingest.oporp import MAP_VERSION, Oporp, check_k, place
from lark_store.schema.catalog import Sketcher

if TYPE_CHECKING:
    import torch

    from lark_store.ingest.gradients import Chosen
    from lark_store.ingest.oporp import Placement

BUILT_IN: dict[str, dict[str, Any]] = {  # the paper's, and the geometry of a step of Adam
    "lark": {},
    "adam": {"correction": "adam", "min_ndim": 2, "mask_template": True},
}
IMPORTED = "imported"  # the `correction` and `positions` of a sketcher whose sketches were made elsewhere


def make_sketcher(
    name: str,
    *,
    k: int = 65_536,
    seed: int = 0,
    dtype: str = "float16",
    parameters: str | None = None,
    exclude: str | None = None,
    correction: str = "none",
    damping: float | None = None,
    power: float | None = None,
    min_ndim: int | None = None,
    mask_template: bool = False,
) -> Sketcher:
    """Build a sketcher; the defaults are the paper's.

    Raises
    ------
    InputError
        k, the storage type, an expression, the correction, its damping or its power is unusable.
    """
    if dtype not in {"float16", "float32"}:
        raise InputError(f"sketches can't be stored as `{dtype}`", "`float16` or `float32`")
    if not 0 <= seed < 1 << 31:
        raise InputError(f"seed {seed} is not from 0 to 2^31 − 1", "the paper's sketcher has seed 0")
    compile_pattern(parameters)
    compile_pattern(exclude)
    if correction not in CORRECTIONS:
        raise InputError(f"`{correction}` is no correction", f"one of {', '.join(f'`{c}`' for c in CORRECTIONS)}")
    if min_ndim is not None and not 0 <= min_ndim <= 2:
        raise InputError(f"{min_ndim} dimensions are none to begin at", "`--min-ndim 2` takes matrices alone")
    return Sketcher(
        name=name,
        k=check_k(k),
        seed=seed,
        map_version=MAP_VERSION,
        dtype=dtype,
        parameters=parameters,
        exclude=exclude,
        correction=correction,
        positions=CONTENT if mask_template else ALL,
        damping=_damping(correction, damping),
        power=_power(correction, power),
        min_ndim=min_ndim or None,
    )


def _damping(correction: str, damping: float | None) -> float | None:
    if correction not in FACTORS:
        if damping is None:
            return None
        raise InputError(f"the correction `{correction}` has no damping", "leave `--damping` out")
    if damping is None:
        return DEFAULT_DAMPING
    if 0 < damping < float("inf"):
        return damping
    raise InputError(f"a damping of {damping} is not above 0", f"the default is {DEFAULT_DAMPING}")


def _power(correction: str, power: float | None) -> float | None:
    if correction not in CURVATURES:
        if power is None:
            return None
        raise InputError(f"the correction `{correction}` has no power to choose", "`kfac` and `ekfac` have one")
    if power is None:
        return DEFAULT_POWER
    if power in (0.5, 1):
        return power
    raise InputError(f"a power of {power} is neither 0.5 nor 1", "0.5 on both sides makes the whole inverse")


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


def chosen_of(sketcher: Sketcher, model: torch.nn.Module) -> Chosen:
    """Return the parameters that a sketcher takes of a model; with a curvature, weights of linear layers alone.

    Raises
    ------
    InputError
        It takes none.
    """
    chosen = choose_parameters(model, sketcher.parameters, sketcher.exclude, sketcher.min_ndim)
    return linear_weights(model, chosen) if sketcher.correction in CURVATURES else chosen


def is_masked(sketcher: Sketcher) -> bool:
    """Tell whether a sketcher leaves out what stands at the template's positions."""
    return sketcher.positions == CONTENT


def placements_of(sketcher: Sketcher, model: torch.nn.Module) -> list[Placement]:
    """Return what a sketcher takes of a model, laid out."""
    chosen = chosen_of(sketcher, model)
    return place([(name, tuple(p.shape)) for name, p in chosen], sketcher.k)


def sketch_bytes(sketcher: Sketcher) -> int:
    """Return the size of one stored vector."""
    return sketcher.k * (2 if sketcher.dtype == "float16" else 4)


def fingerprint(sketcher: Sketcher, placements: list[Placement]) -> str:
    """Return what tells comparable sketches: the map, what is sketched, and the parameters' layout."""
    identity: dict[str, Any] = {
        "name": sketcher.name,  # a table holds one sketcher's sketches
        "k": sketcher.k,
        "seed": sketcher.seed,
        "map_version": sketcher.map_version,
        "dtype": sketcher.dtype,
        "correction": sketcher.correction,
        "positions": sketcher.positions,
        "layout": [(p.name, p.shape, p.first_chunk) for p in placements],
    }
    if sketcher.damping is not None:
        identity["damping"] = sketcher.damping
    if sketcher.power is not None:
        identity["power"] = sketcher.power
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
