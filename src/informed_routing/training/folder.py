"""The folder that a fit writes: what may be there before it begins."""

from __future__ import annotations

import shutil
from pathlib import Path

from ..errors import InputError
from ..persistence import LORA_FOLDER, is_routing_folder

CHECKPOINTS = "checkpoints"
RECIPE_FILE = "recipe.json"

_WRITTEN = {
    "routing_config.json",
    "routing.safetensors",
    "config.json",
    "fit.json",
    "README.md",
    LORA_FOLDER,
    CHECKPOINTS,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "added_tokens.json",
    "generation_config.json",
    "modeling_informed_routing.py",
}
"""All names that a fit leaves in its folder."""


def check_folder(out: Path, recipe: str, *, resume: bool, overwrite: bool) -> None:
    """Refuse to mix runs: a folder that holds anything must be resumed (same recipe) or overwritten.

    `recipe` is what the fit stores of itself. Raises InputError with the remedy.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file", "Give a folder for --out")
    if not out.is_dir() or not any(out.iterdir()):
        return
    stored = out / CHECKPOINTS / RECIPE_FILE
    if overwrite:
        strangers = [path.name for path in out.iterdir() if path.name not in _WRITTEN and path.name[0] != "."]
        if strangers:
            raise InputError(
                f"{out} holds {strangers[0]}, which no fit has written", "Use another --out or empty the folder"
            )
    elif not resume:
        raise InputError(f"{out} exists already", "Use --resume, --overwrite or another --out")
    elif stored.is_file():
        if stored.read_text(encoding="utf-8").strip() != recipe.strip():
            raise InputError(f"{out} was begun with another recipe", "Repeat its settings, or use --overwrite")
    elif is_routing_folder(out):
        raise InputError(f"{out} holds a finished fit", "Use --overwrite to fit again")
    else:
        raise InputError(f"{out} holds no fit to resume", "Use another --out, or --overwrite")


def clear(out: Path) -> None:
    """Empty a folder that `check_folder` allowed to be overwritten."""
    for path in out.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
