"""Make routed models known to transformers' auto classes as soon as somebody imports those, and not before.

`import informed_routing` shall stay light, in whichever order it and transformers are imported: the classes are
registered when the module of transformers that they are registered in has been executed.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def _register_config() -> None:
    from transformers.models.auto.configuration_auto import AutoConfig

    from .auto_config import RoutedConfig

    AutoConfig.register(RoutedConfig.model_type, RoutedConfig, exist_ok=True)


def _register_model() -> None:
    # It registers its class at its end. Where it is being imported already, that is what imports transformers here.
    importlib.import_module("..routed_model", __package__)


_ACTIONS: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": _register_config,
    "transformers.models.auto.modeling_auto": _register_model,
}


class _Loader(importlib.abc.Loader):
    """A module's own loader, and something to do after it."""

    def __init__(self, loader: Any, then: Callable[[], None]) -> None:
        self.loader, self.then = loader, then

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self.loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        module.__loader__ = self.loader
        self.then()


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as everybody does, and lets its loader act afterwards."""

    def __init__(self, name: str, then: Callable[[], None]) -> None:
        self.name, self.then = name, then

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.then)
        return spec


def register_with_transformers() -> None:
    """Register now what can be, and the rest when transformers imports where it belongs."""
    for name, action in _ACTIONS.items():
        module = sys.modules.get(name)
        if module is None:
            sys.meta_path.insert(0, _Finder(name, action))
        elif not getattr(module.__spec__, "_initializing", False):
            action()
