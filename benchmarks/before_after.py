"""Speed of two revisions of this project beside each other: one folder, the same `benchmark` command in turns.

python benchmarks/before_after.py --before REV             # prints the table
python benchmarks/before_after.py --before REV --json FILE

The folder is fitted by the earlier revision (the demo's recipe), so both load it. The later one is this checkout.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from informed_routing.evaluation.environment import environment
from informed_routing.files.atomic import write_json

ROOT = Path(__file__).resolve().parent.parent
BASE = "demo:smollm2-135m"
RUN = "import sys; from informed_routing.cli import main; sys.exit(main())"
Key = tuple[str, str, str]


def command(source: Path, *arguments: str) -> None:
    """Run one revision's command line with this environment's packages."""
    environ = os.environ | {"PYTHONPATH": str(source / "src")}
    subprocess.run([sys.executable, "-c", RUN, *arguments], check=True, env=environ, stdout=subprocess.DEVNULL)


def timings(source: Path, folder: Path, given: argparse.Namespace) -> dict[Key, float]:
    """Median seconds of each engine at each setting."""
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(scratch) / "result.json"
        weights = [part for one in given.weights for part in ("--weights", one)]
        lengths = ("--prompt-tokens", str(given.prompt_tokens), "--new-tokens", str(given.new_tokens))
        command(
            source,
            *("benchmark", str(folder), "--sparsity", str(given.sparsity), "--engine", "native", *weights, *lengths),
            *("--repeats", str(given.repeats), "-q", "--threads", str(given.threads), "--json", str(target)),
        )
        result = json.loads(target.read_text())["result"]
    return dict(rows(result))


def rows(result: dict[str, Any]) -> Iterable[tuple[Key, float]]:
    """(phase, weights, dense or the share asked for) and its median seconds."""
    for row in result["rows"]:
        target = row["sparsity"]["target"]
        yield (row["phase"], row["weights"], f"{target:.0%}" if target else "dense"), row["seconds"]["median"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", required=True, metavar="REV")
    parser.add_argument("--folder", type=Path, help="fitted already, by the earlier revision")
    parser.add_argument("--weights", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--sparsity", type=float, default=0.25)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=7, help="within a turn")
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--json", type=Path, metavar="FILE")
    given = parser.parse_args()
    git = ("git", "-C", str(ROOT))
    with tempfile.TemporaryDirectory() as scratch:
        before = Path(scratch) / "before"
        subprocess.run([*git, "worktree", "add", "--detach", "--quiet", str(before), given.before], check=True)
        try:
            folder = given.folder or Path(scratch) / "folder"
            if not given.folder:
                command(before, "fit", BASE, "--recipe", "demo", "--out", str(folder))
            sources = {"before": before, "after": ROOT}
            found: dict[str, list[dict[Key, float]]] = {name: [] for name in sources}
            for turn in range(given.turns):
                for name in sorted(sources, reverse=turn % 2 == 0):
                    found[name].append(timings(sources[name], folder, given))
                    print(f"turn {turn + 1} of {given.turns}: {name}", file=sys.stderr, flush=True)
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", str(before)], check=True)
    table = []
    for key in found["after"][0]:
        if key not in found["before"][0]:
            continue
        seconds = {name: [turn[key] for turn in turns] for name, turns in found.items()}
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        table.append({"case": list(key), "seconds": seconds, "median": medians})
        spread = {name: f"{min(values) * 1e3:.1f} to {max(values) * 1e3:.1f}" for name, values in seconds.items()}
        print(
            f"{' '.join(key):24} before {medians['before'] * 1e3:7.1f} ms ({spread['before']}), "
            f"after {medians['after'] * 1e3:7.1f} ms ({spread['after']}), x{medians['after'] / medians['before']:.3f}"
        )
    if given.json:
        settings = {name: value for name, value in vars(given).items() if name not in ("json", "folder")}
        write_json(given.json, {"environment": environment(), "settings": settings, "rows": table})


if __name__ == "__main__":
    main()
