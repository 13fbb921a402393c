"""The interface of all five methods: see the notebooks in nbs/segmenter."""
from ..images import to_image, to_images
from .encode import *
from .known import *
from .answer import *
from .storage import *
