"""Checks settings with pydantic and says what is wrong in the user's own terms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ..errors import InputError


def checked(adapter: TypeAdapter[Any], data: Any, what: str) -> Any:
    """Validated `data`; raises InputError naming the first bad setting below `what`.

    Union members must carry tags in angle brackets: these are not part of what a user writes.
    """
    try:
        return adapter.validate_python(data)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join([what, *(str(part) for part in problem["loc"] if not str(part).startswith(("<", "[")))])
        if problem["type"] == "extra_forbidden":
            raise InputError(f"unknown setting {where}", "Remove it or correct its spelling") from None
        shown = repr(problem.get("input"))
        given = f" = {shown}" if len(shown) < 60 else ""
        message = problem["msg"].removeprefix("Value error, ")
        raise InputError(f"{where}{given}: {message[0].lower()}{message[1:]}", "Correct this value") from None


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file. Raises InputError when it is missing or cannot be read."""
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"file {path} does not exist", "Give the path of a YAML file") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"file {path} cannot be read: {str(error).splitlines()[0]}", "Correct it") from None
