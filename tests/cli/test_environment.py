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


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("TRANSFORMERS_VERBOSITY", "error", "CUDA error: device-side assert triggered"),
        ("TRANSFORMERS_VERBOSITY", "error", "CUDA error"),
        ("WORLD_SIZE", "1", "tensor a (1) must match tensor b (3) at dimension 1"),
        ("WORLD_SIZE", "1", "expected '0' or '1'"),
        ("RANK", "0", str(KeyError("0"))),
        ("ACCELERATE_TORCH_DEVICE", "cpu", "found two devices, cpu and cuda:0"),
        ("OMP_NUM_THREADS", "a", "size of a is 3"),
        ("TOKENIZERS_PARALLELISM", "false", "use_cache: false"),
    ],
)
def test_a_short_or_plain_value_in_a_message_about_something_else_is_not_blamed(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    monkeypatch.setenv(name, value)
    assert environment.misread(RuntimeError(message)) == ""


def test_a_variable_that_is_named_or_odd_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "maybe")
    error = ValueError("'maybe' is neither 'true' nor 'false'")
    assert environment.misread(error) == "ACCELERATE_USE_CPU='maybe'"
    monkeypatch.setenv("HF_DEBUG", "maybe")
    assert environment.misread(error) == "ACCELERATE_USE_CPU='maybe' or HF_DEBUG='maybe'"
    error = ValueError("TOKENIZERS_PARALLELISM cannot be 'false', nor 'maybe'")
    assert environment.misread(error) == "TOKENIZERS_PARALLELISM='false'"
