"""Stage 3: LoRA on the base model at a fixed, deterministic routing; a true PEFT adapter comes out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..config import LoraStage
from ..errors import InputError
from ..files import write_json, write_tensors
from ..models.families import family_of
from ..routed_model import RoutedModelForCausalLM
from ..routing.decision import DecisionRule
from .objectives import lm_head, next_token_loss
from .route import original_hidden

ADAPTER = "default"


def add_lora(model: Any, config: LoraStage) -> dict[str, nn.Parameter]:
    """Put adapters into a live model (routed or dense) and return their tensors by name."""
    targets = config.targets or family_of(model.config.model_type).lora_targets
    names = [name for name, _ in model.named_modules()]
    for target in targets:
        if not any(name.split(".")[-1] == target for name in names):
            raise InputError(f"LoRA target {target!r} is no layer of this model", "Name linear layers such as q_proj")
    inject_adapter_in_model(peft_config(config, targets, ""), model, adapter_name=ADAPTER)
    trainable = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            trainable[name] = parameter
    return trainable


def peft_config(config: LoraStage, targets: tuple[str, ...], base: str) -> LoraConfig:
    return LoraConfig(
        r=config.rank,
        lora_alpha=cast(int, config.alpha),
        lora_dropout=config.dropout,
        target_modules=list(targets),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        inference_mode=True,
    )


def save_lora(model: Any, config: LoraStage, folder: Path, base: str) -> None:
    """Write the adapter as PEFT does, whole or not at all: it loads on the dense base model too."""
    targets = config.targets or family_of(model.config.model_type).lora_targets
    tensors = {
        f"base_model.model.{name.replace(f'.{ADAPTER}', '')}": parameter
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    description = peft_config(config, targets, base).to_dict()
    description = {k: sorted(v) if isinstance(v, set) else v for k, v in description.items()}
    building = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(building, ignore_errors=True)
    write_tensors(building / "adapter_model.safetensors", tensors, {"format": "pt"})
    write_json(building / "adapter_config.json", description)
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)


def merge_lora(model: nn.Module) -> None:
    """Fold live adapters into the base weights and put the plain layers back."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                child.merge(safe_merge=True)
                setattr(parent, name, child.get_base_layer())


class LoraObjective(nn.Module):
    """Task loss under a fixed decision rule; routers and forecasters are frozen, so nothing holds the sparsity."""

    def __init__(self, model: RoutedModelForCausalLM, config: LoraStage, decision: DecisionRule) -> None:
        super().__init__()
        self.model, self.config, self.decision = model, config, decision
        self.head = lm_head(model)

    def forward(self, input_ids: Tensor, step: int) -> dict[str, Tensor]:
        teacher = original_hidden(self.model, input_ids) if self.config.objective.kind != "lm" else None
        self.model.routing_state.decision = self.decision  # also for recomputation in the backward
        hidden = self.model.hidden_states(input_ids)
        loss = next_token_loss(hidden, input_ids, self.head, self.config.objective, teacher)
        gates = self.model.routing_state.gates
        found = {"loss": loss, "task": loss.detach()}
        if gates:
            found["approximated"] = 1 - torch.stack([g.float().mean() for g in gates.values()]).mean()
        return found
