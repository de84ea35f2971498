"""Is every baseline the dense model where it removes or skips nothing, and does generation agree with itself?

    python benchmarks/identity.py      # a minute; writes docs/data/evaluation/identity.json

The embedded model in float32 on held-out text. Pruning at sparsity 0 and routed methods with every token executed stand
beside the dense logits. With random routers, so that both decisions occur: a second `generate()` of D-LLM beside that
of a fresh model, and MoD's decisions step by step beside those of one prefill.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from shared import BASE, ROOT
from torch import Tensor

from informed_routing.assets import load_model, load_texts, load_tokenizer, pack
from informed_routing.baselines.dynamic import RECIPES, attach
from informed_routing.baselines.static import METHODS, prune
from informed_routing.evaluation.environment import environment
from informed_routing.files.atomic import write_json
from informed_routing.models.calls import cache_of, cached
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.routing.decision import Threshold

OUT = ROOT / "docs" / "data" / "evaluation" / "identity.json"
INFORMED = "informed"
TOLERANCE = 1e-3
"""Of logits up to 40: SliceGPT rotates weights, nothing else computes anything else."""


def base() -> Any:
    return load_model(BASE, dtype=torch.float32)[0]


def randomised(name: str) -> Any:
    """The embedded model with a method's parts and random routers, deciding by the sign of their margins."""
    model = RoutedModelForCausalLM.attach(base()) if name == INFORMED else attach(base(), name)
    torch.manual_seed(17)
    for key, parameter in model.routing_parameters():
        if key.endswith("bias"):
            torch.nn.init.zeros_(parameter)  # D-LLM's start would execute nearly all
        elif "norm" not in key:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    model.set_decision(Threshold(0.0))
    return model.eval()


def beside_dense(ids: Tensor) -> list[dict[str, Any]]:
    """Largest difference from the dense logits, method by method."""
    dense = base()(ids).logits
    found = []

    def add(method: str, how: str, model: Any) -> None:
        difference = float((model(ids).logits - dense).abs().max())
        found.append(
            {"method": method, "how": how, "largest_difference": difference, "agrees": difference <= TOLERANCE}
        )

    for method in METHODS:
        model = base()
        prune(model, method, 0.0, ids)
        add(method, "sparsity 0", model)
    for name in (INFORMED, *RECIPES):
        model = randomised(name)
        model.set_execution("sparse")
        model.set_sparsity(0.0)
        add(name, "all executed", model)
        if not name.startswith("mod"):  # whose multiplier belongs to decisions
            model.set_decision(Threshold(float("-inf")))
            add(name, "all decided to execute", model)
    return found


def mixed(share: float) -> bool:
    """Whether both decisions occur often enough to tell anything."""
    return 0.1 < share < 0.9


def second_generation(ids: Tensor) -> dict[str, Any]:
    """D-LLM: `generate` after another `generate`, and on a fresh model."""
    used = randomised("dllm")
    fresh = copy.deepcopy(used)
    settings: dict[str, Any] = {"max_new_tokens": 32, "do_sample": False, "eos_token_id": None}
    used.generate(ids[:1, :64], **settings)
    used.reset_routing_stats()
    again = used.generate(ids[1:2, :48], **settings)
    units = used.routing_stats()["units"]
    same = torch.equal(again, fresh.generate(ids[1:2, :48], **settings))
    return {"approximated": units, "same_tokens": same, "agrees": same and mixed(units)}


def predictor(name: str, ids: Tensor) -> dict[str, Any]:
    """MoD: decisions by the causal predictor in one prefill, and one token after the other."""
    model = randomised(name)
    units = range(len(model.units))

    def gates() -> Tensor:
        return torch.stack([model.routing_state.forward.gates[unit] for unit in units])

    model(ids, use_cache=False)
    whole = gates()
    out = model(ids[:, :32], use_cache=True)
    parts = [gates()]
    for place in range(32, ids.shape[1]):
        out = model(ids[:, place : place + 1], **cached(model, cache_of(out)))
        parts.append(gates())
    steps = torch.cat(parts, -1)
    different = int((steps != whole).sum())
    executed = float(whole.float().mean())
    return {
        "decisions": whole.numel(),
        "executed": executed,
        "different": different,
        "agrees": different == 0 and mixed(executed),
    }


@torch.no_grad()
def main() -> int:
    ids = pack(load_texts("demo:wiki", "heldout"), load_tokenizer(BASE), 96)[:4]
    dense, again = beside_dense(ids), second_generation(ids)
    steps = {name: predictor(name, ids[:2]) for name in ("mod", "mod-block")}
    result = {"dense": dense, "second_generation": again, "predictor": steps}
    write_json(OUT, {"model": BASE, "dtype": "float32", "environment": environment(), **result})
    rows = [*dense, again, *steps.values()]
    for row in rows:
        print(row)
    return 0 if all(row["agrees"] for row in rows) else 1


if __name__ == "__main__":
    raise SystemExit(main())
