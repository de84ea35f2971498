"""Decision rules: how router logits become choices. A gate is 1 where a token executes its unit."""

from .rules.base import AlwaysExecute, DecisionRule, ExecuteRouted, Given, GumbelSample
from .rules.threshold import Threshold
from .rules.top_k import TopK

__all__ = ["AlwaysExecute", "DecisionRule", "ExecuteRouted", "Given", "GumbelSample", "Threshold", "TopK"]
