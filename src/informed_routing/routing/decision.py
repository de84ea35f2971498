"""Decision rules: how router logits become choices. A gate is 1 where a token executes its unit."""

from .rules.base import AlwaysExecute, DecisionRule, Given, GumbelSample
from .rules.threshold import Threshold
from .rules.top_k import TopK

__all__ = ["AlwaysExecute", "DecisionRule", "Given", "GumbelSample", "Threshold", "TopK"]
