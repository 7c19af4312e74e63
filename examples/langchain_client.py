"""LangChain and `elastic-llama serve`.

pip install langchain-openai
elastic-llama serve --port 8080 &
python examples/langchain_client.py photo.jpg
"""

import argparse
import base64
import mimetypes
from pathlib import Path

from langchain_core.messages import HumanMessage
from langchain_openai import ChatOpenAI

parser = argparse.ArgumentParser()
parser.add_argument("picture")
parser.add_argument("--url", default="http://127.0.0.1:8080/v1")
args = parser.parse_args()

kind = mimetypes.guess_type(args.picture)[0] or "image/png"
data = base64.b64encode(Path(args.picture).read_bytes()).decode()
image = {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}

llm = ChatOpenAI(base_url=args.url, api_key="none", model="embedded", temperature=0, max_tokens=48)
messages = [HumanMessage([image, {"type": "text", "text": "What is in the picture?"}])]
messages.append(llm.invoke(messages))
print("picture:", messages[-1].content)
messages.append(HumanMessage("What is at the top left?"))
print("stream:", "".join(piece.content for piece in llm.stream(messages)))
