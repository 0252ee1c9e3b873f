"""Data sets of the field with portability: KnowEdit, UnKE, WikiBigEdit, HalluEditBench, MQuAKE.

Invariants:
- A relation is trained on its own prompt only (``relations.relation``).
- What is asked to measure portability becomes a probe: asked, never trained.
"""

from collections.abc import Iterator, Mapping

from kvedit.errors import InvalidFactError
from kvedit.facts.forms.exchanges import question_as_fact
from kvedit.facts.forms.names import Record
from kvedit.facts.forms.relations import relation


def knowedit(record: Record) -> Record | None:
    """KnowEdit: a relation with ``locality`` or ``portability``, objects of lists."""
    if not any(record.get(name) for name in ("locality", "portability")):
        return None
    rephrased = record.get("rephrase_prompt", record.get("rephrase"))
    return {
        **relation(record["subject"], record["prompt"]),
        "description": _first_text(record["target_new"]) or record["target_new"],
        "paraphrases": [one for one in _listed(rephrased) if isinstance(one, str)],
        "locality": [
            {"prompt": prompt, "answer": answer} for prompt, answer in _probes(record, "locality")
        ],
        "questions": _as_probes(_probes(record, "portability")),
    }


def wikibio(record: Record) -> Record | None:
    """KnowEdit's WikiBio: the beginning of a biography and its continuation."""
    return {
        **relation(record["concept"], record["text"]),
        "description": record["labels"],
        "locality": [
            {"prompt": prompt, "answer": answer} for prompt, answer in _probes(record, "locality")
        ],
    }


def unke(record: Record) -> Record | None:
    """UnKE: a question, a long answer, another wording, and questions about parts of it."""
    if not {"question", "answer"} <= set(record) or not {"para_question", "sub_question"} & set(
        record
    ):
        return None
    parts = question_as_fact(record["question"], record["answer"])
    paraphrase = record.get("para_question")
    asked = zip(
        _listed(record.get("sub_question")), _listed(record.get("sub_answer")), strict=False
    )
    return {
        **parts,
        "paraphrases": [one for one in _listed(paraphrase) if isinstance(one, str) and one.strip()],
        "questions": _as_probes((q, a) for q, a in asked),
    }


def wikibigedit(record: Record) -> Record | None:
    """WikiBigEdit: ``update`` asks and ``ans`` answers; ``mhop`` is a question of two hops."""
    if not {"subject", "update", "ans"} <= set(record):
        return None
    locality = {"prompt": record.get("loc"), "answer": record.get("loc_ans")}
    asked = [(record.get("mhop"), record.get("mhop_ans")), (record.get("personas"), record["ans"])]
    return {
        **relation(record["subject"], record["update"]),
        "description": record["ans"],
        "paraphrases": _listed(record.get("rephrase")),
        "locality": [locality] if isinstance(locality["prompt"], str) else [],
        "questions": _as_probes(iter(asked)),
    }


def hallueditbench(record: Record) -> Record | None:
    """HalluEditBench: a relation with its question; reversed and several hops are probes."""
    if not {"subject", "object", "question"} <= set(record):
        return None
    hops = [
        (one.get("question"), one.get("answer"))
        for one in _listed(record.get("hops"))
        if isinstance(one, Mapping)
    ]
    locality = record.get("locality")
    return {
        **relation(record["subject"], record["question"]),
        "description": record["object"],
        "paraphrases": _listed(record.get("paraphrase")),
        "locality": [{"prompt": locality}] if isinstance(locality, str) else [],
        "questions": _as_probes(iter([(record.get("reversed"), record["subject"]), *hops])),
    }


def _probes(record: Record, name: str) -> Iterator[tuple[object, object]]:
    """Prompts and answers of an object of lists, whose items are ``prompt`` and ``ground_truth``.

    Raises InvalidFactError for what is neither an object nor a list.
    """
    groups = record.get(name) or []
    if not isinstance(groups, Mapping | list):
        raise InvalidFactError(f'"{name}" must be an object of lists, or a list')
    for group in groups.values() if isinstance(groups, Mapping) else [groups]:
        for item in group if isinstance(group, list) else [group]:
            if isinstance(item, Mapping):
                prompt, answer = item.get("prompt"), _first_text(item.get("ground_truth"))
                if isinstance(prompt, str) and prompt.strip():
                    yield prompt, answer


def _as_probes(pairs: Iterator[tuple[object, object]]) -> list[dict[str, object]]:
    """Questions that are asked and never trained; those without an answer are left out."""
    probes: dict[str, dict[str, object]] = {}
    for prompt, given in pairs:
        answer = _first_text(given)
        if isinstance(prompt, str) and prompt.strip() and answer:
            probes.setdefault(prompt.strip(), {"prompt": prompt, "answer": answer, "probe": True})
    return list(probes.values())


def _first_text(value: object) -> str | None:
    """The first text in nested lists, or None."""
    if isinstance(value, str):
        return value.strip() or None
    if isinstance(value, list):
        return next((found for found in map(_first_text, value) if found), None)
    return None


def _listed(value: object) -> list[object]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
