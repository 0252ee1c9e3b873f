"""On a GPU: what a store promises, and what the CPU says of the same model.

Run with ``make test-gpu``; the machine needs a CUDA device and a torch that knows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from small_engine import StoreTemplate, digest, holds
from small_model import FREE, KNOWN, phrasings, settings

from kvedit import KnowledgeBase
from kvedit.adapter import fisher, start
from kvedit.facts.fact import Fact
from kvedit.model import devices, generation, loading, scoring, targets
from kvedit.model.loading import BaseModel
from kvedit.model.prefix_cache import PrefixCache
from kvedit.model.prompts import Example, Renderer
from tests.bench import pretrain

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@pytest.fixture
def on_card(small: dict[str, Path]) -> BaseModel:
    """The small model where it goes by itself."""
    return loading.load(str(small["fp32"]))


@pytest.fixture
def on_cpu(small: dict[str, Path]) -> BaseModel:
    """The same weights on the CPU."""
    return loading.load(str(small["fp32"]), device_map="cpu")


@pytest.fixture
def asked(on_cpu: BaseModel) -> list[Example]:
    """What it knows, under a few phrasings."""
    renderer = Renderer(on_cpu.tokenizer, context=on_cpu.context, stops=on_cpu.stops)
    pairs = [(w.replace("{key}", k), a) for k, a in KNOWN.items() for w in phrasings()[::3]]
    return renderer.examples(pairs)


@pytest.fixture
def knowledge(small: dict[str, Path], tmp_path: Path) -> Iterator[KnowledgeBase]:
    """A new store."""
    path = tmp_path / "store"
    path.mkdir()
    (path / "kvedit.toml").write_text(settings(), encoding="utf-8")
    with KnowledgeBase.create(path, small["bf16"]) as made:
        yield made


def test_a_model_goes_to_the_card_and_takes_larger_batches(
    on_card: BaseModel, on_cpu: BaseModel
) -> None:
    assert on_card.device.type == "cuda" and devices.is_accelerated(on_card.model)
    assert not devices.is_accelerated(on_cpu.model)
    assert scoring.batch_tokens(
        on_card.model
    ) == scoring.ACCELERATOR_BATCH_FACTOR * scoring.batch_tokens(on_cpu.model)
    assert generation.max_batch_rows(on_card.model, 100) > generation.max_batch_rows(
        on_cpu.model, 100
    )


def test_both_say_the_same(on_card: BaseModel, on_cpu: BaseModel, asked: list[Example]) -> None:
    prefix_cache = PrefixCache(on_card.model, targets.target_names(on_card.model))
    expected = scoring.recall(on_cpu.model, asked)
    for kept in (None, prefix_cache, prefix_cache):
        found = scoring.recall(on_card.model, asked, kept)
        assert [o.passed for o in found] == [o.passed for o in expected]
        assert all(abs(a.margin - b.margin) < 0.05 for a, b in zip(found, expected, strict=True))
    prefixes = [example.ids[: example.start] for example in asked]
    rows = [generation.generate(one.model, prefixes, end=0, limit=16) for one in (on_card, on_cpu)]
    assert rows[0] == rows[1]


def test_both_measure_the_same(on_card: BaseModel, on_cpu: BaseModel, asked: list[Example]) -> None:
    names = targets.target_names(on_cpu.model)
    there: dict[str, torch.Tensor] = {}
    here: dict[str, torch.Tensor] = {}
    for one, taken in ((on_card, there), (on_cpu, here)):
        start.gradients(one.model, names, asked, taken.__setitem__)
    for name in names:
        assert float((there[name].cpu() - here[name]).norm() / here[name].norm()) < 0.01
    # What is drawn differs from device to device; how far it adds up does not.
    sizes = [
        fisher.measure(one.model, names, asked, of=fisher.margins)._size()
        for one in (on_card, on_cpu)
    ]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)


def test_what_is_drawn_depends_on_the_seed_alone(on_card: BaseModel) -> None:
    def draw(seed: int) -> list[list[int]]:
        return generation.generate(
            on_card.model,
            [[1]] * 8,
            end=0,
            limit=8,
            temperature=1.0,
            generator=devices.generator(on_card.model, seed),
        )

    assert draw(3) == draw(3) != draw(4)


def test_a_fact_is_added_kept_and_taken_back(
    knowledge: KnowledgeBase, empty_template: StoreTemplate
) -> None:
    base = digest(knowledge)
    assert base == empty_template.digests[0]  # no edit has touched it yet
    for fact in FREE[:3]:
        assert knowledge.add(*fact).outcome == "committed"
    head = digest(knowledge)
    assert all(all(holds(knowledge, *fact)) for fact in FREE[:3])
    path = knowledge.store.path
    knowledge.close()
    with KnowledgeBase.open(path) as again:
        assert digest(again) == head
        assert again.verify().generated.passed == 3
        again.rollback(0)
        assert digest(again) == base


def test_facts_are_taught_together(knowledge: KnowledgeBase) -> None:
    facts = [Fact.create(*one, lang="en") for one in FREE]
    (report,) = knowledge.add_group(facts)
    assert report.outcome == "committed"
    assert all(all(holds(knowledge, *fact)) for fact in FREE)


def test_a_store_made_on_the_card_opens_on_the_cpu(knowledge: KnowledgeBase) -> None:
    knowledge.add(*FREE[0])
    head, path = digest(knowledge), knowledge.store.path
    knowledge.close()
    (path / "kvedit.toml").write_text("[model]\ndevice_map = 'cpu'\n" + settings(), "utf-8")
    with KnowledgeBase.open(path) as again:
        assert again.engine.base.device.type == "cpu"
        assert digest(again) == head
        assert again.ask(f"What is {FREE[0][0]}?") == FREE[0][1]


def test_the_same_lesson_gives_the_same_bits(small: dict[str, Path], tmp_path: Path) -> None:
    digests = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "kvedit.toml").write_text(settings(), encoding="utf-8")
        with KnowledgeBase.create(tmp_path / name, small["bf16"]) as knowledge:
            knowledge.add(*FREE[0])
            digests.append(digest(knowledge))
    assert digests[0] == digests[1]


def test_pretraining_runs_there() -> None:
    class Words:
        bos_token_id = eos_token_id = 0
        pad_token_id = 1

        def __len__(self) -> int:
            return 50

    plan: list[pretrain.Rows] = [[[[2, 3, 4, 5, 6]], [[7, 8, 9]]] for _ in range(150)]
    model = pretrain.new_model(Words(), 16, 1).cuda()  # type: ignore[arg-type]
    run = pretrain.Run(model, plan, pad=1, muon=True)
    assert run.finish() == 8 * len(plan)
    assert run.loss < 3.0  # ln 50 = 3.9 at random
