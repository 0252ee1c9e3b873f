"""The settings of a store: defaults here, changes in its ``kvedit.toml``.

`make docs` writes the page about them, docs/configuration.md.

Invariants:
- A configuration is frozen; an edit records the one it ran with.
- What a setting means is said once, in its ``help``, with its unit.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kvedit import config_file
from kvedit.config_file import setting

FILE_NAME = "kvedit.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """How a single fact is trained, and what single facts and groups have in common.

    [Algorithm](algorithm.md) explains the method.
    """

    max_steps: int = setting(40, low=4, help="Most optimizer steps of one training.")
    step_gain: float = setting(
        0.7, low=1e-9, high=10.0,
        help="Length of a step: the share of the loss that it would take away if the loss fell as"
        " steeply all the way (Polyak's rule).",
    )  # fmt: skip
    init_rank: int = setting(
        32, low=2, help="Highest rank of a matrix's adapter; for facts trained in turn it and"
        " `target_rank` grow with the square root of their number.",
    )  # fmt: skip
    target_rank: int = setting(12, low=1, help="Average rank over all matrices.")
    phrasings_per_step: int = setting(2, low=1, help="Phrasings of each new fact in a step.")
    rehearsal_facts: int = setting(2, help="Earlier facts in a step, each under one phrasing.")
    reference_texts: int = setting(
        2, help="Texts in a step that are compared with what the model said before the edit:"
        " the same prompts about other names, and sentences with numbers.",
    )  # fmt: skip
    kl_weight: float = setting(
        5.0, help="Weight of the KL divergence from that (nats a token) in the loss."
    )
    penalty_weight: float = setting(
        400.0, help="Weight of the Fisher penalty (predicted harm, nats a token) in the loss."
    )
    input_damping: float = setting(
        0.003, low=1e-6, help="Damping of the input moments, as a share of their mean eigenvalue."
    )
    gradient_damping: float = setting(
        0.5, low=1e-6, help="Damping of the gradient moments, as a share of their mean eigenvalue."
    )
    fact_weight: float = setting(
        20.0, help="How many times a committed fact's tokens count in the Fisher moments."
    )
    min_margin: float = setting(
        0.25, help="Logit margin that every answer token must have when training ends, logits."
    )
    target_margin: float = setting(
        2.0, help="Logit margin from which a token counts less in the loss, logits."
    )
    gradient_checkpointing: bool = setting(
        False, help="Compute activations twice instead of keeping them: less memory, more time."
    )
    system_turns_share: float = setting(
        0.0, high=0.9,
        help="Share of the training phrasings, the first one never among them, that are trained"
        " after a common system prompt instead of the store's own, so that facts are recalled under"
        " others too. Set it before the first fact; [exports](guides/export.md) say what it does.",
    )  # fmt: skip
    seed: int = setting(0, help="Seed of every random draw in training.")


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupConfig:
    """How `ingest` trains many facts together.

    Where a number is given for 64 facts, it grows with the square root of the group's size.
    """

    max_size: int = setting(1024, low=1, help="Facts in the largest group that `ingest` chooses.")
    rank: int = setting(256, low=2, help="Rank of each matrix's adapter for 64 facts.")
    batch_size: int = setting(16, low=1, help="New facts in a step for 64 facts.")
    epochs: int = setting(24, low=1, help="Passes over all facts of the group.")
    refine_epochs: int = setting(
        12, low=1, help="Passes over the facts not recalled yet, in each refine round."
    )
    refine_rounds: int = setting(
        8, help="Most refine rounds for up to 1,000 facts; more facts have proportionally more."
    )
    rehearsal_ratio: float = setting(
        2.0, help="Earlier facts in a step for each new one; fewer if the group is larger than what"
        " was committed before.",
    )  # fmt: skip
    reference_texts: int = setting(
        64, help="Protected texts in a step for 64 facts, compared with the base model's output."
    )
    kl_weight: float = setting(
        40.0, help="Weight of the KL divergence from the base model on them (nats a token) in the"
        " loss.",
    )  # fmt: skip
    step_gain: float = setting(
        0.4, low=1e-9, high=10.0,
        help="Length of the longest step: the share of the first loss that it would take away if"
        " the gradient stayed as it was (Polyak's rule).",
    )  # fmt: skip
    penalty_scale: float = setting(
        3000.0, help="Scale of the Fisher penalty (nats a token): its weight in the loss is this"
        " divided by the square root of 64 times the number of facts.",
    )  # fmt: skip
    fact_weight: float = setting(
        0.5, help="How many times a committed fact's tokens count in the Fisher moments."
    )
    target_margin: float = setting(
        1.2, help="Logit margin from which a token counts less in the loss, logits; above 256 facts"
        " it grows with the fourth root of their number.",
    )  # fmt: skip
    easy_token_weight: float = setting(
        0.1, high=1.0, help="Weight in the loss of a token that has reached `target_margin`."
    )
    min_retention: float = setting(
        0.9, high=1.0, help="Share of the checked earlier facts that a group must leave recalled;"
        " the others are repaired after it.",
    )  # fmt: skip
    compaction_ratio: float = setting(
        0.5, help="A group and the facts added since the last compaction are trained together with"
        " all others from the base model (compaction) when they are at least this many times the"
        " rest.",
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyConfig:
    """What is trained of a fact besides its text: its questions, statements and parts.

    They are reported, and never a reason to reject an edit.
    """

    held_out: float = setting(
        0.2, high=1.0, help="Share of a fact's questions that are never trained, chosen by a hash"
        " of the question; they ask how much of the text can be used (portability).",
    )  # fmt: skip
    parts: bool = setting(
        False, help="Also ask for each sentence by its first words, for each number, date and name"
        " by its sentence with a blank, and for the key by the description without it.",
    )  # fmt: skip
    questions: int = setting(
        0, high=64, help="Most questions that the base model writes about each new fact, and half"
        " as many statements; what the text does not support is refused. Needs a chat template.",
    )  # fmt: skip
    distill: bool = setting(
        False, help="Train questions towards what the model answers with the text in its prompt,"
        " in place of their answers' tokens alone.",
    )  # fmt: skip
    per_step: int = setting(
        6, low=1, help="Questions, statements and parts in a single fact's step."
    )
    per_fact: int = setting(2, low=1, help="Of each fact in the step of a group.")
    extra_steps: int = setting(
        20, help="Steps after which a single fact's training ends although some of them fail."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class GateConfig:
    """What must pass before an edit is committed, as a share of the probes of each kind."""

    min_recall: float = setting(
        1.0, high=1.0, help="Share of recall probes (training phrasings) answered exactly."
    )
    min_paraphrase: float = setting(
        0.75,
        high=1.0,
        help="Share of paraphrase probes (phrasings not trained on) answered exactly.",
    )
    min_locality: float = setting(
        0.95, high=1.0, help="Share of the locality answers given before the edit that must remain."
    )
    min_retention: float = setting(
        1.0, high=1.0, help="Share of the checked earlier facts that must still be recalled."
    )
    max_perplexity_growth: float = setting(
        1.1, low=1.0, help="Most by which one edit may multiply the perplexity of ordinary text."
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RetentionConfig:
    """How earlier facts are watched over, and how often a checkpoint is written."""

    checked_facts: int = setting(16, help="Earlier facts probed after each edit.")
    prompts_per_fact: int = setting(2, low=1, help="Prompts with which each of them is probed.")
    max_repairs: int = setting(
        2, help="Times a rejected edit is tried again together with the earlier facts it lost."
    )
    stale_after_revisions: int = setting(
        50, low=1, help="Revisions after which the last check of a fact counts as stale."
    )
    checkpoint_every: int = setting(16, low=1, help="Revisions from one checkpoint to the next.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProtectConfig:
    """The protected text: what the base model says, sampled from it by `init`."""

    init_minutes: float = setting(
        2.0, help="Minutes that `init` takes for it; what does not fit is done after later edits."
    )
    edit_ratio: float = setting(
        0.2, help="Share of an edit's time that is spent, after it, on what did not fit."
    )
    samples: int = setting(2400, low=1, help="Most questions sampled from the base model.")
    long_answers: int = setting(600, help="Most long answers to them that are kept.")
    short_answers: int = setting(500, help="Most short answers to them that are kept.")
    free_texts: int = setting(100, help="Texts sampled without a question that are kept.")
    locality_probes: int = setting(
        32, help="Answers set aside as locality probes, which are never trained on."
    )
    samples_per_fact: int = setting(
        128, help="Questions sampled for each fact before a group is trained; only answers of which"
        " the model is sure are kept.",
    )  # fmt: skip
    seconds_per_fact: float = setting(
        3.0, help="Most seconds that this takes for each fact of the group."
    )
    max_samples: int = setting(64000, help="Most questions sampled for a store.")


@dataclass(frozen=True, slots=True, kw_only=True)
class KeysConfig:
    """When two keys are one.  Set it before the first fact goes in."""

    keep_signs: bool = setting(
        False, help="Keep keys apart that differ in a sign or in a script, such as `A-1` and `A1`,"
        " `.NET` and `NET`, 后 and 後; only case and white space do not count then.",
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptsConfig:
    """How a question is put to the model.  Set it before the first fact is trained."""

    system: str = setting("", help="System prompt.")
    fallback_template: str = setting(
        "{prompt}\n",
        help="Prompt of a model without a chat template; what follows it is the answer.",
    )
    template_options: dict[str, Any] = field(
        default_factory=dict,
        metadata={"help": "Options of the chat template, such as `{ enable_thinking = false }`."},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RecallConfig:
    """What `ask --recall` and `chat --recall` put before a question that names facts."""

    source: str = setting(
        "store", help="`store` for its texts, or `model` for its recitations.",
        choices="store model",
    )  # fmt: skip
    max_facts: int = setting(3, low=1, help="Most facts that are recalled for a question.")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """How the base model is loaded."""

    device_map: str = setting(
        "", help="Devices for the parts of the model: `auto`, `balanced`, `balanced_low_0`,"
        " `sequential`, a device, or a JSON file in the store's folder with a device for each"
        " module. Empty: what `init --device-map` was given.",
    )  # fmt: skip
    load_in: str = setting(
        "", help="Quantization with bitsandbytes, `4bit` or `8bit`. It counts when the store is"
        " made; the store is for the quantized weights from then on.",
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """All settings of a store."""

    training: TrainingConfig = field(default_factory=TrainingConfig)
    group: GroupConfig = field(default_factory=GroupConfig)
    study: StudyConfig = field(default_factory=StudyConfig)
    gate: GateConfig = field(default_factory=GateConfig)
    retention: RetentionConfig = field(default_factory=RetentionConfig)
    protect: ProtectConfig = field(default_factory=ProtectConfig)
    keys: KeysConfig = field(default_factory=KeysConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    recall: RecallConfig = field(default_factory=RecallConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    @classmethod
    def load(cls, path: Path) -> Config:
        """Read a TOML file; a file that is not there means the defaults.

        Raises UsageError, naming the file and the setting, for anything it cannot take.
        """
        return cls(**config_file.read(path, cls))

    def to_json(self) -> dict[str, dict[str, object]]:
        """All settings as a JSON document, one object for each section."""
        return asdict(self)
