"""Whether what was loaded is a model and its tokenizer, whole and of one another.

transformers fills what is missing with random numbers, leaves out what it does not know, and loads settings that
cannot work; each of these is refused here, by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from informed_routing.errors import InputError

# Weights without a say in the logits: tables that are computed anew, and heads that guess further tokens.
_HARMLESS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|masked_bias|mtp[._].*)")
_ROWS = "embedding_rows"


def check_settings(location: str, options: dict[str, Any], ref: str) -> dict[str, Any]:
    """A model's settings. Raises `InputError` for quantised weights, and for numbers that are none (NaN, infinite)."""
    from transformers import PretrainedConfig

    hub = {name: options[name] for name in ("revision", "token") if name in options}
    settings, _ = PretrainedConfig.get_config_dict(location, **hub)
    for name, value in _settings(settings):
        last = name.rsplit(".", 1)[-1]
        if last == "quantization_config" and value:
            method = value.get("quant_method", "an unknown method") if isinstance(value, Mapping) else value
            raise InputError(
                f"The weights of {ref} are quantised by {method}, which is not read", "Give the unquantised model"
            )
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{ref} has the setting {name} = {value} in its config.json", "Correct config.json")
        if last.endswith(("_eps", "epsilon")) and isinstance(value, (int, float)) and value < 0:
            raise InputError(f"{ref} has the setting {name} = {value} in its config.json", "Correct config.json")
    return dict(settings)


def attention(settings: Mapping[str, Any], asked: str | None, ref: str) -> dict[str, str]:
    """The choice of attention to load with. transformers before 5.23 leaves soft caps out of "sdpa" without a word."""
    capped = any(name.rsplit(".", 1)[-1] == "attn_logit_softcapping" and value for name, value in _settings(settings))
    if capped and asked == "sdpa":
        raise InputError(
            f"{ref} caps its attention scores, which 'sdpa' does not do", "Use attn_implementation='eager'"
        )
    chosen = "eager" if capped and asked is None else asked
    return {} if chosen is None else {"attn_implementation": chosen}


def _settings(node: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        name = f"{start}{key}"
        yield name, value
        if isinstance(value, Mapping) and key != "quantization_config":
            yield from _settings(value, f"{name}.")


def check_report(report: Mapping[str, Any], ref: str) -> None:
    """Raises `InputError` for weights that are missing, of another shape, or without a place in the model.

    `report` is transformers' loading info.
    """
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"The weights of {ref} are incomplete: {len(missing)} missing, first {missing[0]}",
            "Download or save the model again",
        )
    if wrong := sorted(map(tuple, report.get("mismatched_keys", ()))):
        name, *shapes = wrong[0]
        found = " instead of ".join(str(list(shape)) for shape in shapes)
        raise InputError(
            f"The weights of {ref} do not fit its config.json: {len(wrong)} of another shape, first {name} {found}",
            "Give the config.json that the weights were saved with",
        )
    left = sorted(name for name in report.get("unexpected_keys", ()) if not _HARMLESS.fullmatch(name))
    if left:
        raise InputError(
            f"The weights of {ref} do not fit its config.json: {len(left)} have no place in the model, first {left[0]}",
            "Give the config.json that the weights were saved with",
        )


def check_vocabulary(tokenizer: Any, model: Any, ref: str) -> None:
    """Raises `InputError` for a tokenizer with ids beyond the model's embeddings.

    Special tokens may lie beyond them: Gemma 3's place for images does, and so does a token that transformers adds
    to a small vocabulary. A text that holds one is refused by `check_ids`.
    """
    rows = int(model.get_input_embeddings().weight.shape[0])
    special = set(getattr(tokenizer, "all_special_ids", ()))
    special |= {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    beyond = sorted((number, token) for token, number in tokenizer.get_vocab().items() if number >= rows)
    if wrong := [(number, token) for number, token in beyond if number not in special]:
        number, token = wrong[0]
        raise InputError(
            f"The tokenizer of {ref} has {len(wrong)} tokens beyond the model's {rows} embeddings, "
            f"first {token!r} with id {number}",
            "Give the model its own tokenizer, or resize its embeddings (resize_token_embeddings) and save it again",
        )
    setattr(tokenizer, _ROWS, rows)


def fits(number: int, tokenizer: Any) -> bool:
    """Whether an id has an embedding in the model that the tokenizer was loaded with, as far as that is known."""
    rows = getattr(tokenizer, _ROWS, None)
    return rows is None or number < rows


def check_ids(largest: int, tokenizer: Any) -> None:
    """Raises `InputError` when the largest id of a text lies beyond the embeddings of the tokenizer's model."""
    if not fits(largest, tokenizer):
        token, rows = tokenizer.convert_ids_to_tokens(largest), getattr(tokenizer, _ROWS)
        raise InputError(
            f"The text holds {token!r}, whose id {largest} lies beyond the model's {rows} embeddings",
            "Take it out of the text, or give the model its own tokenizer",
        )
