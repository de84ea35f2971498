"""Routing folders: a small artefact beside the base model, as a PEFT adapter is.

routing_config.json    settings, base model reference and fingerprint, thresholds
routing.safetensors    routers and forecasters
lora/                  the stage 3 adapter, if any
config.json            lets AutoModelForCausalLM recognise the folder
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedModel

from .config import RoutingConfig
from .errors import InputError
from .files import write_json, write_tensors, write_text
from .models.fingerprint import fingerprint

CONFIG_FILE = "routing_config.json"
TENSOR_FILE = "routing.safetensors"
LORA_FOLDER = "lora"


def is_routing_folder(path: str | Path) -> bool:
    return (Path(path) / CONFIG_FILE).is_file()


def save(model: Any, folder: Path) -> None:
    """Write configuration and tensors of a routed model; other files of the folder stay."""
    write_tensors(folder / TENSOR_FILE, dict(model.routing_parameters()), {"format": "pt"})
    write_json(
        folder / "config.json",
        {"model_type": "informed_routing", "architectures": ["RoutedModelForCausalLM"]},
    )
    # Written last: a folder with this file is complete.
    write_text(folder / CONFIG_FILE, model.routing_config.model_dump_json(indent=2) + "\n")


def locate(reference: str | Path) -> Path:
    """The local folder of a routing reference, downloading it from the Hub if need be."""
    path = Path(reference)
    if is_routing_folder(path):
        return path
    if path.exists():
        raise InputError(f"{reference} is no routing folder: it has no {CONFIG_FILE}", "Give the --out folder of `fit`")
    if len(path.parts) == 2 and not path.is_absolute():
        from huggingface_hub import snapshot_download

        try:
            patterns = [
                CONFIG_FILE,
                TENSOR_FILE,
                "config.json",
                f"{LORA_FOLDER}/*",
                "token*",
                "*.jinja",
                "README.md",
            ]
            found = Path(snapshot_download(str(reference), allow_patterns=patterns))
        except Exception as error:
            raise InputError(
                f"{reference} is neither a folder nor a reachable Hub id ({type(error).__name__})",
                "Check the spelling or give a local routing folder",
            ) from None
        if is_routing_folder(found):
            return found
    raise InputError(f"routing folder {reference} does not exist", "Give the --out folder of `fit`")


def read_config(folder: Path) -> RoutingConfig:
    path = folder / CONFIG_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}", "Fit or download the routing folder again") from None
    return RoutingConfig.from_json(text, str(path))


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Tensors of a safetensors file. Raises InputError when it is missing or damaged."""
    try:
        return load_file(str(path))
    except FileNotFoundError:
        raise InputError(f"{path} is missing", "Fit or download the routing folder again") from None
    except (SafetensorError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"{path} is damaged ({reason})", "Fit or download the routing folder again") from None


def check_base(folder: Path, found: str) -> None:
    """Raises InputError when a routing folder was not fitted on the base model with fingerprint `found`."""
    wanted = read_config(folder).base_model
    if found != wanted.fingerprint:
        raise InputError(
            f"wrong base model: {folder} was fitted on {wanted.name} "
            f"(fingerprint {wanted.fingerprint[:12]}), this one has {found[:12]}",
            "Give the model it was fitted on",
        )


def load_routing_tensors(model: Any, path: Path) -> None:
    """Copy stored routers and forecasters into a routed model, whose dtype and device they take."""
    stored = read_tensors(path)
    wanted = dict(model.routing_parameters())
    if stored.keys() != wanted.keys() or any(stored[k].shape != p.shape for k, p in wanted.items()):
        raise InputError(f"{path} does not fit {CONFIG_FILE} beside it", "Fit or download the routing folder again")
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(stored[name])


def load(
    reference: str | Path,
    *,
    dtype: torch.dtype | str,
    device: torch.device | str,
    base: str | PreTrainedModel | None,
    execution: Any,
    kv: Any,
    merge_lora: bool,
    trust_remote_code: bool,
) -> Any:
    """See `RoutedModelForCausalLM.from_pretrained`."""
    from .routed_model import RoutedModelForCausalLM

    folder = locate(reference)
    config = read_config(folder)
    if isinstance(base, PreTrainedModel):
        model = base
    else:
        from .assets import load_model

        model, _ = load_model(
            base or config.base_model.name,
            dtype=dtype,
            device=device,
            revision=None if base else config.base_model.revision,
            trust_remote_code=trust_remote_code,
        )
    check_base(folder, fingerprint(model))
    if (folder / LORA_FOLDER).is_dir():
        model = with_lora(model, folder / LORA_FOLDER, merge=merge_lora)
    routed = RoutedModelForCausalLM.attach(model, routing_config=config)
    load_routing_tensors(routed, folder / TENSOR_FILE)
    cast(Any, routed).to(dtype=model.dtype)
    routed.set_execution(execution, kv)
    routed.eval()
    if config.thresholds and config.sparsity > 0:
        routed.set_sparsity(config.sparsity)
    return routed


def with_lora(model: PreTrainedModel, folder: Path, *, merge: bool) -> PreTrainedModel:
    """The model with the stage 3 adapter, merged into its weights unless asked otherwise."""
    from peft import PeftModel

    try:
        adapted = PeftModel.from_pretrained(cast(Any, model), str(folder))
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise InputError(f"{folder} cannot be loaded: {str(error).splitlines()[0]}", "Fit again") from None
    if merge:
        return cast(PreTrainedModel, adapted.merge_and_unload())
    return cast(PreTrainedModel, adapted.get_base_model())


def push(folder: Path, repo_id: str, kwargs: dict[str, Any]) -> Any:
    """Upload a routing folder."""
    from huggingface_hub import HfApi

    api = HfApi(token=kwargs.get("token"))
    api.create_repo(repo_id, private=kwargs.get("private"), exist_ok=True)
    return api.upload_folder(repo_id=repo_id, folder_path=str(folder))
