"""The guide docs/guides/export.md, done: `transformers serve` answers with the edited knowledge."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from small_model import FREE

from kvedit import KnowledgeBase

NEEDED = ("fastapi", "uvicorn", "openai")
MISSING = [name for name in NEEDED if find_spec(name) is None]
START = "from transformers.cli.transformers import main; main()"
SECONDS = 120


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def served(folder: Path, log: Path) -> Iterator[str]:
    """The address of a server for a folder, ready to answer."""
    port = free_port()
    words = [sys.executable, "-c", START, "serve", str(folder), "--port", str(port)]
    with log.open("wb") as stream, subprocess.Popen(words, stdout=stream, stderr=stream) as server:
        try:
            wait_for(server, f"http://localhost:{port}/health", log)
            yield f"http://localhost:{port}"
        finally:
            server.terminate()


def wait_for(server: subprocess.Popen[bytes], address: str, log: Path) -> None:
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    pytest.fail(f"the server did not start:\n{log.read_text(errors='replace')[-3000:]}")


def ask(address: str, model: str, question: str) -> str:
    body = {
        "model": model,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 40,
    }
    request = urllib.request.Request(
        f"{address}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        document: Any = json.load(answer)
    said: str = document["choices"][0]["message"]["content"]
    return said


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"transformers serve needs {', '.join(MISSING)}")
def test_the_served_export_answers_with_the_edits(taught_store: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    with KnowledgeBase.open(taught_store) as knowledge:
        assert knowledge.export(folder).mismatches == ()
        before = [knowledge.ask_before(f"What is {key}?") for key, _ in FREE[:3]]
    with served(folder, tmp_path / "log") as address:
        said = [ask(address, str(folder), f"What is {key}?") for key, _ in FREE[:3]]
    assert said == [description for _, description in FREE[:3]]
    assert said != before
