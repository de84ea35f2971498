"""Routing folders with something wrong in them are refused by name, and a base model given live stays as it was."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.persistence.conftest import LORA, logits, make_adapter
from tests.tiny import make_tiny

from informed_routing.config.parts import RouterConfig
from informed_routing.errors import InputError
from informed_routing.routed_model import RoutedModelForCausalLM

load: Any = RoutedModelForCausalLM.from_pretrained


def _refused(folder: Path, match: str, **options: Any) -> None:
    """Refused, and the live base model has the same class, modules and logits as before."""
    base = make_tiny("llama")
    before, kind = logits(base), type(base)
    names = [(name, type(module)) for name, module in base.named_modules()]
    trained = [parameter.requires_grad for parameter in base.parameters()]
    with pytest.raises(InputError, match=match) as raised:
        load(folder, base=base, **options)
    assert "\n" not in str(raised.value)
    assert type(base) is kind
    assert [(name, type(module)) for name, module in base.named_modules()] == names
    assert [parameter.requires_grad for parameter in base.parameters()] == trained
    assert not hasattr(base, "routing_config")
    assert torch.equal(logits(base), before)


def _edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


FIRST = "layers.0.attention.router.inner.weight"
TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "nan": (lambda t: t[FIRST].view(-1)[3:4].fill_(float("nan")), "NaN or infinite"),
    "infinite": (lambda t: t[FIRST].view(-1)[3:4].fill_(float("inf")), "NaN or infinite"),
    "integer": (lambda t: t.update({FIRST: t[FIRST].int()}), "is int32"),
    "bool": (lambda t: t.update({FIRST: t[FIRST].bool()}), "is bool"),
    "complex": (lambda t: t.update({FIRST: t[FIRST].to(torch.complex64)}), "is complex64"),
    "double": (lambda t: t.update({FIRST: t[FIRST].double()}), "is float64"),
    "missing": (lambda t: t.pop(FIRST), FIRST),
    "foreign": (lambda t: t.update(other=torch.ones(1)), "other"),
    "shape": (lambda t: t.update({FIRST: t[FIRST][:-1].clone()}), FIRST),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_routing_tensors(folder: Path, kind: str) -> None:
    path = folder / "routing.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change, message = TENSORS[kind]
    change(tensors)
    save_file(tensors, path)
    _refused(folder, message)


def test_routing_tensors_that_float16_cannot_hold(folder: Path) -> None:
    path = folder / "routing.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors[FIRST][0, 0] = 1e6
    save_file(tensors, path)
    load(folder, base=make_tiny("llama"))
    with pytest.raises(InputError, match="too large for float16"):
        load(folder, base=make_tiny("llama").half())


def _row(threshold: float, units: float) -> dict[str, float]:
    return {"threshold": threshold, "units": units, "attention": units, "ffn": units, "macs": units}


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "nan threshold": (lambda c: c.update(thresholds=[_row(float("nan"), 0.1)]), "threshold is nan"),
    "infinite threshold": (lambda c: c.update(thresholds=[_row(float("-inf"), 0.1)]), "threshold is -inf"),
    "nan share": (lambda c: c.update(thresholds=[_row(0.0, float("nan"))]), "units is nan"),
    "no share": (lambda c: c.update(thresholds=[_row(0.0, 1.5)]), "no share"),
    "disorder": (lambda c: c.update(thresholds=[_row(0.0, 0.4), _row(1.0, 0.2)]), "approximates less"),
    "sparsity": (lambda c: c.update(sparsity=1.5), "sparsity 1.5"),
    "nan sparsity": (lambda c: c.update(sparsity=float("nan")), "sparsity"),
    "layers": (lambda c: c.update(num_layers=5), "3 layers, not 5"),
    "hidden size": (lambda c: c.update(hidden_size=32), "hidden size is 64, not 32"),
    "rank": (lambda c: c["forecaster"].update(rank=9), "does not fit"),
    "large rank": (lambda c: c["forecaster"].update(rank=999), "rank 999"),
    "width": (lambda c: c["router"].update(width=999), "width 999"),
    "family": (lambda c: c["base_model"].update(model_type="mistral"), "family llama, not mistral"),
    "fingerprint": (lambda c: c["base_model"].update(fingerprint="0" * 64), "wrong base model"),
    "digest": (lambda c: c["base_model"]["weights"]["digests"].update(float32="0"), "wrong base model"),
    "newer": (lambda c: c.update(format_version=99), "Upgrade"),
    "unknown": (lambda c: c.update(other=1), "unknown setting other"),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_routing_config(folder: Path, kind: str) -> None:
    change, message = CONFIGS[kind]
    _edit(folder / "routing_config.json", change)
    _refused(folder, message)


@pytest.mark.parametrize(
    "name", ["routing_config.json", "routing.safetensors", "generation_config.json", "config.json"]
)
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000])
def test_damaged_files(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    _refused(folder, name.replace(".", r"\."))


def test_a_failure_at_the_very_end_leaves_the_base_as_it_was(tuned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapter has been merged and the layers are routed by then."""

    def fail(self: Any, *_: Any, **__: Any) -> None:
        raise InputError("no engine here")

    monkeypatch.setattr(RoutedModelForCausalLM, "set_execution", fail)
    _refused(tuned, "no engine here")


def test_attach_leaves_the_base_as_it_was() -> None:
    base = make_tiny("llama")
    before = logits(base)
    with pytest.raises(InputError, match="width 999"):
        RoutedModelForCausalLM.attach(base, router=RouterConfig(kind="mlp", width=999))
    assert type(base) is type(make_tiny("llama"))
    assert torch.equal(logits(base), before)


def test_a_second_routing_on_the_same_base_is_refused(folder: Path) -> None:
    base = make_tiny("llama")
    model = load(folder, base=base)
    wanted = logits(model)
    with pytest.raises(InputError, match="routed already"):
        load(folder, base=base)
    with pytest.raises(InputError, match="routed already"):
        RoutedModelForCausalLM.attach(base)
    assert torch.equal(logits(model), wanted)


# -- adapters -----------------------------------------------------------------------------------------------


def test_pickled_adapters_are_never_read(tuned: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return pytest.fail, ("the pickle was read",)

    torch.save({"x": Trap()}, tuned / "lora" / "adapter_model.bin")
    load(tuned, base=make_tiny("llama"))  # beside safetensors it is not looked at
    (tuned / "lora" / "adapter_model.safetensors").unlink()
    _refused(tuned, "adapter_model.bin is a pickle")
    _refused(tuned, "Convert it")


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
ADAPTERS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "foreign": (lambda t: t.update(nonsense=torch.ones(1)), "holds nonsense"),
    "renamed": (lambda t: t.update({Q.replace("layers.0", "layers.9"): t.pop(Q)}), r"layers\.9"),
    "missing": (lambda t: t.pop(Q), "lacks"),
    "shape": (lambda t: t.update({Q: t[Q][:, :-1].clone()}), "shape"),
    "rank": (lambda t: t.update({Q: t[Q][:-1].clone()}), "shape"),
    "nan": (lambda t: t[Q].view(-1)[3:4].fill_(float("nan")), "NaN or infinite"),
    "integer": (lambda t: t.update({Q: t[Q].int()}), "int32"),
    "empty": (lambda t: t.clear(), "no tensors"),
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_adapter_tensors(tuned: Path, kind: str) -> None:
    path = tuned / "lora" / "adapter_model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change, message = ADAPTERS[kind]
    change(tensors)
    save_file(tensors, path)
    _refused(tuned, message)
    _refused(tuned, message, merge_lora=False)


def _set(key: str, value: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda settings: settings.update({key: value})


SETTINGS = [
    *((_set("lora_alpha", value), "lora_alpha") for value in (float("nan"), float("inf"), "16", True, [16])),
    *((_set("r", value), r"\br\b") for value in (0, -4, 4.5, "4", None, True, float("nan"), 10**30)),
    *((_set("peft_type", value), "peft_type") for value in ("IA3", 3, None, "lora", ["LORA"])),
    *((_set("target_modules", value), "target_modules") for value in (None, [], 5, [5], "")),
    (_set("target_modules", ["nope"]), "cannot be used"),
    (_set("r", 8), "shape"),
    (_set("lora_dropout", 2.0), "lora_dropout"),
    (_set("bias", "some"), "bias"),
    (_set("use_dora", "yes"), "use_dora"),
    (_set("use_dora", True), "lacks"),
    (_set("rank_pattern", {"q_proj": "x"}), "rank_pattern"),
    (_set("alpha_pattern", {"q_proj": float("nan")}), "alpha_pattern"),
    (_set("layers_to_transform", "all"), "layers_to_transform"),
    (_set("init_lora_weights", "pissa"), "init_lora_weights"),
    (_set("layer_replication", [[0, 2], [1, 3]]), "layer_replication"),
    (_set("of_the_future", {"scale": 2}), "of_the_future"),
    (_set("task_type", "SEQ_CLS"), "task_type"),
]


@pytest.mark.parametrize("case", range(len(SETTINGS)))
def test_adapter_settings(tuned: Path, case: int) -> None:
    change, message = SETTINGS[case]
    _edit(tuned / "lora" / "adapter_config.json", change)
    _refused(tuned, message)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"[]", b"{}", b"null", b"{", b"\xff\xfe", b"[" * 100_000])
def test_damaged_adapter_files(tuned: Path, name: str, content: bytes | None) -> None:
    path = tuned / "lora" / name
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    _refused(tuned, name.replace(".", r"\."))


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"v_proj": 5}},
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.1\.mlp\..*_proj"},
        {"layers_to_transform": [1]},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"init_lora_weights": "gaussian"},
        {"lora_dropout": 0.1},
    ],
    ids=str,
)
def test_adapters_of_all_kinds_are_merged_as_peft_does(folder: Path, settings: dict[str, Any]) -> None:
    from peft import PeftModel

    make_adapter(folder / "lora", **settings)
    merged = PeftModel.from_pretrained(make_tiny("llama"), str(folder / "lora")).merge_and_unload()
    model: Any = load(folder, base=make_tiny("llama"))
    model.set_sparsity(0)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, merged.eval()(ids).logits)
        live: Any = load(folder, base=make_tiny("llama"), merge_lora=False)
        live.set_sparsity(0)
        assert torch.allclose(live(ids).logits, merged(ids).logits, atol=1e-3)
    assert LORA["r"] == 4
