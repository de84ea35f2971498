"""The one training loop, for all gradient stages: accelerate for devices and processes, exact resume."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..config.recipe import StageConfig
from ..errors import InputError, WorkError
from ..execution.cpu import fused
from ..progress import Progress
from .checkpoint import StageRecord, load_checkpoint, save_checkpoint
from .schedule import Batches, learning_rate, seed_of

BETAS = (0.9, 0.95)
"""Paper A.2, all stages."""

HISTORY_POINTS = 200


class Objective(Protocol):
    """A stage's loss as a module, so that wrappers for several processes see every forward."""

    def __call__(self, input_ids: Tensor, step: int) -> dict[str, Tensor]: ...


def run_stage(
    name: str,
    objective: nn.Module,
    trainable: dict[str, nn.Parameter],
    rows: Tensor,
    config: StageConfig,
    *,
    seed: int,
    accelerator: Accelerator,
    checkpoint: Path,
    progress: Progress,
    offenders: Callable[[Tensor], list[str]],
    rates: Mapping[str, float] | None = None,
    compute: torch.dtype = torch.float32,
) -> StageRecord:
    """Train `trainable` so that `objective(input_ids, step)["loss"]` falls; returns what happened.

    `rates` gives tensors another peak learning rate than `config.learning_rate`. With `compute` bfloat16 products with
    float32 weights are made in it; the weights and their updates stay float32.

    Continues from `checkpoint` if it exists. On the same machine in float32 on CPU the weights at the end do not
    depend on how often the run was interrupted. Raises WorkError on a loss that is not finite, with the step and
    the units at fault; the last checkpoint stays.
    """
    optimizer = torch.optim.AdamW(
        _groups(trainable, rates or {}, config.learning_rate),
        lr=config.learning_rate,
        betas=BETAS,
        weight_decay=config.weight_decay,
        fused=accelerator.device.type == "cuda",
    )
    record = load_checkpoint(checkpoint, trainable, optimizer) or StageRecord()
    accelerator.wait_for_everyone()  # nobody writes before all have looked
    if record.finished:
        return record
    world = accelerator.num_processes
    batches = Batches(rows, config.batch_size, seed_of(seed, name), accelerator.process_index, world)
    wrapped: Any = accelerator.prepare(objective) if world > 1 else objective
    progress.stage(name, config.steps)
    objective.train()
    every = max(config.steps // HISTORY_POINTS, 1)
    started = time.perf_counter() - record.seconds
    while record.step < config.steps:
        step = record.step
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * learning_rate(config, step)
        sums: dict[str, Tensor] = {}  # read once a step: every reading waits for a GPU
        for micro in range(config.gradient_accumulation):
            index = step * config.gradient_accumulation + micro
            batch = batches[index].to(accelerator.device)
            torch.manual_seed(seed_of(seed, name, index, accelerator.process_index))
            last = micro == config.gradient_accumulation - 1
            with accelerator.autocast(), _in(compute, batch.device), _sync(accelerator, wrapped, last):
                found = wrapped(batch, step)
                accelerator.backward(found["loss"] / config.gradient_accumulation)
            for key, value in found.items():
                sums[key] = sums.get(key, 0.0) + value.detach().double() / config.gradient_accumulation
            record.tokens += batch.numel() * world
        metrics = {key: float(value) for key, value in sums.items()}
        norm = torch.nn.utils.clip_grad_norm_(trainable.values(), config.gradient_clip)
        if not (math.isfinite(metrics["loss"]) and math.isfinite(float(norm))):
            units = ", ".join(offenders(batch)) or "none of the units alone"
            raise WorkError(
                f"{name} stage: loss is not finite at step {step} (units at fault: {units})",
                f"The last good checkpoint is {checkpoint.name}; lower the learning rate, or use float32, "
                "and run again",
            )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        record.step += 1
        record.seconds = time.perf_counter() - started
        if step % every == 0 or record.step == config.steps:
            record.history.append({"step": step, **{k: round(v, 5) for k, v in metrics.items()}})
        progress.advance(record.step, **metrics)
        record.finished = record.step == config.steps
        if accelerator.is_main_process and (record.step % config.checkpoint_every == 0 or record.finished):
            save_checkpoint(checkpoint, record, dict(trainable), None if record.finished else optimizer)
    objective.eval()
    accelerator.wait_for_everyone()
    return record


def accelerator_for(device: str, dtype: torch.dtype) -> Accelerator:
    """What trains a model of a dtype on a device: in float16 it scales gradients; bfloat16 is `run_stage`'s own.

    Raises InputError where this process has trained otherwise before, which accelerate keeps for good.
    """
    half = device != "cpu" and dtype == torch.float16
    try:
        found = Accelerator(cpu=device == "cpu", mixed_precision="fp16" if half else None)
    except ValueError as error:
        found, reason = None, str(error)[:80]
    else:
        reason = f"mixed precision is {found.mixed_precision}"
    asked = ("fp16",) if half else ("no", os.environ.get("ACCELERATE_MIXED_PRECISION"))
    if found is None or found.mixed_precision not in asked:
        raise InputError(
            f"{str(dtype).removeprefix('torch.')} on {device} cannot be trained in this process any more ({reason})",
            "Train it in a process of its own",
        )
    return found


def _groups(trainable: dict[str, nn.Parameter], rates: Mapping[str, float], default: float) -> list[dict[str, Any]]:
    """One parameter group for each peak rate; `peak` is relative to the default."""
    by_rate: dict[float, list[nn.Parameter]] = {}
    for name, parameter in trainable.items():
        by_rate.setdefault(rates.get(name, default), []).append(parameter)
    return [{"params": parameters, "peak": rate / default} for rate, parameters in by_rate.items()]


def _in(compute: torch.dtype, device: torch.device) -> Any:
    """Products in bfloat16 where that is what a model computes in and the machine has instructions for it."""
    if compute != torch.bfloat16 or (device.type == "cpu" and not fused.available()):
        return nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _sync(accelerator: Accelerator, wrapped: Any, last: bool) -> Any:
    """Gradients of several processes are averaged at the last micro-batch only."""
    if last or accelerator.num_processes == 1:
        return nullcontext()
    return accelerator.no_sync(wrapped)
