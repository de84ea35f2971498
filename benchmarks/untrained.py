"""Fallbacks before any training: perplexity at equal MACs, each alone, and a ladder of two.

    python benchmarks/levers.py zero-start rank-64-start rank-start slim-start quarter-start static-start
    python benchmarks/untrained.py slim=out/levers/slim-start quarter=out/levers/quarter-start \
        --ladder slim,quarter --json docs/data/untrained.json
    python benchmarks/untrained.py --page docs/data/untrained.json > docs/untrained.md

Each NAME=FOLDER has forecasters and routers in closed form; thresholds are placed where the text itself saves each
share of MACs, which uses no label. A ladder has one router with two ordered thresholds: the easiest tokens get the
first model's slice of an FFN, the harder ones of those that are approximated the second's, and the rest execute. Its
shares say how many of the approximated tokens get the wider slice: 0 is the first model as it is, 1 its router with the
wider slices alone.
"""

from __future__ import annotations

import argparse
import json
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from shared import BASE, PROGRESS, TEXTS
from torch import Tensor, nn

from informed_routing.assets import load_texts, load_tokenizer, pack
from informed_routing.evaluation.environment import environment
from informed_routing.evaluation.perplexity import token_perplexity
from informed_routing.files.atomic import write_json
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.routing.decision import AlwaysExecute, Threshold
from informed_routing.routing.routed_unit import RoutedUnit
from informed_routing.routing.target import BudgetMeter

TARGETS, SHARES = (0.15, 0.25, 0.35, 0.5), (0.25, 0.5, 1.0)
CLOSE, ATTEMPTS = 0.002, 6
LENGTH = 512


@dataclass
class Ladder:
    """A routed model, whose FFNs may have a wider fallback for approximated tokens with margins above `step`."""

    model: RoutedModelForCausalLM
    wide: RoutedModelForCausalLM | None = None
    step: float = torch.inf
    margins: list[Tensor] = field(default_factory=list)
    """[units, tokens] of each forward since the last `measured`."""

    def __post_init__(self) -> None:
        costs, kinds = self.model.costs, [unit.kind for unit in self.model.units]
        self.meter = BudgetMeter(costs, kinds, "macs", (LENGTH + 1) / 2)
        whole = sum(cost.dense((LENGTH + 1) / 2) for cost in costs)
        other = costs if self.wide is None else self.wide.costs
        self.more = torch.tensor([b.forecaster - a.forecaster for a, b in zip(costs, other, strict=True)]) / whole
        self.ffn = torch.tensor([kind == "ffn" for kind in kinds])
        if self.wide is None:
            return
        for narrow, wide in zip(self.model.units, self.wide.units, strict=True):
            if narrow.kind == "ffn":
                narrow.forecast = types.MethodType(_forecast(self, wide), narrow)  # type: ignore[method-assign]

    def saved(self, margins: Tensor, threshold: float, step: float) -> float:
        """Share of MACs that margins [units, tokens] save by two thresholds."""
        approximated = (margins <= threshold).float().mean(1)
        wider = ((margins <= threshold) & (margins > step)).float().mean(1)
        return float(self.meter.saved(approximated) - (wider * self.more).sum())

    def step_at(self, margins: Tensor, threshold: float, share: float) -> float:
        """Where the wider fallback begins so that a share of the approximated FFN tokens gets it."""
        below = margins[self.ffn]
        below = below[below <= threshold]
        if share == 0 or not len(below):
            return torch.inf
        return -torch.inf if share == 1 else float(below.quantile(1 - share))

    def threshold_at(self, margins: Tensor, target: float, share: float) -> float:
        """The threshold that saves the target by these margins, by bisection."""
        finite = margins[margins.isfinite()]  # static layers have no margins
        low, high = float(finite.min()), float(finite.max())
        for _ in range(40):
            middle = (low + high) / 2
            enough = self.saved(margins, middle, self.step_at(margins, middle, share)) >= target
            low, high = (low, middle) if enough else (middle, high)
        return high

    @contextmanager
    def deciding(self, threshold: float, step: float) -> Iterator[None]:
        self.step = step
        self.margins.clear()
        state = self.model.routing_state
        with (
            state.using(execution="masked", native=None, record_margins=True),
            self.model.deciding(Threshold(threshold)),
        ):
            yield

    def measured(self, rows: Tensor, threshold: float, step: float) -> tuple[float, Tensor]:
        """Perplexity on rows [n, LENGTH], and the margins [units, tokens] that decided."""
        with self.deciding(threshold, step):
            hook = self.model.decoder.register_forward_hook(lambda *_: self._keep())
            found = token_perplexity(self.model, rows, 1).token_perplexity
            hook.remove()
        return found, torch.cat(self.margins, dim=1)

    def _keep(self) -> None:
        kept = self.model.routing_state.forward.margins
        self.margins.append(torch.stack([kept[index].flatten().float() for index in sorted(kept)]))


def _forecast(ladder: Ladder, wide: RoutedUnit) -> Any:
    """What an approximated token gets, by the margin that its unit has just decided with."""

    def forecast(self: RoutedUnit, layer: nn.Module, features: Tensor, x: Tensor) -> Tensor:
        narrow = RoutedUnit.forecast(self, layer, features, x)
        if ladder.step == torch.inf:
            return narrow
        above = ladder.model.routing_state.forward.margins[self.index] > ladder.step
        return torch.where(above.unsqueeze(-1), wide.forecast(layer, features, x), narrow)

    return forecast


def at(ladder: Ladder, rows: Tensor, target: float, share: float) -> dict[str, Any]:
    """Perplexity where `target` of the MACs of these rows is saved, a share of the approximations by wider slices."""
    _, margins = ladder.measured(rows[:2], 0.0, torch.inf)
    for _ in range(ATTEMPTS):
        threshold = ladder.threshold_at(margins, target, share)
        step = ladder.step_at(margins, threshold, share)
        perplexity, margins = ladder.measured(rows, threshold, step)
        saved = ladder.saved(margins, threshold, step)
        if abs(saved - target) <= CLOSE:
            break
    approximated = margins <= threshold
    return {
        "target": target,
        "share": share,
        "perplexity": perplexity,
        "macs": saved,
        "ffn": float(approximated[ladder.ffn].float().mean()),
        "wider": float((approximated & (margins > step))[ladder.ffn].float().mean()),
    }


def curve(name: str, ladder: Ladder, texts: dict[str, Tensor], dense: dict[str, float], share: float) -> list[Any]:
    """A row for each target and text that the model can reach."""
    rows: list[dict[str, Any]] = []
    for target in TARGETS:
        if not ladder.meter.attainable() > target:
            continue
        found = {text: at(ladder, some, target, share) for text, some in texts.items()}
        ratios = {text: one["perplexity"] / dense[text] for text, one in found.items()}
        shown = ", ".join(f"{ratio:.3f}" for ratio in ratios.values())
        PROGRESS.message(f"{name}, {target:.0%} of MACs: {shown}")
        rows += [{"name": name, "text": text, "ratio": ratios[text], **one} for text, one in found.items()]
    return rows


@torch.no_grad()
def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """All models alone, then the ladder."""
    folders = dict(given.split("=", 1) for given in arguments.models)

    def load(name: str) -> RoutedModelForCausalLM:
        return RoutedModelForCausalLM.from_pretrained(folders[name], dtype=torch.bfloat16).eval()

    tokenizer = load_tokenizer(BASE)
    texts = {text: pack(load_texts(text, "heldout"), tokenizer, LENGTH)[: arguments.rows] for text in TEXTS}
    dense: dict[str, float] = {}
    rows: list[dict[str, Any]] = []
    for name in folders:
        model = load(name)
        if not dense:
            with model.deciding(AlwaysExecute()):
                dense = {text: token_perplexity(model, some, 1).token_perplexity for text, some in texts.items()}
        rows += curve(name, Ladder(model), texts, dense, 0.0)
    if arguments.ladder:
        narrow, wide = arguments.ladder.split(",")
        ladder = Ladder(load(narrow), load(wide))
        for share in SHARES:
            rows += curve(f"ladder, {share:.0%} wider", ladder, texts, dense, share)
    settings = {"rows": arguments.rows, "ladder": arguments.ladder}
    return {"environment": environment(), "settings": settings, "dense": dense, "rows": rows}


def table(result: dict[str, Any]) -> str:
    """Ratios to dense by model and share of MACs."""
    lines = ["| wiki / C4 | " + " | ".join(f"{target:.0%}" for target in TARGETS) + " |"]
    lines.append("| --- " * (len(TARGETS) + 1) + "|")
    for name in dict.fromkeys(row["name"] for row in result["rows"]):
        cells = []
        for target in TARGETS:
            own = [row["ratio"] for row in result["rows"] if (row["name"], row["target"]) == (name, target)]
            cells.append(" / ".join(f"{ratio:.3f}" for ratio in own) or "-")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def page(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    machine, settings = result["environment"], result["settings"]
    return f"""# Fallbacks before any training

SmolLM2-135M, forecasters and routers in closed form, no gradient step: ratio of perplexity to dense on held-out
Wikipedia / C4 ({settings["rows"]} rows of {LENGTH} tokens each) at shares of MACs saved, by `benchmarks/untrained.py`
(commit {machine["commit"]}). How much of a unit's output each fallback explains is in [method.md](method.md); what
training makes of them in [levers.md](levers.md).

- `zero`: approximated tokens get nothing. `rank`, `rank-64`: the paper's low-rank forecaster, of rank 128 and 64.
- `slim`, `quarter`: an eighth and a quarter of each FFN's own neurons, and a forecaster of rank 64 for the rest.
- `static`: as `slim`, and three layers that no token executes.
- `ladder`: one router with two thresholds; the harder ones of the approximated tokens get the quarter, the others the
  eighth. The share is that of the quarter among approximated FFN tokens.

{table(result)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--ladder", metavar="NARROW,WIDE", help="two of the names")
    parser.add_argument("--rows", type=int, default=8, help="held-out rows of 512 tokens a text")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path, help="print the page of a result")
    arguments = parser.parse_args()
    if arguments.page:
        print(page(json.loads(arguments.page.read_text())), end="")
        return
    result = measured(arguments)
    PROGRESS.done()
    if arguments.json:
        write_json(arguments.json, result)
    print(table(result))


if __name__ == "__main__":
    main()
