from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.conftest import Demo
from tests.tiny import make_tiny, random_ids

from informed_routing.assets import (
    DEMO_MODEL,
    ModelSource,
    cache_dir,
    load_model,
    load_tokenizer,
    models,
    pack,
    resolve_model,
)
from informed_routing.assets.gguf import CONVERSION
from informed_routing.assets.models import default_dtype, resolve_dtype
from informed_routing.errors import InputError


def words(folder: Path, count: int, special: str = "") -> None:
    """A tokenizer of `count` words, and perhaps one more special token, for a tiny model of 128 embeddings."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({f"w{index}": index for index in range(count)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="w2")
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": [special]})
    tokenizer.save_pretrained(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny Llama with a tokenizer, as a user's folder."""
    path = tmp_path / "tiny"
    make_tiny("llama").save_pretrained(path)
    words(path, 128)
    return path


def test_resolve_model_kinds(folder: Path, tmp_path: Path) -> None:
    gguf, routing = tmp_path / "m.GGUF", tmp_path / "out"
    gguf.touch()
    routing.mkdir()
    (routing / "routing_config.json").write_text("{}")
    assert resolve_model(DEMO_MODEL) == ModelSource("demo", "smollm2-135m")
    assert resolve_model(folder) == ModelSource("folder", str(folder))
    assert resolve_model(str(gguf)) == ModelSource("gguf", str(gguf))
    assert resolve_model(routing).kind == "routing"
    assert resolve_model("org/name", "v1") == ModelSource("hub", "org/name", "v1")
    assert resolve_model("gpt2").kind == "hub"


def test_what_cannot_be_a_model_is_refused_by_name(tmp_path: Path) -> None:
    bare, pickled, unsaved, other = (tmp_path / name for name in ("bare", "pickled", "unsaved", "file.bin"))
    for path in (bare, pickled, unsaved):
        path.mkdir()
    (bare / "x.gguf").touch()
    (pickled / "config.json").write_text("{}")
    (pickled / "pytorch_model.bin").touch()
    (unsaved / "config.json").write_text("{}")
    other.touch()
    cases = {
        "demo:other": "no embedded model",
        str(bare): r"no config.json\)\. Name the file: .*x\.gguf",
        str(pickled): r"only pickled weights \(pytorch_model\.bin\).*safetensors",
        str(unsaved): "holds no weights",
        str(other): "not a .gguf file",
        "missing.gguf": "does not exist",
        "./missing": "does not exist",
        "a/b/c": "does not exist",
        "": "holds no model|does not exist",
        "~nosuchuser/x": "does not exist",
        "x" * 300 + "/": "does not exist",
        "a\0b": "does not exist",
        "../missing": "does not exist",
    }
    for ref, message in cases.items():
        with pytest.raises(InputError, match=message) as caught:
            resolve_model(ref)
        assert caught.value.exit_code == 2


def test_missing_hub_model_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def fail(*_: object, **__: object) -> None:
        raise OSError("no-such is not a local folder and is not a valid model identifier\nmore lines")

    monkeypatch.setattr(transformers.PretrainedConfig, "get_config_dict", fail)
    with pytest.raises(InputError, match=r"'no-such' cannot be loaded \(no such path here") as caught:
        load_model("no-such")
    assert "\n" not in str(caught.value)
    assert DEMO_MODEL in str(caught.value)


def test_folder_loads_as_it_was_saved(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = load_model(folder, dtype="float32")
    assert capfd.readouterr() == ("", "")
    assert not model.training
    ids = random_ids(2, 9)
    assert torch.equal(model(ids).logits, make_tiny("llama")(ids).logits)
    assert tokenizer.eos_token_id == 2
    assert load_model(folder, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_routing_folder_gives_its_base(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    config = out / "routing_config.json"
    config.write_text(json.dumps({"base_model": {"name": str(folder)}}))
    assert load_tokenizer(out).eos_token_id == 2
    assert type(load_model(out)[0]).__name__ == "LlamaForCausalLM"
    config.write_text("{")
    with pytest.raises(InputError, match="damaged"):
        load_model(out)
    config.write_text(json.dumps({"base_model": {"name": str(out)}}))
    with pytest.raises(InputError, match="another routing folder"):
        load_model(out)


def test_damaged_folders_are_input_errors(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="cannot be loaded") as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)
    weights.write_bytes(whole)
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 missing, first model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(folder)
    weights.write_bytes(whole)
    (folder / "config.json").write_text('{"model_type": "unheard-of"}')
    with pytest.raises(InputError, match="unheard-of"):
        load_model(folder)


def test_bad_gguf_leaves_no_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("INFORMED_ROUTING_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"no such thing")
    with pytest.raises(InputError, match="is not a GGUF file"):
        load_model(path)
    path.write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(InputError, match="big-endian"):
        load_model(path)
    assert not (tmp_path / "cache").exists()


def test_device_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "_cpu_has_bfloat16", lambda: True)
    assert default_dtype("cpu") == resolve_dtype("auto", "cpu") == torch.bfloat16
    monkeypatch.setattr(models, "_cpu_has_bfloat16", lambda: False)
    assert default_dtype("cpu") == torch.float32
    assert default_dtype("cuda:0") == torch.bfloat16
    assert resolve_dtype(torch.float16, "cpu") == resolve_dtype("float16", "cpu") == torch.float16
    with pytest.raises(InputError, match="Unknown dtype 'int4'"):
        resolve_dtype("int4", "cpu")
    with pytest.raises(InputError, match="Unknown device 'gpu'"):
        load_model(DEMO_MODEL, device="gpu")
    for device in ("meta", "mps", "xpu", "hpu", "cpu:3", torch.device("meta")):
        with pytest.raises(InputError, match=r"is not supported|is not available here: there is 1"):
            load_model(DEMO_MODEL, device=device)
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="not available"):
            load_model(DEMO_MODEL, device="cuda")


def test_a_path_never_becomes_a_hub_id(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    with pytest.raises(InputError, match="the folder models is here, and holds no base"):
        resolve_model("models/base")
    source = resolve_model("tiny")
    assert source.reference == str(folder)
    assert resolve_model(DEMO_MODEL).reference == DEMO_MODEL


def test_a_relative_base_of_an_earlier_version_is_found_beside_its_routing_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (tmp_path / "models").mkdir()
    folder.rename(tmp_path / "models" / "base")
    (out / "routing_config.json").write_text(json.dumps({"base_model": {"name": "models/base"}}))
    monkeypatch.chdir("/")
    assert load_tokenizer(out).eos_token_id == 2
    (out / "routing_config.json").write_text(json.dumps({"base_model": {"name": "/no/such/base"}}))
    with pytest.raises(InputError, match=r"base model of .*/no/such/base.*--base"):
        load_tokenizer(out)


def test_loading_options_reach_transformers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    assert load_model(folder, attn_implementation="eager")[0].config._attn_implementation == "eager"
    with pytest.raises(InputError, match="nonesuch"):
        load_model(folder, attn_implementation="nonesuch")
    with pytest.raises(InputError, match="not on the Hub, so it has no revision 'v1'"):
        load_model(folder, revision="v1")
    asked: list[dict[str, Any]] = []

    def record(name: str, **options: Any) -> Any:
        asked.append(options)
        raise OSError("enough")

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", record)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", record)

    def settings(name: str, **options: Any) -> Any:
        asked.append(options)
        return {}, {}

    monkeypatch.setattr(transformers.PretrainedConfig, "get_config_dict", settings)
    for load in (load_model, load_tokenizer):
        with pytest.raises(InputError, match="enough"):
            load("org/name", revision="v1", token="secret")
    assert len(asked) == 3
    assert all(options["revision"] == "v1" and options["token"] == "secret" for options in asked)


def test_capped_attention_scores_are_not_lost(tmp_path: Path) -> None:
    make_tiny("gemma2").save_pretrained(tmp_path)
    words(tmp_path, 128)
    model, _ = load_model(tmp_path, dtype="float32")
    assert torch.equal(model(random_ids(1, 48)).logits, make_tiny("gemma2")(random_ids(1, 48)).logits)
    with pytest.raises(InputError, match="caps its attention scores, which 'sdpa' does not do"):
        load_model(tmp_path, attn_implementation="sdpa")


def changed(folder: Path, **settings: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **settings}))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised by gptq.*unquantised"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "quantised by bitsandbytes"),
        ({"rms_norm_eps": float("nan")}, r"the setting rms_norm_eps = nan"),
        ({"rms_norm_eps": float("inf")}, r"the setting rms_norm_eps = inf"),
        ({"rms_norm_eps": -1.0}, r"the setting rms_norm_eps = -1\.0"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, r"the setting rope_parameters\.rope_theta = nan"),
        ({"num_hidden_layers": 2}, r"9 have no place in the model, first model\.layers\.2\."),
        ({"num_hidden_layers": 4}, r"incomplete: 9 missing, first model\.layers\.3\."),
        ({"intermediate_size": 96}, r"9 of another shape, first model\.layers\.0\.mlp.* instead of "),
        ({"attention_bias": True}, r"incomplete: 12 missing"),
    ],
)
def test_settings_that_do_not_fit_the_weights_are_refused(settings: dict[str, Any], message: str, folder: Path) -> None:
    changed(folder, **settings)
    with pytest.raises(InputError, match=message) as caught:
        load_model(folder)
    assert "\n" not in str(caught.value)


def test_weights_without_a_place_are_refused_unless_harmless(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    harmless = ("model.layers.0.self_attn.rotary_emb.inv_freq", "mtp.layers.0.mlp.up_proj.weight")
    more = {name: torch.ones(8) for name in harmless}
    save_file({**tensors, **more}, folder / "model.safetensors", metadata={"format": "pt"})
    load_model(folder)
    more = {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)}
    save_file({**tensors, **more}, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 have no place in the model, first .*q_proj\.bias"):
        load_model(folder)


def test_a_tokenizer_larger_than_the_embedding_is_refused_by_name(tmp_path: Path) -> None:
    make_tiny("llama").save_pretrained(tmp_path)
    words(tmp_path, 130)
    with pytest.raises(InputError, match="2 tokens beyond the model's 128 embeddings, first 'w128' with id 128"):
        load_model(tmp_path)
    words(tmp_path, 128, special="<image>")  # as Gemma 3's text models have it
    _, tokenizer = load_model(tmp_path)
    assert pack(["w3 w4 w5"], tokenizer, 2).tolist() == [[3, 4], [5, 2]]
    with pytest.raises(InputError, match="The text holds '<image>', whose id 128 lies beyond the model's 128"):
        pack(["w3 <image> w5"], tokenizer, 2)


def test_demo_model_is_an_ordinary_llama(demo: Demo) -> None:
    config = json.loads((cache_dir() / "models" / f"smollm2-135m-v{CONVERSION}" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rms_norm_eps"] == 1e-05
    assert config["dtype"] == "bfloat16"
    assert not {"quantization_config", "_name_or_path", "_model_name_or_path"} & set(config)
    model = demo.model
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert not getattr(model, "is_quantized", False)
    assert sum(weight.numel() for weight in model.parameters()) == 134_515_008
    chat = demo.tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n")


def test_demo_model_knows_english_and_can_be_saved(demo: Demo, tmp_path: Path) -> None:
    tokens = demo.tokenizer("The capital of France is", return_tensors="pt")
    with torch.no_grad():
        best = demo.model(**tokens).logits[0, -1].argmax()
    assert demo.tokenizer.decode(best).strip() == "Paris"
    demo.model.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "model.safetensors").is_file()
