"""What `benchmark` times: a model and a way to run it. All engines take the same prompts and the same next tokens."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor

from informed_routing.errors import InputError
from informed_routing.evaluation.timing import measure
from informed_routing.execution.engine import NativeEngine, Policy
from informed_routing.execution.formats import FORMATS, Weights
from informed_routing.models.calls import cached
from informed_routing.routing.limits import Balance
from informed_routing.routing.storage import Storage

if TYPE_CHECKING:
    from informed_routing.execution.native import NativeExecution

EngineName = Literal["native", "torch", "transformers", "compiled"]
ENGINES: tuple[EngineName, ...] = ("native", "torch", "transformers", "compiled")
_SHORT = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class Engine:
    """Transformers' own model, eager: the base of the others."""

    routes = False

    def __init__(self, model: Any, name: str = "transformers") -> None:
        self.model, self.name = model, name
        self.weights = _SHORT[model.dtype]

    @property
    def storage(self) -> Storage:
        """Bytes of an element of each kind, for limits."""
        return FORMATS[self.weights].storage

    @property
    def balance(self) -> Balance:
        """The machine's rates, for limits."""
        return torch_balance(self.model.dtype, self.model.device.type)

    @property
    def native(self) -> NativeEngine | None:
        """The native engine that does the steps; None where PyTorch does."""
        return None

    def fixed(self) -> AbstractContextManager[None]:
        """For loops of steps, between which the model's weights do not change."""
        return nullcontext()

    def use(self, sparsity: float, budget: str | None) -> None:
        """Get ready to run at a sparsity."""

    def fresh_cache(self, batch: int, length: int) -> Any:
        """An empty KV cache for `batch` sequences of up to `length` tokens."""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def step(self, ids: Tensor, cache: Any) -> Tensor:
        """Logits [B, 1, vocabulary] of the last position after `ids` [B, n] on top of `cache`."""
        return self.model(input_ids=ids, **cached(self.model, cache), use_cache=True, logits_to_keep=1).logits


class CompiledEngine(Engine):
    """Transformers' model through torch.compile with frozen weights and a static cache: its fastest dense path."""

    def __init__(self, model: Any, name: str = "compiled") -> None:
        super().__init__(model, name)
        self._forward = torch.compile(model.forward, dynamic=False)

    def fixed(self) -> AbstractContextManager[None]:
        return _freezing()

    def fresh_cache(self, batch: int, length: int) -> Any:
        from transformers import StaticCache

        return StaticCache(config=self.model.config, max_cache_len=-(-length // 64) * 64)

    def step(self, ids: Tensor, cache: Any) -> Tensor:
        with torch.no_grad(), _freezing():
            return self._forward(input_ids=ids, **cached(self.model, cache), use_cache=True, logits_to_keep=1).logits


def _freezing() -> AbstractContextManager[None]:
    """Compile with weights as constants, for as many shapes as a benchmark has; then with what was set before."""
    import torch._inductor.config as inductor

    return nullcontext() if inductor.freezing else _set_freezing()  # setting it takes as long as a small model's step


@contextmanager
def _set_freezing() -> Iterator[None]:
    import torch._inductor.config as inductor

    with inductor.patch(freezing=True), torch._dynamo.config.patch(recompile_limit=64):  # type: ignore[attr-defined]
        yield


class RoutedEngine(Engine):
    """The routed model by the torch back end, or by the native engine with one format of weights."""

    routes = True

    def __init__(
        self, model: Any, weights: str | None = None, policy: Policy = "exact", decision: str = "threshold"
    ) -> None:
        super().__init__(model, "torch" if weights is None else f"native {weights}")
        self.decision, self.policy = decision, policy
        self.holder: NativeExecution | None = None
        if weights is not None:
            from informed_routing.execution.native import NativeExecution
            from informed_routing.execution.self_check import check_engine

            self.weights = weights
            self.holder = NativeExecution(cast(Weights, weights), policy=policy)
            check_engine(model, self.holder)

    @property
    def native(self) -> NativeEngine | None:
        return None if self.holder is None else self.holder.of(self.model)

    @property
    def balance(self) -> Balance:
        native = self.native
        own = None if native is None else native.balance
        return super().balance if own is None else own

    def fixed(self) -> AbstractContextManager[None]:
        return super().fixed() if self.holder is None else self.holder.fixed()

    def place(self) -> None:
        """Let the model run in this engine from now on."""
        state = self.model.routing_state
        state.choose(native=self.holder, execution="native" if self.holder else "sparse", policy=self.policy)

    def use(self, sparsity: float, budget: str | None) -> None:
        self.place()
        self.model.set_sparsity(sparsity, budget, self.decision)


def check_names(names: Sequence[str], weights: Sequence[str]) -> None:
    """Raise InputError for engines and formats of weights that are not known."""
    for kind, given, known in (("engine", names, ENGINES), ("weights", weights, tuple(FORMATS))):
        for one in given:
            if one not in known:
                raise InputError(f"--{kind} {one} is not known", f"Choose some of {', '.join(known)}")


def make_engines(
    dense: Any,
    routed: Any,
    names: Sequence[str],
    weights: Sequence[str],
    policy: Policy = "exact",
    decision: str = "threshold",
) -> list[Engine]:
    """Engines by name; `native` once for each format in `weights`; both it and `torch` have `policy`.

    Raises InputError for unknown names. `decision` is how routed ones choose tokens, by a rule that can generate.
    `dense` is the base model, and may be None where neither `transformers` nor `compiled` is asked for.
    """
    check_names(names, weights)
    engines: list[Engine] = []
    for name in names:
        if name == "native":
            engines += [RoutedEngine(routed, one, policy, decision) for one in weights]
        elif name == "torch":
            engines.append(RoutedEngine(routed, None, policy, decision))
        else:
            engines.append(Engine(dense) if name == "transformers" else CompiledEngine(dense))
    return engines


@functools.cache
def torch_balance(dtype: torch.dtype, device: str) -> Balance:
    """Rates of torch's own products: bytes per second of a vector times many matrices, MACs per second of many rows."""
    n, layers = 1024, 16 if device == "cpu" else 64
    weights = [torch.zeros(2 * n, n, dtype=dtype, device=device) for _ in range(layers)]
    rows = {count: torch.zeros(count, n, dtype=dtype, device=device) for count in (1, 256)}

    def products(count: int) -> None:
        for weight in weights[: layers if count == 1 else 2]:
            torch.nn.functional.linear(rows[count], weight)

    with torch.inference_mode():
        found = measure({str(count): functools.partial(products, count) for count in rows}, repeats=3)
    size = 2 * n * n
    return Balance(layers * size * weights[0].element_size() / found["1"].median, 2 * size * 256 / found["256"].median)
