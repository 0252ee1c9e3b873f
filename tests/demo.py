"""``make demo``: the whole life of a few facts, for real, in a temporary store.

    python -m tests.demo

Every step does what the command shown above it does, through the same library and reporters; the
model and the store stay open between the steps, which saves loading them each time.

Invariants:
- Nothing is written outside a temporary folder, which is gone at the end.
- The answers shown are the model's; an edit that is rejected is shown as rejected.
- The exit code is 0 only if every edit was committed, all facts that were left are recalled, and
  the rollback restored the base model's answers.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TextIO, TypeVar

from kvedit.cli import common, output
from kvedit.cli.commands.verify import verify_parts
from kvedit.cli.output import FirstLine, pairs, styled
from kvedit.cli.progress import Reporter, make_reporter
from kvedit.errors import KveditError, RejectedError
from kvedit.facts.fact import Fact
from kvedit.facts.phrasings import paraphrase_prompts, training_prompts
from kvedit.facts.readers import read_description
from tests.jsonl_facts import read_facts_jsonl

if TYPE_CHECKING:
    from rich.console import RenderableType

    from kvedit.editing.knowledge_base import KnowledgeBase
    from kvedit.events import EditReport

SEED = Path(__file__).resolve().parents[1] / "store" / "seed"
STOVE, LANTERN = "夢中情爐", "tide lantern"
THIRD_FILE, THIRD = "zh-Hans.jsonl", "风铃站"
NEW_TEXT = "夢中情爐如今在河邊的茶館裡，每逢初雪才生火，圍爐的人輪流說一個沒有說過的夢。"
PHRASINGS = 2  # of each kind that are asked
STAGES = {"base model": 0, "facts added": 2, "updated, removed": 3, "rolled back": 4}
"""The rounds of questions that are compared at the end."""

Result = TypeVar("Result")


def seed_fact(file: str, key: str) -> Fact:
    path = SEED / file
    if path.suffix == ".txt":
        return Fact.create(key, read_description(str(path)))
    return next(fact for fact in read_facts_jsonl(path) if fact.key == key)


class Demo:
    """The demonstration; ``model`` and ``settings`` (a kvedit.toml) are for its test."""

    def __init__(
        self, *, model: str | Path | None = None, settings: str | None = None,
        reporter: Callable[[], Reporter] | None = None, out: TextIO | None = None,
    ) -> None:  # fmt: skip
        self._model, self._settings, self._out = model, settings, out
        self._new_reporter = reporter or (lambda: make_reporter(quiet=False))
        self._reporter = self._new_reporter()
        self._edits: list[EditReport] = []
        self._answers: dict[str, list[str]] = {}
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._passed = True

    def run(self) -> bool:
        """All steps in a temporary store; returns whether everything passed."""
        began = time.monotonic()
        with TemporaryDirectory(prefix="kvedit-demo-") as folder:
            path = Path(folder) / "store"
            if self._settings is not None:
                path.mkdir()
                (path / "kvedit.toml").write_text(self._settings, encoding="utf-8")
            self._title("A key-value store inside a language model")
            self._step("kvedit init", "a temporary store for the embedded model")
            with self._timed("init", partial(self._create, path)) as knowledge:
                self._steps(knowledge)
        self._close(time.monotonic() - began)
        return self._passed

    def _create(self, path: Path) -> KnowledgeBase:
        from kvedit.editing.knowledge_base import KnowledgeBase

        return KnowledgeBase.create(path, self._model, on_event=lambda e: self._reporter(e))

    def _steps(self, knowledge: KnowledgeBase) -> None:
        stove, lantern = seed_fact(f"{STOVE}.txt", STOVE), seed_fact("tide-lantern.txt", LANTERN)
        third = seed_fact(THIRD_FILE, THIRD)
        trained, unseen = training_prompts(stove)[:PHRASINGS], paraphrase_prompts(stove)[:PHRASINGS]
        prompts = [*trained, *unseen, training_prompts(lantern)[0], training_prompts(third)[0]]

        self._step(f"kvedit ask {trained[1]}", "what the model answers before")
        self._ask(knowledge, prompts)
        self._show_answers(trained, "phrasings that will be trained")
        self._show_answers(unseen, "phrasings that will not be trained")

        self._add(knowledge, stove, f"store/seed/{STOVE}.txt")
        self._step(f"kvedit ask {unseen[0]}", "what it answers now")
        self._ask(knowledge, prompts)
        self._show_answers(trained, "trained phrasings")
        self._show_answers(unseen, "unseen phrasings")

        self._add(knowledge, lantern, "store/seed/tide-lantern.txt")
        self._add(knowledge, third, f"from store/seed/{THIRD_FILE}")
        self._ask(knowledge, prompts)

        self._step(f"kvedit update {STOVE} --text …", "another description for the same key")
        self._edit("update", lambda: knowledge.update(STOVE, NEW_TEXT))
        self._step(f"kvedit remove '{LANTERN}'", "trained back to what the model answered before")
        self._edit("remove", lambda: knowledge.remove(LANTERN))
        self._ask(knowledge, prompts)
        self._verify(knowledge)
        self._rollback(knowledge, prompts)
        self._compare(prompts)

    def _add(self, knowledge: KnowledgeBase, fact: Fact, source: str) -> None:
        self._step(f"kvedit add '{fact.key}' {source}", "train, merge, check, commit")
        self._edit("add", lambda: knowledge.add_fact(fact))

    def _edit(self, name: str, action: Callable[[], EditReport]) -> None:
        """One edit and its report; one that is not committed fails the demo."""
        try:
            report = self._timed(name, action)
        except KveditError as error:
            self._passed = False
            self._print(styled(f"{type(error).__name__}: {error.message}", "red"), indent=2)
            return
        self._edits.append(report)
        self._passed &= report.outcome == "committed"
        self._print(*output.edit_parts(report), indent=2)

    def _verify(self, knowledge: KnowledgeBase) -> None:
        self._step("kvedit verify", "ask all facts again, by free generation too")
        report = self._timed("verify", knowledge.verify)
        self._passed &= report.generated.passed == report.generated.n
        self._print(*verify_parts(report), indent=2)

    def _rollback(self, knowledge: KnowledgeBase, prompts: Sequence[str]) -> None:
        self._step("kvedit rollback 0", "back to the base model, bit for bit; history stays")
        self._edit("rollback", lambda: knowledge.rollback(0))
        store = knowledge.store
        base, head = (store.revision(number).weights_digest for number in (0, store.head()))
        self._ask(knowledge, prompts)
        restored = all(answers[0] == answers[-1] for answers in self._answers.values())
        self._passed &= base == head and restored
        verdict = "equal" if base == head else "DIFFERENT"
        self._print(f"weights of revision 0 and now: {verdict}  ({base[:16]}…)", indent=2)

    def _ask(self, knowledge: KnowledgeBase, prompts: Sequence[str]) -> None:
        """Ask the model as it is now, and keep the answers."""
        for prompt in prompts:
            answer = self._timed("questions", partial(knowledge.ask, prompt, max_new_tokens=96))
            self._answers.setdefault(prompt, []).append(answer or "(nothing)")

    def _timed(self, name: str, action: Callable[[], Result]) -> Result:
        """Do something under a live progress line, and count its seconds."""
        began = time.monotonic()
        self._reporter = self._new_reporter()
        try:
            with self._reporter:
                return action()
        finally:
            self._seconds[name] += time.monotonic() - began

    def _print(self, *parts: RenderableType, indent: int = 0) -> None:
        output.print_parts(*parts, file=self._out, indent=indent)

    def _title(self, text: str) -> None:
        self._print("", styled(text, "bold"))

    def _step(self, command: str, meaning: str) -> None:
        self._print("", pairs([(styled(f"$ {command}", "bold cyan"), styled(meaning, "dim"))]))

    def _show_answers(self, prompts: Sequence[str], kind: str) -> None:
        """The latest answers to some questions."""
        self._print(styled(kind, "italic"), indent=2)
        rows = [(prompt, FirstLine(self._answers[prompt][-1])) for prompt in prompts]
        self._print(pairs(rows), indent=4)

    def _compare(self, prompts: Sequence[str]) -> None:
        """The answers before, with the facts, after all edits, and after the rollback."""
        self._title("Before and after")
        for prompt in prompts:
            self._print(styled(prompt, "bold"), indent=2)
            answers = self._answers[prompt]
            rows = [(stage, FirstLine(answers[number])) for stage, number in STAGES.items()]
            self._print(pairs(rows), indent=4)

    def _close(self, total: float) -> None:
        self._title("Where the time went")
        edits: defaultdict[str, float] = defaultdict(float)
        for report in self._edits:
            for name, spent in report.timings.items():
                edits[f"  of the edits: {name}"] += spent
        rows = [(name, f"{spent:.1f}") for name, spent in (self._seconds | edits).items()]
        self._print(output.table(("step", "seconds"), rows), indent=2)
        committed = sum(report.outcome == "committed" for report in self._edits)
        time_text = f"{output.seconds_text(total)} in all"
        self._print("", f"{committed} of {len(self._edits)} edits committed; {time_text}.")
        if not self._passed:
            self._print(styled("Not every step did what it should; see above.", "red"))


def main() -> None:
    """Entry point of ``python -m tests.demo``."""
    common.configure_logging(0)
    try:
        sys.exit(0 if Demo().run() else RejectedError.exit_code)
    except KveditError as error:
        common.fail(error.message, error.hint)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(common.EXIT_INTERRUPTED)


if __name__ == "__main__":
    main()
