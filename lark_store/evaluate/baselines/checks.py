"""Shared by the preflight checks of baselines, which fail before the first one computes.

A check reads settings, files and texts; it loads no model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lark_store.errors import InputError
from lark_store.evaluate.baselines.full_gradients import sketcher_of
from lark_store.evaluate.dataset import load

if TYPE_CHECKING:
    from lark_store.evaluate.baselines.context import BaselineContext
    from lark_store.evaluate.dataset import Material


def check_model(material: Material, context: BaselineContext, kind: type[Any], *, several: bool = False) -> Any:
    """Check the settings, their sketcher, and the checkpoints with their texts; return the settings.

    Raises
    ------
    InputError, NameUnknownError, CheckpointError, CheckpointChangedError
    """
    settings = context.settings(kind)
    if several:
        context.folders(material)
    else:
        context.loaded(material)
    sketcher_of(material.store, getattr(settings, "sketcher", None))
    is_across = context.queries_at is not None
    for name in context.checkpoints:
        loaded = load(material.store, name, context.device, context.precision, context.attention)
        loaded.tokens(material.samples if is_across else [*material.queries, *material.samples])
        if is_across:
            context.loaded_for_queries(material, loaded).tokens(material.queries)
    return settings


def check_no_settings(context: BaselineContext, *, uses_model: bool = False) -> None:
    """Check that a baseline's name has no settings, and no checkpoint unless it `uses_model`.

    Raises
    ------
    InputError
    """
    if context.argument is not None:
        raise InputError(f"`{context.spec}`: `{context.name}` has no settings", f"write `{context.name}`")
    if context.checkpoints and not uses_model:
        raise InputError(f"`{context.spec}`: `{context.name}` uses no model", f"write `{context.name}`")
