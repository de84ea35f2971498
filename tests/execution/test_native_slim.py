"""Slices of FFNs on the native engine: what the torch back ends compute, by weights that are packed once."""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from tests.routed import left_padded, make_routed
from tests.tiny import random_ids
from torch import Tensor, nn

from informed_routing.errors import InputError
from informed_routing.execution import remembered
from informed_routing.execution.cpu import availability, build, packing
from informed_routing.execution.cpu import engine as cpu_engine
from informed_routing.execution.cpu.engine import CpuEngine
from informed_routing.execution.cpu.packing import Packer
from informed_routing.execution.cpu.price_table import ROWS, PriceTable
from informed_routing.execution.formats import PACKED, Format, Packed
from informed_routing.execution.rows import Rows
from informed_routing.models.calls import cache_of, cached
from informed_routing.models.families import native_families
from informed_routing.models.slices import chosen_first
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.routing.decision import AlwaysExecute, Threshold
from informed_routing.routing.fallbacks.slim import SlimFallback

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


def slim(family: str = "llama", share: float = 0.25, **overrides: Any) -> RoutedModelForCausalLM:
    """A tiny routed model whose slices are random ones, another in each layer."""
    target = "raw" if family in ("gemma2", "olmo2") else "update"
    model = make_routed(family, fallback="slim", forecaster={"slice": share, "target": target}, **overrides)
    generator = torch.Generator().manual_seed(3)
    for unit in model.units[1::2]:
        own = ffn(unit)
        own.choose(torch.rand(own.of, generator=generator))
    return model


def ffn(unit: Any) -> SlimFallback:
    assert isinstance(unit.forecaster, SlimFallback)
    return unit.forecaster


def native(model: Any, weights: Packed = "float32", threads: int | None = None) -> CpuEngine:
    model.set_execution("native", weights=weights)
    model.routing_state.native.threads = threads
    model.routing_state.native.engine = None
    return cast(CpuEngine, model.routing_state.native.of(model))


class Replay:
    """Gates of a whole forward [units, B, N], given out unit by unit."""

    def __init__(self, gates: Tensor) -> None:
        self.gates: Iterator[Tensor] = iter(gates)

    def __call__(self, logits: Tensor) -> Tensor:
        return next(self.gates)


def rounded(model: Any, weights: Packed, library: Any) -> Any:
    """A copy of the model whose matrices hold what the packed ones stand for: groups are of neurons as packed."""
    model = copy.deepcopy(model)
    packer = Packer(library, weights, 1)

    def replace(linear: Any, kind: Format, order: Tensor | None = None) -> None:
        order = torch.arange(linear.in_features) if order is None else order
        packed = packer.linear(linear.weight[:, order], None, kind)
        out = torch.empty(packed.n, packed.k)
        packer.library.ir_unpack(
            packed.type, ctypes.c_void_p(packed.data), packed.n, packed.k, ctypes.c_void_p(out.data_ptr())
        )
        linear.weight = nn.Parameter(torch.empty_like(out).index_copy(1, order, out))

    for layer in model.decoder.layers:
        order = chosen_first(ffn(layer.ffn_routing).index, layer.mlp.down_proj.in_features)
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear) and "routing" not in name:
                replace(module, packer.body, order if name == "mlp.down_proj" else None)
        for unit in (layer.attention_routing, layer.ffn_routing):
            replace(unit.forecaster.inner, packer.forecaster)
            replace(unit.forecaster.outer, packer.forecaster)
    replace(model.get_output_embeddings(), packer.head)
    return model.eval()


def forced(model: Any, engine: CpuEngine, ids: Tensor, gates: Tensor) -> Tensor:
    """Logits [B, N, vocabulary] by the engine with given gates [units, B, N]."""
    model.set_decision(Threshold(0.0))
    embeddings = model.decoder.embed_tokens(ids)
    rope = model.decoder.rotary_emb(embeddings, position_ids=torch.arange(ids.shape[1])[None])
    rows = Rows(torch.zeros(len(ids), dtype=torch.int32), None)
    state, stats = model.routing_state, model.stats
    return engine.forward(embeddings, rope, rows, None, state, stats, keep=ids.shape[1], forced=gates)


@pytest.mark.parametrize("tiles", ["of the machine", "plain"])
@pytest.mark.parametrize("weights", PACKED)
def test_random_selections_agree_with_the_masked_reference(
    weights: Packed, tiles: str, plain_tiles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every number of rows in both branches, from decoding to blocks of rows, by one thread and by two."""
    if tiles == "plain":
        for module in (build, cpu_engine, availability):
            monkeypatch.setattr(module, "library", lambda: plain_tiles)
    library = build.library()
    model = slim(vocab_size=96, tie_word_embeddings=False, hidden_size=96, intermediate_size=192, head_dim=32)
    reference = rounded(model, weights, library)
    reference.set_execution("masked")
    tolerance = 1e-4 if weights == "float32" else 0.12 if library.ir_tiles() else 3e-2
    generator = torch.Generator().manual_seed(5)
    worst = 0.0
    for threads in (1, 2):
        engine = native(model, weights, threads)
        for trial in range(40):
            batch, length = 1 + trial % 3, 1 + (7 * trial) % 83
            ids = torch.randint(3, 96, (batch, length), generator=generator)
            share = (0.0, 1.0, 0.1, 0.5, 0.9)[trial % 5]
            gates = torch.rand(engine.units, batch, length, generator=generator) < share
            reference.set_decision(Replay(gates))
            with torch.inference_mode():
                expected = reference(input_ids=ids, use_cache=False).logits
                worst = max(worst, float((forced(model, engine, ids, gates) - expected).abs().max()))
    assert worst < tolerance


@pytest.mark.parametrize("family", native_families("cpu"))
@pytest.mark.parametrize("share", [0.25, 0.75])
def test_families_padding_and_counts(family: str, share: float) -> None:
    model = slim(family, share)
    ids = random_ids(3, 70)
    for mask in (None, left_padded(ids, (0, 5, 60))):
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        for decision in (AlwaysExecute(), Threshold(-0.5), Threshold(0.0), Threshold(1e9)):
            logits, counts = [], []
            for execution in ("sparse", "native"):
                model.set_execution(execution)  # type: ignore[arg-type]
                model.set_decision(decision)
                with torch.inference_mode():
                    logits.append(model(input_ids=ids, attention_mask=mask).logits[real])
                counts.append(model.routing_stats())
            torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
            assert counts[0]["per_unit"] == counts[1]["per_unit"]
            assert counts[0]["macs"] == pytest.approx(counts[1]["macs"])


@pytest.mark.parametrize("overrides", [{"mlp_bias": True}, {"hidden_act": "gelu_pytorch_tanh"}])
def test_biases_and_activations(overrides: dict[str, Any]) -> None:
    """The bias of the down projection comes with the slice."""
    model = slim("llama", **overrides)
    logits = []
    for execution in ("sparse", "native"):
        model.set_execution(execution)  # type: ignore[arg-type]
        model.set_decision(Threshold(0.0))
        with torch.inference_mode():
            logits.append(model(input_ids=random_ids(2, 20)).logits)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_blocks_of_rows_by_two_threads(weights: Packed) -> None:
    """Slice and forecast add to the same rows of the residual stream, each in several blocks of them."""
    model = slim(intermediate_size=1024, share=0.75, max_position_embeddings=1024, num_hidden_layers=2)
    reference = rounded(model, weights, build.library())
    reference.set_execution("masked")
    engine = native(model, weights, threads=2)
    ids = random_ids(1, 600)
    gates = torch.rand(engine.units, 1, 600, generator=torch.Generator().manual_seed(2)) < 0.1
    reference.set_decision(Replay(gates))
    with torch.inference_mode():
        difference = (forced(model, engine, ids, gates) - reference(input_ids=ids, use_cache=False).logits).abs()
    assert difference.max() < (3e-4 if weights == "float32" else 0.2)
    assert difference.mean() < (2e-5 if weights == "float32" else 0.02)


def test_an_ffn_whose_neurons_fill_no_group() -> None:
    """In the quantised formats its down projection has 16 bits; the slice's inputs fill theirs."""
    model = slim(intermediate_size=104, share=0.3)
    for weights in PACKED:
        reference = rounded(model, weights, build.library())
        reference.set_execution("masked")
        engine = native(model, weights)
        for length in (1, 40):
            gates = torch.rand(engine.units, 1, length, generator=torch.Generator().manual_seed(2)) < 0.4
            reference.set_decision(Replay(gates))
            with torch.inference_mode():
                found = forced(model, engine, random_ids(1, length), gates)
                expected = reference(input_ids=random_ids(1, length), use_cache=False).logits
            assert float((found - expected).abs().max()) < (1e-4 if weights == "float32" else 0.12)


def test_no_weight_is_packed_twice() -> None:
    sizes = []
    for model in (make_routed(), slim()):
        engine = native(model)
        sizes.append(engine.bytes)
        for layer in engine.layers:
            if layer.down_slice.n:
                assert (layer.down_slice.data, layer.gate_up_slice.data) == (layer.down.data, layer.gate_up.data)
                assert (layer.down_slice.k, layer.gate_up_slice.n) == (32, 64)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}])
def test_generate_gives_the_text_of_the_torch_back_end(settings: dict[str, Any]) -> None:
    model = slim("qwen3", eos_token_id=None)
    ids = random_ids(3, 20)
    mask = left_padded(ids, (0, 5, 12))
    texts = []
    for execution in ("sparse", "native"):
        model.set_execution(execution)  # type: ignore[arg-type]
        model.set_decision(Threshold(0.0))
        texts.append(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=40, **settings))
    assert torch.equal(*texts)


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_cached_tokens_are_uncached_ones(weights: Packed) -> None:
    model = slim()
    native(model, weights)
    model.set_decision(Threshold(0.0))
    ids = random_ids(1, 60)
    with torch.inference_mode():
        whole = model(input_ids=ids, use_cache=False).logits
        output = model(input_ids=ids[:, :40], use_cache=True)
        parts = [output.logits]
        for place in range(40, 60):
            parts.append(model(input_ids=ids[:, place : place + 1], **cached(model, cache_of(output))).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4 if weights == "float32" else 2e-2, rtol=1e-4)


def test_policy_auto_counts_the_slice_into_the_price_of_skipping() -> None:
    model = slim()
    ids = random_ids(1, 20)
    by_row, free, dear = tuple(map(float, ROWS)), (0.0,) * len(ROWS), (1e3,) * len(ROWS)
    with torch.inference_mode():
        engine = native(model)
        model.set_decision(Threshold(0.0))
        for own in (free, dear):
            engine.use_prices(PriceTable(ROWS, by_row, by_row, free, own, 1e10, 1e10, 1e10))
            model.reset_routing_stats()
            model(input_ids=ids)
            rounded_up = [unit["rounded_up"] for unit in model.routing_stats()["per_unit"]]
            assert not any(rounded_up[::2])  # attention has no slice
            assert all(rounded_up[1::2]) == (own is dear)
            assert any(rounded_up[1::2]) == (own is dear)


def test_prices_of_slices_are_measured() -> None:
    from informed_routing.execution.cpu.price_table import measure

    assert min(measure(native(slim())).slice) > 0
    assert set(measure(native(make_routed())).slice) == {0.0}


def test_another_choice_of_neurons_is_packed_again() -> None:
    model = slim()
    first = native(model)
    model.set_decision(Threshold(1e9))
    ids = random_ids(1, 12)
    for change in (
        lambda index: index.copy_(torch.arange(32)),
        lambda index: index.data.copy_(torch.arange(64, 96)),
    ):
        with torch.inference_mode():
            before = model(input_ids=ids).logits
        for unit in model.units[1::2]:
            change(ffn(unit).index)
        with torch.inference_mode():
            found = model(input_ids=ids).logits
            assert model.routing_state.native is not None
            assert model.routing_state.native.engine is not first
            with model.routing_state.using(execution="sparse"):
                torch.testing.assert_close(found, model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
        assert (found - before).abs().max() > 1e-2


def test_the_self_check_sees_slices(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = slim()
    monkeypatch.setattr(remembered, "cache_dir", lambda: tmp_path)
    monkeypatch.setattr(packing, "chosen_first", lambda index, of: torch.arange(of).flip(0))
    with pytest.raises(InputError, match="skipping is not the masked reference"):
        model.set_execution("native")
    monkeypatch.undo()
    model.set_execution("native")


@pytest.mark.parametrize("count", [31, 48, 0])
def test_slices_that_fill_no_panels_are_refused(count: int) -> None:
    model = slim()
    ffn(model.units[3]).index = torch.arange(count)
    with pytest.raises(InputError, match=f"a slice of {count} neurons, which come in 32s"):
        model.set_execution("native")


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_families_with_output_norms_are_refused_by_name(family: str) -> None:
    with pytest.raises(InputError, match=family):
        slim(family).set_execution("native")
