"""A step recorded as a CUDA graph: hundreds of launches for the price of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

WARM_UP = 3


class Recorded:
    """A function of fixed tensors, recorded once and replayed. On devices without graphs it is simply called.

    `function` must take everything that changes from tensors that stay where they are, and must not wait for the
    device: recording fails where it does.
    """

    def __init__(self, function: Callable[[], Any], device: torch.device) -> None:
        self.function = function
        self.graph: torch.cuda.CUDAGraph | None = None
        self.result: Any = None
        if device.type != "cuda":
            return
        side = torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(WARM_UP):  # compiles kernels and lets libraries allocate before recording
                function()
        torch.cuda.current_stream(device).wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = function()

    def __call__(self) -> Any:
        if self.graph is None:
            return self.function()
        self.graph.replay()
        return self.result
