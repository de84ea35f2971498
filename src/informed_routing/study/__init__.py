"""Grids of methods, run cell by cell, into tables with their plots. `paper/` has what serves the paper only."""
