"""Tasks of lm-evaluation-harness by its own definitions, reading local files where a folder is given.

A task is built from the YAML file inside the installed package, included as it is; only where its documents come from
and how many examples a prompt has are set. So prompts, metrics and the choice of examples are the harness' own.
"""

from __future__ import annotations

import difflib
import errno
import functools
import hashlib
import logging
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from informed_routing.errors import InputError
from informed_routing.extras import need

from .tasks import HEADLINES, WIKITEXT, TaskSpec

FEWSHOT_SEED = 1234
"""lm-evaluation-harness' own default: the examples of its published numbers."""

_NAME = re.compile(r"""^["']?task["']?:[ \t]*["']?([^\s"'#\[{]+)["']?[ \t]*(?:#.*)?$""", re.MULTILINE)
_SPLITS = ("training_split", "validation_split", "test_split")
_DRAWING = ("lm_eval.api.task", "lm_eval.api.model", "lm_eval.models.huggingface")
_FORMATS = {".jsonl": "json", ".parquet": "parquet"}


def require_harness() -> str:
    """The version of lm-evaluation-harness. Raises MissingExtra, saying what to install, when it is missing."""
    need("lm_eval", extra="eval", for_what="Tasks of lm-evaluation-harness")
    return version("lm_eval")


@dataclass(frozen=True)
class LocalFiles:
    """The files that one task reads: split name -> `.jsonl` or `.parquet`."""

    files: Mapping[str, Path]

    def digests(self) -> dict[str, str]:
        """SHA-256 of each file."""
        return {split: hashlib.sha256(path.read_bytes()).hexdigest() for split, path in sorted(self.files.items())}

    def overrides(self, definition: Mapping[str, Any]) -> dict[str, Any]:
        """What replaces the source of a definition. Splits that are not needed are left out."""
        names = (*_SPLITS, "fewshot_split")
        unused = {key: None for key in names if definition.get(key) and definition[key] not in self.files}
        return {
            "dataset_path": _FORMATS[next(iter(self.files.values())).suffix],
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {split: str(path) for split, path in self.files.items()}},
            **unused,
        }


def local_files(spec: TaskSpec, data_dir: Path) -> LocalFiles:
    """The files of a task in `data_dir`, which has `tasks/NAME/SPLIT.jsonl` (or `.parquet`), or `NAME/SPLIT.jsonl`.

    WikiText-2 may also be `wikitext2/SPLIT.pages.jsonl`. Only the evaluated split is needed, and with examples in the
    prompt the one that they are drawn from. Raises InputError naming the file that is missing.
    """
    if not data_dir.is_dir():
        raise InputError(f"the folder {data_dir} does not exist", "Give a folder with tasks/NAME/SPLIT.jsonl")
    definition = _read(_definition(spec.name))
    needed = [str(definition.get("test_split") or definition.get("validation_split"))]
    if _shots(spec, definition):
        examples = (definition.get("fewshot_config") or {}).get("split") or definition.get("fewshot_split")
        needed.append(str(examples or next(filter(None, map(definition.get, _SPLITS)))))
    found = {split: _find(data_dir, spec.name, split, definition) for split in dict.fromkeys(needed)}
    if len({path.suffix for path in found.values()}) > 1:
        names = " and ".join(path.name for path in found.values())
        raise InputError(f"{spec.name} has files of two formats: {names}", "Give all as .jsonl, or all as .parquet")
    return LocalFiles(found)


def load_task(spec: TaskSpec, local: LocalFiles | None = None) -> Any:
    """The harness' task object, with its documents. Without `local` they come from the Hugging Face Hub.

    With `local` nothing is asked of the network. Raises InputError for a task that the harness does not have, and for
    local files whose columns do not fit it.
    """
    require_harness()
    path = _definition(spec.name)
    definition = _read(path)
    shots = _shots(spec, definition)
    content = {"include": str(path), "task": spec.name, "num_fewshot": shots}
    if local is not None:
        content |= local.overrides(definition)
    with tempfile.TemporaryDirectory() as folder, quiet_harness(), _offline(local is not None):
        (Path(folder) / "task.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
        try:
            task = _build(spec.name, folder)
        except Exception as error:
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            if local is None:
                raise InputError(
                    f"the data of {spec.name} could not be loaded from the Hub: {_first_line(error)}",
                    "Check the network, or give the files with --data-dir",
                ) from error
            raise InputError(
                f"the local files of {spec.name} do not fit the task: {_first_line(error)}",
                f"Give the columns of the Hub data set {definition.get('dataset_path')}",
            ) from error
        examples = task.fewshot_docs() if shots else None
        if examples is not None and len(examples) < shots:
            raise InputError(
                f"{spec.name}@{shots} asks for {shots} examples, and there are {len(examples)} to draw from",
                "Ask for fewer",
            )
    task.set_fewshot_seed(FEWSHOT_SEED)
    return task


@contextmanager
def quiet_harness() -> Iterator[None]:
    """Without the bars and advice that lm-evaluation-harness prints: not all of its bars have a switch."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets")]
    bars, levels = datasets.are_progress_bars_disabled(), [logger.level for logger in loggers]
    drawing: dict[Any, Any] = {sys.modules[name]: sys.modules[name].tqdm for name in _DRAWING if name in sys.modules}
    datasets.disable_progress_bars()
    for logger, wanted in zip(loggers, (logging.ERROR, logging.CRITICAL), strict=True):
        logger.setLevel(wanted)  # what `datasets` logs it raises, too
    for module, bar in drawing.items():
        module.tqdm = functools.partial(_no_bar, bar)
    try:
        yield
    finally:
        for module, bar in drawing.items():
            module.tqdm = bar
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()


def _no_bar(bar: Any, *arguments: Any, **options: Any) -> Any:
    return bar(*arguments, **{**options, "disable": True})


@contextmanager
def _offline(wanted: bool) -> Iterator[None]:
    """Even for local files `datasets` reports to a server that they were loaded, unless it believes to be offline."""
    from datasets import config

    before = config.HF_HUB_OFFLINE
    config.HF_HUB_OFFLINE = before or wanted
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = before


def _build(name: str, folder: str) -> Any:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=folder, include_defaults=False)
    if hasattr(manager, "load"):  # from 0.4.12 on
        return manager.load([name])["tasks"][name]
    return manager.load_task_or_group([name])[name]


def _definition(name: str) -> Path:
    """The YAML file of a task. Raises InputError for names that are none, with those that are like it."""
    known = _definitions()
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, 3) or [task for task in known if task.startswith(name)][:3]
    raise InputError(
        f"{name} is not a task of lm-evaluation-harness {require_harness()} (groups are not taken)",
        f"Name tasks, such as {', '.join(near or HEADLINES)}",
    )


@functools.cache
def _definitions() -> dict[str, Path]:
    """All tasks by name. Their files are searched as text: the harness' own index takes many seconds."""
    require_harness()
    import lm_eval.tasks

    found: dict[str, Path] = {}
    for path in sorted(Path(str(lm_eval.tasks.__file__)).parent.rglob("*.yaml")):
        name = _NAME.search(path.read_text(encoding="utf-8"))
        if name:
            found.setdefault(name[1], path)
    return found


class _Loader(yaml.SafeLoader):
    """Reads definitions without running the functions that they name."""


_Loader.add_constructor("!function", lambda loader, node: str(node.value))


def _read(path: Path) -> dict[str, Any]:
    """A definition with what it includes."""
    own: dict[str, Any] = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    includes = own.pop("include", [])
    merged: dict[str, Any] = {}
    for included in [includes] if isinstance(includes, str) else includes:
        merged |= _read(path.parent / included)
    return merged | own


def _shots(spec: TaskSpec, definition: Mapping[str, Any]) -> int:
    return spec.shots if spec.shots is not None else int(definition.get("num_fewshot") or 0)


def _find(data_dir: Path, name: str, split: str, definition: Mapping[str, Any]) -> Path:
    places = [data_dir / "tasks" / name / split, data_dir / name / split]
    if name == WIKITEXT:
        places.append(data_dir / "wikitext2" / f"{split}.pages")
    for place in places:
        for suffix in _FORMATS:
            path = place.with_name(place.name + suffix)
            if path.is_file():
                return path.resolve()
    raise InputError(
        f"{data_dir} has no {split} split of {name}",
        f"Put it at {places[0]}.jsonl, with the columns of the Hub data set {definition.get('dataset_path')}",
    )


def _first_line(error: BaseException) -> str:
    if type(error).__name__ == "DatasetGenerationError" and error.__cause__ is not None:
        error = error.__cause__  # the outer one says only that there was one
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
