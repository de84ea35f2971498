"""The what-if on the embedded routed model: one nominal workload measured once, five targets predicted, then measured.

    make demo                                   # the routed model: out/demo
    python benchmarks/whatif.py real            # about an hour on two idle cores; a second call goes on
    python benchmarks/whatif.py scale           # 1,000 targets x 10,000 prompts x 5 metrics: seconds and memory
    python benchmarks/whatif.py page            # docs/whatif_results.md from docs/data/whatif

`real` is `whatif measure` and `whatif check` with the files in docs/data/whatif; tables of single prompts stay in
out/whatif.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from gpu_page import markdown

from informed_routing.evaluation.environment import environment
from informed_routing.evaluation.workload import Measurement, read_rows
from informed_routing.files.atomic import write_json, write_text
from informed_routing.whatif import predict, read_workload, workload_from_mapping
from informed_routing.whatif.metrics import DEFAULT_METRICS

ROOT = Path(__file__).resolve().parent.parent
DATA, OUT = ROOT / "docs/data/whatif", ROOT / "out/whatif"
PARTS = 5  # of a run, for its drift


def real(folder: Path, prompts: int) -> None:
    """Measure, predict, measure the targets, compare."""
    table = OUT / "nominal.parquet"
    OUT.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    count = ["--prompts", str(prompts)]
    files = ["--workload", str(DATA / "nominal.yaml")]
    _run("measure", str(folder), *files, *count, "--out", str(table), "--resume")
    targets = ["--targets", str(DATA / "targets.yaml"), "--metrics", str(DATA / "metrics.yaml")]
    predicted = _run("predict", str(table), *targets, "--plot", str(ROOT / "docs/whatif.svg"))
    found = _run("check", str(folder), str(table), *targets, *count, "--out", str(OUT))
    tables = {path.stem: read_rows(path) for path in sorted(OUT.glob("*.parquet"))}
    record = {
        "prompts": prompts,
        "delta": predicted["delta"],
        "rows": found["rows"],
        "reasons": {row["target"]: row["reasons"] for row in predicted["rows"] if row["colour"] == "red"},
        "tables": {name: _described(rows) for name, rows in tables.items()},
        "seconds": round(time.perf_counter() - started, 1),
        "environment": environment(),
    }
    write_json(DATA / "real.json", record)


def scale(targets: int, prompts: int) -> None:
    """Time and memory of many predictions from a synthetic table at the nominal workload of `real`."""
    nominal = read_workload(DATA / "nominal.yaml")
    rng = np.random.default_rng(17)
    inputs = nominal.sample(prompts, rng)
    tokens = inputs.prompt_tokens + inputs.output_tokens
    table = {
        "domain": inputs.domain,
        "prompt_tokens": inputs.prompt_tokens,
        "output_tokens": inputs.output_tokens,
        "executed": 60 * tokens * rng.uniform(0.6, 0.9, prompts),
        "possible": 60 * tokens,
        "macs": 1e8 * tokens * rng.uniform(0.6, 0.9, prompts),
        "loss_sum": inputs.output_tokens * rng.uniform(2, 4, prompts),
        "loss_tokens": inputs.output_tokens,
        "prefill_seconds": 2e-3 * inputs.prompt_tokens * rng.uniform(0.8, 1.2, prompts),
        "decode_seconds": 2e-2 * inputs.output_tokens * rng.uniform(0.8, 1.2, prompts),
    }
    base = nominal.model_dump(mode="json")
    wanted = []
    for number in range(targets):
        settings = json.loads(json.dumps(base))
        for name, weight in zip(settings["domains"], rng.dirichlet([4, 4, 2]), strict=True):
            law = settings["domains"][name]["prompt_tokens"]
            law |= {"median": law["median"] * float(rng.uniform(0.7, 1.6)), "sigma": float(rng.uniform(0.6, 1.0))}
            settings["domains"][name]["weight"] = float(weight)
        wanted.append(workload_from_mapping(settings | {"name": f"target {number}"}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.perf_counter()
    found = predict(table, nominal, wanted, DEFAULT_METRICS)
    seconds = time.perf_counter() - started
    record = {
        "targets": targets,
        "prompts": prompts,
        "metrics": len(DEFAULT_METRICS),
        "seconds": round(seconds, 2),
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "before_mb": round(before / 1024),
        "colours": {colour: sum(row.colour == colour for row in found.rows) for colour in ("green", "amber", "red")},
        "environment": environment(),
    }
    write_json(DATA / "scale.json", record)
    print({key: value for key, value in record.items() if key != "environment"})


def page() -> None:
    """docs/whatif_results.md."""
    record = json.loads((DATA / "real.json").read_text())
    found = record["environment"]
    parts = [
        "# Predicted and measured",
        f"The embedded model, routed, ran {record['prompts']:,} prompts of one workload once "
        "(`docs/data/whatif/nominal.yaml`). From these, five other workloads (`targets.yaml`) were predicted, and then "
        "each was run with as many prompts. All intervals hold together with probability "
        f"{1 - record['delta']:g}. A red row has no estimate.",
        "![intervals](whatif.svg)",
        _rows(record["rows"]),
    ]
    for target, reasons in record["reasons"].items():
        parts.append(f"Why {target} is red: {'; '.join(reasons)}.")
    parts += ["## Seconds, and what drifts", _DRIFT, _drift(record), _fifths(record)]
    parts += _known_truth(json.loads((ROOT / "docs/study/importance_sampling.json").read_text()))
    if (DATA / "scale.json").exists():
        big = json.loads((DATA / "scale.json").read_text())
        parts.append(
            f"## Many targets\n\n{big['targets']:,} targets x {big['prompts']:,} prompts x {big['metrics']} metrics: "
            f"{big['seconds']:.1f} s, peak memory {big['peak_mb']:,} MB ({big['before_mb']:,} MB before)."
        )
    parts.append(
        f"*`python benchmarks/whatif.py real`, `scale`, `page`: {found['cpu']}, {found['threads']} threads, torch "
        f"{found['torch']}, commit {found['commit']}.*"
    )
    write_text(ROOT / "docs/whatif_results.md", "\n\n".join(parts) + "\n")
    print("wrote docs/whatif_results.md")


_DRIFT = (
    "What the dense model costs depends on lengths alone. What its seconds are off by is therefore the machine, and "
    "the chance of which lengths were drawn: neither is the routing's. 'Off by' is measured over predicted seconds of "
    "the dense model, and 'corrected' the prediction of the routed model's seconds times that."
)


def _known_truth(found: dict[str, Any]) -> list[str]:
    """What the experiments say of the intervals and the lights."""
    *cells, whole = found["coverage"]
    poor = [cell for cell in cells if cell["normal_coverage"] < 0.85]
    green = max(cell["green_share"] for cell in poor)
    gap = next(row for row in found["support-gap"] if row["metric"] == "seconds")
    return [
        "## Where the truth is known",
        f"On a cost model with exact answers (`informed-routing study importance-sampling`, "
        f"[all of it](study/importance_sampling.md)), {len(cells)} cells (10 targets x 3 metrics) in "
        f"{whole['repeats']} repeats of {whole['n']:,} prompts:",
        "\n".join(
            [
                f"- all {len(cells)} intervals held the truth together in {100 * whole['interval_coverage']:.1f} % of "
                f"the repeats (asked for: {100 * (1 - whole['delta']):g} %);",
                f"- the usual error bars of green rows held it in {100 * whole['green_normal_coverage']:.1f} %;",
                f"- in {len(poor)} cells error bars held it in less than 85 %: these were green in {100 * green:.1f} % "
                "of the repeats at most;",
                f"- a nominal workload that lacks {100 * gap['outside']:.1f} % of the target looks well by effective "
                f"sample size ({gap['ess']:.0f} of 4,000) and tail shape ({gap['khat_weights']:.2f}) and is "
                f"{gap['colour']} by lost mass and by the mass check (z = {gap['mass_z']:.1f}).",
            ]
        ),
    ]


def _rows(rows: list[dict[str, Any]]) -> str:
    body = []
    for row in rows:
        estimate = "-" if row["estimate"] is None else f"{row['estimate']:.4g}"
        measured = f"{row['direct']:.4g} ± {row['direct_standard_error']:.2g}"
        inside = "yes" if row["covered"] else "**no**"
        interval = f"{row['lower']:.4g} to {row['upper']:.4g}"
        body.append([row["target"], row["metric"], row["colour"], estimate, interval, measured, inside])
    return markdown(["target", "metric", "light", "predicted", "interval", "measured", "inside"], body)


def _drift(record: dict[str, Any]) -> str:
    by_name = {(row["target"], row["metric"]): row for row in record["rows"]}
    body = []
    for target in dict.fromkeys(row["target"] for row in record["rows"]):
        for phase in ("prefill", "decode"):
            routed, dense = (by_name[target, f"{kind}{phase}_seconds"] for kind in ("", "dense_"))
            if routed["estimate"] is None or dense["estimate"] is None:
                body.append([target, phase, "-", "-", "-", f"{routed['direct']:.4g}"])
                continue
            drift = dense["direct"] / dense["estimate"]
            numbers = [routed["estimate"], routed["estimate"] * drift, routed["direct"]]
            body.append([target, phase, f"{drift:.3f}", *(f"{number:.4g}" for number in numbers)])
    return markdown(["target", "phase", "off by", "predicted s", "corrected s", "measured s"], body)


def _fifths(record: dict[str, Any]) -> str:
    body = [
        [name, f"{about['prompts']:,}", *(f"{share:.3f}" for share in about["dense_prefill_by_fifth"])]
        for name, about in record["tables"].items()
    ]
    head = ["table", "prompts", *(f"part {number + 1}" for number in range(PARTS))]
    return "Dense prefill seconds over a line in the length, in five parts of each run:\n\n" + markdown(head, body)


def _described(rows: list[Measurement]) -> dict[str, Any]:
    """Drift within a run: seconds of each part over those of one line through all of it."""
    lengths = np.array([row.prompt_tokens for row in rows], dtype=float)
    seconds = np.array([row.dense_prefill_seconds for row in rows])
    line = np.polyval(np.polyfit(lengths, seconds, 1), lengths)
    parts = zip(np.array_split(seconds, PARTS), np.array_split(line, PARTS), strict=True)
    return {
        "prompts": len(rows),
        "seconds": round(float(sum(_all_seconds(row) for row in rows)), 1),
        "dense_prefill_by_fifth": [round(float(own.sum() / fitted.sum()), 4) for own, fitted in parts],
    }


def _all_seconds(row: Measurement) -> float:
    return row.prefill_seconds + row.decode_seconds + row.dense_prefill_seconds + row.dense_decode_seconds


def _run(*arguments: str) -> dict[str, Any]:
    """A `whatif` command; its JSON."""
    path = OUT / f"{arguments[0]}.json"
    subprocess.run(
        [sys.executable, "-m", "informed_routing.cli", "whatif", *arguments, "--json", str(path)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    result: dict[str, Any] = json.loads(path.read_text())["result"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("real", "scale", "page"))
    parser.add_argument("--folder", type=Path, default=ROOT / "out/demo")
    parser.add_argument("--prompts", type=int, default=1000)
    given = parser.parse_args()
    if given.part == "real":
        real(given.folder, given.prompts)
    elif given.part == "scale":
        scale(targets=1000, prompts=10_000)
    else:
        page()


if __name__ == "__main__":
    main()
