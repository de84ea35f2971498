"""Put a routing of the embedded model into the package, as `demo:smollm2-135m-routed`.

    python benchmarks/embedded_routing.py out/levers/slim-1000 --result docs/data/equal_time.json

Takes the folder of a fit: its configuration, its routers and forecasters in bfloat16, and a card that says how it was
trained and what it does, from fit.json and from the result of equal_time.py. The tokenizer is the base model's.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import equal_time
import torch
from safetensors.torch import load_file

from informed_routing.assets.models import DEMO_ROUTED, embedded_routing
from informed_routing.files.atomic import write_tensors
from informed_routing.persistence.folder import TENSOR_FILE

COPIED = ("routing_config.json", "config.json", "generation_config.json")


def card(report: dict[str, Any], result: dict[str, Any]) -> str:
    """What the folder says of itself."""
    train, machine = report["stages"]["route"]["train"], result["environment"]
    return f"""# {DEMO_ROUTED}

SmolLM2-135M (Apache-2.0), its weights untouched, with routers and slim fallbacks: the example of informed-routing.

Trained by the language-model loss for {train["steps"]} steps, {train["tokens"]:,} tokens of English Wikipedia, C4,
books, code, documentation and questions, towards 30 % of multiply-accumulates saved. None of the held-out text below is
among it. It knows nothing that its base model does not, and shares its faults.

Measured by the CPU engine in bfloat16 ({machine["cpu"]}, {result["threads"]} threads, prompts of 512 tokens): ratios of
perplexity to the dense model on held-out Wikipedia / C4 (`benchmarks/equal_time.py`).

{equal_time.table(result)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--result", type=Path, required=True, help="JSON of equal_time.py")
    arguments = parser.parse_args()
    target = embedded_routing()
    target.mkdir(exist_ok=True)
    for name in COPIED:
        shutil.copyfile(arguments.folder / name, target / name)
    tensors = load_file(arguments.folder / TENSOR_FILE)
    half = {name: t.to(torch.bfloat16) if t.is_floating_point() else t for name, t in tensors.items()}
    write_tensors(target / TENSOR_FILE, half, {"format": "pt"})
    report = json.loads((arguments.folder / "fit.json").read_text())
    result = json.loads(arguments.result.read_text())
    own = f"{arguments.folder.name} "
    result["rows"] = [row for row in result["rows"] if row["name"] == "dense" or row["name"].startswith(own)]
    (target / "README.md").write_text(card(report, result), encoding="utf-8")
    print(f"wrote {target}")


if __name__ == "__main__":
    main()
