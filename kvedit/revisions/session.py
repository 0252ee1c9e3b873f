"""A store and a model kept in step: the weights of a revision, protected text, curvature.

Invariants:
- The model in memory is the revision that ``revision`` names, checked by digest when it is folded.
- Protected text is made once, by the base model; the curvature is measured again whenever what is
  kept of it does not belong to the weights at hand.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from kvedit.adapter.fisher import FisherMoments
from kvedit.config import Config
from kvedit.errors import KveditError, LockedError, OutOfMemoryError
from kvedit.events import Event, Status, Warning_
from kvedit.facts.keys import in_words, normalise
from kvedit.model.prompts import Example
from kvedit.replay import extraction, protected_texts
from kvedit.revisions import rebuild
from kvedit.store.store import ProtectedRow, Store
from kvedit.training import memory
from kvedit.training.engine import Engine

Emit = Callable[[Event], None]
_T = TypeVar("_T")
_PROTECTED, _DONE = "protected_text", "complete"
_SAMPLES = "protected_drafts"
LEAST_MEASURED, GROWN = 16, 1.5
MEASURED_HERE = 2000
"""So many protected texts are enough to measure a curvature from, once it is measured often."""


class Session:
    """A store, its engine, and the revision that the engine's weights are."""

    def __init__(self, store: Store, engine: Engine, emit: Emit) -> None:
        self.store = store
        self.engine = engine
        self.config: Config = store.config
        self.emit = emit
        self.revision = 0
        self._measured: int | None = None  # the revision that the engine's curvature stands for
        self._measured_with = 0  # so many facts were in when all was measured on the head
        self._margins: FisherMoments | None = None  # of what the base model knows

    @contextmanager
    def editing(self) -> Iterator[None]:
        """The store's lock for the length of one edit, the model brought up to the head."""
        with self.store.lock():
            try:
                with memory.watched():
                    self.recover()
                    if self.revision != self.store.head():
                        self.go_to(self.store.head())
                    yield
            except OutOfMemoryError:
                self.engine.release()  # what is kept for speed must not fail the next edit too
                raise

    def recover(self) -> None:
        """End what a killed process left; skipped while another process is at work."""
        try:
            left = self.store.recover()
        except LockedError:
            return
        for edit in left:
            what = f"{edit.kind} of {in_words(edit.keys)}"
            text = f"recovered: the {what} was interrupted and did not happen"
            self.emit(
                Warning_(text=text, code="recovered", key=edit.keys[0] if edit.keys else None)
            )

    def go_to(self, revision: int) -> None:
        """Give the model the weights of a revision."""
        for problem in rebuild.load_revision(self.store, self.engine.master, revision):
            self.emit(Warning_(text=problem, code="checkpoint"))
        self.revision = revision

    def at(self, revision: int | None, action: Callable[[], _T]) -> _T:
        """Do something with another revision's weights, then come back."""
        here = self.revision
        if revision is None or revision == here:
            return action()
        try:
            self.go_to(revision)
            return action()
        finally:
            self.go_to(here)

    def prepare(self) -> None:
        """Before an edit that teaches: protected text, and the curvature of it and of the facts."""
        if self.store.meta(_PROTECTED) != _DONE:
            self.make_protected(self._control_texts())
        if self._measured != self.revision:
            self._load_fisher()

    def make_protected(self, extra: Sequence[protected_texts.Protected]) -> None:
        """Let the base model say what it knows, and keep it."""
        self.store.set_protected(_rows("control", extra))  # a killed init has not lost them
        here = self.revision
        self.go_to(0)
        with self.engine.alone():
            made = protected_texts.make(
                self.engine.base, self.engine.renderer, self.config.protect,
                extra=extra, progress=lambda text: self.say(text),
            )  # fmt: skip
        self.store.set_protected(
            [*_rows("control", made.control), *_rows("locality", made.locality)]
        )
        self.store.set_meta(_PROTECTED, _DONE)
        self.go_to(here)
        self._measure()

    def _control_texts(self) -> list[protected_texts.Protected]:
        return self._texts("control")

    def _texts(self, role: str) -> list[protected_texts.Protected]:
        rows = self.store.protected(role)
        return [protected_texts.Protected(row.prompt, row.answer, row.source) for row in rows]

    def _measured_texts(self) -> list[protected_texts.Protected]:
        """What the curvature is measured on: guesses say more of it than what is known by heart."""
        return [text for text in self._control_texts() if text.source != protected_texts.EXTRACTED]

    def _measure(self) -> None:
        """The curvature of the protected text on the base model, and of the facts on the head."""
        self.say("measuring what must stay")
        renderer = self.engine.renderer
        examples = [protected_texts.example(renderer, text) for text in self._measured_texts()]
        self.at(0, lambda: self.engine.protect(examples))
        self._measure_facts()
        self.save_fisher()

    def _measure_facts(self) -> None:
        """Add the committed facts to what the base model's curvature protects."""
        facts = [row.fact for row in self.store.facts("committed")]
        if facts:
            self.say(f"measuring {len(facts)} facts")
            some = [self.engine.examples(fact)[0] for fact in facts]
            self.engine.remember(some, self.config.group.fact_weight)
        self._measured = self.revision

    def prepare_group(self, facts: int, *, measured: bool = True) -> None:
        """Before so many facts are taught together: text to replay, and the curvature as it is."""
        self.prepare()
        self.protect_for(len(self.store.keys("committed")) + facts)
        self._measure_reference()
        if not measured:
            return
        if not self.store.head():
            self._measure_margins()
            return
        self._measure_here()

    def protect_for(self, facts: int, leave_out: Iterable[str] = ()) -> None:
        """See to it that there is protected text enough for so many facts in the model; no new one
        has a name in it that is to be left out.
        """
        settings = self.config.protect
        wanted = min(settings.max_samples, facts * settings.samples_per_fact)
        drawn = int(self.store.meta(_SAMPLES) or settings.samples)
        if wanted <= drawn:
            return
        new = self.at(0, lambda: self._recite(wanted - drawn, seed=drawn))
        names = [normalise(name) for name in leave_out]
        texts = [normalise(f"{text.prompt}\n{text.answer}") for text in new]
        kept = [t for t, told in zip(new, texts, strict=True) if not any(n in told for n in names)]
        self.store.add_protected(_rows("control", kept))
        self.engine.reference_texts = self._margins = None
        self.store.set_meta(_SAMPLES, str(wanted))  # last: a run that was killed does it again

    def _recite(self, samples: int, seed: int) -> tuple[protected_texts.Protected, ...]:
        """Locality probes are asked for nowhere else, but what they ask for is as likely to be
        found under another question as anything else: else they would say what becomes of what is
        never replayed, which is little of what the model knows.
        """
        unasked = [text.prompt for text in self._texts("locality")]
        with self.engine.alone():
            return extraction.extract_knowledge(
                self.engine.base, self.engine.renderer, samples,
                known=self._control_texts(), unasked=unasked, seed=seed,
                progress=lambda text: self.say(text),
            )  # fmt: skip

    @contextmanager
    def from_base(self) -> Iterator[None]:
        """The base's weights and what they stand for, for an edit that begins anew; those of the
        head after it.
        """
        self._measured_with = 0
        self.go_to(0)
        self._measure_margins()
        try:
            yield
        finally:
            if self.revision != self.store.head():
                self.go_to(self.store.head())

    def _base_fisher(self) -> FisherMoments:
        if self.engine.fisher is None:
            raise RuntimeError("an edit is prepared first")
        return self.engine.fisher[0]

    def _measure_margins(self) -> None:
        """On the base model: by the leads of what it knows, for one edit; measured once a store."""
        base, self._measured = self._base_fisher(), None
        known = (
            self.engine.reference_texts.examples if self.engine.reference_texts is not None else ()
        )
        some = random.Random(0).sample(known, min(MEASURED_HERE, len(known)))
        told = repr((self.engine.names, [example.ids for example in some]))
        texts = hashlib.sha256(told.encode()).hexdigest()
        if self._margins is None and some:
            self._margins = rebuild.read_fisher(self.store, 0, "margins", texts)
        if self._margins is not None or not some:
            self.engine.fisher = base, self._margins or base
            return
        self.say("measuring what the base model knows")
        self.engine.measure_margins(some)
        if self.engine.fisher is not None:
            self._margins = self.engine.fisher[1]
            with self.dispensable():
                rebuild.write_fisher(self.store, 0, "margins", self._margins, texts)

    def _measure_here(self) -> None:
        """Measure again once the facts have grown by half: the curvature of a large change is not
        that of a small one.
        """
        facts = [row.fact for row in self.store.facts("committed")]
        if len(facts) < max(LEAST_MEASURED, self._measured_with * GROWN):
            return
        self.say(f"measuring what must stay, with {len(facts)} facts")
        texts = self._measured_texts()
        some = random.Random(self.revision).sample(texts, min(MEASURED_HERE, len(texts)))
        renderer = self.engine.renderer
        self.engine.measure_at_head(
            [protected_texts.example(renderer, text) for text in some],
            [self.engine.examples(fact)[0] for fact in facts],
            self.config.group.fact_weight,
        )
        self._measured, self._measured_with = self.revision, len(facts)

    def _measure_reference(self) -> None:
        """Keep what the base model says to the protected text that it knows; done once."""
        if self.engine.reference_texts is not None or not self.config.group.reference_texts:
            return
        self.say("asking the base model about protected text")
        self.at(0, self._measure_reference_on_base)

    def _measure_reference_on_base(self) -> None:
        renderer = self.engine.renderer
        texts = protected_texts.known(self.engine.base, renderer, self._control_texts())
        self.engine.measure_reference([protected_texts.example(renderer, text) for text in texts])

    def known_texts(self) -> tuple[protected_texts.Protected, ...]:
        """Of all protected texts those that the base model knows, the locality probes too."""
        texts = [*self._control_texts(), *self._texts("locality")]
        base, renderer = self.engine.base, self.engine.renderer
        return self.at(0, lambda: protected_texts.known(base, renderer, texts))

    def remember(self, learned: Sequence[Example], weight: float | None = None) -> None:
        """After a commit: protect what was learned, and note that the curvature is up to date."""
        if self._measured is None:  # what stood there was for one edit
            base = self._base_fisher()
            self.engine.fisher = base, base
            self._measure_facts()
        elif learned:
            self.engine.remember(learned, weight)
        self._measured = self.revision

    def _load_fisher(self) -> None:
        base = rebuild.read_fisher(self.store, 0, "base")
        total = rebuild.read_fisher(self.store, self.revision, "head")
        if base is None or set(base.moments) != set(self.engine.names):
            self._measure()
        elif total is None:
            self.engine.fisher = base, base
            self._measure_facts()
            self.save_fisher()
        else:
            self.engine.fisher = base, total
            self._measured = self.revision

    def save_fisher(self) -> None:
        """Keep what was measured for the next time."""
        if self.engine.fisher is not None and self._measured == self.revision:
            with self.dispensable():
                base, total = self.engine.fisher
                rebuild.write_fisher(self.store, 0, "base", base)
                rebuild.write_fisher(self.store, self.revision, "head", total)

    @contextmanager
    def dispensable(self) -> Iterator[None]:
        """Around what only saves time: the edit stands, that this was not written is a warning."""
        try:
            yield
        except KveditError as error:
            self.emit(Warning_(text=f"not kept: {error.message}", code="not-kept"))

    def say(self, text: str, key: str | None = None) -> None:
        """Tell what is being done."""
        self.emit(Status(phase=text, key=key))


def _rows(role: str, texts: Sequence[protected_texts.Protected]) -> list[ProtectedRow]:
    return [
        ProtectedRow(role=role, prompt=t.prompt, answer=t.answer, source=t.source) for t in texts
    ]
