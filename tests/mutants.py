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
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import time
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
            if mutants and (why := by_tests(room, folder) or by_notebook(room, folder)):
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
