from __future__ import annotations

import json
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy
import pytest
import torch
from gguf import GGMLQuantizationType, RopeScalingType
from tests.assets.gguf_files import ARCHITECTURES, original, write

from informed_routing.assets import gguf as conversion
from informed_routing.assets import load_model
from informed_routing.assets.gguf_keys import shortest_float32
from informed_routing.errors import InputError


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("INFORMED_ROUTING_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def logits(model: Any, length: int = 48) -> torch.Tensor:
    ids = torch.randint(3, 256, (1, length), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids, use_cache=False).logits
    return found


def load(path: Path) -> Any:
    return load_model(path, dtype="float32")[0]


def gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def refused(path: Path, message: str) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_model(path)
    assert "\n" not in str(caught.value)
    assert path.stem.split("-")[0] in str(caught.value)


@pytest.mark.parametrize("family", ARCHITECTURES)
def test_every_architecture_gives_the_logits_of_the_original(family: str, tmp_path: Path) -> None:
    model = original(family)
    found = load(write(model, tmp_path / "m.gguf"))
    assert type(found) is type(model)
    assert found.config.tie_word_embeddings == model.config.tie_word_embeddings
    assert gap(logits(found), logits(model)) < 2e-4
    ids = (found.config.bos_token_id, found.config.eos_token_id, found.config.pad_token_id)
    assert ids == (257, 257, None)


def test_attention_and_mlp_biases_are_read(tmp_path: Path) -> None:
    model = original(attention_bias=True, mlp_bias=True)
    assert gap(logits(load(write(model, tmp_path / "m.gguf"))), logits(model)) < 1e-5
    path = write(model, tmp_path / "n.gguf", leave=("blk.0.attn_output.bias",))
    refused(path, r"incomplete: 1 missing, first blk\.0\.attn_output\.bias")


@pytest.mark.parametrize("pick", [0, 1, -1])
def test_any_file_of_a_split_model_gives_all_of_it(pick: int, tmp_path: Path) -> None:
    model = original()
    write(model, tmp_path / "split.gguf", split_max_tensors=8)
    files = sorted(tmp_path.glob("split-*-of-*.gguf"))
    assert len(files) > 2
    assert torch.equal(logits(load(files[pick])), logits(model))


def test_missing_and_renamed_files_of_a_split_model_are_refused_by_name(tmp_path: Path) -> None:
    write(original(), tmp_path / "split.gguf", split_max_tensors=8)
    files = sorted(tmp_path.glob("split-*-of-*.gguf"))
    count = len(files)
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "m.gguf").write_bytes(files[0].read_bytes())
    with pytest.raises(InputError, match=f"m.gguf is one of {count} files of a model, but its name"):
        load_model(alone / "m.gguf")
    second = files[1].read_bytes()
    files[1].write_bytes(files[2].read_bytes())
    refused(files[0], rf"00002-of-0000{count}\.gguf says it is file 3 of {count}, not 2")
    files[1].unlink()
    refused(files[0], rf"split-00002-of-0000{count}\.gguf is missing in")
    refused(files[2], rf"split-00002-of-0000{count}\.gguf is missing in")
    files[1].write_bytes(second[: len(second) // 2])
    refused(files[0], r"split-00002.*damaged")


SCALED = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn with all": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.25,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "llama3 of other factors": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 8.0,
        "original_max_position_embeddings": 64,
    },
}


def scaling(rope: dict[str, Any], plain: Any, right: Any) -> Callable[[gguf.GGUFWriter], None]:
    def more(writer: gguf.GGUFWriter) -> None:
        if rope["rope_type"] == "llama3":
            factors = plain.model.rotary_emb.inv_freq / right.model.rotary_emb.inv_freq
            writer.add_tensor("rope_freqs.weight", factors.float().numpy())
            return
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
        if rope["rope_type"] == "yarn":
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
            for key, add in (
                ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
                ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
                ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
            ):
                if key in rope:
                    add(rope[key])

    return more


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_scaled_rotary_embeddings_give_the_logits_of_the_original(name: str, family: str, tmp_path: Path) -> None:
    rope = {**SCALED[name], "rope_theta": 10000.0}
    plain, right = original(family), original(family, rope_parameters=rope)
    assert gap(logits(right), logits(plain)) > 0.05
    found = load(write(right, tmp_path / "m.gguf", scaling(rope, plain, right)))
    assert gap(logits(found), logits(right)) < 1e-3
    assert found.config.rope_parameters["rope_type"] == rope["rope_type"]


def test_frequency_factors_that_no_formula_gives_are_used_as_they_are(tmp_path: Path) -> None:
    model = original()
    factors = numpy.linspace(1.0, 3.0, 8, dtype=numpy.float32) ** 2
    path = write(model, tmp_path / "m.gguf", lambda writer: writer.add_tensor("rope_freqs.weight", factors))
    with torch.no_grad():
        model.model.rotary_emb.inv_freq.div_(torch.from_numpy(factors))
    assert gap(logits(load(path)), logits(model)) < 1e-4


def test_llama_3_1_parameters_are_found_again(tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    }
    shape: dict[str, Any] = {"head_dim": 128, "num_hidden_layers": 1}
    plain = original(**shape, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    right = original(**shape, rope_parameters=rope)
    found = load(write(right, tmp_path / "m.gguf", scaling(rope, plain, right)))
    assert found.config.rope_parameters == rope


def test_older_linear_scaling_key_and_a_factor_without_a_type(tmp_path: Path) -> None:
    right = original(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0})
    older = write(right, tmp_path / "a.gguf", lambda writer: writer.add_float32("llama.rope.scale_linear", 4.0))
    bare = write(right, tmp_path / "b.gguf", lambda writer: writer.add_rope_scaling_factor(4.0))
    for path in (older, bare):
        assert gap(logits(load(path)), logits(right)) < 1e-4

    def none(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(RopeScalingType.NONE)
        writer.add_rope_scaling_factor(4.0)

    assert gap(logits(load(write(right, tmp_path / "c.gguf", none))), logits(original())) < 1e-4


def test_gemma3_scales_only_its_global_layers(tmp_path: Path) -> None:
    rope = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    right = original("gemma3_text", rope_parameters=rope)
    more = scaling(rope["full_attention"], None, None)
    assert gap(logits(load(write(right, tmp_path / "m.gguf", more))), logits(right)) < 2e-4


def test_phi3_long_and_short_factors_and_partial_rotation(tmp_path: Path) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": [1.0, 1.1, 1.2, 1.4, 1.6, 2.0],
        "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0],
        "original_max_position_embeddings": 32,
    }
    right = original("phi3", rope_parameters=rope, original_max_position_embeddings=32)

    def more(writer: gguf.GGUFWriter) -> None:
        for which in ("long", "short"):
            factors = numpy.array(rope[f"{which}_factor"], dtype=numpy.float32)
            writer.add_tensor(f"rope_factors_{which}.weight", factors)
        writer.add_rope_scaling_attn_factors((1 + numpy.log(8) / numpy.log(32)) ** 0.5)

    found = load(write(right, tmp_path / "m.gguf", more))
    for length in (24, 48):
        assert gap(logits(found, length), logits(right, length)) < 1e-3


@pytest.mark.parametrize(
    ("add", "message"),
    [
        (lambda w: w.add_float32("llama.rope.scaling.yarn_log_multiplier", 0.1), "yarn_log_multiplier = 0.1"),
        (lambda w: w.add_logit_scale(0.5), r"what llama\.logit_scale = 0\.5 should change"),
        (lambda w: w.add_embedding_scale(12.0), "embedding_scale"),
        (lambda w: w.add_attention_scale(0.125), "attention.scale is 0.125"),
        (lambda w: w.add_final_logit_softcapping(30.0), "final_logit_softcapping"),
        (lambda w: w.add_clamp_kqv(8.0), "clamp_kqv"),
        (lambda w: w.add_causal_attention(False), "attention.causal"),
        (lambda w: w.add_expert_count(8), "mixture of experts"),
        (lambda w: w.add_uint32("llama.unheard.of", 1), r"what llama\.unheard\.of = 1 should change is not known"),
        (lambda w: w.add_rope_dimension_count(8), "8 of the 16 values of each head are rotated"),
        (lambda w: w.add_head_count_kv([2, 1, 2]), "not the same in every layer"),
        (lambda w: w.add_layer_norm_rms_eps(float("nan")), "not a finite number"),
        (lambda w: w.add_string("llama.rope.scaling.type", "dynamic"), "unknown type 'dynamic'"),
        (lambda w: w.add_string("llama.rope.scaling.type", "llama3"), "tensor with the factors is missing"),
        (lambda w: w.add_rope_scaling_attn_factors(1.5), "attn_factor is 1.5"),
        (lambda w: w.add_value_length(8), "differ in length"),
        (lambda w: w.add_vocab_size(300), "vocab_size is 300, but there are 258"),
        (lambda w: w.add_string("general.type", "adapter"), "holds no model but adapter"),
        (lambda w: w.add_string("general.architecture", "minicpm"), "architecture 'minicpm'"),
        (lambda w: w.add_tensor("rope_freqs.weight", numpy.ones(3, numpy.float32)), r"rope_freqs.weight has the shape"),
        (lambda w: w.add_tensor("blk.0.attn_q.scale", numpy.ones(1, numpy.float32)), r"no place.*attn_q\.scale"),
        (lambda w: w.add_tensor("blk.3.ffn_up.weight", numpy.ones((2, 2), numpy.float32)), r"first blk\.3\.ffn_up"),
        (lambda w: w.add_block_count(2), r"9 of its tensors have no place"),
        (lambda w: w.add_block_count(4), r"incomplete: 9 missing, first blk\.3"),
        (lambda w: w.add_feed_forward_length(96), r"has the shape \[128, 64\], not \[96, 64\]"),
        (lambda w: w.add_head_count(5), "not a multiple of the number of attention heads"),
    ],
)
def test_what_could_change_results_is_refused_by_name(
    add: Callable[[gguf.GGUFWriter], Any], message: str, tmp_path: Path, own_cache: Path
) -> None:
    refused(write(original(), tmp_path / "m.gguf", add), message)
    assert [path for path in (own_cache / "models").iterdir() if not path.name.endswith(".lock")] == []


@pytest.mark.parametrize(
    "leave",
    [
        "blk.1.ffn_up.weight",
        "blk.0.attn_norm.weight",
        "output_norm.weight",
        "token_embd.weight",
        "llama.attention.layer_norm_rms_epsilon",
        "llama.block_count",
    ],
)
def test_missing_tensors_and_keys_are_refused_by_name(leave: str, tmp_path: Path) -> None:
    refused(write(original(), tmp_path / "m.gguf", leave=(leave,)), f"missing.*{leave}|{leave}.*missing")


def test_no_head_of_its_own_means_tied(tmp_path: Path) -> None:
    model = original(tie_word_embeddings=True)
    found = load(write(model, tmp_path / "m.gguf"))
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert torch.equal(logits(found), logits(model))


def test_neutral_keys_do_no_harm(tmp_path: Path) -> None:
    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_logit_scale(1.0)
        writer.add_expert_count(0)
        writer.add_causal_attention(True)
        writer.add_rope_scaling_finetuned(True)
        writer.add_tensor("blk.0.attn_rot_embd.weight", numpy.ones(8, numpy.float32))

    model = original()
    assert torch.equal(logits(load(write(model, tmp_path / "m.gguf", more))), logits(model))


QUANTISED = ("BF16", "F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_weights_are_exactly_what_gguf_gives(name: str, tmp_path: Path) -> None:
    kind = GGMLQuantizationType[name]
    model = original("qwen2")
    found = load(write(model, tmp_path / "m.gguf", kind=kind))
    weights = dict(found.named_parameters())
    for part, value in model.named_parameters():
        right = value.detach().numpy()
        if right.ndim > 1:
            right = gguf.quants.dequantize(gguf.quants.quantize(right, kind), kind)
        assert numpy.array_equal(weights[part].detach().numpy(), right), part


def _with_tensor(packed: Any, kind: GGMLQuantizationType, writer: gguf.GGUFWriter) -> None:
    writer.add_tensor("x.weight", packed, raw_dtype=kind)


def test_every_type_that_gguf_can_read_is_read(tmp_path: Path) -> None:
    """Random bytes as weights: the result is what gguf's own dequantisation makes of them."""
    generator = numpy.random.default_rng(0)
    model = original("qwen2", hidden_size=256, intermediate_size=256, num_hidden_layers=1)
    for kind in gguf.quants._type_traits:
        block, size = gguf.GGML_QUANT_SIZES[kind]
        packed = generator.integers(0, 60, (258, 256 // block * size), dtype=numpy.uint8)
        right = gguf.quants.dequantize(packed, kind)
        if not numpy.isfinite(right).all():
            continue
        more = partial(_with_tensor, packed, kind)
        path = write(model, tmp_path / f"{kind.name}.gguf", more)
        opened = conversion.open_gguf(path)
        assert numpy.array_equal(opened.read(opened.tensors["x.weight"]), right), kind.name


def test_float32_files_lose_nothing_and_bfloat16_stays_small(tmp_path: Path) -> None:
    model = original()
    folder = conversion.convert_gguf(write(model, tmp_path / "m.gguf"), tmp_path / "whole")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float32"
    assert torch.equal(logits(load(folder)), logits(model))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16().float())
    folder = conversion.convert_gguf(write(model, tmp_path / "n.gguf"), tmp_path / "half")
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert torch.equal(logits(load(folder)), logits(model))


def test_weights_in_several_files_are_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "_SHARD", 100_000)
    model = original()
    folder = conversion.convert_gguf(write(model, tmp_path / "m.gguf"), tmp_path / "out")
    assert len(list(folder.glob("model-*-of-*.safetensors"))) > 1
    assert torch.equal(logits(load(folder)), logits(model))


def test_nan_weights_are_refused(tmp_path: Path) -> None:
    model = original()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    refused(write(model, tmp_path / "m.gguf"), r"blk\.1\.ffn_up\.weight holds NaN")


def patched(path: Path, at: int, content: bytes) -> Path:
    data = bytearray(path.read_bytes())
    data[at : at + len(content)] = content
    path.write_bytes(bytes(data))
    return path


def test_damaged_files_are_refused_with_one_line(tmp_path: Path) -> None:
    whole = write(original(), tmp_path / "m.gguf")
    data = whole.read_bytes()
    for length in (0, 3, 5, 20, 30, 200, 3000, len(data) // 2, len(data) - 1):
        whole.write_bytes(data[:length])
        refused(whole, "not a GGUF file|damaged")
    whole.write_bytes(data)
    refused(patched(whole, 4, struct.pack(">I", 3)), "big-endian")
    refused(patched(whole, 4, struct.pack("<I", 9)), "version 9")
    refused(patched(whole, 4, struct.pack("<IQQ", 3, 2**60, 2)), "damaged")
    refused(patched(whole, 4, struct.pack("<IQQ", 3, 2, 2**60)), "damaged")
    big = write(original(), tmp_path / "big.gguf", endianess=gguf.GGUFEndian.BIG)
    refused(big, "big-endian")


def test_random_mutations_are_read_or_refused(tmp_path: Path) -> None:
    generator = numpy.random.default_rng(1)
    data = write(original(num_hidden_layers=1), tmp_path / "m.gguf").read_bytes()
    header = data.index(b"output_norm.weight") + 60
    for trial in range(60):
        changed = bytearray(data)
        for place in generator.integers(4, header, 3):
            changed[place] = generator.integers(0, 256)
        path = tmp_path / f"{trial}.gguf"
        path.write_bytes(bytes(changed))
        with suppress(InputError):
            model = conversion.open_gguf(path)
            conversion.settings_of(model)
            conversion.read_tokenizer(model, 258)


def test_unreadable_types_are_refused_by_name(tmp_path: Path) -> None:
    def more(writer: gguf.GGUFWriter) -> None:
        writer.add_tensor("x.weight", numpy.ones((4, 4), numpy.int32))

    refused(write(original(), tmp_path / "m.gguf", more), r"x\.weight is of the type I32, which cannot be read")


def test_the_folder_of_an_earlier_conversion_is_not_used(tmp_path: Path, own_cache: Path) -> None:
    path = write(original(), tmp_path / "m.gguf")
    name = conversion.folder_name(path)
    assert name.endswith(f"-v{conversion.CONVERSION}")
    earlier = own_cache / "models" / name.rsplit("-v", 1)[0]
    earlier.mkdir(parents=True)
    (earlier / "config.json").write_text("{}")
    load(path)
    assert {entry.name for entry in (own_cache / "models").iterdir() if entry.is_dir()} == {earlier.name, name}
    weights = own_cache / "models" / name / "model.safetensors"
    assert weights.stat().st_mode & 0o777 == (tmp_path / "m.gguf").stat().st_mode & 0o777


def test_shortest_float32() -> None:
    assert shortest_float32(9.999999747378752e-06) == 1e-05
    assert shortest_float32(1e-06) == 1e-06
