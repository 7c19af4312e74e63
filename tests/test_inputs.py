"""What people pass as text, messages and images: understood, or refused in one sentence."""

from __future__ import annotations

import base64
import io
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import elastic_llama as el
import numpy as np
import pytest
from elastic_llama.chat import ElasticChatHandler, clean_text, read_messages, without_marker
from elastic_llama.cli import build_parser
from elastic_llama.cli.chat import image_names
from elastic_llama.cli.options import ask_options
from elastic_llama.images import as_images, load_image, to_data_uri
from PIL import Image

MARKER = "<__media__>"


def noise(mode: str = "RGB") -> Image.Image:
    return Image.effect_noise((20, 10), 50).convert(mode)


def encoded(image: Image.Image, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


IMAGE = noise()
PNG = encoded(IMAGE)
BASE64 = base64.b64encode(PNG).decode()


def same(source) -> bool:
    return load_image(source).tobytes() == IMAGE.tobytes()


# -- images as text


def test_base64_without_a_header():
    assert same(BASE64)
    assert same(base64.encodebytes(PNG).decode())
    assert same(base64.urlsafe_b64encode(PNG).decode().rstrip("="))
    assert same(base64.b64encode(encoded(IMAGE, "BMP")).decode())


def test_a_file_goes_before_base64_of_its_name(tmp_path, monkeypatch):
    tiny = io.BytesIO()
    Image.new("L", (1, 1)).save(tiny, "GIF")
    name = base64.urlsafe_b64encode(tiny.getvalue()).decode()
    monkeypatch.chdir(tmp_path)
    assert load_image(name).size == (1, 1)
    (tmp_path / name).write_bytes(PNG)
    assert same(name)


@pytest.mark.parametrize(
    "head",
    [
        "data:image/png;base64,",
        "DATA:image/png;base64,",
        "Data:IMAGE/PNG;BASE64,",
        "data:image/png;charset=x;base64,",
        "data:image/png;base64;name=a.png,",
        "data:;base64,",
        "data:image/png; base64 , ",
        "\n data:image/png;base64,\n",
    ],
)
def test_data_urls(head):
    assert same(head + BASE64)
    assert same(head + base64.encodebytes(PNG).decode())
    assert same(head + base64.urlsafe_b64encode(PNG).decode().rstrip("="))
    assert same(head + BASE64.replace("+", "%2B").replace("/", "%2F").replace("=", "%3D"))


def test_urls_in_capitals(tmp_path):
    path = tmp_path / "a b.png"
    path.write_bytes(PNG)
    assert same(path.as_uri().replace("file:", "FILE:") + "\n")


LONG = "a" * 110_000


@pytest.mark.parametrize(
    "source",
    [
        LONG,
        LONG + "!",
        "/" + LONG,
        base64.b64encode(LONG.encode()).decode(),
        BASE64[: len(BASE64) // 2],
        "data:image/png," + LONG,
        "data:" + LONG,
        "data:image/png;base64," + LONG + "!",
        "data:image/png;base64," + LONG,
        "data:image/png;base64,é" + LONG,
        "file:///" + LONG,
        "http://" + LONG,
        "http://[" + LONG,
        "http://a b/" + LONG,
        "http://127.0.0.1:bad/" + LONG,
        "a\0" + LONG,
        "",
        b"x" * 110_000,
    ],
)
def test_messages_are_short(source):
    with pytest.raises(el.ImageError, match=r"^\[image\] ") as error:
        load_image(source)
    assert len(str(error.value)) < 700
    if isinstance(source, str):
        with pytest.raises(el.ImageError) as error:
            load_image(Path(source or "/no/such/file"))
        assert len(str(error.value)) < 700


# -- images as bytes and files


def test_bytes_of_every_kind():
    backwards = memoryview(PNG[::-1])[::-1]
    for source in (
        bytearray(PNG),
        memoryview(PNG),
        backwards,
        memoryview(np.frombuffer(PNG, "u1")),
    ):
        assert same(source)


def test_files_are_read_from_where_they_stand_and_stay_open(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"head" + PNG)
    with path.open("rb") as on_disk, tempfile.TemporaryFile() as unnamed:
        unnamed.write(b"head" + PNG)
        for file in (io.BytesIO(b"head" + PNG), on_disk, unnamed):
            file.seek(4)
            assert same(file)
            assert not file.closed
            with pytest.raises(el.ImageError, match="nothing left to read"):
                load_image(file)


def test_files_that_give_no_bytes():
    closed = io.BytesIO(PNG)
    closed.close()
    odd = SimpleNamespace(read=lambda: 3)
    for file, says in ((closed, "closed"), (io.StringIO("x"), "binary"), (odd, "int from read")):
        with pytest.raises(el.ImageError, match=says):
            load_image(file)


@pytest.mark.parametrize("source", [3, None, 1.5, object(), [], {}, ("a",), Image])
def test_other_types_are_named(source):
    with pytest.raises(el.ImageError, match=rf"got {type(source).__name__}, expected a path"):
        load_image(source)


def test_a_closed_image_object():
    with Image.open(io.BytesIO(PNG)) as image:
        pass
    with pytest.raises(el.ImageError, match="still open"):
        load_image(image)


# -- arrays and images of other depths


def test_arrays():
    pixels = np.asarray(IMAGE)
    assert same(pixels)
    assert same(pixels[::-1][::-1])
    assert load_image(pixels[:, :, :1]).tobytes() == load_image(pixels[:, :, 0]).tobytes()
    clear = np.dstack([pixels, np.full(pixels.shape[:2], 0, np.uint8)])
    assert set(load_image(clear).tobytes()) == {255}
    assert load_image(np.zeros((9000, 3), np.uint8)).size[1] <= 4096


RAMP = np.linspace(0, 255, 256).round().reshape(16, 16)


@pytest.mark.parametrize(
    "array",
    [
        RAMP.astype(np.uint8),
        RAMP.astype(np.int64),
        RAMP.astype(np.uint16),
        RAMP.astype(np.uint16) * 257,
        RAMP.astype(np.int32) * 16,
        RAMP.astype(">u2") * 256 + 9,
        RAMP.astype(np.uint32) * 2**24,
        RAMP / 255,
        (RAMP / 255).astype(np.float16),
        RAMP.astype(np.float32),
        RAMP / 127.5 - 1,
        RAMP * 1e300,
        RAMP - 1000,
    ],
    ids=lambda a: f"{a.dtype} {a.min():g} to {a.max():g}",
)
def test_ranges(array):
    out = np.asarray(load_image(array), float)[:, :, 0]
    assert np.abs(out - RAMP).max() <= 1
    colour = np.asarray(load_image(np.dstack([array] * 3)), float)
    assert np.abs(colour - RAMP[:, :, None]).max() <= 1


def test_bools_and_what_is_no_number():
    assert set(load_image(np.array([[True, False]])).tobytes()) == {0, 255}
    odd = np.array([[np.nan, np.inf, -np.inf, 0.5, 1.0, 0.0]])
    assert load_image(odd).tobytes()[::3] == bytes([0, 255, 0, 128, 255, 0])
    assert set(load_image(np.full((2, 2), np.nan)).tobytes()) == {0}
    assert set(load_image(np.full((2, 2), 1e6)).tobytes()) == {255}
    assert set(load_image(np.zeros((2, 2))).tobytes()) == {0}
    overshoot = np.array([[-0.02, 0.0, 0.5, 1.03]])
    assert load_image(overshoot).tobytes()[::3] == bytes([0, 0, 128, 255])


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(()),
        np.zeros(9),
        np.zeros((3, 8, 8)),
        np.zeros((8, 8, 2)),
        np.zeros((1, 8, 8, 3)),
        np.zeros((0, 8)),
        np.zeros((8, 8), complex),
        np.array([["a"]]),
        np.array([[None]]),
    ],
    ids=lambda a: f"{a.dtype} {a.shape}",
)
def test_arrays_that_are_no_image(array):
    with pytest.raises(el.ImageError, match="expected height x width"):
        load_image(array)


def test_an_array_that_is_too_large():
    with pytest.raises(el.ImageError, match="megapixels"):
        load_image(np.broadcast_to(np.uint8(0), (20_000, 20_000)))


GREY16 = (RAMP * 257).astype(np.uint16)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(GREY16),
        Image.fromarray(GREY16.astype(np.int32)),
        Image.fromarray(RAMP.astype(np.int32)),
        Image.fromarray(RAMP.astype(np.float32)),
        Image.fromarray((RAMP / 255).astype(np.float32)),
        Image.fromarray((RAMP * 16).astype(np.uint16)),
    ],
    ids=["I;16", "I", "I of 8 bits", "F", "F to 1", "I;16 of 12 bits"],
)
def test_images_of_other_depths(image):
    kind = "PNG" if image.mode == "I;16" else "TIFF"
    for source in (image, encoded(image, kind)):
        out = np.asarray(load_image(source), float)[:, :, 0]
        assert np.abs(out - RAMP).max() <= 1


@pytest.mark.parametrize("mode", ["LAB", "HSV", "La", "RGBa", "RGBX", "PA", "I;16B", "I;16L"])
def test_rare_modes(mode):
    assert load_image(Image.new(mode, (8, 4))).size == (8, 4)


# -- what is passed as images


def test_as_images():
    assert as_images(None) == as_images([]) == as_images(()) == []
    for one in ("a.png", PNG, bytearray(PNG), memoryview(PNG), IMAGE, io.BytesIO(PNG)):
        assert as_images(one) == [one]
        assert as_images([one, one]) == [one, one]
    array = np.zeros((4, 4))
    assert as_images(array)[0] is array
    assert as_images(name for name in ("a", "b")) == ["a", "b"]
    assert as_images(map(str, (1, 2))) == ["1", "2"]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (3, "images, got int"),
        ({"url": "x"}, "images, got dict"),
        (object(), "images, got object"),
        (["a.png", 3], r"images\[1\], got int"),
        ([None], r"images\[0\], got NoneType"),
        ([["a.png"]], r"images\[0\], got list"),
    ],
)
def test_what_is_no_image(value, says):
    with pytest.raises(el.ImageError, match=says):
        as_images(value)


# -- text


@pytest.mark.parametrize(
    "text",
    [
        MARKER,
        f"<{MARKER}>",
        f"<<{MARKER}>>>",
        f"<__med{MARKER}ia__>",
        f"{MARKER}{MARKER}",
        f"<{MARKER}{MARKER}>",
        "<" * 50_000 + MARKER + ">" * 50_000,
        "<" * 100_000,
    ],
    ids=lambda text: text[:30],
)
def test_text_is_no_marker(text):
    assert MARKER not in without_marker(text, MARKER)
    plain = "a <b> <__media_> __media__> <<"
    assert without_marker(plain, MARKER) == plain


def test_lone_halves_of_characters():
    assert clean_text("a\ud83db") == "a\ufffdb"
    assert clean_text("\ude00\ud83d") == "\ufffd\ufffd"
    assert clean_text("\ud83d\ude00") == "\U0001f600"
    assert clean_text("é 😀 \0") == "é 😀 \0"


# -- messages


@pytest.fixture
def handler(tmp_path):
    """Never loaded: it only looks whether the file is there."""
    path = tmp_path / "mmproj.gguf"
    path.touch()
    return ElasticChatHandler(clip_model_path=str(path))


TEMPLATE = (
    "{{ tools | default('') }}{% for m in messages %}[{{ m.role }}]{% if m.content is string %}"
    "{{ m.content }}{% elif m.content %}{% for part in m.content %}{{ part.text }}{% endfor %}"
    "{% endif %}{{ m.name | default('') }}{% endfor %}"
)


def prompt(handler, messages, template=TEMPLATE, **kwargs) -> tuple[str, list]:
    """The prompt and its images, by the steps of llama-cpp-python's handler."""
    import jinja2

    messages = read_messages(messages)
    images = handler.get_image_urls(messages)
    shown = handler._get_template_messages(messages, MARKER)
    text = jinja2.Template(template).render(messages=shown, **kwargs)
    return handler._postprocess_template_text(text, images, MARKER), images


URL = to_data_uri(IMAGE)


def with_image(*parts) -> dict:
    image = {"type": "image_url", "image_url": {"url": URL}}
    return {"role": "user", "content": [*parts, image]}


@pytest.mark.parametrize(
    "message",
    [
        {"role": "system", "content": MARKER},
        {"role": "assistant", "content": f"You said <{MARKER}>"},
        {"role": "tool", "content": MARKER, "name": MARKER},
        {"role": "user", "content": MARKER},
        {"role": "user", "content": [MARKER]},
        {"role": "system", "content": [{"type": "text", "text": MARKER}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": MARKER}]},
        with_image({"type": "input_text", "text": "<__me"}, {"type": "text", "text": "dia__>"}),
        {"role": MARKER, "content": "x"},
    ],
    ids=lambda m: json.dumps(m)[:50],
)
def test_text_never_stands_for_an_image(handler, message):
    text, images = prompt(handler, [message, with_image()], tools=MARKER)
    assert text.count(MARKER) == len(images)
    assert "__media__" in text.replace(MARKER, "")


def test_the_text_of_a_url_stands_for_no_image(handler, tmp_path):
    """llama-cpp-python replaces it wherever it is said."""
    path = str(tmp_path / "a.png")
    IMAGE.save(path)
    part = {"type": "image_url", "image_url": path}
    question = {"type": "text", "text": f"What is in {path}?"}
    text, images = prompt(handler, [{"role": "user", "content": [question, part]}])
    assert text == f"[user]{MARKER}What is in {path}?"
    assert same(handler.load_image(images[0]))


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": URL},
        {"type": "image_url", "image_url": {"url": URL, "detail": "low"}},
        {"type": "image_url", "image_url": {"url": BASE64}},
        {"type": "input_image", "image_url": URL},
        {"type": "image", "image": IMAGE},
        {"type": "image", "image": np.asarray(IMAGE)},
        {"type": "image", "image": PNG},
        {"type": "image", "image": {"bytes": PNG, "path": None}},
        {"type": "image", "url": URL},
        {"type": "image", "data": BASE64, "mimeType": "image/png"},
        {"type": "image", "data": URL},
        {"type": "image", "base64": BASE64},
        {"type": "image", "path": "FILE"},
        {"type": "image_url", "image_url": "FILE"},
        {
            "type": "image",
            "source": {"type": "base64", "media_type": "image/png", "data": BASE64},
        },
        {"type": "image", "source": {"type": "url", "url": URL}},
        {"image_url": URL},
    ],
    ids=lambda part: f"{part.get('type')} {list(part)[-1]}",
)
def test_images_in_messages(handler, part, tmp_path):
    path = tmp_path / "a b.png"
    IMAGE.save(path)
    part = {key: str(path) if isinstance(v, str) and v == "FILE" else v for key, v in part.items()}
    for content in ([{"type": "input_text", "text": "What?"}, part], ("What?", part)):
        text, images = prompt(handler, [{"role": "user", "content": content}])
        assert text == f"[user]{MARKER}What?"
        assert same(handler.load_image(images[0]))
    assert prompt(handler, [{"role": "user", "content": part}])[0] == f"[user]{MARKER}"


def test_messages_are_not_changed(handler):
    messages = [with_image({"type": "text", "text": MARKER})]
    before = json.dumps(messages)
    prompt(handler, messages)
    assert json.dumps(messages) == before


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("hello", "messages, got str"),
        (3, "messages, got int"),
        ({"role": "user"}, "messages, got dict"),
        (["hello"], "message, got str"),
        ([{"content": "x"}], "role and content"),
        ([{"role": "user", "content": 3}], "got int, expected text or parts"),
        ([{"role": "user", "content": [3]}], "part of a message, got int"),
        ([{"role": "user", "content": [IMAGE]}], "part of a message, got Image"),
        (
            [{"role": "user", "content": [{"type": "video", "video": "x"}]}],
            "'video', expected.*inp",
        ),
        ([{"role": "user", "content": [{"type": "x" * 999}]}], "part of type, got 'x+…"),
        ([{"role": "user", "content": [{}]}], "part of type, got None"),
        ([{"role": "user", "content": [{"type": ["text"], "text": "x"}]}], "part of type"),
        ([{"role": "user", "content": [{"type": "text"}]}], "text of a part.*NoneType"),
        ([{"role": "user", "content": [{"type": "image"}]}], "without its image.*keys type"),
        ([{"role": "user", "content": [{"type": "image", "file_id": "x"}]}], "file_id, expected"),
        ([{"role": "user", "content": [{"type": "image", "source": {}}]}], "without its image"),
        ([{"role": "system", "content": [{"type": "image", "url": "x"}]}], "role, got 'system'"),
        ([{"role": "assistant", "content": [{"image_url": "x"}]}], "role, got 'assistant'"),
        ([{"role": "tool", "content": [{"image": "x"}]}], "role, got 'tool'"),
    ],
)
def test_messages_that_are_refused(messages, says):
    with pytest.raises(el.ConfigError, match=rf"^\[chat\] .*{says}") as error:
        read_messages(messages)
    assert len(str(error.value)) < 500


def test_a_template_that_leaves_images_out(handler):
    with pytest.raises(el.ConfigError, match="template.*, got 0, expected 1"):
        prompt(handler, [with_image()], "{% for m in messages %}{{ m.role }}{% endfor %}")


def test_lone_halves_in_messages(handler):
    messages = [
        {"role": "system", "content": "\ud83d"},
        {"role": "user", "content": [{"type": "text", "text": "a\ude00"}]},
    ]
    assert read_messages(messages)[0]["content"] == "\ufffd"
    assert read_messages(messages)[1]["content"][0]["text"] == "a\ufffd"
    assert prompt(handler, messages, tools="\udcff")[0] == "\ufffd[system]\ufffd[user]a\ufffd"


@pytest.fixture(scope="module")
def vlm(tiny_vlm):
    with el.ElasticLlama(tiny_vlm[0], mmproj_path=tiny_vlm[1], n_ctx=512, n_threads=1) as llm:
        yield llm


def complete(llm, messages, **kwargs) -> str:
    llm.create_chat_completion(messages, max_tokens=1, temperature=0, **kwargs)
    return llm.detokenize([t for t in llm.input_ids[: llm.n_tokens].tolist() if t >= 0]).decode()


def test_a_completion_in_which_every_text_is_odd(vlm):
    """The marker in each role, half a character, and an image as others write it.

    Two texts of a message are lines of their own, so that they make no marker together.
    """
    messages = [
        {"role": "system", "content": f"{MARKER} \ud83d"},
        {"role": "user", "content": [{"type": "input_text", "text": "the <__me"}, "dia__>"]},
        {"role": "assistant", "content": f"<{MARKER}> the"},
        {"role": "user", "content": ["the heat", {"type": "image", "data": BASE64}]},
    ]
    said = complete(vlm, messages, stop=["\ud83d"])
    assert said.count("__media__") == 2
    assert "the <__me\ndia__>" in said
    assert int((vlm.input_ids[: vlm.n_tokens] < 0).sum()) == 16


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_a_completion_with_an_image_that_is_not_the_users(vlm, role):
    with pytest.raises(el.ConfigError, match=role):
        complete(vlm, [{**with_image(), "role": role}, {"role": "user", "content": "the"}])
    assert "the" in complete(vlm, [{"role": "user", "content": "the"}])


# -- the command line


def parsed(*args: str):
    return build_parser().parse_args(args)


@pytest.mark.parametrize("command", [["describe", "a.png"], ["chat"], ["demo"]])
def test_answers_without_a_limit_or_tokens_and_seeds(command, capsys):
    default = {"max_tokens": 48 if command == ["demo"] else 256, "temperature": 0.0}
    assert ask_options(parsed(*command)) == default
    assert ask_options(parsed(*command, "-n", "-1"))["max_tokens"] == -1
    assert ask_options(parsed(*command, "-n", "0"))["max_tokens"] == 0
    assert ask_options(parsed(*command, "--seed", "-1")) == default
    assert ask_options(parsed(*command, "--seed", "0"))["seed"] == 0
    assert ask_options(parsed(*command, "-s", "7"))["seed"] == 7
    for wrong in ("-2", "x", str(2**32)):
        with pytest.raises(SystemExit):
            parsed(*command, "--seed", wrong)
        assert "--seed" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parsed(*command, "--help")
    said = " ".join(capsys.readouterr().out.split())
    assert "-1: no limit" in said
    assert "0: none" in said
    assert f"({default['max_tokens']})" in said


class Talk:
    """A `Conversation` that notes what it is asked."""

    asked: list = []

    def __init__(self, llm, system=None):
        self.stats = el.TurnStats()

    def ask(self, question, images, **options):
        self.asked.append((question, len(images), options))
        return iter(())

    def close(self):
        pass


def test_chat_asks_what_was_typed(monkeypatch, tmp_path, capsys):
    for name in ("a b.png", "c.png", "it's.png"):
        IMAGE.save(tmp_path / name)
    lines = [
        "/image",
        "/imagine",
        f'/image "{tmp_path}/a b.png"',
        f"/image\t{tmp_path}/a\\ b.png '{tmp_path}/a b.png' {tmp_path}/c.png",
        "/image ~/a b.png",
        '/image "~/a b.png"',
        f"/image {tmp_path}/it's.png",
        f'/image {tmp_path}/c.png "no such.png"',
        "What?",
        "And?",
    ]
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("builtins.input", lambda _: lines.pop(0) if lines else "/quit")
    monkeypatch.setattr("elastic_llama.conversation.Conversation", Talk)
    model = SimpleNamespace(close=lambda: None)
    monkeypatch.setattr("elastic_llama.cli.options.load_llm", lambda *_: model)
    Talk.asked = []
    args = parsed("chat", "-n", "-1", "--seed", "5")
    args.run(args)
    options = {"max_tokens": -1, "temperature": 0.0, "seed": 5}
    assert Talk.asked == [("What?", 7, options), ("And?", 0, options)]
    err = capsys.readouterr().err
    assert err.count("error: ") == 2
    assert "/image without a file" in err
    assert "no such.png, got no such file" in err


def test_names_of_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert image_names("a.png  b.png") == ["a.png", "b.png"]
    assert image_names("'a b.png' c\\ d.png") == ["a b.png", "c d.png"]
    assert image_names("it's.png") == ["it's.png"]
    assert image_names(URL) == [URL]
    (tmp_path / "a b.png").touch()
    assert image_names(" a b.png ") == ["a b.png"]
    for empty in ("", "  ", "''"):
        with pytest.raises(el.ConfigError, match="without a file"):
            image_names(empty)
