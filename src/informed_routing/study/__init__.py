"""The paper's tables and figures as commands: grids of methods, run cell by cell, into tables with their plots."""
