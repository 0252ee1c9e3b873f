"""A recorded run: twenty edits of every kind on the embedded model, a digest of the weights each.

Two versions of kvedit that print the same lines on one machine do the same arithmetic.  One thread,
because sums are split over threads.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

SEED = Path(__file__).resolve().parents[2] / "store" / "seed"
LANGUAGES = ("en", "zh-Hant", "zh-Hans")  # twelve facts each


def run(folder: Path) -> Iterator[tuple[str, int, str]]:
    """The kind of each edit, the head after it, and the digest of the head's weights."""
    from kvedit import Fact, KnowledgeBase

    rows = [
        json.loads(line)
        for language in LANGUAGES
        for line in (SEED / f"{language}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    facts = [Fact.create(row["key"], row["description"]) for row in rows]
    with KnowledgeBase.create(folder) as base:

        def line(kind: str) -> tuple[str, int, str]:
            head = base.store.head()
            return kind, head, base.store.revision(head).weights_digest

        yield line("init")
        for fact in facts[0:4] + facts[12:16]:
            base.add_fact(fact)
            yield line("add")
        base.add_group(facts[16:22] + facts[24:34])
        yield line("group")
        base.update(facts[0].key, facts[0].description + " It is blue.")
        yield line("update")
        base.remove(facts[1].key)
        yield line("remove")
        base.rollback(8)
        yield line("rollback")
        for fact in facts[4:8]:
            base.add_fact(fact)
            yield line("add")
        base.add_group(facts[8:12])
        yield line("group")
        base.update(facts[2].key, "Glass and rope.")
        yield line("update")
        base.remove(facts[3].key)
        yield line("remove")
        base.rollback(10)
        yield line("rollback")


def main() -> None:
    """Print the run, a line an edit: `python -m tests.bench.recorded`."""
    import torch

    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        for kind, head, digest in run(Path(folder) / "store"):
            sys.stdout.write(f"{kind}\t{head}\t{digest}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
