"""Attentions whose arithmetic we know, recognised by their code: word for word that of one in the table of families."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

from .decoder import decoder_of
from .families import FAMILIES, Family
from .source import forward_of, same_code

_PREFIXES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
    "gemma2": "Gemma2",
    "gemma3_text": "Gemma3",
    "phi3": "Phi3",
    "olmo2": "Olmo2",
    "olmo3": "Olmo3",
}
"""Families whose attentions are told apart by their code, and how their classes' names begin."""

_HELPERS = ("apply_rotary_pos_emb", "rotate_half", "eager_attention_forward", "repeat_kv")


@dataclass(frozen=True)
class _Known:
    family: str
    module: Any

    def part(self, name: str) -> Any:
        return getattr(self.module, _PREFIXES[self.family] + name)


@functools.cache
def _known() -> tuple[_Known, ...]:
    from transformers.models.gemma2 import modeling_gemma2
    from transformers.models.gemma3 import modeling_gemma3
    from transformers.models.llama import modeling_llama
    from transformers.models.mistral import modeling_mistral
    from transformers.models.olmo2 import modeling_olmo2
    from transformers.models.olmo3 import modeling_olmo3
    from transformers.models.phi3 import modeling_phi3
    from transformers.models.qwen2 import modeling_qwen2
    from transformers.models.qwen3 import modeling_qwen3
    from transformers.models.smollm3 import modeling_smollm3

    modules = (
        *(modeling_llama, modeling_mistral, modeling_qwen2, modeling_qwen3, modeling_smollm3),
        *(modeling_gemma2, modeling_gemma3, modeling_phi3, modeling_olmo2, modeling_olmo3),
    )
    return tuple(_Known(name, module) for name, module in zip(_PREFIXES, modules, strict=True))


def row_of_attention(attention: nn.Module) -> Family | None:
    """The row of a family whose attention has the same code as this one; None where there is none."""
    own = forward_of(attention)
    for known in _known():
        if same_code(own, known.part("Attention").forward):
            return FAMILIES[known.family]
    return None


def gate_up_of(mlp: nn.Module) -> tuple[Any, str]:
    """(gate_up, attribute of the activation) of a gated FFN, as rows have them; gate_up None for any other."""
    own = forward_of(mlp)
    for known in _known():
        if same_code(own, known.part("MLP").forward):
            row = FAMILIES[known.family]
            return row.gate_up, row.ffn_activation
    return None, Family.ffn_activation


def is_plain(row: Family, model: Any, layer: nn.Module, attention: nn.Module, mlp: nn.Module) -> bool:
    """Whether all of a causal LM is computed by the code of the family in the table whose attention it has.

    What native engines compute: rotary embeddings over whole heads, RMS norms, gated FFNs, a stack of layers without
    factors of its own and with masks for that family's windows, and a head that is one product.
    """
    known = next(known for known in _known() if FAMILIES[known.family] == row)
    plain = next(iter(_known()))
    decoder = decoder_of(model)
    norms = [part for part in (*layer.modules(), *decoder.children()) if type(part).__name__.endswith("Norm")]
    helpers = sys.modules[type(attention).__module__]
    return (
        gate_up_of(mlp)[0] is not None
        and all(same_code(forward_of(norm), plain.part("RMSNorm").forward) for norm in norms)
        and all(same_code(getattr(helpers, name, None), getattr(plain.module, name)) for name in _HELPERS)
        and same_code(forward_of(decoder), known.part("Model").forward)
        and same_code(forward_of(model), known.part("ForCausalLM").forward)
    )
