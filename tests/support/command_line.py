"""The command line without a process of its own, which takes a second to start."""

from __future__ import annotations

import subprocess

import pytest
from elastic_llama.cli import main


def run_here(capfd: pytest.CaptureFixture[str], *args: object) -> subprocess.CompletedProcess[str]:
    """What a command prints, native code included, and how it ends."""
    capfd.readouterr()
    try:
        code = main([str(arg) for arg in args])
    except SystemExit as e:
        code = e.code
    return subprocess.CompletedProcess(args, code, *capfd.readouterr())
