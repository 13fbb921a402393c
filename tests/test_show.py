"What the pictures of the book accept, refuse and promise, beyond what notebook 09 shows."
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lsbook.images
from lsbook import show

ROOT = Path(__file__).parents[1]
H, W = 20, 30
RED = np.broadcast_to(np.uint8([200, 30, 30]), (H, W, 3)).copy()
MASK = np.zeros((H, W), bool)
MASK[5:15, 8:20] = True
PICTURES = {
    "array": RED, "floats": RED / 255, "float32": (RED / 255).astype(np.float32), "pil": Image.fromarray(RED),
    "tensor": torch.from_numpy(RED).permute(2, 0, 1), "float tensor": torch.from_numpy(RED / 255).permute(2, 0, 1),
    "bfloat16": (torch.from_numpy(RED).permute(2, 0, 1) / 255).bfloat16(),
    "needs grad": (torch.from_numpy(RED).permute(2, 0, 1) / 255).requires_grad_(),
    "rgba": Image.fromarray(RED).convert("RGBA"), "rgba array": np.dstack([RED, np.full((H, W), 255, np.uint8)]),
    "palette": Image.fromarray(RED).convert("P", palette=Image.Palette.ADAPTIVE),
    "readonly": np.asarray(Image.fromarray(RED))}


@pytest.mark.parametrize("kind", PICTURES)
def test_every_form_of_one_picture_gives_the_same(kind):
    a = lsbook.images.to_array(PICTURES[kind])
    assert a.shape == (H, W, 3) and a.dtype == np.uint8
    assert abs(a.astype(int) - RED).max() <= (1 if kind == "bfloat16" else 0)
    assert show.overlay(PICTURES[kind], MASK).size == (W, H)


@pytest.mark.parametrize("bad, what, error", [
    ("photo.jpg", "photo.jpg", FileNotFoundError), (None, "NoneType", TypeError), ([[1]], "list", TypeError),
    (np.zeros((3, H, W)), r"\(3, 20, 30\).*transpose", ValueError), (np.zeros((H, W, 2)), r"\(20, 30, 2\)", ValueError),
    (np.zeros((0, W, 3)), "shape", ValueError), (np.zeros(5), "shape", ValueError),
    (torch.zeros(2, 3, H, W), "shape", ValueError), (torch.randn(3, H, W) * 9, "floats", ValueError),
    (np.full((H, W), np.nan), "NaN", ValueError), (RED.astype(float), "200", ValueError),
    (RED.astype(int), "int64", TypeError)])
def test_what_is_no_picture_says_what_came(bad, what, error):
    for call in (lsbook.images.to_array, lambda x: show.overlay(x, MASK), lambda x: show.heat(x, MASK),
                 lambda x: show.boxes(x, [0, 0, 1, 1])):
        with pytest.raises(error, match=f"(?s)^image: (?=.*wanted).*{what}"): call(bad)


@pytest.mark.parametrize("mask", [MASK[:-1], MASK[None], MASK.T, MASK * 3., MASK * -1., np.where(MASK, np.nan, 0)])
def test_bad_masks(mask):
    with pytest.raises(ValueError, match="^mask: "): show.overlay(RED, mask)


def test_masks_of_every_kind_agree():
    want = np.asarray(show.overlay(RED, MASK))
    for mask in (MASK.astype(float), torch.from_numpy(MASK), MASK[..., None], Image.fromarray(MASK),
                 Image.fromarray(MASK * np.uint8(255))):
        assert (np.asarray(show.overlay(RED, mask)) == want).all()
    assert (want[~MASK] == RED[~MASK]).all() and (want[5, 8] == (230, 159, 0)).all()
    assert (np.asarray(show.overlay(RED, ~MASK & MASK)) == RED).all()


def test_label_maps():
    labels = np.arange(H * W).reshape(H, W) % 200
    for kind in (np.uint8, np.int32, np.int64): assert show.label_overlay(RED, labels.astype(kind), 200).size == (W, H)
    assert show.label_overlay(RED, torch.from_numpy(labels)).size == (W, H)
    with pytest.raises(ValueError, match="label_map"): show.label_overlay(RED, labels, 100)
    with pytest.raises(ValueError, match="label_map"): show.label_overlay(RED, labels - 1)
    with pytest.raises(ValueError, match="label_map"): show.label_overlay(RED, labels / 2)
    with pytest.raises(ValueError, match="label_map"): show.label_overlay(RED, labels[:-1])
    assert (np.asarray(show.label_image(np.full((4, 4), 255))) == 255).all()


def test_heat_and_boxes():
    assert show.heat(RED, torch.rand(5, 5)).size == (W, H)
    with pytest.raises(ValueError, match="heatmap"): show.heat(RED, np.full((H, W), 1.5))
    assert show.boxes(RED, torch.tensor([[0., 0, 30, 20], [3, 3, 3, 3], [-5, -5, 50, 50]])).size == (W, H)
    assert show.boxes(RED, []).size == (W, H) and show.boxes(RED, [], []).size[0] >= 240
    with pytest.raises(ValueError, match="boxes"): show.boxes(RED, [9, 0, 1, 1])
    with pytest.raises(ValueError, match="names"): show.boxes(RED, [0, 0, 1, 1], ["a", "b"])


def size(fig):
    data = fig.png()
    image = Image.open(io.BytesIO(data))
    assert image.format == "PNG" and len(data) < 200_000
    return image.size


def test_figures():
    pictures = [*PICTURES.values(), np.random.rand(7, 9), torch.rand(7, 9), np.arange(63).reshape(7, 9)]
    titles = [f"picture number {i}" for i in range(len(pictures))]
    assert size(show.grid(pictures, titles, cols=5, legend={"a": (1, 2, 3)}))[0] < 1000
    assert size(show.grid([RED] * 12, cols=12))[0] < 1000
    assert size(show.grid([np.full((4, 4), np.nan), np.zeros((4, 4))])) and size(show.grid([np.array([[0., np.inf]])]))
    assert size(show.grid([torch.zeros(64, 16), RED]))
    for M in ([[1]], np.zeros((3, 40)), torch.randn(2, 2), [[np.nan]], [[-1, -2]], np.full((2, 2), 1e6)):
        assert size(show.matrix(M))
    assert size(show.curves([1], {"": [2]}, "x", "y", "title"))
    assert size(show.curves(range(100), {"a": torch.rand(3, 100)}, "x", "y"))
    assert size(show.bars({f"a rather long name {i}": [i, 2 * i] for i in range(12)}, "y"))
    assert size(show.bars({"a": -1, "b": torch.tensor([1., 2.]), "c": np.nan}, "y", "title", chance=.5))
    for bad in (lambda: show.grid([]), lambda: show.grid([RED], ["a", "b"]), lambda: show.matrix([1, 2]),
                lambda: show.matrix([[1]], rows=["a", "b"]), lambda: show.curves([1, 2], {"a": [1]}, "x", "y"),
                lambda: show.bars({}, "y"), lambda: show.colours(-1)):
        with pytest.raises(ValueError, match="wanted"): bad()
    with pytest.raises(FileNotFoundError, match=r"images\[1\]"): show.grid([RED, "x"])


def test_colours_are_distinct_and_keep_their_place():
    assert show.colours(0) == [] and show.colours(500)[:50] == show.colours(50) and len(set(show.colours(500))) == 500


def test_a_cell_shows_a_figure_once():
    bundle = show.bars({"a": 1}, "y")._repr_mimebundle_()
    assert set(bundle) == {"image/png", "text/plain"}
    code = ("import sys, lsbook.show as s; assert 'matplotlib' not in sys.modules and 'torch' not in sys.modules; "
            "s.bars({'a': 1}, 'y').png(); assert 'matplotlib.pyplot' not in sys.modules")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_versions_prints_one_line(capsys):
    show.versions()
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and torch.__version__ in out
