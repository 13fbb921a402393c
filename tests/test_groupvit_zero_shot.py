"""GroupViT's zero-shot segmentation: composed maps, sentences, background, windows, protocols; bad input; devices."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from lsbook import scenes
from lsbook.groupvit.contrastive import templates
from lsbook.groupvit.model import GroupViT, GroupViTConfig
from lsbook.groupvit.zero_shot import *
from lsbook.metrics import evaluate

WORDS = dict(text="words", words=scenes.words(), embed_dim=24, projector=0, ask="bare")

def made(**kwargs):
    "Two stages on patches of 8, with random numbers"
    torch.manual_seed(0)
    config = dict(dim=24, heads=3, depths=(1, 1, 1), group_tokens=(6, 4, 0), groups=(6, 4, 0), image_size=32, patch=8, init=.5,
                  short_side=32, drop_path=0., **WORDS)
    return GroupViT(GroupViTConfig(**config | kwargs)).eval()

@pytest.fixture(scope="module")
def model(): return made()

def noise(h, w, seed=0): return np.random.default_rng(seed).integers(0, 255, (h, w, 3), dtype=np.uint8)

LABELS = ["grass", "red circle", "blue star", "sand", "water", "stone", "white cross"]

def test_shares_are_the_product_of_the_stages(model):
    e = model.encode_image(noise(32, 64))
    first, second = e.features["maps"]
    for hard in (False, True):
        a, b = (first, second) if not hard else (F.one_hot(m.argmax(0), len(m)).movedim(-1, 0).float() for m in (first, second))
        want = F.interpolate(torch.einsum("hg,gyx->hyx", b, a)[None], (32, 64), mode="bilinear")[0]
        assert torch.allclose(segment_shares(model, e, hard), want, atol=1e-5)
        assert torch.allclose(segment_shares(model, e, hard).sum(0), torch.ones(32, 64), atol=1e-5)

def test_labels_of_segments(model):
    e, text = model.encode_image(noise(32, 32)), model.encode_text(LABELS)
    logits = (e.features["segments"] @ text.T) * model.scale
    for g, (share, label, p) in enumerate(segment_labels(model, e, LABELS)):
        assert label == LABELS[logits[g].argmax()] and np.isclose(p, logits[g].softmax(0).max().item())
        assert np.isclose(share, segment_shares(model, e)[g].mean().item(), atol=1e-6)

def test_sentences_are_averaged_as_they_are_or_first_normalised(model):
    forms = ["{}", "white {}", "the small {} of stone"]
    x = torch.stack([model.text([f.format(s) for s in LABELS]).detach() for f in forms])
    assert torch.allclose(ensembled(model, LABELS, forms), F.normalize(x.sum(0), dim=-1), atol=1e-5)
    assert torch.allclose(ensembled(model, LABELS, forms, unit_first=True), F.normalize(F.normalize(x, dim=-1).sum(0), dim=-1), atol=1e-5)
    assert torch.allclose(ensembled(model, LABELS, ["{}"]), model.encode_text(LABELS), atol=1e-6)
    assert len(templates("simple")) == 7

@pytest.mark.parametrize("top", [None, 1, 3, 7, 9])
def test_affinity_by_loops(top):
    g = torch.Generator().manual_seed(0)
    s, i, t = (F.normalize(torch.randn(*n, generator=g), dim=-1) for n in ((4, 5), (5,), (7, 5)))
    allowed = sorted(range(7), key=lambda k: -(t[k] @ i))[:top]
    got = affinity(s, i, t, 3., top)
    for a in range(4):
        e = [(3. * s[a] @ t[k]).exp() for k in range(7)]
        for k in range(7):
            want = e[k] / sum(e)
            if top: want = want * e[k] / sum(e[m] for m in allowed) if k in allowed else torch.tensor(0.)
            assert torch.isclose(got[a, k], want, atol=1e-6)

def test_background_adapts():
    sure = torch.tensor([[.9, .5, .3]])
    say = lambda best, threshold: background(sure, torch.tensor(best), threshold)[0].tolist()
    assert say(.9, .5) == [0, 0, 1] and say(.9, .95) == [0, 1, 1] and say(.2, .95) == [0, 0, 0]
    assert background(sure, torch.tensor(.9), .6).dtype == sure.dtype

def test_windows_cover():
    assert windows((448, 448), (448, 448), 224) == [(0, 0)]
    assert windows((448, 673), (448, 448), 224) == [(0, 0), (0, 224), (0, 225)]
    assert windows((700, 448), (448, 448), 224) == [(0, 0), (224, 0), (252, 0)]
    for h, w, k, stride in ((64, 64, 64, 1), (65, 130, 64, 32), (99, 64, 64, 64)):
        seen = np.zeros((h, w), int)
        for y, x in windows((h, w), (k, k), stride): seen[y:y + k, x:x + k] += 1
        assert seen.min() > 0 and len(set(windows((h, w), (k, k), stride))) == len(windows((h, w), (k, k), stride))

def test_presets_are_those_of_the_facts():
    "Thresholds and windows as the released code and the paper have them"
    got = {k: (p.threshold, p.top, p.window, p.stride, p.hard, p.decide) for k, p in PROTOCOLS.items()}
    assert got == {"plain": (None, None, None, None, False, False), "voc": (.95, 5, 448, 224, False, True),
                   "voc, paper": (.9, None, 448, 224, True, True), "context": (.35, 5, 448, 224, False, True),
                   "context, paper": (.5, None, 448, 224, True, True), "coco": (.95, 5, 448, 224, False, True)}

@pytest.mark.parametrize("size", [(32, 32), (90, 40), (33, 100)])
def test_the_plain_protocol_is_the_model(model, size):
    image = noise(*size)
    labels = scenes.label_names()                                           # more than are mixed at a time
    a, b = model.segment(image, labels), ZeroShot(model).segment(image, labels)
    assert a.label_map.shape == size and (a.label_map == b.label_map).mean() > .999

def by_hand(model, image, labels, threshold, top, k, stride, hard):
    "The released protocol in loops: every window on its own, pixel by pixel"
    x, (frame,) = model.preprocess([Image.fromarray(image)])
    text, (H, W) = model.encode_text(labels), x.shape[-2:]
    total, count = torch.zeros(1 + len(labels), H, W), torch.zeros(H, W)
    for top_, left in windows((H, W), (min(k, H), min(k, W)), stride):
        part = x[..., top_:top_ + k, left:left + k]
        with torch.no_grad(): f = model.image_features(part)
        fits = affinity(f["segments"][0], f["image"][0], text, model.scale, top)
        a, b = (m[0] for m in f["maps"])
        if hard: a, b = (F.one_hot(m.argmax(0), len(m)).movedim(-1, 0).float() for m in (a, b))
        shares = F.interpolate(torch.einsum("hg,gyx->hyx", b, a)[None], part.shape[-2:], mode="bilinear")[0]
        for y in range(part.shape[-2]):
            for z in range(part.shape[-1]):
                score = fits[shares[:, y, z].argmax()]
                sure = float(score.max() >= min(threshold, fits.max()))
                total[:, top_ + y, left + z] += torch.cat([torch.tensor([1 - sure]), score])
                count[top_ + y, left + z] += 1
    return frame.undo(total / count).argmax(0).numpy()

@pytest.mark.parametrize("hard,top,threshold", [(False, 3, .3), (True, None, .2), (False, 5, .95)])
def test_a_protocol_by_loops(model, hard, top, threshold):
    image = noise(32, 72, 3)
    with torch.no_grad(): want = by_hand(model, image, LABELS, threshold, top, 32, 16, hard)
    way = ZeroShot(model, Protocol(threshold, top, 32, 16, hard))
    assert np.array_equal(way.segment(image, ["background", *LABELS]).label_map, want)
    assert len(np.unique(want)) > 1

def test_a_window_larger_than_the_image_is_the_image_and_half_of_it_the_stride(model):
    image = noise(32, 72, 5)
    say = lambda **k: ZeroShot(model, Protocol(**k)).segment(image, LABELS).label_map
    assert np.array_equal(say(window=504), say()) and np.array_equal(say(window=32), say(window=32, stride=16))
    assert [c for c, _, _ in ZeroShot(model, Protocol(window=32)).windows(Image.fromarray(image))[1]] == [(0, 0), (0, 16), (0, 32), (0, 40)]
    assert VOC_WORDS == (("dining table", "table"), ("potted plant", "plant"), ("tv monitor", "monitor"))

def test_background_is_named_only_where_there_is_a_threshold(model):
    asked = ["background", "grass", "sand"]
    many = ZeroShot(model, Protocol(.2, decide=False)).segment(noise(32, 32), ["background", *scenes.label_names()]).label_map
    e, text = model.encode_image(noise(32, 32)), model.encode_text(scenes.label_names())
    fits = affinity(e.features["segments"], e.features["image"], text, model.scale)
    mixed = torch.einsum("gn,ghw->nhw", fits, segment_shares(model, e))
    assert np.array_equal(many == 0, ((mixed.amax(0) < min(.2, fits.max())) & (mixed.amax(0) < 1)).numpy())
    for threshold, texts in ((None, 3), (.5, 2)):
        way = ZeroShot(model, Protocol(threshold))
        assert way.encode_text(asked if threshold is None else asked[1:]).shape[0] == texts
        assert way.segment(noise(32, 32), asked).labels == asked
    assert (ZeroShot(model, Protocol(0.)).segment(noise(32, 32), asked).label_map > 0).all()      # nothing is below 0
    seen = 0
    for image in (noise(32, 32, seed) for seed in range(12)):                  # the surest segment stays, wherever it is seen
        e = model.encode_image(image)
        fits = affinity(e.features["segments"], e.features["image"], model.encode_text(asked[1:]), model.scale)
        best = fits.amax(1)[segment_shares(model, e).argmax(0)]                # of the segment a pixel belongs to
        surest = ZeroShot(model, Protocol(1., decide=True)).segment(image, asked).label_map
        assert np.array_equal(surest > 0, (best >= fits.max()).numpy())
        seen += (surest > 0).any()
    assert seen

def test_labels_are_asked_by_other_words():
    model = made()
    found = ZeroShot(model, Protocol(words=(("dining table", "stone"),))).segment(noise(32, 32), ["dining table", "grass"])
    assert found.labels == ["dining table", "grass"] and set(model.text.texts) == {"stone", "grass"}

def test_one_label_a_thousand_and_none(model):
    image = noise(40, 32)
    many = [f"{a} {b} {c}" for a in scenes.words()[:12] for b in scenes.words()[:10] for c in scenes.words()[:10]][:1000]
    for way in (model, ZeroShot(model), ZeroShot(model, Protocol(.5, 5))):
        assert (way.segment(image, ["grass"]).label_map == 0).all()
        found = way.segment(image, many).label_map
        assert found.dtype == np.int32 and 0 <= found.min() <= found.max() < 1000
        with pytest.raises(ValueError, match="labels"): way.segment(image, [])
        with pytest.raises(TypeError, match="labels"): way.segment(image, "grass")
        with pytest.raises((ValueError, TypeError), match="image"): way.segment(3, ["grass"])

def test_lists_batches_and_modes(model):
    images = [noise(32, 32, 1), noise(50, 33, 2)]
    way = ZeroShot(model, Protocol(.3, 5, 32, 16))
    together = way.segment(images, ["background", *LABELS])
    for a, im in zip(together, images): assert np.array_equal(a.label_map, way.segment(im, ["background", *LABELS]).label_map)
    model.train()
    try: assert np.array_equal(way.segment(images[0], ["background", *LABELS]).label_map, together[0].label_map) and model.training
    finally: model.eval()

def test_sweep_is_evaluate_at_each_threshold(model):
    shown = [scenes.scene(i, split="test") for i in range(3)]
    rows = [dict(image=s.image, label_map=np.maximum(s.label_map.astype(int) - 3, 0)) for s in shown]
    labels = scenes.label_names()[4:]
    found = sweep(model, rows, labels, [0., .3, .9])
    for f in found:
        want = evaluate(ZeroShot(model, Protocol(f["threshold"], decide=False)), rows, names=["background", *labels])
        assert np.isclose(f["mIoU"], want["mIoU"], atol=1e-6) and np.isclose(f["background"], want["IoU/background"], atol=1e-6)

def test_a_protocol_that_cannot_be_is_refused_by_name(model):
    with pytest.raises(ValueError, match="protocol: got 'vocc'; wanted one of 'plain', 'voc'"): ZeroShot(model, "vocc")
    with pytest.raises(ValueError, match="top: got 0"): ZeroShot(model, Protocol(top=0))
    with pytest.raises(ValueError, match="window: got 50; wanted a multiple of the stride, 8"): ZeroShot(model, Protocol(window=50))
    with pytest.raises(ValueError, match="labels: got 'background' alone"):
        ZeroShot(model, Protocol(.5)).segment(noise(32, 32), ["background"])

def test_the_longer_side_is_capped():
    model = made()
    for shape, longest, want in (((10, 200), 64, (8, 64)), ((200, 100), 48, (48, 24)), ((32, 40), 64, (32, 40)), ((10, 200), None, (32, 640))):
        way = ZeroShot(model, Protocol(decide=False, longest=longest))
        assert way.windows(Image.fromarray(noise(*shape)))[0].size == want
        assert way.segment(noise(*shape), LABELS).label_map.shape == shape
    assert all(p.longest == (None if name == "plain" else 2048) for name, p in PROTOCOLS.items())

def test_few_labels_are_squared_as_well():
    p = affinity(torch.eye(2), torch.ones(2) / 2 ** .5, torch.eye(2), 3.)
    for top in (2, 5): assert torch.allclose(affinity(torch.eye(2), torch.ones(2) / 2 ** .5, torch.eye(2), 3., top), p ** 2)

def test_notes_of_the_model_are_handed_on():
    from lsbook import load
    from lsbook.segmenter import Untrained
    model, image = load("groupvit"), scenes.scene(3, split="test").image
    for way in (ZeroShot(model), ZeroShot(model, Protocol(.5, words=(("giraffe", "zebra"),)))):
        labels = ["background", "giraffe" if way.protocol.words else "zebra", "grass"]
        with pytest.warns(Untrained): found = way.segment(image, labels)
        assert any("zebra" in n for n in found.notes) and not any("giraffe" in n for n in found.notes)
    assert ZeroShot(model).segment(image, ["grass", "water"]).notes == model.segment(image, ["grass", "water"]).notes

@pytest.mark.cuda
def test_gpu():
    model, image = made(), noise(40, 90)
    way = ZeroShot(model, Protocol(.3, 5, 32, 16))
    want = way.segment(image, ["background", *LABELS]).label_map
    model.cuda()
    assert (way.segment(image, ["background", *LABELS]).label_map == want).mean() > .97
    with torch.autocast("cuda", torch.bfloat16): assert way.segment(image, LABELS).label_map.shape == (40, 90)
