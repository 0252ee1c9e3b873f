"""A fake knowledge base, and short cuts for the tests of the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from click.testing import CliRunner, Result

from kvedit.asking.diff import RevisionDiff, changed_facts
from kvedit.asking.explain import Explanation
from kvedit.cli import cli
from kvedit.editing.study.filters import Refused, Sorted, StudyReport
from kvedit.events import EditReport, Event, RetentionCheck, Score, Similar
from kvedit.facts.fact import Fact, Written
from kvedit.store.forget.plans import PrunePlan
from kvedit.store.rows import FactChange, Finding, ProbeRow
from kvedit.store.store import Store

ROOT = Path(__file__).resolve().parents[2]
META = {
    "model_name": "kvedit-tiny", "model_fingerprint": "f" * 64, "protected_text": "complete",
}  # fmt: skip
COMMITTED = EditReport(
    kind="add",
    outcome="committed",
    key="夢中情爐",
    revision=1,
    parent=0,
    reliability=Score(8, 8),
    generalization=Score(5, 6, "generated"),
    locality=Score(32, 32, "generated"),
    steps=42,
    seconds=3.14,
    timings={"train": 2.5, "gate": 0.5, "journal": 0.001},
    ranks={"layers.0.q_proj": 16},
    relative_norms={"layers.0.q_proj": 0.0123},
    similar=(Similar("夢中情人", 88.0),),
)
REJECTED = replace(
    COMMITTED,
    outcome="rejected",
    revision=None,
    reasons=("recall 6 of 8 is under 100%", "retention: Porto was lost"),
    reliability=Score(6, 8),
)


class FakeBaseReport(NamedTuple):
    score: Score
    generated: Score
    lost: tuple[str, ...] = ()
    fluency: float | None = 4.0
    base_fluency: float | None = 4.5


class FakeVerify(NamedTuple):
    revision: int = 3
    checks: tuple[RetentionCheck, ...] = ()
    score: Score = Score(2, 2)
    generated: Score = Score(2, 2, "generated")
    answers: Score = Score(0, 0, "generated")
    perturbation_gap: float | None = None
    base: FakeBaseReport | None = None
    repaired: tuple[EditReport, ...] = ()
    seconds: float = 1.5


class Condition(NamedTuple):
    name: str
    score: Score
    lost: tuple[str, ...] = ()


class FakeExport(NamedTuple):
    path: Path
    revision: int = 1
    probes: Score = Score(9, 9, "generated")
    mismatches: tuple[str, ...] = ()
    rank: int | None = None
    error: float | None = None
    conditions: tuple[Condition, ...] = (
        Condition("as trained", Score(9, 9)),
        Condition("weights in 4 bits (Q4_0)", Score(7, 9), ("Porto", "Ada")),
        Condition("no template", Score()),
    )
    serve: str = "transformers serve out"


class FakeAnswer(NamedTuple):
    text: str
    revision: int
    sources: tuple[FakeSource, ...]
    recited: tuple[str, ...]
    left_out: tuple[str, ...]
    cut: bool = False


class FakeRecalled(NamedTuple):
    messages: tuple[dict[str, str], ...]
    sources: tuple[FakeSource, ...]
    recited: tuple[str, ...]
    left_out: tuple[str, ...]


class FakeSource(NamedTuple):
    key: str = "Porto"
    name: str = "Porto"
    score: float = 100.0
    origin: str = "store"
    text: str = "A harbour town."
    exact: bool = True

    def to_json(self) -> dict[str, Any]:
        return self._asdict()


class FakeBase:
    """Answers as the class attributes say, and remembers its calls."""

    report: ClassVar[EditReport] = COMMITTED
    verified: ClassVar[FakeVerify] = FakeVerify()
    mismatches: ClassVar[tuple[str, ...]] = ()
    findings: ClassVar[tuple[Finding, ...]] = (Finding(level="ok", what="sound", hint=""),)
    sources: ClassVar[tuple[FakeSource, ...]] = (FakeSource(),)
    explanation: ClassVar[Explanation] = Explanation(
        question="", revision=2, answer="A harbour town.", base_answer="A wine.", changes=(),
        facts=(), asked=2,
    )  # fmt: skip
    events: ClassVar[tuple[Event, ...]] = ()
    error: ClassVar[BaseException | None] = None
    last: ClassVar[FakeBase | None] = None

    def __init__(self, store: Store, on_event: Callable[[Event], None] | None) -> None:
        self.store = store
        self.on_event = on_event
        self.calls: list[tuple[Any, ...]] = []

    @classmethod
    def create(cls, path: Path, model: str | None = None, **options: Any) -> FakeBase:
        base = cls(Store.create(path, META), options.pop("on_event", None))
        base.calls.append(("create", model, options))
        FakeBase.last = base
        return base

    @classmethod
    def open(cls, path: Path, *, on_event: Any = None) -> FakeBase:
        FakeBase.last = cls(Store.open_to_ask(path), on_event)
        return FakeBase.last

    def __enter__(self) -> FakeBase:
        return self

    def __exit__(self, *exception: object) -> None:
        self.store.close()

    def protect_for(self, facts: int) -> None:
        """Not counted among the calls: only ingest asks for it, before its first group."""

    def _called(self, *call: Any) -> EditReport:
        self.calls.append(call)
        for event in self.events:
            if self.on_event is not None:
                self.on_event(event)
        if self.error is not None:
            raise self.error
        return self.report

    def add(self, key: str, description: str, **options: Any) -> EditReport:
        return self._called("add", key, description, options)

    def update(self, key: str, description: str, **options: Any) -> EditReport:
        return replace(self._called("update", key, description, options), kind="update")

    def study(self, key: str, texts: Sequence[Written], **options: Any) -> StudyReport:
        report = replace(self._called("study", key, list(texts), options), kind="update")
        outcome = Sorted(tuple(texts[:1]), tuple(Refused(one, "it is late") for one in texts[1:]))
        return StudyReport(key, outcome, report if outcome.kept else None)

    def remove(self, key: str, **options: Any) -> EditReport:
        return replace(self._called("remove", key, options), kind="remove")

    def rollback(self, revision: int) -> EditReport:
        return replace(self._called("rollback", revision), kind="rollback", key="")

    def erase(self, *keys: str, force: bool = False) -> EditReport:
        report = self._called("erase", keys, force)
        return replace(report, kind="erase", key="1 fact", revision=3)

    def prune(self, before: int) -> PrunePlan:
        self._called("prune", before)
        return self.store.prune_plan(before)

    def answer(
        self, messages: list[dict[str, str]], *, at: int | None = None, max_new_tokens: int = 256,
        recall: bool | str = False,
    ) -> FakeAnswer:  # fmt: skip
        question = messages[-1]["content"]
        self._called("ask", question, at, max_new_tokens, *([recall] if recall else []))
        revision = self.store.head() if at is None else at
        text = f"now: {question}" if len(messages) == 1 else f"{len(messages)}: {question}"
        return FakeAnswer(text, revision, self.sources if recall else (), (), ())

    def recall(self, messages: list[dict[str, str]], *, source: bool | str = True) -> FakeRecalled:
        self._called("recall", messages[-1]["content"], source)
        texts = [{"role": "user", "content": source.text} for source in self.sources]
        return FakeRecalled((*texts, *messages), self.sources, ("Lagos",), ("Faro",))

    def ask_base(self, prompt: str, *, max_new_tokens: int = 256) -> str:
        return f"base: {prompt}"

    def explain(self, question: str, **options: Any) -> Explanation:
        self._called("explain", question, options)
        return replace(self.explanation, question=question)

    def diff(self, before: int, after: int, *, ask: int) -> RevisionDiff:
        self._called("diff", before, after, ask)
        changed = changed_facts(self.store, before, after)
        facts = [replace(one, prompt=f"What is {one.key}?") for one in changed] if ask else changed
        return RevisionDiff(before=before, after=after, facts=tuple(facts), asked=ask)

    def stream(self, messages: list[dict[str, str]], *, limit: int = 256) -> Iterator[str]:
        self._called("stream", messages[-1]["content"], limit)
        yield f"{len(messages)}: "
        if messages[-1]["content"] == "endless":
            raise KeyboardInterrupt
        yield messages[-1]["content"]

    def verify(self, keys: Any = None, **options: Any) -> FakeVerify:
        self._called("verify", keys, options)
        return self.verified

    def export(
        self, directory: Path, *, dtype: str | None = None, max_shard_size: str | None = None
    ) -> FakeExport:
        self._called("export", directory, dtype, max_shard_size)
        return FakeExport(directory, mismatches=self.mismatches)

    def example_lines(self) -> list[str]:
        return ["prompt  'What is x?'", "answer  'A.<|end|>'"]

    def export_adapter(self, directory: Path) -> FakeExport:
        self._called("export_adapter", directory)
        return FakeExport(directory, mismatches=self.mismatches, rank=4, error=0.125)

    def doctor(self, deep: bool = True) -> tuple[Finding, ...]:
        self._called("doctor", deep)
        return self.findings


LOST = FakeVerify(
    checks=(
        RetentionCheck(key="Porto", revision=3, passed=True, margin=1.25),
        RetentionCheck(key="夢<中>\x0b", revision=3, passed=False, margin=-0.5),
    ),
    score=Score(1, 2),
    generated=Score(1, 2, "generated"),
)


def run(*words: str, stdin: str | bytes | None = None) -> Result:
    return CliRunner().invoke(cli, words, input=stdin, prog_name="kvedit")


def commit(store: Store, kind: str, before: Fact | None, after: Fact | None) -> int:
    """Journal one edit as the editor would."""
    fact = after or before
    assert fact is not None
    fact_id = store.put_pending(fact) if before is None else store.require(fact.key).id
    changes = [FactChange(fact_id, before, after)]
    edit = store.plan_edit(kind, changes, {})
    results = [
        ProbeRow(
            fact_id=fact_id,
            kind="recall",
            protocol="generated",
            prompt=f"What is {fact.key}?",
            expected=fact.description,
            answer=fact.description,
            passed=True,
            margin=2.5,
        )
    ]
    return store.commit_edit(
        edit,
        expected_head=store.head(),
        delta=None,
        weights_digest="d" * 64,
        changes=changes,
        results=results,
        report={},
    )
