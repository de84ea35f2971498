"""Settings stand apart from the record of a forward, and change only by choice or for a block."""

from __future__ import annotations

import pytest
import torch
from tests.routed import make_routed
from tests.tiny import random_ids

from informed_routing.errors import InputError
from informed_routing.routing.decision import AlwaysExecute, Threshold
from informed_routing.routing.state import RoutingState


@pytest.mark.parametrize("name", ["decision", "execution", "kv", "native", "observer", "record_margins"])
def test_no_setting_can_be_assigned(name: str) -> None:
    state = RoutingState()
    with pytest.raises(AttributeError):
        setattr(state, name, None)
    with pytest.raises(AttributeError):
        setattr(state.settings, name, None)


def test_a_block_gives_back_what_it_changed_and_leaves_what_was_chosen_in_it() -> None:
    state = RoutingState()

    def fail() -> None:
        with state.using(decision=Threshold(0.5), record_margins=True):
            state.choose(kv="drop", decision=Threshold(0.7))
            assert (state.decision, state.record_margins) == (Threshold(0.7), True)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (state.decision, state.record_margins, state.kv) == (AlwaysExecute(), False, "drop")


def test_what_is_no_rule_is_refused_and_a_function_of_the_logits_is_one() -> None:
    state = RoutingState()
    with pytest.raises(InputError, match=r"0\.5 is no decision rule"):
        state.choose(decision=0.5)
    state.choose(decision=lambda logits: logits[..., 1] > 0)
    assert state.decision.threshold is None  # engines leave it to torch
    assert not state.decision.dense


def test_each_forward_has_a_record_of_its_own() -> None:
    model = make_routed("llama")
    model.set_decision(Threshold(0.0))
    model.eval()
    with torch.no_grad():
        model(random_ids(1, 5))
        first = model.routing_state.forward
        model(random_ids(1, 7))
    assert first.gates[0].shape == (1, 5)
    assert model.routing_state.forward.gates[0].shape == (1, 7)
