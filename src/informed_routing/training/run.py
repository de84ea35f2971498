"""The state of one fit that its stages share; a part of a stage is done once, however often the fit is killed."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..config.folder import LatencyGains
from ..config.recipe import Recipe, StageConfig
from ..files.folders import CHECKPOINTS
from ..progress import Progress
from ..routed_model import RoutedModelForCausalLM
from ..routing.target import BudgetMeter
from .checkpoint import StageRecord, load_checkpoint, save_checkpoint
from .forecast import offenders
from .loop import run_stage
from .texts import Texts


@dataclass
class Run:
    """A fit between its set-up and its result."""

    recipe: Recipe
    """With what a start has decided already."""
    out: Path
    model: RoutedModelForCausalLM
    tokenizer: Any
    text: Texts
    accelerator: Accelerator
    progress: Progress
    dtype: torch.dtype
    """Of the base model's weights."""
    adapter: Path | None = None
    """The LoRA folder of the start."""
    resumed: Recipe | None = None
    """The recipe of the interrupted fit that goes on; known to the main process only."""
    meter: BudgetMeter = field(init=False)
    """What routing saves, in rows of stage 2."""
    report: dict[str, Any] = field(default_factory=dict)
    """What each finished stage reports, by its name."""

    def set_meter(self, gains: LatencyGains | None = None) -> None:
        """Set the meter for the units that the model has now; `gains` are those of a latency budget."""
        self.meter = self.meter_of(self.recipe.route.sequence_length, gains)

    def meter_of(self, length: int, gains: LatencyGains | None = None) -> BudgetMeter:
        """What routing saves in rows of `length` tokens."""
        recipe, kinds = self.recipe, [unit.kind for unit in self.model.units]
        return BudgetMeter(self.model.costs, kinds, recipe.route.budget, (length + 1) / 2, gains, recipe.kv)

    @property
    def checkpoints(self) -> Path:
        """The folder of the parts that are done."""
        return self.out / CHECKPOINTS

    def phase(self, name: str, tensors: Mapping[str, Tensor], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Do `work` unless an earlier run has: its result is the tensors and what it reports, with its seconds."""
        path = self.checkpoints / f"{name}.safetensors"
        record = load_checkpoint(path, tensors)
        self.accelerator.wait_for_everyone()  # nobody writes before all have looked
        if record is None:
            started = time.perf_counter()
            extra = work()
            record = StageRecord(seconds=time.perf_counter() - started, finished=True, extra=extra)
            if self.accelerator.is_main_process:
                save_checkpoint(path, record, dict(tensors))
            self.accelerator.wait_for_everyone()
        return {**record.extra, "seconds": round(record.seconds, 2)}

    def train(
        self,
        name: str,
        objective: nn.Module,
        tensors: dict[str, nn.Parameter],
        rows: Tensor,
        config: StageConfig,
        rates: Mapping[str, float] | None = None,
    ) -> StageRecord:
        """Train tensors on rows [n, L] by `run_stage`, from the checkpoint of that name if there is one."""
        return run_stage(
            name,
            objective,
            tensors,
            rows,
            config,
            seed=self.recipe.seed,
            accelerator=self.accelerator,
            checkpoint=self.checkpoints / f"{name}.safetensors",
            progress=self.progress,
            offenders=lambda batch: offenders(self.model, batch),
            rates=rates,
            compute=self.dtype,
        )
