"""The benchmarks, on the small model: what they ask, what they leave out, what they say."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from small_engine import make_engine
from small_model import FREE, KNOWN

from kvedit.bench import tables
from kvedit.bench.tables import Table
from kvedit.editing.knowledge_base import KnowledgeBase
from kvedit.errors import InvalidFactError, UsageError
from kvedit.events import Score
from kvedit.model.prompts import Example
from tests.bench import (
    documents,
    plots,
    questions,
    report,
)
from tests.bench.asking import AskedEngine, AskedModel, both, marks
from tests.bench.bench_data import POETS, document, make_options, write_data, write_model
from tests.bench.commands import bench
from tests.bench.retain import RetainResult, retain
from tests.bench.undo import Difference, Restored, UndoResult, difference, served_digest, undo


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def model(small: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model with the lists of what it was pretrained on."""
    return write_model(small["bf16"], tmp_path_factory.mktemp("model") / "bf16")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the store that ``result`` keeps."""
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def result(data: Path, model: Path, store: Path) -> RetainResult:
    """One run of the benchmark."""
    events: list[object] = []
    measured = retain(make_options(data, model, store), events.append)
    assert events
    return measured


def test_marks() -> None:
    assert marks(20) == [1, 2, 5, 10, 20]
    assert marks(7) == [1, 2, 5, 7]
    assert marks(1) == [1]


def test_known_and_held_out_facts_are_separated(data: Path, model: Path) -> None:
    facts = questions.load(data, str(model))
    assert [poet.key for poet in facts.known] == ["李白", "王維"]
    assert [poet.key for poet in facts.held_out] == ["杜甫", "无名氏"]
    assert [fact.name for fact in facts.relations] == list(KNOWN)[1:]
    first = facts.relations[0]
    assert (first.prompt, first.answer) == (f"What is {first.name}?", KNOWN[first.name])


def test_a_model_that_lists_nothing_has_seen_no_poet(data: Path, small: dict[str, Path]) -> None:
    facts = questions.load(data, str(small["bf16"]))
    assert not facts.known and len(facts.held_out) == len(POETS)
    assert len(facts.relations) == len(KNOWN)


def test_held_out_relations_are_facts_with_their_own_prompts(
    data: Path, model: Path, small: dict[str, Path]
) -> None:
    key, answer = next(iter(KNOWN.items()))
    listed = questions.load(data, str(model))
    (fact,) = questions.new_facts(listed, 5, kind=questions.RELATIONS)
    assert (fact.key, fact.description, fact.lang) == (key, answer, "en")
    assert fact.prompts == (f"What is {key}?",) and fact.paraphrases == ()
    with pytest.raises(InvalidFactError, match="no facts to add"):
        unlisted = questions.load(data, str(small["bf16"]))
        questions.new_facts(unlisted, 5, kind=questions.RELATIONS)


def test_a_relations_phrasings_are_trained_on_or_asked_never_both(
    data: Path, model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    ways = [f"{number}: what is [X]? [Y]" for number in range(12)]
    table = json.dumps({"P1": ways})
    (folder / "relation_phrasings.json").write_text(table, encoding="utf-8")
    phrased = questions.load(folder, str(model))
    (fact,) = questions.new_facts(phrased, 1, kind=questions.RELATIONS)
    assert len(fact.prompts) == len(fact.paraphrases) == questions.OWN_PROMPTS
    assert not {*fact.prompts} & {*fact.paraphrases}


def test_models_side_by_side_are_trained_on_what_none_of_them_saw(
    data: Path, model: Path, small: dict[str, Path], tmp_path: Path
) -> None:
    other = write_model(small["bf16"], tmp_path / "other")
    (other / "pretrained_poets.txt").write_text("杜甫\n", encoding="utf-8")
    listed = "".join(f"P1\t{key}\n" for key in list(KNOWN)[2:])
    (other / "pretrained_relations.tsv").write_text(listed, encoding="utf-8")
    folders = questions.in_common([questions.load(data, str(one)) for one in (model, other)])
    for one in folders:
        assert [poet.key for poet in one.held_out] == ["无名氏"]
        assert [r.subject for r in one.held_out_relations] == list(KNOWN)[:1]
    assert [poet.key for poet in folders[0].known] == ["李白", "王維"]


def test_known_poets_can_be_taken_as_facts(data: Path, model: Path) -> None:
    facts = questions.load(data, str(model))
    known = questions.new_facts(facts, 5, kind=questions.KNOWN)
    assert [(f.key, f.description) for f in known] == [(k, POETS[k]) for k in ("李白", "王維")]


def test_new_facts_come_in_file_order_and_once_for_each_key(
    data: Path, model: Path, tmp_path: Path
) -> None:
    pool = questions.load(data, str(model))
    assert [fact.key for fact in questions.new_facts(pool, 1)] == ["杜甫"]
    file = tmp_path / "facts.jsonl"
    twice = '{"key": "Tide  Lantern", "description": "Another."}\n'
    file.write_text((data / file.name).read_text(encoding="utf-8") + twice, encoding="utf-8")
    keys = [fact.key for fact in questions.new_facts(pool, 99, file)]
    assert keys == [key for key, _ in FREE]


def test_a_name_in_any_seen_text_is_not_asked() -> None:
    seen = questions.Seen(["What is a Tide Lantern?", "诗人王维，字摩诘。", "李", "白"])
    assert questions.unseen("abcd", ["王維", "李白", "tide lantern", "杜甫"], seen) == ["b", "d"]
    assert "" in seen


def test_missing_data_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"poets\.jsonl is missing"):
        questions.load(tmp_path, "nowhere")


def test_poets_are_asked_in_the_phrasings_of_their_language() -> None:
    poets = [questions.Poet(key, text) for key, text in POETS.items()]
    asked = questions.poet_questions(poets, random.Random(0))
    assert [(q.name, q.answer) for q in asked] == list(POETS.items())
    assert all(q.name in q.prompt for q in asked)


def test_retain(result: RetainResult, store: Path) -> None:
    poets, relations = result.base
    assert (poets.pool, relations.pool) == (2, len(KNOWN) - 1)
    known = relations.recall.generated
    assert known.passed > 0 and known.n == min(10, relations.pool - relations.excluded)
    assert [(p.method, p.after) for p in result.points] == [
        ("kvedit", 1), ("kvedit", 2), ("baseline", 1),
    ]  # fmt: skip
    for point in result.points:
        assert point.tried.generated.n == point.after
        assert point.tried.generated.protocol == "generated"
        assert point.tried.forced.protocol == "teacher-forced"
        assert point.relations.generated.n == known.passed, "only what was known can be kept"
    committed = [edit for edit in result.edits if edit.outcome == "committed"]
    last = result.points[1]
    assert last.committed.generated.n == len(committed)
    assert [edit.key for edit in result.edits] == [key for key, _ in FREE[:2]]
    for edit in result.edits:
        assert sum(edit.timings.values()) == pytest.approx(edit.seconds, abs=0.01)
    assert [edit.key for edit in result.baseline] == [FREE[0][0]]
    assert (store / "kvedit.db").is_file(), "--store-dir keeps it"


def test_a_second_row_protects_true_facts_that_are_not_asked(
    data: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[AskedModel, str]] = []
    ask = AskedModel.ask

    def listen(asked_model: AskedModel, examples: list[Example]) -> tuple[list[bool], list[bool]]:
        asked.extend((asked_model, example.prompt) for example in examples)
        return ask(asked_model, examples)

    monkeypatch.setattr(AskedModel, "ask", listen)
    (tmp_path / "own").mkdir()
    options = make_options(data, model, tmp_path / "own", steps=10)
    result = retain(replace(options, facts=1, baseline_facts=0, true_facts=6), lambda event: None)
    assert [point.method for point in result.points] == ["kvedit", "kvedit, true facts protected"]
    assert result.true_protected == result.protected + 6
    assert [edit.key for edit in result.true_edits] == [FREE[0][0]]
    with KnowledgeBase.open(tmp_path / "own-true-facts") as knowledge:
        rows = knowledge.store.protected("control")
    true = [row for row in rows if row.source == "true-facts.jsonl"]
    known = {f"What is {key}?": answer for key, answer in KNOWN.items()}
    relations = [row for row in true if row.prompt in known]
    assert len(true) == 6 and len(relations) >= 4, "of both poets and the relations"
    assert all(row.answer == known[row.prompt] for row in relations)
    second = {prompt for asked_model, prompt in asked if asked_model is asked[-1][0]}
    assert second and not {row.prompt for row in true} & second
    assert {row.prompt for row in true} & {prompt for _, prompt in asked}, (
        "in the first run they are"
    )
    made = report.retain_tables(result)
    assert any("second row" in table.title for table in made)


def test_a_result_says_how_it_was_made(result: RetainResult, tmp_path: Path) -> None:
    made = document("retain", result, report.retain_tables(result), report.retain_notes(result))
    page = documents.markdown(made)
    for text in ("`python -m tests.bench retain`", made["commit"], torch.__version__,
                 "Teacher-forced"):  # fmt: skip
        assert text in page
    documents.write(tmp_path / "result.json", made)
    kept = documents.read(tmp_path / "result.json")
    assert kept == made and kept["points"][1]["tried"]["generated"]["n"] == 2
    assert kept["machine"]["threads"] == torch.get_num_threads()
    assert (kept["schema"], kept["benchmark"], kept["seed"]) == (tables.SCHEMA, "retain", 0)
    assert [table["title"] for table in kept["tables"]] == [
        table.title for table in report.retain_tables(result)
    ]


def test_a_value_must_not_hide_one_of_the_documents_own() -> None:
    with pytest.raises(ValueError, match="seconds"):
        document("retain", {"seconds": 1.0}, [])


def test_other_json_is_no_result(tmp_path: Path) -> None:
    for text in ("[1]", "{}", "not JSON", '{"schema": "other/1"}'):
        (tmp_path / "other.json").write_text(text, encoding="utf-8")
        with pytest.raises(UsageError, match=r"other\.json"):
            documents.read(tmp_path / "other.json")


def test_undo_is_exact(data: Path, model: Path, tmp_path: Path) -> None:
    undone = undo(make_options(data, model, tmp_path), lambda event: None)
    committed = sum(edit.outcome == "committed" for edit in undone.edits)
    assert committed == 2
    downwards = list(range(committed, -1, -1))
    assert [one.revision for one in undone.restored] == [*downwards, committed]
    assert undone.exact and not [one for one in undone.differences if not one.tied]
    assert undone.exported.n >= 16 * committed, "trained and never-trained phrasings of both"


def test_a_difference_is_a_numerical_tie_only_where_the_logits_say_so(
    small: dict[str, Path],
) -> None:
    from kvedit.model import loading
    from kvedit.model.prompts import Renderer
    from kvedit.model.scoring import tie_tolerance

    base = loading.load(str(small["fp32"]))
    renderer = Renderer(base.tokenizer, context=base.context)
    key, answer = next(iter(KNOWN.items()))
    example = renderer.example(f"What is {key}?", answer)
    ours = list(example.ids[example.start :])
    theirs = [*ours[:2], next(t for t in range(9, 400) if t != ours[2]), *ours[3:]]
    tie = difference(base.model, example, ours, theirs)
    with torch.no_grad():
        logits = base.model(input_ids=torch.tensor([example.ids])).logits[0, example.start + 1]
    apart = logits.max() - logits[theirs[2]]
    assert tie.margin == pytest.approx(float(apart), abs=1e-4) and tie.expected
    assert tie.tie_tolerance == pytest.approx(float(tie_tolerance(base.model, logits.max())))
    assert not tie.tied
    assert Difference("p", tie.tie_tolerance, tie.tie_tolerance, True).tied


def test_only_a_difference_that_is_no_numerical_tie_is_an_error() -> None:
    restored = (Restored(1, True, True),)
    tie, error = Difference("near?", 0.125, 0.3, True), Difference("far?", 2.0, 0.3, False)
    given = {"model": "m", "edits": (), "restored": restored}
    near = UndoResult(exported=Score(9, 10, "generated"), differences=(tie,), **given)
    wrong = UndoResult(exported=Score(8, 10, "generated"), differences=(tie, error), **given)
    assert near.exact and not wrong.exact
    rows = dict(report.undo_tables(wrong)[0].rows)
    assert "1: near?" in rows["answered otherwise: numerical ties"]
    assert "1: far?" in rows["answered otherwise: ERRORS"] and "2.000" in str(rows)
    assert dict(report.undo_tables(near)[0].rows)["answered otherwise: ERRORS"] == "none"


def test_a_served_digest_sees_every_parameter(small: dict[str, Path]) -> None:
    from kvedit.model import loading

    model = loading.load(str(small["bf16"])).model
    before = served_digest(model)
    assert served_digest(model) == before
    with torch.no_grad():
        model.model.norm.weight[0] += 1
    assert served_digest(model) != before


def test_generation_is_what_counts(small: dict[str, Path]) -> None:
    """A right beginning without the end token is not recall."""
    from kvedit.model import loading
    from kvedit.model.prompts import Renderer

    base = loading.load(str(small["fp32"]))
    renderer = Renderer(base.tokenizer, context=base.context)
    key, answer = next(iter(KNOWN.items()))
    whole = renderer.example(f"What is {key}?", answer)
    more = renderer.example(f"What is {key}?", f"{answer} Indeed.")
    short = renderer.example(f"What is {key}?", answer.rsplit(" ", 1)[0])
    for asked_model in (AskedModel(base.model, renderer), AskedEngine.of(make_engine(base))):
        generated, forced = asked_model.ask([whole, more, short])
        assert generated == forced == [True, False, False]


def test_scores_show_count_n_and_interval() -> None:
    assert tables.score_cell(Score(18, 20)) == "18/20 = 90.0% [69.9, 97.2]"
    assert tables.score_cell(Score(0, 0)) == "-"
    recall = both([True, False], [True, True])
    assert (recall.generated.passed, recall.forced.passed) == (1, 2)


def test_a_result_can_be_drawn(result: RetainResult, tmp_path: Path) -> None:
    made = document("retain", result, [])
    plots.draw(made, tmp_path / "kept.png")
    assert (tmp_path / "kept.png").read_bytes().startswith(b"\x89PNG")
    kept = next(a for a in plots.figure(made).axes if a.get_title() == "Base relations kept")
    assert [bars.get_label() for bars in kept.containers] == ["kvedit", "baseline"]


def test_the_command_prints_tables_and_markdown(data: Path, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "base.json"
    words = ["base", "--data", str(data), "--model", str(model), "--json", str(file)]
    done = CliRunner().invoke(bench, ["-q", *words])
    assert done.exit_code == 0, done.output
    assert "pretrained relations" in done.stdout and "| held-out poets |" in done.stdout
    kept = documents.read(file)
    scores = {score["what"]: score["recall"]["generated"] for score in kept["base"]}
    assert scores["pretrained relations"]["passed"] >= 12
    assert scores["held-out poets"]["passed"] == 0


def test_a_table_is_drawn_where_no_word_is_cut(capsys: pytest.CaptureFixture[str]) -> None:
    """The Markdown has it in any case."""
    narrow = Table("narrow", ("what", "seconds"), (("training", "1.5"),))
    wide = Table("wide", ("measured",) * 12, (("forty-two",) * 12,))
    made = document("trial", {}, [narrow, wide])
    tables.print_tables(made)
    drawn, page = capsys.readouterr().out, documents.markdown(made)
    assert "│ training │" in drawn and "| training | 1.5 |" in page
    assert "│ forty-two │" not in drawn and "| forty-two | forty-two |" in page
    assert drawn.count("┏") == 1


@pytest.mark.parametrize("name", sorted(bench.commands))
def test_every_command_explains_itself_with_an_example(name: str) -> None:
    done = CliRunner().invoke(bench, [name, "--help"])
    assert done.exit_code == 0 and f"python -m tests.bench {name}" in done.output
    assert "shared" not in done.output
