"""A folder of tiny tasks in the layout of `--data-dir`, and a tokenizer that reads any text byte by byte."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEXT = "the river rises in old mountains and flows through a wide valley to sea where small boats carry salt"
WORDS = TEXT.split()


def words(seed: int, count: int) -> str:
    """Some words, others for another seed."""
    return " ".join(WORDS[(seed * 7 + place * place * 3 + place) % len(WORDS)] for place in range(count))


def byte_tokenizer() -> Any:
    """One token for each byte; 0 pads and 1 ends a text. 258 tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<pad>", "<eos>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def write_tasks(folder: Path, documents: int = 5) -> Path:
    """`folder` with all eight tasks of the paper, `documents` rows in each evaluated split."""

    def options(n: int, count: int = 4) -> list[str]:
        return [words(n + 3 * place, 2 + place % 3) for place in range(count)]

    def science(n: int, field: str) -> dict[str, Any]:
        choices = {"text": options(n), "label": ["A", "B", "C", "D"]}
        return {"id": str(n), field: words(n, 8), "choices": choices, "answerKey": "ABCD"[n % 4]}

    makers: dict[str, tuple[str, Any]] = {
        "boolq": (
            "validation",
            lambda n: {"passage": words(n, 12), "question": words(n + 1, 4), "idx": n, "label": n % 2},
        ),
        "openbookqa": ("test", lambda n: science(n, "question_stem")),
        "piqa": (
            "validation",
            lambda n: {"goal": words(n, 5), "sol1": words(n + 1, 6), "sol2": words(n + 2, 5), "label": n % 2},
        ),
        "winogrande": (
            "validation",
            lambda n: {
                "sentence": f"{words(n, 4)} _ {words(n + 1, 4)}",
                "option1": WORDS[n % 7],
                "option2": WORDS[7 + n % 7],
                "answer": str(1 + n % 2),
            },
        ),
        "hellaswag": (
            "validation",
            lambda n: {
                "ind": n,
                "activity_label": "Boats",
                "ctx_a": words(n, 6),
                "ctx_b": "they",
                "ctx": f"{words(n, 6)} they",
                "endings": options(n),
                "source_id": "x",
                "split": "val",
                "split_type": "indomain",
                "label": str(n % 4),
            },
        ),
        "arc_challenge": ("test", lambda n: science(n, "question")),
        "arc_easy": ("test", lambda n: science(n + 40, "question")),
    }
    for name, (evaluated, make) in makers.items():
        write_rows(folder / "tasks" / name / f"{evaluated}.jsonl", [make(n) for n in range(documents)])
        write_rows(folder / "tasks" / name / "train.jsonl", [make(n + 100) for n in range(8)])
    pages = [{"page": f" \n = Old town = \n \n {words(n, 30)} , {words(n + 1, 9)} @-@ sea . \n "} for n in range(3)]
    write_rows(folder / "wikitext2" / "test.pages.jsonl", pages)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
