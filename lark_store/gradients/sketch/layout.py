"""Sketchers: their rows, and their fingerprints with a model.

Sketches are comparable if map, parameter layout, kind of correction, damping and positions are equal, so these make up
the fingerprint. The factors of a correction do not: they belong to one checkpoint. With them, each checkpoint would
have its own table, and neither `tracin`, a sum over checkpoints, nor a dot product across checkpoints would be
possible. Both remain valid: under one map, sketches of D₁g₁ and D₂g₂ estimate g₁ᵀ D₁ D₂ g₂, a dot product in a geometry
between the two.

But at *one* checkpoint, samples and queries must have equal factors. So a checkpoint has one set of factors per kind
(unique in the catalog, identified by content hash). Each ingest run records the hash in its recipe, and factors used by
a run are never replaced.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from lark_store.core.names import IMPORTED
from lark_store.core.text import coded, joined
from lark_store.errors import InputError
from lark_store.gradients.corrections import CORRECTIONS, DEFAULT_DAMPING, DEFAULT_POWER
from lark_store.gradients.sketch.sketcher_checks import MAP_VERSION, check_k, compile_pattern
from lark_store.schema.catalog import Sketcher
from lark_store.specs import SketcherSpec

if TYPE_CHECKING:
    from typing import Unpack

    import torch

    from lark_store.gradients.paths.hooks import NamedParameters
    from lark_store.gradients.sketch.oporp import Oporp
    from lark_store.gradients.sketch.placement import Placement
    from lark_store.specs import SketcherOptions

ALL, CONTENT = "all", "content"  # a sketcher's `positions`
BUILT_IN: dict[str, dict[str, Any]] = {  # the paper's sketcher, and the geometry of Adam's step
    "lark": {},
    "adam": {"correction": "adam", "min_ndim": 2, "mask_template": True},
}


def make_sketcher(name: str, **options: Unpack[SketcherOptions]) -> Sketcher:
    """Build a sketcher, by default the paper's.

    Raises
    ------
    InputError
        k, dtype, seed, an expression, the correction, damping, power or `min_ndim` is invalid.
    """
    spec = SketcherSpec(**options)
    if spec.dtype not in {"float16", "float32"}:
        raise InputError(f"sketches can't be stored as `{spec.dtype}`", "use `float16` or `float32`")
    if not 0 <= spec.seed < 1 << 31:
        raise InputError(f"seed {spec.seed} is not from 0 to 2^31 − 1", "the paper's sketcher has seed 0")
    compile_pattern(spec.parameters)
    compile_pattern(spec.exclude)
    if spec.correction not in CORRECTIONS:
        names = ", ".join(coded(CORRECTIONS))
        raise InputError(f"unknown correction `{spec.correction}`", f"use one of {names}")
    if spec.min_ndim is not None and not 0 <= spec.min_ndim <= 2:
        raise InputError(
            f"the minimum number of dimensions must be from 0 to 2, not {spec.min_ndim}",
            "`--min-ndim 2` selects matrices only",
        )
    return Sketcher(
        name=name,
        k=check_k(spec.k),
        seed=spec.seed,
        map_version=MAP_VERSION,
        dtype=spec.dtype,
        parameters=spec.parameters,
        exclude=spec.exclude,
        correction=spec.correction,
        positions=CONTENT if spec.mask_template else ALL,
        damping=_damping(spec.correction, spec.damping),
        power=_power(spec.correction, spec.power),
        min_ndim=spec.min_ndim or None,
    )


def _damping(correction: str, damping: float | None) -> float | None:
    if CORRECTIONS[correction].factors is None:
        if damping is None:
            return None
        raise InputError(f"the correction `{correction}` has no damping", "omit `--damping`")
    if damping is None:
        return DEFAULT_DAMPING
    if 0 < damping < float("inf"):
        return damping
    raise InputError(f"the damping must be positive, not {damping}", f"the default is {DEFAULT_DAMPING}")


def _power(correction: str, power: float | None) -> float | None:
    powers = CORRECTIONS[correction].powers
    if not powers:
        if power is None:
            return None
        having = joined(coded(name for name, c in CORRECTIONS.items() if c.powers), "and")
        raise InputError(f"the correction `{correction}` has no power", f"only {having} have one")
    if power is None:
        return DEFAULT_POWER
    if power in powers:
        return power
    listed = joined(map(str, powers), "or")
    raise InputError(f"the power must be {listed}, not {power}", "0.5 on both sides gives the whole inverse")


def make_imported(name: str, k: int, dtype: str) -> Sketcher:
    """Build the sketcher of external vectors: any k dimensions, without a map."""
    columns = {"parameters": None, "exclude": None, "correction": IMPORTED, "positions": IMPORTED}
    return Sketcher(name=name, k=k, seed=0, map_version=0, dtype=dtype, **columns)


def check_not_imported(sketcher: Sketcher) -> Sketcher:
    """Return a sketcher unless it is imported, so lark-store can compute its sketches.

    Raises
    ------
    InputError
        The sketches are imported.
    """
    if sketcher.correction != IMPORTED:
        return sketcher
    raise InputError(
        f"the sketches of `{sketcher.name}` were imported; lark-store can't compute them",
        "import more with `lark-store sketcher import`",
    )


def imported_fingerprint(sketcher: Sketcher) -> str:
    """Return the fingerprint of an imported sketcher's sketches: by name, for any model."""
    identity = {"name": sketcher.name, "k": sketcher.k, "dtype": sketcher.dtype, "made": IMPORTED}
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def oporp_of(sketcher: Sketcher) -> Oporp:
    """Return a sketcher's map."""
    from lark_store.gradients.sketch.oporp import Oporp

    return Oporp(sketcher.k, sketcher.seed)


def sketched_parameters(sketcher: Sketcher, model: torch.nn.Module) -> NamedParameters:
    """Return a model's sketched parameters, of those that the correction supports.

    Raises
    ------
    InputError
        The sketcher matches none.
    """
    from lark_store.gradients.paths.hooks import choose_parameters

    parameters = choose_parameters(model, sketcher.parameters, sketcher.exclude, sketcher.min_ndim)
    return CORRECTIONS[sketcher.correction].parameters(model, parameters)


def parameters_of_row(row: dict[str, Any], model: torch.nn.Module) -> NamedParameters:
    """Do the same for a row of the view `sketchers`: name, parameters, exclude, min_ndim and correction."""
    return sketched_parameters(Sketcher(**row), model)


def is_masked(sketcher: Sketcher) -> bool:
    """Tell whether a sketcher masks the template's positions."""
    return sketcher.positions == CONTENT


def placements_of(sketcher: Sketcher, model: torch.nn.Module) -> list[Placement]:
    """Return the layout of a model's sketched parameters."""
    from lark_store.gradients.sketch.placement import place

    return place([(name, tuple(p.shape)) for name, p in sketched_parameters(sketcher, model)], sketcher.k)


def sketch_bytes(sketcher: Sketcher) -> int:
    """Return the size of one stored vector."""
    return sketcher.k * (2 if sketcher.dtype == "float16" else 4)


def fingerprint(sketcher: Sketcher, placements: list[Placement]) -> str:
    """Return the fingerprint of comparable sketches: map, correction, positions and parameter layout."""
    identity: dict[str, Any] = {
        "name": sketcher.name,  # one table per sketcher
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
