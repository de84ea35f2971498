"""docs/results.md and docs/quality.svg from what the other scripts measured (docs/data).

python benchmarks/results.py
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "docs" / "data"
TEXTS = ("demo:wiki", "demo:c4")
SHARES = ("units", "attention", "ffn", "macs")

Record = dict[str, Any]


def main() -> None:
    records = sorted((json.loads(path.read_text()) for path in (DATA / "quality").glob("*.json")), key=order)
    sections = [
        "# Results on the embedded default",
        "SmolLM2-135M-Instruct in float32. Written by `python benchmarks/results.py` from `docs/data`; each file there "
        "names the processor, versions, threads and commit that it comes from, and holds all settings. **All runs "
        "here are of the earlier method**: forecasters of rank 128, no slices, no static layers, at most 200,000 "
        "tokens. What these and more text give is in [levers.md](levers.md) and, over measured time, in "
        "[equal_time.md](equal_time.md).",
        *quality(records),
        "![Perplexity relative to dense over the share of MACs saved](quality.svg)",
    ]
    for name, section in (("dial", dial), ("forecasters", forecasters)):
        if (DATA / f"{name}.json").is_file():
            sections += section(json.loads((DATA / f"{name}.json").read_text()))
    (ROOT / "docs" / "results.md").write_text("\n\n".join(sections) + "\n")
    plot(records)


def order(record: Record) -> tuple[Any, ...]:
    """Budgets, then methods, then stages, then steps."""
    recipe = record["fit"]["recipe"]
    stage = recipe["stages"][-1]
    return (
        record["budget"] != "units",
        recipe["forecaster"]["fallback"],
        stage == "lora",
        recipe[stage]["steps"],
        record["name"],
    )


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def quality(records: list[Record]) -> list[str]:
    # The model as it came, not one with LoRA: the same in all other runs.
    dense = next(record for record in records if "lora" not in record["name"])["runs"][0]["tasks"]
    rows = []
    for record in records:
        recipe = record["fit"]["recipe"]
        stage = recipe["stages"][-1]
        for entry in record["runs"]:
            tasks = entry["tasks"]
            perplexities = [
                f"{t['token_perplexity']:.2f} ({t['token_perplexity'] / dense[n]['token_perplexity']:.3f})"
                for n, t in tasks.items()
            ]
            stats = [task["sparsity"] for task in tasks.values()]
            shares = [percent(math.fsum(s[key] for s in stats) / len(stats)) for key in SHARES]
            found = [percent(task["dial"][record["budget"]]) for task in tasks.values() if "dial" in task]
            goal = f"{100 * entry['target']:.0f} % {record['budget']}" if entry["target"] else "dense"
            start, steps = Path(recipe["start"] or "-").name, f"{recipe[stage]['steps']} {stage}"
            rows.append([record["name"], start, steps, goal, *perplexities, *shares, " / ".join(found) or "-"])
    header = ["run", "from", "steps", "target", "Wikipedia", "C4", "units", "attention", "ffn", "MACs saved", "dial"]
    tokens = next(iter(dense.values()))["tokens"]
    return [
        "## Quality: `python benchmarks/quality.py RUN ...`",
        f"Perplexity per token on {tokens:,} held-out tokens of each text that the fit never saw, in sequences of 512, "
        "at the target share of that very text; its ratio to the untouched dense model in brackets. Shares: mean of "
        "the texts. Dial: the share that the threshold calibrated on other text gives on Wikipedia / C4. Route runs "
        "read 1,024 tokens a step and train routers and forecasters, the base model stays as it is; `skipgpt` has no "
        "forecasters. LoRA runs read 256 tokens a step; their dense row is the adapter with every token executed, so "
        "what routing costs a model that may adapt is the distance from `lora-dense`.",
        markdown(header, rows),
    ]


def dial(record: Record) -> list[str]:
    names = ["all", *TEXTS]
    rows = []
    for run in record["runs"]:
        cells = [f"{100 * run[name]['units']:.2f} ± {100 * run[name]['standard_error']:.2f} %" for name in names]
        rows.append([f"{100 * run['target']:.0f} %", *cells, *(percent(run["all"][key]) for key in SHARES[1:])])
    return [
        "## The dial on unseen text: `python benchmarks/dial.py`",
        f"Units approximated at each setting on {record['heldout_tokens']:,} held-out tokens, thresholds calibrated on "
        f"{record['calibration_tokens']:,} others; ± standard error over groups of sequences. Texts differ in how many "
        "of their tokens are easy.",
        markdown(["setting", "all", "Wikipedia", "C4", "attention", "ffn", "MACs saved"], rows),
    ]


def forecasters(record: Record) -> list[str]:
    seconds = record["seconds"]
    rows = [
        [row["fit"], row["units"], str(row["rank"])]
        + [f"{row[key]:.3f}" for key in ("attention", "ffn", "attention_cosine", "ffn_cosine")]
        for row in record["rows"]
    ]
    gradient = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items() if name not in ("pass", "solve"))
    return [
        "## Forecasters: `python benchmarks/forecasters.py`",
        f"Closed form of all units: {seconds['pass']:.0f} s for a pass over {record['closed_form_tokens']:,} tokens, "
        f"{seconds['solve']:.1f} s to solve every rank. Gradient: {record['gradient_steps']:,} steps of 512 tokens "
        f"from a random start, the units of layers {', '.join(map(str, record['gradient_layers']))} only ({gradient} "
        f"for all ranks of these). Explained variance and mean cosine on {record['judged_tokens']:,} unseen tokens.",
        markdown(["fit", "units", "rank", "attention", "ffn", "attention cosine", "ffn cosine"], rows),
    ]


def plot(records: list[Record]) -> None:
    """Perplexity relative to the dense model over the share of MACs saved, one line a run."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "quality"  # the same file for the same data
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(TEXTS), figsize=(9, 3.6), sharey=True, layout="constrained")
    for axis, text in zip(axes, TEXTS, strict=True):
        for record in records:
            tasks = [entry["tasks"][text] for entry in record["runs"]]
            if "lora" in record["name"]:
                continue
            axis.plot(
                [100 * task["sparsity"]["macs"] for task in tasks],
                [task["token_perplexity"] / tasks[0]["token_perplexity"] for task in tasks],
                marker="o",
                markersize=3,
                label=record["name"],
            )
        axis.set(title=text, xlabel="MACs saved, %", yscale="log")
        axis.set_yticks((1, 1.2, 1.5, 2, 3, 5, 10), minor=False)
        axis.set_yticks((), minor=True)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    low, high = axes[0].dataLim.intervaly
    axes[0].set(ylabel="perplexity / dense", ylim=(low / 1.05, max(high, axes[1].dataLim.intervaly[1]) * 1.05))
    axes[-1].legend(fontsize="small")
    figure.savefig(ROOT / "docs" / "quality.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
