"""Policies side by side: what a smaller KV cache costs in answers.

items (what is asked) -> prompts (prefilled once, saved) -> answers (each policy from the saved
prompt) -> metrics -> results (one line per item) -> summary, figure.
"""
