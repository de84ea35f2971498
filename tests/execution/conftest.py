"""What several tests of the CPU engine share."""

from __future__ import annotations

from typing import Any, cast

import pytest

from informed_routing.execution.cpu import build


@pytest.fixture(scope="session")
def plain_tiles(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The engine with plain code in the place of matrix instructions."""
    target = tmp_path_factory.mktemp("native") / "engine.so"
    _, flags, texts = build._target(cast(str, build.compiler()))
    extra = ["-O1", "-Wno-psabi", "-DINFORMED_ROUTING_WIDE", "-DINFORMED_ROUTING_TILES"]
    build._compile(cast(str, build.compiler()), [*flags, *extra], texts, target)
    return build.loaded(target)
