"""Documents into rows of token ids of one length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

from informed_routing.assets.soundness import check_ids, fits
from informed_routing.errors import InputError

if TYPE_CHECKING:
    import torch

_BATCH = 512  # documents given to the tokenizer at once


def pack(texts: Iterable[str], tokenizer: Any, length: int, *, shorten: bool = False) -> torch.LongTensor:
    """Join documents with the end-of-text token and cut them in rows: int64 `[n, length]`, no padding.

    The remainder that fills no row is dropped. Where the tokenizer itself begins every text with a
    beginning-of-text token (Llama 3, Gemma), every row begins with it, since such models expect it.
    Raises `InputError` when there is less than one row (with `shorten` such a text is one shorter row, of 2 tokens at
    least), and for ids beyond the embeddings of the model that the tokenizer was loaded with.
    """
    import torch

    if length < 2:
        raise InputError(f"A row of {length} tokens is too short to predict anything", "Use a length of 2 or more")
    start = _row_start(tokenizer)
    body = length - len(start)
    ids: list[int] = []
    blocks: list[torch.Tensor] = []
    for tokens in _tokens(texts, tokenizer):
        ids.extend(tokens)
        whole = len(ids) // body * body
        if whole >= body * _BATCH:  # keep Python lists short: they cost far more memory than tensors
            blocks.append(torch.tensor(ids[:whole], dtype=torch.long))
            del ids[:whole]
    blocks.append(torch.tensor(ids, dtype=torch.long))
    stream = torch.cat(blocks)
    if shorten and stream.numel() < body and stream.numel() + len(start) >= 2:
        body = stream.numel()
    count = stream.numel() // body
    if count == 0:
        raise InputError(
            f"The text gives {stream.numel()} tokens, less than one row of {length}",
            "Give more text, or a shorter sequence length",
        )
    check_ids(int(stream.max()), tokenizer)
    rows = stream[: count * body].view(count, body)
    if start:
        rows = torch.cat([torch.tensor(start).expand(count, -1), rows], dim=1)
    return rows  # type: ignore[return-value]  # torch types every integer tensor as Tensor


def _document_end(tokenizer: Any) -> list[int]:
    """What separated documents in pre-training.

    A chat model's `eos_token` ends a turn; its documents were joined by <|endoftext|> (SmolLM2, Qwen, Phi, OLMo),
    and the turn end in its place costs perplexity.
    """
    found = tokenizer.get_vocab().get("<|endoftext|>")
    if found is None or not fits(found, tokenizer):  # transformers adds it to vocabularies that had none
        found = tokenizer.eos_token_id
    return [] if found is None else [found]


def _tokens(texts: Iterable[str], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of each document in turn, closed by the end-of-text token if the tokenizer has one."""
    end = _document_end(tokenizer)
    remaining = iter(texts)
    while batch := list(islice(remaining, _BATCH)):
        for tokens in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            yield tokens + end


def _row_start(tokenizer: Any) -> list[int]:
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return []
    return [bos] if tokenizer("a")["input_ids"][:1] == [bos] else []
