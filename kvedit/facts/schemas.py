"""From a record of a data set to a fact: kvedit's own names, their synonyms, CounterFact, zsRE.

Invariants:
- A record in kvedit's own form is read exactly as ``Fact.from_json`` reads it.
- A record that fits no form gives an error that names what is missing, never half a fact.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvedit.facts.fact import Fact

Record = Mapping[str, object]

SYNONYMS = {
    "key": ("subject", "name", "title"),
    "description": ("text", "value", "definition", "target"),
}
"""Other names of the two parts that every fact has; used when its own name is absent."""


def fact_from(record: object) -> Fact:
    """The fact that a record describes; raises InvalidFactError, as ``Fact.from_json`` does."""
    if not isinstance(record, Mapping):
        return Fact.from_json(record)
    for form in (_counterfact_original, _counterfact, _zsre):
        found = form(record)
        if found is not None:
            return Fact.from_json(found)
    return Fact.from_json(own_names(record))


def looks_like_fact(record: Record) -> bool:
    """Whether an object is one fact, rather than a mapping of keys to descriptions."""
    forms = (_counterfact_original, _counterfact, _zsre)
    return any(form(record) for form in forms) or set(SYNONYMS) <= set(own_names(record))


def own_names(record: Record) -> dict[str, object]:
    """The record with synonyms replaced by kvedit's own names."""
    renamed = dict(record)
    for name, others in SYNONYMS.items():
        found = next((other for other in others if other in renamed), None)
        if name not in renamed and found is not None:
            renamed[name] = renamed.pop(found)
    return renamed


def _counterfact_original(record: Record) -> Record | None:
    """CounterFact as published by Meng et al. (2022): the request is an object of its own."""
    request = record.get("requested_rewrite")
    if not isinstance(request, Mapping):
        return None
    subject, prompt, target = (request.get(n) for n in ("subject", "prompt", "target_new"))
    if isinstance(prompt, str) and isinstance(subject, str):
        prompt = prompt.replace("{}", subject)
    return {
        "key": subject,
        "description": target.get("str") if isinstance(target, Mapping) else target,
        "prompts": _some(prompt),
        "paraphrases": record.get("paraphrase_prompts"),
        "locality": record.get("neighborhood_prompts"),
    }


def _counterfact(record: Record) -> Record | None:
    """CounterFact as most editing libraries carry it: flat."""
    if not {"subject", "target_new", "prompt"} <= set(record):
        return None
    return {
        "key": record["subject"],
        "description": record["target_new"],
        "prompts": _some(record["prompt"]),
        "paraphrases": _some(record.get("rephrase_prompt")),
        "locality": _locality(record.get("locality_prompt"), record.get("locality_ground_truth")),
    }


def _zsre(record: Record) -> Record | None:
    """zsRE: ``alt`` is the answer to teach, ``loc`` a question whose answer must not change."""
    if not {"subject", "src", "alt"} <= set(record):
        return None
    return {
        "key": record["subject"],
        "description": record["alt"],
        "prompts": _some(record["src"]),
        "paraphrases": _some(record.get("rephrase")),
        "locality": _locality(record.get("loc"), record.get("loc_ans")),
    }


def _some(value: object) -> object:
    """One value or several, as a list."""
    if value is None or isinstance(value, list | tuple):
        return value
    return [value]


def _locality(prompt: object, answer: object) -> object:
    return [{"prompt": prompt, "answer": answer}] if prompt is not None else None
