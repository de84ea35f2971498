"""Results of finished tasks, kept as files, so that an interrupted evaluation continues where it was.

A file is found by everything that its numbers depend on beyond rounding; batch size, device and engine are not part
of that.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from informed_routing.files.atomic import remove_left_overs, write_json

FORMAT = 1


@dataclass(frozen=True)
class TaskResult:
    """What one task gave.

    `metrics` holds the harness' numbers and, where it has them, their standard errors as `NAME_stderr`. `stats` is
    what `routing_stats()` says about the tokens computed for it (without the list of units), None for a dense model.
    """

    task: str
    shots: int
    documents: int
    metrics: dict[str, float]
    seconds: float
    stats: dict[str, Any] | None = None


@dataclass(frozen=True)
class ResultFolder:
    """Finished tasks of any number of models and settings in one folder. `key` is what all tasks of a run share."""

    folder: Path
    key: dict[str, Any] = field(default_factory=dict)

    def path(self, task: dict[str, Any]) -> Path:
        """The file of a task, `task` being what its numbers depend on besides `key`; it has at least a `name`."""
        return self.folder / f"{task['name']}-{_digest(self._full(task))[:16]}.json"

    def load(self, task: dict[str, Any]) -> TaskResult | None:
        """The result of a task that was finished before, None if there is none that can be read."""
        remove_left_overs(self.folder, self.path(task).name)
        try:
            content = json.loads(self.path(task).read_text(encoding="utf-8"))
            return TaskResult(**content["result"]) if content["key"] == self._full(task) else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def save(self, task: dict[str, Any], result: TaskResult) -> None:
        """Keep a result: the file is whole or absent. Raises WorkError when it cannot be written."""
        write_json(self.path(task), {"key": self._full(task), "result": asdict(result)})

    def _full(self, task: dict[str, Any]) -> dict[str, Any]:
        return {"format": FORMAT, **self.key, **task}


def model_key(model: Any, tokenizer: Any) -> dict[str, Any]:
    """What numbers depend on in a model as it is set now: every weight, its settings, and what it decides by."""
    settings = {k: v for k, v in model.config.to_dict().items() if k not in ("_name_or_path", "transformers_version")}
    vocabulary = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    key = {
        "weights": _weights_digest(model),
        "config": _digest(settings),
        "tokenizer": _digest(vocabulary),
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    state = getattr(model, "routing_state", None)
    if state is not None:
        key["decision"] = repr(state.decision)
        key["kv"] = state.kv
        key["weight_format"] = getattr(state.native, "weights", None) or key["dtype"]
    return key


def _weights_digest(model: torch.nn.Module) -> str:
    """SHA-256 over names, formats and all bytes of the parameters: a sample would miss a small change."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        tensor = parameter.detach()
        if type(tensor) is not torch.Tensor:  # a quantised format: what it stands for
            tensor = tensor.dequantize()
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
