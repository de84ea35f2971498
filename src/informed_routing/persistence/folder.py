"""Routing folders: a small artefact beside the base model, as a PEFT adapter is.

routing_config.json            settings, base model reference and fingerprint, thresholds
routing.safetensors            routers and forecasters, and which neurons slices have
lora/                          the stage 3 adapter, if any
config.json                    lets AutoModelForCausalLM recognise the folder; thresholds by context
modeling_informed_routing.py   lets it do so in programs that import only transformers (with trust_remote_code)
generation_config.json         the base model's
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..assets.models import DEMO_ROUTED, resolve_model
from ..config.folder import RoutingConfig
from ..errors import InputError, WorkError
from ..files.atomic import disk_error, write_several
from ..models.decoder import layers_of, text_config
from ..models.fingerprint import mismatch
from .adapter_folder import Adapter, check_numbers
from .base_location import path_between
from .later_columns import AUTO_FILE, columns_of, with_columns, without_columns
from .load_options import HubOptions

CONFIG_FILE = "routing_config.json"
TENSOR_FILE = "routing.safetensors"
LORA_FOLDER = "lora"
GENERATION_FILE = "generation_config.json"
MODULE = "modeling_informed_routing"

FILES = (CONFIG_FILE, TENSOR_FILE, AUTO_FILE, GENERATION_FILE, f"{MODULE}.py")
"""What `save` writes."""

AGAIN = "Fit or download the routing folder again"

_AUTO_CONFIG = {
    "model_type": "informed_routing",
    "architectures": ["RoutedModelForCausalLM"],
    "auto_map": {
        "AutoConfig": f"{MODULE}.RoutedConfig",
        "AutoModelForCausalLM": f"{MODULE}.RoutedModelForCausalLM",
    },
}

_MODULE_TEXT = '''"""Lets transformers load this folder with trust_remote_code; needs `pip install informed-routing`."""

from informed_routing.routed_model import RoutedConfig, RoutedModelForCausalLM

__all__ = ["RoutedConfig", "RoutedModelForCausalLM"]
'''

DISORDER = 0.08
"""Share of units by which a table may fall while its thresholds rise. Later decisions depend on earlier ones."""


@dataclass
class Origin:
    """What a routed model was loaded from, for saving to know whether it still is that."""

    exact: tuple[str, str] | None = None
    """(dtype, digest) of the base model's weights as they were loaded."""
    adapter: Adapter | None = None
    merged: dict[str, str] = field(default_factory=dict)
    """Digests, by dtype, of the weights with the adapter in them."""
    live: str | None = None
    """`live_state` of the adapter where it was not merged."""


def is_routing_folder(path: str | Path) -> bool:
    """Whether a path is a routing folder, by its configuration file."""
    return (Path(path) / CONFIG_FILE).is_file()


def save(model: Any, folder: Path, tensors: dict[str, Tensor] | None = None, *, portable: bool = False) -> None:
    """Write configuration and tensors of a routed model; other files of the folder stay.

    Whether the base model still is what the configuration says is not looked at: `saving.save_checked` does.
    `tensors` replace the model's own routers and forecasters. A `portable` folder will be elsewhere when it is read.
    """
    found = routing_tensors(model) if tensors is None else tensors
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}
    config: RoutingConfig = model.routing_config
    try:
        for name, tensor in ready.items():
            _check_tensor(f"{name} of the routing", tensor)
    except InputError as error:
        raise WorkError(error.what, "It would be refused on loading: train it again") from None
    wrong = _nonsense(config)
    if wrong:
        raise WorkError(f"the routing would be refused on loading: {wrong}", "Calibrate it again")
    base = config.base_model.model_copy(update={"near": None if portable else path_between(folder, config.base_model)})
    config = config.model_copy(update={"base_model": base})

    def write(building: Path) -> None:
        auto = json.dumps({**_AUTO_CONFIG, **columns_of(config)}, indent=2) + "\n"
        (building / AUTO_FILE).write_text(auto, encoding="utf-8")
        (building / f"{MODULE}.py").write_text(_MODULE_TEXT, encoding="utf-8")
        if getattr(model, "generation_config", None) is not None:
            text = model.generation_config.to_json_string()
            (building / GENERATION_FILE).write_text(text, encoding="utf-8")
        save_file(ready, str(building / TENSOR_FILE), metadata={"format": "pt"})
        (building / CONFIG_FILE).write_text(without_columns(config), encoding="utf-8")

    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Renamed in the order of their names: a folder with the configuration, which is the last, is complete.
        write_several(folder, write)
    except SafetensorError as error:  # it wraps the operating system's error in its message
        import errno

        full = errno.ENOSPC if "No space left" in str(error) else errno.EIO
        raise disk_error(folder / TENSOR_FILE, OSError(full, str(error))) from error
    except OSError as error:
        raise disk_error(folder, error) from error


def locate(reference: str | Path, subfolder: str = "", hub: HubOptions | None = None) -> Path:
    """The local folder of a routing reference, downloading it from the Hub if need be."""
    hub = hub or HubOptions()
    if str(reference) == DEMO_ROUTED:
        if subfolder or hub.revision not in (None, "main"):
            raise InputError(f"{DEMO_ROUTED} has no revisions and no folders", "Leave out revision and subfolder")
        return Path(resolve_model(DEMO_ROUTED).path_or_id)
    path = Path(reference).expanduser()
    if path.exists():
        path = path / subfolder
        if hub.revision not in (None, "main"):
            raise InputError(f"revision = {hub.revision!r}, but {reference} is a folder", "Leave out revision")
        if is_routing_folder(path):
            return path
        raise InputError(f"{path} is no routing folder: it has no {CONFIG_FILE}", "Give the --out folder of `fit`")
    if len(path.parts) == 2 and not path.is_absolute():
        from huggingface_hub import snapshot_download

        names = [*FILES[:-1], f"{LORA_FOLDER}/*", "token*", "*.jinja", "README.md"]
        prefix = f"{subfolder.strip('/')}/" if subfolder else ""
        try:
            found = snapshot_download(
                str(reference),
                allow_patterns=[prefix + name for name in names],
                revision=hub.revision,
                token=hub.token,
                **hub.special,
            )
        except Exception as error:
            at = f" at revision {hub.revision}" if hub.revision else ""
            raise InputError(
                f"{reference} is neither a folder nor a reachable Hub id{at} ({type(error).__name__})",
                "Check the spelling or give a local routing folder",
            ) from None
        folder = Path(found) / subfolder
        if is_routing_folder(folder):
            return folder
    where = f"{reference}, subfolder {subfolder!r}," if subfolder else str(reference)
    raise InputError(f"routing folder {where} does not exist", "Give the --out folder of `fit`")


def read_config(folder: Path) -> RoutingConfig:
    """The checked configuration of a folder. Raises InputError when it is missing, damaged or says nonsense."""
    path = folder / CONFIG_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}", AGAIN) from None
    config = with_columns(RoutingConfig.from_json(text, str(path)), folder, AGAIN)
    wrong = _nonsense(config)
    if wrong:
        raise InputError(f"{path} is damaged: {wrong}", AGAIN)
    return config


def _nonsense(config: RoutingConfig) -> str | None:
    place = _not_finite(config.model_dump(), "")
    if place:
        return f"{place} is no finite number"
    if not 0 <= config.sparsity < 1:
        return f"sparsity {config.sparsity} is not between 0 and 1"
    for name in ("num_layers", "hidden_size", "calibration_context"):
        if getattr(config, name) < 1:
            return f"{name} = {getattr(config, name)}"
    rows = sorted(config.thresholds, key=lambda row: row.threshold)
    for row, following in itertools.pairwise(rows):
        if following.units < row.units - DISORDER:
            return f"thresholds: {following.threshold} approximates less ({following.units}) than {row.threshold}"
    for row in rows:
        for name in ("units", "attention", "ffn"):
            if not -1e-6 <= getattr(row, name) <= 1 + 1e-6:
                return f"thresholds: {name} {getattr(row, name)} is no share"
    return None


def _not_finite(node: Any, where: str) -> str | None:
    items: Any = ()
    if isinstance(node, dict):
        items = node.items()
    elif isinstance(node, (list, tuple)):
        items = enumerate(node)
    elif isinstance(node, float) and not math.isfinite(node):
        return where
    for key, value in items:
        found = _not_finite(value, f"{where}.{key}" if where else str(key))
        if found:
            return found
    return None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file. Raises InputError when it is missing, damaged, or holds no finite numbers."""
    try:
        tensors = load_file(str(path))
    except FileNotFoundError:
        raise InputError(f"{path} is missing", AGAIN) from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is damaged ({reason})", AGAIN) from None
    for name, tensor in tensors.items():
        _check_tensor(f"{name} of {path}", tensor)
    return tensors


def _check_tensor(what: str, tensor: Tensor) -> None:
    """Choices of neurons are whole numbers: whether they can be is looked at where they are put to use."""
    if tensor.dtype != torch.int64:
        check_numbers(what, tensor)


def check_base(folder: Path, model: Any) -> None:
    """Raises InputError when a routing folder was not fitted on a model, which may be routed by now."""
    check_base_of(folder, read_config(folder), model)


def check_base_of(folder: Path, config: RoutingConfig, model: Any) -> None:
    """`check_base` for a folder whose configuration has been read."""
    wanted, text = config.base_model, text_config(model)
    reason, model_type = None, model.config.model_type
    if model_type != wanted.model_type:
        reason = f"it is of the family {model_type}, not {wanted.model_type}"
    elif (layers := len(layers_of(model))) != config.num_layers:
        reason = f"it has {layers} layers, not {config.num_layers}"
    elif text.hidden_size != config.hidden_size:
        reason = f"its hidden size is {text.hidden_size}, not {config.hidden_size}"
    else:
        reason = mismatch(model, wanted)
    if reason is None:
        return
    hint = ""
    if wanted.weights is None and model.dtype == torch.float16:
        hint = "; this folder is of an earlier version, which cannot recognise float16: load it in another dtype"
    raise InputError(
        f"wrong base model: {folder} was fitted on {wanted.name or 'another one'}, and of this one {reason}",
        f"Give the model it was fitted on (--base MODEL, base=){hint}",
    )


def load_routing_tensors(model: Any, path: Path) -> None:
    """Copy stored routers and forecasters into a routed model, whose dtype and device they take."""
    copy_tensors(model, read_tensors(path), path)


def copy_tensors(model: Any, stored: dict[str, Tensor], path: Path) -> None:
    """Copy tensors by name. Raises InputError when names or shapes are others than the model's, or values cannot be."""
    wanted = routing_tensors(model)
    odd = sorted(stored.keys() ^ wanted.keys())
    odd += [name for name, tensor in wanted.items() if not odd and not _alike(stored[name], tensor)]
    if odd:
        raise InputError(f"{path} does not fit {CONFIG_FILE} beside it ({odd[0]})", AGAIN)
    with torch.no_grad():
        for name, tensor in wanted.items():
            tensor.copy_(stored[name])
    for unit in model.units:
        if unit.forecaster is not None and (fault := unit.forecaster.fault()):
            raise InputError(f"{path} is damaged: layer {unit.index // 2} {unit.kind}: {fault}", AGAIN)


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether both have one shape, and are both floating-point or both not."""
    return one.shape == other.shape and one.is_floating_point() == other.is_floating_point()


def routing_tensors(model: Any) -> dict[str, Tensor]:
    """All that a routing folder stores, by its names: the parameters of routers and fallbacks, and their buffers."""
    found: dict[str, Tensor] = dict(model.routing_parameters())
    for unit in model.units:
        place = f"layers.{unit.index // 2}.{unit.kind}"
        found |= {f"{place}.{name}": buffer for name, buffer in unit.named_buffers()}
    return found
