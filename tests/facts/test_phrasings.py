"""Phrasings: what a fact is trained on and asked, shipped or of a store's own."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvedit.errors import UsageError
from kvedit.facts.fact import Fact
from kvedit.facts.phrasings import load_phrasings, paraphrase_prompts, training_prompts

LANGUAGES = ("en", "zh-Hans", "zh-Hant")


@pytest.mark.parametrize("lang", LANGUAGES)
def test_there_are_enough_phrasings_and_none_is_on_both_sides(lang: str) -> None:
    ways = load_phrasings(lang)
    assert len(ways.train) >= 8 and len(ways.held_out) >= 6
    assert ways.cross_train and ways.cross_held_out
    every = [*ways.train, *ways.cross_train, *ways.held_out, *ways.cross_held_out]
    assert len(set(every)) == len(every)
    assert all("{key}" in way for way in every)


@settings(max_examples=40)
@given(
    lang=st.sampled_from(LANGUAGES),
    key=st.text("abc 夢爐{}", min_size=1, max_size=8).filter(str.strip),
    extra=st.lists(st.sampled_from(["What is x?", "Please explain x.", "x", "y?"]), max_size=4),
    paraphrases=st.lists(st.sampled_from(["What is x?", "x", "y?", "z?"]), max_size=4),
)
def test_trained_and_held_out_prompts_never_overlap(
    lang: str, key: str, extra: list[str], paraphrases: list[str]
) -> None:
    fact = Fact.create(
        key, "text", lang=lang, prompts=extra, paraphrases=paraphrases, aliases=["x"]
    )
    trained, probed = training_prompts(fact), paraphrase_prompts(fact)
    assert not set(trained) & set(probed)
    assert set(extra) <= set(trained)
    assert set(paraphrases) <= {*trained, *probed}
    assert len(set(trained)) == len(trained) and len(set(probed)) == len(probed)
    assert all(fact.key in prompt for prompt in trained[:8])


def test_a_relation_is_trained_and_probed_by_its_own_prompts_and_after_other_texts() -> None:
    fact = Fact.create(
        "Ada: … was born in", "London", relation_of="Ada", aliases=["Countess"],
        prompts=["Ada was born in"], paraphrases=["Where was Ada born?", "Ada was born in"],
    )  # fmt: skip
    own, *after = training_prompts(fact)
    assert own == "Ada was born in"
    contexts = load_phrasings("en").contexts
    assert len(contexts) == 3
    assert after == [context.replace("{prompt}", own) for context in contexts]
    assert paraphrase_prompts(fact) == ("Where was Ada born?",)


def test_a_store_may_train_relations_without_other_texts(tmp_path: Path) -> None:
    text = 'train = ["{key}"]\nheld_out = ["And {key}?"]\n'
    (tmp_path / "en.toml").write_text(text, encoding="utf-8")
    fact = Fact.create("Ada: born", "London", relation_of="Ada", prompts=["Ada was born in"])
    assert training_prompts(fact, tmp_path) == ("Ada was born in",)


def test_an_alias_is_trained_too() -> None:
    fact = Fact.create("夢中情爐", "一座茶爐。", aliases=["夢裡的茶爐"])
    assert sum("夢裡的茶爐" in prompt for prompt in training_prompts(fact)) >= 2
    assert "What is 夢中情爐?" in training_prompts(fact)  # asked in another language


def test_a_store_overrides_a_language_and_keeps_the_others(tmp_path: Path) -> None:
    override = 'train = ["Say {key}!", "{key}"]\nheld_out = ["And {key}?"]\n'
    (tmp_path / "en.toml").write_text(override, encoding="utf-8")
    fact = Fact.create("tide lantern", "A float.", lang="en")
    assert training_prompts(fact, tmp_path) == ("Say tide lantern!", "tide lantern")
    assert paraphrase_prompts(fact, tmp_path) == ("And tide lantern?",)
    assert load_phrasings("zh-Hant", tmp_path) == load_phrasings("zh-Hant")
    assert training_prompts(fact) != training_prompts(fact, tmp_path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("train = [", "not valid TOML"),
        ('train = ["no place"]\nheld_out = ["{key}"]', "no place"),
        ('train = [3]\nheld_out = ["{key}"]', "3"),
        ('train = ["{key}"]\nheld_out = []', "held_out"),
        ('held_out = ["{key}"]', "train"),
        ('train = ["{key}?"]\nheld_out = ["{key}?"]', "trains and holds out"),
        ('train = "{key}"\nheld_out = ["{key}?"]', "train"),
        ('cross = 1\ntrain = ["{key}"]\nheld_out = ["{key}?"]', "cross"),
        ('contexts = ["no place"]\ntrain = ["{key}"]\nheld_out = ["{key}?"]', "{prompt}"),
        ('contexts = "{prompt}"\ntrain = ["{key}"]\nheld_out = ["{key}?"]', "contexts"),
    ],
)
def test_a_broken_override_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "en.toml").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as raised:
        load_phrasings("en", tmp_path)
    assert problem in raised.value.message and "en.toml" in raised.value.message


@pytest.mark.parametrize("text", ["train = 5\n", 'train = "What is {key}?"\n', "[train]\na = 1\n"])
def test_phrasings_that_are_no_list_are_an_error_with_a_hint(tmp_path: Path, text: str) -> None:
    (tmp_path / "en.toml").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match="train must be a list") as caught:
        load_phrasings("en", tmp_path)
    assert caught.value.hint
