"""SliceGPT (arXiv 2401.15024): rotate the residual stream to its principal components and keep the first of them.

With RMS norms the rotation is exact: a norm without weights commutes with every orthogonal matrix. No mean is
subtracted from the embeddings, which would be exact for layer norms only.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from ..models.calls import Call, read
from ..progress import Progress
from .remaining import units_of
from .sliced import READS, WRITES, check_sliceable, reshape_sliced, shortcut_name


def slice_model(model: Any, width: int, rows: Tensor, batch_size: int, progress: Progress) -> None:
    """Slice a dense model to `width`, in place; calibrated on rows [n, L] (int64) without padding.

    Raises InputError for a family that cannot be sliced.
    """
    check_sliceable(model)
    with torch.no_grad():
        bases = principal_bases(model, width, rows, batch_size, progress)
        tensors = sliced_tensors(model, bases)
        reshape_sliced(model, width)
        model.load_state_dict(tensors, strict=True, assign=True)


def principal_bases(model: Any, width: int, rows: Tensor, batch_size: int, progress: Progress) -> list[Tensor]:
    """The basis [d, width] (float64, orthonormal columns) that each unit reads in turn, and the one behind the last.

    The last is the identity [d, d]. Each unit sees what slicing has left so far: a sliced unit in its own basis does
    what the dense one does to the stream projected on that basis, so the dense modules are run on projections.
    """
    layers = model.model.layers
    was_training = model.training
    model.eval()
    calls = _layer_calls(model, rows[:1])
    identity = torch.eye(model.config.hidden_size, dtype=torch.float64, device=model.device)
    streams = [model.model.embed_tokens(batch.to(model.device)) for batch in rows.split(batch_size)]
    bases = [_principal(streams, width)]
    progress.stage("principal components", len(layers))
    for index, (layer, call) in enumerate(zip(layers, calls, strict=True)):
        for unit in units_of(model):
            project = (bases[-1] @ bases[-1].T).to(model.dtype)
            for place, stream in enumerate(streams):
                kept = stream @ project
                streams[place] = kept + unit.run(layer, unit.normed(layer, kept), call)
            last = layer is layers[-1] and unit.kind == "ffn"
            bases.append(identity if last else _principal(streams, width))
        progress.advance(index + 1)
    model.train(was_training)
    return bases


def _principal(streams: list[Tensor], width: int) -> Tensor:
    """The `width` directions [d, width] of largest second moment of [B, N, d] streams (before the norm), in float64."""
    size = streams[0].shape[-1]
    moment = torch.zeros(size, size, dtype=torch.float64, device=streams[0].device)
    for stream in streams:
        tokens = stream.reshape(-1, size).double()
        moment += tokens.T @ tokens
    return torch.linalg.eigh(moment).eigenvectors.flip(-1)[:, :width]


def _layer_calls(model: Any, ids: Tensor) -> list[Call]:
    """The call (mask, rotary embeddings) that each layer gets for one row: it fits every batch."""
    found: list[Call] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, __, given: found.append(read(given)), with_kwargs=True)
        for layer in model.model.layers
    ]
    try:
        model.model(input_ids=ids.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def sliced_tensors(model: Any, bases: list[Tensor]) -> dict[str, Tensor]:
    """The state dict of the sliced model from a dense one and its bases; products in float64, then the model's dtype.

    In terms of weights [out, in], norm weights w, and bases Q before and P behind a unit: W diag(w) Q where it reads,
    P^T W where it writes, and P^T Q for the shortcut.
    """
    tensors = dict(model.state_dict())
    dtype = model.dtype

    def put(name: str, value: Tensor) -> None:
        tensors[name] = value.to(dtype).contiguous()

    embedding, head = tensors["model.embed_tokens.weight"], tensors["lm_head.weight"]
    put("model.embed_tokens.weight", embedding.double() @ bases[0])
    put("lm_head.weight", head.double() * tensors.pop("model.norm.weight").double())
    steps = itertools.pairwise(bases)
    for index in range(len(model.model.layers)):
        for unit in units_of(model):
            before, behind = next(steps)
            layer = f"model.layers.{index}"
            module = f"{layer}.{getattr(unit.family, unit.kind)}"
            scale = tensors.pop(f"{layer}.{getattr(unit.family, f'{unit.kind}_in_norm')}.weight").double()
            for name in READS[unit.kind]:
                put(f"{module}.{name}.weight", (tensors[f"{module}.{name}.weight"].double() * scale) @ before)
            written = f"{module}.{WRITES[unit.kind]}"
            put(f"{written}.weight", behind.T @ tensors[f"{written}.weight"].double())
            if f"{written}.bias" in tensors:
                put(f"{written}.bias", behind.T @ tensors[f"{written}.bias"].double())
            put(f"{layer}.{shortcut_name(unit)}.weight", behind.T @ before)
    return tensors
