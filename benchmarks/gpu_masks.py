"""Routing decisions of the real embedded model, recorded once, so that timings on a GPU need no trained weights.

    informed-routing fit demo:smollm2-135m --recipe demo --budget units --sparsity 0.4 --out out/masks
    informed-routing fit demo:smollm2-135m --recipe demo --budget macs --sparsity 0.4 --out out/masks-macs
    python benchmarks/gpu_masks.py          # writes docs/data/gpu/masks.safetensors

One held-out sequence; thresholds are moved until it realises each target share of units or of MACs. Other shapes take
the decisions of the layer at the same relative depth, and longer prompts repeat them.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
MASKS = ROOT / "docs/data/gpu/masks.safetensors"
ROUTED = {"units": ROOT / "out/masks", "macs": ROOT / "out/masks-macs"}
TARGETS = (0.25, 0.40, 0.50)
TOKENS = 2048
EVERY = 16
"""Distance of the decode steps that are timed or counted: few steps, from all over the text."""
STRIDE = 331
"""Sequences of a batch begin this many tokens apart in the recorded text."""


def record() -> dict[str, Tensor]:
    """Gates [units, tokens] packed to bytes, by budget and target."""
    from informed_routing.assets import load_tokenizer
    from informed_routing.evaluation.speed import prompt_text
    from informed_routing.routed_model import RoutedModelForCausalLM
    from informed_routing.routing.decision import Threshold
    from informed_routing.training.calibrate import threshold_at

    found = {}
    for budget, folder in ROUTED.items():
        model = RoutedModelForCausalLM.from_pretrained(folder)
        text = prompt_text(["demo:c4", "demo:wiki"], load_tokenizer("demo:smollm2-135m"), TOKENS)[:TOKENS][None]
        for target in TARGETS:
            model.set_decision(Threshold(threshold_at(model, text, target, budget)))  # type: ignore[arg-type]
            with torch.inference_mode():
                model(input_ids=text, use_cache=False, logits_to_keep=1)
            gates = torch.stack([gate[0] for _, gate in sorted(model.routing_state.forward.gates.items())])
            stats = {key: round(model.routing_stats()[key], 3) for key in ("units", "attention", "ffn", "macs")}
            print(budget, target, stats, flush=True)
            found[f"{budget}-{round(100 * target)}"] = pack(gates)
    return found


def pack(gates: Tensor) -> Tensor:
    """bool [units, tokens] -> uint8 [units, tokens / 8], first token in the lowest bit."""
    bits = gates.view(len(gates), -1, 8).to(torch.uint8)
    return (bits << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`."""
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8) & 1
    return bits.bool().flatten(1)


def recorded(budget: str, target: float) -> Tensor:
    """The recorded gates bool [60, TOKENS]."""
    return unpack(load_file(MASKS)[f"{budget}-{round(100 * target)}"])


def for_layers(gates: Tensor, layers: int) -> Tensor:
    """Gates [2 * layers, tokens] of a model of another depth."""
    pairs = gates.view(-1, 2, gates.shape[1])
    places = torch.linspace(0, len(pairs) - 1, layers).round().long()
    return pairs[places].flatten(0, 1)


def for_batch(gates: Tensor, batch: int, start: int, length: int, every: int = 1) -> Tensor:
    """Gates [units, batch, length] of tokens start, start + every, ... of each sequence; the record repeats."""
    places = start + every * torch.arange(length)[None] + STRIDE * torch.arange(batch)[:, None]
    return gates[:, places % gates.shape[1]]


def random_like(gates: Tensor, seed: int = 0) -> Tensor:
    """Independent decisions with each unit kind's share, so that no unit, token or sequence is special."""
    shares = gates.view(-1, 2, gates.shape[1]).float().mean((0, 2)).repeat(len(gates) // 2)
    return torch.rand(gates.shape, generator=torch.Generator().manual_seed(seed)) < shares[:, None]


if __name__ == "__main__":
    masks = record()
    MASKS.parent.mkdir(parents=True, exist_ok=True)
    save_file(masks, MASKS)
    print(f"wrote {MASKS.relative_to(ROOT)}, {MASKS.stat().st_size / 1e3:.0f} kB")
