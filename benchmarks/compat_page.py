"""docs/compatibility.md: which releases of its foundations the package was run with, and what passed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gpu_page import markdown

Row = dict[str, Any]
LISTED = 10
"""Failures that the page names for one suite; the JSON has all."""

ABOUT = """# Compatibility

Written by `make compat` (`python benchmarks/compat.py`), which makes an environment for each row and runs the tests
in it that compare a routed model with its base model, one engine with another, cached with uncached text, and saved
with loaded models. *Oldest* has the lower bounds of `pyproject.toml`, *pinned* the versions of `constraints.txt`,
*newest* what the package index has; other packages are the pinned ones unless one of these four asks for another.
`docs/data/compat.json` has every version, count and failure."""


def page(rows: Sequence[Row], suites: Sequence[str]) -> str:
    """The whole page; the machine and the commit of each row stand at its end."""
    parts = [ABOUT, "## Versions", _versions(rows), "## Tests: passed", _results(rows, suites)]
    parts += ["A cell with failures or skipped tests says so; all others passed."]
    for row in rows:
        parts += _failures(row, suites)
    for row in rows:
        if row["conflicts"]:
            parts += [f"`pip check` in *{row['name']}*: " + "; ".join(row["conflicts"]) + "."]
    return "\n\n".join([*parts, _where(rows)]) + "\n"


def _versions(rows: Sequence[Row]) -> str:
    names = list(rows[0]["versions"]) if rows else []
    return markdown(
        ["environment", *names], [[row["name"], *(row["versions"][name] for name in names)] for row in rows]
    )


def _results(rows: Sequence[Row], suites: Sequence[str]) -> str:
    body = [
        [row["name"], row["versions"]["transformers"], *(_cell(row["suites"].get(suite)) for suite in suites)]
        for row in rows
    ]
    return markdown(["environment", "transformers", *suites], body)


def _cell(found: Row | None) -> str:
    if found is None:
        return "not run"
    if found.get("error"):
        return "**did not run**"
    failed = f", **{found['failed']} failed**" if found["failed"] else ""
    return f"{found['passed']}{failed}" + (f", {found['skipped']} skipped" if found["skipped"] else "")


def _failures(row: Row, suites: Sequence[str]) -> list[str]:
    lines = []
    for suite in suites:
        found = row["suites"].get(suite) or {}
        names = [found["error"]] if found.get("error") else found.get("failures", [])
        lines += [f"- {suite}: `{name}`" for name in names[:LISTED]]
        if len(names) > LISTED:
            lines.append(f"- {suite}: and {len(names) - LISTED} more")
    return [f"## Failures in *{row['name']}*", "\n".join(lines)] if lines else []


def _where(rows: Sequence[Row]) -> str:
    """Machine, interpreter and commit of each row, said once where they are the same."""
    said = []
    for row in rows:
        one = row["environment"]
        seconds = sum(suite["seconds"] for suite in row["suites"].values())
        place = f"{one['cpu']}, {one['cores']} cores, one thread, {one['system']}, Python {one['python']}"
        said.append((f"{place}, commit {one['commit']}", f"{row['name']} {seconds:.0f} s"))
    places = dict.fromkeys(place for place, _ in said)
    return "\n\n".join(f"*{place}: {', '.join(time for where, time in said if where == place)}.*" for place in places)
