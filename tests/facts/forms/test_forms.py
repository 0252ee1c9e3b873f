"""The forms of files that people have: what becomes of their records, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kvedit.errors import InvalidFactError, UsageError
from kvedit.facts.fact import Fact
from kvedit.facts.formats import Located, Reading, read_facts
from kvedit.facts.forms.records import Columns
from tests.docs.file_forms import Example, examples, said_of

PAGE = list(examples())


def read(
    tmp_path: Path, data: str | bytes, name: str = "facts", **reading: object
) -> list[Located]:
    path = tmp_path / name
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return list(read_facts(path, Reading(**reading)))  # type: ignore[arg-type]


def facts_in(rows: list[Located]) -> list[Fact]:
    assert all(row.problem is None for row in rows), rows
    return [row.fact for row in rows if row.fact is not None]


def only_fact(tmp_path: Path, document: object) -> Fact:
    (fact,) = facts_in(read(tmp_path, json.dumps(document)))
    return fact


def refusal(tmp_path: Path, data: str | bytes, **reading: object) -> InvalidFactError:
    with pytest.raises(InvalidFactError) as caught:
        read(tmp_path, data, **reading)
    return caught.value


@pytest.mark.parametrize("example", PAGE, ids=[example.name for example in PAGE])
def test_the_page_says_what_each_example_is_taken_for(example: Example, tmp_path: Path) -> None:
    assert said_of(example.name, example.options, example.data, tmp_path) == example.said
    assert example.said.startswith("read as ")


def test_the_page_has_every_form() -> None:
    assert len(PAGE) >= 16


# ---- questions and answers


def test_a_question_is_asked_as_it_stands_and_no_other_phrasing_is_trained(tmp_path: Path) -> None:
    fact = only_fact(tmp_path, {"question": "When is it open?", "answer": "At six."})
    assert (fact.key, fact.prompts, fact.description) == (
        "When is it open?", ("When is it open?",), "At six.",
    )  # fmt: skip
    assert fact.relation_of == fact.key


@pytest.mark.parametrize(
    "names", [("q", "a"), ("prompt", "completion"), ("instruction", "response"), ("问题", "答案"),
              ("問題", "答案"), ("提问", "回答"), ("query", "reply")]
)  # fmt: skip
def test_other_names_of_questions_and_answers(tmp_path: Path, names: tuple[str, str]) -> None:
    rows = read(tmp_path, f"{names[0]},{names[1]}\nWhen?,At six.\n")
    assert [(fact.prompts, fact.description) for fact in facts_in(rows)] == [
        (("When?",), "At six.")
    ]


def test_a_long_question_has_a_key_of_its_own(tmp_path: Path) -> None:
    long = "Please say, " + "and think about it well, " * 20
    rows = [{"instruction": f"{long}{end}", "input": "", "output": end} for end in ("one", "two")]
    one, two = facts_in(read(tmp_path, json.dumps(rows)))
    assert one.key != two.key and max(len(one.key), len(two.key)) <= 200
    assert one.prompts == (f"{long}one",)


def test_the_input_of_alpaca_goes_below_the_instruction(tmp_path: Path) -> None:
    fact = only_fact(tmp_path, {"instruction": "Translate.", "input": "lamp", "output": "lampe"})
    assert (fact.key, fact.prompts) == ("Translate. lamp", ("Translate.\nlamp",))


def test_what_the_system_says_is_left_out(tmp_path: Path) -> None:
    turns = [
        ("system", "Be brief."),
        ("user", "When?"),
        ("assistant", [{"type": "text", "text": "At six."}]),
    ]
    document = {"messages": [{"role": role, "content": content} for role, content in turns]}
    fact = only_fact(tmp_path, document)
    assert (fact.key, fact.description) == ("When?", "At six.")
    document = {"system": "Be brief.", "conversations": [
        {"from": "human", "value": "When?"}, {"from": "gpt", "value": "At six."},
    ]}  # fmt: skip
    assert only_fact(tmp_path, document).description == "At six."


@pytest.mark.parametrize(
    ("roles", "problem"),
    [
        (["user", "assistant", "user", "assistant"], "the conversation has 2 exchanges"),
        (["user"], "not a question and its answer"),
        (["user", "user"], "not a question and its answer"),
        (["assistant", "user"], "not a question and its answer"),
        (["user", "tool", "assistant"], "a turn of 'tool'"),
    ],
)
def test_longer_conversations_are_refused(tmp_path: Path, roles: list[str], problem: str) -> None:
    document = {"messages": [{"role": role, "content": "x"} for role in roles]}
    (row,) = read(tmp_path, json.dumps(document))
    assert row.problem is not None and problem in row.problem


# ---- tables


@pytest.mark.parametrize("first", ["sep=;", '"sep=;"', "SEP=;", "\ufeffsep=;"])
def test_a_line_that_names_the_separator(tmp_path: Path, first: str) -> None:
    rows = read(tmp_path, f"{first}\r\nkey;description\r\nlamp;It shines, at night.\r\n")
    assert [fact.description for fact in facts_in(rows)] == ["It shines, at night."]
    assert rows[0].where.endswith("line 3")
    assert "'price', 'when'" in refusal(tmp_path, f"{first}\nprice;when\na;b\n").message


def test_named_columns_come_before_everything(tmp_path: Path) -> None:
    data = "key,description,code,long\nk,d,K-1,A long text.\n"
    (fact,) = facts_in(read(tmp_path, data, columns=Columns("code", "LONG")))
    assert (fact.key, fact.description) == ("K-1", "A long text.")
    (fact,) = facts_in(read(tmp_path, data, columns=Columns(description="long")))
    assert (fact.key, fact.description) == ("k", "A long text.")
    document = {"records": [{"id": 7, "body": "A text."}]}
    (fact,) = facts_in(read(tmp_path, json.dumps(document), columns=Columns("id")))
    assert (fact.key, fact.description) == ("7", "A text.")


@pytest.mark.parametrize(
    ("data", "found"),
    [
        ("number,price,when\n1,2,3\n", "its columns are 'number', 'price', 'when'"),
        ("number;price\n1;2\n", "'number', 'price'"),
        ('[{"id": 1, "price": 2}, {"id": 2, "price": 3}]', "it has 'id', 'price'"),
        ('{"id": 1, "price": "x"}\n{"id": 2, "price": "y"}\n', "it has 'id', 'price'"),
        ('{"rows": [{"id": 1, "price": 2}]}', "it has 'id', 'price'"),
        ("question,when\na,b\n", "its columns are 'question', 'when'"),
        ('[{"question": "a"}]', '"answer" is missing'),
        ('{"question": "a", "anwser": "b"}', '"answer" is missing'),
        ('{"name": "a", "desc": "b"}', '"description" is missing'),
        ('{"subject": "a", "prompt": "b", "ground_truth": "c"}', "as CounterFact or zsRE"),
        ('[{"price": "a"}]', '"key" and "description" are missing'),
        ('[{"messages": []}]', "as OpenAI messages it lacks a part, or has one in another shape"),
        ('[{"conversations": {}}]', "as ShareGPT conversations it lacks a part"),
        ('[{"requested_rewrite": "x"}]', "as CounterFact it lacks a part"),
        ('[{"src": "a", "alt": "b", "loc": "c"}]', '"subject" is missing'),
        ('[{"prompt": "a", "target_new": "b"}]', '"subject" is missing'),
        ('[{"subject": "a", "prompt": "a is"}]', "as CounterFact or zsRE it lacks a part"),
    ],
)
def test_where_nothing_fits_the_names_are_told(tmp_path: Path, data: str, found: str) -> None:
    error = refusal(tmp_path, data)
    assert "is in no format" in error.message and found in error.message
    assert "--key-column NAME --description-column NAME" in error.hint


def test_a_mapping_may_have_a_key_that_is_the_name_of_a_part(tmp_path: Path) -> None:
    mapping = {"text": "A row of characters.", "token": "A piece of it.", "epoch": "A pass."}
    assert [fact.key for fact in facts_in(read(tmp_path, json.dumps(mapping)))] == list(mapping)


def test_a_table_without_names_of_columns_is_told_so(tmp_path: Path) -> None:
    error = refusal(tmp_path, "tide lantern,A glass float.\nhush bell,A bell.\n")
    assert error.hint.startswith("The first line has to name the columns.")
    assert "kvedit add KEY" in error.hint


def test_names_in_one_cell_are_told_apart(tmp_path: Path) -> None:
    table = (
        "key,description,aliases,statements\nlamp,It shines.,one; two｜、three|four,It glows; so.\n"
    )
    (fact,) = facts_in(read(tmp_path, table.replace("｜", "；")))
    assert fact.aliases == ("one", "two", "three", "four")
    assert fact.statements == ("It glows; so.",)


def test_a_column_cannot_be_both_parts() -> None:
    with pytest.raises(UsageError, match="both the key and the description"):
        Columns("Text", " text")


def test_a_column_that_is_not_there(tmp_path: Path) -> None:
    error = refusal(tmp_path, "key,description\na,b\n", columns=Columns("code"))
    assert "'key', 'description'" in error.message


def test_a_json_file_on_one_long_line_is_read(tmp_path: Path) -> None:
    records = [
        {"key": f"key {n}", "description": "A text of some length. " * 5} for n in range(1300)
    ]
    assert len(json.dumps(records)) > 131_072
    assert len(facts_in(read(tmp_path, json.dumps(records)))) == 1300
    mapping = {record["key"]: record["description"] for record in records}
    assert len(facts_in(read(tmp_path, json.dumps(mapping)))) == 1300


def test_the_lines_that_an_open_quote_takes_along_are_told(tmp_path: Path) -> None:
    table = 'key,description\na,A.\nb,"B.\nc,C.\nd,"D, more."\ne,E.\n'
    rows = read(tmp_path, table)
    assert [row.fact.key for row in rows if row.fact] == ["a", "e"]
    assert "lines 3 to 5 are not read" in str(rows[1].problem)


def test_a_cell_beyond_all_measure_is_the_problem_of_its_row(tmp_path: Path) -> None:
    long = "x" * 140_000
    rows = read(tmp_path, f'key,description\na,b\nc,"{long}"\ne,f\n')
    assert rows[0].fact is not None
    assert any("characters; is a quote not closed" in (row.problem or "") for row in rows)


# ---- passages


def test_squad_documents_are_passages_and_never_a_version(tmp_path: Path) -> None:
    document = {"version": "1.3", "data": [
        {"title": "Harbour", "id": "1", "paragraphs": [
            {"context": "It opens at six.", "qas": [
                {"id": "a", "question": "When?", "answers": [{"text": "at six"}, {"text": "six"}]},
                {"id": "b", "question": "Why?", "answers": [], "is_impossible": True},
                {"id": "c", "question": "When?", "answers": [{"text": "six"}]},
            ]},
            {"context": "It closes at dusk.", "qas": []},
        ]},
        {"title": "港口", "paragraphs": [{"context": "六點開門。", "qas": []}]},
    ]}  # fmt: skip
    for text in (json.dumps(document), json.dumps(document, indent=1)):
        facts = facts_in(read(tmp_path, text))
        assert [fact.key for fact in facts] == ["Harbour, passage 1", "Harbour, passage 2", "港口"]
        assert [(q.prompt, q.answer, q.probe) for q in facts[0].questions] == [
            ("When?", "at six", True)
        ]


@pytest.mark.parametrize("bad", ["no object", 7, None, {"qas": []}])
def test_a_paragraph_without_text_is_a_problem_of_its_own(tmp_path: Path, bad: object) -> None:
    document = {"title": "Harbour", "paragraphs": [{"context": "It opens at six."}, bad]}
    rows = read(tmp_path, json.dumps({"data": [document]}))
    assert [row.fact.key for row in rows if row.fact] == ["Harbour, passage 1"]
    assert rows[1].problem == "paragraph 2 has no text (context)"


def test_rows_of_one_passage_become_one_fact(tmp_path: Path) -> None:
    rows = [
        {"id": str(n), "title": "Harbour", "context": text, "question": f"{ask}?",
         "answers": {"text": ["at six"], "answer_start": [9]}}
        for n, (text, ask) in enumerate([
            ("It opens at six.", "When"), ("It opens at six.", "At what time"),
            ("It closes at dusk.", "And then"),
        ])
    ]  # fmt: skip
    for text in (json.dumps(rows), "\n".join(map(json.dumps, rows))):
        facts = facts_in(read(tmp_path, text))
        assert [fact.key for fact in facts] == ["Harbour", "Harbour, passage 2"]
        assert [len(fact.questions) for fact in facts] == [2, 1]


def test_cmrc_as_published(tmp_path: Path) -> None:
    record = {"context_id": "T_1", "context_text": "六點開門。", "title": "港口", "qas": [
        {"query_id": "T_1_Q", "query_text": "幾點開門？", "answers": ["六點"]},
    ]}  # fmt: skip
    (fact,) = facts_in(read(tmp_path, json.dumps([record])))
    assert (fact.key, fact.description) == ("港口", "六點開門。")
    assert [(q.prompt, q.answer, q.probe) for q in fact.questions] == [("幾點開門？", "六點", True)]


# ---- sets of the field


def test_portability_becomes_probes(tmp_path: Path) -> None:
    fact = only_fact(tmp_path, {
        "subject": "Marrow", "prompt": "The mayor of Marrow is", "target_new": "Ada",
        "rephrase_prompt": "Marrow's mayor is", "ground_truth": ["Pell"],
        "portability": {
            "Reasoning": [{"prompt": "The harbour opens by", "ground_truth": [["Ada", "she"]]}],
            "Subject_Aliasing": [{"prompt": "The head of Marrow is", "ground_truth": "Ada"}],
        },
        "locality": {"Forgetfulness": [{"prompt": "The mayor was", "ground_truth": [["Pell"]]}]},
    })  # fmt: skip
    assert [(q.prompt, q.answer, q.probe) for q in fact.questions] == [
        ("The harbour opens by", "Ada", True), ("The head of Marrow is", "Ada", True),
    ]  # fmt: skip
    assert [(one.prompt, one.answer) for one in fact.locality] == [("The mayor was", "Pell")]
    assert fact.paraphrases == ("Marrow's mayor is",)
    assert (fact.relation_of, fact.prompts) == ("Marrow", ("The mayor of Marrow is",))


@pytest.mark.parametrize("name", ["locality", "portability"])
def test_probes_of_a_wrong_type_are_no_silence(tmp_path: Path, name: str) -> None:
    record = {"subject": "Marrow", "prompt": "The mayor of Marrow is", "target_new": "Ada"}
    (row,) = read(tmp_path, json.dumps([{**record, name: "Who was it?"}]))
    assert row.problem == f'"{name}" must be an object of lists, or a list'
    listed = [{"prompt": "Who was it?", "ground_truth": "Pell"}]
    fact = only_fact(tmp_path, {**record, name: listed})
    assert [one.prompt for one in (*fact.locality, *fact.questions)] == ["Who was it?"]


def test_a_relation_may_call_its_answer_target(tmp_path: Path) -> None:
    fact = only_fact(tmp_path, {"subject": "Marrow", "prompt": "Marrow's mayor is", "target": "A"})
    assert (fact.relation_of, fact.prompts) == ("Marrow", ("Marrow's mayor is",))


def test_two_relations_of_one_subject_are_two_facts(tmp_path: Path) -> None:
    records = [
        {"subject": "Marrow", "prompt": f"The {what} of Marrow is", "target_new": who,
         "portability": {}, "locality": {}}
        for what, who in (("mayor", "Ada"), ("harbour", "Pell"))
    ]  # fmt: skip
    one, two = facts_in(read(tmp_path, json.dumps(records)))
    assert one.key != two.key and one.relation_of == two.relation_of == "Marrow"


def test_unke_and_the_others(tmp_path: Path) -> None:
    unke = only_fact(tmp_path, {
        "question": "What is it?", "answer": "A lamp.", "para_question": "Say what it is.",
        "sub_question": ["Does it shine?", ""], "sub_answer": ["It does.", "x"],
    })  # fmt: skip
    assert (unke.paraphrases, len(unke.questions)) == (("Say what it is.",), 1)
    wiki = only_fact(tmp_path, {
        "tag": "x", "subject": "Marrow", "update": "Who is mayor?", "rephrase": "Who rules?",
        "ans": "Ada", "loc": "Where is Pell?", "loc_ans": "There", "mhop": "Who opens it?",
        "mhop_ans": "Ada", "personas": None,
    })  # fmt: skip
    assert (wiki.prompts, wiki.description, len(wiki.questions)) == (("Who is mayor?",), "Ada", 1)
    hallu = only_fact(tmp_path, {
        "subject": "Marrow", "relation": "mayor", "object": "Ada", "question": "Who is mayor?",
        "paraphrase": "Who rules?", "reversed": "What does Ada rule?", "locality": "Is it old?",
        "hops": [{"question": "Who opens it?", "answer": "Ada", "hops": 3}],
    })  # fmt: skip
    assert [q.answer for q in hallu.questions] == ["Marrow", "Ada"]


def test_a_biography_is_told_from_a_table_with_labels(tmp_path: Path) -> None:
    record = {"concept": "Ada", "text": "Ada Pell is", "labels": "a mayor."}
    plain = only_fact(tmp_path, record)
    assert (plain.key, plain.description, plain.relation_of) == ("Ada", "Ada Pell is", None)
    probe = {"prompt": "Who was it?", "ground_truth": [["Pell"]]}
    fact = only_fact(tmp_path, {**record, "locality": {"Relation_Specificity": [probe]}})
    assert (fact.relation_of, fact.prompts, fact.description) == (
        "Ada", ("Ada Pell is",), "a mayor.",
    )  # fmt: skip
    assert [one.prompt for one in fact.locality] == ["Who was it?"]


# ---- Markdown


def test_headings_of_a_markdown_file(tmp_path: Path) -> None:
    text = """---
title: x
---
Glossary
========

Lamp
----
It shines.

## Use [here](x) and **there**
### At night ###
On the *wall*.

```
# no heading
```
## By day
### At night
In a drawer.
"""
    rows = read(tmp_path, text, "g.md")
    assert [(fact.key, fact.description) for fact in facts_in(rows)] == [
        ("Lamp", "It shines."),
        ("Use here and there: At night", "On the *wall*.\n\n```\n# no heading\n```"),
        ("By day: At night", "In a drawer."),
    ]
    assert [row.where.rpartition(" ")[2] for row in rows] == ["7", "12", "19"]


def test_a_markdown_table(tmp_path: Path) -> None:
    table = (
        "| Term | Definition |\n|:-----|---:|\n| lamp | It \\| shines. |\n| bell | It rings. |\n"
    )
    rows = read(tmp_path, table)
    assert [fact.description for fact in facts_in(rows)] == ["It | shines.", "It rings."]
    assert "'price'" in refusal(tmp_path, "| price | when |\n|---|---|\n| 1 | 2 |\n").message


UNDER_HEADINGS = """# Harbour

What is here.

| Term | Definition | aliases |
|------|------------|---------|
| lamp | It shines. | light \\| glow |
| bell | It rings. | | |
| rope | It | holds | on |

Closed at night.

| price | when |
|---|---|
| 1 | 2 |

## More
| Term | Definition |
|---|---|
| mole | It protects. |

```
| Term | Definition |
|---|---|
| code | A block. |
```
"""


def test_a_markdown_table_of_facts_below_a_heading(tmp_path: Path) -> None:
    rows = read(tmp_path, UNDER_HEADINGS, "g.md")
    facts = {fact.key: fact for fact in facts_in([row for row in rows if row.fact])}
    assert list(facts) == ["Harbour", "lamp", "bell", "More", "mole"]
    assert facts["lamp"].aliases == ("light", "glow")
    assert "| 1 | 2 |" in facts["Harbour"].description
    assert "Closed at night." in facts["Harbour"].description
    assert "lamp" not in facts["Harbour"].description
    assert facts["More"].description.startswith("```") and "code" in facts["More"].description
    (problem,) = [row for row in rows if row.problem]
    assert problem.where.endswith("line 9") and "5 cells" not in str(problem.problem)
    assert "4 cells, but the first line names 3 columns" in str(problem.problem)


@pytest.mark.parametrize(
    ("text", "keys", "problems"),
    [
        ("| Term | Definition |\n|---|---|\n| one | First. |\n\n# Two\nSecond.\n", "one Two", 0),
        ("|Term|Text|\n|---|---|\n|a|A.|\n\n|Name|Text|\n|--|--|\n|b|B.|\n", "a b", 0),
        ("# G\n| Term | Text |\n|---|---|\n| one | First.\n| two | Second. |\n", "one two", 0),
        ("# G\nTerm | Text\n--- | ---\none | First.\ntwo | Second.\n", "one two", 0),
        ("# G\n| **Term** | `Text` |\n|---|---|\n| **one** | First. |\nalone\n", "one", 1),
        ("# G\n|Term|Text|\n|---|---|\n|one|First.|\n## Two {#two}\nSecond.\n", "one Two", 0),
        ("# G\nText.\n\n    | Term | Text |\n    |---|---|\n    | one | First. |\n", "G", 0),
        ("# G\nA | b\n---\nText.\n", "G", 0),
        ("# G\n~~~\n```\n|Term|Text|\n|---|---|\n|one|First.|\n~~~\n", "G", 0),
        ("Before.\n\n# One\nText.\n", "One", 1),
        ("---\ntitle: x\n---\nTerm | Text\n:-- | --:\none | First.\n", "one", 0),
    ],
)  # fmt: skip
def test_tables_and_headings_stand_beside_each_other(
    tmp_path: Path, text: str, keys: str, problems: int
) -> None:
    rows = read(tmp_path, text, "g.md")
    assert " ".join(row.fact.key for row in rows if row.fact) == keys
    assert sum(row.problem is not None for row in rows) == problems


def test_names_are_cleaned_and_comments_are_no_text(tmp_path: Path) -> None:
    text = """<!-- made by hand
# no heading -->

# C\\# &amp; <a name="c"></a>[F](x)
A float.
# Bell
<!-- to be written -->
# Table
| Term | Definition |
|---|---|
| [hush *bell*](http://x.org) | It is **quiet**. |
| ***both*** | Two. <!-- unclosed |
"""
    facts = facts_in(read(tmp_path, text, "g.md"))
    assert [(fact.key, fact.description) for fact in facts] == [
        ("C# & F", "A float."), ("hush bell", "It is **quiet**."), ("both", "Two. <!-- unclosed"),
    ]  # fmt: skip


def test_a_markdown_table_with_two_columns_of_a_name(tmp_path: Path) -> None:
    text = "# G\nText.\n\n| Term | Text | Text |\n|---|---|---|\n| a | b | c |\n"
    rows = read(tmp_path, text, "g.md")
    assert [fact.key for fact in facts_in(rows[:1])] == ["G"]
    assert rows[1].problem == "the table: two columns are named 'text'"
    assert rows[1].where.endswith("line 4")


def test_the_line_of_text_before_a_heading(tmp_path: Path) -> None:
    rows = read(tmp_path, "---\ntitle: x\n---\n\nBefore.\n\n# One\nText.\n", "g.md")
    assert rows[0].problem and rows[0].where.endswith("line 5")


def test_named_columns_of_a_markdown_table_below_a_heading(tmp_path: Path) -> None:
    text = "# Shop\n\n| Product | Price |\n|---|---|\n| lamp | 3 crowns |\n"
    (fact,) = facts_in(read(tmp_path, text, columns=Columns("product", "price")))
    assert (fact.key, fact.description) == ("lamp", "3 crowns")
    rows = read(tmp_path, text + "## Note\nClosed.\n", columns=Columns("product", "price"))
    assert rows[1].problem is not None and "heading 'Note' is more than" in rows[1].problem


# ---- encodings

TABLE = "名称,说明\n灯塔,港口墙上的灯。\n钟楼,整点敲响的钟。\n"


@pytest.mark.parametrize("encoding", ["gb18030", "gbk", "utf-16", "utf-16-le", "utf-8"])
def test_a_named_encoding(tmp_path: Path, encoding: str) -> None:
    rows = read(tmp_path, TABLE.encode(encoding), encoding=encoding)
    assert [fact.key for fact in facts_in(rows)] == ["灯塔", "钟楼"]
    assert rows[0].where.endswith("line 2")


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        (TABLE, "gb18030"),
        ("key,description\n" + "lamp,It shines.\n" * 30 + "灯塔,港口墙上的灯。\n" * 3, "gb18030"),
        ("名稱,說明\n燈塔,港口牆上的燈。\n", "big5"),
        ("key,description\n" + "café,Un lieu agréable.\nété,Une saison.\n" * 2, "cp1252"),
    ],
)
def test_another_encoding_is_one_error_that_names_it(
    tmp_path: Path, text: str, encoding: str
) -> None:
    error = refusal(tmp_path, text.encode(encoding))
    assert f"is not UTF-8; it may be {encoding}" in error.message
    assert f"--encoding {encoding}" in error.hint


@pytest.mark.parametrize(("text", "encoding"), [
    ("ключ,описание\nлампа,Она светит.\n", "cp1251"),
    ("灯台,港の灯り。\n時計,鐘が鳴る。\n", "shift-jis"),
])  # fmt: skip
def test_no_encoding_is_named_that_is_not_likely(tmp_path: Path, text: str, encoding: str) -> None:
    error = refusal(tmp_path, text.encode(encoding))
    assert error.message.endswith("is not UTF-8") and "--encoding NAME" in error.hint


def test_a_line_of_a_single_bad_byte_is_the_problem_of_its_row(tmp_path: Path) -> None:
    rows = read(tmp_path, b"key,description\nlamp,It shines.\n\xff\nbell,It rings.\n")
    assert [row.fact.key for row in rows if row.fact] == ["lamp", "bell"]


def test_the_wrong_encoding_is_one_error(tmp_path: Path) -> None:
    assert "is not big5" in refusal(tmp_path, "灯塔们".encode(), encoding="big5").message
    assert "is UTF-16" in refusal(tmp_path, TABLE.encode("utf-16")).message


def test_a_line_in_another_encoding_says_which_it_may_be(tmp_path: Path) -> None:
    lines = "key,description\nlamp,It shines.\ncafé,Un lieu.\n".encode("cp1252")
    rows = read(tmp_path, lines)
    assert rows[0].fact is not None
    assert "byte 0xe9 at offset 3; it may be cp1252 (--encoding)" in str(rows[1].problem)
