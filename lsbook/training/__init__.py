"""Recipes, and the loop that follows them: see the notebooks in nbs/training."""
from .recipes import *
from .loop import *
