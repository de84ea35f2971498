"""Does the dial keep its word? What each setting realises on text that the calibration never saw.

    python benchmarks/quality.py units-start units-100     # the routed model, if it is not there yet
    python benchmarks/dial.py              # writes docs/data/dial.json and prints the table

Thresholds are calibrated anew on all of the calibration split of Wikipedia and C4, then held on all of the held-out
split. Standard errors are those of groups of eight sequences of 512 tokens: documents differ, and so do their shares.
"""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import torch

from informed_routing.assets import load_texts, load_tokenizer, pack
from informed_routing.cli.progress import make_progress
from informed_routing.config.recipe import Recipe
from informed_routing.evaluation.environment import environment
from informed_routing.files.atomic import write_json
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.training.fit import fit

ROOT = Path(__file__).resolve().parent.parent
TARGETS = (0.10, 0.15, 0.25, 0.40)
TEXTS = ("demo:wiki", "demo:c4")
GROUP = 8
ALL_TOKENS = 10**9


@torch.no_grad()
def main() -> None:
    progress = make_progress(quiet=False)
    start, out = ROOT / "out/quality/units-100", ROOT / "out/quality/dial"
    recipe = Recipe.from_mapping(
        {
            "start": str(start),
            "stages": ["calibrate"],
            "data": TEXTS,
            "calibration": {"targets": TARGETS, "tokens": ALL_TOKENS},
        }
    )
    if not (out / "routing_config.json").exists():
        fit(recipe, out, resume=out.exists(), progress=progress)
    model = RoutedModelForCausalLM.from_pretrained(out)
    tokenizer = load_tokenizer(recipe.model)
    texts = {text: pack(load_texts(text, "heldout"), tokenizer, 512) for text in TEXTS}
    runs: list[dict[str, Any]] = []
    for target in TARGETS:
        model.set_sparsity(target, "units")
        groups: list[dict[str, Any]] = []
        for text, rows in texts.items():
            progress.stage(f"{text} {target}", len(rows))
            for begin in range(0, len(rows), GROUP):
                group = rows[begin : begin + GROUP]
                model.reset_routing_stats()
                for pair in group.split(2):
                    model.hidden_states(pair)
                stats = model.routing_stats()
                shares = {key: stats[key] for key in ("units", "attention", "ffn", "macs")}
                groups.append({"text": text, "sequences": len(group), **shares})
                progress.advance(begin + len(group))
        runs.append({"target": target, **{name: _mean(groups, name) for name in ("all", *TEXTS)}, "groups": groups})
    progress.done()
    calibrated = pack(load_texts(",".join(TEXTS), "calibration"), tokenizer, 512).numel()
    record = {
        "calibration_tokens": calibrated,
        "heldout_tokens": sum(rows.numel() for rows in texts.values()),
        "runs": runs,
        "environment": environment(),
        "threads": torch.get_num_threads(),
    }
    write_json(ROOT / "docs/data/dial.json", record)
    for run in runs:
        print(
            f"{run['target']:.0%}: "
            + ", ".join(
                f"{name} {100 * run[name]['units']:.2f} ± {100 * run[name]['standard_error']:.2f}"
                for name in ("all", *TEXTS)
            )
        )


def _mean(groups: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Shares over all sequences of a text (or of `all`), and the standard error of the units' share."""
    chosen = [group for group in groups if name in ("all", group["text"])]
    total = sum(group["sequences"] for group in chosen)
    shares = {
        key: math.fsum(group[key] * group["sequences"] for group in chosen) / total
        for key in ("units", "attention", "ffn", "macs")
    }
    error = statistics.stdev(group["units"] for group in chosen) / math.sqrt(len(chosen))
    return {**shares, "standard_error": error}


if __name__ == "__main__":
    main()
