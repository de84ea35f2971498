"""The table of weight formats: what a weight occupies, and in which formats the rest of a model is beside it.

To add a format that the CPU engine packs, add a row and its name in `Packed`, and a struct to cpu/source/formats.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from ..routing.storage import Storage

if TYPE_CHECKING:
    import torch

Packed = Literal["float32", "bfloat16", "int8", "int4"]
"""Formats that the CPU engine packs weights in."""
Weights = Literal[Packed, "float16"]
"""Formats of an engine's weights. The GPU engine takes the model's, which are of one of torch's dtypes."""

GROUP = 32
"""Inputs that share a scale in the quantised formats."""


@dataclass(frozen=True)
class Format:
    """One format of the base model's matrices. Formats of other parts are named, None where they are this one."""

    name: Weights
    bits: int
    group_bytes: int = 0
    """Bytes beside each group of inputs of an output: a half-precision scale, or scale and minimum; 0: no groups."""
    id: int | None = None
    """What the CPU engine calls it (formats.h); None for formats that it does not pack."""
    ungrouped: Packed | None = None
    """Of matrices whose inputs fill no groups."""
    head: Packed | None = None
    """Of the LM head."""
    forecaster: Weights | None = None
    """Of forecasters: they are small and see what is approximated, so never below half precision."""
    cache: Weights | None = None
    """Of keys and values."""
    has_dtype: bool = True
    """Whether torch has a dtype of this name."""
    tolerance: float = 0.0
    """Largest relative difference of a token's hidden state to that with the model's own weights."""

    @property
    def bytes(self) -> float:
        """Bytes of one weight."""
        return self.bits / 8 + self.group_bytes / GROUP

    @property
    def dtype(self) -> torch.dtype | None:
        """Torch's dtype of this name; None where it has none."""
        import torch

        return getattr(torch, self.name) if self.has_dtype else None

    @property
    def storage(self) -> Storage:
        """What the roofline counts for an engine with such weights."""
        forecaster, head, cache = self.of("forecaster"), self.of("head"), self.of("cache")
        return Storage(body=self.bytes, forecaster=forecaster.bytes, head=head.bytes, kv=cache.bytes)

    def of(self, part: Literal["head", "forecaster", "cache", "ungrouped"]) -> Format:
        """The format of another part of a model whose matrices are in this one."""
        return FORMATS[getattr(self, part) or self.name]


FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        Format("float32", 32, id=0, tolerance=1e-3),
        Format("bfloat16", 16, id=1, tolerance=5e-2),
        Format(
            "int8",
            8,
            group_bytes=2,
            id=2,
            ungrouped="bfloat16",
            forecaster="bfloat16",
            cache="bfloat16",
            has_dtype=False,
            tolerance=0.1,
        ),
        Format(
            "int4",
            4,
            group_bytes=4,
            id=3,
            ungrouped="bfloat16",
            head="int8",  # 4-bit embeddings cost text quality, the head is read once a token: 8 bits, as in GGUF files
            forecaster="bfloat16",
            cache="bfloat16",
            has_dtype=False,
            tolerance=0.5,
        ),
        Format("float16", 16),
    )
}
PACKED: tuple[Packed, ...] = get_args(Packed)


def packed_of(dtype: torch.dtype) -> Packed:
    """The CPU engine's format for weights of a dtype: the same where it has one, else float32."""
    name = str(dtype).removeprefix("torch.")
    return name if name in PACKED and FORMATS[name].has_dtype else "float32"  # type: ignore[return-value]
