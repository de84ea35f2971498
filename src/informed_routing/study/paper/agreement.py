"""One page that says where our results agree with the paper and where not, claim by claim."""

from __future__ import annotations

from typing import get_args

from ..effort import effort
from .claims import Grids, claims
from .verdicts import NOT_MEASURED, Word


def agreement(grids: Grids, model: str) -> str | None:
    """The page of one model as Markdown, from the entries of each grid by its name; None where they judge no claim."""
    own = {name: [entry for entry in found if entry.model == model] for name, found in grids.items()}
    judged = [(claim, claim.judge(own)) for claim in claims()]
    if all(verdict == NOT_MEASURED for _, verdict in judged):
        return None
    counts = {word: sum(verdict.word == word for _, verdict in judged) for word in get_args(Word)}
    rows = [
        f"| {claim.where} | {claim.statement} | {claim.paper} | {verdict.ours} | {verdict.word} |"
        for claim, verdict in judged
    ]
    parts = [
        f"# Agreement with the paper: {model}",
        "The paper's numbers are those of Llama-3.1-8B, trained on up to 65 million tokens a stage. What can agree on "
        "another model is the direction of a claim; a difference below one joint standard error decides nothing.",
        ", ".join(f"{count} {word}" for word, count in counts.items()) + ".",
        *filter(None, [effort(entry for found in own.values() for entry in found)]),
        "\n".join(["| where | claim | paper | ours | verdict |", "| --- | --- | --- | --- | --- |", *rows]),
    ]
    return "\n\n".join(parts) + "\n"
