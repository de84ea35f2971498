"""The paper's claims that can be checked on any model, each with the numbers that it prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from .. import results
from ..results import Entry
from . import verdicts
from .printed import value as printed
from .verdicts import Read, Side, Verdict

Grids = Mapping[str, Sequence[Entry]]
"""The entries of each grid by its name."""

OTHER_DYNAMIC = ("mod", "d-llm", "skipgpt")
STATIC = ("slicegpt", "shortened", "shortgpt")
SPARSITIES = (0.25, 0.40)


@dataclass(frozen=True)
class Claim:
    """A statement, where it is in the paper, the numbers behind it, and how to judge it here."""

    where: str
    statement: str
    paper: str
    judge: Callable[[Grids], Verdict]


def claims() -> list[Claim]:
    """All claims."""
    return [*_figure_1(), *_table_1(), *_table_2(), *_tables_3_and_4(), *_ablations()]


def _figure_1() -> Iterator[Claim]:
    sides: list[Side] = [("dense", 0.0, False), ("skipgpt", 0.25, False), ("skipgpt", 0.40, False)]
    yield Claim(
        "Figure 1a",
        "greedy routing raises perplexity with sparsity",
        ", ".join(f"{printed('figure1', *side, 'wikitext'):g}" for side in sides),
        lambda grids: verdicts.rising(grids.get("figure1", ()), sides, results.perplexity),
    )
    yield _compare(
        "figure1",
        "forecasts leave more features above a cosine of 0.95 than zeros do",
        ("skipgpt", 0.25, False),
        ("informed", 0.25, False),
        "similar",
    )


def _table_1() -> Iterator[Claim]:
    for sparsity in SPARSITIES:
        at = f"at {100 * sparsity:g} %"
        for recovered, stage in ((False, "without recovery"), (True, "recovered")):
            own, other = ("informed", sparsity, recovered), ("skipgpt", sparsity, recovered)
            yield _compare("table1", f"{stage}, informed routing has a lower perplexity than SkipGPT {at}", own, other)
            statement = f"{stage}, it has a higher mean accuracy than SkipGPT {at}"
            yield _compare("table1", statement, other, own, "average")
        own, other = ("informed", sparsity, False), ("skipgpt", sparsity, True)
        statement = f"without recovery it has a lower perplexity than recovered SkipGPT {at}"
        yield _compare("table1", statement, own, other)
        if sparsity == SPARSITIES[0]:
            yield _compare("table1", f"and a higher mean accuracy {at}", other, own, "average")
        else:
            yield _compare("table1", f"but a lower mean accuracy {at}", own, other, "average")
        yield _ahead(sparsity, OTHER_DYNAMIC, "dynamic")
        yield _ahead(sparsity, STATIC, "static")
    rows: list[Side] = [(name, 0.25, True) for name in ("shortened", "shortgpt", *OTHER_DYNAMIC, "informed")]
    rows += [(name, 0.25, False) for name in ("skipgpt", "informed")]
    yield Claim(
        "Table 1",
        "SliceGPT's place by perplexity is better than by accuracy at 25 %",
        "place 2 by perplexity, 6 by accuracy of 9",
        lambda grids: verdicts.better_by_perplexity(grids.get("table1", ()), ("slicegpt", 0.25, True), rows),
    )
    yield Claim(
        "Section 4.2",
        "without recovery it trains in less than half the time of SkipGPT with it, at no higher perplexity (25 %)",
        "3 h 5 min against 7 h; 9.43 against 10.53",
        lambda grids: verdicts.faster_and_no_worse(
            grids.get("table1", ()), ("informed", 0.25, False), ("skipgpt", 0.25, True), 0.5
        ),
    )


def _ahead(sparsity: float, rivals: Sequence[str], kind: str) -> Claim:
    own: Side = ("informed", sparsity, True)
    others: list[Side] = [(name, sparsity, True) for name in rivals]
    best = [
        (printed("table1", *own, column), pick(printed("table1", *side, column) for side in others))
        for column, pick in (("wikitext", min), ("average", max))
    ]
    return Claim(
        "Table 1",
        f"recovered, it is ahead of every {kind} method at {100 * sparsity:g} % in perplexity and mean accuracy",
        "; ".join(f"{mine:g} against {theirs:g}" for mine, theirs in best),
        lambda grids: verdicts.ahead(grids.get("table1", ()), own, others),
    )


def _table_2() -> Iterator[Claim]:
    for sparsity in (*SPARSITIES, 0.70):
        own, other = ("informed", sparsity, False), ("skipgpt", sparsity, False)
        at = f"at {100 * sparsity:g} %"
        yield Claim(
            "Table 2",
            f"most approximated units are attention {at}",
            f"{printed('table2', *own, 'attention_part'):g} %",
            lambda grids, own=own: verdicts.above(grids.get("table2", ()), own, 50, results.attention_part),  # type: ignore[misc]
        )
        yield _compare("table2", f"a larger part than with SkipGPT {at}", other, own, "attention_part")


def _tables_3_and_4() -> Iterator[Claim]:
    own, other = ("informed-balanced", 0.25, True), ("skipgpt-balanced", 0.25, True)
    yield _compare("table3", "balanced, informed routing has the lower perplexity", own, other)
    yield _compare("table3", "and the higher mean accuracy", other, own, "average")
    for sparsity in SPARSITIES:
        own, other = ("informed", sparsity, False), ("skipgpt", sparsity, True)
        statement = f"without recovery its loss is lower than recovered SkipGPT's at {100 * sparsity:g} %"
        yield _compare("table4", statement, own, other, "loss")
    own, other = ("informed", 0.70, False), ("skipgpt", 0.70, True)
    yield _compare("table4", "but higher at 70 %", other, own, "loss")


def _ablations() -> Iterator[Claim]:
    kept, dropped = ("informed", 0.25, True), ("informed-kv-drop", 0.25, True)
    yield _compare("table8", "dropping the keys of approximated tokens costs perplexity", kept, dropped)
    ranks: list[Side] = [(f"rank-{rank}", 0.25, True) for rank in (10, 50, 100, 500)]
    yield _compare("table9", "forecasters of rank 50 are better than of rank 10", ranks[1], ranks[0])
    numbers = [printed("table9", *side, "wikitext") for side in ranks]
    yield Claim(
        "Table 9",
        "from rank 100 to 500 less is gained than a tenth of what 10 to 50 gives",
        f"{numbers[2] - numbers[3]:.1f} against {numbers[0] - numbers[1]:.1f}",
        lambda grids: verdicts.saturates(grids.get("table9", ()), ranks, results.perplexity),
    )


_READS: dict[str, Read] = {
    "wikitext": results.perplexity,
    "average": results.average,
    "loss": results.loss,
    "similar": results.similar,
    "attention_part": results.attention_part,
}


def _compare(table: str, statement: str, low: Side, high: Side, column: str = "wikitext") -> Claim:
    """A claim that one printed number is below another."""
    numbers = [printed(table, *side, column) for side in (low, high)]
    kind = table.rstrip("0123456789")
    return Claim(
        f"{kind.capitalize()} {table.removeprefix(kind)}",
        statement,
        f"{numbers[0]:g} against {numbers[1]:g}",
        lambda grids: verdicts.less(grids.get(table, ()), low, high, _READS[column]),
    )
