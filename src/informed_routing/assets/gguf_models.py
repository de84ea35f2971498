"""Architectures of GGUF files: keys into transformers' settings, names of tensors into names of weights.

Only what is known is read: a key that no one asked for may change results, so it is refused by name, and so is a
tensor that no weight takes. Another architecture is one more row in `ARCHITECTURES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from math import isclose
from typing import TYPE_CHECKING, Any

from informed_routing.assets.gguf_keys import ORIGINAL, Keys
from informed_routing.assets.gguf_rope import (
    FREQUENCY_FACTORS,
    LONG_FACTORS,
    SHORT_FACTORS,
    rope_parameters,
)
from informed_routing.errors import InputError

if TYPE_CHECKING:
    import numpy

    from informed_routing.assets.gguf_file import GgufModel

# Tables that are computed anew; very old files carry them.
_DERIVED = re.compile(r"(blk\.\d+\.)?(attn_rot_embd|rope_freqs_cis)(\.weight)?")


@dataclass(frozen=True)
class Architecture:
    """How one architecture of llama.cpp is written in transformers."""

    settings: Callable[[Keys, dict[str, Any]], dict[str, Any]]
    layer: dict[str, str]
    permuted: bool = False
    """Rows of queries and keys are stored in the order of interleaved rotary pairs."""
    shifted: bool = False
    """1 is added to the weights of norms (Gemma's are around 0)."""


_ATTENTION = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
}
_FFN = {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_BEFORE = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_AFTER = {"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"}
_AROUND = {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm", **_AFTER}
_LLAMA = {**_BEFORE, **_ATTENTION, **_FFN}


def _common(keys: Keys, rope_free: bool = False) -> dict[str, Any]:
    """Settings that every architecture has; `rope_parameters` only for heads that are rotated whole."""
    shapes = {name: tensor.shape for name, tensor in keys.model.tensors.items()}
    if "token_embd.weight" not in shapes:
        raise keys.refused("the tensor token_embd.weight is missing")
    hidden, heads = keys.whole("embedding_length"), keys.whole("attention.head_count")
    length = keys.whole("attention.key_length", max(hidden // heads, 1))
    if keys.whole("attention.value_length", length) != length:
        raise keys.refused("its keys and values differ in length")
    if keys.whole("expert_count", 0, least=0) > 0:
        raise keys.refused("it is a mixture of experts")
    keys.whole("expert_used_count", 0, least=0)
    vocabulary = shapes["token_embd.weight"][0]
    if keys.whole("vocab_size", vocabulary) != vocabulary:
        raise keys.refused(f"vocab_size is {keys.get('vocab_size')}, but there are {vocabulary} embeddings")
    eps = keys.number("attention.layer_norm_rms_epsilon")
    if eps < 0:
        raise keys.refused(f"attention.layer_norm_rms_epsilon is {eps}")
    found: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": keys.whole("block_count"),
        "intermediate_size": keys.whole("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": keys.whole("attention.head_count_kv", heads),
        "head_dim": length,
        "max_position_embeddings": keys.whole("context_length"),
        "rms_norm_eps": eps,
        "tie_word_embeddings": "output.weight" not in shapes,
    }
    if rope_free:
        return found
    rotated = keys.whole("rope.dimension_count", length)
    if rotated != length:
        raise keys.refused(f"{rotated} of the {length} values of each head are rotated (rope.dimension_count)")
    return found | {"rope_parameters": rope_parameters(keys, rotated, factor_tensors(keys.model))}


def factor_tensors(model: GgufModel) -> dict[str, numpy.ndarray[Any, Any]]:
    """The tensors that divide rotary frequencies, those that there are."""
    names = (FREQUENCY_FACTORS, LONG_FACTORS, SHORT_FACTORS)
    return {name: model.read(model.tensors[name]) for name in names if name in model.tensors}


def _narrow(keys: Keys, found: dict[str, Any]) -> dict[str, Any]:
    """Without `head_dim`, for families that always divide the hidden size by the heads."""
    length = found.pop("head_dim")
    if length * found["num_attention_heads"] != found["hidden_size"]:
        raise keys.refused(f"heads of {length} values do not fill {found['hidden_size']} (attention.key_length)")
    return found


def _plain_scale(keys: Keys, found: dict[str, Any]) -> None:
    usual = found["head_dim"] ** -0.5
    scale = keys.number("attention.scale", usual)
    if scale and not isclose(scale, usual, rel_tol=1e-5):
        raise keys.refused(f"attention.scale is {scale}, not one over the root of the head's length")


def _biases(found: dict[str, Any], tensors: dict[str, Any], *, mlp: bool = True) -> dict[str, Any]:
    found["attention_bias"] = "blk.0.attn_q.bias" in tensors
    if mlp:
        found["mlp_bias"] = "blk.0.ffn_gate.bias" in tensors
    return found


def _llama(keys: Keys, tensors: dict[str, Any]) -> dict[str, Any]:
    found = _common(keys)
    _plain_scale(keys, found)
    if window := keys.whole("attention.sliding_window", 0, least=0):
        return {"model_type": "mistral", "sliding_window": window, **found}
    return {"model_type": "llama", **_biases(found, tensors)}


def _qwen2(keys: Keys, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"model_type": "qwen2", "use_sliding_window": False, **_narrow(keys, _common(keys))}


def _qwen3(keys: Keys, tensors: dict[str, Any]) -> dict[str, Any]:
    found = {"model_type": "qwen3", "use_sliding_window": False, **_common(keys)}
    return _biases(found, tensors, mlp=False)


def _gemma(keys: Keys, tensors: dict[str, Any]) -> dict[str, Any]:
    return {"model_type": "gemma", "hidden_act": "gelu_pytorch_tanh", **_common(keys)}


def _gemma_scale(keys: Keys, found: dict[str, Any], largest: int) -> float:
    """`query_pre_attn_scalar`: not in the file; the largest model of a series divides the hidden size by the heads."""
    if scale := keys.number("attention.scale", 0.0):
        return float(f"{scale**-2:.6g}")
    if found["num_hidden_layers"] == largest:
        return float(found["hidden_size"] // found["num_attention_heads"])
    return float(found["head_dim"])


def _gemma2(keys: Keys, tensors: dict[str, Any]) -> dict[str, Any]:
    found = _common(keys)
    count = found["num_hidden_layers"]
    windows = keys.layers("attention.sliding_window_pattern", count)
    windows = windows if windows is not None else [layer % 2 == 0 for layer in range(count)]
    return {
        "model_type": "gemma2",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": int(_gemma_scale(keys, found, 46)),
        "attn_logit_softcapping": keys.number("attn_logit_softcapping") or None,
        "final_logit_softcapping": keys.number("final_logit_softcapping") or None,
        "sliding_window": keys.whole("attention.sliding_window"),
        "layer_types": _layer_types(windows),
        **found,
    }


def _gemma3(keys: Keys, tensors: dict[str, Any]) -> dict[str, Any]:
    keys.get("rope.freq_base")  # without it llama.cpp and transformers take different ones
    found = _common(keys)
    count = found["num_hidden_layers"]
    window = keys.whole("attention.sliding_window", 0, least=0)
    windows = keys.layers("attention.sliding_window_pattern", count)
    windows = windows if windows is not None else [bool((layer + 1) % 6) for layer in range(count)]
    local = keys.number("rope.freq_base_swa", 10000.0)
    return {
        "model_type": "gemma3_text",
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": int(_gemma_scale(keys, found, 62)),
        "final_logit_softcapping": keys.number("final_logit_softcapping", 0.0) or None,
        "sliding_window": window or found["max_position_embeddings"],
        "layer_types": _layer_types(windows if window else [False] * count),
        **found,
        "rope_parameters": {
            "full_attention": found["rope_parameters"],
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        },
    }


def _layer_types(windows: list[bool]) -> list[str]:
    return ["sliding_attention" if window else "full_attention" for window in windows]


def _phi3(keys: Keys, tensors: dict[str, Any]) -> dict[str, Any]:
    found = _narrow(keys, _common(keys, rope_free=True))
    length = found["hidden_size"] // found["num_attention_heads"]
    rotated = keys.whole("rope.dimension_count", length)
    share = float(f"{rotated / length:.6g}")
    if int(length * share) != rotated:
        raise keys.refused(f"rope.dimension_count is {rotated}, no plain share of {length}")
    rope = rope_parameters(keys, rotated, factor_tensors(keys.model))
    if rope["rope_type"] not in ("default", "longrope"):
        raise keys.refused(f"a rotary scaling of the type {rope['rope_type']!r} is not known for phi3")
    window = keys.whole("attention.sliding_window", None, least=0)
    longest = found["max_position_embeddings"]
    original = keys.whole("rope.scaling.original_context_length", longest)
    return {
        "model_type": "phi3",
        "sliding_window": window or None,
        "original_max_position_embeddings": original,
        "rope_parameters": {**rope, "partial_rotary_factor": share},
        **found,
    }


def _olmo2(keys: Keys, tensors: dict[str, Any]) -> dict[str, Any]:
    found = _narrow(keys, _common(keys))
    found = _biases(found, tensors, mlp=False)
    count = found["num_hidden_layers"]
    windows = keys.layers("attention.sliding_window_pattern", count)
    window = keys.whole("attention.sliding_window", 0, least=0)
    if not window:
        return {"model_type": "olmo2", **found}
    windows = windows if windows is not None else [bool((layer + 1) % 4) for layer in range(count)]
    rope = found["rope_parameters"]
    found["rope_parameters"] = {
        "full_attention": rope,
        "sliding_attention": {"rope_type": "default", "rope_theta": rope["rope_theta"]},
    }
    return {"model_type": "olmo3", "sliding_window": window, "layer_types": _layer_types(windows), **found}


def _smollm3(keys: Keys, tensors: dict[str, Any]) -> dict[str, Any]:
    found = _common(keys)
    _plain_scale(keys, found)
    # Which layers are not rotated is not in the file: every fourth, in llama.cpp as in the released model.
    found = {"model_type": "smollm3", "no_rope_layer_interval": 4, "use_sliding_window": False, **found}
    return _biases(_narrow(keys, found), tensors)


def _granite(keys: Keys, tensors: dict[str, Any]) -> dict[str, Any]:
    if keys.get("rope.scaling.finetuned", True) is not True:
        raise keys.refused("it is a Granite model without rotary embeddings (rope.scaling.finetuned)")
    found = {
        "model_type": "granite",
        "embedding_multiplier": keys.number("embedding_scale"),
        "residual_multiplier": keys.number("residual_scale"),
        "attention_multiplier": keys.number("attention.scale"),
        "logits_scaling": keys.number("logit_scale"),
        **_narrow(keys, _common(keys)),
    }
    return _biases(found, tensors)


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(_llama, _LLAMA, permuted=True),
    "qwen2": Architecture(_qwen2, _LLAMA),
    "qwen3": Architecture(_qwen3, {**_LLAMA, **_HEAD_NORMS}),
    "gemma": Architecture(_gemma, _LLAMA, shifted=True),
    "gemma2": Architecture(_gemma2, {**_AROUND, **_ATTENTION, **_FFN}, shifted=True),
    "gemma3": Architecture(_gemma3, {**_AROUND, **_ATTENTION, **_FFN, **_HEAD_NORMS}, shifted=True),
    "phi3": Architecture(
        _phi3,
        {
            **_BEFORE,
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
    ),
    "olmo2": Architecture(_olmo2, {**_AFTER, **_ATTENTION, **_FFN, **_HEAD_NORMS}),
    "smollm3": Architecture(_smollm3, _LLAMA, permuted=True),
    "granite": Architecture(_granite, _LLAMA, permuted=True),
}


def architecture_of(model: GgufModel) -> tuple[str, Architecture]:
    """The row of a file's architecture. Raises `InputError` for one that is not known, and for adapters."""
    kind = model.keys.get("general.type", "model")
    name = model.keys.get("general.architecture")
    if kind != "model" or not isinstance(name, str):
        raise InputError(f"{model.path} holds no model but {kind if kind != 'model' else 'no architecture'}", ORIGINAL)
    if name not in ARCHITECTURES:
        raise InputError(
            f"{model.path} is of the architecture {name!r}; GGUF files of {', '.join(ARCHITECTURES)} are read", ORIGINAL
        )
    return name, ARCHITECTURES[name]


def settings_of(model: GgufModel) -> dict[str, Any]:
    """Settings for `AutoConfig.for_model`, with `model_type`. Raises `InputError` for what is not understood."""
    name, architecture = architecture_of(model)
    keys = Keys(model, name)
    found = architecture.settings(keys, dict(model.tensors))
    keys.check_all_asked()
    return found


def weight_names(architecture: Architecture, wanted: list[str]) -> dict[str, str]:
    """transformers' names of weights to those in the file."""
    theirs = {ours: name for name, ours in architecture.layer.items()}
    whole = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    whole["lm_head.weight"] = "output.weight"
    found = {}
    for name in wanted:
        if match := re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            layer, inner, part = match.groups()
            found[name] = f"blk.{layer}.{theirs.get(inner, inner)}.{part}"
        else:
            found[name] = whole.get(name, name)
    return found


def check_tensors(model: GgufModel, names: dict[str, str]) -> None:
    """Raises `InputError` for weights that the file lacks, and for tensors that no weight takes."""
    taken = set(names.values())
    if missing := sorted(taken - model.tensors.keys()):
        raise InputError(
            f"The weights of {model.path} are incomplete: {len(missing)} missing, first {missing[0]}",
            "Download the model again, with all its files",
        )
    read = {FREQUENCY_FACTORS, LONG_FACTORS, SHORT_FACTORS}
    left = [name for name in model.tensors if name not in taken | read and not _DERIVED.fullmatch(name)]
    if left:
        raise InputError(
            f"{model.path} is not read: {len(left)} of its tensors have no place in the model, first {left[0]}",
            ORIGINAL,
        )


def restored(name: str, values: Any, architecture: Architecture, settings: dict[str, Any]) -> Any:
    """A tensor as transformers keeps it, float32: rows in their order, norms around 0 for Gemma."""
    if architecture.shifted and name.endswith("norm.weight"):
        return values - 1
    if architecture.permuted and re.search(r"self_attn\.[qk]_proj\.", name):
        heads = settings["num_attention_heads" if ".q_proj." in name else "num_key_value_heads"]
        pairs = values.reshape(heads, -1, 2, *values.shape[1:])
        return pairs.swapaxes(1, 2).reshape(values.shape)
    return values
