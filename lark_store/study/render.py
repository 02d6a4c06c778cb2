"""Format variants of a study: those of its recipe and the built-in ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lark_store.modeling.predicted_answers import AnswerSettings
from lark_store.modeling.rendering import DEFAULT_MAX_LENGTH, Renderer, make_variant
from lark_store.specs import VariantSpec

if TYPE_CHECKING:
    from lark_store.store import Store
    from lark_store.study.recipe import Recipe, Variant


def add_variants(store: Store, recipe: Recipe) -> None:
    """Add the recipe's own variants to the store."""
    for variant in recipe.variant:
        store.variant_add(variant.name, **settings_of(recipe, variant))


def renderer_of(recipe: Recipe, name: str, tokenizer: Any, context: int | None) -> Renderer:
    """Return the renderer of a variant, with the same tokens and targets as in ingest."""
    custom = {variant.name: variant for variant in recipe.variant}.get(name)
    if custom is None:
        return Renderer(make_variant(name, name, "auto", DEFAULT_MAX_LENGTH), tokenizer, context)
    spec = VariantSpec(**settings_of(recipe, custom))
    answers = AnswerSettings.of_spec(spec)
    built = make_variant(name, str(spec.template), spec.targets, spec.max_length, spec.loss, answers)
    return Renderer(built, tokenizer, context)


def settings_of(recipe: Recipe, variant: Variant) -> dict[str, Any]:
    """Return the keywords of `Store.variant_add` for one of the recipe's own variants."""
    return variant.model_dump(exclude={"name"}) | {"template": recipe.place(variant.template)}
