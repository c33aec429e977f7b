"""What CRD and DDPO claim, each claim a test that fails when its line is broken. CPU, no network.

    python -m pytest -q test_crd.py
"""

import inspect
import io
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import zlib
from dataclasses import asdict
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

import crd  # noqa: E402
import ddpo  # noqa: E402
import rewards  # noqa: E402
from rewards import Detection  # noqa: E402

TINY = Path(__file__).parent / "tiny-sd3"
CPU = torch.device("cpu")
parametrize = pytest.mark.parametrize
in_both_scripts = parametrize("script", [crd, ddpo], ids=["crd", "ddpo"])
any_shape = parametrize("shape", [(4, 2, 3, 3), (4, 5, 6), (4, 2, 3, 3, 3)], ids=str)

SHARED = ["LoRALinear", "add_lora", "use_adapter", "ema_update", "lora_state_dict", "load_lora"]


@parametrize("name", [*SHARED, "Checkpoint", "checkpoint"])
def test_the_scripts_share_these_lines(name):
    """So a test of one below is a test of both."""
    assert inspect.getsource(getattr(crd, name)) == inspect.getsource(getattr(ddpo, name))


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# CRD's mathematics

R = torch.tensor([0.1, 0.4, 0.2, 1.0, 0.0, 0.5, 0.3, 0.6], dtype=torch.float64)  # 2 groups of 4
TARGETS = crd.reward_targets(R, 4)
RHO = randn(8, seed=3, dtype=torch.float64)


def gaussian_velocity(x, sigma, mean, std):
    """E[noise - x0 | x_sigma = x] for data N(mean, std^2): what a perfect model predicts."""
    variance = (1 - sigma) ** 2 * std**2 + sigma**2
    residual = (x - (1 - sigma) * mean) / variance
    return sigma * residual - (mean + (1 - sigma) * std**2 * residual)


def mixture_velocity(x, sigma):
    """The same for a mixture of three Gaussians."""
    means = torch.tensor([-1.5, 0.2, 1.4], dtype=torch.float64)
    stds = torch.tensor([0.25, 0.15, 0.3], dtype=torch.float64)
    x = x[..., None]
    variance = (1 - sigma) ** 2 * stds**2 + sigma**2
    log_weights = -((x - (1 - sigma) * means) ** 2) / (2 * variance) - variance.log() / 2
    return (log_weights.softmax(-1) * gaussian_velocity(x, sigma, means, stds)).sum(-1)


def euler(velocity, x, sigmas):
    for s, t in itertools.pairwise(sigmas):
        x = x + (t - s) * velocity(x, s)
    return x


def test_sample_ode_converges_at_second_order():
    """Data N(0.7, 1) moves noise z to 0.7 + z exactly; twice the steps, a quarter of the error."""
    noise = randn(4, 1, 2, 2, dtype=torch.float64)

    def error(steps):
        sigmas = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
        x0 = crd.sample_ode(lambda x, sigma: gaussian_velocity(x, sigma, 0.7, 1.0), noise, sigmas)
        return (x0 - (0.7 + noise)).abs().max().item()

    assert error(160) < 2e-4
    assert error(160) / error(320) == pytest.approx(4, rel=0.1)


@parametrize("shift", [1.0, 3.0])
@parametrize("steps", [4, 10, 20, 40])
def test_sample_ode_is_never_less_accurate_than_euler(shift, steps):
    """On diffusers' schedules, whose second to last step is several times as long as the others."""
    noise = randn(2000, 1, dtype=torch.float64)
    exact = euler(mixture_velocity, noise, torch.linspace(1, 0, 2001, dtype=torch.float64))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()
    error = (crd.sample_ode(mixture_velocity, noise, sigmas) - exact).square().mean()
    euler_error = (euler(mixture_velocity, noise, sigmas) - exact).square().mean()
    assert error <= euler_error
    assert steps < 10 or error < 0.7 * euler_error


@parametrize("sigmas", [[1.0, 0.5], [1.0, 0.5, 0.5, 0.0], [0.5, 1.0, 0.0]])
def test_sample_ode_refuses_sigmas_that_do_not_descend_to_0(sigmas):
    with pytest.raises(ValueError, match="must descend to 0"):
        crd.sample_ode(lambda x, sigma: x, randn(1, 1), torch.tensor(sigmas))


def test_targets_are_advantages_on_0_to_1():
    """Centered per prompt, on the scale of the whole batch's standard deviation."""
    centered = R.view(2, 4) - R.view(2, 4).mean(1, keepdim=True)
    std = (R - R.mean()).square().mean().sqrt()
    assert_close((TARGETS.view(2, 4) - 0.5) * 10, centered / (std + 1e-4))


def test_a_constant_added_to_all_rewards_changes_no_target():
    assert_close(crd.reward_targets(R + 3, 4), TARGETS)


def test_outliers_are_clipped():
    outlier = torch.cat([torch.zeros(99), torch.ones(1)])
    assert crd.reward_targets(outlier, 100).max() == 1
    assert crd.reward_targets(-outlier, 100).min() == 0
    assert crd.reward_targets(outlier, 100, clip=20.0).max() < 1


@any_shape
def test_add_noise_goes_straight_from_image_to_noise(shape):
    x0 = randn(*shape)
    noise = randn(*shape, seed=1)
    assert torch.equal(crd.add_noise(x0, noise, torch.tensor(0.0)), x0)
    assert torch.equal(crd.add_noise(x0, noise, torch.tensor(1.0)), noise)
    mixed = crd.add_noise(x0, noise, torch.tensor([0.0, 0.3, 0.6, 1.0]))
    assert_close(mixed[1], 0.7 * x0[1] + 0.3 * noise[1])
    assert_close(mixed[3], noise[3])


@any_shape
def test_implicit_reward_compares_the_two_denoising_errors(shape):
    """Over all of an image's latents, whatever their shape, each over its own mean |v - u|."""
    v, v_old, u = (randn(*shape, seed=seed) for seed in range(3))
    expected = []
    for i in range(4):
        error = (v[i] - u[i]).square().mean() / (v[i] - u[i]).abs().mean()
        error_old = (v_old[i] - u[i]).square().mean() / (v_old[i] - u[i]).abs().mean()
        expected.append(error_old - error)
    assert_close(crd.implicit_reward(v, v_old, u), torch.stack(expected))


def test_implicit_reward_is_0_at_the_reference_and_positive_for_a_better_policy():
    v_old, u = randn(2, 8, 2, 3, 3)
    assert torch.equal(crd.implicit_reward(v_old, v_old, u), torch.zeros(8))
    assert (crd.implicit_reward(u + (v_old - u) / 2, v_old, u) > 0).all()
    assert crd.implicit_reward(u, v_old, u).isfinite().all()  # nothing is divided by zero


def test_implicit_reward_computes_in_float32():
    v, v_old, u = randn(3, 8, 2, 3, 3).bfloat16()
    rho = crd.implicit_reward(v, v_old, u)
    assert torch.equal(rho, crd.implicit_reward(v.float(), v_old.float(), u.float()))


def test_the_adaptive_weights_have_no_gradient():
    v, v_old, u = randn(3, 8, 2, 3, 3)
    m = (v - u).abs().mean((1, 2, 3), keepdim=True)
    v.requires_grad_()
    crd.implicit_reward(v, v_old, u).sum().backward()
    assert_close(v.grad, (-2 * (v - u) / m / u[0].numel()).detach())


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
    rho = RHO.view(2, 4) - RHO.view(2, 4).mean(1, keepdim=True)
    s = TARGETS.view(2, 4) - TARGETS.view(2, 4).mean(1, keepdim=True)
    residual = (beta * rho - s).flatten()
    loss, gradient = loss_and_gradient(RHO, TARGETS, beta=beta, clip=clip)
    assert_close(loss, clip / beta * residual.square().mean())
    assert_close(gradient, 2 * clip * residual / 8)


@parametrize("beta, clip", [(1.0, 5.0), (0.7, 2.0)])
def test_at_the_reference_the_gradient_is_minus_the_advantage(beta, clip):
    targets = crd.reward_targets(R, 4, clip)
    advantages = (targets - 0.5) * 2 * clip
    _, gradient = loss_and_gradient(0 * RHO, targets, beta=beta, clip=clip)
    assert_close(gradient, -advantages / 8)


def test_tau_goes_from_the_plain_mean_to_the_best_and_the_worst_image():
    plain, _ = loss_and_gradient(RHO, TARGETS)
    hot, _ = loss_and_gradient(RHO, TARGETS, tau=1e6)
    assert_close(hot, plain, rtol=1e-4, atol=1e-6)
    cold, _ = loss_and_gradient(RHO, TARGETS, tau=1e-4)
    losses = []
    for pick in (torch.argmax, torch.argmin):
        index = torch.stack([pick(TARGETS[:4]), 4 + pick(TARGETS[4:])]).repeat_interleave(4)
        residual = (RHO - RHO[index]) - (TARGETS - TARGETS[index])
        losses.append(5 * residual.square().mean())
    assert_close(cold, (losses[0] + losses[1]) / 2)


def test_the_optimum_has_no_loss():
    """Data N(m, s^2), reward <g, x0>: the optimum p* is N(m + s^2 g / beta, s^2).

    With D = (1 - sigma)^2 s^2 + sigma^2, the best velocities of p* and p_old differ by
    -(sigma / D) s^2 g / beta. With one noise for the group, u - v_old is -(sigma / D) x0 plus a
    constant. So without adaptive weights, rho is, centered, the true log-ratio <g, x0> / beta times
    the ELBO's weight 2 (sigma s / D)^2 / d, and beta takes that up.
    """
    x0, noise, g = randn(3, 4, 2, 3, 3, dtype=torch.float64)
    noise, g = noise[:1], g[:1]
    m = 0.3
    s = 0.5
    beta = 0.8
    sigma = torch.tensor(0.6, dtype=torch.float64)
    D = (1 - sigma) ** 2 * s**2 + sigma**2
    x = crd.add_noise(x0, noise, sigma)
    u = noise - x0
    reward = (g * x0).sum((1, 2, 3))

    def loss(mean):
        v = gaussian_velocity(x, sigma, mean, s)
        v_old = gaussian_velocity(x, sigma, m, s)
        rho = ((v_old - u).square() - (v - u).square()).mean((1, 2, 3))
        elbo_weight = 2 * (sigma * s / D) ** 2 / g.numel()
        return crd.crd_loss(rho, reward, 4, beta=beta / elbo_weight).item()

    assert loss(m + s**2 * g / beta) < 1e-20
    assert loss(m + 0.9 * s**2 * g / beta) > 1e-4
    assert loss(m) > 1e-2


@any_shape
def test_the_anchor_grows_with_the_reward(shape):
    """Its weight is kappa_min at reward 0 and kappa at reward 1."""
    v = randn(*shape, dtype=torch.float64)
    v_ref = randn(*shape, seed=1, dtype=torch.float64)
    distance = (v - v_ref).square().flatten(1).mean(1)
    n = torch.tensor([0.0, 1.0, 0.5, 0.5], dtype=torch.float64)
    kappa = torch.tensor([1e-4, 0.1, 0.05005, 0.05005], dtype=torch.float64)
    assert_close(crd.anchor_loss(v, v_ref, n, 0.1), (kappa * distance).mean())


def test_ema_decay_is_flat_then_a_ramp_then_flat():
    decays = [crd.ema_decay(step, 75, 0.1, 0.1, 0.9) for step in (0, 75, 76, 77, 84, 999)]
    assert decays == pytest.approx([0.1, 0.1, 0.2, 0.3, 0.9, 0.9])


# DDPO's mathematics


def ddim_scheduler():
    """Stable Diffusion 1.x's, as its checkpoint configures it."""
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    scheduler.set_timesteps(50)
    return scheduler


@any_shape
def test_gaussian_step_gives_the_log_probability_per_latent(shape):
    mean = randn(*shape)
    std = torch.tensor(0.3)
    x_next, log_prob = ddpo.gaussian_step(mean, std)
    expected = torch.distributions.Normal(mean, std).log_prob(x_next).flatten(1).mean(1)
    assert_close(log_prob, expected)
    again, same = ddpo.gaussian_step(mean, std, x_next)
    assert again is x_next
    assert torch.equal(same, log_prob)


def test_the_action_has_no_gradient():
    mean = randn(2, 3).requires_grad_()
    _, log_prob = ddpo.gaussian_step(mean, torch.tensor(0.3))
    log_prob.sum().backward()
    assert mean.grad.abs().max() > 0  # it would be 0 if x_next moved with the mean


@any_shape
@parametrize("eta", [0.0, 1.0])
def test_ddim_step_is_diffusers(eta, shape):
    """A batch may mix timesteps: the first, some in the middle, the last, to the image."""
    scheduler = ddim_scheduler()
    t = scheduler.timesteps[[0, 20, 49, 10]]
    noise_pred = randn(*shape, seed=1)
    x = randn(*shape, seed=2)
    noise = randn(*shape, seed=3)
    expected = []
    for i in range(4):
        step = scheduler.step(noise_pred[i], t[i], x[i], eta=eta, variance_noise=noise[i])
        expected.append(step.prev_sample)
    generator = torch.Generator().manual_seed(3)
    x_next, _ = ddpo.ddim_step(
        noise_pred, x, t, t - 20, scheduler.alphas_cumprod, eta, generator=generator
    )
    assert_close(x_next, torch.stack(expected))


@parametrize("noise_level", [0.0, 0.3, 0.7])
def test_the_flow_sde_keeps_the_marginals(noise_level):
    """Data N(0.7, 0.5^2): whatever the noise, mean and deviation end there. Without noise it is
    Euler's method, with noise it leaves the ODE's path."""
    generator = torch.Generator().manual_seed(1)
    sigmas = torch.linspace(1, 0, 201, dtype=torch.float64)
    noise = randn(20_000, 1, dtype=torch.float64)
    x = noise
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
    x_next, log_prob = ddpo.flow_sde_step(v, x, sigma, sigma_next, torch.tensor(0.8), 0.7, x)
    for i in range(4):
        below = 0.8 if i == 0 else sigma[i]
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
    loss = ddpo.importance_sampling_loss(log_prob, torch.zeros(1), A, clip=0.2)
    (gradient,) = torch.autograd.grad(loss, log_prob)
    is_clipped = advantage * change > 0.2
    assert gradient.item() == pytest.approx(0 if is_clipped else -advantage * math.exp(change))


def test_at_ratio_1_both_estimators_have_one_gradient():
    log_prob = randn(8).requires_grad_()
    A = randn(8, seed=1)
    loss = ddpo.importance_sampling_loss(log_prob, log_prob.detach(), A)
    (importance,) = torch.autograd.grad(loss, log_prob)
    (score,) = torch.autograd.grad(ddpo.score_function_loss(log_prob, A), log_prob)
    assert_close(importance, score)


def test_advantages_use_a_prompts_own_statistics_once_there_are_enough():
    statistics = ddpo.PromptStatistics(buffer=4, minimum=3)
    R = torch.tensor([1.0, 2.0, 6.0, 11.0])
    A = statistics.advantages(["cat", "cat", "cat", "dog"], R)
    assert_close(A[:3], (R[:3] - 3) / (R[:3].std(correction=0) + 1e-6))
    assert_close(A[3], (11 - R.mean()) / (R.std(correction=0) + 1e-6))
    A = statistics.advantages(["cat", "cat"], torch.tensor([0.0, 4.0]))
    last_four = torch.tensor([2.0, 6.0, 0.0, 4.0])  # the buffer forgets the 1
    assert_close(A, (last_four[2:] - 3) / (last_four.std(correction=0) + 1e-6))


def test_equal_rewards_have_no_advantage_and_outliers_are_clipped():
    equal = torch.full((20,), 0.3)
    assert ddpo.PromptStatistics().advantages(["a"] * 20, equal).abs().max() < 1e-5
    outlier = torch.cat([torch.zeros(99), torch.ones(1)])
    assert ddpo.PromptStatistics().advantages(["a"] * 100, outlier).max() == 5


def test_weights_of_the_baselines():
    """rwr: a softmax, 1 on average; rwr-sparse: the best tenth, as often as all images were."""
    A = randn(40)
    weights = ddpo.rwr_weights(A, 0.2)
    assert weights.mean().item() == pytest.approx(1)
    assert_close(weights[0] / weights[1], torch.exp((A[0] - A[1]) / 0.2))
    best = ddpo.best_images(A, 0.1)
    assert len(best) == 40
    assert set(best.tolist()) == set(A.argsort()[-4:].tolist())
    assert best.bincount().max() == 10


# LoRA and gradient checkpointing, on a small transformer with a block of both kinds


def small_transformer(dtype=torch.float32):
    torch.manual_seed(0)
    model = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )
    return model.eval().to(dtype)


def small_lora(model, trained=True):
    """LoRA of rank 2 and alpha 6; each adapter moved away from zero in its own way."""
    torch.manual_seed(0)
    layers = crd.add_lora(model, crd.TARGET_MODULES, 2, 6, crd.ADAPTERS)
    for layer in layers.values():
        for B in layer.B.values():
            B.data.normal_(std=0.3 * trained)
    return layers


def small_predict(model, layers, adapter="policy"):
    pipe = SimpleNamespace(transformer=model)
    cond = [randn(2, 3, 16).to(model.dtype), randn(2, 16, seed=1).to(model.dtype)]
    x = randn(2, 4, 8, 8, seed=2)
    return crd.predict(pipe, layers, cond, None, x, torch.tensor(0.7), adapter)


def gradients(parameters):
    return torch.cat([p.grad.flatten() for p in parameters])


def relative_distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lora_starts_as_the_identity_and_learns_in_float32(dtype):
    model = small_transformer(dtype)
    cond = [randn(2, 3, 16).to(dtype), randn(2, 16, seed=1).to(dtype)]
    x = randn(2, 4, 8, 8, seed=2).to(dtype)
    with torch.no_grad():
        before = model(x, *cond, torch.full((2,), 700.0), return_dict=False)[0].float()
    layers = small_lora(model, trained=False)
    after = small_predict(model, layers)
    assert_close(after, before, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.03)
    after.square().mean().backward()
    policy = [layer.B["policy"] for layer in layers.values()]
    assert gradients(policy).dtype == torch.float32
    assert gradients(policy).abs().max() > 0


def test_an_adapter_is_the_pretrained_layer_plus_its_update():
    layer = crd.LoRALinear(torch.nn.Linear(5, 4), 2, 6, ("policy", "old"))
    layer.B["old"].data.normal_()
    x = randn(3, 7, 5)
    with crd.use_adapter({"": layer}, "old"):
        update = 6 / 2 * layer.B["old"] @ layer.A["old"]
        assert_close(layer(x), layer.base(x) + x @ update.T)
    with crd.use_adapter({"": layer}, None):
        assert torch.equal(layer(x), layer.base(x))
    assert layer.active == "policy"


def test_lora_is_on_the_joint_attention_and_only_the_policy_is_trained():
    """Eight projections a block, seven in the last, which has no to_add_out; none of attn2."""
    model = small_transformer()
    layers = small_lora(model)
    assert len(layers) == 8 + 7
    assert not any("attn2" in name for name in layers)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {f"{name}.{part}.policy" for name in layers for part in "AB"}


def test_ema_update_averages_toward_the_policy():
    layer = crd.LoRALinear(torch.nn.Linear(5, 4), 2, 6, ("policy", "old"))
    layer.B["policy"].data.fill_(1.0)
    crd.ema_update({"": layer}, "old", 0.75)
    assert_close(layer.B["old"].data, torch.full((4, 2), 0.25))


@parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_changes_memory_and_no_gradient(dtype):
    found = []
    for checkpointing in (False, True):
        model = small_transformer(dtype)
        layers = small_lora(model)
        if checkpointing:
            model.enable_gradient_checkpointing(crd.checkpoint)
        sizes = {}

        def measure(tensor):
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(measure, lambda tensor: tensor):
            v = small_predict(model, layers)
        v.square().sum().backward()
        policy = [layer.B["policy"] for layer in layers.values()]
        found.append((gradients(policy), sum(sizes.values())))
    (plain, plain_size), (recomputed, size) = found
    assert torch.equal(recomputed, plain)
    assert size < plain_size / 2


@parametrize("returns", ["a tensor", "a tuple with None"])
def test_a_checkpointed_block_may_return_a_tensor_or_a_tuple(returns):
    """Gradients reach its inputs, whether it keeps a None or an option among them."""
    layer = torch.nn.Linear(4, 4)

    def block(x, option, scale):
        y = layer(x) * scale
        return y if returns == "a tensor" else (None, y)

    x = randn(2, 4).requires_grad_()
    found = []
    for run in (block, lambda *inputs: crd.checkpoint(block, *inputs)):
        x.grad = layer.weight.grad = None
        y = run(x, None, 2.0)
        y = y if returns == "a tensor" else y[1]
        y.sin().sum().backward()
        found.append((x.grad, layer.weight.grad))
    assert_close(found[1], found[0])


@parametrize("checkpointing", [False, True])
@parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rho_is_exactly_0_where_the_policy_is_old(dtype, checkpointing):
    """Policy and reference go through the same kernels, with gradients or without."""
    model = small_transformer(dtype)
    layers = small_lora(model)
    crd.ema_update(layers, "old", 0.0)
    if checkpointing:
        model.enable_gradient_checkpointing(crd.checkpoint)
    u = randn(2, 4, 8, 8, seed=5)
    with torch.no_grad():
        v_old = small_predict(model, layers, "old")
    rho = crd.implicit_reward(small_predict(model, layers), v_old, u)
    assert torch.equal(rho, torch.zeros(2))


@parametrize("reward_weight, anchor", [(0.5, 0.2), (0.5, 0.0), (0.0, 0.2)])
def test_the_objective_is_the_regression_plus_the_anchor(reward_weight, anchor):
    """Of the policy, against `old` and the guided pretrained model; each can be left out."""
    x0 = randn(8, 2, 3)
    noise = randn(8, 2, 3, seed=1)
    sigma = torch.tensor(0.7)
    x = 0.3 * x0 + 0.7 * noise
    u = noise - x0
    shift = {"policy": 0.1, "old": 0.2, None: 0.5}

    def predict(x, sigma, adapter, guidance=1.0):
        return x * guidance + shift[adapter]

    args = crd.Settings(group_size=4, reward_weight=reward_weight, anchor=anchor)
    terms = crd.objective(predict, x0, noise, sigma, TARGETS.float(), R.float(), args)
    v = x + 0.1
    v_old = x + 0.2
    v_ref = 4.5 * x + 0.5
    rho = crd.implicit_reward(v, v_old, u)
    expected = reward_weight * crd.crd_loss(rho, TARGETS.float(), 4)
    if anchor:
        expected += crd.anchor_loss(v, v_ref, R.float(), anchor)
    assert_close(terms["loss"], expected)
    assert_close(terms["rho_variance"], rho.view(2, 4).var(1, correction=0).mean())


def test_guidance_extrapolates_from_the_unconditional_velocity():
    pipe = SimpleNamespace(transformer=small_transformer())
    cond = [randn(2, 3, 16), randn(2, 16, seed=1)]
    uncond = [randn(1, 3, 16, seed=2), randn(1, 16, seed=3)]
    x = randn(2, 4, 8, 8, seed=4)
    with torch.no_grad():
        v_cond = crd.velocity(pipe, x, torch.tensor(0.7), cond)
        both = [c.expand(2, *c.shape[1:]) for c in uncond]
        v_uncond = crd.velocity(pipe, x, torch.tensor(0.7), both)
        v = crd.velocity(pipe, x, torch.tensor(0.7), cond, uncond, guidance=3.0)
    assert_close(v, v_uncond + 3 * (v_cond - v_uncond), rtol=1e-4, atol=1e-5)


# Runs


SHORT = {
    crd: dict(
        preset="tiny", reward="incompressibility", rank=2, alpha=4, groups=2, group_size=2,
        micro_batch=4, steps_per_epoch=1, rollout_steps=2, train_timesteps=1, eval_steps=2,
        eval_images=2, eval_every=2, eval_rewards=None,
    ),
    ddpo: dict(
        preset="tiny", reward="incompressibility", rank=2, alpha=4, images=8, group_size=2,
        micro_batch=1, steps=4, stat_min=2, guidance=2.0, eval_images=2, eval_every=2,
        eval_rewards=None,
    ),
}  # fmt: skip


def short(script, name="run", **settings):
    return script.Settings(**{**script.PRESETS["tiny"], **SHORT[script], "name": name, **settings})


@pytest.fixture
def run(monkeypatch, tmp_path):
    """run(script, name, epochs, **settings) in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(script, name, epochs, **settings):
        return script.train(short(script, name, epochs=epochs, **settings))

    return run


def resume(script, folder, *flags):
    return script.train(script.parse(["--resume", str(folder), *flags]))


def read_state(folder):
    """All of it but what a clock put there."""
    state = torch.load(folder / "state.pt", weights_only=True)
    del state["progress"]["seconds"], state["metrics"]
    return state


def read_metrics(folder):
    """The lines of metrics.jsonl, without what a clock put there."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    return [{key: line[key] for key in line if not key.endswith("seconds")} for line in lines]


def read_lora(folder, epoch):
    return load_file(folder / f"epoch-{epoch:04d}" / "pytorch_lora_weights.safetensors")


def save_random_sd1(path):
    """A small Stable Diffusion 1.x with random weights: 32 x 32 images."""
    torch.manual_seed(0)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(TINY / "tokenizer", model_max_length=77)
    text_encoder = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=64, num_hidden_layers=1,
        num_attention_heads=2, projection_dim=16, eos_token_id=1,
    ))  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=8, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=1, cross_attention_dim=16,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    diffusers.StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, ddim_scheduler(), None, None,
        requires_safety_checker=False,
    ).save_pretrained(path)  # fmt: skip
    return {"model": str(path), "width": 32}


@pytest.fixture(scope="session")
def sd1(tmp_path_factory):
    return save_random_sd1(tmp_path_factory.mktemp("sd1"))


@in_both_scripts
def test_a_run_leaves_what_it_promises(run, script):
    folder = run(script, "run", 1)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*.*")}
    evaluation = {"images.png", "pytorch_lora_weights.safetensors"}
    assert files == {"args.json", "metrics.jsonl", "curve.png", "state.pt"} | {
        f"epoch-000{epoch}/{name}" for epoch in (0, 1) for name in evaluation
    }
    before, train, after = read_metrics(folder)
    assert [line["split"] for line in (before, train, after)] == ["eval", "train", "eval"]
    assert [line["epoch"] for line in (before, train, after)] == [0, 1, 1]
    assert train.keys() >= {"step", "images", "reward", "incompressibility", "loss", "grad_norm"}
    assert ("rho_std" if script is crd else "first_ratio_error") in train


@parametrize(
    "script, settings",
    [
        (crd, dict(steps_per_epoch=2, micro_batch=2)),
        (crd, dict(grad_checkpoint=True, tau=0.2, anchor=0.0)),
        (ddpo, dict(grad_checkpoint=True)),
        (ddpo, dict(algorithm="sf", updates=1)),
        (ddpo, dict(model="sd1", grad_checkpoint=True)),
        *((ddpo, dict(model="sd1", algorithm=name)) for name in ("rwr", "rwr-sparse")),
    ],
)
def test_a_resumed_run_equals_one_that_was_never_stopped(run, sd1, script, settings):
    """To the bit: weights, optimizer, metrics. Where p_old is the policy, DDPO's ratio is 1."""
    settings = settings | (sd1 if "model" in settings else {})
    straight = run(script, "straight", 2, eval_every=1, **settings)
    stopped = run(script, "stopped", 1, eval_every=1, **settings)
    resume(script, stopped, "--epochs", "2")
    assert_close(read_state(stopped), read_state(straight), rtol=0, atol=0)
    assert read_metrics(stopped) == read_metrics(straight)
    if script is ddpo and "rwr" not in settings.get("algorithm", "is"):
        train = [line for line in read_metrics(straight) if line["split"] == "train"]
        assert [line["first_ratio_error"] for line in train] == [0, 0]


@in_both_scripts
def test_a_run_killed_after_its_log_repeats_the_epoch(run, script):
    """A line of metrics.jsonl is written before the state; resuming drops it, even half of it."""
    folder = run(script, "run", 1, eval_every=1)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"split": "train", "epoch": 2}) + "\n" + '{"split": "ev')
    resume(script, folder, "--epochs", "2")
    splits = [(line["split"], line["epoch"]) for line in read_metrics(folder)]
    assert splits == [("eval", 0), ("train", 1), ("eval", 1), ("train", 2), ("eval", 2)]


@in_both_scripts
def test_two_processes_stay_identical_and_finish(run, script):
    """They draw images of their own, average their gradients, and end with one set of adapters."""
    run(script, "one", 0)  # so that the folder is there
    settings = dict(groups=4) if script is crd else {}
    Path("both.py").write_text(
        f"import sys; sys.path.insert(0, {str(TINY.parent)!r})\n"
        "import torch, test_crd\n"
        f"from test_crd import {script.__name__} as script\n"
        "gradients = []\n"
        "clip = torch.nn.utils.clip_grad_norm_\n"
        "def spy(parameters, *args, **options):\n"
        "    gradients.append([p.grad.clone() for p in parameters])\n"
        "    return clip(parameters, *args, **options)\n"
        "torch.nn.utils.clip_grad_norm_ = spy\n"
        f"script.train(test_crd.short(script, 'two', epochs=2, **{settings}))\n"
        "torch.save(gradients, f'gradients-{script.RANK}.pt')\n"
    )
    options = ["--standalone", "--nproc-per-node=2", "both.py"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", *options]
    subprocess.run(torchrun, check=True)
    first, second = (torch.load(f"gradients-{rank}.pt") for rank in (0, 1))
    assert_close(first, second, rtol=0, atol=0)
    lines = read_metrics(Path("runs/two"))
    assert [line["epoch"] for line in lines] == [0, 1, 2, 2]
    assert lines[-1]["images"] == 2 * 8
    assert lines[1]["reward"] == pytest.approx(lines[1]["incompressibility"])
    assert read_state(Path("runs/two"))["progress"]["epoch"] == 2


def test_rollouts_use_sampler_and_evaluations_ema(run, monkeypatch):
    adapters = []
    generate = crd.generate

    def spy(pipe, layers, uncond, args, adapter, *more):
        adapters.append(adapter)
        return generate(pipe, layers, uncond, args, adapter, *more)

    monkeypatch.setattr(crd, "generate", spy)
    run(crd, "run", 1)
    assert adapters == ["ema", "sampler", "ema"]


@in_both_scripts
def test_a_run_starts_from_a_lora(run, script):
    """`--epochs 0` evaluates it: the same images, hence the same reward. The other script, too."""
    folder = run(script, "run", 1, lr=0.01)
    lora = str(folder / "epoch-0001")
    expected = read_metrics(folder)[-1]["reward"]
    (line,) = read_metrics(run(script, "again", 0, lora=lora))
    assert line["reward"] == pytest.approx(expected, rel=1e-6)
    other = ddpo if script is crd else crd
    (plain,) = read_metrics(run(other, "plain", 0))
    (trained,) = read_metrics(run(other, "trained", 0, lora=lora))
    assert trained["reward"] != plain["reward"]
    with pytest.raises(RuntimeError, match="size mismatch"):
        run(script, "rank", 0, lora=lora, rank=3)


@in_both_scripts
def test_held_out_rewards_are_logged_beside_the_trained_one(run, script):
    Path("words.txt").write_text('a red "cube"\na blue "cube"\n')
    folder = run(
        script, "run", 1, reward=f"compressibility:2,ocr@{TINY}", eval_prompts="words.txt",
        eval_rewards=f"incompressibility,ocr@{TINY}/judge",
    )  # fmt: skip
    before, train, _ = read_metrics(folder)
    parts = 2 * before["compressibility"] + before["ocr@tiny-sd3"]
    assert before["reward"] == pytest.approx(parts)
    assert before["incompressibility"] == pytest.approx(-before["compressibility"])
    assert "ocr@judge" in before
    assert "ocr@judge" not in train


@in_both_scripts
def test_a_run_trains_on_ones_own_reward_and_resumes(run, monkeypatch, script):
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("run_rewards.py").write_text(
        "def bright(images, prompts, metadata):\n"
        "    return [sum(image.tobytes()) / 1e6 for image in images]\n"
    )
    settings = dict(reward="run_rewards.bright", eval_rewards="run_rewards.bright:-1")
    folder = run(script, "run", 1, **settings)
    resume(script, folder, "--epochs", "2")
    assert read_metrics(folder)[-1]["run_rewards.bright"] > 0


@parametrize(
    "script, settings",
    [
        (crd, dict(groups=8, group_size=12, micro_batch=24, rollout_steps=4, eval_steps=4,
                   steps_per_epoch=4, train_timesteps=2, anchor=0.0)),
        (ddpo, dict(images=96, group_size=12, guidance=1.0, micro_batch=96, clip=1e-2)),
    ],
)  # fmt: skip
def test_a_short_run_raises_the_reward(run, monkeypatch, script, settings):
    """Of held-out prompts. Here an image is as bright as its latents' mean, the reward is that."""

    def decode(pipe, latents):
        brightness = (4 * latents.mean((1, 2, 3))).sigmoid()
        return [Image.new("L", (8, 8), round(255 * x)) for x in brightness.tolist()]

    def score_batch(self, images, prompts):
        return [image.getpixel((0, 0)) / 255 for image in images]

    monkeypatch.setattr(script, "decode", decode)
    monkeypatch.setattr(rewards.Incompressibility, "score_batch", score_batch)
    settings |= dict(rank=8, alpha=16, lr=5e-3, height=16, width=16, eval_images=64, eval_every=9)
    lines = read_metrics(run(script, "run", 5, **settings))
    assert lines[-1]["reward"] > lines[0]["reward"] + 0.1


@in_both_scripts
def test_a_gradient_that_is_not_finite_stops_before_the_step(run, monkeypatch, script):
    name = "crd_loss" if script is crd else "importance_sampling_loss"
    monkeypatch.setattr(script, name, lambda x, *args: (0 * x).sum().sqrt())  # 0 / 0 in its slope
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: pytest.fail("a step was made"))
    with pytest.raises(RuntimeError, match="non-finite"):
        run(script, "run", 1)


@in_both_scripts
def test_weights_and_biases_hears_of_an_epoch_after_its_state_is_saved(run, monkeypatch, script):
    calls = []

    def log(line):
        calls.append(line.get("train/epoch", line.get("eval/epoch")))
        assert torch.load("runs/run/state.pt")["progress"]["epoch"] >= calls[-1]

    def init(**options):
        assert not Path("runs").exists()  # if it fails, the run's name is still free

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, log=log))
    run(script, "run", 2, eval_every=1, wandb="project")
    assert calls == [0, 1, 1, 2, 2]


@in_both_scripts
def test_images_that_are_not_finite_stop_the_run(run, script):
    """A NaN in a LoRA draws black images, the best of all under compressibility."""
    folder = run(script, "run", 0)
    path = folder / "epoch-0000" / "pytorch_lora_weights.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values()))[0, 0] = math.nan
    save_file(tensors, path)
    with pytest.raises(FloatingPointError, match="latents are not finite"):
        run(script, "nan", 0, lora=str(folder / "epoch-0000"))


@in_both_scripts
@parametrize(
    "scheduler",
    [
        diffusers.EulerDiscreteScheduler(),
        diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    ],
)
def test_another_scheduler_is_refused(tmp_path, script, scheduler):
    """EulerDiscrete's sigmas start at 157: training would go on, on noise."""
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(
        TINY, text_encoder_3=None, tokenizer_3=None, image_encoder=None, feature_extractor=None
    )
    pipe.register_modules(scheduler=scheduler)
    pipe.save_pretrained(tmp_path)
    with pytest.raises(AssertionError, match="FlowMatchEulerDiscreteScheduler"):
        script.load_pipeline(short(script, model=str(tmp_path)), CPU)


def test_a_compiled_run_does_the_same(run, monkeypatch):
    """With torch's graphs and PyTorch's kernels: to compile kernels takes minutes on a CPU."""
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile(self, backend="eager"))
    plain = run(crd, "plain", 1, grad_checkpoint=True)
    compiled = run(crd, "compiled", 1, grad_checkpoint=True, compile=True)
    assert_close(read_lora(compiled, 1), read_lora(plain, 1), rtol=1e-4, atol=1e-6)


@in_both_scripts
def test_the_saved_lora_gives_the_same_image_in_diffusers(run, sd1, script):
    pytest.importorskip("peft", reason="diffusers needs peft to load a LoRA")
    settings = dict(rank=4, lr=0.05, ema=0.0) | ({} if script is crd else sd1)
    folder = run(script, "run", 2, **settings)
    args = short(script, **settings)
    if script is crd:
        ours, _ = crd.load_pipeline(args, CPU)
        theirs, _ = crd.load_pipeline(args, CPU)
        network, targets, prefix = ours.transformer, crd.TARGET_MODULES, "transformer"
    else:
        ours, model = ddpo.load_pipeline(args, CPU)
        theirs, _ = ddpo.load_pipeline(args, CPU)
        network, targets, prefix = model.network, model.target_modules, model.prefix

    def draw(pipe):
        generator = torch.Generator().manual_seed(0)
        options = {"max_sequence_length": 1} if script is crd else {}
        return torch.from_numpy(pipe(
            '"moon" on a blue sign', height=32, width=args.width, guidance_scale=3.0,
            num_inference_steps=4, output_type="np", generator=generator, **options,
        ).images)  # fmt: skip

    plain = draw(ours)
    layers = script.add_lora(network, targets, 4, args.alpha, script.ADAPTERS)
    script.load_lora(layers, ours, folder / "epoch-0002", prefix)
    theirs.load_lora_weights(folder / "epoch-0002")
    assert (draw(ours) - plain).abs().max() > 0.01
    assert_close(draw(theirs), draw(ours), rtol=0, atol=1e-3)


def test_the_policy_gradient_is_the_gradient_of_the_expected_reward(sd1, monkeypatch):
    """The score function, over many images, agrees with backpropagation through the chain."""
    N = 2048
    R = 2
    settings = sd1 | dict(width=4, height=4, algorithm="sf", random_steps=R, guidance=1.0)
    args = short(ddpo, **settings)
    pipe, model = ddpo.load_pipeline(args, CPU)
    ddpo.add_lora(model.network, model.target_modules, 2, 6, ddpo.ADAPTERS)
    policy = [p for p in model.network.parameters() if p.requires_grad]
    for p in policy:
        p.data.normal_(std=0.3)
    uncond = ddpo.encode(pipe, model, [""])
    cond = [c.expand(N, *c.shape[1:]) for c in uncond]
    noise = randn(N, 4, 2, 2)
    generator = torch.Generator().manual_seed(1)
    batches = [slice(0, N)]
    x0, states, log_probs = ddpo.rollout(model, noise, cond, uncond, batches, R, args, generator)
    reward = x0[:, :3].mean((1, 2, 3))
    A = reward - reward.mean()
    for i in range(R):
        x, x_next = states[:, i], states[:, i + 1]
        terms = ddpo.policy_terms(model, x, x_next, i, log_probs[:, i], A, cond, uncond, args)
        terms["loss"].backward()
    estimate = -gradients(policy) * noise[0].numel()  # log p is an average over the latents
    model.network.zero_grad()
    monkeypatch.setattr(torch.Tensor, "detach", lambda x: x)  # let actions depend on the policy
    x = noise
    for i in range(args.steps):
        for p in policy:
            p.requires_grad_(i < R)  # later steps are part of the environment
        prediction = model.predict(x, i, cond)
        x, _ = model.step(prediction, x, i, noise=float(i < R), generator=generator)
    for p in policy:
        p.requires_grad_(True)
    x[:, :3].mean().backward()
    exact = gradients(policy)
    assert torch.cosine_similarity(estimate, exact, 0) > 0.85
    assert 0.7 < torch.dot(estimate, exact) / exact.square().sum() < 1.4


@parametrize("model", ["sd1", "sd3"])
def test_steps_after_the_random_ones_are_deterministic(sd1, model):
    """What was drawn depends on the generator in the first steps alone, and is guided."""
    args = short(ddpo, random_steps=2, **(sd1 if model == "sd1" else {}))
    pipe, model = ddpo.load_pipeline(args, CPU)
    cond = ddpo.encode(pipe, model, ["a cat"])
    uncond = ddpo.encode(pipe, model, [""])
    noise = randn(1, model.network.config.in_channels, 8, 8)
    generator = torch.Generator().manual_seed(0)
    batches = [slice(0, 1)]
    x0, states, _ = ddpo.rollout(model, noise, cond, uncond, batches, 2, args, generator)
    x = states[:, -1]
    with torch.no_grad():
        for i in range(2, args.steps):
            f_cond = model.predict(x, i, cond)
            f_uncond = model.predict(x, i, uncond)
            prediction = f_uncond + args.guidance * (f_cond - f_uncond)
            x, _ = model.step(prediction, x, i, noise=0.0)
    assert_close(x0, x, rtol=1e-3, atol=1e-3)


@in_both_scripts
def test_a_folder_stored_in_float32_computes_in_bf16_if_asked(tmp_path, script):
    """Also where the first tensor of the file is in bf16, and the others are not."""
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(
        TINY, text_encoder_3=None, tokenizer_3=None, image_encoder=None, feature_extractor=None
    )
    pipe.to(torch.float32).save_pretrained(tmp_path)
    path = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    first = min(tensors)
    save_file({**tensors, first: tensors[first].bfloat16()}, path, metadata={"format": "pt"})
    pipe, *_ = script.load_pipeline(short(script, model=str(tmp_path), dtype="bf16"), CPU)
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.bfloat16}


def test_a_pipeline_with_t5_loads_and_encodes(tmp_path):
    """Stable Diffusion 3.5's third text encoder: the tokens of CLIP (12 here), then those of T5."""
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(
        TINY, text_encoder_3=None, tokenizer_3=None, image_encoder=None, feature_extractor=None
    )
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    letters = [(chr(code), -3.0) for code in range(33, 127)]
    tokenizer = transformers.T5Tokenizer(vocab=pieces + letters)
    width = pipe.transformer.config.joint_attention_dim
    config = transformers.T5Config(
        vocab_size=len(tokenizer), d_model=width, d_ff=64, d_kv=16, num_heads=2, num_layers=1
    )
    pipe.register_modules(text_encoder_3=transformers.T5EncoderModel(config), tokenizer_3=tokenizer)
    pipe.save_pretrained(tmp_path)
    args = short(crd, model=str(tmp_path), max_sequence_length=7)
    pipe, _ = crd.load_pipeline(args, CPU)
    embeds, pooled = crd.encode(pipe, ["hello", "a cat"], args)
    assert embeds.shape == (2, 12 + 7, width)
    assert (embeds[0, 12:] - embeds[1, 12:]).abs().max() > 0


# Command line

PAPER = {
    "ocr": dict(
        model="stabilityai/stable-diffusion-3.5-medium", reward="ocr", height=512, width=512,
        rank=32, alpha=64, max_sequence_length=128, groups=48, group_size=24, rollout_steps=10,
        train_timesteps=9, steps_per_epoch=2, beta=1, tau=math.inf, advantage_clip=5, anchor=0.1,
        anchor_guidance=4.5, lr=3e-4, weight_decay=1e-4, ema=0.9, eval_steps=40, eval_guidance=1,
        old_decay=[0, 0.25, 0.005, 0.999], sampler_decay=[75, 0, 0.0075, 0.999],
    ),
    "geneval": dict(
        reward="geneval", steps_per_epoch=1, old_decay=[0, 0.25, 0.001, 0.5],
        sampler_decay=[0, 0, 0.001, 0.5],
    ),
    "sd1": dict(
        model="CompVis/stable-diffusion-v1-4", reward="compressibility", images=256, steps=50,
        random_steps=50, guidance=5, algorithm="is", updates=4, clip=1e-4, advantage_clip=5,
        stat_buffer=32, stat_min=16, temperature=0.2, keep=0.1, lr=3e-4, weight_decay=1e-4,
    ),
    "sd3": dict(steps=10, random_steps=9, guidance=4.5, noise_level=0.7),
}  # fmt: skip


@parametrize(
    "script, flags, expected",
    [
        (crd, "", PAPER["ocr"]),
        (crd, "--reward ocr@here", {**PAPER["ocr"], "reward": "ocr@here"}),
        (crd, "--reward geneval", PAPER["geneval"]),
        (crd, "--reward pickscore", {**PAPER["geneval"], "reward": "pickscore"}),
        (crd, "--preset tiny --lr 0.5", {**crd.PRESETS["tiny"], "lr": 0.5}),
        (crd, "--no-grad-checkpoint", dict(grad_checkpoint=False)),
        (crd, "--old-decay 1 0.5 0.25 1", dict(old_decay=[1, 0.5, 0.25, 1])),
        (ddpo, "", PAPER["sd1"]),
        (ddpo, "--preset sd3", PAPER["sd3"]),
        (ddpo, "--algorithm sf", dict(updates=1)),
    ],
)
def test_presets_are_the_papers_and_flags_override_them(script, flags, expected):
    args = asdict(script.parse(flags.split()))
    assert {key: args[key] for key in expected} == expected


@in_both_scripts
@parametrize(
    "settings, message",
    [
        (dict(reward="beauty"), "no reward is called 'beauty'"),
        (dict(height=36), "multiples of 16"),
        (dict(model="some/repo", device=None), "--preset tiny"),
        (dict(reward=f"ocr@{TINY}", prompts="animals"), "prompt generator animals: .* quotes"),
        (dict(reward=f"ocr@{TINY}", prompts="words.txt"), "words.txt, line 2: .* quotes"),
        (dict(group_size=3), "--group-size"),
    ],
)
def test_mistakes_are_refused_before_loading(run, monkeypatch, script, settings, message):
    words = ['a sign that says "one"', "a sign", *(f'the word "{i}"' for i in range(20))]
    Path("words.txt").write_text("\n".join(words))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(script, "load_pipeline", lambda *args: pytest.fail("the model was loaded"))
    with pytest.raises((ValueError, AssertionError), match=message):
        run(script, "run", 1, **settings)


@in_both_scripts
def test_a_runs_folder_is_not_taken_twice(run, script):
    run(script, "run", 0)
    with pytest.raises(AssertionError, match="runs/run exists: --resume it"):
        run(script, "run", 0)
    other = ddpo if script is crd else crd
    with pytest.raises(AssertionError, match=f"runs/run holds no run of {other.__name__}.py"):
        resume(other, "runs/run")


NEAR = {"rtol": 1e-3, "atol": 1e-4}
PUBLISHED = SimpleNamespace(vision=rewards.ImageReward.vision, text=rewards.ImageReward.text)


# Rewards


def noise_image(seed=0, size=(64, 32)):
    pixels = random.Random(seed).randbytes(3 * size[0] * size[1])
    return Image.frombytes("RGB", size, pixels)


def flat_image(size=(64, 32)):
    return Image.new("RGB", size, (90, 120, 30))


def scores_of(reward, images, prompts=None):
    return reward(images, prompts or [""] * len(images), [{}] * len(images))


def some_prompts(source, split, seed=0, count=400):
    pairs = itertools.islice(rewards.prompts(source, split, seed), count)
    return [prompt for prompt, _ in pairs]


def test_an_edit_costs_a_letter_and_case_and_spaces_nothing():
    expected = {"MOON": 1, "the mo on is up": 1, "moan": 3, "mon": 3, "moxon": 3, "omon": 2, "": 0}
    expected |= {"a very long line of other text": 0}
    for text, letters in expected.items():
        score = letters if letters == 1 else letters / 4
        assert rewards.edit_similarity("Mo on", text) == score, text


def test_ocr_compares_the_first_quoted_text(small):
    reward = small("ocr")
    reward.read = lambda images: ["moon", "b"]
    prompts = ['a sign that says "moon", not "b"'] * 2
    assert scores_of(reward, [flat_image()] * 2, prompts).tolist() == [1, 0]
    for prompt in ("a sign", 'an empty ""', 'one " only', 'a 12" ruler'):
        with pytest.raises(ValueError, match="it needs a text between double quotes"):
            reward.check(prompt, {})


def test_an_opening_quote_begins_a_word():
    assert rewards.quoted('a 12" ruler that says "hello", not "b"') == "hello"
    assert rewards.quoted('("hi")') == "hi"


def test_an_accented_letter_may_be_composed_or_not():
    assert rewards.edit_similarity("caf\u00e9", "cafe\u0301") == 1


LINE = (10, 5, 30, 13)
LOW = (2, 20, 40, 28)
LOW_MEAN = [(0.9, 10, 5, 30, 8), (0.9, 10, 5, 13, 13)]  # over half of its box is empty
BOXES = [
    ([(0.25, 0, 0, 63, 31), (0.9, *LINE)], [LINE]),
    ([(0.5, *LINE)], []),  # over the map's threshold, under the box's
    ([(0.9, 10, 5, 30, 7)], []),  # too thin
    ([(0.9, 10, 5, 30, 10), (0.9, 10, 5, 20, 13)], [LINE]),
    (LOW_MEAN, []),
    ([(0.9, *LINE), (0.8, *LOW)], [LINE, LOW]),
]


@parametrize("blocks, boxes", BOXES)
def test_a_line_is_a_blob_with_a_high_mean_over_its_box(blocks, boxes):
    text_map = torch.zeros(32, 64)
    for value, x0, y0, x1, y1 in blocks:
        text_map[y0 : y1 + 1, x0 : x1 + 1] = value
    assert rewards.find_boxes(text_map, unclip=0) == boxes


def test_boxes_grow_by_their_area_over_their_perimeter():
    text_map = torch.zeros(32, 64)
    text_map[5:14, 10:31] = 0.9
    d = 20 * 8 * 1.5 / 56
    assert rewards.find_boxes(text_map) == [pytest.approx((10 - d, 5 - d, 30 + d, 13 + d))]


def test_connected_components_are_those_of_a_slow_flood():
    """On a random mask, where they wind about and touch by their corners."""
    mask = torch.rand(48, 48, generator=torch.Generator().manual_seed(0)) < 0.45
    labels = torch.arange(1.0, 1 + mask.numel()).view_as(mask) * mask
    for _ in range(500):
        labels = torch.nn.functional.max_pool2d(labels[None], 3, 1, 1)[0] * mask
    assert len(labels.unique()) > 10
    assert torch.equal(rewards.connected(mask) + 1.0, labels)


def test_the_text_networks_see_the_sizes_of_pp_ocr(small):
    """Lines of text are rounded up as far as a width of 320, and beyond it down."""
    reward = small("ocr")
    reward.limit = 960
    reward.limit_type = "max"
    reward.width = 320
    reward.max_width = 3200
    sizes = [reward.detector_size(size) for size in ((32, 64), (100, 50), (5, 5), (1920, 1080))]
    assert sizes == [(32, 64), (96, 64), (32, 32), (960, 544)]
    lines = ((10, 21), (40, 266), (40, 267), (40, 268), (7, 100))
    assert [reward.line_width(size) for size in lines] == [101, 320, 320, 321, 685]


def test_the_detector_sees_blue_first(small):
    reward = small("ocr")
    text_maps = SimpleNamespace(last_hidden_state=torch.zeros(1, 1, 32, 64))
    reward.detector = Mock(return_value=text_maps)
    assert reward.read([Image.new("RGB", (64, 32), "red")]) == [""]
    pixels = reward.detector.call_args.kwargs["pixel_values"]
    blue, _, red = pixels.mean((0, 2, 3))
    assert red > 0 > blue


def test_ctc_merges_repeats_that_no_blank_parts():
    texts = []
    for steps in ("aab--", "aa-ab", "--a--", "-----", "a-b-b"):
        index = torch.tensor(["-ab".index(letter) for letter in steps])
        scores = torch.nn.functional.one_hot(index, 3)
        texts.append(rewards.ctc_decode(scores, "-ab"))
    assert texts == ["ab", "aab", "a", "", "abb"]


def test_a_box_a_little_lower_is_still_on_its_neighbors_line():
    boxes = [(0, 0, 10, 10), (20, 3, 30, 13), (0, 20, 10, 30), (15, 18, 30, 28)]
    shuffled = [boxes[i] for i in (3, 1, 2, 0)]
    assert rewards.reading_order(shuffled) == boxes


@pytest.fixture(scope="session")
def signs():
    """make.py, 500 held-out prompts, and their signs, cleanly drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(TINY)
        import make
    prompts = some_prompts("signs", "eval", count=500)
    rng = random.Random(0)
    return make, prompts, [make.draw(prompt, rng)[0] for prompt in prompts]


@parametrize("folder", ["tiny-sd3", "judge"])
def test_the_bundled_models_read_words_they_never_saw(signs, folder):
    _, prompts, images = signs
    path = TINY if folder == "tiny-sd3" else TINY / folder
    reward = rewards.load(f"ocr@{path}", "cpu")
    assert reward.name == f"ocr@{folder}"
    texts = reward.read(images)
    exact = [f'"{text.casefold()}"' in prompt for text, prompt in zip(texts, prompts)]
    assert sum(exact) >= 0.98 * 500
    assert scores_of(reward, images, prompts).mean() > 0.98
    assert scores_of(reward, images, prompts[1:] + prompts[:1]).mean() < 0.5


@parametrize("folder", ["", "judge"])
def test_what_is_read_does_not_depend_on_the_batch(signs, folder):
    reward = rewards.load(f"ocr@{TINY / folder}", "cpu")
    images = [flat_image(), noise_image(), noise_image(size=(1, 5000)), *signs[2][:3]]
    texts = reward.read(images)
    assert texts == [reward.read([image])[0] for image in images]
    assert texts[0] == "" != texts[3]


def test_the_held_out_rewards_see_a_wrong_letter_and_a_wrong_color(signs):
    make, prompts, images = signs
    rng = random.Random(1)
    letters, colors = zip(*[make.near_misses(prompt, rng) for prompt in prompts])
    clip = rewards.load(f"clipscore@{TINY}/clip", "cpu")
    right = scores_of(clip, images, prompts)
    assert (right > scores_of(clip, images, letters)).float().mean() > 0.95
    assert (right > scores_of(clip, images, colors)).float().mean() > 0.99
    color = rewards.load("color", "cpu")
    assert scores_of(color, images, prompts).min() == 1
    assert scores_of(color, images, colors).max() == 0


def test_jpeg_rewards_are_the_size_in_1000_bytes():
    """Its range, at 512 px, goes from a flat color to noise."""
    images = [flat_image((512, 512)), noise_image(size=(512, 512))]
    sizes = []
    for image in images:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=95)
        sizes.append(file.tell() / 1000)
    reward = rewards.load("incompressibility", "cpu")
    assert_close(scores_of(reward, images), torch.tensor(sizes))
    lo, hi = reward.range
    assert lo < sizes[0] < 10 and hi / 2 < sizes[1]
    minus = rewards.load("compressibility", "cpu")
    assert_close(scores_of(minus, images), -torch.tensor(sizes))
    assert minus.range == (-hi, -lo)


def test_a_weighted_sum_logs_its_parts_unweighted():
    reward = rewards.load("compressibility:2, incompressibility:-0.5", "cpu")
    images = [flat_image(), noise_image()]
    R, values = reward.score(images, ["", ""], [{}, {}])
    size = scores_of(rewards.load("incompressibility", "cpu"), images)
    assert_close(R, -2.5 * size)
    mean = pytest.approx(size.mean().item())
    assert values["incompressibility"] == mean
    assert -values["compressibility"] == mean


def test_a_negative_weight_turns_the_range_around():
    reward = rewards.load("compressibility:2,color:-1", "cpu")
    assert reward.range == pytest.approx((-401, -1.2))
    R = torch.tensor([-500.0, -401, -201.1, 0])
    assert_close(rewards.normalize(R, reward.range), torch.tensor([0, 0, 0.5, 1]))


def failing(scores):
    reward = rewards.Reward(None, "cpu")
    reward.name = "broken"
    reward.score_batch = Mock(side_effect=[scores])  # which raises an exception
    return reward


FAILURES = [MemoryError("no memory"), [0.5, math.nan], [0.5, math.inf], [0.5]]


@parametrize("scores", FAILURES, ids=str)
def test_a_failing_reward_stops_with_its_name_and_the_cause(scores):
    cause = re.escape(str(scores))
    with pytest.raises(RuntimeError, match=f"^reward broken failed: .*{cause}$"):
        scores_of(failing(scores), [flat_image()] * 2)


def test_a_failing_part_stops_a_sum():
    good = rewards.load("compressibility", "cpu")
    reward = rewards.WeightedSum([(1, good), (0.1, failing([0.5, math.nan]))])
    with pytest.raises(RuntimeError, match="^reward broken failed: "):
        scores_of(reward, [flat_image()] * 2)


def test_a_reward_that_does_not_exist_is_named_with_those_that_do():
    with pytest.raises(ValueError, match="no reward is called 'ocrr': .* ocr, geneval"):
        rewards.load("ocrr", "cpu")


SPECS = {
    r"ocr@C:\models\tiny-sd3": [("ocr", r"C:\models\tiny-sd3", 1)],
    "ocr@/a, b/tiny-sd3:2": [("ocr", "/a, b/tiny-sd3", 2)],
    "ocr@/a,b/c,color:-0.5": [("ocr", "/a,b/c", 1), ("color", None, -0.5)],
    "color:1e-3, mine.bright": [("color", None, 1e-3), ("mine.bright", None, 1)],
}


@parametrize("spec", SPECS)
def test_a_path_may_have_commas_and_colons(spec):
    assert rewards.parse_spec(spec) == SPECS[spec]


OWN = """
from rewards import Reward

def bright(images, prompts, metadata):
    return [image.convert("L").resize((1, 1)).getpixel((0, 0)) / 255 for image in images]

bright.range = (0, 2)

class Dark(Reward):
    name = "dark"
    prompts = "signs"

    def score_batch(self, images, prompts):
        return [-score for score in bright(images, prompts, None)]

def short(images, prompts, metadata):
    return [0.5]

def nan(images, prompts, metadata):
    return [float("nan")] * len(images)
"""


@pytest.fixture
def own(monkeypatch, tmp_path):
    """my_rewards.py in the working directory, imported anew."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "own_rewards", raising=False)
    Path("own_rewards.py").write_text(OWN)


def test_ones_own_reward_is_a_function_or_a_class(own):
    reward = rewards.load("own_rewards.bright:2,own_rewards.Dark", "cpu")
    assert reward.range == (0, 5)
    assert rewards.default_prompts("own_rewards.Dark") == "signs"
    R, values = reward.score([flat_image()], ["a"], [{}])
    assert R.item() == pytest.approx(values["own_rewards.bright"])
    assert values["dark"] == -values["own_rewards.bright"] < 0


@parametrize("name", ["own_rewards.short", "own_rewards.nan"])
def test_ones_own_reward_that_fails_is_named(own, name):
    reward = rewards.load(name, "cpu")
    with pytest.raises(RuntimeError, match=f"^reward {name} failed: 2 images got the scores"):
        scores_of(reward, [flat_image()] * 2)


def test_ones_own_reward_that_is_not_there_is_named(own):
    with pytest.raises(AttributeError, match="'own_rewards' has no attribute 'brigth'"):
        rewards.load("own_rewards.brigth", "cpu")
    with pytest.raises(ModuleNotFoundError, match="No module named 'my_rewrads'"):
        rewards.load("my_rewrads.bright", "cpu")


def test_a_prompt_that_cannot_be_scored_is_refused_by_file_and_line(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("a red sign\n\na yellow sign\n")
    pairs = rewards.read_prompts(path)
    rewards.check("compressibility,color", pairs[:1])
    with pytest.raises(ValueError, match="words.txt, line 3: .*color.*'a yellow sign'.* red,"):
        rewards.check("compressibility,color", pairs)


def test_a_reward_has_prompts_that_suit_it():
    assert rewards.default_prompts("ocr@somewhere:2") == "ocr"
    assert rewards.default_prompts("color,geneval:-1") == "geneval"
    assert rewards.default_prompts("color,vlm") == "signs"
    assert {reward.prompts for reward in rewards.REWARDS.values()} == set(rewards.PROMPTS)


# Prompts


def unquoted(prompt):
    return prompt.split('"')[1].casefold()


@parametrize("source, text", [("signs", unquoted), ("ocr", unquoted), ("animals", str)])
def test_no_evaluation_prompt_is_trained_on(source, text):
    """Nor its word (`signs`), nor its text (`ocr`)."""
    train = some_prompts(source, "train", count=3000)
    held_out = some_prompts(source, "eval")
    assert len(set(held_out)) == len(held_out) > 3
    assert {text(p) for p in train}.isdisjoint({text(p) for p in held_out})


def test_the_seed_decides_the_training_prompts_and_no_others():
    first = some_prompts("signs", "train")
    assert first == some_prompts("signs", "train")
    assert first != some_prompts("signs", "train", seed="0, process 1")
    assert some_prompts("signs", "eval") == some_prompts("signs", "eval", seed=1)


GENEVAL_LINE = (
    '{"tag": "counting", "include": [{"class": "clock", "count": 2}], '
    '"exclude": [{"class": "clock", "count": 3}], "prompt": "%s"}'
)


def test_all_of_a_file_is_trained_on_if_evaluation_has_another(tmp_path):
    path = tmp_path / "words.txt"
    words = [f"a {i} b" for i in range(40)]
    path.write_text("\n".join(words))
    stream = rewards.prompts(str(path), "train", whole_file=True)
    assert {prompt for prompt, _ in itertools.islice(stream, 40)} == set(words)


@parametrize("name, line", [("words.txt", "%s"), ("metadata.jsonl", GENEVAL_LINE)])
def test_each_line_of_a_file_is_for_training_or_for_evaluation(tmp_path, name, line):
    source = str(tmp_path / name)
    words = [f"a {i} b" for i in range(40)]
    Path(source).write_text("\n".join(line % word for word in words))
    train = some_prompts(source, "train")
    held_out = some_prompts(source, "eval")
    assert len(train) == 400
    assert 0 < len(held_out) < 20
    assert set(train) | set(held_out) == set(words)
    assert not set(train) & set(held_out)
    prompt, metadata = rewards.read_prompts(source)[7]
    assert (prompt, metadata.pop("where")) == ("a 7 b", f"{source}, line 8")
    assert set(metadata) == ({"tag", "include", "exclude"} if "jsonl" in name else set())


def test_null_is_absent_in_a_prompt_file(tmp_path):
    """As data set exports write the metadata of GenEval."""
    line = '{"prompt": "a", "exclude": null, "include": [{"class": "cat", "color": null}]}'
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    _, metadata = rewards.read_prompts(path)[0]
    assert metadata["include"] == [{"class": "cat"}]
    assert "exclude" not in metadata


# Rewards that are models

TOKENS = "<image> <|image_pad|> <|vision_start|> <|vision_end|> <|im_start|> <|im_end|>".split()
IMAGE, IMAGE_PAD = 198, 199  # the first two, after the tokens of the toy's tokenizer
LAYERS = {"num_hidden_layers": 2, "num_attention_heads": 2}
SIZES = {"hidden_size": 32, "intermediate_size": 48, **LAYERS}
VISION = {**SIZES, "image_size": 32, "patch_size": 8}
TEXT = {**SIZES, "vocab_size": IMAGE + len(TOKENS), "eos_token_id": 1}
GELU = {"hidden_act": "gelu"}


def small_clip():
    text = {**TEXT, **GELU, "max_position_embeddings": 20}
    towers = {"vision_config": {**VISION, **GELU}, "text_config": text}
    return transformers.CLIPModel(transformers.CLIPConfig(projection_dim=24, **towers))


def small_detector():
    counts = {"depths": [1] * 4, "num_heads": [1] * 4, "out_indices": [1, 2, 3, 4]}
    swin = transformers.SwinConfig(embed_dim=8, window_size=2, **counts)
    sizes = {"feature_size": 32, "mask_feature_size": 32, "hidden_dim": 32, "num_labels": 80}
    counts = {"encoder_layers": 1, "decoder_layers": 2, "num_queries": 12}
    return rewards.Mask2Former(
        transformers.Mask2FormerConfig(backbone_config=swin, **sizes, **counts)
    )


def small_llava():
    vision = {"model_type": "clip_vision_model", **VISION}
    text = {"model_type": "llama", **TEXT, "bos_token_id": 0, "pad_token_id": 1}
    towers = {"vision_config": vision, "text_config": text}
    config = transformers.LlavaConfig(image_token_index=IMAGE, **towers)
    return transformers.LlavaForConditionalGeneration(config)


def small_qwen():
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
    text = {**TEXT, "num_key_value_heads": 2, "bos_token_id": 0, "pad_token_id": 1}
    vision = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
    vision |= {"patch_size": 4, "out_hidden_size": 32, "window_size": 16}
    vision["fullatt_block_indexes"] = [1]
    towers = {"vision_config": vision, "text_config": {**text, "rope_parameters": rope}}
    config = transformers.Qwen2_5_VLConfig(image_token_id=IMAGE_PAD, **towers)
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def small_deberta():
    sizes = {**TEXT, "num_hidden_layers": 3, "pos_att_type": ["c2p", "p2c"]}
    config = transformers.DebertaConfig(**sizes, relative_attention=True)
    return transformers.DebertaModel(config)


def small_openclip():
    """OpenCLIP made of torch's own layers, and its state dict under OpenCLIP's names."""
    nn = torch.nn
    towers = []
    for _ in range(2):
        layer = nn.TransformerEncoderLayer(32, 2, 48, 0, "gelu", batch_first=True, norm_first=True)
        tower = nn.Module()
        tower.transformer = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        towers.append(tower)
    model, visual = towers
    model.token_embedding = nn.Embedding(TEXT["vocab_size"], 32)
    model.positional_embedding = nn.Parameter(torch.zeros(20, 32))
    model.ln_final = nn.LayerNorm(32)
    model.text_projection = nn.Parameter(torch.zeros(32, 24))
    model.logit_scale = nn.Parameter(torch.zeros(()))
    visual.conv1 = nn.Conv2d(3, 32, 8, 8, bias=False)
    visual.class_embedding = nn.Parameter(torch.zeros(32))
    visual.positional_embedding = nn.Parameter(torch.zeros(17, 32))
    visual.ln_pre = nn.LayerNorm(32)
    visual.ln_post = nn.LayerNorm(32)
    visual.proj = nn.Parameter(torch.zeros(32, 24))
    model.visual = visual
    torch.manual_seed(0)
    for weight in model.parameters():
        nn.init.normal_(weight, 0, 0.3)
    names = {"layers": "resblocks", "self_attn": "attn", "norm": "ln_"}
    names |= {"linear1": "mlp.c_fc", "linear2": "mlp.c_proj"}
    return model.eval(), renamed(model.state_dict(), names)


def renamed(state, names):
    tensors = {}
    for key, tensor in state.items():
        for ours, theirs in names.items():
            key = key.replace(ours, theirs)
        tensors[key] = tensor
    return tensors


def imagereward_file(model):
    """A model's state dict as ImageReward.pt has it, unused tensors included."""
    names = {
        "vision.encoder.layers": "vision.blocks",
        "self_attn.qkv": "attn.qkv",
        "self_attn.projection": "attn.proj",
        "post_layernorm": "norm",
        "layer_norm": "norm",
        "vision.embeddings.class_embedding": "vision.cls_token",
        "vision.embeddings.position_embedding": "vision.pos_embed",
        "vision.embeddings.patch_embedding": "vision.patch_embed.proj",
        "vision.": "blip.visual_encoder.",
        "text.": "blip.text_encoder.",
        "head.": "mlp.layers.",
    }
    unused = ("text_proj.weight", "vision_proj.bias", "text_encoder.embeddings.position_ids")
    state = {f"blip.{key}": torch.zeros(2) for key in unused}
    return {**renamed(model.state_dict(), names), **state}


def shaken(model):
    """The model with weights large enough for inputs to matter."""
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, 0, 0.3)
    return model.eval()


def save_small_models(root):
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY / "tokenizer")  # a token a letter
    tokenizer.add_special_tokens({"additional_special_tokens": TOKENS})
    processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size=32)
    torch.manual_seed(0)
    models = {
        "vlm/llava": small_llava(),
        "vlm/deberta": small_deberta(),
        "unifiedreward": small_qwen(),
        "geneval/detector": small_detector(),
    }
    clips = ("clipscore", "pickscore", "hpsv2", "aesthetic/clip", "geneval/clip")
    models |= dict.fromkeys(clips, small_clip())
    for folder, model in models.items():
        for part in (shaken(model), tokenizer, processor):
            part.save_pretrained(root / folder)
    qwen = transformers.Qwen2VLImageProcessorPil(patch_size=4, min_pixels=64)
    qwen.save_pretrained(root / "unifiedreward")
    tokenizer.save_pretrained(root / "imagereward")
    blip = shaken(rewards.ImageReward.build(rewards.ImageReward))
    torch.save(imagereward_file(blip), root / "imagereward/ImageReward.pt")
    torch.save({"state_dict": small_openclip()[1]}, root / "hpsv2/HPS_v2.1_compressed.pt")
    head = shaken(rewards.score_head(24)).state_dict()
    (root / "aesthetic/head").mkdir()
    head = {f"layers.{key}": x for key, x in head.items()}
    torch.save(head, root / "aesthetic/head/aesthetic-model.pth")


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """small(name): a reward, with a small model of its kind and its constants scaled down."""
    root = tmp_path_factory.mktemp("models")
    (root / "ocr").symlink_to(TINY)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rewards.ImageReward, "vision", VISION)
        patch.setattr(rewards.ImageReward, "text", {**TEXT, "encoder_hidden_size": 32})
        patch.setattr(rewards.VLM, "layer", 2)
        patch.setattr(rewards.VLM, "max_new_tokens", 6)
        patch.setattr(rewards.UnifiedReward, "max_new_tokens", 6)
        patch.setattr(rewards.UnifiedReward, "size", (32, 32))
        patch.setattr(rewards.GenEval, "shortest", 64)
        patch.setattr(rewards.GenEval, "longest", 96)
        patch.setattr(rewards.GenEval, "threshold", 0.02)
        save_small_models(root)
        yield lambda name: rewards.load(f"{name}@{root / name}", "cpu")


MODELS = "clipscore pickscore hpsv2 aesthetic imagereward vlm unifiedreward geneval".split()
IMAGES = [
    noise_image(1),
    noise_image(2, (40, 40)),
    noise_image(3, (3, 2)),
    noise_image(4, (1, 5000)),
    noise_image(5, (33, 90)).convert("L"),
    noise_image(6, (50, 20)).convert("RGBA"),
    flat_image(),
]
TEXTS = ["two cats", "", "<|image_pad|>", "\u732b\u3068\u72ac", "red bird " * 60, "{brace}", " "]
SEEN = "hot dog,handbag,microwave,sports ball,tennis racket,hot dog,bottle".split(",")  # measured
ENTRIES = []
for name, count, color in zip(SEEN, (12, 9, 4, 10, 3, 2, 5), rewards.COLORS):
    wanted = {"class": name, "count": count, "color": color}
    ENTRIES.append({"tag": "colors", "include": [wanted]})


@parametrize("name", MODELS)
def test_models_score_any_image_and_any_text_whatever_is_beside_it(small, monkeypatch, name):
    def checksum(reply):  # for the small model's gibberish
        return 1 + zlib.crc32(reply.encode()) % 4001 / 1000

    monkeypatch.setattr(rewards, "final_score", checksum)
    reward = small(name)
    scores = reward(IMAGES, TEXTS, ENTRIES)
    assert scores.isfinite().all()
    assert scores.unique().numel() > 1
    for rows in ([3], [3, 0, 6, 1, 5, 2, 4]):
        batch = [[items[i] for i in rows] for items in (IMAGES, TEXTS, ENTRIES)]
        assert_close(reward(*batch), scores[rows], **NEAR)
    reward.batch = 2
    assert_close(reward(IMAGES, TEXTS, ENTRIES), scores, **NEAR)
    crossed = reward(IMAGES, TEXTS[1:] + TEXTS[:1], ENTRIES[1:] + ENTRIES[:1])
    assert torch.allclose(crossed, scores, **NEAR) == (name == "aesthetic")


def test_hpsv2_computes_openclips_image_features(small):
    clip = small("hpsv2").clip
    visual = small_openclip()[0].visual
    pixels = randn(2, 3, 32, 32)
    with torch.no_grad():
        x = visual.conv1(pixels).flatten(2).transpose(1, 2)
        x = torch.cat([visual.class_embedding.expand(2, 1, 32), x], 1)
        x = visual.transformer(visual.ln_pre(x + visual.positional_embedding))
        x = visual.ln_post(x[:, 0]) @ visual.proj
        assert_close(clip.model.get_image_features(pixels).pooler_output, x, **NEAR)


def test_hpsv2_computes_openclips_text_features(small):
    clip = small("hpsv2").clip
    model, _ = small_openclip()
    ids = clip.tokenizer(["a cat"], return_tensors="pt").input_ids
    length = ids.shape[1]
    causal = torch.full((length, length), -math.inf).triu(1)
    with torch.no_grad():
        x = model.token_embedding(ids) + model.positional_embedding[:length]
        x = model.ln_final(model.transformer(x, causal)[:, -1]) @ model.text_projection
        assert_close(clip.model.get_text_features(ids).pooler_output, x, **NEAR)


def test_imagereward_has_the_published_sizes():
    with torch.device("meta"):
        model = rewards.ImageReward.build(PUBLISHED)
    state = imagereward_file(model)
    assert "blip.visual_encoder.blocks.23.norm2.bias" in state
    assert state["blip.visual_encoder.pos_embed"].shape == (1, 197, 1024)
    assert state["blip.text_encoder.embeddings.word_embeddings.weight"].shape == (30524, 768)
    key = state["blip.text_encoder.encoder.layer.11.crossattention.self.key.weight"]
    assert key.shape == (768, 1024)
    assert model["text"].config.num_attention_heads == 12


MISFITS = [
    ({"ln_final.bias": None}, "Missing key.*text_model.final_layer_norm.bias"),
    ({"extra": torch.zeros(1)}, "Unexpected key.*extra"),
    ({"logit_scale": torch.zeros(3)}, "size mismatch for logit_scale"),
    ({"extra": os.mkdir}, "Weights only"),  # a function where a tensor should be
]


@parametrize("change, message", MISFITS)
def test_weights_that_do_not_fit_or_run_code_are_refused(tmp_path, change, message):
    small_clip().config.save_pretrained(tmp_path)
    state = {**small_openclip()[1], **change}
    state = {key: x for key, x in state.items() if x is not None}
    torch.save({"state_dict": state}, tmp_path / "HPS_v2.1_compressed.pt")
    with pytest.raises(Exception, match=f"(?s){message}"):
        rewards.load(f"hpsv2@{tmp_path}", "cpu")


def test_a_model_that_lacks_a_tensor_is_refused(small, tmp_path):
    clip = small("clipscore").clip
    state = clip.model.state_dict()
    del state["logit_scale"]
    for part in (clip.tokenizer, clip.processor):
        part.save_pretrained(tmp_path)
    clip.model.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=r"lacks 1 of the model's tensors: \['logit_scale'\]"):
        rewards.load(f"clipscore@{tmp_path}", "cpu")


def test_imagereward_reads_35_tokens(small):
    reward = small("imagereward")
    text = "abcdefghijklmnopqrstuvwxyz0123456"  # 33, between a start and an end
    a, b, c = scores_of(reward, [IMAGES[0]] * 3, [text, text + "more", text[1:]])
    assert a == b != c


def test_imagereward_masks_padding(small):
    reward = small("imagereward")
    padded = scores_of(reward, IMAGES[:1], ["a cat"])
    tokenizer = reward.tokenizer
    reward.tokenizer = lambda prompts, **options: tokenizer(prompts, return_tensors="pt")
    assert_close(scores_of(reward, IMAGES[:1], ["a cat"]), padded, **NEAR)


def test_imagereward_is_standardized(small):
    reward = small("imagereward")
    score = scores_of(reward, IMAGES[:1])
    reward.mean = 0.0
    reward.std = 1.0
    assert_close((scores_of(reward, IMAGES[:1]) - 0.1671736) / 1.0333395, score)


def test_clip_sees_the_center_in_openais_colors(small):
    """And pickscore is the cosine over the temperature."""
    clip = small("pickscore").clip
    image = noise_image(0, (300, 240))
    pixels = image.resize((40, 32), Image.BICUBIC).crop((4, 0, 36, 32))
    x = torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8).view(32, 32, 3) / 255
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    x = ((x - mean) / std).permute(2, 0, 1)[None]
    ids = clip.tokenizer(["a cat"], return_tensors="pt").input_ids
    with torch.no_grad():
        logit = clip.model(ids, x).logits_per_text[0]
    cosine = scores_of(small("clipscore"), [image], ["a cat"])
    assert_close(logit, cosine * 14.2857, rtol=0, atol=0.07)
    assert_close(scores_of(small("pickscore"), [image], ["a cat"]), cosine * 14.2857, **NEAR)


@parametrize("name, whole", [("hpsv2", True), ("clipscore", False)])
def test_hpsv2_sees_the_whole_image_and_clip_its_center(small, name, whole):
    image = noise_image(0, (12, 144))
    changed = image.copy()
    changed.paste((255, 0, 0), (0, 0, 12, 27))
    a, b = scores_of(small(name), [image, changed])
    assert (abs(a - b) > 1e-4) == whole


def test_hpsv2_pads_with_black_bars(small):
    image = noise_image(0, (16, 32))
    square = Image.new("RGB", (32, 32))
    square.paste(image, (8, 0))
    a, b = scores_of(small("hpsv2"), [image, square])
    assert_close(a, b, **NEAR)


X, Y = [1, 0], [0, 1]
RECALLS = [
    ([X, Y], [X, Y], 1),
    ([X], [X, Y], 0.5),
    ([X, Y], [X], 1),  # what it says besides is free
    ([[5, 0]], [[0.6, 0.8]], 0.6),
    ([Y, [3, 4]], [X, [0, -2]], (0.6 - 0.8) / 2),
    ([], [X], 0),
    ([X], [], 0),
]


@parametrize("candidate, reference, recall", RECALLS)
def test_each_token_of_the_reference_finds_its_nearest(candidate, reference, recall):
    candidate = torch.tensor(candidate).float().view(-1, 2)
    reference = torch.tensor(reference).float().view(-1, 2)
    assert rewards.bertscore_recall(candidate, reference) == pytest.approx(recall)


def test_vlm_asks_what_is_in_the_image_and_looks_for_the_prompt_in_the_answer(small):
    reward = small("vlm")
    questions = []

    def ask(images, texts):
        questions.extend(texts)
        return ["The image contains a cat", "", "The image contains a cat"]

    reward.ask = ask
    prompts = ["a cat", "a cat", "a cat, a dog and eleven birds"]
    same, nothing, less = scores_of(reward, IMAGES[:3], prompts)
    assert same == pytest.approx(1, abs=1e-5)
    assert nothing == 0
    assert less < 0.999
    assert set(questions) == {"Answer concisely: what is going on in this image?"}


def test_bertscore_compares_a_middle_layer_without_special_tokens(small):
    reward = small("vlm")
    path = reward.words.name_or_path
    deberta = transformers.DebertaModel.from_pretrained(path, subfolder="deberta").eval()
    tokens = reward.words("a cat", return_tensors="pt")
    with torch.no_grad():
        states = deberta(**tokens, output_hidden_states=True).hidden_states
        vectors = reward.token_vectors(["a cat", ""])
    assert_close(vectors, [states[2][0, 1:-1], torch.zeros(0, 32)], **NEAR)


REPLIES = {
    "Final Score: **3.75**": 3.75,
    "cat: 1\nFinal Score:\n2.5.": 2.5,
    "Final Score: 2 no, Final Score: 5": 5,
    "**Final Score:** [4]/5": 4,
    "4": None,
    "Final Score: good": None,
    "Final Score: 6": None,
    "Final Score: -3": None,
    "FINAL SCORE: 4": 4,
    "Final Score (1 to 5): 3": None,
    "Final Score: 1 to 5. I give 4": 4,
    "Final Score: 4 out of 5, for 2 cats": 4,
}


@parametrize("reply", REPLIES)
def test_the_score_is_the_number_after_final_score(reply):
    assert rewards.final_score(reply) == REPLIES[reply]


def test_unifiedreward_asks_once_more_about_an_image_without_a_score(small):
    reward = small("unifiedreward")
    asked = []
    replies = [["Final Score: 5", "well", "Final Score: 4"], ["Final Score: 2"]]

    def ask(images, questions, do_sample=False):
        asked.append(questions)
        assert do_sample == (len(asked) == 2)  # or a resumed run would replay the reply
        return replies.pop(0)

    reward.ask = ask
    assert scores_of(reward, IMAGES[:3], ["a dog", "a cat", "a bird"]).tolist() == [5, 2, 4]
    first, second = asked
    assert len(second) == 1
    assert "Text Caption: [a cat]" in second[0]
    assert second[0] not in first


def test_unifiedreward_fails_after_two_replies_without_a_score(small):
    reward = small("unifiedreward")
    reward.ask = lambda images, questions, do_sample=False: ["no"] * len(images)
    with pytest.raises(RuntimeError, match="unifiedreward failed: .* 'no'$"):
        scores_of(reward, IMAGES[:1])


# GenEval

PLACES = {"": (40, 40, 60, 60), "left": (0, 40, 20, 60), "right": (80, 40, 99, 60)}


def detected(words):
    """{class: [Detection]} from words `class:place:color`, best first."""
    objects = {}
    for word in words.split():
        name, place, color = (word + "::").split(":")[:3]
        detection = Detection(0.9, PLACES[place], color=color or None)
        objects.setdefault(name, []).append(detection)
    return objects


def want(name, count=1, **more):
    return {"class": name, "count": count, **more}


def entry(tag, *include, **more):
    return {"tag": tag, "include": list(include), **more}


CAT = entry("single_object", want("cat"))
BOTH = entry("two_object", want("cat"), want("dog"))
CATS = entry("counting", want("cat", 3), exclude=[want("cat", 4)])
RED = entry("colors", want("cat", color="red"))
PAIR = entry("color_attr", want("cat", color="red"), want("dog", color="blue"))
LEFT = entry("position", want("dog"), want("cat", position=["left of", 0]))
RED_LEFT = entry("position", want("dog"), want("cat", color="red", position=["left of", 0]))


VERDICTS = [
    (CAT, "", False, 0),
    (CAT, "cat cat cat cat", True, -2),
    (BOTH, "cat", False, 1 / 2),
    (BOTH, "cat dog", True, 1),
    (CATS, "cat cat", False, 2 / 3),
    (CATS, "cat cat cat", True, 1),
    (CATS, "cat cat cat cat", False, 2 / 3),
    (RED, "cat::red", True, 1),
    (RED, "cat::blue", False, 1 / 2),
    (RED, "cat::red cat::blue", True, 0),
    (RED, "cat::blue cat::red", False, 0),
    (PAIR, "cat::blue dog::red", False, 1 / 2),
    (LEFT, "", False, 0),
    (LEFT, "cat dog:right", True, 1),
    (LEFT, "cat:right dog:left", False, 2 / 3),
    (LEFT, "cat", False, 1 / 3),
    (LEFT, "cat cat:right dog:right", True, 1 / 3),
    (LEFT, "cat dog:left dog:right", False, 1 / 3),
    (RED_LEFT, "cat::red dog:right", True, 1),
    (RED_LEFT, "cat::blue dog:right", False, 2 / 3),
    (RED_LEFT, "cat:right:red dog:left", False, 3 / 4),
]


@parametrize("asked, words, strict, credit", VERDICTS)
def test_genevals_verdicts(asked, words, strict, credit):
    """Strict as the benchmark, which does not mind too many; partial for training."""
    assert rewards.strict_verdict(detected(words), asked) is strict
    assert rewards.partial_credit(detected(words), asked) == pytest.approx(credit)


POSITIONS = {
    (0, 40, 20, 60): {"left of"},
    (40, 0, 60, 20): {"above"},
    (40, 80, 60, 100): {"below"},
    (0, 0, 20, 20): {"left of", "above"},
    (40, 40, 60, 60): set(),
    (80, 52, 100, 72): {"right of"},
    (50, 40, 70, 60): {"right of"},
    (47, 40, 67, 60): set(),  # 3 of 7 are left
}


@parametrize("box", POSITIONS)
def test_positions_are_those_of_centers_outside_a_dead_zone(box):
    assert rewards.relations(box, (40, 40, 60, 60)) == POSITIONS[box]


@pytest.fixture
def logits():
    """Class and mask logits of two cats, a dog, hardly, and a query for nothing."""
    classes = torch.full((4, 81), -9.0)
    classes[0, 15] = classes[1, 15] = classes[3, 80] = 9.0
    classes[2, 16] = -8.0
    masks = torch.full((4, 8, 16), -9.0)
    masks[0, 2:4, 3:7] = 1.0
    masks[1, 5:8, 10:16] = 9.0
    return classes, masks


def test_a_detections_score_is_class_times_mean_mask_probability(logits):
    objects = rewards.instances(*logits, (8, 16), 0.3)
    sure, other = objects.pop("cat")
    assert not any(objects.values())
    assert sure.box == (10, 5, 16, 8)
    assert sure.mask.sum() == 18
    assert other.box == (3, 2, 7, 4)
    assert other.score == pytest.approx(1 / (1 + math.exp(-1)), abs=1e-3)


def test_at_most_16_objects_of_a_class_are_seen(logits):
    classes, masks = logits
    objects = rewards.instances(classes[[1] * 20], masks[[1] * 20], (16, 32), 0.3)
    assert len(objects["cat"]) == 16
    assert objects["cat"][0].mask.shape == (16, 32)


def test_one_query_may_be_of_two_classes(logits):
    logits[0][0, 16] = 9.0
    objects = rewards.instances(*logits, (8, 16), 0.3)
    assert objects["cat"] and objects["dog"]


def test_an_empty_mask_is_no_object(logits):
    classes, masks = logits
    objects = rewards.instances(classes, masks - 20, (8, 16), 0.3)
    assert not any(objects.values())


def test_counting_needs_surer_detections(small, logits):
    reward = small("geneval")
    reward.threshold = 0.3
    classes, masks = logits
    reward.detector = lambda pixel_values: SimpleNamespace(
        class_queries_logits=classes[None], masks_queries_logits=masks[None]
    )
    counts = {}
    for tag in ("single_object", "counting"):
        objects = reward.detect([noise_image(size=(16, 8))], [entry(tag, want("dog"))])[0]
        counts[tag] = len(objects["cat"])
    assert counts == {"single_object": 2, "counting": 1}


def test_an_objects_color_is_that_of_its_pixels_on_gray(small):
    reward = small("geneval")
    crops = []

    def texts(texts):
        words = [re.search(f" ({'|'.join(rewards.COLORS)})", text)[1] for text in texts]
        return torch.eye(10)[[rewards.COLORS.index(word) for word in words]]

    def images(images):
        crops.extend(images)
        is_red = [image.getpixel((1, 0)) == (255, 0, 0) for image in images]
        return torch.eye(10)[[0 if red else 4 for red in is_red]]

    reward.clip = SimpleNamespace(texts=texts, images=images)
    mask = torch.zeros(8, 8, dtype=torch.bool)
    mask[2:6, 3:5] = True
    for color in ("red", "blue"):
        cats = [Detection(1.0, (2, 2, 6, 6), mask) for _ in range(2)]
        reward.name_colors(Image.new("RGB", (8, 8), color), "cat", cats)
        assert [cat.color for cat in cats] == [color, color]
    assert crops[0].size == (4, 4)
    assert crops[0].getpixel((0, 0)) == (153, 153, 153)


def test_geneval_logs_the_share_of_strict_verdicts_and_their_mean_over_tasks(small):
    reward = small("geneval")
    found = [detected(words) for words in ("cat cat cat", "cat", "cat dog")]
    reward.detect = lambda images, metadata: found
    R, values = reward.score(IMAGES[:3], TEXTS[:3], [CATS, CATS, BOTH])
    assert R.tolist() == pytest.approx([1, 1 / 3, 1])
    name = reward.name
    assert values.pop(name) == pytest.approx(7 / 9)
    shares = {"counting": 0.5, "two_object": 1, "overall": 0.75}
    assert values == {f"{name}/{task}": share for task, share in shares.items()}


UNKNOWN = [
    {},
    entry("colors", want("cat", color="mauve")),
    entry("position", want("cat", position=["left of", 0])),
    entry("counting", want("cat"), exclude=[want("cats", 2)]),
]


@parametrize("metadata", UNKNOWN)
def test_metadata_that_geneval_cannot_score_is_refused(small, metadata):
    with pytest.raises(ValueError, match="a.jsonl, line 3: .*geneval.* cannot score 'a cat'"):
        small("geneval").check("a cat", {**metadata, "where": "a.jsonl, line 3"})


@pytest.fixture(scope="module")
def geneval_pairs():
    return list(itertools.islice(rewards.prompts("geneval", "train"), 20000))


def test_genevals_prompts_reach_every_task_and_class(geneval_pairs):
    for pairs in (geneval_pairs, rewards.prompts("geneval", "eval")):
        assert {entry["tag"] for _, entry in pairs[:6]} == set(rewards.TASKS)
        names = {wanted["class"] for _, entry in pairs for wanted in entry["include"]}
        assert names == set(rewards.CLASSES)
        assert len(names) == 80


def test_genevals_splits_are_disjoint_whatever_the_order_of_objects(geneval_pairs):
    splits = []
    for pairs in (geneval_pairs, rewards.prompts("geneval", "eval")):
        parts = [prompt.removeprefix("a photo of ").split(" and ") for prompt, _ in pairs]
        splits.append({frozenset(words) for words in parts})
    assert splits[0].isdisjoint(splits[1])


def test_genevals_metadata_says_what_the_prompt_says(small, geneval_pairs):
    reward = small("geneval")
    for prompt, entry in geneval_pairs[:3000]:
        reward.check(prompt, entry)
        first, last = entry["include"][0], entry["include"][-1]
        if entry["tag"] == "counting":
            number = ["two", "three", "four"][first["count"] - 2]
            assert f" {number} " in prompt
            assert entry["exclude"] == [want(first["class"], first["count"] + 1)]
        if entry["tag"] == "position":
            pattern = f"{last['class']} {last['position'][0]} .*{first['class']}$"
            assert re.search(pattern, prompt)
        for wanted in entry["include"]:
            assert wanted.get("color", "") in prompt


def test_genevals_prompts_are_english(geneval_pairs):
    text = "\n".join(prompt for prompt, _ in geneval_pairs)
    assert not re.search(r"\ba [aeio]|\ban [^aeiou]", text)
    examples = "an umbrella, a red umbrella, an orange cup, a pair of red scissors, three knives, "
    examples += "two pairs of skis, three heads of broccoli, four people, two buses, two benches"
    for words in examples.split(", "):
        assert re.search(rf"\b{words}\b", text), words
