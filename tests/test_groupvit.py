"""GroupViT's grouping block: against loops, torch and transformers; its entropies; bf16, compiled, and on a GPU."""
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lsbook.groupvit.grouping_block import *

SMALL = dict(assign="soft", scores="cosine", eps=.1, mixer=False, pre_assign=False, residual=False)

def made(groups_in=5, groups_out=3, **kwargs):
    "A block whose every weight, norm and bias is random, so that no part can be left out unseen"
    torch.manual_seed(0)
    block = GroupingBlock(8, 2, groups_in, groups_out, **kwargs)
    for p in block.parameters(): nn.init.normal_(p, 1. if p.ndim == 0 else 0., .7)
    return block.eval()

def inputs(B=2, N=7, G=5, C=8):
    g = torch.Generator().manual_seed(1)
    return torch.randn(B, N, C, generator=g), torch.randn(B, G, C, generator=g)

def test_assignment_is_over_groups():
    x = torch.randn(2, 3, 4, 5)
    assert torch.equal(assignment(x, "soft"), x.softmax(-2))
    assert torch.equal(assignment(x, "soft", tau=.5), (2 * x).softmax(-2))
    assert torch.equal(assignment(x, "hard"), F.one_hot(x.argmax(-2), 4).movedim(-1, -2).float())
    assert torch.equal(assignment(x, "hard", dim=1), F.one_hot(x.argmax(1), 3).movedim(-1, 1).float())
    assert assignment(torch.zeros(3, 2), "hard").tolist() == [[1, 1], [0, 0], [0, 0]]       # of equals, the first

@pytest.mark.parametrize("tau", [.3, 1., 3.])
def test_straight_through_has_the_gradient_of_soft(tau):
    x, w = torch.randn(3, 6, requires_grad=True), torch.randn(3, 6)
    noise = torch.randn(3, 6)
    slope = lambda a: torch.autograd.grad((w * a).sum(), x)[0]
    assert torch.allclose(slope(assignment(x, "hard", tau=tau)), slope((x / tau).softmax(0)), atol=1e-6)
    assert torch.allclose(slope(assignment(x, "gumbel", tau=tau, noise=noise)), slope(((x + noise) / tau).softmax(0)), atol=1e-6)

def test_gumbel_is_torch_s_own():
    x = torch.randn(2, 4, 9)
    torch.manual_seed(3); ours = assignment(x, tau=.6)
    torch.manual_seed(3); assert torch.equal(ours, F.gumbel_softmax(x, .6, hard=True, dim=-2).round())
    assert set(ours.unique().tolist()) == {0., 1.} and torch.equal(ours.sum(-2), torch.ones(2, 9))

def test_scores_of_few_bits_are_not_decided_by_rounding():
    x = torch.randn(2, 4, 9)
    assert assignment(x.bfloat16(), "soft").dtype == torch.float32 and assignment(x.double(), "soft").dtype == torch.float64
    assert torch.isfinite(assignment(torch.full((3, 2), 6e4).half(), "gumbel")).all()

def test_a_block_is_its_equations():
    block, (s, g) = made(), inputs()
    out = block(s, g)
    for b in range(2):
        x, y = block.norm_segments(s[b]), block.norm_groups(g[b])
        first, _, second = block.mixer[0].mlp
        y = block.mixer[1](second.weight @ F.gelu(first.weight @ y + first.bias[:, None]) + second.bias[:, None])
        y = block.pre_assign(y[None], x[None])[0]
        scores = block.scores.query(y) @ block.scores.key(x).T / math.sqrt(8)
        soft = scores.exp() / scores.exp().sum(0)
        hard = F.one_hot(scores.argmax(0), 3).T.float()
        new = torch.stack([sum(hard[i, j] * block.value(x[j]) for j in range(7)) / (hard[i].sum() + 1) for i in range(3)])
        new = y + block.out(new)
        want = new + block.mlp(block.norm_new(new))
        assert torch.allclose(out.segments[b], want, atol=1e-4) and torch.allclose(out.soft[b], soft, atol=1e-5)
        assert torch.equal(out.assigned[b].detach(), hard)

def test_the_small_block_is_its_equations():
    block, (s, g) = made(3, 3, **SMALL), inputs(G=3)
    x, y = block.norm_segments(s), block.norm_groups(g)
    k = block.scores.key(x)
    a = (block.scores.log_scale.exp() * F.cosine_similarity(block.scores.query(y)[:, :, None], (k - k.mean(1, keepdim=True))[:, None], dim=-1)).softmax(1)
    new = block.out(a @ block.value(x) / (a.sum(2, keepdim=True) + .1))
    out = block(s, g)
    assert torch.allclose(out.soft, a, atol=1e-5) and out.assigned is out.soft
    assert torch.allclose(out.segments, new + block.mlp(block.norm_new(new)), atol=1e-4)
    assert math.isclose(CosineScores(8).log_scale.exp().item(), 10, rel_tol=1e-6)

@pytest.mark.parametrize("kind,same", [("soft", True), ("hard", True), ("gumbel", False)])
def test_noise_is_for_training_alone(kind, same):
    block, x = made(assign=kind), inputs()
    assert torch.equal(block(*x).assigned, block(*x).assigned)
    block.train()
    torch.manual_seed(0)
    runs = [block(*x) for _ in range(4)]
    assert all(torch.equal(r.assigned, runs[0].assigned) for r in runs) is same
    assert all(torch.equal(r.soft, runs[0].soft) for r in runs)                             # never in the soft map

@pytest.mark.parametrize("kind", KINDS)
def test_every_part_learns(kind):
    block = made(assign=kind).train()
    block(*inputs())[0].square().sum().backward()
    still = {n for n, p in block.named_parameters() if p.grad is None or not p.grad.abs().max() > 1e-9}
    assert still <= {"scores.key.bias"}     # in some seeds: a bias of all keys shifts all scores of a group

def test_other_arguments_are_refused_or_switch_parts_off():
    with pytest.raises(ValueError, match="assign: got 'sharp'; wanted one of soft, hard, gumbel"): made(assign="sharp")
    names = lambda **k: {n.split(".")[0] for n, _ in made(3, 3, **k).named_parameters()}
    assert names() - names(mixer=False) == {"mixer"} and names() - names(pre_assign=False) == {"pre_assign"}
    s, g = inputs(G=3)
    block = made(3, 3, eps=0., assign="hard")
    assert torch.isfinite(made(3, 3)(torch.zeros_like(s), g).segments).all()                # empty groups
    assert torch.equal(block.assign == "hard" and block(s, g).assigned.sum(1), torch.ones(2, 7))

NAMES = {"norm_tokens": "norm_groups", "norm_x": "norm_segments", "norm_new_x": "norm_new", "mlp_inter.fc1": "mixer.0.mlp.0",
         "mlp_inter.fc2": "mixer.0.mlp.2", "norm_post_tokens": "mixer.1", "pre_assign_attn.attn.q_proj": "pre_assign.query",
         "pre_assign_attn.attn.k_proj": "pre_assign.key", "pre_assign_attn.attn.v_proj": "pre_assign.value",
         "pre_assign_attn.attn.out_proj": "pre_assign.out", "pre_assign_attn.norm2": "pre_assign.norm",
         "pre_assign_attn.norm_post": "pre_assign.norm_post", "pre_assign_attn.mlp.fc1": "pre_assign.mlp.0",
         "pre_assign_attn.mlp.fc2": "pre_assign.mlp.2", "assign.q_proj": "scores.query", "assign.k_proj": "scores.key",
         "assign.v_proj": "value", "assign.proj": "out", "mlp_channels.fc1": "mlp.0", "mlp_channels.fc2": "mlp.2"}

@pytest.mark.parametrize("groups_out", [4, 10])
def test_a_block_is_transformers_own(groups_out):
    "All its tensors have a place here, and segments and maps agree"
    from transformers import GroupViTVisionConfig
    from transformers.models.groupvit.modeling_groupvit import GroupViTTokenAssign
    config = GroupViTVisionConfig(hidden_size=48, num_attention_heads=6, intermediate_size=192)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    theirs = GroupViTTokenAssign(config, 10, groups_out).eval()
    for p in theirs.parameters(): nn.init.normal_(p, .3 * (p.ndim == 1), .3)
    ours = GroupingBlock(48, 6, 10, groups_out).eval()
    ours.load_state_dict({f"{NAMES[k.rsplit('.', 1)[0]]}.{k.rsplit('.', 1)[1]}": v for k, v in theirs.state_dict().items()})
    x, g = torch.randn(3, 30, 48), torch.randn(3, 10, 48)
    with torch.no_grad(): (segments, soft), out = theirs(x, g), ours(x, g)
    assert (out.soft - soft).abs().max() < 1e-5 and len(soft.argmax(1).unique()) == groups_out
    assert torch.allclose(out.segments, segments, atol=1e-4)

def test_entropies():
    sure, undecided = torch.eye(4).repeat(1, 3), torch.full((4, 12), .25)
    assert torch.allclose(assignment_entropy(torch.stack([sure, undecided])), torch.tensor([0., 1.]))
    one, half = torch.eye(4)[[2] * 12].T, torch.eye(4)[[1, 3] * 6].T
    assert torch.allclose(usage_entropy(torch.stack([sure, undecided, one, half])), torch.tensor([1., 1., 0., .5]))
    assert usage(torch.eye(4)[[0, 0, 0, 1]].T).tolist() == [.75, .25, 0, 0]
    p = torch.tensor([[.5], [.3], [.2]])
    assert math.isclose(assignment_entropy(p).item(), -sum(q * math.log(q) for q in (.5, .3, .2)) / math.log(3), rel_tol=1e-5)

@pytest.mark.parametrize("kwargs", [{}, SMALL])
def test_bf16_autocast_is_close(kwargs):
    block, x = made(3, 3, **kwargs), inputs(G=3)
    with torch.no_grad():
        want = block(*x)
        with torch.autocast("cpu", torch.bfloat16): got = block(*x)
    assert got.soft.dtype == torch.float32 and (got.soft - want.soft).abs().mean() < .05
    with torch.no_grad(): assert block.bfloat16()(*(t.bfloat16() for t in x)).segments.dtype == torch.bfloat16

@pytest.mark.parametrize("kwargs", [{}, SMALL])
def test_a_block_compiles_in_one_graph(kwargs):
    block, x = made(3, 3, **kwargs), inputs(G=3)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for a, b in zip(block(*x), compiled(*x)): assert torch.allclose(a, b, atol=1e-5)
    block.train()
    out = compiled(*x)
    out.segments.sum().backward()
    assert torch.equal(out.assigned.sum(1).round(decimals=4), torch.ones(2, 7))

@pytest.mark.cuda
@pytest.mark.parametrize("kwargs", [{}, SMALL])
def test_gpu(kwargs):
    block, x = made(3, 3, **kwargs), inputs(G=3)
    with torch.no_grad():
        want = block(*x)
        block.cuda()
        on = [t.cuda() for t in x]
        torch.cuda.set_sync_debug_mode("error")                                             # nothing waits for the device
        try: got = block(*on)
        finally: torch.cuda.set_sync_debug_mode("default")
        with torch.autocast("cuda", torch.bfloat16): few_bits = block(*on)
    assert (got.soft.cpu() - want.soft).abs().max() < 1e-3
    assert few_bits.soft.dtype == torch.float32 and (few_bits.soft.cpu() - want.soft).abs().mean() < .05
    block.train(), torch.compile(block)(*on).segments.sum().backward()
