"""Numbers that are not finite end the work, wherever they are read, and the error says where they begin."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests.routed import make_routed
from tests.tiny import make_tiny, random_ids

from informed_routing.config.recipe import CalibrationConfig
from informed_routing.errors import InputError, WorkError
from informed_routing.evaluation.harness import _checked
from informed_routing.evaluation.harness_results import TaskResult
from informed_routing.evaluation.harness_scoring import log_likelihoods
from informed_routing.evaluation.numbers import FiniteLogits, exponential, not_finite
from informed_routing.evaluation.perplexity import page_perplexity, token_perplexity
from informed_routing.evaluation.workload import Request, measure_workload
from informed_routing.training.calibrate import calibrate


def broken(model: Any, layer: int = 1) -> Any:
    """The model with one weight that is not a number."""
    with torch.no_grad():
        model.model.layers[layer].mlp.down_proj.weight[3, 5] = math.nan
    return model


def overflowing() -> Any:
    """Weights fit float16, the products of layer 1 do not."""
    model = make_tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1e5)
    return model.half()


def test_perplexity_names_sequence_layer_and_format() -> None:
    with pytest.raises(WorkError, match=r"sequence 1 .* float16 \(first in layer 1 of 3\). float16 overflows"):
        token_perplexity(overflowing(), random_ids(3, 12))
    with pytest.raises(WorkError, match=r"first model.layers.2.mlp.down_proj.weight: get the checkpoint again"):
        token_perplexity(broken(make_tiny("llama"), 2), random_ids(3, 12))


def test_only_the_sequence_at_fault_is_named() -> None:
    model, rows = make_tiny("llama"), random_ids(5, 12)
    rows[3, 4] = 99
    with torch.no_grad():
        model.model.embed_tokens.weight[99] = math.inf
    with pytest.raises(WorkError, match="the loss of sequence 4 is not a finite number"):
        token_perplexity(model, rows, batch_size=2)
    rows[3, 4] = 98
    assert math.isfinite(token_perplexity(model, rows, batch_size=2).loss)


@pytest.mark.parametrize("execution", ["sparse", "masked", "native"])
def test_every_engine_stops(execution: Any) -> None:
    from tests.routed import execute

    model = broken(make_routed())
    execute(model, execution)
    with pytest.raises(WorkError, match="the loss of sequence 1"):
        token_perplexity(model, random_ids(2, 12))
    assert (model.routing_state.native is not None) == (execution == "native")  # looking for it changes nothing


def test_forbidden_tokens_are_no_fault() -> None:
    model, ids = make_tiny("llama"), random_ids(2, 5)
    check = FiniteLogits(model, 5)
    scores = torch.zeros(2, 128)
    scores[:, :127] = -math.inf
    assert torch.equal(check(ids, scores), scores)
    for bad in (math.nan, math.inf):
        scores[1, 3] = bad
        with pytest.raises(WorkError, match="a logit of new token 1"):
            check(ids, scores)
    with pytest.raises(WorkError):
        check(ids, torch.full((2, 128), -math.inf))


def test_looking_for_the_origin_never_hides_the_fault() -> None:
    class Opaque(torch.nn.Module):
        dtype = torch.bfloat16

        def get_decoder(self) -> Any:
            raise RuntimeError("no decoder")

    error = not_finite("the loss", make_tiny("llama"), random_ids(1, 4))
    assert "in the head" in str(error)
    assert "--dtype float32" in str(not_finite("the loss", Opaque(), random_ids(1, 4)))


def test_log_likelihoods_of_answers() -> None:
    pairs = [([3, 4, 5], [6]), ([3, 4, 5], [7, 8])]
    with pytest.raises(WorkError, match=r"the log-likelihood of answer \d is not a finite number"):
        log_likelihoods(broken(make_tiny("llama")), pairs, max_length=16, batch_size=2)


def test_a_measured_workload() -> None:
    model = broken(make_routed())
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3, 5] = 0.0
    model.model.embed_tokens.weight.data[99] = math.nan
    text = random_ids(1, 60)[0]
    text[text == 99] = 98
    good, bad = {"story": text}, {"story": torch.full_like(text, 99)}
    request = Request("story", 6, 2)
    assert measure_workload(model, good, [request], sparsity=0.0)[0].loss_tokens == 2
    for output in (2, 0):
        with pytest.raises(WorkError, match=r"the loss of prompt 1 \(story, dense\)"):
            measure_workload(model, bad, [Request("story", 6, output)], sparsity=0.0)


def test_calibration() -> None:
    model = make_routed()
    with torch.no_grad():
        model.units[3].router.outer.weight.fill_(math.nan)  # type: ignore[union-attr]
    with pytest.raises(WorkError, match="margins are not finite in float32, first of the ffn unit of layer 1"):
        calibrate(model, random_ids(4, 16), CalibrationConfig(targets=(0.2,)), "units")


def test_perplexities_that_cannot_be_written() -> None:
    assert exponential(2.0, "x") == math.exp(2.0)
    with pytest.raises(WorkError, match="e to the 800"):
        exponential(800.0, "token perplexity")

    class Letters:
        bos_token_id: int | None = None
        eos_token_id: int | None = 2

        def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
            return [3 + ord(letter) % 100 for letter in text]

    with pytest.raises(InputError, match="too few for a perplexity per word"):
        page_perplexity(make_tiny("llama"), Letters(), ["x" * 2000], 64)


def test_metrics_of_tasks() -> None:
    def result(**metrics: float) -> TaskResult:
        return TaskResult("boolq", 0, 1, metrics, 1.0)

    assert _checked(result(acc=1.0, acc_stderr=math.nan)).metrics == {"acc": 1.0}
    with pytest.raises(WorkError, match="acc of task boolq is nan"):
        _checked(result(acc=math.nan))


def test_scores_of_pruning() -> None:
    from informed_routing.baselines.static import prune

    with pytest.raises(WorkError, match=r"the score of layers.1 is not a finite number in float16 \(first in layer 1"):
        prune(overflowing(), "shortgpt", 0.34, random_ids(2, 12))


def test_slices_and_closed_forms() -> None:
    from informed_routing.baselines.static import prune
    from informed_routing.config.parts import ForecasterConfig
    from informed_routing.training.forecast import fit_closed_form

    with pytest.raises(WorkError, match="weights that are not finite numbers in float16"):
        prune(overflowing(), "slicegpt", 0.34, random_ids(2, 12))
    with pytest.raises(WorkError, match=r"the ffn unit of layer 1 is not a finite number in float32"):
        fit_closed_form(broken(make_routed()), random_ids(4, 16), ForecasterConfig(rank=8))
