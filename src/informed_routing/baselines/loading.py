"""Statically pruned models from the folders that `writing.py` makes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from ..assets import load_model, load_tokenizer
from ..assets.models import resolve_dtype
from ..errors import InputError
from ..models.facts import config_facts
from ..persistence.adapter_folder import check_numbers
from .dropping import drop_units
from .saving import PRUNING_FILE
from .sliced import reshape_sliced
from .writing import FORMAT_VERSION, StaticFolder

_REMEDY = "Prune the model again, or copy the folder again"


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
