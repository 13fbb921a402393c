"""LSeg beyond its notebooks: the published checkpoints by name and shape, the shipped weights, bad input, real photographs."""
import functools
import math
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lsbook import evaluate, load, scenes
from lsbook.data import COCO_NAMES, VOC_NAMES, label_names, with_names
from lsbook.lseg.model import VITS, DenseEncoder, LSeg, LSegConfig, ResNetMaps, augment, relabel_as_other
from lsbook.lseg.official import from_official, convert_name
from lsbook.lseg.pixel_text import SCALE, correlate, running_argmax
from lsbook.lseg.spatial_regularization import SpatialRegularization
from lsbook.lseg.train import (CAMVID, RECIPES, SEEN, ade20k_rows, camvid_rows, fold_rows, fss_rows, official_words, only, scene_rows, trained_classes,
                               two_way, zero_shot)
from lsbook.lseg.zero_shot import VARIANTS, glued, other_iou, parent_iou


# --- the published checkpoints: their names and shapes, written down from the libraries they were made with ----------------------

def clip_names():
    "CLIP ViT-B/32 as open_clip names it, both towers; the names are OpenAI's."
    import open_clip
    with torch.device("meta"):
        clip = open_clip.model.CLIP(**open_clip.get_model_config("ViT-B-32-quickgelu"))
    return {f"clip_pretrained.{k}": tuple(v.shape) for k, v in clip.state_dict().items() if k != "attn_mask"}


def batch_norm(name, c):
    return {f"{name}.{k}": (c,) for k in ("weight", "bias", "running_mean", "running_var")} | {f"{name}.num_batches_tracked": ()}


def scratch_names(channels):
    names = {f"scratch.layer{i + 1}_rn.weight": (256, c, 3, 3) for i, c in enumerate(channels)}
    for i in (1, 2, 3, 4):
        names |= {f"scratch.refinenet{i}.out_conv.weight": (256, 256, 1, 1), f"scratch.refinenet{i}.out_conv.bias": (256,)}
        for u in (1, 2):
            for c in (1, 2):
                names[f"scratch.refinenet{i}.resConfUnit{u}.conv{c}.weight"] = (256, 256, 3, 3)
                names |= batch_norm(f"scratch.refinenet{i}.resConfUnit{u}.bn{c}", 256)
    return names | {"scratch.head1.weight": (512, 256, 1, 1), "scratch.head1.bias": (512,)}


def vit_names(timm_name, channels, resizes):
    import timm
    with torch.device("meta"):
        vit = timm.create_model(timm_name, num_classes=1000)
    names = {f"pretrained.model.{k}": tuple(v.shape) for k, v in vit.state_dict().items()}
    d = vit.embed_dim
    for i, (c, kernel) in enumerate(zip(channels, resizes), 1):
        p = f"pretrained.act_postprocess{i}"
        names |= {f"{p}.0.project.0.weight": (d, 2 * d), f"{p}.0.project.0.bias": (d,), f"{p}.3.weight": (c, d, 1, 1), f"{p}.3.bias": (c,)}
        if kernel:
            names |= {f"{p}.4.weight": (c, c, kernel, kernel), f"{p}.4.bias": (c,)}
    return names


def resnet_names():
    from torchvision.models import resnet101
    with torch.device("meta"):
        net = resnet101()
    where = {"conv1": "layer1.0", "bn1": "layer1.1", "layer1": "layer1.4", "layer2": "layer2", "layer3": "layer3", "layer4": "layer4"}
    return {f"pretrained.{where[k.split('.')[0]]}.{k.split('.', 1)[1]}": tuple(v.shape) for k, v in net.state_dict().items()
            if k.split(".")[0] in where}


PUBLISHED = {  # how many tensors the file holds, without a regularisation block; and their names and shapes
    "vitl16": (730, lambda: vit_names("vit_large_patch16_384", (256, 512, 1024, 1024), (4, 2, 0, 3)) | scratch_names((256, 512, 1024, 1024))),
    "vitb32": (586, lambda: vit_names("vit_base_patch32_384", (96, 192, 384, 768), (8, 4, 2, 0)) | scratch_names((96, 192, 384, 768))),
    "resnet101": (1036, lambda: resnet_names() | scratch_names((256, 512, 1024, 2048))),
}
BLOCK = {"scratch.head_block.depthwise.depthwise.weight": (1, 1, 3, 3), "scratch.head_block.depthwise.depthwise.bias": (1,)}


@functools.lru_cache
def published(backbone):
    return clip_names() | PUBLISHED[backbone][1]()


@pytest.mark.parametrize("depth", (0, 1))
@pytest.mark.parametrize("backbone", PUBLISHED)
def test_every_published_name_is_used_or_named_as_unused(backbone, depth):
    names = published(backbone)
    assert len(names) == PUBLISHED[backbone][0]
    names = names | BLOCK if depth else names
    ours, unused = {}, []
    for name, shape in names.items():
        new = convert_name("net." + name)
        assert new not in ours, new
        unused.append(name) if new is None else ours.update({new: shape})
    with torch.device("meta"):
        model = LSeg(LSegConfig(backbone, depth=depth))
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == ours
    assert all(n.startswith(("clip_pretrained.visual.", "clip_pretrained.logit_scale", "pretrained.model.norm.", "pretrained.model.head."))
               for n in unused)


def test_a_synthetic_checkpoint_loads_and_gives_its_own_values(tmp_path):
    generator = torch.Generator().manual_seed(0)
    state = {"net." + k: torch.randn(s, generator=generator) * .02 if s else torch.tensor(7)
             for k, s in (published("vitb32") | BLOCK).items()}
    half = "net.clip_pretrained.transformer.resblocks.3.mlp.c_fc.weight"
    state[half] = state[half].half()
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "synthetic.ckpt")
    model, unused = from_official(tmp_path / "synthetic.ckpt", depth=2)
    own = model.state_dict()
    assert not model.training and len(own) + len(unused) == len(state)
    for name, tensor in state.items():
        new = convert_name(name)
        assert new is None or torch.equal(own[new], tensor.float() if tensor.is_floating_point() else tensor)
    assert model.config.long_side == 520 and model.config.regularization == "bottleneck" and model.config.depth == 2
    assert model.config.backbone == "vitb32" and model.config.text == "clip:ViT-B-32-quickgelu"
    with pytest.raises(ValueError, match="depth: got 0; the file holds a regularisation block"):
        from_official(tmp_path / "synthetic.ckpt")
    torch.save({"state_dict": {k: v for k, v in state.items() if "head_block" not in k}}, tmp_path / "plain.ckpt")
    with pytest.raises(ValueError, match="depth: got 1; the file holds no regularisation block"):
        from_official(tmp_path / "plain.ckpt", depth=1)
    state["net.stranger"] = torch.ones(1)
    torch.save({"state_dict": state}, tmp_path / "strange.ckpt")
    with pytest.raises(ValueError, match="stranger"):
        from_official(tmp_path / "strange.ckpt", depth=2)


@pytest.mark.parametrize("sides, backbone, tower, long_side", [
    ((None, 512), "resnet101", "ViT-B-32-quickgelu", 480), ((768, 512), "vitb32", "ViT-B-32-quickgelu", 520),
    ((1024, 640), "vitl16", "RN50x4-quickgelu", 520), ((1024, 768), "vitl16", "RN50x16-quickgelu", 520)])
def test_published_widths_name_backbone_and_tower(tmp_path, monkeypatch, sides, backbone, tower, long_side):
    from lsbook.lseg import official
    names = "net.pretrained.model.pos_embed", "net.clip_pretrained.text_projection"
    torch.save({"state_dict": {n: torch.zeros(1, w) for n, w in zip(names, sides) if w}}, tmp_path / "a.ckpt")

    class Built(Exception): pass

    def build(config): raise Built(config.backbone, config.text, config.long_side)
    monkeypatch.setattr(official, "LSeg", build)
    with pytest.raises(Built) as built: from_official(tmp_path / "a.ckpt")
    assert built.value.args == (backbone, f"clip:{tower}", long_side)


def test_weights_that_are_not_lsegs_are_named(tmp_path):
    torch.save({"state_dict": {"net.a": torch.ones(1000)}}, tmp_path / "whole.ckpt")
    with pytest.raises(ValueError, match="path: .*not LSeg's"):
        from_official(tmp_path / "whole.ckpt")
    with pytest.raises(FileNotFoundError, match="path: .*none.ckpt"):
        from_official(tmp_path / "none.ckpt")


# --- the model -------------------------------------------------------------------------------------------------------------------

def small(**changes):
    torch.manual_seed(0)
    config = dict(backbone="small", text="words", words=scenes.words(), dim=32, fusion=16, width=8, long_side=64, labels=scenes.label_names())
    return LSeg(LSegConfig(**config | changes)).eval()


@pytest.mark.parametrize("change, said", [(dict(backbone="vitx"), "backbone"), (dict(depth=-1), "depth"),
                                          (dict(regularization="none"), "kind"), (dict(text="glove"), "spec")])
def test_a_config_that_cannot_be_meant_is_named(change, said):
    with pytest.raises(ValueError, match=said):
        small(**change)


def test_images_and_labels_in_every_shape():
    model = small(depth=2)
    for size in ((1, 1), (20_000, 3), (65, 64), (7, 300)):
        r = model.segment(Image.new("RGB", size, "red"), ["grass", "red circle", "sand"])
        assert r.label_map.shape == size[::-1] and set(np.unique(r.label_map)) <= {0, 1, 2}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        r = model.segment(Image.new("RGB", (32, 32)), [f"word{'abcdefghij'[i % 10]}{'abcdefghij'[i // 10 % 10]}{'abc'[i // 100]}" for i in range(300)])
    assert r.label_map.dtype == np.int32
    for labels in ([], [""], ["a", "A"], ["x" * 10_000], "grass", [3]):
        with pytest.raises((ValueError, TypeError), match="labels"):
            model.segment(Image.new("RGB", (8, 8)), labels)


def test_a_batch_gives_what_single_images_give():
    model, images = small(depth=1), [scenes.scene(i, size=64).image for i in range(3)] + [np.zeros((40, 64, 3), np.uint8)]
    together = model.segment(images, ["grass", "sand", "red circle"])
    for image, r in zip(images, together):
        assert (r.label_map == model.segment(image, ["grass", "sand", "red circle"]).label_map).mean() > .999


def test_words_and_images_are_encoded_once():
    model, image = small(), scenes.scene(0).image
    passes = []
    model.image.register_forward_hook(lambda *a: passes.append(1))
    encoded = model.encode_image(image)
    for labels in (["grass", "sand"], ["sand", "water"], ["water", "grass"]):
        model.segment(encoded, labels)
    assert len(passes) == 1 and model.text.encoded == 3
    model.segment([image, scenes.scene(1).image], ["grass", "water"])
    assert model.text.encoded == 3


def test_half_precision_weights_answer_too():
    image, names = scenes.scene(0).image, ["grass", "sand", "red circle"]
    full = small(depth=2).segment(image, names).label_map
    assert (small(depth=2).bfloat16().segment(image, names).label_map == full).mean() > .9


def test_forward_without_labels_says_so():
    model = small(labels=[])
    for texts in (None, []):
        with pytest.raises(ValueError, match="texts"):
            model(torch.rand(1, 3, 64, 64), texts=texts)


def test_label_order_does_not_matter():
    model, image, names = small(depth=2), scenes.scene(2).image, scenes.label_names()[:9]
    model.regularization.conv.reset_parameters()
    a, b = model.segment(image, names), model.segment(image, names[::-1])
    assert np.mean([np.array(a.labels)[a.label_map] == np.array(b.labels)[b.label_map]]) > .999


def test_trains_on_two_way_rows_and_without_any_known_label():
    model = small(depth=1).train()
    pairs = two_way(scenes.rows("semantic", 4), ["grass", "sand", "water", "stone"])
    batch = model.collate([pairs[i] for i in range(3)])
    out = model(**batch)
    assert out.logits.shape == (3, 2, 64, 64) and torch.isfinite(out.loss)
    batch["label_map"].fill_(255)
    out = model(**batch)
    out.loss.backward()
    assert out.loss == 0


def test_save_load_round_trip(tmp_path):
    model = small(depth=2)
    model.save_pretrained(tmp_path / "hub")
    again = load(tmp_path / "hub")
    image, names = scenes.scene(0).image, ["grass", "red circle"]
    assert (again.segment(image, names).label_map == model.segment(image, names).label_map).all() and again.config == model.config


def test_bf16_autocast_gives_nearly_the_same_logits():
    model, x = small(depth=2), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        full = model(x).logits
        with torch.autocast("cpu", torch.bfloat16):
            half = model(x).logits
    assert half.dtype == torch.float32 and (full - half).abs().mean() < .02 * full.abs().max()


@pytest.mark.cuda
def test_the_same_on_a_gpu():
    model, x = small(depth=2), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        cpu = model(x).logits
        assert (cpu - model.cuda()(x.cuda()).logits.cpu()).abs().max() < 1e-2


# --- every equation and constant, exactly ----------------------------------------------------------------------------------------

def close(a, b, atol=1e-5):
    return torch.allclose(torch.as_tensor(a).float(), torch.as_tensor(b).float(), atol=atol)


def test_exact_logits():
    "Cosines over 0.07, of pixels (3, 4) and (0, 9) with three labels; then two images with labels of their own."
    assert SCALE == 1 / .07
    x = torch.tensor([[3., 0], [4, 9]]).view(1, 2, 1, 2)
    text = torch.tensor([[4., 3], [-3, -4], [0, 2]])
    cosine = torch.tensor([[24 / 25, .6], [-1, -.8], [.8, 1]])
    assert close(correlate(x, text)[0, :, 0], cosine / .07) and close(correlate(x, text, scale=2.)[0, :, 0], 2 * cosine)
    own = correlate(torch.cat([x, 5 * x]), torch.stack([text, text.flip(0)]))
    assert close(own[0, :, 0], cosine / .07) and close(own[1, :, 0], cosine.flip(0) / .07)
    assert correlate(x.bfloat16(), text.bfloat16()).dtype == torch.float32
    with pytest.raises(ValueError, match="text"):
        correlate(x, text[:, :1])


def test_exact_argmax_the_first_of_equals_wins():
    logits = torch.tensor([[1., 3, 3, 3, 0], [5, 1, 5, 1, 5], [0, 1, 2, 4, 3]]).view(3, 5, 1, 1)
    for sizes in ((5,), (2, 3), (1, 1, 1, 1, 1), (3, 2)):
        value, index = running_argmax(logits.split(sizes, 1))
        assert value.flatten().tolist() == [3, 5, 4] and index.flatten().tolist() == [1, 0, 3], sizes


@pytest.mark.parametrize("kind, depth, want", [   # the convolution is 2 x + 0.5; the labels start at -2 and 1
    ("bottleneck", 0, [-2, 1]), ("depthwise", 0, [-2, 1]),
    ("bottleneck", 1, [-4 + .5 + 1, 2 + .5 + 1]), ("depthwise", 1, [-3.5, 2.5]),
    ("bottleneck", 2, [2 * -.025 + .5 + 3.5, 2 * 3.5 + .5 + 3.5]),   # leaky ReLU of -2.5 is -0.025; none after the last
    ("depthwise", 2, [2 * -.035 + .5, 5.5])])
def test_exact_regularization(kind, depth, want):
    m = SpatialRegularization(kind, depth)
    if depth:
        with torch.no_grad(): m.conv.weight[0, 0, 1, 1], m.conv.bias[0] = 2, .5
    assert close(m(torch.tensor([-2., 1]).view(1, 2, 1, 1)).flatten(), want)


def test_exact_regularization_at_the_start_and_in_chunks():
    m = SpatialRegularization()
    assert (m.kind, m.depth) == ("bottleneck", 2) and sum(p.numel() for p in m.parameters()) == 10
    assert not m.conv.bias.any() and m.conv.weight.sum() == m.conv.weight[0, 0, 1, 1] == 1
    row = torch.tensor([1., 2, 3]).view(1, 1, 1, 3)
    m = SpatialRegularization("depthwise", 1)
    with torch.no_grad(): m.conv.weight.fill_(1)
    assert m(row).flatten().tolist() == [3, 6, 5]
    torch.manual_seed(0)
    for kind in ("bottleneck", "depthwise"):
        for depth in range(4):
            m, x = SpatialRegularization(kind, depth), torch.randn(2, 7, 5, 4)
            if depth: m.conv.reset_parameters()
            assert close(torch.cat(list(m.chunks(lambda: x.split(3, 1))), 1), m(x)), (kind, depth)
    for wrong, said in ((dict(kind="none"), "kind"), (dict(depth=-1), "depth")):
        with pytest.raises(ValueError, match=said):
            SpatialRegularization(**wrong)


class Half(torch.nn.Module):
    "An image encoder at half the resolution, as the paper's: the features are the averaged colours and 1."
    stride = 2
    def forward(self, images): return torch.cat([F.avg_pool2d(images, 2), torch.ones_like(images[:, :1, ::2, ::2])], 1)


def half(depth=2):
    model = small(dim=4, depth=depth, labels=["grass", "red circle", "sand"])
    model.image = Half()
    return model


def test_exact_forward():
    "Logits are regularised where the features are, then enlarged with aligned corners; the loss is their cross-entropy."
    model, x = half(), torch.rand(2, 3, 16, 24)
    names = model.config.labels
    raw = correlate(F.normalize(Half()(x), dim=1), model.encode_text(names))
    want = F.interpolate(model.regularization(raw), (16, 24), mode="bilinear", align_corners=True)
    target = torch.randint(0, 3, (2, 16, 24))
    target[0, :3] = 255
    out = model(x, target)
    assert close(out.logits, want) and close(out.loss, F.cross_entropy(want, target, ignore_index=255))
    own = model(x, texts=[names[:2], names[1:]]).logits
    assert close(own[0], model(x, texts=names[:2]).logits[0]) and close(own[1], model(x, texts=names[1:]).logits[1])
    assert model(x).loss is None and close(model.encode_text(names).norm(dim=-1), torch.ones(3))
    assert close(model.image_features(x).norm(dim=1), torch.ones(2, 8, 12))
    with torch.no_grad():
        e = model.encode_image(scenes.scene(0).image)
        logits = model(torch.from_numpy(scenes.scene(0).image.copy()).permute(2, 0, 1)[None] / 255).logits
        for chunk in (1, 2, 32):
            assert (model.label_map(e, model.encode_text(names), chunk) == logits[0].argmax(0)).float().mean() > .999


def test_exact_defaults_and_parts():
    c = LSegConfig()
    assert (c.backbone, c.text, c.dim, c.fusion, c.width) == ("vitl16", "clip:ViT-B-32-quickgelu", 512, 256, 24)
    assert (c.regularization, c.depth, c.long_side, c.crop, c.other, c.weights) == ("bottleneck", 0, 520, None, 0, None)
    assert VITS == {"vitl16": ("vit_large_patch16_384", (5, 11, 17, 23), (256, 512, 1024, 1024), (4, 2, 1, .5)),
                    "vitb32": ("vit_base_patch32_384", (2, 5, 8, 11), (96, 192, 384, 768), (8, 4, 2, 1))}
    model = small()
    dead = {n for n, p in model.image.named_parameters() if not p.requires_grad}
    assert dead and all(n.startswith("neck.fusion_stage.layers.0.residual_layer1.") for n in dead)
    assert not any(p.requires_grad for p in model.text.parameters()) and model.stride == 16
    with torch.device("meta"):
        maps, x = ResNetMaps(), torch.empty(1, 3, 64, 96)
        assert [tuple(m.shape[1:]) for m in maps(x)] == [(c, 64 // s, 96 // s) for c, s in zip((256, 512, 1024, 2048), (4, 8, 16, 32))]
        assert tuple(DenseEncoder("resnet101", 7, 16)(x).shape) == (1, 7, 32, 48) and DenseEncoder("resnet101", 7, 16).stride == 32
        assert tuple(DenseEncoder("small", 7, 16)(x).shape) == (1, 7, 64, 96)
    maps, seen = ResNetMaps().eval(), []
    maps.body.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    maps(torch.full((1, 3, 32, 32), .5))
    assert close(seen[0].mean((0, 2, 3)), (.5 - torch.tensor([.485, .456, .406])) / torch.tensor([.229, .224, .225]))


def test_exact_augmentation(monkeypatch):
    image, target = torch.full((3, 8, 8), 100, dtype=torch.uint8), torch.arange(64).view(8, 8)
    rand = torch.rand
    for drawn, scale in ((1., 2.), (0., .5), (.5, 1.)):     # 2 to the power of -1 to 1; 0 also flips
        monkeypatch.setattr(torch, "rand", lambda *size, **kw: torch.full(size if size and size[0] != () else (), drawn))
        _, found = augment(image, target, 16)
        inside = found != 255
        assert inside.sum() == (8 * scale) ** 2 and found.shape == (16, 16)
        if drawn == 1: assert torch.equal(found, target.repeat_interleave(2, 0).repeat_interleave(2, 1))
        if drawn == 0: assert (found[inside].view(4, 4).diff(dim=1) < 0).all()
    monkeypatch.setattr(torch, "rand", rand)
    torch.manual_seed(0)
    drawn = [augment(image, target, 4)[0] for _ in range(150)] + [augment(image, target, 32)[0] for _ in range(150)]
    values = torch.cat([x[x > 0] for x in drawn])
    assert 58 <= values.min() < 66 and 134 < values.max() <= 142            # the jitter: 0.6 to 1.4
    assert (drawn[-1] == 0).any() and drawn[0].dtype == torch.uint8 and drawn[0].shape == (3, 4, 4)


def test_exact_other():
    "Each label is left out with a probability from [0, share]; what is left out is called other, 255 stays."
    labels, target = [f"label {i}" for i in range(20)], torch.arange(21)[None, None]
    target[..., 20] = 255
    torch.manual_seed(0)
    shares = []
    for _ in range(1000):
        got = relabel_as_other(target, labels, .6)
        named = [got["texts"][i] for i in got["label_map"][0, 0, :20]]
        assert all(n in (label, "other") for n, label in zip(named, labels)) and got["label_map"][0, 0, 20] == 255
        assert got["texts"] == [n for n in named if n != "other"] + ["other"]
        shares.append(named.count("other") / 20)
    assert abs(np.mean(shares) - .3) < .02 and max(shares) < .95 and min(shares) == 0
    assert relabel_as_other(target, labels, 0.)["texts"] == labels + ["other"]


def test_exact_batches():
    model, row = small(other=.9, labels=["a", "b"]), dict(image=Image.new("RGB", (32, 20), (0, 51, 255)), label_map=np.eye(20, 32, dtype=np.uint8))
    batch = model.collate([row])
    assert batch["images"].shape == (1, 3, 48, 64) and batch["label_map"].shape == (1, 48, 64) and "texts" not in batch
    assert close(batch["images"][0, :, 5, 5], torch.tensor([0, .2, 1])) and not batch["images"][0, :, 40:].any()
    assert torch.equal(batch["label_map"][0, :40], torch.eye(20, 32).repeat_interleave(2, 0).repeat_interleave(2, 1).long())
    assert (batch["label_map"][0, 40:] == 255).all() and batch["label_map"].dtype == torch.int64
    assert model.train().collate([row])["texts"][-1] == "other"
    assert model.collate([row | dict(label="cat")])["texts"] == [["others", "cat"]]
    cropping = small(crop=32)
    assert cropping.collate([row])["images"].shape == (1, 3, 48, 64) and cropping.train().collate([row])["images"].shape == (1, 3, 32, 32)
    with pytest.raises(ValueError, match="rows.1.: .*one size"):
        model.eval().collate([row, dict(row, label_map=np.zeros((3, 4)))])


def test_exact_recipes():
    "The numbers of the official code, and of the book's own."
    r = RECIPES["paper"]
    assert (r.steps, r.batch_size, r.lr, r.weight_decay, r.optimizer, r.schedule) == (303_150, 16, .004, 1e-4, "sgd", "polynomial")
    block = {"regularization": 10.}
    assert r.lr_scale == {"image.neck.convs": 10., "image.neck.fusion_stage": 10., "image.head": 10.} | block and r.precision == "fp32" and r.decay_1d
    assert r.config == dict(text="clip:ViT-B-32-quickgelu@openai", backbone="vitl16", weights="augreg_in21k_ft_in1k", long_side=520, crop=480)
    for name, images, classes in (("pascal-5i", 1464, 15), ("coco-20i", 82081, 60)):
        for fold in range(4):
            r = RECIPES[f"{name}/{fold}"]
            assert (r.steps, r.batch_size, r.lr, r.optimizer) == (4 * images // 20, 20, .005, "sgd")
            assert (r.config["backbone"], r.config["weights"], r.config["long_side"]) == ("resnet101", "IMAGENET1K_V1", 480)
            assert r.config["labels"] == ["others", *official_words(trained_classes(name, fold)).values()] and len(r.config["labels"]) == classes + 1
            if name == "pascal-5i": assert fold == 2 or "diningtable" in r.config["labels"]       # a fold trains what it does not ask
            assert r.rows.args == (name, fold) and r.config["crop"] == 480
    r = RECIPES["fss-1000"]
    assert (r.steps, r.batch_size, r.lr, r.config["backbone"], r.config["long_side"]) == (1040, 20, .005, "vitl16", 480)
    r = RECIPES["scenes"]
    assert (r.steps, r.batch_size, r.lr, r.weight_decay, r.warmup, r.clip, r.eval_every) == (2400, 16, 3e-3, .01, 200, 1, 400)
    c = r.config
    assert (c["backbone"], c["text"], c["dim"], c["fusion"], c["depth"], c["long_side"], c["other"]) == ("small", "words", 64, 48, 2, 64, .5)
    assert c["labels"] == SEEN and c["words"][-1] == "other" and len(SEEN) == 28
    r = RECIPES["camvid"]
    assert (r.steps, r.batch_size, r.lr, r.weight_decay, r.warmup, r.clip) == (1200, 8, 3e-3, .01, 100, 1)
    c = r.config
    assert (c["width"], c["fusion"], c["depth"], c["long_side"], c["crop"]) == (32, 64, 2, 240, 160) and c["labels"] == CAMVID == c["words"]


def test_exact_classes_of_the_folds():
    for fold in range(4):
        unseen = VOC_NAMES[1 + 5 * fold:6 + 5 * fold]
        assert trained_classes("pascal-5i", fold) == [n for n in VOC_NAMES[1:] if n not in unseen]
        assert trained_classes("coco-20i", fold) == [n for i, n in enumerate(COCO_NAMES) if i % 4 != fold]


def save(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.array([values], np.uint8)).save(path)


def read(rows):
    return [(r.get("label"), np.asarray(r["label_map"]).tolist()) for r in rows]


def test_exact_label_maps_of_the_benchmarks(tmp_path):
    photo = [[9, 9, 9]] * 4
    for name in ("images/1.jpg", "fss/red_fox/1.jpg", "fss/abacus/1.jpg", "images/training/1.jpg", "images/validation/1.jpg"):
        save(tmp_path / name, photo)
    save(tmp_path / "labels/1.png", [1, 2, 3, 255])                            # person, bicycle, car
    assert read(fold_rows("coco-20i", 0, tmp_path)[0]) == [("bicycle", [[0, 1, 0, 255]]), ("car", [[0, 0, 1, 255]])]
    for name in ("red_fox", "abacus"): save(tmp_path / f"fss/{name}/1.png", [0, 127, 128, 255])
    (tmp_path / "fss/train.txt").write_text("red_fox\n")
    rows, valid = fss_rows(tmp_path / "fss")
    assert read(rows) == [("red fox", [[0, 0, 1, 1]])] and valid is None
    for split, values in (("training", [0, 1, 2, 2]), ("validation", [2, 2, 1, 0])): save(tmp_path / f"annotations/{split}/1.png", values)
    (tmp_path / "objectInfo150.txt").write_text("Idx\tName\n1\twall\n2\tbuilding, edifice\n")
    train, valid = ade20k_rows(tmp_path)
    assert label_names(train) == label_names(valid) == ["wall", "building"]
    assert (read(train), read(valid)) == ([(None, [[255, 0, 1, 1]])], [(None, [[1, 1, 0, 255]])])


@pytest.mark.parametrize("name, f", [("lrelu", lambda x: x if x > 0 else .01 * x), ("relu", lambda x: max(x, 0.)), ("tanh", math.tanh)])
def test_the_activation_between_two_applications(name, f):
    "By hand: a kernel that multiplies by 2, one pixel, two labels; the activation stands between the two blocks and not behind the second."
    block = SpatialRegularization("bottleneck", 2, name)
    with torch.no_grad():
        block.conv.weight.zero_()[0, 0, 1, 1] = 2
        block.conv.bias.fill_(-1.)
    a, b = .5, -3.
    one = [f(2 * v - 1 + max(a, b)) for v in (a, b)]
    want = [2 * v - 1 + max(one) for v in one]
    assert torch.allclose(block(torch.tensor([a, b]).view(1, 2, 1, 1)).flatten(), torch.tensor(want), atol=1e-6)
    assert LSeg(LSegConfig("small", "words", words=["a"], fusion=8, width=4, depth=2, activation=name)).regularization.activation is block.activation
    with pytest.raises(ValueError, match="activation: got 'gelu'; wanted one of"): SpatialRegularization("bottleneck", 2, "gelu")


def test_exact_rows_of_scenes():
    rows = scenes.rows("semantic", 4, split="test")
    before = [np.asarray(r["label_map"]) for r in rows]
    names = label_names(rows)
    kept = [names[3], names[0]]
    for old, new in zip(before, only(rows, kept)):
        assert np.array_equal(np.asarray(new["label_map"]), np.where(old == 3, 0, np.where(old == 0, 1, 255)))
    assert label_names(only(rows, kept)) == kept
    with pytest.raises(ValueError, match="names: got 'zebra'"):
        only(rows, ["zebra"])
    with pytest.raises(ValueError, match="classes"):
        two_way(rows, ["zebra"])
    asked = two_way(rows, names[:2])
    want = [(names[c], (old == c)) for old in before for c in (0, 1) if (old == c).any()]
    assert [r["label"] for r in asked] == [n for n, _ in want]
    assert all(np.array_equal(np.asarray(r["label_map"]), m) for r, (_, m) in zip(asked, want))


class Says:
    "Answers with one label map, whatever it is asked."
    def __init__(self, *maps): self.maps = iter(maps)
    def segment(self, image, labels):
        self.labels = labels
        return type("R", (), {"label_map": np.array([next(self.maps)])})


def test_exact_zero_shot_numbers():
    row = lambda label, *values: dict(image=None, label=label, label_map=np.array([values]))
    rows = [row("cat", 1, 1, 0, 0, 255), row("dog", 1, 0, 0, 0, 0), row("cat", 0, 1, 1, 1, 1)]
    model = Says([1, 0, 0, 0, 1], [1, 1, 0, 0, 0], [0, 1, 1, 1, 0])
    got = zero_shot(model, rows)
    assert model.labels == ["others", "cat"]
    assert got == pytest.approx({"mIoU": (4 / 6 + 1 / 2) / 2, "FB-IoU": (6 / 9 + 5 / 8) / 2, "IoU/cat": 4 / 6, "IoU/dog": 1 / 2})


def test_exact_claims():
    assert VARIANTS == {"2 bottleneck blocks": {}, "no block": dict(depth=0), "1 bottleneck block": dict(depth=1),
                        "4 bottleneck blocks": dict(depth=4), "2 blocks, random start": {}, "unrelated label vectors": {}}
    assert glued(["red star", "grass"]) == ["redstar", "grass"]
    shown = [scenes.scene(i, split="test") for i in range(3)]

    class Knows:
        "Answers by the truth, wrong in the right half of the picture."
        def encode_image(self, image): return next(s for s in shown if s.image is image)
        def segment(self, s, labels):
            s = s if hasattr(s, "things") else self.encode_image(s)
            names = scenes.label_names()
            self.labels = labels
            truth = s.label_map == names.index(labels[0]) if labels[0] in names else np.zeros((64, 64), bool)
            found = truth.copy()
            found[:, 32:] = False
            return type("R", (), {"mask_of": lambda self, name: found})()
    want = []
    for s in shown:
        for n in {scenes.label_of(t) for t in s.things}:
            truth = s.label_map == scenes.label_names().index(n)
            want.append(truth[:, :32].sum() / truth.sum())
    knows = Knows()
    assert other_iou(knows, shown, "rest") == pytest.approx(np.mean(want)) and knows.labels[1] == "rest"


@pytest.mark.parametrize("part", (0, 1))
def test_exact_parents(part):
    s = scenes.scene(4, split="test")
    parents = list(scenes.BACKGROUNDS) + list((scenes.COLOURS, scenes.SHAPES)[part])
    truth = np.array([parents.index(n.split()[part] if " " in n else n) for n in scenes.label_names()])[s.label_map]

    class Knows:
        def segment(self, image, labels):
            assert labels == parents
            return type("R", (), {"label_map": truth})
    assert parent_iou(Knows(), [s], part) == pytest.approx(1)

    class Ground:
        def segment(self, image, labels): return type("R", (), {"label_map": np.zeros_like(truth)})
    ious = [(truth == 0).sum() / truth.size] + [0.] * len(np.unique(truth[truth != 0]))
    assert parent_iou(Ground(), [s], part) == pytest.approx(np.mean(ious))


def test_exact_scene_rows(monkeypatch):
    asked, rows = [], scenes.rows
    def few(task, n, **kind):
        asked.append((task, n, kind))
        return rows(task, 6, **kind)
    monkeypatch.setattr(scenes, "rows", few)
    train, valid = scene_rows()
    assert asked == [("semantic", 8000, dict(split="train", pairs="seen")), ("semantic", 200, dict(split="valid"))]
    assert label_names(train) == SEEN and len(label_names(valid)) == 34
    assert np.array_equal(train[5]["image"], scenes.scene(5, split="train", pairs="seen").image)


# --- recipes -----------------------------------------------------------------------------------------------------------------------

def test_fold_recipes_leave_the_unseen_classes_out(tmp_path):
    rng = np.random.default_rng(0)
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (tmp_path / folder).mkdir(parents=True)
    for i, classes in enumerate(((0, 1, 6), (0, 3), (0, 20, 255))):
        Image.fromarray(rng.integers(0, 256, (20, 30, 3), dtype=np.uint8)).save(tmp_path / f"JPEGImages/{i}.jpg")
        Image.fromarray(rng.choice(classes, (20, 30)).astype(np.uint8)).save(tmp_path / f"SegmentationClass/{i}.png")
    (tmp_path / "ImageSets/Segmentation/train.txt").write_text("0\n1\n2\n")
    rows, _ = fold_rows("pascal-5i", 0, tmp_path)                       # unseen: aeroplane (1) to bottle (5)
    assert [r["label"] for r in rows] == ["bus", "tv monitor"] or [r["label"] for r in rows][0] == "bus"
    assert set(np.unique(np.asarray(rows[1]["label_map"]))) == {0, 1, 255}
    assert RECIPES["pascal-5i/0"].as_dict()["rows"].startswith("lsbook.lseg.train:")


def test_fss_rows_train_and_evaluate(tmp_path):
    rng = np.random.default_rng(0)
    for c in ("abacus", "red_fox"):
        (tmp_path / c).mkdir()
        for i in (1, 2):
            Image.fromarray(rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)).save(tmp_path / c / f"{i}.jpg")
            Image.fromarray(((rng.random((24, 24)) > .5) * 255).astype(np.uint8)).save(tmp_path / c / f"{i}.png")
    (tmp_path / "train.txt").write_text("red_fox\n")
    rows, _ = fss_rows(tmp_path)
    assert len(rows) == 2 and rows[0]["label"] == "red fox"
    model = small(words=["others", "red", "fox"])
    assert torch.isfinite(model.train()(**model.collate([rows[0], rows[1]])).loss)
    got = zero_shot(model.eval(), rows)
    assert set(got) == {"mIoU", "FB-IoU", "IoU/red fox"} and 0 <= got["mIoU"] <= 1


# --- what is shipped ---------------------------------------------------------------------------------------------------------------

def test_the_shipped_weights_keep_their_promise():
    from importlib.resources import files
    assert (files("lsbook") / "weights" / "lseg.safetensors").stat().st_size < 3e6
    got = evaluate(load("lseg"), scenes.rows("semantic", 500, split="test"))
    assert got["mIoU/seen"] >= .88 and got["mIoU/unseen"] >= .80, got


def test_two_processes_of_the_same_words_agree():
    "Word vectors come from a hash, not from the process: the shipped weights mean the same everywhere."
    code = "from lsbook import load; import torch; print(load('lseg').encode_text(['red star', 'other']).sum(1).tolist())"
    a, b = (subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True).stdout for _ in range(2))
    assert a == b


def test_camvid_rows(real_data):
    train, valid = camvid_rows(real_data / "camvid")
    assert (len(train), len(valid)) == (163, 305)
    model = small(words=list(RECIPES["camvid"].config["labels"]), labels=RECIPES["camvid"].config["labels"], long_side=240, crop=96)
    out = model.train()(**model.collate([train[i] for i in range(4)]))
    assert out.logits.shape == (4, 11, 96, 96) and torch.isfinite(out.loss)


@pytest.mark.parametrize("theirs, ours", [   # shapes alone cannot tell one fusion layer, unit or level from another
    *((f"scratch.refinenet{4 - i}.out_conv.weight", f"image.neck.fusion_stage.layers.{i}.projection.weight") for i in range(4)),
    ("scratch.refinenet1.resConfUnit1.conv2.weight", "image.neck.fusion_stage.layers.3.residual_layer1.convolution2.weight"),
    ("scratch.refinenet4.resConfUnit2.conv1.weight", "image.neck.fusion_stage.layers.0.residual_layer2.convolution1.weight"),
    ("scratch.refinenet2.resConfUnit2.bn1.bias", "image.neck.fusion_stage.layers.2.residual_layer2.batch_norm1.bias"),
    ("scratch.refinenet3.resConfUnit1.bn2.bias", "image.neck.fusion_stage.layers.1.residual_layer1.batch_norm2.bias"),
    ("pretrained.act_postprocess1.0.project.0.weight", "image.neck.reassemble_stage.readout_projects.0.0.weight"),
    ("pretrained.act_postprocess4.0.project.0.bias", "image.neck.reassemble_stage.readout_projects.3.0.bias"),
    ("pretrained.act_postprocess4.3.weight", "image.neck.reassemble_stage.layers.3.projection.weight"),
    ("pretrained.act_postprocess1.4.weight", "image.neck.reassemble_stage.layers.0.resize.weight"),
    ("pretrained.layer3.22.conv1.weight", "image.backbone.body.layer3.22.conv1.weight"),
    ("pretrained.layer1.4.0.conv1.weight", "image.backbone.body.layer1.0.conv1.weight"),
    ("scratch.layer4_rn.weight", "image.neck.convs.3.weight")])
def test_equal_shapes_are_not_swapped(theirs, ours):
    assert convert_name("net." + theirs) == convert_name(theirs) == ours


def test_a_name_that_is_not_of_lseg_is_refused():
    for name in ("stranger", "net.scratch.refinenet5x.out_conv.weight", "clip.visual.proj", "scratch.head2.weight"):
        with pytest.raises(ValueError, match=f"{name.removeprefix('net.')}', which is not LSeg's"):
            convert_name(name)
    assert convert_name("clip_pretrained.logit_scale") is convert_name("net.clip_pretrained.visual.conv1.weight") is None
