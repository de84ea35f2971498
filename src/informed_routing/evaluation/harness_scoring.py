"""Log-likelihoods of continuations: lm-evaluation-harness' definition, computed with fewer tokens.

The answers to one question share its text, and with examples in the prompt that is nearly all of it. Such a prefix is
computed once and its KV cache is repeated for the answers. Other sequences are padded at the right, and padding is
masked, so that a routed model neither executes nor counts it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from informed_routing.errors import InputError
from informed_routing.evaluation.numbers import not_finite
from informed_routing.execution.changes import unchanging
from informed_routing.models.calls import cached
from informed_routing.progress import NullProgress, Progress

LEAST_SAVED = 64
"""Tokens that a shared prefix must save: one more call costs about as much as computing these."""
FAMILY_ROWS = 16
"""Most sequences that share one cache."""


@dataclass(frozen=True)
class _Row:
    """What goes into the model, and how many of the last outputs are wanted."""

    inputs: tuple[int, ...]
    wanted: int


Batch = tuple[int, list[_Row]]
"""Rows that are computed together, and how many leading tokens they have in common (0: not used)."""


def log_likelihoods(
    model: Any,
    pairs: Sequence[tuple[list[int], list[int]]],
    *,
    max_length: int,
    batch_size: int,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
) -> list[tuple[float, bool]]:
    """(log P(continuation | context), whether greedy decoding would produce it) of pairs of token ids.

    At most `max_length` inputs are seen, the last ones. Pairs with the same inputs are computed once, so equal answers
    have equal values. `dtype` is that of the softmax; None is the logits' own, as in lm-evaluation-harness.
    Raises InputError for an empty continuation or one longer than `max_length`, WorkError for logits that are not
    finite.
    """
    progress = progress or NullProgress()
    askers: dict[tuple[int, ...], list[int]] = {}
    for number, (context, continuation) in enumerate(pairs):
        if not context or not 0 < len(continuation) <= max_length:
            what = f"a continuation of {len(continuation)} tokens after {len(context)}"
            raise InputError(f"{what} does not fit {max_length} tokens", "Use a model with a longer context")
        inputs = tuple((context + continuation)[-(max_length + 1) :][:-1])
        askers.setdefault(inputs, []).append(number)
    rows = [_Row(inputs, max(len(pairs[n][1]) for n in numbers)) for inputs, numbers in askers.items()]
    results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
    finished = 0
    with torch.inference_mode(), unchanging(model):
        for shared, batch in _batches(rows, batch_size, share=may_share(model)):
            for row, logits in zip(batch, _wanted_logits(model, shared, batch), strict=True):
                scores = F.log_softmax(logits, dim=-1, dtype=dtype)
                for number in askers[row.inputs]:
                    results[number] = _score(scores, pairs[number][1])
                    if not math.isfinite(results[number][0]):
                        what = f"the log-likelihood of answer {number + 1}"
                        raise not_finite(what, model, torch.tensor([row.inputs]))
            finished += len(batch)
            progress.advance(finished)
    return results


def distinct(pairs: Sequence[tuple[list[int], list[int]]]) -> int:
    """How many sequences `log_likelihoods` computes for `pairs`."""
    return len({tuple(context + continuation[:-1]) for context, continuation in pairs})


def may_share(model: Any) -> bool:
    """Whether a token's decisions depend on nothing but the tokens before it, all of which are in the cache."""
    state = getattr(model, "routing_state", None)
    if state is None:
        return not getattr(model, "_is_stateful", False)
    return state.kv == "keep" and state.decision.by_margin


def _score(scores: Tensor, continuation: list[int]) -> tuple[float, bool]:
    """From log probabilities [wanted, vocabulary], of which the last ones are for the continuation."""
    scores = scores[-len(continuation) :]
    targets = torch.tensor(continuation, device=scores.device)
    chosen = scores.gather(1, targets[:, None])
    return float(chosen.sum()), bool((scores.argmax(-1) == targets).all())


def _batches(rows: Sequence[_Row], batch_size: int, share: bool) -> Iterator[Batch]:
    """Families first, then the rest from long to short, so that little is padded."""
    alone: list[_Row] = []
    for shared, family in _families(rows) if share else [(0, list(rows))]:
        if shared * (len(family) - 1) >= LEAST_SAVED:
            yield shared, family
        else:
            alone += family
    alone.sort(key=lambda row: -len(row.inputs))
    for begin in range(0, len(alone), batch_size):
        yield 0, alone[begin : begin + batch_size]


def _families(rows: Sequence[_Row]) -> Iterator[Batch]:
    """Neighbours that begin alike: the answers to one question stand together."""
    family: list[_Row] = []
    shared = 0
    for row in rows:
        common = min(_common(family[0].inputs, row.inputs), shared, len(row.inputs) - row.wanted) if family else 0
        if common > shared // 2 and len(family) < FAMILY_ROWS:
            family.append(row)
            shared = common
            continue
        if family:
            yield shared, family
        family, shared = [row], len(row.inputs) - row.wanted
    if family:
        yield shared, family


def _common(one: tuple[int, ...], other: tuple[int, ...]) -> int:
    """Length of the longest common prefix."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _wanted_logits(model: Any, shared: int, rows: list[_Row]) -> list[Tensor]:
    """Logits [wanted, vocabulary] of each row."""
    cache = _prefix(model, rows[0].inputs[:shared], len(rows)) if shared else None
    lengths = [len(row.inputs) - shared for row in rows]
    longest = max(lengths)
    inputs = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros(len(rows), shared + longest, dtype=torch.long)
    for place, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        inputs[place, :length] = torch.tensor(row.inputs[shared:])
        mask[place, : shared + length] = 1
    first = min(length - row.wanted for row, length in zip(rows, lengths, strict=True))
    arguments: dict[str, Any] = {"use_cache": cache is not None}
    if cache is not None:
        arguments |= cached(model, cache)
    if min(lengths) < longest:
        arguments["attention_mask"] = mask.to(model.device)
    logits = _forward(model, inputs, longest - first, arguments)
    return [
        logits[place, length - row.wanted - first : length - first]
        for place, (row, length) in enumerate(zip(rows, lengths, strict=True))
    ]


def _prefix(model: Any, tokens: tuple[int, ...], repeats: int) -> DynamicCache:
    """The cache of `tokens`, once for each of the rows that continue them."""
    cache = DynamicCache(config=model.config)
    _forward(model, torch.tensor([tokens]), 1, {**cached(model, cache), "use_cache": True})
    cache.batch_repeat_interleave(repeats)
    return cache


def _forward(model: Any, inputs: Tensor, keep: int, arguments: dict[str, Any]) -> Tensor:
    """Logits of the last `keep` positions; by keywords, since native engines take no other call."""
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        length = inputs.shape[1]
        # Torch multiplies a slice of a batch by a copy of the head for each sequence; engines take no indices.
        native = getattr(model, "runs_native", False)
        kept = keep if native else torch.arange(length - keep, length, device=model.device)
        arguments = {**arguments, "logits_to_keep": kept}
    logits: Tensor = model(input_ids=inputs.to(model.device), **arguments).logits
    return logits[:, -keep:]
