"""The stages of a fit, one file each; add one by adding a file (docs/how-to/stage.md)."""

from __future__ import annotations

from ...config.kinds import kind, stages_in_order
from ...config.recipe import Recipe
from .base import Stage

STAGES: tuple[Stage, ...] = tuple(kind("stages", name)() for name in stages_in_order())
"""In the order in which they run."""


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
