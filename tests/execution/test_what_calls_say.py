"""Whatever a call says is done by every engine, or left to the base model's modules: never ignored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.routed import execute, left_padded, make_routed
from tests.tiny import make_tiny, random_ids
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from informed_routing.errors import InputError
from informed_routing.execution.kv_layers import is_packed
from informed_routing.models import calls
from informed_routing.routing.decision import Threshold

IDS = random_ids(2, 16)
PACKED = torch.cat([torch.arange(9), torch.arange(7)])[None]


def causal(rows: int, length: int = 16) -> Tensor:
    return torch.ones(rows, 1, length, length, dtype=torch.bool).tril()


def documents() -> Tensor:
    """Two documents in one row, as a 4-D mask."""
    allowed = causal(1)
    allowed[..., 9:, :9] = False
    return allowed


def additive(allowed: Tensor) -> Tensor:
    return torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)


CALLS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "packed documents": lambda model: {"input_ids": IDS[:1], "position_ids": PACKED, "use_cache": False},
    "packed rows": lambda model: {"input_ids": IDS, "position_ids": PACKED.expand(2, -1), "use_cache": False},
    "packed documents with a cache": lambda model: {"input_ids": IDS[:1], "position_ids": PACKED},
    "positions that jump": lambda model: {"input_ids": IDS, "position_ids": torch.arange(16)[None] * 2},
    "positions from 5": lambda model: {"input_ids": IDS, "position_ids": torch.arange(5, 21)[None]},
    "4-D boolean mask": lambda model: {"input_ids": IDS[:1], "attention_mask": documents()},
    "4-D additive mask": lambda model: {"input_ids": IDS, "attention_mask": additive(causal(2))},
    "4-D mask that is not causal": lambda model: {"input_ids": IDS, "attention_mask": torch.ones_like(causal(2))},
    "2-D mask": lambda model: {"input_ids": IDS, "attention_mask": left_padded(IDS, (0, 5))},
    "2-D mask with holes": lambda model: {"input_ids": IDS, "attention_mask": (IDS % 3 > 0).long()},
    "2-D mask of booleans": lambda model: {"input_ids": IDS, "attention_mask": left_padded(IDS, (2, 0)).bool()},
    "embeddings": lambda model: {"inputs_embeds": model.get_input_embeddings()(IDS).detach() * 1.5},
    "some logits": lambda model: {"input_ids": IDS, "logits_to_keep": torch.tensor([2, 5])},
    "the last logits": lambda model: {"input_ids": IDS, "logits_to_keep": 3},
    "labels": lambda model: {"input_ids": IDS, "labels": IDS},
    "a tuple": lambda model: {"input_ids": IDS, "return_dict": False},
    "a static cache": lambda model: {
        "input_ids": IDS,
        **calls.cached(model, StaticCache(config=model.config, max_cache_len=32)),
    },
    "an option for kernels": lambda model: {"input_ids": IDS, "cu_seq_lens_q": torch.tensor([0, 9, 16])},
}


def outputs(model: Any, given: dict[str, Any]) -> list[Tensor]:
    with torch.inference_mode():
        output = model(**given)
    found = output if isinstance(output, tuple) else (output.logits, output.loss)
    return [part for part in found if isinstance(part, Tensor)]


@pytest.mark.parametrize("execution", ["sparse", "native"])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("call", list(CALLS))
def test_every_engine_does_what_the_call_says(call: str, family: str, execution: str) -> None:
    model = make_routed(family)
    model.set_decision(Threshold(0.0))
    found = []
    for one in ("masked", execution):
        execute(model, one)
        found.append(outputs(model, CALLS[call](model)))
    assert len(found[0]) == len(found[1]) > 0
    real = slice(None)
    if call in ("2-D mask", "2-D mask with holes", "2-D mask of booleans"):
        real = CALLS[call](model)["attention_mask"].bool()  # type: ignore[assignment]
    for wanted, one in zip(*found, strict=True):
        pairs = (one, wanted) if one.dim() < 2 else (one[real], wanted[real])
        torch.testing.assert_close(*pairs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("execution", ["sparse", "native"])
@pytest.mark.parametrize("asked", [True, 2, [0, -1]])
def test_recorded_states_are_those_of_the_reference(execution: str, asked: Any) -> None:
    model = make_routed("llama", attn_implementation="eager")
    model.set_decision(Threshold(0.0))
    found = []
    for one in ("masked", execution):
        execute(model, one)
        with torch.inference_mode():
            output = model(input_ids=IDS, output_hidden_states=asked, output_attentions=True)
        found.append([part for part in [*output.hidden_states, *output.attentions] if part is not None])
    assert len(found[0]) == len(found[1]) > 3
    for wanted, part in zip(*found, strict=True):
        torch.testing.assert_close(part, wanted, atol=1e-4, rtol=1e-4)
    model.config.output_attentions = True  # the config can ask for it, too
    with torch.inference_mode():
        assert len(model(input_ids=IDS).attentions) == 3


def test_neither_or_both_inputs_are_the_base_models_error() -> None:
    model = make_routed("llama")
    execute(model, "native")
    embeddings = model.get_input_embeddings()(IDS).detach()
    with torch.inference_mode():
        with pytest.raises(ValueError, match="exactly one"):
            model(input_ids=IDS, inputs_embeds=embeddings)
        with pytest.raises(InputError, match="without input_ids"):
            model(attention_mask=torch.ones_like(IDS))
        with pytest.raises(TypeError):
            model(IDS, input_ids=IDS)


@pytest.mark.parametrize("execution", ["sparse", "native"])
def test_early_exit_runs_the_layers_that_the_config_says(execution: str) -> None:
    model = make_routed("llama")
    model.set_decision(Threshold(0.0))
    execute(model, "masked")
    model.config.num_hidden_layers = 2
    wanted = outputs(model, {"input_ids": IDS})[0]
    model.config.num_hidden_layers = 3
    whole = outputs(model, {"input_ids": IDS})[0]
    execute(model, execution)
    torch.testing.assert_close(outputs(model, {"input_ids": IDS})[0], whole, atol=1e-4, rtol=1e-4)
    counted = model.routing_stats()["tokens"]
    model.config.num_hidden_layers = 2
    torch.testing.assert_close(outputs(model, {"input_ids": IDS})[0], wanted, atol=1e-4, rtol=1e-4)
    assert model.routing_stats()["tokens"] == counted  # drafts are not counted
    model.config.num_hidden_layers = 3
    torch.testing.assert_close(outputs(model, {"input_ids": IDS})[0], whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("execution", ["sparse", "native"])
def test_layers_taken_out(execution: str) -> None:
    model = make_routed("llama", num_hidden_layers=4)
    model.set_decision(Threshold(0.0))
    execute(model, execution)
    outputs(model, {"input_ids": IDS})
    layers = model.decoder.layers
    model.decoder.layers = torch.nn.ModuleList([layers[0], layers[2], layers[3]])
    found = outputs(model, {"input_ids": IDS, "use_cache": False})[0]
    model.set_execution("masked")
    torch.testing.assert_close(found, outputs(model, {"input_ids": IDS, "use_cache": False})[0], atol=1e-4, rtol=1e-4)


DECODING: dict[str, dict[str, Any]] = {
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "early exit": {"assistant_early_exit": 2},
    "beams": {"num_beams": 3},
    "chunked prefill": {"prefill_chunk_size": 5},
}


@pytest.mark.parametrize(("execution", "kv"), [("sparse", "keep"), ("native", "keep"), ("sparse", "drop")])
@pytest.mark.parametrize("family", ["llama", "mistral"])
@pytest.mark.parametrize("how", list(DECODING))
def test_ways_of_decoding_give_the_greedy_text(how: str, family: str, execution: str, kv: str) -> None:
    model = make_routed(family, eos_token_id=None)
    model.set_decision(Threshold(0.0))
    execute(model, execution)
    model.routing_state.choose(kv=kv)
    ids = torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6]])
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 16, "do_sample": False, "pad_token_id": 0}
    if how == "beams":  # another text than the greedy one: with a cache as without
        wanted = model.generate(ids, use_cache=False, **settings, **DECODING[how])
    else:
        wanted = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, **settings, **DECODING[how]), wanted)


def test_an_assistant_drafts_the_same_text() -> None:
    model, assistant = make_routed("llama", eos_token_id=None), make_tiny("llama", seed=3, eos_token_id=None)
    model.set_decision(Threshold(0.0))
    execute(model, "native")
    settings = {"max_new_tokens": 12, "do_sample": False}
    wanted = model.generate(IDS[:1], **settings)
    assert torch.equal(model.generate(IDS[:1], assistant_model=assistant, **settings), wanted)


@pytest.mark.parametrize(("execution", "kv"), [("sparse", "keep"), ("native", "keep"), ("sparse", "drop")])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_cropped_cache_goes_on_as_if_the_tokens_had_never_been(execution: str, kv: str, batch: int) -> None:
    model = make_routed("llama")
    model.set_decision(Threshold(0.0))
    execute(model, execution)
    model.routing_state.choose(kv=kv)
    ids, other = IDS[:batch], random_ids(batch, 6, seed=9)
    wanted = outputs(model, {"input_ids": torch.cat([ids[:, :10], other], 1), "use_cache": False})[0][:, 10:]
    cache = DynamicCache(config=model.config)
    outputs(model, {"input_ids": ids, **calls.cached(model, cache)})
    cache.crop(torch.tensor(-6))  # type: ignore[arg-type]  # what transformers 5.16 gives
    cache.crop(0)
    assert cache.get_seq_length() == 10
    assert is_packed(cache) == (execution == "native")
    found = outputs(model, {"input_ids": other, **calls.cached(model, cache)})[0]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    if execution == "native" or kv == "drop":
        with pytest.raises(ValueError, match=r"crop\(4\)"):
            cache.crop(4)


@pytest.mark.parametrize("execution", ["sparse", "native"])
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_cache_counts_under_the_names_of_all_releases(name: str, execution: str) -> None:
    model = make_routed("llama")
    model.set_decision(Threshold(0.0))
    execute(model, execution)
    cache = DynamicCache(config=model.config)
    first = outputs(model, {"input_ids": IDS[:, :10], name: cache})[0]
    last = outputs(model, {"input_ids": IDS[:, 10:], name: cache})[0]
    assert cache.get_seq_length() == 16
    whole = outputs(model, {"input_ids": IDS, "use_cache": False})[0]
    torch.testing.assert_close(torch.cat([first, last], 1), whole, atol=1e-4, rtol=1e-4)


def test_dropped_keys_do_not_go_on_with_a_cache_of_kept_ones() -> None:
    model = make_routed("llama")
    model.set_decision(Threshold(0.0))
    cache = DynamicCache(config=model.config)
    outputs(model, {"input_ids": IDS, **calls.cached(model, cache)})
    model.set_execution("sparse", "drop")
    with pytest.raises(InputError, match="holds keys that were kept"):
        outputs(model, {"input_ids": IDS, **calls.cached(model, cache)})


@pytest.mark.parametrize("execution", ["sparse", "native"])
def test_hooks_run(execution: str) -> None:
    model = make_routed("llama")
    model.set_decision(Threshold(0.0))
    execute(model, execution)
    plain = outputs(model, {"input_ids": IDS})[0]
    layer = model.decoder.layers[1]
    hooks = [
        layer.self_attn.register_forward_hook(lambda module, args, output: (2 * output[0], *output[1:])),
        layer.register_forward_hook(lambda module, args, output: output + 0.5),
    ]
    with pytest.warns(RuntimeWarning, match="hooks") if execution == "native" else torch.no_grad():
        found = outputs(model, {"input_ids": IDS})[0]
    model.set_execution("masked")
    torch.testing.assert_close(found, outputs(model, {"input_ids": IDS})[0], atol=1e-4, rtol=1e-4)
    assert (found - plain).abs().max() > 0.1
    for hook in hooks:
        hook.remove()
    execute(model, execution)
    torch.testing.assert_close(outputs(model, {"input_ids": IDS})[0], plain, atol=1e-4, rtol=1e-4)


def test_an_attention_implementation_that_we_do_not_read_is_left_whole() -> None:
    AttentionInterface.register("careful", sdpa_attention_forward)
    AttentionMaskInterface.register("careful", sdpa_mask)
    model = make_routed("llama")
    model.set_decision(Threshold(0.0))
    wanted = outputs(model, {"input_ids": IDS})[0]
    model.set_attn_implementation("careful")
    execute(model, "sparse")
    torch.testing.assert_close(outputs(model, {"input_ids": IDS})[0], wanted, atol=1e-4, rtol=1e-4)
    model.set_execution("sparse", "drop")
    with pytest.raises(InputError, match="careful"):
        outputs(model, {"input_ids": IDS})


@pytest.mark.slow
@pytest.mark.parametrize("execution", ["sparse", "native"])
def test_a_compiled_model_makes_new_decisions_for_each_call(execution: str) -> None:
    model = make_routed("llama")
    model.set_decision(Threshold(0.0))
    execute(model, execution)
    wanted = [outputs(model, {"input_ids": random_ids(1, 12, seed=seed)})[0] for seed in range(3)]
    compiled = torch.compile(model, backend="eager")
    for seed, one in enumerate(wanted):
        with torch.inference_mode():
            found = compiled(input_ids=random_ids(1, 12, seed=seed)).logits
        torch.testing.assert_close(found, one, atol=1e-4, rtol=1e-4)
