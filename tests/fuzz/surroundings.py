"""Mutations of the environment: streams, folders, disks, limits, variables, the cache."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from .case import OTHER, SAME, SAME_OR_REFUSED, SAME_OR_STOPPED, Case, Right, mutator, refused
from .process import file_size_limit, on_file_event, remake_streams, without_override

WRITERS = "fit fit-lora fit-resume prune study measure predict evaluate-tasks check"


@mutator("environment")
def _variables(case: Case) -> Right:
    name, value = case.rng.choice(
        [
            ("LANG", "C"),
            ("LC_ALL", "C"),
            ("LC_ALL", "xx_YY.UTF-8"),
            ("HOME", None),
            ("HOME", ""),
            ("HOME", "/nonexistent"),
            ("HOME", "relative"),
            ("TMPDIR", "/nonexistent"),
            ("TMPDIR", ""),
            ("COLUMNS", "1"),
            ("COLUMNS", "abc"),
            ("TERM", "dumb"),
            ("FORCE_COLOR", "1"),
            ("NO_COLOR", "1"),
            ("XDG_CACHE_HOME", "relative"),
            ("OMP_NUM_THREADS", ""),
            ("PYTHONUNBUFFERED", "1"),
        ]
    )
    if value is None:
        case.environment.pop(name, None)
    else:
        case.environment[name] = value
    case.note = f"{name}={value}"
    return SAME


@mutator("environment", only="generate-routed generate-dense evaluate-routed study predict")
def _streams_of_few_letters(case: Case) -> Right:
    """LANG=C without UTF-8 mode: letters that the terminal has not are no reason to fail."""
    if case.command.name.startswith("generate"):
        case.replace("-p", "thé rïver \U0001f30a")
    case.prepare.append(lambda: remake_streams("ascii"))
    case.note = "ASCII streams"
    return OTHER


@mutator("environment")
def _standard_streams(case: Case) -> Right:
    form = case.rng.choice(("no stdin", "no stdout", "no stderr", "stdout is full", "a closed pipe", "stderr is full"))
    case.note = form
    if form == "no stdin":
        case.stdin = None
    elif form == "no stdout":
        case.prepare.append(lambda: _close(1))
        return SAME_OR_REFUSED
    elif form == "no stderr":
        case.prepare.append(lambda: _close(2))
        case.silent = True
    elif form == "stderr is full":
        case.prepare.append(lambda: _onto(2, "/dev/full"))
        case.silent = True
    elif form == "stdout is full":
        case.prepare.append(lambda: _onto(1, "/dev/full"))
        return Right((1,), False)
    else:
        case.prepare.append(_broken_pipe)
        case.silent = True
        return Right((0, 1), False)
    return SAME


def _close(number: int) -> None:
    os.close(number)
    setattr(sys, "stdout" if number == 1 else "stderr", None)


def _onto(number: int, path: str) -> None:
    target = os.open(path, os.O_WRONLY)
    os.dup2(target, number)


def _broken_pipe() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)


@mutator("environment", only="evaluate-dense generate-routed predict study-list")
def _json_on_a_stream_that_fails(case: Case) -> Right:
    case.replace("--json", "-")
    form = case.rng.choice(("no stdout", "stdout is full"))
    case.prepare.append((lambda: _close(1)) if form == "no stdout" else (lambda: _onto(1, "/dev/full")))
    case.note = f"--json - with {form}"
    return Right((1, 2), False)


@mutator("environment")
def _a_folder_that_cannot_be_written(case: Case) -> Right:
    case.prepare.append(without_override)
    case.folder.chmod(0o555)
    case.restore.append(lambda: case.folder.chmod(0o755))
    case.note = "a read-only folder"
    return Right((1, 2), named=("--json", "out", "written"))


@mutator("environment")
def _an_input_that_cannot_be_read(case: Case) -> Right:
    case.prepare.append(without_override)
    named = [name for name in case.command.inputs if name in case.arguments]
    path = case.folder / case.rng.choice(named)
    files = sorted(found for found in path.rglob("*.safetensors")) if path.is_dir() else [path]
    chosen = files[0] if files else path
    mode = stat.S_IMODE(chosen.stat().st_mode)
    chosen.chmod(0)
    case.restore.append(lambda: chosen.chmod(mode))
    case.note = f"{chosen.relative_to(case.folder)} is unreadable"
    return refused(path.name, chosen.name)


@mutator("environment", only=WRITERS)
def _a_full_disk(case: Case) -> Right:
    """A real one where this process may mount, else the error that it gives, at one of the first changes."""
    disk = case.folder / "disk"
    disk.mkdir()
    case.allowed.add("disk")
    size = case.rng.choice((4, 16, 40, 80))
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}k", "none", str(disk)], capture_output=True
        ).returncode
    )
    case.note = f"a disk of {size} kB" if mounted else "no space left at some change"
    if not mounted:
        number = case.rng.randrange(1, 12)
        case.prepare.append(on_file_event(number, _no_space, growing=True))
        return SAME_OR_STOPPED
    case.finish.append(lambda: subprocess.run(["umount", "-l", str(disk)], check=True))
    option = next(name for name in ("--out", "-o", "--plot", "--resume-dir") if name in case.arguments)
    name = case.arguments[case.option(option)]
    if case.command.name == "fit-resume":
        shutil.copytree(case.folder / "half", disk / "half", dirs_exist_ok=True) if size > 60 else None
        if size <= 60:
            (disk / "half").mkdir()
    case.replace(option, f"disk/{name}")
    case.replace("--json", "disk/out.json")
    case.outputs = (f"disk/{name}", "disk/out.json")
    return Right((0, 1), False)


def _no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@mutator("environment", only=WRITERS)
def _no_space_at_some_change(case: Case) -> Right:
    number = case.rng.randrange(1, 40)
    case.prepare.append(on_file_event(number, _no_space, growing=True))
    case.note = f"no space left at change {number}"
    return Right((0, 1), False)


@mutator("environment", only=WRITERS)
def _no_large_files(case: Case) -> Right:
    size = case.rng.choice((4096, 20_000, 60_000))
    case.prepare.append(file_size_limit(size))
    case.note = f"files of at most {size} bytes"
    return Right((0, 1), False)


@mutator("environment", only=WRITERS + " evaluate-dense generate-routed benchmark")
def _interrupted(case: Case) -> Right:
    """Ctrl-C at some change of the file system."""
    number = case.rng.randrange(1, 40)
    case.prepare.append(lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    case.prepare.append(on_file_event(number, lambda: os.kill(os.getpid(), signal.SIGINT)))
    case.note = f"Ctrl-C at change {number}"
    return Right((0, 1), False, ("interrupted",))


@mutator("environment")
def _few_resources(case: Case) -> Right:
    form = case.rng.choice(("files", "memory"))
    number = case.rng.choice((16, 24, 48)) if form == "files" else case.rng.choice((50, 150, 400)) << 20
    case.note = f"{number} {form}"

    def limit() -> None:
        if form == "files":
            resource.setrlimit(resource.RLIMIT_NOFILE, (number, number))
        else:
            size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (size + number, size + number))

    case.prepare.append(limit)
    return Right((0, 1, 2), False)


@mutator("environment", only=WRITERS)
def _private_files(case: Case) -> Right:
    """With umask 077 nobody else can read what is written."""
    case.prepare.append(lambda: os.umask(0o077))

    def check() -> Iterator[str]:
        for output in (*case.command.outputs, "out.json"):
            top = case.folder / output
            for path in [top, *top.rglob("*")] if top.exists() and output != "half" else []:
                if stat.S_IMODE(path.stat().st_mode) & 0o077:
                    yield f"{path.relative_to(case.folder)} can be read by others, despite umask 077"
                    return

    case.checks.append(check)
    case.note = "umask 077"
    return SAME


@mutator("environment")
def _no_working_directory(case: Case) -> Right:
    def leave() -> None:
        gone = Path(case.environment["TMPDIR"]) / "gone"
        gone.mkdir()
        os.chdir(gone)
        gone.rmdir()

    case.prepare.append(leave)
    case.note = "the working directory was removed"
    return Right((1, 2))


@mutator("environment", only="study-list")
def _names_of_the_package_in_the_folder(case: Case) -> Right:
    """Folders and files of the names of recipes and grids change nothing, or are named as a clash."""
    name = case.rng.choice(("small", "skipgpt", "demo", "cpu", "shortgpt"))
    grid = case.folder / "grid.yaml"
    short = "{forecaster.tokens: 128, router.warm_start_tokens: 64, router.sweeps: 1, router.sweep_tokens: 64}"
    method = f"  informed: {{label: Informed, recipe: small, recovered: [false], overrides: {short}}}\n"
    grid.write_text(grid.read_text() + method)
    if case.rng.random() < 0.5:
        (case.folder / name).mkdir()
    else:
        (case.folder / name).write_text("a: [")
    case.note = f"a stranger called {name}"
    return OTHER


# -- the cache and the compiler -------------------------------------------------------------------------------------

NATIVE = "generate-routed benchmark"


def _own_cache(case: Case) -> Path:
    cache = case.folder / "cache"
    source = case.world.root / "cache"
    shutil.copytree(source, cache, ignore=shutil.ignore_patterns(".*lock"))
    case.environment["INFORMED_ROUTING_CACHE"] = str(cache)
    case.allowed.add("cache")
    return cache


@mutator("cache", only=NATIVE)
def _no_compiler(case: Case) -> Right:
    cache = _own_cache(case)
    form = case.rng.choice(("none", "one that fails", "none, and an engine"))
    if form != "none, and an engine":
        shutil.rmtree(cache / "native", ignore_errors=True)
    if form == "one that fails":
        (case.folder / "bin").mkdir()
        (case.folder / "bin" / "g++").write_text("#!/bin/sh\necho 'error: no' >&2; exit 1\n")
        (case.folder / "bin" / "g++").chmod(0o755)
    case.environment["PATH"] = str(case.folder / "bin")
    case.environment.pop("CXX", None)
    case.note = f"compiler: {form}"
    return SAME


@mutator("cache", only=NATIVE)
def _a_damaged_engine(case: Case) -> Right:
    """Built again, or not used: the result is the same."""
    folder = _own_cache(case) / "native"
    engines = sorted(folder.glob("engine-*.so"))
    form = case.rng.choice(("cut off", "empty", "garbage", "a folder", "unreadable"))
    for path in engines[:1] if engines else []:
        content = path.read_bytes()
        if form == "a folder":
            path.unlink()
            path.mkdir()
        elif form == "unreadable":
            path.chmod(0)
            case.prepare.append(without_override)
        else:
            path.write_bytes({"cut off": content[: len(content) // 2], "empty": b"", "garbage": b"\x7fELF" * 999}[form])
    case.note = f"engine {form}"
    return SAME


@mutator("cache", only=NATIVE)
def _damaged_prices(case: Case) -> Right:
    cache = _own_cache(case)
    found = list(cache.rglob("*.json"))
    content = case.rng.choice((b"", b"{", b"[]", b"null", b'{"a": "b"}', b"\xff", b"NaN", b"{}"))
    for path in found:
        path.write_bytes(content)
    case.note = f"{len(found)} JSON files of the cache are {content!r}"
    return SAME


@mutator("cache", only=NATIVE + " evaluate-gguf")
def _a_cache_that_cannot_be(case: Case) -> Right:
    form = case.rng.choice(("a file", "below a file", "unwritable", "relative"))
    target = case.folder / "cache"
    case.allowed.add("cache")
    if form == "a file":
        target.write_text("x")
    elif form == "below a file":
        target.write_text("x")
        target = target / "below"
    elif form == "unwritable":
        target.mkdir(mode=0o555)
        case.prepare.append(without_override)
    case.environment["INFORMED_ROUTING_CACHE"] = "cache" if form == "relative" else str(target)
    if form == "relative":
        shutil.copytree(case.world.root / "cache" / "native", target / "native", dirs_exist_ok=True)
    case.note = f"the cache is {form}"
    return Right((0, 1, 2), named=("cache", "cannot", "writable")) if form != "relative" else SAME


@mutator("cache", only="evaluate-gguf")
def _a_damaged_conversion(case: Case) -> Right:
    """What the cache holds of a converted file is whole, or made again."""
    case.world.command(*case.arguments)
    (case.folder / "out.json").unlink(missing_ok=True)
    cache = _own_cache(case)
    files = [path for path in (cache / "models").rglob("*") if path.is_file() and not path.name.startswith(".")]
    if not files:
        return SAME
    path = case.rng.choice(sorted(files))
    form = case.rng.choice(("gone", "empty", "cut off"))
    content = path.read_bytes()
    if form == "gone":
        path.unlink()
    else:
        path.write_bytes(b"" if form == "empty" else content[: len(content) // 2])
    case.note = f"cache: {path.name} {form}"
    return Right((0, 1, 2), named=("cache",))
