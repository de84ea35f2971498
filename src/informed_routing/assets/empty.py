"""A model without weights, on the meta device: its modules and settings, from a configuration alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .models import auto_class, base_location, load_errors, resolve_model
from .soundness import check_settings


def load_empty(
    ref: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """The model that `ref` names, without weights. A folder needs nothing but its config.json.

    A routing folder gives its base model. Raises InputError as `load_model` does, but for weights.
    """
    import torch
    from transformers import AutoConfig

    folder = Path(ref).expanduser()
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if (folder / "config.json").is_file() and not (folder / "routing_config.json").exists() and revision is None:
        location = str(folder.absolute())
    else:
        location, options = base_location(resolve_model(ref, revision), trust_remote_code, token)
    with load_errors(str(ref)):
        check_settings(location, options, str(ref))
        config = AutoConfig.from_pretrained(location, **options)
        with torch.device("meta"):
            empty = auto_class(config.model_type).from_config(config, trust_remote_code=trust_remote_code)
            return empty.eval()
