"""Names of the parts of a fact, and of questions and answers, in files that people have.

Invariant: kvedit's own name of a part comes before every synonym.
"""

from collections.abc import Mapping
from functools import lru_cache

Record = Mapping[str, object]

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


def column_name(name: str) -> str:
    """A name in the form in which columns are compared."""
    return name.strip().casefold()


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
