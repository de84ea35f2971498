"""Checkpoints of a running stage: one safetensors file, replaced atomically, never pickled."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ..errors import InputError
from ..files import write_tensors


@dataclass
class StageRecord:
    """What is reported of a stage, and where it stands."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    finished: bool = False
    extra: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    path: Path,
    record: StageRecord,
    tensors: dict[str, Tensor],
    optimizer: torch.optim.Optimizer | None = None,
) -> None:
    """Write tensors, optimiser moments and the record as one file."""
    stored = {f"weight/{name}": tensor for name, tensor in tensors.items()}
    if optimizer is not None:
        for index, moments in optimizer.state_dict()["state"].items():
            for key, value in moments.items():
                stored[f"optimizer/{index}/{key}"] = torch.as_tensor(value)
    write_tensors(path, stored, {"record": json.dumps(record.__dict__)})


def load_checkpoint(
    path: Path, tensors: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer | None = None
) -> StageRecord | None:
    """Restore what `save_checkpoint` wrote into live parameters; None when there is no file."""
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            record = StageRecord(**json.loads(file.metadata()["record"]))
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise InputError(
            f"checkpoint {path} is damaged ({str(error).splitlines()[0]})",
            "Delete it and run again with --resume",
        ) from None
    weights = {n.removeprefix("weight/"): t for n, t in stored.items() if n.startswith("weight/")}
    if weights.keys() != tensors.keys():
        raise InputError(f"checkpoint {path} is of another setting", "Use --overwrite to start anew")
    with torch.no_grad():
        for name, parameter in tensors.items():
            parameter.copy_(weights[name])
    if optimizer is not None:
        state: dict[int, dict[str, Tensor]] = {}
        for name, tensor in stored.items():
            if name.startswith("optimizer/"):
                _, index, key = name.split("/")
                state.setdefault(int(index), {})[key] = tensor
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return record
