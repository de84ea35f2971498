"""Checks of what was given on the command line, the same for every option of every command.

A value is looked at once, before a command begins: numbers are finite and of a size that can be computed with, text is
text, paths are paths. What a value may be beside that, its command says.
"""

from __future__ import annotations

import inspect
import math
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

from informed_routing.config.types import LARGEST_NUMBER
from informed_routing.errors import InputError
from informed_routing.files.user_files import check_plain, shown, user_path

LARGEST_INTEGER = 2**32 - 1  # of an option; --seed has it for its bound
MOST_THREADS = 256  # more crash OpenMP where processes may not start as many; machines with more cores may use these
_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]{1,3})?")
_FREE_TEXT = ("--prompt",)  # may hold line ends


def labels(parameters: Sequence[inspect.Parameter]) -> dict[str, str]:
    """How messages call each parameter of a command: its flag, or the name of the argument."""
    return {parameter.name: _label(parameter) for parameter in parameters}


def check_values(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """The values, `~` in paths replaced. Raises InputError naming the option with a value that no command takes."""
    return {name: _checked(value, names[name]) for name, value in values.items()}


def refuse_empty(given: Sequence[str]) -> None:
    """Raise InputError for an argument without content, which as a path would mean the working directory."""
    for place, part in enumerate(given):
        option = part.rstrip("=") if re.fullmatch(r"--[a-z][a-z-]*=", part) else ""
        if part == "" or option:
            before = option or (given[place - 1] if place and given[place - 1].startswith("-") else "an argument")
            raise InputError(f"{before} is empty", "Give it a value, or leave it out")


def check_device(device: str) -> str:
    """`auto` as the device it stands for here. Raises InputError for others than cpu and the GPUs of this machine."""
    if not _DEVICE.fullmatch(device):
        raise InputError(f"--device {shown(device)} is not known", "Use auto, cpu, cuda or cuda:N")
    import torch

    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "auto":
        return "cuda" if there else "cpu"
    if device != "cpu":
        number = int(device.partition(":")[2] or 0)
        if number >= there:
            raise InputError(f"--device {device} is not available: there are {there} CUDA devices", "Use --device cpu")
    return device


def check_threads(threads: int | None) -> None:
    """Raise InputError for a number of threads that cannot be started."""
    most = max(MOST_THREADS, os.cpu_count() or 1)
    if threads is not None and not 1 <= threads <= most:
        bound = "below 1" if threads < 1 else f"above {most}"
        raise InputError(f"--threads {threads} is {bound}", "Give the number of processor cores to use")


def check_folder(option: str, folder: Path) -> None:
    """Raise InputError now, not after an hour of work, when `folder` cannot be or become a folder of results."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{option} {folder} is a file", "Give a folder")
    _check_place(option, folder)


def check_file(option: str, file: Path) -> None:
    """The same of a file of results."""
    if file.is_dir():
        raise InputError(f"{option} {file} is a folder", "Give a file name")
    _check_place(option, file)


def _check_place(option: str, path: Path) -> None:
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    if place.is_file() and place == path.absolute():
        place = place.parent
    if not place.is_dir():
        raise InputError(f"{option} {path} cannot be made: {place} is no folder", "Give another place")
    if not os.access(place, os.W_OK):
        raise InputError(f"{option} {path} cannot be written: {place} is read-only", "Give another place")


def named_values(given: Sequence[str], option: str, example: str) -> dict[str, str]:
    """NAME=VALUE pairs. Raises InputError for what is none, and for a name given twice."""
    found: dict[str, str] = {}
    for entry in given:
        name, separator, value = entry.partition("=")
        if not separator or not name or not value:
            raise InputError(f"{option} {entry} is not NAME=VALUE", f"Write it like {example}")
        if name in found:
            raise InputError(f"{option} gives {name} twice", "Leave out one of them")
        found[name] = value
    return found


def method_settings(method: str, given: Sequence[str]) -> dict[str, Any]:
    """The settings of a static method from `--set NAME=VALUE`, values as YAML reads them.

    Raises InputError for an unknown method, a setting that it does not have, and a value that cannot be read.
    """
    from pydantic import ValidationError

    from informed_routing.baselines.static import METHODS
    from informed_routing.config.types import describe
    from informed_routing.files.bounded_yaml import parse_yaml

    found = named_values(given, "--set", "keep_first=4")
    if method not in METHODS:
        raise InputError(f"--method {shown(method)} is not known", f"Choose one of {', '.join(METHODS)}")
    settings = METHODS[method].settings
    for name in found:
        if name not in settings.model_fields:
            known = ", ".join(settings.model_fields)
            raise InputError(f"--set {name}: {method} has no such setting", f"It has {known}")
    values = {name: parse_yaml(value, f"--set {name}") for name, value in found.items()}
    try:
        settings.model_validate(values)
    except ValidationError as error:
        what, remedy = describe(error)
        raise InputError(f"--set {what}", remedy) from None
    return values


def _checked(value: Any, label: str) -> Any:
    if isinstance(value, (list, tuple)):
        return [_checked(item, label) for item in value]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
        raise InputError(f"{label} {shown(value)} is out of range", f"Give at most {LARGEST_INTEGER}")
    if isinstance(value, float) and not (math.isfinite(value) and abs(value) < LARGEST_NUMBER):
        raise InputError(f"{label} {value:g} is not a finite number", "Give one, such as 0.25")
    if isinstance(value, Path):
        return user_path(value, label)
    if isinstance(value, str):
        return check_plain(value, label, lines=label in _FREE_TEXT)
    return value


def _label(parameter: inspect.Parameter) -> str:
    parts = get_args(parameter.annotation) if get_origin(parameter.annotation) is not None else ()
    for part in parts:
        # beside Annotated, typer keeps the first name of an option as its default
        given = (getattr(part, "default", None), *(getattr(part, "param_decls", None) or ()))
        flags = [flag for flag in given if isinstance(flag, str) and flag.startswith("--")]
        if flags:
            return str(flags[0].split("/")[0])
        if metavar := getattr(part, "metavar", None):
            return str(metavar).strip("[].")
    return parameter.name.upper()
