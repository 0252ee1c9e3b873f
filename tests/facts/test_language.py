"""The language of a text."""

from __future__ import annotations

import pytest

from kvedit.facts.language import detect_language


@pytest.mark.parametrize(
    ("text", "context", "language"),
    [
        ("A lamp that dreams.", "", "en"),
        ("Du Fu (杜甫) was a Chinese poet.", "", "en"),
        ("夢中情爐是一種爐", "", "zh-Hant"),
        ("梦中情炉是一种炉", "", "zh-Hans"),
        ("GPT-4 是一个模型", "", "zh-Hans"),
        ("李白", "", "zh-Hant"),
        ("明月", "头发", "zh-Hans"),
        ("A poet.", "李白", "en"),
        ("1971", "聯合國", "zh-Hant"),
        ("1971", "Intel 4004", "en"),
        ("", "", "en"),
    ],
)
def test_the_language_is_detected_from_the_text(text: str, context: str, language: str) -> None:
    assert detect_language(text, context) == language
