"""Rotary embeddings of GGUF files: keys and factor tensors into transformers' `rope_parameters`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy

    from informed_routing.assets.gguf_keys import Keys

FREQUENCY_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
_CLOSE = 1e-5  # relative: parameters found again must give the file's own factors


def rope_parameters(keys: Keys, rotated: int, factors: dict[str, numpy.ndarray[Any, Any]]) -> dict[str, Any]:
    """What transformers calls `rope_parameters`, for `rotated` rotated values of each head.

    `factors` holds those of the file's factor tensors that there are, float32 `[rotated / 2]`: frequencies are
    divided by them. Raises `InputError` for a scaling that transformers cannot express.
    """
    for name, values in factors.items():
        if values.shape != (rotated // 2,) or not (values > 0).all():
            raise keys.refused(f"{name} has the shape {list(values.shape)} or values that are not positive")
    base = keys.number("rope.freq_base", 10000.0)
    if not base > 0:
        raise keys.refused(f"rope.freq_base is {base}")
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    scaling, factor = _scaling(keys)
    if LONG_FACTORS in factors or SHORT_FACTORS in factors:
        if scaling not in ("none", "longrope") or FREQUENCY_FACTORS in factors:
            raise keys.refused(f"it has {LONG_FACTORS} beside a rotary scaling of another type")
        return rope | _longrope(keys, factors)
    if FREQUENCY_FACTORS in factors:
        if scaling not in ("none", "llama3"):
            raise keys.refused(f"it has {FREQUENCY_FACTORS} beside the rotary scaling {scaling!r}")
        _plain_attention(keys)
        return rope | _frequency_factors(factors[FREQUENCY_FACTORS], base, rotated)
    if scaling in ("llama3", "longrope"):
        raise keys.refused(f"its rotary scaling is {scaling!r}, but the tensor with the factors is missing")
    if scaling == "yarn":
        return rope | _yarn(keys, factor)
    _plain_attention(keys)
    return rope | ({"rope_type": "linear", "factor": factor} if scaling == "linear" else {})


def _scaling(keys: Keys) -> tuple[str, float]:
    """Type and factor. Without a type a factor means linear scaling, as in llama.cpp; a factor of 1 is none."""
    factor = keys.number("rope.scaling.factor", 0.0)
    older = keys.number("rope.scale_linear", 0.0)
    scaling = keys.text("rope.scaling.type", "linear").lower()
    if scaling not in ("none", "linear", "yarn", "longrope", "llama3"):
        raise keys.refused(f"its rotary scaling is of the unknown type {scaling!r}")
    factor = factor or older
    if factor < 0 or not math.isfinite(factor):
        raise keys.refused(f"its rotary scaling has the factor {factor}")
    if scaling == "linear" and factor in (0.0, 1.0):
        scaling = "none"
    return scaling, factor or 1.0


def _plain_attention(keys: Keys) -> None:
    """Refuse what only YaRN and LongRoPE know: a scale of the rotated values."""
    for name in ("rope.scaling.attn_factor", "rope.scaling.yarn_attn_factor"):
        if (value := keys.number(name, 1.0)) != 1.0:
            raise keys.refused(f"{name} is {value} without a scaling that knows it")
    for name in ("original_context_length", "yarn_ext_factor", "yarn_beta_fast", "yarn_beta_slow"):
        keys.number(f"rope.scaling.{name}", 0.0)  # without YaRN nobody asks for them


def _yarn(keys: Keys, factor: float) -> dict[str, Any]:
    scale = keys.number("rope.scaling.attn_factor", 1.0)
    mixed = keys.number("rope.scaling.yarn_ext_factor", 1.0)
    if scale != 1.0 or mixed not in (1.0, -1.0):
        raise keys.refused(f"its YaRN scaling has attn_factor {scale} and yarn_ext_factor {mixed}; both must be 1")
    found: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.whole("rope.scaling.original_context_length"),
    }
    for theirs, ours in (
        ("yarn_attn_factor", "attention_factor"),
        ("yarn_beta_fast", "beta_fast"),
        ("yarn_beta_slow", "beta_slow"),
    ):
        value = keys.number(f"rope.scaling.{theirs}", -1.0)
        if value >= 0:
            found[ours] = value
    return found


def _longrope(keys: Keys, factors: dict[str, numpy.ndarray[Any, Any]]) -> dict[str, Any]:
    if factors.keys() != {LONG_FACTORS, SHORT_FACTORS}:
        raise keys.refused(f"{LONG_FACTORS} and {SHORT_FACTORS} belong together, and one is missing")
    if (value := keys.number("rope.scaling.yarn_attn_factor", 1.0)) != 1.0:
        raise keys.refused(f"rope.scaling.yarn_attn_factor is {value} beside {LONG_FACTORS}")
    original = keys.whole("rope.scaling.original_context_length")
    found: dict[str, Any] = {
        "rope_type": "longrope",
        "factor": keys.whole("context_length") / original,
        "original_max_position_embeddings": original,
        "long_factor": [float(value) for value in factors[LONG_FACTORS]],
        "short_factor": [float(value) for value in factors[SHORT_FACTORS]],
    }
    if (scale := keys.number("rope.scaling.attn_factor", 0.0)) > 0:
        found["attention_factor"] = scale
    return found


def _frequency_factors(factors: numpy.ndarray[Any, Any], base: float, rotated: int) -> dict[str, Any]:
    """Llama 3's parameters where they give these factors; else the factors themselves, in LongRoPE's form."""
    if (factors == 1.0).all():
        return {}
    frequencies = [base ** (-2 * place / rotated) for place in range(rotated // 2)]
    found = _llama3([float(value) for value in factors], frequencies)
    if found is not None:
        return {"rope_type": "llama3", **found}
    plain = [float(value) for value in factors]
    # One list for short and long texts, and no scale of the rotated values: nothing but the division is left.
    return {
        "rope_type": "longrope",
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": 1,
        "long_factor": plain,
        "short_factor": plain,
    }


def _llama3(factors: list[float], frequencies: list[float]) -> dict[str, Any] | None:
    """Parameters of Llama 3's scaling that give `factors`, or None.

    High frequencies keep the factor 1, low ones get the largest; between them 1 / factor grows linearly with the
    frequency. The parameters are only known up to a common scale, so `low_freq_factor` is 1.
    """
    most = max(factors)
    if most <= 1.0 or min(factors) < 1.0:
        return None
    between = [(f, w) for f, w in zip(factors, frequencies, strict=True) if 1.0 + _CLOSE < f < most * (1 - _CLOSE)]
    highs = []
    if len(between) >= 2:
        (first, fast), (second, slow) = between[0], between[-1]
        smooth = [(1 / value - 1 / most) / (1 - 1 / most) for value in (first, second)]
        slope = (smooth[0] - smooth[1]) / (fast - slow)
        start = slope * fast - smooth[0]  # low / (high - low)
        if start > 0:
            highs.append(1 + 1 / start)
    for high in (*highs, 4.0):
        if between:
            value, frequency = between[0]
            smooth_first = (1 / value - 1 / most) / (1 - 1 / most)
            original = 2 * math.pi / frequency * (1 + smooth_first * (high - 1))
        else:
            kept = [w for f, w in zip(factors, frequencies, strict=True) if f == 1.0]
            scaled = [w for f, w in zip(factors, frequencies, strict=True) if f == most]
            lowest, highest = 2 * math.pi * high / min(kept, default=math.inf), 2 * math.pi / max(scaled)
            if lowest > highest:
                continue
            original = (lowest + highest) / 2
        found = {
            "factor": float(f"{most:.7g}"),
            "low_freq_factor": 1.0,
            "high_freq_factor": round(high, 4),
            "original_max_position_embeddings": round(original),
        }
        got = _llama3_factors(found, frequencies)
        if all(abs(a - b) <= _CLOSE * b for a, b in zip(got, factors, strict=True)):
            return found
    return None


def _llama3_factors(found: dict[str, Any], frequencies: list[float]) -> list[float]:
    factor, high = found["factor"], found["high_freq_factor"]
    factors = []
    for frequency in frequencies:
        turns = found["original_max_position_embeddings"] * frequency / (2 * math.pi)
        smooth = min(max((turns - 1) / (high - 1), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return factors
