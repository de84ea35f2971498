"""Recognise a base model by its weights and settings, whatever floating-point type it was loaded in.

Every weight counts. A digest is exact, so it is kept for the weights as they are in each floating-point type: a
checkpoint rounds to the same values wherever it is loaded. Only two half-precision copies of a float32 checkpoint have
no common form; they are compared by sums over each tensor, with a tolerance for rounding.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..config.folder import BaseModelReference, BasePrint
from ..errors import InputError
from .facts import config_facts, different_fact

SAMPLES_PER_TENSOR = 64
_SMALLEST = 2.0**-10
"""Smaller values are taken as zero: half precision rounds them differently from bfloat16."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

LANES = 1021
"""Words of a tensor are summed in so many sums. A prime: rows that change places do not stay in their sums."""

_PIECE = LANES * 8 * 32
"""Values that are looked at at once on a CPU. Sums do not depend on it: it is a multiple of what they repeat after."""

PROJECTIONS = 16
_TENSOR_TOLERANCE, _MODEL_TOLERANCE = 0.012, 0.0025
"""How far sums of a tensor, and the root mean square of all, may differ, relative to the tensor's norm.

Rounding to bfloat16 moves one sum by 0.0008 of the norm, 0.002 at worst.
"""

_ROUTING_PARTS = frozenset({"attention_routing", "ffn_routing"})


class _Detour(NamedTuple):
    """Values rounded to one type and then held in another."""

    through: torch.dtype
    to: torch.dtype


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes and a sample of the weights: what folders of version 0.1 know of their base model.

    Values are rounded to bfloat16 first, so float32 and bfloat16 copies of one checkpoint agree.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(_own_parameters(model, duplicates=False)):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = tensor.reshape(-1)
        step = max(flat.numel() // SAMPLES_PER_TENSOR, 1)
        sample = flat[::step][:SAMPLES_PER_TENSOR].to(device="cpu", dtype=torch.bfloat16).float()
        sample[sample.abs() < _SMALLEST] = 0.0
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def reference_to(model: Any, name: str, revision: str | None = None) -> BaseModelReference:
    """What a routing folder stores of its base model. A path becomes absolute: it shall hold from any directory.

    Raises InputError for a model with live adapters, which no reference could name, or settings that are no numbers.
    """
    adapters = live_adapters(model)
    if adapters:
        raise InputError(
            f"the base model carries the adapter {adapters[0]!r}",
            "Merge it (merge_and_unload) or take it off (unload) first",
        )
    if name and not name.startswith("demo:"):
        path = Path(name).expanduser()
        name = str(path.absolute()) if path.exists() else name
    return BaseModelReference(
        name=name,
        revision=revision,
        fingerprint=fingerprint(model),
        model_type=model.config.model_type,
        weights=print_of(model),
    )


def print_of(model: Any) -> BasePrint:
    """What all weights and settings of a model are recognised by; routers, forecasters and adapters do not count."""
    tensors = base_tensors(model)
    dtype = dtype_of(tensors)
    return BasePrint(
        dtype=dtype,
        layout=layout(tensors),
        vocabulary=len(model.get_input_embeddings().weight),
        digests=dict(zip(_DTYPES, _digests(tensors, list(_DTYPES.values())), strict=True)),
        sketch=_encode(_sketch(tensors)) if dtype != "float32" else "",
        facts=config_facts(model.config),
    )


def mismatch(model: Any, wanted: BaseModelReference, tensors: Mapping[str, Tensor] | None = None) -> str | None:
    """In what a model is not the base model that was recorded; None when it is.

    `tensors` stand for the model's own weights (`base_tensors`) where given.
    """
    if wanted.weights is None:
        found = fingerprint(model)
        if found == wanted.fingerprint:
            return None
        return f"fingerprint {found[:12]}, not {wanted.fingerprint[:12]}"
    fact = different_fact(config_facts(model.config), wanted.weights.facts)
    if fact:
        return "{} is {!r}, not {!r}".format(*fact)
    tensors = base_tensors(model) if tensors is None else tensors
    if layout(tensors) != wanted.weights.layout:
        return "its weights have other names or shapes"
    if not _same_weights(tensors, wanted.weights):
        return f"other weights, fingerprint {digest(tensors)[:12]}, not {wanted.fingerprint[:12]}"
    if dtype_of(tensors) == wanted.weights.dtype and fingerprint(model) != wanted.fingerprint:
        return f"fingerprint {fingerprint(model)[:12]}, not {wanted.fingerprint[:12]}"
    return None


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """All weights of the base model under a routed or adapted one, by the names that the base model gives them."""
    return dict(_own_parameters(model, duplicates=True))


def live_adapters(model: nn.Module) -> list[str]:
    """Names of PEFT adapters whose layers are in a model now, in order of appearance."""
    found: dict[str, None] = {}
    for module in model.modules():
        if hasattr(module, "base_layer") and hasattr(module, "active_adapters"):
            names = getattr(module, "adapter_layer_names", ())
            for part in names:
                held: Any = getattr(module, part, None)
                if hasattr(held, "keys"):
                    found.update(dict.fromkeys(str(key) for key in held.keys()))  # noqa: SIM118 (a ModuleDict)
            if not names:
                found.update(dict.fromkeys(module.active_adapters))  # type: ignore[arg-type]
    return list(found)


def dtype_of(tensors: Mapping[str, Tensor]) -> Literal["float32", "bfloat16", "float16"]:
    """The floating-point type that holds all weights; float32 for mixed ones."""
    found = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if found == {torch.bfloat16}:
        return "bfloat16"
    return "float16" if found == {torch.float16} else "float32"


def layout(tensors: Mapping[str, Tensor]) -> str:
    """Digest of names and shapes."""
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(f"{name}{tuple(tensors[name].shape)}\n".encode())
    return found.hexdigest()


def digest(tensors: Mapping[str, Tensor], dtype: str | None = None) -> str:
    """Digest of all weights in a floating-point type, by default the one that they have."""
    return _digests(tensors, [_DTYPES[dtype or dtype_of(tensors)]])[0]


@torch.no_grad()
def _digests(tensors: Mapping[str, Tensor], forms: Sequence[torch.dtype | _Detour]) -> list[str]:
    """Digests of all weights in several forms, in one pass over them."""
    found = [hashlib.sha256() for _ in forms]
    known: dict[tuple[int, tuple[int, ...]], list[bytes]] = {}  # tied weights are one tensor with two names
    for name in sorted(tensors):
        tensor = tensors[name]
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if key not in known:
            known[key] = _contents(tensor, forms)
        for one, content in zip(found, known[key], strict=True):
            one.update(f"{name}{tuple(tensor.shape)}\n".encode())
            one.update(content)
    return [one.hexdigest() for one in found]


def _contents(tensor: Tensor, forms: Sequence[torch.dtype | _Detour]) -> list[bytes]:
    """Sums of the bits of a tensor as 64-bit words: exact, whatever the order they are added in, and fast."""
    flat = tensor.contiguous().reshape(-1)
    if flat.storage_offset() % 8:
        flat = flat.clone()
    sums: list[Tensor | None] = [None] * len(forms)
    rests = [b""] * len(forms)
    for piece in _pieces(flat):
        wide = piece.float() if piece.is_floating_point() and len(forms) > 1 else piece
        for place, form in enumerate(forms):
            if not piece.is_floating_point() or form == piece.dtype:
                values = piece
            elif isinstance(form, _Detour):
                values = piece.to(form.through).to(form.to)
            else:
                values = wide.to(form)
            width = 8 // values.element_size()
            whole = values.numel() // (width * LANES) * width * LANES
            if whole:
                words = values[:whole].view(torch.int64).view(-1, LANES).sum(0)
                before = sums[place]
                sums[place] = words if before is None else before + words
            rests[place] += values[whole:].view(torch.uint8).cpu().numpy().tobytes()
    return [(b"" if one is None else one.cpu().numpy().tobytes()) + rest for one, rest in zip(sums, rests, strict=True)]


def _pieces(flat: Tensor) -> Iterator[Tensor]:
    """A tensor in parts that stay in a processor's cache, or are worth a kernel elsewhere."""
    size = _PIECE if flat.device.type == "cpu" else _PIECE * 256
    for start in range(0, flat.numel(), size):
        yield flat[start : start + size]


def _same_weights(tensors: Mapping[str, Tensor], wanted: BasePrint) -> bool:
    own, stored = dtype_of(tensors), wanted.dtype
    if digest(tensors) == wanted.digests.get(own):
        return True
    if own == "float32" and stored == "float32":
        # A half-precision copy of the checkpoint, loaded in float32.
        return any(
            digest(tensors, half) == wanted.digests.get(half) and _holds_only(tensors, half)
            for half in ("bfloat16", "float16")
        )
    if digest(tensors, stored) == wanted.digests.get(stored):
        return True  # a float32 checkpoint, of which a rounded copy was fitted
    return own != stored and "float32" not in (own, stored) and _close(tensors, wanted.sketch)


def _holds_only(tensors: Mapping[str, Tensor], half: str) -> bool:
    """Whether rounding to a half-precision type would change nothing."""
    same = _digests(tensors, [torch.float32, _Detour(_DTYPES[half], torch.float32)])
    return same[0] == same[1]


# -- sums with a tolerance ----------------------------------------------------------------------------------


@functools.cache
def _signs() -> Tensor:
    """[LANES, PROJECTIONS] of 1 and -1, the same for ever."""
    source = random.Random(0)
    return torch.tensor([[1.0 - 2.0 * source.getrandbits(1) for _ in range(PROJECTIONS)] for _ in range(LANES)])


@torch.no_grad()
def _sketch(tensors: Mapping[str, Tensor]) -> Tensor:
    """[tensors, 1 + PROJECTIONS] float32: the norm of each tensor, and signed sums of its values."""
    known: dict[tuple[int, tuple[int, ...]], Tensor] = {}
    rows = []
    for name in sorted(tensors):
        tensor = tensors[name]
        key = (tensor.data_ptr(), tuple(tensor.shape))
        if key not in known:
            known[key] = _sums(tensor)
        rows.append(known[key])
    return torch.stack(rows)


def _sums(tensor: Tensor) -> Tensor:
    flat = tensor.reshape(-1)
    lanes, squares = torch.zeros(LANES, device=flat.device), torch.zeros((), device=flat.device)
    for part in _pieces(flat):
        piece = part.float()
        whole = piece.numel() // LANES * LANES
        lanes += piece[:whole].view(-1, LANES).sum(0)
        lanes[: piece.numel() - whole] += piece[whole:]
        squares += torch.dot(piece, piece)
    return torch.cat([squares.sqrt()[None], lanes @ _signs().to(lanes.device)]).cpu()


def _encode(sketch: Tensor) -> str:
    return base64.b64encode(sketch.numpy().astype("<f4").tobytes()).decode("ascii")


def _close(tensors: Mapping[str, Tensor], stored: str) -> bool:
    import numpy

    try:
        values = numpy.frombuffer(base64.b64decode(stored, validate=True), dtype="<f4")
        wanted = torch.from_numpy(values.astype("float32")).view(len(tensors), 1 + PROJECTIONS)
    except (ValueError, RuntimeError):
        return False
    found = _sketch(tensors)
    counts = torch.tensor([float(tensors[name].numel()) for name in sorted(tensors)])
    tiny = 6 * 2.0**-25 * counts.sqrt()  # float16 has no smaller steps
    norms = wanted[:, 0]
    off = (found - wanted).abs() / (norms + tiny / _TENSOR_TOLERANCE).clamp(min=1e-30)[:, None]
    if not bool(off.isfinite().all()):
        return False
    return bool(off.max() <= _TENSOR_TOLERANCE) and float(off.square().mean().sqrt()) <= _MODEL_TOLERANCE


def _own_parameters(model: nn.Module, duplicates: bool) -> Iterator[tuple[str, Tensor]]:
    """Named weights without routers, forecasters and adapters.

    Raises InputError for weights that are not in memory.
    """
    named = list(model.named_parameters(remove_duplicate=not duplicates))
    adapted = {name.split(".base_layer.")[0] + "." for name, _ in named if ".base_layer." in name}
    for name, parameter in named:
        parts = name.split(".")
        if not _ROUTING_PARTS.isdisjoint(parts):
            continue
        if "base_layer" in parts:
            name = ".".join(part for part in parts if part != "base_layer")
        elif any(".".join(parts[:depth]) + "." in adapted for depth in range(1, len(parts))):
            continue
        if parameter.is_meta:
            raise InputError(f"the weight {name} is not in memory", "Load the whole model on one device")
        tensor = parameter.detach()
        if type(tensor) not in (Tensor, nn.Parameter) and tensor.is_floating_point():
            tensor = tensor.dequantize()  # torchao
        yield name, tensor
