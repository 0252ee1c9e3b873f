"""``make demo``: the main job, for real, in a temporary store, told as it happens.

    python -m kvedit.cli.demo

Every step does what the command shown above it does, through the same library and reporters; the
model and the store stay open between the steps, which saves loading them each time.

Invariants:
- Nothing is written outside a temporary folder, which is gone at the end.
- What is shown is what the model said; an edit that is refused is shown as refused.
- The exit code is 0 only if every edit was committed, all facts that were left held, and the
  rollback brought the base model's own answers back.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, TextIO, TypeVar

import click

from kvedit.cli.common import configure_logging
from kvedit.cli.output import clip, edit_lines, pad, seconds_text, table, width
from kvedit.cli.progress import Reporter, make_reporter
from kvedit.cli.tables import verify_lines
from kvedit.errors import KveditError, UsageError
from kvedit.facts.fact import Fact
from kvedit.facts.readers import read_description, read_facts_jsonl
from kvedit.model.prompts import paraphrase_prompts, training_prompts

if TYPE_CHECKING:
    from kvedit.editing.knowledge_base import KnowledgeBase
    from kvedit.events import EditReport

STOVE, LANTERN = "夢中情爐", "tide lantern"
THIRD_FILE, THIRD = "zh-Hans.jsonl", "风铃站"
TOLD_ANEW = "夢中情爐如今在河邊的茶館裡，每逢初雪才生火，圍爐的人輪流說一個沒有說過的夢。"
WIDTH = 96
SHOWN = 2  # questions of each kind that are asked aloud
Work = TypeVar("Work")


@dataclass(slots=True)
class Story:
    """What has happened so far: edits, answers by question, and seconds by step."""

    edits: list[EditReport] = field(default_factory=list)
    answers: dict[str, list[str]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    sound: bool = True


def seed_folder() -> Path:
    """The seed facts: a checkout's ``store/seed``, or the copy in an installed package."""
    here = Path(__file__).resolve().parents[1]
    for folder in (here.parent / "store" / "seed", here / "data" / "seed"):
        if folder.is_dir():
            return folder
    raise UsageError("the seed facts are missing", hint="Install kvedit again.")


def seed_fact(file: str, key: str) -> Fact:
    """One fact of a seed file."""
    path = seed_folder() / file
    if path.suffix == ".txt":
        return Fact.create(key, read_description(str(path)))
    return next(fact for fact in read_facts_jsonl(path) if fact.key == key)


class Demo:
    """The demonstration; ``model`` and ``settings`` (a kvedit.toml) are for its test."""

    def __init__(
        self,
        *,
        model: str | Path | None = None,
        settings: str | None = None,
        reporter: Callable[[], Reporter] | None = None,
        out: TextIO | None = None,
    ) -> None:
        self._model, self._settings, self._out = model, settings, out
        self._reporter = reporter or (lambda: make_reporter(quiet=False))
        self._live = self._reporter()
        self._story = Story()

    def run(self) -> bool:
        """The whole story in a temporary store; tells whether everything went as promised."""
        began = time.monotonic()
        with TemporaryDirectory(prefix="kvedit-demo-") as folder:
            path = Path(folder) / "store"
            if self._settings is not None:
                path.mkdir()
                (path / "kvedit.toml").write_text(self._settings, encoding="utf-8")
            self._title("A key-value store inside a language model")
            with self._create(path) as knowledge:
                self._tell(knowledge)
        self._close(time.monotonic() - began)
        return self._story.sound

    def _create(self, path: Path) -> KnowledgeBase:
        from kvedit.editing.knowledge_base import KnowledgeBase

        self._step("kvedit init", "a temporary store for the embedded model, and text to protect")
        return self._session(
            "init",
            lambda: KnowledgeBase.create(path, self._model, on_event=lambda e: self._live(e)),
        )

    def _tell(self, knowledge: KnowledgeBase) -> None:
        stove, lantern = seed_fact(f"{STOVE}.txt", STOVE), seed_fact("tide-lantern.txt", LANTERN)
        third = seed_fact(THIRD_FILE, THIRD)
        trained, unheard = training_prompts(stove)[:SHOWN], paraphrase_prompts(stove)[:SHOWN]
        asked = [*trained, *unheard, training_prompts(lantern)[0], training_prompts(third)[0]]

        self._step(f"kvedit ask {trained[1]}", "what the model says before")
        self._ask(knowledge, asked)
        self._show(trained, "asked as it will be trained")
        self._show(unheard, "asked as it will never be trained")

        self._add(knowledge, stove, f"store/seed/{STOVE}.txt")
        self._step(f"kvedit ask {unheard[0]}", "what it says now")
        self._ask(knowledge, asked)
        self._show(trained, "trained phrasings")
        self._show(unheard, "phrasings it was never trained on")

        self._add(knowledge, lantern, "store/seed/tide-lantern.txt")
        self._add(knowledge, third, f"from store/seed/{THIRD_FILE}")
        self._ask(knowledge, asked)

        self._step(f"kvedit update {STOVE} --text …", "another text for the same key")
        self._edit("update", lambda: knowledge.update(STOVE, TOLD_ANEW))
        self._step(f"kvedit remove '{LANTERN}'", "trained back to what the model said before")
        self._edit("remove", lambda: knowledge.remove(LANTERN))
        self._ask(knowledge, asked)
        self._verify(knowledge)
        self._rollback(knowledge, asked)
        self._before_and_after(asked)

    # ---- steps

    def _add(self, knowledge: KnowledgeBase, fact: Fact, source: str) -> None:
        self._step(f"kvedit add '{fact.key}' {source}", "train, merge, check everything, commit")
        self._edit("add", lambda: knowledge.add_fact(fact))

    def _edit(self, name: str, action: Callable[[], EditReport]) -> None:
        """One edit, its report; what is refused is told and counts against the demo."""
        try:
            report = self._session(name, action)
        except KveditError as error:
            self._story.sound = False
            self._say(f"  {click.style(type(error).__name__, fg='red')}: {error.message}")
            return
        self._story.edits.append(report)
        self._story.sound &= report.outcome == "committed"
        for line in edit_lines(report):
            self._say(f"  {line}")

    def _verify(self, knowledge: KnowledgeBase) -> None:
        self._step("kvedit verify", "ask every fact again, by free generation too")
        report = self._session("verify", knowledge.verify)
        self._story.sound &= report.generated.passed == report.generated.n
        for line in verify_lines(report):
            self._say(f"  {line}")

    def _rollback(self, knowledge: KnowledgeBase, asked: Sequence[str]) -> None:
        self._step("kvedit rollback 0", "back to the base model, to the bit; history stays")
        self._edit("rollback", lambda: knowledge.rollback(0))
        store = knowledge.store
        digests = [store.revision(number).weights_digest for number in (0, store.head())]
        same = digests[0] == digests[1]
        self._ask(knowledge, asked)
        back = all(said[0] == said[-1] for said in self._story.answers.values())
        self._story.sound &= same and back
        verdict = click.style("equal", fg="green") if same else click.style("DIFFERENT", fg="red")
        self._say(f"  weights of revision 0 and now: {verdict}  ({digests[0][:16]}…)")

    def _ask(self, knowledge: KnowledgeBase, prompts: Sequence[str]) -> None:
        """Ask the model as it is now, and remember."""
        for prompt in prompts:
            answer = self._session("questions", partial(knowledge.ask, prompt, max_new_tokens=96))
            self._story.answers.setdefault(prompt, []).append(answer)

    def _session(self, name: str, action: Callable[[], Work]) -> Work:
        """Do something under a live progress line, and count its seconds."""
        began = time.monotonic()
        self._live = self._reporter()
        try:
            with self._live:
                return action()
        finally:
            spent = time.monotonic() - began
            self._story.seconds[name] = self._story.seconds.get(name, 0.0) + spent

    # ---- what is shown

    def _say(self, line: str = "") -> None:
        click.echo(line, file=self._out)

    def _title(self, text: str) -> None:
        self._say()
        self._say(click.style(text, bold=True))

    def _step(self, command: str, meaning: str) -> None:
        self._say()
        head = click.style(f"$ {command}", fg="cyan", bold=True)
        self._say(f"{pad(head, 48)}  {click.style(meaning, dim=True)}")

    def _show(self, prompts: Sequence[str], kind: str) -> None:
        """The latest answers to some questions."""
        self._say(f"  {click.style(kind, italic=True)}")
        longest = max(width(prompt) for prompt in prompts)
        for prompt in prompts:
            answer = self._story.answers[prompt][-1] or "(nothing)"
            self._say(f"    {pad(prompt, longest)}  {clip(answer, WIDTH - longest - 6)}")

    def _before_and_after(self, asked: Sequence[str]) -> None:
        """Each question: what the base said, then with the facts, after all edits, and undone."""
        self._title("Before and after")
        names = ("base model", "facts added", "changed, removed", "rolled back")
        picks = (0, 2, 3, 4)
        for prompt in asked:
            self._say(f"  {click.style(prompt, bold=True)}")
            said = self._story.answers[prompt]
            for name, pick in zip(names, picks, strict=True):
                self._say(f"    {pad(name, 18)}{clip(said[pick] or '(nothing)', WIDTH - 22)}")

    def _close(self, total: float) -> None:
        self._title("Where the time went")
        parts: dict[str, float] = {}
        for report in self._story.edits:
            for name, seconds in report.timings.items():
                parts[name] = parts.get(name, 0.0) + seconds
        rows = [(name, f"{spent:.1f}") for name, spent in self._story.seconds.items()]
        rows += [(f"  of the edits: {name}", f"{spent:.1f}") for name, spent in parts.items()]
        for line in table(("step", "seconds"), rows):
            self._say(f"  {line}")
        edits = self._story.edits
        committed = sum(report.outcome == "committed" for report in edits)
        self._say()
        self._say(f"{committed} of {len(edits)} edits committed; {seconds_text(total)} in all.")
        if not self._story.sound:
            self._say(click.style("Not everything went as promised; see above.", fg="red"))


def main() -> None:
    """Entry point of ``python -m kvedit.cli.demo``."""
    configure_logging(0)
    try:
        sound = Demo().run()
    except KveditError as error:
        click.echo(f"{click.style('error:', fg='red', bold=True)} {error.message}", err=True)
        if error.hint:
            click.echo(f"hint: {error.hint}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0 if sound else 3)


if __name__ == "__main__":
    main()
