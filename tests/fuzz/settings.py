"""Mutations of settings: YAML files of users, and the JSON files of models, routing folders and tasks."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from .case import OTHER_OR_REFUSED, SAME, SAME_OR_REFUSED, Case, Right, mutator, refused

YAML_FILES = ("recipe.yaml", "grid.yaml", "nominal.yaml", "targets.yaml", "metrics.yaml")
Where = tuple[Any, ...]

BOMB = "\n".join([f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" if n else "a0: &a0 [x, x, x]" for n in range(12)])
"""A kilobyte that means gigabytes."""

_NO_NUMBER: tuple[Any, ...] = ("abc", [], {}, [1], float("nan"), float("inf"), True, "", {"a": 1}, "1 2")
_NO_TEXT: tuple[Any, ...] = (3, 1.5, [], {}, ["a"], {"a": "b"}, True)
_NO_LIST: tuple[Any, ...] = (3, "abc", {}, {"a": 1}, True)
_NO_MAPPING: tuple[Any, ...] = (3, "abc", [], [1, 2], True)


def leaves(value: Any, where: Where = ()) -> Iterator[tuple[Where, Any]]:
    """Every place of a nested value but the top, with what stands there."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*where, key), item
        yield from leaves(item, (*where, key))


def of_another_type(value: Any, rng: random.Random) -> Any:
    """What cannot stand where `value` stands."""
    if isinstance(value, bool):
        return rng.choice(("abc", [], {}, 3.5, [True]))
    if isinstance(value, (int, float)):
        return rng.choice(_NO_NUMBER)
    return rng.choice(_NO_TEXT if isinstance(value, str) else _NO_LIST if isinstance(value, list) else _NO_MAPPING)


def put(top: Any, where: Where, value: Any) -> None:
    for key in where[:-1]:
        top = top[key]
    top[where[-1]] = value


def dotted(where: Where) -> str:
    return ".".join(map(str, where))


def _file(case: Case) -> Path:
    return case.folder / case.rng.choice([name for name in YAML_FILES if name in case.command.inputs])


def _named(path: Path, where: Where) -> tuple[str, ...]:
    names = tuple(str(key) for key in where if isinstance(key, str))
    about = "workload" if path.stem == "nominal" else path.stem
    return (*names[-2:], path.name, about)


@mutator("yaml", uses=YAML_FILES)
def _of_another_type(case: Case) -> Right:
    path = _file(case)
    data = yaml.safe_load(path.read_text())
    where, old = case.rng.choice([found for found in leaves(data) if not isinstance(found[1], (list, dict))])
    new = of_another_type(old, case.rng)
    put(data, where, new)
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    case.note = f"{path.name}: {dotted(where)} = {new!r}"
    free = (path.name, where[-1]) in {("grid.yaml", "label")} or "methods" in where[-2:]
    return OTHER_OR_REFUSED if free else refused(*_named(path, where))


@mutator("yaml", uses=YAML_FILES)
def _a_part_of_another_type(case: Case) -> Right:
    path = _file(case)
    data = yaml.safe_load(path.read_text())
    where, old = case.rng.choice([found for found in leaves(data) if isinstance(found[1], (list, dict))])
    new = of_another_type(old, case.rng)
    put(data, where, new)
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    case.note = f"{path.name}: {dotted(where)} = {new!r}"
    if new in ([], {}) or (where[-1] in ("prompt_tokens", "output_tokens") and new == 3):
        return OTHER_OR_REFUSED  # empty may be a default; a number is a length that does not vary
    return refused(*_named(path, where))


@mutator("yaml", uses=YAML_FILES)
def _out_of_bounds(case: Case) -> Right:
    path = _file(case)
    data = yaml.safe_load(path.read_text())
    numbers = [
        (where, old)
        for where, old in leaves(data)
        if isinstance(old, (int, float)) and not isinstance(old, bool) and where[-1] != "seed"
    ]
    if not numbers:
        return _an_unknown_setting(case)
    where, _ = case.rng.choice(numbers)
    new = case.rng.choice((-1, -0.5, -(10**30)))
    put(data, where, new)
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    case.note = f"{path.name}: {dotted(where)} = {new!r}"
    return refused(*_named(path, where))


@mutator("yaml", uses=YAML_FILES)
def _beyond_all_bounds(case: Case) -> Right:
    """Far too large: refused, or what a large number means; never a hang, an overflow or exhausted memory."""
    path = _file(case)
    data = yaml.safe_load(path.read_text())
    numbers = [(where, old) for where, old in leaves(data) if isinstance(old, (int, float)) and old is not True]
    numbers = [found for found in numbers if found[0][-1] not in ("steps", "sweeps") and found[1] is not False]
    if not numbers:
        return _an_unknown_setting(case)
    where, _ = case.rng.choice(numbers)
    new = case.rng.choice((2**31, 2**63, 10**30, 10**400))
    put(data, where, new)
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    case.note = f"{path.name}: {dotted(where)} = {str(new)[:20]}"
    return OTHER_OR_REFUSED


@mutator("yaml", uses=YAML_FILES)
def _an_unknown_setting(case: Case) -> Right:
    path = _file(case)
    data = yaml.safe_load(path.read_text())
    places = [()] + [where for where, old in leaves(data) if isinstance(old, dict)]
    places = [where for where in places if isinstance(_at(data, where), dict)]
    places = [where for where in places if where[-1:] not in (("domains",), ("methods",), ("probabilities",))]
    where = case.rng.choice(places)
    old = case.rng.choice(sorted(map(str, _at(data, where))))
    new = case.rng.choice((old + "s", old[:-1] + "q", "nonsense", old.upper(), " " + old))
    value = _at(data, where).get(old, 1)
    if case.rng.random() < 0.5:
        _at(data, where).pop(old, None)
    _at(data, where)[new] = value
    path.write_text(yaml.safe_dump(data, sort_keys=False))
    case.note = f"{path.name}: {dotted((*where, new))}"
    return refused(new.strip(), old, *_named(path, (*where, old)))


def _at(top: Any, where: Where) -> Any:
    for key in where:
        top = top[key]
    return top


@mutator("yaml", uses=YAML_FILES)
def _written_another_way(case: Case) -> Right:
    path = _file(case)
    text = path.read_text()
    data = yaml.safe_load(text)
    as_json = json.dumps(data) if "probabilities" not in text else yaml.safe_dump(data, default_flow_style=True)
    form, new = case.rng.choice(
        [
            ("flow style", as_json + "\n"),
            ("sorted", yaml.safe_dump(data)),
            ("comments", text.strip().replace("\n", " # a comment\n") + "\n"),
            ("document marks", f"---\n{text.strip()}\n...\n"),
            ("byte order mark", "\ufeff" + text.lstrip()),
            ("line ends", text.replace("\n", "\r\n")),
            ("anchors", text + "\n"),
        ]
    )
    path.write_bytes(new.encode())
    case.note = f"{path.name}: {form}"
    return SAME


@mutator("yaml", uses=YAML_FILES)
def _no_settings_at_all(case: Case) -> Right:
    path = _file(case)
    text = path.read_text()
    form, new = case.rng.choice(
        [
            ("empty", b""),
            ("null", b"null\n"),
            ("a scalar", b"words\n"),
            ("a number", b"7\n"),
            ("two documents", f"{text}\n---\n{text}".encode()),
            ("not UTF-8", text.encode() + b"# \xff\xfe\n"),
            ("a null character", text.encode() + b"\0"),
            ("tabs", b"a:\n\tb: 1\n"),
            ("open quotes", text.encode() + b'\nx: "open\n'),
            ("binary", bytes(range(256))),
            ("deep nesting", b"a: " + b"[" * 50_000),
            ("deep nesting that ends", b"model: " + b"[" * 5_000 + b"]" * 5_000),
            ("an impossible date", text.encode() + b"\nx: 2026-02-30\n"),
            ("!!int abc", text.encode() + b"\nx: !!int abc\n"),
            ("5,000 digits", text.encode() + b"\nx: " + b"9" * 5_000 + b"\n"),
            ("a Python object", text.encode() + b"\nx: !!python/object/apply:os.system ['touch owned']\n"),
            ("an alias of nothing", text.encode() + b"\nx: *nothing\n"),
            ("an alias of itself", b"&a [*a]\n"),
            ("a bomb", BOMB.encode()),
            ("a bomb as model", f"{BOMB}\nmodel: *a11\n".encode()),
            ("a key that is a list", b"? [a, b]\n: 1\n"),
        ]
    )
    path.write_bytes(new)
    case.note = f"{path.name}: {form}"
    if form == "empty" and path.name == "recipe.yaml":
        return refused("recipe")
    return refused()


@mutator("yaml", uses=YAML_FILES)
def _a_bomb_in_a_setting(case: Case) -> Right:
    path = _file(case)
    data = yaml.safe_load(path.read_text())
    where, _ = case.rng.choice(list(leaves(data)))
    put(data, where, "BOMB")
    text = yaml.safe_dump(data, sort_keys=False).replace("BOMB", "*a11")
    if not text.startswith("- "):
        path.write_text(f"{BOMB}\n{text}")
    else:
        lines = BOMB.splitlines()
        path.write_text("- " + "\n  ".join(lines) + "\n" + text)
    case.note = f"{path.name}: {dotted(where)} is a bomb"
    return refused()


@mutator("yaml", uses=YAML_FILES)
def _a_setting_twice(case: Case) -> Right:
    """One of two values would be ignored."""
    path = _file(case)
    lines = path.read_text().strip().splitlines()
    keys = [line for line in lines if ":" in line and line.strip()[0] not in "-{" and not line.rstrip().endswith(":")]
    if not keys:
        path.write_text(path.read_text().replace("kind: ", "kind: quantile, kind: "))
        return refused()
    line = case.rng.choice(keys)
    name, _, value = line.partition(":")
    other = "0.125" if value.strip().replace(".", "").isdigit() else "other" if value.strip()[0] not in "{[" else "{}"
    lines.insert(lines.index(line), f"{name}: {other}")
    path.write_text("\n".join(lines) + "\n")
    case.note = f"{path.name}: {name.strip()} twice"
    return refused(name.strip(), path.name)


@mutator("yaml", uses=YAML_FILES)
def _cut_off(case: Case) -> Right:
    """What is left may be another file of settings."""
    path = _file(case)
    content = path.read_bytes()
    at = case.rng.randrange(len(content))
    path.write_bytes(content[:at])
    case.note = f"{path.name}: {at} of {len(content)} bytes"
    return OTHER_OR_REFUSED


@mutator("yaml", uses=YAML_FILES)
def _a_byte_changed(case: Case) -> Right:
    path = _file(case)
    content = bytearray(path.read_bytes())
    at = case.rng.randrange(len(content))
    content[at] = case.rng.choice(b"\0\t\"'{}[]:,&*!|>%@`#-0aZ\xff\x80 \n")
    path.write_bytes(content)
    case.note = f"{path.name}: byte {at} is {content[at]}"
    return OTHER_OR_REFUSED


@mutator("yaml", uses=("targets.yaml", "metrics.yaml"))
def _markup_in_a_name(case: Case) -> Right:
    path = case.folder / case.rng.choice(("targets.yaml", "metrics.yaml"))
    name = case.rng.choice(("[/b]", "[red]x", "a/b", "ä ö", "x" * 200, "[link=http://x]"))
    path.write_text(path.read_text().replace("name: mean", f"name: '{name}'").replace("name: short", f"name: '{name}'"))
    case.note = f"{path.name}: a name {name!r}"
    return OTHER_OR_REFUSED


@mutator("yaml", only="check")
def _a_target_outside_the_folder(case: Case) -> Right:
    name = case.rng.choice(("../../x", "/tmp/x-by-fuzz", "a/../../b", "..", "."))
    path = case.folder / "targets.yaml"
    path.write_text(path.read_text().replace("name: long", f"name: '{name}'"))
    case.replace("--only", name)
    case.note = f"target {name}"
    return refused(name)


# -- JSON -----------------------------------------------------------------------------------------------------------

_FREE = {"library_version", "revision", "method", "transformers_version", "_name_or_path", "backend"}
"""Settings that say where a file comes from, or that may be null: of another type they may be harmless or not."""


def _json_files(case: Case) -> list[Path]:
    """The JSON files that a command has to read."""
    names = {
        "routed": ["routing_config.json"],
        "tuned": ["routing_config.json", "lora/adapter_config.json"],
        "pruned": ["pruning.json"],
        "half": ["checkpoints/recipe.json"],
        "model": ["config.json", "tokenizer.json"],
    }
    return [case.folder / folder / name for folder in case.command.inputs for name in names.get(folder, ())]


JSON_FOLDERS = ("routed", "tuned", "pruned", "half", "model")


@mutator("json", uses=JSON_FOLDERS)
def _json_of_another_form(case: Case) -> Right:
    path = case.rng.choice(_json_files(case))
    data = json.loads(path.read_text())
    form = case.rng.choice(("compact", "sorted", "spread"))
    text = {
        "compact": json.dumps(data, separators=(",", ":")),
        "sorted": json.dumps(data, sort_keys=True, indent=1, ensure_ascii=True),
        "spread": "\r\n\t " + json.dumps(data, indent=8).replace("\n", "\r\n") + "\n\n",
    }[form]
    path.write_text(text, newline="")
    case.note = f"{path.relative_to(case.folder)}: {form}"
    if path.name == "recipe.json":
        return SAME_OR_REFUSED
    return SAME_OR_REFUSED if "model" in path.parts and form == "sorted" else SAME


@mutator("json", uses=JSON_FOLDERS)
def _json_that_is_none(case: Case) -> Right:
    path = case.rng.choice(_json_files(case))
    content = path.read_bytes()
    form, new = case.rng.choice(
        [
            ("cut off", content[: case.rng.randrange(len(content) - 2)]),
            ("empty", b""),
            ("a list", b"[]"),
            ("null", b"null"),
            ("a number", b"3"),
            ("an empty object", b"{}"),
            ("zeros", b"\0" * len(content)),
            ("UTF-16", content.decode().encode("utf-16")),
            ("not UTF-8", content.replace(b'"', b'"\xff', 1)),
            ("deep nesting", b'{"a":' * 100_000),
            ("a comma too many", content.rstrip().removesuffix(b"}") + b",}"),
            ("two objects", content + content),
        ]
    )
    path.write_bytes(new)
    case.note = f"{path.relative_to(case.folder)}: {form}"
    return refused(path.name, *path.parts[-2:])


@mutator("json", uses=("routed", "tuned", "pruned", "half"))
def _a_field_of_another_type(case: Case) -> Right:
    path = case.rng.choice([path for path in _json_files(case) if "model" not in path.parts])
    data = json.loads(path.read_text())
    where, old = case.rng.choice([found for found in leaves(data) if found[1] is not None and "report" not in found[0]])
    new = of_another_type(old, case.rng)
    put(data, where, new)
    path.write_text(json.dumps(data))
    case.note = f"{path.relative_to(case.folder)}: {dotted(where)} = {new!r}"
    if path.name == "adapter_config.json":
        return Right((0, 2), named=("lora", "adapter"))
    return SAME_OR_REFUSED if set(where) & _FREE else refused(path.name, *_named(path, where))


@mutator("json", uses=("routed", "tuned", "pruned"))
def _a_field_missing_or_unknown(case: Case) -> Right:
    """A field without a default is missed; a default may stand in for nothing else than itself."""
    path = case.rng.choice([path for path in _json_files(case) if "model" not in path.parts])
    data = json.loads(path.read_text())
    where, old = case.rng.choice([f for f in leaves(data) if isinstance(f[0][-1], str) and "report" not in f[0]])
    parent = _at(data, where[:-1])
    if case.rng.random() < 0.5:
        parent[f"{where[-1]}_"] = old
        case.note = f"{path.relative_to(case.folder)}: unknown {dotted(where)}_"
        path.write_text(json.dumps(data))
        return SAME_OR_REFUSED
    del parent[where[-1]]
    case.note = f"{path.relative_to(case.folder)}: without {dotted(where)}"
    path.write_text(json.dumps(data))
    return OTHER_OR_REFUSED if set(where) & {"sparsity", "budget", "calibration_context", "kv"} else SAME_OR_REFUSED


@mutator("json", uses=("routed", "tuned"))
def _a_routing_folder_that_contradicts_itself(case: Case) -> Right:
    folder = case.rng.choice([name for name in ("routed", "tuned") if name in case.command.inputs])
    path = case.folder / folder / "routing_config.json"
    data = json.loads(path.read_text())
    where, new = case.rng.choice(
        [
            (("format_version",), 999),
            (("num_layers",), 4),
            (("num_layers",), 2),
            (("hidden_size",), 32),
            (("forecaster", "rank"), 5),
            (("forecaster", "activation"), "silu"),
            (("router", "kind"), "mlp"),
            (("router", "kind"), "low-rank"),
            (("base_model", "fingerprint"), "0" * 64),
            (("base_model", "name"), "nowhere/at-all"),
            (("base_model", "name"), ""),
            (("base_model", "name"), folder),
            (("base_model", "model_type"), "gpt2"),
            (("thresholds",), []),
            (("thresholds", 0, "threshold"), float("nan")),
            (("thresholds", 0, "units"), float("nan")),
            (("thresholds", 0, "units"), 7.0),
            (("thresholds", 0, "macs"), float("-inf")),
            (("sparsity",), 1.5),
            (("sparsity",), -0.1),
            (("budget",), "euros"),
            (("kv",), "lose"),
            (("calibration_context",), -3),
            (("selection", "first_layer"), 99),
        ]
    )
    put(data, where, new)
    path.write_text(json.dumps(data))
    case.note = f"{folder}: {dotted(where)} = {new!r}"
    return refused("routing_config", "routed", "tuned", "calibrated", *_named(path, where))


@mutator("json", only="evaluate-dense generate-dense fit prune evaluate-routed")
def _a_model_that_contradicts_itself(case: Case) -> Right:
    path = case.folder / "model" / "config.json"
    data = json.loads(path.read_text())
    name, new = case.rng.choice(
        [
            ("num_hidden_layers", 2),
            ("num_hidden_layers", 5),
            ("num_hidden_layers", 0),
            ("num_hidden_layers", -1),
            ("num_hidden_layers", "three"),
            ("hidden_size", 32),
            ("hidden_size", 0),
            ("intermediate_size", 96),
            ("num_attention_heads", 0),
            ("num_attention_heads", 5),
            ("vocab_size", 100),
            ("vocab_size", 300),
            ("vocab_size", 10**12),
            ("rms_norm_eps", float("nan")),
            ("rms_norm_eps", "small"),
            ("rms_norm_eps", -1.0),
            ("hidden_act", "nonsense"),
            ("model_type", "nonsense"),
            ("model_type", "gpt2"),
            ("model_type", None),
            ("architectures", ["GPT2LMHeadModel", 3]),
            ("rope_parameters", {"rope_type": "nonsense", "rope_theta": 1e4}),
            ("rope_parameters", {"rope_type": "default", "rope_theta": "warm"}),
            ("auto_map", {"AutoModelForCausalLM": "owned.Model", "AutoConfig": "owned.Config"}),
            ("quantization_config", {"quant_method": "nonsense"}),
            ("dtype", "float99"),
        ]
    )
    data[name] = new
    if name == "auto_map":
        owned = "from pathlib import Path\nPath('owned').write_text('')\n"
        (path.parent / "owned.py").write_text(owned)
    path.write_text(json.dumps(data))
    case.note = f"model/config.json: {name} = {new!r}"
    return SAME_OR_REFUSED if name in ("architectures", "auto_map") else refused("model", name)


@mutator("json", uses="half")
def _settings_of_a_fit_that_went_on(case: Case) -> Right:
    """A resumed fit keeps its recipe; another one is refused."""
    name, value = case.rng.choice([("--rank", "5"), ("--seed", "3"), ("--sparsity", "0.3"), ("--steps", "4")])
    case.arguments += [name, value]
    case.note = f"resumed with {name} {value}"
    return refused("another recipe", "half", "recipe")


@mutator("json", only="evaluate-tasks")
def _damaged_task_files(case: Case) -> Right:
    path = case.folder / "data" / "tasks" / "boolq" / "validation.jsonl"
    rows = path.read_text().splitlines()
    form, new = case.rng.choice(
        [
            ("no rows", ""),
            ("no JSON", "\n".join([*rows, "{"])),
            ("a list", "\n".join(["[1]", *rows])),
            ("a missing field", "\n".join(row.replace('"passage"', '"passages"') for row in rows)),
            ("a label of text", "\n".join(row.replace('"label": 0', '"label": "no"') for row in rows)),
            ("a label out of range", "\n".join(row.replace('"label": 0', '"label": 7') for row in rows)),
            ("a null question", "\n".join(row.replace('"question": "', '"question": null, "was": "') for row in rows)),
        ]
    )
    path.write_text(new)
    case.note = f"boolq: {form}"
    if form in ("a label of text", "a null question"):
        return OTHER_OR_REFUSED  # a label may be a choice in words; the harness prints None, as it does for the Hub
    return refused("boolq")
