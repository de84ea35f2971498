"""The whole pipeline: from a dense model to a routing folder. Each phase leaves a file, so a killed run goes on."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn

from .. import __version__
from ..assets import load_model
from ..config.folder import LatencyGains
from ..config.recipe import Recipe
from ..errors import InputError
from ..evaluation.environment import environment
from ..evaluation.latency import measure_latency
from ..evaluation.parts import text_records
from ..files.atomic import disk_error, write_json, write_several, write_text
from ..files.folders import CHECKPOINTS, check_apart_from, only_writer, put_folder
from ..persistence.folder import LORA_FOLDER, TENSOR_FILE, check_base, load_routing_tensors, locate, read_config, save
from ..persistence.load import with_lora
from ..persistence.model_card import model_card
from ..progress import NullProgress, Progress
from ..routed_model import RoutedModelForCausalLM
from ..routing.decision import AlwaysExecute, DecisionRule, Threshold, TopK
from ..routing.rules.top_k import capacity_for
from ..routing.target import BudgetMeter
from . import forecast as stage1
from .calibrate import attainable, calibrate, reachable, threshold_at
from .checkpoint import StageRecord, load_checkpoint, save_checkpoint
from .folder import (
    LAST,
    LATENCY_FILE,
    RECIPE_FILE,
    check_folder,
    clean_checkpoints,
    clear_checkpoints,
    is_ours,
    what_decides,
)
from .inputs import check_inputs, write_inputs
from .loop import run_stage
from .lora import LoraObjective, add_lora, lora_targets, merge_lora, save_lora
from .methods import route_objective
from .route import freeze_all_but, learning_rates, router_parameters
from .schedule import seed_of
from .texts import Texts
from .throughput import flops_per_token, throughput
from .warm_start import warm_start

MEASURE_TOKENS = 4096
"""Unseen text on which forecasters are judged."""


def fit(
    model: str | Recipe,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    keep_checkpoints: bool = False,
    device: str = "cpu",
    progress: Progress | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Fit forecasters and routers (and LoRA) to a model and write the routing folder `out`.

    `model` is a model reference, with settings such as `sparsity=0.25`, `budget="macs"`, `data=[...]` or dotted recipe
    keys in a mapping `overrides`, or a whole `Recipe`. Returns the content of `fit.json`. With `overwrite` an earlier
    result stays until the new one is whole. Raises InputError before any work for what cannot work (an existing folder,
    or another run that writes into it, among it), WorkError for what fails on the way.
    """
    recipe = model if isinstance(model, Recipe) else _recipe(model, settings)
    accelerator = Accelerator(cpu=device == "cpu")
    with only_writer(Path(out)) if accelerator.is_main_process else nullcontext():
        run = _Fit(recipe, Path(out), device, progress or NullProgress(), resume, overwrite, accelerator)
        return run.run(keep_checkpoints)


def _recipe(model: str, settings: dict[str, Any]) -> Recipe:
    overrides = dict(settings.pop("overrides", {}))
    route = {"sparsity", "budget", "balanced"}
    for key, value in settings.items():
        overrides[f"route.{key}" if key in route else key] = value
    unknown = [key for key in overrides if key.split(".")[0] not in Recipe.model_fields]
    if unknown:
        raise InputError(f"unknown setting {unknown[0]}", "See informed_routing.Recipe for the names")
    return Recipe(model=model).with_overrides(overrides)


def _with_settings_of(folder: Path, recipe: Recipe) -> Recipe:
    """The recipe with the settings of the routing folder that it starts from: all that an earlier stage decided."""
    if (folder / LORA_FOLDER).is_dir() and recipe.stages != ("calibrate",):
        raise InputError(f"{folder} has been through the lora stage", "Start from a folder without an adapter")
    config = read_config(folder)
    # The closed form would solve the forecasters anew: what they learned since would be lost.
    forecaster = config.forecaster.model_copy(update={"refit": False})
    update: dict[str, Any] = {"forecaster": forecaster, "router": config.router, "kv": config.kv}
    update["selection"] = config.selection
    if not {"route", "joint"} & set(recipe.stages):
        # The dial keeps its currency and its setting; `lora.sparsity` says where else to tune.
        goal = {"budget": config.budget, "sparsity": config.sparsity or recipe.route.sparsity}
        update["route"] = recipe.route.model_copy(update=goal)
    return recipe.model_copy(update=update)


class _Fit:
    """One run: what its phases share."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        device: str,
        progress: Progress,
        resume: bool,
        overwrite: bool,
        accelerator: Accelerator,
    ) -> None:
        check_apart_from(out, recipe.model)
        beginning = locate(recipe.start) if recipe.start else None
        if beginning:
            if out.resolve() == beginning.resolve():
                raise InputError(f"{out} is what the fit starts from", "Give another folder for --out")
            recipe = _with_settings_of(beginning, recipe)
        self.recipe, self.out, self.device, self.progress = recipe, out, device, progress
        self.report: dict[str, Any] = {}
        self.accelerator = accelerator
        self.checkpoints = out / CHECKPOINTS
        self.resumed: Recipe | None = None
        if self.accelerator.is_main_process:
            self.resumed = check_folder(out, recipe, resume=resume, overwrite=overwrite)
        self.accelerator.wait_for_everyone()
        self.base, self.tokenizer = load_model(
            recipe.model, dtype=recipe.dtype, device=device, revision=recipe.revision
        )
        if self.base.dtype != torch.float32 and device != "cpu":
            self.accelerator = Accelerator(mixed_precision="bf16" if self.base.dtype == torch.bfloat16 else "fp16")
        self.adapter = beginning / LORA_FOLDER if beginning and (beginning / LORA_FOLDER).is_dir() else None
        torch.manual_seed(seed_of(recipe.seed, "initial weights"))
        self.model = RoutedModelForCausalLM.attach(
            self.base,
            recipe.forecaster,
            recipe.router,
            selection=recipe.selection,
            kv=recipe.kv,
            name=recipe.model,
            revision=recipe.revision,
        )
        if beginning:
            check_base(beginning, self.model)
            load_routing_tensors(self.model, beginning / TENSOR_FILE)
        if self.adapter:
            with_lora(self.model, self.adapter, merge=True)
        self.text = Texts(recipe.data, self.tokenizer, recipe.seed)
        # All that can be found wrong is found before anything is written: a refused fit leaves no folder behind.
        self.check_texts()
        self.check_targets()
        if self.accelerator.is_main_process:
            self.begin()
        self.accelerator.wait_for_everyone()

    def check_texts(self) -> None:
        """Read the text of every stage that will run. Raises InputError where it is less than one row."""
        recipe = self.recipe
        wanted = [("calibration", recipe.calibration.sequence_length)]
        if "forecast" in recipe.stages and recipe.forecaster.fallback == "forecaster":
            wanted += [("train", recipe.forecast.sequence_length), ("calibration", recipe.forecast.sequence_length)]
        if {"forecast", "route", "joint"} & set(recipe.stages):
            wanted.append(("train", recipe.route.sequence_length))
        if "lora" in recipe.stages:
            wanted.append(("train", recipe.lora.sequence_length))
        for split, length in wanted:
            self.text.rows(split, length)

    def check_targets(self) -> None:
        """Set the meter; raises InputError for shares that cannot be reached and layers that cannot take LoRA."""
        recipe, kinds = self.recipe, [u.kind for u in self.model.units]
        gains = self.latency_gains() if recipe.route.budget == "latency" else None
        length = recipe.route.sequence_length
        self.meter = BudgetMeter(self.model.costs, kinds, recipe.route.budget, (length + 1) / 2, gains, recipe.kv)
        ceiling = attainable(self.model, self.meter, length)
        wanted = {"sparsity": recipe.route.sparsity}
        if "lora" in recipe.stages and recipe.lora.sparsity is not None:
            wanted["lora.sparsity"] = recipe.lora.sparsity
        for name, value in wanted.items():
            if value >= ceiling:
                raise InputError(
                    f"{name} {value} cannot be reached: approximating everything saves "
                    f"{ceiling:.2f} ({recipe.route.budget})",
                    "Choose a lower sparsity, a cheaper router, or the units budget",
                )
        length = recipe.calibration.sequence_length
        meter = BudgetMeter(self.model.costs, kinds, recipe.route.budget, (length + 1) / 2, gains, recipe.kv)
        targets = recipe.calibration.targets
        kept = reachable(targets, self.model, meter, length)
        out_of_reach = [target for target in targets if target not in kept]
        if out_of_reach:
            shown = ", ".join(f"{target:g}" for target in out_of_reach)
            self.progress.message(f"calibration targets beyond what the routers can reach are left out: {shown}")
        if {"lora", "joint"} & set(recipe.stages):
            lora_targets(self.model, recipe.lora)

    def begin(self) -> None:
        """Write what a resumed fit has to know. Nothing of an earlier result goes."""
        if self.resumed is None:
            clear_checkpoints(self.out)
        else:
            clean_checkpoints(self.out)
            check_inputs(self.checkpoints, self.model, self.text, self.recipe)
        write_text(self.checkpoints / RECIPE_FILE, self.recipe.model_dump_json(indent=2) + "\n")
        if self.model.routing_config.latency:
            table = self.model.routing_config.latency.model_dump_json(indent=2)
            write_text(self.checkpoints / LATENCY_FILE, table + "\n")
        write_inputs(self.checkpoints, self.model, self.text, self.recipe)

    def latency_gains(self) -> LatencyGains:
        """The measured table of a latency budget: this machine's, or that of the run which is being resumed."""
        found: list[Any] = [None]
        if self.accelerator.is_main_process:
            found = [self.stored_gains()]
            if found[0] is None:
                length = self.recipe.route.sequence_length
                ids = self.text.rows("calibration", length)[:1].to(self.model.device)
                found = [measure_latency(self.model, ids, progress=self.progress)]
        gains: LatencyGains = broadcast_object_list(found)[0]
        self.model.routing_config = self.model.routing_config.model_copy(update={"latency": gains})
        return gains

    def stored_gains(self) -> LatencyGains | None:
        """The table that the resumed run measured, unless routing has another recipe now."""
        path, before = self.checkpoints / LATENCY_FILE, self.resumed
        stage = "joint" if "joint" in self.recipe.stages else "route"
        if before is None or not path.is_file() or what_decides(before, stage) != what_decides(self.recipe, stage):
            return None
        try:
            return LatencyGains.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise InputError(f"{path} is damaged", "Use --overwrite to fit anew") from None

    # -- phases -------------------------------------------------------------------------------------------

    def phase(self, name: str, tensors: dict[str, nn.Parameter], work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Do `work` unless an earlier run has: its result is the tensors and what it reports."""
        path = self.checkpoints / f"{name}.safetensors"
        record = load_checkpoint(path, tensors)
        self.accelerator.wait_for_everyone()  # nobody writes before all have looked
        if record is None:
            started = time.perf_counter()
            extra = work()
            record = StageRecord(seconds=time.perf_counter() - started, finished=True, extra=extra)
            if self.accelerator.is_main_process:
                save_checkpoint(path, record, dict(tensors))
            self.accelerator.wait_for_everyone()
        return {**record.extra, "seconds": round(record.seconds, 2)}

    def run(self, keep_checkpoints: bool) -> dict[str, Any]:
        recipe = self.recipe
        try:
            wanted = recipe.activation_checkpointing
            if self.model.device.type != "cpu" if wanted is None else wanted:
                enable_checkpointing(self.model)
            if "forecast" in recipe.stages and recipe.forecaster.fallback == "forecaster":
                self.report["forecast"] = self.forecast()
            if "route" in recipe.stages:
                self.report["route"] = self.route()
            if "joint" in recipe.stages:
                self.report["joint"] = self.joint()
            if "lora" in recipe.stages:
                self.report["lora"] = self.lora()
            self.report["calibrate"] = self.calibration()
            return self.finish(keep_checkpoints)
        except OSError as error:
            raise disk_error(self.out, error) from error
        finally:
            self.progress.done()

    def forecast(self) -> dict[str, Any]:
        """Stage 1 and its judgement on unseen text."""
        config, tensors = self.recipe.forecaster, stage1.forecaster_parameters(self.model)
        report: dict[str, Any] = {"fit": config.fit, "rank": config.rank}
        length = self.recipe.forecast.sequence_length
        rows = self.text.some("train", length, config.tokens, "forecast")
        if config.fit == "closed-form" or config.start == "closed-form":

            def work() -> dict[str, Any]:
                self.progress.stage("forecast", len(rows))
                seconds = stage1.fit_closed_form(
                    self.model, rows, config, accelerator=self.accelerator, progress=self.progress
                )
                return {"pass_seconds": seconds[0], "solve_seconds": seconds[1], "tokens": rows.numel()}

            report["closed_form"] = self.phase("forecast", tensors, work)
        if config.fit == "gradient":
            report["gradient"] = self.fit_by_gradient(tensors)

        def judge() -> dict[str, Any]:
            unseen = self.text.rows("calibration", length)[: max(MEASURE_TOKENS // length, 1)]
            self.progress.stage("judge forecasters", len(unseen))
            return stage1.measure(self.model, unseen, self.progress).as_dict([u.kind for u in self.model.units])

        report["quality"] = self.phase("forecast-quality", {}, judge)
        return report

    def fit_by_gradient(self, tensors: dict[str, nn.Parameter]) -> dict[str, Any]:
        """The paper's stage 1: AdamW on every unit's own loss at once."""
        config, stage = self.recipe.forecaster, self.recipe.forecast
        freeze_all_but(self.model, tensors)
        rows = self.text.some("train", stage.sequence_length, 10**12, "forecast-gradient")
        objective = stage1.ForecastObjective(self.model, config)
        if config.target == "normalised":
            objective.scales = stage1.output_scales(self.model, rows.to(self.model.device))
        record = self.stage("forecast-gradient", objective, tensors, rows, stage)
        return self.summary(record, stage.sequence_length, "forecast")

    def route(self) -> dict[str, Any]:
        """Stage 2: closed-form start, training, optional refit of the forecasters."""
        config = self.recipe.route
        tensors = router_parameters(self.model, config.train_forecasters)
        freeze_all_but(self.model, tensors)
        report = self.begin_routing()
        if config.steps:
            objective = route_objective(self.model, config, self.meter)
            rates, rows = learning_rates(config, tensors), self.text.rows("train", config.sequence_length)
            report["train"] = self.routing_summary(self.stage("route", objective, tensors, rows, config, rates))
        if self.refits and not config.train_forecasters:
            report["refit"] = self.phase("refit", stage1.forecaster_parameters(self.model), self.refit)
        return report

    def begin_routing(self) -> dict[str, Any]:
        """What is known of the stage before its training, with the closed-form start if there is to be one."""
        recipe = self.recipe
        report: dict[str, Any] = {"sparsity": recipe.route.sparsity, "budget": recipe.route.budget}
        if recipe.router.warm_start and not recipe.start:
            report["warm_start"] = self.phase("warm-start", dict(self.model.routing_parameters()), self.start_routers)
        return report

    def joint(self) -> dict[str, Any]:
        """Routers and LoRA at once, as MoD and D-LLM train: steps and text of stage 2, each part with its own rate."""
        config, lora = self.recipe.route, self.recipe.lora
        report = self.begin_routing()
        routers = router_parameters(self.model, config.train_forecasters)
        torch.manual_seed(seed_of(self.recipe.seed, "lora"))
        adapters = add_lora(self.model, lora)
        freeze_all_but(self.model, routers | adapters)
        rates = learning_rates(config, routers) | dict.fromkeys(adapters, lora.learning_rate)
        objective = route_objective(self.model, config, self.meter)
        rows = self.text.rows("train", config.sequence_length)
        record = self.stage("joint", objective, routers | adapters, rows, config, rates)
        adapter_weights = sum(tensor.numel() for tensor in adapters.values())
        return {**report, "rank": lora.rank, "train": self.routing_summary(record, adapter_weights)}

    @property
    def refits(self) -> bool:
        config = self.recipe.forecaster
        return config.refit and config.fit == "closed-form" and config.fallback == "forecaster"

    def start_routers(self) -> dict[str, Any]:
        """The closed-form start: a sweep over the dense model, then some over the routed one."""
        recipe, router = self.recipe, self.recipe.router
        length = recipe.route.sequence_length
        first, further = (max(tokens // length, 1) for tokens in (router.warm_start_tokens, router.sweep_tokens))
        rows = self.text.some("train", length, (first + further * router.sweeps) * length, "warm start")
        self.progress.stage("start routers", len(rows))
        found = warm_start(
            self.model,
            [part for part in (rows[:first], *rows[first:].split(further)) if len(part)],
            self.meter,
            recipe.route.sparsity,
            batch_size=recipe.route.batch_size,
            refit_ridge=recipe.forecaster.ridge if self.refits else None,
            progress=self.progress,
        )
        return {**found, "tokens": rows.numel()}

    def refit(self) -> dict[str, Any]:
        """Solve the forecasters again on the tokens, and at the inputs, that routing gives them."""
        recipe = self.recipe
        length = recipe.forecast.sequence_length
        rows = self.text.some("train", length, recipe.forecaster.tokens, "refit")
        self.progress.stage("refit", len(rows))
        some = rows[: max(len(rows) // 8, 2)]
        threshold = threshold_at(self.model, some, recipe.route.sparsity, recipe.route.budget)
        stage1.fit_closed_form(
            self.model,
            rows,
            recipe.forecaster,
            accelerator=self.accelerator,
            progress=self.progress,
            decision=Threshold(threshold),
        )
        return {"tokens": rows.numel(), "threshold": threshold}

    def lora(self) -> dict[str, Any]:
        """Stage 3 at the threshold of its sparsity."""
        config = self.recipe.lora
        rows = self.text.rows("train", config.sequence_length)
        sparsity = self.recipe.route.sparsity if config.sparsity is None else config.sparsity

        def find() -> dict[str, Any]:
            text = self.text.some("calibration", self.recipe.calibration.sequence_length, 16_384, "lora")
            return {"threshold": threshold_at(self.model, text, sparsity, self.recipe.route.budget)}

        rule: DecisionRule = AlwaysExecute()
        if sparsity and self.recipe.selection.decision == "top-k":
            rule = TopK(capacity_for(self.model.units, sparsity))
        elif sparsity:
            rule = Threshold(self.phase("lora-threshold", {}, find)["threshold"])
        torch.manual_seed(seed_of(self.recipe.seed, "lora"))
        tensors = add_lora(self.model, config)
        freeze_all_but(self.model, tensors)
        objective = LoraObjective(self.model, config, rule)
        record = self.stage("lora", objective, tensors, rows, config)
        adapters = sum(tensor.numel() for tensor in tensors.values())
        summary = self.summary(
            record,
            config.sequence_length,
            "lora",
            objective=config.objective,
            sparsity=sparsity,
            adapter_weights=adapters,
        )
        return {"rank": config.rank, "sparsity": sparsity, **summary}

    def stage(
        self,
        name: str,
        objective: nn.Module,
        tensors: dict[str, nn.Parameter],
        rows: Tensor,
        config: Any,
        rates: Mapping[str, float] | None = None,
    ) -> StageRecord:
        return run_stage(
            name,
            objective,
            tensors,
            rows,
            config,
            seed=self.recipe.seed,
            accelerator=self.accelerator,
            checkpoint=self.checkpoints / f"{name}.safetensors",
            progress=self.progress,
            offenders=lambda batch: stage1.offenders(self.model, batch),
            rates=rates,
        )

    def routing_summary(self, record: StageRecord, adapter_weights: int = 0) -> dict[str, Any]:
        """Of a stage that trained routers; a top-k skips while it trains, sampled decisions do not."""
        config = self.recipe.route
        return self.summary(
            record,
            config.sequence_length,
            "route",
            objective=config.objective,
            train_forecasters=config.train_forecasters,
            sparsity=config.sparsity if self.recipe.selection.decision == "top-k" else 0.0,
            adapter_weights=adapter_weights,
        )

    def summary(self, record: StageRecord, length: int, stage: Any, **of_stage: Any) -> dict[str, Any]:
        """What fit.json keeps of a trained stage."""
        head = self.model.get_output_embeddings().weight.numel()
        flops = flops_per_token(self.model.costs, head, (length + 1) / 2, stage, **of_stage)
        device, dtype = self.model.device, self.base.dtype
        found = {
            "steps": record.step,
            "tokens": record.tokens,
            "seconds": round(record.seconds, 2),
            "history": record.history,
        }
        processes = self.accelerator.num_processes
        return {**found, **throughput(record.step, record.tokens, record.seconds, flops, device, dtype, processes)}

    def calibration(self) -> dict[str, Any]:
        """The threshold table, on its own split; after LoRA, since that moves the margins."""
        config = self.recipe.calibration
        rows = self.text.some("calibration", config.sequence_length, config.tokens, "calibrate")

        def work() -> dict[str, Any]:
            table = calibrate(self.model, rows, config, self.recipe.route.budget, self.progress)
            return {"tokens": rows.numel(), "thresholds": [row.model_dump() for row in table]}

        found = self.phase("calibrate", {}, work)
        from ..config.folder import ThresholdRow

        table = tuple(ThresholdRow(**row) for row in found["thresholds"])
        highest = max(getattr(row, self.recipe.route.budget) for row in table)
        self.model.with_thresholds(
            table, self.recipe.route.budget, min(self.recipe.route.sparsity, highest), config.sequence_length
        )
        return found

    def finish(self, keep_checkpoints: bool) -> dict[str, Any]:
        """Write the folder: it is what it was until all of it is there."""
        result = {
            "recipe": self.recipe.model_dump(mode="json"),
            "stages": self.report,
            "texts": text_records(self.recipe.data, locate(self.recipe.start) if self.recipe.start else None),
            "informed_routing": __version__,
            "environment": environment(),
            "dtype": str(self.base.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "processes": self.accelerator.num_processes,
        }

        def write(folder: Path) -> None:
            if {"lora", "joint"} & set(self.recipe.stages):
                name = self.model.routing_config.base_model.name
                save_lora(self.model, self.recipe.lora, folder / LORA_FOLDER, name)
                merge_lora(self.model)
            elif self.adapter:
                shutil.copytree(self.adapter, folder / LORA_FOLDER)
            write_several(folder, self.tokenizer.save_pretrained)
            write_json(folder / "fit.json", result)
            write_text(folder / "README.md", model_card(self.model.routing_config, result))
            save(self.model, folder)

        def ours(name: str) -> bool:
            return is_ours(name) and not (keep_checkpoints and name == CHECKPOINTS)

        if self.accelerator.is_main_process:
            put_folder(self.out, write, ours=ours, last=LAST)
        self.accelerator.wait_for_everyone()
        return result


def enable_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass; the method has two names across transformers versions."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})
