"""docs/benchmarks.md and docs/lengths.svg from what the scripts beside this one measured, on CPUs and GPUs.

python benchmarks/speed_page.py
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gpu_page import gpu_sections

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "docs" / "data" / "speed"

PHASES = ("prefill", "decode")

Row = dict[str, Any]


def main() -> None:
    records = {path.stem: json.loads(path.read_text()) for path in DATA.glob("*.json")}
    parts = [
        "# Benchmarks on a CPU",
        "SmolLM2-135M-Instruct with trained routers of the earlier method (docs/results.md); slim fallbacks and static "
        "layers are timed in [equal_time.md](equal_time.md), by a later and faster engine. Written by "
        "`python benchmarks/speed_page.py` from `docs/data/speed`. Engines run in turns in one process on the same "
        "held-out text; figures are medians, "
        "with the extremes in the files. *Speed-up* is against the fastest dense engine with the same weights, *limit* "
        "the roofline of the row's own selections (bytes for decode, multiply-accumulates for prefill, from the "
        "machine's measured rates), *of limit* how much of it was reached.",
    ]
    for name, section in SECTIONS.items():
        if name in records:
            record = records[name]
            parts += section(record.get("result", record))
            parts += [machine(record["environment"])] if "environment" in record else []
    parts += gpu_sections()
    (ROOT / "docs" / "benchmarks.md").write_text("\n\n".join(parts) + "\n")
    if "lengths" in records:
        plot(records["lengths"]["result"])


def machine(found: Row) -> str:
    return (
        f"*{found['cpu']} ({found['cpu_capability']}), {found['threads']} threads, torch {found['torch']}, "
        f"transformers {found['transformers']}, commit {found['commit']}.*"
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def target(row: Row) -> str:
    wanted = row["sparsity"]["target"]
    return f"{100 * wanted:.0f} % {row.get('budget', 'units')}" if wanted else "dense"


def speed(rows: list[Row], per_token: bool) -> str:
    body = []
    for row in rows:
        beside = not row["sparsity"]["target"] and row.get("budget") == "macs"
        name = "dense (beside macs)" if beside else target(row)
        scale = 1e3 / (row["new_tokens"] if per_token else 1)
        seconds = row["seconds"]
        cells = [row["engine"], str(row["batch"]), str(row["prompt_tokens"]), name]
        cells += [percent(row["sparsity"][key]) if row["sparsity"]["target"] else "" for key in ("units", "macs")]
        cells += [f"{seconds['median'] * scale:.1f} ({seconds['min'] * scale:.1f} to {seconds['max'] * scale:.1f})"]
        cells += [f"{row['tokens_per_second']:.0f}", f"{row['speedup_vs_dense']:.2f}x"]
        limits = row["sparsity"]["target"] > 0
        cells += [f"{row['limit_speedup']:.2f}x" if limits else "", percent(row["fraction_of_limit"]) if limits else ""]
        body.append(cells)
    unit = "ms a step" if per_token else "ms"
    header = ["engine", "batch", "prompt", "target", "units", "MACs saved", unit]
    return markdown([*header, "tokens/s", "speed-up", "limit", "of limit"], body)


def prefill(rows: list[Row]) -> list[str]:
    return ["## Prefill: `python benchmarks/speed.py prefill`", speed(rows, per_token=False)]


def matrix(rows: list[Row]) -> list[str]:
    return [
        "## Prefill with matrix instructions: `python benchmarks/speed.py matrix`",
        "On a processor with AMX the engine multiplies by it where weights are below float32, and so does torch with "
        "models in bfloat16. The routed model is the one of `make demo`, its targets are shares of the body's MACs.",
        speed(rows, per_token=False),
    ]


def decode(rows: list[Row]) -> list[str]:
    return [
        "## Decode, batch 1: `python benchmarks/speed.py decode`",
        "`transformers` decodes eagerly with a dynamic cache, `compiled` is its model through `torch.compile` with "
        "frozen weights and a static cache.",
        speed(rows, per_token=True),
    ]


def batch_8(rows: list[Row]) -> list[str]:
    return ["## Decode, batch 8: `python benchmarks/speed.py batch_8`", speed(rows, per_token=True)]


def batch_32(rows: list[Row]) -> list[str]:
    return ["## Decode, batch 32: `python benchmarks/speed.py batch_32`", speed(rows, per_token=True)]


def others(result: Row) -> list[str]:
    body = [
        [
            row["engine"],
            f"{row['prefill']['tokens_per_second']:.0f}",
            f"{row['decode']['tokens_per_second']:.1f}",
            f"{1e3 * row['decode']['median'] / result['new_tokens']:.1f}",
            f"`{row['text'][:60]!r}`".replace("|", "\\|"),
        ]
        for row in result["rows"]
    ]
    return [
        "## Other engines: `python benchmarks/others.py`",
        f"A prompt of {result['prompt_tokens']} tokens, then {result['new_tokens']} greedy ones, {result['rounds']} "
        "prompts, engines in turns (each in its own process and environment). Routed text differs from dense text, "
        "as it should.",
        markdown(["engine", "prefill tokens/s", "decode tokens/s", "ms a token", "text begins"], body),
    ]


def formats(rows: list[Row]) -> list[str]:
    body = []
    dense = rows[0]["perplexity"]
    for row in rows:
        found = row["perplexity"]
        name = f"{100 * row['target']:.0f} %" if row["target"] else "dense"
        cells = [f"{found[text]:.2f} ({found[text] / dense[text]:.3f})" for text in ("wiki", "c4")]
        body.append([row["weights"], f"{row['megabytes']:.0f}", name, *cells])
    return [
        "## Quantised weights under routing: `python benchmarks/speed.py formats`",
        "Perplexity on 16 held-out sequences of 512 tokens of each text, and its ratio to dense float32; speeds are in "
        "the tables above. Forecasters and routers stay in bfloat16 and float32.",
        markdown(["weights", "MB packed", "units", "Wikipedia", "C4"], body),
    ]


def budgets(result: Row) -> list[str]:
    body = []
    for row in result["rows"]:
        found = row["perplexity"]
        shares = [percent((found[f"wiki {key}"] + found[f"c4 {key}"]) / 2) for key in ("units", "macs")]
        body.append([row["budget"], f"{row['measured']:.3f}x", f"{found['wiki']:.2f}", f"{found['c4']:.2f}", *shares])
    dense = result["dense"]
    return [
        "## MAC budget against unit budget at equal measured speed: `python benchmarks/equal_speed.py budgets`",
        f"Thresholds chosen so that a prefill of 1,024 tokens takes equally long. Dense: {dense['wiki']:.2f} and "
        f"{dense['c4']:.2f}.",
        markdown(["budget", "speed-up", "Wikipedia", "C4", "units", "MACs saved"], body),
    ]


def depth(result: Row) -> list[str]:
    body = [
        [
            row["method"],
            f"{row['measured']:.3f}x",
            f"{1e3 * row['seconds']:.0f}",
            f"{row['perplexity']['wiki']:.2f}",
            f"{row['perplexity']['c4']:.2f}",
            ", ".join(map(str, sorted(row.get("layers", [])))) or "-",
        ]
        for row in result["rows"]
    ]
    return [
        "## Against static depth pruning at equal latency: `python benchmarks/equal_speed.py depth`",
        "Layers with the least ShortGPT score deleted, base weights untrained on both sides; the native engine runs "
        "all, a prefill of 1,024 tokens in turns.",
        markdown(["method", "speed-up", "ms", "Wikipedia", "C4", "layers deleted"], body),
    ]


def torchao(result: Row) -> list[str]:
    body = [
        [
            row["engine"],
            f"{100 * row['target']:.0f} %" if row["target"] else "dense",
            f"{row['perplexity']['wiki']:.2f}",
            f"{row['perplexity']['c4']:.2f}",
        ]
        for row in result["scores"]
    ]
    return [
        "## torchao under the torch back end: `python benchmarks/speed.py torchao`",
        f"Int8 weight-only of torchao {result['torchao']}, not compiled, on the units' matrices; speed-ups against the "
        "same weights dense (prefill, then decode). Perplexity on 8 sequences of 512 tokens of each text.",
        *(speed([row for row in result["rows"] if row["phase"] == phase], phase == "decode") for phase in PHASES),
        markdown(["engine", "units", "Wikipedia", "C4"], body),
    ]


def openvino(result: Row) -> list[str]:
    body = []
    for row in result["rows"]:
        error = "" if row["logit_error"] is None else f"{row['logit_error']:.1e}"
        cells = [row["weights"], row["phase"], row["target"], f"{1e3 * row['median']:.1f}"]
        body.append([*cells, f"{row['tokens_per_second']:.0f}", f"{row['speedup_vs_dense']:.2f}x", error])
    return [
        "## The routed model as an OpenVINO graph: `python benchmarks/openvino_routed.py`",
        f"OpenVINO {result['openvino']}, `If` on each unit's margin in decode, gather and scatter in prefill, weights "
        f"by NNCF; a prompt of {result['prompt_tokens']} tokens. Error: of the last logits against the torch back end.",
        markdown(["weights", "phase", "units", "ms (decode: a token)", "tokens/s", "speed-up", "logit error"], body),
    ]


def agreement(rows: list[Row]) -> list[str]:
    body = [
        [row["path"], f"{row['largest']:.2e}", f"{row['median']:.2e}", f"{row['texts_equal']} of {row['texts']}"]
        for row in rows
    ]
    return [
        "## Agreement with the masked reference: `python benchmarks/agreement.py agreement`",
        "Largest and median error of a logit over 200 random selections of the real model's units (logits have a "
        "standard deviation of about 3), and greedy continuations of 32 tokens that are the reference's own. The "
        "reference computes both branches in float32, with the weights that the format stands for, and a float32 "
        "cache.",
        markdown(["path", "largest error", "median of largest", "same text"], body),
    ]


def lengths(result: Row) -> list[str]:
    body = []
    for row in result["memory"]:
        if row["prompt_tokens"] in (512, 2048, 8192):
            name = f"{100 * row['target']:.0f} %" if row["target"] else "dense"
            body.append([row["engine"], name, str(row["prompt_tokens"]), f"{row['megabytes']:.0f}"])
    return [
        "## How cost grows: `python benchmarks/speed.py lengths`",
        "![Prefill seconds and peak memory over the prompt length](lengths.svg)",
        "Memory: what one prefill adds to a process that holds the model (KV cache included).",
        speed(result["rows"], per_token=False),
        markdown(["engine", "units", "prompt", "MB added"], body),
    ]


SECTIONS: dict[str, Callable[[Any], list[str]]] = {
    f.__name__: f
    for f in (
        prefill,
        matrix,
        decode,
        batch_8,
        batch_32,
        others,
        openvino,
        formats,
        torchao,
        agreement,
        budgets,
        depth,
        lengths,
    )
}


def plot(result: Row) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "lengths"  # the same file for the same data
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    lines: dict[str, list[tuple[int, float]]] = {}
    for row in result["rows"]:
        if row["sparsity"]["target"] in (0.0, 0.4):
            lines.setdefault(f"{row['engine']} {target(row)}", []).append(
                (row["prompt_tokens"], row["seconds"]["median"])
            )
    for name, points in lines.items():
        left.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    memory: dict[str, list[tuple[int, float]]] = {}
    for row in result["memory"]:
        name = f"{row['engine']} {100 * row['target']:.0f} %"
        memory.setdefault(name, []).append((row["prompt_tokens"], row["megabytes"]))
    for name, points in memory.items():
        right.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name)
    left.set(title="prefill", xlabel="prompt tokens", ylabel="seconds", xscale="log", yscale="log")
    right.set(title="memory of a prefill", xlabel="prompt tokens", ylabel="MB", xscale="log", yscale="log")
    for axis in (left, right):
        axis.grid(alpha=0.3)
        axis.legend(fontsize="x-small")
    figure.savefig(ROOT / "docs" / "lengths.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
