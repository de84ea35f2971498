"""Workloads: laws of the inputs that a routed model is given, with a density that can be evaluated.

A workload says how often a prompt comes from each domain and how long prompts and forced outputs are there. Prompt and
output lengths are independent within a domain; `WorkloadMixture` joins workloads where that is too strict.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Protocol

import numpy as np
from pydantic import Discriminator, Field, Tag, TypeAdapter, model_validator

from ..config.types import Label
from ..errors import InputError
from ..files.user_files import shown
from .arrays import Floats, Ints
from .lengths import Frozen, Lengths, check_total, holds
from .settings import checked, read_yaml


@dataclass(frozen=True)
class Inputs:
    """What determines the likelihood of each prompt, one entry per prompt."""

    domain: np.ndarray  # [n] names
    prompt_tokens: Ints  # [n]
    output_tokens: Ints  # [n]

    def __len__(self) -> int:
        return len(self.prompt_tokens)

    @cached_property
    def tokens(self) -> Floats:
        """Prompt and output tokens together: float64 [n]."""
        return (self.prompt_tokens + self.output_tokens).astype(np.float64)

    @cached_property
    def rows(self) -> dict[str, Ints]:
        """The positions of the prompts of each domain, ascending."""
        names, codes = np.unique(self.domain, return_inverse=True)
        return {str(name): np.flatnonzero(codes == code) for code, name in enumerate(names)}


class InputLaw(Protocol):
    """What importance sampling needs to know of a workload."""

    @property
    def name(self) -> str: ...

    def log_density(self, inputs: Inputs) -> Floats:
        """Log probability of each prompt's (domain, prompt length, output length): [n], -inf where impossible."""

    def log_grid(self, domain: str, prompt: Ints, output: Ints) -> Floats:
        """The same on a grid of one domain: [prompt, output]."""

    def support(self) -> dict[str, tuple[Ints, Ints]]:
        """Per possible domain, prompt and output lengths of a grid that holds all that is possible."""

    def mean_tokens(self) -> float:
        """Expected prompt and output tokens of a prompt."""

    def sample(self, size: int, rng: np.random.Generator) -> Inputs:
        """Independent inputs."""


class Domain(Frozen):
    """Share of a domain in a workload, and its lengths in tokens."""

    weight: float = Field(ge=0, le=1)
    prompt_tokens: Lengths
    output_tokens: Lengths

    @model_validator(mode="after")
    def _has_a_prompt(self) -> Domain:
        if self.prompt_tokens.first < 1:
            raise ValueError("prompt_tokens holds 0: a prompt has at least one token")
        return self


class Workload(Frozen):
    """Domain weights, and per domain independent prompt and output lengths."""

    name: Label
    domains: dict[Label, Domain] = Field(min_length=1)

    @model_validator(mode="after")
    def _weights_sum_to_one(self) -> Workload:
        check_total((domain.weight for domain in self.domains.values()), "domain weights")
        return self

    @cached_property
    def _possible(self) -> dict[str, Domain]:
        return {name: domain for name, domain in self.domains.items() if domain.weight > 0}

    def log_density(self, inputs: Inputs) -> Floats:
        """See InputLaw."""
        density = np.full(len(inputs), -np.inf)
        for name, rows in inputs.rows.items():
            if name in self._possible:
                domain = self._possible[name]
                density[rows] = (
                    np.log(domain.weight)
                    + domain.prompt_tokens.log_pmf(inputs.prompt_tokens[rows])
                    + domain.output_tokens.log_pmf(inputs.output_tokens[rows])
                )
        return density

    def log_grid(self, domain: str, prompt: Ints, output: Ints) -> Floats:
        """See InputLaw."""
        if domain not in self._possible:
            return np.full((len(prompt), len(output)), -np.inf)
        law = self._possible[domain]
        return np.log(law.weight) + np.add.outer(law.prompt_tokens.log_pmf(prompt), law.output_tokens.log_pmf(output))

    def support(self) -> dict[str, tuple[Ints, Ints]]:
        """See InputLaw."""
        return {
            name: (domain.prompt_tokens.support, domain.output_tokens.support)
            for name, domain in self._possible.items()
        }

    def mean_tokens(self) -> float:
        """See InputLaw."""
        return sum(d.weight * (d.prompt_tokens.mean + d.output_tokens.mean) for d in self._possible.values())

    def sample(self, size: int, rng: np.random.Generator) -> Inputs:
        """See InputLaw."""
        names = list(self._possible)
        weights = np.array([self._possible[name].weight for name in names])
        codes = rng.choice(len(names), size=size, p=weights / weights.sum())
        prompt, output = np.zeros(size, np.int64), np.zeros(size, np.int64)
        for code, name in enumerate(names):
            rows = np.flatnonzero(codes == code)
            prompt[rows] = self._possible[name].prompt_tokens.sample(len(rows), rng)
            output[rows] = self._possible[name].output_tokens.sample(len(rows), rng)
        return Inputs(np.array(names)[codes], prompt, output)


class Part(Frozen):
    """One part of a mixture."""

    weight: float = Field(ge=0, le=1)
    workload: Workload


class WorkloadMixture(Frozen):
    """With probability `weight`, a prompt of that part's workload: the natural nominal workload for many targets.

    Its likelihood ratios are bounded by 1 / weight for each target that is a part (defensive mixture).
    """

    name: Label
    mixture: tuple[Part, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _weights_sum_to_one(self) -> WorkloadMixture:
        check_total((part.weight for part in self.mixture), "mixture weights")
        return self

    @cached_property
    def _possible(self) -> list[Part]:
        return [part for part in self.mixture if part.weight > 0]

    def log_density(self, inputs: Inputs) -> Floats:
        """See InputLaw."""
        return _log_sum(np.log(part.weight) + part.workload.log_density(inputs) for part in self._possible)

    def log_grid(self, domain: str, prompt: Ints, output: Ints) -> Floats:
        """See InputLaw."""
        return _log_sum(np.log(part.weight) + part.workload.log_grid(domain, prompt, output) for part in self._possible)

    def support(self) -> dict[str, tuple[Ints, Ints]]:
        """See InputLaw."""
        joined: dict[str, tuple[Ints, Ints]] = {}
        for part in self._possible:
            for name, (prompt, output) in part.workload.support().items():
                other = joined.get(name, (prompt, output))
                joined[name] = (np.union1d(other[0], prompt), np.union1d(other[1], output))
        return joined

    def mean_tokens(self) -> float:
        """See InputLaw."""
        return sum(part.weight * part.workload.mean_tokens() for part in self._possible)

    def sample(self, size: int, rng: np.random.Generator) -> Inputs:
        """See InputLaw."""
        weights = np.array([part.weight for part in self._possible])
        counts = rng.multinomial(size, weights / weights.sum())
        drawn = [part.workload.sample(int(count), rng) for part, count in zip(self._possible, counts, strict=True)]
        order = rng.permutation(size)
        return Inputs(
            np.concatenate([part.domain for part in drawn])[order],
            np.concatenate([part.prompt_tokens for part in drawn])[order],
            np.concatenate([part.output_tokens for part in drawn])[order],
        )


def _log_sum(terms: Any) -> Floats:
    total: Floats | None = None
    for term in terms:
        total = term if total is None else np.logaddexp(total, term)
    assert total is not None
    return total


def _kind(value: Any) -> str:
    return "<mixture>" if holds(value, "mixture") else "<workload>"


AnyWorkload = Workload | WorkloadMixture
_Either = Annotated[
    Annotated[Workload, Tag("<workload>")] | Annotated[WorkloadMixture, Tag("<mixture>")], Discriminator(_kind)
]
_ONE: TypeAdapter[AnyWorkload] = TypeAdapter(_Either)
_MANY: TypeAdapter[list[AnyWorkload]] = TypeAdapter(Annotated[list[_Either], Field(min_length=1)])


def workload_from_mapping(data: Mapping[str, Any]) -> AnyWorkload:
    """A workload of settings as in a YAML file. Raises InputError naming the first bad setting."""
    return checked(_ONE, data, "workload")


def workloads_from_sequence(data: Sequence[Any]) -> list[AnyWorkload]:
    """Several workloads with different names. Raises InputError naming the first bad setting."""
    workloads = checked(_MANY, data, "targets")
    names = [workload.name for workload in workloads]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"two targets are called {name}", "Give each target a name of its own")
    return workloads


def read_workload(path: str | Path) -> AnyWorkload:
    """One workload of a YAML file: a mapping with `name` and `domains` (or `mixture`)."""
    data = read_yaml(path, "workload file")
    if not isinstance(data, Mapping):
        raise InputError(f"workload file {path} is not a mapping", "Write name: and domains: at its top")
    return workload_from_mapping(data)


def read_workloads(path: str | Path) -> list[AnyWorkload]:
    """The targets of a YAML file: a list of workloads, a mapping with the list under `targets`, or one workload."""
    data = read_yaml(path, "workload file")
    if isinstance(data, Mapping):
        others = [key for key in data if key != "targets"]
        if "targets" in data and others:
            raise InputError(f"workload file {path} has {shown(others[0])} beside targets", "Put it where it belongs")
        data = data.get("targets", [data])
    if not isinstance(data, list):
        raise InputError(f"workload file {path} holds no list of targets", "Write targets: and a list below it")
    return workloads_from_sequence(data)
