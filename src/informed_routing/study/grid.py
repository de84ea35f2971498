"""A grid: which methods at which sparsities on which models, how all of them are trained, and what is measured.

Read from YAML. `study/grids` holds those of the paper's tables, `study/scales` how much text they train and are judged
on; users copy one and change it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from ..config.parts import Budget, Decision
from ..config.types import LARGEST_SIZE, Frozen, Label, Reference, Seed, Size, describe
from ..errors import InputError
from ..evaluation.precision import Precision
from ..evaluation.tasks import TaskSpec, parse_tasks
from ..files.bounded_yaml import read_yaml
from ..files.user_files import file_name, shown
from ..recipes import built_in_or_file

Layout = Literal["accuracy", "split", "loss", "columns", "curve", "allocation", "trade_off"]
"""The form of a table: see layouts.py, trade_off.py and figures.py."""

HERE = Path(__file__).resolve().parent


LONGEST_METHOD = 80  # bytes: it is part of the names of files, beside the model's and the sparsity
_TAKEN = ("agreement",)  # files that a study writes beside those of its grids


class Method(Frozen):
    """One row of a table: a recipe of `fit`, a way of pruning, or (neither) the dense model."""

    label: Label
    recipe: Reference | None = Field(None, description="recipe that comes with the package, or a YAML file")
    prune: Label | None = Field(None, description="static method, such as shortgpt")
    overrides: dict[str, Any] = Field(
        default_factory=dict, description="dotted settings of the recipe, or settings of the pruning"
    )
    recovered: tuple[bool, ...] = Field((False, True), min_length=1, description="without and with recovery training")
    sparsities: tuple[float, ...] | None = Field(None, min_length=1, description="default: those of the grid")
    prune_tokens: int | None = Field(None, ge=1, description="text that its pruning is scored on; default the grid's")
    decision: Decision | None = Field(None, description="how MoD chooses tokens when it is judged; default its own way")

    @property
    def kind(self) -> Literal["dense", "static", "dynamic"]:
        """Whether it routes, prunes or neither."""
        return "dynamic" if self.recipe else "static" if self.prune else "dense"

    @field_validator("sparsities", "recovered")
    @classmethod
    def _are_distinct(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        return None if value is None else _distinct(value)

    @field_validator("sparsities")
    @classmethod
    def _are_shares(cls, value: tuple[float, ...] | None) -> tuple[float, ...] | None:
        return None if value is None else _shares(value)

    @model_validator(mode="after")
    def _one_kind(self) -> Method:
        if self.recipe and self.prune:
            raise ValueError("a method has a recipe or a way of pruning, not both")
        idle = {
            "overrides": bool(self.overrides) and self.kind == "dense",
            "sparsities": self.sparsities is not None and self.kind == "dense",
            "prune_tokens": self.prune_tokens is not None and self.kind != "static",
            "decision": self.decision is not None and self.kind != "dynamic",
        }
        for name, is_idle in idle.items():
            if is_idle:
                raise ValueError(f"{name} has no effect on a {self.kind} method: leave it out")
        return self


class Training(Frozen):
    """What all methods of a grid have in common, so that they differ in the method alone.

    `tokens` and `recovery_tokens` set the steps: text that a method reads without gradients (forecasters in closed
    form, pruning scores) counts like text that it trains on.
    """

    data: tuple[Reference, ...] = Field(("demo:wiki", "demo:c4"), min_length=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    sequence_length: int = Field(512, ge=2, le=LARGEST_SIZE)
    batch_size: Size = 2
    gradient_accumulation: Size = 1
    tokens: int | None = Field(None, ge=1, description="text for each method before recovery; null: as its recipe says")
    recovery_tokens: int | None = Field(None, ge=1, description="further text of recovered methods")
    recovery: dict[str, Any] = Field(
        default_factory=dict, description="LoRA settings of recovery, the same for every method that has that stage"
    )
    prune_tokens: int = Field(16_384, ge=1, description="text that pruning is scored on")
    calibration_tokens: int = Field(8_192, ge=1, description="text of thresholds; sets no weights, is not counted")
    overrides: dict[str, Any] = Field(default_factory=dict, description="dotted settings of all recipes")
    equal_tokens: bool = Field(True, description="refuse a grid whose methods train on different amounts of text")


class Speed(Frozen):
    """The workload of the speed pass."""

    prompt_tokens: Size = 512
    new_tokens: Size = 32
    batch_size: Size = 1
    repeats: int = Field(5, ge=1)
    at_once: int = Field(3, ge=1, description="methods in memory beside the dense model, which take turns with it")


class Evaluation(Frozen):
    """What is measured of every cell. `limit` and the data folder also come from the command line."""

    tasks: tuple[Label, ...] = Field((), description="of lm-evaluation-harness, such as boolq or arc_easy@5 (5 shots)")
    limit: int | None = Field(None, ge=1, description="documents of each task; null: all")
    spread: bool = Field(True, description="take them at equal distances instead of the first ones")
    wikitext: bool = Field(True, description="word perplexity of WikiText-2, document by document")
    wikitext_pages: int | None = Field(None, ge=1, description="null: all")
    context: int | None = Field(None, ge=2, description="most tokens seen at once; null: the model's context")
    validation_tokens: int = Field(16_384, ge=0, description="held-out part of the training text, for the loss")
    feature_tokens: int = Field(0, ge=0, description="of those: compared with the dense model, layer by layer")
    batch_size: Size = 8
    precision: Precision = Field(
        "float32", description="of the factors of matrix products on a CPU; bfloat16 where it multiplies them faster"
    )
    native: bool = Field(True, description="use the native engine where it can run")

    @field_validator("tasks")
    @classmethod
    def _are_tasks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        try:
            for task in value:
                TaskSpec.parse(task.replace(",", "@"))  # one task an entry
            if value:
                parse_tasks(",".join(value))
        except InputError as error:
            raise ValueError(error.what) from None
        return value


class Grid(Frozen):
    """A table: methods x sparsities x models x seeds."""

    name: str = Field(pattern=r"^[\w-]+$", max_length=80)
    title: str = Field("", max_length=1000)
    layout: Layout = "accuracy"
    models: tuple[Reference, ...] = Field(("demo:smollm2-135m",), min_length=1)
    sparsities: tuple[float, ...] = Field((0.25, 0.40), min_length=1)
    budget: Budget = "units"
    seeds: tuple[Seed, ...] = Field((17,), min_length=1)
    scale: str | None = Field(None, description="settings in study/scales for what is left out of the next three")
    training: Training = Training()
    evaluation: Evaluation = Evaluation()
    speed: Speed = Speed()
    methods: dict[str, Method]

    @field_validator("sparsities", "models", "seeds")
    @classmethod
    def _are_distinct(cls, value: tuple[Any, ...]) -> tuple[Any, ...]:
        return _distinct(value)

    @field_validator("sparsities")
    @classmethod
    def _are_shares(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        return _shares(value)

    @model_validator(mode="after")
    def _has_names(self) -> Grid:
        """Names of methods and of the grid become names of files."""
        if not self.methods:
            raise ValueError("methods is empty: name at least one")
        try:
            for method in self.methods:
                file_name(method, "the method", LONGEST_METHOD)
            file_name(self.name, "the grid", LONGEST_METHOD)
        except InputError as error:
            raise ValueError(error.what) from None
        if self.name in _TAKEN:
            raise ValueError(f"the name {self.name} is that of another page of a study")
        return self


def _shares(value: tuple[float, ...]) -> tuple[float, ...]:
    for sparsity in value:
        if not 0 < sparsity < 1:
            raise ValueError(f"sparsity {sparsity} is not between 0 and 1")
    return value


def _distinct(value: tuple[Any, ...]) -> tuple[Any, ...]:
    for one in value:
        if value.count(one) > 1:  # its cells would count twice in means
            raise ValueError(f"{one} is given twice")
    return value


def built_in_grids() -> dict[str, Path]:
    """The grids that come with the package, by name."""
    return {path.stem: path for path in sorted((HERE / "grids").glob("*.yaml"))}


def scales() -> dict[str, Path]:
    """The scales that come with the package, by name."""
    return {path.stem: path for path in sorted((HERE / "scales").glob("*.yaml"))}


def load_grid(
    reference: str, *, models: tuple[str, ...] = (), scale: str | None = None, seeds: tuple[int, ...] = ()
) -> Grid:
    """A grid of the package by its name, which comes first, or a YAML file; the keywords replace what it says.

    Raises InputError when it does not exist or breaks a bound, naming the setting.
    """
    path = built_in_or_file(reference, built_in_grids(), "study")
    data = _mapping(path)
    scale = data.get("scale") if scale is None else scale
    if scale is not None:
        known = scales()
        if not isinstance(scale, str) or scale not in known:
            raise InputError(f"scale {shown(scale)} does not exist", f"Choose one of {', '.join(known)}")
        data = _merged(_mapping(known[scale]), data) | {"scale": scale}
    data |= {key: value for key, value in (("models", models), ("seeds", seeds)) if value}
    data.setdefault("name", path.stem)
    try:
        return Grid.model_validate(data)
    except ValidationError as error:
        what, remedy = describe(error)
        raise InputError(f"{path.name}: {what}", remedy) from None


def _mapping(path: Path) -> dict[str, Any]:
    data = read_yaml(path, "grid")
    if not isinstance(data, dict):
        raise InputError(f"grid {path} is not a mapping of settings", "Start from one in study/grids")
    return data


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """Two nested mappings as one; where both have a value, that of `above` stands."""
    both = {
        key: _merged(below[key], above[key])
        for key in below.keys() & above.keys()
        if isinstance(below[key], dict) and isinstance(above[key], dict)
    }
    return {**below, **above, **both}
