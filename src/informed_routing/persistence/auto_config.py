"""The configuration class by which transformers' auto classes recognise a routing folder. Imports no model code."""

from __future__ import annotations

from transformers.configuration_utils import PreTrainedConfig


class RoutedConfig(PreTrainedConfig):
    """Lets `AutoModelForCausalLM` find a routing folder; the real settings are in routing_config.json."""

    model_type = "informed_routing"
