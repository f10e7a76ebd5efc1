"""
Data: from video files on disk to batches of clips. Annotations, decoding, sampling, augmentation, the toy set.

Clips travel as uint8 and become normalised floats on the device. Everything random about a sample depends
on (seed, epoch, sample) alone: not on workers, processes or restarts.

    python data.py check PRESET [section.key=value ...]     try every file of a preset's lists, name the unreadable
    python data.py shrink SRC DST                           re-encode a folder of videos so that it decodes fast
"""

import argparse
import contextlib
import csv
import json
import math
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import threading
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import partial, reduce
from pathlib import Path

import av
import torch
import torch.nn.functional as F
from av.video.reformatter import VideoReformatter
from torch.utils.data import Dataset
from torchvision.transforms.v2 import RandomErasing, RandomResizedCrop
from torchvision.transforms.v2 import functional as tv
from tqdm import tqdm

VIDEO_SUFFIXES = {".mp4", ".webm", ".avi", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg", ".ts", ".flv", ".wmv", ".3gp"}
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1, 1)


# --- Annotations, read as downloaded --------------------------------------------------------------

def videos_below(folder):
    """The videos in a folder and its subfolders, links followed, in alphabetical order."""
    videos = []
    for place, folders, names in os.walk(folder, followlinks=True):
        here = Path(place).resolve()                    # a link that leads back up would go round for ever
        folders[:] = [name for name in folders if not here.is_relative_to(Path(place, name).resolve())]
        videos += [Path(place, name) for name in names if Path(name).suffix.lower() in VIDEO_SUFFIXES]
    return sorted(videos)


def read_text(path):
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError(f"{path}: this is not a text file in UTF-8") from None


def existing(source, root, entries):
    """The (path, label) of the (path or None, name, label) whose file is there; the others are reported."""
    if not entries:
        raise ValueError(f"{source}: the annotation file is empty: it lists no videos")
    missing = [name for path, name, _ in entries if path is None]
    if len(missing) == len(entries):
        raise ValueError(f"{source}: none of its {len(entries)} videos is under {root} (first: {missing[0]}); "
                         "set data.root")
    if missing and os.environ.get("RANK", "0") == "0":  # torchrun's first process says it for all
        print(f"{source}: {len(missing)} of {len(entries)} videos are not under {root}, first {', '.join(missing[:5])}",
              file=sys.stderr)
    return [(str(path), label) for path, _, label in entries if path is not None]


def number(source, entries, classes):
    """[(video, class name), ...] -> ([(video, class number), ...], class names); alphabetical without `classes`."""
    classes = classes or sorted({label for _, label in entries})
    numbers = {name: i for i, name in enumerate(classes)}
    if unknown := {label for _, label in entries} - set(numbers):
        raise ValueError(f"{source}: the class '{min(unknown)}' is not among the {len(classes)} known ones")
    return [(video, numbers[label]) for video, label in entries], classes


def read_folder(source, classes):
    """One folder a class, numbered in alphabetical order; if a video is in none of them, all are without labels."""
    videos = videos_below(source)
    if not videos:
        raise ValueError(f"{source}: there are no videos in this folder, nor in folders of classes")
    if any(path.parent == source for path in videos):
        return [(str(path), None) for path in videos], None
    return number(source, [(str(path), path.relative_to(source).parts[0]) for path in videos], classes)


def read_kinetics(source, text, classes):
    """label,youtube_id,time_start,time_end,split -> ([(file stem, label), ...], class names)"""
    rows = csv.DictReader(text.splitlines())
    if absent := {"label", "youtube_id", "time_start", "time_end"} - set(rows.fieldnames):
        raise ValueError(f"{source}: the column {', '.join(sorted(absent))} is missing in {','.join(rows.fieldnames)}")
    entries = []
    for row in rows:
        try:
            start, end = (int(float(row[key])) for key in ("time_start", "time_end"))
        except (OverflowError, TypeError, ValueError):
            raise ValueError(f"{source}:{rows.line_num}: the times are not numbers: {dict(row)}") from None
        entries.append((f"{row['youtube_id']}_{start:06d}_{end:06d}", row["label"]))
    return number(source, entries, classes)


def read_ssv2(source, text, classes):
    """[{"id", "template", ...}, ...] with labels.json beside it -> ([(file stem, label), ...], class names)"""
    try:
        items = json.loads(text)
        entries = [(str(item["id"]), item["template"].replace("[", "").replace("]", "")) for item in items]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source}: expected a JSON list of objects with `id` and `template` ({error!r})") from None
    if classes is None:
        files = sorted(source.parent.glob("*labels.json"))
        if not files:
            raise ValueError(f"{source}: Something-Something's labels.json is not beside it")
        try:
            numbers = json.loads(read_text(files[0]))
            classes = sorted(numbers, key=lambda name: int(numbers[name]))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{files[0]}: expected a JSON object of class names and numbers ({error!r})") from None
    return number(source, entries, classes)


def find(name, folders):
    """The file `name` below one of the folders, or what `shrink` made of it, or None."""
    stem, suffix = os.path.splitext(name)
    variants = (name, stem + ".mp4") if suffix.lower() in VIDEO_SUFFIXES else (name,)
    return next(filter(Path.is_file, (folder / variant for folder in folders for variant in variants)), None)


def read_list(source, text, root, classes):
    """Lines `path label` or, for pretraining, `path`; paths may hold spaces. classes.txt beside it has the names."""
    entries = []
    for line_number, line in enumerate(map(str.strip, text.splitlines()), 1):
        if not line:
            continue
        labelled = re.fullmatch(r"(.+?)\s+(\d+)", line)
        name, label = labelled.groups() if labelled else (line, None)
        if entries and (label is None) != (entries[0][2] is None):
            raise ValueError(f"{source}:{line_number}: expected `path{' label' if label is None else ''}`, "
                             f"as in the lines before, found: {line[:200]}")
        path = find(name, (root, source.parent))
        if path is None and label is None and find(line.rsplit(maxsplit=1)[0], (root, source.parent)):
            raise ValueError(f"{source}:{line_number}: the label is not a number: {line[:200]}")
        entries.append((path, name, label and int(label)))
    class_file = source.with_name("classes.txt")
    if classes is None and class_file.is_file():
        classes = list(filter(None, map(str.strip, read_text(class_file).split("\n"))))
    return existing(source, root, entries), classes


def read_annotations(source, root="", classes=None):
    """Videos of a data set: ([(path, label or None), ...], class names or None).
    `source` is a folder of class folders or of videos, Kinetics' CSV, Something-Something's JSON (with labels.json
    beside it) or a list of lines `path` or `path label`, itself under `root` or not; its content tells which. Videos
    lie under `root`, which is the annotations' own folder if empty; those of a list in either. `classes`, the names of
    the training set, fixes the class numbers. Files that do not exist are counted on stderr. Raises ValueError naming
    the file, the line and what is wrong with it."""
    places = list(dict.fromkeys(Path(folder, source).expanduser() for folder in ("", root)))
    source = next(filter(Path.exists, places), None)
    if source is None:
        raise ValueError(f"{' and '.join(map(str, places))}: there is no such annotation file; "
                         "look at data.root, data.train and data.val")
    root = Path(root).expanduser() if root else source.parent
    if source.is_dir():
        return read_folder(source, classes)
    text = read_text(source)
    if not root.is_dir():
        raise ValueError(f"{root}: there is no such folder of videos (data.root)")
    first = text.lstrip().partition("\n")[0]
    if first.startswith("[") and first[1:].lstrip()[:1] in ("", "{", "]"):      # and not a video named [1].mp4
        entries, classes = read_ssv2(source, text, classes)
    elif "youtube_id" in next(csv.reader([first])):
        entries, classes = read_kinetics(source, text, classes)
    else:
        return read_list(source, text, root, classes)
    files = {path.stem: path for path in videos_below(root)}
    return existing(source, root, [(files.get(stem), stem, label) for stem, label in entries]), classes


# --- Decoding -------------------------------------------------------------------------------------

class UnreadableVideo(Exception):
    """A video that cannot be decoded; the message names the file and the reason."""


@contextlib.contextmanager
def open_video(path):
    """(container, video stream) of a file. What PyAV, the system or we object to inside becomes UnreadableVideo."""
    try:
        with av.open(os.path.abspath(path), metadata_errors="ignore") as container:     # `a:b.mp4` is no protocol
            stream = container.streams.best("video")
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
                raise ValueError("it holds no video stream")
            if stream.codec_context is None:
                raise ValueError("there is no decoder for its video stream")
            for other in container.streams:
                other.discard = av.stream.Discard.default if other is stream else av.stream.Discard.all
            stream.codec_context.thread_count = 1       # frame threads hang on broken files, and workers are enough
            yield container, stream
    except (av.error.FFmpegError, OSError, IndexError, ValueError) as error:
        raise UnreadableVideo(f"{path}: {getattr(error, 'strerror', None) or error}") from None


REFORMATTER = VideoReformatter()        # one a process: it keeps its scaler, a frame's own would not


def convert(frame, format="rgb24", **size):
    """The frame in another format (None: its own) and size; ValueError if it is damaged."""
    if frame.is_corrupt:
        raise ValueError("a frame is damaged")
    return REFORMATTER.reformat(frame, format=format, **size, threads=1)       # default: a thread pool for every frame


def assemble(clips, frames):
    """[T, H, W, 3] for every clip, turned upright; frames of another size take that of the first."""
    first = frames[min(frames)]
    views = {}                                          # without a copy
    for key, frame in frames.items():
        if (frame.width, frame.height) != (first.width, first.height):
            frame = convert(frame, width=first.width, height=first.height)
        plane = frame.planes[0]
        views[key] = torch.frombuffer(plane, dtype=torch.uint8).as_strided(
            (frame.height, frame.width, 3), (plane.line_size, 3, 1))
    turns = round(first.rotation / 90)                  # the display matrix of the file, counter-clockwise
    return [torch.rot90(torch.stack([views[key] for key in clip]), turns, (1, 2)) for clip in clips]


def read_packets(container, stream):
    """The stream's packets, up to a break. Reading them is cheap, and they are an index that no header falsifies."""
    packets = []
    with contextlib.suppress(av.error.FFmpegError):     # what was read before a file breaks off is good
        packets.extend(packet for packet in container.demux(stream) if packet.size and not packet.is_corrupt)
    if all(packet.is_discard for packet in packets):
        raise ValueError("it holds no video frames")
    return packets


def timestamps_are_an_index(container, stream, packets):
    """Whether the packets' timestamps tell the frames in order of display; in avi, raw streams and some mkv they lie,
    and vp8 has packets that show nothing."""
    formats, times = container.format.name.split(","), [packet.pts for packet in packets]
    trusted = "mov" in formats or "mpegts" in formats or stream.codec_context.name == "vp9"
    return trusted and None not in times and len(set(times)) == len(times)


def decode_indexed(codec, packets, wanted, from_start=False):
    """{pts: frame} for the wanted timestamps, from the key frame before each of them, or else from the start: where
    pictures are refreshed part by part, what is marked as a key frame is none."""
    place = {packet.pts: i for i, packet in enumerate(packets)}
    keys = [i for i, packet in enumerate(packets) if packet.is_keyframe and not from_start]
    needed = set()                                      # numbers of packets
    for pts in wanted:                                  # by the key's pts: open groups of pictures
        start = max((key for key in keys if key <= place[pts] and packets[key].pts <= pts), default=0)
        needed.update(range(start, place[pts] + 1))
    frames = {}
    for i in sorted(needed):
        if codec.name == "h264":                        # bit-exact: skips only what nothing refers to
            codec.skip_frame = "DEFAULT" if packets[i].pts in wanted else "NONREF"
        gap = i + 1 not in needed                       # before it, None drains the decoder
        for packet in (packets[i], None) if gap else (packets[i],):
            frames.update((frame.pts, convert(frame)) for frame in codec.decode(packet)
                          if frame.pts in wanted or frame.is_corrupt)       # damage spreads: convert refuses it
        if gap:
            codec.flush_buffers()
    if len(frames) == len(wanted):
        return frames
    if from_start:
        raise ValueError(f"{len(wanted) - len(frames)} of {len(wanted)} frames do not decode")
    return decode_indexed(codec, packets, wanted, from_start=True)


def decode_counted(codec, packets, choose):
    """Clips, and {number: frame} for their frames, by decoding from the start and counting what comes out."""
    count = len(packets)
    while count:
        clips = [[min(i, count - 1) for i in clip] for clip in choose(count)]
        wanted, frames, number, damaged = {i for clip in clips for i in clip}, {}, -1, False
        for number, frame in enumerate(frame for packet in [*packets, None] for frame in codec.decode(packet)):
            damaged = frame.is_corrupt or damaged and not frame.key_frame   # damage spreads to the next key frame
            if number in wanted:
                if damaged:
                    raise ValueError("it is damaged before a wanted frame")
                frames[number] = convert(frame)
                if len(frames) == len(wanted):
                    return clips, frames
        count = number + 1                              # fewer frames than packets: choose again among them
        codec.flush_buffers()
    raise ValueError("none of its frames decodes")


def read_clips(path, choose):
    """Decode clips of one video: choose(number of frames) -> [[frame number, ...], ...].
    Returns a uint8 tensor [T, H, W, 3] (RGB, upright) for every inner list; numbers beyond the last frame repeat it.
    UnreadableVideo names the file. Where timestamps can be trusted, only what the wanted frames need is decoded."""
    with open_video(path) as (container, stream):
        packets = read_packets(container, stream)
        if timestamps_are_an_index(container, stream, packets):
            shown = sorted(packet.pts for packet in packets if not packet.is_discard)       # edit lists discard
            clips = [[shown[min(i, len(shown) - 1)] for i in clip] for clip in choose(len(shown))]
            frames = decode_indexed(stream.codec_context, packets, {pts for clip in clips for pts in clip})
        else:
            clips, frames = decode_counted(stream.codec_context, packets, choose)
        return assemble(clips, frames)


# --- Sampling and augmentation --------------------------------------------------------------------

def dense_clips(count, frames, stride, clips=1):
    """`clips` windows of `frames` frames, `stride` apart, at random starts of a video of `count` frames."""
    last_start = max(count - ((frames - 1) * stride + 1), 0)
    starts = torch.randint(last_start + 1, (clips,)).tolist()
    return [[start + i * stride for i in range(frames)] for start in starts]


def pretraining_clip(clip, size, flip):
    """[T, 3, H, W] -> [T, 3, size, size]: VideoMAE's multi-scale crop, of two scales at most one step apart at one of
    13 positions, bilinear; and a flip where it is asked for."""
    scales = (1, 0.875, 0.75, 0.66)
    pairs = [(a, b) for i, a in enumerate(scales) for j, b in enumerate(scales) if abs(i - j) <= 1]
    quarters = [(x, y) for x in (0, 2, 4) for y in (0, 2, 4)] + [(1, 1), (3, 1), (1, 3), (3, 3)]     # of the margin
    H, W = clip.shape[-2:]
    height, width = (max(1, int(min(H, W) * scale)) for scale in pairs[torch.randint(len(pairs), ()).item()])
    x, y = quarters[torch.randint(len(quarters), ()).item()]
    top, left = (H - height) // 4 * y, (W - width) // 4 * x
    clip = tv.resized_crop(clip, top, left, height, width, [size, size], antialias=True)
    return clip.flip(-1) if flip and torch.rand(()) < 0.5 else clip


def segment_clips(count, frames, clips=1):
    """A random frame from each of `frames` equal segments of a video: how SSv2 is fine-tuned."""
    return ((torch.arange(frames) + torch.rand(clips, frames)) * count / frames).long().tolist()


def dense_views(count, frames, stride, clips):
    """`clips` windows whose starts are spread evenly from the video's beginning to its end; one: the middle."""
    last_start = max(count - ((frames - 1) * stride + 1), 0)
    starts = [last_start * k // (clips - 1) for k in range(clips)] if clips > 1 else [last_start // 2]
    return [[start + i * stride for i in range(frames)] for start in starts]


def segment_views(count, frames, clips):
    """Of clips x frames even frames, clip k takes every clips-th from the k-th; one clip: the segments' middles."""
    if clips == 1:
        return [[(2 * i + 1) * count // (2 * frames) for i in range(frames)]]
    return [[i * count // (clips * frames) for i in range(k, clips * frames, clips)] for k in range(clips)]


def spatial_views(clip, size, crops):
    """[T, 3, H, W] -> [crops, T, 3, size, size]: short side to `size`, crops from end to end of the long side."""
    clip = tv.resize(clip, [size], antialias=True)
    H, W = clip.shape[-2:]
    places = [k / (crops - 1) for k in range(crops)] if crops > 1 else [0.5]
    return torch.stack([clip[..., int((H - size) * p):, int((W - size) * p):][..., :size, :size] for p in places])


def rand_augment(clip, operations, magnitude):
    """rand-m<magnitude>-n<operations>-mstd0.5-inc1 of a clip [T, 3, H, W], uint8: the same draw for all frames.
    Each operation is one of 15, applied with probability 0.5; torchvision's RandAugment has neither that probability
    nor these strengths. Warps are bilinear (VideoMAE's: bicubic), as torchvision warps tensors."""
    H, W = clip.shape[-2:]
    for _ in range(operations):
        which, sign = torch.randint(15, ()).item(), 1 if torch.rand(()) < 0.5 else -1
        level = min(max(magnitude + 0.5 * torch.randn(()).item(), 0), 10) / 10
        if torch.rand(()) < 0.5:
            continue
        enhance = max(0.1, 1 + 0.9 * level * sign)
        warp = partial(tv.affine, angle=0.0, translate=[0, 0], scale=1.0, shear=[0.0, 0.0], fill=[128.0] * 3,
                       interpolation=tv.InterpolationMode.BILINEAR, center=[0, 0])
        shear = math.degrees(math.atan(0.3 * level * sign))
        clip = (
            tv.autocontrast, tv.equalize, tv.invert,
            partial(tv.rotate, angle=30 * level * sign, interpolation=tv.InterpolationMode.BILINEAR, fill=[128.0] * 3),
            partial(tv.posterize, bits=4 - int(4 * level)),
            partial(tv.solarize, threshold=min(256 - int(256 * level), 255)),
            lambda x: torch.where(x < 128, (x.int() + int(110 * level)).clamp(max=255).byte(), x),      # SolarizeAdd
            partial(tv.adjust_saturation, saturation_factor=enhance),
            partial(tv.adjust_contrast, contrast_factor=enhance),
            partial(tv.adjust_brightness, brightness_factor=enhance),
            partial(tv.adjust_sharpness, sharpness_factor=enhance),
            partial(warp, shear=[shear, 0.0]), partial(warp, shear=[0.0, shear]),
            partial(warp, translate=[0.45 * level * sign * W, 0]),
            partial(warp, translate=[0, 0.45 * level * sign * H]),
        )[which](clip)
    return clip


def random_erasing(clip, probability):
    """Noise in one box of a clip [T, 3, H, W], uint8: the same box in all frames, a third of the area at most."""
    if torch.rand(()) >= probability:
        return clip
    box = RandomErasing(scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3)).make_params([clip])
    if box.pop("v") is None:                            # no box fitted in ten tries
        return clip
    noise = torch.randn(len(clip), 3, box["h"], box["w"])   # torchvision's is the same in all frames
    noise = noise * IMAGENET_STD[:, 0] + IMAGENET_MEAN[:, 0]
    return tv.erase(clip, **box, v=(noise.clamp(0, 1) * 255).byte())


def finetuning_clip(clip, size, flip, crop_area, strength, erase):
    """[T, 3, H, W] -> [T, 3, size, size]: RandAugment, random resized crop, flip, random erasing."""
    clip = rand_augment(clip, *strength)
    clip = RandomResizedCrop(size, scale=crop_area, ratio=(3 / 4, 4 / 3), antialias=True)(clip)
    clip = clip.flip(-1) if flip and torch.rand(()) < 0.5 else clip
    return random_erasing(clip, erase)


def normalise(clips, device):
    """uint8 [B, 3, T, H, W] -> float on the device, with ImageNet's mean and deviation."""
    clips = clips.to(device, non_blocking=clips.is_pinned()).float() / 255
    return (clips - IMAGENET_MEAN.to(device)) / IMAGENET_STD.to(device)


# --- Samples and batches --------------------------------------------------------------------------

def seed_of(*numbers):
    """One seed for a generator from several numbers."""
    return reduce(lambda seed, number: seed * 1_000_003 + number, numbers) % 2**63


class Videos(Dataset):
    """Clips of listed videos. Item (epoch, i) -> (clips uint8 [R, 3, T, size, size], label, unreadable videos).
    choose(number of frames) -> R lists of frame numbers; augment(clip [T, 3, H, W]) -> [T, 3, size, size]. Both draw
    from torch's generator, seeded by (seed, epoch, i). In place of an unreadable video another one is drawn, ten videos
    in all; then UnreadableVideo is raised. A video without a label has -1."""

    def __init__(self, entries, choose, augment, seed):
        self.entries, self.choose, self.augment, self.seed = entries, choose, augment, seed

    def __len__(self):
        return len(self.entries)

    def __getitem__(self, key):
        epoch, i = key
        failures = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_of(self.seed, epoch, i))
            while len(failures) < 10:
                path, label = self.entries[i]
                try:
                    clips = read_clips(path, self.choose)       # R x [T, H, W, 3]
                    # Cropped as a permuted view: torchvision is three times faster on channels that lie together.
                    clips = torch.stack([self.augment(clip.permute(0, 3, 1, 2)).transpose(0, 1) for clip in clips])
                    return clips, -1 if label is None else label, failures
                except UnreadableVideo as error:
                    failures.append(str(error))
                    i = torch.randint(len(self.entries), ()).item()
        raise UnreadableVideo(f"{len(failures)} videos in a row are unreadable; the last: {failures[-1]}")


def collate(items):
    """Samples -> (clips [B R, 3, T, size, size], labels [B R], reasons of unreadable videos)."""
    clips, labels, failures = zip(*items)
    return torch.cat(clips), torch.tensor(labels).repeat_interleave(len(clips[0])), sum(failures, [])


class Views(Dataset):
    """All test views of listed videos. Item i -> (i, uint8 [clips x crops, 3, T, size, size], None), or, since
    evaluation never substitutes, (i, None, reason) for an unreadable video. One decode serves all views."""

    def __init__(self, entries, choose, size, crops):
        self.entries, self.choose, self.size, self.crops = entries, choose, size, crops

    def __getitem__(self, i):
        try:
            clips = read_clips(self.entries[i][0], self.choose)
        except UnreadableVideo as error:
            return i, None, str(error)
        views = torch.cat([spatial_views(clip.permute(0, 3, 1, 2), self.size, self.crops) for clip in clips])
        return i, views.transpose(1, 2), None


def training_order(size, batch, first, steps, seed, rank, world):
    """(epoch, sample) of everything that one process reads from step `first` to step `steps`.
    Every epoch is a permutation of its own, the same in all processes. A step takes the next `batch` of it, process
    `rank` of `world` every world-th of those: however many there are, the samples of a step are the same. What does not
    fill a batch is left out."""
    for step in range(first, steps):
        epoch, place = divmod(step, size // batch)
        if step == first or place == 0:
            generator = torch.Generator().manual_seed(seed_of(seed, epoch))
            order = torch.randperm(size, generator=generator).tolist()
        yield from ((epoch, i) for i in order[place * batch + rank:(place + 1) * batch:world])


# --- The toy set: eight motions of a random texture -----------------------------------------------

TOY_CLASSES = ("left", "right", "up", "down", "clockwise", "anticlockwise", "growing", "shrinking")
TOY_FRAMES, TOY_SIZE, TOY_CLIPS = 12, 40, {"train": 4000, "val": 400}
TOY_ROOT = Path("data/toy")


def toy_clip(motion, generator):
    """uint8 [TOY_FRAMES, TOY_SIZE, TOY_SIZE, 3]: a window that moves steadily over a texture of several octaves.
    Place, angle, zoom and brightness in mid-clip are random for every class and only the class's own motion changes
    them, so that the middle frame tells nothing of the class and the others hardly more."""
    octaves = (torch.randn(1, 1, n, n, generator=generator) for n in (8, 16, 32))
    texture = sum(F.interpolate(octave, size=(128, 128), mode="bicubic") for octave in octaves)
    x, y, turn, zoom, speed, brightness = torch.rand(6, generator=generator).tolist()
    texture = (texture / texture.std() * 0.2 + 0.4 + 0.2 * brightness).clamp(0, 1)
    moved = (torch.arange(TOY_FRAMES) - (TOY_FRAMES - 1) / 2) * (0.75 + speed / 2) * (-1 if motion % 2 else 1)
    angle = 2 * math.pi * turn - 0.10 * moved * (motion in (4, 5))                  # radians
    zoom = 0.9 * (zoom - 0.5) + 0.04 * moved * (motion in (6, 7))                   # logarithm
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    shift = torch.stack([moved * (motion in (0, 1)), moved * (motion in (2, 3))], 1).unsqueeze(2)       # pixels
    place = rotation @ (shift * 2 / 128) + (torch.tensor([[x], [y]]) - 0.5) * 0.4
    window = torch.cat([rotation * torch.exp(-zoom).view(-1, 1, 1) * TOY_SIZE / 128, place], 2)    # [T, 2, 3]
    grid = F.affine_grid(window, (TOY_FRAMES, 1, TOY_SIZE, TOY_SIZE), align_corners=False)
    frames = F.grid_sample(texture.expand(TOY_FRAMES, 3, -1, -1), grid, padding_mode="reflection", align_corners=False)
    return (frames * 255).round().byte().permute(0, 2, 3, 1).contiguous()


def write_video(path, frames):
    """Write uint8 frames [T, H, W, 3] as H.264, the same bits every time: one thread, and a fixed quantiser,
    since x264's rate control differs from run to run on frames this small."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=12, height=frames.shape[1], width=frames.shape[2], thread_count=1,
                                      options={"qp": "12", "preset": "veryfast", "tune": "fastdecode"})
        for frame in frames.numpy():
            frame = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(convert(frame, "yuv420p")))
        container.mux(stream.encode())


def make_toy_set(root=TOY_ROOT, clips=TOY_CLIPS, seed=0):
    """Write the toy set below the folder `root` unless it is there, complete or not at all: train.txt, few.txt (ten of
    train's videos for each class), val.txt, classes.txt, videos."""
    root = Path(root).expanduser()
    if root.exists():
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    lists = {split: [f"{split}/{i:05d}.mp4 {i % len(TOY_CLASSES)}" for i in range(n)] for split, n in clips.items()}
    with tempfile.TemporaryDirectory(prefix=".", dir=root.parent) as folder:
        temporary = Path(folder, root.name)
        for split in clips:
            (temporary / split).mkdir(parents=True)
        for line in tqdm(sum(lists.values(), []), desc="making the toy set", unit="video"):
            name, motion = line.split()
            write_video(temporary / name, toy_clip(int(motion), generator))
        for name, lines in dict(lists, few=lists["train"][:10 * len(TOY_CLASSES)], classes=TOY_CLASSES).items():
            (temporary / f"{name}.txt").write_text("\n".join(lines) + "\n")
        with contextlib.suppress(OSError):              # another run was faster: its set is the same
            temporary.rename(root)


# --- Commands: check and shrink -------------------------------------------------------------------

def unreadable_reason(path):
    """None, or why some frame of the video does not decode."""
    try:
        with open_video(path) as (container, stream):
            packets, count = [packet for packet in container.demux(stream) if packet.size], 0
            for packet in [*packets, None]:             # None drains the decoder
                for frame in stream.codec_context.decode(packet):
                    convert(frame, format=None)         # refuses a damaged one
                    count += 1
            if any(packet.is_corrupt for packet in packets):
                raise ValueError("parts of it are missing")
            exact = timestamps_are_an_index(container, stream, packets)
            wanted = sum(not packet.is_discard for packet in packets) if exact else 1
            if count < wanted:
                raise ValueError(f"{wanted - count} of {wanted} frames do not decode")
    except UnreadableVideo as error:
        return str(error)


def start_worker():
    """Leave Ctrl-C to the process that started this one, and end with it, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


def kill_workers():
    """End the processes that this one started, those that ignore signals too."""
    for worker in multiprocessing.active_children():
        worker.kill()


def failures(function, jobs, workers):
    """The reasons that function(job) returns for jobs that failed, each printed at once. BrokenExecutor if one of the
    processes is killed."""
    reasons = []
    with ProcessPoolExecutor(workers, initializer=start_worker) as pool:
        try:
            for reason in filter(None, tqdm(pool.map(function, jobs, chunksize=4), total=len(jobs), unit="video")):
                tqdm.write(reason.encode("utf-8", "backslashreplace").decode())     # a file's name need not be UTF-8
                reasons.append(reason)
        except KeyboardInterrupt:
            kill_workers()
            raise SystemExit("interrupted; what was done stays") from None
    return reasons


def shrink_video(job, short_side, key_frames):
    """Re-encode a video (source, target) as H.264 without audio: `short_side` pixels at most, a key frame every
    `key_frames`. Frames and their times stay; a rotation in the header is carried out. Returns None or the reason."""
    source, target = job
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.part")
    options = {"crf": "23", "g": str(key_frames), "tune": "fastdecode", "x264-params": "b-pyramid=none"}
    try:
        with av.open(str(temporary), "w", format="mp4") as writer, open_video(source) as (container, stream):
            output, last = None, -math.inf
            for frame in container.decode(stream):
                pts = frame.pts or 0
                if frame.rotation:
                    upright = assemble([[0]], {0: convert(frame)})[0][0].contiguous()
                    frame = av.VideoFrame.from_ndarray(upright.numpy(), format="rgb24")
                if output is None:
                    scale = min(1, short_side / min(frame.width, frame.height))
                    width, height = (max(2, round(side * scale / 2) * 2) for side in (frame.width, frame.height))
                    output = writer.add_stream("libx264", rate=stream.average_rate or 25, width=width, height=height,
                                               time_base=stream.time_base, thread_count=1, options=options,
                                               colorspace=frame.colorspace, color_range=frame.color_range)
                last = max(pts, last + 1)               # times that do not grow are corrected
                frame = convert(frame, "yuv420p", width=width, height=height)
                frame.pts, frame.time_base, frame.pict_type = last, stream.time_base, 0
                writer.mux(output.encode(frame))
            if output is None:
                raise ValueError("none of its frames decodes")
            writer.mux(output.encode())
        temporary.replace(target)
    except UnreadableVideo as error:
        temporary.unlink(missing_ok=True)
        return str(error)


def shrink(source, target, short_side, key_frames, workers):
    """Re-encode all videos below the folder `source` to <same name>.mp4 below `target`, those already there left
    alone; returns the reasons of those that failed. ValueError if there are none, or two for one target."""
    source, target = (Path(folder).expanduser().resolve() for folder in (source, target))
    jobs = {}
    for path in videos_below(source):
        if target not in path.parents:
            goal = (target / path.relative_to(source)).with_suffix(".mp4")
            if goal in jobs:
                raise ValueError(f"{path} and {jobs[goal]} would both become {goal}: rename one")
            jobs[goal] = path
    if not jobs:
        raise ValueError(f"{source}: there are no videos below this folder")
    todo = [(path, goal) for goal, path in jobs.items() if not goal.exists()]
    print(f"{len(jobs)} videos, {len(jobs) - len(todo)} of them done already")
    return failures(partial(shrink_video, short_side=short_side, key_frames=key_frames), todo, workers)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("check", "shrink"))
    parser.add_argument("arguments", nargs="*", metavar="PRESET, section.key=value, SRC or DST")
    parser.add_argument("--short-side", type=int, default=320, help="of shrink: pixels, at most (default 320)")
    parser.add_argument("--key-frames", type=int, default=32, help="of shrink: frames between key frames (default 32)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    options = parser.parse_args()
    if min(options.short_side, options.key_frames, options.workers) < 1:
        parser.error("--short-side, --key-frames and --workers must be 1 or more")
    if options.command == "shrink" and len(options.arguments) != 2:
        parser.error("shrink needs SRC and DST")

    import train_pretrain       # not at the top: it imports this module
    with train_pretrain.one_sentence(ValueError, BrokenExecutor):
        if options.command == "shrink":
            reasons = shrink(*options.arguments, options.short_side, options.key_frames, options.workers)
        else:
            train, val, _ = train_pretrain.read_lists(train_pretrain.load_config(options.arguments, "pretrain"))
            paths = list(dict.fromkeys(path for path, _ in train + val))    # a list may name a video twice
            reasons = failures(unreadable_reason, paths, options.workers)
    print(f"{len(reasons)} unreadable")
    raise SystemExit(1 if reasons else 0)


if __name__ == "__main__":
    main()
