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
try:
    AutoModelForCausalLM.from_pretrained(folder)
except ValueError as error:
    assert "trust_remote_code" in str(error)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
assert config.model_type == "informed_routing"
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
GenerationConfig.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32")
print()  # after what transformers asked
print(type(model).__name__, len(model.units), model.name_or_path)
writer = pipeline("text-generation", model=folder, trust_remote_code=True)
print(writer("the river", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("the"))
"""


def test_auto_classes_and_pipelines(on_disk: Callable[..., Path], tmp_path: Path) -> None:
    folder = on_disk()
    save_tokenizer(folder)
    done = _python(LOADS, folder, home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [f"LlamaForCausalLM 6 {tmp_path / 'base'}", "True"]


BEFORE = """
import sys
import informed_routing
assert "torch" not in sys.modules and "transformers" not in sys.modules
from transformers import AutoConfig
assert AutoConfig.from_pretrained(sys.argv[1]).model_type == "informed_routing"
from transformers import AutoModelForCausalLM
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__mro__[1].__name__)
"""


def test_informed_routing_may_be_imported_first(on_disk: Callable[..., Path], tmp_path: Path) -> None:
    """Then no trust is needed, and its import still costs nothing."""
    done = _python(BEFORE, on_disk(), home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "RoutedModelForCausalLM"


HARNESS = """
import sys
from lm_eval.models.huggingface import HFLM
model = HFLM(pretrained=sys.argv[1], trust_remote_code=True, device="cpu", dtype="float32", batch_size=1)
print(type(model.model).__mro__[1].__name__, round(model.loglikelihood_rolling([
    type("Request", (), {"args": ("the river rises in mountains",)})()], disable_tqdm=True)[0], 4) < 0)
"""


@pytest.mark.slow  # 15 seconds of imports
def test_lm_evaluation_harness(on_disk: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    folder = on_disk()
    save_tokenizer(folder)
    done = _python(HARNESS, folder, home=tmp_path / "home")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["RoutedModelForCausalLM", "True"]
