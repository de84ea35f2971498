"""Quality at equal measured time: perplexity over the speed-up of routed and static models, in one engine and format.

    python benchmarks/equal_time.py slim=out/levers/slim pruned-4=out/pruned-4 --json docs/data/equal_time.json
    python benchmarks/equal_time.py --page docs/data/equal_time.json > docs/equal_time.md
    python benchmarks/equal_time.py --text demo:wiki --text demo:c4 --text demo:code slim=out/levers/slim
    python benchmarks/equal_time.py --base big.gguf --speedups 1.2,1.35,1.5 small=small.gguf routed=out/big

Each NAME=FOLDER is a routing folder, measured over its dial, or a folder of `prune` or another base model, which is one
point. On held-out rows of 512 tokens of each text: seconds of prefill and of decode steps behind it, all models and
settings in turns with the dense base model, and perplexity by the same engine on more such rows. Speed-ups are ratios
of sums over the timed rows; perplexities are ratios to the dense model. The table reads each curve at the asked
speed-ups by a line through the points around them (log perplexity over log speed-up), which begins at the dense model;
it never goes beyond a curve's end. A sliced model, which the engine does not run, is granted the speed-up that its
multiply-accumulates would give, more than any engine has. Run it on an idle machine; a second copy of the dense model,
again=demo:smollm2-135m, shows what is noise.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from shared import BASE, PROGRESS, TEXTS
from torch import Tensor

from informed_routing.assets import load_model, load_texts, load_tokenizer, pack
from informed_routing.baselines.static import is_static_folder, load_static
from informed_routing.evaluation.engines import RoutedEngine
from informed_routing.evaluation.environment import environment
from informed_routing.evaluation.perplexity import token_perplexity
from informed_routing.evaluation.speed import decode_callable, prefill_callable
from informed_routing.evaluation.timing import Workload, measure
from informed_routing.files.atomic import write_json
from informed_routing.persistence.folder import LORA_FOLDER, is_routing_folder
from informed_routing.routed_model import RoutedModelForCausalLM

OF_LEVERS = """
The models are those of `benchmarks/levers.py`; `slim-1000` is `demo:smollm2-135m-routed`. `pruned-N` lacks N layers
(`prune --method shortened-ppl --recovery-steps 150 --batch-size 2` on the same text; `pruned1000-N` with 1,000 steps,
as many tokens as `slim-1000` and `static-1000` have): LoRA merged into its weights, which routed models leave as they
are unless they have an adapter. `slicegpt-S` is `prune --method slicegpt --sparsity S` with the same recovery, its
speed-up granted by its multiply-accumulates.
"""
OF_OTHERS = """
A base model beside the dense one is a single point: the line that is read from the dense model to it is one that no
model lies on, as if there were a sibling of every size.
"""
SPEEDUPS = (1.25, 1.5, 2.0)
SETTINGS = (0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5)


class Point:
    """One model at one setting of its dial, in the native engine; or one in torch, with a `granted` speed-up."""

    def __init__(self, name: str, model: Any, engine: RoutedEngine | None, sparsity: float, granted: float = 0) -> None:
        self.name, self.model, self.engine, self.sparsity, self.granted = name, model, engine, sparsity, granted
        self.begins = False  # whether a curve begins here: the dense model with the same adapter

    @property
    def timed(self) -> RoutedEngine:
        assert self.engine is not None
        return self.engine

    def use(self) -> None:
        self.timed.use(self.sparsity, None)


def points_of(name: str, folder: str, weights: str, dtype: torch.dtype = torch.float32) -> list[Point]:
    """The points of a folder: a curve of a routed model, or a single one. `dtype` is that of what torch keeps."""
    if Path(folder).is_dir() and is_routing_folder(folder):
        model: Any = RoutedModelForCausalLM.from_pretrained(folder, dtype=dtype)
        engine = RoutedEngine(model, weights)
        low, high = model.calibrated_range()
        inside = [s for s in SETTINGS if max(low, 0.01) <= s <= high]
        points = [Point(f"{name} {s:g}", model, engine, s) for s in inside]
        if (Path(folder) / LORA_FOLDER).is_dir():
            points.insert(0, Point(f"{name} 0", model, engine, 0.0))
            points[0].begins = True
        return points
    static = Path(folder).is_dir() and is_static_folder(folder)
    base = load_static(folder)[0] if static else load_model(folder, dtype=dtype)[0]
    report = json.loads((Path(folder) / "pruning.json").read_text())["report"] if static else {}
    if report.get("width"):
        return [Point(name, base.to(dtype).eval(), None, 0.0, report["before"]["macs"] / report["after"]["macs"])]
    model = RoutedModelForCausalLM.attach(base.to(dtype))
    return [Point(name, model, RoutedEngine(model, weights), 0.0)]


def _prefill(point: Point, ids: Tensor) -> Workload:
    """A prefill behind another one of the same point, which is not on the clock.

    Settings of one model share its weights: in turns with others only the first of them would find these cold.
    """
    work = prefill_callable(point.timed, ids, point.use)

    def prepare() -> Any:
        work.run(work.prepare())
        return work.prepare()

    return Workload(work.run, prepare)


def seconds(points: list[Point], rows: Tensor, new: int, repeats: int) -> dict[str, dict[str, float]]:
    """Sums over the rows of the median seconds of each point: of a prefill, and of `new` steps behind it."""
    found: dict[str, dict[str, float]] = {point.name: {"prefill": 0.0, "decode": 0.0} for point in points}
    PROGRESS.stage("rows timed", len(rows))
    for done, row in enumerate(rows, start=1):
        ids = row[None]
        work = {p.name: _prefill(p, ids) for p in points}
        for name, timing in measure(work, repeats, 1).items():
            found[name]["prefill"] += timing.median
        work = {p.name: decode_callable(p.timed, ids[:, :-new], ids[:, -new:], p.use) for p in points}
        for name, timing in measure(work, max(repeats // 2, 1), 1).items():
            found[name]["decode"] += timing.median
        PROGRESS.advance(done)
    return found


def quality(point: Point, texts: dict[str, Tensor]) -> dict[str, Any]:
    """Perplexity on each text, and what was approximated of it."""
    found: dict[str, Any] = {}
    if point.engine is None:
        for name, rows in texts.items():
            found[name] = token_perplexity(point.model, rows, 1).token_perplexity
            found[f"{name} shares"] = {"macs": 0.0}
        return found
    point.use()
    for name, rows in texts.items():
        point.model.reset_routing_stats()
        found[name] = token_perplexity(point.model, rows, 1).token_perplexity
        stats = point.model.routing_stats()
        found[f"{name} shares"] = {key: stats[key] for key in ("units", "attention", "ffn", "macs")}
    return found


@torch.no_grad()
def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything, in turns."""
    tokenizer = load_tokenizer(arguments.base)
    texts = {text: pack(load_texts(text, "heldout"), tokenizer, 512) for text in arguments.text}
    timed = torch.cat([rows[: arguments.timed] for rows in texts.values()])
    dtype = getattr(torch, arguments.dtype)
    # Memory that a machine has used before can be slower: a copy of the same model, loaded first, took 10 % longer in
    # prefill and 20 % in decode than the third one. So the first gigabytes, and the first copy, are not on the clock.
    idle = (torch.ones(arguments.idle_gigabytes * 2**28), points_of("idle", arguments.base, arguments.weights, dtype))
    points = points_of("dense", arguments.base, arguments.weights, dtype)
    for given in arguments.models:
        name, _, folder = given.partition("=")
        points += points_of(name, folder, arguments.weights, dtype)
    with ExitStack() as unchanged:  # as text generation has it: weights are compared once, not at each step
        run = [point for point in points if point.engine is not None]
        for point in run:
            unchanged.enter_context(point.timed.fixed())
        times = seconds(run, timed, arguments.new_tokens, arguments.repeats)
    rows: list[dict[str, Any]] = []
    PROGRESS.stage("perplexity", len(points))
    for done, point in enumerate(points, start=1):
        found = quality(point, {name: some[: arguments.rows] for name, some in texts.items()})
        own = times.get(point.name)
        speed = {phase: times["dense"][phase] / own[phase] if own else point.granted for phase in ("prefill", "decode")}
        rows.append(
            {
                "name": point.name,
                "sparsity": point.sparsity,
                "begins": point.begins,
                "seconds": own,
                **speed,
                **found,
            }
        )
        PROGRESS.advance(done)
    del idle
    settings = {key: value for key, value in vars(arguments).items() if key not in ("json", "page")}
    return {"environment": environment(), "threads": torch.get_num_threads(), "settings": settings, "rows": rows}


def at(curve: list[tuple[float, float]], speedup: float, dense: float = 1.0) -> float | None:
    """The ratio of a curve of (speed-up, ratio) that begins at `dense` at a speed-up; None beyond its ends."""
    for (low, a), (high, b) in itertools.pairwise(sorted([(1.0, dense), *curve])):
        if low <= speedup <= high:
            part = (math.log(speedup) - math.log(low)) / (math.log(high) - math.log(low))
            return math.exp(math.log(a) + part * (math.log(b) - math.log(a)))
    return None


def _read(curve: list[dict[str, Any]], phase: str, text: str, speedup: float, dense: float) -> float | None:
    """`at` of some rows; a dense model with an adapter is where its curve begins."""
    own = [row[text] / dense for row in curve if row.get("begins")]
    points = [(row[phase], row[text] / dense) for row in curve if not row.get("begins")]
    return at(points, speedup, *own)


def table(result: dict[str, Any]) -> str:
    """Ratios of perplexity to dense at equal speed-ups, by phase; then every point."""
    dense, *rows = result["rows"]
    asked = result.get("settings", {})
    texts, speedups = asked.get("text", TEXTS), asked.get("speedups", SPEEDUPS)
    names = " / ".join(text.removeprefix("demo:").replace("c4", "C4") for text in texts)
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        curves.setdefault(row["name"].rpartition(" ")[0] or row["name"].rpartition("-")[0] or row["name"], []).append(
            row
        )
    lines = ["| at | " + " | ".join(curves) + " |", "| --- " * (len(curves) + 1) + "|"]
    for phase, speedup in itertools.product(("prefill", "decode"), speedups):
        cells = []
        for curve in curves.values():
            found = [_read(curve, phase, text, speedup, dense[text]) for text in texts]
            cells.append(" / ".join("-" if one is None else f"{one:.3f}" for one in found))
        lines.append(f"| {phase} {speedup:g}x | {' | '.join(cells)} |")
    lines += ["", f"| point | prefill | decode | MACs saved, {names} | {names} |", "| --- " * 5 + "|"]
    for row in rows:
        macs = " / ".join(f"{row[f'{text} shares']['macs']:.3f}" for text in texts)
        ratios = " / ".join(f"{row[text] / dense[text]:.3f}" for text in texts)
        lines.append(f"| {row['name']} | {row['prefill']:.2f}x | {row['decode']:.2f}x | {macs} | {ratios} |")
    return "\n".join(lines)


def page(result: dict[str, Any], note: str = "") -> str:
    """The result in Markdown, with how it came about, and a note on it."""
    asked, machine = result["settings"], result["environment"]
    command = " ".join([*_given(asked), *asked["models"]])
    texts = asked.get("text", TEXTS)
    names = ", ".join(text.removeprefix("demo:") for text in texts)
    return f"""# Quality at equal time

Ratio of perplexity to the dense model on held-out text ({names}) over the measured speed-up: {Path(asked["base"]).name}
in the CPU engine in {asked["weights"]}, policy `exact`; prompts of 512 tokens, then {asked["new_tokens"]} decode steps.
{machine["cpu"]}, {result["threads"]} threads, commit {machine["commit"]}. Speed-ups are against the same engine's dense
forward, medians of {asked["repeats"]} runs in turns on {asked["timed"]} rows of each text; perplexities are of
{asked["rows"]} rows of each. A line is read between the points that were measured, never beyond them; where a model has
an adapter, its point 0 is the dense model with it.

`python benchmarks/equal_time.py {command}`
{OF_LEVERS if asked["base"] == BASE else OF_OTHERS}{note and f"{chr(10)}{note}{chr(10)}"}
{table(result)}
"""


def _given(asked: dict[str, Any]) -> list[str]:
    """The options of a run that are not the defaults, as they were given."""
    found = []
    for action in _parser()._actions:
        value = asked.get(action.dest, 0 if action.dest == "idle_gigabytes" else None)  # earlier versions held none
        value = tuple(value) if isinstance(value, list) else value
        if not action.option_strings or value in (None, action.default, TEXTS):
            continue
        if action.dest == "text":
            found += [f"--text {text}" for text in asked["text"]]
        else:
            shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
            found.append(f"{action.option_strings[0]} {shown}")
    return found


def _numbers(given: str) -> tuple[float, ...]:
    return tuple(float(one) for one in given.split(","))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--base", default=BASE)
    parser.add_argument("--text", action="append", help=f"repeatable; default {', '.join(TEXTS)}")
    parser.add_argument("--speedups", type=_numbers, default=SPEEDUPS, help="where curves are read")
    parser.add_argument("--weights", default="bfloat16", help="the engine's format")
    parser.add_argument("--dtype", default="float32", help="of the copy that torch keeps: bfloat16 for large models")
    parser.add_argument("--rows", type=int, default=32, help="rows of 512 tokens a text for perplexity")
    parser.add_argument("--timed", type=int, default=4, help="rows a text that are timed")
    parser.add_argument("--new-tokens", type=int, default=32, help="decode steps that are timed")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--idle-gigabytes", type=int, default=4, help="memory that is held, and not used")
    parser.add_argument("--json", type=Path, help="where to write the result")
    parser.add_argument("--page", type=Path, help="print the page of a result")
    parser.add_argument("--note", default="", help="with --page: what a reader must know of the run")
    return parser


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.page:
        print(page(json.loads(arguments.page.read_text()), arguments.note), end="")
        return
    arguments.text = arguments.text or list(TEXTS)
    result = measured(arguments)
    PROGRESS.done()
    if arguments.json:
        write_json(arguments.json, result)
    print(table(result))


if __name__ == "__main__":
    main()
