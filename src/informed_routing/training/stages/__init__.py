"""The stages of a fit, in the order in which they run: one file each, under the name that recipes give them."""

from __future__ import annotations

from importlib import import_module
from typing import get_args

from ...config.recipe import Recipe, StageName
from .base import Stage

STAGES: tuple[Stage, ...] = tuple(import_module(f"{__name__}.{name}").STAGE for name in get_args(StageName))


def stages_of(recipe: Recipe) -> tuple[Stage, ...]:
    """The stages that a fit of that recipe runs."""
    return tuple(stage for stage in STAGES if stage.applies(recipe))


def text_read(recipe: Recipe) -> dict[str, int]:
    """Tokens that set weights in each stage that a recipe names, with and without gradients."""
    found: dict[str, int] = dict.fromkeys(recipe.stages, 0)
    for stage in stages_of(recipe):
        if stage.name in found:
            found[stage.name] = sum(reading.tokens for reading in stage.reads(recipe).values())
    return found
