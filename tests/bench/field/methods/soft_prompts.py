"""What PEFT trains before the text and cannot merge: one prompt for all facts.

Prompt tuning (arXiv 2104.08691): virtual tokens before the text.  P-tuning (2103.10385): the same,
written by a small network while it is trained.  Prefix tuning (2101.00190): keys and values before
those of every layer, written by a network.  P-Tuning v2 (2110.07602): the same without the network.

The rows say what the methods can do with a list of facts at all: nothing is merged, so the model
carries the prompt for ever, and each new list needs another.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from kvedit.events import Event
from kvedit.model.devices import first_device, padded_rows
from kvedit.model.prompts import Example
from kvedit.model.scoring import grouped
from tests.bench.field.asked import Asked
from tests.bench.field.method import BATCH, BESIDE, Method, examples
from tests.bench.field.records import Record
from tests.bench.lora import EpochSettings, learn
from tests.bench.quality_material import Choice
from tests.bench.quality_probes import tokenized

ROWS = 16  # texts that PEFT's generation continues together


@dataclass(frozen=True, slots=True)
class SoftAsked(Asked):
    """A model with a trained prompt, asked through PEFT, which puts it in place."""

    def _generate(self, prefixes: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
        def fits(rows: int, shortest: int, longest: int) -> bool:
            return rows <= ROWS and shortest == longest  # PEFT ignores the places of padded texts

        rows: dict[int, list[int]] = {}
        for batch in grouped(list(map(len, prefixes)), fits):
            said = self._continued([prefixes[at] for at in batch], limit)
            rows |= dict(zip(batch, said, strict=True))
        return [rows[at] for at in range(len(prefixes))]

    @torch.no_grad()
    def _continued(self, prefixes: Sequence[Sequence[int]], limit: int) -> list[list[int]]:
        """Texts of one length; the end token and what follows are cut off."""
        ids = torch.tensor(prefixes, device=first_device(self.model))
        stops = sorted(self.renderer.stops)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the places, which are as they would be
            out = self.model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit,
                do_sample=False, num_beams=1, eos_token_id=stops, pad_token_id=stops[0],
                use_cache=True, temperature=None, top_p=None, top_k=None,
            )  # fmt: skip
        rows = out[:, ids.shape[1] :].tolist()
        return [row[: next((i for i, t in enumerate(row) if t in stops), limit)] for row in rows]

    @torch.no_grad()
    def _choose(self, rows: Sequence[Choice], emit: Callable[[Event], None]) -> tuple[bool, ...]:
        """As for a plain model, each choice read with its prompt."""
        right = []
        for row in rows:
            text = tokenized(self.renderer, row)
            start = len(text.prefix)
            examples = [Example((*text.prefix, *choice), start) for choice in text.choices]
            losses = [
                float(cross_entropy(logits.float(), torch.tensor(e.ids[start:]).to(logits.device)))
                for e, logits in zip(examples, self._logits(examples), strict=True)
            ]
            right.append(min(range(len(losses)), key=losses.__getitem__) == row.answer)
        return tuple(right)

    def _logits(self, examples: Sequence[Example]) -> list[Tensor]:
        width = max(len(e.ids) for e in examples)
        ids = padded_rows([e.ids for e in examples], width).to(first_device(self.model))
        mask = padded_rows([[1] * len(e.ids) for e in examples], width).to(ids.device)
        logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        own = logits[:, -width:]  # those before belong to the prompt
        places = zip(own, examples, strict=True)
        return [table[e.start - 1 : len(e.ids) - 1] for table, e in places]


@dataclass(kw_only=True)
class SoftPrompt(Method):
    """What the four have in common."""

    virtual_tokens: int = 20
    learning_rate: float = 1e-3
    batch: int = 8
    max_epochs: int = 60
    changes: ClassVar[str] = BESIDE
    ways: ClassVar[tuple[str, ...]] = (BATCH,)
    _recalled: bool = field(default=False, init=False)

    def edit(self, asked: Asked, records: Sequence[Record]) -> Asked:
        """A prompt for all records; it replaces an earlier one."""
        from peft import get_peft_model

        devices = [asked.model.device] if asked.model.device.type == "cuda" else []
        settings = EpochSettings(
            learning_rate=self.learning_rate, batch=self.batch, max_epochs=self.max_epochs,
            seed=self.setup.seed,
        )  # fmt: skip
        rows = examples(asked, records)
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.setup.seed)
            wrapped = get_peft_model(asked.model, self.config())
            *_, self._recalled = learn(wrapped, rows, settings)
        wrapped.eval().requires_grad_(False)
        return SoftAsked(wrapped, asked.renderer)

    def config(self) -> Any:
        """PEFT's settings."""
        raise NotImplementedError

    def passes(self, example: Example) -> float:
        """One an epoch, the virtual tokens included."""
        return self.max_epochs * (1 + self.virtual_tokens / len(example.ids))

    def notes(self) -> dict[str, Any]:
        """Whether the last epoch found all recalled."""
        return {"recalled in training": self._recalled}

    def _options(self) -> dict[str, Any]:
        return {"task_type": "CAUSAL_LM", "num_virtual_tokens": self.virtual_tokens}


@dataclass(kw_only=True)
class PromptTuning(SoftPrompt):
    """Virtual tokens, trained directly; they need large steps (0.3 in the paper, of Adafactor)."""

    learning_rate: float = 3e-2

    def config(self) -> Any:
        """From random embeddings."""
        from peft import PromptTuningConfig

        return PromptTuningConfig(**self._options())


@dataclass(kw_only=True)
class PTuning(SoftPrompt):
    """Virtual tokens, written by an MLP."""

    encoder_width: int = 128

    def config(self) -> Any:
        """PEFT's prompt encoder."""
        from peft import PromptEncoderConfig

        return PromptEncoderConfig(**self._options(), encoder_hidden_size=self.encoder_width)


@dataclass(kw_only=True)
class PrefixTuning(SoftPrompt):
    """Keys and values of every layer, written by an MLP."""

    encoder_width: int = 128

    def config(self) -> Any:
        """PEFT's prefix encoder with its projection."""
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(
            **self._options(), prefix_projection=True, encoder_hidden_size=self.encoder_width
        )


@dataclass(kw_only=True)
class PTuningV2(SoftPrompt):
    """Keys and values of every layer, trained directly."""

    learning_rate: float = 1e-2

    def config(self) -> Any:
        """PEFT's prefix encoder without a projection."""
        from peft import PrefixTuningConfig

        return PrefixTuningConfig(**self._options())
