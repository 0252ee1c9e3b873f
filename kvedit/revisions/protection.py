"""What must stay: protected texts, the Fisher moments of them and of the facts, reference texts.

Invariants:
- Protected texts are answers of the base model (or the user's own); they are made once and grow
  with the number of facts.
- The engine's Fisher moments belong to the weights at hand: they are measured again, or read from
  the cache, when the revision is another one.
"""

import hashlib
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Concatenate, ParamSpec, TypeVar

from kvedit.adapter.fisher import FisherMoments
from kvedit.facts.keys import facts_text, normalise
from kvedit.model.loading import BaseModel
from kvedit.model.prompts import Example, Renderer
from kvedit.replay import extraction, protected_texts
from kvedit.replay.protected_texts import Protected
from kvedit.revisions import fisher_cache
from kvedit.revisions.checkout import Checkout
from kvedit.revisions.coverage import Coverage
from kvedit.store.integrity import COMPLETE, PROTECTED
from kvedit.store.rows import ProtectedRow
from kvedit.trust import names

_P = ParamSpec("_P")
_T = TypeVar("_T")
_SAMPLES = "protected_samples"
MIN_FACTS, GROWTH = 16, 1.5
"""Moments are measured on the head once there are so many facts, and again when there are half as
many more."""
MEASURED_TEXTS = 2000
"""So many protected texts suffice for moments that are measured often; all are used the first time.
"""


class Protection:
    """Keeps what an edit is held to in step with the weights."""

    def __init__(self, checkout: Checkout) -> None:
        self._checkout = checkout
        self._store, self._engine = checkout.store, checkout.engine
        self._config = checkout.store.config
        self._measured_at: int | None = None  # the revision that the engine's moments belong to
        self._measured_facts = 0  # committed when the moments were last measured on the head
        self._coverage = Coverage(checkout)
        self._margins: FisherMoments | None = None  # of the margins of what the base model knows

    def prepare(self) -> None:
        """Before any edit that trains: protected texts, and the Fisher moments of these weights."""
        if self._store.meta(PROTECTED) != COMPLETE:
            self.create()
        if self._measured_at != self._checkout.revision or self._engine.fisher is None:
            self._load_moments()

    def start_again(self) -> None:
        """After protected texts were removed: what was measured on them is measured again."""
        fisher_cache.clear(self._store)
        self._engine.fisher = None
        self._engine.reference_texts = self._margins = None
        self._measured_at, self._measured_facts = None, 0
        self._coverage = Coverage(self._checkout)
        self._coverage.start_from(None)

    def prepare_group(self, facts: int) -> None:
        """Before so many facts are trained together on the head."""
        self.prepare_texts(facts)
        if self._engine.reads:
            return
        if not self._store.head():
            self.measure_margins()
        else:
            self._measure_at_head()

    def prepare_texts(self, facts: int) -> None:
        """The part of it that does not depend on the weights: enough texts, and reference texts.

        A model that reads trains facts in turn, which needs what a single fact does.
        """
        self.prepare()
        if self._engine.reads:
            return
        self.extend_for(facts)
        self._measure_reference_texts()

    def create(self, extra: Sequence[Protected] = (), seconds: float | None = None) -> None:
        """Ask the base model for protected texts, and measure them, for so long; or go on with it
        where a killed process stopped.  ``extra`` are the user's own texts.
        """
        if extra and not self._store.protected("control"):  # a killed init has not lost them
            self._store.set_protected(_rows("control", extra))
        seconds = self._config.protect.init_minutes * 60 if seconds is None else seconds
        self._fill(seconds)
        self._store.set_meta(PROTECTED, COMPLETE)
        self._measure_facts()
        self.save()
        self._coverage.conclude()

    def _fill(self, seconds: float) -> bool:
        """More protected texts and moments, within the time; returns whether there are any."""
        if self._engine.fisher is None:
            base = self._coverage.load()
            self._coverage.start_from(base)
            if base is not None:
                self._engine.fisher = base, base
        return self._checkout.at(0, lambda: self._coverage.fill(seconds))

    def extend(self, edit_seconds: float) -> None:
        """After an edit: go on with what there was no time for, for a share of the edit's time."""
        if self._can_extend:
            seconds = edit_seconds * self._config.protect.edit_ratio
            self._checkout.at(0, lambda: self._coverage.spend(seconds))

    def extend_at_once(self, seconds: float) -> bool:
        """Within an edit that harmed what must stay: go on with what there was no time for, with
        the weights from before the edit in memory.  Returns whether there was anything.
        """
        return self._can_extend and self._fill(seconds)

    @property
    def _can_extend(self) -> bool:
        is_measured = self._measured_at is not None and self._engine.fisher is not None
        return is_measured and not self._coverage.is_complete

    def extend_for(self, facts: int, leave_out: Iterable[str] = ()) -> None:
        """Extract enough protected texts for so many facts more than are committed.

        A new text that contains one of the names in ``leave_out`` is not protected.
        """
        settings = self._config.protect
        seconds = facts * settings.seconds_per_fact
        if not self._coverage.is_complete:  # the model is slow, and common questions come first
            if seconds and self._fill(seconds):
                self._engine.reference_texts = self._margins = None
            return
        facts += len(self._store.keys("committed"))
        samples = min(settings.max_samples, facts * settings.samples_per_fact)
        drawn = names.count(self._store.meta(_SAMPLES) or str(settings.samples), _SAMPLES)
        if samples <= drawn:
            return
        # The questions of locality probes are never asked, but their answers may come under another
        # question: otherwise the probes would only show knowledge that is never replayed.
        unasked = [text.prompt for text in self._texts("locality")]
        new, asked = self._ask_base(
            extraction.extract_knowledge, samples - drawn, seconds=seconds,
            known=self._texts("control"), unasked=unasked, seed=drawn,
            progress=self._checkout.say,
        )  # fmt: skip
        unwanted = [normalise(name) for name in leave_out]

        def is_allowed(text: Protected) -> bool:
            content = normalise(f"{text.prompt}\n{text.answer}")
            return not any(name in content for name in unwanted)

        self._store.add_protected(_rows("control", filter(is_allowed, new)))
        self._engine.reference_texts = self._margins = None
        # Last: a run that was killed does it again.  Later groups go on with what was not asked.
        self._store.set_meta(_SAMPLES, str(drawn + asked))

    def locality_examples(self) -> list[Example]:
        """The store's locality probes."""
        return self._examples(self._texts("locality"))

    def known_texts(self) -> tuple[Protected, ...]:
        """The protected texts that the base model knows, locality probes among them."""
        texts = [*self._texts("control"), *self._texts("locality")]
        return self._ask_base(protected_texts.known, texts)

    def _ask_base(
        self, ask: Callable[Concatenate[BaseModel, Renderer, _P], _T], *args: _P.args,
        **options: _P.kwargs,
    ) -> _T:  # fmt: skip
        """The result of a function of the model, with the base weights, from rank 0."""
        base, renderer = self._engine.base, self._engine.renderer
        action = partial(ask, base, renderer, *args, **options)
        return self._checkout.at(0, lambda: self._engine.worker.on_main(action))

    def _texts(self, role: str) -> list[Protected]:
        return self._coverage.texts(role)

    def _measured_examples(self, most: int, seed: int) -> list[Example]:
        """So many of the texts that moments are measured on."""
        texts = self._coverage.measured_texts()
        return self._examples(random.Random(seed).sample(texts, min(most, len(texts))))

    def _examples(self, texts: Sequence[Protected]) -> list[Example]:
        return [protected_texts.example(self._engine.renderer, text) for text in texts]

    def _fact_examples(self) -> list[Example]:
        """Each committed fact under its first training prompt."""
        rows = self._store.facts("committed")
        return [self._engine.examples(row.fact)[0] for row in rows]

    def _measure_reference_texts(self) -> None:
        """Keep what the base model says to the protected texts that it knows; done once."""
        if self._engine.reference_texts is not None or not self._config.group.reference_texts:
            return
        self._checkout.say("asking the base model about protected text")
        texts = self._ask_base(protected_texts.known, self._texts("control"))
        examples = self._examples(texts)
        self._checkout.at(0, lambda: self._engine.measure_reference(examples))

    def measure_margins(self) -> None:
        """For the next edit, which starts at the base weights: the moments of the margins of what
        the base model knows.  They are measured once a store.
        """
        base, self._measured_at, self._measured_facts = self._moments()[0], None, 0
        references = self._engine.reference_texts
        known = references.examples if references is not None else ()
        count = self._measured_count(len(self._store.keys("committed")))
        examples = random.Random(0).sample(known, min(count, len(known)))
        ids = repr((self._engine.names, [example.ids for example in examples]))
        texts = hashlib.sha256(ids.encode()).hexdigest()
        if self._margins is None and examples:
            self._margins = fisher_cache.read(self._store, 0, "margins", texts)
        if self._margins is not None or not examples:
            self._engine.fisher = base, self._margins or base
            return
        self._checkout.say("measuring what the base model knows")
        self._engine.measure_margins(examples)
        self._margins = self._moments()[1]
        with self._checkout.best_effort():
            fisher_cache.write(self._store, 0, "margins", self._margins, texts)

    def remember(self, learned: Sequence[Example], weight: float | None = None) -> None:
        """After a commit: protect what was learned too; the moments then belong to the head."""
        if self._measured_at is None:  # the margins were for that edit alone
            self._start_from(self._moments()[0])
        elif learned:
            self._engine.remember(learned, weight)
        self._measured_at = self._checkout.revision

    def save(self) -> None:
        """Keep the moments for the next start."""
        if self._engine.fisher is None or self._measured_at != self._checkout.revision:
            return
        with self._checkout.best_effort():
            base, total = self._engine.fisher
            label = self._coverage.label
            fisher_cache.write(self._store, 0, "base", base, label)
            fisher_cache.write(self._store, self._checkout.revision, "head", total, label)

    def _load_moments(self) -> None:
        base, revision = self._coverage.load(), self._checkout.revision
        if base is not None and set(base.inputs_of) != set(self._engine.names):
            base = None
        total = fisher_cache.read(self._store, revision, "head", self._coverage.label)
        self._coverage.start_from(base)
        if base is None:
            self._fill(self._config.protect.init_minutes * 60)
            self._measure_facts()
            self.save()
        elif total is None:
            self._start_from(base)
            self.save()
        else:
            self._engine.fisher = base, total
            self._measured_at = revision

    def _start_from(self, base: FisherMoments) -> None:
        """The base moments, with those of the committed facts measured again."""
        self._engine.fisher = base, base
        self._measure_facts()

    def _measure_facts(self) -> None:
        """Add the committed facts to the moments of the base model's texts."""
        examples = self._fact_examples()
        if examples:
            self._checkout.say(f"measuring {facts_text(len(examples))}")
            self._engine.remember(examples, self._config.group.fact_weight)
        self._measured_at = self._checkout.revision

    def _measure_at_head(self) -> None:
        """Measure again once the facts have grown by half: the moments change with the weights."""
        facts = len(self._store.keys("committed"))
        if facts < max(MIN_FACTS, self._measured_facts * GROWTH):
            return
        self._checkout.say(f"measuring what must stay, with {facts} facts")
        self._engine.measure_at_head(
            self._measured_examples(self._measured_count(facts), seed=self._checkout.revision),
            self._fact_examples(),
            self._config.group.fact_weight,
        )
        self._measured_at, self._measured_facts = self._checkout.revision, facts

    def _measured_count(self, facts: int) -> int:
        """How many texts moments that are measured often are of: those that take no longer than
        texts for so many facts.
        """
        seconds = max(MIN_FACTS, facts) * self._config.protect.seconds_per_fact
        return min(MEASURED_TEXTS, self._coverage.texts_within(seconds))

    def _moments(self) -> tuple[FisherMoments, FisherMoments]:
        if self._engine.fisher is None:
            raise RuntimeError("an edit is prepared first")
        return self._engine.fisher


def _rows(role: str, texts: Iterable[Protected]) -> list[ProtectedRow]:
    return [ProtectedRow(role=role, **asdict(text)) for text in texts]
