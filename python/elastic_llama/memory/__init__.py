"""The image memory: K/V of images, compressed before their question is known, kept by content.

A later question about the same image behind the same prompt starts from there: the image is neither
encoded nor decoded again. Entries live in RAM and, with a folder, on disk for other processes.
"""

from __future__ import annotations

from .container import DamagedFileError, Entry
from .folder import FileStatus, MemoryFolder
from .store import ImageMemory

__all__ = ["DamagedFileError", "Entry", "FileStatus", "ImageMemory", "MemoryFolder"]
