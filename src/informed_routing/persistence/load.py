"""From a routing folder to a routed model: the folder checked first, its base model found, then both put together."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from ..config.folder import RoutingConfig
from ..errors import InputError
from ..models.fingerprint import base_tensors, digest, dtype_of, live_adapters, print_of
from ..models.restore import restored_on_failure
from .adapter_folder import Adapter, changed_weights, live_state, put_on, read_adapter
from .base_location import fetched, find_base
from .folder import (
    AGAIN,
    GENERATION_FILE,
    LORA_FOLDER,
    TENSOR_FILE,
    Origin,
    check_base_of,
    copy_tensors,
    locate,
    read_config,
    read_tensors,
)
from .load_options import HubOptions, attention_of

Attach = Callable[..., Any]


def load(
    reference: str | Path,
    *,
    attach: Attach,
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
    """See `RoutedModelForCausalLM.from_pretrained`. `attach` gives a dense model the routing of a configuration."""
    hub = hub or HubOptions()
    folder = locate(reference, subfolder, hub)
    # Whatever can be wrong with the folder is found before anything is done to a model.
    settings = read_config(folder)
    attention = attention_of(config, folder, attn_implementation)
    tensors = read_tensors(folder / TENSOR_FILE)
    widest = max((max(tensor.shape, default=0) for tensor in tensors.values()), default=0)
    if (settings.router.width or 0) > widest:  # found before so much memory is asked for
        raise InputError(f"router.width {settings.router.width} does not fit {folder / TENSOR_FILE}", AGAIN)
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
        check_base_of(folder, settings, model)
        if attention is not None:
            _set_attention(model, attention)
        return _route(attach, model, folder, settings, tensors, adapter, generation, execution, kv, merge_lora)


def _route(
    attach: Attach,
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
    weights = base_tensors(model)
    origin = Origin(exact=(dtype_of(weights), digest(weights)))
    if adapter is not None:
        model = put_on(model, adapter, merge=merge_lora)
        origin.adapter = adapter
        if merge_lora:
            origin.merged = print_of(model).digests
        else:
            origin.live = live_state(model)
    routed: Any = attach(model, routing_config=settings)
    routed._origin = origin
    copy_tensors(routed, tensors, folder / TENSOR_FILE)
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
    from ..assets.models import load_model, resolve_dtype

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
            check_base_of(folder, settings, whole)
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
        raise InputError(f"{folder / GENERATION_FILE} is damaged ({reason})", AGAIN) from None


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
