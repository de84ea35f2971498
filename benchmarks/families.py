"""Every causal language model type that transformers has: what of it can be routed, and whether it then computes right.

    python benchmarks/families.py --json docs/data/families.json
    python benchmarks/families.py --page docs/data/families.json > docs/families.md
    python benchmarks/families.py qwen3_moe gpt_oss

Each type is a tiny random model made from its default settings (tiny_types.py). Routing is attached, which compares
the routed model with the base model bit by bit, skipping with the masked reference, cached tokens with uncached ones,
and rows of a padded batch with the same texts alone; what does not hold is refused.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from shared import PROGRESS
from tiny_types import TYPES, make

from informed_routing.config.parts import ForecasterConfig
from informed_routing.errors import InputError
from informed_routing.evaluation.environment import environment
from informed_routing.execution.inspection import inspect
from informed_routing.files.atomic import write_json
from informed_routing.routed_model import RoutedModelForCausalLM

GROUPS = {
    "both": "attention and FFN",
    "ffn": "FFN; attention always runs",
    "attention": "attention; layers have no FFN of their own",
    "refused": "refused, with the reason",
    "not made": "no tiny model could be made of it here",
}


def look(model_type: str) -> dict[str, Any]:
    """What one type is found to be."""
    try:
        model = make(model_type)
    except Exception as error:  # a type needs another package, or settings that are not known here
        return {"type": model_type, "group": "not made", "reason": type(error).__name__}
    try:
        found = inspect(model)
        routed = RoutedModelForCausalLM.attach(model, ForecasterConfig(rank=8))
    except InputError as error:
        return {"type": model_type, "group": "refused", "reason": error.what}
    return {
        "type": model_type,
        "group": routed.routing_config.selection.units,
        "source": "in place" if routed.units[0].unit.family.in_place else found.source,
        "private": sorted({name for names in routed.routing_config.private for name in names}),
        "modules": sorted({unit.module for unit in found.units}),
        "skippable": round(found.skippable, 3),
        "engines": list(found.engines),
    }


def page(content: dict[str, Any]) -> str:
    """The table in Markdown."""
    rows = content["types"]
    counts = Counter(row["group"] for row in rows)
    lines = [
        "# Families",
        "",
        f"All {len(rows)} causal language model types of transformers {content['environment']['transformers']},",
        "each as a tiny random model, by `python benchmarks/families.py --json docs/data/families.json`.",
        "What is routed has passed the self-check.",
        "Skippable is the share of the tiny body's multiply-accumulates at 512 keys: tiny layers are mostly",
        "scores, which only attentions of known code skip. `table`: a row of ours. `code`: the layer's code",
        "is read. `in place`: it is not understood, and units decide where it calls them. Private are",
        "matrices of attentions of unknown code that only executed tokens need. Where no native engine is",
        "named, a type runs in torch. Many types are encoders, or parts of models for images and sound.",
        "",
        *(f"- **{group}** ({counts[group]}): {meaning}" for group, meaning in GROUPS.items()),
        "",
        "| type | routed | read from | units | private | skippable | engines | why not |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in sorted(rows, key=lambda row: (list(GROUPS).index(row["group"]), row["type"])):
        lines.append(
            f"| {row['type']} | {row['group']} | {row.get('source', '')} | {', '.join(row.get('modules', ()))} | "
            f"{', '.join(row.get('private', ()))} | "
            f"{row.get('skippable', '')} | {', '.join(row.get('engines', ()))} | {_cell(row.get('reason', ''))} |"
        )
    return "\n".join(lines)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split()).split("its code is not understood: ")[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help="all by default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    if arguments.page:
        print(page(json.loads(arguments.page.read_text())))
        return
    torch.set_num_threads(1)
    started, rows = time.perf_counter(), []
    for model_type in arguments.types or TYPES:
        rows.append(look(model_type))
        PROGRESS.message(" ".join(str(rows[-1].get(key, "")) for key in ("type", "group", "skippable", "reason")))
    PROGRESS.done()
    content = {"types": rows, "seconds": round(time.perf_counter() - started, 1), "environment": environment()}
    print(dict(Counter(row["group"] for row in rows)))
    if arguments.json:
        write_json(arguments.json, content)


if __name__ == "__main__":
    main()
