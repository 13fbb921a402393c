"""Recipes, the loop that follows them, and whole runs: see the notebooks in nbs/training.

Recipes are light. What trains needs transformers, which takes seconds to import, and is looked up when it is first used.
"""
from importlib import import_module as _import_module

from .recipes import *
from .recipes import __all__ as _recipes

_later = {
    "trainer": ["BookTrainer", "FiniteLoss", "LossOf", "Progress", "StopWhenAsked", "Stream", "arguments", "beginning",
                "checkpoint_fault", "meet_rows", "newest_checkpoint"],
    "loop": ["Fit", "all_background", "fit"],
    "runs": ["experiments", "new_model", "recipe_from", "train", "versions"],
}
_homes = {name: home for home, names in _later.items() for name in names}
__all__ = [*_recipes, *_homes]


def __getattr__(name):
    if name in _homes:
        value = getattr(_import_module(f"{__name__}.{_homes[name]}"), name)
        globals()[name] = value
        return value
    if name in _later:
        return _import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *__all__, *_later})
