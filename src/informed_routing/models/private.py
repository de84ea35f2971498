"""Matrices of a mixer of tokens that only the executed tokens need, found by leaving them out.

An attention, or whatever else mixes tokens, whose code is not known runs for all tokens: others attend to each of them.
But some of its matrices, those of queries and of the output in an attention, give a token what only that token's own
output is made of. Such matrices are called private here. What is private is measured: a linear layer's output is set to
zero for some tokens of a short text, and nothing may change but the mixer's output for these tokens. With all private
ones left out that output must be zero, or the mixer adds what it reads to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from . import calls

LENGTH = 40
LEFT_OUT = (2, 3, 6, 17)
"""Tokens without the matrix: some directly before others that could see them, none at the end."""

Given = tuple[tuple[Any, ...], dict[str, Any]]


def private_matrices(decoder: Any, mixers: Sequence[nn.Module | None], tokens: Tensor) -> tuple[tuple[str, ...], ...]:
    """Names of the private linear layers of each mixer, by its layer; nothing for mixers without any.

    Runs the decoder once on ids [1, LENGTH], and mixers some times each; mixers of one class with linear layers of the
    same names and sizes are measured once.
    """
    given = _given(decoder, [mixer for mixer in mixers if mixer is not None], tokens)
    found: dict[Any, tuple[str, ...]] = {}
    names: list[tuple[str, ...]] = []
    for mixer in mixers:
        if mixer is None:
            names.append(())
            continue
        linears = dict(_linears(mixer))
        key = (type(mixer), tuple((name, tuple(part.weight.shape)) for name, part in linears.items()))
        if key not in found:
            found[key] = _measured(mixer, linears, given[mixer]) if mixer in given else ()
        names.append(found[key])
    return tuple(names)


def _linears(mixer: nn.Module) -> Iterator[tuple[str, Any]]:
    """Linear layers that are called for one row a token: not those of experts."""
    for name, part in mixer.named_modules():
        inside = [mixer.get_submodule(name.rsplit(".", k)[0]) for k in range(1, name.count(".") + 1)]
        if isinstance(part, nn.Linear | Conv1D) and not any(isinstance(holder, nn.ModuleList) for holder in inside):
            yield name, part


def _given(decoder: Any, mixers: Sequence[nn.Module], tokens: Tensor) -> dict[nn.Module, Given]:
    """What each mixer is called with."""
    given: dict[nn.Module, Given] = {}

    def keep(mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given[mixer] = (args, kwargs)

    handles = [mixer.register_forward_pre_hook(keep, with_kwargs=True) for mixer in mixers]
    try:
        calls.hidden_states(decoder, tokens)
    finally:
        for handle in handles:
            handle.remove()
    return given


def _measured(mixer: nn.Module, linears: dict[str, Any], given: Given) -> tuple[str, ...]:
    whole = _outputs(mixer, given)
    if whole is None:
        return ()
    kept = torch.ones(LENGTH, dtype=torch.bool)
    kept[list(LEFT_OUT)] = False
    private = []
    for name, linear in linears.items():
        with _left_out([linear]) as reached:
            found = _outputs(mixer, given)
        same = found is not None and _same(found[0][:, kept], whole[0][:, kept]) and _all_same(found[1:], whole[1:])
        if same and reached and not _same(found[0], whole[0]):  # type: ignore[index]
            private.append(name)
    with _left_out([linears[name] for name in private]):
        found = _outputs(mixer, given)
    silent = found is not None and not bool(found[0][:, ~kept].any()) and _same(found[0][:, kept], whole[0][:, kept])
    return tuple(private) if silent and private else ()


def _outputs(mixer: nn.Module, given: Given) -> list[Any] | None:
    """What a mixer gives back, its output [1, LENGTH, d] first; None where it is of another form."""
    args, kwargs = given
    with torch.no_grad():
        output = mixer(*args, **kwargs)
    found = list(output) if isinstance(output, tuple) else [output]
    fits = isinstance(found[0], Tensor) and found[0].dim() == 3 and found[0].shape[:2] == (1, LENGTH)
    return found if fits else None


@contextmanager
def _left_out(linears: Sequence[nn.Module]) -> Iterator[list[bool]]:
    """Outputs of linear layers are zero for some tokens within; the list is filled where that was possible."""
    reached: list[bool] = []

    def silence(linear: nn.Module, args: Any, output: Tensor) -> Tensor:
        if output.shape[:-1].numel() != LENGTH:
            return output
        reached.append(True)
        rows = output.reshape(LENGTH, -1).clone()
        rows[list(LEFT_OUT)] = 0
        return rows.view(output.shape)

    handles = [linear.register_forward_hook(silence) for linear in linears]
    try:
        yield reached
    finally:
        for handle in handles:
            handle.remove()


def _same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.equal(one, other))


def _all_same(some: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether whatever else a mixer gives back did not change, as far as it is numbers and not attention weights.

    Those are returned by some implementations and used by nobody: who asks for them gets modules that run whole.
    """
    pairs = [(a, b) for a, b in zip(some, others, strict=True) if isinstance(a, Tensor) and not _is_weights(a)]
    return all(isinstance(b, Tensor) and _same(a, b) for a, b in pairs)


def _is_weights(x: Tensor) -> bool:
    return x.dim() == 4 and x.is_floating_point() and x.shape[2:] == (LENGTH, LENGTH)
