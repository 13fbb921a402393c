"Encoders: sizes over many inputs, weights from files, bad input."
import subprocess
import sys

import pytest
import timm
import torch
import torchvision

from lsbook.vision import (Normalise, ResNetPyramid, SmallPyramid, ViTFeatures, check_images,
                           receptive_field, resize_positions, resnet_weights, spatial_code)

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


def test_vit_maps_are_tokens_row_by_row(vit):
    x = torch.rand(1, 3, 32, 48)
    assert torch.equal(vit.maps(x)[1][0, :, 1, 2], vit(x)[1][0, 1 + 1 * 3 + 2])


def test_vit_every_parameter_learns():
    model = ViTFeatures("vit_tiny_patch16_224", (0, 1), **TINY)
    sum(t.square().mean() for t in model(torch.rand(1, 3, 32, 32))).backward()
    assert len(model.body.blocks) == 2 and all(p.grad is not None for p in model.parameters())


def test_vit_other_grid_in_a_file_is_an_error(tmp_path):
    torch.save(timm.create_model("vit_tiny_patch16_224", **TINY | dict(img_size=64)).state_dict(), tmp_path / "w.pt")
    with pytest.raises(ValueError, match="pos_embed"):
        ViTFeatures("vit_tiny_patch16_224", (0,), weights=tmp_path / "w.pt", **TINY)


def test_resize_positions():
    table = torch.rand(1, 1 + 6, 5)
    as_map = table[:, 1:].reshape(1, 2, 3, 5).permute(0, 3, 1, 2)
    for mode in ("bilinear", "bicubic"):
        got = resize_positions(table, (2, 3), (4, 5), *([mode] if mode == "bicubic" else []))      # bilinear is the default
        want = torch.nn.functional.interpolate(as_map, size=(4, 5), mode=mode, align_corners=False)
        assert torch.equal(got[:, 0], table[:, 0]) and got.shape == (1, 21, 5)
        assert torch.allclose(got[:, 1:].reshape(1, 4, 5, 5), want.permute(0, 2, 3, 1), atol=1e-6)


def test_a_vit_resizes_its_positions_as_it_is_told():
    pixels, found = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(0)), []
    for how in ("bilinear", "bicubic", "bicubic"):
        torch.manual_seed(0)
        found.append(ViTFeatures("vit_tiny_patch16_224", (0,), interpolation=how, **TINY).eval()(pixels)[0])
    assert torch.equal(found[1], found[2]) and not torch.equal(found[0], found[1])


def test_defaults_are_the_papers(vit):
    with torch.device("meta"): lseg = ViTFeatures()
    assert (lseg.blocks, lseg.interpolation, lseg.patch, lseg.grid, lseg.dim) == ((5, 11, 17, 23), "bilinear", 16, (24, 24), 1024)
    small = SmallPyramid()
    assert (small.channels, small.strides) == ((24, 48, 72, 96), (2, 4, 8, 16))
    block = torch.nn.Conv2d, torch.nn.BatchNorm2d, torch.nn.ReLU
    for part in (small.stem, *small.stages): assert tuple(map(type, part)) == 2 * block and part[0].bias is None
    assert sum(p.numel() for p in small.parameters()) == 271_272
    x = torch.rand(1, 3, 16, 16)
    pooled = torch.nn.functional.max_pool2d(small.eval().stem(small.normalise(x)), 2)
    assert torch.equal(small(x)[0], small.stages[0](pooled))
    assert small.normalise.mean.unique() == .5 and small.normalise.std.unique() == .25
    assert Normalise().mean.flatten().tolist() == pytest.approx([.485, .456, .406])
    assert Normalise().std.flatten().tolist() == pytest.approx([.229, .224, .225])
    assert vit.normalise.mean.flatten().tolist() == [.5] * 3      # each timm model has its own


def test_spatial_code_of_many_grids():
    for h, w in [(1, 1), (1, 7), (40, 40), (3, 2)]:
        code = spatial_code(h, w, dtype=torch.float64)
        assert code.shape == (8, h, w) and code[0, 0, 0] == -1 and code[2, 0, -1] == 1 and code[3, -1, 0] == 1
        assert torch.allclose(code[2] - code[0], torch.full((h, w), 2 / w, dtype=torch.float64))
        assert torch.allclose(code[7], torch.full((h, w), 1 / h, dtype=torch.float64))


def test_spatial_code_by_hand():
    want = [[-1, 0], [-1, -1], [0, 1], [1, 1], [-.5, .5], [0, 0], [.5, .5], [1, 1]]  # one row of two cells
    assert spatial_code(1, 2)[:, 0].tolist() == want
    tall = spatial_code(2, 1)[:, :, 0]      # and one column: x and y change places
    assert tall[[1, 0, 3, 2, 5, 4, 7, 6]].tolist() == want


@pytest.mark.parametrize("stride", [8, 16])
def test_what_would_go_wrong_silently_is_refused(stride, vit, resnet):
    check_images(torch.zeros(1, 3, 3 * stride, stride), stride)
    for x in (torch.zeros(1, 3, stride, stride + 1), torch.zeros(1, 3, stride - 1, stride), torch.zeros(1, 1, stride, stride),
              torch.zeros(3, stride, stride), torch.zeros(1, 3, stride, stride, dtype=torch.uint8)):
        with pytest.raises(ValueError) as e: check_images(x, stride)
        said = f"images: got {x.dtype} {tuple(x.shape)}; wanted float (B, 3, H, W), H and W multiples of {stride}"
        assert str(e.value) == said
        for model in (SmallPyramid(width=4), vit, resnet):
            with pytest.raises(ValueError, match="images: got"): model(x)


@pytest.mark.parametrize("make, error, words", [
    (lambda: ResNetPyramid("resnet18"), NotImplementedError, "BasicBlock"),
    (lambda: ResNetPyramid("resnet5"), ValueError, "resnet5"),
    (lambda: ResNetPyramid("resnet50", weights="IMAGENET"), ValueError, "weights: .*IMAGENET1K_V2"),
    (lambda: resnet_weights("resnet152", "COCO_WITH_VOC_LABELS_V1"), ValueError, "IMAGENET1K_V1"),
    (lambda: ViTFeatures("vit_huge"), RuntimeError, "vit_huge"),
    (lambda: ViTFeatures("vit_tiny_patch16_224", (0,), weights="x", **TINY), RuntimeError, "tag"),
    (lambda: ViTFeatures("vit_tiny_patch16_224", (0, 3), **TINY), ValueError, "blocks: got .* 0 to 2"),
    (lambda: ViTFeatures("vit_tiny_patch16_224", (0, 2, 1), **TINY), ValueError, "blocks: got .* wanted rising"),
    (lambda: ViTFeatures("vit_tiny_patch16_224", (1, 0), **TINY), ValueError, "rising")])
def test_bad_models(make, error, words):
    with pytest.raises(error, match=words): make()


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
