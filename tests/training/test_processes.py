"""The same command under a launcher: two processes on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from informed_routing.config.recipe import Recipe
from informed_routing.routed_model import RoutedModelForCausalLM


@pytest.mark.slow
def test_two_processes_train_one_model(recipe: Recipe, tmp_path: Path) -> None:
    described = tmp_path / "recipe.yaml"
    described.write_text(recipe.model_dump_json())  # JSON is YAML
    out = tmp_path / "out"
    # torchrun is what `accelerate launch` starts for several processes; on CPUs it needs no MPI.
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node",
        "2",
        "--module",
        "informed_routing.cli",
    ]
    command += ["fit", recipe.model, "--recipe", str(described), "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*command, str(out), "-q"], check=True, env=environment, timeout=280)
    report = json.loads((out / "fit.json").read_text())
    assert report["processes"] == 2
    assert report["stages"]["route"]["train"]["tokens"] == 2 * 8 * 2 * 32
    model = RoutedModelForCausalLM.from_pretrained(out)
    with torch.no_grad():
        assert torch.isfinite(model(torch.arange(3, 20)[None]).logits).all()
