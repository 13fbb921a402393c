"""STEP: the fast form against the printed equations, the shipped weights, bad input, real rows, devices."""
import json
import pickle
from importlib.resources import files

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lsbook import cli, evaluate, load, scenes
from lsbook.step.coembedding import pixel_weights, reread_literal, unit
from lsbook.step.convgru import level_of
from lsbook.step.model import STEP, STEPConfig, resize
from lsbook.step.train import Expressions, refer_rows, words_of
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


def test_the_shipped_weights_keep_what_their_card_says():
    m = load("step")
    metadata = json.loads((files("lsbook") / "weights/step.json").read_text(encoding="utf-8"))
    assert (files("lsbook") / "weights/step.safetensors").stat().st_size <= 4 * 2**20
    got = evaluate(m, scenes.rows("referring", 500, split="test"))
    assert got["mIoU"] >= .75 and got["Prec@0.5"] >= .85
    kinds = {k: v for k, v in got.items() if k.startswith("mIoU/")}
    assert len(kinds) == 4 and all(v >= .65 for v in kinds.values())
    assert abs(got["mIoU"] - metadata["metrics"]["mIoU"]) < .01
