"""Tiny random models of every supported family, built so that each unit visibly matters."""

from __future__ import annotations

from typing import Any

import torch

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "olmo2", "smollm3")
VOCAB = 128

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_WINDOWED = ["sliding_attention", "full_attention", "sliding_attention"]
_GEMMA = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "layer_types": _WINDOWED}
_OWN: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 8, "head_dim": 16},
    "qwen3": {"head_dim": 16},
    "gemma2": {**_GEMMA, "attn_implementation": "eager"},  # its soft-capped scores exist only there
    "gemma3_text": _GEMMA,
    "smollm3": {"no_rope_layer_interval": 2},
}


_EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
_LATENT = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
_OTHERS: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 16},
    "ministral": {"head_dim": 16, "sliding_window": 8, "layer_types": _WINDOWED},
    "glm4": {"head_dim": 16, "pad_token_id": 0},
    "helium": {"head_dim": 16},
    "hyperclovax": {"logits_scaling": 0.5, "residual_multiplier": 0.5},
    "qwen3_moe": {**_EXPERTS, "head_dim": 16, "num_experts": 8, "mlp_only_layers": [1]},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "granitemoeshared": {"num_local_experts": 4, "num_experts_per_tok": 2, "shared_intermediate_size": 64},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "layer_types": _WINDOWED},
    "deepseek_v3": {
        **_EXPERTS,
        **_LATENT,
        "n_routed_experts": 8,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "num_key_value_heads": 4,
    },
    "qwen3_next": {
        **_EXPERTS,
        "head_dim": 16,
        "num_experts": 8,
        "shared_expert_intermediate_size": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    },
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_ff_dim": 128},
    "exaone4": {"sliding_window": 8, "layer_types": _WINDOWED},
}
OTHERS = (*_OTHERS, "arcee", "ernie4_5", "nemotron", "seed_oss", "starcoder2")
"""Families that are not in the table, whose code is read."""


def make_tiny(family: str, *, seed: int = 0, **overrides: Any) -> Any:
    """A random causal language model of `family` in float32 and eval mode, the same for the same arguments.

    Hidden size 64, 3 layers, 4 heads (2 for keys), vocabulary 128; `overrides` go to the config. Weights are
    five times larger than usual and norm weights and biases are random, so that leaving out or mistaking any
    part of a unit changes the logits plainly.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {**_COMMON, **_OWN.get(family, {}), **_OTHERS.get(family, {}), **overrides}
    attention = settings.pop("attn_implementation", None)
    layers = settings["num_hidden_layers"]
    if (kinds := settings.get("layer_types")) and len(kinds) != layers:
        settings["layer_types"] = [kinds[layer % 2] for layer in range(layers)]
    config = AutoConfig.for_model(family, **settings)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "norm" in name:
                    weight.add_(0.3 * torch.randn_like(weight))
                elif name.endswith("bias"):
                    weight.normal_(std=0.1)
                else:
                    weight.mul_(5.0)
    return model.eval()


def random_ids(batch: int, length: int, *, seed: int = 0) -> torch.Tensor:
    """Token ids, int64 `[batch, length]`, without the special tokens 0 to 2."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCAB, (batch, length), generator=generator)
