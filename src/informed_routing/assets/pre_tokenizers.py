"""How byte-level BPE tokenizers cut text before merging: the names that GGUF files have for it.

The expressions are those of the tokenizers themselves (of their `tokenizer.json`, where it is known), the names
those of llama.cpp. A name that is not here is refused: another cut gives other token ids, without a word.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_SHORT}|{_WORD}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_SHORT}|{_WORD}|\p{{N}}|{_REST}"
_QWEN35 = (
    rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SEED = rf"{_SHORT}|{_WORD}|\p{{N}}{{1}}| ?[^\s\p{{L}}\p{{N}}\r\n]+|\s*[\r\n]+|\s+(?!\S)|\s+"
_EXAONE_MOE = (
    rf"{_SHORT}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
)
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ANY = r"[^\r\n\p{L}\p{N}]?"
_SLASHED = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = rf"{_ANY}{_UPPER}*{_LOWER}+|{_ANY}{_UPPER}+{_LOWER}*|\p{{N}}|{_SLASHED}"
_GPT4O = rf"{_ANY}{_UPPER}*{_LOWER}+{_SHORT}?|{_ANY}{_UPPER}+{_LOWER}*{_SHORT}?|\p{{N}}{{1,3}}|{_SLASHED}"
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_DIGITS = r"\p{N}"
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
_DEEPSEEK_CODER = (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+", _DIGITS)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)


@dataclass(frozen=True)
class PreTokenizer:
    """Expressions applied one after the other, each to the pieces that the last one left."""

    patterns: tuple[str, ...]
    whole_words: bool = False
    """Words of the vocabulary are taken whole, before any merge (`ignore_merges`)."""
    starts: bool = False
    """Texts begin with the beginning-of-text token unless the file says otherwise."""
    composed: bool = False
    """Text is composed first (Unicode NFC)."""


def _table() -> dict[str, PreTokenizer]:
    found: dict[str, PreTokenizer] = {}

    def add(names: str, *patterns: str, **options: bool) -> None:
        found.update(dict.fromkeys(names.split(), PreTokenizer(patterns, **options)))

    add("default", *_DEFAULT)
    add("gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert", _GPT2)
    add("jais trillion granite-docling exaone4", _GPT2)
    add("mpt olmo", _GPT2, composed=True)
    add("starcoder refact codeshell smollm exaone minerva-7b mellum2", _DIGITS, _GPT2)
    add("command-r", _DIGITS, _GPT2, composed=True)
    llama3 = "llama3 llama-v3 llama-bpe falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano"
    add(llama3, _LLAMA3, whole_words=True, starts=True)
    add("dbrx smaug-bpe chatglm-bpe glm4", _LLAMA3)
    add("qwen2", _QWEN2, composed=True)
    add("qwen35", _QWEN35, composed=True)
    add("deepseek-r1-qwen kormo f2llmv2 megrez hunyuan solar-open stablelm2 grok-2", _QWEN2)
    add("deepseek-coder", *_DEEPSEEK_CODER)
    add("deepseek-v3 hunyuan-dense joyai-llm", *_DEEPSEEK3)
    add("falcon", *_FALCON)
    add("poro-chat bloom gpt3-finnish", _BLOOM)
    add("viking", _BLOOM, _DIGITS)
    add("tekken", _TEKKEN, whole_words=True, starts=True)
    add("gpt-4o llama4 kanana2 talkie minimax-m2", _GPT4O)
    add("seed-coder", _SEED)
    add("exaone-moe", _EXAONE_MOE)
    return found


PRE_TOKENIZERS = _table()


def build(chosen: PreTokenizer, prefix_space: bool) -> Any:
    """The `tokenizers` pre-tokenizer: the cuts, then bytes as characters."""
    from tokenizers import Regex, pre_tokenizers

    *cuts, last = chosen.patterns
    inside = last == _GPT2  # the byte-level step has GPT-2's own expression
    steps: list[Any] = [
        pre_tokenizers.Digits(individual_digits=True)
        if pattern == _DIGITS
        else pre_tokenizers.Split(Regex(pattern), "isolated")
        for pattern in (cuts if inside else chosen.patterns)
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=inside))
    return pre_tokenizers.Sequence(steps)
