"""Closed-form against gradient forecasters at equal rank: explained variance on unseen text, and seconds.

    python benchmarks/forecasters.py            # writes docs/data/forecasters.json and prints the table

One streaming pass gives the closed form of every rank for all units. The gradient fit (the paper's L1 + cosine loss at
its rate and steps, and plain squared error) is slow, so it is done for the units of three layers, all ranks side by
side on stored features of the same text; the comparison is over those units.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from informed_routing.assets import load_model, load_texts, pack
from informed_routing.cli.progress import make_progress
from informed_routing.config.parts import ForecasterConfig, RouterConfig
from informed_routing.evaluation.environment import environment
from informed_routing.files.atomic import write_json
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.routing.closed_form import ClosedForm, solve
from informed_routing.routing.decision import AlwaysExecute
from informed_routing.routing.fallbacks.forecaster import Forecaster
from informed_routing.routing.state import Observation
from informed_routing.training.forecast import gather_moments, observe
from informed_routing.training.objectives import forecast_loss

ROOT = Path(__file__).resolve().parent.parent
RANKS = (8, 16, 32, 64, 128)
LAYERS = (0, 14, 29)
LOSSES = ("l1+cosine", "mse")
BATCH = 512
"""Tokens a step of the gradient fit: 8 sequences of 64."""

Features = dict[int, tuple[Tensor, Tensor]]


def features(model: RoutedModelForCausalLM, rows: Tensor, units: list[int]) -> Features:
    """Inputs and outputs [tokens, d] of some units."""
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {index: [] for index in units}

    def keep(one: Observation) -> None:
        if one.index in seen:
            width = one.x.shape[-1]
            seen[one.index].append((one.x.reshape(-1, width).float(), one.output.reshape(-1, width).float()))

    observe(model, rows, keep, AlwaysExecute())
    return {
        index: (torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])) for index, parts in seen.items()
    }


def by_gradient(x: Tensor, y: Tensor, loss: str, steps: int) -> dict[int, Forecaster]:
    """One unit's forecasters of every rank from a random start (paper A.2: AdamW, 1e-3 constant)."""
    torch.manual_seed(0)
    found = {rank: Forecaster(x.shape[1], rank) for rank in RANKS}
    parameters = [p for forecaster in found.values() for p in forecaster.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95))
    for _ in range(steps):
        # Sequences of 64, as they come in the text.
        starts = torch.randint(0, len(x) // 64, (BATCH // 64, 1)) * 64
        chosen = (starts + torch.arange(64)).flatten()
        inputs, targets = x[chosen], y[chosen]
        total = torch.stack([forecast_loss(loss, forecaster(inputs), targets) for forecaster in found.values()]).sum()
        total.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return found


def closed_form(solution: ClosedForm, rank: int) -> Forecaster:
    forecaster = Forecaster(solution.inner.shape[0], rank)
    forecaster.take(solution)
    return forecaster


@torch.no_grad()
def judge(forecaster: Forecaster, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Explained variance and mean cosine on features."""
    predicted = forecaster(x)
    explained = 1 - (y - predicted).square().sum() / (y - y.mean(0)).square().sum()
    return float(explained), float(F.cosine_similarity(predicted, y, dim=-1).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=40_960)
    parser.add_argument("--steps", type=int, default=2000)
    arguments = parser.parse_args()
    progress = make_progress(quiet=False)
    base, tokenizer = load_model("demo:smollm2-135m")
    model = RoutedModelForCausalLM.attach(base, ForecasterConfig(weighting="none"), RouterConfig(kind="linear"))
    rows: Tensor = pack(load_texts("demo:wiki,demo:c4"), tokenizer, 512)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))][: arguments.tokens // 512]
    unseen = pack(load_texts("demo:wiki,demo:c4", "heldout"), tokenizer, 512)[:16]
    compared = [2 * layer + kind for layer in LAYERS for kind in (0, 1)]

    progress.stage("closed form", len(rows))
    started = time.perf_counter()
    moments = gather_moments(model, rows, progress=progress)
    passed = time.perf_counter()
    solutions = [solve(found, 3e-3) for found in moments]
    seconds: dict[str, float] = {"pass": passed - started, "solve": time.perf_counter() - passed}
    del moments

    judged = features(model, unseen, list(range(len(model.units))))
    scores: dict[tuple[str, int, int], tuple[float, float]] = {}
    for index, solution in enumerate(solutions):
        for rank in RANKS:
            scores["closed form", rank, index] = judge(closed_form(solution, rank), *judged[index])
    stored = features(model, rows, compared)
    for loss in LOSSES:
        progress.stage(f"gradient, {loss}", len(compared))
        started = time.perf_counter()
        for done, index in enumerate(compared, start=1):
            for rank, forecaster in by_gradient(*stored[index], loss, arguments.steps).items():
                scores[loss, rank, index] = judge(forecaster, *judged[index])
            progress.advance(done)
        seconds[loss] = time.perf_counter() - started
    progress.done()

    table: list[dict[str, Any]] = []
    for fit, units, where in [
        ("closed form", list(range(len(solutions))), "all layers"),
        *((fit, compared, "three layers") for fit in ("closed form", *LOSSES)),
    ]:
        for rank in RANKS:
            row: dict[str, Any] = {"fit": fit, "units": where, "rank": rank}
            for kind, name in enumerate(("attention", "ffn")):
                found = [scores[fit, rank, index] for index in units if index % 2 == kind]
                row[name] = sum(score[0] for score in found) / len(found)
                row[f"{name}_cosine"] = sum(score[1] for score in found) / len(found)
            table.append(row)
    write_json(
        ROOT / "docs/data/forecasters.json",
        {
            "seconds": seconds,
            "closed_form_tokens": rows.numel(),
            "gradient_steps": arguments.steps,
            "gradient_tokens": arguments.steps * BATCH,
            "gradient_layers": list(LAYERS),
            "judged_tokens": unseen.numel(),
            "rows": table,
            "environment": environment(),
            "threads": torch.get_num_threads(),
        },
    )
    print(
        f"closed form: pass over {rows.numel()} tokens {seconds['pass']:.1f} s, every rank of {len(solutions)} units "
        f"solved in {seconds['solve']:.1f} s; gradient, {len(compared)} units: "
        + ", ".join(f"{loss} {seconds[loss]:.0f} s" for loss in LOSSES)
    )
    for row in table:
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})


if __name__ == "__main__":
    main()
