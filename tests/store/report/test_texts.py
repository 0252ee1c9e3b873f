"""No path of the machine stays in a text that is sent to others; other words stay."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvedit.store.report.texts import clipped, folder_name, model_name, without_paths

FOLDERS = st.lists(
    st.from_regex(r"[\w]([\w .+@#=-]*[\w])?", fullmatch=True), min_size=1, max_size=5, unique=True
)
FILE = st.from_regex(r"[a-z]{1,8}(\.[a-z]{1,4})?", fullmatch=True)


@given(FOLDERS, FILE, st.sampled_from(("/", "~/", "file:///", "C:\\", "\\\\")))
def test_a_path_in_a_sentence_is_its_last_name(folders: list[str], file: str, root: str) -> None:
    path = root + ("\\" if "\\" in root else "/").join([*folders, file])
    for before, after in (("no room at ", ": try again"), ("'", "' is no model"), ("(", ")")):
        assert without_paths(f"{before}{path}{after}") == f"{before}{file}{after}"


@pytest.mark.parametrize(
    "text",
    [
        "recall 3/8 and/or 2 / 4 of them, 5 km/h",
        "see https://example.org/a/b/c.html and http://localhost:8080/v1/chat",
        "the model some-org/model-1.5 is not there",
        "夢中/情爐 regressed; 100% [9.5, 90.5]",
    ],
)
def test_what_is_no_path_stays(text: str) -> None:
    assert without_paths(text) == text


def test_known_folders_with_signs_in_their_names_are_taken_as_a_whole() -> None:
    known = ["/data/Jane's (old): things/kb"]
    text = f"the delta {known[0]}/deltas/x.bin is missing; the store is {known[0]}"
    assert without_paths(text, known) == "the delta x.bin is missing; the store is kb"
    assert without_paths(f"no {Path.home()}/x") == "no x"


def test_folders_and_models_are_called_by_their_last_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert folder_name(".") == tmp_path.name and folder_name("a/b/") == "b"
    given_names = ("kvedit-tiny", "some-org/model-1.5", "/a/b c", "~/m/", "D:\\x\\y", "../m")
    names = [model_name(name) for name in given_names]
    assert names == ["kvedit-tiny", "some-org/model-1.5", "b c", "m", "y", "m"]


@given(st.text(), st.integers(1, 20))
def test_a_cut_text_is_a_beginning_and_says_so(text: str, length: int) -> None:
    cut = clipped(text, length)
    assert len(cut) <= length
    assert cut == text if len(text) <= length else text.startswith(cut[:-1]) and cut[-1] == "…"
