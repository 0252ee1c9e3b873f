"""What a library cannot read in the environment is named, and is no bug of kvedit."""

from __future__ import annotations

import pytest

from kvedit.cli import environment
from tests.cli.cli_fakes import FakeBase, run


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("LOCAL_RANK", "abc", "invalid literal for int() with base 10: 'abc'"),
        ("ACCELERATE_USE_CPU", "maybe", "invalid truth value maybe"),
        ("ACCELERATE_DYNAMO_BACKEND", "foo", "'FOO' is not a valid DynamoBackend"),
        ("HF_HUB_ETAG_TIMEOUT", "abc", "invalid literal for int() with base 10: 'abc'"),
    ],
)
def test_a_value_that_an_error_quotes_is_named(
    fake: type[FakeBase], filled: object, monkeypatch: pytest.MonkeyPatch,
    name: str, value: str, message: str,
) -> None:  # fmt: skip
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(fake, "error", ValueError(message))
    result = run("ask", "What is Porto?")
    assert result.exit_code == 2, result.output
    assert f"{name}={value!r} in the environment is not understood" in result.stderr
    assert "bug in kvedit" not in result.stderr


def test_other_errors_name_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("HF_HOME", "")
    monkeypatch.setenv("EDITOR", "abc")
    for error in (ValueError("abc"), ValueError("index 10 is out of range"), OSError("0")):
        assert environment.misread(error) == ""
