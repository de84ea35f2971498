"""Settings of a model's configuration that change what it computes, to recognise a base model by."""

from __future__ import annotations

import math
from typing import Any

from ..errors import InputError

_WITHOUT_EFFECT = frozenset(
    (
        *("name_or_path", "transformers_version", "architectures", "auto_map", "dtype", "torch_dtype"),
        *("attn_implementation", "experts_implementation", "use_cache", "output_attentions"),
        *("output_hidden_states", "output_router_logits", "return_dict", "use_return_dict", "initializer_range"),
        *("id2label", "label2id", "num_labels", "problem_type", "chunk_size_feed_forward", "bos_token_id"),
        *("eos_token_id", "pad_token_id", "sep_token_id", "cls_token_id", "decoder_start_token_id"),
        *("task_specific_params", "finetuning_task", "tokenizer_class", "prefix", "attention_dropout"),
        *("hidden_dropout", "resid_pdrop", "embd_pdrop", "classifier_dropout", "pretraining_tp"),
        *("gradient_checkpointing", "max_position_embeddings", "vocab_size"),
    )
)
"""Bookkeeping, training, and what weights tell better. All else counts, so that no family's own scale is forgotten."""

_OPEN = (math.inf, -math.inf)
"""Ends of a range that is open, such as Mamba's `time_step_limit`: numbers elsewhere are finite."""

_LENGTH_COUNTS = ("dynamic", "longrope", "yarn")
"""Kinds of rotary scaling that read the longest position."""


def config_facts(config: Any) -> dict[str, Any]:
    """The settings as JSON values. Raises InputError for one that is not a finite number, but for ends of a range."""
    settings = config.to_dict()
    facts = {
        key: _plain(value, key)
        for key, value in settings.items()
        if key not in _WITHOUT_EFFECT and not key.startswith("_")
    }
    if any(kind in str(settings.get("rope_parameters")) for kind in _LENGTH_COUNTS):
        facts["max_position_embeddings"] = settings.get("max_position_embeddings")
    return facts


def different_fact(found: dict[str, Any], wanted: dict[str, Any]) -> tuple[str, Any, Any] | None:
    """(name, found, wanted) of the first setting that differs; None when all agree.

    Settings that only one of two transformers versions knows are no difference.
    """
    for key in sorted(found.keys() & wanted.keys()):
        if not _same(found[key], wanted[key]):
            return key, found[key], wanted[key]
    return None


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, dict) and isinstance(b, dict):
        return all(_same(a.get(key), b.get(key)) for key in a.keys() | b.keys())
    if isinstance(a, bool) != isinstance(b, bool):  # True is 1 to Python
        return False
    return bool(a == b)


def _plain(value: Any, where: str) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner, f"{where}.{key}") for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        inner = sorted(value, key=str) if isinstance(value, (set, frozenset)) else value
        return [_plain(str(one) if one in _OPEN else one, where) for one in inner]
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{where} of the base model is {value}", "Correct it in the model's config.json")
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
