"""`evaluate`: perplexity and tasks, dense or routed, at one or more sparsities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from informed_routing.errors import InputError, WorkError
from informed_routing.evaluation.tasks import Preset, average_accuracy

from .common import (
    BaseOption,
    Common,
    Execution,
    Session,
    WeightsOption,
    check_at_least,
    check_sparsities,
    dtype_name,
    session,
    with_common,
)
from .loading import HoldOption, PolicyOption
from .tasks import TaskOptions, run_tasks
from .texts import Split, Text, load_all, part_words

if TYPE_CHECKING:
    from rich.console import Console

    from .loading import Loaded

__all__ = ["DEFAULT_TEXTS", "evaluate", "evaluate_runs", "load_all"]

DEFAULT_TEXTS = ("demo:wiki", "demo:c4")
DEFAULT_LENGTH = 512
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
        typer.Option(
            "--split",
            help="Part of the text [default: all of one that the fit has not read, heldout of one that it has and of "
            "demo:wiki, c4, code].",
            show_default=False,
        ),
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
    sequence_length: Annotated[
        int | None,
        typer.Option("--sequence-length", help=f"Tokens of a text scored together [default: {DEFAULT_LENGTH}]."),
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Sequences in a forward pass.")] = 4,
    limit: Annotated[
        int | None,
        typer.Option(
            "--limit", metavar="N", help="At most N sequences (or pages) of each text, documents of each task."
        ),
    ] = None,
    execution: Annotated[
        Execution | None,
        typer.Option(
            "--execution",
            help="sparse skips in PyTorch, masked computes everything: the reference; native is our engine, auto that "
            "where it runs [default: sparse; native with --weights].",
        ),
    ] = None,
    weights: WeightsOption = None,
    policy: PolicyOption = None,
    hold: HoldOption = False,
    base: BaseOption = None,
) -> None:
    """Measure perplexity of a model on held-out text, accuracy in tasks, and what was really approximated.

    Example: informed-routing evaluate out --sparsity 0 --sparsity 0.25 --data demo:wiki --limit 32

    Example: informed-routing evaluate out --preset table7-small --limit 200 --resume-dir results
    """
    targets = check_sparsities(sparsity or [])
    check_at_least("--sequence-length", [] if sequence_length is None else [sequence_length], 2)
    check_at_least("--batch-size", [batch_size], 1)
    check_at_least("--limit", [] if limit is None else [limit], 1)
    options = TaskOptions.parse(tasks, preset, data_dir, resume_dir, limit, spread)
    refs = data or ([] if options.specs else list(DEFAULT_TEXTS))
    if not refs:
        from .loading import refuse_idle

        refuse_idle("tasks have no such choice", "Give --data, too", split=split, sequence_length=sequence_length)
    with session("evaluate", common) as run:
        from .loading import (
            DENSE_ENGINE,
            check_shares,
            choose_execution,
            decision_of,
            fitted_of,
            kind_of,
            load_any,
            refuse_for_dense,
            refuse_idle,
            say_engine,
        )
        from .texts import choose_parts, tokenised

        about_tasks = {"harness": options.described()} if options.specs else {}
        kind = kind_of(model)
        refuse_for_dense(
            model,
            kind,
            targets,
            budget=budget,
            execution=execution,
            weights=weights,
            policy=policy,
            hold=hold,
            base=base,
        )
        decision = "threshold"
        if kind == "routed":
            config = check_shares(model, targets, budget, "held" if hold else None)
            targets = targets or list(dict.fromkeys([0.0, config.sparsity]))
            decision = decision_of(hold, config.kv, policy) if hold else config.selection.decision
            if not any(targets):
                refuse_idle("at sparsity 0 all is executed", "Leave it out, or give another --sparsity", hold=hold)
                decision = "threshold"
        _check_policy(policy, targets, bool(options.specs))
        length = sequence_length or DEFAULT_LENGTH
        parts = choose_parts(refs, split, fitted_of(model, kind))
        loaded = load_any(model, run, base)
        engine = DENSE_ENGINE
        if loaded.routed:
            # Exact unless asked otherwise: to execute more where that is faster makes scores depend on the machine.
            chosen = execution or ("native" if weights else "sparse")
            why = None if execution or weights else "the default of evaluate; --execution native scores by our engine"
            engine = choose_execution(run, loaded.model, chosen, weights, policy=policy, decision=decision, why=why)
        targets = targets or [0.0]
        texts = tokenised(parts, loaded.tokenizer, length, limit, run.progress.message)
        say_engine(run, engine)
        runs = evaluate_runs(run, loaded, model, texts, targets, budget, length, batch_size, options, decision)
        result = {
            "runs": runs,
            "engine": engine,
            **({"decision": decision} if loaded.routed else {}),
            "sequence_length": length,
            "data": {text.name: text.described() for text in texts},
            **about_tasks,
        }

        def show(console: Console) -> None:
            show_runs(console, runs, [text.name for text in texts])
            for text in texts:
                console.print(_part_line(text, runs[0]["tasks"][text.name]), markup=False, soft_wrap=True)

        run.finish(result, show, model=model, dtype=dtype_name(loaded.model))


def _check_policy(policy: str | None, targets: Sequence[float], tasks: bool) -> None:
    """Raise InputError for --policy auto where nothing is routed, and of tasks, which are always exact."""
    if policy != "auto":
        return
    if tasks:
        raise InputError("--policy auto has no effect on tasks: they do what the routers say", "Leave it out")
    if not any(targets):
        raise InputError("--policy auto has no effect at --sparsity 0: all is executed", "Leave it out")


def _part_line(text: Text, task: Mapping[str, Any]) -> str:
    """Which part of a text was scored, and how much that is."""
    unit = "pages" if text.pages else "documents"
    rows = f" in rows of {text.length}" if text.rows is not None else ""
    amount = f"{text.documents} {unit}, {task['tokens']} tokens{rows}"
    return f"[{text.name}: {part_words(text.split)} ({text.reason}), {amount}]"


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
    decision: str | None = None,
) -> list[dict[str, Any]]:
    """`result.runs` of `--json`. `decision` is as for `set_sparsity`.

    Raises InputError when a dense model is asked for sparsity, and for a name twice.
    """
    from informed_routing.evaluation.perplexity import merge_stats, sparsity_record

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
        for target in targets:  # a value out of range is refused before anything is scored
            loaded.model.set_sparsity(target, budget, decision)
    runs = []
    for target in targets:
        if loaded.routed:
            loaded.model.set_sparsity(target, budget, decision)
        tasks: dict[str, Any] = {}
        stats = []
        for text in texts:
            progress = _Named(run.progress, f"{text.name} at {target * 100:g} %" if target else f"{text.name}, dense")
            scored, found = _score(loaded, text, length, batch_size, progress)
            tasks[text.name] = found | {
                "token_perplexity": scored.token_perplexity,
                "loss": scored.loss,
                "tokens": scored.tokens,
                "documents": text.documents,
                "part": text.split,
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


def _score(loaded: Loaded, text: Text, length: int, batch_size: int, progress: Any) -> tuple[Any, dict[str, Any]]:
    """Perplexity of one text, with what only pages have. WorkError names the text."""
    from informed_routing.evaluation.perplexity import page_perplexity, token_perplexity

    try:
        if not text.pages:
            return token_perplexity(loaded.model, text.rows, batch_size, progress), {}
        pages = page_perplexity(loaded.model, loaded.tokenizer, text.pages, length, batch_size, progress)
        return pages, {"word_perplexity": pages.word_perplexity, "words": pages.words}
    except WorkError as error:
        raise WorkError(f"{text.name}: {error.what}", error.remedy) from error


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
