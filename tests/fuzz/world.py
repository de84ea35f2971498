"""A small world of files in which every command runs in a second: model, routing folders, texts, settings, tables.

Folder of a harness: `world/` holds the inputs, each made when it is first asked for; `run/` is where commands run, with
copies of the inputs that they name; `cache/`, `home/` and `tmp/` are the user's. All references are relative to `run/`.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.evaluation.local_tasks import byte_tokenizer, words, write_tasks

from informed_routing.assets.cache import cache_dir

from . import process

RECIPE = """
dtype: float32
forecaster: {rank: 4, tokens: 256}
router: {kind: linear, warm_start_tokens: 64, sweeps: 1, sweep_tokens: 64}
forecast: {sequence_length: 32}
route: {steps: 3, batch_size: 2, sequence_length: 32, checkpoint_every: 1, warmup_steps: 1}
lora: {steps: 2, batch_size: 2, sequence_length: 32, rank: 2, checkpoint_every: 1, warmup_steps: 1}
calibration: {tokens: 256, sequence_length: 32, targets: [0.1, 0.2, 0.3, 0.4]}
"""
NOMINAL = """
name: nominal
domains:
  story:
    weight: 1.0
    prompt_tokens: {probabilities: {6: 0.5, 12: 0.5}}
    output_tokens: {probabilities: {1: 0.5, 3: 0.5}}
"""
TARGETS = """
- name: long
  domains:
    story:
      weight: 1.0
      prompt_tokens: {probabilities: {6: 0.3, 12: 0.7}}
      output_tokens: {probabilities: {1: 0.5, 3: 0.5}}
- name: short
  domains:
    story:
      weight: 1.0
      prompt_tokens: {probabilities: {6: 1.0}}
      output_tokens: {probabilities: {1: 0.25, 3: 0.75}}
"""
METRICS = """
- {name: mean, kind: mean, column: executed}
- {name: loss, kind: ratio, column: loss_sum, per: loss_tokens}
"""
GRID = """
name: tiny
models: [model]
sparsities: [0.34]
training: {data: [text.jsonl], dtype: float32, sequence_length: 32, batch_size: 2, tokens: 512, prune_tokens: 128,
  calibration_tokens: 128}
evaluation: {tasks: [], limit: 2, wikitext: false, validation_tokens: 128, batch_size: 4}
methods:
  dense: {label: Dense, recovered: [false]}
  shortgpt: {label: ShortGPT, prune: shortgpt, recovered: [false]}
"""
DOCUMENTS = [words(number, 30) for number in range(60)]


class World:
    """See the module. `make(name)` gives the pristine input of that name."""

    def __init__(self, root: Path, model: str = "model") -> None:
        """`model` is what commands are given in the place of the tiny one, such as the embedded model."""
        self.root, self.model = root, model
        self.files, self.folder = root / "world", root / "run"
        for name in ("world", "run", "cache", "home", "tmp", "streams"):
            (root / name).mkdir(parents=True, exist_ok=True)
        if model == "model":
            _share_engine(root / "cache")

    @property
    def environment(self) -> dict[str, str]:
        """A clean environment for commands: this process's own, with the user's places moved into the harness."""
        kept = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
        return kept | {
            "HOME": str(self.root / "home"),
            "INFORMED_ROUTING_CACHE": str(self.root / "cache" if self.model == "model" else cache_dir()),
            "TMPDIR": str(self.root / "tmp"),
            "LANG": "C.UTF-8",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }

    def make(self, name: str) -> Path:
        """The input `name`, made now if it is the first to ask."""
        path = self.files / name
        if not path.exists():
            maker = _MAKERS[name]
            done = process.in_child(lambda: maker(self, path))
            if not done or not path.exists():
                raise RuntimeError(f"{name} could not be made")
        return path

    def stage(self, names: tuple[str, ...]) -> None:
        """An empty `run/` with copies of these inputs; empty home and temporary folders."""
        pristine = [self.make(name) for name in names if name != "model" or self.model == "model"]
        for folder in (self.folder, self.root / "home", self.root / "tmp"):
            empty(folder)
        for path in pristine:
            copy(path, self.folder / path.name)

    def command(self, *arguments: str, **options: Any) -> process.Outcome:
        """Run the command line in `run/`."""
        settings = {"environment": self.environment, **options}
        if self.model != "model":
            arguments = tuple(self.model if part == "model" else part for part in arguments)
            settings |= {"memory": 12 << 30, "seconds": 600}
        return process.run(arguments, folder=self.folder, streams=self.root / "streams", **settings)

    def _by_command(self, needs: tuple[str, ...], arguments: tuple[str, ...], made: str, target: Path) -> None:
        self.stage(needs)
        found = self.command(*arguments, "-q", "--threads", "1", seconds=120)
        if found.code:
            raise RuntimeError(f"{' '.join(arguments)}: {found.err}")
        (self.folder / made).rename(target)


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy2(source, target)


def empty(folder: Path) -> None:
    """Remove what is in a folder, whatever its permissions."""
    for path in folder.iterdir():
        if path.is_mount():
            subprocess.run(["umount", "-l", str(path)], check=True)
        if path.is_dir() and not path.is_symlink():
            for inner in (path, *(Path(name) for name, _, _ in os.walk(path))):
                inner.chmod(0o755)
            shutil.rmtree(path)
        else:
            path.unlink()


def _share_engine(cache: Path) -> None:
    """Use the engine that this user has compiled already: compiling takes longer than all else."""
    compiled = cache_dir() / "native"
    if compiled.is_dir() and not (cache / "native").exists():
        shutil.copytree(compiled, cache / "native", ignore=shutil.ignore_patterns("tmp*", ".*"))


# -- makers ---------------------------------------------------------------------------------------------------------

Maker = Callable[[World, Path], object]


def _model(_: World, path: Path) -> None:
    from tests.tiny import make_tiny

    shape: dict[str, Any] = {
        "vocab_size": 258,
        "num_hidden_layers": 3,
        "max_position_embeddings": 256,
        "bos_token_id": None,
    }
    make_tiny("llama", eos_token_id=1, **shape).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)


def _settings(text: str) -> Maker:
    return lambda _, path: _write(path, text)


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _jsonl(_: World, path: Path) -> None:
    _write(path, "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))


def _compressed(_: World, path: Path) -> None:
    import zstandard

    lines = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS)
    path.write_bytes(zstandard.ZstdCompressor().compress(lines.encode()))


def _parquet(_: World, path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"text": DOCUMENTS}), path)


def _made_by(needs: tuple[str, ...], made: str, *arguments: str) -> Maker:
    return lambda world, path: world._by_command(needs, arguments, made, path)


def _half(world: World, path: Path) -> None:
    """A fit that was killed after the start of its routers."""
    fit = ("fit", "model", "--recipe", "recipe.yaml", "--data", "text.jsonl", "--out", "half", "--keep-checkpoints")
    world._by_command(("model", "recipe.yaml", "text.jsonl"), fit, "half", path.with_suffix(".tmp"))
    made = path.with_suffix(".tmp")
    for entry in made.iterdir():
        if entry.name != "checkpoints":
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    for name in ("route", "refit", "calibrate"):
        (made / "checkpoints" / f"{name}.safetensors").unlink(missing_ok=True)
    made.rename(path)


def _table(world: World, path: Path) -> None:
    """A measured table with seconds that are the same in every world, so that a mutation of its bytes is, too."""
    import pyarrow
    import pyarrow.parquet

    needs = ("model", "routed", "nominal.yaml", "text.jsonl")
    world._by_command(needs, tuple(_MEASURE.split()), "table.parquet", path)
    table = pyarrow.parquet.ParquetFile(path).read(use_threads=False)
    for place, name in enumerate(table.column_names):
        if "seconds" in name:
            column = pyarrow.array([0.001 * (1 + row % 7) for row in range(len(table))])
            table = table.set_column(place, name, column)
    pyarrow.parquet.write_table(table, path)


def _gguf(_: World, path: Path) -> None:
    """A llama.cpp file of a tiny Llama in float32."""
    import gguf
    from tests.tiny import make_tiny
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    shape: dict[str, Any] = {"vocab_size": 258, "num_hidden_layers": 2, "rms_norm_eps": 1e-5, "pad_token_id": None}
    model = make_tiny("llama", bos_token_id=257, eos_token_id=257, **shape)
    config, weights = model.config, {name: p.detach().numpy() for name, p in model.named_parameters()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(16)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([*bytes_to_unicode().values(), "ab", "<|endoftext|>"])
    writer.add_token_types([1] * 257 + [3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(257)
    writer.add_eos_token_id(257)
    parts = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for name, short in parts.items():
            value = weights[f"model.layers.{layer}.{name}.weight"]
            if short in heads:  # llama.cpp rotates neighbouring pairs
                value = value.reshape(heads[short], 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
            writer.add_tensor(f"blk.{layer}.{short}.weight", value)
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"])
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"])
    writer.add_tensor("output.weight", weights["lm_head.weight"])
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        step()
    writer.close()


_FIT = ("fit", "model", "--recipe", "recipe.yaml", "--data", "text.jsonl", "--out", "out")
_FIT_NEEDS = ("model", "recipe.yaml", "text.jsonl")
_PRUNE = (
    "prune model --method llm-drop-ffn -s 0.17 --out out --data text.jsonl --tokens 256 --sequence-length 64 "
    "--dtype float32"
)
_MEASURE = (
    "whatif measure routed --workload nominal.yaml -n 40 -o table.parquet --domain story=text.jsonl --execution sparse "
    "--dtype float32"
)
_MAKERS: dict[str, Maker] = {
    "model": _model,
    "text.jsonl": _jsonl,
    "text.jsonl.zst": _compressed,
    "text.parquet": _parquet,
    "text.txt": _settings("\n\n".join(DOCUMENTS)),
    "test.pages.jsonl": _settings("".join(json.dumps({"page": text}) + "\n" for text in DOCUMENTS[:4])),
    "recipe.yaml": _settings(RECIPE),
    "nominal.yaml": _settings(NOMINAL),
    "targets.yaml": _settings(TARGETS),
    "metrics.yaml": _settings(METRICS),
    "grid.yaml": _settings(GRID),
    "routed": _made_by(_FIT_NEEDS, "out", *_FIT),
    "tuned": _made_by(_FIT_NEEDS, "out", *_FIT, "--stages", "forecast,route,lora"),
    "pruned": _made_by(("model", "text.jsonl"), "out", *_PRUNE.split()),
    "half": _half,
    "table.parquet": _table,
    "model.gguf": _gguf,
    "data": lambda _, path: write_tasks(path, documents=3),
}
