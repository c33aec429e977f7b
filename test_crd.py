"""What CRD and DDPO claim, each claim a test that fails when the line it guards is broken.

CPU only, no network.

    python -m pytest -q test_crd.py
    python test_crd.py                 # not a test: an epoch's time over that of its bare model calls
    python test_crd.py rewards         # nor this: images a second of each reward, with small models
"""

import functools
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import statistics
import sys
import tempfile
import time
import timeit
import zlib
from collections import OrderedDict
from contextlib import redirect_stdout
from dataclasses import asdict, fields
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports that read it

import diffusers  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from diffusers import DDIMScheduler, SD3Transformer2DModel  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import save_file  # noqa: E402
from torch.testing import assert_close  # noqa: E402

import crd  # noqa: E402
import ddpo  # noqa: E402
import rewards  # noqa: E402
from crd import ADAPTERS, PRESETS, TARGET_MODULES, Settings  # noqa: E402

TINY = Path(__file__).parent / "tiny-sd3"
CPU = torch.device("cpu")
parametrize = pytest.mark.parametrize
in_both = parametrize("script", [crd, ddpo], ids=["crd", "ddpo"])


@parametrize("name", ["LoRALinear", "add_lora", "use_adapter", "ema_update", "save_lora", "load_lora",
                      "Checkpoint", "checkpoint_blocks", "restore", "peak_gb", "run_folder"])
def test_the_scripts_share_these_lines(name):
    """So what is tested of one below holds for both."""
    assert inspect.getsource(getattr(crd, name)) == inspect.getsource(getattr(ddpo, name))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# A small model

def small_transformer(blocks=2):
    """An SD3.5-style transformer with random weights; its first block has the second attention, attn2."""
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=blocks, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16,
        pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm").eval().requires_grad_(False)


def trained(layers, std=0.3):
    """The layers with all adapters away from zero, as if trained, each its own way."""
    torch.manual_seed(0)
    for layer in layers.values():
        for B in layer.B.values():
            B.data.normal_(std=std)
    return layers


def inputs(count, seed=1):
    """x0, noise (count, 4, 8, 8) and conditions for small_transformer."""
    g = seeded(seed)
    x0, noise = torch.randn(2, count, 4, 8, 8, generator=g)
    return x0, noise, (torch.randn(count, 3, 16, generator=g), torch.randn(count, 16, generator=g))


UNCOND = [t[:1] for t in inputs(1, seed=9)[2]]
SIGMA = torch.tensor(0.7)


def predict(model, grad=False):
    """The velocity at one sigma. (With grad torch may pick other kernels: never compare the two.)"""
    x0, _, cond = inputs(2)
    with torch.set_grad_enabled(grad):
        return crd.velocity(model, x0, SIGMA, [t.to(model.dtype) for t in cond])


def policy(layers):
    return [part["policy"] for layer in layers.values() for part in (layer.A, layer.B)]


def gradients(layers):
    """The policy's gradients as one vector."""
    return torch.cat([p.grad.flatten() for p in policy(layers)])


def distance(a, b):
    """|a - b| / |b|: two gradients that only rounding tells apart are under 1e-4 of each other."""
    return (a - b).norm() / b.norm()


def with_lora(model):
    return trained(crd.add_lora(model, TARGET_MODULES, 2, 6, ADAPTERS))


# LoRA

@parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora(dtype):
    """It starts as the identity, and yet it can learn: in float32, also where the model is bf16. Trained and
    switched off, the model is as pretrained, to the bit; W + (alpha / rank) B A is the adapted layer. An
    adapter that follows the policy keeps its share of itself, and the others stay."""
    model = small_transformer().to(dtype)
    before, layers = predict(model), crd.add_lora(model, TARGET_MODULES, 2, 6, ADAPTERS)

    def outputs():
        for name in (None, *ADAPTERS):
            with crd.use_adapter(layers, name):
                yield predict(model)

    assert all(torch.equal(output, before) for output in outputs())
    predict(model, grad=True).square().mean().backward()
    gradient = gradients(layers)
    assert gradient.dtype == torch.float32 and gradient.isfinite().all() and gradient.abs().max() > 0
    trained(layers)
    off, *on = outputs()
    assert torch.equal(off, before)
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations([off, *on], 2))
    layer = next(iter(layers.values()))
    B = {name: B.detach().clone() for name, B in layer.B.items()}
    crd.ema_update(layers, "old", 0.25)
    assert_close(dict(layer.B), {**B, "old": 0.25 * B["old"] + 0.75 * B["policy"]})
    for layer in layers.values():
        layer.base.weight.data += (6 / 2 * layer.B["policy"].data @ layer.A["policy"].data).to(dtype)
    if dtype == torch.float32:
        assert_close(next(outputs()), on[0], rtol=1e-4, atol=1e-5)


def test_where_lora_is(tiny_sd1):
    """On a transformer's joint attention: eight projections of a block's attn (the last has no to_add_out),
    none of attn2, only policy trained. On a UNet's attentions, to itself and to the text, four each."""
    model = small_transformer()
    layers = crd.add_lora(model, ddpo.StableDiffusion3.target_modules, 2, 4, ADAPTERS)
    blocks = [f"transformer_blocks.{i}.{target}" for i in range(2) for target in TARGET_MODULES]
    assert set(layers) == set(blocks) - {"transformer_blocks.1.attn.to_add_out"}
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {f"{name}.{part}.policy" for name in layers for part in "AB"}
    assert {name.split(".attn")[1] for name in family_with_lora(tiny_sd1)[2]} == {
        f"{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")}
    with pytest.raises(ValueError, match="no linear layer of SD3Transformer2DModel .* nowhere"):
        crd.add_lora(model, ["nowhere"], 2, 4)


def write_lora(path, layers, prefix="transformer", **config):
    """A LoRA file as diffusers writes it, with peft's configuration in its metadata."""
    tensors = {f"{prefix}.{name}.lora_{part}.weight": getattr(layer, part)["policy"].data
               for name, layer in layers.items() for part in "AB"}
    config = json.dumps({f"{prefix}.{key}": value for key, value in config.items()})
    save_file(tensors, path, metadata={"format": "pt", "lora_adapter_metadata": config})


def test_saved_lora_comes_back(tmp_path):
    """Into another model, of another alpha: the same function, in any adapter. A file of diffusers is as
    strong as the lora_alpha / r in its metadata. Other shapes and layers, and more than that, are refused."""
    model, path = small_transformer(), tmp_path / "lora.safetensors"
    layers, expected = with_lora(model), predict(model)
    for write, adapter in ((crd.save_lora, "sampler"),
                           (functools.partial(write_lora, r=2, lora_alpha=6), "policy")):
        other = small_transformer()
        fresh = crd.add_lora(other, TARGET_MODULES, 2, 5, ADAPTERS)
        write(path, layers)
        crd.load_lora(path, fresh, adapter)
        for name, output in ((adapter, expected), ("old", predict(small_transformer()))):
            with crd.use_adapter(fresh, name):
                assert_close(predict(other), output, rtol=1e-5, atol=1e-6)
    for targets, rank, config in ((TARGET_MODULES, 3, {}), (TARGET_MODULES[:2], 2, {}), *(
            (TARGET_MODULES, 2, {key: {"x": 3}}) for key in ("use_rslora", "use_dora", "alpha_pattern",
                                                             "rank_pattern"))):
        write_lora(path, layers, r=2, lora_alpha=2, **config)
        with pytest.raises(ValueError, match="use the same model and --rank.*" + "".join(config)):
            crd.load_lora(path, crd.add_lora(small_transformer(), targets, rank, 4))


# Checkpointing

@in_both
@parametrize("returns", [lambda y: y, lambda y: (None, y), lambda y: (y.sin(), None, y)])
def test_checkpointing_changes_memory_not_gradients(script, returns):
    """Of a block that returns a tensor, or a tuple with None in it, and takes tensors by keyword. It is run
    again with the adapter of its forward pass, though another is active by then."""
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.to_q = torch.nn.Linear(4, 4)

        def forward(self, x, factor, shift=None, mask=None):
            return returns((factor * self.to_q(x) + shift).sin().exp().tanh())

    def run():
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x: sizes.update({x.data_ptr(): x.numel()}) or x, lambda x: x):
            outputs = block(inputs[0], 2.0, shift=inputs[1], mask=None)
        outputs = [y for y in (outputs if isinstance(outputs, tuple) else [outputs]) if y is not None]
        with script.use_adapter(layers, None):
            grads = torch.autograd.grad(sum(y.square().sum() for y in outputs), [inputs, *policy(layers)])
            assert {layer.active for layer in layers.values()} == {None}
        return (outputs, grads), sum(sizes.values())

    block, inputs = Block(), torch.randn(2, 1000, 4).requires_grad_()
    layers = trained(script.add_lora(block, ["to_q"], 2, 4))
    expected, plain = run()
    script.checkpoint_blocks([block], layers)
    found, size = run()
    assert size < plain / 2
    assert_close(found, expected)


# Mathematics

def gaussian_velocity(x, sigma, mean, std):
    """E[noise - x0 | x_sigma = x] for data N(mean, std^2): what a perfect model of that data predicts."""
    a, variance = 1 - sigma, (1 - sigma) ** 2 * std**2 + sigma**2
    return sigma * (x - a * mean) / variance - (mean + a * std**2 * (x - a * mean) / variance)


@parametrize("order, ratio, bound", [(1, 2, 2e-2), (2, 4, 2e-4)])
def test_sample_ode_converges_to_the_exact_solution(order, ratio, bound):
    """N(0.7, 1) data: noise z ends at 0.7 + z; twice the steps, half or (but for a log) a quarter error. And
    at first order a step is x + (t - s) v(x, s), on uneven sigmas too, which must descend to 0."""
    noise = torch.randn(4, 1, 2, 2, dtype=torch.float64, generator=seeded())

    def error(steps):
        sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        x0 = crd.sample_ode(lambda x, sigma: gaussian_velocity(x, sigma, 0.7, 1.0), noise, sigmas, order)
        return (x0 - (0.7 + noise)).abs().max().item()

    assert error(160) < bound
    assert error(160) / error(320) == pytest.approx(ratio, rel=0.1)
    x, sigmas = noise, torch.tensor([1.0, 0.8, 0.3, 0.0], dtype=torch.float64)
    for s, t in itertools.pairwise(sigmas):
        x = x + (t - s) * torch.sin(3 * x + s)
    assert_close(crd.sample_ode(lambda x, s: torch.sin(3 * x + s), noise, sigmas, 1), x)
    for wrong in ([1.0, 0.5], [1.0, 0.5, 0.5, 0.0], [0.5, 1.0, 0.0]):
        with pytest.raises(ValueError, match="must descend to 0"):
            crd.sample_ode(lambda x, s: x, noise, torch.tensor(wrong))


REWARDS = torch.tensor([0.1, 0.4, 0.2, 1.0, 0.0, 0.5, 0.3, 0.6], dtype=torch.float64)  # two groups of four
TARGETS = crd.reward_targets(REWARDS, 4)
RHO = torch.randn(8, dtype=torch.float64, generator=seeded(3))


def test_reward_targets():
    """Each group averages to 1/2, on the scale of the batch's population deviation; a constant added to all
    rewards changes nothing, one outlier among many ends at the clip. Groups must be whole. Where the mean of
    a group is weighted, a cold temperature takes its best image and its worst, a hot one all alike."""
    centered = REWARDS.view(2, 4) - REWARDS.view(2, 4).mean(1, keepdim=True)
    spread = (REWARDS - REWARDS.mean()).square().mean().sqrt()
    assert_close((TARGETS.view(2, 4) - 0.5) * 10, centered / (spread + 1e-4))
    assert_close(crd.reward_targets(REWARDS + 3, 4), TARGETS)
    outlier = torch.cat([torch.zeros(99), torch.ones(1)])
    assert crd.reward_targets(outlier, 100).max() == crd.reward_targets(outlier, 100, clip=2.0).max() == 1
    assert crd.reward_targets(-outlier, 100).min() == 0 <= crd.reward_targets(outlier, 100).min()
    with pytest.raises(ValueError, match="7 rewards are not whole groups of 4"):
        crd.reward_targets(REWARDS[:7], 4)
    plain, cold = RHO.view(2, 4).mean(1).repeat_interleave(4)[None], crd.group_mean(RHO, TARGETS, 4, 1e-3)
    assert_close(cold[:, 0], torch.stack([RHO[3], RHO[0]]))
    assert_close(crd.group_mean(RHO, TARGETS, 4), plain)
    assert_close(crd.group_mean(RHO, TARGETS, 4, 1e6), plain.expand(2, -1), rtol=1e-4, atol=1e-5)


def centered_loss(rho, targets, tau=math.inf, **settings):
    """crd_loss of whole groups of four."""
    means = crd.group_mean(rho.detach(), targets, 4, tau), crd.group_mean(targets, targets, 4, tau)
    return crd.crd_loss(rho, means[0], targets, means[1], **settings)


def loss_and_gradient(rho, targets, **settings):
    rho = rho.clone().requires_grad_()
    loss = centered_loss(rho, targets, **settings)
    return loss.detach(), torch.autograd.grad(loss, rho)[0]


@parametrize("tau", [math.inf, 0.2])
@parametrize("beta, clip", [(1.0, 5.0), (0.7, 2.0)])
def test_crd_loss_regresses_rho_on_the_reward(beta, clip, tau):
    """Z(c) cancels: a constant for a prompt, in its rewards or its log-ratios, changes no loss, no gradient.
    It is the gradient of the squares, rho's mean held still; with the plain mean that changes nothing, at
    rho = 0 it is -A / N, and it is gone where beta rho, centered, is s."""
    settings, targets = dict(beta=beta, clip=clip, tau=tau), crd.reward_targets(REWARDS, 4, clip)
    loss, gradient = loss_and_gradient(RHO, targets, **settings)
    offset = torch.tensor([0.0] * 4 + [0.3] * 4, dtype=torch.float64)
    assert_close(loss_and_gradient(RHO, targets + offset, **settings), (loss, gradient))
    assert_close(loss_and_gradient(RHO + offset, targets, **settings), (loss, gradient))
    means = [crd.group_mean(x, targets, 4, tau) for x in (RHO, targets)]
    assert_close(gradient, 2 * clip * (beta * (RHO - means[0]) - (targets - means[1])).mean(0) / 8)
    rho = RHO.clone().requires_grad_()
    crd.crd_loss(rho, crd.group_mean(rho, targets, 4, tau), targets, means[1], beta, clip).backward()
    assert torch.allclose(rho.grad, gradient) == (tau == math.inf)
    if tau == math.inf:
        assert_close(loss_and_gradient(0 * RHO, targets, **settings)[1], -(targets - 0.5) * 2 * clip / 8)
        assert max(x.abs().max() for x in loss_and_gradient(targets / beta, targets, **settings)) < 1e-9


def velocities(count=8, seed=5):
    """v, v_old, u (count, 2, 3, 3) in float64."""
    g = seeded(seed)
    return torch.randn(3, count, 2, 3, 3, dtype=torch.float64, generator=g)


@parametrize("adaptive", [True, False])
def test_implicit_reward(adaptive):
    """Zero where the policy is `old`, positive where it denoises better, of opposite sign when they change
    places; the adaptive weights have no gradient. Ten times the errors are ten times rho, or a hundred."""
    rho = functools.partial(crd.implicit_reward, adaptive=adaptive)
    v, v_old, u = velocities()
    assert torch.equal(rho(v_old, v_old, u), torch.zeros(8, dtype=torch.float64))
    assert (rho(u + (v_old - u) / 2, v_old, u) > 0).all()
    assert_close(rho(v, v_old, u), -rho(v_old, v, u))
    assert_close(rho(10 * v, 10 * v_old, 10 * u), (10 if adaptive else 100) * rho(v, v_old, u))
    m = (v - u).abs().mean((1, 2, 3), keepdim=True) if adaptive else torch.ones(8, 1, 1, 1)
    assert_close(rho(v, u, u), -((v - u).square() / m).mean((1, 2, 3)))  # nothing is divided by zero
    v.requires_grad_()
    gradient, = torch.autograd.grad(rho(v, v_old, u).sum(), v)
    assert_close(gradient, (-2 * (v - u) / m / u[0].numel()).detach())


def test_the_optimum_has_no_loss():
    """Data N(m, s^2), reward <g, x0>: the optimum p* is N(m + s^2 g / beta, s^2), and it has no loss.

    With D = (1 - sigma)^2 s^2 + sigma^2, their best velocities differ by -(sigma / D) s^2 g / beta. With one
    noise for the group u - v_old is -(sigma / D) x0 plus a constant. So rho, centered, is the true log-ratio
    <g, x0> / beta, centered, times the ELBO's weight 2 (sigma s / D)^2 / (C H W), which beta divides out.
    """
    x0, noise, g = torch.randn(3, 4, 2, 3, 3, dtype=torch.float64, generator=seeded())
    noise, g, sigma, m, s, beta = noise[:1], g[:1], torch.tensor(0.6, dtype=torch.float64), 0.3, 0.5, 0.8
    x, u, reward = crd.add_noise(x0, noise, sigma), noise - x0, (g * x0).sum((1, 2, 3))
    D = (1 - sigma) ** 2 * s**2 + sigma**2

    def loss(mean):
        v, v_old = gaussian_velocity(x, sigma, mean, s), gaussian_velocity(x, sigma, m, s)
        rho = crd.implicit_reward(v, v_old, u, adaptive=False)
        return centered_loss(rho, reward, beta=beta * g.numel() / (2 * (sigma * s / D) ** 2)).item()

    assert loss(m + s**2 * g / beta) < 1e-20
    assert loss(m + 0.9 * s**2 * g / beta) > 1e-4 and loss(m) > 1e-2


def test_the_anchor():
    """Weight kappa_min at reward 0, kappa at reward 1 and without a reward; it pulls toward the reference."""
    (v, v_ref, _), n = velocities(2), torch.tensor([0.0, 1.0], dtype=torch.float64)
    apart = (v - v_ref).square().mean((1, 2, 3))
    assert_close(crd.anchor_loss(v, v_ref, n, 0.1), (1e-4 * apart[0] + 0.1 * apart[1]) / 2)
    assert_close(crd.anchor_loss(v, v_ref, None, 0.1), 0.1 * apart.mean())


def test_ema_decay():
    """start_value up to start_step, then the ramp, then end_value for ever."""
    decays = [crd.ema_decay(step, 75, 0.1, 0.1, 0.9) for step in (0, 75, 76, 77, 84, 999)]
    assert decays == pytest.approx([0.1, 0.1, 0.2, 0.3, 0.9, 0.9])


# A training step

@parametrize("weight, anchor, tau", [(0.5, 0.2, math.inf), (0.5, 0.0, 0.2), (0.0, 0.2, math.inf)])
def test_a_training_step_is_the_objective(weight, anchor, tau):
    """The policy against `old` and against the guided pretrained model, anchored by reward; no more. Either
    term can be left out, and micro-batches, of whole groups or uneven parts of one, change nothing."""
    model, (x0, noise, cond) = small_transformer(), inputs(8)
    layers, x, u = with_lora(model), 0.3 * x0 + 0.7 * noise, noise - x0
    cond, targets, R = [t[:2] for t in cond], TARGETS.float(), REWARDS.float()
    each, uncond = [t.repeat_interleave(4, 0) for t in cond], [torch.cat([t] * 8) for t in UNCOND]
    v = crd.velocity(model, x, SIGMA, each)
    with torch.no_grad(), crd.use_adapter(layers, "old"):
        v_old = crd.velocity(model, x, SIGMA, each)
    with torch.no_grad(), crd.use_adapter(layers, None):
        v_cond, v_uncond = (crd.velocity(model, x, SIGMA, c) for c in (each, uncond))
    reward_loss = bool(weight) * centered_loss(crd.implicit_reward(v, v_old, u), targets, tau)
    pull = bool(anchor) * crd.anchor_loss(v, v_uncond + 3 * (v_cond - v_uncond), R, anchor)
    (loss := weight * reward_loss + pull).backward()
    expected = gradients(layers)
    for micro_batch in (8, 6, 4, 3, 1):
        model.zero_grad()
        totals = crd.accumulate_gradients(
            model, layers, x0, noise, SIGMA, cond, UNCOND, targets, R, 1.0,
            Settings(group_size=4, micro_batch=micro_batch, reward_weight=weight, anchor=anchor, tau=tau,
                     anchor_guidance=3.0))
        assert distance(gradients(layers), expected) < 1e-4
        terms = torch.stack([loss, reward_loss, pull]).detach()
        assert_close(totals[:3].float(), terms, rtol=1e-5, atol=1e-8)
    assert all(p.grad is None for layer in layers.values() for p in (*layer.A.values(), *layer.B.values())
               if not p.requires_grad)


# ---------------------------------------------------------------------------------------------------- rewards

def picture(seed=0, size=(64, 32), flat=False):
    """A picture of noise, or of one colour."""
    if flat:
        return Image.new("RGB", size, (90, 120, 30))
    return Image.frombytes("RGB", size, random.Random(seed).randbytes(3 * size[0] * size[1]))


@parametrize("target, read, expected", [
    ("moon", "moon", 1), ("Moon", "MOON", 1), ("good day", "goodday", 1), ("moon", "the moon is up", 1),
    ("moon", "moan", 3 / 4), ("moon", "mon", 3 / 4), ("moon", "moxon", 3 / 4), ("moon", "omon", 2 / 4),
    ("moon", "", 0), ("moon", "xyz", 0), ("moon", "a very long line of other text", 0)])
def test_edit_similarity(target, read, expected):
    assert rewards.edit_similarity(target, read) == expected


@parametrize("prompt, text", [('a sign that says "Hi there"', "Hi there"), ('"a" and "b"', "a"),
                                          ("no quotes", None), ('an empty ""', None), ('one " only', None)])
def test_the_text_to_draw_is_between_the_first_quotes(prompt, text):
    assert rewards.quoted(prompt) == text


def text_map(*blocks):
    """A (32, 64) map with the value of each block (value, x0, y0, x1, y1), corners included."""
    scores = torch.zeros(32, 64)
    for value, x0, y0, x1, y1 in blocks:
        scores[y0:y1 + 1, x0:x1 + 1] = value
    return scores


GROWTH = 20 * 8 * 1.5 / 56  # of the first block: area * unclip / perimeter


@parametrize("blocks, expected", [
    ([], []),
    ([(0.9, 10, 5, 30, 13)], [(10 - GROWTH, 5 - GROWTH, 30 + GROWTH, 13 + GROWTH)]),
    ([(0.5, 10, 5, 30, 13)], []),  # over the map's threshold, under the box's
    ([(0.25, 0, 0, 63, 31), (0.9, 10, 5, 30, 13)], [(10 - GROWTH, 5 - GROWTH, 30 + GROWTH, 13 + GROWTH)]),
    ([(0.9, 10, 5, 30, 7)], []),  # too thin
    ([(0.9, 0, 0, 6, 6), (0.9, 7, 7, 13, 13)], [(-4.875, -4.875, 17.875, 17.875)])])  # corners touch
def test_boxes_of_hand_made_maps(blocks, expected):
    boxes, = rewards.find_boxes(text_map(*blocks)[None])
    assert boxes == [pytest.approx(box) for box in expected]


def test_boxes_stay_with_their_map():
    """Two in the first, none in the second, one in the third."""
    two, one = [(0.9, 2, 2, 20, 8), (0.8, 2, 20, 40, 28)], [(0.7, 30, 4, 50, 12)]
    found = rewards.find_boxes(torch.stack([text_map(*two), text_map(), text_map(*one)]), unclip=0)
    assert [sorted(boxes) for boxes in found] == [[(2, 2, 20, 8), (2, 20, 40, 28)], [], [(30, 4, 50, 12)]]


def test_components_are_those_of_a_flood_fill():
    """On random masks, where blobs wind about and touch by their corners."""
    mask = torch.rand(3, 24, 24, generator=torch.Generator().manual_seed(0)) < 0.45
    left, blobs = {tuple(p) for p in mask.nonzero().tolist()}, []
    while left:
        blob = stack = {left.pop()}
        while stack:
            stack = {p for b, y, x in stack for dy in (-1, 0, 1) for dx in (-1, 0, 1)
                     if (p := (b, y + dy, x + dx)) in left}
            left, blob = left - stack, blob | stack
        blobs.append(blob)
    found = {}
    for pixel, label in zip(mask.nonzero().tolist(), rewards.connected(mask).tolist()):
        found.setdefault(label, set()).add(tuple(pixel))
    assert sorted(map(sorted, found.values())) == sorted(map(sorted, blobs)) and len(blobs) > 10


@parametrize("steps, text", [("aab", "ab"), ("aa-ab", "aab"), ("--a--", "a"), ("---", ""), ("a-b-b", "abb")])
def test_ctc_decoding(steps, text):
    """Repeats merge unless a blank parts them; blanks go."""
    characters = ["-", "a", "b"]
    scores = torch.nn.functional.one_hot(torch.tensor([characters.index(c) for c in steps]), 3)
    assert rewards.ctc_decode(scores[None], characters) == [text]


def test_reading_order():
    """Top to bottom, then left to right; a box a little lower than its neighbour is still on its line."""
    first, second, third, fourth = (0, 0, 10, 10), (20, 3, 30, 13), (0, 20, 10, 30), (15, 18, 30, 28)
    assert rewards.reading_order([fourth, second, third, first]) == [first, second, third, fourth]


@parametrize("size, expected", [((32, 64), (32, 64)), ((512, 512), (512, 512)), ((100, 50), (96, 64)),
                                            ((1920, 1080), (960, 544)), ((5, 5), (32, 32))])
def test_detector_input(size, expected):
    """The longest side at most 960, sides multiples of 32."""
    assert rewards.detector_size(*size) == expected


@pytest.fixture(scope="session")
def toy_ocr():
    return rewards.load(f"ocr@{TINY}", CPU)


def test_the_bundled_models_read_words_they_never_saw(toy_ocr):
    """500 held-out words, drawn cleanly: at least 98 % to the letter, and what is read is scored."""
    spec = importlib.util.spec_from_file_location("make", TINY / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    pairs, rng = rewards.prompts("signs", "eval", 0)[:500], random.Random(0)
    prompts, metadata = zip(*pairs)
    images = [make.draw(prompt, rng)[0] for prompt in prompts]
    exact = [text.casefold() == rewards.quoted(prompt) for text, prompt in zip(toy_ocr.read(images), prompts)]
    assert sum(exact) >= 0.98 * 500
    assert toy_ocr(images, prompts, metadata).mean() > 0.98
    assert toy_ocr(images, prompts[1:] + prompts[:1], metadata).mean() < 0.5


def test_reading_does_not_depend_on_the_batch(toy_ocr):
    """Nor on the size of the picture beside it; an empty picture says nothing."""
    images = [picture(flat=True), picture(), picture(size=(96, 64))]
    assert toy_ocr.read(images) == [toy_ocr.read([image])[0] for image in images]
    assert toy_ocr.read(images)[0] == ""


def test_jpeg_rewards():
    """Noise takes more kB than a flat colour; one reward is minus the other; the unit is 1,000 bytes."""
    images, more, less = [picture(), picture(flat=True)], *(rewards.load(name, CPU) for name in
                                                            ("incompressibility", "compressibility"))
    file = io.BytesIO()
    images[0].save(file, "JPEG", quality=95)
    sizes = more(images, ["", ""], [{}, {}])
    assert sizes[0] > 2 * sizes[1] > 0 and sizes[0].item() == pytest.approx(file.tell() / 1000)
    assert torch.equal(less(images, ["", ""], [{}, {}]), -sizes)
    lo, hi = more.range
    assert less.range == (-hi, -lo)


def test_weighted_sum():
    """sum_i weight_i reward_i; parts are logged unweighted; a negative weight turns its range around."""
    images = [picture(), picture(flat=True)]
    both = rewards.load("compressibility:2, incompressibility:-0.5", CPU)
    total, parts = both.score(images, ["", ""], [{}, {}])
    assert set(parts) == {"compressibility", "incompressibility"}
    assert_close(total, 2 * parts["compressibility"] - 0.5 * parts["incompressibility"])
    assert both.range == (-500, 0)
    assert rewards.normalize(torch.tensor([-600, -500, -250, 0, 9]), both.range).tolist() == [0, 0, 0.5, 1, 1]
    one = rewards.load("compressibility:0.5", CPU)
    assert_close(one(images, ["", ""], [{}, {}]), parts["compressibility"] / 2)


@parametrize("spec, message", [
    ("beauty", "unknown reward 'beauty' .* aesthetic, clipscore, compressibility"), ("", "unknown reward ''"),
    ("ocr@", "nothing after the @"), ("compressibility:much", "malformed weight in 'compressibility:much'"),
    ("compressibility:nan", "malformed weight"), ("compressibility:0", "every weight .* is 0"),
    ("compressibility,compressibility:2", "comes twice"), ("compressibility@here", "no weights to load")])
def test_a_malformed_spec_is_an_error(spec, message):
    with pytest.raises(ValueError, match=message):
        rewards.load(spec, CPU)


def test_ocr_models_that_are_not_there_are_an_error(tmp_path):
    with pytest.raises(OSError, match="cannot load .*ocr-det.* as in ocr@tiny-sd3"):
        rewards.load(f"ocr@{tmp_path}", CPU)


def broken(measure):
    """A reward whose scores are whatever `measure` makes of the images."""
    reward = rewards.Reward(None, CPU)
    reward.name, reward.measure = "broken", lambda images, prompts, metadata: measure(images)
    return reward


@parametrize("measure, message", [
    (lambda images: 1 / 0, "reward broken failed: ZeroDivisionError"),
    (lambda images: [0.5, math.nan], "reward broken gave nan for the prompt 'second'"),
    (lambda images: [math.inf, 0.5], "reward broken gave inf for the prompt 'first'"),
    (lambda images: [0.5], r"reward broken gave scores of shape \(1,\) for 2 images")])
def test_a_reward_that_fails_stops_with_its_name(measure, message):
    """It never quietly becomes 0, alone or in a sum."""
    images, alone = [picture(), picture()], broken(measure)
    for reward in (alone, rewards.WeightedSum([(1, rewards.load("compressibility", CPU)), (2, alone)])):
        with pytest.raises(RuntimeError, match=message):
            reward(images, ["first", "second"], [{}, {}])


# ---------------------------------------------------------------------------------------------------- prompts

def some_prompts(source, split, seed=0, count=400):
    return [prompt for prompt, _ in itertools.islice(rewards.prompts(source, split, seed), count)]


@parametrize("source, text", [("signs", rewards.quoted), ("ocr", lambda p: rewards.quoted(p).casefold()),
                                          ("animals", str)])
def test_no_evaluation_prompt_is_trained_on(source, text):
    """Nor its word (`signs`), nor its text (`ocr`). The seed decides the training prompts, not the others."""
    train, held_out = some_prompts(source, "train", count=3000), some_prompts(source, "eval")
    assert {text(p) for p in train}.isdisjoint({text(p) for p in held_out})
    assert len(set(held_out)) == len(held_out) > 3
    assert held_out == some_prompts(source, "eval", seed=1)
    assert train == some_prompts(source, "train", count=3000) != some_prompts(source, "train", 1, 3000)


@parametrize("name, line", [("words.txt", "{}"), ("words.jsonl", '{{"prompt": "{}", "tag": "counting"}}')])
def test_prompts_from_a_file(tmp_path, name, line):
    """Every line is for training or for evaluation, never both; other keys of a .jsonl line are metadata."""
    words = {f"a {i} b" for i in range(40)}
    (tmp_path / name).write_text("\n".join(line.format(word) for word in sorted(words)))
    source = str(tmp_path / name)
    train, held_out = some_prompts(source, "train"), some_prompts(source, "eval")
    assert set(train) | set(held_out) == words and not set(train) & set(held_out)
    assert len(train) == 400 and 0 < len(held_out) < 20
    _, metadata = next(iter(rewards.prompts(source, "train", 0)))
    assert f"{source}, line " in metadata["where"]
    assert metadata.get("tag") == ("counting" if "json" in name else None)


@parametrize("name, content, message", [
    ("a.txt", "one\n\nthree", "a.txt, line 2: the prompt is blank"),
    ("a.jsonl", '{"prompt": "one"}\n{"prompt": }', "a.jsonl, line 2: not JSON"),
    ("a.jsonl", '{"prompt": "one"}\n{"text": "two"}', 'a.jsonl, line 2: needs an object with .*"prompt"'),
    ("a.txt", "just one", "a.txt has no prompt for the split"), ("a.txt", "", "a.txt holds no prompt"),
    ("a.csv", "one", "neither .*signs.* nor a .txt or .jsonl"),
    ("a.txt", None, "cannot read the prompts in .*a.txt: No such file")])
def test_a_broken_prompt_file_is_an_error_with_file_and_line(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        [some_prompts(str(tmp_path / name), split) for split in ("train", "eval")]


def test_prompts_without_a_text_to_draw_are_refused(tmp_path, toy_ocr):
    """With file and line, before the first image."""
    path = tmp_path / "a.txt"
    path.write_text('a sign that says "one"\na sign\n')
    with pytest.raises(ValueError, match="a.txt, line 2: the reward ocr needs .* between double quotes"):
        rewards.check(toy_ocr, str(path))


# ------------------------------------------------------------------------------------ rewards that are models

def shaken(model, seed=0):
    """The model with weights large enough for inputs to matter."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.normal_(0, 0.3, generator=generator)
    return model.eval()


SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "<image>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>",
           "<|im_start|>", "<|im_end|>")


def byte_tokenizer(ends=False):
    """A token a byte, after the special ones; ends: between [CLS] and [SEP], as BERT has it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *letters])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[
            ("[CLS]", 1), ("[SEP]", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", cls_token="[CLS]",
                                   sep_token="[SEP]", additional_special_tokens=list(SPECIAL[3:]))


def save_processor(folder, side=32):
    from transformers import CLIPImageProcessorPil
    CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side}
                          ).save_pretrained(folder)


def small_clip(folder):
    """Save a small CLIPModel with the toy's tokenizer; returns its configuration."""
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel
    tokenizer = AutoTokenizer.from_pretrained(TINY / "tokenizer")
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                 hidden_act="gelu")
    config = dict(projection_dim=24, text_config=dict(
        **sizes, vocab_size=len(tokenizer), max_position_embeddings=20, eos_token_id=tokenizer.eos_token_id),
        vision_config=dict(**sizes, image_size=32, patch_size=8))
    shaken(CLIPModel(CLIPConfig(**config))).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_processor(folder)
    return config


class OpenCLIPBlock(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.ln_1, self.ln_2 = torch.nn.LayerNorm(width), torch.nn.LayerNorm(width)
        self.attn = torch.nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = torch.nn.Sequential(OrderedDict(
            c_fc=torch.nn.Linear(width, 48), gelu=torch.nn.GELU(), c_proj=torch.nn.Linear(48, width)))

    def forward(self, x, mask=None):
        y = self.ln_1(x)
        x = x + self.attn(y, y, y, attn_mask=mask)[0]
        return x + self.mlp(self.ln_2(x))


class OpenCLIPTower(torch.nn.Module):
    """OpenCLIP's picture tower (a small one), or with `words` its text tower, under its own names."""

    def __init__(self, words=0, width=32, out=24):
        super().__init__()
        P, N = torch.nn.Parameter, torch.nn.LayerNorm
        self.words, positions = words, 20 if words else 1 + 4 * 4
        self.transformer = torch.nn.Module()
        self.transformer.resblocks = torch.nn.ModuleList(OpenCLIPBlock(width) for _ in range(2))
        self.positional_embedding = P(torch.zeros(positions, width))
        if words:
            self.token_embedding, self.ln_final = torch.nn.Embedding(words, width), N(width)
            self.text_projection, self.logit_scale = P(torch.zeros(width, out)), P(torch.tensor(4.6))
        else:
            self.conv1 = torch.nn.Conv2d(3, width, 8, 8, bias=False)
            self.class_embedding, self.proj = P(torch.randn(width)), P(torch.zeros(width, out))
            self.ln_pre, self.ln_post = N(width), N(width)

    def forward(self, x, end=-1):
        n, mask = len(x), None
        if self.words:
            x = self.token_embedding(x)
            mask = torch.full((x.shape[1], x.shape[1]), -math.inf).triu(1)
        else:
            x = self.conv1(x).flatten(2).transpose(1, 2)
            x = torch.cat([self.class_embedding.expand(n, 1, -1), x], 1)
        x = x + self.positional_embedding[:x.shape[1]]
        x = x if self.words else self.ln_pre(x)
        for block in self.transformer.resblocks:
            x = block(x, mask)
        if self.words:
            return self.ln_final(x)[:, end] @ self.text_projection
        return self.ln_post(x[:, 0]) @ self.proj


def small_openclip(words):
    """(visual tower, text tower, their state dict as OpenCLIP would save it)."""
    torch.manual_seed(0)
    visual, text = shaken(OpenCLIPTower(), 1), shaken(OpenCLIPTower(words), 2)
    state = {**text.state_dict(), **{f"visual.{key}": x for key, x in visual.state_dict().items()}}
    return visual, text, state


BACKWARDS = (  # from the names of `ImageReward.build` to those of the file, by hand
    ("vision.encoder.layers.", "blip.visual_encoder.blocks."), ("self_attn.qkv", "attn.qkv"),
    ("self_attn.projection", "attn.proj"), ("layer_norm", "norm"), ("head.", "mlp.layers."),
    ("vision.post_layernorm", "blip.visual_encoder.norm"), ("text.", "blip.text_encoder."),
    ("vision.embeddings.class_embedding", "blip.visual_encoder.cls_token"),
    ("vision.embeddings.position_embedding", "blip.visual_encoder.pos_embed"),
    ("vision.embeddings.patch_embedding", "blip.visual_encoder.patch_embed.proj"))


def imagereward_file(model):
    """The state dict of an `ImageReward.build` as ImageReward.pt has it, unused tensors included."""
    tensors = {}
    for key, x in model.state_dict().items():
        for ours, theirs in BACKWARDS:
            key = key.replace(ours, theirs) if not key.startswith("text.") or ours == "text." else key
        tensors[key] = x
    return {**tensors, **{key: torch.zeros(2, 2) for key in rewards.IMAGEREWARD_UNUSED}}


BLIP = dict(vision=dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
                        image_size=32, patch_size=8),
            text=dict(hidden_size=32, encoder_hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                      num_attention_heads=2, vocab_size=len(SPECIAL) + 256))
LANGUAGE = dict(vocab_size=len(SPECIAL) + 256, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=2, bos_token_id=None, eos_token_id=2,
                pad_token_id=0)


def small_llava(folder):
    from transformers import LlavaConfig, LlavaForConditionalGeneration
    vision = dict(model_type="clip_vision_model", hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                  num_attention_heads=2, image_size=32, patch_size=8)
    config = LlavaConfig(vision_config=vision, text_config=dict(model_type="llama", **LANGUAGE),
                         image_token_index=SPECIAL.index("<image>"), image_seq_length=16)
    shaken(LlavaForConditionalGeneration(config)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    save_processor(folder)


def small_qwen(folder):
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    ids = {name: SPECIAL.index(f"<|{token}|>") for name, token in (
        ("image_token_id", "image_pad"), ("vision_start_token_id", "vision_start"),
        ("vision_end_token_id", "vision_end"))}
    config = Qwen2_5_VLConfig(text_config=dict(**LANGUAGE, rope_parameters=rope, rope_scaling=rope), **ids,
                              video_token_id=1, vision_config=dict(
                                  depth=2, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4,
                                  out_hidden_size=32, window_size=16, fullatt_block_indexes=[1]))
    shaken(Qwen2_5_VLForConditionalGeneration(config)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    Qwen2VLImageProcessorPil(patch_size=4, min_pixels=64, max_pixels=4096).save_pretrained(folder)


def small_deberta(folder):
    from transformers import DebertaConfig, DebertaModel
    config = DebertaConfig(vocab_size=len(SPECIAL) + 256, hidden_size=32, intermediate_size=48,
                           num_hidden_layers=3, num_attention_heads=2, relative_attention=True,
                           max_position_embeddings=512, pos_att_type=["c2p", "p2c"], type_vocab_size=0)
    shaken(DebertaModel(config)).save_pretrained(folder)
    byte_tokenizer(ends=True).save_pretrained(folder)


def small_mask2former(folder, classes=80):
    from transformers import Mask2FormerConfig, SwinConfig
    backbone = SwinConfig(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
                          out_features=["stage1", "stage2", "stage3", "stage4"])
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_layers=1,
        encoder_feedforward_dim=32, dim_feedforward=32, decoder_layers=2, num_attention_heads=2,
        num_queries=12, id2label={i: str(i) for i in range(classes)})
    model = shaken(rewards.detector_class()(config))
    with torch.no_grad():
        model.class_predictor.weight.mul_(4)  # so that it is sure of some classes
    model.save_pretrained(folder)


def save_small_models(root, patch):
    """{reward: its folder}, with small models of the same classes, and the true constants scaled down."""
    folders = {name: str(root / name) for name in rewards.REWARDS}
    config = small_clip(root / "clipscore")
    small_clip(root / "pickscore")
    small_clip(root / "hpsv2")
    torch.save({"state_dict": small_openclip(config["text_config"]["vocab_size"])[2]},
               root / "hpsv2" / "HPS_v2.1_compressed.pt")
    patch.setattr(rewards.HPSv2, "architecture", config)
    small_clip(root / "aesthetic" / "clip")
    (root / "aesthetic" / "head").mkdir()
    head = {f"layers.{key}": x for key, x in shaken(rewards.linear_head(24)).state_dict().items()}
    torch.save(head, root / "aesthetic" / "head" / "aesthetic-model.pth")
    for part, sizes in BLIP.items():
        patch.setattr(rewards.ImageReward, part, sizes)
    byte_tokenizer(ends=True).save_pretrained(root / "imagereward")
    torch.save(imagereward_file(shaken(rewards.ImageReward.build())), root / "imagereward" / "ImageReward.pt")
    small_llava(root / "vlm" / "llava")
    small_deberta(root / "vlm" / "deberta")
    patch.setattr(rewards.VLM, "layer", 2)
    patch.setattr(rewards.Chat, "new_tokens", 6)
    small_qwen(root / "unifiedreward")
    patch.setattr(rewards.UnifiedReward, "side", 32)
    patch.setattr(rewards.UnifiedReward, "new_tokens", 6)
    small_mask2former(root / "geneval" / "detector")
    small_clip(root / "geneval" / "clip")
    for name, value in dict(shortest=64, longest=96, threshold=0.02).items():
        patch.setattr(rewards.GenEval, name, value)
    return folders


@pytest.fixture(scope="session")
def small_models(tmp_path_factory):
    patch = pytest.MonkeyPatch()
    yield save_small_models(tmp_path_factory.mktemp("models"), patch)
    patch.undo()


MODELS = ("clipscore", "pickscore", "hpsv2", "aesthetic", "imagereward", "vlm", "unifiedreward", "geneval")
ODD = [picture(1), picture(2, (40, 40)), picture(3, (1, 1)), picture(4, (3, 200)),
       picture(5, (33, 90)).convert("L"), picture(6, (50, 20)).convert("RGBA"), picture(flat=True)]
TEXTS = ["a cat and a dog", "", "x", "\u732b\u3068\u72ac \u0627", "two red birds " * 60, "a {brace} %", " "]
ENTRIES = [{"tag": "colors", "include": [{"class": "bench", "count": n, "color": color}]}  # what it sees most
           for n, color in zip((12, 9, 4, 10, 3, 2, 5), rewards.COLORS)]


@pytest.fixture
def stub_marks(monkeypatch):
    """A mark for any reply: small models write no `Final Score:`."""
    monkeypatch.setattr(rewards, "final_score", lambda reply: 1 + zlib.crc32(reply.encode()) % 4001 / 1000)


@parametrize("name", MODELS)
def test_models_score_images_of_any_size_and_any_text(small_models, stub_marks, name):
    """From images to scores. Neither the batch nor the neighbours change one, and each image is judged by its
    own prompt: alone with it the score is the same, with another's it is another."""
    one, all_at_once = (rewards.load(f"{name}@{small_models[name]}", "cpu", batch) for batch in (2, 7))
    scores = all_at_once(ODD, TEXTS, ENTRIES)
    assert scores.shape == (7,) and scores.isfinite().all() and scores.unique().numel() > 1
    assert_close(one(ODD, TEXTS, ENTRIES), scores, rtol=1e-3, atol=1e-4)
    assert_close(all_at_once(ODD[3:4], TEXTS[3:4], ENTRIES[3:4]), scores[3:4], rtol=1e-3, atol=1e-4)
    order = [3, 0, 6, 1, 5, 2, 4]
    mixed = all_at_once(*([items[i] for i in order] for items in (ODD, TEXTS, ENTRIES)))
    assert_close(mixed, scores[order], rtol=1e-3, atol=1e-4)
    crossed = all_at_once(ODD, TEXTS[1:] + TEXTS[:1], ENTRIES[1:] + ENTRIES[:1])
    assert (name == "aesthetic") == torch.allclose(crossed, scores, rtol=1e-3, atol=1e-4)


def test_pickscore_is_its_cosine_times_its_temperature(small_models):
    plain, pick = (rewards.load(f"{name}@{small_models['pickscore']}", CPU)
                   for name in ("clipscore", "pickscore"))
    scores = plain(ODD[:3], TEXTS[:3], ENTRIES[:3])
    assert_close(pick(ODD[:3], TEXTS[:3], ENTRIES[:3]), scores * plain.clip.model.logit_scale.exp().item())
    assert scores.abs().max() <= 1


def test_hpsv2_computes_what_openclip_does(small_models):
    """Query, key and value apart, projections turned: the features of torch's own attention, to rounding."""
    reward = rewards.load(f"hpsv2@{small_models['hpsv2']}", CPU)
    visual, text, _ = small_openclip(reward.clip.model.config.text_config.vocab_size)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    ids = reward.clip.tokenizer(["a cat"], return_tensors="pt").input_ids  # the last one ends the text
    with torch.no_grad():
        assert_close(reward.clip.model.get_image_features(x).pooler_output, visual(x), rtol=1e-3, atol=1e-4)
        assert_close(reward.clip.model.get_text_features(ids).pooler_output, text(ids), rtol=1e-3, atol=1e-4)


def test_hpsv2_keeps_the_whole_picture(small_models):
    """Black bars instead of a cut: the ends of a long picture matter to it, to CLIP they do not."""
    long, changed = picture(1, (40, 160)), picture(1, (40, 160))
    changed.paste((255, 0, 0), (0, 0, 40, 30))
    for name, matters in (("hpsv2", True), ("clipscore", False)):
        a, b = rewards.load(f"{name}@{small_models[name]}", CPU)([long, changed], ["a", "a"], [{}, {}])
        assert (abs(a - b) > 1e-4) == matters


def openclip_shapes():
    """Names and shapes of OpenCLIP's ViT-H-14, written down from its definition."""
    shapes = {"positional_embedding": (77, 1024), "text_projection": (1024, 1024), "logit_scale": (),
              "token_embedding.weight": (49408, 1024), "visual.class_embedding": (1280,),
              "visual.positional_embedding": (257, 1280), "visual.proj": (1280, 1024),
              "visual.conv1.weight": (1280, 3, 14, 14)}
    norms = [("ln_final", 1024), ("visual.ln_pre", 1280), ("visual.ln_post", 1280)]
    for tower, width, depth in (("", 1024, 24), ("visual.", 1280, 32)):
        for i in range(depth):
            block = f"{tower}transformer.resblocks.{i}"
            norms += [(f"{block}.ln_1", width), (f"{block}.ln_2", width)]
            shapes[f"{block}.attn.in_proj_weight"] = (3 * width, width)
            shapes[f"{block}.attn.in_proj_bias"] = (3 * width,)
            for name, rows, columns in (("attn.out_proj", width, width), ("mlp.c_fc", 4 * width, width),
                                        ("mlp.c_proj", width, 4 * width)):
                shapes[f"{block}.{name}.weight"], shapes[f"{block}.{name}.bias"] = (rows, columns), (rows,)
    return shapes | {f"{name}.{part}": (width,) for name, width in norms for part in ("weight", "bias")}


TRUE = {reward: {key: getattr(reward, key) for key in keys} for reward, keys in (  # not yet scaled down
    (rewards.HPSv2, ["architecture"]), (rewards.ImageReward, ["vision", "text"]))}


def test_key_maps_are_bijections_on_the_true_architectures(monkeypatch):
    """Nothing left over on either side, every shape in place, on the meta device."""
    from transformers import CLIPConfig, CLIPModel
    for reward, constants in TRUE.items():
        for name, value in constants.items():
            monkeypatch.setattr(reward, name, value)
    with torch.device("meta"):
        clip, blip = CLIPModel(CLIPConfig(**rewards.HPSv2.architecture)), rewards.ImageReward.build()
        openclip = {key: torch.empty(shape) for key, shape in openclip_shapes().items()}
    assert sum(x.numel() for x in openclip.values()) == 986_109_441  # OpenCLIP's own count
    rewards.load_strictly(clip, rewards.from_openclip(openclip))
    theirs = imagereward_file(blip)
    rewards.load_strictly(blip, rewards.from_imagereward(theirs))
    assert len(theirs) == len(blip.state_dict()) + 5 and "blip.visual_encoder.blocks.23.norm2.bias" in theirs
    assert theirs["blip.text_encoder.encoder.layer.11.crossattention.self.key.weight"].shape == (768, 1024)


@parametrize("change, message", [
    (lambda state: state.pop("ln_final.bias"), r"it lacks 1, as \['text_model.final_layer_norm.bias'\]"),
    (lambda state: state.update(extra=torch.zeros(1)), r"1 of its tensors have no place .*\['extra'\]"),
    (lambda state: state.update(logit_scale=torch.zeros(3)), r"logit_scale has shape \(3,\), the model \(\)"),
    (lambda state: state.update({"text_projection.weight": torch.zeros(1)}), "two tensors are named")])
def test_a_checkpoint_that_does_not_fit_is_an_error(small_models, tmp_path, change, message):
    state = small_openclip(rewards.HPSv2.architecture["text_config"]["vocab_size"])[2]
    change(state)
    torch.save({"state_dict": state}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(OSError, match=rf"reward hpsv2: cannot load .*HPS_v2.1_compressed.pt \(.*{message}"):
        rewards.load(f"hpsv2@{tmp_path}", CPU)


@parametrize("name", MODELS)
def test_weights_that_are_not_there_are_an_error_of_one_line(tmp_path, name):
    with pytest.raises(OSError, match=f"^reward {name}: cannot load .*downloads its weights") as error:
        rewards.load(f"{name}@{tmp_path}", CPU)
    assert "\n" not in str(error.value)


class Mischief:
    def __reduce__(self):
        return os.mkdir, ("mischief",)


def test_no_weights_can_run_code(small_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    byte_tokenizer(ends=True).save_pretrained(tmp_path)
    torch.save({"mlp.layers.0.weight": Mischief()}, tmp_path / "ImageReward.pt")
    with pytest.raises(OSError, match="cannot load .*ImageReward.pt .*Weights only"):
        rewards.load(f"imagereward@{tmp_path}", CPU)
    assert not Path("mischief").exists()


def test_imagereward_reads_35_tokens_and_no_padding(small_models):
    """Text beyond the 35th token changes nothing, before it it does; padding is masked; the score is
    standardised."""
    reward = rewards.load(f"imagereward@{small_models['imagereward']}", CPU)
    text = "abcdefghijklmnopqrstuvwxyz0123456"  # 33 bytes between [CLS] and [SEP]
    images = [ODD[0]] * 3
    a, b, c = reward(images, [text, text + "more", text[1:]], [{}] * 3)
    assert a == b != c
    reward.length = 60
    assert_close(reward(images, [text] * 3, [{}] * 3)[0], a, rtol=1e-4, atol=1e-5)
    reward.mean, reward.std = 0.0, 1.0
    raw = reward(images, [text] * 3, [{}] * 3)[0]
    assert_close((raw - 0.16717) / 1.0333, a, rtol=1e-3, atol=1e-3)


def test_clips_pixels_are_the_originals(small_models):
    """Shortest side resized, centre cut out, OpenAI's statistics; trimming a long picture changes nothing."""
    from transformers import CLIPImageProcessorPil
    processor, image = CLIPImageProcessorPil(), picture(0, (300, 240))
    by_hand = image.resize((280, 224), Image.BICUBIC).crop((28, 0, 252, 224))
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    assert_close(rewards.clip_pixels(processor, [image])[0], (rewards.to_pixels(by_hand) / 255 - mean) / std)
    long = picture(0, (12, 144))
    whole = processor([long], return_tensors="pt").pixel_values
    assert_close(rewards.clip_pixels(processor, [long]), whole, rtol=0, atol=0.02)


@parametrize("candidate, reference, recall", [
    ([[1, 0], [0, 1]], [[1, 0], [0, 1]], 1.0), ([[1, 0]], [[1, 0], [0, 1]], 0.5),
    ([[1, 0], [0, 1]], [[1, 0]], 1.0), ([[5, 0]], [[0.6, 0.8]], 0.6),
    ([[0, 1], [3, 4]], [[1, 0], [0, -2]], (0.6 - 0.8) / 2), ([], [[1, 0]], 0.0), ([[1, 0]], [], 0.0)])
def test_bertscore_recall_by_hand(candidate, reference, recall):
    """Each token of the reference finds its nearest in the candidate: what that says besides is free."""
    candidate, reference = (torch.tensor(x, dtype=torch.float32).view(-1, 2) for x in (candidate, reference))
    assert rewards.bertscore_recall(candidate, reference) == pytest.approx(recall)


def test_the_description_is_the_candidate(small_models, monkeypatch):
    """An exact description recalls all of the prompt, and so does one that says more."""
    reward, asked = rewards.load(f"vlm@{small_models['vlm']}", CPU), []

    def answer(images, questions):
        asked.extend(questions)
        return ["The image contains a cat", "", "The image contains a cat"]

    monkeypatch.setattr(reward, "ask", answer)
    scores = reward(ODD[:3], ["a cat", "a cat", "a cat, a dog and eleven birds"], [{}] * 3)
    assert scores[0] == pytest.approx(1, abs=1e-5) and scores[1] == 0 and scores[2] < 0.999
    assert set(asked) == {"Answer concisely: what is going on in this image?"}
    assert len(reward.token_vectors(["ab", ""])[0]) == 2 and len(reward.token_vectors(["ab", ""])[1]) == 0


def test_bertscore_is_of_the_right_layer(small_models):
    """The vectors are those after `layer` layers of the whole model."""
    from transformers import DebertaModel
    reward = rewards.load(f"vlm@{small_models['vlm']}", CPU)
    whole = DebertaModel.from_pretrained(Path(small_models["vlm"]) / "deberta").eval()
    tokens = reward.words("a cat", return_tensors="pt")
    with torch.no_grad():
        expected = whole(**tokens, output_hidden_states=True).hidden_states[2][0, 1:-1]
        assert_close(reward.token_vectors(["a cat"])[0], expected, rtol=1e-4, atol=1e-5)


def test_a_chat_is_shown_the_picture_and_the_question(small_models):
    """An image token for each vector of the picture, and the question of the paper around the prompt."""
    for name, count in (("vlm", 16), ("unifiedreward", 16)):
        reward, told = rewards.load(f"{name}@{small_models[name]}", CPU), []
        generate = reward.model.generate
        reward.model.generate = lambda **inputs: told.append(inputs) or generate(**inputs)
        reward.ask(ODD[:2], ["what?", "a longer question"])
        ids = told[0]["input_ids"]
        token = reward.tokenizer.convert_tokens_to_ids(reward.image_token)
        assert (ids == token).sum(1).tolist() == [count, count] and told[0]["do_sample"] is False
        assert "a longer question" in reward.tokenizer.decode(ids[1]) and ids[0, 0] == 0 != ids[1, 0]
    assert "Text Caption: [a cat]" in rewards.UnifiedReward.question.format(prompt="a cat")


@parametrize("reply, mark", [
    ("Final Score: 4", 4), ("Final Score: **3.75**", 3.75), ("cat: 1\nFinal Score:\n2.5.", 2.5),
    ("Final Score: 2 no, Final Score: 5", 5)])
def test_the_mark_is_after_final_score(reply, mark):
    assert rewards.final_score(reply) == mark


@parametrize("reply", ["", "4", "Final Score: good", "Final Score: 0", "Final Score: 6", "Final Score: 77"])
def test_a_reply_without_a_mark_is_an_error_that_quotes_it(reply):
    with pytest.raises(ValueError, match=re.escape(repr(reply))):
        rewards.final_score(reply)


def test_a_chat_without_a_mark_stops_the_run(small_models):
    reward = rewards.load(f"unifiedreward@{small_models['unifiedreward']}", CPU)
    with pytest.raises(RuntimeError, match="unifiedreward failed: ValueError: no mark .* in the reply"):
        reward(ODD[:1], ["a"], [{}])


# ---------------------------------------------------------------------------------------------------- GenEval

def seen(*objects):
    """{class: [Found]} from (class, score, box[, color]), in order of score."""
    found = {}
    for name, score, box, *color in sorted(objects, key=lambda x: -x[1]):
        found.setdefault(name, []).append(rewards.Found(score, box, None, *color))
    return found


CAT, LEFT, RIGHT, LOW = (("cat", 0.9, box) for box in ((40, 40, 60, 60), (0, 40, 20, 60), (80, 40, 99, 60),
                                                       (40, 80, 60, 99)))


def want(name, count=1, **more):
    return {"class": name, "count": count, **more}


THREE_CATS = {"tag": "counting", "include": [want("cat", 3)], "exclude": [want("cat", 4)]}
RED_CAT = {"tag": "colors", "include": [want("cat", color="red")]}
BOTH = {"tag": "two_object", "include": [want("cat"), want("dog")]}
PLACED = {"tag": "position", "include": [want("dog"), want("cat", position=["left of", 0])]}
PAIR = {"tag": "color_attr", "include": [want("cat", color="red"), want("dog", color="blue")]}
DOG = ("dog", 0.8, (80, 40, 99, 60))


@parametrize("objects, entry, strict, credit", [
    ([], {"tag": "single_object", "include": [want("cat")]}, False, 0), ([CAT], BOTH, False, 1 / 2),
    ([CAT, DOG], BOTH, True, 1), ([CAT, LEFT, DOG], BOTH, True, 1 / 2),  # strict does not mind too many
    ([CAT] * 4, {"tag": "single_object", "include": [want("cat")]}, True, -2),
    ([CAT, LEFT], THREE_CATS, False, 2 / 3), ([CAT, LEFT, LOW], THREE_CATS, True, 1),
    ([CAT, LEFT, LOW, RIGHT], THREE_CATS, False, 2 / 3), ([], THREE_CATS, False, 0),
    ([(*CAT, "red")], RED_CAT, True, 1), ([(*CAT, "blue")], RED_CAT, False, 1 / 2), ([], RED_CAT, False, 0),
    ([(*CAT, "red"), ("cat", 0.5, (0, 0, 9, 9), "blue")], RED_CAT, True, 0),  # the surest one is judged
    ([(*CAT, "blue"), ("cat", 0.5, (0, 0, 9, 9), "red")], RED_CAT, False, 0),
    ([(*CAT, "red"), (*DOG, "blue")], PAIR, True, 1), ([(*CAT, "blue"), (*DOG, "red")], PAIR, False, 1 / 2),
    ([CAT, DOG], PLACED, True, 1), ([RIGHT, ("dog", 0.8, (0, 40, 20, 60))], PLACED, False, 2 / 3),
    ([CAT], PLACED, False, 1 / 3), ([DOG], PLACED, False, 1 / 3), ([], PLACED, False, 0),
    ([CAT, ("dog", 0.8, (41, 40, 61, 60))], PLACED, False, 2 / 3),  # in the dead zone
    ([CAT, RIGHT, DOG], PLACED, True, 1 / 3),
    ([CAT, DOG, ("dog", 0.9, (0, 40, 20, 60))], PLACED, False, 1 / 3)])
def test_genevals_verdicts_on_hand_made_detections(objects, entry, strict, credit):
    """Strict, as the benchmark has it, and in part, for training."""
    assert rewards.as_asked(seen(*objects), entry) is strict
    assert rewards.partial_credit(seen(*objects), entry) == pytest.approx(credit)


@parametrize("box, expected", [
    ((0, 40, 20, 60), {"left of"}), ((80, 40, 100, 60), {"right of"}), ((40, 0, 60, 20), {"above"}),
    ((40, 80, 60, 100), {"below"}), ((0, 0, 20, 20), {"left of", "above"}),
    ((80, 80, 100, 100), {"right of", "below"}),
    ((40, 40, 60, 60), set()), ((44, 40, 64, 60), set()), ((43, 37, 63, 57), set()),  # within 4 pixels
    ((50, 40, 70, 60), {"right of"}), ((47, 40, 67, 60), set()),  # 6 of 10 are left, but 3 of 7
    ((80, 52, 100, 72), {"right of"}), ((30, 100, 50, 120), {"below"})])
def test_genevals_positions(box, expected):
    """Of a box to (40, 40, 60, 60): by centres, with a dead zone of a tenth of both sides."""
    assert rewards.relations(box, (40, 40, 60, 60)) == expected


def test_the_surest_objects_count():
    """Above 0.3, where they are counted above 0.9, the 16 best of a class."""
    many = seen(*[("cat", 0.4 + i / 100, (0, 0, i + 1, 9)) for i in range(20)], ("dog", 0.3, (0, 0, 9, 9)),
                ("bus", 0.95, (0, 0, 9, 9)), ("bus", 0.9, (0, 0, 9, 9)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards.GenEval, "threshold", 0.3)
        assert {name: len(own) for name, own in rewards.kept(many, "colors").items()} == {"cat": 16, "bus": 2}
        assert rewards.kept(many, "colors")["cat"][0].box[2] == 20  # best first
        assert {name: len(own) for name, own in rewards.kept(many, "counting").items()} == {"bus": 1}


def test_instances_from_hand_made_logits():
    """The score is class probability x mean mask probability, the box the mask's; best first."""
    classes, masks = torch.full((4, 81), -9.0), torch.full((4, 8, 16), -9.0)
    classes[0, 15] = classes[1, 15] = classes[3, 80] = 9.0  # two cats, and a query for nothing
    classes[2, 16] = -8.0  # a dog, hardly
    masks[0, 2:4, 3:7], masks[1, 5:8, 10:16] = 1.0, 9.0
    found = rewards.instances(classes, masks, (8, 16), 0.3)
    assert list(found) == ["cat"] and [x.box for x in found["cat"]] == [(10, 5, 16, 8), (3, 2, 7, 4)]
    assert found["cat"][1].score == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-3)
    assert found["cat"][0].mask.sum() == 18 and found["cat"][0].mask.shape == (8, 16)
    assert rewards.instances(classes, masks, (8, 16), 0.9999) == {}
    assert rewards.instances(classes, torch.full_like(masks, -9.0), (8, 16), 0.3) == {}  # empty masks
    twice = rewards.instances(classes, masks, (16, 32), 0.3)["cat"][0].box
    assert all(abs(a - 2 * b) <= 1 for a, b in zip(twice, (10, 5, 16, 8)))  # in pixels of the picture
    classes[0, 16] = 9.0  # a query that may be both
    assert set(rewards.instances(classes, masks, (8, 16), 0.3)) == {"cat", "dog"}


def test_colors_are_named_from_the_object_on_grey(small_models):
    """The crop is the object's box with all around it in #999; each object gets the color nearest to it."""
    image, mask = Image.new("RGB", (8, 8), (255, 0, 0)), torch.zeros(8, 8, dtype=torch.bool)
    mask[2:6, 3:5] = True
    crop = rewards.cut_out(image, rewards.Found(1.0, (2, 2, 6, 6), mask))
    assert crop.size == (4, 4) and crop.getpixel((1, 0)) == (255, 0, 0)
    assert crop.getpixel((0, 0)) == (153, 153, 153)
    reward = rewards.load(f"geneval@{small_models['geneval']}", CPU)

    class Fake:
        def texts(self, texts):
            named = [[color for color in rewards.COLORS if f" {color}" in text] for text in texts]
            return torch.eye(10)[[rewards.COLORS.index(color) for color, in named]]

        def images(self, images):
            return torch.eye(10)[[0 if image.getpixel((1, 0)) == (255, 0, 0) else 4 for image in images]]

    reward.clip = Fake()
    objects = [{"cat": [rewards.Found(1.0, (2, 2, 6, 6), mask), rewards.Found(0.9, (2, 2, 6, 6), mask)]},
               {"cat": [rewards.Found(1.0, (2, 2, 6, 6), mask)]}, {}]
    reward.name_colors([image, Image.new("RGB", (8, 8), (0, 0, 255)), image], objects, [RED_CAT] * 3)
    assert [[x.color for x in found.get("cat", [])] for found in objects] == [["red", "red"], ["blue"], []]


def test_genevals_table(small_models, monkeypatch):
    """The share of strict verdicts of each task, and the mean over tasks, not over pictures."""
    reward = rewards.load(f"geneval@{small_models['geneval']}", CPU)
    monkeypatch.setattr(reward, "detect", lambda images: [seen(CAT, LEFT, LOW), seen(CAT), seen(CAT, DOG)])
    scores = reward(ODD[:3], TEXTS[:3], [THREE_CATS, THREE_CATS, BOTH])
    assert scores.tolist() == pytest.approx([0, 0, 1])  # none of the cats is sure enough to be counted: 0.9
    assert reward.details == {"counting": 0, "two_object": 1, "overall": 0.5}
    both = rewards.WeightedSum([(1, reward), (1, rewards.load("compressibility", CPU))])
    assert rewards.tables(both) == {"geneval": reward.details}


def test_an_empty_detection_is_scored(small_models, monkeypatch):
    monkeypatch.setattr(rewards.GenEval, "threshold", 1.0)
    reward = rewards.load(f"geneval@{small_models['geneval']}", CPU)
    assert reward.detect(ODD) == [{}] * 7
    assert reward(ODD[:1], ["a red cat"], [RED_CAT]).tolist() == [0]


def test_a_detector_of_other_classes_is_an_error(small_models, tmp_path):
    small_mask2former(tmp_path / "detector", classes=5)
    with pytest.raises(OSError, match="cannot load .*detector .it detects 5 classes, not COCO's 80"):
        rewards.load(f"geneval@{tmp_path}", CPU)


@parametrize("entry, message", [
    ({}, "its tag is None"), ({"tag": "colour"}, "its tag is 'colour', not single_object, .* or color_attr"),
    ({"tag": "colors"}, "its include is no list"), ({"tag": "colors", "include": []}, "its include is no"),
    ({"tag": "colors", "include": [want("unicorn")]}, "names no class of COCO's 80"),
    ({"tag": "colors", "include": [{"class": "cat"}]}, "has no count"),
    ({"tag": "colors", "include": [want("cat", 0)]}, "has no count"),
    ({"tag": "colors", "include": [want("cat", color="mauve")]}, "'mauve' is none of its colors, red, "),
    ({"tag": "position", "include": [want("cat", position=["left of", 0])]}, "no position relative to"),
    ({"tag": "position", "include": [want("dog"), want("cat", position=["near", 0])]}, "no position"),
    ({"tag": "counting", "include": [want("cat")], "exclude": [want("cats", 2)]}, "names no class")])
def test_a_prompt_without_genevals_metadata_is_refused(small_models, entry, message):
    reward = rewards.load(f"geneval@{small_models['geneval']}", CPU)
    with pytest.raises(ValueError, match=rf"a.jsonl, line 3: the reward geneval needs .*'a cat'.*{message}"):
        reward.check(["a cat"], [{**entry, "where": "a.jsonl, line 3"}])
    with pytest.raises(RuntimeError, match="reward geneval failed: ValueError: prompt 1: "):
        reward(ODD[:1], ["a cat"], [entry])


def test_genevals_prompts_reach_every_task_and_class():
    """Training and evaluation are disjoint, whatever the order of the objects; the metadata says what the
    words do; all of it can be scored."""
    train = list(itertools.islice(rewards.prompts("geneval", "train", 0), 3000))
    held_out = rewards.prompts("geneval", "eval", 0)
    for pairs in (train, held_out):
        entries = [entry for _, entry in pairs]
        assert {entry["tag"] for entry in entries} == set(rewards.TASKS)
        assert {want["class"] for entry in entries for want in entry["include"]} == set(rewards.CLASSES)
        colors = {want.get("color") for entry in entries for want in entry["include"]}
        assert colors == {None, *rewards.COLORS}
        assert not any(rewards.malformed(entry) for entry in entries)
    seen, unseen = ({frozenset(p.removeprefix("a photo of ").split(" and ")) for p, _ in pairs}
                    for pairs in (train, held_out))
    assert seen.isdisjoint(unseen) and len(held_out) == rewards.EVAL_SIZE
    assert {m["tag"] for _, m in train[:6]} == set(rewards.TASKS) and len(dict(held_out)) == len(held_out)
    first = dict(train)
    assert not any("person" in p for p, m in train if "color" in m["tag"])
    for prompt, entry in first.items():
        if entry["tag"] == "counting":
            one, more = entry["include"][0], entry["exclude"][0]
            assert more == {"class": one["class"], "count": one["count"] + 1}
            assert rewards.NUMBERS[one["count"]] in prompt and 2 <= one["count"] <= 4
        if entry["tag"] == "position":
            target, placed = entry["include"]
            assert re.search(rf"{placed['class']} {placed['position'][0]} .*{target['class']}$", prompt)


@parametrize("args, words", [
    (("cat",), "a cat"), (("apple",), "an apple"), (("umbrella", 1, "red"), "a red umbrella"),
    (("skis",), "a pair of skis"), (("skis", 2), "two pairs of skis"), (("cup", 1, "orange"),
                                                                         "an orange cup"),
    (("scissors", 1, "red"), "a pair of red scissors"), (("broccoli", 3), "three heads of broccoli"),
    (("knife", 3), "three knives"), (("person", 4), "four people"), (("bus", 2), "two buses"),
    (("wine glass", 2), "two wine glasses"), (("bench", 2), "two benches"), (("sheep", 2), "two sheep"),
    (("toothbrush", 2), "two toothbrushes"), (("computer mouse", 2), "two computer mice")])
def test_articles_and_plurals(args, words):
    assert rewards.phrase(*args) == words


FLOW_GRPO = [
    {"tag": "position", "include": [{"class": "bench", "count": 1},
                                    {"class": "cow", "count": 1, "position": ["left of", 0]}],
     "prompt": "a photo of a cow left of a bench"},
    {"tag": "counting", "include": [{"class": "clock", "count": 2}],
     "exclude": [{"class": "clock", "count": 3}], "prompt": "a photo of two clocks"}]


def test_public_prompt_files_load_as_they_are(small_models, tmp_path):
    path = tmp_path / "train_metadata.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in FLOW_GRPO))
    pairs = rewards.read_prompt_file(path)
    assert [{**{k: v for k, v in m.items() if k != "where"}, "prompt": p} for p, m in pairs] == FLOW_GRPO
    rewards.check(rewards.load(f"geneval@{small_models['geneval']}", CPU), str(path))
    with pytest.raises(ValueError, match="a.txt, line 1: the reward geneval needs .*--prompts geneval"):
        (tmp_path / "a.txt").write_text("a cat\n")
        rewards.check(rewards.load(f"geneval@{small_models['geneval']}", CPU), str(tmp_path / "a.txt"))


@parametrize("spec, source", [
    ("ocr", "ocr"), ("ocr@x:2,vlm", "ocr"), ("compressibility,ocr", "ocr"), ("geneval", "geneval"),
    ("pickscore", "geneval"), ("aesthetic", "animals"), ("compressibility", "animals"), ("vlm", "activities"),
    ("pickscore,geneval", "geneval"), ("unifiedreward", "geneval")])
def test_a_reward_has_prompts_that_suit_it(spec, source):
    assert rewards.default_prompts(spec) == source


def test_ranges_and_names():
    for name, reward in rewards.REWARDS.items():
        lo, hi = reward.range
        assert reward.name == name and lo < hi and reward.prompts in rewards.PROMPTS


# Command line

CRD = dict(model="stabilityai/stable-diffusion-3.5-medium", height=512, width=512, rank=32, alpha=64, beta=1,
           max_sequence_length=128, groups=48, group_size=24, rollout_steps=10, tie_sampler=False,
           tau=math.inf, advantage_clip=5, adaptive=True, reward_weight=1, anchor=0.1, anchor_guidance=4.5,
           lr=3e-4, train_timesteps=None, anchor_adapt="reward", weight_decay=1e-4, max_grad_norm=1,
           eval_steps=40)
OCR = CRD | dict(preset="ocr", reward="ocr", steps_per_epoch=2, old_decay=(0, 0.25, 0.005, 0.999),
                 sampler_decay=(75, 0, 0.0075, 0.999))
GENEVAL = CRD | dict(preset="geneval", reward="geneval", steps_per_epoch=1, old_decay=(0, 0.25, 0.001, 0.5),
                     sampler_decay=(0, 0, 0.001, 0.5))
DDPO = dict(model="CompVis/stable-diffusion-v1-4", reward="compressibility", prompts="animals", images=256,
            algorithm="is", clip=1e-4, advantage_clip=5, stat_buffer=32, stat_min=16, temperature=0.2,
            keep=0.1, eta=1, noise_level=0.7, lr=3e-4, weight_decay=1e-4, max_grad_norm=1)


@parametrize("script, flags, expected", [
    (crd, "", OCR), (crd, "--reward ocr@somewhere", {**OCR, "reward": "ocr@somewhere"}),
    (crd, "--reward geneval", GENEVAL), (crd, "--preset geneval", GENEVAL),
    (crd, "--reward compressibility", {**GENEVAL, "reward": "compressibility"}),
    (crd, "--preset tiny --lr 0.5 --old-decay 1 0.5 0.25 0.75 --no-adaptive --name x", PRESETS["tiny"] | dict(
        lr=0.5, old_decay=[1, 0.5, 0.25, 0.75], adaptive=False, name="x")),
    (ddpo, "", DDPO), (ddpo, "--reward aesthetic", dict(preset="aesthetic", prompts="animals")),
    (ddpo, "--reward vlm", dict(preset="alignment", prompts="activities")),
    (ddpo, "--preset alignment", dict(reward="vlm", prompts="activities")),
    (ddpo, "--reward ocr", dict(reward="ocr", prompts=None, preset=None, name="ddpo-ocr-is-seed0")),
    (ddpo, "--preset compressibility --reward ocr", dict(reward="ocr", prompts="animals")),
    (ddpo, "--preset tiny --images 48", dict(images=48, prompts="signs", guidance=1))])
def test_presets_are_the_papers(script, flags, expected):
    """Without --preset the reward decides. A preset is only defaults: every flag overrides it."""
    args = asdict(script.parse(flags.split()))
    assert {key: args[key] for key in expected} == expected


@in_both
def test_the_reward_is_in_the_name(script):
    """Two rewards are two runs; the order of a sum's parts does not choose another preset."""
    specs = "pickscore", "clipscore", "clipscore:2", "ocr:1,compressibility:2", "compressibility:2,ocr:1"
    runs = [script.parse(["--reward", spec, *more]) for more in ([], ["--preset", "tiny"]) for spec in specs]
    assert len({args.name for args in runs}) == len(runs)
    assert runs[3].preset == runs[4].preset == ("ocr" if script is crd else None)


def test_more_images_than_prompts_draw_them_again():
    """Four animals are held out: of ten images, two or three each."""
    prompts = rewards.load_task(short(crd, prompts="animals", eval_images=10), CPU)[3]
    assert len(set(prompts)) == 4 and prompts[:4] == prompts[4:8] and len(prompts) == 10


@in_both
def test_help_explains_every_setting(script, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1000")
    with pytest.raises(SystemExit):
        script.parse(["--help"])
    text = capsys.readouterr().out
    for field in fields(script.Settings):
        flag, default = field.name.replace("_", "-"), "" if field.default is None else f" [{field.default}]"
        sentence = re.escape(field.type.__metadata__[0] + default)
        assert re.search(rf"--{flag}\b[^\n]*\s+{sentence}\n", text), flag


@pytest.fixture
def leave(monkeypatch, capsys):
    """leave(script, *flags): what `python script.py *flags` says on leaving, in one line."""
    def leave(script, *flags):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
        with pytest.raises(SystemExit) as stopped:
            script.main()
        code, usage = stopped.value.code, capsys.readouterr().err.strip()
        message = code if isinstance(code, str) else usage.rpartition("\n")[2]
        assert message.strip() and "\n" not in message.strip()
        return message

    return leave


MISTAKES = [*((script, *mistake) for script in (crd, ddpo) for mistake in (
    *((f"--resume runs/{script.__name__} --{flag} 3", f"cannot resume .*{script.__name__}.* {flag}")
      for flag in ("preset", "model", "rank", "alpha", "lora")), ("--dtype fp8", "--dtype"),
    (f"--resume runs/{'crd' if script is ddpo else 'ddpo'}", f"no run of {script.__name__}.py"),
    ("--resume nowhere", "cannot resume nowhere: it has no last/state.pt"), ("--lora nowhere", "nowhere"),
    ("", "stable-diffusion-.* --preset tiny"), ("--model no/model", "no/model.*--preset tiny"),
    ("--preset huge", "--preset huge: .* choose from .*, tiny"), ("--reward beauty", "unknown reward"),
    ("--reward ocr@nowhere", "cannot load nowhere/ocr-det"), ("--eval-rewards beauty", "unknown reward"),
    ("--eval-rewards pickscore@nowhere", r"pickscore: cannot load nowhere \(no such folder"),
    ("--prompts none.txt", "cannot read the prompts in none.txt"),
    ("--eval-prompts none.txt", "cannot read the prompts in none.txt"),
    (f"--prompts animals --reward ocr@{TINY}", "generator animals: the reward ocr needs"),
    (f"--prompts animals --eval-rewards ocr@{TINY}", "animals: the reward ocr needs"),
    (f"--eval-prompts draw.txt --reward ocr@{TINY}", "draw.txt, line 1: the reward ocr needs the text"))),
    (crd, "--groups 3 --steps-per-epoch 2", "--steps-per-epoch"), (crd, "--anchor-adapt often", "--anchor"),
    (crd, "--rollout-steps 2 --train-timesteps 3", "--train-timesteps"), (crd, "--group-size 1", "alone"),
    (crd, "--reward-weight 0 --anchor 0", "nothing to learn"), (ddpo, "--algorithm ppo", "--algo.*ppo.*rwr"),
    (ddpo, "--model .", "a FluxPipeline, none of StableDiffusionPipeline"), (ddpo, "--keep 1.5", "at most 1"),
    (ddpo, "--algorithm sf --updates 2", "--algorithm is takes several"),
    (ddpo, "--images 10", "--images 10 .*--updates 4"), (ddpo, "--images 12", "--images .*--group-size 8"),
    (ddpo, "--stat-min 40", "--stat-min.* --stat-buffer"), (ddpo, "--random-steps 11", "--random-steps 11"),
    (ddpo, "--train-timesteps 11", "--train-timesteps 11.* 3 random")]


@parametrize("script, flags, message", MISTAKES)
def test_a_users_mistake_ends_in_one_line(leave, monkeypatch, tmp_path, script, flags, message):
    """It says what was wrong and what to do, before the first image."""
    monkeypatch.chdir(tmp_path)
    for other in (crd, ddpo):
        Path(folder := f"runs/{other.__name__}", "last").mkdir(parents=True)
        Path(folder, "last/state.pt").touch()
        Path(folder, "args.json").write_text(json.dumps(asdict(other.Settings())))
    Path("draw.txt").write_text("a red cube\n")
    Path("model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(script, "generate", lambda *args, **kwargs: pytest.fail("an image was sampled"))
    toy = ["--preset", "tiny", "--reward", "compressibility"] * bool(flags and "--resume" not in flags)
    assert re.search(message, leave(script, *toy, *flags.split()))


@in_both
@parametrize("method", ["load_config", "from_pretrained"])
def test_weights_out_of_reach_end_in_one_line(leave, monkeypatch, tmp_path, script, method):
    """Stable Diffusion needs a licence and a connection; the bundled model neither. With `python -X dev` the
    traceback is left."""
    def refuse(*args, **kwargs):
        raise OSError("403 Client Error: gated\nand many more lines")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(diffusers.DiffusionPipeline, method, refuse)
    message = leave(script, "--preset", "tiny", "--model", TINY, "--reward", "compressibility")
    assert "--preset tiny" in message and str(TINY) in message and "gated" in message
    monkeypatch.setattr(sys, "flags", SimpleNamespace(dev_mode=True))
    with pytest.raises(OSError, match="gated"):
        script.main()


# Runs

SHORT = {
    crd: {**PRESETS["tiny"], **dict(
        preset="tiny", reward="incompressibility", dtype="fp32", rank=2, groups=2, group_size=2,
        steps_per_epoch=1, rollout_steps=2, train_timesteps=1, eval_images=2, eval_steps=2, eval_every=2)},
    ddpo: {**ddpo.PRESETS["tiny"], **dict(
        preset="tiny", reward="incompressibility", dtype="fp32", rank=2, alpha=4, images=4, group_size=2,
        steps=4, random_steps=None, guidance=2.0, micro_batch=3, stat_min=2, eval_images=2, eval_every=2)}}


def short(script, **settings):
    return script.Settings(**{**SHORT[script], "name": "x", **settings})


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(script, name, epochs, **settings): a short run, or an earlier one resumed; returns its folder."""
    monkeypatch.chdir(tmp_path)

    def run(script, name, epochs, **settings):
        if not Path("runs", name).exists():
            return script.train(short(script, name=name, epochs=epochs, **settings))
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in settings.items()]
        return script.train(script.parse(["--resume", f"runs/{name}", "--epochs", str(epochs), *flags]))

    return run


@pytest.fixture(scope="session", params=[crd, ddpo], ids=["crd", "ddpo"])
def finished(request, tmp_path_factory):
    """A short run of an epoch: its script and folder, what it printed, the captions of its contact sheets."""
    captions, sheet = [], rewards.contact_sheet
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as printed:
        patch.chdir(tmp_path_factory.mktemp("finished"))
        patch.setattr(rewards, "contact_sheet", lambda *args: captions.append(args[2]) or sheet(*args))
        folder = request.param.train(short(request.param, name="once", epochs=1, lr=0.01)).resolve()
    return SimpleNamespace(script=request.param, folder=folder, printed=printed.getvalue(), captions=captions)


@pytest.fixture
def copied(finished, run):
    """The script of that run, of which runs/x is a copy."""
    shutil.copytree(finished.folder, "runs/x")
    return finished.script


def state(folder, name="last"):
    """All of a checkpoint but its clock and what it was judged by."""
    found = torch.load(Path(folder, name, "state.pt"), weights_only=True)
    del found["progress"]["seconds"], found["progress"]["best_by"]
    return found


def metrics(folder):
    """The lines of metrics.jsonl without what a clock or the machine put there."""
    return [{k: v for k, v in line.items() if not k.endswith(("seconds", "images_per_second", "peak_gb"))}
            for line in rewards.read_metrics(folder)]


def test_a_run_leaves_what_it_promises(finished, monkeypatch):
    """args.json, metrics, contact sheets, a curve, last/ and best/; its name is not taken twice. What it
    prints fits a console."""
    folder, args = finished.folder, short(finished.script, name="once", epochs=1, lr=0.01)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.*")} == {
        "args.json", "metrics.jsonl", "curve.png", "samples/epoch-0000.png", "samples/epoch-0001.png",
        *(f"{name}/{file}" for name in ("last", "best")
          for file in ("state.pt", "pytorch_lora_weights.safetensors"))}
    given = json.loads(json.dumps(asdict(args)))
    assert json.loads((folder / "args.json").read_text()) == given  # with nothing filled in
    before, train, after = rewards.read_metrics(folder)
    assert train.keys() >= {"reward", "loss", "sample_seconds", "reward_seconds", "train_seconds",
                            "images_per_second", "peak_gb", "grad_norm"}
    for line, captions in zip((before, after), finished.captions, strict=True):  # they start with the reward
        scores = [float(re.match(r"(-?\d+\.\d\d)  \S", caption)[1]) for caption in captions]
        assert statistics.mean(scores) == pytest.approx(line["reward"], abs=0.01)
    monkeypatch.chdir(folder.parent.parent)
    with pytest.raises(ValueError, match="runs/once .*--resume runs/once"):
        finished.script.train(args)
    printed = [line for line in finished.printed.splitlines() if line.startswith("epoch")]
    assert len(printed) == 3 and max(map(len, printed)) <= 100, max(printed, key=len)


@parametrize("script, settings", [(crd, dict(groups=4, steps_per_epoch=2)), (ddpo, {}), *(
    (ddpo, dict(model="sd1", algorithm=name)) for name in ("is", "sf", "rwr", "rwr-sparse"))])
def test_resume_equals_not_stopping(run, tiny_sd1, script, settings):
    """To the bit: adapters, optimizer, random numbers, prompts and their statistics, metrics, the best so
    far, the LoRA."""
    settings = {**settings, **(tiny_sd1 if "model" in settings else {}), "eval_every": 1}
    straight, _ = run(script, "straight", 2, **settings), run(script, "stopped", 1, **settings)
    stopped = run(script, "stopped", 2)
    assert_close(state(stopped), state(straight), rtol=0, atol=0)
    assert metrics(stopped) == metrics(straight) and len(metrics(straight)) == 5
    for lora in ("last/pytorch_lora_weights.safetensors", "best/pytorch_lora_weights.safetensors"):
        assert (stopped / lora).read_bytes() == (straight / lora).read_bytes()
    if settings.get("algorithm", "is") in ("is", "sf") and script is ddpo:
        line = metrics(straight)[1]
        assert line["first_ratio_error"] == 0
        assert line.keys() >= {"ratio", "ratio_std", "ratio_min", "ratio_max", "clip_fraction", "approx_kl"}


@parametrize("change", [{}, dict(reward="compressibility"), dict(eval_images=3)])
def test_a_finished_run_can_be_extended(run, copied, change):
    """It keeps the evaluation that ended it, and is otherwise as if it had never ended. Judged in another way
    it starts a best of its own; else a best that nothing can beat stays."""
    before, lines = torch.load("runs/x/last/state.pt", weights_only=True), metrics("runs/x")
    before["progress"]["best"] = 1e9
    torch.save(before, "runs/x/last/state.pt")
    extended = run(copied, "x", 2, **change)
    found, more = state(extended), metrics(extended)[3:]
    assert metrics(extended)[:3] == lines
    assert [(line["split"], line["epoch"]) for line in more] == [("train", 1), ("eval", 2)]
    assert found["progress"].pop("best") == (more[-1]["reward"] if change else 1e9)
    assert (state(extended, "best")["progress"]["epoch"] == 2) == bool(change)
    if not change:
        expected = state(straight := run(copied, "straight", 2, lr=0.01))
        del expected["progress"]["best"]
        assert_close(found, expected, rtol=0, atol=0)
        assert [*lines[:2], *more] == metrics(straight)


@in_both
def test_the_best_can_be_looked_at_and_gone_on_from(run, monkeypatch, script):
    """Of a run whose best is its first epoch and not its second."""
    bonus, evaluation = iter([0, 1e4, 0, 0, 0]), rewards.evaluation

    def judged(*args):
        R, *others = evaluation(*args)
        return R + next(bonus), *others

    monkeypatch.setattr(rewards, "evaluation", judged)
    folder = run(script, "x", 2, eval_every=1, lr=0.01)
    lines, last = metrics(folder), state(folder)
    run(script, "x/best", 0)
    look = {**lines[2], "split": "test"}
    assert metrics(folder) == [*lines, look] and look["reward"] != lines[4]["reward"]
    shutil.rmtree(folder / "last")
    run(script, "x/best", 2)
    assert metrics(folder) == [*lines[:3], look, *lines[3:]]
    assert_close(state(folder), last, rtol=0, atol=0)


def test_a_run_starts_from_a_lora(run, leave, copied):
    """Of another run, of the other algorithm too; all adapters start there. A run of no epochs only
    evaluates, and leaves nothing to go on from."""
    other, first = crd if copied is ddpo else ddpo, metrics("runs/x")
    look, = metrics(folder := run(copied, "look", 0, lora="runs/x/last"))
    assert look["split"] == "eval" and look["reward"] == first[-1]["reward"] != first[0]["reward"]
    assert not list(folder.rglob("*.pt"))
    assert "cannot resume runs/look" in leave(copied, "--resume", folder, "--epochs", 1)
    plain, from_lora = (run(other, name, 0, lora=lora) for name, lora in (("a", None), ("b", "runs/x/last")))
    assert metrics(plain)[0]["reward"] != metrics(from_lora)[0]["reward"]
    if copied is crd:
        adapters = list(state(run(crd, "still", 1, lora="runs/x/last", lr=0.0))["adapters"].values())
        assert any(x["B.old"].any() for x in adapters)
        assert all(torch.equal(x["B.policy"], x[name]) for x in adapters for name in ("B.old", "B.sampler"))
    flags = "--preset tiny --reward compressibility --rank 3 --lora runs/x/last".split()
    assert re.search("use the same .*--rank", leave(copied, *flags))


@in_both
def test_unseen_rewards_are_logged_side_by_side(run, script, tmp_path, monkeypatch, capsys):
    """At every evaluation, on all prompts of --eval-prompts, with a benchmark's details, and never trained
    on; what is trained on anyway is not scored twice. Looking at a finished run leaves its curve alone."""
    monkeypatch.setattr(rewards.Compressibility, "details", {"counting": 0.5, "overall": 0.75})
    path = tmp_path / "drawbench.txt"
    path.write_text("a red cube\na blue cube\nthree dogs\n")
    folder = run(script, "seen", 1, eval_rewards="compressibility,incompressibility", eval_prompts=str(path))
    before, train, after = metrics(folder)
    for line in (before, after):
        assert line["compressibility"] == -line["incompressibility"] == -line["reward"]
        assert line["compressibility details"] == {"counting": 0.5, "overall": 0.75}
    assert "compressibility details: counting 0.500  overall 0.750" in capsys.readouterr().out
    assert "compressibility" not in train
    sheet = (folder / "samples" / "epoch-0001.png").read_bytes()
    run(script, "seen", 0, reward="compressibility")
    *others, look = metrics(folder)
    assert others == [before, train, after] and look["split"] == "test"
    assert look["reward"] == after["compressibility"] and (folder / "samples" / "test.png").exists()
    assert (folder / "samples" / "epoch-0001.png").read_bytes() == sheet


def half(state, path):
    Path(path).write_bytes(b"half a checkpoint")
    raise OSError("killed")


@parametrize("target, fault, message", [
    ("LOSS", lambda x, *args, **settings: (0 * x).sum().sqrt(), "norm nan"),  # 0, of slope 0 times infinity
    ("LOSS", lambda x, *args, **settings: x.sum() * math.nan, "loss is nan"),
    ("rewards.Incompressibility.measure", lambda self, images, *args: [math.nan] * len(images), "gave nan"),
    ("rewards.Incompressibility.measure", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt), "stopped"),
    ("torch.save", half, "killed")])
def test_what_goes_wrong_leaves_the_finished_epochs(run, leave, copied, monkeypatch, target, fault, message):
    """The optimizer makes no step, a half-written checkpoint is not taken for one, and the run can go on."""
    before, loss = state("runs/x"), "crd.crd_loss" if copied is crd else "ddpo.importance_sampling_loss"
    with monkeypatch.context() as patch:
        patch.setattr(target.replace("LOSS", loss), fault)
        if target != "torch.save":
            patch.setattr(torch.optim.AdamW, "step", lambda *args: pytest.fail("a step was made"))
        found = leave(copied, "--resume", "runs/x", "--epochs", 2)
    assert message in found and (target == "torch.save" or "--resume runs/x" in found)
    assert_close(state("runs/x"), before, rtol=0, atol=0)
    assert state(run(copied, "x", 2))["progress"]["epoch"] == 2


@parametrize("sampler, switch", [
    ("old", dict(tie_sampler=True, anchor_adapt="off", steps_per_epoch=2, micro_batch=1)),
    ("sampler", dict(anchor=0.0, anchor_adapt="advantage", tau=0.2, grad_checkpoint=True)),
    ("sampler", dict(reward_weight=0.0, anchor_guidance=1.0, adaptive=False))])
def test_every_switch_runs(run, monkeypatch, sampler, switch):
    """Images come from `sampler`, from `old` when tied, evaluations from the policy."""
    drawn, generate = [], crd.generate

    def spy(pipe, *args, **kwargs):
        drawn.append({m.active for m in pipe.transformer.modules() if isinstance(m, crd.LoRALinear)}.pop())
        return generate(pipe, *args, **kwargs)

    monkeypatch.setattr(crd, "generate", spy)
    train = metrics(run(crd, "switch", 1, **switch))[1]
    assert all(math.isfinite(train[key]) for key in ("loss", "reward", "grad_norm"))
    assert drawn == ["policy", sampler, "policy"]


def test_a_pipeline_with_t5_loads_and_encodes(tmp_path):
    """Stable Diffusion 3.5's third text encoder: CLIP's tokens, then --max-sequence-length of T5's."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    tokenizer = T5Tokenizer(vocab=pieces + [(chr(c), -3.0) for c in range(33, 127)])
    pipe = crd.load_pipeline(short(crd), CPU)
    config = T5Config(vocab_size=len(tokenizer), d_model=128, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    pipe.register_modules(text_encoder_3=T5EncoderModel(config), tokenizer_3=tokenizer)
    pipe.save_pretrained(tmp_path)
    args = short(crd, model=str(tmp_path), max_sequence_length=7)
    embeds, pooled = crd.encode(crd.load_pipeline(args, CPU), ["hello", "a cat"], args)
    assert embeds.shape == (2, 20 + 7, 128) and pooled.shape == (2, 128)
    assert (embeds[0, 20:] - embeds[1, 20:]).abs().max() > 0


@parametrize("script, settings", [
    (crd, dict(groups=8, group_size=12, sample_batch=96, rollout_steps=4, steps_per_epoch=4, eval_steps=4,
               train_timesteps=2, anchor=0.0)),
    (ddpo, dict(images=96, group_size=12, guidance=1.0, micro_batch=96, clip=1e-2, eval_noise=1.0))])
def test_a_short_run_raises_the_reward(run, monkeypatch, script, settings):
    """Of held-out prompts: a picture here is as bright as the mean of its latents, and the reward is that."""
    monkeypatch.setattr(script, "decode", lambda model, latents, batch: [
        Image.new("L", (8, 8), round(255 * x)) for x in (4 * latents.mean((1, 2, 3))).sigmoid().tolist()])
    monkeypatch.setattr(rewards.Incompressibility, "measure", lambda self, images, *args: [
        image.getpixel((0, 0)) / 255 for image in images])
    folder = run(script, "learn", 5, height=8, width=8, rank=8, alpha=16, lr=5e-3, eval_images=64,
                 eval_every=9, **settings)
    before, after = (reward for _, reward in rewards.reward_curve(folder))
    assert after > before + 0.1


# DDPO: mathematics

def ddim_scheduler(prediction_type="epsilon", steps=50):
    """Stable Diffusion 1.x's, as its checkpoint configures it."""
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type)
    scheduler.set_timesteps(steps)
    return scheduler


@parametrize("eta", [0.0, 1.0])
@parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddim_step_is_diffusers(prediction_type, eta):
    """The same x_{t-1} from the same noise, and the log-probability of the Gaussian that it was drawn from. A
    batch may mix timesteps: here of pure noise, in the middle, and the last, to the image."""
    scheduler, (output, x, _) = ddim_scheduler(prediction_type), velocities(3).float()
    steps, noise = scheduler.timesteps[[0, 20, 49]], torch.randn(x.shape, generator=seeded())

    def theirs(noise):
        return torch.cat([scheduler.step(*row, eta=eta, variance_noise=z).prev_sample for *row, z in
                          zip(output.split(1), steps, x.split(1), noise.split(1))])

    place = dict(t=steps, t_prev=steps - 20, alphas_cumprod=scheduler.alphas_cumprod, eta=eta,
                 prediction_type=prediction_type)
    drawn, of_drawn = ddpo.ddim_step(output, x, generator=seeded(), **place)
    taken, log_prob = ddpo.ddim_step(output, x, prev=drawn, **place)
    assert_close(drawn, theirs(noise))
    assert taken is drawn and torch.equal(log_prob, of_drawn) == bool(eta)
    std = eta * torch.stack([scheduler._get_variance(t, t - 20).sqrt() for t in steps]).view(3, 1, 1, 1)
    if eta:
        expected = torch.distributions.Normal(theirs(0 * noise), std).log_prob(drawn).mean((1, 2, 3))
        assert_close(log_prob, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="'sample': epsilon or v_prediction"):
        ddpo.ddim_step(output, x, **{**place, "prediction_type": "sample"})


@parametrize("noise_level", [0.0, 0.3, 0.7])
def test_the_flow_sde_keeps_the_marginals(noise_level):
    """Of data N(0.7, 0.5^2): whatever the noise, mean and deviation end where the data has them. It does not
    follow the ODE there, unless the noise is 0: then it is Euler's method."""
    g, sigmas = seeded(), torch.linspace(1, 0, 201, dtype=torch.float64)
    x = ode = torch.randn(20_000, 1, 1, 1, dtype=torch.float64, generator=g)
    for s, t in itertools.pairwise(sigmas):
        v = gaussian_velocity(x, s, 0.7, 0.5)
        x, _ = ddpo.flow_sde_step(v, x, s, t, sigmas[1], noise_level, generator=g)
        ode = ode + (t - s) * gaussian_velocity(ode, s, 0.7, 0.5)
    assert x.mean().item() == pytest.approx(0.7, abs=0.01) and x.std().item() == pytest.approx(0.5, abs=0.01)
    assert (x - ode).std() > 0.1 if noise_level else torch.allclose(x, ode)


@parametrize("advantage, change, live", [(1, 0.3, False), (1, -0.3, True), (-1, 0.3, True), (-1, -0.3, False),
                                         (1, 0.1, True), (-1, -0.1, True), (1, 0.0, True), (-1, 0.0, True)])
def test_clipping_zeroes_the_gradients_it_should(advantage, change, live):
    """Those of steps that already went the advantage's way by more than the clip; those against it stay. At
    ratio one the gradient is the score function's."""
    old, A = torch.zeros(1), torch.tensor([float(advantage)])
    log_prob = torch.tensor([change], requires_grad=True)
    gradient, = torch.autograd.grad(ddpo.importance_sampling_loss(log_prob, old, A, 0.2), log_prob)
    assert gradient.item() == pytest.approx(-advantage * math.exp(change) if live else 0)
    assert torch.autograd.grad(ddpo.score_function_loss(log_prob, A), log_prob)[0].item() == -advantage


def test_prompt_statistics():
    """A prompt's own mean and deviation once it has enough rewards, the batch's until then. Old ones go."""
    statistics, R = ddpo.PromptStatistics(buffer=4, minimum=3), torch.tensor([1.0, 2.0, 6.0, 11.0])
    A = statistics.advantages(["cat", "cat", "cat", "dog"], R)
    assert_close(A[:3], (R[:3] - 3) / (R[:3].std(correction=0) + 1e-6))
    assert_close(A[3], (11 - R.mean()) / (R.std(correction=0) + 1e-6))
    A = statistics.advantages(["cat", "cat"], torch.tensor([0.0, 4.0]))
    own = torch.tensor([2.0, 6.0, 0.0, 4.0])
    assert_close(A, (own[2:] - own.mean()) / (own.std(correction=0) + 1e-6))
    assert ddpo.PromptStatistics().advantages(["a"] * 20, torch.full((20,), 0.3)).abs().max() < 1e-5
    outlier = torch.cat([torch.zeros(99), torch.ones(1)])
    assert ddpo.PromptStatistics().advantages(["a"] * 100, outlier).max() == 5


def test_weights_of_the_baselines():
    """rwr: softmax at a temperature, 1 on average; rwr-sparse: the best tenth, as often as all were."""
    A = torch.randn(40, generator=seeded())
    assert (weights := ddpo.rwr_weights(A, 0.2)).mean().item() == pytest.approx(1)
    assert_close(weights[0] / weights[1], torch.exp((A[0] - A[1]) / 0.2))
    best = ddpo.best_images(A, 0.1)
    assert len(best) == len(ddpo.best_images(A, 0.3)) == 40
    assert set(best.tolist()) == set(A.argsort()[-4:].tolist()) and best.bincount().max() == 10


# DDPO: its models

@pytest.fixture(scope="session")
def tiny_sd1(tmp_path_factory):
    """The settings for a Stable Diffusion 1.x pipeline of random weights: 32 px images, 16 x 16 latents."""
    from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    text = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, max_position_embeddings=tokenizer.model_max_length)
    unet = UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, cross_attention_dim=16,
        norm_num_groups=1, attention_head_dim=8, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    vae = AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=8, sample_size=32, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    path = tmp_path_factory.mktemp("sd1")
    StableDiffusionPipeline(vae, CLIPTextModel(text), tokenizer, unet, ddim_scheduler(), None, None,
                            requires_safety_checker=False).save_pretrained(path)
    return dict(model=str(path), width=32)


@pytest.fixture(params=["sd1", "sd3"])
def any_model(request, tiny_sd1):
    return tiny_sd1 if request.param == "sd1" else {}


def family_with_lora(model, std=0.1, **settings):
    """A model family whose update is away from zero, and its conditions for three prompts and for none."""
    args = ddpo.fill_in(short(ddpo, **model, **settings))
    family = ddpo.load_family(args, CPU)
    torch.manual_seed(0)
    layers = trained(ddpo.add_lora(family.network, family.target_modules, 2, 6), std)
    return args, family, layers, ddpo.encode(family, ["a cat", "a dog", "a cat"]), ddpo.encode(family, [""])


def blocks_of(family):
    return [module for module in family.network.modules() if type(module).__name__ in family.blocks]


def start(family, args, count=3):
    """x_T of some images."""
    scale = family.pipe.vae_scale_factor
    shape = family.network.config.in_channels, args.height // scale, args.width // scale
    return torch.randn(count, *shape, generator=seeded())


@parametrize("any_model, dtype, guidance", [("sd1", "fp32", 1.0), ("sd1", "bf16", 3.0), ("sd3", "fp32", 3.0)],
             indirect=["any_model"])
def test_the_first_ratio_is_exactly_one(any_model, dtype, guidance):
    """Sampling and training compute the very same numbers, gradients or not, checkpointed or not. Micro-
    batches, checkpoints and the order of the steps change no gradient."""
    args, family, layers, cond, uncond = family_with_lora(any_model, dtype=dtype, guidance=guidance)
    noise, chunks, R = start(family, args), torch.arange(3).split(2), args.random_steps
    x0, states, log_probs = ddpo.rollout(family, noise, cond, uncond, chunks, args, CPU, seeded())
    assert states.shape == (3, R + 1, *noise.shape[1:]) and log_probs.shape == (3, R)
    assert torch.equal(states[:, 0], noise) and log_probs.isfinite().all()

    def step(steps=range(R), chunks=chunks):
        family.network.zero_grad()
        return ddpo.policy_gradients(family, states, log_probs, torch.tensor([1.5, -0.5, 0.3]), cond, uncond,
                                     chunks, steps, args), gradients(layers)

    plain = step()
    ddpo.checkpoint_blocks(blocks_of(family), layers)
    again, others = step(range(R)[::-1]), step(chunks=torch.arange(3).split(1))[1]
    for logs, gradient in (plain, again):
        assert logs["ratio_min"] == logs["ratio_max"] == 1 and logs["approx_kl"] == 0
    if dtype == "fp32":
        assert distance(again[1], plain[1]) < 1e-4 and distance(others, plain[1]) < 2e-4
    layers[next(iter(layers))].B["policy"].data += 0.1
    logs, _ = step()
    assert logs["ratio_min"] < logs["ratio_max"] and logs["approx_kl"] > 0


def test_an_ode_ends_the_walk(any_model):
    """After the random steps there is no noise: what was drawn is the step that nobody drew. Every output is
    guided: out(uncond) + w (out(c) - out(uncond)), for a step or a step an image."""
    args, family, _, cond, uncond = family_with_lora(any_model, random_steps=2)
    noise, nothing = start(family, args), [e.expand(3, *e.shape[1:]) for e in uncond]
    with torch.no_grad():
        path = [noise, *(x for x, _ in ddpo.denoise(family, noise, cond, uncond, args, generator=seeded()))]
        for i, (x, after) in enumerate(itertools.pairwise(path)):
            output = ddpo.guided(family, x, i, cond, uncond, args.guidance)
            assert torch.equal(family.step(output, x, i, noise=0.0)[0], after) == (i >= 2)
        x0, states, _ = ddpo.rollout(family, noise, cond, uncond, [torch.arange(3)], args, CPU, seeded())
        assert torch.equal(x0, path[-1]) and torch.equal(states, torch.stack(path[:3], 1))
        for i in (1, torch.tensor([0, 1, 3])):
            with_prompt, without = family.predict(noise, i, cond), family.predict(noise, i, nothing)
            assert_close(ddpo.guided(family, noise, i, cond, uncond, 3.0),
                         without + 3 * (with_prompt - without), rtol=1e-3, atol=1e-3)


@parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_baselines_noise_images_as_the_scheduler_does(tiny_sd1, prediction_type):
    """x_t and target are diffusers'. A flow's lie on the straight path to noise, in both scripts."""
    x0, noise, i = *velocities(2)[:2].float(), torch.tensor([1, 3])
    family, scheduler = family_with_lora(tiny_sd1)[1], ddim_scheduler(prediction_type, 4)
    family.prediction_type, t = prediction_type, scheduler.timesteps[i]
    target = noise if prediction_type == "epsilon" else scheduler.get_velocity(x0, noise, t)
    assert_close(family.add_noise(x0, noise, i), (scheduler.add_noise(x0, noise, t), target))
    flow = family_with_lora({})[1]
    x, u = flow.add_noise(x0, noise, i)
    assert_close((x, u), (x0 + flow.sigmas[i].view(-1, 1, 1, 1) * u, noise - x0))
    assert_close(x, crd.add_noise(x0, noise, flow.sigmas[i]))


@parametrize("model, algorithm, expected", [
    ("sd1", "is", (50, 50, 5.0, 4, 50)), ("sd1", "sf", (50, 50, 5.0, 1, 50)),
    ("sd3", "is", (10, 9, 4.5, 4, 9)), ("sd3", "rwr", (10, 9, 4.5, 4, 10))])
def test_the_family_fills_in_what_is_not_given(tiny_sd1, model, algorithm, expected):
    settings = dict(steps=None, guidance=None, algorithm=algorithm, **(tiny_sd1 if model == "sd1" else {}))
    args = ddpo.fill_in(short(ddpo, **settings))
    assert (args.steps, args.random_steps, args.guidance, args.updates, args.train_timesteps) == expected


def test_long_trajectories_move_to_the_cpu(monkeypatch):
    """When they would take more than a quarter of the GPU's free memory; on a CPU there is no question."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1600, 10_000))
    assert ddpo.trajectory_device(100, torch.device("cuda")) == torch.device("cuda")
    assert ddpo.trajectory_device(101, torch.device("cuda")) == ddpo.trajectory_device(9**9, CPU) == CPU


@parametrize("config", [{}, dict(r=4, lora_alpha=7)])
@in_both
def test_a_lora_gives_the_same_image_in_diffusers(tiny_sd1, tmp_path, script, config):
    """pipe.load_lora_weights takes a saved one as it is, scale and all; one of diffusers, with an alpha of
    its own, is as strong here as there. Of a transformer and of a UNet, through diffusers' own sampler."""
    pytest.importorskip("peft", reason="peft is not installed; diffusers needs it for load_lora_weights")
    path, model = tmp_path / "pytorch_lora_weights.safetensors", tiny_sd1 if script is ddpo else {}
    args = ddpo.fill_in(short(ddpo, **model))
    ours, theirs = (ddpo.load_family(args, CPU) for _ in range(2))

    def draw(pipe):
        more = {"max_sequence_length": 1} if script is crd else {}
        return torch.from_numpy(pipe(
            '"moon" on a blue sign', height=32, width=args.width, guidance_scale=3.0, num_inference_steps=4,
            output_type="np", generator=seeded(), **more).images)

    before = draw(ours.pipe)
    torch.manual_seed(0)
    layers = script.add_lora(ours.network, ours.target_modules, 4, 12)
    trained(layers, 0.05 if script is crd else 0.3)
    script.save_lora(path, layers, prefix=ours.prefix)
    if config:
        write_lora(path, layers, ours.prefix, target_modules=list(layers), **config)
        script.load_lora(path, layers, prefix=ours.prefix)
    theirs.pipe.load_lora_weights(tmp_path)
    assert (draw(ours.pipe) - before).abs().max() > 0.01
    assert_close(draw(theirs.pipe), draw(ours.pipe), rtol=0, atol=1e-3)


def test_the_policy_gradient_is_the_gradient_of_the_expected_reward(tiny_sd1):
    """The score function, over many images, agrees with backpropagation through the whole chain, in whose
    end, an ODE, the policy is held fixed."""
    R, N, g, reward = 2, 2048, seeded(1), lambda x0: x0[:, :3].mean((1, 2, 3))
    args, family, layers, _, uncond = family_with_lora(
        tiny_sd1 | dict(width=4), algorithm="sf", height=4, random_steps=R, guidance=1.0)
    cond, chunks = [e.expand(N, *e.shape[1:]) for e in uncond], [torch.arange(N)]
    noise = start(family, args, N)
    x0, states, log_probs = ddpo.rollout(family, noise, cond, uncond, chunks, args, CPU, g)
    A = reward(x0) - reward(x0).mean()
    ddpo.policy_gradients(family, states, log_probs, A, cond, uncond, chunks, range(R), args)
    estimate, x = -gradients(layers) * R * noise[0].numel(), noise  # log p was averaged over both
    family.network.zero_grad()
    for i in range(args.steps):
        for p in policy(layers):
            p.requires_grad_(i < R)
        output = ddpo.guided(family, x, i, cond, uncond, 1.0)
        x, _ = family.step(output, x, i, noise=float(i < R), generator=g)
    for p in policy(layers):
        p.requires_grad_(True)
    reward(x).mean().backward()
    exact = gradients(layers)
    assert torch.cosine_similarity(estimate, exact, 0) > 0.85
    assert 0.7 < torch.dot(estimate, exact) / exact.square().sum() < 1.4


# The README

def test_the_readme_points_at_the_code():
    """Every link to lines of a file starts where the function it names starts, and ends where it ends."""
    root = Path(__file__).parent
    links = re.findall(r"\[`(\w+)`\]\((\w+\.py)#L(\d+)-L(\d+)\)", (root / "README.md").read_text())
    assert len(links) > 10
    for name, file, first, last in links:
        lines = (root / file).read_text().splitlines()[int(first) - 1:int(last)]
        assert any(re.match(rf"(def|class) {name}\b", line) for line in lines[:3]), (name, file, first)
        assert all(line.startswith((" ", ")")) or not line for line in lines[2:]), (name, file, last)
        assert lines[-1].strip(), (name, file, last)


# Benchmarks

def overhead(epochs=6):
    """An epoch's wall time over that of the bare transformer and VAE calls it has to make, tiny preset: the
    rollout's forward passes, the decoding, and at each sigma the policy forward and backward, `old`, and the
    guided reference."""
    os.chdir(tempfile.mkdtemp())
    args = crd.parse(["--preset", "tiny", "--epochs", str(epochs), "--eval-images", "1"])
    N, pipe = args.groups * args.group_size, crd.load_pipeline(args, CPU)
    uncond, share, scale = crd.encode(pipe, [""], args), N // args.steps_per_epoch, pipe.vae_scale_factor
    shape = pipe.transformer.config.in_channels, args.height // scale, args.width // scale
    layers = crd.add_lora(pipe.transformer, TARGET_MODULES, args.rank, args.alpha, ADAPTERS)

    def forward(images):
        cond = [t.repeat_interleave(images, 0) for t in uncond]
        return crd.velocity(pipe.transformer, torch.randn(images, *shape), SIGMA, cond)

    def calls():
        with torch.no_grad():
            for rows in torch.arange(N).split(args.sample_batch):
                for _ in range(args.rollout_steps):
                    forward(len(rows))
                for part in rows.split(args.decode_batch):
                    pipe.vae.decode(torch.randn(len(part), *shape))
        for _ in range(args.train_timesteps * args.steps_per_epoch):
            with torch.no_grad(), crd.use_adapter(layers, None):
                forward(share), forward(2 * share)
            torch.autograd.grad(forward(share).sum(), policy(layers))

    lines = [line for line in rewards.read_metrics(crd.train(args)) if line["split"] == "train"]
    whole = [line["sample_seconds"] + line["reward_seconds"] + line["train_seconds"] for line in lines]
    bare = timeit.repeat(calls, number=1, repeat=epochs)
    whole, bare = (statistics.median(times[1:]) for times in (whole, bare))  # the first warms up
    print(f"epoch {whole:.2f} s, bare calls {bare:.2f} s, ratio {whole / bare:.3f} (medians of {epochs - 1}, "
          f"{torch.get_num_threads()} threads)")


def throughput(count=64, batch=8):
    """Images a second that each reward scores at 512 px, with small models: what its own code costs."""
    rewards.final_score = lambda reply: 1.0  # a small model's reply has no mark
    folders = save_small_models(Path(tempfile.mkdtemp()), pytest.MonkeyPatch())
    folders["ocr"] = TINY
    pictures = [picture(seed, (512, 512)).resize((64, 64)).resize((512, 512)) for seed in range(count)]
    texts, entries = [f'"word" {i}' for i in range(count)], [ENTRIES[i % len(ENTRIES)] for i in range(count)]
    for name in rewards.REWARDS:
        path = f"@{folders[name]}" if Path(folders[name]).exists() else ""
        reward = rewards.load(f"{name}{path}", "cpu", batch)
        reward(pictures[:batch], texts[:batch], entries[:batch])
        start = time.perf_counter()
        reward(pictures, texts, entries)
        print(f"{name:18s} {count / (time.perf_counter() - start):8.1f} images/s (batch {batch}, "
              f"{torch.get_num_threads()} threads)", flush=True)


if __name__ == "__main__":
    throughput() if sys.argv[1:] == ["rewards"] else overhead()
