"""The interface of all methods, on two tiny ones: sizes, the way back, batches, Encoded, results, models on disk."""
import copy
import inspect
import io
import json
import pickle
import re
import subprocess
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from fastcore.basics import AttrDict
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from lsbook import segmenter as S
from lsbook import show
from lsbook.files import read_tensors
from lsbook.segmenter import results as R


@dataclass
class ToyConfig:
    width: int
    long_side: int = 48
    sizes: tuple = (1, 2)
    rate: float = 1
    note: "str | None" = None


class Toy(S.SemanticSegmenter):
    """A convolution, a BatchNorm that would tell training from evaluation, a tied weight and an integer buffer."""
    method, stride = "toy", 16

    def __init__(self, config: ToyConfig):
        super().__init__()
        self.config, self.passes = config, []
        self.conv = nn.Conv2d(3, config.width, 4, stride=4)
        self.norm = nn.BatchNorm2d(config.width)
        self.again = self.conv
        self.register_buffer("count", torch.tensor(3))

    def image_features(self, pixel_values):
        self.passes.append(tuple(pixel_values.shape))
        assert not self.training and not torch.is_grad_enabled()
        return self.norm(self.conv(pixel_values))

    def encode_text(self, texts):
        seeds = [torch.Generator().manual_seed(sum(map(ord, t))) for t in texts]
        return torch.stack([torch.randn(self.config.width, generator=g) for g in seeds]).to(self.device, self.dtype)

    def label_map(self, encoded, text):
        return self.to_image_size(torch.einsum("kd,dhw->khw", text, encoded.features), encoded).argmax(0)


class Finder(S.ReferringSegmenter):
    """The heat is the red channel for "red", the green one otherwise; the network's input is the image itself."""
    method, stride = "finder", 8

    def __init__(self, config: ToyConfig, own_box=False):
        super().__init__()
        self.config, self.own_box, self.passes = config, own_box, []
        self.weight = nn.Parameter(torch.ones(1))

    def image_features(self, pixel_values):
        self.passes.append(tuple(pixel_values.shape))
        return {"rgb": pixel_values * self.weight, "sum": (pixel_values.sum(1),)}

    def heatmaps(self, encoded, texts):
        maps = [self.to_image_size(e.features["rgb"][int("red" not in t)], e) for e, t in zip(encoded, texts)]
        return maps, [(0, 0, 1.5, 2)] * len(maps) if self.own_box else None


@pytest.fixture(autouse=True)
def methods(monkeypatch):
    monkeypatch.setitem(S.METHODS, "toy", S.Method(f"{__name__}:Toy", "Toy", "semantic", "", "", ""))
    monkeypatch.setitem(S.METHODS, "finder", S.Method(f"{__name__}:Finder", "Finder", "referring", "", "", ""))


@pytest.fixture
def toy():
    torch.manual_seed(0)
    model = Toy(ToyConfig(8, rate=2.5, note="x"))
    with torch.no_grad():                                                # every label is somewhere the largest
        model.conv.weight.mul_(20)
        model.norm.running_mean.copy_(model.conv(torch.rand(1, 3, 64, 64)).mean((0, 2, 3)))
    return model


def noise(h, w, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8)


LABELS = ["grass", "red circle", "other"]


# --- sizes ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("h, w", [(48, 48), (30, 48), (1, 1), (1, 300), (3, 20_000), (20_000, 3), (500, 333), (17, 16)])
def test_answers_have_the_images_own_size(toy, h, w):
    result = toy.segment(noise(h, w), LABELS)
    assert result.label_map.shape == (h, w) and result.image.size == (w, h) and result.label_map.dtype == np.uint8
    encoded = toy.encode_image(noise(h, w))
    image_size, size, padded = encoded.frame
    assert image_size == (h, w) and max(size) == 48 and min(size) >= 1 and toy.passes[-1][2:] == padded
    assert all(p % 16 == 0 and 0 <= p - s < 16 for p, s in zip(padded, size))


def test_pixels_are_antialiased_as_torchvision_does_it(toy):
    from torchvision.transforms.v2 import functional as T
    image = noise(200, 300)
    (ours,), (frame,) = toy.preprocess([Image.fromarray(image)])
    theirs = T.resize(torch.from_numpy(image).permute(2, 0, 1).float() / 255, [32, 48], antialias=True)
    assert ours.shape == (3, 32, 48) and frame == ((200, 300), (32, 48), (32, 48))
    assert torch.allclose(ours, theirs, atol=1.5 / 255)      # Pillow rounds to bytes between its two passes


def test_defaults():
    for method in (S.Segmenter.encode_image, S.SemanticSegmenter.segment, S.ReferringSegmenter.segment):
        assert inspect.signature(method).parameters["batch_size"].default == 16
    assert S.Segmenter.stride == 1 and S.ReferringSegmenter.threshold == .5


def test_preprocess_pads_all_to_the_largest(toy):
    images = [Image.fromarray(noise(48, 48)), Image.fromarray(noise(20, 90))]
    pixel_values, frames = toy.preprocess(images)
    assert pixel_values.shape == (2, 3, 48, 48) and [f.size for f in frames] == [(48, 48), (11, 48)]
    assert [f.padded for f in frames] == [(48, 48)] * 2 and toy.frame(images[1]).padded == (16, 48)
    assert (pixel_values[1, :, 11:] == 0).all() and (pixel_values[1, :, :11] > 0).any()
    assert (pixel_values[0] * 255 == torch.from_numpy(noise(48, 48)).permute(2, 0, 1)).all()


def test_undo_is_exact_where_nothing_is_resized():
    frame, maps = S.Frame((20, 30), (20, 30), (32, 32)), torch.rand(2, 5, 32, 32)
    assert torch.equal(frame.undo(maps), maps[..., :20, :30])
    assert frame.undo(maps[0, 0].bfloat16()).dtype == torch.float32


def test_undo_against_plain_steps():
    """Up to the padded input, its padding off, on to the image's size: pixel centres keep their places."""
    maps = torch.rand(1, 1, 8, 8)
    up = torch.nn.functional.interpolate(maps, (32, 32), mode="bilinear", align_corners=False)[..., :20, :30]
    larger = torch.nn.functional.interpolate(up, (60, 90), mode="bilinear", align_corners=False)
    assert torch.equal(S.Frame((60, 90), (20, 30), (32, 32)).undo(maps[0, 0]), larger[0, 0])
    smaller = torch.nn.functional.interpolate(up, (10, 15), mode="bilinear", align_corners=False, antialias=True)
    assert torch.equal(S.Frame((10, 15), (20, 30), (32, 32)).undo(maps[0, 0]), smaller[0, 0])
    flat = torch.nn.functional.interpolate(up, (60, 15), mode="bilinear", align_corners=False, antialias=True)
    assert torch.equal(S.Frame((60, 15), (20, 30), (32, 32)).undo(maps[0, 0]), flat[0, 0])   # one side shrinks: antialiased
    assert not torch.equal(flat, torch.nn.functional.interpolate(up, (60, 15), mode="bilinear"))


def test_padding_never_reaches_the_answer():
    maps = torch.zeros(1, 32, 32)
    maps[:, 20:], maps[:, :, 30:] = 1e6, 1e6
    assert (S.Frame((60, 90), (20, 30), (32, 32)).undo(maps) == 0).all()


# --- lists, modes, Encoded -----------------------------------------------------------------------------------------

def test_a_list_gives_what_single_images_give(toy):
    images = [noise(48, 48, i) for i in range(5)] + [noise(20, 90, 7), noise(25, 90, 8), noise(1, 1)]
    alone = [toy.encode_image(one).features for one in images]
    assert not torch.allclose(alone[0], alone[1], atol=.01)
    assert min(np.bincount(toy.segment(images[0], LABELS).label_map.ravel(), minlength=3)) > 100
    for size in (1, 2, 16):
        for one, many in zip(images, toy.segment(images, LABELS, batch_size=size)):
            assert (toy.segment(one, LABELS).label_map == many.label_map).all()
        for one, many in zip(alone, toy.encode_image(images, batch_size=size)):
            assert torch.allclose(one, many.features, atol=1e-5)
    toy.passes.clear()
    toy.encode_image(images, batch_size=4)
    assert toy.passes == [(4, 3, 48, 48), (2, 3, 48, 48), (2, 3, 16, 48)]       # 11 and 13 pixels high, padded to 16


def test_a_tensor_batch_is_a_list(toy):
    batch = torch.from_numpy(np.stack([noise(40, 48, i) for i in range(3)])).permute(0, 3, 1, 2)
    results = toy.segment(batch, LABELS)
    assert len(results) == 3 and (results[1].label_map == toy.segment(noise(40, 48, 1), LABELS).label_map).all()


def test_modes_and_gradients_are_left_as_they_were(toy):
    toy.train()
    toy.norm.eval()
    before = toy.norm.running_mean.clone()
    toy.segment(noise(48, 48), LABELS)
    assert toy.training and toy.conv.training and not toy.norm.training and torch.is_grad_enabled()
    assert torch.equal(before, toy.norm.running_mean)
    toy.image_features = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        toy.segment(noise(48, 48), LABELS)
    assert toy.training and torch.is_grad_enabled()                      # also after a crash


def test_encoded_is_asked_without_the_network(toy):
    encoded = toy.encode_image([noise(48, 48), noise(20, 90)])
    toy.passes.clear()
    results = toy.segment(encoded, LABELS)
    assert not toy.passes and len(results) == 2
    assert (results[1].label_map == toy.segment(noise(20, 90), LABELS).label_map).all()
    mixed = toy.segment([encoded[0], noise(20, 90)], LABELS)
    assert (mixed[0].label_map == results[0].label_map).all() and (mixed[1].label_map == results[1].label_map).all()
    assert isinstance(toy.segment(encoded[0], LABELS), S.LabelResult)
    assert toy.segment(pickle.loads(pickle.dumps(encoded[0])), LABELS).label_map.shape == (48, 48)
    one = toy.encode_image([noise(48, 48)] * 4)[1].features             # keeps its own part of the batch alive, not the whole
    assert one.untyped_storage().nbytes() == one.numel() * one.element_size()


@pytest.mark.parametrize("change", ["step", "load", "dtype"])
def test_encoded_is_refused_once_the_weights_changed(toy, change):
    encoded = toy.encode_image(noise(48, 48))
    toy.segment(encoded, LABELS)
    if change == "step":
        optimiser = torch.optim.AdamW(toy.parameters())
        toy.conv.weight.grad = torch.ones_like(toy.conv.weight)
        optimiser.step()
    elif change == "load":
        toy.load_state_dict(copy.deepcopy(toy.state_dict()))
    else:
        toy.bfloat16()
    with pytest.raises(ValueError, match="before the weights changed"):
        toy.segment(encoded, LABELS)


def test_encoded_of_another_model_is_refused(toy):
    encoded = toy.encode_image(noise(48, 48))
    for other in (copy.deepcopy(toy), Toy(toy.config), Finder(toy.config)):
        with pytest.raises(ValueError, match=r"image\[1\]: got an Encoded made by"):
            other.segment([noise(9, 9), encoded], *(["grass"],) if other.method == "toy" else ("grass",))


def test_many_labels_need_more_than_a_byte(toy):
    names = [f"label {i}" for i in range(300)]
    toy.label_map = lambda encoded, text: torch.arange(48 * 48).view(48, 48) % len(text)
    result = toy.segment(noise(48, 48), names)
    assert result.label_map.dtype == np.int32 and result.mask_of("label 299").sum() == 7
    assert toy.segment(noise(48, 48), names[:255]).label_map.dtype == np.uint8
    assert toy.segment(noise(48, 48), names[:256]).label_map.dtype == np.int32


def test_half_precision_weights(toy):
    assert toy.bfloat16().segment(noise(48, 48), LABELS).label_map.shape == (48, 48)


# --- referring -----------------------------------------------------------------------------------------------------

def red_square():
    image = np.zeros((40, 60, 3), np.uint8)
    image[10:20, 30:45, 0], image[25:30, 5:10, 1] = 255, 255
    return image


def test_referring_pairs():
    finder, image = Finder(ToyConfig(1, long_side=60)), red_square()
    one = finder.segment(image, "red")
    assert isinstance(one, S.MaskResult) and one.box == (30, 10, 45, 20) and one.mask.sum() == 150 and one.score == 1
    assert one.heatmap.dtype == np.float32 and one.mask.dtype == bool
    assert one.heatmap.shape == one.mask.shape == (40, 60)
    finder.passes.clear()
    many = finder.segment(image, ["red", "green", "red"], batch_size=2)
    assert [r.box for r in many] == [one.box, (5, 25, 10, 30), one.box] and len(finder.passes) == 1
    assert [r.expression for r in finder.segment([image, image[:, ::-1]], "red")] == ["red", "red"]
    zipped = finder.segment([image, image[:20]], ["green", "red"])
    assert zipped[0].box == (5, 25, 10, 30) and zipped[1].box == one.box and zipped[1].mask.shape == (20, 60)
    assert isinstance(finder.segment([image], "red"), list) and isinstance(finder.segment(image, ["red"]), list)
    with pytest.raises(ValueError, match="2 images and 3 expressions"):
        finder.segment([image] * 2, ["a", "b", "c"])


def test_referring_from_encoded_empty_masks_and_own_boxes():
    finder, image = Finder(ToyConfig(1, long_side=60)), red_square()
    encoded = finder.encode_image(image)
    assert finder.segment(encoded, "red").box == (30, 10, 45, 20)
    empty = finder.segment(np.full((5, 5, 3), 40, np.uint8), "red")
    assert empty.box is None and not empty.mask.any() and empty.score == pytest.approx(40 / 255)
    assert "no box" in repr(empty)
    assert Finder(ToyConfig(1, long_side=60), own_box=True).segment(image, "red").box == (0, 0, 1.5, 2)


def test_the_heat_is_kept_in_0_to_1_and_expressions_come_in_batches():
    finder, passes = Finder(ToyConfig(1, long_side=2)), []

    def heatmaps(encoded, texts):
        passes.append(len(texts))
        return [torch.tensor([[-1., 3.]])] * len(texts), None
    finder.heatmaps = heatmaps
    results = finder.segment(np.zeros((1, 2), np.uint8), ["red"] * 5, batch_size=2)
    assert passes == [2, 2, 1] and len(results) == 5 and results[4].heatmap.tolist() == [[0, 1]]


# --- results -------------------------------------------------------------------------------------------------------

def test_label_result(toy, tmp_path):
    result = toy.segment(noise(48, 70), LABELS)
    assert sum(result.shares().values()) == pytest.approx(1)
    assert sum(result.mask_of(s).sum() for s in result.shares()) == 48 * 70
    assert (result.mask_of(" RED circle") == (result.label_map == 1)).all()
    picture, beside = result.save(tmp_path / "out.jpg")
    kept = Image.open(beside)
    assert beside.name == "out_labels.png" and kept.mode == "P" and json.loads(kept.text["labels"]) == LABELS
    assert (np.asarray(kept) == result.label_map).all() and Image.open(picture).format == "JPEG"
    colours = np.array(show.colours(3))[result.label_map]
    assert (np.asarray(kept.convert("RGB")) == colours).all()            # and to the eye it is not black


    assert result.save(tmp_path / "OUT.PNG")[0].exists()


def test_reprs_name_six_labels():
    def said(n): return repr(S.LabelResult(Image.new("RGB", (n, 1)), np.arange(n)[None], [f"l{i}" for i in range(n)]))
    assert said(6).endswith("'l5' 17%)") and said(7).endswith("'l5' 14%, ...)")


def test_printable_is_cut_at_60():
    assert R.printable("x" * 60) == "x" * 60 and R.printable("x" * 61) == "x" * 59 + "…"


def test_small_pictures_are_enlarged_and_large_ones_reduced():
    def size(w, h, limit=None): return R.sized(Image.new("L", (w, h)), limit).size
    assert size(100, 50) == (300, 150) and size(255, 1) == (510, 2)      # by a whole factor, to 256 or more
    assert size(256, 100, 128) == (128, 50) and size(300, 100, 640) == (300, 100) and size(3000, 2, 640) == (640, 1)
    stripes = Image.fromarray(np.tile(np.uint8([0, 255]), (4, 300)))
    assert set(np.unique(R.sized(stripes, 300, smooth=False))) <= {0, 255} and 100 < np.asarray(R.sized(stripes, 300))[1, 9] < 155
    assert np.unique(R.sized(Image.fromarray(np.uint8([[0, 255]])))).tolist() == [0, 255]


def test_a_legend_breaks_where_the_picture_ends():
    def height(*texts): return R.with_legend(Image.new("RGB", (10, 10)), [(None, t) for t in texts]).size
    assert height("x") == height("x" * 90) == (260, 10 + 5 + 20 + 3)     # the first is never moved down
    assert height("x" * 24, "x" * 24) == (260, 10 + 5 + 40 + 3) and height() == (260, 10)


def test_shares_of_equal_labels_keep_their_order():
    names = [f"label {i}" for i in range(40)]
    assert list(R.shares(np.arange(39).reshape(3, 13), names).items()) == [(s, 1 / 39) for s in names[:39]]


def test_pictures_drawn_beside_or_below(monkeypatch):
    def drawn(w, h, limit=None): return R.draw_labels(Image.new("RGB", (w, h)), np.zeros((h, w), int), ["a", "b"], limit)
    assert drawn(20, 10).size == (2 * 260 + 4, 130 + 28) and drawn(21, 10).size == (273, 2 * 130 + 4 + 28)
    assert drawn(600, 600, 640).size == (640, 318 + 28)
    stripes, palette = np.tile([0, 1], (600, 300)), show.colours(25)
    both = np.asarray(R.draw_labels(Image.new("RGB", (600, 600)), stripes, ["a", "b"], 640))[:318, 322:]
    assert set(map(tuple, both.reshape(-1, 3).tolist())) <= set(map(tuple, palette[:2]))   # no mixed colours
    monkeypatch.setattr("lsbook.segmenter.results.with_legend", lambda picture, rows: rows)
    assert R.draw_labels(Image.new("RGB", (3, 1)), np.array([[1, 1, 0]]), ["a", "b", "c"]) == [(palette[1], "b 67%"), (palette[0], "a 33%")]
    label_map = np.repeat(np.arange(30), np.arange(1, 31))[None]         # the last is the largest
    for n, more in ((24, []), (30, [(palette[24], "6 more")])):
        here = label_map[label_map < n][None]
        rows = R.draw_labels(Image.new("RGB", here.shape[::-1]), here, [f"l{i}" for i in range(n)])
        assert [text.split()[0] for _, text in rows[:24]] == [f"l{i}" for i in range(n)][:-25:-1] and rows[24:] == more
        assert [c for c, _ in rows[:24]] == (palette[:24] if n > 24 else palette[23::-1])


def test_the_box_is_enlarged_with_the_picture_when_drawn(monkeypatch):
    seen = []
    monkeypatch.setattr(show, "boxes", lambda image, box: seen.append(list(box)) or image)
    R.draw_mask(Image.new("RGB", (10, 5)), np.zeros((5, 10), bool), (1, 2, 3, 4), "x")
    assert seen == [[26, 52, 78, 104]]


@pytest.mark.parametrize("n", [1, 2, 3, 16, 17, 255])
def test_label_files_of_any_number_of_labels(tmp_path, n):
    label_map = np.arange(30 * 40, dtype=np.uint8).reshape(30, 40) % n
    result = S.LabelResult(Image.new("RGB", (40, 30)), label_map, [f"label {i}" for i in range(n)])
    kept = Image.open(result.save(tmp_path / "out.png")[1])
    assert kept.mode == "P" and (np.asarray(kept) == label_map).all()
    assert (np.asarray(kept.convert("RGB")) == np.array(show.colours(n))[label_map]).all()


@pytest.mark.parametrize("n", [24, 25, 300])
def test_beyond_24_labels_the_largest_have_colours(n):
    label_map = np.repeat(np.arange(n), np.arange(n, 0, -1)).astype(np.int32)[None]   # label 0 is largest
    result = S.LabelResult(Image.new("RGB", label_map.shape[::-1]), label_map, [f"label {i}" for i in range(n)])
    drawn = np.asarray(result.picture())[1 + 4, :label_map.shape[1]]     # below the picture, which is one row high
    assert (drawn == np.array(show.colours(25))[np.minimum(label_map[0], 24)]).all()


def test_of_equal_scores_the_first_label_wins(toy):
    toy.encode_text = lambda texts: torch.zeros(len(texts), 8)
    assert (toy.segment(noise(8, 8), LABELS).label_map == 0).all()


def test_the_mask_exceeds_the_threshold_and_the_score_is_its_mean():
    finder = Finder(ToyConfig(1, long_side=4))
    image = np.zeros((2, 4, 3), np.uint8)
    image[0, :, 0] = [51, 102, 153, 204]                                 # .2 .4 .6 .8
    finder.threshold = .6
    result = finder.segment(image, "red")
    assert result.mask[0].tolist() == [False, False, result.heatmap[0, 2] > .6, True] and result.box[1::2] == (0, 1)
    finder.threshold = .5
    assert finder.segment(image, "red").score == pytest.approx(.7) and finder.segment(image, "red").box == (2, 0, 4, 1)


def test_thousand_labels_draw_and_save(toy, tmp_path):
    names = [f"label {i}" for i in range(1000)]
    result = toy.segment(noise(48, 48), names)
    _, beside = result.save(tmp_path / "out.png")
    kept = Image.open(beside)
    assert (np.asarray(kept) == result.label_map).all() and json.loads(kept.text["labels"]) == names


def test_mask_result_saves(tmp_path):
    result = Finder(ToyConfig(1, long_side=60)).segment(red_square(), "red")
    picture, beside = result.save(str(tmp_path / "out.png"))
    assert (np.asarray(Image.open(beside)) == result.mask * 255).all() and beside.name == "out_mask.png"
    assert result._repr_png_()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("h, w", [(1, 1), (2, 3000), (3000, 2), (900, 1200)])
def test_pictures_of_odd_sizes(toy, h, w):
    result = toy.segment(noise(h, w), LABELS)
    shown = Image.open(io.BytesIO(result._repr_png_()))
    assert max(shown.width, 260) <= 640 and min(shown.size) > 1
    S.MaskResult(result.image, "x", result.label_map == 0, np.zeros((h, w), np.float32), (0, 0, w, h), .5).picture()


def test_words_in_pictures_are_plain(toy):
    names = ["<script>alert(1)</script>", "a\nb\tc\x1b[31m", "草 трава 🌱", "x" * 900]
    result = toy.segment(noise(30, 30), names)
    assert not re.search(r"[\n\t\x1b]", repr(result)) and not hasattr(result, "_repr_html_")
    result._repr_png_()
    mask = result.label_map == 0
    S.MaskResult(result.image, names[1] * 40, mask, mask.astype(np.float32), None, 0.)._repr_png_()


@pytest.mark.parametrize("path, error", [("no/such/out.png", FileNotFoundError), ("out.txt", ValueError),
                                         ("out", ValueError)])
def test_save_says_where_it_cannot(toy, tmp_path, path, error):
    with pytest.raises(error, match="path"):
        toy.segment(noise(8, 8), LABELS).save(tmp_path / path)


# --- models on disk ------------------------------------------------------------------------------------------------

def same(a, b):
    sa, sb = a.state_dict(), b.state_dict()
    return sa.keys() == sb.keys() and all(torch.equal(sa[k], sb[k]) for k in sa) and a.config == b.config


def test_save_weights_and_load(toy, tmp_path):
    path = S.save_weights(toy, tmp_path / "deep" / "er" / "toy.safetensors", seed=np.int64(3), command="lsbook train",
                          data=tmp_path, metrics={"mIoU": np.float32(.5), "empty": float("nan"), "far": float("inf")})
    state = torch.get_rng_state()
    for name in (path, str(path), path.parent):
        loaded = S.load(name)
        assert same(loaded, toy) and not loaded.training and loaded.again is loaded.conv
        assert loaded.config.sizes == (1, 2) and loaded.config.rate == 2.5
    assert torch.equal(state, torch.get_rng_state())                     # loading draws nothing from the caller's seed
    kept = json.loads(path.with_suffix(".json").read_text())
    assert kept["method"] == "toy" and kept["metrics"] == {"mIoU": .5, "empty": None, "far": None} and kept["versions"]["lsbook"]
    assert kept["seed"] == 3 and kept["data"] == str(tmp_path) and kept["command"] == "lsbook train"
    assert [p.name for p in path.parent.iterdir() if p.name.startswith(".")] == []
    assert (loaded.segment(noise(48, 48), LABELS).label_map == toy.segment(noise(48, 48), LABELS).label_map).all()


def test_half_storage_comes_back_in_the_models_type(toy, tmp_path):
    with torch.no_grad():
        toy.conv.bias[0] = 1e6                                           # beyond 16 bits: kept as it is
    full = S.save_weights(toy, tmp_path / "a.safetensors")
    half = S.save_weights(toy, tmp_path / "b.safetensors", half=True)
    loaded = S.load(half)
    assert loaded.conv.weight.dtype == torch.float32 and loaded.count.dtype == torch.int64
    assert torch.allclose(loaded.conv.weight, toy.conv.weight, rtol=1e-3) and loaded.conv.bias[0] == 1e6
    assert half.stat().st_size < full.stat().st_size


def test_what_load_takes_and_what_is_stored(toy, tmp_path):
    toy.register_buffer("fine", torch.tensor(1 / 3, dtype=torch.float64))
    kept = read_tensors(S.save_weights(toy, tmp_path / "a.safetensors", half=True))
    assert kept["fine"] == 1 / 3 and kept["conv.weight"].dtype == torch.float16 and len({"conv.weight", "again.weight"} & set(kept)) == 1
    del toy.fine
    path = S.save_weights(toy, tmp_path / "toy.safetensors")
    assert read_tensors(path)["conv.weight"].dtype == torch.float32
    (tmp_path / "a.json").unlink()
    assert same(S.load(tmp_path), toy)                                   # of two files, the one with metadata
    save_file(read_tensors(path), path)                                  # as another program writes it: no method in its header
    assert same(S.load(path), toy)
    path.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match="got a folder with a.safetensors, toy.safetensors; wanted one file"): S.load(tmp_path)
    assert S.config_from(Toy, {"width": 8, "rate": 1, "note": None}) == ToyConfig(8, rate=1)
    with pytest.raises(FileNotFoundError, match="no folder or file here; wanted one of"): S.load("a/b/c")


def test_pretrained_round_trip(toy, tmp_path):
    toy.save_pretrained(tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["README.md", "config.json", "model.safetensors"]
    for back in (S.load(tmp_path / "m"), Toy.from_pretrained(tmp_path / "m"), Toy.from_pretrained(str(tmp_path / "m")),
                 S.load(tmp_path / "m" / "model.safetensors")):
        assert type(back) is Toy and same(back, toy) and not back.training
    toy.save_pretrained(tmp_path / "m")                                  # again over itself
    with pytest.raises(ValueError, match="weights of 'toy'.*wanted those of 'finder'"):
        Finder.from_pretrained(tmp_path / "m")


def test_from_pretrained_is_strict(toy, tmp_path):
    toy.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"width"', '"widht"'))
    with pytest.raises(ValueError, match="got the field 'widht'.*did you mean 'width'"):
        Toy.from_pretrained(tmp_path)
    path.write_text(text)
    state = torch.get_rng_state()
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(FileNotFoundError):
        Toy.from_pretrained(tmp_path)
    assert torch.equal(state, torch.get_rng_state())


def test_a_path_comes_before_a_method(toy, tmp_path, monkeypatch):
    """What `lsbook train lseg --out lseg` has left is what `load("lseg")` reads there; an empty folder of that name is not."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lseg").mkdir()
    assert S.load("lseg").method == "lseg"
    S.save_weights(toy, "lseg/toy.safetensors")
    assert S.load("lseg").method == "toy" and S.load(S.shipped("lseg")).method == "lseg"


def test_every_method_is_what_the_table_says():
    for name in ("lseg", "step"):
        method = S.METHODS[name]
        assert S.method_class(name).method == name and S.method_class(name).task == method.task
        assert method.url.startswith("https://") and method.paper and method.venue and method.title


def test_push_to_hub_sends_the_same_files(toy, monkeypatch):
    from huggingface_hub import HfApi
    sent = {}
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **kw: AttrDict(repo_id=repo_id))

    def upload(self, *, folder_path, **kw):
        sent.update({p.name: p.read_bytes() for p in folder_path.iterdir()})
        return "commit"
    monkeypatch.setattr(HfApi, "upload_folder", upload)
    assert toy.push_to_hub("me/toy") == "commit"
    assert set(sent) == {"README.md", "config.json", "model.safetensors"}
    assert json.loads(sent["config.json"])["method"] == "toy" and b"apache-2.0" in sent["README.md"]


def test_load_from_the_hub(toy, tmp_path, monkeypatch):
    import huggingface_hub
    toy.save_pretrained(tmp_path)
    asked = []

    def download(repo_id, filename, **kw):
        asked.append((repo_id, filename, kw.get("revision"), kw.get("token")))
        return str(tmp_path / filename)
    for home in (huggingface_hub, huggingface_hub.hub_mixin):
        monkeypatch.setattr(home, "hf_hub_download", download)
    assert same(S.load("me/toy", revision="v1", token="t"), toy) and same(Toy.from_pretrained("me/toy"), toy)
    assert set(asked[:3]) == {("me/toy", "model.safetensors", "v1", "t"), ("me/toy", "config.json", "v1", "t")}


def test_copies_keep_working(toy):
    twin = copy.deepcopy(toy)
    assert same(twin, toy) and pickle.loads(pickle.dumps(toy)).config == toy.config


@pytest.mark.cuda
def test_on_a_gpu(toy, tmp_path):
    before = toy.segment([noise(48, 48), noise(20, 90)], LABELS)
    loaded = S.load(S.save_weights(toy, tmp_path / "toy.safetensors"), device="cuda")
    assert loaded.device.type == "cuda"
    after = loaded.segment([torch.from_numpy(noise(48, 48)).permute(2, 0, 1).cuda(), noise(20, 90)], LABELS)
    for a, b in zip(before, after):
        assert (a.label_map == b.label_map).mean() > .99


def test_import_is_light():
    """No transformers, open_clip, datasets, matplotlib or torchvision, and little time beyond torch's."""
    code = ("import sys, time, torch; t = time.process_time(); import lsbook.segmenter; t = time.process_time() - t; "
            "heavy = {'transformers', 'open_clip', 'datasets', 'matplotlib', 'torchvision'}; "
            "print(t, sorted(heavy & set(sys.modules)))")
    best = []
    for _ in range(3):
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
        seconds, heavy = out.split(" ", 1)
        assert heavy.strip() == "[]"
        best.append(float(seconds))
        if best[-1] < .3:
            break
    assert min(best) < .3
