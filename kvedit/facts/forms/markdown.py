"""A Markdown file of facts: headings and the text below them, and tables.

Invariants:
- A heading with text of its own is a fact; one that only holds other headings, or tables, is none.
- A table whose columns are parts of facts has a fact in each row; any other one is text.
- What looks like a heading inside a code block is text.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from html import unescape
from itertools import pairwise, zip_longest

from kvedit.errors import InvalidFactError
from kvedit.facts.forms.names import SYNONYMS, Record, column_name, column_names, table_record

_ATX = re.compile(r" {0,3}(#{1,6})[ \t]+(.*?)(?:[ \t]+#+)?[ \t]*")
_UNDERLINE = re.compile(r" {0,3}(={2,}|-{2,})[ \t]*")
_PARAGRAPH = re.compile(r" {0,3}[^\s|>#*+-]")
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_ROW = re.compile(r" {0,3}(?!#{1,6}[ \t]|`{3}|~{3}|>)\S.*")  # of a table that has begun
_RULE = re.compile(r" {0,3}[-|:][-|: \t]*")  # below the names of its columns, as far as it is one
_RULE_CELL = re.compile(":?-+:?")
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
_MARKS = re.compile(r"(\*\*|__|\*|`)(?=\S)(.+?)(?<=\S)\1")
LONGEST = 1000
"""Characters of a name that is cleaned; marks are looked for in quadratic time."""
_ESCAPE = re.compile(r"\\([!-/:-@\[-`{-~])")
_TAG = re.compile(r"</?[a-zA-Z][^<>]{0,200}>")
_NAMES = {"key", "aliases", *SYNONYMS["key"], *SYNONYMS["aliases"]}
"""Columns whose cells are names, as headings are."""
_ANCHOR = re.compile(r"\s*\{#[\w-]+\}$")
_CODE = -1
_QUOTING = "write \\| for a bar inside a cell"
_Line = tuple[int, str]
_Row = tuple[int, Record | InvalidFactError]


@dataclass(slots=True)
class _Section:
    """A heading, its place, and the numbered lines below it up to the next one; ``code`` are the
    numbers of those in code blocks.
    """

    line: int
    level: int
    title: str
    parent: str
    body: list[_Line] = field(default_factory=list)
    code: set[int] = field(default_factory=set)

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.body).strip()

    @property
    def problem(self) -> InvalidFactError:
        """Why the text is no fact, where it cannot be one."""
        if not self.title:
            return InvalidFactError("text before the first heading has no key; give it a heading")
        return InvalidFactError(
            f"below the heading {self.title!r} is more than tables of the named columns"
        )

    @property
    def begin(self) -> int:
        """The line of its heading, or where there is none of its text."""
        return self.line or next((number for number, line in self.body if line.strip()), 1)


def is_markdown(text: str) -> bool:
    """Whether the beginning of a text is that of a Markdown file: a heading, a table, or a heading
    after a paragraph.
    """
    lines = [line for _, line in _lines(text)]
    first, *others = [line for line in lines if line.strip()] or [""]
    if _ATX.fullmatch(first) or _begins_table([first, *others[:1]]):
        return True
    after_paragraph = any(not one.strip() and _ATX.fullmatch(two) for one, two in pairwise(lines))
    return after_paragraph or bool(others and re.fullmatch(r"=+\s*", others[0]))


def read_markdown(
    text: str, names_fit: Callable[[Iterable[str]], bool], *, tables_alone: bool = False
) -> Iterator[_Row]:
    """Line and record of each row of a table, and of each heading with other text below it.

    ``names_fit`` says whether columns are those of facts; before the first heading they are taken
    to be.  With ``tables_alone``, other text is a problem.  Headings that stand twice are told
    apart by the one above them.
    """
    sections = list(_sections(text))
    tables = [_take_tables(one, names_fit if one.title else _any_names) for one in sections]
    titles = Counter(section.title for section in sections if section.text)
    for section, rows in zip(sections, tables, strict=True):
        if section.text and (tables_alone or not section.title):
            yield section.begin, section.problem
        elif section.text:
            twice = titles[section.title] > 1 and section.parent
            key = f"{section.parent}: {section.title}" if twice else section.title
            yield section.line, {"key": key, "description": section.text}
        yield from rows


def _any_names(_: Iterable[str]) -> bool:
    return True


def _take_tables(section: _Section, names_fit: Callable[[Iterable[str]], bool]) -> list[_Row]:
    """Take the tables of facts out of a section's lines; returns their rows."""
    rows: list[_Row] = []
    body, section.body, at = section.body, [], 0
    while at < len(body):
        lines = [line for _, line in body[at : at + 2]]
        is_code = body[at][0] in section.code
        if not is_code and _begins_table(lines) and names_fit(_columns(lines[0])):
            begin = at
            while at < len(body) and _ROW.fullmatch(body[at][1]):
                at += 1
            rows += _rows(body[begin:at])
        else:
            section.body.append(body[at])
            at += 1
    return rows


def _begins_table(lines: Sequence[str]) -> bool:
    """Whether two lines are the names of columns and the rule below them, with or without bars
    around them.
    """
    if len(lines) < 2 or "|" not in lines[0] or not _RULE.fullmatch(lines[1]):
        return False
    rule = _cells(lines[1])
    same = len(_cells(lines[0])) == len(rule) and bool(_ROW.fullmatch(lines[0]))
    return same and all(map(_RULE_CELL.fullmatch, rule))


def _rows(table: Sequence[_Line]) -> Iterator[_Row]:
    """Line and record of each row below a table's first two lines."""
    try:
        names = column_names(_cells(table[0][1]), "the table")
    except InvalidFactError as error:
        yield table[0][0], error
        return
    for number, line in table[2:]:
        cells = zip_longest(names, _cells(line))
        plain = [_plain(cell or "") if name in _NAMES else cell or "" for name, cell in cells]
        try:
            yield number, table_record(names, plain, _QUOTING)
        except InvalidFactError as error:
            yield number, error


def _columns(line: str) -> list[str]:
    return [column_name(name) for name in _cells(line)]


def _cells(line: str) -> list[str]:
    """The cells of a row; marks around all of a cell go."""
    inner = re.sub(r"(?<!\\)\|$", "", line.strip().removeprefix("|"))
    cells = (cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", inner))
    return [match[2] if (match := _MARKS.fullmatch(cell)) else cell for cell in cells]


def _lines(text: str) -> Iterator[_Line]:
    """Numbered lines, without comments and the YAML between two ``---`` at the beginning."""
    lines, begin = _without_comments(text).splitlines(), 0
    if lines and lines[0].strip() == "---" and "---" in (line.strip() for line in lines[1:]):
        begin = next(at for at, line in enumerate(lines[1:], 1) if line.strip() == "---") + 1
    yield from enumerate(lines[begin:], begin + 1)


def _without_comments(text: str) -> str:
    """A text with line breaks alone in the place of HTML comments."""
    parts, at = [], 0
    while (begin := text.find("<!--", at)) >= 0 and (end := text.find("-->", begin)) >= 0:
        parts += [text[at:begin], "\n" * text.count("\n", begin, end)]
        at = end + 3
    return "".join([*parts, text[at:]])


def _sections(text: str) -> Iterator[_Section]:
    """The headings of a file in order, each with its own text; what is before them comes first."""
    above: list[_Section] = []
    current = _Section(0, 0, "", "")
    for number, line, level in _levels(list(_lines(text))):
        match = _ATX.fullmatch(line)
        title = _plain(match[2] if match else line) if level > 0 else ""
        if not title:
            current.body.append((number, line))
            if level == _CODE:
                current.code.add(number)
            continue
        yield current
        above = [one for one in above if one.level < level]
        current = _Section(number, level, title, above[-1].title if above else "")
        above.append(current)
    yield current


def _levels(lines: list[tuple[int, str]]) -> Iterator[tuple[int, str, int]]:
    """Number and line with the level of a heading, ``_CODE`` in a code block, 0 for other lines;
    rules below a heading go.
    """
    fence, skip = "", False
    for at, (number, line) in enumerate(lines):
        following = lines[at + 1][1] if at + 1 < len(lines) else ""
        opening = _FENCE.match(line)
        if skip:
            skip = False
            continue
        if opening and (not fence or line.strip().startswith(fence)):
            fence = "" if fence else opening[1]
        if fence or opening:
            yield number, line, _CODE
        elif match := _ATX.fullmatch(line):
            yield number, line, len(match[1])
        elif (
            (rule := _UNDERLINE.fullmatch(following))
            and _PARAGRAPH.match(line)
            and (at == 0 or not lines[at - 1][1].strip())
        ):
            skip = True
            yield number, line, 1 if "=" in rule[1] else 2
        else:
            yield number, line, 0


def _plain(title: str) -> str:
    """A heading or a name without links, tags, emphasis, code marks, escapes and the name of its
    place; one that is too long for a key stays as it is.
    """
    if len(title) > LONGEST:
        return title
    text = _LINK.sub(r"\1", _TAG.sub("", _ANCHOR.sub("", title)))
    for _ in range(3):
        text = _MARKS.sub(r"\2", text)
    return " ".join(unescape(_ESCAPE.sub(r"\1", text)).split())
