"""Static pruning by one entry: `prune` scores a model, removes what matters least, and reports it.

What a sparsity is a share of:

    shortgpt, shortened-ppl, shortened-taylor      decoder layers
    llm-drop, llm-drop-attention, llm-drop-ffn     units (attention and FFN) of all layers, also where only one kind may
                                                   go: 0.25 of llm-drop-attention is half of the attention units
    slicegpt                                       the hidden width, all parameters, or the body's (setting `measure`)

Counts of layers and units are rounded to the nearest number.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Sequence
from typing import Any

from pydantic import ValidationError
from torch import Tensor
from transformers import PretrainedConfig

from ..config.types import describe
from ..errors import InputError, WorkError
from ..evaluation.numbers import not_finite
from ..progress import NullProgress, Progress
from .footprint import footprint
from .loading import load_static
from .methods import METHODS, DropMethod, RankedMethod, SliceMethod, SliceSettings
from .remaining import dropped_units, sliced_width
from .report import PruneReport
from .shapes import SlicedShapes, empty_model
from .sliced import reshape_sliced
from .slicegpt import slice_model
from .writing import is_static_folder, save_static

__all__ = ["METHODS", "PruneReport", "is_static_folder", "load_static", "prune", "save_static", "shape_report"]


def prune(
    model: Any, method: str, sparsity: float, rows: Tensor, *, progress: Progress | None = None, **settings: Any
) -> PruneReport:
    """Prune a dense model in place by its behaviour on calibration rows [n, L] (int64, no padding).

    `settings` are those of the method (`METHODS[method].settings`). The report is also kept as `model.prune_report`,
    where `save_static` finds it. Raises InputError for an unknown method or setting, a model that is routed or pruned
    already, or a sparsity that cannot be reached; WorkError for scores or weights that are not finite.
    """
    chosen, checked = _checked(method, sparsity, settings)
    _check_dense(model)
    if rows.ndim != 2 or rows.shape[0] == 0 or rows.shape[1] < 2:
        raise InputError(f"rows of shape {tuple(rows.shape)} hold nothing to calibrate on", "Give [n, L] with L >= 2")
    context = checked.context or (rows.shape[1] + 1) / 2
    before, progress = footprint(model, context), progress or NullProgress()
    started, read = time.perf_counter(), rows.numel()
    found: dict[str, Any]
    if isinstance(chosen, RankedMethod):
        wanted = chosen.count(model, sparsity, checked)
        scores = chosen.score(model, rows, checked, progress) if wanted else {}
        for part, score in scores.items():
            if not math.isfinite(score):  # it would be sorted anywhere, and whatever came first would go
                raise not_finite(f"the score of {chosen.name(part)}", model, rows[:1])
        order = sorted(scores, key=scores.__getitem__)  # stable: of equals, the first in the model goes first
        found = _remove(chosen, model, chosen.choose(model, wanted, order, checked))
        found["scores"] = {chosen.name(part): scores[part] for part in order}
        read = read if wanted else 0
    else:
        found = _width(model, sparsity, checked)
        slice_model(model, found["width"], rows, checked.batch_size, progress)
        if not all(bool(weight.isfinite().all()) for weight in model.parameters()):
            raise WorkError(
                f"slicing gave weights that are not finite numbers in {str(model.dtype).removeprefix('torch.')}",
                "Prune with --dtype bfloat16 or float32",
            )
    report = PruneReport(
        method=method,
        sparsity=sparsity,
        before=before,
        after=footprint(model, context),
        tokens=read,
        seconds=time.perf_counter() - started,
        settings=checked.model_dump(),
        **found,
    )
    model.prune_report = report
    return report


def shape_report(
    config: PretrainedConfig,
    method: str,
    sparsity: float,
    *,
    context: float,
    removed: Collection[Any] | None = None,
    **settings: Any,
) -> PruneReport:
    """What pruning does to the costs of a configuration, without weights.

    Which layers or units go is not known without weights. They cost the same in most families, so the last ones that
    may go stand for them. `removed` names them instead (layer indices, or units such as `(3, "ffn")`), which `llm-drop`
    needs, since its two kinds of unit cost different amounts; their share then replaces `sparsity`. Raises InputError
    as `prune` does.
    """
    chosen, checked = _checked(method, sparsity, settings)
    model = empty_model(config)
    before = footprint(model, context)
    found: dict[str, Any]
    if isinstance(chosen, RankedMethod):
        if removed is None and isinstance(chosen, DropMethod) and len(chosen.kinds) > 1:
            raise InputError(f"the costs of {method} depend on which units go", "Name them in `removed`")
        if removed is None:
            last_first = list(reversed(chosen.may_go(model, checked)))
            removed = chosen.choose(model, chosen.count(model, sparsity, checked), last_first, checked)
        found = _remove(chosen, model, sorted(removed))
    else:
        found = _width(model, sparsity, checked)
        reshape_sliced(model, found["width"])
    return PruneReport(
        method=method,
        sparsity=found["realised"] if removed is not None else sparsity,
        before=before,
        after=footprint(model, context),
        settings=checked.model_dump(),
        **found,
    )


def _checked(method: str, sparsity: float, settings: dict[str, Any]) -> tuple[RankedMethod | SliceMethod, Any]:
    """The method and its validated settings."""
    if method not in METHODS:
        raise InputError(f"static method {method!r} is not known", f"Choose one of {', '.join(METHODS)}")
    if not 0 <= sparsity < 1:
        raise InputError(f"sparsity {sparsity} is not between 0 and 1", "Give a share such as 0.25")
    chosen = METHODS[method]
    try:
        return chosen, chosen.settings.model_validate(settings)
    except ValidationError as error:
        raise InputError(*describe(error)) from None


def _check_dense(model: Any) -> None:
    if hasattr(model, "routing_config"):
        raise InputError("the model is routed", "Load the dense base model")
    if dropped_units(model) or sliced_width(model) is not None:
        raise InputError("the model is pruned already", "Load the dense base model")


def _remove(method: RankedMethod, model: Any, parts: Sequence[Any]) -> dict[str, Any]:
    """Remove the parts; what of the report this decides."""
    count = len(method.parts(model))
    method.remove(model, parts)
    names = [method.name(part) for part in sorted(parts)]
    return {"measure": method.measure, "realised": len(parts) / count, "removed": names}


def _width(model: Any, sparsity: float, settings: SliceSettings) -> dict[str, Any]:
    """The width to slice to; what of the report this decides."""
    shapes = SlicedShapes(model.config, settings.measure)
    width = shapes.width_for(sparsity, settings.round_to)
    return {"measure": settings.measure, "realised": shapes.removed(width), "width": width}
