"""A tiny saved model with its own tokenizer, a routing folder made from it without training, and texts."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.threads import on_one_thread, one_thread
from tests.tiny import make_tiny

from informed_routing.cli import main

__all__ = ["on_one_thread"]

TEXT = (
    "the river rises in mountains and flows through a wide valley to sea where old town stands with its "
    "harbour small boats carry salt fish wood stone over water every day until winter comes then people "
    "stay near fire"
)
WORDS = list(dict.fromkeys(TEXT.split()))
SENTENCES = [" ".join(WORDS[(7 * i + 3 * j * j) % len(WORDS)] for j in range(40)) for i in range(60)]


@dataclass
class Outcome:
    """What a run of the command line left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def one_line_error(self, code: int = 2) -> str:
        """The error, after checking that it is one line, has no traceback, and came with this exit code."""
        assert self.code == code, self.err
        lines = self.err.strip().splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in self.err
        return lines[0]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """`run("evaluate", folder, ...)`: the command line in this process."""

    def call(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    return call


def save_tokenizer(folder: Path) -> None:
    """A word-level tokenizer over WORDS, with end-of-text and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}river "
    fast.save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny random Llama (hidden size 64, 3 layers) with a tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    model = make_tiny("llama", bos_token_id=None)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 documents of 40 words."""
    path = tmp_path_factory.mktemp("text") / "story.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in SENTENCES))
    return path


@pytest.fixture(scope="session")
def pages_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three pages in WikiText's form."""
    path = tmp_path_factory.mktemp("pages") / "test.pages.jsonl"
    path.write_text("".join(json.dumps({"page": text + " , " + text}) + "\n" for text in SENTENCES[:3]))
    return path


@pytest.fixture(scope="session")
def _routing_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from informed_routing import RoutedModelForCausalLM
    from informed_routing.assets import load_model, pack
    from informed_routing.config.folder import ThresholdRow
    from informed_routing.config.parts import ForecasterConfig, RouterConfig
    from informed_routing.routing.decision import Threshold

    model, tokenizer = load_model(tiny_folder, dtype="float32")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        routed = RoutedModelForCausalLM.attach(
            model,
            ForecasterConfig.model_validate({"rank": 4}),
            RouterConfig.model_validate({"kind": "linear"}),
            name=str(tiny_folder),
        )
    for unit in routed.units:
        assert unit.router is not None
        unit.router.outer.weight.data.mul_(20)  # margins that differ between tokens, as after training
    rows = pack(SENTENCES, tokenizer, 64)
    table = []
    for threshold in torch.linspace(-6, 8, 71).tolist():
        routed.reset_routing_stats()
        with one_thread(), torch.inference_mode(), routed.deciding(Threshold(threshold)):
            routed(input_ids=rows, use_cache=False)
        stats = routed.routing_stats()
        shares = {key: stats[key] for key in ("units", "attention", "ffn", "macs")}
        table.append(ThresholdRow(threshold=threshold, by_unit=routed.stats.shares_by_unit(), **shares))
    routed.with_thresholds(tuple(table), "units", 0.25, 64)
    folder = tmp_path_factory.mktemp("routed")
    routed.save_pretrained(folder)
    return folder


@pytest.fixture
def routing_folder(_routing_folder: Path, tmp_path: Path) -> Path:
    """A copy of a routing folder on the tiny model, with untrained routers and a measured threshold table."""
    return Path(shutil.copytree(_routing_folder, tmp_path / "routed"))
