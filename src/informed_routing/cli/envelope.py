"""The machine-readable result: one JSON envelope for every command, written whole or not at all."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from informed_routing.errors import InputError
from informed_routing.files import write_text
from informed_routing.finite import json_values


def envelope(command: str, *, model: str, device: str, dtype: str, seed: int, result: dict[str, Any]) -> dict[str, Any]:
    """`result` with what it was computed by and on."""
    import torch
    import transformers

    from informed_routing.evaluation.environment import version

    return {
        "informed_routing": version(),
        "command": command,
        "model": model,
        "device": device,
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "seed": seed,
        "result": result,
    }


def check_target(target: str | None) -> None:
    """Raise InputError now, not after an hour of work, when the JSON file could not be written."""
    if target is None or target == "-":
        return
    path = Path(target).expanduser()
    if path.is_dir():
        raise InputError(f"--json {target} is a folder", "Give a file name, or - for stdout")
    if not path.absolute().parent.is_dir():
        raise InputError(f"the folder of --json {target} does not exist", "Create it first")
    if not os.access(path.absolute().parent, os.W_OK):
        raise InputError(f"the folder of --json {target} cannot be written to", "Give another file")


def print_json(content: dict[str, Any]) -> None:
    """The envelope on stdout."""
    sys.stdout.write(_text(content, getattr(sys.stdout, "encoding", None) or "utf-8"))
    sys.stdout.flush()


def write_json(path: Path, content: dict[str, Any]) -> None:
    """The envelope as a file. Raises WorkError if it cannot be written, and then leaves an old file alone."""
    write_text(path.expanduser(), _text(content))


def _text(content: dict[str, Any], encoding: str = "utf-8") -> str:
    """The envelope as JSON that this encoding can hold. Raises WorkError naming a number that is not finite."""
    plain = {key: json_values(value, key) for key, value in content.items()}
    text = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        text = json.dumps(plain, indent=2, allow_nan=False) + "\n"
    return text
