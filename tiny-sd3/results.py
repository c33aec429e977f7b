"""The evidence: every experiment of RESULTS.md, run, tabulated and drawn by one script.

    python tiny-sd3/results.py            # run what is missing, two at a time
    python tiny-sd3/results.py --table    # print the tables
    python tiny-sd3/results.py --plot     # draw the figures, into .github/assets

Run it from the project's root. The run of an experiment with seed 0 is runs/NAME-0. Where there are
none, .github/assets/runs.tgz is unpacked: their metrics.jsonl, and the images shown.
"""

import argparse
import io
import json
import math
import os
import shutil
import subprocess
import sys
import tarfile
import textwrap
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from statistics import fmean

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import rewards  # noqa: E402

ASSETS = Path(".github/assets")
SEEDS = (0, 1, 2)
ALONE = "--anchor 0 --lr 1.5e-3"
FAST = f"{ALONE} --old-decay 0 0 0.001 0.5"  # `old` at the pace of the preset's sampler
SLOW = f"{ALONE} --sampler-decay 0 0.25 0.01 0.9"  # the sampler at the pace of its `old`
JUDGES = "ocr@tiny-sd3,ocr@tiny-sd3/judge,clipscore@tiny-sd3/clip,color"
JPEG = f"--reward compressibility --eval-rewards {JUDGES}"
SMALL = f"--reward results.SmallFiles --eval-rewards {JUDGES}"
SCRIPTS = {"crd": "crd.py", "ddpo": "ddpo.py", "rwr": "tiny-sd3/rwr.py"}
# name: (script, epochs, flags after --preset tiny or, for a name with scenes-, --preset scenes)
EXPERIMENTS = {
    **{f"guidance-{w}": ("crd", 0, f"--eval-guidance {w}") for w in (1, 1.5, 2, 3, 4, 5)},
    "crd": ("crd", 48, ""),
    "reward-alone": ("crd", 48, ALONE),
    "is": ("ddpo", 48, ""),
    "is-guided": ("ddpo", 48, "--guidance 4"),
    "anchor-alone": ("crd", 48, "--reward-weight 0"),
    "both-fast": ("crd", 48, FAST),
    "both-slow": ("crd", 48, SLOW),
    "sf": ("ddpo", 192, "--algorithm sf --images 48"),
    "rwr": ("rwr", 48, "--lr 1e-4"),
    "jpeg-is": ("ddpo", 24, f"{JPEG} --lr 1.5e-3"),
    "jpeg-sf": ("ddpo", 96, f"{JPEG} --algorithm sf --images 48 --lr 1.5e-3"),
    "jpeg-rwr": ("rwr", 24, f"{JPEG} --lr 1.5e-3"),
    "rwr-sparse": ("rwr", 48, "--sparse --lr 3e-5"),
    "jpeg-rwr-sparse": ("rwr", 24, f"{JPEG} --sparse --lr 1.5e-3"),
    "unguided": ("crd", 48, "--anchor-guidance 1"),
    "strong": ("crd", 12, "--anchor-guidance 1 --anchor 1"),
    "strong-constant": ("crd", 12, "--anchor-guidance 1 --anchor 1 --no-anchor-adaptive"),
    "strong-mean": ("crd", 12, "--anchor-guidance 1 --anchor 0.41 --no-anchor-adaptive"),
    "hack": ("crd", 8, f"{SMALL} --anchor 0.04"),
    "hack-alone": ("crd", 4, f"{SMALL} --anchor 0"),
    "hack-mean": ("crd", 8, f"{SMALL} --anchor 0.015 --no-anchor-adaptive"),
    # Tuning, on seed 0
    "tune-preset": ("crd", 24, ""),
    "tune-24-steps": ("crd", 12, "--train-timesteps 3 --steps-per-epoch 24"),
    "tune-beta-3": ("crd", 12, "--beta 3"),
    "tune-beta-0.1": ("crd", 12, "--lr 1.5e-3 --beta 0.1"),
    "tune-group-16": ("crd", 12, "--lr 1.5e-3 --group-size 16 --groups 24"),
    "tune-old": ("crd", 12, "--old-decay 0 0.25 0.01 0.5"),
    "tune-unguided": ("crd", 48, "--anchor-guidance 1 --anchor 0.01"),
    "tune-reward-alone": ("crd", 48, "--anchor 0"),
    "tune-rwr-high": ("rwr", 16, "--lr 1.5e-3"),
    "tune-rwr-mid": ("rwr", 48, ""),
    "tune-rwr-low": ("rwr", 48, "--lr 3e-4"),
    "tune-sparse": ("rwr", 48, "--sparse --lr 1e-4"),
    "tune-sparse-low": ("rwr", 48, "--sparse --lr 1e-5"),
    "tune-rwr-lower": ("rwr", 48, "--lr 3e-5"),
    "tune-rwr-soft": ("rwr", 48, "--lr 1e-4 --temperature 1"),
    "tune-jpeg-high": ("rwr", 24, f"{JPEG} --lr 3e-3"),
    "tune-jpeg-mid": ("rwr", 24, JPEG),
    "tune-jpeg-low": ("rwr", 24, f"{JPEG} --lr 3e-4"),
    "tune-jpeg-sparse-high": ("rwr", 24, f"{JPEG} --sparse --lr 3e-3"),
    "tune-jpeg-sparse-low": ("rwr", 24, f"{JPEG} --sparse --lr 5e-4"),
    "tune-jpeg-is": ("ddpo", 24, JPEG),
    "tune-jpeg-sf": ("ddpo", 96, f"{JPEG} --algorithm sf --images 48"),
    # A LoRA of a run above, evaluated anew: CRD's with guidance, guided DDPO's without
    "crd-guided": ("crd", 0, "--lora runs/crd-{seed}/epoch-0024 --eval-guidance 1.5"),
    "crd-guided-48": ("crd", 0, "--lora runs/crd-{seed}/epoch-0048 --eval-guidance 1.5"),
    "is-guided-plain": ("crd", 0, "--lora runs/is-guided-{seed}/epoch-0048"),
    # The second task
    **{f"scenes-guidance-{w}": ("crd", 0, f"--eval-guidance {w}") for w in (1, 2, 3, 4)},
    "scenes-crd": ("crd", 48, ""),
    "scenes-anchor-alone": ("crd", 24, "--reward-weight 0 --anchor 1 --lr 3e-3"),
    "scenes-reward-alone": ("crd", 24, "--anchor 0"),
    "scenes-is": ("ddpo", 48, ""),
}
COLUMNS = ["images", "ocr@tiny-sd3", "ocr@judge", "clipscore@clip", "color"]
SCENES_COLUMNS = [
    "images", "geneval@scenes", "geneval@scenes/overall",
    *[f"geneval@scenes/{task}" for task in rewards.TASKS], "geneval@judge/overall",
]  # fmt: skip
TABLES = {  # title: (rows as experiment@epoch, another column)
    "More than distilled guidance": (
        "guidance-1 guidance-1.5 guidance-2 guidance-3 guidance-4 guidance-5 "
        "crd@16 crd@24 crd@32 crd@48 reward-alone@24 reward-alone@48 "
        "anchor-alone@24 anchor-alone@48", ""),
    "(i) The decoupled sampler": (
        "reward-alone@24 both-fast@24 both-slow@24 reward-alone@48 both-fast@48 both-slow@48",
        "rho_std"),
    "(ii) The guided anchor": (
        "crd@24 unguided@24 reward-alone@24 crd@48 unguided@48 reward-alone@48", ""),
    "(iii) The adaptive anchor, early": (
        "strong@12 strong-constant@12 strong-mean@12", "images to 0.4"),
    "(iii) The adaptive anchor, late": (
        "hack-alone@1 hack-alone@2 hack-alone@4 hack@2 hack@4 hack@6 hack@8 "
        "hack-mean@2 hack-mean@4 hack-mean@6 hack-mean@8",
        "compressibility"),
    "DDPO and reward-weighted regression": ("guidance-1 is@48 sf@192 rwr@48 rwr-sparse@48", ""),
    "The same, rewarded for small files": (
        "jpeg-is@0 jpeg-is@24 jpeg-sf@96 jpeg-rwr@24 jpeg-rwr-sparse@24", "compressibility"),
    "CRD and DDPO": (
        "guidance-1 is@48 sf@192 crd@24 crd@48 "
        "guidance-4 is-guided@48 is-guided-plain crd-guided crd-guided-48", ""),
    "Tuning CRD": (
        "tune-preset@12 tune-24-steps@12 tune-beta-3@12 tune-old@12 tune-beta-0.1@12 "
        "tune-group-16@12 tune-preset@24 tune-reward-alone@48 tune-unguided@48", ""),
    "Tuning reward-weighted regression": (
        "tune-rwr-high@16 tune-rwr-mid@16 tune-rwr-low@16 rwr@16 tune-rwr-lower@16 "
        "tune-rwr-mid@48 tune-rwr-low@48 rwr@48 tune-rwr-lower@48 tune-rwr-soft@16 "
        "tune-rwr-soft@48 tune-sparse@16 tune-sparse@48 rwr-sparse@48 tune-sparse-low@48", ""),
    "Tuning the same for small files": (
        "tune-jpeg-high@24 jpeg-rwr@24 tune-jpeg-mid@24 tune-jpeg-low@24 "
        "tune-jpeg-sparse-high@24 jpeg-rwr-sparse@24 tune-jpeg-sparse-low@24 "
        "jpeg-is@24 tune-jpeg-is@24 jpeg-sf@96 tune-jpeg-sf@96", "compressibility"),
    "GenEval on scenes": (
        "scenes-guidance-1 scenes-guidance-2 scenes-guidance-3 scenes-guidance-4 "
        "scenes-crd@24 scenes-crd@48 scenes-anchor-alone@24 scenes-reward-alone@24 "
        "scenes-is@48", ""),
}  # fmt: skip
# Tables of images by DDPO's own sampler. All others are by the solver of crd.py.
OWN_SAMPLER = {"Tuning reward-weighted regression", "Tuning the same for small files"}
CURVES = {  # file: (number, title, {experiment: (label, color)})
    "second-reader.png": ("ocr@judge", "Held-out OCR score by a second OCR model", {
        "is-guided": ("DDPO, guided", "#b45309"), "crd": ("CRD", "#1d4ed8"),
        "reward-alone": ("CRD, no anchor", "#b91c1c"), "anchor-alone": ("anchor alone", "#15803d"),
        "is": ("DDPO", "#7e22ce")}),
    "color.png": ("color", "Share of held-out signs in the color asked for", {
        "crd": ("CRD", "#1d4ed8"), "unguided": ("unguided anchor", "#15803d"),
        "reward-alone": ("no anchor", "#b91c1c"), "both-slow": ("slow sampler", "#b45309"),
        "both-fast": ("fast reference", "#7e22ce")}),
}  # fmt: skip
SHEETS = "crd-2/epoch-0048 reward-alone-2/epoch-0048 both-fast-2/epoch-0048 jpeg-is-0/epoch-0024"


def jobs():
    """(name, script, epochs, flags) of every run."""
    runs = []
    for name, (script, epochs, flags) in EXPERIMENTS.items():
        # Without training all seeds are one: held-out prompts and their noise are fixed.
        for seed in (0,) if name.startswith(("guidance", "tune", "scenes-guidance")) else SEEDS:
            preset, every = "tiny", max(1, epochs // 6)
            if name.startswith("scenes"):
                preset, every = "scenes", 8
            start = f"--preset {preset} --seed {seed} --eval-every {every}"
            runs.append((f"{name}-{seed}", script, epochs, f"{start} {flags.format(seed=seed)}"))
    return runs


def read_log(name, own_sampler=False):
    """The lines of a run's metrics.jsonl. Evaluations of ddpo.py and rwr.py are those of the same
    LoRAs by crd.py, where it has drawn them, unless their own are asked for."""
    folder = Path("runs", name)
    if not (folder / "metrics.jsonl").exists():
        return []
    log = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    if own_sampler or EXPERIMENTS[name.rpartition("-")[0]][0] == "crd":
        return log
    lines = [line for line in log if line["split"] == "train"]
    for epoch, line in evaluations(log).items():
        drawn = folder / f"solver-{epoch:04d}" / "metrics.jsonl"
        if drawn.exists():
            counters = {key: line[key] for key in ("epoch", "step", "images", "seconds")}
            lines.append(json.loads(drawn.read_text()) | counters)
    return lines


def evaluations(log):
    return {line["epoch"]: line for line in log if line["split"] == "eval"}


def execute(name, script, flags):
    """Run a script on one thread. What it prints goes to runs/NAME.log."""
    with open(f"runs/{name}.log", "a") as log:
        command = [sys.executable, SCRIPTS[script], *flags.split()]
        variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": "tiny-sd3"}
        subprocess.run(command, env=variables, stdout=log, stderr=log, check=True)


def undrawn(name, script):
    """Epochs whose LoRA, saved by ddpo.py or rwr.py, crd.py has yet to draw. (The archive has no
    LoRAs.)"""
    if script == "crd":
        return []
    epochs = evaluations(read_log(name, own_sampler=True)).keys() - evaluations(read_log(name))
    lora = "runs/{}/epoch-{:04d}/pytorch_lora_weights.safetensors"
    return [epoch for epoch in sorted(epochs) if Path(lora.format(name, epoch)).exists()]


def run(name, script, epochs, flags):
    """Make a run, or continue one that was stopped. Then have crd.py draw the LoRAs of a run of
    another script, so that all images of a table are drawn by one solver."""
    settings = Path(f"runs/{name}/args.json")
    if epochs not in evaluations(read_log(name, own_sampler=True)):
        first = f"--resume runs/{name}" if settings.exists() else f"--name {name} {flags}"
        execute(name, script, f"{first} --epochs {epochs}")
    for epoch in undrawn(name, script):
        args = json.loads(settings.read_text())
        evaluation = f"{name}/solver-{epoch:04d}"
        shutil.rmtree(f"runs/{evaluation}", ignore_errors=True)  # of one that was stopped
        execute(
            name, "crd",
            f"--preset {args['preset']} --name {evaluation} --epochs 0 "
            f"--lora runs/{name}/epoch-{epoch:04d} --eval-guidance {args['guidance']} "
            f"--reward {args['reward']} --eval-rewards {args['eval_rewards']}",
        )  # fmt: skip


def run_missing():
    Path("runs").mkdir(exist_ok=True)
    missing = []
    for name, script, epochs, flags in jobs():
        made = epochs in evaluations(read_log(name, own_sampler=True))
        if not made or undrawn(name, script):
            missing.append((name, script, epochs, flags))
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(run, *job) for job in missing]
        for future in tqdm(as_completed(futures), total=len(futures), unit="run"):
            if future.exception():
                pool.shutdown(cancel_futures=True)
            future.result()  # raises, if the run failed


def value(log, epoch, number):
    """A number of one run, at the end of an epoch."""
    train = [line for line in log if line["split"] == "train" and line["epoch"] <= epoch]
    if number == "rho_std":
        return fmean(line[number] for line in train)
    if number == "images to 0.4":  # of training reward, averaged over three epochs
        means = [fmean(line["reward"] for line in train[i : i + 3]) for i in range(len(train) - 2)]
        reached = [line["images"] for line, mean in zip(train[1:], means) if mean >= 0.4]
        return min(reached, default=math.inf)
    return evaluations(log)[epoch][number]


def print_table(title, rows, column):
    """Means of the seeds and, in brackets, their range: the largest minus the smallest."""
    columns = SCENES_COLUMNS if "scenes" in rows else COLUMNS
    columns = columns + ([column] if column else [])
    print(f"\n## {title}\n\n| Run | Epochs |", " | ".join(columns), "|")
    print("|---" * (2 + len(columns)) + "|")
    for name, _, epoch in [row.partition("@") for row in rows.split()]:
        epoch = int(epoch or 0)
        logs = [read_log(f"{name}-{seed}", title in OWN_SAMPLER) for seed in SEEDS]
        logs = [log for log in logs if epoch in evaluations(log)]
        cells = []
        for number in columns if logs else ():
            values = [value(log, epoch, number) for log in logs]
            mean = fmean(values)
            digits = 0 if "images" in number else 3
            cells.append(f"{mean:,.{digits}f}")
            if len(logs) > 1 and number != "images":
                cells[-1] += f" ({max(values) - min(values):.{digits}f})"
            if epoch == 0 and digits == 0:
                cells[-1] = ""  # nothing was trained
            if math.inf in values:
                cells[-1] = "not in all runs" if min(values) < math.inf else "in no run"
        print(f"| `{name}` | {epoch or ''} |", " | ".join(cells or ["not run"]), "|")


def plot(file, number, title, names):
    """Against images scored: thin lines are seeds, thick ones their means, labeled at their end."""
    curves = {}
    for name in names:
        runs = [evaluations(read_log(f"{name}-{seed}")).values() for seed in SEEDS]
        points = [{line["images"]: line[number] for line in run} for run in runs if run]
        if points:
            curves[name] = points
    seeds = [curve for name in curves for curve in curves[name]]
    most = max(max(curve) for curve in seeds)
    low = math.floor(10 * min(min(curve.values()) for curve in seeds))
    high = math.ceil(10 * max(max(curve.values()) for curve in seeds))

    def position(x, y):
        return 120 + 1280 * x / most, 980 - 860 * (10 * y - low) / (high - low)

    chart = Image.new("RGB", (1800, 1100), "white")
    pen = ImageDraw.Draw(chart)
    font = ImageFont.load_default(size=36)
    for y in range(low, high + 1):
        pen.line([position(0, y / 10), position(most, y / 10)], "#e2e8f0", 3)
        pen.text((100, position(0, y / 10)[1]), f"{y / 10:.1f}", "#64748b", font, "rm")
    for x in range(0, most + 1, most // 4):
        pen.line([position(x, low / 10), position(x, low / 10 + 0.01)], "#64748b", 3)
        pen.text((position(x, low / 10)[0], 1000), f"{x:,}", "#64748b", font, "mt")
    pen.text((1780, 1000), "images scored", "#64748b", font, "rt")
    pen.text((120, 30), title, "black", font)
    below = 0  # the last label
    ends = {name: fmean(curve[max(curve)] for curve in curves[name]) for name in curves}
    for name in sorted(curves, key=ends.get, reverse=True):
        label, color = names[name]
        for curve in curves[name]:
            pen.line([position(*point) for point in curve.items()], color, 2)
        shared = sorted(set.intersection(*[set(curve) for curve in curves[name]]))
        means = [position(x, fmean(curve[x] for curve in curves[name])) for x in shared]
        pen.line(means, color, 8, "curve")
        below = max(means[-1][1], below + 44)
        pen.text((means[-1][0] + 16, below), label, color, font, "lm")
    chart.resize((900, 550), Image.LANCZOS).save(ASSETS / file)  # smooth lines


def draw_pairs(file, before, after, captions):
    """The first images of the contact sheets of two evaluations, each pair over what was asked."""
    sheets = [Image.open(f"runs/{name}/images.png") for name in (before, after)]
    width, height = 256, 128  # of an image in a sheet: see rewards.contact_sheet
    size = (150 + len(captions) * (width + 12), 2 * (height + 12) + 60)
    grid = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(grid)
    font = ImageFont.load_default(size=30)
    small = ImageFont.load_default(size=20)
    for row, (sheet, label) in enumerate(zip(sheets, ("before", "after"))):
        y = row * (height + 12)
        pen.text((130, y + height // 2), label, "black", font, "rm")
        for i in range(len(captions)):
            corner = (i % 4 * (width + 8), i // 4 * (height + 40))
            image = sheet.crop((*corner, corner[0] + width, corner[1] + height))
            grid.paste(image, (150 + i * (width + 12), y))
    for i, caption in enumerate(captions):
        x = 150 + i * (width + 12) + width // 2
        lines = "\n".join(textwrap.wrap(caption, 24))
        y = 2 * (height + 12) + 24
        pen.text((x, y), lines, "black", small if len(caption) > 8 else font, "mm", align="center")
    pen.text((130, 2 * (height + 12) + 24), "asked for", "#64748b", font, "rm")
    grid.save(ASSETS / file)


class SmallFiles(rewards.Compressibility):
    """The same reward with the range of the toy's images, by which the anchor adapts: from about
    the pretrained model's mean to images without a word."""

    range = (-2.2, -1.6)


def tesseract(images, prompts, metadata):
    """A judge that shares nothing with the toy's OCR models, the program `tesseract`, as a reward:
    PYTHONPATH=tiny-sd3 python crd.py --preset tiny --epochs 0 --lora runs/crd-0/epoch-0024 \\
        --eval-rewards results.tesseract"""
    scores = []
    for image, prompt in zip(images, prompts):
        large = image.convert("L").resize((4 * image.width, 4 * image.height), Image.LANCZOS)
        file = io.BytesIO()
        large.save(file, "PNG")
        command = ["tesseract", "-", "-", "--psm", "7"]  # one line of text
        process = subprocess.run(command, input=file.getvalue(), capture_output=True, check=True)
        scores.append(rewards.edit_similarity(rewards.quoted(prompt), process.stdout.decode()))
    return scores


tesseract.range = (0, 1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--plot", action="store_true")
    wanted = parser.parse_args()
    if not wanted.table and not wanted.plot:
        run_missing()
    elif not Path("runs/guidance-1-0").exists():
        tarfile.open(ASSETS / "runs.tgz").extractall(filter="data")
    if wanted.table:
        for title, (rows, column) in TABLES.items():
            print_table(title, rows, column)
    if wanted.plot:
        for file, (number, title, names) in CURVES.items():
            plot(file, number, title, names)
        words = [prompt.split('"')[1] for prompt, _ in rewards.evaluation_prompts("signs", 6)]
        words = [f'"{word}"' for word in words]
        draw_pairs("before-after.png", "crd-0/epoch-0000", "crd-0/epoch-0024", words)
        scenes = rewards.read_prompts("tiny-sd3/scenes/eval.jsonl")[:6]
        prompts = [prompt for prompt, _ in scenes]
        draw_pairs("scenes.png", "scenes-crd-0/epoch-0000", "scenes-crd-0/epoch-0024", prompts)
        for name in SHEETS.split():
            shutil.copy(f"runs/{name}/images.png", ASSETS / f"{name.replace('/', '-')}.png")
