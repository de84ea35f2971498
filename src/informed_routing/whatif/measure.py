"""Run prompts of a workload through a model into a table. Needs the model, as nothing else of the what-if does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..assets import load_texts
from ..assets.text import DEMO_TEXTS, check_readers
from ..errors import InputError
from ..evaluation.workload import Measurement, Request, measure_workload, read_about
from ..progress import Progress
from .table import readable
from .workloads import AnyWorkload, read_workload, workload_from_mapping


@dataclass(frozen=True)
class Dial:
    """The share approximated in a table, and what it is a share of (None: as the model was fitted)."""

    sparsity: float
    budget: Any = None


@dataclass(frozen=True)
class Measurer:
    """A routed model with the texts of the domains (references by name) that its prompts are cut from."""

    model: Any
    tokenizer: Any
    texts: Mapping[str, str]
    seed: int
    progress: Progress

    def run(
        self, workload: AnyWorkload, prompts: int, dial: Dial, out: Path, *, resume: bool = False
    ) -> list[Measurement]:
        """Sample prompts of a workload and measure them into the table `out`; see `measure_workload`."""
        inputs = workload.sample(prompts, np.random.default_rng(self.seed))
        columns = (inputs.domain.tolist(), inputs.prompt_tokens.tolist(), inputs.output_tokens.tolist())
        requests = [Request(*request) for request in zip(*columns, strict=True)]
        about = {
            "workload": workload.model_dump(mode="json"),
            "sparsity": dial.sparsity,
            "budget": dial.budget,
            "seed": self.seed,
        }
        return measure_workload(
            self.model,
            {name: self._stream(name) for name in sorted(set(columns[0]))},
            requests,
            sparsity=dial.sparsity,
            budget=dial.budget,
            seed=self.seed,
            out=out,
            resume=resume,
            about=about,
            progress=self.progress,
        )

    def _stream(self, name: str) -> Tensor:
        """The held-out text of a domain as one stream of tokens: int64 [tokens]."""
        documents = load_texts(self.texts[name], "heldout")
        ids = [self.tokenizer.encode(document, add_special_tokens=False) for document in documents]
        return torch.tensor([token for document in ids for token in document], dtype=torch.long)


def domain_texts(
    workloads: Sequence[AnyWorkload], given: Mapping[str, str], known: Sequence[AnyWorkload] = ()
) -> Mapping[str, str]:
    """The text of each domain of the workloads: that given, else the embedded one of its name.

    Raises InputError for a domain without text, for text of a domain of none of the workloads nor those `known`, and
    for a text that takes a package which is not installed.
    """
    names = sorted({name for workload in workloads for name in workload.support()})
    possible = {name for workload in (*workloads, *known) for name in workload.support()}
    for name in given:
        if name not in possible:
            raise InputError(f"--domain {name}: no workload has such a domain", f"There are {', '.join(names)}")
    for name in names:
        if name not in given and f"demo:{name}" not in DEMO_TEXTS:
            raise InputError(f"domain {name!r} has no text", f"Give --domain {name}=DATA")
    texts = {name: given.get(name, f"demo:{name}") for name in names}
    if texts:
        check_readers(list(texts.values()))
    return texts


def about_table(table: Path) -> Mapping[str, Any]:
    """What was stored beside the rows of a table. Raises InputError for a damaged one."""
    with readable(table):
        return read_about(table)


def measured_workload(table: Path, workload: Path | None = None) -> AnyWorkload:
    """The workload that a table was measured with: that of a YAML file, else the one stored in the table.

    Raises InputError where there is neither.
    """
    if workload is not None:
        return read_workload(workload)
    if not table.exists():
        raise InputError(f"table {table} does not exist", "Run `informed-routing whatif measure` first")
    stored = about_table(table).get("workload")
    if stored is None:
        raise InputError(f"{table} does not say which workload it was measured with", "Give --workload")
    return workload_from_mapping(stored)
