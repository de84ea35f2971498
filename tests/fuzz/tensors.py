"""Mutations of files of numbers: safetensors, GGUF, Parquet tables, and the tokenizers beside them."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path
from typing import Any

from .case import OTHER, OTHER_OR_REFUSED, SAME, SAME_OR_REFUSED, Case, Right, mutator, refused

_WEIGHTS = {
    "routed": ["routing.safetensors"],
    "tuned": ["routing.safetensors", "lora/adapter_model.safetensors"],
    "pruned": ["model.safetensors"],
    "model": ["model.safetensors"],
}


def _files(case: Case, *, ours: bool = False) -> list[Path]:
    """The safetensors files of a command's inputs; with `ours`, only those that this package alone writes."""
    found = [case.folder / folder / name for folder in case.command.inputs for name in _WEIGHTS.get(folder, ())]
    return [path for path in found if not ours or path.name != "model.safetensors"]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Tensors, in the file's order, and metadata."""
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118


def _write(path: Path, tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    from safetensors.torch import save_file

    save_file(tensors, str(path), metadata=metadata)


def _name(case: Case, path: Path, form: str) -> tuple[str, ...]:
    case.note = f"{path.relative_to(case.folder)}: {form}"
    return (path.name, *path.relative_to(case.folder).parts, "model")


@mutator("safetensors", uses=tuple(_WEIGHTS))
def _no_safetensors(case: Case) -> Right:
    path = case.rng.choice(_files(case))
    content = path.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header = content[8 : 8 + size]
    form, new = case.rng.choice(
        [
            ("cut off", content[: case.rng.randrange(len(content))]),
            ("one byte short", content[:-1]),
            ("empty", b""),
            ("zeros", b"\0" * len(content)),
            ("a huge header", struct.pack("<Q", 2**62) + content[8:]),
            ("no JSON", content[:8] + b"}" + content[9:]),
            ("other bytes behind", content + b"\0" * 64),
            ("deep nesting", struct.pack("<Q", 400_000) + b'{"a":' * 80_000),
            ("offsets beyond the end", _header(content, header.replace(b'"data_offsets":[', b'"data_offsets":[9', 1))),
            ("a pickle", pickle.dumps({"weights": [1.0]})),
        ]
    )
    path.write_bytes(new)
    return refused(*_name(case, path, form))


def _header(content: bytes, header: bytes) -> bytes:
    size = struct.unpack("<Q", content[:8])[0]
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


@mutator("safetensors", uses=tuple(_WEIGHTS))
def _tensors_missing_or_misnamed(case: Case) -> Right:
    path = case.rng.choice(_files(case))
    tensors, metadata = _read(path)
    name = case.rng.choice(sorted(tensors))
    form = case.rng.choice(("missing", "misnamed", "of another shape", "transposed", "all gone", "surplus"))
    if form in ("missing", "misnamed"):
        tensor = tensors.pop(name)
        if form == "misnamed":
            tensors[name + "x"] = tensor
    elif form == "of another shape":
        tensors[name] = tensors[name].reshape(-1)[:-1].clone()
    elif form == "transposed":
        tensors[name] = tensors[name][None].clone()
    elif form == "surplus":
        tensors["foreign.weight"] = tensors[name].clone()
    else:
        tensors = {}
    _write(path, tensors, metadata)
    return refused(*_name(case, path, f"{name} {form}"))


@mutator("safetensors", uses=("routed", "tuned"))
def _tensors_of_another_type(case: Case) -> Right:
    import torch

    path = case.rng.choice(_files(case, ours=True))
    tensors, metadata = _read(path)
    name = case.rng.choice(sorted(tensors))
    form = case.rng.choice(("int64", "int8", "uint8", "bool", "complex64", "float64", "float16"))
    tensors[name] = tensors[name].to(getattr(torch, form))
    _write(path, tensors, metadata)
    named = _name(case, path, f"{name} is {form}")
    return OTHER_OR_REFUSED if form in ("float64", "float16") else refused(*named)


@mutator("safetensors", uses=tuple(_WEIGHTS))
def _numbers_that_are_none(case: Case) -> Right:
    path = case.rng.choice(_files(case))
    tensors, metadata = _read(path)
    name = case.rng.choice(sorted(tensors))
    value = case.rng.choice((float("nan"), float("inf"), float("-inf")))
    tensors[name].view(-1)[case.rng.randrange(tensors[name].numel())] = value
    _write(path, tensors, metadata)
    named = _name(case, path, f"{name} holds {value}")
    if name.startswith("model.embed"):
        return Right((0, 1, 2), False)  # a token that the text may not hold
    return Right((1, 2), named=named) if path.name == "model.safetensors" else refused(*named)


@mutator("safetensors", uses=("routed", "tuned", "model"))
def _a_number_changed(case: Case) -> Right:
    """Other weights are another model: a base that was changed after the fit is not the one that was fitted."""
    path = case.rng.choice(_files(case))
    tensors, metadata = _read(path)
    name = case.rng.choice(sorted(tensors))
    flat = tensors[name].view(-1)
    flat[case.rng.randrange(len(flat))] += 0.5
    _write(path, tensors, metadata)
    case.note = f"{path.relative_to(case.folder)}: one number of {name}"
    if "model" in path.parts and {"routed", "tuned"} & set(case.command.inputs):
        return refused("base model")
    return OTHER_OR_REFUSED


@mutator("safetensors", uses=("routed", "tuned", "model"))
def _the_same_tensors_in_another_file(case: Case) -> Right:
    """Another order, other metadata, several files: the same weights."""
    path = case.rng.choice(_files(case))
    tensors, metadata = _read(path)
    names = sorted(tensors)
    case.rng.shuffle(names)
    case.note = f"{path.relative_to(case.folder)}: another order"
    if path.name == "model.safetensors" and case.rng.random() < 0.6:
        parts = [names[::2], names[1::2]]
        files = [f"model-0000{n + 1}-of-00002.safetensors" for n in range(2)]
        for file, part in zip(files, parts, strict=True):
            _write(path.parent / file, {name: tensors[name] for name in part}, {"format": "pt"})
        index = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (path.parent / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
        path.unlink()
        case.note = f"{path.relative_to(case.folder)}: in two files"
        missing = case.rng.random()
        if missing < 0.5:
            (path.parent / files[case.rng.randrange(2)]).unlink()
            case.note += ", one missing"
            return refused("model")
        return SAME
    _write(path, {name: tensors[name] for name in names}, {**metadata, "note": "copied"})
    return SAME


@mutator("safetensors", uses=("tuned", "model", "routed"))
def _pickles_instead(case: Case) -> Right:
    import torch

    path = case.rng.choice(_files(case))
    tensors, _ = _read(path)
    path.unlink()
    other = {"adapter_model.safetensors": "adapter_model.bin", "model.safetensors": "pytorch_model.bin"}
    torch.save(tensors, path.with_name(other.get(path.name, "routing.bin")))
    return refused(*_name(case, path, "a pickle instead"))


@mutator("safetensors", uses=("routed", "tuned"))
def _files_that_nobody_needs(case: Case) -> Right:
    """Reports and cards are for people; strangers are left alone."""
    folder = case.folder / case.rng.choice([name for name in ("routed", "tuned") if name in case.command.inputs])
    form = case.rng.choice(("no fit.json", "damaged fit.json", "no README.md", "a stranger", "links"))
    if form == "no fit.json":
        (folder / "fit.json").unlink()
    elif form == "damaged fit.json":
        (folder / "fit.json").write_text("{")
    elif form == "no README.md":
        (folder / "README.md").unlink()
    elif form == "a stranger":
        (folder / "notes.txt").write_text("mine")
    else:
        tensors = folder / "routing.safetensors"
        tensors.rename(folder / "elsewhere")
        tensors.symlink_to("elsewhere")
    case.note = f"{folder.name}: {form}"
    # It says which texts were read, which a fit that starts from the folder repeats in its own.
    return OTHER if "fit.json" in form and case.command.name == "fit-lora" else SAME


@mutator("safetensors", uses=("routed", "tuned", "pruned", "model"))
def _files_that_are_missing(case: Case) -> Right:
    folder = case.rng.choice([name for name in _WEIGHTS if name in case.command.inputs])
    names = {
        "routed": ["routing_config.json", "routing.safetensors"],
        "tuned": ["routing_config.json", "routing.safetensors", "lora/adapter_config.json"],
        "pruned": ["pruning.json", "model.safetensors", "config.json"],
        "model": ["config.json", "model.safetensors", "tokenizer.json"],
    }[folder]
    path = case.folder / folder / case.rng.choice(names)
    path.unlink()
    if path.name == "pruning.json":
        _name(case, path, "missing")
        return refused()
    return refused(*_name(case, path, "missing"), folder)


@mutator("safetensors", only="fit-resume")
def _damaged_checkpoints(case: Case) -> Right:
    import torch

    folder = case.folder / "half" / "checkpoints"
    path = case.rng.choice(sorted(folder.glob("*.safetensors")))
    content = path.read_bytes()
    form = case.rng.choice(("cut off", "empty", "zeros", "gone", "of another shape", "misnamed", "no record", "litter"))
    if form == "gone":
        path.unlink()
    elif form == "litter":
        for left in (folder / f".{path.name}.tmp-0123abcd", folder.parent / ".fit.json.tmp-0123abcd"):
            left.mkdir()
            (left / "new").write_bytes(content[:100])
            os.utime(left, (0, 0))
    elif form in ("of another shape", "misnamed", "no record"):
        tensors, metadata = _read(path)
        if not tensors:
            tensors = {"weight/x": torch.zeros(2)}
        name = min(tensors)
        tensor = tensors.pop(name) if form == "misnamed" else tensors[name]
        tensors[name + "x" * (form == "misnamed")] = tensor.reshape(-1)[:-1].clone() if "shape" in form else tensor
        _write(path, tensors, {} if form == "no record" else metadata)
    else:
        new = {"cut off": content[: case.rng.randrange(len(content))], "empty": b"", "zeros": b"\0" * len(content)}
        path.write_bytes(new[form])
    case.note = f"{path.relative_to(case.folder)}: {form}"
    return SAME if form in ("gone", "litter") else Right((0, 2), named=(path.name,))


# -- tokenizers -----------------------------------------------------------------------------------------------------


@mutator("tokenizer", only="evaluate-dense generate-dense fit evaluate-routed generate-routed")
def _a_tokenizer_that_does_not_fit(case: Case) -> Right:
    path = case.folder / "model" / "tokenizer.json"
    data = json.loads(path.read_text())
    form = case.rng.choice(("larger than the embedding", "an id beyond", "no vocabulary", "an unknown model", "a list"))
    vocabulary = data["model"]["vocab"]
    if form == "larger than the embedding":
        data["model"]["vocab"] = {token: number + 200 for token, number in vocabulary.items()}
        for token in data.get("added_tokens", []):
            token["id"] += 200
    elif form == "an id beyond":
        letter = next(token for token in vocabulary if token == "e")
        vocabulary[letter] = 5_000
    elif form == "no vocabulary":
        data["model"]["vocab"] = {}
        data["added_tokens"] = []
    elif form == "an unknown model":
        data["model"]["type"] = "Nonsense"
    else:
        data = [data]
    path.write_text(json.dumps(data))
    case.note = f"tokenizer.json: {form}"
    return refused("token", "model", "vocab")


# -- GGUF -----------------------------------------------------------------------------------------------------------


@mutator("gguf", uses="model.gguf")
def _no_gguf(case: Case) -> Right:
    path = case.folder / "model.gguf"
    content = path.read_bytes()
    form, new = case.rng.choice(
        [
            ("cut off", content[: case.rng.randrange(len(content) - 64)]),
            ("cut off in the header", content[: case.rng.randrange(2000)]),
            ("empty", b""),
            ("zeros", b"\0" * 1000),
            ("another magic", b"GGML" + content[4:]),
            ("version 1", content[:4] + struct.pack("<I", 1) + content[8:]),
            ("version 99", content[:4] + struct.pack("<I", 99) + content[8:]),
            ("big endian", content[:4] + struct.pack(">I", 3) + content[8:]),
            ("too many tensors", content[:8] + struct.pack("<Q", 2**40) + content[16:]),
            ("no tensors", content[:8] + struct.pack("<Q", 0) + content[16:]),
            ("too many fields", content[:16] + struct.pack("<Q", 2**40) + content[24:]),
            ("a long name", content[:24] + struct.pack("<Q", 2**50) + content[32:]),
        ]
    )
    path.write_bytes(new)
    case.note = f"model.gguf: {form}"
    return refused("model.gguf")


@mutator("gguf", uses="model.gguf")
def _a_field_of_gguf(case: Case) -> Right:
    """Fields found by their names: each is another model, and most cannot be."""
    path = case.folder / "model.gguf"
    content = bytearray(path.read_bytes())
    name, form, value = case.rng.choice(
        [
            ("llama.block_count", "<I", 3),
            ("llama.block_count", "<I", 0),
            ("llama.block_count", "<I", 1),
            ("llama.embedding_length", "<I", 32),
            ("llama.feed_forward_length", "<I", 1),
            ("llama.attention.head_count", "<I", 0),
            ("llama.attention.head_count", "<I", 3),
            ("llama.attention.head_count_kv", "<I", 7),
            ("llama.attention.layer_norm_rms_epsilon", "<f", float("nan")),
            ("llama.attention.layer_norm_rms_epsilon", "<f", -1.0),
            ("llama.rope.freq_base", "<f", float("nan")),
            ("llama.rope.freq_base", "<f", 0.0),
            ("llama.rope.dimension_count", "<I", 6),
            ("tokenizer.ggml.eos_token_id", "<I", 999_999),
            ("llama.context_length", "<I", 0),
        ]
    )
    key = name.encode()
    at = content.find(struct.pack("<Q", len(key)) + key) + 8 + len(key) + 4  # a length, the name, a type
    content[at : at + 4] = struct.pack(form, value)
    path.write_bytes(content)
    case.note = f"model.gguf: {name} = {value}"
    return refused("model.gguf")


def _text(name: str, value: str) -> bytes:
    """A field of text as the file has it: its name, type 8, and its length and letters."""
    return name.encode() + struct.pack("<IQ", 8, len(value)) + value.encode()


@mutator("gguf", uses="model.gguf")
def _a_text_of_gguf(case: Case) -> Right:
    """Names of as many letters as before."""
    path = case.folder / "model.gguf"
    old, new = case.rng.choice(
        [
            (_text("general.architecture", "llama"), _text("general.architecture", "lloma")),
            (_text("tokenizer.ggml.model", "gpt2"), _text("tokenizer.ggml.model", "gpt9")),
            (_text("tokenizer.ggml.pre", "gpt-2"), _text("tokenizer.ggml.pre", "gpt-9")),
            (b"blk.1.ffn_up.weight", b"blk.1.ffn_ap.weight"),
            (b"blk.0.attn_q.weight", b"blk.9.attn_q.weight"),
            (b"token_embd.weight", b"taken_embd.weight"),
            (b"output_norm.weight", b"autput_norm.weight"),
            (b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokins"),
            (b"llama.block_count", b"llama.black_count"),
            (b"llama.attention.head_count_kv", b"llama.attention.head_count_kx"),
        ]
    )
    content = path.read_bytes()
    assert old in content, old
    path.write_bytes(content.replace(old, new))
    case.note = f"model.gguf: {new[-30:]!r}"
    return refused("model.gguf")


@mutator("gguf", uses="model.gguf")
def _a_byte_of_the_gguf_header(case: Case) -> Right:
    path = case.folder / "model.gguf"
    content = bytearray(path.read_bytes())
    at = case.rng.randrange(24, 8000)
    content[at] ^= 1 << case.rng.randrange(8)
    path.write_bytes(content)
    case.note = f"model.gguf: byte {at}"
    return OTHER_OR_REFUSED


@mutator("gguf", uses="model.gguf")
def _gguf_elsewhere(case: Case) -> Right:
    name = case.rng.choice(("other name.gguf", "MODEL.GGUF", "ä.gguf", "a,b.gguf", "[bold].gguf"))
    (case.folder / "model.gguf").rename(case.folder / name)
    case.allowed |= {"model.gguf", name}
    case.rename("model.gguf", name)
    return SAME


# -- tables ---------------------------------------------------------------------------------------------------------


@mutator("table", uses="table.parquet")
def _no_table(case: Case) -> Right:
    path = case.folder / "table.parquet"
    content = path.read_bytes()
    form, new = case.rng.choice(
        [
            ("cut off", content[: case.rng.randrange(len(content))]),
            ("empty", b""),
            ("zeros", b"\0" * len(content)),
            ("another magic", b"PAR9" + content[4:]),
            ("a damaged footer", content[:-60] + b"\xff" * 52 + content[-8:]),
            ("text", b"domain,prompt_tokens\nstory,3\n"),
        ]
    )
    path.write_bytes(new)
    case.note = f"table.parquet: {form}"
    return SAME_OR_REFUSED if form == "another magic" else refused("table.parquet")


@mutator("table", uses="table.parquet")
def _another_table(case: Case) -> Right:
    import pyarrow
    import pyarrow.parquet

    path = case.folder / "table.parquet"
    table = pyarrow.parquet.ParquetFile(path).read(use_threads=False)
    name = case.rng.choice(("domain", "prompt_tokens", "executed", "loss_sum"))
    form = case.rng.choice(("missing", "text", "NaN", "negative", "no rows", "null", "no metadata", "more columns"))
    where = table.column_names.index(name)
    values = table.column(name).to_pylist()
    if form in ("text", "NaN", "negative") and name == "domain":
        name, where, values = "executed", table.column_names.index("executed"), table["executed"].to_pylist()
    right = refused("table", name)
    if form == "missing":
        table = table.drop_columns([name])
    elif form == "no rows":
        table = table.slice(0, 0)
    elif form == "no metadata":
        table = table.replace_schema_metadata(None)
        name = ""
    elif form == "more columns":
        table = table.append_column("notes", pyarrow.array(["x"] * len(table)))
        right = SAME
    else:
        new = {"text": "many", "NaN": float("nan"), "negative": -5.0, "null": None}[form]
        values = [str(value) for value in values] if form == "text" else values
        values = [float(v) for v in values] if form in ("NaN", "negative") else values
        values[case.rng.randrange(len(values))] = new
        table = table.set_column(where, name, pyarrow.array(values))
    if form == "negative" and name != "prompt_tokens":
        right = OTHER_OR_REFUSED
    pyarrow.parquet.write_table(table, path)
    case.note = f"table.parquet: {name} {form}"
    return right if form != "no metadata" else refused("table", "workload")


@mutator("table", uses="table.parquet")
def _a_byte_of_the_table(case: Case) -> Right:
    path = case.folder / "table.parquet"
    content = bytearray(path.read_bytes())
    at = case.rng.randrange(len(content))
    content[at] ^= 1 << case.rng.randrange(8)
    path.write_bytes(content)
    case.note = f"table.parquet: byte {at}"
    return OTHER_OR_REFUSED


@mutator("table", only="measure")
def _resumed_from_another_table(case: Case) -> Right:
    path = case.folder / "own.parquet"
    form = case.rng.choice(("damaged", "of another run", "empty"))
    path.write_bytes(case.world.make("table.parquet").read_bytes() if "run" in form else b"PAR1"[: 4 * ("d" in form)])
    case.arguments.append("--resume")
    case.note = f"own.parquet {form}"
    return refused("own.parquet")
