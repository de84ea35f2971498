"""Task names, the paper's presets, averages and subsets. Needs no lm-evaluation-harness."""

from __future__ import annotations

import pytest

from informed_routing.errors import InputError
from informed_routing.evaluation.tasks import (
    PRESETS,
    TaskSpec,
    average_accuracy,
    headline,
    parse_tasks,
    preset_tasks,
    subset,
)


def test_names_and_shots() -> None:
    assert parse_tasks("boolq, arc_easy@25") == (TaskSpec("boolq"), TaskSpec("arc_easy", 25))
    assert [str(spec) for spec in parse_tasks("boolq,arc_easy@25")] == ["boolq", "arc_easy@25"]


@pytest.mark.parametrize("text", ["", "boolq,", "@5", "arc_easy@", "arc_easy@many", "arc_easy@-1"])
def test_what_is_not_a_task(text: str) -> None:
    with pytest.raises(InputError, match="arc_easy@25"):
        parse_tasks(text)


def test_a_task_given_twice_is_refused() -> None:
    with pytest.raises(InputError, match="arc_easy is given twice"):
        parse_tasks("arc_easy,boolq,arc_easy@25")


def test_presets_are_the_papers_protocol() -> None:
    """Shots and metrics of Table 7."""
    shots = {spec.name: spec.shots for spec in PRESETS["table7"]}
    assert shots == {
        **{"boolq": 0, "openbookqa": 0, "piqa": 0, "winogrande": 5},
        **{"hellaswag": 10, "arc_challenge": 25, "arc_easy": 25, "wikitext": 0},
    }
    small = {spec.name: spec.shots for spec in preset_tasks("table7-small")}
    assert small == {name: min(count or 0, 5) for name, count in shots.items()}
    normed = {name for name in shots if headline(name, ["acc", "acc_norm", "word_perplexity"]) == "acc_norm"}
    assert normed == {"openbookqa", "hellaswag", "arc_challenge", "arc_easy"}
    with pytest.raises(InputError, match="table8"):
        preset_tasks("table8")


def test_headline_of_other_tasks() -> None:
    assert headline("sciq", ["acc", "acc_stderr", "acc_norm"]) == "acc_norm"
    assert headline("gsm8k", ["exact_match_stderr", "exact_match"]) == "exact_match"
    with pytest.raises(InputError, match="no metric"):
        headline("sciq", ["acc_stderr"])


def test_average_is_the_plain_mean_of_the_papers_metrics() -> None:
    results = {
        "boolq": {"acc": 0.6, "acc_stderr": 0.03},
        "arc_easy": {"acc": 0.9, "acc_norm": 0.5, "acc_norm_stderr": 0.04, "acc_stderr": 0.5},
        "wikitext": {"word_perplexity": 20.0},
        "sciq": {"acc": 0.1},
    }
    average = average_accuracy(results)
    assert average is not None
    assert average["tasks"] == ["boolq", "arc_easy"]
    assert average["accuracy"] == pytest.approx(0.55)
    assert average["stderr"] == pytest.approx(0.05 / 2)
    assert average_accuracy({"wikitext": results["wikitext"]}) is None
    # one document has no spread: then there is no error to state, and none is made up
    assert average_accuracy({"boolq": {"acc": 1.0}}) == {"accuracy": 1.0, "tasks": ["boolq"]}


@pytest.mark.parametrize(("documents", "limit"), [(10, 3), (10, 10), (10, 11), (7, 2), (10042, 200)])
def test_subsets_are_fixed_and_of_the_size_asked_for(documents: int, limit: int) -> None:
    for spread in (False, True):
        chosen = list(subset(documents, limit, spread))
        assert len(chosen) == min(documents, limit)
        assert chosen == sorted(set(chosen))
        assert chosen[0] == 0
        assert chosen[-1] < documents
    assert list(subset(documents, limit, False)) == list(range(min(documents, limit)))


def test_a_spread_subset_takes_from_all_of_a_sorted_set() -> None:
    chosen = subset(10042, 200, True)
    assert sum(number < 3243 for number in chosen) == pytest.approx(200 * 3243 / 10042, abs=1)
