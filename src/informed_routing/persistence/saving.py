"""`save_pretrained` and `push_to_hub`: a folder that loads as what was saved, or an InputError with the remedy."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import InputError, WorkError
from ..files.atomic import disk_error, write_several
from ..files.folders import check_name
from ..models.facts import config_facts, different_fact
from ..models.fingerprint import base_tensors, digest, dtype_of, fingerprint, layout, live_adapters, reference_to
from .adapter_folder import Adapter, live_state, write_adapter
from .folder import FILES, LORA_FOLDER, Origin, is_routing_folder, routing_tensors, save

_KEEP = (
    "Give save_base=FOLDER to save the base model as it is now beside the routing, "
    "or keep the adapter apart (a routing folder's lora/) instead of merging it"
)


def save_checked(
    model: Any,
    folder: Path,
    *,
    state_dict: Mapping[str, Tensor] | None = None,
    save_base: str | Path | None = None,
    max_shard_size: int | str = "50GB",
    portable: bool = False,
) -> None:
    """Write a routing folder after making sure that the base model, and so the logits, will be found again.

    Raises InputError for a base model that is no longer the recorded one (unless `save_base` says where to save it),
    live adapters, and folders that hold something else. Nothing is written then.
    """
    weights, routing = _tensors(model, state_dict)
    _check_size(routing, max_shard_size)
    if save_base is None:
        adapter = _adapter_to_keep(model, weights)
        _check_folder(folder, adapter)
    else:
        _check_no_adapters(model)
        adapter = None
        _check_folder(folder, None)
        _save_base(model, weights, Path(save_base).expanduser(), folder)
    if adapter is not None:
        folder.mkdir(parents=True, exist_ok=True)
        write_adapter(adapter, folder / LORA_FOLDER)
    save(model, folder, routing, portable=portable)


def push(
    model: Any,
    repo_id: str,
    *,
    token: str | bool | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    create_pr: bool = False,
    folder: Path | None = None,
    **saving: Any,
) -> Any:
    """Upload a routing folder, one that was saved already or a temporary one. Raises WorkError where the Hub fails."""
    from huggingface_hub import HfApi

    with tempfile.TemporaryDirectory() as temporary:
        if folder is None:
            folder = Path(temporary)
            save_checked(model, folder, portable=True, **saving)
        api = HfApi(token=token)
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if revision is not None and not revision.startswith("refs/pr"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            return api.upload_folder(
                repo_id=repo_id,
                folder_path=str(folder),
                allow_patterns=[*FILES, f"{LORA_FOLDER}/*", "token*", "*.jinja", "README.md", "fit.json"],
                commit_message=commit_message or "Upload routing",
                commit_description=commit_description,
                revision=revision,
                create_pr=create_pr,
            )
        except Exception as error:  # the network, the Hub, and what they think of the name
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise WorkError(f"cannot upload to {repo_id}: {reason}", "Check the name and `hf auth login`") from error


_HUB_OPTIONS = ("private", "revision", "commit_message", "commit_description", "create_pr")

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "save_peft_format": (True,),
    "save_original_format": (True,),
    "distributed_checkpoint": (False,),
    "tags": (None,),
    "use_temp_dir": (None, True),
}


def check_hub_options(
    options: dict[str, Any], *, pushed: bool, variant: str | None = None, safe_serialization: bool | None = True
) -> None:
    """Keep of `options` what `push` knows. Raises TypeError for unknown ones, InputError for what cannot be done."""
    if variant is not None:
        raise InputError(f"variant = {variant!r} is not supported: a routing folder has one", "Leave it out")
    if safe_serialization not in (True, None):
        raise InputError("safe_serialization = False would write pickles, which run code", "Leave it out")
    for name in list(options):
        value = options[name]
        if name in _NEUTRAL:
            if not any(value is neutral for neutral in _NEUTRAL[name]):
                raise InputError(f"{name} = {value!r} is not supported for routed models", "Leave it out")
            del options[name]
        elif name not in _HUB_OPTIONS:
            raise TypeError(f"got an unexpected keyword argument {name!r}")
        elif not pushed and value not in (None, False):
            raise InputError(f"{name} = {value!r} is for the Hub", "Give push_to_hub=True, or leave it out")


# -- what is saved ------------------------------------------------------------------------------------------


def _tensors(model: Any, state: Mapping[str, Tensor] | None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights of the base model, and what a routing folder stores: the model's own, or those of a state dict."""
    weights, routing = base_tensors(model), routing_tensors(model)
    if state is None:
        return weights, routing
    _check_no_adapters(model)
    buffers = dict(model.named_buffers())
    places = {id(tensor): name for name, tensor in (*model.named_parameters(), *buffers.items())}
    unknown = sorted(state.keys() - model.state_dict().keys())
    if unknown:
        raise InputError(f"state_dict holds {unknown[0]}, which this model has not", "Give model.state_dict()")
    own: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False)) | buffers

    def stored(name: str) -> Tensor:
        for alias in (name, places[id(own[name])]):  # of tied weights, one name is enough
            if alias in state:
                if state[alias].shape != own[name].shape:
                    raise InputError(f"{alias} of state_dict has another shape", "Give model.state_dict()")
                return state[alias].detach()
        raise InputError(f"state_dict lacks {name}", "Give model.state_dict()")

    names = {id(parameter): name for name, parameter in own.items()}
    return {name: stored(name) for name in weights}, {key: stored(names[id(p)]) for key, p in routing.items()}


def _check_size(tensors: Mapping[str, Tensor], max_shard_size: int | str) -> None:
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if size > _bytes(max_shard_size):
        raise InputError(
            f"max_shard_size = {max_shard_size!r} is less than the routing's {size:,} bytes, which is one file",
            "Leave it out",
        )


def _bytes(size: int | str) -> float:
    if isinstance(size, int):
        return size
    text = size.strip().upper()
    for unit, factor in (
        ("KIB", 2**10), ("MIB", 2**20), ("GIB", 2**30), ("TIB", 2**40),
        ("KB", 1e3), ("MB", 1e6), ("GB", 1e9), ("TB", 1e12),
    ):  # fmt: skip
        if text.endswith(unit):
            try:
                return float(text.removesuffix(unit)) * factor
            except ValueError:
                break
    raise InputError(f"max_shard_size = {size!r} is no size", "Give one such as '5GB', or leave it out")


def _check_no_adapters(model: Any) -> None:
    adapters = live_adapters(model)
    if adapters:
        raise InputError(
            f"the model carries the live adapter {adapters[0]!r}, which a routing folder cannot hold",
            "Save the adapter by itself (PEFT's save_pretrained) and take it off (unload), or merge it "
            "(merge_and_unload) and give save_base=FOLDER",
        )


def _adapter_to_keep(model: Any, weights: Mapping[str, Tensor]) -> Adapter | None:
    """The adapter with which the base model has to be loaded again, if any; InputError when nothing would do."""
    origin: Origin = getattr(model, "_origin", None) or Origin()
    reference = model.routing_config.base_model
    if reference.weights is not None:
        fact = different_fact(config_facts(model.config), reference.weights.facts)
        if fact:
            raise InputError("the base model's {} is now {!r}, was {!r}".format(*fact), _KEEP)
    if live_adapters(model):
        if origin.live is None or live_state(model) != origin.live:
            _check_no_adapters(model)
        if _is_base(model, weights, origin):
            return origin.adapter
    else:
        own = dtype_of(weights)
        if origin.merged.get(own) == digest(weights):
            return origin.adapter
        if _is_base(model, weights, origin):
            return None
    name = reference.name or "the base model"
    if reference.weights is not None and layout(weights) != reference.weights.layout:
        raise InputError(f"the weights have other names or shapes than those of {name}", _KEEP)
    raise InputError(f"the weights are no longer those of {name}: the routing alone would not bring them back", _KEEP)


def _is_base(model: Any, weights: Mapping[str, Tensor], origin: Origin) -> bool:
    reference = model.routing_config.base_model
    own = dtype_of(weights)
    found = digest(weights)
    if origin.exact is not None and origin.exact[0] == own:
        return origin.exact[1] == found
    if reference.weights is None:  # of an earlier version
        return fingerprint(model) == cast(str, reference.fingerprint)
    return reference.weights.digests.get(own) == found


# -- where it is saved --------------------------------------------------------------------------------------


def _check_folder(folder: Path, adapter: Adapter | None) -> None:
    """Raises InputError for a folder whose content would be spoilt, or would spoil what is loaded from it."""
    check_name(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file", "Give a folder")
    if (folder / "adapter_config.json").exists():
        raise InputError(
            f"{folder} holds adapter_config.json, which transformers would take it over for", "Give another folder"
        )
    described = folder / "config.json"
    if described.is_file():
        try:
            kind = json.loads(described.read_text(encoding="utf-8")).get("model_type")
        except (OSError, ValueError, AttributeError):
            kind = None
        if kind != "informed_routing":
            raise InputError(f"{folder} holds another model ({kind or 'config.json'})", "Give another folder")
    if (folder / "checkpoints").is_dir() and not is_routing_folder(folder):
        raise InputError(f"{folder} holds an unfinished fit", "Give another folder")
    lora = folder / LORA_FOLDER
    if lora.exists() and (adapter is None or not adapter.same_as(lora)):
        raise InputError(
            f"{lora} holds an adapter that this model is not saved with", "Give another folder, or remove it"
        )


def _save_base(model: Any, weights: Mapping[str, Tensor], place: Path, folder: Path) -> None:
    """Save the base model as it is now, and let the routing refer to it."""
    if place.absolute() == folder.absolute():
        raise InputError(f"save_base = {place} is the routing folder", "Give another folder for the base model")
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise InputError(f"save_base = {place} exists already", "Give a new folder for the base model")
    dense = dense_model(model, weights)
    try:
        place.mkdir(parents=True, exist_ok=True)
        write_several(place, dense.save_pretrained)
    except OSError as error:
        raise disk_error(place, error) from error
    before = model.routing_config.base_model
    embedding: Any = dense.get_input_embeddings()
    if _rows_recorded(model) == len(embedding.weight):  # other rows mean other tokens
        _copy_tokenizer(before.name, before.revision, place)
    reference = reference_to(dense, str(place.absolute()))
    model.routing_config = model.routing_config.model_copy(update={"base_model": reference})
    model.config.tie_word_embeddings = dense.config.tie_word_embeddings  # it may have said what no longer was so
    model._origin = Origin()


def dense_model(model: Any, weights: Mapping[str, Tensor] | None = None) -> PreTrainedModel:
    """The dense model under a routed one, of the base model's own class, sharing its weights."""
    weights = base_tensors(model) if weights is None else weights
    base: type[PreTrainedModel] = vars(type(model))["_made_by"][1]
    config = copy.deepcopy(model.config)
    head, embeddings = (weights.get(name) for name in ("lm_head.weight", "model.embed_tokens.weight"))
    if head is not None and embeddings is not None and head.data_ptr() != embeddings.data_ptr():
        config.tie_word_embeddings = config.tie_word_embeddings and torch.equal(head, embeddings)
    with torch.device("meta"):
        dense: Any = base(config)
    try:
        dense.load_state_dict(dict(weights), strict=False, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise InputError(f"the weights do not fit the model's configuration: {reason}", "Correct one of them") from None
    dense.tie_weights()
    absent = [name for name, parameter in cast(nn.Module, dense).named_parameters() if parameter.is_meta]
    if absent:
        raise InputError(f"the base model lacks {absent[0]}", "Load it anew")
    dense.generation_config = copy.deepcopy(model.generation_config)
    return cast(PreTrainedModel, dense)


def _rows_recorded(model: Any) -> int | None:
    weights = model.routing_config.base_model.weights
    return None if weights is None else weights.vocabulary


def _copy_tokenizer(name: str, revision: str | None, place: Path) -> None:
    """The former base model's tokenizer, where it can be had: loading a model reads one, too."""
    from ..assets import load_tokenizer

    if not name:
        return
    try:
        tokenizer = load_tokenizer(name, revision=revision)
    except (InputError, WorkError):
        return
    write_several(place, tokenizer.save_pretrained)
