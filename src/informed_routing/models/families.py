"""The table of model families: where a decoder layer keeps attention, FFN, norms and residuals.

To add a family, add a row. The layer must be: update residual with attention, then update it with the FFN,
each as `h + scale * out_norm(unit(in_norm(h)))` with any of the norms absent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..errors import InputError


@dataclass(frozen=True)
class Family:
    """Names of the parts of one decoder layer; None where a family has no such part."""

    attention_in_norm: str | None = "input_layernorm"
    attention_out_norm: str | None = None
    ffn_in_norm: str | None = "post_attention_layernorm"
    ffn_out_norm: str | None = None
    attention: str = "self_attn"
    ffn: str = "mlp"
    attention_dropout: str | None = None
    ffn_dropout: str | None = None
    residual_scale: str | None = None
    """Attribute of the layer that multiplies a unit's update (Granite)."""
    projections: Literal["split", "fused"] = "split"
    """q_proj, k_proj, v_proj, or one qkv_proj with the rows of q, k and v in this order."""
    qk_norm: Literal["none", "head", "whole"] = "none"
    """q_norm and k_norm on each head, or on the whole projection."""
    logits_divisor: str | None = None
    """Config field that divides the logits (Granite)."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "gate_proj")


_PRE_NORM = Family()
_SANDWICH = Family(
    attention_out_norm="post_attention_layernorm",
    ffn_in_norm="pre_feedforward_layernorm",
    ffn_out_norm="post_feedforward_layernorm",
)
_POST_NORM = Family(
    attention_in_norm=None,
    attention_out_norm="post_attention_layernorm",
    ffn_in_norm=None,
    ffn_out_norm="post_feedforward_layernorm",
    qk_norm="whole",
)

FAMILIES: dict[str, Family] = {
    "llama": _PRE_NORM,
    "mistral": _PRE_NORM,
    "qwen2": _PRE_NORM,
    "smollm3": _PRE_NORM,
    "qwen3": Family(qk_norm="head"),
    "gemma2": _SANDWICH,
    "gemma3_text": Family(
        attention_out_norm="post_attention_layernorm",
        ffn_in_norm="pre_feedforward_layernorm",
        ffn_out_norm="post_feedforward_layernorm",
        qk_norm="head",
    ),
    "phi3": Family(
        attention_dropout="resid_attn_dropout",
        ffn_dropout="resid_mlp_dropout",
        projections="fused",
        lora_targets=("qkv_proj", "gate_up_proj"),
    ),
    "olmo2": _POST_NORM,
    "olmo3": _POST_NORM,
    "granite": Family(residual_scale="residual_multiplier", logits_divisor="logits_scaling"),
}


def family_of(model_type: str) -> Family:
    """The row of a model type. Raises InputError that says how to add one."""
    try:
        return FAMILIES[model_type]
    except KeyError:
        known = ", ".join(sorted(FAMILIES))
        raise InputError(
            f"model family {model_type!r} is not known (known: {known})",
            "Add a row to FAMILIES in informed_routing/models/families.py that names its attention, FFN and norms",
        ) from None
