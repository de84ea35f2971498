"""Recipes by name: YAML settings that come with the package, or a user's own file."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError


def packaged_recipes() -> dict[str, Path]:
    """Recipes inside the package, by name."""
    return {path.stem: path for path in Path(__file__).resolve().parent.glob("*.yaml")}


def recipe_path(name: str) -> Path:
    """A recipe file of the user, or one of the package by its name (`demo`, `paper-8b`).

    Raises InputError when it is neither.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    packaged = packaged_recipes()
    if name.removesuffix(".yaml") in packaged:
        return packaged[name.removesuffix(".yaml")]
    raise InputError(f"recipe {name} does not exist", f"Give a YAML file, or one of {', '.join(sorted(packaged))}")
