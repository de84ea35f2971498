"""Routed over dense time of one model of each shape of family, with the limit that its selections set.

    python benchmarks/family_speed.py --json docs/data/family_speed.json       # about ten minutes, on an idle machine
    python benchmarks/family_speed.py --page docs/data/family_speed.json > docs/family_speed.md
    python benchmarks/family_speed.py phi gpt_oss --share 0.5

Random weights of about a hundred million parameters, routers in closed form of nothing: a share of all decisions is
approximated by one threshold. Prefill of 512 and 2,048 tokens through the body, and decode steps behind 512, all
engines in turns with transformers' own dense model, of which another copy shows the noise (`again`). The torch back
end runs with both policies: `exact` does what the routers say, `auto` leaves out what does not pay. The limit is dense
over routed multiply-accumulates of the decisions that were made with `exact`.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from shared import PROGRESS
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from informed_routing.config.parts import ForecasterConfig
from informed_routing.evaluation.environment import environment
from informed_routing.evaluation.timing import Workload, measure
from informed_routing.execution.native import NativeExecution
from informed_routing.files.atomic import write_json
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.routing.decision import Threshold

_COMMON = {
    **{"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8, "num_attention_heads": 12},
    **{"num_key_value_heads": 4, "head_dim": 64, "vocab_size": 4096, "max_position_embeddings": 4096},
    **{"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 768}
_IN_TURNS = ["sliding_attention", "full_attention"] * 4
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma3_text": {"sliding_window": 512, "layer_types": _IN_TURNS},
    "granite": {"embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.0156},
    "qwen3_moe": {**_EXPERTS, "num_experts": 8},
    "gpt_oss": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 768, "layer_types": _IN_TURNS},
    "deepseek_v3": {
        **_EXPERTS,
        **{"n_routed_experts": 8, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "num_key_value_heads": 12},
        **{"q_lora_rank": 384, "kv_lora_rank": 256, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64},
    },
    "qwen3_next": {
        **_EXPERTS,
        **{"num_experts": 8, "shared_expert_intermediate_size": 768, "linear_num_key_heads": 4},
        **{"linear_num_value_heads": 8, "linear_key_head_dim": 64, "linear_value_head_dim": 64},
        "layer_types": ["linear_attention", "full_attention"] * 4,
    },
    "phi": {"intermediate_size": 3072},
    "cohere": {"intermediate_size": 2048},
    "gpt2": {"n_positions": 4096, "n_inner": 3072},
}
LENGTHS, STEPS, RANK = (512, 2048), 16, 64
_WITHOUT_HEAD_DIM = ("deepseek_v3", "gpt2", "phi", "cohere", "granite")


def make(name: str, dtype: torch.dtype) -> Any:
    """A random model of a shape."""
    settings = {**_COMMON, **SHAPES[name]}
    if name in _WITHOUT_HEAD_DIM:
        settings.pop("head_dim")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **settings), dtype=dtype).eval()


def route(model: Any, ids: Tensor, share: float) -> tuple[Any, float]:
    """The model with random routers and forecasters, and the threshold below which a share of all margins lies."""
    routed = RoutedModelForCausalLM.attach(model, ForecasterConfig(rank=RANK))
    torch.manual_seed(1)
    for unit in routed.units:
        for parameter in unit.parameters():
            nn.init.normal_(parameter, std=0.02)
    with routed.routing_state.using(record_margins=True), routed.deciding(Threshold(0.0)):
        routed.decoder(input_ids=ids, use_cache=False)
        kept = routed.routing_state.forward.margins
        margins = torch.cat([one.flatten().float() for one in kept.values()])
    return routed, float(margins[margins.isfinite()].quantile(share))


class Engine:
    """One way to run a model: the callables that are timed."""

    def __init__(self, name: str, model: Any, use: Callable[[], None]) -> None:
        self.name, self.model, self.use = name, model, use

    def prefill(self, ids: Tensor) -> Callable[[], Any]:
        """A forward through the body."""

        def run() -> None:
            self.use()
            if self.name in ("dense", "again"):
                self.model.get_decoder()(input_ids=ids, use_cache=False)
            else:
                self.model.hidden_states(ids)

        return run

    def decode(self, ids: Tensor) -> Callable[[], Any]:
        """Steps behind a prompt, which is not timed."""

        def prepare() -> Any:
            self.use()
            return self.model(input_ids=ids, use_cache=True, logits_to_keep=1).past_key_values

        def run(cache: Any) -> None:
            for step in range(STEPS):
                self.model(input_ids=ids[:, step : step + 1], past_key_values=cache, use_cache=True)

        return Workload(run, prepare)


def engines_of(dense: Any, again: Any, routed: Any, threshold: float) -> list[Engine]:
    """All that run a model here."""

    def torch_with(policy: str) -> Callable[[], None]:
        def use() -> None:
            routed.routing_state.choose(execution="sparse", native=None, policy=policy, decision=Threshold(threshold))

        return use

    found = [Engine("dense", dense, lambda: None), Engine("again", again, lambda: None)]
    found += [Engine(f"torch {policy}", routed, torch_with(policy)) for policy in ("exact", "auto")]
    if "cpu" in routed.units[0].unit.family.native:
        routed.set_execution("native")
        holder = routed.routing_state.native

        def native(policy: str) -> Callable[[], None]:
            def use() -> None:
                holder.of(routed).policy = policy
                rule = Threshold(threshold)
                routed.routing_state.choose(execution="native", native=holder, policy=policy, decision=rule)

            return use

        assert isinstance(holder, NativeExecution)
        found += [Engine(f"native {policy}", routed, native(policy)) for policy in ("exact", "auto")]
    return found


def limits(routed: Any, engine: Engine, phases: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Dense over routed multiply-accumulates by phase."""
    found = {}
    for phase, run in phases.items():
        prepared = run.prepare() if isinstance(run, Workload) else None
        engine.use()
        routed.reset_routing_stats()
        run.run(prepared) if isinstance(run, Workload) else run()
        found[phase] = routed.stats.limit_speedup()
    return found


@torch.no_grad()
def measured(name: str, share: float, repeats: int, wanted: list[str]) -> dict[str, Any]:
    """All engines of one shape."""
    dtype = torch.bfloat16
    first = make(name, dtype)  # not timed: what is loaded first lies in slower memory
    dense, again = copy.deepcopy(first), copy.deepcopy(first)
    ids = torch.randint(3, 4096, (1, max(LENGTHS)), generator=torch.Generator().manual_seed(2))
    routed, threshold = route(make(name, dtype), ids[:, : LENGTHS[0]], share)
    engines = engines_of(dense, again, routed, threshold)
    rows: dict[str, Any] = {}
    exact = next(engine for engine in engines if engine.name == "torch exact")
    phases: dict[str, Any] = {f"prefill {n}": n for n in LENGTHS} | {"decode": 0}
    phases = {phase: n for phase, n in phases.items() if not wanted or phase in wanted}
    made = {
        phase: {e.name: e.prefill(ids[:, :n]) if n else e.decode(ids[:, : LENGTHS[0]]) for e in engines}
        for phase, n in phases.items()
    }
    limit = limits(routed, exact, {phase: work["torch exact"] for phase, work in made.items()})
    for phase, work in made.items():
        seconds = measure(work, repeats, 2)
        base = seconds["dense"].median
        rows[phase] = {
            "limit": limit[phase],
            "seconds": {engine: timing.median for engine, timing in seconds.items()},
            "spread": {engine: [timing.min, timing.max] for engine, timing in seconds.items()},
            "speedup": {engine: base / timing.median for engine, timing in seconds.items()},
        }
        shown = ", ".join(f"{engine} {value:.2f}x" for engine, value in rows[phase]["speedup"].items())
        PROGRESS.message(f"{name} {phase}: limit {limit[phase]:.2f}x, {shown}")
    parameters = sum(parameter.numel() for parameter in first.parameters())
    units = routed.routing_config.selection.units
    return {"type": name, "parameters": parameters, "units": units, "phases": rows}


def page(content: dict[str, Any]) -> str:
    """The result in Markdown."""
    machine, settings = content["environment"], content["settings"]
    engines = ("again", "torch exact", "torch auto", "native exact", "native auto")
    lines = [
        "# Speed by family",
        "",
        f"Random models of {_COMMON['num_hidden_layers']} layers in bfloat16, {settings['share']:.0%} of all decisions",
        f"approximated with forecasters of rank {RANK}, on {machine['cpu']}, {settings['threads']} threads, commit",
        f"{machine['commit']}; medians of {settings['repeats']} in turns (`benchmarks/family_speed.py`). Figures are",
        "transformers' own dense time over each engine's. `again` is a second copy of the dense model: noise. The",
        "limit is dense over routed multiply-accumulates; attentions of unknown code always compute scores.",
        "",
        "| type | phase | limit | " + " | ".join(engines) + " |",
        "| --- " * (3 + len(engines)) + "|",
    ]
    for row in content["types"]:
        for phase, found in row["phases"].items():
            cells = [f"{found['speedup'][one]:.2f}x" if one in found["speedup"] else "" for one in engines]
            lines.append(f"| {row['type']} | {phase} | {found['limit']:.2f}x | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", metavar="TYPE", help=f"of {', '.join(SHAPES)}; all by default")
    parser.add_argument("--share", type=float, default=0.3, help="of all decisions that are to approximate")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--phase", action="append", default=[], help="prefill 512, prefill 2048 or decode; repeatable")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--idle-gigabytes", type=int, default=4, help="memory that is held, and not used")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    if arguments.page:
        print(page(json.loads(arguments.page.read_text())))
        return
    if unknown := set(arguments.types) - SHAPES.keys():
        parser.error(f"unknown type {min(unknown)}; choose from {', '.join(SHAPES)}")
    torch.set_num_threads(arguments.threads)
    held = torch.ones(arguments.idle_gigabytes * 2**28)
    rows = [measured(name, arguments.share, arguments.repeats, arguments.phase) for name in arguments.types or SHAPES]
    PROGRESS.done()
    del held
    settings = {name: getattr(arguments, name) for name in ("share", "repeats", "threads", "idle_gigabytes")}
    if arguments.json:
        write_json(arguments.json, {"settings": settings, "types": rows, "environment": environment()})


if __name__ == "__main__":
    main()
