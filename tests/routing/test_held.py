"""A rule that is held to its share in every text: every way to run a text decides alike, and the share is met."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

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
from torch import Tensor

from informed_routing.config.folder import RoutingConfig
from informed_routing.errors import InputError
from informed_routing.execution.gpu.engine import GpuEngine
from informed_routing.execution.history import class_of
from informed_routing.execution.rows import Rows
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.routing.decision import Threshold
from informed_routing.routing.dial import shares_by_unit
from informed_routing.routing.history import History
from informed_routing.routing.rules.held import GAIN, SOFT, Held

ENGINES = ("masked", "sparse", "native")
BASE = Threshold(0.1, ((1, 0.3), (9, -0.2)))


def held(model: RoutedModelForCausalLM, base: Threshold = BASE) -> Held:
    """A rule whose shares differ between units."""
    return Held(base, tuple(0.1 + 0.08 * (unit % 8) for unit in range(len(model.units))), gain=6.0)


def test_a_token_is_decided_by_what_is_owed_before_it() -> None:
    rule = Held(Threshold(0.0), (0.5,), gain=8.0)
    margins = torch.tensor([[0.1, 0.1, 0.1, 3.0, -0.1, -3.0]])
    history = History.empty(1, 1)
    logits = torch.stack([torch.zeros_like(margins), margins], dim=-1)
    contexts = torch.tensor([[0, 1, 2, 3, 4, 5]])  # the first is padding
    gates = rule.decide_after(logits, 0, contexts, history)
    # Limits are 0, 8 (.5 - 0) / 5 = .8, then one is approximated: 8 (1 - 1) / 6 = 0, 8 (1.5 - 1) / 7 = .57, ...
    assert gates[0, 1:].tolist() == [True, False, True, False, False]
    assert history.approximated.tolist() == [[3]]
    with pytest.raises(InputError, match="one after the other"):
        rule.decide_after(logits, 0, contexts, None)
    with pytest.raises(InputError, match="what came before"):
        rule(logits)


@pytest.mark.parametrize("shift", [-0.7, 0.0, 0.7])
def test_the_share_is_met_wherever_margins_lie(shift: float) -> None:
    generator = torch.Generator().manual_seed(2)
    margins = torch.randn(4, 300, generator=generator) + shift
    logits = torch.stack([torch.zeros_like(margins), margins], dim=-1)
    gates = Held(Threshold(0.0), (0.3,)).decide_after(
        logits, 0, torch.arange(1, 301).expand(4, -1), History.empty(1, 4)
    )
    for length in (64, 128, 300):
        shares = (~gates[:, :length]).float().mean(1)
        assert float((shares - 0.3).abs().max()) < 0.05  # by one threshold it would be 0.2 off
    # It is still those with the lowest margins that are approximated.
    assert float(margins[~gates].mean()) < float(margins[gates].mean()) - 0.7


@pytest.mark.parametrize("execution", ENGINES)
@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral"])
def test_cached_text_is_decided_as_a_whole_one(family: str, execution: str) -> None:
    model, ids = make_routed(family), random_ids(2, 24)
    execute(model, execution)
    model.set_decision(held(model))
    whole = gates_of(model, lambda: model(ids, use_cache=False))
    assert 0 < float(whole.float().mean()) < 1
    found, cache = decided_with_a_cache(model, ids)
    assert torch.equal(found, whole)
    assert torch.equal(cache.routing_history.approximated, (~whole).sum(2).int())


@pytest.mark.parametrize("execution", ENGINES)
def test_a_padded_sequence_is_decided_as_alone(execution: str) -> None:
    model = make_routed("llama")
    execute(model, execution)
    model.set_decision(held(model))
    assert torch.equal(*together_and_alone(model, random_ids(2, 20), 7))


def test_all_back_ends_agree() -> None:
    wanted, counted = logits_and_stats(held, "masked")
    for execution in ("sparse", "native"):
        logits, stats = logits_and_stats(held, execution)
        assert torch.allclose(logits, wanted, atol=1e-4)
        assert stats == counted


def test_a_text_goes_from_one_back_end_to_the_other() -> None:
    model, ids = make_routed("llama"), random_ids(2, 20)
    model.set_decision(held(model))
    execute(model, "masked")
    whole = gates_of(model, lambda: model(ids, use_cache=False))
    cache, parts = None, []
    for execution, low, high in (("sparse", 0, 6), ("native", 6, 11), ("masked", 11, 12), ("native", 12, 20)):
        execute(model, execution)
        with torch.inference_mode():
            cache = model(ids[:, low:high], past_key_values=cache, use_cache=True).past_key_values
        gates = model.routing_state.forward.gates
        parts.append(torch.stack([gates[i] for i in range(len(model.units))]))
    assert torch.equal(torch.cat(parts, dim=2), whole)


@pytest.mark.parametrize("execution", ["sparse", "native"])
def test_caches_take_their_history_with_them(execution: str) -> None:
    model, ids, last = make_routed("llama"), random_ids(2, 12), random_ids(2, 3, seed=5)
    execute(model, execution)
    model.set_decision(held(model))
    texts = torch.cat([ids[[1, 0]], last], dim=1)
    wanted = gates_of(model, lambda: model(texts, use_cache=False))[:, :, 12:]

    def begun() -> Any:
        with torch.inference_mode():
            return model(ids, use_cache=True).past_key_values

    def further(cache: Any) -> Tensor:
        return gates_of(model, lambda: model(last, past_key_values=cache, use_cache=True))

    swapped = begun()
    swapped.reorder_cache(torch.tensor([1, 0]))
    kept = copy.deepcopy(swapped)
    assert torch.equal(further(swapped), wanted)
    assert torch.equal(further(kept), wanted)  # its own, not what went on with the other
    picked = begun()
    picked.batch_select_indices(torch.tensor([1]))
    picked.batch_repeat_interleave(2)
    again = gates_of(model, lambda: model(last[[0, 0]], past_key_values=picked, use_cache=True))
    assert torch.equal(again, wanted[:, [0, 0]])
    from transformers import DynamicCache

    assert class_of(picked) is DynamicCache
    assert isinstance(picked, DynamicCache)


def test_a_followed_cache_can_be_pickled() -> None:
    model, ids = make_routed("llama"), random_ids(1, 8)
    execute(model, "sparse")
    model.set_decision(held(model))
    with torch.inference_mode():
        cache = model(ids, use_cache=True).past_key_values
        there = io.BytesIO()
        pickle.dump(cache, there)
        there.seek(0)
        back = pickle.load(there)
        one, other = (model(ids[:, :1], past_key_values=c, use_cache=True).logits for c in (cache, back))
    assert torch.equal(one, other)


def test_a_text_whose_beginning_is_not_known_is_refused() -> None:
    model, ids = make_routed("llama"), random_ids(2, 8)
    execute(model, "sparse")
    rule = held(model)
    with torch.inference_mode():
        for spoil in ("threshold", "crop", "batch"):
            model.set_decision(BASE if spoil == "threshold" else rule)
            cache = model(ids, use_cache=True).past_key_values
            model.set_decision(rule)
            if spoil == "crop":
                cache.crop(-2)
            with pytest.raises(InputError, match="does not know what was approximated"):
                model(ids[: 1 if spoil == "batch" else 2, :1], past_key_values=cache, use_cache=True)
        # One that was emptied begins anew.
        model.set_decision(rule)
        cache = model(ids, use_cache=True).past_key_values
        cache.reset()
        model.set_execution("sparse", kv="drop")
        with pytest.raises(InputError, match="kv='drop'"):
            model(ids)


@pytest.mark.parametrize("execution", ["sparse", "native"])
def test_generation_with_beams_and_samples(execution: str) -> None:
    model, ids = make_routed("llama"), random_ids(2, 9)
    execute(model, execution)
    model.set_decision(held(model))
    given: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    greedy = model.generate(ids, **given)
    with torch.inference_mode():
        for length in range(9, 17):  # as if there were no cache
            assert torch.equal(model(greedy[:, :length], use_cache=False).logits[:, -1].argmax(-1), greedy[:, length])
    beams = model.generate(ids, num_beams=3, **given)
    again = model.generate(ids, num_beams=3, use_cache=False, **given)
    assert torch.equal(beams, again)


def test_it_is_not_for_training_nor_for_texts_without_a_history() -> None:
    model, ids = make_routed("llama"), random_ids(1, 4)
    execute(model, "native")
    model.set_decision(held(model))
    with pytest.raises(InputError, match="not for training"):
        model.train()(ids)
    model.eval()
    engine = model.routing_state.native.of(model)
    embeddings = model.decoder.embed_tokens(ids).detach()
    rope = model.decoder.rotary_emb(embeddings, position_ids=torch.arange(4)[None])
    rows = Rows(torch.zeros(1, dtype=torch.int32), None)
    with pytest.raises(InputError, match="needs the history"):
        engine.forward(embeddings, rope, rows, None, model.routing_state, model.stats)


class Every(Held):
    """A held rule of one's own, of which engines know nothing."""

    holding = None  # type: ignore[assignment]

    def decide_after(self, logits: Tensor, unit: int, contexts: Tensor | None, history: History | None) -> Tensor:
        return torch.ones(logits.shape[:-1], dtype=torch.bool)


def test_rules_of_ones_own_are_left_to_torch() -> None:
    model, ids = make_routed("llama"), random_ids(1, 6)
    execute(model, "native")
    model.set_decision(Every(BASE, held(model).shares))
    with torch.inference_mode():
        assert not model.runs_native
    assert bool(gates_of(model, lambda: model(ids)).all())


@pytest.mark.parametrize("execution", ENGINES)
def test_shares_for_another_number_of_units_are_refused(execution: str) -> None:
    model = make_routed("llama")
    execute(model, execution)
    for shares in ((0.2,) * (len(model.units) - 1), (0.2,) * (len(model.units) + 1)):
        model.set_decision(Held(BASE, shares))
        with torch.inference_mode(), pytest.raises(InputError, match="shares are held"):
            model(random_ids(1, 4))


def test_a_policy_that_executes_more_does_not_hold() -> None:
    model = make_routed("llama")
    execute(model, "native", policy="auto")
    model.set_decision(held(model))
    with torch.inference_mode(), pytest.raises(InputError, match="policy='auto'"):
        model(random_ids(1, 4))


def test_engines_without_such_rules_refuse_them() -> None:
    model, ids = make_routed("llama"), random_ids(1, 4)
    engine = GpuEngine(model)
    assert not engine.holds
    embeddings = model.decoder.embed_tokens(ids)
    rope = model.decoder.rotary_emb(embeddings, position_ids=torch.arange(4)[None])
    rows, history = Rows(torch.zeros(1, dtype=torch.int32), None), History.empty(engine.units, 1)
    with pytest.raises(InputError, match="no held rules"):
        engine.forward(embeddings, rope, rows, None, model.routing_state, model.stats, history=history)


def test_the_dial_interpolates_the_shares_of_units() -> None:
    model = make_routed("llama")
    units = len(model.units)
    ends = [0.2 * (unit % 4) for unit in range(units)]
    config = with_table(
        model, threshold_row(0.0, -4.0, by_unit=(0.0,) * units), threshold_row(0.4, 0.0, by_unit=tuple(ends))
    )
    assert shares_by_unit(config, 0.1) == pytest.approx([end / 4 for end in ends])
    model.set_sparsity(0.2, decision="held")
    rule = model.routing_state.decision
    assert isinstance(rule, Held)
    assert rule.base == Threshold(-2.0)
    assert rule.shares == pytest.approx([end / 2 for end in ends])
    assert (rule.gain, SOFT) == (GAIN, 4.0)


def test_tables_of_earlier_versions_are_refused() -> None:
    model = make_routed("llama")
    with_table(model, threshold_row(0.0, -4.0), threshold_row(0.4, 0.0))
    model.set_sparsity(0.2)
    with pytest.raises(InputError, match="earlier version"):
        model.set_sparsity(0.2, decision="held")


def test_shares_that_are_none_are_refused() -> None:
    with pytest.raises(InputError, match="no share"):
        Held(Threshold(), (0.2, 1.2))
    with pytest.raises(InputError, match="gain"):
        Held(Threshold(), (0.2,), gain=-1.0)
    model = make_routed("llama")
    content = with_table(model, threshold_row(0.0, -4.0), threshold_row(0.4, 0.0)).model_dump()
    for wrong in ((0.2,), (1.5,) * len(model.units)):
        content["thresholds"][1]["by_unit"] = wrong
        with pytest.raises(ValueError, match="by_unit"):
            RoutingConfig.model_validate(content)
