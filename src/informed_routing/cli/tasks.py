"""Tasks of lm-evaluation-harness for `evaluate`: what was asked for, and results as `--json` has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from informed_routing.errors import InputError
from informed_routing.evaluation.tasks import Preset, TaskSpec, parse_tasks, preset_tasks
from informed_routing.progress import Progress

if TYPE_CHECKING:
    from .loading import Loaded


@dataclass(frozen=True)
class TaskOptions:
    """Which tasks, on which documents, and where results are kept."""

    specs: tuple[TaskSpec, ...] = ()
    data_dir: Path | None = None
    resume_dir: Path | None = None
    limit: int | None = None
    spread: bool = False

    @classmethod
    def parse(
        cls,
        tasks: str | None,
        preset: Preset | None,
        data_dir: Path | None,
        resume_dir: Path | None,
        limit: int | None,
        spread: bool,
    ) -> TaskOptions:
        """The flags as options. Raises InputError for flags that contradict each other or would do nothing."""
        if tasks is not None and preset is not None:
            raise InputError("--tasks and --preset both say which tasks to run", "Give one of them")
        if tasks is None and preset is None:
            for flag, value in (("--data-dir", data_dir), ("--resume-dir", resume_dir), ("--spread", spread or None)):
                if value is not None:
                    raise InputError(f"{flag} has no effect without tasks", "Give --tasks or --preset, too")
            return cls()
        if spread and limit is None:
            raise InputError("--spread has no effect when all documents are taken", "Give --limit, too")
        specs = parse_tasks(tasks) if tasks is not None else preset_tasks(str(preset))
        return cls(specs, data_dir, resume_dir, limit, spread)

    def described(self) -> dict[str, Any]:
        """What the numbers depend on, for the result."""
        from informed_routing.evaluation.harness_tasks import FEWSHOT_SEED, require_harness

        return {
            "version": require_harness(),
            "fewshot_seed": FEWSHOT_SEED,
            "documents": "all" if self.limit is None else ("spread" if self.spread else "first"),
            **({} if self.limit is None else {"limit": self.limit}),
            "source": "hub" if self.data_dir is None else "files",
        }


def run_tasks(
    loaded: Loaded, options: TaskOptions, batch_size: int, target: float, progress: Progress
) -> tuple[dict[str, Any], Sequence[dict[str, Any]]]:
    """(`tasks` of a run in `--json`, routing statistics of each) for a model as it is set now."""
    from informed_routing.evaluation.harness import evaluate_tasks
    from informed_routing.evaluation.perplexity import sparsity_record

    results = evaluate_tasks(
        loaded.model,
        loaded.tokenizer,
        options.specs,
        data_dir=options.data_dir,
        limit=options.limit,
        spread=options.spread,
        batch_size=batch_size,
        results_dir=options.resume_dir,
        progress=progress,
    )
    records: dict[str, dict[str, Any]] = {}
    for name, result in results.items():
        about = {"shots": result.shots, "documents": result.documents, "seconds": result.seconds}
        records[name] = {**result.metrics, **about}
        if result.stats:
            records[name]["sparsity"] = sparsity_record(result.stats, target)
    return records, [result.stats for result in results.values() if result.stats]
