"""Which part of a text is scored: all of one that a fit has not read, the held-out part of one that it has.

`fit.json` names the texts that a fit read, with the size and SHA-256 of their files, so that a text is recognised under
another name or in another place. What cannot be compared counts as read.
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from informed_routing.assets import Split, load_texts
from informed_routing.errors import InputError

_READ: tuple[Split, Split] = ("train", "calibration")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class TextFile:
    """A file as it was when it was looked at. `path` is empty for one that only a record tells of."""

    bytes: int
    path: str = ""
    sha256: str = ""

    def same(self, other: TextFile) -> bool:
        """Whether both are the same place or the same content."""
        if self.path and self.path == other.path:
            return True
        return self.bytes == other.bytes and bool(self.digest()) and self.digest() == other.digest()

    def digest(self) -> str:
        """SHA-256 of the content: the recorded one, else that of the file as it is now; "" when it cannot be read."""
        if self.sha256 or not self.path:
            return self.sha256
        try:
            return _sha256(Path(self.path))
        except OSError:
            return ""


@dataclass(frozen=True)
class Source:
    """One text of a reference: its files, none for an embedded one or a Hub set."""

    ref: str
    files: tuple[TextFile, ...] = ()
    missing: bool = False
    """Whether it named files of which nothing is known now."""

    def named_like(self, other: Source) -> bool:
        """Whether two references without files are the same text: for Hub sets, the same split of the same set."""
        mine, theirs = _hub_parts(self.ref), _hub_parts(other.ref)
        same_config = mine[1] == theirs[1] or "" in (mine[1], theirs[1])  # the default one has a name, too
        return mine[0] == theirs[0] and mine[2] == theirs[2] and same_config


@dataclass(frozen=True)
class Fitted:
    """The texts that a model was fitted on. `unknown` says why there may be others, and is empty if there are not."""

    sources: tuple[Source, ...] = ()
    unknown: str = ""

    @property
    def names(self) -> str:
        """References of the texts, each once, for messages."""
        return ", ".join(dict.fromkeys(source.ref for source in self.sources))


@dataclass(frozen=True)
class Part:
    """Documents to score, which part of the text they are, and why that one."""

    split: Split
    reason: str
    documents: list[str] = field(repr=False)


def part_of(ref: str, split: Split | None, fitted: Fitted | None) -> Part:
    """The documents of a text to score, for a model fitted on `fitted` (None: a dense model, by nobody here).

    `split` is the user's own choice, and wins. Embedded texts give their held-out part. Raises InputError when the text
    cannot be read or that part of it is empty.
    """
    if split is not None:
        return Part(split, "as --split says", load_texts(ref, split))
    pieces = _sources(ref)
    if all(piece.ref.startswith("demo:") for piece in pieces):
        return Part("heldout", "an embedded text", load_texts(ref, "heldout"))
    if fitted is None:
        return Part("all", "no fit has read it", load_texts(ref, "all"))
    found = [_overlap(piece, fitted) for piece in pieces]
    if any(partly for partly, _ in found):
        return Part("heldout", f"what the fit on {fitted.names} has not read of it", _unread(ref, pieces, fitted))
    if any(read for _, read in found):
        return Part("heldout", "the fit has read the rest", _held_out(ref))
    if fitted.unknown:
        return Part("heldout", f"the fit may have read the rest: {fitted.unknown}", _held_out(ref))
    return Part("all", f"the fit has read {fitted.names or 'no text'}, not this one", load_texts(ref, "all"))


def fitted_on(folder: Path | None) -> Fitted:
    """What the fit of a routing folder read, by its `fit.json`; None for a folder that is not at hand."""
    try:
        if folder is None or not (folder / "fit.json").is_file():
            return Fitted(unknown="no fit.json says what that was")
        report = json.loads((folder / "fit.json").read_text(encoding="utf-8"))
        recorded = report.get("texts")
        if recorded is not None:
            return _recorded(recorded)
        refs, start = list(report["recipe"]["data"]), report["recipe"].get("start")
        sources = tuple(source for ref in refs for source in _sources(str(ref)))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Fitted(unknown="fit.json cannot be read")
    lost = next((source.ref for source in sources if source.missing), None)
    unknown = f"{lost} is not here to compare" if lost else ""
    if start is not None:
        before = fitted_on(Path(start).expanduser())
        sources, unknown = sources + before.sources, unknown or before.unknown
    return Fitted(sources, unknown)


def text_records(refs: Iterable[str], start: Path | None = None) -> dict[str, Any]:
    """What `fit.json` keeps of the texts of a fit (and of the one that it started from), to know them again.

    Names, sizes and digests of files, not the folders that they lie in.
    """
    own = tuple(source for ref in refs for source in _sources(ref))
    before = Fitted() if start is None else fitted_on(start)
    sources = [
        {
            "ref": source.ref,
            "files": [{"bytes": file.bytes, "sha256": file.digest()} for file in source.files],
            "missing": source.missing,
        }
        for source in own + before.sources
    ]
    return {"sources": sources, "unknown": before.unknown}


def _recorded(content: Any) -> Fitted:
    """`text_records` read back; files that are where they were are known by their place, too."""
    sources = []
    lost = ""
    for entry in content["sources"]:
        ref = str(entry["ref"])
        files = [TextFile(int(one["bytes"]), sha256=str(one["sha256"])) for one in entry["files"]]
        here = [file for source in _sources(ref) for file in source.files]
        if len(here) == len(files):  # they may have changed since: at the same place they are still what was read
            files = [replace(old, path=new.path) for old, new in zip(files, here, strict=True)]
        lost = lost or (f"{ref} is not here to compare" if entry.get("missing") else "")
        sources.append(Source(ref, tuple(files)))
    return Fitted(tuple(sources), str(content.get("unknown", "")) or lost)


def _overlap(piece: Source, fitted: Fitted) -> tuple[bool, bool]:
    """(whether a text shares only some files with one that was read, whether it was read as it is)."""
    if not piece.files:
        known = [source for source in fitted.sources if not source.files]
        return False, any(piece.named_like(source) for source in known)
    whole = partly = False
    for source in fitted.sources:
        pairs = zip(piece.files, source.files, strict=False)
        if len(piece.files) == len(source.files) and all(one.same(other) for one, other in pairs):
            whole = True
        elif any(one.same(other) for one in piece.files for other in source.files):
            partly = True
    return partly, whole


def _unread(ref: str, pieces: Sequence[Source], fitted: Fitted) -> list[str]:
    """Documents of a text that shares files with what was read: those that no fit trained or calibrated on.

    Documents are counted in the whole of what the fit read, so that a tenth of one of its files is another tenth.
    """
    read: set[bytes] = set()
    for source in fitted.sources:
        shares = any(one.same(other) for piece in pieces for one in piece.files for other in source.files)
        if shares and not all(file.path for file in source.files):
            raise InputError(
                f"{ref} is a part of {source.ref}, which the fit has read and which is not here any more",
                "Give the files as the fit got them, or say which part with --split",
            )
        if shares:
            read.update(_mark(text) for split in _READ for text in load_texts(source.ref, split))
    kept = [text for text in load_texts(ref, "all") if _mark(text) not in read]
    if not kept:
        raise InputError(f"the fit has read all of {ref}", "Give another text, or --split all to score it all the same")
    return kept


def _held_out(ref: str) -> list[str]:
    try:
        return load_texts(ref, "heldout")
    except InputError as error:
        if "is empty" not in error.what:
            raise
        raise InputError(
            error.what, "Give at least 10 documents, or --split all to score text that the fit may have read"
        ) from None


def _mark(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", errors="surrogatepass")).digest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _sources(ref: str) -> list[Source]:
    """The texts of a reference as `load_texts` takes it, with their files in the order in which they are read."""
    pieces, found, start = ref.split(","), [], 0
    while start < len(pieces):
        ends = range(len(pieces), start + 1, -1)  # a comma in the name of a file does not separate
        end = next((end for end in ends if _files(",".join(pieces[start:end]).strip())), start + 1)
        found.append(_source(",".join(pieces[start:end]).strip()))
        start = end
    return found


def _source(ref: str) -> Source:
    if ref.startswith("demo:"):
        return Source(ref)
    name, _, column = ref.rpartition(":")
    plain = name if name and column and _files(name) and not _files(ref) else ref  # one column of files
    found = tuple(TextFile(file.stat().st_size, str(file)) for file in _files(plain))
    local = any(sign in ref for sign in "*?[") or ref.startswith(("/", ".", "~")) or _has_suffix(ref)
    return Source(ref, found, missing=local and not found)


def _files(ref: str) -> list[Path]:
    """The files of a path or glob, in the order in which they are read."""
    path = Path(ref).expanduser()
    try:
        names = [str(path)] if path.exists() else sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207
        return [Path(name).resolve() for name in names if Path(name).is_file()]
    except (OSError, ValueError):  # a name that is too long, or holds what no name may
        return []


def _has_suffix(ref: str) -> bool:
    from informed_routing.assets.readers import SUFFIXES

    return ref.endswith(SUFFIXES)


def _hub_parts(ref: str) -> tuple[str, str, str]:
    """(name, configuration, split) of a Hub set."""
    name, config, split = [*ref.split(":"), "", "", ""][:3]
    return name, config, split or "train"
