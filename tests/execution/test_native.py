"""The native engine does what the masked reference does: logits, text, caches, padding, statistics."""

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
from informed_routing.execution.cpu import availability, build
from informed_routing.execution.cpu import engine as cpu_engine
from informed_routing.execution.cpu.engine import CpuEngine
from informed_routing.execution.cpu.packing import Packer
from informed_routing.execution.cpu.price_table import ROWS, PriceTable
from informed_routing.execution.formats import FORMATS, PACKED, Format, Packed
from informed_routing.execution.kv_layers import is_packed
from informed_routing.execution.rows import Rows
from informed_routing.models.calls import cache_of, cached
from informed_routing.models.families import native_families
from informed_routing.routing.decision import AlwaysExecute, Threshold

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


def tolerance(weights: Packed) -> float:
    """Of logits with a standard deviation of about 0.8. Only float32 weights have a float32 cache, too, and only they
    are never multiplied by matrix instructions, which round the inputs to bfloat16."""
    if weights == "float32":
        return 1e-4
    return 0.12 if build.library().ir_tiles() else 3e-2


class Replay:
    """Gates of a whole forward [units, B, N], given out unit by unit."""

    def __init__(self, gates: Tensor) -> None:
        self.gates: Iterator[Tensor] = iter(gates)

    def __call__(self, logits: Tensor) -> Tensor:
        return next(self.gates)


def native(model: Any, weights: Packed = "float32", policy: Any = "exact") -> CpuEngine:
    model.set_execution("native", weights=weights, policy=policy)
    return cast(CpuEngine, model.routing_state.native.of(model))


def choose(model: Any, execution: str) -> None:
    """`native` as the routers say, or a torch back end."""
    if execution == "native":
        native(model)
    else:
        model.set_execution(execution)


def rounded(model: Any, weights: Packed) -> Any:
    """A copy of the model whose matrices hold what the packed format really stands for."""
    model = copy.deepcopy(model)
    packer = Packer(build.library(), weights, 1)

    def replace(linear: nn.Linear, kind: Format) -> None:
        packed = packer.linear(linear.weight, None, kind)
        out = torch.empty(packed.n, packed.k)
        packer.library.ir_unpack(
            packed.type, ctypes.c_void_p(packed.data), packed.n, packed.k, ctypes.c_void_p(out.data_ptr())
        )
        linear.weight = nn.Parameter(out)

    for layer in model.decoder.layers:
        for unit in (layer.attention_routing, layer.ffn_routing):
            for module in unit.unit.module(layer).modules():
                if isinstance(module, nn.Linear):
                    replace(module, packer.body)
            replace(unit.forecaster.inner, packer.forecaster)
            replace(unit.forecaster.outer, packer.forecaster)
    replace(model.get_output_embeddings(), packer.head)
    return model.eval()


@pytest.mark.parametrize("weights", PACKED)
def test_two_hundred_random_selections_agree_with_the_masked_reference(weights: Packed) -> None:
    model = make_routed("llama", vocab_size=96, tie_word_embeddings=False)
    reference = rounded(model, weights)
    reference.set_execution("masked")
    engine = native(model, weights)
    generator = torch.Generator().manual_seed(5)
    worst = 0.0
    with torch.inference_mode():
        for trial in range(200):
            batch, length = 1 + trial % 3, 1 + (7 * trial) % 41
            ids = torch.randint(3, 96, (batch, length), generator=generator)
            share = torch.rand((), generator=generator)
            gates = torch.rand(engine.units, batch, length, generator=generator) < share
            model.set_decision(Threshold(0.0))
            reference.set_decision(Replay(gates))
            expected = reference(input_ids=ids, use_cache=False).logits
            embeddings = model.decoder.embed_tokens(ids)
            rope = model.decoder.rotary_emb(embeddings, position_ids=torch.arange(length)[None])
            rows = Rows(torch.zeros(batch, dtype=torch.int32), None)
            found = engine.forward(
                embeddings, rope, rows, None, model.routing_state, model.stats, keep=length, forced=gates
            )
            worst = max(worst, float((found - expected).abs().max()))
    assert worst < tolerance(weights)


@pytest.mark.parametrize("family", native_families("cpu"))
@pytest.mark.parametrize("router", ["linear", "low-rank", "mlp"])
def test_families_routers_and_padding(family: str, router: str) -> None:
    model = make_routed(family, router=router)
    ids = random_ids(3, 140)
    for mask in (None, left_padded(ids, (0, 5, 130))):
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        for decision in (AlwaysExecute(), Threshold(-0.5), Threshold(0.0), Threshold(1e9)):
            logits, counts = [], []
            for execution in ("sparse", "native"):
                choose(model, execution)
                model.set_decision(decision)
                with torch.inference_mode():
                    logits.append(model(input_ids=ids, attention_mask=mask).logits[real])
                counts.append(model.routing_stats())
            torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)
            assert counts[0]["per_unit"] == counts[1]["per_unit"]
            assert counts[0]["macs"] == pytest.approx(counts[1]["macs"])


@pytest.mark.parametrize("fallback", ["forecaster", "zero"])
@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}])
def test_generate_gives_the_text_of_the_torch_back_end(fallback: str, settings: dict[str, Any]) -> None:
    model = make_routed("qwen3", fallback=fallback, eos_token_id=None)
    ids = random_ids(3, 20)
    mask = left_padded(ids, (0, 5, 12))
    texts = []
    for execution in ("sparse", "native"):
        choose(model, execution)
        model.set_decision(Threshold(0.0))
        torch.manual_seed(3)
        texts.append(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=70, **settings))
    assert torch.equal(*texts)


def test_long_decode_splits_keys_and_grows_the_cache() -> None:
    model = make_routed("mistral", max_position_embeddings=2048, sliding_window=700)
    ids = random_ids(1, 1100)
    with torch.inference_mode():
        logits = []
        for execution in ("sparse", "native"):
            choose(model, execution)
            model.set_decision(Threshold(0.0))
            output = model(input_ids=ids[:, :600], use_cache=True)
            rows = [output.logits[:, -1]]
            for place in range(600, 1100, 100):
                output = model(input_ids=ids[:, place : place + 99], past_key_values=output.past_key_values)
                step = ids[:, place + 99 : place + 100]
                output = model(input_ids=step, past_key_values=output.past_key_values)
                rows.append(output.logits[:, -1])
            logits.append(torch.cat(rows))
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


def test_calls_that_the_engine_does_not_do_go_to_torch_with_the_same_cache() -> None:
    model = make_routed("llama")
    native(model)
    model.set_decision(Threshold(0.0))
    ids = random_ids(1, 12)
    with torch.inference_mode():
        whole = model(input_ids=ids).logits[:, -1]
        output = model(input_ids=ids[:, :-1], use_cache=True)
        assert is_packed(output.past_key_values)
        last = model(input_ids=ids[:, -1:], past_key_values=output.past_key_values, output_hidden_states=True)
    assert len(last.hidden_states) == 4
    assert not is_packed(last.past_key_values)
    torch.testing.assert_close(last.logits[:, -1], whole, atol=1e-4, rtol=1e-4)
    # with a gradient, torch too
    assert model(input_ids=ids).logits.requires_grad


def test_prefill_may_be_left_to_torch_and_decode_goes_on_with_its_cache() -> None:
    model = make_routed("llama", eos_token_id=None)
    engine = native(model)
    model.set_decision(Threshold(0.0))
    ids = random_ids(2, 150)
    texts = []
    for faster in (False, True):
        engine.torch_prefill = faster
        texts.append(model.generate(input_ids=ids, max_new_tokens=20, do_sample=False))
    assert torch.equal(*texts)
    with torch.inference_mode():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        assert not is_packed(cache)
        model(input_ids=ids[:, :1], past_key_values=cache)
    assert is_packed(cache)
    assert cache.get_seq_length() == 151


def test_caches_of_another_batch_or_format() -> None:
    model = make_routed("llama")
    native(model, "bfloat16")
    ids = random_ids(2, 12)
    with torch.inference_mode():
        cache = model(input_ids=ids, use_cache=True).past_key_values
        with pytest.raises(InputError, match="2 sequences"):
            model(input_ids=ids[:1, :1], past_key_values=cache)
        native(model, "float32")  # the same generation goes on with another format
        last = model(input_ids=ids[:, :1], past_key_values=cache).logits
        whole = model(input_ids=torch.cat([ids, ids[:, :1]], 1)).logits[:, -1:]
        torch.testing.assert_close(last, whole, atol=0.1, rtol=0.1)
        cache.crop(-13)
        assert model(input_ids=ids[:1], past_key_values=cache).logits.shape == (1, 12, 128)
        with pytest.raises(InputError, match="positions"):
            model(input_ids=ids, position_ids=torch.arange(5)[None])


def test_masks_with_holes_go_to_torch() -> None:
    real = torch.ones(1, 8, dtype=torch.long)
    real[0, 3] = 0
    assert Rows.from_mask(real, 1, 8) is None
    assert Rows.from_mask(real, 1, 2) is None
    right = torch.tensor([[1, 1, 1, 0, 0], [0, 1, 1, 1, 1]])
    rows = Rows.from_mask(right, 2, 5)
    assert rows is not None
    assert rows.start.tolist() == [0, 1]


def test_changed_weights_are_packed_again_and_copies_are_independent() -> None:
    model = make_routed("llama")
    first = native(model)
    ids = random_ids(1, 8)
    twin = copy.deepcopy(model)
    with torch.inference_mode():
        before = model(input_ids=ids).logits
    with torch.no_grad():
        model.decoder.layers[0].mlp.down_proj.weight.mul_(3)
    with torch.inference_mode():
        after = model(input_ids=ids).logits
        torch.testing.assert_close(twin(input_ids=ids).logits, before)
    assert model.routing_state.native.engine is not first
    assert (after - before).abs().max() > 0.1


def test_policy_executes_whole_calls_where_skipping_costs_more() -> None:
    model = make_routed("llama")
    ids = random_ids(1, 20)
    by_row, free, dear = tuple(map(float, ROWS)), (0.0,) * len(ROWS), (1e3,) * len(ROWS)
    with torch.inference_mode():
        engine = native(model)
        dense = model(input_ids=ids).logits
        model.set_decision(Threshold(0.0))
        routed = model(input_ids=ids).logits
        assert 0.1 < model.routing_stats()["units"] < 0.9
        for forecaster, expected in ((dear, dense), (free, routed)):
            engine.use_prices(PriceTable(ROWS, by_row, by_row, forecaster, free, 1e10, 1e10, 1e10))
            model.reset_routing_stats()
            torch.testing.assert_close(model(input_ids=ids).logits, expected)
            rounded_up = [unit["rounded_up"] for unit in model.routing_stats()["per_unit"]]
            assert (sum(rounded_up) > 0) == (forecaster is dear)
            assert (model.routing_stats()["units"] == 0) == (forecaster is dear)


def test_measured_prices_are_kept(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from informed_routing.execution.cpu import price_table

    model = make_routed("llama")
    monkeypatch.setattr(price_table, "cache_dir", lambda: tmp_path)
    first = native(model, policy="auto").table
    assert first is not None
    assert min(first.attention + first.ffn + first.forecaster) > 0
    monkeypatch.setattr(price_table, "measure", lambda engine: pytest.fail("measured twice"))
    model.routing_state.native.engine = None
    assert native(model, policy="auto").table == first
    rows = first.per_row(first.ffn)
    assert rows[0] == 0
    assert rows[64] == pytest.approx(first.ffn[-1])
    assert rows[5] == pytest.approx((first.ffn[3] + first.ffn[4]) / 2)


@pytest.mark.parametrize("family", ["gemma2", "olmo2"])
def test_other_families_are_refused_with_the_reason(family: str) -> None:
    with pytest.raises(InputError, match=family):
        make_routed(family).set_execution("native")


def test_unmerged_adapters_and_unknown_formats_are_refused() -> None:
    from peft import LoraConfig, get_peft_model

    with pytest.raises(InputError, match="int3"):
        make_routed("llama").set_execution("native", weights="int3")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="native"):
        make_routed("llama").set_execution("sparse", weights="int8")
    model = make_routed("llama")
    get_peft_model(cast(Any, model), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(InputError, match="merge adapters"):
        model.set_execution("native")


def test_without_a_compiler_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "compiler", lambda: None)
    build.library.cache_clear()
    build.library_path.cache_clear()
    try:
        with pytest.raises(InputError, match="compiler"):
            make_routed("llama").set_execution("native")
    finally:
        build.library.cache_clear()
        build.library_path.cache_clear()


def test_a_failing_compiler_leaves_nothing_and_falls_back(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from informed_routing.execution.choose import native_reason

    monkeypatch.setenv("INFORMED_ROUTING_CACHE", str(tmp_path))
    monkeypatch.setenv(build.FLAGS_VARIABLE, "--no-such-flag")
    build.library.cache_clear()
    build.library_path.cache_clear()
    try:
        assert not build.is_built()
        assert "did not compile" in str(native_reason(make_routed("llama")))
        assert not any((tmp_path / "native").iterdir())
    finally:
        build.library.cache_clear()
        build.library_path.cache_clear()


def product(
    library: Any, weights: Packed, x: Tensor, weight: Tensor, bias: Tensor | None, threads: int = 2
) -> tuple[Tensor, Tensor]:
    """x W^T + bias by the engine, and the weights that the packed ones stand for."""
    packer = Packer(library, weights, 2)
    packed = packer.linear(weight, bias, packer.body)
    stands_for, found = torch.empty_like(weight), torch.full((len(x), len(weight)), torch.nan)
    at = ctypes.c_void_p
    library.ir_unpack(packed.type, at(packed.data), *weight.shape, at(stands_for.data_ptr()))
    library.ir_linear(ctypes.byref(packed), at(x.data_ptr()), len(x), at(found.data_ptr()), threads)
    return found, stands_for


def check_product(library: Any, weights: Packed, rows: int, inputs: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    weight, bias = torch.randn(70, inputs, generator=generator), torch.randn(70, generator=generator)
    x = torch.randn(rows, inputs, generator=generator)
    found, stands_for = product(library, weights, x, weight, bias)
    if library.ir_tiles() and (weights == "bfloat16" or (weights != "float32" and rows > 12)):
        # by matrix instructions, which take bfloat16; for few rows rounded as they would
        multiplied = x.bfloat16().float() @ stands_for.bfloat16().float().T
    else:
        multiplied = x @ stands_for.T
    torch.testing.assert_close(found, multiplied + bias, atol=1e-4, rtol=1e-4)
    step = {"float32": 0.0, "bfloat16": 2**-8 * 4, "int8": 4 / 127, "int4": 8 / 15 / 1.5}[weights]
    assert (stands_for - weight).abs().max() <= step


@pytest.mark.parametrize("weights", PACKED)
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 13, 200])
def test_products_of_every_format_and_number_of_rows(weights: Packed, rows: int) -> None:
    check_product(build.library(), weights, rows, 96)


@pytest.mark.parametrize("rows", [1, 2, 7, 40])
@pytest.mark.parametrize("inputs", [33, 48, 95])
def test_products_with_inputs_that_fill_no_group(rows: int, inputs: int) -> None:
    for weights in PACKED:
        if weights in ("float32", "bfloat16"):
            check_product(build.library(), weights, rows, inputs)


@pytest.mark.parametrize("weights", PACKED)
@pytest.mark.parametrize(("rows", "inputs"), [(3, 96), (13, 96), (16, 64), (17, 320), (50, 96), (700, 96)])
def test_products_by_matrix_instructions(plain_tiles: Any, weights: Packed, rows: int, inputs: int) -> None:
    assert plain_tiles.ir_tiles()
    check_product(plain_tiles, weights, rows, inputs)


@pytest.mark.parametrize("inputs", [64, 95])
def test_a_row_of_bfloat16_does_not_depend_on_how_many_there_are(plain_tiles: Any, inputs: int) -> None:
    weight, x = torch.randn(70, inputs), torch.randn(40, inputs)
    for library in (build.library(), plain_tiles):
        many, _ = product(library, "bfloat16", x, weight, None)
        alone = torch.cat([product(library, "bfloat16", row[None].contiguous(), weight, None)[0] for row in x])
        torch.testing.assert_close(alone, many, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("rows", [40, 272, 350])
def test_every_number_of_threads_does_all_rows_and_outputs(plain_tiles: Any, rows: int) -> None:
    """Blocks of rows of which the last one is lower: threads get alike work, not alike numbers of blocks."""
    weight, x = torch.randn(330, 1536), torch.randn(rows, 1536)
    for library in (build.library(), plain_tiles):
        for weights in ("float32", "bfloat16"):
            one, _ = product(library, weights, x, weight, None, threads=1)
            for threads in (2, 3, 5, 40):
                assert torch.equal(product(library, weights, x, weight, None, threads)[0], one)


@pytest.mark.parametrize("tiles", ["of the machine", "plain"])
def test_bfloat16_cached_tokens_are_uncached_ones(
    tiles: str, plain_tiles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt by matrix instructions and single tokens without them round alike."""
    if tiles == "plain":
        for module in (build, cpu_engine, availability):
            monkeypatch.setattr(module, "library", lambda: plain_tiles)
    model = make_routed("llama", head_dim=32, num_hidden_layers=2)
    native(model, "bfloat16")
    model.set_decision(Threshold(0.0))
    ids = random_ids(1, 60)
    with torch.inference_mode():
        whole = model(input_ids=ids, use_cache=False).logits
        output = model(input_ids=ids[:, :40], use_cache=True)
        parts = [output.logits]
        for place in range(40, 60):
            parts.append(model(input_ids=ids[:, place : place + 1], **cached(model, cache_of(output))).logits)
    # Sums are made in another order, which now and then rounds a key or a value to its neighbour.
    difference = (torch.cat(parts, 1) - whole).abs()
    assert difference.mean() < 1e-3
    assert difference.max() < 2e-2


def test_formats_take_the_bytes_that_limits_count() -> None:
    for name in PACKED:
        kind = FORMATS[name]
        assert build.library().ir_packed_bytes(kind.id, 64, 96) == 64 * 96 * kind.storage.body


def test_four_bits_are_lossless_for_weights_that_have_four_bits() -> None:
    """Files of 4-bit weights (scale and minimum of 32 inputs in half precision) keep their values exactly."""
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 16, (48, 3, 32), generator=generator)
    levels[..., 0], levels[..., 1] = 0, 15
    scale = (torch.rand(48, 3, 1, generator=generator) * 0.1 + 0.01).half().float()
    weight = (levels * scale - (7 * scale).half().float()).reshape(48, 96)
    packer = Packer(build.library(), "int4", 1)
    packed = packer.linear(weight, None, FORMATS["int4"])
    found = torch.empty(48, 96)
    packer.library.ir_unpack(packed.type, ctypes.c_void_p(packed.data), 48, 96, ctypes.c_void_p(found.data_ptr()))
    torch.testing.assert_close(found, weight, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("weights", PACKED)
@pytest.mark.parametrize("rows", [1, 12, 70])
def test_losses_are_those_of_the_logits(weights: Packed, rows: int) -> None:
    model = make_routed("llama", vocab_size=107, tie_word_embeddings=False)
    engine = native(model, weights)
    generator = torch.Generator().manual_seed(rows)
    hidden = 3 * torch.randn(rows, model.config.hidden_size, generator=generator)
    targets = torch.randint(0, 107, (rows,), generator=generator)
    targets[rows // 2] = -100
    expected = nn.functional.cross_entropy(engine.head(hidden), targets, reduction="none")
    torch.testing.assert_close(engine.losses(hidden, targets), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
@pytest.mark.parametrize("window", [None, 70])
@pytest.mark.parametrize("tiles", ["of the machine", "plain"])
def test_long_prompts_below_float32_agree_with_the_reference(
    weights: Packed, window: int | None, tiles: str, plain_tiles: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several blocks of keys, windows and padding; attention by matrix instructions, or by what stands in for them."""
    if tiles == "plain":
        for module in (build, cpu_engine, availability):
            monkeypatch.setattr(module, "library", lambda: plain_tiles)
    model = make_routed("mistral", sliding_window=window, head_dim=32, max_position_embeddings=512)
    reference = rounded(model, weights)
    ids = random_ids(3, 300)
    mask = left_padded(ids, (0, 5, 230))
    gates = torch.rand(len(model.units), *ids.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    reference.set_execution("masked")
    reference.set_decision(Replay(gates))
    engine = native(model, weights)
    model.set_decision(Threshold(0.0))
    rows = cast(Rows, Rows.from_mask(mask, *ids.shape))
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        expected = reference(input_ids=ids, attention_mask=mask, position_ids=places, use_cache=False).logits
        embeddings = model.decoder.embed_tokens(ids)
        rope = model.decoder.rotary_emb(embeddings, position_ids=places)
        found = engine.forward(embeddings, rope, rows, None, model.routing_state, model.stats, keep=300, forced=gates)
    difference = (found - expected)[mask.bool()].abs()
    assert difference.max() < tolerance(weights)
    assert difference.mean() < tolerance(weights) / 10
