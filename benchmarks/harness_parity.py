"""Do our tasks give the numbers of lm-evaluation-harness run directly on the transformers model?

    python benchmarks/harness_parity.py --data-dir DIR --limit 20      # writes docs/data/evaluation/harness_parity.json
    python benchmarks/harness_parity.py --data-dir DIR --tasks wikitext --context 512

Both sides run the embedded model, dense, in float32, on the same documents. The harness' side is its own wrapper with
its own scoring, one sequence at a time; only the source of the documents is replaced. Accuracies must be equal,
perplexities to a thousandth. Seconds of both are noted, and with --native those of the native engine.

Tasks that the file has already, for the same documents, are not run again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

from informed_routing.assets import load_model
from informed_routing.cli.progress import make_progress
from informed_routing.evaluation.environment import environment
from informed_routing.evaluation.harness import evaluate_tasks
from informed_routing.evaluation.harness_tasks import load_task, local_files, quiet_harness, require_harness
from informed_routing.evaluation.tasks import Preset, TaskSpec, parse_tasks, preset_tasks, subset
from informed_routing.files.atomic import write_json
from informed_routing.routed_model import RoutedModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "docs" / "data" / "evaluation" / "harness_parity.json"
RELATIVE = 1e-3


def directly(
    model: Any, tokenizer: Any, spec: TaskSpec, data_dir: Path, limit: int | None, spread: bool
) -> tuple[dict[str, float], float]:
    """Metrics of the harness by itself, and its seconds without reading the documents."""
    import lm_eval.evaluator
    from lm_eval.models.huggingface import HFLM

    task = load_task(spec, local_files(spec, data_dir))
    start = time.perf_counter()
    with quiet_harness():
        lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
        samples = None if limit is None else {spec.name: list(subset(len(task.eval_docs), limit, spread))}
        found = lm_eval.evaluator.evaluate(lm, {spec.name: task}, samples=samples, log_samples=False)["results"][
            spec.name
        ]
    metrics = {key.removesuffix(",none"): value for key, value in found.items() if "," in key and value != "N/A"}
    return metrics, time.perf_counter() - start


def compare(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, Any]:
    """The metrics of both, and whether they agree as they must."""
    worst = max(abs(ours[name] / value - 1) for name, value in theirs.items() if value)
    exact = all(ours[name] == value for name, value in theirs.items())
    agrees = worst <= RELATIVE if "word_perplexity" in theirs else exact
    return {"ours": ours, "harness": theirs, "largest_relative_difference": worst, "equal": exact, "agrees": agrees}


def native(reference: str) -> Any:
    """The dense model in the engine that routed models run in."""
    routed = RoutedModelForCausalLM.attach(load_model(reference, dtype="float32")[0])
    routed.set_execution("native", policy="exact")
    return routed.eval()


def finished(path: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Tasks in a file that was written for the same model and harness."""
    content = json.loads(path.read_text()) if path.exists() else {}
    return dict(content["tasks"]) if all(content.get(key) == value for key, value in about.items()) else {}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2-135m")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--preset", choices=get_args(Preset), default="table7-small")
    parser.add_argument("--tasks", help="instead of a preset")
    parser.add_argument("--limit", type=int, help="documents of each task [default: all]")
    parser.add_argument("--spread", action="store_true", help="at equal distances, not the first ones")
    parser.add_argument("--context", type=int, help="tokens of a window of text [default: the model's context]")
    parser.add_argument("--batch-size", type=int, default=4, help="ours")
    parser.add_argument("--native", action="store_true", help="time the native engine on the dense model, too")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)

    progress = make_progress(quiet=False)
    model, tokenizer = load_model(given.model, dtype="float32")
    engine = native(given.model) if given.native else None
    if given.context:
        for one in (model, *([engine] if engine else [])):
            one.config.max_position_embeddings = given.context  # where the harness reads it, and we do
    about = {"model": given.model, "dtype": "float32", "harness": require_harness()}
    rows = finished(given.out, about)
    choice = {"data_dir": given.data_dir, "limit": given.limit, "spread": given.spread}
    documents = {"limit": given.limit, "spread": given.spread, **({"context": given.context} if given.context else {})}
    for spec in parse_tasks(given.tasks) if given.tasks else preset_tasks(given.preset):
        if rows.get(str(spec), {}).get("chosen") == documents:
            continue
        settings = {**choice, "batch_size": given.batch_size, "progress": progress}
        result = evaluate_tasks(model, tokenizer, [spec], **settings)[spec.name]
        progress.done()
        theirs, elapsed = directly(model, tokenizer, spec, **choice)
        seconds = {"ours": result.seconds, "harness": elapsed}
        if engine is not None:
            seconds["ours, native engine"] = evaluate_tasks(engine, tokenizer, [spec], **settings)[spec.name].seconds
            progress.done()
        rows[str(spec)] = {
            "chosen": documents,
            "documents": result.documents,
            "seconds": seconds,
            "environment": environment(),
            **compare({name: result.metrics[name] for name in theirs}, theirs),
        }
        print(spec, "agrees" if rows[str(spec)]["agrees"] else "DIFFERS", seconds, flush=True)
        write_json(given.out, {**about, "tasks": rows})
    return 0 if all(row["agrees"] for row in rows.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
