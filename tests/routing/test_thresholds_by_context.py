"""Thresholds that depend on how much a token sees: every way to run a text decides alike."""

from __future__ import annotations

import pytest
import torch
from tests.routed import (
    decided_with_a_cache,
    execute,
    gates_of,
    logits_and_stats,
    make_routed,
    threshold_row,
    together_and_alone,
    with_table,
)
from tests.tiny import random_ids

from informed_routing.errors import InputError
from informed_routing.execution.gpu.engine import GpuEngine
from informed_routing.execution.rows import Rows
from informed_routing.routing.decision import Threshold
from informed_routing.routing.dial import threshold_for, thresholds_by_context

RULE = Threshold(0.0, ((1, 0.9), (3, -0.4), (9, 0.3), (17, -0.2)))
ENGINES = ("masked", "sparse", "native")
LAST = threshold_row(0.4, 0.0, by_context=((1, 1.0), (9, -1.0)))


def test_a_token_is_decided_by_the_range_that_its_context_is_in() -> None:
    contexts = torch.tensor([[0, 1, 2, 3, 8, 9, 16, 17, 1000]])
    assert RULE.limits(contexts)[0].tolist() == pytest.approx([0.9, 0.9, 0.9, -0.4, -0.4, 0.3, 0.3, -0.2, -0.2])
    logits = torch.stack([torch.zeros(1, 9), torch.full((1, 9), 0.1)], dim=-1)
    assert RULE.decide(logits, 0, contexts)[0].tolist() == [False, False, False, True, True, False, False, True, True]
    with pytest.raises(InputError, match="differs between contexts"):
        RULE(logits)


@pytest.mark.parametrize("contexts", [(2, 5), (1, 5, 5), (1, 9, 5)])
def test_ranges_that_are_none_are_refused(contexts: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="no ranges"):
        Threshold(0.0, tuple((context, 0.1) for context in contexts))


def test_one_threshold_for_all_contexts_is_the_plain_rule() -> None:
    plain = Threshold(0.25)
    assert plain.threshold == 0.25
    assert plain.limits(torch.ones(2, 3)).tolist() == [[0.25] * 3] * 2
    assert RULE.threshold is None
    assert RULE.by_margin


@pytest.mark.parametrize("execution", ENGINES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_cached_text_is_decided_as_a_whole_one(family: str, execution: str) -> None:
    model, ids = make_routed(family), random_ids(2, 24)
    execute(model, execution)
    model.set_decision(RULE)
    whole = gates_of(model, lambda: model(ids, use_cache=False))
    assert 0 < float(whole.float().mean()) < 1
    assert torch.equal(decided_with_a_cache(model, ids)[0], whole)


@pytest.mark.parametrize("execution", ENGINES)
def test_a_padded_sequence_is_decided_as_alone(execution: str) -> None:
    model = make_routed("llama")
    execute(model, execution)
    model.set_decision(RULE)
    assert torch.equal(*together_and_alone(model, random_ids(2, 20), 7))


def test_all_back_ends_agree() -> None:
    wanted, counted = logits_and_stats(lambda _: RULE, "masked")
    for execution in ("sparse", "native"):
        logits, stats = logits_and_stats(lambda _: RULE, execution)
        assert torch.allclose(logits, wanted, atol=1e-4)
        assert stats == counted


def test_the_native_engine_runs_the_rule_itself() -> None:
    model = make_routed("llama")
    execute(model, "native")
    model.set_decision(RULE)
    with torch.inference_mode():
        assert model.runs_native


@pytest.mark.parametrize("length", [1, 12])
def test_the_gpu_engine_decides_as_the_reference(length: int) -> None:
    model, past = make_routed("llama"), random_ids(2, 10, seed=1)
    model.set_decision(RULE)
    engine, ids = GpuEngine(model), random_ids(2, length)
    pads = torch.tensor([0, 3], dtype=torch.int32)
    mask = torch.ones(2, 10 + length, dtype=torch.long)
    mask[1, :3] = 0
    model.set_execution("masked")
    with torch.inference_mode():
        cache = model(past, attention_mask=mask[:, :10], use_cache=True).past_key_values
        model(ids, attention_mask=mask, past_key_values=cache)
        wanted = dict(model.routing_state.forward.gates)
        from transformers import DynamicCache

        own = DynamicCache(config=model.config)
        valid = mask[:, :10].to(torch.uint8)
        for tokens, rows, start in ((past, Rows(pads, valid), 0), (ids, Rows(pads, None), 10)):
            embeddings = model.decoder.embed_tokens(tokens)
            places = torch.arange(start, start + tokens.shape[1])[None].expand(2, -1) - pads[:, None]
            rope = model.decoder.rotary_emb(embeddings, position_ids=places.clamp(min=0))
            engine.forward(embeddings, rope, rows, own, model.routing_state, model.stats)
        found = model.routing_state.forward.gates
    for unit, gate in wanted.items():
        assert torch.equal(found[unit], gate), unit


def test_the_dial_interpolates_each_range() -> None:
    model = make_routed("llama")
    config = with_table(model, threshold_row(0.0, -4.0, by_context=((1, -3.0), (9, -5.0))), LAST)
    assert threshold_for(config, 0.1) == pytest.approx(-3.0)
    assert thresholds_by_context(config, 0.1) == ((1, pytest.approx(-2.0)), (9, pytest.approx(-4.0)))
    model.set_sparsity(0.2)
    assert model.routing_state.decision == Threshold(-2.0, ((1, -1.0), (9, -3.0)))


def test_rows_of_one_threshold_go_with_others() -> None:
    config = with_table(make_routed("llama"), threshold_row(0.0, -4.0), LAST)
    assert thresholds_by_context(config, 0.2) == ((1, -1.5), (9, -2.5))


def test_a_table_without_contexts_gives_the_plain_rule() -> None:
    model = make_routed("llama")
    with_table(model, threshold_row(0.0, -4.0), threshold_row(0.4, 0.0))
    model.set_sparsity(0.2)
    assert model.routing_state.decision == Threshold(-2.0)
