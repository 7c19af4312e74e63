"""`instructor`: answers about a picture as checked Python objects, without a server.

The form is sure. What it says depends on the model: the embedded one never learned JSON.

pip install instructor
python examples/instructor_client.py photo.jpg [-m MODEL --mmproj MMPROJ]
"""

import argparse
import base64
import mimetypes
from pathlib import Path
from typing import Literal

import instructor
from elastic_llama import ElasticLlama
from pydantic import BaseModel

Shape = Literal["circle", "square", "triangle", "star", "heart", "cross"]
Color = Literal["red", "green", "blue", "yellow", "purple", "orange", "pink", "black"]


class Thing(BaseModel):
    """One cell of the scene."""

    color: Color
    shape: Shape


parser = argparse.ArgumentParser()
parser.add_argument("picture")
parser.add_argument("-m", "--model", help="the small embedded model if none is given")
parser.add_argument("--mmproj")
args = parser.parse_args()

kind = mimetypes.guess_type(args.picture)[0] or "image/png"
data = base64.b64encode(Path(args.picture).read_bytes()).decode()
image = {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}
question = {"type": "text", "text": "What is in row 1, column 2?"}

with ElasticLlama(args.model, mmproj_path=args.mmproj, kv_budget=0.2, n_ctx=2048) as llm:
    create = instructor.patch(
        create=llm.create_chat_completion_openai_v1, mode=instructor.Mode.JSON_SCHEMA
    )
    thing = create(
        messages=[{"role": "user", "content": [image, question]}],
        response_model=Thing,
        temperature=0,
        max_tokens=64,
    )
    print("thing:", repr(thing))
    print("stats:", llm.stats)
