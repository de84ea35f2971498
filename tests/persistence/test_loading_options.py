"""Options of `from_pretrained`: each is honoured, or refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.persistence.conftest import logits
from tests.tiny import make_tiny
from transformers import AutoModelForCausalLM

from informed_routing.config.folder import RoutingConfig
from informed_routing.errors import InputError
from informed_routing.persistence.auto_config import RoutedConfig
from informed_routing.routed_model import RoutedModelForCausalLM

load: Any = RoutedModelForCausalLM.from_pretrained

HONOURED: list[tuple[dict[str, Any], Callable[[Any], bool]]] = [
    ({"torch_dtype": torch.float16}, lambda m: m.dtype == torch.float16),
    ({"torch_dtype": "bfloat16"}, lambda m: m.dtype == torch.bfloat16),
    ({"dtype": "float16"}, lambda m: m.dtype == torch.float16),
    ({"dtype": torch.float32, "torch_dtype": "float32"}, lambda m: m.dtype == torch.float32),
    ({"dtype": None}, lambda m: m.dtype in (torch.float32, torch.bfloat16)),
    ({"attn_implementation": "eager"}, lambda m: m.config._attn_implementation == "eager"),
    ({"attn_implementation": "sdpa"}, lambda m: m.config._attn_implementation == "sdpa"),
    ({"device_map": "cpu"}, lambda m: m.device.type == "cpu"),
    ({"device_map": {"": "cpu"}, "device": "cpu"}, lambda m: m.device.type == "cpu"),
    ({"device_map": torch.device("cpu")}, lambda m: m.device.type == "cpu"),
    ({"execution": "masked"}, lambda m: m.routing_state.execution == "masked"),
    ({"kv": "drop"}, lambda m: m.routing_state.kv == "drop"),
    ({"revision": "main", "subfolder": "", "quantization_config": None, "gguf_file": None}, lambda m: True),
    ({"use_safetensors": True, "low_cpu_mem_usage": True, "local_files_only": True}, lambda m: True),
]


@pytest.mark.parametrize("case", range(len(HONOURED)))
@pytest.mark.parametrize("auto", [False, True])
def test_honoured(on_disk: Callable[..., Path], case: int, auto: bool) -> None:
    options, honoured = HONOURED[case]
    model: Any = (AutoModelForCausalLM if auto else RoutedModelForCausalLM).from_pretrained(on_disk(), **options)
    assert isinstance(model, RoutedModelForCausalLM)
    assert honoured(model)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"subfolder": "nowhere"}, "nowhere"),
    ({"revision": "v2"}, "revision"),
    ({"quantization_config": {"load_in_8bit": True}}, "quantization_config"),
    ({"device_map": {"model": "cpu", "lm_head": "disk"}}, "device_map"),
    ({"device_map": 3.5}, "device_map"),
    ({"device_map": "disk"}, "device_map"),
    ({"attn_implementation": "nonsense"}, "attn_implementation"),
    ({"use_safetensors": False}, "use_safetensors"),
    ({"variant": "fp16"}, "variant"),
    ({"gguf_file": "x.gguf"}, "gguf_file"),
    ({"output_loading_info": True}, "output_loading_info"),
    ({"ignore_mismatched_sizes": True}, "ignore_mismatched_sizes"),
    ({"dtype": "float8"}, "float8"),
    ({"device": "nonsense"}, "nonsense"),
    ({"device_map": "cpu", "device": "meta"}, "device_map"),
    ({"dtype": "float16", "torch_dtype": "bfloat16"}, "torch_dtype"),
    ({"execution": "fast"}, "execution 'fast'"),
    ({"kv": "lose"}, "kv 'lose'"),
    ({"merge_lora": "no"}, "merge_lora"),
    ({"base": 5}, "base must be"),
    ({"excution": "masked"}, "excution"),
    ({"torch_dtpye": "float16"}, "torch_dtpye"),
    ({"load_in_8bit": True}, "load_in_8bit"),
    ({"max_memory": {0: "1GB"}}, "max_memory"),
    ({"adapter_kwargs": {"subfolder": "x"}}, "adapter_kwargs"),
]


@pytest.mark.parametrize("case", range(len(REFUSED)))
@pytest.mark.parametrize("auto", [False, True])
def test_refused(on_disk: Callable[..., Path], case: int, auto: bool) -> None:
    options, name = REFUSED[case]
    if auto and (set(options) & {"subfolder", "gguf_file", "adapter_kwargs"} or options == {"dtype": "float8"}):
        pytest.skip("transformers refuses it before")
    with pytest.raises((InputError, TypeError), match=name):
        (AutoModelForCausalLM if auto else RoutedModelForCausalLM).from_pretrained(on_disk(), **options)


def test_what_only_routed_models_lack(folder: Path) -> None:
    with pytest.raises(InputError, match="state_dict"):
        load(folder, base=make_tiny("llama"), state_dict={"x": torch.ones(1)})
    with pytest.raises(TypeError, match="positional"):
        load(folder, "float16")  # type: ignore[misc]
    with pytest.raises(InputError, match="config of the type 'llama'"):
        load(folder, base=make_tiny("llama"), config=make_tiny("llama").config)
    with pytest.raises(InputError, match="config = 'x'"):
        load(folder, base=make_tiny("llama"), config="x")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="not built from a configuration"):
        AutoModelForCausalLM.from_config(RoutedConfig())
    load(folder, base=make_tiny("llama"), config=RoutedConfig.from_pretrained(folder))


@pytest.mark.parametrize("option", ["output_hidden_states", "output_attentions", "use_cache"])
def test_settings_that_auto_model_keeps_to_itself(on_disk: Callable[..., Path], option: str) -> None:
    """AutoModel takes keywords that are settings of any configuration out of what it passes on."""
    value = not getattr(RoutedConfig(), option, True)
    with pytest.raises((InputError, TypeError), match=option):
        AutoModelForCausalLM.from_pretrained(on_disk(), **{option: value})


def test_a_live_base_stays_what_it_is(folder: Path) -> None:
    for options in ({"dtype": "float16"}, {"torch_dtype": torch.bfloat16}, {"device": "meta"}):
        with pytest.raises(InputError, match="but the base model given is"):
            load(folder, base=make_tiny("llama"), **options)
    load(folder, base=make_tiny("llama"), dtype=torch.float32, device="cpu")


def test_a_subfolder(on_disk: Callable[..., Path], tmp_path: Path) -> None:
    folder = on_disk()
    shutil.copytree(folder, tmp_path / "several" / "one")
    assert torch.equal(logits(load(tmp_path / "several", subfolder="one")), logits(load(folder)))
    assert isinstance(
        AutoModelForCausalLM.from_pretrained(tmp_path / "several", subfolder="one"), RoutedModelForCausalLM
    )


def test_nothing_is_downloaded_for_options_that_cannot_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("it was"))
    for options in ({"execution": "x"}, {"kv": "x"}, {"variant": "x"}, {"nonsense": 1}, {"merge_lora": 1}):
        with pytest.raises((InputError, TypeError)):
            load("me/routing", **options)


def test_options_of_the_hub(on_disk: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder, calls = on_disk(), []

    def download(repo: str, **options: Any) -> str:
        calls.append((repo, options))
        return str(folder if repo == "me/routing" else tmp_path / "base")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    config = RoutingConfig.from_json((folder / "routing_config.json").read_text(), "")
    there = config.base_model.model_copy(update={"name": "me/base", "revision": "abc", "near": None})
    (folder / "routing_config.json").write_text(
        config.model_copy(update={"base_model": there}).model_dump_json(), encoding="utf-8"
    )
    kept = {"cache_dir": str(tmp_path / "cache"), "local_files_only": True, "force_download": True}
    model = load("me/routing", revision="v2", **{**kept, "cache_dir": tmp_path / "cache"})
    routing, base = calls
    assert {"revision": "v2", **kept}.items() <= routing[1].items()
    assert base[0] == "me/base"
    assert {"revision": "abc", **kept}.items() <= base[1].items()
    assert model.name_or_path == "me/base"
    assert model.routing_config.base_model.revision == "abc"


def test_the_token_is_for_both(on_disk: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from informed_routing.assets import models

    folder, seen = on_disk(), {}
    real = models.load_model

    def load_model(ref: str, **options: Any) -> Any:
        seen["base"] = options.pop("token", None)
        return real(ref, **options)

    def download(repo: str, **options: Any) -> str:
        seen["routing"] = options["token"]
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(models, "load_model", load_model)
    load("me/routing", token="secret")
    assert seen == {"base": "secret", "routing": "secret"}


# -- where the base model is --------------------------------------------------------------------------------


def test_a_relative_base_is_found_from_anywhere(
    on_disk: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_disk()
    monkeypatch.chdir(tmp_path)
    routed = RoutedModelForCausalLM.attach(AutoModelForCausalLM.from_pretrained("base"), name="base")
    routed.save_pretrained("relative")
    monkeypatch.chdir("/")
    model = load(tmp_path / "relative")
    assert model.routing_config.base_model.name == str(tmp_path / "base")
    assert model.name_or_path == str(tmp_path / "base")


def test_a_base_that_moved(on_disk: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = on_disk()
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"does not exist\. .*--base MODEL.*base="):
        load(folder)
    model = load(folder, base=tmp_path / "elsewhere")
    model.save_pretrained(tmp_path / "out again")  # knows the new place
    load(tmp_path / "out again")
    monkeypatch.chdir(tmp_path)
    load(folder, base="elsewhere").save_pretrained(tmp_path / "third")
    monkeypatch.chdir("/")
    load(tmp_path / "third")


def test_both_folders_moved_together(on_disk: Callable[..., Path], tmp_path: Path) -> None:
    on_disk()
    (tmp_path / "moved").mkdir()
    for name in ("base", "out"):
        (tmp_path / name).rename(tmp_path / "moved" / name)
    model = load(tmp_path / "moved" / "out")
    assert model.routing_config.base_model.name == str(tmp_path / "moved" / "base")


def test_a_relative_name_of_an_earlier_version(
    on_disk: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = on_disk()
    text = (folder / "routing_config.json").read_text()
    config = RoutingConfig.from_json(text, "")
    old = config.base_model.model_copy(update={"name": "base", "near": None})
    (folder / "routing_config.json").write_text(config.model_copy(update={"base_model": old}).model_dump_json())
    monkeypatch.chdir("/")
    load(folder)  # beside it
    (tmp_path / "base").rename(tmp_path / "gone")

    def none(ref: str, **_: object) -> None:
        raise InputError(f"no {ref} on the Hub")

    monkeypatch.setattr("informed_routing.assets.models.load_model", none)  # which may take a minute to find out
    with pytest.raises(InputError, match="--base MODEL"):
        load(folder)


def test_a_base_that_nobody_named(folder: Path) -> None:
    with pytest.raises(InputError, match="--base MODEL"):
        load(folder)
