"""The texts that `evaluate` scores: which part of each, tokenised where it is scored in rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from informed_routing.evaluation.parts import Fitted, Part

Split = Literal["train", "calibration", "heldout", "all"]


@dataclass(frozen=True)
class Text:
    """One text to score: packed `rows` [n, L], or whole `pages`; of how many documents, and which part of the text."""

    name: str
    split: str
    rows: Any = None
    pages: tuple[str, ...] = ()
    documents: int = 0
    reason: str = ""
    length: int = 0
    """Tokens that are scored together: fewer than asked for where the text is shorter than one row."""

    def described(self) -> dict[str, Any]:
        """What the result says of the text besides its scores."""
        return {
            "split": self.split,
            "reason": self.reason,
            "documents": self.documents,
            "sequence_length": self.length,
        }


def part_words(split: str) -> str:
    """A part of a text, in words."""
    return "all of it" if split == "all" else f"its {split} part"


def choose_parts(refs: Sequence[str], split: Split | None, fitted: Fitted | None) -> list[tuple[str, bool, Part]]:
    """(name, whether it holds pages, the documents to score) of each text. Reads all of them, and no model."""
    from informed_routing.evaluation.parts import part_of

    from .loading import is_pages, task_names

    names = task_names(list(refs))
    return [(name, is_pages(ref), part_of(ref, split, fitted)) for name, ref in zip(names, refs, strict=True)]


def tokenised(
    parts: Sequence[tuple[str, bool, Part]],
    tokenizer: Any,
    length: int,
    limit: int | None,
    say: Callable[[str], None] = lambda text: None,
) -> list[Text]:
    """The texts as they are scored: at most `limit` rows or pages of each.

    A text shorter than one row is scored in one shorter row, which `say` is told. Raises InputError for a text of
    fewer than two tokens.
    """
    texts = []
    for name, pages, part in parts:
        if pages:
            chosen = tuple(part.documents[:limit])
            texts.append(Text(name, part.split, None, chosen, len(chosen), part.reason, length))
            continue
        rows, documents = _rows(part.documents, tokenizer, length, limit)
        if rows.shape[1] < length:
            say(f"{name} has {rows.shape[1]} tokens, less than one row of {length}: it is scored in one row of its own")
        texts.append(Text(name, part.split, rows, (), documents, part.reason, rows.shape[1]))
    return texts


def load_all(refs: Sequence[str], split: Split | None, tokenizer: Any, length: int, limit: int | None) -> list[Text]:
    """The texts behind references, for a model that was fitted on nothing that is known here."""
    return tokenised(choose_parts(refs, split, None), tokenizer, length, limit)


def _rows(documents: Sequence[str], tokenizer: Any, length: int, limit: int | None) -> tuple[Any, int]:
    """At most `limit` rows of documents, and from how many documents they come: no more are tokenised than needed."""
    from informed_routing.assets import pack

    def packed(count: int) -> Any:
        return pack(documents[:count], tokenizer, length, shorten=True)

    if limit is None:
        return packed(len(documents)), len(documents)
    wanted = limit

    def filled(count: int) -> bool:
        rows = packed(count)
        return rows.shape[1] == length and len(rows) >= wanted

    high = 1
    while high < len(documents) and not filled(high):
        high *= 2
    high = min(high, len(documents))
    low = high // 2  # too few, or none
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if filled(middle) else (middle, high)
    return packed(high)[:limit], high
