"""Tasks of lm-evaluation-harness on a live model: dense, pruned or routed.

    results = evaluate_tasks(model, tokenizer, preset_tasks("table7-small"), data_dir="data", limit=200)
    results["boolq"].metrics["acc"]

Decisions are by threshold and generation is greedy, examples are drawn with a fixed seed: a second run gives the same
numbers.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from informed_routing.errors import InputError, WorkError
from informed_routing.progress import NullProgress, Progress

from .harness_results import ResultFolder, TaskResult, model_key
from .harness_tasks import FEWSHOT_SEED, LocalFiles, load_task, local_files, quiet_harness, require_harness
from .perplexity import page_perplexity
from .tasks import WIKITEXT, TaskSpec, subset

if TYPE_CHECKING:
    from informed_routing.execution.native import NativeExecution

__all__ = ["TaskResult", "evaluate_tasks"]


def evaluate_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[TaskSpec],
    *,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    spread: bool = False,
    batch_size: int = 4,
    results_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> dict[str, TaskResult]:
    """Results by task name, in the order given.

    Documents come from files in `data_dir` (see `local_files`), and then nothing is asked of the network, else from
    the Hub. `limit` and `spread` choose the documents (see `tasks.subset`). `batch_size` bounds the sequences in a
    forward; it changes numbers by no more than rounding does. With `results_dir`, results of finished tasks are kept
    there and not computed again for the same model, settings and data. The model is left as it was.
    Raises InputError when lm-evaluation-harness is missing, for unknown tasks and for missing files, in each case
    before anything is computed; WorkError for logits or a metric that are not finite.
    """
    harness, progress = require_harness(), progress or NullProgress()
    local = {spec: None if data_dir is None else local_files(spec, Path(data_dir)) for spec in tasks}
    finished: dict[TaskSpec, TaskResult] = {}
    folder: ResultFolder | None = None
    keys = {spec: _task_key(spec, local[spec], limit, spread) for spec in tasks}
    with _as_decided(model):
        if results_dir is not None:
            folder = ResultFolder(Path(results_dir), {**model_key(model, tokenizer), "harness": harness})
            known = {spec: folder.load(keys[spec]) for spec in tasks}
            finished = {spec: result for spec, result in known.items() if result is not None}
        missing = [spec for spec in tasks if spec not in finished]
        with _seeded():
            loaded = {spec: load_task(spec, local[spec]) for spec in missing}
        for spec in missing:
            finished[spec] = _evaluate(model, tokenizer, spec, loaded.pop(spec), limit, spread, batch_size, progress)
            if folder is not None:
                folder.save(keys[spec], finished[spec])
    return {spec.name: _checked(finished[spec]) for spec in tasks}


def _checked(result: TaskResult) -> TaskResult:
    """A result whose numbers are all finite: a standard error that is not (of a single document) is left out."""
    kept = {key: value for key, value in result.metrics.items() if math.isfinite(value) or "_stderr" not in key}
    for key, value in kept.items():
        if not math.isfinite(value):
            raise WorkError(f"{key} of task {result.task} is {value}, not a finite number", "Leave the task out")
    return replace(result, metrics=kept)


def _task_key(spec: TaskSpec, local: LocalFiles | None, limit: int | None, spread: bool) -> dict[str, Any]:
    return {
        "name": spec.name,
        "shots": spec.shots,
        "limit": limit,
        "spread": spread and limit is not None,
        "data": "hub" if local is None else local.digests(),
    }


def _evaluate(
    model: Any,
    tokenizer: Any,
    spec: TaskSpec,
    task: Any,
    limit: int | None,
    spread: bool,
    batch_size: int,
    progress: Progress,
) -> TaskResult:
    """One task, with the routing statistics of its tokens."""
    from .harness_model import LiveModel  # before bars are silenced in the modules that it loads

    start = time.perf_counter()
    routed = hasattr(model, "routing_stats")
    with quiet_harness(), _seeded():
        live = LiveModel(model, tokenizer, batch_size, progress)
        if routed:
            model.reset_routing_stats()
        chosen = subset(len(task.eval_docs), limit, spread)
        score = _word_perplexity if spec.name == WIKITEXT else _harness_metrics
        try:
            metrics = score(live, task, spec, chosen, progress)
        except WorkError as error:
            raise WorkError(f"task {spec}: {error.what}", error.remedy) from error
    stats = {k: v for k, v in model.routing_stats().items() if k != "per_unit"} if routed else None
    shots = int(task.get_config("num_fewshot") or 0)
    return TaskResult(spec.name, shots, len(chosen), metrics, time.perf_counter() - start, stats)


def _harness_metrics(
    live: Any, task: Any, spec: TaskSpec, chosen: Sequence[int], progress: Progress
) -> dict[str, float]:
    """The harness' own evaluation of the `chosen` documents."""
    from lm_eval.evaluator import evaluate

    live.label = str(spec)
    everything = len(chosen) == len(task.eval_docs)
    found = evaluate(
        lm=live,
        task_dict={spec.name: task},
        samples=None if everything else {spec.name: list(chosen)},
        log_samples=False,
    )
    metrics = {}
    for key, value in found["results"][spec.name].items():
        name, _, how = key.partition(",")
        if how and isinstance(value, (int, float)):  # "N/A" where there is no standard error
            metrics[name if how == "none" else key] = float(value)
    return metrics


def _word_perplexity(
    live: Any, task: Any, spec: TaskSpec, chosen: Sequence[int], progress: Progress
) -> dict[str, float]:
    """What the harness calls `wikitext`, by `page_perplexity`: the head's output never stands in memory whole."""
    from .harness_model import HarnessTokens

    pages = [task.eval_docs[number]["page"] for number in chosen]
    result = page_perplexity(live.model, HarnessTokens(live), pages, live.max_length, live.batch_size, progress)
    nats_per_byte = result.loss * result.tokens / sum(len(page.encode()) for page in pages)
    return {
        "word_perplexity": result.word_perplexity,
        "token_perplexity": result.token_perplexity,
        "byte_perplexity": math.exp(nats_per_byte),
        "bits_per_byte": nats_per_byte / math.log(2),
    }


@contextmanager
def _as_decided(model: Any) -> Iterator[None]:
    """In evaluation mode, and where an engine would execute more than the routers ask (it may be faster), it does not.

    Otherwise numbers would depend on the machine and on how sequences happen to be batched.
    """
    state, was_training = getattr(model, "routing_state", None), model.training
    if state is not None and state.decision.random:
        raise InputError("the model samples its decisions", "Call set_sparsity, which decides by threshold")
    native: NativeExecution | None = getattr(state, "native", None)
    model.eval()
    try:
        with nullcontext() if native is None else native.exactly():
            yield
    finally:
        model.train(was_training)


@contextmanager
def _seeded() -> Iterator[None]:
    """Python's and numpy's generators as the harness seeds them (some tasks shuffle answers), then as they were."""
    import numpy

    python, before = random.getstate(), numpy.random.get_state()
    random.seed(0)
    numpy.random.seed(FEWSHOT_SEED)
    try:
        yield
    finally:
        random.setstate(python)
        numpy.random.set_state(before)
