"""What the self-check costs on the embedded model: seconds when nothing is remembered (cold), and when it is (warm).

python benchmarks/self_check.py             # writes docs/data/self_check.json and prints the table
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from informed_routing.assets import DEMO_MODEL, load_model
from informed_routing.evaluation.environment import environment
from informed_routing.execution import remembered, self_check
from informed_routing.execution.formats import PACKED
from informed_routing.execution.native import NativeExecution
from informed_routing.files.atomic import write_json
from informed_routing.routed_model import RoutedModelForCausalLM

RESULT = Path(__file__).resolve().parent.parent / "docs" / "data" / "self_check.json"
REPEATS = 5


def seconds(base: Any, folder: Path) -> dict[str, float]:
    """Seconds of each check of a copy of the model, with what `folder` remembers."""
    remembered.cache_dir = lambda: folder  # type: ignore[assignment]
    found = {"attach": 0.0}
    begun, attached = self_check.Check.__init__, self_check.Check.routed

    def timed(method: Any) -> Any:
        def run(*arguments: Any) -> None:
            start = time.perf_counter()
            method(*arguments)
            found["attach"] += time.perf_counter() - start

        return run

    self_check.Check.__init__, self_check.Check.routed = timed(begun), timed(attached)  # type: ignore[method-assign]
    try:
        routed = RoutedModelForCausalLM.attach(copy.deepcopy(base))
    finally:
        self_check.Check.__init__, self_check.Check.routed = begun, attached  # type: ignore[method-assign]
    for weights in PACKED:
        native = NativeExecution(weights)
        native.of(routed)  # packing is not part of the check
        start = time.perf_counter()
        self_check.check_engine(routed, native)
        found[f"native {weights}"] = time.perf_counter() - start
    return found


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = []
    for dtype in ("float32", "bfloat16"):
        base, _ = load_model(DEMO_MODEL, dtype=dtype)
        seconds(base, Path(tempfile.mkdtemp()))  # what torch and transformers make once
        for state in ("cold", "warm"):
            runs = []
            for _ in range(REPEATS):
                with tempfile.TemporaryDirectory() as folder:
                    first = seconds(base, Path(folder))
                    runs.append(first if state == "cold" else seconds(base, Path(folder)))
            medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
            rows.append({"dtype": dtype, "state": state, "seconds": medians})
            print(
                f"{dtype:9} {state}: " + ", ".join(f"{name} {value:.3f}" for name, value in medians.items()), flush=True
            )
    write_json(RESULT, {"environment": environment(), "rows": rows})


if __name__ == "__main__":
    main()
