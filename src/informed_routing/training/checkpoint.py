"""Checkpoints of a running stage: one safetensors file with a checksum, replaced atomically, never pickled."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import InputError
from ..files.atomic import write_tensors


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
    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in stored.items()}
    described = json.dumps(record.__dict__)
    write_tensors(path, stored, {"record": described, "checksum": _checksum(described, stored)})


def _checksum(record: str, tensors: Mapping[str, Tensor]) -> str:
    """Of a record and contiguous tensors on the CPU: safetensors itself sees only damage to its header."""
    found = zlib.crc32(record.encode())
    for name in sorted(tensors):
        found = zlib.crc32(f"{name}{tensors[name].dtype}{tuple(tensors[name].shape)}".encode(), found)
        if tensors[name].numel():
            found = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy().data, found)
    return f"{found:08x}"


def load_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None = None
) -> StageRecord | None:
    """Restore what `save_checkpoint` wrote into live tensors; None when there is no file."""
    if not path.exists():
        return None
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata()
            record = _record(metadata["record"])
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
        # Earlier versions wrote the record alone.
        if set(metadata) != {"record"} and metadata["checksum"] != _checksum(metadata["record"], stored):
            raise ValueError("its checksum is wrong")
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RecursionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"checkpoint {path} is damaged ({reason})", "Delete it and run again with --resume") from None
    weights = {n.removeprefix("weight/"): t for n, t in stored.items() if n.startswith("weight/")}
    moments = {n: t for n, t in stored.items() if n.startswith("optimizer/")}
    expected = {name: tuple(parameter.shape) for name, parameter in tensors.items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name in sorted({*expected, *found}):
        if expected.get(name) != found.get(name):
            raise InputError(
                f"checkpoint {path} is of another setting ({name} is {found.get(name)}, not {expected.get(name)})",
                "Delete it and run again with --resume, or use --overwrite to start anew",
            )
    state = None if optimizer is None or record.finished else _moments(path, moments, optimizer)
    with torch.no_grad():
        for name, parameter in tensors.items():
            parameter.copy_(weights[name])
    if optimizer is not None and state:
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return record


def _record(text: str) -> StageRecord:
    """Raises ValueError or TypeError for what `save_checkpoint` cannot have written."""
    record = StageRecord(**json.loads(text))
    counts = (record.step, record.tokens)
    if not all(type(count) is int and count >= 0 for count in counts) or type(record.finished) is not bool:
        raise ValueError("its record is no record of a stage")
    if not isinstance(record.seconds, (int, float)) or not math.isfinite(record.seconds):
        raise ValueError("its record is no record of a stage")
    if not isinstance(record.history, list) or not isinstance(record.extra, dict):
        raise ValueError("its record is no record of a stage")
    return record


def _moments(
    path: Path, stored: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> dict[int, dict[str, Tensor]]:
    """The optimiser's moments by the number of their parameter. Raises InputError where they do not fit it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in stored.items():
        try:
            _, index, key = name.split("/")
            fits = tensor.numel() == 1 if key == "step" else tensor.shape == parameters[int(index)].shape
        except (ValueError, IndexError):
            fits = False
        if not fits:
            raise InputError(
                f"checkpoint {path} is of another setting ({name} fits no parameter)",
                "Delete it and run again with --resume, or use --overwrite to start anew",
            )
        state.setdefault(int(index), {})[key] = tensor
    if any(found.keys() != {"step", "exp_avg", "exp_avg_sq"} for found in state.values()):
        raise InputError(f"checkpoint {path} lacks moments of AdamW", "Delete it and run again with --resume")
    return state
