"""Procedural scenes that come with language: see the notebooks in nbs/scenes."""
from .shapes import *
from .textures import *
from .drawing import *
from .language import *
