"""A tiny model on disk, tasks and text in files, and a grid that runs in seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.evaluation.local_tasks import byte_tokenizer, words, write_tasks
from tests.threads import on_one_thread
from tests.tiny import make_tiny

from informed_routing.study.grid import Grid, load_grid

__all__ = ["on_one_thread"]

SHORT: dict[str, Any] = {
    "training": {
        "dtype": "float32",
        "sequence_length": 32,
        "batch_size": 2,
        "tokens": 512,
        "recovery_tokens": 256,
        "recovery": {"rank": 2, "warmup_steps": 0},
        "prune_tokens": 128,
        "calibration_tokens": 256,
        "overrides": {
            "forecaster.tokens": 128,
            "forecaster.rank": 4,
            "router.warm_start_tokens": 64,
            "router.sweeps": 1,
            "router.sweep_tokens": 64,
            "lora.rank": 2,
        },
    },
    "evaluation": {
        "tasks": ["boolq@0", "arc_easy@1"],
        "limit": 3,
        "validation_tokens": 128,
        "feature_tokens": 64,
        "batch_size": 4,
    },
    "speed": {"prompt_tokens": 8, "new_tokens": 2, "repeats": 1},
}
ALL_METHODS: dict[str, Any] = {
    "dense": {"label": "Dense", "recovered": [False]},
    "slicegpt": {"label": "SliceGPT", "prune": "slicegpt"},
    "shortgpt": {"label": "ShortGPT", "prune": "shortgpt"},
    "mod": {"label": "MoD", "recipe": "mod", "recovered": [True]},
    "d-llm": {"label": "D-LLM", "recipe": "dllm", "recovered": [True], "overrides": {"selection.first_layer": 1}},
    "skipgpt": {"label": "SkipGPT", "recipe": "skipgpt"},
    "informed": {"label": "Informed routing", "recipe": "small"},
}
FEW_METHODS = {name: ALL_METHODS[name] for name in ("dense", "shortgpt", "informed")}


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama that reads bytes."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    make_tiny("llama", vocab_size=258, max_position_embeddings=512, bos_token_id=None, eos_token_id=1).save_pretrained(
        folder
    )
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(words(number, 30) for number in range(120)))
    return path


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def write_grid(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, text_file: Path) -> Callable[..., Path]:
    """`write_grid(methods, **settings)`: a YAML file of a short grid."""

    def write(methods: dict[str, Any], **settings: Any) -> Path:
        data = {"models": [str(tiny_folder)], "sparsities": [0.25], **SHORT, "methods": methods, **settings}
        data["training"] = {**SHORT["training"], "data": [str(text_file)], **settings.get("training", {})}
        path = tmp_path_factory.mktemp("grid") / "short.yaml"
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        return path

    return write


@pytest.fixture(scope="session")
def make_grid(write_grid: Callable[..., Path]) -> Callable[..., Grid]:
    """`make_grid(methods, **settings)`: a short grid."""
    return lambda methods, **settings: load_grid(str(write_grid(methods, **settings)))
