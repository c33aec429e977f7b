"""DDPO, Denoising Diffusion Policy Optimization (Black et al. 2023, arXiv 2305.13301), in one file.

Fine-tune a text-to-image model so that its images score higher under a reward r(x, c), by treating its
sampler as a policy. Denoising is a Markov decision process of T steps,

    state (c, t, x_t)        action x_{t-1}        reward r(x_0, c) after the last step, 0 before it

and the policy is the sampler's own step, a Gaussian: p(x_{t-1} | x_t, c) = N(mean(x_t, t, c), std_t^2). An
image's likelihood is intractable; that of each step is exact, and suffices. Up to a factor per prompt,

    grad E[r] = E_p[ sum_t A grad log p(x_{t-1} | x_t, c) ]             the score function estimator, `sf`
              ~ E_old[ sum_t A grad (p / p_old)(x_{t-1} | x_t, c) ]     importance sampling, `is`

A is the advantage: the reward less the prompt's mean, over its standard deviation. p_old, the policy at the
start of the epoch, draws the images. `sf` is exact only while that is the policy, so it allows one update;
`is` weighs a step by how much likelier it has become, and allows several. Clipping, as in PPO, stops what
pushes a ratio further from 1. No gradient passes through the chain: activations are held for one step at a
time. The loop, in `train`:

    for each epoch:
        draw images by stochastic steps; keep their states and log p_old of each step                (rollout)
        score them, and turn rewards into advantages                                        (PromptStatistics)
        for each update, on its share of the images, step by step:                          (policy_gradients)
            log p of the step that was taken, under the policy as it is now         (ddim_step, flow_sde_step)
            is: max(-A ratio, -A clipped ratio), sf: -A log p  (importance_sampling_loss, score_function_loss)

The paper's baselines, `rwr` and `rwr-sparse`, train the denoising loss on the model's own images, weighted by
reward or on the best alone (regression_gradients). One loop serves UNets (Stable Diffusion 1.x, with DDIM's
step) and Stable Diffusion 3.x (with a flow's SDE). Under torchrun, several GPUs share an update's images.

    python ddpo.py --preset tiny                  # the bundled toy model, on any CPU, in minutes
    python ddpo.py --reward compressibility       # Stable Diffusion 1.4 learns to compress well, on one GPU
"""

import argparse
import contextlib
import itertools
import json
import math
import re
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Literal, get_args

import torch
import torch.nn as nn
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import rewards

TINY = Path(__file__).resolve().parent / "tiny-sd3"


@dataclass
class Settings:
    """All that a run depends on. The command line is made from it; a preset is a set of other defaults."""

    # model
    preset: Annotated[Literal["compressibility", "aesthetic", "alignment", "tiny", None], "by reward"] = None
    model: Annotated[str, "a Stable Diffusion 1.x or 3.x folder or repo"] = "CompVis/stable-diffusion-v1-4"
    dtype: Annotated[Literal["auto", "bf16", "fp32"], "of frozen weights; auto: the faster"] = "auto"
    height: Annotated[int, "image height in pixels"] = 512
    width: Annotated[int, "image width in pixels"] = 512
    max_sequence_length: Annotated[int, "T5 tokens per prompt (Stable Diffusion 3)"] = 128
    rank: Annotated[int, "LoRA rank"] = 16
    alpha: Annotated[float, "LoRA scale is alpha / rank"] = 32
    lora: Annotated[str | None, "start from the LoRA in this folder, such as runs/NAME/best"] = None
    # rollout
    reward: Annotated[str, "name[@path-or-repo][:weight], joined by commas"] = "compressibility"
    reward_batch: Annotated[int, "images that a reward model is shown at once"] = 16
    prompts: Annotated[str | None, "prompt set, or .txt or .jsonl file; by default the reward's own"] = None
    images: Annotated[int, "images per epoch"] = 256
    group_size: Annotated[int, "images per prompt in an epoch (1: each image draws its own)"] = 1
    steps: Annotated[int | None, "denoising steps; by default 50, or 10 for Stable Diffusion 3"] = None
    random_steps: Annotated[int | None, "first steps, with noise; by default all (SD 3: but the last)"] = None
    guidance: Annotated[float | None, "guidance, in training, too; by default 5, or 4.5 for SD 3"] = None
    eta: Annotated[float, "noise of DDIM's step (Stable Diffusion 1.x)"] = 1.0
    noise_level: Annotated[float, "noise of the flow's SDE step (Stable Diffusion 3)"] = 0.7
    micro_batch: Annotated[int, "images in a forward pass, in sampling as in training"] = 8
    decode_batch: Annotated[int, "images decoded at once"] = 8
    # loss
    algorithm: Annotated[Literal["is", "sf", "rwr", "rwr-sparse"], "DDPO's or a baseline"] = "is"
    updates: Annotated[int | None, "optimizer steps per epoch; by default 4, or 1 for sf"] = None
    clip: Annotated[float, "is: the ratio is clipped to 1 plus and minus this"] = 1e-4
    advantage_clip: Annotated[float, "advantages are clipped to plus and minus this"] = 5.0
    stat_buffer: Annotated[int, "rewards remembered of each prompt, for its mean and deviation"] = 32
    stat_min: Annotated[int, "with fewer rewards than this, all of the epoch's stand in"] = 16
    temperature: Annotated[float, "rwr: weights are softmax(advantage / temperature)"] = 0.2
    keep: Annotated[float, "rwr-sparse: share of the images that is trained on"] = 0.1
    train_timesteps: Annotated[int | None, "random steps per update, by default all (rwr: noisings)"] = None
    # optimisation
    epochs: Annotated[int, "epochs in all (0: only evaluate)"] = 100
    lr: Annotated[float, "AdamW learning rate"] = 3e-4
    weight_decay: Annotated[float, "AdamW weight decay"] = 1e-4
    ema: Annotated[float, "decay per step of the average that is evaluated and saved"] = 0.9
    grad_checkpoint: Annotated[bool, "recompute blocks in the backward pass, to save memory"] = True
    compile: Annotated[bool, "torch.compile each block (see that first_ratio_error stays 0)"] = False
    # run
    name: Annotated[str | None, "the run's folder is runs/NAME; by default preset, reward and seed"] = None
    seed: Annotated[int, "fixes the whole run on one device"] = 0
    device: Annotated[str | None, "cuda, cpu ...; by default cuda where there is one"] = None
    eval_every: Annotated[int, "epochs between evaluations"] = 10
    eval_images: Annotated[int, "images of held-out prompts, from the same noise every time"] = 128
    eval_order: Annotated[int, "solver of a flow's evaluations: 2 is DPM-Solver++(2M), 1 Euler"] = 2
    eval_rewards: Annotated[str | None, "more rewards, as for --reward, for evaluations only"] = None
    eval_prompts: Annotated[str | None, "evaluate on all prompts of this .txt or .jsonl file"] = None
    resume: Annotated[str | None, "resume the run in this folder, with its settings"] = None
    checkpoint: Annotated[Literal["last", "best"], "what --resume starts from"] = "last"
    wandb: Annotated[str | None, "also log to this Weights & Biases project"] = None


PRESETS = {
    "compressibility": dict(reward="compressibility", prompts="animals"),
    "aesthetic": dict(reward="aesthetic", prompts="animals"),
    "alignment": dict(reward="vlm", prompts="activities"),
    # The clip is for log-probabilities averaged over 2,048 latents here, and over 16,384 in the paper.
    "tiny": dict(model=str(TINY), reward=f"ocr@{TINY}", prompts="signs", height=32, width=64, device="cpu",
                 max_sequence_length=1, images=192, group_size=8, stat_min=8, guidance=1.0, random_steps=3,
                 clip=1e-3, micro_batch=96, decode_batch=96, lr=6e-4, ema=0.97, epochs=60, grad_checkpoint=False,
                 eval_images=512, eval_rewards=f"ocr@{TINY}/judge,clipscore@{TINY}/clip,color"),
}


# The mathematics: pure functions, in the order in which the loop calls them

def gaussian_step(mean, std, prev=None, generator=None):
    """The step, prev or else drawn, (B, C, H, W), and its log-probability under N(mean, std^2), (B,).

    That is averaged, not summed, over the D numbers, as in the authors' code: the ratio of two policies is
    that of their densities to the power of 1/D, and hardly leaves 1. The clip of 1e-4 is made for D = 16,384.
    """
    if prev is None:
        noise = torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
        prev = (mean + std * noise).detach()  # an action: log_prob's gradient must not go through it
    log_prob = -(prev - mean).square() / (2 * std**2) - torch.log(std) - math.log(2 * math.pi) / 2
    return prev, log_prob.mean((1, 2, 3))


def ddim_step(output, x, t, t_prev, alphas_cumprod, eta=1.0, prev=None, prediction_type="epsilon",
              generator=None):
    """One step of DDIM from x_t to x_{t_prev}, and its log-probability: the policy of a UNet.

    (Song et al. 2021, arXiv 2010.02502, eq. 12; the variance is eta^2 times that of eq. 16.) At eta = 1 it is
    DDPM's ancestral step. Before the first timestep (t_prev < 0) the image's alpha is alphas_cumprod[0].
    output, an "epsilon" or a "v_prediction", x, prev (B, C, H, W); t, t_prev () or (B,) long; alphas_cumprod
    (1000,). Returns x_prev and log_prob (B,), nan at eta = 0 (no density). ValueError for other predictions.
    """
    alpha, alpha_prev = (alphas_cumprod[i.clamp(min=0)].view(-1, 1, 1, 1) for i in (t, t_prev))
    a, b = alpha.sqrt(), (1 - alpha).sqrt()  # x = a x0 + b noise
    if prediction_type == "epsilon":
        x0, noise = (x - b * output) / a, output
    elif prediction_type == "v_prediction":
        x0, noise = a * x - b * output, a * output + b * x
    else:
        raise ValueError(f"prediction_type {prediction_type!r}: epsilon or v_prediction")
    std = eta * ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)).sqrt()
    mean = alpha_prev.sqrt() * x0 + (1 - alpha_prev - std**2).clamp(min=0).sqrt() * noise
    return gaussian_step(mean, std, prev, generator)


def flow_sde_step(v, x, sigma, sigma_next, sigma_max, noise_level=0.7, prev=None, generator=None):
    """One step of a flow's SDE from sigma to sigma_next, and its log-probability: the policy of an SD 3.

    (Liu et al. 2025, Flow-GRPO, arXiv 2505.05470, eq. 9.) The SDE has the marginals of the flow's ODE: noise
    comes in, and the score, which the velocity knows, takes as much out. With dt = sigma_next - sigma,

        s = noise_level sqrt(sigma / (1 - sigma)), with sigma_max, the schedule's second, below at sigma = 1
        mean = x (1 + s^2 dt / (2 sigma)) + v (1 + s^2 (1 - sigma) / (2 sigma)) dt,        std = s sqrt(-dt)

    v, x, prev (B, C, H, W); sigmas () or (B,). Returns x_prev and log_prob (B,), nan at s = 0, Euler's step.
    """
    sigma, dt = sigma.view(-1, 1, 1, 1), (sigma_next - sigma).view(-1, 1, 1, 1)
    s = noise_level * (sigma / (1 - torch.where(sigma == 1, sigma_max, sigma))).sqrt()
    mean = x * (1 + s**2 * dt / (2 * sigma)) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    return gaussian_step(mean, s * (-dt).sqrt(), prev, generator)


def sample_ode(velocity, noise, sigmas, order=2):
    """Integrate dx/dsigma = v from noise to an image by DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095).

    In flow form alpha = 1 - sigma and lambda = log(alpha / sigma); a step from s to t is
    x_t = D + (t / s) (x_s - D). At first order, Euler's method, D is the data prediction x0 = x - sigma v; at
    second it is extrapolated in lambda from the last two. First order is kept where that would overshoot: in
    the first step, in the last, and in any more than twice as long in lambda as the one before.

    velocity(x, sigma ()) -> (B, C, H, W); noise (B, C, H, W); sigmas (S + 1,), descending, the last one 0.
    Returns x0 (B, C, H, W). ValueError for other sigmas.
    """
    if sigmas[-1] != 0 or (sigmas.diff() >= 0).any():
        raise ValueError(f"sigmas must descend to 0, not {sigmas.tolist()}")
    x, before, log_snr = noise, None, torch.log((1 - sigmas) / sigmas)
    for i, (s, t) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        D = x0 = x - s * velocity(x, s)
        if order == 2 and i > 0:
            ratio = (log_snr[i + 1] - log_snr[i]) / (log_snr[i] - log_snr[i - 1])
            if ratio <= 2:  # 0 after sigma = 1, infinite before 0
                D = x0 + ratio / 2 * (x0 - before)
        x = D + t / s * (x - D)
        before = x0
    return x


class PromptStatistics:
    """Advantages (R - mean) / std with each prompt's own running mean and standard deviation.

    (Black et al. 2023, sec. 5.) A prompt's last `buffer` rewards are remembered; while they are fewer than
    `minimum`, the mean and deviation of all of the epoch's stand in. So no image is praised for its prompt.
    """

    def __init__(self, buffer=32, minimum=16, rewards=None):
        self.buffer, self.minimum, self.rewards = buffer, minimum, {} if rewards is None else rewards

    def advantages(self, prompts, rewards, clip=5.0):
        """prompts: N str; rewards (N,), remembered from now on. Returns (N,), within plus and minus clip."""
        rewards = rewards.double()  # else rounding gives equal rewards an advantage
        for prompt, reward in zip(prompts, rewards.tolist()):
            self.rewards[prompt] = [*self.rewards.get(prompt, []), reward][-self.buffer:]
        known = [self.rewards[prompt] for prompt in prompts]
        known = [rewards.new_tensor(own) if len(own) >= self.minimum else rewards for own in known]
        mean = torch.stack([values.mean() for values in known])
        std = torch.stack([values.std(correction=0) for values in known])
        return ((rewards - mean) / (std + 1e-6)).clamp(-clip, clip).float()


def score_function_loss(log_prob, advantages):
    """-mean A log p, all (B,), of images from this very policy (Black et al. 2023, sec. 4.3, DDPO_SF)."""
    return -(advantages * log_prob).mean()


def importance_sampling_loss(log_prob, old_log_prob, advantages, clip=1e-4):
    """mean max(-A ratio, -A clamp(ratio, 1 - clip, 1 + clip)), ratio = p / p_old. All (B,).

    (Black et al. 2023, sec. 4.3, DDPO_IS, clipped as in PPO, arXiv 1707.06347, eq. 7.) A ratio that
    has moved by more than clip in the advantage's direction has no gradient.
    """
    ratio = torch.exp(log_prob - old_log_prob)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)).mean()


def rwr_weights(advantages, temperature=0.2):
    """Reward-weighted regression: softmax(A / temperature) over the N images, times N: 1 on average."""
    return torch.softmax(advantages / temperature, 0) * len(advantages)


def best_images(advantages, keep=0.1):
    """Indices of the best `keep` of N images, repeated to N: rwr-sparse trains on these alone."""
    N, count = len(advantages), max(round(keep * len(advantages)), 1)
    return advantages.topk(count).indices[torch.arange(N) % count]


# The algorithm

def guided(family, x, i, cond, uncond, guidance):
    """The network's prediction, or with guidance out(uncond) + guidance (out(c) - out(uncond)).

    (Ho and Salimans 2022.) Sampling and training both come through here, with the same rows in a batch: other
    shapes or kernels round differently, and the ratio of the first update would not be exactly 1.
    """
    if guidance == 1.0:
        return family.predict(x, i, cond)
    both = [torch.cat([e.expand_as(c), c]) for e, c in zip(uncond, cond)]
    i = torch.cat([i, i]) if isinstance(i, torch.Tensor) else i
    out_uncond, out_cond = family.predict(torch.cat([x, x]), i, both).chunk(2)
    return out_uncond + guidance * (out_cond - out_uncond)


@torch.no_grad()
def rollout(family, noise, cond, uncond, shares, args, generator=None, mine=None):
    """Draw images from x_T = noise (N, C, h, w) and N rows of cond, in the batches of the updates.

    The first R = args.random_steps steps have noise. The others have none, hence no log-probability: to the
    gradient they are a part of the environment. Returns x_0 (N, C, h, w); the states from x_T on of the
    random steps (N, R + 1, C, h, w), on the CPU if over a quarter of the GPU's free memory; and log p (N, R).
    Only rows of `mine`, where given, are drawn; the batches of other processes are left empty.
    """
    R, x0 = args.random_steps, torch.empty_like(noise)
    large = noise.is_cuda and 4 * (R + 1) * noise.numel() > torch.cuda.mem_get_info(noise.device)[0] / 4
    states = torch.empty(len(noise), R + 1, *noise.shape[1:], device="cpu" if large else noise.device)
    states[:, 0], log_probs = noise, noise.new_empty(len(noise), R)
    batches = [rows for share in shares for rows in share.split(args.micro_batch)]
    for rows in tqdm(batches, desc="sample", leave=False):
        x, here = noise[rows], [t[rows] for t in cond]
        if mine is not None and rows[0] not in mine:  # another process's: only draw its random numbers
            for _ in range(args.steps):
                torch.randn(x.shape, generator=generator, device=x.device)
            continue
        for i in range(args.steps):
            output = guided(family, x, i, here, uncond, args.guidance)
            x, log_prob = family.step(output, x, i, noise=float(i < R), generator=generator)
            if i < R:
                states[rows, i + 1], log_probs[rows, i] = x.to(states.device), log_prob
        x0[rows] = x
    return x0, states, log_probs


def policy_gradients(family, states, log_probs, advantages, cond, uncond, share, steps, args):
    """Add the gradients of one update, on its share of the images, one denoising step of `steps` at a time.

    Returns what to log: means over images and steps of the loss, of PPO's approx_kl = (log ratio)^2 / 2, and
    of whether a ratio is beyond the clip; and the greatest |ratio - 1|. Log-probabilities are averaged ones.
    """
    logs = dict.fromkeys(("loss", "approx_kl", "clip_fraction", "ratio_error"), 0.0)
    for rows in share.split(args.micro_batch):
        here, A = [t[rows] for t in cond], advantages[rows]
        for i in steps:
            x, prev, old = states[rows, i].to(A.device), states[rows, i + 1].to(A.device), log_probs[rows, i]
            log_prob = family.step(guided(family, x, i, here, uncond, args.guidance), x, i, prev)[1]
            loss = (score_function_loss(log_prob, A) if args.algorithm == "sf" else
                    importance_sampling_loss(log_prob, old, A, args.clip))
            weight = len(rows) / len(share) / len(steps)
            (weight * loss).backward()
            change = log_prob.detach() - old
            error = change.expm1().abs()  # |ratio - 1|; a float32 near 1 has few digits for it
            logs["loss"] += weight * loss.item()
            logs["approx_kl"] += weight * change.square().mean().item() / 2
            logs["clip_fraction"] += weight * (error > args.clip).float().mean().item()
            logs["ratio_error"] = max(logs["ratio_error"], error.max().item())
    return logs


def regression_gradients(family, x0, weights, cond, uncond, share, args, generator):
    """The baselines' update: the denoising loss mean w |output - target|^2 on the model's own images x0.

    Each is noised args.train_timesteps times, to the sampler's levels, with its guidance, as the authors do.
    """
    total = 0.0
    for rows in share.split(args.micro_batch):
        here = [t[rows] for t in cond]
        for _ in range(args.train_timesteps):
            i = torch.randint(args.steps, (len(rows),), generator=generator, device=x0.device)
            noise = torch.randn(x0[rows].shape, generator=generator, device=x0.device)
            x, target = family.add_noise(x0[rows], noise, i)
            error = (guided(family, x, i, here, uncond, args.guidance) - target).square().mean((1, 2, 3))
            loss = (weights[rows] * error).mean() * len(rows) / len(share) / args.train_timesteps
            loss.backward()
            total += loss.item()
    return {"loss": total}


@torch.no_grad()
def generate(family, noise, cond, uncond, args):
    """Draw images to evaluate, without noise: x_T (N, C, h, w) to x_0, of a flow by --eval-order."""
    batches, latents = torch.arange(len(noise)).split(args.micro_batch), []
    if family.sigmas is None:
        return rollout(family, noise, cond, uncond, batches, replace(args, random_steps=0))[0]
    for rows in tqdm(batches, desc="evaluate", leave=False):
        here, i = [t[rows] for t in cond], itertools.count()
        velocity = lambda x, sigma: guided(family, x, next(i), here, uncond, args.guidance)  # noqa
        latents.append(sample_ode(velocity, noise[rows], family.sigmas, args.eval_order))
    return torch.cat(latents)


def train(args):
    """Sample, score, improve (Black et al. 2023, sec. 4). Returns the run's folder."""
    folder, device = rewards.open_run(args)
    process, world_size = rewards.processes()
    reward, judge, stream, held_out, held_out_metadata = rewards.load_task(args, device)
    family = load_family(args, device)
    given, args = args, family.args  # for args.json, and with what was None filled in
    N, regression = args.images, args.algorithm.startswith("rwr")
    if world_size > 1 and (regression or N % (args.updates * args.micro_batch * world_size)):
        raise ValueError(f"{world_size} processes need --algorithm is or sf, and --images a multiple "
                         f"of {world_size} x --updates x --micro-batch ({args.updates} x {args.micro_batch})")
    network, scale = family.network, family.pipe.vae_scale_factor
    shape = network.config.in_channels, args.height // scale, args.width // scale  # of an image's latents

    torch.manual_seed(args.seed)
    generator = torch.Generator(device).manual_seed(args.seed)  # not for LoRA, prompts, evaluations
    held_out_cond, uncond = encode(family, held_out), encode(family, [""])
    adapters = "policy", "ema"  # one learns, the other is its moving average, which is judged and saved
    layers = add_lora(network, family.target_modules, args.rank, args.alpha, adapters)
    if args.lora:
        for adapter in adapters:
            load_lora(Path(args.lora, "pytorch_lora_weights.safetensors"), layers, adapter, family.prefix)
    blocks = [module for module in network.modules() if type(module).__name__ in family.blocks]
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # a graph for each kind of block, in each of its uses
        for block in blocks:
            block.forward = torch.compile(block.forward)
    if args.grad_checkpoint:
        checkpoint_blocks(blocks, layers)
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, args.lr, (0.9, 0.999), 1e-8, args.weight_decay)
    progress = {"epoch": 0, "step": 0, "prompts": 0, "images": 0, "seconds": 0.0, "best": -math.inf,
                "best_by": [args.reward, args.prompts, args.eval_prompts, args.eval_images, args.steps,
                            args.guidance, args.eval_order], "statistics": {}}
    if args.resume:
        restore(folder / args.checkpoint, layers, optimizer, generator, progress, args)
        stream = itertools.islice(stream, progress["prompts"], None)
    statistics = PromptStatistics(args.stat_buffer, args.stat_min, progress["statistics"])
    if args.epochs or not args.resume:
        rewards.write_aside(folder / "args.json", json.dumps(asdict(given), indent=2))

    def evaluate():
        """Draw the held-out prompts with `ema`, always from the same noise; score, log and show them."""
        if process:
            return
        noise = torch.randn(len(held_out), *shape, generator=torch.Generator().manual_seed(1234)).to(device)
        with use_adapter(layers, "ema"):
            images = decode(family, generate(family, noise, held_out_cond, uncond, args), args.decode_batch)
        mean = rewards.evaluate(folder, args, progress, reward, judge, images, held_out, held_out_metadata)
        if args.epochs and mean > progress["best"]:
            progress["best"] = mean
            save(folder / "best", layers, optimizer, generator, progress, family.prefix)

    K, T, start = args.group_size, args.train_timesteps, progress["epoch"]
    sparse = args.algorithm == "rwr-sparse"
    in_order = torch.arange(N).split(N // args.updates)  # each update's share of the images
    # Under torchrun, each process draws the random numbers of all, and keeps those of its own batches.
    own = lambda rows: torch.cat(rows.split(args.micro_batch)[process::world_size])  # noqa
    mine = torch.cat([own(share) for share in in_order])
    if not (args.resume and args.epochs):  # a resumed run has done it
        evaluate()
    if args.epochs:
        save(folder / "last", layers, optimizer, generator, progress, family.prefix)
    for epoch in tqdm(range(start, args.epochs), desc=folder.name, initial=start, total=args.epochs):
        clock = [time.perf_counter()]

        # 1. Act: every image is a trajectory of decisions.
        drawn = list(itertools.islice(stream, N // K))
        cond = [t[torch.arange(N) // K] for t in encode(family, [prompt for prompt, _ in drawn])]
        noise = torch.randn(N, *shape, generator=generator, device=device)
        x0, states, log_probs = rollout(family, noise, cond, uncond, in_order, args, generator, mine)
        images = decode(family, x0[mine], args.decode_batch)
        clock.append(time.perf_counter())

        # 2. Score.
        prompts, metadata = zip(*[pair for pair in drawn for _ in range(K)])
        scores = reward.score(images, [prompts[i] for i in mine], [metadata[i] for i in mine])
        R, parts = rewards.gather_scores(scores, mine)  # (N,)
        A = statistics.advantages(prompts, R, args.advantage_clip).to(device)
        clock.append(time.perf_counter())

        # 3. Improve, each update on its share of the images.
        shares, logs = in_order, []
        if regression:
            weights = torch.ones_like(A) if sparse else rwr_weights(A, args.temperature)
            order = torch.randperm(N, generator=generator, device=device)
            shares = (best_images(A, args.keep)[order] if sparse else order).split(N // args.updates)
        for share in tqdm(shares, desc="train", leave=False):
            if regression:
                entry = regression_gradients(family, x0, weights, cond, uncond, share, args, generator)
            else:
                steps = torch.randperm(args.random_steps, generator=generator, device=device)[:T].tolist()
                entry = policy_gradients(family, states, log_probs, A, cond, uncond, own(share), steps, args)
            rewards.average_over_processes([p.grad for p in parameters])
            entry["grad_norm"] = nn.utils.clip_grad_norm_(parameters, 1.0).item()
            if not math.isfinite(entry["loss"] + entry["grad_norm"]):
                raise FloatingPointError("the loss is {loss:g}, its gradient's norm {grad_norm:g}: stopped "
                                         "before the optimizer step, try a smaller --lr".format(**entry))
            optimizer.step()
            optimizer.zero_grad()
            progress["step"] += 1
            ema_update(layers, "ema", min(args.ema, (1 + progress["step"]) / (10 + progress["step"])))
            logs.append(entry)
        del states  # before the next are drawn
        clock.append(time.perf_counter())

        seconds = [end - begin for begin, end in itertools.pairwise(clock)]
        for key, more in {"epoch": 1, "prompts": len(drawn), "images": N, "seconds": sum(seconds)}.items():
            progress[key] += more
        values = {key: sum(entry[key] for entry in logs) / len(logs) for key in logs[0]}
        if not regression:  # the first update starts from p_old: without --compile this is 0
            values["first_ratio_error"] = logs[0]["ratio_error"]
        numbers = torch.tensor([*values.values()], dtype=torch.float64)
        rewards.average_over_processes([numbers])  # also of their largest ratios
        values = dict(zip(values, numbers.tolist()))
        rewards.log_epoch(folder, args, progress, R, parts, values, seconds, device)
        if (epoch + 1) % args.eval_every == 0 or epoch + 1 == args.epochs:
            evaluate()
        save(folder / "last", layers, optimizer, generator, progress, family.prefix)
    return folder


# LoRA and gradient checkpointing, by hand

class LoRALinear(nn.Module):
    """A frozen linear layer plus one of several low-rank updates: y = W x + (alpha / rank) B A x.

    (Hu et al. 2021, arXiv 2106.09685.) `active` names the update in use; None is the pretrained layer, to the
    bit. A is Gaussian and B zero, so updates start as nothing; the first is trainable. Stored in float32.
    """

    def __init__(self, base, rank, alpha, adapters):
        super().__init__()
        self.base, self.scale, self.active = base.requires_grad_(False), alpha / rank, adapters[0]
        A = torch.randn(rank, base.in_features, device=base.weight.device) / rank
        B = torch.zeros(base.out_features, rank, device=base.weight.device)
        self.A = nn.ParameterDict({name: nn.Parameter(A.clone(), name == adapters[0]) for name in adapters})
        self.B = nn.ParameterDict({name: nn.Parameter(B.clone(), name == adapters[0]) for name in adapters})

    def forward(self, x):
        if self.active is None:
            return self.base(x)
        A, B = self.A[self.active].to(x.dtype), self.B[self.active].to(x.dtype)
        flat = x.flatten(0, -2)  # else matmul may take another kernel where gradients are recorded
        return (self.base(flat) + flat @ A.T @ (self.scale * B).T).view(*x.shape[:-1], -1)


def add_lora(model, target_modules, rank, alpha, adapters=("policy",)):
    """Freeze `model` and put a LoRALinear in place of each linear layer whose name ends in a target.

    Returns {layer name: LoRALinear}; ValueError if nothing matches. (`attn2.to_q`, SD3.5's second attention,
    does not end in `attn.to_q`.)
    """
    model.requires_grad_(False)
    layers = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and f".{name}".endswith(tuple(f".{end}" for end in target_modules)):
            parent, _, child = name.rpartition(".")
            layers[name] = LoRALinear(module, rank, alpha, adapters)
            setattr(model.get_submodule(parent), child, layers[name])
    if not layers:
        raise ValueError(f"no linear layer of {type(model).__name__} is named {' or '.join(target_modules)}")
    return layers


@contextlib.contextmanager
def use_adapter(layers, name):
    """Inside, every layer computes with adapter `name`, or as pretrained where it is None."""
    before = next(iter(layers.values())).active
    try:
        for layer in layers.values():
            layer.active = name
        yield
    finally:
        for layer in layers.values():
            layer.active = before


@torch.no_grad()
def ema_update(layers, name, decay):
    """Let adapter `name` follow the policy: decay * itself + (1 - decay) * policy, A and B each."""
    for layer in layers.values():
        for weights in (layer.A, layer.B):
            weights[name].lerp_(weights["policy"], 1 - decay)


def save_lora(path, layers, adapter="policy", prefix="transformer"):
    """Write an adapter as diffusers' `load_lora_weights` takes it, the scale alpha / rank folded into B."""
    tensors = {}
    for name, layer in layers.items():
        tensors[f"{prefix}.{name}.lora_A.weight"] = layer.A[adapter].detach().cpu()
        tensors[f"{prefix}.{name}.lora_B.weight"] = layer.scale * layer.B[adapter].detach().cpu()
    rewards.write_aside(path, lambda aside: save_file(tensors, aside))


def load_lora(path, layers, adapter="policy", prefix="transformer"):
    """Read a file of `save_lora`, or of diffusers, into an adapter. ValueError if it does not fit.

    As in diffusers, alpha is the rank unless the file's metadata says otherwise.
    """
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}
        config = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    alpha, r, *unlike = (config.get(f"{prefix}.{key}") for key in (
        "lora_alpha", "r", "use_rslora", "use_dora", "alpha_pattern", "rank_pattern"))
    own = {f"{prefix}.{name}.lora_{part}.weight": getattr(layer, part)[adapter]
           for name, layer in layers.items() for part in "AB"}
    shapes, found = ({key: tensor.shape for key, tensor in side.items()} for side in (own, tensors))
    if shapes != found or any(unlike):
        raise ValueError(f"{path} is no plain LoRA of these layers and this rank: see --model and --rank")
    scale = (alpha / r if alpha else 1) / next(iter(layers.values())).scale
    with torch.no_grad():
        for key, weights in own.items():
            weights.copy_(tensors[key] * (scale if ".lora_B." in key else 1))


class Checkpoint(torch.autograd.Function):
    """Run a block and keep only its inputs; run it again when its gradient is asked for.

    (Chen et al. 2016, arXiv 1604.06174.) Memory for activations falls from all blocks to one, for one extra
    forward. `tensors` are the block's `count` inputs, then its trainable parameters: autograd sees both.
    """

    @staticmethod
    def forward(ctx, run, count, *tensors):
        ctx.run, ctx.count = run, count
        ctx.save_for_backward(*tensors)
        return run(*tensors[:count])

    @staticmethod
    def backward(ctx, *grads):
        inputs = [t.detach().requires_grad_(t.requires_grad) for t in ctx.saved_tensors[:ctx.count]]
        with torch.enable_grad():
            outputs = ctx.run(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        outputs, grads = zip(*[(y, g) for y, g in zip(outputs, grads) if y is not None and y.requires_grad])
        sources = [*inputs, *ctx.saved_tensors[ctx.count:]]
        wanted = [t for t in sources if t.requires_grad]
        found = iter(torch.autograd.grad(outputs, wanted, grads, allow_unused=True))
        return None, None, *[next(found) if t.requires_grad else None for t in sources]


def checkpoint_blocks(blocks, layers):
    """Checkpoint these modules, whatever their arguments. The second run of each uses the first's adapter."""
    for block in blocks:
        def forward(*args, block=block, run=block.forward, **kwargs):
            values, count = {**dict(enumerate(args)), **kwargs}, len(args)
            names = [key for key, value in values.items() if isinstance(value, torch.Tensor)]
            tensors, adapter = [values.pop(key) for key in names], next(iter(layers.values())).active

            def rerun(*tensors):
                filled = {**values, **dict(zip(names, tensors))}
                with use_adapter(layers, adapter):
                    return run(*[filled.pop(i) for i in range(count)], **filled)

            parameters = [p for p in block.parameters() if p.requires_grad]
            return Checkpoint.apply(rerun, len(tensors), *tensors, *parameters)
        block.forward = forward


# The pipeline's two ends: model families

class StableDiffusion:
    """Stable Diffusion 1.x and 2.x: a UNet that predicts the noise, or v, and the step of DDIM.

    A family has `predict`, what the network says of x (B, C, h, w), in float32; `step`, which returns x_prev
    and log_prob (B,), `noise` scaling eta or noise_level; and for the two baselines `add_noise`, a noised
    image and what should be predicted for it. `i`, an int or (B,), counts the sampler's steps from 0.
    """

    prefix, target_modules = "unet", ("to_q", "to_k", "to_v", "to_out.0")
    blocks = "BasicTransformerBlock", "ResnetBlock2D"  # what is checkpointed and compiled one by one
    steps, guidance, ode_steps, sigmas = 50, 5.0, 0, None  # unless the settings say otherwise

    def __init__(self, pipe, args, device):
        from diffusers import DDIMScheduler
        self.pipe, self.network, self.args, self.text_options = pipe, pipe.unet, args, {}
        self.scheduler = scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(args.steps)
        self.t = scheduler.timesteps.to(device)
        if self.t[-1] == 0:
            raise ValueError(f"{args.model}: its scheduler ends at timestep 0, a step without noise, hence "
                             "without log-probability: it needs another timestep_spacing than linspace")
        self.t_prev = self.t - scheduler.config.num_train_timesteps // args.steps
        self.alphas_cumprod = scheduler.alphas_cumprod.to(device)
        self.prediction_type = scheduler.config.prediction_type

    def predict(self, x, i, cond):
        return self.network(x.to(self.network.dtype), self.t[i], *cond, return_dict=False)[0].float()

    def step(self, output, x, i, prev=None, noise=1.0, generator=None):
        return ddim_step(output, x, self.t[i], self.t_prev[i], self.alphas_cumprod, noise * self.args.eta,
                         prev, self.prediction_type, generator)

    def add_noise(self, x0, noise, i):
        scheduler, t = self.scheduler, self.t[i]
        target = noise if self.prediction_type == "epsilon" else scheduler.get_velocity(x0, noise, t)
        return scheduler.add_noise(x0, noise, t), target


class StableDiffusion3:
    """Stable Diffusion 3.x: a transformer that predicts the flow's velocity, and the step of its SDE."""

    prefix, blocks = "transformer", ("JointTransformerBlock",)
    target_modules = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
                      "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
    steps, guidance, ode_steps = 10, 4.5, 1  # no noise in the last: Flow-GRPO does not train on it

    def __init__(self, pipe, args, device):
        self.pipe, self.network, self.args = pipe, pipe.transformer, args
        self.text_options = dict(prompt_2=None, prompt_3=None, max_sequence_length=args.max_sequence_length)
        pipe.scheduler.set_timesteps(args.steps)
        self.sigmas = pipe.scheduler.sigmas.to(device, torch.float32)

    def predict(self, x, i, cond):
        timestep = 1000 * self.sigmas[i].expand(len(x))
        return self.network(x.to(self.network.dtype), *cond, timestep, return_dict=False)[0].float()

    def step(self, output, x, i, prev=None, noise=1.0, generator=None):
        return flow_sde_step(output, x, self.sigmas[i], self.sigmas[i + 1], self.sigmas[1],
                             noise * self.args.noise_level, prev, generator)

    def add_noise(self, x0, noise, i):
        sigma = self.sigmas[i].view(-1, 1, 1, 1)
        return (1 - sigma) * x0 + sigma * noise, noise - x0


def load_family(args, device):
    """The pretrained pipeline, frozen, as its model family with all of `args` filled in."""
    from diffusers import DiffusionPipeline
    families = {"StableDiffusionPipeline": StableDiffusion, "StableDiffusion3Pipeline": StableDiffusion3}
    dtype = {"default": {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype], "vae": torch.float32}
    try:
        config = DiffusionPipeline.load_config(args.model)
        kind = config["_class_name"]
        if kind not in families:
            raise ValueError(f"cannot take {args.model}: it is a {kind}, none of {', '.join(families)}")
        args = fill_in(args, families[kind])
        # What model_index.json holds as null must be passed as None, or from_pretrained looks for it.
        absent = {key: None for key, part in config.items()
                  if part == [None, None] or key in ("safety_checker", "feature_extractor")}  # not used here
        pipe = DiffusionPipeline.from_pretrained(args.model, dtype=dtype, low_cpu_mem_usage=False, **absent)
    except OSError as error:
        raise OSError(f"cannot load {args.model} ({str(error).strip().splitlines()[0]}). If its weights are "
                      f"gated, accept the licence on https://huggingface.co/{args.model} and run `hf auth "
                      "login`; or try `python ddpo.py --preset tiny`, the bundled model") from None
    family = families[kind](pipe, args, device)
    for module in (part for part in pipe.components.values() if isinstance(part, nn.Module)):
        module.requires_grad_(False).eval()
    for part in [part for name, part in pipe.components.items() if name.startswith("text_encoder") and part]:
        for name, layer in part.to(device).named_modules():
            if re.fullmatch(r"\D+\d+", name):  # block.3, not block.3.layer.0: on the device while it runs
                layer.to("cpu").register_forward_pre_hook(lambda layer, _: layer.to(device) and None)
                layer.register_forward_hook(lambda layer, *_: layer.to("cpu") and None)
    family.network.to(device)
    pipe.vae.to(device)
    return family


def fill_in(args, family):
    """The settings with nothing left to decide: what is None is up to the algorithm and the model family."""
    regression, sf = args.algorithm.startswith("rwr"), args.algorithm == "sf"
    steps = family.steps if args.steps is None else args.steps
    random_steps = max(steps - family.ode_steps, 1) if args.random_steps is None else args.random_steps
    chosen = dict(steps=steps, random_steps=random_steps, guidance=family.guidance, updates=1 if sf else 4,
                  train_timesteps=steps if regression else random_steps)
    args = replace(args, **{key: value for key, value in chosen.items() if getattr(args, key) is None})
    for wrong, message in (
            (args.images % math.lcm(args.updates, args.group_size),
             f"--images must be a multiple of --updates ({args.updates}) and of --group-size"),
            (sf and args.updates > 1, "--algorithm sf needs --updates 1; --algorithm is takes several"),
            (args.random_steps > steps or args.train_timesteps > random_steps and not regression,
             f"needed: --train-timesteps <= --random-steps ({args.random_steps}) <= --steps ({steps})"),
            (not regression and 0 in (args.eta, args.noise_level),
             "--eta 0 or --noise-level 0: a step without noise has no log-probability to train on"),
            (args.stat_min > args.stat_buffer, "--stat-min exceeds --stat-buffer")):
        if wrong:
            raise ValueError(message)
    return args


@torch.no_grad()
def encode(family, prompts):
    """N prompts to [embeddings (N, L, D), SD 3: pooled (N, P)]."""
    pipe, device = family.pipe, family.pipe.vae.device
    parts = [pipe.encode_prompt(list(prompts[i:i + 64]), device=device, num_images_per_prompt=1,
                                do_classifier_free_guidance=False, **family.text_options)
             for i in range(0, len(prompts), 64)]
    return [torch.cat(part) for part in zip(*parts) if part[0] is not None]  # the negative ones are None


@torch.no_grad()
def decode(family, latents, batch):
    """Latents (N, C, h, w) to a list of N PIL images."""
    pipe, config = family.pipe, family.pipe.vae.config
    return [image for z in latents.split(batch) for image in pipe.image_processor.postprocess(
        pipe.vae.decode(z / config.scaling_factor + (config.shift_factor or 0)).sample)]


# Save, resume, and the command line

def save(folder, layers, optimizer, generator, progress, prefix="transformer"):
    """A checkpoint, runs/NAME/last or best: the averaged LoRA for diffusers, and all that --resume needs."""
    adapters = {name: {key: value for key, value in layer.state_dict().items() if not key.startswith("base.")}
                for name, layer in layers.items()}
    state = {"adapters": adapters, "optimizer": optimizer.state_dict(), "rng": generator.get_state(),
             "progress": progress}
    rewards.write_aside(folder / "state.pt", lambda aside: torch.save(state, aside))
    save_lora(folder / "pytorch_lora_weights.safetensors", layers, "ema", prefix)


def restore(folder, layers, optimizer, generator, progress, args):
    """The reverse of `save`. Drops the lines of metrics.jsonl that training will write again."""
    state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
    for name, layer in layers.items():
        layer.load_state_dict(state["adapters"][name], strict=False)  # the frozen base is not in it
    optimizer.load_state_dict(state["optimizer"])
    optimizer.param_groups[0].update(lr=args.lr, weight_decay=args.weight_decay)  # flags may differ
    generator.set_state(state["rng"])
    if state["progress"]["best_by"] != progress["best_by"]:  # another measure: these start anew
        fresh = progress.keys() & {"best", "best_by", "statistics"}
        state["progress"].update({key: progress[key] for key in fresh})
    progress.update(state["progress"])
    if args.epochs:
        rewards.rewind_metrics(folder.parent, progress["epoch"])


def parse(argv=None):
    """The command line to Settings: a preset's defaults, or a resumed run's, then the flags given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, usage="python ddpo.py [--preset tiny] [--FLAG VALUE ...]")
    for field in fields(Settings):
        kind, text = get_args(field.type)
        kind, *others = get_args(kind) or [kind]  # the choices of a Literal, or str and None of str | None
        options = ({"action": argparse.BooleanOptionalAction} if kind is bool else
                   {"choices": [*filter(None, [kind, *others])]} if isinstance(kind, str) else {"type": kind})
        default = "" if field.default is None else f" [{field.default}]"
        parser.add_argument(f"--{field.name.replace('_', '-')}", help=text + default, **options)
    given = vars(parser.parse_args(argv))
    if "resume" in given:
        path, fixed = Path(given["resume"], "args.json"), ("preset", "model", "rank", "alpha", "lora")
        defaults = json.loads(path.read_text()) if path.exists() else {}
        if defaults.keys() != asdict(Settings()).keys() or given.keys() & set(fixed):
            raise ValueError(f"--resume {path.parent}: name a run of ddpo.py, such as runs/NAME, and no new "
                             f"--{', --'.join(fixed)}")
        defaults.update(lora=None, checkpoint="last")
    else:
        by_reward = {preset["reward"]: name for name, preset in PRESETS.items() if name != "tiny"}
        preset = given.get("preset", by_reward.get(given.get("reward", Settings.reward)))
        defaults = {**PRESETS.get(preset, {}), "preset": preset}
    args = Settings(**{**defaults, **given})
    rewards.check_counts(args)
    task = [given[key] for key in ("preset", "reward") if key in given] or [args.reward]
    task += [args.algorithm, f"seed{args.seed}"]
    args.name = args.name or re.sub(r"[^\w.-]+", "-", "-".join(["ddpo", *task]))
    return args


def main():
    """Train. A user's mistake ends in one line; `python -X dev ddpo.py` shows where it came from."""
    rewards.hush()
    args, stops = None, (ValueError, OSError, FloatingPointError, rewards.RewardError, torch.OutOfMemoryError)
    try:
        train(args := parse())
    except () if sys.flags.dev_mode else (*stops, KeyboardInterrupt) as error:
        raise SystemExit(rewards.last_words(error, args)) from None


if __name__ == "__main__":
    main()
