"""Fallbacks: what an approximated token gets, one file each; add one by adding a file (docs/how-to/fallback.md)."""
