"""What two processes do in ``test_shards``: a model whose lower blocks they share, asked.

    python -m tests.distributed.shard_calls MODEL      twice, numbered as a launcher would

Each process prints one line of JSON: what it held before and after; process 0 also what it asked.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from small_engine import make_engine
from small_model import FREE, KNOWN

from kvedit.config import TrainingConfig
from kvedit.distributed.crew import Crew
from kvedit.distributed.processes import LedEngine, Replica
from kvedit.model import generation, loading, scoring


def held(model: Any) -> int:
    """Bytes of all parameters that are there."""
    return sum(p.untyped_storage().nbytes() for p in model.parameters())


def follow(crew: Crew) -> dict[str, Any]:
    """In process 1: carry out calls; what its replica holds then."""
    replica = Replica(crew)
    crew.follow(replica.carry_out)
    return {"after": held(replica._engine.base.model)}


def lead(crew: Crew, folder: str) -> dict[str, Any]:
    """In process 0: the same questions before the blocks are shared, and after."""
    base = loading.load(folder, device_map="cpu")  # as for cards that do not hold it
    known = [(f"What is {key}?", text) for key, text in [*KNOWN.items(), *FREE]]
    examples = make_engine(loading.load(folder)).renderer.examples(known)
    prefixes = [example.ids[: example.start - n % 3] for n, example in enumerate(examples)]
    ids = torch.tensor([examples[0].ids])

    def asked() -> list[Any]:
        with torch.no_grad():
            return [base.model(input_ids=ids, use_cache=False).logits.tolist()]

    def several() -> list[Any]:
        rows = generation.generate(base.model, prefixes, end=0, limit=30)
        return [rows, [round(o.margin, 1) for o in scoring.recall(base.model, examples)]]

    before, alone, many = held(base.model), asked(), several()
    engine = LedEngine(crew, base, TrainingConfig(), shard=True)
    after = held(base.model)
    margins = [round(outcome.margin, 1) for outcome in engine.recall(examples)]
    dealt = [engine.proceed(prefixes, end=0, limit=30), margins]
    few = engine.proceed(prefixes[:1], end=0, limit=30)  # by process 0 alone, outside of a call
    return {
        "before": before, "after": after, "piece": engine.shards and engine.shards.bytes,
        "lower": sum(p.nbytes for b in loading.load(folder).model.model.layers[:2]
                     for p in b.parameters()),
        "alone": asked() == alone, "dealt": dealt == many, "few": few == many[0][:1],
        "recalled": sum(margin > 0 for margin in margins), "left": held(base.model),
    }  # fmt: skip


def main() -> None:
    crew = Crew()
    found = follow(crew) if crew.rank else lead(crew, sys.argv[1])
    crew.end()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
