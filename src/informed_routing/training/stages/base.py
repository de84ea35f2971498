"""What a stage of a fit is: what it depends on, what it reads, and the work itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

from ...config.recipe import Recipe
from ..reading import Reading

if TYPE_CHECKING:
    from ..run import Run


class Stage(ABC):
    """A stage by its name in recipes and reports.

    What it computes with is imported where it runs: recipes, folders and studies only ask.
    """

    name: ClassVar[str]
    place: ClassVar[int]
    """Stages run from low places to high ones, whatever the order in a recipe."""
    settings: ClassVar[tuple[str, ...]]
    """Sections of a recipe, or dotted settings, that are its own: other stages do not depend on them, later ones do."""
    checkpoints: ClassVar[tuple[str, ...]]
    """The parts of it that a killed fit does not repeat, in order: each is a file."""
    trains_routers: ClassVar[bool] = False
    adapts: ClassVar[bool] = False
    """Whether it leaves LoRA layers in the model."""

    def applies(self, recipe: Recipe) -> bool:
        """Whether a fit of that recipe runs it."""
        return self.name in recipe.stages

    def sparsities(self, recipe: Recipe) -> dict[str, float]:
        """Shares that it will look for, by their settings: a fit is refused before it begins if it cannot reach one."""
        return {}

    @abstractmethod
    def reads(self, recipe: Recipe) -> dict[str, Reading]:
        """The parts that a recipe has it do, by checkpoint and in order, each with the text that it reads."""

    @abstractmethod
    def run(self, run: Run) -> dict[str, Any]:
        """Do all parts that no checkpoint holds; returns what `fit.json` keeps of the stage."""
