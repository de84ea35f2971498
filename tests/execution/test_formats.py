"""The table of weight formats, and its agreement with the compiled engine."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from informed_routing.errors import InputError
from informed_routing.execution.cpu import build, interface
from informed_routing.execution.cpu.packing import Packer
from informed_routing.execution.formats import FORMATS, GROUP, PACKED, Weights, packed_of

needs_compiler = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


def test_rows_are_the_names_that_may_be_asked_for() -> None:
    assert set(FORMATS) == set(get_args(Weights))
    assert {name for name, row in FORMATS.items() if row.id is not None} == set(PACKED)
    ids = [FORMATS[name].id for name in PACKED]
    assert len(set(ids)) == len(ids)


def test_bytes_of_a_weight_with_its_share_of_a_group() -> None:
    found = {name: row.bytes for name, row in FORMATS.items()}
    assert found == {
        "float32": 4,
        "bfloat16": 2,
        "float16": 2,
        "int8": 1 + 2 / GROUP,
        "int4": 0.5 + 4 / GROUP,
    }


def test_what_other_parts_are_stored_in() -> None:
    for name, head, forecaster, cache in (
        ("float32", "float32", "float32", "float32"),
        ("bfloat16", "bfloat16", "bfloat16", "bfloat16"),
        ("float16", "float16", "float16", "float16"),
        ("int8", "int8", "bfloat16", "bfloat16"),
        ("int4", "int8", "bfloat16", "bfloat16"),
    ):
        row = FORMATS[name]
        assert (row.of("head").name, row.of("forecaster").name, row.of("cache").name) == (head, forecaster, cache)
        found = row.storage
        assert (found.head, found.forecaster, found.kv) == tuple(
            FORMATS[part].bytes for part in (head, forecaster, cache)
        )
        assert not row.of("ungrouped").group_bytes
        assert row.of("forecaster").has_dtype
        assert row.of("cache").has_dtype


def test_torchs_dtypes_of_formats() -> None:
    assert {name: row.dtype for name, row in FORMATS.items()} == {
        "float32": torch.float32,
        "bfloat16": torch.bfloat16,
        "float16": torch.float16,
        "int8": None,
        "int4": None,
    }
    given = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
    assert [packed_of(dtype) for dtype in given] == ["float32", "bfloat16", "float32", "float32"]


@needs_compiler
def test_the_compiled_engine_has_the_interface_of_python() -> None:
    library = build.library()
    lines = dict(line.split() for line in library.ir_abi().decode().splitlines())
    assert {name: int(value) for name, value in lines.items()} == interface.ABI


@needs_compiler
@pytest.mark.parametrize(
    ("name", "value"), [("ABI", 0), ("Layer", 8), ("Call", 8), ("PHASES", 7), ("int4", 9), ("int2", 4)]
)
def test_an_engine_of_another_interface_is_refused_by_name(
    name: str, value: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = interface.ABI.get(name)
    monkeypatch.setitem(interface.ABI, name, value)
    path = build.library_path()
    with pytest.raises(InputError, match=rf"{name} is {there} in it and {value} in Python.*Delete .*{path.name}"):
        build.loaded(path)


@needs_compiler
def test_a_format_that_only_the_engine_knows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(interface.ABI, "int8")
    with pytest.raises(InputError, match="int8 is 2 in it and None in Python"):
        build.loaded(build.library_path())


@needs_compiler
def test_an_engine_that_says_nothing_of_its_interface_is_refused(tmp_path: Path) -> None:
    source, engine = tmp_path / "engine.cpp", tmp_path / "engine.so"
    source.write_text('extern "C" int ir_panel() { return 16; }')
    subprocess.run([str(build.compiler()), "-shared", "-fPIC", "-o", str(engine), str(source)], check=True)
    with pytest.raises(InputError, match="ABI is None in it"):
        build.loaded(engine)


@needs_compiler
def test_a_format_that_is_not_packed_is_an_error() -> None:
    library: Any = build.library()
    assert library.ir_packed_bytes(99, 64, 96) == -1
    with pytest.raises(InputError, match="does not pack weights in float16"):
        Packer(library, "float32", 1).linear(torch.zeros(8, 32), None, FORMATS["float16"])


@needs_compiler
@pytest.mark.parametrize("name", PACKED)
def test_inputs_that_fill_no_groups_are_packed_in_half_precision(name: str) -> None:
    packer = Packer(build.library(), name, 1)  # type: ignore[arg-type]
    packed = packer.linear(torch.ones(8, GROUP + 1), None, packer.body)
    assert packed.type == packer.body.of("ungrouped").id
