"""What the scripts of the CPU study share: models, text, perplexity, and how a section is run and kept."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from informed_routing.assets import load_texts, load_tokenizer, pack
from informed_routing.cli.progress import make_progress
from informed_routing.evaluation.engines import Engine, RoutedEngine
from informed_routing.evaluation.environment import environment
from informed_routing.evaluation.perplexity import token_perplexity
from informed_routing.evaluation.speed import prompt_text
from informed_routing.files.atomic import write_json
from informed_routing.routed_model import RoutedModelForCausalLM

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "data" / "speed"
UNITS, MACS = ROOT / "out/quality/dial", ROOT / "out/quality/macs-100"
DEMO = ROOT / "out/demo"
BASE = "demo:smollm2-135m"
TEXTS = ("demo:wiki", "demo:c4")
FORMATS = ("float32", "bfloat16", "int8", "int4")
PROGRESS = make_progress(quiet=False)


def routed(folder: Path = UNITS) -> Any:
    return RoutedModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def text() -> Tensor:
    return prompt_text(list(TEXTS), load_tokenizer(BASE), 20_000)


def natives(model: Any, formats: Sequence[str]) -> list[Engine]:
    return [RoutedEngine(model, one) for one in formats]


def perplexity(model: Any, limit: int = 16) -> dict[str, float]:
    """Perplexity and realised shares on the first held-out sequences of 512 tokens of each text."""
    tokenizer, found = load_tokenizer(BASE), {}
    for name in TEXTS:
        rows = pack(load_texts(name, "heldout"), tokenizer, 512)[:limit]
        model.reset_routing_stats()
        result = token_perplexity(model, rows, 1, PROGRESS)
        found[name.removeprefix("demo:")] = result.token_perplexity
        found[f"{name.removeprefix('demo:')} units"] = model.routing_stats()["units"]
        found[f"{name.removeprefix('demo:')} macs"] = model.routing_stats()["macs"]
    return found


@torch.no_grad()
def run_sections(doc: str, sections: Sequence[Callable[[], Any]]) -> None:
    """The command line of a script: name sections, run them, write docs/data/speed/SECTION.json for each."""
    known = {section.__name__: section for section in sections}
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    listing = "".join(f"\n  {name:10} {(one.__doc__ or '').splitlines()[0]}" for name, one in known.items())
    parser.epilog = f"sections:{listing}"
    parser.add_argument("sections", nargs="+", choices=list(known), metavar="SECTION")
    for name in parser.parse_args().sections:
        result = known[name]()
        PROGRESS.done()
        write_json(RESULTS / f"{name}.json", {"environment": environment(), "result": result})
        print(f"wrote docs/data/speed/{name}.json", flush=True)
