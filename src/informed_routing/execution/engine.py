"""What a native engine is: everything that anybody asks of one, whatever it runs on."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from ..progress import Progress
from ..routing.history import History
from ..routing.limits import Balance
from ..routing.state import RoutingState
from .formats import Weights
from .rows import Rows

Policy = Literal["exact", "auto"]
"""exact: always as the routers say, so that the same tokens give the same text; auto: a unit's whole call is executed
where that is faster than skipping some of it by prices timed on this machine, so that texts may differ between runs."""

Factors = Literal["float32", "bfloat16"]
"""What factors of products may be rounded to on a CPU whose weights are float32; sums stay float32."""

NO_TARGET = -100
"""A token that is not scored."""


@runtime_checkable
class NativeEngine(Protocol):
    """An engine of one routed model that does whole forwards without gradients.

    What an engine cannot do it says here, by an empty value: it has no `phases`, no `balance`.
    """

    policy: Policy
    """May be set at any time; nothing is packed again."""

    @property
    def weights(self) -> Weights:
        """The format of the base model's matrices."""
        ...

    @property
    def identity(self) -> int:
        """`changes.identity` of the model when the engine was made."""
        ...

    @property
    def units(self) -> int:
        """Routed units, two for each layer."""
        ...

    @property
    def balance(self) -> Balance | None:
        """The engine's measured rates, of which limits are made; None where they are torch's."""
        ...

    @property
    def torch_prefill(self) -> bool:
        """Whether long prompts are left to torch, whose matrix products are faster here."""
        ...

    @property
    def holds(self) -> bool:
        """Whether it knows rules that are held to what a text has approximated before."""
        ...

    @property
    def phases(self) -> tuple[str, ...]:
        """The parts of a forward whose time `profiled` tells; none where the engine cannot tell."""
        ...

    def is_of(self, model: Any, *, sample: bool = False) -> bool:
        """Whether the model's weights are still those that the engine has copied. `sample`: look at some only."""
        ...

    def checked(self, layers: int) -> AbstractContextManager[None]:
        """Run no more than some layers, and exactly as the routers say: for checks."""
        ...

    def leaves_to_torch(self, rows: int) -> bool:
        """Whether a torch back end should do a call of so many rows."""
        ...

    def profiled(self) -> AbstractContextManager[Mapping[str, float]]:
        """Time the forwards within: gives a mapping that holds the seconds of each of the `phases` afterwards."""
        ...

    def forward(
        self,
        embeddings: Tensor,
        rope: tuple[Tensor, Tensor],
        rows: Rows,
        cache: Cache | None,
        state: RoutingState,
        stats: Any,
        *,
        keep: int = 0,
        forced: Tensor | None = None,
        history: History | None = None,
    ) -> Tensor:
        """Logits [B, keep, vocabulary] of the last `keep` positions, or normed hidden states [B, N, d].

        `embeddings` [B, N, d]; `rope` is (cos, sin), each [B or 1, N, head_dim]; `cache` must be accepted and gets the
        new keys. `forced` bool [units, B, N] replaces the routers' choices. An engine that `holds` takes the `history`
        of the texts under a rule that is held, and adds to it. Raises InputError for a cache of another batch size.
        """
        ...

    def head(self, hidden: Tensor) -> Tensor:
        """Logits float32 [rows, vocabulary] of normed hidden states [rows, d]."""
        ...

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """float32 [rows]: minus the log probabilities of `targets` int64 [rows] after normed states [rows, d].

        A target of NO_TARGET loses 0.
        """
        ...


class EngineKind(Protocol):
    """One row of the table of engines in choose.py: which models an engine can run, and how it is made."""

    holds: bool
    """`NativeEngine.holds` of what it makes."""

    def reason(self, model: Any, progress: Progress | None) -> str | None:
        """Why there is no engine for a model here; None when there is. Compiles it if need be, saying so."""
        ...

    def own_format(self, dtype: torch.dtype, factors: Factors) -> Weights:
        """The format for a model of a dtype where none is asked for."""
        ...

    def make(self, model: Any, weights: Weights | None, threads: int | None, policy: Policy) -> NativeEngine:
        """An engine of a model. Raises InputError, saying why, where it cannot run the model."""
        ...
