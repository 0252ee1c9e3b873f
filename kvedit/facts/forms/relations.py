"""Relations of a subject, one prompt each: CounterFact and zsRE.

Invariants:
- A relation (CounterFact, zsRE) is trained on its own prompt only (``training_prompts``); its key
  names subject and prompt, so that two relations of one subject are two facts.
"""

import hashlib
from collections.abc import Mapping

from kvedit.facts.fact import MAX_KEY

Record = Mapping[str, object]


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


def counterfact_original(record: Record) -> Record | None:
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
    ("target", "prompt", "rephrase_prompt", "locality_prompt", "locality_ground_truth"),
    ("alt", "src", "rephrase", "loc", "loc_ans"),
)
"""Names of the new answer, the question, a paraphrase, and a question whose answer must not change
with that answer: in CounterFact as most editing libraries ship it, and in zsRE."""


def flat(record: Record) -> Record | None:
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
