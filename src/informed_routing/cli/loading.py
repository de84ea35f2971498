"""Model and text references of the command line into loaded things. Imports torch only when called."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from informed_routing.errors import InputError

if TYPE_CHECKING:
    from .common import Session


@dataclass(frozen=True)
class Loaded:
    """A model, dense or routed, with its tokenizer."""

    model: Any
    tokenizer: Any
    routed: bool
    base: str | None = None


def load_any(ref: str, run: Session, base: str | None = None) -> Loaded:
    """A routing folder (or Hub id of one) as a routed model, a pruned one or an ordinary dense model as it is."""
    from informed_routing.assets import load_model
    from informed_routing.baselines.folder import is_static_folder, load_static

    path = Path(ref).expanduser()
    if is_static_folder(path):
        pruned, tokenizer = load_static(path, dtype=run.common.dtype, device=run.device)
        return Loaded(pruned, tokenizer, routed=False)
    if is_routing(ref):
        return load_routed(ref, run, base)
    model, tokenizer = load_model(ref, dtype=run.common.dtype, device=run.device)
    return Loaded(model, tokenizer, routed=False)


def load_routed(ref: str, run: Session, base: str | None = None) -> Loaded:
    """A routed model; InputError when `ref` is a dense model or nothing at all."""
    from informed_routing.assets import check_vocabulary, load_tokenizer
    from informed_routing.routed_model import RoutedModelForCausalLM

    if not is_routing(ref):
        raise InputError(
            f"{ref} is not a routing folder (no routing_config.json)",
            f"Make one with `informed-routing fit {ref} --out DIR`",
        )
    model = RoutedModelForCausalLM.from_pretrained(ref, dtype=run.common.dtype, device=run.device, base=base)
    name, revision = _base_of(model, base)
    tokenizer = load_tokenizer(name, revision=revision)
    check_vocabulary(tokenizer, model, ref)
    return Loaded(model.eval(), tokenizer, routed=True, base=base)


def choose_execution(
    run: Session,
    model: Any,
    execution: str,
    weights: str | None,
    kv: str | None = None,
    policy: Literal["auto", "exact"] = "auto",
) -> None:
    """Set a routed model's execution; `auto` is the native engine where it runs. InputError where it was asked for."""
    from informed_routing.execution.native import native_reason

    kv = kv or model.routing_config.kv
    if execution == "auto":
        reason = "kv='drop'" if kv == "drop" else native_reason(model, run.progress)
        if reason and weights:
            raise InputError(f"--weights {weights} needs the native engine, which cannot run: {reason}", "Leave it out")
        execution = "sparse" if reason else "native"
    if weights and execution != "native":
        raise InputError(f"--weights {weights} needs the native engine", "Leave it out, or give --execution native")
    if execution == "native" and kv == "drop":
        raise InputError("kv='drop' needs --execution sparse", "Leave out --execution native, or give --kv keep")
    model.set_execution(execution, kv, weights=weights, policy=policy)


def load_base_of(loaded: Loaded, run: Session) -> Any:
    """The untouched dense model under a routed one, in the same dtype on the same device."""
    from informed_routing.assets import load_model

    name, revision = _base_of(loaded.model, loaded.base)
    return load_model(name, dtype=loaded.model.dtype, device=run.device, revision=revision)[0]


def _base_of(routed: Any, base: str | None) -> tuple[str, str | None]:
    """(reference, revision) of a routed model's base, which the user may have put elsewhere."""
    stored = routed.routing_config.base_model
    return (base, None) if base is not None else (stored.name, stored.revision)


def is_routing(ref: str) -> bool:
    """Whether `ref` names a routing folder, on disk or on the Hub. Raises InputError for a missing model."""
    from informed_routing.assets import resolve_model

    folder = Path(ref).expanduser()
    results = ("routing_config.json", "config.json")
    if (folder / "checkpoints").is_dir() and not any((folder / name).exists() for name in results):
        command = "prune" if (folder / "checkpoints" / "prune.json").exists() else "fit"
        raise InputError(f"{ref} holds an unfinished {command}", f"Run the same `{command}` again with --resume")
    source = resolve_model(ref)
    if source.kind != "hub":
        return source.kind == "routing"
    from transformers.utils import cached_file

    try:
        found = cached_file(
            source.path_or_id,
            "routing_config.json",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except OSError:
        return False  # a missing model: loading it says so better
    return found is not None


def is_pages(ref: str) -> bool:
    """Whether a text reference holds whole pages (`*.pages.jsonl`, or a `page` column and no `text`)."""
    name = ref.lower().removesuffix(".zst")
    if name.endswith(".pages.jsonl") or (":" in ref and ref.rsplit(":", 1)[1] == "page"):
        return True
    path = Path(ref).expanduser()
    if not path.is_file():
        return False
    return "page" in (columns := _columns(path)) and "text" not in columns


def _columns(path: Path) -> set[str]:
    """Column names of a `.jsonl` or `.parquet` file; none if it cannot be read (`load_texts` says why)."""
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet

            return set(pyarrow.parquet.read_schema(path).names)
        if path.name.endswith((".jsonl", ".jsonl.zst")):
            from informed_routing.assets.encodings import lines

            first = json.loads(next(line for _, line in lines(path) if line.strip()))
            return set(first) if isinstance(first, dict) else set()
    except (OSError, ValueError, StopIteration, RecursionError):
        pass
    return set()


def task_names(refs: list[str]) -> list[str]:
    """A readable, distinct name of each text: `demo:wiki`, a file's name, `wikitext` for a page file."""
    names: list[str] = []
    for ref in refs:
        name = ref if ref.startswith("demo:") or not _looks_like_path(ref) else Path(ref).name
        if is_pages(ref):
            name = "wikitext" if "wikitext" not in names else f"wikitext:{name}"
        base, number = name, 2
        while name in names:
            name, number = f"{base}#{number}", number + 1
        names.append(name)
    return names


def _looks_like_path(ref: str) -> bool:
    return Path(ref).expanduser().exists() or "*" in ref or ":" not in ref
