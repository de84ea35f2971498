"""The table of model families: where a decoder layer keeps attention, FFN, norms and residuals, and how they compute.

The torch back ends, both native engines, losses and costs read its rows. The layer must be: update residual with
attention, then update it with the FFN, each as `h + scale * out_norm(unit(in_norm(h)))` with any of the norms absent.
Rows of families that are not here are read from their code (`discover.py`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from .layer_code import Passed

NativeName = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class Family:
    """Names of the parts of one decoder layer and of settings; None where a family has no such part."""

    attention_in_norm: str | None = "input_layernorm"
    attention_out_norm: str | None = None
    ffn_in_norm: str | None = "post_attention_layernorm"
    ffn_out_norm: str | None = None
    attention: str | None = "self_attn"
    ffn: str | None = "mlp"
    ffn_beside: str | None = None
    """Another module that reads what the FFN reads, and whose output is added to its (Granite 4's shared MLP)."""
    attention_dropout: str | None = None
    ffn_dropout: str | None = None
    residual_scale: str | None = None
    """Attribute of the layer that multiplies a unit's update (Granite)."""
    qkv: Literal["split", "fused"] = "split"
    """q_proj, k_proj, v_proj, or one qkv_proj with the rows of q, k and v in this order."""
    gate_up: Literal["split", "fused"] | None = "split"
    """gate_proj, up_proj, or one gate_up_proj with the rows of gate and up in this order; None: no gated FFN."""
    ffn_activation: str = "act_fn"
    """Attribute of a gated FFN: what its gate goes through."""
    qk_norm: Literal["none", "head", "whole"] = "none"
    """q_norm and k_norm on each head, or on the whole projection."""
    rotates: str | None = None
    """Attribute of the attention that says whether it rotates queries and keys (SmolLM3); None: all do."""
    attention_scale: str = "scaling"
    """Attribute of the attention that multiplies scores."""
    attention_softcap: str | None = None
    """Attribute of the attention that caps scores softly (Gemma 2)."""
    activation: str = "hidden_act"
    """Config field: the FFN's activation."""
    sliding_window: str | None = None
    """Config field: how many keys the layers see that `layer_types` calls sliding, or all where there is no such."""
    embedding_factor: str | None = None
    """Config field that multiplies what the first layer reads (Granite)."""
    logits_divisor: str | None = None
    """Config field that divides the logits (Granite)."""
    logits_factor: str | None = None
    """Config field that multiplies the logits (HyperCLOVA X)."""
    logits_softcap: str | None = None
    """Config field that caps the logits softly (Gemma 2)."""
    native: tuple[NativeName, ...] = ()
    """Native engines that know such a decoder: pre-norm layers with gated FFNs, then a norm and a plain head."""
    lora_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "gate_proj")
    in_parts: bool = True
    """Whether the attention's arithmetic is known, so that it can be computed for some queries only."""
    private: tuple[str, ...] = ()
    """Linear layers of an attention that runs whole which only executed tokens need (`private.py`)."""
    in_place: bool = False
    """Whether the FFN is routed where its layer calls it, since the layer's code is not understood (`in_place.py`)."""
    own_head: bool = False
    """Whether logits are made by the model's own forward, since its code does more than `logits_*` say."""
    passed: Passed | None = None
    """What the layer passes to an attention that runs whole; None: everything that it is given."""

    def window(self, config: Any, layer: int) -> int | None:
        """Keys that a layer attends to at most; None without a sliding window."""
        if self.sliding_window is None:
            return None
        kinds = getattr(config, "layer_types", None)
        window = getattr(config, self.sliding_window, None)
        return int(window) if window and (kinds is None or "sliding" in kinds[layer]) else None

    def has_rope(self, attention: Any) -> bool:
        """Whether an attention rotates its queries and keys."""
        return self.rotates is None or bool(getattr(attention, self.rotates))

    def scale(self, attention: Any) -> float:
        """What multiplies the scores of an attention."""
        return float(getattr(attention, self.attention_scale))

    def softcap(self, attention: Any) -> float | None:
        """The soft cap of an attention's scores; None where there is none."""
        return None if self.attention_softcap is None else getattr(attention, self.attention_softcap)


_BOTH: tuple[NativeName, ...] = ("cpu", "gpu")
_PRE_NORM = Family(native=_BOTH)
_WINDOWED = replace(_PRE_NORM, sliding_window="sliding_window")
_SANDWICH = Family(
    attention_out_norm="post_attention_layernorm",
    ffn_in_norm="pre_feedforward_layernorm",
    ffn_out_norm="post_feedforward_layernorm",
    attention_softcap="attn_logit_softcapping",
    activation="hidden_activation",
    sliding_window="sliding_window",
    logits_softcap="final_logit_softcapping",
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
    "mistral": _WINDOWED,
    "qwen2": _WINDOWED,
    "qwen3": replace(_WINDOWED, qk_norm="head"),
    "smollm3": replace(_WINDOWED, rotates="use_rope"),
    "gemma2": _SANDWICH,
    "gemma3_text": replace(_SANDWICH, qk_norm="head"),
    "phi3": replace(
        _WINDOWED,
        attention_dropout="resid_attn_dropout",
        ffn_dropout="resid_mlp_dropout",
        qkv="fused",
        gate_up="fused",
        ffn_activation="activation_fn",
        lora_targets=("qkv_proj", "gate_up_proj"),
    ),
    "olmo2": _POST_NORM,
    "olmo3": replace(_POST_NORM, sliding_window="sliding_window"),
    "granite": Family(
        residual_scale="residual_multiplier",
        embedding_factor="embedding_multiplier",
        logits_divisor="logits_scaling",
        native=("cpu",),
    ),
}


def native_families(engine: NativeName) -> tuple[str, ...]:
    """The model types whose decoder a native engine knows."""
    return tuple(name for name, family in FAMILIES.items() if engine in family.native)
