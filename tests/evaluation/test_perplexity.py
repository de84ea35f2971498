"""Perplexity equals what its definition gives when written out naively."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch
from tests.tiny import FAMILIES, make_tiny, random_ids

from informed_routing.errors import InputError
from informed_routing.evaluation import perplexity
from informed_routing.evaluation.perplexity import (
    merge_stats,
    page_perplexity,
    page_windows,
    sparsity_record,
    token_perplexity,
    wikitext_detokenize,
)


def naive_loss(model: Any, inputs: list[int], targets: list[int]) -> float:
    """Summed negative log likelihood of the last len(targets) positions of one sequence."""
    with torch.inference_mode():
        logits = model(torch.tensor([inputs])).logits[0].double()
    chosen = logits.log_softmax(-1)[-len(targets) :]
    return -sum(float(chosen[i, target]) for i, target in enumerate(targets))


class CharacterTokenizer:
    """Letters as ids from 3 on; 2 ends a text."""

    bos_token_id: int | None = None
    eos_token_id: int | None = 2

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens
        return [3 + ord(letter) % 100 for letter in text]


@pytest.mark.parametrize("family", FAMILIES)
def test_token_perplexity_is_the_naive_one_in_every_family(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perplexity, "HEAD_ROWS", 7)  # chunks that end inside of sequences
    model, rows = make_tiny(family), random_ids(3, 20)
    expected = sum(naive_loss(model, row[:-1], row[1:]) for row in rows.tolist()) / (3 * 19)
    result = token_perplexity(model, rows, batch_size=2)
    assert result.tokens == 3 * 19
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.token_perplexity == pytest.approx(math.exp(expected), rel=1e-4)
    assert result.stats is None


def test_token_perplexity_equals_the_loss_of_transformers() -> None:
    model, rows = make_tiny("llama"), random_ids(4, 16)
    with torch.inference_mode():
        expected = float(model(rows, labels=rows).loss)
    assert token_perplexity(model, rows).loss == pytest.approx(expected, rel=1e-5)


def test_batch_size_does_not_matter_and_nothing_is_random() -> None:
    model, rows = make_tiny("llama").train(), random_ids(5, 16)
    results = [token_perplexity(model, rows, size).loss for size in (1, 2, 5)]
    assert results == pytest.approx([results[0]] * 3, rel=1e-6)
    assert token_perplexity(model, rows, 2).loss == token_perplexity(model, rows, 2).loss
    assert model.training


def test_a_head_with_a_tail_that_we_do_not_know_falls_back_to_the_models_own_logits() -> None:
    model, rows = make_tiny("llama"), random_ids(2, 12)
    original = model.forward

    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        output.logits = output.logits * 0.25
        return output

    model.forward = scaled
    expected = sum(naive_loss(model, row[:-1], row[1:]) for row in rows.tolist()) / (2 * 11)
    assert token_perplexity(model, rows).loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("shape", [(0, 8), (3, 1)])
def test_rows_with_nothing_to_predict_are_refused(shape: tuple[int, int]) -> None:
    with pytest.raises(InputError):
        token_perplexity(make_tiny("llama"), torch.zeros(shape, dtype=torch.long))


def test_routed_models_report_what_they_approximated() -> None:
    from informed_routing import RoutedModelForCausalLM
    from informed_routing.routing.decision import Given

    rows = random_ids(3, 20)
    dense = token_perplexity(make_tiny("llama"), rows, batch_size=2)
    routed: Any = RoutedModelForCausalLM.attach(make_tiny("llama"))
    assert token_perplexity(routed, rows, batch_size=2).loss == dense.loss
    routed.set_decision(Given(torch.zeros(1, 1, dtype=torch.bool)))
    result = token_perplexity(routed, rows, batch_size=2)
    assert result.loss != dense.loss
    assert result.stats is not None
    assert (result.stats["units"], result.stats["tokens"]) == (1.0, 60)


def test_page_perplexity_is_the_definition_of_lm_eval() -> None:
    """Windows of at most max_length tokens; each token predicted once; words counted as given."""
    model, tokenizer = make_tiny("llama"), CharacterTokenizer()
    pages = ["the old town , it stands @-@ here", "a river", "x" * 25]
    total, tokens = 0.0, 0
    for page in pages:
        ids = tokenizer.encode(wikitext_detokenize(page), add_special_tokens=False)
        context = [2, *ids]
        for start in range(0, len(ids), 8):
            end = min(start + 8, len(ids))
            total += naive_loss(model, context[max(end - 8, 0) : end], ids[start:end])
            tokens += end - start
    words = sum(len(re.split(r"\s+", page)) for page in pages)
    result = page_perplexity(model, tokenizer, pages, max_length=8, batch_size=3)
    assert (result.words, result.tokens, result.pages) == (words, tokens, 3)
    assert result.word_perplexity == pytest.approx(math.exp(total / words), rel=1e-4)
    assert result.token_perplexity == pytest.approx(math.exp(total / tokens), rel=1e-4)


def test_page_windows_are_those_of_lm_eval() -> None:
    utils = pytest.importorskip("lm_eval.utils")
    for length in (1, 7, 8, 9, 24, 30):
        ids = list(range(10, 10 + length))
        pairs = utils.get_rolling_token_windows(ids, prefix_token=2, max_seq_len=8, context_len=1)
        expected = []
        for context, targets in map(utils.make_disjoint_window, pairs):
            # lm-eval feeds all but the last token, and scores the continuation
            inputs = (context + targets)[:-1]
            expected.append((inputs, [-100] * (len(inputs) - len(targets)) + targets))
        assert list(page_windows(ids, 2, 8)) == expected


def test_detokenizer_is_that_of_lm_eval() -> None:
    task = pytest.importorskip("lm_eval.tasks.wikitext.preprocess_wikitext")
    pages = [
        ' \n = Robert <unk> = \n \n He said : " well , 3 @,@ 500 @.@ 5 boys \' toys " ( the end ) . \n ',
        "a ; b ! c ? d [ x ] { y } ' z ' 12 \N{DEGREE SIGN} N \n = = A = = \n = = = B = = = \n = = = = C",
        "",
    ]
    for page in pages:
        assert wikitext_detokenize(page) == task.wikitext_detokenizer({"page": page})


def test_pages_without_text_or_tokenizer_without_special_token() -> None:
    tokenizer = CharacterTokenizer()
    with pytest.raises(InputError, match="no text"):
        page_perplexity(make_tiny("llama"), tokenizer, [""], 8)
    tokenizer.eos_token_id = None
    with pytest.raises(InputError, match="tokenizer"):
        page_perplexity(make_tiny("llama"), tokenizer, ["a"], 8)


def test_stats_of_several_texts_are_weighted_by_tokens() -> None:
    one = {"target": 0.25, "tokens": 100, "units": 0.2, "attention": 0.4, "ffn": 0.0, "macs": 0.1}
    two = {"target": 0.25, "tokens": 300, "units": 0.4, "attention": 0.4, "ffn": 0.4, "macs": 0.3}
    merged = merge_stats([one, two])
    assert merged is not None
    assert merged["units"] == pytest.approx(0.35)
    assert merged["ffn"] == pytest.approx(0.3)
    assert sparsity_record(merged, 0.25)["macs"] == pytest.approx(0.25)
    assert merge_stats([]) is None
    assert sparsity_record(None, 0.0) == {
        "target": 0.0,
        "units": 0.0,
        "attention": 0.0,
        "ffn": 0.0,
        "macs": 0.0,
    }
