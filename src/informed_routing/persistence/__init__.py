"""Routing folders: saved, loaded, and known to transformers."""
