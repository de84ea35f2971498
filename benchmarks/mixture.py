"""The text of the longer trainings: a mixture of documents, without those that share text with what is evaluated.

    python benchmarks/mixture.py --data-dir DIR --out out/mixture.jsonl
    python benchmarks/levers.py slim-1000 --data demo:wiki --data demo:c4 --data demo:c4 --data out/mixture.jsonl

DIR has `calibration/train.jsonl`: documents of the web, of encyclopaedias, books, code, manuals and questions, with
their `source`. Long ones (books, manuals, speeches, papers' LaTeX) would be most of it: a third of them is taken, drawn
once; mixture_rows.json names them. A document goes that shares 13 words in a row with the held-out or the calibration
part of an embedded text. The result is checked against the digest of the text that was trained on.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from informed_routing.assets import load_texts
from informed_routing.assets.cache import sha256_of
from informed_routing.files.atomic import write_text

ROWS = Path(__file__).with_name("mixture_rows.json")
LONG = ("latex", "documentation", "books", "redpajama_books", "speeches")
RUN = 13
"""Words in a row that make two texts share some."""


def runs(text: str) -> set[tuple[str, ...]]:
    """All runs of words of a text, as lower-case letters and digits."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    return {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    chosen = json.loads(ROWS.read_text())
    evaluated: set[tuple[str, ...]] = set()
    for text in ("demo:wiki", "demo:c4", "demo:code"):
        for split in ("heldout", "calibration"):
            for document in load_texts([text], split):  # type: ignore[arg-type]
                evaluated |= runs(document)
    kept, long = [], set(chosen["long"])
    with (arguments.data_dir / "calibration" / "train.jsonl").open(encoding="utf-8") as lines:
        for number, line in enumerate(lines):
            row = json.loads(line)
            if (row["source"] not in LONG or number in long) and not runs(row["text"]) & evaluated:
                kept.append(json.dumps({"text": row["text"]}))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_text(arguments.out, "\n".join(kept) + "\n")
    if (found := sha256_of(arguments.out)) != chosen["sha256"]:
        raise SystemExit(f"{arguments.out} is another text than was trained on: SHA-256 {found}")
    print(f"wrote {arguments.out}: {len(kept)} documents")


if __name__ == "__main__":
    main()
