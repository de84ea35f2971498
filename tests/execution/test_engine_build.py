"""The compiled engine in the cache: damage is mended, and what others could have written is never loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from informed_routing.assets import cache
from informed_routing.errors import InputError
from informed_routing.execution.cpu import build, price_table
from informed_routing.execution.cpu.price_table import ROWS, PriceTable

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def _compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An engine without optimisation, which loads and is made in a second or two."""
    folder = tmp_path_factory.mktemp("compiled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cache.CACHE_VARIABLE, str(folder))
        patch.setenv(build.FLAGS_VARIABLE, "-O0")
        build.library_path.cache_clear()
        build.library_path()
        build.library_path.cache_clear()
    return folder


@pytest.fixture
def own_cache(_compiled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache with a sound engine in it; `library_path` looks again."""
    folder = Path(shutil.copytree(_compiled, tmp_path / "cache"))
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(folder))
    monkeypatch.setenv(build.FLAGS_VARIABLE, "-O0")
    build.library_path.cache_clear()
    yield folder
    build.library_path.cache_clear()


def engine_of(folder: Path) -> Path:
    (found,) = (folder / "native").glob("engine-*.so")
    return found


@pytest.mark.parametrize("damage", ["cut", "empty", "a bit", "no digest", "foreign digest"])
def test_a_damaged_engine_is_compiled_again_and_not_loaded(
    own_cache: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(own_cache)
    whole = engine.read_bytes()
    digest = engine.with_name(f"{engine.name}.sha256")
    if damage == "cut":
        engine.write_bytes(whole[:6000])
    elif damage == "empty":
        engine.write_bytes(b"")
    elif damage == "a bit":
        engine.write_bytes(bytes([*whole[:-1], whole[-1] ^ 1]))
    elif damage == "no digest":
        digest.unlink()
    else:
        digest.write_bytes(b"\xff\xfe")
    assert not build.is_built()
    compiled = []

    def compile_again(*arguments: Any) -> None:
        compiled.append(arguments)
        arguments[-1].write_bytes(whole)

    monkeypatch.setattr(build, "_compile", compile_again)
    assert build.library_path().read_bytes() == whole
    assert len(compiled) == 1
    assert build.is_built()


def test_a_sound_engine_is_used_as_it_is(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_compile", lambda *_: pytest.fail("compiled again"))
    assert build.loaded(build.library_path()).ir_panel() > 0


@pytest.mark.parametrize("place", ["root", "folder", "engine"])
def test_what_everybody_may_write_is_refused(own_cache: Path, place: str) -> None:
    path = {"root": own_cache, "folder": own_cache / "native", "engine": engine_of(own_cache)}[place]
    path.chmod(0o777)
    with pytest.raises(InputError, match=r"everybody may write to .*chmod o-w .*INFORMED_ROUTING_CACHE"):
        build.library_path()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files away")
@pytest.mark.parametrize("place", ["root", "folder", "engine"])
def test_what_another_user_owns_is_refused(own_cache: Path, place: str) -> None:
    path = {"root": own_cache, "folder": own_cache / "native", "engine": engine_of(own_cache)}[place]
    os.chown(path, 12345, -1)
    with pytest.raises(InputError, match=r"belongs to another user.*INFORMED_ROUTING_CACHE"):
        build.library_path()


def test_the_cache_that_a_careless_umask_makes_is_trusted(tmp_path: Path) -> None:
    script = "import os; os.umask(0); from informed_routing.execution.cpu import build; print(build.library_path())"
    environment = {**os.environ, cache.CACHE_VARIABLE: str(tmp_path / "new"), build.FLAGS_VARIABLE: "-O0"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).stat().st_mode & 0o777 == 0o775


def test_an_engine_that_the_system_cannot_load_is_a_refusal(tmp_path: Path) -> None:
    (tmp_path / "engine.so").write_bytes(b"no library")
    with pytest.raises(InputError, match=r"cannot be loaded.*torch engine"):
        build.loaded(tmp_path / "engine.so")


class Part:
    type, n, k = 0, 8, 8


class Engine:
    """What `price_table` asks of an engine."""

    threads = 1

    def __init__(self) -> None:
        class Unit:
            forecast_in = forecast_out = Part()

        class Layer:
            q = o = gate_up = down = gate_up_slice = down_slice = Part()
            ffn = attention = Unit()

        self.layers = [Layer()]


@pytest.mark.parametrize("content", ["", "{}", "null", "[]", "cut", "digit", "old"])
def test_damaged_prices_are_measured_again(own_cache: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    column = tuple(float(row) for row in ROWS)
    table = PriceTable(ROWS, column, column, column, column, 1e10, 2e10, 3e10)
    measured: list[Engine] = []

    def measure(engine: Engine) -> PriceTable:
        measured.append(engine)
        return table

    monkeypatch.setattr(price_table, "measure", measure)
    assert price_table.price_table(Engine()) == table  # type: ignore[arg-type]
    assert price_table.price_table(Engine()) == table  # type: ignore[arg-type]
    assert len(measured) == 1
    (path,) = (own_cache / "native").glob("prices-*.json")
    text = path.read_text()
    changed = {"cut": text[:-40], "digit": text.replace("64.0", "65.0", 1), "old": json.dumps(asdict(table))}
    path.write_text(changed.get(content, content))
    assert price_table.price_table(Engine()) == table  # type: ignore[arg-type]
    assert len(measured) == 2
    assert price_table.price_table(Engine()) == table  # type: ignore[arg-type]
    assert len(measured) == 2
