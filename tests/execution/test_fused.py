"""Fused training arithmetic against torch's, forward and backward, and a routed model that trains by it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.tiny import make_tiny
from torch import Tensor
from torch.nn import functional as F

from informed_routing.config.parts import ForecasterConfig, RouterConfig, SelectionConfig
from informed_routing.execution.attach import make_static
from informed_routing.execution.cpu import build, fused, fused_unit
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.routing.decision import AlwaysExecute, ExecuteRouted, Given

HALF = torch.bfloat16
pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


def _halves(*shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(*shape).to(HALF).requires_grad_() for shape in shapes]


def _agree(own: Callable[..., Tensor], reference: Callable[..., Tensor], inputs: list[Tensor]) -> None:
    """Values and gradients, to the rounding of bfloat16; the reference computes in float32."""
    exact = [x.detach().float().requires_grad_() for x in inputs]
    found, wanted = own(*inputs), reference(*exact)
    grad = torch.randn(wanted.shape).to(found.dtype)
    pairs = zip(
        [found, *torch.autograd.grad(found, inputs, grad)],
        [wanted, *torch.autograd.grad(wanted, exact, grad.float())],
        strict=True,
    )
    for one, other in pairs:
        assert one.shape == other.shape
        assert (one.float() - other).norm() <= 0.03 * other.norm()


def test_norm() -> None:
    weight = torch.rand(64) + 0.5
    x = torch.randn(3, 5, 64, requires_grad=True)
    _agree(lambda x: fused.norm(x, weight, 1e-5), lambda x: F.rms_norm(x, (64,), weight, 1e-5), [x])


@pytest.mark.parametrize("gelu", [False, True])
def test_gated(gelu: bool) -> None:
    def reference(gate: Tensor, up: Tensor) -> Tensor:
        return (F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)) * up

    _agree(lambda gate, up: fused.gated(gate, up, gelu=gelu), reference, _halves((6, 48), (6, 48)))


def test_mix() -> None:
    stream = torch.randn(2, 5, 32, requires_grad=True)
    gate = torch.rand(2, 5, requires_grad=True)
    executed, approximated = _halves((2, 5, 32), (2, 5, 32))

    def reference(hidden: Tensor, gate: Tensor, executed: Tensor, approximated: Tensor) -> Tensor:
        return hidden + gate[..., None] * executed + (1 - gate[..., None]) * approximated

    _agree(fused.mix, reference, [stream, gate, executed, approximated])


@pytest.mark.parametrize("batch", [1, 2])
def test_rotate(batch: int) -> None:
    angles = torch.rand(batch, 7, 16).repeat(1, 1, 2)
    cos, sin = angles.cos().contiguous(), angles.sin().contiguous()

    def reference(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        return x * cos[:, :, None] + turned * sin[:, :, None]

    _agree(lambda x: fused.rotate(x, cos, sin), reference, _halves((2, 7, 3, 32)))


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_attention(kv_heads: int) -> None:
    def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x.transpose(1, 2).repeat_interleave(6 // kv_heads, 1) for x in (k, v))
        return F.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True, scale=0.3).transpose(1, 2)

    inputs = _halves((2, 48, 6, 32), (2, 48, kv_heads, 32), (2, 48, kv_heads, 32))
    _agree(lambda q, k, v: fused.attend(q, k, v, 0.3), reference, inputs)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("vocabulary", [64, 1003])
def test_token_losses(share: float, vocabulary: int) -> None:
    (hidden,) = _halves((50, 64))
    weight, teacher = torch.randn(vocabulary, 64).to(HALF) / 4, (hidden + torch.randn(50, 64) * 0.3).to(HALF).detach()
    targets = torch.randint(0, vocabulary, (50,))

    def reference(hidden: Tensor) -> Tensor:
        logits, wanted = hidden @ weight.float().T, teacher.float() @ weight.float().T
        text = F.cross_entropy(logits, targets, reduction="sum")
        model = F.kl_div(logits.log_softmax(-1), wanted.log_softmax(-1), reduction="sum", log_target=True)
        return (1 - share) * text + share * model

    _agree(lambda x: fused.token_losses(x, weight, targets, teacher if share else None, share), reference, [hidden])


def test_a_negative_target_loses_nothing() -> None:
    (hidden,) = _halves((4, 32))
    weight = torch.randn(96, 32).to(HALF)
    targets = torch.tensor([3, -1, 5, -100])
    some = fused.token_losses(hidden, weight, targets, None, 0.0)
    (grad,) = torch.autograd.grad(some, hidden)
    alone = fused.token_losses(hidden[[0, 2]], weight, targets[[0, 2]], None, 0.0)
    assert float(some.detach()) == float(alone.detach())
    assert not grad[[1, 3]].any()


FULL, ODD = torch.zeros(2, 16), torch.zeros(1, 5, 2, 32).to(HALF)
MISREAD: dict[str, Callable[[], Tensor]] = {
    "norm of bfloat16": lambda: fused.norm(FULL.to(HALF), torch.ones(16), 1e-5),
    "norm by another width": lambda: fused.norm(FULL, torch.ones(32), 1e-5),
    "norm of no whole vectors": lambda: fused.norm(torch.zeros(2, 24), torch.ones(24), 1e-5),
    "gated float32": lambda: fused.gated(FULL, FULL, gelu=False),
    "gated shapes": lambda: fused.gated(FULL.to(HALF), torch.zeros(3, 16).to(HALF), gelu=False),
    "mix of a bfloat16 stream": lambda: fused.mix(FULL.to(HALF), torch.ones(2), FULL.to(HALF), FULL.to(HALF)),
    "mix of float32 updates": lambda: fused.mix(FULL, torch.ones(2), FULL, FULL),
    "mix by too few gates": lambda: fused.mix(FULL, torch.ones(1), FULL.to(HALF), FULL.to(HALF)),
    "rotate by other positions": lambda: fused.rotate(
        torch.zeros(1, 4, 2, 32).to(HALF), torch.ones(1, 3, 32), torch.ones(1, 3, 32)
    ),
    "attend to odd lengths": lambda: fused.attend(ODD, ODD, ODD, 1.0),
    "a target beyond the vocabulary": lambda: fused.token_losses(
        FULL.to(HALF), torch.zeros(8, 16).to(HALF), torch.tensor([1, 8]), None, 0.0
    ),
}


@pytest.mark.parametrize("what", MISREAD)
def test_what_would_be_misread_is_refused(what: str) -> None:
    with pytest.raises(ValueError, match=r"reads|multiple|shape|go with|are not of|is not of"):
        MISREAD[what]()


def _routed(
    dtype: torch.dtype, fallback: str, family: str, selection: SelectionConfig | None = None, **config: Any
) -> RoutedModelForCausalLM:
    torch.manual_seed(1)
    base = make_tiny(family, num_attention_heads=2, num_key_value_heads=1, head_dim=32, **config).to(dtype)
    parts = ForecasterConfig(fallback=fallback, rank=8), RouterConfig()
    model = RoutedModelForCausalLM.attach(base, *parts, selection=selection)
    for _, parameter in model.routing_parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def with_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused arithmetic is right on any machine; only fast ones choose it."""
    monkeypatch.setattr(fused, "available", lambda: True)


@pytest.mark.usefixtures("with_tiles")
@pytest.mark.parametrize("fallback", ["forecaster", "slim", "zero"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
@pytest.mark.parametrize("training", [True, False])
def test_a_fused_model_is_the_model(fallback: str, family: str, training: bool) -> None:
    """Hidden states and gradients of one that trains by fused units, beside the same weights in float32."""
    ids = torch.randint(0, 90, (2, 32))
    found = []
    for dtype in (torch.float32, HALF):
        model = _routed(dtype, fallback, family)
        assert fused_unit.fuse(model) is (dtype == HALF)
        model.train(training)
        rule = Given(torch.rand(2, 32, generator=torch.Generator().manual_seed(3)) < 0.6)
        model.routing_state.choose(decision=rule, execution="masked" if training else "sparse")
        with torch.autocast("cpu", dtype=HALF, enabled=dtype == HALF):
            hidden = model.hidden_states(ids)
        parameters = {name: p for name, p in model.routing_parameters() if "forecaster" in name}
        grads = torch.autograd.grad(hidden.float().square().mean(), list(parameters.values())) if parameters else ()
        model.routing_state.choose(decision=AlwaysExecute())
        found.append([hidden, *grads, model.hidden_states(ids)])
    for exact, half in zip(*found, strict=True):
        assert (exact - half.float()).norm() <= 0.06 * exact.norm()


@pytest.mark.usefixtures("with_tiles")
@pytest.mark.parametrize("fallback", ["forecaster", "slim", "zero"])
def test_layers_become_static_in_a_fused_model(fallback: str) -> None:
    ids = torch.randint(0, 90, (2, 32))
    found = []
    for dtype in (torch.float32, HALF):
        model = _routed(dtype, fallback, "llama")
        fused_unit.fuse(model)
        make_static(model, [2])
        torch.manual_seed(4)
        for _, parameter in model.routing_parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        hidden = []
        for rule in (ExecuteRouted(), AlwaysExecute()):
            model.routing_state.choose(decision=rule, execution="masked")
            hidden.append(model.hidden_states(ids))
        found.append(hidden)
        assert all(isinstance(unit.unit, fused_unit.FusedUnit) is (dtype == HALF) for unit in model.units)
    for exact, half in zip(*found, strict=True):
        assert (exact - half.float()).norm() <= 0.06 * exact.norm()


@pytest.mark.usefixtures("with_tiles")
def test_joined_units_of_a_fused_model() -> None:
    """One decision for a layer (D-LLM) mixes by itself, and its first unit reads a stream in bfloat16."""
    ids = torch.randint(0, 90, (2, 32))
    found = []
    for dtype in (torch.float32, HALF):
        model = _routed(dtype, "zero", "llama", SelectionConfig(granularity="layer"))
        fused_unit.fuse(model)
        rule = Given(torch.rand(2, 32, generator=torch.Generator().manual_seed(3)) < 0.6)
        model.routing_state.choose(decision=rule, execution="masked")
        found.append(model.hidden_states(ids))
    assert (found[0] - found[1].float()).norm() <= 0.06 * found[0].norm()


@pytest.mark.usefixtures("with_tiles")
def test_attention_that_drops_is_left_to_the_base_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "attend", lambda *_: pytest.fail("fused attention has no dropout"))
    model = _routed(HALF, "forecaster", "llama", attention_dropout=0.5)
    assert fused_unit.fuse(model)
    model.train()
    model.hidden_states(torch.randint(0, 90, (1, 16)))


@pytest.mark.usefixtures("with_tiles")
def test_what_is_not_known_stays_as_it_is() -> None:
    assert not fused_unit.fuse(_routed(torch.float32, "forecaster", "llama"))
    assert not fused_unit.fuse(_routed(HALF, "forecaster", "gemma2"))
    model = _routed(HALF, "forecaster", "llama")
    model.decoder.layers[0].mlp.register_forward_hook(lambda *_: None)
    assert not fused_unit.fuse(model)
