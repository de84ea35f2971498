"""transformers' `from_pretrained`, `save_pretrained` and `push_to_hub` for routing folders."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from ..execution.self_check import skipped
from ..routing.state import Execution, KeyValues
from .load import Attach


class FromRoutingFolder(PreTrainedModel):
    """What routed models have of it. `attach` gives a dense model the routing of a configuration."""

    attach: ClassVar[Attach]

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: torch.dtype | str | None = "auto",
        device: torch.device | str | None = None,
        base: str | Path | PreTrainedModel | None = None,
        execution: Execution = "sparse",
        kv: KeyValues | None = None,
        merge_lora: bool = True,
        trust_remote_code: bool | None = False,
        attn_implementation: str | None = None,
        device_map: Any = None,
        torch_dtype: torch.dtype | str | None = None,
        subfolder: str = "",
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
        force_download: bool = False,
        config: PreTrainedConfig | None = None,
        self_check: bool = True,
        **options: Any,
    ) -> Any:
        """Load a routing folder (or a Hub id of one) onto its base model, at the sparsity it was trained for.

        `base` overrides where the base model is; its weights and settings are checked all the same. A live model given
        as `base` is changed in place, or left as it was when loading fails. A LoRA adapter in the folder is merged into
        the base weights. `revision` and `subfolder` are those of the routing; the base model has its own. `device_map`
        may name one device. Raises InputError for a missing or damaged folder, a wrong base model, and options of
        transformers that routed models do not have; TypeError for options that nobody knows.
        """
        from . import load_options
        from .load import load

        load_options.check_unknown(options)
        load_options.check_execution(execution, kv, merge_lora, base)
        wanted = load_options.chosen_dtype(None if torch_dtype is not None and dtype == "auto" else dtype, torch_dtype)
        if isinstance(base, PreTrainedModel):
            load_options.check_base_object(base, wanted, device, device_map)
        hub = load_options.HubOptions(revision, token, cache_dir, bool(local_files_only), bool(force_download))
        with nullcontext() if self_check else skipped():
            return load(
                pretrained_model_name_or_path,
                attach=cls.attach,
                dtype=wanted,
                device=load_options.chosen_device(device, device_map),
                base=base,
                execution=execution,
                kv=kv,
                merge_lora=merge_lora,
                trust_remote_code=bool(trust_remote_code),
                attn_implementation=attn_implementation,
                subfolder=subfolder or "",
                config=config,
                hub=hub,
            )

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "50GB",
        variant: str | None = None,
        token: str | bool | None = None,
        *,
        save_base: str | Path | None = None,
        safe_serialization: bool = True,
        repo_id: str | None = None,
        **hub: Any,
    ) -> None:
        """Write the routing folder: configuration and the routers' and forecasters' tensors, not the base model.

        Raises InputError when loading the folder would not give this model again: when the base weights are no longer
        those that the routing refers to. `save_base` then names a new folder for the base model as it is now. An
        adapter that the model was loaded with is written again. `state_dict` replaces the model's weights. With
        `push_to_hub` the options of that method may be given too.
        """
        from .saving import check_hub_options, push, save_checked

        check_hub_options(hub, pushed=push_to_hub, variant=variant, safe_serialization=safe_serialization)
        if not is_main_process:
            return
        folder = Path(save_directory).expanduser()
        save_checked(self, folder, state_dict=state_dict, save_base=save_base, max_shard_size=max_shard_size)
        if push_to_hub:
            push(self, repo_id or folder.absolute().name, token=token, folder=folder, **hub)

    def push_to_hub(self, repo_id: str, *, token: str | bool | None = None, **options: Any) -> Any:  # type: ignore[override]
        """Upload the routing folder to the Hub.

        Options: `private`, `revision`, `commit_message`, `commit_description`, `create_pr`, `max_shard_size`.
        """
        from .saving import check_hub_options, push

        size = options.pop("max_shard_size", None)
        check_hub_options(options, pushed=True)
        return push(self, repo_id, token=token, max_shard_size="50GB" if size is None else size, **options)
