"""Explained variance of FFN fallbacks on unseen text: slices of an FFN's own neurons by ranks of the forecast beside.

    python benchmarks/fallbacks.py            # writes docs/data/fallbacks.json and prints the table

Closed forms only, no training: neurons are chosen, and what they leave is solved for, on 12,288 tokens of wiki and C4.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from informed_routing.assets import load_model, load_texts, pack
from informed_routing.cli.progress import make_progress
from informed_routing.config.parts import ForecasterConfig, RouterConfig
from informed_routing.evaluation.environment import environment
from informed_routing.files.atomic import write_json
from informed_routing.progress import Progress
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.routing.closed_form import ClosedForm, solve
from informed_routing.routing.decision import AlwaysExecute
from informed_routing.routing.state import Observation
from informed_routing.training.forecast import gather_moments, observe
from informed_routing.training.slices import choose_slices

ROOT = Path(__file__).resolve().parent.parent
MODEL = "demo:smollm2-135m"
TEXTS = "demo:wiki,demo:c4"
LAYERS = (1, 8, 15, 22, 28)
SLICES = (0.0, 0.125, 0.25, 0.5)
RANKS = (0, 64, 128)
LENGTH, FITTED, UNSEEN = 512, 24, 8
"""Rows of so many tokens, and how many of them."""


def text(tokenizer: Any, split: Any, rows: int) -> Tensor:
    """Rows of both texts, shuffled: int64 [rows, LENGTH]."""
    packed: Tensor = pack(load_texts(TEXTS, split), tokenizer, LENGTH)
    return packed[torch.randperm(len(packed), generator=torch.Generator().manual_seed(0))][:rows]


def sliced(share: float, rows: Tensor, progress: Progress) -> RoutedModelForCausalLM:
    """The embedded model whose FFNs compute a share of their neurons for approximated tokens, chosen on rows."""
    fallback = ForecasterConfig(
        fallback="slim" if share else "forecaster", slice=share or None, rank=max(RANKS), weighting="none"
    )
    base, _ = load_model(MODEL, dtype="float32")
    model = RoutedModelForCausalLM.attach(base, fallback, RouterConfig(kind="linear"))
    if share:
        choose_slices(model, rows, progress=progress)
    return model


def features(model: RoutedModelForCausalLM, rows: Tensor) -> dict[int, tuple[Tensor, Tensor, Tensor]]:
    """Inputs, outputs and what slices leave of these, [tokens, d], of the judged layers' FFNs."""
    seen: dict[int, list[tuple[Tensor, ...]]] = {layer: [] for layer in LAYERS}

    def keep(one: Observation) -> None:
        if one.index % 2 and one.index // 2 in seen:
            parts = (one.x, one.output, one.rest)
            seen[one.index // 2].append(tuple(part.flatten(0, 1).float() for part in parts))

    observe(model, rows, keep, AlwaysExecute())
    joined = {layer: [torch.cat(column) for column in zip(*parts, strict=True)] for layer, parts in seen.items()}
    return {layer: (x, output, rest) for layer, (x, output, rest) in joined.items()}


def explained(solution: ClosedForm, rank: int, x: Tensor, output: Tensor, rest: Tensor) -> float:
    """Share of the output's variance that slice and forecast of a rank explain; rank 0 is the mean of the rest."""
    directions = x @ solution.inner[:rank].T + solution.inner_bias[:rank]
    missed = rest - directions @ solution.outer[:, :rank].T - solution.outer_bias
    return float(1 - missed.square().sum() / (output - output.mean(0)).square().sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    progress = make_progress(quiet=False)
    _, tokenizer = load_model(MODEL, dtype="float32")
    rows, unseen = text(tokenizer, "train", FITTED), text(tokenizer, "heldout", UNSEEN)
    table: list[dict[str, Any]] = []
    for share in SLICES:
        progress.stage(f"slice {share:g}", len(rows))
        model = sliced(share, rows, progress)
        moments = gather_moments(model, rows, progress=progress)
        judged = features(model, unseen)
        for layer in LAYERS:
            solution, cost = solve(moments[2 * layer + 1], ridge=3e-3), model.costs[2 * layer + 1]
            for rank in RANKS:
                row = {"layer": layer, "slice": share, "rank": rank}
                row["explained"] = round(explained(solution, rank, *judged[layer]), 4)
                row["macs"] = round((cost.slice + 2 * rank * model.config.hidden_size) / cost.execute, 4)
                table.append(row)
    progress.done()
    write_json(
        ROOT / "docs/data/fallbacks.json",
        {
            "model": MODEL,
            "texts": TEXTS,
            "fitted_tokens": rows.numel(),
            "judged_tokens": unseen.numel(),
            "rows": table,
            "environment": environment(),
            "threads": torch.get_num_threads(),
        },
    )
    for layer in LAYERS:
        for rank in RANKS:
            line = [row for row in table if row["layer"] == layer and row["rank"] == rank]
            print(f"layer {layer:2} rank {rank:3}: " + "  ".join(f"{r['slice']:g}: {r['explained']:.3f}" for r in line))


if __name__ == "__main__":
    main()
