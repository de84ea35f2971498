"""Which column of a table is its text: said by the user, called `text`, or the only one of strings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from informed_routing.assets.encodings import mended
from informed_routing.errors import InputError

COLUMNS = ("text", "page", "content")
_ENOUGH = 1000  # records with nulls, after which the strings that were seen decide


class TextColumn:
    """Documents out of records that come one by one. The column is settled once and holds for every record.

    A null is a record without text. Raises `InputError` with the place for a record in which the column is missing
    or holds something else: never another column, never an empty text in its place.
    """

    def __init__(self, name: str = "") -> None:
        self.name = name
        self._strings: dict[str, None] = {}  # in records before the column was known, in order
        self._nulls: set[str] = set()
        self._where = ""

    def documents(self, records: Iterator[tuple[str, Mapping[str, Any]]]) -> Iterator[str]:
        """Texts of (place, record) pairs; those before the column was known follow once it is."""
        waiting: list[tuple[str, Mapping[str, Any]]] = []
        for where, record in records:
            if not self.name and not self._settled(where, record, len(waiting) >= _ENOUGH):
                waiting.append((where, record))
                continue
            for place, held in (*waiting, (where, record)):
                yield from self._value(place, held)
            waiting = []
        if waiting and self._strings:
            self.name = choose(self._where, list(self._strings))
            for place, held in waiting:
                yield from self._value(place, held)

    def _settled(self, where: str, record: Mapping[str, Any], enough: bool) -> bool:
        """Whether the column is known now. With nulls a record does not show what its columns hold."""
        self._where = self._where or where
        known = next((name for name in COLUMNS if name in record), None)
        if known is not None:
            self.name = known
            return True
        self._strings |= dict.fromkeys(name for name, value in record.items() if isinstance(value, str))
        self._nulls = {name for name in self._nulls | set(record) if record.get(name) is None} - set(self._strings)
        if self._nulls and not (enough and self._strings):
            return False
        self.name = choose(self._where, list(self._strings))
        return True

    def _value(self, where: str, record: Mapping[str, Any]) -> Iterator[str]:
        if self.name not in record:
            has = ", ".join(map(str, list(record)[:10])) or "none"
            raise InputError(f"{where} has no column {self.name!r}; it has {has}", "Give the same columns everywhere")
        value = record[self.name]
        if isinstance(value, str):
            yield mended(value)
        elif value is not None:
            kinds = {list: "a list", dict: "an object", bool: "true or false", int: "a number", float: "a number"}
            kind = kinds.get(type(value), type(value).__name__)
            raise InputError(f"{where} has no text in {self.name!r} but {kind}", "Give a string in every record")


def choose(where: str, names: Sequence[str]) -> str:
    """The text column among columns of strings. Raises `InputError`, naming them, when that is not clear."""
    for name in COLUMNS:
        if name in names:
            return name
    if len(names) == 1:
        return names[0]
    has = f"its string columns are {', '.join(names)}" if names else "it has no string column"
    example = names[0] if names else COLUMNS[0]
    raise InputError(
        f"{where} has no text column: {has}",
        f"Name the column after the file, as in data.jsonl:{example}, or call it {COLUMNS[0]!r}",
    )
