"""The folder that pruning writes: what may be there before it begins, and how an interrupted run is known again."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files.atomic import write_json
from ..files.folders import CHECKPOINTS
from ..training.folder import is_temporary, of_tokenizer

PRUNING_FILE = "pruning.json"
LAST = ("config.json", PRUNING_FILE)
"""The files that make a folder a model, and a pruned one."""

PRUNE_FILE, RECOVERY_FILE = "prune.json", "recovery.safetensors"
"""In the checkpoints: what the run was begun with; where its recovery training stands."""

_RESULT = (*LAST, "generation_config.json", "model.safetensors", "model.safetensors.index.json")


def is_ours(name: str) -> bool:
    """Whether pruning may have written a file or folder of that name."""
    known = (*_RESULT, CHECKPOINTS)
    shard = re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name)
    return name in known or shard is not None or of_tokenizer(name) or is_temporary(name, known)


def foreign(folder: Path) -> str | None:
    """Something in a folder that pruning has not written; None where there is nothing of the kind."""
    for path in sorted(folder.iterdir()):
        if not is_ours(path.name) or (path.name == CHECKPOINTS and not path.is_dir()):
            return path.name
        if path.name == CHECKPOINTS:
            known = (PRUNE_FILE, RECOVERY_FILE)
            for entry in sorted(path.iterdir()):
                if entry.name not in known and not is_temporary(entry.name, known):
                    return f"{path.name}/{entry.name}"
    return None


def check_folder(folder: Path, described: Mapping[str, Any], *, resume: bool, overwrite: bool) -> bool:
    """Whether to go on with an interrupted run of the settings `described`, which the same command does by itself.

    Raises InputError for a folder that holds anything else, unless it is a pruned model and may be overwritten.
    """
    if not folder.is_dir() or not any(not is_temporary(path.name, ()) for path in folder.iterdir()):
        return False
    stranger, finished = foreign(folder), (folder / PRUNING_FILE).is_file()
    begun = (folder / CHECKPOINTS / PRUNE_FILE).is_file()
    trained = (folder / CHECKPOINTS / RECOVERY_FILE).is_file()
    if not (finished or begun or trained):
        if stranger is None and {path.name for path in folder.iterdir()} <= {CHECKPOINTS}:
            return False  # killed before it had written what it was begun with
        shown = stranger or sorted(folder.iterdir())[0].name
        raise InputError(f"--out {folder} is not empty: it holds {shown}, but no pruned model", "Give another --out")
    if overwrite:
        if stranger is not None:
            raise InputError(
                f"--out {folder} is not empty: it holds {stranger}, which pruning has not written",
                "Give another --out, or move it away",
            )
        return False
    others = "another --out" if stranger else "another --out, or --overwrite"
    if not begun and not (finished and not resume):
        what = "a finished pruned model" if finished else "a recovery that does not say what it was begun with"
        raise InputError(f"--out {folder} holds {what}", f"Give {others}")
    stored = _stored(folder, others) if begun else {}
    if finished and not resume and stored.get("replaces", True):
        raise InputError(f"--out {folder} is not empty", f"Give {'--resume, ' * begun}{others}")
    wanted = _portable(described)
    for key, value in wanted.items():
        if stored.get(key) != value:
            raise InputError(
                f"--out {folder} was begun with other settings ({key} {stored.get(key)}, now {value})",
                f"Repeat its settings, or give {others}",
            )
    return True


def check_inputs(folder: Path, inputs: Mapping[str, str]) -> None:
    """Raises InputError when an interrupted run read another model or text under the same name."""
    stored = _stored(folder, "another --out, or --overwrite").get("inputs", {})
    for name, digest in inputs.items():
        if stored.get(name) != digest:
            raise InputError(
                f"--out {folder} was begun with another {name}: its content has changed since",
                "Put the old one back, or give --overwrite",
            )


def begin(folder: Path, described: Mapping[str, Any], *, resumed: bool) -> None:
    """Write what an interrupted run has to know. Nothing of an earlier result goes."""
    if resumed:
        return
    checkpoints = folder / CHECKPOINTS
    (checkpoints / PRUNE_FILE).unlink(missing_ok=True)
    if checkpoints.is_dir():
        shutil.rmtree(checkpoints)
    write_json(checkpoints / PRUNE_FILE, {**_portable(described), "replaces": (folder / PRUNING_FILE).is_file()})


def _stored(folder: Path, others: str) -> dict[str, Any]:
    path = folder / CHECKPOINTS / PRUNE_FILE
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise InputError(f"{path} is damaged", f"Give {others}") from None


def _portable(described: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back."""
    return dict(json.loads(json.dumps(described, default=str)))
