"""Log-likelihoods are those of one sequence at a time, however they are batched, and padding counts for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.routed import execute, make_routed
from tests.tiny import make_tiny

from informed_routing.errors import InputError
from informed_routing.evaluation.harness_scoring import distinct, log_likelihoods, may_share
from informed_routing.routing.decision import Given, Threshold

Pair = tuple[list[int], list[int]]


def tokens(count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 128, (count,), generator=generator).tolist()


def questions() -> list[Pair]:
    """Three with a long text and four answers each, one short, one whose answers change the text, one alone."""
    pairs: list[Pair] = []
    for number, length in enumerate((60, 75, 90)):
        context = tokens(length, number)
        pairs += [(context, tokens(count, 10 * number + count)) for count in (1, 4, 2, 7)]
    pairs += [(tokens(9, 50), tokens(count, 60 + count)) for count in (3, 5)]
    common = tokens(70, 70)
    pairs += [([*common, *tokens(3, 71 + seed)], tokens(6, 80)) for seed in (0, 1)]
    return [*pairs, (tokens(33, 90), tokens(8, 91))]


def naive(model: Any, pairs: list[Pair], max_length: int = 256) -> list[tuple[float, bool]]:
    """Each pair by itself, by the definition."""
    found = []
    for context, continuation in pairs:
        ids = (context + continuation)[-(max_length + 1) :]
        with torch.inference_mode():
            scores = model(input_ids=torch.tensor([ids[:-1]]), use_cache=False).logits[0].log_softmax(-1)
        scores = scores[-len(continuation) :]
        chosen = [float(scores[place, token]) for place, token in enumerate(continuation)]
        found.append((sum(chosen), scores.argmax(-1).tolist() == continuation))
    return found


def score(model: Any, pairs: list[Pair], batch_size: int = 4, max_length: int = 256) -> list[tuple[float, bool]]:
    return log_likelihoods(model, pairs, max_length=max_length, batch_size=batch_size)


def check(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], rel=1e-4, abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3_text", "qwen3", "phi3"])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_dense_models_of_every_kind_of_attention(family: str, batch_size: int) -> None:
    model = make_tiny(family)
    check(score(model, questions(), batch_size), naive(model, questions()))


@pytest.mark.parametrize("execution", ["sparse", "masked", "native"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_routed_models_with_every_engine(execution: Any, batch_size: int) -> None:
    reference = make_routed()
    reference.set_decision(Threshold(0.1))
    expected = naive(reference, questions())
    model = make_routed()
    model.set_decision(Threshold(0.1))
    execute(model, execution)
    check(score(model, questions(), batch_size), expected)
    assert 0.1 < model.routing_stats()["units"] < 0.9


@pytest.mark.parametrize("execution", ["sparse", "native"])
def test_padding_is_neither_computed_nor_counted(execution: Any) -> None:
    """Unlike lengths in one batch, nothing shared: the counts are those of the sequences one by one."""
    pairs = [(tokens(length, length), tokens(3, length + 1)) for length in (5, 9, 21, 22, 40)]
    counts = []
    for batch_size in (1, 2, 5):
        model = make_routed()
        model.set_decision(Threshold(0.1))
        execute(model, execution)
        score(model, pairs, batch_size)
        stats = model.routing_stats()
        assert stats["tokens"] == sum(len(context) + len(continuation) - 1 for context, continuation in pairs)
        counts.append([stats[key] for key in ("units", "attention", "ffn", "macs")])
    assert counts[1] == pytest.approx(counts[0])
    assert counts[2] == pytest.approx(counts[0])


def test_a_shared_text_is_computed_once() -> None:
    model = make_routed()
    model.set_decision(Threshold(0.1))
    context = tokens(100, 1)
    pairs = [(context, tokens(count, count)) for count in (2, 3, 4, 5)]
    score(model, pairs)
    # all but the last token of the text, which gives the first output of each answer, then the answers
    assert model.routing_stats()["tokens"] == 99 + 2 + 3 + 4 + 5


def test_what_looks_at_the_whole_sequence_shares_nothing() -> None:
    model = make_routed()
    assert may_share(model)
    assert may_share(make_tiny("llama"))
    model.set_decision(Threshold(0.0))
    assert may_share(model)
    model.set_execution("sparse", kv="drop")
    assert not may_share(model)
    model.set_execution("sparse", kv="keep")
    model.set_decision(Given(torch.ones(1, 1, dtype=torch.bool)))
    assert not may_share(model)
    pairs = questions()
    score(model, pairs)
    unique = {tuple(context + continuation[:-1]) for context, continuation in pairs}
    assert model.routing_stats()["tokens"] == sum(map(len, unique))


def test_equal_inputs_are_computed_once_and_equal_answers_are_worth_the_same() -> None:
    model, context = make_tiny("llama"), tokens(80, 3)
    pairs = [(context, [5]), (context, [6]), (context, [7, 8]), (context, [7, 8]), (context, [7])]
    assert distinct(pairs) == 2
    found = score(model, pairs)
    assert found[2] == found[3]
    check(found, naive(model, pairs))


def test_long_texts_lose_their_beginning() -> None:
    model = make_tiny("llama")
    pairs = [(tokens(100, 1), tokens(5, 2)), (tokens(100, 1), tokens(2, 3)), (tokens(3, 4), tokens(2, 5))]
    check(score(model, pairs, max_length=20), naive(model, pairs, max_length=20))
    with pytest.raises(InputError, match="21 tokens"):
        score(model, [(tokens(3, 1), tokens(21, 2))], max_length=20)
    with pytest.raises(InputError, match="0 tokens"):
        score(model, [(tokens(3, 1), [])])


def test_greedy_answers_are_recognised() -> None:
    model, context = make_tiny("llama"), tokens(30, 8)
    with torch.inference_mode():
        ids = model.generate(torch.tensor([context]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    answer = ids[0, 30:].tolist()
    other = [*answer[:2], (answer[2] + 1) % 128]
    assert [greedy for _, greedy in score(model, [(context, answer), (context, other)])] == [True, False]
