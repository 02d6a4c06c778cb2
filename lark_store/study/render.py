"""Format variants of a study: those of its recipe beside the built-in ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lark_store.ingest.variants import DEFAULT_MAX_LENGTH, Renderer, make_variant

if TYPE_CHECKING:
    from lark_store.store import Store
    from lark_store.study.recipe import Recipe


def add_variants(store: Store, recipe: Recipe) -> None:
    """Add the recipe's own variants to the store."""
    for variant in recipe.variant:
        template = recipe.place(variant.template)
        store.variant_add(variant.name, template=template, targets=variant.targets, max_length=variant.max_length)


def renderer_of(recipe: Recipe, name: str, tokenizer: Any, context: int | None) -> Renderer:
    """Return what renders samples in a variant: the same tokens and targets as in ingest."""
    own = {variant.name: variant for variant in recipe.variant}.get(name)
    if own is None:
        return Renderer(make_variant(name, name, "auto", DEFAULT_MAX_LENGTH), tokenizer, context)
    made = make_variant(name, recipe.place(own.template), own.targets, own.max_length)
    return Renderer(made, tokenizer, context)
