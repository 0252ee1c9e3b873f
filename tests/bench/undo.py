"""Undoing, checked to the bit: every revision rolled back to, and the export asked again.

Invariants:
- A digest is compared with the one taken from the served weights right after the commit, over
  every parameter of the model, not only with what the store says.
- The export is loaded and asked by transformers alone, with its own ``generate``.
- An answer that differs is a numerical tie only if the logits of both next tokens, asked for
  again by one forward pass, are the two highest and as close as rounding may bring them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from kvedit.bench.speed import EditTime, add_timed
from kvedit.editing.knowledge_base import KnowledgeBase
from kvedit.events import Score, Status
from kvedit.model import loading
from kvedit.model.devices import first_device
from kvedit.model.generation import generate
from kvedit.model.prompts import Example
from kvedit.model.scoring import tie_tolerance
from tests.bench import questions
from tests.bench.retain import BenchOptions, Emit, engine_of, new_store

ROWS = 32
_ADAPTER = ("lora_", "ranknum")


@dataclass(frozen=True, slots=True)
class Restored:
    """One rollback: whether the store's digest and the served weights are those of the commit."""

    revision: int
    recorded: bool
    served: bool


@dataclass(frozen=True, slots=True)
class Difference:
    """A prompt that two runs of one model answer otherwise, and why.

    ``margin`` is how far apart, in logits, the two next tokens are where the answers part;
    ``tie_tolerance`` how far rounding may move that.  ``expected``: whether one of them gives the
    probe's own answer.
    """

    prompt: str
    margin: float
    tie_tolerance: float
    expected: bool

    @property
    def tied(self) -> bool:
        """Whether it is a numerical tie, which another shape of batch breaks the other way."""
        return self.margin <= self.tie_tolerance


@dataclass(frozen=True, slots=True, kw_only=True)
class UndoResult:
    """``exported`` counts prompts that the reloaded export answers as the store's model does;
    ``differences`` are the others, numerical ties and errors.
    """

    model: str
    edits: tuple[EditTime, ...]
    restored: tuple[Restored, ...]
    exported: Score
    differences: tuple[Difference, ...]

    @property
    def exact(self) -> bool:
        """Whether everything was undone to the bit and the export answers alike, but for ties."""
        same = all(one.recorded and one.served for one in self.restored)
        return same and all(one.tied for one in self.differences)


def undo(options: BenchOptions, emit: Emit) -> UndoResult:
    """Add facts, go back to every revision and forth again, then export the last one."""
    source = loading.locate(options.model)
    data = questions.load(options.data, source)
    facts = questions.new_facts(data, options.facts, options.facts_file, options.kind)
    with new_store(options, emit) as knowledge:
        model = engine_of(knowledge).base.model
        known = {0: (_recorded(knowledge), served_digest(model))}
        edits: list[EditTime] = []
        for fact in facts:
            emit(Status(phase=f"fact {len(edits) + 1} of {len(facts)}", key=fact.key))
            edits.append(add_timed(knowledge, fact))
            head = knowledge.store.head()
            known.setdefault(head, (_recorded(knowledge), served_digest(model)))
        restored = [_restore(knowledge, known, revision) for revision in _there_and_back(known)]
        asked, wrong = _compare_export(knowledge, emit)
        name = engine_of(knowledge).base.name
    return UndoResult(
        model=name,
        edits=tuple(edits),
        restored=tuple(restored),
        exported=Score(asked - len(wrong), asked, "generated"),
        differences=tuple(wrong),
    )


def served_digest(model: nn.Module) -> str:
    """SHA-256 over all parameters of a model, an adapter's left out."""
    return loading.weights_digest(own_parameters(model))


def own_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters of a model by name, an adapter's left out, shared ones once."""
    for name, parameter in model.named_parameters():
        if not any(mark in name for mark in _ADAPTER):
            yield name.replace(".base_layer.", "."), parameter


def _recorded(knowledge: KnowledgeBase) -> str:
    store = knowledge.store
    return str(store.revision(store.head()).weights_digest)


def _there_and_back(known: dict[int, Any]) -> list[int]:
    """Every revision downwards, then the last one again."""
    return [*sorted(known, reverse=True), max(known)]


def _restore(
    knowledge: KnowledgeBase, known: dict[int, tuple[str, str]], revision: int
) -> Restored:
    """Roll back and compare; the rollback itself is a new revision."""
    knowledge.rollback(revision)
    recorded, served = known[revision]
    now = served_digest(engine_of(knowledge).base.model)
    return Restored(revision, _recorded(knowledge) == recorded, now == served)


def _compare_export(knowledge: KnowledgeBase, emit: Emit) -> tuple[int, list[Difference]]:
    """How many probes the export was asked, and those it does not answer as the store's model."""
    examples = _all_probes(knowledge)
    engine = engine_of(knowledge)
    with TemporaryDirectory(prefix="kvedit-export-") as folder:
        path = Path(folder) / "model"
        knowledge.export(path)
        emit(Status(phase=f"asking the export {len(examples)} probes by transformers alone"))
        theirs = _by_transformers(path, examples)
    prefixes = [e.ids[: e.start] for e in examples]
    limit = _limit(examples)
    ours = generate(engine.base.model, prefixes, end=engine.renderer.end, limit=limit)
    end = engine.renderer.end
    wrong = [
        difference(engine.base.model, example, [*mine, end], [*other, end])
        for example, mine, other in zip(examples, ours, theirs, strict=True)
        if mine != other
    ]
    return len(examples), wrong


@torch.no_grad()
def difference(model: Any, example: Example, ours: list[int], theirs: list[int]) -> Difference:
    """What the model itself says where two of its answers, end tokens included, part."""
    same = next(at for at, pair in enumerate(zip(ours, theirs, strict=False)) if len({*pair}) > 1)
    ids = torch.tensor([[*example.ids[: example.start], *ours[:same]]])
    logits = model(input_ids=ids.to(first_device(model)), use_cache=False).logits[0, -1].float()
    best = logits.max()
    margin = float(best - torch.stack([logits[ours[same]], logits[theirs[same]]]).min())
    wanted = list(example.ids[example.start :])
    return Difference(
        example.prompt, margin, float(tie_tolerance(model, best)), wanted in (ours, theirs)
    )


def _all_probes(knowledge: KnowledgeBase) -> list[Example]:
    """LoopResult and never-trained phrasings of every committed fact, and the locality probes."""
    engine = engine_of(knowledge)
    probes = []
    for row in knowledge.store.facts("committed"):
        probes += [*engine.examples(row.fact), *engine.paraphrases(row.fact)]
    rows = knowledge.store.protected("locality")
    return probes + engine.renderer.examples((row.prompt, row.answer) for row in rows)


def _limit(examples: Sequence[Example]) -> int:
    return max((len(e.ids) - e.start for e in examples), default=0) + 1


@torch.no_grad()
def _by_transformers(path: Path, examples: Sequence[Example]) -> list[list[int]]:
    """Greedy answers by transformers' own ``generate``; only prefixes of one length share a batch.

    Padding would be correct too, but another shape may round bf16 another way.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    end, limit = tokenizer.eos_token_id, _limit(examples)
    groups: dict[int, list[int]] = defaultdict(list)
    for index, example in enumerate(examples):
        groups[example.start].append(index)
    answers: list[list[int]] = [[] for _ in examples]
    for start, group in groups.items():
        for at in range(0, len(group), ROWS):
            part = group[at : at + ROWS]
            ids = torch.tensor([examples[i].ids[:start] for i in part])
            out = model.eval().generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=limit,
                eos_token_id=end,
                pad_token_id=end,
            )
            for index, row in zip(part, out[:, start:].tolist(), strict=True):
                answers[index] = row[: row.index(end)] if end in row else row
    return answers
