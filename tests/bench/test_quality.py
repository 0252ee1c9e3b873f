"""The methods side by side on the small model: what is asked, how it is scored, what is kept."""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from click.testing import CliRunner
from small_model import FREE, KNOWN

from kvedit.errors import InvalidFactError, KveditError, UsageError
from kvedit.facts.keys import normalise
from kvedit.facts.language import detect_language
from kvedit.facts.phrasings import load_phrasings, paraphrase_prompts, training_prompts
from kvedit.model.prompts import Renderer
from tests.bench import quality, quality_material, quality_probes, report_quality
from tests.bench.asking import AskedModel
from tests.bench.bench_data import write_settings
from tests.bench.commands import bench
from tests.bench.lora import LoraSettings, train_lora
from tests.bench.quality import QualityOptions, QualityResult
from tests.bench.quality_material import CHINESE, ENGLISH, GLOSSARY, MIXED, MaterialOptions
from tests.bench.quality_methods import METHODS, STORE, examples_of
from tests.bench.quality_scores import GRAM, MethodScores, change, leaking, word_grams

if TYPE_CHECKING:
    from kvedit.model.loading import BaseModel

FACTS = 2


def write_lines(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def options(small: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> QualityOptions:
    """Two facts of four, questions about what the model knows, little protected text."""
    folder = tmp_path_factory.mktemp("quality")
    write_settings(folder, 12)
    answers = list(KNOWN.values())
    rows = [
        {"task": task, "prompt": f"What is {key}?", "choices": [text, *answers[:2]], "answer": 0}
        for task, known in (("one", list(KNOWN)[2:6]), ("two", list(KNOWN)[6:10]))
        for key, text in ((key, KNOWN[key]) for key in known)
    ]
    facts = [{"key": key, "description": text} for key, text in FREE[:4]]
    asked = [{"questions": [{"question": f"Describe {key}."}]} for key in list(KNOWN)[10:]]
    return QualityOptions(
        model=str(small["bf16"]), facts=str(write_lines(folder / "facts.jsonl", facts)),
        limit=FACTS, abilities=write_lines(folder / "abilities.jsonl", rows),
        text=write_lines(folder / "text.txt", [f"{k} {t}" for k, t in KNOWN.items()]),
        questions=44, questions_files=(write_lines(folder / "passages.jsonl", asked),),
        config=folder / "kvedit.toml", store_dir=folder / "stores", methods=METHODS,
        mixed_epochs=8,
    )  # fmt: skip


def in_process(
    options: QualityOptions, name: str, folder: Path, path: Path, digest: str, emit: Any
) -> None:
    """What the process of a part does, in this one: starting it takes ten seconds."""
    quality.write_part(path, quality.measure_part(options, name, folder, emit), digest)


@pytest.fixture(scope="module")
def said() -> list[Any]:
    """Events and reports of ``result``."""
    return []


@pytest.fixture(scope="module")
def result(options: QualityOptions, said: list[Any]) -> QualityResult:
    """One run of all methods."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "in_child", in_process)
        return quality.quality(options, said.append, lambda so_far, point: said.append(point))


@pytest.fixture
def asked(base: BaseModel) -> AskedModel:
    return AskedModel(base.model, Renderer(base.tokenizer, context=base.context))


def test_the_glossary_is_what_a_wiki_holds() -> None:
    rows = [json.loads(line) for line in (GLOSSARY / "en.jsonl").read_text("utf-8").splitlines()]
    assert Counter(row["kind"] for row in rows) == dict.fromkeys([r["kind"] for r in rows[:20]], 6)
    facts = quality_material.read_facts(ENGLISH)
    assert len({normalise(fact.key) for fact in facts}) == len(facts) == 120
    assert all(25 <= len(fact.description.split()) <= 40 for fact in facts)
    grams = Counter(gram for fact in facts for gram in word_grams(fact.description))
    assert max(grams.values()) == 1, "no two share a run of words: none comes from a template"
    urls = [fact for fact in facts if "https://" in fact.description]
    assert urls and all(".example/" in fact.description for fact in urls)


def test_the_chinese_part_begins_with_the_seed_fact() -> None:
    chinese, mixed = map(quality_material.read_facts, (CHINESE, MIXED))
    assert len(chinese) == 21 and chinese[0].key == mixed[0].key == "夢中情爐"
    assert all(fact.lang == detect_language(fact.description, fact.key) for fact in chinese)
    assert {"zh-Hans", "zh-Hant"} == {fact.lang for fact in chinese}
    assert Counter(fact.lang == "en" for fact in mixed[:20]) == {True: 10, False: 10}
    rows = [json.loads(line) for line in (GLOSSARY / "zh.jsonl").read_text("utf-8").splitlines()]
    assert [row["of"] for row in rows] == [
        fact.key for fact in quality_material.read_facts(ENGLISH)[:20]
    ]
    own = [row["key"] for row in rows[1::2]]
    assert own == [fact.key for fact in mixed[1:21] if fact.lang != "en"]


def test_what_is_asked_is_trained_by_all_or_by_none() -> None:
    material = quality_material.load(MaterialOptions(limit=3, asked=2))
    assert len(material.trained) == len(material.unseen) == 6
    for one in material.trained:
        assert one.prompt in training_prompts(material.facts[one.fact]) and not one.other
    for one in material.unseen:
        fact = material.facts[one.fact]
        assert one.prompt in paraphrase_prompts(fact)
        ways = [way.replace("{key}", fact.key) for way in load_phrasings("en").cross_held_out]
        assert one.other == (one.prompt in ways)
    left_out = [fact.key for fact in quality_material.read_facts(ENGLISH)[3:23]]
    assert list(dict.fromkeys(key for key, _ in material.untaught)) == left_out
    everything = quality_material.load(MaterialOptions())
    taught = {normalise(fact.key) for fact in everything.facts}
    untaught = {normalise(key) for key, _ in everything.untaught}
    assert len(untaught) == 10 and not untaught & taught


def test_general_questions_name_no_key(tmp_path: Path) -> None:
    facts = write_lines(tmp_path / "facts.jsonl", [{"key": "Water", "description": "Wet stuff."}])
    more = write_lines(tmp_path / "more.txt", ["Is WATER wet?", "Is fire hot?"])
    given = MaterialOptions(facts=str(facts), questions_files=(more,))
    questions = quality_material.load(given).questions
    assert "Is fire hot?" in questions and "What is the capital of France?" in questions
    assert not any("water" in question.casefold() for question in questions)
    assert len(quality_material.load(replace(given, questions=5)).questions) == 5


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "choices": ["b"], "answer": 1}, "line 1 needs choices"),
        ({"choices": ["b"], "answer": 0}, 'line 1 has no "prompt"'),
        ("[1]", "line 1 must be a JSON object"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: Any, message: str) -> None:
    path = write_lines(tmp_path / "abilities.jsonl", [row])
    with pytest.raises((UsageError, InvalidFactError), match=message):
        quality_material.load(MaterialOptions(abilities=path, limit=1))


def test_a_prompt_that_is_read_once_gives_the_same_losses(
    asked: AskedModel, options: QualityOptions
) -> None:
    material = quality_material.load(options)
    rows = [quality_probes.tokenized(asked.renderer, one) for one in material.abilities]
    rows.append(replace(rows[0], prefix=rows[0].prefix[-1:]))
    for batch in quality_probes._equal_prefixes(asked.model, rows):
        some = [rows[at] for at in batch]
        assert len({len(row.prefix) for row in some}) == 1
        quick = quality_probes.choice_losses(asked.model, some)
        for row, losses in zip(some, quick, strict=True):
            assert losses == pytest.approx(quality_probes._whole_losses(asked.model, row), abs=1e-4)
    right = quality_probes.choose(asked, material.abilities, lambda event: None)
    assert sum(right) >= 6, "the model knows them by heart"


def test_the_loss_of_a_text_is_that_of_its_tokens(asked: AskedModel) -> None:
    texts = ["too short", *(f"What is {key}? {text}" for key, text in list(KNOWN.items())[:3])]
    losses = quality_probes.text_losses(asked, texts, 10_000, lambda event: None)
    for text, (nats, count) in zip(texts[1:], losses, strict=True):
        ids = torch.tensor([asked.renderer.tokens(text)])
        with torch.no_grad():
            mean = asked.model(input_ids=ids, labels=ids).loss
        assert count == ids.shape[1] - 1 and nats == pytest.approx(float(mean) * count, rel=1e-4)
    assert len(quality_probes.text_losses(asked, texts, 12, lambda event: None)) == 1


def test_paired_difference() -> None:
    none = change("t", [(True, True)] * 100 + [(False, False)] * 100)
    assert none.difference == 0 and none.interval == pytest.approx((-0.0097, 0.0097), abs=1e-4)
    pairs = [(True, False)] * 12 + [(False, True)] * 4 + [(True, True)] * 84
    worse = change("t", pairs)
    assert (worse.lost, worse.gained, worse.before.passed, worse.after.passed) == (12, 4, 96, 88)
    center, spread = -8 / 102, 1.96 * math.sqrt(17 - 64 / 102) / 102
    assert worse.interval == pytest.approx((center - spread, center + spread), abs=1e-4)


def test_a_leak_is_a_run_of_words() -> None:
    text = "The grey hour, from three to four, is when nobody answers the bell."
    grams = word_grams(text)
    assert len(grams) == 13 - GRAM + 1
    said = [
        ("a", "I think the Grey Hour - from three to four is quiet"),
        ("b", "from three to four"),
    ]
    assert leaking(said, grams) == [said[0]]
    assert leaking([("c", "那是凌晨三點到四點的事")], word_grams("灰色一小時是凌晨三點到四點。"))


def test_lora_trains_until_all_is_recalled(asked: AskedModel) -> None:
    from kvedit.facts.fact import Fact
    from kvedit.model import scoring

    before = {name: type(module) for name, module in asked.model.named_modules()}
    examples = examples_of(asked.renderer, Fact.create(*FREE[0]))
    random_state = torch.random.get_rng_state()
    done = train_lora(asked.model, examples, LoraSettings(batch=4, learning_rate=5e-3))
    assert done.recalled and 0 < done.steps < done.epochs * 2
    assert all(outcome.passed for outcome in scoring.recall(asked.model, examples))
    assert {name: type(module) for name, module in asked.model.named_modules()} == before
    assert not any(p.requires_grad for p in asked.model.parameters())
    assert torch.equal(random_state, torch.random.get_rng_state())
    other = examples_of(asked.renderer, Fact.create(*FREE[1]))
    assert not train_lora(asked.model, other, LoraSettings(max_epochs=1)).recalled


def test_every_method_is_asked_the_same(result: QualityResult, options: QualityOptions) -> None:
    assert [one.method for one in result.methods] == list(METHODS)
    assert result.base.first_tokens.rate == result.base.whole.rate == 1.0
    assert result.base.perplexity is not None and result.base.perplexity.ratio == 1.0
    assert result.base_fp32 is not None and result.base_fp32.whole.rate == 1.0
    assert result.base_fp32.perplexity != result.base.perplexity, "rounding shows"
    assert result.store is not None and result.store.seconds > 0
    phrasings = len(load_phrasings("en").train)
    for one in result.methods:
        assert sum(one.outcomes.values()) == one.kept.generated.n == FACTS
        assert one.trained.generated.n == one.trained.forced.n == FACTS * phrasings
        assert one.unseen.generated.n > one.unseen_own.generated.n > 0
        assert one.first_tokens.n == one.whole.n == result.questions > 0
        assert one.retained.generated.n == one.learned.passed
        assert [task.task for task in one.abilities] == ["one", "two", "all"]
        assert one.seconds > 0 and one.steps > 0 and one.peak > 0
        assert one.likeness is not None and 0 <= one.likeness <= 1


def test_a_method_that_learned_is_seen_to(result: QualityResult) -> None:
    of = {one.method: one for one in result.methods}
    assert of["lora"].learned.passed == FACTS
    assert of["lora"].kept.generated.passed < FACTS, "the second fact cost the first one"
    for one in result.methods:
        if one.method != "ingest":
            assert one.trained.generated.passed > 0, one.method
    assert any(one.whole.passed < one.whole.n for one in result.methods)
    missed = [one for one in result.methods if one.misses]
    texts = [text for _, text in FREE[:FACTS]]
    assert missed and all(miss.expected in texts for one in missed for miss in one.misses)


def test_questions_that_a_store_protects_do_not_count(
    result: QualityResult, options: QualityOptions
) -> None:
    from kvedit.store.store import Store

    assert options.store_dir is not None
    with Store.open(options.store_dir / "add") as store:
        prompts = {row.prompt for row in store.protected("control")}
    questions = quality_material.load(options).questions
    assert prompts.intersection(questions), "some of the shipped ones are in every store"
    assert result.questions <= len([one for one in questions if one not in prompts])


def test_each_method_is_told_at_once(result: QualityResult, said: list[Any]) -> None:
    points = [one for one in said if isinstance(one, MethodScores)]
    assert points == list(result.methods)
    lines = [report_quality.line(one) for one in points]
    assert lines[2].startswith("lora: facts kept ") and "perplexity x" in lines[2]
    phases = {getattr(one, "phase", "") for one in said}
    assert {"base: general questions", "add: fact 2 of 2", "plain: natural text"} <= phases


def test_tables_say_which_protocol(result: QualityResult) -> None:
    tables = {table.title: table for table in report_quality.tables(result)}
    assert "Recall by free greedy generation" in tables and "The same, teacher-forced" in tables
    for table in tables.values():
        assert all(len(row) == len(table.columns) for row in table.rows)
    assert [row[0] for row in tables["What it cost, model loaded"].rows][1:] == list(METHODS)
    assert "Agresti" in report_quality.notes(result)


def test_what_was_measured_is_not_measured_again(
    result: QualityResult, options: QualityOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(quality, "in_child", refuse)
    again = replace(options, resume=True)
    assert quality.quality(again, lambda event: None) == result
    with pytest.raises(AssertionError, match="measured again"):
        quality.quality(replace(again, asked=1), lambda event: None)
    with pytest.raises(UsageError, match="made for another model"):
        quality.quality(replace(again, time=60.0), lambda event: None)


def test_one_by_one_goes_on_where_it_was_stopped(
    result: QualityResult, options: QualityOptions, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import shutil

    assert options.store_dir is not None
    folder = Path(shutil.copytree(options.store_dir, tmp_path / "stores"))
    (folder / "add.json").unlink()
    monkeypatch.setattr(quality, "in_child", in_process)
    again = replace(options, store_dir=folder, resume=True, methods=("add",))
    resumed = quality.quality(again, lambda event: None).methods[0]
    if resumed.outcomes == {"committed": FACTS}:
        assert resumed.edits == result.methods[0].edits
    assert resumed.kept == result.methods[0].kept


def test_a_store_that_is_there_is_used(options: QualityOptions, tmp_path: Path) -> None:
    from kvedit.editing.knowledge_base import KnowledgeBase

    store = tmp_path / STORE
    store.mkdir()
    write_settings(store, 12)
    KnowledgeBase.create(store, options.model).close()
    parts = quality._Parts(replace(options, store_dir=tmp_path), tmp_path, lambda event: None)
    assert parts.start() is None


def test_the_options_reach_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[QualityOptions] = []

    def stop(options: QualityOptions, **more: Any) -> None:
        given.append(options)
        raise KveditError("stopped")

    monkeypatch.setattr(quality, "quality", stop)
    words = ["quality", "--limit", "3", "--method", "lora", "--method", "add", "--asked", "2"]
    done = CliRunner().invoke(bench, [*words, "--time", "90"])
    assert "stopped" in done.output + str(done.exception)
    assert given[0].methods == ("lora", "add") and given[0].facts == ENGLISH
    assert (given[0].limit, given[0].asked, given[0].time) == (3, 2, 90.0)


@pytest.mark.slow
def test_each_part_is_a_process(options: QualityOptions, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    words = ["quality", "--model", str(options.model), "--facts", options.facts, "--limit", "1"]
    words += ["--method", "lora", "--asked", "1", "--questions", "4", "--json", str(file)]
    done = CliRunner().invoke(bench, words)
    assert done.exit_code == 0, done.output
    document = json.loads(file.read_text(encoding="utf-8"))
    assert document["methods"][0]["method"] == "lora" and document["questions"] == 4
    assert "lora: facts kept 1/1" in done.stderr
    broken = replace(options, model=str(tmp_path), store_dir=tmp_path / "stores", resume=False)
    with pytest.raises(KveditError, match="is missing"):
        quality.quality(broken, lambda event: None)
