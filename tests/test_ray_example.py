"""examples/ray_caption.py with a local Ray of two actors."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "ray_caption.py"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("ray") is None or importlib.util.find_spec("pyarrow") is None,
    reason='needs ray: pip install "ray[data]"',
)
def test_captions_by_two_actors(tiny_vlm, tmp_path):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    for i in range(6):
        Image.new("RGB", (30, 20), (40 * i, 0, 0)).save(images / f"{i}.png")
    (images / "broken.png").write_text("no image")
    model, mmproj = map(str, tiny_vlm)
    command = [sys.executable, str(EXAMPLE), str(images), str(out), "-n", "8"]
    subprocess.run([*command, "-m", model, "--mmproj", mmproj], check=True, timeout=300)
    lines = [
        json.loads(line) for part in out.rglob("*.json*") for line in part.read_text().splitlines()
    ]
    said = {Path(line["file"]).name: line for line in lines}
    assert len(said) == len(lines) == 7
    assert [name for name, line in said.items() if line["error"]] == ["broken.png"]
    assert all(line["caption"] for name, line in said.items() if name != "broken.png")
