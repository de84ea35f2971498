"""Run one cell: make its model, judge it, count what it costs."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from ..errors import InformedRoutingError
from ..evaluation.environment import environment
from ..evaluation.perplexity import merge_stats, token_perplexity
from ..evaluation.precision import factors_in
from ..finite import json_values
from ..progress import Progress
from .accounting import accounting
from .build import ensure, load, text_rows
from .decide import decide, engage_native, engine_name
from .features import feature_similarity
from .plan import Cell
from .store import Record, Store, stage_seconds

SHARES = ("units", "attention", "ffn", "macs", "kv")


def run_cell(cell: Cell, store: Store, *, device: str, progress: Progress) -> Record:
    """The record of a cell: made now, from stages that are there already as far as they are."""
    begun = time.perf_counter()
    reports = [ensure(stage, store, device=device, progress=progress) for stage in cell.stages]
    made = time.perf_counter()
    record = judge(cell, store, device=device, progress=progress)
    seconds = sum(stage_seconds(report) for report in reports)
    whole = {
        "format": 1,
        "key": cell.key,
        "cell": cell.labels(),
        **record,
        "training": {
            "tokens": cell.tokens,
            "seconds": round(seconds, 2),
            "stages": [
                {k: report.get(k) for k in ("stage", "key", "tokens", "seconds", "threads")} for report in reports
            ],
        },
        "wall_seconds": {"training": round(made - begun, 2), "evaluation": round(time.perf_counter() - made, 2)},
        "threads": torch.get_num_threads(),
        "environment": environment(),
    }
    checked: Record = json_values(whole, "the record")  # a cell whose numbers are none has failed
    return checked


def attempt(cell: Cell, store: Store, *, device: str, progress: Progress) -> Record:
    """The record of a cell, or of its failure (which has an `error`): other cells are worth having all the same."""
    try:
        return run_cell(cell, store, device=device, progress=progress)
    except Exception as error:
        return failure(cell, error)


def failure(cell: Cell, error: BaseException) -> Record:
    """What is kept of a cell that could not be finished."""
    text = str(error) if isinstance(error, InformedRoutingError) else f"{type(error).__name__}: {error}"
    return {
        "key": cell.key,
        "cell": cell.labels(),
        "error": " ".join(text.split()) or type(error).__name__,
        "traceback": "".join(traceback.format_exception(error)),
    }


def judge(cell: Cell, store: Store, *, device: str, progress: Progress) -> Record:
    """Tasks, perplexities and costs of a cell whose stages are done."""
    with factors_in(cell.evaluation.precision):
        return _judged(cell, store, device, progress)


def _judged(cell: Cell, store: Store, device: str, progress: Progress) -> Record:
    settings, text = cell.evaluation, cell.training
    model, tokenizer = load(cell, store, device=device)
    engine = "torch" if hasattr(model, "routing_config") else "transformers"
    costs = accounting(model)
    if settings.native:
        model, choice = engage_native(model, progress, settings.precision)
        engine = engine_name(choice)
    found: Record = {"engine": engine}
    length = text["sequence_length"]
    if cell.kind == "dynamic":
        tokens = text["calibration_tokens"]
        rows = text_rows(text["data"], "calibration", tokenizer, length, tokens, cell.seed, "calibrate")
        found["threshold"] = decide(model, cell, rows, progress)
    if settings.validation_tokens:
        rows = text_rows(
            text["data"], "heldout", tokenizer, length, settings.validation_tokens, cell.seed, "validation"
        )
        scored = token_perplexity(model, rows, max(settings.batch_size // 2, 1), progress)
        found["validation"] = {
            "loss": scored.loss,
            "token_perplexity": scored.token_perplexity,
            "tokens": scored.tokens,
            "seconds": round(scored.seconds, 2),
            **_shares(scored.stats),
        }
        if scored.stats:
            found["allocation"] = scored.stats["per_unit"]
        if settings.feature_tokens and cell.kind == "dynamic":
            chosen = rows[: max(settings.feature_tokens // length, 1)]
            found["features"] = feature_similarity(model, chosen, max(settings.batch_size // 2, 1))
    found |= _tasks(cell, store, model, tokenizer, progress)
    stats = [one["sparsity"] for one in found["tasks"].values() if "sparsity" in one]
    if not stats and "sparsity" in found.get("validation", {}):
        stats = [found["validation"]["sparsity"]]
    merged = merge_stats(stats)
    if cell.kind == "dynamic" and merged is not None:
        merged["kv"] = sum(s["kv"] * s["tokens"] for s in stats) / sum(s["tokens"] for s in stats)
        costs = accounting(model, merged)
        found["sparsity"] = {"target": cell.sparsity, **{key: merged[key] for key in SHARES}}
    else:
        found["sparsity"] = {"target": cell.sparsity, "macs": costs["macs_saved"]}
    return {**found, "accounting": costs}


def _tasks(cell: Cell, store: Store, model: Any, tokenizer: Any, progress: Progress) -> Record:
    """What lm-evaluation-harness says, with the realised shares of each task."""
    settings = cell.evaluation
    if not settings.tasks and not settings.wikitext:
        return {"tasks": {}, "average": None}
    from ..evaluation.harness import evaluate_tasks
    from ..evaluation.tasks import WIKITEXT, TaskSpec, average_accuracy

    runs: list[tuple[list[Any], int | None]] = [([TaskSpec.parse(one) for one in settings.tasks], settings.limit)]
    if settings.wikitext:
        runs.append(([TaskSpec(WIKITEXT)], settings.wikitext_pages))
    results: dict[str, Any] = {}
    with _context_of(model, settings.context):
        for specs, limit in runs:
            if specs:
                results |= evaluate_tasks(
                    model,
                    tokenizer,
                    specs,
                    data_dir=None if cell.data_dir is None else Path(cell.data_dir),
                    limit=limit,
                    spread=settings.spread,
                    batch_size=settings.batch_size,
                    results_dir=store.tasks,
                    progress=progress,
                )
    tasks = {name: _task(asdict(result), cell) for name, result in results.items()}
    return {"tasks": tasks, "average": average_accuracy(tasks)}


def _task(result: dict[str, Any], cell: Cell) -> Record:
    kept = {key: result[key] for key in ("shots", "documents")}
    shares = _shares(result["stats"]) if cell.kind == "dynamic" else {}
    return {**result["metrics"], **kept, "seconds": round(result["seconds"], 2), **shares}


def _shares(stats: dict[str, Any] | None) -> Record:
    """The realised shares of a routed model's tokens."""
    if not stats or not stats["units"]:
        return {}
    return {"sparsity": {**{key: stats.get(key, 0.0) for key in SHARES}, "tokens": stats["tokens"]}}


@contextmanager
def _context_of(model: Any, tokens: int | None) -> Iterator[None]:
    """Let evaluation see at most `tokens` tokens at once, where that is less than the model can."""
    before = model.config.max_position_embeddings
    if tokens is not None:
        model.config.max_position_embeddings = min(tokens, before)
    try:
        yield
    finally:
        model.config.max_position_embeddings = before
