"""Tiny GGUF files of every architecture that is read, named and stored as llama.cpp's converter does it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from tests.tiny import make_tiny
from transformers.convert_slow_tokenizer import bytes_to_unicode

TOKENS = [*bytes_to_unicode().values(), "ab", "<|endoftext|>"]
ARCHITECTURES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "phi3": "phi3",
    "olmo2": "olmo2",
    "olmo3": "olmo2",
    "smollm3": "smollm3",
    "granite": "granite",
}
PERMUTED = ("llama", "mistral", "smollm3", "granite")
_SHAPE: dict[str, Any] = {"vocab_size": len(TOKENS), "bos_token_id": 257, "eos_token_id": 257, "pad_token_id": None}
_SHAPE |= {"tie_word_embeddings": False, "rms_norm_eps": 1e-5}
_OWN: dict[str, dict[str, Any]] = {
    "gemma": {"head_dim": 16, "tie_word_embeddings": True},
    "gemma2": {"tie_word_embeddings": True},
    "gemma3_text": {"tie_word_embeddings": True},
    "smollm3": {"no_rope_layer_interval": 4, "num_hidden_layers": 4},
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.125,
        "logits_scaling": 2.0,
    },
}

More = Callable[[GGUFWriter], Any]


def original(family: str = "llama", **settings: Any) -> Any:
    """A tiny random model of `family`, float32, whose vocabulary is TOKENS."""
    return make_tiny(family, **{**_SHAPE, **_OWN.get(family, {}), **settings})


def write(
    model: Any,
    path: Path,
    more: More = lambda writer: None,
    *,
    tokens: More | None = None,
    leave: tuple[str, ...] = (),
    kind: GGMLQuantizationType = GGMLQuantizationType.F32,
    **options: Any,
) -> Path:
    """Write `model`; `more` adds keys and tensors, `leave` keys and tensors out, `kind` is the matrices' type."""
    config = model.config
    family = config.model_type
    writer = _Writer(path, ARCHITECTURES[family], leave, **options)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head)
    writer.add_value_length(head)
    _own_keys(writer, config, head)
    (tokens or byte_level)(writer)
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        _add(writer, name, value.float(), config, kind)
    more(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_level(writer: GGUFWriter, pre: str = "gpt-2") -> None:
    """A byte-level tokenizer with one merge, `a b`."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([1] * 257 + [3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(257)


class _Writer(GGUFWriter):
    """A writer that leaves some keys and tensors out."""

    def __init__(self, path: Path, architecture: str, leave: tuple[str, ...], **options: Any) -> None:
        self.leave = leave
        super().__init__(path, architecture, **options)

    def add_key_value(self, key: str, *rest: Any, **options: Any) -> None:
        if key not in self.leave:
            self.kv_data[0].pop(key, None)  # the last one counts
            super().add_key_value(key, *rest, **options)

    def add_tensor(self, name: str, *rest: Any, **options: Any) -> None:
        if name not in self.leave:
            super().add_tensor(name, *rest, **options)


def _own_keys(writer: GGUFWriter, config: Any, head: int) -> None:
    family, rope = config.model_type, config.rope_parameters
    rope = rope.get("full_attention", rope)
    if family not in ("gemma", "gemma2"):
        writer.add_rope_freq_base(rope["rope_theta"])
    if family in PERMUTED:
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(head)
    if getattr(config, "sliding_window", None) and family in ("mistral", "gemma2", "gemma3_text", "olmo3"):
        writer.add_sliding_window(config.sliding_window)
    if family in ("gemma3_text", "olmo3"):
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config.layer_types])
    if family == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    if family == "phi3":
        writer.add_sliding_window(config.sliding_window or 0)
        writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
        writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    if family == "granite":
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_attention_scale(config.attention_multiplier)
        writer.add_logit_scale(config.logits_scaling)


def _add(writer: GGUFWriter, name: str, value: torch.Tensor, config: Any, kind: GGMLQuantizationType) -> None:
    number = next(key for key, text in gguf.MODEL_ARCH_NAMES.items() if text == writer.arch)
    base, part = name.rsplit(".", 1)
    called = f"{gguf.get_tensor_name_map(number, config.num_hidden_layers).get_name(base)}.{part}"
    if config.model_type in PERMUTED and base.endswith(("q_proj", "k_proj")):
        heads = config.num_attention_heads if base.endswith("q_proj") else config.num_key_value_heads
        value = value.reshape(heads, 2, -1, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)
    if config.model_type.startswith("gemma") and name.endswith("norm.weight"):
        value = value + 1
    array = numpy.ascontiguousarray(value.numpy(), dtype=numpy.float32)
    if array.ndim > 1 and kind is not GGMLQuantizationType.F32:
        packed = gguf.quants.quantize(array, kind)
        writer.add_tensor(called, packed, raw_dtype=kind)
    else:
        writer.add_tensor(called, array)
