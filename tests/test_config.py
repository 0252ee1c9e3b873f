"""Settings: defaults, a file of changes, and every way to get one wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvedit.config import Config, GateConfig
from kvedit.errors import UsageError


def load(tmp_path: Path, text: str) -> Config:
    path = tmp_path / "kvedit.toml"
    path.write_text(text, encoding="utf-8")
    return Config.load(path)


def test_no_file_means_the_defaults(tmp_path: Path) -> None:
    assert Config.load(tmp_path / "none.toml") == Config()


def test_a_file_changes_what_it_names_only(tmp_path: Path) -> None:
    config = load(
        tmp_path, "[gate]\nmin_paraphrase = 0.5\nmin_locality = 1\n[retention]\nchecked_facts = 0\n"
    )
    assert config.gate == GateConfig(min_paraphrase=0.5, min_locality=1.0)
    assert isinstance(config.gate.min_locality, float)
    assert config.retention.checked_facts == 0
    assert config.training == Config().training


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    assert load(tmp_path, "\ufeff[retention]\nmax_repairs = 5\n").retention.max_repairs == 5


def test_json_holds_every_section() -> None:
    document = json.loads(json.dumps(Config().to_json()))
    names = ["gate", "group", "model", "prompts", "protect", "retention", "training"]
    assert sorted(document) == names
    assert document["gate"]["min_recall"] == 1.0


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        ("[gaet]\n", "unknown section: gaet", "Did you mean gate?"),
        (
            "[gate]\nmin_recal = 1.0\n",
            r"unknown setting in \[gate\]: min_recal",
            "Did you mean min_recall?",
        ),
        ("[gate]\nrecall = 1.0\n", r"\[gate\] recall is now called min_recall", "Write min_recall"),
        ("[gate]\nzzz = 1.0\n", "unknown setting", "Known: min_recall"),
        ("gate = 3\n", "gate must be a table", r"Write [gate]"),
        ("[gate]\nmin_recall = '1'\n", r"\[gate\] min_recall must be of type float", ""),
        ("[gate]\nmin_recall = true\n", "must be of type float", ""),
        ("[retention]\nchecked_facts = 1.5\n", "must be of type int", ""),
        ("[gate]\nmin_recall = 1.5\n", "between 0 and 1.0, got 1.5", ""),
        ("[gate]\nmin_recall = nan\n", "between 0 and 1.0, got nan", ""),
        ("[retention]\nchecked_facts = -1\n", "at least 0, got -1", ""),
        ("[gate\n", "is not valid TOML", "Correct it."),
    ],
)
def test_a_wrong_setting_is_refused(tmp_path: Path, text: str, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        load(tmp_path, text)
    assert hint in caught.value.hint
    assert "kvedit.toml" in caught.value.message


def test_a_file_that_is_not_utf8_or_no_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "kvedit.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match="not valid TOML"):
        Config.load(path)
    with pytest.raises(UsageError, match="cannot be read"):
        Config.load(tmp_path)
