"""How much of what the base model says is protected so far, and more of it within a time.

Questions are asked, and the Fisher moments of the texts measured, in slices; what a slice gave is
in the store before the next one begins.  A new store gets what its time allows; later edits go on
with it, until there is as much as the settings ask for.

Invariants:
- A slice that was broken off is made again, with the same random numbers.
- The base's moments are those of the first ``measured`` control texts, in the store's order.
"""

import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate

from kvedit.adapter.fisher import FisherMoments
from kvedit.errors import CorruptStoreError
from kvedit.events import Status, Warning_
from kvedit.model.prompts import Example
from kvedit.replay import general_texts, protected_texts
from kvedit.replay.protected_texts import EXTRACTED, Protected, ProtectedSet
from kvedit.replay.questions import Limits
from kvedit.replay.sampling import Sampler
from kvedit.revisions import fisher_cache
from kvedit.revisions.checkout import Checkout
from kvedit.store.checks.values import from_json
from kvedit.store.forget.erasure import PROGRESS
from kvedit.store.integrity import COMPLETE, PROTECTED, few_probes
from kvedit.store.rows import ProtectedRow
from kvedit.trust.names import RESTORE

TEXTS_RATIO = 0.5  # of the time that is left go into texts, the rest into measuring them
TYPICAL_TEXTS = 64  # whose lengths are taken for those of all
BACKWARD_RATIO = 6.0  # of the time that a token takes to be measured to that of decoding one
FIRST_MEASURED = 4  # texts, whose time says how many fit
MEASURING_SECONDS = 20.0  # of a slice
SAVE_EVERY = 10.0  # seconds: writing the moments of a large model takes one or two
SAY_EVERY = 1.0  # seconds
MIN_SECONDS = 5.0  # after an edit; less is kept for the next one
MIN_TEXTS_SECONDS = 20.0  # the same, where new texts are asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What was done: questions ``asked``, in so many ``slices``, free texts ``written``, and how
    many control texts were measured; ``credit`` are seconds not spent yet.
    """

    asked: int = 0
    slices: int = 0
    written: bool = False
    measured: int = 0
    credit: float = 0.0


class Coverage:
    """The protected texts of a store, and the moments of them at the base weights."""

    def __init__(self, checkout: Checkout) -> None:
        self._checkout = checkout
        self._store, self._engine = checkout.store, checkout.engine
        self._renderer = checkout.engine.renderer
        self._config = checkout.store.config.protect
        self._sampler = Sampler(self._engine.base, self._renderer, self._config)
        self._measured = 0  # texts, whose moments the engine has, or those of the last ones here:
        self._more: FisherMoments | None = None
        self._token_seconds: float | None = None  # of measuring
        self._end = self._saved_at = self._said_at = 0.0

    @property
    def progress(self) -> Progress:
        """As the store has it; one that was made before it was kept has everything."""
        text = self._store.meta(PROGRESS)
        if text is not None:
            return _progress_from(text)
        if self._store.meta(PROTECTED) != COMPLETE:
            return Progress()
        samples, measured = self._config.samples, len(self.measured_texts())
        return Progress(asked=samples, slices=1, written=True, measured=measured)

    def _keep(self, progress: Progress) -> None:
        self._store.set_meta(PROGRESS, json.dumps(asdict(progress)))

    def texts(self, role: str) -> list[Protected]:
        """The texts of a role, in order."""
        rows = self._store.protected(role)
        return [Protected(row.prompt, row.answer, row.source) for row in rows]

    def measured_texts(self) -> list[Protected]:
        """The texts that moments are measured on: guesses say more than what is known by heart."""
        return [text for text in self.texts("control") if text.origin != EXTRACTED]

    @property
    def is_complete(self) -> bool:
        """Whether there are as many texts as the settings ask for, all of them measured."""
        done = self.progress
        return self._has_texts(done) and done.measured >= len(self.measured_texts())

    def _has_texts(self, done: Progress) -> bool:
        return done.written and not self._has_questions(done)

    def _has_questions(self, done: Progress) -> bool:
        """Whether there is something to ask; without a chat template only what is shipped is."""
        if not done.slices:
            return True
        if self._renderer.empty_user_turn() is None or done.asked >= self._config.samples:
            return False
        drawn = sum(text.origin == "drawn" for text in self.texts("control"))
        return drawn < self._config.long_answers + self._config.short_answers

    def fill(self, seconds: float) -> bool:
        """Go on for so long, with the base weights; what there must be at least is made however
        little time there is.  Returns whether there was time for anything.
        """
        end, before = time.monotonic() + seconds, self.progress
        self._end = end
        while not self.is_complete:
            asked = self._sample_within(end)
            measured = self._measure(end)
            self._save()
            if not asked and not measured:
                break
        if self._engine.fisher is None:
            self._engine.protect(())  # raises, and says what to do
        return self.progress != before

    def _sample_within(self, end: float) -> bool:
        """New texts, if there is time for them; returns whether they were asked for."""
        if self._has_texts(done := self.progress):
            return False
        left, least = self._left(end), self._least_seconds()
        measure_too = not done.slices or self._measured < len(self.measured_texts())
        if done.slices and left * (TEXTS_RATIO if measure_too else 1) < least:
            return False
        self._sample(time.monotonic() + max(left * TEXTS_RATIO, least))
        return True

    def spend(self, seconds: float) -> None:
        """Go on for so long, but only once the time of several edits is enough for something."""
        credit = self.progress.credit + seconds
        unmeasured = self.progress.measured < len(self.measured_texts())
        self._keep(replace(self.progress, credit=credit))
        if credit >= (MIN_SECONDS if unmeasured else MIN_TEXTS_SECONDS) and self.fill(credit):
            self._keep(replace(self.progress, credit=0.0))

    def _left(self, end: float) -> float:
        """Seconds, the same in all processes."""
        return self._engine.worker.on_main(lambda: end - time.monotonic())

    def _least_seconds(self) -> float:
        """Of the smallest slice of texts."""
        return self._engine.worker.on_main(lambda: self._sampler.least_seconds)

    def _sample(self, end: float) -> None:
        """Texts, slice by slice."""
        while not self._has_texts(done := self.progress):
            if self._has_questions(done):
                self._ask(done, end)
            else:
                self._write(done, end)
            if self._left(end) < self._least_seconds():
                return

    def _ask(self, done: Progress, end: float) -> None:
        """A slice of questions and answers."""
        present = ProtectedSet(tuple(self.texts("control")), tuple(self.texts("locality")))

        def ask() -> tuple[int, ProtectedSet]:
            limits = self._sampler.limits(end - time.monotonic(), done.asked, done.slices)
            numbers = f"{done.asked:,} of {self._config.samples:,} questions"
            if not done.slices:  # they are asked all at once
                self._announce(limits)
                numbers = f"the first {limits.rows + limits.given:,} questions"

            def is_over() -> bool:
                self._say("asking the model what it knows", numbers)
                return time.monotonic() > end

            return limits.rows, self._sampler.sample(present, done.slices, limits, is_over)

        rows, new = self._engine.worker.on_main(ask)
        control = new.control if done.slices else self._with_prose(new.control)
        self._add("control", control)
        self._add("locality", new.locality)
        self._keep(replace(done, asked=done.asked + rows, slices=done.slices + 1))

    def _with_prose(self, answers: Sequence[Protected]) -> Sequence[Protected]:
        """The first answers, and text that answers nothing in turn with them."""
        base, renderer = self._engine.base, self._renderer
        prose = self._engine.worker.on_main(lambda: general_texts.protected(base, renderer))
        return general_texts.interleaved(answers, prose)

    def _write(self, done: Progress, end: float) -> None:
        """Free texts."""
        self._say("sampling free text from the model", now=True)
        write = self._sampler.write_freely
        self._add("control", self._engine.worker.on_main(lambda: write(end - time.monotonic())))
        self._keep(replace(done, written=True))

    def _add(self, role: str, texts: Iterable[Protected]) -> None:
        self._store.add_protected(ProtectedRow(role=role, **asdict(text)) for text in texts)

    def _measure(self, end: float) -> bool:
        """The moments of the texts that were not measured yet, slice by slice; returns whether
        there was time for some.
        """
        before, texts = self._measured, self.measured_texts()
        rest = [protected_texts.example(self._renderer, text) for text in texts[before:]]
        while part := self._part(rest[self._measured - before :], end):
            numbers = f"{self._measured:,} of {len(texts):,} texts"
            self._say("measuring what must stay", numbers, now=True)
            began = time.monotonic()
            self._extend(part)
            self._token_seconds = (time.monotonic() - began) / sum(len(one.ids) for one in part)
            self._measured += len(part)
            if time.monotonic() - self._saved_at > SAVE_EVERY:
                self._save()
        return self._measured > before

    def _part(self, examples: Sequence[Example], end: float) -> Sequence[Example]:
        """As many of them as a slice takes, or as fit into the time that is left."""

        def count() -> int:
            if self._token_seconds is None:
                return 0 if self._measured and time.monotonic() > end else FIRST_MEASURED
            seconds = min(MEASURING_SECONDS, end - time.monotonic())
            lengths = accumulate(len(one.ids) for one in examples)
            return sum(tokens * self._token_seconds <= seconds for tokens in lengths)

        return examples[: self._engine.worker.on_main(count)]

    def texts_within(self, seconds: float) -> int:
        """About how many texts are measured within so many seconds: a power of two, so that it is
        the same again.
        """
        texts = self.measured_texts()[:TYPICAL_TEXTS]
        tokens = sum(len(protected_texts.example(self._renderer, text).ids) for text in texts)

        def count() -> int:
            each = self._token_seconds or BACKWARD_RATIO * self._sampler.pace.more
            return int(seconds / max(each * tokens / max(1, len(texts)), 1e-9))

        return 1 << max(1, self._engine.worker.on_main(count)).bit_length() - 1

    def _extend(self, examples: Sequence[Example]) -> None:
        """Measure more texts; where facts are committed, by themselves, until they are added."""
        before = self._engine.fisher if self._measured else None
        if before is None or before[0] is before[1]:
            self._engine.protect(examples, before[0] if before else None)
        else:
            self._more = self._engine.measure(examples, onto=self._more)

    def _add_more(self) -> None:
        """Add what was measured by itself to the base's moments and to all, which are sums over
        tokens, in the memory that there is.
        """
        if self._more is None or self._engine.fisher is None:
            return
        (base, total), more = self._engine.fisher, self._more
        self._engine.fisher = self._more = None  # broken off, they are read or measured again
        grown_total = _sum(more, total)
        self._engine.fisher = _sum(base, more), grown_total

    def _save(self) -> None:
        """Keep the base's moments, and of how many texts they are."""
        self._add_more()
        if self._engine.fisher is None or self._measured == self.progress.measured:
            return
        base, total = self._engine.fisher
        with self._checkout.best_effort():
            fisher_cache.write(self._store, 0, "base", base, str(self._measured))
        self._keep(replace(self.progress, measured=self._measured))
        if (kept := self.load()) is not None:  # on the disk: memory holds one slice's at a time
            self._engine.fisher = kept, kept if total is base else total
        self._saved_at = time.monotonic()

    @property
    def label(self) -> str:
        """Which texts the base's moments are of, for their file."""
        return "" if self._store.meta(PROGRESS) is None else str(self.progress.measured)

    def load(self) -> FisherMoments | None:
        """The base's moments as they were kept; None if they have to be measured again."""
        return fisher_cache.read(self._store, 0, "base", self.label)

    def start_from(self, base: FisherMoments | None) -> None:
        """The engine's moments of the base are these, from ``load``; None: measure all again."""
        if base is None:
            self._keep(replace(self.progress, measured=0))
        self._measured, self._more = self.progress.measured, None

    def _announce(self, limits: Limits) -> None:
        """Say what will be done, and how long it takes."""
        seconds = max(0.0, self._end - time.monotonic())
        what, more = f"up to {self._config.samples:,} questions", ""
        if self._sampler.is_short(limits):
            questions = limits.rows + limits.given
            more = f"; at first {questions}, answers cut at {limits.answer} tokens; what does not"
            more += " fit is done with later edits"
        self._checkout.say(f"asking and measuring {what}: at most about {seconds:.0f} s{more}")

    def _say(self, phase: str, numbers: str = "", *, now: bool = False) -> None:
        """Progress with the time left, now and then."""
        clock = time.monotonic()
        if not now and clock - self._said_at < SAY_EVERY:
            return
        self._said_at = clock
        left = f"at most {max(0, self._end - clock):.0f} s left"
        self._checkout.emit(Status(phase=phase, text=f"{numbers}, {left}" if numbers else left))

    def conclude(self) -> None:
        """Say what there is after ``fill``, and warn of too few probes."""
        done, probes = self.progress, len(self.texts("locality"))
        texts, fisher = len(self.texts("control")), self._engine.fisher
        tokens = 0 if fisher is None else fisher[0].tokens
        rest = "" if self.is_complete else "; later edits go on with it"
        self._checkout.say(
            f"protected: {texts:,} texts, {done.measured:,} of them measured ({tokens:,} tokens),"
            f" {probes} locality probes{rest}"
        )
        if (text := few_probes(probes)) and probes < self._config.locality_probes:
            self._checkout.emit(Warning_(text=text, code="few-probes"))


def _progress_from(text: str) -> Progress:
    """What a store keeps of it; raises CorruptStoreError."""
    values = from_json(text, dict, f"the value {PROGRESS}")
    kinds = {item.name: type(item.default) for item in fields(Progress)}
    if not all(
        type(value) in (kinds.get(name), *([int] if kinds.get(name) is float else []))
        and 0 <= value < float("inf")
        for name, value in values.items()
    ):
        raise CorruptStoreError(f"the value {PROGRESS} of the store is wrong", hint=RESTORE)
    return Progress(**values)


def _sum(one: FisherMoments, more: FisherMoments) -> FisherMoments:
    """The moments of both texts, in the memory of ``more``, whose values are lost."""
    return replace(one.plus(more, 1.0), tokens=one.tokens + more.tokens)
