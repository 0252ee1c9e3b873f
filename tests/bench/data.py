"""The public files that the benchmarks read: where each comes from, and what its rows hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TEXT, LIST, NUMBER = (str,), (list,), (int,)
_PASSAGE = {"key": TEXT, "description": TEXT, "questions": LIST}


@dataclass(frozen=True, slots=True)
class DataFile:
    """One file: JSON Lines whose rows have ``fields``, or, without any, one JSON object whose
    values are lists.
    """

    name: str
    what: str
    origin: str
    licence: str
    fields: Mapping[str, tuple[type, ...]]


FILES = (
    DataFile("poets.jsonl", "poets of the Tang and Song and what is said of them",
             "github.com/chinese-poetry/chinese-poetry", "MIT",
             {"key": TEXT, "description": TEXT, "era": TEXT}),
    DataFile("relations.jsonl", "facts of T-REx: a relation (P19), a subject, an object",
             "github.com/yanaiela/pararel", "MIT",
             {"relation": TEXT, "subject": TEXT, "object": TEXT}),
    DataFile("relation_phrasings.json", "for each relation its phrasings with [X] and [Y]",
             "github.com/yanaiela/pararel", "MIT", {}),
    DataFile("counterfact_1500.jsonl", "CounterFact", "github.com/ICT-STAR/LocFT", "MIT",
             {"prompt": TEXT, "subject": TEXT, "target_new": TEXT, "ground_truth": TEXT,
              "rephrase_prompt": TEXT, "locality_prompt": TEXT, "locality_ground_truth": TEXT}),
    DataFile("zsre_1500.jsonl", "zsRE", "github.com/ICT-STAR/LocFT", "MIT",
             {"src": TEXT, "subject": TEXT, "alt": TEXT, "answers": LIST, "rephrase": TEXT,
              "loc": TEXT, "loc_ans": TEXT}),
    DataFile("hallueditbench.jsonl", "HalluEditBench, with reversed and multi-hop questions",
             "github.com/llm-editing/HalluEditBench", "MIT",
             {"subject": TEXT, "relation": TEXT, "object": TEXT, "question": TEXT,
              "paraphrase": TEXT, "reversed": TEXT, "locality": TEXT, "hops": LIST}),
    DataFile("passages_en.jsonl", "paragraphs of SQuAD with questions",
             "github.com/Continual-Intelligence/SEAL", "CC BY-SA 4.0", _PASSAGE),
    DataFile("passages_zh_hans.jsonl", "paragraphs of CMRC 2018 with questions",
             "github.com/ymcui/cmrc2018", "CC BY-SA 4.0", _PASSAGE),
    DataFile("passages_zh_hant.jsonl", "paragraphs of DRCD with questions",
             "github.com/DRCKnowledgeTeam/DRCD", "CC BY-SA 3.0", _PASSAGE),
    DataFile("abilities.jsonl", "multiple choice: ARC-Easy, PIQA, MMLU",
             "github.com/AGI-Edgerunners/LLM-Adapters, ybisk.github.io (PIQA), MMLU",
             "that of each set", {"prompt": TEXT, "choices": LIST, "answer": NUMBER}),
)  # fmt: skip


def lines() -> list[str]:
    """For each file its origin and licence, and the fields of a row."""
    text = ["Put these files into one folder and give it to --data; convert them to this form:"]
    for file in FILES:
        fields = ", ".join(f"{name} ({_names(kinds)})" for name, kinds in file.fields.items())
        text += ["", f"{file.name}: {file.what}", f"  from {file.origin}, {file.licence}"]
        text.append(f"  a row: {fields}" if fields else "  one object: lists of texts by relation")
    return text


def problems(folder: Path) -> list[str]:
    """What is missing or malformed, one line for each file."""
    return [f"{file.name}: {text}" for file in FILES if (text := _problem(folder, file))]


def _problem(folder: Path, file: DataFile) -> str:
    """What is wrong with a file; nothing if it is as it should be."""
    try:
        text = (folder / file.name).read_text(encoding="utf-8")
    except FileNotFoundError:
        return f"missing (from {file.origin})"
    except (OSError, UnicodeDecodeError) as error:
        return f"cannot be read: {error}"
    if not file.fields:
        return _problem_of_table(text)
    number = 0
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            return f"line {number} is not JSON: {error}"
        if wrong := _wrong(row, file.fields):
            return f"line {number}: {wrong}"
    return "" if number else "empty"


def _problem_of_table(text: str) -> str:
    try:
        table = json.loads(text)
    except ValueError as error:
        return f"not JSON: {error}"
    ways = list(table.values()) if isinstance(table, dict) else []
    flat = [way for own in ways if isinstance(own, list) for way in own]
    good = ways and all(isinstance(own, list) for own in ways)
    return "" if good and all("[X]" in way for way in flat) else "not lists of texts with [X]"


def _wrong(row: Any, fields: Mapping[str, tuple[type, ...]]) -> str:
    if not isinstance(row, dict):
        return "not an object"
    for name, kinds in fields.items():
        if name not in row:
            return f"has no {name}"
        if not isinstance(row[name], kinds):
            return f"{name} must be {_names(kinds)}"
    return ""


def _names(kinds: tuple[type, ...]) -> str:
    names = {str: "text", list: "list", int: "number"}
    return " or ".join(names[kind] for kind in kinds)
