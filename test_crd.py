"""What CRD and DDPO claim, each claim a test that fails when its line is broken. CPU only, no network.

    python -m pytest -q test_crd.py
"""

import functools
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
import weakref
import zlib
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports that read it

import diffusers  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from diffusers import DDIMScheduler, SD3Transformer2DModel  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.testing import assert_close  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_iter  # noqa: E402

import crd  # noqa: E402
import ddpo  # noqa: E402
import rewards  # noqa: E402
from crd import ADAPTERS, PRESETS, TARGET_MODULES, Settings  # noqa: E402

TINY = Path(__file__).parent / "tiny-sd3"
CPU = torch.device("cpu")
parametrize = pytest.mark.parametrize
in_both = parametrize("script", [crd, ddpo], ids=["crd", "ddpo"])


@parametrize("name", ["LoRALinear", "add_lora", "use_adapter", "ema_update", "save_lora", "load_lora",
                      "Checkpoint", "checkpoint_blocks", "save", "restore", "sample_ode"])
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
    switched off, the model is as pretrained, to the bit; W + (alpha / rank) B A is the adapted layer."""
    model = small_transformer().to(dtype)
    before, layers = predict(model), crd.add_lora(model, TARGET_MODULES, 2, 6, ADAPTERS)

    def outputs():
        for name in (None, *ADAPTERS):
            with crd.use_adapter(layers, name):
                yield predict(model)

    for output in outputs():  # by another kernel, hence the tolerance
        assert_close(output, before, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.03)
    predict(model, grad=True).square().mean().backward()
    gradient = gradients(layers)
    assert gradient.dtype == torch.float32 and gradient.isfinite().all() and gradient.abs().max() > 0
    trained(layers)
    off, *on = outputs()
    assert torch.equal(off, before)
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.combinations([off, *on], 2))
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
    """Into another model, of another alpha: the same function, in any adapter, the others as they were. Other
    shapes and layers are refused, and what is more than a plain LoRA."""
    path, model, other = tmp_path / "lora.safetensors", small_transformer(), small_transformer()
    layers = with_lora(model)
    expected, plain = predict(model), predict(other)
    fresh = crd.add_lora(other, TARGET_MODULES, 2, 5, ADAPTERS)
    crd.save_lora(path, layers)
    crd.load_lora(path, fresh, "sampler")
    for name, output in (("sampler", expected), ("old", plain)):
        with crd.use_adapter(fresh, name):
            assert_close(predict(other), output, rtol=1e-5, atol=1e-6)
    for targets, rank, config in ((TARGET_MODULES, 3, {}), (TARGET_MODULES[:2], 2, {}), *(
            (TARGET_MODULES, 2, {key: {"x": 3}}) for key in ("use_rslora", "use_dora", "alpha_pattern",
                                                             "rank_pattern"))):
        write_lora(path, layers, r=2, lora_alpha=2, **config)
        with pytest.raises(ValueError, match="no plain LoRA of these layers and this rank: see .*--rank"):
            crd.load_lora(path, crd.add_lora(small_transformer(), targets, rank, 4))


# Checkpointing

@parametrize("returns", [lambda y: y, lambda y: (y.sin(), None, y)])
def test_checkpointing_changes_memory_not_gradients(returns):
    """Of a block that returns a tensor, or a tuple with None in it, and takes tensors by keyword. It is run
    again with the adapter of its forward pass, though another is active by then."""
    block, x = torch.nn.ModuleDict({"to_q": torch.nn.Linear(4, 4)}), torch.randn(2, 1000, 4).requires_grad_()
    block.forward = lambda x, k, shift, mask: returns((k * block["to_q"](x) + shift).sin().exp().tanh())
    layers = trained(crd.add_lora(block, ["to_q"], 2, 4))

    def run():
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda t: sizes.update({t.data_ptr(): t.numel()}) or t, lambda t: t):
            outputs = block(x[0], 2.0, shift=x[1], mask=None)
        outputs = [y for y in (outputs if isinstance(outputs, tuple) else [outputs]) if y is not None]
        with crd.use_adapter(layers, None):
            grads = torch.autograd.grad(sum(y.square().sum() for y in outputs), [x, *policy(layers)])
            assert {layer.active for layer in layers.values()} == {None}
        return (outputs, grads), sum(sizes.values())

    expected, plain = run()
    crd.checkpoint_blocks([block], layers)
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
    """N(0.7, 1) data: noise z ends at 0.7 + z; twice the steps, half or (but for a log) a quarter error."""
    noise = torch.randn(4, 1, 2, 2, dtype=torch.float64, generator=seeded())

    def error(steps):
        sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        x0 = crd.sample_ode(lambda x, sigma: gaussian_velocity(x, sigma, 0.7, 1.0), noise, sigmas, order)
        return (x0 - (0.7 + noise)).abs().max().item()

    assert error(160) < bound
    assert error(160) / error(320) == pytest.approx(ratio, rel=0.1)
    for wrong in ([1.0, 0.5], [1.0, 0.5, 0.5, 0.0], [0.5, 1.0, 0.0]):
        with pytest.raises(ValueError, match="must descend to 0"):
            crd.sample_ode(lambda x, s: x, noise, torch.tensor(wrong))


def mixture_velocity(x, sigma):
    """The same for a mixture of three Gaussians."""
    means, stds = torch.tensor([[-1.5, 0.2, 1.4], [0.25, 0.15, 0.3]], dtype=torch.float64)
    x, variance = x[..., None], (1 - sigma) ** 2 * stds**2 + sigma**2
    weights = (-(x - (1 - sigma) * means) ** 2 / (2 * variance) - variance.log() / 2).softmax(-1)
    return (weights * gaussian_velocity(x, sigma, means, stds)).sum(-1)


@parametrize("velocity", [functools.partial(gaussian_velocity, mean=0.7, std=0.5), mixture_velocity])
def test_the_second_order_is_never_worse_than_euler(velocity):
    """On diffusers' schedules, whose last step but one is four to six times as long as the one before."""
    noise = torch.randn(2000, 1, 1, 1, dtype=torch.float64, generator=seeded())
    exact = crd.sample_ode(velocity, noise, torch.linspace(1, 0, 2001, dtype=torch.float64), order=1)
    for shift, steps in itertools.product((1.0, 3.0), (4, 10, 20, 40)):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(steps)
        sigmas = scheduler.sigmas.double()
        x_euler, x_second = (crd.sample_ode(velocity, noise, sigmas, order) for order in (1, 2))
        euler, second = ((x - exact).square().mean() for x in (x_euler, x_second))
        assert second <= euler and (steps < 10 or second < 0.7 * euler), (shift, steps)


REWARDS = torch.tensor([0.1, 0.4, 0.2, 1.0, 0.0, 0.5, 0.3, 0.6], dtype=torch.float64)  # two groups of four
TARGETS = crd.reward_targets(REWARDS, 4)
RHO = torch.randn(8, dtype=torch.float64, generator=seeded(3))


def test_reward_targets():
    """Each group averages to 1/2, on the scale of the batch's deviation; a constant added to all rewards
    changes nothing, an outlier ends at the clip. Where the mean of a group is weighted, a cold temperature
    takes its best image and its worst, a hot one all alike."""
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
    """Z(c) cancels: a constant for a prompt, in its rewards or log-ratios, changes nothing. The gradient is
    the squares', rho's mean held still, which at the plain mean changes nothing; at rho = 0 it is -A / N."""
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
        if weight and tau == math.inf:  # then the last is the variance of rho within a group
            rho = crd.implicit_reward(v, v_old, u).detach().view(2, 4)
            assert_close(totals[4], rho.var(1, correction=0).mean(), rtol=1e-4, atol=1e-9)


@parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rho_is_exactly_zero_where_the_policy_is_old(dtype):
    """All passes go through one attention kernel, with gradients or without; so does the second run of a
    checkpointed block, which gives the same gradient to the bit."""
    found = []
    for checkpoint in (False, True):
        model, (x0, noise, cond) = small_transformer().to(dtype), inputs(8)
        layers = with_lora(model)
        crd.ema_update(layers, "old", 0.0)
        if checkpoint:
            crd.checkpoint_blocks(model.transformer_blocks, layers)
        cond, uncond = ([t[:n].to(dtype) for t in c] for c, n in ((cond, 2), (UNCOND, 1)))
        totals = crd.accumulate_gradients(model, layers, x0, noise, SIGMA, cond, uncond, TARGETS.float(),
                                          REWARDS.float(), 1.0, Settings(group_size=4, micro_batch=3))
        assert totals[3] == totals[4] == 0 and totals[2] > 0
        found.append(gradients(layers))
    assert torch.equal(*found)


# Rewards

def picture(seed=0, size=(64, 32), flat=False):
    """A picture of noise, or of one colour."""
    noise = random.Random(seed).randbytes(3 * size[0] * size[1])
    return Image.new("RGB", size, (90, 120, 30)) if flat else Image.frombytes("RGB", size, noise)


def scores_of(reward, images, prompts=None):
    return reward(images, prompts or [""] * len(images), [{}] * len(images))


def test_ocr_looks_for_the_first_quoted_text_in_what_it_reads(small):
    """Case and spaces do not count, nor what else is read; an edit costs a letter."""
    reward, (texts, reads, expected) = small("ocr"), zip(
        ("moon", "moon", 1), ("Moon", "MOON", 1), ("good day", "goodday", 1), ("moon", "the moon is up", 1),
        ("moon", "moan", 3 / 4), ("moon", "mon", 3 / 4), ("moon", "moxon", 3 / 4), ("moon", "omon", 2 / 4),
        ("moon", "", 0), ("moon", "xyz", 0), ("moon", "a very long line of other text", 0))
    reward.read = lambda images: reads
    prompts = [f'a sign that says "{text}", not "b"' for text in texts]
    assert scores_of(reward, [picture()] * len(prompts), prompts).tolist() == list(expected)
    assert all(reward.objection(prompt, {}) for prompt in ("a sign", 'an empty ""', 'one " only'))


def test_boxes_of_hand_made_maps():
    """The mean over a box counts, not over its blob; a box grows; of too many, the lower ones stay."""
    line, high, low = (10, 5, 30, 13), (2, 2, 20, 8), (2, 20, 40, 28)
    blocks, expected = zip(
        ([], []), ([(0.9, *line)], [line]), ([(0.25, 0, 0, 63, 31), (0.9, *line)], [line]),
        ([(0.5, *line)], []),  # over the map's threshold, under the box's
        ([(0.9, 10, 5, 30, 7)], []),  # too thin
        ([(0.9, 10, 5, 30, 8), (0.9, 10, 5, 13, 13)], []),  # a blob that is sure of itself, and half its box
        ([(0.9, 10, 5, 30, 10), (0.9, 10, 5, 20, 13)], [line]), ([(0.9, *high), (0.8, *low)], [high, low]))
    maps, grow = torch.zeros(len(blocks), 32, 64), 20 * 8 * 1.5 / 56
    for i, (value, x0, y0, x1, y1) in ((i, block) for i, own in enumerate(blocks) for block in own):
        maps[i, y0:y1 + 1, x0:x1 + 1] = value
    assert [sorted(own) for own in rewards.find_boxes(maps, unclip=0)] == list(expected)
    assert rewards.find_boxes(maps[-2:], unclip=0, most=1) == [[line], [low]]
    assert rewards.find_boxes(maps[1:2]) == [[pytest.approx((10 - grow, 5 - grow, 30 + grow, 13 + grow))]]


def test_blobs_are_those_of_a_slow_flood():
    """On random masks, where they wind about and touch by their corners. Each is named by its last pixel."""
    mask = torch.rand(3, 24, 24, generator=seeded()) < 0.45
    names = torch.arange(1.0, 1 + mask.numel()).view_as(mask) * mask
    for _ in range(300):
        names = torch.nn.functional.max_pool2d(names, 3, 1, 1) * mask
    assert torch.equal(rewards.connected(mask) + 1.0, names[mask]) and len(names.unique()) > 15


def test_the_steps_around_the_text_networks():
    """Widths are rounded up to 320 and beyond that down. Letters that repeat merge unless a blank parts them.
    A box a little lower is still on its neighbour's line."""
    sizes = (32, 64), (512, 512), (100, 50), (5, 5), (1920, 1080)
    shown = [rewards.detector_size(h, w, 960, "max") for h, w in sizes]
    assert shown == [(32, 64), (512, 512), (96, 64), (32, 32), (960, 544)]
    lines = (10, 21), (40, 266), (40, 267), (40, 268), (7, 100)
    assert [rewards.line_width(h, w, 48, 320) for h, w in lines] == [101, 320, 320, 321, 685]
    steps = [["-ab".index(c) for c in row] for row in ("aab--", "aa-ab", "--a--", "-----", "a-b-b")]
    scores = torch.nn.functional.one_hot(torch.tensor(steps))
    assert rewards.ctc_decode(scores, "-ab") == ["ab", "aab", "a", "", "abb"]
    first, second, third, fourth = (0, 0, 10, 10), (20, 3, 30, 13), (0, 20, 10, 30), (15, 18, 30, 28)
    assert rewards.reading_order([fourth, second, third, first]) == [first, second, third, fourth]


@pytest.fixture(scope="session")
def signs():
    """make.py, 500 held-out prompts, and their signs, cleanly drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TINY)
        import make
    prompts, rng = some_prompts("signs", "eval", count=500), random.Random(0)
    return make, prompts, [make.draw(prompt, rng)[0] for prompt in prompts]


@parametrize("folder", ["", "judge"])
def test_the_bundled_models_read_words_they_never_saw(signs, folder):
    """500 held-out words: 98 % to the letter, whatever pictures are beside them. A flat one says nothing."""
    (_, prompts, images), reward = signs, rewards.load(f"ocr@{TINY / folder}", CPU)
    exact = [f'"{text.casefold()}"' in prompt for text, prompt in zip(reward.read(images), prompts)]
    assert sum(exact) >= 0.98 * 500 and scores_of(reward, images, prompts).mean() > 0.98
    assert scores_of(reward, images, prompts[1:] + prompts[:1]).mean() < 0.5
    images = [picture(flat=True), picture(), picture(size=(96, 64)), picture(size=(1, 5000)), images[0]]
    read = reward.read(images)
    assert read == [reward.read([image])[0] for image in images] and read[0] == ""


def test_the_bundled_judges_see_a_wrong_letter_and_a_wrong_color(signs):
    """CLIP prefers the right prompt to one with a letter changed, and to one with another color."""
    (make, prompts, images), rng = signs, random.Random(1)
    clip, color = (rewards.load(spec, CPU, 100) for spec in (f"clipscore@{TINY}/clip", "color"))
    right, wrong = scores_of(clip, images, prompts), [*zip(*(make.near_misses(p, rng) for p in prompts))]
    for texts, share in zip(wrong, (0.95, 0.99)):
        assert (right > scores_of(clip, images, texts)).float().mean() > share
    assert scores_of(color, images, prompts).min() == 1 and scores_of(color, images, wrong[1]).max() == 0


@parametrize("side", [32, 64, 512])
@parametrize("spec, weight", [("incompressibility", 1), ("compressibility", -1), ("compressibility:-2", 2),
                              ("compressibility:2, incompressibility:-0.5", -2.5)])
def test_jpeg_rewards_their_weighted_sum_and_its_range(side, spec, weight):
    """In 1,000 bytes; parts are logged unweighted. A flat colour and noise span the range, at any size."""
    images, files = [picture(0, (side, side), flat) for flat in (True, False)], [io.BytesIO(), io.BytesIO()]
    for image, file in zip(images, files):
        image.save(file, "JPEG", quality=95)
    reward, sizes = rewards.load(spec, CPU), torch.tensor([file.tell() / 1000 for file in files])
    scores, parts = reward.score(images, ["", ""], [{}, {}])
    assert_close(scores, weight * sizes)
    both = {"incompressibility": sizes, "compressibility": -sizes}
    assert_close(parts, {name: both[name] for name in re.findall("[a-z]+", spec)})
    places = rewards.normalize(scores, reward.range).tolist()
    assert places == pytest.approx([0, 1] if weight > 0 else [1, 0], abs=0.12)
    assert side != 512 or reward.range == pytest.approx(sorted((0.6 * weight, 200 * weight)))


@parametrize("outcome, message", [
    (ValueError("out of memory\nlong advice"), "reward broken failed: ValueError: out of memory$"),
    ([0.5, math.nan], "reward broken gave nan for the prompt 'second'"),
    ([0.5], r"reward broken gave scores of shape \(1,\) for 2 images")])
def test_a_reward_that_fails_stops_with_its_name_in_one_line(outcome, message):
    """It never quietly becomes 0, alone or in a sum."""
    alone = rewards.Reward(None, CPU)
    alone.name, alone.measure = "broken", Mock(side_effect=[outcome] * 2)  # which raises an exception
    for reward in (alone, rewards.WeightedSum([(1, rewards.load("compressibility", CPU)), (2, alone)])):
        with pytest.raises(rewards.RewardError, match=message) as error:
            scores_of(reward, [picture(), picture()], ["first", "second"])
        assert "\n" not in str(error.value)


def test_the_task_that_the_settings_ask_for(tmp_path):
    """The reward's own prompts unless others are named; as many held-out ones as asked for, or a file's."""
    task = functools.partial(short, crd, reward="compressibility", prompts=None, eval_images=6)
    reward, judge, stream, prompts, _ = rewards.load_task(
        task(eval_rewards="incompressibility,compressibility:2"), CPU)
    assert (reward.name, judge.name) == ("compressibility", "incompressibility") and len(prompts) == 6
    assert next(stream)[0] in some_prompts("animals", "train")
    assert set(prompts) == set(some_prompts("animals", "eval"))
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    _, judge, stream, prompts, metadata = rewards.load_task(
        task(prompts="signs", eval_prompts=str(tmp_path / "a.txt")), CPU)
    assert judge is None and prompts == ("one", "two") and '"' in next(stream)[0]
    assert metadata[1]["where"].endswith("a.txt, line 2")


# Prompts

def some_prompts(source, split, seed=0, count=400):
    return [prompt for prompt, _ in itertools.islice(rewards.prompts(source, split, seed), count)]


@parametrize("source, text", [("signs", lambda prompt: prompt.split('"')[1]), ("animals", str),
                              ("ocr", lambda prompt: prompt.split('"')[1].casefold())])
def test_no_evaluation_prompt_is_trained_on(source, text):
    """Nor its word (`signs`), nor its text (`ocr`). The seed decides the training prompts, not the others."""
    train, held_out = some_prompts(source, "train", count=3000), some_prompts(source, "eval")
    assert {text(p) for p in train}.isdisjoint({text(p) for p in held_out})
    assert len(set(held_out)) == len(held_out) > 3
    assert held_out == some_prompts(source, "eval", seed=1)
    assert train == some_prompts(source, "train", count=3000) != some_prompts(source, "train", 1, 3000)


@parametrize("name, line", [("words.txt", "%s"), ("train_metadata.jsonl", (
    '{"tag": "counting", "include": [{"class": "clock", "count": 2}], '
    '"exclude": [{"class": "clock", "count": 3}], "prompt": "%s"}'))])
def test_prompts_from_a_file(tmp_path, name, line):
    """Every line is for training or for evaluation, never both; other keys of a .jsonl line are metadata, of
    Flow-GRPO's public files as GenEval wants them."""
    words, source = {f"a {i} b" for i in range(40)}, str(tmp_path / name)
    Path(source).write_text("\n".join(line % word for word in sorted(words)))
    train, held_out = some_prompts(source, "train"), some_prompts(source, "eval")
    assert set(train) | set(held_out) == words and not set(train) & set(held_out)
    assert len(train) == 400 and 0 < len(held_out) < 20
    _, metadata = next(iter(rewards.prompts(source, "train", 0)))
    assert f"{source}, line " in metadata["where"]
    assert (rewards.malformed(metadata) is None) == ("json" in name)


# Rewards that are models

MARKS = "<image>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>", "<|im_start|>", "<|im_end|>"
IMAGE, IMAGE_PAD = 198, 199  # the first two, after the tokens of the toy's tokenizer
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
EYES = dict(**SIZES, image_size=32, patch_size=8)
WORDS = dict(**SIZES, vocab_size=IMAGE + len(MARKS), eos_token_id=1)
SMALL_CLIP = dict(projection_dim=24, vision_config=dict(**EYES, hidden_act="gelu"), text_config=dict(
    **WORDS, hidden_act="gelu", max_position_embeddings=20))


def shaken(model):
    """The model with weights large enough for inputs to matter."""
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, 0, 0.3)
    return model.eval()


def small_openclip():
    """A small OpenCLIP made of torch's own layers, and its state dict under OpenCLIP's names."""
    torch.manual_seed(0)
    nn, empty, norm = torch.nn, lambda *shape: torch.nn.Parameter(torch.zeros(shape)), torch.nn.LayerNorm
    text, visual, state = nn.Module(), nn.Module(), {}
    for tower in (text, visual):
        layer = nn.TransformerEncoderLayer(32, 2, 48, 0, "gelu", batch_first=True, norm_first=True)
        tower.transformer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    text.token_embedding, text.ln_final = nn.Embedding(WORDS["vocab_size"], 32), norm(32)
    text.positional_embedding, text.text_projection, text.logit_scale = empty(20, 32), empty(32, 24), empty()
    visual.conv1, visual.ln_pre, visual.ln_post = nn.Conv2d(3, 32, 8, 8, bias=False), norm(32), norm(32)
    visual.class_embedding, visual.positional_embedding = empty(32), empty(17, 32)
    visual.proj, text.visual = empty(32, 24), visual
    for weight in text.parameters():
        nn.init.normal_(weight, 0, 0.3)
    for key, x in text.eval().state_dict().items():
        for ours, theirs in (("layers", "resblocks"), ("self_attn", "attn"), ("norm", "ln_"),
                             ("linear1", "mlp.c_fc"), ("linear2", "mlp.c_proj")):
            key = key.replace(ours, theirs)
        state[key] = x
    return text, state


def imagereward_file(model):
    """The state dict of an `ImageReward.build` as ImageReward.pt has it, unused tensors included."""
    unused = "text_proj.weight", "text_proj.bias", "vision_proj.weight", "vision_proj.bias"
    tensors = {f"blip.{key}": torch.zeros(2) for key in (*unused, "text_encoder.embeddings.position_ids")}
    for key, x in model.state_dict().items():
        for ours, theirs in (
                ("vision.encoder.layers", "vision.blocks"), ("self_attn.qkv", "attn.qkv"),
                ("self_attn.projection", "attn.proj"), ("post_layernorm", "norm"), ("layer_norm", "norm"),
                ("vision.embeddings.class_embedding", "vision.cls_token"), ("text.", "blip.text_encoder."),
                ("vision.embeddings.position_embedding", "vision.pos_embed"), ("head.", "mlp.layers."),
                ("vision.embeddings.patch_embedding", "vision.patch_embed.proj"),
                ("vision.", "blip.visual_encoder.")):
            key = key.replace(ours, theirs)
        tensors[key] = x
    return tensors


def save_small_models(root, patch):
    """{reward: its folder}, with small models of the same classes, and the true constants scaled down."""
    import transformers as hf
    for reward, constants in (
            (rewards.HPSv2, dict(architecture=SMALL_CLIP)),
            (rewards.ImageReward, dict(vision=EYES, text=dict(**WORDS, encoder_hidden_size=32))),
            (rewards.VLM, dict(layer=2, new_tokens=6)), (rewards.UnifiedReward, dict(side=32, new_tokens=6)),
            (rewards.GenEval, dict(shortest=64, longest=96, threshold=0.02))):
        for name, value in constants.items():
            patch.setattr(reward, name, value)
    torch.manual_seed(0)
    swin = hf.SwinConfig(embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2,
                         out_indices=[1, 2, 3, 4])
    language = dict(**WORDS, num_key_value_heads=2, bos_token_id=0, pad_token_id=1)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    clips = "clipscore", "pickscore", "hpsv2", "aesthetic/clip", "geneval/clip"
    models = {
        **dict.fromkeys(clips, hf.CLIPModel(hf.CLIPConfig(**SMALL_CLIP))),
        "geneval/detector": rewards.detector_class()(hf.Mask2FormerConfig(
            backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_layers=1,
            decoder_layers=2, num_queries=12, num_labels=80)),
        "vlm/llava": hf.LlavaForConditionalGeneration(hf.LlavaConfig(
            vision_config=dict(model_type="clip_vision_model", **EYES),
            text_config=dict(model_type="llama", **language), image_token_index=IMAGE)),
        "vlm/deberta": hf.DebertaModel(hf.DebertaConfig(
            **{**WORDS, "num_hidden_layers": 3}, relative_attention=True, pos_att_type=["c2p", "p2c"])),
        "unifiedreward": hf.Qwen2_5_VLForConditionalGeneration(hf.Qwen2_5_VLConfig(
            text_config=dict(**language, rope_parameters=rope), image_token_id=IMAGE_PAD,
            vision_config=dict(depth=2, hidden_size=32, intermediate_size=48, num_heads=2, patch_size=4,
                               out_hidden_size=32, window_size=16, fullatt_block_indexes=[1])))}
    tokenizer = hf.AutoTokenizer.from_pretrained(TINY / "tokenizer")  # about a token a letter
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    processor = hf.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    for folder, model in models.items():
        for part in (shaken(model), tokenizer, processor):
            part.save_pretrained(root / folder)
    hf.Qwen2VLImageProcessorPil(patch_size=4, min_pixels=64).save_pretrained(root / "unifiedreward")
    tokenizer.save_pretrained(root / "imagereward")
    torch.save(imagereward_file(shaken(rewards.ImageReward.build())), root / "imagereward/ImageReward.pt")
    torch.save({"state_dict": small_openclip()[1]}, root / "hpsv2/HPS_v2.1_compressed.pt")
    layers = {0: (24, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    head = torch.nn.ModuleDict({f"{i}": torch.nn.Linear(*sizes) for i, sizes in layers.items()})
    (root / "aesthetic/head").mkdir()
    head = {f"layers.{key}": x for key, x in shaken(head).state_dict().items()}
    torch.save(head, root / "aesthetic/head/aesthetic-model.pth")
    return {**{name: str(root / name) for name in rewards.REWARDS}, "ocr": str(TINY)}


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """small(name, batch): a reward, with a small model of its kind."""
    with pytest.MonkeyPatch.context() as patch:
        folders = save_small_models(tmp_path_factory.mktemp("models"), patch)
        yield lambda name, batch=16: rewards.load(f"{name}@{folders[name]}", CPU, batch)


MODELS = "clipscore pickscore hpsv2 aesthetic imagereward vlm unifiedreward geneval".split()
ODD = [picture(1), picture(2, (40, 40)), picture(3, (1, 1)), picture(4, (1, 5000)),
       picture(5, (33, 90)).convert("L"), picture(6, (50, 20)).convert("RGBA"), picture(flat=True)]
TEXTS = ["a cat and a dog", "", "<|image_pad|>", "\u732b\u3068\u72ac", "two red birds " * 60, "{brace}", " "]
SIGHTS = "hot dog", "handbag", "bottle", "sports ball", "tennis racket", "hot dog", "bottle"  # what it sees
ENTRIES = [{"tag": "colors", "include": [{"class": name, "count": count, "color": color}]}
           for name, count, color in zip(SIGHTS, (12, 9, 4, 10, 3, 2, 5), rewards.COLORS)]
NEAR = dict(rtol=1e-3, atol=1e-4)


@parametrize("name", MODELS)
def test_models_score_images_of_any_size_and_any_text(small, monkeypatch, name):
    """Neither the batch nor the neighbours change a score; another prompt does. Its <marks> are letters."""
    monkeypatch.setattr(rewards, "final_score", lambda reply: 1 + zlib.crc32(reply.encode()) % 4001 / 1000)
    in_pairs, reward, batch = small(name, 2), small(name, 7), (ODD, TEXTS, ENTRIES)
    scores = reward(*batch)
    assert scores.shape == (7,) and scores.isfinite().all() and scores.unique().numel() > 1
    assert_close(in_pairs(*batch), scores, **NEAR)
    for order in ([3], [3, 0, 6, 1, 5, 2, 4]):
        assert_close(reward(*([items[i] for i in order] for items in batch)), scores[order], **NEAR)
    crossed = reward(ODD, TEXTS[1:] + TEXTS[:1], ENTRIES[1:] + ENTRIES[:1])
    assert (name == "aesthetic") == torch.allclose(crossed, scores, **NEAR)


def test_hpsv2_computes_what_openclip_does(small):
    """Query, key and value apart, projections turned: the features of torch's own attention, to rounding."""
    clip, (text, _) = small("hpsv2").clip, small_openclip()
    pixels, visual = torch.randn(2, 3, 32, 32, generator=seeded()), text.visual
    ids = clip.tokenizer(["a cat"], return_tensors="pt").input_ids  # the last one ends the text
    with torch.no_grad():
        x = visual.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(2, 1, 32), x], 1) + visual.positional_embedding
        x = visual.ln_post(visual.transformer(visual.ln_pre(x))[:, 0]) @ visual.proj
        assert_close(clip.model.get_image_features(pixels).pooler_output, x, **NEAR)
        x, n = text.token_embedding(ids), ids.shape[1]
        x = text.transformer(x + text.positional_embedding[:n], torch.full((n, n), -math.inf).triu(1))
        x = text.ln_final(x[:, -1]) @ text.text_projection
        assert_close(clip.model.get_text_features(ids).pooler_output, x, **NEAR)


def test_the_true_architectures_are_the_published_ones():
    """Parameters as OpenCLIP counts them in ViT-H-14; ImageReward's file has its own depth and widths."""
    import runpy
    from transformers import CLIPConfig, CLIPModel
    true = runpy.run_path(rewards.__file__)  # a copy whose constants are not scaled down
    with torch.device("meta"):
        clip, blip = CLIPModel(CLIPConfig(**true["HPSv2"].architecture)), true["ImageReward"].build()
    assert sum(x.numel() for x in clip.parameters()) == 986_109_441
    theirs = imagereward_file(blip)
    assert "blip.visual_encoder.blocks.23.norm2.bias" in theirs and true["GenEval"].threshold == 0.3
    assert theirs["blip.text_encoder.encoder.layer.11.crossattention.self.key.weight"].shape == (768, 1024)


@parametrize("change, message", [
    ({"ln_final.bias": None}, r"it lacks 1, as \[\('text_model.final_layer_norm.bias'"),
    ({"extra": torch.zeros(1)}, r"1 of its tensors have no place .*'extra'"),
    ({"logit_scale": torch.zeros(3)}, r"\('logit_scale', \(3,\).* lacks 1, as "),
    ({"text_projection.weight": torch.zeros(1)}, "two tensors are named"),
    ({"extra": os.mkdir}, "Weights only")])  # a function where a tensor should be
def test_weights_that_do_not_fit_or_run_code_are_refused(small, tmp_path, change, message):
    state = {key: x for key, x in {**small_openclip()[1], **change}.items() if x is not None}
    torch.save({"state_dict": state}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(OSError, match=rf"reward hpsv2: cannot load .*HPS_v2.1_compressed.pt \(.*{message}"):
        rewards.load(f"hpsv2@{tmp_path}", CPU)


@parametrize("name", ["ocr", *MODELS])
def test_weights_that_are_not_there_are_an_error_of_one_line(tmp_path, name):
    with pytest.raises(OSError, match=f"^reward {name}: cannot load .*downloads its weights") as error:
        rewards.load(f"{name}@{tmp_path}", CPU)
    assert "\n" not in str(error.value)


def test_imagereward_reads_35_tokens_and_no_padding(small):
    """Text beyond the 35th changes nothing, before it it does; padding is masked; scores are standardised."""
    reward, text = small("imagereward"), "abcdefghijklmnopqrstuvwxyz0123456"  # 33, between a start and an end
    a, b, c = scores_of(reward, [ODD[0]] * 3, [text, text + "more", text[1:]])
    assert a == b != c
    reward.length, reward.mean, reward.std = 60, 0.0, 1.0
    raw = scores_of(reward, ODD[:1], [text])[0]
    assert_close((raw - 0.1671736) / 1.0333395, a, rtol=1e-4, atol=1e-5)


def test_clips_pixels_and_scores_are_the_originals(small):
    """Shortest side resized, centre cut out, OpenAI's statistics; pickscore is the cosine times its
    temperature. HPSv2 cuts nothing: the ends of a long picture matter to it."""
    reward, image, long = small("pickscore"), picture(0, (300, 240)), picture(0, (12, 144))
    by_hand = image.resize((40, 32), Image.BICUBIC).crop((4, 0, 36, 32)).tobytes()
    x = torch.frombuffer(bytearray(by_hand), dtype=torch.uint8).view(32, 32, 3) / 255
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    x = ((x - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1)
    clip, ids = reward.clip.model, reward.clip.tokenizer(["a cat"], return_tensors="pt").input_ids
    with torch.no_grad():
        cosine = clip(ids, x[None]).logits_per_text[0] / clip.logit_scale.exp()
    score = scores_of(small("clipscore"), [image], ["a cat"])
    assert_close(score, cosine, rtol=0, atol=0.005)
    assert_close(scores_of(reward, [image], ["a cat"]) / 14.2857, score, **NEAR)
    changed = long.copy()
    changed.paste((255, 0, 0), (0, 0, 12, 27))
    apart = [scores_of(small(name), [long, changed]).diff().abs() for name in ("hpsv2", "clipscore")]
    assert apart[0] > 1e-4 > apart[1]


def test_bertscore_recall_by_hand():
    """Each token of the reference finds its nearest in the candidate: what that says besides is free."""
    x, y = [1, 0], [0, 1]
    for candidate, reference, recall in (
            ([x, y], [x, y], 1), ([x], [x, y], 0.5), ([], [x], 0), ([x, y], [x], 1), ([x], [], 0),
            ([[5, 0]], [[0.6, 0.8]], 0.6), ([y, [3, 4]], [x, [0, -2]], (0.6 - 0.8) / 2)):
        vectors = [torch.tensor(x, dtype=torch.float32).view(-1, 2) for x in (candidate, reference)]
        assert rewards.bertscore_recall(*vectors) == pytest.approx(recall)


def test_the_description_is_the_candidate_in_the_right_layers_vectors(small):
    """Those after `layer` layers of the whole model, special tokens left out."""
    from transformers import DebertaModel
    reward, asked, said = small("vlm"), [], ["The image contains a cat", "", "The image contains a cat"]
    reward.ask = lambda images, questions: asked.extend(questions) or said
    scores = scores_of(reward, ODD[:3], ["a cat", "a cat", "a cat, a dog and eleven birds"])
    assert scores[0] == pytest.approx(1, abs=1e-5) and scores[1] == 0 and scores[2] < 0.999
    assert set(asked) == {"Answer concisely: what is going on in this image?"}
    words = reward.words
    whole = DebertaModel.from_pretrained(words.name_or_path, subfolder="deberta").eval()
    with torch.no_grad():
        layers = whole(**words("a cat", return_tensors="pt"), output_hidden_states=True).hidden_states
        assert_close(reward.token_vectors(["a cat", ""]), [layers[2][0, 1:-1], torch.zeros(0, 32)], **NEAR)


def test_unifiedreward_takes_the_mark_after_final_score(small):
    """Without one it asks once more, in other words, about that picture; then it stops, quoting the reply."""
    reward, asked, replies = small("unifiedreward"), [], []
    reward.ask = lambda images, questions: asked.append(questions) or replies.pop(0)
    marks = {"Final Score: 4": 4, "Final Score: **3.75**": 3.75, "cat: 1\nFinal Score:\n2.5.": 2.5,
             "Final Score: 2 no, Final Score: 5": 5, "**Final Score:** [4]/5": 4}
    replies.append(marks)
    assert scores_of(reward, ODD[:5]).tolist() == [*marks.values()] and len(asked.pop()) == 5 and not asked
    replies += ["Final Score: 5", "well", "Final Score: 4"], ["Final Score: 2"]
    assert scores_of(reward, ODD[:3], ["a dog", "a cat", "a bird"]).tolist() == [5, 2, 4]
    first, again = asked
    assert len(again) == 1 and "Text Caption: [a cat]" in again[0] and again[0] not in first
    for reply in ("", "4", "as I said", *(f"Final Score: {mark}" for mark in ("good", 0, 6, 77, -3, "- 3"))):
        replies += [reply], [reply]
        with pytest.raises(rewards.RewardError, match=f"unifiedreward failed: .*no mark .*'{reply}'$"):
            scores_of(reward, ODD[:1])


# GenEval

PLACES = {"": (40, 40, 60, 60), "left": (0, 40, 20, 60), "right": (80, 40, 99, 60)}


def seen(objects):
    """{class: [Found]} from words `class:place:color`, best first."""
    found = {}
    for name, place, color, *_ in (f"{word}::".split(":") for word in objects.split()):
        found.setdefault(name, []).append(rewards.Found(0.9, PLACES[place], None, color or None))
    return found


def want(name, count=1, **more):
    return {"class": name, "count": count, **more}


def entry(tag, *include, **more):
    return {"tag": tag, "include": list(include), **more}


CAT, BOTH = entry("single_object", want("cat")), entry("two_object", want("cat"), want("dog"))
CATS = entry("counting", want("cat", 3), exclude=[want("cat", 4)])
RED = entry("colors", want("cat", color="red"))
PAIR = entry("color_attr", want("cat", color="red"), want("dog", color="blue"))
PLACED = entry("position", want("dog"), want("cat", position=["left of", 0]))
RED_PLACED = entry("position", want("dog"), want("cat", color="red", position=["left of", 0]))


@parametrize("asked, objects, strict, credit", [
    (CAT, "", False, 0), (CAT, "cat cat cat cat", True, -2), (BOTH, "cat", False, 1 / 2),
    (BOTH, "cat dog", True, 1), (CATS, "cat cat", False, 2 / 3), (CATS, "cat cat cat", True, 1),
    (CATS, "cat cat cat cat", False, 2 / 3), (RED, "cat::red", True, 1), (RED, "cat::blue", False, 1 / 2),
    (RED, "cat::red cat::blue", True, 0), (RED, "cat::blue cat::red", False, 0), (PLACED, "", False, 0),
    (PAIR, "cat::blue dog::red", False, 1 / 2), (PLACED, "cat dog:right", True, 1),
    (PLACED, "cat:right dog:left", False, 2 / 3), (PLACED, "cat", False, 1 / 3),
    (PLACED, "cat cat:right dog:right", True, 1 / 3), (PLACED, "cat dog:left dog:right", False, 1 / 3),
    (RED_PLACED, "cat::red dog:right", True, 1), (RED_PLACED, "cat::blue dog:right", False, 2 / 3),
    (RED_PLACED, "cat:right:red dog:left", False, 3 / 4)])
def test_genevals_verdicts_on_hand_made_detections(asked, objects, strict, credit):
    """Strict as the benchmark, which does not mind too many; in part for training. Color before position."""
    assert rewards.as_asked(seen(objects), asked) is strict
    assert rewards.partial_credit(seen(objects), asked) == pytest.approx(credit)


@parametrize("box, expected", [
    ((0, 40, 20, 60), {"left of"}), ((80, 40, 100, 60), {"right of"}), ((40, 0, 60, 20), {"above"}),
    ((40, 80, 60, 100), {"below"}), ((0, 0, 20, 20), {"left of", "above"}), ((40, 40, 60, 60), set()),
    ((44, 40, 64, 60), set()), ((80, 52, 100, 72), {"right of"}),
    ((50, 40, 70, 60), {"right of"}), ((47, 40, 67, 60), set())])  # 6 of 10 are left, but 3 of 7
def test_genevals_positions(box, expected):
    """Of a box to (40, 40, 60, 60): by centres, with a dead zone of a tenth of both sides, 4 pixels."""
    assert rewards.relations(box, (40, 40, 60, 60)) == expected


def test_objects_from_hand_made_logits(small):
    """The score is class x mean mask probability; best first, 16 of a class; only sure ones are counted."""
    classes, masks, reward = torch.full((4, 81), -9.0), torch.full((4, 8, 16), -9.0), small("geneval")
    classes[0, 15] = classes[1, 15] = classes[3, 80] = 9.0  # two cats, and a query for nothing
    classes[2, 16] = -8.0  # a dog, hardly
    masks[0, 2:4, 3:7], masks[1, 5:8, 10:16] = 1.0, 9.0
    reward.threshold = 0.3

    def found(size=(16, 8), tag="colors", queries=slice(None)):
        reward.detector = lambda pixel_values: SimpleNamespace(
            class_queries_logits=classes[None, queries], masks_queries_logits=masks[None, queries])
        return reward.detect([picture(size=size)], [tag])[0]

    (name, (sure, other)), = found().items()
    assert name == "cat" and sure.box == (10, 5, 16, 8) and other.box == (3, 2, 7, 4)
    assert sure.mask.sum() == 18 and other.score == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-3)
    assert len(found(tag="counting")["cat"]) == 1 and len(found(queries=[1] * 20)["cat"]) == 16
    assert found((32, 16))["cat"][0].mask.shape == (16, 32)  # in pixels of the picture
    classes[0, 16] = 9.0  # a query that may be both
    assert set(found()) == {"cat", "dog"}
    masks[:] = -9
    assert found() == {} and reward(ODD[:1], ["a red cat"], [RED]) == 0


def test_colors_are_named_from_the_object_on_grey(small):
    """The crop is the object's box with all around it in #999; each object gets the color nearest to it."""
    red, blue = (Image.new("RGB", (8, 8), name) for name in ("red", "blue"))
    reward, crops, colors, mask = small("geneval"), [], rewards.COLORS, torch.zeros(8, 8, dtype=torch.bool)
    mask[2:6, 3:5] = True
    reward.clip = SimpleNamespace(
        texts=lambda texts: torch.eye(10)[[i for x in texts for i in range(10) if f" {colors[i]}" in x]],
        images=lambda images: crops.extend(images) or torch.eye(10)[
            [0 if x.getpixel((1, 0)) == (255, 0, 0) else 4 for x in images]])
    objects = [{"cat": [rewards.Found(1.0, (2, 2, 6, 6), mask) for _ in range(count)]} for count in (2, 1, 0)]
    reward.detect = lambda images, tags: objects
    reward([red, blue, red], ["a red cat"] * 3, [RED] * 3)
    assert [[x.color for x in found["cat"]] for found in objects] == [["red", "red"], ["blue"], []]
    assert crops[0].size == (4, 4) and crops[0].getpixel((0, 0)) == (153, 153, 153)


def test_genevals_table(small):
    """The share of strict verdicts of each task, and the mean over tasks, not over pictures."""
    reward = small("geneval")
    reward.detect = lambda images, tags: [seen("cat cat cat"), seen("cat"), seen("cat dog")]
    assert reward(ODD[:3], TEXTS[:3], [CATS, CATS, BOTH]).tolist() == pytest.approx([1, 1 / 3, 1])
    assert reward.details == {"counting": 0.5, "two_object": 1, "overall": 0.75}
    assert rewards.WeightedSum([(1, reward)]).tables() == {"geneval": reward.details}


@parametrize("asked, message", [
    ({}, "its tag is None.*--prompts geneval"), (entry("colour"), "its tag is 'colour', not one of single_"),
    (entry("colors"), "its include is no list"), (entry("colors", want("cat", 0)), "has no count"),
    (entry("colors", want("cat", color="mauve")), "'mauve' is none of its colors, red, "),
    (entry("position", want("cat", position=["left of", 0])), "no position relative to"),
    (entry("position", want("dog"), want("cat", position=["near", 0])), "no position"),
    (entry("position", want("dog"), want("cat", position=5)), "5 is no position"),
    (entry("counting", want("cat"), exclude=[want("cats", 2)]), "names no class")])
def test_a_prompt_without_genevals_metadata_is_refused(small, asked, message):
    reward = small("geneval")
    with pytest.raises(ValueError, match=rf"a.jsonl, line 3: the reward geneval needs .*'a cat'.*{message}"):
        reward.check(["a cat"], [{**asked, "where": "a.jsonl, line 3"}])
    with pytest.raises(rewards.RewardError, match="reward geneval failed: ValueError: prompt 1: "):
        reward(ODD[:1], ["a cat"], [asked])


def test_genevals_prompts_reach_every_task_and_class(small):
    """Disjoint splits, whatever the order of the objects; the metadata says what the words do, in English."""
    train = list(itertools.islice(rewards.prompts("geneval", "train", 0), 20000))
    held_out, parts = rewards.prompts("geneval", "eval", 0), []
    for pairs in (train, held_out):
        wants = [want for _, asked in pairs for want in asked["include"]]
        assert len({asked["tag"] for _, asked in pairs[:6]}) == 6 and len({x["class"] for x in wants}) == 80
        small("geneval").check(*zip(*pairs))
        parts.append({frozenset(p.removeprefix("a photo of ").split(" and ")) for p, _ in pairs})
    assert parts[0].isdisjoint(parts[1]) and len(held_out) == 512
    for prompt, asked in train:
        tag, first, last = asked["tag"], asked["include"][0], asked["include"][-1]
        if tag == "counting":
            assert asked["exclude"] == [want(first["class"], first["count"] + 1)]
            assert "zero one two three four".split()[first["count"]] in prompt
        elif tag == "position":
            assert re.search(f"{last['class']} {last['position'][0]} .*{first['class']}$", prompt)
        assert all(x.get("color", "") in prompt for x in asked["include"])
        assert not re.search(r"\ba [aeio]|\ban [^aeiou]|person.*color", prompt + tag)
    text = "\n".join(prompt for prompt, _ in train)
    for words in ("an umbrella", "a red umbrella", "an orange cup", "a pair of red scissors", "three knives",
                  "two pairs of skis", "three heads of broccoli", "four people", "two buses", "two benches"):
        assert re.search(rf"\b{words}\b", text), words


def test_a_reward_has_prompts_that_suit_it():
    for spec, source in {"ocr@x:2,vlm": "ocr", "compressibility,ocr": "ocr", "pickscore": "geneval",
                         "aesthetic": "animals", "vlm": "activities", "vlm,geneval": "geneval"}.items():
        assert rewards.default_prompts(spec) == source in rewards.PROMPTS


# Command line

CRD = dict(model="stabilityai/stable-diffusion-3.5-medium", dtype="auto", height=512, width=512, rank=32,
           alpha=64, beta=1, max_sequence_length=128, groups=48, group_size=24, rollout_steps=10, lr=3e-4,
           tau=math.inf, advantage_clip=5, reward_weight=1, anchor=0.1, anchor_guidance=4.5, ema=0.9,
           train_timesteps=9, anchor_adapt="reward", weight_decay=1e-4, eval_steps=40, eval_order=2,
           tie_sampler=False)
OCR = CRD | dict(preset="ocr", reward="ocr", steps_per_epoch=2, old_decay=(0, 0.25, 0.005, 0.999),
                 sampler_decay=(75, 0, 0.0075, 0.999))
GENEVAL = CRD | dict(preset="geneval", reward="geneval", steps_per_epoch=1, old_decay=(0, 0.25, 0.001, 0.5),
                     sampler_decay=(0, 0, 0.001, 0.5))
DDPO = dict(model="CompVis/stable-diffusion-v1-4", reward="compressibility", prompts="animals", images=256,
            algorithm="is", clip=1e-4, advantage_clip=5, stat_buffer=32, stat_min=16, temperature=0.2,
            keep=0.1, eta=1, noise_level=0.7, lr=3e-4, weight_decay=1e-4, ema=0.9, dtype="auto", eval_order=2)


@parametrize("script, flags, expected", [
    (crd, "", OCR), (crd, "--reward ocr@somewhere", {**OCR, "reward": "ocr@somewhere"}),
    (crd, "--reward geneval", GENEVAL),
    (crd, "--reward compressibility", {**GENEVAL, "reward": "compressibility"}),
    (crd, "--reward compressibility:2,ocr:1", dict(preset="ocr", name="crd-compressibility-2-ocr-1-seed0")),
    (crd, "--preset tiny --reward clipscore", dict(name="crd-tiny-clipscore-seed0")),
    (crd, "--preset tiny --lr 0.5 --old-decay 1 0.5 0.25 0.75 --tie-sampler --name x", PRESETS["tiny"] | dict(
        lr=0.5, old_decay=[1, 0.5, 0.25, 0.75], tie_sampler=True, name="x")),
    (ddpo, "", DDPO), (ddpo, "--reward aesthetic", dict(preset="aesthetic", prompts="animals")),
    (ddpo, "--reward vlm", dict(preset="alignment", prompts="activities")),
    (ddpo, "--reward ocr", dict(reward="ocr", prompts=None, preset=None, name="ddpo-ocr-is-seed0")),
    (ddpo, "--preset compressibility --reward ocr", dict(reward="ocr", prompts="animals")),
    (ddpo, "--preset tiny --images 48", dict(images=48, prompts="signs", guidance=1))])
def test_presets_are_the_papers(script, flags, expected):
    """Without --preset the reward decides. A preset is only defaults: every flag overrides it. The name says
    what is rewarded, or two rewards would be one run."""
    args = asdict(script.parse(flags.split()))
    assert {key: args[key] for key in expected} == expected


@parametrize("speed, expected", [(3, "bf16"), (1.4, "fp32"), (1 / 90, "fp32")])
def test_auto_takes_the_faster_precision(monkeypatch, speed, expected):
    """bf16 where a CPU multiplies 1.5 times as fast in it. The run keeps what was chosen."""
    ticks = itertools.accumulate(x for _ in range(99) for x in (0, speed, 0, 1))
    monkeypatch.setattr(rewards.time, "perf_counter", lambda: next(ticks))
    rewards.open_run(args := short(crd, dtype="auto", name="new"))
    assert args.dtype == expected


@in_both
def test_help_explains_every_setting(script, capsys):
    with pytest.raises(SystemExit):
        script.parse(["--help"])
    text = re.sub(r"\s", "", capsys.readouterr().out)
    assert all(re.sub(r"\s", "", field.type.__metadata__[0]) in text for field in fields(script.Settings))


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
    *((f"--resume runs/{script.__name__} --{flag}", f"name a run of {script.__name__}.py.* no new .*--lora")
      for flag in ("preset tiny", "model x", "rank 3", "alpha 3", "lora x")), ("--lora nowhere", "nowhere"),
    (f"--resume runs/{'crd' if script is ddpo else 'ddpo'}", f"name a run of {script.__name__}.py"),
    ("--resume nowhere", "--resume nowhere: name a run"), ("--preset huge", "--preset: .*'huge'.*'tiny'"),
    ("", "stable-diffusion-.* --preset tiny"), ("--model no/model", "no/model.*--preset tiny"),
    ("--reward beauty", "unknown reward 'beauty' .* aesthetic, clips"), ("--reward=", "unknown reward ''"),
    ("--reward ocr@", "nothing after the @"), ("--reward ocr:much", "malformed weight in 'ocr:much'"),
    ("--reward ocr:nan", "malformed weight"), ("--reward ocr:0", "every weight .* is 0"),
    ("--reward ocr,ocr:2", "comes twice"), ("--reward compressibility@here", "no weights to load"),
    ("--eval-rewards ocr@nowhere", r"ocr: cannot load nowhere/ocr-det \(no such folder"),
    ("--prompts none.txt", "cannot read the prompts in none.txt: No such file"),
    ("--prompts blank.txt", "blank.txt, line 2: the prompt is blank"),
    ("--prompts value.jsonl", "value.jsonl, line 2: not JSON"),
    ("--prompts key.jsonl", 'key.jsonl, line 2: needs an object with .*"prompt"'),
    ("--eval-every 0", "--eval-every 0: give at least 1"), ("--seed -1", "--seed -1: give at least 0"),
    ("--prompts one.txt", "one.txt has no prompt for the split"),
    ("--prompts empty.txt", "empty.txt, line 1: the prompt is blank"),
    ("--prompts a.csv", "neither .*signs.* nor a .txt"),
    (f"--prompts animals --reward ocr@{TINY}", "prompt generator animals: the reward ocr needs"),
    *((f"{flags}@{TINY}", "draw.txt, line 2: the reward ocr needs .* between double quotes") for flags in (
        "--prompts draw.txt --reward ocr", "--eval-prompts draw.txt --epochs 0 --reward ocr",
        "--eval-prompts draw.txt --eval-rewards ocr")))),
    (crd, "--groups 3 --steps-per-epoch 2", "--steps-per-epoch"), (crd, "--group-size 1", "alone"),
    (crd, "--rollout-steps 2 --train-timesteps 3", "--train-timesteps"),
    (crd, "--reward-weight 0 --anchor 0", "nothing to learn"),
    (ddpo, "--model .", "a FluxPipeline, none of StableDiffusionPipeline"),
    (ddpo, "--algorithm sf --updates 2", "--algorithm is takes several"),
    (ddpo, "--images 10", "--images .*--updates .4"), (ddpo, "--images 12", "--images .*--group-size"),
    (ddpo, "--stat-min 40", "--stat-min.* --stat-buffer"), (ddpo, "--random-steps 11", "--random-steps .11."),
    (ddpo, "--train-timesteps 4", "--train-timesteps <= --random-steps .3. <= --steps .10."),
    (ddpo, "--noise-level 0", "no log-probability")]
FILES = {"blank.txt": "one\n\nthree", "value.jsonl": '{"prompt": "one"}\n{"prompt": }', "empty.txt": "",
         "key.jsonl": '{"prompt": "one"}\n{"text": "two"}', "one.txt": "just one", "a.csv": "one",
         "draw.txt": 'a sign that says "one"\na sign\n' + "".join(f'the word "{i}"\n' for i in range(20)),
         "model_index.json": '{"_class_name": "FluxPipeline"}'}


@parametrize("script, flags, message", MISTAKES)
def test_a_users_mistake_ends_in_one_line(leave, monkeypatch, tmp_path, script, flags, message):
    """It says what was wrong and what to do, before the first image."""
    monkeypatch.chdir(tmp_path)
    for other in (crd, ddpo):
        Path(folder := f"runs/{other.__name__}").mkdir(parents=True)
        Path(folder, "args.json").write_text(json.dumps(asdict(other.Settings())))
    for name, content in FILES.items():
        Path(name).write_text(content)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(script, "generate", lambda *args, **kwargs: pytest.fail("an image was sampled"))
    toy = ["--preset", "tiny", "--reward", "compressibility"] * bool(flags and "--resume" not in flags)
    assert re.search(message, leave(script, *toy, *flags.split()))


@in_both
def test_weights_out_of_reach_end_in_one_line(leave, monkeypatch, tmp_path, script):
    """Such as those that need a licence. With `python -X dev` the traceback is left."""
    monkeypatch.chdir(tmp_path)
    refuse = Mock(side_effect=OSError("403 Client Error: gated\nand many more lines"))
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", refuse)
    message = leave(script, "--preset", "tiny", "--model", TINY, "--reward", "compressibility")
    assert "--preset tiny" in message and str(TINY) in message and "gated" in message
    monkeypatch.setattr(sys, "flags", SimpleNamespace(dev_mode=True))
    with pytest.raises(OSError, match="gated"):
        script.main()


# Pipelines

def random_pipeline(kind, true=False, depth=1):
    """Stable Diffusion 1.4 ("sd1") or 3.5 Medium ("sd3") with random weights: small, or at its true size; the
    text encoders have `depth` layers at most (the true ones 12, 32 and 24)."""
    import transformers as hf
    torch.manual_seed(0)
    sd1, size = kind == "sd1", lambda small, large: large if true else small
    tokenizer = hf.CLIPTokenizer.from_pretrained(TINY / "tokenizer", model_max_length=77)

    def clip(width, heads, layers, kind=hf.CLIPTextModelWithProjection):
        width, heads = size(16, width), size(2, heads)
        return kind(hf.CLIPTextConfig(
            vocab_size=size(len(tokenizer), 49408), hidden_size=width, intermediate_size=4 * width,
            num_hidden_layers=min(depth, layers), num_attention_heads=heads, projection_dim=width))

    channels = size((8, 16), (128, 256, 512, 512))
    vae = diffusers.AutoencoderKL(
        block_out_channels=channels, layers_per_block=size(1, 2), norm_num_groups=size(8, 32),
        down_block_types=("DownEncoderBlock2D",) * len(channels), latent_channels=4 if sd1 else 16,
        up_block_types=("UpDecoderBlock2D",) * len(channels), use_quant_conv=sd1, use_post_quant_conv=sd1,
        scaling_factor=0.18215 if sd1 else 1.5305, shift_factor=None if sd1 else 0.0609)
    if sd1:
        unet = diffusers.UNet2DConditionModel(**size(dict(
            block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=1, cross_attention_dim=16,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")), dict(cross_attention_dim=768)))
        return diffusers.StableDiffusionPipeline(
            vae, clip(768, 12, 12, hf.CLIPTextModel), tokenizer, unet, ddim_scheduler(), None, None,
            requires_safety_checker=False)
    pieces = *((token, 0.0) for token in ("<pad>", "</s>", "<unk>")), ("\u2581", -2.0)
    t5_tokenizer = hf.T5Tokenizer(vocab=[*pieces, *((chr(c), -3.0) for c in range(33, 127))])
    t5 = hf.T5EncoderModel(hf.T5Config(
        vocab_size=size(len(t5_tokenizer), 32128), d_model=size(32, 4096), d_ff=size(64, 10240),
        d_kv=size(16, 64), num_heads=size(2, 64), num_layers=min(depth, 24), feed_forward_proj="gated-gelu"))
    transformer = SD3Transformer2DModel(
        sample_size=size(16, 128), in_channels=16, num_layers=size(2, 24), attention_head_dim=size(8, 64),
        num_attention_heads=size(2, 24), joint_attention_dim=size(32, 4096), pos_embed_max_size=size(16, 384),
        caption_projection_dim=size(16, 1536), pooled_projection_dim=size(32, 2048), qk_norm="rms_norm",
        dual_attention_layers=tuple(range(size(1, 13))))
    return diffusers.StableDiffusion3Pipeline(
        transformer, diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), vae, clip(768, 12, 12), tokenizer,
        clip(1280, 20, 32), tokenizer, t5, t5_tokenizer)


# Runs

SHORT = {
    crd: {**PRESETS["tiny"], **dict(
        preset="tiny", reward="incompressibility", dtype="fp32", rank=2, groups=2, group_size=2,
        steps_per_epoch=1, rollout_steps=2, train_timesteps=1, eval_images=2, eval_steps=2, eval_every=2)},
    ddpo: {**ddpo.PRESETS["tiny"], **dict(
        preset="tiny", reward="incompressibility", dtype="fp32", rank=2, alpha=4, images=4, group_size=2,
        steps=4, random_steps=None, guidance=2.0, micro_batch=3, stat_min=2, eval_images=2, eval_every=2)}}


def short(script, **settings):
    return script.Settings(**{**SHORT[script], "eval_rewards": None, "name": "x", **settings})


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
    """A short run of an epoch: its script and folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("finished"))
        folder = request.param.train(short(request.param, name="once", epochs=1, lr=0.01))
        return request.param, folder.resolve()


@pytest.fixture
def copied(finished, run):
    """The script of that run, of which runs/x is a copy."""
    shutil.copytree(finished[1], "runs/x")
    return finished[0]


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
    """args.json, metrics, contact sheets, a curve, last/ and best/; its name is not taken twice."""
    script, folder = finished
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.*")} == {
        "args.json", "metrics.jsonl", "curve.png", "samples/epoch-0000.png", "samples/epoch-0001.png",
        *(f"{name}/{file}" for name in ("last", "best")
          for file in ("state.pt", "pytorch_lora_weights.safetensors"))}
    args = short(script, name="once", epochs=1, lr=0.01)
    assert json.loads((folder / "args.json").read_text()) == json.loads(json.dumps(asdict(args)))  # as given
    assert rewards.read_metrics(folder)[1].keys() >= {
        "reward", "loss", "sample_seconds", "reward_seconds", "train_seconds", "images_per_second", "peak_gb"}
    monkeypatch.chdir(folder.parent.parent)
    with pytest.raises(ValueError, match="runs/once .*--resume runs/once"):
        script.train(args)


@parametrize("script, settings", [(crd, dict(groups=4, steps_per_epoch=2)), (ddpo, {}), *(
    (ddpo, dict(model="sd1", algorithm=name)) for name in ("is", "sf", "rwr", "rwr-sparse"))])
def test_resume_equals_not_stopping(run, tiny_sd1, script, settings):
    """To the bit: weights, optimizer, random numbers, prompts, metrics. One evaluation more draws nothing."""
    settings = {**settings, **(tiny_sd1 if "model" in settings else {})}
    straight, _ = run(script, "straight", 2, **settings), run(script, "stopped", 1, **settings)
    found, expected, lines = state(stopped := run(script, "stopped", 2)), state(straight), metrics(stopped)
    del found["progress"]["best"], expected["progress"]["best"]  # of other evaluations
    assert_close(found, expected, rtol=0, atol=0)
    assert lines.pop(2)["split"] == "eval" and lines == metrics(straight) and len(lines) == 4
    lora = "last/pytorch_lora_weights.safetensors"
    assert (stopped / lora).read_bytes() == (straight / lora).read_bytes()
    if script is ddpo and "rwr" not in settings.get("algorithm", "is"):
        assert lines[1]["first_ratio_error"] == 0
        assert lines[1].keys() >= {"ratio_error", "clip_fraction", "approx_kl"}


@parametrize("script, settings", [
    (crd, dict(groups=4, steps_per_epoch=2)), (ddpo, dict(images=8, micro_batch=1))])
def test_two_processes_learn_what_one_does(run, script, settings):
    """From the same groups the same gradients, to float tolerance, stopped and resumed, through torchrun."""
    settings = {**settings, "lr": 1e-4}  # AdamW makes a step of mere rounding, too: keep it small
    one = run(script, "one", 2, **settings)
    Path("both.py").write_text(f"""import sys; sys.path.insert(0, {str(TINY.parent)!r})
from test_crd import {script.__name__} as script, short, torch
script.train(short(script, name="two", epochs=1, **{settings}))
torch.distributed.barrier()  # until the first process has saved
script.train(script.parse(["--resume", "runs/two", "--epochs", "2"]))""")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    subprocess.run([*torchrun, "both.py"], check=True)
    found, expected = state("runs/two"), state(one)
    moments = [torch.cat([x["exp_avg"].flatten() for x in end["optimizer"]["state"].values()])
               for end in (found, expected)]
    assert distance(*moments) < 1e-3 and torch.equal(found["rng"], expected["rng"])
    a, b = ([x for x in metrics(folder)[-2].values() if x != "train"] for folder in ("runs/two", one))
    assert a == pytest.approx(b, rel=1e-2, abs=1e-5)


@parametrize("change", [{}, dict(reward="compressibility"), dict(eval_images=3)])
def test_a_finished_run_can_be_extended(run, copied, change):
    """Judged in another way it starts a best of its own; else a best that nothing can beat stays."""
    before = torch.load("runs/x/last/state.pt", weights_only=True)
    before["progress"]["best"] = 1e9
    torch.save(before, "runs/x/last/state.pt")
    extended = run(copied, "x", 2, **change)
    assert state(extended)["progress"]["best"] == (metrics(extended)[-1]["reward"] if change else 1e9)
    assert (state(extended, "best")["progress"]["epoch"] == 2) == bool(change)
    if copied is ddpo:  # rewards of another kind would be compared with those remembered
        remembered = [len(own) for own in state(extended)["progress"]["statistics"].values()]
        assert sum(remembered) == (4 if change else 8)


@in_both
def test_the_best_can_be_looked_at_and_gone_on_from(run, monkeypatch, script):
    """Of a run whose best is its first epoch and not its second. A look leaves its curve and sheets alone."""
    bonus = iter([0, 1e4, 0, 1e4, 0])

    def measure(self, images, *args):
        more = next(bonus) if len(images) == 2 else 0  # of an evaluation; training has four
        return [sum(image.tobytes()) / 1e6 + more for image in images]

    monkeypatch.setattr(rewards.Incompressibility, "measure", measure)
    folder = run(script, "x", 2, eval_every=1, lr=0.01)
    lines, last, sheet = metrics(folder), state(folder), folder / "samples" / "epoch-0001.png"
    sheet.unlink()
    run(script, "x", 0, checkpoint="best")
    assert (folder / "samples" / "test.png").exists() and not sheet.exists()
    look = {**lines[2], "split": "test"}
    assert metrics(folder) == [*lines, look] and look["reward"] != lines[4]["reward"]
    shutil.rmtree(folder / "last")
    run(script, "x", 2, checkpoint="best")
    assert metrics(folder) == [*lines[:3], look, *lines[3:]]
    assert_close(state(folder), last, rtol=0, atol=0)


def test_a_run_starts_from_a_lora(run, leave, copied):
    """Of either algorithm, in all adapters. A run of no epochs only evaluates, and cannot be gone on with."""
    other, first = crd if copied is ddpo else ddpo, metrics("runs/x")
    look, = metrics(folder := run(copied, "look", 0, lora="runs/x/last"))
    assert look["split"] == "eval" and look["reward"] == first[-1]["reward"] != first[0]["reward"]
    assert not list(folder.rglob("*.pt"))
    assert "runs/look/last/state.pt" in leave(copied, "--resume", folder, "--epochs", 1)
    plain, from_lora = (run(other, name, 0, lora=lora) for name, lora in (("a", None), ("b", "runs/x/last")))
    assert metrics(plain)[0]["reward"] != metrics(from_lora)[0]["reward"]
    if copied is crd:
        adapters = list(state(run(crd, "still", 1, lora="runs/x/last", lr=0.0))["adapters"].values())
        assert any(x["B.old"].any() for x in adapters)
        assert all(torch.equal(x["B.policy"], x[f"B.{name}"]) for x in adapters for name in ADAPTERS)


@in_both
def test_unseen_rewards_are_logged_side_by_side(run, script, monkeypatch, capsys):
    """Under their own names at every evaluation, with a benchmark's details, as are the parts of a sum. They
    are never trained on; what is trained on anyway is not scored twice."""
    table = {"counting": 0.5, "overall": 0.75}
    for kind in (rewards.Incompressibility, rewards.OCR):
        monkeypatch.setattr(kind, "details", table)
    Path("drawn.txt").write_text('a red "cube"\na blue "cube"\n"three" dogs\n')
    folder = run(script, "seen", 1, reward=f"compressibility:2,ocr@{TINY}", eval_prompts="drawn.txt",
                 eval_rewards=f"compressibility,incompressibility,ocr@{TINY}/judge")
    before, train, after = metrics(folder)
    for line in (before, after):
        assert line["reward"] == pytest.approx(2 * line["compressibility"] + line["ocr"])
        assert line["compressibility"] == -line["incompressibility"] and 0 <= line["ocr (unseen)"] <= 1
        for name in ("compressibility", "incompressibility", "ocr", "ocr (unseen)"):
            assert line[f"{name} details"] == table
    assert "compressibility details: counting 0.500  overall 0.750" in capsys.readouterr().out
    assert train.keys().isdisjoint(("ocr (unseen)", "incompressibility")) and "ocr" in train


def full(*args, **settings):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has a total of 15 GiB.")


@parametrize("target, fault, message", [
    ("LOSS", lambda x, *args, **settings: (0 * x).sum().sqrt(), "norm nan"),  # 0, of slope 0 times infinity
    ("LOSS", lambda x, *args, **settings: x.sum() * math.nan, "loss is nan"),
    ("rewards.Incompressibility.measure", lambda self, images, *args: [math.nan] * len(images), "gave nan"),
    ("rewards.Incompressibility.measure", Mock(side_effect=KeyboardInterrupt), "stopped"),
    ("LOSS", full, "in train (CUDA out of memory. Tried to allocate 2 GiB): try a smaller --micro-batch"),
    ("diffusers.AutoencoderKL.decode", full, "out of memory in decode"),
    ("rewards.Incompressibility.measure", full, "try a smaller --reward-batch"),
    ("torch.save", lambda state, path: Path(path).write_bytes(b"half") and os.listdir("no disk"), "no disk")])
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
    ("sampler", dict(reward_weight=0.0, anchor_guidance=1.0, ema=0.0))])
def test_every_switch_runs(run, monkeypatch, sampler, switch):
    """Images come from `sampler`, from `old` when tied, evaluations from `ema`."""
    drawn, generate = [], crd.generate

    def spy(pipe, *args, **kwargs):
        drawn.append({m.active for m in pipe.transformer.modules() if isinstance(m, crd.LoRALinear)}.pop())
        return generate(pipe, *args, **kwargs)

    monkeypatch.setattr(crd, "generate", spy)
    run(crd, "switch", 1, **switch)  # a loss that is not finite would stop it
    assert drawn == ["ema", sampler, "ema"]


@parametrize("script, settings, most", [(crd, dict(anchor=0.0), 12), (ddpo, {}, 10)])
def test_compile_makes_one_graph_for_each_kind_of_block(run, monkeypatch, script, settings, most):
    """In each use that an epoch makes of it, and none after the first. The toy has four blocks of two kinds:
    the last passes no text on."""
    graphs, counts, log = [], [], rewards.log_epoch
    monkeypatch.setattr(torch, "compile", functools.partial(
        torch.compile, backend=lambda graph, inputs: graphs.append(graph) or graph.forward))
    monkeypatch.setattr(rewards, "log_epoch", lambda *args: counts.append(len(graphs)) or log(*args))
    torch._dynamo.reset()
    run(script, "compiled", 2, compile=True, **settings)
    assert 0 < counts[0] == counts[1] <= most


def test_compiled_blocks_compute_the_same():
    """With both kinds of adapter, with gradients and without, by the CPU's compiler."""
    model = small_transformer(1)
    layers = with_lora(model)

    def use(adapter, grad):
        model.zero_grad()
        with crd.use_adapter(layers, adapter):
            v = predict(model, grad)
        if grad:
            v.square().sum().backward()
        return v.detach(), gradients(layers) if grad else None

    uses = ("old", False), (None, False), ("policy", True)
    expected = [use(*how) for how in uses]
    block, = model.transformer_blocks
    block.forward = torch.compile(block.forward)
    for how, (v, gradient) in zip(uses, expected):
        found = use(*how)
        assert_close(found[0], v, rtol=1e-4, atol=1e-5)
        assert gradient is None or distance(found[1], gradient) < 1e-4


def test_the_average_is_judged_and_saved(run):
    """After a step of (1 + 1) / (10 + 1) decay; at --ema 0 it is the policy itself."""
    for ema, share in ((0.9, 9 / 11), (0.0, 1.0)):
        folder = run(crd, f"ema-{ema}", 1, lr=0.01, ema=ema)
        saved = load_file(folder / "last" / "pytorch_lora_weights.safetensors")
        for name, layer in state(folder)["adapters"].items():
            assert_close(layer["B.ema"], share * layer["B.policy"], rtol=1e-5, atol=1e-9)
            assert_close(saved[f"transformer.{name}.lora_B.weight"], 16 * layer["B.ema"])  # alpha / rank


def test_both_scripts_judge_with_the_same_solver(run):
    """Of either order. (In four steps, say, the guard leaves nothing of the second.)"""
    settings = {crd: dict(eval_steps=10, eval_guidance=2.0), ddpo: dict(steps=10, guidance=2.0)}
    shared = dict(eval_images=4, reward=f"clipscore@{TINY}/clip")
    runs = [run(script, f"{script.__name__}-{order}", 0, eval_order=order, **shared, **more)
            for order in (1, 2) for script, more in settings.items()]
    a, b, c, d = (metrics(folder)[0]["reward"] for folder in runs)
    assert a == pytest.approx(b, abs=1e-4) and c == pytest.approx(d, abs=1e-4) and abs(a - c) > 1e-3


def test_a_pipeline_with_t5_loads_and_encodes(tmp_path):
    """Stable Diffusion 3.5's third text encoder: CLIP's tokens, then --max-sequence-length of T5's."""
    random_pipeline("sd3").save_pretrained(tmp_path)
    args = short(crd, model=str(tmp_path), max_sequence_length=7)
    embeds, pooled = crd.encode(crd.load_pipeline(args, CPU), ["hello", "a cat"], args)
    assert embeds.shape == (2, 77 + 7, 32) and pooled.shape == (2, 32)
    assert (embeds[0, 77:] - embeds[1, 77:]).abs().max() > 0


@parametrize("script, settings", [
    (crd, dict(groups=8, group_size=12, sample_batch=96, rollout_steps=4, steps_per_epoch=4, eval_steps=4,
               train_timesteps=2, anchor=0.0)),
    (ddpo, dict(images=96, group_size=12, guidance=1.0, micro_batch=96, clip=1e-2))])
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
    _, log_prob = ddpo.ddim_step(output.requires_grad_(), x, generator=seeded(), **place)
    assert not eta or torch.autograd.grad(log_prob.sum(), output)[0].abs().max() > 0  # what is drawn is fixed
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
    random_pipeline("sd1").save_pretrained(path := tmp_path_factory.mktemp("sd1"))
    return dict(model=str(path), width=32)


def family_with_lora(model, std=0.1, **settings):
    """A model family whose update is away from zero, and its conditions for three prompts and for none."""
    family = ddpo.load_family(short(ddpo, **model, **settings), CPU)
    torch.manual_seed(0)
    layers = trained(ddpo.add_lora(family.network, family.target_modules, 2, 6), std)
    cond, uncond = ddpo.encode(family, ["a cat", "a dog", "a cat"]), ddpo.encode(family, [""])
    return family.args, family, layers, cond, uncond


def start(family, args, count=3):
    """x_T of some images."""
    scale = family.pipe.vae_scale_factor
    shape = family.network.config.in_channels, args.height // scale, args.width // scale
    return torch.randn(count, *shape, generator=seeded())


@parametrize("model, dtype, guidance", [("sd1", "fp32", 1.0), ("sd1", "bf16", 3.0), ("sd3", "fp32", 3.0)])
def test_the_first_ratio_is_exactly_one(tiny_sd1, model, dtype, guidance):
    """Sampling and training compute the very same numbers, gradients or not, checkpointed or not. Micro-
    batches, checkpoints and the order of the steps change no gradient."""
    model = tiny_sd1 if model == "sd1" else {}
    args, family, layers, cond, uncond = family_with_lora(model, dtype=dtype, guidance=guidance)
    noise, shares, R = start(family, args), [torch.arange(3)], args.random_steps
    args.micro_batch = 2
    x0, states, log_probs = ddpo.rollout(family, noise, cond, uncond, shares, args, seeded())
    assert states.shape == (3, R + 1, *noise.shape[1:]) and log_probs.isfinite().all()

    def step(steps=range(R), micro_batch=2):
        family.network.zero_grad()
        args.micro_batch = micro_batch
        return ddpo.policy_gradients(family, states, log_probs, torch.tensor([1.5, -0.5, 0.3]), cond, uncond,
                                     shares[0], steps, args), gradients(layers)

    plain = step()
    ddpo.checkpoint_blocks([m for m in family.network.modules() if type(m).__name__ in family.blocks], layers)
    again, others = step(range(R)[::-1]), step(micro_batch=1)[1]
    for logs, gradient in (plain, again):
        assert logs["ratio_error"] == logs["approx_kl"] == 0
    if dtype == "fp32":
        assert distance(again[1], plain[1]) < 1e-4 and distance(others, plain[1]) < 2e-4
    layers[next(iter(layers))].B["policy"].data += 0.1
    logs, _ = step()
    assert logs["ratio_error"] > 0 and logs["approx_kl"] > 0


@parametrize("model", ["sd1", "sd3"])
def test_an_ode_ends_the_walk(tiny_sd1, model):
    """After the random steps there is no noise: what was drawn is the step that nobody drew. Every output is
    guided: out(uncond) + w (out(c) - out(uncond)), for a step or a step an image."""
    args, family, _, cond, uncond = family_with_lora(tiny_sd1 if model == "sd1" else {}, random_steps=2)
    noise, nothing = start(family, args), [e.expand(3, *e.shape[1:]) for e in uncond]
    x0, states, _ = ddpo.rollout(family, noise, cond, uncond, [torch.arange(3)], args, seeded())
    with torch.no_grad():
        g, x = seeded(), noise
        for i in range(args.steps):
            assert i > 2 or torch.equal(states[:, i], x)
            output = ddpo.guided(family, x, i, cond, uncond, args.guidance)
            x, _ = family.step(output, x, i, noise=float(i < 2), generator=g)
        assert torch.equal(x0, x) and states.shape[1] == 3
        for i in (1, torch.tensor([0, 1, 3])):
            with_prompt, without = family.predict(noise, i, cond), family.predict(noise, i, nothing)
            assert_close(ddpo.guided(family, noise, i, cond, uncond, 3.0),
                         without + 3 * (with_prompt - without), rtol=1e-3, atol=1e-3)


@parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_baselines_noise_images_to_the_samplers_levels(tiny_sd1, prediction_type):
    """A UNet's variance is preserved; a flow's images lie on the straight path to noise, in both scripts."""
    x0, noise, i = *velocities(2)[:2].float(), torch.tensor([1, 3])
    family = family_with_lora(tiny_sd1)[1]
    family.prediction_type, alpha = prediction_type, family.alphas_cumprod[family.t[i]].view(-1, 1, 1, 1)
    a, b = alpha.sqrt(), (1 - alpha).sqrt()
    target = noise if prediction_type == "epsilon" else a * noise - b * x0
    assert_close(family.add_noise(x0, noise, i), (a * x0 + b * noise, target))
    flow = family_with_lora({})[1]
    x, u = flow.add_noise(x0, noise, i)
    assert_close((x, u), (x0 + flow.sigmas[i].view(-1, 1, 1, 1) * u, noise - x0))
    assert_close(x, crd.add_noise(x0, noise, flow.sigmas[i]))


def test_a_scheduler_whose_last_step_has_no_noise_is_refused(tiny_sd1):
    family = ddpo.load_family(short(ddpo, **tiny_sd1), CPU)
    family.pipe.scheduler.register_to_config(timestep_spacing="linspace")
    with pytest.raises(ValueError, match="ends at timestep 0"):
        ddpo.StableDiffusion(family.pipe, family.args, CPU)


@parametrize("model, algorithm, expected", [
    ("sd1", "is", (50, 50, 5.0, 4, 50)), ("sd1", "sf", (50, 50, 5.0, 1, 50)),
    ("sd3", "is", (10, 9, 4.5, 4, 9)), ("sd3", "rwr", (10, 9, 4.5, 4, 10))])
def test_the_family_fills_in_what_is_not_given(tiny_sd1, model, algorithm, expected):
    settings = dict(steps=None, guidance=None, algorithm=algorithm, **(tiny_sd1 if model == "sd1" else {}))
    args = ddpo.load_family(short(ddpo, **settings), CPU).args
    assert (args.steps, args.random_steps, args.guidance, args.updates, args.train_timesteps) == expected


@parametrize("config", [{}, dict(r=4, lora_alpha=7)])
@in_both
def test_a_lora_gives_the_same_image_in_diffusers(tiny_sd1, tmp_path, script, config):
    """pipe.load_lora_weights takes a saved one as it is, scale and all; one of diffusers, with an alpha of
    its own, is as strong here as there. Of a transformer and of a UNet, through diffusers' own sampler."""
    pytest.importorskip("peft", reason="peft is not installed; diffusers needs it for load_lora_weights")
    path, model = tmp_path / "pytorch_lora_weights.safetensors", tiny_sd1 if script is ddpo else {}
    args = short(ddpo, **model)
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


def test_the_policy_gradient_is_the_gradient_of_the_expected_reward(tiny_sd1, monkeypatch):
    """The score function, over many images, agrees with backpropagation through the whole chain."""
    R, N, g, reward = 2, 2048, seeded(1), lambda x0: x0[:, :3].mean((1, 2, 3))
    args, family, layers, _, uncond = family_with_lora(
        tiny_sd1 | dict(width=4), algorithm="sf", height=4, random_steps=R, guidance=1.0)
    cond, rows, args.micro_batch = [e.expand(N, *e.shape[1:]) for e in uncond], torch.arange(N), N
    noise = start(family, args, N)
    x0, states, log_probs = ddpo.rollout(family, noise, cond, uncond, [rows], args, g)
    A = reward(x0) - reward(x0).mean()
    ddpo.policy_gradients(family, states, log_probs, A, cond, uncond, rows, range(R), args)
    estimate, x = -gradients(layers) * R * noise[0].numel(), noise  # log p was averaged over both
    family.network.zero_grad()
    monkeypatch.setattr(torch.Tensor, "detach", lambda x: x)  # what was drawn depends on the policy here
    for i in range(args.steps):
        for p in policy(layers):
            p.requires_grad_(i < R)  # after the random steps the policy counts as a part of the world
        output = ddpo.guided(family, x, i, cond, uncond, 1.0)
        x, _ = family.step(output, x, i, noise=float(i < R), generator=g)
    for p in policy(layers):
        p.requires_grad_(True)
    reward(x).mean().backward()
    exact = gradients(layers)
    assert torch.cosine_similarity(estimate, exact, 0) > 0.85
    assert 0.7 < torch.dot(estimate, exact) / exact.square().sum() < 1.4


# Memory, computed: on fake tensors, which have shapes and no numbers

class Memory(TorchDispatchMode):
    """Follows the bytes of every storage from birth to death, and of modules that move to a device."""

    def __init__(self):
        super().__init__()
        self.now, self.peak, self.known = 0, 0, weakref.WeakSet()

    def add(self, count):
        self.now += count
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default:  # .item(), bool()
            return 0
        result = function(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_iter(result) if isinstance(x, torch.Tensor)):
            if storage not in self.known:
                self.known.add(storage)
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def move(self, module, device):
        size = sum(x.numel() * x.element_size() for x in (*module.parameters(), *module.buffers()))
        self.add(-size if device == "cpu" else size)
        return module


def peaks(script, *flags):
    """{phase: the most bytes on the GPU} of a run with these flags, at the true size of its model.

    Attention is as memory-efficient as the CPU's kernel. Not counted: reward models, CUDA itself (half a GB),
    and what the allocator leaves unused.
    """
    args, found = script.parse(["--dtype", "bf16", *flags]), {}
    with (FakeTensorMode(allow_non_fake_inputs=True), Memory() as memory,
          pytest.MonkeyPatch.context() as patch):
        torch.set_default_dtype(torch.bfloat16)
        pipe = random_pipeline("sd3" if "3.5" in args.model else "sd1", true=True, depth=99)
        torch.set_default_dtype(torch.float32)
        for p in pipe.vae.parameters():
            p.data = p.data.float()
        pipe.image_processor = SimpleNamespace(postprocess=list)
        config = {"_class_name": type(pipe).__name__}
        patch.setattr(diffusers.DiffusionPipeline, "load_config", lambda *args: config)
        patch.setattr(diffusers.DiffusionPipeline, "from_pretrained", lambda *args, **options: pipe)
        patch.setattr(torch.nn.Module, "to", lambda module, device: memory.move(module, device))
        memory.now = memory.peak = 0  # so far all is on the CPU

        def phase(name, function, *args):
            memory.peak = memory.now
            result = function(*args)
            found[name] = memory.peak
            return result

        if script is crd:
            model, encode = crd.load_pipeline(args, CPU), functools.partial(crd.encode, pipe, args=args)
            network, targets, adapters = model.transformer, TARGET_MODULES, ADAPTERS
            blocks, prompts, N = network.transformer_blocks, args.groups, args.groups * args.group_size
        else:
            model = ddpo.load_family(args, CPU)
            args, encode, network = model.args, functools.partial(ddpo.encode, model), model.network
            targets, adapters, prompts, N = model.target_modules, ("policy", "ema"), args.images, args.images
            blocks = [module for module in network.modules() if type(module).__name__ in model.blocks]
        found["load"] = memory.peak
        layers = script.add_lora(network, targets, args.rank, args.alpha, adapters)
        if args.grad_checkpoint:
            script.checkpoint_blocks(blocks, layers)
        kept = [torch.zeros_like(p) for p in network.parameters() if p.requires_grad for _ in "mv"]  # AdamW
        noise, x0 = torch.zeros(2, N, network.config.in_channels, args.height // 8, args.width // 8)
        batch, rows = phase("encode", encode, ["a"] * 64), torch.arange(args.micro_batch)
        cond, uncond, held_out = ([t[:1].repeat(n, *[1] * (t.ndim - 1)) for t in batch]
                                  for n in (prompts, 1, args.eval_images))
        kept += held_out
        if script is crd:
            K, B, one = args.group_size, args.sample_batch, [t[:1] for t in cond]
            phase("rollout", crd.generate, pipe, noise[:B], 2, one, B)
            u, x = torch.zeros(2, *noise[::args.steps_per_epoch].shape)  # of a step's share
            phase("train", crd.accumulate_gradients, network, layers, x0[:K], noise[:K], SIGMA, one, uncond,
                  SIGMA.expand(K), SIGMA.expand(K), 1.0, args)
        else:
            kept.append(states := torch.zeros(N, args.random_steps + 1, *x0.shape[1:]))
            phase("rollout", ddpo.rollout, model, noise[:len(rows)], cond, uncond, [rows],
                  replace(args, steps=2, random_steps=2))
            phase("train", ddpo.policy_gradients, model, states, x0[:, 0, :, 0], x0[:, 0, 0, 0], cond, uncond,
                  rows, [0], args)
        phase("decode", script.decode, model, x0[:args.decode_batch], args.decode_batch)
    return found


def test_the_presets_fit_a_gpu_of_16_gb():
    """In every phase, with a GB to spare. (Of true size: 2.24 and 0.86 billion frozen parameters.)"""
    for script, flags, weights in ((crd, ["--reward", "ocr"], 2.24e9), (ddpo, [], 0.86e9)):
        found = peaks(script, *flags).values()
        assert len(found) == 5 and 2 * weights < min(found) and max(found) < 15e9


# The README

def test_the_readme_points_at_the_code():
    """Every link to lines of a file is to those of the function that it names."""
    readme = Path(__file__).with_name("README.md").read_text()
    links = re.findall(r"\[`(\w+)`\]\((\w+)\.py#L(\d+)-L(\d+)\)", readme)
    assert len(links) > 10
    for name, file, first, last in links:
        lines, start = inspect.getsourcelines(getattr(sys.modules[file], name))
        assert (int(first), int(last)) == (start, start + len(lines) - 1), (name, file)


if __name__ == "__main__" and sys.argv[1:] == ["memory"]:  # python test_crd.py memory
    rewards.hush()
    sizes = "", "--micro-batch 12", "--micro-batch 8 --sample-batch 8 --decode-batch 2"
    rows = [(crd, f"--reward ocr {size}{off}") for off in ("", " --no-grad-checkpoint") for size in sizes]
    rows += [(ddpo, ""), (ddpo, "--no-grad-checkpoint"), (ddpo, "--decode-batch 2")]
    for script, flags in rows:
        found = {phase: f"{size / 1e9:.1f}" for phase, size in peaks(script, *flags.split()).items()}
        print(f"{script.__name__}.py {flags}".ljust(85), "GB, computed:", found, flush=True)
