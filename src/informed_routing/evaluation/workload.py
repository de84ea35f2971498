"""One pass of a routed model over a nominal workload: what each prompt cost, as a table for `whatif`.

A prompt is a random piece of its domain's text; the output is the text that follows it, forced token by token, so that
its length is an input and not a result. What a prompt costs then depends on (domain, lengths) and on chance alone,
which is what likelihood ratios of workloads need.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from informed_routing.errors import InputError
from informed_routing.evaluation.numbers import not_finite
from informed_routing.execution.changes import unchanging
from informed_routing.extras import need
from informed_routing.files.atomic import remove_left_overs, write_atomically
from informed_routing.models.calls import cached
from informed_routing.progress import NullProgress, Progress

SAVE_EVERY = 100


@dataclass(frozen=True)
class Request:
    """One prompt of a workload: what determines its likelihood."""

    domain: str
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Measurement:
    """What one request did. Seconds are wall-clock at batch size 1; losses are sums in nats over the forced output."""

    domain: str
    prompt_tokens: int
    output_tokens: int
    executed: int
    """(token, unit) pairs that executed, of the prompt and the output."""
    possible: int
    attention_executed: int
    ffn_executed: int
    macs: float
    """Of the decoder body, with routers and forecasts."""
    dense_macs: float
    prefill_seconds: float
    decode_seconds: float
    loss_sum: float
    loss_tokens: int
    dense_prefill_seconds: float
    dense_decode_seconds: float
    dense_loss_sum: float
    position: int
    """In the order of measuring: what drifts, drifts along it."""


def measure_workload(
    model: Any,
    streams: Mapping[str, Tensor],
    requests: Sequence[Request],
    *,
    sparsity: float,
    budget: Any = None,
    seed: int = 17,
    out: Path | None = None,
    resume: bool = False,
    about: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> list[Measurement]:
    """Run each request once routed at `sparsity` and once dense, in turns, and return a row for each.

    `streams` are the domains' texts as int64 [tokens]. With `out` (a Parquet file) rows are written as they come, and
    with `resume` those that are there already are kept; `about` (JSON values) is stored with them. Raises InputError
    for domains without text, requests longer than their domain's text, and a file that belongs to another run;
    WorkError for logits or a loss that are not finite, naming the prompt.
    """
    if out is not None:
        need("pyarrow", extra="whatif", for_what="Measured tables")
    progress = progress or NullProgress()
    for request in requests:
        _check(request, streams)
    identity = _identity(model, streams, requests, sparsity, budget, seed)
    rows = []
    if out is not None and resume and out.exists():
        remove_left_overs(out.parent, out.name)  # a whole table is not written again, which would remove them
        rows = read_rows(out, identity)
    model.set_sparsity(sparsity, budget)  # a bad value is refused before anything runs
    progress.stage("measure", len(requests))
    for position in range(len(rows), len(requests)):
        request = requests[position]
        stream, length = streams[request.domain], request.prompt_tokens + request.output_tokens
        generator = torch.Generator().manual_seed(seed * 1_000_003 + position)
        start = int(torch.randint(len(stream) - length + 1, (1,), generator=generator))
        piece = stream[start : start + length][None].to(model.device)
        found: dict[float, _Run] = {}
        # Who goes first alternates: a machine that slows down must not favour one of them.
        for target in (sparsity, 0.0) if position % 2 else (0.0, sparsity):
            model.set_sparsity(target, budget)
            found[target] = _run(model, piece, request.prompt_tokens)
            if not math.isfinite(found[target].loss_sum):
                at = f"at sparsity {target:g}" if target else "dense"
                raise not_finite(f"the loss of prompt {position + 1} ({request.domain}, {at})", model, piece)
        rows.append(_row(request, found[sparsity], found[0.0], position))
        progress.advance(position + 1, executed=rows[-1].executed / max(rows[-1].possible, 1))
        if out is not None and (len(rows) % SAVE_EVERY == 0 or len(rows) == len(requests)):
            write_rows(out, rows, identity, about)
    return rows


@dataclass(frozen=True)
class _Run:
    executed: tuple[int, int]
    tokens: int
    units: int
    macs: tuple[float, float]
    prefill_seconds: float
    decode_seconds: float
    loss_sum: float


def _run(model: Any, piece: Tensor, prompt: int) -> _Run:
    """Prefill of the first `prompt` tokens of piece [1, N], then one forced step for each further token."""
    model.reset_routing_stats()
    cache = DynamicCache(config=model.config)
    losses, seconds = [], []
    with torch.inference_mode(), unchanging(model):
        steps = [piece[:, :prompt], *(piece[:, at : at + 1] for at in range(prompt, piece.shape[1]))]
        for i, ids in enumerate(steps):
            _wait(model.device)
            begun = time.perf_counter()
            logits = model(input_ids=ids, **cached(model, cache), use_cache=True, logits_to_keep=1).logits
            _wait(model.device)
            seconds.append(time.perf_counter() - begun)
            last = logits[:, -1].float()
            highest = last.max()
            if not bool(highest.isfinite()):
                return _Run((0, 0), 0, 0, (0.0, 0.0), seconds[0], 0.0, math.nan)
            if i + 1 < len(steps):
                losses.append(torch.nn.functional.cross_entropy(last, piece[:, prompt + i]))
    stats = model.stats
    by_kind = (int(stats.executed[0::2].sum()), int(stats.executed[1::2].sum()))
    dense, routed = stats.macs()
    loss = float(torch.stack(losses).double().sum()) if losses else 0.0
    return _Run(by_kind, int(stats.tokens), len(stats.costs), (routed, dense), seconds[0], sum(seconds[1:]), loss)


def _row(request: Request, routed: _Run, dense: _Run, position: int) -> Measurement:
    return Measurement(
        **asdict(request),
        executed=sum(routed.executed),
        possible=routed.tokens * routed.units,
        attention_executed=routed.executed[0],
        ffn_executed=routed.executed[1],
        macs=routed.macs[0],
        dense_macs=routed.macs[1],
        prefill_seconds=routed.prefill_seconds,
        decode_seconds=routed.decode_seconds,
        loss_sum=routed.loss_sum,
        loss_tokens=request.output_tokens,
        dense_prefill_seconds=dense.prefill_seconds,
        dense_decode_seconds=dense.decode_seconds,
        dense_loss_sum=dense.loss_sum,
        position=position,
    )


def _check(request: Request, streams: Mapping[str, Tensor]) -> None:
    if request.domain not in streams:
        known = ", ".join(streams) or "none"
        raise InputError(
            f"domain {request.domain!r} has no text", f"Give --domain {request.domain}=DATA (have: {known})"
        )
    if request.prompt_tokens < 1 or request.output_tokens < 0:
        raise InputError(
            f"a request of {request.prompt_tokens} prompt and {request.output_tokens} output tokens cannot be run",
            "Prompts have at least 1 token, outputs at least 0",
        )
    length = request.prompt_tokens + request.output_tokens
    if length > len(streams[request.domain]):
        raise InputError(
            f"domain {request.domain!r} has {len(streams[request.domain])} tokens, a request needs {length}",
            "Give more text or shorter lengths",
        )


def _identity(
    model: Any, streams: Mapping[str, Tensor], requests: Sequence[Request], sparsity: float, budget: Any, seed: int
) -> str:
    """Names everything that the rows depend on besides the machine."""
    digest = hashlib.sha256()
    for name in sorted(streams):
        digest.update(name.encode() + streams[name].cpu().numpy().tobytes())
    config = model.routing_config
    settings = [config.model_dump_json(), sparsity, budget, seed, [asdict(request) for request in requests]]
    digest.update(json.dumps(settings).encode())
    return digest.hexdigest()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# -- the table ------------------------------------------------------------------------------------------------


def write_rows(path: Path, rows: Sequence[Measurement], identity: str, about: Mapping[str, Any] | None = None) -> None:
    """Write a Parquet table, whole or not at all."""
    import pyarrow
    import pyarrow.parquet

    columns = {field.name: [getattr(row, field.name) for row in rows] for field in fields(Measurement)}
    described = {"identity": identity, "about": json.dumps(dict(about or {}))}
    table = pyarrow.table(columns).replace_schema_metadata(described)
    write_atomically(path, lambda temporary: pyarrow.parquet.write_table(table, temporary))


def read_about(path: Path) -> dict[str, Any]:
    """What was stored beside the rows of a table; empty for tables of other origin."""
    import pyarrow.parquet

    stored = (pyarrow.parquet.read_schema(path).metadata or {}).get(b"about", b"{}")
    return dict(json.loads(stored))


def read_rows(path: Path, identity: str | None = None) -> list[Measurement]:
    """The rows of a table. Raises InputError when it is damaged, or `identity` is not that of the run it is from."""
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}", "Measure again") from None
    if identity is not None and (table.schema.metadata or {}).get(b"identity") != identity.encode():
        raise InputError(f"{path} was measured with other settings", "Give another --out, or leave out --resume")
    return [Measurement(**row) for row in table.to_pylist()]
