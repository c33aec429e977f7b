"""What CRD and DDPO claim, each claim a test that fails when its line is broken.

    python -m pytest -q test_crd.py

On a CPU, without a network, in five to ten minutes.
"""

import importlib
import inspect
import io
import itertools
import json
import math
import os
import random
import re
import shutil
import socket
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import weakref
import zlib
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

os.environ["HF_HUB_OFFLINE"] = "1"  # before the imports that read it

import diffusers  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from PIL import Image  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402
from torch.testing import assert_close  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

TINY = Path(__file__).parent / "tiny-sd3"
sys.path.insert(0, str(TINY))

import crd  # noqa: E402
import ddpo  # noqa: E402
import rewards  # noqa: E402
import rwr  # noqa: E402

CPU = torch.device("cpu")
parametrize = pytest.mark.parametrize
in_both_scripts = parametrize("script", [crd, ddpo], ids=["crd", "ddpo"])
any_shape = parametrize("shape", [(4, 2, 3, 3), (4, 5, 6), (4, 2, 3, 3, 3)], ids=str)

SHARED = "LoRALinear add_lora use_adapter ema_update adapter_tensors adapter_state load_lora"
SHARED += " Checkpoint checkpoint expect part_class load_parts gather average_gradients"


@parametrize("name", SHARED.split())
def test_the_scripts_share_these_lines(name):
    """So a test of one below is a test of both."""
    assert inspect.getsource(getattr(crd, name)) == inspect.getsource(getattr(ddpo, name))


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# CRD's mathematics

R = torch.tensor([0.1, 0.4, 0.2, 1.0, 0.0, 0.5, 0.3, 0.6], dtype=torch.float64)  # 2 groups of 4
TARGETS = crd.reward_targets(R, 4)
RHO = randn(8, seed=3, dtype=torch.float64)


def centered(x):
    groups = x.view(2, 4)
    return (groups - groups.mean(1, keepdim=True)).flatten()


def gaussian_velocity(x, sigma, mean, std):
    """E[noise - x0 | x_sigma = x] for data N(mean, std^2): what a perfect model predicts."""
    variance = (1 - sigma) ** 2 * std**2 + sigma**2
    residual = (x - (1 - sigma) * mean) / variance
    return sigma * residual - (mean + (1 - sigma) * std**2 * residual)


def euler(velocity, x, sigmas):
    for s, t in itertools.pairwise(sigmas):
        x = x + (t - s) * velocity(x, s)
    return x


def sampling_error(sampler, sigmas, std):
    """Data N(0.7, std^2) moves noise z to 0.7 + std z exactly."""
    noise = randn(2000, 1, dtype=torch.float64)
    x0 = sampler(lambda x, sigma: gaussian_velocity(x, sigma, 0.7, std), noise, sigmas)
    return (x0 - (0.7 + std * noise)).square().mean().sqrt().item()


def test_sample_ode_converges_at_second_order():
    """Twice the steps, a quarter of the error."""
    coarse, fine = (torch.linspace(1, 0, n + 1, dtype=torch.float64) for n in (160, 320))
    error = sampling_error(crd.sample_ode, coarse, std=1.0)
    assert error < 2e-4
    assert error / sampling_error(crd.sample_ode, fine, std=1.0) == pytest.approx(4, rel=0.1)


@parametrize("shift", [1.0, 3.0])
@parametrize("steps", [4, 10, 20, 40])
def test_sample_ode_is_never_less_accurate_than_euler(shift, steps):
    """On diffusers' schedules, whose second to last step is several times as long as the others."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()
    ratio = sampling_error(crd.sample_ode, sigmas, 0.25) / sampling_error(euler, sigmas, 0.25)
    assert ratio < (1 + 1e-9 if steps == 4 else 0.97)


@parametrize("ratio, is_euler", [(1.9, False), (2.1, True)])
def test_a_step_over_twice_as_long_as_the_last_is_eulers(ratio, is_euler):
    """In log-SNR."""
    log_snr = torch.tensor([-1.0, 0.0, ratio, math.inf], dtype=torch.float64)
    sigmas = torch.sigmoid(-log_snr)
    noise = randn(50, 1, dtype=torch.float64)
    ours, eulers = (
        sampler(lambda x, sigma: gaussian_velocity(x, sigma, 0.7, 0.5), noise, sigmas)
        for sampler in (crd.sample_ode, euler)
    )
    assert torch.allclose(ours, eulers) == is_euler


def test_sample_ode_refuses_sigmas_that_do_not_descend_to_0():
    for sigmas in ([1.0, 0.5], [1.0, 0.5, 0.5, 0.0], [0.5, 1.0, 0.0]):
        with pytest.raises(ValueError, match="must descend to 0"):
            crd.sample_ode(lambda x, sigma: x, randn(1, 1), torch.tensor(sigmas))


def test_targets_are_advantages_on_0_to_1():
    """Centered per prompt, on the scale of the whole batch's standard deviation, and clipped."""
    A = centered(R) / (R.std(correction=0) + 1e-4)
    assert A.min() < -1 and A.max() > 1
    assert_close(TARGETS, A / 10 + 0.5)
    assert_close(crd.reward_targets(R, 4, clip=1.0), A.clamp(-1, 1) / 2 + 0.5)


@any_shape
def test_add_noise_goes_straight_from_image_to_noise(shape):
    x0, noise = randn(2, *shape)
    assert_close(crd.add_noise(x0, noise, torch.tensor(0.3)), 0.7 * x0 + 0.3 * noise)
    sigma = torch.tensor([0.0, 0.3, 0.6, 1.0])
    x = crd.add_noise(x0, noise, sigma)
    for i in range(4):
        assert_close(x[i], (1 - sigma[i]) * x0[i] + sigma[i] * noise[i])


@any_shape
def test_implicit_reward_compares_the_two_denoising_errors(shape):
    """Over all of an image's latents, each over its own mean |v - u|, which has no gradient."""
    v, v_old, u = (randn(*shape, seed=seed) for seed in range(3))
    v.requires_grad_()
    expected = []
    for i in range(4):
        error = (v[i] - u[i]).square().mean() / (v[i] - u[i]).abs().mean().detach()
        error_old = (v_old[i] - u[i]).square().mean() / (v_old[i] - u[i]).abs().mean()
        expected.append(error_old - error)
    rho = crd.implicit_reward(v, v_old, u)
    assert_close(rho, torch.stack(expected))
    assert_close(torch.autograd.grad(rho.sum(), v), torch.autograd.grad(sum(expected), v))


def test_implicit_reward_computes_in_float32_and_divides_nothing_by_0():
    v, v_old, u = randn(3, 8, 2, 3, 3).bfloat16()
    rho = crd.implicit_reward(v, v_old, u)
    assert torch.equal(rho, crd.implicit_reward(v.float(), v_old.float(), u.float()))
    assert crd.implicit_reward(u, v_old, u).isfinite().all()
    near, near_old = u.float() + 0.01, u.float() - 0.03  # m is 0.01 and 0.03
    assert_close(crd.implicit_reward(near, near_old, u), torch.full((8,), 0.02), rtol=0.02, atol=0)


def loss_and_gradient(rho, targets, **settings):
    rho = rho.clone().requires_grad_()
    loss = crd.crd_loss(rho, targets, 4, **settings)
    return loss.detach(), torch.autograd.grad(loss, rho)[0]


@parametrize("tau", [math.inf, 0.2])
def test_the_partition_function_cancels(tau):
    """A constant for a prompt, in its rewards or in its log-ratios, changes nothing."""
    offset = torch.tensor([0.0] * 4 + [0.3] * 4, dtype=torch.float64)
    expected = loss_and_gradient(RHO, TARGETS, tau=tau)
    assert_close(loss_and_gradient(RHO, TARGETS + offset, tau=tau), expected)
    assert_close(loss_and_gradient(RHO + offset, TARGETS, tau=tau), expected)


@parametrize("beta, clip", [(1.0, 5.0), (0.7, 2.0)])
def test_crd_loss_is_a_centered_regression(beta, clip):
    """At the reference its gradient is minus the advantage."""
    residual = beta * centered(RHO) - centered(TARGETS)
    loss, gradient = loss_and_gradient(RHO, TARGETS, beta=beta, clip=clip)
    assert_close(loss, clip / beta * residual.square().mean())
    assert_close(gradient, 2 * clip * residual / 8)
    targets = crd.reward_targets(R, 4, clip)
    _, gradient = loss_and_gradient(0 * RHO, targets, beta=beta, clip=clip)
    assert_close(gradient, -(targets - 0.5) * 2 * clip / 8)


def test_tau_goes_from_the_plain_mean_to_the_best_and_the_worst_image():
    plain, _ = loss_and_gradient(RHO, TARGETS)
    hot, _ = loss_and_gradient(RHO, TARGETS, tau=1e6)
    assert_close(hot, plain, rtol=1e-4, atol=1e-6)
    cold, gradient = loss_and_gradient(RHO, TARGETS, tau=1e-4)
    residuals = []
    for pick in (torch.argmax, torch.argmin):
        index = torch.stack([pick(TARGETS[:4]), 4 + pick(TARGETS[4:])]).repeat_interleave(4)
        residuals.append((RHO - RHO[index]) - (TARGETS - TARGETS[index]))
    assert_close(cold, 5 * torch.stack(residuals).square().mean())
    assert_close(gradient, 5 * torch.stack(residuals).sum(0) / 8)  # none through the means


def test_the_optimum_has_no_loss():
    """Data N(m, s^2), reward <g, x0>: the optimum p* is N(m + s^2 g / beta, s^2).

    With D = (1 - sigma)^2 s^2 + sigma^2, the best velocities of p* and p_old differ by
    -(sigma / D) s^2 g / beta. With one noise for the group, u - v_old is -(sigma / D) x0 plus a
    constant. So without adaptive weights, rho is, centered, the true log-ratio <g, x0> / beta times
    the ELBO's weight 2 (sigma s / D)^2 / d, and beta takes that up.
    """
    x0, noise, g = randn(3, 4, 2, 3, 3, dtype=torch.float64)
    noise, g = noise[:1], g[:1]
    m, s, beta = 0.3, 0.5, 0.8
    sigma = torch.tensor(0.6, dtype=torch.float64)
    D = (1 - sigma) ** 2 * s**2 + sigma**2
    elbo_weight = 2 * (sigma * s / D) ** 2 / g.numel()
    x = crd.add_noise(x0, noise, sigma)
    u = noise - x0
    reward = (g * x0).sum((1, 2, 3))
    v_old = gaussian_velocity(x, sigma, m, s)

    def loss(mean):
        v = gaussian_velocity(x, sigma, mean, s)
        rho = ((v_old - u).square() - (v - u).square()).mean((1, 2, 3))
        return crd.crd_loss(rho, reward, 4, beta=beta / elbo_weight).item()

    assert loss(m + s**2 * g / beta) < 1e-20
    assert loss(m + 0.9 * s**2 * g / beta) > 1e-4
    assert loss(m) > 1e-2


@any_shape
def test_the_anchor_grows_with_the_reward(shape):
    """Its weight is kappa_min at reward 0 and kappa at reward 1."""
    v = randn(*shape)
    v_ref = randn(*shape, seed=1)
    distance = (v - v_ref).square().flatten(1).mean(1)
    n = torch.tensor([0.0, 1.0, 0.5, 0.5])
    kappa = torch.tensor([1e-4, 0.1, 0.05005, 0.05005])
    assert_close(crd.anchor_loss(v, v_ref, n, 0.1), (kappa * distance).mean())


def test_ema_decay_is_flat_then_a_ramp_then_flat():
    decays = [crd.ema_decay(step, 75, 0.1, 0.1, 0.9) for step in (0, 75, 76, 77, 84, 999)]
    assert decays == pytest.approx([0.1, 0.1, 0.2, 0.3, 0.9, 0.9])


@parametrize("reward_weight, anchor", [(0.5, 0.2), (0.5, 0.0), (0.0, 0.2)])
def test_the_objective_is_the_regression_plus_the_anchor(reward_weight, anchor):
    """Each can be left out."""
    v, v_old, v_ref, u = randn(4, 8, 2, 3, dtype=torch.float64)
    args = crd.Settings(group_size=4, reward_weight=reward_weight, anchor=anchor, beta=0.7, tau=0.2)
    terms = crd.objective(v, v_old, v_ref, u, TARGETS, R, args)
    rho = crd.implicit_reward(v, v_old, u)
    expected = reward_weight * crd.crd_loss(rho, TARGETS, 4, beta=0.7, tau=0.2)
    if anchor:
        expected += crd.anchor_loss(v, v_ref, R, anchor)
    assert_close(terms["loss"], expected)
    assert_close(terms["rho_variance"], rho.view(2, 4).var(1, correction=0).mean())


# DDPO's mathematics

DDIM = dict(clip_sample=False, set_alpha_to_one=False, steps_offset=1)  # Stable Diffusion 1.x's


@any_shape
def test_gaussian_step_gives_the_log_probability_per_latent(shape):
    """Of an action, which has no gradient of its own."""
    mean = randn(*shape).requires_grad_()
    std = torch.tensor(0.3)
    x_next, log_prob = ddpo.gaussian_step(mean, std)
    assert not x_next.requires_grad
    expected = torch.distributions.Normal(mean, std).log_prob(x_next).flatten(1).mean(1)
    assert_close(log_prob, expected)
    assert torch.equal(ddpo.gaussian_step(mean, std, x_next)[1], log_prob)


@any_shape
@parametrize("eta", [0.0, 1.0])
def test_ddim_step_is_diffusers(eta, shape):
    """A batch may mix timesteps: the first, some in the middle, the last, to the image."""
    scheduler = diffusers.DDIMScheduler(**DDIM)
    scheduler.set_timesteps(50)
    t = scheduler.timesteps[[0, 20, 49, 10]]
    noise_pred, x, noise = (randn(*shape, seed=seed) for seed in range(3))
    expected = []
    for i in range(4):
        step = scheduler.step(noise_pred[i], t[i], x[i], eta=eta, variance_noise=noise[i])
        expected.append(step.prev_sample)
    generator = torch.Generator().manual_seed(2)
    alphas = scheduler.alphas_cumprod
    x_next, _ = ddpo.ddim_step(noise_pred, x, t, t - 20, alphas, eta, generator=generator)
    assert_close(x_next, torch.stack(expected))
    x_next, _ = ddpo.ddim_step(noise_pred, x, t, t - 20, alphas, 50.0)
    assert x_next.isfinite().all()


def test_no_ddim_step_takes_the_root_of_a_rounding_error():
    """From any timestep to any earlier one, with DDPM's betas and eta 1."""
    alphas = (1 - torch.linspace(1e-4, 0.02, 1000)).cumprod(0)
    t, t_next = torch.tril_indices(1000, 1000, -1)
    x = torch.ones(len(t), 1)
    x_next, _ = ddpo.ddim_step(x, x, t, t_next, alphas)
    assert x_next.isfinite().all()


@parametrize("noise_level", [0.0, 0.3, 0.7])
def test_the_flow_sde_keeps_the_marginals(noise_level):
    """Data N(0.7, 0.5^2): whatever the noise, mean and deviation end there. Without noise it is
    Euler's method, with noise it leaves the ODE's path."""
    generator = torch.Generator().manual_seed(1)
    sigmas = torch.linspace(1, 0, 201, dtype=torch.float64)
    x = noise = randn(20_000, 1, dtype=torch.float64)
    for s, t in itertools.pairwise(sigmas):
        v = gaussian_velocity(x, s, 0.7, 0.5)
        x, _ = ddpo.flow_sde_step(v, x, s, t, sigmas[1], noise_level, generator=generator)
    assert x.mean().item() == pytest.approx(0.7, abs=0.01)
    assert x.std().item() == pytest.approx(0.5, abs=0.01)
    ode = euler(lambda x, s: gaussian_velocity(x, s, 0.7, 0.5), noise, sigmas)
    difference = (x - ode).std().item()
    assert difference > 0.1 if noise_level else difference < 1e-9


@any_shape
def test_flow_sde_step_by_hand(shape):
    """In the root, sigma_max stands in for any sigma above it: rounding can make 0.9999999 of 1."""
    v = randn(*shape)
    x = randn(*shape, seed=1)
    sigma = torch.tensor([0.9999999, 0.8, 0.5, 0.2])
    sigma_next = torch.tensor([0.8, 0.5, 0.2, 0.1])
    _, log_prob = ddpo.flow_sde_step(v, x, sigma, sigma_next, torch.tensor(0.8), 0.7, x)
    for i, below in enumerate([0.8, 0.8, 0.5, 0.2]):
        std = 0.7 * math.sqrt(sigma[i] / (1 - below))
        dt = sigma_next[i] - sigma[i]
        mean = x[i] * (1 + std**2 / (2 * sigma[i]) * dt)
        mean = mean + v[i] * (1 + std**2 * (1 - sigma[i]) / (2 * sigma[i])) * dt
        normal = torch.distributions.Normal(mean, std * torch.sqrt(-dt))
        assert_close(log_prob[i], normal.log_prob(x[i]).mean())


@parametrize("advantage", [1.0, -1.0])
@parametrize("change", [0.3, 0.1, 0.0, -0.1, -0.3])
def test_clipping_stops_steps_that_went_the_advantages_way(advantage, change):
    """Beyond the clip of 0.2 the gradient is 0 in the advantage's direction, and only there."""
    log_prob = torch.tensor([change], requires_grad=True)
    A = torch.tensor([advantage])
    ddpo.importance_sampling_loss(log_prob, torch.zeros(1), A, clip=0.2).backward()
    is_clipped = advantage * change > 0.2
    expected = 0 if is_clipped else -advantage * math.exp(change)
    assert log_prob.grad.item() == pytest.approx(expected)


def test_advantages_use_a_prompts_own_statistics_once_there_are_enough():
    history = {}
    R = torch.tensor([1.0, 2.0, 6.0, 11.0])
    A = ddpo.prompt_advantages(history, ["cat", "cat", "cat", "dog"], R, 3, keep=4)
    assert_close(A[:3], (R[:3] - 3) / (R[:3].std(correction=0) + 1e-6))
    assert_close(A[3], (11 - R.mean()) / (R.std(correction=0) + 1e-6))
    A = ddpo.prompt_advantages(history, ["cat", "cat"], torch.tensor([0.0, 4.0]), 3, keep=4)
    last_four = torch.tensor([2.0, 6.0, 0.0, 4.0])  # the history forgets the 1
    assert_close(A, (last_four[2:] - 3) / (last_four.std(correction=0) + 1e-6))
    history = {}
    R = torch.arange(40.0)
    A = ddpo.prompt_advantages(history, ["cat"] * 40, R)
    assert history == {"cat": R[-32:].tolist()}
    assert_close(A[39], (39 - R[-32:].mean()) / R[-32:].std(correction=0))
    equal = torch.full((20,), 0.3)
    assert ddpo.prompt_advantages({}, ["bird"] * 20, equal).abs().max() < 1e-5
    outlier = torch.tensor([0.0] * 99 + [1.0])
    assert ddpo.prompt_advantages({}, ["cow"] * 100, outlier, keep=100).max() == 5


def test_weights_of_the_baselines():
    """rwr: a softmax, 1 on average; rwr-sparse: the best tenth, as often as all images were."""
    A = randn(40)
    weights = rwr.rwr_weights(A, 0.2)
    assert weights.mean().item() == pytest.approx(1)
    assert_close(weights[0] / weights[1], torch.exp((A[0] - A[1]) / 0.2))
    best = rwr.best_images(A, 0.1)
    assert set(best.tolist()) == set(A.argsort()[-4:].tolist())
    assert best.bincount().max() == len(best) / 4 == 10


# LoRA and gradient checkpointing

SHORT = dict(
    preset="tiny", reward="incompressibility", rank=2, alpha=4, group_size=2, micro_batch=4,
    eval_images=2, eval_every=2, eval_rewards=None,
)  # fmt: skip
SHORTER = {
    crd: dict(groups=2, steps_per_epoch=1, rollout_steps=2, train_timesteps=1, eval_steps=2),
    ddpo: dict(images=8, updates=2, steps=4, deterministic_steps=1, stat_min=2, guidance=2.0),
}
SHORTER[rwr] = SHORTER[ddpo]


def short(script, **settings):
    return script.Settings(**{**script.PRESETS["tiny"], **SHORT, **SHORTER[script], **settings})


def tiny(**settings):
    return crd.load_pipeline(short(crd, **settings), CPU)[0]


def tiny_with_lora(dtype, checkpointing=False):
    """With LoRA of rank 2 and alpha 6; each adapter moved away from zero in its own way."""
    pipe = tiny(dtype=dtype)
    torch.manual_seed(0)
    layers = crd.add_lora(pipe.transformer, crd.TARGET_MODULES, 2, 6, crd.ADAPTERS)
    for layer in layers.values():
        for weight in [*layer.lora_A.values(), *layer.lora_B.values()]:
            weight.data.normal_(std=0.3)
    if checkpointing:
        pipe.transformer.enable_gradient_checkpointing(crd.checkpoint)
    return pipe, layers


def predict(pipe, layers, adapter):
    cond = [c.to(pipe.transformer.dtype) for c in (randn(2, 3, 128), randn(2, 128, seed=1))]
    x = randn(2, 16, 8, 8, seed=2)
    with crd.use_adapter(layers, adapter):
        return crd.velocity(pipe, x, torch.tensor(0.7), cond)


def gradients(parameters):
    trained = [p for p in parameters if p.requires_grad]
    none = [p for p in trained if p.grad is None]  # of layers whose output is not used
    for p in none:
        p.grad = torch.zeros_like(p)
    return torch.cat([p.grad.flatten() for p in trained])


def test_an_adapter_is_the_pretrained_layer_plus_its_update():
    """In float32, whatever the layer's precision."""
    half = crd.LoRALinear(torch.nn.Linear(5, 4).bfloat16(), 2, 6, ["policy"])
    assert half.lora_A["policy"].dtype == half.lora_B["policy"].dtype == torch.float32
    layer = crd.LoRALinear(torch.nn.Linear(5, 4), 2, 6, ["policy", "old"])
    layer.lora_B["old"].data.normal_()
    update = 6 / 2 * layer.lora_B["old"] @ layer.lora_A["old"]
    x = randn(3, 7, 5)
    with crd.use_adapter({"": layer}, "old"):
        assert_close(layer(x), layer.base(x) + x @ update.T)
    assert torch.equal(layer(x), layer.base(x))  # the policy's update starts at 0


def test_lora_is_on_the_joint_attention_and_only_the_policy_is_trained():
    """Eight projections a block, seven in the last, which has no to_add_out; none of attn2."""
    assert ddpo.StableDiffusion3.target_modules == crd.TARGET_MODULES
    pipe, layers = tiny_with_lora("fp32")
    assert len(layers) == 3 * 8 + 7
    assert not any("attn2" in name for name in layers)
    trained = {name for name, p in pipe.transformer.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.lora_{part}.policy" for name in layers for part in "AB"}


@parametrize("dtype", ["fp32", "bf16"])
def test_checkpointing_changes_memory_and_no_gradient(dtype):
    """And rho is exactly 0 where the policy is `old`: both go through the same kernels, with
    gradients or without."""
    found = []
    for checkpointing in (False, True):
        pipe, layers = tiny_with_lora(dtype, checkpointing)
        crd.ema_update(layers, "old", 0.0)
        sizes = {}

        def measure(tensor):
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(measure, lambda tensor: tensor):
            v = predict(pipe, layers, "policy")
        assert v.dtype == torch.float32
        v.square().sum().backward()
        found.append((gradients(pipe.transformer.parameters()), sum(sizes.values())))
        with torch.no_grad():
            v_old = predict(pipe, layers, "old")
        assert not crd.implicit_reward(v, v_old, torch.zeros_like(v)).any()
    (plain, plain_size), (recomputed, size) = found
    assert torch.equal(recomputed, plain)
    assert size < plain_size / 2


def test_a_checkpointed_block_may_return_a_tensor():
    """As those of Stable Diffusion 1.x do. It may also be given a None and a number."""
    layer = torch.nn.Linear(4, 4)
    x = randn(2, 4).requires_grad_()
    y = crd.checkpoint(lambda x, option, scale: layer(x) * scale, x, None, 2.0)
    y.sum().backward()
    assert_close(x.grad, 2 * layer.weight.sum(0).expand(2, 4))


@in_both_scripts
def test_guidance_extrapolates_from_the_unconditional_prediction(script):
    pipe, model = script.load_pipeline(short(script), CPU)
    x = randn(2, 16, 8, 8, seed=4)
    cond = [randn(2, 3, 128), randn(2, 128, seed=1)]
    uncond = [randn(1, 3, 128, seed=2), randn(1, 128, seed=3)]

    def predict(cond, guidance=1.0):
        if script is crd:
            return crd.velocity(pipe, x, torch.tensor(0.7), cond, uncond, guidance)
        return ddpo.guided(model, x, 1, cond, uncond, guidance)

    with torch.no_grad():
        v_cond = predict(cond)
        v_uncond = predict([c.expand_as(d) for c, d in zip(uncond, cond)])
        for guidance in (3.0, 0.5, 0.0):
            expected = v_uncond + guidance * (v_cond - v_uncond)
            assert_close(predict(cond, guidance=guidance), expected, rtol=1e-4, atol=1e-5)


# Runs

LORA = "pytorch_lora_weights.safetensors"


OWN = """
import rewards

def bright(images, prompts, metadata):
    return [image.convert("L").resize((1, 1)).getpixel((0, 0)) / 255 for image in images]

def red(images, prompts, metadata):
    return [rewards.to_pixels(image, "cpu")[0].mean() / 255 for image in images]

def left(images, prompts, metadata):
    return [rewards.to_pixels(x, "cpu")[:, :, : x.width // 2].mean() / 255 for x in images]

red.range = (0.2, 0.9)
"""


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(script, name, epochs, **settings) in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("own.py").write_text(OWN)

    def run(script, name, epochs, **settings):
        return script.train(short(script, name=name, epochs=epochs, **settings))

    return run


def read_metrics(folder):
    """The lines of metrics.jsonl, without what a clock put there."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [{key: line[key] for key in line if not key.endswith("seconds")} for line in lines]


@pytest.fixture(scope="session")
def sd1(tmp_path_factory):
    """Settings for a small Stable Diffusion 1.x with random weights: 32 x 32 images."""
    path = tmp_path_factory.mktemp("sd1")
    torch.manual_seed(0)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    text_encoder = transformers.CLIPTextModel.from_pretrained(TINY / "text_encoder")
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=1, cross_attention_dim=64,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    scheduler = diffusers.DDIMScheduler()  # its settings are not those of Stable Diffusion
    parts = vae, text_encoder, tokenizer, unet, scheduler, None, None
    pipe = diffusers.StableDiffusionPipeline(*parts, requires_safety_checker=False)
    pipe.save_pretrained(path)
    return {"model": str(path), "width": 32}


@parametrize("script, settings", [
    (crd, dict(steps_per_epoch=2, micro_batch=2, reward="own.bright:2,incompressibility")),
    (crd, dict(grad_checkpoint=True, tau=0.2, anchor=0.0)),
    (ddpo, dict(grad_checkpoint=True, micro_batch=1)),
    (ddpo, dict(algorithm="sf", updates=1)),
    (ddpo, dict(model="sd1", grad_checkpoint=True)),
    (rwr, {}), (rwr, dict(model="sd1", sparse=True)),
])  # fmt: skip
def test_a_resumed_run_equals_one_that_was_never_stopped(run, sd1, script, settings):
    """To the bit: weights, optimizer, metrics. Even if it was killed while it wrote metrics.jsonl,
    before it saved its state. Where p_old is the policy, DDPO's ratio is 1."""
    settings = settings | (sd1 if "model" in settings else {})
    straight = run(script, "straight", 2, eval_every=1, **settings)
    stopped = run(script, "stopped", 1, eval_every=1, **settings)
    with open(stopped / "metrics.jsonl", "a") as file:
        file.write('{"split": "train", "epoch": 2}\n{"split": "ev')
    script.train(script.parse(["--resume", str(stopped), "--epochs", "2"]))
    states = [torch.load(folder / "state.pt", weights_only=True) for folder in (stopped, straight)]
    for state in states:
        del state["progress"]["seconds"], state["metrics"]
    assert_close(*states, rtol=0, atol=0)
    assert read_metrics(stopped) == read_metrics(straight)
    if script is ddpo:
        trained = [line for line in read_metrics(straight) if line["split"] == "train"]
        assert [line["first_ratio_error"] for line in trained] == [0, 0]


SCRIPT = """
import os, sys
sys.path.insert(0, {path!r})
import torch, rewards, test_crd
from types import SimpleNamespace
from test_crd import {name} as script

seen = []
own = []
losses = []
loss, score = script.{loss}, rewards.Incompressibility.score_all
clip, all_reduce = torch.nn.utils.clip_grad_norm_, torch.distributed.all_reduce

def spy_all_reduce(flat):
    own[:] = [flat.clone()]
    return all_reduce(flat)

def spy_loss(*args, **options):
    seen.append(args[1])  # s, or A
    losses.append(loss(*args, **options))
    return losses[-1]

def spy_score(self, *args):
    R, details = score(self, *args)
    seen[:] = [torch.tensor(R)]
    return R, {{"detail" if script.PROCESS == 0 else "other": 3.0}}

def spy_clip(parameters, *args, **options):
    gradients = torch.cat([p.grad.flatten() for p in parameters])
    weights = torch.cat([p.detach().flatten() for p in parameters])
    seen_by_one = gradients, seen, own, weights, started, sum(losses) / len(losses)
    torch.save(seen_by_one, f"seen-{{script.PROCESS}}.pt")
    return clip(parameters, *args, **options)

started = []
sys.modules["wandb"] = SimpleNamespace(
    init=lambda **options: started.append(options["id"]), log=lambda line: None
)

script.{loss} = spy_loss
rewards.Incompressibility.score_all = spy_score
torch.nn.utils.clip_grad_norm_ = spy_clip
torch.distributed.all_reduce = spy_all_reduce
script.train(
    test_crd.short(script, name="two", epochs=1, lora="lora", wandb="project", **{settings})
)
started.clear()
losses.clear()
# The processes cannot meet a second time where torchrun let them meet.
os.environ |= {{"MASTER_PORT": sys.argv[1], "TORCHELASTIC_USE_AGENT_STORE": "False"}}
script.train(script.parse(["--resume", "runs/two", "--epochs", "2"]))
"""


@in_both_scripts
def test_two_processes_stay_identical_and_finish(run, script):
    """Each draws its own images and learns from their rewards, with the mean of both gradients. All
    rewards together decide their advantages. So it is from a LoRA, and after a stop."""
    (run(script, "first", 1, lr=0.1) / "epoch-0001").rename("lora")
    loss = "crd_loss" if script is crd else "score_function_loss"
    settings = dict(groups=4) if script is crd else dict(updates=1, stat_min=32, algorithm="sf")
    names = {"path": str(TINY.parent), "name": script.__name__, "loss": loss}
    Path("both.py").write_text(SCRIPT.format(**names, settings=settings))
    with socket.create_server(("localhost", 0)) as server:
        port = str(server.getsockname()[1])
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    subprocess.run([*torchrun, "--nproc-per-node=2", "both.py", port], check=True)
    first, second = (torch.load(f"seen-{rank}.pt") for rank in (0, 1))
    assert_close(first[0], second[0], rtol=0, atol=0)
    assert_close(first[3], second[3], rtol=0, atol=0)  # the policy's weights
    assert first[4] == ["two"] and second[4] == []  # only the first calls wandb.init
    assert not torch.equal(first[2][0], second[2][0])
    assert_close(first[0], (first[2][0] + second[2][0]) / 2)
    R = torch.cat([first[1][0], second[1][0]])
    assert len(set(R.tolist())) == len(R) == 8
    if script is crd:
        expected = crd.reward_targets(R, 2)
    else:
        expected = (R - R.mean()) / (R.std(correction=0) + 1e-6)
    assert_close(torch.cat([first[1][1], second[1][1]]), expected)
    lines = read_metrics(Path("runs/two"))
    assert [line["epoch"] for line in lines] == [0, 1, 1, 2, 2]
    assert lines[-1]["images"] == 2 * 8
    assert lines[-2]["reward"] == pytest.approx(R.mean().item())
    assert lines[-2]["incompressibility"] == pytest.approx(R.mean().item())
    assert lines[-2]["detail"] == lines[-2]["other"] == 3  # which the other process lacks
    expected = (first[5] + second[5]).item() / 2
    if script is crd:
        assert lines[-2]["crd_loss"] == pytest.approx(expected)
    else:  # terms of size 1 cancel
        assert lines[-2]["loss"] == pytest.approx(expected, abs=1e-6)
        history = torch.load("runs/two/state.pt")["history"]
        assert [len(x) for x in history.values()] == [2] * 8  # of four prompts an epoch


# Two epochs of each algorithm, at settings that all matter: no weight is 1 and none 0, updates have
# a share of the images and two micro-batches of two sizes, and gradients and ratios are clipped.
# `python -m pytest -q -s -k golden test_crd.py` prints them anew; three digits hold on any CPU.
GOLDEN = {
    "crd": """
    eval 0 reward 1.231 own.red 0.4104 own.left 0.4101
    train 1 reward 1.118 own.red 0.3523 own.left 0.4134 crd_loss 0.004714 loss 0.38 anchor_loss
        0.3422 grad_norm 1.077 rho_std 0.03811
    eval 1 reward 1.371 own.red 0.4603 own.left 0.4509
    train 2 reward 1.39 own.red 0.4537 own.left 0.4824 crd_loss 0.007394 loss 0.4834 anchor_loss
        0.4243 grad_norm 1.786 rho_std 0.03272
    eval 2 reward 1.359 own.red 0.4553 own.left 0.4485
""",
    "ddpo is": """
    eval 0 reward 1.237 own.red 0.4121 own.left 0.4129
    train 1 reward 1.065 own.red 0.3229 own.left 0.4188 loss 0.006436 approx_kl 0.0009204
        clip_fraction 0.25 ratio_error 0.02084 first_ratio_error 0 grad_norm 0.4835
    eval 1 reward 1.247 own.red 0.4155 own.left 0.4156
    train 2 reward 1.276 own.red 0.4108 own.left 0.4548 loss 0.002229 approx_kl 0.0001769
        clip_fraction 0.1667 ratio_error 0.009682 first_ratio_error 0 grad_norm 0.423
    eval 2 reward 1.255 own.red 0.4173 own.left 0.4208
""",
    "ddpo sf": """
    eval 0 reward 1.237 own.red 0.4121 own.left 0.4129
    train 1 reward 1.065 own.red 0.3232 own.left 0.4189 loss -0.0008543 ratio_error 0
        first_ratio_error 0 grad_norm 0.2539
    eval 1 reward 1.232 own.red 0.4106 own.left 0.4104
    train 2 reward 1.273 own.red 0.4105 own.left 0.4517 loss -0.002769 ratio_error 0
        first_ratio_error 0 grad_norm 0.2443
    eval 2 reward 1.231 own.red 0.4109 own.left 0.4097
""",
    "ddpo is, DDIM": """
    eval 0 reward 1.397 own.red 0.4631 own.left 0.4705
    train 1 reward 1.391 own.red 0.4621 own.left 0.4671 loss 0.02698 approx_kl 0.01073
        clip_fraction 0.3333 ratio_error 0.06797 first_ratio_error 0 grad_norm 3.513
    eval 1 reward 1.397 own.red 0.4631 own.left 0.4705
    train 2 reward 1.394 own.red 0.4628 own.left 0.4686 loss 0.007135 approx_kl 0.0008053
        clip_fraction 0.3056 ratio_error 0.01992 first_ratio_error 0 grad_norm 2.868
    eval 2 reward 1.397 own.red 0.4631 own.left 0.4705
""",
    "rwr, DDIM": """
    eval 0 reward 1.397 own.red 0.4631 own.left 0.4705
    train 1 reward 1.391 own.red 0.4621 own.left 0.4671 loss 1.144 grad_norm 0.07703
    eval 1 reward 1.397 own.red 0.4631 own.left 0.4704
    train 2 reward 1.394 own.red 0.4628 own.left 0.4685 loss 1.129 grad_norm 0.06574
    eval 2 reward 1.397 own.red 0.463 own.left 0.4705
""",
    "rwr sparse": """
    eval 0 reward 1.237 own.red 0.4121 own.left 0.4129
    train 1 reward 1.065 own.red 0.3229 own.left 0.4188 loss 0.3855 grad_norm 0.2212
    eval 1 reward 1.261 own.red 0.4202 own.left 0.4202
    train 2 reward 1.293 own.red 0.4171 own.left 0.4587 loss 0.4764 grad_norm 0.3076
    eval 2 reward 1.285 own.red 0.4286 own.left 0.4277
""",
}


def golden_settings(name, sd1):
    """(script, settings)"""
    both = dict(
        prompts="signs", reward="own.red:2,own.left", rank=3, alpha=5, ema=0.25, seed=1,
        eval_images=4, eval_every=1, micro_batch=4, group_size=2,
    )  # fmt: skip
    both_ddpo = both | dict(
        images=12, updates=2, steps=4, deterministic_steps=1, guidance=2.0, lr=2e-3, clip=0.02,
        noise_level=0.1, eta=0.1, stat_min=2,
    )  # fmt: skip
    unet = both_ddpo | sd1 | dict(prompts="animals")
    return {
        "crd": (crd, both | dict(
            groups=6, steps_per_epoch=2, rollout_steps=4, train_timesteps=3, beta=0.7, tau=0.3,
            reward_weight=8.0, anchor=3.0, anchor_guidance=2.0, lr=0.02, eval_steps=3,
            old_decay=[1, 0.2, 0.3, 0.9], sampler_decay=[0, 0.1, 0.05, 0.5], eval_guidance=1.5,
        )),
        "ddpo is": (ddpo, both_ddpo),
        "ddpo sf": (ddpo, both_ddpo | dict(algorithm="sf", updates=1, micro_batch=8)),
        "ddpo is, DDIM": (ddpo, unet),
        "rwr, DDIM": (rwr, unet | dict(temperature=0.5)),
        "rwr sparse": (rwr, both_ddpo | dict(sparse=True, keep=0.3)),
    }[name]  # fmt: skip


@parametrize("name", GOLDEN)
def test_the_golden_runs_give_their_numbers(run, sd1, name):
    """Whatever a mistake in `train` changes, it changes some of these."""
    script, settings = golden_settings(name, sd1)
    words = []
    print()
    for line in read_metrics(run(script, "golden", 2, **settings)):
        assert line.keys() - {"own.red", "own.left"} <= set(rewards.LOGGED)
        numbers = [f"{key} {line[key]:.4g}" for key in line if key not in rewards.LOGGED[:4]]
        text = f"{line['split']} {line['epoch']} {' '.join(numbers)}"
        print(textwrap.fill(text, 96, initial_indent="    ", subsequent_indent="        "))
        words += text.split()
    for i, (word, expected) in enumerate(zip(words, GOLDEN[name].split(), strict=True)):
        if re.fullmatch(r"-?[\d.]+(e-\d+)?", expected):
            word, expected = float(word), pytest.approx(float(expected), rel=1e-3, abs=1e-7)
        assert word == expected, " ".join(words[: i + 1])


TRACED = dict(
    reward="own.red", groups=6, group_size=4, steps_per_epoch=2, micro_batch=8, rollout_steps=4,
    train_timesteps=3, eval_steps=3, eval_guidance=1.5, eval_images=2, eval_every=1, anchor=0.3,
    old_decay=[1, 0.2, 0.3, 0.9], sampler_decay=[0, 0.1, 0.05, 0.5], ema=0.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def trace(tmp_path_factory):
    """Two epochs of CRD, of 2 updates of 3 groups of 4 images: what was called, in order."""
    events = []

    def spy(function, names):
        def spied(*args, **options):
            bound = inspect.signature(function).bind(*args, **options)
            bound.apply_defaults()
            event = {"function": function.__name__}
            for name in names:
                x = bound.arguments[name]
                event[name] = x.clone() if isinstance(x, torch.Tensor) else x
            events.append(event)
            event["result"] = function(*args, **options)
            return event["result"]

        return spied

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trace"))
        patch.setattr(sys, "path", list(sys.path))
        patch.delitem(sys.modules, "own", raising=False)
        Path("own.py").write_text(OWN)
        for name, arguments in (
            ("generate", ["adapter", "noise", "cond", "steps", "guidance"]),
            ("add_noise", ["x0", "noise", "sigma"]),
            ("velocity", ["x", "sigma", "cond", "guidance"]),
            ("objective", ["v", "v_old", "v_ref", "u", "s", "n"]),
            ("ema_update", ["name", "decay"]),
            ("reward_targets", ["R"]),
        ):
            patch.setattr(crd, name, spy(getattr(crd, name), arguments))
        crd.train(short(crd, name="trace", epochs=2, **TRACED))
    patch.undo()
    return events


def called(trace, name):
    return [event for event in trace if event["function"] == name]


def epochs_of(trace):
    """For each epoch its rollout, and for each of its two updates the arguments of `add_noise` and
    `objective`, micro-batch by micro-batch."""
    rollouts = [event for event in called(trace, "generate") if event["adapter"] == "sampler"]
    pairs = zip(called(trace, "add_noise"), called(trace, "objective"), strict=True)
    calls = [noised | terms for noised, terms in pairs]
    count = 3 * 2  # sigmas and micro-batches
    for epoch, rollout in enumerate(rollouts):
        updates = [calls[i : i + count] for i in (2 * epoch * count, (2 * epoch + 1) * count)]
        yield rollout, updates


def test_rollouts_and_evaluations_have_their_own_steps_guidance_and_adapter(trace):
    found = [(x["adapter"], x["steps"], x["guidance"]) for x in called(trace, "generate")]
    assert found == [("ema", 3, 1.5)] + [("sampler", 4, 1.0), ("ema", 3, 1.5)] * 2


def test_images_side_by_side_are_of_one_prompt(trace):
    for rollout, _ in epochs_of(trace):
        for part in rollout["cond"]:
            groups = part.flatten(1).view(6, 4, -1)
            assert torch.equal(groups, groups[:, :1].expand_as(groups))
        assert len({tuple(group[0].tolist()) for group in groups}) > 3


def test_noise_is_fresh_except_in_evaluations(trace):
    first, *later = [x["noise"] for x in called(trace, "generate") if x["adapter"] == "ema"]
    assert all(torch.equal(first, noise) for noise in later)
    noises = [x["noise"] for x in called(trace, "generate") if x["adapter"] == "sampler"]
    noises += [x["noise"] for x in called(trace, "add_noise")]
    images = torch.cat(noises).flatten(1)
    assert len(images.unique(dim=0)) == len(images) == 2 * (24 + 3 * 24)


def test_every_update_trains_on_its_share_once_at_each_of_three_sigmas(trace):
    schedule = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(TINY / "scheduler")
    schedule.set_timesteps(4)
    drawn = []
    for rollout, updates in epochs_of(trace):
        for share, calls in zip(rollout["result"].split(12), updates):
            assert [len(x["x0"]) for x in calls] == [8, 4] * 3
            for i in range(0, 6, 2):
                assert torch.equal(torch.cat([x["x0"] for x in calls[i : i + 2]]), share)
                assert calls[i]["sigma"] == calls[i + 1]["sigma"]
            drawn.append([x["sigma"].item() for x in calls[::2]])
            assert len(set(drawn[-1])) == 3
            assert set(drawn[-1]) <= set(schedule.sigmas[:-1].tolist())
    assert len({tuple(sigmas) for sigmas in drawn}) > 1  # in another order, at least


def test_images_are_trained_with_their_own_rewards(trace):
    """Those of all groups decide the standard deviation."""
    for (_, updates), scored in zip(epochs_of(trace), called(trace, "reward_targets")):
        targets = crd.reward_targets(scored["R"], 4)
        n = ((scored["R"] - 0.2) / 0.7).clamp(0, 1)
        for i, calls in enumerate(updates):
            rows = slice(12 * i, 12 * i + 12)
            assert_close(torch.cat([x["s"] for x in calls[:2]]), targets[rows])
            assert_close(torch.cat([x["n"] for x in calls[:2]]), n[rows])


def test_velocities_are_compared_with_that_of_the_noise_that_was_added(trace):
    for x in [call for _, updates in epochs_of(trace) for calls in updates for call in calls]:
        assert torch.equal(x["u"], x["noise"] - x["x0"])


def test_old_is_the_reference_and_the_guided_pretrained_model_the_anchor(trace):
    """In the first update `policy` and `old` are the pretrained model, in the second only `old`."""
    (_, (first, second)), *_ = epochs_of(trace)
    for x in first:
        assert torch.equal(x["v"], x["v_old"])
        assert not torch.equal(x["v"], x["v_ref"])
    for x in second:
        assert not torch.equal(x["v"], x["v_old"])
    calls = [x for x in called(trace, "velocity") if x["guidance"] == 4.0]
    noised = called(trace, "add_noise")
    assert len(calls) == len(noised)
    for one, other in zip(calls, noised):
        assert torch.equal(one["x"], other["result"]) and one["sigma"] == other["sigma"]


def test_a_constant_anchor_is_at_full_strength_for_every_image(run, monkeypatch):
    objective = Mock(wraps=crd.objective)
    monkeypatch.setattr(crd, "objective", objective)
    run(crd, "run", 1, anchor_adaptive=False)
    assert all((call.args[5] == 1).all() for call in objective.call_args_list)  # n


def test_emas_follow_the_policy_each_at_its_time(trace):
    """`ema` after every step, warming up; `old` and `sampler` once an epoch, by its last step."""
    found = [(x["name"], x["decay"]) for x in called(trace, "ema_update")]
    expected = []
    for epoch in (1, 2):
        for step in (2 * epoch - 1, 2 * epoch):
            expected.append(("ema", min(0.3, (1 + step) / (10 + step))))
        expected.append(("old", crd.ema_decay(2 * epoch, *TRACED["old_decay"])))
        expected.append(("sampler", crd.ema_decay(2 * epoch, *TRACED["sampler_decay"])))
    assert found == [(name, pytest.approx(decay)) for name, decay in expected]


def test_a_micro_batch_changes_memory_and_nothing_else(run):
    """Of 12 images an update, in one piece or in two of different sizes."""
    settings = dict(groups=6, group_size=4, steps_per_epoch=2, anchor=0.3, reward="own.red")
    whole, pieces = (
        read_metrics(run(crd, f"of {size}", 1, micro_batch=size, **settings)) for size in (12, 8)
    )
    for one, other in zip(whole, pieces):
        assert one.pop("split") == other.pop("split")
        assert one == pytest.approx(other, rel=1e-3)


def test_ddpo_trains_in_the_micro_batches_in_which_it_drew(run, monkeypatch):
    """Or the first ratio would differ from 1 where kernels depend on the batch."""
    guided = Mock(wraps=ddpo.guided)
    monkeypatch.setattr(ddpo, "guided", guided)
    run(ddpo, "run", 1, images=12, updates=2, micro_batch=4, steps=3, eval_images=1)
    calls = [(len(call.args[1]), call.args[2]) for call in guided.call_args_list][3:-3]
    noisy_steps = 2
    drawn = [(size, i) for size in (4, 2, 4, 2) for i in range(3)]
    trained = [(size, i) for size in (4, 2, 4, 2) for i in range(noisy_steps)]
    assert calls == drawn + trained


def test_first_ratio_error_is_that_of_the_first_update(run, monkeypatch):
    """The mean over its images and steps."""
    terms = ddpo.policy_terms
    errors = iter([0.2] * 4 + [0.5] * 2 + [7.0] * 6)  # two micro-batches of 4 and 2, two steps

    def policy_terms(*args):
        return terms(*args) | {"ratio_error": torch.tensor(next(errors))}

    monkeypatch.setattr(ddpo, "policy_terms", policy_terms)
    folder = run(ddpo, "run", 1, images=12, updates=2, micro_batch=4, steps=4, eval_images=1)
    assert read_metrics(folder)[1]["first_ratio_error"] == pytest.approx((4 * 0.2 + 2 * 0.4) / 6)


@in_both_scripts
def test_a_run_trains_on_no_prompt_of_its_evaluation_file(run, monkeypatch, script):
    words = [f"word {i}" for i in range(8)]
    Path("all.txt").write_text("\n".join(words))
    Path("held-out.txt").write_text("\n".join(words[:6]))
    score = Mock(wraps=lambda images, prompts: [1] * len(images))
    monkeypatch.setattr(rewards.Incompressibility, "score_batch", score)
    run(script, "run", 2, prompts="all.txt", eval_prompts="held-out.txt")
    evaluated, *trained, last = [call.args[1] for call in score.call_args_list]
    assert evaluated == last == words[:6]
    assert {prompt for prompts in trained for prompt in prompts} == set(words[6:])


@in_both_scripts
def test_a_run_leaves_what_it_promises_and_another_starts_from_its_lora(run, script):
    """`--epochs 0` evaluates it: the same images, hence the same reward."""
    folder = run(script, "run", 1, lr=0.1)
    names = {str(path.relative_to(folder)) for path in folder.rglob("*.*")}
    evaluation = {"epoch-0001/images.png", f"epoch-0001/{LORA}"}
    assert names >= {"args.json", "curve.png", "metrics.jsonl", "state.pt"} | evaluation
    before, train, after = read_metrics(folder)
    assert train.keys() >= {"epoch", "images", "reward", "incompressibility", "loss", "grad_norm"}
    (line,) = read_metrics(run(script, "again", 0, lora=str(folder / "epoch-0001")))
    assert line["reward"] == pytest.approx(after["reward"], rel=1e-6) != before["reward"]
    other = ddpo if script is crd else crd
    with pytest.raises(ValueError, match=f"runs/run holds no run of {other.__name__}.py"):
        other.parse(["--resume", "runs/run"])
    with pytest.raises(ValueError, match="epoch-0001 has rank 2 in .*: set --rank"):
        run(other, "rank", 0, lora=str(folder / "epoch-0001"), rank=3)
    started = run(script, "started", 1, lora=str(folder / "epoch-0001"))
    (folder / "epoch-0001").rename("moved")  # a resumed run needs it no more
    shutil.copytree(TINY, "model")
    flags = ["--resume", str(started), "--epochs", "2", "--model", "model"]
    script.train(script.parse(flags))


@in_both_scripts
def test_held_out_rewards_are_logged_beside_the_trained_one(run, script):
    Path("words.txt").write_text('a red "cube"\na blue "cube"\n')
    settings = dict(reward=f"compressibility:2,ocr@{TINY}", eval_prompts="words.txt")
    held_out = f"incompressibility,ocr@{TINY}/judge,own.bright"
    before, train, _ = read_metrics(run(script, "run", 1, eval_rewards=held_out, **settings))
    parts = 2 * before["compressibility"] + before["ocr@tiny-sd3"]
    assert before["reward"] == pytest.approx(parts)
    assert before["incompressibility"] == pytest.approx(-before["compressibility"])
    assert before.keys() - train.keys() == {"incompressibility", "ocr@judge", "own.bright"}


@parametrize("script, settings", [
    (crd, dict(groups=8, group_size=12, micro_batch=24, rollout_steps=4, eval_steps=4,
               steps_per_epoch=4, train_timesteps=2, anchor=0.0)),
    (ddpo, dict(images=96, group_size=12, guidance=1.0, micro_batch=96, clip=1e-2)),
])  # fmt: skip
def test_a_short_run_raises_the_reward(run, monkeypatch, script, settings):
    """Of held-out prompts. Here an image is a pixel, its latents' mean, and the reward is that."""

    def decode(pipe, x0):
        means = (4 * x0.mean((1, 2, 3))).sigmoid()
        return [Image.new("F", (1, 1), mean) for mean in means.tolist()]

    def score_batch(self, images, prompts):
        return [image.getpixel((0, 0)) for image in images]

    monkeypatch.setattr(script, "decode", decode)
    monkeypatch.setattr(rewards, "contact_sheet", lambda *args: None)
    monkeypatch.setattr(rewards.Incompressibility, "score_batch", score_batch)
    settings |= dict(rank=8, alpha=16, lr=5e-3, height=16, width=16, eval_images=64, eval_every=9)
    lines = read_metrics(run(script, "run", 5, **settings))
    assert lines[-1]["reward"] > lines[0]["reward"] + 0.1


@in_both_scripts
def test_a_gradient_that_is_not_finite_stops_before_the_step(run, monkeypatch, script):
    name = "crd_loss" if script is crd else "importance_sampling_loss"
    infinite_slope = lambda x, *args, **options: (0 * x).sum().sqrt()  # noqa: E731
    monkeypatch.setattr(script, name, infinite_slope)
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: pytest.fail("a step was made"))
    with pytest.raises(RuntimeError, match="non-finite"):
        run(script, "run", 1)


@in_both_scripts
def test_images_that_are_not_finite_stop_the_run(script):
    """A NaN in a LoRA draws black images, the best of all under compressibility."""
    for value in (math.nan, math.inf):
        latents = torch.zeros(2, 16, 8, 8)
        latents[1, 0, 0, 0] = value
        with pytest.raises(FloatingPointError, match="latents are not finite"):
            script.decode(tiny(), latents)


@in_both_scripts
def test_weights_and_biases_hears_of_an_epoch_after_its_state_is_saved(run, monkeypatch, script):
    """A resumed run goes on in the same W&B run."""
    calls = []
    started = []

    def log(line):
        calls.append(line.get("train/epoch", line.get("eval/epoch")))
        assert torch.load("runs/run/state.pt")["progress"]["epoch"] >= calls[-1]

    def init(project, id, **options):
        assert options["resume"] == "allow" and options["config"]["name"] == "run"
        started.append((project, id))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, log=log))
    folder = run(script, "run", 1, eval_every=1, wandb="project")
    script.train(script.parse(["--resume", str(folder), "--epochs", "2"]))
    script.train(script.parse(["--resume", str(folder), "--epochs", "0"]))
    assert calls == [0, 1, 1, 2, 2, 2]
    assert started == [("project", "run")] * 3


@in_both_scripts
def test_in_bf16_timesteps_and_predictions_are_float32(sd1, monkeypatch, script):
    pipe, model = script.load_pipeline(short(script, dtype="bf16"), CPU)
    forward = Mock(wraps=pipe.transformer.forward)
    monkeypatch.setattr(pipe.transformer, "forward", forward)
    cond = [randn(2, 3, 128).bfloat16(), randn(2, 128, seed=1).bfloat16()]
    x = randn(2, 16, 8, 8)
    with torch.no_grad():
        if script is crd:
            v = crd.velocity(pipe, x, torch.tensor(0.7), cond)
        else:
            v = ddpo.guided(model, x, 1, cond, None, 1.0)
    assert v.dtype == forward.call_args.args[3].dtype == torch.float32
    if script is ddpo:
        _, model = ddpo.load_pipeline(short(ddpo, dtype="bf16", **sd1), CPU)
        with torch.no_grad():
            noise_pred = model.predict(x[:, :4], 1, [randn(2, 3, 64).bfloat16()])
        assert noise_pred.dtype == torch.float32


HAS_RECOMPILE_LIMIT = "recompile_limit" in inspect.signature(torch.compile).parameters


@pytest.mark.skipif(not HAS_RECOMPILE_LIMIT, reason="--compile refuses an older PyTorch")
@in_both_scripts
def test_a_compiled_run_does_the_same(run, monkeypatch, script):
    """With torch's graphs and PyTorch's kernels (to compile kernels takes minutes on a CPU); beyond
    the number of graphs that torch allows, too, and where another thread recomputes, as on a GPU.
    """
    compile = torch.nn.Module.compile
    backward = torch.Tensor.backward
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def backward_in_a_thread(loss):
        thread = threading.Thread(target=backward, args=[loss])
        thread.start()
        thread.join()

    def compile_to_graphs(block, **options):
        compile(block, backend=backend, **options)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_to_graphs)
    monkeypatch.setattr(torch.Tensor, "backward", backward_in_a_thread)
    pipe = tiny()
    config = {**pipe.transformer.config, "num_layers": 1}
    pipe.transformer = diffusers.SD3Transformer2DModel.from_config(config)
    pipe.save_pretrained("small")
    settings = dict(model="small", grad_checkpoint=True)
    limit = dict(recompile_limit=1, fail_on_recompile_limit_hit=True)  # where a script sets none
    tensors = []
    for name in ("plain", "compiled"):
        with torch._dynamo.config.patch(limit):
            folder = run(script, name, 1, compile=name == "compiled", **settings)
        tensors.append(load_file(folder / "epoch-0001" / LORA))
    assert_close(*tensors, rtol=1e-4, atol=1e-6)
    assert len(graphs) > 2


@in_both_scripts
def test_the_saved_lora_gives_the_same_image_in_diffusers(run, sd1, script):
    pytest.importorskip("peft", reason="diffusers needs peft to load a LoRA")
    settings = dict(lr=0.05, ema=0.0) | ({} if script is crd else sd1)
    folder = run(script, "run", 2, **settings) / "epoch-0002"
    args = short(script, **settings)
    ours, model = script.load_pipeline(args, CPU)
    theirs, _ = script.load_pipeline(args, CPU)

    def draw(pipe):
        generator = torch.Generator().manual_seed(0)
        options = {"max_sequence_length": 1} if script is crd else {}
        return torch.from_numpy(pipe(
            '"moon" on a blue sign', height=32, width=args.width, guidance_scale=3.0,
            num_inference_steps=4, output_type="np", generator=generator, **options,
        ).images)  # fmt: skip

    plain = draw(ours)
    prefix = "transformer" if script is crd else "unet"
    targets = crd.TARGET_MODULES if script is crd else model.target_modules
    network = getattr(ours, prefix)
    layers = script.add_lora(network, targets, args.rank, args.alpha, script.ADAPTERS)
    script.load_lora(layers, ours, folder, prefix)
    theirs.load_lora_weights(folder)
    assert (draw(ours) - plain).abs().max() > 0.01
    assert_close(draw(theirs), draw(ours), rtol=0, atol=1e-3)


# What the scripts make of a model, beside diffusers' own pipeline: to be run on any other model for
# which a script's model section was rewritten, a folder or a repository, of random weights or not:
# MODEL=folder python -m pytest -q -k "section and crd-" test_crd.py

MODEL = os.environ.get("MODEL")
CAPTIONS = ["a cat", 'a long wooden sign on a blue wall, with the text "moon"']


def save_changed(pipe, path, **parts):
    """The pipeline with other settings of some of its parts, {name: value}."""
    pipe.save_pretrained(path)
    for part, changes in parts.items():
        (file,) = (path / part).glob("*config.json")
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return str(path)


@pytest.fixture
def section_args(sd1, tmp_path, request):
    """Settings of a script for a model."""
    script, name = request.param
    settings = {}
    if MODEL:
        settings = dict(model=MODEL, dtype="fp32", height=64, width=32, max_sequence_length=32)
    if name == "shifted":  # not that many noise levels, either
        scheduler = dict(shift=3.0, num_train_timesteps=500)
        settings["model"] = save_changed(tiny(), tmp_path, scheduler=scheduler)
    if name.startswith("sd1"):
        settings = sd1 | dict(height=48)
    if name == "sd1 trailing":  # the first step is at the last timestep, as for one-step models
        pipe, _ = ddpo.load_pipeline(short(ddpo, **sd1), CPU)
        scheduler = dict(timestep_spacing="trailing", beta_schedule="scaled_linear", beta_end=0.012)
        scheduler["num_train_timesteps"] = 600
        settings["model"] = save_changed(pipe, tmp_path, scheduler=scheduler)
    settings |= dict(steps=3) if script is ddpo else {}
    return script, short(script, **settings)


SECTIONS = [(crd, "tiny"), (crd, "shifted"), (ddpo, "tiny"), (ddpo, "shifted")]
SECTIONS += [(ddpo, "sd1"), (ddpo, "sd1 trailing")]
SECTIONS = [(crd, MODEL), (ddpo, MODEL)] if MODEL else SECTIONS
in_each_section = parametrize(
    "section_args", SECTIONS, indirect=True, ids=[f"{s.__name__}-{name}" for s, name in SECTIONS]
)


@in_each_section
@parametrize("guidance", [1.0, 3.0])
def test_section_gives_the_images_of_diffusers_own_pipeline(section_args, guidance):
    """By Euler's method, or DDIM's, without noise. And all weights are as they were."""
    script, args = section_args
    pipe, model = script.load_pipeline(args, CPU)
    shape = model if script is crd else model.shape
    noise = randn(2, *shape)
    if script is crd:
        cond, uncond = crd.encode(pipe, CAPTIONS, args), crd.encode(pipe, [""], args)
        v = lambda x, sigma: crd.velocity(pipe, x, sigma, cond, uncond, guidance)  # noqa: E731
        with torch.no_grad():
            x0 = euler(v, noise, crd.schedule(pipe, 3, shape, CPU))
    else:
        args.guidance = guidance
        cond, uncond = ddpo.encode(pipe, model, CAPTIONS), ddpo.encode(pipe, model, [""])
        x0, _, _ = ddpo.rollout(model, noise, cond, uncond, [slice(0, 2)], 0, args)

    absent = {name: None for name, part in pipe.components.items() if part is None}
    theirs = diffusers.DiffusionPipeline.from_pretrained(args.model, dtype=torch.float32, **absent)
    if script is ddpo and isinstance(model, ddpo.StableDiffusion):
        theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config, **DDIM)
    options = dict(height=args.height, width=args.width, num_inference_steps=3, latents=noise)
    takes = inspect.signature(theirs.__call__).parameters
    if "max_sequence_length" in takes:
        options["max_sequence_length"] = args.max_sequence_length
    if "true_cfg_scale" in takes:  # its guidance_scale goes into an embedding
        options |= dict(true_cfg_scale=guidance, negative_prompt=["", ""])
    elif "ZImage" in type(theirs).__name__:  # v(cond) + scale (v(cond) - v(uncond))
        options["guidance_scale"] = guidance - 1
    else:
        options["guidance_scale"] = guidance
    latents = theirs(CAPTIONS, output_type="latent", **options)[0]
    assert_close(x0.view_as(latents), latents, rtol=1e-3, atol=1e-3 * latents.std().item())
    images = theirs(CAPTIONS, output_type="pil", **options)[0]
    for ours, image in zip(script.decode(pipe, x0), images, strict=True):
        difference = rewards.to_pixels(ours, CPU) - rewards.to_pixels(image, CPU)
        assert difference.abs().max() <= 1  # of 255
    assert rewards.to_pixels(image, CPU).std() > 1


@in_each_section
def test_section_has_the_same_gradient_with_checkpointing(section_args):
    script, args = section_args
    found = []
    for checkpointing in (False, True):
        pipe, model = script.load_pipeline(args, CPU)
        network = pipe.transformer if script is crd else model.network
        shape = model if script is crd else model.shape
        targets = crd.TARGET_MODULES if script is crd else model.target_modules
        torch.manual_seed(0)
        layers = script.add_lora(network, targets, 2, 4, script.ADAPTERS)
        for layer in layers.values():
            layer.lora_B["policy"].data.normal_(std=0.3)
        if checkpointing:
            network.enable_gradient_checkpointing(script.checkpoint)
        x = randn(2, *shape)
        if script is crd:
            sigma = crd.schedule(pipe, 3, shape, CPU)[1]
            prediction = crd.velocity(pipe, x, sigma, crd.encode(pipe, CAPTIONS, args))
        else:
            prediction = model.predict(x, 1, ddpo.encode(pipe, model, CAPTIONS))
        assert prediction.dtype == torch.float32 and prediction.shape == x.shape
        prediction.square().mean().backward()
        found.append(gradients(network.parameters()))
    plain, recomputed = found
    assert plain.any()
    assert_close(recomputed, plain, rtol=1e-3, atol=1e-5 * plain.abs().max().item())


def test_rollouts_solver_is_eulers_over_two_steps():
    """From the same noise, guided: DPM-Solver's two steps are Euler's."""
    args = short(crd)
    pipe, shape = crd.load_pipeline(args, CPU)
    layers = crd.add_lora(pipe.transformer, crd.TARGET_MODULES, 2, 4, crd.ADAPTERS)
    cond, uncond = crd.encode(pipe, CAPTIONS, args), crd.encode(pipe, [""], args)
    noise = randn(2, *shape)
    x0 = crd.generate(pipe, layers, None, noise, cond, uncond, 2, 3.0, 2)
    v = lambda x, sigma: crd.velocity(pipe, x, sigma, cond, uncond, 3.0)  # noqa: E731
    with torch.no_grad():
        assert_close(x0, euler(v, noise, crd.schedule(pipe, 2, shape, CPU)))


FLOW = "FlowMatchEulerDiscreteScheduler"


@parametrize("script, model, settings, message", [
    *((script, "tiny", dict(scheduler=changes), message) for script in (crd, ddpo)
      for changes, message in (
          (dict(use_dynamic_shifting=True), "use_dynamic_shifting is True"),
          (dict(invert_sigmas=True), "invert_sigmas is True, not False"),
          (dict(stochastic_sampling=True), "stochastic_sampling is True"),
      )),
    *((script, "euler", {}, f"EulerDiscreteScheduler, not {FLOW}") for script in (crd, ddpo)),
    (crd, "tiny", dict(transformer=dict(in_channels=33)), "in_channels is 33, not 16"),
    (crd, "sd1", {}, "is StableDiffusionPipeline, not StableDiffusion3Pipeline"),
    (ddpo, "sd1", dict(unet=dict(in_channels=9)), "in_channels is 9, not 4"),
    (ddpo, "sd1", dict(unet=dict(time_cond_proj_dim=32)), "time_cond_proj_dim is 32, not None"),
    (ddpo, "sd1", dict(scheduler=dict(prediction_type="v_prediction")), "epsilon"),
    (ddpo, "sd1", dict(scheduler=dict(timestep_spacing="linspace")), "linspace, not leading or"),
    (ddpo, "sd1", dict(scheduler=dict(thresholding=True)), "thresholding is True"),
    (ddpo, "sd1", dict(scheduler=dict(rescale_betas_zero_snr=True)), "rescale_betas_zero_snr"),
    (ddpo, "sd1", dict(scheduler=dict(num_train_timesteps=4)), "at most half of the model's 4"),
])  # fmt: skip
def test_a_model_with_settings_that_would_be_ignored_is_refused(
    sd1, tmp_path, monkeypatch, script, model, settings, message
):
    """By name, before any weights are loaded."""
    pipe = ddpo.load_pipeline(short(ddpo, **sd1), CPU)[0] if model == "sd1" else tiny()
    if model == "euler":  # its sigmas start at 157: it would train on noise
        pipe.register_modules(scheduler=diffusers.EulerDiscreteScheduler())
    path = save_changed(pipe, tmp_path, **settings)
    monkeypatch.setattr(script, "load_parts", lambda *args: pytest.fail("weights were loaded"))
    with pytest.raises(ValueError, match=message):
        script.load_pipeline(short(script, model=path), CPU)


@in_both_scripts
def test_a_vae_without_a_shift_has_none(script):
    pipe = tiny()
    latents = randn(1, 16, 8, 8)
    shift = pipe.vae.config.shift_factor
    pipe.vae.register_to_config(shift_factor=None)
    (image,) = script.decode(pipe, latents + shift * pipe.vae.config.scaling_factor)
    pipe.vae.register_to_config(shift_factor=shift)
    (expected,) = script.decode(pipe, latents)
    difference = rewards.to_pixels(image, CPU) - rewards.to_pixels(expected, CPU)
    assert difference.abs().max() <= 1


@in_both_scripts
@parametrize("rank, alpha", [(4, 6), (2, 2)])
def test_a_lora_saved_by_peft_is_every_adapter(tmp_path, script, rank, alpha):
    """Whatever its scale, and whatever this run's."""
    peft = pytest.importorskip("peft")
    args = short(script, rank=rank, alpha=8)
    pipe, ours = (script.load_pipeline(args, CPU)[0] for _ in range(2))
    config = peft.LoraConfig(
        r=rank, lora_alpha=alpha, init_lora_weights=False, target_modules=list(crd.TARGET_MODULES)
    )
    save_with_peft(pipe, config, tmp_path)
    inputs = (randn(2, 16, 8, 8), randn(2, 3, 128), randn(2, 128, seed=1), torch.full((2,), 700.0))
    with torch.no_grad():
        expected = pipe.transformer(*inputs, return_dict=False)[0]
        plain = ours.transformer(*inputs, return_dict=False)[0]
        layers = script.add_lora(ours.transformer, crd.TARGET_MODULES, rank, 8, script.ADAPTERS)
        script.load_lora(layers, ours, tmp_path, "transformer")
        for adapter in script.ADAPTERS:
            with script.use_adapter(layers, adapter):
                v = ours.transformer(*inputs, return_dict=False)[0]
            assert_close(v, expected, rtol=1e-3, atol=1e-4)
    assert (expected - plain).abs().max() > 0.1


def save_with_peft(pipe, config, path):
    """A LoRA of random weights, put into the pipeline and saved as by diffusers' scripts."""
    from peft import get_peft_model_state_dict

    torch.manual_seed(0)
    pipe.transformer.add_adapter(config)
    pipe.save_lora_weights(
        path, transformer_lora_layers=get_peft_model_state_dict(pipe.transformer),
        transformer_lora_adapter_metadata=config.to_dict(),
    )  # fmt: skip


def test_in_peft_each_layers_own_rank_counts(tmp_path):
    """Half the rank at the same alpha is twice the scale."""
    peft = pytest.importorskip("peft")
    pipe, ours = tiny(), tiny()
    pattern = {name: 2 for name in crd.TARGET_MODULES}
    targets = list(crd.TARGET_MODULES)
    options = dict(init_lora_weights=False, target_modules=targets)
    config = peft.LoraConfig(r=4, lora_alpha=6, rank_pattern=pattern, **options)
    save_with_peft(pipe, config, tmp_path)
    layers = crd.add_lora(ours.transformer, crd.TARGET_MODULES, 2, 8, crd.ADAPTERS)
    crd.load_lora(layers, ours, tmp_path, "transformer")
    for name, layer in layers.items():
        theirs = pipe.transformer.get_submodule(name)
        x = randn(3, layer.base.in_features)
        with torch.no_grad():
            assert_close(layer(x), theirs(x), rtol=1e-4, atol=1e-5)
    pipe = tiny()
    config = peft.LoraConfig(r=4, rank_pattern={"attn.to_q": 2}, **options)
    save_with_peft(pipe, config, tmp_path / "mixed")
    with pytest.raises(ValueError, match="has rank 2 in .*attn.to_q"):
        ours = tiny()
        layers = crd.add_lora(ours.transformer, crd.TARGET_MODULES, 4, 8, crd.ADAPTERS)
        crd.load_lora(layers, ours, tmp_path / "mixed", "transformer")


@parametrize("settings", [{"use_rslora": True}, {"alpha_pattern": {"to_q": 1}}, {"targets": 3}])
def test_a_lora_with_another_scale_or_on_other_layers_is_refused(tmp_path, settings):
    peft = pytest.importorskip("peft")
    pipe = tiny()
    targets = list(crd.TARGET_MODULES)[: settings.pop("targets", None)]
    save_with_peft(pipe, peft.LoraConfig(r=2, target_modules=targets, **settings), tmp_path)
    pipe = tiny()
    layers = crd.add_lora(pipe.transformer, crd.TARGET_MODULES, 2, 4, crd.ADAPTERS)
    with pytest.raises(ValueError, match="does not hold a plain LoRA"):
        crd.load_lora(layers, pipe, tmp_path, "transformer")


@in_both_scripts
def test_a_lora_in_a_format_with_alphas_is_refused(monkeypatch, tmp_path, script):
    """Its scale is not in the tensors. (Some pipelines return such alphas.)"""
    pipe = tiny()
    layers = script.add_lora(pipe.transformer, crd.TARGET_MODULES, 2, 4, script.ADAPTERS)
    tensors = script.adapter_tensors(layers, "policy")
    tensors = {f"transformer.{name}": tensors[name] for name in tensors}
    read = lambda alphas: lambda path, **options: (tensors, alphas, None)  # noqa: E731
    monkeypatch.setattr(pipe, "lora_state_dict", read(None))
    script.load_lora(layers, pipe, tmp_path, "transformer")
    monkeypatch.setattr(pipe, "lora_state_dict", read({"attn.alpha": 1.0}))
    with pytest.raises(ValueError, match="does not hold a plain LoRA"):
        script.load_lora(layers, pipe, tmp_path, "transformer")


def test_the_policy_gradient_is_the_gradient_of_the_expected_reward(sd1, monkeypatch):
    """The score function, over many images, agrees with backpropagation through the chain."""
    N = 2048
    R = 2
    settings = dict(width=4, height=4, algorithm="sf", guidance=1.0)
    args = short(ddpo, **sd1 | settings)
    torch.manual_seed(0)
    pipe, model = ddpo.load_pipeline(args, CPU)
    ddpo.add_lora(model.network, model.target_modules, 2, 6, ddpo.ADAPTERS)
    policy = [p for p in model.network.parameters() if p.requires_grad]
    for p in policy:
        p.data.normal_(std=0.3)
    cond = [c.expand(N, *c.shape[1:]) for c in ddpo.encode(pipe, model, ["a cat"])]
    noise = randn(N, 4, 2, 2)
    generator = torch.Generator().manual_seed(1)
    rows = [slice(0, N)]
    x0, states, log_probs = ddpo.rollout(model, noise, cond, None, rows, R, args, generator)
    reward = x0[:, :3].mean((1, 2, 3))
    A = reward - reward.mean()
    for i in range(R):
        x, x_next = states[:, i], states[:, i + 1]
        terms = ddpo.policy_terms(model, x, x_next, i, log_probs[:, i], A, cond, None, args)
        terms["loss"].backward()
    estimate = -gradients(policy) * noise[0].numel()  # log p is an average over the latents
    model.network.zero_grad()
    monkeypatch.setattr(torch.Tensor, "detach", lambda x: x)  # let actions depend on the policy
    x = noise
    for i in range(args.steps):
        for p in policy:
            p.requires_grad_(i < R)  # later steps are part of the environment
        prediction = model.predict(x, i, cond)
        x, _ = model.step(prediction, x, i, noisy=i < R, generator=generator)
    for p in policy:
        p.requires_grad_(True)
    x[:, :3].mean().backward()
    exact = gradients(policy)
    assert torch.cosine_similarity(estimate, exact, 0) > 0.85
    assert 0.7 < torch.dot(estimate, exact) / exact.square().sum() < 1.4


@in_both_scripts
def test_a_folder_stored_in_float32_computes_in_bf16_if_asked(tmp_path, script):
    """All but the VAE; also where the file's first tensor is in bf16, and the others are not."""
    tiny(dtype="fp32").save_pretrained(tmp_path)
    path = tmp_path / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    first = min(tensors)
    save_file({**tensors, first: tensors[first].bfloat16()}, path, metadata={"format": "pt"})
    pipe, _ = script.load_pipeline(short(script, model=str(tmp_path), dtype="bf16"), CPU)
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in pipe.text_encoder.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in pipe.vae.parameters()} == {torch.float32}


@in_both_scripts
@parametrize("part", ["transformer/diffusion_pytorch_model", "text_encoder/model", "vae"])
def test_a_base_model_that_lacks_a_tensor_is_refused(tmp_path, script, part):
    """The libraries would draw random weights, others at every start, and only warn."""
    tiny().save_pretrained(tmp_path)
    part = f"{part}/diffusion_pytorch_model" if part == "vae" else part
    path = tmp_path / f"{part}.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "projection" in name or "to_q.weight" in name)
    del tensors[name]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"{path.parent.name} lacks weights, \['{name}'\]"):
        script.load_pipeline(short(script, model=str(tmp_path)), CPU)


@in_both_scripts
def test_a_pipeline_with_t5_loads_and_encodes(tmp_path, script):
    """Stable Diffusion 3.5's third text encoder: the tokens of CLIP (12 here), then those of T5."""
    pipe = tiny()
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0), ("a", -3.0)]
    tokenizer = transformers.T5Tokenizer(vocab=pieces)
    config = transformers.T5Config(vocab_size=5, d_model=128, num_layers=1)
    pipe.register_modules(text_encoder_3=transformers.T5EncoderModel(config), tokenizer_3=tokenizer)
    pipe.save_pretrained(tmp_path)
    args = short(script, model=str(tmp_path), max_sequence_length=7)
    pipe, model = script.load_pipeline(args, CPU)
    texts = ["aa", "a a"]
    embeds, _ = crd.encode(pipe, texts, args) if script is crd else ddpo.encode(pipe, model, texts)
    assert embeds.shape == (2, 12 + 7, 128)
    assert (embeds[0, 12:] - embeds[1, 12:]).abs().max() > 0


# Command line


PAPER = dict(
    model="stabilityai/stable-diffusion-3.5-medium", height=512, width=512, max_sequence_length=128,
    rank=32, alpha=64, groups=48, group_size=24, rollout_steps=10, train_timesteps=9, eval_steps=40,
    lr=3e-4, beta=1, tau=math.inf, reward_weight=1, anchor=0.1, anchor_guidance=4.5, ema=0.9,
    anchor_adaptive=True, eval_guidance=1, grad_checkpoint=True, eval_every=10, eval_images=128,
    micro_batch=24, epochs=300,
)  # fmt: skip
OCR = PAPER | dict(
    steps_per_epoch=2, old_decay=[0, 0.25, 0.005, 0.999], sampler_decay=[75, 0, 0.0075, 0.999],
    preset="ocr",
)  # fmt: skip
GENEVAL = PAPER | dict(
    steps_per_epoch=1, old_decay=[0, 0.25, 0.001, 0.5], sampler_decay=[0, 0, 0.001, 0.5],
    preset="geneval",
)  # fmt: skip
DDPO = dict(
    model="CompVis/stable-diffusion-v1-4", steps=50, deterministic_steps=0, guidance=5, eta=1,
    images=256, updates=4, clip=1e-4, stat_min=16, lr=3e-4, ema=0.9, reward="compressibility",
    algorithm="is", height=512, width=512, rank=16, alpha=32, group_size=1, micro_batch=8,
    epochs=100, grad_checkpoint=True, eval_every=10, eval_images=128, max_sequence_length=128,
)  # fmt: skip
BOTH_TINY = dict(
    model=str(TINY), device="cpu", height=32, width=64, max_sequence_length=1, rank=16, alpha=32,
    reward=f"ocr@{TINY}", prompts="signs", group_size=8, ema=0.97, grad_checkpoint=False,
    eval_images=512, eval_rewards=f"ocr@{TINY}/judge,clipscore@{TINY}/clip,color", dtype=None,
)  # fmt: skip
CRD_TINY = BOTH_TINY | dict(
    groups=48, rollout_steps=6, beta=1, tau=math.inf, reward_weight=1, anchor=0.1, eval_every=8,
    anchor_guidance=4, anchor_adaptive=True, train_timesteps=6, epochs=24, steps_per_epoch=12,
    micro_batch=64, lr=3e-3, old_decay=[0, 0.25, 0.01, 0.9], sampler_decay=[0, 0, 0.001, 0.5],
    eval_steps=10, eval_guidance=1, compile=False, eval_prompts=None,
)  # fmt: skip
DDPO_TINY = BOTH_TINY | dict(
    images=192, steps=10, deterministic_steps=7, guidance=1, noise_level=0.7, micro_batch=96,
    updates=4, clip=1e-3, stat_min=8, epochs=60, lr=6e-4, eval_every=10, algorithm="is",
)  # fmt: skip


SCENES = dict(
    model=f"{TINY}/scenes", reward=f"geneval@{TINY}/scenes", prompts=f"{TINY}/scenes/prompts.jsonl",
    eval_prompts=f"{TINY}/scenes/eval.jsonl", eval_rewards=f"geneval@{TINY}/scenes/judge",
)  # fmt: skip


@parametrize("script, flags, expected", [
    (crd, "", OCR | dict(reward="ocr", name="crd-ocr-seed0")),
    (crd, "--reward ocr@here --no-grad-checkpoint", OCR | dict(grad_checkpoint=False)),
    (crd, "--reward pickscore,ocr", OCR | dict(name="crd-pickscore-ocr-seed0")),
    (crd, "--reward vlm --seed 3", GENEVAL | dict(reward="vlm", name="crd-vlm-seed3")),
    (crd, "--preset geneval", GENEVAL | dict(reward="geneval", name="crd-geneval-seed0")),
    (crd, "--preset tiny --lr 0.5", {**CRD_TINY, "lr": 0.5, "name": "crd-tiny-seed0"}),
    (crd, "--preset tiny", CRD_TINY), (ddpo, "--preset tiny", DDPO_TINY),
    (crd, "--preset scenes", CRD_TINY | SCENES | dict(anchor=0.25, lr=1.5e-3)),
    (ddpo, "--preset scenes", DDPO_TINY | SCENES),
    (ddpo, "", DDPO | dict(name="ddpo-sd1-is-seed0")),
    (ddpo, "--preset sd3", DDPO | dict(
        model="stabilityai/stable-diffusion-3.5-medium", steps=10, deterministic_steps=1,
        guidance=4.5, noise_level=0.7)),
    (ddpo, "--algorithm sf --seed 2", dict(updates=1, name="ddpo-sd1-sf-seed2")),
    (rwr, "", DDPO | dict(temperature=0.2, keep=0.1, sparse=False, name="rwr-sd1-seed0")),
    (rwr, "--preset tiny --sparse", {**DDPO_TINY, "name": "rwr-sparse-tiny-seed0"}),
])  # fmt: skip
def test_presets_are_the_papers_and_flags_override_them(script, flags, expected):
    """Those of the toy are the ones that RESULTS.md was run with."""
    args = asdict(script.parse(flags.split()))
    assert {key: args[key] for key in expected} == expected


@in_both_scripts
def test_the_optimizer_has_the_papers_settings_and_a_resumed_runs_flags(run, monkeypatch, script):
    """Which are saved with it."""
    groups = []
    step = torch.optim.AdamW.step

    def spy(optimizer):
        groups.append({k: optimizer.param_groups[0][k] for k in ("lr", "weight_decay", "betas")})
        return step(optimizer)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    folder = run(script, "run", 1, lr=0.1)
    script.train(script.parse(["--resume", str(folder), "--epochs", "2", "--lr", "0.3"]))
    assert groups[0] == {"lr": 0.1, "weight_decay": 1e-4, "betas": (0.9, 0.999)}
    assert groups[-1]["lr"] == 0.3
    saved = json.loads((folder / "args.json").read_text())
    assert (saved["epochs"], saved["lr"]) == (2, 0.3)


@in_both_scripts
def test_prompts_are_by_default_those_of_the_trained_reward(run, monkeypatch, script):
    score = Mock(wraps=lambda images, prompts: [1] * len(images))
    monkeypatch.setattr(rewards.Incompressibility, "score_batch", score)
    settings = dict(prompts=None, eval_rewards="color", eval_prompts="red.txt")
    Path("red.txt").write_text("a red fox")
    run(script, "run", 1, **settings)
    drawn = {prompt for call in score.call_args_list[1:-1] for prompt in call.args[1]}
    assert drawn <= {rewards.phrase(animal) for animal in rewards.ANIMALS}


@in_both_scripts
def test_a_run_stopped_before_its_first_save_starts_anew(run, script):
    """With its --lora, and an evaluation before training."""
    lora = run(script, "first", 1, lr=0.1) / "epoch-0001"
    folder = run(script, "run", 1, lora=str(lora))
    expected = read_metrics(folder)
    for name in ("state.pt", "metrics.jsonl"):
        (folder / name).unlink()
    script.train(script.parse(["--resume", str(folder)]))
    assert read_metrics(folder) == expected
    assert expected[0]["reward"] != read_metrics(lora.parent)[0]["reward"]


@parametrize("script", [crd, ddpo, rwr])
def test_evaluating_a_run_leaves_it_as_it_was(run, script):
    """What is evaluated is its last epoch, on whatever prompts, in a folder of its own."""
    folder = run(script, "run", 1, lr=0.1)
    files = {path: path.read_bytes() for path in folder.rglob("*.*")}
    Path("words.txt").write_text("a cat\na dog\na pig")
    flags = ["--epochs", "0", "--eval-prompts", "words.txt", "--reward", "own.red"]
    for _ in range(2):
        script.train(script.parse(["--resume", str(folder), *flags]))
    assert {path: path.read_bytes() for path in files} == files
    *before, line = read_metrics(folder / "evaluation")
    assert before == read_metrics(folder)
    assert line["split"] == "eval" and line["epoch"] == 1 and "own.red" in line
    again = script.train(script.parse(["--resume", str(folder), "--epochs", "2"]))
    assert read_metrics(again)[-1]["epoch"] == 2


@in_both_scripts
def test_a_resumed_run_cannot_change_what_its_state_depends_on(run, monkeypatch, script):
    folder = run(script, "run", 1)
    monkeypatch.setattr(script, "load_pipeline", lambda *args: pytest.fail("the model was loaded"))
    for flags, message in (
        ("--alpha 64", "--alpha of runs/run is 4, and stays so"),
        ("--rank 3", "--rank of runs/run is 2"),
        ("--lora runs/run/epoch-0001", "--lora of runs/run is None"),
        ("--preset scenes", "--preset of runs/run is tiny, and stays so"),
    ):
        with pytest.raises(ValueError, match=message):
            script.train(script.parse(["--resume", str(folder), *flags.split()]))


def test_a_resumed_ddpo_run_keeps_its_reward(run):
    """Rewards of its past are the baseline. But its model may move."""
    folder = run(ddpo, "run", 1, reward=f"ocr@{TINY}:2,own.red", prompts="signs")
    for reward in (f"ocr@{TINY},own.red", "own.red", f"own.red,ocr@{TINY}:2"):
        with pytest.raises(ValueError, match="its past rewards are the baseline"):
            ddpo.train(ddpo.parse(["--resume", str(folder), "--epochs", "2", "--reward", reward]))
    shutil.copytree(TINY, "moved")
    flags = ["--epochs", "2", "--reward", "ocr@moved:2,own.red"]
    ddpo.train(ddpo.parse(["--resume", str(folder), *flags]))


@in_both_scripts
def test_a_folder_belongs_to_one_run_and_a_run_that_fails_early_leaves_none(
    run, monkeypatch, script
):
    """Whoever comes second hears of it, even while the first is still loading its model."""
    load_pipeline = script.load_pipeline

    def second_run(*args):
        with pytest.raises(ValueError, match=f"runs/{args[0].name} exists"):
            run(script, args[0].name, 1)
        return load_pipeline(*args)

    def generate(*args):
        raise MemoryError

    name = "generate" if script is crd else "rollout"
    monkeypatch.setattr(script, "load_pipeline", second_run)
    with monkeypatch.context() as patch:
        patch.setattr(script, name, generate)
        with pytest.raises(MemoryError):
            run(script, "run", 1)
    assert not Path("runs/run").exists()
    assert len(read_metrics(run(script, "run", 1))) == 3
    with monkeypatch.context() as patch:
        patch.setattr(script, name, generate)
        with pytest.raises(MemoryError):
            script.train(script.parse(["--resume", "runs/run", "--epochs", "2"]))
    assert Path("runs/run/state.pt").exists()
    with monkeypatch.context() as patch:  # a new run that fails later, after its first evaluation
        patch.setattr(script, "ema_update", generate)
        with pytest.raises(MemoryError):
            run(script, "later", 1)
    assert len(read_metrics(Path("runs/later"))) == 1


@in_both_scripts
def test_the_state_is_saved_after_every_epoch(run, monkeypatch, script):
    save = Mock(wraps=torch.save)
    monkeypatch.setattr(torch, "save", save)
    run(script, "run", 3, eval_every=3)
    assert save.call_count == 3


@in_both_scripts
def test_a_run_killed_while_it_saves_goes_on_from_the_epoch_before(run, monkeypatch, script):
    folder = run(script, "run", 1)

    def killed(state, path):
        Path(path).write_bytes(b"half of a file")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            script.train(script.parse(["--resume", str(folder), "--epochs", "2"]))
    script.train(script.parse(["--resume", str(folder), "--epochs", "2"]))
    assert [line["epoch"] for line in read_metrics(folder)] == [0, 1, 1, 2, 2]


@in_both_scripts
def test_a_run_of_another_model_or_script_is_not_resumed(run, script):
    folder = run(script, "run", 1)
    state = torch.load(folder / "state.pt")
    state["adapters"] = {f"other.{name}": x for name, x in state["adapters"].items()}
    torch.save(state, folder / "state.pt")
    with pytest.raises(ValueError, match="has trained another model: .*'other"):
        script.train(script.parse(["--resume", str(folder), "--epochs", "2"]))
    baseline = run(rwr, "baseline", 0)
    with pytest.raises(ValueError, match=f"holds no run of {script.__name__}.py"):
        script.parse(["--resume", str(baseline)])


def test_more_training_timesteps_than_the_rollout_has_are_all_that_it_has(run):
    few, many = (
        read_metrics(run(crd, f"{count}", 1, train_timesteps=count, rollout_steps=2))
        for count in (2, 9)
    )
    assert few == many


def test_reward_weighted_regression_takes_ddpos_settings(run, monkeypatch):
    """A LoRA to start from, held-out rewards, held-out prompts; what it lacks is refused."""
    Path("all.txt").write_text("\n".join(f"word {i}" for i in range(8)))
    Path("held-out.txt").write_text("\n".join(f"word {i}" for i in range(6)))
    settings = dict(prompts="all.txt", eval_prompts="held-out.txt", eval_rewards="own.red")
    score = Mock(wraps=lambda images, prompts: range(len(images)))
    with monkeypatch.context() as patch:
        patch.setattr(rewards.Incompressibility, "score_batch", score)
        lora = run(rwr, "first", 1, lr=0.1, **settings)
    drawn = {prompt for call in score.call_args_list[1:-1] for prompt in call.args[1]}
    assert drawn == {"word 6", "word 7"}
    before, _, after = read_metrics(lora)
    assert before["own.red"] != before["incompressibility"]
    settings = dict(lora=str(lora / "epoch-0001"), reward="own.red", eval_prompts="held-out.txt")
    again = run(rwr, "again", 0, **settings)
    assert read_metrics(again)[0]["reward"] == pytest.approx(after["own.red"], rel=1e-6)
    assert after["own.red"] != before["own.red"]
    rollout = Mock(wraps=ddpo.rollout)
    monkeypatch.setattr(ddpo, "rollout", rollout)
    run(rwr, "steps", 1, steps=4, deterministic_steps=3)
    assert [call.args[5] for call in rollout.call_args_list] == [0, 1, 0]  # noisy steps


@in_both_scripts
def test_a_contact_sheet_shows_each_images_own_score(run, monkeypatch, script):
    score = Mock(wraps=lambda images, prompts: [0.25, 0.5][: len(images)])
    monkeypatch.setattr(rewards.Incompressibility, "score_batch", score)
    sheet = Mock()
    monkeypatch.setattr(rewards, "contact_sheet", sheet)
    run(script, "run", 0)
    assert sheet.call_args.args[2] == [0.25, 0.5]


@in_both_scripts
def test_evaluation_alone_needs_no_prompts_to_train_on(run, script):
    Path("words.txt").write_text("a cat\na dog")
    folder = run(script, "run", 0, prompts="words.txt", eval_prompts="words.txt")
    assert len(read_metrics(folder)) == 1


@in_both_scripts
def test_seconds_are_those_of_each_phase_and_of_all_epochs(run, monkeypatch, script):
    score = rewards.Incompressibility.score_batch

    def slow(self, images, prompts):
        time.sleep(0.3)
        return score(self, images, prompts)

    decode = script.decode

    def slower(*args):
        time.sleep(0.6)
        return decode(*args)

    monkeypatch.setattr(rewards.Incompressibility, "score_batch", slow)
    monkeypatch.setattr(script, "decode", slower)
    folder = run(script, "run", 2, eval_every=9, eval_images=1)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    trained = [line for line in lines if line["split"] == "train"]
    for line in trained:
        assert line["reward_seconds"] > 0.3 and line["rollout_seconds"] > 0.6
        assert line.keys() - {"incompressibility"} <= set(rewards.LOGGED)
    phases = [x[f"{name}_seconds"] for x in trained for name in ("rollout", "reward", "train")]
    assert trained[-1]["seconds"] == pytest.approx(sum(phases), rel=0.01)


def test_counts_that_processes_do_not_divide_are_refused(monkeypatch):
    monkeypatch.setattr(crd, "PROCESSES", 4)
    monkeypatch.setattr(ddpo, "PROCESSES", 4)
    with pytest.raises(ValueError, match="--groups"):
        crd.check(short(crd, name="x", groups=6))
    for settings in (dict(images=24, updates=4), dict(images=24, updates=1, group_size=4)):
        with pytest.raises(ValueError, match="--images"):
            ddpo.check(short(ddpo, name="x", **settings))


@in_both_scripts
def test_compile_says_that_pytorch_is_too_old(monkeypatch, script):
    monkeypatch.setattr(torch, "compile", lambda model, backend: None)
    with pytest.raises(ValueError, match="--compile needs a newer PyTorch"):
        script.check(short(script, name="x", compile=True))


@in_both_scripts
def test_a_large_model_runs_on_a_cpu_if_asked(monkeypatch, script):
    """And one in a folder anyway."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    script.check(short(script, name="x", model="some/repo", device="cpu"))
    script.check(short(script, name="x", model=str(TINY), device=None))


@parametrize("script, settings, message", [
    (crd, dict(group_size=1), "--group-size has to be 2"), (crd, dict(groups=0), "--groups"),
    (crd, dict(old_decay=[0, 1]), "--old-decay"), (crd, dict(eval_steps=0), "--eval-steps has"),
    (crd, dict(sampler_decay=[0]), "--sampler-decay"), (crd, dict(micro_batch=0), "--micro-batch"),
    (crd, dict(train_timesteps=-1), "--train-timesteps"),
    (crd, dict(groups=3, steps_per_epoch=2), "--groups"), (ddpo, dict(images=0), "--images"),
    (ddpo, dict(deterministic_steps=-1), "no step"), (ddpo, dict(eval_every=0), "--eval-every"),
    (ddpo, dict(updates=3), "--images"),
    (ddpo, dict(algorithm="sf", updates=2), "sf: one update"),
    (ddpo, dict(deterministic_steps=4), "no step to train on"),
    (ddpo, dict(stat_min=33), "2 to 32"),
    (ddpo, dict(stat_min=1), "2 to 32"),
    (ddpo, dict(images=66, group_size=33, updates=1), "32 rewards"),
    (ddpo, dict(eta=0.0), "--eta"), (ddpo, dict(eta=1.5), "--eta"),
    (ddpo, dict(noise_level=0.0), "--noise-level"),
    (crd, dict(steps_per_epoch=0), "--steps-per-epoch has to be 1"), (crd, dict(rank=0), "--rank"),
    (ddpo, dict(updates=0), "--updates has to be 1"), (ddpo, dict(group_size=0), "--group-size"),
    (crd, dict(eval_every=-1), "--eval-every"), (ddpo, dict(eval_images=0), "--eval-images has"),
    (crd, dict(epochs=-1), "--epochs"), (ddpo, dict(epochs=-1), "--epochs"),
    (crd, dict(beta=0), "--beta"), (crd, dict(tau=-1.0), "--tau"),
    (crd, dict(anchor=-0.1), "--anchor 0 or at least"),
    (crd, dict(anchor=1e-5), "--anchor 0 or"),
    (crd, dict(name=None), "`parse`, which"), (ddpo, dict(name=None), "`parse`, which applies"),
    (crd, dict(height=0), "--height"), (ddpo, dict(micro_batch=-8), "--micro-batch"),
    (crd, dict(lora="nowhere"), "nowhere: there is no such folder"),
    (ddpo, dict(lora="nowhere"), "nowhere: there is no such folder"),
    (crd, dict(reward="ocr@a/x", eval_rewards="clipscore@a/x,ocr@b/x"), "both are logged as ocr@x"),
    (ddpo, dict(reward="ocr", eval_rewards="ocr,aesthetic@a,aesthetic@c/a"), "aesthetic@a"),
])  # fmt: skip
def test_counts_that_make_no_sense_are_refused(script, settings, message):
    with pytest.raises(ValueError, match=message):
        script.check(short(script, **{"name": "x", **settings}))


@in_both_scripts
@parametrize("settings, message", [
    (dict(reward="beauty"), "no reward is called 'beauty'"),
    (dict(height=36), "multiples of 16"), (dict(width=40), "multiples of 16"),
    (dict(eval_rewards="color", prompts="animals"), "reward color cannot score"),
    (dict(reward="color", eval_rewards="incompressibility", eval_prompts="words.txt"),
     "words.txt, line 3: reward color cannot score"),
    (dict(model="some/repo", device=None), "--preset tiny"),
    (dict(reward=f"ocr@{TINY}", prompts="animals"), "prompt generator animals: .* quotes"),
    (dict(reward="color", prompts="words.txt"), "words.txt, line 3: .*color.*'a sign'.* red,"),
    (dict(prompts="words.txt", eval_prompts="words.txt"), "words.txt has no prompt for train: all"),
    (dict(group_size=3), "--group-size"),
    (dict(name="taken"), "runs/taken exists: --resume it"),
])  # fmt: skip
def test_mistakes_are_refused_before_loading(run, monkeypatch, script, settings, message):
    Path("runs/taken").mkdir(parents=True)
    words = ["a red sign", "", "a sign", *(f"red {i}" for i in range(20))]
    Path("words.txt").write_text("\n".join(words))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(script, "load_pipeline", lambda *args: pytest.fail("the model was loaded"))
    with pytest.raises(ValueError, match=message):
        script.train(short(script, **{"name": "run", **settings}))


# Rewards

FLAT = Image.new("RGB", (64, 32), (90, 120, 30))


def noise_image(seed=0, size=(64, 32)):
    pixels = random.Random(seed).randbytes(3 * size[0] * size[1])
    return Image.frombytes("RGB", size, pixels)


def scores_of(reward, images, prompts=None):
    return reward(images, prompts or [""] * len(images), [{}] * len(images))


def some_prompts(source, split, seed=0, count=400):
    pairs = itertools.islice(rewards.prompts(source, split, seed), count)
    return [prompt for prompt, _ in pairs]


@parametrize("text, letters", [
    ("MOON", 0), ("the mo on is up", 0), ("\uff2d\uff4f\uff4f\uff4e", 0), ("moan", 1), ("mon", 1),
    ("moxon", 1), ("omon", 2), ("", 4), ("a very long line of other text", 4),
])  # fmt: skip
def test_an_edit_costs_a_letter_and_case_spaces_and_unicode_form_nothing(text, letters):
    assert rewards.edit_similarity("Mo on", text) == 1 - letters / 4


@parametrize("target, text", [
    ("Straße", "Straße"), ("Straße", "STRASSE"), ("cafe\u0301", "café"), ("café", "cafe\u0301"),
    ("\uff2d\uff4f\uff4f\uff4e", "moon"), ("ﬁne", "FINE"),
])  # fmt: skip
def test_one_text_in_two_spellings_of_unicode_is_one(target, text):
    assert rewards.edit_similarity(target, text) == 1


@parametrize("prompt, text", [
    ('a 12" ruler that says "hello", not "b"', "hello"), ('("hi")', "hi"), ('an empty ""', ""),
    ('a 12" ruler', ""), ('one " only', ""), ('a 24" x 36½" poster: "Route 66"', "Route 66"),
    ('写着"你好！"和"再见"', "你好！"), ('上面写着"你好"', "你好"),
    ('sign reads"Hello!"and"Bye"', "Hello!"),
    ("a mug with “Good Morning” on it", "Good Morning"),
    ("写着“中文”的牌子", "中文"), ("a 12” ruler that says “hello”", "hello"),
    ("ein Schild „Hallo“", "Hallo"), ("en skylt med ”Hej”", "Hej"),
    ('вывеска"Хлеб" и "Соль"', "Хлеб"), ('לוח "שלום"', "שלום"), ('شاحنة"خبز"', "خبز"),
    ('“say "hi"”', 'say "hi"'), ('a “12" pizza” box', '12" pizza'), ("it's 'single'", ""),
])  # fmt: skip
def test_the_first_quoted_text_is_asked_for(prompt, text):
    """In straight or curly double quotes, whatever letter is before them; inches are no quotes."""
    assert rewards.quoted(prompt) == text


def flood(mask):
    """Connected components of a mask, as sets of (row, column), pixel by pixel."""
    left = {tuple(pixel) for pixel in mask.nonzero().tolist()}
    found = []
    while left:
        component = set()
        todo = [left.pop()]
        while todo:
            y, x = todo.pop()
            component.add((y, x))
            for neighbor in itertools.product((y - 1, y, y + 1), (x - 1, x, x + 1)):
                if neighbor in left:
                    left.remove(neighbor)
                    todo.append(neighbor)
        found.append(component)
    return found


@parametrize("density", [0.0, 0.2, 0.4, 0.6, 1.0])
def test_pixels_that_touch_are_one_component(density):
    """If only by a corner."""
    for seed in range(10):
        mask = torch.rand(17, 23, generator=torch.Generator().manual_seed(seed)) < density
        components = [set(map(tuple, pixels.tolist())) for pixels in rewards.components(mask)]
        assert sorted(map(sorted, components)) == sorted(map(sorted, flood(mask)))


def rectangle(x0, y0, x1, y1):
    return torch.tensor([(x0, y0), (x1, y0), (x1, y1), (x0, y1)]).double()


def text_map_of(*blocks):
    text_map = torch.zeros(32, 64)
    for value, x0, y0, x1, y1 in blocks:
        text_map[y0 : y1 + 1, x0 : x1 + 1] = value
    return text_map


LINE = (10, 5, 30, 13)
LOW = (2, 20, 40, 28)


@parametrize("blocks, lines", [
    ([(0.25, 0, 0, 63, 31), (0.9, *LINE)], [LINE]),
    ([(0.5, *LINE)], []),  # over the map's threshold, under the box's
    ([(0.9, 10, 5, 30, 7)], []),  # too thin
    ([(0.35, *LINE), (0.9, 10, 5, 20, 13)], [LINE]),  # 11 of 21 columns are sure
    ([(0.35, *LINE), (0.9, 10, 5, 17, 13)], []),
    ([(0.9, *LINE), (0.8, *LOW)], [LINE, LOW]),
    ([(0.9, 10, 0, 20, 20), (0, 12, 2, 18, 18)], [(10, 0, 20, 20)]),  # empty inside
])  # fmt: skip
def test_a_line_is_a_blob_that_is_sure_on_average(blocks, lines):
    """It grows by its area over its perimeter, times `unclip`."""
    boxes = rewards.find_boxes(text_map_of(*blocks), unclip=0)
    assert_close(boxes, [rectangle(*line) for line in lines])
    if lines == [LINE]:
        d = 20 * 8 * 1.5 / 56
        grown = rectangle(10 - d, 5 - d, 30 + d, 13 + d)
        assert_close(rewards.find_boxes(text_map_of(*blocks)), [grown])


def turned(box, degrees):
    """Corners of a box, turned around (100, 100)."""
    angle = math.radians(degrees)
    x, y = (rectangle(*box) - 100).T
    cos, sin = math.cos(angle), math.sin(angle)
    return torch.stack([x * cos - y * sin, x * sin + y * cos], 1) + 100


@parametrize("degrees", [-40, -8, -3, 2, 15, 44])
def test_a_tilted_line_has_a_tilted_box(degrees):
    """Cut out, it is level: here, in the image as in the map, dark on the left."""
    image = Image.new("RGB", (200, 200), "black")
    line = turned((40, 90, 160, 110), degrees)
    corners = [tuple(corner) for corner in line.tolist()]
    pen = rewards.ImageDraw.Draw(image)
    pen.polygon(corners, "#ccc")
    pen.polygon(corners[:1] + [tuple(c) for c in turned((40, 90, 60, 110), degrees)[1:]], "#888")
    pixels = rewards.to_pixels(image, CPU)
    (box,) = rewards.find_boxes(pixels[0] / 255, unclip=0)
    assert (box - line).norm(dim=1).max() < 2
    box = rewards.scale_box(box, (200, 200), (200, 200))
    cut = rewards.cut_out(pixels, box)[:, 2:-2, 2:-2]
    assert cut.shape[1:] == pytest.approx((16, 116), abs=2)
    assert_close(cut[:, :, :14], torch.full_like(cut[:, :, :14], 136))
    assert_close(cut[:, :, 24:], torch.full_like(cut[:, :, 24:], 204))


def test_a_level_box_is_cut_out_pixel_by_pixel_and_a_high_one_turned():
    """Its corners are whole pixels of the image, none outside."""
    pixels = rewards.to_pixels(noise_image(), CPU)
    size = pixels.shape[1:]
    box = rewards.scale_box(rectangle(-3, 4.2, 20.3, 7), (16, 32), size)
    assert_close(box, rectangle(0, 8, 41, 14))
    assert_close(rewards.cut_out(pixels, box), pixels[:, 8:14, :41], rtol=0, atol=0.01)
    box = rewards.scale_box(rectangle(4, 2, 10, 11), size, size)
    upright = pixels[:, 2:11, 5:11].flip(2).transpose(1, 2)  # whose top is the right edge
    assert_close(rewards.cut_out(pixels, box), upright, rtol=0, atol=0.01)
    for height, is_turned in ((14, False), (16, True)):  # from 1.5 times as high as wide
        box = rewards.scale_box(rectangle(20, 4, 30, 4 + height), size, size)
        assert rewards.box_size(box) == ((height, 10) if is_turned else (10, height))
    outside = rewards.scale_box(rectangle(70, 40, 80, 50), size, size)
    assert_close(rewards.cut_out(pixels, outside), pixels[:, -1:, -1:])


def test_the_text_networks_see_the_sizes_and_the_channels_of_pp_ocr():
    """Blue comes first. Lines are rounded up as far as a width of 320, and beyond it down."""
    reward = rewards.load(f"ocr@{TINY}", "cpu")
    text_maps = SimpleNamespace(last_hidden_state=torch.zeros(1, 1, 32, 64))
    reward.detector = Mock(return_value=text_maps)
    reward.read([Image.new("RGB", (64, 32), "red")])
    blue, _, red = reward.detector.call_args.kwargs["pixel_values"].mean((0, 2, 3))
    assert red > 0 > blue
    vars(reward).update(limit=960, limit_type="max", width=320, max_width=3200)
    sizes = [reward.detector_size(size) for size in ((32, 64), (100, 50), (5, 5), (1920, 1080))]
    assert sizes == [(32, 64), (96, 64), (32, 32), (960, 544)]
    lines = ((10, 21), (40, 266), (40, 267), (40, 268), (7, 100), (10, 1000))
    assert [reward.line_width(size) for size in lines] == [101, 320, 320, 321, 685, 3200]
    vars(reward).update(limit=736, limit_type="min")
    sizes = [reward.detector_size(size) for size in ((512, 512), (512, 768), (800, 1000))]
    assert sizes == [(736, 736), (736, 1088), (800, 992)]
    vars(reward).update(limit=64, limit_type="resize_long")
    assert [reward.detector_size(size) for size in ((32, 32), (256, 128))] == [(64, 64), (64, 32)]


def test_short_lines_are_padded_with_the_middle_of_the_scale():
    """As the recognizer was trained."""
    reward = rewards.load(f"ocr@{TINY}", "cpu")
    line = reward.line_input(torch.full((3, 24, 20), 255.0))
    assert (line[:, :, :40] == 1).all() and (line[:, :, 40:] == 0).all()
    assert line.shape == (3, 48, reward.width)


def test_settings_that_a_folder_lacks_are_pp_ocrs(tmp_path):
    """For red, green, blue those that ImageNet has for blue, green, red; and blue comes first."""
    for part in ("ocr-det", "ocr-rec"):
        shutil.copytree(TINY / part, tmp_path / part)
    (tmp_path / "ocr-det/preprocessor_config.json").write_text("{}")
    path = tmp_path / "ocr-rec/preprocessor_config.json"
    path.write_text(json.dumps({"character_list": json.loads(path.read_text())["character_list"]}))
    reward = rewards.load(f"ocr@{tmp_path}", "cpu")
    assert reward.mean == (0.406, 0.456, 0.485) and reward.std == (0.225, 0.224, 0.229)
    assert (reward.limit, reward.limit_type) == (960, "max")
    assert (reward.width, reward.max_width) == (320, 3200)
    red = rewards.to_pixels(Image.new("RGB", (320, 48), "red"), CPU)
    assert reward.line_input(red)[:, 0, 0].tolist() == [-1, -1, 1]


def test_repeats_are_merged_before_blanks_are_dropped():
    """So a blank between two of a letter keeps both."""
    best = torch.tensor([0, 1, 1, 0, 1, 2, 2, 0, 0, 2])
    assert rewards.ctc_decode(best, ["", "a", "b"]) == "aabb"


LEFT_PART, RIGHT_PART = (turned((85, 20, 115, 35), degrees) for degrees in (-35, 35))
BANNER = rectangle(0, 0, 12, 80).roll(-1, 0)  # laid on its side


@parametrize("boxes", [
    [rectangle(0, 0, 10, 10), rectangle(20, 3, 30, 13), rectangle(0, 20, 10, 30),
     rectangle(15, 18, 30, 28)],  # a little lower is still on the line
    [rectangle(0, 8, 40, 40), rectangle(50, 10, 70, 20)],  # and so is a smaller one
    [turned(box, 40) for box in ((0, 0, 40, 10), (50, 0, 60, 10), (0, 15, 60, 25))],
    [turned(box, 70) for box in ((0, 0, 40, 10), (50, 0, 60, 10), (0, 15, 60, 25))],
    [LEFT_PART, RIGHT_PART],  # of an arc
    [BANNER, *(rectangle(20, y, 90, y + 15) for y in (10, 30, 50))],
])  # fmt: skip
def test_boxes_are_read_in_the_direction_of_most_of_the_text(boxes):
    for shuffled in itertools.permutations(range(len(boxes))):
        order = rewards.reading_order([boxes[i] for i in shuffled])
        assert_close(order, boxes)
    assert rewards.reading_order([]) == []


def text_image(lines, size=(320, 320), degrees=0, seed=0):
    """Lines (text, letter height, x, y of the center) on stripes, all turned around the middle."""
    rng = random.Random(seed)
    image = Image.new("RGB", size, tuple(rng.randint(120, 255) for _ in range(3)))
    pen = rewards.ImageDraw.Draw(image)
    for x in range(0, size[0], 40):
        stripe = tuple(rng.randint(120, 255) for _ in range(3))
        pen.rectangle((x, 0, x + rng.randint(5, 30), size[1]), stripe)
    letters = Image.new("L", size)
    pen = rewards.ImageDraw.Draw(letters)
    for text, height, x, y in lines:
        pen.text((x, y), text, 255, rewards.ImageFont.load_default(height), "mm")
    ink = tuple(rng.randint(0, 60) for _ in range(3))
    image.paste(ink, mask=letters.rotate(-degrees, Image.BICUBIC))
    return image


TEXT_IMAGES = [("OPEN DAILY", text_image([("OPEN DAILY", 40, 160, 150)], seed=99))]
for i, degrees in enumerate((3, 5, 8, 12, 15, 20, 25, 30, 35, 40)):
    one = [(("Fresh Bread", "night train")[i % 2], 36 + i, 160, 160)]
    two = [("Museum of", 34, 160, 135), ("Modern Art", 34, 165, 180)]
    for lines, sign in ((one, 1), (one, -1), (two, (-1) ** i)):
        image = text_image(lines, degrees=sign * degrees, seed=len(TEXT_IMAGES))
        TEXT_IMAGES.append((" ".join(line[0] for line in lines), image))
APART = [("north", 30, 80, 90), ("south", 44, 235, 95)]
APART += [("east", 36, 80, 220), ("west", 30, 235, 225)]
TEXT_IMAGES += [
    ("north south east west", text_image(APART)),
    ("COLUMN", text_image([("COLUMN", 44, 160, 160)], degrees=90)),
    ("wide open road", text_image([("wide open road", 50, 240, 90)], (480, 180))),
    ("", text_image([])),
]


@pytest.fixture
def real_ocr(monkeypatch, tmp_path):
    """The OCR reward around PP-OCRv6's small networks, and RapidOCR, another implementation of
    PP-OCR, around the same with the same settings: two functions from an image to its text."""
    rapidocr = pytest.importorskip("rapidocr", reason="its wheel has PP-OCR's networks")
    onnxruntime = pytest.importorskip("onnxruntime")
    models = Path(rapidocr.__file__).parent / "models"
    files = {f"ocr-{part}": next(models.glob(f"PP-OCR*_{part}_*.onnx")) for part in ("det", "rec")}
    sessions = {folder: onnxruntime.InferenceSession(file) for folder, file in files.items()}

    def load_model(model_class, place, device):
        session = sessions[place["subfolder"]]
        name = session.get_inputs()[0].name

        def network(pixel_values):
            (output,) = session.run(None, {name: pixel_values.numpy()})
            return SimpleNamespace(last_hidden_state=torch.from_numpy(output))

        return network

    letters = sessions["ocr-rec"].get_modelmeta().custom_metadata_map["character"].splitlines()
    settings = {"ocr-det": {}, "ocr-rec": {"character_list": ["blank", *letters, " "]}}
    for folder in settings:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "preprocessor_config.json").write_text(json.dumps(settings[folder]))
    monkeypatch.setattr(rewards, "load_model", load_model)
    reward = rewards.load(f"ocr@{tmp_path}", "cpu")
    assert (reward.limit, reward.limit_type) == (960, "max")  # where the checkpoint says nothing
    engine = rapidocr.RapidOCR(params={
        "Global.use_cls": False, "Global.text_score": 0.0, "Global.log_level": "critical",
        "Det.model_path": str(files["ocr-det"]), "Rec.model_path": str(files["ocr-rec"]),
        "Det.mean": [0.485, 0.456, 0.406], "Det.std": [0.229, 0.224, 0.225],
        "Det.limit_type": "max", "Det.limit_side_len": 960, "Det.thresh": 0.3,
        "Det.box_thresh": 0.6, "Det.unclip_ratio": 1.5, "Det.use_dilation": False,
    })  # fmt: skip

    def read_as_rapidocr(image):
        return " ".join(engine(image).txts or [])

    return lambda image: reward.read([image])[0], read_as_rapidocr


def test_text_is_read_as_well_as_by_another_implementation_of_pp_ocr(real_ocr):
    """Level, tilted, in two lines, apart, in a column, and none."""
    read, read_as_rapidocr = real_ocr
    for target, image in TEXT_IMAGES:
        score = rewards.edit_similarity(target, read(image)) if target else float(not read(image))
        peer = rewards.edit_similarity(target, read_as_rapidocr(image))
        assert score >= peer - 0.01, (target, read(image), read_as_rapidocr(image))
        assert score == 1 or peer < 1


@parametrize("folder", [TINY, TINY / "judge"], ids=["tiny-sd3", "judge"])
def test_the_bundled_models_read_words_they_never_saw(monkeypatch, folder):
    """Whatever else is in the batch."""
    import make

    prompts = some_prompts("signs", "eval")
    rng = random.Random(0)
    images = [make.draw(prompt, rng)[0] for prompt in prompts]
    reward = rewards.load(f"ocr@{folder}", "cpu")
    assert reward.name == f"ocr@{folder.name}"
    batch = [FLAT, noise_image(), noise_image(size=(1, 5000)), *images]
    texts = reward.read(batch)
    assert texts[:5] == [reward.read([image])[0] for image in batch[:5]]
    right = [f'"{text.casefold()}"' in prompt for text, prompt in zip(texts[3:], prompts)]
    assert sum(right) >= 0.98 * len(prompts)
    assert scores_of(reward, images[:50], prompts[:50]).mean() > 0.98
    assert scores_of(reward, images[:50], prompts[1:51]).mean() < 0.5


@parametrize("folder", [TINY / "scenes", TINY / "scenes/judge"], ids=["scenes", "judge"])
def test_the_bundled_detectors_judge_scenes(folder):
    """Right ones pass; what misses by one object, count, color or place does not."""
    import make

    rng = random.Random(0)
    lines = rewards.read_prompts(str(TINY / "scenes/eval.jsonl"))[:24]
    reward = rewards.load(f"geneval@{folder}", "cpu")
    assert reward.shortest == make.HEIGHT
    for change, expected in ((lambda entry, rng: entry, 1), (make.miss_by_one, 0)):
        images = []
        for _, entry in lines:
            include = change(entry, rng)["include"]
            objects = make.place(include, make.cells_for(include, rng), rng)
            images.append(make.paint(objects, rng))
        _, values = reward.score(images, *zip(*lines))
        assert values[f"{reward.name}/overall"] == pytest.approx(expected, abs=0.05)


def test_a_short_run_on_scenes_raises_the_score(tmp_path, monkeypatch):
    """GenEval's, of images of the one prompt that is trained on. A prompt of each task is held out,
    and judged by another detector as well."""
    monkeypatch.chdir(tmp_path)
    held_out = (TINY / "scenes/eval.jsonl").read_text().splitlines(keepends=True)
    prompts = (TINY / "scenes/prompts.jsonl").read_text().splitlines(keepends=True)
    pizza = next(line for line in prompts if '"a photo of a white pizza"' in line)
    Path("held_out.jsonl").write_text("".join(held_out[:6]))
    Path("pizza.jsonl").write_text(pizza)
    Path("pizzas.jsonl").write_text(64 * pizza)

    def train_and_read(name, flags):
        flags = f"--preset scenes --name {name} {flags}"
        return read_metrics(crd.train(crd.parse(flags.split())))

    (start,) = train_and_read("start", "--epochs 0 --eval-prompts pizzas.jsonl")
    before, line, *_ = train_and_read(
        "run", "--prompts pizza.jsonl --eval-prompts held_out.jsonl --epochs 4 --lr 3e-3 --seed 2 "
        "--groups 4 --group-size 8 --micro-batch 32 --steps-per-epoch 4 --train-timesteps 3",
    )  # fmt: skip
    flags = "--epochs 0 --lora runs/run/epoch-0004 --eval-prompts pizzas.jsonl"
    (end,) = train_and_read("end", flags)
    assert end["reward"] > start["reward"] + 0.1
    assert line["anchor_loss"] > 0 and "geneval@scenes/overall" in line
    tasks = {f"geneval@scenes/{task}" for task in [*rewards.TASKS, "overall"]}
    assert tasks | {"geneval@judge/overall"} <= before.keys()


@parametrize("name, sign", [("incompressibility", 1), ("compressibility", -1)])
def test_jpeg_rewards_are_the_size_in_1000_bytes(name, sign):
    file = io.BytesIO()
    noise_image().save(file, "JPEG", quality=95)
    size = scores_of(rewards.load(name, "cpu"), [noise_image()]).item()
    assert size == pytest.approx(sign * file.tell() / 1000)


def test_a_weighted_sum_logs_its_parts_unweighted():
    """A negative weight turns its part's range around."""
    reward = rewards.load("compressibility:2, color:-1", "cpu")
    R, values = reward.score([FLAT, FLAT], ["a brown one", "a blue one"], [{}, {}])
    size = -values["compressibility"]
    assert R.tolist() == pytest.approx([-2 * size - 1, -2 * size])
    assert values["color"] == 0.5
    assert reward.range == pytest.approx((-401, -1.2))
    R = torch.tensor([-500.0, -401, -201.1, 0])
    assert_close(rewards.normalize(R, reward.range), torch.tensor([0, 0, 0.5, 1]))


def test_the_weight_of_a_single_reward_counts():
    reward = rewards.load("color:-2", "cpu")
    assert reward.score([FLAT], ["a brown one"], [{}]) == (-2, {"color": 1})
    assert reward.range == (-2, 0)


def test_a_signs_color_is_that_of_most_of_its_pixels():
    image = Image.new("RGB", (64, 32), rewards.SIGN_COLORS["black"])
    image.paste("white", (0, 0, 28, 32))  # the mean is gray
    assert scores_of(rewards.load("color", "cpu"), [image], ["a black sign"]).item() == 1


@parametrize("spec, parsed", [
    (r"ocr@C:\models\tiny-sd3", [("ocr", r"C:\models\tiny-sd3", 1)]),
    ("ocr@/a, b/tiny-sd3:2", [("ocr", "/a, b/tiny-sd3", 2)]),
    ("ocr@/a,b/c,color:-0.5", [("ocr", "/a,b/c", 1), ("color", None, -0.5)]),
    ("color:1e-3, mine.bright", [("color", None, 1e-3), ("mine.bright", None, 1)]),
    ("my.Http@http://127.0.0.1:8000", [("my.Http", "http://127.0.0.1:8000", 1)]),
    ("my.Http@https://a:1@[::1]:80,color:3",
     [("my.Http", "https://a:1@[::1]:80", 1), ("color", None, 3)]),
    ("my.Http@http://gpu7:8000:0.5", [("my.Http", "http://gpu7:8000", 0.5)]),
    ("my.Http@http://gpu7:8000/a/b:2", [("my.Http", "http://gpu7:8000/a/b", 2)]),
])  # fmt: skip
def test_a_path_may_have_commas_colons_and_a_port(spec, parsed):
    assert rewards.parse_spec(spec) == parsed


@parametrize("spec", ["color:0", "compressibility,color:-0.0", "color:1e999", "color@"])
def test_a_weight_that_makes_no_sense_is_refused(spec):
    with pytest.raises(ValueError, match="a weight finite and not 0"):
        rewards.parse_spec(spec)


def test_a_weight_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="no reward is called 'ocr:1.2.3'"):
        rewards.parse_spec("color:.5,ocr:1.2.3")


@pytest.fixture
def own(monkeypatch, tmp_path):
    """own_rewards.py in the working directory, imported anew."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    Path("own_rewards.py").write_text("""
import numpy
import torch
import rewards

class Dark(rewards.Reward):
    name = "dark"
    source = "signs"

    def score_batch(self, images, prompts):
        return [-image.getpixel((0, 0))[0] for image in images]

class Darker(Dark):
    pass

class Nameless(rewards.Reward):
    def score_batch(self, images, prompts):
        return [7] * len(images)

class Usurper(Nameless):
    name = "reward"

class Detailed(rewards.Reward):
    name = "detailed"

    def score_all(self, images, prompts, metadata):
        details = {"tensor": torch.tensor(0.5), "numpy": numpy.float64(0.25), "integer": 3}
        return numpy.ones(len(images)), details

class Other(Detailed):
    name = "other"

class Impostor(Other):
    name = "color"

def shrink(images, prompts, metadata):
    for image in images:
        image.thumbnail((8, 8))
    return [0] * len(images)

def blacken(images, prompts, metadata):
    for image in images:
        image.paste("black", (0, 0, *image.size))
    return [0] * len(images)

def rename(images, prompts, metadata):
    for entry in metadata:
        entry.pop("tags").clear()
    return [0] * len(images)

def shorten(images, prompts, metadata):
    prompts[:] = ["x"] * len(prompts)
    return [0 for _ in iter(lambda: images.pop() if images else None, None)]

def witness(images, prompts, metadata):
    assert prompts == ["p", "q"] and metadata == [{"tags": ["a"]}, {"tags": ["b"]}]
    return [image.width + len(images) for image in images]

bright = lambda images, prompts, metadata: [image.getpixel((0, 0))[0] for image in images]
bright.range = (0, 255)
flat = lambda images, prompts, metadata: [0] * len(images)
flat.range = (1, 1)
falling = lambda images, prompts, metadata: [0] * len(images)
falling.range = (2, 1)
endless = lambda images, prompts, metadata: [0] * len(images)
endless.range = (0, float("inf"))
short = lambda images, prompts, metadata: [0.5]
nan = lambda images, prompts, metadata: [float("nan")] * len(images)
""")


def test_ones_own_reward_is_a_function_or_a_class(own):
    """Logged under its `name`, or as in the spec."""
    reward = rewards.load("own_rewards.bright:2,own_rewards.Dark", "cpu")
    assert reward.range == (0, 511)
    assert reward.score([FLAT], ["a"], [{}]) == (90, {"own_rewards.bright": 90, "dark": -90})
    assert rewards.default_source("own_rewards.Dark") == "signs"
    assert rewards.default_source("color,geneval:-1") == "geneval"
    assert rewards.default_source("ocr,color") == "signs"
    reward = rewards.load("own_rewards.Nameless,own_rewards.bright:0.5", "cpu")
    R, values = reward.score([FLAT], ["a"], [{}])
    assert values == {"own_rewards.Nameless": 7, "own_rewards.bright": 90}
    assert R.item() == 52
    heir = rewards.load("own_rewards.Darker", "cpu")
    assert heir.score([FLAT], ["a"], [{}])[1] == {"own_rewards.Darker": -90}
    with pytest.raises(ValueError, match="Impostor and color: both are logged as color"):
        rewards.check_names("color", "own_rewards.Impostor")


def test_the_readmes_own_reward_works(own):
    code = (Path(crd.__file__).parent / "README.md").read_text()
    code = next(x for x in re.findall(r"```python\n(.*?)```", code, re.S) if "my_rewards" in x)
    Path("own_rewards.py").write_text(code)
    reward = rewards.load("own_rewards.brightness", "cpu")
    R, _ = reward.score([Image.new("RGB", (9, 9), "white"), FLAT], ["a", "b"], [{}, {}])
    assert R[0] == 1 > R[1]


@parametrize("name", ["shrink", "blacken", "rename", "shorten"])
def test_no_reward_changes_what_another_sees(own, name):
    """Be it the images, their list, or the metadata; nor what the run shows afterwards."""
    images = [noise_image(1), noise_image(2)]
    metadata = [{"tags": ["a"]}, {"tags": ["b"]}]
    spec = f"own_rewards.{name},own_rewards.witness,incompressibility"
    _, values = rewards.load(spec, "cpu").score(images, ["p", "q"], metadata)
    assert values["own_rewards.witness"] == 64 + 2
    sizes = rewards.load("incompressibility", "cpu").score(images, ["p", "q"], metadata)
    assert values["incompressibility"] == sizes[1]["incompressibility"]
    assert images == [noise_image(1), noise_image(2)]
    assert metadata == [{"tags": ["a"]}, {"tags": ["b"]}]


def test_details_are_logged_as_floats(own):
    """A run that logged a NumPy number could not be resumed."""
    _, values = rewards.load("own_rewards.Detailed", "cpu").score([FLAT], ["a"], [{}])
    assert values == {"detailed": 1.0, "tensor": 0.5, "numpy": 0.25, "integer": 3.0}
    assert {type(value) for value in values.values()} == {float}


@parametrize("name, value", [
    *((name, 1) for name in "split epoch step images seconds reward loss detailed".split()),
    ("part", float("nan")),
])  # fmt: skip
def test_details_that_cannot_be_logged_are_refused(own, monkeypatch, name, value):
    """As they would overwrite a run's own numbers, or break its curve."""
    reward = rewards.load("own_rewards.Detailed", "cpu")
    monkeypatch.setattr(reward, "score_all", lambda *args: ([1], {name: value}))
    with pytest.raises(RuntimeError, match=f"reward detailed failed: it cannot log .* '{name}'"):
        scores_of(reward, [FLAT])


@parametrize("name, message", [
    ("flat", "its range has to ascend, not go from 1 to 1"), ("falling", "has to ascend"),
    ("endless", "has to ascend"), ("Usurper", "under 'reward' a run logs something else"),
])  # fmt: skip
def test_a_reward_with_a_useless_range_or_name_is_refused(own, name, message):
    with pytest.raises(ValueError, match=f"reward own_rewards.{name}: .*{message}"):
        rewards.load(f"own_rewards.{name}", "cpu")


def test_a_rewards_folder_is_in_its_name(monkeypatch):
    monkeypatch.chdir(TINY)
    assert rewards.load("ocr@.", "cpu").name == "ocr@tiny-sd3"
    assert rewards.load("ocr@judge", "cpu").name == "ocr@judge"


def test_rewards_that_log_one_detail_are_told_apart(own):
    reward = rewards.load("own_rewards.Detailed,own_rewards.Other", "cpu")
    with pytest.raises(ValueError, match="two rewards log {.*tensor.*}"):
        scores_of(reward, [FLAT])


@parametrize("name", ["own_rewards.short", "own_rewards.nan", "color:2,own_rewards.nan"])
def test_a_reward_that_fails_is_named(own, name):
    reward = rewards.load(name, "cpu")
    with pytest.raises(RuntimeError, match=r"^reward own_rewards\.\w+ failed: 2 images got the sc"):
        scores_of(reward, [FLAT] * 2, ["a red one"] * 2)


@parametrize("name", ["beauty", "own_rewards.brigth", "beauty.bright"])
def test_a_reward_that_is_not_there_is_named(own, name):
    with pytest.raises((ValueError, AttributeError, ImportError), match="'(beauty|brigth)'"):
        rewards.load(name, "cpu")


# Prompts


def unquoted(prompt):
    return prompt.split('"')[1].casefold()


def objects(prompt):
    return frozenset(prompt.removeprefix("a photo of ").split(" and "))


@parametrize("source, text", [
    ("signs", unquoted), ("ocr", unquoted), ("animals", str), ("activities", str),
    ("geneval", objects),
])  # fmt: skip
def test_no_evaluation_prompt_is_trained_on(source, text):
    """Nor its word (`signs`), nor its text (`ocr`), nor its objects in another order (`geneval`).
    The seed decides the order in training, and nothing in evaluation."""
    train = some_prompts(source, "train", count=3000)
    held_out = some_prompts(source, "eval")
    assert len(set(held_out)) == len(held_out) > 3
    assert len(held_out) < len(set(train)) / 3  # one in eight, if there are many
    assert len(rewards.prompts(source, "eval")) == 512 or source in ("animals", "activities")
    assert {text(p) for p in train}.isdisjoint({text(p) for p in held_out})
    assert train == some_prompts(source, "train", count=3000)
    assert train != some_prompts(source, "train", seed="0, process 1", count=3000)
    assert held_out == some_prompts(source, "eval", seed=1)


@parametrize("split, exclude", [("test", None), ("eval", "held-out.txt")])
def test_a_split_that_would_be_of_training_prompts_is_refused(split, exclude):
    with pytest.raises(ValueError, match="split is"):
        rewards.prompts("signs", split, exclude=exclude)


def test_each_line_of_a_file_is_for_training_or_for_evaluation(tmp_path):
    """Unless evaluation has a file of its own: then all of it is trained on."""
    source = str(tmp_path / "words.txt")
    words = {f"a {i} b" for i in range(40)}
    Path(source).write_text("\n".join(words))
    held_out = some_prompts(source, "eval")
    assert 0 < len(held_out) < 20
    assert set(some_prompts(source, "train")) == words - set(held_out)
    orders = [some_prompts(source, "train", seed, 20) for seed in (1, 2)]
    assert orders[0] != orders[1] and orders[0] != sorted(orders[0])
    few = rewards.evaluation_prompts(source, 40)  # a short list comes again
    assert [prompt for prompt, _ in few] == (held_out * 40)[:40]
    assert len(rewards.evaluation_prompts("signs", 2, file=source)) == 40


def want(name, count=1, **more):
    return {"class": name, "count": count, **more}


def geneval_line(prompt, tag, *include):
    return json.dumps({"prompt": prompt, "tag": tag, "include": include})


HELD_OUT = [
    geneval_line("a photo of a tie and a bench", "two_object", want("tie"), want("bench")),
    geneval_line("a photo of a skis", "single_object", want("skis")),
    geneval_line("a photo of a cat above a dog", "position", want("dog"),
                 want("cat", position=["above", 0])),
]  # fmt: skip
SAME = [
    geneval_line("a bench, a tie", "two_object", want("bench"), want("tie")),
    "a photo of a bench and a tie", "a photo of a skis",
    geneval_line("a photo of a pair of skis", "single_object", want("skis")),
    geneval_line("a photo of a dog below a cat", "position", want("cat"),
                 want("dog", position=["below", 0])),
]  # fmt: skip
OTHER = [
    geneval_line("a photo of a bench", "single_object", want("bench")),
    geneval_line("a photo of a red tie and a bench", "color_attr", want("tie", color="red"),
                 want("bench", color="blue")),
    geneval_line("a photo of two skis", "counting", want("skis", 2)),
    "a photo of a tie",
]  # fmt: skip


def test_nothing_in_an_evaluation_file_is_trained_on(tmp_path):
    """In any wording and order; all else in a file of training prompts is."""
    held_out, train = (tmp_path / name for name in ("held-out.jsonl", "train.jsonl"))
    held_out.write_text("\n".join(HELD_OUT))
    lines = [x if x[0] == "{" else json.dumps({"prompt": x}) for x in SAME + OTHER]
    train.write_text("\n".join(lines))
    stream = rewards.prompts(str(train), "train", exclude=str(held_out))
    rest = {json.loads(line)["prompt"] for line in lines[len(SAME) :]}
    assert {prompt for prompt, _ in itertools.islice(stream, 40)} == rest
    stream = rewards.prompts(str(held_out), "train", exclude=str(held_out))
    with pytest.raises(ValueError, match="held-out.jsonl has no prompt for train: all of"):
        next(stream)


def test_a_file_is_split_by_objects_not_by_wording(tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = []
    for a, b in itertools.combinations(rewards.CLASSES[:12], 2):
        for x, y in ((a, b), (b, a)):
            lines.append(geneval_line(f"{x}, {y}", "two_object", want(x), want(y)))
    path.write_text("\n".join(lines))
    held_out = {frozenset(prompt.split(", ")) for prompt in some_prompts(str(path), "eval")}
    train = {frozenset(prompt.split(", ")) for prompt in some_prompts(str(path), "train")}
    assert held_out and held_out.isdisjoint(train)


def test_generators_leave_out_an_evaluation_file_and_keep_their_mixture(tmp_path):
    """Here a file of half of what there is to count. If all is left out, nothing can be drawn."""
    path = tmp_path / "held-out.jsonl"
    lines = []
    for name, count in itertools.product(rewards.CLASSES[::2], (2, 3, 4)):
        lines.append(geneval_line(f"{count} of {name}", "counting", want(name, count)))
    path.write_text("\n".join(lines))
    stream = rewards.prompts("geneval", "train", exclude=str(path))
    entries = [entry for _, entry in itertools.islice(stream, 4000)]
    counted = [x["include"][0]["class"] for x in entries if x["tag"] == "counting"]
    assert set(counted) <= set(rewards.CLASSES[1::2])
    assert len(counted) / 4000 == pytest.approx(5 / 17, abs=0.03)
    animals = tmp_path / "animals.txt"
    animals.write_text("\n".join(rewards.phrase(animal) for animal in rewards.ANIMALS))
    with pytest.raises(ValueError, match="nothing of animals is left to train on: see .*txt"):
        next(rewards.prompts("animals", "train", exclude=str(animals)))


def test_fields_of_a_prompt_file_are_metadata(tmp_path):
    """Whatever they are called; null is absent, as data set exports write GenEval's."""
    path = tmp_path / "prompts.jsonl"
    fields = {"include": [{"class": "cat", "color": None}], "exclude": None, "where": "home"}
    path.write_text(json.dumps({"prompt": "a", **fields}))
    metadata = {"include": [{"class": "cat"}], "where": "home", "origin": f"{path}, line 1"}
    assert rewards.read_prompts(path) == [("a", metadata)]
    path.write_text('{"prompt": " a "}', encoding="utf-8-sig")  # as Windows' editors save it
    assert rewards.read_prompts(path) == [("a", {"origin": f"{path}, line 1"})]
    path.write_text(json.dumps({"prompt": "a", "origin": "Paris"}))
    assert rewards.read_prompts(path) == [("a", {"origin": "Paris"})]


# Pictures


def test_only_a_newline_ends_a_line_of_prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("a cat\u2028by a\u0085lake\x0c, dusk\na dog\n")
    found = [prompt for prompt, _ in rewards.read_prompts(tmp_path / "prompts.txt")]
    assert found == ["a cat\u2028by a\u0085lake\x0c, dusk", "a dog"]


@parametrize("line, message", [
    ('{"prompt": "a cat"', "no JSON: Expecting"), ('"a cat"', "no object with a text"),
    ('{"text": "a cat"}', "no object with a text called prompt"), ('{"prompt": null}', "no object"),
    ('{"prompt": 7}', "no object with a text"), ('["a cat"]', "no object with a text"),
])  # fmt: skip
def test_a_line_that_is_no_prompt_is_named(tmp_path, line, message):
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "a dog"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"prompts.jsonl, line 3 is {message}"):
        rewards.read_prompts(file)


@in_both_scripts
def test_another_rewards_py_ahead_on_the_path_is_named(monkeypatch, script):
    """As in a notebook beside which somebody has one."""
    monkeypatch.setitem(sys.modules, "rewards", SimpleNamespace(__file__="their/rewards.py"))
    spec = importlib.util.spec_from_file_location("copy", script.__file__)
    with pytest.raises(ImportError, match="their/rewards.py is not the rewards.py"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_a_contact_sheet_has_each_image_in_its_place(tmp_path):
    images = [Image.new("RGB", (64, 32), (i * 15, 0, 0)) for i in range(16)]
    pairs = [("a", {})] * 16
    rewards.contact_sheet(tmp_path / "sheet.png", images, [0.5] * 16, pairs)
    sheet = Image.open(tmp_path / "sheet.png")
    for i in range(16):  # four in a row, from the left
        corner = (i % 4 * (256 + 8), i // 4 * (128 + 40))
        assert sheet.getpixel((corner[0] + 128, corner[1] + 64)) == (i * 15, 0, 0)
    rewards.contact_sheet(tmp_path / "sheet.png", images[:5], [0.5] * 5, pairs)
    assert Image.open(tmp_path / "sheet.png").size == (4 * (256 + 8), 2 * (128 + 40))


def test_captions_have_two_digits_and_curves_the_points_of_their_split(tmp_path, monkeypatch):
    write, line = Mock(), Mock()
    monkeypatch.setattr(rewards.ImageDraw.ImageDraw, "multiline_text", write)
    monkeypatch.setattr(rewards.ImageDraw.ImageDraw, "line", line)
    rewards.contact_sheet(tmp_path / "sheet.png", [FLAT], [0.256], [("a cat", {})])
    assert write.call_args.args[1] == "0.26  a cat"
    splits = ("eval", "train", "train", "eval")
    lines = [{"split": x, "images": i, "reward": i} for i, x in enumerate(splits)]
    rewards.plot_panel("reward", lines)
    train, evaluations = [call.args[0] for call in line.call_args_list[-2:]]
    assert [round(x) for x, _ in train] == [300, 490]
    assert [round(x) for x, _ in evaluations] == [110, 680]


def test_an_image_of_curves_has_three_panels_in_a_row(tmp_path):
    numbers = dict(reward=0.5, a=0.5, b=1.0, c=2.0, d=3.0)  # reward is a's: no sum
    metrics = [{"split": "eval", "epoch": i, "images": i, **numbers} for i in range(3)]
    rewards.plot_curve(tmp_path / "curve.png", metrics)
    image = Image.open(tmp_path / "curve.png").convert("L")
    assert image.size == (3 * 360, 2 * 240)
    for i in range(6):
        x, y = i % 3 * 360, i // 3 * 240
        is_blank = image.crop((x, y, x + 360, y + 240)).getextrema() == (255, 255)
        assert is_blank == (i >= 4)


def test_a_curve_rises_with_its_numbers():
    lines = []
    for images, reward in ((0, 0.0), (50, 1.0), (100, 1.0)):
        lines.append({"split": "eval", "images": images, "reward": reward})
    panel = rewards.plot_panel("reward", lines).convert("RGB")
    blue = (29, 78, 216)  # of an evaluation
    heights = []
    for x in (115, 400, 670):
        heights.append([y for y in range(480) if panel.getpixel((x, y)) == blue])
    assert min(heights[0]) > max(heights[1]) and max(heights[2]) < 120


# Rewards that are models

TOKENS = ["<image>", "<|image_pad|>"]  # 198 and 199, after the tokens of the toy's tokenizer
SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    vocab_size=200, image_size=32, patch_size=8, hidden_act="gelu", bos_token_id=0, eos_token_id=1,
)  # fmt: skip
CONSTANTS = [
    (rewards.ImageReward, dict(vision=SIZES, text=dict(SIZES, encoder_hidden_size=32))),
    (rewards.VLM, dict(layer=1, max_new_tokens=6)),
    (rewards.UnifiedReward, dict(size=(32, 32), max_new_tokens=6)),
    (rewards.GenEval, dict(shortest=64, longest=96, threshold=0.02)),
]
FOLDERS = {"geneval": "", "aesthetic": "", "vlm": "", "unifiedreward": "qwen"}
PUBLISHED = SimpleNamespace(vision=rewards.ImageReward.vision, text=rewards.ImageReward.text)
CLASSES_CRC = 149322364  # of COCO's 80 classes in their order, as in GenEval's object_names.txt


def test_constants_are_the_published_ones():
    assert PUBLISHED.text["num_attention_heads"] == 12 and PUBLISHED.vision["image_size"] == 224
    assert THRESHOLDS == (0.3, 800, 1333, 40, 512, (512, 512))
    ranges = {name: rewards.REWARDS[name].range for name in ("imagereward", "incompressibility")}
    assert ranges == {"imagereward": (-2, 2), "incompressibility": (0.6, 200)}
    assert rewards.REWARDS["vlm"].source == "activities"
    assert zlib.crc32(" ".join(rewards.CLASSES).encode()) == CLASSES_CRC
    for name, repository, lo, hi in (
        ("clipscore", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", 0, 0.4),
        ("pickscore", "yuvalkirstain/PickScore_v1", 16, 26), ("hpsv2", "xswu/HPSv2", 0.1, 0.4),
    ):  # fmt: skip
        assert rewards.REWARDS[name].weights == repository
        assert rewards.REWARDS[name].range == (lo, hi)


THRESHOLDS = (rewards.GenEval.threshold, rewards.GenEval.shortest, rewards.GenEval.longest)
THRESHOLDS += (rewards.VLM.layer, rewards.UnifiedReward.max_new_tokens, rewards.UnifiedReward.size)
NEAR = {"rtol": 1e-3, "atol": 1e-4}


def shaken(model):
    """With weights large enough for inputs to matter."""
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, 0, 0.3)
    return model.eval()


def small_models():
    """{folder: model}, each with the tokenizer and the image processor of CLIP."""
    towers = {"vision_config": SIZES, "text_config": SIZES}
    vision = transformers.CLIPVisionConfig(**SIZES)
    text = transformers.LlamaConfig(**SIZES, pad_token_id=1)
    llava = transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_index=198)
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    qwen = transformers.Qwen2_5_VLConfig(
        image_token_id=199,
        vision_config=SIZES | dict(depth=2, num_heads=2, out_hidden_size=32),
        text_config=SIZES | dict(num_key_value_heads=2, pad_token_id=1, rope_parameters=rope),
    )
    swin = transformers.SwinConfig(embed_dim=8, num_heads=[1] * 4, out_indices=[1, 2, 3, 4])
    mask2former = transformers.Mask2FormerConfig(
        backbone_config=swin, feature_size=32, mask_feature_size=32, hidden_dim=32, num_labels=80,
        encoder_layers=1, decoder_layers=2, num_queries=12,
    )  # fmt: skip
    return {
        "clip": transformers.CLIPModel(transformers.CLIPConfig(projection_dim=24, **towers)),
        "llava": transformers.LlavaForConditionalGeneration(llava),
        "deberta": transformers.DebertaModel(transformers.DebertaConfig(**SIZES)),
        "qwen": transformers.Qwen2_5_VLForConditionalGeneration(qwen),
        "detector": rewards.Mask2Former(mask2former),
    }


def openclip():
    """OpenCLIP made of torch's own layers."""
    nn = torch.nn
    model = nn.Module()
    model.visual = visual = nn.Module()
    for tower, length in ((model, 77), (visual, 17)):
        layer = nn.TransformerEncoderLayer(32, 2, 48, 0, "gelu", batch_first=True, norm_first=True)
        tower.transformer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        tower.positional_embedding = nn.Parameter(torch.zeros(length, 32))
    model.token_embedding = nn.Embedding(200, 32)
    model.ln_final, visual.ln_pre, visual.ln_post = (nn.LayerNorm(32) for _ in range(3))
    model.text_projection, visual.proj = (nn.Parameter(torch.zeros(32, 24)) for _ in range(2))
    model.logit_scale = nn.Parameter(torch.zeros(()))
    visual.conv1 = nn.Conv2d(3, 32, 8, 8, bias=False)
    visual.class_embedding = nn.Parameter(torch.zeros(32))
    torch.manual_seed(0)
    for weight in model.parameters():
        nn.init.normal_(weight, 0, 0.3)
    return model.eval()


OPENCLIP = "layers:resblocks self_attn:attn norm:ln_ linear1:mlp.c_fc linear2:mlp.c_proj"
IMAGEREWARD = """vision.encoder.layers:vision.blocks self_attn.qkv:attn.qkv
self_attn.projection:attn.proj post_layernorm:norm layer_norm:norm
vision.embeddings.class_embedding:vision.cls_token
vision.embeddings.position_embedding:vision.pos_embed
vision.embeddings.patch_embedding:vision.patch_embed.proj
vision.:blip.visual_encoder. text.:blip.text_encoder. head.:mlp.layers."""


def renamed(model, names):
    """Its state dict, with the names of the published file."""
    pairs = [pair.split(":") for pair in names.split()]
    tensors = {}
    for key, tensor in model.state_dict().items():
        for ours, theirs in pairs:
            key = key.replace(ours, theirs)
        tensors[key] = tensor
    return tensors


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """small(name): a reward, with a small model of its kind and its constants scaled down."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY / "tokenizer")  # a token a letter
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    for folder, model in small_models().items():
        for part in (shaken(model), tokenizer, processor):
            part.save_pretrained(root / folder)
    transformers.Qwen2VLImageProcessorPil(patch_size=8).save_pretrained(root / "qwen")
    torch.save({"state_dict": renamed(openclip(), OPENCLIP)}, root / "clip/HPS_v2.1_compressed.pt")
    (root / "head").mkdir()
    head = shaken(rewards.score_head(24)).state_dict()
    torch.save(head, root / "head/aesthetic-model.pth")
    with pytest.MonkeyPatch.context() as patch:
        for reward, constants in CONSTANTS:
            for name, value in constants.items():
                patch.setattr(reward, name, value)
        blip = renamed(shaken(rewards.ImageReward.build(rewards.ImageReward)), IMAGEREWARD)
        blip["blip.text_proj.weight"] = torch.zeros(2)  # unused
        torch.save(blip, root / "clip/ImageReward.pt")
        yield lambda name: rewards.load(f"{name}@{root / FOLDERS.get(name, 'clip')}", "cpu")


IMAGES = [
    noise_image(1), noise_image(2, (40, 40)), noise_image(3, (3, 2)), noise_image(4, (1, 5000)),
    noise_image(5, (33, 90)).convert("L"), noise_image(6, (50, 20)).convert("RGBA"), FLAT,
]  # fmt: skip
TEXTS = ["two cats", "", "<|image_pad|>", "\u732b\u3068\u72ac", "red bird " * 60, "{brace}", " "]
FORKS = [1, 2, 3, 7, 6, 3, 10]  # mostly as many as the small detector sees
ENTRIES = []
for count, color in zip(FORKS, rewards.COLORS):
    wanted = {"class": "fork", "count": count, "color": color}
    ENTRIES.append({"tag": "colors", "include": [wanted]})
MODELS = "clipscore pickscore hpsv2 aesthetic imagereward vlm unifiedreward geneval"


@parametrize("name", MODELS.split())
def test_models_score_any_image_and_any_text_whatever_is_beside_it(small, monkeypatch, name):
    def checksum(reply):  # for the small model's gibberish
        return 1 + zlib.crc32(reply.encode()) % 4001 / 1000

    monkeypatch.setattr(rewards, "final_score", checksum)
    reward = small(name)
    scores = reward(IMAGES, TEXTS, ENTRIES)
    assert scores.unique().numel() > 1
    for rows in ([3], [3, 0, 6, 1, 5, 2, 4]):
        batch = [[items[i] for i in rows] for items in (IMAGES, TEXTS, ENTRIES)]
        assert_close(reward(*batch), scores[rows], **NEAR)
    reward.batch = 2
    assert_close(reward(IMAGES, TEXTS, ENTRIES), scores, **NEAR)
    crossed = reward(IMAGES, TEXTS[1:] + TEXTS[:1], ENTRIES[1:] + ENTRIES[:1])
    assert torch.allclose(crossed, scores, **NEAR) == (name == "aesthetic")


@parametrize(
    "size, place",
    [((48, 96), (slice(None), slice(None), slice(8, 24))), ((96, 48), (slice(None), slice(8, 24)))],
)
def test_hpsv2_computes_openclips_cosine(small, size, place):
    """Of the whole image with black bars, in OpenAI's colors, and of the text in plain quotes."""
    reward = small("hpsv2")
    model = openclip()
    visual = model.visual
    image = noise_image(0, size)
    pixels = torch.zeros(3, 32, 32)
    numbers = rewards.to_pixels(image, CPU)[None] / 255
    small_size = pixels[place].shape[1:]
    options = dict(mode="bicubic", antialias=True)
    pixels[place] = torch.nn.functional.interpolate(numbers, small_size, **options)[0]
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
    pixels = (pixels - mean) / std
    ids = reward.clip.tokenizer(['a cat\'s "t" & t'], return_tensors="pt").input_ids
    length = ids.shape[1]
    with torch.no_grad():
        x = visual.conv1(pixels[None]).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(1, 1, 32), x], 1)
        x = visual.transformer(visual.ln_pre(x + visual.positional_embedding))
        x = visual.ln_post(x[:, 0]) @ visual.proj
        y = model.token_embedding(ids) + model.positional_embedding[:length]
        y = model.transformer(y, torch.full((length, length), -math.inf).triu(1))
        y = model.ln_final(y[:, -1]) @ model.text_projection
    expected = torch.cosine_similarity(x, y)
    assert_close(scores_of(reward, [image], ["a cat’s “t” &amp; t"]), expected, **NEAR)


@parametrize("size, corner", [((35, 32), (2, 0)), ((33, 32), (0, 0)), ((32, 39), (0, 4))])
def test_a_square_is_cut_out_as_by_torchvision(size, corner):
    """Half a pixel goes to the even side; transformers always starts below it."""
    image = noise_image(0, size)
    x, y = corner
    square = image.crop((x, y, x + 32, y + 32))
    assert rewards.center_square(image, 32).tobytes() == square.tobytes()


def test_clip_sees_the_center_and_pickscore_is_over_the_temperature(small):
    image = noise_image(0, (300, 240))
    center = image.resize((40, 32), Image.BICUBIC).crop((4, 0, 36, 32))
    cosines = scores_of(small("clipscore"), [image, center])
    assert_close(cosines[0], cosines[1], **NEAR)
    reward = small("pickscore")
    scale = reward.clip.model.logit_scale.exp().detach()
    assert_close(scores_of(reward, [image, center]), scale * cosines, **NEAR)


def test_score_head_has_the_published_keys():
    """Dropouts count."""
    weights = {key for key in rewards.score_head(768).state_dict() if key.endswith("weight")}
    assert weights == {"0.weight", "2.weight", "4.weight", "6.weight", "7.weight"}


@parametrize("name", ["clipscore", "pickscore"])
def test_weights_come_from_their_own_repository_and_settings_from_vit_h(monkeypatch, name):
    places = {}
    monkeypatch.setattr(rewards, "load_model", lambda _, place, *args: places.update(model=place))
    monkeypatch.setattr(rewards, "CLIP", lambda place, *args: places.update(clip=place))
    rewards.load(name, "cpu")
    assert places["model"]["pretrained_model_name_or_path"] == rewards.REWARDS[name].weights
    assert places["clip"]["pretrained_model_name_or_path"] == rewards.CLIPScore.weights


def test_imagereward_has_the_published_sizes():
    with torch.device("meta"):
        state = renamed(rewards.ImageReward.build(PUBLISHED), IMAGEREWARD)
    key = "blip.text_encoder.encoder.layer.11.crossattention.self.key.weight"
    assert state[key].shape == (768, 1024)
    assert state["blip.text_encoder.embeddings.word_embeddings.weight"].shape == (30524, 768)
    assert state["blip.visual_encoder.pos_embed"].shape == (1, 197, 1024)
    assert "blip.visual_encoder.blocks.23.norm2.bias" in state


@parametrize("prompt", ["a cat", "a cat and a dog on a mat in a hall full of hats"])
def test_imagereward_is_the_heads_score_of_the_first_vector_standardized(small, prompt):
    """It reads 35 tokens: a letter each, a start and an end."""
    reward = small("imagereward")
    ids = reward.tokenizer([prompt], return_tensors="pt").input_ids
    ids = torch.cat([ids[:, :-1][:, :34], ids[:, -1:]], 1)
    pixels = rewards.clip_pixels(reward.processor, IMAGES[:1])
    with torch.no_grad():
        image = reward.model["vision"](pixels).last_hidden_state
        states = reward.model["text"](ids, encoder_hidden_states=image).last_hidden_state
        score = reward.model["head"](states[:, 0])[0]
    expected = (score - 0.16717363) / 1.03333949
    assert_close(scores_of(reward, IMAGES[:1], [prompt]), expected, rtol=1e-5, atol=0)


def test_aesthetic_is_the_heads_score_of_the_unit_vector(small):
    reward = small("aesthetic")
    with torch.no_grad():
        pixels = rewards.clip_pixels(reward.clip.processor, IMAGES[:2])
        vectors = reward.clip.model.get_image_features(pixels).pooler_output
        expected = reward.head(vectors / vectors.norm(dim=1, keepdim=True)).squeeze(1)
    assert_close(scores_of(reward, IMAGES[:2]), expected, rtol=1e-4, atol=1e-4)


def test_models_compute_in_float32_whatever_their_file_holds():
    """The toy's are stored in float16."""
    assert rewards.load(f"clipscore@{TINY}/clip", "cpu").clip.model.dtype == torch.float32


def test_a_second_answer_is_sampled(small, monkeypatch):
    reward = small("unifiedreward")
    generate = Mock(wraps=reward.model.generate)
    monkeypatch.setattr(reward.model, "generate", generate)
    for do_sample in (False, True):
        reward.ask(IMAGES[:1], ["a cat?"], do_sample=do_sample)
        options = generate.call_args.kwargs
        assert options["do_sample"] is do_sample
        assert options.get("temperature") == (1.0 if do_sample else None)


def test_imagereward_sees_clips_colors(small):
    assert small("imagereward").processor.image_mean == pytest.approx(
        (0.481, 0.458, 0.408), abs=1e-3
    )


def test_weights_that_would_run_code_are_refused(small, tmp_path):
    small("hpsv2").clip.model.config.save_pretrained(tmp_path)
    torch.save({"logit_scale": os.mkdir}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(Exception, match="Weights only"):
        rewards.load(f"hpsv2@{tmp_path}", "cpu")


def test_a_model_that_lacks_a_tensor_is_refused(small, tmp_path):
    model = small("clipscore").clip.model
    state = model.state_dict()
    del state["logit_scale"]
    model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 1 of the model's tensors: \['logit_scale'\]"):
        rewards.load(f"clipscore@{tmp_path}", "cpu")


X = [1, 0]
Y = [0, 1]
END = [-1, -1]


@parametrize("candidate, reference, recall", [
    ([X, Y], [X, Y], 1), ([X], [X, Y], 0.5), ([X, Y], [X], 1), ([[5, 0]], [[0.6, 0.8]], 0.6),
    ([Y, [3, 4]], [X, [4, 3]], (0.6 + 0.96) / 2), ([], [X], 0), ([X], [X, END], 1),
    ([X], [], 0), ([X], [[-0.352, 0.936]], -0.352),
])  # fmt: skip
def test_each_token_of_the_reference_finds_its_nearest(candidate, reference, recall):
    """What the candidate says besides is free; its ends may be the nearest, as in bert_score."""
    candidate, reference = (torch.tensor([END, *x, END]).float() for x in (candidate, reference))
    assert rewards.bertscore_recall(candidate, reference) == pytest.approx(recall)


def test_vlm_asks_what_is_in_the_image_and_looks_for_the_prompt_in_the_answer(small):
    """By the vectors of a middle layer."""
    reward = small("vlm")
    reward.ask = Mock(return_value=["The image contains a cat", "A dog", ""])
    scores = scores_of(reward, IMAGES[:3], ["a cat"] * 3)
    question = "Answer concisely: what is going on in this image?"
    reward.ask.assert_called_once_with(IMAGES[:3], [question] * 3)
    folder = reward.words.name_or_path
    deberta = transformers.DebertaModel.from_pretrained(folder, subfolder="deberta").eval()
    vectors = []
    with torch.no_grad():
        for text in ("A dog", "The image contains a cat"):
            tokens = reward.words(text, return_tensors="pt")
            vectors.append(deberta(**tokens, output_hidden_states=True).hidden_states[1][0])
    expected = torch.tensor([1, rewards.bertscore_recall(*vectors), 0])
    assert_close(scores, expected, **NEAR)


@parametrize("reply, score", [
    ("Final Score: **3.75**", 3.75), ("cat: 1\nFinal Score:\n2.5.", 2.5), ("FINAL SCORE: 4", 4),
    ("Final Score: 2 no, Final Score: 5", 5), ("**Final Score:** [4]/5", 4), ("4", None),
    ("Final Score: good", None), ("Final Score: 6", None), ("Final Score: -3", None),
    ("Final Score (1 to 5): 3", None), ("Final Score: 1 to 5. I give 4", None),
    ("Final Score: N/A. The image has 3 dogs", None), ("Final Score: (1 to 5) 4", 4),
    ("Final Score: 4 out of 5, for 2 cats", 4), ("Final Score: 4.5-5", 4.5),
    ("Final Score: 4 - 2 of 3 cats are missing", 4), ("Final Score: 1-5: 2", 2),
])  # fmt: skip
def test_the_score_is_the_number_after_final_score(reply, score):
    assert rewards.final_score(reply) == score


def test_unifiedreward_asks_once_more_about_an_image_without_a_score(small):
    """Sampled, or a resumed run would replay the reply; after two without a score it fails."""
    reward = small("unifiedreward")
    first = ["Final Score: 5", "well", "Final Score: 4"]
    reward.ask = Mock(side_effect=[first, ["Final Score: 2"], ["no"], ["no"]])
    assert scores_of(reward, IMAGES[:3], ["a dog", "a cat", "a bird"]).tolist() == [5, 2, 4]
    images, (question,) = reward.ask.call_args.args
    assert images == [IMAGES[1]]
    assert "Text Caption: [a cat]" in question
    assert reward.ask.call_args.kwargs == {"do_sample": True}
    with pytest.raises(RuntimeError, match="failed: .* two replies, 'no'$"):
        scores_of(reward, IMAGES[:1])


# GenEval

PLACES = {"": (40, 40, 60, 60), "left": (0, 40, 20, 60), "right": (80, 40, 99, 60)}


def detected(words):
    """{class: [Detection]} from words `class:place:color`, best first."""
    objects = {}
    for word in words.split():
        name, place, color = (word + "::").split(":")[:3]
        detection = rewards.Detection(0.9, PLACES[place], color=color or None)
        objects.setdefault(name, []).append(detection)
    return objects


CAT = [want("cat")]
BOTH = [want("cat"), want("dog")]
CATS = [want("cat", 3)]
RED = [want("cat", color="red")]
PAIR = [want("cat", color="red"), want("dog", color="blue")]
LEFT = [want("dog"), want("cat", position=["left of", 0])]
RED_LEFT = [want("dog"), want("cat", color="red", position=["left of", 0])]


@parametrize("include, words, strict, credit", [
    (CAT, "", False, 0), (CAT, "cat cat cat cat", True, -2),
    (BOTH, "cat", False, 1 / 2), (BOTH, "cat dog", True, 1),
    (CATS, "cat cat", False, 2 / 3), (CATS, "cat cat cat", True, 1),
    (CATS, "cat cat cat cat", False, 2 / 3), (PAIR, "cat::blue dog::red", False, 1 / 2),
    (RED, "cat::red", True, 1), (RED, "cat::blue", False, 1 / 2),
    (RED, "cat::red cat::blue", True, 0), (RED, "cat::blue cat::red", False, 0),
    (LEFT, "", False, 0), (LEFT, "cat dog:right", True, 1),
    (LEFT, "cat", False, 1 / 3), (LEFT, "cat:right dog:left", False, 2 / 3),
    (LEFT, "cat cat:right dog:right", True, 1 / 3), (LEFT, "cat dog:left dog:right", False, 1 / 3),
    (RED_LEFT, "cat::red dog:right", True, 1), (RED_LEFT, "cat::blue dog:right", False, 2 / 3),
    (RED_LEFT, "cat:right:red dog:left", False, 3 / 4),
])  # fmt: skip
def test_genevals_verdicts(include, words, strict, credit):
    """Strict as the benchmark, which minds too many only in counting; partial for training."""
    entry = {"include": include, "exclude": [want("cat", 4)] if include is CATS else []}
    assert rewards.strict_verdict(detected(words), entry) is strict
    assert rewards.partial_credit(detected(words), entry) == pytest.approx(credit)


@parametrize("box, found", [
    ((0, 40, 20, 60), {"left of"}), ((40, 0, 60, 20), {"above"}), ((40, 80, 60, 100), {"below"}),
    ((0, 0, 20, 20), {"left of", "above"}), ((40, 40, 60, 60), set()),
    ((80, 52, 100, 72), {"right of"}), ((50, 40, 70, 60), {"right of"}),
    ((47, 40, 67, 60), set()),  # 3 of 7 are left
    ((40, 50, 60, 70), {"below"}), ((40, 47, 60, 67), set()), ((40, 33, 60, 53), set()),
    ((40, 30, 60, 50), {"above"}), ((52, 80, 72, 100), {"below"}),
])  # fmt: skip
def test_positions_are_those_of_centers_outside_a_dead_zone(box, found):
    assert rewards.relations(box, (40, 40, 60, 60)) == found


def test_a_query_that_is_sure_of_no_object_is_none():
    """However likely one class is beside the others."""
    logits = torch.full((1, 81), -5.0)
    logits[0, 15] = 3.0  # a cat
    masks = torch.full((1, 8, 8), 9.0)
    assert list(rewards.instances(logits, masks, (8, 8), 0.3)) == ["cat"]
    logits[0, -1] = 9.0
    assert rewards.instances(logits, masks, (8, 8), 0.3) == {}


def test_a_detections_score_is_class_times_mean_mask_probability(small):
    """Here of two cats, a dog, hardly, and a query for nothing. Counting needs surer ones."""
    classes = torch.full((4, 81), -9.0)
    classes[0, 15] = classes[1, 15] = classes[3, 80] = 9.0
    classes[2, 16] = -8.0
    masks = torch.full((4, 8, 16), -9.0)
    masks[0, 2:4, 3:7] = 1.0
    masks[1, 5:8, 10:16] = 9.0
    objects = rewards.instances(classes, masks, (8, 16), 0.3)
    sure, other = objects.pop("cat")
    assert not any(objects.values())
    assert sure.box == (10, 5, 16, 8)
    assert sure.mask.sum() == 18
    assert other.box == (3, 2, 7, 4)
    assert other.score == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-3)
    assert not any(rewards.instances(classes, masks - 20, (8, 16), 0.3).values())  # empty masks
    reward = small("geneval")
    reward.logits = lambda pixels: [(classes, masks)]
    for tag, count in (("single_object", 2), ("counting", 1)):
        entry = {"tag": tag, "include": [want("dog")]}
        assert len(reward.detect([noise_image(size=(16, 8))], [entry])[0]["cat"]) == count
    many = rewards.instances(classes[[1] * 20], masks[[1] * 20], (16, 32), 0.3)["cat"]
    assert len(many) == 16
    assert many[0].mask.shape == (16, 32)
    classes[0, 16] = 9.0  # one query may be of two classes
    assert rewards.instances(classes, masks, (8, 16), 0.3)["dog"]


def test_genevals_detector_sees_the_image_in_imagenets_colors(small):
    """Its shorter side as long as said, or the longer one; in multiples of 32."""
    reward = small("geneval")
    reward.shortest, reward.longest = 64, 96
    reward.logits = Mock(return_value=[(torch.zeros(1, 81), torch.zeros(1, 8, 8))])
    for size, (width, height) in (((40, 40), (64, 64)), ((20, 60), (32, 96)), ((58, 40), (96, 64))):
        reward.detect([Image.new("RGB", size, (255, 128, 0))], [{"tag": "colors", "include": []}])
        (pixels,) = reward.logits.call_args.args[0]
        assert pixels.shape == (3, height, width)
        color = torch.tensor([(1 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, -0.406 / 0.225])
        assert_close(pixels.mean((1, 2)), color)


def test_masks_are_enlarged_to_the_detectors_input_and_then_to_the_image(small):
    """As in mmdet; in one step, the edge is elsewhere."""
    classes = torch.full((1, 81), -9.0)
    classes[0, 15] = 9.0
    masks = 4 * randn(1, 8, 16)
    expected = masks[None]
    for size in ((64, 128), (20, 40)):
        expected = torch.nn.functional.interpolate(expected, size, mode="bilinear")
    reward = small("geneval")
    reward.shortest, reward.longest = 64, 128
    reward.logits = lambda pixels: [(classes, masks)]
    (objects,) = reward.detect([noise_image(size=(40, 20))], [{"tag": "colors", "include": []}])
    assert torch.equal(objects["cat"][0].mask, expected[0, 0] > 0)


def test_an_objects_color_is_that_of_its_pixels_on_gray(small):
    """Here, to CLIP, a text is its color, and an image that of its second pixel."""
    reward = small("geneval")

    def texts(texts):
        assert all(text.startswith("a photo of ") for text in texts)
        words = [re.search(f" ({'|'.join(rewards.COLORS)})", text)[1] for text in texts]
        return torch.eye(10)[[rewards.COLORS.index(word) for word in words]]

    def images(crops):
        assert {crop.size for crop in crops} == {(4, 4)}
        assert {crop.getpixel((0, 0)) for crop in crops} == {(153, 153, 153)}
        return torch.eye(10)[[0 if crop.getpixel((1, 0))[0] else 4 for crop in crops]]

    reward.clip = SimpleNamespace(texts=texts, images=images, side=4)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:6, 3:5] = True
    for color in ("red", "blue"):
        cats = [rewards.Detection(1.0, (2, 2, 6, 6), mask) for _ in range(2)]
        reward.name_colors(Image.new("RGB", (8, 8), color), "cat", cats)
        assert [cat.color for cat in cats] == [color, color]


def test_a_class_whose_detections_are_all_too_weak_has_no_color(small, monkeypatch):
    """A mask can lower a score below the threshold: then nothing of the class is left."""
    reward = small("geneval")
    monkeypatch.setattr(rewards, "instances", lambda *args: {"cat": []})
    entry = {"tag": "colors", "include": [{"class": "cat", "count": 1, "color": "red"}]}
    R, values = reward.score([FLAT], ["a photo of a red cat"], [entry])
    assert R.item() == 0 and values[f"{reward.name}/colors"] == 0


def test_a_color_is_the_direction_of_its_three_texts_mean(small):
    """Red's texts differ, so that their mean is short: it counts all the same."""
    reward = small("geneval")
    X, Y = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 1.0, 0.0])

    def texts(texts):
        red = [(X + a * Y) / (X + a * Y).norm() for a in (9.0, 0.0, -9.0)]
        return torch.stack(red + [(0.6 * X + Y) / (0.6 * X + Y).norm()] * 27)

    images = lambda crops: X.expand(len(crops), 3)  # noqa: E731
    reward.clip = SimpleNamespace(texts=texts, images=images, side=8)
    cats = [rewards.Detection(1.0, (0, 0, 8, 8), torch.ones(8, 8, dtype=torch.bool))]
    reward.name_colors(Image.new("RGB", (8, 8)), "cat", cats)
    assert cats[0].color == "red"


def test_geneval_logs_the_share_of_strict_verdicts_and_their_mean_over_tasks(small):
    reward = small("geneval")
    found = [detected(words) for words in ("cat cat cat", "cat", "cat dog")]
    reward.detect = lambda images, metadata: found
    cats = {"tag": "counting", "include": CATS}
    metadata = [cats, cats, {"tag": "two_object", "include": BOTH}]
    R, values = reward.score(IMAGES[:3], TEXTS[:3], metadata)
    assert R.tolist() == pytest.approx([1, 1 / 3, 1])
    shares = {"/counting": 0.5, "/two_object": 1, "/overall": 0.75, "": 7 / 9}
    assert values == pytest.approx({reward.name + key: share for key, share in shares.items()})


@parametrize("wrong", [{"color": "mauve"}, {"position": ["left of", 0]}, {"class": "cats"}])
def test_metadata_that_geneval_cannot_score_is_refused(wrong):
    for include, exclude in (([{**want("cat"), **wrong}], []), (CAT, [{**want("cat"), **wrong}])):
        metadata = {"tag": "colors", "include": include, "exclude": exclude}
        if exclude and "position" in wrong:
            continue  # of an earlier object, which there is
        with pytest.raises(ValueError, match="geneval cannot score 'a cat'"):
            rewards.GenEval.check("a cat", metadata)


def test_genevals_prompts_say_what_their_metadata_says():
    """They reach every class, and are English: for evaluation all tasks in turn, for training in
    Flow-GRPO's mixture."""
    held_out = rewards.prompts("geneval", "eval")
    assert [entry["tag"] for _, entry in held_out[:6]] == list(rewards.TASKS)
    pairs = list(itertools.islice(rewards.prompts("geneval", "train"), 4000))
    for task, share in zip(rewards.TASKS, (0, 1, 5, 1, 7, 3)):
        found = sum(entry["tag"] == task for _, entry in pairs) / len(pairs)
        assert found == pytest.approx(share / 17, abs=0.03)
    assert {entry["include"][0]["class"] for _, entry in pairs} == set(rewards.CLASSES)
    for prompt, entry in pairs + held_out:
        rewards.GenEval.check(prompt, entry)
        wanted = entry["include"][-1]
        number = ["a", "two", "three", "four"][wanted["count"] - 1]
        assert re.search(f"{number}.*{wanted.get('color', '')}", prompt)
        if entry["tag"] == "position":
            assert f"{wanted['class']} {wanted['position'][0]} a" in prompt
        if entry["tag"] == "counting":
            assert entry["exclude"] == [want(wanted["class"], wanted["count"] + 1)]
    counts = {x["include"][0]["count"] for _, x in pairs if x["tag"] == "counting"}
    assert counts == {2, 3, 4}
    colored = [x for _, entry in pairs for x in entry["include"] if "color" in x]
    assert "person" not in {x["class"] for x in colored}
    assert rewards.phrase("bench", 2) == "two benches"
    assert rewards.phrase("wine glass", 3) == "three wine glasses"
    assert rewards.phrase("umbrella") == "an umbrella"
    assert rewards.phrase("apple", color="red") == "a red apple"
    assert rewards.phrase("car", color="orange") == "an orange car"
    assert rewards.phrase("skis", 2) == "two pairs of skis"


# The evidence


@pytest.fixture
def results(monkeypatch):
    return importlib.import_module("results")


def test_every_experiment_is_one_that_its_script_would_run(results):
    scripts = {"crd": crd, "ddpo": ddpo, "rwr": rwr}
    assert scripts.keys() == results.SCRIPTS.keys()
    assert all((TINY.parent / path).exists() for path in results.SCRIPTS.values())
    for name, script, epochs, flags in results.jobs():
        args = scripts[script].parse(f"--preset tiny --epochs {epochs} {flags}".split())
        if script == "crd":
            assert args.groups % args.steps_per_epoch == args.micro_batch % args.group_size == 0
        else:
            assert args.images % args.updates == args.images % args.group_size == 0
            assert (args.algorithm == "sf") == (args.updates == 1)


def test_a_table_has_the_images_that_crds_solver_drew_with_ddpos_loras(
    results, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "is-guided-0"
    folder.mkdir(parents=True)
    args = ddpo.parse("--preset tiny --guidance 4".split())
    (folder / "args.json").write_text(json.dumps(vars(args)))
    none = {"epoch": 0, "step": 0, "images": 0, "seconds": 0.0}
    counters = {"epoch": 48, "step": 192, "images": 9216, "seconds": 500.0}
    lines = [{"split": "eval", "reward": 0.6} | none, {"split": "train"} | counters]
    lines.append({"split": "eval", "reward": 0.8} | counters)
    lines.append({"split": "eval"} | counters | {"epoch": 40})  # whose LoRA is not there
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for epoch in ("epoch-0000", "epoch-0048"):
        (folder / epoch).mkdir()
        (folder / epoch / LORA).touch()

    drawn = []

    def draw(name, script, flags):
        drawn.append(crd.parse(flags.split()))
        evaluation = tmp_path / "runs" / drawn[-1].name
        evaluation.mkdir()
        line = {"split": "eval", "reward": 0.7} | none
        (evaluation / "metrics.jsonl").write_text(json.dumps(line))

    assert not results.evaluations(results.read_log("is-guided-0"))
    monkeypatch.setattr(results, "execute", draw)
    results.run("is-guided-0", "ddpo", 48, "")
    assert [x.lora[-10:] for x in drawn] == ["epoch-0000", "epoch-0048"]
    assert {(x.epochs, x.eval_guidance, x.reward) for x in drawn} == {(0, 4.0, args.reward)}
    line = results.evaluations(results.read_log("is-guided-0"))[48]
    assert line == {"split": "eval", "reward": 0.7} | counters
    own = results.evaluations(results.read_log("is-guided-0", own_sampler=True))
    assert own[48]["reward"] == 0.8


def test_no_table_has_a_number_that_the_archived_runs_do_not_give(
    results, monkeypatch, tmp_path, capsys
):
    here = Path(crd.__file__).parent
    with tarfile.open(here / results.ASSETS / "runs.tgz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    assert not any(results.undrawn(name, script) for name, script, _, _ in results.jobs())
    for title, (rows, column) in results.TABLES.items():
        results.print_table(title, rows, column)
    printed = capsys.readouterr().out
    page = (TINY / "RESULTS.md").read_text()
    rows = [line for line in page.splitlines() if re.match(r"\| `\S+` \| \d* \|", line)]
    assert len(rows) > 20
    assert not set(rows) - set(printed.splitlines())
    readme = (here / "README.md").read_text()
    rows = re.findall(r"^\|.*?\| (0\.\d{3}.*\|)$", readme, re.M)
    assert len(rows) == 7
    assert all(row in printed for row in rows)
    assert not set(re.findall(r"\b0\.\d{3}\b", readme)) - set(re.findall(r"\b0\.\d{3}\b", printed))


def count_tflop(function):
    """TFLOP of a function's matrix products and convolutions."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops() / 1e12


def count_passes(network, script, targets, *inputs):
    """TFLOP of a pass without gradient, and of a checkpointed forward and backward pass."""
    script.add_lora(network, targets, 32, 64, script.ADAPTERS)
    network.enable_gradient_checkpointing(script.checkpoint)
    with torch.no_grad():
        forward = count_tflop(lambda: network(*inputs))
    return forward, count_tflop(lambda: network(*inputs)[0].sum().backward())


def sd35_medium():
    """Stable Diffusion 3.5 Medium's transformer, at its true size."""
    return diffusers.SD3Transformer2DModel(
        num_layers=24, num_attention_heads=24, caption_projection_dim=1536,
        pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
    )  # fmt: skip


def large_vae(channels):
    return diffusers.AutoencoderKL(
        latent_channels=channels, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip


def count_large_models():
    """SD 3.5 Medium's and SD 1.4's passes and the VAE's, for one image of 512 px, on the models'
    true sizes, without weights."""
    latents = torch.empty(1, 16, 64, 64)
    small = torch.empty(1, 4, 64, 64)
    inputs = (latents, torch.empty(1, 77 + 128, 4096), torch.empty(1, 2048), torch.empty(1))
    sd3_passes = count_passes(sd35_medium(), crd, crd.TARGET_MODULES, *inputs, None, None, False)
    unet = diffusers.UNet2DConditionModel(cross_attention_dim=768)
    inputs = (small, torch.empty(1), torch.empty(1, 77, 768))
    unet_passes = count_passes(unet, ddpo, ddpo.StableDiffusion.target_modules, *inputs)
    vae = large_vae(4)
    with torch.no_grad():
        return *sd3_passes, *unet_passes, count_tflop(lambda: vae.decode(small))


def test_the_pages_say_what_the_large_runs_compute():
    """Text encoders and rewards are left out."""
    with torch.device("meta"):
        forward, train, unet_forward, unet_train, decode = count_large_models()
    commands = {}
    for flags in ("--reward ocr", "--reward ocr --groups 12 --train-timesteps 4"):
        args = crd.parse(flags.split())
        sigma = train + forward + 2 * forward  # the policy, `old`, the guided reference
        tflop = args.rollout_steps * forward + decode + args.train_timesteps * sigma
        commands[f"crd.py {flags}"] = (tflop, args.groups * args.group_size, args.epochs)
    args = ddpo.parse([])
    tflop = 2 * args.steps * (unet_forward + unet_train) + decode  # 2: with guidance
    commands["ddpo.py"] = (tflop, args.images, args.epochs)
    page = " ".join((TINY / "RESULTS.md").read_text().split())
    assert f"{forward:.2f} TFLOP, a trained and checkpointed one {train:.2f}" in page
    assert f"VAE decoding {decode:.2f}" in page
    assert f"Stable Diffusion 1.4 has {unet_forward:.2f} and {unet_train:.2f}" in page
    for command, (tflop, images, epochs) in commands.items():
        cells = [f"`{command}`, {epochs} epochs", f"{tflop:.0f}", f"{tflop * images / 1000:.1f}"]
        for peak in (989, 165):  # TFLOP/s in bf16 of an H100 and an RTX 4090; 40 % are assumed
            minutes = tflop * images / (0.4 * peak) / 60
            cells.append(f"{minutes:.1f}, {minutes * epochs / 60 / 24:.1f}")
        assert f"| {' | '.join(cells)} |" in page


empty = partial(torch.empty, device="meta")
bf16 = partial(empty, dtype=torch.bfloat16)


class Memory(TorchDispatchMode):
    """Counts the bytes of all meta tensors that are alive: now, and at their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.alive = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return 1  # yes, all latents are finite
        outputs = function(*args, **(kwargs or {}))
        for x in tree_leaves(outputs):
            if isinstance(x, torch.Tensor) and x.is_meta:
                storage = x.untyped_storage()
                key, size = storage._cdata, storage.nbytes()
                if key not in self.alive:
                    self.alive.add(key)
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self.free, key, size)
        return outputs

    def free(self, key, size):
        self.alive.remove(key)
        self.now -= size

    def peak_gb(self, function, *args):
        self.peak = self.now
        function(*args)
        return self.peak / 1e9


def sd35_encoders_gb():
    """Of the two CLIP text encoders and T5, in bf16."""
    clip, t5 = transformers.CLIPTextConfig, transformers.T5Config
    configs = [
        clip(hidden_size=768, intermediate_size=3072, num_attention_heads=12),
        clip(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, projection_dim=1280),
        t5(d_model=4096, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu"),
    ]
    classes = [transformers.CLIPTextModelWithProjection] * 2 + [transformers.T5EncoderModel]
    with torch.device("meta"):
        encoders = [kind(config) for kind, config in zip(classes, configs)]
    return sum(2 * p.numel() for encoder in encoders for p in encoder.parameters()) / 1e9


def train_a_micro_batch(pipe, layers, x0, cond, uncond, args):
    """As `run` does it, but for the pass of `old`, which takes less than the guided one."""
    sigma = empty(())
    noise, v_old = torch.empty_like(x0), torch.empty_like(x0)
    x = crd.add_noise(x0, noise, sigma)
    v_ref = None
    if args.anchor:
        with torch.no_grad(), crd.use_adapter(layers, None):
            v_ref = crd.velocity(pipe, x, sigma, cond, uncond, args.anchor_guidance)
    v = crd.velocity(pipe, x, sigma, cond)
    s = empty(len(x0))
    crd.objective(v, v_old, v_ref, noise - x0, s, s, args)["loss"].backward()


def measure_memory(memory, pipe, layers, args):
    """GB at the peak of each phase of any epoch but the first."""
    N, size = args.groups * args.group_size, args.micro_batch
    tokens = 77 + args.max_sequence_length
    parameters = [p for p in pipe.transformer.parameters() if p.requires_grad]
    _adam = [torch.zeros_like(p) for p in 2 * parameters]
    cond, held_out, uncond = [  # of an epoch's images, of an evaluation's, and of no prompt
        [bf16(count, tokens, 4096), bf16(count, 2048)] for count in (N, args.eval_images, 1)
    ]
    x0 = empty(N, 16, 64, 64)
    held = memory.now / 1e9
    noise = torch.empty_like(x0)
    two = slice(0, 2 * size)  # micro-batches
    c = [part[two] for part in cond]
    rollout = memory.peak_gb(
        crd.generate, pipe, layers, "sampler", noise[two], c, uncond, 1, 1.0, size
    )
    decode = memory.peak_gb(crd.decode, pipe, x0[:16])
    del noise
    for p in parameters:
        p.grad = torch.zeros_like(p)  # of an earlier micro-batch
    inputs = (pipe, layers, x0[:size], [part[:size] for part in cond], uncond)
    pipe.transformer.enable_gradient_checkpointing(crd.checkpoint)
    train = memory.peak_gb(train_a_micro_batch, *inputs, args)
    pipe.transformer.disable_gradient_checkpointing()
    plain = memory.peak_gb(train_a_micro_batch, *inputs, replace(args, anchor=0))
    pipe.transformer.zero_grad()
    return held, held + sd35_encoders_gb(), rollout, decode, train, plain


def test_the_pages_say_how_much_memory_crd_takes(monkeypatch):
    """SD 3.5 Medium at 512 px, on tensors without data. As on a GPU, attention keeps no matrix of
    all pairs. Left out: what convolutions and the text encoders compute with."""
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    attention = lambda q, k, v, *_, **__: attend(q, k, v)[0]  # noqa: E731
    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    sigmas = torch.tensor([1.0, 0.0])  # have data, as the sampler reads them
    monkeypatch.setattr(crd, "schedule", lambda *_: sigmas)
    with Memory() as memory:
        with torch.device("meta"):
            network = sd35_medium().requires_grad_(False)
            for p in network.parameters():  # but not the positions, as in `load_parts`
                p.data = p.data.to(torch.bfloat16)
            layers = crd.add_lora(network, crd.TARGET_MODULES, 32, 64, crd.ADAPTERS)
            vae = large_vae(16).requires_grad_(False)
        network.register_forward_pre_hook(lambda _, inputs: tuple(x.to("meta") for x in inputs))
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
        processor = SimpleNamespace(postprocess=lambda pixels: [])
        pipe = SimpleNamespace(
            transformer=network, vae=vae, scheduler=scheduler, image_processor=processor
        )
        page = (TINY / "RESULTS.md").read_text()
        for flags in ("--reward ocr", "--reward ocr --group-size 8 --micro-batch 8"):
            measured = measure_memory(memory, pipe, layers, crd.parse(flags.split()))
            cells = re.search(rf"\| `crd.py {flags}` \|(.*)\|", page)[1].split("|")
            assert [float(cell) for cell in cells] == pytest.approx(measured, rel=0.03)
