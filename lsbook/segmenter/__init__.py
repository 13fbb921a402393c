"""The interface of all five methods: see the notebooks in nbs/segmenter."""
from .encode import *
from .answer import *
from .storage import *
