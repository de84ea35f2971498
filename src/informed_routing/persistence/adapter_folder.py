"""The `lora/` of a routing folder: read with care, put onto a model by PEFT, and written again as it was.

PEFT warns, or says nothing, where an adapter does not fit; here each such case is an InputError. No pickle is read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor
from transformers import PreTrainedModel

from ..errors import InputError
from ..files.atomic import disk_error, write_atomically

SETTINGS_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")

_AGAIN = "Fit or copy the folder again"
_ADAPTER = "default"


@dataclass(frozen=True)
class Adapter:
    """A checked adapter: its settings and tensors, and its files as they were."""

    origin: str
    settings: dict[str, Any]
    files: dict[str, bytes]

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The adapter's tensors by name."""
        return load(self.files[WEIGHTS_FILE])

    @property
    def targets(self) -> set[str]:
        """Names of the base model's modules that it changes."""
        return {_module_of(name) for name in self.tensors}

    def same_as(self, folder: Path) -> bool:
        """Whether a folder holds this adapter already."""
        return all(_bytes_of(folder / name) == content for name, content in self.files.items())


def read_adapter(folder: Path) -> Adapter:
    """The adapter of a folder. Raises InputError for pickles, and for what is missing, damaged or no plain LoRA."""
    weights = folder / WEIGHTS_FILE
    if not weights.is_file():
        pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
        if pickles:
            raise InputError(
                f"{folder / pickles[0]} is a pickle, which can run code when read",
                f"Convert it to {WEIGHTS_FILE} (PEFT's save_pretrained writes it)",
            )
        raise InputError(f"{weights} is missing", _AGAIN)
    files = {}
    for path in (folder / SETTINGS_FILE, weights):
        content = _bytes_of(path)
        if content is None:
            raise InputError(f"{path} cannot be read", _AGAIN)
        files[path.name] = content
    settings = _settings(folder / SETTINGS_FILE, files[SETTINGS_FILE])
    try:
        tensors = load(files[WEIGHTS_FILE])
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise InputError(f"{weights} is damaged ({_first_line(error)})", _AGAIN) from None
    if not tensors:
        raise InputError(f"{weights} holds no tensors", _AGAIN)
    for name, tensor in tensors.items():
        check_numbers(f"{name} of {weights}", tensor)
    widest = max(max(tensor.shape, default=0) for tensor in tensors.values())
    for rank in (settings["r"], *settings.get("rank_pattern", {}).values()):
        if rank > widest:  # found before PEFT asks for so much memory
            raise InputError(f"{folder / SETTINGS_FILE}: the rank r = {rank} does not fit {WEIGHTS_FILE}", _AGAIN)
    return Adapter(str(folder), settings, files)


def check_numbers(what: str, tensor: Tensor) -> None:
    """Raises InputError unless a tensor holds finite numbers of one of the three floating-point types."""
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise InputError(f"{what} is {kind}, not float32, bfloat16 or float16", _AGAIN)
    if not bool(torch.isfinite(tensor).all()):
        raise InputError(f"{what} holds NaN or infinite numbers", _AGAIN)


def put_on(model: PreTrainedModel, adapter: Adapter, *, merge: bool) -> PreTrainedModel:
    """The model with the adapter, merged into its weights or live. Raises InputError when it does not fit the model.

    The model is changed in place, also where this raises: see `restored_on_failure`.
    """
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    known = {field.name for field in dataclasses.fields(LoraConfig)}
    chosen = {key: value for key, value in adapter.settings.items() if key in known}
    try:
        adapted: Any = get_peft_model(cast(Any, model), LoraConfig(**chosen), adapter_name=_ADAPTER)
        wanted = get_peft_model_state_dict(adapted, adapter_name=_ADAPTER, save_embedding_layers=False)
    except Exception as error:  # PEFT raises all sorts for settings that it cannot work with
        raise InputError(f"the adapter {adapter.origin} cannot be used: {_first_line(error)}", _AGAIN) from None
    tensors = adapter.tensors
    _check_fit(adapter, tensors, wanted)
    set_peft_model_state_dict(adapted, tensors, adapter_name=_ADAPTER)
    base = adapted.get_base_model()
    if merge:
        base = adapted.merge_and_unload()
        if hasattr(base, "peft_config"):
            del base.peft_config  # it would say that there still is an adapter
    return cast(PreTrainedModel, base)


def changed_weights(model: torch.nn.Module, adapter: Adapter) -> list[torch.nn.Parameter]:
    """The weights that merging an adapter changes."""
    return [
        parameter
        for name, module in model.named_modules()
        if name in adapter.targets
        for parameter in module.parameters(recurse=False)
    ]


def live_state(model: torch.nn.Module) -> str | None:
    """What live LoRA layers do to a model now, as a digest; None when they are merged, switched off or several."""
    found = hashlib.sha256()
    for name, module in model.named_modules():
        layer: Any = module
        if not (hasattr(layer, "base_layer") and hasattr(layer, "active_adapters")):
            continue
        if layer.merged or layer.disable_adapters or list(layer.active_adapters) != [_ADAPTER]:
            return None
        scaling = getattr(layer, "scaling", {})
        if set(scaling) != {_ADAPTER}:
            return None
        found.update(f"{name} {scaling[_ADAPTER]!r}\n".encode())
        for key, parameter in layer.named_parameters():
            if not key.startswith("base_layer."):
                found.update(key.encode())
                found.update(parameter.detach().float().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def write_adapter(adapter: Adapter, folder: Path) -> None:
    """Write the adapter's files as they were read, whole or not at all; `folder` must hold it already or not exist."""
    if folder.is_dir():
        return
    building = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(building, ignore_errors=True)
    for name, content in adapter.files.items():
        write_atomically(building / name, lambda path, content=content: _write(path, content))  # type: ignore[misc]
    try:
        building.rename(folder)
    except OSError as error:
        raise disk_error(folder, error) from error


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def _bytes_of(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _check_fit(adapter: Adapter, tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    where, remedy = f"{adapter.origin}/{WEIGHTS_FILE}", "It is of another model, or damaged: fit or copy it again"
    foreign = sorted(tensors.keys() - wanted.keys())
    if foreign:
        raise InputError(f"{where} holds {foreign[0]}, which this model has no place for", remedy)
    missing = sorted(wanted.keys() - tensors.keys())
    if missing:
        raise InputError(f"{where} lacks {missing[0]}", remedy)
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            shapes = f"{tuple(tensor.shape)}, not {tuple(wanted[name].shape)}"
            raise InputError(f"{name} of {where} has the shape {shapes}", remedy)


def _module_of(name: str) -> str:
    """The module of the base model that a PEFT tensor belongs to."""
    parts = name.removeprefix("base_model.model.").split(".")
    for place, part in enumerate(parts):
        if part.startswith("lora_"):
            return ".".join(parts[:place])
    return ".".join(parts[:-1])


# -- settings -----------------------------------------------------------------------------------------------

_INITS = ("gaussian", "eva", "orthogonal")
"""Ways to start an adapter that leave the base weights alone; PEFT repeats the start when it loads."""


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(one, str) for one in value))


def _pattern(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    def whole(value: Any) -> bool:
        return isinstance(value, dict) and all(check(one) for one in value.values())

    return whole


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _layers(value: Any) -> bool:
    return all(
        isinstance(one, int) and not isinstance(one, bool) and one >= 0
        for one in (value if isinstance(value, list) else [value])
    )


def _anything(value: Any) -> bool:
    return True


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "peft_type": lambda value: value == "LORA",
    "task_type": lambda value: value == "CAUSAL_LM",
    "r": _rank,
    "lora_alpha": _number,
    "lora_dropout": lambda value: _number(value) and 0 <= value < 1,
    "target_modules": lambda value: _names(value) and bool(value),
    "exclude_modules": _names,
    "modules_to_save": _names,
    "layers_to_transform": _layers,
    "layers_pattern": _names,
    "rank_pattern": _pattern(_rank),
    "alpha_pattern": _pattern(_number),
    "bias": lambda value: value in ("none", "all", "lora_only"),
    "fan_in_fan_out": _flag,
    "use_rslora": _flag,
    "use_dora": _flag,
    "lora_bias": _flag,
    "inference_mode": _flag,
    "init_lora_weights": lambda value: isinstance(value, bool) or value in _INITS,
}
"""Settings that change what an adapter does, with what they may be; null is the default of all but the first ones."""

_NEEDED = ("peft_type", "r", "target_modules")
_BOOKKEEPING = ("base_model_name_or_path", "revision", "auto_mapping", "peft_version", "megatron_core")


def _settings(path: Path, content: bytes) -> dict[str, Any]:
    try:
        settings = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged ({_first_line(error)})", _AGAIN) from None
    if not isinstance(settings, dict):
        raise InputError(f"{path} is damaged (no mapping of settings)", _AGAIN)
    for key in _NEEDED:
        if settings.get(key) is None:
            raise InputError(f"{path} is damaged ({key} is missing)", _AGAIN)
    defaults = _defaults()
    kept: dict[str, Any] = {}
    for key, value in settings.items():
        if key in _BOOKKEEPING or value is None:
            continue
        shown = repr(value)[:60]
        if key in _CHECKS:
            if not _CHECKS[key](value):
                raise InputError(f"{path}: {key} = {shown} cannot be used", _AGAIN)
            kept[key] = value
        elif value not in (False, {}, [], "") and value != defaults.get(key):
            # A setting that this package does not know may change what the adapter does.
            raise InputError(f"{path}: {key} = {shown} is not supported", "Merge the adapter into the base model")
    return {"inference_mode": True, **kept, "init_lora_weights": True}


def _defaults() -> dict[str, Any]:
    from peft import LoraConfig

    return {field.name: field.default for field in dataclasses.fields(LoraConfig)}


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
