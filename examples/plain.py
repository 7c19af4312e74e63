"""A picture and two questions, in plain Python.

python examples/plain.py photo.jpg [-m MODEL --mmproj MMPROJ]
"""

import argparse

from elastic_llama import Conversation, ElasticLlama

parser = argparse.ArgumentParser()
parser.add_argument("picture")
parser.add_argument("-m", "--model", help="the small embedded model if none is given")
parser.add_argument("--mmproj")
args = parser.parse_args()

with ElasticLlama(args.model, mmproj_path=args.mmproj, kv_budget=0.2, n_ctx=2048) as llm:
    chat = Conversation(llm)
    print("picture: ", end="")
    for piece in chat.ask("What is in row 1, column 2?", [args.picture], max_tokens=48):
        print(piece, end="", flush=True)
    print("\nagain:", "".join(chat.ask("And in row 3, column 3?", max_tokens=48)))
    print("stats:", llm.stats)
