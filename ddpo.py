"""DDPO, Denoising Diffusion Policy Optimization (Black et al. 2023, arXiv 2305.13301), in one file.

Fine-tune a text-to-image model so that its images score higher under a reward r(x, c), by taking its sampler
for what it is: a policy. Denoising is a Markov decision process of T steps,

    state (c, t, x_t)        action x_{t-1}        reward r(x_0, c) after the last step, 0 before it

and the policy is the sampler's own step, a Gaussian: p(x_{t-1} | x_t, c) = N(mean(x_t, t, c), std_t^2). How
likely an image is, nobody can say; how likely each step to it was is exact, and a policy gradient needs no more:

    grad E[r] ~ E_old[ sum_t A grad log p(x_{t-1} | x_t, c) ]          the score function estimator, `sf`
              ~ E_old[ sum_t A grad (p / p_old)(x_{t-1} | x_t, c) ]    importance sampling, `is`

A is the advantage: the reward less the prompt's mean, over its standard deviation. Images come from p_old, the
policy as it was when they were drawn. `sf` holds while the policy is still p_old, so it allows one update for an
epoch's images. `is` corrects each step for the difference and allows several, while the ratio p / p_old stays
near 1: there it is clipped, as in PPO. Gradients are taken one step at a time, never through the chain, so that
memory does not grow with T. The loop, in `train`:

    for each epoch:
        draw images with the stochastic sampler; keep x_T ... x_0 and log p_old of each step             (rollout)
        score them, and turn rewards into advantages                                            (PromptStatistics)
        for each update, on its share of the images, and for each random step of theirs:        (policy_gradients)
            log p of that same step under the policy as it is now                       (ddim_step, flow_sde_step)
            loss = max(-A ratio, -A clipped ratio)             (importance_sampling_loss, or score_function_loss)

The paper's baselines are here too: `rwr` and `rwr-sparse` train the denoising loss on the model's own images,
weighted by reward or on the best of them alone (regression_gradients). One loop serves UNets (Stable Diffusion
1.x, the step of DDIM) and Stable Diffusion 3.x (a flow's SDE): see StableDiffusion and StableDiffusion3.

    python ddpo.py --preset tiny                  # the bundled toy model, on any CPU, in minutes
    python ddpo.py --reward compressibility       # Stable Diffusion 1.4 learns to compress well, on one GPU
    python ddpo.py --help                         # every setting

Left out, for the sake of reading: several processes (the authors train on many).
"""

import argparse
import contextlib
import itertools
import json
import math
import re
import resource
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import UnionType
from typing import Annotated, Literal, get_args, get_origin

import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

import rewards

HERE = Path(__file__).resolve().parent


@dataclass
class Settings:
    """All that a run depends on. The command line is made from it; a preset is a set of other defaults."""

    # model
    preset: Annotated[str | None, "compressibility, aesthetic, alignment or tiny; by default by reward"] = None
    model: Annotated[str, "a Stable Diffusion 1.x or 3.x folder or repo"] = "CompVis/stable-diffusion-v1-4"
    dtype: Annotated[Literal["bf16", "fp32"], "precision of the frozen weights"] = "bf16"
    height: Annotated[int, "image height in pixels"] = 512
    width: Annotated[int, "image width in pixels"] = 512
    max_sequence_length: Annotated[int, "T5 tokens per prompt (Stable Diffusion 3)"] = 128
    rank: Annotated[int, "LoRA rank"] = 16
    alpha: Annotated[float, "LoRA scale is alpha / rank"] = 32
    lora: Annotated[str | None, "start from the LoRA in this folder, such as runs/NAME/best"] = None

    # rollout
    reward: Annotated[str, "name[@path-or-repo][:weight], joined by commas (see rewards.py)"] = "compressibility"
    reward_batch: Annotated[int, "images that a reward model is shown at once"] = 16
    prompts: Annotated[str | None, "prompt set, or .txt or .jsonl file; by default the reward's own"] = None
    images: Annotated[int, "images per epoch"] = 256
    group_size: Annotated[int, "images per prompt in an epoch (1: each image draws its own)"] = 1
    steps: Annotated[int | None, "denoising steps; by default 50, or 10 for Stable Diffusion 3"] = None
    random_steps: Annotated[int | None, "the first are random, the rest an ODE; by default all (SD 3: - 1)"] = None
    guidance: Annotated[float | None, "guidance, in training too (1: none); by default 5, or 4.5 for SD 3"] = None
    eta: Annotated[float, "noise of DDIM's step (Stable Diffusion 1.x)"] = 1.0
    noise_level: Annotated[float, "noise of the flow's SDE step (Stable Diffusion 3)"] = 0.7
    micro_batch: Annotated[int, "images in a forward pass, in sampling as in training"] = 8
    decode_batch: Annotated[int, "images decoded at once"] = 8

    # loss
    algorithm: Annotated[Literal["is", "sf", "rwr", "rwr-sparse"], "see above"] = "is"
    updates: Annotated[int | None, "optimizer steps per epoch, on shares of the images; by default 4, sf 1"] = None
    clip: Annotated[float, "is: the ratio is clipped to 1 plus and minus this"] = 1e-4
    advantage_clip: Annotated[float, "advantages are clipped to plus and minus this"] = 5.0
    stat_buffer: Annotated[int, "rewards remembered of each prompt, for its mean and deviation"] = 32
    stat_min: Annotated[int, "with fewer rewards than this, the batch's are used"] = 16
    temperature: Annotated[float, "rwr: weights are softmax(advantage / temperature)"] = 0.2
    keep: Annotated[float, "rwr-sparse: share of the images that is trained on"] = 0.1
    train_timesteps: Annotated[int | None, "random steps per update; by default all; rwr: noises per image"] = None

    # optimisation
    epochs: Annotated[int, "epochs in all (0: only evaluate)"] = 100
    lr: Annotated[float, "AdamW learning rate"] = 3e-4
    weight_decay: Annotated[float, "AdamW weight decay"] = 1e-4
    max_grad_norm: Annotated[float, "the gradient norm is clipped to this"] = 1.0
    grad_checkpoint: Annotated[bool, "recompute blocks in the backward pass, to save memory"] = True
    compile: Annotated[bool, "torch.compile each block (see that first_ratio_error stays 0)"] = False

    # run
    name: Annotated[str | None, "the run's folder is runs/NAME; made up by default"] = None
    seed: Annotated[int, "fixes the whole run on one device"] = 0
    device: Annotated[str | None, "cuda, cpu ...; by default cuda where there is one"] = None
    eval_every: Annotated[int, "epochs between evaluations"] = 10
    eval_images: Annotated[int, "images of held-out prompts, from the same noise every time"] = 128
    eval_noise: Annotated[float, "noise of the evaluation's steps (0: an ODE; 1: as in training)"] = 0.0
    eval_rewards: Annotated[str | None, "more rewards, as for --reward, that only judge"] = None
    eval_prompts: Annotated[str | None, "evaluate on all prompts of this .txt or .jsonl file"] = None
    resume: Annotated[str | None, "go on from runs/NAME (or runs/NAME/best), with its settings"] = None
    wandb: Annotated[str | None, "also log to this Weights & Biases project"] = None


PRESETS = {
    "compressibility": dict(reward="compressibility", prompts="animals"),
    "aesthetic": dict(reward="aesthetic", prompts="animals"),
    "alignment": dict(reward="vlm", prompts="activities"),
    # The clip is for log-probabilities averaged over 2,048 latents here, and over 16,384 in the paper.
    "tiny": dict(model=str(HERE / "tiny-sd3"), reward=f"ocr@{HERE / 'tiny-sd3'}", prompts="signs", height=32,
                 width=64, max_sequence_length=1, images=192, group_size=8, stat_min=8, guidance=1.0,
                 random_steps=3, micro_batch=96, decode_batch=96, clip=1e-3, lr=6e-4, epochs=60,
                 grad_checkpoint=False, eval_images=512, device="cpu"),
}


# The mathematics: pure functions, in the order in which the loop calls them

def gaussian_log_prob(x, mean, std):
    """log N(x; mean, std^2), averaged over all but the batch dimension: (B, C, H, W) -> (B,).

    The mean over D numbers, not their sum, as in the authors' code: the ratio of two policies becomes
    (p / p_old)^(1/D), of the same gradient at p = p_old but for the factor 1/D. The clip of 1e-4 is made for
    that, at D = 16,384.
    """
    log_prob = -(x - mean).square() / (2 * std**2) - torch.log(std) - math.log(2 * math.pi) / 2
    return log_prob.mean((1, 2, 3))


def ddim_step(output, x, t, t_prev, alphas_cumprod, eta=1.0, prev=None, prediction_type="epsilon",
              generator=None):
    """One step of DDIM from x_t to x_{t_prev}, and its log-probability: the policy of a UNet.

    (Song et al. 2021, arXiv 2010.02502, eq. 12; the variance is eta^2 times that of eq. 16.) At eta = 1 it is
    DDPM's ancestral step.

    output: the UNet's, "epsilon" or "v_prediction"; output, x, prev (B, C, H, W); t, t_prev (B,) long;
    alphas_cumprod (1000,). Before the first timestep (t_prev < 0) the image's alpha is alphas_cumprod[0]. With
    prev the step taken is that one (training), else it is drawn with `generator` (sampling). Returns x_prev
    (B, C, H, W) and log_prob (B,), which is nan at eta = 0, where there is no density.
    """
    alpha = alphas_cumprod[t].view(-1, 1, 1, 1)
    alpha_prev = alphas_cumprod[t_prev.clamp(min=0)].view(-1, 1, 1, 1)
    if prediction_type == "epsilon":
        noise = output
        x0 = (x - (1 - alpha).sqrt() * noise) / alpha.sqrt()
    elif prediction_type == "v_prediction":
        noise = alpha.sqrt() * output + (1 - alpha).sqrt() * x
        x0 = alpha.sqrt() * x - (1 - alpha).sqrt() * output
    else:
        raise ValueError(f"prediction_type {prediction_type!r}: epsilon or v_prediction")
    std = eta * ((1 - alpha_prev) / (1 - alpha) * (1 - alpha / alpha_prev)).sqrt()
    mean = alpha_prev.sqrt() * x0 + (1 - alpha_prev - std**2).clamp(min=0).sqrt() * noise
    if prev is None:
        prev = mean + std * torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return prev, gaussian_log_prob(prev, mean, std)


def flow_sde_step(v, x, sigma, sigma_next, sigma_max, noise_level=0.7, prev=None, generator=None):
    """One step of a flow's SDE from sigma to sigma_next, and its log-probability: the policy of an SD 3.

    (Liu et al. 2025, Flow-GRPO, arXiv 2505.05470, eq. 9.) The SDE has the marginals of the flow's ODE: noise
    comes in, and the score, which the velocity knows, takes as much out. With dt = sigma_next - sigma,

        s = noise_level sqrt(sigma / (1 - sigma))
        mean = x (1 + s^2 dt / (2 sigma)) + v (1 + s^2 (1 - sigma) / (2 sigma)) dt,        std = s sqrt(-dt)

    where at sigma = 1 the root has 1 - sigma_max below, sigma_max being the schedule's next sigma. At
    noise_level 0 it is Euler's step.

    v, x, prev (B, C, H, W); sigma, sigma_next () or (B,). Returns x_prev and log_prob (B,), nan at level 0.
    """
    sigma, sigma_next = sigma.view(-1, 1, 1, 1), sigma_next.view(-1, 1, 1, 1)
    dt = sigma_next - sigma
    s = noise_level * (sigma / (1 - torch.where(sigma == 1, sigma_max, sigma))).sqrt()
    mean = x * (1 + s**2 * dt / (2 * sigma)) + v * (1 + s**2 * (1 - sigma) / (2 * sigma)) * dt
    std = s * (-dt).sqrt()
    if prev is None:
        prev = mean + std * torch.randn(mean.shape, generator=generator, device=mean.device, dtype=mean.dtype)
    return prev, gaussian_log_prob(prev, mean, std)


class PromptStatistics:
    """Advantages (R - mean) / std with each prompt's own running mean and standard deviation.

    (Black et al. 2023, sec. 5.) A prompt's last `buffer` rewards are remembered; while they are fewer than
    `minimum`, the batch's mean and deviation stand in. Prompts differ in how much reward they allow, and a
    policy should not be praised for an easy one.
    """

    def __init__(self, buffer=32, minimum=16):
        self.buffer, self.minimum, self.rewards = buffer, minimum, {}

    def advantages(self, prompts, rewards, clip=5.0):
        """prompts: N str; rewards (N,), remembered from now on. Returns (N,), within plus and minus clip."""
        rewards = rewards.double()  # or the rounding of a mean, over a deviation of 0, would count
        for prompt, reward in zip(prompts, rewards.tolist()):
            self.rewards[prompt] = [*self.rewards.get(prompt, []), reward][-self.buffer:]
        known = [self.rewards[prompt] for prompt in prompts]
        known = [rewards.new_tensor(own) if len(own) >= self.minimum else rewards for own in known]
        mean = torch.stack([values.mean() for values in known])
        std = torch.stack([values.std(correction=0) for values in known])
        return ((rewards - mean) / (std + 1e-6)).clamp(-clip, clip).float()


def score_function_loss(log_prob, advantages):
    """-mean A log p, whose gradient is REINFORCE's: right for the policy that drew the images. All (B,).

    (Black et al. 2023, sec. 4.3, DDPO_SF.)
    """
    return -(advantages * log_prob).mean()


def importance_sampling_loss(log_prob, old_log_prob, advantages, clip=1e-4):
    """mean max(-A ratio, -A clamp(ratio, 1 - clip, 1 + clip)), ratio = p / p_old. All (B,).

    (Black et al. 2023, sec. 4.3, DDPO_IS, with PPO's clipping, arXiv 1707.06347, eq. 7.) Where the ratio has
    already gone the advantage's way by more than clip, there is no gradient left to go further.
    """
    ratio = torch.exp(log_prob - old_log_prob)
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)).mean()


def rwr_weights(advantages, temperature=0.2):
    """Reward-weighted regression: softmax(A / temperature) over the N images, times N: 1 on average."""
    return torch.softmax(advantages / temperature, 0) * len(advantages)


def best_images(advantages, keep=0.1):
    """Indices of the best `keep` of N images, repeated to N: rwr-sparse trains on these alone."""
    count = max(round(keep * len(advantages)), 1)
    best = advantages.topk(count).indices
    return best.repeat(-(-len(advantages) // count))[:len(advantages)]


# The algorithm

def guided(family, x, i, cond, uncond, guidance):
    """The network's prediction, or with guidance out(uncond) + guidance (out(c) - out(uncond)).

    (Ho and Salimans 2022.) Sampling and training both come through here, with the same rows in a batch: only so
    is the ratio of the first update exactly 1.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    with sdpa_kernel(SDPBackend.MATH):
        if guidance == 1.0:
            return family.predict(x, i, cond)
        both = [torch.cat([e.expand_as(c), c]) for e, c in zip(uncond, cond)]
        i = torch.cat([i, i]) if isinstance(i, torch.Tensor) else i
        out_uncond, out_cond = family.predict(torch.cat([x, x]), i, both).chunk(2)
        return out_uncond + guidance * (out_cond - out_uncond)


def denoise(family, x, cond, uncond, args, noise=1.0, generator=None):
    """Walk from x_T to the image: yields every next x and the log-probability (B,) of the step to it.

    Steps after the first args.random_steps have no noise, hence no log-probability: they count as environment,
    though the policy takes them too. What a change of it would do there is left out of the gradient.
    """
    for i in range(args.steps):
        output = guided(family, x, i, cond, uncond, args.guidance)
        level = noise if i < args.random_steps else 0.0
        x, log_prob = family.step(output, x, i, noise=level, generator=generator)
        yield x, log_prob


@torch.no_grad()
def rollout(family, noise, cond, uncond, chunks, args, store, generator):
    """Draw images from x_T = noise (N, C, h, w) and keep their random steps; cond has N rows; chunks are batches.

    Returns x_0 (N, C, h, w), the states x_T ... of the R random steps (N, R + 1, C, h, w), which are kept on the
    device `store`, and log p (N, R).
    """
    R, x0 = args.random_steps, torch.empty_like(noise)
    states = torch.empty(len(noise), R + 1, *noise.shape[1:], device=store)
    log_probs = torch.empty(len(noise), R, device=noise.device)
    for rows in tqdm(chunks, desc="sample", leave=False):
        states[rows, 0] = noise[rows].to(store)
        walk = denoise(family, noise[rows], [t[rows] for t in cond], uncond, args, generator=generator)
        for i, (x, log_prob) in enumerate(walk):
            if i < R:
                states[rows, i + 1], log_probs[rows, i] = x.to(store), log_prob
        x0[rows] = x
    return x0, states, log_probs


def policy_gradients(family, states, log_probs, advantages, cond, uncond, chunks, steps, args):
    """Add the gradients of one update: on its chunks of images, one denoising step of `steps` at a time.

    Returns what to log, means over images and steps: the loss, the ratio's excess over 1 and its square, the
    least and greatest ratio, the share beyond the clip, and PPO's approx_kl, (log ratio)^2 / 2. The ratio is the
    one that the loss sees, of log-probabilities averaged over the latents.
    """
    logs, count = defaultdict(float, ratio_min=math.inf, ratio_max=-math.inf), sum(map(len, chunks))
    for rows in chunks:
        here, A = [t[rows] for t in cond], advantages[rows]
        for i in steps:
            x, prev = states[rows, i].to(A.device), states[rows, i + 1].to(A.device)
            log_prob = family.step(guided(family, x, i, here, uncond, args.guidance), x, i, prev)[1]
            old = log_probs[rows, i]
            loss = (score_function_loss(log_prob, A) if args.algorithm == "sf" else
                    importance_sampling_loss(log_prob, old, A, args.clip))
            share = len(rows) / count / len(steps)
            (share * loss).backward()
            change = log_prob.detach() - old
            ratio, excess = change.exp(), change.expm1()  # a float32 near 1 has few digits for its deviation
            means = {"loss": loss, "ratio_excess": excess.mean(), "excess_squared": excess.square().mean(),
                     "clip_fraction": (excess.abs() > args.clip).float().mean(),
                     "approx_kl": change.square().mean() / 2}
            for key, value in zip(means, torch.stack([*means.values()]).tolist()):  # one wait for the GPU
                logs[key] += share * value
            logs["ratio_min"] = min(logs["ratio_min"], ratio.min().item())
            logs["ratio_max"] = max(logs["ratio_max"], ratio.max().item())
    return logs


def regression_gradients(family, x0, weights, cond, uncond, chunks, args, generator):
    """The baselines' update: the denoising loss mean w |output - target|^2 on the model's own images x0.

    Each image is noised args.train_timesteps times, to one of the sampler's own levels. The output is guided if
    sampling is, as in the authors' code. Returns what to log.
    """
    loss_sum, count = 0.0, sum(map(len, chunks))
    for rows in chunks:
        here = [t[rows] for t in cond]
        for _ in range(args.train_timesteps):
            i = torch.randint(args.steps, (len(rows),), generator=generator, device=x0.device)
            noise = torch.randn(x0[rows].shape, generator=generator, device=x0.device)
            x, target = family.add_noise(x0[rows], noise, i)
            error = (guided(family, x, i, here, uncond, args.guidance) - target).square().mean((1, 2, 3))
            loss, share = (weights[rows] * error).mean(), len(rows) / count / args.train_timesteps
            (share * loss).backward()
            loss_sum += share * loss.item()
    return {"loss": loss_sum}

@torch.no_grad()
def generate(family, noise, cond, uncond, args, generator):
    """Draw images for an evaluation: x_T (N, C, h, w) to x_0, with --eval-noise of the steps' noise."""
    latents = []
    for rows in tqdm(torch.arange(len(noise)).split(args.micro_batch), desc="evaluate", leave=False):
        for x, _ in denoise(family, noise[rows], [t[rows] for t in cond], uncond, args, args.eval_noise, generator):
            pass
        latents.append(x)
    return torch.cat(latents)


def train(args):
    """Sample, score, improve (Black et al. 2023, sec. 4). Returns the run's folder."""
    given, args = args, fill_in(args)
    validate(args)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder, checkpoint = run_folder(args)
    reward, judge, stream, held_out, held_out_metadata = rewards.load_task(args, device)
    family = load_family(args, device)
    network, scale = family.network, family.pipe.vae_scale_factor
    shape = network.config.in_channels, args.height // scale, args.width // scale  # of one image's latents

    torch.manual_seed(args.seed)
    generator = torch.Generator(device).manual_seed(args.seed)  # for all that is random after LoRA and prompts
    held_out_cond, uncond = encode(family, held_out), encode(family, [""])
    layers = add_lora(network, family.target_modules, args.rank, args.alpha)
    if args.lora and not args.resume:
        load_lora(Path(args.lora, "pytorch_lora_weights.safetensors"), layers, prefix=family.prefix)
    blocks = [module for module in network.modules() if type(module).__name__ in family.blocks]
    if args.compile:
        for block in blocks:
            block.forward = torch.compile(block.forward)
    if args.grad_checkpoint:
        checkpoint_blocks(blocks, layers)
    parameters = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.999), eps=1e-8,
                                  weight_decay=args.weight_decay)

    statistics = PromptStatistics(args.stat_buffer, args.stat_min)
    progress = {"epoch": 0, "step": 0, "prompts": 0, "images": 0, "seconds": 0.0, "best": -math.inf,
                "best_by": [args.reward, args.prompts, args.eval_prompts, args.eval_images, args.eval_noise,
                            args.guidance], "statistics": statistics.rewards}
    if args.resume:
        restore(folder, checkpoint, layers, optimizer, generator, progress, args)
        statistics.rewards = progress["statistics"]
        stream = itertools.islice(stream, progress["prompts"], None)
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    if args.epochs or not args.resume:
        text = json.dumps(asdict(given), indent=2)
        rewards.write_aside(folder / "args.json", lambda aside: Path(aside).write_text(text))
    if args.wandb:
        import wandb
        wandb.init(project=args.wandb, name=folder.name, config=asdict(args))

    def log(split, **values):
        at = {key: progress[key] for key in ("step", "images", "seconds")}
        line = {"split": split, "epoch": progress["epoch"] - (split == "train"), **at, **values}
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")
        if args.wandb:
            wandb.log({f"{split}/{key}": value for key, value in line.items() if key != "split"})

    def evaluate():
        """Draw the held-out prompts with the policy, always from the same noise; score, log and show them."""
        noise = torch.randn(len(held_out), *shape, generator=torch.Generator().manual_seed(1234)).to(device)
        latents = generate(family, noise, held_out_cond, uncond, args, torch.Generator(device).manual_seed(4321))
        images = decode(family, latents, args.decode_batch)
        R, means, tables = rewards.evaluation(reward, judge, images, held_out, held_out_metadata)
        split = "test" if args.resume and not args.epochs else "eval"  # a look at a run is no part of its curve
        log(split, **means, **tables)
        rewards.show(folder, split, progress["epoch"], reward.name, images, held_out, R, means, tables)
        if args.epochs and R.mean() > progress["best"]:
            progress["best"] = R.mean().item()
            save(folder / "best", layers, optimizer, generator, progress, family.prefix)

    N, regression = args.images, args.algorithm.startswith("rwr")
    batches = lambda order: [share.split(args.micro_batch) for share in order.split(N // args.updates)]  # noqa: E731
    in_order = batches(torch.arange(N))  # for each update, its images in batches
    store = trajectory_device(N * (args.random_steps + 1) * math.prod(shape), device)
    if not args.resume or not args.epochs:
        evaluate()
    if not args.resume and args.epochs:
        save(folder / "last", layers, optimizer, generator, progress, family.prefix)
    start = progress["epoch"]
    for epoch in tqdm(range(start, args.epochs), desc=folder.name, initial=start, total=args.epochs):
        clock = [time.perf_counter()]

        # 1. Act: every image is a trajectory of decisions.
        drawn = list(itertools.islice(stream, N // args.group_size))
        prompts, metadata = zip(*[pair for pair in drawn for _ in range(args.group_size)])
        cond = encode(family, prompts)
        noise = torch.randn(N, *shape, generator=generator, device=device)
        x0, states, log_probs = rollout(family, noise, cond, uncond, sum(in_order, ()), args, store, generator)
        images = decode(family, x0, args.decode_batch)
        clock.append(time.perf_counter())

        # 2. Score.
        R, parts = reward.score(images, prompts, metadata)  # (N,)
        A = statistics.advantages(prompts, R, args.advantage_clip).to(device)
        clock.append(time.perf_counter())

        # 3. Improve.
        updates, logs = in_order, []
        if regression:
            sparse = args.algorithm == "rwr-sparse"
            weights = torch.ones_like(A) if sparse else rwr_weights(A, args.temperature)
            order = torch.randperm(N, generator=generator, device=device)
            updates = batches(best_images(A, args.keep)[order] if sparse else order)
        for chunks in tqdm(updates, desc="train", leave=False):
            if regression:
                entry = regression_gradients(family, x0, weights, cond, uncond, chunks, args, generator)
            else:
                steps = torch.randperm(args.random_steps, generator=generator, device=device)
                entry = policy_gradients(family, states, log_probs, A, cond, uncond, chunks,
                                         steps[:args.train_timesteps].tolist(), args)
            grad_norm = nn.utils.clip_grad_norm_(parameters, args.max_grad_norm).item()
            if not math.isfinite(entry["loss"] + grad_norm):
                raise FloatingPointError(f"the loss is {entry['loss']:g} and its gradient's norm {grad_norm:g}: "
                                         "stopped before the optimizer step, try a smaller --lr")
            optimizer.step()
            optimizer.zero_grad()
            progress["step"] += 1
            logs.append({**entry, "grad_norm": grad_norm})
        del states  # before the next are drawn
        clock.append(time.perf_counter())

        seconds = [end - begin for begin, end in itertools.pairwise(clock)]
        for key, more in {"epoch": 1, "prompts": len(drawn), "images": N, "seconds": sum(seconds)}.items():
            progress[key] += more
        means = {key: sum(entry[key] for entry in logs) / len(logs) for key in logs[0]}
        if not regression:
            excess = means.pop("ratio_excess")
            means |= {"ratio": 1 + excess, "ratio_std": max(means.pop("excess_squared") - excess**2, 0) ** 0.5,
                      "ratio_min": min(entry["ratio_min"] for entry in logs),
                      "ratio_max": max(entry["ratio_max"] for entry in logs),
                      # The first update is of the policy that drew the images: anything but 0 is a bug.
                      "first_ratio_error": max(1 - logs[0]["ratio_min"], logs[0]["ratio_max"] - 1)}
        rate, memory = N / sum(seconds), peak_gb(device)
        log("train", **rewards.summary(R, parts), **means, images_per_second=rate, peak_gb=memory,
            **dict(zip(("sample_seconds", "reward_seconds", "train_seconds"), seconds)))
        ratio = "" if regression else f"KL {means['approx_kl']:.1e}  clipped {means['clip_fraction']:.0%}  "
        tqdm.write(f"epoch {epoch:4d}  reward {R.mean():.4f}  loss {means['loss']:.4f}  {ratio}"
                   f"grad {means['grad_norm']:.3f}  |  "
                   "sample {:.1f} + reward {:.1f} + train {:.1f} s".format(*seconds) +
                   f"  {rate:.1f} img/s  {memory:.1f} GB")
        if progress["epoch"] % args.eval_every == 0 or progress["epoch"] == args.epochs:
            evaluate()
        save(folder / "last", layers, optimizer, generator, progress, family.prefix)
    return folder


# LoRA by hand

class LoRALinear(nn.Module):
    """A frozen linear layer plus one of several low-rank updates: y = W x + (alpha / rank) B A x.

    (Hu et al. 2021, arXiv 2106.09685.) `active` names the update in use; None is the pretrained layer, to the
    bit. A is Gaussian and B zero, so all updates start as nothing; the first is trainable. They are stored in
    float32, and computed with in the precision of x.
    """

    def __init__(self, base, rank, alpha, adapters):
        super().__init__()
        self.base, self.scale, self.active = base.requires_grad_(False), alpha / rank, adapters[0]
        A = torch.randn(rank, base.in_features, device=base.weight.device) / rank
        B = torch.zeros(base.out_features, rank, device=base.weight.device)
        self.A, self.B = (nn.ParameterDict({name: nn.Parameter(start.clone(), requires_grad=name == adapters[0])
                                            for name in adapters}) for start in (A, B))

    def forward(self, x):
        y = self.base(x)
        if self.active is None:
            return y
        A, B = self.A[self.active].to(x.dtype), self.B[self.active].to(x.dtype)
        return y + F.linear(F.linear(x, A), self.scale * B)


def add_lora(model, target_modules, rank, alpha, adapters=("policy",)):
    """Freeze `model` and put a LoRALinear in place of each linear layer whose name ends in a target.

    (`attn.to_q` is no ending of `attn2.to_q`: SD3.5's second, image-only attention stays as it is.) Returns
    {layer name: LoRALinear}. ValueError if nothing matches.
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
    before = {layer: layer.active for layer in layers.values()}
    try:
        for layer in before:
            layer.active = name
        yield
    finally:
        for layer, active in before.items():
            layer.active = active


@torch.no_grad()
def ema_update(layers, name, decay, source="policy"):
    """Let adapter `name` follow another: decay * itself + (1 - decay) * source, A and B each."""
    for layer in layers.values():
        for weights in (layer.A, layer.B):
            weights[name].lerp_(weights[source], 1 - decay)


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
    config = {key.removeprefix(f"{prefix}."): value for key, value in config.items()}
    foreign = [key for key in ("use_rslora", "use_dora", "alpha_pattern", "rank_pattern") if config.get(key)]
    shapes = {f"{prefix}.{name}.lora_{part}.weight": getattr(layer, part)[adapter].shape
              for name, layer in layers.items() for part in "AB"}
    if foreign or {key: tensor.shape for key, tensor in tensors.items()} != shapes:
        raise ValueError(f"{path} is no LoRA of these layers: use the same model and --rank, without {foreign}")
    scale = config.get("lora_alpha", 1) / config.get("r", 1)
    with torch.no_grad():
        for name, layer in layers.items():
            layer.A[adapter].copy_(tensors[f"{prefix}.{name}.lora_A.weight"])
            layer.B[adapter].copy_(tensors[f"{prefix}.{name}.lora_B.weight"] * (scale / layer.scale))


# Gradient checkpointing by hand

class Checkpoint(torch.autograd.Function):
    """Run a block and keep only its inputs; run it again when its gradient is asked for.

    (Chen et al. 2016, arXiv 1604.06174.) Memory for activations falls from all blocks to one, for one more
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
    """Checkpoint each of these modules, whatever its arguments are. Its second run uses the first's adapter."""
    for block in blocks:
        def forward(*args, block=block, run=block.forward, **kwargs):
            values = {**dict(enumerate(args)), **kwargs}
            tensors = {key: value for key, value in values.items() if isinstance(value, torch.Tensor)}
            names, constants = list(tensors), {key: values[key] for key in values.keys() - tensors.keys()}
            adapter = next(iter(layers.values())).active

            def rerun(*inputs):
                values = {**constants, **dict(zip(names, inputs))}
                with use_adapter(layers, adapter):
                    return run(*[values.pop(i) for i in range(len(args))], **values)

            parameters = [p for p in block.parameters() if p.requires_grad]
            return Checkpoint.apply(rerun, len(tensors), *tensors.values(), *parameters)

        block.forward = forward


# The pipeline's two ends: model families

class StableDiffusion:
    """Stable Diffusion 1.x and 2.x: a UNet that predicts the noise, or v, and the step of DDIM.

    A family says how prompts are encoded, what the network predicts, how a step is taken and how latents become
    images; and, for the two baselines, how an image is noised. `i` counts the sampler's steps from 0, an int or
    (B,). Conditions are tuples of tensors, a row per prompt.
    """

    prefix, target_modules = "unet", ("to_q", "to_k", "to_v", "to_out.0")
    blocks = "BasicTransformerBlock", "ResnetBlock2D"  # what is checkpointed and compiled one by one
    steps, guidance, ode_steps = 50, 5.0, 0  # unless the settings say otherwise

    def __init__(self, pipe, args, device):
        from diffusers import DDIMScheduler
        self.pipe, self.network, self.args, self.device = pipe, pipe.unet, args, device
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(args.steps)
        self.t = scheduler.timesteps.to(device)
        if self.t[-1] == 0:
            raise ValueError("its scheduler has steps_offset 0: the step to the image would have no "
                             "noise, and no log-probability. Set it to 1")
        self.t_prev = self.t - scheduler.config.num_train_timesteps // args.steps
        self.alphas_cumprod = scheduler.alphas_cumprod.to(device)
        self.prediction_type = scheduler.config.prediction_type

    def encode(self, prompts):
        """Embeddings (N, L, D)."""
        return (self.pipe.encode_prompt(prompts, self.device, 1, False)[0],)

    def predict(self, x, i, cond):
        """The UNet's output for x_t (B, C, h, w), float32."""
        t = self.t[i].expand(len(x))
        return self.network(x.to(self.network.dtype), t, *cond, return_dict=False)[0].float()

    def step(self, output, x, i, prev=None, noise=1.0, generator=None):
        """x_{t-1} and its log-probability (B,); noise scales eta."""
        t, t_prev = self.t[i].expand(len(x)), self.t_prev[i].expand(len(x))
        return ddim_step(output, x, t, t_prev, self.alphas_cumprod, noise * self.args.eta, prev,
                         self.prediction_type, generator)

    def add_noise(self, x0, noise, i):
        """x_t and what the UNet should predict there."""
        alpha = self.alphas_cumprod[self.t[i]].view(-1, 1, 1, 1)
        x = alpha.sqrt() * x0 + (1 - alpha).sqrt() * noise
        v = alpha.sqrt() * noise - (1 - alpha).sqrt() * x0
        return x, noise if self.prediction_type == "epsilon" else v

    def decode(self, latents):
        """Latents (B, C, h, w) to pixels in -1..1."""
        return self.pipe.vae.decode(latents / self.pipe.vae.config.scaling_factor).sample


class StableDiffusion3:
    """Stable Diffusion 3.x: a transformer that predicts the flow's velocity, and the step of its SDE."""

    prefix, blocks = "transformer", ("JointTransformerBlock",)
    target_modules = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
                      "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")
    steps, guidance, ode_steps = 10, 4.5, 1  # no noise in the last: Flow-GRPO does not train on it

    def __init__(self, pipe, args, device):
        self.pipe, self.network, self.args, self.device = pipe, pipe.transformer, args, device
        pipe.scheduler.set_timesteps(args.steps)
        self.sigmas = pipe.scheduler.sigmas.to(device, torch.float32)

    def encode(self, prompts):
        """Embeddings (N, L, D) and pooled embeddings (N, P)."""
        parts = self.pipe.encode_prompt(prompts, None, None, device=self.device, do_classifier_free_guidance=False,
                                        max_sequence_length=self.args.max_sequence_length)
        return parts[0], parts[2]

    def predict(self, x, i, cond):
        """The velocity at x_sigma (B, C, h, w), float32."""
        timestep = 1000 * self.sigmas[i].expand(len(x))
        return self.network(x.to(self.network.dtype), *cond, timestep, return_dict=False)[0].float()

    def step(self, output, x, i, prev=None, noise=1.0, generator=None):
        """The next x and its log-probability (B,); noise scales noise_level."""
        return flow_sde_step(output, x, self.sigmas[i], self.sigmas[i + 1], self.sigmas[1],
                             noise * self.args.noise_level, prev, generator)

    def add_noise(self, x0, noise, i):
        """x_sigma and the velocity there."""
        sigma = self.sigmas[i].view(-1, 1, 1, 1)
        return (1 - sigma) * x0 + sigma * noise, noise - x0

    def decode(self, latents):
        """Latents (B, C, h, w) to pixels in -1..1."""
        config = self.pipe.vae.config
        return self.pipe.vae.decode(latents / config.scaling_factor + config.shift_factor).sample


FAMILIES = {"StableDiffusionPipeline": StableDiffusion, "StableDiffusion3Pipeline": StableDiffusion3}


def pipeline_config(args):
    """The model_index.json of the pipeline. OSError, in one line, where it cannot be had."""
    import diffusers
    try:
        config = diffusers.DiffusionPipeline.load_config(args.model)
    except (OSError, ValueError) as error:
        cause = str(error).strip().partition("\n")[0]
        raise OSError(f"cannot load {args.model} ({cause}). If its weights are gated, accept the licence on "
                      f"https://huggingface.co/{args.model} and run `hf auth login`; or try `python ddpo.py "
                      "--preset tiny`, the bundled model") from None
    if config.get("_class_name") not in FAMILIES:
        raise ValueError(f"cannot take {args.model}: it is a {config.get('_class_name')}, none of {', '.join(FAMILIES)}")
    return config


def fill_in(args):
    """The settings with nothing left to decide: what is None is up to the algorithm and to the model family."""
    family = FAMILIES[pipeline_config(args)["_class_name"]]
    steps = args.steps or family.steps
    random_steps = args.random_steps or max(steps - family.ode_steps, 1)
    return replace(args, steps=steps, random_steps=random_steps, guidance=args.guidance or family.guidance,
                   updates=args.updates or (1 if args.algorithm == "sf" else 4), train_timesteps=args.train_timesteps
                   or (steps if args.algorithm.startswith("rwr") else random_steps))


def load_family(args, device):
    """The pretrained pipeline, frozen, as its model family: network and VAE on the device, text encoders on the CPU."""
    import diffusers
    config = pipeline_config(args)
    # What model_index.json holds as null must be passed as None, or from_pretrained looks for it.
    absent = {name: None for name, part in config.items() if isinstance(part, (list, tuple)) and part[0] is None}
    if config["_class_name"] == "StableDiffusionPipeline":
        absent |= dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    dtype = {"default": {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype], "vae": torch.float32}
    pipe = getattr(diffusers, config["_class_name"]).from_pretrained(args.model, dtype=dtype, low_cpu_mem_usage=False, **absent)
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()
    family = FAMILIES[config["_class_name"]](pipe, args, device)
    family.network.to(device)
    pipe.vae.to(device)
    return family


@torch.no_grad()
def encode(family, prompts):
    """N prompts to the family's conditions, N rows each. The text encoders visit the device for it."""
    encoders = [m for name, m in family.pipe.components.items() if name.startswith("text_encoder") and m]
    for module in encoders:
        module.to(family.device)
    distinct = list(dict.fromkeys(prompts))
    parts = [family.encode(distinct[i:i + 16]) for i in range(0, len(distinct), 16)]
    for module in encoders:
        module.to("cpu")
    rows = torch.tensor([distinct.index(prompt) for prompt in prompts], device=family.device)
    return [torch.cat(part)[rows] for part in zip(*parts)]


@torch.no_grad()
def decode(family, latents, batch):
    """Latents (N, C, h, w) to a list of N PIL images."""
    images = []
    for z in latents.split(batch):
        x = (family.decode(z) * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
        images += [Image.fromarray(pixels) for pixels in x.permute(0, 2, 3, 1).cpu().numpy()]
    return images


def trajectory_device(count, device):
    """Where to keep `count` float32 numbers: on the GPU, if they take at most a quarter of what is free."""
    if device.type == "cuda" and 4 * count > torch.cuda.mem_get_info(device)[0] / 4:
        return torch.device("cpu")
    return device


# Save, resume, measure

def save(folder, layers, optimizer, generator, progress, prefix):
    """A checkpoint, runs/NAME/last or best: the LoRA for diffusers, and all that --resume needs."""
    folder.mkdir(parents=True, exist_ok=True)
    adapters = {name: {key: value for key, value in layer.state_dict().items() if not key.startswith("base.")}
                for name, layer in layers.items()}
    state = dict(adapters=adapters, optimizer=optimizer.state_dict(), rng=generator.get_state(), progress=progress)
    rewards.write_aside(folder / "state.pt", lambda aside: torch.save(state, aside))
    save_lora(folder / "pytorch_lora_weights.safetensors", layers, prefix=prefix)


def restore(folder, checkpoint, layers, optimizer, generator, progress, args):
    """The reverse of `save`. Lines of metrics.jsonl that training will write again go."""
    state = torch.load(folder / checkpoint / "state.pt", map_location="cpu", weights_only=True)
    for name, layer in layers.items():
        layer.load_state_dict(state["adapters"][name], strict=False)  # the frozen base is not in it
    optimizer.load_state_dict(state["optimizer"])
    optimizer.param_groups[0].update(lr=args.lr, weight_decay=args.weight_decay)  # flags may differ
    generator.set_state(state["rng"])
    if state["progress"]["best_by"] != progress["best_by"]:
        state["progress"].update(best=-math.inf, best_by=progress["best_by"])
    progress.update(state["progress"])
    if args.epochs:
        rewards.rewind_metrics(folder, progress["epoch"])


def peak_gb(device):
    """The most memory held so far, in GB (1e9 bytes): of the GPU, or of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


# The command line

def parse(argv=None):
    """The command line to Settings: a preset's defaults, or a resumed run's, then the flags given."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS, usage="python ddpo.py [--preset tiny] [--FLAG VALUE ...]")
    for field in fields(Settings):
        kind, text = get_args(field.type)
        kind = get_args(kind)[0] if get_origin(kind) is UnionType else kind  # str of str | None
        options = (dict(action=argparse.BooleanOptionalAction) if kind is bool else
                   dict(choices=get_args(kind)) if get_origin(kind) is Literal else
                   dict(type=kind, metavar=field.name.split("_")[-1].upper()))
        default = "" if field.default is None else f" [{field.default}]"
        parser.add_argument(f"--{field.name.replace('_', '-')}", help=text + default, **options)
    given = vars(parser.parse_args(argv))
    if "resume" in given:
        folder, checkpoint = run_folder(Settings(**given))
        if not (folder / checkpoint / "state.pt").exists():
            raise ValueError(f"cannot resume {folder}: it has no {checkpoint}/state.pt. Give a run such as runs/NAME")
        own, fixed = json.loads((folder / "args.json").read_text()), {"preset", "model", "rank", "alpha", "lora"}
        if own.keys() != asdict(Settings()).keys() or fixed & given.keys():
            raise ValueError(f"cannot resume {folder}: it is no run of ddpo.py, or one with another "
                             f"{' or '.join(sorted(fixed & given.keys()))}")
        return Settings(**{**own, **given})
    by_reward = {preset["reward"]: name for name, preset in PRESETS.items()}
    preset = given.get("preset", by_reward.get(given.get("reward", Settings.reward)))
    if preset and preset not in PRESETS:
        raise ValueError(f"--preset {preset}: no such preset; choose from {', '.join(PRESETS)}")
    args = Settings(**{**PRESETS.get(preset, {}), "preset": preset, **given})
    task = [given[key] for key in ("preset", "reward") if key in given] or [args.reward]
    args.name = args.name or re.sub(r"[^\w.-]+", "-", "-".join(["ddpo", *task, args.algorithm, f"seed{args.seed}"]))
    return args


def run_folder(args):
    """(the run's folder, the checkpoint in it that --resume goes on from: last or best)."""
    path = Path(args.resume or f"runs/{args.name}")
    return (path.parent, path.name) if args.resume and path.name in ("last", "best") else (path, "last")


def validate(args):
    """ValueError, in one line, for settings that contradict each other or this machine."""
    folder, _ = run_folder(args)
    for wrong, message in (
            (args.images % args.updates, f"--images {args.images} must be a multiple of --updates {args.updates}"),
            (args.images % args.group_size, f"--images must be a multiple of --group-size {args.group_size}"),
            (args.algorithm == "sf" and args.updates > 1, "--algorithm sf holds for the policy that drew the images, "
             "so for --updates 1; --algorithm is takes several"),
            (args.random_steps > args.steps, f"--random-steps {args.random_steps}: they are the first of --steps"),
            (args.train_timesteps > args.random_steps and not args.algorithm.startswith("rwr"),
             f"--train-timesteps {args.train_timesteps}: they are drawn from the {args.random_steps} random steps"),
            (args.stat_min > args.stat_buffer, "--stat-min: no prompt would ever have so many, see --stat-buffer"),
            (not 0 < args.keep <= 1, "--keep is a share of the images, more than 0 and at most 1"),
            (not args.resume and (folder / "metrics.jsonl").exists(),
             f"{folder} holds a run: choose another --name, or go on with --resume {folder}"),
            (not (args.device or torch.cuda.is_available() or Path(args.model).exists()),
             f"{args.model} needs a CUDA device, and there is none here. Try `python ddpo.py --preset tiny`, the "
             "bundled model for CPUs (or insist with --device cpu)")):
        if wrong:
            raise ValueError(message)


def main():
    """Train. A user's mistake ends in one line; `python -X dev crd.py` shows where it came from."""
    rewards.hush()
    folder = None
    try:
        args = parse()
        folder, _ = run_folder(args)
        train(args)
    except (ValueError, OSError, FloatingPointError, rewards.RewardError, KeyboardInterrupt) as error:
        if sys.flags.dev_mode:
            raise
        resumable = not isinstance(error, (ValueError, OSError)) and (folder / "last").exists()
        hint = f". The finished epochs are kept: --resume {folder}" if resumable else ""
        raise SystemExit(f"{str(error) or 'stopped'}{hint}") from None


if __name__ == "__main__":
    main()
