"""The keywords of `from_pretrained`: each is honoured, or refused by name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..errors import InputError
from .auto_config import RoutedConfig

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # What transformers, its pipelines and lm-eval pass on without being asked.
    "_from_auto": (True, False),
    "_from_pipeline": (None, "text-generation"),
    "_commit_hash": (None,),
    "code_revision": (None,),
    # Options of transformers, and the values at which they ask for nothing.
    "adapter_name": (None, "default"),
    "allow_all_kernels": (None, False),
    "device_mesh": (None,),
    "disable_mmap": (None,),
    "distributed_config": (None,),
    "from_flax": (None, False),
    "from_tf": (None, False),
    "fusion_config": (None,),
    "generation_config": (None,),
    "gguf_file": (None,),
    "ignore_mismatched_sizes": (None, False),
    "kernel_config": (None,),
    "key_mapping": (None,),
    "low_cpu_mem_usage": (None, True, False),
    "max_memory": (None,),
    "offload_buffers": (None, False),
    "offload_folder": (None,),
    "output_loading_info": (None, False),
    "proxies": (None,),
    "quantization_config": (None,),
    "load_in_4bit": (None, False),
    "load_in_8bit": (None, False),
    "state_dict": (None,),
    "tp_plan": (None,),
    "tp_size": (None,),
    "use_kernels": (None, False),
    "use_safetensors": (None, True),
    "variant": (None,),
    "weights_only": (None, True),
}

_REMEDIES = {
    "quantization_config": "Load it as it is; on a CPU set_execution('native', weights='int8') packs its weights",
    "load_in_4bit": "Load it as it is; on a CPU set_execution('native', weights='int4') packs its weights",
    "load_in_8bit": "Load it as it is; on a CPU set_execution('native', weights='int8') packs its weights",
    "generation_config": "Set model.generation_config after loading",
    "state_dict": "Load the folder, then use load_state_dict",
    "gguf_file": "Name the .gguf file as base=",
    "use_safetensors": "Pickled weights can run code when read",
    "weights_only": "Pickles are never read",
}

_CONFIG_BOOKKEEPING = frozenset(
    (
        *("name_or_path", "_name_or_path", "transformers_version", "architectures", "auto_map", "dtype"),
        *("torch_dtype", "model_type", "_attn_implementation_internal", "_commit_hash"),
    )
)


@dataclass(frozen=True)
class HubOptions:
    """Where and how files of the Hub are read and kept."""

    revision: str | None = None
    token: str | bool | None = None
    cache_dir: str | Path | None = None
    local_files_only: bool = False
    force_download: bool = False

    @property
    def special(self) -> dict[str, Any]:
        """Those that the model loader does not know, where they are not at their defaults."""
        chosen: dict[str, Any] = {}
        if self.cache_dir is not None:
            chosen["cache_dir"] = str(self.cache_dir)
        if self.local_files_only:
            chosen["local_files_only"] = True
        if self.force_download:
            chosen["force_download"] = True
        return chosen


def check_unknown(options: dict[str, Any]) -> None:
    """Raises TypeError for keywords that nobody knows, InputError for those of transformers that ask for something."""
    for name, value in options.items():
        if name == "adapter_kwargs":  # AutoModel adds where the Hub's adapter would be
            if set(value or {}) - {"revision", "token"}:
                raise InputError(f"adapter_kwargs = {value!r} is not supported", "Put the adapter into lora/")
        elif name not in _NEUTRAL:
            raise TypeError(f"from_pretrained() got an unexpected keyword argument {name!r}")
        elif not any(value is neutral or (type(value) is str and value == neutral) for neutral in _NEUTRAL[name]):
            raise InputError(
                f"{name} = {_shown(value)} is not supported for routed models",
                _REMEDIES.get(name, "Leave it out"),
            )


def chosen_dtype(dtype: torch.dtype | str | None, torch_dtype: torch.dtype | str | None) -> torch.dtype | str:
    """`dtype`, or what its former name says. Raises TypeError when they contradict each other."""
    given = [value for value in (dtype, torch_dtype) if value is not None]
    names = {str(value).removeprefix("torch.") for value in given}
    if len(names) > 1:
        raise TypeError(f"dtype = {dtype} and torch_dtype = {torch_dtype} contradict each other: give dtype")
    return given[0] if given else "auto"


def chosen_device(device: torch.device | str | None, device_map: Any) -> torch.device | str:
    """The one device that `device` or `device_map` names. Raises InputError for a map over several."""
    if device_map is None:
        return "cpu" if device is None else device
    mapped = device_map
    if isinstance(device_map, dict):
        mapped = device_map[""] if set(device_map) == {""} else None
    if isinstance(mapped, int) and not isinstance(mapped, bool):
        mapped = f"cuda:{mapped}"
    if mapped in ("auto", "balanced", "balanced_low_0", "sequential"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        mapped = None if count > 1 else "cuda" if count else "cpu"
    if not isinstance(mapped, (str, torch.device)) or str(mapped) in ("disk", "meta"):
        raise InputError(
            f"device_map = {_shown(device_map)} is not one device: a routed model is not spread",
            "Give device=, such as 'cuda:0'",
        )
    if device is not None and torch.device(device) != torch.device(mapped):
        raise TypeError(f"device = {device} and device_map = {_shown(device_map)} contradict each other: give device")
    return mapped


def check_execution(execution: Any, kv: Any, merge_lora: Any, base: Any) -> None:
    """What loading would find out only after all work. Raises InputError or TypeError."""
    if execution not in ("sparse", "masked", "native"):
        raise InputError(f"execution {execution!r} is not known", "Choose sparse, masked or native")
    if kv not in (None, "keep", "drop"):
        raise InputError(f"kv {kv!r} is not known", "Choose keep or drop")
    if not isinstance(merge_lora, bool):
        raise TypeError(f"merge_lora must be True or False, not {merge_lora!r}")
    if base is None or isinstance(base, (str, Path)):
        return
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"base must be a model reference or a transformers model, not a {type(base).__name__}")
    if hasattr(base, "routing_config"):
        raise InputError("the base model is routed already", "Load the dense base model once more, or copy it before")


def check_base_object(base: Any, dtype: Any, device: Any, device_map: Any) -> None:
    """A live base model stays where and what it is. Raises InputError where it was asked to be something else."""
    if dtype not in (None, "auto") and str(base.dtype).removeprefix("torch.") != str(dtype).removeprefix("torch."):
        raise InputError(f"dtype = {dtype}, but the base model given is {base.dtype}", "Convert it, or leave dtype out")
    if device is None and device_map is None:
        return
    wanted = torch.device(chosen_device(device, device_map))
    if wanted.type != base.device.type or wanted.index not in (None, base.device.index):
        raise InputError(f"device = {wanted}, but the base model given is on {base.device}", "Move it there first")


def attention_of(config: Any, folder: Path, attn_implementation: str | None) -> str | None:
    """The attention asked for, by keyword or by a configuration that AutoModel has made of keywords.

    Raises InputError for a configuration that asks for anything else than the folder's own.
    """
    if config is None:
        return attn_implementation
    if isinstance(config, (str, Path)):
        raise InputError(f"config = {str(config)!r} is not supported", "Leave it out: the folder has its own")
    if getattr(config, "model_type", None) != RoutedConfig.model_type:
        raise InputError(
            f"config of the type {getattr(config, 'model_type', type(config).__name__)!r} is not supported",
            "Leave it out: the base model brings its own",
        )
    try:
        own = RoutedConfig.from_pretrained(folder).to_dict()
    except (OSError, ValueError) as error:
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(f"{folder / 'config.json'} is damaged ({reason})", "Copy the folder again") from None
    asked = config.to_dict()
    for key in sorted(asked.keys() | own.keys()):
        if key not in _CONFIG_BOOKKEEPING and asked.get(key) != own.get(key):
            raise InputError(
                f"{key} = {_shown(asked.get(key))} is not an option of routed models",
                "Leave it out, or set it in model.config after loading",
            )
    return attn_implementation or getattr(config, "_attn_implementation_internal", None)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"a {type(value).__name__}"
