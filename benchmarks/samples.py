"""What the text is like: prompts continued greedily, dense and at shares of MACs; and how it repeats itself.

    python benchmarks/samples.py demo:smollm2-135m-routed --shares 0.25,0.35,0.45 --json docs/data/samples.json
    python benchmarks/samples.py out/joint --beside pruned-6=out/pruned-6     # a model of `prune` on the same prompts
    python benchmarks/samples.py --page docs/data/samples.json > docs/samples.md

Prompts are the first tokens of held-out rows of Wikipedia and C4, continued by the CPU engine in bfloat16. Repetition
is the share of a continuation's runs of four tokens that it has had before, and the share of continuations that end in
a loop (the last eight tokens came before).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from shared import PROGRESS, TEXTS
from torch import Tensor

from informed_routing.assets import load_texts, load_tokenizer, pack
from informed_routing.baselines.static import load_static
from informed_routing.evaluation.environment import environment
from informed_routing.files.atomic import write_json
from informed_routing.routed_model import RoutedModelForCausalLM

PROMPT, NEW, RUN, LOOP, BATCH = 24, 48, 4, 8, 20


def prompts(tokenizer: Any, count: int) -> Tensor:
    """int64 [count, PROMPT], half of each text, from as many rows as there are, then from their later parts."""
    parts = []
    for text in TEXTS:
        rows = pack(load_texts(text, "heldout"), tokenizer, 512)
        pieces = torch.cat([rows[:, start : start + PROMPT] for start in range(0, 512 - PROMPT, 100)])
        parts.append(pieces[: count // len(TEXTS)])
    return torch.cat(parts)


def repetition(tokens: Tensor) -> tuple[float, bool]:
    """Share of runs that came before, and whether the end is a loop, of one continuation [n]."""
    ids = tokens.tolist()
    runs = [tuple(ids[i : i + RUN]) for i in range(len(ids) - RUN + 1)]
    again = 1 - len(set(runs)) / len(runs)
    ends = [ids[i : i + LOOP] for i in range(len(ids) - LOOP)]
    return again, ids[-LOOP:] in ends


def continued(model: Any, ids: Tensor) -> Tensor:
    """Greedy continuations [n, NEW]; no text may end before."""
    found = []
    for start in range(0, len(ids), BATCH):
        some = ids[start : start + BATCH]
        out = model.generate(
            some, attention_mask=torch.ones_like(some), max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False
        )
        found.append(out[:, PROMPT:])
        PROGRESS.advance(start + len(some))
    return torch.cat(found)


def row_of(name: str, model: Any, share: float, ids: Tensor, tokenizer: Any, shown: int) -> dict[str, Any]:
    """What a model, set to a share of MACs, writes after the prompts."""
    PROGRESS.stage(f"text of {name}", len(ids))
    model.reset_routing_stats()
    out = continued(model, ids)
    realised = model.routing_stats()
    realised.pop("per_unit", None)
    scores = [repetition(one) for one in out]
    return {
        "name": name,
        "share": share,
        "realised": realised if share else None,
        "repeated_runs": sum(score for score, _ in scores) / len(scores),
        "loops": sum(loop for _, loop in scores) / len(scores),
        "texts": [tokenizer.decode(out[i]) for i in range(0, len(ids), max(len(ids) // shown, 1))],
    }


def measured(arguments: argparse.Namespace) -> dict[str, Any]:
    """All shares, and the models beside, on the same prompts."""
    model = RoutedModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(arguments.model)
    model.set_execution("native", weights="bfloat16")
    ids = prompts(tokenizer, arguments.prompts)
    rows: list[dict[str, Any]] = []
    for share in [0.0, *(float(s) for s in arguments.shares.split(","))]:
        held = share and arguments.hold
        model.set_sparsity(share, "macs" if share else None, "held" if held else None)
        rows.append(row_of(f"{share:.0%}" if share else "dense", model, share, ids, tokenizer, arguments.shown))
    for given in arguments.beside:
        name, _, folder = given.partition("=")
        other = RoutedModelForCausalLM.attach(load_static(folder)[0].float()).eval()
        other.set_execution("native", weights="bfloat16")
        rows.append(row_of(name, other, 0.0, ids, tokenizer, arguments.shown))
    PROGRESS.done()
    texts = [tokenizer.decode(ids[i]) for i in range(0, len(ids), max(len(ids) // arguments.shown, 1))]
    about = {"model": arguments.model, "held": arguments.hold, "prompts": texts, "count": len(ids)}
    return {"environment": environment(), **about, "rows": rows}


def page(result: dict[str, Any]) -> str:
    """The result in Markdown."""
    lines = [
        "# Samples",
        "",
        f"`{result['model']}`, greedy, {NEW} tokens after prompts of {PROMPT}, by the CPU engine in bfloat16,",
        f"{'held to its shares' if result.get('held') else 'by thresholds'} (`benchmarks/samples.py`).",
        "",
        f"Repetition over {result['count']} prompts:",
        "",
        "| MACs saved, asked, or model | realised | repeated runs of four | end in a loop |",
        "| --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        realised = f"{row['realised']['macs']:.1%}" if row["realised"] else "-"
        lines.append(f"| {_name(row)} | {realised} | {row['repeated_runs']:.1%} | {row['loops']:.1%} |")
    for i, prompt in enumerate(result["prompts"]):
        lines += ["", f"**{_plain(prompt)}**", ""]
        for row in result["rows"]:
            lines.append(f"- {_name(row)}: {_plain(row['texts'][i])}")
    return "\n".join(lines) + "\n"


def _name(row: dict[str, Any]) -> str:
    """Of a row, which in earlier results is its share."""
    return str(row.get("name") or (f"{row['share']:.0%}" if row["share"] else "dense"))


def _plain(text: str) -> str:
    """A line of Markdown that shows a text as it is."""
    flat = " ".join(text.split())
    return "".join(f"\\{c}" if c in "\\`*_[]<>#|" else c for c in flat)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo:smollm2-135m-routed")
    parser.add_argument("--shares", default="0.25,0.35,0.45")
    parser.add_argument("--hold", action="store_true", help="every text to its share")
    parser.add_argument("--beside", action="append", default=[], metavar="NAME=FOLDER", help="a folder of `prune`")
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--shown", type=int, default=20)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path, help="print the page of a result")
    arguments = parser.parse_args()
    if arguments.page:
        print(page(json.loads(arguments.page.read_text())), end="")
        return
    result = measured(arguments)
    if arguments.json:
        write_json(arguments.json, result)
    print("\n".join(page(result).splitlines()[:14]))


if __name__ == "__main__":
    main()
