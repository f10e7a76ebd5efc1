"""Videos and lists that are easily read wrong: each is read right, or refused by name."""

import json
import os
import random
import re
import shutil
import signal
import time
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
import pytest
import torch
from PIL import Image

import data
from conftest import Script, pretrain, toy_lists
from data import UnreadableVideo, UserError, read_annotations, read_clips

COUNT = 24              # frames of a video
HEIGHT = 48
WIDTH = 64


# --- Making videos ----------------------------------------------------------


def pictures(count=COUNT, height=HEIGHT, width=WIDTH):
    """uint8 [count, H, W, 3]: a window that moves over coarse noise, so no two are alike."""
    generator = np.random.default_rng(0)
    rows = height // 8 + 1
    columns = (width + 8 * count) // 8 + 1
    noise = generator.integers(0, 255, (rows, columns, 3), dtype=np.uint8)
    noise = noise.repeat(8, axis=0).repeat(8, axis=1)
    frames = [noise[:height, 8 * i:8 * i + width] for i in range(count)]
    return np.stack(frames)


ENCODER_OPTIONS = {
    "libx264": {"x264-params": "scenecut=0"},
    "libx265": {"x265-params": "scenecut=0:pools=none:frame-threads=1:log-level=none"},
    "libvpx": {"cpu-used": "8"},
    "libvpx-vp9": {"cpu-used": "8"},
    "libsvtav1": {"preset": "12", "svtav1-params": "lp=1"},
}
PIXEL_FORMATS = {"prores": "yuv422p10le", "mjpeg": "yuvj420p"}


def encode(path, codec="libx264", b_frames=0, key_frames=8, size=(HEIGHT, WIDTH), shape=None,
           **options):
    """Write `pictures` as a video and return its path.

    `shape` is the sample aspect ratio. `options` are the encoder's, with _ in place of -.
    """
    options = {name.replace("_", "-"): value for name, value in options.items()}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(
            codec, rate=25, options={**ENCODER_OPTIONS.get(codec, {}), **options})
        stream.height, stream.width = size
        stream.pix_fmt = PIXEL_FORMATS.get(codec, "yuv420p")
        stream.codec_context.thread_count = 1
        stream.codec_context.gop_size = key_frames
        stream.codec_context.max_b_frames = b_frames
        if shape:
            stream.sample_aspect_ratio = shape
        for i, pixels in enumerate(pictures(COUNT, *size)):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = i
            frame.time_base = Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def copy_packets(source, target, first=0, later=0, decoding_times=False, **options):
    """Copy a video without decoding it, from packet `first` on, and return the new path.

    All times become `later` frames later. With `decoding_times` every frame is shown at the
    time at which it is decoded.
    """
    with av.open(str(source)) as reader, av.open(str(target), "w", options=options) as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        packets = [packet for packet in reader.demux(video=0) if packet.size]
        for packet in packets[first:]:
            shift = round(later / 25 / packet.time_base)
            packet.stream = stream
            packet.pts += shift
            packet.dts += shift
            if decoding_times:
                packet.pts = packet.dts
            writer.mux(packet)
    return target


def list_packets(path):
    with av.open(str(path)) as container:
        return [packet for packet in container.demux(video=0) if packet.size]


def patch(path, old, new):
    """Replace bytes that occur once in a file."""
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


def cut_end(path, size):
    """Leave out the last `size` bytes of a file."""
    path.write_bytes(path.read_bytes()[:-size])


def set_matrix(path, a, b, c, d):
    """Set the display matrix of an MP4: it takes a point (x, y) to (a x + c y, b x + d y)."""
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44            # behind the version, times, number, layer, volume
    numbers = [a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30]
    matrix = b"".join(number.to_bytes(4, "big", signed=True) for number in numbers)
    assert content[at:at + 4] == (1 << 16).to_bytes(4, "big")
    content[at:at + 36] = matrix
    path.write_bytes(content)


# What each matrix makes of a picture [H, W, 3]
ORIENTATIONS = {
    (1, 0, 0, 1): lambda picture: picture,
    (0, 1, -1, 0): lambda picture: np.rot90(picture, -1),           # clockwise
    (-1, 0, 0, -1): lambda picture: np.rot90(picture, 2),
    (0, -1, 1, 0): lambda picture: np.rot90(picture, 1),            # anticlockwise
    (-1, 0, 0, 1): lambda picture: picture[:, ::-1],                # mirrored
    (1, 0, 0, -1): lambda picture: picture[::-1],                   # upside-down
    (0, 1, 1, 0): lambda picture: picture.transpose(1, 0, 2),
    (0, -1, -1, 0): lambda picture: np.rot90(picture, 2).transpose(1, 0, 2),
}


# A video of fields cannot be made with FFmpeg's encoders. So its bits are written here:
# H.264 whose blocks are not compressed (I_PCM).


class Bits:
    """A string of bits, written as H.264 writes numbers."""

    def __init__(self):
        self.text = ""

    def fixed(self, size, *numbers):
        self.text += "".join(format(number, f"0{size}b") for number in numbers)

    def golomb(self, *numbers):
        for number in numbers:
            digits = format(number + 1, "b")
            self.text += "0" * (len(digits) - 1) + digits

    def align(self):
        self.text += "0" * (-len(self.text) % 8)

    def unit(self, kind):
        """A NAL unit of this kind that holds the bits."""
        self.text += "1"
        self.align()
        content = int(self.text, 2).to_bytes(len(self.text) // 8, "big")
        # Three bytes that look like a start code get a 3 between them
        content = re.sub(rb"\0\0(?=[\0-\3])", b"\0\0\3", content)
        return b"\0\0\0\1" + bytes([kind]) + content


def h264_header(height, width):
    """Sequence and picture parameters of an interlaced video."""
    sequence = Bits()
    sequence.fixed(8, 77, 0, 30)                        # main profile, level 3
    sequence.golomb(0, 0, 0, 4, 1)                      # frame_num: 4 bits, order: 8; 1 reference
    sequence.fixed(1, 0)
    sequence.golomb(width // 16 - 1, height // 32 - 1)
    sequence.fixed(1, 0, 0, 1, 0, 0)                    # not only frames
    picture = Bits()
    picture.golomb(0, 0)
    picture.fixed(1, 0, 0)
    picture.golomb(0, 0, 0)
    picture.fixed(1, 0, 0, 0)
    picture.golomb(0, 0, 0)
    picture.fixed(1, 0, 0, 0)
    return sequence.unit(0x67) + picture.unit(0x68)


def h264_picture(luma, number, field=None):
    """A grey picture [H, W]: frame `number`, or its field 0 (top) or 1 (bottom)."""
    is_idr = number == 0 and field != 1
    bits = Bits()
    bits.golomb(0, 7, 0)                                # an intra slice
    bits.fixed(4, number % 16)
    if field is None:
        bits.fixed(1, 0)
    else:
        bits.fixed(1, 1, field)
    if is_idr:
        bits.golomb(0)
    bits.fixed(8, (2 * number + (field or 0)) % 256)
    bits.fixed(1, *([0, 0] if is_idr else [0]))
    bits.golomb(0)
    for top in range(0, luma.shape[0], 16):
        for left in range(0, luma.shape[1], 16):
            block = luma[top:top + 16, left:left + 16]
            bits.golomb(25)                             # not compressed
            bits.align()
            bits.fixed(8, *block.flatten().tolist(), *[128] * 128)
    return bits.unit(0x65 if is_idr else 0x61)


def write_fields(path, first_field=0):
    """A video of grey frames. From frame `first_field` on, each field has a packet."""
    lumas = pictures(COUNT, 64, 64)[..., 0] // 2 + 64
    header = h264_header(64, 64)
    packets = []                                        # (time in half frames, bytes)
    for i, luma in enumerate(lumas):
        if i < first_field:
            packets.append((2 * i, header + h264_picture(luma, i)))
        else:
            packets.append((2 * i, header + h264_picture(luma[0::2], i, 0)))
            packets.append((2 * i + 1, h264_picture(luma[1::2], i, 1)))
    raw = path.with_name("raw.h264")
    raw.write_bytes(b"".join(content for _, content in packets))
    with av.open(str(raw)) as reader, av.open(str(path), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for at, content in packets:
            packet = av.Packet(content)
            packet.stream = stream
            packet.time_base = Fraction(1, 50)
            packet.pts = packet.dts = at
            packet.is_keyframe = at == 0
            writer.mux(packet)
    return path


# --- The reference, and what must agree with it -----------------------------


def decode(path, matrix=(1, 0, 0, 1)):
    """All frames of a video [n, H, W, 3], from its start to a break, by PyAV alone.

    Turned as `matrix` says, which is not looked for in the file.
    """
    frames = []
    with av.open(str(path), metadata_errors="ignore") as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        packets = []
        try:
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    break
                if packet.size:
                    packets.append(packet)
        except av.error.InvalidDataError:
            pass
        for packet in [*packets, None]:
            frames += stream.codec_context.decode(packet)
    upright = ORIENTATIONS[matrix]
    return np.stack([upright(frame.to_ndarray(format="rgb24")) for frame in frames])


def read_all(path):
    clip, = read_clips(path, lambda count: [list(range(count))])
    return clip.numpy()


def read_one(path, number):
    clip, = read_clips(path, lambda count: [[number]])
    return clip.numpy()[0]


def assert_shrinks(path, expected):
    """What `shrink` makes of the video holds all its frames, each in its turn, upright."""
    target = path.with_name("shrunk.mp4")
    assert data.shrink_video((path, target), min(expected.shape[1:3]), 8) is None
    shrunk = decode(target).astype(int)
    assert shrunk.shape == expected.shape
    for i, frame in enumerate(shrunk):
        distances = np.abs(expected - frame).mean((1, 2, 3))
        assert distances.argmin() == i
        assert distances[i] < 16


def assert_read(path, expected):
    """All ways to read a video agree with these frames, bit for bit, and so do the commands."""
    np.testing.assert_array_equal(read_all(path), expected)
    last = len(expected) - 1
    chance = random.Random(0)

    # Windows and single frames that may lie partly or wholly beyond the end
    starts = [chance.randrange(last + 3) for _ in range(5)]
    wanted = [data.window(start, 16, 4) for start in starts]
    wanted += [[chance.randrange(last + 3)] for _ in range(8)]
    for numbers in wanted:
        clip, = read_clips(path, lambda count: [numbers])
        np.testing.assert_array_equal(clip, expected[np.minimum(numbers, last)])

    # Five views of a test
    numbers = data.dense_views(len(expected), 4, 2, clips=5)
    views = read_clips(path, partial(data.dense_views, frames=4, stride=2, clips=5))
    for view, chosen in zip(views, numbers, strict=True):
        np.testing.assert_array_equal(view, expected[chosen])

    assert data.unreadable_reason(path) is None
    assert_shrinks(path, expected)


def assert_refused(path):
    """Reading, `check` and `shrink` all name the video."""
    for numbers in ([0], [5, 9], list(range(COUNT))):
        with pytest.raises(UnreadableVideo, match=path.name):
            read_clips(path, lambda count: [numbers])
    assert path.name in data.unreadable_reason(path)
    target = path.with_name("shrunk.mp4")
    assert path.name in data.shrink_video((path, target), HEIGHT, 8)
    assert not list(path.parent.glob("*shrunk*"))


# --- Kinds of videos --------------------------------------------------------


@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_timestamps_that_tell_the_order_of_decoding_are_not_believed(tmp_path, codec):
    plain = encode(tmp_path / "plain.mp4", codec, b_frames=2)
    path = copy_packets(plain, tmp_path / "video.mp4", later=5, decoding_times=True)
    assert [packet.pts for packet in list_packets(plain)] != sorted(
        packet.pts for packet in list_packets(plain))
    assert all(packet.pts == packet.dts for packet in list_packets(path))
    assert_read(path, decode(plain))


@pytest.mark.parametrize("matrix", ORIENTATIONS)
@pytest.mark.parametrize("codec", ["libx264", "mpeg4"])
def test_a_display_matrix_is_applied_whole(tmp_path, codec, matrix):
    path = encode(tmp_path / "video.mp4", codec, b_frames=2)
    expected = decode(path, matrix)
    set_matrix(path, *matrix)
    assert_read(path, expected)


@pytest.mark.parametrize("matrix", [(0, 0, 0, 0), (1, 1, 1, 1)])
def test_a_degenerate_display_matrix_is_ignored(tmp_path, matrix):
    path = encode(tmp_path / "video.mp4")
    expected = decode(path)
    set_matrix(path, *matrix)
    assert_read(path, expected)


def test_damage_that_hevcs_decoder_hides_is_refused(tmp_path):
    """A frame is refused, or is what decoding in sequence gives, or what it was."""
    path = encode(tmp_path / "video.mp4", "libx265", key_frames=12)
    content = path.read_bytes()
    original = decode(path)
    packets = list_packets(path)
    for i in (3, 6, 9, 15, 18, 21):
        start = packets[i].pos + packets[i].size // 10
        end = packets[i].pos + packets[i].size
        path.write_bytes(content[:start] + bytes(end - start) + content[end:])
        with av.open(str(path)) as container:
            assert not any(frame.is_corrupt for frame in container.decode(video=0))
        shown = decode(path)
        assert not np.array_equal(shown, original)
        refused = []
        for number in range(COUNT):
            try:
                frame = read_one(path, number)
            except UnreadableVideo:
                refused.append(number)
            else:
                frames = [original[number], *shown[number:number + 1]]
                assert any(np.array_equal(frame, known) for known in frames)
        assert i in refused
        with pytest.raises(UnreadableVideo, match=path.name):
            read_all(path)
        assert path.name in data.unreadable_reason(path)
        assert path.name in data.shrink_video((path, tmp_path / "shrunk.mp4"), HEIGHT, 8)


# The times of MPEG-TS begin anew after 2^33 units. Before that, they count as negative.
LAST_FRAME = 2 ** 33 * 25 // 90000


@pytest.mark.parametrize("negative", [10, 2 * COUNT])
def test_shrink_keeps_frames_before_time_zero(tmp_path, negative):
    plain = encode(tmp_path / "plain.mp4", b_frames=2)
    path = copy_packets(plain, tmp_path / "video.ts", later=LAST_FRAME - negative)
    times = [packet.pts for packet in list_packets(path)]
    assert min(times) < 0
    assert (max(times) < 0) == (negative > COUNT)
    assert_read(path, decode(plain))
    shrunk = [packet.pts for packet in list_packets(tmp_path / "shrunk.mp4")]
    assert min(shrunk) == 0


@pytest.mark.parametrize("first_field", [0, 10])
@pytest.mark.parametrize("suffix", ["ts", "mts", "mp4"])
def test_a_frame_may_have_a_packet_for_each_field(tmp_path, suffix, first_field):
    path = write_fields(tmp_path / f"video.{suffix}", first_field)
    assert len(list_packets(path)) == 2 * COUNT - first_field
    expected = decode(path)
    assert len(expected) == COUNT
    assert_read(path, expected)


def test_a_camera_may_give_only_the_first_field_a_time(tmp_path):
    """Decoding must not rely on the times, of which every second is absent."""
    fields = write_fields(tmp_path / "fields.ts")
    packets = list_packets(fields)
    path = tmp_path / "video.mts"
    with av.open(str(fields)) as reader, av.open(str(path), "w") as writer:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for first, second in zip(packets[0::2], packets[1::2], strict=True):
            packet = av.Packet(bytes(first) + bytes(second))
            packet.stream = stream
            packet.time_base = first.time_base
            packet.pts = packet.dts = first.pts
            packet.is_keyframe = first.is_keyframe
            writer.mux(packet)
    assert None in [packet.pts for packet in list_packets(path)]
    assert_read(path, decode(fields))


OPEN_GROUPS = {"libx264": dict(x264_params="open-gop=1:scenecut=0:b-adapt=0"),
               "libx265": dict(x265_params="open-gop=1:log-level=none:pools=none"),
               "mpeg2video": dict()}


@pytest.mark.parametrize("at_key_frame", [False, True])
@pytest.mark.parametrize("suffix", ["ts", "mp4"])
@pytest.mark.parametrize("codec", OPEN_GROUPS)
def test_a_video_may_begin_inside_a_group_of_pictures(tmp_path, codec, suffix, at_key_frame):
    """Where the index promises frames that cannot be decoded, the others are counted."""
    plain = encode(tmp_path / f"plain.{suffix}", codec, b_frames=2, **OPEN_GROUPS[codec])
    keys = [i for i, packet in enumerate(list_packets(plain)) if packet.is_keyframe]
    first = keys[1] if at_key_frame else keys[1] - 2
    path = copy_packets(plain, tmp_path / f"video.{suffix}", first=first)
    packets = list_packets(path)
    assert packets[0].is_keyframe == at_key_frame
    expected = decode(path)
    assert 10 < len(expected) < len(packets)
    np.testing.assert_array_equal(expected, decode(plain)[-len(expected):])
    assert_read(path, expected)


@pytest.mark.parametrize("suffix", ["ts", "mp4"])
def test_a_video_may_begin_where_its_picture_is_renewed_part_by_part(tmp_path, suffix):
    """That is marked as a key frame, but no frame comes before the picture is whole."""
    plain = encode(tmp_path / "plain.ts", x264_params="intra-refresh=1:keyint=8")
    keys = [i for i, packet in enumerate(list_packets(plain)) if packet.is_keyframe]
    path = copy_packets(plain, tmp_path / f"video.{suffix}", first=keys[1])
    packets = list_packets(path)
    assert packets[0].is_keyframe
    expected = decode(path)
    assert 8 < len(expected) < len(packets)
    assert_read(path, expected)


@pytest.mark.parametrize("codec", ["libvpx", "libvpx-vp9"])
def test_what_precedes_the_first_key_frame_is_left_out(tmp_path, codec):
    plain = encode(tmp_path / "plain.webm", codec)
    path = copy_packets(plain, tmp_path / "video.webm", first=5)
    assert not list_packets(path)[0].is_keyframe
    assert_read(path, decode(plain)[8:])


@pytest.mark.parametrize("codec", ["libx265", "mpeg4"])
def test_all_frames_may_be_marked_as_key_frames(tmp_path, codec):
    """As they are in an MP4 without its table of key frames."""
    path = encode(tmp_path / "video.mp4", codec, b_frames=2)
    expected = decode(path)
    patch(path, b"stss", b"free")
    assert all(packet.is_keyframe for packet in list_packets(path))
    assert_read(path, expected)


@pytest.mark.parametrize("suffix, movflags", [
    ("mp4", "empty_moov+frag_keyframe"), ("avi", ""), ("mkv", "")])
def test_a_file_without_video_packets_is_refused(tmp_path, suffix, movflags):
    path = tmp_path / f"video.{suffix}"
    with av.open(str(path), "w", options={"movflags": movflags} if movflags else {}) as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width = WIDTH
        stream.height = HEIGHT
        stream.pix_fmt = "yuv420p"
        container.start_encoding()
    assert_refused(path)


CUT = [("libx264", "mp4"), ("libx264", "flv"), ("libx264", "mkv"), ("libx265", "mp4"),
       ("mpeg4", "avi"), ("mpeg4", "mp4"), ("libvpx-vp9", "webm")]


@pytest.mark.parametrize("codec, suffix", CUT)
def test_what_precedes_a_cut_packet_is_read(tmp_path, codec, suffix):
    plain = encode(tmp_path / f"plain.{suffix}", codec)
    movflags = {"movflags": "faststart"} if suffix == "mp4" else {}
    path = copy_packets(plain, tmp_path / f"video.{suffix}", **movflags)
    last = list_packets(path)[-4]
    cut_end(path, path.stat().st_size - last.pos - last.size // 2)
    expected = decode(path)
    assert COUNT - 6 <= len(expected) < COUNT
    np.testing.assert_array_equal(expected, decode(plain)[:len(expected)])
    assert_read(path, expected)


@pytest.mark.parametrize("codec", ["libx264", "libx265", "mpeg2video", "mpeg4"])
def test_what_precedes_a_cut_of_mpeg_ts_is_read(tmp_path, codec):
    """There the last packet is not marked as cut; what its decoder makes of it varies."""
    path = encode(tmp_path / "video.ts", codec)
    content = path.read_bytes()
    original = decode(path)
    for eighth in (4, 5, 6, 7):
        for size in range(0, 188 * 4, 94):
            path.write_bytes(content[:len(content) * eighth // 8 - size])
            frames = read_all(path)
            assert len(list_packets(path)) - len(frames) in (0, 1)
            np.testing.assert_array_equal(frames[:-1], original[:len(frames) - 1])
            assert data.unreadable_reason(path) is None
        assert_shrinks(path, frames)


@pytest.mark.parametrize("size", [(48, 64), (48, 48)])
@pytest.mark.parametrize("matrix", [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, 1)])
def test_shrink_keeps_the_shape_of_pixels(tmp_path, matrix, size):
    """Also of a video that is turned, where width and height change places."""
    path = encode(tmp_path / "video.mp4", size=size, shape=Fraction(16, 9))
    expected = decode(path, matrix)
    set_matrix(path, *matrix)
    assert_read(path, expected)
    with av.open(str(tmp_path / "shrunk.mp4")) as container:
        shape = container.streams.video[0].sample_aspect_ratio
    assert shape == (Fraction(9, 16) if matrix[0] == 0 else Fraction(16, 9))


def test_shrink_gives_times_to_a_raw_stream(tmp_path):
    path = encode(tmp_path / "video.h264", b_frames=2)
    assert_read(path, decode(path))
    with av.open(str(tmp_path / "shrunk.mp4")) as container:
        times = [frame.time for frame in container.decode(video=0)]
    np.testing.assert_allclose(times, np.arange(COUNT) / 25, atol=1e-3)


def test_shrink_says_so_if_frames_get_lost(tmp_path, monkeypatch):
    """And leaves nothing behind that a later `shrink` would take for done."""
    path = encode(tmp_path / "video.mp4")
    usual = data.write_shrunk
    monkeypatch.setattr(data, "write_shrunk", lambda *arguments: usual(*arguments) + 2)
    reason = data.shrink_video((path, tmp_path / "shrunk.mp4"), HEIGHT, 8)
    assert re.search(f"video.mp4: 2 of {COUNT + 2} frames were lost", reason)
    assert not list(tmp_path.glob("*shrunk*"))


# --- A sweep ----------------------------------------------------------------


def begin_late(path, target):
    copy_packets(path, target, later=37 * 25)


def begin_inside(path, target):
    copy_packets(path, target, first=5)


def begin_at_second_key_frame(path, target):
    keys = [i for i, packet in enumerate(list_packets(path)) if packet.is_keyframe]
    copy_packets(path, target, first=keys[1])


def hide_frames(path, target):
    """By an edit list."""
    copy_packets(path, target, later=-5)
    assert any(packet.is_discard for packet in list_packets(target))


def lose_end(path, target):
    """From the middle of a packet on."""
    copy_packets(path, target, **({"movflags": "faststart"} if target.suffix == ".mp4" else {}))
    packet = list_packets(target)[16]
    cut_end(target, target.stat().st_size - packet.pos - packet.size // 2)


def fragment(path, target):
    copy_packets(path, target, movflags="frag_keyframe+empty_moov")


class Video(NamedTuple):
    """What to write, and what to do with the file then."""
    codec: str
    suffix: str
    b_frames: int = 0
    change: object = None
    matrix: tuple = (1, 0, 0, 1)
    options: dict = {}

    def __str__(self):
        change = getattr(self.change, "__name__", "")
        options = [str(option) for option in self.options.values()]
        words = [self.codec, self.suffix, str(self.b_frames), change, *options]
        if self.matrix != (1, 0, 0, 1):
            words.append(str(self.matrix))
        return " ".join(word for word in words if word)


CONTAINERS = {
    "libx264": ["mp4", "mov", "mkv", "ts", "m2ts", "flv", "avi", "3gp", "h264"],
    "libx265": ["mp4", "mkv", "ts", "hevc"],
    "mpeg4": ["mp4", "mov", "mkv", "ts", "avi", "3g2", "m4v"],
    "mpeg2video": ["mp4", "mkv", "ts", "mpg"],
    "mpeg1video": ["mpg"],
    "libvpx": ["webm", "ogv"],
    "libvpx-vp9": ["webm", "mp4"],
    "libsvtav1": ["webm", "mp4"],
    "wmv2": ["wmv", "asf"],
    "msmpeg4v3": ["avi"],
    "flv": ["flv"],
    "mjpeg": ["avi", "mov"],
    "prores": ["mov"],
    "ffv1": ["mkv"],
}
REORDERING = ("libx264", "libx265", "mpeg4", "mpeg2video")
CHANGES = {
    "mp4": [begin_late, begin_inside, begin_at_second_key_frame, hide_frames, lose_end, fragment],
    "ts": [begin_late, begin_inside, begin_at_second_key_frame, lose_end],
    "mkv": [begin_late, begin_at_second_key_frame, lose_end],
}
OPTIONS = {
    "libx264": [dict(x264_params="open-gop=1"), dict(x264_params="tff=1"),
                dict(x264_params="intra-refresh=1"), dict(x264_params="scenecut=0:keyint=250")],
    "libx265": [dict(x265_params="open-gop=1:log-level=none:pools=none")],
    "mpeg2video": [dict(flags="+ildct+ilme")],
}


def sweep():
    """Every container and codec with and without B-frames, changes, options and matrices."""
    videos = []
    for codec, suffixes in CONTAINERS.items():
        for b_frames in (0, 2) if codec in REORDERING else (0,):
            videos += [Video(codec, suffix, b_frames) for suffix in suffixes]
    for codec in REORDERING:
        for suffix, changes in CHANGES.items():
            # A decoder of MPEG-4 invents frames before the first key frame
            videos += [Video(codec, suffix, 2, change) for change in changes
                       if (codec, change) != ("mpeg4", begin_inside)]
        for options in OPTIONS.get(codec, []):
            videos += [Video(codec, suffix, 2, options=options) for suffix in ("mp4", "ts")]
        videos += [Video(codec, "mp4", 2, matrix=matrix) for matrix in list(ORIENTATIONS)[1:]]
    return videos


@pytest.mark.slow
@pytest.mark.parametrize("video", sweep(), ids=str)
def test_frames_equal_those_of_a_sequential_decoder(tmp_path, video):
    # Some packets of an MKV lack a time, so it cannot be changed
    suffix = "mp4" if video.suffix == "mkv" and video.change else video.suffix
    plain = encode(tmp_path / f"plain.{suffix}", video.codec, video.b_frames, **video.options)
    path = tmp_path / f"video.{video.suffix}"
    if video.change:
        video.change(plain, path)
    else:
        plain.rename(path)
    expected = decode(path, video.matrix)
    assert len(expected) == COUNT or (video.change and len(expected) > 8)
    if video.matrix != (1, 0, 0, 1):
        set_matrix(path, *video.matrix)
    assert_read(path, expected)


def test_the_sweep_is_wide():
    assert len(sweep()) >= 60
