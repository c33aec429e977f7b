"""Rewards and prompts: what the two algorithms optimise, and what they draw. Nothing is differentiated.

    reward = load("ocr@tiny-sd3", "cpu")                      # text rendering, with the models of a folder
    reward = load("ocr:1,incompressibility:-0.005", "cuda")   # a weighted sum
    rewards = reward(images, prompts, metadata)               # PIL images, str, dict -> (B,) tensor on CPU
    rewards, parts = reward.score(images, prompts, metadata)  # the same, and {name: (B,)} unweighted, to log

A spec is `name[@path-or-repo][:weight]`, several joined by commas. `prompts(source, split, seed)` yields
pairs (prompt, metadata), a dict that says at least `where` the prompt came from.

To add a reward, subclass `Reward`: give it a `name`, a `range`, a `measure`, an `objection` if it cannot
score every prompt, and a place in `REWARDS`. Each class says how its reward is hacked, and the licence of its
weights; no file of them can run code. A reward that fails stops the run: a quiet 0 would be learnt from.
Models run in float32 (in bf16 the batch could move a pickscore by 0.1), the two of 7 B in bf16 on a GPU.
"""

import contextlib
import datetime
import io
import json
import math
import os
import random
import re
import sys
import textwrap
import time
import traceback
import zlib
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial, partialmethod
from itertools import chain, count, cycle, islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import transformers
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm


# The interface

class RewardError(RuntimeError):
    """A reward that failed: its name and the cause, in one line."""


class Reward:
    """Gives each picture a number."""
    name = "reward"
    range = (0.0, 1.0)   # where the scores lie, used only to put them on [0, 1]: `normalize`
    prompts = "animals"  # the prompt generator that suits it
    batch = 16           # pictures that a model is shown at once
    details = {}         # a benchmark's table of the pictures last scored, {row: value}

    def __init__(self, path, device):
        """path: what follows the @ of the spec, or None. ValueError or OSError where it cannot be loaded."""
        if path:
            raise ValueError(f"reward {self.name} has no weights to load: leave out @{path}")

    def objection(self, prompt, metadata):
        """What is missing where this prompt cannot be scored, such as "needs ..."; None where it can."""

    def check(self, prompts, metadata):
        """ValueError, with file and line, for a prompt that cannot be scored: before any is sampled."""
        for i, (prompt, entry) in enumerate(zip(prompts, metadata), 1):
            if objection := self.objection(prompt, entry):
                raise ValueError(f"{entry.get('where', f'prompt {i}')}: the reward {self.name} {objection}")

    def measure(self, images, prompts, metadata):
        """Scores (B,), list or tensor. Override this, or measure_batch for up to `batch` images."""
        parts = [slice(i, i + self.batch) for i in range(0, len(images), self.batch)]
        return torch.cat([torch.as_tensor(self.measure_batch(images[part], prompts[part])) for part in parts])

    @torch.no_grad()
    def score(self, images, prompts, metadata):
        """Rewards (B,) and their parts {name: (B,)}, float32 on the CPU. Any failure is a RewardError."""
        try:
            self.check(prompts, metadata)
            scores = torch.as_tensor(self.measure(images, prompts, metadata)).detach().float().cpu()
        except torch.OutOfMemoryError:
            raise
        except Exception as cause:
            reason = f"{type(cause).__name__}: {str(cause).strip()}".split("\n")[0]
            raise RewardError(f"reward {self.name} failed: {reason}") from cause
        if (shape := tuple(scores.shape)) != (len(images),):
            raise RewardError(f"reward {self.name} gave scores of shape {shape} for {len(images)} images")
        for score, prompt in zip(scores.tolist(), prompts):
            if not math.isfinite(score):
                raise RewardError(f"reward {self.name} gave {score} for the prompt {prompt!r}")
        return scores, {self.name: scores}

    def __call__(self, images, prompts, metadata):
        return self.score(images, prompts, metadata)[0]

    def tables(self):
        """{name: details} of the rewards in it that have any."""
        return {part.name: part.details for _, part in getattr(self, "parts", [(1, self)]) if part.details}


class WeightedSum(Reward):
    """`sum_i weight_i reward_i`. parts: list of (weight, Reward), the rewards' names distinct."""

    def __init__(self, parts):
        self.parts = parts
        terms = (reward.name if weight == 1 else f"{weight:g} {reward.name}" for weight, reward in parts)
        self.name = " + ".join(terms).replace("+ -", "- ")

    @property
    def range(self):  # a negative weight turns its part's range around
        ends = [sorted(weight * end for end in reward.range) for weight, reward in self.parts]
        return tuple(map(sum, zip(*ends)))

    def check(self, prompts, metadata):
        for _, reward in self.parts:
            reward.check(prompts, metadata)

    def score(self, images, prompts, metadata):
        scores = {reward.name: reward(images, prompts, metadata) for _, reward in self.parts}
        return sum(weight * scores[reward.name] for weight, reward in self.parts), scores


class Incompressibility(Reward):
    """The size of the picture as a JPEG of quality 95, in kB (Black et al. 2023). Hacked by noise."""
    name, range, sign = "incompressibility", (0.6, 200.0), 1  # at 512 px: a JPEG's header, and a busy picture

    def measure(self, images, prompts, metadata):
        lo, hi = Incompressibility.range  # size falls more slowly than area: the power
        hi = lo + (hi - lo) * (images[0].width * images[0].height / 512 ** 2) ** 0.9
        self.range = (lo, hi) if self.sign > 0 else (-hi, -lo)
        files = [io.BytesIO() for _ in images]
        for image, file in zip(images, files):
            image.convert("RGB").save(file, "JPEG", quality=95)
        return [self.sign * file.tell() / 1000 for file in files]


class Compressibility(Incompressibility):
    """Minus the size in kB. Hacked by a flat color."""
    name, range, sign = "compressibility", (-200.0, -0.6), -1


class Color(Reward):
    """1 where the median color of tiny-sd3's sign is nearest to that of its prompt, else 0. A judge."""
    name, prompts = "color", "signs"

    def objection(self, prompt, metadata):
        if not set(prompt.split()) & set(SIGN_COLORS):
            return f"needs one of {', '.join(SIGN_COLORS)} in the prompt, and there is none in {prompt!r}"

    def measure(self, images, prompts, metadata):
        medians = torch.stack([to_pixels(image, "cpu").flatten(1).median(1).values for image in images])
        nearest = torch.cdist(medians, torch.tensor([*SIGN_COLORS.values()]).float()).argmin(1)
        return [float([*SIGN_COLORS][i] in prompt.split()) for i, prompt in zip(nearest, prompts)]


def load(spec, device, batch=16):
    """The Reward of a spec, shown `batch` pictures at once. ValueError, OSError: what cannot be loaded."""
    weights, parts = parse_spec(spec), []
    names = [head.partition("@")[0] for head in weights]
    for name, (head, weight) in zip(names, weights.items()):
        reward = REWARDS[name](head.partition("@")[2] or None, torch.device(device))
        reward.name, reward.batch = name if names.count(name) == 1 else head, batch
        parts.append((weight, reward))
    return parts[0][1] if list(weights.values()) == [1] else WeightedSum(parts)


def parse_spec(spec):
    """{name[@path-or-repo]: weight} of a spec. ValueError if it is malformed."""
    weights = {}
    for item in map(str.strip, spec.split(",")):
        head, _, weight = item.rpartition(":") if ":" in item else (item, "", "1")
        name, at, path = head.partition("@")
        if name not in REWARDS:
            raise ValueError(f"unknown reward {name!r} in {spec!r}: known are {', '.join(sorted(REWARDS))}")
        if at and not path:
            raise ValueError(f"{item!r} has nothing after the @: name a folder or a repository there")
        if head in weights:
            raise ValueError(f"a reward comes twice in {spec!r}: add the two weights up instead")
        if not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", weight):
            raise ValueError(f"malformed weight in {item!r}: a number follows the colon, as in {head}:0.5")
        weights[head] = float(weight)
    if not any(weights.values()):
        raise ValueError(f"every weight in {spec!r} is 0: there is nothing to optimise")
    return weights


def default_prompts(spec):
    """The prompt generator that suits a spec: one that its `ocr` or `geneval` can score, else its first's."""
    names = [head.partition("@")[0] for head in parse_spec(spec)]
    return next((name for name in ("ocr", "geneval") if name in names), REWARDS[names[0]].prompts)


def normalize(rewards, range):
    """Rewards on [0, 1]: `(r - lo) / (hi - lo)`, clipped."""
    return ((rewards - range[0]) / (range[1] - range[0])).clamp(0, 1)


# Loading weights

@contextlib.contextmanager
def loading(reward, path, subfolder, repository, file=""):
    """Yields where a part of a reward is: (path, subfolder), or (repository, "") where no path was given.
    Whatever goes wrong inside is an OSError of one line: which reward, which place, why, what to do."""
    place = (path, subfolder) if path else (repository, "")
    try:
        if not Path(place[0]).exists() and not re.fullmatch(r"[\w.-]+/[\w.-]+", place[0]):
            raise OSError("no such folder")
        yield place
    except torch.OutOfMemoryError:
        raise
    except Exception as cause:
        place, reason = "/".join(filter(None, (*place, file))), str(cause).strip().split("\n")[0]
        raise OSError(f"reward {reward}: cannot load {place} ({reason}). Plain {reward} downloads its "
                      f"weights from huggingface.co; {reward}@PATH takes them from a folder") from cause


def load_model(kind, path, subfolder="", dtype=torch.float32, **options):
    """A transformers model in eval mode. OSError where it lacks a tensor: transformers would only warn."""
    options |= {"subfolder": subfolder, "dtype": dtype, "output_loading_info": True}
    model, report = kind.from_pretrained(path, **options)
    if missing := sorted(key for key in report["missing_keys"] if "num_batches_tracked" not in key):
        raise OSError(f"it lacks {len(missing)} of the model's tensors, as {missing[0]}")
    return model.eval()


def load_file(path, filename, names, subfolder=""):
    """The tensors of one file, renamed by each pair (pattern, replacement) of `names` in order."""
    file, renamed = transformers.utils.cached_file(path, filename, subfolder=subfolder), {}
    tensors = torch.load(file, map_location="cpu", weights_only=True)
    for key, tensor in tensors.get("state_dict", tensors).items():
        for pattern, replacement in names:
            key = re.sub(pattern, replacement, key)
        if key in renamed:
            raise ValueError(f"two tensors are named {key}")
        if key:  # one left without a name is not needed
            renamed[key] = tensor
    return renamed


def load_strictly(model, tensors):
    """`load_state_dict`, and a ValueError of one line where a name or a shape is left over on either side."""
    own, theirs = ({(key, tuple(tensor.shape)) for key, tensor in side.items()}
                   for side in (model.state_dict(), tensors))
    extra, missing = sorted(theirs - own), sorted(own - theirs)
    if extra or missing:
        raise ValueError(f"{len(extra)} of its tensors have no place in the model, as {extra[:1]}; of the "
                         f"model's tensors it lacks {len(missing)}, as {missing[:1]}")
    model.load_state_dict(tensors)
    return model.eval()


# Text rendering

def quoted(prompt):
    """The text between the prompt's first pair of double quotes; None where there is none."""
    match = re.search(r'"([^"]*)"', prompt)
    return match[1] if match and match[1].strip() else None


def edit_similarity(target, read):
    """1 if `target` is in `read`, else `1 - min(d, n) / n`: d the Levenshtein distance, n = len(target)."""
    target, read = ("".join(text.casefold().split()) for text in (target, read))  # ignore case and spaces
    if target in read:
        return 1.0
    row = list(range(len(read) + 1))  # row[j] = distance from target[:i] to read[:j]
    for i, a in enumerate(target, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(read, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return 1 - min(row[-1], len(target)) / len(target)


class OCR(Reward):
    """How much of the prompt's quoted text PP-OCRv5 (Cui et al. 2025, arXiv 2507.05595) reads in the picture,
    by `edit_similarity`: a detector finds lines of text, in boxes that are always upright, a recogniser reads
    each. Hacked by the word alone, huge, on an empty ground, or written many times. Weights: Apache 2.0."""
    name, prompts = "ocr", "ocr"
    batch_pixels = 2 ** 22  # in one forward pass: sixteen 512 px pictures. Bounds the memory
    # What the detector and the recogniser are fed, where their preprocessor_config.json says nothing else.
    find = {"image_mean": (0.406, 0.456, 0.485), "image_std": (0.225, 0.224, 0.229),
            "limit_side_len": 960, "limit_type": "max"}
    spell = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5), "max_image_width": 3200,
             "size": {"height": 48, "width": 320}, "pad_size": {"width": 320}}

    def __init__(self, path, device):
        """path: a folder or repository with `ocr-det` and `ocr-rec`; by default PP-OCRv5's server models."""
        self.device = device
        with loading(self.name, path, "ocr-det", "PaddlePaddle/PP-OCRv5_server_det_safetensors") as place:
            self.detector = load_model(transformers.AutoModelForObjectDetection, *place).to(device)
            self.find = self.find | load_settings(*place)
        with loading(self.name, path, "ocr-rec", "PaddlePaddle/PP-OCRv5_server_rec_safetensors") as place:
            self.recogniser = load_model(transformers.AutoModelForTextRecognition, *place).to(device)
            self.spell = self.spell | load_settings(*place)
            self.characters = self.spell["character_list"]

    def objection(self, prompt, metadata):
        if quoted(prompt) is None:
            return f"needs the text to draw between double quotes, and there is none in {prompt!r}"

    def measure(self, images, prompts, metadata):
        return [edit_similarity(quoted(prompt), text) for prompt, text in zip(prompts, self.read(images))]

    @torch.inference_mode()
    def read(self, images):
        """A str for each PIL image, its lines in reading order, whatever pictures are beside it."""
        pixels = [to_pixels(image, self.device) for image in images]
        boxes = self.detect(pixels)
        crops = [x[:, y0:y1, x0:x1] for x, found in zip(pixels, boxes) for x0, y0, x1, y1 in found]
        lines = iter(self.recognise(crops))
        return [" ".join(islice(lines, len(found))) for found in boxes]

    def detect(self, pixels):
        """Pictures (3, H, W) in 0..255 to a list of boxes (x0, y0, x1, y1) each, in reading order."""
        limit, limit_type = self.find["limit_side_len"], self.find["limit_type"]
        sizes = [detector_size(*x.shape[1:], limit, limit_type) for x in pixels]
        boxes = [None] * len(pixels)
        for rows in batches(sizes, self.batch_pixels):
            # The statistics come in the order RGB, the network wants BGR: normalise, then turn the channels.
            x = torch.stack([standardized(pixels[i], sizes[i], self.find).flip(0) for i in rows])
            maps = self.detector(pixel_values=x).last_hidden_state[:, 0]
            for i, found in zip(rows, find_boxes(maps)):
                boxes[i] = reading_order(whole_pixels(box, sizes[i], pixels[i].shape[1:]) for box in found)
        return boxes

    def recognise(self, crops):
        """Lines of text (3, h, w) in 0..255 to a list of str."""
        size, longest = self.spell["size"], self.spell["max_image_width"]
        widths = [min(line_width(*x.shape[1:], size["height"], size["width"]), longest) for x in crops]
        # Padded to whole steps of 32, so that lines share a batch and the padding depends on the line alone.
        padded = [max(self.spell["pad_size"]["width"], math.ceil(width / 32) * 32) for width in widths]
        texts = {}
        for rows in batches([(size["height"], width) for width in padded], self.batch_pixels):
            lines = [standardized(crops[i], (size["height"], widths[i]), self.spell) for i in rows]
            x = torch.stack([F.pad(line, (0, padded[rows[0]] - line.shape[2])) for line in lines])
            classes = self.recogniser(pixel_values=x).last_hidden_state
            texts |= zip(rows, ctc_decode(classes, self.characters))
        return [texts[i] for i in range(len(crops))]


def load_settings(path, subfolder):
    """What is set in a model's preprocessor_config.json. (Its processor's class would need torchvision.)"""
    settings, _ = transformers.ImageProcessingMixin.get_image_processor_dict(path, subfolder=subfolder)
    return {key: value for key, value in settings.items() if value is not None}


def to_pixels(image, device):
    """PIL image to a float tensor (3, H, W) in 0..255."""
    pixels = torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
    return pixels.view(image.height, image.width, 3).permute(2, 0, 1).to(device, torch.float32)


def resize(pixels, size):
    """(3, H, W) to (3, *size): bilinear, over all the pixels it shrinks."""
    return F.interpolate(pixels[None], size, mode="bilinear", align_corners=False, antialias=True)[0]


def standardized(pixels, size, settings):
    """(3, H, W) in 0..255 to (3, *size) as a network wants it: (x / 255 - mean) / std, channel by channel."""
    mean, std = (pixels.new_tensor(settings[key]).view(3, 1, 1) for key in ("image_mean", "image_std"))
    return (resize(pixels, size) / 255 - mean) / std


def detector_size(height, width, limit, limit_type):
    """(height, width) for the detector, scaled as PP-OCR's `limit_type` says, to multiples of 32."""
    ratio = {"max": min(limit / max(height, width), 1), "min": max(limit / min(height, width), 1),
             "resize_long": limit / max(height, width)}[limit_type]
    return multiples_of_32(int(height * ratio), int(width * ratio))


def multiples_of_32(*sides):
    return tuple(max(round(side / 32) * 32, 32) for side in sides)


def line_width(height, width, new_height, full):
    """The width of a line scaled to `new_height`: rounded up as far as `full`, and beyond it down."""
    scaled = new_height * width / height
    return min(math.ceil(scaled), max(int(scaled), full))


def whole_pixels(box, old, new):
    """A box in a map of (H, W) = `old` to whole pixels of a picture of `new`: at least one, none outside."""
    (h, w), (H, W) = old, new
    x0, y0, x1, y1 = (round(v * b / a) for v, a, b in zip(box, (w, h, w, h), (W, H, W, H)))
    x0, y0 = min(max(x0, 0), W - 1), min(max(y0, 0), H - 1)
    return x0, y0, max(min(x1, W), x0 + 1), max(min(y1, H), y0 + 1)


def batches(sizes, pixels):
    """Indices into `sizes`, a list of (height, width), in lists of one size and at most `pixels` in all."""
    for height, width in sorted(set(sizes)):
        rows = [i for i, size in enumerate(sizes) if size == (height, width)]
        step = max(pixels // (height * width), 1)
        yield from (rows[start:start + step] for start in range(0, len(rows), step))


def find_boxes(maps, threshold=0.3, box_threshold=0.6, unclip=1.5, min_side=3, most=1000):
    """Boxes (x0, y0, x1, y1) in pixels, a list for each of the text maps (B, H, W) in 0..1. A map marks a
    shrunken core of each line (Liao et al. 2020, arXiv 1911.08947): boxes grow, maybe over the edge. Of the
    `most` lowest blobs those count whose box has `min_side` pixels each way and a mean of `box_threshold`."""
    mask = maps > threshold
    _, y, x = mask.nonzero(as_tuple=True)
    blobs, blob = connected(mask).unique(return_inverse=True)
    corners = torch.stack([torch.zeros_like(blobs).scatter_reduce(0, blob, v, how, include_self=False)
                           for how in ("amin", "amax") for v in (x, y)], 1)
    owners, boxes = blobs // mask[0].numel(), [[] for _ in maps]
    for b, scores in enumerate(maps.double().cpu()):
        for x0, y0, x1, y1 in corners[owners == b][-most:].tolist():
            w, h = x1 - x0, y1 - y0
            if min(w, h) >= min_side and scores[y0:y1 + 1, x0:x1 + 1].mean() >= box_threshold:
                grow = w * h * unclip / max(2 * (w + h), 1)
                boxes[b].append((x0 - grow, y0 - grow, x1 + grow, y1 + grow))
    return boxes


def connected(mask):
    """Connected components (8 neighbours) of masks (B, H, W): a label for each pixel set, in `mask.nonzero()`
    order, which is the place of the component's last pixel among all pixels of all masks."""
    places = torch.arange(mask.numel(), device=mask.device)
    labels = places.view(mask.shape).clone()
    while True:
        beside = F.max_pool2d(torch.where(mask, labels, -1).double(), 3, 1, 1).long()
        own, largest = labels[mask], beside[mask]
        if torch.equal(own, largest):
            return own
        # Components that touch: the smaller name learns the larger one, then all follow names to the end.
        names = places.scatter_reduce(0, own, largest, "amax")
        while not torch.equal(names, names[names]):
            names = names[names]
        labels[mask] = names[own]


def reading_order(boxes):
    """Boxes line by line, from the left. A line has those whose middle is above its first box's bottom."""
    lines = []
    for box in sorted(boxes, key=lambda box: box[1] + box[3]):
        if not lines or (box[1] + box[3]) / 2 >= lines[-1][0][3]:
            lines.append([])
        lines[-1].append(box)
    return [box for line in lines for box in sorted(line)]


def ctc_decode(scores, characters):
    """Class scores (B, T, C) to B strings: best class a step, repeats merged, class 0 (no letter) dropped."""
    best = [row.unique_consecutive().tolist() for row in scores.argmax(-1).cpu()]
    return ["".join(characters[i] for i in row if i) for row in best]


# CLIP and its kin

class CLIP:
    """A CLIP model (Radford et al. 2021): pictures and texts, cut to 77 tokens, to unit vectors (n, d)."""

    def __init__(self, reward, path, subfolder, repository, device, model=None):
        with loading(reward, path, subfolder, repository) as (path, subfolder):
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(path, subfolder=subfolder)
            self.processor = transformers.CLIPImageProcessorPil.from_pretrained(path, subfolder=subfolder)
            self.model = (model or load_model(transformers.CLIPModel, path, subfolder)).to(device)

    def images(self, images):
        x = clip_pixels(self.processor, images).to(self.model.device)
        return F.normalize(self.model.get_image_features(pixel_values=x).pooler_output, dim=-1)

    def texts(self, texts):
        own, length = [*dict.fromkeys(texts)], self.model.config.text_config.max_position_embeddings
        x = self.tokenizer(own, padding=True, truncation=True, max_length=length, return_tensors="pt")
        features = self.model.get_text_features(**x.to(self.model.device)).pooler_output
        return F.normalize(features, dim=-1)[[own.index(text) for text in texts]]  # a group shares its prompt


def clip_pixels(processor, images):
    """Pictures of any size and mode to (n, 3, H, W), by a processor that cuts out their centre. One longer
    than eight times its width loses its ends first, or a sliver, scaled up, would not fit in memory."""
    trimmed = []
    for image in images:
        cut = [max(side - 8 * min(image.size), 0) // 2 for side in image.size]
        trimmed.append(ImageOps.crop(image.convert("RGB"), (*cut, *cut)))
    return processor(trimmed, return_tensors="pt").pixel_values


class CLIPScore(Reward):
    """The cosine of picture and prompt in OpenCLIP's ViT-H-14 (Hessel et al. 2021, arXiv 2104.08718, but for
    their factor and cut at 0). Hacked by the prompt written into the picture. Weights: MIT."""
    name, range, prompts = "clipscore", (0.0, 0.4), "geneval"
    weights, file = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", ""

    def __init__(self, path, device):
        """path: a folder or repository with the weights, and ViT-H-14's tokenizer and processor."""
        with loading(self.name, path, "", self.weights, self.file) as (folder, _):
            model = self.load_clip(folder, device)
        self.clip = CLIP(self.name, path, "", CLIPScore.weights, device, model)

    def load_clip(self, folder, device):
        return load_model(transformers.CLIPModel, folder)

    def measure_batch(self, images, prompts):
        return (self.clip.images(images) * self.clip.texts(prompts)).sum(-1)


class PickScore(CLIPScore):
    """Human preference (Kirstain et al. 2023, arXiv 2305.01569): the cosine in a ViT-H-14 fine-tuned on
    Pick-a-Pic, times about 100, its temperature. Hacked by glossy, busy pictures. Weights: none stated."""
    name, range, weights = "pickscore", (16.0, 26.0), "yuvalkirstain/PickScore_v1"

    def measure_batch(self, images, prompts):
        return self.clip.model.logit_scale.exp() * super().measure_batch(images, prompts)


class HPSv2(CLIPScore):
    """Human preference score v2.1 (Wu et al. 2023, arXiv 2306.09341): the cosine in a ViT-H-14 fine-tuned on
    HPD v2. As in github.com/tgxs002/HPSv2, the longest side goes to 224, bicubic (antialiased), with black
    bars to a square. Hacked by one smooth style of illustration, high in contrast. Weights: Apache 2.0."""
    name, range = "hpsv2", (0.1, 0.4)
    weights, file = "xswu/HPSv2", "HPS_v2.1_compressed.pt"
    architecture = dict(projection_dim=1024, text_config=dict(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        hidden_act="gelu", eos_token_id=49407), vision_config=dict(
        hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16,
        image_size=224, patch_size=14, hidden_act="gelu"))
    names = (  # OpenCLIP's names to CLIPModel's, applied in order
        (r"^visual\.proj$", "visual_projection.weight"), (r"^text_projection$", "text_projection.weight"),
        (r"^visual\.", "vision_model."), (r"^(positional_|token_|ln_final|transformer)", r"text_model.\1"),
        (r"\.positional_embedding$", ".embeddings.position_embedding.weight"), (r"\.c_fc\.", ".fc1."),
        (r"\.(token|class)_embedding", r".embeddings.\1_embedding"), (r"\.ln_([12])\.", r".layer_norm\1."),
        (r"\.conv1\.", ".embeddings.patch_embedding."), (r"\.transformer\.resblocks\.", ".encoder.layers."),
        (r"\.ln_pre\.", ".pre_layrnorm."), (r"\.ln_post\.", ".post_layernorm."), (r"\.attn\.", ".self_attn."),
        (r"\.ln_final\.", ".final_layer_norm."), (r"\.c_proj\.", ".fc2."))

    def load_clip(self, folder, device):
        with device:
            model = transformers.CLIPModel(transformers.CLIPConfig(**self.architecture))
        tensors = load_file(folder, self.file, self.names)
        for key in [key for key in tensors if ".in_proj_" in key]:  # query, key and value in one matrix
            layer, kind = key.split(".in_proj_")
            for part, rows in zip("qkv", tensors.pop(key).chunk(3)):
                tensors[f"{layer}.{part}_proj.{kind}"] = rows
        for key in {"text_projection.weight", "visual_projection.weight"} & tensors.keys():
            tensors[key] = tensors[key].T
        return load_strictly(model, tensors)

    def measure_batch(self, images, prompts):
        side, squares = self.architecture["vision_config"]["image_size"], []
        for image in images:  # Pillow's ImageOps.pad fails on slivers
            width, height = (max(round(side * edge / max(image.size)), 1) for edge in image.size)
            left, top = (side - width) // 2, (side - height) // 2
            small = image.convert("RGB").resize((width, height), Image.BICUBIC)
            squares.append(small.crop((-left, -top, side - left, side - top)))  # black around it
        return super().measure_batch(squares, prompts)


class Aesthetic(Reward):
    """LAION's aesthetic predictor (github.com/christophschuhmann/improved-aesthetic-predictor): 1 to 10, from
    CLIP ViT-L/14's image vector. Hacked by painting anything: it sees no prompt. Weights: none stated."""
    name, range = "aesthetic", (1.0, 10.0)

    def __init__(self, path, device):
        """path: a folder with `clip`, a CLIPModel's folder, and `head`, which has aesthetic-model.pth."""
        self.clip = CLIP(self.name, path, "clip", "openai/clip-vit-large-patch14", device)
        self.mlp, file = linear_head(self.clip.model.config.projection_dim).to(device), "aesthetic-model.pth"
        with loading(self.name, path, "head", "trl-lib/ddpo-aesthetic-predictor", file) as (folder, part):
            load_strictly(self.mlp, load_file(folder, file, [(r"^layers\.", "")], part))

    def measure_batch(self, images, prompts):
        return self.mlp(self.clip.images(images)).squeeze(-1)


def linear_head(width):
    """The head of LAION's predictor and of ImageReward, with its names: (n, width) to (n, 1)."""
    sizes = [width, 1024, 128, 64, 16, 1]
    return nn.Sequential(OrderedDict(zip("02467", map(nn.Linear, sizes, sizes[1:]))))  # 1, 3, 5: dropouts


class ImageReward(Reward):
    """Human preference (Xu et al. 2023, arXiv 2304.05977): BLIP's text encoder reads the prompt's first 35
    tokens with an eye on the picture, and a head turns the first into a score, standardised by the authors'
    constants (github.com/THUDM/ImageReward). Hacked by oversaturated close-ups. Weights: Apache 2.0."""
    name, range, prompts = "imagereward", (-2.0, 2.0), "geneval"
    mean, std, length = 0.16717362830052426, 1.0333394966054072, 35
    vision = dict(hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
                  image_size=224, patch_size=16, layer_norm_eps=1e-6)
    text = dict(hidden_size=768, encoder_hidden_size=1024, num_attention_heads=12, vocab_size=30524)
    names = (  # its own names to those of `build`, which has no use for BLIP's contrastive heads
        (r"^blip\.(text|vision)_proj\..*|.*\.position_ids$", ""), (r"^mlp\.layers", "head"),
        (r"^blip\.text_encoder", "text"), (r"^blip\.visual_encoder", "vision"),
        (r"\.cls_token$", ".embeddings.class_embedding"), (r"\.pos_embed$", ".embeddings.position_embedding"),
        (r"\.patch_embed\.proj\.", ".embeddings.patch_embedding."), (r"\.blocks\.", ".encoder.layers."),
        (r"\.norm([12])\.", r".layer_norm\1."), (r"^vision\.norm\.", "vision.post_layernorm."),
        (r"\.attn\.qkv\.", ".self_attn.qkv."), (r"\.attn\.proj\.", ".self_attn.projection."))

    def __init__(self, path, device):
        """path: a folder with ImageReward.pt and the tokenizer of bert-base-uncased."""
        self.device, side, file = device, self.vision["image_size"], "ImageReward.pt"
        self.processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size=side)
        with loading(self.name, path, "", "google-bert/bert-base-uncased") as (folder, _):
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        with loading(self.name, path, "", "THUDM/ImageReward", file) as (folder, _), device:
            self.model = load_strictly(self.build(), load_file(folder, file, self.names))

    @classmethod
    def build(cls):
        """The three parts, with random weights."""
        vision, text = transformers.BlipVisionConfig(**cls.vision), transformers.BlipTextConfig(**cls.text)
        return nn.ModuleDict({"vision": transformers.BlipVisionModel(vision),
                              "text": transformers.BlipTextModel(text, add_pooling_layer=False),
                              "head": linear_head(text.hidden_size)})

    def measure_batch(self, images, prompts):
        tokens = self.tokenizer(list(prompts), padding="max_length", truncation=True, max_length=self.length,
                                return_tensors="pt").to(self.device)
        seen = self.model["vision"](clip_pixels(self.processor, images).to(self.device)).last_hidden_state
        read = self.model["text"](tokens.input_ids, tokens.attention_mask, encoder_hidden_states=seen)
        return (self.model["head"](read.last_hidden_state[:, 0]).squeeze(-1) - self.mean) / self.std


# Vision-language models

class Chat(Reward):
    """Base: a vision-language model answers a question about a picture, greedily. A subclass has `classes`,
    of model and processor; `weights`, a subfolder and a repository; `template`, whose {image} becomes an
    `image_token` for each vector of the picture; and `see`, from pictures to inputs and counts of vectors."""

    def __init__(self, path, device):
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model, processor = (getattr(transformers, name) for name in self.classes)
        with loading(self.name, path, *self.weights) as (path, subfolder):
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(path, subfolder=subfolder)
            self.processor = processor.from_pretrained(path, subfolder=subfolder)
            self.model = load_model(model, path, subfolder, dtype).to(device)

    def ask(self, images, questions):
        """A str for each picture and question. Questions are padded on the left, where it changes nothing."""
        inputs, counts = self.see([image.convert("RGB") for image in images])
        for token in self.tokenizer.get_added_vocab():  # in a prompt, <|im_end|> is text
            questions = [question.replace(token, f"{token[0]} {token[1:]}") for question in questions]
        texts = [self.template.format(image=self.image_token * count, question=question)
                 for count, question in zip(counts, questions)]
        tokens = self.tokenizer(texts, padding=True, padding_side="left", return_tensors="pt")
        if "image_grid_thw" in inputs:  # Qwen wants to be told which tokens are a picture
            tokens["mm_token_type_ids"] = (tokens.input_ids == self.model.config.image_token_id).int()
        inputs = {key: x.to(self.model.device) for key, x in {**tokens, **inputs}.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        answers = self.model.generate(**inputs, do_sample=False, max_new_tokens=self.new_tokens)
        answers = answers[:, inputs["input_ids"].shape[1]:]
        return [text.strip() for text in self.tokenizer.batch_decode(answers, skip_special_tokens=True)]


class VLM(Chat):
    """DDPO's prompt alignment (Black et al. 2023): LLaVA says what it sees, and BERTScore's recall how much
    of `The image contains {prompt}` is in that (github.com/kvablack/ddpo-pytorch, with an older LLaVA).
    Hacked by letters that name what was asked for. Weights: Llama 2 community (LLaVA), MIT (DeBERTa)."""
    name, range, prompts = "vlm", (0.0, 1.0), "activities"
    template, image_token, new_tokens = "USER: {image}\n{question} ASSISTANT:", "<image>", 64
    question = "Answer concisely: what is going on in this image?"
    classes = "LlavaForConditionalGeneration", "CLIPImageProcessorPil"
    weights = "llava", "llava-hf/llava-1.5-7b-hf"
    layer = 40  # of DeBERTa's 48: the one that agrees best with people, by BERTScore's table

    def __init__(self, path, device):
        """path: a folder with `llava`, and `deberta`, each with its tokenizer."""
        super().__init__(path, device)
        with loading(self.name, path, "deberta", "microsoft/deberta-xlarge-mnli") as place:
            self.words = transformers.AutoTokenizer.from_pretrained(place[0], subfolder=place[1])
            self.bert = load_model(transformers.DebertaModel, *place, num_hidden_layers=self.layer).to(device)

    def see(self, images):
        x = clip_pixels(self.processor, images)
        patches = x.shape[2] * x.shape[3] // self.model.config.vision_config.patch_size ** 2
        return {"pixel_values": x}, [patches] * len(images)  # LLaVA drops the class token

    def measure_batch(self, images, prompts):
        said = self.token_vectors(self.ask(images, [self.question] * len(images)))
        asked = self.token_vectors([f"The image contains {prompt}" for prompt in prompts])
        return torch.tensor([bertscore_recall(*pair) for pair in zip(said, asked)])

    def token_vectors(self, texts):
        """The last layer's vectors of the tokens of each text, special ones left out: a list of (n, d)."""
        tokens = self.words(texts, padding=True, truncation=True, max_length=512, return_tensors="pt",
                            return_special_tokens_mask=True).to(self.bert.device)
        own = tokens.pop("special_tokens_mask") == 0
        return [x[mask] for x, mask in zip(self.bert(**tokens).last_hidden_state, own)]


def bertscore_recall(candidate, reference):
    """BERTScore's recall, no idf or baseline (arXiv 1904.09675): candidate (n, d), reference (m, d)."""
    if not len(candidate) or not len(reference):
        return 0.0
    cosines = F.normalize(reference, dim=-1) @ F.normalize(candidate, dim=-1).T
    return cosines.amax(1).mean().item()


class UnifiedReward(Chat):
    """A vision-language model's mark for alignment and quality, 1 to 5 (Wang et al. 2025, arXiv 2503.05236),
    with the question of github.com/yifan123/flow_grpo. A reply without a mark is asked for once more; then it
    fails. Marks are coarse and kind. Hacked by text in it that speaks to the judge. Weights: MIT."""
    name, range, prompts = "unifiedreward", (1.0, 5.0), "geneval"
    template = ("<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"  # Qwen's
                "<|vision_start|>{image}<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n")
    image_token, new_tokens, side = "<|image_pad|>", 512, 512
    classes = "Qwen2_5_VLForConditionalGeneration", "Qwen2VLImageProcessorPil"
    weights = "", "CodeGoat24/UnifiedReward-qwen-7b"
    question = """\
You are given a text caption and a generated image based on that caption. Your task is to evaluate this \
image based on two key criteria:
1. Alignment with the Caption: Assess how well this image aligns with the provided caption. Consider the \
accuracy of depicted objects, their relationships, and attributes as described in the caption.
2. Overall Image Quality: Examine the visual quality of this image, including clarity, detail preservation, \
color accuracy, and overall aesthetic appeal.
Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.
Your task is provided as follows:
Text Caption: [{prompt}]"""
    again = "\nAnswer with one line and nothing else: Final Score: and a number from 1 to 5."

    def see(self, images):
        images = [image.resize((self.side, self.side), Image.BICUBIC) for image in images]
        inputs = self.processor(images, return_tensors="pt")
        return inputs, (inputs["image_grid_thw"].prod(1) // self.processor.merge_size ** 2).tolist()

    def measure_batch(self, images, prompts):
        questions = [self.question.format(prompt=prompt) for prompt in prompts]
        marks = [final_score(reply) for reply in self.ask(images, questions)]
        for i, mark in enumerate(marks):
            if mark is None:
                reply, = self.ask([images[i]], [questions[i] + self.again])
                marks[i] = final_score(reply)
                if marks[i] is None:
                    raise ValueError(f"no mark of 1 to 5 after 'Final Score:' in its second reply, {reply!r}")
        return marks


def final_score(reply):
    """The number after the last `Final Score:`, or None where there is none or it is not in 1 to 5."""
    marks = re.findall(r"Final Score:[\s*_`'\"(\[]*(-?\d+(?:\.\d+)?)", reply)
    return float(marks[-1]) if marks and 1 <= float(marks[-1]) <= 5 else None


# GenEval

CLASSES = re.split(r",\s+", """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat,
traffic light, fire hydrant, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant,
bear, zebra, giraffe, backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite,
baseball bat, baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife,
spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch,
potted plant, bed, dining table, toilet, tv, laptop, computer mouse, tv remote, computer keyboard, cell phone,
microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier,
toothbrush""")
COLORS = "red orange yellow green blue purple pink brown black white".split()
RELATIONS = "left of", "right of", "above", "below"
TASKS = "single_object", "two_object", "counting", "colors", "position", "color_attr"


@dataclass
class Found:  # an object that was detected
    score: float               # 0..1
    box: tuple                 # (x0, y0, x1, y1) in pixels
    mask: torch.Tensor = None  # (H, W)
    color: str = None          # where the prompt asks for one


class GenEval(Reward):
    """Are the objects, counts, colors and positions as asked? (Ghosh et al. 2023, arXiv 2310.11513.) As in
    github.com/djghosh13/geneval, Mask2Former finds objects of COCO's 80 classes, and CLIP ViT-L/14 names
    their colors; but the checkpoint is not mmdet's, and sides go to multiples of 32. The reward is
    `partial_credit`; `details` has the benchmark's table, each task's share of pictures `as_asked`, and
    their mean. Hacked by objects apart, as if pasted. Weights: "other" (Mask2Former), none stated (CLIP)."""
    name, prompts = "geneval", "geneval"
    threshold, counting_threshold = 0.3, 0.9  # of a score, the second where objects are counted
    shortest, longest = 800, 1333             # sides that the detector sees, at most

    def __init__(self, path, device):
        """path: a folder with `detector`, a Mask2Former for COCO's instances, and `clip`, a CLIPModel."""
        self.device, self.color_vectors = device, {}
        with loading(self.name, path, "detector", "facebook/mask2former-swin-small-coco-instance") as place:
            self.detector = load_model(detector_class(), *place).to(device)
            if self.detector.config.num_labels != len(CLASSES):
                raise OSError(f"it detects {self.detector.config.num_labels} classes, not COCO's 80")
        self.clip = CLIP(self.name, path, "clip", "openai/clip-vit-large-patch14", device)

    def objection(self, prompt, metadata):
        if wrong := malformed(metadata):
            return f"needs GenEval's metadata with the prompt {prompt!r}, and {wrong} (try --prompts geneval)"

    def measure(self, images, prompts, metadata):
        tags = [entry["tag"] for entry in metadata]
        everything = self.detect(images, tags)
        for image, objects, entry in zip(images, everything, metadata):
            for want in entry["include"]:
                if "color" in want and want["class"] in objects:
                    self.name_colors(image, want["class"], objects[want["class"]])
        right = [entry["tag"] for objects, entry in zip(everything, metadata) if as_asked(objects, entry)]
        means = {task: right.count(task) / tags.count(task) for task in TASKS if task in tags}
        self.details = {**means, "overall": sum(means.values()) / len(means)}
        return [partial_credit(objects, entry) for objects, entry in zip(everything, metadata)]

    def detect(self, images, tags):
        """A dict {class: [Found, best first]} for each picture, with a higher threshold for counting."""
        stats = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
        ratios = [min(self.shortest / min(image.size), self.longest / max(image.size)) for image in images]
        sizes = [multiples_of_32(x.height * ratio, x.width * ratio) for x, ratio in zip(images, ratios)]
        found = [None] * len(images)
        for rows in batches(sizes, self.batch * self.shortest ** 2):
            x = torch.stack([standardized(to_pixels(images[i], self.device), sizes[i], stats) for i in rows])
            output = self.detector(pixel_values=x)
            for i, *logits in zip(rows, output.class_queries_logits, output.masks_queries_logits):
                threshold = self.counting_threshold if tags[i] == "counting" else self.threshold
                found[i] = instances(*logits, (images[i].height, images[i].width), threshold)
        return found

    def name_colors(self, image, name, objects):
        """Set the colors of objects of the class `name`, cut out on grey: of the ten the nearest, by CLIP."""
        if name not in self.color_vectors:
            texts = [f"a photo of a {put}" for color in COLORS
                     for put in (f"{color} {name}", f"{color}-colored {name}", f"{color} object")]
            means = self.clip.texts(texts).view(len(COLORS), 3, -1).mean(1)
            self.color_vectors[name] = F.normalize(means, dim=-1)
        image, grey = image.convert("RGB"), Image.new("RGB", image.size, "#999")
        crops = [Image.composite(image, grey, Image.fromarray(x.mask.numpy())).crop(x.box) for x in objects]
        for found, vector in zip(objects, self.clip.images(crops)):
            found.color = COLORS[int((self.color_vectors[name] @ vector).argmax())]


def detector_class():
    """Mask2FormerForUniversalSegmentation without its training loss, whose constructor asks for scipy."""
    class Detector(transformers.Mask2FormerForUniversalSegmentation):
        def __init__(self, config):
            transformers.Mask2FormerPreTrainedModel.__init__(self, config)
            self.model = transformers.Mask2FormerModel(config)
            self.class_predictor = nn.Linear(config.hidden_dim, config.num_labels + 1)
            self.post_init()
    return Detector


def instances(class_logits, mask_logits, size, threshold):
    """{class: [Found, best first]} from Mask2Former's class_logits (Q, 81), the last for no object, and
    mask_logits (Q, h, w), at `size` (height, width). A query may have several classes (arXiv 2112.01527)."""
    queries, classes = class_logits.shape[0], class_logits.shape[1] - 1
    scores, index = class_logits.float().softmax(-1)[:, :-1].flatten().topk(queries)
    index, scores = index[scores > threshold], scores[scores > threshold]  # a mask can only lower them
    if not len(index):
        return {}
    masks = F.interpolate(mask_logits[None, index // classes].float(), size, mode="bilinear")[0].flatten(1)
    inside = masks > 0
    scores = scores * (masks.sigmoid() * inside).sum(1) / inside.sum(1).clamp(min=1)
    objects = {}
    for i in scores.argsort(descending=True).tolist():
        mask = inside[i].view(size).cpu()
        box = Image.fromarray(mask.numpy()).getbbox()  # None of an empty mask
        if box and scores[i] > threshold:
            objects.setdefault(CLASSES[index[i] % classes], []).append(Found(scores[i].item(), box, mask))
    return {name: own[:16] for name, own in objects.items()}  # as in the benchmark


def relations(a, b):
    """Which of RELATIONS the box a is in to the box b: none, one or two, by their centres. Along each axis a
    tenth of the two sides does not count; what is left has to be more than half of the whole distance."""
    sides = [a[i + 2] - a[i] + b[i + 2] - b[i] for i in (0, 1)]
    offset = [(a[i] + a[i + 2] - b[i] - b[i + 2]) / 2 for i in (0, 1)]
    distance = math.hypot(*offset) or 1
    dx, dy = (math.copysign(max(abs(o) - side / 10, 0), o) / distance for o, side in zip(offset, sides))
    return {name for name, holds in zip(RELATIONS, (dx < -0.5, dx > 0.5, dy < -0.5, dy > 0.5)) if holds}


def as_asked(objects, entry):
    """The benchmark's verdict on objects {class: [Found, best first]}: it sees the best `count` of each."""
    groups = []
    for want in entry["include"]:
        found = objects.get(want["class"], [])[:want["count"]]
        colored = all(x.color == want.get("color", x.color) for x in found)
        if len(found) < want["count"] or not colored or not placed(found, want, groups):
            return False
        groups.append(found)
    return all(len(objects.get(want["class"], [])) < want["count"] for want in entry.get("exclude", []))


def placed(found, want, groups):
    """Whether each object has the position of `want`, if any, relative to an earlier group, right itself."""
    if "position" not in want:
        return True
    relation, target = want["position"]
    return groups[target] is not None and all(relation in relations(a.box, b.box)
                                              for a in found for b in groups[target])


def partial_credit(objects, entry):
    """The score for training, at most 1: the mean over what is asked (Flow-GRPO, Liu et al. 2025). A count n
    gets 1 - |n - found| / n, below 0 for more than twice as many; a color the same with the objects of that
    color; a position 1 or 0, judged where the color is right. Where the count is wrong, color and position
    share one 0. (In github.com/yifan123/reward-server a 1 follows a wrong position's 0.)"""
    credit, groups = [], []
    for want in entry["include"]:
        found, n = objects.get(want["class"], []), want["count"]
        marks = [1 - abs(n - len(found)) / n]
        if marks == [1] and "color" in want:
            marks.append(sum(x.color == want["color"] for x in found) / n)
        if marks[-1] == 1 and "position" in want:
            marks.append(float(placed(found, want, groups)))
        if len(found) != n and ("color" in want or "position" in want):
            marks.append(0.0)
        groups.append(found if marks[-1] == 1 else None)
        credit += marks
    return sum(credit) / len(credit)


def malformed(entry):
    """What is wrong with a prompt's GenEval metadata, in a few words; None where all is well."""
    if entry.get("tag") not in TASKS:
        return f"its tag is {entry.get('tag')!r}, not one of {', '.join(TASKS)}"
    include, exclude = entry.get("include"), entry.get("exclude", [])
    if not (isinstance(include, list) and include and isinstance(exclude, list)):
        return "its include is no list of objects"
    for i, want in enumerate(include + exclude):
        if not isinstance(want, dict) or want.get("class") not in CLASSES:
            return f"{want!r} names no class of COCO's 80"
        if not isinstance(want.get("count"), int) or want["count"] < 1:
            return f"{want!r} has no count"
        if want.get("color", "red") not in COLORS:
            return f"{want['color']!r} is none of its colors, {', '.join(COLORS)}"
        places = [[relation, before] for relation in RELATIONS for before in range(i)]
        if "position" in want and want["position"] not in places:
            return f"{want['position']!r} is no position relative to an object before it"


REWARDS = {kind.name: kind for kind in (OCR, Color, Compressibility, Incompressibility, CLIPScore, PickScore,
                                        HPSv2, Aesthetic, ImageReward, VLM, UnifiedReward, GenEval)}


# Prompts

def held_out(text):
    """True for the eighth of all texts kept for evaluation. A checksum decides: the split needs no list."""
    return zlib.crc32(text.encode()) % 8 == 0


def prompts(source, split, seed):
    """Pairs (prompt, metadata) of a generator in `PROMPTS` or a .txt or .jsonl file: endless; for "eval" at
    most 512. No evaluation text (`ocr`), word (`signs`), animal (`animals`) or other prompt is trained on."""
    rng = random.Random(seed if split == "train" else 0)
    if source in PROMPTS:  # a generator yields prompts, or pairs itself
        items = (item if isinstance(item, tuple) else (item, {}) for item in PROMPTS[source](split, rng))
        pairs = ((prompt, {**more, "where": f"prompt generator {source}"}) for prompt, more in items)
    else:
        own = [pair for pair in read_prompt_file(source) if held_out(pair[0]) == (split == "eval")]
        if not own:
            raise ValueError(f"{source} has no prompt for the split {split!r}: about one prompt in eight is "
                             "kept for evaluation, by a checksum of its text, so give it a few dozen")
        pairs = chain.from_iterable(rng.sample(own, len(own)) for _ in count())
    if split == "train":
        return pairs
    # Sources with few evaluation prompts repeat themselves: stop looking after a while.
    return list(islice(dict(islice(pairs, 2048)).items(), 512))


def read_prompt_file(path):
    """All pairs (prompt, metadata) of a file. ValueError names the file, and the line where there is one."""
    path, pairs = Path(path), []
    if path.suffix not in (".txt", ".jsonl"):
        raise ValueError(f"prompts {str(path)!r}: neither {', '.join(PROMPTS)} nor a .txt or .jsonl file")
    try:
        lines = path.read_text(encoding="utf-8-sig").rstrip().split("\n")
    except (OSError, UnicodeDecodeError) as cause:
        raise ValueError(f"cannot read the prompts in {path}: {getattr(cause, 'strerror', cause)}") from cause
    for number, line in enumerate(lines, 1):
        where = f"{path}, line {number}"
        try:
            entry = json.loads(line) if path.suffix == ".jsonl" else {"prompt": line}
            prompt = entry.pop("prompt").strip()
        except json.JSONDecodeError as cause:
            raise ValueError(f"{where}: not JSON ({cause.msg}, column {cause.colno})") from cause
        except (AttributeError, KeyError, TypeError) as cause:
            raise ValueError(f'{where}: needs an object with a "prompt", as {{"prompt": "a cat"}}') from cause
        if not prompt:
            raise ValueError(f"{where}: the prompt is blank")
        pairs.append((prompt, {**entry, "where": where}))
    return pairs


CONSONANTS, VOWELS = "bcdfghjklmnprstvwxyz", "aeiou"
PATTERNS = ("CVC", "CVVC", "CVCV", "CCVC", "VCVC", "CVCC")
SIGN_COLORS = {"red": (200, 40, 40), "green": (30, 140, 60), "blue": (40, 70, 200), "black": (30, 30, 34),
               "brown": (130, 84, 44), "teal": (20, 130, 140)}  # as tiny-sd3 was shown them


def sign_prompts(split, rng):
    """What tiny-sd3 draws: words of three or four letters, mostly pronounceable, `"moon" on a blue sign`."""
    while True:
        word = "".join(rng.choice(CONSONANTS if kind == "C" else VOWELS) for kind in rng.choice(PATTERNS))
        color = rng.choice([*SIGN_COLORS])
        if held_out(word) == (split == "eval"):
            yield f'"{word}" on a {color} sign'


SCENES = re.split(r";\s+", """wooden sign outside a bakery that reads; neon sign in a rainy street that says;
ceramic mug on a writing desk with the words; vintage travel poster of a mountain lake with the title;
white T-shirt on a hanger with the printed words; chalkboard in front of a cafe on which is written;
birthday cake on a kitchen table with the icing text; graffiti mural on a brick wall that spells;
road sign beside a desert highway that reads; paperback novel on a park bench with the title;
glass jar on a shelf with a label that reads; hot air balloon over a valley with a banner that says""")
STYLES = "", "", "", ", a photograph", ", an oil painting", ", close-up", ", soft morning light"
TEXTS = "{noun}", "{adjective} {noun}", "{noun} and {other}", "{verb} the {noun}", "the {adjective} {noun}"
NOUNS = """bread garden river coffee market music forest kitchen harbor morning honey island library lemon
mountain thunder kingdom story pepper window dragon bicycle castle planet orange travel picture village butter
winter sunset pocket rocket cotton engine ocean tiger violin museum bridge""".split()
WORDS = {"noun": NOUNS, "other": NOUNS,
         "verb": "follow explore remember protect discover welcome trust believe".split(),
         "adjective": "fresh warm quiet golden happy little hidden silver wild gentle brave early".split()}


def text_prompts(split, rng):
    """Things that say one to three English words: `A neon sign in a rainy street that says "Dream Big"`."""
    while True:
        text = rng.choice(TEXTS).format(**{kind: rng.choice(words) for kind, words in WORDS.items()})
        scene, style, case = map(rng.choice, (SCENES, STYLES, (str.upper, str.title, str.capitalize)))
        if held_out(text) == (split == "eval"):  # decided in lower case, so that it holds for every spelling
            yield f'A {scene} "{case(text)}"{style}'


ANIMALS = """cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox
wolf lizard beetle ant butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck
goose bee pig turkey fly llama camel bat gorilla hedgehog kangaroo""".split()
ACTIVITIES = "washing the dishes", "playing chess", "riding a bike"
NUMBERS = "zero one two three four".split()
PLURALS = {"person": "people", "knife": "knives", "sheep": "sheep", "computer mouse": "computer mice"}
PORTIONS = {"skis": "pair", "scissors": "pair", "broccoli": "head"}  # counted by these


def geneval_prompts(split, rng):
    """GenEval's six tasks in turn over COCO's 80 classes, with metadata as in its evaluation_metadata.jsonl.
    Prompts that differ only in the order of their objects share a split (Flow-GRPO, Liu et al. 2025)."""
    for task in cycle(TASKS):
        parts = None
        while parts is None or held_out(" and ".join(sorted(parts))) != (split == "eval"):
            a, b = rng.sample(CLASSES[1:] if "color" in task else CLASSES, 2)  # no person is green
            n, (color, other), relation = rng.randint(2, 4), rng.sample(COLORS, 2), rng.choice(RELATIONS)
            first, second = {"class": a, "count": 1}, {"class": b, "count": 1}
            red, blue = {**first, "color": color}, {**second, "color": other}
            include = {
                "single_object": [first], "two_object": [first, second], "counting": [{**first, "count": n}],
                "colors": [red], "color_attr": [red, blue],
                "position": [second, {**first, "position": [relation, 0]}]}[task]
            parts = [phrase(want["class"], want["count"], want.get("color")) for want in include]
            if task == "position":
                parts = [f"{parts[1]} {relation} {parts[0]}"]
        exclude = {"exclude": [{"class": a, "count": n + 1}]} if task == "counting" else {}
        yield f"a photo of {' and '.join(parts)}", {"tag": task, "include": include, **exclude}


def phrase(name, count=1, color=None):
    """A class in words: `an apple`, `three people`, `a pair of red skis`."""
    plural = PLURALS.get(name) or name + ("es" if name.endswith(("s", "x", "ch", "sh")) else "s")
    colored = f"{color} {name}" if color else name
    if name in PORTIONS:
        colored, plural = f"{PORTIONS[name]} of {colored}", f"{PORTIONS[name]}s of {colored}"
    if count > 1:
        return f"{NUMBERS[count]} {plural}"
    return f"{'an' if colored[0] in 'aeiou' else 'a'} {colored}"


def chosen(texts, split, rng, words=str):
    """Prompts for the texts of a fixed list, as `words` puts them. The text decides the split."""
    own = [text for text in texts if held_out(text) == (split == "eval")]
    while True:
        yield words(rng.choice(own))


# DDPO's (Black et al. 2023): 45 animals, of which four are held out, and those with an activity.
DOING = [f"{phrase(animal)} {activity}" for animal in ANIMALS for activity in ACTIVITIES]
PROMPTS = {"ocr": text_prompts, "signs": sign_prompts, "animals": partial(chosen, ANIMALS, words=phrase),
           "activities": partial(chosen, DOING), "geneval": geneval_prompts}


# What a run asks for, and what it shows

def check_counts(args):
    """ValueError for a whole number of the settings below 1, or below 0 for --epochs and --seed."""
    for key, value in vars(args).items():
        least = 0 if key in ("epochs", "seed") else 1
        if type(value) is int and value < least:
            raise ValueError(f"--{key.replace('_', '-')} {value}: give at least {least}")


def open_run(args):
    """Where a run of `args` writes and computes, (folder, device); --dtype auto is decided. ValueError."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    folder = Path(args.resume or f"runs/{args.name}")
    if (folder / "metrics.jsonl").exists() and not args.resume:
        raise ValueError(f"{folder} holds a run: choose another --name, or go on with --resume {folder}")
    if device.type == "cpu" and not (args.device or Path(args.model).exists()):
        raise ValueError(f"{args.model} needs a CUDA device, and there is none here. Try --preset tiny, the "
                         "bundled model for CPUs, or insist with --device cpu")
    join_processes(device)
    why = ""
    if args.dtype == "auto":
        choice = [choose_dtype(device)]
        if dist.is_initialized():
            dist.broadcast_object_list(choice)  # busy processes could measure differently
        args.dtype, = choice
        why = " (auto: bf16 is missing there, or slow)" * (args.dtype == "fp32")
    torch.set_float32_matmul_precision("high")  # TF32 for what a GPU computes in float32, such as the VAE
    tqdm.write(f"{folder}: {args.model} on {device} in {args.dtype}{why}")
    return folder, device


def join_processes(device):
    """Under torchrun, meet the other processes. The first logs and saves, the others only speak of errors."""
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))  # others wait for evaluations
        if dist.get_rank():
            tqdm.__init__, sys.stdout = partialmethod(tqdm.__init__, disable=True), open(os.devnull, "w")


def processes():
    """(the number of this process, how many there are): (0, 1) without torchrun."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather_scores(scores, rows):
    """From `score`'s result for `rows`, this process's of an epoch's images, to that for all of them."""
    if not dist.is_initialized():
        return scores
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (rows, *scores))
    order = torch.cat([rows for rows, _, _ in everyone]).argsort()
    parts = {name: torch.cat([parts[name] for _, _, parts in everyone])[order] for name in scores[1]}
    return torch.cat([R for _, R, _ in everyone])[order], parts


def average_over_processes(tensors):
    """Replace each tensor, a gradient or a total, by its mean over all processes, in one go."""
    if dist.is_initialized():
        dist.all_reduce(flat := torch.cat([x.flatten() for x in tensors]))
        for x, total in zip(tensors, flat.split([x.numel() for x in tensors])):
            x.copy_(total.view_as(x) / dist.get_world_size())


def load_task(args, device):
    """(reward, judge, training pairs, held-out prompts, their metadata). The judge has the --eval-rewards not
    trained on, or is None. ValueError or OSError, of one line, for what cannot be loaded or scored."""
    source = args.prompts or default_prompts(args.reward)
    stream = prompts(source, "train", args.seed)
    texts, metadata = zip(*(read_prompt_file(args.eval_prompts) if args.eval_prompts else
                            islice(cycle(prompts(source, "eval", 0)), args.eval_images)))
    reward, trained = load(args.reward, device, args.reward_batch), parse_spec(args.reward)
    unseen = [head for head in parse_spec(args.eval_rewards or args.reward) if head not in trained]
    judge = load(",".join(unseen), device, args.reward_batch) if unseen else None
    if args.epochs:  # a generator is checked on its held-out prompts
        reward.check(*zip(*(prompts(source, "eval", 0) if source in PROMPTS else read_prompt_file(source))))
    for scorer in filter(None, (reward, judge)):
        scorer.check(texts, metadata)
    return reward, judge, stream, texts, metadata


def choose_dtype(device):
    """--dtype auto: "bf16" where a GPU has it, or a CPU is at least 1.5 times as fast in it; else "fp32"."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
    if device.type != "cpu":
        return "fp32"
    times = {torch.float32: [], torch.bfloat16: []}
    for dtype in [*times] * 8:  # in turn: other programs disturb both alike
        a, start = torch.ones(512, 512, dtype=dtype), time.perf_counter()
        a @ a
        times[dtype].append(time.perf_counter() - start)
    slow, fast = map(min, times.values())
    return "bf16" if slow > 1.5 * fast else "fp32"


def hush():
    """Keep the loading bars and the warnings of diffusers and transformers off the console."""
    import diffusers
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def last_words(error, args):
    """What a run that stops says, in one line: what was wrong and, where an epoch is saved, how to go on."""
    words, folder = str(error) or "stopped", Path(args.resume or f"runs/{args.name}") if args else Path()
    if isinstance(error, torch.OutOfMemoryError):
        frames = [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        flags = {"load_task": "reward", "load_pipeline": "model", "load_family": "model",
                 "score": "reward_batch", "encode": "max_sequence_length", "decode": "decode_batch",
                 "generate": "sample_batch", "train": "micro_batch"}
        phase, flag = next((phase, flag.replace("_", "-")) for phase, flag in flags.items()
                           if phase in frames and hasattr(args, flag))
        words = f"out of memory in {phase} ({words.split('. GPU')[0]}): try a smaller --{flag}"
    stopped = not isinstance(error, (ValueError, OSError))  # those come before the first epoch
    return words + f"; go on with --resume {folder}" * (stopped and (folder / "last").exists())


def evaluate(folder, args, progress, reward, judge, images, prompts, metadata):
    """Score held-out images, log and show them; returns the trained reward's mean. In the curve each unseen
    reward's range is stretched to the trained one's. --resume DIR --epochs 0 logs as `test`."""
    R, parts = reward.score(images, prompts, metadata)
    unseen = judge.score(images, prompts, metadata)[1] if judge else {}
    labels = {name: name + " (unseen)" * (name in parts) for name in unseen}
    parts |= {labels[name]: scores for name, scores in unseen.items()}
    tables = {f"{name} details": rows for name, rows in reward.tables().items()}
    tables |= {f"{labels[name]} details": rows for name, rows in (judge.tables() if judge else {}).items()}
    epoch, look = progress["epoch"], args.resume and not args.epochs
    log(folder, args, progress, "test" if look else "eval", epoch, R, parts, tables)
    others = "".join(f"  {name} {scores.mean():.4f}" for name, scores in parts.items() if name != reward.name)
    tqdm.write(f"epoch {epoch:3d}  held-out {reward.name} {R.mean():.4f}{others}")
    for name, rows in tables.items():
        tqdm.write(f"           {name}: " + "  ".join(f"{row} {value:.3f}" for row, value in rows.items()))
    sheet = folder / "samples" / ("test.png" if look else f"epoch-{epoch:04d}.png")
    contact_sheet(sheet, images[:16], [f"{r:.2f}  {prompt}" for r, prompt in zip(R[:16].tolist(), prompts)])
    if not look:
        curves = {split: [reward_curve(folder, split)] for split in ("train", "eval")}
        for _, part in getattr(judge, "parts", [(1, judge)] if judge else []):
            name = labels[part.name]
            points = reward_curve(folder, "eval", name)
            lo, hi = (f([*part.range, *(y for _, y in points)]) for f in (min, max))
            low, high = reward.range
            curves[name] = [[(x, low + (high - low) * (y - lo) / (hi - lo)) for x, y in points]]
        plot(folder / "curve.png", {name: runs for name, runs in curves.items() if runs[0]}, reward.name)
    return R.mean().item()


def log_epoch(folder, args, progress, R, parts, values, seconds, device):
    """Log a training epoch and print it. values {name: float}. seconds: of sampling, scoring, training."""
    epoch, rate, memory = progress["epoch"] - 1, len(R) / sum(seconds), math.nan
    if device.type == "cuda":  # the most memory held so far, of the GPU or of this process
        memory = torch.cuda.max_memory_allocated(device) / 1e9
    elif sys.platform != "win32":
        from resource import RUSAGE_SELF, getrusage
        memory = getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    speed = {f"{phase}_seconds": t for phase, t in zip(("sample", "reward", "train"), seconds)}
    speed |= {"images_per_second": rate, "peak_gb": memory}
    log(folder, args, progress, "train", epoch, R, parts, values | speed)
    shown = "KL {approx_kl:.0e}  clipped {clip_fraction:.0%}" if "approx_kl" in values else "loss {loss:.3f}"
    shown = (shown + "  grad {grad_norm:.2g}").format(**values)
    tqdm.write(f"epoch {epoch:3d}  reward {R.mean():.4g}  {shown} | "
               "{:.1f} + {:.1f} + {:.1f} s".format(*seconds) + f", {rate:.3g} img/s, {memory:.1f} GB")


def log(folder, args, progress, split, epoch, R, parts, more):
    """Append a line to a run's metrics.jsonl, and send it to Weights & Biases with --wandb."""
    if processes()[0]:
        return
    line = {"split": split, "epoch": epoch, **{key: progress[key] for key in ("step", "images", "seconds")},
            "reward": R.mean().item(), "reward_std": R.std(correction=0).item(),
            **{name: scores.mean().item() for name, scores in parts.items()}, **more}
    with open(folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    if args.wandb:
        import wandb
        if wandb.run is None:
            wandb.init(project=args.wandb, name=folder.name, config=vars(args))
        wandb.log({f"{split}/{key}": value for key, value in line.items() if key != "split"})


def rewind_metrics(folder, epoch):
    """Take away the lines of metrics.jsonl that a run resumed at `epoch` writes again."""
    last = {"train": epoch - 1, "eval": epoch, "test": math.inf}
    lines = [json.dumps(m) + "\n" for m in read_metrics(folder) if m["epoch"] <= last[m["split"]]]
    write_aside(folder / "metrics.jsonl", "".join(lines))


def read_metrics(folder):
    """The lines of a run's metrics.jsonl, a list of dicts."""
    path = Path(folder, "metrics.jsonl")
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text[:text.rfind("\n") + 1].splitlines()]  # not a line cut by a kill


def reward_curve(folder, split="eval", y="reward", x="images"):
    """A run's points (images scored, mean reward), for `plot`, or of any other two numbers that it logs."""
    return [(m[x], m[y]) for m in read_metrics(folder) if m["split"] == split and y in m]


def write_aside(path, content):
    """Write a text, or call content(aside), beside `path`, then rename: a killed save leaves the old file."""
    if processes()[0]:
        return
    aside = Path(f"{path}.aside")
    aside.parent.mkdir(parents=True, exist_ok=True)
    aside.write_text(content) if isinstance(content, str) else content(aside)
    os.replace(aside, path)


def contact_sheet(path, images, captions, columns=4):
    """Images in a grid, each over its caption, small ones enlarged without smoothing."""
    scale = max(1, 256 // images[0].width)
    width, height = images[0].width * scale, images[0].height * scale
    captions = [textwrap.wrap(caption, width // 7)[:3] for caption in captions]
    cell = height + 18 * max(map(len, captions)) + 10
    sheet = Image.new("RGB", (columns * (width + 8), math.ceil(len(images) / columns) * cell), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for i, (image, lines) in enumerate(zip(images, captions)):
        x, y = i % columns * (width + 8), i // columns * cell
        sheet.paste(image.resize((width, height), Image.NEAREST), (x, y))
        pen.multiline_text((x + 4, y + height + 2), "\n".join(lines), "black", font)
    write_aside(path, lambda aside: sheet.save(aside, "PNG"))


def plot(path, curves, ylabel="reward", xlabel="images scored"):
    """A line chart of curves {label: runs}, each a list of (x, y). Runs are thin, their mean is thick."""
    xs, ys = zip(*(point for runs in curves.values() for run in runs for point in run))
    right, low, high = max(xs) or 1, min(ys), max(ys)
    steps = (digit * 10.0 ** power for power in count(-6) for digit in (1, 2, 5))
    step = next(step for step in steps if high - low <= 8 * step)
    bottom, top = math.floor(low / step), math.floor(high / step) + 1  # the axis, in steps
    image = Image.new("RGB", (1800, 1120), "white")  # shrunk at the end: smooth lines
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size=30)

    def at(x, y):
        return 140 + 1600 * x / right, 40 + 960 * (top - y / step) / (top - bottom)

    for y in (i * step for i in range(bottom, top + 1)):
        pen.line([at(0, y), at(right, y)], "#e2e8f0", 2)
        pen.text((124, at(0, y)[1]), f"{y:.4g}", "black", font, "rm")
    for x in (right * i / 4 for i in range(5)):
        pen.text((at(x, 0)[0], 1016), f"{x:,.0f}", "black", font, "mt")
    pen.text((940, 1064), f"{ylabel}, against {xlabel}", "black", font, "mt")
    colors = dict(zip(curves, cycle(("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#475569", "#dc2626"))))
    for label, runs in curves.items():
        own = [dict(run) for run in runs]  # their mean is where all have a point
        mean = [(x, sum(run[x] for run in own) / len(own)) for x in own[0] if all(x in run for run in own)]
        for run, thickness in [*((run, 2) for run in runs), (mean, 6)]:
            pen.line([at(*point) for point in run], colors[label], thickness, "curve")
    for i, (label, color) in enumerate(reversed(colors.items())):  # in the lower right corner: rewards rise
        pen.text((1720, 980 - 44 * i), label, color, font, "rs", stroke_width=6, stroke_fill="white")
    write_aside(path, lambda aside: image.resize((900, 560), Image.LANCZOS).save(aside, "PNG"))
