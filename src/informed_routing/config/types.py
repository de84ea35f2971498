"""What settings are made of: a base that refuses what is no number, kinds of values with their bounds, and messages."""

from __future__ import annotations

from typing import Annotated, Any, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from ..errors import InputError
from ..files.user_files import check_plain, shown

LARGEST_NUMBER = 3e38  # weights and margins are float32
LARGEST_COUNT = 2**53
LARGEST_SIZE = 2**20  # of a width, a sequence, a batch: what a tensor has beside the model's own sizes
LARGEST_SEED = 2**32 - 1  # what all of the random generators take


def _plain_text(text: str) -> str:
    try:
        return check_plain(text, "text")
    except InputError as error:
        raise ValueError(error.what) from None


Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Size = Annotated[int, Field(ge=1, le=LARGEST_SIZE)]
Label = Annotated[str, Field(min_length=1, max_length=200), AfterValidator(_plain_text)]
"""A name that people read: one line, nothing that a terminal would act on."""
Reference = Annotated[str, Field(min_length=1, max_length=4096), AfterValidator(_plain_text)]
"""A model, a text or a folder as a user names it."""


class Frozen(BaseModel):
    """Settings: checked once, then constant. Unknown ones are refused, and what is no number where one is asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_boolean_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic reads true as 1."""
        field = cls.model_fields[str(info.field_name)]
        if not _takes_boolean(field.annotation) and _holds_boolean(value, get_origin(field.annotation) is dict):
            raise ValueError("true and false are not taken here")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _of_sane_size(cls, value: Any) -> Any:
        for number in value if isinstance(value, tuple) else (value,):
            too_large = isinstance(number, int) and abs(number) > LARGEST_COUNT
            if too_large or (isinstance(number, float) and abs(number) > LARGEST_NUMBER):
                raise ValueError("this number is too large")
        return value


def _holds_boolean(value: Any, mapping: bool) -> bool:
    parts = [value, *value] if isinstance(value, (list, tuple)) else [value]
    if isinstance(value, dict) and mapping:
        parts += [part for pair in value.items() for part in pair]
    return any(isinstance(part, bool) for part in parts)


def _takes_boolean(annotation: Any) -> bool:
    return annotation in (bool, Any) or any(_takes_boolean(part) for part in get_args(annotation))


def describe(error: ValidationError) -> tuple[str, str]:
    """The first problem of a pydantic error as (what, remedy)."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "settings"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        return f"unknown setting {where}", "Remove it or correct its spelling"
    return f"{where}{given(first.get('input'))}: {message[0].lower()}{message[1:]}", "Correct this value"


def given(value: Any) -> str:
    """` = value` for what fits into a message."""
    return f" = {shown(value)}" if isinstance(value, (str, int, float, bool, type(None))) else ""
