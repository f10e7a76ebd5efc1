"""Real files through real decoders, annotations as downloaded, and the randomness of a sample."""

import ast
import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from benchmark import moving_pictures, pillow_operation
from conftest import ROOT, assert_equal
from PIL import Image

import data
from data import (
    Entry, UnreadableVideo, UserError, Videos, load_batches, read_annotations, read_clips)


# --- What the file stands on ------------------------------------------------

IMPORTS = {
    "arvideo.py": set(),
    "data.py": set(),
    "train_pretrain.py": {"arvideo", "data"},
    "train_finetune.py": {"arvideo", "data", "train_pretrain"},
}


@pytest.mark.parametrize("name", IMPORTS)
def test_files_import_only_those_below_them(name):
    imported = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.Import):
            imported.update(module.name for module in node.names)
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    ours = {path.stem for path in ROOT.glob("*.py")}
    assert ours >= {"arvideo", "data", "train_pretrain", "train_finetune"}
    assert imported & ours == IMPORTS[name]


def can_exit(node):
    """True if code below this node names SystemExit or a function that ends the program."""
    names = set()
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            names.add(part.id)
        if isinstance(part, ast.Attribute):
            names.add(part.attr)
    return bool(names & {"SystemExit", "exit", "_exit", "quit"})


@pytest.mark.parametrize("name, expected", [("arvideo.py", []), ("data.py", ["main"])])
def test_only_main_ends_the_program(name, expected):
    tree = ast.parse((ROOT / name).read_text())
    exiting = [getattr(node, "name", "no function") for node in tree.body if can_exit(node)]
    assert exiting == expected


# --- Decoding ---------------------------------------------------------------


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def distinct_frames(count, height, width):
    """Windows that move over noise: no two frames are alike, so that a wrong one shows."""
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 255, (height, width + 8 * count, 3), dtype=np.uint8)
    return [np.ascontiguousarray(noise[:, 8 * i:8 * i + width]) for i in range(count)]


def encode(path, count=40, height=48, width=64, codec="libx264", times=None, rotation=0,
           **options):
    """Write a video and return its path. `times` are those of its frames, in 1/25 s.

    `options` are the encoder's, with _ in place of -.
    """
    options = {name.replace("_", "-"): str(value) for name, value in options.items()}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.codec_context.time_base = Fraction(1, 25)
        stream.height = height
        stream.width = width
        stream.pix_fmt = "yuv420p" if width % 2 == 0 else "yuv444p"
        if codec == "mpeg4":
            stream.codec_context.max_b_frames = 2
        if rotation:
            stream.set_display_rotation(rotation)
        for i, pixels in enumerate(distinct_frames(count, height, width)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = times[i] if times else i
            frame.time_base = Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def copy_packets(source, target, first=0, earlier=0, **options):
    """Copy a video without decoding it, from packet `first` on, and return the new path.

    All times become `earlier` frames earlier.
    """
    with av.open(str(source)) as reader, av.open(str(target), "w", **options) as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        packets = [packet for packet in reader.demux(video=0) if packet.dts is not None]
        for packet in packets[first:]:
            shift = earlier * (packet.duration or 1)
            packet.stream = stream
            packet.pts -= shift
            packet.dts -= shift
            writer.mux(packet)
    return target


def decode_everything(path):
    """All frames of a video, uint8 [n, H, W, 3], decoded from its start by PyAV alone."""
    frames = []
    with av.open(str(path), **data.METADATA_OPTIONS) as container:
        for frame in container.decode(container.streams.best("video")):
            pixels = frame.to_ndarray(format="rgb24")
            frames.append(np.rot90(pixels, round(frame.rotation / 90)))
    return torch.from_numpy(np.stack(frames))


def read_frames(path, *numbers):
    """One clip of these frames, [T, H, W, 3]; without numbers, of all frames."""
    clip, = read_clips(path, lambda count: [list(numbers) or list(range(count))])
    return clip


FILES = {
    "b-frames.mp4": dict(bf=3, g=12),
    "variable-rate.mp4": dict(bf=2, times=[i * i // 4 + i for i in range(40)]),
    "open-groups.ts": dict(g=8, bf=3, x264_params="open-gop=1:scenecut=0"),
    "open-groups.mp4": dict(g=8, bf=3, x264_params="open-gop=1:scenecut=0"),
    "intra-refresh.mp4": dict(g=20, bf=2, x264_params="intra-refresh=1"),
    "b-frames.avi": dict(codec="mpeg4", g=12),
    "b-frames.mkv": dict(bf=3, g=12),
    "raw.h264": dict(bf=3, g=12),
    "vp8.webm": dict(codec="libvpx", g=16, cpu_used=8, count=30, auto_alt_ref=1, lag_in_frames=16),
    "vp9.webm": dict(codec="libvpx-vp9", g=16, cpu_used=8, count=30),
    "rotated.mp4": dict(rotation=90),
    "upside-down.mp4": dict(rotation=180),
    "odd-size.mp4": dict(height=33, width=47),
    "two-by-two.mp4": dict(height=2, width=2, count=3),
    "short.mp4": dict(count=5),
    "one-frame.mp4": dict(count=1),
}


def write_edit_list(path):
    """A file whose edit list begins in the middle of a group of pictures."""
    whole = encode(path.with_name("whole.mp4"), g=40, bf=2)
    copy_packets(whole, path, earlier=10)
    assert len(decode_everything(path)) == 30           # ten are hidden
    return path


@pytest.mark.parametrize("name", [*FILES, "edit-list.mp4"])
def test_frames_equal_those_of_a_reader_that_decodes_everything(tmp_path, name):
    path = tmp_path / name
    if name == "edit-list.mp4":
        write_edit_list(path)
    else:
        encode(path, **FILES[name])
    expected = decode_everything(path)
    assert_equal(read_frames(path), expected)

    # Jumps from anywhere to anywhere; a number beyond the end is the last frame again
    generator = np.random.default_rng(1)
    last = len(expected) - 1
    for size in (1, 1, 2, 3, 5, 5):
        wanted = generator.integers(0, len(expected) + 3, size).tolist()
        clamped = [min(number, last) for number in wanted]
        assert_equal(read_frames(path, *wanted), expected[clamped])


def test_several_clips_come_from_one_decode(tmp_path, monkeypatch):
    # Not H.264, which PyAV 17 makes us decode from its start
    path = encode(tmp_path / "video.mp4", codec="libx265", g=10)
    expected = decode_everything(path)
    calls = []
    decode_indexed = data.decode_indexed

    def count_calls(*arguments):
        calls.append(None)
        return decode_indexed(*arguments)

    monkeypatch.setattr(data, "decode_indexed", count_calls)
    first, second = read_clips(path, lambda count: [[3, 5], [5, 30, 31]])
    assert_equal(first, expected[[3, 5]])
    assert_equal(second, expected[[5, 30, 31]])
    assert len(calls) == 1


def write_sound(path):
    """A file without a picture."""
    silence = np.zeros((1, 1024), np.float32)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())


@pytest.fixture
def broken(tmp_path):
    """A folder of unreadable videos, and of good.mp4."""
    good = encode(tmp_path / "good.mp4", g=40, x264_params="scenecut=0")
    content = good.read_bytes()
    middle = len(content) // 2
    damaged = content[:middle - 2000] + bytes(4000) + content[middle + 2000:]
    (tmp_path / "cut.mp4").write_bytes(content[:middle])    # its index, at the end, is lost
    (tmp_path / "damaged.mp4").write_bytes(damaged)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("hello")
    (tmp_path / "codec.mp4").write_bytes(content.replace(b"avc1", b"zzzz"))     # no such codec
    (tmp_path / "folder.mp4").mkdir()
    write_sound(tmp_path / "sound.mp4")
    copy_packets(good, tmp_path / "headless.mp4", first=1)  # without its key frame
    return tmp_path


BROKEN = ["cut", "damaged", "empty", "text", "codec", "folder", "sound", "headless", "absent"]


def test_unreadable_files_are_refused_by_name(broken):
    for stem in BROKEN:
        path = broken / f"{stem}.mp4"
        with pytest.raises(UnreadableVideo, match=path.name):
            read_frames(path)
        assert path.name in data.unreadable_reason(path)
    assert data.unreadable_reason(broken / "good.mp4") is None


@pytest.mark.parametrize("name", ["video.mp4", "video.mkv"])
def test_damage_spreads_to_the_next_key_frame(tmp_path, name):
    # Without B-frames, so that every frame refers to the one before
    path = encode(tmp_path / name, g=20, bf=0, height=96, width=128)
    expected = decode_everything(path)
    # The second half of a frame's packet becomes zero
    with av.open(str(path)) as container:
        packets = list(container.demux(video=0))
    packet = bytes(packets[12])
    next_key_frame = 13
    while not packets[next_key_frame].is_keyframe:
        next_key_frame += 1
    half = len(packet) // 2
    content = path.read_bytes()
    assert content.count(packet) == 1
    path.write_bytes(content.replace(packet, packet[:half] + bytes(len(packet) - half)))
    refused = []
    for i in range(40):
        try:
            assert_equal(read_frames(path, i)[0], expected[i])
        except UnreadableVideo:
            refused.append(i)
    assert refused == list(range(12, next_key_frame))


def test_a_colon_in_a_name_is_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encode(tmp_path / "a:b.mp4")
    assert len(read_frames("a:b.mp4")) == 40


def test_the_beginning_of_a_file_cut_short_is_read(tmp_path):
    whole = encode(tmp_path / "whole.mp4", g=10)
    index_first = copy_packets(whole, tmp_path / "front.mp4", options={"movflags": "faststart"})
    content = index_first.read_bytes()
    half = tmp_path / "half.mp4"
    half.write_bytes(content[:len(content) // 2])
    assert_equal(read_frames(half, 0, 3, 5), decode_everything(whole)[[0, 3, 5]])


def test_an_error_of_the_disk_is_not_the_end_of_a_video(tmp_path):
    path = encode(tmp_path / "video.mp4")

    class FailingDisk:
        def demux(self, stream):
            yield from itertools.islice(container.demux(stream), 20)
            raise av.error.OSError(errno.EIO, "Input/output error")

    with pytest.raises(UnreadableVideo, match="video.mp4: Input/output error"):
        with data.open_video(path) as (container, stream):
            data.read_packets(FailingDisk(), stream)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_two_thousand_reads_leave_no_descriptor_behind(tmp_path):
    good = encode(tmp_path / "good.mp4", count=4)
    unreadable = write(tmp_path / "text.mp4", "hello")
    read_frames(good, 0)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(1000):
        read_frames(good, 1, 3)
        with pytest.raises(UnreadableVideo):
            read_frames(unreadable, 0)
    assert len(os.listdir("/proc/self/fd")) <= before


def test_a_frame_shown_before_a_key_frame_is_decoded_from_the_key_frame_before():
    """An open group of pictures, in the order of the file. Key frames are shown at 0 and 4."""
    packets = [SimpleNamespace(pts=pts, is_keyframe=pts in (0, 4)) for pts in (0, 1, 4, 2, 3, 5)]
    assert data.packets_needed(packets, {2}) == {0, 1, 2, 3}
    assert data.packets_needed(packets, {5}) == {2, 3, 4, 5}
    assert data.packets_needed(packets, {1, 5}) == {0, 1, 2, 3, 4, 5}


# --- Annotations ------------------------------------------------------------


@pytest.fixture
def root(tmp_path):
    """A folder of files with the names of videos."""
    root = tmp_path / "videos"
    for name in ("abc_000010_000020.mp4", "-x y_000000_000010.mp4", "7.webm", "12.mp4",
                 "a b.mp4", "c.mp4"):
        write(root / name, "")
    return root


def names(entries):
    return [(Path(path).name, label) for path, label in entries]


def test_kinetics_csv(tmp_path, root, capsys):
    source = write(tmp_path / "train.csv",
                   "label,youtube_id,time_start,time_end,split\n"
                   "zumba,abc,10,20,train\n"
                   '"air, drumming",-x y,0,10,train\n'
                   "zumba,gone,5,15,train\n")
    entries, classes = read_annotations(source, root)
    assert classes == ["air, drumming", "zumba"]
    assert names(entries) == [("abc_000010_000020.mp4", 1), ("-x y_000000_000010.mp4", 0)]
    printed = capsys.readouterr().err
    assert "1 of 3 videos" in printed
    assert "gone_000005_000015" in printed

    # The training set's class names fix the numbers
    known = ["air, drumming", "between", "zumba"]
    entries, classes = read_annotations(source, root, classes=known)
    assert [entry.label for entry in entries] == [2, 0]
    assert classes == known


def test_something_something_json(tmp_path, root):
    write(tmp_path / "something-something-v2-labels.json",
          json.dumps({"Moving something up": "1", "Holding something": "0"}))
    source = write(tmp_path / "train.json", json.dumps([
        {"id": "7", "template": "Moving [something] up", "label": "moving pen up"},
        {"id": "12", "template": "Holding [something]"}]))
    entries, classes = read_annotations(source, root)
    assert names(entries) == [("7.webm", 1), ("12.mp4", 0)]
    assert classes == ["Holding something", "Moving something up"]


def test_lists_with_and_without_labels(tmp_path, root):
    source = write(tmp_path / "list.txt", "a b.mp4 3\n\nc.mp4\t0\n")
    entries, classes = read_annotations(source, root)
    assert names(entries) == [("a b.mp4", 3), ("c.mp4", 0)]
    assert classes is None

    # 12.avi has become 12.mp4 by `shrink`
    source = write(tmp_path / "bare.txt", f"a b.mp4\n{root / 'c.mp4'}\n12.avi\n")
    entries, classes = read_annotations(source, root)
    assert names(entries) == [("a b.mp4", None), ("c.mp4", None), ("12.mp4", None)]


def test_lists_are_relative_to_their_own_folder_too(tmp_path, root):
    source = write(root / "list.txt", "c.mp4 0\n")
    write(root / "classes.txt", "waving\n")
    for given in ("", tmp_path):
        entries, classes = read_annotations(source, given)
        assert names(entries) == [("c.mp4", 0)]
        assert classes == ["waving"]


def test_class_folders(tmp_path):
    for name in ("wave/b.mp4", "wave/a.avi", "clap/deep/c.webm", "clap/notes.txt"):
        write(tmp_path / name, "")
    expected = [("c.webm", 0), ("a.avi", 1), ("b.mp4", 1)]
    entries, classes = read_annotations(tmp_path)
    assert names(entries) == expected
    assert classes == ["clap", "wave"]

    # A class folder may be a link. A link that leads back up is not followed.
    (tmp_path / "wink").symlink_to(tmp_path / "clap")
    (tmp_path / "wave" / "up").symlink_to(tmp_path)
    entries, _ = read_annotations(tmp_path)
    assert names(entries) == [*expected, ("c.webm", 2)]


def test_labels_are_not_taken_for_class_folders_in_another_order(tmp_path):
    for i in range(11):
        write(tmp_path / "train" / str(i) / "a.mp4", "")
    _, classes = read_annotations(tmp_path / "train")
    assert classes[:4] == ["0", "1", "10", "2"]
    write(tmp_path / "b.mp4", "")
    val = write(tmp_path / "val.txt", "b.mp4 2\n")
    with pytest.raises(UserError, match="val.txt: a label 2 would mean the known class '10'"):
        read_annotations(val, classes=classes)
    # Up to ten such folders stand in the order of their numbers
    entries, _ = read_annotations(val, classes=sorted(classes, key=int)[:10])
    assert names(entries) == [("b.mp4", 2)]


def test_a_list_is_the_same_after_its_videos_were_moved_or_shrunk():
    old = [Entry("/old/a.webm", 0), Entry("/old/frames/7.5", 1)]          # 7.5 holds images
    new = [Entry("/small/a.mp4", 0), Entry("/small/frames/7.5.mp4", 1)]
    assert data.hash_of_list(new) == data.hash_of_list(old)
    for other in (new[::-1], new[:1], [new[0], Entry("/small/frames/7.5.mp4", 0)]):
        assert data.hash_of_list(other) != data.hash_of_list(old)


def test_a_folder_of_videos_has_no_labels(tmp_path):
    for name in ("b.mp4", "a.webm", "notes.txt"):
        write(tmp_path / name, "")
    entries, classes = read_annotations(tmp_path)
    assert names(entries) == [("a.webm", None), ("b.mp4", None)]
    assert classes is None

    # A folder beside videos is no class: the videos beside it would have none
    write(tmp_path / "more" / "c.mp4", "")
    entries, _ = read_annotations(tmp_path)
    assert names(entries) == [("a.webm", None), ("b.mp4", None), ("c.mp4", None)]


CSV_HEADER = "label,youtube_id,time_start,time_end\n"


@pytest.mark.parametrize("name, text, culprit", [
    ("list.txt", "c.mp4 0\na b.mp4\n", "list.txt:2: expected `path label`.*a b.mp4"),
    ("list.txt", "a b.mp4\nc.mp4 1\n", "list.txt:2: expected .*`path`.*c.mp4 1"),
    ("list.txt", "c.mp4 waving\n", "list.txt:1: expected `path label`.*one number.*waving"),
    ("list.txt", "", "the annotation file is empty"),
    ("list.txt", "gone.mp4 0\n", "none of its 1 videos is under .*gone.mp4"),
    # Lists of a missing video whose start resembles JSON, or the header of Kinetics' CSV
    ("list.txt", "[1] gone.mp4 0\n", r"none of its 1 videos is under .*\[1\] gone.mp4"),
    ("list.txt", "youtube_id/gone.mp4 0\n",
     "none of its 1 videos is under .*youtube_id/gone.mp4"),
    ("list.csv", CSV_HEADER, "it lists no videos"),
    ("list.csv", "label,youtube_id,time_start\n", "the column time_end is missing"),
    ("list.csv", CSV_HEADER + "a,abc,ten,20\n",
     "list.csv:2: expected a label, a youtube_id and two times, found: a,abc,ten,20"),
    ("list.json", '[{"id": "7"}]', "expected a JSON list of objects with `id` and `template`"),
    ("list.json", '[{"id": "7", "template": "Eating [something]"}]',
     "class 'Eating something' is not among"),
    ("list.json", "[{", "expected a JSON list"),
    ("list.json", '[\n"7"]', "expected a JSON list"),
    # Here the annotations are themselves the labels.json that should lie beside them
    ("labels.json", '[{"id": "7", "template": "Holding [something]"}]',
     "labels.json: expected a JSON object of class names"),
])
def test_bad_annotations_are_named(tmp_path, root, name, text, culprit):
    write(tmp_path / "labels.json", '{"Holding something": "0"}')
    source = write(tmp_path / name, text)
    with pytest.raises(UserError, match=culprit):
        read_annotations(source, root)


def test_annotations_that_are_no_text_or_absent_are_named(tmp_path):
    source = tmp_path / "list.txt"
    source.write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match="list.txt: this is not a text file in UTF-8"):
        read_annotations(source)
    with pytest.raises(UserError, match="gone.txt: there is no such annotation file"):
        read_annotations(tmp_path / "gone.txt")


def test_something_somethings_classes_are_in_the_order_of_their_numbers(tmp_path):
    # Neither the order of the file nor that of the numbers as text, in which 10 precedes 2
    numbers = {f"Class {letter}": str(10 - i) for i, letter in enumerate("abcdefghijk")}
    write(tmp_path / "labels.json", json.dumps(numbers))
    write(tmp_path / "7.webm", "")
    source = write(tmp_path / "train.json", json.dumps([{"id": "7", "template": "Class [i]"}]))
    entries, classes = read_annotations(source)
    assert classes == [f"Class {letter}" for letter in "kjihgfedcba"]
    assert names(entries) == [("7.webm", 2)]


# --- Choosing frames, augmentation ------------------------------------------


def test_dense_clips_have_the_exact_stride_and_start_anywhere():
    drawn = {tuple(data.dense_clips(20, 4, 3)[0]) for _ in range(500)}
    assert drawn == {(start, start + 3, start + 6, start + 9) for start in range(11)}
    # Too short: the reader repeats the last frame
    assert data.dense_clips(5, 4, 3, clips=2) == [[0, 3, 6, 9], [0, 3, 6, 9]]


def test_multi_scale_crop_takes_videomaes_sizes_and_positions():
    # Every pixel holds its own row and column. Crops are only enlarged, so the least and the
    # greatest value of each stay.
    rows, columns = torch.meshgrid(torch.arange(100.0), torch.arange(160.0), indexing="ij")
    clip = torch.stack((rows, columns, rows))[None]
    sizes = set()
    corners = set()
    for _ in range(1500):
        rows, columns, _ = data.pretraining_clip(clip, 200, flip=False)[0]
        top = int(rows.min())
        left = int(columns.min())
        height = int(rows.max()) + 1 - top
        width = int(columns.max()) + 1 - left
        sizes.add((height, width))
        if height == width == 66:
            corners.add((left / ((160 - 66) // 4), top / ((100 - 66) // 4)))

    scales = (100, 87, 75, 66)
    neighbours = {(a, b) for i, a in enumerate(scales) for b in scales[max(i - 1, 0):i + 2]}
    assert sizes == neighbours
    grid = {(x, y) for x in (0, 2, 4) for y in (0, 2, 4)}
    assert corners == grid | {(1, 1), (3, 1), (1, 3), (3, 3)}


def test_tiny_videos_can_be_cropped():
    pixel = torch.zeros(2, 3, 1, 1, dtype=torch.uint8)
    assert data.pretraining_clip(pixel, 32, flip=False).shape == (2, 3, 32, 32)


def test_the_frames_of_segments_are_drawn_independently():
    torch.manual_seed(0)
    offsets = torch.tensor(data.segment_clips(1600, 16, 200)) % 100             # [200, 16]
    assert (offsets.float().std(1) > 10).all()
    assert offsets.min() < 5
    assert offsets.max() > 94


def test_a_flip_swaps_left_and_right_half_the_time():
    torch.manual_seed(0)
    clip = torch.arange(6).view(1, 1, 2, 3)
    flipped = [data.random_flip(clip) for _ in range(400)]
    same = sum(torch.equal(result, clip) for result in flipped)
    mirrored = sum(torch.equal(result, clip[..., [2, 1, 0]]) for result in flipped)
    assert same + mirrored == 400
    assert 150 < same < 250


@pytest.mark.parametrize("flip, outcomes", [(False, 1), (True, 2)])
def test_crop_area_can_ask_for_the_whole_frame_and_only_flip_mirrors(flip, outcomes):
    torch.manual_seed(0)
    clip = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8)
    found = {data.finetuning_clip(clip, 32, flip, [1.0, 1.0], (0, 0.0), 0.0).numpy().tobytes()
             for _ in range(30)}
    assert clip.numpy().tobytes() in found
    assert len(found) == outcomes


def test_half_of_the_operations_are_kept_with_strengths_around_the_magnitude():
    torch.manual_seed(0)
    operations, levels, signs = zip(*data.draw_operations(4000, 7.0))
    assert 1850 < len(operations) < 2150
    assert set(operations) == set(data.RAND_AUGMENT)
    assert set(signs) == {1, -1}
    levels = torch.tensor(levels)
    assert levels.mean().item() == pytest.approx(0.7, abs=0.01)
    assert levels.std().item() == pytest.approx(0.05, abs=0.005)


WARPS = {"rotate", "shear x", "shear y", "move x", "move y"}


@pytest.fixture(scope="module")
def clips_to_augment():
    """Clips uint8 [T, 3, H, W], as decoded: pictures, noise, a dim and a plain frame."""
    pictures = torch.stack(list(moving_pictures(2, 96, 128, rate=25)))
    noise = torch.randint(256, (2, 37, 51, 3), generator=torch.Generator().manual_seed(0))
    dim = 90 + noise // 4
    dim[1] = torch.tensor([200, 40, 40])                # every plane has one value
    return [clip.byte().permute(0, 3, 1, 2) for clip in (pictures, noise, dim)]


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("level", [0.0, 0.13, 0.7, 0.99])
@pytest.mark.parametrize("name", data.RAND_AUGMENT)
def test_an_operation_gives_pillows_pixels(name, level, sign, clips_to_augment):
    for clip in clips_to_augment:
        result = data.rand_augment(clip, [(name, level, sign)])
        frames = [Image.fromarray(frame.numpy()) for frame in clip.permute(0, 2, 3, 1)]
        frames = [np.array(pillow_operation(frame, name, level, sign)) for frame in frames]
        expected = torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
        difference = (result.int() - expected.int()).abs()
        if name in WARPS:
            # Where pixels come from the very border, the two may disagree whether that is outside
            assert (difference > 1).float().mean() < 0.002
            assert difference.float().mean() < 0.1
        else:
            assert difference.max() <= 1


def test_tiny_videos_can_be_augmented():
    for H, W in ((1, 1), (2, 2), (1, 5)):
        clip = torch.full((2, 3, H, W), 77, dtype=torch.uint8)
        for name in data.RAND_AUGMENT:
            assert data.rand_augment(clip, [(name, 0.7, 1)]).shape == clip.shape


def test_normalise():
    white = torch.full((1, 3, 2, 4, 4), 255, dtype=torch.uint8)
    blue = data.normalise(white, "cpu")[0, 2]
    torch.testing.assert_close(blue, torch.full((2, 4, 4), (1 - 0.406) / 0.225))


# --- Samples, order, unreadable videos --------------------------------------


def toy_videos(toy, seed=0, clips=1):
    entries, _ = read_annotations(toy / "train.txt")
    choose = partial(data.dense_clips, frames=8, stride=1, clips=clips)
    augment = partial(data.pretraining_clip, size=32, flip=True)
    return Videos(entries, choose, augment, seed)


def test_the_toy_set_is_the_same_when_made_twice(toy, tmp_path):
    again = tmp_path / "again"
    data.make_toy_set(again, {"train": 24, "val": 13})
    files = [path.relative_to(toy) for path in toy.rglob("*") if path.is_file()]
    lists = {path.name for path in toy.iterdir() if path.is_file()}
    assert lists == {"train.txt", "val.txt", "few.txt", "classes.txt"}
    assert len(files) == 24 + 13 + len(lists)
    for name in files:
        assert (toy / name).read_bytes() == (again / name).read_bytes(), name


def test_toy_motions_are_what_their_classes_say():
    # The flow of every motion, (right, down), at every pixel
    y, x = torch.meshgrid(torch.arange(40.0) - 19.5, torch.arange(40.0) - 19.5, indexing="ij")
    flows = {
        "left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1),
        "clockwise": (-y / 10, x / 10), "anticlockwise": (y / 10, -x / 10),
        "growing": (x / 10, y / 10), "shrinking": (-x / 10, -y / 10)}
    generator = torch.Generator().manual_seed(0)
    for motion, name in enumerate(data.TOY_CLASSES):
        votes = dict.fromkeys(data.TOY_CLASSES, 0.0)
        for _ in range(4):
            frames = data.toy_clip(motion, generator).float().mean(-1)      # [T, H, W]
            change = frames[1:] - frames[:-1]
            middle = (frames[1:] + frames[:-1]) / 2
            slope_down, slope_right = torch.gradient(middle, dim=(1, 2))
            for candidate, (right, down) in flows.items():
                # What moves keeps its brightness
                expected = -(slope_right * right + slope_down * down)
                votes[candidate] += ((expected * change).mean() / expected.norm()).item()
        assert max(votes, key=votes.get) == name


@pytest.mark.slow
def test_samples_depend_on_seed_epoch_and_sample_alone(toy):
    order = [(0, 3), (1, 3), (0, 5), (0, 7)]
    here = list(load_batches(toy_videos(toy), 2, order, 0, data.collate))
    torch.rand(5)
    by_workers = list(load_batches(toy_videos(toy), 2, order, 2, data.collate))
    assert len(here) == len(by_workers) == 2
    for a, b in zip(here, by_workers):
        assert_equal(a.clips, b.clips)
        assert_equal(a.labels, b.labels)
        assert a.unreadable == b.unreadable == []

    alone = toy_videos(toy)[0, 5].clips
    assert_equal(alone, here[1].clips[:1])
    assert not torch.equal(here[0].clips[0], here[0].clips[1])      # another epoch, another clip
    assert not torch.equal(toy_videos(toy, seed=1)[0, 5].clips, alone)


def test_sampling_leaves_the_callers_generator_alone(toy):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    toy_videos(toy)[0, 1]
    assert_equal(torch.rand(1), expected)


def test_several_clips_of_a_video_share_its_label(toy):
    videos = toy_videos(toy, clips=2)
    clips, labels, unreadable = data.collate([videos[0, 1], videos[0, 2]])
    assert clips.shape == (4, 3, 8, 32, 32)
    assert clips.dtype == torch.uint8
    assert labels.tolist() == [1, 1, 2, 2]
    assert unreadable == []
    assert_equal(clips[2:], videos[0, 2].clips)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_training_order_is_the_same_for_any_world_size_and_restart(world_size):
    """22 videos in batches of 4 over 3 epochs: 5 steps an epoch, and 2 videos are left out."""
    def read(first_step, world_size):
        """What is read from this step on, in the order of the global batch."""
        ranks = []
        for rank in range(world_size):
            order = list(data.training_order(22, 4, first_step, 15, 7, rank, world_size))
            assert len(order) == (15 - first_step) * 4 // world_size
            ranks.append(order)
        return [sample for samples in zip(*ranks) for sample in samples]

    whole = read(0, 1)
    assert read(0, world_size) == whole
    assert read(7, world_size) == whole[7 * 4:]
    orders = []
    for epoch in range(3):
        samples = whole[epoch * 20:(epoch + 1) * 20]
        assert {sample_epoch for sample_epoch, _ in samples} == {epoch}
        orders.append([i for _, i in samples])
        assert len(set(orders[-1])) == 20
    assert orders[0] != orders[1]


def test_another_video_is_drawn_for_an_unreadable_one(toy, tmp_path):
    unreadable = str(write(tmp_path / "unreadable.mp4", "hello"))
    videos = toy_videos(toy)
    videos.entries[4] = Entry(unreadable, 4)
    sample = videos[0, 4]
    assert sample.clips.shape == (1, 3, 8, 32, 32)
    assert len(sample.unreadable) == 1
    assert "unreadable.mp4" in sample.unreadable[0]
    assert_equal(videos[0, 4].clips, sample.clips)          # the same one every time

    # Clip and label are both those of the video that was drawn instead
    videos.entries = [Entry(unreadable, 4), Entry(videos.entries[3].path, 3)]
    assert videos[0, 0].label == 3


def test_too_many_unreadable_videos_leave_a_batch_without_clips(toy, tmp_path):
    unreadable = str(write(tmp_path / "unreadable.mp4", "hello"))
    readable = toy_videos(toy)[0, 0]
    videos = toy_videos(toy)
    videos.entries = [Entry(unreadable, 0)] * 5
    sample = videos[0, 0]
    assert sample.clips is None
    assert len(sample.unreadable) == Videos.TRIES
    batch = data.collate([readable, sample])
    assert batch.clips is None
    assert batch.unreadable == sample.unreadable


# --- Worker processes -------------------------------------------------------


class Squares:
    """A dataset whose item `failing` raises `error`."""

    def __init__(self, failing=None, error=None):
        self.failing = failing
        self.error = error

    def __getitem__(self, i):
        if i == self.failing:
            raise self.error
        return i * i


@pytest.mark.slow
def test_batches_are_the_same_with_and_without_workers():
    order = [3, 1, 4, 1, 5, 9, 2, 6]
    here = list(load_batches(Squares(), 3, order, 0))
    by_workers = list(load_batches(Squares(), 3, order, 2))
    assert here == by_workers == [[9, 1, 16], [1, 25, 81], [4, 36]]


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [ValueError, RuntimeError, OSError, EOFError])
def test_an_error_of_the_dataset_keeps_its_kind_and_its_message(kind, workers):
    batches = load_batches(Squares(4, kind("four is bad")), 1, range(8), workers)
    assert [next(batches) for _ in range(4)] == [[0], [1], [4], [9]]
    with pytest.raises(kind, match="four is bad"):
        next(batches)


SERVER_OUTLIVES_SIGTERM = """
import os, signal, time
from multiprocessing import forkserver

import data

if __name__ == "__main__":
    batches = data.load_batches(range(8), 2, range(8), 1, context="forkserver")
    assert next(batches) == [0, 1]
    server = forkserver._forkserver._forkserver_pid
    os.kill(server, signal.SIGTERM)
    time.sleep(0.2)
    assert os.waitpid(server, os.WNOHANG) == (0, 0)         # it has not ended
    assert next(batches) == [2, 3]
"""


@pytest.mark.slow
def test_a_fork_server_outlives_the_sigterm_that_a_cluster_sends_to_all(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SERVER_OUTLIVES_SIGTERM)
    subprocess.run([sys.executable, script], check=True, timeout=120)


TWO_WORKERS = """
import multiprocessing, sys, time
from multiprocessing import forkserver

import data

if __name__ == "__main__":
    batches = data.load_batches(range(999), 2, range(999), 2, context=sys.argv[1])
    next(batches)
    processes = [worker.pid for worker in multiprocessing.active_children()]
    if sys.argv[1] == "forkserver":
        processes.append(forkserver._forkserver._forkserver_pid)
    print(*processes, flush=True)
    time.sleep(999)
"""


def has_ended(pid):
    """It does not exist, or is a zombie, which nobody has asked for its exit status."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs /proc")
@pytest.mark.parametrize("context", ["fork", "forkserver"])
def test_a_killed_training_leaves_no_process_behind(tmp_path, context):
    script = tmp_path / "script.py"
    script.write_text(TWO_WORKERS)
    command = [sys.executable, script, context]
    training = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    processes = training.stdout.readline().split()
    assert len(processes) == (3 if context == "forkserver" else 2)
    assert not any(map(has_ended, processes))
    training.kill()
    training.wait()
    training.stdout.close()
    deadline = time.monotonic() + 60
    while not all(map(has_ended, processes)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def kill_this_process(_):
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_a_killed_worker_is_reported():
    with pytest.raises(UserError, match="a worker process has ended"):
        data.collect_reasons(kill_this_process, [1], 2)


# --- Commands ---------------------------------------------------------------


def timed_frames(path):
    """[(seconds, pixels [H, W, 3]), ...]"""
    with av.open(str(path)) as container:
        return [(float(frame.pts * frame.time_base), frame.to_ndarray(format="rgb24"))
                for frame in container.decode(video=0)]


def key_frames(path):
    """The numbers of a video's key frames."""
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
    return [i for i, packet in enumerate(packets) if packet.is_keyframe]


def names_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


@pytest.fixture
def to_shrink(tmp_path):
    """A folder of three videos and an unreadable one."""
    folder = tmp_path / "in"
    (folder / "deep").mkdir(parents=True)
    uneven = [3 * i + i % 2 for i in range(40)]
    encode(folder / "deep" / "a.mp4", height=96, width=128, bf=2, times=uneven)
    encode(folder / "b.avi", codec="mpeg4")
    encode(folder / "turned.mp4", rotation=90)
    write(folder / "unreadable.webm", "hello")
    return folder


@pytest.mark.slow
def test_shrink_keeps_frames_and_times(to_shrink, tmp_path):
    target = tmp_path / "out"
    reason, = data.shrink(to_shrink, target, short_side=48, key_frames=8, workers=2)
    assert "unreadable.webm" in reason
    assert names_below(target) == ["b.mp4", "deep/a.mp4", "turned.mp4"]

    before = timed_frames(to_shrink / "deep" / "a.mp4")
    after = timed_frames(target / "deep" / "a.mp4")
    assert [round(time, 4) for time, _ in before] == [round(time, 4) for time, _ in after]
    assert after[0][1].shape == (48, 64, 3)
    keys = key_frames(target / "deep" / "a.mp4")
    assert max(later - earlier for earlier, later in zip(keys, keys[1:])) <= 8

    small = timed_frames(target / "b.mp4")
    assert len(small) == 40
    assert small[0][1].shape == (48, 64, 3)

    upright = read_frames(to_shrink / "turned.mp4", 0).float()
    turned = read_frames(target / "turned.mp4", 0).float()
    assert (turned - upright).abs().mean() < 12


def test_shrink_enlarges_nothing(tmp_path):
    (tmp_path / "in").mkdir()
    encode(tmp_path / "in" / "a.mp4")
    assert data.shrink(tmp_path / "in", tmp_path / "out", 96, 8, workers=0) == []
    assert read_frames(tmp_path / "out" / "a.mp4", 0).shape == (1, 48, 64, 3)


def test_shrink_leaves_alone_what_is_done(to_shrink, tmp_path, capsys):
    target = tmp_path / "out"
    shrink = partial(data.shrink, to_shrink, short_side=48, key_frames=8, workers=0)
    shrink(target)
    before = (target / "b.mp4").stat().st_mtime_ns
    capsys.readouterr()
    shrink(target)
    assert (target / "b.mp4").stat().st_mtime_ns == before
    assert "3 of them done already" in capsys.readouterr().out


@pytest.mark.parametrize("rotation", [0, 90])
def test_shrink_keeps_colours(tmp_path, rotation):
    """Of a video in BT.709 and full range, as phones write them.

    Players take an untagged video for one in BT.601 and limited range.
    """
    source = tmp_path / "in" / "red.mp4"
    source.parent.mkdir()
    with av.open(str(source), "w") as container:
        stream = container.add_stream(
            "libx264", rate=25, width=64, height=48, colorspace=1, color_range=2)
        stream.set_display_rotation(rotation)
        pixels = np.full((48, 64, 3), (200, 20, 20), np.uint8)
        red = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        red = red.reformat(format="yuv420p", dst_colorspace=1, dst_color_range=2)
        container.mux(stream.encode(red))
        container.mux(stream.encode())
    assert data.shrink(source.parent, tmp_path / "out", 48, 8, workers=0) == []
    before = read_frames(source, 0)[0, 20, 20].int()
    after = read_frames(tmp_path / "out" / "red.mp4", 0)[0, 20, 20].int()
    assert (before - torch.tensor([200, 20, 20])).abs().max() < 5
    assert (before - after).abs().max() < 5


def test_shrink_does_not_tag_yuv_as_rgb(tmp_path):
    """The frames of libx264rgb are RGB, and say so. What is written is not."""
    source = tmp_path / "in" / "red.mp4"
    source.parent.mkdir()
    with av.open(str(source), "w") as container:
        stream = container.add_stream("libx264rgb", rate=25, width=64, height=48, pix_fmt="rgb24")
        pixels = np.full((48, 64, 3), (200, 20, 20), np.uint8)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    assert data.shrink(source.parent, tmp_path / "out", 48, 8, workers=0) == []
    shrunk = tmp_path / "out" / "red.mp4"
    with av.open(str(shrunk)) as container:
        assert next(container.decode(video=0)).colorspace != data.RGB
    after = read_frames(shrunk, 0)[0, 20, 20].int()
    assert (after - torch.tensor([200, 20, 20])).abs().max() < 5


@pytest.mark.slow
def test_check_names_every_unreadable_video_once(broken, capsys):
    """Of two lists that share one unreadable video."""
    first = write(broken / "first.txt", "good.mp4\ndamaged.mp4\n")
    second = write(broken / "second.txt", "damaged.mp4\ntext.mp4\ngood.mp4\n")
    reasons = data.check([first, second], "", workers=2)
    assert len(reasons) == 2
    assert "damaged.mp4" in reasons[0]
    assert "text.mp4" in reasons[1]
    printed = capsys.readouterr().out
    assert all(reason in printed for reason in reasons)
