"""A desk: a working directory in which the documented commands find what they name, on a tiny model."""

from __future__ import annotations

import json
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import WORDS, Outcome, run, save_tokenizer
from tests.documents.extract import blocks
from tests.documents.small import interrupted
from tests.documents.small import runs as small_runs
from tests.evaluation.local_tasks import write_tasks
from tests.threads import on_one_thread, one_thread
from tests.tiny import make_tiny

from informed_routing.assets import models, text
from informed_routing.cli import main

__all__ = ["on_one_thread", "run"]

Run = Callable[..., Outcome]

LESS_TEXT = {
    "forecaster.tokens": 4096,
    "router.warm_start_tokens": 1024,
    "router.sweeps": 1,
    "router.sweep_tokens": 1024,
    "calibration.tokens": 1024,
    "calibration.targets": [0.1, 0.25, 0.35],
    "calibration.sequence_length": 256,
    "forecast.gradient_accumulation": 1,
    "route.gradient_accumulation": 1,
    "lora.gradient_accumulation": 1,
}
"""What has no flag of its own."""


def story(number: int) -> str:
    """Some forty words, others for each number."""
    return " ".join(WORDS[(7 * number + 3 * place * place + number * place) % len(WORDS)] for place in range(40))


@pytest.fixture(scope="session")
def _tiny_default(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `demo:smollm2-135m` is here: wide enough for the demo's forecasters to save something."""
    folder = tmp_path_factory.mktemp("default")
    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4}
    make_tiny("llama", bos_token_id=None, max_position_embeddings=2048, **sizes).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def _tiny_routed(tmp_path_factory: pytest.TempPathFactory, _tiny_default: Path) -> Path:
    """What `demo:smollm2-135m-routed` is here."""
    folder = tmp_path_factory.mktemp("routed") / "out"
    words = ["fit", "demo:smollm2-135m", "--recipe", "demo", "--steps", "1", "--out", str(folder), "-q"]
    with embedded(_tiny_default), one_thread():
        assert main(words) == 0
    return folder


@contextmanager
def embedded(folder: Path, routed: Path | None = None) -> Iterator[None]:
    """The embedded models are those of these folders, texts are short, fits read little, and there is no network."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("no network")

    from informed_routing.cli import fit

    build = fit.build_recipe

    def with_less_text(name: str | None, overrides: Mapping[str, Any]) -> Any:
        return build(name, overrides).with_overrides(LESS_TEXT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit, "build_recipe", with_less_text)
        patch.setattr(models, "_demo_folder", lambda name: folder)
        if routed is not None:
            patch.setattr(models, "embedded_routing", lambda: routed)
        patch.setattr(text, "demo_documents", lambda name: [story(n + 7 * len(name)) for n in range(600)])
        for place, name in ((socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo")):
            patch.setattr(place, name, refuse)
        yield


@pytest.fixture(autouse=True)
def _embedded(_tiny_default: Path, _tiny_routed: Path) -> Iterator[None]:
    with embedded(_tiny_default, _tiny_routed):
        yield


@pytest.fixture(scope="session")
def _desk(tmp_path_factory: pytest.TempPathFactory, _tiny_default: Path) -> Path:
    """Made by the commands: a fit, a pruned model, a measured table. The YAML files are the documents' own."""
    desk = tmp_path_factory.mktemp("desk")
    (desk / "mine.jsonl").write_text("".join(json.dumps({"text": story(n)}) + "\n" for n in range(600)))
    for block in blocks():
        name = block.text.split("\n", 1)[0].split(":")[0].removeprefix("#").strip()
        if block.language == "yaml" and name.endswith(".yaml"):
            (desk / name).write_text(block.text)
    (desk / "my-grid.yaml").write_text("methods: {informed: {label: Informed, recipe: small}}\n")
    write_tasks(desk / "data")
    with pytest.MonkeyPatch.context() as patch, embedded(_tiny_default), one_thread():
        patch.chdir(desk)
        for words in (
            ["fit", "MODEL", "--out", "out"],
            ["prune", "MODEL", "--method", "shortgpt", "--sparsity", "0.25", "--out", "pruned"],
            ["whatif", "measure", "out", "--workload", "nominal.yaml", "--out", "table.parquet"],
        ):
            for arguments in small_runs(["informed-routing", *words], desk):
                assert main([*arguments, "-q"]) == 0, words
    return desk


@pytest.fixture
def desk(_desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the desk, as working directory."""
    copy = Path(shutil.copytree(_desk, tmp_path / "desk"))
    monkeypatch.chdir(copy)
    return copy


@pytest.fixture(scope="session")
def _known() -> dict[str, Outcome]:
    return {}


@pytest.fixture
def documented(run: Run, desk: Path, _known: dict[str, Outcome]) -> Callable[..., Outcome]:
    """`documented(words)`: a documented command in its small form; the outcome of its last run.

    Where two documents show the same command, but for a slash at the end of a folder, it runs once.
    """

    def call(*words: str, again: bool = False) -> Outcome:
        outcome = Outcome(1, "", "nothing ran")
        prepared = small_runs(words, desk)
        key = " ".join(word.rstrip("/") for word in prepared[-1])
        if key in _known and not again:
            return _known[key]
        for number, arguments in enumerate(prepared):
            outcome = run(*arguments, *([] if "--help" in arguments else ["-q"]))
            assert outcome.code == 0, f"{' '.join(arguments)}: {outcome.err}"
            if number + 1 < len(prepared):
                interrupted(desk / arguments[arguments.index("--out") + 1])
        _known[key] = outcome
        return outcome

    return call
