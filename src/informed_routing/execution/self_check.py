"""A few tokens through a model that was just routed: does it compute here what it must?

Other versions of transformers and torch come after ours. Where one of them passes something in another way, text could
become garbage without an error; here it becomes an error that names the versions. The first layers are run, enough to
have each kind of them, in some milliseconds each; what passed is remembered in the cache folder.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..config.folder import RoutingConfig
from ..config.parts import SelectionConfig
from ..errors import InformedRoutingError, InputError
from ..models import calls
from ..models.decoder import decoder_of, layers_name, layers_of, text_config
from ..models.discover import family_of
from ..models.head import lm_head
from ..routing.decision import AlwaysExecute, DecisionRule, Threshold
from ..routing.stats import RoutingStats
from .formats import FORMATS
from .native import NativeExecution, plan
from .possible import text_of
from .remembered import name_of, remember, remembered

SKIP_VARIABLE = "INFORMED_ROUTING_SKIP_SELF_CHECK"
"""Set to 1, no model is checked: at one's own risk."""

LENGTH, PADS = 12, 4
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 0.1}
"""Largest relative difference of a token's hidden state. What goes wrong differs by its own size."""


@contextmanager
def skipped() -> Iterator[None]:
    """Check nothing in the block: at one's own risk."""
    before = os.environ.get(SKIP_VARIABLE)
    os.environ[SKIP_VARIABLE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[SKIP_VARIABLE]
        else:
            os.environ[SKIP_VARIABLE] = before


class _Replay(DecisionRule):
    """A decision rule: gates [units, B, N] of one forward, given out unit by unit in the order of the routers."""

    def __init__(self, gates: Tensor) -> None:
        self.gates = iter(gates)

    def __call__(self, logits: Tensor) -> Tensor:
        return next(self.gates).to(logits.device)


class Check:
    """The check of one model. Make it before routing is attached: it keeps what the base model computes."""

    def __init__(self, model: Any, config: RoutingConfig) -> None:
        self.base: Tensor | None = None
        if os.environ.get(SKIP_VARIABLE) == "1" or model.device.type == "meta":
            return
        self.key = name_of(model, config, "torch")
        if not remembered(self.key):
            with _quiet(model):
                base = _base_states(model, _first_layers(model, config.selection))
            # A model that computes no numbers is said to by whoever runs it; there is nothing to compare.
            self.base = base if bool(base.isfinite().all()) else None

    def routed(self, model: Any) -> None:
        """Compare the routed model with the base, and the torch back ends with each other. Raises InputError."""
        if self.base is None:
            return
        try:
            with _quiet(model), _own_state(model):
                self._compare(model)
        except InformedRoutingError:
            raise
        except Exception as error:  # whatever a base model's own code raises
            reason = (str(error).splitlines() or [""])[0]
            raise _failure(f"{type(error).__name__}: {reason}") from error
        remember(self.key)

    def _compare(self, model: Any) -> None:
        layers, tokens = _first_layers(model, model.routing_config.selection), _tokens(model)
        tolerance = _tolerance(model)
        assert self.base is not None
        with _called_once(model.decoder.layers[:layers]), model.routing_state.using(by_units=True):
            dense = _states(model.decoder, layers, tokens)
        if not torch.equal(dense, self.base):
            raise _failure("with everything executed it is not the base model", dense, self.base)
        _compare("logits are not those of the head", *_logits(model, layers, tokens, dense), tolerance)
        trial = _Trial(model, layers)
        masked, sparse = (functools.partial(trial.torch, execution) for execution in ("masked", "sparse"))
        # Attentions that run whole do with caches and padding what they do: skipping must do the same.
        reference = None if trial.reads_caches else masked
        for name, found, expected in trial.comparisons(sparse, masked(), reference):
            _compare(name, found, expected, tolerance)


def check_engine(model: Any, native: NativeExecution) -> None:
    """Make the native engine of a routed model and compare it with the torch back ends. Raises InputError."""
    weights = native.of(model).weights
    key = name_of(model, model.routing_config, f"native {weights}")
    if os.environ.get(SKIP_VARIABLE) == "1" or remembered(key):
        return
    layers = _first_layers(model, model.routing_config.selection)
    with _quiet(model), _own_state(model), native.fixed():
        model.routing_state.choose(native=native)
        trial = _Trial(model, layers)
        wanted = trial.torch("masked")
        if not bool(wanted.isfinite().all()):
            return
        tolerance = _tolerance(model)
        rounded = max(FORMATS[weights].tolerance, tolerance)  # torch's weights are not
        for name, found, expected in trial.comparisons(trial.native, wanted):
            # Compared with itself, the engine has the same rounded weights on both sides.
            _compare(name, found, expected, rounded if expected is wanted else max(tolerance, 5e-2))
    remember(key)


class _Trial:
    """One text with fixed gates, in the ways in which it may come."""

    def __init__(self, model: Any, layers: int) -> None:
        self.model, self.layers, self.tokens = model, layers, _tokens(model)
        units = len(model.units)
        generator = torch.Generator().manual_seed(7)
        self.gates = torch.rand(units, 1, LENGTH, generator=generator) < 0.5
        routers = [unit.router is not None for unit in model.units]
        self.routers = torch.tensor(routers)
        self.reads_caches = all(unit.unit.family.in_parts for unit in model.units)

    def comparisons(self, run: Any, wanted: Tensor, reference: Any = None) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(what, found, expected) of an execution `run(tokens=, gates=, mask=, cache=)`.

        In parts, and in a padded batch, a text is expected to be what it is alone; or, with a `reference`, what that
        makes of it in the same way.
        """
        whole = run()
        yield "skipping is not the masked reference", whole, wanted
        parts = self.in_parts(run)
        yield "cached tokens are not uncached ones", parts, whole if reference is None else self.in_parts(reference)
        short = LENGTH - PADS
        pads = torch.zeros(1, PADS, dtype=torch.long, device=self.tokens.device)
        mask = torch.ones(2, LENGTH, dtype=torch.long, device=self.tokens.device)
        mask[0, :PADS] = 0
        given = {
            "tokens": torch.cat([torch.cat([pads, self.tokens[:, :short]], 1), self.tokens]),
            "gates": torch.cat([nn.functional.pad(self.gates[..., :short], (PADS, 0)), self.gates], 1),
            "mask": mask,
        }
        both = run(**given)
        same = None if reference is None else reference(**given)
        yield "a row of a batch is not the same text alone", both[1:], whole if same is None else same[1:]
        padded = whole[:, :short] if same is None else same[:1, PADS:]
        yield "a padded row is not the same text alone", both[:1, PADS:], padded

    def in_parts(self, run: Any) -> Tensor:
        """The text in parts, one after the other, with a cache."""
        cache: Any = DynamicCache(config=self.model.decoder.config) if self.reads_caches else _OwnCache()
        parts = []
        for start, stop in ((0, 7), (7, 10), (10, 11), (11, LENGTH)):
            parts.append(run(tokens=self.tokens[:, start:stop], gates=self.gates[..., start:stop], cache=cache))
        return torch.cat(parts, 1)

    def torch(self, execution: str, **given: Any) -> Tensor:
        """Hidden states by a torch back end."""
        gates = given.pop("gates", self.gates)
        self.model.routing_state.choose(execution=execution, decision=_Replay(gates[self.routers]))
        states = _states(self.model.decoder, self.layers, given.pop("tokens", self.tokens), **given)
        if len(self.model.routing_state.forward.gates) != 2 * self.layers:
            raise _failure("layers are called past their routing")
        return states

    def native(self, **given: Any) -> Tensor:
        """Hidden states by the engine."""
        state, gates = self.model.routing_state, given.pop("gates", self.gates)
        state.choose(execution="native", decision=Threshold(0.0))
        tokens, mask = given.get("tokens", self.tokens), given.get("mask")
        call = calls.Call({}, tokens=tokens, mask=mask, positions=_positions(mask), cache=given.get("cache"))
        asked = plan(self.model, call)
        if asked is None:
            raise _failure("the engine does not take a plain call")
        with asked.engine.checked(self.layers):
            return asked.run(self.model, forced=gates)


def _base_states(model: Any, layers: int) -> Tensor:
    """Hidden states of the dense model. Raises InputError where it does not run on text alone."""
    try:
        return _states(decoder_of(model), layers, _tokens(model))
    except Exception as error:  # whatever a base model's own code raises
        reason = (str(error).splitlines() or [""])[0]
        raise InputError(
            f"the {type(model).__name__} does not run on text: {type(error).__name__}: {reason}",
            "Use a model whose decoder reads token ids",
        ) from error


@dataclass
class _OwnCache:
    """The cache that a decoder makes for itself."""

    value: Any = None


def _states(decoder: Any, layers: int, tokens: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
    """Normed hidden states [B, N, d] behind the first layers."""
    with _shortened(decoder, layers):
        if not isinstance(cache, _OwnCache):
            return calls.hidden_states(decoder, tokens, mask, _positions(mask), cache)
        states, cache.value = calls.states_and_cache(decoder, tokens, mask, None, cache.value)
        return states


def _logits(model: Any, layers: int, tokens: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """[B, N, V] by the head that losses use of hidden states behind the first layers, and by the model itself."""
    with _shortened(model.decoder, layers):
        wanted: Tensor = model(input_ids=tokens, use_cache=False).logits
    return lm_head(model)(states), wanted


@contextmanager
def _called_once(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Raises InputError where the block does not call each of the layers once: decisions are kept by layer."""
    calls_of = dict.fromkeys(layers, 0)

    def count(layer: nn.Module, *_: Any) -> None:
        calls_of[layer] += 1

    handles = [layer.register_forward_pre_hook(count) for layer in calls_of]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if set(calls_of.values()) != {1}:
        raise _failure("layers are not called once each")


@contextmanager
def _shortened(decoder: Any, layers: int) -> Iterator[None]:
    """A decoder of its first layers alone."""
    name = layers_name(decoder)
    whole = getattr(decoder, name)
    if layers == len(whole):
        yield
        return
    setattr(decoder, name, whole[:layers])
    try:
        yield
    finally:
        setattr(decoder, name, whole)


def _tolerance(model: Any) -> float:
    return TOLERANCE.get(model.dtype, 0.1)


def _positions(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)


def _tokens(model: Any) -> Tensor:
    return text_of(model, LENGTH)


def _first_layers(model: Any, selection: SelectionConfig) -> int:
    """How many layers have at least one of each kind that the model has, and no fewer than two."""
    config, layers = text_config(model), len(layers_of(model))
    if any(family_of(model, place).in_place for place in range(layers)):
        return layers  # nobody has read what they hand on to each other
    kinds = getattr(config, "layer_types", None) or ()
    no_rope = getattr(config, "no_rope_layers", None) or ()
    each = [(kinds[i : i + 1], no_rope[i : i + 1], selection.is_static(i), _classes(model, i)) for i in range(layers)]
    found = [repr(kind) for kind in each]
    return min(max(2, max(found.index(kind) for kind in set(found)) + 1), layers)


def _classes(model: Any, place: int) -> tuple[str, str]:
    """The classes of a layer's units: where some layers have experts, or another attention, both kinds are run."""
    layer, family = layers_of(model)[place], family_of(model, place)
    attention, ffn = (type(getattr(layer, name or "", None)).__name__ for name in (family.attention, family.ffn))
    return attention, ffn


@contextmanager
def _quiet(model: Any) -> Iterator[None]:
    """Evaluation mode without gradients."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@contextmanager
def _own_state(model: Any) -> Iterator[None]:
    """Counters and settings of the check's own."""
    state, decoder = model.routing_state, model.decoder
    forward, counter = state.forward, decoder.routing_stats_counter
    decoder.routing_stats_counter = RoutingStats.empty(counter.costs, counter.kinds)
    own = {**vars(state.settings), "decision": AlwaysExecute(), "observer": None, "record_margins": False}
    try:
        with state.using(**own):
            yield
    finally:
        state.forward = forward
        decoder.routing_stats_counter = counter


def _compare(name: str, found: Tensor, wanted: Tensor, tolerance: float) -> None:
    difference = (found.float() - wanted.float()).norm(dim=-1) / wanted.float().norm(dim=-1)
    if not bool((difference <= tolerance).all()):
        raise _failure(name, found, wanted)


def _failure(name: str, found: Tensor | None = None, wanted: Tensor | None = None) -> InputError:
    import transformers

    by = ""
    if found is not None and wanted is not None:
        difference = (found.float() - wanted.float()).norm(dim=-1) / wanted.float().norm(dim=-1)
        by = f" (by {float(difference.max()):.2g} of its size)"
    return InputError(
        f"the self-check failed: {name}{by} with transformers {transformers.__version__} and torch {torch.__version__}",
        "Install versions that the compatibility page lists, or go on at your own risk with --skip-self-check "
        f"({SKIP_VARIABLE}=1)",
    )
