"""The command line as people type it."""

from __future__ import annotations

import argparse
import subprocess
import sys

import pytest
from elastic_llama.cli import options
from PIL import Image

from tests.support.command_line import run_here


def run(*args, stdin: str = "", **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "elastic_llama", *map(str, args)],
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        **kwargs,
    )


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    path = tmp_path_factory.mktemp("images") / "red square.png"
    Image.new("RGB", (40, 40), "red").save(path)
    return path


@pytest.fixture
def model(tiny_vlm):
    return ["-m", tiny_vlm[0], "--mmproj", tiny_vlm[1], "-t", "1", "-c", "512"]


QUESTION = "the heat on the earth " * 8


def table(out: str) -> list[list[str]]:
    lines = out.strip().splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("KV cache"))
    return [line.split() for line in lines[head + 1 :]]


def test_describe(model, image):
    done = run("describe", image, *model, "-p", QUESTION, "-n", 8)
    assert (done.returncode, done.stderr) == (0, "")
    (row,) = table(done.stdout)
    assert row[:2] == ["elastic", "0.2"]
    assert 0 < int(row[3]) < int(row[2])


def test_describe_compare_and_options(model, image):
    done = run(
        "describe",
        image,
        *model,
        "-p",
        QUESTION,
        "-n",
        4,
        "--compare",
        "--policy",
        "elastic-paper",
        "--kv-budget",
        "0.5",
        "--min-cells",
        8,
        "-fa",
        "on",
        "-ctk",
        "q8_0",
        "-ctv",
        "q8_0",
        "--temp",
        "0.5",
        "-s",
        7,
    )
    assert (done.returncode, done.stderr) == (0, "")
    full, ours = table(done.stdout)
    assert full[:1] == ["full"]
    assert full[1] == full[2]
    assert ours[:2] == ["elastic-paper", "0.5"]
    assert int(ours[3]) == -(-int(ours[2]) // 2)


def test_same_seed_same_answer(model, image, capfd):
    args = ("describe", image, *model, "-p", QUESTION, "-n", 8, "--temp", "1")
    said = [run_here(capfd, *args, "-s", s).stdout.split("KV cache")[0] for s in (7, 7, 8)]
    assert said[0] == said[1] != ""
    assert said[0] != said[2]


def test_demo(model, image):
    done = run("demo", *model, "--image", image, "-p", QUESTION, "-n", 4)
    assert (done.returncode, done.stderr) == (0, "")
    assert [row[0] for row in table(done.stdout)] == ["full", "elastic"]


def test_chat(model, image):
    stdin = f"/image '{image}' \"{image}\"\n/clear\n/image {image}\n{QUESTION}\nthe\n/stats\n"
    stdin += "/image no.png\n/bogus\n/clear\nthe\n/quit\n"
    done = run("chat", *model, "-n", 4, stdin=stdin)
    assert done.returncode == 0
    assert "(2 images ready)" in done.stdout
    assert done.stdout.count("tokens/s)") == 3
    assert "compressions" in done.stdout
    assert "no.png" in done.stderr


def test_chat_ends_with_its_input(model):
    done = run("chat", *model, stdin="")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("name", ["--probe", "--lookahead"])
def test_the_probe_has_an_old_name_too(name, capsys):
    parser = argparse.ArgumentParser()
    options.add_elastic_options(parser)
    options.add_answer_options(parser)
    assert options.elastic_config(parser.parse_args([name, "3"])).probe == 3
    assert options.elastic_config(parser.parse_args([])).probe is None
    with pytest.raises(SystemExit):
        parser.parse_args(["--help"])
    help_text = capsys.readouterr().out
    assert "--probe" in help_text
    assert "--lookahead" not in help_text


def test_info():
    done = run("info")
    assert done.returncode == 0
    for word in ("llama_cpp_commit", "elastic-paper", "libraries"):
        assert word in done.stdout


@pytest.mark.parametrize(
    "command", [[], ["describe"], ["show"], ["chat"], ["eval"], ["demo"], ["info"]]
)
def test_help(command, capfd):
    done = run_here(capfd, *command, "--help")
    assert done.returncode == 0
    assert "usage:" in done.stdout


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "required"),
        (["bogus"], "bogus"),
        (["describe"], "image"),
        (["describe", "no.png"], "no such file"),
        (["describe", "IMAGE", "--kv-budget", "0"], "budget"),
        (["describe", "IMAGE", "--kv-budget", "nan"], "budget"),
        (["describe", "IMAGE", "--kv-budget", "lots"], "kv-budget"),
        (["describe", "IMAGE", "--policy", "nope"], "elastic-paper"),
        (["describe", "IMAGE", "-m", "no.gguf"], "no.gguf"),
        (["describe", "IMAGE", "-m", "IMAGE"], "magic"),
        (["describe", "IMAGE", "--mmproj", "x.gguf"], "--mmproj without -m"),
        (["describe", "IMAGE", "--hf-repo", "a/b"], "--hf-file"),
        (["describe", "IMAGE", "-fa", "off"], "--kv-budget 1"),
        (["describe", "IMAGE", "-ctv", "q8_0", "-fa", "off", "--kv-budget", "1"], "-fa on"),
        (["describe", "IMAGE", "-c", "0"], "ctx-size"),
        (["describe", "IMAGE", "--seed", "-2"], "--seed"),
        (["describe", "IMAGE", "--seed", "x"], "--seed"),
        (["describe", "IMAGE", "-c", "100", "--kv-budget", "5000"], "budget in cells"),
        (["describe", "IMAGE", "-c", "256", "-p", "the " * 300], "context is too small"),
    ],
)
def test_mistakes_are_one_line(args, says, model, image, capfd):
    args = [str(image) if a == "IMAGE" else a for a in args]
    own_model = "-m" in args or "--mmproj" in args or "--hf-repo" in args
    if len(args) > 1 and not own_model:
        args = [args[0], *map(str, model), *args[1:]]
    assert_one_line(run_here(capfd, *args), says)


@pytest.mark.parametrize(
    ("args", "says"), [([], "required"), (["describe", "IMAGE", "-m", "IMAGE"], "magic")]
)
def test_a_mistake_ends_the_process(args, says, image):
    assert_one_line(run(*(str(image) if a == "IMAGE" else a for a in args)), says)


def assert_one_line(done: subprocess.CompletedProcess, says: str) -> None:
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


def test_a_reader_that_leaves(model, image):
    args = " ".join(f"'{a}'" for a in ["describe", image, *model, "-n", "200"])
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; '{sys.executable}' -m elastic_llama {args} | true"],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.stderr == ""


def test_verbose_shows_the_native_log(model, image):
    done = run("describe", image, *model, "-n", 2, "-v")
    assert done.returncode == 0
    assert "llama" in done.stderr
