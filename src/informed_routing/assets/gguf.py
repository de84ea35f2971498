"""GGUF files into ordinary transformers folders.

The file is read here, not by transformers: its reader passes over keys and tensors that change results. What
becomes of keys, tensors and tokens is in `gguf_models`, `gguf_rope` and `gguf_tokens`; all of it is understood, or
the file is refused by name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from informed_routing.assets.cache import disk_errors, disk_remedy, locked, publish, scratch_beside, sha256_of
from informed_routing.assets.gguf_file import GgufModel, open_gguf
from informed_routing.assets.gguf_models import architecture_of, check_tensors, restored, settings_of, weight_names
from informed_routing.assets.gguf_tokens import GgufTokenizer, read_tokenizer
from informed_routing.errors import InputError, WorkError

if TYPE_CHECKING:
    import torch

CONVERSION = 2
"""Raised when the same file gives another folder: folders of other conversions are not used any more.

1: transformers' reader, GPT-2's pre-tokenizer for every file.
"""
_SHARD = 2 << 30  # bytes of weights in one safetensors file


def convert_gguf(gguf: Path, target: Path, dtype: torch.dtype | None = None) -> Path:
    """Write the model that `gguf` belongs to as a transformers folder at `target`, once.

    It holds safetensors, tokenizer and chat template. Every weight is stored in the narrowest of bfloat16, float16
    and float32 that holds it exactly, or in `dtype`, rounded. The folder appears whole or not at all; a second call
    finds it and returns at once. Raises `InputError` for a file that cannot be read rightly, `WorkError` when the
    disk fails.
    """
    if is_complete(target):
        return target
    with locked(target):
        if is_complete(target):
            return target
        with scratch_beside(target) as scratch:
            built = scratch / "model"
            _convert(open_gguf(gguf), built, dtype)
            publish(built, target)
    return target


def folder_name(gguf: Path) -> str:
    """The name of the folder of a converted file: its stem, its content, and how it was converted."""
    files = open_gguf(gguf).files
    content = sha256_of(files[0]) if len(files) == 1 else hashlib.sha256(b"".join(map(_digest, files))).hexdigest()
    return f"{gguf.stem}-{content[:16]}-v{CONVERSION}"


def _digest(file: Path) -> bytes:
    return bytes.fromhex(sha256_of(file))


def is_complete(folder: Path) -> bool:
    """True if `folder` holds a converted model (written whole: this catches later damage, by ends and headers)."""
    settings, weights = sorted(folder.glob("*.json")), sorted(folder.glob("*.safetensors"))
    if not {"config.json", "tokenizer.json"} <= {path.name for path in settings} or not weights:
        return False
    index = folder / "model.safetensors.index.json"
    try:
        wanted = set(json.loads(index.read_text("utf-8"))["weight_map"].values()) if index.is_file() else set()
        return wanted <= {path.name for path in weights} and all(map(_ends_well, [*settings, *weights]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _ends_well(path: Path) -> bool:
    """Whether a file of a conversion has its end: of JSON the last brace, of tensors the last byte of the header's."""
    from safetensors import SafetensorError, safe_open

    if path.suffix == ".json":
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - 16, 0))
            return file.read().rstrip().endswith(b"}")
    try:
        with safe_open(str(path), framework="pt"):
            return True
    except SafetensorError:
        return False


def _convert(model: GgufModel, out: Path, dtype: torch.dtype | None) -> None:
    from safetensors import SafetensorError

    with quiet_transformers():
        try:
            settings = settings_of(model)
            tokens = read_tokenizer(model, settings["vocab_size"])
            empty = _empty_model(settings | tokens.settings())
        except (MemoryError, InputError):
            raise
        except Exception as error:  # settings that contradict each other fail in many ways
            raise InputError(
                f"{model.path} cannot be read as a language model: {' '.join(str(error).split())[:300].rstrip('.')}",
                "Give the original model as a folder with safetensors",
            ) from error
        try:
            with disk_errors(f"writing the converted {model.path.name}"):
                out.mkdir()
                _write(model, empty, settings, tokens, out, dtype)
        except SafetensorError as error:
            reason = first_line(error)
            raise WorkError(f"Writing the converted {model.path.name} failed: {reason}", disk_remedy(reason)) from error


def _empty_model(settings: dict[str, Any]) -> Any:
    """The model without weights, on the device "meta"."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = dict(settings)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def _write(
    model: GgufModel, empty: Any, settings: dict[str, Any], tokens: GgufTokenizer, out: Path, dtype: torch.dtype | None
) -> None:
    import torch

    _, architecture = architecture_of(model)
    tied = settings["tie_word_embeddings"]
    weights = {name: value for name, value in empty.state_dict().items() if name != "lm_head.weight" or not tied}
    wanted = {name: tuple(value.shape) for name, value in weights.items()}
    names = weight_names(architecture, list(wanted))
    check_tensors(model, names)
    for name, shape in wanted.items():
        if (found := model.tensors[names[name]].shape) != shape:
            raise InputError(
                f"{model.path} is not read: tensor {names[name]} has the shape {list(found)}, not {list(shape)}",
                "Give the original model as a folder with safetensors",
            )
    writer = _Weights(out)
    for name in wanted:
        values = restored(name, model.read(model.tensors[names[name]]), architecture, settings)
        writer.add(name, _stored(torch.from_numpy(values.copy()), dtype))
    writer.close()
    config = empty.config
    config.architectures = [type(empty).__name__]
    config.dtype = writer.widest()
    config.save_pretrained(out)
    if (generation := empty.generation_config) is not None:
        ends = tokens.ends
        generation.eos_token_id = ends if len(ends) > 1 else ends[0] if ends else None
        generation.save_pretrained(out)
    tokens.tokenizer.save_pretrained(out)


def _stored(values: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """`values`, float32, in the narrowest type that holds them exactly, or in `dtype`."""
    import torch

    if dtype is not None:
        return values.to(dtype)
    for narrow in (torch.bfloat16, torch.float16):
        if torch.equal(rounded := values.to(narrow).float(), values):
            del rounded
            return values.to(narrow)
    return values


class _Weights:
    """Writes weights to safetensors files of bounded size as they come."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.held: dict[str, torch.Tensor] = {}
        self.files: list[list[str]] = []
        self.size = self.total = 0
        self.types: set[torch.dtype] = set()

    def add(self, name: str, values: torch.Tensor) -> None:
        size = values.numel() * values.element_size()
        if self.held and self.size + size > _SHARD:
            self._flush()
        self.held[name] = values.contiguous()
        self.types.add(values.dtype)
        self.size += size
        self.total += size

    def _flush(self) -> None:
        from safetensors.torch import save_file

        save_file(self.held, self._part(len(self.files)), metadata={"format": "pt"})
        self.files.append(list(self.held))
        self.held, self.size = {}, 0

    def _part(self, number: int) -> Path:
        return self.out / f"part-{number}.safetensors"

    def close(self) -> None:
        self._flush()
        count = len(self.files)
        if count == 1:
            self._part(0).rename(self.out / "model.safetensors")
            return
        places: dict[str, str] = {}
        for number, names in enumerate(self.files):
            name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._part(number).rename(self.out / name)
            places |= dict.fromkeys(names, name)
        index = {"metadata": {"total_size": self.total}, "weight_map": places}
        (self.out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")

    def widest(self) -> torch.dtype:
        """The type that holds every weight written."""
        import torch

        return next(iter(self.types)) if len(self.types) == 1 else torch.float32


def first_line(error: BaseException) -> str:
    """First line of an error's text, without a closing full stop."""
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__).strip().rstrip(".:")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings from transformers inside the block; then its settings as before."""
    import warnings

    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
