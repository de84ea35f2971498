"""Does the dial hold? What is asked for against what is realised, on kinds of text and at lengths of prompts.

    python benchmarks/dial_kinds.py FOLDER --data-dir DIR        # writes JSON, prints and writes Markdown tables
    python benchmarks/dial_kinds.py FOLDER --data-dir DIR --hold --out docs/data/dial_kinds_held.json

DIR has `calibration/validation.jsonl` (documents with their `source`), `wikitext2/` and `tasks/`; a kind whose files
are missing is left out, and said so. A prompt begins where a document does, and is followed by others where that is
short. Decisions are causal, so that one pass over the longest prompts tells what every shorter one realises.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from informed_routing.assets import load_tokenizer
from informed_routing.cli.progress import make_progress
from informed_routing.errors import InputError
from informed_routing.evaluation.environment import environment
from informed_routing.files.atomic import write_json, write_text
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.routing.stats import RoutingStats

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = (16, 32, 64, 128, 256, 512)
SOURCES = {
    "encyclopaedia": ("wikipedia",),
    "web": ("c4", "redpajama_c4", "redpajama_commoncrawl"),
    "code": ("code", "redpajama_github"),
}
SHARES = ("units", "attention", "ffn", "macs")


def jsonl(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def documents(data: Path, kind: str) -> list[str]:
    return [row["text"] for row in jsonl(data / "calibration/validation.jsonl") if row["source"] in SOURCES[kind]]


def wikitext(data: Path, tokenizer: Any) -> list[str]:
    return [row["page"] for row in jsonl(data / "wikitext2/test.pages.jsonl")]


def questions(data: Path, tokenizer: Any) -> list[str]:
    """Multiple choice as a language model is asked it."""
    found = []
    for name in ("arc_easy", "arc_challenge"):
        for row in jsonl(data / f"tasks/{name}/validation.jsonl"):
            choices = zip(row["choices"]["label"], row["choices"]["text"], strict=True)
            listed = "\n".join(f"{label}. {text}" for label, text in choices)
            found.append(f"Question: {row['question']}\n{listed}\nAnswer: {row['answerKey']}\n")
    return found


def chat(data: Path, tokenizer: Any) -> list[str]:
    """Somebody asks, and gets an answer with its reason; in the model's own template where it has one."""
    found = []
    for row in jsonl(data / "tasks/boolq/validation.jsonl"):
        asked, answer = f"{row['question']}?", f"{'Yes' if row['label'] else 'No'}. {row['passage']}"
        turns = [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
        if getattr(tokenizer, "chat_template", None):
            found.append(str(tokenizer.apply_chat_template(turns, tokenize=False)))
        else:
            found.append(f"User: {asked}\nAssistant: {answer}\n")
    return found


KINDS: dict[str, Callable[[Path, Any], list[str]]] = {
    "encyclopaedia": lambda data, _: documents(data, "encyclopaedia"),
    "wikitext-2": wikitext,
    "web": lambda data, _: documents(data, "web"),
    "code": lambda data, _: documents(data, "code"),
    "questions": questions,
    "chat": chat,
}


def prompts(texts: Sequence[str], tokenizer: Any, length: int, count: int) -> Tensor:
    """Prompts int64 [at most count, length], each from the beginning of a document."""
    found: list[list[int]] = []
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text, add_special_tokens=not ids, verbose=False)["input_ids"]
        if len(ids) >= length:
            found.append(ids[:length])
            ids = []
        if len(found) == count:
            break
    return torch.tensor(found)


def realised(model: Any, rows: Tensor, lengths: Sequence[int]) -> dict[str, dict[str, float]]:
    """Shares realised by the first tokens of prompts [n, L], and the standard error of the units' share."""
    totals = {length: RoutingStats.empty(model.costs, model.stats.kinds) for length in lengths}
    units: dict[int, list[float]] = {length: [] for length in lengths}
    places = torch.arange(1, rows.shape[1] + 1)[None]
    for row in rows.split(1):
        model.hidden_states(row)
        for length in lengths:
            contexts = places.where(places <= length, 0)
            alone = RoutingStats.empty(model.costs, model.stats.kinds)
            for stats in (totals[length], alone):
                stats.add(model.routing_state, contexts)
            units[length].append(alone.shares())
    found = {}
    for length, stats in totals.items():
        values = stats.as_dict(None)
        spread = statistics.stdev(units[length]) / math.sqrt(len(rows)) if len(rows) > 1 else math.nan
        found[str(length)] = {**{key: values[key] for key in SHARES}, "standard_error": spread}
    return found


def measure(model: Any, texts: dict[str, Tensor], args: argparse.Namespace, progress: Any) -> list[dict[str, Any]]:
    runs = []
    for target in args.targets:
        model.set_sparsity(target, args.budget, "held" if args.hold else None)
        progress.stage(f"{target:.0%} of {args.budget}", len(texts))
        kinds = {}
        for done, (kind, rows) in enumerate(texts.items(), start=1):
            kinds[kind] = realised(model, rows, args.lengths)
            progress.advance(done)
        runs.append({"target": target, "kinds": kinds})
    progress.done()
    return runs


def table(run: dict[str, Any], budget: str, lengths: Sequence[int]) -> str:
    """Markdown: realised shares of `budget` in per cent, a row for each kind of text and a column for each length."""
    target, kinds = run["target"], run["kinds"]
    lines = [
        f"### {100 * target:g} % of {budget} asked for",
        "",
        "| text | " + " | ".join(f"{length} tokens" for length in lengths) + " |",
        "| --- " * (len(lengths) + 1) + "|",
    ]
    for kind, found in kinds.items():
        cells = " | ".join(f"{100 * found[str(length)][budget]:.1f}" for length in lengths)
        lines.append(f"| {kind} | {cells} |")
    off = [100 * (found[str(length)][budget] - target) for found in kinds.values() for length in lengths]
    within = sum(abs(value) <= 1 for value in off)
    lines += ["", f"Off by {min(off):+.1f} to {max(off):+.1f} points; within one point in {within} of {len(off)}.", ""]
    return "\n".join(lines)


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="routing folder")
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--base", help="base model, where the folder's own is elsewhere")
    parser.add_argument("--targets", type=float, nargs="+", default=[0.15, 0.25, 0.35])
    parser.add_argument("--budget", choices=("units", "macs"), help="default: the folder's, units for latency")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--prompts", type=int, default=24, help="of each kind")
    parser.add_argument("--hold", action="store_true", help="thresholds follow what a text has approximated so far")
    parser.add_argument("--execution", choices=("native", "sparse"), default="native")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/data/dial_kinds.json", help="the tables go beside it")
    return parser.parse_args(given)


@torch.no_grad()
def main(given: Sequence[str] | None = None) -> None:
    args = arguments(given)
    args.lengths = sorted(set(args.lengths))
    progress = make_progress(quiet=False)
    model: Any = RoutedModelForCausalLM.from_pretrained(args.folder, base=args.base)
    if model.routing_state.kv == "drop":
        raise InputError("keys of shorter prompts are not known with kv='drop'", "Give a folder that keeps keys")
    model.set_execution(args.execution)
    budget = model.routing_config.budget
    args.budget = args.budget or ("units" if budget == "latency" else budget)
    base = model.routing_config.base_model
    tokenizer = load_tokenizer(args.base or base.name, revision=None if args.base else base.revision)
    texts = {}
    for kind, read in KINDS.items():
        try:
            rows = prompts(read(args.data_dir, tokenizer), tokenizer, args.lengths[-1], args.prompts)
        except FileNotFoundError as error:
            print(f"{kind} is left out: {error.filename} is missing")
            continue
        if len(rows):
            texts[kind] = rows
    runs = measure(model, texts, args, progress)
    record = {
        "model": base.name,
        "calibration_context": model.routing_config.calibration_context,
        "budget": args.budget,
        "held": args.hold,
        "lengths": args.lengths,
        "prompts": {kind: len(rows) for kind, rows in texts.items()},
        "runs": runs,
        "environment": environment(),
    }
    write_json(args.out, record)
    page = "\n".join(table(run, args.budget, args.lengths) for run in runs)
    write_text(args.out.with_suffix(".md"), page)
    print(page)


if __name__ == "__main__":
    main()
