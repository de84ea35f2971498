"""What each lever of training is worth at equal tokens, on the embedded default: one fit a lever, one JSON each.

    python benchmarks/levers.py --list
    python benchmarks/levers.py slim-start slim slim-distill    # runs, or goes on with, these
    python benchmarks/levers.py --table > docs/levers.md        # docs/data/levers/*.json side by side
    python benchmarks/levers.py slim-1000 --data demo:wiki --data demo:c4 --data demo:c4 --data out/mixture.jsonl

The last needs the text that mixture.py makes.

Each run is a fit of `recipes/small.yaml` for a budget of MACs with the overrides below, evaluated as in quality.py:
ratio of perplexity to the dense model on held-out Wikipedia and C4 text at equal shares of MACs. A finished run is
skipped.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import quality
import torch

from informed_routing.assets import load_texts, load_tokenizer, pack
from informed_routing.cli.progress import make_progress
from informed_routing.config.recipe import Recipe
from informed_routing.evaluation.environment import environment
from informed_routing.files.atomic import write_json
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.training.fit import fit

RESULTS = quality.ROOT / "docs" / "data" / "levers"
WORK = quality.ROOT / "out" / "levers"
TARGETS = (0.25, 0.35)
ADAPTS = {"lora", "joint"}
"""Stages after which the dense model is another one, too."""
INTRODUCTION = """# Levers of training

SmolLM2-135M, trained for 30 % of MACs saved, one seed: ratio of perplexity to the dense model without an adapter, on
held-out Wikipedia / C4, at equal shares of MACs (`benchmarks/levers.py`). Runs of a million tokens and those that go on
from them have books, code and manuals among their text, the others only Wikipedia and C4. `static` runs have three
layers that no token executes; `joint-1000` has them too, and an adapter that is learned with the routers. `latency`
goes on from `slim-1000` with routers that are trained for 25 % of the time saved in place of MACs. Seconds are of one
thread beside other work, those of `latency` and `static-1000` of two; those of `joint-1000` have pauses in them.
"""
BASE = {
    "route.budget": "macs",
    "route.sparsity": 0.3,
    "route.steps": 150,
    "calibration.targets": [0.15, 0.25, 0.35],
}
SLIM = {"forecaster.fallback": "slim", "forecaster.rank": 64}
FROM_SLIM = {"start": "out/levers/slim-start", "stages": ["route"]}
UNTRAINED = {"route.steps": 0, "calibration.targets": [0.25]}
"""For untrained.py, which places thresholds itself."""
RUNS: dict[str, dict[str, Any]] = {
    "zero-start": {"forecaster.fallback": "zero", **UNTRAINED},
    "rank-64-start": {"forecaster.rank": 64, **UNTRAINED},
    "rank-start": UNTRAINED,
    "quarter-start": {**SLIM, "forecaster.slice": 0.25, **UNTRAINED},
    "rank": {"start": "out/levers/rank-start", "stages": ["route"]},
    "slim-start": {**SLIM, "route.steps": 0},
    "slim": FROM_SLIM,
    "slim-distill": {**FROM_SLIM, "route.objective.kind": "distill"},
    "slim-mixed": {**FROM_SLIM, "route.objective.kind": "mixed"},
    "slim-fast": {**FROM_SLIM, "route.objective.kind": "distill", "route.forecaster_learning_rate": 3e-3},
    # A part of the budget is spent on layers that nobody executes.
    "static-start": {**SLIM, "route.steps": 0, "stages": ["static", "forecast", "route"], "static.layers": 3},
    "static": {"start": "out/levers/static-start", "stages": ["route"]},
    # How far more text goes; the dial of the longest ends higher.
    "slim-500": {**FROM_SLIM, "route.steps": 500},
    "slim-1000": {**FROM_SLIM, "route.steps": 1000, "calibration.targets": [0.15, 0.25, 0.35, 0.45, 0.5]},
    # On top of that: an adapter, and routers that choose by what is saved in time, not in MACs.
    "slim-1000-lora": {
        "start": "out/levers/slim-1000",
        "stages": ["lora"],
        "lora.steps": 150,
        "lora.batch_size": 2,
        "lora.sequence_length": 512,
        "calibration.targets": [place / 20 for place in range(1, 11)],
    },
    "static-1000": {
        "start": "out/levers/static-start",
        "stages": ["route"],
        "route.steps": 1000,
        "calibration.targets": [0.15, 0.25, 0.35, 0.45],
    },
    # Routers, forecasters and an adapter together, beside static layers.
    "joint-1000": {
        "start": "out/levers/static-start",
        "stages": ["joint"],
        "route.steps": 1000,
        "calibration.targets": [0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45],
    },
    # The same for another million tokens, in another order.
    "joint-2000": {
        "start": "out/levers/joint-1000",
        "stages": ["joint"],
        "seed": 1,
        "route.steps": 1000,
        "calibration.targets": [0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45],
    },
    "latency": {
        "start": "out/levers/slim-1000",
        "stages": ["route"],
        "route.budget": "latency",
        "route.sparsity": 0.25,
        "route.steps": 700,
        "calibration.targets": [0.1, 0.2, 0.3, 0.4, 0.5],
    },
}


def run(name: str, rows: int, data: list[str]) -> None:
    """Fit and evaluate one run, unless it has been."""
    target = RESULTS / f"{name}.json"
    if target.exists():
        print(f"{name}: done already")
        return
    overrides = {**BASE, **RUNS[name], **({"data": data} if data else {})}
    recipe = Recipe.from_yaml(quality.ROOT / "src/informed_routing/recipes/small.yaml").with_overrides(overrides)
    out, progress = WORK / name, make_progress(quiet=False)
    if (out / "routing_config.json").exists():
        report = json.loads((out / "fit.json").read_text())
    else:
        report = fit(recipe, out, resume=out.exists(), progress=progress)
    if not rows:
        return
    model = RoutedModelForCausalLM.from_pretrained(out)
    tokenizer = load_tokenizer(recipe.model)
    texts = {text: pack(load_texts(text, "heldout"), tokenizer, 512)[:rows] for text in quality.TEXTS}
    runs: list[dict[str, Any]] = []
    for goal in (0.0, *TARGETS):
        tasks = {text: quality.evaluate(model, held_out, goal, "macs") for text, held_out in texts.items()}
        progress.message(f"{name} {goal}: " + ", ".join(f"{t['token_perplexity']:.2f}" for t in tasks.values()))
        runs.append({"target": goal, "tasks": tasks})
    progress.done()
    _name_texts(report)
    record = {"name": name, "budget": "macs", "overrides": {**BASE, **RUNS[name]}, "fit": report, "runs": runs}
    write_json(target, {**record, "environment": environment(), "threads": torch.get_num_threads()})


def _name_texts(report: dict[str, Any]) -> None:
    """Files by their names, wherever they lie."""
    recipe = report["recipe"]
    recipe["data"] = [one if one.startswith("demo:") else Path(one).name for one in recipe["data"]]
    for text in report["texts"]["sources"]:
        text["ref"] = text["ref"] if text["ref"].startswith("demo:") else Path(text["ref"]).name


def table() -> None:
    """All runs in Markdown: tokens, seconds, and ratios to the dense model without an adapter."""
    records = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))]
    plain = next(record for record in records if not ADAPTS & set(record["fit"].get("stages", ())))
    dense = [task["token_perplexity"] for task in plain["runs"][0]["tasks"].values()]
    print(INTRODUCTION)
    print("| run | tokens trained | s | " + " | ".join(f"{t:.0%} of MACs, wiki / C4" for t in TARGETS) + " |")
    print("| --- " * (3 + len(TARGETS)) + "|")
    for record in records:
        cells = [
            " / ".join(
                f"{task['token_perplexity'] / whole:.3f}"
                for task, whole in zip(one["tasks"].values(), dense, strict=True)
            )
            for one in record["runs"][1:]
        ]
        stages = record["fit"].get("stages", {})
        trained: dict[str, Any] = next(
            (stages[name]["train"] for name in ("joint", "route") if "train" in stages.get(name, {})), {}
        )
        print(f"| {record['name']} | {trained.get('tokens', 0)} | {trained.get('seconds', 0)} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN")
    parser.add_argument("--rows", type=int, default=32, help="held-out sequences of 512 tokens per text; 0 only fits")
    parser.add_argument("--data", action="append", default=[], help="text in place of the recipe's; repeatable")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{name}: {overrides}" for name, overrides in RUNS.items()))
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    for name in arguments.runs:
        if name not in RUNS:
            parser.error(f"unknown run {name}; choose from {', '.join(RUNS)}")
        run(name, arguments.rows, arguments.data)
    if arguments.table:
        table()


if __name__ == "__main__":
    main()
