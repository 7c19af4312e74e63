"""What `ElasticLlama` is given never ends the process, and a cache that is off is off."""

from __future__ import annotations

import ctypes
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import elastic_llama as el
import llama_cpp
import numpy as np
import pytest
from elastic_llama import _checks
from elastic_llama.bench.contexts import Context, ContextOptions, Prompts
from elastic_llama.bench.scenarios import Scenario
from elastic_llama.evaluation.streams import Streams
from elastic_llama.kv_types import KV_TYPES, stock_bytes
from elastic_llama.vision import Chunk, Vision
from gguf import GGUFWriter
from llama_cpp import mtmd_cpp
from llama_cpp.llama_speculative import LlamaPromptLookupDecoding
from PIL import Image

from tests.support.tiny_archs import write_tiny

SMALL = {"n_ctx": 256, "n_threads": 1, "n_threads_batch": 1}
TEXT = "the heat on the earth " * 8
OFF = [el.ElasticConfig.off(), el.ElasticConfig(policy="full"), el.ElasticConfig(budget=1)]


# -- what is refused

# On the code before the checks these ended the process: SIGFPE, SIGSEGV or SIGABRT.
CRASHES = [
    {"type_k": 4},
    {"type_k": 5},
    {"type_k": 31},
    {"type_k": -1},
    {"type_k": 99},
    {"type_v": -1},
    {"type_v": 4, "flash_attn": True},
    {"pooling_type": 99, "embedding": True},
    {"pooling_type": -2, "embedding": True},
    {"n_threads": 10**6},
    {"n_threads_batch": 10**6},
    {"lora_path": "no.gguf"},
]

BAD = {
    "type_k": [4, 5, 10, 31, -1, 99, 2**40, True, 1.0, "q9_0", "", b"f16", [1]],
    "type_v": [12, 24, "f64"],
    "split_mode": [-1, 4, 99, "layer", None, True, 1.0],
    "rope_scaling_type": [-2, 4, "yarn"],
    "pooling_type": [-2, 5, "mean", None],
    "attention_type": [-2, 2],
    "numa": [-1, 5, "distribute"],
    "n_gpu_layers": [-2, 2**31, 1.5, "all", None, True],
    "main_gpu": [-2, 2**40, "0"],
    "n_batch": [0, -1, 2**31, 2.5, True, None],
    "n_ubatch": [0, 2**33],
    "n_threads": [-1, 513, 2.5, "2"],
    "n_threads_batch": [-1, 513],
    "seed": [-2, 2**32, 1.5, "x"],
    "yarn_orig_ctx": [-1, 2**31],
    "last_n_tokens_size": [-1, 2**31 - 1, "x"],
    "rope_freq_base": [float("nan"), -1.0, 1e300, "x", None],
    "rope_freq_scale": [float("inf"), -0.5, 10**400],
    "yarn_ext_factor": [float("nan")],
    "yarn_beta_slow": ["x"],
    "lora_scale": [float("inf"), "x"],
    "tensor_split": ["ab", 5, [-1.0], [float("nan")], ["x"], [1.0] * 200, {0: 1.0}],
    "kv_overrides": [5, {3: 4}, {"x": None}, {"x" * 128: 1}, {"x": "y" * 128}, {"x": 2**63}],
    "flash_attn": ["on", 2],
    "vocab_only": ["x"],
    "logits_all": [5],
    "draft_model": [5],
}


@pytest.mark.parametrize(("name", "value"), [(n, v) for n, values in BAD.items() for v in values])
def test_refused(name: str, value: Any) -> None:
    with pytest.raises(el.ConfigError, match=name):
        _checks.check_arguments(None, None, {name: value})


@pytest.mark.parametrize("n_ctx", [-1, 2**31, 2.5, True, "256"])
def test_context_size_refused(n_ctx: Any) -> None:
    with pytest.raises(el.ConfigError, match="n_ctx"):
        _checks.check_arguments(None, n_ctx, {})


def test_the_message_says_what_came_and_what_is_taken() -> None:
    for name, value, words in (
        ("type_k", 4, ("got 4", "q8_0 (8)", "iq4_nl (20)")),
        ("type_v", "q9", ("got 'q9'", "f16 (1)")),
        ("split_mode", 9, ("got 9", "1 (layer)")),
        ("n_threads", -3, ("got -3", "0 to 512")),
    ):
        with pytest.raises(el.ConfigError) as e:
            _checks.check_arguments(None, None, {name: value})
        assert all(word in str(e.value) for word in (name, *words))


def test_values_that_ended_the_process(tiny_gqa: Path) -> None:
    """In a process of its own, which goes on."""
    code = f"""
import elastic_llama as el
for arguments in {CRASHES!r}:
    try:
        el.ElasticLlama({str(tiny_gqa)!r}, n_ctx=256, **arguments).embed("the heat")
    except el.ElasticError as e:
        print(type(e).__name__, flush=True)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0
    assert done.stdout.split() == ["ConfigError"] * (len(CRASHES) - 1) + ["ModelNotFoundError"]


def test_no_elastic_config(tiny_gqa: Path) -> None:
    for value in (5, "off", True, {"budget": 0.2}):
        with pytest.raises(el.ConfigError, match="ElasticConfig"):
            el.ElasticLlama(tiny_gqa, elastic=value)


def test_more_than_memory(tiny_gqa: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise MemoryError("Unable to allocate 3 TiB")

    monkeypatch.setattr(llama_cpp.Llama, "__init__", refuse)
    with pytest.raises(el.ConfigError, match=r"3 TiB.*n_batch"):
        el.ElasticLlama(tiny_gqa)


# -- what is taken


def test_all_defaults_of_llama_cpp_python_are_taken() -> None:
    parameters = inspect.signature(llama_cpp.Llama.__init__).parameters
    known = {**_checks._WHOLE, **_checks._CHOICES, **_checks._REAL}
    assert (set(known) | set(_checks._SWITCHES)) <= set(parameters)
    given = {n: p.default for n, p in parameters.items() if p.default is not p.empty}
    given.pop("n_ctx")
    n_ctx, taken = _checks.check_arguments(None, 512, given)
    assert n_ctx == 512
    assert taken == given


@pytest.mark.parametrize(
    ("name", "prefix", "others"),
    [
        ("split_mode", "LLAMA_SPLIT_MODE_", ()),
        ("rope_scaling_type", "LLAMA_ROPE_SCALING_TYPE_", ()),
        ("pooling_type", "LLAMA_POOLING_TYPE_", ()),
        ("attention_type", "LLAMA_ATTENTION_TYPE_", ()),
        ("numa", "GGML_NUMA_STRATEGY_", ("GGML_NUMA_STRATEGY_COUNT",)),
    ],
)
def test_choices_are_those_of_llama_cpp(name: str, prefix: str, others: tuple[str, ...]) -> None:
    constants = vars(llama_cpp.llama_cpp)
    values = {v for n, v in constants.items() if n.startswith(prefix) and n not in others}
    assert set(_checks._CHOICES[name]) == values
    for value in values:
        assert _checks.check_arguments(None, None, {name: value})[1][name] == value


def test_numbers_of_other_kinds_are_taken(tiny_gqa: Path) -> None:
    arguments = {"n_batch": np.int64(64), "n_threads": np.int32(1), "rope_freq_base": 10000}
    with el.ElasticLlama(tiny_gqa, n_ctx=np.int64(256), use_mmap=np.True_, **arguments) as llm:
        assert llm.n_ctx() == 256
        assert llm.n_batch == 64
        assert llm.create_completion("the", max_tokens=2)["usage"]["completion_tokens"] > 0


@pytest.mark.parametrize("name", list(KV_TYPES))
def test_kv_types_by_name_and_number(tiny_gqa: Path, name: str) -> None:
    said = set()
    for value in (name, name.upper(), KV_TYPES[name]):
        with el.ElasticLlama(
            tiny_gqa, type_k=value, type_v=value, flash_attn=True, kv_budget=0.5, **SMALL
        ) as llm:
            assert llm.context_params.type_k == llm.context_params.type_v == KV_TYPES[name]
            said.add(complete(llm))
    assert len(said) == 1


def test_a_quantized_v_by_name_needs_flash_attention(tiny_gqa: Path) -> None:
    with pytest.raises(el.ConfigError, match="flash_attn=True"):
        el.ElasticLlama(tiny_gqa, type_v="q8_0", flash_attn=False, elastic=None)


@pytest.mark.parametrize("given", [{}, {"flash_attn": False}, {"flash_attn": True}], ids=str)
def test_an_elastic_cache_has_flash_attention(tiny_gqa: Path, given: dict[str, bool]) -> None:
    """Whatever is passed: wrappers pass llama-cpp-python's default on."""
    for more in ({}, {"type_v": "q8_0"}):
        with el.ElasticLlama(tiny_gqa, kv_budget=0.5, **given, **more, **SMALL) as llm:
            assert llm.context_params.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            assert llm.session is not None
    for off in ({"elastic": None}, {"kv_budget": 1.0}):
        with el.ElasticLlama(tiny_gqa, **given, **off, **SMALL) as llm:
            on = llm.context_params.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            assert on == given.get("flash_attn", False)


def complete(llm: Any, text: str = TEXT) -> str:
    out = llm.create_completion(text, max_tokens=12, temperature=0)
    return str(out["choices"][0]["text"])


# -- adapters


def write_lora(path: Path, n_in: int, arch: str = "llama", kind: str = "adapter") -> Path:
    """An adapter of the first layer's queries [256, n_in], rank 4."""
    writer = GGUFWriter(str(path), arch)
    writer.add_type(kind)
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", 64.0)
    rng = np.random.default_rng(0)
    name = "blk.0.attn_q.weight"
    writer.add_tensor(name + ".lora_a", rng.standard_normal((4, n_in), np.float32))
    writer.add_tensor(name + ".lora_b", rng.standard_normal((256, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_lora(tiny_gqa: Path, tmp_path: Path) -> None:
    path = str(write_lora(tmp_path / "lora.gguf", 256))
    with el.ElasticLlama(tiny_gqa, kv_budget=1, **SMALL) as llm:
        without = complete(llm)
    with el.ElasticLlama(tiny_gqa, kv_budget=1, lora_path=path, **SMALL) as llm:
        assert llm.lora_path == path
        said = complete(llm)
    stock = llama_cpp.Llama(str(tiny_gqa), lora_path=path, verbose=False, **SMALL)
    assert said == complete(stock) != without
    stock.close()


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("no.gguf", el.ModelNotFoundError, "no such file"),
        ("model", el.ModelFileError, "a GGUF of type model"),
        ("other.gguf", el.ModelFileError, "for qwen2"),
        ("narrow.gguf", el.ModelFileError, "llama.cpp refuses"),
    ],
)
def test_lora_that_does_not_fit(
    tiny_gqa: Path, tmp_path: Path, name: str, error: type[Exception], says: str
) -> None:
    write_lora(tmp_path / "other.gguf", 256, arch="qwen2")
    write_lora(tmp_path / "narrow.gguf", 96)
    path = tiny_gqa if name == "model" else tmp_path / name
    with pytest.raises(error, match=says):
        el.ElasticLlama(tiny_gqa, lora_path=path)


# -- limits and combinations


def test_an_overflow_names_the_limit() -> None:
    message = "Requested tokens (9000) exceed context window of 512"
    with (
        pytest.raises(el.ContextOverflowError, match="9000 tokens, expected fewer than 8192") as e,
        _checks.translated_errors(8192),
    ):
        raise ValueError(message)
    assert "512" not in str(e.value)


def test_draft_model_where_the_cache_is_off(tiny_gqa: Path) -> None:
    said = set()
    for elastic in (None, *OFF):
        draft = LlamaPromptLookupDecoding(num_pred_tokens=4)
        with el.ElasticLlama(tiny_gqa, elastic=elastic, draft_model=draft, **SMALL) as llm:
            said.add(complete(llm))
    assert len(said) == 1
    for elastic in (el.ElasticConfig(budget=0.5), el.ElasticConfig(budget=1, kv_cells=64)):
        with pytest.raises(el.ConfigError, match="draft_model.*kv_budget=1"):
            el.ElasticLlama(tiny_gqa, elastic=elastic, draft_model=LlamaPromptLookupDecoding())


@pytest.mark.parametrize(
    "elastic", [None, el.ElasticConfig(), el.ElasticConfig(kv_cells=100), *OFF]
)
def test_vocabulary_only(tiny_gqa: Path, elastic: el.ElasticConfig | None) -> None:
    with el.ElasticLlama(tiny_gqa, elastic=elastic, vocab_only=True) as llm:
        tokens = llm.tokenize(b"the heat")
        assert llm.detokenize(tokens) == b"the heat"
        assert llm.session is None
        cannot_decode(llm, "vocab_only")


def cannot_decode(llm: el.ElasticLlama, says: str) -> None:
    for call in (
        lambda: llm.eval([5, 6]),
        lambda: next(llm.generate([5, 6])),
        lambda: llm.create_completion("the"),
        lambda: llm.create_chat_completion([{"role": "user", "content": "the"}]),
        lambda: next(el.Conversation(llm).ask("the")),
    ):
        with pytest.raises(el.UnsupportedModelError, match=says):
            call()


# -- models that the elastic cache does not take


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("archs")

    def get(arch: str) -> Path:
        path = folder / f"{arch}.gguf"
        return path if path.exists() else write_tiny(path, arch)

    return get


@pytest.mark.parametrize("arch", ["refact", "mamba"])
def test_a_refusal_says_how_to_go_on(tiny: Any, arch: str) -> None:
    with pytest.raises(el.UnsupportedModelError, match=r"kv_budget=1 \(--kv-budget 1\)"):
        el.ElasticLlama(tiny(arch), elastic=el.ElasticConfig(), **SMALL)
    with pytest.raises(el.UnsupportedModelError, match=r"kv_budget=1 \(--kv-budget 1\)"):
        el.ElasticLlama(tiny(arch), kv_budget=0.2, **SMALL)


@pytest.mark.parametrize("arch", ["refact", "mamba"])
def test_where_nothing_is_asked_for_it_goes_on_without(
    tiny: Any, arch: str, caplog: pytest.LogCaptureFixture
) -> None:
    """With one line of warning, and the answers of a cache that is off."""
    said = []
    for args in ({}, {"elastic": "auto"}, {"elastic": None, "flash_attn": True}):
        caplog.clear()
        with el.ElasticLlama(tiny(arch), logits_all=True, **args, **SMALL) as llm:
            said.append((complete(llm), llm.scores[: llm.n_tokens].tobytes()))
            assert llm.elastic is None
            assert llm.session is None
        warned = [record.getMessage() for record in caplog.records]
        assert len(warned) == (args.get("elastic", "auto") == "auto")
        for line in warned:
            assert re.fullmatch(
                "warning: the elastic cache is off: [^;\n]*(ALiBi|recurrent).*", line
            )
    assert said[0] == said[1] == said[2]


def test_auto_is_on_where_it_can_be(tiny_gqa: Path, caplog: pytest.LogCaptureFixture) -> None:
    for args in ({}, {"elastic": "auto"}):
        with el.ElasticLlama(tiny_gqa, **args, **SMALL) as llm:
            assert llm.elastic == el.ElasticConfig()
            assert llm.session is not None
    assert not caplog.records
    with pytest.raises(el.ConfigError, match='"auto"'):
        el.ElasticLlama(tiny_gqa, elastic="on", **SMALL)


@pytest.mark.parametrize("arch", ["cohere2", "refact", "qwen2vl", "qwen3vl", "mamba"])
def test_off_is_off(tiny: Any, arch: str) -> None:
    said, logits = [], []
    for elastic in (None, *OFF):
        with el.ElasticLlama(tiny(arch), elastic=elastic, logits_all=True, **SMALL) as llm:
            said.append(complete(llm))
            logits.append(llm.scores[: llm.n_tokens].copy())
            assert llm.session is None
            assert llm.stats.cells == llm.stats.tokens == llm.n_tokens
    assert said == said[:1] * len(said)
    for own in logits:
        np.testing.assert_array_equal(own, logits[0])


def test_the_evaluation_refuses_it_too(tiny: Any) -> None:
    llm = el.ElasticLlama(tiny("refact"), elastic=None, **SMALL)
    with pytest.raises(el.UnsupportedModelError, match="ALiBi"):
        Streams(llm, 1, 256).record()
    llm.close()


def test_the_evaluation_attaches_a_cache_that_is_off(tiny_gqa: Path) -> None:
    with el.ElasticLlama(tiny_gqa, elastic=None, **SMALL) as llm:
        streams = Streams(llm, 1, 256)
        streams.attach(el.ElasticConfig.off())
        assert streams.session.n_per_layer(0) == 0


def test_off_as_the_short_form(tiny: Any) -> None:
    with el.ElasticLlama(tiny("refact"), kv_budget=1, **SMALL) as llm:
        chat = el.Conversation(llm)
        assert "".join(chat.ask("the heat", max_tokens=4))
        assert chat.stats.cells_kept == chat.stats.cells_prompt > 0
        chat.close()


def test_off_on_the_command_line(tiny: Any) -> None:
    chat = [sys.executable, "-m", "elastic_llama", "chat", "-m", str(tiny("refact"))]
    chat += ["-c", "256", "-t", "1", "-n", "4"]

    def run(*options: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [*chat, *options],
            input="the heat\n",
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    plain = run()
    assert plain.returncode == 0
    assert re.fullmatch(r"warning: the elastic cache is off: [^\n]*ALiBi[^\n]*\n", plain.stderr)
    assert "tokens/s" in plain.stdout
    for options in (("--kv-budget", "0.3"), ("--min-cells", "8"), ("--policy", "h2o")):
        refused = run(*options)
        assert refused.returncode == 1
        assert "--kv-budget 1" in refused.stderr
    for options in (("--kv-budget", "1"), ("--policy", "full")):
        done = run(*options)
        assert (done.returncode, done.stderr) == (0, "")
        assert "tokens/s" in done.stdout


def test_off_does_not_look_at_the_budget(tiny_gqa: Path) -> None:
    with el.ElasticLlama(tiny_gqa, elastic=el.ElasticConfig(5000, "full"), **SMALL) as llm:
        assert llm.session is None
    with pytest.raises(el.ConfigError, match="5000"):
        el.ElasticLlama(tiny_gqa, kv_budget=5000, **SMALL)


@pytest.mark.parametrize("arch", ["eurobert", "llada"])
def test_models_without_memory(tiny: Any, arch: str) -> None:
    path = tiny(arch)
    for elastic in ("auto", None, *OFF):
        with pytest.raises(el.UnsupportedModelError, match="pass embedding=True$"):
            el.ElasticLlama(path, elastic=elastic, **SMALL)
    on = el.ElasticConfig()
    with pytest.raises(el.UnsupportedModelError, match="embedding=True and kv_budget=1"):
        el.ElasticLlama(path, elastic=on, **SMALL)
    with pytest.raises(el.UnsupportedModelError, match=r"kv_budget=1 \(--kv-budget 1\)"):
        el.ElasticLlama(path, elastic=on, embedding=True, **SMALL)
    stock = llama_cpp.Llama(str(path), embedding=True, verbose=False, **SMALL)
    for elastic in ("auto", None, *OFF):
        with el.ElasticLlama(path, elastic=elastic, embedding=True, **SMALL) as llm:
            if elastic == "auto":  # with flash attention
                np.testing.assert_allclose(llm.embed(TEXT), stock.embed(TEXT), atol=1e-2)
            else:
                assert llm.embed(TEXT) == stock.embed(TEXT)
            assert llm.session is None
            cannot_decode(llm, "no KV cache")
    stock.close()


def test_bytes_without_a_session(tiny_gqa: Path) -> None:
    with el.ElasticLlama(tiny_gqa, kv_budget=1, **SMALL) as llm:
        llm.eval([7] * 200)
        n_bytes = 200 * 3 * 2 * (2 * 64) * 2  # cells, layers, K and V, f16
        assert n_bytes <= stock_bytes(llm._ctx.ctx) < 1.02 * n_bytes


# -- sizes of image embeddings


@pytest.fixture
def deepstack(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A vision side whose tower answers with as many floats as the model reads, and the floats."""
    n_tokens, n_embd = 4, 128
    with el.ElasticLlama(tiny("qwen3vl"), kv_budget=1, **SMALL) as llm:
        assert llm.n_embd() == n_embd
        floats = np.arange(n_tokens * 2 * n_embd, dtype=np.float32)
        pointer = floats.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        monkeypatch.setattr(mtmd_cpp, "mtmd_encode_chunk", lambda *args: 0)
        monkeypatch.setattr(mtmd_cpp, "mtmd_get_output_embd", lambda ctx: pointer)
        vision = Vision.__new__(Vision)
        vision.llm, vision.ctx = llm, None
        yield vision, Chunk([], object(), n_tokens), floats.reshape(n_tokens, 2 * n_embd)


def test_embeddings_are_as_wide_as_the_model_reads(deepstack: Any) -> None:
    vision, chunk, floats = deepstack
    out, _ = vision.encode(chunk)
    np.testing.assert_array_equal(out, floats)


def test_bench_rows_are_as_wide_as_the_model_reads(deepstack: Any) -> None:
    llm = deepstack[0].llm
    prompts = Prompts(llm, Scenario("", "", images=(3,), n_text=4, n_gen=4))
    assert prompts.images[0].shape == (3, 256)
    context = Context(llm, ContextOptions(), 1, 256)
    assert context.n_embd == 256
    context.close()


def test_embeddings_of_another_shape(deepstack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    vision, chunk, floats = deepstack
    called = []
    monkeypatch.setattr(
        mtmd_cpp, "mtmd_helper_decode_image_chunk", lambda *args: called.append(args) or 0
    )
    for bad in (floats[:, :128], floats[:3], floats.reshape(-1)):
        with pytest.raises(el.StateError, match="4 tokens of 256 floats"):
            vision.decode(chunk, bad, 0)
    assert not called
    vision.decode(chunk, np.asfortranarray(floats, dtype=np.float64), 0)
    given = np.ctypeslib.as_array(called[0][3], floats.shape)
    np.testing.assert_array_equal(given, floats)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "I;16"])
def test_bitmaps_have_three_bytes_a_pixel(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    monkeypatch.setattr(
        mtmd_cpp, "mtmd_bitmap_init", lambda w, h, data: sizes.append(ctypes.sizeof(data))
    )
    Vision._bitmap(SimpleNamespace(), Image.new(mode, (5, 3)))
    assert sizes == [5 * 3 * 3]
