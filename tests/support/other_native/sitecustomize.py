"""With this folder in PYTHONPATH, `elastic_llama._core` comes from the folder ELASTIC_TEST_NATIVE.

Its libraries lie beside it, as installed. An editable install finds its own before anything in
PYTHONPATH, so a path alone would not do.
"""

import os
import sys
from importlib.machinery import EXTENSION_SUFFIXES, ModuleSpec
from importlib.util import spec_from_file_location

FOLDER = os.environ.get("ELASTIC_TEST_NATIVE", "")


class OtherNative:
    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> "ModuleSpec | None":
        if name != "elastic_llama._core":
            return None
        return spec_from_file_location(name, os.path.join(FOLDER, "_core" + EXTENSION_SUFFIXES[0]))


if FOLDER:
    sys.meta_path.insert(0, OtherNative)
