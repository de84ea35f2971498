"""Stage 3: LoRA on the base model at a fixed, deterministic routing; a true PEFT adapter comes out."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..config.recipe import LoraStage
from ..errors import InputError
from ..files.atomic import write_json, write_tensors
from ..models.decoder import layers_of
from ..models.discover import family_of
from ..models.head import lm_head
from ..persistence.adapter_folder import read_adapter
from ..routed_model import RoutedModelForCausalLM
from ..routing.decision import DecisionRule
from .objectives import next_token_loss
from .route import original_hidden
from .schedule import seed_of

ADAPTER = "default"


def add_lora(model: Any, config: LoraStage) -> dict[str, nn.Parameter]:
    """Put adapters into a live model (routed or dense) and return their tensors by name."""
    targets = lora_targets(model, config)
    inject_adapter_in_model(peft_config(config, targets, ""), model, adapter_name=ADAPTER)
    trainable = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.float()
            trainable[name] = parameter
    return trainable


def new_lora(model: Any, config: LoraStage, seed: int) -> dict[str, nn.Parameter]:
    """Adapters for a stage of a fit: their first weights are a function of the recipe's seed alone."""
    torch.manual_seed(seed_of(seed, "lora"))
    return add_lora(model, config)


def go_on_with(folder: Path, adapters: dict[str, nn.Parameter], config: LoraStage) -> None:
    """Give fresh adapters the weights of a folder's. Raises InputError where they are of another form."""
    found = read_adapter(folder)
    wanted = {_stored(name): parameter for name, parameter in adapters.items()}
    same = found.settings["r"] == config.rank and found.settings["lora_alpha"] == config.alpha
    tensors = found.tensors
    if not same or {name: part.shape for name, part in tensors.items()} != {n: p.shape for n, p in wanted.items()}:
        raise InputError(
            f"the adapter of {folder.parent} has rank {found.settings['r']} and alpha {found.settings['lora_alpha']}, "
            "or other targets than lora asks for",
            "Go on with the lora settings of that fit",
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            parameter.copy_(tensors[name])


def _stored(name: str) -> str:
    """What PEFT calls an adapter's tensor in a file."""
    return f"base_model.model.{name.replace(f'.{ADAPTER}', '')}"


def lora_targets(model: Any, config: LoraStage) -> tuple[str, ...]:
    """The names of the layers that get adapters: linear layers of the model's decoder, as PEFT matches names.

    Raises InputError for a name that fits nothing, or something else: PEFT would refuse it only when it is put in, a
    head gets no gradient here, and routers and forecasters are no part of the adapter's base model.
    """
    head = model.get_output_embeddings()
    routing = {id(part) for unit in getattr(model, "units", ()) for part in unit.modules()}
    parts = [(name, part) for name, part in model.named_modules() if id(part) not in routing]

    def named(target: str) -> list[nn.Module]:
        return [part for name, part in parts if name == target or name.endswith(f".{target}")]

    targets = config.targets
    if targets is None:  # of a pruned model some may be gone altogether
        targets = tuple(name for name in _usual_targets(model) if named(name))
    if not targets:
        raise InputError("lora.targets is empty", "Name linear layers such as q_proj")
    for target in targets:
        found = named(target)
        if not found:
            raise InputError(f"LoRA target {target!r} is no layer of this model", "Name linear layers such as q_proj")
        for part in found:
            if isinstance(part, BaseTunerLayer):  # it has an adapter already
                continue
            if not isinstance(part, nn.Linear) or part is head:
                what = "the output head" if part is head else type(part).__name__
                raise InputError(
                    f"LoRA target {target!r} is no linear layer of the decoder ({what})",
                    "Name linear layers such as q_proj",
                )
    return tuple(targets)


def _usual_targets(model: Any) -> list[str]:
    """Names by the rows of the model's layers; none of FFNs where some are stacks of experts, which PEFT fuses."""
    layers = layers_of(model)
    families = [family_of(model, place) for place in range(len(layers))]
    names = dict.fromkeys(name for family in families for name in family.lora_targets)
    ffns = [getattr(layer, family.ffn or "", None) for layer, family in zip(layers, families, strict=True)]
    if any(parameter.dim() == 3 for ffn in ffns if ffn is not None for parameter in ffn.parameters()):
        return [name for name in names if name not in ("gate_proj", "gate_up_proj")]
    return list(names)


def peft_config(config: LoraStage, targets: tuple[str, ...], base: str) -> LoraConfig:
    """The settings of stage 3 as PEFT takes them."""
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
    targets = lora_targets(model, config)
    tensors = {_stored(name): parameter for name, parameter in model.named_parameters() if "lora_" in name}
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
        self.model.routing_state.choose(decision=self.decision)  # also for recomputation in the backward
        hidden = self.model.hidden_states(input_ids)
        loss = next_token_loss(hidden, input_ids, self.head, self.config.objective, teacher)
        gates = self.model.routing_state.forward.gates
        found = {"loss": loss, "task": loss.detach()}
        if gates:
            found["approximated"] = 1 - torch.stack([g.float().mean() for g in gates.values()]).mean()
        return found
