"""LangChain's `ChatLlamaCpp` with an elastic KV cache, without a server.

pip install langchain-community
python examples/langchain_in_process.py photo.jpg [-m MODEL --mmproj MMPROJ]
"""

import argparse
import base64
import mimetypes
from pathlib import Path

from elastic_llama import ElasticLlama  # before what imports llama_cpp
from langchain_community.chat_models import ChatLlamaCpp
from langchain_core.messages import HumanMessage
from pydantic import model_validator


class ChatElasticLlama(ChatLlamaCpp):
    """`ChatLlamaCpp` on an `ElasticLlama`, which is given as `client`."""

    model_path: str = ""

    @model_validator(mode="after")
    def validate_environment(self):
        """In place of the one that loads a `llama_cpp.Llama`."""
        if not isinstance(self.client, ElasticLlama):
            raise ValueError("client: expected an ElasticLlama")
        return self


parser = argparse.ArgumentParser()
parser.add_argument("picture")
parser.add_argument("-m", "--model", help="the small embedded model if none is given")
parser.add_argument("--mmproj")
args = parser.parse_args()

kind = mimetypes.guess_type(args.picture)[0] or "image/png"
data = base64.b64encode(Path(args.picture).read_bytes()).decode()
image = {"type": "image_url", "image_url": {"url": f"data:{kind};base64,{data}"}}

with ElasticLlama(args.model, mmproj_path=args.mmproj, kv_budget=0.2, n_ctx=2048) as client:
    llm = ChatElasticLlama(client=client, temperature=0, max_tokens=48)
    messages = [HumanMessage([image, {"type": "text", "text": "What is in row 1, column 2?"}])]
    messages.append(llm.invoke(messages))
    print("picture:", messages[-1].content)
    messages.append(HumanMessage("And in row 3, column 3?"))  # the picture is not read again
    print("stream:", "".join(piece.content for piece in llm.stream(messages)))
    print("stats:", client.stats)
