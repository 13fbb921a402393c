"""GroupViT (CVPR 2022): segments that emerge from captions; see the notebooks in nbs/groupvit."""
