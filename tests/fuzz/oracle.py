"""What may never happen, and what has to: the faults of one run, as sentences."""

from __future__ import annotations

import hashlib
import json
import math
import re
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .case import Case, Right
from .process import Outcome

_TIMED = re.compile(
    r"seconds|_per_second|speedup|limit_speedup|fraction_of_limit|mfu|flops|environment|files|memory|bytes_per|latency|slower|^key$|^engine$|^table$|^data$|^model$"
)
ROUNDING = 1e-6
"""Where weights lie in memory, such as by how many files they came from, decides how some sums are blocked."""
_INTERNAL = re.compile(r"error: \w*(Error|Exception|Interrupt|Warning)\b.*--debug")


@dataclass(frozen=True)
class Picture:
    """The files of a folder by relative path, each as a hash (links by where they point)."""

    files: dict[str, str]

    @classmethod
    def of(cls, folder: Path) -> Picture:
        return cls(dict(_hashes(folder, folder)))

    def changed(self, later: Picture) -> list[str]:
        """Paths that are new, gone or different."""
        every = self.files.keys() | later.files.keys()
        return sorted(path for path in every if self.files.get(path) != later.files.get(path))


def _hashes(folder: Path, root: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.iterdir()):
        name = str(path.relative_to(root))
        if path.is_symlink():
            yield name, f"link to {path.readlink()}"
        elif path.is_dir():
            yield name + "/", "folder"
            yield from _hashes(path, root)
        elif path.is_file():
            yield name, _digest(path)
        else:
            yield name, f"special {path.lstat().st_rdev}"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@dataclass
class Result:
    """What a run computed, without what the clock decides: comparable between runs."""

    content: Any = None
    nulls: set[str] = field(default_factory=set)
    tensors: dict[str, str] = field(default_factory=dict)  # hashes
    tables: dict[str, Any] = field(default_factory=dict)  # columns

    @classmethod
    def read(cls, folder: Path, outputs: tuple[str, ...], renamed: tuple[str, str] | None = None) -> Result:
        """From `out.json` and the tensors in the outputs."""
        found = cls()
        target = folder / "out.json"
        if target.is_file():
            text = target.read_text(encoding="utf-8")
            content = json.loads(text.replace(*renamed) if renamed else text)["result"]
            found.content, found.nulls = _without_time(content), set(_nulls(content))
        for output in outputs:
            top = folder / output
            for path in [top, *sorted(top.rglob("*"))] if top.exists() else []:
                if path.suffix == ".safetensors" and path.is_file() and "checkpoints" not in path.parts:
                    found.tensors |= {f"{path.name}/{key}": digest for key, digest in _tensors(path)}
                elif path.suffix == ".parquet":
                    found.tables[path.name] = dict(_columns(path))
        return found


def check(
    case: Case, right: Right, outcome: Outcome, before: Picture, after: Picture, wanted: Result | None
) -> list[str]:
    """Every fault of a run. `wanted` is the result that exit code 0 must give, None where it is not known."""
    faults = list(_ending(case, right, outcome))
    if outcome.hung or outcome.code < 0:
        return faults
    faults += _files(case, outcome, before, after)
    faults += (fault for look in case.checks for fault in look())
    if outcome.code == 0 and not any("half-written" in fault for fault in faults):
        faults += _values(case, outcome, wanted)
    return faults


def _ending(case: Case, right: Right, outcome: Outcome) -> Iterator[str]:
    if outcome.hung:
        yield "hang"
        return
    if outcome.code < 0:
        yield f"killed by {signal.Signals(-outcome.code).name}"
        return
    debug = "--debug" in case.arguments
    if "Traceback (most recent call last)" in outcome.err + outcome.out and not debug:
        yield "traceback"
    if outcome.code not in (0, 1, 2):
        yield f"exit code {outcome.code}"
    lines = outcome.err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    if outcome.code == 0 and errors:
        yield "an error line, and exit code 0"
    if outcome.code in (1, 2) and not case.silent:
        if len(errors) != 1 or not lines[-1].startswith("error: "):
            yield f"stderr does not end in one error line ({len(errors)})"
        elif len(errors[0]) < 12 or len(errors[0]) > 2000:
            yield f"an error of {len(errors[0])} characters"
        elif "-q" in case.arguments and len(lines) > 1 and not debug:
            yield f"-q, and {len(lines)} lines on stderr"
        if errors and _INTERNAL.match(errors[-1]):
            yield "an internal error"
        elif errors and outcome.code == 2 and right.named and not any(word in errors[-1] for word in right.named):
            yield f"the error names none of {', '.join(right.named)}"
    if outcome.code not in right.codes and outcome.code in (0, 1, 2):
        yield f"exit code {outcome.code}, right is {' or '.join(map(str, right.codes))}"


def _files(case: Case, outcome: Outcome, before: Picture, after: Picture) -> Iterator[str]:
    outputs = case.outputs
    for path in before.changed(after):
        if path.rstrip("/") in case.allowed or any(path.startswith(f"{name}/") for name in case.allowed):
            continue
        own = any(path == name or path.startswith(f"{name}/") for name in outputs)
        # Ctrl-C may stop the cleaning, too; the next run removes what is left then.
        own = own or (outcome.code == 1 and any(path.startswith(f".{name}.tmp-") for name in outputs))
        if not own:
            yield f"{path} was {'written' if path not in before.files else 'changed'}, it is no output"
        elif outcome.code == 2:
            what = "changed" if path in before.files and path in after.files else "removed"
            yield f"{path} was {what if path in before.files else 'left'} by a refused command"
    yield from damage(case.folder, outputs, finished=outcome.code == 0, known=before)
    left = [path.name for path in (case.world.root / "tmp").iterdir() if path.name != "pymp"]
    if left:
        yield f"{left[0]} was left in TMPDIR"
    if outcome.code == 0 and "--json" in case.arguments:
        target = case.arguments[case.option("--json")]
        if target != "-" and not (case.folder / target).exists():
            yield "exit code 0, and no JSON"


def damage(
    folder: Path,
    outputs: tuple[str, ...],
    finished: bool,
    known: Picture = Picture({}),
) -> Iterator[str]:
    """What is half-written among the outputs, and what a finished run left lying about; not what was `known` before."""
    for output in outputs:
        top = folder / output
        for path in [top, *sorted(top.rglob("*"))] if top.is_dir() else [top]:
            name = str(path.relative_to(folder))
            visible = path.is_file() and not _hidden(path, folder)
            if visible and (reason := unreadable(path)) and _digest(path) != known.files.get(name):
                yield f"half-written: {name} ({reason})"
            if finished and path.exists() and _hidden(path, folder):
                yield f"litter after success: {name}"


def _hidden(path: Path, folder: Path) -> bool:
    names = path.relative_to(folder).parts
    return any(name.startswith(".") and not name.endswith(".lock") for name in names) or path.suffix in (
        ".tmp",
        ".part",
    )


def unreadable(path: Path) -> str | None:
    """Why a file of a known kind cannot be read whole; None when it can."""
    try:
        if path.suffix == ".json":
            json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_constant)
        elif path.suffix == ".safetensors":
            for _ in _tensors(path):
                pass
        elif path.suffix == ".parquet":
            for _ in _columns(path):
                pass
        elif path.suffix == ".svg" and not path.read_text(encoding="utf-8").rstrip().endswith("</svg>"):
            return "no end"
    except Exception as error:  # whatever makes it unreadable
        return f"{type(error).__name__}: {error}"[:120]
    return None


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _tensors(path: Path) -> Iterator[tuple[str, str]]:
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            yield name, hashlib.sha256(_bytes(file.get_tensor(name))).hexdigest()


def _columns(path: Path) -> Iterator[tuple[str, list[Any]]]:
    """The columns of a table, without what the clock decides."""
    import pyarrow.parquet

    table = pyarrow.parquet.ParquetFile(path).read(use_threads=False)
    for name in table.column_names:
        if "seconds" not in name:
            yield name, table.column(name).to_pylist()


def _bytes(tensor: Any) -> bytes:
    import torch

    return bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())


def _values(case: Case, outcome: Outcome, wanted: Result | None) -> Iterator[str]:
    """Numbers are numbers, and the result is the one that it has to be."""
    if "--json" in case.arguments and case.arguments[case.option("--json")] == "-":
        try:
            json.loads(outcome.out)
        except ValueError:
            if outcome.out:  # nothing, where stdout is somewhere else
                yield "--json - printed something else than JSON"
    if not (case.folder / "out.json").is_file():
        return
    found = Result.read(case.folder, case.command.outputs, case.renamed)
    yield from (f"not finite: {path}" for path in _not_finite(found.content))
    if wanted is None:
        return
    if new := sorted(found.nulls - wanted.nulls):
        yield f"null where a number was asked for: {new[0]}"
    if not case.command.timed and (other := difference(wanted.content, found.content)):
        yield f"another result: {other}"
    if other := difference(wanted.tables, found.tables, "table"):
        yield f"another table: {other}"
    if found.tensors != wanted.tensors:
        yield "other weights"


def difference(wanted: Any, found: Any, where: str = "result") -> str | None:
    """The first place where two results differ by more than the rounding of sums; None where they are the same."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        keys = sorted(wanted.keys() | found.keys())
        return _first(difference(wanted.get(key), found.get(key), f"{where}.{key}") for key in keys)
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        pairs = enumerate(zip(wanted, found, strict=True))
        return _first(difference(one, other, f"{where}[{number}]") for number, (one, other) in pairs)
    if isinstance(wanted, float) and isinstance(found, float) and math.isclose(wanted, found, rel_tol=ROUNDING):
        return None
    return None if wanted == found else f"{where} is {str(found)[:60]}, not {str(wanted)[:60]}"


def _first(found: Iterator[str | None]) -> str | None:
    return next((one for one in found if one is not None), None)


def _without_time(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            key: _without_time(item)
            for key, item in value.items()
            if not _TIMED.search(key) and not _TIMED.search(str(item) if isinstance(item, str) else "")
        }
    if isinstance(value, list):
        kept = [item for item in value if not (isinstance(item, dict) and "seconds" in str(item.get("metric", "")))]
        return [_without_time(item) for item in kept]
    return value


def _nulls(value: Any, where: str = "") -> Iterator[str]:
    if value is None and not where.startswith(".environment"):
        yield where
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _nulls(item, f"{where}.{key if isinstance(value, dict) else '*'}")


def _not_finite(value: Any, where: str = "result") -> Iterator[str]:
    if isinstance(value, float) and not math.isfinite(value):
        yield where
    for key, item in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from _not_finite(item, f"{where}.{key}")
