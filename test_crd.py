"""What CRD claims, each claim a test that fails when the line it guards is broken. CPU only, no network.

    python -m pytest -q test_crd.py
    python test_crd.py                 # not a test: an epoch's time over that of its bare model calls
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
from contextlib import nullcontext
from dataclasses import asdict, fields
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports that read it

import pytest  # noqa: E402
import torch  # noqa: E402
from diffusers import SD3Transformer2DModel  # noqa: E402
from PIL import Image  # noqa: E402
from torch.testing import assert_close  # noqa: E402

import crd  # noqa: E402
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

def saved_bytes(model, layers):
    """Bytes that one forward pass keeps for its backward pass, which is run, after a change of adapter."""
    sizes = {}

    def pack(tensor):
        sizes[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = predict(model, 8, grad=True).square().mean()
    with crd.use_adapter(layers, "old"):
        loss.backward()
        assert {layer.active for layer in layers.values()} == {"old"}
    return sum(sizes.values())


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
    """60 held-out words, drawn cleanly: at least 98 % to the letter, and what is read is scored."""
    spec = importlib.util.spec_from_file_location("make", TINY / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    pairs, rng = rewards.prompts("signs", "eval", 0)[:60], random.Random(0)
    prompts, metadata = zip(*pairs)
    images = [make.draw(prompt, rng)[0] for prompt in prompts]
    exact = [text.casefold() == rewards.quoted(prompt) for text, prompt in zip(toy_ocr.read(images), prompts)]
    assert sum(exact) >= 0.98 * 60
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
    ("beauty", "unknown reward 'beauty' .* compressibility, incompressibility"), ("", "unknown reward ''"),
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
    ("a.txt", "just one", "a.txt has no prompt for the split"),
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


def leave(monkeypatch, *flags):
    """What `python crd.py *flags` says on leaving: one line."""
    monkeypatch.setattr(sys, "argv", ["crd.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stopped:
        crd.main()
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
    ([*TOY, "--groups", "3", "--steps-per-epoch", "2"], "--steps-per-epoch"),
    ([*TOY, "--rollout-steps", "2", "--train-timesteps", "3"], "--train-timesteps"),
    ([*TOY, "--anchor-adapt", "often"], "--anchor-adapt"), ([*TOY, "--dtype", "fp8"], "--dtype")])
def test_a_users_mistake_ends_in_one_line(monkeypatch, tmp_path, flags, message):
    """It says what was wrong and what to do, before the first image."""
    monkeypatch.chdir(tmp_path)
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
    short = {"name": "learn", "anchor": 0.0, "lr": 1e-3, "epochs": 10, "eval_every": 100}
    folder = crd.train(Settings(**{**PRESETS["tiny"], **short}))
    before, after = (reward for _, reward in crd.reward_curve(folder))
    assert after > before + 0.06


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
        for _ in range(s.rollout_steps):
            forward(run, s.groups * s.group_size)
        with torch.no_grad():
            run.pipe.vae.decode(torch.randn(s.groups * s.group_size, *crd.latent_shape(run.pipe, s)))
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


if __name__ == "__main__":
    overhead()
