"""GGUF files into ordinary transformers folders.

transformers reads GGUF, but what it returns is marked as quantised, and such a model cannot be saved or
trained. Its (already dequantised) weights are moved into a clean model of the same class once, and kept as
safetensors.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from informed_routing.assets.cache import disk_errors, disk_remedy, locked, publish, scratch_beside
from informed_routing.errors import InputError, WorkError

# Properties of the file that was read, not of the model in it.
_NOT_THE_MODEL = (
    "quantization_config",
    "_name_or_path",
    "_model_name_or_path",
    "architectures",
    "dtype",
    "torch_dtype",
    "transformers_version",
)


def convert_gguf(gguf: Path, target: Path) -> Path:
    """Write `gguf` as a transformers folder at `target`, once.

    It holds bfloat16 safetensors (a float16 or float32 file is rounded), tokenizer and chat template.
    The folder appears whole or not at all; a second call finds it and returns at once.
    Raises `InputError` for a file that is not a readable GGUF model, `WorkError` when the disk fails.
    """
    if is_complete(target):
        return target
    with locked(target):
        if is_complete(target):
            return target
        with scratch_beside(target) as scratch:
            built = scratch / "model"
            _convert(gguf, built)
            publish(built, target)
    return target


def is_complete(folder: Path) -> bool:
    """True if `folder` holds a converted model (written whole: this catches later damage)."""
    weights = folder / "model.safetensors"
    shards = folder / "model.safetensors.index.json"
    return all((folder / name).is_file() for name in ("config.json", "tokenizer.json")) and (
        weights.is_file() or shards.is_file()
    )


def _convert(gguf: Path, out: Path) -> None:
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_header(gguf)
    name: dict[str, Any] = {"gguf_file": gguf.name}
    with quiet_transformers():
        try:
            read = AutoModelForCausalLM.from_pretrained(str(gguf.parent), dtype=torch.bfloat16, **name)
            tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), **name)
            model = _clean_copy(read)
        except MemoryError:
            raise
        except Exception as error:  # the GGUF reader has no error type of its own
            raise InputError(
                f"{gguf} cannot be read as a language model: {first_line(error)}",
                "Give a GGUF file of an architecture that transformers knows, or a folder with safetensors",
            ) from error
        try:
            with disk_errors(f"writing the converted {gguf.name}"):
                model.save_pretrained(out)
                tokenizer.save_pretrained(out)
        except SafetensorError as error:
            reason = first_line(error)
            raise WorkError(f"Writing the converted {gguf.name} failed: {reason}", disk_remedy(reason)) from error


def _clean_copy(read: Any) -> Any:
    """The same weights (not copied) in a new model whose config knows nothing of GGUF."""
    import torch

    settings = {key: value for key, value in read.config.to_dict().items() if key not in _NOT_THE_MODEL}
    for key, value in settings.items():
        if key.endswith("_eps") and isinstance(value, float):
            settings[key] = _shortest_float32(value)
    with torch.device("meta"):
        clean = type(read)(type(read.config)(**settings))
    clean.load_state_dict(read.state_dict(), strict=False, assign=True)
    clean.to(dtype=read.dtype)
    clean.tie_weights()
    absent = [name for name, weight in clean.named_parameters() if weight.is_meta]
    if absent:
        raise ValueError(f"{len(absent)} weights are missing, first {absent[0]}")
    return clean


def _shortest_float32(value: float) -> float:
    """1e-5 for 9.999999747378752e-06: the same float32, as people write it."""
    for digits in range(1, 10):
        short = float(f"{value:.{digits}g}")
        if struct.pack("f", short) == struct.pack("f", value):
            return short
    return value


def check_header(gguf: Path) -> None:
    """Refuse early what is no GGUF file at all, with a message that says so."""
    try:
        with gguf.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise InputError(f"{gguf} cannot be opened: {error.strerror}", "Check the path and its permissions") from error
    if magic != b"GGUF":
        raise InputError(f"{gguf} is not a GGUF file", "Download it again, or give a folder with safetensors")


def first_line(error: BaseException) -> str:
    """First line of an error's text, without a closing full stop."""
    text = str(error).strip()
    return (text.splitlines()[0] if text else type(error).__name__).strip().rstrip(".:")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars and no warnings from transformers inside the block; then its settings as before."""
    import warnings

    from transformers import modeling_gguf_pytorch_utils as reader
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    bar = reader.tqdm  # the GGUF reader uses tqdm directly, past the switch above
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    reader.tqdm = lambda items, *_, **__: items  # type: ignore[assignment, misc]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        reader.tqdm = bar  # type: ignore[misc]
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
