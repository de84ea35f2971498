"""`prune`: a dense model made smaller by one of the static methods, with recovery training if asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from informed_routing.errors import InputError

from .arguments import method_settings
from .common import Common, check_at_least, dtype_name, session, with_common

if TYPE_CHECKING:
    from rich.console import Console


@with_common
def prune(
    common: Common,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Hub id, local folder or demo:smollm2-135m.")],
    method: Annotated[
        str,
        typer.Option(
            "--method",
            help="shortgpt, shortened-ppl, shortened-taylor, llm-drop, llm-drop-attention, llm-drop-ffn or slicegpt.",
        ),
    ],
    sparsity: Annotated[float, typer.Option("--sparsity", "-s", help="Share of layers, units or width to remove.")],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="DIR", help="Folder of the pruned model.")],
    data: Annotated[
        list[str] | None,
        typer.Option("--data", metavar="DATA", help="Text as for `fit` [default: demo:wiki, demo:c4]. Repeatable."),
    ] = None,
    tokens: Annotated[int, typer.Option("--tokens", help="Calibration text that is read.")] = 32_768,
    sequence_length: Annotated[int, typer.Option("--sequence-length", help="Tokens in a sequence.")] = 512,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="A setting of the method: keep_first=4. Repeatable."),
    ] = None,
    recovery_steps: Annotated[
        int, typer.Option("--recovery-steps", help="LoRA steps afterwards, merged into the weights.")
    ] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Sequences in a recovery step.")] = 1,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted recovery in --out, as the same command does.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the pruned model in --out.")] = False,
) -> None:
    """Remove what matters least of a dense model, by its behaviour on text: the static methods of the comparison.

    Layers removed (shortgpt, shortened-*) leave an ordinary transformers model; the other folders are read by this
    package's commands, or by load_static in Python.

    Example: informed-routing prune demo:smollm2-135m --method shortgpt --sparsity 0.25 --out pruned

    Example: informed-routing prune demo:smollm2-135m --method slicegpt -s 0.25 --set measure=body --out sliced

    Example: informed-routing prune MODEL --method llm-drop -s 0.2 --recovery-steps 500 --data mine.jsonl --out dropped
    """
    check_at_least("--tokens", [tokens], 1)
    check_at_least("--sequence-length", [sequence_length], 2)
    check_at_least("--recovery-steps", [recovery_steps], 0)
    if resume and overwrite:
        raise InputError("--resume and --overwrite exclude each other", "Give one of them")
    with session("prune", common) as run:
        from hashlib import sha256

        from informed_routing.assets import load_model
        from informed_routing.assets.text import check_readers
        from informed_routing.baselines.recovery import recover
        from informed_routing.baselines.saving import RECOVERY_FILE, begin, check_folder, check_inputs
        from informed_routing.baselines.static import prune as run_prune
        from informed_routing.baselines.static import save_static
        from informed_routing.config.recipe import Recipe
        from informed_routing.files.folders import CHECKPOINTS, check_apart_from, only_writer
        from informed_routing.models.fingerprint import fingerprint
        from informed_routing.training.texts import Texts

        chosen = method_settings(method, settings or ())
        lora = {"steps": max(recovery_steps, 1), "batch_size": batch_size, "sequence_length": sequence_length}
        recovery = Recipe.from_mapping({"lora": lora}).lora  # a bad value is refused before anything runs
        texts = data or Recipe.from_mapping({}).data
        check_readers(texts)
        check_apart_from(out, model)
        described = {
            "model": model,
            "method": method,
            "sparsity": sparsity,
            "settings": chosen,
            "data": list(texts),
            "tokens": tokens,
            "sequence_length": sequence_length,
            "recovery_steps": recovery_steps,
            "batch_size": batch_size,
            "seed": run.seed,
            "dtype": common.dtype,
        }
        with only_writer(out) as folder:
            resumed = check_folder(folder, described, resume=resume, overwrite=overwrite)
            if resumed:
                run.progress.message(f"continuing the interrupted run in {out}")
            dense, tokenizer = load_model(model, dtype=common.dtype, device=run.device)
            text = Texts(texts, tokenizer, run.seed)
            rows = text.some("train", sequence_length, tokens, "pruning")
            inputs = {"base": fingerprint(dense), "text": sha256(rows.numpy().tobytes()).hexdigest()}
            if resumed:
                check_inputs(folder, inputs)
            report = run_prune(dense, method, sparsity, rows, progress=run.progress, **chosen)
            begin(folder, {**described, "inputs": inputs}, resumed=resumed)
            result: dict[str, Any] = {"pruning": report.as_dict()}
            if recovery_steps:
                result["recovery"] = recover(
                    dense,
                    text.rows("train", sequence_length),
                    recovery,
                    seed=run.seed,
                    checkpoint=folder / CHECKPOINTS / RECOVERY_FILE,
                    progress=run.progress,
                )
            save_static(dense, tokenizer, folder)
        run.finish(result, lambda console: _show(console, result, out), model=model, dtype=dtype_name(dense))


def _show(console: Console, result: Mapping[str, Any], out: Path) -> None:
    """What went and what it saves."""
    report = result["pruning"]
    what = ", ".join(report["removed"]) or (f"all but {report['width']} of the width" if report["width"] else "nothing")
    console.print(f"Removed: {what} ({100 * report['realised']:.1f} % of {report['measure']})", soft_wrap=True)
    saved = report["saved"]
    names = {"parameters": "parameters", "macs": "MACs of the body", "kv_elements": "KV cache"}
    console.print("Saved: " + ", ".join(f"{100 * saved[key]:.1f} % of the {name}" for key, name in names.items()))
    if "recovery" in result:
        console.print(f"Recovered on {result['recovery']['tokens']:,} tokens in {result['recovery']['seconds']:.0f} s")
    console.print(f"The model is in {out}. Next: informed-routing evaluate {out}", soft_wrap=True, markup=False)
