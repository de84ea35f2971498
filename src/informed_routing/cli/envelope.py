"""The machine-readable result: one JSON envelope for every command, written whole or not at all."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from informed_routing.errors import InputError
from informed_routing.files.outputs import STDOUT, check_output, descriptor, write_output
from informed_routing.files.user_files import user_path
from informed_routing.finite import json_values

_BEGINNING = re.compile(rb'\s*\{\s*"informed_routing"\s*:')


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


def is_stdout(target: str | None) -> bool:
    """Whether `--json` asks for nothing but JSON on stdout: by `-`, or by a name of stdout itself."""
    return target is not None and (target == "-" or descriptor(target) == STDOUT)


def check_target(target: str | None) -> None:
    """Raise InputError now, not after an hour of work, when the JSON file could not or must not be written.

    Of existing files only results of this program are replaced.
    """
    if target is not None and not is_stdout(target):
        check_output("--json", target, lambda beginning: _BEGINNING.match(beginning) is not None)


def check_apart(target: str | None, others: Mapping[str, Any]) -> None:
    """Raise InputError when the JSON would be written over what another option (by its name) writes."""
    if target is None or is_stdout(target) or descriptor(target) is not None:
        return
    for name in ("out", "plot"):
        other = others.get(name)
        if other is None:
            continue
        if user_path(other, f"--{name}").absolute() == user_path(target, "--json").absolute():
            raise InputError(f"--json {target} is what --{name} writes", "Give another file")


def print_json(content: dict[str, Any]) -> None:
    """The envelope on stdout, in UTF-8 whatever the terminal's encoding."""
    sys.stdout.flush()
    binary = getattr(sys.stdout, "buffer", None)
    if binary is None:
        sys.stdout.write(_text(content))
    else:
        binary.write(_text(content).encode())
    sys.stdout.flush()


def write_json(path: str | Path, content: dict[str, Any]) -> None:
    """The envelope as a file. Raises WorkError if it cannot be written, and then leaves an old file alone."""
    write_output(path, _text(content).encode())


def _text(content: dict[str, Any]) -> str:
    """JSON that can be encoded: a lone surrogate (of an argument that was no UTF-8) stays an escape.

    Raises WorkError naming a number that is not finite.
    """
    plain = {key: json_values(value, key) for key, value in content.items()}
    text = json.dumps(plain, indent=2, ensure_ascii=False, allow_nan=False)
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        text = json.dumps(plain, indent=2, allow_nan=False)
    return text + "\n"
