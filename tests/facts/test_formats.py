"""Files of many facts in every format, good and bad."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvedit.errors import InvalidFactError, UsageError
from kvedit.facts.fact import MAX_KEY, Fact, LocalityProbe
from kvedit.facts.formats import Located, Reading, read_facts
from kvedit.facts.forms.records import Columns
from kvedit.facts.keys import is_blank

TOWN = Fact.create("Porto", "A harbour town.")
LAMP = Fact.create("lamp", "It shines.", aliases=["light", "lantern"], source="a book")


def read(tmp_path: Path, data: bytes | str, name: str = "facts") -> list[Located]:
    path = tmp_path / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return list(read_facts(path))


def facts_of(rows: list[Located]) -> list[Fact | None]:
    return [row.fact for row in rows]


def places_of(rows: list[Located]) -> list[str]:
    return [row.where.rpartition(", ")[2] for row in rows]


def whole_file_error(tmp_path: Path, data: bytes | str) -> InvalidFactError:
    with pytest.raises(InvalidFactError) as caught:
        read(tmp_path, data)
    assert "facts" in caught.value.message
    assert caught.value.hint
    return caught.value


# ---- the same facts in every format

LAMP_JSON = json.dumps(LAMP.to_json())
TOWN_JSON = '{"key": "Porto", "description": "A harbour town."}'
HEADER = "key,description,aliases,source"
FORMATS = {
    "json lines": f"{TOWN_JSON}\n{LAMP_JSON}\n",
    "json lines, windows": f"\ufeff{TOWN_JSON}\r\n\r\n{LAMP_JSON}",
    "array": f"[{TOWN_JSON}, {LAMP_JSON}]",
    "array, pretty": json.dumps([json.loads(TOWN_JSON), LAMP.to_json()], indent=2),
    "object with facts": json.dumps({"version": 1, "facts": [TOWN.to_json(), LAMP.to_json()]}),
    "facts, one a line": f'{{"facts": [\n{TOWN_JSON},\n{LAMP_JSON}\n]}}',
    "mapping": json.dumps({"Porto": "A harbour town.", "lamp": LAMP.to_json()}, indent=1),
    "mapping on a line": json.dumps({"Porto": "A harbour town.", "lamp": LAMP.to_json()}),
    "csv": f"{HEADER}\nPorto,A harbour town.,,\nlamp,It shines.,light|lantern,a book\n",
    "csv, windows": "\ufeffKey , Description,ALIASES,source\r\n"
    'Porto,A harbour town.\r\n\r\n"lamp","It shines.",light | lantern|,a book\r\n',
    "csv, semicolons": f"{HEADER.replace(',', ';')}\nPorto;A harbour town.\n"
    "lamp;It shines.;light|lantern;a book",
    "tsv": "description\tkey\taliases\tsource\nA harbour town.\tPorto\n"
    "It shines.\tlamp\tlight|lantern\ta book\n",
}


@pytest.mark.parametrize("data", FORMATS.values(), ids=FORMATS.keys())
def test_the_format_is_detected_from_the_content(tmp_path: Path, data: str) -> None:
    for name in ("facts.jsonl", "facts.csv", "facts"):
        assert facts_of(read(tmp_path, data, name)) == [TOWN, LAMP]


def test_rows_know_their_lines_or_numbers(tmp_path: Path) -> None:
    pretty = json.dumps([TOWN.to_json(), LAMP.to_json()], indent=1)
    assert places_of(read(tmp_path, pretty)) == ["record 1", "record 2"]
    assert places_of(read(tmp_path, f"\n{TOWN_JSON}\n\n{LAMP_JSON}")) == ["line 2", "line 4"]
    table = 'key,description\na,"one\ntwo"\n\nb,c\n'
    rows = read(tmp_path, table)
    assert places_of(rows) == ["line 2", "line 5"]
    assert rows[0].fact is not None and rows[0].fact.description == "one\ntwo"
    mapping = '{"a": "x",\n "b": "y"}'
    assert places_of(read(tmp_path, mapping)) == ["record 1", "record 2"]
    listed = json.dumps({"version": 1, "facts": [TOWN.to_json(), LAMP.to_json()]})
    assert places_of(read(tmp_path, listed)) == ["record 1", "record 2"]


def test_columns_that_are_not_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "shop.csv"
    path.write_text("term,price,lang,text,colour\nPorto,3,en,A port.,red\n", encoding="utf-8")
    (row,) = read_facts(path)
    assert row.fact is not None and row.fact.description == "A port."
    assert row.form == "CSV, term as key, text as description"
    assert row.unread == ("price", "colour")
    (row,) = read_facts(path, Reading(Columns("colour", "price")))
    assert row.form == "CSV, colour as key, price as description"
    assert set(row.unread) == {"term", "text"}


@pytest.mark.parametrize(
    ("data", "unread"),
    [
        ('{"key": "Porto", "description": "A port.", "lang": "en", "price": 3}', ("price",)),
        ("| Price | Term | Text |\n|---|---|---|\n| 3 | Porto | A port. |\n", ("price",)),
        ("q,a,lang,price\nWho?,Ada.,fr,3\n", ("price",)),
        (",key,description\n0,Porto,A port.\n", ("",)),
        ("instruction,output,history\nWho?,Ada.,\n", ()),
        ('{"subject": "Ada", "prompt": "Ada is", "target_new": "here", "case_id": 1}', ()),
    ],
)
def test_names_that_are_not_read_are_known_in_every_format(
    tmp_path: Path, data: str, unread: tuple[str, ...]
) -> None:
    (row,) = read(tmp_path, data)
    assert row.fact is not None and row.unread == unread


def test_standard_input_and_synonyms(monkeypatch: pytest.MonkeyPatch) -> None:
    data = b"subject,target\nPorto,A harbour town.\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))
    form = "CSV, subject as key, target as description"
    assert list(read_facts("-")) == [Located("standard input, line 2", TOWN, form=form)]
    assert not sys.stdin.buffer.closed


def test_other_files_of_a_folder_are_named(tmp_path: Path) -> None:
    (tmp_path / "Porto.txt").write_text("A port.", encoding="utf-8")
    (tmp_path / "facts.jsonl").write_text("{}", encoding="utf-8")
    (tmp_path / "more").mkdir()
    (row,) = read_facts(tmp_path)
    assert row.fact is not None and row.unread == ("facts.jsonl", "more")


def test_one_object_is_one_fact(tmp_path: Path) -> None:
    assert facts_of(read(tmp_path, TOWN_JSON)) == [TOWN]
    assert facts_of(read(tmp_path, json.dumps(TOWN.to_json(), indent=1))) == [TOWN]


TEXT = st.text(st.characters(blacklist_categories=("Cc", "Cs", "Zl", "Zp")), min_size=1).filter(
    lambda text: not is_blank(text)
)
NAMES = TEXT.map(str.strip).filter(lambda text: 0 < len(text) <= 50)
PLAIN = NAMES.filter(lambda text: "|" not in text)
ALIASES = NAMES.filter(lambda text: not set("|;；、") & set(text))
FACTS = st.builds(
    Fact.create,
    NAMES,
    TEXT.filter(str.strip) | st.just('two\nlines, "quoted"'),
    aliases=st.lists(ALIASES, max_size=3),
    prompts=st.lists(PLAIN, max_size=2),
    paraphrases=st.lists(PLAIN, max_size=2),
    locality=st.lists(st.builds(lambda text: LocalityProbe(prompt=text), PLAIN), max_size=2),
    source=st.none() | PLAIN,
)


@settings(max_examples=60, deadline=None)
@given(st.lists(FACTS, min_size=1, max_size=4))
def test_what_was_written_is_read_again(
    tmp_path_factory: pytest.TempPathFactory, facts: list[Fact]
) -> None:
    folder = tmp_path_factory.mktemp("f")
    documents = [fact.to_json() for fact in facts]
    texts = ["\n".join(json.dumps(d, ensure_ascii=False) for d in documents), json.dumps(documents)]
    texts += [table(facts, delimiter) for delimiter in ",\t;"]
    for text in texts:
        assert facts_of(read(folder, text)) == facts


def table(facts: list[Fact], delimiter: str) -> str:
    out = io.StringIO()
    writer = csv.writer(out, delimiter=delimiter)
    lists = ("aliases", "prompts", "paraphrases")
    writer.writerow(["key", "description", "lang", "source", "locality", *lists])
    for fact in facts:
        probes = "|".join(probe.prompt for probe in fact.locality)
        values = ["|".join(getattr(fact, name)) for name in lists]
        writer.writerow([fact.key, fact.description, fact.lang, fact.source, probes, *values])
    return out.getvalue()


# ---- data sets of the field


def test_counterfact_and_zsre_records(tmp_path: Path) -> None:
    flat = {
        "prompt": "The lamp stands in", "subject": "The lamp", "target_new": "Marrow",
        "ground_truth": "Pell", "rephrase_prompt": "Where is the lamp? In",
        "locality_prompt": "The kettle stands in", "locality_ground_truth": "Tarn",
    }  # fmt: skip
    original = {
        "requested_rewrite": {
            "prompt": "{} stands in", "subject": "The lamp", "target_new": {"str": "Marrow"},
        },
        "paraphrase_prompts": ["Where is the lamp? In"],
        "neighborhood_prompts": ["The kettle stands in"],
    }  # fmt: skip
    zsre = {
        "subject": "The lamp", "src": "The lamp stands in", "alt": "Marrow", "answers": ["Pell"],
        "rephrase": "Where is the lamp? In", "loc": "The kettle stands in", "loc_ans": "Tarn",
    }  # fmt: skip
    for record, answer in ((flat, "Tarn"), (original, None), (zsre, "Tarn")):
        rows = read(tmp_path, json.dumps(record))
        assert facts_of(rows) == [
            Fact.create(
                "The lamp: … stands in",
                "Marrow",
                relation_of="The lamp",
                prompts=["The lamp stands in"],
                paraphrases=["Where is the lamp? In"],
                locality=[LocalityProbe(prompt="The kettle stands in", answer=answer)],
            )
        ]


def test_two_relations_of_one_subject_are_two_facts(tmp_path: Path) -> None:
    prompts = ["The lamp stands in", "Who  made The lamp?", f"{'Is this ' * 40}of The lamp"]
    records = [
        {"subject": "The lamp", "prompt": one, "target_new": f"T{at}"}
        for at, one in enumerate(prompts)
    ]
    facts = facts_of(read(tmp_path, json.dumps(records)))
    assert [fact.prompts for fact in facts] == [(prompt,) for prompt in prompts]
    keys = [fact.key for fact in facts]
    assert keys[:2] == ["The lamp: … stands in", "The lamp: Who made …?"]
    assert len(keys[2]) == MAX_KEY and keys[2].startswith("The lamp: Is this Is")
    again = facts_of(read(tmp_path, json.dumps(records)))
    assert [fact.key for fact in again] == keys


# ---- a folder


def test_a_folder_of_texts(tmp_path: Path) -> None:
    (tmp_path / "夢中情爐.txt").write_text("一座會唱歌的爐子。\n", encoding="utf-8")
    (tmp_path / "cafe\u0301.MD").write_text("A place.")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "binary.txt").write_bytes(b"\x00\x01")
    (tmp_path / ".hidden.txt").write_text("no")
    (tmp_path / "picture.png").write_bytes(b"\x89")
    (tmp_path / "folder.txt").mkdir()
    rows = list(read_facts(tmp_path))
    keys = [row.fact.key for row in rows if row.fact]
    assert sorted(keys) == ["caf\u00e9", "夢中情爐"]
    problems = {Path(row.where).name: row.problem for row in rows if row.fact is None}
    assert problems["empty.txt"] == "is empty"
    assert problems["binary.txt"] is not None and "not a text file" in problems["binary.txt"]
    assert len(problems) == 2


def test_a_folder_without_texts(tmp_path: Path) -> None:
    with pytest.raises(InvalidFactError, match=r"has no \.txt or \.md files"):
        list(read_facts(tmp_path))


# ---- what is not as it should be


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"key"', "not valid JSON: Expecting ':' delimiter at column 7"),
        (b"7", "must be a JSON object"),
        (b'{"key": "k"}', '"description" is missing'),
        (b'{"key": " ", "description": "d"}', "the key is empty"),
        (b'{"key": "\xff"}', "not UTF-8: byte 0xff at offset 9"),
        (b'{"key": "\\ud800", "description": "d"}', "control character"),
        (b'{"key": "a", "description": "b", "key": "c"}', '"key" is given twice'),
        (b'{"subject": "a", "prompt": 3, "target_new": "c"}', '"prompts" must hold strings'),
    ],
)
def test_a_bad_line_is_reported_and_the_next_is_read(
    tmp_path: Path, line: bytes, problem: str
) -> None:
    good = TOWN_JSON.encode()
    for rows in (
        read(tmp_path, good + b"\n\n" + line + b"\n" + good),
        read(tmp_path, b"\n\n" + line + b"\n" + good)[-2:],
    ):
        *_, bad, last = rows
        assert bad.where.endswith("facts, line 3")
        assert bad.fact is None and bad.problem is not None and problem in bad.problem
        assert last.fact == TOWN


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (b"Porto,a town, with a harbour", "3 cells, but the first line names 2 columns"),
        (b'Porto,"a" town', "not a row of a table"),
        (b"Porto", '"description" is missing'),
        (b"Porto,\xff", "not UTF-8"),
        (b",text", '"key" is missing'),
    ],
)
def test_a_bad_row_of_a_table(tmp_path: Path, row: bytes, problem: str) -> None:
    rows = read(tmp_path, b"key,description\n" + row + b"\nlamp,It shines.\n")
    assert rows[0].where.endswith("line 2")
    assert rows[0].problem is not None and problem in rows[0].problem
    assert [row.fact.key for row in rows[1:] if row.fact] == ["lamp"]


def test_a_quote_that_is_never_closed(tmp_path: Path) -> None:
    rows = read(tmp_path, 'key,description\na,b\nPorto,"A town\nlamp,x\n')
    assert facts_of(rows)[0] is not None
    assert rows[1].where.endswith("line 3")
    assert "never closed" in (rows[1].problem or "")


def test_a_json_document_with_bad_items(tmp_path: Path) -> None:
    rows = read(tmp_path, '[\n7,\n{"key": "a", "key": "b"},\n' + TOWN_JSON + "]")
    assert [row.problem is None for row in rows] == [False, False, True]
    assert places_of(rows) == ["record 1", "record 2", "record 3"]
    assert rows[1].problem == '"key" is given twice in one object'
    rows = read(tmp_path, '{"a": "text",\n"b": 3}')
    assert rows[1].problem == '"description" must be a string, not a number'


@pytest.mark.parametrize(
    ("data", "problems"),
    [
        ('{"key": "a", "description": "b", "key": "c"}', ['"key" is given twice in one object']),
        ('{"a": {"x": 1, "x": 2}, "b": "c"}', ['"x" is given twice in one object', None]),
        ('[{"key": "a", "description": "b", "locality": [{"prompt": "p", "prompt": "q"}]}]',
         ['"prompt" is given twice in one object']),
        ('{"facts": [{"key": "a", "description": "b"}], "n": {"x": 1, "x": 2}}', [None]),
        ('{"a": "b", "a": "c"}', [None, None]),  # two records: the ingest refuses one of them
    ],
)  # fmt: skip
def test_a_name_given_twice_is_the_problem_of_its_record(
    tmp_path: Path, data: str, problems: list[str | None]
) -> None:
    for text in (data, data.replace(", ", ",\n")):
        assert [row.problem for row in read(tmp_path, text)] == problems


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is empty"),
        (b"\n \n\t\n", "is empty"),
        (b"PK\x03\x04\x00\x00", "not a text file"),
        ("key,description\n".encode("utf-16"), "UTF-16"),
        (b"Once upon a time, there was a lamp.", "in no format"),
        (b"name,age\nAda,36\n", "in no format"),
        (b"[1, 2", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"key": "a",', "not valid JSON"),
        (b'[{"key": "a" "b"}]', "line 1: not valid JSON"),
        (b'{"facts": [\n{"key": "a", "description": "b"}\n]', "line 3: not valid JSON"),
        (b'[{"key": "a", "description": "b"}] []', "line 1: not valid JSON: Extra data"),
        (b"key,description,key\na,b,c\n", "two columns are named 'key'"),
    ],
)
def test_a_file_that_cannot_be_read_at_all(tmp_path: Path, data: bytes, message: str) -> None:
    assert message in whole_file_error(tmp_path, data).message


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no file"):
        list(read_facts(tmp_path / "none"))


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=80)
    | st.text('{}[]",:\n\\ aé|0', max_size=60).map(str.encode)
    | st.binary(max_size=40).map(lambda tail: b"key,description\n" + tail)
)
def test_anything_gives_rows_or_a_plain_error(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    try:
        rows = read(tmp_path_factory.mktemp("f"), data)
    except (InvalidFactError, UsageError):
        return
    for row in rows:
        assert (row.fact is None) != (row.problem is None)
