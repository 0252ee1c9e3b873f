"""What of the base model is protected so far: in slices, resumed, and more of it after edits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_engine import configure, open_gate, random_train, warnings_in
from small_model import FREE
from torch import Tensor

from kvedit import KnowledgeBase
from kvedit.errors import UsageError
from kvedit.events import Status
from kvedit.replay.questions import Limits
from kvedit.replay.sampling import Sampler
from kvedit.revisions.coverage import Coverage, Progress
from kvedit.store import integrity
from kvedit.training.engine import Engine


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """The folder of a store to be made."""
    (tmp_path / "store").mkdir()
    configure(tmp_path / "store")
    return tmp_path / "store"


@pytest.fixture
def small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of 24 questions each."""
    limits = Sampler.limits

    def small(self: Sampler, seconds: float, asked: int, number: int) -> Limits:
        return replace(limits(self, seconds, asked, number), rows=24)

    monkeypatch.setattr(Sampler, "limits", small)


def progress(knowledge: KnowledgeBase) -> Progress:
    return knowledge._session.protection._coverage.progress


def texts(knowledge: KnowledgeBase) -> list[tuple[str, str, str]]:
    roles = ("control", "locality")
    rows = [row for role in roles for row in knowledge.store.protected(role)]
    return [(row.role, row.prompt, row.answer) for row in rows]


def tokens(knowledge: KnowledgeBase) -> int:
    fisher = knowledge.engine.fisher
    assert fisher is not None
    return fisher[0].tokens


def first_slice_only(source: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> KnowledgeBase:
    """A store that had no time for more; its edits change the weights at random and pass."""
    open_gate(path)
    monkeypatch.setattr(Engine, "train", random_train())
    return KnowledgeBase.create(path, source, time=0.0)


class Killed(BaseException):
    """Stands for the end of the process."""


def killed_at(number: int, phase: str) -> Any:
    """An event handler that raises at the n-th status of a phase."""
    seen: list[Any] = []

    def handle(event: Any) -> None:
        if isinstance(event, Status) and event.phase == phase:
            seen.append(event)
            if len(seen) == number:
                raise Killed

    return handle


def test_time_enough_gives_all_that_the_settings_ask_for(
    small: dict[str, Path], path: Path
) -> None:
    events: list[Any] = []
    with KnowledgeBase.create(path, small["bf16"], on_event=events.append) as knowledge:
        done = progress(knowledge)
        control = knowledge.store.protected("control")
        assert (done.asked, done.written, done.measured) == (96, True, len(control))
        assert knowledge._session.protection._coverage.is_complete
    assert not warnings_in(events, "few-probes")
    phases = [event.phase for event in events if isinstance(event, Status)]
    assert phases[0].startswith("asking and measuring up to 96 questions: at most about ")
    assert phases[-1].startswith(f"protected: {len(control)} texts, {len(control)} of them")


@pytest.mark.usefixtures("small_slices")
def test_an_interrupted_init_goes_on_where_it_was(
    small: dict[str, Path], tmp_path: Path, path: Path
) -> None:
    (tmp_path / "other").mkdir()
    configure(tmp_path / "other")
    with KnowledgeBase.create(tmp_path / "other", small["bf16"]) as whole:
        expected, count, slices = texts(whole), tokens(whole), progress(whole).slices
        assert slices > 2
    for number, phase in (
        (1, "sampling free text from the model"),
        (2, "measuring what must stay"),
    ):
        with pytest.raises(Killed):
            KnowledgeBase.create(path, small["bf16"], on_event=killed_at(number, phase))
    with KnowledgeBase.create(path, small["bf16"]) as knowledge:
        assert texts(knowledge) == expected and progress(knowledge).slices == slices
        assert tokens(knowledge) == count
    with pytest.raises(UsageError, match="already"):
        KnowledgeBase.create(path, small["bf16"])


@pytest.mark.usefixtures("small_slices")
def test_an_edit_goes_on_with_an_interrupted_init(small: dict[str, Path], path: Path) -> None:
    with pytest.raises(Killed):
        handler = killed_at(1, "sampling free text from the model")
        KnowledgeBase.create(path, small["bf16"], on_event=handler)
    with KnowledgeBase.open(path) as knowledge:
        begun = texts(knowledge)
        knowledge.protect_for(1)
        assert set(begun) < set(texts(knowledge)) and progress(knowledge).written


@pytest.mark.usefixtures("small_slices")
def test_little_time_gives_something_and_edits_the_rest(
    small: dict[str, Path], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with first_slice_only(small["bf16"], path, monkeypatch) as knowledge:
        first = progress(knowledge)
        assert first.asked == 24 and first.measured and not first.written
        before = tokens(knowledge), texts(knowledge)
        knowledge.add(*FREE[0])  # too quick for a share of its time to be enough for something
        assert progress(knowledge).asked == 24 and progress(knowledge).credit > 0
        coverage = knowledge._session.protection._coverage
        coverage._keep(replace(progress(knowledge), credit=100.0))
        head = knowledge.engine.master.digest()
        knowledge.add(*FREE[1])
        assert coverage.is_complete and progress(knowledge).credit == 0.0
        assert tokens(knowledge) > before[0] and set(before[1]) < set(texts(knowledge))
        assert knowledge.engine.master.digest() != head
        base, total = knowledge.engine.fisher or (None, None)
        assert base is not total
        parts = [texts(knowledge), tokens(knowledge)]
    with KnowledgeBase.open(path) as again:
        again.protect_for(0)
        assert [texts(again), tokens(again)] == parts


@pytest.mark.usefixtures("small_slices")
def test_within_an_edit_the_rest_can_be_measured_at_once(
    small: dict[str, Path], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with first_slice_only(small["bf16"], path, monkeypatch) as knowledge:
        protection, before = knowledge._session.protection, tokens(knowledge)
        head = knowledge.engine.master.digest()
        assert protection.extend_at_once(1e6)
        assert protection._coverage.is_complete and tokens(knowledge) > before
        assert knowledge.engine.master.digest() == head
        assert not protection.extend_at_once(1e6)


def of_facts(knowledge: KnowledgeBase) -> tuple[int, int, dict[str, Tensor]]:
    """Tokens of the base's moments and of all, and what committed facts add to the base's."""
    assert knowledge.engine.fisher is not None
    base, total = knowledge.engine.fisher
    return base.tokens, total.tokens, {k: v - base.sides[k] for k, v in total.sides.items()}


@pytest.mark.usefixtures("small_slices")
def test_later_texts_are_added_to_the_base_and_to_all(
    small: dict[str, Path], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with first_slice_only(small["fp32"], path, monkeypatch) as knowledge:
        knowledge.add(*FREE[0])
        protection = knowledge._session.protection
        base, total, facts = of_facts(knowledge)
        protection._coverage._token_seconds = None  # a few texts first, then the rest
        with monkeypatch.context() as patched, pytest.raises(Killed):
            handler = killed_at(2, "measuring what must stay")
            patched.setattr(knowledge._session, "emit", handler)
            protection.extend(1e6)
        protection.extend(1e6)
        grown_base, grown_total, facts_after = of_facts(knowledge)
        coverage = protection._coverage
        examples = protection._examples(coverage.measured_texts())
        assert coverage.is_complete and grown_base == sum(len(one.ids) for one in examples)
        assert grown_total - total == grown_base - base > 0
        for name, side in facts.items():
            scale = max(float(side.abs().max()), 1e-6)
            assert float((facts_after[name] - side).abs().max()) <= 1e-2 * scale, name


def test_moments_of_slices_are_those_of_all(small: dict[str, Path], path: Path) -> None:
    with KnowledgeBase.create(path, small["fp32"]) as knowledge:
        coverage = knowledge._session.protection._coverage
        in_slices = knowledge.engine.fisher
        examples = knowledge._session.protection._examples(coverage.measured_texts())
        knowledge.engine.protect(examples)
        at_once = knowledge.engine.fisher
        assert in_slices is not None and at_once is not None
        assert in_slices[0].tokens == at_once[0].tokens == sum(len(one.ids) for one in examples)
        for name, side in at_once[0].sides.items():
            if name.endswith(".inputs"):  # gradients hang on random samples
                assert (in_slices[0].sides[name] - side).abs().max() <= 1e-3 * side.abs().max()


def test_too_few_probes_are_said(small: dict[str, Path], tmp_path: Path) -> None:
    path, events = tmp_path / "store", []
    path.mkdir()
    (path / "kvedit.toml").write_text("[protect]\nsamples = 4\nfree_texts = 0\n", encoding="utf-8")
    with KnowledgeBase.create(path, small["bf16"], on_event=events.append) as knowledge:
        probes = len(knowledge.store.protected("locality"))
        status = integrity.status(knowledge.store)
    assert probes < 32 and status["locality_probes"] == probes
    (warning,) = warnings_in(events, "few-probes")
    assert warning.text == status["few_probes"]
    assert ("only" in warning.text) == bool(probes)


def test_a_store_of_before_has_everything(small: dict[str, Path], path: Path) -> None:
    KnowledgeBase.create(path, small["bf16"]).close()
    with KnowledgeBase.open(path) as knowledge:
        knowledge.store._db.execute("DELETE FROM meta WHERE name = 'protected_progress'")
        coverage = Coverage(knowledge._session)
        assert coverage.is_complete and coverage.label == ""
