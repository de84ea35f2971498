"""SkipGPT, MoD and D-LLM are recipes: choices of router, fallback, selection and objective."""

from __future__ import annotations

from transformers import PreTrainedModel

from ..config.recipe import Recipe
from ..errors import InputError
from ..recipes import packaged_recipes
from ..routed_model import RoutedModelForCausalLM

__all__ = ["RECIPES", "attach", "recipe_of"]

RECIPES = ("skipgpt", "skipgpt-faithful", "mod", "mod-block", "dllm")
"""Packaged recipes. The first two differ as the method's re-run in our paper differs from its own."""


def recipe_of(name: str) -> Recipe:
    """The recipe of a dynamic baseline. Raises InputError for an unknown name."""
    if name not in RECIPES:
        raise InputError(f"baseline {name!r} is not known", f"Choose one of {', '.join(RECIPES)}")
    return Recipe.from_yaml(packaged_recipes()[name])


def attach(model: PreTrainedModel, name: str) -> RoutedModelForCausalLM:
    """Give a dense model the untrained parts of a baseline, in place; `fit` with its recipe also trains them."""
    recipe = recipe_of(name)
    return RoutedModelForCausalLM.attach(
        model, recipe.forecaster, recipe.router, selection=recipe.selection, kv=recipe.kv, name=recipe.model
    )
