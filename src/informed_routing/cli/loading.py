"""Model and text references of the command line into loaded things. Imports torch only when called."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from informed_routing.errors import InputError
from informed_routing.extras import need

if TYPE_CHECKING:
    from informed_routing.config.folder import RoutingConfig
    from informed_routing.evaluation.parts import Fitted
    from informed_routing.execution.engine import NativeEngine

    from .common import Session

Kind = Literal["routed", "pruned", "dense"]
PolicyOption = Annotated[
    Literal["exact", "auto"] | None,
    typer.Option(
        "--policy",
        help="exact does what the routers say; auto executes calls whole where that is faster on this machine, so that "
        "text may differ between machines [default: exact].",
    ),
]
HoldOption = Annotated[
    bool,
    typer.Option(
        "--hold",
        help="Hold every text to --sparsity, whatever its kind: thresholds follow what it has approximated so far.",
    ),
]


def decision_of(hold: bool, kv: str | None, policy: str | None) -> str:
    """How tokens are chosen by the commands that can generate.

    Raises InputError for --hold with dropped keys, and with a policy that executes more than it asks for.
    """
    if hold and kv == "drop":
        raise InputError("--hold does not go with dropped keys and values", "Add --kv keep, or leave it out")
    if hold and policy == "auto":
        raise InputError("--hold does not go with --policy auto, which executes more", "Leave out one of them")
    return "held" if hold else "threshold"


@dataclass(frozen=True)
class Loaded:
    """A model, dense or routed, with its tokenizer."""

    model: Any
    tokenizer: Any
    routed: bool
    base: str | None = None


def kind_of(ref: str) -> Kind:
    """Whether a model is a routing folder, a pruned model or an ordinary one. InputError for one that is not there."""
    from informed_routing.baselines.writing import is_static_folder

    if is_static_folder(Path(ref).expanduser()):
        return "pruned"
    return "routed" if is_routing(ref) else "dense"


def load_any(ref: str, run: Session, base: str | None = None) -> Loaded:
    """A routing folder (or Hub id of one) as a routed model, a pruned one or an ordinary dense model as it is."""
    from informed_routing.assets import load_model
    from informed_routing.baselines.loading import load_static

    kind = kind_of(ref)
    if kind == "pruned":
        pruned, tokenizer = load_static(Path(ref).expanduser(), dtype=run.common.dtype, device=run.device)
        return Loaded(pruned, tokenizer, routed=False)
    if kind == "routed":
        return load_routed(ref, run, base)
    model, tokenizer = load_model(ref, dtype=run.common.dtype, device=run.device)
    return Loaded(model, tokenizer, routed=False)


def load_routed(ref: str, run: Session, base: str | None = None) -> Loaded:
    """A routed model; InputError when `ref` is a dense model or nothing at all."""
    from informed_routing.assets import load_tokenizer
    from informed_routing.assets.soundness import check_vocabulary
    from informed_routing.routed_model import RoutedModelForCausalLM

    check_routed(ref)
    model = RoutedModelForCausalLM.from_pretrained(_local(ref), dtype=run.common.dtype, device=run.device, base=base)
    name, revision = _base_of(model, base)
    tokenizer = load_tokenizer(name, revision=revision)
    check_vocabulary(tokenizer, model, ref)
    return Loaded(model.eval(), tokenizer, routed=True, base=base)


def check_routed(ref: str) -> None:
    """Raise InputError for a model that routes nothing."""
    if not is_routing(ref):
        raise InputError(
            f"{ref} is not a routing folder (no routing_config.json)",
            f"Make one with `informed-routing fit {ref} --out DIR`",
        )


def check_shares(
    ref: str, targets: Sequence[float], budget: str | None = None, decision: str | None = None
) -> RoutingConfig:
    """The settings of a routing folder, after checking that it can be set to all of these shares.

    Reads routing_config.json only: a share that was not calibrated is refused, with the range, before the base model is
    loaded. `decision` is as for `set_sparsity`; top-k has no range that a table would tell. Raises InputError.
    """
    from informed_routing.persistence.folder import locate, read_config
    from informed_routing.routing.dial import shares_by_unit, threshold_for

    config = read_config(locate(_local(ref)))
    decision = decision or config.selection.decision
    for target in targets:
        if target and decision in ("threshold", "held"):
            threshold_for(config, target, budget)  # type: ignore[arg-type]
        if target and decision == "held":
            shares_by_unit(config, target, budget)  # type: ignore[arg-type]
    check_budget(config, targets, budget)
    return config


def check_budget(config: RoutingConfig, targets: Sequence[float], budget: str | None) -> None:
    """Raise InputError where --budget would say nothing, or would turn a share into another one."""
    if budget is None:
        return
    if not targets and budget != config.budget:
        raise InputError(
            f"--budget {budget} needs --sparsity: the share that this model was trained for counts {config.budget}",
            "Give --sparsity, too",
        )
    if targets and not any(targets):
        raise InputError(f"--budget {budget} has no effect at --sparsity 0", "Leave it out, or give another share")


def refuse_idle(reason: str, remedy: str, **given: Any) -> None:
    """Raise InputError for the first of the options that was given, though for this `reason` it would do nothing.

    Options are named as parameters: `show_routing=True` is --show-routing; None and False were not given.
    """
    for name, value in given.items():
        if value is None or value is False or value == []:
            continue
        shown = value[0] if isinstance(value, list) else value
        flag = f"--{name.replace('_', '-')}" + ("" if shown is True else f" {shown}")
        raise InputError(f"{flag} has no effect: {reason}", remedy)


def refuse_for_dense(ref: str, kind: Kind, targets: Sequence[float], **given: Any) -> None:
    """Raise InputError for sparsity, and for options that only a routed model has, of one that is not."""
    if kind == "routed":
        return
    fit_first = f"Fit routers first: informed-routing fit {ref} --out DIR"
    what = "a dense model" if kind == "dense" else "a pruned, dense model"
    if any(targets):
        raise InputError(f"{ref} is {what} and has no sparsity {max(targets):g}", fit_first)
    refuse_idle(f"{ref} is {what}, it routes nothing and has no engine of ours", f"Leave it out. {fit_first}", **given)


def choose_execution(
    run: Session,
    model: Any,
    execution: str,
    weights: str | None,
    kv: str | None = None,
    policy: str | None = None,
    *,
    decision: str = "threshold",
    why: str | None = None,
) -> dict[str, str]:
    """Set a routed model's execution and return what `engine` of a result says of it: a name, and the reason.

    `auto` is the native engine where it runs. `policy` None is exact; `decision` is how tokens will be chosen; `why`
    explains a choice that the user did not make. Raises InputError where an engine cannot do what was asked for, and
    for options of the native engine where another one runs.
    """
    from informed_routing.execution.choose import choose_engine

    kv = kv or model.routing_config.kv
    reason = why or f"--execution {execution} asks for it"
    if execution in ("auto", "native"):
        choice = choose_engine(model, kv=kv, decision=decision, progress=run.progress)
        obstacle = choice.obstacle
        if obstacle is None and execution == "auto":
            reason = choice.reason
        if obstacle is not None:
            if weights:
                raise InputError(
                    f"--weights {weights} needs the native engine, which cannot run: {obstacle}", "Leave it out"
                )
            if execution == "native":
                raise InputError(f"the native engine cannot run: {obstacle}", "Leave out --execution native")
            reason = choice.reason
        execution = "native" if obstacle is None else "sparse"
    if execution != "native" and weights:
        raise InputError(f"--weights {weights} needs the native engine", "Leave it out, or give --execution native")
    policy = policy or "exact"
    if policy == "auto" and (kv == "drop" or execution == "masked"):
        what = "--kv drop" if kv == "drop" else "--execution masked, which skips nothing"
        raise InputError(f"--policy auto does not go with {what}", "Leave out one of them")
    model.set_execution(execution, kv, weights=weights, policy=policy)
    if execution != "native":
        return {"name": f"torch {execution}", "reason": reason, "policy": policy}
    engine: NativeEngine = model.routing_state.native.of(model)
    if engine.torch_prefill:
        reason += "; long prompts go to torch, whose matrix products are faster here"
    return {"name": native_name(model, engine), "reason": reason, "policy": policy}


def native_name(model: Any, engine: NativeEngine) -> str:
    """`native float32`, as rows of a benchmark call it; `native gpu` on one."""
    return f"native {engine.weights}" if model.device.type == "cpu" else "native gpu"


DENSE_ENGINE = {"name": "transformers", "reason": "a dense model routes nothing"}


def say_engine(run: Session, engine: Mapping[str, str]) -> None:
    """One line on stderr: which engine runs, and why."""
    policy = f", policy {engine['policy']}" if "policy" in engine else ""
    run.progress.message(f"engine: {engine['name']}{policy} ({engine['reason']})")


def fitted_of(ref: str, kind: Kind) -> Fitted | None:
    """The texts that a model was fitted on; None for a dense model, which no fit of ours has seen."""
    from informed_routing.evaluation.parts import Fitted, fitted_on

    if kind == "dense":
        return None
    if kind == "pruned":
        return Fitted(unknown="the folder does not say what its pruning read")
    folder = Path(ref).expanduser()
    return fitted_on(folder if folder.is_dir() else _hub_folder(ref))


def _hub_folder(ref: str) -> Path | None:
    """The snapshot of a routing folder on the Hub, with its fit.json; None when that cannot be had."""
    from transformers.utils import cached_file

    try:
        found = cached_file(ref, "fit.json", _raise_exceptions_for_missing_entries=False)
    except OSError:
        return None
    return None if found is None else Path(found).parent


def _local(ref: str) -> str:
    """A reference with `~` resolved where it is a folder."""
    path = Path(ref).expanduser()
    return str(path) if path.exists() else ref


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
            need("pyarrow", extra="data", for_what="Parquet files")
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
