"""lsbook: five papers on segmenting images by language, built piece by piece in notebooks and exported as a library.

`import lsbook` itself is light. The names below, and the modules (`lsbook.scenes`, `lsbook.metrics`, ...), are imported when
they are first used.
"""
from importlib import import_module as _import_module

__version__ = "0.1.0"

_homes = {"load": "segmenter", "recipe": "training", "fit": "training", "evaluate": "metrics"}
_modules = ("cli", "data", "losses", "lseg", "metrics", "scenes", "segmenter", "show", "text", "training", "vision")
__all__ = ["__version__", *_homes]


def __getattr__(name):
    if name in _homes:
        value = getattr(_import_module(f"{__name__}.{_homes[name]}"), name)
        globals()[name] = value
        return value
    if name in _modules:
        return _import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_homes, *_modules})
