from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tests.conftest import Demo

from informed_routing.assets import pack
from informed_routing.errors import InputError


class Letters:
    """A tokenizer of letters: a is 10, b is 11, ..."""

    def __init__(
        self, eos: int | None = 2, bos: int | None = None, adds_bos: bool = False, document_end: int | None = None
    ) -> None:
        self.eos_token_id, self.bos_token_id, self.adds_bos = eos, bos, adds_bos
        self.document_end = document_end

    def get_vocab(self) -> dict[str, int]:
        return {} if self.document_end is None else {"<|endoftext|>": self.document_end}

    def __call__(self, texts: str | list[str], add_special_tokens: bool = True, **_: object) -> dict[str, list]:
        if isinstance(texts, str):
            start = [self.bos_token_id] if self.adds_bos and add_special_tokens else []
            return {"input_ids": start + [ord(letter) - 87 for letter in texts]}
        return {"input_ids": [self(text, add_special_tokens)["input_ids"] for text in texts]}


def test_documents_are_joined_with_eos_and_the_rest_dropped() -> None:
    rows = pack(["abc", "d", "", "ef"], Letters(), 4)
    assert rows.dtype == torch.int64
    assert rows.tolist() == [[10, 11, 12, 2], [13, 2, 2, 14]]
    assert pack(["abc", "d"], Letters(eos=None), 2).tolist() == [[10, 11], [12, 13]]


def test_a_document_end_is_preferred_to_a_turn_end() -> None:
    assert pack(["abc", "d"], Letters(eos=2, document_end=7), 6).tolist() == [[10, 11, 12, 7, 13, 7]]


def test_rows_begin_as_the_tokenizer_begins_texts() -> None:
    assert pack(["abcd"], Letters(bos=1, adds_bos=True), 3).tolist() == [[1, 10, 11], [1, 12, 13]]
    assert pack(["abcd"], Letters(bos=1), 5).tolist() == [[10, 11, 12, 13, 2]]


def test_many_documents_give_the_same_as_one_pass() -> None:
    texts = ["abcdefg" * 10] * 2000
    rows = pack(iter(texts), Letters(), 16)
    stream = [token for text in texts for token in [*Letters()(text)["input_ids"], 2]]
    assert rows.flatten().tolist() == stream[: len(stream) // 16 * 16]


def test_too_little_text_is_an_input_error() -> None:
    with pytest.raises(InputError, match="4 tokens, less than one row of 8"):
        pack(["abc"], Letters(), 8)
    with pytest.raises(InputError, match="too short"):
        pack(["abc"], SimpleNamespace(), 1)


def test_demo_text_decodes_back(demo: Demo) -> None:
    texts = demo.texts("wiki", "calibration")[:20]
    rows = pack(texts, demo.tokenizer, 64)
    assert rows.shape[1] == 64
    joined = "<|endoftext|>".join(texts)
    assert joined.startswith(demo.tokenizer.decode(rows.flatten()))
