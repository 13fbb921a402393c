"""lsbook: five papers on segmenting images by language, built piece by piece in notebooks and exported as a library.

`import lsbook` itself is light. The names below, and the modules (`lsbook.scenes`, `lsbook.metrics`, ...), are imported when
they are first used.
"""
from importlib import import_module as _import_module

__version__ = "0.1.0"

_homes = {"load": "segmenter", "recipe": "training", "fit": "training", "evaluate": "metrics"}
__all__ = ["__version__", *_homes]


def __getattr__(name):
    if name in _homes:
        value = getattr(_import_module(f"{__name__}.{_homes[name]}"), name)
        globals()[name] = value
        return value
    if not name.startswith("_"):
        try:
            return _import_module(f"{__name__}.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"{__name__}.{name}":
                raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    from pkgutil import iter_modules
    return sorted({*globals(), *_homes, *(module.name for module in iter_modules(__path__))})
