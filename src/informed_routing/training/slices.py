"""Which of their own neurons FFNs compute for approximated tokens, where the fallback is a slice and a forecast."""

from __future__ import annotations

import torch
from accelerate import Accelerator
from torch import Tensor

from ..models.slices import column_squares
from ..progress import Progress
from ..routed_model import RoutedModelForCausalLM
from ..routing.decision import AlwaysExecute
from ..routing.state import Observation
from .forecast import observe, token_weights

CHOICE_TOKENS = 8_192
"""Text read for the choice, of that of the fit: a mean for each neuron is known long before a covariance is."""


def slice_tensors(model: RoutedModelForCausalLM) -> dict[str, Tensor]:
    """The choice of every unit that has one, by the names of a routing folder: empty without such fallbacks."""
    found = {}
    for unit in model.units:
        chosen = None if unit.forecaster is None else unit.forecaster.chosen()
        if chosen is not None:
            found[f"layers.{unit.index // 2}.{unit.kind}.forecaster.index"] = chosen
    return found


def choose_slices(
    model: RoutedModelForCausalLM,
    rows: Tensor,
    accelerator: Accelerator | None = None,
    progress: Progress | None = None,
) -> None:
    """Have every slice take the neurons that put out most in the mean over rows [n, L], all executed.

    A neuron's mean squared output is the mean of its squared activation times the squared length of its column; tokens
    weigh as in the forecasters' fit. Later fits, which solve for what is missing, keep the choice.
    """
    layers, units = model.decoder.layers, model.units
    relative = model.routing_config.forecaster.weighting == "relative"
    squares: dict[int, Tensor] = {}
    for unit in units:
        if unit.forecaster is not None and unit.forecaster.chosen() is not None:
            neurons = unit.unit.neurons(layers[unit.index // 2])
            squares[unit.index] = torch.zeros(neurons or 0, dtype=torch.float64, device=model.device)

    def observer(seen: Observation) -> None:
        if seen.index in squares:
            found = units[seen.index].unit.activations(layers[seen.index // 2], seen.read)
            square, weight = found.reshape(-1, found.shape[-1]).float().square(), token_weights(seen, relative)
            squares[seen.index] += (square if weight is None else square * weight).sum(0)

    rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator else (0, 1)
    observe(model, rows[rank::world], observer, AlwaysExecute(), progress=progress)
    for index, found in squares.items():
        if world > 1:
            torch.distributed.all_reduce(found)
        unit = units[index]
        assert unit.forecaster is not None
        unit.forecaster.choose(found * column_squares(unit.unit.module(layers[index // 2])))
