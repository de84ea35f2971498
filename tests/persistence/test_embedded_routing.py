"""The routing that comes with the package: found by name, sound, and of the embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from informed_routing.assets import DEMO_MODEL, DEMO_ROUTED, load_tokenizer, resolve_model
from informed_routing.errors import InputError
from informed_routing.files.folders import check_apart_from
from informed_routing.persistence.folder import is_routing_folder, locate, read_config
from informed_routing.routed_model import RoutedModelForCausalLM
from informed_routing.training.fit import fit


def test_it_is_found_by_name_alone() -> None:
    source = resolve_model(DEMO_ROUTED)
    assert source.kind == "routing"
    assert source.reference == DEMO_ROUTED
    assert is_routing_folder(locate(DEMO_ROUTED))
    assert read_config(locate(DEMO_ROUTED)).base_model.name == DEMO_MODEL


@pytest.mark.parametrize("given", [{"subfolder": "a"}, {"revision": "v1"}])
def test_it_has_no_parts_and_no_revisions(given: Any) -> None:
    with pytest.raises(InputError):
        RoutedModelForCausalLM.from_pretrained(DEMO_ROUTED, **given)


def test_a_misspelt_one_is_refused_with_both_names() -> None:
    with pytest.raises(InputError) as caught:
        resolve_model("demo:smollm2-135m-route")
    assert DEMO_ROUTED in str(caught.value)


def test_it_routes_its_base_model(demo: Any) -> None:
    model = RoutedModelForCausalLM.from_pretrained(DEMO_ROUTED).eval()
    ids = demo.tokenizer("The river rises in the mountains and", return_tensors="pt").input_ids
    model.set_sparsity(0.25, "macs")
    model.reset_routing_stats()
    text = model.generate(ids, max_new_tokens=8, do_sample=False)
    assert text.shape == (1, ids.shape[1] + 8)
    assert 0.05 < model.routing_stats()["macs"] < 0.5
    assert load_tokenizer(DEMO_ROUTED).vocab_size == demo.tokenizer.vocab_size


def test_nothing_is_written_where_it_could_not_be_named(
    demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of that name would be passed over by everybody who reads it."""
    monkeypatch.chdir(tmp_path)
    model = RoutedModelForCausalLM.from_pretrained(DEMO_ROUTED)
    for write in (
        lambda: model.save_pretrained("demo:mine"),
        lambda: fit(DEMO_MODEL, DEMO_ROUTED),
        lambda: check_apart_from(Path("demo:mine"), DEMO_MODEL),
    ):
        with pytest.raises(InputError, match="embedded"):
            write()
    assert not list(tmp_path.iterdir())
