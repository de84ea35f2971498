"""Routers, one file each; add one by adding a file (docs/how-to/router.md)."""
