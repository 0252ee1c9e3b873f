"""Settings: defaults, a file of changes, and every way to get one wrong."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

from kvedit.config import Config, GateConfig
from kvedit.config_file import old_settings
from kvedit.errors import UsageError
from tests.docs.config_page import page

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"


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
    names = [
        "gate", "group", "keys", "model", "prompts", "protect", "recall", "retention", "study",
        "training",
    ]  # fmt: skip
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
        (
            "[gate]\nlocality = 0.9\nrecall = 1.0\n",
            r"\[gate\] recall is now called min_recall",
            "Write min_recall instead of recall, min_locality instead of locality.",
        ),
        ("[gate]\nzzz = 1.0\n", "unknown setting", "Known: min_recall"),
        ("[model]\nshard = true\n", r"\[model\] shard was removed", "Delete the line"),
        ("gate = 3\n", "gate must be a table", r"Write [gate]"),
        ("[gate]\nmin_recall = '1'\n", r"\[gate\] min_recall must be a number, got '1'", ""),
        (
            "[recall]\nsource = 'stor'\n",
            r"\[recall\] source must be store or model, got 'stor'",
            "",
        ),
        ("[gate]\nmin_recall = true\n", "must be a number, got True", ""),
        ("[retention]\nchecked_facts = 1.5\n", "must be a whole number, got 1.5", ""),
        ("[gate]\nmin_recall = 1.5\n", "between 0 and 1.0, got 1.5", ""),
        ("[gate]\nmin_recall = nan\n", "between 0 and 1.0, got nan", ""),
        ("[retention]\nchecked_facts = -1\n", "at least 0, got -1", ""),
        ("[gate\n", "is not valid TOML", "Correct it."),
        (f"[training]\nmax_steps = {'9' * 400}\n", r"at least 4 and below 2\^63, got 9999", ""),
        (f"[gate]\nmin_recall = {'9' * 400}\n", "between 0 and 1.0 and below", ""),
        (f"[training]\nseed = {'9' * 5000}\n", "is not valid TOML: .*digits", "Correct it."),
        ("[training]\npenalty_weight = inf\n", "below 2", ""),
        (f"[training]\nseed = {'[' * 5000}\n", "is not valid TOML", "Correct it."),
        ("[prompts]\ntemplate_options = { day = 2026-01-01 }\n", "what JSON cannot", "in quotes"),
        ("[prompts]\ntemplate_options = { x = nan }\n", "what JSON cannot", ""),
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


def test_the_page_about_the_settings_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make docs`"


def test_every_setting_says_what_it_means() -> None:
    for section in fields(Config):
        for item in fields(getattr(Config(), section.name)):
            assert item.metadata["help"].endswith("."), f"[{section.name}] {item.name}"


def test_renamed_settings_have_their_new_name_and_old_names_are_free() -> None:
    settings = Config().to_json()
    for section, names in old_settings("renamed").items():
        assert set(names.values()) <= set(settings[section])
        assert not set(names) & set(settings[section])
    for section, removed in old_settings("removed").items():
        assert not set(removed) & {*settings[section], *old_settings("renamed").get(section, {})}
