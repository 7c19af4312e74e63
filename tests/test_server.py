"""llama-server with the elastic cache: every answer is a fresh server's, and nothing aborts."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from elastic_llama.scenes.layout import make_scene
from elastic_llama.scenes.render import render
from PIL import Image

from tests.support.server import Server, binary, data_uri, n_read, said, text_of, user

pytestmark = [pytest.mark.model, pytest.mark.slow]

N_IMAGE = 576
SCENES = [data_uri(render(make_scene("dev", i, 3))) for i in (0, 2)]
WHAT, WHERE = "What is in row 3?", "What is in row 1, column 1?"
FACTS = "The red house stands by the sea. The blue boat has left the harbour. " * 8
MORE = shlex.split(os.environ.get("ELASTIC_TEST_SERVER", ""))  # options, for a run by hand


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    binary()
    folder = tmp_path_factory.mktemp("server")
    running = Server(folder, "--slots", "--slot-save-path", str(folder), *MORE).wait()
    yield running
    assert running.stop() == 0


@pytest.fixture
def fresh(server: Server) -> Server:
    server.erase()
    return server


def test_turns_about_an_image(fresh: Server) -> None:
    first = fresh.chat(user(WHAT, SCENES[0]), id_slot=0)
    answer = text_of(first)
    assert n_read(first) > N_IMAGE
    turn = [user(WHAT, SCENES[0]), said(answer), user(WHERE)]
    second = fresh.chat(*turn, id_slot=0)
    assert n_read(second) < 40

    again = fresh.chat(user(WHAT, SCENES[0]), id_slot=0)  # what aborted llama-server
    assert text_of(again) == answer
    assert n_read(again) == 0
    back = fresh.chat(*turn, id_slot=0)
    assert text_of(back) == text_of(second)
    assert n_read(back) < 40

    other = fresh.chat(user(WHERE, SCENES[0]), id_slot=0)  # starts behind the image
    assert n_read(other) < 40
    different = fresh.chat(user(WHAT, SCENES[1]), id_slot=0)  # as large, and another
    assert n_read(different) > N_IMAGE
    assert len({answer, text_of(different), text_of(other)}) == 3

    fresh.erase()
    alone = fresh.chat(user(WHERE, SCENES[0]), id_slot=0)
    assert n_read(alone) > N_IMAGE
    assert text_of(alone) == text_of(other)
    fresh.erase()
    assert text_of(fresh.chat(user(WHAT, SCENES[1]), id_slot=0)) == text_of(different)


def test_an_edited_history(fresh: Server) -> None:
    question = user(FACTS + "What stands by the sea?")
    answer = text_of(fresh.chat(question, id_slot=1))
    fresh.chat(question, said(answer), user("And what has left?"), id_slot=1)
    edited = [question, said(answer), user("Which colour is the boat?")]
    out = fresh.chat(*edited, id_slot=1)
    changed = [user(FACTS + "What has left the harbour?")]
    other = fresh.chat(*changed, id_slot=1)

    fresh.erase()
    assert text_of(fresh.chat(question, id_slot=1)) == answer
    assert text_of(fresh.chat(*edited, id_slot=1)) == text_of(out)
    fresh.erase()
    assert text_of(fresh.chat(*changed, id_slot=1)) == text_of(other)


def test_one_token_again_and_again(fresh: Server) -> None:
    question = user(FACTS + "What stands by the sea?")
    answers = [fresh.chat(question, n=1, id_slot=2) for _ in range(6)]  # no batch of their own
    assert len({text_of(out) for out in answers}) == 1
    assert [n_read(out) for out in answers[1:]] == [0] * 5
    two = fresh.chat(question, n=8, n_cmpl=2)
    alone = fresh.chat(question, n=8)
    assert {choice["message"]["content"] for choice in two["choices"]} == {text_of(alone)}


def test_probabilities_of_a_prompt_again(fresh: Server) -> None:
    question = user(FACTS + "What stands by the sea?")
    options = {"n": 4, "id_slot": 2, "logprobs": True, "top_logprobs": 3}
    first, again = (fresh.chat(question, **options) for _ in range(2))
    assert n_read(again) == 0
    assert first["choices"][0]["logprobs"] == again["choices"][0]["logprobs"]


def test_a_stream_and_who_hangs_up(fresh: Server) -> None:
    question = user(WHAT, SCENES[0])
    pieces = [
        e["choices"][0]["delta"].get("content") or ""
        for e in fresh.stream(question)
        if e["choices"]
    ]
    assert "".join(pieces) == text_of(fresh.chat(question))
    assert len(pieces) > 4

    events = fresh.stream(user(FACTS), n=1500, ignore_eos=True)
    next(events)
    events.close()
    end = time.monotonic() + 20
    while any(slot["is_processing"] for slot in fresh.get("/slots")[1]):
        assert time.monotonic() < end, "a slot goes on for nobody"
        time.sleep(0.05)


MALFORMED = [
    b"{",
    {},
    {"messages": "hello"},
    {"messages": [{"role": "user"}]},
    {"messages": [user("?", "data:image/png;base64,AAAA")]},
    {"messages": [user("?", "data:image/png;base64,")]},
    {"messages": [user("?", "http://127.0.0.1/x.png")]},
    {"messages": [user("?", "file:///etc/passwd")]},
    {"messages": [user("?", *["data:image/png;base64,AAAA"] * 17)]},
    {"messages": [{"role": "user", "content": [{"type": "picture"}]}]},
    {"messages": [user("?")], "max_tokens": "many"},
    {"messages": [user("?")], "temperature": "warm"},
    {"messages": [user("word " * 4000)]},
    {
        "messages": [user("?")],
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "odd"}}},
    },
]


@pytest.mark.parametrize("body", MALFORMED, ids=range(len(MALFORMED)))
def test_malformed_requests(server: Server, body: object) -> None:
    status, out = server.post("/v1/chat/completions", body)
    assert 400 <= status < 500, out
    assert out["error"]["message"]


def test_a_prompt_that_ends_with_an_image(fresh: Server) -> None:
    marker = fresh.get("/props")[1]["media_marker"]
    prompt = {"prompt_string": marker, "multimodal_data": [SCENES[0].split(",")[1]]}
    status, out = fresh.post("/completion", {"prompt": prompt, "n_predict": 4, "temperature": 0})
    assert status == 400
    assert "ends with an image" in out["error"]["message"]
    assert fresh.get("/health")[0] == 200


def test_eight_clients_at_four_slots(fresh: Server) -> None:
    openai = pytest.importorskip("openai")
    questions = [
        [user(WHAT, SCENES[0])],
        [user(WHERE, SCENES[1])],
        [user(FACTS + "What stands by the sea?")],
        [user(FACTS + "What has left the harbour?")],
    ] * 2
    alone = [text_of(fresh.chat(*messages, id_slot=i)) for i, messages in enumerate(questions[:4])]
    fresh.erase()
    answers: dict[int, str] = {}

    def ask(i: int) -> None:
        client = openai.OpenAI(
            base_url=f"http://127.0.0.1:{fresh.port}/v1", api_key="none", max_retries=0
        )
        out = client.chat.completions.create(
            model="embedded", messages=questions[i], max_tokens=16, temperature=0
        )
        answers[i] = out.choices[0].message.content

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [answers[i] for i in range(8)] == alone * 2


def test_slots_are_saved_and_restored(fresh: Server) -> None:
    question = [user(WHAT, SCENES[0])]
    answer = text_of(fresh.chat(*question, id_slot=0))
    turn = [*question, said(answer), user(WHERE)]
    assert fresh.post("/slots/0?action=save", {"filename": "slot.bin"})[0] == 200
    went_on = text_of(fresh.chat(*turn, id_slot=0))
    fresh.erase()
    status, out = fresh.post("/slots/3?action=restore", {"filename": "slot.bin"})
    assert status == 200, out
    second = fresh.chat(*turn, id_slot=3)
    assert n_read(second) < 40
    assert text_of(second) == went_on
    again = fresh.chat(*question, id_slot=3)
    assert text_of(again) == answer
    assert fresh.post("/slots/3?action=restore", {"filename": "none.bin"})[0] == 400


def test_what_is_counted(fresh: Server) -> None:
    before = fresh.metric("kv_compressions_total")
    fresh.chat(user(FACTS + "What stands by the sea?"), id_slot=0)
    assert fresh.metric("kv_compressions_total") == before + 1
    assert 0 < fresh.metric("kv_cells") < 0.5 * fresh.metric("kv_tokens")


def test_the_page(server: Server) -> None:
    status, page = server.get("/")
    assert status == 200
    assert "elastic-llama" in page
    assert server.get("/page.js")[0] == 200


def test_a_start_that_is_refused(tmp_path: Path) -> None:
    binary()
    for options, reason in (
        (("--kv-budget", "none"), "--kv-budget: got 'none'"),
        (("--kv-policy", "nobody"), "nobody"),
        (("--spec-type", "ngram-simple"), "speculative decoding"),
        (("-fa", "off"), "flash attention"),
    ):
        refused = Server(tmp_path, *options)
        assert refused.process.wait(60) == 1
        assert reason in refused.log.read_text()


def test_media_of_elsewhere_and_ctrl_c(tmp_path: Path) -> None:
    binary()
    large = data_uri(Image.new("1", (2000, 1000)))
    running = Server(tmp_path, "--remote-media", "--media-max-mpixels", "1").wait()
    for url, reason in (
        ("http://127.0.0.1:1/x.png", "private address"),
        ("http://localhost:1/x.png", "private address"),
        ("http://[::1]:1/x.png", "private address"),
        ("http://10.1.2.3/x.png", "private address"),
        ("http://[::ffff:10.1.2.3]/x.png", "private address"),
        ("http://169.254.169.254/latest/meta-data", "private address"),
        ("http://192.168.0.1/x.png", "private address"),
        (large, "2000 x 1000 pixels"),
    ):
        status, out = running.post("/v1/chat/completions", {"messages": [user("?", url)]})
        assert status == 400
        assert reason in out["error"]["message"]
    running.process.send_signal(signal.SIGINT)
    assert running.process.wait(30) == 0


@pytest.mark.parametrize("name", ["openai_client", "langchain_client"])
def test_examples(server: Server, name: str) -> None:
    pytest.importorskip({"openai_client": "openai", "langchain_client": "langchain_openai"}[name])
    from elastic_llama.embedded import demo_image

    script = Path(__file__).parents[1] / "examples" / f"{name}.py"
    command = [sys.executable, script, demo_image(), "--url", f"http://127.0.0.1:{server.port}/v1"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    said_by = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert all(said_by.values())
    assert set(said_by) == {"picture", "stream", "json"} - (
        {"json"} if name != "openai_client" else set()
    )


def test_the_page_in_a_browser(fresh: Server, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no chromium")
    from elastic_llama.embedded import demo_image

    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 800, "height": 900})
        failures: list[str] = []
        page.on("pageerror", lambda e: failures.append(str(e)))
        page.goto(f"http://127.0.0.1:{fresh.port}/")
        page.set_input_files("#file", str(demo_image()))
        for question in (WHAT, WHERE):
            page.fill("#question", question)
            page.click("#send")
            page.wait_for_selector("#stop[hidden]", state="attached", timeout=120_000)
            page.wait_for_selector(".turn:last-child .note", timeout=120_000)
        answers = page.locator(".answer").all_inner_texts()
        notes = page.locator(".note").all_inner_texts()
        page.wait_for_function("document.getElementById('kept').textContent.includes('cells kept')")
        page.screenshot(path=str(tmp_path / "page.png"))
        browser.close()
    assert failures == []
    assert len(answers) == 2
    assert all(answers)
    assert int(notes[0].split()[0]) > N_IMAGE
    assert int(notes[1].split()[0]) < 40
    assert (tmp_path / "page.png").stat().st_size > 10_000


def test_text_alone(tmp_path: Path) -> None:
    """Unified cells, idle slots in RAM, chunks to be moved, an answer beyond the context."""
    binary()
    options = ["--no-mmproj", "-np", "2", "-kvu", "-c", "1024", "--slots", "--context-shift"]
    options += ["--cache-reuse", "8", "--slot-save-path", str(tmp_path)]
    running = Server(tmp_path, *options).wait()
    questions = [user(f"{name} is in the garden. " + FACTS + "Where is it?") for name in "ABC"]

    def complete(prompt: str, n: int) -> str:
        body = {"prompt": prompt, "n_predict": n, "temperature": 0, "ignore_eos": True}
        status, out = running.post("/completion", {**body, "n_cache_reuse": 8})
        assert status == 200, out
        return str(out["content"])

    answers = [running.chat(q) for q in questions]  # of three conversations two have a slot
    again = [running.chat(q) for q in questions]
    assert list(map(text_of, again)) == list(map(text_of, answers))
    complete("Once upon a time. " + FACTS, 8)
    moved = complete(FACTS, 8)  # would be what is stored, at other positions
    assert len(complete(FACTS, 1200)) > 1000

    running.erase()
    assert complete(FACTS, 8) == moved
    assert running.stop() == 0


def test_the_other_tools(tiny_gqa: Path, embedded_model: Path, embedded_mmproj: Path) -> None:
    from elastic_llama.embedded import demo_image

    def run(name: str, *arguments: object) -> str:
        command = [binary().parent / name, "-t", "1", "--kv-budget", "0.2", *arguments]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            list(map(str, command)), env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert "elastic KV cache: policy elastic, budget 0.2" in done.stdout + done.stderr
        return done.stdout

    bench = run("llama-batched-bench", "-m", tiny_gqa, *"-c 512 -npp 128 -ntg 4 -npl 1,2".split())
    assert "|   128 |      4 |    1 |" in bench  # its log may lose the last line
    image = ["--mmproj", embedded_mmproj, "--image", demo_image(), "--chat-template", "chatml"]
    question = ["-p", "What is in row 1, column 2?", "--temp", "0", "-n", "8", "-c", "1024"]
    assert "red square" in run("llama-mtmd-cli", "-m", embedded_model, *image, *question)
