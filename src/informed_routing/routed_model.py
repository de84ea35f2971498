"""The routed model: an ordinary transformers causal LM whose decoder layers decide per token what to execute.

    model = RoutedModelForCausalLM.from_pretrained("out/")
    model.set_sparsity(0.25)
    model.generate(**tokens)

`attach` gives a live dense model routed layers in place; the result is a subclass of the base model's own class,
so generation, adapters, pipelines and evaluation harnesses treat it as what it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, cast, get_args

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from .config.folder import RoutingConfig, ThresholdRow
from .config.kinds import kind, kinds_of
from .config.parts import Budget, Decision, ForecasterConfig, RouterConfig, SelectionConfig
from .errors import InputError
from .execution.attach import route_decoder, units_of
from .execution.layer import NOT_CAUSAL
from .execution.possible import check_router, check_selection, fresh_config, measured_private, possible_selection
from .execution.self_check import Check, check_engine, skipped
from .models import calls
from .models.decoder import decoder_of, layers_of, text_config
from .models.discover import family_of
from .models.fingerprint import reference_to
from .models.restore import all_or_nothing
from .models.runtime_classes import made_by
from .persistence.auto_config import RoutedConfig
from .persistence.pretrained import FromRoutingFolder
from .routing.costs import UnitCost
from .routing.decision import AlwaysExecute, DecisionRule
from .routing.dial import RANGE_SLACK
from .routing.routed_unit import RoutedUnit
from .routing.state import Execution, KeyValues, RoutingState
from .routing.stats import RoutingStats

__all__ = ["RoutedModelForCausalLM"]

if TYPE_CHECKING:
    from .execution.engine import Policy
    from .execution.formats import Weights


class RoutedModelForCausalLM(FromRoutingFolder):
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
        self_check: bool = True,
    ) -> RoutedModelForCausalLM:
        """Give a dense model routed layers, in place, with fresh (or, for `routing_config`, unloaded) weights.

        Forecaster, router, selection and `kv` are the parts that make a method; `routing_config` holds all of them.
        Every token executes until `set_sparsity`, so logits are the base model's. Of an attention whose code is not
        known those matrices are skipped that nobody else needs (`routing_config.private`); where there are none, only
        FFNs are routed (`routing_config.selection.units` says so). Raises InputError for a family whose layers are not
        understood, a rank above the hidden size, parts that do not go together, and where a few tokens show that the
        routed model does not compute what it must with the versions installed (`self_check`).
        """
        if isinstance(model, RoutedModelForCausalLM):
            raise InputError("the model is routed already", "Load the dense base model first")
        family_of(model)  # first of all: it says which families there are
        if routing_config is None:
            reference = reference_to(model, name, revision)
            forecaster, router = forecaster or ForecasterConfig(), router or RouterConfig()
            selection = selection or SelectionConfig()
            private = () if kv == "drop" else measured_private(model, selection)
            possible = possible_selection(model, selection, private, given=False)
            routing_config = fresh_config(model, reference, forecaster, router, possible, kv, private, _version())
        else:
            private = ()
            possible_selection(model, routing_config.selection, routing_config.private, given=True)
        check_router(model, routing_config.router)
        with nullcontext() if self_check else skipped():
            try:
                return _checked_routing(model, routing_config)
            except InputError:
                if not private or selection is None or routing_config.selection.units != "both":
                    raise
        # Private matrices were measured one by one: together with all else they do not do. FFNs alone may.
        possible = selection.model_copy(update={"units": "ffn"})
        return cls.attach(
            model, forecaster, router, selection=possible, kv=kv, name=name, revision=revision, self_check=self_check
        )

    def __init__(self, config: Any = None, *_: Any, **__: Any) -> None:
        raise InputError(
            "a routed model is not built from a configuration", "Use from_pretrained(folder), or attach(model)"
        )

    # -- parts ------------------------------------------------------------------------------------------

    @property
    def decoder(self) -> Any:
        """The routed decoder (the base model's stack of layers)."""
        return decoder_of(self)

    @property
    def units(self) -> list[RoutedUnit]:
        """All routed units in order: attention and ffn of layer 0, of layer 1, ..."""
        return list(units_of(self.decoder))

    @property
    def costs(self) -> list[UnitCost]:
        """What each unit costs, in the order of `units`."""
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
        """Choose how much is approximated, without retraining. 0 is the dense model, its static layers included.

        `budget` says what the number means (default: what the routers were trained for). `decision` is how tokens are
        chosen: by `threshold`, or the `top-k` of each sequence, which is what MoD is trained and scored with but cannot
        generate (default: the method's own). Raises InputError outside the calibrated range, when the model has not
        been calibrated, for less than static layers save, or for top-k of routers that do not rank.
        """
        if not 0 <= sparsity < 1:
            raise InputError(f"sparsity {sparsity} is not between 0 and 1", "Give a share such as 0.25")
        for given, known in ((budget, get_args(Budget)), (decision, kinds_of("rules"))):
            if given is not None and given not in known:
                raise InputError(f"{given!r} is not known", f"Choose one of {', '.join(known)}")
        decision = decision or self.routing_config.selection.decision
        if sparsity == 0:
            self.set_decision(AlwaysExecute())
        else:
            rule = kind("rules", decision).at(
                self.routing_config, self.units, sparsity, budget or self.routing_config.budget
            )
            self.set_decision(rule)
        self._target = sparsity
        self.routing_state.choose(share=1 - sparsity)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate`. Raises InputError while the decision rule is top-k, which is not causal."""
        if self.routing_state.ranks:
            raise InputError(*NOT_CAUSAL)
        with self.weights_fixed():
            return super().generate(*args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def weights_fixed(self) -> Iterator[None]:
        """Compare the weights with those of the native engine once, not at each call within: for loops of calls.

        The model must not be changed within. Without it every call that begins a text reads all weights once, to
        notice also what no version counter sees.
        """
        native = self.routing_state.native
        with nullcontext() if native is None else native.fixed():
            yield

    def calibrated_range(self, budget: Budget | None = None) -> tuple[float, float]:
        """Lowest and highest sparsity of the threshold table."""
        values = [getattr(row, budget or self.routing_config.budget) for row in self.routing_config.thresholds]
        return (max(min(values), 0.0), max(values) + RANGE_SLACK) if values else (0.0, 0.0)

    def set_decision(self, decision: DecisionRule | Callable[[Tensor], Tensor]) -> None:
        """Use another decision rule; `set_sparsity` is the usual way."""
        self.routing_state.choose(decision=decision)
        self._target = None
        self.reset_routing_stats()

    @contextmanager
    def deciding(self, decision: DecisionRule | Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Use a decision rule for the length of a `with` block."""
        target = self._target
        try:
            with self.routing_state.using(decision=decision):
                yield
        finally:
            self._target = target

    def set_execution(
        self,
        execution: Execution,
        kv: KeyValues | None = None,
        *,
        weights: Weights | None = None,
        policy: Policy = "exact",
        self_check: bool = True,
    ) -> None:
        """Choose how routed units are computed.

        `sparse` really skips, in torch. `masked` computes both branches (reference, training). `native` is the engine
        made for the device that the model is on: inference without gradients runs in it, all else as with `sparse`.
        On a CPU, `weights` (`float32`, `bfloat16`, `int8`, `int4`; default the model's dtype) is the format of its
        packed copy of the base model's matrices; on a GPU it reads the model's own (also torchao's). The policy `exact`
        always does what the routers say, so the same tokens give the same text; `auto` executes all rows of a unit's
        call where skipping some of them would take longer (small batches, small units) by prices timed on this machine,
        natively or in torch.
        Raises InputError for unknown values, when the engine cannot run this model here, or when a few tokens show that
        it does not compute what it must (`self_check`); the model is then as it was.
        """
        if execution not in ("sparse", "masked", "native"):
            raise InputError(f"execution {execution!r} is not known", "Choose sparse, masked or native")
        if kv not in (None, "keep", "drop"):
            raise InputError(f"kv {kv!r} is not known", "Choose keep or drop")
        if weights is not None and execution != "native":
            raise InputError(f"weights {weights!r} need the native engine", "Use execution='native'")
        if policy not in ("exact", "auto"):
            raise InputError(f"policy {policy!r} is not known", "Choose exact or auto")
        if policy == "auto" and execution == "masked":
            raise InputError("policy 'auto': masked execution computes everything", "Use execution='sparse'")
        state = self.routing_state
        kept = state.kv if kv is None else kv
        if policy == "auto" and kept == "drop":
            raise InputError("policy 'auto' does not go with kv='drop'", "Use policy='exact', or kv='keep'")
        if kept == "drop" and self.routing_config.selection.static_layers:
            raise InputError("kv='drop' does not go with static layers", "Use kv='keep'")
        if kept == "drop" and self.routing_config.selection.units == "ffn":
            raise InputError("kv='drop': attentions that always execute drop no keys", "Use kv='keep'")
        if kept == "drop" and self.routing_config.private:
            raise InputError("kv='drop': attentions that run whole drop no keys", "Use kv='keep'")
        native = None
        if execution == "native":
            from .execution.native import NativeExecution

            if kept == "drop":
                raise InputError(
                    "the native engine keeps all keys", "Use kv='keep', or execution='sparse' with kv='drop'"
                )
            native = NativeExecution(weights, policy=policy)
            with nullcontext() if self_check else skipped():
                check_engine(self, native)
        state.choose(execution=execution, native=native, kv=kept, policy=policy)

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
        gates = self.routing_state.forward.gates
        if not gates:
            return torch.ones(0)
        compute = torch.stack([gate.float() for gate in gates.values()]).mean(0)
        if not self.routing_state.dense:
            return compute
        return 1 - (1 - compute) * len(gates) / len(self.units)  # only static units have gates


@all_or_nothing
def _checked_routing(model: PreTrainedModel, config: RoutingConfig) -> RoutedModelForCausalLM:
    """Routing put into a dense model, which then computes what it must; InputError if not, and it is as it was."""
    kind("fallbacks", config.forecaster.fallback).check(config.forecaster, text_config(model).hidden_size)
    layers = layers_of(model)
    if taken := sorted(set(vars(model)["_modules"]) & set(dir(RoutedModelForCausalLM))):
        raise InputError(
            f"a {type(model).__name__} has a part of its own that is called {taken[0]}", "Use another model"
        )
    check_selection(text_config(model), len(layers), config.selection)
    calls.check_own_forwards((model, decoder_of(model), *layers))
    check = Check(model, config)
    routed = _with_routing(model, config)
    check.routed(routed)
    return routed


def _with_routing(model: PreTrainedModel, config: RoutingConfig) -> RoutedModelForCausalLM:
    """Give the layers of a dense model their routed units, and layers, decoder and model their routed classes."""
    state = route_decoder(model, config)
    training = model.training
    model.__class__ = _routed_model_class(type(model))  # type: ignore[arg-type]
    routed = cast(RoutedModelForCausalLM, model)
    routed.routing_config, routed.routing_state, routed._target = config, state, 0.0
    routed.train(training)
    return routed


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
            **made_by(_routed_model_class, base),
            "_no_split_modules": [*split, *(f"Routed{name}" for name in split)] if split else split,
        },
    )


def _forward_of(base: type[PreTrainedModel]) -> Any:
    """The base model's forward, which the native engine does where it can."""

    base_forward = base.forward

    @functools.wraps(base_forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        call = calls.read(calls.bound(base_forward, args, kwargs))
        if self.routing_state.native is not None:
            from .execution import native

            output = native.causal_lm(self, call)
            if output is not None:
                return output
        if hasattr(call.cache, "first_keys"):  # an engine has written to it
            from .execution import native

            native.give_back(call.cache)
        return base_forward(self, **call.given)

    return forward


def _version() -> str:
    from . import __version__

    return __version__


AutoConfig.register(RoutedConfig.model_type, RoutedConfig, exist_ok=True)
AutoModelForCausalLM.register(RoutedConfig, RoutedModelForCausalLM, exist_ok=True)
