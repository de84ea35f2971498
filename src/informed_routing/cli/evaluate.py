"""`evaluate`: perplexity and tasks, dense or routed, at one or more sparsities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from informed_routing.errors import InputError
from informed_routing.evaluation.tasks import Preset, average_accuracy

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
from .tasks import TaskOptions, run_tasks

if TYPE_CHECKING:
    from rich.console import Console

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
            help="Text; *.pages.jsonl gives perplexity per word. Repeatable [default: demo:wiki and demo:c4, "
            "unless there are tasks].",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            "--tasks", metavar="A,B", help="Tasks of lm-evaluation-harness; arc_easy@25 has 25 examples in a prompt."
        ),
    ] = None,
    preset: Annotated[
        Preset | None,
        typer.Option(
            "--preset", help="Tasks, shots and metrics of the paper's Table 7; -small has at most 5 shots, for CPUs."
        ),
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            "--data-dir", metavar="DIR", help="Tasks from DIR/tasks/NAME/SPLIT.jsonl or .parquet [default: the Hub]."
        ),
    ] = None,
    resume_dir: Annotated[
        Path | None,
        typer.Option("--resume-dir", metavar="DIR", help="Keep results of finished tasks in DIR; do not repeat them."),
    ] = None,
    spread: Annotated[
        bool,
        typer.Option("--spread", help="With --limit: documents of tasks at equal distances, not the first ones."),
    ] = False,
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
        int | None,
        typer.Option(
            "--limit", metavar="N", help="At most N sequences (or pages) of each text, documents of each task."
        ),
    ] = None,
    execution: ExecutionOption = "sparse",
    weights: WeightsOption = None,
    base: BaseOption = None,
) -> None:
    """Measure perplexity of a model on held-out text, accuracy in tasks, and what was really approximated.

    Example: informed-routing evaluate out --sparsity 0 --sparsity 0.25 --data demo:wiki --limit 32

    Example: informed-routing evaluate out --preset table7-small --limit 200 --resume-dir results
    """
    targets = check_sparsities(sparsity or [])
    check_at_least("--sequence-length", [sequence_length], 2)
    check_at_least("--batch-size", [batch_size], 1)
    check_at_least("--limit", [] if limit is None else [limit], 1)
    options = TaskOptions.parse(tasks, preset, data_dir, resume_dir, limit, spread)
    with session("evaluate", common) as run:
        from .loading import choose_execution, load_any

        about_tasks = {"harness": options.described()} if options.specs else {}
        loaded = load_any(model, run, base)
        if loaded.routed:
            engine = "native" if weights and execution == "sparse" else execution
            # Exact: to execute more where that is faster would make scores depend on the machine.
            choose_execution(run, loaded.model, engine, weights, policy="exact")
        elif weights or execution != "sparse":
            raise InputError(f"{model} is a dense model, it has no engine", "Give a routing folder, and --sparsity 0")
        if not targets:
            targets = [0.0, loaded.model.routing_config.sparsity] if loaded.routed else [0.0]
        refs = data or ([] if options.specs else list(DEFAULT_TEXTS))
        texts = load_all(refs, split, loaded.tokenizer, sequence_length, limit)
        runs = evaluate_runs(run, loaded, model, texts, targets, budget, sequence_length, batch_size, options)
        result = {
            "runs": runs,
            "sequence_length": sequence_length,
            "data": {text.name: {"split": text.split} for text in texts},
            **about_tasks,
        }
        run.finish(
            result,
            lambda console: show_runs(console, runs, [text.name for text in texts]),
            model=model,
            dtype=dtype_name(loaded.model),
        )


def show_runs(console: Console, runs: Sequence[Mapping[str, Any]], texts: Sequence[str]) -> None:
    """The texts by sparsity, then the tasks, if there are any."""
    from .tables import perplexity_table, task_table

    if texts:
        scored = [{**run, "tasks": {name: run["tasks"][name] for name in texts}} for run in runs]
        console.print(perplexity_table(scored, "Perplexity (ratio to dense) and what was approximated"))
    if names := [name for name in runs[0]["tasks"] if name not in texts]:
        console.print(
            task_table(runs, names, "Tasks (accuracies in %, with standard errors) and what was approximated")
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
    options: TaskOptions | None = None,
) -> list[dict[str, Any]]:
    """`result.runs` of the contract. InputError when a dense model is asked for sparsity, and for a name twice."""
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
    options = options or TaskOptions()
    for spec in options.specs:
        if any(text.name == spec.name for text in texts):
            raise InputError(f"{spec.name} is a task and a text of --data", "Leave out one of them")
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
        if options.specs:
            progress = _Named(run.progress, f"at {target * 100:g} %" if target else "dense")
            records, of_tasks = run_tasks(loaded, options, batch_size, target, progress)
            tasks |= records
            stats += of_tasks
        entry = {"sparsity": sparsity_record(merge_stats(stats), target), "tasks": tasks}
        average = average_accuracy(tasks)
        runs.append(entry if average is None else {**entry, "average": average})
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
