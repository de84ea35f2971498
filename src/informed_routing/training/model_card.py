"""The model card of a routing folder, from what was measured while fitting."""

from __future__ import annotations

from typing import Any

from ..config.folder import RoutingConfig
from .report import seconds_of


def model_card(config: RoutingConfig, fitted: dict[str, Any]) -> str:
    """Markdown with a Hub header: what this is, how to use it, what calibration measured."""
    base = config.base_model.name
    header = ["---", "library_name: informed-routing", f"tags: [informed-routing, {config.method}]"]
    if "/" in base and not base.startswith(("/", ".", "~")):
        header.append(f"base_model: {base}")
    rows = "\n".join(
        f"| {row.units:.3f} | {row.attention:.3f} | {row.ffn:.3f} | {row.macs:.3f} | {row.threshold:.3f} |"
        for row in config.thresholds
    )
    forecasters = f" and forecasters of rank {config.forecaster.rank}" if config.forecaster.is_fitted else ""
    if share := config.forecaster.share:
        forecasters += f" beside {share:.3g} of each FFN's own neurons"
    return "\n".join(
        [
            *header,
            "---",
            f"# Routing for {base}",
            "",
            f"Routers{forecasters} ({config.method}, {config.router.kind}, budget {config.budget}) for `{base}`. "
            "The base model's weights are not in this folder.",
            "",
            "```python",
            "import informed_routing as ir",
            "",
            'model = ir.RoutedModelForCausalLM.from_pretrained("this folder")',
            f"model.set_sparsity({config.sparsity})",
            "```",
            "",
            "Programs that import only transformers load it with `trust_remote_code=True`.",
            "",
            f"Calibrated on unseen text of {', '.join(fitted['recipe']['data'])} "
            f"in sequences of {config.calibration_context} tokens. Shares approximated; `macs` is the share of the "
            "body's multiply-accumulates saved, with routers and forecasts charged:",
            "",
            "| units | attention | ffn | macs | threshold |",
            "| --- | --- | --- | --- | --- |",
            rows,
            "",
            f"Fitted in {seconds_of(fitted['stages']):.0f} s; all settings and losses are in `fit.json`.",
            "",
        ]
    )
