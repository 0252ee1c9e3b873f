"""Protected texts: the base model's own answers, made once, more of them for many facts."""

from __future__ import annotations

from pathlib import Path

from small_engine import StoreTemplate, configure, digest
from small_model import KNOWN

from kvedit import KnowledgeBase
from kvedit.store.store import Store


def test_protected_texts_are_the_base_models_own_answers(trained: KnowledgeBase) -> None:
    """Not the facts that were edited in, and disjoint from the locality probes."""
    control = [row for row in trained.store.protected("control") if row.prompt]
    locality = trained.store.protected("locality")
    assert len(locality) == 8 and len(control) > 20
    assert not {row.prompt for row in control} & {row.prompt for row in locality}
    for row in locality:
        assert trained.ask_base(row.prompt).startswith(row.answer), row
    asked = control[::3]  # a guess may hang on a numerical tie, which another batch decides anew
    same = [trained.ask_base(row.prompt).startswith(row.answer) for row in asked]
    assert sum(same) >= 0.9 * len(asked)
    trained_texts = set(KNOWN.values())
    assert {row.answer for row in control} & trained_texts  # there is something to lose


def test_protected_texts_are_made_once(
    trained: KnowledgeBase, empty_template: StoreTemplate
) -> None:
    """Three edits have changed nothing in them."""
    with Store.open(empty_template.path) as first:
        for role in ("control", "locality"):
            assert trained.store.protected(role) == first.protected(role)


def test_many_facts_get_more_protected_texts_once(empty_store: Path) -> None:
    configure(empty_store, max_samples=1200, samples_per_fact=40)
    with KnowledgeBase.open(empty_store) as knowledge:
        first = knowledge.store.protected("control")
        knowledge.protect_for(2)  # 80 samples: there were 96
        assert knowledge.store.protected("control") == first
        knowledge.protect_for(30)
        grown = knowledge.store.protected("control")
        assert grown[: len(first)] == first and len(grown) > len(first)
        prompts = [row.prompt for row in grown if row.prompt]
        probes = {row.prompt for row in knowledge.store.protected("locality")}
        assert len(set(prompts)) == len(prompts) and not probes & set(prompts)
        before = digest(knowledge)
        knowledge.protect_for(500)  # no more than max_samples
        assert knowledge.store.protected("control") == grown and digest(knowledge) == before
    with KnowledgeBase.open(empty_store) as reopened:
        reopened.protect_for(30)
        assert reopened.store.protected("control") == grown


def test_a_name_that_is_left_out_is_in_no_new_protected_text(empty_store: Path) -> None:
    configure(empty_store, max_samples=900, samples_per_fact=900)
    with KnowledgeBase.open(empty_store) as knowledge:
        shipped = [r for r in knowledge.store.protected("control") if r.source == "shipped"]
        knowledge.store.set_protected([*shipped, *knowledge.store.protected("locality")])
        first, prompts = len(shipped), " ".join(row.prompt for row in shipped)
        name, *_ = [key for key in KNOWN if key not in prompts]
        knowledge.protect_for(1, leave_out=[name])
        new = knowledge.store.protected("control")[first:]
        assert new and not [row for row in new if name in f"{row.prompt} {row.answer}"]


def test_the_users_own_texts_are_protected(small: dict[str, Path], tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "What is bread?", "answer": "Food."}\n', encoding="utf-8")
    (tmp_path / "store").mkdir()
    configure(tmp_path / "store")
    with KnowledgeBase.create(tmp_path / "store", small["bf16"], protect_file=path) as knowledge:
        rows = knowledge.store.protected("control")
        assert ("What is bread?", "Food.", "own.jsonl") in {
            (r.prompt, r.answer, r.source) for r in rows
        }
