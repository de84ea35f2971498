"""What is saved is what is loaded again, or saving is refused with the remedy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model, inject_adapter_in_model
from tests.persistence.conftest import LORA, logits, make_adapter
from tests.routed import make_routed
from tests.tiny import make_tiny

from informed_routing.errors import InputError, WorkError
from informed_routing.persistence.saving import dense_model
from informed_routing.routed_model import RoutedModelForCausalLM

load: Any = RoutedModelForCausalLM.from_pretrained


def _scale(model: Any, name: str = "model.layers.1.mlp.down_proj.weight") -> None:
    model.get_parameter(name).data.mul_(1.001)


def _state_dict(model: Any) -> None:
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["model.layers.0.self_attn.q_proj.weight"][3, 5] += 1e-3
    model.load_state_dict(state)


def _under_no_grad(model: Any) -> None:
    with torch.no_grad():
        model.model.norm.weight.add_(0.01)


def _trained(model: Any) -> None:
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    model(input_ids=torch.arange(3, 11)[None], labels=torch.arange(3, 11)[None]).loss.backward()
    optimizer.step()


def _resized(model: Any) -> None:
    model.resize_token_embeddings(140)


def _untied(model: Any) -> None:
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.detach() * 1.5)


def _merged(model: Any) -> None:
    get_peft_model(model, LoraConfig(**LORA)).merge_and_unload()


def _other_eps(model: Any) -> None:
    model.config.rms_norm_eps = 0.5


CHANGES = [_scale, _state_dict, _under_no_grad, _trained, _resized, _untied, _merged, _other_eps]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_changed_base_weights_are_refused(change: Callable[[Any], None], tmp_path: Path) -> None:
    model: Any = make_routed("llama")
    change(model)
    with pytest.raises(InputError, match="save_base"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "tied"), [*((change, False) for change in CHANGES[:-1]), (_untied, True), (_resized, True)]
)
def test_a_changed_base_can_be_saved_too(change: Callable[[Any], None], tied: bool, tmp_path: Path) -> None:
    model: Any = make_routed("llama", tie_word_embeddings=tied)
    change(model)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "out", save_base=tmp_path / "base")
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype="float32")
    assert torch.equal(logits(load(tmp_path / "out", base=base)), wanted)
    model.save_pretrained(tmp_path / "again")  # the routing now refers to the new base
    assert json.loads((tmp_path / "again" / "routing_config.json").read_text())["base_model"]["name"] == str(
        tmp_path / "base"
    )
    with pytest.raises(InputError, match="exists already"):
        model.save_pretrained(tmp_path / "more", save_base=tmp_path / "base")


def test_the_saved_base_gets_the_former_tokenizer(on_disk: Callable[..., Path], tmp_path: Path) -> None:
    model = load(on_disk())
    _scale(model)
    model.save_pretrained(tmp_path / "new", save_base=tmp_path / "new base")
    assert torch.equal(logits(load(tmp_path / "new")), logits(model))


def test_only_routers_changed(tmp_path: Path) -> None:
    model: Any = make_routed("llama")
    for _, parameter in model.routing_parameters():
        parameter.data.mul_(1.3)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path, base=make_tiny("llama"))), logits(model))


def test_routers_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    model: Any = make_routed("llama")
    model.units[2].router.outer.bias.data[0] = float("nan")
    with pytest.raises(WorkError, match=r"layers\.1\.attention\.router\.outer\.bias"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_dense_model_under_a_routed_one() -> None:
    model: Any = make_routed("gemma2")
    dense = dense_model(model)
    assert type(dense) is type(make_tiny("gemma2"))
    assert set(dense.state_dict()) == set(make_tiny("gemma2").state_dict())


@pytest.mark.parametrize("merge", [True, False])
def test_a_loaded_adapter_is_written_again(tuned: Path, tmp_path: Path, merge: bool) -> None:
    model = load(tuned, base=make_tiny("llama"), merge_lora=merge)
    wanted = logits(model)
    model.save_pretrained(tmp_path / "copy")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "copy" / "lora" / name).read_bytes() == (tuned / "lora" / name).read_bytes()
    again = load(tmp_path / "copy", base=make_tiny("llama"), merge_lora=merge)
    assert torch.equal(logits(again), wanted)
    model.save_pretrained(tuned)  # over itself
    assert torch.equal(logits(load(tuned, base=make_tiny("llama"), merge_lora=merge)), wanted)


def test_a_changed_merged_model_is_refused(tuned: Path, tmp_path: Path) -> None:
    model = load(tuned, base=make_tiny("llama"))
    _scale(model)
    with pytest.raises(InputError, match="no longer those of"):
        model.save_pretrained(tmp_path / "copy")


@pytest.mark.parametrize("change", ["weights", "scaling", "off", "merged"])
def test_a_changed_live_adapter_is_refused(tuned: Path, tmp_path: Path, change: str) -> None:
    model = load(tuned, base=make_tiny("llama"), merge_lora=False)
    for module in model.modules():
        if hasattr(module, "lora_A"):
            if change == "weights":
                module.lora_A["default"].weight.data.mul_(1.01)
            elif change == "scaling":
                module.scaling["default"] *= 2
            elif change == "off":
                module.enable_adapters(False)
            else:
                module.merge()
    with pytest.raises(InputError, match="live adapter 'default'"):
        model.save_pretrained(tmp_path / "copy")


def test_live_adapters_are_refused_by_name(tmp_path: Path) -> None:
    wrapped: Any = make_routed("llama")
    get_peft_model(wrapped, LoraConfig(**LORA), adapter_name="mine")
    added: Any = make_routed("llama")
    inject_adapter_in_model(LoraConfig(**LORA), added, adapter_name="mine")  # as add_adapter does
    for model in (wrapped, added):
        for options in ({}, {"save_base": tmp_path / "base"}):
            with pytest.raises(InputError, match="live adapter 'mine'"):
                model.save_pretrained(tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_an_adapter_in_the_way_is_not_taken_over(tmp_path: Path) -> None:
    """A plain routing saved into a folder with a `lora/` would be loaded with it."""
    make_adapter(tmp_path / "out" / "lora")
    with pytest.raises(InputError, match="holds an adapter"):
        make_routed("llama").save_pretrained(tmp_path / "out")


def test_folders_of_others_are_left_alone(tmp_path: Path, tuned: Path) -> None:
    base = tmp_path / "base"
    make_tiny("llama").save_pretrained(base)
    before = (base / "config.json").read_bytes()
    with pytest.raises(InputError, match="holds another model"):
        make_routed("llama").save_pretrained(base)
    assert (base / "config.json").read_bytes() == before
    with pytest.raises(InputError, match=r"adapter_config\.json"):
        make_routed("llama").save_pretrained(tuned / "lora")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        make_routed("llama").save_pretrained(tmp_path / "file")
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    with pytest.raises(InputError, match="unfinished fit"):
        make_routed("llama").save_pretrained(tmp_path / "begun")


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"safe_serialization": False}, InputError, "safe_serialization"),
        ({"variant": "fp16"}, InputError, "variant"),
        ({"max_shard_size": "1KB"}, InputError, "max_shard_size"),
        ({"max_shard_size": "lots"}, InputError, "max_shard_size"),
        ({"state_dict": {"nonsense": torch.ones(1)}}, InputError, "nonsense"),
        ({"state_dict": {}}, InputError, "state_dict lacks"),
        ({"distributed_checkpoint": True}, InputError, "distributed_checkpoint"),
        ({"private": True}, InputError, "private"),
        ({"safe_serialisation": True}, TypeError, "safe_serialisation"),
        ({"save_function": torch.save}, TypeError, "save_function"),
    ],
)
def test_options_of_saving(tmp_path: Path, options: dict[str, Any], error: type[Exception], name: str) -> None:
    with pytest.raises(error, match=name):
        make_routed("llama").save_pretrained(tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_options_that_ask_for_nothing_special(tmp_path: Path) -> None:
    model: Any = make_routed("llama")
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "out", True, None, False, "5GB", None, None, safe_serialization=True)
    assert torch.equal(logits(load(tmp_path / "out", base=make_tiny("llama"))), logits(model))


@pytest.mark.parametrize("tied", [False, True])
def test_a_state_dict_is_what_is_saved(tmp_path: Path, tied: bool) -> None:
    model: Any = make_routed("llama", tie_word_embeddings=tied)
    other = make_routed("llama", seed=0, tie_word_embeddings=tied)
    for _, parameter in other.routing_parameters():
        parameter.data.mul_(1.5)
    state = other.state_dict()
    model.save_pretrained(tmp_path / "out", state_dict=state)
    found = load(tmp_path / "out", base=make_tiny("llama", tie_word_embeddings=tied))
    assert torch.equal(logits(found), logits(other))
    state["model.norm.weight"] = state["model.norm.weight"] * 2
    with pytest.raises(InputError, match="save_base"):
        model.save_pretrained(tmp_path / "other", state_dict=state)


def test_a_model_cast_after_loading_is_still_its_base(folder: Path, tmp_path: Path) -> None:
    model = load(folder, base=make_tiny("llama")).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    again = load(tmp_path / "half", base=make_tiny("llama").to(torch.bfloat16))
    for (_, a), (_, b) in zip(model.routing_parameters(), again.routing_parameters(), strict=True):
        assert torch.equal(a, b)


def test_rotary_frequencies_stay_as_the_base_has_them(folder: Path) -> None:
    base = make_tiny("llama").to(torch.bfloat16)
    base.model.rotary_emb.inv_freq = make_tiny("llama").model.rotary_emb.inv_freq.clone()
    frequencies = base.model.rotary_emb.inv_freq.clone()
    model = load(folder, base=base)
    assert model.units[0].router.outer.weight.dtype == torch.bfloat16
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)


def test_the_generation_settings_come_along(tmp_path: Path) -> None:
    from transformers import GenerationConfig

    model: Any = make_routed("llama")
    model.generation_config = GenerationConfig(
        max_new_tokens=7, eos_token_id=5, temperature=0.3
    )  # invalid: no sampling
    model.save_pretrained(tmp_path)
    found = load(tmp_path, base=make_tiny("llama")).generation_config
    assert (found.max_new_tokens, found.eos_token_id) == (7, 5)
    assert GenerationConfig.from_pretrained(tmp_path).max_new_tokens == 7


class _Hub:
    """Stands for huggingface_hub.HfApi."""

    calls: list[tuple[str, dict[str, Any]]]

    def __init__(self, token: Any = None) -> None:
        type(self).calls = [("api", {"token": token})]

    def create_repo(self, repo_id: str, **options: Any) -> Any:
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))
        return type("Url", (), {"repo_id": f"me/{repo_id}"})

    def create_branch(self, repo_id: str, **options: Any) -> None:
        self.calls.append(("create_branch", {"repo_id": repo_id, **options}))

    def upload_folder(self, folder_path: str, **options: Any) -> str:
        names = sorted(path.name for path in Path(folder_path).iterdir())
        self.calls.append(("upload_folder", {"names": names, **options}))
        return "done"


def test_options_of_push_to_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", _Hub)
    model: Any = make_routed("llama")
    asked = {"commit_message": "new", "commit_description": "text", "revision": "dev", "create_pr": True}
    assert model.push_to_hub("mine", private=True, token="secret", **asked) == "done"
    done = dict(_Hub.calls)
    assert done["api"] == {"token": "secret"}
    assert done["create_repo"]["private"] is True
    assert done["create_branch"] == {"repo_id": "me/mine", "branch": "dev", "exist_ok": True}
    assert asked.items() <= done["upload_folder"].items()
    assert "routing_config.json" in done["upload_folder"]["names"]
    model.save_pretrained(tmp_path / "here", push_to_hub=True, commit_message="again")
    assert dict(_Hub.calls)["create_repo"]["repo_id"] == "here"
    with pytest.raises(InputError, match="tags"):
        model.push_to_hub("mine", tags=["a"])
    with pytest.raises(TypeError, match="privat'"):
        model.push_to_hub("mine", privat=True)
    _scale(model)
    with pytest.raises(InputError, match="save_base"):
        model.push_to_hub("mine")


def test_a_hub_that_fails_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    with pytest.raises(WorkError, match="cannot upload to mine: no route") as raised:
        make_routed("llama").push_to_hub("mine")
    assert "\n" not in str(raised.value)
