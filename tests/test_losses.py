"Losses: against torch and torchvision on random data, second opinions by gradcheck, several processes, bad input."
import math
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import box_convert, generalized_box_iou, sigmoid_focal_loss

from lsbook.losses import (binary_cross_entropy, box_loss, dice_loss, focal_loss, gather, in_float32, info_nce, mask_loss,
        pixel_cross_entropy, tag_loss)

MASK_LOSSES = [binary_cross_entropy, dice_loss, focal_loss, mask_loss]


@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(3, 5), (2, 6, 7), (4, 1, 8, 8)])
def test_mask_losses_agree_with_the_libraries(shape):
    x, y = 3 * torch.randn(shape), torch.rand(shape) < 0.3
    assert torch.isclose(binary_cross_entropy(x, y), F.binary_cross_entropy_with_logits(x, y.float()))
    assert torch.isclose(focal_loss(x, y), sigmoid_focal_loss(x, y.float(), 0.25, 2, "mean"))
    p, t = x.sigmoid().flatten(1), y.float().flatten(1)
    dice = torch.stack([1 - (2 * (a @ b) + 1) / (a.sum() + b.sum() + 1) for a, b in zip(p, t)]).mean()
    assert torch.isclose(dice_loss(x, y), dice)
    assert torch.isclose(mask_loss(x, y, 0.5, 2, 3), 0.5 * binary_cross_entropy(x, y) + 2 * dice + 3 * focal_loss(x, y))


@pytest.mark.parametrize("loss", MASK_LOSSES)
def test_mask_losses_gradients_and_extremes(loss):
    x, y = torch.randn(2, 3, 4, dtype=torch.double, requires_grad=True), torch.rand(2, 3, 4) < 0.5
    assert torch.autograd.gradcheck(lambda v: loss(v, y), x)
    sure = torch.where(y, 1e4, -1e4).requires_grad_()
    for target in (y, ~y):
        value = loss(sure, target)
        assert value.isfinite() and torch.autograd.grad(value, sure)[0].isfinite().all()
    assert loss(sure, y) < 1e-3
    soft = torch.rand(2, 3, 4)
    assert loss(torch.randn(2, 3, 4), soft).isfinite()
    assert loss(torch.zeros(0, 4), torch.zeros(0, 4)) == 0


def by_hand(x, y, epsilon=1.):
    "The equations on plain numbers: cross-entropy, dice and focal loss of one image."
    p, n = [1 / (1 + math.exp(-v)) for v in x], len(x)
    true = [q if t else 1 - q for q, t in zip(p, y)]
    bce = sum(-math.log(q) for q in true) / n
    dice = 1 - (2 * sum(q * t for q, t in zip(p, y)) + epsilon) / (sum(p) + sum(y) + epsilon)
    focal = sum(-(.25 if t else .75) * (1 - q) ** 2 * math.log(q) for q, t in zip(true, y)) / n
    return bce, dice, focal


def test_defaults_are_the_equations():
    x, y = [2., -1., 0., .5, -3.], [1, 0, 1, 0, 1]
    X, Y = torch.tensor([x], dtype=torch.double), torch.tensor([y])
    bce, dice, focal = by_hand(x, y)
    for loss, want in ((binary_cross_entropy, bce), (dice_loss, dice), (focal_loss, focal), (mask_loss, bce + dice)):
        assert loss(X, Y).item() == pytest.approx(want, rel=1e-9), loss.__name__
    assert dice_loss(X, Y, 3.).item() == pytest.approx(by_hand(x, y, 3.)[1], rel=1e-9)
    for weights in ((1, 0, 0), (0, 4, 4), (2, 3, 5)): # STEP's, VG-LAW's, and any
        want = sum(w * v for w, v in zip(weights, (bce, dice, focal)))
        assert mask_loss(X, Y, *weights).item() == pytest.approx(want, rel=1e-9)


def test_dice_weighs_images_alike_and_the_others_pixels():
    x = torch.tensor([[0., 0, 0, 0], [9, 9, 9, 9]], dtype=torch.double)
    y = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]])
    each = [by_hand(a.tolist(), b.tolist()) for a, b in zip(x, y)]
    for loss, want in zip((binary_cross_entropy, dice_loss, focal_loss), zip(*each)):
        assert loss(x, y).item() == pytest.approx(sum(want) / 2, rel=1e-9), loss.__name__


def test_a_loss_of_weight_0_is_not_computed():
    nan = torch.full((1, 2), math.nan)
    assert mask_loss(nan, torch.zeros(1, 2), 0, 0, 0) == 0


@pytest.mark.parametrize("loss", [*MASK_LOSSES, tag_loss, box_loss, info_nce])
def test_nothing_broadcasts(loss):
    for shape, other in (((2, 1, 4), (2, 4)), ((2, 4), (1, 4)), ((2, 4), (2, 1))):
        with pytest.raises(ValueError) as e: loss(torch.rand(shape), torch.rand(other))
        assert str(e.value) == f"target: got shape {other}; wanted {shape}"


def test_box_loss_agrees_with_torchvision():
    a, b = torch.rand(2, 200, 4, dtype=torch.double) * 0.9 + 0.05
    giou = generalized_box_iou(*(box_convert(v, "cxcywh", "xyxy") for v in (a, b))).diagonal()
    want = 5 * (a - b).abs().sum(1).mean() + 2 * (1 - giou).mean()
    assert torch.isclose(box_loss(a, b, l1=5, giou=2), want, atol=1e-5)
    a = a[:5].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: box_loss(v, b[:5]), a)


def test_box_loss_of_points_and_of_nothing():
    point = torch.tensor([[0.5, 0.5, 0., 0.]], requires_grad=True)
    value = box_loss(point, torch.tensor([[0.2, 0.2, 0., 0.]]))
    value.backward()
    assert value.isfinite() and point.grad.isfinite().all()
    empty = torch.zeros(0, 4, requires_grad=True)
    assert box_loss(empty, empty.detach()) == 0


def test_box_loss_defaults_and_weights_by_hand():
    a, b = torch.tensor([[.25, .25, .5, .5]]), torch.tensor([[.75, .75, .5, .5]])
    assert box_loss(a, b).item() == pytest.approx(2.5) # L1 of 1 and 1 - GIoU of 1.5, both of weight 1
    assert box_loss(a, b, 3, 0).item() == pytest.approx(3) and box_loss(a, b, 0, 2).item() == pytest.approx(3)
    assert box_loss(a[0], b[0]).item() == pytest.approx(2.5) # one box is one box
    assert box_loss(torch.cat([a, b]), torch.cat([b, b])).item() == pytest.approx(1.25) # a mean over boxes
    taller = torch.tensor([[.25, .25, .5, 1.]])
    assert box_loss(a, taller, 1, 0).item() == pytest.approx(.5) and box_loss(a, taller, 0, 1).item() == pytest.approx(.5)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_pixel_cross_entropy_agrees_with_torch(dtype):
    x, y = torch.randn(2, 7, 5, 6, requires_grad=True), torch.randint(0, 7, (2, 5, 6)).to(dtype)
    y[torch.rand(y.shape) < 0.3] = 255 if dtype != torch.int32 else -1
    ignore = 255 if dtype != torch.int32 else -1
    ours, theirs = pixel_cross_entropy(x, y, ignore), F.cross_entropy(x, y.long(), ignore_index=ignore)
    assert torch.isclose(ours, theirs)
    assert torch.allclose(*(torch.autograd.grad(v, x)[0] for v in (ours, theirs)), atol=1e-7)


@pytest.mark.parametrize("value", [0., 1e30])
def test_pixel_cross_entropy_of_nothing(value):
    x = torch.full((1, 3, 2, 2), value, requires_grad=True)
    loss = pixel_cross_entropy(x, torch.full((1, 2, 2), 255))
    loss.backward()
    assert loss == 0 and torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("x, y", [
    (torch.zeros(1, 3, 4, 4), torch.zeros(1, 4, 5)), (torch.zeros(1, 3, 4, 4), torch.zeros(4, 4)),
    (torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)), (torch.zeros(2, 3, 4, 4), torch.zeros(1, 4, 4)),
    (torch.zeros(1, 3, 4, 4), torch.full((1, 4, 4), 3)), (torch.zeros(1, 3, 4, 4), torch.full((1, 4, 4), -1))])
def test_torch_refuses_wrong_label_maps(x, y):
    with pytest.raises((ValueError, RuntimeError, IndexError)): pixel_cross_entropy(x, y.long())


def test_a_label_that_would_be_ignored_is_refused():
    x, y = torch.zeros(1, 256, 1, 1), torch.zeros(1, 1, 1)
    with pytest.raises(ValueError, match="ignore: got 255; wanted a value that is none of 256 labels"):
        pixel_cross_entropy(x, y)
    with pytest.raises(ValueError, match="ignore: got 0"): pixel_cross_entropy(x, y, 0)
    assert pixel_cross_entropy(x, y, 256).item() == pytest.approx(math.log(256))
    assert pixel_cross_entropy(x[:, :255], y).item() == pytest.approx(math.log(255)) # 255 is ignored by default
    assert pixel_cross_entropy(x[:, :255], torch.full((1, 1, 1), 255)) == 0


def test_info_nce_is_the_equation():
    a, b = torch.randn(2, 5, 8, dtype=torch.double)
    c = 7 * torch.stack([torch.stack([torch.cosine_similarity(u, v, 0) for v in b]) for u in a])
    rows = sum(-torch.log(c[i, i].exp() / c[i].exp().sum()) for i in range(5)) / 5
    columns = sum(-torch.log(c[i, i].exp() / c[:, i].exp().sum()) for i in range(5)) / 5
    assert torch.isclose(info_nce(a, b, 7), (rows + columns) / 2)
    assert torch.isclose(info_nce(a, b, 7), info_nce(b, a, 7)) # symmetric
    a.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: info_nce(v, b, 7), a)


def test_info_nce_edges():
    one = torch.randn(1, 4, requires_grad=True)
    info_nce(one, torch.randn(1, 4)).backward()
    assert one.grad.abs().max() < 1e-6 # a single pair: nothing to choose between
    zero = torch.zeros(2, 4, requires_grad=True)
    info_nce(zero, torch.randn(2, 4)).backward()
    assert zero.grad.isfinite().all()
    a, b = torch.randn(2, 3, 4)
    assert info_nce(a, b) == info_nce(a, b, 1 / .07) # GroupViT's start is the default


PROCESSES = """
import sys, torch, torch.distributed as dist, torch.multiprocessing as mp
from lsbook.losses import gather, info_nce
def go(rank, world, file):
    dist.init_process_group("gloo", init_method="file://" + file, rank=rank, world_size=world)
    torch.manual_seed(0)
    image, text = torch.randn(2, 6, 5)
    grads = []
    for mine in (slice(rank * 6 // world, (rank + 1) * 6 // world), None):
        if mine is None: dist.destroy_process_group() # the second round: one process, the whole batch
        torch.manual_seed(1)
        tower, scale = torch.nn.Linear(5, 4), torch.tensor(5., requires_grad=True)
        a, b = (tower(x if mine is None else x[mine]) for x in (image, text.tanh()))
        loss = info_nce(a, b, scale)
        loss.backward()
        found = [loss.detach().clone(), tower.weight.grad, tower.bias.grad, scale.grad]
        if mine is not None:
            for g in found: dist.all_reduce(g); g /= world # what DistributedDataParallel does with gradients
            with torch.autocast("cpu", torch.bfloat16):
                assert torch.isclose(info_nce(a.detach(), b.detach(), scale), loss)
            try: gather(torch.zeros(2 + rank, 3))
            except ValueError as e: assert "[2, 3]" in str(e), e
            else: raise AssertionError("unequal batches went through")
        grads.append(found)
    for several, single in zip(*grads): assert torch.allclose(several, single, atol=1e-6), (several, single)
if __name__ == "__main__": mp.spawn(go, args=(2, sys.argv[1]), nprocs=2)
"""


def test_two_processes_are_one_batch(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(PROCESSES)
    done = subprocess.run([sys.executable, script, str(tmp_path / "meet")], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_gather_in_one_process():
    x = torch.zeros(2, 3)
    assert gather(x) is x


def test_tag_loss_agrees_with_torch():
    x, y = torch.randn(6, 9), torch.rand(6, 9) < 0.2
    assert torch.isclose(tag_loss(x, y), F.multilabel_soft_margin_loss(x, y.float()))
    assert torch.isclose(tag_loss(x, y), F.binary_cross_entropy_with_logits(x, y.float()))
    assert tag_loss(torch.zeros(0, 3), torch.zeros(0, 3)) == 0


def calls(device="cpu"):
    x, y, z = (torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(i)).to(device) for i in range(3))
    return {"bce": lambda c: binary_cross_entropy(c(x), y > 0), "dice": lambda c: dice_loss(c(x), y > 0),
            "focal": lambda c: focal_loss(c(x), y > 0), "tags": lambda c: tag_loss(c(x[:, :, 0, 0]), y[:, :, 0, 0] > 0),
            "pixels": lambda c: pixel_cross_entropy(c(x), (y[:, 0] > 0).long()),
            "box": lambda c: box_loss(c(x[0, 0, :, :4].sigmoid()), y[0, 0, :, :4].sigmoid()),
            "nce": lambda c: info_nce(c(x[0, 0]), c(z[0, 0]), 14.)}


@pytest.mark.parametrize("name", calls())
def test_float32_under_autocast(name):
    loss = calls()[name]
    plain = loss(lambda v: v)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(lambda v: v).dtype == torch.float32 and torch.equal(loss(lambda v: v), plain)
    half = loss(lambda v: v.bfloat16())
    assert half.dtype == torch.float32 and torch.isclose(half, plain, rtol=0.05)


def test_in_float32_keeps_names_and_defaults():
    assert dice_loss.__name__ == "dice_loss" and "smooth" in dice_loss.__doc__
    typed = in_float32(lambda a, b=None: (a if b is None else b).dtype)
    x = torch.zeros(1)
    for wide in (typed(x.half()), typed(x.bfloat16()), typed(x), typed(x, b=x.half()), typed(x, x.bfloat16())):
        assert wide == torch.float32
    assert typed(x.double()) == torch.float64 and typed(x.long()) == torch.int64 # only half precision is widened


@pytest.mark.parametrize("name", calls())
def test_same_numbers_on_a_gpu(name):
    if not torch.cuda.is_available(): pytest.skip("no GPU")
    want, got = calls()[name](lambda v: v), calls("cuda")[name](lambda v: v)
    assert got.device.type == "cuda" and torch.isclose(got.cpu(), want, rtol=1e-4)
    with torch.autocast("cuda", torch.bfloat16): assert torch.isclose(calls("cuda")[name](lambda v: v), got, rtol=1e-5)
