"""Stage 2: train the routers with sampled decisions towards a sparsity target.

Methods differ in the rule that decides while training and in what holds the sparsity: those of D-LLM and MoD are
subclasses in token_target.py and top_k.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ..config.recipe import RouteStage
from ..models.head import lm_head
from ..routed_model import RoutedModelForCausalLM
from ..routing.decision import AlwaysExecute, DecisionRule, GumbelSample
from ..routing.target import BudgetMeter
from .objectives import next_token_loss
from .schedule import linear


class RouteObjective(nn.Module):
    """Task loss + lambda |saved - target| (paper Eq. 8) on a batch [B, N], both branches computed."""

    def __init__(self, model: RoutedModelForCausalLM, config: RouteStage, meter: BudgetMeter) -> None:
        super().__init__()
        self.model, self.config, self.meter = model, config, meter
        self.head = lm_head(model)

    def forward(self, input_ids: Tensor, step: int, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
        config, model = self.config, self.model
        teacher = original_hidden(model, input_ids, attention_mask) if config.objective.kind != "lm" else None
        # Left in place after the forward: activation checkpointing decides again in the backward.
        model.routing_state.choose(decision=self.rule(step))
        hidden = model.hidden_states(input_ids, attention_mask)
        valid = None if attention_mask is None else attention_mask.bool()
        task = next_token_loss(hidden, input_ids, self.head, config.objective, teacher, valid)
        approximated = approximated_shares(model.routing_state.forward.gates, valid)
        shared = across_processes(approximated)
        return {
            "loss": task + self.penalty(step, shared, valid),
            "task": task.detach(),
            "saved": self.meter.saved(shared.detach()),
            "attention": shared[0::2].mean().detach(),
            "ffn": shared[1::2].mean().detach(),
        }

    def rule(self, step: int) -> DecisionRule:
        """Who decides in this step."""
        config = self.config
        tau = linear(config.tau_start, config.tau_end, step, config.steps)
        return GumbelSample(tau, linear(config.noise_start, config.noise_end, step, config.steps))

    def penalty(self, step: int, approximated: Tensor, valid: Tensor | None) -> Tensor:
        """What is added to the task loss, given approximated shares [U] and real tokens [B, N] of the last forward."""
        config = self.config
        return config.coefficient * self.meter.deviation(approximated, config.sparsity, config.balanced)


def original_hidden(model: RoutedModelForCausalLM, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Last hidden states of the original model, dense and without adapters: the teacher of a distillation."""
    adapters = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    for module in adapters:
        module.enable_adapters(False)
    try:
        with torch.no_grad(), model.deciding(AlwaysExecute()):
            return model.hidden_states(input_ids, attention_mask)
    finally:
        for module in adapters:
            module.enable_adapters(True)


def approximated_shares(gates: Mapping[int, Tensor], valid: Tensor | None) -> Tensor:
    """Share of real tokens that each unit approximated: [U] float32, with the gates' gradient. Pads excluded."""
    shares = []
    for index in sorted(gates):
        gate = gates[index].float()
        if valid is None:
            shares.append(1 - gate.mean())
        else:
            shares.append(1 - (gate * valid).sum() / valid.sum().clamp(min=1))
    return torch.stack(shares)


def across_processes(shares: Tensor) -> Tensor:
    """The mean over all processes in value, the local shares in gradient.

    |mean - target| is not the mean of |local - target|: without this each process would be held to the target on its
    own. The gradients are averaged by the wrapper, which completes the derivative.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return shares
    total = shares.detach().clone()
    torch.distributed.all_reduce(total)
    return shares + (total / torch.distributed.get_world_size() - shares.detach())


def router_parameters(model: RoutedModelForCausalLM, forecasters_too: bool = False) -> dict[str, nn.Parameter]:
    """The tensors that stage 2 trains."""
    return {n: p for n, p in model.routing_parameters() if forecasters_too or ".router." in n}


def learning_rates(config: RouteStage, names: Iterable[str]) -> dict[str, float]:
    """The peak rate of each tensor that stage 2 trains."""
    return {n: config.forecaster_learning_rate if ".forecaster." in n else config.learning_rate for n in names}


def freeze_all_but(model: Any, trainable: dict[str, nn.Parameter]) -> None:
    """Let gradients reach `trainable` only."""
    model.requires_grad_(False)
    for parameter in trainable.values():
        parameter.requires_grad_(True)
