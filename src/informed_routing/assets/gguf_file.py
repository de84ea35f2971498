"""The container format of GGUF: keys, tensors, and the several files of one model.

Everything is checked against the file's length before it is read, so that a damaged file is refused and never
read past its end.
"""

from __future__ import annotations

import mmap
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from informed_routing.errors import InputError

if TYPE_CHECKING:
    import numpy

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_VERSIONS = (2, 3)
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.IGNORECASE)
_AGAIN = "Download the file again, or give a folder with safetensors"


@dataclass(frozen=True)
class GgufTensor:
    """One tensor: `shape` is in row-major order, `kind` the number of its type, `start` its first byte."""

    name: str
    shape: tuple[int, ...]
    kind: int
    file: Path
    start: int
    length: int


@dataclass
class GgufModel:
    """Keys and tensors of a model, whatever number of files it is in."""

    path: Path
    files: list[Path]
    keys: dict[str, Any]
    tensors: dict[str, GgufTensor]
    _open: dict[Path, mmap.mmap] = field(default_factory=dict)

    def read(self, tensor: GgufTensor) -> numpy.ndarray[Any, Any]:
        """A tensor as float32, dequantised exactly as the `gguf` package does it. Raises `InputError` for NaN."""
        import numpy
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize, quant_shape_to_byte_shape

        kind = GGMLQuantizationType(tensor.kind)
        if tensor.file not in self._open:
            self._open[tensor.file] = _mapped(tensor.file)
        raw = numpy.frombuffer(self._open[tensor.file], numpy.uint8, tensor.length, tensor.start)
        if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            plain: Any = numpy.float32 if kind is GGMLQuantizationType.F32 else numpy.float16
            values = raw.view(plain).reshape(tensor.shape).astype(numpy.float32)
        else:
            with numpy.errstate(all="ignore"):  # infinite scales: found below, and named
                values = dequantize(raw.reshape(quant_shape_to_byte_shape(tensor.shape, kind)), kind)
            values = values.reshape(tensor.shape)
        if not numpy.isfinite(values).all():
            raise InputError(f"{tensor.file}: tensor {tensor.name} holds NaN or infinite values", _AGAIN)
        return values


def open_gguf(path: Path) -> GgufModel:
    """The model that `path` (any of its files, if it is split) belongs to.

    Raises `InputError` for what is no GGUF file, a damaged or big-endian one, and a missing file of several.
    """
    keys, tensors = _read_file(path)
    count, named = _whole(keys.get("split.count", 0)), _SHARD.fullmatch(path.name)
    if count <= 1:
        return GgufModel(path, [path], keys, tensors)
    if named is None or int(named["count"]) != count:
        raise InputError(
            f"{path} is one of {count} files of a model, but its name does not say which",
            f"Give the files the names they had: NAME-00001-of-{count:05d}.gguf and so on",
        )
    files = [path.with_name(f"{named['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    if absent := [file.name for file in files if not file.is_file()]:
        raise InputError(
            f"{path} is one of {count} files of a model, and {', '.join(absent[:3])} "
            f"{'is' if len(absent) == 1 else 'are'} missing in {path.parent}",
            "Put all files of the model in one folder",
        )
    return _joined(path, files)


def _joined(path: Path, files: list[Path]) -> GgufModel:
    all_keys: dict[str, Any] = {}
    all_tensors: dict[str, GgufTensor] = {}
    total = None
    for number, file in enumerate(files):
        keys, tensors = _read_file(file)
        if _whole(keys.get("split.no", -1)) != number or _whole(keys.get("split.count", 0)) != len(files):
            raise InputError(
                f"{file} says it is file {_whole(keys.get('split.no', -1)) + 1} of {keys.get('split.count', 1)}, "
                f"not {number + 1} of {len(files)}",
                "Give the files of one model, with the names they had",
            )
        total = keys.get("split.tensors.count", total)
        if twice := all_tensors.keys() & tensors.keys():
            raise InputError(f"{file} holds {min(twice)}, which another file of the model holds as well", _AGAIN)
        all_tensors |= tensors
        all_keys = {**keys, **all_keys}  # the first file has the model's keys
    if total is not None and _whole(total) != len(all_tensors):
        raise InputError(f"The files of {path} hold {len(all_tensors)} tensors of {total}", _AGAIN)
    return GgufModel(path, files, all_keys, all_tensors)


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else -1


def _mapped(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except ValueError as error:  # an empty file
        raise InputError(f"{path} is not a GGUF file: it is empty", _AGAIN) from error
    except OSError as error:
        raise InputError(f"{path} cannot be opened: {error.strerror}", "Check the path and its permissions") from error


def _read_file(path: Path) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
    data = _mapped(path)
    if data[:4] != b"GGUF":
        raise InputError(f"{path} is not a GGUF file", "Download it again, or give a folder with safetensors")
    at = _Cursor(path, data)
    at.place = 4
    version = at.number("I")
    if version & 0xFFFF == 0:
        raise InputError(f"{path} is a big-endian GGUF file, which is not read", "Give a little-endian one")
    if version not in _VERSIONS:
        raise InputError(
            f"{path} is of version {version} of GGUF; {' and '.join(map(str, _VERSIONS))} are read",
            "Convert the model again with a newer llama.cpp, or give a folder with safetensors",
        )
    tensor_count, key_count = at.number("Q"), at.number("Q")
    keys: dict[str, Any] = {}
    for _ in range(key_count):
        name = at.text()
        if name in keys:
            raise at.damaged(f"the key {name!r} occurs twice")
        keys[name] = at.value(at.number("I"))
    described = [at.tensor() for _ in range(tensor_count)]
    alignment = keys.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise at.damaged(f"general.alignment is {alignment}, not a power of two")
    start = -(-at.place // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, shape, kind, offset in described:
        if name in tensors:
            raise at.damaged(f"the tensor {name!r} occurs twice")
        if offset % alignment:
            raise at.damaged(f"the tensor {name!r} begins at {offset}, which is no multiple of {alignment}")
        length = _bytes_of(path, name, shape, kind)
        if start + offset + length > len(data):
            raise at.damaged(f"it ends at byte {len(data)}, inside tensor {name!r}")
        tensors[name] = GgufTensor(name, shape, kind, path, start + offset, length)
    _check_overlap(at, tensors.values())
    return keys, tensors


def _check_overlap(at: _Cursor, tensors: Any) -> None:
    end, before = 0, ""
    for tensor in sorted(tensors, key=lambda tensor: tensor.start):
        if tensor.start < end:
            raise at.damaged(f"the tensors {before!r} and {tensor.name!r} overlap")
        end, before = tensor.start + tensor.length, tensor.name


def _bytes_of(path: Path, name: str, shape: tuple[int, ...], kind: int) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import _type_traits

    known = {number.value: number for number in GGMLQuantizationType}
    readable = {GGMLQuantizationType.F32, GGMLQuantizationType.F16, *_type_traits}
    if kind not in known or known[kind] not in readable:
        called = known[kind].name if kind in known else f"number {kind}"
        raise InputError(
            f"{path}: tensor {name} is of the type {called}, which cannot be read",
            "Give a file of another quantisation, or the original model as a folder with safetensors",
        )
    block, size = GGML_QUANT_SIZES[known[kind]]
    if shape[-1] % block:
        raise InputError(
            f"{path}: tensor {name} has rows of {shape[-1]} values, no multiple of {known[kind].name}'s {block}", _AGAIN
        )
    return prod(shape) // block * size


class _Cursor:
    """Reads one value after the other, never past the end of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.place = path, data, 0

    def damaged(self, how: str) -> InputError:
        return InputError(f"{self.path} is damaged: {how}", _AGAIN)

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.place:
            raise self.damaged(f"it ends at byte {len(self.data)}, in its header")
        self.place += count
        return self.data[self.place - count : self.place]

    def number(self, code: str) -> Any:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def value(self, kind: int, depth: int = 0) -> Any:
        """A scalar, a string, a list of strings or arrays, or a numpy array of numbers."""
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _STRING:
            return self.text()
        if kind != _ARRAY or depth > 2:
            raise self.damaged(f"a value of the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if inner in _SCALARS:
            import numpy

            width = struct.calcsize(f"<{_SCALARS[inner]}")
            return numpy.frombuffer(self.take(count * width), numpy.dtype(f"<{_SCALARS[inner]}"))
        if count * 8 > len(self.data) - self.place:
            raise self.damaged(f"it ends at byte {len(self.data)}, in its header")
        return list(self._items(inner, count, depth))

    def _items(self, kind: int, count: int, depth: int) -> Iterator[Any]:
        for _ in range(count):
            yield self.value(kind, depth + 1)

    def tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, axes = self.text(), self.number("I")
        if not 1 <= axes <= 4:
            raise self.damaged(f"the tensor {name!r} has {axes} axes")
        shape = tuple(self.number("Q") for _ in range(axes))[::-1]
        if not all(shape):
            raise self.damaged(f"the tensor {name!r} is empty")
        return name, shape, self.number("I"), self.number("Q")
