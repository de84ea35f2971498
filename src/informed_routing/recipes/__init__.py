"""Recipes by name: YAML settings that come with the package, or a user's own file."""

from __future__ import annotations

from pathlib import Path

from ..errors import InputError
from ..files.user_files import shown, user_path

__all__ = ["packaged_recipes", "recipe_path"]


def packaged_recipes() -> dict[str, Path]:
    """Recipes inside the package, by name."""
    return {path.stem: path for path in Path(__file__).resolve().parent.glob("*.yaml")}


def recipe_path(name: str) -> Path:
    """A recipe that comes with the package, by its name (`demo`, `paper-8b`), else a file of the user.

    What lies in the working directory does not change what a built-in name means: a file of that name needs its suffix
    or its folder (`demo.yaml`, `./demo`). Raises InputError when there is neither.
    """
    return built_in_or_file(name, packaged_recipes(), "recipe")


def built_in_or_file(name: str, built_in: dict[str, Path], what: str) -> Path:
    """The path of a built-in name, which comes first, or of a file. Raises InputError when there is neither."""
    if name in built_in:
        return built_in[name]
    path = user_path(name, what)
    try:
        there, folder = path.exists(), path.is_dir()
    except OSError as error:
        raise InputError(f"{what} {shown(name)} cannot be read: {error.strerror}", "Give a YAML file") from None
    if folder:
        raise InputError(f"{what} {name} is a folder", "Give a YAML file")
    if there:
        return path
    names = ", ".join(sorted(built_in))
    stem = name.removesuffix(".yaml")
    remedy = f"Built in is `{stem}`, without a suffix" if stem in built_in else f"Give a YAML file, or one of {names}"
    raise InputError(f"{what} {shown(name)} does not exist", remedy)
