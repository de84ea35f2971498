"""Checks settings with pydantic and says what is wrong in the user's own terms."""

from __future__ import annotations

from typing import Any

from pydantic import TypeAdapter, ValidationError

from ..config.types import given
from ..errors import InputError
from ..files.bounded_yaml import read_yaml

__all__ = ["checked", "read_yaml"]


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
        message = problem["msg"].removeprefix("Value error, ")
        shown = given(problem.get("input"))
        raise InputError(f"{where}{shown}: {message[0].lower()}{message[1:]}", "Correct this value") from None
