"""Models from the Hugging Face Hub, as llama-cpp-python fetches them."""

from __future__ import annotations

from pathlib import Path

from .errors import DownloadError, message


def fetch(repo: str, filename: str) -> Path:
    """Local path of a file of a Hub repository; downloaded once, kept in the Hub's own cache.

    Raises
    ------
    DownloadError
    """
    try:
        from huggingface_hub import hf_hub_download
    except ImportError as e:
        raise DownloadError(
            message("hub", "huggingface_hub is not installed", do="pip install huggingface_hub")
        ) from e
    try:
        return Path(hf_hub_download(repo_id=repo, filename=filename))
    except Exception as e:  # the Hub's errors have no common base
        raise DownloadError(
            message(
                "hub",
                f"could not fetch {filename} of {repo}",
                f"{type(e).__name__}: {str(e).splitlines()[0] if str(e) else ''}",
                "a file of a public repository, and a network",
            )
        ) from e
