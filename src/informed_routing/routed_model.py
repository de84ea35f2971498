"""The routed model: an ordinary transformers causal LM whose decoder layers decide per token what to execute.

    model = RoutedModelForCausalLM.from_pretrained("out/")
    model.set_sparsity(0.25)
    model.generate(**tokens)

`attach` gives a live dense model routed layers in place; the result is a subclass of the base model's own class,
so generation, adapters, pipelines and evaluation harnesses treat it as what it was.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from .config import (
    BaseModelReference,
    Budget,
    Decision,
    ForecasterConfig,
    RouterConfig,
    RoutingConfig,
    SelectionConfig,
    ThresholdRow,
    UnitKind,
    describe,
    method_of,
)
from .errors import InputError
from .execution.layer import NOT_CAUSAL, add_routing, routed_decoder_class
from .models.families import family_of
from .models.fingerprint import fingerprint
from .routing.budget import RoutingStats, UnitCost, capacity_for, unit_costs
from .routing.decision import AlwaysExecute, DecisionRule, Threshold, TopK
from .routing.routed_unit import Execution, KeyValues, RoutedUnit, RoutingState

if TYPE_CHECKING:
    from .execution.call import Policy
    from .execution.native import Weights

KINDS: tuple[UnitKind, UnitKind] = ("attention", "ffn")

RANGE_SLACK = 0.005
"""How far above the last measured share a sparsity may lie: targets are met to a fraction of a point."""


class RoutedConfig(PreTrainedConfig):
    """Lets `AutoModelForCausalLM` find a routing folder; the real settings are in routing_config.json."""

    model_type = "informed_routing"


class RoutedModelForCausalLM(PreTrainedModel):
    """Base of all routed models. Build one with `from_pretrained` (a routing folder) or `attach` (a live model)."""

    config_class = RoutedConfig
    routing_config: RoutingConfig
    routing_state: RoutingState
    _target: float | None

    # -- building ---------------------------------------------------------------------------------------

    @classmethod
    def attach(
        cls,
        model: PreTrainedModel,
        forecaster: ForecasterConfig | None = None,
        router: RouterConfig | None = None,
        *,
        selection: SelectionConfig | None = None,
        kv: KeyValues = "keep",
        routing_config: RoutingConfig | None = None,
        name: str = "",
        revision: str | None = None,
    ) -> RoutedModelForCausalLM:
        """Give a dense model routed layers, in place, with fresh (or, for `routing_config`, unloaded) weights.

        Forecaster, router, selection and `kv` are the parts that make a method; `routing_config` holds all of them.
        Every token executes until `set_sparsity`, so logits are the base model's. Raises InputError for an unknown
        family, a rank above the hidden size, or parts that do not go together.
        """
        if isinstance(model, RoutedModelForCausalLM):
            raise InputError("the model is routed already", "Load the dense base model first")
        family = family_of(model.config.model_type)
        hidden_size = model.config.hidden_size
        print_of_base = fingerprint(model)
        if routing_config is None:
            reference = BaseModelReference(
                name=name, revision=revision, fingerprint=print_of_base, model_type=model.config.model_type
            )
            forecaster, router = forecaster or ForecasterConfig(), router or RouterConfig()
            routing_config = _fresh_config(model, reference, forecaster, router, selection or SelectionConfig(), kv)
        forecaster, router, selection = routing_config.forecaster, routing_config.router, routing_config.selection
        if forecaster.fallback == "forecaster" and forecaster.rank > hidden_size:
            raise InputError(
                f"rank {forecaster.rank} is above the model's hidden size {hidden_size}",
                f"Choose a rank up to {hidden_size}",
            )
        decoder = cast(Any, model).model
        if selection.first_layer >= len(decoder.layers):
            raise InputError(
                f"selection.first_layer {selection.first_layer} leaves none of {len(decoder.layers)} layers to route",
                "Choose a lower one",
            )
        state = RoutingState(kv=routing_config.kv)
        device = decoder.embed_tokens.weight.device
        for i, layer in enumerate(decoder.layers):
            pair = [
                RoutedUnit(2 * i + j, kind, family, hidden_size, forecaster, router, selection).to(device)
                for j, kind in enumerate(KINDS)
            ]
            add_routing(layer, state, *pair)
        costs = unit_costs(decoder.layers, list(_units_of(decoder)))
        decoder.routing_state = state
        decoder.routing_stats_counter = RoutingStats.empty(costs, [u.kind for u in _units_of(decoder)])
        decoder.__class__ = routed_decoder_class(type(decoder))  # type: ignore[arg-type]
        model.__class__ = _routed_model_class(type(model))  # type: ignore[arg-type]
        routed = cast(RoutedModelForCausalLM, model)
        routed.routing_config = routing_config
        routed.routing_state = state
        routed._target = 0.0
        routed.train(model.training)
        return routed

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | Path,
        *_: Any,
        dtype: torch.dtype | str = "auto",
        device: torch.device | str = "cpu",
        base: str | PreTrainedModel | None = None,
        execution: Execution = "sparse",
        kv: KeyValues | None = None,
        merge_lora: bool = True,
        trust_remote_code: bool = False,
        **__: Any,
    ) -> RoutedModelForCausalLM:
        """Load a routing folder (or a Hub id of one) onto its base model, at the sparsity it was trained for.

        `base` overrides where the base model is; its weights are checked all the same. A LoRA adapter in the folder
        is merged into the base weights. Raises InputError for a missing or damaged folder or a wrong base model.
        """
        from .persistence import load

        return load(
            pretrained_model_name_or_path,
            dtype=dtype,
            device=device,
            base=base,
            execution=execution,
            kv=kv,
            merge_lora=merge_lora,
            trust_remote_code=trust_remote_code,
        )

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Write the routing folder: configuration and the routers' and forecasters' tensors, not the base model."""
        from .persistence import push, save

        save(self, Path(save_directory))
        if kwargs.get("push_to_hub"):
            push(Path(save_directory), kwargs.get("repo_id") or Path(save_directory).name, kwargs)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> Any:  # type: ignore[override]
        """Upload the routing folder to the Hub."""
        import tempfile

        from .persistence import push, save

        with tempfile.TemporaryDirectory() as folder:
            save(self, Path(folder))
            return push(Path(folder), repo_id, kwargs)

    # -- parts ------------------------------------------------------------------------------------------

    @property
    def decoder(self) -> Any:
        """The routed decoder (the base model's stack of layers)."""
        return cast(Any, self).model

    @property
    def units(self) -> list[RoutedUnit]:
        """All routed units in order: attention and ffn of layer 0, of layer 1, ..."""
        return list(_units_of(self.decoder))

    @property
    def costs(self) -> list[UnitCost]:
        return cast(list[UnitCost], self.decoder.routing_stats_counter.costs)

    def routing_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Named tensors of routers and forecasters: what a routing folder stores."""
        for unit in self.units:
            layer, kind = unit.index // 2, unit.kind
            for name, parameter in unit.named_parameters():
                yield f"layers.{layer}.{kind}.{name}", parameter

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Last hidden states [B, N, d] without the LM head, which training and evaluation apply in chunks."""
        if self.runs_native:
            from .execution import native

            hidden = native.hidden_states(self, input_ids, attention_mask)
            if hidden is not None:
                return hidden
        output = self.decoder(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        return cast(Tensor, output.last_hidden_state)

    @property
    def runs_native(self) -> bool:
        """Whether a forward would now go to the native engine: chosen, in evaluation mode, without gradients."""
        if self.routing_state.native is None:
            return False
        from .execution import native

        return native.may_run(self)

    # -- the dial ---------------------------------------------------------------------------------------

    def set_sparsity(self, sparsity: float, budget: Budget | None = None, decision: Decision | None = None) -> None:
        """Choose how much is approximated, without retraining. 0 is the dense model.

        `budget` says what the number means (default: what the routers were trained for). `decision` is how tokens are
        chosen: by `threshold`, or the `top-k` of each sequence, which is what MoD is trained and scored with but cannot
        generate (default: the method's own). Raises InputError outside the calibrated range, when the model has not
        been calibrated, or for top-k of routers that do not rank.
        """
        if not 0 <= sparsity < 1:
            raise InputError(f"sparsity {sparsity} is not between 0 and 1", "Give a share such as 0.25")
        for given, known in ((budget, get_args(Budget)), (decision, get_args(Decision))):
            if given is not None and given not in known:
                raise InputError(f"{given!r} is not known", f"Choose one of {', '.join(known)}")
        decision = decision or self.routing_config.selection.decision
        if sparsity == 0:
            self.set_decision(AlwaysExecute())
        elif decision == "top-k":
            self.set_decision(self._top_k(sparsity, budget or self.routing_config.budget))
        else:
            self.set_decision(Threshold(threshold_for(self.routing_config, sparsity, budget)))
        self._target = sparsity

    def _top_k(self, sparsity: float, budget: Budget) -> TopK:
        """The rule whose capacity, the same in all routed units, approximates a share of all (token, unit) pairs."""
        if self.routing_config.selection.decision != "top-k":
            raise InputError("the routers of this model do not rank tokens", "Leave out decision='top-k'")
        if budget != "units":
            raise InputError(f"the capacity of top-k counts units, not {budget}", "Use the units budget")
        return TopK(capacity_for(self.units, sparsity))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate`. Raises InputError while the decision rule is top-k, which is not causal."""
        if self.routing_state.ranks:
            raise InputError(*NOT_CAUSAL)
        return super().generate(*args, **kwargs)  # type: ignore[misc]

    def calibrated_range(self, budget: Budget | None = None) -> tuple[float, float]:
        """Lowest and highest sparsity of the threshold table."""
        values = [getattr(row, budget or self.routing_config.budget) for row in self.routing_config.thresholds]
        return (max(min(values), 0.0), max(values) + RANGE_SLACK) if values else (0.0, 0.0)

    def set_decision(self, decision: DecisionRule) -> None:
        """Use another decision rule; `set_sparsity` is the usual way."""
        self.routing_state.decision = decision
        self._target = None
        self.reset_routing_stats()

    @contextmanager
    def deciding(self, decision: DecisionRule) -> Iterator[None]:
        """Use a decision rule for the length of a `with` block."""
        before, target = self.routing_state.decision, self._target
        self.routing_state.decision = decision
        try:
            yield
        finally:
            self.routing_state.decision, self._target = before, target

    def set_execution(
        self,
        execution: Execution,
        kv: KeyValues | None = None,
        *,
        weights: Weights | None = None,
        policy: Policy = "auto",
    ) -> None:
        """Choose how routed units are computed.

        `sparse` really skips, in torch. `masked` computes both branches (reference, training). `native` is the engine
        made for the device that the model is on: inference without gradients runs in it, all else as with `sparse`.
        On a CPU, `weights` (`float32`, `bfloat16`, `int8`, `int4`; default the model's dtype) is the format of its
        packed copy of the base model's matrices; on a GPU it reads the model's own (also torchao's). The policy `auto`
        executes all rows of a unit's call where skipping some of them would take longer (small batches); `exact`
        always does what the routers say.
        Raises InputError for unknown values, or when the engine cannot run this model here.
        """
        if execution not in ("sparse", "masked", "native"):
            raise InputError(f"execution {execution!r} is not known", "Choose sparse, masked or native")
        if kv not in (None, "keep", "drop"):
            raise InputError(f"kv {kv!r} is not known", "Choose keep or drop")
        if weights is not None and execution != "native":
            raise InputError(f"weights {weights!r} need the native engine", "Use execution='native'")
        self.routing_state.native = None
        if execution == "native":
            from .execution.native import NativeExecution

            native = NativeExecution(weights, policy=policy)
            native.of(self)
            self.routing_state.native = native
        self.routing_state.execution = execution
        if kv is not None:
            self.routing_state.kv = kv

    def with_thresholds(self, rows: tuple[ThresholdRow, ...], budget: Budget, sparsity: float, context: int) -> None:
        """Store a calibrated table."""
        self.routing_config = self.routing_config.model_copy(
            update={
                "thresholds": rows,
                "budget": budget,
                "sparsity": sparsity,
                "calibration_context": context,
            }
        )

    # -- what happened ----------------------------------------------------------------------------------

    @property
    def stats(self) -> RoutingStats:
        """Raw counts since the last reset."""
        counter: RoutingStats = self.decoder.routing_stats_counter
        counter.settle()
        return counter

    def routing_stats(self) -> dict[str, Any]:
        """Realised sparsity since the last reset: units, attention, ffn, macs, tokens, per unit. Pads excluded."""
        return self.stats.as_dict(self._target)

    def reset_routing_stats(self) -> None:
        """Start counting anew."""
        self.decoder.routing_stats_counter = RoutingStats.empty(self.stats.costs, self.stats.kinds)

    def token_compute(self) -> Tensor:
        """Share of the units that each token of the last forward executed: [B, N] float32; empty when dense."""
        gates = self.routing_state.gates
        if not gates:
            return torch.ones(0)
        return torch.stack([gate.float() for gate in gates.values()]).mean(0)


def _fresh_config(
    model: PreTrainedModel,
    base: BaseModelReference,
    forecaster: ForecasterConfig,
    router: RouterConfig,
    selection: SelectionConfig,
    kv: KeyValues,
) -> RoutingConfig:
    """The configuration of untrained parts. Raises InputError when they do not go together."""
    try:
        return RoutingConfig(
            library_version=_version(),
            method=method_of(forecaster, selection),
            base_model=base,
            num_layers=model.config.num_hidden_layers,
            hidden_size=model.config.hidden_size,
            forecaster=forecaster,
            router=router,
            selection=selection,
            kv=kv,
        )
    except ValidationError as error:
        raise InputError(*describe(error)) from None


def threshold_for(config: RoutingConfig, sparsity: float, budget: Budget | None = None) -> float:
    """The margin threshold that realises a sparsity, by interpolation in the calibrated table."""
    budget = budget or config.budget
    if budget == "latency" and config.latency is None:
        raise InputError("this routing has no measured latency table", "Use units or macs, or fit with budget latency")
    rows = sorted(config.thresholds, key=lambda row: getattr(row, budget))
    if not rows:
        raise InputError("the routing has not been calibrated", "Run `fit` to the end, or training.calibrate")
    shares = [getattr(row, budget) for row in rows]
    if not shares[0] <= sparsity <= shares[-1] + RANGE_SLACK:
        raise InputError(
            f"sparsity {sparsity} is outside the calibrated range {max(shares[0], 0):.3f} to "
            f"{shares[-1]:.3f} ({budget})",
            "Choose a value inside, or fit with higher calibration targets",
        )
    for (low, row), (high, following) in zip(
        zip(shares, rows, strict=True), zip(shares[1:], rows[1:], strict=True), strict=False
    ):
        if low <= sparsity <= high:
            part = 0.0 if math.isclose(low, high) else (sparsity - low) / (high - low)
            return row.threshold + part * (following.threshold - row.threshold)
    return rows[-1].threshold  # a hair above the last measured share


def _units_of(decoder: Any) -> Iterator[RoutedUnit]:
    for layer in decoder.layers:
        yield layer.attention_routing
        yield layer.ffn_routing


@functools.cache
def _routed_model_class(base: type[PreTrainedModel]) -> type[PreTrainedModel]:
    split = getattr(base, "_no_split_modules", None)
    # Pipelines and the Trainer know causal language models by the name of their class: keep that name.
    return type(
        base.__name__,
        (RoutedModelForCausalLM, base),
        {
            "__qualname__": f"Routed{base.__name__}",
            "config_class": base.config_class,
            "forward": _forward_of(base),
            "__module__": __name__,
            "_no_split_modules": [*split, *(f"Routed{name}" for name in split)] if split else split,
        },
    )


def _forward_of(base: type[PreTrainedModel]) -> Any:
    """The base model's forward, which the native engine does where it can."""

    @functools.wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        if self.routing_state.native is not None:
            from .execution import native

            output = native.causal_lm(self, args, kwargs)
            if output is not None:
                return output
        if hasattr(cache, "first_keys"):  # an engine has written to it
            from .execution import native

            native.give_back(cache)
        return base.forward(self, *args, **kwargs)

    return forward


def _version() -> str:
    from . import __version__

    return __version__


AutoConfig.register(RoutedConfig.model_type, RoutedConfig)
AutoModelForCausalLM.register(RoutedConfig, RoutedModelForCausalLM)
