"""What a fit reads besides its recipe, as digests: a resumed fit must not go on with other text or another base."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..config.recipe import Recipe
from ..errors import InputError
from ..files.atomic import write_json
from .folder import INPUTS_FILE
from .texts import Texts


def write_inputs(checkpoints: Path, model: Any, text: Texts, recipe: Recipe) -> None:
    """Keep the digests of the base model and of the texts that have been read."""
    write_json(checkpoints / INPUTS_FILE, _digests(model, text, recipe))


def check_inputs(checkpoints: Path, model: Any, text: Texts, recipe: Recipe) -> None:
    """Raises InputError when the base model or a text is not what the interrupted fit began with."""
    path = checkpoints / INPUTS_FILE
    if not path.is_file():  # a fit of an earlier version, or killed before it knew
        return
    try:
        stored = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise InputError(f"{path} is damaged", "Use --overwrite to fit anew") from None
    for name, digest in _digests(model, text, recipe).items():
        if stored.get(name, digest) != digest:
            raise InputError(
                f"{checkpoints.parent} was begun with another {name}: its content has changed since",
                "Put the old one back, or use --overwrite to fit anew",
            )


def _digests(model: Any, text: Texts, recipe: Recipe) -> dict[str, str]:
    found = {f"base model {recipe.model}": model.routing_config.base_model.fingerprint}
    for (split, length), rows in text.packed():
        digest = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
        found[f"text ({split}, rows of {length} tokens of {', '.join(recipe.data)})"] = digest
    return found
