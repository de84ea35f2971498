"""Greedy text is the same with and without a cache, alone and as a row of a padded batch, whichever engine runs.

The model decides as its random routers say (threshold 0), so that every unit executes some tokens and approximates
others. A cache that never reaches a layer, positions that start anew or a mask that is dropped each change the text.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from tests.routed import execute, left_padded, make_routed
from tests.tiny import FAMILIES, random_ids

from informed_routing.models.families import native_families
from informed_routing.routing.decision import Threshold

PADS = (0, 3, 7)
LENGTH, NEW = 14, 12  # past the sliding window of 8 in the prompt and in what is generated
ENGINES = ("sparse", "sparse-drop", "masked", "native")

Text = list[list[int]]


@functools.cache
def _model(family: str) -> Any:
    # With an embedding that is also the head, Gemma's scaled residual stream would repeat its last token for ever.
    model = make_routed(family, eos_token_id=None, tie_word_embeddings=False)
    model.set_decision(Threshold(0.0))
    return model


def _use(model: Any, engine: str) -> None:
    kv = "drop" if engine == "sparse-drop" else "keep"
    model.routing_state.choose(kv=kv)
    execute(model, "sparse" if kv == "drop" else engine)


def _text(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None, **settings: Any) -> Text:
    settings = {"max_new_tokens": NEW, "do_sample": False, "attention_mask": mask, **settings}
    return model.generate(ids, **settings)[:, ids.shape[1] :].tolist()


def _alone(model: Any, **settings: Any) -> Text:
    """The text of each row without its padding, each in a call of its own."""
    ids = random_ids(len(PADS), LENGTH)
    return [_text(model, ids[row : row + 1, pad:], **settings)[0] for row, pad in enumerate(PADS)]


def _batch(model: Any, **settings: Any) -> Text:
    ids = random_ids(len(PADS), LENGTH)
    return _text(model, ids, left_padded(ids, PADS), **settings)


@functools.cache
def _wanted(family: str, kv: str) -> Text:
    """What the masked reference says of each row alone, computing the whole text anew for every token."""
    model = _model(family)
    _use(model, "masked")
    model.routing_state.choose(kv=kv)
    return _alone(model, use_cache=False)


def _cases() -> list[Any]:
    pairs = [(family, engine) for engine in ENGINES for family in FAMILIES]
    native = native_families("cpu")
    return [pytest.param(*pair, id="-".join(pair)) for pair in pairs if pair[1] != "native" or pair[0] in native]


@pytest.mark.parametrize(("family", "engine"), _cases())
def test_text_is_the_same_cached_uncached_and_in_a_batch(family: str, engine: str) -> None:
    model = _model(family)
    wanted = _wanted(family, "drop" if engine == "sparse-drop" else "keep")
    _use(model, engine)
    model.reset_routing_stats()
    assert _alone(model, use_cache=False) == wanted
    assert 0.2 < model.routing_stats()["units"] < 0.8, "the routers must choose, or nothing is tested"
    assert _alone(model) == wanted
    assert _batch(model) == wanted
    assert _batch(model, use_cache=False) == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_the_texts_would_show_a_lost_cache(family: str) -> None:
    """Were every token computed without what came before, the texts would be other ones."""
    model = _model(family)
    _use(model, "sparse")
    ids = random_ids(len(PADS), LENGTH)
    texts = _wanted(family, "keep")
    assert len({token for text in texts for token in text}) > 4
    for row, text in enumerate(texts):
        forgetful = []
        token = ids[row : row + 1, -1:]
        with torch.no_grad():
            for _ in range(NEW):
                token = model(token, use_cache=False).logits[:, -1:].argmax(-1)
                forgetful.append(int(token))
        assert forgetful != text
