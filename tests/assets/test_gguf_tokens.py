"""Tokenizers in GGUF files: the ids of the tokenizer that the file was made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from tests.assets.gguf_files import TOKENS, byte_level, original, write
from tokenizers import Regex, pre_tokenizers

from informed_routing.assets import load_model, load_tokenizer
from informed_routing.assets.pre_tokenizers import PRE_TOKENIZERS, build
from informed_routing.errors import InputError

DIGITS = pre_tokenizers.Digits(individual_digits=True)
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
TEXTS = [
    "Steps:\n\n1. Boil water.\n\n2. Add tea.",
    "total:  42  apples, 1234567 or 3.14; I'LL we've",
    "x =\t7\n\n\n2024 was a year   \r\n  end ",
    "Ünïcödé ÉCOLE camelCase HTTPServer don't DON'T's",
    "\u4e2d\u6587\u548c123 \u0939\u093f\u0928\u094d\u0926\u0940 \u0661\u0662\u0663 \u2460 \U0001f600!!",
    "a/b//c -- ...?! <tag> $5+x^2~`|=>",
]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INFORMED_ROUTING_CACHE", str(tmp_path / "cache"))


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


# Expressions as the tokenizers' own files have them, written out.
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
RIGHT = {
    "gpt-2": GPT2,
    "olmo": GPT2,
    "smollm": pre_tokenizers.Sequence([DIGITS, GPT2]),
    "starcoder": pre_tokenizers.Sequence([DIGITS, GPT2]),
    "command-r": pre_tokenizers.Sequence([DIGITS, GPT2]),
    "llama-bpe": split(LLAMA3),
    "dbrx": split(LLAMA3),
    "qwen2": split(QWEN2),
    "deepseek-r1-qwen": split(QWEN2),
    "tekken": split(TEKKEN),
    "gpt-4o": split(GPT4O),
}


@pytest.mark.parametrize("name", RIGHT)
def test_text_is_cut_as_the_tokenizers_own_file_cuts_it(name: str) -> None:
    ours = build(PRE_TOKENIZERS[name], prefix_space=False)
    for text in TEXTS:
        assert ours.pre_tokenize_str(text) == RIGHT[name].pre_tokenize_str(text)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_cut_loses_nothing(name: str) -> None:
    ours = build(PRE_TOKENIZERS[name], prefix_space=False)
    for text in TEXTS:
        pieces = ours.pre_tokenize_str(text)
        assert "".join(piece for piece, _ in pieces) == "".join(piece for piece, _ in BYTES.pre_tokenize_str(text))


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("smollm", "in 2024", ["in", "\u0120", "2", "0", "2", "4"]),
        ("llama-bpe", "in 2024", ["in", "\u0120", "202", "4"]),
        ("qwen2", "in 2024", ["in", "\u0120", "2", "0", "2", "4"]),
        ("gpt-2", "in 2024", ["in", "\u01202024"]),
        ("falcon", "in 2024,", ["in", "\u0120", "202", "4", ","]),
        ("default", "in 2024,", ["in", "\u0120", "202", "4", ","]),
        ("deepseek-coder", "in 2024\n,", ["in", "\u0120", "2", "0", "2", "4", "\u010a", ","]),
        ("deepseek-v3", "in 2024 .x", ["in", "\u0120", "202", "4", "\u0120.", "x"]),
        ("bloom", "in, 2024", ["in", ",", "\u01202024"]),
        ("viking", "in, 2024", ["in", ",", "\u0120", "2", "0", "2", "4"]),
        ("seed-coder", "a!\n", ["a", "!", "\u010a"]),
        ("qwen2", "a!\n", ["a", "!\u010a"]),
    ],
)
def test_known_cuts(name: str, text: str, pieces: list[str]) -> None:
    ours = build(PRE_TOKENIZERS[name], prefix_space=False)
    assert [piece for piece, _ in ours.pre_tokenize_str(text)] == pieces


def tokenizer(path: Path, tokens: Callable[[GGUFWriter], Any], family: str = "llama", size: int = 400) -> Any:
    return load_tokenizer(write(original(family, vocab_size=size), path / "m.gguf", tokens=tokens))


def refused(path: Path, tokens: Callable[[GGUFWriter], Any], message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        tokenizer(path, tokens)
    assert "\n" not in str(caught.value)
    assert "m.gguf" in str(caught.value)


def with_keys(**keys: Any) -> Callable[[GGUFWriter], None]:
    def tokens(writer: GGUFWriter) -> None:
        byte_level(writer)
        for name, value in keys.items():
            if value is None:
                del writer.kv_data[0][f"tokenizer.ggml.{name}"]
                continue
            add: dict[type, Callable[[str, Any], None]] = {
                bool: writer.add_bool,
                int: writer.add_uint32,
                str: writer.add_string,
                list: writer.add_array,
            }
            writer.kv_data[0].pop(f"tokenizer.ggml.{name}", None)
            add[type(value)](f"tokenizer.ggml.{name}", value)

    return tokens


def test_flags_of_byte_level_tokenizers(tmp_path: Path) -> None:
    assert tokenizer(tmp_path, with_keys())("ab")["input_ids"] == [256]
    assert tokenizer(tmp_path, with_keys(pre="llama-bpe"))("ab")["input_ids"] == [257, 256]
    assert tokenizer(tmp_path, with_keys(pre="llama-bpe", add_bos_token=False))("ab")["input_ids"] == [256]
    both = tokenizer(tmp_path, with_keys(add_bos_token=True, add_eos_token=True))
    assert both("ab")["input_ids"] == [257, 256, 257]
    assert both("ab", add_special_tokens=False)["input_ids"] == [256]
    assert both("ab<|endoftext|>ab")["input_ids"] == [257, 256, 257, 256, 257]
    assert both.decode(both("ab caf\u00e9")["input_ids"], skip_special_tokens=True) == "ab caf\u00e9"
    spaced = tokenizer(tmp_path, with_keys(add_space_prefix=True))
    assert spaced.convert_ids_to_tokens(spaced("ab")["input_ids"]) == ["\u0120", "ab"]


def test_words_of_the_vocabulary_are_whole_where_the_tokenizer_says_so(tmp_path: Path) -> None:
    def tokens(writer: GGUFWriter) -> None:
        byte_level(writer, "llama-bpe")
        for key in ("tokens", "token_type"):
            del writer.kv_data[0][f"tokenizer.ggml.{key}"]
        writer.add_token_list([*TOKENS, "abc"])  # no merge leads to it
        writer.add_token_types([1] * 257 + [3, 1])
        writer.add_add_bos_token(False)

    assert tokenizer(tmp_path, tokens)("abc")["input_ids"] == [258]


def test_composed_text(tmp_path: Path) -> None:
    composed = tokenizer(tmp_path, with_keys(pre="qwen2"))
    assert composed("e\u0301")["input_ids"] == composed("\u00e9")["input_ids"]
    plain = tokenizer(tmp_path, with_keys(pre="llama-bpe"))
    assert plain("e\u0301")["input_ids"] != plain("\u00e9")["input_ids"]


def test_special_ids_ends_and_chat_template(tmp_path: Path) -> None:
    def tokens(writer: GGUFWriter) -> None:
        with_keys(eot_token_id=10, padding_token_id=11, unknown_token_id=12)(writer)
        writer.add_chat_template("{{ messages[0]['content'] }}")

    model, found = load_model(write(original(), tmp_path / "m.gguf", tokens=tokens), dtype="float32")
    assert (found.bos_token_id, found.eos_token_id, found.pad_token_id, found.unk_token_id) == (257, 257, 11, 12)
    assert model.generation_config.eos_token_id == [257, 10]
    assert model.config.pad_token_id == 11
    assert found.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (with_keys(pre="kimi-k2"), "pre-tokenizer 'kimi-k2' is not known.*original model as a folder"),
        (with_keys(pre="unheard-of"), "pre-tokenizer 'unheard-of'"),
        (with_keys(pre=None), "does not say how text is cut"),
        (with_keys(model="bert"), "kind 'bert'"),
        (with_keys(model="gemma4"), "kind 'gemma4'"),
        (with_keys(model=None), "kind None"),
        (with_keys(merges=None), "no merges"),
        (with_keys(merges=["ab"]), "'ab' is no merge of two tokens"),
        (with_keys(merges=["zz qq"]), "1 of its merges are of tokens that it does not have"),
        (with_keys(tokens=["a", "b", "a"]), "token 'a' occurs twice"),
        (with_keys(token_type=[1, 1]), "258 tokens, but 2 types"),
        (with_keys(bos_token_id=9999), "bos_token_id is 9999; it has 258 tokens"),
        (with_keys(add_bos_token=1), "add_bos_token is 1, not true or false"),
        (with_keys(add_sep_token=True), "add_sep_token"),
        (with_keys(unheard=1), r"what tokenizer\.ggml\.unheard should change"),
    ],
)
def test_what_is_not_known_is_refused_by_name(tokens: Any, message: str, tmp_path: Path) -> None:
    refused(tmp_path, tokens, message)


def test_more_tokens_than_embeddings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has 258 tokens, but the model only 200 embeddings"):
        tokenizer(tmp_path, byte_level, size=200)


PIECES = ["\u2581", *"abcdefgh", "\u2581a", "ab", "\u2581ab", "cd", "abcd", "\u2581abcd", "\u2581\u2581"]


def sentence_piece(**flags: bool) -> Callable[[GGUFWriter], None]:
    def tokens(writer: GGUFWriter) -> None:
        pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *PIECES]
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(pieces)
        writer.add_token_scores([-float(place) for place in range(len(pieces))])
        writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * len(PIECES))
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        for name, value in flags.items():
            writer.add_bool(f"tokenizer.ggml.{name}", value)

    return tokens


def test_sentence_piece(tmp_path: Path) -> None:
    """The ids of transformers' own Llama tokenizer with the same pieces, and texts come back."""
    ours = tokenizer(tmp_path, sentence_piece())
    shown = ours.convert_ids_to_tokens(ours("abcd h\u00e9")["input_ids"])
    assert shown == ["<s>", "\u2581abcd", "\u2581", "h", "<0xC3>", "<0xA9>"]
    assert ours.convert_ids_to_tokens(ours(" ab")["input_ids"]) == ["<s>", "\u2581", "\u2581ab"]
    for text in ("abcd h\u00e9  ab", "x</y> \u4e2d", " a"):
        assert ours.decode(ours(text)["input_ids"], skip_special_tokens=True) == text
    bare = tokenizer(tmp_path, sentence_piece(add_space_prefix=False, add_bos_token=False, add_eos_token=True))
    assert bare.convert_ids_to_tokens(bare("ab cd")["input_ids"]) == ["ab", "\u2581", "cd", "</s>"]
    refused(tmp_path, sentence_piece(remove_extra_whitespaces=True), "remove_extra_whitespaces")


def test_gemma_merges_by_place_and_runs_of_spaces(tmp_path: Path) -> None:
    def tokens(writer: GGUFWriter) -> None:
        pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "\n\n", "  ", "   ", "\u2581", "\n", "a", "b", "ba", "ab"]
        writer.add_tokenizer_model("llama")
        writer.add_token_list(pieces)
        writer.add_token_scores([float(place) for place in range(len(pieces))])  # the other way round
        writer.add_token_types([3, 3, 3, 2, 4, 4, 4] + [1] * 6)
        writer.add_bos_token_id(2)
        writer.add_eos_token_id(1)
        writer.add_add_space_prefix(False)

    ours = tokenizer(tmp_path, tokens, family="gemma2")
    assert ours("bab   a\n\n")["input_ids"] == [2, 11, 10, 6, 9, 4]
    assert ours.decode(ours("bab   a\n\nb  ")["input_ids"], skip_special_tokens=True) == "bab   a\n\nb  "


def test_the_saved_folder_loads_with_transformers_alone(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from informed_routing.assets.gguf import convert_gguf

    folder = convert_gguf(write(original(), tmp_path / "m.gguf", tokens=with_keys(pre="smollm")), tmp_path / "out")
    saved = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    assert [step["type"] for step in saved["pre_tokenizer"]["pretokenizers"]] == ["Digits", "ByteLevel"]
    assert AutoTokenizer.from_pretrained(folder)("ab12")["input_ids"] == load_tokenizer(folder)("ab12")["input_ids"]
