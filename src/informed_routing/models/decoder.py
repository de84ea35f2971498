"""Where a causal LM keeps its decoder: the layers that text goes through, beside other parts or not."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..errors import InputError


def text_config(model: Any) -> Any:
    """The settings of a model's decoder, which a model for images, too, has beside those of its other parts."""
    return model.config.get_text_config(decoder=True)


def decoder_of(model: Any) -> Any:
    """The decoder of a causal LM, dense or routed. Raises InputError where none is found."""
    parts = vars(model)["_modules"]
    usual = parts.get("model")
    if isinstance(usual, PreTrainedModel) and isinstance(vars(usual)["_modules"].get("layers"), nn.ModuleList):
        return usual
    text = text_config(model)
    for part in model.modules():
        # Not the model itself: a decoder gives hidden states. Parts for images have settings of another class.
        own = isinstance(part, PreTrainedModel) and part is not model and type(part.config) is type(text)
        if own and _stack(part, getattr(text, "num_hidden_layers", None)) is not None:
            return part
    raise InputError(
        f"a {type(model).__name__} has no decoder with one list of its layers",
        "Use a model whose decoder holds its layers in one list",
    )


def layers_name(decoder: Any) -> str:
    """What a decoder calls its list of layers. Raises InputError where it has none."""
    count = getattr(getattr(decoder, "config", None), "num_hidden_layers", None)
    name = _stack(decoder, count)
    if name is None:
        raise InputError(f"a {type(decoder).__name__} has no list of layers", "Give the decoder of a causal LM")
    return name


def layers_of(model: Any) -> Any:
    """The layers of a causal LM's decoder, dense or routed: an `nn.ModuleList`."""
    decoder = decoder_of(model)
    return getattr(decoder, layers_name(decoder))


def _stack(decoder: nn.Module, count: int | None) -> str | None:
    lists = {name: part for name, part in decoder.named_children() if isinstance(part, nn.ModuleList)}
    if "layers" in lists:
        return "layers"
    alike = [name for name, part in lists.items() if len(part) == count]
    return alike[0] if len(alike) == 1 else None
