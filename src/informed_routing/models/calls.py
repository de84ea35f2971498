"""What transformers passes to models, decoders and layers, in our own words.

Argument names move between releases (a cache was `past_key_values`, then `cache`). This is the one place that reads
them: values are found by name where the name is known, else by type, and what has no word of ours is kept as an option,
so that an engine can leave a call that says more than it understands to the base model's own modules.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutputWithPast

from ..errors import InputError

Word = Literal["tokens", "embeddings", "mask", "positions", "cache", "rope", "use_cache"]
Rope = tuple[Tensor, Tensor]

_NAMES: dict[str, Word] = {
    "input_ids": "tokens",
    "inputs_embeds": "embeddings",
    "attention_mask": "mask",
    "position_ids": "positions",
    "past_key_values": "cache",
    "cache": "cache",
    "cache_params": "cache",
    "position_embeddings": "rope",
    "use_cache": "use_cache",
}
_SAY_NOTHING = frozenset({"num_items_in_batch", "return_dict"})
"""Options that concern the loss or the form of the output, which layers do not make."""


@dataclass(frozen=True)
class Call:
    """One call. `given` holds the arguments by the names that transformers used, to be passed on as they came."""

    given: dict[str, Any]
    tokens: Tensor | None = None
    """[B, N] ids."""
    embeddings: Tensor | None = None
    """[B, N, d]."""
    mask: Any = None
    """[B, past + N] of real tokens, [B or 1, 1, N, K] of allowed keys, or an object of an attention implementation."""
    positions: Tensor | None = None
    """[B or 1, N]."""
    cache: Any = None
    rope: Rope | None = None
    """(cos, sin), each [B or 1, N, head_dim]."""
    use_cache: bool | None = None
    options: dict[str, Any] = field(default_factory=dict)
    """Everything else that says something, by its name."""
    besides: list[Any] = field(default_factory=list)
    """What the module that was called gave back besides its output: one tuple, if it gave back any."""

    @property
    def length(self) -> int | None:
        """Tokens of the call, where it says so."""
        read = self.tokens if self.tokens is not None else self.embeddings
        return None if read is None else read.shape[1]

    def with_mask(self, mask: Tensor, forward: Callable[..., Any]) -> Call:
        """The same call with another mask, for a module whose method is `forward`."""
        name = next((name for name, value in self.given.items() if value is self.mask is not None), None)
        return dataclasses.replace(self, given={**self.given, name or _mask_name(forward): mask}, mask=mask)

    def alone(self) -> Call:
        """The call without cache and mask, as if its tokens were all there are."""
        dropped = {"cache", "mask"}
        given = {
            name: None if value is not None and (_NAMES.get(name) or _by_type(value)) in dropped else value
            for name, value in self.given.items()
        }
        return dataclasses.replace(self, given=given, mask=None, cache=None)

    def rows(self, index: Tensor, total: int) -> Call:
        """The call for some of its `total` tokens, by flat index [n]: what it holds of each of them as [1, n, ...]."""
        given = {name: _picked(value, index, total) for name, value in self.given.items()}
        return dataclasses.replace(self, given=given)


def _picked(value: Any, index: Tensor, total: int) -> Any:
    """Rows of a tensor [B, N, ...] or [B * N, ...]; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    for dims in (1, 2):
        if value.shape[:dims].numel() == total:
            return value.reshape(total, *value.shape[dims:]).index_select(0, index).unsqueeze(0)
    return value


NOTHING = Call({})
"""What an FFN is told besides its input."""


def read(given: Mapping[str, Any]) -> Call:
    """The words of a call's keyword arguments. None and False say nothing; a second value for a word is an option."""
    words: dict[str, Any] = {}
    options: dict[str, Any] = {}
    for name, value in given.items():
        if value is None or name in _SAY_NOTHING:
            continue
        word = _NAMES.get(name) or _by_type(value)
        if word is None:
            if value is not False:
                options[name] = value
        elif words.setdefault(word, value) is not value:
            options[name] = value
    return Call(dict(given), options=options, **words)


def _by_type(value: Any) -> Word | None:
    """The word of an argument whose name is not known."""
    if isinstance(value, Cache):
        return "cache"
    if isinstance(value, tuple) and len(value) == 2 and all(isinstance(part, Tensor) for part in value):
        same = value[0].shape == value[1].shape and value[0].dim() == 3
        return "rope" if same and value[0].is_floating_point() else None
    if isinstance(value, Tensor) and value.dim() == 4 and (value.dtype == torch.bool or value.is_floating_point()):
        return "mask"
    return None


def bound(forward: Callable[..., Any], args: tuple[Any, ...], given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a call of a method (without self) by name, wherever they stood. Raises TypeError for too many.

    A cache under the name of another release gets the method's own: it would be ignored without a word.
    """
    own = cache_name(forward)
    caches = [name for name, word in _NAMES.items() if word == "cache" and name != own and given.get(name) is not None]
    if len(caches) == 1 and given.get(own) is None:
        given = {**{name: value for name, value in given.items() if name != caches[0]}, own: given[caches[0]]}
    if not args:
        return dict(given)
    names = _parameters(forward)
    if len(args) > len(names):
        raise TypeError(f"{len(args)} arguments were given by place, {len(names)} are known: {', '.join(names)}")
    placed = dict(zip(names, args, strict=False))
    if twice := placed.keys() & given.keys():
        raise TypeError(f"{', '.join(sorted(twice))} was given twice")
    return {**placed, **given}


@functools.cache
def _parameters(forward: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the parameters that can be given by place, without self."""
    by_place = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(forward).parameters.values()
    return tuple(p.name for p in parameters if p.kind in by_place and p.name != "self")


def first_parameter(forward: Callable[..., Any]) -> str:
    """What a method calls what it is given first, besides self."""
    return _parameters(forward)[0]


def layer_forward(base: type, run: Callable[[Any, Tensor, Call], Tensor]) -> Callable[..., Tensor]:
    """A `forward` for subclasses of the decoder layer `base`: `run(layer, hidden, call)` in our own words."""
    base_forward = base.forward  # type: ignore[attr-defined]
    stream = first_parameter(base_forward)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Tensor:
        given = bound(base_forward, args, kwargs)
        return run(self, given.pop(stream), read(given))

    return forward


@functools.cache
def cache_name(forward: Callable[..., Any]) -> str:
    """What a method calls its cache."""
    known = [name for name, word in _NAMES.items() if word == "cache"]
    parameters = inspect.signature(forward).parameters
    for name, parameter in parameters.items():
        if name in known or "Cache" in str(parameter.annotation):
            return name
    return known[0]


@functools.cache
def _takes(forward: Callable[..., Any], name: str) -> bool:
    """Whether a method has a parameter, or passes on what it has no name for."""
    parameters = inspect.signature(forward).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


@functools.cache
def _mask_name(forward: Callable[..., Any]) -> str:
    return next((name for name in inspect.signature(forward).parameters if "mask" in name), "attention_mask")


def cached(model: Any, cache: Cache) -> dict[str, Any]:
    """The keyword argument that gives `model`'s forward a cache."""
    return {cache_name(type(model).forward): cache}


def cache_of(output: Any) -> Any:
    """The cache in a model's output; None where there is none."""
    kind: Any = type(output)
    return output.get(cache_field(kind))


@functools.cache
def cache_field(output: type) -> str:
    """What an output class calls its cache; nothing where it has none."""
    names = {field.name for field in dataclasses.fields(output)}
    return next((name for name, word in _NAMES.items() if word == "cache" and name in names), "")


def hidden_states(
    decoder: Any,
    tokens: Tensor,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    cache: Cache | None = None,
) -> Tensor:
    """Normed last hidden states [B, N, d] of a decoder for ids [B, N]; a given cache gets the new keys."""
    return states_and_cache(decoder, tokens, mask, positions, cache, use_cache=cache is not None)[0]


def states_and_cache(
    decoder: Any,
    tokens: Tensor,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    cache: Any = None,
    *,
    use_cache: bool = True,
) -> tuple[Tensor, Any]:
    """As `hidden_states`, and the cache to go on with, which a decoder makes for itself; None of one that has none."""
    given: dict[str, Any] = {"input_ids": tokens, "attention_mask": mask, "use_cache": use_cache}
    if positions is not None and _takes(type(decoder).forward, "position_ids"):
        given["position_ids"] = positions
    if cache is not None:
        given |= cached(decoder, cache)
    output = decoder(**given)
    return output.last_hidden_state, cache_of(output)


def causal_lm_output(logits: Tensor, cache: Any) -> CausalLMOutputWithPast:
    """What a causal LM gives back."""
    output = CausalLMOutputWithPast(logits=logits)  # type: ignore[arg-type]
    if cache is not None:
        output[cache_field(CausalLMOutputWithPast)] = cache
    return output


def length_after_crop(length: int, argument: int) -> int:
    """Tokens that a cache of `length` keeps after `crop(argument)`: negative ones are taken off its end.

    Positive arguments once meant the length to keep, and are refused by transformers since.
    """
    argument = int(argument)  # transformers 5.16 gives a tensor
    if argument > 0:
        raise ValueError(f"crop({argument}) is not supported: give minus the number of tokens to remove")
    return max(length + argument, 0)


# ---------------------------------------------------------------------------------------------------------
# What a call asks for besides its result
# ---------------------------------------------------------------------------------------------------------


def records(model_or_decoder: Any, options: Mapping[str, Any]) -> set[str]:
    """Names of the inner results that a call or the config asks to be returned, such as `output_attentions`.

    0 is an index of a hidden state, not a no.
    """
    config = model_or_decoder.config
    asked = {name for name in options if name.startswith("output_")}
    for name in ("output_attentions", "output_hidden_states"):
        value = getattr(config, name, None)
        if value is not None and value is not False:
            asked.add(name)
    return asked


def consecutive(positions: Tensor, real: Tensor | None) -> bool:
    """Whether the positions [B or 1, N] of the real tokens ([B, N] bool, None: all) of each row go up by one.

    Where they start again, documents are packed in one row, and the base model keeps them apart by a mask of its own.
    """
    if positions.shape[-1] < 2:
        return True
    steps = positions.diff(dim=-1) == 1
    if real is not None:
        steps = steps | ~(real[:, 1:] & real[:, :-1])
    return bool(steps.all())


def plain_mask(mask: Any) -> bool:
    """Whether a layer's mask is one whose rows can be picked: none, or [B or 1, 1, N, K] boolean or additive."""
    return mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)


def has_own_forward(module: Any) -> bool:
    """Whether a module's `forward` is another than its class's. (Removed hooks leave the class's own on the module.)"""
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def check_own_forwards(modules: Iterable[nn.Module]) -> None:
    """Raises InputError for modules whose `forward` was replaced: it would be called instead of the routed class's."""
    for module in modules:
        if has_own_forward(module):
            raise InputError(
                f"the model's {type(module).__name__} has a forward of its own (hooks of accelerate, or a patch)",
                "Load it without device_map, or take hooks off: "
                "accelerate.hooks.remove_hook_from_module(model, recurse=True)",
            )
        vars(module).pop("forward", None)  # the class's own: it would stand before the routed class's


def is_watched(module: Any) -> bool:
    """Whether a module's call does more than its class says: hooks, or a `forward` of its own.

    The hooks by which transformers records hidden states stay on modules for good, and do nothing unless asked.
    """
    if has_own_forward(module) or module._forward_pre_hooks:
        return True
    return any(
        getattr(hook, "__module__", "") != _CAPTURING or not getattr(hook, "__name__", "").startswith("output_captur")
        for hook in module._forward_hooks.values()
    )


_CAPTURING = "transformers.utils.output_capturing"
