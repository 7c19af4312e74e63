"""Speed and memory: stock, elastic and ideal side by side in one run (`elastic-llama bench`).

scenarios (what is decoded) -> contexts (one llama_context each) -> measure (in turns) -> rows.
"""
