"""Lets transformers load this folder with trust_remote_code; needs `pip install informed-routing`."""

from informed_routing.routed_model import RoutedConfig, RoutedModelForCausalLM

__all__ = ["RoutedConfig", "RoutedModelForCausalLM"]
