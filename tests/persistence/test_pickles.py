"""Routed and pruned models are pickled and copied as other transformers models are."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.persistence.conftest import logits
from tests.routed import execute, make_baseline, make_routed
from tests.tiny import FAMILIES, make_tiny, random_ids

from informed_routing.baselines.dropping import drop_units
from informed_routing.baselines.slicegpt import slice_model
from informed_routing.progress import NullProgress
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.routing.decision import Threshold


def _torch_save(model: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def _joblib(model: Any) -> Any:
    joblib = pytest.importorskip("joblib")
    buffer = io.BytesIO()
    joblib.dump(model, buffer)
    buffer.seek(0)
    return joblib.load(buffer)


def _cloudpickle(model: Any) -> Any:
    return pickle.loads(pytest.importorskip("cloudpickle").dumps(model))


WAYS: dict[str, Callable[[Any], Any]] = {
    "torch.save": _torch_save,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "cloudpickle": _cloudpickle,
    "joblib": _joblib,
    "deepcopy": copy.deepcopy,
}


def _engine(model: Any) -> Any:
    return model.routing_state.native.engine


def _run(model: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=random_ids(2, 9)).logits
    return found


@pytest.mark.parametrize("way", WAYS)
def test_a_copy_is_the_same_model(way: str) -> None:
    model: Any = make_routed("llama")
    model.set_execution("masked", kv="keep")
    model.set_decision(Threshold(0.25))
    wanted = _run(model)
    again: Any = WAYS[way](model)
    assert type(again) is type(model)
    assert isinstance(again, RoutedModelForCausalLM)
    assert again.routing_stats() == model.routing_stats()
    assert torch.equal(_run(again), wanted)
    assert again.routing_state.decision == Threshold(0.25)
    assert again.routing_state.execution == "masked"
    assert again.routing_config == model.routing_config
    assert again.routing_state is again.decoder.layers[1].routing_state
    with torch.no_grad():  # what is done to one is not done to the other
        next(again.routing_parameters())[1].add_(9)
    assert torch.equal(_run(model), wanted)
    ids = random_ids(1, 4)
    assert torch.equal(model.generate(ids, max_new_tokens=3), WAYS[way](model).generate(ids, max_new_tokens=3))


@pytest.mark.parametrize("way", ["torch.save", "deepcopy"])
def test_an_engine_is_made_anew(way: str) -> None:
    model: Any = make_routed("llama")
    execute(model, "native")
    model.set_decision(Threshold(0.0))
    wanted = _run(model)
    again: Any = WAYS[way](model)
    assert _engine(again) is None
    assert torch.equal(_run(again), wanted)
    assert _engine(again) is not None
    assert _engine(again) is not _engine(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str) -> None:
    model: Any = make_routed(family)
    assert torch.equal(logits(_torch_save(model)), logits(model))


@pytest.mark.parametrize("name", ["skipgpt", "mod", "dllm"])
def test_other_methods(name: str) -> None:
    model = make_baseline(name)
    assert torch.equal(_run(_torch_save(model)), _run(model))


def test_loaded_models(tuned: Path) -> None:
    for merge in (True, False):
        model: Any = RoutedModelForCausalLM.from_pretrained(tuned, base=make_tiny("llama"), merge_lora=merge)
        again = _torch_save(model)
        assert torch.equal(logits(again), logits(model))
        again.save_pretrained(tuned.parent / f"copy {merge}")  # it still knows its adapter
        assert (tuned.parent / f"copy {merge}" / "lora").is_dir()


@pytest.mark.parametrize("kind", ["dropped", "sliced"])
def test_pruned_models(kind: str, tmp_path: Path) -> None:
    model = make_tiny("llama")
    if kind == "dropped":
        drop_units(model, [(1, "attention"), (2, "ffn")])
    else:
        slice_model(model, 48, random_ids(4, 16), 2, NullProgress())
    for way in ("torch.save", "deepcopy"):
        again: Any = WAYS[way](model)
        assert torch.equal(logits(again), logits(model))
        again.save_pretrained(tmp_path / way)
        assert (tmp_path / way / "pruning.json").is_file()


def test_another_process(tmp_path: Path) -> None:
    """Where nothing of this package was imported before."""
    model: Any = make_routed("llama")
    model.set_decision(Threshold(0.0))
    wanted = _run(model)
    torch.save((model, random_ids(2, 9), wanted), tmp_path / "model.pt")
    program = (
        "import sys, torch; torch.set_num_threads(1)\n"
        "model, ids, wanted = torch.load(sys.argv[1], weights_only=False)\n"
        "with torch.no_grad(): print(float((model(input_ids=ids).logits - wanted).abs().max()))"
    )
    done = subprocess.run([sys.executable, "-c", program, tmp_path / "model.pt"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e-5
