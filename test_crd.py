"""What CRD and DDPO claim, each claim a test that fails when the line it guards is broken.

CPU only, no network.

    python -m pytest -q test_crd.py
    python test_crd.py                 # not a test: an epoch's time over that of its bare model calls
    python test_crd.py rewards         # nor this: images a second of each reward, with small models
"""

import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import statistics
import sys
import tempfile
import time
import zlib
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports that read it

import pytest  # noqa: E402
import torch  # noqa: E402
from diffusers import DDIMScheduler, SD3Transformer2DModel  # noqa: E402
from PIL import Image  # noqa: E402
from torch.testing import assert_close  # noqa: E402

import crd  # noqa: E402
import ddpo  # noqa: E402
import rewards  # noqa: E402
from crd import PRESETS, TARGETS, Settings  # noqa: E402

TINY = Path(__file__).parent / "tiny-sd3"
CPU = torch.device("cpu")
parametrize = pytest.mark.parametrize


# ---------------------------------------------------------------------------------------------- a small model

def small_transformer(blocks=2):
    """An SD3.5-style transformer with random weights; its first block has the second attention, attn2."""
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=blocks, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16,
        pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm").eval().requires_grad_(False)


def with_lora(model, rank=2, alpha=6):
    """LoRA on the model with all three adapters away from zero, as if trained, each its own way."""
    layers = crd.add_lora(model, TARGETS, rank, alpha)
    for layer in layers.values():
        for name in layer.B:
            layer.B[name].data = 0.3 * torch.randn_like(layer.B[name])
    return layers


def inputs(count, seed=1):
    """x0, noise (count, 4, 8, 8) and conditions for small_transformer."""
    g = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, count, 4, 8, 8, generator=g)
    return x0, noise, (torch.randn(count, 3, 16, generator=g), torch.randn(count, 16, generator=g))


EMPTY = [t[:1] for t in inputs(1, seed=9)[2]]
SIGMA = torch.tensor(0.7)


def predict(model, count=2, grad=False):
    """The velocity at sigma 0.5. (With grad torch may pick other kernels: never compare the two.)"""
    x0, _, cond = inputs(count)
    cond = [t.to(model.dtype) for t in cond]
    with torch.set_grad_enabled(grad):
        return crd.velocity(model, x0, torch.tensor(0.5), cond)


def gradients(layers):
    """The policy's gradients as one vector."""
    return torch.cat([p["policy"].grad.flatten() for layer in layers.values() for p in (layer.A, layer.B)])


def distance(a, b):
    """|a - b| / |b|: two gradients that only rounding tells apart are under 1e-4 of each other."""
    return (a - b).norm() / b.norm()


# ------------------------------------------------------------------------------------------------------- LoRA

def test_lora_starts_as_the_identity():
    """A fresh adapter changes no output, and yet it can learn."""
    model = small_transformer()
    before = predict(model)
    layers = crd.add_lora(model, TARGETS, 2, 4)
    for name in ("policy", "old", "sampler"):
        with crd.use_adapter(layers, name):
            assert torch.equal(predict(model), before)
    predict(model, grad=True).square().mean().backward()
    assert gradients(layers).abs().max() > 0


def test_switched_off_is_the_pretrained_model_to_the_bit():
    """However the adapters were trained, without them the model is the one that was downloaded."""
    model = small_transformer()
    before = predict(model)
    layers = with_lora(model)
    with crd.use_adapter(layers, None):
        assert torch.equal(predict(model), before)
    outputs = []
    for name in ("policy", "old", "sampler"):
        with crd.use_adapter(layers, name):
            outputs.append(predict(model))
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(outputs, outputs[1:] + [before]))


def test_merging_gives_the_same_output():
    """W + (alpha / rank) B A is the adapted layer."""
    model = small_transformer()
    layers = with_lora(model)
    adapted = predict(model)
    for layer in layers.values():
        layer.base.weight.data += 6 / 2 * layer.B["policy"].data @ layer.A["policy"].data
    with crd.use_adapter(layers, None):
        assert_close(predict(model), adapted, rtol=1e-4, atol=1e-5)


def test_lora_is_on_joint_attention_alone():
    """Eight projections of a block's attn (the last has no to_add_out), none of attn2; only policy trains."""
    model = small_transformer()
    layers = crd.add_lora(model, TARGETS, 2, 4)
    blocks = [f"transformer_blocks.{i}.{target}" for i in range(2) for target in TARGETS]
    assert set(layers) == set(blocks) - {"transformer_blocks.1.attn.to_add_out"}
    assert hasattr(model.transformer_blocks[0], "attn2")
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.{part}.policy" for name in layers for part in "AB"}


def test_lora_is_float32_on_a_bf16_model():
    """The update and its gradient keep float32 while the model computes in bf16."""
    model = small_transformer().bfloat16()
    layers = crd.add_lora(model, TARGETS, 2, 4)
    predict(model, grad=True).square().mean().backward()
    assert gradients(layers).dtype == torch.float32 and gradients(layers).isfinite().all()


def test_add_lora_without_a_match_is_an_error():
    with pytest.raises(ValueError, match="no linear layer of SD3Transformer2DModel .* nowhere"):
        crd.add_lora(small_transformer(), ("nowhere",))


def test_use_adapter_restores_whatever_happens():
    """Also nested, also after an exception."""
    layers = crd.add_lora(small_transformer(), TARGETS, 2, 4)
    with pytest.raises(RuntimeError), crd.use_adapter(layers, "old"):
        with crd.use_adapter(layers, None):
            assert {layer.active for layer in layers.values()} == {None}
        assert {layer.active for layer in layers.values()} == {"old"}
        raise RuntimeError
    assert {layer.active for layer in layers.values()} == {"policy"}


@parametrize("keep", [0.0, 0.5, 1.0])
def test_blend(keep):
    """decay 0 copies the policy, 1 keeps the adapter, 0.5 is halfway; the other adapters stay."""
    layers = with_lora(small_transformer())
    before = [{name: B.detach().clone() for name, B in layer.B.items()} for layer in layers.values()]
    crd.blend(layers, "old", keep)
    for layer, B in zip(layers.values(), before):
        B["old"] = keep * B["old"] + (1 - keep) * B["policy"]
        assert_close(dict(layer.B), B, rtol=0, atol=1e-7 if keep == 0.5 else 0)


def test_saved_lora_comes_back(tmp_path):
    """save_lora then load_lora into another model: the same function, whatever adapter it is loaded into."""
    model, other = small_transformer(), small_transformer()
    crd.save_lora(tmp_path / "lora.safetensors", with_lora(model))
    layers = crd.add_lora(other, TARGETS, 2, 6)
    crd.load_lora(tmp_path / "lora.safetensors", layers, "sampler")
    assert torch.equal(predict(other), predict(small_transformer()))
    with crd.use_adapter(layers, "sampler"):
        assert_close(predict(other), predict(model), rtol=1e-5, atol=1e-6)


@parametrize("targets, rank, message", [(TARGETS, 3, "shape .* --rank"), (TARGETS[:2], 2, "layers")])
def test_lora_of_another_shape_is_an_error(tmp_path, targets, rank, message):
    crd.save_lora(tmp_path / "lora.safetensors", with_lora(small_transformer()))
    with pytest.raises(ValueError, match=message):
        crd.load_lora(tmp_path / "lora.safetensors", crd.add_lora(small_transformer(), targets, rank, 4))


# ---------------------------------------------------------------------------------------------- checkpointing

def kept_for_backward(forward):
    """What forward() returns, and the bytes that it keeps for its backward pass."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    return output, sum(sizes.values())


def saved_bytes(model, layers):
    """Bytes that one forward pass keeps for its backward pass, which is run, after a change of adapter."""
    loss, size = kept_for_backward(lambda: predict(model, 8, grad=True).square().mean())
    with crd.use_adapter(layers, "old"):
        loss.backward()
        assert {layer.active for layer in layers.values()} == {"old"}
    return size


def test_checkpointing_changes_memory_not_gradients():
    """And the block is run again with the adapter of its forward pass, though another is active by then."""
    model = small_transformer(blocks=6)
    layers = with_lora(model)
    plain = saved_bytes(model, layers)
    expected = gradients(layers)
    model.zero_grad()
    crd.checkpoint_blocks(model)
    assert saved_bytes(model, layers) < plain / 4
    assert distance(gradients(layers), expected) < 1e-5


# ------------------------------------------------------------------------------------------------ mathematics

def test_noise_and_velocity():
    """x_sigma runs straight from the image at 0 to noise at 1, and x - sigma u is the image."""
    x0, noise, _ = inputs(3)
    u, sigma = noise - x0, torch.tensor([0.0, 0.3, 1.0])
    x = crd.add_noise(x0, noise, sigma)
    assert torch.equal(x[0], x0[0]) and torch.equal(x[2], noise[2])
    assert_close(x - sigma.view(-1, 1, 1, 1) * u, x0)
    assert_close(crd.add_noise(x0, noise, sigma[1])[1], x[1])


def gaussian_velocity(x, sigma, mean, std):
    """E[noise - x0 | x_sigma = x] for data N(mean, std^2): what a perfect model of that data predicts."""
    a, variance = 1 - sigma, (1 - sigma) ** 2 * std**2 + sigma**2
    return sigma * (x - a * mean) / variance - (mean + a * std**2 * (x - a * mean) / variance)


@parametrize("order, ratio, bound", [(1, 2, 2e-2), (2, 4, 2e-4)])
def test_sample_ode_converges_to_the_exact_solution(order, ratio, bound):
    """N(0.7, 1) data: noise z ends at 0.7 + z; twice the steps, half or (but for a log) a quarter error."""
    noise = torch.randn(4, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def error(steps):
        sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        x0 = crd.sample_ode(lambda x, sigma: gaussian_velocity(x, sigma, 0.7, 1.0), noise, sigmas, order)
        return (x0 - (0.7 + noise)).abs().max().item()

    assert error(160) < bound
    assert error(160) / error(320) == pytest.approx(ratio, rel=0.1)


def test_first_order_is_euler():
    """A step is x + (t - s) v(x, s), on uneven sigmas too."""
    sigmas = torch.tensor([1.0, 0.8, 0.3, 0.0], dtype=torch.float64)
    noise = torch.randn(2, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = noise
    for s, t in zip(sigmas, sigmas[1:]):
        x = x + (t - s) * torch.sin(3 * x + s)
    assert_close(crd.sample_ode(lambda x, s: torch.sin(3 * x + s), noise, sigmas, 1), x)


@parametrize("sigmas", [[1.0, 0.5], [1.0, 0.5, 0.5, 0.0], [0.5, 1.0, 0.0]])
def test_sigmas_must_descend_to_zero(sigmas):
    with pytest.raises(ValueError, match="must descend to 0"):
        crd.sample_ode(lambda x, s: x, torch.zeros(1, 1, 1, 1), torch.tensor(sigmas))


REWARDS = torch.tensor([0.1, 0.4, 0.2, 1.0, 0.0, 0.5, 0.3, 0.6], dtype=torch.float64)  # two groups of four


def test_advantages():
    """Each group averages to 1/2 on the target's scale; the scale is the batch's population deviation."""
    s = crd.advantages(REWARDS, 4)
    assert_close(s.view(2, 4).mean(1), torch.full((2,), 0.5, dtype=torch.float64))
    centered = REWARDS.view(2, 4) - REWARDS.view(2, 4).mean(1, keepdim=True)
    spread = (REWARDS - REWARDS.mean()).square().mean().sqrt()
    assert_close((s.view(2, 4) - 0.5) * 10, centered / (spread + 1e-4))


def test_advantages_are_clipped_and_keep_to_zero_one():
    """One outlier among many: its advantage ends at clip, its target at 1."""
    outlier = torch.cat([torch.zeros(99), torch.ones(1)])
    s = crd.advantages(outlier, 100)
    assert s.max() == 1 and s.min() >= 0
    assert crd.advantages(-outlier, 100).min() == 0
    assert crd.advantages(outlier, 100, clip=2.0).max() == 1


def test_advantages_of_a_broken_group_are_an_error():
    with pytest.raises(ValueError, match="7 rewards are not whole groups of 4"):
        crd.advantages(REWARDS[:7], 4)


def test_reward_offsets_cancel():
    """A constant added to all rewards changes no target; to one prompt's, only the scale common to all."""
    s = crd.advantages(REWARDS, 4)
    assert_close(crd.advantages(REWARDS + 3, 4), s)
    ratio = (crd.advantages(REWARDS + torch.tensor([2.0] * 4 + [0.0] * 4), 4) - 0.5) / (s - 0.5)
    assert_close(ratio, ratio[:1].expand(8))


def loss_and_gradient(rho, targets, **settings):
    rho = rho.clone().requires_grad_()
    loss = crd.crd_loss(rho, targets, 4, **settings)
    return loss.detach(), torch.autograd.grad(loss, rho)[0]


RHO = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@parametrize("tau", [math.inf, 0.2])
def test_a_constant_for_one_prompt_changes_nothing(tau):
    """Z(c) cancels: an offset of a prompt's rewards, or of its log-ratios, changes no loss, no gradient."""
    targets, offset = crd.advantages(REWARDS, 4), torch.tensor([0.0] * 4 + [0.3] * 4, dtype=torch.float64)
    expected = loss_and_gradient(RHO, targets, tau=tau)
    assert_close(loss_and_gradient(RHO, targets + offset, tau=tau), expected)
    assert_close(loss_and_gradient(RHO + offset, targets, tau=tau), expected)


@parametrize("tau", [math.inf, 0.2])
def test_a_reward_without_spread_teaches_nothing(tau):
    """A prompt whose images score alike has no gradient where the policy is `old`; another prompt has."""
    targets = crd.advantages(torch.cat([torch.full((4,), 0.7), REWARDS[:4]]).double(), 4)
    loss, gradient = loss_and_gradient(torch.zeros(8, dtype=torch.float64), targets, tau=tau)
    assert gradient[:4].abs().max() < 1e-12 and gradient[4:].abs().min() > 1e-3


def test_crd_loss_by_hand():
    """5 / 2 * mean((2 * (-1, 1) - (-0.1, 0.1))^2) = 2.5 * 1.9^2."""
    rho, targets = torch.tensor([1.0, 3.0]), torch.tensor([0.4, 0.6])
    assert crd.crd_loss(rho, targets, 2, beta=2.0, clip=5.0).item() == pytest.approx(2.5 * 1.9**2)


@parametrize("tau", [math.inf, 0.2])
def test_gradient_of_crd_loss(tau):
    """It is that of the loss with the mean of rho held still, by finite differences."""
    targets = crd.advantages(REWARDS, 4)
    mean = crd.group_mean(RHO, targets, 4, tau)
    centered = targets - crd.group_mean(targets, targets, 4, tau)
    loss = lambda rho: crd.crd_loss(rho, centered, 4, 0.7, tau, rho_mean=mean)  # noqa: E731
    steps = 1e-6 * torch.eye(8, dtype=torch.float64)
    numeric = torch.stack([(loss(RHO + step) - loss(RHO - step)) / 2e-6 for step in steps])
    assert_close(loss_and_gradient(RHO, targets, beta=0.7, tau=tau)[1], numeric, rtol=1e-6, atol=1e-8)


@parametrize("tau, same", [(math.inf, True), (0.2, False)])
def test_detaching_the_mean_changes_no_gradient_with_the_plain_mean(tau, same):
    targets, rho = crd.advantages(REWARDS, 4), RHO.clone().requires_grad_()
    centered = targets - crd.group_mean(targets, targets, 4, tau)
    attached = 5 * ((rho - crd.group_mean(rho, targets, 4, tau)) - centered).square().mean()
    gradient = loss_and_gradient(RHO, targets, tau=tau)[1]
    assert torch.allclose(torch.autograd.grad(attached, rho)[0], gradient) == same


def test_centering_weights():
    """A cold temperature centers a group on its best image and on its worst; a hot one on its mean."""
    targets = crd.advantages(REWARDS, 4)
    cold = crd.group_mean(RHO, targets, 4, 1e-3)
    assert cold.shape == (2, 8)
    assert_close(cold[:, 0], torch.stack([RHO[3], RHO[0]]))
    plain = RHO.view(2, 4).mean(1).repeat_interleave(4)[None]
    assert_close(crd.group_mean(RHO, targets, 4), plain)
    assert_close(crd.group_mean(RHO, targets, 4, 1e6), plain.expand(2, -1), rtol=1e-4, atol=1e-5)


def test_part_of_a_group_needs_the_mean_of_the_whole():
    """Without rho_mean it is refused; with it, the parts' losses average to the whole's."""
    targets = crd.advantages(REWARDS, 4)
    with pytest.raises(ValueError, match="3 images are not whole groups of 4.* rho_mean"):
        crd.crd_loss(RHO[:3], targets[:3], 4)
    mean, centered = crd.group_mean(RHO, targets, 4), targets - crd.group_mean(targets, targets, 4)
    parts = [crd.crd_loss(RHO[p], centered[:, p], 4, rho_mean=mean[:, p]) * len(RHO[p]) / 8
             for p in (slice(0, 3), slice(3, 8))]
    assert_close(sum(parts), crd.crd_loss(RHO, targets, 4))


def velocities(count=8, seed=5):
    """v, v_old, u (count, 2, 3, 3) in float64."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(3, count, 2, 3, 3, dtype=torch.float64, generator=g)


@parametrize("adaptive", [True, False])
def test_implicit_reward(adaptive):
    """Zero where the policy is `old`, positive where it denoises better; its sign changes with the two."""
    v, v_old, u = velocities()
    assert torch.equal(crd.implicit_reward(v_old, v_old, u, adaptive), torch.zeros(8, dtype=torch.float64))
    assert (crd.implicit_reward(u + (v_old - u) / 2, v_old, u, adaptive) > 0).all()
    assert_close(crd.implicit_reward(v, v_old, u, adaptive), -crd.implicit_reward(v_old, v, u, adaptive))


def test_adaptive_weights():
    """Ten times the error, ten times rho and not a hundred; a perfect prediction is no division by zero."""
    v, v_old, u = velocities()
    assert_close(crd.implicit_reward(10 * v, 10 * v_old, 10 * u), 10 * crd.implicit_reward(v, v_old, u))
    assert_close(crd.implicit_reward(v, u, u), -(v - u).square().mean((1, 2, 3))
                               / (v - u).abs().mean((1, 2, 3)))


@parametrize("adaptive", [True, False])
def test_gradient_of_the_implicit_reward(adaptive):
    """By finite differences, with the adaptive weights frozen where they are."""
    v, v_old, u = velocities(2)
    m = (v - u).abs().mean((1, 2, 3)) if adaptive else torch.ones(2, dtype=torch.float64)
    frozen = lambda v: -((v - u).square().mean((1, 2, 3)) / m).sum()  # noqa: E731
    direction = velocities(2, seed=6)[0]
    numeric = (frozen(v + 1e-6 * direction) - frozen(v - 1e-6 * direction)) / 2e-6
    v.requires_grad_()
    gradient, = torch.autograd.grad(crd.implicit_reward(v, v_old, u, adaptive).sum(), v)
    assert_close((gradient * direction).sum(), numeric, rtol=1e-6, atol=0)


def test_the_gradient_points_up_the_reward():
    """Where policy = old, a step down the loss raises the log-ratio of good images and lowers that of bad."""
    _, v_old, u = velocities()
    targets = crd.advantages(REWARDS, 4)
    centered = targets - crd.group_mean(targets, targets, 4)[0]
    gain = lambda v: (centered * crd.implicit_reward(v, v_old, u, adaptive=False)).sum()  # noqa: E731
    direction = velocities(seed=7)[0]
    numeric = (gain(v_old + 1e-6 * direction) - gain(v_old - 1e-6 * direction)) / 2e-6
    v = v_old.clone().requires_grad_()
    loss = crd.crd_loss(crd.implicit_reward(v, v_old, u, adaptive=False), targets, 4)
    gradient, = torch.autograd.grad(loss, v)
    assert_close(-(gradient * direction).sum() / (2 * 5 / 8), numeric, rtol=1e-6, atol=0)
    assert gain(v_old - 0.01 * gradient) > 0


def test_the_optimum_has_no_loss():
    """Data N(m, s^2), reward <g, x0>: the optimum p* is N(m + s^2 g / beta, s^2), and it has no loss.

    With D = (1 - sigma)^2 s^2 + sigma^2, the best velocities of p* and p_old differ by
    -(sigma / D) s^2 g / beta everywhere. With one noise for the group u - v_old is -(sigma / D) x0 plus a
    constant. So rho, centered, is 2 (sigma s / D)^2 / (C H W) times <g, x0> / beta, centered: the true
    log-ratio, times the ELBO's weight at sigma. Divided by that weight, beta makes it the reward.
    """
    x0, noise, g = torch.randn(3, 4, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise, g, sigma, m, s, beta = noise[:1], g[:1], torch.tensor(0.6, dtype=torch.float64), 0.3, 0.5, 0.8
    x, u, reward = crd.add_noise(x0, noise, sigma), noise - x0, (g * x0).sum((1, 2, 3))
    D = (1 - sigma) ** 2 * s**2 + sigma**2

    def loss(mean):
        v, v_old = gaussian_velocity(x, sigma, mean, s), gaussian_velocity(x, sigma, m, s)
        rho = crd.implicit_reward(v, v_old, u, adaptive=False)
        return crd.crd_loss(rho, reward, 4, beta=beta * g.numel() / (2 * (sigma * s / D) ** 2)).item()

    assert loss(m + s**2 * g / beta) < 1e-20
    assert loss(m + 0.9 * s**2 * g / beta) > 1e-4 and loss(m) > 1e-2


def test_anchor_weights():
    """kappa_min at reward 0, kappa at reward 1, kappa everywhere without a reward."""
    v, v_ref, _ = velocities(2)
    distance = (v - v_ref).square().mean((1, 2, 3))
    n = torch.tensor([0.0, 1.0], dtype=torch.float64)
    expected = (1e-4 * distance[0] + 0.1 * distance[1]) / 2
    assert_close(crd.anchor_loss(v, v_ref, n, 0.1), expected)
    assert_close(crd.anchor_loss(v, v_ref, None, 0.1), 0.1 * distance.mean())


def test_the_anchor_pulls_toward_the_reference():
    v, v_ref, _ = velocities(2)
    v.requires_grad_()
    gradient, = torch.autograd.grad(crd.anchor_loss(v, v_ref, None, 0.1), v)
    assert_close(gradient, 0.2 * (v - v_ref).detach() / v.numel())


@parametrize("step, expected", [(0, 0.1), (75, 0.1), (76, 0.2), (77, 0.3), (83, 0.9), (84, 0.9), (999, 0.9)])
def test_decay(step, expected):
    """start_value up to start_step, then the ramp, then end_value for ever."""
    assert crd.decay(step, 75, 0.1, 0.1, 0.9) == pytest.approx(expected)


# -------------------------------------------------------------------------------------------- a training step

def training_step(micro_batch=8, **settings):
    """Gradients and totals of accumulate_gradients on two groups of four, no two adapters alike."""
    model = small_transformer()
    layers = with_lora(model)
    x0, noise, cond = inputs(8)
    batch = dict(x0=x0, cond=[t[:2] for t in cond], targets=crd.advantages(REWARDS.float(), 4),
                 strength=REWARDS.float(), empty=EMPTY)
    s = Settings(group_size=4, micro_batch=micro_batch, **settings)
    totals = crd.accumulate_gradients(model, layers, batch, SIGMA, noise, s, 1.0)
    for layer in layers.values():
        assert all(part[name].grad is None for part in (layer.A, layer.B) for name in ("old", "sampler"))
    return gradients(layers), totals, (model, layers, batch, noise)


@parametrize("tau", [math.inf, 0.2])
@parametrize("micro_batch", [6, 4, 3, 1])
def test_micro_batches_change_nothing(micro_batch, tau):
    """Whole groups or uneven parts of one: the same loss and gradient, for rho's mean is the group's."""
    expected, totals, _ = training_step(8, tau=tau)
    gradient, others, _ = training_step(micro_batch, tau=tau)
    assert_close(others, totals, rtol=1e-5, atol=1e-8)
    assert distance(gradient, expected) < 1e-4


def test_a_training_step_is_the_objective():
    """The policy against `old` and against the guided pretrained model, anchored by reward; no more."""
    settings = dict(anchor_guidance=3.0, reward_weight=0.5, anchor=0.2)
    gradient, totals, (model, layers, batch, noise) = training_step(**settings)
    model.zero_grad()
    x, u = 0.3 * batch["x0"] + 0.7 * noise, noise - batch["x0"]
    cond, empty = [t.repeat_interleave(4, 0) for t in batch["cond"]], [torch.cat([t] * 8) for t in EMPTY]
    v = crd.velocity(model, x, SIGMA, cond)
    with torch.no_grad(), crd.use_adapter(layers, "old"):
        v_old = crd.velocity(model, x, SIGMA, cond)
    with torch.no_grad(), crd.use_adapter(layers, None):
        v_cond, v_empty = (crd.velocity(model, x, SIGMA, c) for c in (cond, empty))
    reward_loss = crd.crd_loss(crd.implicit_reward(v, v_old, u), batch["targets"], 4)
    anchor = crd.anchor_loss(v, v_empty + 3 * (v_cond - v_empty), batch["strength"], 0.2)
    (0.5 * reward_loss + anchor).backward()
    assert distance(gradient, gradients(layers)) < 1e-4
    expected = torch.stack([0.5 * reward_loss + anchor, reward_loss, anchor]).detach()
    assert_close(totals[:3].float(), expected, rtol=1e-5, atol=0)


def test_ablations_leave_one_term_out():
    """The gradient without the anchor plus that without the reward is the whole gradient."""
    both = training_step()[0]
    apart = training_step(anchor=0.0)[0] + training_step(reward_weight=0.0)[0]
    assert distance(apart, both) < 1e-4


def test_guidance():
    """v(empty) + w (v(c) - v(empty)); w = 1 is the model itself."""
    model = small_transformer()
    x0, _, cond = inputs(3)
    v = crd.velocity(model, x0, SIGMA, cond)
    v_empty = crd.velocity(model, x0, SIGMA, [t.expand(3, *t.shape[1:]) for t in EMPTY])
    guided = crd.velocity(model, x0, SIGMA, cond, EMPTY, 4.5)
    assert_close(guided, v_empty + 4.5 * (v - v_empty), rtol=1e-4, atol=1e-5)
    assert torch.equal(crd.velocity(model, x0, SIGMA, cond, EMPTY, 1.0), v)


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


# ----------------------------------------------------------------------------------------------- command line

PAPER = dict(
    model="stabilityai/stable-diffusion-3.5-medium", dtype="bf16", height=512, width=512, rank=32, alpha=64,
    max_sequence_length=128, groups=48, group_size=24, rollout_steps=10, tie_sampler=False, beta=1.0,
    tau=math.inf, advantage_clip=5.0, adaptive=True, reward_weight=1.0, anchor=0.1, anchor_guidance=4.5,
    train_timesteps=0, anchor_adapt="reward", lr=3e-4, weight_decay=1e-4, max_grad_norm=1.0, eval_steps=40)
OCR = dict(reward="ocr", steps_per_epoch=2,
           old_decay=(0, 0.25, 0.005, 0.999), sampler_decay=(75, 0, 0.0075, 0.999))
GENEVAL = dict(reward="geneval", steps_per_epoch=1,
               old_decay=(0, 0.25, 0.001, 0.5), sampler_decay=(0, 0, 0.001, 0.5))


@parametrize("flags, expected", [
    ([], OCR), (["--reward", "ocr@somewhere"], {**OCR, "reward": "ocr@somewhere"}),
    (["--reward", "geneval"], GENEVAL), (["--preset", "geneval"], GENEVAL),
    (["--reward", "compressibility"], {**GENEVAL, "reward": "compressibility"})])
def test_presets_are_the_papers(flags, expected):
    """Without --preset the reward decides: ocr for text, geneval's schedule for all others."""
    s = asdict(crd.parse(flags))
    assert {key: s[key] for key in PAPER} == PAPER
    assert {key: s[key] for key in expected} == expected
    assert inspect.signature(crd.anchor_loss).parameters["kappa_min"].default == 1e-4


def test_a_preset_is_only_defaults():
    """Every flag overrides it, and only what it names."""
    plain = asdict(crd.parse(["--preset", "tiny"]))
    flags = "--preset tiny --lr 0.5 --old-decay 1 0.5 0.25 0.75 --no-adaptive --name x"
    changed = asdict(crd.parse(flags.split()))
    assert (changed.pop("lr"), tuple(changed.pop("old_decay"))) == (0.5, (1, 0.5, 0.25, 0.75))
    assert (changed.pop("adaptive"), changed.pop("name")) == (False, "x")
    assert changed == {key: plain[key] for key in changed} and len(changed) == len(plain) - 4


def test_help_explains_every_setting(capsys):
    with pytest.raises(SystemExit):
        crd.parse(["--help"])
    text = capsys.readouterr().out
    for field in fields(Settings):
        assert re.search(rf"--{field.name.replace('_', '-')}\b[^\[]*\w[^\[]*\[", text, re.S), field.name
    assert "--preset tiny" in text and "--no-grad-checkpoint" in text


def leave(monkeypatch, *flags, script=crd):
    """What `python crd.py *flags` says on leaving: one line."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stopped:
        script.main()
    message = str(stopped.value.code).strip()
    assert "\n" not in message
    return message


TOY = ("--preset", "tiny", "--model", TINY, "--reward", "compressibility", "--name", "x")


@parametrize("flags, message", [
    (["--preset", "huge"], "--preset huge: .* choose from ocr, geneval, tiny"),
    (["--resume", "nowhere"], "--resume nowhere: .*args.json; give a run.s folder"),
    ([], "stable-diffusion-3.5-medium needs a CUDA device.* --preset tiny"),
    ([*TOY, "--model", "no/model"], "no/model.*--preset tiny"),
    ([*TOY, "--reward", "beauty"], "unknown reward 'beauty'"),
    ([*TOY, "--reward", "ocr@nowhere"], "cannot load nowhere/ocr-det"),
    ([*TOY, "--prompts", "none.txt"], "cannot read the prompts in none.txt"),
    ([*TOY, "--prompts", "animals", "--reward", f"ocr@{TINY}"], "generator animals: the reward ocr needs"),
    ([*TOY, "--eval-rewards", "beauty"], "unknown reward 'beauty'"),
    ([*TOY, "--eval-rewards", "pickscore@nowhere"], r"pickscore: cannot load nowhere \(no such folder"),
    ([*TOY, "--prompts", "animals", "--eval-rewards", f"ocr@{TINY}"], "animals: the reward ocr needs"),
    ([*TOY, "--eval-prompts", "none.txt"], "cannot read the prompts in none.txt"),
    ([*TOY, "--eval-prompts", "draw.txt", "--prompts", "signs", "--reward", f"ocr@{TINY}"],
     "draw.txt, line 1: the reward ocr needs the text"),
    ([*TOY, "--reward-batch", "0"], "--reward-batch 0: must be at least 1"),
    ([*TOY, "--groups", "3", "--steps-per-epoch", "2"], "--steps-per-epoch"),
    ([*TOY, "--rollout-steps", "2", "--train-timesteps", "3"], "--train-timesteps"),
    ([*TOY, "--anchor-adapt", "often"], "--anchor-adapt"), ([*TOY, "--dtype", "fp8"], "--dtype")])
def test_a_users_mistake_ends_in_one_line(monkeypatch, tmp_path, flags, message):
    """It says what was wrong and what to do, before the first image."""
    monkeypatch.chdir(tmp_path)
    Path("draw.txt").write_text("a red cube\n")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(crd, "generate", lambda *args: pytest.fail("an image was sampled"))
    assert re.search(message, leave(monkeypatch, *flags))


@parametrize("status", ["gated", "offline"])
def test_weights_out_of_reach_end_in_one_line(monkeypatch, tmp_path, status):
    """Stable Diffusion 3.5 needs a licence and a connection; the bundled model neither."""
    from diffusers import StableDiffusion3Pipeline

    def refuse(*args, **kwargs):
        raise OSError(f"403 Client Error: {status}\nand many more lines")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(StableDiffusion3Pipeline, "load_config", refuse)
    monkeypatch.setattr(StableDiffusion3Pipeline, "from_pretrained", refuse)
    message = leave(monkeypatch, *TOY, "--model", PAPER["model"], "--device", "cpu")
    assert "--preset tiny" in message and "stable-diffusion-3.5-medium" in message


# ------------------------------------------------------------------------------------------------------- runs

SHORT = {**PRESETS["tiny"], **dict(
    preset="tiny", model=str(TINY), reward="incompressibility", rank=2, groups=2, group_size=2,
    steps_per_epoch=1, rollout_steps=2, train_timesteps=1, eval_images=2, eval_steps=2, eval_every=2)}


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(name, **settings): a short run, or its continuation by --resume; returns its folder."""
    monkeypatch.chdir(tmp_path)

    def run(name, epochs, **settings):
        if Path("runs", name).exists():
            return crd.train(crd.parse(["--resume", f"runs/{name}", "--epochs", str(epochs)]))
        return crd.train(Settings(**{**SHORT, "name": name, "epochs": epochs, **settings}))

    return run


def state(folder, name="last"):
    """All of a checkpoint but its clock."""
    found = torch.load(Path(folder, name, "state.pt"), weights_only=True)
    found["progress"].pop("seconds")
    return found


def metrics(folder):
    """The lines of metrics.jsonl without what a clock or the machine put there."""
    clocks = ("seconds", "images_per_second", "tflops", "mfu", "peak_gb")
    lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith(clocks)} for line in lines]


def test_resume_equals_not_stopping(run):
    """To the bit: adapters, optimizer, random numbers, prompts, metrics, the best so far, the LoRA."""
    straight = run("straight", 4, groups=4, steps_per_epoch=2)
    run("stopped", 2, groups=4, steps_per_epoch=2)
    stopped = run("stopped", 4)
    assert_close(state(stopped), state(straight), rtol=0, atol=0)
    assert metrics(stopped) == metrics(straight) and len(metrics(straight)) == 7
    for name in ("last", "best"):
        lora = Path(name, "pytorch_lora_weights.safetensors")
        assert (stopped / lora).read_bytes() == (straight / lora).read_bytes()
    assert not torch.equal(*(state(straight)["adapters"][next(iter(state(straight)["adapters"]))][f"B.{name}"]
                             for name in ("policy", "old")))


def test_a_run_leaves_what_it_promises(run):
    """args.json, metrics, contact sheets, a curve, last/ and best/; its name is not taken twice."""
    folder = run("once", 1)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*.*")} == {
        "args.json", "metrics.jsonl", "curve.png", "samples/epoch-0000.png", "samples/epoch-0001.png",
        "last/state.pt", "last/pytorch_lora_weights.safetensors",
        "best/state.pt", "best/pytorch_lora_weights.safetensors"}
    assert Settings(**json.loads((folder / "args.json").read_text())).groups == 2
    train = [line for line in crd.read_metrics(folder) if line["split"] == "train"]
    assert train[0].keys() >= {"reward", "loss", "sample_seconds", "reward_seconds", "train_seconds",
                               "images_per_second", "tflops", "peak_gb"}
    with pytest.raises(SystemExit, match="runs/once .*--resume runs/once"):
        crd.train(Settings(**{**SHORT, "name": "once"}))


def test_zero_epochs_only_evaluate(run):
    folder = run("look", 0)
    assert [line["split"] for line in metrics(folder)] == ["eval"]
    assert not list(folder.rglob("*.pt"))


def test_a_run_starts_from_a_lora(run):
    """Of another run, of the other algorithm too; all three adapters start there."""
    first = run("first", 1, lr=0.01)
    same = run("same", 0, lora="runs/first/last")
    assert metrics(same)[0]["reward"] == metrics(first)[-1]["reward"] != metrics(first)[0]["reward"]
    before = state(run("before", 1, lora="runs/first/last", lr=0.0))
    found = list(before["adapters"].values())
    assert any(x["B.old"].any() for x in found) and all(torch.equal(x["B.policy"], x["B.old"]) for x in found)
    settings = dict(alpha=4, epochs=0, images=4, reward="incompressibility", steps=2)
    plain, trained = (ddpo.train(ddpo_settings(TINY, **settings, name=f"ddpo-{i}", lora=lora))
                      for i, lora in enumerate(("", "runs/first/last")))
    assert metrics(plain)[0]["reward"] != metrics(trained)[0]["reward"]
    with pytest.raises(SystemExit, match="runs/first: it is no run of ddpo.py"):
        ddpo.parse(["--resume", "runs/first"])
    with pytest.raises(SystemExit, match="runs/first has a LoRA of its own"):
        crd.parse(["--resume", "runs/first", "--lora", "runs/same/last"])
    for train, settings in ((crd.train, Settings(**{**SHORT, "name": "y"})),
                            (ddpo.train, ddpo_settings(TINY))):
        for lora, message in ((first / "last", "use the same .*--rank"), ("nowhere", "--lora nowhere: ")):
            settings.lora, settings.rank = str(lora), 3
            with pytest.raises(SystemExit, match=message):
                train(settings)


def test_a_run_that_cannot_be_resumed_says_why(run, monkeypatch):
    """One that only evaluated has nothing to go on from; another rank does not fit."""
    folder = run("look", 0)
    assert "cannot resume runs/look" in leave(monkeypatch, "--resume", folder, "--epochs", 1)
    folder = run("trained", 1)
    assert "--rank" in leave(monkeypatch, "--resume", folder, "--epochs", 2, "--rank", 3)


def test_more_images_than_prompts_draw_them_again(run, monkeypatch):
    """Four animals are held out: ten images of them, each from noise of its own."""
    scored = []

    def measure(self, images, prompts, metadata):
        scored.append((images, prompts))
        return [0.0] * len(images)

    monkeypatch.setattr(rewards.Incompressibility, "measure", measure)
    run("look", 0, prompts="animals", eval_images=10)
    images, prompts = scored[0]
    assert len(set(prompts)) == 4 and prompts[:4] == prompts[4:8] and len(prompts) == 10
    assert len({image.tobytes() for image in images}) == 10


def test_unseen_rewards_are_logged_side_by_side(run, tmp_path):
    """At every evaluation, on all prompts of --eval-prompts, and never trained on; what is trained on anyway
    is not scored twice. Looking at a finished run leaves its curve alone."""
    path = tmp_path / "drawbench.txt"
    path.write_text("a red cube\na blue cube\nthree dogs\n")
    folder = run("seen", 1, eval_rewards="compressibility,incompressibility", eval_prompts=str(path))
    lines = [line for line in metrics(folder) if line["split"] == "eval"]
    assert [line["epoch"] for line in lines] == [0, 1]
    for line in lines:
        assert line["compressibility"] == -line["incompressibility"] == -line["reward"]
    train, = (line for line in metrics(folder) if line["split"] == "train")
    assert "compressibility" not in train
    curve, before = crd.reward_curve(folder), (folder / "samples" / "epoch-0001.png").read_bytes()
    crd.train(crd.parse(["--resume", str(folder), "--epochs", "0", "--reward", "compressibility"]))
    assert crd.reward_curve(folder) == curve and metrics(folder)[:-1] == [*lines[:1], train, *lines[1:]]
    look = metrics(folder)[-1]
    assert (look["split"], look["reward"]) == ("test", lines[1]["compressibility"])
    assert (folder / "samples" / "epoch-0001.png").read_bytes() == before
    assert (folder / "samples" / "test.png").exists()


def test_an_evaluation_prints_the_benchmarks_table(run, monkeypatch, capsys):
    """Whatever details a reward has are logged and printed, a trained reward's or another's."""
    def measure(self, images, prompts, metadata):
        self.details = {"single_object": 1.0, "counting": 0.5, "overall": 0.75}
        return [0.5] * len(images)

    monkeypatch.setattr(rewards.Compressibility, "measure", measure)
    for setting in ("reward", "eval_rewards"):
        line, = metrics(run(setting, 0, **{setting: "compressibility"}))
        assert line["compressibility details"]["overall"] == 0.75 and line["compressibility"] == 0.5
        table = "compressibility details: single_object 1.000  counting 0.500  overall 0.750"
        assert table in capsys.readouterr().out


def write_half(state, path):
    Path(path).write_bytes(b"half a checkpoint")
    raise OSError("killed")


def do_not_rename(*paths):
    raise OSError("killed")


@parametrize("target, fault", [("torch.save", write_half), ("os.replace", do_not_rename)])
def test_a_killed_save_leaves_the_previous_one(run, monkeypatch, target, fault):
    folder = run("killed", 1)
    before = state(folder)
    with monkeypatch.context() as patch:
        patch.setattr(target, fault)
        with pytest.raises(OSError, match="killed"):
            run("killed", 2)
    assert_close(state(folder), before, rtol=0, atol=0)
    assert metrics(run("killed", 2)) == metrics(run("straight", 2))


def nan_loss(rho, *args, **settings):
    return rho.sum() * math.nan


def nan_gradient(rho, *args, **settings):
    return (0 * rho).sum().sqrt()  # 0, of slope 0 times infinity


@parametrize("fault", [nan_loss, nan_gradient])
def test_a_non_finite_loss_stops_before_the_step(run, monkeypatch, fault):
    """No optimizer step is made, and last/ goes on from the epoch before."""
    folder = run("nan", 1)
    before = state(folder)
    with monkeypatch.context() as patch:
        patch.setattr(crd, "crd_loss", fault)
        patch.setattr(torch.optim.AdamW, "step", lambda *args: pytest.fail("a step was made"))
        message = leave(patch, "--resume", folder, "--epochs", 2)
    assert "nan" in message and f"--resume {folder}" in message
    assert_close(state(folder), before, rtol=0, atol=0)
    assert state(run("nan", 2))["progress"]["epoch"] == 2


def test_ctrl_c_saves_and_leaves(run, monkeypatch):
    """In the middle of an epoch: the finished epochs are kept, and the way to continue is said."""
    folder = run("stopped", 1)

    def interrupt(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rewards.Incompressibility, "measure", interrupt)
        assert f"--resume {folder}" in leave(patch, "--resume", folder, "--epochs", 2)
    assert_close(state(run("stopped", 2)), state(run("straight", 2)), rtol=0, atol=0)


def test_a_reward_that_fails_stops_the_run(run, monkeypatch):
    no_numbers = lambda self, images, *rest: [math.nan] * len(images)  # noqa: E731
    monkeypatch.setattr(rewards.Incompressibility, "measure", no_numbers)
    with pytest.raises((RuntimeError, SystemExit), match="reward incompressibility gave nan"):
        run("nan-reward", 1)


@parametrize("switch", [dict(tie_sampler=True, anchor_adapt="off", steps_per_epoch=2, micro_batch=1),
                                    dict(anchor=0.0, anchor_adapt="advantage", tau=0.2, grad_checkpoint=True),
                                    dict(reward_weight=0.0, anchor_guidance=1.0, adaptive=False)])
def test_every_switch_runs(run, switch):
    train = [line for line in crd.read_metrics(run("switch", 1, **switch)) if line["split"] == "train"]
    assert all(math.isfinite(train[0][key]) for key in ("loss", "reward", "grad_norm"))


def test_the_sampler_is_decoupled(run, monkeypatch):
    """Images come from `sampler`, from `old` when tied, evaluations from the policy."""
    drawn, generate = [], crd.generate

    def spy(transformer, *args, **kwargs):
        drawn.append({m.active for m in transformer.modules() if isinstance(m, crd.LoRALinear)}.pop())
        return generate(transformer, *args, **kwargs)

    monkeypatch.setattr(crd, "generate", spy)
    run("apart", 1)
    run("tied", 1, tie_sampler=True)
    assert drawn == ["policy", "sampler", "policy", "policy", "old", "policy"]


def test_a_pipeline_with_t5_loads_and_encodes(tmp_path):
    """Stable Diffusion 3.5's third text encoder: CLIP's tokens, then --max-sequence-length of T5's."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    tokenizer = T5Tokenizer(vocab=pieces + [(chr(c), -3.0) for c in range(33, 127)])
    pipe = crd.load_pipeline(Settings(**SHORT), CPU)
    config = T5Config(vocab_size=len(tokenizer), d_model=128, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    pipe.register_modules(text_encoder_3=T5EncoderModel(config), tokenizer_3=tokenizer)
    pipe.save_pretrained(tmp_path)
    s = Settings(**{**SHORT, "model": str(tmp_path), "max_sequence_length": 7, "dtype": "fp32"})
    embeds, pooled = crd.encode(crd.load_pipeline(s, CPU), ["hello", "a cat"], s, CPU)
    assert embeds.shape == (2, 20 + 7, 128) and pooled.shape == (2, 128)
    assert (embeds[0, 20:] - embeds[1, 20:]).abs().max() > 0


def test_lora_on_the_true_geometry():
    """Stable Diffusion 3.5 Medium, without its memory: 24 blocks of eight projections, the last of seven."""
    with torch.device("meta"):
        model = SD3Transformer2DModel(
            sample_size=128, num_layers=24, attention_head_dim=64, num_attention_heads=24, qk_norm="rms_norm",
            joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
            pos_embed_max_size=384, dual_attention_layers=tuple(range(13)))
    layers = crd.add_lora(model, TARGETS, 32, 64)
    assert len(layers) == 24 * 8 - 1
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == len(layers) * 2 * 32 * 1536


def test_the_saved_lora_gives_the_same_image_in_diffusers(tmp_path):
    """pipe.load_lora_weights takes the file as it is, scale and all."""
    pytest.importorskip("peft", reason="peft is not installed; diffusers needs it for load_lora_weights")
    load = lambda: crd.load_pipeline(Settings(**{**SHORT, "dtype": "fp32"}), CPU)  # noqa: E731
    draw = lambda pipe: torch.from_numpy(pipe(  # noqa: E731
        '"moon" on a blue sign', height=32, width=64, num_inference_steps=4, guidance_scale=1.0,
        max_sequence_length=1, output_type="np", generator=torch.Generator().manual_seed(0)).images)
    ours, theirs = load(), load()
    before = draw(ours)
    layers = crd.add_lora(ours.transformer, TARGETS, 4, 12)
    torch.manual_seed(0)
    for layer in layers.values():
        layer.B["policy"].data.normal_(std=0.05)
    crd.save_lora(tmp_path / "pytorch_lora_weights.safetensors", layers)
    theirs.load_lora_weights(tmp_path)
    assert (draw(ours) - before).abs().max() > 0.05
    torch.testing.assert_close(draw(theirs), draw(ours), rtol=0, atol=1e-3)


def test_a_short_training_run_raises_the_reward(monkeypatch, tmp_path):
    """Of held-out words, by the reward alone: there is no anchor, so no guidance is distilled."""
    monkeypatch.chdir(tmp_path)
    short = {"name": "learn", "anchor": 0.0, "epochs": 8, "eval_every": 100, "eval_images": 256}
    folder = crd.train(Settings(**{**PRESETS["tiny"], **short}))
    before, after = (reward for _, reward in crd.reward_curve(folder))
    assert after > before + 0.06


# ------------------------------------------------------------------------------------------ DDPO: mathematics

def test_log_probabilities_are_torchs():
    """log N(x; mean, std^2), averaged over an image's numbers, of a tensor std too."""
    x, mean, _ = velocities(3)
    std = torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64).view(3, 1, 1, 1)
    expected = torch.distributions.Normal(mean, std).log_prob(x).mean((1, 2, 3))
    assert_close(ddpo.gaussian_log_prob(x, mean, std), expected)


def ddim_scheduler(prediction_type="epsilon", steps=50):
    """Stable Diffusion 1.x's, as its checkpoint configures it."""
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1, prediction_type=prediction_type)
    scheduler.set_timesteps(steps)
    return scheduler


@parametrize("step", [0, 20, 49])  # from pure noise, in the middle, to the image
@parametrize("eta", [0.0, 1.0])
@parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_ddim_step_is_diffusers(prediction_type, eta, step):
    """The same x_{t-1} from the same noise; log_prob is of the Gaussian that it was drawn from."""
    scheduler, (output, x, noise) = ddim_scheduler(prediction_type), velocities(3).float()
    t = scheduler.timesteps[step]
    expected = scheduler.step(output, t, x, eta=eta, variance_noise=noise).prev_sample
    place = dict(t=t.expand(3), t_prev=t.expand(3) - 20, alphas_cumprod=scheduler.alphas_cumprod, eta=eta,
                 prediction_type=prediction_type)
    prev, log_prob = ddpo.ddim_step(output, x, prev=expected, **place)
    assert prev is expected
    drawn, of_drawn = ddpo.ddim_step(output, x, generator=torch.Generator().manual_seed(0), **place)
    z = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    assert_close(drawn, scheduler.step(output, t, x, eta=eta, variance_noise=z).prev_sample)
    if eta:
        mean = scheduler.step(output, t, x, eta=eta, variance_noise=torch.zeros_like(x)).prev_sample
        std = eta * scheduler._get_variance(t, t - 20).sqrt()
        assert_close(log_prob, torch.distributions.Normal(mean, std).log_prob(expected).mean((1, 2, 3)),
                     rtol=1e-4, atol=1e-4)
        assert of_drawn.isfinite().all()
    else:
        assert_close(drawn, expected)
        assert log_prob.isnan().all()


def test_ddim_step_takes_a_timestep_an_image():
    """A batch of three timesteps is three batches of one."""
    scheduler, (output, x, prev) = ddim_scheduler(), velocities(3).float()
    t = scheduler.timesteps[[0, 20, 49]]
    log_prob = lambda rows: ddpo.ddim_step(  # noqa: E731
        output[rows], x[rows], t[rows], t[rows] - 20, scheduler.alphas_cumprod, prev=prev[rows])[1]
    assert_close(log_prob([0, 1, 2]), torch.cat([log_prob([i]) for i in range(3)]))


def test_ddim_step_of_another_prediction_is_an_error():
    with pytest.raises(ValueError, match="'sample': epsilon or v_prediction"):
        ddpo.ddim_step(*velocities(1)[:2], *torch.tensor([[1], [0]]), ddim_scheduler().alphas_cumprod,
                       prediction_type="sample")


SIGMAS = torch.linspace(1, 0, 201, dtype=torch.float64)


def flow_sde(noise_level, sigmas=SIGMAS, mean=0.7, std=0.5, count=20_000):
    """Draws of N(mean, std^2) by the SDE, and the ODE's from the same start."""
    g = torch.Generator().manual_seed(0)
    x = ode = torch.randn(count, 1, 1, 1, dtype=torch.float64, generator=g)
    for sigma, below in zip(sigmas, sigmas[1:]):
        v = gaussian_velocity(x, sigma, mean, std)
        x, _ = ddpo.flow_sde_step(v, x, sigma, below, sigmas[1], noise_level, generator=g)
        ode = ode + (below - sigma) * gaussian_velocity(ode, sigma, mean, std)
    return x, ode


@parametrize("noise_level", [0.3, 0.7])
def test_the_flow_sde_keeps_the_marginals(noise_level):
    """Of Gaussian data: whatever the noise, mean and deviation end where the data has them."""
    x, ode = flow_sde(noise_level)
    assert x.mean().item() == pytest.approx(0.7, abs=0.01) and x.std().item() == pytest.approx(0.5, abs=0.01)
    assert (x - ode).std() > 0.1  # and not by following the ODE


def test_the_flow_sde_without_noise_is_the_ode():
    """As noise_level goes to 0 it becomes Euler's step."""
    x, ode = flow_sde(0.0, count=100)
    assert_close(x, ode)
    gaps = [(flow_sde(level, count=100)[0] - ode).abs().max() for level in (1e-2, 1e-3)]
    assert gaps[1] < gaps[0] / 5 < 0.05


def test_flow_sde_step_by_hand():
    """Its mean and deviation at one sigma, and at sigma = 1, where 1 - sigma_max stands in for 1 - sigma."""
    v, x, prev = velocities(3)
    for sigma, below, rest in ((0.8, 0.5, 0.2), (1.0, 0.9, 0.1)):
        s, dt = 0.7 * math.sqrt(sigma / rest), below - sigma
        sigma, below = (torch.tensor(value, dtype=torch.float64) for value in (sigma, below))
        mean = x * (1 + s**2 / (2 * sigma) * dt) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
        expected = torch.distributions.Normal(mean, s * math.sqrt(-dt)).log_prob(prev).mean((1, 2, 3))
        taken, log_prob = ddpo.flow_sde_step(v, x, sigma, below, torch.tensor(0.9).double(), prev=prev)
        assert taken is prev
        assert_close(log_prob, expected)


ADVANTAGES = torch.tensor([1.5, -0.5, 0.3, -2.0], dtype=torch.float64)


def test_importance_sampling_is_the_score_function_at_ratio_one():
    """The same gradient, whatever the advantages and the log-probabilities are."""
    log_prob = torch.tensor([-1.0, -0.2, 3.0, -7.0], dtype=torch.float64, requires_grad=True)
    sf, = torch.autograd.grad(ddpo.score_function_loss(log_prob, ADVANTAGES), log_prob)
    for clip in (1e-4, 0.2):
        loss = ddpo.importance_sampling_loss(log_prob, log_prob.detach(), ADVANTAGES, clip)
        assert_close(torch.autograd.grad(loss, log_prob)[0], sf)
    assert_close(sf, -ADVANTAGES / 4)


@parametrize("advantage, change, live", [(1, 0.3, False), (1, -0.3, True), (-1, 0.3, True), (-1, -0.3, False),
                                         (1, 0.1, True), (-1, -0.1, True)])
def test_clipping_zeroes_the_gradients_it_should(advantage, change, live):
    """Those of steps that already went the advantage's way by more than the clip; those against it stay."""
    old, A = torch.zeros(1), torch.tensor([float(advantage)])
    log_prob = torch.tensor([change], requires_grad=True)
    gradient, = torch.autograd.grad(ddpo.importance_sampling_loss(log_prob, old, A, 0.2), log_prob)
    assert gradient.item() == pytest.approx(-advantage * math.exp(change) if live else 0)


def test_prompt_statistics():
    """A prompt's own mean and deviation once it has enough rewards, the batch's until then. Old ones go."""
    statistics, R = ddpo.PromptStatistics(buffer=4, minimum=3), torch.tensor([1.0, 2.0, 6.0, 11.0])
    A = statistics.advantages(["cat", "cat", "cat", "dog"], R)
    assert_close(A[:3], (R[:3] - 3) / (R[:3].std(correction=0) + 1e-6))
    assert_close(A[3], (11 - R.mean()) / (R.std(correction=0) + 1e-6))
    A = statistics.advantages(["cat", "cat"], torch.tensor([0.0, 4.0]))
    own = torch.tensor([2.0, 6.0, 0.0, 4.0])
    assert_close(A, (own[2:] - own.mean()) / (own.std(correction=0) + 1e-6))


def test_advantages_of_one_reward_for_all_are_zero_and_outliers_are_clipped():
    assert ddpo.PromptStatistics().advantages(["a"] * 20, torch.full((20,), 0.3)).abs().max() < 1e-5
    R = torch.cat([torch.zeros(99), torch.ones(1)])
    assert ddpo.PromptStatistics().advantages(["a"] * 100, R).max() == 5


def test_weights_of_the_baselines():
    """rwr: softmax at a temperature, 1 on average; rwr-sparse: the best tenth, as often as all were."""
    A = torch.randn(40, generator=torch.Generator().manual_seed(0))
    weights = ddpo.rwr_weights(A, 0.2)
    assert weights.mean().item() == pytest.approx(1)
    assert_close(weights[0] / weights[1], torch.exp((A[0] - A[1]) / 0.2))
    assert_close(ddpo.rwr_weights(A, 1e6), torch.ones(40), rtol=1e-4, atol=0)
    best = ddpo.best_images(A, 0.1)
    assert len(best) == 40 and set(best.tolist()) == set(A.argsort()[-4:].tolist())
    assert best.bincount().max() == 10 and len(ddpo.best_images(A, 0.3)) == 40


@parametrize("algorithm", ["sf", "is"])
def test_a_known_optimum_is_climbed(algorithm):
    """Policy N(theta, 1), reward -(x - 3)^2: theta goes from 0 to 3."""
    theta, g = torch.zeros((), requires_grad=True), torch.Generator().manual_seed(0)
    for _ in range(60):
        x = theta.detach() + torch.randn(256, 1, 1, 1, generator=g)
        R = -(x - 3).square().flatten()
        A = ddpo.PromptStatistics().advantages(["a prompt"] * 256, R)
        old = ddpo.gaussian_log_prob(x, theta, torch.ones(())).detach()
        for _ in range(1 if algorithm == "sf" else 3):
            log_prob = ddpo.gaussian_log_prob(x, theta, torch.ones(()))
            loss = (ddpo.score_function_loss(log_prob, A) if algorithm == "sf" else
                    ddpo.importance_sampling_loss(log_prob, old, A, 0.2))
            theta.data -= 0.15 * torch.autograd.grad(loss, theta)[0]
    assert theta.item() == pytest.approx(3, abs=0.3)


# ------------------------------------------------------------------------------------------- DDPO: its models

@pytest.fixture(scope="session")
def tiny_sd1(tmp_path_factory):
    """A Stable Diffusion 1.x pipeline of random weights on disk: 32 px images, 16 x 16 latents."""
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
    return path


def ddpo_settings(model, **settings):
    """A very short run's, on the toy or on tiny_sd1."""
    return ddpo.Settings(**{**dict(
        model=str(model), reward="compressibility", prompts="animals", height=32,
        width=64 if model == TINY else 32, max_sequence_length=1, rank=2, alpha=4, images=8, group_size=2,
        steps=4, guidance=2.0, batch=3, stat_min=2, grad_checkpoint=False, eval_images=2, device="cpu",
        name="x"), **settings})


def family_with_lora(model, **settings):
    """A model family whose update is away from zero, and its conditions for three prompts and for none."""
    s = ddpo_settings(model, **settings)
    family = ddpo.load_family(s, CPU)
    torch.manual_seed(0)
    layers = ddpo.add_lora(family.network, family.targets, 2, 6)
    for layer in layers.values():
        layer.B.data.normal_(std=0.1)
    return s, family, layers, ddpo.encode(family, ["a cat", "a dog", "a cat"]), ddpo.encode(family, [""])


@pytest.fixture(params=["sd1", "sd3"])
def any_model(request, tiny_sd1):
    return tiny_sd1 if request.param == "sd1" else TINY


@parametrize("dtype", ["fp32", "bf16"])
@parametrize("guidance", [1.0, 3.0])
def test_the_first_ratio_is_exactly_one(any_model, dtype, guidance):
    """Sampling and training compute the very same numbers, gradients or not, checkpointed or not."""
    s, family, layers, cond, empty = family_with_lora(any_model, dtype=dtype, guidance=guidance)
    noise = torch.randn(3, *ddpo.latent_shape(family, s), generator=torch.Generator().manual_seed(0))
    chunks = torch.arange(3).split(2)
    trajectory, log_probs = ddpo.rollout(family, noise, cond, empty, chunks, s, CPU,
                                         torch.Generator().manual_seed(0))
    assert trajectory.shape == (3, 5, *noise.shape[1:]) and log_probs.shape == (3, s.random_steps)
    assert torch.equal(trajectory[:, 0], noise) and log_probs.isfinite().all()
    step = lambda: ddpo.policy_gradients(  # noqa: E731
        family, trajectory, log_probs, torch.ones(3), cond, empty, chunks, range(s.random_steps), s)
    for checkpoint in (False, True):
        if checkpoint:
            ddpo.checkpoint_blocks(ddpo.blocks_of(family.network))
        logs = step()
        assert logs["ratio_min"] == logs["ratio_max"] == 1 and logs["approx_kl"] == 0
    layers[next(iter(layers))].B.data += 0.1
    logs = step()
    assert logs["ratio_min"] < logs["ratio_max"] and logs["approx_kl"] > 0


def test_an_ode_ends_the_walk(any_model):
    """After the random steps there is no noise: what was drawn is the step that nobody drew."""
    s, family, _, cond, empty = family_with_lora(any_model, random_steps=2)
    noise = torch.randn(3, *ddpo.latent_shape(family, s), generator=torch.Generator().manual_seed(0))
    path, _ = ddpo.rollout(family, noise, cond, empty, [torch.arange(3)], s, CPU,
                           torch.Generator().manual_seed(0))
    for i in range(s.steps):
        with torch.no_grad():
            output = ddpo.guided(family, path[:, i], i, cond, empty, s.guidance)
        assert torch.equal(family.step(output, path[:, i], i, noise=0.0)[0], path[:, i + 1]) == (i >= 2)


def ddpo_gradients(layers):
    return torch.cat([p.grad.flatten() for layer in layers.values() for p in (layer.A, layer.B)])


def test_the_batch_changes_no_gradient(any_model):
    """One image at a time or all at once, steps in any order: the mean over images and steps."""
    found = []
    for batch, steps in ((1, [0, 1, 2, 3]), (3, [3, 1, 0, 2])):
        s, family, layers, cond, empty = family_with_lora(any_model, dtype="fp32", algorithm="sf")
        noise = torch.randn(3, *ddpo.latent_shape(family, s), generator=torch.Generator().manual_seed(0))
        trajectory = torch.stack([0.9**i * noise.roll(i, 0) for i in range(5)], 1)
        ddpo.policy_gradients(family, trajectory, torch.zeros(3, 4), ADVANTAGES[:3].float(), cond, empty,
                              torch.arange(3).split(batch), steps, s)
        found.append(ddpo_gradients(layers))
    assert distance(*found) < 1e-4


def test_ddpos_checkpointing_changes_memory_not_gradients(any_model):
    """Of a transformer's blocks as of a UNet's, whatever arguments they take."""
    s, family, layers, cond, empty = family_with_lora(any_model, dtype="fp32")
    x = torch.randn(3, *ddpo.latent_shape(family, s), generator=torch.Generator().manual_seed(0))

    def saved_bytes():
        family.network.zero_grad()
        loss, size = kept_for_backward(lambda: ddpo.guided(family, x, 1, cond, empty, 1.0).square().mean())
        loss.backward()
        return size

    plain, expected = saved_bytes(), ddpo_gradients(layers)
    ddpo.checkpoint_blocks(ddpo.blocks_of(family.network))
    assert saved_bytes() < plain / 2
    assert distance(ddpo_gradients(layers), expected) < 1e-5


def test_ddpos_lora_starts_as_the_identity_and_comes_back(any_model, tmp_path):
    s = ddpo_settings(any_model)
    family = ddpo.load_family(s, CPU)
    cond, x = ddpo.encode(family, ["a cat"]), torch.ones(1, *ddpo.latent_shape(family, s))
    before = family.predict(x, 0, cond)
    layers = ddpo.add_lora(family.network, family.targets, 2, 6)
    assert torch.equal(family.predict(x, 0, cond), before)
    for layer in layers.values():
        layer.B.data.normal_(std=0.1)
    expected = family.predict(x, 0, cond)
    ddpo.save_lora(tmp_path / "lora.safetensors", layers, family.prefix)
    for layer in layers.values():
        layer.B.data.zero_()
    ddpo.load_lora(tmp_path / "lora.safetensors", layers, family.prefix)
    assert_close(family.predict(x, 0, cond), expected)
    assert (expected - before).abs().max() > 1e-3
    with pytest.raises(ValueError, match="same model and --rank"):
        ddpo.load_lora(tmp_path / "lora.safetensors", dict(list(layers.items())[1:]), family.prefix)


def test_lora_is_on_all_of_a_unets_attention(tiny_sd1):
    """Queries, keys, values and outputs of self- and cross-attention, and nothing else."""
    family = ddpo.load_family(ddpo_settings(tiny_sd1), CPU)
    names = set(ddpo.add_lora(family.network, family.targets, 2, 6))
    assert {name.split(".attn")[1] for name in names} == {
        f"{i}.{name}" for i in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")}
    with pytest.raises(ValueError, match="no linear layer"):
        ddpo.add_lora(family.network, ["nowhere"])


@parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_the_baselines_noise_images_as_the_scheduler_does(tiny_sd1, prediction_type):
    """x_t and target are diffusers'; a UNet that predicts that target would draw that image."""
    family = ddpo.load_family(ddpo_settings(tiny_sd1), CPU)
    family.prediction_type = prediction_type
    x0, noise, i = *velocities(2)[:2].float(), torch.tensor([1, 3])
    x, target = family.add_noise(x0, noise, i)
    scheduler = ddim_scheduler(prediction_type, 4)
    t = scheduler.timesteps[i]
    assert_close(x, scheduler.add_noise(x0, noise, t))
    assert_close(target, noise if prediction_type == "epsilon" else scheduler.get_velocity(x0, noise, t))
    last = torch.full((2,), 3)
    x, target = family.add_noise(x0, noise, last)
    clean, _ = family.step(target, x, last, noise=0.0)
    alpha = family.alphas_cumprod[0]
    assert_close(clean, alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise, rtol=1e-4, atol=1e-4)


def test_a_flow_is_noised_along_its_path():
    family = ddpo.load_family(ddpo_settings(TINY), CPU)
    x0, noise, i = *velocities(2)[:2].float(), torch.tensor([0, 2])
    x, u = family.add_noise(x0, noise, i)
    assert_close(x, crd.add_noise(x0, noise, family.sigmas[i])) and torch.equal(u, noise - x0)


def test_long_trajectories_move_to_the_cpu(monkeypatch):
    """When they would take more than a quarter of the GPU's free memory; on a CPU there is no question."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1600, 10_000))
    assert ddpo.trajectory_device(100, torch.device("cuda")) == torch.device("cuda")
    assert ddpo.trajectory_device(101, torch.device("cuda")) == ddpo.trajectory_device(9**9, CPU) == CPU


def test_guidance_is_in_training_and_in_sampling(any_model):
    """out(empty) + w (out(c) - out(empty)), for a step or a step an image."""
    s, family, layers, cond, empty = family_with_lora(any_model, dtype="fp32")
    x = torch.randn(3, *ddpo.latent_shape(family, s), generator=torch.Generator().manual_seed(0))
    for i in (1, torch.tensor([0, 1, 3])):
        nothing = [e.expand(3, *e.shape[1:]) for e in empty]
        with_prompt, without = family.predict(x, i, cond), family.predict(x, i, nothing)
        assert_close(ddpo.guided(family, x, i, cond, empty, 3.0), without + 3 * (with_prompt - without),
                     rtol=1e-3, atol=1e-3)


# --------------------------------------------------------------------------------------------- DDPO: its runs

@parametrize("flags, expected", [
    ([], dict(model="CompVis/stable-diffusion-v1-4", reward="compressibility", prompts="animals", images=256,
              algorithm="is", clip=1e-4, advantage_clip=5, stat_buffer=32, stat_min=16, temperature=0.2,
              keep=0.1, eta=1, noise_level=0.7, lr=3e-4, weight_decay=1e-4, max_grad_norm=1)),
    (["--reward", "aesthetic"], dict(preset="aesthetic", prompts="animals")),
    (["--reward", "vlm"], dict(preset="alignment", prompts="activities")),
    (["--preset", "alignment"], dict(reward="vlm", prompts="activities")),
    (["--reward", "ocr"], dict(reward="ocr", prompts="", preset="", name="ddpo-ocr-is-seed0")),
    (["--preset", "compressibility", "--reward", "ocr"], dict(reward="ocr", prompts="animals")),
    (["--preset", "tiny", "--images", "48"], dict(images=48, prompts="signs", guidance=1))])
def test_ddpos_presets_are_the_papers(flags, expected):
    s = asdict(ddpo.parse(flags))
    assert {key: s[key] for key in expected} == expected


@parametrize("model, algorithm, expected", [("sd1", "is", (50, 50, 5.0, 4)), ("sd1", "sf", (50, 50, 5.0, 1)),
                                            ("sd3", "is", (10, 9, 4.5, 4))])
def test_the_family_fills_in_steps_and_guidance(tiny_sd1, model, algorithm, expected):
    s = ddpo_settings(TINY if model == "sd3" else tiny_sd1, steps=0, guidance=0.0, algorithm=algorithm)
    ddpo.validate(s)
    ddpo.load_family(s, CPU)
    assert (s.steps, s.random_steps, s.guidance, s.updates) == expected


@parametrize("flags, message", [
    (["--preset", "huge"], "--preset huge: .* choose from compressibility, aesthetic, alignment, tiny"),
    (["--resume", "nowhere"], "--resume nowhere: .*args.json; give a run.s folder"),
    ([], "stable-diffusion-v1-4 needs a CUDA device.* --preset tiny"),
    ([*TOY, "--model", "no/model"], "no/model.*--preset tiny"),
    ([*TOY, "--algorithm", "ppo"], "--algorithm ppo: choose from is, sf, rwr, rwr-sparse"),
    ([*TOY, "--algorithm", "sf", "--updates", "2"], "--algorithm is takes several"),
    ([*TOY, "--images", "10"], "--images 10 is no multiple of --updates 4"),
    ([*TOY, "--images", "12"], "--images 12 is no multiple of --group-size 8"),
    ([*TOY, "--clip", "0"], "--clip 0.0: must be positive"),
    ([*TOY, "--keep", "1.5"], "--keep 1.5: .* at most 1"),
    ([*TOY, "--stat-min", "40"], "--stat-min 40: .* --stat-buffer is 32"),
    ([*TOY, "--train-timesteps", "11"], "--train-timesteps 11: there are 3 random"),
    ([*TOY, "--random-steps", "11"], "--random-steps 11: .* the 10 of --steps"),
    ([*TOY, "--reward", "beauty"], "unknown reward 'beauty'")])
def test_a_users_mistake_ends_ddpo_in_one_line(monkeypatch, tmp_path, flags, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(ddpo, "rollout", lambda *args: pytest.fail("an image was sampled"))
    assert re.search(message, leave(monkeypatch, *flags, script=ddpo))


def test_a_pipeline_of_another_kind_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    with pytest.raises(ValueError, match="a FluxPipeline, none of StableDiffusionPipeline"):
        ddpo.load_family(ddpo_settings(tmp_path), CPU)


@parametrize("algorithm", ["is", "sf", "rwr", "rwr-sparse"])
def test_a_ddpo_run_resumes_to_the_bit(any_model, monkeypatch, tmp_path, algorithm):
    """LoRA, optimizer, random numbers, prompt statistics, metrics: as if it had not been stopped."""
    monkeypatch.chdir(tmp_path)
    go = lambda name, epochs: ddpo.train(ddpo_settings(  # noqa: E731
        any_model, name=name, epochs=epochs, eval_every=1, algorithm=algorithm, eval_noise=1.0))
    straight, stopped = go("straight", 3), go("stopped", 1)
    assert json.loads((stopped / "args.json").read_text())["random_steps"] == 0  # as given, not filled in
    ddpo.train(ddpo.parse(["--resume", str(stopped), "--epochs", "3"]))
    assert_close(state(stopped), state(straight), rtol=0, atol=0)
    assert [m for m in metrics(stopped) if m["split"] == "train"] == [
        m for m in metrics(straight) if m["split"] == "train"]
    line = metrics(straight)[1]
    if algorithm in ("is", "sf"):
        assert line["first_ratio_error"] == 0
        assert line.keys() >= {"ratio", "ratio_std", "ratio_min", "ratio_max", "clip_fraction", "approx_kl"}
    assert {path.name for path in straight.rglob("*.*")} == {
        "args.json", "metrics.jsonl", "curve.png", *(f"epoch-000{i}.png" for i in range(4)),
        "state.pt", "pytorch_lora_weights.safetensors"}


def test_ddpo_logs_unseen_rewards_side_by_side(monkeypatch, tmp_path):
    """On all prompts of --eval-prompts, as often as it evaluates; looking again leaves the curve alone."""
    monkeypatch.chdir(tmp_path)
    Path("drawbench.txt").write_text("a red cube\na blue cube\nthree dogs\n")
    folder = ddpo.train(ddpo_settings(TINY, epochs=1, eval_rewards="incompressibility",
                                      eval_prompts="drawbench.txt"))
    lines = [line for line in metrics(folder) if line["split"] == "eval"]
    assert [line["incompressibility"] for line in lines] == [-line["reward"] for line in lines]
    curve = ddpo.reward_curve(folder)
    ddpo.train(ddpo.parse(["--resume", str(folder), "--epochs", "0"]))
    assert metrics(folder)[-1] == {**lines[1], "split": "test"} and ddpo.reward_curve(folder) == curve


def test_ddpo_stops_before_a_step_with_a_non_finite_loss(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    folder = ddpo.train(ddpo_settings(TINY, epochs=1))
    before = state(folder)
    monkeypatch.setattr(ddpo, "importance_sampling_loss", lambda log_prob, *rest: log_prob.sum() * math.nan)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda *args: pytest.fail("a step was made"))
    message = leave(monkeypatch, "--resume", folder, "--epochs", 2, script=ddpo)
    assert "the loss is nan at denoising step" in message and f"--resume {folder}" in message
    assert_close(state(folder), before, rtol=0, atol=0)


def test_ddpos_lora_gives_the_same_image_in_diffusers(tiny_sd1, tmp_path):
    """Of a StableDiffusionPipeline, through its own sampler at eta 0, with guidance."""
    pytest.importorskip("peft", reason="peft is not installed; diffusers needs it for load_lora_weights")
    load = lambda: ddpo.load_family(ddpo_settings(tiny_sd1, dtype="fp32", steps=4), CPU)  # noqa: E731
    draw = lambda family: torch.from_numpy(family.pipe(  # noqa: E731
        "a cat", height=32, width=32, num_inference_steps=4, guidance_scale=3.0, output_type="np",
        generator=torch.Generator().manual_seed(0)).images)
    ours, theirs = load(), load()
    before = draw(ours)
    layers = ddpo.add_lora(ours.network, ours.targets, 4, 12)
    torch.manual_seed(0)
    for layer in layers.values():
        layer.B.data.normal_(std=0.3)
    ddpo.save_lora(tmp_path / "pytorch_lora_weights.safetensors", layers, ours.prefix)
    theirs.pipe.load_lora_weights(tmp_path)
    assert (draw(ours) - before).abs().max() > 0.01
    assert_close(draw(theirs), draw(ours), rtol=0, atol=1e-3)


@parametrize("random_steps", [4, 2])
def test_the_policy_gradient_is_the_gradient_of_the_expected_reward(tiny_sd1, random_steps):
    """The score function, over many images, agrees with backpropagation through the whole chain; where an
    ODE ends the chain, with the policy held fixed there."""
    s, family, layers, _, empty = family_with_lora(tiny_sd1, dtype="fp32", algorithm="sf", height=4, width=4,
                                                   random_steps=random_steps)
    cond, chunks = [e.expand(4096, *e.shape[1:]) for e in empty], [torch.arange(4096)]
    reward = lambda x0: x0[:, :3].mean((1, 2, 3))  # noqa: E731
    noise = torch.randn(4096, *ddpo.latent_shape(family, s), generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(1)
    trajectory, log_probs = ddpo.rollout(family, noise, cond, empty, chunks, s, CPU, g)
    R = reward(trajectory[:, -1])
    ddpo.policy_gradients(family, trajectory, log_probs, R - R.mean(), cond, empty, chunks,
                          range(random_steps), s)
    estimate = -ddpo_gradients(layers) * random_steps * noise[0].numel()  # log p was averaged over both
    family.network.zero_grad()
    x = noise
    parameters = [p for p in family.network.parameters() if p.requires_grad]
    for i in range(s.steps):
        for p in parameters:
            p.requires_grad_(i < random_steps)
        output = ddpo.guided(family, x, i, cond, empty, s.guidance)
        x, _ = family.step(output, x, i, noise=float(i < random_steps), generator=g)
    for p in parameters:
        p.requires_grad_(True)
    reward(x).mean().backward()
    exact = ddpo_gradients(layers)
    assert torch.cosine_similarity(estimate, exact, 0) > 0.85
    assert 0.6 < torch.dot(estimate, exact) / exact.square().sum() < 1.6


def test_a_short_ddpo_run_raises_compressibility(tiny_sd1, monkeypatch, tmp_path):
    """Of a random UNet's pictures, by the policy gradient through DDIM's steps.

    A random VAE draws nothing but noise of one size. This decoder draws a texture, as faint as the latents'
    mean is low.
    """
    texture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    decoder = lambda self, latents: latents.mean((1, 2, 3), keepdim=True).sigmoid() * texture  # noqa: E731
    monkeypatch.setattr(ddpo.StableDiffusion, "decode", decoder)
    monkeypatch.chdir(tmp_path)
    folder = ddpo.train(ddpo_settings(
        tiny_sd1, name="learn", images=256, group_size=1, batch=256, guidance=1.0, rank=8, alpha=16, lr=2e-2,
        clip=1e-2, height=4, width=4, epochs=12, eval_every=100, eval_images=256, eval_noise=1.0))
    before, after = (reward for _, reward in ddpo.reward_curve(folder))
    assert after > before + 0.02


# ------------------------------------------------------------------------------------------------- the README

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


# ------------------------------------------------------------------------------------------------ a benchmark

def overhead(epochs=6):
    """An epoch's wall time over that of the bare transformer and VAE calls it has to make, tiny preset.

    After each epoch the same calls are made alone, on the same modules, in the same process: the rollout's
    forward passes, the decoding, and at each sigma the policy forward and backward, `old`, and the reference.
    """
    os.chdir(tempfile.mkdtemp())
    s = crd.parse(["--preset", "tiny", "--epochs", str(epochs), "--eval-images", "1", "--eval-every", "1000"])
    report, whole, bare = crd.report, [], []

    def forward(run, images, grad=False):
        cond = [t.repeat_interleave(images, 0) for t in run.empty]
        plain = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH) if grad else nullcontext()
        with torch.set_grad_enabled(grad), plain:
            x = torch.randn(images, *crd.latent_shape(run.pipe, s))
            return crd.velocity(run.pipe.transformer, x, SIGMA, cond)

    def calls(run, *args):
        whole.append(time.perf_counter() - calls.start)
        report(run, *args)
        start, share = time.perf_counter(), s.groups // s.steps_per_epoch * s.group_size
        for rows in torch.arange(s.groups * s.group_size).split(s.sample_batch):
            for _ in range(s.rollout_steps):
                forward(run, len(rows))
            for part in rows.split(s.decode_batch):
                with torch.no_grad():
                    run.pipe.vae.decode(torch.randn(len(part), *crd.latent_shape(run.pipe, s)))
        for _ in range(s.train_timesteps * s.steps_per_epoch):
            forward(run, share)
            with crd.use_adapter(run.layers, None):
                forward(run, 2 * share)
            torch.autograd.grad(forward(run, share, grad=True).sum(), run.optimizer.param_groups[0]["params"])
        bare.append(time.perf_counter() - start)
        calls.start = time.perf_counter()

    def evaluate(run, epoch):
        calls.start = time.perf_counter()

    crd.report, crd.evaluate = calls, evaluate
    crd.train(s)
    whole, bare = (statistics.median(times[1:]) for times in (whole, bare))  # the first epoch warms up
    print(f"epoch {whole:.2f} s, bare calls {bare:.2f} s, ratio {whole / bare:.3f} (medians of {epochs - 1} "
          f"epochs, {torch.get_num_threads()} threads)")


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
