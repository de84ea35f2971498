"""Recipes by name."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError

FOLDER = Path(__file__).resolve().parent.parent / "recipes"


def recipe_path(name: str) -> Path:
    """A YAML file of the user, or a recipe of the package. Raises InputError when it is neither."""
    path = Path(name).expanduser()
    if path.is_file():
        return path
    packaged = FOLDER / f"{name.removesuffix('.yaml')}.yaml"
    if packaged.is_file():
        return packaged
    known = ", ".join(sorted(one.stem for one in FOLDER.glob("*.yaml")))
    raise InputError(f"recipe {name} does not exist", f"Give a YAML file, or one of {known}")
