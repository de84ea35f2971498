"""The measurement table: one row per prompt of the nominal workload, as columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..extras import need
from ..files.user_files import shown
from .arrays import Floats, Ints
from .workloads import Inputs

INPUT_COLUMNS = ("domain", "prompt_tokens", "output_tokens")


@dataclass(frozen=True)
class Table:
    """Inputs and outcome columns of the same prompts."""

    inputs: Inputs
    outcomes: Mapping[str, Floats]  # [n] each

    def __len__(self) -> int:
        return len(self.inputs)

    def sum_of(self, columns: tuple[str, ...]) -> Floats:
        """Several outcome columns added up: [n]."""
        with np.errstate(over="ignore"):  # whoever uses the sum looks whether it is finite
            return np.sum([self.outcomes[name] for name in columns], axis=0)

    def in_order(self, order: Ints) -> Table:
        """The same rows in another order."""
        inputs = Inputs(self.inputs.domain[order], self.inputs.prompt_tokens[order], self.inputs.output_tokens[order])
        return Table(inputs, {name: values[order] for name, values in self.outcomes.items()})


def load_table(source: Mapping[str, Any] | str | Path, outcomes: Iterable[str]) -> Table:
    """Checks a mapping of columns, or reads a Parquet file, and keeps the input columns and the named `outcomes`.

    Raises InputError for missing or empty columns, unequal lengths, lengths in tokens that are negative or no
    integers, and outcomes that are not finite; each names the column and the first bad row (from 0).
    """
    wanted = list(dict.fromkeys([*INPUT_COLUMNS, *outcomes]))
    columns = _read_parquet(Path(source), wanted) if isinstance(source, (str, Path)) else source
    missing = [name for name in wanted if name not in columns]
    if missing:
        raise InputError(f"the table lacks {', '.join(missing)}", "Measure these columns, or leave out their metrics")
    arrays = {name: np.asarray(columns[name]) for name in wanted}
    sizes = {name: array.shape for name, array in arrays.items()}
    rows = sizes["domain"]
    for name, shape in sizes.items():
        if len(shape) != 1 or shape != rows:
            raise InputError(f"column {name} has shape {shape}, column domain has {rows}", "Give one value per prompt")
    if rows == (0,):
        raise InputError("the table has no rows", "Measure some prompts first")
    inputs = Inputs(
        _names(arrays["domain"]),
        _tokens(arrays["prompt_tokens"], "prompt_tokens", least=1),
        _tokens(arrays["output_tokens"], "output_tokens", least=0),
    )
    return Table(inputs, {name: _finite(arrays[name], name) for name in wanted if name not in INPUT_COLUMNS})


def _read_parquet(path: Path, wanted: list[str]) -> Mapping[str, Any]:
    with readable(path):
        from pyarrow import parquet

        file = parquet.read_table(path)
        return {name: file[name].to_numpy() for name in wanted if name in file.column_names}


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Around all that reads a Parquet file of the user. Raises InputError naming the file."""
    need("pyarrow", extra="whatif", for_what="Measured tables")
    from pyarrow import ArrowException

    if not path.exists():
        raise InputError(f"table {path} does not exist", "Give the path of a Parquet file")
    if not path.is_file():
        raise InputError(f"table {path} is no file", "Give the path of a Parquet file")
    try:
        yield
    except InputError:
        raise
    except MemoryError:
        raise
    except (ArrowException, OSError, ValueError, LookupError, OverflowError, RecursionError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise InputError(f"table {path} is no readable Parquet file: {reason}", "Measure again") from None


def _names(values: np.ndarray) -> np.ndarray:
    for row, name in enumerate(values.tolist()):
        if not isinstance(name, str):
            raise InputError(f"column domain is {shown(name)} in row {row}", "Give each prompt the name of its domain")
    return np.array([str(name) for name in values])


def _tokens(values: np.ndarray, name: str, least: int) -> Ints:
    numbers = _finite(values, name)
    bad = np.flatnonzero((numbers < least) | (numbers != np.round(numbers)))
    if len(bad):
        raise InputError(
            f"column {name} is {numbers[bad[0]]:g} in row {bad[0]}", f"Lengths are integers of at least {least}"
        )
    return numbers.astype(np.int64)


def _finite(values: np.ndarray, name: str) -> Floats:
    kind = values.dtype.kind
    try:
        # numpy would read text as numbers, dates as nanoseconds, and drop what is imaginary
        if kind not in "biufO" or (kind == "O" and any(isinstance(value, (str, bytes, complex)) for value in values)):
            raise ValueError
        numbers = values.astype(np.float64)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"column {name} holds no numbers", "Check the table") from None
    bad = np.flatnonzero(~np.isfinite(numbers))
    if len(bad):
        raise InputError(
            f"column {name} is {numbers[bad[0]]} in row {bad[0]} ({len(bad)} such rows)", "Measure these prompts again"
        )
    return numbers
