"""What is said of a fit: of each trained stage, of all of it, and how long a stage took."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from .. import __version__
from ..evaluation.environment import environment
from ..evaluation.parts import text_records
from ..persistence.folder import locate
from .checkpoint import StageRecord
from .run import Run
from .throughput import flops_per_token, throughput


def seconds_of(report: Any) -> float:
    """Seconds of what `fit.json` keeps of a stage, or of several: its own, or where it has none those of its parts."""
    if not isinstance(report, Mapping):
        return 0.0
    own = report.get("seconds")
    return float(own) if own is not None else sum(seconds_of(part) for part in report.values())


def summary(
    run: Run, record: StageRecord, length: int, stage: Literal["forecast", "route", "lora"], **of_stage: Any
) -> dict[str, Any]:
    """What `fit.json` keeps of gradient steps on rows of `length` tokens; `of_stage` goes to `flops_per_token`."""
    head = run.model.get_output_embeddings().weight.numel()
    flops = flops_per_token(run.model.costs, head, (length + 1) / 2, stage, **of_stage)
    found = {
        "steps": record.step,
        "tokens": record.tokens,
        "seconds": round(record.seconds, 2),
        "history": record.history,
    }
    processes = run.accelerator.num_processes
    return {
        **found,
        **throughput(record.step, record.tokens, record.seconds, flops, run.model.device, run.dtype, processes),
    }


def routing_summary(run: Run, record: StageRecord, adapter_weights: int = 0) -> dict[str, Any]:
    """Of a stage that trained routers; a top-k skips while it trains, sampled decisions do not."""
    config = run.recipe.route
    return summary(
        run,
        record,
        config.sequence_length,
        "route",
        objective=config.objective,
        train_forecasters=config.train_forecasters,
        sparsity=config.sparsity if run.recipe.selection.decision == "top-k" else 0.0,
        adapter_weights=adapter_weights,
    )


def result_of(run: Run) -> dict[str, Any]:
    """The content of `fit.json`, once all stages are done."""
    recipe = run.recipe
    return {
        "recipe": recipe.model_dump(mode="json"),
        "stages": run.report,
        "texts": text_records(recipe.data, locate(recipe.start) if recipe.start else None),
        "informed_routing": __version__,
        "environment": environment(),
        "dtype": str(run.dtype).removeprefix("torch."),
        "device": str(run.model.device),
        "processes": run.accelerator.num_processes,
    }
