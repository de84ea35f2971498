"""Folders of statically pruned models.

Depth pruning leaves an ordinary model folder, and `pruning.json` in it only says how it came about. A dropped or sliced
model has `pruning.json` say its shape, `model.safetensors` hold what is left, and a `config.json` whose model type only
this package knows: transformers would otherwise fill the missing weights with random numbers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from ..assets import load_model, load_tokenizer
from ..assets.gguf import quiet_transformers
from ..assets.models import resolve_dtype
from ..config.parts import UnitKind
from ..errors import InputError
from ..files.atomic import system_error, write_json, write_tensors
from ..files.folders import put_folder
from ..models.facts import config_facts
from ..models.fingerprint import live_adapters
from ..persistence.adapter_folder import check_numbers
from ..training.folder import of_tokenizer
from .dropping import drop_units, dropped_units
from .report import PruneReport
from .saving import LAST, PRUNING_FILE, is_ours
from .sliced import reshape_sliced, sliced_width

MODEL_TYPE = "informed_routing_static"
FORMAT_VERSION = 1

_REMEDY = "Prune the model again, or copy the folder again"


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


def load_static(
    folder: str | Path, dtype: torch.dtype | str = "auto", device: torch.device | str = "cpu"
) -> tuple[Any, Any]:
    """The pruned model of a folder in evaluation mode, and its tokenizer.

    `dtype` as for `load_model`. Raises InputError when something is missing or damaged.
    """
    folder = Path(folder)
    content = _read(folder)
    if content.plain:
        model, tokenizer = load_model(folder, dtype=dtype, device=device)
    else:
        model = _load_reshaped(folder, content, resolve_dtype(dtype, device)).to(device).eval()
        tokenizer = load_tokenizer(folder)
    model.prune_report = content.report
    return model, tokenizer


def _read(folder: Path) -> StaticFolder:
    path = folder / PRUNING_FILE
    if not path.is_file():
        raise InputError(f"{folder} is no folder of a pruned model: it has no {PRUNING_FILE}", "Check the path")
    try:
        content = StaticFolder.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, ValidationError):
        raise InputError(f"{path} is damaged", _REMEDY) from None
    if content.format_version > FORMAT_VERSION:
        raise InputError(
            f"{path} has format {content.format_version}, this version reads up to {FORMAT_VERSION}",
            "Upgrade informed-routing",
        )
    return content


def _load_reshaped(folder: Path, content: StaticFolder, dtype: torch.dtype) -> Any:
    """A dropped or sliced model: built without weights, given its shape, then its tensors."""
    try:
        settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        tensors = load_file(str(folder / "model.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{folder} cannot be read: {reason}", _REMEDY) from None
    if not isinstance(settings, dict):
        raise InputError(f"{folder / 'config.json'} is damaged (no mapping of settings)", _REMEDY)
    for name, tensor in tensors.items():
        check_numbers(f"{name} of {folder / 'model.safetensors'}", tensor)
    settings.pop("model_type", None)
    if content.full_width is not None:
        settings["hidden_size"] = content.full_width
    try:
        config = AutoConfig.for_model(content.model_type, **settings)
        with init_empty_weights(include_buffers=False):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:  # transformers raises all sorts for settings that cannot be
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"{folder / 'config.json'} is damaged ({reason})", _REMEDY) from None
    config_facts(config)  # finite numbers only
    if content.width is not None:
        reshape_sliced(model, content.width)
    drop_units(model, content.dropped)
    try:
        found = model.load_state_dict({n: t.to(dtype) for n, t in tensors.items()}, strict=False, assign=True)
    except RuntimeError as error:
        raise InputError(f"{folder} does not fit its {PRUNING_FILE}: {str(error).splitlines()[0]}", _REMEDY) from None
    model.tie_weights()
    absent = [name for name, parameter in model.named_parameters() if parameter.is_meta]
    if absent or found.unexpected_keys:
        raise InputError(f"{folder} does not fit its {PRUNING_FILE}: {(absent + found.unexpected_keys)[0]}", _REMEDY)
    if (folder / "generation_config.json").is_file():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder)
        except Exception as error:  # a damaged file raises all sorts
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise InputError(f"{folder / 'generation_config.json'} is damaged ({reason})", _REMEDY) from None
    return model
