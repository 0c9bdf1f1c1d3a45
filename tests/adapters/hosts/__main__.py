"""``python -m tests.adapters.hosts HOST FOLDER``: run one of the programs beside this file."""

import importlib
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest.mock import MagicMock

# Packages that a host imports, and what we run does without. (ms-swift asks modelscope for a folder
# to cache data in, so that its name is a stand-in's too, in the working directory.)
ABSENT = {
    "llamafactory": "torchaudio",
    "ms_swift": "aiohttp fastapi modelscope nltk openai oss2 rouge scipy uvicorn",
    "axolotl": "bitsandbytes evaluate lm_eval mlflow numba optimum posthog schedulefree "
    "tensorboard termcolor torchao wandb",
    "verl": "codetiming hydra orjson ray torchdata wandb",
    "openrlhf": "deepspeed flash_attn pylatexenc ray torchdata",
}
# LlamaFactory's check of versions is off; axolotl is not to report home.
SETTINGS = {"DISABLE_VERSION_CHECK": "1", "AXOLOTL_DO_NOT_TRACK": "1"}


class StandIns(MetaPathFinder, Loader):
    """Modules of packages that are not there, in which every name stands for anything."""

    def __init__(self, packages: list[str]):
        self.packages = packages

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.packages:
            return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        return MagicMock(__spec__=spec, __name__=spec.name, __path__=[], __all__=[])

    def exec_module(self, module):
        pass


host, folder = sys.argv[1:]
os.environ.update(SETTINGS)
importlib.import_module("transformers.utils")  # looks for some of them, and is not to find them
sys.meta_path.append(StandIns(ABSENT[host].split()))
importlib.import_module(f"{__package__}.{host}").main(Path(folder))
