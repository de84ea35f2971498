"""Folders of statically pruned models, and how they are written.

Depth pruning leaves an ordinary model folder, and `pruning.json` in it only says how it came about. A dropped or sliced
model has `pruning.json` say its shape, `model.safetensors` hold what is left, and a `config.json` whose model type only
this package knows: transformers would otherwise fill the missing weights with random numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError

from ..assets.gguf import quiet_transformers
from ..config.parts import UnitKind
from ..errors import InputError
from ..files.atomic import system_error, write_json, write_tensors
from ..files.folders import put_folder
from ..models.fingerprint import live_adapters
from ..training.folder import of_tokenizer
from .remaining import dropped_units, sliced_width
from .report import PruneReport
from .saving import LAST, PRUNING_FILE, is_ours

MODEL_TYPE = "informed_routing_static"
FORMAT_VERSION = 1


class StaticFolder(BaseModel):
    """The content of `pruning.json`."""

    model_config = ConfigDict(frozen=True)

    format_version: int = FORMAT_VERSION
    model_type: str
    dropped: tuple[tuple[int, UnitKind], ...] = ()
    width: int | None = None
    full_width: int | None = None
    report: PruneReport | None = None

    @property
    def plain(self) -> bool:
        """Whether the folder is an ordinary model folder."""
        return not self.dropped and self.width is None


def is_static_folder(path: str | Path) -> bool:
    """Whether `save_static` has written this folder."""
    return (Path(path) / PRUNING_FILE).is_file()


def save_static(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Write a pruned model, with its tokenizer (or None) and its `prune_report`, if any.

    What the folder held of an earlier one stays until all is written, and then goes, with the checkpoints; other files
    stay, and those of a tokenizer too where none is given. Raises InputError for live adapters, which must be merged,
    and WorkError when the disk is full or not writable.
    """
    if adapters := live_adapters(model):
        raise InputError(f"the model carries the live adapter {adapters[0]!r}", "Merge it (merge_and_unload) first")
    width = sliced_width(model)
    content = StaticFolder(
        model_type=model.config.model_type,
        dropped=tuple(dropped_units(model)),
        width=width,
        full_width=None if width is None else model.model.norm.full_width,
        report=getattr(model, "prune_report", None),
    )

    def write(new: Path) -> None:
        if content.plain:
            try:
                with quiet_transformers():
                    model.save_pretrained(new)
            except SafetensorError as error:
                raise system_error(error) from error
        else:
            # Tied parameters have one name among the named ones.
            write_tensors(new / "model.safetensors", dict(model.named_parameters()), {"format": "pt"})
            model.generation_config.save_pretrained(new)
            write_json(new / "config.json", {**json.loads(model.config.to_json_string()), "model_type": MODEL_TYPE})
        if tokenizer is not None:
            tokenizer.save_pretrained(new)
        write_json(new / PRUNING_FILE, content.model_dump(mode="json"))

    def ours(name: str) -> bool:
        return is_ours(name) and not (tokenizer is None and of_tokenizer(name))

    put_folder(Path(folder), write, ours=ours, last=LAST)
