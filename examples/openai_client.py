"""OpenAI's client and `elastic-llama serve`: a chat, a stream, a picture, and an answer as JSON.

pip install openai
elastic-llama serve --port 8080 &
python examples/openai_client.py photo.jpg
"""

import argparse
import base64
import json
import mimetypes
from pathlib import Path

from openai import OpenAI


def picture(path: str) -> dict:
    kind = mimetypes.guess_type(path)[0] or "image/png"
    data = base64.b64encode(Path(path).read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}


parser = argparse.ArgumentParser()
parser.add_argument("picture")
parser.add_argument("--url", default="http://127.0.0.1:8080/v1")
args = parser.parse_args()
client = OpenAI(base_url=args.url, api_key="none")
options = {"model": "embedded", "max_tokens": 48, "temperature": 0}

# a picture, and another question about it: it is not encoded and read again
messages = [
    {
        "role": "user",
        "content": [picture(args.picture), {"type": "text", "text": "What is in the picture?"}],
    }
]
answer = client.chat.completions.create(messages=messages, **options).choices[0].message.content
print("picture:", answer)
messages += [
    {"role": "assistant", "content": answer},
    {"role": "user", "content": "What is at the top left?"},
]

# as a stream
print("stream: ", end="")
for event in client.chat.completions.create(messages=messages, stream=True, **options):
    if event.choices:
        print(event.choices[0].delta.content or "", end="", flush=True)
print()

# as JSON of a given form
schema = {
    "type": "object",
    "properties": {"object": {"type": "string"}, "red": {"type": "boolean"}},
    "required": ["object", "red"],
}
done = client.chat.completions.create(
    messages=[{"role": "user", "content": "Which fruit is red?"}],
    response_format={"type": "json_schema", "json_schema": {"name": "fruit", "schema": schema}},
    **options,
)
print("json:", json.loads(done.choices[0].message.content))
