"""The commands that are mutated, each with the inputs that it names and the outputs that it may write."""

from __future__ import annotations

from dataclasses import dataclass

TEXT = ("--data", "text.jsonl")
SHORT = ("--sequence-length", "64")
COMMON = ("-q", "--threads", "1", "--json", "out.json")
FLOAT = ("--dtype", "float32")
DOMAIN = ("--domain", "story=text.jsonl", "--execution", "sparse")


@dataclass(frozen=True)
class Command:
    """A command line that works, in a folder that holds `inputs`; it writes `outputs` (and `out.json`) and no more.

    `weight` is how often it is drawn: less for those that take long. `resume` continues it when it was interrupted.
    """

    name: str
    arguments: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...] = ()
    weight: float = 1.0
    resume: tuple[str, ...] = ()
    timed: bool = False

    @property
    def words(self) -> int:
        """How many of the arguments name the command."""
        return 2 if self.arguments[0] == "whatif" else 1


def _command(name: str, line: str, inputs: str, outputs: str = "", weight: float = 1.0, **more: object) -> Command:
    extra = () if "--dry-run" in line or line.startswith(("fit", "whatif predict", "study")) else FLOAT
    arguments = (*line.split(), *extra, *COMMON)
    return Command(name, arguments, tuple(inputs.split()), tuple(outputs.split()), weight, **more)  # type: ignore[arg-type]


_TEXT, _SHORT, _DOMAIN = " ".join(TEXT), " ".join(SHORT), " ".join(DOMAIN)
_EVALUATE = f"{_TEXT} --split all {_SHORT} --limit 4"
_FIT = f"--recipe recipe.yaml {_TEXT}"

COMMANDS = {
    command.name: command
    for command in (
        _command("evaluate-dense", f"evaluate model {_EVALUATE}", "model text.jsonl"),
        _command("evaluate-routed", f"evaluate routed {_EVALUATE} -s 0 -s 0.2", "routed model text.jsonl", weight=2),
        _command("evaluate-tuned", f"evaluate tuned {_EVALUATE} -s 0.2", "tuned model text.jsonl"),
        _command("evaluate-pruned", f"evaluate pruned {_EVALUATE}", "pruned text.jsonl"),
        _command("evaluate-gguf", f"evaluate model.gguf {_EVALUATE}", "model.gguf text.jsonl"),
        _command(
            "evaluate-pages", f"evaluate model --data test.pages.jsonl {_SHORT} --limit 3", "model test.pages.jsonl"
        ),
        _command(
            "evaluate-tasks",
            "evaluate model --tasks boolq@0 --data-dir data --limit 2 --resume-dir results",
            "model data",
            "results",
            0.5,
        ),
        _command("generate-routed", "generate routed -p the-river -n 4 -s 0.2", "routed model", weight=2),
        _command("generate-dense", "generate model -p the-river -n 4", "model"),
        _command(
            "benchmark",
            f"benchmark routed -s 0.2 --prompt-tokens 8 --new-tokens 2 --repeats 1 {_TEXT}",
            "routed model text.jsonl",
            timed=True,
        ),
        _command(
            "fit", f"fit model {_FIT} --out out", "model recipe.yaml text.jsonl", "out", 0.7, resume=("--resume",)
        ),
        _command(
            "fit-resume", f"fit model {_FIT} --out half --resume", "model recipe.yaml text.jsonl half", "half", 0.7
        ),
        _command(
            "fit-lora",
            f"fit model --start routed {_FIT} --stages lora --out out",
            "routed model recipe.yaml text.jsonl",
            "out",
            0.5,
            resume=("--resume",),
        ),
        _command(
            "prune",
            f"prune model --method shortgpt -s 0.34 --out out {_TEXT} --tokens 256 {_SHORT}",
            "model text.jsonl",
            "out",
            0.7,
            resume=("--resume",),
        ),
        _command("study-list", "study grid.yaml --out study --dry-run", "grid.yaml"),
        _command("study", "study grid.yaml --out study", "grid.yaml model text.jsonl", "study", 0.4),
        _command(
            "measure",
            f"whatif measure routed --workload nominal.yaml -n 4 -o own.parquet {_DOMAIN}",
            "routed model nominal.yaml text.jsonl",
            "own.parquet",
            resume=("--resume",),
        ),
        _command(
            "predict",
            "whatif predict table.parquet --targets targets.yaml --metrics metrics.yaml --plot plot.svg",
            "table.parquet targets.yaml metrics.yaml",
            "plot.svg",
        ),
        _command(
            "check",
            "whatif check routed table.parquet --targets targets.yaml --metrics metrics.yaml --only long -n 4 -o own "
            + _DOMAIN,
            "routed model table.parquet targets.yaml metrics.yaml text.jsonl",
            "own",
            0.5,
        ),
    )
}


def using(name: str) -> list[Command]:
    """The commands that read the input `name`."""
    return [command for command in COMMANDS.values() if name in command.inputs]
