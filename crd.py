"""CRD, Centered Reward Distillation (Zhu, Wang, Lathuiliere, Kalogeiton 2026, arXiv 2603.14128), in one file.

Fine-tune a flow-matching text-to-image model so that its images score higher under a reward r(x, c).
Maximising E[r] - beta KL(p || p_old) has a known optimum p*, which can be solved for the reward:

    p*(x|c) = p_old(x|c) exp(r(x,c) / beta) / Z(c)    so    r(x,c) = beta log (p*/p_old)(x|c) + beta log Z(c)

Z(c) is intractable, but it is the same number for every image of a prompt: draw K images of each prompt,
subtract their mean on both sides, and it is gone. What is left is a regression of the model's centered
log-ratio rho on the centered reward s. No policy gradient, no backpropagation through the sampler:

    rho_i = mean[(v_old - u)^2 / m_old - (v - u)^2 / m]   log (p/p_old) by denoising errors  (implicit_reward)
    L_crd = A_max/beta mean_i[(beta (rho_i - mean rho) - (s_i - mean s))^2]                         (crd_loss)
    L     = L_crd + mean_i[kappa_i mean (v - v_ref)^2]   anchored to the guided pretrained model (anchor_loss)

Three copies of one LoRA share the frozen model: `policy` learns, `old` is p_old and follows it slowly, and
`sampler` draws the images. With all of them off it is the pretrained model. The loop, in `train`:

    for each epoch:
        roll out: draw K images of each prompt with `sampler`                                     (sample_ode)
        score them, and turn rewards into targets s                                           (reward_targets)
        for each optimizer step, on its share of the prompts, and for each training sigma:
            noise each image, predict its velocity with policy, `old` and the guided pretrained model, and
            add up the gradients of L                                                   (accumulate_gradients)
        let `old` and `sampler` follow the policy, each at its own pace                (ema_decay, ema_update)

    python crd.py --preset tiny        # the bundled toy model, on any CPU, in minutes
    python crd.py --reward ocr         # Stable Diffusion 3.5 Medium learns to write, on one GPU
    python crd.py --help               # every setting

Left out, for the sake of reading: several processes (the authors train on many GPUs), and other models than
Stable Diffusion 3.x (for another flow model, replace `load_pipeline`, `encode`, `velocity` and `decode`).
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
from dataclasses import asdict, dataclass, fields
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
    preset: Annotated[str | None, "ocr, geneval or tiny; by default the reward decides"] = None
    model: Annotated[str, "a Stable Diffusion 3 folder or repo"] = "stabilityai/stable-diffusion-3.5-medium"
    dtype: Annotated[Literal["bf16", "fp32"], "precision of the frozen weights"] = "bf16"
    height: Annotated[int, "image height in pixels"] = 512
    width: Annotated[int, "image width in pixels"] = 512
    max_sequence_length: Annotated[int, "T5 tokens per prompt"] = 128
    rank: Annotated[int, "LoRA rank"] = 32
    alpha: Annotated[float, "LoRA scale is alpha / rank"] = 64
    lora: Annotated[str | None, "start from the LoRA in this folder, such as runs/NAME/best"] = None

    # rollout
    reward: Annotated[str, "name[@path-or-repo][:weight], joined by commas (see rewards.py)"] = "ocr"
    reward_batch: Annotated[int, "images that a reward model is shown at once"] = 16
    prompts: Annotated[str | None, "prompt set, or .txt or .jsonl file; by default the reward's own"] = None
    groups: Annotated[int, "prompts per epoch"] = 48
    group_size: Annotated[int, "images per prompt (K)"] = 24
    rollout_steps: Annotated[int, "sampler steps of a rollout"] = 10
    sample_batch: Annotated[int, "images sampled at once"] = 24
    decode_batch: Annotated[int, "images decoded at once"] = 8
    tie_sampler: Annotated[bool, "ablation: draw the images with `old` itself"] = False

    # loss
    beta: Annotated[float, "scale of the implicit reward beta * rho"] = 1.0
    tau: Annotated[float, "temperature of the centering weights (inf: the plain mean)"] = math.inf
    advantage_clip: Annotated[float, "advantages are clipped to plus and minus this (A_max)"] = 5.0
    adaptive: Annotated[bool, "divide each denoising error by its own detached size"] = True
    reward_weight: Annotated[float, "weight of the centered loss (0: the anchor alone)"] = 1.0
    anchor: Annotated[float, "kappa, the anchor's largest weight (0: no anchor)"] = 0.1
    anchor_guidance: Annotated[float, "guidance of the pretrained model that anchors (1: none)"] = 4.5
    anchor_adapt: Annotated[Literal["reward", "advantage", "off"], "what scales each image's kappa"] = "reward"
    train_timesteps: Annotated[int | None, "sigmas per step, of the rollout's; by default all"] = None

    # optimisation
    epochs: Annotated[int, "epochs in all (0: only evaluate)"] = 300
    steps_per_epoch: Annotated[int, "optimizer steps per epoch, each on a share of the groups"] = 1
    micro_batch: Annotated[int, "images in a forward and backward pass (a group may be cut)"] = 24
    lr: Annotated[float, "AdamW learning rate"] = 3e-4
    weight_decay: Annotated[float, "AdamW weight decay"] = 1e-4
    max_grad_norm: Annotated[float, "the gradient norm is clipped to this"] = 1.0
    old_decay: Annotated[tuple, "`old` keeps: start_step, start_value, slope, end"] = (0, 0.25, 0.001, 0.5)
    sampler_decay: Annotated[tuple, "`sampler`: the same four"] = (0, 0.0, 0.001, 0.5)
    grad_checkpoint: Annotated[bool, "recompute blocks in the backward pass, to save memory"] = True
    compile: Annotated[bool, "torch.compile each transformer block"] = False

    # run
    name: Annotated[str | None, "the run's folder is runs/NAME; made up by default"] = None
    seed: Annotated[int, "fixes the whole run on one device"] = 0
    device: Annotated[str | None, "cuda, cpu ...; by default cuda where there is one"] = None
    eval_every: Annotated[int, "epochs between evaluations"] = 10
    eval_images: Annotated[int, "images of held-out prompts, from the same noise every time"] = 128
    eval_steps: Annotated[int, "sampler steps of an evaluation"] = 40
    eval_guidance: Annotated[float, "guidance of evaluations (training is always unguided)"] = 1.0
    eval_rewards: Annotated[str | None, "more rewards, as for --reward, that only judge"] = None
    eval_prompts: Annotated[str | None, "evaluate on all prompts of this .txt or .jsonl file"] = None
    resume: Annotated[str | None, "go on from runs/NAME (or runs/NAME/best), with its settings"] = None
    wandb: Annotated[str | None, "also log to this Weights & Biases project"] = None


PRESETS = {
    "ocr": dict(reward="ocr", steps_per_epoch=2, old_decay=(0, 0.25, 0.005, 0.999),
                sampler_decay=(75, 0.0, 0.0075, 0.999)),
    "geneval": dict(reward="geneval"),
    "tiny": dict(model=str(HERE / "tiny-sd3"), reward=f"ocr@{HERE / 'tiny-sd3'}", prompts="signs", height=32,
                 width=64, max_sequence_length=1, rank=16, alpha=32, groups=48, group_size=8, sample_batch=192,
                 decode_batch=96, micro_batch=96, train_timesteps=2, epochs=30, steps_per_epoch=6, lr=1e-3,
                 old_decay=(0, 0.25, 0.005, 0.95), anchor_guidance=4.0, grad_checkpoint=False,
                 eval_images=512, eval_steps=10, device="cpu"),
}


# The mathematics: pure functions, in the order in which the loop calls them

def sample_ode(velocity, noise, sigmas, order=2):
    """Integrate dx/dsigma = v from noise to an image by DPM-Solver++(2M) (Lu et al. 2022, arXiv 2211.01095).

    In flow form alpha = 1 - sigma and lambda = log(alpha / sigma), and a step from s to t is
    x_t = D + (t / s) (x_s - D). At first order, which is Euler's method, D is the data prediction
    x0 = x - sigma v; at second it is extrapolated in lambda from the last two predictions. The first and the
    last step are first order, and so is the second where sigma starts at 1, since lambda is infinite there.

    velocity(x, sigma ()) -> (B, C, H, W); noise (B, C, H, W); sigmas (S + 1,), descending, the last one 0.
    Returns x0 (B, C, H, W). ValueError for other sigmas.
    """
    if sigmas[-1] != 0 or (sigmas.diff() >= 0).any():
        raise ValueError(f"sigmas must descend to 0, not {sigmas.tolist()}")
    x, before = noise, None
    log_snr = torch.log((1 - sigmas) / sigmas)
    for i, (s, t) in enumerate(zip(sigmas[:-1], sigmas[1:])):
        D = x0 = x - s * velocity(x, s)
        if order == 2 and before is not None and t > 0:
            ratio = (log_snr[i + 1] - log_snr[i]) / (log_snr[i] - log_snr[i - 1])
            D = x0 + ratio / 2 * (x0 - before)
        x = D + t / s * (x - D)
        before = x0
    return x


def reward_targets(rewards, group_size, clip=5.0):
    """Targets s = A / (2 clip) + 1/2 in [0, 1], A = (R - mean_group R) / (std_all R + 1e-4) within +-clip.

    rewards R (N,), a prompt's images side by side. The mean is the prompt's own, the standard deviation the
    batch's (over N), so that a prompt with little spread is not blown up. The 1/2 cancels when s is centered:
    it only puts s on [0, 1]. ValueError if N is no multiple of group_size.
    """
    if len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} rewards are not whole groups of {group_size}")
    centered = rewards.view(-1, group_size) - rewards.view(-1, group_size).mean(1, keepdim=True)
    A = centered.flatten() / (rewards.std(correction=0) + 1e-4)
    return A.clamp(-clip, clip) / (2 * clip) + 0.5


def add_noise(x0, noise, sigma):
    """x_sigma = (1 - sigma) x0 + sigma noise, the straight path of flow matching (Lipman et al. 2022).

    x0, noise (B, C, H, W); sigma () or (B,) in [0, 1]. Its velocity, the training target, is u = noise - x0.
    """
    sigma = sigma.view(-1, 1, 1, 1)
    return (1 - sigma) * x0 + sigma * noise


def implicit_reward(v, v_old, u, adaptive=True):
    """rho = mean[(v_old - u)^2 / m_old - (v - u)^2 / m], a draw of log p(x|c) - log p_old(x|c) up to scale.

    (Paper, sec. 3.) By the ELBO a model's log-likelihood is minus its denoising error; both models are shown
    the same sigma and noise. The adaptive weights m = mean |v - u|, at least 1e-5 and detached, put all
    sigmas on one scale. They are DiffusionNFT's idea (arXiv 2509.16117), there on x0 = x - sigma v, where
    they are sigma times ours; on velocities they are as in the CRD authors' port.

    v, v_old, u (B, C, H, W) -> (B,). Zero where v = v_old.
    """
    def error(prediction):
        difference = prediction - u
        m = difference.abs().mean((1, 2, 3)).detach().clamp(min=1e-5) if adaptive else 1.0
        return difference.square().mean((1, 2, 3)) / m

    return error(v_old) - error(v)


def group_mean(x, targets, group_size, tau=math.inf):
    """The mean of x over each group, given back to its members: (1, B), or (2, B) at a finite temperature.

    Then it is weighted twice, by softmax(s / tau) and by softmax(-s / tau): a group is centered once on its
    best images and once on its worst. x and targets s (B,), whole groups side by side.
    """
    s = targets.view(-1, group_size)
    logits = torch.zeros_like(s)[None] if tau == math.inf else torch.stack([s, -s]) / tau
    mean = (logits.softmax(-1) * x.view(-1, group_size)).sum(-1, keepdim=True)
    return mean.expand(-1, -1, group_size).flatten(1)


def crd_loss(rho, rho_mean, targets, targets_mean, beta=1.0, clip=5.0):
    """A_max/beta mean_i[(beta (rho_i - mean rho) - (s_i - mean s))^2], the centered loss; `clip` is A_max.

    rho, targets s (B,); rho_mean, targets_mean (D, B) by `group_mean`, of the whole group even where the B
    images are a part of one, and detached. (With the plain mean, D = 1, detaching changes no gradient: the
    centered terms that the mean of rho multiplies sum to zero. At D = 2 both directions are averaged.)

    Why A_max/beta: at rho = 0 the gradient is then -mean_i[A_i grad rho_i], whatever A_max and beta are. They
    set where it ends: the regression asks for rho - mean rho = (R - mean R) / (2 A_max beta std).
    """
    return clip / beta * (beta * (rho - rho_mean) - (targets - targets_mean)).square().mean()


def anchor_loss(v, v_ref, normalized_reward, kappa, kappa_min=1e-4):
    """mean_i[kappa_i mean (v - v_ref)^2], with kappa_i = kappa_min + n_i (kappa - kappa_min).

    The KL to the guided pretrained model, up to a weight for each sigma. v, v_ref (B, C, H, W); n, the
    normalized_reward, (B,) in [0, 1], or None for kappa everywhere. The anchor is weak on images of low
    reward, which have everything to learn, and strong on those that could start to exploit the reward.
    """
    kappa_min = min(kappa_min, kappa)
    strength = kappa if normalized_reward is None else kappa_min + normalized_reward * (kappa - kappa_min)
    return (strength * (v - v_ref).square().mean((1, 2, 3))).mean()


def ema_decay(step, start_step, start_value, slope, end_value):
    """The share of itself that an adapter keeps when it follows the policy: a ramp up to end_value."""
    return start_value if step < start_step else min(start_value + slope * (step - start_step), end_value)


# The algorithm

def accumulate_gradients(transformer, layers, x0, noise, sigma, cond, uncond, targets, normalized_reward,
                         weight, args):
    """Add `weight` times the gradient of the objective L at one sigma to the policy's gradients.

    x0, noise (N, C, h, w), whole groups side by side; targets and normalized_reward (N,); cond of the N / K
    prompts. A micro-batch is some whole groups, or a part of one: where groups are cut, a pass without
    gradients first gives rho's mean over the whole group. Returns the means of L, L_crd, the anchor, rho and
    rho^2, times `weight`.
    """
    K, N, totals = args.group_size, len(x0), torch.zeros(5)
    x, u = add_noise(x0, noise, sigma), noise - x0
    targets_mean = group_mean(targets, targets, K, args.tau)

    def predict(rows, adapter, guidance=1.0):
        with use_adapter(layers, adapter):
            return velocity(transformer, x[rows], sigma, [t[rows // K] for t in cond], uncond, guidance)

    for chunk in torch.arange(N).split(max(args.micro_batch // K, 1) * K):  # as many groups as fit, at least one
        parts = chunk.split(args.micro_batch)
        if args.reward_weight:
            with torch.no_grad():
                v_old = torch.cat([predict(rows, "old") for rows in parts])
                if len(parts) > 1:
                    v = torch.cat([predict(rows, "policy") for rows in parts])
                    rho = implicit_reward(v, v_old, u[chunk], args.adaptive)
                    rho_mean = group_mean(rho, targets[chunk], K, args.tau)
        for rows in parts:
            from torch.nn.attention import SDPBackend, sdpa_kernel
            with sdpa_kernel(SDPBackend.MATH):
                v = predict(rows, "policy")
            reward_loss = anchor = rho = torch.zeros((), device=v.device)
            if args.reward_weight:
                here = rows - chunk[0]
                rho = implicit_reward(v, v_old[here], u[rows], args.adaptive)
                if len(parts) == 1:
                    rho_mean = group_mean(rho.detach(), targets[rows], K, args.tau)
                reward_loss = crd_loss(rho, rho_mean[:, here], targets[rows], targets_mean[:, rows],
                                       args.beta, args.advantage_clip)
            if args.anchor:
                with torch.no_grad():
                    v_ref = predict(rows, None, args.anchor_guidance)
                anchor = anchor_loss(v, v_ref, normalized_reward[rows], args.anchor)
            loss, share = args.reward_weight * reward_loss + anchor, weight * len(rows) / N
            (share * loss).backward()
            values = torch.stack([loss, reward_loss, anchor, rho.mean(), rho.square().mean()])
            totals += share * values.detach().cpu()
    return totals


def train(args):
    """The paper's Algorithm 1, from loading to the last evaluation. Returns the run's folder."""
    validate(args)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder, checkpoint = run_folder(args)
    reward, judge, stream, held_out, held_out_metadata = rewards.load_task(args, device)
    pipe = load_pipeline(args, device)
    transformer, scale = pipe.transformer, pipe.vae_scale_factor
    shape = transformer.config.in_channels, args.height // scale, args.width // scale  # of one image's latents

    torch.manual_seed(args.seed)
    generator = torch.Generator(device).manual_seed(args.seed)  # for all that is random after LoRA and prompts
    held_out_cond, uncond = encode(pipe, held_out, args), encode(pipe, [""], args)
    layers = add_lora(transformer, TARGET_MODULES, args.rank, args.alpha, ADAPTERS)
    if args.lora and not args.resume:
        for adapter in ADAPTERS:
            load_lora(Path(args.lora, "pytorch_lora_weights.safetensors"), layers, adapter)
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # a graph for each adapter, with and without gradients
        for block in transformer.transformer_blocks:
            block.forward = torch.compile(block.forward)
    if args.grad_checkpoint:
        checkpoint_blocks(transformer.transformer_blocks, layers)
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.999), eps=1e-8,
                                  weight_decay=args.weight_decay)

    progress = {"epoch": 0, "step": 0, "prompts": 0, "images": 0, "seconds": 0.0, "best": -math.inf,
                "best_by": [args.reward, args.prompts, args.eval_prompts, args.eval_images, args.eval_steps,
                            args.eval_guidance]}  # another measure starts a best of its own
    if args.resume:
        restore(folder, checkpoint, layers, optimizer, generator, progress, args)
        stream = itertools.islice(stream, progress["prompts"], None)
    (folder / "samples").mkdir(parents=True, exist_ok=True)
    if args.epochs or not args.resume:
        text = json.dumps(asdict(args), indent=2)
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
        with use_adapter(layers, "policy"):
            latents = generate(pipe, noise, args.eval_steps, held_out_cond, args.sample_batch, uncond,
                               args.eval_guidance, label="evaluate")
        images = decode(pipe, latents, args.decode_batch)
        R, means, tables = rewards.evaluation(reward, judge, images, held_out, held_out_metadata)
        split = "test" if args.resume and not args.epochs else "eval"  # a look at a run is no part of its curve
        log(split, **means, **tables)
        rewards.show(folder, split, progress["epoch"], reward.name, images, held_out, R, means, tables)
        if args.epochs and R.mean() > progress["best"]:
            progress["best"] = R.mean().item()
            save(folder / "best", layers, optimizer, generator, progress)

    K, N, T = args.group_size, args.groups * args.group_size, args.train_timesteps or args.rollout_steps
    sigmas = scheduler_sigmas(pipe, args.rollout_steps)
    if not args.resume or not args.epochs:
        evaluate()
    if not args.resume and args.epochs:
        save(folder / "last", layers, optimizer, generator, progress)
    start = progress["epoch"]
    for epoch in tqdm(range(start, args.epochs), desc=folder.name, initial=start, total=args.epochs):
        clock = [time.perf_counter()]

        # 1. Roll out: K images of each prompt with the sampler, without guidance.
        drawn = list(itertools.islice(stream, args.groups))
        cond = encode(pipe, [prompt for prompt, _ in drawn], args)
        noise = torch.randn(N, *shape, generator=generator, device=device)
        with use_adapter(layers, "old" if args.tie_sampler else "sampler"):
            x0 = generate(pipe, noise, args.rollout_steps, cond, args.sample_batch)  # (N, C, h, w)
        images = decode(pipe, x0, args.decode_batch)
        clock.append(time.perf_counter())

        # 2. Score.
        prompts, metadata = zip(*[pair for pair in drawn for _ in range(K)])
        R, parts = reward.score(images, prompts, metadata)  # (N,)
        targets = reward_targets(R, K, args.advantage_clip).to(device)
        normalized_reward = {"reward": rewards.normalize(R, reward.range).to(device), "advantage": targets,
                             "off": torch.ones(N, device=device)}[args.anchor_adapt]
        clock.append(time.perf_counter())

        # 3. Train: each optimizer step on its share of the groups, at T of the rollout's sigmas.
        totals = torch.zeros(6)  # of the loss, its two terms, rho, rho squared and the gradient's norm
        for rows in tqdm(torch.arange(N).split(N // args.steps_per_epoch), desc="train", leave=False):
            share_cond = [t[rows[::K] // K] for t in cond]
            for i in torch.randperm(args.rollout_steps, generator=generator, device=device)[:T]:
                noise = torch.randn(len(rows), *shape, generator=generator, device=device)
                totals[:5] += accumulate_gradients(
                    transformer, layers, x0[rows], noise, sigmas[i], share_cond, uncond, targets[rows],
                    normalized_reward[rows], 1 / T, args)
            totals[5] += nn.utils.clip_grad_norm_(parameters, args.max_grad_norm).cpu()
            if not totals.isfinite().all():
                raise FloatingPointError(f"the loss is {totals[0]:g} and its gradient's norm {totals[5]:g}: "
                                         "stopped before the optimizer step, try a smaller --lr")
            optimizer.step()
            optimizer.zero_grad()
            progress["step"] += 1

        # 4. Let the reference and the sampler follow the policy.
        ema_update(layers, "old", ema_decay(progress["step"], *args.old_decay))
        ema_update(layers, "sampler", ema_decay(progress["step"], *args.sampler_decay))
        clock.append(time.perf_counter())

        seconds = [end - begin for begin, end in itertools.pairwise(clock)]
        for key, more in {"epoch": 1, "prompts": args.groups, "images": N, "seconds": sum(seconds)}.items():
            progress[key] += more
        loss, centered_loss, anchor, rho, rho_squared, grad_norm = (totals / args.steps_per_epoch).tolist()
        rate, memory = N / sum(seconds), peak_gb(device)
        log("train", **rewards.summary(R, parts), loss=loss, centered_loss=centered_loss, anchor=anchor, rho=rho,
            rho_std=max(rho_squared - rho**2, 0) ** 0.5, grad_norm=grad_norm, images_per_second=rate,
            peak_gb=memory, **dict(zip(("sample_seconds", "reward_seconds", "train_seconds"), seconds)))
        tqdm.write(f"epoch {epoch:4d}  reward {R.mean():.4f}  loss {loss:.4f}  grad {grad_norm:.3f}  |  "
                   "sample {:.1f} + reward {:.1f} + train {:.1f} s".format(*seconds) +
                   f"  {rate:.1f} img/s  {memory:.1f} GB")
        if progress["epoch"] % args.eval_every == 0 or progress["epoch"] == args.epochs:
            evaluate()
        save(folder / "last", layers, optimizer, generator, progress)
    return folder


# LoRA by hand

ADAPTERS = ("policy", "old", "sampler")
TARGET_MODULES = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
                  "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")


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


# The pipeline's two ends

def load_pipeline(args, device):
    """The pretrained pipeline, frozen: transformer and VAE on the device, text encoders on the CPU."""
    from diffusers import StableDiffusion3Pipeline
    dtype = {"default": {"bf16": torch.bfloat16, "fp32": torch.float32}[args.dtype], "vae": torch.float32}
    try:
        # What model_index.json holds as null must be passed as None, or from_pretrained looks for it.
        absent = {name: None for name, part in StableDiffusion3Pipeline.load_config(args.model).items()
                  if isinstance(part, (list, tuple)) and part[0] is None}
        pipe = StableDiffusion3Pipeline.from_pretrained(args.model, dtype=dtype, low_cpu_mem_usage=False, **absent)
    except (OSError, ValueError) as error:
        cause = str(error).strip().partition("\n")[0]
        raise OSError(f"cannot load {args.model} ({cause}). If its weights are gated, accept the licence on "
                      f"https://huggingface.co/{args.model} and run `hf auth login`; or try `python crd.py "
                      "--preset tiny`, the bundled model") from None
    for module in pipe.components.values():
        if isinstance(module, nn.Module):
            module.requires_grad_(False).eval()
    pipe.transformer.to(device)
    pipe.vae.to(device)
    return pipe


@torch.no_grad()
def encode(pipe, prompts, args):
    """N prompts to (embeddings (N, L, D), pooled (N, P)). The text encoders visit the device for it."""
    device, encoders = pipe.vae.device, [m for name, m in pipe.components.items() if name.startswith("text_enc") and m]
    for module in encoders:
        module.to(device)
    parts = [pipe.encode_prompt(list(prompts[i:i + 16]), None, None, device=device,
                                do_classifier_free_guidance=False, max_sequence_length=args.max_sequence_length)
             for i in range(0, len(prompts), 16)]
    for module in encoders:
        module.to("cpu")
    return torch.cat([part[0] for part in parts]), torch.cat([part[2] for part in parts])


def velocity(transformer, x, sigma, cond, uncond=None, guidance=1.0):
    """v(x, sigma, c), or with guidance v(uncond) + guidance (v(c) - v(uncond)) (Ho and Salimans 2022).

    x (B, C, H, W) float32; sigma (); cond = (embeddings (B, L, D), pooled (B, P)); uncond: those of one "".
    """
    if guidance != 1.0:
        both = [torch.cat([e.expand_as(c), c]) for e, c in zip(uncond, cond)]
        v_uncond, v_cond = velocity(transformer, torch.cat([x, x]), sigma, both).chunk(2)
        return v_uncond + guidance * (v_cond - v_uncond)
    timestep = (1000 * sigma).expand(len(x))
    return transformer(x.to(transformer.dtype), *cond, timestep, return_dict=False)[0].float()


@torch.no_grad()
def decode(pipe, latents, batch):
    """Latents (N, C, h, w) to a list of N PIL images."""
    images, config = [], pipe.vae.config
    for z in latents.split(batch):
        x = pipe.vae.decode(z / config.scaling_factor + config.shift_factor).sample
        x = (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        images += [Image.fromarray(pixels) for pixels in x]
    return images


def scheduler_sigmas(pipe, steps):
    """The pretrained model's own noise levels for a run of `steps`: (steps + 1,), from 1 down to 0."""
    pipe.scheduler.set_timesteps(steps)
    return pipe.scheduler.sigmas.to(pipe.vae.device, torch.float32)


@torch.no_grad()
def generate(pipe, noise, steps, cond, batch, uncond=None, guidance=1.0, label="sample"):
    """Noise (N, C, h, w) and the conditions of P prompts to latents x0 (N, C, h, w), N / P images of each."""
    latents, K, sigmas = [], len(noise) // len(cond[0]), scheduler_sigmas(pipe, steps)
    for rows in tqdm(torch.arange(len(noise)).split(batch), desc=label, leave=False):
        here = [t[rows // K] for t in cond]
        latents.append(sample_ode(lambda x, sigma: velocity(pipe.transformer, x, sigma, here, uncond, guidance),
                                  noise[rows], sigmas))
    return torch.cat(latents)


# Save, resume, measure

def save(folder, layers, optimizer, generator, progress):
    """A checkpoint, runs/NAME/last or best: the LoRA for diffusers, and all that --resume needs."""
    folder.mkdir(parents=True, exist_ok=True)
    adapters = {name: {key: value for key, value in layer.state_dict().items() if not key.startswith("base.")}
                for name, layer in layers.items()}
    state = dict(adapters=adapters, optimizer=optimizer.state_dict(), rng=generator.get_state(), progress=progress)
    rewards.write_aside(folder / "state.pt", lambda aside: torch.save(state, aside))
    save_lora(folder / "pytorch_lora_weights.safetensors", layers)


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
        argument_default=argparse.SUPPRESS, usage="python crd.py [--preset tiny] [--FLAG VALUE ...]")
    for field in fields(Settings):
        kind, text = get_args(field.type)
        kind = get_args(kind)[0] if get_origin(kind) is UnionType else kind  # str of str | None
        options = (dict(action=argparse.BooleanOptionalAction) if kind is bool else
                   dict(choices=get_args(kind)) if get_origin(kind) is Literal else
                   dict(type=float, nargs=4, metavar=("STEP", "VALUE", "SLOPE", "END")) if kind is tuple else
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
            raise ValueError(f"cannot resume {folder}: it is no run of crd.py, or one with another "
                             f"{' or '.join(sorted(fixed & given.keys()))}")
        return Settings(**{**own, **given})
    text = rewards.default_prompts(given.get("reward", Settings.reward)) == "ocr"
    preset = given.get("preset", "ocr" if text else "geneval")
    if preset not in PRESETS:
        raise ValueError(f"--preset {preset}: no such preset; choose from {', '.join(PRESETS)}")
    args = Settings(**{**PRESETS[preset], "preset": preset, **given})
    task = [given[key] for key in ("preset", "reward") if key in given] or [args.reward]
    args.name = args.name or re.sub(r"[^\w.-]+", "-", "-".join(["crd", *task, f"seed{args.seed}"]))
    return args


def run_folder(args):
    """(the run's folder, the checkpoint in it that --resume goes on from: last or best)."""
    path = Path(args.resume or f"runs/{args.name}")
    return (path.parent, path.name) if args.resume and path.name in ("last", "best") else (path, "last")


def validate(args):
    """ValueError, in one line, for settings that contradict each other or this machine."""
    folder, _ = run_folder(args)
    for wrong, message in (
            (args.groups % args.steps_per_epoch, "--groups must be a multiple of --steps-per-epoch"),
            ((args.train_timesteps or 0) > args.rollout_steps, "--train-timesteps are drawn from --rollout-steps"),
            (args.group_size < 2 and args.reward_weight, "--group-size 1: an image alone is its own mean"),
            (not args.reward_weight and not args.anchor, "--reward-weight 0 --anchor 0: nothing to learn from"),
            (not args.resume and (folder / "metrics.jsonl").exists(),
             f"{folder} holds a run: choose another --name, or go on with --resume {folder}"),
            (not (args.device or torch.cuda.is_available() or Path(args.model).exists()),
             f"{args.model} needs a CUDA device, and there is none here. Try `python crd.py --preset tiny`, the "
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
