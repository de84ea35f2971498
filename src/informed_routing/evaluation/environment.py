"""What a measurement ran on, in words that may be published: no host name, user name or path."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from informed_routing.errors import InputError


def version() -> str:
    """The version of this library."""
    from informed_routing import __version__

    return __version__


def environment() -> dict[str, Any]:
    """Processor, threads, versions and (in a source checkout) the commit; "-dirty" marks local changes."""
    import torch
    import transformers

    return {
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": _usable_cores(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "informed_routing": version(),
        "commit": _commit(),
    }


def check_threads(threads: int | None) -> None:
    """Use `threads` CPU threads from here on (None: leave torch's choice). Raises InputError below 1."""
    if threads is None:
        return
    if threads < 1:
        raise InputError(f"--threads {threads} is below 1", "Give the number of processor cores to use")
    import torch

    torch.set_num_threads(threads)


def _usable_cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only; a container may own fewer cores than there are
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists() or not (root / "src" / "informed_routing").is_dir():
        return None  # installed from a wheel: whatever repository lies around it is not ours

    def git(*arguments: str) -> str:
        # Without the lock that `status` takes to refresh the index: a kill would leave it in the user's repository.
        command = ["git", "--no-optional-locks", *arguments]
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        return commit + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None
