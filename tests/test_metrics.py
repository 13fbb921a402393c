"The metrics against torchmetrics, torchvision and plain loops, in several processes, and on bad input."
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from lsbook.metrics import ConfusionMatrix, MaskMeter, _to_size, box_iou, evaluate, iou

RNG = np.random.default_rng(0)

# torchmetrics, torchvision and datasets are imported by the tests that need them: each process below loads this file


def masks(n, size=24, p=.4, seed=0):
    g = torch.Generator().manual_seed(seed)
    truth = torch.rand(n, size, size, generator=g) < p
    return truth ^ (torch.rand(n, size, size, generator=g) < torch.rand(n, 1, 1, generator=g) * .5), truth


def test_iou_against_torchmetrics():
    import torchmetrics.classification as oracle
    pred, truth = masks(20)
    want = [oracle.BinaryJaccardIndex()(p, t).item() for p, t in zip(pred, truth)]
    np.testing.assert_allclose(iou(pred, truth), want, rtol=1e-6)


def test_mask_meter_against_plain_loops():
    import torchmetrics.classification as oracle
    from torchvision.ops import box_iou as torchvision_box_iou
    pred, truth = masks(300)
    pred[0], truth[0], pred[1], truth[2] = False, False, False, False
    boxes = torch.rand(2, 300, 4) * 20
    boxes[..., 2:] += boxes[..., :2]
    kinds = [("a", "b", "c")[i % 3] for i in range(300)]
    meter = MaskMeter()
    meter.update(pred[:200], truth[:200], boxes[0, :200], boxes[1, :200], "d")
    kinds[:200] = 200 * ["d"]
    for i in range(200, 300):
        meter.update(pred[i].numpy(), Image.fromarray(truth[i].numpy()), boxes[0, i].tolist(), boxes[1, i], kinds[i])
    got = meter.compute()
    I = [int(np.logical_and(p, t).sum()) for p, t in zip(pred.numpy(), truth.numpy())]
    U = [int(np.logical_or(p, t).sum()) for p, t in zip(pred.numpy(), truth.numpy())]
    each = np.array([i / u if u else 1 for i, u in zip(I, U)])
    want = {"mIoU": each.mean(), "oIoU": sum(I) / sum(U)}
    want |= {f"Prec@{x}": (each >= x).mean() for x in (.5, .6, .7, .8, .9)}
    want |= {f"mIoU/{k}": each[[q == k for q in kinds]].mean() for k in "abcd"}
    want["box Prec@0.5"] = (torchvision_box_iou(*boxes).diagonal() >= .5).double().mean().item()
    assert got.keys() == want.keys()
    for key in want: assert got[key] == pytest.approx(want[key], abs=1e-12), key
    assert all(type(v) is float for v in got.values())
    assert got["oIoU"] == pytest.approx(oracle.BinaryJaccardIndex()(pred, truth).item(), rel=1e-6)


@pytest.mark.parametrize("tenths", [5, 6, 7, 8, 9])
def test_an_iou_of_exactly_x_reaches_x(tenths):
    for times in range(1, 40):
        pred, truth = torch.zeros(2, 20, 20, dtype=torch.bool)
        truth.view(-1)[:10 * times] = True
        pred.view(-1)[:tenths * times] = True
        for short in (0, 1):
            meter = MaskMeter()
            pred.view(-1)[0] = not short
            meter.update(pred, truth)
            assert meter.compute()[f"Prec@0.{tenths}"] == 1 - short


def test_box_iou_against_torchvision():
    from torchvision.ops import box_iou as torchvision_box_iou
    a, b = torch.rand(2, 200, 4, dtype=torch.double) * 50
    a[:, 2:] += a[:, :2]; b[:, 2:] += b[:, :2]
    assert torch.allclose(box_iou(a, b), torchvision_box_iou(a, b).diagonal())
    assert box_iou([0, 0, 0, 0], [0, 0, 0, 0]) == 0 and box_iou([5, 5, 1, 1], [0, 0, 9, 9]) == 0
    assert box_iou([0, 0, 2, 2], [5, 5, 9, 9]) == 0 and box_iou([0, 0, 2, 2], [1, 5, 3, 9]) == 0 # apart: not negative
    assert box_iou([0, 0, 4, 4], [2, 0, 6, 4]).item() == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match=r"boxes: got \[3, 4\], \[4\]; wanted"): box_iou(torch.zeros(3, 4), torch.zeros(4))
    with pytest.raises(RuntimeError): box_iou(torch.zeros(5), torch.zeros(5))


def test_a_missing_box_is_a_miss_and_a_missing_truth_is_left_out():
    pred, truth = masks(3)
    meter = MaskMeter()
    meter.update(pred[0], truth[0], None, [0, 0, 9, 9])
    meter.update(pred[1], truth[1], [0, 0, 9, 9], [0, 0, 9, 9])
    meter.update(pred[2], truth[2], [0, 0, 9, 9], None)
    assert meter.compute()["box Prec@0.5"] == .5


@pytest.mark.parametrize("args, error, what", [
    ((torch.zeros(4, 4), torch.zeros(4, 4, dtype=torch.bool)), ValueError, "pred, target: got torch.float32.*threshold"),
    ((np.zeros((4, 4), int), np.zeros((4, 4))), ValueError, "and torch.float64.*threshold"),
    ((np.zeros((4, 4), int), np.zeros((4, 5), int)), ValueError, r"\(4, 4\) and torch.int64 \(4, 5\)"),
    ((np.zeros((4, 4), int), np.zeros((1, 4), int)), ValueError, "of one shape"),
    ((np.zeros(4, int), np.zeros(4, int)), IndexError, "Dimension"),
    ((np.zeros((4, 4), int),) * 2 + ([0, 0, 1], [0, 0, 1, 1]), RuntimeError, "shape"),
    ((np.zeros((4, 4), int),) * 2 + (None, [0, 0, 1]), RuntimeError, "shape")])
def test_bad_pairs(args, error, what):
    meter = MaskMeter()
    with pytest.raises(error, match=what): meter.update(*args)
    assert not meter.counts and not meter.boxes and not meter.kinds      # nothing of it has stayed


def test_masks_are_object_where_they_are_not_0():
    assert iou(np.array([[0, 255, 2, -1]]), np.array([[0, 1, 1, 1]])) == 1
    assert iou(Image.fromarray(np.array([[0, 255]], np.uint8)), torch.tensor([[False, True]])) == 1


def test_an_empty_union_is_right_and_counts():
    nothing, thing = torch.zeros(2, 2, dtype=torch.bool), torch.tensor([[True, False], [False, False]])
    meter = MaskMeter()
    meter.update(nothing, nothing)
    assert set(meter.compute().values()) == {1.0}
    meter.update(nothing, thing)
    assert meter.compute() == {"mIoU": .5, "oIoU": 0., **{f"Prec@0.{k}": .5 for k in range(5, 10)}}


def test_a_box_iou_of_exactly_one_half_is_found():
    thing = torch.ones(2, 2, dtype=torch.bool)
    for width, found in ((2, 1.), (2.01, 0.)): # 2 x 1 shared, and a little less than half of what is touched
        meter = MaskMeter()
        meter.update(thing, thing, [0, 0, width, 1], [0, 0, 1, 1])
        assert meter.compute()["box Prec@0.5"] == found


@pytest.mark.parametrize("n, ignore", [(5, 255), (5, -1), (150, 255), (300, 65535), (1, 255)])
def test_confusion_matrix_against_torchmetrics(n, ignore):
    import torchmetrics.classification as oracle
    truth = torch.from_numpy(RNG.integers(0, n, (4, 50, 40)))
    other = torch.from_numpy(RNG.integers(0, n, (4, 50, 40)))
    pred = torch.where(torch.from_numpy(RNG.random((4, 50, 40)) < .6), truth, other)
    truth[:, :5] = ignore
    m = ConfusionMatrix(n, ignore)
    for p, t in zip(pred, truth): m.update(p, t)
    if n > 1:
        want = oracle.MulticlassConfusionMatrix(n, ignore_index=ignore)(pred, truth)
        assert (m.matrix()[:, :n] == want).all()
        each = oracle.MulticlassJaccardIndex(n, average=None, ignore_index=ignore)(pred, truth)
        np.testing.assert_allclose(m.iou(), each, rtol=1e-5)
        right = oracle.MulticlassAccuracy(n, average="micro", ignore_index=ignore)(pred, truth).item()
        assert m.compute()["accuracy"] == pytest.approx(right, rel=1e-6)
    else: assert m.compute() == {"mIoU": 1.0, "accuracy": 1.0}
    assert m.matrix().sum() == (truth != ignore).sum()


def test_values_that_are_no_label_are_wrong_and_never_misfiled():
    for value in (3, 4, 254, 255, -1, -300, 2 ** 40):
        m = ConfusionMatrix(3)
        m.update(torch.tensor([value, 1]), torch.tensor([0, 1]))
        assert m.matrix().tolist() == [[0, 0, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]] and m.compute()["accuracy"] == .5
        assert m.iou()[0] == 0 and m.iou()[1] == 1 and m.iou()[2].isnan()
        bad = ConfusionMatrix(3)
        bad.update(torch.tensor([0, 1]), torch.tensor([value, 1]))
        if value != 255:
            with pytest.raises(ValueError, match="target: got 1 other values; wanted 0..2, 255"): bad.compute()


def test_confusion_matrix_bad_input():
    for args in ((256,), (256, 255), (3, 2), (3, 0)):
        with pytest.raises(ValueError, match=f"ignore: got {args[1] if args[1:] else 255}"): ConfusionMatrix(*args)
    last = ConfusionMatrix(3, 3)      # the first value that is no label
    last.update(torch.tensor([0, 1]), torch.tensor([0, 3]))
    assert last.compute() == {"mIoU": 1.0, "accuracy": 1.0}
    m = ConfusionMatrix(3)
    with pytest.raises(ValueError, match="float32"): m.update(torch.zeros(3), torch.zeros(3, dtype=int))
    with pytest.raises(ValueError, match="shape"): m.update(torch.zeros(3, dtype=int), torch.zeros(4, dtype=int))
    assert math.isnan(m.compute()["mIoU"]) and math.isnan(m.compute()["accuracy"])      # nothing seen: no number
    m.update(np.zeros((2, 2), np.uint16), Image.fromarray(np.zeros((2, 2), np.uint8)))
    assert m.compute()["accuracy"] == 1 and isinstance(m.compute()["mIoU"], float)


def test_nearest_resize_takes_old_values_only_and_agrees_with_pil():
    a = RNG.integers(0, 7, (37, 53)).astype(np.uint8)
    for size in (10, 37, 100):
        want = np.array(Image.fromarray(a).resize((size, size), Image.Resampling.NEAREST))
        assert (_to_size(a, size).numpy() == want).mean() > .99
    assert _to_size(Image.fromarray(a.astype(np.uint16) * 1000), 20).max() == 6000


class Copycat(torch.nn.Module):
    "Knows its answers by the picture's first pixel."
    def __init__(self, answers):
        super().__init__()
        self.answers, self.calls, self.modes = answers, [], []

    def segment(self, images, texts):
        self.calls.append(len(images)); self.modes.append(self.training)
        out = []
        for image in images:
            i = int(np.asarray(image)[0, 0, 0])
            box = None if i % 3 == 0 else [0, 0, 4, 4]
            out.append(SimpleNamespace(mask=self.answers[i], label_map=self.answers[i], box=box))
        return out


def referring_rows(n, kind=True):
    "Pictures of n sizes, a model that gets about 80 % of their pixels right, and every third answer empty."
    pred, rows = [], []
    for i in range(n):
        h, w = 10 + i, 20 - i % 5
        truth = RNG.random((h, w)) < .5
        pred.append(truth ^ (RNG.random((h, w)) < .2) if i % 3 else np.zeros((h, w), bool))
        rows.append(dict(image=Image.fromarray(np.full((h, w, 3), i, np.uint8)), expression=f"thing {i}",
                         mask=Image.fromarray(truth * np.uint8(255)), box=[0., 0., 4., 5.]))
        if kind: rows[-1]["kind"] = "xy"[i % 2]
    return Copycat(pred), rows


def test_evaluate_takes_lists_and_data_sets_alike():
    import datasets
    model, rows = referring_rows(11)
    want = evaluate(model, rows, batch_size=4)
    assert model.calls == [4, 4, 3] and model.modes == [False] * 3 and model.training
    features = datasets.Features(image=datasets.Image(), mask=datasets.Image(), expression=datasets.Value("string"),
                                 box=datasets.Sequence(datasets.Value("float32"), length=4),
                                 kind=datasets.Value("string"))
    ds = datasets.Dataset.from_list(rows, features=features)
    assert evaluate(model, ds, batch_size=3) == want and evaluate(model, ds.to_iterable_dataset(), batch_size=5) == want
    assert want["box Prec@0.5"] == pytest.approx(7 / 11) and {"mIoU/x", "mIoU/y"} <= want.keys()
    fixed = evaluate(model, rows, size=30)
    assert fixed["mIoU"] == pytest.approx(want["mIoU"], abs=.05) and fixed["oIoU"] != want["oIoU"]
    assert not any("/" in k for k in evaluate(model.train(False), referring_rows(3, kind=False)[1]))
    assert not model.training


def semantic_rows(n, names):
    maps = [RNG.integers(0, len(names), (9 + i, 12)) for i in range(n)]
    answers = [np.where(RNG.random(m.shape) < .3, 0, m) for m in maps]
    images = [Image.fromarray(np.full((*m.shape, 3), i, np.uint8)) for i, m in enumerate(maps)]
    kind = np.uint8 if len(names) <= 255 else np.uint16
    return Copycat(answers), [dict(image=i, label_map=Image.fromarray(m.astype(kind))) for i, m in zip(images, maps)]


def test_evaluate_label_maps_seen_and_unseen():
    names = ["a", "b", "c", "d"]
    model, rows = semantic_rows(5, names[:3])
    plain = evaluate(model, rows, names=names)
    assert math.isnan(plain["IoU/d"]) and plain["mIoU"] == pytest.approx(np.mean([plain[f"IoU/{n}"] for n in "abc"]))
    assert not any(k.startswith("mIoU/") for k in plain)
    for labels in (["a", "b"], ("b", "a", "elsewhere")):
        model.config = SimpleNamespace(labels=labels)
        got = evaluate(model, rows, names=names)
        assert got["mIoU/seen"] == pytest.approx((got["IoU/a"] + got["IoU/b"]) / 2)
        assert got["mIoU/unseen"] == got["IoU/c"]
    model.config = SimpleNamespace(labels=["a", "d"])      # d was trained and never occurs, nor does e, which was not
    got = evaluate(model, rows, names=[*names, "e"])
    assert got["mIoU/seen"] == got["IoU/a"] and got["mIoU/unseen"] == pytest.approx((got["IoU/b"] + got["IoU/c"]) / 2)
    for labels in (names, [], None):
        model.config = SimpleNamespace(labels=labels)
        assert evaluate(model, rows, names=names).keys() == plain.keys()
    many = [str(i) for i in range(400)]
    assert evaluate(*semantic_rows(2, many), names=many)["accuracy"] > .6


@pytest.mark.parametrize("n, ignored", [(254, 255), (255, 255), (256, 65535), (300, 65535)])
def test_what_is_ignored_is_no_label(n, ignored):
    truth = np.array([[0, n - 1, ignored]])      # the last of n labels counts, what is ignored does not
    rows = [dict(image=np.zeros((1, 3, 3), np.uint8), label_map=truth)]
    got = evaluate(Copycat([np.array([[0, 0, 0]])]), rows, names=[str(i) for i in range(n)])
    assert got["accuracy"] == .5 and got["IoU/0"] == .5 and got[f"IoU/{n - 1}"] == 0


def test_evaluate_bad_input():
    model, rows = referring_rows(3)
    with pytest.raises(ValueError, match=r"rows: got \[\]; wanted"): evaluate(model, [])
    with pytest.raises(TypeError, match="once"): evaluate(model, iter(rows))
    with pytest.raises(ValueError, match="caption"): evaluate(model, [dict(image=1, caption="x")])
    model.train()
    short = SimpleNamespace(segment=lambda images, texts: [])
    with pytest.raises(ValueError, match="shorter"): evaluate(short, rows)
    model.answers = [np.zeros((2, 2), bool)] * 3
    with pytest.raises(ValueError, match=r"\(2, 2\)"): evaluate(model, rows)
    assert model.training      # also after an error


class Selectable(list):
    "Rows that can be picked by number, as a Dataset can; datasets itself takes seconds to import."
    def select(self, which): return [self[i] for i in which]


def test_gather_leaves_the_meter_alone():
    meter, table = MaskMeter(), ConfusionMatrix(3)
    meter.update(*masks(4))
    table.update(torch.tensor([0, 1]), torch.tensor([0, 2]))
    meter.gather().update(*masks(4)), table.gather().update(torch.tensor([0]), torch.tensor([0]))
    assert sum(map(len, meter.counts)) == 4 and table.matrix().sum() == 2
    assert ConfusionMatrix(3, -1).gather().ignore == -1


def _process(rank, world, port, out):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    global RNG
    RNG = np.random.default_rng(7)
    (model, rows), semantic = referring_rows(7), semantic_rows(5, ["a", "b", "c"])
    referring = model, Selectable(rows)
    got = evaluate(*referring, batch_size=2), evaluate(*semantic, batch_size=2, names=["a", "b", "c"])
    torch.save((got, referring[0].calls), f"{out}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_give_what_one_gives(tmp_path):
    import socket
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    torch.multiprocessing.spawn(_process, (2, port, str(tmp_path)), nprocs=2)
    parts = [torch.load(tmp_path / f"{r}.pt", weights_only=False) for r in range(2)]
    global RNG
    RNG = np.random.default_rng(7)
    want = evaluate(*referring_rows(7)), evaluate(*semantic_rows(5, ["a", "b", "c"]), names=["a", "b", "c"])
    for got, _ in parts:
        for g, w in zip(got, want): assert g == pytest.approx(w, abs=1e-12)
    assert [sum(calls) for _, calls in parts] == [4, 3]      # every row once


def test_nothing_is_printed_where_no_terminal_watches(capfd):
    evaluate(*referring_rows(3))
    assert capfd.readouterr() == ("", "")


@pytest.mark.cuda
def test_update_never_waits_for_the_gpu():
    pred, truth = (m.cuda() for m in masks(8))
    labels, wrong = torch.randint(0, 9, (2, 64, 64)).cuda()
    boxes = torch.rand(8, 4).cuda()
    meter, table = MaskMeter(), ConfusionMatrix(9)
    for _ in range(2): meter.update(pred, truth, boxes, boxes), table.update(wrong, labels)      # warm up
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5): meter.update(pred, truth, boxes, boxes); table.update(wrong, labels)
    finally: torch.cuda.set_sync_debug_mode("default")
    assert sum(map(len, meter.counts)) == 56
    cpu = ConfusionMatrix(9)
    cpu.update(wrong.cpu(), labels.cpu())
    assert (table.matrix() == 7 * cpu.matrix()).all()
