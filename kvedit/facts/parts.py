"""Parts of a description, asked for one by one: questions that are made without a model.

A description that was only trained as a whole is recited, and little of it can be asked for.  Its
parts are asked for as questions are: a sentence by its first words, without those before it; a
number, a date or a name by the sentence around it; the key by the description without it.

Invariants:
- String operations alone, the same on every machine; no prompt contains its answer, but a sentence
  its first words.
- The sentences of a text, joined, are the text apart from white space.
- A relation, whose description is a word or two, has no parts.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from kvedit.facts.fact import Fact, Question
from kvedit.facts.keys import contains_answer

BLANK = "____"
MIN_NAMED = 4
"""Words, or characters of Chinese, that a sentence must have besides a blank, to say what is
asked."""
_CUE_WORDS, _CUE_CHARACTERS = 4, 6  # at most, with which a sentence begins in its prompt
_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_CHINESE = re.compile(f"[{_HAN}]")
UNIT = re.compile(rf"[{_HAN}]|(?:(?![{_HAN}])[^\W_])+")  # a character of Chinese or a word
_ABBREVIATION = re.compile(
    r"(?:\b(?:[A-Z]|Mr|Mrs|Ms|Dr|Prof|St|Jr|Sr|vs|etc|e\.g|i\.e|No|Vol|Fig|Inc|Ltd|Co|Gen|Col|Lt"
    r"|Rev|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|ca?)|\b(?:[A-Za-z]\.)+[A-Za-z])\.$"
)
_STOP = re.compile(r"[.!?]+[\"'”’)\]]*(?=\s)|[。！？；]+[”’」』）》\"]*|\n+")

_MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_DIGITS = r"(?<![A-Za-z\d])(?:\d[\d.,]*\d|\d)(?![A-Za-z\d])"
_WORDS = (
    "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|thirteen|fourteen|fifteen|sixteen"
    "|seventeen|eighteen|nineteen|twenty|thirty|forty|fifty|sixty|seventy|eighty|ninety|hundreds?"
    "|thousands?|millions?|billions?|half|twice|first|second|third|fourth|fifth"
)
_NUMERALS = "〇零一二三四五六七八九十百千萬万億亿兩两廿卅"
_OPENING = re.compile(
    r"(?:(?:In|On|At|By|As|For|From|To|With|After|Before|During|Since|Under|The|A|An|Its|His|Her"
    r"|Their|This|These|That|When|While|Although|But|And|the|a|an) )+"
)
"""Words with which a sentence begins, and no name does."""
_DATES = (
    rf"(?:\d{{1,2}} )?{_MONTH}(?: \d{{1,2}},)? \d{{3,4}}",
    rf"{_MONTH} \d{{1,2}}\b",
    rf"(?:\d+|[〇零一二三四五六七八九]{{2,4}})年(?:代|(?:\d+|[{_NUMERALS}]+)月)?(?:(?:\d+|[{_NUMERALS}]+)[日號号])?",
    rf"(?:\d+|[{_NUMERALS}]+)月(?:\d+|[{_NUMERALS}]+)[日號号]",
)
_NUMBERS = (
    rf"[$£€¥]?{_DIGITS}(?:%| percent|％)?(?:[萬万億亿千百]+)?",
    rf"\b(?:{_WORDS})\b(?: (?:{_WORDS})\b)*",
    rf"第[{_NUMERALS}]+",
    rf"[{_NUMERALS}]{{2,}}",
)
_QUOTED = (
    "“([^”]{1,80})”", "‘([^’]{2,80})’", "「([^」]{1,40})」", "『([^』]{1,40})』",
    "《([^》]{1,40})》", "〈([^〉]{1,40})〉", r"(?<!\w)\"([^\"]{1,80})\"(?!\w)",
)  # fmt: skip
_CAPITAL = r"[A-Z][\w'’-]*"
_NAMES = (
    rf"{_CAPITAL}(?: (?:(?:of|the|de|la|von|van|and) )*{_CAPITAL})+",  # more than one word
    rf"(?<=[\w,;:)] ){_CAPITAL}",  # one, which does not begin a sentence
)
_VALUES = tuple(re.compile(pattern) for pattern in (*_DATES, *_QUOTED, *_NAMES, *_NUMBERS))
"""What is blanked out, the longest kinds first: the year of a date is not asked for besides it."""


@dataclass(frozen=True, slots=True)
class _Phrasing:
    """How the parts are asked for in a language."""

    sentence: str
    blank: str
    key: str


_ENGLISH = _Phrasing(
    "About {key}: which sentence begins with “{cue}”?",
    "About {key}, fill in the blank: {text}",
    "What is this text about? {text}",
)
_SIMPLIFIED = _Phrasing(
    "关于{key}，以“{cue}”开头的是哪一句？",
    "关于{key}，请填空：{text}",
    "这段文字说的是什么？{text}",
)
_TRADITIONAL = _Phrasing(
    "關於{key}，以「{cue}」開頭的是哪一句？",
    "關於{key}，請填空：{text}",
    "這段文字說的是什麼？{text}",
)
_PHRASINGS = {"en": _ENGLISH, "zh-Hans": _SIMPLIFIED, "zh-Hant": _TRADITIONAL}


def parts(fact: Fact) -> tuple[Question, ...]:
    """The questions about a fact's parts, in the order of its text; each prompt once."""
    if fact.relation_of:
        return ()
    ways = _PHRASINGS[fact.lang]
    by_prompt: dict[str, Question] = {}
    for question in (*_sentences(fact, ways), *_blanks(fact, ways), *_key(fact, ways)):
        by_prompt.setdefault(question.prompt, question)
    return tuple(by_prompt.values())


def sentences(text: str) -> list[str]:
    """The sentences of a text, without the white space around them."""
    found, start = [], 0
    for stop in _STOP.finditer(text):
        if not _ABBREVIATION.search(text[start : stop.end()]):
            found.append(text[start : stop.end()].strip())
            start = stop.end()
    return [sentence for sentence in (*found, text[start:].strip()) if sentence]


def _sentences(fact: Fact, ways: _Phrasing) -> Iterator[Question]:
    """Each sentence by its first words, where these are the words of no other."""
    whole = sentences(fact.description)
    cues = [_cue(sentence) for sentence in whole]
    for sentence, cue in zip(whole, cues, strict=True):
        if len(whole) > 1 and cue and cues.count(cue) == 1:
            prompt = ways.sentence.format(key=fact.key, cue=cue)
            yield Question(prompt=prompt, answer=sentence)


def _cue(sentence: str) -> str:
    """The first words of a sentence, at most a third of them; empty where it has few."""
    units = list(UNIT.finditer(sentence))
    most = _CUE_CHARACTERS if _CHINESE.search(sentence) else _CUE_WORDS
    count = min(most, len(units) // 3)
    return sentence[: units[count - 1].end()] if count else ""


def _blanks(fact: Fact, ways: _Phrasing) -> Iterator[Question]:
    """Each number, date and name by its sentence with a blank."""
    for sentence in sentences(fact.description):
        for value in values(sentence):
            text = _without(sentence, value)
            rest = len(UNIT.findall(text.replace(BLANK, " ")))
            prompt = ways.blank.format(key=fact.key, text=text)
            if rest >= MIN_NAMED and not _alone(value).search(prompt):
                yield Question(prompt=prompt, answer=value)


def values(sentence: str) -> list[str]:
    """What can be blanked out of a sentence, in its order; none lies within another."""
    taken: list[tuple[int, int]] = []
    for pattern in _VALUES:
        for match in pattern.finditer(sentence):
            begin, end = match.span(match.lastindex or 0)
            if not match.lastindex and (opening := _OPENING.match(sentence, begin, end)):
                begin = opening.end()
            if all(end <= other or begin >= stop for other, stop in taken):
                taken.append((begin, end))
    found = dict.fromkeys(sentence[begin:end].strip(" .,") for begin, end in sorted(taken))
    return [value for value in found if UNIT.search(value)]


def _without(text: str, value: str) -> str:
    """A text with blanks for a value."""
    return _alone(value).sub(BLANK, text)


def _alone(value: str) -> re.Pattern[str]:
    """A value as words and numbers of their own, in any case; no space separates Chinese."""
    before = rf"(?<![^\W{_HAN}])" if re.match(rf"[^\W{_HAN}]", value) else ""
    after = rf"(?![^\W{_HAN}])" if re.search(rf"[^\W{_HAN}]$", value) else ""
    return re.compile(f"{before}{re.escape(value)}{after}", re.IGNORECASE)


def _key(fact: Fact, ways: _Phrasing) -> Iterator[Question]:
    """The key, by the description without it."""
    text = fact.description
    for name in sorted({fact.key, *fact.aliases}, key=len, reverse=True):
        text = _without(text, name)
    rest = len(UNIT.findall(text.replace(BLANK, " ")))
    if rest >= MIN_NAMED and not contains_answer(text, fact.key):
        yield Question(prompt=ways.key.format(text=text), answer=fact.key)
