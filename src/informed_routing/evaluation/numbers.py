"""Losses and logits that are not finite: where they begin, and what to do about it.

A model that overflows still has an argmax, and a perplexity of NaN is easily taken for one that is missing. So whoever
reads a loss or chooses a token looks first, and stops here.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from informed_routing.errors import WorkError


class FiniteLogits:
    """A logits processor for `generate`: stops at the first step whose logits are NaN or infinite.

    Scores of minus infinity are how transformers forbids a token, so the highest one of each sequence is looked at:
    one reduction a step, and NaN comes through it.
    """

    def __init__(self, model: Any, prompt_tokens: int, what: str = "a logit") -> None:
        self.model, self.prompt_tokens, self.what = model, prompt_tokens, what

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        highest = scores.max(dim=-1).values
        if not bool(highest.isfinite().all()):
            row = int((~highest.isfinite()).nonzero()[0])
            step = input_ids.shape[1] - self.prompt_tokens + 1
            raise not_finite(f"{self.what} of new token {step}", self.model, input_ids[row : row + 1])
        return scores


def not_finite(what: str, model: Any, inputs: Tensor | None = None) -> WorkError:
    """The error that says that `what` is not finite, in which number format, and in which layer of a forward of
    `inputs` int64 [1, N] it begins."""
    found = None if inputs is None else _origin(model, inputs)
    weights = getattr(getattr(getattr(model, "routing_state", None), "native", None), "weights", None)
    dtype = str(model.dtype).removeprefix("torch.")
    formats = dtype if weights in (None, dtype) else f"{dtype} with {weights} weights"
    where = f" ({found})" if found else ""
    return WorkError(f"{what} is not a finite number in {formats}{where}", _remedy(model, weights))


def _remedy(model: Any, weights: str | None) -> str:
    for name, parameter in model.named_parameters():
        if not bool(parameter.detach().float().isfinite().all()):
            return f"The weights themselves hold NaN or infinity, first {name}: get the checkpoint again"
    if model.dtype == torch.float16:
        return "float16 overflows: use --dtype bfloat16 or float32"
    if model.dtype == torch.bfloat16 or weights not in (None, "float32"):
        return "Use --dtype float32" + (" without --weights" if weights not in (None, "float32") else "")
    return "Check the model's settings (norms' epsilon, rotary scaling) and its weights"


def _origin(model: Any, inputs: Tensor) -> str | None:
    """Where the first value that is not finite stands in a forward by torch; None when the model shows no layers."""
    try:
        layers = list(model.get_decoder().layers)
    except Exception:  # a model of another kind
        return None
    bad: list[int] = []

    def look(number: int) -> Any:
        def hook(_module: Any, _arguments: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, Tensor) and not bool(hidden.isfinite().all()):
                bad.append(number)

        return hook

    handles = [layer.register_forward_hook(look(number)) for number, layer in enumerate(layers)]
    state = getattr(model, "routing_state", None)
    native = getattr(state, "native", None)
    unseen = nullcontext() if state is None else state.using(native=None)  # an engine of ours shows no layers
    try:
        with unseen, torch.inference_mode():
            logits = model(input_ids=inputs.to(model.device), use_cache=False).logits
    except Exception:  # this only looks for a reason: whatever fails here, the error to report is the other one
        return None
    finally:
        for handle in handles:
            handle.remove()
    if bad:
        return f"first in layer {bad[0]} of {len(layers)}"
    if native is not None and bool(logits.isfinite().all()):
        return "in the native engine only: --execution sparse does without it"
    return "in the head"


def exponential(loss: float, what: str) -> float:
    """exp(loss) of a finite mean loss in nats. Raises WorkError when that is beyond the numbers of a computer."""
    try:
        return math.exp(loss)
    except OverflowError:
        raise WorkError(
            f"{what} is e to the {loss:.0f}, beyond any number that can be written",
            "Read `loss`, or check that this text and this model belong together",
        ) from None
