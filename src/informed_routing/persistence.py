"""Routing folders: a small artefact beside the base model, as a PEFT adapter is.

routing_config.json            settings, base model reference and fingerprint, thresholds
routing.safetensors            routers and forecasters
lora/                          the stage 3 adapter, if any
config.json                    lets AutoModelForCausalLM recognise the folder
modeling_informed_routing.py   lets it do so in programs that import only transformers (with trust_remote_code)
generation_config.json         the base model's
"""

from __future__ import annotations

import itertools
import math
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from .adapter_folder import Adapter, changed_weights, check_numbers, live_state, put_on, read_adapter
from .base_location import fetched, find_base, path_between
from .config import RoutingConfig
from .errors import InputError, WorkError
from .files import disk_error, write_several
from .load_options import HubOptions, attention_of
from .models.fingerprint import base_tensors, digest, dtype_of, live_adapters, mismatch, print_of
from .models.restore import restored_on_failure

CONFIG_FILE = "routing_config.json"
TENSOR_FILE = "routing.safetensors"
LORA_FOLDER = "lora"
GENERATION_FILE = "generation_config.json"
MODULE = "modeling_informed_routing"

FILES = (CONFIG_FILE, TENSOR_FILE, "config.json", GENERATION_FILE, f"{MODULE}.py")
"""What `save` writes."""

_AGAIN = "Fit or download the routing folder again"

_AUTO_CONFIG = """{
  "model_type": "informed_routing",
  "architectures": ["RoutedModelForCausalLM"],
  "auto_map": {
    "AutoConfig": "%(module)s.RoutedConfig",
    "AutoModelForCausalLM": "%(module)s.RoutedModelForCausalLM"
  }
}
"""

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
    return (Path(path) / CONFIG_FILE).is_file()


def save(model: Any, folder: Path, tensors: dict[str, Tensor] | None = None, *, portable: bool = False) -> None:
    """Write configuration and tensors of a routed model; other files of the folder stay.

    Whether the base model still is what the configuration says is not looked at: `saving.save_checked` does.
    `tensors` replace the model's own routers and forecasters. A `portable` folder will be elsewhere when it is read.
    """
    found = dict(model.routing_parameters()) if tensors is None else tensors
    ready = {name: tensor.detach().cpu().contiguous() for name, tensor in found.items()}
    config: RoutingConfig = model.routing_config
    try:
        for name, tensor in ready.items():
            check_numbers(f"{name} of the routing", tensor)
    except InputError as error:
        raise WorkError(error.what, "It would be refused on loading: train it again") from None
    wrong = _nonsense(config)
    if wrong:
        raise WorkError(f"the routing would be refused on loading: {wrong}", "Calibrate it again")
    base = config.base_model.model_copy(update={"near": None if portable else path_between(folder, config.base_model)})
    config = config.model_copy(update={"base_model": base})

    def write(building: Path) -> None:
        (building / "config.json").write_text(_AUTO_CONFIG % {"module": MODULE}, encoding="utf-8")
        (building / f"{MODULE}.py").write_text(_MODULE_TEXT, encoding="utf-8")
        if getattr(model, "generation_config", None) is not None:
            text = model.generation_config.to_json_string()
            (building / GENERATION_FILE).write_text(text, encoding="utf-8")
        save_file(ready, str(building / TENSOR_FILE), metadata={"format": "pt"})
        (building / CONFIG_FILE).write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")

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
        raise InputError(f"{path} cannot be read: {error}", _AGAIN) from None
    config = RoutingConfig.from_json(text, str(path))
    wrong = _nonsense(config)
    if wrong:
        raise InputError(f"{path} is damaged: {wrong}", _AGAIN)
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
    """Tensors of a safetensors file. Raises InputError when it is missing, damaged, or holds no finite floats."""
    try:
        tensors = load_file(str(path))
    except FileNotFoundError:
        raise InputError(f"{path} is missing", _AGAIN) from None
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{path} is damaged ({reason})", _AGAIN) from None
    for name, tensor in tensors.items():
        check_numbers(f"{name} of {path}", tensor)
    return tensors


def check_base(folder: Path, model: Any) -> None:
    """Raises InputError when a routing folder was not fitted on a model, which may be routed by now."""
    _check_base(folder, read_config(folder), model)


def _check_base(folder: Path, config: RoutingConfig, model: Any) -> None:
    wanted, settings = config.base_model, model.config
    reason = None
    if settings.model_type != wanted.model_type:
        reason = f"it is of the family {settings.model_type}, not {wanted.model_type}"
    elif settings.num_hidden_layers != config.num_layers:
        reason = f"it has {settings.num_hidden_layers} layers, not {config.num_layers}"
    elif settings.hidden_size != config.hidden_size:
        reason = f"its hidden size is {settings.hidden_size}, not {config.hidden_size}"
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
    _copy_tensors(model, read_tensors(path), path)


def _copy_tensors(model: Any, stored: dict[str, Tensor], path: Path) -> None:
    wanted = dict(model.routing_parameters())
    odd = sorted(stored.keys() ^ wanted.keys())
    odd += [name for name, parameter in wanted.items() if not odd and stored[name].shape != parameter.shape]
    if odd:
        raise InputError(f"{path} does not fit {CONFIG_FILE} beside it ({odd[0]})", _AGAIN)
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(stored[name])


def load(
    reference: str | Path,
    *,
    dtype: torch.dtype | str,
    device: torch.device | str,
    base: str | Path | PreTrainedModel | None,
    execution: Any,
    kv: Any,
    merge_lora: bool,
    trust_remote_code: bool,
    attn_implementation: str | None = None,
    subfolder: str = "",
    config: Any = None,
    hub: HubOptions | None = None,
) -> Any:
    """See `RoutedModelForCausalLM.from_pretrained`."""
    hub = hub or HubOptions()
    folder = locate(reference, subfolder, hub)
    # Whatever can be wrong with the folder is found before anything is done to a model.
    settings = read_config(folder)
    attention = attention_of(config, folder, attn_implementation)
    tensors = read_tensors(folder / TENSOR_FILE)
    widest = max((max(tensor.shape, default=0) for tensor in tensors.values()), default=0)
    if (settings.router.width or 0) > widest:  # found before so much memory is asked for
        raise InputError(f"router.width {settings.router.width} does not fit {folder / TENSOR_FILE}", _AGAIN)
    adapter = read_adapter(folder / LORA_FOLDER) if (folder / LORA_FOLDER).is_dir() else None
    generation = _generation_config(folder)
    if isinstance(base, PreTrainedModel):
        model, given = base, True
        adapters = live_adapters(model)
        if adapters:
            raise InputError(f"the base model carries the adapter {adapters[0]!r}", "Take it off first (unload)")
    else:
        model, settings = _load_base(folder, settings, base, dtype, device, trust_remote_code, hub)
        given = False
    changed = changed_weights(model, adapter) if given and adapter is not None and merge_lora else []
    with restored_on_failure(model, changed) if given else nullcontext():
        _check_base(folder, settings, model)
        if attention is not None:
            _set_attention(model, attention)
        return _route(model, folder, settings, tensors, adapter, generation, execution, kv, merge_lora)


def _route(
    model: Any,
    folder: Path,
    settings: RoutingConfig,
    tensors: dict[str, Tensor],
    adapter: Adapter | None,
    generation: GenerationConfig | None,
    execution: Any,
    kv: Any,
    merge_lora: bool,
) -> Any:
    """A checked folder on its base model, in place."""
    from .routed_model import RoutedModelForCausalLM

    weights = base_tensors(model)
    origin = Origin(exact=(dtype_of(weights), digest(weights)))
    if adapter is not None:
        model = put_on(model, adapter, merge=merge_lora)
        origin.adapter = adapter
        if merge_lora:
            origin.merged = print_of(model).digests
        else:
            origin.live = live_state(model)
    routed: Any = RoutedModelForCausalLM.attach(model, routing_config=settings)
    routed._origin = origin
    _copy_tensors(routed, tensors, folder / TENSOR_FILE)
    for unit in routed.units:  # not the whole model: rotary frequencies stay in float32
        unit.to(dtype=model.dtype)
    for name, parameter in routed.routing_parameters():
        if not bool(torch.isfinite(parameter).all()):
            kind = str(model.dtype).removeprefix("torch.")
            raise InputError(f"{name} of {folder / TENSOR_FILE} is too large for {kind}", "Load it in bfloat16")
    if generation is not None:
        routed.generation_config = generation
    routed.set_execution(execution, kv)
    routed.eval()
    if settings.thresholds and settings.sparsity > 0:
        routed.set_sparsity(settings.sparsity)
    return routed


def _load_base(
    folder: Path,
    settings: RoutingConfig,
    base: str | Path | None,
    dtype: torch.dtype | str,
    device: torch.device | str,
    trust_remote_code: bool,
    hub: HubOptions,
) -> tuple[Any, RoutingConfig]:
    """The base model of a folder, and the configuration with where it really was."""
    from .assets import load_model, resolve_dtype

    recorded = settings.base_model
    name, revision = (str(base), None) if base is not None else (find_base(folder, recorded), recorded.revision)
    options: dict[str, Any] = {} if hub.token is None else {"token": hub.token}
    options |= {"device": device, "revision": revision, "trust_remote_code": trust_remote_code}
    source = fetched(name, revision, trust_remote_code, hub)
    if source != name:
        options["revision"] = None
    try:
        if recorded.weights is None and resolve_dtype(dtype, device) == torch.float16:
            # Earlier versions cannot recognise float16: look at the checkpoint in float32 first.
            whole, _ = load_model(source, **{**options, "dtype": "float32", "device": "cpu"})
            _check_base(folder, settings, whole)
            known = recorded.model_copy(update={"weights": print_of(whole)})
            settings = settings.model_copy(update={"base_model": known})
            del whole
        model, _ = load_model(source, dtype=dtype, **options)
    except InputError as error:
        if base is not None or "--base" in error.remedy:
            raise
        raise InputError(
            f"the base model of {folder} cannot be loaded: {error.what}",
            "If it is elsewhere, say where: --base MODEL (in Python base=)",
        ) from error
    if source != name:
        model.config._name_or_path = model.name_or_path = name
    path = Path(name).expanduser()
    where = str(path.absolute()) if path.exists() and not name.startswith("demo:") else name
    if where != recorded.name:
        found = settings.base_model.model_copy(update={"name": where, "revision": revision})
        settings = settings.model_copy(update={"base_model": found})
    return model, settings


def _generation_config(folder: Path) -> GenerationConfig | None:
    if not (folder / GENERATION_FILE).is_file():
        return None
    try:
        return GenerationConfig.from_pretrained(folder)
    except Exception as error:  # a damaged file raises all sorts
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"{folder / GENERATION_FILE} is damaged ({reason})", _AGAIN) from None


def _set_attention(model: Any, implementation: str) -> None:
    try:
        model.set_attn_implementation(implementation)
    except Exception as error:  # unknown names, missing packages and families without it
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"attn_implementation = {implementation!r}: {reason}", "Use sdpa or eager") from None
    if model.config._attn_implementation != implementation:
        raise InputError(f"attn_implementation = {implementation!r} cannot be used here", "Use sdpa or eager")


def with_lora(model: PreTrainedModel, folder: Path, *, merge: bool) -> PreTrainedModel:
    """The model with the stage 3 adapter, merged into its weights unless asked otherwise."""
    return put_on(model, read_adapter(folder), merge=merge)
