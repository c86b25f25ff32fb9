"""Recurrent language models that anyone can train, trust and use on an ordinary computer.

run = unrolled.train("demo")            # or unrolled.load("runs/demo-1")
run.predict("this is an")               # the likeliest next words
run.generate("the file", length=50)     # write on
run.score("this is a sentence").log_prob
run.evaluate("test")["perplexity"]
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

from unrolled.threads import share_the_processor

__version__ = "0.1.0"

if TYPE_CHECKING:
    from unrolled.errors import UnrolledError
    from unrolled.progress import Notebook
    from unrolled.recipe import Recipe, load_recipe
    from unrolled.run import Run, load
    from unrolled.training.loop import train

_HOMES = {
    "Notebook": "unrolled.progress",
    "Recipe": "unrolled.recipe",
    "Run": "unrolled.run",
    "UnrolledError": "unrolled.errors",
    "load": "unrolled.run",
    "load_recipe": "unrolled.recipe",
    "train": "unrolled.training.loop",
}

__all__ = ["Notebook", "Recipe", "Run", "UnrolledError", "load", "load_recipe", "train"]


def __getattr__(name: str) -> Any:
    """Each public name from its home when it is first asked for, so that `import unrolled` brings no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'unrolled' has no attribute {name!r}")
    if "torch" not in sys.modules:
        share_the_processor()
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
