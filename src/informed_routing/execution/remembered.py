"""Self-checks that passed are remembered in the cache folder, each by everything that its outcome depends on."""

from __future__ import annotations

import functools
import hashlib
import json
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

import torch

from ..assets.cache import cache_dir
from ..config.folder import RoutingConfig
from ..errors import InformedRoutingError
from ..files.atomic import write_json


def name_of(model: Any, routing: RoutingConfig, engine: str) -> str:
    """A name for everything that the outcome depends on."""
    import transformers

    config = {name: value for name, value in model.config.to_dict().items() if not name.startswith("_name")}
    parts = [
        _own_code(),
        transformers.__version__,
        torch.__version__,
        engine,
        str(model.dtype),
        model.device.type,
        model.config._attn_implementation,
        config,
        routing.kv,
        routing.private,
        *(part.model_dump() for part in (routing.router, routing.forecaster, routing.selection)),
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


@functools.cache
def _own_code() -> str:
    """What of this library computes forwards."""
    digest, root = hashlib.sha256(), Path(str(resources.files("informed_routing")))
    for room in ("models", "routing", "execution"):
        for path in sorted((root / room).rglob("*")):
            if path.suffix in (".py", ".h", ".cpp"):
                digest.update(path.read_bytes())
    return digest.hexdigest()


def _file(key: str) -> Path:
    return cache_dir() / "self-checks" / f"{key}.json"


def remembered(key: str) -> bool:
    try:
        return json.loads(_file(key).read_text(encoding="utf-8")) == {"passed": True}
    except (OSError, ValueError):
        return False


def remember(key: str) -> None:
    with suppress(InformedRoutingError):  # a cache that cannot be written: the next run checks again
        write_json(_file(key), {"passed": True})
