"""What a study calls its texts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from informed_routing.study.identity import content_id


def test_no_file_that_is_called_like_an_embedded_text_changes_a_study(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if os.name == "posix":  # colons are for nothing else there
        (tmp_path / "demo:c4").write_text("mine")
    assert content_id("demo:c4") == "demo:c4"
