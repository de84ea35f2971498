"""Recognise a base model by its weights, whatever floating-point type it was loaded in."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

SAMPLES_PER_TENSOR = 64
_SMALLEST = 2.0**-10
"""Smaller values are taken as zero: half precision rounds them differently from bfloat16."""


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes and a sample of the weights of a model without routing or adapters.

    Values are rounded to bfloat16 first, so float32 and bfloat16 copies of one checkpoint agree.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters(), key=lambda item: item[0]):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        step = max(flat.numel() // SAMPLES_PER_TENSOR, 1)
        sample = flat[::step][:SAMPLES_PER_TENSOR].to(device="cpu", dtype=torch.bfloat16).float()
        sample[sample.abs() < _SMALLEST] = 0.0
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()
