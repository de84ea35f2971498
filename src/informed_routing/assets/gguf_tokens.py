"""The tokenizer in a GGUF file, as a transformers tokenizer with the same ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from informed_routing.assets.pre_tokenizers import PRE_TOKENIZERS, PreTokenizer, build
from informed_routing.errors import InputError

if TYPE_CHECKING:
    from informed_routing.assets.gguf_file import GgufModel

_REMEDY = "Give the original model as a folder, with its tokenizer"
_NORMAL, _UNKNOWN, _CONTROL, _USER, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6
_SPACE = "\u2581"
_IDS = ("bos", "eos", "unknown", "padding", "eot", "eom", "seperator", "mask", "cls")
_READ = {
    *("model", "pre", "tokens", "token_type", "scores", "merges"),
    *("add_bos_token", "add_eos_token", "add_sep_token", "add_space_prefix", "remove_extra_whitespaces"),
    *(f"{name}_token_id" for name in _IDS),
}
# What only infilling, embedding models or other programs ask for.
_ASIDE = {
    *(f"fim_{name}_token_id" for name in ("pre", "suf", "mid", "pad", "rep", "sep")),
    *(f"{name}_token_id" for name in ("prefix", "suffix", "middle")),
    "token_type_count",
    "eog_token_ids",
}


@dataclass(frozen=True)
class GgufTokenizer:
    """A transformers tokenizer, and the ids that end a text."""

    tokenizer: Any
    ends: list[int]

    def settings(self) -> dict[str, Any]:
        """Special ids for a model's settings: absent ones are None, never a class's default."""
        return {
            "bos_token_id": self.tokenizer.bos_token_id,
            "eos_token_id": self.ends[0] if self.ends else None,
            "pad_token_id": self.tokenizer.pad_token_id,
        }


def read_tokenizer(model: GgufModel, vocabulary: int) -> GgufTokenizer:
    """The tokenizer of a file for a model of `vocabulary` embeddings.

    Raises `InputError` for a kind or a pre-tokenizer that is not known, and for ids beyond the embeddings.
    """
    return _Reader(model).build(vocabulary)


class _Reader:
    def __init__(self, model: GgufModel) -> None:
        self.model = model
        self.keys = {
            name.removeprefix("tokenizer.ggml."): value
            for name, value in model.keys.items()
            if name.startswith("tokenizer.ggml.")
        }

    def refused(self, why: str) -> InputError:
        return InputError(f"The tokenizer of {self.model.path} is not read: {why}", _REMEDY)

    def build(self, vocabulary: int) -> GgufTokenizer:
        kind = self.keys.get("model")
        if kind not in ("gpt2", "llama"):
            raise self.refused(f"it is of the kind {kind!r}; gpt2 (byte-level BPE) and llama (SentencePiece) are read")
        if self.flag("add_sep_token", False) or (kind == "llama" and self.flag("remove_extra_whitespaces", False)):
            raise self.refused("add_sep_token or remove_extra_whitespaces is set")
        if left := sorted(self.keys.keys() - _READ - _ASIDE):
            raise self.refused(f"what tokenizer.ggml.{left[0]} should change is not known")
        self.tokens = self.token_list(vocabulary)
        self.types = self.token_types()
        self.ids = {name: self.token_id(name) for name in _IDS}
        backend, starts = self.byte_level() if kind == "gpt2" else self.sentence_piece()
        backend.add_special_tokens(self.added(_CONTROL))
        backend.add_tokens(self.added(_USER))
        begin = self.flag("add_bos_token", starts) and self.ids["bos"] is not None
        end = self.flag("add_eos_token", False) and self.ids["eos"] is not None
        self.frame(backend, begin, end)
        return GgufTokenizer(self.finished(backend), self.ends())

    def flag(self, name: str, default: bool) -> bool:
        value = self.keys.get(name, default)
        if not isinstance(value, bool):
            raise self.refused(f"tokenizer.ggml.{name} is {value!r}, not true or false")
        return value

    def token_list(self, vocabulary: int) -> list[str]:
        tokens = self.keys.get("tokens")
        if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
            raise self.refused("it has no list of tokens")
        if len(tokens) > vocabulary:
            raise self.refused(f"it has {len(tokens)} tokens, but the model only {vocabulary} embeddings")
        tokens = [token or f"[EMPTY_{number}]" for number, token in enumerate(tokens)]
        first: dict[str, int] = {}
        for number, token in enumerate(tokens):
            if first.setdefault(token, number) != number:
                raise self.refused(f"the token {token!r} occurs twice")
        return tokens

    def token_types(self) -> list[int]:
        types = self.keys.get("token_type")
        if types is None:
            return [_NORMAL] * len(self.tokens)
        found = [int(value) for value in types] if hasattr(types, "tolist") else []
        if len(found) != len(self.tokens):
            raise self.refused(f"it has {len(self.tokens)} tokens, but {len(found)} types of them")
        return found

    def token_id(self, name: str) -> int | None:
        value = self.keys.get(f"{name}_token_id")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < len(self.tokens):
            raise self.refused(f"tokenizer.ggml.{name}_token_id is {value!r}; it has {len(self.tokens)} tokens")
        return value

    def ends(self) -> list[int]:
        """The end of a text, of a turn and of a message, those that the file names."""
        return list(dict.fromkeys(x for x in (self.ids["eos"], self.ids["eot"], self.ids["eom"]) if x is not None))

    def added(self, kind: int) -> list[Any]:
        from tokenizers import AddedToken

        special = {self.ids[name] for name in ("bos", "eos", "padding", "eot", "eom")} if kind == _CONTROL else set()
        return [
            AddedToken(token, special=kind == _CONTROL, normalized=False)
            for number, (token, found) in enumerate(zip(self.tokens, self.types, strict=True))
            if found == kind or number in special
        ]

    def byte_level(self) -> tuple[Any, bool]:
        from tokenizers import Tokenizer, decoders, models, normalizers

        chosen = self.pre_tokenizer()
        if not isinstance(merges := self.keys.get("merges"), list):
            raise self.refused("it has no merges")
        pairs = []
        for merge in merges:
            left, space, right = str(merge)[1:].partition(" ")
            pairs.append((str(merge)[:1] + left, right))
            if not space or not right:
                raise self.refused(f"{merge!r} is no merge of two tokens")
        vocabulary = {token: number for number, token in enumerate(self.tokens)}
        if strange := sum(not {left, right, left + right} <= vocabulary.keys() for left, right in pairs):
            raise self.refused(f"{strange} of its merges are of tokens that it does not have")
        prefix = self.flag("add_space_prefix", False)
        if prefix and len(chosen.patterns) > 1:
            raise self.refused("add_space_prefix is set beside a pre-tokenizer of several steps")
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, ignore_merges=chosen.whole_words))
        if chosen.composed:
            tokenizer.normalizer = normalizers.NFC()  # type: ignore[assignment]
        tokenizer.pre_tokenizer = build(chosen, prefix)
        tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
        return tokenizer, chosen.starts

    def pre_tokenizer(self) -> PreTokenizer:
        name = self.keys.get("pre")
        if name is None:
            raise self.refused("it does not say how text is cut (tokenizer.ggml.pre): the file is of an old converter")
        if name not in PRE_TOKENIZERS:
            raise self.refused(f"its pre-tokenizer {name!r} is not known (tokenizer.ggml.pre)")
        return PRE_TOKENIZERS[name]

    def sentence_piece(self) -> tuple[Any, bool]:
        """SentencePiece's BPE: merges follow from the scores of the pieces."""
        from tokenizers import Tokenizer, decoders, models, normalizers

        scores: Any = self.keys.get("scores")
        if not hasattr(scores, "tolist") or len(scores) != len(self.tokens):
            raise self.refused("it has no score for each token")
        gemma = str(self.model.keys.get("general.architecture")).startswith("gemma")
        if gemma:
            self.respell_spaces()
        vocabulary = {token: number for number, token in enumerate(self.tokens)}
        prefix = self.flag("add_space_prefix", True)
        unknown = self.ids["unknown"]
        if unknown is None:
            unknown = self.types.index(_UNKNOWN) if _UNKNOWN in self.types else None
        tokenizer = Tokenizer(
            models.BPE(
                vocab=vocabulary,
                merges=self.merges(vocabulary, [-n if gemma else float(score) for n, score in enumerate(scores)]),
                unk_token=None if unknown is None else self.tokens[unknown],
                fuse_unk=True,
                byte_fallback=all(f"<0x{byte:02X}>" in vocabulary for byte in range(256)),
            )
        )
        self.ids["unknown"] = unknown
        spaces: list[Any] = [normalizers.Prepend(_SPACE)] if prefix else []
        tokenizer.normalizer = normalizers.Sequence([*spaces, normalizers.Replace(" ", _SPACE)])  # type: ignore[assignment]
        ends: list[Any] = [decoders.Strip(" ", 1, 0)] if prefix else []
        tokenizer.decoder = decoders.Sequence(  # type: ignore[assignment]
            [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *ends]
        )
        return tokenizer, True

    def respell_spaces(self) -> None:
        """Gemma merges runs of spaces as any other piece; the file has them as they look in a text."""
        for number, token in enumerate(self.tokens):
            if len(token) > 1 and not token.strip(" "):
                self.tokens[number], self.types[number] = _SPACE * len(token), _NORMAL
        if len(set(self.tokens)) != len(self.tokens):
            raise self.refused("two of its tokens are the same run of spaces")

    def merges(self, vocabulary: dict[str, int], scores: list[float]) -> list[tuple[str, str]]:
        """Pairs that give a piece, the best piece first: by score, for Gemma by place (as its own tokenizer does)."""
        found = []
        whole = (_NORMAL, _USER, _UNUSED)
        for token, number in vocabulary.items():
            if self.types[number] not in whole or len(token) < 2:
                continue
            halves = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
            known = [(vocabulary[a], vocabulary[b], a, b) for a, b in halves if a in vocabulary and b in vocabulary]
            found += [(scores[number], a, b) for _, _, a, b in sorted(known)]
        return [(a, b) for _, a, b in sorted(found, key=lambda merge: merge[0], reverse=True)]

    def frame(self, backend: Any, begin: bool, end: bool) -> None:
        """Texts begin and end with the tokens that the file asks for."""
        from tokenizers import processors

        if not begin and not end:
            return
        around = [(self.tokens[i], i) for i in (self.ids["bos"], self.ids["eos"]) if i is not None]
        first = [self.tokens[self.ids["bos"]]] if begin and self.ids["bos"] is not None else []
        last = [self.tokens[self.ids["eos"]]] if end and self.ids["eos"] is not None else []
        one = [*first, "$A", *last]
        two = [*one, *[f"{token}:1" for token in first], "$B:1", *[f"{token}:1" for token in last]]
        framed: Any = processors.TemplateProcessing(single=one, pair=two, special_tokens=list(dict.fromkeys(around)))
        offsets = processors.ByteLevel(trim_offsets=False)
        backend.post_processor = processors.Sequence([offsets, framed]) if self.keys["model"] == "gpt2" else framed

    def finished(self, backend: Any) -> Any:
        from transformers import PreTrainedTokenizerFast

        named = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
        named |= {"mask": "mask_token", "seperator": "sep_token", "cls": "cls_token"}
        special: dict[str, Any] = {
            ours: self.tokens[number] for theirs, ours in named.items() if (number := self.ids[theirs]) is not None
        }
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **special)
        if template := self.chat_template():
            tokenizer.chat_template = template
        return tokenizer

    def chat_template(self) -> Any:
        keys = self.model.keys
        main = keys.get("tokenizer.chat_template")
        start = "tokenizer.chat_template."
        others = {name.removeprefix(start): value for name, value in keys.items() if name.startswith(start)}
        if not others:
            return main
        return {**({"default": main} if main else {}), **others}
