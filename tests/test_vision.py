"Encoders: sizes over many inputs, weights from files, bad input."
import os, subprocess, sys

import pytest
import torch
import torchvision

from lsbook.vision import (Normalise, ResNetPyramid, SmallPyramid, ViTFeatures, check_images, conv_block, crop_to, map_sizes,
        pad_to, receptive_field, resize_positions, resnet_weights, spatial_code, timm_vit)
from lsbook.files import load_tensors, read_tensors

TINY = dict(embed_dim=24, depth=3, num_heads=2, img_size=32)


@pytest.fixture(scope="module")
def resnet(): return ResNetPyramid("resnet50").eval()


@pytest.fixture(scope="module")
def vit(): return ViTFeatures("vit_tiny_patch16_224", (0, 2), **TINY).eval()


@pytest.mark.parametrize("size", [(16, 16), (32, 80), (128, 48)])
@pytest.mark.parametrize("levels", [1, 4])
def test_small_pyramid_sizes(size, levels):
    model = SmallPyramid(width=4, levels=levels).eval()
    maps = model(torch.rand(1, 3, *size))
    want = [(1, c, size[0] // s, size[1] // s) for c, s in zip(model.channels, model.strides)]
    assert [tuple(m.shape) for m in maps] == want
    assert [(r["height"], r["width"]) for r in map_sizes(model, size)] == [tuple(m.shape[2:]) for m in maps]


def test_map_sizes_leaves_the_model_alone():
    model = SmallPyramid(width=4).train()
    model.stem.eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    map_sizes(model, 16)
    assert model.training and model.stages.training and not model.stem.training
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    with pytest.raises(ValueError, match="pad_to"): map_sizes(model, 20)
    assert model.training and not model.stem.training # restored also after an error


def test_small_pyramid_gradient_and_one_dtype():
    model = SmallPyramid(width=4)
    sum(m.square().mean() for m in model(torch.rand(2, 3, 32, 32))).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert SmallPyramid(width=4).double()(torch.rand(2, 3, 32, 32).double())[0].dtype == torch.float64
    with torch.autocast("cpu", torch.bfloat16): assert model(torch.rand(2, 3, 32, 32))[3].isfinite().all()


def test_resnet_sizes(resnet):
    maps = resnet(torch.rand(1, 3, 48, 72))
    assert [tuple(m.shape[1:]) for m in maps] == [(64, 12, 18), (256, 12, 18), (512, 6, 9), (1024, 6, 9), (2048, 6, 9)]


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
                                  lambda s: {f"backbone.{k}": v for k, v in s.items() if not k.startswith("fc.")} |
                                            {"classifier.0.weight": torch.zeros(1)}])
def test_resnet_loads_files(tmp_path, wrap):
    torch.manual_seed(1)
    state = torchvision.models.resnet50(weights=None).state_dict()
    torch.save(wrap(state), tmp_path / "w.pth")
    ours = ResNetPyramid("resnet50", weights=tmp_path / "w.pth", frozen_norm=True)
    assert torch.equal(ours.body.layer4[2].conv3.weight, state["layer4.2.conv3.weight"])
    assert not [n for n, p in ours.named_parameters() if "bn" in n] # frozen: no parameters, the statistics are buffers


@pytest.mark.parametrize("size", [(32, 32), (16, 64), (80, 48)])
def test_vit_any_size(vit, size):
    tokens, (h, w) = vit(torch.rand(2, 3, *size)), (size[0] // 16, size[1] // 16)
    assert [tuple(t.shape) for t in tokens] == [(2, 1 + h * w, 24)] * 2
    assert [tuple(m.shape) for m in vit.maps(torch.rand(2, 3, *size))] == [(2, 24, h, w)] * 2
    assert [(r["height"], r["width"], r["cells"]) for r in map_sizes(vit, size)] == [(h, w, h * w)] * 2


def test_vit_maps_are_tokens_row_by_row(vit):
    x = torch.rand(1, 3, 32, 48)
    assert torch.equal(vit.maps(x)[1][0, :, 1, 2], vit(x)[1][0, 1 + 1 * 3 + 2])


def test_vit_every_parameter_learns():
    model = ViTFeatures("vit_tiny_patch16_224", (0, 1), **TINY)
    sum(t.square().mean() for t in model(torch.rand(1, 3, 32, 32))).backward()
    assert len(model.body.blocks) == 2 and all(p.grad is not None for p in model.parameters())


def test_vit_other_grid_in_a_file_is_an_error(tmp_path):
    torch.save(timm_vit("vit_tiny_patch16_224", **TINY | dict(img_size=64)).state_dict(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match="pos_embed"):
        ViTFeatures("vit_tiny_patch16_224", (0,), weights=tmp_path / "w.pt", **TINY)


def test_resize_positions_bicubic():
    table = torch.rand(1, 1 + 6, 5)
    assert resize_positions(table, (2, 3), (4, 5), "bicubic").shape == (1, 21, 5)


def test_spatial_code_of_many_grids():
    for h, w in [(1, 1), (1, 7), (40, 40), (3, 2)]:
        code = spatial_code(h, w, dtype=torch.float64)
        assert code.shape == (8, h, w) and code[0, 0, 0] == -1 and code[2, 0, -1] == 1 and code[3, -1, 0] == 1
        assert torch.allclose(code[2] - code[0], torch.full((h, w), 2 / w, dtype=torch.float64))
        assert torch.allclose(code[7], torch.full((h, w), 1 / h, dtype=torch.float64))
    with pytest.raises(ValueError, match="got 0 x 4"): spatial_code(0, 4)


@pytest.mark.parametrize("shape", [(3, 1, 1), (2, 3, 5, 64), (1, 3, 63, 65)])
@pytest.mark.parametrize("mode", ["replicate", "constant"])
def test_pad_and_crop(shape, mode):
    x = torch.rand(shape)
    padded, size = pad_to(x, 32, mode)
    assert size == shape[-2:] and padded.shape[-2] % 32 == padded.shape[-1] % 32 == 0
    assert torch.equal(crop_to(padded, size), x)


def test_bad_sizes():
    for stride in (0, -2, 1.5):
        with pytest.raises(ValueError, match="stride"): pad_to(torch.rand(3, 4, 4), stride)
    for shape in ((4,), (4, 4), (3, 0, 4)):
        with pytest.raises(ValueError, match="x: want"): pad_to(torch.rand(shape), 2)
    with pytest.raises(ValueError, match="at least 5 x 4"): crop_to(torch.rand(3, 4, 4), (5, 4))


@pytest.mark.parametrize("x, error, words", [
    (None, TypeError, "NoneType"), ([1], TypeError, "list"),
    (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), TypeError, "255"),
    (torch.zeros(1, 1, 16, 16), ValueError, r"\(1, 1, 16, 16\)"),
    (torch.zeros(3, 16, 16), ValueError, r"\(3, 16, 16\)"),
    (torch.zeros(0, 3, 16, 16), ValueError, r"\(0, 3"), (torch.zeros(1, 3, 16, 17), ValueError, "16 x 17")])
def test_bad_images(x, error, words, vit, resnet):
    for model in (SmallPyramid(width=4), vit, resnet):
        with pytest.raises(error, match=words): model(x)
    with pytest.raises(error, match=words): check_images(x, 16)
    with pytest.raises(error, match="photo"): check_images(x, 16, name="photo")


@pytest.mark.parametrize("make, words", [
    (lambda: SmallPyramid(width=0), "width"), (lambda: SmallPyramid(levels=7), "levels"),
    (lambda: ResNetPyramid("resnet18"), "resnet18"), (lambda: ResNetPyramid("vgg16"), "vgg16"),
    (lambda: ResNetPyramid("resnet50", weights="IMAGENET"), "IMAGENET1K_V2"),
    (lambda: resnet_weights("resnet152", "COCO_WITH_VOC_LABELS_V1"), "IMAGENET1K_V1"),
    (lambda: ViTFeatures("vit_huge"), "vit_huge"), (lambda: timm_vit("vit_tiny_patch16_224", "x"), "augreg_in21k"),
    (lambda: ViTFeatures("vit_tiny_patch16_224", (0, 3), **TINY), "0 to 2"),
    (lambda: ViTFeatures("vit_tiny_patch16_224", (), **TINY), "0 to 2"),
    (lambda: ViTFeatures("vit_tiny_patch16_224", (1, 0), **TINY), "rising"),
    (lambda: ViTFeatures("vit_base_patch16_clip_quickgelu_224", (0,), weights="x"), "weights"),
    (lambda: ViTFeatures("vit_base_patch16_gap_224", (0,), depth=1), "CLS")])
def test_bad_models(make, words):
    with pytest.raises(ValueError, match=words): make()


class Bomb:
    def __reduce__(self): return os.system, ("touch went_off",)


def test_bad_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="none.pth"): read_tensors("none.pth")
    torch.save(Bomb(), "bomb.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "bomb.pth").read_bytes()[:40])
    (tmp_path / "text.safetensors").write_text("no tensors at all")
    for name in ("bomb.pth", "cut.pth", "text.safetensors"):
        with pytest.raises(ValueError, match=name): read_tensors(name)
    assert not (tmp_path / "went_off").exists()
    for i, thing in enumerate((torch.zeros(2), {}, {"a": 1}, [torch.zeros(1)])):
        torch.save(thing, f"{i}.pt")
        with pytest.raises(ValueError, match="no dictionary of tensors"): read_tensors(f"{i}.pt")
    cut = {k: v[:2] if k == "0.weight" else v for k, v in conv_block(3, 4, 1).state_dict().items()}
    with pytest.raises(ValueError, match="1 of another shape: 0.weight"): load_tensors(conv_block(3, 4, 1), cut)


def test_safetensors(tmp_path):
    from safetensors.torch import save_file
    a, b = conv_block(3, 4), conv_block(3, 4)
    save_file(a.state_dict(), tmp_path / "a.safetensors")
    assert load_tensors(b, read_tensors(tmp_path / "a.safetensors")) == [] and torch.equal(a[3].weight, b[3].weight)


def test_normalise_moves_but_is_not_saved():
    n = Normalise()
    assert not n.state_dict() and n.double().mean.dtype == torch.float64


def test_receptive_field_of_a_strided_pair(): assert receptive_field([(7, 2, 1), (3, 2, 1)]) == [(2, 7), (4, 11)]


def test_import_is_light():
    code = "import sys, lsbook.vision; sys.exit(any(m in sys.modules for m in ('torchvision', 'timm', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_same_numbers_on_a_gpu(vit):
    if not torch.cuda.is_available(): pytest.skip("no GPU")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    x = torch.rand(2, 3, 64, 64)
    for model in (SmallPyramid(width=8).eval(), ResNetPyramid("resnet50").eval(), vit):
        with torch.no_grad(): want, got = model(x), model.cuda()(x.cuda())
        model.cpu()
        for a, b in zip(want, got): assert (a - b.cpu()).abs().max() <= 1e-3 * a.abs().max().clamp(min=1)
