"""Quality of routed models on the embedded default: fit, calibrate, evaluate, one JSON a run.

    python benchmarks/quality.py --list
    python benchmarks/quality.py units skipgpt macs          # runs, or goes on with, these
    python benchmarks/quality.py --table                     # docs/data/quality/*.json -> docs/results.md

Every run is one fit of `recipes/small.yaml` with the overrides below, so all methods see the same text, steps and
tokens. Held-out Wikipedia and C4 text, sequences of 512 tokens, deterministic decisions at thresholds that were
calibrated on another split of the same text. A finished run is skipped.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from informed_routing.assets import load_texts, load_tokenizer, pack
from informed_routing.cli.progress import make_progress
from informed_routing.config import CalibrationConfig, Recipe
from informed_routing.evaluation.environment import environment
from informed_routing.evaluation.perplexity import token_perplexity
from informed_routing.files import write_json
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.training.calibrate import calibrate
from informed_routing.training.fit import fit

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "data" / "quality"
WORK = ROOT / "out" / "quality"
UNITS, MACS = (0.10, 0.15, 0.25, 0.40), (0.15, 0.25, 0.35)

MACS_TARGETS = {"route.budget": "macs", "calibration.targets": [0.1, 0.15, 0.25, 0.35, 0.4]}
# 0, 50 and 150 steps from one closed-form start: the curve.
START = {"start": "out/quality/units-start", "stages": ["route"]}
LORA = {"start": "out/quality/units", "stages": ["lora"]}
# Stage 2 as the paper has it: MLP routers from a random start, frozen forecasters, full noise.
COLD = {
    "router.warm_start": False,
    "router.kind": "mlp",
    "forecaster.refit": False,
    "route.train_forecasters": False,
    "route.learning_rate": 2e-3,
    "route.batch_size": 4,
    "route.sequence_length": 256,
    "route.tau_start": 5.0,
    "route.noise_end": 1.0,
}
RUNS: dict[str, dict[str, Any]] = {
    "units": {},
    "units-start": {"route.steps": 0},
    "units-50": {**START, "route.steps": 50},
    "units-frozen": {"route.train_forecasters": False},
    "units-cold": COLD,
    "skipgpt": {"forecaster.fallback": "zero"},
    "skipgpt-cold": {"forecaster.fallback": "zero", **COLD},
    "macs": MACS_TARGETS,
    "distill": {**START, "route.objective.kind": "distill"},
    # All three begin with the routers of `units`, which has to be there.
    "lora-25": {**LORA, "lora.sparsity": 0.25},
    "lora-40": {**LORA, "lora.sparsity": 0.40},
    "lora-dense": {**LORA, "lora.sparsity": 0.0},
}

TEXTS = ("demo:wiki", "demo:c4")
CALIBRATION_TOKENS = 24_576
EVALUATED = {"lora-25": [0.0, 0.25, 0.40], "lora-40": [0.0, 0.25, 0.40], "lora-dense": [0.0]}


def run(name: str, rows: int) -> None:
    target = RESULTS / f"{name}.json"
    if target.exists():
        print(f"{name}: done already")
        return
    recipe = Recipe.from_yaml(ROOT / "src/informed_routing/recipes/small.yaml").with_overrides(RUNS[name])
    out = WORK / name
    progress = make_progress(quiet=False)
    if (out / "routing_config.json").exists():
        report = json.loads((out / "fit.json").read_text())
    else:
        report = fit(recipe, out, resume=out.exists(), progress=progress)
    model = RoutedModelForCausalLM.from_pretrained(out)
    budget = recipe.route.budget
    targets: list[float] = EVALUATED.get(name, [0.0, *(MACS if budget == "macs" else UNITS)])
    runs: list[dict[str, Any]] = [{"target": target, "tasks": {}} for target in targets]
    tokenizer = load_tokenizer(recipe.model)
    for text in TEXTS:
        # One threshold for a mixture gives each text a sparsity of its own: thresholds come from the text's own split.
        own = pack(load_texts(text, "calibration"), tokenizer, 512)[: CALIBRATION_TOKENS // 512]
        settings = CalibrationConfig(targets=tuple(t for t in targets if t))
        if settings.targets:
            table = calibrate(model, own, settings, budget, progress)
            model.with_thresholds(table, budget, recipe.route.sparsity, 512)
        held_out = pack(load_texts(text, "heldout"), tokenizer, 512)[:rows]
        for entry in runs:
            model.set_sparsity(entry["target"], budget)
            model.reset_routing_stats()
            found = token_perplexity(model, held_out, 2)
            stats = model.routing_stats()
            stats.pop("per_unit")
            entry["tasks"][text] = {
                "token_perplexity": found.token_perplexity,
                "tokens": found.tokens,
                "sparsity": stats,
            }
            progress.message(f"{name} {text} {entry['target']}: {found.token_perplexity:.2f}")
    progress.done()
    record = {"name": name, "budget": budget, "overrides": RUNS[name], "fit": report, "runs": runs}
    write_json(target, {**record, "environment": environment(), "threads": torch.get_num_threads()})


def table() -> None:
    lines = [
        "# Quality on the embedded default",
        "",
        "Written by `python benchmarks/quality.py --table` from `docs/data/quality/*.json`. Perplexity per token on "
        "held-out text the fit never saw, its ratio to the dense model in brackets; realised shares approximated.",
        "",
        "| run | steps | target | Wikipedia | C4 | units | attention | ffn | MACs saved |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for path in sorted(RESULTS.glob("*.json")):
        record = json.loads(path.read_text())
        dense = record["runs"][0]["tasks"]
        steps = record["fit"]["recipe"]["route"]["steps"]
        for entry in record["runs"]:
            cells = [
                f"{t['token_perplexity']:.2f} ({t['token_perplexity'] / dense[n]['token_perplexity']:.3f})"
                for n, t in entry["tasks"].items()
            ]
            stats = [t["sparsity"] for t in entry["tasks"].values()]
            shares = [
                f"{100 * math.fsum(s[key] for s in stats) / len(stats):.1f} %"
                for key in ("units", "attention", "ffn", "macs")
            ]
            goal = f"{100 * entry['target']:.0f} % {record['budget']}" if entry["target"] else "dense"
            lines.append("| " + " | ".join([record["name"], str(steps), goal, *cells, *shares]) + " |")
    (ROOT / "docs" / "results.md").write_text("\n".join(lines) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN")
    parser.add_argument("--rows", type=int, default=32, help="held-out sequences of 512 tokens per text")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{name}: {overrides}" for name, overrides in RUNS.items()))
    for name in arguments.runs:
        if name not in RUNS:
            parser.error(f"unknown run {name}; choose from {', '.join(RUNS)}")
        run(name, arguments.rows)
    if arguments.table:
        table()


if __name__ == "__main__":
    main()
