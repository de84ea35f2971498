"""Perplexity per token on packed text and per word on whole pages, of dense and routed models alike.

Nothing here is random, nothing is padded, and the LM head is applied to a few rows at a time, so that a
vocabulary of 128k does not decide how much text fits in memory. A loss that is not finite ends the work: every number
in a result is one.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from informed_routing.errors import InputError
from informed_routing.evaluation.numbers import exponential, not_finite
from informed_routing.execution.changes import unchanging
from informed_routing.execution.engine import NO_TARGET, NativeEngine
from informed_routing.models.head import base_logits
from informed_routing.progress import NullProgress, Progress

__all__ = ["PagePerplexityResult", "PerplexityResult", "page_perplexity", "token_perplexity"]

HEAD_ROWS = 256  # positions whose logits are held at once: 256 x 49,152 float32 is 50 MB
_LARGEST = 700.0  # nats: e to this is still a float


@dataclass(frozen=True)
class PerplexityResult:
    """`loss` is the mean negative log likelihood of a token in nats over `tokens` predictions.

    `stats` is what `routing_stats()` of a routed model says about these tokens, None for a dense model.
    """

    token_perplexity: float
    loss: float
    tokens: int
    seconds: float
    stats: dict[str, Any] | None = None


@dataclass(frozen=True)
class PagePerplexityResult(PerplexityResult):
    """Document-level perplexity: exp(total loss / `words`), as lm-eval reports for `wikitext`."""

    word_perplexity: float = math.nan
    words: int = 0
    pages: int = 0


class PageTokenizer(Protocol):
    """The part of a transformers tokenizer that page perplexity needs."""

    bos_token_id: int | None
    eos_token_id: int | None

    def encode(self, text: str, *, add_special_tokens: bool = ...) -> list[int]: ...


def token_perplexity(
    model: torch.nn.Module, rows: Tensor, batch_size: int = 4, progress: Progress | None = None
) -> PerplexityResult:
    """Perplexity of rows `[n, L]` (int64): every token but a row's first is predicted from those before it.

    Deterministic; leaves the model in the mode it was in. Raises InputError for empty or too short rows, WorkError for
    a loss that is not finite, or of which no perplexity can be written, naming the sequence.
    """
    if rows.ndim != 2 or rows.shape[0] == 0 or rows.shape[1] < 2:
        raise InputError(f"rows of shape {tuple(rows.shape)} hold nothing to predict", "Give [n, L] with L >= 2")
    targets = torch.full_like(rows, NO_TARGET)
    targets[:, :-1] = rows[:, 1:]
    pairs = ((rows[i : i + batch_size], targets[i : i + batch_size]) for i in range(0, len(rows), batch_size))
    total, tokens, seconds, stats = _score(model, pairs, -(-len(rows) // batch_size), progress)
    loss = total / tokens
    return PerplexityResult(exponential(loss, "token perplexity"), loss, tokens, seconds, stats)


def page_perplexity(
    model: torch.nn.Module,
    tokenizer: PageTokenizer,
    pages: Sequence[str],
    max_length: int,
    batch_size: int = 4,
    progress: Progress | None = None,
) -> PagePerplexityResult:
    """Word and token perplexity of whole pages, by the definition of lm-eval's `wikitext` task.

    A page is detokenised, tokenised without special tokens, and scored in the windows of `page_windows`: up
    to `max_length` predictions each, the first after the beginning (or end) of text token. Words are counted
    on the page as it was given. Raises InputError when there is nothing to score, or so few words (in a language that
    puts no spaces between them) that a perplexity per word cannot be written; WorkError as `token_perplexity` does.
    """
    prefix = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if prefix is None:
        raise InputError("the tokenizer has no beginning- or end-of-text token", "Use a tokenizer that has one")
    if max_length < 1:
        raise InputError(f"window length {max_length} is below 1", "Give the model's context, or 512")
    windows: list[tuple[list[int], list[int]]] = []
    words = 0
    for page in pages:
        ids = tokenizer.encode(wikitext_detokenize(page), add_special_tokens=False)
        words += len(re.split(r"\s+", page))
        windows.extend(page_windows(ids, prefix, max_length))
    if not windows:
        raise InputError("the pages hold no text", "Give a file with text in its `page` column")
    batches = _equal_length_batches(windows, batch_size)
    total, tokens, seconds, stats = _score(model, iter(batches), len(batches), progress)
    if total / words > _LARGEST:
        raise InputError(
            f"{words} words in {tokens} tokens are too few for a perplexity per word",
            "Give the text as a `text` column for perplexity per token",
        )
    return PagePerplexityResult(
        token_perplexity=exponential(total / tokens, "token perplexity"),
        loss=total / tokens,
        tokens=tokens,
        seconds=seconds,
        stats=stats,
        word_perplexity=math.exp(total / words),
        words=words,
        pages=len(pages),
    )


def page_windows(ids: Sequence[int], prefix: int, max_length: int) -> Iterator[tuple[list[int], list[int]]]:
    """(inputs, targets) windows that predict every token of `ids` once, exactly those of lm-eval.

    Windows are disjoint and see one token before their first target; only the last, shorter one is filled up
    with earlier tokens as context (target -100: not scored).
    """
    shifted = [prefix, *ids[:-1]]
    for start in range(0, len(ids), max_length):
        end = min(start + max_length, len(ids))
        first = max(end - max_length, 0)
        yield list(shifted[first:end]), [NO_TARGET] * (start - first) + list(ids[start:end])


def wikitext_detokenize(page: str) -> str:
    """Undo WikiText's token spacing by the replacements of lm-eval's `wikitext_detokenizer`, quirks included.

    (The `/' [0-9]/` pattern is a slip in the original; it stays, because scores are compared with it.)
    """
    text = page.replace("s '", "s'")
    text = re.sub(r"/' [0-9]/", r"/'[0-9]/", text)
    for spaced, plain in ((" @-@ ", "-"), (" @,@ ", ","), (" @.@ ", ".")):
        text = text.replace(spaced, plain)
    for mark in ":;.!?,":
        text = text.replace(f" {mark} ", f"{mark} ")
    for pattern, replacement in (
        (r"\(\s*([^\)]*?)\s*\)", r"(\1)"),
        (r"\[\s*([^\]]*?)\s*\]", r"[\1]"),
        (r"{\s*([^}]*?)\s*}", r"{\1}"),
        (r"\"\s*([^\"]*?)\s*\"", r'"\1"'),
        (r"'\s*([^']*?)\s*'", r"'\1'"),
    ):
        text = re.sub(pattern, replacement, text)
    for old, new in (
        ("= = = =", "===="),
        ("= = =", "==="),
        ("= =", "=="),
        (" \N{DEGREE SIGN} ", "\N{DEGREE SIGN}"),
    ):
        text = text.replace(old, new)
    return text.replace(" \n", "\n").replace("\n ", "\n").replace(" N ", " 1 ").replace(" 's", "'s")


def merge_stats(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The shares of several runs as one, weighted by their tokens; None when there are none."""
    weighted = [(part, float(part["tokens"])) for part in parts if part.get("tokens")]
    total = sum(weight for _, weight in weighted)
    if not total:
        return None
    merged: dict[str, Any] = {"target": weighted[0][0].get("target"), "tokens": int(total)}
    for key in ("units", "attention", "ffn", "macs"):
        merged[key] = sum(part[key] * weight for part, weight in weighted) / total
    return merged


def sparsity_record(stats: Mapping[str, Any] | None, target: float) -> dict[str, float]:
    """The `sparsity` object of the JSON results; a dense model approximates nothing."""
    shares = {key: float(stats[key]) if stats else 0.0 for key in ("units", "attention", "ffn", "macs")}
    return {"target": target, **shares}


def _equal_length_batches(
    windows: Sequence[tuple[list[int], list[int]]], batch_size: int
) -> list[tuple[Tensor, Tensor]]:
    """Batches of windows of one length: padding would change what a routed model counts and computes."""
    by_length: dict[int, list[tuple[list[int], list[int]]]] = {}
    for window in windows:
        by_length.setdefault(len(window[0]), []).append(window)
    return [
        (torch.tensor([w[0] for w in chunk]), torch.tensor([w[1] for w in chunk]))
        for group in by_length.values()
        for chunk in (group[i : i + batch_size] for i in range(0, len(group), batch_size))
    ]


def _score(
    model: torch.nn.Module, batches: Iterator[tuple[Tensor, Tensor]], count: int, progress: Progress | None
) -> tuple[float, int, float, dict[str, Any] | None]:
    """Total loss, predictions, seconds and routing statistics over (inputs, targets) batches of `[b, L]`.

    Raises WorkError for a loss that is not finite.
    """
    progress = progress or NullProgress()
    was_training = model.training
    model.eval()
    routed = hasattr(model, "routing_stats")
    if routed:
        cast(Any, model).reset_routing_stats()
    progress.stage("perplexity", count)
    total, tokens, sequences = 0.0, 0, 0
    start = time.perf_counter()
    try:
        with torch.inference_mode(), unchanging(model):
            for number, (inputs, targets) in enumerate(batches, 1):
                loss = _batch_loss(model, inputs, targets)
                if not math.isfinite(loss):
                    raise _at_fault(model, inputs, targets, sequences)
                total += loss
                sequences += len(inputs)
                tokens += int((targets != NO_TARGET).sum())
                progress.advance(number, loss=total / tokens)
    finally:
        model.train(was_training)
    stats = cast(Any, model).routing_stats() if routed else None
    return total, tokens, time.perf_counter() - start, stats


def _at_fault(model: torch.nn.Module, inputs: Tensor, targets: Tensor, before: int) -> Exception:
    """The error for a batch `[b, L]` whose loss is not finite, with the first sequence that makes it so."""
    for row in range(len(inputs)):
        one = slice(row, row + 1)
        if not math.isfinite(_batch_loss(model, inputs[one], targets[one])):
            return not_finite(f"the loss of sequence {before + row + 1}", model, inputs[one])
    return not_finite(f"the loss of sequences {before + 1} to {before + len(inputs)}", model)


def _batch_loss(model: torch.nn.Module, inputs: Tensor, targets: Tensor) -> float:
    """Summed negative log likelihood of targets `[b, L]` for inputs `[b, L]`, summed in float64.

    NaN where the last hidden states are not finite: what a fused head makes of such is not relied on.
    """
    wrapped = cast(Any, model)
    device = wrapped.device
    inputs, targets = inputs.to(device), targets.to(device).flatten()
    hidden, last = _hidden_states(wrapped, inputs)
    if not bool(last.isfinite().all()) or (hidden is not None and not bool(hidden.isfinite().all())):
        return math.nan
    if hidden is None or not torch.allclose(_head(wrapped, hidden[:, -1]).float(), last.float(), rtol=1e-2, atol=1e-2):
        # a model whose head is more than we know of: let it compute its own logits, all of them
        logits = wrapped(input_ids=inputs, use_cache=False).logits.flatten(0, 1)
        return _summed(logits, targets)
    flat = hidden.flatten(0, 1)
    chunks = range(0, len(flat), HEAD_ROWS)
    if engine := _engine(wrapped):  # without storing logits, where it can
        parts = (engine.losses(flat[i : i + HEAD_ROWS], targets[i : i + HEAD_ROWS]) for i in chunks)
        return sum(float(losses.double().sum()) for losses in parts)
    return sum(_summed(_head(wrapped, flat[i : i + HEAD_ROWS]), targets[i : i + HEAD_ROWS]) for i in chunks)


def _summed(logits: Tensor, targets: Tensor) -> float:
    losses = F.cross_entropy(logits.float(), targets, ignore_index=NO_TARGET, reduction="none")
    return float(losses.double().sum())


def _engine(model: Any) -> NativeEngine | None:
    """The native engine that does the model's forwards now; None where PyTorch does."""
    if not getattr(model, "runs_native", False):
        return None
    return cast(NativeEngine, model.routing_state.native.of(model))


def _hidden_states(model: Any, inputs: Tensor) -> tuple[Tensor | None, Tensor]:
    """Last hidden states `[b, L, d]` and the model's own logits `[b, vocabulary]` of the last position."""
    if getattr(model, "runs_native", False):
        hidden = model.hidden_states(inputs)
        return hidden, _head(model, hidden[:, -1])
    kept: list[Tensor] = []

    def keep(_module: torch.nn.Module, _arguments: Any, output: Any) -> None:
        state = getattr(output, "last_hidden_state", None)
        if isinstance(state, Tensor):
            kept.append(state)

    handle = model.get_decoder().register_forward_hook(keep)
    try:
        # by index, since torch multiplies a slice of a batch by a copy of the head for each sequence
        last = torch.tensor([inputs.shape[1] - 1], device=inputs.device)
        output = model(input_ids=inputs, use_cache=False, logits_to_keep=last)
    finally:
        handle.remove()
    return (kept[-1] if kept else None), output.logits[:, -1]


def _head(model: Any, hidden: Tensor) -> Tensor:
    """Logits of hidden states `[rows, d]` (what a family that we do not know does to them is found by comparison)."""
    if engine := _engine(model):
        return engine.head(hidden)
    return base_logits(model, hidden)
