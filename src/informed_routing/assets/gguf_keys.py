"""The keys of a GGUF file: each is asked for by name, and none that may matter is passed over."""

from __future__ import annotations

import struct
from math import isfinite
from typing import TYPE_CHECKING, Any

from informed_routing.errors import InputError

if TYPE_CHECKING:
    from informed_routing.assets.gguf_file import GgufModel

ORIGINAL = "Give the original model as a folder with safetensors"

# Keys without a say in the logits, whatever they hold.
_HARMLESS = {"tensor_data_layout", "rope.scaling.finetuned"}
# Keys that change nothing at this value.
_NEUTRAL: dict[str, Any] = {
    "logit_scale": 1.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.sliding_window": 0,
    "attention.temperature_scale": 0.0,
    "attention.shared_kv_layers": 0,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "expert_count": 0,
    "expert_used_count": 0,
    "leading_dense_block_count": 0,
    "nextn_predict_layers": 0,
    "pooling_type": 0,
    "rope.scaling.yarn_log_multiplier": 0.0,
    "use_parallel_residual": False,
}


class Keys:
    """The keys of one architecture, remembering which were asked for."""

    def __init__(self, model: GgufModel, architecture: str) -> None:
        self.model, self.prefix = model, f"{architecture}."
        self.asked: set[str] = set()

    def refused(self, why: str) -> InputError:
        """The error for a file that is not understood."""
        return InputError(f"{self.model.path} is not read: {why}", ORIGINAL)

    def get(self, name: str, default: Any = None) -> Any:
        """A key's value; of an array with one value for each layer, that value if all are the same."""
        self.asked.add(name)
        value = self.model.keys.get(self.prefix + name, default)
        if hasattr(value, "tolist"):
            value = value.tolist()
        if isinstance(value, list):
            if len(set(map(str, value))) != 1:
                raise self.refused(f"{self.prefix}{name} is not the same in every layer")
            value = value[0]
        if value is None:
            raise self.refused(f"the key {self.prefix}{name} is missing")
        return value

    def whole(self, name: str, default: int | None = None, least: int = 1) -> int:
        """A whole number of at least `least`. Raises InputError for anything else."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.refused(f"{self.prefix}{name} is {value!r}, not a whole number of {least} or more")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A finite number. Raises InputError for anything else."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not isfinite(value):
            raise self.refused(f"{self.prefix}{name} is {value!r}, not a finite number")
        return shortest_float32(float(value))

    def text(self, name: str, default: str) -> str:
        """A text. Raises InputError for anything else."""
        value = self.get(name, default)
        if not isinstance(value, str):
            raise self.refused(f"{self.prefix}{name} is {value!r}, not a text")
        return value

    def layers(self, name: str, count: int) -> list[bool] | None:
        """A yes or no for each layer, from an array or from a period (every n-th is not); None if absent."""
        self.asked.add(name)
        value = self.model.keys.get(self.prefix + name)
        if value is None:
            return None
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return [bool((layer + 1) % value) for layer in range(count)]
        found = [bool(item) for item in getattr(value, "tolist", list)()] if not isinstance(value, (str, bool)) else []
        if len(found) != count:
            raise self.refused(f"{self.prefix}{name} is {value!r}, not a value for each of {count} layers")
        return found

    def check_all_asked(self) -> None:
        """Refuse keys of this architecture that nobody asked for, unless they change nothing."""
        left = []
        for key, value in self.model.keys.items():
            name = key.removeprefix(self.prefix)
            if not key.startswith(self.prefix) or name in self.asked or name in _HARMLESS:
                continue
            if name in _NEUTRAL and not hasattr(value, "tolist") and value == _NEUTRAL[name]:
                continue
            left.append(f"{key} = {value!r}" if isinstance(value, (int, float, str)) else key)
        if left:
            more = f" and {len(left) - 3} more" if len(left) > 3 else ""
            raise self.refused(f"what {', '.join(left[:3])}{more} should change is not known")


def shortest_float32(value: float) -> float:
    """1e-5 for 9.999999747378752e-06: the same float32, as people write it."""
    if not isfinite(value):
        return value
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        try:
            if struct.pack("f", short) == struct.pack("f", value):
                return short
        except OverflowError:  # a 64-bit value beyond float32
            return value
    return value
