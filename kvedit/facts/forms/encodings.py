"""Files that are not UTF-8: read in the encoding that is named, else one message that names it.

Invariants:
- Whoever reads on gets UTF-8, line by line.
- A single bad byte in a file of UTF-8 is the problem of its row; a file in another encoding is one
  error, not one for each row.
"""

import codecs
import re
from collections.abc import Iterable, Iterator

from kvedit.errors import InvalidFactError, UsageError
from kvedit.files import decode

CERTAIN = 3
"""Lines that are not UTF-8, in a file that has none with other characters than ASCII so far, after
which the whole file is taken for one in another encoding."""
_CHINESE = {"gb18030": (range(0xB0, 0xD8), 0xA1), "big5": (range(0xA4, 0xC7), 0x40)}
"""Encodings with the lead bytes of their frequent characters and the lowest byte after them."""
_LATIN = "cp1252"
LOOKED_AT, MOST_ACCENTS = 4096, 0.4
"""Bytes, and of their letters the share with accents in a Western language: a text in Cyrillic or
Japanese has more."""
_CHINESE_TEXT = re.compile(r"[\u2010-\u2027\u3000-\u303f\u4e00-\u9fff\uff00-\uffef]")
_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def encoding_name(name: str) -> str:
    """The name of an encoding of texts as Python has it; raises UsageError for any other."""
    try:
        info = codecs.lookup(name)
        "".encode(info.name)  # refuses what is no encoding of texts, such as rot13
        b"".decode(info.name)
    except (LookupError, ValueError, TypeError) as error:
        raise UsageError(
            f"{name!r} is not the name of an encoding",
            hint="For instance gb18030 (Simplified), big5 (Traditional), utf-16, cp1252.",
        ) from error
    return info.name


def utf8_lines(lines: Iterable[bytes], name: str, encoding: str | None = None) -> Iterator[bytes]:
    """The lines of a file in UTF-8, from ``encoding`` if it is given.

    Raises InvalidFactError if they are in another encoding; with none given, bytes that are not
    UTF-8 are left for the reader of the row as long as the rest of the file is.
    """
    if encoding is not None:
        yield from _decoded(lines, name, encoding)
        return
    bad, seen_utf8 = 0, False
    for number, line in enumerate(lines):
        if number == 0 and (line.startswith(_UTF_16) or b"\0" in line):
            seen_utf8 = True  # refused later, as what it is
        if not seen_utf8 and not line.isascii():
            if is_utf8(line):
                seen_utf8 = True
            else:
                bad += 1
                if bad >= CERTAIN or likely_encoding(line) in _CHINESE:
                    raise not_utf8(line, name)
        yield line


def is_utf8(data: bytes) -> bool:
    """Whether bytes are UTF-8."""
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def line_text(data: bytes) -> str:
    """One line of a file of UTF-8; InvalidFactError says what else it may be."""
    try:
        return decode(data, "the line")
    except InvalidFactError as error:
        if is_utf8(data):
            raise
        guess = likely_encoding(data)
        may_be = f"; it may be {guess} (--encoding)" if guess else ""
        raise InvalidFactError(f"{error.message}{may_be}", hint=error.hint) from error


def not_utf8(data: bytes, name: str) -> InvalidFactError:
    """The error for a file in another encoding, which its bytes make likely."""
    guess = likely_encoding(data)
    may_be = f"; it may be {guess}" if guess else ""
    return InvalidFactError(f"{name} is not UTF-8{may_be}", hint=_hint(guess))


def _hint(guess: str | None) -> str:
    others = {"gb18030": "big5 for Traditional Chinese", "big5": "gb18030 for Simplified Chinese"}
    other = others.get(guess or "", "gb18030 or big5 for Chinese")
    return f"Name its encoding: --encoding {guess or 'NAME'} ({other}); or save it as UTF-8."


def likely_encoding(data: bytes) -> str | None:
    """The encoding that bytes which are not UTF-8 are most likely in, if one is likely."""
    shares = {name: _frequent(data, name) for name in _CHINESE}
    best = max(shares, key=lambda name: shares[name])
    if shares[best] > 0.5:
        return best
    letters = [byte for byte in data[:LOOKED_AT] if byte >= 0x80 or bytes([byte]).isalpha()]
    foreign = sum(byte >= 0x80 for byte in letters)
    return _LATIN if foreign < MOST_ACCENTS * len(letters) else None


def _frequent(data: bytes, encoding: str) -> float:
    """The share of frequent Chinese characters among those that are not ASCII; 0 if it cannot be
    the encoding.
    """
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError:
        return 0.0
    chinese = [char.encode(encoding) for char in text if "\u4e00" <= char <= "\u9fff"]
    unlikely = sum(not char.isascii() and not _CHINESE_TEXT.match(char) for char in text)
    if not chinese:
        return 0.0
    leads, lowest = _CHINESE[encoding]
    return sum(char[0] in leads and char[1] >= lowest for char in chinese) / (
        len(chinese) + unlikely
    )


def _decoded(lines: Iterable[bytes], name: str, encoding: str) -> Iterator[bytes]:
    """Lines from another encoding; raises InvalidFactError where that is not the one."""
    decoder = codecs.getincrementaldecoder(encoding)()
    rest = ""
    try:
        for data in lines:
            *whole, rest = (rest + decoder.decode(data)).split("\n")
            yield from (f"{line}\n".encode() for line in whole)
        rest += decoder.decode(b"", final=True)
    except UnicodeError as error:
        raise InvalidFactError(
            f"{name} is not {encoding}: {error}", hint="Name another --encoding."
        ) from error
    if rest:
        yield rest.encode()
