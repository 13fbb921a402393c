"""LSeg beyond its notebooks: the published checkpoints by name and shape, the shipped weights, bad input, real photographs."""
import functools
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from lsbook import evaluate, load, scenes
from lsbook.lseg.model import LSeg, LSegConfig
from lsbook.lseg.official import from_official, convert_name
from lsbook.lseg.train import RECIPES, camvid_rows, fold_rows, fss_rows, two_way, zero_shot


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
    state["net.stranger"] = torch.ones(1)
    torch.save({"state_dict": state}, tmp_path / "strange.ckpt")
    with pytest.raises(ValueError, match="stranger"):
        from_official(tmp_path / "strange.ckpt", depth=2)


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
