"""Decision rules that settings name, one file each; add one by adding a file (docs/how-to/decision-rule.md)."""
