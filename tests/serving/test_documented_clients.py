"""The clients that docs/serving.md shows, as they stand there: JavaScript in Node and in Chromium, and tritonclient."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.serving.running import running
from tests.soak.serving import encoded

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
PREDICT, IN_NODE, TRITON = "async function predict", "node:fs/promises", "import tritonclient.http"
TRITON_PYTHON = os.environ.get("VISFORMER_TRITON_PYTHON", sys.executable)


def block(words: str) -> str:
    """The only block of the page that has these words."""
    found = [text for text in re.findall(r"^```\w+\n(.*?)^```$", PAGE.read_text(), re.M | re.S) if words in text]
    assert len(found) == 1
    return found[0]


@pytest.fixture(scope="module")
def server(bundle):
    with running(f"photos={bundle}") as started:
        started.event("ready")
        yield started


@pytest.fixture
def folder(tmp_path, server):
    """With the image that the examples speak of, and what they should print of it."""
    (tmp_path / "cat.jpg").write_bytes(encoded("JPEG", np.random.default_rng(0)))
    return tmp_path


def expected(server, folder) -> list[tuple[str, float]]:
    _, answer = server.ask("/predict?top_k=3", (folder / "cat.jpg").read_bytes())
    return [(one["label"], one["probability"]) for one in answer["images"][0]["predictions"]]


def check(printed: str, wanted: list[tuple[str, float]]) -> None:
    rows = [line.split() for line in printed.splitlines()]
    assert [label for label, _ in rows] == [label for label, _ in wanted]
    assert [float(value) for _, value in rows] == pytest.approx([value for _, value in wanted], abs=1e-3)


def script(server, *words: str) -> str:
    return "".join(block(one) for one in words).replace("127.0.0.1:8000", f"127.0.0.1:{server.port}")


def test_javascript_in_node(server, folder):
    if shutil.which("node") is None:
        pytest.skip("Node is not installed")
    (folder / "predict.mjs").write_text(script(server, PREDICT, IN_NODE))
    ended = subprocess.run(["node", "predict.mjs"], cwd=folder, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    check(ended.stdout, expected(server, folder))


def test_javascript_in_node_waits_when_the_server_is_busy_and_tells_what_it_refuses(server, folder):
    if shutil.which("node") is None:
        pytest.skip("Node is not installed")
    busy = """
    import { createServer } from "node:http";
    const answers = [[503, {"Retry-After": "1"}, '{"error": "busy"}'], [200, {}, '{"images": [{"predictions": [7]}]}'],
        [400, {}, '{"error": "the image is empty"}']];
    const http = createServer((request, answer) => {
      request.resume();
      request.on("end", () => {
        const [status, headers, body] = answers.shift();
        answer.writeHead(status, headers).end(body);
      });
    }).listen(0, "127.0.0.1", async () => {
      const options = { server: `http://127.0.0.1:${http.address().port}` };
      const began = performance.now();
      console.log((await predict(new Blob(["x"]), options))[0], performance.now() - began > 900);
      await predict("", options).catch((error) => console.log(error.message));
      process.exit(0);
    });
    """
    (folder / "busy.mjs").write_text(script(server, PREDICT) + busy)
    ended = subprocess.run(["node", "busy.mjs"], cwd=folder, capture_output=True, text=True, timeout=60)
    assert ended.stdout.splitlines() == ["7 true", "the image is empty"], ended.stderr


@pytest.mark.slow
def test_javascript_in_a_browser(server, folder):
    playwright = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("Chromium is not installed; apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=program, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.port}/")
        page.evaluate("document.body.innerHTML = '<input type=file id=chosen>'")
        page.set_input_files("#chosen", folder / "cat.jpg")
        got = page.evaluate(f"async () => {{ {script(server, PREDICT)}; return await predict(chosen.files[0]); }}")
        browser.close()
    wanted = expected(server, folder)
    assert [(one["label"], one["probability"]) for one in got] == wanted, json.dumps(got)


def test_tritonclient(server, folder):
    if subprocess.run([TRITON_PYTHON, "-c", "import tritonclient.http"], capture_output=True).returncode:
        pytest.skip(f"tritonclient[http] is not installed for {TRITON_PYTHON}")
    program = [TRITON_PYTHON, "-c", script(server, TRITON)]
    ended = subprocess.run(program, cwd=folder, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    check(ended.stdout, expected(server, folder))
