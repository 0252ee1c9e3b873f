"""Schemas of a record: kvedit's names and their synonyms, CounterFact, zsRE.

Invariants:
- A record in kvedit's schema is read exactly as ``Fact.from_json`` reads it.
- A relation (CounterFact, zsRE) is trained on its own prompt only; its key names subject and
  prompt, so that two relations of one subject are two facts.
- A record in no schema gives an error that names what is missing, never half a fact.
"""

import hashlib
from collections.abc import Mapping

from kvedit.facts.fact import MAX_KEY, Fact

Record = Mapping[str, object]

SYNONYMS = {
    "key": ("subject", "name", "title"),
    "description": ("text", "value", "definition", "target"),
}
"""Other names of the two parts that every fact has; used when kvedit's name is absent."""


def fact_from(record: object) -> Fact:
    """The fact that a record describes; raises InvalidFactError, as ``Fact.from_json`` does."""
    if not isinstance(record, Mapping):
        return Fact.from_json(record)
    parts = (schema(record) for schema in _SCHEMAS)
    return Fact.from_json(next((p for p in parts if p is not None), standard_names(record)))


def looks_like_fact(record: Record) -> bool:
    """Whether an object is one fact, rather than a mapping of keys to descriptions."""
    return any(schema(record) for schema in _SCHEMAS) or set(SYNONYMS) <= set(
        standard_names(record)
    )


def standard_names(record: Record) -> dict[str, object]:
    """The record with synonyms replaced by kvedit's names."""
    renamed = dict(record)
    for name, synonyms in SYNONYMS.items():
        synonym = next((s for s in synonyms if s in renamed), None)
        if name not in renamed and synonym is not None:
            renamed[name] = renamed.pop(synonym)
    return renamed


def relation(subject: object, prompt: object) -> dict[str, object]:
    """The parts of a fact that make it a relation of a subject, asked for by one prompt.

    The key is the subject and the prompt without it; where that is too long for a key, its end is
    a digest.  What are no strings is left for ``Fact.from_json`` to refuse.
    """
    parts: dict[str, object] = {"key": subject, "prompts": _as_list(prompt), "relation_of": subject}
    if isinstance(subject, str) and isinstance(prompt, str) and subject.strip():
        asks = " ".join(prompt.replace(subject, "…").split())
        key = f"{' '.join(subject.split())}: {asks}"
        if len(key) > MAX_KEY:
            digest = hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()[:_DIGEST]
            key = f"{key[: MAX_KEY - _DIGEST - 1]} {digest}"
        parts["key"] = key
    return parts


def _counterfact_original(record: Record) -> Record | None:
    """CounterFact as published by Meng et al. (2022), with the request in an inner object."""
    request = record.get("requested_rewrite")
    if not isinstance(request, Mapping):
        return None
    subject, prompt, target = (request.get(n) for n in ("subject", "prompt", "target_new"))
    if isinstance(prompt, str) and isinstance(subject, str):
        prompt = prompt.replace("{}", subject)
    return {
        **relation(subject, prompt),
        "description": target.get("str") if isinstance(target, Mapping) else target,
        "paraphrases": record.get("paraphrase_prompts"),
        "locality": record.get("neighborhood_prompts"),
    }


_DIGEST = 8  # characters of it that tell two long keys apart
_FLAT = (
    ("target_new", "prompt", "rephrase_prompt", "locality_prompt", "locality_ground_truth"),
    ("alt", "src", "rephrase", "loc", "loc_ans"),
)
"""Names of the new answer, the question, a paraphrase, and a question whose answer must not change
with that answer: in CounterFact as most editing libraries ship it, and in zsRE."""


def _flat(record: Record) -> Record | None:
    """CounterFact or zsRE with all parts in one object."""
    for target, prompt, paraphrase, locality, answer in _FLAT:
        if {"subject", target, prompt} <= set(record):
            probe = {"prompt": record.get(locality), "answer": record.get(answer)}
            return {
                **relation(record["subject"], record[prompt]),
                "description": record[target],
                "paraphrases": _as_list(record.get(paraphrase)),
                "locality": None if probe["prompt"] is None else [probe],
            }
    return None


def _as_list(value: object) -> object:
    """A list as it is, a single value as a list of one."""
    return value if value is None or isinstance(value, list | tuple) else [value]


_SCHEMAS = (_counterfact_original, _flat)
