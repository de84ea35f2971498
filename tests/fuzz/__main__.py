"""`python -m tests.fuzz --runs 2000 --seed 1 --json FILE`: seeded mutations, and a table of how they ended."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from . import process
from .suite import Run, Suite, clean, figures

QUICK = ("evaluate-dense", "evaluate-routed", "generate-dense", "study-list")


def main() -> int:
    """Run the suite. Exit code 1 if any run was faulty."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--from", type=int, default=0, dest="first", metavar="N", help="number of the first mutation")
    parser.add_argument("--only", default="", metavar="WORD", help="mutations whose name or command has this in it")
    parser.add_argument("--quick", action="store_true", help="only commands that train nothing, on a few inputs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures, with all failures")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="work in DIR and leave the last run there")
    given = parser.parse_args()
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    root = given.keep or Path(tempfile.mkdtemp(prefix="fuzz-"))
    process.warm_up()
    begun = time.monotonic()
    suite = Suite(root.absolute(), given.seed)
    runs: list[Run] = []
    try:
        for number in itertools.count(given.first):
            if len(runs) == given.runs:
                break
            name = suite.name(number)
            if given.only not in name or (given.quick and (name.split()[1] not in QUICK or name.startswith("cache"))):
                continue
            run = suite.run(number)
            runs.append(run)
            if run.faults:
                print(_failure(run), flush=True)
            if given.json and len(runs) % 50 == 0:
                _write(given.json, figures(runs, time.monotonic() - begun, given.seed))
    finally:
        found = figures(runs, time.monotonic() - begun, given.seed)
        if given.json:
            _write(given.json, found)
        print(table(found))
        if not given.keep:
            clean(root)
    sys.stdout.flush()
    return 1 if found["faulty"] else 0


def _failure(run: Run) -> str:
    return (
        f"{run.number} {run.mutation} on {run.command} ({run.note}): {'; '.join(run.faults)}\n"
        f"    exit {run.code} after {run.seconds} s: {run.error[:200]}"
    )


def table(found: dict[str, Any]) -> str:
    """The figures, a line for each kind of mutation."""
    columns = ["runs", "exit 0", "exit 1", "exit 2", "other", "faulty"]
    total: Counter[str] = Counter()
    for counts in found["kinds"].values():
        total.update(counts)
    lines = [f"{'mutations of':16}" + "".join(f"{name:>9}" for name in columns)]
    for kind, counts in [*found["kinds"].items(), ("all", total)]:
        lines.append(f"{kind:16}" + "".join(f"{counts.get(name, 0):9}" for name in columns))
    marks = ", ".join(f"{name} {found[name]}" for name in ("tracebacks", "hangs", "killed", "half files"))
    return "\n".join([*lines, f"{marks}; {found['seconds']:.0f} s"])


def _write(path: Path, found: dict[str, Any]) -> None:
    path.write_text(
        json.dumps(found, indent=1, ensure_ascii=False, default=str).encode("utf-8", "replace").decode() + "\n"
    )


if __name__ == "__main__":
    code = main()
    import os

    os._exit(code)  # imported libraries have much to say at the end of an interpreter that forked
