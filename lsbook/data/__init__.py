"""Rows of four kinds, and the loaders of the field's real datasets: see the notebooks in nbs/data."""
from .rows import *
from .pixels import *
from .referring import *
from .label_maps import *
