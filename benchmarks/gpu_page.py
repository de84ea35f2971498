"""The GPU part of docs/benchmarks.md: what gpu.py measured, and the estimate of gpu_roofline.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
GPU = Path(__file__).resolve().parent.parent / "docs" / "data" / "gpu"


def gpu_sections() -> list[str]:
    found = [
        "# Benchmarks on a GPU",
        "Llama shapes with random weights in bfloat16, under decisions recorded from the embedded model "
        "(`python benchmarks/gpu_masks.py`): one sequence of held-out text, thresholds moved to each target.",
    ]
    bench, roofline = GPU / "bench.json", GPU / "roofline.json"
    if bench.exists():
        found += measured(json.loads(bench.read_text()))
    else:
        found.append(
            "No GPU was at hand: nothing is measured yet. `python benchmarks/gpu.py` on a machine with one runs all "
            "cases in minutes and writes `docs/data/gpu/bench.json`; `python benchmarks/speed_page.py` then puts them "
            "here. What follows is arithmetic."
        )
    if roofline.exists():
        found += estimated(json.loads(roofline.read_text()))
    return found


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def measured(record: Row) -> list[str]:
    body = []
    for row in record["rows"]:
        seconds = row["seconds"]
        low, high = row["speedup_range"]
        target = f"{100 * row['target']:.0f} % {row.get('budget', 'layers')}" if "target" in row else ""
        shares = row.get("sparsity")
        cells = [row["shape"], f"{row['phase']} {row['batch']} x {row['tokens']}", row["engine"], target]
        cells += [f"{100 * shares['units']:.1f} / {100 * shares['macs']:.1f}" if shares else ""]
        cells += [f"{1e3 * seconds['median']:.2f}", f"{row['speedup_vs_dense']:.3f}x ({low:.3f} to {high:.3f})"]
        limit = row.get("limit_speedup")
        cells += [f"{limit:.2f}x, {100 * row['fraction_of_limit']:.0f} %" if limit else ""]
        body.append(cells)
    header = ["shape", "case", "engine", "target", "units / MACs %", "ms", "speed-up (range)", "limit, reached"]
    found = record["environment"]
    where = f"*{found['accelerator']}, torch {found['torch']}, commit {found['commit']}, {record['seconds']:.0f} s.*"
    return ["## Measured: `python benchmarks/gpu.py`", markdown(header, body), where]


def estimated(record: Row) -> list[str]:
    """The least times of the first device: whole forwards, then each kernel in two telling cases."""
    device = record["devices"][0]
    rows = [row for row in record["rows"] if row["device"] == device["name"] and "recorded" in row["case"]]
    body = []
    for row in rows:
        whole = ", ".join(row["executed_whole"])
        target = f"{100 * row['target']:.0f} % {row['budget']}"
        shares = f"{100 * row['attention']:.0f} / {100 * row['ffn']:.0f}"
        times = [f"{1e3 * row[key]:.2f}" for key in ("dense_seconds", "routed_seconds")]
        body.append(
            [
                row["shape"],
                row["case"].removesuffix(", recorded"),
                target,
                shares,
                *times,
                f"{row['limit_speedup']:.2f}x",
                whole,
            ]
        )
    header = ["shape", "case", "target", "attention / FFN %", "dense ms", "routed ms", "limit", "executed whole"]
    found = [
        "## Roofline: `python benchmarks/gpu_roofline.py`",
        f"Least times on a {device['name']} by its data sheet ({device['bytes_per_second'] / 1e12:.2f} TB/s, "
        f"{device['flops_per_second'] / 1e12:.0f} TFLOP/s dense bfloat16): every operand moved once, nothing for "
        "launches. *Limit* is the best speed-up that the decisions allow. *Executed whole*: kinds of unit whose routed "
        "call would take longer. `docs/data/gpu/roofline.json` has "
        f"{' and '.join(other['name'] for other in record['devices'])}, random decisions with the same shares, and "
        "each kernel of each case.",
        markdown(header, body),
    ]
    for case in ("prefill 32768, recorded", "decode 1, recorded"):
        picked = [row for row in rows if row["shape"] == "8B" and row["case"] == case and row["budget"] == "units"]
        if picked:
            found += [f"### Each kernel, 8B, {case}, 25 % units", kernels(picked[0])]
    return found


def kernels(row: Row) -> str:
    body = [
        [name, f"{one['gigabytes']:.3f}", f"{one['teraflop']:.3f}", f"{one['dense_us']:.0f}", f"{one['routed_us']:.0f}"]
        for name, one in row["kernels"].items()
    ]
    return markdown(["kernel (all layers)", "GB routed", "TFLOP routed", "dense us", "routed us"], body)
