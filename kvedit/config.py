"""The settings of a store: defaults here, changes in its ``kvedit.toml``.

Invariants:
- A setting that is misspelt, of the wrong type or out of range is refused, never ignored.
- A configuration is frozen; an edit records the one it ran with.
"""

from __future__ import annotations

import tomllib
from dataclasses import MISSING, asdict, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from kvedit.errors import UsageError

FILE_NAME = "kvedit.toml"
_INFINITY = float("inf")

RENAMED = {
    "training": {
        "phrasings": "phrasings_per_step",
        "rehearsal": "rehearsal_facts",
        "shift_weight": "penalty_weight",
        "max_price": "max_penalty",
        "margin": "min_margin",
        "lead": "target_margin",
        "shrink": "singular_value_decay",
        "hold_limit": "max_hold_steps",
    },
    "group": {
        "largest": "max_size",
        "batch": "batch_size",
        "passes": "epochs",
        "again": "refine_epochs",
        "rounds": "refine_rounds",
        "rehearsal": "rehearsal_ratio",
        "anchors": "reference_texts",
        "anchor_weight": "kl_weight",
        "learning_rate": "step_gain",
        "shift_weight": "penalty_scale",
        "lead": "target_margin",
        "settled": "easy_token_weight",
        "retention": "min_retention",
        "anew": "compaction_ratio",
    },
    "gate": {
        "recall": "min_recall",
        "paraphrase": "min_paraphrase",
        "locality": "min_locality",
        "retention": "min_retention",
    },
    "retention": {
        "sample": "checked_facts",
        "prompts": "prompts_per_fact",
        "repairs": "max_repairs",
        "stale_after": "stale_after_revisions",
    },
    "protect": {
        "drafts": "samples",
        "long": "long_answers",
        "short": "short_answers",
        "free": "free_texts",
        "locality": "locality_probes",
        "drafts_a_fact": "samples_per_fact",
        "most_drafts": "max_samples",
    },
    "prompts": {"form": "fallback_template"},
}
"""Settings by section that had another name before 0.2: the old name, the new one."""


def setting(default: Any, low: float = 0, high: float = _INFINITY) -> Any:
    """A field with a default and the range of its values, both ends included."""
    return field(default=default, metadata={"low": low, "high": high})


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """How one edit is trained; docs/algorithm.md says what each setting does.

    ``penalty_weight`` weighs the predicted harm to protected text (nats a token) against the loss;
    an edit goes on until that harm is at most ``max_penalty``.  ``phrasings_per_step`` of each new fact and
    ``rehearsal_facts`` earlier facts are in each step.  Dampings are shares of the mean eigenvalue.
    ``fact_weight`` says how often a committed fact's tokens count in what is protected.
    ``gradient_checkpointing`` computes each block's activations twice and keeps them not at all.
    """

    max_steps: int = setting(80, low=4)
    learning_rate: float = setting(0.02, low=1e-9, high=1.0)
    init_rank: int = setting(12, low=2)
    target_rank: int = setting(8, low=1)
    phrasings_per_step: int = setting(2, low=1)
    rehearsal_facts: int = setting(3)
    penalty_weight: float = setting(400.0)
    max_penalty: float = setting(0.002, low=0)
    input_damping: float = setting(0.03, low=1e-6)
    gradient_damping: float = setting(0.5, low=1e-6)
    fact_weight: float = setting(20.0)
    min_margin: float = setting(0.25)
    target_margin: float = setting(2.0)
    singular_value_decay: float = setting(0.95, low=0.1, high=1.0)
    hold_steps: int = setting(2, low=1)
    max_hold_steps: int = setting(16, low=1)
    prune_steps: int = setting(6, low=2)
    gradient_checkpointing: bool = setting(False)
    seed: int = setting(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupConfig:
    """How facts are trained together, breadth first.

    A step sees ``batch_size`` new facts of 64 under one phrasing each, ``rehearsal_ratio`` times as many
    earlier ones, where there are so many, and ``reference_texts`` protected texts, whose divergence from
    the base model (nats a token) weighs ``kl_weight``; batch and anchors grow with the root of
    the group's size; every fact is seen ``epochs`` times, and those not recalled then ``refine_epochs``
    times in each of ``refine_rounds`` rounds, of which there are more for more than 1,000 facts, in
    proportion.  The price weighs ``penalty_scale`` / 64 for 64 facts, and less with the root of
    their number.  A token that leads by ``target_margin`` logits counts ``easy_token_weight`` in the loss: what is
    pushed further than it needs costs what is not in the group.
    ``step_gain`` is the share of the loss at the beginning that the longest step would gain if
    the way stayed as steep; an adapter has ``rank`` directions of each matrix for 64 facts, and
    with the root of their number; ``max_size`` bounds groups of automatic size.  ``fact_weight`` is
    as for single facts.  A group is taught together with all that the model holds, from the base
    model on, when it and what was taught on top since the last time are at least ``compaction_ratio`` times the
    rest.  A group may lose up to 1 - ``min_retention`` of the earlier facts that are checked: they are
    repaired after it.
    """

    max_size: int = setting(1024, low=1)
    rank: int = setting(256, low=2)
    batch_size: int = setting(16, low=1)
    epochs: int = setting(24, low=1)
    refine_epochs: int = setting(12, low=1)
    refine_rounds: int = setting(8)
    rehearsal_ratio: float = setting(2.0)
    reference_texts: int = setting(64)
    kl_weight: float = setting(40.0)
    step_gain: float = setting(0.4, low=1e-9, high=10.0)
    penalty_scale: float = setting(3000.0)
    fact_weight: float = setting(0.5)
    target_margin: float = setting(1.2)
    easy_token_weight: float = setting(0.1, high=1.0)
    min_retention: float = setting(0.9, high=1.0)
    compaction_ratio: float = setting(0.5)


@dataclass(frozen=True, slots=True, kw_only=True)
class GateConfig:
    """The share of each kind of probe that must pass before a commit.

    ``min_locality`` is the share of answers held before the edit that must be held after it.
    """

    min_recall: float = setting(1.0, high=1.0)
    min_paraphrase: float = setting(0.75, high=1.0)
    min_locality: float = setting(0.95, high=1.0)
    min_retention: float = setting(1.0, high=1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionConfig:
    """How many earlier facts each edit checks, and with how many of their prompts; how often a
    refused edit is tried again with what it lost; when a check counts as old; commits between
    checkpoints.
    """

    checked_facts: int = setting(16)
    prompts_per_fact: int = setting(10, low=1)
    max_repairs: int = setting(2)
    stale_after_revisions: int = setting(50, low=1)
    checkpoint_every: int = setting(16, low=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectConfig:
    """The protected text that is made once, at ``init``.

    ``samples`` questions are drawn from the model; of its answers ``long_answers`` long and ``short_answers`` short
    ones are kept (long ones say more about what there is to lose), ``free_texts`` texts beside them, and
    ``locality_probes`` more as probes that no training ever uses.  Many facts need more: before groups are
    taught, so many more questions are looked at that there are ``samples_per_fact`` for each fact, at
    most ``max_samples``, and of the answers those are kept that the model is sure of.
    """

    samples: int = setting(2400, low=1)
    long_answers: int = setting(600)
    short_answers: int = setting(500)
    free_texts: int = setting(100)
    locality_probes: int = setting(32)
    samples_per_fact: int = setting(128)
    max_samples: int = setting(64000)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptsConfig:
    """How a question is put to the model; set it before the first fact is taught.

    ``system`` is the system prompt.  ``template_options`` go to the chat template, for instance
    ``{ enable_thinking = false }``.  ``fallback_template`` is for models without a chat template; what follows
    it is the answer.
    """

    system: str = ""
    fallback_template: str = "{prompt}\n"
    template_options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """How the base model is loaded.

    ``device_map`` spreads it over devices: ``auto``, ``balanced``, ``balanced_low_0``,
    ``sequential``, a device, or a JSON file of devices by module (its name is taken from the
    store's folder).  It comes before what ``init --device-map`` was given; "" leaves that as it is.
    ``load_in`` packs the weights with bitsandbytes while they are loaded, ``4bit`` or ``8bit``; it
    counts when the store is made, which is for those weights from then on.  With ``shard`` several
    processes share the blocks below the edited ones, of which each keeps a piece.
    """

    device_map: str = setting("")
    load_in: str = setting("")
    shard: bool = setting(False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings of a store."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    group: GroupConfig = field(default_factory=GroupConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    protect: ProtectConfig = field(default_factory=ProtectConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    @classmethod
    def load(cls, path: Path) -> Config:
        """Read a TOML file; a file that is not there means the defaults.

        Raises UsageError, naming the file and the setting, for anything it cannot take.
        """
        try:
            document = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except FileNotFoundError:
            return cls()
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path} is not valid TOML: {error}", hint="Correct it.") from error
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror}") from error
        _known(path, "section", document, cls)
        return cls(
            training=_section(path, document, "training", TrainingConfig),
            group=_section(path, document, "group", GroupConfig),
            gate=_section(path, document, "gate", GateConfig),
            retention=_section(path, document, "retention", RetentionConfig),
            protect=_section(path, document, "protect", ProtectConfig),
            prompts=_section(path, document, "prompts", PromptsConfig),
            model=_section(path, document, "model", ModelConfig),
        )

    def to_json(self) -> dict[str, dict[str, object]]:
        """All settings as a JSON document, one object for each section."""
        return asdict(self)


_Section = TypeVar("_Section")


def _section(path: Path, document: dict[str, Any], name: str, kind: type[_Section]) -> _Section:
    """One table of the file as its dataclass."""
    table = document.get(name, {})
    if not isinstance(table, dict):
        raise UsageError(f"{path}: {name} must be a table", hint=f"Write [{name}] on its own line.")
    _current(path, name, table)
    _known(path, f"setting in [{name}]", table, kind)
    types = {item.name: item for item in fields(kind)}  # type: ignore[arg-type]
    where = {setting: f"{path}: [{name}] {setting}" for setting in table}
    return kind(**{key: _value(where[key], table[key], types[key]) for key in table})


def _current(path: Path, section: str, table: dict[str, Any]) -> None:
    """Refuse a setting under the name that it had before."""
    for old in table:
        if new := RENAMED.get(section, {}).get(old):
            raise UsageError(
                f"{path}: [{section}] {old} is now called {new}",
                hint=f"Write {new} instead of {old}.",
            )


def _known(path: Path, what: str, table: dict[str, Any], kind: type) -> None:
    """Refuse a name that the dataclass does not have."""
    names = [item.name for item in fields(kind)]
    for name in table:
        if name not in names:
            guess = get_close_matches(name, names, n=1)
            hint = f"Did you mean {guess[0]}?" if guess else f"Known: {', '.join(names)}."
            raise UsageError(f"{path}: unknown {what}: {name}", hint=hint)


def _value(where: str, value: object, item: Any) -> object:
    """Check one value against the type of its default and its range."""
    wanted = dict if item.default is MISSING else type(item.default)
    if wanted is float and type(value) is int:
        value = float(value)
    if type(value) is not wanted:
        raise UsageError(f"{where} must be of type {wanted.__name__}, got {value!r}")
    if wanted in (int, float):
        _in_range(where, value, item.metadata.get("low"), item.metadata.get("high"))
    return value


def _in_range(where: str, value: Any, low: float | None, high: float | None) -> None:
    """Refuse NaN too: it is in no range."""
    if low is None or high is None or low <= value <= high:
        return
    bounds = f"at least {low}" if high == _INFINITY else f"between {low} and {high}"
    raise UsageError(f"{where} must be {bounds}, got {value}")
