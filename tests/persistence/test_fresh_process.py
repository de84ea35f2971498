"""Programs that import only transformers: the auto classes, pipelines and lm-evaluation-harness."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import save_tokenizer


def _python(program: str, *arguments: object, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(home), "HF_MODULES_CACHE": str(home / "modules")}
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, stdin=subprocess.DEVNULL)


LOADS = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline
folder = sys.argv[1]
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert config.model_type == "informed_routing"
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
GenerationConfig.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32")
print(type(model).__name__, len(model.units), model.name_or_path)
writer = pipeline("text-generation", model=folder, trust_remote_code=True)
print(len(writer("the river", max_new_tokens=3, do_sample=False, return_full_text=True)[0]["generated_text"]) > 9)
"""


def test_auto_classes_and_pipelines(on_disk: Callable[..., Path], tmp_path: Path) -> None:
    folder = on_disk()
    save_tokenizer(folder)
    done = _python(LOADS, folder, home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["LlamaForCausalLM", "6", str(tmp_path / "base"), "True"]


def test_without_trust_nothing_is_loaded(on_disk: Callable[..., Path], tmp_path: Path) -> None:
    program = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    done = _python(program, on_disk(), home=tmp_path / "home")
    assert done.returncode == 1
    assert "trust_remote_code" in done.stderr.strip().splitlines()[-1]


HARNESS = """
import sys
from lm_eval.models.huggingface import HFLM
model = HFLM(pretrained=sys.argv[1], trust_remote_code=True, device="cpu", dtype="float32", batch_size=1)
print(type(model.model).__mro__[1].__name__, round(model.loglikelihood_rolling([
    type("Request", (), {"args": ("the river rises in mountains",)})()], disable_tqdm=True)[0], 4) < 0)
"""


def test_lm_evaluation_harness(on_disk: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    folder = on_disk()
    save_tokenizer(folder)
    done = _python(HARNESS, folder, home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["RoutedModelForCausalLM", "True"]
