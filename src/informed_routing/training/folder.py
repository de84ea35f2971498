"""The folder that a fit writes: what may be there before it begins, and what of an interrupted fit still holds."""

from __future__ import annotations

import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..config.recipe import Recipe
from ..errors import InputError
from ..files.atomic import is_scratch
from ..files.folders import CHECKPOINTS, LOCK_IN_FOLDER
from ..persistence.folder import CONFIG_FILE, LORA_FOLDER, TENSOR_FILE, is_routing_folder
from .stages import STAGES, stages_of

RECIPE_FILE = "recipe.json"
LATENCY_FILE = "latency.json"
INPUTS_FILE = "inputs.json"
"""What else of a fit lies in its checkpoints: the measured table of a latency budget; digests of base and texts."""

LAST = ("config.json", CONFIG_FILE)
"""The files that make a folder a routing folder."""

_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "added_tokens.json",
)
_PLAIN = {"fit.json", "README.md", "generation_config.json", "modeling_informed_routing.py"}
_RESULT = {*LAST, TENSOR_FILE, LORA_FOLDER, *_PLAIN, *_TOKENIZER}
_ADAPTER = {"adapter_model.safetensors", "adapter_config.json", "README.md"}

_SETS_NO_WEIGHTS = ("checkpoint_every", "activation_checkpointing")


def in_checkpoints(name: str) -> bool:
    """Whether a fit may have written a file of that name into its checkpoints."""
    parts = {f"{part}.safetensors" for stage in STAGES for part in stage.checkpoints}
    known = {RECIPE_FILE, LATENCY_FILE, INPUTS_FILE} | parts
    return name in known or is_temporary(name, known)


def _in_adapter(name: str) -> bool:
    return name in _ADAPTER or is_temporary(name, _ADAPTER)


def of_tokenizer(name: str) -> bool:
    """Whether `save_pretrained` of a tokenizer writes a file of that name."""
    return name in _TOKENIZER or is_temporary(name, _TOKENIZER)


def is_ours(name: str) -> bool:
    """Whether a fit may have written a file or folder of that name; its folders have names of their own inside."""
    known = {*_RESULT, CHECKPOINTS}
    return name in known or is_temporary(name, known)


def is_temporary(name: str, of: Any) -> bool:
    """Whether a name is that of our temporary files for files called `of`, in this version or an earlier one."""
    if is_scratch(name) or name == LOCK_IN_FOLDER or re.fullmatch(r"\.new-[a-z0-9_]{8}|\.tmp[A-Za-z0-9]{6}", name):
        return True
    return any(name == f".{one}.new" or re.fullmatch(rf"\.{re.escape(one)}\.[a-z0-9_]{{8}}", name) for one in of)


def foreign(out: Path) -> str | None:
    """Something in a folder that no fit has written, as a path in it; None where there is nothing of the kind."""
    inside = {CHECKPOINTS: in_checkpoints, LORA_FOLDER: _in_adapter}
    for path in sorted(out.iterdir()):
        if not is_ours(path.name) or (path.name in inside and not path.is_dir()):
            return path.name
        if path.name in inside:
            strangers = [entry.name for entry in sorted(path.iterdir()) if not inside[path.name](entry.name)]
            if strangers:
                return f"{path.name}/{strangers[0]}"
    return None


def is_begun(out: Path) -> bool:
    """Whether an interrupted fit has left its recipe, without which nothing was computed."""
    return (out / CHECKPOINTS / RECIPE_FILE).is_file()


def check_folder(out: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> Recipe | None:
    """Refuse to mix runs; what a fit did not write is never cleared. Returns the recipe of the fit that is resumed.

    A resumed fit may have another recipe in what only later stages read. Raises InputError with the remedy.
    """
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other", "Give one of them")
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file", "Give a folder for --out")
    if not out.is_dir() or not any(not is_temporary(path.name, ()) for path in out.iterdir()):
        return None
    stranger, finished, begun = foreign(out), is_routing_folder(out), is_begun(out)
    if not (finished or begun) and stranger is None and {path.name for path in out.iterdir()} <= {CHECKPOINTS}:
        return None  # killed before its recipe was written
    if not (finished or begun):
        shown = stranger or sorted(out.iterdir())[0].name
        raise InputError(f"{out} exists already and holds {shown}, but no fit", "Use another --out")
    if overwrite:
        if stranger is not None:
            raise InputError(f"{out} holds {stranger}, which no fit has written", "Use another --out or move it away")
        return None
    if not resume:
        choices = "--resume, " * begun + "--overwrite, " * (stranger is None)
        raise InputError(f"{out} exists already", f"Use {choices}{'or ' if choices else ''}another --out")
    again = "use another --out" if stranger else "use --overwrite"
    if not begun:
        if stranger is None:  # killed at its very end, while it removed them
            shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
        raise InputError(f"{out} holds a finished fit", f"To fit again {again}")
    stored = _stored_recipe(out, again)
    if changed := _changed(out, stored, recipe):
        raise InputError(f"{out} was begun with another recipe ({changed})", f"Repeat its settings, or {again}")
    return stored


def _stored_recipe(out: Path, again: str) -> Recipe:
    path = out / CHECKPOINTS / RECIPE_FILE
    try:
        return Recipe.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        raise InputError(f"{path} is damaged, or of another version", f"To fit anew {again}") from None


def _changed(out: Path, stored: Recipe, recipe: Recipe) -> str | None:
    """The first setting that a stage which has begun was given otherwise."""
    for stage in stages_of(stored):
        if not any((out / CHECKPOINTS / f"{part}.safetensors").exists() for part in stage.checkpoints):
            continue
        before, now = what_decides(stored, stage.name), what_decides(recipe, stage.name)
        for key in dict.fromkeys((*before, *now)):
            if before.get(key) != now.get(key):
                return f"{key} {before.get(key)}, now {now.get(key)}; its {stage.name} stage has begun"
    if is_routing_folder(out) and stored != recipe and _is_result_of(out, stored):
        return "it is finished"
    return None


def what_decides(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The settings that what a stage computes depends on, by their dotted names."""
    stages = list(recipe.stages)
    place = stages.index(stage) + 1 if stage in stages else len(stages)
    settings = {one.name: one.settings for one in STAGES}
    owned = {setting.split(".")[0] for own in settings.values() for setting in own}
    read = {setting for name in (*stages[:place], stage) for setting in settings[name]}

    def decides(section: str, key: str) -> bool:
        if section not in owned:
            return True
        return key not in _SETS_NO_WEIGHTS and bool({section, f"{section}.{key}"} & read)

    found: dict[str, Any] = {}
    for name, value in recipe.model_dump(mode="json").items():
        if name == "stages":
            found[name] = stages[:place] if stage in stages or stage == "calibrate" else stages
        elif isinstance(value, dict):
            found |= {f"{name}.{key}": one for key, one in value.items() if decides(name, key)}
        elif name not in _SETS_NO_WEIGHTS:
            found[name] = value
    return found


def _is_result_of(out: Path, stored: Recipe) -> bool:
    """Whether the finished fit in a folder is that of the checkpoints, which were kept."""
    from json import loads

    try:
        return Recipe.model_validate(loads((out / "fit.json").read_text(encoding="utf-8"))["recipe"]) == stored
    except (OSError, ValueError, KeyError, TypeError):
        return False


def clean_checkpoints(out: Path) -> None:
    """Remove what killed processes of earlier versions left half-written. Only the folder's one writer may."""
    folder = out / CHECKPOINTS
    if folder.is_dir():
        for path in folder.iterdir():
            if path.name.startswith(".") and in_checkpoints(path.name) and not is_scratch(path.name):
                with suppress(OSError):
                    shutil.rmtree(path) if path.is_dir() else path.unlink()


def clear_checkpoints(out: Path) -> None:
    """Forget an earlier fit that was interrupted; what it began with goes first, so that nobody resumes a part."""
    folder = out / CHECKPOINTS
    (folder / RECIPE_FILE).unlink(missing_ok=True)
    if folder.is_dir():
        shutil.rmtree(folder)
