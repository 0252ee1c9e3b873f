"""Settings that were renamed or removed since the first version, by section.

``Config.load`` refuses an old name and says the new one; the second migration of the store's
database writes the new names into the settings that earlier edits recorded.
"""

RENAMED: dict[str, dict[str, str]] = {
    "training": {
        "phrasings": "phrasings_per_step", "rehearsal": "rehearsal_facts",
        "shift_weight": "penalty_weight", "max_price": "max_penalty", "margin": "min_margin",
        "lead": "target_margin", "shrink": "singular_value_decay", "hold_limit": "max_hold_steps",
    },
    "group": {
        "largest": "max_size", "batch": "batch_size", "passes": "epochs", "again": "refine_epochs",
        "rounds": "refine_rounds", "rehearsal": "rehearsal_ratio", "anchors": "reference_texts",
        "anchor_weight": "kl_weight", "learning_rate": "step_gain", "shift_weight": "penalty_scale",
        "lead": "target_margin", "settled": "easy_token_weight", "retention": "min_retention",
        "anew": "compaction_ratio",
    },
    "gate": {
        "recall": "min_recall", "paraphrase": "min_paraphrase", "locality": "min_locality",
        "retention": "min_retention",
    },
    "retention": {
        "sample": "checked_facts", "prompts": "prompts_per_fact", "repairs": "max_repairs",
        "stale_after": "stale_after_revisions",
    },
    "protect": {
        "drafts": "samples", "long": "long_answers", "short": "short_answers",
        "free": "free_texts", "locality": "locality_probes", "drafts_a_fact": "samples_per_fact",
        "most_drafts": "max_samples",
    },
    "prompts": {"form": "fallback_template"},
}  # fmt: skip
"""The new name of each setting by its section and old name."""

REMOVED: dict[str, dict[str, str]] = {
    "model": {"shard": "Delete the line: each process holds the whole model."}
}
"""What to do about a setting that no longer exists, by section and name."""
