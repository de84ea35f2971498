"""A few tokens through a model that was just routed: does it compute here what it must?

Other versions of transformers and torch come after ours. Where one of them passes something in another way, text could
become garbage without an error; here it becomes an error that names the versions. The first layers are run, enough to
have each kind of them, in some milliseconds each; what passed is remembered in the cache folder.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from ..assets.cache import cache_dir
from ..config.folder import RoutingConfig
from ..config.parts import SelectionConfig
from ..errors import InformedRoutingError, InputError
from ..files.atomic import write_json
from ..models import calls
from ..models.discover import family_of
from ..models.head import lm_head
from ..routing.decision import AlwaysExecute, DecisionRule, Threshold
from ..routing.stats import RoutingStats
from .formats import FORMATS
from .native import NativeExecution, plan

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
        self.key = _key(model, config, "torch")
        if not _remembered(self.key):
            with _quiet(model):
                base = _states(model.model, _first_layers(model, config.selection), _tokens(model))
            # A model that computes no numbers is said to by whoever runs it; there is nothing to compare.
            self.base = base if bool(base.isfinite().all()) else None

    def routed(self, model: Any) -> None:
        """Compare the routed model with the base, and the torch back ends with each other. Raises InputError."""
        if self.base is None:
            return
        layers = _first_layers(model, model.routing_config.selection)
        tokens = _tokens(model)
        with _quiet(model), _own_state(model):
            dense = _states(model.decoder, layers, tokens)
            if not torch.equal(dense, self.base):
                raise _failure("with everything executed it is not the base model", dense, self.base)
            _compare("logits are not those of the head", *_logits(model, layers, tokens, dense), _tolerance(model))
            trial = _Trial(model, layers)
            try:
                wanted = trial.torch("masked")
                for name, found, expected in trial.comparisons(lambda **given: trial.torch("sparse", **given), wanted):
                    _compare(name, found, expected, _tolerance(model))
            except InformedRoutingError:
                raise
            except Exception as error:  # whatever a base model's own code raises
                raise _failure(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}") from error
        _remember(self.key)


def check_engine(model: Any, native: NativeExecution) -> None:
    """Make the native engine of a routed model and compare it with the torch back ends. Raises InputError."""
    weights = native.of(model).weights
    key = _key(model, model.routing_config, f"native {weights}")
    if os.environ.get(SKIP_VARIABLE) == "1" or _remembered(key):
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
    _remember(key)


class _Trial:
    """One text with fixed gates, in the ways in which it may come."""

    def __init__(self, model: Any, layers: int) -> None:
        self.model, self.layers, self.tokens = model, layers, _tokens(model)
        units = len(model.units)
        generator = torch.Generator().manual_seed(7)
        self.gates = torch.rand(units, 1, LENGTH, generator=generator) < 0.5
        routers = [unit.router is not None for unit in model.units]
        self.routers = torch.tensor(routers)

    def comparisons(self, run: Any, wanted: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
        """(what, found, expected) of an execution `run(tokens=, gates=, mask=, cache=)`."""
        whole = run()
        yield "skipping is not the masked reference", whole, wanted
        cache, parts = DynamicCache(config=self.model.config), []
        for start, stop in ((0, 7), (7, 10), (10, 11), (11, LENGTH)):
            parts.append(run(tokens=self.tokens[:, start:stop], gates=self.gates[..., start:stop], cache=cache))
        yield "cached tokens are not uncached ones", torch.cat(parts, 1), whole
        short = LENGTH - PADS
        pads = torch.zeros(1, PADS, dtype=torch.long, device=self.tokens.device)
        mask = torch.ones(2, LENGTH, dtype=torch.long, device=self.tokens.device)
        mask[0, :PADS] = 0
        both = run(
            tokens=torch.cat([torch.cat([pads, self.tokens[:, :short]], 1), self.tokens]),
            gates=torch.cat([nn.functional.pad(self.gates[..., :short], (PADS, 0)), self.gates], 1),
            mask=mask,
        )
        yield "a row of a batch is not the same text alone", both[1:], whole
        yield "a padded row is not the same text alone", both[:1, PADS:], whole[:, :short]

    def torch(self, execution: str, **given: Any) -> Tensor:
        """Hidden states by a torch back end."""
        state = self.model.routing_state
        gates = given.pop("gates", self.gates)
        state.choose(execution=execution, decision=_Replay(gates[self.routers]))
        states = _states(self.model.decoder, self.layers, given.pop("tokens", self.tokens), **given)
        if len(state.forward.gates) != 2 * self.layers:
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


def _states(decoder: Any, layers: int, tokens: Tensor, mask: Tensor | None = None, cache: Any = None) -> Tensor:
    """Normed hidden states [B, N, d] behind the first layers."""
    whole = decoder.layers
    decoder.layers = whole[:layers]
    try:
        return calls.hidden_states(decoder, tokens, mask, _positions(mask), cache)
    finally:
        decoder.layers = whole


def _logits(model: Any, layers: int, tokens: Tensor, states: Tensor) -> tuple[Tensor, Tensor]:
    """[B, N, V] by the head that losses use of hidden states behind the first layers, and by the model itself."""
    whole = model.decoder.layers
    model.decoder.layers = whole[:layers]
    try:
        wanted: Tensor = model(input_ids=tokens, use_cache=False).logits
    finally:
        model.decoder.layers = whole
    return lm_head(model)(states), wanted


def _tolerance(model: Any) -> float:
    return TOLERANCE.get(model.dtype, 0.1)


def _positions(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else (mask.cumsum(1) - 1).clamp(min=0)


def _tokens(model: Any) -> Tensor:
    places = torch.arange(LENGTH, device=model.device)[None]
    return (places * 7919 + 5) % model.get_input_embeddings().weight.shape[0]


def _first_layers(model: Any, selection: SelectionConfig) -> int:
    """How many layers have at least one of each kind that the model has, and no fewer than two."""
    kinds = getattr(model.config, "layer_types", None) or ()
    no_rope = getattr(model.config, "no_rope_layers", None) or ()
    layers = len(model.model.layers)
    each = [(kinds[i : i + 1], no_rope[i : i + 1], selection.is_static(i), _classes(model, i)) for i in range(layers)]
    found = [repr(kind) for kind in each]
    return min(max(2, max(found.index(kind) for kind in set(found)) + 1), layers)


def _classes(model: Any, place: int) -> tuple[str, str]:
    """The classes of a layer's units: where some layers have experts, or another attention, both kinds are run."""
    layer, family = model.model.layers[place], family_of(model, place)
    return type(getattr(layer, family.attention, None)).__name__, type(getattr(layer, family.ffn, None)).__name__


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


# ---------------------------------------------------------------------------------------------------------
# What passed is remembered
# ---------------------------------------------------------------------------------------------------------


def _key(model: Any, routing: RoutingConfig, engine: str) -> str:
    """A name for everything that the outcome depends on."""
    import transformers

    config = {name: value for name, value in model.config.to_dict().items() if not name.startswith("_name")}
    parts = [
        _own_code(),
        transformers.__version__,
        torch.__version__,
        engine,
        str(model.dtype),
        model.device.type,
        model.config._attn_implementation,
        config,
        routing.kv,
        *(part.model_dump() for part in (routing.router, routing.forecaster, routing.selection)),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


@functools.cache
def _own_code() -> str:
    """What of this library computes forwards."""
    digest, root = hashlib.sha256(), Path(str(resources.files("informed_routing")))
    for room in ("models", "routing", "execution"):
        for path in sorted((root / room).rglob("*")):
            if path.suffix in (".py", ".h", ".cpp"):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _file(key: str) -> Path:
    return cache_dir() / "self-checks" / f"{key}.json"


def _remembered(key: str) -> bool:
    try:
        return json.loads(_file(key).read_text(encoding="utf-8")) == {"passed": True}
    except (OSError, ValueError):
        return False


def _remember(key: str) -> None:
    with suppress(InformedRoutingError):  # a cache that cannot be written: the next run checks again
        write_json(_file(key), {"passed": True})
