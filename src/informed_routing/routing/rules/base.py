"""What a decision rule is, and those that no setting names: for the dense model, for training and for replays."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ...errors import InputError
from ..margins import margin_of

if TYPE_CHECKING:
    from ...config.folder import RoutingConfig
    from ...config.parts import Budget
    from ..history import History, Holding
    from ..routed_unit import RoutedUnit


class DecisionRule(ABC):
    """Maps logits [..., 2] (float32) to a gate [...]: boolean, or float with a gradient while training.

    Engines and back ends ask a rule what it is; they never test for its class.
    """

    dense: ClassVar[bool] = False
    """All that is routed executes: routers need not be asked."""
    original: ClassVar[bool] = False
    """Static layers execute, too: the base model."""
    causal: ClassVar[bool] = True
    """A token's gate does not depend on later tokens, so that text can be generated."""
    hard: ClassVar[bool] = False
    """Gates are boolean and the same each time: what is not executed need not be computed, in training, too."""
    random: ClassVar[bool] = False
    """Gates are drawn anew each time."""
    held: ClassVar[bool] = False
    """A gate depends on earlier gates of the same text and unit: `decide_after` is asked, token by token."""

    @property
    def threshold(self) -> float | None:
        """The margin above which a token executes; None when that is not all that the rule looks at."""
        return None

    @property
    def by_margin(self) -> bool:
        """Whether a token's margin and context are all that the rule looks at: `limits` tells how."""
        return self.threshold is not None

    @property
    def nominal(self) -> float:
        """The one threshold nearest to the rule, by which calibrated tables are read."""
        return 0.0 if self.threshold is None else self.threshold

    @property
    def holding(self) -> Holding | None:
        """How engines decide by a rule that is held; None where only `decide_after` knows, which torch then asks."""
        return None

    def limits(self, contexts: Tensor) -> Tensor:
        """The margins above which tokens execute, float32, where `contexts` says how many keys each of them sees.

        Raises InputError for rules that are not `by_margin`.
        """
        if self.threshold is None:
            raise InputError(f"{type(self).__name__} has no thresholds", "Ask `by_margin` first")
        return torch.full(contexts.shape, self.threshold, dtype=torch.float32, device=contexts.device)

    @abstractmethod
    def __call__(self, logits: Tensor) -> Tensor:
        """The gate of one unit."""

    def decide(self, logits: Tensor, unit: int, contexts: Tensor | None = None) -> Tensor:
        """The gate [...] of the unit with this index, for rules that differ between units or contexts.

        `contexts` [...]: keys that each token sees, itself included; 0 for padding.
        """
        return self(logits)

    def decide_after(self, logits: Tensor, unit: int, contexts: Tensor | None, history: History | None) -> Tensor:
        """The gate [B, N] of the unit, of rules that are `held`; what it approximates is added to the history."""
        return self.decide(logits, unit, contexts)


class NamedRule(DecisionRule):
    """A rule that `selection.decision` names. Its file calls it KIND."""

    @classmethod
    @abstractmethod
    def at(cls, config: RoutingConfig, units: Sequence[RoutedUnit], sparsity: float, budget: Budget) -> DecisionRule:
        """The rule that approximates `sparsity` > 0 of a budget. Raises InputError when it cannot."""


def as_rule(given: DecisionRule | Callable[[Tensor], Tensor]) -> DecisionRule:
    """A rule, or a plain function of the logits as one. Raises InputError for anything else."""
    if isinstance(given, DecisionRule):
        return given
    if not callable(given):
        raise InputError(f"{given!r} is no decision rule", "Give one of informed_routing.routing.decision")
    return Custom(given)


@dataclass(frozen=True)
class Custom(DecisionRule):
    """A function of which nothing is known."""

    function: Callable[[Tensor], Tensor]

    def __call__(self, logits: Tensor) -> Tensor:
        return self.function(logits)


@dataclass(frozen=True)
class AlwaysExecute(DecisionRule):
    """The dense model, static layers included."""

    dense: ClassVar[bool] = True
    original: ClassVar[bool] = True
    hard: ClassVar[bool] = True

    @property
    def threshold(self) -> float:
        return -torch.inf

    def __call__(self, logits: Tensor) -> Tensor:
        return torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device)


@dataclass(frozen=True)
class ExecuteRouted(AlwaysExecute):
    """All that is routed executes, while static layers are approximated; the dense model where there are none."""

    original: ClassVar[bool] = False


@dataclass(frozen=True)
class GumbelSample(DecisionRule):
    """Straight-through Gumbel-softmax (paper 3.1): a hard sample forward, the soft one's gradient backward.

    Of two classes only the difference of the noises counts, which is logistic. The temperature changes only the
    gradient; the sample executes with probability sigmoid(margin / noise) whatever it is. `noise` below 1 brings
    training nearer to inference, which takes no samples; the paper has 1.
    """

    tau: float = 1.0
    noise: float = 1.0
    random: ClassVar[bool] = True

    def __call__(self, logits: Tensor) -> Tensor:
        margin = margin_of(logits).float()
        uniform = torch.rand_like(margin).clamp(1e-7, 1 - 1e-7)
        noisy = margin + self.noise * torch.logit(uniform)
        soft = torch.sigmoid(noisy / self.tau)
        return (noisy > 0).float() + (soft - soft.detach())


@dataclass(frozen=True)
class Given(DecisionRule):
    """A fixed gate, whatever the logits say: for tests, studies and replayed selections."""

    gate: Tensor

    def __call__(self, logits: Tensor) -> Tensor:
        return self.gate.to(logits.device).expand(logits.shape[:-1])


@dataclass(frozen=True)
class GivenByUnit(DecisionRule):
    """Fixed gates of each unit, bool [units, B, N], whatever the logits say."""

    gates: Tensor

    def __call__(self, logits: Tensor) -> Tensor:
        raise InputError("the rule differs between units", "Call decide(logits, unit)")

    def decide(self, logits: Tensor, unit: int, contexts: Tensor | None = None) -> Tensor:
        return self.gates[unit].to(logits.device).expand(logits.shape[:-1])
