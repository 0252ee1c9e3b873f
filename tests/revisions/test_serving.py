"""The guide docs/guides/export.md, done: `transformers serve` answers with the edited knowledge."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from small_model import FREE

from kvedit import KnowledgeBase

START = "from transformers.cli.transformers import main; main()"
SECONDS = 120
GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guides" / "export.md"


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def served(folder: Path, log: Path) -> Iterator[str]:
    """The address of a server for a folder, ready to answer."""
    port = free_port()
    words = [sys.executable, "-c", START, "serve", str(folder), "--port", str(port)]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    with (
        log.open("wb") as stream,
        subprocess.Popen(words, stdout=stream, stderr=stream, env=offline) as server,
    ):
        try:
            wait_for(server, f"http://localhost:{port}/health", log)
            yield f"http://localhost:{port}"
        finally:
            server.kill()


def wait_for(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")


def ask(address: str, model: str, question: str) -> str | None:
    """As any program would that speaks to OpenAI."""
    from openai import OpenAI

    with OpenAI(base_url=f"{address}/v1", api_key="none", timeout=SECONDS, max_retries=0) as client:
        answer = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": question}],
            temperature=0,
            max_tokens=40,
        )
    return answer.choices[0].message.content


def recipe(address: str, model: str) -> dict[str, object]:
    """What the guide's block "Recite, then answer" leaves behind, run against a server."""
    blocks = re.findall(r"^```python no-run\n(.*?)^```$", GUIDE.read_text("utf-8"), re.M | re.S)
    (code,) = (block for block in blocks if "NameIndex" in block)
    for here, there in (("http://localhost:8000", address), ("./my-model", model)):
        assert here in code
        code = code.replace(here, there)
    names: dict[str, object] = {}
    exec(compile(code, str(GUIDE), "exec"), names)  # the point: the example as a reader runs it
    return names


def test_the_served_export_answers_with_the_edits(trained_store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with KnowledgeBase.open(trained_store) as knowledge:
        assert knowledge.export(folder).mismatches == ()
        before = [knowledge.ask_base(f"What is {key}?") for key, _ in FREE[:3]]
        recalled = knowledge.ask("Where does the tide lantern hang?", recall="model")
    with served(folder, tmp_path / "log") as address:
        said = [ask(address, str(folder), f"What is {key}?") for key, _ in FREE[:3]]
        names = recipe(address, str(folder))
    wanted = [description for _, description in FREE[:3]]
    assert said == wanted
    assert not set(before) & set(wanted)  # the base model knew none of them
    assert names["recited"] == [wanted[0]]
    assert names["answer"] == recalled
