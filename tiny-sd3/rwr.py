"""Reward-weighted regression, the baselines of DDPO's paper (Black et al. 2023, sec. 4.2), on
ddpo.py's parts: its models, rollout, evaluation and files.

Draw images as DDPO does, score them, and train the model's own denoising loss on them, weighted by
their advantages (`rwr`), or on the best alone (`rwr-sparse`). Nothing is known of the sampler's
steps: each image is noised anew, at as many random steps as the sampler has.

    python tiny-sd3/rwr.py --preset tiny             # weights softmax(advantage / temperature)
    python tiny-sd3/rwr.py --preset tiny --sparse    # the best tenth

In one process. A run of it has the files of one of ddpo.py, and is resumed in the same way.
"""

import itertools
import json
import math
import random
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn as nn
from tqdm import tqdm
from transformers import HfArgumentParser

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import ddpo  # noqa: E402
import rewards  # noqa: E402


@dataclass
class Settings(ddpo.Settings):
    """Those of ddpo.py, of which `algorithm` and `clip` mean nothing here."""

    sparse: bool = ddpo.arg(False, "train on the best images alone, all alike")
    temperature: float = ddpo.arg(0.2, "weights are softmax(advantage / this) over an epoch")
    keep: float = ddpo.arg(0.1, "share of the images that is trained on, if sparse")


PRESETS = ddpo.PRESETS


def rwr_weights(advantages, temperature=0.2):
    """softmax(A / temperature) over N images, times N: 1 on average.

    The authors' code has softmax(0.2 R), a factor, whose sharpness depends on the reward's unit.
    """
    return torch.softmax(advantages / temperature, 0) * len(advantages)


def best_images(advantages, keep=0.1):
    """Indices of the best `keep` of N images, repeated to N, so that there are as many updates."""
    N = len(advantages)
    count = max(round(keep * N), 1)
    return advantages.topk(count).indices.repeat(math.ceil(N / count))[:N]


def noised(model, x0, noise, i):
    """Images (B, ...) at steps i (B,), and what the network has to predict of them."""
    if isinstance(model, ddpo.StableDiffusion):
        return model.scheduler.add_noise(x0, noise, model.t[i]), noise
    sigma = model.sigmas[i].view(-1, *[1] * (x0.ndim - 1))
    return (1 - sigma) * x0 + sigma * noise, noise - x0


def regression_loss(model, x0, weights, cond, uncond, args, generator):
    """mean w (f - target)^2, each image at a random step. f is guided, as it is in sampling."""
    i = torch.randint(args.steps, (len(x0),), generator=generator, device=x0.device)
    noise = torch.randn(x0.shape, generator=generator, device=x0.device)
    x, target = noised(model, x0, noise, i)
    f = ddpo.guided(model, x, i, cond, uncond, args.guidance)
    return (weights * (f - target).square().flatten(1).mean(1)).mean()


def train(args):
    """As ddpo.run, but for what is learned from the images. Returns the run's folder."""
    ddpo.check(args)
    if ddpo.PROCESSES > 1 or args.wandb or args.compile:
        raise ValueError("rwr.py has one process, no --wandb and no --compile")
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    folder = Path(args.resume or f"runs/{args.name}")
    K = args.group_size
    N = args.images
    random_steps = args.steps - args.deterministic_steps

    source = args.prompts or rewards.default_source(args.reward)
    held_out = rewards.evaluation_prompts(source, args.eval_images, args.eval_prompts)
    rewards.check_prompts(args.reward, held_out + rewards.read_prompts(source))
    rewards.check_prompts(args.eval_rewards or args.reward, held_out)
    reward = rewards.load(args.reward, device)
    if args.eval_rewards:
        held_out_reward = rewards.load(args.eval_rewards, device)

    torch.manual_seed(args.seed)
    pipe, model = ddpo.load_pipeline(args, device)
    uncond = ddpo.encode(pipe, model, [""])
    held_out_cond = ddpo.encode(pipe, model, [prompt for prompt, _ in held_out])
    layers = ddpo.add_lora(
        model.network, model.target_modules, args.rank, args.alpha, ddpo.ADAPTERS
    )
    state_file = folder / "state.pt"
    if args.lora and not state_file.exists():
        ddpo.load_lora(layers, pipe, args.lora, model.prefix)
    if args.grad_checkpoint:
        model.network.enable_gradient_checkpointing(ddpo.checkpoint)
    parameters = [p for p in model.network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, args.lr, weight_decay=1e-4)

    def adapters():
        tensors = model.network.state_dict()
        return {name: tensors[name] for name in tensors if name.endswith(ddpo.ADAPTERS)}

    # A new run, or one that goes on where its state was last saved
    progress = {"epoch": 0, "step": 0, "images": 0, "seconds": 0.0}
    metrics = []  # the lines of metrics.jsonl
    history = {}  # prompt: its last rewards
    if state_file.exists():
        state = torch.load(state_file, map_location="cpu", weights_only=True)
        if other := state["adapters"].keys() ^ adapters().keys():
            raise ValueError(f"{folder} has trained another model: {sorted(other)[:3]}")
        model.network.load_state_dict(state["adapters"], strict=False)
        optimizer.load_state_dict(state["optimizer"])
        optimizer.param_groups[0]["lr"] = args.lr
        progress = state["progress"]
        metrics = state["metrics"]
        history = state["history"]
    if args.resume and not args.epochs:  # only evaluate: the run stays as it is
        folder = folder / "evaluation"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "args.json").write_text(json.dumps(asdict(args), indent=2))

    def log(split, R, values):
        values = {"reward": R.mean().item(), **values}
        metrics.append({"split": split, **progress, **values})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in metrics))
        numbers = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
        tqdm.write(f"epoch {progress['epoch']:3d} {split:5s}  {numbers}")

    def evaluate():
        """Draw held-out prompts with `ema`, from the same x_T each time and without other noise;
        score, save, show them."""
        noise = torch.randn(
            len(held_out), *model.shape, generator=torch.Generator().manual_seed(1234)
        )
        micro_batches = ddpo.batches(0, len(held_out), args.micro_batch)
        with ddpo.use_adapter(layers, "ema"):
            x0, _, _ = ddpo.rollout(
                model, noise.to(device), held_out_cond, uncond, micro_batches, 0, args
            )
        images = ddpo.decode(pipe, x0)
        R, values = reward.score(images, *zip(*held_out))  # values: {name: mean score}
        if args.eval_rewards:
            values |= held_out_reward.score(images, *zip(*held_out))[1]
        log("eval", R, values)
        out = folder / f"epoch-{progress['epoch']:04d}"
        tensors = ddpo.adapter_tensors(layers, "ema")
        pipe.save_lora_weights(out, **{f"{model.prefix}_lora_layers": tensors})
        rewards.contact_sheet(out / "images.png", images, R.tolist(), held_out)
        rewards.plot_curve(folder / "curve.png", metrics)

    if progress["epoch"] == 0 or args.epochs == 0:
        evaluate()
    per_update = N // args.updates
    starts = range(0, N, per_update)
    drawn_in = sum((ddpo.batches(i, i + per_update, args.micro_batch) for i in starts), [])
    epochs = range(progress["epoch"], args.epochs)
    for epoch in ddpo.bar(epochs, folder.name, args.epochs, initial=epochs.start, leave=True):
        clock = [time.perf_counter()]
        seed = random.Random(f"{args.seed} {epoch} 0").getrandbits(63)
        generator = torch.Generator(device).manual_seed(seed)

        # 1. Roll out.
        stream = rewards.prompts(source, "train", seed, eval_file=args.eval_prompts)
        pairs = list(itertools.islice(stream, N // K))
        cond = [c.repeat_interleave(K, 0) for c in ddpo.encode(pipe, model, [p for p, _ in pairs])]
        noise = torch.randn(N, *model.shape, generator=generator, device=device)
        x0, _, _ = ddpo.rollout(model, noise, cond, uncond, drawn_in, random_steps, args, generator)
        images = ddpo.decode(pipe, x0)
        clock.append(time.perf_counter())

        # 2. Score.
        prompts, metadata = zip(*[pair for pair in pairs for _ in range(K)])
        R, values = reward.score(images, prompts, metadata)
        A = ddpo.prompt_advantages(history, prompts, R, args.stat_min).to(device)
        clock.append(time.perf_counter())

        # 3. Regress: shuffled, each image at as many random steps as the sampler takes.
        order = torch.randperm(N, generator=generator, device=device)
        weights = rwr_weights(A, args.temperature)
        if args.sparse:
            order = best_images(A, args.keep)[order]
            weights = torch.ones_like(A)
        totals = defaultdict(float)
        for update in ddpo.bar(order.split(per_update), "train"):
            for rows, _ in itertools.product(update.split(args.micro_batch), range(args.steps)):
                c = [part[rows] for part in cond]
                loss = regression_loss(model, x0[rows], weights[rows], c, uncond, args, generator)
                share = len(rows) / per_update / args.steps
                (share * loss).backward()
                totals["loss"] += share / args.updates * loss.detach()
            norm = nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
            totals["grad_norm"] += norm / args.updates
            optimizer.step()
            optimizer.zero_grad()
            progress["step"] += 1
            decay = min(args.ema, (1 + progress["step"]) / (10 + progress["step"]))
            ddpo.ema_update(layers, "ema", decay)
        clock.append(time.perf_counter())

        # 4. Log, evaluate, save.
        progress["epoch"] += 1
        progress["images"] += len(R)
        progress["seconds"] += clock[-1] - clock[0]
        values |= {name: total.item() for name, total in totals.items()}
        for i, phase in enumerate(("rollout", "reward", "train")):
            values[f"{phase}_seconds"] = clock[i + 1] - clock[i]
        log("train", R, values)
        if progress["epoch"] % args.eval_every == 0 or progress["epoch"] == args.epochs:
            evaluate()
        state = {"adapters": adapters(), "optimizer": optimizer.state_dict()}
        state |= {"progress": progress, "metrics": metrics, "history": history}
        torch.save(state, folder / "state.new")
        (folder / "state.new").replace(state_file)
    return folder


def parse(argv=None):
    """Settings from the command line: flags over a preset's defaults, or over a resumed run's."""
    parser = HfArgumentParser(Settings, description=__doc__.splitlines()[0])
    flags = parser.parse_args(argv)  # for the preset; parsed again with its defaults
    algorithm = "rwr-sparse" if flags.sparse else "rwr"
    name = f"{algorithm}-{flags.preset}-seed{flags.seed}"
    parser.set_defaults(**{"name": name, **ddpo.PRESETS[flags.preset]})
    if flags.resume:
        saved = json.loads(Path(flags.resume, "args.json").read_text())
        if saved.keys() != asdict(Settings()).keys():
            raise ValueError(f"{flags.resume} holds no run of rwr.py")
        parser.set_defaults(**saved)
    return parser.parse_args_into_dataclasses(argv)[0]


if __name__ == "__main__":
    train(parse())
