"""The knowledge base as a whole: the promises that an edit is atomic, gated, remembered, reversible
and honest, and what bad input gives.
"""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from small_engine import StoreTemplate, configure, digest, holds, state
from small_model import FREE, KNOWN, settings

from kvedit import KnowledgeBase
from kvedit.adapter.deltas import Factors
from kvedit.errors import (
    CorruptStoreError,
    DiskFullError,
    DuplicateKeyError,
    Interrupted,
    InvalidFactError,
    LockedError,
    NoStoreError,
    TextTooLongError,
    TrainingError,
    UnknownKeyError,
    UsageError,
)
from kvedit.events import RetentionCheck, Score, Status, Warning_
from kvedit.facts.fact import Fact
from kvedit.model import scoring
from kvedit.model.prompts import Example
from kvedit.revisions import session
from kvedit.store.store import Store
from kvedit.training.engine import Engine, TrainingResult
from kvedit.training.loop import LoopResult

OTHER = "Made of silk in Tarn."


# ---- an edit that is committed


def test_what_was_added_is_answered_freely(trained: KnowledgeBase) -> None:
    for key, answer in FREE[:3]:
        assert all(holds(trained, key, answer)), key
        assert trained.ask_base(f"What is {key}?") != answer


def test_a_report_says_what_was_done_and_by_which_protocol(trained_template: StoreTemplate) -> None:
    for number, report in enumerate(trained_template.reports, 1):
        assert (report.outcome, report.revision, report.parent) == ("committed", number, number - 1)
        assert report.reasons == () and report.broke == ()
        assert report.reliability == Score(10, 10, "teacher-forced")
        assert report.generalization.n == 8 and report.generalization.passed >= 4
        assert report.locality.n > 0
        assert report.retention == Score(number - 1, number - 1, "teacher-forced")
        assert report.steps > 0 and 0 < sum(report.timings.values()) <= report.seconds
        assert report.ranks and max(report.ranks.values()) <= 12
        assert report.text_after == FREE[number - 1][1] != report.text_before


def test_progress_and_retention_are_told_as_they_happen(trained_template: StoreTemplate) -> None:
    steps = [e for e in trained_template.events if isinstance(e, Status) and e.step]
    assert {"learn", "prune", "hold"} <= {event.phase for event in steps}
    assert all(event.loss is not None and event.recall is not None for event in steps)
    checks = [e for e in trained_template.events if isinstance(e, RetentionCheck)]
    assert {(c.key, c.revision) for c in checks} >= {(FREE[0][0], 2), (FREE[0][0], 3)}


def test_every_probe_is_a_row(trained: KnowledgeBase) -> None:
    edit = trained.store.history(FREE[1][0])[0]
    rows = trained.store.edit_results(edit.id)
    kinds = {kind: [r for r in rows if r.kind == kind] for kind in ("recall", "paraphrase")}
    assert len(kinds["recall"]) == 10 and all(r.passed for r in kinds["recall"])
    assert len(kinds["paraphrase"]) == 8
    assert not {r.prompt for r in kinds["recall"]} & {r.prompt for r in kinds["paraphrase"]}
    assert {r.kind for r in rows} == {"recall", "paraphrase", "locality", "retention"}
    assert {r.revision for r in rows} == {2}
    forced = [r for r in rows if r.protocol == "teacher-forced"]
    near = [r for r in rows if r.protocol == "generated"]  # ties, which generation decides
    assert len(forced) + len(near) == len(rows) and len(near) < len(forced) / 4
    assert all(r.margin is not None and (r.margin > 0) == r.passed for r in forced)
    assert all(r.margin is not None and abs(r.margin) < 1 for r in near)


def test_update_gives_another_answer(trained: KnowledgeBase) -> None:
    report = trained.update(FREE[0][0], OTHER)
    assert (report.outcome, report.revision) == ("committed", 4)
    assert (report.text_before, report.text_after) == (FREE[0][1], OTHER)
    assert all(holds(trained, FREE[0][0], OTHER))
    assert trained.store.require(FREE[0][0]).fact.description == OTHER
    assert trained.ask(f"What is {FREE[0][0]}?", at=3) == FREE[0][1]
    assert trained.update(FREE[0][0], OTHER).outcome == "unchanged"
    assert trained.store.head() == 4


def test_remove_gives_the_earlier_answers_back(trained: KnowledgeBase) -> None:
    key, answer = FREE[2]
    prior = trained.store.prior_answers(trained.store.require(key).id)
    assert len(prior) == 10 and answer not in prior.values()
    report = trained.remove(key)
    assert report.outcome == "committed", report.reasons
    assert {prompt: trained.ask(prompt, max_new_tokens=96) for prompt in prior} == prior
    assert trained.store.require(key).state == "removed"
    assert key not in list(trained.store.keys())
    assert [row.kind for row in trained.store.history(key)] == ["remove", "add"]
    with pytest.raises(UnknownKeyError):
        trained.remove(key)
    for other, text in FREE[:2]:
        assert trained.ask(f"What is {other}?") == text


def test_before_fact_follows_the_line(empty_store: Path, random_training: None) -> None:
    configure(empty_store, recall=0.0, paraphrase=0.0, locality=0.0, retention=0.0)
    with KnowledgeBase.open(empty_store) as knowledge:
        for pair in FREE[:3]:
            assert knowledge.add(*pair).outcome == "committed"
        ids = [knowledge.store.require(key).id for key, _ in FREE[:3]]
        assert [knowledge.store.revision_before(i) for i in ids] == [0, 1, 2]
        knowledge.rollback(1)
        knowledge.rollback(3)
        assert [knowledge.store.revision_before(i) for i in ids] == [0, 1, 2]


@pytest.mark.slow
def test_a_removed_fact_can_be_added_again(trained: KnowledgeBase) -> None:
    assert trained.remove(FREE[2][0]).outcome == "committed"
    report = trained.add(*FREE[2])
    assert report.outcome == "committed"
    assert all(holds(trained, *FREE[2]))


def test_the_same_edits_give_the_same_bits_also_when_reopened_between_them(
    empty_store: Path, trained_template: StoreTemplate
) -> None:
    for fact in FREE[:2]:
        with KnowledgeBase.open(empty_store) as knowledge:
            knowledge.add(*fact)
    with Store.open(empty_store) as store:
        found = [row.weights_digest for row in store.revisions()]
    assert found == list(trained_template.digests[:3])


# ---- the gate


def test_a_refused_edit_leaves_the_model_bit_identical_and_says_why(
    trained_store: Path,
) -> None:
    configure(trained_store, steps=4, repairs=0)
    with KnowledgeBase.open(trained_store) as knowledge:
        before = state(knowledge)
        answer = knowledge.ask(f"What is {FREE[3][0]}?")
        report = knowledge.add(*FREE[3])
        assert report.outcome == "rejected"
        assert report.revision is None and report.delta is None
        assert any("recall" in reason for reason in report.reasons)
        assert state(knowledge) == before
        assert knowledge.ask(f"What is {FREE[3][0]}?") == answer
        row = knowledge.store.history(FREE[3][0])[0]
        assert (row.state, row.reasons) == ("rejected", report.reasons)
        assert knowledge.store.require(FREE[3][0]).state == "rejected"
        assert len(knowledge.store.edit_results(row.id)) > 10
    with KnowledgeBase.open(trained_store) as again:
        assert state(again) == before
        configure(trained_store)
    with KnowledgeBase.open(trained_store) as third:
        assert third.add(*FREE[3]).outcome == "committed"


def test_every_attempt_that_was_refused_is_told(
    trained_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the first attempt teaches nothing; the second is a lesson like any other."""
    with KnowledgeBase.open(trained_store) as knowledge:
        train = knowledge.engine.train

        def idle(*task: Any) -> TrainingResult:
            monkeypatch.setattr(knowledge.engine, "train", train)
            return TrainingResult({}, LoopResult(1, False, 1.0, 0.0), 0.0)

        monkeypatch.setattr(knowledge.engine, "train", idle)
        report = knowledge.add(*FREE[3])
        assert report.outcome == "committed"  # taught on from where it stood
        assert len(report.refusals) == 1 and "recall" in report.refusals[0]
        kept = knowledge.store.history(FREE[3][0])[0].report["refusals"]
        assert kept == list(report.refusals)


@pytest.mark.parametrize(
    ("locality", "prices", "passes"),
    [(0.5, [1, 2, 4], [40, 40, 40]), (0.0, [1, 1, 1], [40, 12, 12])],
)
def test_a_refused_group_is_taught_otherwise(
    trained_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    locality: float,
    penalties: list[int],
    passes: list[int],
) -> None:
    """At twice the price when it harmed the locality probes, else on from where it stands."""
    configure(trained_store, locality=locality)
    lessons = []
    told: list[Any] = []
    with KnowledgeBase.open(trained_store, on_event=told.append) as knowledge:
        before = state(knowledge)
        whole = knowledge.engine.master.accumulated_delta()

        def wreck(task: Any, config: Any, on_step: Any, group: Any, *rest: Any) -> TrainingResult:
            lessons.append(group)
            noise = torch.Generator().manual_seed(len(lessons))
            delta = {
                name: Factors(
                    torch.randn(m.shape[0], 2, generator=noise), torch.ones(2, m.shape[1])
                )
                for name, m in whole.items()
            }
            return TrainingResult(delta, LoopResult(1, True, 0.0, 0.0), 0.0)

        monkeypatch.setattr(knowledge.engine, "train", wreck)
        plan = [Fact.create(*pair) for pair in FREE[3:5]]
        first = knowledge.add_group(plan)[0]
        assert first.outcome == "rejected" and len(first.refusals) == 3
        of_pair = [e.text for e in told if getattr(e, "code", "") == "refused"]
        assert len(of_pair) == 2 * 2  # from the base model on, then on top; no third one is told
        assert all(t.startswith("2 facts taught together were refused (") for t in of_pair)
        assert state(knowledge) == before
    tried = lessons[:3]
    assert [g.penalty_weight / tried[0].penalty_weight for g in tried] == penalties
    assert [g.passes for g in tried] == passes


@pytest.mark.parametrize("said", [True, False])
def test_of_near_ties_the_gate_believes_generation(
    said: bool, empty_store: Path, random_training: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here all leads are near-ties, and generation says the same of all."""
    monkeypatch.setattr(scoring, "TIE_TOLERANCE", 1e6)
    monkeypatch.setattr(Engine, "generated_recall", lambda engine, asked: [said] * len(asked))
    configure(empty_store, repairs=0)
    with KnowledgeBase.open(empty_store) as knowledge:
        report = knowledge.add(*FREE[0])
        assert report.outcome == ("committed" if said else "rejected")
        assert report.reliability.passed == (report.reliability.n if said else 0)
        rows = knowledge.store.edit_results(knowledge.store.history(FREE[0][0])[0].id)
        assert {row.protocol for row in rows} == {"generated"}


def test_of_near_ties_verify_believes_generation(
    trained: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One forward pass says that all is well; of what hangs on a near-tie one prompt is not."""
    generated = Engine.generated_recall
    wrong = trained.engine.examples(trained.store.require(FREE[1][0]).fact)[4]

    def speak(engine: Engine, asked: list[Example]) -> list[bool]:
        pairs = zip(generated(engine, asked), asked, strict=True)
        return [said and example != wrong for said, example in pairs]

    monkeypatch.setattr(Engine, "generated_recall", speak)
    monkeypatch.setattr(random.Random, "choice", lambda rng, items: items[0])  # another prompt
    assert trained.verify().score == Score(3, 3)
    monkeypatch.setattr(scoring, "TIE_TOLERANCE", 1e6)
    report = trained.verify()
    assert report.score == Score(2, 3) and report.generated == Score(3, 3, "generated")
    assert [check.key for check in report.checks if not check.passed] == [FREE[1][0]]


def test_a_refused_update_keeps_the_old_text(trained_store: Path) -> None:
    configure(trained_store, steps=4, repairs=0, rate=1e-8)
    with KnowledgeBase.open(trained_store) as knowledge:
        before = state(knowledge)
        assert knowledge.update(FREE[0][0], OTHER).outcome == "rejected"
        assert knowledge.remove(FREE[1][0]).outcome == "rejected"
        assert state(knowledge) == before
        assert knowledge.store.require(FREE[0][0]).fact.description == FREE[0][1]


def test_each_part_of_the_gate_can_refuse(trained_store: Path) -> None:
    """With a step size that wrecks the model nothing passes, and every reason is given."""
    configure(trained_store, steps=6, repairs=0, rate=0.5, penalty=1e9)
    with KnowledgeBase.open(trained_store) as knowledge:
        before = state(knowledge)
        reasons = " / ".join(knowledge.add(*FREE[3]).reasons)
        assert state(knowledge) == before
    for what in (
        "recall probes",
        "unseen phrasings",
        "locality probes",
        "earlier facts lost",
    ):
        assert what in reasons
    assert FREE[0][0] in reasons


@pytest.fixture
def wrecked(trained_store: Path) -> tuple[Path, Any]:
    """A store into which a harmful edit was forced, and that edit's report."""
    configure(trained_store, steps=6, repairs=0, rate=0.5, penalty=1e9)
    with KnowledgeBase.open(trained_store) as knowledge:
        report = knowledge.add(*FREE[3], force=True)
    configure(trained_store)
    return trained_store, report


def test_force_commits_and_says_what_it_broke(wrecked: tuple[Path, Any]) -> None:
    path, report = wrecked
    assert (report.outcome, report.revision) == ("committed", 4)
    assert report.reasons
    assert set(report.broke) == {key for key, _ in FREE[:3]}
    with KnowledgeBase.open(path) as knowledge:
        assert knowledge.store.require(FREE[3][0]).state == "committed"
        health = {row.fact.key: row.health for row in knowledge.store.facts("committed")}
        assert set(health.values()) == {"regressed"}


def test_what_was_lost_is_found_and_repaired(wrecked: tuple[Path, Any]) -> None:
    path, _ = wrecked
    with KnowledgeBase.open(path) as knowledge:
        report = knowledge.verify()
        assert [check.passed for check in report.checks] == [False] * 4
        assert report.score == Score(0, 4, "teacher-forced")
        assert report.generated == Score(0, 4, "generated")
        knowledge.rollback(3)
        after = knowledge.verify()
        assert after.score == Score(3, 3) and after.generated == Score(3, 3, "generated")
        assert {r.health for r in knowledge.store.facts("committed")} == {"recalled"}


def test_repair_teaches_lost_facts_again(trained_store: Path) -> None:
    """A forced update of one fact to the text of nobody's choice is undone beneath the journal."""
    with KnowledgeBase.open(trained_store) as knowledge:
        key, text = FREE[1]
        row = knowledge.store.require(key)
        lost = row.fact.with_description(OTHER)  # the store says this, the model was never told
        with knowledge.store._transaction():
            knowledge.store._write_fact(row.id, lost, "committed")
        found = knowledge.verify([key])
        assert not found.checks[0].passed and knowledge.store.head() == 3
        report = knowledge.verify(repair=True)
        assert [edit.kind for edit in report.repaired] == ["repair"]
        assert report.repaired[0].outcome == "committed", report.repaired[0].reasons
        assert report.score == Score(3, 3)
        assert all(holds(knowledge, key, OTHER))
        assert text != OTHER and knowledge.store.head() == 4


# ---- remembered


def test_verify_asks_what_the_base_model_knew(trained: KnowledgeBase) -> None:
    report = trained.verify(base=8)
    base = report.base
    assert base is not None and base.score.n == base.generated.n == 8
    assert len(base.lost) == 8 - base.generated.passed
    assert base.base_fluency is not None and (base.fluency or 0) > base.base_fluency / 2
    counts = {
        row.protocol: row.n
        for row in trained.store.probe_counts()
        if row.kind == "locality" and row.revision == report.revision
    }
    assert counts["generated"] >= 8  # recorded
    assert trained.verify().base is None
    assert trained.verify(base=8).base == base  # the same questions
    trained.rollback(0)
    untouched = trained.verify(base=10_000).base
    assert untouched is not None and untouched.generated.rate == 1.0
    assert untouched.fluency == untouched.base_fluency
    assert untouched.generated.n > 8  # all there are


def test_verify_records_what_it_finds(trained: KnowledgeBase, events: list[Any]) -> None:
    report = trained.verify()
    assert report.revision == 3
    assert [check.key for check in report.checks] == [key for key, _ in FREE[:3]]
    assert report.score == Score(3, 3) and report.generated == Score(3, 3, "generated")
    assert [e for e in events if isinstance(e, RetentionCheck)] == list(report.checks)
    for row, check in zip(trained.store.facts("committed"), report.checks, strict=True):
        assert (row.health, row.last_checked_revision) == ("recalled", 3)
        assert row.margin == check.margin
        newest = trained.store.results(row.id, limit=11)
        assert {r.protocol for r in newest} == {"teacher-forced", "generated"}


def test_verify_of_some(trained: KnowledgeBase) -> None:
    assert [c.key for c in trained.verify([FREE[1][0]]).checks] == [FREE[1][0]]
    assert len(trained.verify(sample=2).checks) == 2
    with pytest.raises(UnknownKeyError):
        trained.verify(["nobody"])


# ---- reversible


def test_rollback_to_every_revision_gives_its_bits(
    trained: KnowledgeBase, trained_template: StoreTemplate
) -> None:
    for target in (1, 3, 0, 2):
        report = trained.rollback(target)
        assert (report.kind, report.outcome) == ("rollback", "committed")
        assert report.revision == trained.store.head()
        assert digest(trained) == trained_template.digests[target]
        assert trained.store.revision(report.revision).weights_digest == digest(trained)
        assert trained.store.keys() == [key for key, _ in FREE[:target]]
    assert [f for f in trained.doctor() if f.level != "ok"] == []


def test_a_rollback_appends_and_can_be_rolled_back(trained: KnowledgeBase) -> None:
    before = digest(trained)
    first = trained.rollback(1)
    assert first.revision == 4 and len(trained.store.revisions()) == 5
    assert trained.ask(f"What is {FREE[2][0]}?") != FREE[2][1]
    trained.rollback(3)
    assert digest(trained) == before
    assert trained.ask(f"What is {FREE[2][0]}?") == FREE[2][1]


def test_what_teaches_nothing_measures_nothing(
    trained: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What must stay is measured before facts are taught; of thousands that takes minutes."""
    key, description = FREE[2]

    def measured(*_: Any) -> None:
        raise AssertionError("measured")

    for name in ("_load_fisher", "_measure", "make_protected"):
        monkeypatch.setattr(session.Session, name, measured)
    assert trained.add(key, description).outcome == "unchanged"
    assert trained.update(key, description).outcome == "unchanged"
    with pytest.raises(DuplicateKeyError):
        trained.add(key, "Something else.")
    with pytest.raises(UnknownKeyError):
        trained.remove("no such key")
    assert trained.rollback(1).outcome == "committed"
    with pytest.raises(AssertionError, match="measured"):
        trained.add(*FREE[3])


def test_rollback_to_a_revision_that_is_not_there(trained: KnowledgeBase) -> None:
    before = state(trained)
    with pytest.raises(UsageError, match="no revision 9"):
        trained.rollback(9)
    assert state(trained) == before


@pytest.mark.parametrize("seed", range(3))
def test_random_histories_can_be_walked_back(
    empty_store: Path, random_training: None, seed: int
) -> None:
    import random

    rng = random.Random(seed)
    configure(empty_store, recall=0, paraphrase=0, locality=0, retention=0, checkpoint_every=3)
    recorded: dict[int, tuple[str, dict[str, str]]] = {}
    with KnowledgeBase.open(empty_store) as knowledge:
        for step in range(9):
            held = knowledge.store.keys()
            kind = rng.choice(["add", "add", "update", "remove", "rollback", "reopen"])
            if kind == "add" or not held:
                report = knowledge.add(f"thing {step}", "Made of clay.")
            elif kind == "update":
                report = knowledge.update(rng.choice(held), f"Made of oak {step}.")
            elif kind == "remove":
                report = knowledge.remove(rng.choice(held))
            elif kind == "rollback":
                report = knowledge.rollback(rng.randrange(knowledge.store.head() + 1))
            else:
                knowledge._session.checkout.go_to(knowledge.store.head())
                continue
            assert report.outcome == "committed"
            texts = {r.fact.key: r.fact.description for r in knowledge.store.facts("committed")}
            recorded[report.revision or 0] = (digest(knowledge), texts)
    with KnowledgeBase.open(empty_store) as knowledge:
        assert digest(knowledge) == recorded[knowledge.store.head()][0]
        assert [f for f in knowledge.doctor() if f.level != "ok"] == []
        for revision, (bits, texts) in recorded.items():
            knowledge.rollback(revision)
            assert digest(knowledge) == bits
            rows = knowledge.store.facts("committed")
            assert {r.fact.key: r.fact.description for r in rows} == texts


# ---- questions


def test_questions_to_other_revisions_leave_the_head_served(trained: KnowledgeBase) -> None:
    before = digest(trained)
    prompt = f"What is {FREE[1][0]}?"
    assert trained.ask(prompt, at=2) == trained.ask(prompt, at=3) == FREE[1][1]
    assert trained.ask(prompt, at=1) != FREE[1][1]
    assert trained.ask_base(prompt) == trained.ask(prompt, at=0)
    assert digest(trained) == before
    with pytest.raises(UsageError):
        trained.ask(prompt, at=17)
    assert digest(trained) == before


def test_chat_is_a_conversation(trained: KnowledgeBase) -> None:
    key, answer = FREE[0]
    one = [{"role": "user", "content": f"What is {key}?"}]
    assert trained.chat(one) == trained.ask(f"What is {key}?") == answer
    assert len(trained.ask(f"What is {key}?", max_new_tokens=1)) < len(answer)


# ---- keys


def test_the_same_text_again_changes_nothing(trained: KnowledgeBase) -> None:
    before = state(trained)
    report = trained.add(FREE[0][0].upper() + " ", FREE[0][1])
    assert (report.outcome, report.key, report.revision) == ("unchanged", FREE[0][0], None)
    assert state(trained) == before and len(trained.store.history()) == 3


def test_another_text_for_a_key_asks_for_update(trained: KnowledgeBase) -> None:
    before = state(trained)
    with pytest.raises(DuplicateKeyError) as raised:
        trained.add(FREE[0][0], OTHER)
    assert "kvedit update" in raised.value.hint
    assert state(trained) == before


def test_a_similar_key_warns_with_its_score(
    trained_store: Path, random_training: None, events: list[Any]
) -> None:
    configure(trained_store, recall=0, paraphrase=0, locality=0, retention=0)
    with KnowledgeBase.open(trained_store, on_event=events.append) as knowledge:
        report = knowledge.add("tide lanterns", OTHER)
    warned = [e for e in events if isinstance(e, Warning_)]
    assert [(w.code, w.key) for w in warned] == [("similar-key", FREE[0][0])]
    assert report.similar[0].key == FREE[0][0] and report.similar[0].score > 85
    first = next(e for e in events if isinstance(e, RetentionCheck))
    assert first.key == FREE[0][0]


@pytest.mark.parametrize("verb", ["update", "remove"])
def test_an_unknown_key_gets_a_suggestion(trained: KnowledgeBase, verb: str) -> None:
    before = state(trained)
    action = getattr(trained, verb)
    with pytest.raises(UnknownKeyError) as raised:
        action("tide lantren", *([OTHER] if verb == "update" else []))
    assert FREE[0][0] in raised.value.hint
    assert state(trained) == before


# ---- bad input


@pytest.mark.parametrize(
    ("key", "text", "error"),
    [
        ("", "something", InvalidFactError),
        ("something", "  \n", InvalidFactError),
        ("some\0thing", "text", InvalidFactError),
        ("something", "word " * 400, TextTooLongError),
    ],
    ids=["no key", "no text", "zero byte", "too long"],
)
def test_bad_facts_change_nothing(
    trained: KnowledgeBase, key: str, text: str, error: type[Exception]
) -> None:
    before = state(trained)
    with pytest.raises(error):
        trained.add(key, text)
    assert state(trained) == before
    assert len(trained.store.facts()) == 3


def test_too_long_an_update_says_how_long(trained: KnowledgeBase) -> None:
    before = state(trained)
    with pytest.raises(TextTooLongError, match=r"192"):
        trained.update(FREE[0][0], "word " * 400)
    assert state(trained) == before


def test_no_store(tmp_path: Path) -> None:
    with pytest.raises(NoStoreError):
        KnowledgeBase.open(tmp_path)


def test_a_corrupt_delta_stops_the_store_from_opening(trained_store: Path) -> None:
    with Store.open(trained_store) as store:
        path = store.delta_path(store.revision(3).delta or "")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptStoreError, match=path.name[:12]):
        KnowledgeBase.open(trained_store)


# ---- interruptions


def interrupt(error: BaseException, phase: str = "learn", step: int = 2) -> Callable[[Any], None]:
    """An event handler that raises in the middle of training."""

    def handler(event: Any) -> None:
        if isinstance(event, Status) and (event.phase, event.step) == (phase, step):
            raise error

    return handler


def test_ctrl_c_in_training_cancels_the_edit(
    trained_store: Path, trained_template: StoreTemplate
) -> None:
    with KnowledgeBase.open(trained_store, on_event=interrupt(KeyboardInterrupt())) as knowledge:
        before = state(knowledge)
        with pytest.raises(Interrupted) as raised:
            knowledge.add(*FREE[3])
        assert raised.value.exit_code == 130
        assert state(knowledge) == before
        assert knowledge.store.history()[0].state == "canceled"
        assert knowledge.store.require(FREE[3][0]).state == "pending"
        knowledge._emit = lambda event: None
        assert knowledge.add(*FREE[3]).outcome == "committed"
        assert knowledge.ask(f"What is {FREE[0][0]}?") == FREE[0][1]


def test_ctrl_c_after_the_commit_says_so(
    trained_store: Path, random_training: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure(trained_store, recall=0, paraphrase=0, locality=0, retention=0)

    def handler(event: Any) -> None:
        if isinstance(event, RetentionCheck):
            raise KeyboardInterrupt

    with KnowledgeBase.open(trained_store, on_event=handler) as knowledge:
        with pytest.raises(Interrupted, match="was committed"):
            knowledge.add(*FREE[3])
        assert knowledge.store.head() == 4
        assert digest(knowledge) == knowledge.store.revision(4).weights_digest
        knowledge._emit = lambda event: None
        # The knowledge base goes on from the revision that was committed.
        prompt = f"What is {FREE[0][0]}?"
        assert knowledge.ask(prompt, at=3) == FREE[0][1]
        assert digest(knowledge) == knowledge.store.revision(4).weights_digest
        assert knowledge.rollback(3).revision == 5
        assert digest(knowledge) == knowledge.store.revision(3).weights_digest


def test_an_error_in_training_fails_the_edit(trained_store: Path) -> None:
    error = TrainingError("the loss is not a number")
    with KnowledgeBase.open(trained_store, on_event=interrupt(error)) as knowledge:
        before = state(knowledge)
        with pytest.raises(TrainingError):
            knowledge.update(FREE[1][0], OTHER)
        assert state(knowledge) == before
        row = knowledge.store.history()[0]
        assert row.state == "failed" and "not a number" in row.reasons[0]
        assert knowledge.ask(f"What is {FREE[1][0]}?") == FREE[1][1]


# ---- memory


def test_memory_that_runs_out_after_the_commit_is_a_warning(
    empty: KnowledgeBase, events: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from kvedit.training.engine import Engine

    def full(*_: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as inside:
        inside.setattr(Engine, "remember", full)
        assert empty.add(*FREE[0]).outcome == "committed"
    assert [e.code for e in events if isinstance(e, Warning_)] == ["not-kept"]
    assert empty.add(*FREE[1]).outcome == "committed"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_full_disk_changes_nothing(
    trained_store: Path, random_training: None, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The disk fills when the delta is written; nothing of it is left behind."""
    configure(trained_store, recall=0, paraphrase=0, locality=0, retention=0)
    real = getattr(os, call)

    def full(*args: Any) -> Any:
        where = os.readlink(f"/proc/self/fd/{args[0]}") if call == "fsync" else str(args[1])
        if "/deltas/" in where:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*args)

    with KnowledgeBase.open(trained_store) as knowledge:
        before = state(knowledge)
        monkeypatch.setattr(os, call, full)
        with pytest.raises(DiskFullError) as raised:
            knowledge.add(*FREE[3])
        assert "space" in raised.value.hint.lower()
        assert state(knowledge) == before
        assert knowledge.store.history()[0].state == "failed"
        monkeypatch.setattr(os, call, real)
        assert knowledge.add(*FREE[3]).outcome == "committed"


@pytest.mark.parametrize("part", ["cache", "checkpoints"])
def test_a_disk_that_is_full_after_the_commit_is_a_warning(
    trained_store: Path,
    random_training: None,
    monkeypatch: pytest.MonkeyPatch,
    events: list[Any],
    part: str,
) -> None:
    """What is only kept to save time must not make a committed edit look like a failed one."""
    configure(trained_store, recall=0, paraphrase=0, locality=0, retention=0, checkpoint_every=1)
    real = os.replace

    def full(source: Any, target: Any) -> Any:
        if f"/{part}/" in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with KnowledgeBase.open(trained_store, on_event=events.append) as knowledge:
        report = knowledge.add(*FREE[3])
        assert (report.outcome, report.revision) == ("committed", 4)
        wanted = digest(knowledge)
    assert any(isinstance(e, Warning_) and "space" in e.text for e in events)
    monkeypatch.setattr(os, "replace", real)
    with KnowledgeBase.open(trained_store) as knowledge:
        assert (knowledge.store.head(), digest(knowledge)) == (4, wanted)
        assert {f.level for f in knowledge.doctor()} == {"ok"}


# ---- more than one process


def test_a_locked_store_can_be_asked_but_not_edited(
    trained_store: Path, trained: KnowledgeBase
) -> None:
    with Store.open(trained_store) as other, other.lock():
        before = state(trained)
        with pytest.raises(LockedError):
            trained.add(*FREE[3])
        with pytest.raises(LockedError):
            trained.rollback(1)
        assert trained.ask(f"What is {FREE[0][0]}?") == FREE[0][1]
        assert state(trained) == before
        with KnowledgeBase.open(trained_store) as third:  # opening does not need the lock either
            assert third.ask(f"What is {FREE[0][0]}?") == FREE[0][1]


def test_an_edit_starts_from_what_another_process_committed(
    trained_store: Path, trained: KnowledgeBase, trained_template: StoreTemplate
) -> None:
    with KnowledgeBase.open(trained_store) as other:
        other.rollback(1)
    report = trained.rollback(2)
    assert report.parent == 4 and report.revision == 5
    assert digest(trained) == trained_template.digests[2]


def test_recovery_says_what_was_interrupted(trained_store: Path, events: list[Any]) -> None:
    with Store.open(trained_store) as store:
        store.plan_edit("rollback", store.rollback_changes(1), {})
    with KnowledgeBase.open(trained_store, on_event=events.append) as knowledge:
        assert knowledge.store.history()[0].state == "failed"
    warned = [e for e in events if isinstance(e, Warning_)]
    assert [w.code for w in warned] == ["recovered"]
    assert "did not happen" in warned[0].text


# ---- protected text


def test_protected_text_is_made_once_and_disjoint(trained: KnowledgeBase) -> None:
    control = trained.store.protected("control")
    locality = trained.store.protected("locality")
    assert len(locality) == 8 and len(control) > 20
    assert not {r.prompt for r in control if r.prompt} & {r.prompt for r in locality}
    known = {(f"What is {key}?", text) for key, text in KNOWN.items()}
    assert known  # the model's own answers, never a list that it was trained on
    for row in locality:
        assert trained.ask_base(row.prompt) == row.answer


def test_many_facts_get_more_protected_text_once(empty_store: Path) -> None:
    text = settings().replace("max_samples = 96", "max_samples = 1600\ndrafts_a_fact = 40")
    (empty_store / "kvedit.toml").write_text(text, encoding="utf-8")
    with KnowledgeBase.open(empty_store) as knowledge:
        first = knowledge.store.protected("control")
        knowledge.protect_for(2)  # 80 drafts: there were 96
        assert knowledge.store.protected("control") == first
        knowledge.protect_for(40)
        grown = knowledge.store.protected("control")
        assert grown[: len(first)] == first and len(grown) > len(first)
        prompts = [row.prompt for row in grown if row.prompt]
        scoring = {row.prompt for row in knowledge.store.protected("locality")}
        assert len(set(prompts)) == len(prompts) and not scoring & set(prompts)
        before = digest(knowledge)
        knowledge.protect_for(500)  # no more than max_samples
        assert knowledge.store.protected("control") == grown and digest(knowledge) == before
    with KnowledgeBase.open(empty_store) as again:
        again.protect_for(40)
        assert again.store.protected("control") == grown


def test_a_name_that_is_left_out_is_in_no_new_protected_text(empty_store: Path) -> None:
    text = settings().replace("max_samples = 96", "max_samples = 2000\ndrafts_a_fact = 2000")
    (empty_store / "kvedit.toml").write_text(text, encoding="utf-8")
    with KnowledgeBase.open(empty_store) as knowledge:
        first = len(knowledge.store.protected("control"))
        told = " ".join(row.prompt for row in knowledge.store.protected("control"))
        asked, *_ = [key for key in KNOWN if key not in told]
        knowledge.protect_for(1, leave_out=[asked])
        new = knowledge.store.protected("control")[first:]
        assert new and not [row for row in new if asked in f"{row.prompt} {row.answer}"]


def test_a_group_is_not_held_to_what_it_changes(
    empty: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    own = empty.engine.train

    def train(task: Any, *rest: Any) -> Any:
        told.append(len(task.reference_texts))
        return own(task, *rest)

    monkeypatch.setattr(empty.engine, "train", train)
    prompts = " ".join(row.prompt for row in empty.store.protected("control"))
    names = [key for key in KNOWN if key in prompts][:2]
    empty.add_group([Fact.create(name, "Another thing altogether.") for name in names])
    whole = empty.engine.reference_texts
    assert whole is not None and 0 < told[0] < len(whole)
    assert told[0] == len(whole.without(names))


def test_from_the_base_model_on_the_margins_of_what_is_known_count(
    empty: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For that edit alone: what follows is held to the base's text and the facts, as ever."""
    during: list[Any] = []
    measured: list[int] = []
    train, measure = empty.engine.train, empty.engine.measure_margins

    def trained(*task: Any) -> TrainingResult:
        during.append(empty.engine.fisher)
        return train(*task)

    def known(texts: Any) -> None:
        assert empty._session.revision == 0
        measured.append(len(texts))
        measure(texts)

    monkeypatch.setattr(empty.engine, "train", trained)
    monkeypatch.setattr(empty.engine, "measure_margins", known)
    for few in (FREE[:2], FREE[2:4]):  # the first, and one that begins anew
        report, *_ = empty.add_group([Fact.create(*pair) for pair in few], carry=True)
        assert report.outcome == "committed"
        now = empty.engine.fisher
        assert now is not None and now[1] is not now[0] is during[-1][0]
    assert during[0][1] is during[-1][1] is not empty.engine.fisher[1]
    assert empty.engine.reference_texts is not None
    assert measured == [len(empty.engine.reference_texts)]  # once for both
    empty.store.close()
    with KnowledgeBase.open(empty.store.path) as again:  # and for who comes after
        monkeypatch.setattr(again.engine, "measure_margins", known)
        again.add_group([Fact.create(*pair) for pair in FREE[4:8]])
        assert again._session.protection._margins is not None and len(measured) == 1


def test_what_must_stay_is_measured_again_as_facts_come_in(
    empty: KnowledgeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "LEAST_MEASURED", 2)
    monkeypatch.setattr(
        empty._groups, "should_compact", lambda facts: False
    )  # what is on top is measured
    measured = []
    own = empty.engine.measure_at_head

    def here(texts: Any, facts: Any, weight: float) -> None:
        measured.append((len(texts), len(facts)))
        base = empty.engine.fisher
        own(texts, facts, weight)
        now = empty.engine.fisher
        assert base is not None and now is not None
        assert now[0] is base[0] and now[1] is not base[1]

    monkeypatch.setattr(empty.engine, "measure_at_head", here)
    for few in (FREE[:2], FREE[2:4]):
        empty.add_group([Fact.create(*pair) for pair in few])
    held = len(empty.store.facts("committed"))
    texts = len(empty.store.protected("control"))
    empty.add_group([Fact.create(*pair) for pair in FREE[4:6]])
    assert held >= 3 and (texts, held) in measured


def test_users_own_protected_text(small: dict[str, Path], tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text('{"prompt": "What is bread?", "answer": "Food."}\n', encoding="utf-8")
    (tmp_path / "store").mkdir()
    configure(tmp_path / "store")
    with KnowledgeBase.create(tmp_path / "store", small["bf16"], protect=own) as knowledge:
        rows = knowledge.store.protected("control")
        assert ("What is bread?", "Food.", "own.jsonl") in {
            (r.prompt, r.answer, r.source) for r in rows
        }


# ---- doctor


def test_doctor_finds_a_delta_that_was_swapped(trained_store: Path) -> None:
    with KnowledgeBase.open(trained_store) as knowledge:
        assert {f.level for f in knowledge.doctor()} == {"ok"}
        path = knowledge.store.delta_path(knowledge.store.revision(1).delta or "")
        kept = path.read_bytes()
        path.write_bytes(kept[:-1] + b"\0")
        levels = [f for f in knowledge.doctor() if f.level == "error"]
        assert any("revision 1" in f.what for f in levels)
        path.write_bytes(kept)
        assert {f.level for f in knowledge.doctor()} == {"ok"}


def test_doctor_finds_a_digest_that_does_not_hold(trained_store: Path) -> None:
    with KnowledgeBase.open(trained_store) as knowledge:
        store = knowledge.store
        with store._transaction():
            store._execute("UPDATE revisions SET weights_digest = ? WHERE id = 2", ["0" * 64])
        found = [f.what for f in knowledge.doctor() if f.level == "error"]
        assert len(found) == 1 and "revision 2" in found[0]
        assert knowledge.ask(f"What is {FREE[0][0]}?") == FREE[0][1]
