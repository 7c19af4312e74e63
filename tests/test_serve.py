"""What `elastic-llama serve` gives llama-server, without one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from elastic_llama.cli import build_parser, main, serve
from elastic_llama.cli.serve import server_arguments
from elastic_llama.errors import ConfigError


@pytest.fixture(autouse=True)
def no_download(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic_llama.embedded.embedded_model", lambda: Path("model.gguf"))
    monkeypatch.setattr("elastic_llama.hub.fetch", lambda repo, name: Path(repo) / name)


def value(arguments: list[str], name: str) -> str:
    assert arguments.count(name) == 1
    return arguments[arguments.index(name) + 1]


def test_everything_is_llama_servers() -> None:
    given = ["--port", "80", "-h", "--no-mmap", "x"]
    assert build_parser().parse_args(["serve", *given]).arguments == given


def test_the_embedded_model() -> None:
    out = server_arguments([], {})
    assert value(out, "-m") == "model.gguf"
    assert value(out, "--mmproj").endswith("mmproj-scenes-f16.gguf")
    assert value(out, "--host") == "127.0.0.1"
    assert value(out, "--kv-budget") == "0.2"
    assert value(out, "-c") == "8192"
    assert "--no-remote-media" in out
    assert (Path(value(out, "--path")) / "index.html").is_file()
    assert value(server_arguments(["-np", "2"], {}), "-c") == "4096"


def test_what_is_given_stays() -> None:
    given = ["-m", "a.gguf", "--host", "0.0.0.0", "--kv-budget", "1", "-kvu", "--path=x"]
    out = server_arguments(given, {})
    assert out[: len(given)] == given
    assert not {"--mmproj", "--no-kv-unified", "--chat-template", "-c", "--path"} & set(out)
    assert out.count("--kv-budget") == 1
    out = server_arguments([], {"LLAMA_ARG_MODEL": "a.gguf", "LLAMA_ARG_KV_BUDGET": "0.5"})
    assert not {"-m", "--kv-budget"} & set(out)


def test_a_file_of_a_repository() -> None:
    given = ["--hf-repo", "some/one", "--hf-file", "a.gguf", "--hf-mmproj", "b.gguf", "--port", "1"]
    out = server_arguments(given, {})
    assert value(out, "-m") == str(Path("some/one/a.gguf"))
    assert value(out, "--mmproj") == str(Path("some/one/b.gguf"))
    assert "--hf-repo" not in out
    for wrong in (["--hf-file", "a.gguf"], ["--hf-file"]):
        with pytest.raises(ConfigError):
            server_arguments(wrong, {})


def test_without_the_program(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("elastic_llama._libraries.lib_dir", lambda: tmp_path / "lib")
    assert main(["serve", "--port", "1"]) == 1
    assert "make server" in capsys.readouterr().err
    assert serve.page_dir().is_dir()


@pytest.mark.parametrize("given", [None, "7"])
@pytest.mark.parametrize("name", ["MALLOC_ARENA_MAX", "MALLOC_TRIM_THRESHOLD_"])
def test_freed_memory_goes_back(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, given: str | None
) -> None:
    monkeypatch.setattr(serve, "find_server", lambda: tmp_path / "llama-server")
    seen = []
    monkeypatch.setattr(serve.os, "execv", lambda *_: seen.append(os.environ[name]))
    for other in serve._MALLOC:
        monkeypatch.setenv(other, given or "")  # and is taken back after the test
        if given is None:
            monkeypatch.delenv(other)
    main(["serve", "--port", "80"])
    assert seen == [given or serve._MALLOC[name]]
