"""The GPU engine does what the masked reference does: by Triton's interpreter on a CPU, or on a GPU."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

import torch
from tests.routed import left_padded, make_routed
from tests.tiny import random_ids
from torch import Tensor

from informed_routing.config.folder import ThresholdRow
from informed_routing.errors import InputError
from informed_routing.execution.gpu import tuner
from informed_routing.execution.gpu.engine import GpuEngine
from informed_routing.execution.gpu.price_book import Price, PriceBook, executed_shares, rounds_up
from informed_routing.execution.kv_layers import is_packed
from informed_routing.execution.native import NativeExecution
from informed_routing.models.families import native_families
from informed_routing.routing.decision import AlwaysExecute, Threshold

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def gpu(model: Any, policy: Any = "exact", *, records: bool = True) -> GpuEngine:
    """Let the model run in the GPU engine wherever it is; by default with its recorded steps."""
    holder = NativeExecution(policy=policy)
    holder.engine = GpuEngine(model.to(DEVICE), policy=policy)
    holder.engine.records = records
    model.routing_state.choose(native=holder, execution="native")
    return holder.engine


def pair(family: str = "llama", **settings: Any) -> tuple[Any, Any]:
    """(engine's, reference) model of the same weights; head size 32 on a GPU, where 16 is too narrow."""
    settings = {"num_hidden_layers": 2, **settings}
    if DEVICE == "cuda":
        settings = {"head_dim": 32, "hidden_size": 128, **settings}
    model: Any = make_routed(family, **settings)
    reference = copy.deepcopy(model).to(DEVICE)
    reference.set_execution("masked")
    return model, reference


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.inference_mode():
        return model(**inputs).logits.cpu()


@pytest.mark.parametrize("family", native_families("gpu"))
def test_families_routers_and_padding(family: str) -> None:
    model, reference = pair(family, router="linear" if family in ("llama", "qwen3") else "mlp")
    gpu(model)
    ids = random_ids(2, 17).to(DEVICE)
    for mask in (None, left_padded(ids, (0, 12))):
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        for decision in (AlwaysExecute(), Threshold(0.0), Threshold(1e9)):
            found, counts = [], []
            for one in (model, reference):
                one.set_decision(decision)
                found.append(logits(one, input_ids=ids, attention_mask=mask)[real.cpu()])
                counts.append(one.routing_stats())
            torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=2e-3)
            assert counts[0] == counts[1]


@pytest.mark.parametrize(("fallback", "records"), [("forecaster", True), ("zero", False)])
def test_generated_text_of_a_padded_batch(fallback: str, records: bool) -> None:
    model, reference = pair("qwen2", fallback=fallback)
    engine = gpu(model, records=records)
    ids = random_ids(2, 9).to(DEVICE)
    mask = left_padded(ids, (0, 4))
    texts = []
    for one in (model, reference):
        one.set_decision(Threshold(0.0))
        texts.append(one.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None))
    assert torch.equal(texts[0], texts[1])
    assert model.routing_stats() == reference.routing_stats()
    assert bool(engine._steps) == records


@pytest.mark.parametrize(
    "settings", [{"num_beams": 3}, {"do_sample": True}, {"num_beams": 2, "num_return_sequences": 2}]
)
def test_beams_and_samples(settings: dict[str, Any]) -> None:
    model, reference = pair()
    gpu(model)
    ids, texts = random_ids(1, 7).to(DEVICE), []
    for one in (model, reference):
        one.set_decision(Threshold(0.0))
        torch.manual_seed(3)
        texts.append(one.generate(ids, max_new_tokens=5, eos_token_id=None, **settings))
    assert torch.equal(texts[0], texts[1])


def test_a_cache_that_grows_and_one_that_changes_hands() -> None:
    model, reference = pair()
    gpu(model)
    model.set_decision(Threshold(0.0))
    reference.set_decision(Threshold(0.0))
    ids = random_ids(1, 300).to(DEVICE)
    found, expected = (one(input_ids=ids[:, :254], use_cache=True) for one in _inferring(model, reference))
    assert is_packed(found.past_key_values)
    for i in range(254, 258):  # over the first 256 places
        one, two = ids[:, i : i + 1], {"use_cache": True}
        found = _infer(model, one, found.past_key_values, **two)
        expected = _infer(reference, one, expected.past_key_values, **two)
    torch.testing.assert_close(found.logits.cpu(), expected.logits.cpu(), rtol=1e-3, atol=2e-3)
    model.set_execution("sparse")  # the torch back end goes on with what the engine stored
    following = _infer(model, ids[:, 258:264], found.past_key_values)
    expected = _infer(reference, ids[:, 258:264], expected.past_key_values)
    torch.testing.assert_close(following.logits.cpu(), expected.logits.cpu(), rtol=1e-3, atol=2e-3)


def _infer(model: Any, ids: Tensor, cache: Any, **settings: Any) -> Any:
    with torch.inference_mode():
        return model(input_ids=ids, past_key_values=cache, **settings)


def _inferring(*models: Any) -> list[Any]:
    return [torch.inference_mode()(model.forward) for model in models]


def test_given_selections_replace_the_routers() -> None:
    model, reference = pair()
    engine = gpu(model)
    ids = random_ids(2, 19).to(DEVICE)
    gates = torch.rand(engine.units, 2, 19, generator=torch.Generator().manual_seed(1)) < 0.5
    given = iter(gates.to(DEVICE))
    reference.set_decision(lambda scores: next(given))
    expected = logits(reference, input_ids=ids, use_cache=False)
    model.set_decision(Threshold(0.0))
    embeddings = model.decoder.embed_tokens(ids)
    rope = model.decoder.rotary_emb(embeddings, position_ids=torch.arange(19, device=DEVICE)[None])
    from informed_routing.execution.rows import Rows

    rows = Rows(torch.zeros(2, dtype=torch.int32), None)
    with torch.inference_mode():
        found = engine.forward(embeddings, rope, rows, None, model.routing_state, model.stats, keep=19, forced=gates)
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-3, atol=2e-3)


def test_rounding_up_is_counted_and_never_skips_more() -> None:
    model, _ = pair()
    gpu(model, policy="auto")
    model.set_decision(Threshold(0.0))
    logits(model, input_ids=random_ids(2, 12).to(DEVICE))
    units = model.routing_stats()["per_unit"]
    assert all(unit["rounded_up"] == (unit["kind"] == "ffn") for unit in units)
    assert all(unit["executed"] == 1 for unit in units if unit["kind"] == "ffn")
    logits(model, input_ids=random_ids(1, 1).to(DEVICE), use_cache=False)
    assert any(unit["rounded_up"] < 1 for unit in model.routing_stats()["per_unit"] if unit["kind"] == "ffn")


def test_prices_decide_what_is_rounded_up(tmp_path: Path) -> None:
    model, _ = pair()
    engine = gpu(model, policy="auto")
    engine.prices = PriceBook("here", tmp_path / "prices.json")

    def seconds(launch: Any) -> float:
        launch()
        return 1.0 if gates[-1].any() else 0.1

    gates: list[Any] = []
    call = engine.call

    def watched(hidden: Any, unit: Any, given: Any, rotation: Any, keys: Any, gate: Any, index: int) -> None:
        call(hidden, unit, given, rotation, keys, gate, index)
        gates.append(torch.ones(1) if gate is None else gate.clone())

    engine.call = watched  # type: ignore[method-assign]
    for decode in (True, False):
        timer = functools.partial(tuner.price, engine, rows=16, decode=decode, time=seconds, context=7)
        engine.prices.complete(16, decode, timer)
    engine.call = call  # type: ignore[method-assign]
    assert [bool(gate.all()) for gate in gates] == [True, False, True] * 4
    assert not any(gate.any() for gate in gates[1::3])
    assert PriceBook("here", tmp_path / "prices.json").find(1, 9, True) == Price(1.0, 0.1, 1.0)
    assert PriceBook("elsewhere", tmp_path / "prices.json").find(1, 9, True) is None
    engine.thresholds = ()
    assert engine.whole(16, 1, 0.0) == (True, True)  # some row of 16 executes: a saving of 1 % is left alone
    assert engine.whole(1, 1, 0.0) == (False, False)  # one size for 1 to 16 rows, but one row alone often skips


@pytest.mark.parametrize(
    ("rows", "share", "pays"), [(1, 0.75, True), (1, 1.0, False), (8, 0.75, False), (4096, 0.75, True)]
)
def test_a_routed_call_has_to_pay(rows: int, share: float, pays: bool) -> None:
    price = Price(whole=1.0, none=0.05, all=1.1)
    assert price.pays(rows, share) == pays
    assert rounds_up(price, 1, rows, share) != pays


def test_executed_shares_come_from_the_calibrated_table() -> None:
    rows = [
        ThresholdRow(threshold=t, units=0.0, attention=a, ffn=f, macs=0.0)
        for t, a, f in ((1.0, 0.5, 0.3), (0.0, 0.3, 0.1))
    ]
    assert executed_shares(rows, 0.5) == pytest.approx((0.6, 0.8))
    assert executed_shares(rows, 9.0) == pytest.approx((0.5, 0.7))
    assert executed_shares((), 0.0) == (0.75, 0.75)


@pytest.mark.parametrize("kind", ["int8", "float8"])
def test_torchao_weights_are_read_as_they_are(kind: str) -> None:
    torchao = pytest.importorskip("torchao.quantization")
    if kind == "float8" and DEVICE == "cuda" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no float8 on this device")
    model, reference = pair()
    plans = {
        "int8": torchao.Int8WeightOnlyConfig(version=2),
        "float8": torchao.Float8WeightOnlyConfig(),
    }
    for one in (model, reference):
        one.to(DEVICE)
        for layer in one.decoder.layers:
            for part in (layer.self_attn, layer.mlp):
                torchao.quantize_(part, plans[kind])
        one.set_decision(Threshold(0.0))
    engine = gpu(model)
    assert engine.layers[0][0].query.scale is not None
    ids = random_ids(2, 17).to(DEVICE)
    torch.testing.assert_close(logits(model, input_ids=ids), logits(reference, input_ids=ids), rtol=2e-2, atol=2e-2)


def test_tiles_are_timed_on_scratch() -> None:
    model, _ = pair()
    engine = gpu(model)
    before = [parameter.clone() for parameter in model.parameters()]
    assert tuner.tune(engine, 32, lambda launch: float(launch() is None)) == 4
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="gemma2"):
        GpuEngine(make_routed("gemma2"))
    with pytest.raises(InputError, match="a slice of an FFN itself"):
        GpuEngine(make_routed("llama", fallback="slim"))
    with pytest.raises(InputError, match="int4"):
        GpuEngine(pair()[0].to(DEVICE), "int4")
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        with pytest.raises(InputError, match="made for NVIDIA"):
            GpuEngine(make_routed("llama"))


def test_torch_compile_leaves_the_engine_as_it_is() -> None:
    model, reference = pair()
    gpu(model)
    for one in (model, reference):
        one.set_decision(Threshold(0.0))
    ids = random_ids(2, 11).to(DEVICE)
    expected = logits(reference, input_ids=ids)
    compiled = torch.compile(model, backend="eager")  # the tracing is what could break
    for _ in range(2):
        with torch.inference_mode():
            found = compiled(input_ids=ids).logits.cpu()
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-3)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_no_wait_for_the_host_inside_a_forward() -> None:
    model, _ = pair()
    engine = gpu(model)
    model.set_decision(Threshold(0.0))
    ids = random_ids(2, 40).to(DEVICE)
    logits(model, input_ids=ids)  # compiles
    run = engine._run

    def strict(*arguments: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return run(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    engine._run = strict  # type: ignore[method-assign, assignment]
    logits(model, input_ids=ids)
