"""Do the parity tests pass with the oldest, the tested and the newest releases of what the package stands on?

    python benchmarks/compat.py                # `make compat`: writes docs/data/compat.json, docs/compatibility.md
    python benchmarks/compat.py newest --again # one environment, asked and measured anew

Each environment is one of its own under out/compat, made from this interpreter: it sees the packages installed here
(torch above all) and holds by itself only what differs, which pip takes from the package index. Environments and
rows that are there already, with the same versions and the same code and tests, are not made again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from compat_page import page
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from informed_routing.errors import InformedRoutingError, InputError, WorkError
from informed_routing.evaluation.environment import environment
from informed_routing.files.atomic import write_json, write_text

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("transformers", "peft", "accelerate", "lm-eval")
RECORDED = (*PACKAGES, "torch", "tokenizers", "huggingface-hub", "datasets", "safetensors", "numpy")
STEP = "5.20.*"
"""Between the oldest and the tested transformers: others pin below it, and its generate drops masks of ones."""
SUITES: dict[str, tuple[str, ...]] = {
    "families": ("tests/models/test_*.py", "tests/test_routed_model.py"),
    "cached = uncached": ("tests/models/test_cached_text.py", "tests/baselines/test_dropping.py"),
    "native engine": ("tests/execution/test_[!gk]*.py",),  # GPU kernels have no part in this
    "harness": ("tests/evaluation/test_harness*.py",),
    "folders and LoRA": (
        "tests/persistence/test_*.py",
        "tests/training/test_fit.py",
        "tests/baselines/test_recovery.py",
    ),
}

Done = subprocess.CompletedProcess[str]
Call = Callable[[Sequence[str], dict[str, str]], Done]
Row = dict[str, Any]


def call(command: Sequence[str], variables: dict[str, str]) -> Done:
    """Run a command in the repository, with further environment variables."""
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True)


def must(done: Done, what: str, remedy: str) -> Done:
    """Raises WorkError with the last line of what a command said, if it failed."""
    if done.returncode:
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()]
        raise WorkError(f"{what}: {lines[-1].strip() if lines else f'exit code {done.returncode}'}", remedy)
    return done


def pins(constraints: Path) -> dict[str, str]:
    """The versions of constraints.txt that hold for this interpreter, by canonical name."""
    found: dict[str, str] = {}
    for line in constraints.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            one = Requirement(line)
            if one.marker is None or one.marker.evaluate():
                found[canonicalize_name(one.name)] = str(one.specifier)
    return found


def requirements() -> dict[str, Requirement]:
    """What the package asks for, its extra `eval` included, by canonical name."""
    wanted = [Requirement(line) for line in metadata.requires("informed-routing") or []]
    kept = [one for one in wanted if one.marker is None or one.marker.evaluate({"extra": "eval"})]
    return {str(canonicalize_name(one.name)): one for one in kept}


def environments(asked: dict[str, Requirement], pinned: dict[str, str]) -> dict[str, dict[str, str]]:
    """For each environment the specifier of each of PACKAGES; an empty one is the newest there is."""

    def oldest(name: str) -> str:
        bounds = [one.version for one in asked[name].specifier if one.operator == ">="]
        if not bounds:
            raise InputError(f"pyproject.toml names no oldest {name}", f'Write "{name}>=VERSION" there')
        return f"=={bounds[0]}"

    tested = {name: pinned[name] for name in PACKAGES}
    return {
        "oldest": {name: oldest(name) for name in PACKAGES},
        "5.20": {**tested, "transformers": f"=={STEP}"},
        "pinned": tested,
        "newest": dict.fromkeys(PACKAGES, ""),
    }


def resolve(wants: dict[str, str], wheels: Path, run: Call) -> dict[str, str]:
    """Exact versions, from the package index as pip is configured here; their wheels lie in `wheels` afterwards."""
    found = {}
    for name, specifier in wants.items():
        folder = wheels / f"{name}{specifier.replace('*', 'x') or '-newest'}"
        if not specifier or "*" in specifier:
            shutil.rmtree(folder, ignore_errors=True)  # the index may have a newer one by now
        if not list(folder.glob("*.whl")):
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
            command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), f"{name}{specifier}"]
            must(run(command, {}), f"pip cannot fetch {name}{specifier}", "Check the network and pip's configuration")
        found[name] = str(parse_wheel_filename(next(folder.glob("*.whl")).name)[1])
    return found


def make(folder: Path, versions: dict[str, str], asked: Iterable[Requirement], wheels: Path, run: Call) -> Path:
    """The interpreter of an environment with these versions, made unless it is there already."""
    python, stamp = folder / "bin" / "python", folder / "made.json"
    others = [f"{one.name}{one.specifier}" for one in asked if canonicalize_name(one.name) not in versions]
    wanted = {"python": sys.version, "packages": versions, "others": sorted(others), "shares": _site_packages()}
    if python.exists() and stamp.exists() and json.loads(stamp.read_text(encoding="utf-8")) == wanted:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    remedy = f"Remove {folder} and run again"
    must(run([sys.executable, "-m", "venv", "--without-pip", str(folder)], {}), "cannot make an environment", remedy)
    own = next(folder.glob("lib/python*/site-packages"))
    # What is installed here comes after what the environment has itself; pip sees both, and installs what differs.
    shared = "; ".join(f"site.addsitedir({path!r})" for path in _site_packages())
    write_text(own / "shared_packages.pth", f"import site; {shared}\n")
    links = [part for path in sorted(wheels.iterdir()) for part in ("--find-links", str(path))]
    exact = [f"{name}=={version}" for name, version in versions.items()]
    command = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *links, *exact, *others]
    must(run(command, {}), f"pip cannot install {' '.join(exact)}", remedy)
    write_json(stamp, wanted)
    return python


def _site_packages() -> list[str]:
    return sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})


def installed(python: Path, run: Call) -> dict[str, str]:
    """The versions that an environment really imports."""
    code = f"import json, importlib.metadata as m; print(json.dumps({{n: m.version(n) for n in {RECORDED!r}}}))"
    return dict(json.loads(must(run([str(python), "-c", code], {}), "cannot list versions", "Run with --again").stdout))


def conflicts(python: Path, run: Call) -> list[str]:
    """What `pip check` says of an environment."""
    done = run([str(python), "-m", "pip", "check", "--disable-pip-version-check"], {})
    return [line for line in done.stdout.splitlines() if line.strip()] if done.returncode else []


def files_of(suite: str, root: Path = ROOT) -> list[str]:
    """The test files of a suite, without those that another suite names by themselves.

    Raises WorkError when there is none: a table of nothing would look like success.
    """
    elsewhere = {name for other, names in SUITES.items() if other != suite for name in names}
    matched = [str(path.relative_to(root)) for pattern in SUITES[suite] for path in sorted(root.glob(pattern))]
    found = [name for name in matched if name not in elsewhere]
    if not found:
        raise WorkError(f"suite {suite!r} has no test files", "Mend SUITES in benchmarks/compat.py")
    return found


def code(root: Path = ROOT) -> str:
    """A digest of what is tested and by what: it decides whether a row is still true."""
    digest = hashlib.sha256()
    for top in ("src", "tests"):
        for path in sorted(root.joinpath(top).rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def measure(python: Path, files: Sequence[str], report: Path, run: Call) -> Row:
    """Counts of one suite by pytest in an environment, on one thread, and the names of what failed."""
    report.parent.mkdir(parents=True, exist_ok=True)
    report.unlink(missing_ok=True)
    variables = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    variables["PYTHONPATH"] = str(ROOT / "src")
    started = time.perf_counter()
    command = [str(python), "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *files]
    done = run(command, variables)
    seconds = round(time.perf_counter() - started, 1)
    if done.returncode not in (0, 1) or not report.exists():
        last = ([line for line in (done.stdout + done.stderr).splitlines() if line.strip()] or ["nothing said"])[-1]
        return {"error": f"pytest ended with exit code {done.returncode}: {last.strip()}", "seconds": seconds}
    return {**counts(report), "seconds": seconds}


def counts(report: Path) -> Row:
    """Passed, failed and skipped tests of a JUnit report."""
    found: Row = {"passed": 0, "failed": 0, "skipped": 0, "failures": []}
    for case in ElementTree.parse(report).iter("testcase"):
        kinds = {child.tag for child in case}
        kind = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[kind] += 1
        if kind == "failed":
            found["failures"].append(f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}")
    return found


def run_row(name: str, wants: dict[str, str], out: Path, again: bool, run: Call, say: Callable[[str], None]) -> Row:
    """One environment: made, asked for its versions, and every suite run in it. Kept after each suite."""
    wheels, folder = out / "wheels", out / "environments" / name
    versions = resolve(wants, wheels, run)
    say(f"{name}: {', '.join(f'{package} {version}' for package, version in versions.items())}")
    if again:
        shutil.rmtree(folder, ignore_errors=True)
    python = make(folder, versions, requirements().values(), wheels, run)
    place = out / "rows" / f"{name}.json"
    row: Row = {"name": name, "versions": installed(python, run), "code": code()}
    wrong = {one: row["versions"][one] for one in PACKAGES if row["versions"][one] != versions[one]}
    if wrong:
        raise WorkError(f"environment {name} has {wrong}, not {versions}", f"Remove {folder} and run again")
    kept = json.loads(place.read_text(encoding="utf-8")) if place.exists() and not again else {}
    same = all(kept.get(key) == value for key, value in row.items())
    row |= {"conflicts": conflicts(python, run), "environment": _machine()}
    row["suites"] = dict(kept.get("suites", {})) if same else {}
    for suite in SUITES:
        if suite in row["suites"]:
            say(f"{name}: {suite}: measured before")
            continue
        row["suites"][suite] = found = measure(python, files_of(suite), out / "reports" / f"{name}-{suite}.xml", run)
        say(f"{name}: {suite}: {found.get('error') or _words(found)} ({found['seconds']:.0f} s)")
        write_json(place, row)
    return row


def _machine() -> Row:
    """What of this process holds for the environments, too."""
    found = environment()
    return {key: found[key] for key in ("cpu", "cores", "system", "python", "commit")}


def _words(found: Row) -> str:
    return ", ".join(f"{found[kind]} {kind}" for kind in ("passed", "failed", "skipped"))


def main(arguments: Sequence[str] | None = None, run: Call = call) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="ENVIRONMENT", help="oldest, 5.20, pinned, newest (default: all)")
    parser.add_argument("--again", action="store_true", help="make environments and rows anew")
    parser.add_argument("--out", type=Path, default=ROOT / "out" / "compat", help="environments, wheels, rows")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the table goes")
    given = parser.parse_args(arguments)
    try:
        known = environments(requirements(), pins(ROOT / "constraints.txt"))
        if unknown := [name for name in given.names if name not in known]:
            raise InputError(f"no environment is called {unknown[0]!r}", f"Known: {', '.join(known)}")
        for name in given.names or known:
            run_row(name, known[name], given.out, given.again, run, lambda line: print(line, flush=True))
    except InformedRoutingError as error:
        print(f"Error: {error}", file=sys.stderr)
        return error.exit_code
    places = [given.out / "rows" / f"{name}.json" for name in known]
    rows = [json.loads(place.read_text(encoding="utf-8")) for place in places if place.exists()]
    write_json(given.docs / "data" / "compat.json", {"rows": rows})
    write_text(given.docs / "compatibility.md", page(rows, list(SUITES)))
    failed = [row["name"] for row in rows if any(one.get("error") or one["failed"] for one in row["suites"].values())]
    print(f"wrote {given.docs / 'compatibility.md'}" + (f"; tests fail in: {', '.join(failed)}" if failed else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
