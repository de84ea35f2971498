"""Checkpoints that are damaged, or of another shape, are refused by name; whole ones restore everything."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from informed_routing.errors import InputError
from informed_routing.training.checkpoint import StageRecord, load_checkpoint, save_checkpoint


def parameters() -> dict[str, nn.Parameter]:
    return {"a": nn.Parameter(torch.zeros(3, 4)), "b": nn.Parameter(torch.zeros(5))}


def trained(path: Path) -> tuple[dict[str, nn.Parameter], Any]:
    """A checkpoint after three steps."""
    found = parameters()
    optimizer = torch.optim.AdamW(found.values())
    for _ in range(3):
        sum((p + 1).square().sum() for p in found.values()).backward()  # type: ignore[union-attr]
        optimizer.step()
    save_checkpoint(path, StageRecord(step=3, seconds=1.5, tokens=9, history=[{"step": 0}]), dict(found), optimizer)
    return found, optimizer


def restore(path: Path, found: dict[str, nn.Parameter]) -> StageRecord | None:
    return load_checkpoint(path, found, torch.optim.AdamW(found.values()))


def rewrite(path: Path, change: Any) -> None:
    """Another file with the same metadata, without a checksum, as an earlier version wrote it."""
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    metadata.pop("checksum")
    change(metadata, tensors)
    save_file(tensors, path, metadata)


def test_round_trip_also_of_earlier_versions(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    wanted, optimizer = trained(path)
    rewritten = tmp_path / "old.safetensors"
    rewritten.write_bytes(path.read_bytes())
    rewrite(rewritten, lambda metadata, tensors: None)
    for one in (path, rewritten):
        found = parameters()
        again = torch.optim.AdamW(found.values())
        assert load_checkpoint(one, found, again) == StageRecord(3, 1.5, 9, [{"step": 0}])
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
        for before, after in zip(optimizer.state.values(), again.state.values(), strict=True):
            assert all(torch.equal(before[key], after[key]) for key in before)
    assert restore(tmp_path / "none.safetensors", parameters()) is None


def test_a_changed_byte_is_found_or_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "c.safetensors"
    wanted, _ = trained(path)
    whole = path.read_bytes()
    choose = random.Random(0)
    for place in [*choose.sample(range(len(whole)), 150), len(whole) - 1]:
        changed = bytearray(whole)
        changed[place] ^= 1 << choose.randrange(8)
        path.write_bytes(bytes(changed))
        found = parameters()
        try:
            restore(path, found)
        except InputError:
            continue
        assert place < 1000  # white space of the header
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    for length in (0, 7, 100, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match=r"c\.safetensors is damaged.*--resume"):
            restore(path, parameters())


def _shape(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
    tensors["weight/a"] = torch.zeros(4, 3)


def _absent(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
    del tensors["weight/b"]


def _moment(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
    tensors["optimizer/0/exp_avg"] = torch.zeros(5)


def _number(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
    tensors["optimizer/7/exp_avg"] = torch.zeros(5)


def _half(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
    del tensors["optimizer/0/exp_avg_sq"]


def _record(**changes: Any) -> Any:
    def change(metadata: dict[str, str], tensors: dict[str, torch.Tensor]) -> None:
        metadata["record"] = json.dumps({**json.loads(metadata["record"]), **changes})

    return change


@pytest.mark.parametrize(
    "change",
    [
        _shape,
        _absent,
        _moment,
        _number,
        _half,
        _record(step="3"),
        _record(step=-1),
        _record(history=None),
        _record(finished=1),
        _record(more=2),
        lambda metadata, tensors: metadata.update(record="[" * 100_000),
        lambda metadata, tensors: metadata.pop("record"),
    ],
)
def test_other_shapes_and_records_are_refused_and_nothing_is_taken_over(tmp_path: Path, change: Any) -> None:
    path, found = tmp_path / "c.safetensors", parameters()
    trained(path)
    rewrite(path, change)
    with pytest.raises(InputError, match=r"checkpoint .*c\.safetensors.*(--resume|--overwrite)"):
        restore(path, found)
    assert not any(bool(p.any()) for p in found.values())
