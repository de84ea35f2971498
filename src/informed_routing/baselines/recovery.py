"""Recovery training: the common LoRA recipe on any plain, pruned or sliced model, merged into its weights."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..config.recipe import LoraStage
from ..errors import InputError
from ..models.head import lm_head
from ..progress import NullProgress, Progress
from ..training.loop import accelerator_for, run_stage
from ..training.lora import add_lora, merge_lora
from ..training.objectives import next_token_loss
from ..training.route import freeze_all_but
from ..training.schedule import seed_of


class RecoveryObjective(nn.Module):
    """Next-token loss of a model on ids [B, N]."""

    def __init__(self, model: Any, config: LoraStage) -> None:
        super().__init__()
        self.model, self.objective = model, config.objective
        self.head = lm_head(model)

    def forward(self, input_ids: Tensor, step: int) -> dict[str, Tensor]:
        hidden = self.model.model(input_ids=input_ids, use_cache=False).last_hidden_state
        return {"loss": next_token_loss(hidden, input_ids, self.head, self.objective)}


def recover(
    model: Any,
    rows: Tensor,
    config: LoraStage,
    *,
    seed: int = 17,
    accelerator: Accelerator | None = None,
    checkpoint: Path | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train LoRA on rows [n, L] (int64) and merge it: the model keeps its shape. Returns what was done.

    Settings are those of stage 3 (`sparsity` means nothing here), with the family's default targets; the shortcuts of
    a sliced model are linear layers that `targets` can name. A run that finds `checkpoint` continues from it.
    Afterwards the model is in evaluation mode and frozen. Raises InputError for an objective other than `lm` (a pruned
    model has no dense one inside to learn from), for rows of another length than `sequence_length`, or for unknown
    targets; WorkError if the loss is not finite.
    """
    if config.objective.kind != "lm":
        raise InputError(f"recovery does not know the objective {config.objective.kind!r}", "Use lm")
    if rows.shape[1] != config.sequence_length:
        raise InputError(
            f"rows have {rows.shape[1]} tokens, sequence_length is {config.sequence_length}", "Pack rows to this length"
        )
    accelerator = accelerator or accelerator_for(model.device.type, model.dtype)
    torch.manual_seed(seed_of(seed, "recovery"))
    tensors = add_lora(model, config)
    freeze_all_but(model, tensors)
    objective = RecoveryObjective(model, config)
    with tempfile.TemporaryDirectory() as folder:
        record = run_stage(
            "recovery",
            objective,
            tensors,
            rows,
            config,
            seed=seed,
            accelerator=accelerator,
            checkpoint=checkpoint or Path(folder) / "recovery.safetensors",
            progress=progress or NullProgress(),
            offenders=lambda _: [],
            compute=model.dtype,
        )
    merge_lora(model)
    model.requires_grad_(False)
    model.eval()
    return {
        "rank": config.rank,
        "steps": record.step,
        "tokens": record.tokens,
        "seconds": round(record.seconds, 2),
        "history": record.history,
    }
