"""STEP: the fast form against the printed equations, the shipped weights, bad input, real rows, devices."""
import json
import pickle
import random
from importlib.resources import files

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from PIL import Image

from lsbook import cli, evaluate, load, scenes
from lsbook.step.coembedding import CoEmbedding, Concatenation, Level, attend_words, pixel_weights, reread, reread_literal, unit
from lsbook.step.convgru import ConvGRU, level_of
from lsbook.step.model import STEP, LabelHead, STEPConfig, TopDown, by_image, resize, resize_nearest
from lsbook.step.train import RECIPES, VARIANTS, Expressions, refer_rows, scene_rows, shortened, words_of
from lsbook.text import WordVectors
from lsbook.training import fit, parameter_groups, recipe


TINY = dict(words=scenes.words(), vector=16, cell=16, backbone="small", width=8, atrous=24, attention=20, embed=32, folds=3,
            grid=2, maps=6, long_side=64)


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    model = STEP(STEPConfig(**{**TINY, **changes})).eval()
    for level in model.levels: torch.nn.init.normal_(level.pixel.bias)
    return model


@torch.no_grad()
def literal(m, image, text):
    "Every step from the feature maps on, as the equations are printed: nothing folded, nothing kept from fold to fold."
    c, maps = m.config, m.context(m.backbone(image))
    words, mask = m.encode_text([text])
    H = words[0] if mask is None else words[0][mask[0]]
    P = P0 = m.initial_map(1, 1, (32, 32))
    h, out, seen = torch.zeros(1, c.maps, 32, 32), [], [torch.zeros(1, 32, 32) for _ in maps]
    conv = lambda x, w: F.conv2d(x, w, padding=1)
    bias = lambda b: b.view(1, -1, 1, 1)
    for t in range(1, (c.folds if c.top_down else 1) * len(maps) + 1):
        l = level_of(t, len(maps), c.order) - 1
        v, phi = m.levels[l](maps[l])
        pixel = lambda x: x @ m.levels[l].pixel.weight.flatten(1).T + m.levels[l].pixel.bias
        under = P if c.reattend else P0
        s = reread_literal(v[0].flatten(1).T, H, pixel_weights(resize(under, v.shape[-2:]).flatten(), c.outer), pixel, m.word)
        if c.fusion == "coembed": Q = torch.einsum("chw,c->hw", unit(phi[0], 0), unit(m.fuse.psi(s), 0)).clamp(min=0)
        else:   # concatenate and convolve: the text tiled under every pixel
            both = torch.cat([v[0], s[:, None, None].expand(-1, *v.shape[-2:])])
            W = torch.cat([m.levels[l].phi.weight.flatten(1), m.fuse.psi.weight], 1)
            hidden = (torch.einsum("ek,khw->ehw", W, both) + m.levels[l].phi.bias[:, None, None]).tanh()
            Q = (torch.einsum("e,ehw->hw", m.fuse.w.weight[0], hidden) + m.fuse.w.bias).sigmoid()
        x, n = resize(Q[None, None], (32, 32)), c.maps
        seen[l] = x[0]
        if not c.top_down:
            out.append((Q, m.head(torch.cat(seen)[None])[0, 0]))
            continue
        G, C = m.gru.gates, m.gru.candidate
        f = torch.sigmoid(conv(h, G.weight[:n, :n]) + conv(x, G.weight[:n, n:]) + bias(G.bias[:n]))
        z = torch.sigmoid(conv(h, G.weight[n:, :n]) + conv(x, G.weight[n:, n:]) + bias(G.bias[n:]))
        new = torch.tanh(conv(f * h, C.weight[:, :n]) + conv(x, C.weight[:, n:]) + bias(C.bias))
        h = z * h + (1 - z) * new
        P = m.head(h)
        out.append((Q, P[0, 0]))
    return out


# --- every equation and constant, exactly ----------------------------------------------------------------------------------------

def close(a, b, atol=1e-5):
    return torch.allclose(torch.as_tensor(a).float(), torch.as_tensor(b).float(), atol=atol)


def test_exact_order_of_the_levels():
    assert [level_of(t) for t in range(1, 12)] == [1, 2, 3, 4, 5, 1, 2, 3, 4, 5, 1]
    assert [level_of(t, 4, "deep") for t in range(1, 7)] == [4, 3, 2, 1, 4, 3]
    with pytest.raises(ValueError, match="order"): level_of(1, order="up")


def test_exact_weights_of_pixels():
    "A perfect mask on 10 % of 1,600 pixels has e / (e + 9) = 23 % of a softmax of probabilities."
    sure = torch.full((1600,), -50.)
    sure[:160] = 50
    assert close(pixel_weights(sure)[:160].sum(), np.e / (np.e + 9)) and close(pixel_weights(sure, "P")[:160].sum(), .23197)
    assert close(pixel_weights(sure, "logits")[:160].sum(), 1) and close(pixel_weights(sure, "sum")[:160], 1 / 160)
    two = torch.tensor([[0., np.log(3)], [1, 1]])       # P = 1/2 and 3/4
    assert close(pixel_weights(two, "logits")[0], [1 / 4, 3 / 4]) and close(pixel_weights(two, "sum")[0], [.4, .6])
    for outer in ("P", "logits", "sum"): assert close(pixel_weights(two, outer).sum(-1), 1)
    with pytest.raises(ValueError, match="outer"): pixel_weights(two, "softmax")


def test_exact_reading_of_the_words():
    "Two pixels, two words: votes 1/2, 1/2 and 1/4, 3/4; the pixels count 1/4 and 3/4."
    v, h = torch.tensor([[0.], [np.log(3)]]).float(), torch.tensor([[0., 8], [1, 0]])
    p, same = torch.tensor([1 / 4, 3 / 4]), torch.nn.Identity()
    word = lambda h: h[:, :1]
    want = (1 / 4 * 1 / 2 + 3 / 4 * 1 / 4) * h[0] + (1 / 4 * 1 / 2 + 3 / 4 * 3 / 4) * h[1]
    assert close(reread_literal(v, h, p, same, word), want)
    pixel = torch.nn.Conv2d(1, 1, 1)
    with torch.no_grad(): pixel.weight[:], pixel.bias[:] = 1, 0
    A = attend_words(v.view(1, 1, 1, 2), word(h)[None, None], pixel)
    assert A.shape == (1, 1, 2, 2) and close(A[0, 0], [[1 / 2, 1 / 4], [1 / 2, 3 / 4]])
    s, weights = reread(A, p[None, None], h[None, None])
    assert close(s[0, 0], want) and close(weights[0, 0], want @ torch.tensor([[0, 1], [1 / 8, 0]]))
    with torch.no_grad(): pixel.bias[:] = np.log(2)           # the second word has the key 1, the first 0
    mask = torch.tensor([[[True, True]], [[False, True]]])
    both = attend_words(v.view(1, 1, 1, 2).expand(2, -1, -1, -1), word(h)[None, None].expand(2, -1, -1, -1), pixel, mask)
    assert close(both[0, 0], [[1 / 3, 1 / 7], [2 / 3, 6 / 7]]) and close(both[1, 0], [[0, 0], [1, 1]])


def test_exact_co_embedding():
    x = torch.tensor([[1., 2], [-1, 0]])
    t1, t2 = np.tanh(1), np.tanh(2)
    assert close(unit(x, 0), [[t1 / (2 * t1 ** 2) ** .5, 1], [-t1 / (2 * t1 ** 2) ** .5, 0]])
    assert close(unit(x, 1)[0], [t1 / (t1 ** 2 + t2 ** 2) ** .5, t2 / (t1 ** 2 + t2 ** 2) ** .5])
    m = CoEmbedding(2, 2)
    with torch.no_grad(): m.psi.weight.copy_(torch.eye(2)), m.psi.bias.zero_()
    phi = m.pixels(torch.tensor([[1., -1], [1, 0]]).view(1, 2, 1, 2))         # (1, 1) and (-1, 0), made unit vectors
    score = m(phi, torch.tensor([[[9., 9], [50, 0]]]))
    assert close(score[0, :, 0], [[1, -.5 ** .5], [.5 ** .5, -1]], 1e-4) and close(m.heatmap(score), score.clamp(min=0))
    assert close(m.logits(score), 10 * (score - .5))
    both = Concatenation(2, 1)
    with torch.no_grad(): both.psi.weight[:], both.w.weight[:], both.w.bias[:] = 1, 2, .25
    score = both(both.pixels(torch.tensor([.5]).view(1, 1, 1, 1)), torch.tensor([[[.25, .25]]]))
    assert close(score, 2 * t1 + .25) and close(both.heatmap(score), 1 / (1 + np.exp(-2 * t1 - .25))) and close(both.logits(score), score)
    count = lambda m: sum(p.numel() for p in m.parameters())
    assert count(Concatenation(5, 7)) == count(CoEmbedding(5, 7)) + 1


def test_exact_level():
    "Spatial code beside the map, a 3x3 convolution of rate 3, ReLU; phi comes from v."
    x, (m, normed) = torch.randn(2, 3, 5, 6), (Level(3, 4, 7, 8), Level(3, 4, 7, 8, norm=True))
    from lsbook.vision import spatial_code
    both = torch.cat([x, spatial_code(5, 6).expand(2, -1, -1, -1)], 1)
    v, phi = m(x)
    assert close(v, F.conv2d(both, m.atrous[0].weight, m.atrous[0].bias, padding=3, dilation=3).relu()) and (v == 0).any()
    assert close(phi, F.conv2d(v, m.phi.weight, m.phi.bias)) and m.pixel.weight.shape == (7, 4, 1, 1)
    v = F.batch_norm(F.conv2d(both, normed.atrous[0].weight, padding=3, dilation=3), None, None, training=True).relu()
    assert close(normed(x)[0], v, 1e-4) and normed.atrous[0].bias is None


def test_exact_recurrence():
    "One cell by hand: z keeps the old state, the reset comes before the recurrent convolution."
    m = ConvGRU(1, kernel=1)
    sigma = lambda x: 1 / (1 + np.exp(-x))
    with torch.no_grad():   # columns: h, x; rows of the gates: f, z
        m.gates.weight.copy_(torch.tensor([[1., 2], [3, 4]]).view(2, 2, 1, 1)), m.gates.bias.copy_(torch.tensor([.1, -.2]))
        m.candidate.weight.copy_(torch.tensor([[.5, -1.]]).view(1, 2, 1, 1)), m.candidate.bias.fill_(.3)
    h, x = .6, -.4
    f, z = sigma(h + 2 * x + .1), sigma(3 * h + 4 * x - .2)
    new = np.tanh(.5 * f * h - x + .3)
    assert close(m(torch.tensor([[[[x]]]]), torch.tensor([[[[h]]]])), z * h + (1 - z) * new)
    m = ConvGRU()
    assert m.maps == 32 and m.gates.weight.shape == (64, 33, 3, 3) and m.candidate.weight.shape == (32, 33, 3, 3)
    assert m(torch.rand(2, 1, 7, 5), torch.zeros(2, 32, 7, 5)).shape == (2, 32, 7, 5)
    with pytest.raises(ValueError, match="kernel"): ConvGRU(kernel=2)


def test_exact_defaults():
    "The paper's 5-fold model, read plainly; every deviation is off."
    c = STEPConfig()
    assert (c.folds, c.maps, c.embed, c.attention, c.cell, c.vector, c.max_words, c.long_side) == (5, 32, 1000, 400, 1000, 300, 20, 320)
    assert (c.order, c.p0, c.outer, c.join, c.fusion, c.supervise) == ("shallow", "uniform", "P", "concat", "coembed", "last")
    assert (c.backbone, c.weights, c.glove, c.frozen, c.grid, c.atrous, c.width) == ("resnet101", None, None, False, 8, 256, 24)
    assert c.mask_padding and c.top_down and c.reattend
    assert (c.context, c.norm, c.dice, c.raw, c.dense) == (0, False, 0, 0, [])
    with torch.device("meta"): m = STEP(STEPConfig(words=["a"]))
    level = lambda c: 9 * (c + 8) * 256 + 256 + 257 * (400 + 1000)                         # atrous convolution, v~ and phi
    ours = sum(map(level, (64, 256, 512, 1024, 2048))) + 2001 * (400 + 1000) + (9 * 33 + 1) * 96 + 33
    assert sum(p.numel() for n, p in m.named_parameters() if n.split(".")[0] not in ("text", "backbone")) == ours and m.text.dim == 2000
    assert m.backbone.channels == (64, 256, 512, 1024, 2048) and m.stride == 8


def test_exact_small_parts():
    two = torch.tensor([[[[0., 1]]]])
    assert resize(two, (1, 4)).flatten().tolist() == [0, .25, .75, 1] and resize(two, (1, 2)) is two
    assert resize_nearest(np.array([[0, 7, 9]]), (1, 6)).tolist() == [[0, 0, 7, 7, 9, 9]]
    assert resize_nearest(np.arange(8)[None], (1, 2)).tolist() == [[2, 6]]
    filled, present = by_image([["a", "b"], ["c"]])
    assert filled == [["a", "b"], ["c", "c"]] and present.tolist() == [[True, True], [True, False]]
    m = tiny(p0="centre")
    bump = m.initial_map(2, 3, (5, 3))
    assert bump.shape == (2, 3, 5, 3) and bump[1, 2, 2, 1] == 2 and bump[0, 0, 0, 1] == bump[0, 0, 2, 0] == -2 and bump[0, 0, 4, 2] == -6
    assert not tiny().initial_map(1, 1, (4, 4)).any()


def test_exact_top_down_path():
    m, maps = TopDown((2, 3), 4).eval(), [torch.randn(1, 2, 8, 8), torch.randn(1, 3, 4, 4)]
    deep = m.smooth[1](F.conv2d(maps[1], m.side[1].weight, m.side[1].bias))
    fine = F.conv2d(maps[0], m.side[0].weight, m.side[0].bias) + F.interpolate(deep, (8, 8), mode="bilinear")
    got = m(maps)
    assert close(got[1], deep) and close(got[0], m.smooth[0](fine)) and [x.shape[1] for x in got] == [4, 4]
    conv, norm, relu = m.smooth[0]
    assert conv.bias is None and conv.kernel_size == (3, 3) and isinstance(norm, torch.nn.BatchNorm2d) and isinstance(relu, torch.nn.ReLU)


def test_exact_label_head():
    m, x = LabelHead(5, ["red star", "grass", "sand"]), torch.randn(2, 5, 3, 4)
    target = torch.randint(0, 3, (2, 6, 8))
    target[0, 1] = 255
    logits = 10 * torch.einsum("bchw,nc->bnhw", F.normalize(m.pixel(x), dim=1), WordVectors(["red star", "grass", "sand"])(["red star", "grass", "sand"]))
    assert close(m(x, target), F.cross_entropy(logits, target[:, 1::2, 1::2], ignore_index=255))


def test_exact_batches():
    m = tiny(dense=scenes.label_names())
    mask = np.zeros((16, 32), np.uint8)
    mask[:8, 16:] = 1
    row = dict(image=Image.new("RGB", (32, 16), (0, 51, 255)), expression=["the star", "the cross"], mask=[mask, 255 * mask.T.reshape(16, 32)],
               label_map=3 * mask)
    batch = m.collate([row, dict(image=row["image"], expression="the star", mask=mask)])
    assert batch["images"].shape == (2, 3, 64, 64) and batch["masks"].shape == (2, 2, 64, 64) and batch["texts"][1] == ["the star"]
    assert close(batch["images"][0, :, 5, 5], [0, .2, 1]) and not batch["images"][:, :, 32:].any()
    big = torch.from_numpy(mask).repeat_interleave(2, 0).repeat_interleave(2, 1)
    assert torch.equal(batch["masks"][0, 0, :32], big.float()) and not batch["masks"][:, :, 32:].any()
    assert torch.equal(batch["masks"][1, 0], batch["masks"][0, 0]) and not batch["masks"][1, 1].any()
    assert set(batch["masks"].unique().tolist()) == {0, 1}
    assert torch.equal(batch["label_map"][0, :32], 3 * big.long()) and (batch["label_map"][0, 32:] == 255).all()
    assert (batch["label_map"][1] == 255).all() and "label_map" not in tiny().collate([row])


def test_exact_frozen_trunk():
    m = tiny(frozen=True).train()
    assert not m.backbone.training and m.levels.training and not any(p.requires_grad for p in m.backbone.parameters())
    assert all(p.requires_grad for p in m.levels.parameters()) and tiny().train().backbone.training
    assert tiny(frozen=True, vector=9).config.vector == 9


def test_exact_words():
    m, padded = tiny(), tiny(mask_padding=False)
    words, mask = m.encode_text(["the star", "the large red star"])
    assert mask.tolist() == [[True, True, False, False], [True] * 4] and words.shape == (2, 4, 32)
    all_places, none = padded.encode_text(["the star", "the large red star"])
    assert none is None and all_places.shape == (2, 20, 32) and not all_places[0, 2:].any()
    features, mask = m.encode_expressions([["the star", "the cross"], ["the cross", "the star"]])
    assert torch.equal(features[0, 0], features[1, 1]) and torch.equal(features[0, 1], features[1, 0])
    assert not torch.equal(features[0, 0], features[0, 1]) and mask.shape == (2, 2, 2)


def test_exact_trace():
    m, image = tiny(order="deep"), scenes.scene(0).image
    t, (steps,) = m.trace(image, "the red star", folds=2), m.run([m.encode_image(image)], ["the red star"], 2)
    assert t.levels == [4, 3, 2, 1] * 2 and t.words == ["the", "red", "star"] and close(t.weights.sum(1), 1)
    assert len(m.trace(image, "the red star").levels) == 12
    e = m.encode_image(image)
    assert close(t.P, torch.stack([m.to_image_size(s.logits, e).sigmoid() for s in steps]))
    assert close(t.Q, torch.stack([m.to_image_size(s.score.relu(), e) for s in steps])) and (t.Q >= 0).all()


def test_exact_recipes():
    "The numbers that are printed, those of the family's code where nothing is, and the book's own."
    for name, args, train in (("paper", ("refcoco", "unc"), {}), ("refcoco+", ("refcoco+", "unc"), {}), ("refcocog", ("refcocog", "google"), {}),
                              ("referit", ("refclef", "berkeley"), dict(train=("train", "val")))):
        r = RECIPES[name]
        assert (r.steps, r.batch_size, r.lr, r.optimizer, r.weight_decay) == (700_000, 1, 2.5e-4, "adam", 5e-4)
        assert (r.schedule, r.no_decay, r.eval_every) == ("polynomial", ("text.",), 20_000)
        assert r.config == dict(words=[], weights="COCO_WITH_VOC_LABELS_V1", frozen=True)
        assert r.rows.args == args and r.rows.keywords == train
    r = RECIPES["scenes"]
    assert (r.steps, r.batch_size, r.lr, r.weight_decay, r.warmup, r.clip, r.eval_every) == (2400, 16, 3e-3, .01, 150, 1, 400)
    assert r.lr_scale == {"gru": 3., "head": 10.} and (r.optimizer, r.schedule) == ("adamw", "cosine")
    assert r.config == dict(words=scenes.words(), vector=64, cell=64, backbone="small", width=24, context=48, norm=True, atrous=64,
                            attention=64, embed=128, folds=1, order="deep", grid=2, maps=16, outer="logits", supervise="every", dice=.5,
                            raw=1., dense=scenes.label_names(), long_side=64)
    short = shortened(150)
    assert shortened(2400) is r and (short.steps, short.warmup, short.eval_every) == (150, 15, 150)
    assert short.lr_scale == {"gru": 4., "head": 30.} and short.config == r.config
    assert VARIANTS == {
        "K = 1": {}, "K = 2": dict(folds=2), "K = 3": dict(folds=3), "K = 5": dict(folds=5), "concatenated": dict(fusion="concat"),
        "words read once": dict(reattend=False), "no top-down": dict(top_down=False),
        "no top-down, judged last": dict(top_down=False, supervise="last"), "softmax of P": dict(outer="P"),
        "P over its sum": dict(outer="sum"), "heatmaps not judged": dict(raw=0.),
        "printed loss": dict(supervise="last", dice=0., raw=0., dense=[]), "no words": {}}


def test_exact_rows_of_expressions():
    train, valid = scene_rows()
    assert (len(train), train.each, train.blank, train.kind) == (100_000, 4, False, dict(split="train")) and len(valid) == 200
    assert np.array_equal(valid[3]["image"], scenes.rows("referring", 200, split="valid")[3]["image"])
    random.seed(0)
    counts = {}
    for i in range(40):
        scene, row = scenes.scene(i, split="train"), train[i]
        kinds = {text: kind for text, _, kind in scene.expressions()}
        things = {text: thing for text, thing, _ in scene.expressions()}
        assert len(row["expression"]) == len(row["mask"]) == 4 and np.array_equal(row["image"], scene.image)
        assert all(np.array_equal(m, scene.things[things[t]].mask) for t, m in zip(row["expression"], row["mask"]))
        assert np.array_equal(row["label_map"], scene.label_map)
        drawn = [kinds[t] for t in row["expression"]]
        assert len(set(drawn)) == len(set(kinds.values()))            # each of at most four kinds is drawn
        for kind in drawn: counts[kind] = counts.get(kind, 0) + 1
    assert len({tuple(train[7]["expression"]) for _ in range(20)}) > 10  # drawn anew each time
    kinds = {text: kind for text, _, kind in scenes.scene(7).expressions()}
    assert {kinds[Expressions(9, each=1)[7]["expression"][0]] for _ in range(60)} == set(kinds.values())   # the kind, too
    assert set(Expressions(9, each=3, blank=True)[8]["expression"]) == {"the thing"} and len(Expressions(9, each=3)[8]["mask"]) == 3
    for wrong in (9, -1):
        with pytest.raises(IndexError): Expressions(9)[wrong]


def test_exact_splits(monkeypatch):
    def refer(root, name, split_by, split): return Dataset.from_dict({"read": [f"{root} {name} {split_by} {split}"]})
    monkeypatch.setattr("lsbook.step.train.refer", refer)
    train, valid = refer_rows("refcoco", "unc", "here")
    assert train["read"][:] == ["here refcoco unc train"] and valid["read"][:] == ["here refcoco unc val"]
    assert len(refer_rows("refclef", "berkeley", "here", ("train", "val"))[0]) == 2


def test_exact_vocabulary():
    lines = [dict(expression=text) for text in ("the red bus", "the bus", "a red zebra", "the zebras")]
    assert words_of(lines)[0] == "the" and set(words_of(lines)) == {"the", "red", "bus", "a", "zebra", "zebras"}
    assert words_of(lines, 2) == ["the", "bus", "red"]
    assert words_of(scenes.rows("referring", 20)) == words_of(list(scenes.rows("referring", 20)))


@pytest.mark.parametrize("changes", [{}, dict(outer="logits", order="deep"), dict(outer="sum", join="sum", p0="centre"),
                                     dict(context=16, norm=True), dict(mask_padding=False), dict(fusion="concat"),
                                     dict(reattend=False, outer="logits", p0="centre"), dict(top_down=False)], ids=str)
def test_the_fast_form_is_the_printed_one(changes):
    m, scene = tiny(**changes), scenes.scene(3)
    text = "the red circle left of the blue star"
    want = literal(m, torch.from_numpy(scene.image).permute(2, 0, 1)[None] / 255, text)
    e = m.encode_image(scene.image)
    with torch.no_grad(): got = m.run([e, e], ["the circle", text])[1]
    assert len(got) == len(want) == (12 if m.config.top_down else 4)
    for (Q, P), step in zip(want, got):
        assert torch.allclose(m.fuse.heatmap(step.score), Q, atol=1e-5) and torch.allclose(step.logits, P, atol=1e-5)


@pytest.mark.parametrize("changes", [dict(top_down=False), dict(reattend=False), dict(fusion="concat"),
                                     dict(supervise="every", dice=.5, raw=1.), dict(norm=True, context=12)], ids=str)
def test_every_variant_trains_and_answers(changes):
    m = tiny(**changes).train()
    batch = m.collate([Expressions(10, 3)[0], scenes.rows("referring", 1)[0]])
    out = m(**batch)
    out.loss.backward()
    assert out.logits.shape == (2, 3, 64, 64) and all(p.grad is not None for p in m.parameters())
    assert m.segment(scenes.scene(1).image, "the red circle").mask.shape == (64, 64) and m.training


def test_the_loss_is_the_sum_of_what_the_config_asks_for():
    m = tiny(supervise="every", dice=.5, raw=2., dense=scenes.label_names())
    batch = m.collate([Expressions(10, 2)[0]])
    y, steps = batch["masks"], m.steps(m.image_features(batch["images"]), *m.encode_expressions(batch["texts"]))
    bce = F.binary_cross_entropy_with_logits
    def dice(x, y):
        p = x.sigmoid()
        return (1 - (2 * (p * y).sum((-1, -2)) + 1) / (p.sum((-1, -2)) + y.sum((-1, -2)) + 1)).mean()
    large = [F.interpolate(s.logits, (64, 64), mode="bilinear") for s in steps]
    every = sum(bce(x, y) + .5 * dice(x, y) for x in large) / 12
    raw = sum(bce(10 * (s.score - .5), F.avg_pool2d(y, 64 // s.score.shape[-1])) for s in steps[:4]) / 4
    x = m.feature_maps(batch["images"])[0]
    logits = 10 * torch.einsum("bchw,nc->bnhw", F.normalize(m.label.pixel(x), dim=1), m.label.names)
    label = F.cross_entropy(logits, batch["label_map"][:, 1::2, 1::2])
    want = every + 2 * raw + label
    assert torch.isclose(m(**batch).loss, want, atol=1e-4)
    m.config.supervise = "last"
    assert torch.isclose(m(**batch).loss, bce(large[-1], y) + .5 * dice(large[-1], y) + 2 * raw + label, atol=1e-4)
    m.config.raw = m.config.dice = 0.
    del batch["label_map"]
    assert torch.isclose(m(**batch).loss, bce(large[-1], y), atol=1e-5)


def test_a_config_that_cannot_be_meant():
    for wrong in (dict(p0="center"), dict(supervise="all"), dict(fusion="concatenate"), dict(order="up"), dict(outer="softmax"), dict(join="add")):
        with pytest.raises(ValueError, match=next(iter(wrong))): STEPConfig(**wrong)
    with pytest.raises(ValueError, match="folds"): STEPConfig(folds=0)
    m = tiny()
    for folds in (0, -1):
        with pytest.raises(ValueError, match="folds"): m.trace(scenes.scene(0).image, "the star", folds)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    image = scenes.scene(0).image
    want = load("step").segment(image, "the leftmost thing").heatmap
    got = load("step").to(dtype).segment(image, "the leftmost thing").heatmap
    assert np.abs(got - want).mean() < (.02 if dtype == torch.bfloat16 else 1e-4)


def test_the_papers_recipe_spares_the_words():
    r, m = recipe("step", "paper"), tiny()
    groups = {n: g["weight_decay"] for g in parameter_groups(m, r) for n in g["names"]}
    assert groups["text.embedding.weight"] == 0 == groups["text.lstm.weight_hh_l0"] and groups["gru.gates.weight"] == 5e-4


def test_what_fills_up_a_batch_changes_nothing():
    m, rows = tiny(), [Expressions(10, 3)[0], scenes.rows("referring", 2)[1]]
    both = m(**m.collate(rows))
    alone = [m(**m.collate([r])) for r in rows]
    assert torch.allclose(both.logits[1, :1], alone[1].logits[0], atol=1e-5)
    assert torch.isclose(both.loss, (3 * alone[0].loss + alone[1].loss) / 4, atol=1e-5)


def test_several_expressions_several_images_and_sizes():
    m, image = tiny(), scenes.scene(0).image
    texts = ["the red thing", "the leftmost circle"]
    together, apart = m.segment(image, texts), [m.segment(image, t) for t in texts]
    for a, b in zip(together, apart): assert np.allclose(a.heatmap, b.heatmap, atol=1e-5)
    images = [image, scenes.scene(1, size=96).image[:50], np.zeros((1, 7, 3), np.uint8)]
    for im, r in zip(images, m.segment(images, "the star")):
        assert r.mask.shape == im.shape[:2] and np.allclose(r.heatmap, m.segment(im, "the star").heatmap, atol=1e-5)


def test_bad_words():
    m, image = tiny(), scenes.scene(0).image
    for blank in ("", "  ", "\n"):
        with pytest.raises(ValueError, match="expression"): m.segment(image, blank)
    with pytest.raises(TypeError): m.segment(image, 3)
    with pytest.warns(UserWarning, match="zebra"): assert m.segment(image, "zebra quux").heatmap.shape == (64, 64)
    with pytest.warns(UserWarning, match="cut"): long = m.segment(image, "red " * 500)
    assert np.allclose(long.heatmap, m.segment(image, "red " * 20).heatmap)
    with pytest.raises(ValueError, match="words"): STEP(STEPConfig())


def test_the_shipped_model_answers_whatever_it_is_asked():
    m, image = load("step"), scenes.scene(0).image
    with pytest.raises(ValueError, match="expression"): m.segment(image, " ")
    with pytest.warns(UserWarning, match="zebra"): assert m.segment(image, "the zebra").mask.shape == (64, 64)
    with pytest.warns(UserWarning, match="cut"): m.segment(image, "the red circle " * 170)
    a, b = m.segment(image, ["the leftmost thing", "the rightmost thing"])
    assert (a.expression, b.expression) == ("the leftmost thing", "the rightmost thing") and not np.allclose(a.heatmap, b.heatmap)
    sizes = [image, scenes.scene(1, size=128).image[:90], scenes.scene(2, size=96).image[:, :50]]
    assert [r.mask.shape for r in m.segment(sizes, "the circle")] == [(64, 64), (90, 128), (96, 50)]


def test_bad_rows():
    m, row = tiny(), scenes.rows("referring", 1)[0]
    with pytest.raises(ValueError, match="masks"): m.collate([dict(row, expression=["a", "b"], mask=[row["mask"]])])
    with pytest.raises(ValueError, match="size"): m.collate([dict(row, mask=np.zeros((3, 4)))])
    with pytest.raises(ValueError, match="no expression"): m.collate([dict(row, expression=[], mask=[])])
    taught = tiny(dense=scenes.label_names())
    with pytest.raises(ValueError, match="label map"): taught.collate([dict(row, label_map=np.zeros((32, 64)))])
    some = taught.collate([Expressions(2)[0], row])   # one row has no label map: it does not count, the other does
    assert (some["label_map"][1] == 255).all() and (some["label_map"][0] < 255).all()
    none = taught.train()(**taught.collate([row]))
    none.loss.backward()
    assert all(p.grad is not None for p in taught.parameters())
    assert len(list(Expressions(2))) == 2


def test_what_trace_refuses():
    m, other, image = tiny(), tiny(1), scenes.scene(0).image
    with pytest.raises(ValueError, match="Encoded"): m.trace(other.encode_image(image), "the star")
    for picture, text in ((image, ["the star", "the circle"]), ([image, image], "the star")):
        with pytest.raises(ValueError, match="one of each"): m.trace(picture, text)
    with pytest.raises(ValueError, match="expression"): m.trace(image, " ")


def test_the_loop_compiles_in_one_graph():
    m = tiny()
    with torch.no_grad():
        levels, words = m.image_features(torch.rand(1, 3, 64, 64)), m.encode_expressions([["the red circle", "the star"]])
        a, b = m.steps(levels, *words), torch.compile(m.steps, fullgraph=True, backend="eager")(levels, *words)
    assert all(torch.allclose(x.logits, y.logits, atol=1e-5) for x, y in zip(a, b))


def test_folds_go_on_where_the_last_ended_and_cost_no_weights():
    m, one = tiny(), tiny(folds=1)
    assert sum(p.numel() for p in m.parameters()) == sum(p.numel() for p in one.parameters())
    e = m.encode_image(scenes.scene(0).image)
    with torch.no_grad():
        few, many = (m.run([e], ["the red circle"], k)[0] for k in (1, 3))
    assert len(few) == 4 and len(many) == 12
    assert all(torch.equal(a.logits, b.logits) for a, b in zip(few, many))


def test_the_features_of_an_image_and_the_words_are_computed_once_for_all_folds():
    m, seen = tiny(), []
    for part in (*m.levels, m.backbone, m.text): part.register_forward_hook(lambda *a: seen.append(1))
    m.text.lstm.register_forward_hook(lambda *a: seen.append("words"))
    m.segment(scenes.scene(0).image, ["the star", "the circle", "the star"])
    assert seen.count(1) == 5 and seen.count("words") == 1   # four levels and a backbone; one call of the LSTM


gpu = pytest.mark.cuda


@gpu
def test_the_same_on_a_gpu():
    text = "the red circle"
    for m in (tiny(), load("step")):
        image = scenes.scene(0).image
        cpu = m.cpu().segment(image, text).heatmap
        m.cuda()
        assert np.allclose(cpu, m.segment(image, text).heatmap, atol=1e-3)
        with torch.autocast("cuda", torch.bfloat16):
            assert np.allclose(cpu, m.segment(image, text).heatmap, atol=2e-2)


@gpu
def test_a_training_step_on_a_gpu():
    m = tiny(supervise="every", dice=.5, raw=1.).train()
    batch = m.collate([Expressions(10, 3)[0]])
    want = m(**batch).loss.item()
    got = m.cuda()(**{k: v.cuda() if torch.is_tensor(v) else v for k, v in batch.items()}).loss
    got.backward()
    assert abs(got.item() - want) < 1e-3 and all(p.grad is not None for p in m.parameters())


@gpu
def test_the_loop_compiles_on_a_gpu():
    m = tiny().cuda()
    with torch.no_grad():
        levels, words = m.image_features(torch.rand(1, 3, 64, 64, device="cuda")), m.encode_expressions([["the red circle", "the star"]])
        a, b = m.steps(levels, *words), torch.compile(m.steps, fullgraph=True)(levels, *words)
    assert all(torch.allclose(x.logits, y.logits, atol=1e-3) for x, y in zip(a, b))


def refer_folder(root, n=3):
    "Scenes in the official layout of RefCOCO: refs(unc).p, instances.json with run lengths, photographs."
    photos, refs, images, shapes = root / "images/mscoco/images/train2014", [], [], []
    photos.mkdir(parents=True); (root / "refcoco").mkdir()
    for i in range(n):
        scene, size = scenes.scene(i, size=80), (70, 80)
        Image.fromarray(scene.image[:70]).save(photos / f"COCO_train2014_{i:012}.jpg")
        images.append(dict(id=i, file_name=f"COCO_train2014_{i:012}.jpg", height=70, width=80))
        text, k, _ = scene.expressions()[0]
        flat = scene.things[k].mask[:70].T.ravel().astype(int)
        ends = np.flatnonzero(np.diff(flat)) + 1
        runs = np.diff([0, *ends, len(flat)]).tolist()
        shapes.append(dict(id=i, image_id=i, category_id=1, bbox=[0, 0, 80, 70],
                           segmentation=dict(size=list(size), counts=runs if not flat[0] else [0, *runs])))
        refs += [dict(ref_id=2 * i + (split == "val"), ann_id=i, image_id=i, category_id=1, split=split, file_name="", sent_ids=[i],
                      sentences=[dict(sent_id=i, sent=text, raw=text, tokens=text.split())]) for split in ("train", "val")]
    (root / "refcoco/refs(unc).p").write_bytes(pickle.dumps(refs, protocol=2))
    (root / "refcoco/instances.json").write_text(json.dumps(dict(images=images, annotations=shapes,
                                                                 categories=[dict(id=1, name="thing")])))
    return root


def test_real_rows_train_it(tmp_path):
    train, valid = refer_rows("refcoco", "unc", refer_folder(tmp_path))
    r = recipe("step", "paper").replace(steps=20, batch_size=2, eval_every=20)
    m = tiny(words=words_of(train))
    got = fit(m, train, valid, r)
    losses = got.series("loss")[1]
    assert losses[-1] < losses[0] and 0 <= got.metrics["mIoU"] <= 1


def test_the_papers_recipe_takes_its_words_from_the_rows(tmp_path):
    small = dict(backbone="small", weights="null", width=8, vector=16, cell=16, atrous=24, attention=20, embed=32, folds=1, grid=2, maps=6, long_side=64)
    changes = [word for k, v in small.items() for word in ("--set", f"{k}={v}")]
    folder = ["--root", str(refer_folder(tmp_path / "data")), "--out", str(tmp_path / "run")]
    assert cli.main(["train", "step", "--scale", "paper", "--steps", "2", *folder, *changes]) == 0
    trained = load(str(tmp_path / "run"))
    rows = refer_rows("refcoco", "unc", tmp_path / "data")[0]
    assert trained.config.words == words_of(rows) and len(trained.config.words) > 2
    assert trained.segment(rows[0]["image"], rows[0]["expression"]).mask.shape == (70, 80)


def test_the_trace_ends_in_the_answer():
    m, image = load("step"), scenes.scene(0, size=80).image
    t, r = m.trace(image, "the leftmost thing"), m.segment(image, "the leftmost thing")
    assert np.allclose(t.P[-1], r.heatmap, atol=1e-5) and t.Q.shape == t.P.shape == (4, 80, 80)


def test_the_shipped_weights_keep_what_their_metadata_say():
    m = load("step")
    metadata = json.loads((files("lsbook") / "weights/step.json").read_text(encoding="utf-8"))
    assert (files("lsbook") / "weights/step.safetensors").stat().st_size <= 4 * 2**20
    got = evaluate(m, scenes.rows("referring", 500, split="test"))
    assert got["mIoU"] >= .75 and got["Prec@0.5"] >= .85
    kinds = {k: v for k, v in got.items() if k.startswith("mIoU/")}
    assert len(kinds) == 4 and all(v >= .65 for v in kinds.values())
    assert abs(got["mIoU"] - metadata["metrics"]["mIoU"]) < .01
