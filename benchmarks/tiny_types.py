"""Tiny random models of every causal language model type that transformers has, made from its default settings.

Sizes become small by the names that configurations give them; kinds of layers stay, each at least once.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS, WIDTH, VOCABULARY = 4, 64, 128
TYPES: tuple[str, ...] = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
LARGEST = 100_000_000
"""Parameters of a model that is still tiny: with more, some size has a name that is not known here."""

_SIZES: tuple[tuple[str, int], ...] = (
    (r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|model_max_length|max_target_positions)", 256),
    (r"(vocab_size|vocab_size_per_layer_input)", VOCABULARY),
    (r"(hidden_size|d_model|n_embd|emb_dim|dim|embedding_size|lru_width)", WIDTH),
    (r"(num_hidden_layers|n_layers?|num_layers|(en|de)coder_layers|num_decoder_layers|num_blocks)", LAYERS),
    (r"((num_|n_)?(attention_|decoder_attention_|encoder_attention_)?heads?|num_attention_heads|n_head)", 4),
    (r"(num_key_value_heads|num_kv_heads|swa_num_key_value_heads)", 2),
    (r"swa_num_attention_heads", 4),
    (r"(head_dim|kv_channels|attention_head_dim|d_head|dim_head|swa_head_dim|query_pre_attn_scalar)", 16),
    (r"(moe_|shared_|shared_expert_|moe_shared_expert_|shared_experts_|expert_)\w*(intermediate|hidden)_size", 32),
    (
        r"\w*intermediate_size\w*|(de|en)coder_ffn_dim|ffn_dim|n_inner|ffn_hidden_size|dff|dim_ff|d_inner|block_ff_dim",
        128,
    ),
    (r"num_(local_|routed_)?experts|n_routed_experts|moe_num_experts", 8),
    (r"num_experts_per_tok(en)?|moe_k|moe_topk|top_k_experts", 2),
    (r"(n|topk|num_expert|n_expert)_group", 1),
    (r"q_lora_rank|swa_q_lora_rank", 32),
    (r"kv_lora_rank|qk_nope_head_dim|v_head_dim|index_head_dim|swa_v_head_dim|swa_qk_nope_head_dim", 16),
    (r"qk_rope_head_dim|rotary_dim|index_topk|sliding_window(_size)?|window_size|attention_window_size", 8),
    (r"index_n_heads", 2),
    (r"first_k_dense_replace|num_dense_layers|max_window_layers", 1),
    (r"linear_num_key_heads", 2),
    (r"linear_num_value_heads", 4),
    (r"linear_(key|value)_head_dim|mamba_(d_state|d_head|headdim|head_dim|chunk_size)|ssm_state_size|state_size", 16),
    (r"mamba_(n|num)_heads", 8),
    (r"(mamba_)?n_?groups", 1),
    (r"time_step_rank|mamba_dt_rank", 8),
    (r"chunk_size|hidden_size_per_layer_input", 16),
    (r"num_kv_shared_layers", 2),
    (r"laurel_rank", 8),
    (r"global_head_dim", 32),
    (r"num_global_key_value_heads", 1),
)
_KINDS = ("layer_types", "mlp_layer_types", "layers_block_type")
_IMAGES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
_IMAGES |= {"image_size": 28, "patch_size": 14}
_SOUNDS = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
_INDEXED = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 8}
_INDEXED |= {"indexer_compress_ratio": 2, "hc_lowrank": 8, "hc_count": 2}
_OWN: dict[str, dict[str, Any]] = {
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": None,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [3, 3, 2]},
        }
    },
    "dots1": {"n_shared_experts": 1, "num_experts_per_tok": 2, "n_routed_experts": 8},
    "falcon_h1": {"mamba_d_ssm": 128},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "longcat_flash": {"head_dim": 8},
    "qwen4_exp": _INDEXED,
    "qwen4_exp_text": _INDEXED,
    "xlstm": {"qk_dim_factor": 1.0},
    "phi4_multimodal": {
        "vision_config": {**_IMAGES, "crop_size": 28},
        "audio_config": {**_SOUNDS, "num_blocks": 1, "ext_pw_out_channel": 32, "nemo_conv_channels": 32},
    },
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "zaya": {"num_experts_per_tok": 1},
}
_BESIDE: dict[str, dict[str, Any]] = {
    "dots3_note": {
        "vision_config": {
            **{"adapter_out_dim": WIDTH, "adapter_in_dim": 48, "embed_dim": 48, "num_heads": 2},
            **{"num_hidden_layers": 1, "intermediate_size": 32, "moe_intermediate_size": 32},
            "mlp_layer_types": ["dense"],
        },
        "audio_config": {
            **{"adapter_out_dim": WIDTH, "hidden_size": 48, "adapter_input_size": 48, "num_hidden_layers": 1},
            **{"num_attention_heads": 2, "intermediate_size": 32},
        },
    },
    "moss_transcribe_diarize": {
        "audio_config": {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 64}
    },
}
"""Parts for images and sounds, where those that come with a type are large."""


def make(model_type: str) -> Any:
    """A random causal language model in float32 and eval mode. Raises whatever its library raises on the way."""
    kind: Any = CONFIG_MAPPING[model_type]
    default = kind()
    text = default.get_text_config(decoder=True)
    if text is default or type(text) is type(default):
        config = kind(**_small(default.to_dict(), model_type))
    else:  # images and sounds keep their settings: only text goes in
        name = next(name for name, value in vars(default).items() if value is text)
        text_settings = type(text)(**_small(text.to_dict(), text.model_type)).to_dict()
        config = kind(**{name: text_settings, **_BESIDE.get(model_type, {})})
    with torch.device("meta"):
        shadow = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if (size := sum(parameter.numel() for parameter in shadow.parameters())) > LARGEST:
        raise ValueError(f"{size:,} parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(type(config).from_dict(config.to_dict()), dtype=torch.float32)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if "norm" in name or weight.dim() < 2:
                    weight.add_(0.1 * torch.randn_like(weight))
                else:
                    weight.mul_(5.0)
    return model.eval()


def _small(settings: dict[str, Any], model_type: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, bool) or not isinstance(value, int | None) or value == 0:
            continue
        size = next((size for pattern, size in _SIZES if re.fullmatch(pattern, name)), None)
        if size is not None and (value is not None or name in ("head_dim", "num_experts_per_tok")):
            found[name] = size
    if "kv_lora_rank" in found:
        found["num_key_value_heads"] = 4
        found.pop("head_dim", None)
    layers = LAYERS
    for name in _KINDS:
        kinds = settings.get(name)
        if isinstance(kinds, list | tuple) and len(kinds) > 1:
            seen = list(dict.fromkeys(kinds))
            layers = max(layers, len(seen))
            found[name] = [seen[place % len(seen)] for place in range(layers)]
    if "num_hidden_layers" in found:
        found["num_hidden_layers"] = layers
    return {**found, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **_OWN.get(model_type, {})}
