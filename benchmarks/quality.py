"""Quality of routed models on the embedded default: fit, calibrate, evaluate, one JSON a run.

    python benchmarks/quality.py --list
    python benchmarks/quality.py units-start units-100 skipgpt-100     # runs, or goes on with, these
    python benchmarks/results.py                                       # tables and picture of what was run

Every run is one fit of `recipes/small.yaml` with the overrides below: runs of equal steps see the same tokens. Held-out
Wikipedia and C4 text, sequences of 512 tokens, deterministic decisions at the target share of each text; the
share that the calibrated dial gives on it stands beside. A finished run is skipped.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from informed_routing.assets import load_texts, load_tokenizer, pack
from informed_routing.cli.progress import make_progress
from informed_routing.config.parts import Budget
from informed_routing.config.recipe import Recipe
from informed_routing.evaluation.environment import environment
from informed_routing.evaluation.perplexity import token_perplexity
from informed_routing.files.atomic import write_json
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.routing.decision import Threshold
from informed_routing.routing.dial import threshold_for
from informed_routing.training.calibrate import realise
from informed_routing.training.fit import fit

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "data" / "quality"
WORK = ROOT / "out" / "quality"
UNITS, MACS = (0.10, 0.15, 0.25, 0.40), (0.15, 0.25, 0.35)

MACS_TARGETS = {"route.budget": "macs", "calibration.targets": MACS}
# 0, 100 and 200 steps from one closed-form start: the curve. `units` has the recipe's 200.
START = {"start": "out/quality/units-start", "stages": ["route"]}
FEW = {"calibration.targets": [0.15, 0.25]}
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
    "units": START,
    "units-start": {"route.steps": 0, **FEW},
    "units-100": {**START, "route.steps": 100, **FEW},
    "units-frozen": {"route.train_forecasters": False},
    "units-cold": COLD,
    "skipgpt-100": {"forecaster.fallback": "zero", "route.steps": 100, **FEW},
    "skipgpt-cold": {"forecaster.fallback": "zero", **COLD},
    "macs-100": {**MACS_TARGETS, "route.steps": 100},
    "distill": {**START, "route.objective.kind": "distill"},
    # These begin with the routers of another run, which has to be there.
    "lora-25": {**LORA, "lora.sparsity": 0.25, "calibration.targets": [0.25]},
    "lora-40": {**LORA, "start": "out/quality/units-100", "lora.sparsity": 0.40, "calibration.targets": [0.4]},
    "lora-dense": {**LORA, "lora.sparsity": 0.0, "calibration.targets": [0.25]},
}

TEXTS = ("demo:wiki", "demo:c4")
CLOSE, ATTEMPTS = 0.003, 3
"""How near the target a compared share has to be, and how often it is tried."""

EVALUATED = {
    "lora-25": (0.25,),
    "lora-40": (0.40,),
    "lora-dense": (),
    **dict.fromkeys(("units-start", "units-100", "skipgpt-100"), (0.15, 0.25)),
}


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
    targets = EVALUATED.get(name, MACS if budget == "macs" else UNITS)
    tokenizer = load_tokenizer(recipe.model)
    texts = {text: pack(load_texts(text, "heldout"), tokenizer, 512)[:rows] for text in TEXTS}
    runs: list[dict[str, Any]] = []
    known = None if "lora" in recipe.stages else dense_of_another_run(rows * 511)
    if known:
        runs.append(known)
    for goal in targets if known else (0.0, *targets):
        tasks = {}
        for text, held_out in texts.items():
            tasks[text] = evaluate(model, held_out, goal, budget)
            progress.message(f"{name} {text} {goal}: {tasks[text]['token_perplexity']:.2f}")
        runs.append({"target": goal, "tasks": tasks})
    progress.done()
    record = {"name": name, "budget": budget, "overrides": RUNS[name], "fit": report, "runs": runs}
    write_json(target, {**record, "environment": environment(), "threads": torch.get_num_threads()})


def evaluate(model: RoutedModelForCausalLM, rows: Tensor, target: float, budget: Budget) -> dict[str, Any]:
    """Perplexity at `target` on these rows, and what the calibrated dial itself gives on them.

    Methods are compared at equal shares, so the threshold is moved from the dial's to the one that realises the target
    on this text; that uses no label. How far the dial was off is reported beside it.
    """
    found: dict[str, Any] = {}
    model.set_sparsity(target, budget)
    threshold = math.nan
    if target:
        dial = threshold_for(model.routing_config, target, budget)
        threshold, row = realise(model, rows, target, budget, dial)
        found["dial"] = {"units": row.units, "attention": row.attention, "ffn": row.ffn, "macs": row.macs}
    for _ in range(ATTEMPTS):
        if target:
            model.set_decision(Threshold(threshold))
        model.reset_routing_stats()
        perplexity = token_perplexity(model, rows, 2)
        sparsity = model.routing_stats()
        if not target or abs(sparsity[budget] - target) <= CLOSE:
            break
        threshold, _ = realise(model, rows, target, budget, threshold)
    sparsity.pop("per_unit")
    return {
        "token_perplexity": perplexity.token_perplexity,
        "tokens": perplexity.tokens,
        "sparsity": sparsity,
        **found,
    }


def dense_of_another_run(tokens: int) -> dict[str, Any] | None:
    """The dense entry of a run on the same held-out tokens: no run but those with LoRA changes the base model."""
    for path in sorted(RESULTS.glob("*.json")):
        record = json.loads(path.read_text())
        dense: dict[str, Any] = record["runs"][0]
        if "lora" not in record["name"] and all(task["tokens"] == tokens for task in dense["tasks"].values()):
            return dense
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN")
    parser.add_argument("--rows", type=int, default=32, help="held-out sequences of 512 tokens per text")
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(f"{name}: {overrides}" for name, overrides in RUNS.items()))
    for name in arguments.runs:
        if name not in RUNS:
            parser.error(f"unknown run {name}; choose from {', '.join(RUNS)}")
        run(name, arguments.rows)


if __name__ == "__main__":
    main()
