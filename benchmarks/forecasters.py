"""Closed-form against gradient forecasters at equal rank: explained variance on unseen text, and seconds.

    python benchmarks/forecasters.py            # writes docs/data/forecasters.json and prints the table

One streaming pass gives the closed form of every rank. The gradient fit (the paper's L1 + cosine loss, and plain
squared error) trains all ranks side by side on the same features, from a random start, batch 8.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from informed_routing.assets import load_model, load_texts, pack
from informed_routing.config import ForecasterConfig, RouterConfig
from informed_routing.evaluation.environment import environment
from informed_routing.files import write_json
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.routing.decision import AlwaysExecute
from informed_routing.routing.forecaster import Forecaster, solve
from informed_routing.routing.routed_unit import Observation
from informed_routing.training.forecast import gather_moments, observe
from informed_routing.training.objectives import forecast_loss

ROOT = Path(__file__).resolve().parent.parent
RANKS = (8, 16, 32, 64, 128)


class Judge:
    """Explained variance and cosine of several forecasters a unit."""

    def __init__(self, forecasters: dict[Any, list[Forecaster]], units: int, width: int) -> None:
        self.forecasters = forecasters
        self.error = {key: torch.zeros(units, dtype=torch.float64) for key in forecasters}
        self.cosine = {key: torch.zeros(units, dtype=torch.float64) for key in forecasters}
        self.squares, self.count = torch.zeros(units, dtype=torch.float64), torch.zeros(units)
        self.sums = torch.zeros(units, width, dtype=torch.float64)

    def __call__(self, seen: Observation) -> None:
        width = seen.x.shape[-1]
        x, y = seen.x.reshape(-1, width), seen.output.reshape(-1, width).float()
        self.squares[seen.index] += y.square().sum()
        self.sums[seen.index] += y.sum(0)
        self.count[seen.index] += len(y)
        for key, units in self.forecasters.items():
            predicted = units[seen.index](x)
            self.error[key][seen.index] += (y - predicted).square().sum()
            self.cosine[key][seen.index] += F.cosine_similarity(predicted, y, dim=-1).sum()

    def result(self, key: Any) -> dict[str, float]:
        total = self.squares - self.sums.square().sum(1) / self.count
        explained, cosine = 1 - self.error[key] / total, self.cosine[key] / self.count
        return {
            "attention": float(explained[0::2].mean()),
            "ffn": float(explained[1::2].mean()),
            "attention_cosine": float(cosine[0::2].mean()),
            "ffn_cosine": float(cosine[1::2].mean()),
        }


def by_gradient(
    model: RoutedModelForCausalLM, rows: torch.Tensor, loss: str, steps: int
) -> tuple[dict[Any, list[Forecaster]], float]:
    width = model.routing_config.hidden_size
    torch.manual_seed(0)
    found = {(loss, rank): [Forecaster(width, rank) for _ in model.units] for rank in RANKS}
    parameters = [p for units in found.values() for unit in units for p in unit.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95))
    started = time.perf_counter()

    def train(seen: Observation) -> None:
        with torch.enable_grad():
            total = sum(forecast_loss(loss, units[seen.index](seen.x), seen.output) for units in found.values())
            assert isinstance(total, torch.Tensor)
            total.backward()

    for step in range(steps):
        observe(model, rows[[(8 * step + i) % len(rows) for i in range(8)]], train, AlwaysExecute(), batch_size=8)
        optimizer.step()
        optimizer.zero_grad()
    return found, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=49_152)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=64, help="tokens a sequence of the gradient fit")
    arguments = parser.parse_args()
    base, tokenizer = load_model("demo:smollm2-135m")
    model = RoutedModelForCausalLM.attach(base, ForecasterConfig(weighting="none"), RouterConfig(kind="low-rank"))
    texts = load_texts("demo:wiki,demo:c4")
    rows = pack(texts, tokenizer, 256)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    unseen = pack(load_texts("demo:wiki,demo:c4", "heldout"), tokenizer, 256)[:32]
    width, units = model.routing_config.hidden_size, len(model.units)

    started = time.perf_counter()
    moments = gather_moments(model, rows[: arguments.tokens // 256])
    passed = time.perf_counter()
    solutions = [solve(found, 3e-3) for found in moments]
    solved = time.perf_counter()
    forecasters: dict[Any, list[Forecaster]] = {}
    for rank in RANKS:
        fitted = [Forecaster(width, rank) for _ in solutions]
        for forecaster, solution in zip(fitted, solutions, strict=True):
            solution.write_to(forecaster)
        forecasters["closed form", rank] = fitted
    seconds: dict[str, float] = {"pass": passed - started, "solve": solved - passed}
    short = rows.reshape(-1, arguments.length)
    for loss in ("l1+cosine", "mse"):
        trained, seconds[loss] = by_gradient(model, short, loss, arguments.steps)
        forecasters |= trained
    judge = Judge(forecasters, units, width)
    with torch.no_grad():
        observe(model, unseen, judge, AlwaysExecute())
    result = [{"fit": fit, "rank": rank, **judge.result((fit, rank))} for fit, rank in forecasters]
    write_json(
        ROOT / "docs/data/forecasters.json",
        {
            "seconds": seconds,
            "closed_form_tokens": arguments.tokens,
            "gradient_tokens": arguments.steps * 8 * arguments.length,
            "judged_tokens": unseen.numel(),
            "rows": result,
            "environment": environment(),
        },
    )
    print(f"closed form: pass {seconds['pass']:.1f} s, all ranks of {units} units solved in {seconds['solve']:.1f} s")
    for row in result:
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})


if __name__ == "__main__":
    main()
