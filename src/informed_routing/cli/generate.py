"""`generate`: text from a routed model, and how much of the model each token used."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from informed_routing.errors import InputError

from .common import (
    BaseOption,
    Common,
    ExecutionOption,
    Session,
    WeightsOption,
    check_at_least,
    check_sparsities,
    dtype_name,
    session,
    with_common,
)
from .loading import HoldOption, PolicyOption
from .streams import read_stdin

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from .loading import Loaded

_SAMPLING = "Sampling"
_COLDEST = 1e-3  # below, logits over the temperature leave the range of numbers


@with_common
def generate(
    common: Common,
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Routing folder, or any dense model to compare with.")],
    prompt: Annotated[
        list[str], typer.Option("--prompt", "-p", metavar="TEXT", help="Prompt; - reads stdin. Repeatable.")
    ],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Tokens to add at most.")] = 64,
    sparsity: Annotated[
        float | None, typer.Option("--sparsity", "-s", help="0 is dense [default: as trained].")
    ] = None,
    budget: Annotated[
        Literal["units", "macs", "latency"] | None,
        typer.Option("--budget", help="What --sparsity is measured in [default: as trained]."),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    show_routing: Annotated[
        bool, typer.Option("--show-routing", help="Colour tokens by the share of the model that they used.")
    ] = False,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", help="Sample [default: greedy].", rich_help_panel=_SAMPLING),
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", help="Sample from the likeliest tokens of this mass.", rich_help_panel=_SAMPLING),
    ] = None,
    num_beams: Annotated[int, typer.Option("--num-beams", help="Beam search.", rich_help_panel=_SAMPLING)] = 1,
    kv: Annotated[
        Literal["keep", "drop"] | None,
        typer.Option("--kv", help="Keep or drop the keys and values of approximated tokens [default: as trained]."),
    ] = None,
    execution: ExecutionOption = "auto",
    weights: WeightsOption = None,
    policy: PolicyOption = None,
    hold: HoldOption = False,
    base: BaseOption = None,
) -> None:
    """Generate text, really skipping work.

    Example: informed-routing generate out --prompt "The river" --sparsity 0.25 --show-routing
    """
    targets = check_sparsities([] if sparsity is None else [sparsity])
    check_at_least("--max-new-tokens", [max_new_tokens], 1)
    check_at_least("--num-beams", [num_beams], 1)
    settings = _sampling(temperature, top_p, num_beams)
    prompts = [_read(text) for text in prompt]
    with session("generate", common) as run:
        from .loading import (
            DENSE_ENGINE,
            check_shares,
            choose_execution,
            decision_of,
            kind_of,
            load_any,
            refuse_for_dense,
            refuse_idle,
            say_engine,
        )

        kind = kind_of(folder)
        refuse_for_dense(
            folder,
            kind,
            targets,
            budget=budget,
            show_routing=show_routing,
            kv=kv,
            execution=None if execution == "auto" else execution,
            weights=weights,
            policy=policy,
            hold=hold,
            base=base,
        )
        engine = DENSE_ENGINE
        if kind == "routed":
            config = check_shares(folder, targets, budget, decision="threshold")  # the rule that can generate
            chosen = targets[0] if targets else config.sparsity
            decision = decision_of(hold, kv or config.kv, policy)
            check_shares(folder, [chosen], budget if targets else None, decision)
            if not chosen:
                idle = {"kv": kv, "policy": policy if policy == "auto" else None, "hold": hold}
                refuse_idle("at sparsity 0 all is executed", "Leave it out, or give another --sparsity", **idle)
        loaded = load_any(folder, run, base)
        if loaded.routed:
            engine = choose_execution(run, loaded.model, execution, weights, kv, policy, decision=decision)
            loaded.model.set_sparsity(chosen, budget, decision=decision)
        say_engine(run, engine)
        samples = [
            generate_sample(run, loaded, text, max_new_tokens, chat=chat, routing=show_routing, **settings)
            for text in prompts
        ]
        run.finish(
            {"samples": samples, "engine": engine, **({"decision": decision} if loaded.routed else {})},
            lambda console: show_samples(console, samples),
            model=folder,
            dtype=dtype_name(loaded.model),
        )


def generate_sample(
    run: Session,
    loaded: Loaded,
    prompt: str,
    max_new_tokens: int,
    *,
    chat: bool = False,
    routing: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """One prompt continued: text, realised sparsity, and with `routing` the share executed of each token.

    Raises WorkError at the first step whose logits are not finite numbers.
    """
    import torch
    from transformers import LogitsProcessorList

    from informed_routing.evaluation.numbers import FiniteLogits

    model, tokenizer = loaded.model, loaded.tokenizer
    tokens = _encode(tokenizer, prompt, chat)
    if not tokens:
        raise InputError(
            f"the tokenizer makes no tokens of the prompt {prompt[:40]!r}", "Check the model's tokenizer.json"
        )
    ids = torch.tensor([tokens], device=model.device)
    run.progress.stage("generate", 0)
    if loaded.routed:
        model.reset_routing_stats()
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    check: Any = FiniteLogits(model, ids.shape[1])
    with torch.inference_mode():
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=pad,
            logits_processor=LogitsProcessorList([check]),
            **settings,
        )
    new = output[0, ids.shape[1] :]
    run.progress.advance(len(new))
    sample: dict[str, Any] = {
        "prompt": prompt,
        "chat": chat,
        "text": tokenizer.decode(new, skip_special_tokens=True),
        "new_tokens": len(new),
    }
    if loaded.routed:
        from informed_routing.evaluation.perplexity import sparsity_record

        stats = model.routing_stats()
        sample["sparsity"] = sparsity_record(stats, float(stats["target"] or 0.0))
    if routing:
        # one pass over the finished text: what a token uses depends only on the tokens before it
        with torch.inference_mode():
            model(input_ids=output[:1], use_cache=False, logits_to_keep=1)
        compute = model.token_compute()
        shares = compute[0].tolist() if sample["sparsity"]["target"] else [1.0] * output.shape[1]
        sample["prompt_tokens"] = ids.shape[1]
        sample["tokens"] = [
            {"token": token, "executed": share, "generated": position >= ids.shape[1]}
            for position, token, share in merge_pieces(tokenizer, output[0].tolist(), shares)
        ]
    return sample


def merge_pieces(tokenizer: Any, ids: Sequence[int], shares: Sequence[float]) -> list[tuple[int, str, float]]:
    """(position, text, share executed) of each token; tokens that are parts of one character are joined."""
    merged: list[tuple[int, str, float]] = []
    start = 0
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[start:end])
        if text.endswith("\N{REPLACEMENT CHARACTER}") and end - start < 4 and end < len(ids):
            continue  # an unfinished UTF-8 sequence; it has at most four bytes
        merged.append((start, text, sum(shares[start:end]) / (end - start)))
        start = end
    return merged


def show_samples(console: Console, samples: Sequence[dict[str, Any]]) -> None:
    """Texts as they are, or coloured with a legend; then what was really approximated."""
    from .tables import share_cells

    for number, sample in enumerate(samples):
        if number:
            console.print()
        if "tokens" in sample:
            _show_tokens(console, sample["tokens"])
        else:
            between = "\n" if sample["chat"] else ""
            console.print(sample["prompt"] + between + sample["text"], markup=False, soft_wrap=True)
        if "sparsity" in sample:
            units, attention, ffn, macs = share_cells(sample["sparsity"])
            console.print(
                f"[approximated: {units} of units (attention {attention}, ffn {ffn}); MACs saved: {macs}]",
                markup=False,
                soft_wrap=True,
            )


def _show_tokens(console: Console, tokens: Sequence[dict[str, Any]]) -> None:
    from rich.text import Text

    low = min(token["executed"] for token in tokens)
    high = max(token["executed"] for token in tokens)
    if console.color_system is None:  # a pipe: say it in numbers
        for token in tokens:
            console.print(f"{token['executed']:4.0%}  {token['token']!r}", markup=False, soft_wrap=True)
        return
    line = Text()
    for token in tokens:
        style = colour(token["executed"], low, high)
        line.append(token["token"], f"{style} underline" if token["generated"] else style)
    console.print(line, soft_wrap=True)
    console.print(_legend(low, high))


def _legend(low: float, high: float) -> Text:
    from rich.text import Text

    legend = Text("[share of the units executed: ", "dim")
    for step in range(5):
        share = low + (high - low) * step / 4
        legend.append(f" {share:.0%} ", colour(share, low, high))
    return legend.append(" underlined: generated]", "dim")


def colour(share: float, low: float, high: float) -> str:
    """A rich style from blue (few units executed, `low`) over violet to red (`high`)."""
    warmth = (share - low) / (high - low) if high > low else 1.0
    return f"rgb({round(70 + 185 * warmth)},{round(130 - 70 * warmth)},{round(255 - 195 * warmth)})"


def _sampling(temperature: float | None, top_p: float | None, num_beams: int) -> dict[str, Any]:
    """Arguments for transformers' generate; what the model's own generation config says is overridden."""
    if temperature is not None and not (temperature == 0 or _COLDEST <= temperature < math.inf):
        raise InputError(
            f"--temperature {temperature:g} is neither 0 nor a number from {_COLDEST:g}",
            "Give 0 for greedy, or about 0.7",
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"--top-p {top_p:g} is not in (0, 1]", "Give a probability, such as 0.9")
    if temperature == 0 and top_p is not None:
        raise InputError(
            f"--top-p {top_p:g} has no effect: --temperature 0 takes the likeliest token", "Leave out one of them"
        )
    settings: dict[str, Any] = {
        "num_beams": num_beams,
        "do_sample": False,
        "temperature": None,
        "top_p": None,
    }
    settings["top_k"] = None
    if temperature or (top_p is not None and temperature is None):
        settings |= {
            "do_sample": True,
            "temperature": temperature or 1.0,
            "top_p": top_p if top_p is not None else 1.0,
        }
        settings["top_k"] = 0
    return settings


def _read(prompt: str) -> str:
    text = read_stdin() if prompt == "-" else prompt
    if not text.strip():
        raise InputError("the prompt is empty", "Give --prompt some text")
    return text


def _encode(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    if not chat:
        ids: list[int] = tokenizer.encode(prompt)
        return ids
    if not tokenizer.chat_template:
        raise InputError("the model has no chat template", "Leave out --chat")
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids
