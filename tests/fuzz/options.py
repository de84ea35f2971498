"""Mutations of the command line."""

from __future__ import annotations

import functools
import importlib
import os
import stat
import threading
import typing
from typing import Any

from .case import OTHER, OTHER_OR_REFUSED, SAME, SAME_OR_REFUSED, Case, Right, mutator, refused

NO_INTEGER = ("abc", "", "1.5", "nan", "0x10", "1e3", "--", "None", "[1]")
BELOW = ("-1", "-2147483649", "-99999999999999999999")
NO_SHARE = ("abc", "nan", "inf", "-inf", "1e400", "-0.1", "1", "1.5", "25", "")
NO_PATH = (
    "nowhere/at/all",
    "./missing",
    "~nosuchuser/x",
    "x" * 300,
    "a" * 5000,
    "no\udcff-utf-8",
    "[/b]",
    "missing.jsonl",
    "$HOME/x",
)
REQUIRED = ("--out", "-o", "--prompt", "-p", "--method", "--workload", "--targets")
SHORT = {
    "--sparsity": ("-s",),
    "--prompts": ("-n",),
    "--max-new-tokens": ("-n",),
    "--prompt": ("-p",),
    "--out": ("-o",),
}


@functools.cache
def option_names(words: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Of each kind of value (int, float, Literal, ...), the long names of a command's options that take one."""
    module = importlib.import_module(f"informed_routing.cli.{words[0]}")
    found: dict[str, list[str]] = {}
    for hint in getattr(module, words[-1]).__annotations__.values():
        inner, *rest = typing.get_args(hint)
        given = [
            name for one in rest for name in (getattr(one, "default", None), *(getattr(one, "param_decls", None) or ()))
        ]
        names = [name for name in given if str(name).startswith("--")]  # the first one is kept as the default
        text = str(inner)
        kind = next(
            (kind for kind in ("Literal", "float", "int", "bool") if kind in text or kind in repr(inner)), "other"
        )
        for name in names[:1]:
            found.setdefault(kind, []).append(name)
    return {kind: tuple(sorted(names)) for kind, names in found.items()}


def _of_type(case: Case, kind: str) -> tuple[str, ...]:
    return option_names(tuple(case.command.arguments[: case.command.words])).get(kind, ())


def _give(case: Case, name: str, value: str) -> None:
    """Write an option with `=`, so that values that begin with a dash are values."""
    for known in (name, *SHORT.get(name, ())):
        while known in case.arguments:
            at = case.arguments.index(known)
            del case.arguments[at : at + 2]
    case.arguments.append(f"{name}={value}")
    case.note = f"{name}={value[:40]!r}"


@mutator("same")
def _identity(case: Case) -> Right:
    return SAME


@mutator("same")
def _options_in_another_order(case: Case) -> Right:
    words, rest = case.command.words, case.command.arguments
    groups, at = [], words
    while at < len(rest):
        size = 1 if rest[at] in ("-q", "--resume", "--dry-run") or not rest[at].startswith("-") else 2
        groups.append(rest[at : at + size])
        at += size
    plain = [group for group in groups if not group[0].startswith("-")]
    options = [group for group in groups if group[0].startswith("-")]
    repeated = [group for group in options if sum(other[0] == group[0] for other in options) > 1]
    options = [group for group in options if group not in repeated]
    case.rng.shuffle(options)
    if case.rng.random() < 0.5:
        options = [(f"{g[0]}={g[1]}",) if len(g) == 2 and g[0].startswith("--") else g for g in options]
    case.arguments = [*rest[:words], *(part for group in [*options, *plain, *repeated] for part in group)]
    return SAME


@mutator("same")
def _what_is_the_default_anyway(case: Case) -> Right:
    name, value = case.rng.choice(
        [("--device", "cpu"), ("--threads", "1"), ("--seed", "17"), ("--debug", ""), ("--device", "auto")]
    )
    if name in case.arguments:
        return SAME
    case.arguments += [name, value] if value else [name]
    case.note = f"{name} {value}"
    return SAME


@mutator("same")
def _paths_written_another_way(case: Case) -> Right:
    forms = [lambda name: f"./{name}", lambda name: f"../run/{name}", lambda name: str(case.folder / name)]
    case.note = "inputs by other paths"
    names = [name for name in (*case.command.inputs, *case.command.outputs) if name in case.arguments]
    for name in names:
        case.rename(name, case.rng.choice(forms)(name))
    if case.command.name == "fit-resume":
        return OTHER_OR_REFUSED  # the recipe that it was begun with names them as they were
    if "study" in case.command.name:
        return OTHER  # cells carry the model's reference in their names
    return SAME


@mutator("option")
def _an_integer_that_is_none(case: Case) -> Right:
    name = case.rng.choice(_of_type(case, "int"))
    value = case.rng.choice(NO_INTEGER)
    _give(case, name, value)
    return refused(name, name.lstrip("-"))


@mutator("option")
def _an_integer_below_its_bound(case: Case) -> Right:
    name = case.rng.choice(_of_type(case, "int"))
    _give(case, name, case.rng.choice(BELOW))
    return refused(name, name.strip("-").replace("-", "_"))


@mutator("option")
def _an_integer_beyond_all_bounds(case: Case) -> Right:
    """A count of things that there are fewer of may be valid; what is computed must be refused."""
    name = case.rng.choice(_of_type(case, "int"))
    _give(case, name, case.rng.choice(("2147483648", "4294967296", "9223372036854775808", "9" * 30)))
    # So many prompts may not fit in memory, which is then what is said.
    return Right((0, 1, 2) if name == "--prompts" else (0, 2), False)


@mutator("option")
def _no_number_or_no_share(case: Case) -> Right:
    names = _of_type(case, "float")
    if not names:
        return _unknown_option(case)
    name = case.rng.choice(names)
    values = NO_SHARE if name in ("--sparsity", "--delta") else ("abc", "nan", "inf", "-inf", "-0.1", "")
    _give(case, name, case.rng.choice(values))
    if name == "--sparsity" and case.command.name in ("evaluate-dense", "generate-dense") and "=" in case.arguments[-1]:
        return refused("sparsity", "dense")
    return refused(name, name.lstrip("-"), "sparsity")


@mutator("option")
def _no_choice_of_those(case: Case) -> Right:
    name = case.rng.choice(["--dtype", "--device", *_of_type(case, "Literal")])
    value = case.rng.choice(("nonsense", "", "FLOAT32", "float 32", "float64", "meta", "mps", "xpu", "hpu", "cuda:-1"))
    _give(case, name, value)
    if name == "--device" and value == "":
        return refused("device")
    return refused(name, name.lstrip("-"), "evice", value)


@mutator("option")
def _an_input_that_is_not_there(case: Case) -> Right:
    value = case.rng.choice(NO_PATH)
    named = [name for name in case.command.inputs if name in case.arguments]
    name = case.rng.choice(named)
    case.rename(name, value)
    case.note = f"{name} -> {value[:30]!r}"
    return refused()


@mutator("option")
def _an_input_of_another_kind(case: Case) -> Right:
    """A folder for a file, a file for a folder, an empty folder, a loop of links, a device."""
    named = [name for name in case.command.inputs if name in case.arguments and name != "model"]
    name = case.rng.choice(named or ["model"])
    other = case.folder / "other"
    kind = case.rng.choice(("folder", "file", "loop", "dangling", "null", "fifo"))
    if kind == "folder":
        other.mkdir()
    elif kind == "file":
        other.write_text("nothing of interest\n")
    elif kind in ("loop", "dangling"):
        other.symlink_to("other" if kind == "loop" else "gone")
    elif kind == "null" and os.geteuid() == 0:
        os.mknod(other, stat.S_IFCHR | 0o666, os.makedev(1, 3))
    else:
        os.mkfifo(other)
        threading.Thread(target=_write_once, args=(other,), daemon=True).start()
    case.rename(name, "other")
    case.note = f"{name} is a {kind}"
    return refused()


def _write_once(fifo: Any) -> None:
    import contextlib

    with contextlib.suppress(OSError), open(fifo, "wb") as file:  # noqa: PTH123 (blocks until somebody reads)
        file.write(b"nothing of interest\n")


@mutator("option")
def _unknown_option(case: Case) -> Right:
    options = [part for part in case.arguments if part.startswith("--")]
    word = case.rng.choice(options)
    at = case.rng.randrange(2, len(word))
    misspelt = case.rng.choice([word[:at] + word[at + 1 :], word[:at] + "z" + word[at:], word + "s", word.upper()])
    if misspelt in (word, "--"):
        misspelt = "--nonsense"
    case.arguments[case.arguments.index(word)] = misspelt
    case.note = misspelt
    return refused(misspelt, "Missing", "--help")


@mutator("option")
def _an_argument_too_many(case: Case) -> Right:
    if case.command.name.startswith("study"):
        case.arguments.insert(1, "no-such-study")
        return refused("no-such-study")
    case.arguments.append("surplus")
    return refused("surplus")


@mutator("option")
def _an_argument_too_few(case: Case) -> Right:
    words = case.command.words
    there = [name for name in REQUIRED if name in case.arguments]
    if there and case.rng.random() < 0.5:
        name = case.rng.choice(there)
        del case.arguments[case.option(name) - 1 : case.option(name) + 1]
        case.note = f"no {name}"
        return refused("Missing")
    case.arguments = case.arguments[: case.rng.randrange(words)] if case.rng.random() < 0.3 else case.arguments[:words]
    case.note = "only the command"
    case.silent = len(case.arguments) < words  # the help is what is shown then
    return refused("Missing")


@mutator("option")
def _an_option_without_its_value(case: Case) -> Right:
    case.arguments.append(case.rng.choice(("--seed", "--json", "--device")))
    return refused(case.arguments[-1])


@mutator("option")
def _given_twice(case: Case) -> Right:
    """The last one counts, as everywhere."""
    words = case.command.words
    case.arguments = [*case.arguments[:words], "--threads", "2", *case.arguments[words:]]
    return SAME_OR_REFUSED


@mutator("option", only="generate-routed generate-dense")
def _sampling(case: Case) -> Right:
    name, value = case.rng.choice(
        [
            ("--temperature", "nan"),
            ("--temperature", "inf"),
            ("--temperature", "-1"),
            ("--top-p", "nan"),
            ("--top-p", "0"),
            ("--top-p", "1.01"),
            ("--num-beams", "0"),
            ("--prompt", " "),
            ("--prompt", ""),
            ("--prompt", "\t\n"),
        ]
    )
    _give(case, name, value)
    return refused(name, "prompt")


@mutator("option", only="generate-routed generate-dense")
def _prompt_from_stdin(case: Case) -> Right:
    case.replace("-p", "-")
    case.stdin, right = case.rng.choice(
        [
            (b"the-river", SAME),
            (b"", refused("prompt")),
            (b" \n", refused("prompt")),
            (b"\xff\xfe", refused("prompt", "UTF-8", "stdin")),
            (None, refused("stdin", "prompt")),
        ]
    )
    case.note = f"stdin {case.stdin!r}"
    return Right(right.codes, False, right.named) if right is SAME else right


@mutator("option", only="generate-dense evaluate-dense")
def _of_routed_models_only(case: Case) -> Right:
    options = [("--budget", "macs"), ("--execution", "native"), ("--weights", "int8"), ("--base", "model")]
    if case.command.name.startswith("generate"):
        options += [("--kv", "drop"), ("--show-routing", "")]
    name, value = case.rng.choice(options)
    case.arguments += [name, value] if value else [name]
    case.note = f"{name} {value}"
    return refused(name, "dense", value or name)


@mutator("option", only="prune")
def _settings_of_a_method(case: Case) -> Right:
    value = case.rng.choice(
        (
            "x=[",
            "method=1",
            "model=1",
            "rows=1",
            "sparsity=1",
            "progress=1",
            "=",
            "keep_first",
            "keep_first=abc",
            "keep_first=-1",
            "keep_first=99",
            "keep_first=null",
            "nonsense=3",
            "keep_first=1.5",
            "keep_first=!!int abc",
        )
    )
    case.arguments += ["--set", value]
    case.note = value
    return refused("--set", value.partition("=")[0] or "--set", "sparsity")


@mutator("option", only="fit fit-lora")
def _settings_of_stages(case: Case) -> Right:
    name, value = case.rng.choice(
        [
            ("--stages", "lora,fly"),
            ("--stages", ""),
            ("--stages", ","),
            ("--budget", "euros"),
            ("--objective", "fun"),
            ("--router", "oracle"),
            ("--rank", "0"),
            ("--rank", "65"),
            ("--steps", "0"),
            ("--sparsity", "0"),
            ("--sequence-length", "100000"),
        ]
    )
    _give(case, name, value)
    return refused()


@mutator("option", only="evaluate-tasks")
def _tasks_that_cannot_be(case: Case) -> Right:
    value = case.rng.choice(
        ("boolq@-1", "boolq@x", "nope", "boolq,,boolq", "boolq@99999", "", "boolq@0,boolq@0", "[/b]")
    )
    _give(case, "--tasks", value)
    return refused()


@mutator("option", only="predict check")
def _delta_and_only(case: Case) -> Right:
    if case.command.name == "check" and case.rng.random() < 0.5:
        _give(case, "--only", case.rng.choice(("nobody", "", "long,short", "[/b]")))
        return refused("target", "--only")
    _give(case, "--delta", case.rng.choice(("0", "1", "-1", "nan", "2")))
    return refused("delta")


@mutator("option", only="measure check evaluate-routed")
def _domains_and_texts(case: Case) -> Right:
    name = "--data" if case.command.name.startswith("evaluate") else "--domain"
    values = (
        ("", "demo:nothing", ",", "text.jsonl,", "*.nope") if name == "--data" else ("story", "=x", "story=", "a=b")
    )
    _give(case, name, case.rng.choice(values))
    return refused()


# -- where results go -----------------------------------------------------------------------------------------------


@mutator("target")
def _json_to_stdout(case: Case) -> Right:
    case.replace("--json", "-")
    return OTHER


@mutator("target")
def _json_where_it_cannot_be(case: Case) -> Right:
    value = case.rng.choice(("no/folder/x.json", ".", "", "x" * 300, "/", "no\udcff/x.json", "~nosuchuser/x.json", "~"))
    case.replace("--json", value)
    case.note = f"--json {value[:30]!r}"
    return refused("--json", "~nosuchuser")


@mutator("target")
def _json_into_something_special(case: Case) -> Right:
    """A device and a pipe stay what they are, and get the text."""
    target = case.folder / "special"
    case.replace("--json", "special")
    if case.rng.random() < 0.5 and os.geteuid() == 0:
        os.mknod(target, stat.S_IFCHR | 0o666, os.makedev(1, 3))
        case.note = "--json to a null device"
    else:
        os.mkfifo(target)
        threading.Thread(target=_read_all, args=(target,), daemon=True).start()
        case.note = "--json to a pipe"
    return OTHER


def _read_all(fifo: Any) -> None:
    with open(fifo, "rb") as file:  # noqa: PTH123 (blocks until somebody writes)
        file.read()


@mutator("target")
def _json_is_an_input(case: Case) -> Right:
    """The input is not replaced by the result."""
    files = [name for name in case.command.inputs if name in case.arguments and "." in name]
    if not files:
        return _json_where_it_cannot_be(case)
    name = case.rng.choice(files)
    case.replace("--json", name)
    case.note = f"--json {name}"
    return refused("--json")


@mutator("target", only="fit fit-lora prune")
def _out_that_holds_other_things(case: Case) -> Right:
    out = case.folder / "out"
    out.mkdir()
    name = case.rng.choice(("thesis.txt", ".git", ".env", "model.safetensors", "routing_config.json.bak"))
    if name == ".git":
        (out / ".git").mkdir()
        (out / ".git" / "HEAD").write_text("ref: refs/heads/main\n")
    else:
        (out / name).write_text("years of work")
    more = case.rng.choice(("", "--overwrite", "--resume"))
    case.arguments += [more] if more else []
    case.note = f"--out with {name} {more}"
    return refused("out")


@mutator("target", only="fit fit-lora prune")
def _out_that_cannot_be(case: Case) -> Right:
    value = case.rng.choice(("model", "text.jsonl", "text.jsonl/out", ".", "", "x" * 300, "no\udcff"))
    case.replace("--out", value)
    more = case.rng.choice(("", "--overwrite"))
    case.arguments += [more] if more else []
    case.note = f"--out {value[:20]!r} {more}"
    return refused()


@mutator("target", only="fit prune")
def _out_in_new_folders(case: Case) -> Right:
    value = case.rng.choice(("out/a/b", "out/", "out/ä ö", "out/[b]x[/b]", "out/a,b"))
    case.replace("--out", value)
    case.note = f"--out {value}"
    return OTHER


@mutator("target", only="fit fit-lora prune")
def _overwrite_and_resume(case: Case) -> Right:
    case.arguments += ["--overwrite", "--resume"]
    return refused("--overwrite", "--resume")


@mutator("target", only="study study-list")
def _study_into_a_file(case: Case) -> Right:
    case.replace("--out", case.rng.choice(("grid.yaml", "grid.yaml/x", "")))
    return refused("out")


@mutator("target", only="predict measure")
def _results_where_they_cannot_be(case: Case) -> Right:
    plots = (("--plot", "no/folder/x.svg"), ("--plot", "targets.yaml"), ("--plot", "table.parquet"))
    tables = (("-o", "text.jsonl"), ("-o", "nominal.yaml"), ("-o", "model"))
    name, value = case.rng.choice(plots if case.command.name == "predict" else tables)
    case.replace(name, case.rng.choice((value, ".", "", "x" * 300)))
    case.note = f"{name} {case.arguments[case.option(name)][:20]!r}"
    return refused()
