"""Words to vectors: see the notebooks in nbs/text."""
from .words import *
from .bilstm import *
from .pretrained import *
