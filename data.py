"""
Data: from files on disk to batches of clips.

A video's way from a line of a CSV file to the loss:
1. `read_annotations` turns the line into an Entry: the path of the video and the
   number of its class.
2. `training_order` decides which entries each step trains on, and in which process.
3. `load_batches` has worker processes read them. There `Videos` calls `read_clips`,
   which counts the frames, has `Videos.choose` pick some, and decodes these. Then
   `Videos` crops the clips.
4. `collate` joins the clips of a micro-batch into a Batch, as uint8.
5. `normalise` moves it to the device and makes it floats.
6. `ARVideo.forward` cuts it into cubes and returns the loss.

What is random about a sample's clips depends on the seed, the epoch and the sample
alone, not on workers, processes or restarts.

    python data.py check LIST [LIST ...] [--root DIR]    decode all frames, name unreadable videos
    python data.py shrink SRC DST                        re-encode a folder so that it decodes fast
"""

import argparse
import atexit
import contextlib
import csv
import hashlib
import json
import math
import multiprocessing
import os
import re
import signal
import struct
import sys
import tempfile
import threading
from fractions import Fraction
from functools import cache, partial
from itertools import dropwhile, zip_longest
from multiprocessing import resource_tracker
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

import av
import torch
import torch.nn.functional as F
from av.sidedata.sidedata import Type as SideData
from av.video.reformatter import VideoReformatter
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import RandomErasing, RandomResizedCrop
from torchvision.transforms.v2 import functional as tv
from tqdm import tqdm

VIDEO_SUFFIXES = {
    ".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts",
    ".flv", ".wmv", ".asf", ".ogv", ".3gp", ".3g2"}
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png"}
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1, 1)
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1, 1)


class UserError(Exception):
    """Something that the user can mend. The scripts print the message and exit with 1."""


def stream_seed(seed, purpose, *numbers):
    """The seed of a random stream. Another purpose, or other numbers, give another seed."""
    text = " ".join(map(str, (seed, purpose, *numbers)))
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:7], "big")            # 56 bits, which fit an int64


# --- Annotations, read as downloaded ----------------------------------------


class Entry(NamedTuple):
    """A listed video: the path of its file, and the number of its class or None."""
    path: str
    label: int | None


def has_suffix(path, suffixes):
    return os.path.splitext(path)[1].lower() in suffixes


def is_loop(folder):
    """True if `folder` is a link to a folder above it, so that os.walk would go round in it."""
    return folder.parent.resolve().is_relative_to(folder.resolve())


def videos_below(folder):
    """The videos in a folder and its subfolders, links followed, in alphabetical order.

    A folder that holds images, and no videos or folders, counts as one video.
    Hidden files and folders are left out, and so are those that macOS adds to archives. A
    folder that cannot be listed is named on stderr.
    """
    def report(error):
        print(f"{error.filename}: {error.strerror}; this folder is left out", file=sys.stderr)

    videos = []
    for parent, folders, names in os.walk(folder, onerror=report, followlinks=True):
        parent = Path(parent)
        names = [name for name in names if not name.startswith(".")]
        # os.walk goes into those that stay in this list
        folders[:] = [name for name in folders
                      if not name.startswith((".", "__MACOSX")) and not is_loop(parent / name)]
        here = [parent / name for name in names if has_suffix(name, VIDEO_SUFFIXES)]
        has_images = any(has_suffix(name, IMAGE_SUFFIXES) for name in names)
        if has_images and not here and not folders:
            here = [parent]
        videos += here
    return sorted(videos)


def stem_of(path):
    """The name of a video without folder and suffix. A folder of images has no suffix."""
    return path.stem if has_suffix(path, VIDEO_SUFFIXES) else path.name


def files_by_stem(root):
    """{stem: path} of the videos below a folder."""
    files = {}
    doubled = []
    for path in videos_below(root):
        used = files.setdefault(stem_of(path), path)
        if used != path:
            doubled.append((used, path))
    if doubled:
        used, unused = doubled[0]
        print(f"{root}: {len(doubled)} videos have the name of another one; the first in "
              f"alphabetical order is used, for example {used} and not {unused}", file=sys.stderr)
    return files


def read_text(path):
    """The text of a file. UserError if it is not text."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: this is not a text file in UTF-8") from None


def read_folder(source):
    """A folder of class folders -> [(path, class name), ...].

    If some video is in no class folder, all of them are without a class: None.
    """
    videos = videos_below(source)
    if not videos:
        raise UserError(f"{source}: there are no videos in this folder or below it")
    # There are no classes if a video lies directly in the folder, or if the folder itself is one
    # video, a folder of images
    if any(source in (path, path.parent) for path in videos):
        return [(path, None) for path in videos]
    named = [(path, path.relative_to(source).parts[0]) for path in videos]
    if {name.lower() for _, name in named} <= {"train", "val", "validation", "test"}:
        raise UserError(f"{source}: its folders are parts of a data set, not classes: name one of "
                        f"them, for example {source / named[0][1]}")
    return named


def read_kinetics(source, text):
    """label,youtube_id,time_start,time_end,split -> [(file stem, class name), ...]."""
    lines = text.strip().splitlines()
    delimiter = max(",;\t", key=lines[0].count)         # the one that the header has most of
    rows = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True)
    rows.fieldnames = [name.strip().lower() for name in rows.fieldnames]
    absent = {"label", "youtube_id", "time_start", "time_end"} - set(rows.fieldnames)
    if absent:
        raise UserError(f"{source}: the column {', '.join(sorted(absent))} is missing in "
                        f"{','.join(rows.fieldnames)}")
    named = []
    for row in rows:
        try:
            start = int(float(row["time_start"]))
            end = int(float(row["time_end"]))
            stem = f"{row['youtube_id'].strip()}_{start:06d}_{end:06d}"
            named.append((stem, row["label"].strip()))
        except (AttributeError, OverflowError, TypeError, ValueError):
            raise UserError(f"{source}:{rows.line_num}: expected a label, a youtube_id and two "
                            f"times, found: {lines[rows.line_num - 1][:200]}") from None
    return named


def read_something(source, text):
    """Something-Something's [{"id", "template"}, ...] -> [(file stem, class name), ...]."""
    try:
        return [(str(item["id"]), item["template"].replace("[", "").replace("]", ""))
                for item in json.loads(text)]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{source}: expected a JSON list of objects with `id` and `template` "
                        f"({error!r})") from None


def read_something_classes(source):
    """Class names, in the order of their numbers, from labels.json beside the annotations."""
    files = sorted(path for path in source.parent.glob("*labels.json")
                   if not path.name.startswith("."))
    if len(files) != 1:
        raise UserError(f"{source}: Something-Something's labels.json must be beside it, once; "
                        f"found {', '.join(path.name for path in files) or 'none'}")
    try:
        numbers = json.loads(read_text(files[0]))
        return sorted(numbers, key=lambda name: int(numbers[name]))
    except (TypeError, ValueError) as error:
        raise UserError(f"{files[0]}: expected a JSON object of class names and numbers "
                        f"({error!r})") from None


def read_list(source, text, folders):
    """Lines `path label`, `path,label` or `path` -> [(path, label or None), ...].

    All lines must be of one form. A path may hold spaces. In a list without labels, no path
    may end in a number that follows a blank, a comma or a semicolon: it is read as a label.
    """
    named = []
    first_form = None
    for line_number, line in enumerate(text.splitlines(), 1):
        line = line.strip()
        if not line:
            continue
        # A name, then blanks, a comma or a semicolon, then a number
        labelled = re.fullmatch(r"(.+?)(\s+|\s*[,;]\s*)(\d+)", line)
        if labelled:
            name, separator, label = labelled.groups()
            label = int(label)
            form = f"path{separator.strip() or ' '}label"       # such as "path,label"
        else:
            name = line
            label = None
            form = "path"
        # In `a.mp4 0 1` the pattern finds the name `a.mp4 0`. Such mistakes are noticed, since a
        # name must have a video's suffix, or exist.
        if not has_suffix(name, VIDEO_SUFFIXES) and not find_file(name, folders):
            header = "; if it is a header, remove it" if not named else ""
            raise UserError(f"{source}:{line_number}: expected `path label`, `path,label` or "
                            f"`path`. The label is one number. The path must have the suffix of a "
                            f"video, or exist. Found: {line[:200]}{header}")
        first_form = first_form or form
        if form != first_form:
            raise UserError(f"{source}:{line_number}: expected `{first_form}`, as in the lines "
                            f"before, found: {line[:200]}")
        named.append((name, label))
    return named


def read_class_names(path):
    """The lines of classes.txt, or None without this file. UserError if a name stands twice."""
    if not path.is_file():
        return None
    names = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    doubled = [name for name in names if names.count(name) > 1]
    if doubled:
        raise UserError(f"{path}: the class '{doubled[0]}' stands twice")
    return names


def refuse_other_classes(source, names, classes):
    """UserError if the labels of a list evidently stand for other classes than `classes`.

    `classes` are the known names. `names` is the content of classes.txt beside the list, or
    None. Without it, only one thing can be noticed: a known class that is named by a number,
    but by another one than the number it has here.
    """
    # Names "0", "1", "2" and so on say nothing that could be compared. Classes without classes.txt
    # beside the training list have them, and so do up to ten class folders with such names.
    if classes == [str(number) for number in range(len(classes))]:
        return
    if names:
        for number, (name, known) in enumerate(zip_longest(names, classes, fillvalue="missing")):
            if name != known:
                raise UserError(f"{source}: classes.txt beside it names other classes than the "
                                f"{len(classes)} known ones: class {number} is {name}, not {known}")
        return
    # Class folders 0 to 10 are sorted as 0, 1, 10, 2, so class number 2 is folder 10. A list
    # without classes.txt probably means folder 2 by the label 2. So its labels cannot be trusted.
    for number, known in enumerate(classes):
        if known.isdecimal() and int(known) != number:
            raise UserError(f"{source}: a label {number} would mean the known class '{known}'. Use "
                            "lists for data.train, data.val and data.test, or folders for all of "
                            "them, or put a classes.txt beside this list")


def find_file(name, folders):
    """The video `name` below one of the folders, or what `shrink` made of it, or None."""
    # A name without a video's suffix is that of a folder of images
    stem = os.path.splitext(name)[0] if has_suffix(name, VIDEO_SUFFIXES) else name
    for folder in folders:
        for candidate in (name, stem + ".mp4"):
            path = folder / candidate
            if os.path.isfile(path) or is_image_folder(path):
                return path
    return None


def is_image_folder(path):
    return os.path.isdir(path) and any(
        has_suffix(name, IMAGE_SUFFIXES) and not name.startswith(".")
        for name in os.listdir(path))


def number_classes(source, named, classes):
    """[(name, class name), ...] -> [(name, class number), ...], and the class names.

    Without known `classes` they are numbered in alphabetical order.
    """
    classes = classes or sorted({label for _, label in named})
    numbers = {label: i for i, label in enumerate(classes)}
    unknown = sorted({label for _, label in named} - set(numbers))
    if unknown:
        raise UserError(f"{source}: the class '{unknown[0]}' is not among the {len(classes)} known "
                        f"ones, first {', '.join(classes[:5])}")
    return [(name, numbers[label]) for name, label in named], classes


def make_entries(source, root, named, find):
    """[(name, label), ...] -> entries. find(name) is the path of a file, or None.

    Videos without a file are left out and counted on stderr.
    """
    if not named:
        raise UserError(f"{source}: the annotation file is empty: it lists no videos")
    entries = []
    missing = []
    for name, label in named:
        path = find(name)
        if path is None:
            missing.append(name)
        else:
            entries.append(Entry(str(path), label))
    if not entries:
        raise UserError(f"{source}: none of its {len(named)} videos is under {root} "
                        f"(first: {missing[0]}); set data.root (--root of `data.py check`)")
    if missing:
        print(f"{source}: {len(missing)} of {len(named)} videos are not under {root}, "
              f"first {', '.join(missing[:5])}", file=sys.stderr)
    return entries


def read_annotations(source, root="", classes=None):
    """The videos of a data set: ([Entry, ...], class names or None).

    `source` may be a path relative to `root`. Its content tells which of these it is:
    - a folder of class folders, or of videos
    - Kinetics' CSV
    - Something-Something's JSON, with labels.json beside it
    - a list of lines `path label`, `path,label` or `path`; classes.txt may be beside it
    Videos are looked for below `root`, or beside the annotations if `root` is empty. The
    paths of a list may always be relative to the list's folder. `classes`, the names known
    from the training set or from a checkpoint, fixes the class numbers.
    UserError names the file and what is wrong. If a line of a CSV or a list is malformed, it
    also names that line.
    """
    # Find the annotations, as given or below root, and the folder of the videos
    candidates = [Path(source).expanduser(), Path(root, source).expanduser()]
    existing = [path for path in candidates if path.exists()]
    if not existing:
        tried = " and ".join(map(str, dict.fromkeys(candidates)))       # each once
        raise UserError(f"{tried}: there is no such annotation file; look at data.root and at "
                        "data.train, data.val or data.test (LIST and --root of `data.py check`)")
    source = existing[0]
    root = Path(root).expanduser() if root else source.parent
    # If the source is itself a folder, its videos are not looked for in root, which need not exist
    if not source.is_dir() and not root.is_dir():
        raise UserError(f"{root}: there is no such folder of videos (data.root)")

    # Names and labels, and a way to find the files
    if source.is_dir():
        named = read_folder(source)
        find = Path                                     # the names are paths already
    else:
        text = read_text(source)
        first_line = text.lstrip().partition("\n")[0].lower()
        # JSON begins with `[{`, with `[]`, or with a line that is only `[`. A list may begin with a
        # video that is named `[1].mp4`.
        if re.match(r"\s*\[\s*[{\]\n]", text):
            named = read_something(source, text)
            classes = classes or read_something_classes(source)
            find = files_by_stem(root).get
        # Kinetics' header has the column youtube_id, perhaps in quotes
        elif "youtube_id" in re.split(r'\s*[,;\t"]\s*', first_line.strip()):
            named = read_kinetics(source, text)
            find = files_by_stem(root).get
        else:
            folders = (root, source.parent)
            named = read_list(source, text, folders)
            find = partial(find_file, folders=folders)
            names = read_class_names(source.with_name("classes.txt"))
            has_labels = named and named[0][1] is not None
            if has_labels and classes:
                refuse_other_classes(source, names, classes)
            classes = classes or names

    # Class names are now turned into numbers. The labels of a list are numbers already, or None.
    if named and isinstance(named[0][1], str):
        named, classes = number_classes(source, named, classes)
    return make_entries(source, root, named, find), classes


def hash_of_list(entries):
    """A hash of the names and labels of listed videos, in their order.

    Folders and suffixes do not count, since the data set may be moved or shrunk.
    """
    named = [(stem_of(Path(path)), label) for path, label in entries]
    return hashlib.sha256(repr(named).encode()).hexdigest()[:12]


def read_split(settings, split, classes=None):
    """([Entry, ...], class names or None) of data.train, data.val or data.test.

    No entries if the setting is empty. `classes` as in read_annotations. Makes the toy set on
    first use.
    """
    source = settings[split]
    if not source:
        return [], classes
    if source == "toy":
        make_toy_set()
        source = TOY_ROOT / ("train.txt" if split == "train" else "val.txt")
    return read_annotations(source, settings["root"], classes)


def read_lists(settings):
    """(training entries, validation entries) for pretraining, which needs no labels."""
    train, _ = read_split(settings, "train")
    if not train:
        raise UserError("data.train is empty: name a list, a CSV, a JSON or a folder of videos")
    val, _ = read_split(settings, "val")
    return train, val


# --- Decoding ---------------------------------------------------------------


def printable(text):
    """Text that can be printed: a file's name need not be UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


class UnreadableVideo(Exception):
    """A video that cannot be decoded. The message names the file and the reason."""


# A title in a file need not be valid UTF-8. PyAV 17 and 18 then refuse the file unless such errors
# are ignored. PyAV 19 accepts it, and has no such argument.
PYAV_MAJOR = int(av.__version__.split(".")[0])
METADATA_OPTIONS = {"metadata_errors": "ignore"} if PYAV_MAJOR < 19 else {}


@contextlib.contextmanager
def open_video(path):
    """(container, video stream) of a file.

    In the with-block, errors of PyAV and of the system become UnreadableVideo, and so do
    ValueErrors and IndexErrors.
    """
    try:
        # An absolute path, since PyAV would take `a:b.mp4` for a protocol
        with av.open(os.path.abspath(path), **METADATA_OPTIONS) as container:
            stream = container.streams.best("video")
            # An attached picture is the cover of an audio file
            if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
                raise ValueError("it holds no video stream")
            if stream.codec_context is None:
                raise ValueError("there is no decoder for its video stream")
            for other in container.streams:
                if other is not stream:
                    other.discard = av.stream.Discard.all
            # Frame threads hang on broken files, and workers are parallel enough
            stream.codec_context.thread_count = 1
            # HEVC's decoder hides damage unless it is told not to
            if stream.codec_context.name == "hevc":
                stream.codec_context.options = {"err_detect": "explode"}
            yield container, stream
    except (av.error.FFmpegError, OSError, IndexError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UnreadableVideo(f"{path}: {reason}") from None


PROGRESSIVE = 1         # of FFmpeg's field orders; 0 is unknown, higher ones are interlaced

# Kept for the life of the process: frame.reformat() would make a new scaler for each frame
REFORMATTER = VideoReformatter()


def reformat(frame, format="rgb24", **size):
    """The frame in RGB or another format, and in another size."""
    # By default a thread pool would be made for every frame
    return REFORMATTER.reformat(frame, format=format, **size, threads=1)


def refuse_damaged(frame):
    if frame.is_corrupt:
        raise ValueError("a frame is damaged")


def read_packets(container, stream):
    """The stream's packets. If the file is broken somewhere, those before that place.

    Reading them is cheap, and tells the number of frames and their times more reliably than
    a header does.
    """
    packets = []
    is_broken = False
    # A break shows in one of two ways: PyAV finds invalid data, which ends the loop, or it gives a
    # corrupt packet. Errors of the system, such as a disk's, are no break and come through.
    with contextlib.suppress(av.error.InvalidDataError):
        for packet in container.demux(stream):
            # Corrupt packets at the start are skipped. After the first good packet, a corrupt one
            # is the break, and nothing from there on is kept. The loop still reads on: if the
            # cause is a failing disk, the next read raises its error, and the video counts as
            # unreadable and not as a short one.
            if packet.is_corrupt and packets:
                is_broken = True
            # The very last packet is empty
            if packet.size and not packet.is_corrupt and not is_broken:
                packets.append(packet)
    # Frames before the first key frame lack their references, and these decoders fail at them
    if stream.codec_context.name in ("hevc", "vp8", "vp9"):
        packets = list(dropwhile(lambda packet: not packet.is_keyframe, packets))
    # Discard packets are decoded but not shown: an edit list has cut them off. A stream without
    # any packet is refused too.
    if all(packet.is_discard for packet in packets):
        raise ValueError("it holds no video frames")
    return packets


def holds_idr(packet, is_mpegts):
    """True if an H.264 packet holds an IDR picture, where decoding can always start.

    Before each unit (NAL unit) of the packet, MPEG-TS has a start code and MP4 the unit's
    length. The low five bits of a unit's first byte are its type.
    """
    content = bytes(packet)
    if is_mpegts:
        units = content.split(b"\0\0\1")[1:]
    else:
        units = []
        while len(content) > 4:
            length = int.from_bytes(content[:4], "big")
            units.append(content[4:4 + length])
            content = content[4 + length:]
    return any(unit and (unit[0] & 31) == 5 for unit in units)      # type 5: an IDR picture


def timestamps_identify_frames(container, stream, packets):
    """True if timestamps identify the displayed frames one to one."""
    decoder = stream.codec_context
    formats = container.format.name.split(",")
    times = [packet.pts for packet in packets]
    # Trusted are MP4, MOV, MPEG-TS, and VP9 in any container. AVI, raw streams and some
    # MKV have wrong timestamps.
    if "mov" not in formats and "mpegts" not in formats and decoder.name != "vp9":
        return False
    # Only these codecs are trusted. In others a packet may hold no picture, or the first packet may
    # be wrongly marked as a key frame.
    if decoder.name not in ("h264", "hevc", "vp9", "libdav1d"):
        return False
    if None in times or len(set(times)) < len(times):
        return False
    # Interlaced H.264 may have a packet for each of the two fields of a frame. PyAV 17, the last
    # for Python 3.10, has no field_order: there all H.264 is decoded from its start.
    field_order = getattr(decoder, "field_order", None)
    if decoder.name == "h264" and field_order != PROGRESSIVE:
        return False
    # No frame may refer to one that is missing from the file. So the first packet must be a key
    # frame, and no later packet may be shown before it: such a frame could depend on frames
    # from before the key frame, which the file lacks.
    if not packets[0].is_keyframe or packets[0].pts > min(times):
        return False
    # With intra refresh, H.264 has no whole key frames. The picture is renewed part by part over
    # several frames, and the first of these is marked as a key frame. A file that starts there
    # gives no frame until the picture is whole, so some packets have no frame. Only an IDR
    # picture is a sure start.
    if decoder.name == "h264" and not holds_idr(packets[0], "mpegts" in formats):
        return False
    # With B-frames, frames are shown in another order than they are decoded in. So if the times of
    # display (pts) all equal those of decoding (dts), the file has only copied dts to pts.
    if decoder.has_b_frames and times == [packet.dts for packet in packets]:
        return False
    return True


def packets_needed(packets, wanted):
    """The set of numbers of the packets to decode for the wanted timestamps.

    The first packet must be a key frame and shown first (see timestamps_identify_frames).
    Decoding goes from a key frame up to each wanted frame. It starts at the last key frame
    that comes no later than the wanted frame, both in the file and on screen. The order of
    the file alone is not enough: in an open group of pictures, a frame may be stored after a
    key frame but shown before it. It may then need frames that are stored before the key frame.
    """
    number_of = {}
    last_key_frame = []         # for each packet, the last key frame in the file up to and with it
    for i, packet in enumerate(packets):
        number_of[packet.pts] = i
        last_key_frame.append(i if packet.is_keyframe else last_key_frame[-1])

    run_end = {}                        # {first packet of a run: last packet of that run}
    for pts in wanted:
        end = number_of[pts]
        # Begin with the last key frame in the file up to the wanted frame. While it is shown after
        # the wanted frame, go to the key frame before it. This ends at packet 0 at the latest,
        # which is a key frame and shown first.
        start = last_key_frame[end]
        while packets[start].pts > pts:
            start = last_key_frame[start - 1]
        # Wanted frames that start at the same key frame share one run
        run_end[start] = max(end, run_end.get(start, 0))
    return {i for start, end in run_end.items() for i in range(start, end + 1)}


def decode_indexed(decoder, packets, wanted, convert):
    """{timestamp: converted frame} for those of the wanted timestamps that the decoder gives.

    In one pass, in the order of the file:
    1. Find the packets from each wanted frame's key frame up to that frame (packets_needed).
    2. Feed the decoder these packets, and no others.
    3. Where packets are left out, drain the decoder, by feeding it None, and reset it.
    4. Refuse damaged frames, wanted or not: damage spreads to later frames.
    5. Keep the frames whose timestamps are wanted.
    """
    frames = {}
    needed = packets_needed(packets, wanted)
    for i in sorted(needed):
        packet = packets[i]
        # H.264 can leave out unwanted frames that no other frame refers to
        if decoder.name == "h264":
            decoder.skip_frame = "DEFAULT" if packet.pts in wanted else "NONREF"
        decoded = decoder.decode(packet)
        if i + 1 not in needed:                         # a gap, or the end
            decoded += decoder.decode(None)
            decoder.flush_buffers()
        for frame in decoded:
            refuse_damaged(frame)
            if frame.pts in wanted:
                frames[frame.pts] = convert(frame)
    return frames


def decode_all(decoder, packets):
    """Every frame, in the order of display. Damaged ones too: the caller looks at is_corrupt.

    Only the last packet is an exception, since it is incomplete where a file breaks off: it may
    fail to decode, and its frame is left out if damaged. Without timestamps, this frame cannot be
    recognised, and is yielded even so. Raises ValueError if there is no frame to yield.
    """
    last = packets[-1]
    is_empty = True
    for packet in [*packets, None]:                     # None drains the decoder
        try:
            frames = decoder.decode(packet)
        except av.error.FFmpegError:
            # Only the last packet may fail. The decoder is drained all the same.
            if packet is not last:
                raise
            continue
        for frame in frames:
            is_last = last.pts is not None and frame.pts == last.pts
            if frame.is_corrupt and is_last:
                continue
            is_empty = False
            yield frame
    if is_empty:
        raise ValueError("none of its frames decodes")


def decode_counted(decoder, packets, wanted, convert):
    """({number: converted frame} for the wanted numbers, how many frames were decoded).

    Decodes from the start and counts what comes out, until all wanted frames have come.
    """
    frames = {}
    count = 0
    damaged = False
    for frame in decode_all(decoder, packets):
        # Damage spreads up to the next key frame
        damaged = frame.is_corrupt or (damaged and not frame.key_frame)
        if count in wanted:
            if damaged:
                raise ValueError("a wanted frame, or one that it depends on, is damaged")
            frames[count] = convert(frame)
        count += 1
        if len(frames) == len(wanted):
            break
    return frames, count


def decode_clips(container, stream, choose, convert):
    """Decode the frames that choose(number of frames) asks for.

    Returns (clips, {id: converted frame}); a clip is a list of frame ids. Ids are timestamps,
    or frame numbers if timestamps cannot be trusted or decoding by them fails. choose is called
    once for each attempt: by timestamps, by number, and by number again if the decoder gave
    fewer frames than there are packets.
    """
    packets = read_packets(container, stream)
    decoder = stream.codec_context

    # Decode only what the wanted frames need, if timestamps can be trusted
    if timestamps_identify_frames(container, stream, packets):
        shown = sorted(packet.pts for packet in packets if not packet.is_discard)
        clips = [[shown[number] for number in clip]
                 for clip in clamp(choose(len(shown)), len(shown))]
        wanted = {pts for clip in clips for pts in clip}
        # An error may mean only that a packet is wrongly marked as a key frame; then decoding
        # from the start succeeds
        with contextlib.suppress(av.error.FFmpegError, ValueError):
            frames = decode_indexed(decoder, packets, wanted, convert)
            if len(frames) == len(wanted):
                return clips, frames

    # Else decode from the start. First assume one frame for each packet.
    count = len(packets)
    while True:
        # The attempt before may have left the decoder anywhere
        decoder.skip_frame = "DEFAULT"
        decoder.flush_buffers()
        clips = clamp(choose(count), count)
        wanted = {number for clip in clips for number in clip}
        frames, count = decode_counted(decoder, packets, wanted, convert)
        if len(frames) == len(wanted):
            return clips, frames
        # A wanted frame did not come, so the decoder has run to the end, and `count` is now the
        # true number of frames. Choose again with it.


def orientation(frame):
    """(is mirrored, quarter turns): how a file wants a frame to be shown.

    First mirror it left to right, if asked, then turn it clockwise by that many quarter turns.
    The display matrix tells both: it takes a point (x, y) to (a x + c y, b x + d y), where y
    points down. Angles are rounded to quarter turns.
    """
    matrix = frame.side_data.get(SideData.DISPLAYMATRIX)
    if matrix is None:
        return False, 0
    a, b, _, c, d, *_ = struct.unpack("9i", bytes(matrix)[:36])
    if a * d == b * c:                                  # degenerate: some writers leave zeros
        return False, 0
    is_mirrored = a * d < b * c                         # the determinant is negative
    # Look at the point (0, 1), which mirroring leaves alone. A clockwise turn by A takes it to
    # (-sin A, cos A), as y points down: a quarter turn takes the bottom, (0, 1), to the left,
    # (-1, 0). The matrix takes (0, 1) to (c, d). So c is -sin A and d is cos A, up to scale.
    angle = math.degrees(math.atan2(-c, d))
    return is_mirrored, round(angle / 90) % 4


def assemble(clips, frames):
    """An upright tensor [T, H, W, 3] for each clip. A clip is a list of keys of `frames`."""
    first = frames[min(frames)]
    pixels = {}
    for frame_id, frame in frames.items():
        # A frame whose size differs takes that of the first
        if (frame.width, frame.height) != (first.width, first.height):
            frame = reformat(frame, width=first.width, height=first.height)
        plane = frame.planes[0]
        shape = (frame.height, frame.width, 3)
        # A view, without a copy. FFmpeg pads every row to line_size bytes.
        strides = (plane.line_size, 3, 1)
        pixels[frame_id] = torch.frombuffer(plane, dtype=torch.uint8).as_strided(shape, strides)

    is_mirrored, quarter_turns = orientation(first)
    tensors = []
    for clip in clips:
        tensor = torch.stack([pixels[frame_id] for frame_id in clip])       # [T, H, W, 3]
        if is_mirrored:
            tensor = tensor.flip(2)
        # rot90 turns counter-clockwise
        tensors.append(tensor.rot90(-quarter_turns, (1, 2)) if quarter_turns else tensor)
    return tensors


def clamp(clips, count):
    """The clips, with frame numbers of `count` or more replaced by the last, count - 1."""
    return [[min(number, count - 1) for number in clip] for clip in clips]


def image_files(folder):
    """The images of a folder in natural order: 2.jpg comes before 10.jpg."""
    try:
        paths = [path for path in Path(folder).iterdir() if has_suffix(path, IMAGE_SUFFIXES)
                 and not path.name.startswith(".")]
    except OSError as error:
        raise UnreadableVideo(f"{folder}: {error.strerror}") from None
    if not paths:
        raise UnreadableVideo(f"{folder}: there are no images in this folder")
    return sorted(paths, key=lambda path: [int(part) if part.isdecimal() else part
                                           for part in re.split(r"(\d+)", path.name)])


def read_image(path):
    """An image as a frame of a video, RGB. Raises UnreadableVideo."""
    # Pillow, since torchvision's own decoder ends the process at a damaged PNG
    try:
        with Image.open(path) as image:
            if image.mode[0] in "IF":                   # Pillow's modes of 16 and 32 bits
                raise ValueError("it has more than 8 bits for each colour")
            return av.VideoFrame.from_image(image)
    except (OSError, SyntaxError, ValueError) as error:         # SyntaxError: some broken PNGs
        raise UnreadableVideo(f"{path}: {error}") from None


def read_clips(path, choose):
    """Decode clips of one video: [uint8 tensor [T, H, W, 3], ...], RGB and upright.

    choose(number of frames) -> [[frame number, ...], ...], a list for every clip.
    Numbers beyond the last frame repeat it. Images of a folder are not turned: their EXIF
    is ignored. Raises UnreadableVideo.
    """
    if os.path.isdir(path):
        files = image_files(path)
        clips = clamp(choose(len(files)), len(files))
        wanted = {number for clip in clips for number in clip}
        images = {number: read_image(files[number]) for number in wanted}
        try:
            return assemble(clips, images)
        except av.error.FFmpegError as error:           # images of all too different shapes
            raise UnreadableVideo(f"{path}: {error}") from None
    with open_video(path) as (container, stream):
        return assemble(*decode_clips(container, stream, choose, reformat))


# --- Choosing frames --------------------------------------------------------


def last_start(count, frames, stride):
    """In a video of `count` frames, the last one at which a window can start; at least 0."""
    return max(count - ((frames - 1) * stride + 1), 0)


def window(start, frames, stride):
    return [start + i * stride for i in range(frames)]


def dense_clips(count, frames, stride, clips=1):
    """`clips` windows of `frames` frames, `stride` apart, at random starts."""
    starts = torch.randint(last_start(count, frames, stride) + 1, (clips,)).tolist()
    return [window(start, frames, stride) for start in starts]


def segment_clips(count, frames, clips=1):
    """For each clip, a random frame from each of `frames` equal segments: SSv2's fine-tuning."""
    positions = torch.arange(frames) + torch.rand(clips, frames)
    return (positions * count / frames).long().tolist()


def dense_views(count, frames, stride, clips):
    """`clips` windows. Their starts lie evenly, from the first possible one to the last.

    A single window lies in the middle.
    """
    last = last_start(count, frames, stride)
    if clips == 1:
        return [window(last // 2, frames, stride)]
    return [window(last * k // (clips - 1), frames, stride) for k in range(clips)]


def segment_views(count, frames, clips):
    """Spread `clips * frames` numbers evenly over the video, and deal them out to the clips.

    Of 3 clips, the first takes the 1st, 4th, 7th number and so on, the second the 2nd, 5th,
    8th. A single clip takes the middles of `frames` segments instead.
    """
    if clips == 1:
        return [[(2 * i + 1) * count // (2 * frames) for i in range(frames)]]
    spread = [i * count // (clips * frames) for i in range(clips * frames)]
    return [spread[k::clips] for k in range(clips)]


# --- Augmentation -----------------------------------------------------------


def pretraining_clip(clip, size, flip):
    """VideoMAE's multi-scale crop: uint8 [T, 3, H, W] -> [T, 3, size, size].

    The crop's height and width are the frame's short side times one of four scales each. The
    two scales are equal or next to each other. The crop is at one of 13 positions. Mirrored at
    random if `flip`.
    """
    scales = (1, 0.875, 0.75, 0.66)
    pairs = [(a, b) for i, a in enumerate(scales) for j, b in enumerate(scales)
             if abs(i - j) <= 1]
    # Positions (x, y) in quarters of the room that the crop leaves: corners, middles of the edges
    # and centre, then four in between
    quarters = [(x, y) for x in (0, 2, 4) for y in (0, 2, 4)]
    quarters += [(1, 1), (3, 1), (1, 3), (3, 3)]

    H, W = clip.shape[-2:]
    scale_h, scale_w = pairs[torch.randint(len(pairs), ()).item()]
    x, y = quarters[torch.randint(len(quarters), ()).item()]
    height = max(1, int(min(H, W) * scale_h))
    width = max(1, int(min(H, W) * scale_w))
    top = (H - height) // 4 * y
    left = (W - width) // 4 * x
    clip = tv.resized_crop(clip, top, left, height, width, [size, size], antialias=True)
    return random_flip(clip) if flip else clip


def random_flip(clip):
    return clip.flip(-1) if torch.rand(()) < 0.5 else clip


def spatial_views(clip, size, crops):
    """[T, 3, H, W] -> [crops, T, 3, size, size]: short side to `size`, crops from end to end.

    The crops lie evenly along the long side; a single one in the middle.
    """
    clip = tv.resize(clip, [size], antialias=True)
    H, W = clip.shape[-2:]
    shares = [k / (crops - 1) for k in range(crops)] if crops > 1 else [0.5]
    views = []
    for share in shares:
        top = int((H - size) * share)
        left = int((W - size) * share)
        views.append(clip[..., top:top + size, left:left + size])
    return torch.stack(views)


RAND_AUGMENT = (
    "autocontrast", "equalize", "invert", "rotate", "posterize", "solarize", "solarize add",
    "saturation", "contrast", "brightness", "sharpness", "shear x", "shear y", "move x", "move y")


def autocontrast(frame):
    """Stretch the values of each colour of a frame uint8 [3, H, W], so that they go from 0 to 255.

    torchvision's own usually ends at 254. A plane of a single value stays as it is.
    """
    low = frame.amin((1, 2), keepdim=True)                      # [3, 1, 1]
    span = frame.amax((1, 2), keepdim=True) - low
    is_plain = span == 0
    low = low.masked_fill(is_plain, 0)
    span = span.masked_fill(is_plain, 255)
    return ((frame - low) * 255.0 / span).byte()


def change_colours(frame, name, level, sign):
    """Apply one of RandAugment's operations, other than a warp, to a frame uint8 [3, H, W].

    `level` (0 to 1) is its strength, `sign` its direction.
    """
    factor = 1 + 0.9 * level * sign             # 0.1 to 1.9; 1 changes nothing
    if name == "autocontrast":
        return autocontrast(frame)
    if name == "equalize":
        return tv.equalize(frame)
    if name == "invert":
        return tv.invert(frame)
    if name == "posterize":
        return tv.posterize(frame, bits=4 - int(4 * level))
    if name == "solarize":
        # Compared as int16: at a level near 0 the limit is 256, which does not fit in a uint8
        return torch.where(frame.short() < 256 - int(256 * level), frame, 255 - frame)
    if name == "solarize add":
        return frame + (frame < 128).byte() * int(110 * level)      # at most 127 + 110
    if name == "saturation":
        return tv.adjust_saturation(frame, factor)
    if name == "contrast":
        return tv.adjust_contrast(frame, factor)
    if name == "brightness":
        return tv.adjust_brightness(frame, factor)
    return tv.adjust_sharpness(frame, factor)


def warp_matrix(name, level, sign, H, W):
    """The matrix of one operation of RandAugment, or None if it is no warp.

    It maps coordinates of the output to coordinates of the input, as warp needs it.
    """
    slope = 0.3 * level * sign
    move = 0.45 * level * sign
    cosine = math.cos(math.radians(30 * level))
    sine = math.sin(math.radians(30 * level * sign))
    # Each row is (factor of x, factor of y, offset). The offsets of a rotation keep the middle of
    # the frame, (W/2, H/2), where it is.
    turned_x = (cosine, sine, (W - cosine * W - sine * H) / 2)
    turned_y = (-sine, cosine, (H + sine * W - cosine * H) / 2)
    matrices = {
        "rotate": (turned_x, turned_y),
        "shear x": ((1, slope, 0), (0, 1, 0)),
        "shear y": ((1, 0, 0), (slope, 1, 0)),
        # Minus, since the map goes from output to input: a positive move is right or down
        "move x": ((1, 0, -move * W), (0, 1, 0)),
        "move y": ((1, 0, 0), (0, 1, -move * H)),
    }
    return matrices.get(name)


def warp(clip, matrix):
    """A warped clip: output pixel (x, y) is sampled from the input at matrix @ (x, y, 1).

    Bilinear, and grey where that point lies outside the input. torchvision's affine() took
    1.2 to 3 times as long. The clip must be contiguous.
    """
    H, W = clip.shape[-2:]
    # The middles of pixels lie at 0.5, 1.5, 2.5 and so on
    x = torch.arange(W) + 0.5
    y = torch.arange(H)[:, None] + 0.5
    (a, b, c), (d, e, f) = matrix
    from_x = a * x + b * y + c                                  # [H, W]
    from_y = d * x + e * y + f
    outside = (from_x < 0) | (from_x >= W) | (from_y < 0) | (from_y >= H)
    column = (from_x - 0.5).floor().int()
    row = (from_y - 0.5).floor().int()
    # The weights of bilinear interpolation: how far the point lies from the middle of pixel
    # (column, row) towards the next pixel, from 0 to 1
    to_right = (from_x - 0.5 - column).flatten()
    down = (from_y - 0.5 - row).flatten()

    def places(row, column):
        """Indices into a flattened plane. A grey pixel is appended to it, at index H * W."""
        place = row.clamp(0, H - 1) * W + column.clamp(0, W - 1)
        return place.masked_fill(outside, H * W).flatten()

    # For each new pixel, the four old pixels around the point that it comes from, as pairs (left,
    # right) of indices
    upper = places(row, column), places(row, column + 1)
    lower = places(row + 1, column), places(row + 1, column + 1)

    # A shear or a move leaves one axis as it is, and need not interpolate along it
    along_x = to_right.any()
    along_y = down.any()

    def along_row(pixels, left, right):
        """The values between two pixels of a row."""
        value = pixels.index_select(0, left).float()
        if along_x:
            value = value.lerp(pixels.index_select(0, right).float(), to_right)
        return value

    # One plane (a channel of a frame, [H, W]) at a time. flatten() makes views, so that what is
    # written into `new` lands in `result`.
    result = torch.empty_like(clip)
    for plane, new in zip(clip.flatten(0, 1), result.flatten(0, 1)):
        pixels = F.pad(plane.flatten(), (0, 1), value=128)      # the grey pixel
        value = along_row(pixels, *upper)
        if along_y:
            value = value.lerp(along_row(pixels, *lower), down)
        # From float to uint8 it is three times faster by way of int16
        new.copy_(value.short().view_as(new))
    return result


def draw_operations(count, magnitude):
    """[(name, level, sign), ...] of the operations that a clip undergoes.

    As timm's `rand-m<magnitude>-n<count>-mstd0.5-inc1`: draw this many operations, and keep
    each with probability 0.5. Strengths are normal around `magnitude` (0 to 10) with
    deviation 0.5. torchvision's RandAugment has neither this probability nor these strengths.
    """
    kept = []
    for _ in range(count):
        name = RAND_AUGMENT[torch.randint(len(RAND_AUGMENT), ()).item()]
        sign = 1 if torch.rand(()) < 0.5 else -1
        strength = magnitude + 0.5 * torch.randn(()).item()
        level = min(max(strength, 0), 10) / 10
        if torch.rand(()) < 0.5:
            kept.append((name, level, sign))
    return kept


def rand_augment(clip, operations):
    """A uint8 clip [T, 3, H, W] after these operations, the same for all its frames.

    The operations are those of Pillow, which timm and VideoMAE use, but warps are always
    bilinear (VideoMAE's are bicubic). Compared with Pillow's (bilinear) result of one operation,
    a pixel may differ by one grey level, since Pillow rounds intermediate results. Where a warp
    meets the border of a frame, it may differ by more.
    """
    clip = clip.contiguous()            # as warp needs it
    for name, level, sign in operations:
        matrix = warp_matrix(name, level, sign, *clip.shape[-2:])
        if matrix:
            clip = warp(clip, matrix)
        else:
            # Frame by frame is faster than all at once: a frame's floats stay in the cache
            clip = torch.stack([change_colours(frame, name, level, sign) for frame in clip])
    return clip


def random_erasing(clip, probability):
    """Noise in one box of a uint8 clip [T, 3, H, W]: the same box in all frames."""
    if torch.rand(()) >= probability:
        return clip
    # A box (i, j, h, w) and its fill v, which is None if no box fitted in ten tries
    box = RandomErasing(scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3)).make_params([clip])
    if box["v"] is None:
        return clip
    # torchvision's own noise would be the same in all frames. VideoMAE erases normalised clips by
    # standard normal noise. This clip is normalised later, so the noise gets ImageNet's mean and
    # deviation.
    noise = torch.randn(len(clip), 3, box["h"], box["w"])
    # The two statistics are [3, 1, 1] here
    noise = noise * IMAGENET_STD[:, 0] + IMAGENET_MEAN[:, 0]
    box["v"] = (noise.clamp(0, 1) * 255).byte()
    return tv.erase(clip, **box)


def finetuning_clip(clip, size, flip, crop_area, rand_augment_strength, erase):
    """RandAugment, random crop, flip, random erasing: [T, 3, H, W] -> [T, 3, size, size].

    `rand_augment_strength` is (number of operations, magnitude).
    """
    operations = draw_operations(*rand_augment_strength)
    crop = RandomResizedCrop(size, scale=crop_area, ratio=(3 / 4, 4 / 3))
    box = crop.make_params([clip])
    clip = tv.resized_crop(
        rand_augment(clip, operations), box["top"], box["left"], box["height"], box["width"],
        [size, size], antialias=True)
    if flip:
        clip = random_flip(clip)
    return random_erasing(clip, erase)


@cache
def image_statistics(device):
    """ImageNet's mean and deviation [3, 1, 1, 1]. They are sent to a device only once."""
    return IMAGENET_MEAN.to(device), IMAGENET_STD.to(device)


def normalise(clips, device):
    """uint8 [B, 3, T, H, W] -> float on the device, by ImageNet's mean and deviation."""
    mean, deviation = image_statistics(device)
    clips = clips.to(device, non_blocking=clips.is_pinned()).float() / 255
    return (clips - mean) / deviation


# --- Samples and batches ----------------------------------------------------


class Sample(NamedTuple):
    """What is read of one listed video: R clips, uint8 [R, 3, T, size, size].

    (In this file R counts the clips or views of a video, not arvideo.py's predicted tokens.)
    `clips` is None if no video could be read. The label is a class number, or -1.
    `unreadable` holds the reasons of all videos that were tried and could not be read.
    """
    clips: torch.Tensor | None
    label: int
    unreadable: list


class Batch(NamedTuple):
    """Samples joined: clips [B R, 3, T, size, size], labels [B R], and all reasons."""
    clips: torch.Tensor | None
    labels: torch.Tensor | None
    unreadable: list


class Videos(Dataset):
    """Random clips of listed videos. Item (epoch, i) is the Sample of entry i in an epoch.

    choose(number of frames) -> R lists of frame numbers.
    augment(clip uint8 [T, 3, H, W]) -> [T, 3, size, size].
    Both draw from torch's generator. In place of an unreadable video another is drawn.
    """
    TRIES = 10                                          # videos for one item

    def __init__(self, entries, choose, augment, seed):
        self.entries = entries
        self.choose = choose
        self.augment = augment
        self.seed = seed

    def __len__(self):
        return len(self.entries)

    def read(self, path):
        """[R, 3, T, size, size]"""
        clips = []
        for clip in read_clips(path, self.choose):              # [T, H, W, 3]
            # Not made contiguous: torchvision crops and resizes this view three times faster.
            # (In fine-tuning, rand_augment makes it contiguous, since warp needs that.)
            clip = self.augment(clip.permute(0, 3, 1, 2))       # [T, 3, size, size]
            clips.append(clip.transpose(0, 1))
        return torch.stack(clips)

    def __getitem__(self, key):
        epoch, i = key
        unreadable = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream_seed(self.seed, "sample", epoch, i))
            for _ in range(self.TRIES):
                path, label = self.entries[i]
                label = -1 if label is None else label
                try:
                    return Sample(self.read(path), label, unreadable)
                except UnreadableVideo as error:
                    unreadable.append(str(error))
                    i = torch.randint(len(self.entries), ()).item()
        return Sample(None, -1, unreadable)


def collate(samples):
    """Join samples to a Batch, without clips if one of them has none."""
    unreadable = [reason for sample in samples for reason in sample.unreadable]
    if any(sample.clips is None for sample in samples):
        return Batch(None, None, unreadable)
    repeats = len(samples[0].clips)                     # R
    labels = torch.tensor([sample.label for sample in samples])
    clips = torch.cat([sample.clips for sample in samples])
    return Batch(clips, labels.repeat_interleave(repeats), unreadable)


class Views(Dataset):
    """The test views of listed videos, R = clips x crops of each.

    Item i is (i, views uint8 [R, 3, T, size, size], None), or (i, None, reason) if entry i
    is unreadable. A test never takes another video in its place.
    """

    def __init__(self, entries, choose, size, crops):
        self.entries = entries
        self.choose = choose
        self.size = size
        self.crops = crops

    def __getitem__(self, i):
        views = []
        try:
            for clip in read_clips(self.entries[i].path, self.choose):  # [T, H, W, 3]
                clip = clip.permute(0, 3, 1, 2)                         # [T, 3, H, W]
                views.append(spatial_views(clip, self.size, self.crops))
        except UnreadableVideo as error:
            return i, None, str(error)
        return i, torch.cat(views).transpose(1, 2), None


def training_order(size, batch, first_step, end_step, seed, rank, world_size):
    """Yields (epoch, entry number) of the samples that process `rank` reads, step by step.

    The first step is `first_step`, the last one end_step - 1.
    Every epoch is a permutation of `size` entries, the same in all processes. A step
    takes the next `batch` of it, and process `rank` every world_size-th of those. So
    a step's samples do not depend on the number of processes. The entries at the end of
    an epoch that do not fill a batch are left out.
    """
    steps_per_epoch = size // batch
    for step in range(first_step, end_step):
        epoch, step_of_epoch = divmod(step, steps_per_epoch)
        if step == first_step or step_of_epoch == 0:
            generator = torch.Generator().manual_seed(stream_seed(seed, "epoch", epoch))
            order = torch.randperm(size, generator=generator).tolist()
        start = step_of_epoch * batch
        for i in order[start + rank:start + batch:world_size]:
            yield epoch, i


# --- Worker processes -------------------------------------------------------


def end_with(process):
    """End this worker once the process that it works for has ended, even if it was killed."""
    wait([process.sentinel])
    os.kill(os.getpid(), signal.SIGKILL)


def begin_worker(_):
    """For workers: the process that they work for decides when they end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # torch ends a worker once its parent in the operating system, os.getppid(), has ended. Under
    # "forkserver" this parent is the fork server, which does not end before its workers do. So a
    # thread watches the process that the worker works for.
    process = multiprocessing.parent_process()
    if process.pid != os.getppid():
        threading.Thread(target=end_with, args=(process,), daemon=True).start()


def kill_workers():
    """Kill the workers at exit.

    Else Python would send them SIGTERM, which they ignore, and wait for them for ever.
    """
    for worker in multiprocessing.active_children():
        worker.kill()


def start_loading(loader):
    """Start a DataLoader and its workers: (iterator over batches, the worker processes)."""
    # Registered at every call, not on import: a program may start a run by multiprocessing's fork,
    # and in Python 3.13 and later the forked process loses the exit handlers from before the
    # fork. Registering kill_workers several times does no harm.
    atexit.register(kill_workers)
    others = multiprocessing.active_children()          # processes that are not this loader's

    context = loader.multiprocessing_context or multiprocessing
    if loader.num_workers and context.get_start_method() == "forkserver":
        # The fork server imports once what workers need, and each worker begins as its copy
        multiprocessing.set_forkserver_preload(["__main__", __name__])
        # The server needs Python's resource tracker, whose start unblocks SIGTERM. So it is started
        # before SIGTERM is blocked.
        resource_tracker.ensure_running()
    # A SIGTERM that is sent to all processes of a run must not kill the fork server. So it is
    # blocked while the server starts, since a new process inherits what is blocked. Workers inherit
    # the block too, which does no harm: they ignore SIGTERM.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})

    # When a worker dies, torch's handler would raise in whatever line is running. So it is
    # removed, and load_batches asks whether a worker has ended.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    return batches, [worker for worker in multiprocessing.active_children()
                     if worker not in others]


def load_batches(
        dataset, batch_size, order, workers, join=list, pin_memory=False, context=None):
    """Batches of dataset[key] for the keys in `order`, read ahead by worker processes.

    join([item, ...]) makes a batch. With 0 workers this process reads them itself.
    As this is a generator, workers start when the first batch is asked for.
    `context` is how workers start, "fork" or "forkserver"; None is Python's own choice.
    Raises UserError if a worker dies.
    """
    batches, own = start_loading(DataLoader(
        dataset, batch_size, sampler=order, num_workers=workers, collate_fn=join,
        pin_memory=pin_memory, worker_init_fn=begin_worker,
        multiprocessing_context=context if workers else None))
    try:
        yield from batches
    except (RuntimeError, EOFError, OSError):
        # A sentinel is ready once its worker has ended
        if own and wait([worker.sentinel for worker in own], timeout=1):
            raise UserError("a worker process has ended. If the system ended it for want of "
                            "memory, set run.workers (or --workers) lower") from None
        raise
    finally:
        for worker in own:
            worker.kill()           # torch would wait five seconds for each


# --- The toy set: eight motions of a random texture -------------------------

# A clip of the toy set shows what is seen through a window that moves over a still texture. The
# four numbers of a class say how the window moves from one frame to the next at speed 1: how far
# to the right and down (pixels of the texture), how far clockwise (radians), and how much it grows
# (the logarithm of its size). The class is named for the opposite, which is what one sees.
TOY_MOTIONS = {
    "left": (1, 0, 0, 0), "right": (-1, 0, 0, 0), "up": (0, 1, 0, 0), "down": (0, -1, 0, 0),
    "clockwise": (0, 0, -0.10, 0), "anticlockwise": (0, 0, 0.10, 0),
    "growing": (0, 0, 0, -0.04), "shrinking": (0, 0, 0, 0.04)}
TOY_CLASSES = tuple(TOY_MOTIONS)
TOY_FRAMES = 12
TOY_SIZE = 40
TOY_CLIPS = {"train": 4000, "val": 400}
TOY_ROOT = Path("data/toy")


def toy_clip(label, generator):
    """A window that moves steadily over a texture: uint8 [TOY_FRAMES, TOY_SIZE, TOY_SIZE, 3].

    `label` is the number of its class. Whatever its class, each clip has a random texture,
    speed and brightness, and a random position, angle and zoom of the window at the middle
    of the clip. From there, backward and forward, only the class's own motion changes what
    is seen. So the middle frames tell almost nothing of the class.
    """
    # A texture of three octaves
    texture = 0
    for n in (8, 16, 32):
        octave = torch.randn(1, 1, n, n, generator=generator)
        texture = texture + F.interpolate(octave, size=(128, 128), mode="bicubic")
    x, y, turn, zoom, speed, brightness = torch.rand(6, generator=generator).tolist()
    texture = (texture / texture.std() * 0.2 + 0.4 + 0.2 * brightness).clamp(0, 1)

    # Each frame's distance from the middle of the clip, in frames, times the speed (0.75 to 1.25)
    moved = (torch.arange(TOY_FRAMES) - (TOY_FRAMES - 1) / 2) * (0.75 + speed / 2)
    # The window's shift, turn and growth in each frame, compared with the middle of the clip
    right, down, turned, grown = (factor * moved for factor in TOY_MOTIONS[TOY_CLASSES[label]])
    angle = 2 * math.pi * turn + turned
    log_size = 0.9 * (0.5 - zoom) + grown

    # An affine map [T, 2, 3] from the window to the texture. The texture spans -1 to 1, so one of
    # its 128 pixels is 2 / 128. As y points down, a positive angle is clockwise. The window shifts
    # along its own axes, so its shift is rotated by its angle.
    rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
    shift = torch.stack([right, down], 1).unsqueeze(2) * 2 / 128
    # Halfway through the clip, the window's centre is at most 0.2 from the texture's centre, along
    # each axis
    centre_halfway = 0.4 * (torch.tensor([[x], [y]]) - 0.5)
    centre = rotation @ shift + centre_halfway          # [T, 2, 1]
    # At a log_size of 0 the window covers TOY_SIZE of the texture's 128 pixels
    matrix = rotation * torch.exp(log_size).view(-1, 1, 1) * TOY_SIZE / 128
    shape = (TOY_FRAMES, 1, TOY_SIZE, TOY_SIZE)
    grid = F.affine_grid(torch.cat([matrix, centre], 2), shape, align_corners=False)
    frames = F.grid_sample(texture.expand(TOY_FRAMES, 3, -1, -1), grid,
                           padding_mode="reflection", align_corners=False)
    return (frames * 255).round().byte().permute(0, 2, 3, 1).contiguous()


def write_video(path, frames):
    """Write uint8 frames [T, H, W, 3] as H.264, the same bits every time.

    So one thread, and a fixed quantiser: x264's rate control differs from run to run
    on frames as small as the toy set's.
    """
    options = {"qp": "12", "preset": "veryfast", "tune": "fastdecode"}
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream(
            "libx264", rate=12, height=frames.shape[1], width=frames.shape[2], thread_count=1,
            options=options)
        for pixels in frames.numpy():
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(reformat(frame, "yuv420p")))
        container.mux(stream.encode())


def make_toy_set(root=TOY_ROOT, clips=TOY_CLIPS):
    """Write the toy set to the folder `root`, unless that exists.

    The folder appears only when it is complete. train.txt and val.txt list its videos,
    few.txt lists ten training videos of each class, and classes.txt names the classes.
    """
    if root.exists():
        return
    root.parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(stream_seed(0, "toy set"))
    lists = {"classes": TOY_CLASSES}
    with tempfile.TemporaryDirectory(prefix=".", dir=root.parent) as folder:
        temporary = Path(folder, root.name)
        progress = tqdm(total=sum(clips.values()), desc="making the toy set", unit="video")
        for split, count in clips.items():
            (temporary / split).mkdir(parents=True)
            lists[split] = []
            for i in range(count):
                label = i % len(TOY_CLASSES)
                name = f"{split}/{i:05d}.mp4"
                write_video(temporary / name, toy_clip(label, generator))
                lists[split].append(f"{name} {label}")
                progress.update()
        lists["few"] = lists["train"][:10 * len(TOY_CLASSES)]
        for name, lines in lists.items():
            (temporary / f"{name}.txt").write_text("\n".join(lines) + "\n")
        # If another run was faster, its set is the same
        with contextlib.suppress(OSError):
            temporary.rename(root)


# --- Commands: check and shrink ---------------------------------------------

# FFmpeg's numbers of colour spaces. With UNSPECIFIED, a player assumes the usual one.
RGB = 0
UNSPECIFIED = 2


class Jobs(Dataset):
    """Item `job` is function(job), so that load_batches can share jobs out to workers."""

    def __init__(self, function):
        self.function = function

    def __getitem__(self, job):
        return self.function(job)


def collect_reasons(function, jobs, workers):
    """The reasons that function(job) returns for jobs that failed, each printed at once."""
    reasons = []
    batches = load_batches(Jobs(function), 1, jobs, workers)        # batches [reason] of one job
    for (reason,) in tqdm(batches, total=len(jobs), unit="video"):
        if reason:
            tqdm.write(printable(reason))
            reasons.append(reason)
    return reasons


def upright(frame):
    """The frame, turned and mirrored as its file asks."""
    if not any(orientation(frame)):
        return frame
    # Let assemble() turn it, as a clip of one frame. reformat() keeps its display matrix.
    clips = assemble(clips=[[0]], frames={0: reformat(frame)})
    pixels = clips[0][0].contiguous()                   # [H, W, 3]
    return av.VideoFrame.from_ndarray(pixels.numpy(), format="rgb24")


def timed_frames(source):
    """(frame, time in units of the stream's time base, stream) of all frames of a video.

    Of a folder of images, the time counts frames, and the stream is None.
    """
    if os.path.isdir(source):
        for number, path in enumerate(image_files(source)):
            yield read_image(path), number, None
        return
    with open_video(source) as (container, stream):
        frames = decode_all(stream.codec_context, read_packets(container, stream))
        for number, frame in enumerate(frames):
            refuse_damaged(frame)
            pts = frame.pts
            if pts is None:                             # raw streams have no times
                pts = round(number / (stream.average_rate or 25) / stream.time_base)
            yield frame, pts, stream


def unreadable_reason(path):
    """None, or why the video is unreadable.

    A file that breaks off is readable if what comes before the break decodes. There is one
    exception: without timestamps, a damaged frame at the break makes it unreadable. Damage
    in a frame that an edit list hides may count too.
    """
    try:
        for _ in timed_frames(path):
            pass
    except UnreadableVideo as error:
        return str(error)


def add_shrunk_stream(writer, frame, is_turned, stream, short_side, key_frames):
    """Add to `writer` an H.264 stream for the frames of `stream`, small and fast to decode.

    `frame` is the first of them, upright. `is_turned` tells that rows became columns.
    """
    scale = min(1, short_side / min(frame.width, frame.height))
    width = max(2, round(frame.width * scale / 2) * 2)          # H.264 wants even sizes
    height = max(2, round(frame.height * scale / 2) * 2)
    # Without a B-pyramid no frame refers to a B-frame, so decode_indexed can skip unwanted ones
    options = {"crf": "23", "g": str(key_frames), "tune": "fastdecode",
               "x264-params": "b-pyramid=none"}
    # What is written is YUV, so the tag of an RGB source must not be copied
    colorspace = UNSPECIFIED if frame.colorspace == RGB else frame.colorspace
    rate = stream.average_rate if stream else None
    output = writer.add_stream(
        "libx264", rate=rate or 25, width=width, height=height,
        time_base=stream.time_base if stream else Fraction(1, 25), thread_count=1,
        options=options, colorspace=colorspace, color_range=frame.color_range)
    pixel_aspect = stream.sample_aspect_ratio if stream else None
    if pixel_aspect:
        output.sample_aspect_ratio = 1 / pixel_aspect if is_turned else pixel_aspect
    return output


def write_shrunk(source, target, short_side, key_frames):
    """Re-encode a video into the file `target`. Returns how many frames were written."""
    output = None
    count = 0
    with av.open(str(target), "w", format="mp4") as writer:
        for frame, pts, stream in timed_frames(source):
            _, quarter_turns = orientation(frame)
            is_turned = quarter_turns % 2 == 1
            frame = upright(frame)
            if output is None:
                output = add_shrunk_stream(
                    writer, frame, is_turned, stream, short_side, key_frames)
                start = pts                             # the first frame's time becomes zero
                last = -1
            frame = reformat(frame, "yuv420p", width=output.width, height=output.height)
            last = max(pts - start, last + 1)           # later than the frame before
            frame.pts = last
            # add_shrunk_stream gave the output the source's time base, so times stay as they are
            frame.time_base = output.codec_context.time_base
            frame.pict_type = 0                         # let x264 choose its key frames
            writer.mux(output.encode(frame))
            count += 1
        writer.mux(output.encode())
    return count


def shrink_video(job, short_side, key_frames):
    """Re-encode a video (source, target) as H.264 without audio. Returns None or the reason.

    The short side has at most `short_side` pixels, rounded to an even number. There are
    at most `key_frames` frames from one key frame to the next.
    The number of frames, the times between them and the pixels' aspect ratio stay. Only a time
    that is not later than the one before is moved, to one tick after it. A rotation or
    reflection that the file asks for is carried out. The first frame's time becomes zero.
    """
    source, target = job
    target.parent.mkdir(parents=True, exist_ok=True)
    # In a folder of its own, so that several `shrink` commands can write to one target
    with tempfile.TemporaryDirectory(prefix=".", dir=target.parent) as folder:
        temporary = Path(folder, target.name)
        try:
            written = write_shrunk(source, temporary, short_side, key_frames)
            with open_video(temporary) as (container, stream):
                packets = read_packets(container, stream)
            shown = sum(not packet.is_discard for packet in packets)
            if shown != written:
                raise UnreadableVideo(f"{source}: {written - shown} of {written} frames were lost")
            temporary.replace(target)
        except UnreadableVideo as error:
            return str(error)
        except av.error.FFmpegError as error:
            return f"{source}: {error}"


def shrink(source, target, short_side, key_frames, workers):
    """Re-encode all videos below `source` to <same name>.mp4 below `target`.

    Those already there are left alone. Returns the reasons of those that failed.
    """
    source = Path(source).expanduser().resolve()
    target = Path(target).expanduser().resolve()
    if target.is_relative_to(source) or source.is_relative_to(target):
        raise UserError(f"{source} and {target} are the same folder, or one is inside the other: "
                        "choose another folder to write to")
    jobs = {}
    for path in videos_below(source):
        # If the source is a folder of images, it is itself the only video
        name = path.relative_to(source) if path != source else Path(source.name)
        goal = target / name.with_name(stem_of(name) + ".mp4")
        if goal in jobs:
            raise UserError(f"{path} and {jobs[goal]} would both become {goal}: rename one")
        jobs[goal] = path
    if not jobs:
        raise UserError(f"{source}: there are no videos below this folder")
    todo = [(path, goal) for goal, path in jobs.items() if not goal.exists()]
    print(f"{len(jobs)} videos, {len(jobs) - len(todo)} of them done already")
    function = partial(shrink_video, short_side=short_side, key_frames=key_frames)
    return collect_reasons(function, todo, workers)


def check(lists, root, workers):
    """Decode all videos of the lists. Returns the reasons of those that are unreadable."""
    paths = {}
    for source in lists:
        entries, _ = read_annotations(source, root)
        paths.update((entry.path, None) for entry in entries)       # each video once
    return collect_reasons(unreadable_reason, list(paths), workers)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--workers", type=int, default=os.cpu_count(), help="default: all cores")
    commands = parser.add_subparsers(dest="command", required=True)
    for_check = commands.add_parser("check", parents=[shared], help="name what is unreadable")
    for_check.add_argument("lists", nargs="+", metavar="LIST", help="annotations, as data.train")
    for_check.add_argument("--root", default="", help="folder of the videos, as data.root")
    for_shrink = commands.add_parser("shrink", parents=[shared], help="re-encode a folder")
    for_shrink.add_argument("source", metavar="SRC")
    for_shrink.add_argument("target", metavar="DST")
    for_shrink.add_argument("--short-side", type=int, default=320, help="pixels, at most")
    for_shrink.add_argument("--key-frames", type=int, default=32,
                            help="frames from one key frame to the next")
    options = vars(parser.parse_args())
    if any(number < 1 for number in options.values() if isinstance(number, int)):
        parser.error("--workers, --short-side and --key-frames must be 1 or more")
    command = {"check": check, "shrink": shrink}[options.pop("command")]
    try:
        reasons = command(**options)
    except UserError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit("interrupted; what was done stays")
    print(f"{len(reasons)} unreadable")
    sys.exit(1 if reasons else 0)


if __name__ == "__main__":
    main()
