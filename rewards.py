"""Rewards and prompts: what crd.py and ddpo.py optimize, and what they draw.

    reward = load("ocr@tiny-sd3", "cpu")                     # with the models of a folder
    reward = load("ocr,incompressibility:-0.005", "cuda")    # a weighted sum
    R = reward(images, prompts, metadata)                    # PIL, str, dict -> (B,) on the CPU
    R, values = reward.score(images, prompts, metadata)      # and each part's mean, to log

    for prompt, metadata in prompts("ocr", "train", seed=0): ...

Your own, `my_rewards.brightness`, is a function of (images, prompts, metadata) to B numbers, or a
subclass of `Reward` that overrides `score_batch` (or `score_all`, which sees metadata). Nothing is
differentiated: any Python will do. A reward that fails stops the run, as the policy would learn
from a silent 0. No file of weights can run code. Each class says how its reward is hacked: log one
that you do not train on beside it.
"""

import copy
import html
import importlib
import io
import itertools
import json
import math
import os
import random
import re
import sys
import textwrap
import unicodedata
import zlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn


class Reward:
    """Gives each image a number."""

    name = None  # under which it is logged: by default as in the spec
    range = (0.0, 1.0)  # that `normalize` maps to [0, 1]; scores beyond it are clipped there
    source = "animals"  # of prompts that suit it, unless --prompts is given
    batch = 16  # images per forward pass

    def __init__(self, path, device):
        """path: what follows the @ in the spec, or None."""

    @classmethod
    def check(cls, prompt, metadata):
        """ValueError for a prompt that cannot be scored."""

    @classmethod
    def missing(cls, what, prompt, metadata):
        origin = metadata.get("origin", "a prompt")
        return ValueError(f"{origin}: reward {cls.name} cannot score {prompt!r}: it needs {what}")

    def score_batch(self, images, prompts):
        """Scores of at most `batch` images, as a list or tensor."""
        raise NotImplementedError

    def score_all(self, images, prompts, metadata):
        """Scores (B,) and, if a reward has details to log, {name: number}."""
        scores = []
        for i in range(0, len(images), self.batch):
            part = slice(i, i + self.batch)
            scores += list(self.score_batch(images[part], prompts[part]))
        return scores, {}

    @torch.no_grad()
    def score(self, images, prompts, metadata):
        """Rewards R (B,), float32 on the CPU, and {name: mean} of each part, to log."""
        count = len(images)
        # Copies: a reward may change them in place, and the next one must not see that.
        images = [image.copy() for image in images]
        prompts = list(prompts)
        metadata = copy.deepcopy(list(metadata))
        try:
            for prompt, entry in zip(prompts, metadata, strict=True):
                self.check(prompt, entry)
            scores, details = self.score_all(images, prompts, metadata)
            R = torch.tensor([float(score) for score in scores])
            if len(R) != count or not R.isfinite().all():
                raise ValueError(f"{count} images got the scores {R.tolist()}")
            values = {self.name: R.mean().item()}
            for name, value in details.items():
                if name in (*values, *LOGGED) or not math.isfinite(float(value)):
                    raise ValueError(f"it cannot log {value!r} as {name!r}")
                values[name] = float(value)
        except Exception as cause:
            raise RuntimeError(f"reward {self.name} failed: {cause}") from cause
        return R, values

    def __call__(self, images, prompts, metadata):
        return self.score(images, prompts, metadata)[0]


# What lines of metrics.jsonl hold besides a reward's own values.
LOGGED = (
    "split", "epoch", "step", "images", "seconds", "reward", "rollout_seconds", "reward_seconds",
    "train_seconds", "peak_gb", "loss", "grad_norm", "crd_loss", "anchor_loss", "rho_variance",
    "rho_std", "approx_kl", "clip_fraction", "ratio_error", "first_ratio_error",
)  # fmt: skip


class WeightedSum(Reward):
    """sum_i weight_i reward_i. parts: a list of (weight, Reward)."""

    def __init__(self, parts):
        names = [reward.name for _, reward in parts]
        if len(set(names)) < len(names):
            raise ValueError(f"two rewards would be logged under one name: {names}")
        self.parts = parts
        self.name = " + ".join(f"{weight:g} {reward.name}" for weight, reward in parts)
        # A negative weight turns its part's range around.
        ends = [sorted(weight * end for end in reward.range) for weight, reward in parts]
        self.range = (sum(lo for lo, _ in ends), sum(hi for _, hi in ends))

    def score(self, images, prompts, metadata):
        R = torch.zeros(len(images))
        values = {}
        for weight, reward in self.parts:
            scores, means = reward.score(images, prompts, metadata)
            R += weight * scores
            if shared := values.keys() & means.keys():
                raise ValueError(f"two rewards log {shared}")
            values |= means
        return R, values


def parse_spec(spec):
    """[(name, path or None, weight)] of `name[@path-or-repo][:weight]`, joined by commas; a weight
    is 1 by default. Paths may have commas and colons: only a comma before a reward's name separates
    rewards, and a number after the last colon is the weight, unless it is a URL's port."""
    names = rf"(?:{'|'.join(REWARDS)}|[a-zA-Z_]\w*(?:\.[a-zA-Z_]\w*)+)"
    host = r"\w+://(?:[^/]*@)?(?:\[.*?\]|[^/:]*)(?::\d+)?"
    number = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?"
    pattern = rf"({names})(?:@((?:{host})?.*?))?(?::({number}))?"
    parts = []
    for item in re.split(rf",\s*(?={names}(?:[@:,]|\s*$))", spec):
        match = re.fullmatch(pattern, item.strip())
        if not match:
            raise ValueError(
                f"no reward is called {item!r}: write name, name@path or name@path:0.5, with "
                f"one of {', '.join(REWARDS)}, or module.name of your own"
            )
        name, path, weight = match.groups()
        if path == "" or float(weight or 1) in (0, math.inf, -math.inf):
            raise ValueError(f"{item!r}: a path, if any, is not empty, a weight finite and not 0")
        parts.append((name, path, float(weight or 1)))
    return parts


def reward_class(name):
    """The class of a name. A function in the user's module is wrapped in one."""
    if name in REWARDS:
        return REWARDS[name]
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute)
    if isinstance(found, type):
        if vars(found).get("name") is None:  # or it would be logged as the class it is made from
            found.name = name
        return found

    class FunctionReward(Reward):
        def score_all(self, images, prompts, metadata):
            return found(images, prompts, metadata), {}

    FunctionReward.name = name
    FunctionReward.range = getattr(found, "range", Reward.range)
    return FunctionReward


def default_source(spec):
    """The prompt generator that suits a spec: that of geneval, color or ocr, the first of them that
    it names, which need prompts of their own kind; else that of its first reward."""
    names = [name for name, _, _ in parse_spec(spec)]
    picky = [name for name in ("geneval", "color", "ocr") if name in names]
    return reward_class([*picky, *names][0]).source


def check_prompts(spec, pairs):
    """ValueError for a (prompt, metadata) that a reward cannot score, before anything is loaded."""
    for name, _, _ in parse_spec(spec):
        kind = reward_class(name)
        for prompt, metadata in pairs:
            kind.check(prompt, metadata)


def logged_name(name, path):
    return f"{name}@{Path(path).absolute().name}" if path else name


def check_names(*specs):
    """ValueError for two rewards that would be logged under one name."""
    owners = {}
    for name, path, _ in itertools.chain(*(parse_spec(spec) for spec in specs if spec)):
        logged = logged_name(name, path) if path else reward_class(name).name
        owner = f"{name}@{Path(path).absolute()}" if path else name
        if owners.setdefault(logged, owner) != owner:
            raise ValueError(f"{owner} and {owners[logged]}: both are logged as {logged}")


def load(spec, device):
    """The Reward of a spec."""
    parts = []
    for name, path, weight in parse_spec(spec):
        reward = reward_class(name)(path, torch.device(device))
        if path:
            reward.name = logged_name(name, path)
        if reward.name in LOGGED:
            raise ValueError(f"reward {name}: under {reward.name!r} a run logs something else")
        lo, hi = reward.range
        if not -math.inf < lo < hi < math.inf:
            raise ValueError(f"reward {name}: its range has to ascend, not go from {lo} to {hi}")
        parts.append((weight, reward))
    if len(parts) == 1 and parts[0][0] == 1:
        return parts[0][1]
    return WeightedSum(parts)


def normalize(R, bounds):
    """Rewards on [0, 1]: (R - lo) / (hi - lo), clipped."""
    lo, hi = bounds
    return ((R - lo) / (hi - lo)).clamp(0, 1)


# Rewards without a model


class Incompressibility(Reward):
    """Size of the image as a JPEG of quality 95, in kB (Black et al. 2023, arXiv 2305.13301). The
    range is from a JPEG's header to a busy image of 512 px. Hacked by noise."""

    name = "incompressibility"
    range = (0.6, 200.0)

    def score_batch(self, images, prompts):
        sizes = []
        for image in images:
            file = io.BytesIO()
            image.convert("RGB").save(file, "JPEG", quality=95)
            sizes.append(file.tell() / 1000)
        return torch.tensor(sizes)


class Compressibility(Incompressibility):
    """Minus that size. Hacked by a flat color."""

    name = "compressibility"
    range = (-200.0, -0.6)

    def score_batch(self, images, prompts):
        return -super().score_batch(images, prompts)


SIGN_COLORS = {  # those that the toy model in tiny-sd3/ was trained on
    "red": (200, 40, 40), "green": (30, 140, 60), "blue": (40, 70, 200),
    "black": (30, 30, 34), "brown": (130, 84, 44), "teal": (20, 130, 140),
}  # fmt: skip


class Color(Reward):
    """1 if the image's median color is nearest to the one that the prompt names, else 0. To be
    logged, not trained on, with tiny-sd3's signs. Hacked by signs without a word."""

    name = "color"
    source = "signs"

    @classmethod
    def check(cls, prompt, metadata):
        if not set(prompt.split()) & set(SIGN_COLORS):
            raise cls.missing(f"one of {', '.join(SIGN_COLORS)}", prompt, metadata)

    def score_batch(self, images, prompts):
        palette = torch.tensor(list(SIGN_COLORS.values())).float()
        scores = []
        for image, prompt in zip(images, prompts):
            median = to_pixels(image, "cpu").flatten(1).median(1).values
            nearest = (palette - median).norm(dim=1).argmin()
            scores.append(list(SIGN_COLORS)[nearest] in prompt.split())
        return scores


# Loading weights


def locate(path, subfolder, repository):
    """Where `from_pretrained` finds a model: in a subfolder of `path` or, if that is None, in the
    model's own repository."""
    if path is None:
        return {"pretrained_model_name_or_path": repository, "subfolder": ""}
    return {"pretrained_model_name_or_path": path, "subfolder": subfolder}


def load_model(model_class, place, device, dtype=torch.float32, **options):
    """A transformers model in eval mode. By default in float32: in bf16 scores depend on the
    batch."""
    options |= {"dtype": dtype, "output_loading_info": True}
    model, report = model_class.from_pretrained(**place, **options)
    missing = [key for key in report["missing_keys"] if "num_batches_tracked" not in key]
    if missing:  # transformers only warns, and leaves them random
        path = place["pretrained_model_name_or_path"]
        raise ValueError(f"{path} lacks {len(missing)} of the model's tensors: {missing[:3]}")
    return model.eval().to(device)


def load_tensors(place, filename, renames):
    """A file's tensors, their names changed by each (pattern, replacement) in turn. A tensor whose
    name becomes empty is dropped."""
    folder = place["pretrained_model_name_or_path"]
    file = transformers.utils.cached_file(folder, filename, subfolder=place["subfolder"])
    state = torch.load(file, map_location="cpu", weights_only=True)
    tensors = {}
    for key, tensor in state.get("state_dict", state).items():
        for pattern, replacement in renames:
            key = re.sub(pattern, replacement, key)
        tensors[key] = tensor
    tensors.pop("", None)
    return tensors


# Text rendering


def quoted(prompt):
    """The text in the prompt's first double quotes, straight or curly, or ""."""
    # No quote opens after a digit: that of a 12" ruler does not.
    match = re.search(r'(?<![\d¼½¾])(?:"([^"]*)"|[“”„]([^“”„]*)[“”])', prompt)
    return (match[1] or match[2] or "").strip() if match else ""


def edit_similarity(target, text):
    """1 if `target` is in `text`, else 1 - min(d, n) / n, for the Levenshtein distance d and the
    target's length n. Case, spaces and the Unicode form (NFKC) do not count."""
    target = "".join(unicodedata.normalize("NFKC", target).casefold().split())
    text = "".join(unicodedata.normalize("NFKC", text).casefold().split())
    if target in text:
        return 1.0
    row = list(range(len(text) + 1))  # row[j]: distance between target[:i] and text[:j]
    for i, a in enumerate(target, 1):
        above = row
        row = [i]
        for j, b in enumerate(text, 1):
            row.append(min(above[j] + 1, row[j - 1] + 1, above[j - 1] + (a != b)))
    return 1 - min(row[-1], len(target)) / len(target)


class OCR(Reward):
    """`edit_similarity` of the prompt's quoted text and what PP-OCRv5 reads (Cui et al. 2025, arXiv
    2507.05595): a detector finds boxes around lines of text, a recognizer reads each. As in
    Flow-GRPO (arXiv 2505.05470), other text in the image costs nothing if the text is there to the
    letter, but counts as errors as soon as one letter is wrong. Hacked by the word alone, huge, or
    written many times. Weights: Apache 2.0. transformers' image processors for them need
    torchvision and OpenCV, so the steps around the networks are ours."""

    name = "ocr"
    source = "ocr"
    recognizer_is_bgr = True  # PP-OCR's networks want blue first; tiny-sd3's recognizers do not

    def __init__(self, path, device):
        """path: a folder or repository with `ocr-det` and `ocr-rec`."""
        self.device = device
        load_settings = transformers.ImageProcessingMixin.get_image_processor_dict
        place = locate(path, "ocr-det", "PaddlePaddle/PP-OCRv5_server_det_safetensors")
        self.detector = load_model(transformers.AutoModelForObjectDetection, place, device)
        settings, _ = load_settings(**place)
        # For red, green, blue. (PP-OCR swaps ImageNet's numbers for red and blue.)
        self.mean = settings.get("image_mean") or (0.406, 0.456, 0.485)
        self.std = settings.get("image_std") or (0.225, 0.224, 0.229)
        self.limit = settings.get("limit_side_len") or 960
        self.limit_type = settings.get("limit_type") or "max"
        place = locate(path, "ocr-rec", "PaddlePaddle/PP-OCRv5_server_rec_safetensors")
        self.recognizer = load_model(transformers.AutoModelForTextRecognition, place, device)
        settings, _ = load_settings(**place)
        self.characters = settings["character_list"]
        self.width = (settings.get("size") or {"width": 320})["width"]  # shorter lines are padded
        self.max_width = settings.get("max_image_width") or 3200
        self.recognizer_is_bgr = settings.get("do_flip_channel_order", self.recognizer_is_bgr)

    @classmethod
    def check(cls, prompt, metadata):
        if not quoted(prompt):
            raise cls.missing("a text between double quotes", prompt, metadata)

    def score_batch(self, images, prompts):
        texts = self.read(images)
        return [edit_similarity(quoted(prompt), text) for prompt, text in zip(prompts, texts)]

    @torch.no_grad()
    def read(self, images):
        """A string for each image: its lines in reading order."""
        pixels = [to_pixels(image, self.device) for image in images]
        inputs = []
        for x in pixels:
            size = self.detector_size(x.shape[1:])
            inputs.append(standardize(x, size, self.mean, self.std).flip(0))
        maps = in_batches(lambda x: self.detector(pixel_values=x).last_hidden_state[:, 0], inputs)
        lines = []
        owners = []  # the image of each line, by its index
        for i, (x, text_map) in enumerate(zip(pixels, maps)):
            boxes = find_boxes(text_map.cpu())
            boxes = [scale_box(box, text_map.shape, x.shape[1:]) for box in boxes]
            for box in reading_order(boxes):
                lines.append(self.line_input(cut_out(x, box)))
                owners.append(i)
        best = in_batches(self.best_classes, lines)
        texts = [[] for _ in images]
        for i, x in zip(owners, best):
            texts[i].append(ctc_decode(x, self.characters))
        return [" ".join(text) for text in texts]

    def best_classes(self, lines):
        return self.recognizer(pixel_values=lines).last_hidden_state.argmax(-1).cpu()

    def detector_size(self, size):
        scale = {
            "resize_long": self.limit / max(size),
            "max": min(self.limit / max(size), 1),
            "min": max(self.limit / min(size), 1),
        }[self.limit_type]
        return multiples_of_32(int(side * scale) for side in size)

    def line_input(self, line):
        """A line of text (3, h, w) in 0..255 as the recognizer wants it."""
        width = self.line_width(line.shape[1:])
        # In steps of 32, so that lines can share a batch, whatever else is in it.
        padded = max(self.width, math.ceil(width / 32) * 32)
        x = resize(line, (48, width)) / 127.5 - 1
        return F.pad(x.flip(0) if self.recognizer_is_bgr else x, (0, padded - width))

    def line_width(self, size):
        """At a height of 48. As in PP-OCR, rounded up if that is at most `width`, else down."""
        width = 48 * size[1] / size[0]
        return math.ceil(width) if width <= self.width else min(int(width), self.max_width)


def to_pixels(image, device):
    """PIL image to a float tensor (3, H, W) in 0..255."""
    data = bytearray(image.convert("RGB").tobytes())
    pixels = torch.frombuffer(data, dtype=torch.uint8).view(image.height, image.width, 3)
    return pixels.permute(2, 0, 1).to(device, torch.float32)


def resize(pixels, size):
    """(3, H, W) to (3, *size): bilinear, antialiased."""
    return F.interpolate(pixels[None], size, mode="bilinear", antialias=True)[0]


def standardize(pixels, size, mean, std):
    """(3, H, W) in 0..255 to (3, *size): (x / 255 - mean) / std, channel by channel."""
    mean = pixels.new_tensor(mean).view(3, 1, 1)
    std = pixels.new_tensor(std).view(3, 1, 1)
    return (resize(pixels, size) / 255 - mean) / std


def multiples_of_32(size):
    return tuple(max(round(side / 32) * 32, 32) for side in size)


def in_batches(model, inputs, batch=16):
    """The model's output for each of `inputs`; those of one shape share forward passes."""
    outputs = {}
    for shape in {x.shape for x in inputs}:
        rows = [row for row, x in enumerate(inputs) if x.shape == shape]
        for i in range(0, len(rows), batch):
            part = rows[i : i + batch]
            outputs |= zip(part, model(torch.stack([inputs[row] for row in part])))
    return [outputs[row] for row in range(len(inputs))]


def components(mask):
    """The connected components (8 neighbors) of a mask (H, W), in no order; each as the row and
    column of its pixels (n, 2), row by row."""
    steps = F.pad(mask.int(), (1, 1)).diff()
    row, start = (steps == 1).nonzero(as_tuple=True)  # of each run of pixels in a row
    stop = (steps == -1).nonzero()[:, 1]  # the column after it
    # Runs first to end - 1 touch this one from the row above, if only by a corner.
    width = mask.shape[1] + 2
    first = torch.searchsorted(row * width + stop, (row - 1) * width + start)
    end = torch.searchsorted(row * width + start, (row - 1) * width + stop, right=True)
    parents = list(range(len(row)))

    def root(run):
        while parents[run] != run:
            parents[run] = parents[parents[run]]  # halves the way for the next
            run = parents[run]
        return run

    for run, touching in enumerate(zip(first.tolist(), end.tolist())):
        for other in range(*touching):
            parents[root(other)] = root(run)
    labels = torch.tensor([root(run) for run in parents]).repeat_interleave(stop - start)
    sizes = labels.unique(return_counts=True)[1].tolist()
    return mask.nonzero()[labels.argsort(stable=True)].split(sizes)


def smallest_rectangle(points):
    """The smallest rectangle around points (n, 2), turned by whole degrees: its axes (2, 2), unit
    vectors along and across a line of text, and its start (2,) and end (2,) along each."""
    turns = torch.arange(-45, 45).double().deg2rad()
    axes = torch.stack([turns.cos(), turns.sin(), -turns.sin(), turns.cos()], 1).view(-1, 2, 2)
    start, end = (points @ axes.mT).aminmax(dim=1)
    best = (end - start).prod(1).argmin()
    return axes[best], start[best], end[best]


def find_boxes(text_map, threshold=0.3, box_threshold=0.6, unclip=1.5, min_side=3):
    """Boxes of the lines of text in a map (H, W) in 0..1, which marks a shrunken core of each (Liao
    et al. 2020, arXiv 1911.08947): so boxes grow, maybe over the edge. A box is its corners (4, 2),
    x and y, clockwise from the upper left. Cores that are thin are dropped, and those low on
    average, over their own pixels (in PP-OCR, over the box). The defaults are PP-OCR's."""
    boxes = []
    for pixels in components(text_map > threshold):
        row, column = pixels.T
        if text_map[row, column].double().mean() < box_threshold:
            continue
        is_new_row = row.diff() != 0
        is_end = F.pad(is_new_row, (1, 0), value=True) | F.pad(is_new_row, (0, 1), value=True)
        outline = pixels[is_end].flip(1).double()  # a row's other pixels lie between its ends
        axes, start, end = smallest_rectangle(outline)
        width, height = end - start
        if min(width, height) < min_side:
            continue
        grow = width * height * unclip / (2 * (width + height))
        left, top = start - grow
        right, bottom = end + grow
        corners = torch.stack([left, top, right, top, right, bottom, left, bottom]).view(4, 2)
        boxes.append(corners @ axes)
    return boxes


def scale_box(box, size, new_size):
    """A box in a map to whole pixels of an image, clipped to it. A tall one (by PP-OCR's rule)
    begins at its upper right corner: its text is taken to run down."""
    size = torch.tensor([size[1], size[0]])
    new_size = torch.tensor([new_size[1], new_size[0]])
    box = torch.minimum((box * new_size / size).round().clamp(min=0), new_size)
    width, height = box_size(box)
    return box.roll(-1, 0) if height >= 1.5 * width else box


def box_size(box):
    """Width and height of a box in whole pixels, at least one."""
    a, b, c, d = box
    width = max((b - a).norm(), (c - d).norm())
    height = max((d - a).norm(), (c - b).norm())
    return max(int(width), 1), max(int(height), 1)


def cut_out(pixels, box):
    """What is in a box of the image (3, H, W), upright: (3, height, width)."""
    width, height = box_size(box)
    a, b, c, d = box.to(pixels)
    s = torch.arange(width, device=pixels.device).view(1, -1, 1) / width
    t = torch.arange(height, device=pixels.device).view(-1, 1, 1) / height
    points = (1 - t) * (a + s * (b - a)) + t * (d + s * (c - d))
    size = pixels.new_tensor([pixels.shape[2], pixels.shape[1]])
    grid = (2 * points + 1) / size - 1  # the image's edges are at -1 and 1
    options = {"padding_mode": "border", "align_corners": False}
    return F.grid_sample(pixels[None], grid[None], **options)[0]


def reading_order(boxes):
    """Line by line, from the left, along the mean direction of the horizontal or of the vertical
    boxes, whichever are longer in all. A box joins a line if its center is at the height of the
    line's first box, or that box's center at its height."""
    if not boxes:
        return []
    corners = torch.stack(boxes)
    edges = corners[:, 1] - corners[:, 0]
    is_horizontal = edges[:, 0].abs() >= edges[:, 1].abs()
    direction = max(edges[is_horizontal].sum(0), edges[~is_horizontal].sum(0), key=torch.norm)
    cos, sin = direction / direction.norm()
    x, y = corners.unbind(2)
    along = (x * cos + y * sin).mean(1).tolist()
    across = y * cos - x * sin
    top, middle, bottom = (f(across, 1).tolist() for f in (torch.amin, torch.mean, torch.amax))
    lines = []
    for i in sorted(range(len(boxes)), key=middle.__getitem__):
        for line in lines:
            if middle[i] < bottom[line[0]] or top[i] < middle[line[0]]:
                line.append(i)
                break
        else:
            lines.append([i])
    return [boxes[i] for line in lines for i in sorted(line, key=along.__getitem__)]


def ctc_decode(best, characters):
    """The best class of each step (T,) to a string: repeats merged, class 0 dropped."""
    return "".join(characters[i] for i in best.unique_consecutive().tolist() if i)


# CLIP and its kin


class CLIP:
    """A CLIP model (Radford et al. 2021): images and texts to unit vectors (n, d)."""

    def __init__(self, place, device, model=None):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
        self.processor = transformers.CLIPImageProcessorPil.from_pretrained(**place)
        self.model = model or load_model(transformers.CLIPModel, place, device)
        self.side = self.model.config.vision_config.image_size

    def images(self, images):
        return self.vectors(clip_pixels(self.processor, images))

    def vectors(self, pixels):
        features = self.model.get_image_features(pixels.to(self.model.device))
        return F.normalize(features.pooler_output, dim=-1)

    def texts(self, texts):
        unique = list(dict.fromkeys(texts))  # a group shares its prompt
        options = {"padding": True, "truncation": True, "return_tensors": "pt"}
        options["max_length"] = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(unique, **options).to(self.model.device)
        vectors = F.normalize(self.model.get_text_features(**tokens).pooler_output, dim=-1)
        return vectors[[unique.index(text) for text in texts]]


def clip_pixels(processor, images):
    """Images of any size to (n, 3, H, W): the processor cuts out the center."""
    return processor([trim(image) for image in images], return_tensors="pt").pixel_values


def trim(image):
    """In RGB. GenEval's crops can be slivers, which scaled up whole would not fit in memory: of
    those only the middle, eight times as long as wide."""
    surplus = [max(side - 8 * min(image.size), 0) // 2 for side in image.size]
    return ImageOps.crop(image.convert("RGB"), (*surplus, *surplus))


def center_square(image, side):
    """The center as torchvision scales and cuts it out, for ImageReward and GenEval, as in the
    originals: at some sizes transformers' is one pixel away."""
    image = trim(image)
    width, height = (int(side * edge / min(image.size)) for edge in image.size)
    left, top = round((width - side) / 2), round((height - side) / 2)
    image = image.resize((width, height), Image.BICUBIC)
    return image.crop((left, top, left + side, top + side))


class CLIPScore(Reward):
    """Cosine of image and prompt in OpenCLIP's ViT-H-14. (Hessel et al. 2021, arXiv 2104.08718,
    have ViT-B/32, scale by 2.5 and cut at 0.) Hacked by the prompt written into the image. Weights:
    MIT."""

    name = "clipscore"
    range = (0.0, 0.4)
    source = "geneval"
    weights = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def __init__(self, path, device):
        """path: a folder or repository with the weights and ViT-H-14's configuration files."""
        place = locate(path, "", CLIPScore.weights)
        model = self.load_clip(locate(path, "", self.weights), place, device)
        self.clip = CLIP(place, device, model)

    def load_clip(self, weights, place, device):
        return load_model(transformers.CLIPModel, weights, device)

    def score_batch(self, images, prompts):
        return (self.clip.images(images) * self.clip.texts(prompts)).sum(-1)


class PickScore(CLIPScore):
    """Human preference (Kirstain et al. 2023, arXiv 2305.01569): the cosine in a ViT-H-14 tuned on
    Pick-a-Pic, times about 100. Hacked by glossy, busy images. Weights: no license on the card."""

    name = "pickscore"
    range = (16.0, 26.0)
    weights = "yuvalkirstain/PickScore_v1"

    def score_batch(self, images, prompts):
        return self.clip.model.logit_scale.exp() * super().score_batch(images, prompts)


STRAIGHT = str.maketrans("ʼ‘’‚‛“”„‟", 5 * "'" + 4 * '"')


class HPSv2(CLIPScore):
    """Human preference score v2.1 (Wu et al. 2023, arXiv 2306.09341): the cosine in a ViT-H-14
    tuned on HPD v2. It sees the whole image, with black bars, as in github.com/tgxs002/HPSv2, not
    the center alone as the rewards beside it do. Hacked by one smooth style of illustration, high
    in contrast. Weights: Apache 2.0."""

    name = "hpsv2"
    range = (0.1, 0.4)
    weights = "xswu/HPSv2"
    renames = [  # OpenCLIP's names to CLIPModel's
        (r"^visual\.proj$", "visual_projection.weight"),
        (r"^text_projection$", "text_projection.weight"),
        (r"^visual\.", "vision_model."),
        (r"^(positional_|token_|ln_final|transformer)", r"text_model.\1"),
        (r"\.positional_embedding$", ".embeddings.position_embedding.weight"),
        (r"\.(token|class)_embedding", r".embeddings.\1_embedding"),
        (r"\.conv1\.", ".embeddings.patch_embedding."),
        (r"\.transformer\.resblocks\.", ".encoder.layers."),
        (r"\.ln_pre\.", ".pre_layrnorm."), (r"\.ln_post\.", ".post_layernorm."),
        (r"\.ln_final\.", ".final_layer_norm."), (r"\.ln_([12])\.", r".layer_norm\1."),
        (r"\.attn\.", ".self_attn."), (r"\.c_fc\.", ".fc1."), (r"\.c_proj\.", ".fc2."),
    ]  # fmt: skip

    def load_clip(self, weights, place, device):
        tensors = load_tensors(weights, "HPS_v2.1_compressed.pt", self.renames)
        for key in ("text_projection.weight", "visual_projection.weight"):
            tensors[key] = tensors[key].T
        for key in [key for key in tensors if ".in_proj_" in key]:
            for part, rows in zip("qkv", tensors.pop(key).chunk(3)):
                tensors[key.replace(".in_proj_", f".{part}_proj.")] = rows
        model = transformers.CLIPModel(transformers.CLIPConfig.from_pretrained(**place))
        model.load_state_dict(tensors)
        return model.eval().to(device)

    def score_batch(self, images, prompts):
        side = self.clip.side
        mean, std = self.clip.processor.image_mean, self.clip.processor.image_std
        squares = []
        for image in images:
            pixels = to_pixels(image, "cpu")
            scale = side / max(image.size)
            height, width = (max(round(edge * scale), 1) for edge in pixels.shape[1:])
            # As numbers, not as an image: values beyond 0 and 255 beside sharp edges stay.
            x = F.interpolate(pixels[None], (height, width), mode="bicubic", antialias=True)[0]
            left, top = (side - width) // 2, (side - height) // 2
            square = F.pad(x, (left, side - width - left, top, side - height - top))
            squares.append(standardize(square, (side, side), mean, std))
        # OpenCLIP's tokenizer cleans texts by ftfy, of which this is what prompts need.
        texts = [html.unescape(html.unescape(prompt)).translate(STRAIGHT) for prompt in prompts]
        return (self.clip.vectors(torch.stack(squares)) * self.clip.texts(texts)).sum(-1)


def score_head(width):
    """The head of LAION's predictor and of ImageReward: (n, width) to (n, 1)."""
    layers = [nn.Linear(width, 1024), nn.Dropout(), nn.Linear(1024, 128), nn.Dropout()]
    layers += [nn.Linear(128, 64), nn.Dropout(), nn.Linear(64, 16), nn.Linear(16, 1)]
    return nn.Sequential(*layers).eval()


class Aesthetic(Reward):
    """LAION's aesthetic predictor (github.com/christophschuhmann/improved-aesthetic-predictor):
    1 to 10, from CLIP ViT-L/14's image vector. It sees no prompt: hacked by any pretty image.
    Weights: no license on the card."""

    name = "aesthetic"
    range = (1.0, 10.0)

    def __init__(self, path, device):
        """path: a folder with `clip`, a CLIPModel, and `head`, with aesthetic-model.pth."""
        self.clip = CLIP(locate(path, "clip", "openai/clip-vit-large-patch14"), device)
        place = locate(path, "head", "trl-lib/ddpo-aesthetic-predictor")
        tensors = load_tensors(place, "aesthetic-model.pth", [(r"^layers\.", "")])
        self.head = score_head(self.clip.model.config.projection_dim).to(device)
        self.head.load_state_dict(tensors)

    def score_batch(self, images, prompts):
        return self.head(self.clip.images(images)).squeeze(-1)


class ImageReward(Reward):
    """Human preference (Xu et al. 2023, arXiv 2304.05977, github.com/THUDM/ImageReward): BLIP reads
    the prompt, cut to 35 tokens, while it attends to the image, and a head scores its first vector.
    Hacked by oversaturated close-ups. Weights: Apache 2.0."""

    name = "imagereward"
    range = (-2.0, 2.0)
    source = "geneval"
    score_mean = 0.16717362830052426  # of the authors' scores
    score_std = 1.0333394966054072
    # BLIP-large, where it differs from transformers' defaults.
    vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24)
    vision |= dict(num_attention_heads=16, image_size=224, layer_norm_eps=1e-6)
    text = dict(encoder_hidden_size=1024, num_attention_heads=12)
    renames = [  # the file's names to those of `build`; BLIP's contrastive heads are dropped
        (r"^blip\.(text|vision)_proj\..*|.*\.position_ids$", ""),
        (r"^mlp\.layers", "head"),
        (r"^blip\.text_encoder", "text"), (r"^blip\.visual_encoder", "vision"),
        (r"\.cls_token$", ".embeddings.class_embedding"),
        (r"\.pos_embed$", ".embeddings.position_embedding"),
        (r"\.patch_embed\.proj\.", ".embeddings.patch_embedding."),
        (r"\.blocks\.", ".encoder.layers."),
        (r"\.norm([12])\.", r".layer_norm\1."), (r"^vision\.norm\.", "vision.post_layernorm."),
        (r"\.attn\.qkv\.", ".self_attn.qkv."), (r"\.attn\.proj\.", ".self_attn.projection."),
    ]  # fmt: skip

    def __init__(self, path, device):
        """path: a folder with ImageReward.pt and the tokenizer of bert-base-uncased."""
        self.device = device
        place = locate(path, "", "google-bert/bert-base-uncased")
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
        side = self.vision["image_size"]
        self.processor = transformers.CLIPImageProcessorPil(size=side, crop_size=side)
        place = locate(path, "", "THUDM/ImageReward")
        self.model = self.build()
        self.model.load_state_dict(load_tensors(place, "ImageReward.pt", self.renames))
        self.model.eval().to(device)

    def build(self):
        model = nn.ModuleDict()
        model["vision"] = transformers.BlipVisionModel(transformers.BlipVisionConfig(**self.vision))
        text = transformers.BlipTextConfig(**self.text)
        model["text"] = transformers.BlipTextModel(text, add_pooling_layer=False)
        model["head"] = score_head(text.hidden_size)
        return model

    def score_batch(self, images, prompts):
        options = {"padding": "max_length", "truncation": True, "return_tensors": "pt"}
        tokens = self.tokenizer(prompts, max_length=35, **options).to(self.device)
        squares = [center_square(image, self.vision["image_size"]) for image in images]
        pixels = clip_pixels(self.processor, squares).to(self.device)
        states = self.model["vision"](pixels).last_hidden_state
        text = (tokens.input_ids, tokens.attention_mask)
        states = self.model["text"](*text, encoder_hidden_states=states).last_hidden_state
        scores = self.model["head"](states[:, 0]).squeeze(-1)
        return (scores - self.score_mean) / self.score_std


# Vision-language models


class Chat(Reward):
    """Base of rewards that ask a vision-language model. A subclass has `template`, `image_token`,
    `max_new_tokens`, and `inputs`: from images to a dict of the model's inputs, and the number of
    tokens that an image becomes."""

    def __init__(self, place, processor_class, device):
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(**place)
        self.processor = processor_class.from_pretrained(**place)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # 14 GB, not 28
        self.model = load_model(transformers.AutoModelForImageTextToText, place, device, dtype)

    def ask(self, images, questions, do_sample=False):
        """The model's answers."""
        inputs, image_tokens = self.inputs([image.convert("RGB") for image in images])
        texts = []
        for question in questions:
            for token in self.tokenizer.get_added_vocab():  # an <image> in a prompt is text
                question = question.replace(token, f"{token[0]} {token[1:]}")
            image = self.image_token * image_tokens
            texts.append(self.template.format(image=image, question=question))
        # Padded on the left: an answer follows its question.
        tokens = self.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        inputs = transformers.BatchFeature({**tokens, **inputs})
        if "image_grid_thw" in inputs:  # Qwen asks which tokens are an image's
            is_image = tokens.input_ids == self.model.config.image_token_id
            inputs["mm_token_type_ids"] = is_image.int()
        inputs = inputs.to(self.model.device, self.model.dtype)  # integers stay integers
        options = {"do_sample": do_sample, "max_new_tokens": self.max_new_tokens}
        if do_sample:  # a checkpoint's own settings may say top_k 1: the likeliest token only
            options |= {"temperature": 1.0, "top_k": 50, "top_p": 1.0}
        answers = self.model.generate(**inputs, **options)[:, tokens.input_ids.shape[1] :]
        return [x.strip() for x in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]


class VLM(Chat):
    """DDPO's prompt alignment (Black et al. 2023, github.com/kvablack/ddpo-pytorch, with an older
    LLaVA): LLaVA says what it sees, and BERTScore's recall how much of "The image contains
    {prompt}" is in that. Hacked by letters that name what was asked for. Weights: Llama 2 community
    (LLaVA), MIT (DeBERTa)."""

    name = "vlm"
    source = "activities"
    template = "USER: {image}\n{question} ASSISTANT:"
    image_token = "<image>"
    max_new_tokens = 64
    layer = 40  # of DeBERTa's 48: the one that agrees best with people, by BERTScore's table

    def __init__(self, path, device):
        """path: a folder with `llava` and `deberta`, each with its tokenizer."""
        place = locate(path, "llava", "llava-hf/llava-1.5-7b-hf")
        super().__init__(place, transformers.CLIPImageProcessorPil, device)
        place = locate(path, "deberta", "microsoft/deberta-xlarge-mnli")
        self.words = transformers.AutoTokenizer.from_pretrained(**place)
        layers = {"num_hidden_layers": self.layer}
        self.deberta = load_model(transformers.DebertaModel, place, device, **layers)

    def inputs(self, images):
        vision = self.model.config.vision_config
        image_tokens = (vision.image_size // vision.patch_size) ** 2  # LLaVA drops the class token
        return {"pixel_values": clip_pixels(self.processor, images)}, image_tokens

    def score_batch(self, images, prompts):
        question = "Answer concisely: what is going on in this image?"
        answers = self.token_vectors(self.ask(images, [question] * len(images)))
        captions = self.token_vectors([f"The image contains {prompt}" for prompt in prompts])
        return [bertscore_recall(*pair) for pair in zip(answers, captions)]

    def token_vectors(self, texts):
        """The vectors (n, d) of each text's tokens, from [CLS] to [SEP]."""
        options = {"padding": True, "truncation": True, "max_length": 512, "return_tensors": "pt"}
        tokens = self.words(texts, **options).to(self.deberta.device)
        states = self.deberta(**tokens).last_hidden_state
        return [x[mask == 1] for x, mask in zip(states, tokens.attention_mask)]


def bertscore_recall(candidate, reference):
    """BERTScore's recall, no idf or baseline (arXiv 1904.09675): (n, d) and (m, d) to a number. The
    reference's first and last, [CLS] and [SEP], do not count; but a word of it may match those of
    the candidate, as in github.com/Tiiiger/bert_score."""
    if len(candidate) <= 2 or len(reference) <= 2:
        return 0.0
    cosines = F.normalize(reference[1:-1], dim=-1) @ F.normalize(candidate, dim=-1).T
    return cosines.amax(1).mean().item()


class UnifiedReward(Chat):
    """A vision-language model's mark for alignment and quality, 1 to 5 (Wang et al. 2025, arXiv
    2503.05236), of the image squeezed or stretched to 512 px, with the question, both as in
    github.com/yifan123/flow_grpo, which has another checkpoint, 7b-v1.5. Marks are coarse and high.
    Hacked by text in the image that speaks to the judge. Weights: MIT."""

    name = "unifiedreward"
    range = (1.0, 5.0)
    source = "geneval"
    template = (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_start|>{image}<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n"
    )
    image_token = "<|image_pad|>"
    max_new_tokens = 512
    size = (512, 512)
    question = """\
You are given a text caption and a generated image based on that caption. \
Your task is to evaluate this image based on two key criteria:
1. Alignment with the Caption: Assess how well this image aligns with the provided caption. \
Consider the accuracy of depicted objects, their relationships, and attributes as described in \
the caption.
2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail \
preservation, color accuracy, and overall aesthetic appeal.
Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.
Your task is provided as follows:
Text Caption: [{prompt}]"""
    reminder = "\nAnswer with one line and nothing else: Final Score: and a number from 1 to 5."

    def __init__(self, path, device):
        place = locate(path, "", "CodeGoat24/UnifiedReward-qwen-7b")
        super().__init__(place, transformers.Qwen2VLImageProcessorPil, device)

    def inputs(self, images):
        images = [image.resize(self.size, Image.BICUBIC) for image in images]
        inputs = self.processor(images, return_tensors="pt")
        patches = inputs["image_grid_thw"][0].prod().item()
        return inputs, patches // self.processor.merge_size**2

    def score_batch(self, images, prompts):
        questions = [self.question.format(prompt=prompt) for prompt in prompts]
        scores = []
        for image, question, reply in zip(images, questions, self.ask(images, questions)):
            if final_score(reply) is None:
                # Sampled: the likeliest reply would stop a run again each time it is resumed.
                reply = self.ask([image], [question + self.reminder], do_sample=True)[0]
            if final_score(reply) is None:
                raise ValueError(f"no 1 to 5 after 'Final Score:' in two replies, {reply!r}")
            scores.append(final_score(reply))
        return scores


def final_score(reply):
    """The number right after the last "Final Score:", the scale "1 to 5" aside, if in 1..5."""
    _, colon, text = reply.lower().rpartition("final score:")
    text = re.sub(r"(?<![\d.])1 *(?:to|-|\u2013) *5(?!\.?\d)", "", text)
    number = re.match(r"[\s*:()\[]*(\d+(?:\.\d+)?)", text)
    if colon and number and 1 <= float(number[1]) <= 5:
        return float(number[1])
    return None


# GenEval

CLASSES = """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light,
fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear,
zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball,
kite, baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup,
fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut,
cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote,
computer keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase,
scissors, teddy bear, hair drier, toothbrush""".replace("\n", " ").split(", ")
COLORS = "red orange yellow green blue purple pink brown black white".split()
RELATIONS = ("left of", "right of", "above", "below")
# With Flow-GRPO's shares in training (Liu et al. 2025, arXiv 2505.05470).
TASKS = dict(single_object=0, two_object=1, counting=5, colors=1, position=7, color_attr=3)


@dataclass
class Detection:
    score: float  # 0..1
    box: tuple  # (x0, y0, x1, y1) in pixels
    mask: torch.Tensor = None  # (H, W)
    color: str = None  # only if the prompt asks for one


class GenEval(Reward):
    """Are the objects, counts, colors and positions as asked? (Ghosh et al. 2023, arXiv 2310.11513)

    Mask2Former finds objects of COCO's 80 classes, and CLIP ViT-L/14 names their colors, as in
    github.com/djghosh13/geneval, but with another checkpoint and sides that are multiples of 32.
    The reward is `partial_credit`. Logged beside it are the benchmark's numbers: each task's share
    of images that pass `strict_verdict`, and the mean of these shares. Hacked by objects apart, as
    if pasted. Weights: "other" (Mask2Former), no license on the card (CLIP)."""

    name = "geneval"
    source = "geneval"
    threshold = 0.3  # of a detection's score, but 0.9 for counting
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)
    shortest = 800  # images are scaled to this shorter side (or config.json's `shortest_side`),
    longest = 1333  # or to this longer one, if that makes them smaller

    def __init__(self, path, device):
        """path: a folder with `detector`, a Mask2Former for COCO, and `clip`, a CLIPModel."""
        place = locate(path, "detector", "facebook/mask2former-swin-small-coco-instance")
        self.detector = load_model(Mask2Former, place, device)
        self.shortest = getattr(self.detector.config, "shortest_side", self.shortest)
        self.clip = CLIP(locate(path, "clip", "openai/clip-vit-large-patch14"), device)
        self.color_vectors = {}  # class: (10, d), of COLORS
        self.device = device

    @classmethod
    def check(cls, prompt, metadata):
        if metadata.get("tag") not in TASKS or not metadata.get("include"):
            raise cls.missing("GenEval's metadata, a tag and include", prompt, metadata)
        for i, wanted in enumerate(metadata["include"] + metadata.get("exclude", [])):
            places = [[relation, target] for relation in RELATIONS for target in range(i)]
            if (
                wanted.get("class") not in CLASSES
                or wanted.get("count", 0) < 1
                or wanted.get("color", "red") not in COLORS
                or wanted.get("position") not in [None, *places]
            ):
                raise cls.missing(f"objects as GenEval has them, not {wanted}", prompt, metadata)

    def score_all(self, images, prompts, metadata):
        scores = []
        verdicts = {}
        for i in range(0, len(images), self.batch):
            entries = metadata[i : i + self.batch]
            for objects, entry in zip(self.detect(images[i : i + self.batch], entries), entries):
                scores.append(partial_credit(objects, entry))
                verdicts.setdefault(entry["tag"], []).append(strict_verdict(objects, entry))
        shares = {f"{self.name}/{task}": sum(x) / len(x) for task, x in verdicts.items()}
        shares[f"{self.name}/overall"] = sum(shares.values()) / len(shares)
        return scores, shares

    def detect(self, images, metadata):
        """{class: [Detection, best first]} for each image, colored if its prompt asks for it."""
        inputs = []
        for image in images:
            scale = min(self.shortest / min(image.size), self.longest / max(image.size))
            size = multiples_of_32([image.height * scale, image.width * scale])
            inputs.append(standardize(to_pixels(image, self.device), size, self.mean, self.std))
        found = []
        outputs = in_batches(self.logits, inputs)
        for image, entry, x, logits in zip(images, metadata, inputs, outputs):
            threshold = 0.9 if entry["tag"] == "counting" else self.threshold
            objects = instances(*logits, (image.height, image.width), threshold, x.shape[1:])
            for wanted in entry["include"]:
                if "color" in wanted and objects.get(wanted["class"]):
                    self.name_colors(image, wanted["class"], objects[wanted["class"]])
            found.append(objects)
        return found

    def logits(self, pixels):
        output = self.detector(pixel_values=pixels)
        return zip(output.class_queries_logits, output.masks_queries_logits)

    def name_colors(self, image, name, objects):
        """Sets each object's color: the nearest, by CLIP, to its box with all but its mask gray."""
        if name not in self.color_vectors:
            kinds = ("{} {}", "{}-colored {}", "{} object")
            words = [kind.format(color, name) for color in COLORS for kind in kinds]
            vectors = self.clip.texts([f"a photo of a {text}" for text in words])
            means = vectors.view(len(COLORS), len(kinds), -1).mean(1)
            self.color_vectors[name] = F.normalize(means, dim=-1)
        image = image.convert("RGB")
        gray = Image.new("RGB", image.size, "#999")
        crops = []
        for found in objects:
            mask = Image.fromarray(found.mask.numpy())
            crop = Image.composite(image, gray, mask).crop(found.box)
            crops.append(center_square(crop, self.clip.side))
        for found, vector in zip(objects, self.clip.images(crops)):
            found.color = COLORS[(self.color_vectors[name] @ vector).argmax()]


class Mask2Former(transformers.Mask2FormerForUniversalSegmentation):
    """Without the training loss, which needs scipy."""

    def __init__(self, config):
        transformers.Mask2FormerPreTrainedModel.__init__(self, config)
        self.model = transformers.Mask2FormerModel(config)
        self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
        self.post_init()


def instances(class_logits, mask_logits, size, threshold, input_size=None):
    """{class: [Detection, best first]} in an image of `size` (height, width), from class_logits
    (Q, 81), the last for no object, and mask_logits (Q, h, w), which are enlarged to `input_size`,
    the detector's, and then to `size`, as in mmdet. One query may have several classes (arXiv
    2112.01527). At most 16 of a class, as in the benchmark."""
    probabilities = class_logits.float().softmax(-1)[:, :-1]
    queries, classes = probabilities.shape
    scores, index = probabilities.flatten().topk(queries)
    index = index[scores > threshold]  # a mask can only lower a score
    scores = scores[scores > threshold]
    if not len(index):
        return {}
    logits = mask_logits[None, index // classes].float()
    if input_size:
        logits = F.interpolate(logits, input_size, mode="bilinear")
    logits = F.interpolate(logits, size, mode="bilinear")[0]
    masks = logits > 0
    scores = scores * (logits.sigmoid() * masks).sum((1, 2)) / masks.sum((1, 2)).clamp(min=1)
    objects = {}
    for i in scores.argsort(descending=True).tolist():
        mask = masks[i].cpu()
        box = Image.fromarray(mask.numpy()).getbbox()  # None if the mask is empty
        found = objects.setdefault(CLASSES[index[i] % classes], [])
        if box and scores[i] > threshold and len(found) < 16:
            found.append(Detection(scores[i].item(), box, mask))
    return objects


def relations(a, b):
    """Where box a is of box b: none, one or two of RELATIONS, by their centers. Along an axis their
    offset, less a tenth of both boxes' sides, must be over half of the distance."""
    dx = (a[0] + a[2] - b[0] - b[2]) / 2
    dy = (a[1] + a[3] - b[1] - b[3]) / 2
    half = math.hypot(dx, dy) / 2
    found = set()
    if abs(dx) - (a[2] - a[0] + b[2] - b[0]) / 10 > half:
        found.add("right of" if dx > 0 else "left of")
    if abs(dy) - (a[3] - a[1] + b[3] - b[1]) / 10 > half:
        found.add("below" if dy > 0 else "above")
    return found


def in_position(found, wanted, groups):
    """Whether each object is where `wanted` says: relative to all objects in one of groups, those
    found for earlier entries, or None if they were not correct."""
    relation, target = wanted["position"]
    if groups[target] is None:
        return False
    return all(relation in relations(a.box, b.box) for a in found for b in groups[target])


def strict_verdict(objects, entry):
    """The benchmark's, on {class: [Detection]}: it looks at the best `count` of each class. (In
    Flow-GRPO's logs it is called accuracy; its strict accuracy wants exact counts.)"""
    groups = []
    for wanted in entry["include"]:
        found = objects.get(wanted["class"], [])[: wanted["count"]]
        if len(found) < wanted["count"]:
            return False
        if "color" in wanted and any(x.color != wanted["color"] for x in found):
            return False
        if "position" in wanted and not in_position(found, wanted, groups):
            return False
        groups.append(found)
    excluded = entry.get("exclude", [])
    return all(len(objects.get(x["class"], [])) < x["count"] for x in excluded)


def partial_credit(objects, entry):
    """The score for training, at most 1: the mean over what is asked (Flow-GRPO, Liu et al. 2025).
    A count n gets 1 - |n - found| / n, below 0 for more than twice as many; a color the share of n
    that has it; a position 1 or 0, left out if a color is wrong. If the count is wrong, color and
    position share one 0. (github.com/yifan123/reward-server also adds a 1 to a wrong position's 0;
    here there is none.)"""
    credits = []
    groups = []
    for wanted in entry["include"]:
        found = objects.get(wanted["class"], [])
        count = wanted["count"]
        credits.append(1 - abs(count - len(found)) / count)
        correct = len(found) == count
        if not correct and ("color" in wanted or "position" in wanted):
            credits.append(0.0)
        if correct and "color" in wanted:
            matching = sum(x.color == wanted["color"] for x in found)
            credits.append(matching / count)
            correct = matching == count
        if correct and "position" in wanted:
            correct = in_position(found, wanted, groups)
            credits.append(float(correct))
        groups.append(found if correct else None)
    return sum(credits) / len(credits)


REWARDS = [OCR, GenEval, PickScore, CLIPScore, HPSv2, Aesthetic, ImageReward, UnifiedReward, VLM]
REWARDS += [Compressibility, Incompressibility, Color]
REWARDS = {reward.name: reward for reward in REWARDS}


# Prompts


def held_out(text):
    """True for the eighth of all texts that is kept for evaluation: a checksum decides."""
    return zlib.crc32(text.encode()) % 8 == 0


def subjects(prompt, metadata):
    """What a prompt asks for, alike for any order: [its text] or, with GenEval's metadata, [its
    text, its objects]. The list's last item decides whether it is held out."""
    start = "a photo of " if prompt.startswith("a photo of ") else ""
    texts = [start + " and ".join(sorted(prompt.removeprefix(start).split(" and ")))]
    if metadata.get("tag") in TASKS:
        objects = []
        for x in metadata.get("include", []):
            words = [str(x[key]) for key in ("count", "color", "class") if key in x]
            objects.append(" ".join(words))
        texts.append(f"{metadata['tag']}: {' and '.join(sorted(objects))}")
    return texts


def prompts(source, split, seed=0, exclude=None):
    """Pairs (prompt, metadata) of a source: one of `GENERATORS`, or a .txt or .jsonl file. "train":
    without end, in an order that depends on the seed, an int or str. "eval": a list of at most 512.
    No text (`ocr`), word (`signs`), animal (`animals`) or other prompt of that list is ever trained
    on, nor the same objects in another order. exclude, only for "train": a file whose prompts are
    held out as well or, if the source is a file, instead."""
    if split not in ("train", "eval") or split == "eval" and exclude:
        raise ValueError(f'split is "train" or, without exclude, "eval": not {split!r}')
    endless = generated if source in GENERATORS else from_file
    if split == "train":
        return endless(source, split, random.Random(seed), exclude)
    # Sources with few evaluation prompts repeat themselves: stop looking after a while.
    pairs = itertools.islice(endless(source, split, random.Random(0)), 2048)
    return list(dict(pairs).items())[:512]


def generated(source, split, rng, exclude=None):
    """Pairs of a generator, without end."""
    excluded = all_subjects(exclude)
    tag = None
    rejected = 0  # in a row
    for item in GENERATORS[source](split, rng):  # prompts, or pairs
        prompt, metadata = (item, {}) if isinstance(item, str) else item
        if rejected and metadata.get("tag") != tag:
            continue  # wait for the same task, or the mixture would change
        tag = metadata.get("tag")
        if excluded.isdisjoint(subjects(prompt, metadata)):
            rejected = 0
            yield prompt, {"origin": f"prompt generator {source}", **metadata}
        else:
            rejected += 1
            if rejected == 10_000:
                raise ValueError(f"nothing of {source} is left to train on: see {exclude}")


def from_file(source, split, rng, exclude=None):
    """Pairs of a file, without end, each time through in another order."""
    excluded = all_subjects(exclude)
    pairs = []
    for pair in read_prompts(source):
        names = subjects(*pair)
        is_held_out = not excluded.isdisjoint(names) if exclude else held_out(names[-1])
        if is_held_out == (split == "eval"):
            pairs.append(pair)
    if not pairs:
        kept = f"all of {exclude}" if exclude else "one in eight"
        raise ValueError(f"{source} has no prompt for {split}: {kept} is for evaluation")
    while True:
        yield from rng.sample(pairs, len(pairs))


def all_subjects(file):
    """What all prompts of a file, if there is one, ask for."""
    return {name for pair in read_prompts(file) for name in subjects(*pair)} if file else set()


def read_prompts(source):
    """All pairs (prompt, metadata) of a file, or a generator's evaluation list. Metadata are the
    fields of a .jsonl's line, and `origin`, file and line, unless it has one."""
    if source in GENERATORS:
        return prompts(source, "eval")
    path = Path(source)
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"{source}: prompts come from a .txt or .jsonl file or {list(GENERATORS)}")
    pairs = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        origin = f"{source}, line {number}"
        metadata = {"prompt": line}
        if path.suffix == ".jsonl":
            try:
                metadata = json.loads(line, object_hook=drop_nulls)
            except ValueError as error:
                raise ValueError(f"{origin} is no JSON: {error}") from error
        if not isinstance(metadata, dict) or not isinstance(metadata.get("prompt"), str):
            raise ValueError(f"{origin} is no object with a text called prompt")
        pairs.append((metadata.pop("prompt").strip(), {"origin": origin, **metadata}))
    return pairs


def evaluation_prompts(source, count, file=None):
    """All pairs of `file`; else `count` evaluation pairs of a source, repeated if too few."""
    if file:
        return read_prompts(file)
    return list(itertools.islice(itertools.cycle(prompts(source, "eval")), count))


def drop_nulls(entry):
    return {key: value for key, value in entry.items() if value is not None}


def sign_prompts(split, rng):
    """What tiny-sd3 draws: words of three or four letters, such as `"moon" on a blue sign`."""
    letters = {"C": "bcdfghjklmnprstvwxyz", "V": "aeiou"}
    while True:
        pattern = rng.choice(("CVC", "CVVC", "CVCV", "CCVC", "VCVC", "CVCC"))
        word = "".join(rng.choice(letters[kind]) for kind in pattern)
        color = rng.choice(list(SIGN_COLORS))
        if held_out(word) == (split == "eval"):
            yield f'"{word}" on a {color} sign'


SCENES = """wooden sign outside a bakery that reads
neon sign in a rainy street that says
ceramic mug on a writing desk with the words
vintage travel poster of a mountain lake with the title
white T-shirt on a hanger with the printed words
chalkboard in front of a cafe on which is written
birthday cake on a kitchen table with the icing text
graffiti mural on a brick wall that spells
road sign beside a desert highway that reads
paperback novel on a park bench with the title
glass jar on a shelf with a label that reads
hot air balloon over a valley with a banner that says""".split("\n")
STYLES = ["", "", "", ", a photograph", ", an oil painting", ", close-up", ", soft morning light"]
TEXTS = ["{noun}", "{adj} {noun}", "{noun} and {other}", "{verb} the {noun}", "the {adj} {noun}"]
NOUNS = """bread garden river coffee market music forest kitchen harbor morning honey island
library lemon mountain thunder kingdom story pepper window dragon bicycle castle planet orange
travel picture village butter winter sunset pocket rocket cotton engine ocean tiger violin museum
bridge""".split()
VERBS = "follow explore remember protect discover welcome trust believe".split()
ADJECTIVES = "fresh warm quiet golden happy little hidden silver wild gentle brave early".split()


def text_prompts(split, rng):
    """One to three English words: `A neon sign in a rainy street that says "Golden Dragon"`."""
    while True:
        text = rng.choice(TEXTS)
        words = {"noun": rng.choice(NOUNS), "other": rng.choice(NOUNS)}
        text = text.format(**words, verb=rng.choice(VERBS), adj=rng.choice(ADJECTIVES))
        scene = rng.choice(SCENES)
        style = rng.choice(STYLES)
        case = rng.choice((str.upper, str.title, str.capitalize))
        if held_out(text) == (split == "eval"):  # before `case`, so for every spelling alike
            yield f'A {scene} "{case(text)}"{style}'


# DDPO's (Black et al. 2023). Of the animals four are held out.
ANIMALS = """cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear
raccoon fox wolf lizard beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake
turtle frog chicken duck goose bee pig turkey fly llama camel bat gorilla hedgehog
kangaroo""".split()
ACTIVITIES = ["washing the dishes", "playing chess", "riding a bike"]


def animal_prompts(split, rng):
    animals = [animal for animal in ANIMALS if held_out(animal) == (split == "eval")]
    while True:
        yield phrase(rng.choice(animals))


def activity_prompts(split, rng):
    texts = [f"{phrase(animal)} {activity}" for animal in ANIMALS for activity in ACTIVITIES]
    texts = [text for text in texts if held_out(text) == (split == "eval")]
    while True:
        yield rng.choice(texts)


def geneval_prompts(split, rng):
    """GenEval's six tasks over COCO's 80 classes, with metadata as in its files: in turn for
    evaluation, by their shares for training."""
    tasks = itertools.cycle(TASKS)
    if split == "train":
        tasks = (rng.choices(list(TASKS), TASKS.values())[0] for _ in itertools.count())
    for task in tasks:
        prompt, metadata = geneval_prompt(task, rng)
        while held_out(subjects(prompt, metadata)[-1]) != (split == "eval"):
            prompt, metadata = geneval_prompt(task, rng)
        yield prompt, metadata


def geneval_prompt(task, rng):
    a, b = rng.sample(CLASSES[1:] if task.startswith("color") else CLASSES, 2)  # no person is green
    first = {"class": a, "count": 1}
    second = {"class": b, "count": 1}
    count = rng.randint(2, 4)
    color, other_color = rng.sample(COLORS, 2)
    relation = rng.choice(RELATIONS)
    include = {
        "single_object": [first],
        "two_object": [first, second],
        "counting": [{**first, "count": count}],
        "colors": [{**first, "color": color}],
        "position": [second, {**first, "position": [relation, 0]}],
        "color_attr": [{**first, "color": color}, {**second, "color": other_color}],
    }[task]
    parts = [phrase(x["class"], x["count"], x.get("color")) for x in include]
    if task == "position":
        parts = [f"{parts[1]} {relation} {parts[0]}"]
    metadata = {"tag": task, "include": include}
    if task == "counting":
        metadata["exclude"] = [{"class": a, "count": count + 1}]
    return f"a photo of {' and '.join(parts)}", metadata


PLURALS = {
    "person": "people", "knife": "knives", "sheep": "sheep", "computer mouse": "computer mice",
}  # fmt: skip
PORTIONS = {"skis": "pair", "scissors": "pair", "broccoli": "head"}  # counted by these


def phrase(name, count=1, color=None):
    """A class in words: `an apple`, `three people`, `a pair of red skis`."""
    ending = "es" if name.endswith(("s", "x", "ch", "sh")) else "s"
    plural = PLURALS.get(name, name + ending)
    singular = f"{color} {name}" if color else name
    if name in PORTIONS:
        plural = f"{PORTIONS[name]}s of {name}"
        singular = f"{PORTIONS[name]} of {singular}"
    if count > 1:
        return f"{['two', 'three', 'four'][count - 2]} {plural}"
    return f"{'an' if singular[0] in 'aeiou' else 'a'} {singular}"


GENERATORS = dict(ocr=text_prompts, geneval=geneval_prompts, animals=animal_prompts)
GENERATORS |= dict(activities=activity_prompts, signs=sign_prompts)


# Pictures of a run


def contact_sheet(path, images, scores, pairs):
    """The first 16 images, four in a row, each over its score and prompt; small ones are enlarged
    without smoothing. pairs: (prompt, metadata) of each image."""
    scale = max(1, 256 // images[0].width)
    width, height = (side * scale for side in images[0].size)
    rows = math.ceil(min(len(images), 16) / 4)
    sheet = Image.new("RGB", (4 * (width + 8), rows * (height + 40)), "white")
    pen = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=13)
    for i, (image, score, (prompt, _)) in enumerate(zip(images[:16], scores, pairs)):
        x = i % 4 * (width + 8)
        y = i // 4 * (height + 40)
        sheet.paste(image.resize((width, height), Image.NEAREST), (x, y))
        caption = textwrap.fill(f"{score:.2f}  {prompt}", width // 7, max_lines=2)
        pen.multiline_text((x + 4, y + height + 2), caption, "black", font)
    sheet.save(path)


def plot_curve(path, metrics):
    """A panel for each number of the last evaluation. metrics: the lines of metrics.jsonl."""
    names = [name for name in metrics[-1] if name not in LOGGED]
    if metrics[-1]["reward"] != metrics[-1][names[0]]:
        names.insert(0, "reward")  # a sum, of which the first is a part
    columns = min(len(names), 3)
    chart = Image.new("RGB", (columns * 720, math.ceil(len(names) / columns) * 480), "white")
    for i, name in enumerate(names):
        panel = plot_panel(name, [line for line in metrics if name in line])
        chart.paste(panel, (i % columns * 720, i // columns * 480))
    chart.resize((chart.width // 2, chart.height // 2), Image.LANCZOS).save(path)  # smooth lines


def plot_panel(name, lines):
    """Training (thin) and evaluations (thick, the last as a number) against images scored."""
    panel = Image.new("RGB", (720, 480), "white")
    pen = ImageDraw.Draw(panel)
    font = ImageFont.load_default(size=26)
    low = min(line[name] for line in lines)
    high = max(line[name] for line in lines)
    images = lines[-1]["images"]

    def position(x, y):
        return 110 + 570 * x / (images or 1), 410 - 320 * (y - low) / ((high - low) or 1)

    for y in (low, (low + high) / 2, high):
        pen.line([position(0, y), position(images, y)], "#e2e8f0", 2)
        pen.text((96, position(0, y)[1]), f"{y:.3g}", "#64748b", font, "rm")
    pen.text((680, 424), f"{images:,} images", "#64748b", font, "rt")
    for split, color, thickness in (("train", "#93c5fd", 3), ("eval", "#1d4ed8", 7)):
        points = [position(x["images"], x[name]) for x in lines if x["split"] == split]
        pen.line(points, color, thickness, "curve")
    pen.text((110, 24), name, "black", font)
    pen.text((680, 24), f"{lines[-1][name]:.3g}", "#1d4ed8", font, "ra")
    return panel
