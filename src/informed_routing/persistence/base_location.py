"""Where the base model of a routing folder is: as recorded, moved together with the folder, or on the Hub."""

from __future__ import annotations

import os
from pathlib import Path

from ..config.folder import BaseModelReference
from ..errors import InputError
from .load_options import HubOptions


def path_between(folder: Path, base: BaseModelReference) -> str | None:
    """The base model as seen from the folder, so that both can move together; None when it is no local path."""
    path = Path(base.name).expanduser()
    if not path.is_absolute():
        return None
    try:
        return os.path.relpath(path, folder.absolute())
    except ValueError:  # another drive
        return None


def find_base(folder: Path, recorded: BaseModelReference) -> str:
    """The recorded reference, or the path of a local base model that has moved together with the routing folder."""
    name = recorded.name
    if not name:
        raise InputError(f"{folder} does not say which base model it is for", "Give it: --base MODEL (in Python base=)")
    path = Path(name).expanduser()
    if name.startswith("demo:") or path.exists():
        return name
    nearby = [recorded.near] if recorded.near else []
    if not path.is_absolute():  # as earlier versions stored it
        nearby += [name, f"../{name}"]
    for relative in nearby:
        candidate = Path(os.path.normpath(folder.absolute() / relative))
        if (candidate / "config.json").is_file() or (candidate.suffix == ".gguf" and candidate.is_file()):
            return str(candidate)
    if path.is_absolute() or path.suffix.lower() == ".gguf":
        raise InputError(
            f"the base model {name} of {folder} does not exist",
            "If it is elsewhere now, say where: --base MODEL (in Python base=)",
        )
    return name


def fetched(name: str, revision: str | None, trust_remote_code: bool, hub: HubOptions) -> str:
    """The base model's reference; a local copy of one on the Hub, where options ask how that is to be had."""
    from ..assets import resolve_model

    if not hub.special or resolve_model(name, revision).kind != "hub":
        return name
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "*.txt", "*.model", *(["*.py"] if trust_remote_code else [])]
    try:
        return snapshot_download(name, revision=revision, token=hub.token, allow_patterns=patterns, **hub.special)
    except Exception as error:
        asked = ", ".join(f"{key} = {value!r}" for key, value in hub.special.items())
        raise InputError(
            f"the base model {name} cannot be had with {asked} ({type(error).__name__})", "Give base="
        ) from None
