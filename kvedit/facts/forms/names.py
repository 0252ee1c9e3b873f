"""Names of the parts of a fact, and of questions and answers, in files that people have.

Invariants:
- kvedit's own name of a part comes before every synonym.
- A row of a table with more cells than columns is refused: it is the sign of a separator that
  belongs to a text, and half a description would be added.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from functools import lru_cache

from kvedit.errors import InvalidFactError
from kvedit.facts.fact import Fact

Record = Mapping[str, object]
PARTS = frozenset(part.name for part in fields(Fact))
"""kvedit's names of all parts."""

SYNONYMS = {
    "key": (
        "subject", "name", "title", "term", "word", "entity", "topic", "concept", "keyword",
        "headword", "entry", "label",
        "键", "鍵", "名称", "名稱", "名字", "词条", "詞條", "术语", "術語", "词语", "詞語", "名词",
        "名詞", "标题", "標題", "主题", "主題", "关键词", "關鍵詞", "关键字", "關鍵字", "概念",
        "条目", "條目", "姓名", "人名", "词", "詞",
    ),
    "description": (
        "text", "value", "definition", "target", "content", "meaning", "explanation", "summary",
        "abstract", "body", "details",
        "描述", "说明", "說明", "定义", "定義", "释义", "釋義", "解释", "解釋", "内容", "內容",
        "正文", "文本", "简介", "簡介", "介绍", "介紹", "含义", "含義", "意思", "详情", "詳情",
    ),
    "aliases": ("alias", "别名", "別名", "又名"),
    "source": ("来源", "來源", "出处", "出處"),
}  # fmt: skip
"""Other names of the parts of a fact; used where kvedit's name is absent, the first that is there
counts.  Of ``key`` and ``description`` every fact needs both."""

QUESTIONS = (
    "question", "q", "query", "prompt", "instruction", "问题", "問題", "问", "問", "提问", "提問",
    "题目", "題目", "问句", "問句", "用户", "用戶",
)  # fmt: skip
ANSWERS = (
    "answer", "a", "response", "completion", "reply", "output", "answers", "答案", "答", "回答",
    "答复", "答覆", "回复", "回覆", "解答", "答句", "助手",
)  # fmt: skip
NEEDED = ("key", "description")
_TEXTS = ("prompts", "paraphrases", "locality", "statements")
LISTS = ("aliases", *SYNONYMS["aliases"], *_TEXTS)
_SEPARATOR = re.compile(r"\|")
"""Separates the values of a cell with several."""
_OF_NAMES = re.compile("[|;；、]")
"""The same for names, in which none of these stands."""


_KNOWN = {
    name
    for names in (NEEDED, QUESTIONS, ANSWERS, PARTS, *SYNONYMS.values())
    for name in names
    if len(name) > 1
}


def are_of_a_record(names: Sequence[str]) -> bool:
    """Whether names are those of a record's parts, rather than the keys of a mapping."""
    return 2 * sum(name in _KNOWN for name in names) >= len(names) > 1


def column_name(name: str) -> str:
    """A name in the form in which columns are compared."""
    return name.strip().casefold()


def column_names(cells: Iterable[str], where: str) -> list[str]:
    """The names of a table's columns; raises InvalidFactError for one that is there twice."""
    names = [column_name(cell) for cell in cells]
    if twice := sorted(name for name, count in Counter(names).items() if name and count > 1):
        raise InvalidFactError(f"{where}: two columns are named {twice[0]!r}", hint="Rename one.")
    return names


def table_record(names: Sequence[str], cells: Sequence[str], quoting: str) -> dict[str, object]:
    """A row by the names of its columns; empty cells are left out.

    Raises InvalidFactError, with how such a table is ``quoting``, where there are more cells.
    """
    if any(cell.strip() for cell in cells[len(names) :]):
        raise InvalidFactError(
            f"{len(cells)} cells, but the first line names {len(names)} columns; {quoting}"
        )
    record: dict[str, object] = {n: c for n, c in zip(names, cells, strict=False) if c.strip()}
    for name in LISTS:
        if name in record:
            separator = _SEPARATOR if name in _TEXTS else _OF_NAMES
            values = separator.split(str(record[name]))
            record[name] = [value.strip() for value in values if value.strip()]
    return record


def standard_names(record: Record) -> dict[str, object]:
    """The record with synonyms replaced by kvedit's names."""
    renamed = dict(record)
    for name, synonym in _renames(tuple(record)):
        value = renamed.pop(synonym)
        renamed[name] = [value] if name == "aliases" and isinstance(value, str) else value
    return renamed


@lru_cache(maxsize=1000)
def _renames(names: tuple[str, ...]) -> tuple[tuple[str, str], ...]:
    """Which parts are there under which synonyms; asked for every row of a table."""
    found = ((part, first_of(dict.fromkeys(names), others)) for part, others in SYNONYMS.items())
    return tuple((part, name) for part, name in found if name is not None and part not in names)


def first_of(record: Record, names: tuple[str, ...]) -> str | None:
    """The first of the names that a record has."""
    return next((name for name in names if name in record), None)
