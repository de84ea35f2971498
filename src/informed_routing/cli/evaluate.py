"""`evaluate`: perplexity, dense or routed, at one or more sparsities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from informed_routing.errors import InputError

from .common import (
    BaseOption,
    Common,
    ExecutionOption,
    Session,
    WeightsOption,
    check_at_least,
    check_sparsities,
    dtype_name,
    session,
    with_common,
)

if TYPE_CHECKING:
    from .loading import Loaded

DEFAULT_TEXTS = ("demo:wiki", "demo:c4")
Split = Literal["train", "calibration", "heldout", "all"]
Budget = Literal["units", "macs", "latency"]


@with_common
def evaluate(
    common: Common,
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_DIR",
            help="Routing folder, or any dense model: Hub id, folder, .gguf, demo:smollm2-135m.",
        ),
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="DATA",
            help="Text; *.pages.jsonl gives perplexity per word. Repeatable [default: demo:wiki and demo:c4].",
        ),
    ] = None,
    split: Annotated[
        Split | None,
        typer.Option("--split", help="Part of the text [default: heldout; all of a page file].", show_default=False),
    ] = None,
    sparsity: Annotated[
        list[float] | None,
        typer.Option(
            "--sparsity",
            "-s",
            help="0 is dense. Repeatable [default: 0, and what the routers were trained for].",
        ),
    ] = None,
    budget: Annotated[
        Budget | None, typer.Option("--budget", help="What --sparsity is measured in [default: as trained].")
    ] = None,
    sequence_length: Annotated[int, typer.Option("--sequence-length", help="Tokens scored together.")] = 512,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Sequences in a forward pass.")] = 4,
    limit: Annotated[
        int | None, typer.Option("--limit", metavar="N", help="At most N sequences (or pages) of each text.")
    ] = None,
    execution: ExecutionOption = "sparse",
    weights: WeightsOption = None,
    base: BaseOption = None,
) -> None:
    """Measure perplexity of a model on held-out text, and what was really approximated.

    Example: informed-routing evaluate out --sparsity 0 --sparsity 0.25 --data demo:wiki --limit 32
    """
    targets = check_sparsities(sparsity or [])
    check_at_least("--sequence-length", [sequence_length], 2)
    check_at_least("--batch-size", [batch_size], 1)
    check_at_least("--limit", [] if limit is None else [limit], 1)
    with session("evaluate", common) as run:
        from .loading import choose_execution, load_any
        from .tables import perplexity_table

        loaded = load_any(model, run, base)
        if loaded.routed:
            choose_execution(run, loaded.model, "native" if weights and execution == "sparse" else execution, weights)
        elif weights or execution != "sparse":
            raise InputError(f"{model} is a dense model, it has no engine", "Give a routing folder, and --sparsity 0")
        if not targets:
            targets = [0.0, loaded.model.routing_config.sparsity] if loaded.routed else [0.0]
        texts = load_all(data or list(DEFAULT_TEXTS), split, loaded.tokenizer, sequence_length, limit)
        runs = evaluate_runs(run, loaded, model, texts, targets, budget, sequence_length, batch_size)
        result = {
            "runs": runs,
            "sequence_length": sequence_length,
            "data": {text.name: {"split": text.split} for text in texts},
        }
        title = "Perplexity (ratio to dense) and what was approximated"
        run.finish(
            result,
            lambda console: console.print(perplexity_table(runs, title)),
            model=model,
            dtype=dtype_name(loaded.model),
        )


@dataclass(frozen=True)
class Text:
    """One text to score: packed `rows` [n, L], or whole `pages`."""

    name: str
    split: str
    rows: Any = None
    pages: tuple[str, ...] = ()


def load_all(refs: Sequence[str], split: Split | None, tokenizer: Any, length: int, limit: int | None) -> list[Text]:
    """The texts behind references, tokenised where they are scored in rows."""
    from informed_routing.assets import load_texts, pack

    from .loading import is_pages, task_names

    texts = []
    for ref, name in zip(refs, task_names(list(refs)), strict=True):
        if is_pages(ref):
            part = split or "all"
            texts.append(Text(name, part, pages=tuple(load_texts(ref, part)[:limit])))
        else:
            part = split or "heldout"
            texts.append(Text(name, part, rows=pack(load_texts(ref, part), tokenizer, length)[:limit]))
    return texts


def evaluate_runs(
    run: Session,
    loaded: Loaded,
    ref: str,
    texts: Sequence[Text],
    targets: Sequence[float],
    budget: Budget | None,
    length: int,
    batch_size: int,
) -> list[dict[str, Any]]:
    """`result.runs` of the contract. InputError when a dense model is asked for sparsity."""
    from informed_routing.evaluation.perplexity import (
        merge_stats,
        page_perplexity,
        sparsity_record,
        token_perplexity,
    )

    if not loaded.routed and any(targets):
        raise InputError(
            f"{ref} is a dense model and has no sparsity {max(targets):g}",
            f"Fit routers first: informed-routing fit {ref} --out DIR",
        )
    if loaded.routed:
        for target in targets:
            loaded.model.set_sparsity(target, budget)  # a value out of range is refused before anything is scored
    runs = []
    for target in targets:
        if loaded.routed:
            loaded.model.set_sparsity(target, budget)
        tasks: dict[str, Any] = {}
        stats = []
        for text in texts:
            progress = _Named(run.progress, f"{text.name} at {target * 100:g} %" if target else f"{text.name}, dense")
            if text.pages:
                pages = page_perplexity(loaded.model, loaded.tokenizer, text.pages, length, batch_size, progress)
                scored: Any = pages
                tasks[text.name] = {"word_perplexity": pages.word_perplexity, "words": pages.words}
            else:
                scored = token_perplexity(loaded.model, text.rows, batch_size, progress)
                tasks[text.name] = {}
            tasks[text.name] |= {
                "token_perplexity": scored.token_perplexity,
                "loss": scored.loss,
                "tokens": scored.tokens,
                "seconds": scored.seconds,
            }
            if scored.stats:
                stats.append(scored.stats)
                tasks[text.name]["sparsity"] = sparsity_record(scored.stats, target)
        runs.append({"sparsity": sparsity_record(merge_stats(stats), target), "tasks": tasks})
    return runs


class _Named:
    """A progress whose stages carry the name of what is scored."""

    def __init__(self, inner: Any, name: str) -> None:
        self._inner, self._name = inner, name

    def stage(self, name: str, total: int) -> None:
        self._inner.stage(f"{name} {self._name}", total)

    def advance(self, step: int, **metrics: float | str) -> None:
        self._inner.advance(step, **metrics)

    def message(self, text: str) -> None:
        self._inner.message(text)

    def done(self) -> None:
        self._inner.done()
