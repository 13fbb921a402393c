"""Do the tests notice when a line of a module is wrong? Each mutant below is one such line.

    python tests/mutants.py                    # every list
    python tests/mutants.py --only losses      # one list (or several: --only losses metrics)
    python tests/mutants.py --only losses -v   # and what killed each

A mutant is applied to a scratch copy of the repository. It is killed by its test files (`pytest -x`) or, if those let it
live, by the assertions of its own notebook, run as a script with the same change in the exported cell. What is killed and
what lives is printed; the exit status is 1 where fewer than 95 % die, and 2 where a list does not fit the code any more.

To add a room: one entry in `ROOMS`, with the module as it is imported, its test files, and pairs of old and new text. The
old text must stand exactly once in the module: take enough of the line. Only change what a reader could get wrong (a sign, an
exponent, a default, an axis, `>` for `>=`, which of two equals wins), and nothing that means the same. Not part of CI: a
mutant takes some seconds (children are forked, so this runs on Linux and macOS).
"""
import argparse
import importlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import NamedTuple

os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "MPLBACKEND": "Agg", "PYTHONDONTWRITEBYTECODE": "1"}
sys.dont_write_bytecode = True
ROOT = Path(__file__).resolve().parent.parent
ENOUGH = .95


class Room(NamedTuple):
    module: str     # dotted, below lsbook: "losses", "lseg.model"
    tests: list     # test files that ought to notice, the quickest first; "tests/test_x.py -k word" narrows
    mutants: list   # of (old text, new text)


ROOMS = {
    "losses": Room("losses", ["tests/test_losses.py"], [
        # in_float32
        ("x.dtype in (torch.half, torch.bfloat16)", "x.dtype in (torch.bfloat16,)"),
        ("x.dtype in (torch.half, torch.bfloat16)", "x.dtype in (torch.half,)"),
        ("x.dtype in (torch.half, torch.bfloat16)", "x.is_floating_point()"),
        ("enabled=False", "enabled=True"),
        ("{k: wide(v) for k, v in kwargs.items()}", "kwargs"),
        # check_pair
        ("if prediction.shape != target.shape:", "if prediction.ndim != target.ndim:"),
        ("if prediction.shape != target.shape:", "if prediction.numel() != target.numel():"),
        # binary cross-entropy, dice, focal
        ('F.binary_cross_entropy_with_logits(logits, mask, reduction="sum") / max(logits.numel(), 1)',
         'F.binary_cross_entropy_with_logits(logits, mask, reduction="sum") / max(len(logits), 1)'),
        ('F.binary_cross_entropy_with_logits(logits, mask, reduction="sum") / max(logits.numel(), 1)',
         "F.binary_cross_entropy_with_logits(logits, mask)"),
        ("smooth: float = 1.0", "smooth: float = 0.0"),
        ("(2 * (p * y).sum(1) + smooth)", "((p * y).sum(1) + smooth)"),
        ("(p.sum(1) + y.sum(1) + smooth)", "(p.sum(1) + y.sum(1))"),
        ("(p.sum(1) + y.sum(1) + smooth)", "((p * p).sum(1) + y.sum(1) + smooth)"),
        ("dice = (2 * (p * y).sum(1) + smooth) / (p.sum(1) + y.sum(1) + smooth)",
         "dice = ((2 * (p * y).sum() + smooth) / (p.sum() + y.sum() + smooth))[None]"),
        ("(1 - dice).sum() / max(len(dice), 1)", "(1 - dice).sum()"),
        ("alpha: float = 0.25", "alpha: float = 0.75"),
        ("gamma: float = 2.0", "gamma: float = 1.0"),
        ('sigmoid_focal_loss(logits, mask, alpha, gamma, reduction="sum") / max(logits.numel(), 1)',
         'sigmoid_focal_loss(logits, mask, alpha, gamma, reduction="sum") / max(len(logits), 1)'),
        # mask_loss
        ("bce: float = 1.0", "bce: float = 0.5"),
        ("dice: float = 1.0", "dice: float = 2.0"),
        ("focal: float = 0.0", "focal: float = 1.0"),
        ("(dice, dice_loss), (focal, focal_loss)", "(dice, focal_loss), (focal, dice_loss)"),
        ("for weight, loss in terms if weight)", "for weight, loss in terms)"),
        # box_loss
        ("l1: float = 1.0", "l1: float = 5.0"),
        ("giou: float = 1.0", "giou: float = 2.0"),
        ('box_convert(x, "cxcywh", "xyxy")', 'box_convert(x, "xywh", "xyxy")'),
        ("l1 * (boxes - target).abs().sum()", "l1 * (boxes - target).abs().mean()"),
        ("l1 * (boxes - target).abs().sum()", "l1 * (boxes - target).square().sum()"),
        ("+ giou * generalized_box_iou_loss(a, b", "- giou * generalized_box_iou_loss(a, b"),
        ("total / max(boxes.numel() // 4, 1)", "total / max(boxes.numel(), 1)"),
        ("total / max(boxes.numel() // 4, 1)", "total / max(len(boxes), 1)"),
        # pixel_cross_entropy
        ("ignore: int = 255", "ignore: int = -100"),
        ("if 0 <= ignore < logits.shape[1]:", "if 0 <= ignore <= logits.shape[1]:"),
        ("if 0 <= ignore < logits.shape[1]:", "if 0 < ignore < logits.shape[1]:"),
        ("total / (label_map != ignore).sum().clamp(min=1)", "total / label_map.numel()"),
        ("total / (label_map != ignore).sum().clamp(min=1)", "total / (label_map != ignore).sum()"),
        # gather and info_nce
        ("dist.all_reduce(grad)", "pass"),
        ("grad.chunk(dist.get_world_size())[dist.get_rank()]", "grad.chunk(dist.get_world_size())[0]"),
        ("if len(set(sizes)) > 1:", "if len(set(sizes)) > 2:"),
        ("scale=1 / 0.07", "scale=1 / 0.1"),
        ("a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)", "a, b = F.normalize(a, dim=0), F.normalize(b, dim=0)"),
        ("a, b = F.normalize(a, dim=1), F.normalize(b, dim=1)", "a = F.normalize(a, dim=1)"),
        ("first = dist.get_rank() * len(a) if", "first = 0 if"),
        ("F.cross_entropy(scale * b @ all_a.T, partner)) / 2", "F.cross_entropy(scale * b @ all_a.T, partner))"),
        ("F.cross_entropy(scale * b @ all_a.T, partner)) / 2", "F.cross_entropy(scale * a @ all_b.T, partner)) / 2"),
        ("return Gather.apply(x)", "return Gather.apply(x.detach())"),
    ]),
    "metrics": Room("metrics", ["tests/test_metrics.py"], [
        # what masks may be
        ("if a.dtype == np.uint16 else a", "if a.dtype == np.uint32 else a"),
        ("if p.is_floating_point() or t.is_floating_point() or", "if p.is_floating_point() or"),
        ("if p.is_floating_point() or t.is_floating_point() or", "if t.is_floating_point() or"),
        ("or p.shape != t.shape:", "or p.ndim != t.ndim:"),
        ("(x.bool() for x in _pair(pred, target))", "(x == 1 for x in _pair(pred, target))"),
        ("(x.bool() for x in _pair(pred, target))", "(x > 0 for x in _pair(pred, target))"),
        # IoU
        ("(p | t).sum((-2, -1))], -1)", "(p.sum((-2, -1)) + t.sum((-2, -1)))], -1)"),
        ("(p | t).sum((-2, -1))], -1)", "(p ^ t).sum((-2, -1))], -1)"),
        ("inter / union.clamp(min=1), 1.)", "inter / union.clamp(min=1), 0.)"),
        ("inter, union = counts.cpu().double().unbind(-1)", "inter, union = counts.cpu().float().unbind(-1)"),
        # MaskMeter
        ("if pred_box is None: pred_box = torch.zeros(len(pair), 4)", "if pred_box is None: pred_box = box"),
        ("if box is not None:", "if box is not None and pred_box is not None:"),
        ("self.kinds += [kind] * len(pair)", "self.kinds += [kind]"),
        ('"mIoU": each.mean().item(), "oIoU": _ratio(counts.sum(0)).item()',
         '"oIoU": each.mean().item(), "mIoU": _ratio(counts.sum(0)).item()'),
        ("(10 * inter >= k * union)", "(10 * inter > k * union)"),
        ("(10 * inter >= k * union)", "(10 * inter >= k * union + 1)"),
        ("(10 * inter >= k * union)", "((10 * inter >= k * union) & (union > 0))"),
        ("for k in (5, 6, 7, 8, 9):", "for k in (5, 6, 7, 8):"),
        ("(box_iou(found, true) >= .5)", "(box_iou(found, true) > .5)"),
        ("(box_iou(found, true) >= .5)", "(box_iou(found, true) >= .6)"),
        ("each[[k == kind for k in self.kinds]]", "each[[k != kind for k in self.kinds]]"),
        # boxes
        (".clamp(min=0).prod(-1)", ".prod(-1)"),
        (".clamp(min=0).prod(-1)", ".clamp(min=0).sum(-1)"),
        ("(b[..., 2:] - b[..., :2])", "(b[..., 2:] - b[..., :2] + 1)"),
        ("union = size(p) + size(t) - shared", "union = size(p) + size(t)"),
        ("torch.where(union > 0, union, 1), 0)", "torch.where(union > 0, union, 1), 1)"),
        ("if p.shape != t.shape: raise", "if False: raise"),
        # sizes
        ('mode="nearest-exact"', 'mode="nearest"'),
        # ConfusionMatrix
        ("ignore: int = 255,", "ignore: int = 0,"),
        ("if 0 <= ignore < n:", "if 0 < ignore < n:"),
        ("if 0 <= ignore < n:", "if 0 <= ignore <= n:"),
        ("(x >= 0) & (x < n)", "(x > 0) & (x < n)"),
        ("(x >= 0) & (x < n)", "(x < n)"),
        ("row, col = (torch.where((x >= 0) & (x < n), x, n) for x in (t, p))",
         "col, row = (torch.where((x >= 0) & (x < n), x, n) for x in (t, p))"),
        ("torch.where(t == self.ignore,", "torch.where((t == self.ignore) | (p == self.ignore),"),
        ("if bad := M[-1].sum().item():", "if bad := M[-1, :-1].sum().item() * 0:"),
        ("union = M.sum(1) + M[:, :-1].sum(0) - hit", "union = M[:, :-1].sum(1) + M[:, :-1].sum(0) - hit"),
        ("union = M.sum(1) + M[:, :-1].sum(0) - hit", "union = M.sum(1) + M[:, :-1].sum(0)"),
        ("hit / union.clamp(min=1), math.nan)", "hit / union.clamp(min=1), 1.)"),
        ("self.iou().nanmean()", "self.iou().nan_to_num().mean()"),
        ("(M.diagonal().sum() / M.sum()).item()", "(M.diagonal().sum() / M[:, :-1].sum()).item()"),
        # processes and evaluate
        ("new.counts, new.kinds, new.boxes = (sum(parts, []) for parts in zip(*_everybodys(mine)))",
         "new.counts, new.kinds, new.boxes = mine"),
        ("new.counts = sum(_everybodys(self.counts.cpu()))", "new.counts = self.counts.cpu()"),
        ("new = ConfusionMatrix(self.n, self.ignore)", "new = self"),
        ("rows.select(range(rank, len(rows), world))", "rows.select(range(rank, len(rows)))"),
        ("itertools.islice(rows, rank, None, world)", "itertools.islice(rows, 0, None, world)"),
        ("zip(batch, results, strict=True)", "zip(batch, results)"),
        ('_to_size(row["mask"], size) != 0', '_to_size(row["mask"], size) == 255'),
        ("255 if len(names) <= 255 else 65535", "255"),
        ("255 if len(names) <= 255 else 65535", "255 if len(names) < 255 else 65535"),
        ("not trained or n in trained", "n in (trained or ())"),
        ('"mIoU/seen": each[seen].nanmean().item()', '"mIoU/seen": each[seen].mean().item()'),
        ('"mIoU/unseen": each[~seen].nanmean().item()', '"mIoU/unseen": each[~seen].mean().item()'),
        ("if training: model.train()", "model.train()"),
        ("if training: model.eval()", "pass"),
    ]),
    "text.words": Room("text.words", ["tests/test_text.py -k word or texts or accent or mark or report or cut or process or check or language or said"], [
        ('f"{name}[{i}]: got the blank', 'f"{name}[{i + 1}]: got the blank'),
        ('[0] in "CZ" for c in t)', '[0] == "Z" for c in t)'),
        ("most:int=8", "most:int=9"),
        ("if len(w) <= 40", "if len(w) < 40"),
        ("if len(words) <= most", "if len(words) < most"),
        ("if len(self.truncated) > 3", "if len(self.truncated) >= 3"),
        ("return bool(self.unknown or self.truncated)", "return bool(self.unknown)"),
        ('"a an the of on".split()', '"a an the of".split()'),
        ('unicodedata.normalize("NFC", text.lower())', "text.lower()"),
        ('unicodedata.normalize("NFC", text.lower())', 'unicodedata.normalize("NFC", text)'),
        ('[0] == "M" or c in', '[0] == "N" or c in'),
        (' or c in "\\u200c\\u200d"', ""),
        ('"w[wm]*"', '"[wm]+"'),
        ("return [w for w in words if w not in drop] or words", "return [w for w in words if w not in drop]"),
        ("device=device) < lengths[:, None]", "device=device) <= lengths[:, None]"),
        ("mode and not self.frozen", "mode"),
        ("return not any(p.requires_grad", "return any(p.requires_grad"),
        ("self._said.update(unknown, cut)", "self._said.update(unknown)"),
        ("self._said.update(unknown, cut)", "self._said.update(cut)"),
        ("dim:int=64, # length of the vectors", "dim:int=32, # length of the vectors"),
        ('f"{seed}:{word}"', 'f"{word}:{seed}"'),
        ('"<u4"', '">u4"'),
        ("standard_normal(dim)", "uniform(-1, 1, dim)"),
        ("v / np.linalg.norm(v)", "v"),
        ("w not in self.row and w not in STOP_WORDS", "w not in self.row"),
        ("split_words(t, STOP_WORDS)", "split_words(t)"),
        ("F.normalize(self.words(texts)[0].sum(1), dim=-1)", "self.words(texts)[0].sum(1)"),
        ("F.normalize(self.words(texts)[0].sum(1), dim=-1)", "F.normalize(self.words(texts)[0].prod(1), dim=-1)"),
        ("persistent=False", "persistent=True"),
        ("word_vector(word, self.dim, self.seed)", "word_vector(word, self.dim)"),
    ]),
    "text.bilstm": Room("text.bilstm", ["tests/test_text.py -k glove or bilstm or vocabulary or company or 500"], [
        ("mask.sum(1).cpu()", "mask.sum(1).cpu() * 0 + mask.shape[1]"),
        ("enumerate(self.words, 2)", "enumerate(self.words, 1)"),
        ("if n > 1]", "if n > 2]"),
        ("min_count:int=1", "min_count:int=2"),
        ("if n >= min_count", "if n > min_count"),
        ("key=lambda w: (-counts[w], w)", "key=lambda w: (counts[w], w)"),
        ("key=lambda w: (-counts[w], w)", "key=lambda w: -counts[w]"),
        ("return len(self.words) + 2", "return len(self.words) + 1"),
        ("self.row.get(w, 1)", "self.row.get(w, 0)"),
        ("range(100)", "range(1)"),
        ("max(counts, key=counts.get, default=0)", "max(counts, default=0)"),
        ("if n == 1 and dim > 1", "if n == 0 and dim > 1"),
        ('if line.count(" ") < dim', 'if line.count(" ") != dim'),
        ('line.rsplit(" ", dim)', "line.rsplit(None, dim)"),
        ("if token not in words or token in found: continue", "if token not in words: continue"),
        ("np.isfinite(vector).all()", "not np.isnan(vector).any()"),
        ("enumerate(f, 1)", "enumerate(f)"),
        ("encoding=\"utf-8-sig\", errors=\"replace\", newline=\"\\n\") as f:\n        for n", "encoding=\"utf-8\", errors=\"replace\", newline=\"\\n\") as f:\n        for n"),
        ("dim not in (None, width)", "dim in (None, width) and False"),
        ("if found else .1", "* 2 if found else .1"),
        ("manual_seed(seed)) * spread", "manual_seed(seed))"),
        ("manual_seed(seed)", "manual_seed(0)"),
        ("vectors[0] = 0", "vectors[1] = 0"),
        ("if len(w) > max_words", "if len(w) >= max_words"),
        ("max_words:int=20", "max_words:int=25"),
        ('join:str="concat"', 'join:str="sum"'),
        ("dim:int=256", "dim:int=128"),
        ("embed:int=300", "embed:int=200"),
        ("train_words:bool=True", "train_words:bool=False"),
        ("padding_idx=0", "padding_idx=1"),
        ('dim // 2 if join == "concat" else dim', "dim // 2"),
        ("bidirectional=True", "bidirectional=False"),
        ('if self.join == "sum" else', 'if self.join != "sum" else'),
        ("self.joined(*states.chunk(2, -1))", "self.joined(*states.chunk(2, -1)[::-1])"),
        ("self.joined(*self.run(texts)[1])", "self.joined(*self.run(texts)[1].flip(0))"),
    ]),
    "text.pretrained": Room("text.pretrained", ["tests/test_text.py -k bert or clip or cache or spec or version or 500 or company or odd or checkpoint or tag or unknown"], [
        ("if given == bool(vocabulary)", "if given and bool(vocabulary)"),
        ("add_pooling_layer=False)\n        return", "add_pooling_layer=True)\n        return"),
        ("max_tokens:int=40) ->", "max_tokens:int=64) ->"),
        ("max_tokens:int=40, #", "max_tokens:int=64, #"),
        ("room, kept = max_tokens - 2, []", "room, kept = max_tokens - 1, []"),
        ("zip(ids[:room], at) if i == tokenizer.unk_token_id", "zip(ids, at) if i == tokenizer.unk_token_id"),
        ("report.dropped.append(text[at[room][0]:].split())", "report.dropped.append(text[at[room][1]:].split())"),
        ("layers:int=6", "layers:int=12"),
        ("if not 1 <= layers <= has", "if not 0 <= layers <= has"),
        ("if not 1 <= layers <= has", "if not 1 <= layers"),
        ("if not 3 <= max_tokens <= most", "if not 2 <= max_tokens <= most"),
        ("if not 3 <= max_tokens <= most", "if not 3 <= max_tokens"),
        ("encoder.layer[:layers]", "encoder.layer[-layers:]"),
        ("attention_mask=mask.long()", "attention_mask=torch.ones_like(ids)"),
        ("self.words(texts)[0][:, 0]", "self.words(texts)[0][:, 1]"),
        ("context:int=77", "context:int=64"),
        ("tokenizer.context_length - 2", "tokenizer.context_length - 1"),
        ("*ids[:room], tokenizer.eot_token_id", "*ids[:room + 1]"),
        ('"no_causal_mask", "embed_cls")', '"embed_cls")'),
        ('config = deepcopy(name)', 'config = name'),
        ('if any(k.startswith("text.") for k in state)', "if False"),
        ('"logit_scale", "logit_bias"', '"logit_scale"'),
        ('not k.startswith("visual.")', "True"),
        ("if p.suffix == \".safetensors\"] or files", "if p.suffix == \".bin\"] or files"),
        ("if len(files) != 1", "if len(files) < 1"),
        ("bool(clip_config(name).get(\"quick_gelu\"))", "bool(config.get(\"quick_gelu\"))"),
        ('name:str="ViT-B-32-quickgelu", #', 'name:str="ViT-B-32", #'),
        ("frozen:bool=True, # no gradients", "frozen:bool=False, # no gradients"),
        ("pad:bool=False", "pad:bool=True"),
        ('config.get("quick_gelu", False))', "False)"),
        ("self.pad if pad is None else pad", "pad"),
        ("max(map(len, tokens))", "max(map(len, tokens)) - 1"),
        ("t.positional_embedding[:n]", "t.positional_embedding[-n:]"),
        ("attn_mask=t.attn_mask[:n, :n]", "attn_mask=None"),
        ("ids.argmax(-1)", "ids.argmin(-1)"),
        ("0 if t.is_inference() else t._version, ", ""),
        ("chain(module.parameters(), module.buffers())", "module.parameters()"),
        ("return _numbers[module], *(", "return 0, *("),
        ("learning or self.encoder.training", "learning"),
        ("learning or self.encoder.training", "self.encoder.training"),
        ("torch.is_grad_enabled() and any(t.requires_grad", "any(t.requires_grad"),
        ("if version != self._version: self.clear()", "pass"),
        ("version, [t.detach() for t in tensors]", "version, None"),
        ("torch.inference_mode(False), torch.no_grad()", "torch.no_grad()"),
        ("torch.autocast(device, enabled=False)", "torch.no_grad()"),
        ("torch.stack([self._rows[t] for t in texts])", "torch.stack([self._rows[t] for t in sorted(texts)])"),
        ('name.split("@", 1)', 'name.split("@", 1)[:1]'),
    ]),
    "lseg.official": Room("lseg.official", ["tests/test_lseg.py -k swapped or refused or published or synthetic or truncated"], [
        ("backwards=4 - n[0]", "backwards=n[0] - 1"),
        ("below=n[0] - 1", "below=n[0]"),
        ("below=n[0] - 1", "below=4 - n[0]"),
        ("residual_layer{1}.convolution{2}", "residual_layer{2}.convolution{1}"),
        ("residual_layer{1}.batch_norm{2}", "residual_layer{2}.batch_norm{1}"),
        ("(?:visual\\.|logit_scale$)", "(?:visual\\.)"),
        (r'\.layer1\.4\.": "image.backbone.body.layer1."', r'\.layer1\.4\.": "image.backbone.body.layer2."'),
        ('0: "resnet101", 768', '1: "resnet101", 768'),
        ('768: "vitb32", 1024: "vitl16"', '1024: "vitb32", 768: "vitl16"'),
        ('"ViT-B-32-quickgelu"', '"ViT-B-32"'),
        ("in ours) != (depth > 0)", "in ours) != (depth > 1)"),
        ('if backbone == "resnet101" else 520', 'if backbone == "resnet101" else 480'),
        ("return model.eval(), [name for name in names if not names[name]]", "return model, [name for name in names if not names[name]]"),
        ("if not names[name]]", "if names[name]]"),
        ('regularization: str = "bottleneck"', 'regularization: str = "depthwise"'),
    ]),
    "training.recipes": Room("training.recipes", ["tests/test_training.py -k "
            "groups or schedules or cover or meant or lookup or unusable or processes_change"], [
        ("n > 0, \"a whole number", "n >= 0, \"a whole number"),
        ("self.lr > 0", "self.lr >= 0"),
        ("self.warmup >= 0", "self.warmup > 0"),
        ("type(n) is int", "isinstance(n, int)"),
        ("key=len", "key=lambda k: -len(k)"),
        ("if fits else 1.", "if fits else 0."),
        ("p.ndim > 1", "p.ndim > 0"),
        ("lr=recipe.lr * scale", "lr=recipe.lr"),
        ("power=.9", "power=1."),
        ("recipe.warmup, recipe.steps, more", "0, recipe.steps, more"),
        ("recipe.accumulate * world", "recipe.accumulate"),
        ("self.seed * 1_000_003 + turn", "self.seed * 1_000_003"),
        ("(k * self.world + self.rank) * self.size", "(k + self.rank) * self.size"),
        ("seeded(self.seed, k, self.rank)", "seeded(self.seed, self.rank)"),
        ("random.setstate(state[0]); ", ""),
        ("index[int(m[1])]", "int(m[1])"),
        ("momentum=.9", "momentum=.8"),
    ]),
    "training.trainer": Room("training.trainer", ["tests/test_training.py -k streams or incomplete or fresh or ctrl_c or "
            "not_a_number or redirected or groups or history or bf16 or nothing or loaded"], [
        ("reverse=True", "reverse=False"),
        ("if start and not resume", "if start and resume"),
        ('["steps", "warmup"] * (old["steps"] != recipe.steps)', '["steps", "warmup"]'),
        ("first, step = self.rows, self.rank, self.world", "first, step = self.rows, 0, self.world"),
        ("torch.minimum(self.first, bad)", "torch.maximum(self.first, bad)"),
        ("last and args.eval_strategy", "False and args.eval_strategy"),
        ("control.should_log or control.should_save: self.check()", "False: self.check()"),
        ("self.asked: raise KeyboardInterrupt", "True: raise KeyboardInterrupt"),
        ("self.model.train()", "pass"),
        ("10 * (state.global_step - self.step) >= self.steps", "2 * (state.global_step - self.step) >= self.steps"),
        ("wait > 30 or", "wait > 300 or"),
        ('logs["learning_rate"] /=', 'logs["learning_rate"] *='),
        ("max_grad_norm=recipe.clip or 0.", "max_grad_norm=0."),
        ("gradient_accumulation_steps=recipe.accumulate", "gradient_accumulation_steps=1"),
        ("accepts_loss_kwargs = False", "accepts_loss_kwargs = True"),
        ("save_total_limit=2", "save_total_limit=1"),
    ]),
    "vision": Room("vision", ["tests/test_vision.py"], [
        ("field += (kernel - 1) * dilation * stride", "field += kernel * dilation * stride"),
        ("field += (kernel - 1) * dilation * stride", "field += (kernel - 1) * stride"),
        ("stride *= step", "stride += step"),
        ("fits = images.is_floating_point() and", "fits ="),
        ("images.shape[1] == 3", "images.shape[1] in (1, 3)"),
        ("any(side % stride for side in images.shape[2:])", "images.shape[3] % stride"),
        ("any(side % stride for side in images.shape[2:])", "images.shape[2] % stride"),
        ("mean=(0.485, 0.456, 0.406)", "mean=(0.485, 0.456, 0.456)"),
        ("std=(0.229, 0.224, 0.225)", "std=(0.229, 0.225, 0.224)"),
        ("(x - self.mean) / self.std", "(x - self.mean) * self.std"),
        ('torch.tensor(mean).view(3, 1, 1), persistent=False', 'torch.tensor(mean).view(3, 1, 1)'),
        ("dilate = [False, True, True]", "dilate = [False, False, True]"),
        ("maps = [b.maxpool(b.relu(b.bn1(", "maps = [b.maxpool((b.bn1("),
        ("norm = ops.FrozenBatchNorm2d if frozen_norm", "norm = ops.FrozenBatchNorm2d if not frozen_norm"),
        ("torch.linspace(-1, 1, n + 1,", "torch.linspace(0, 1, n + 1,"),
        ("dtype=dtype) for n in (w, h))\n    x0", "dtype=dtype) for n in (h, w))\n    x0"),
        ("(torch.full((1, 1), 1 / n,", "(torch.full((1, 1), 2 / n,"),
        ("rows = x0, y0, x1, y1, (x0 + x1) / 2, (y0 + y1) / 2", "rows = x0, x1, y0, y1, (x0 + x1) / 2, (y0 + y1) / 2"),
        ("rows = x0, y0, x1, y1, (x0 + x1) / 2, (y0 + y1) / 2", "rows = x0, y0, x1, y1, (y0 + y1) / 2, (x0 + x1) / 2"),
        ("convs: int = 2", "convs: int = 3"),
        ("nn.BatchNorm2d(c_out), nn.ReLU(True)]", "nn.ReLU(True), nn.BatchNorm2d(c_out)]"),
        ("width: int = 24", "width: int = 16"),
        ("levels: int = 4", "levels: int = 5"),
        ("Normalise((0.5,) * 3, (0.25,) * 3)", "Normalise((0.5,) * 3, (0.5,) * 3)"),
        ("F.max_pool2d(x, 2)", "F.avg_pool2d(x, 2)"),
        ('mode: str = "bilinear"', 'mode: str = "bicubic"'),
        ("mode=mode, align_corners=False", 'mode=mode, align_corners=True'),
        ("torch.cat([table[:, :1], cells", "torch.cat([table[:, 1:2], cells"),
        ("blocks: tuple = (5, 11, 17, 23)", "blocks: tuple = (6, 12, 18, 23)"),
        ('interpolation: str = "bilinear"', 'interpolation: str = "bicubic"'),
        ("if list(blocks) != sorted(blocks) or", "if"),
        ("<= blocks[-1] < len(body.blocks)", "<= blocks[-1] <= len(body.blocks)"),
        ("body.blocks, body.norm = body.blocks[:blocks[-1] + 1], nn.Identity()", "body.norm = nn.Identity()"),
        ("x.shape[-2:], self.interpolation)", "x.shape[-2:])"),
        ("if i in self.blocks: tokens.append(x)", "if i + 1 in self.blocks: tokens.append(x)"),
        ("return [t[:, 1:].transpose(1, 2)", "return [t[:, :-1].transpose(1, 2)"),
    ]),
    "images": Room("images", ["tests/test_images.py -k not segment"], [
        ("return a * np.uint8(255)", "return a * np.uint8(1)"),
        ("+ 128) // 257", "+ 128) // 256"),
        ("+ 128) // 257", "+ 0) // 257"),
        ("+ 128) // 257", "+ 129) // 257"),
        ("np.rint(a.astype(np.float32) * 255)", "np.floor(a.astype(np.float32) * 255)"),
        ("if out.min() < 0 or out.max() > 255:", "if out.max() > 255:"),
        ("if out.min() < 0 or out.max() > 255:", "if out.min() < 0 or out.max() > 256:"),
        ("if a.min() >= 0 and a.max() <= 255 else", "if a.min() > 0 and a.max() <= 255 else"),
        ("if a.min() >= 0 and a.max() <= 255 else", "if a.min() >= 0 and a.max() < 255 else"),
        ('"TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"', '"TRANSPOSE", "ROTATE_90", "TRANSVERSE", "ROTATE_270"'),
        ('"TRANSPOSE", "ROTATE_270", "TRANSVERSE", "ROTATE_90"', '"TRANSVERSE", "ROTATE_270", "TRANSPOSE", "ROTATE_90"'),
        ("return note if note in TURNS else 1", "return note"),
        ("ImageOps.exif_transpose(im) if orientation(im) != 1 else im", "im.transpose(TURNS[orientation(im)]) if orientation(im) != 1 else im"),
        ("int(xs[-1]) + 1, int(ys[-1]) + 1", "int(xs[-1]), int(ys[-1])"),
        ("np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))", "np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))"),
        ("note in (2, 3, 7, 8)", "note in (2, 3, 6, 7)"),
        ("note in (3, 4, 6, 7)", "note in (3, 4, 7, 8)"),
        ("note in (5, 6, 7, 8)", "note in (6, 8)"),
        ("a.max() > 65535", "a.max() > 65536"),
        ("np.where(a == clear, 255,", "np.where(a == clear, 0,"),
        ('"LA", "PA") or "transparency" in im.info', '"LA", "PA")'),
        ('"LA", "PA") or "transparency" in im.info', '"LA") or "transparency" in im.info'),
        ('im.size, "white")', 'im.size, "black")'),
        ("t.shape[0] not in (1, 3, 4)", "t.shape[0] not in (1, 3)"),
        ("a.shape[2] not in (1, 3, 4)", "a.shape[2] not in (1, 2, 3, 4)"),
        ("a if a.ndim == 2 else a.transpose(1, 2, 0)", "a if a.ndim == 2 else a.transpose(2, 1, 0)"),
        ("return np.array(to_image(image))", "return np.asarray(to_image(image))"),
        ("return out, not many", "return out, len(out) == 1"),
    ]),
    "segmenter.encode": Room("segmenter.encode", ["tests/test_segmenter.py -k size or antialiased or preprocess or undo or padding or "
            "list or modes or encoded or half_precision or defaults", "tests/test_bad_input.py -k batch_sizes"], [
        ("Image.Resampling.BILINEAR", "Image.Resampling.NEAREST"),
        ("Image.Resampling.BILINEAR", "Image.Resampling.BICUBIC"),
        (".float() / 255", ".float() / 256"),
        ("F.pad(x, (0, W - w, 0, H - h))", "F.pad(x, (W - w, 0, H - h, 0))"),
        ("F.pad(x, (0, W - w, 0, H - h))", "F.pad(x, (0, W - w, 0, H - h), value=.5)"),
        ('self.padded, mode="bilinear")', 'self.padded, mode="bilinear", align_corners=True)'),
        ('self.padded, mode="bilinear")', 'self.padded, mode="nearest")'),
        ("x = x[..., :h, :w]", "x = x[..., -h:, -w:]"),
        ("antialias=H < h or W < w", "antialias=H < h and W < w"),
        ("antialias=H < h or W < w", "antialias=False"),
        ("stride = 1          #", "stride = 2          #"),
        ("self.config.long_side / max(image.size)", "self.config.long_side / min(image.size)"),
        ("max(1, round(image.height * k))", "max(1, int(image.height * k))"),
        ("max(1, round(image.height * k))", "round(image.height * k)"),
        ("max(1, round(image.width * k))", "round(image.width * k)"),
        ("math.ceil(s / self.stride)", "(s // self.stride + 1)"),
        ("math.ceil(s / self.stride)", "max(1, s // self.stride)"),
        ("Frame(image.size[::-1], size", "Frame(image.size, size"),
        ("tuple(map(max, zip(", "tuple(map(min, zip("),
        ("[f._replace(padded=padded) for f in frames]", "list(frames)"),
        ("return (self.method, *weights_version(self))", "return (self.method,)"),
        ("for m in model.modules() if m.training]", "for m in model.modules()]"),
        ("with torch.no_grad(): yield", "with torch.enable_grad(): yield"),
        ("o.owner != self.mark:", "o.owner[0] != self.method:"),
        ("batch_size < 1:", "batch_size < 0:"),
        ("self.frame(o).padded, []", "self.frame(o).size, []"),
        ("lambda t: t[j].clone()", "lambda t: t[0].clone()"),
        ("lambda t: t[j].clone()", "lambda t: t[j]"),
        ("x.to(self.device, self.dtype)", "x.to(self.device)"),
        ("batch_size: int = 16", "batch_size: int = 8"),
        ("zip(places, encoded): out[i] = e", "enumerate(encoded): out[i] = e"),
    ]),
    "segmenter.answer": Room("segmenter.answer", ["tests/test_segmenter.py -k referring or threshold or label_result or many_labels or "
            "mask_result or encoded or defaults or heat or reprs or pass", "tests/test_bad_input.py -k labels or expressions"], [
        ("if len(t) > longest:", "if len(t) >= longest:"),
        ('"labels", 1_000)', '"labels", 2_000)'),
        ('"expression", 20_000)', '"expression", 40_000)'),
        ("places.setdefault(s.lower(), i)", "places.setdefault(s, i)"),
        ("return [t.strip() for t in texts]", "return list(texts)"),
        ("if len(found) > 6:", "if len(found) > 5:"),
        ("str(label).strip().lower()", "str(label).strip()"),
        ("np.uint8 if len(labels) <= 255", "np.uint8 if len(labels) < 255"),
        ("np.uint8 if len(labels) <= 255", "np.uint8 if len(labels) <= 256"),
        ("# words or phrases, each once\n        batch_size: int = 16", "# words or phrases, each once\n        batch_size: int = 8"),
        ("self.mask.astype(np.uint8) * 255", "self.mask.astype(np.uint8)"),
        ("threshold = .5", "threshold = .4"),
        (".clamp(0, 1).cpu()", ".cpu()"),
        ("heat > self.threshold", "heat >= self.threshold"),
        ("box_of(mask) if box is None else map(float, box)", "box_of(mask)"),
        ("heat[mask].mean() if mask.any()", "heat.mean() if mask.any()"),
        ("heat[mask].mean() if mask.any()", "heat.max() if mask.any()"),
        ("else heat.max()", "else heat.mean()"),
        ("# str, or a list of them\n    batch_size: int = 16", "# str, or a list of them\n    batch_size: int = 8"),
        ("n = max(len(items), len(texts))", "n = len(items)"),
        ("texts[i if len(texts) > 1 else 0]", "texts[0]"),
        ("(jobs[i:i + batch_size] for i in range(0, len(jobs), batch_size))", "[jobs]"),
        ("boxes or [None] * len(part)", "[None] * len(part)"),
        ("if one_text and one_image else", "if one_image else"),
        ("if one_text and one_image else", "if one_text else"),
    ]),
    "segmenter.results": Room("segmenter.results", ["tests/test_segmenter.py -k label_result or label_files or beyond_24 or mask_result or "
            "odd_sizes or save_says or drawn or legend or enlarged or printable or thousand"], [
        ("longest=60", "longest=40"),
        ("if len(text) <= longest", "if len(text) < longest"),
        ("text[:longest - 1]", "text[:longest]"),
        ("math.ceil(256 / longest)", "256 // longest"),
        ("if longest < 256 else", "if longest <= 256 else"),
        ("min(1, (limit or longest) / longest)", "(limit or longest) / longest"),
        ("max(1, round(s * k))", "round(s * k)"),
        ("if smooth and k < 1 else", "if smooth else"),
        ("if smooth and k < 1 else", "if k < 1 else"),
        ("max(picture.width, 260)", "max(picture.width, 200)"),
        ("if x > 6 and x + w > width", "if x + w > width"),
        ("if x > 6 and x + w > width", "if x > 6 and x > width"),
        ("/ label_map.size", "/ max(label_map.shape)"),
        ('np.argsort(-n, kind="stable")', 'np.argsort(n, kind="stable")'),
        ('np.argsort(-n, kind="stable")', 'np.argsort(n, kind="stable")[::-1]'),
        ("if n[i] > 0}", "if n[i] >= 0}"),
        ("labels if len(labels) <= 24 else", "labels if len(labels) < 24 else"),
        ("list(found)[:24]", "list(found)[:23]"),
        ("image.width > 2 * image.height", "image.width >= 2 * image.height"),
        ("image.width > 2 * image.height", "image.width > image.height"),
        ("limit = (limit - 4) // 2", "limit = limit // 2"),
        ("if len(rows) < len(found):", "if len(rows) <= len(found):"),
        ("solid, limit, smooth=False", "solid, limit"),
        ("np.divide(seen.size, image.size)", "np.divide(image.size, seen.size)"),
        ("if len(labels) > 255: return", "if len(labels) >= 255: return"),
        ("picture(limit=640)", "picture(limit=1024)"),
        ("path.suffix.lower()", "path.suffix"),
    ]),
    "segmenter.storage": Room("segmenter.storage", ["tests/test_segmenter.py -k load or half_storage or pretrained or path_comes or table or "
            "metadata or hub", "tests/test_bad_input.py"], [
        ("isinstance(value, float) and not math.isfinite(value)", "isinstance(value, float) and math.isnan(value)"),
        ("tied(state).items() if k == first]", "tied(state).items()]"),
        ("if t.dtype == torch.float32}", "if t.is_floating_point()}"),
        ("for k, t in small.items() if torch.isfinite(t).all()", "for k, t in small.items()"),
        ("half: bool = False", "half: bool = True"),
        ('{"method", "config"} & set(metadata)', '{"method"} & set(metadata)'),
        ("mkdir(parents=True, exist_ok=True)", "mkdir(parents=True)"),
        ('if path.suffix != ".safetensors":', "if False:"),
        ("(int, float) if hints[k] is float", "(float,) if hints[k] is float"),
        ("if wanted is tuple and isinstance(v, list): v = tuple(v)", "pass"),
        ("if v is not None and not isinstance(v, wanted):", "if not isinstance(v, wanted):"),
        ("if v is not None and not isinstance(v, wanted):", "if False:"),
        ("or method not in METHODS:", "or False:"),
        ('.get("method", cls.method)', '.get("method")'),
        ("if theirs != cls.method:", "if False:"),
        ("torch.random.fork_rng(devices=[])", "torch.no_grad()"),
        ("return model.eval()", "return model"),
        ("if len(pairs) > 1: pairs = [p for p in pairs if p[1].is_file()] or pairs", "pass"),
        ("if p[1].is_file()] or pairs", "if p[1].is_file()]"),
        ('if path.name == "model.safetensors"', "if False"),
        ("if (path.is_dir() and _pair(path)) or", "if"),
        ("and not isinstance(e, LocalEntryNotFoundError)", ""),
        (r"[\w][\w.-]*/[\w.-]+", r".+"),
        ("revision=revision, token=token", "revision=None, token=token"),
        ("revision=revision, token=token", "revision=revision, token=None"),
        ("return _build(cls, config, weights)", "return _build(cls, config, weights).train()"),
    ]),
    "scenes.shapes": Room("scenes.shapes", ["tests/test_scenes.py -k always or held or label_names"], [
        ('(("red", "star"), ("green", "square")', '(("red", "square"), ("green", "star")'),
        ('"red": (216, 44, 38)', '"red": (216, 44, 48)'),
        ("DARK = (26, 24, 30)", "DARK = (26, 24, 20)"),
        ("for colour in COLOURS for shape in SHAPES]", "for shape in SHAPES for colour in COLOURS]"),
        ("np.sqrt((x - cx) ** 2 + (y - cy) ** 2) - r", "(x - cx) ** 2 + (y - cy) ** 2 - r"),
        ("if not r: return np.maximum(dx, dy)", "if not r: return dx + dy"),
        ("- (w - r), np.abs(y - cy) - (h - r)", "- w, np.abs(y - cy) - h"),
        ("np.maximum(d, edge)", "np.minimum(d, edge)"),
        ("(ex * ex + ey * ey), 0, 1)", "(ex * ex + ey * ey), -1, 1)"),
        ("k * (k - 1) / g", "(k - 1) / g"),
        ("R=1.4, r=.62", "R=1.4, r=.6"),
        ("x, y, 0, 0, .9, .9)", "x, y, 0, 0, .9, 1.)"),
        ("(0, -1.36)", "(0, -1.3)"),
        ("box(x, y, 0, 0, 1.16, .4)", "box(x, y, 0, 0, 1.16, .44)"),
        ("x * (2 * np.pi / 5.2)", "x * (2 * np.pi / 5)"),
        ("np.sin(x * (np.pi / 3.6)) *", "np.sin(x * (np.pi / 3.6)) +"),
        ("share=.34", "share=.5"),
        ("wave > np.partition", "wave >= np.partition"),
        ("(-.74, -.42, .08, .36)", "(-.74, -.42, .08, .4)"),
        ("circle(x, y, .76, -.46, .1), DARK", "circle(x, y, .7, -.46, .1), DARK"),
        ('("head", union(*head), None, True)', '("body", union(*head), None, True)'),
        ('("head", union(*front), None, True)', '("head", union(*front), None, False)'),
    ]),
    "scenes.textures": Room("scenes.textures", ["tests/test_scenes.py -k always"], [
        ("Image.Resampling.BICUBIC", "Image.Resampling.BILINEAR"),
        ("round(size / cell_y)), max(2, round(size / cell_x))", "round(size / cell_x)), max(2, round(size / cell_y))"),
        ("34 * blades + 12 *", "34 * blades + 10 *"),
        ("58 + value * .55", "58 + value"),
        ("y * .62 + 3.2 *", "y * .62 - 3.2 *"),
        ("if s > 1: grains", "if s >= 1: grains"),
        ("(wave - .62) / .3", "(wave - .6) / .3"),
        ("np.clip(.6 + 1.2 *", "np.clip(.6 + 1. *"),
        ("np.where(d < first,", "np.where(d > first,"),
        ("(second - first) / .16", "(second - first) / .2"),
        ("value - 58 * joint", "value + 58 * joint"),
        ("size * 3 // 2, size / 64", "size * 2, size / 64"),
        ("BACKGROUNDS.index(name), size]", "BACKGROUNDS.index(name)]"),
    ]),
    "scenes.drawing": Room("scenes.drawing", ["tests/test_scenes.py -k always or hidden or held or bad_argument or splits"], [
        ("int(variant * 8)", "int(variant * 4)"),
        (".94 + .12 * light", ".9 + .2 * light"),
        ("dice.alone > .6", "dice.alone > .5"),
        ("first + 1 + int(dice.second * 3)", "first + int(dice.second * 4)"),
        (".045 * np.sin", ".04 * np.sin"),
        ("(dice.shift - .5) * .36", "(dice.shift - .5) * .3"),
        ("where[d > 0] = second", "where[d < 0] = second"),
        ("d * size + .5", "d * size"),
        ("dice.size < .45", "dice.size < .5"),
        ("dice.shares < .6", "dice.shares < .5"),
        ("dice.what < .4 else", "dice.what < .5 else"),
        ("dice.what < .8 else", "dice.what < .9 else"),
        ("SIZES[1 - SIZES.index(like.size)]", "SIZES[SIZES.index(like.size)]"),
        ('if objects != "parts" and pairs == "seen":', 'if objects == "plain" and pairs == "seen":'),
        ('if share == "shape": colour = COLOURS', 'if share != "shape": colour = COLOURS'),
        ("(.14 if objects", "(.2 if objects"),
        ("dice.flip < .5", "dice.flip < .6"),
        ("24 * (len(self.image) / 64) ** 2", "24 * (len(self.image) / 64)"),
        ("max(.35 * obj.area, least)", "max(.3 * obj.area, least)"),
        ("max(.35 * obj.area, least)", ".35 * obj.area"),
        (">= .6 * head_area", "> .6 * head_area"),
        ("self.heads[window][mask] = 0", "pass"),
        (".72 + .4 * c", ".72 + .5 * c"),
        ("(1.1 if obj.shape", "(1.3 if obj.shape"),
        ("* s ** .7", "* s"),
        ("np.clip(1.0 - .08 * y", "np.clip(1.0 + .08 * y"),
        ("np.clip(.5 - d, 0, 1)", "np.clip(-d, 0, 1)"),
        ("< .03 * where.size", "< .1 * where.size"),
        ("3.5 * noise + .5", "3.5 * noise"),
        ('("shapes", "small"): (6., 8.)', '("shapes", "small"): (6., 9.)'),
        ('("parts", "large"): (12., 14.)', '("parts", "large"): (12., 15.)'),
        ('(2, 3) if objects == "parts" else (3, 5)', '(2, 3) if objects == "parts" else (3, 4)'),
        ("all(alike.count(one) > 1", "any(alike.count(one) > 1"),
        ("Wording(words[:5], words[8]", "Wording(words[:5], words[9]"),
        ("SPLITS.index(split), int(index)", "0, int(index)"),
        ("int(index), attempt]", "int(index), 0]"),
        ('pairs: str = "all"', 'pairs: str = "seen"'),
        ("value < low or (high and value > high)", "value <= low or (high and value > high)"),
        ("value < low or (high and value > high)", "value < low or (high and value >= high)"),
    ]),
    "scenes.language": Room("scenes.language", ["tests/test_scenes.py -k always or hand or clear or shares or straight or refuses or kinds or "
            "bad_argument or captions"], [
        ('noun.endswith("s")', 'noun.endswith("ss")'),
        ("self.wording.sized < .5", "self.wording.sized > .5"),
        ('phrase[0] in "aeiou"', 'phrase[0] in "e"'),
        ("MARGIN = 3.", "MARGIN = 2."),
        ("(obj.box[0] + obj.box[2]) / 2", "(obj.box[0] + obj.box[2] - 1) / 2"),
        (">= 2 / 3 * margin", "> 2 / 3 * margin"),
        ("a.area >= 1.25 * b.area", "a.area > 1.25 * b.area"),
        (">= 1.25 * b.mask.sum()", "> 1.25 * b.mask.sum()"),
        ('("topmost", 1, 1)', '("topmost", 1, -1)'),
        ("if not 2 <= len(ks) < len(things)", "if not 2 <= len(ks) <= len(things)"),
        ("- q[axis]) >= margin", "- q[axis]) >= margin / 2"),
        ('("smallest", min), ("largest", max)', '("smallest", max), ("largest", min)'),
        ("if min(whole, seen) >= 2 * margin", "if max(whole, seen) >= 2 * margin"),
        ("if min(whole, seen) >= 2 * margin", "if min(whole, seen) > 2 * margin"),
        ("whole >= .6 * abs(", "whole >= .5 * abs("),
        ("max(whole, seen) <= -margin", "min(whole, seen) <= -margin"),
        ("max(whole, seen) <= -margin", "max(whole, seen) < -margin"),
        ('(j in ks and form != "thing")', "j in ks"),
        ("if side[k] == 1]", "if side[k] >= 0]"),
        ('if form != "thing" and members[form] == [k]', "if members[form] == [k]"),
        ("if len(members[form]) > 1\n", "if len(members[form]) > 2\n"),
        ("if len(where) != 1: return []", "if len(where) < 1: return []"),
        ('"left of": a < x', '"left of": a <= x'),
        ('"above": b < y', '"above": b > y'),
        ('"largest": lambda m: -int(m.sum())', '"largest": lambda m: int(m.sum())'),
        ('"attribute": .28, "size": .22', '"attribute": .25, "size": .25'),
        ("total - count[kind])", "total + count[kind])"),
        ("sum(count.values()) + 1", "sum(count.values())"),
        ("scene.wording.text * len(texts)", "scene.wording.which * len(texts)"),
        ("if index > 50 * n + 1000", "if index > n"),
    ]),
    "data.rows": Room("data.rows", ["tests/test_data.py -k schema or names or check or unknown or two_values or wrong_size or numbers or "
            "rows or faults or only"], [
        ('datasets.Image(mode="RGB"), Value', 'datasets.Image(), Value'),
        ('"mask": datasets.Image(mode="L")', '"mask": datasets.Image()'),
        ("not n.strip() or", "not n or"),
        ("names.count(n) > 1", "names.count(n) > 2"),
        ("ds._info = ds._info.copy()", "pass"),
        ('row[c].size != row["image"].size', 'row[c].size[0] != row["image"].size[0]'),
        ("<= {0, 255}", "<= {0, 1, 255}"),
        ("len(names) <= v != 255", "len(names) < v != 255"),
        ("len(names) <= v != 255", "len(names) <= v"),
        ("if box is None and not images", "if box is None"),
        ("box[2] > box[0] and", "box[2] >= box[0] and"),
        ("and box[3] > box[1]", "and box[3] >= box[1]"),
        ("box[2] > box[0] and", "box[2] > box[0] or"),
        ("not row[c].strip(): yield", "not row[c]: yield"),
        (r"^large_|\d+$", r"\d+$"),
        (r"^large_|\d+$", r"^large_"),
        ('"referring" and {"mask", "box"} & columns', '"referring"'),
        ("if task == \"semantic\" and len(names) == 2 and", 'if task == "semantic" and'),
        ("names.index(n) if n in names else 255", "there.index(n) if n in names else 255"),
        ("names.index(n) if n in names else 255", "names.index(n) if n in names else 0"),
        ("[255] * (256 - len(there))", "[0] * (256 - len(there))"),
    ]),
    "data.pixels": Room("data.pixels", ["tests/test_data.py -k outline or run_lengths or draw or overlap or segmentations or ade20k or coco or "
            "shifted or turn or upright or what_is_on or modes or packed or stem or brightness or values or memory"], [
        ("len(xy) < 6", "len(xy) < 8"),
        ("or len(xy) % 2 or", "or"),
        ("if list(part[\"size\"]) != [height, width]", "if False"),
        ('height * width) or _fits(part["counts"], height * width - 1)', "height * width)"),
        ('if not _fits(part["counts"], height * width) or', "if"),
        ("for p in parts])) > 0", "for p in parts], True)) > 0"),
        ('convert("RGB")).any(-1)', 'convert("RGB")).all(-1)'),
        ('image.size, "black")', 'image.size, "white")'),
        ("values / max(values.max(), 1e-9)", "values / 255"),
        ("first: int = 0, #", "first: int = 1, #"),
        ("ignore: int = 255, #", "ignore: int = 254, #"),
        ("table[first:first + labels]", "table[:labels]"),
        ("table[[255, ignore]] = 255", "table[[ignore]] = 255"),
        ("table[[255, ignore]] = 255", "table[[255]] = 255"),
        ("if stored == (width, height): return note", "if stored == (width, height): return 1"),
        ("if note > 4 and", "if note > 5 and"),
        ("if note > 4 and", "if"),
        ('if self.kind == "photo" else upright(image)', 'if self.kind == "photo" else image'),
        ('if self.kind == "index" and value.get("path")', 'if self.kind == "index"'),
        ("bright >= .5", "bright > .5"),
        ("bright >= .5", "bright >= .6"),
        ("(bright > .125)", "(bright > 0)"),
        ("(bright < .875)", "(bright < 1)"),
        ("if not on.any() or", "if"),
        ("grey.sum() > on.sum()", "grey.sum() > 0"),
        ('("L", "P", "I", "I;16")', '("L", "I", "I;16")'),
        ('("L", "P", "I", "I;16")', '("L", "P", "I", "I;16", "RGB")'),
        ("if n > 1]", "if n > 2]"),
        ("if f.suffix.lower() in _IMAGES", "if f.suffix in _IMAGES"),
        ('and not f.name.startswith(".")', ""),
    ]),
}


def copy(to):
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info", ".ipynb_checkpoints", "_docs", "_proc")
    for name in ("nbs", "lsbook", "tests"): shutil.copytree(ROOT / name, to / name, ignore=skip)
    for name in ("settings.ini", "setup.py", "pytest.ini", "README.md", "LICENSE", "_quarto.yml"):
        if (ROOT / name).exists(): shutil.copy2(ROOT / name, to / name)
    return to


def notebook_of(folder, module):
    "The notebook that exports a module: the same path, with a number where notebooks have one."
    found = [p for p in (folder / "nbs").rglob("*.ipynb")
             if re.sub(r"(^|/)\d+_", r"\1", p.relative_to(folder / "nbs").with_suffix("").as_posix()) == module.replace(".", "/")]
    return found[0]


def in_child(function, folder, seconds=900):
    """What a child process has to complain of when it runs `function` with the scratch copy as its repository; None for nothing.

    A fork of this process, which has imported torch already but nothing of lsbook: that saves most of the time."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as said:
        if not (child := os.fork()):
            for stream in (1, 2): os.dup2(said.fileno(), stream)
            signal.alarm(seconds)
            os.chdir(folder)
            os.environ["PYTHONPATH"] = str(folder)
            sys.path[:] = [str(folder), *(p for p in sys.path if Path(p).resolve() not in (ROOT, ROOT / "tests"))]
            code = 1
            try: code = function()
            except BaseException as error: print(f"E   {type(error).__name__}: {error}", flush=True)
            finally:
                sys.stdout.flush()
                os._exit(int(code))
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        said.seek(0)
        lines = [line for line in said.read().splitlines() if line.strip()]
    if status == 0: return None
    return next((line for line in reversed(lines) if line.startswith("E  ")), f"exit status {status}")[:150].removeprefix("E").strip()


def by_tests(room, folder):
    import pytest
    for tests in room.tests:
        options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", "--durations=0", *tests.split(" ", 2)]
        if why := in_child(lambda: pytest.main(options), folder): return why


def import_what_it_imports(room, folder):
    """The libraries that the tests of a room import, imported here too: no child has to do it again (that is most of its
    time). Returns what the tests complain of."""
    with tempfile.TemporaryDirectory() as kept:
        class Report:
            def pytest_sessionfinish(self):
                libraries = [n for n, m in list(sys.modules.items()) if re.search("(site|dist)-packages", getattr(m, "__file__", None) or "")]
                Path(kept, "names").write_text("\n".join(n for n in libraries if not re.match(r"_?pytest|py$|xdist|lsbook|test_|conftest", n)))
        import pytest
        for tests in room.tests:
            options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", *tests.split(" ", 2)]
            if why := in_child(lambda: pytest.main(options, plugins=[Report()]), folder): return why
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for name in Path(kept, "names").read_text().split():
                    if name in sys.modules: continue
                    try: importlib.import_module(name)
                    except Exception: pass


def by_notebook(room, folder):
    def execute():
        space = {"__name__": "__main__"}
        for cell in json.loads(notebook_of(folder, room.module).read_text(encoding="utf-8"))["cells"]:
            text = "".join(cell["source"])
            if cell["cell_type"] == "code" and not re.search(r"^#\s*\|\s*(slow|cuda|eval:\s*false)", text, re.M):
                exec(compile(re.sub(r"^%.*$", "", text, flags=re.M), "cell", "exec"), space)
        return 0
    return in_child(execute, folder)


def apply(folder, room, old, new):
    "The change in module and notebook; returns what undoes it."
    module, nb = folder / "lsbook" / (room.module.replace(".", "/") + ".py"), notebook_of(folder, room.module)
    was = {p: p.read_text(encoding="utf-8") for p in (module, nb)}
    if was[module].count(old) != 1: raise LookupError(f"{room.module}: {old!r} stands {was[module].count(old)} times, not once")
    module.write_text(was[module].replace(old, new), encoding="utf-8")
    cells = json.loads(was[nb])
    for cell in cells["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code" and re.search(r"^#\s*\|\s*exports?\b", text, re.M):
            cell["source"] = text.replace(old, new).splitlines(keepends=True)
    nb.write_text(json.dumps(cells), encoding="utf-8")
    return lambda: [p.write_text(text, encoding="utf-8") for p, text in was.items()]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ROOMS, default=list(ROOMS), metavar="ROOM", help=f"of {', '.join(ROOMS)}")
    parser.add_argument("-k", default="", metavar="TEXT", help="only mutants whose old or new text contains TEXT")
    parser.add_argument("-v", action="store_true", help="say what killed each")
    args = parser.parse_args()
    killed, alive, late = 0, [], 0
    import matplotlib, torch, torchvision  # noqa: E401, F401 once, for all children
    with tempfile.TemporaryDirectory() as scratch:
        folder = copy(Path(scratch))
        for name in args.only:
            room = ROOMS[name]
            mutants = [m for m in room.mutants if args.k in m[0] + m[1]]
            try:
                for old, new in mutants: apply(folder, room, old, new)()
            except LookupError as error:
                print(error)
                return 2
            if mutants and (why := import_what_it_imports(room, folder) or by_notebook(room, folder)):
                print(f"{name} fails as it stands: {why}")
                return 2
            for old, new in mutants:
                undo, start = apply(folder, room, old, new), time.time()
                why = by_tests(room, folder)
                if not why and (why := by_notebook(room, folder)): late, why = late + 1, f"notebook: {why}"
                undo()
                if why: killed += 1
                else: alive.append((name, old, new))
                print(f"{'killed' if why else 'ALIVE '} {name}: {old}  ->  {new}  ({time.time() - start:.0f} s)", flush=True)
                if args.v and why: print(f"       {why}", flush=True)
    total = killed + len(alive)
    print(f"{killed} of {total} killed ({killed / max(total, 1):.0%}), {late} of them by the notebook alone")
    for name, old, new in alive: print(f"alive  {name}: {old}  ->  {new}")
    return int(killed < ENOUGH * total)


if __name__ == "__main__":
    sys.exit(main())
