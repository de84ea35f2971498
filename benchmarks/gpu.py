"""Speed of the GPU engine on Llama shapes, dense, routed and with fewer layers: one command, some minutes, one GPU.

    python benchmarks/gpu.py                      # 1B and 8B, all cases -> docs/data/gpu/bench.json
    python benchmarks/gpu.py --shape 1B --turns 3 --out /tmp/bench.json
    python benchmarks/speed_page.py               # docs/benchmarks.md from all that was measured

Weights are random, since time does not depend on them; decisions are those recorded from the real embedded model
(gpu_masks.py) and random ones with the same shares. The engine's forwards are recorded whole as CUDA graphs, which
proves that nothing in them waits for the host. Contestants run in turns, and a speed-up is the median over turns of the
dense engine's time over the contestant's in the same turn, so that the clock does not matter. Without a GPU, `--shape
tiny` under TRITON_INTERPRET=1 runs everything but the recording.
"""

from __future__ import annotations

import argparse
import copy
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from gpu_masks import EVERY, TARGETS, for_batch, for_layers, random_like, recorded
from gpu_roofline import CONTEXT, RANK, SHAPES, Shape
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, StaticCache

from informed_routing.cli.progress import make_progress
from informed_routing.config.folder import ThresholdRow
from informed_routing.config.parts import ForecasterConfig, RouterConfig
from informed_routing.evaluation.environment import environment
from informed_routing.execution.formats import FORMATS
from informed_routing.execution.gpu.engine import GpuEngine
from informed_routing.execution.gpu.graph import Recorded
from informed_routing.execution.rows import Rows
from informed_routing.files.atomic import write_json
from informed_routing.models.calls import cached
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.routing.decision import AlwaysExecute, Threshold
from informed_routing.routing.limits import Balance, limit_speedup

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "docs/data/gpu/bench.json"
TINY = Shape(2, 64, 128, 4, 2, 16, 256)
STEPS = 64
"""Decode steps with decisions of their own that one timing runs through."""
FEW_STEPS, FEW_TARGETS = 2, (0.4,)
"""For the tiny shape, which only shows that everything runs."""
PROGRESS = make_progress(quiet=False)


@dataclass(frozen=True)
class Case:
    """One workload."""

    phase: str
    batch: int
    length: int
    """Prompt tokens of a prefill; keys before a decode step."""

    @property
    def decode(self) -> bool:
        return self.phase == "decode"


def cases(shape: str) -> list[Case]:
    lengths, batches, context = ((32,), (2,), 24) if shape == "tiny" else ((1024, 8192, 32768), (1, 8, 32), CONTEXT)
    return [Case("prefill", 1, n) for n in lengths] + [Case("decode", b, context) for b in batches]


def build(shape: Shape, device: torch.device, dtype: torch.dtype) -> Any:
    """A dense model of random weights."""
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.d,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=65536,
        tie_word_embeddings=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


# ---------------------------------------------------------------------------------------------------------
# Contestants
# ---------------------------------------------------------------------------------------------------------


@dataclass
class Contestant:
    """Something that is timed: `run` launches one forward (prefill) or a number of steps (decode)."""

    name: str
    run: Callable[[], Any]
    details: dict[str, Any]


class Bench:
    """One model shape with its engine."""

    def __init__(self, name: str, device: torch.device, dtype: torch.dtype) -> None:
        self.name, self.device = name, device
        tiny = name == "tiny"
        self.steps: int = FEW_STEPS if tiny else STEPS
        self.targets: tuple[float, ...] = FEW_TARGETS if tiny else TARGETS
        self.shape = SHAPES.get(name, TINY)
        dense = build(self.shape, device, dtype)
        self.dense = copy.deepcopy(dense)
        rank = min(RANK, self.shape.d)
        routed: Any = RoutedModelForCausalLM.attach(dense, ForecasterConfig(rank=rank), RouterConfig(kind="linear"))
        self.model = routed.to(dtype)
        self.engine = GpuEngine(self.model)
        self.engine.records = False  # a whole forward is recorded here
        self.balance = rates(device, dtype, 64 if name == "tiny" else 8192)

    def shallow(self, layers: int) -> GpuEngine:
        """The same engine with only the first layers: static depth pruning."""
        engine = copy.copy(self.engine)
        engine.layers, engine.units = self.engine.layers[:layers], 2 * layers
        engine.counts = type(self.engine.counts)(self.model.costs[: 2 * layers], self.device)
        engine._steps, engine._constants = {}, {}
        return engine

    def forward(self, engine: GpuEngine, case: Case, gates: Tensor | None) -> Callable[[], Any]:
        """A forward of the engine with a cache of its own; `gates` [units, batch, tokens] are its decisions."""
        ids = torch.randint(self.shape.vocabulary, (case.batch, 1 if case.decode else case.length), device=self.device)
        past = case.length if case.decode else 0
        embeddings = self.model.decoder.embed_tokens(ids)
        places = past + torch.arange(ids.shape[1], device=self.device)[None]
        rope = self.model.decoder.rotary_emb(embeddings.float(), position_ids=places)
        rows = Rows(torch.zeros(case.batch, dtype=torch.int32, device=self.device), None)
        cache: Any = DynamicCache(config=self.model.config)
        cache.layers = engine.fresh_layers()
        for layer in cache.layers:
            layer.reserve(case.batch, past + ids.shape[1] + 1)
            layer.keys.normal_()
            layer.values.normal_()
        state = copy.copy(self.model.routing_state)
        state.choose(decision=AlwaysExecute() if gates is None else Threshold(0.0))
        stats = copy.deepcopy(self.model.stats)

        def forward() -> Any:
            for layer in cache.layers:
                layer.length = past
            return engine.forward(embeddings, rope, rows, cache, state, stats, keep=1, forced=gates)

        return forward

    def engine_contestant(self, name: str, engine: GpuEngine, case: Case, gates: Tensor | None) -> Contestant:
        """`gates` [units, batch, tokens or steps] or None for dense."""
        if gates is not None:  # what calibration would say of these decisions
            attention, ffn = (1 - gates[kind::2].float().mean().item() for kind in (0, 1))
            row = ThresholdRow(threshold=0.0, units=(attention + ffn) / 2, attention=attention, ffn=ffn, macs=0.0)
            engine.thresholds = (row,)
        current = None if gates is None else gates[..., :1].clone() if case.decode else gates
        recorded_forward = Recorded(self.forward(engine, case, current), self.device)

        def run() -> None:
            if not case.decode:
                recorded_forward()
                return
            for step in range(self.steps):
                if current is not None and gates is not None:
                    current.copy_(gates[..., step : step + 1])
                recorded_forward()

        return Contestant(name, run, {} if gates is None else self.realised(case, gates))

    def realised(self, case: Case, gates: Tensor) -> dict[str, Any]:
        """Shares of these decisions and the limit that they allow, with calls that the engine executes whole."""
        past = case.length if case.decode else 0
        self.model.reset_routing_stats()
        stats = self.model.stats
        whole = self.engine.whole(case.batch, 1 if case.decode else case.length, 0.0)
        state = copy.copy(self.model.routing_state)
        state.choose(decision=Threshold(0.0))
        for step in range(self.steps if case.decode else 1):
            part = gates[..., step : step + 1] if case.decode else gates
            state.forward.gates = dict(enumerate(part.cpu()))
            stats.add(state, (past + 1 + torch.arange(part.shape[2])).expand(case.batch, -1))
        head = self.shape.vocabulary * self.shape.d
        rows = case.batch * (self.steps if case.decode else 1)
        limit = limit_speedup(stats, FORMATS["bfloat16"].storage, self.balance, head, rows, decode=case.decode)
        shares = {key: stats.as_dict(None)[key] for key in ("units", "attention", "ffn", "macs")}
        return {"sparsity": shares, "limit_speedup": limit, "executed_whole": list(whole)}

    def transformers_contestant(self, case: Case) -> Contestant:
        """Transformers' own model: compiled with a static cache for decode, eager for prefill."""
        ids = torch.randint(self.shape.vocabulary, (case.batch, 1 if case.decode else case.length), device=self.device)
        if not case.decode:
            return Contestant("transformers", lambda: self.dense(input_ids=ids, logits_to_keep=1), {})
        cache = StaticCache(config=self.dense.config, max_cache_len=case.length + self.steps + 8)
        prompt = torch.randint(self.shape.vocabulary, (case.batch, case.length), device=self.device)
        self.dense(input_ids=prompt, **cached(self.dense, cache), logits_to_keep=1)
        place = torch.full((case.batch, 1), case.length, device=self.device)
        step = torch.compile(self.dense.forward, mode="reduce-overhead") if self.records else self.dense.forward

        def run() -> None:
            for layer in cache.layers:
                layer.cumulative_length.fill_(case.length)  # type: ignore[union-attr]
            for _ in range(self.steps):
                step(input_ids=ids, **cached(self.dense, cache), position_ids=place, logits_to_keep=1)

        name = "transformers compiled, static cache" if self.records else "transformers, static cache"
        return Contestant(name, run, {})

    @property
    def records(self) -> bool:
        return self.device.type == "cuda"

    def contestants(self, case: Case) -> list[Contestant]:
        """Dense first."""
        found = [self.engine_contestant("dense", self.engine, case, None)]
        tokens = self.steps if case.decode else case.length
        for budget in ("units", "macs"):
            for target in self.targets:
                source = for_layers(recorded(budget, target), self.shape.layers)
                for kind, gates in (("recorded", source), ("random", random_like(source))):
                    if kind == "random" and budget == "macs":
                        continue
                    start, every = (case.length, EVERY) if case.decode else (0, 1)
                    some = for_batch(gates, case.batch, start, tokens, every).to(self.device)
                    one = self.engine_contestant(f"routed, {kind}", self.engine, case, some)
                    found.append(replace(one, details={"budget": budget, "target": target, **one.details}))
        for target in self.targets:
            layers = max(round((1 - target) * self.shape.layers), 1)
            one = self.engine_contestant("static depth", self.shallow(layers), case, None)
            found.append(replace(one, details={"target": target, "layers": layers}))
        return [*found, self.transformers_contestant(case)]


# ---------------------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------------------


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """One run, from its first launch to its last result."""
    if device.type != "cuda":
        begun = time.perf_counter()
        run()
        return time.perf_counter() - begun
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def rates(device: torch.device, dtype: torch.dtype, size: int) -> Balance:
    """Measured bytes a second (read and written by a copy) and MACs a second (a large product)."""
    source = torch.zeros(size * size * 4, dtype=dtype, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    copying = min(seconds(lambda: target.copy_(source), device) for _ in range(6))
    product = min(seconds(lambda: a @ b, device) for _ in range(6))
    return Balance(2 * source.numel() * source.element_size() / copying, size**3 / product)


def compare(bench: Bench, case: Case, turns: int) -> list[dict[str, Any]]:
    """Time the contestants of a case in turns, each turn beginning with another one."""
    PROGRESS.stage(f"{bench.name} {case.phase} {case.batch} x {case.length}", turns + 1)
    entrants = bench.contestants(case)
    times: list[list[float]] = [[] for _ in entrants]
    for turn in range(turns + 1):
        order = [(turn + i) % len(entrants) for i in range(len(entrants))]
        for i in order:
            taken = seconds(entrants[i].run, bench.device)
            if turn:
                times[i].append(taken)
        PROGRESS.advance(turn + 1)
    rows = []
    for entrant, own in zip(entrants, times, strict=True):
        ratios = [dense / mine for dense, mine in zip(times[0], own, strict=True)]
        row = {
            "shape": bench.name,
            "phase": case.phase,
            "batch": case.batch,
            "tokens": case.length,
            "engine": entrant.name,
            "seconds": {"median": statistics.median(own), "min": min(own), "max": max(own), "runs": len(own)},
            "speedup_vs_dense": statistics.median(ratios),
            "speedup_range": [min(ratios), max(ratios)],
            **entrant.details,
        }
        if "limit_speedup" in row:
            row["fraction_of_limit"] = row["speedup_vs_dense"] / row["limit_speedup"]
        rows.append(row)
        PROGRESS.message(f"{entrant.name} {entrant.details.get('target', '')}: {row['speedup_vs_dense']:.3f}x")
    return rows


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", choices=[*SHAPES, "tiny"], help="repeatable [default: 1B and 8B]")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--out", type=Path, default=BENCH)
    arguments = parser.parse_args()
    shapes = arguments.shape or list(SHAPES)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and shapes != ["tiny"]:
        parser.error("there is no GPU here: only --shape tiny with TRITON_INTERPRET=1 runs")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    rows: list[dict[str, Any]] = []
    measured = {}
    begun = time.perf_counter()
    for name in shapes:
        bench = Bench(name, device, dtype)
        measured[name] = vars(bench.balance)
        for case in cases(name):
            rows += compare(bench, case, arguments.turns)
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()
        del bench
    PROGRESS.done()
    record = {"environment": environment(), "rates": measured, "seconds": time.perf_counter() - begun, "rows": rows}
    write_json(arguments.out, record)
    print(f"wrote {arguments.out}: {len(rows)} rows in {record['seconds']:.0f} s")


if __name__ == "__main__":
    main()
