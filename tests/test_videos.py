"""Videos and lists that are easily read wrong: each is read right, or refused by name."""

import errno
import os
import random
import re
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
import train_pretrain
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
    """Sequence and picture parameters of an interlaced video.

    The fields are in the order of the H.264 standard, 7.3.2.1 and 7.3.2.2.
    """
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
    bits.golomb(0, 7, 0)                                # slice header (7.3.3): an intra slice
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
            bits.golomb(25)                             # a block of type I_PCM: not compressed
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
    """All frames [n, H, W, 3] up to where the file breaks off, if it does, by PyAV alone.

    They are turned by the argument `matrix`; the file's own matrix is not read.
    """
    frames = []
    with av.open(str(path), **data.METADATA_OPTIONS) as container:
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
    """Every way to read a video gives these frames bit for bit. `check` and `shrink` work on it."""
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
    """The damaged frame is refused. Any other is refused, or is as before the damage, or is what
    decoding in sequence shows."""
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
                # The last frames may be missing in `shown`
                frames = [original[number], *shown[number:number + 1]]
                assert any(np.array_equal(frame, known) for known in frames)
        assert i in refused
        with pytest.raises(UnreadableVideo, match=path.name):
            read_all(path)
        assert path.name in data.unreadable_reason(path)
        assert path.name in data.shrink_video((path, tmp_path / "shrunk.mp4"), HEIGHT, 8)


# MPEG-TS counts 1 / 90000 s and begins anew after 2^33 of these. FFmpeg takes times shortly before
# that as negative. This is the number of the last frame before it.
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
    """Or at the key frame of an open group. Frames whose references are missing are left out."""
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
    """Its first packet is marked as a key frame, but no frame comes until the picture is whole."""
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
    cut = list_packets(path)[-4]
    cut_end(path, path.stat().st_size - cut.pos - cut.size // 2)
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
    """Each codec in its containers; those of REORDERING also with B-frames and all that follows."""
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
    # `change` copies packets by their times, which some packets of an MKV lack. So it copies from
    # an MP4.
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
    assert len(sweep()) >= 150


# --- Folders of images ------------------------------------------------------


def write_images(folder, suffix="png", count=COUNT):
    """The frames of a video as images 1, 2, ... 10, 11, ...: [count, H, W, 3]."""
    folder.mkdir(parents=True)
    frames = pictures(count)
    for i, pixels in enumerate(frames, 1):
        Image.fromarray(pixels).save(folder / f"{i}.{suffix}")
    return frames


@pytest.mark.parametrize("suffix", ["png", "jpg", "JPEG"])
def test_a_folder_of_images_is_a_video(tmp_path, suffix):
    """In natural order, where 2 comes before 10."""
    folder = tmp_path / "video"
    expected = write_images(folder, suffix)
    (folder / "notes.txt").write_text("hello")
    (folder / "._1.png").write_text("hello")
    if suffix != "png":
        paths = [folder / f"{i}.{suffix}" for i in range(1, COUNT + 1)]
        expected = np.stack([np.asarray(Image.open(path)) for path in paths])
    assert_read(folder, expected)


def test_numbers_in_names_of_images_are_compared_as_numbers(tmp_path):
    names = ["a1_9.png", "a1_10.png", "a2_1.png", "a10_1.png", "b.png"]
    for name in reversed(names):
        (tmp_path / name).touch()
    assert [path.name for path in data.image_files(tmp_path)] == names


def test_images_become_rgb_of_one_size(tmp_path):
    """The first image's size. Grey, a palette and transparency are resolved."""
    colour = Image.new("RGB", (64, 48), (200, 20, 20))
    colour.save(tmp_path / "1.png")
    colour.resize((32, 24)).save(tmp_path / "2.png")
    colour.quantize().save(tmp_path / "3.png")
    colour.convert("RGBA").save(tmp_path / "4.png")
    Image.new("L", (64, 48), 99).save(tmp_path / "5.png")
    frames = read_all(tmp_path)
    assert frames.shape == (5, 48, 64, 3)
    assert (frames[:4] == (200, 20, 20)).all()
    assert (frames[4] == 99).all()
    # FFmpeg cannot make a column of one pixel's width a row
    Image.new("RGB", (1, 500)).save(tmp_path / "0.png")
    Image.new("RGB", (500, 1)).save(tmp_path / "1.png")
    with pytest.raises(UnreadableVideo, match=str(tmp_path)):
        read_all(tmp_path)


def damage_image(path):
    """Zero a part of it, so that the checksum of a PNG fails."""
    content = path.read_bytes()
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(50) + content[middle + 50:])


def halve(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def deepen(path):
    """16 bits for a pixel, as depth cameras write them."""
    Image.fromarray(np.full((48, 64), 40000, np.uint16)).save(path)


@pytest.mark.parametrize("suffix, spoil", [
    ("png", damage_image), ("png", halve), ("jpg", halve), ("png", deepen),
    ("png", lambda path: path.write_text("hello")), ("jpg", lambda path: path.write_bytes(b""))])
def test_an_unreadable_image_is_refused_by_name(tmp_path, suffix, spoil):
    folder = tmp_path / "video"
    expected = write_images(folder, suffix, count=6)
    spoil(folder / f"4.{suffix}")
    for numbers in ([3], list(range(6))):
        with pytest.raises(UnreadableVideo, match=f"video/4.{suffix}"):
            read_clips(folder, lambda count: [numbers])
    assert f"video/4.{suffix}" in data.unreadable_reason(folder)
    assert f"video/4.{suffix}" in data.shrink_video((folder, tmp_path / "shrunk.mp4"), 48, 8)
    assert not list(tmp_path.glob("*shrunk*"))
    # The others are read
    assert np.abs(read_one(folder, 2).astype(int) - expected[2]).mean() < 16


def test_an_empty_folder_is_refused(tmp_path):
    assert_refused(tmp_path)


def test_folders_of_images_are_found_like_videos(tmp_path):
    """In class folders, in lists and by their stems."""
    for name in ("wave/7", "wave/12", "clap/3"):
        write_images(tmp_path / "videos" / name, count=2)
    (tmp_path / "videos" / "clap" / "4.mp4").touch()
    (tmp_path / "videos" / "thumbnail.png").touch()         # beside folders: not a frame
    entries, classes = read_annotations(tmp_path / "videos")
    assert named(entries) == [("3", 0), ("4.mp4", 0), ("12", 1), ("7", 1)]
    assert classes == ["clap", "wave"]

    # In a list, a folder without images does not hide a video of its name
    (tmp_path / "videos" / "clap" / "4").mkdir()
    listed = tmp_path / "list.txt"
    listed.write_text("wave/7 5\nclap/4 6\nclap/3 7\n")
    entries, _ = read_annotations(listed, tmp_path / "videos")
    assert named(entries) == [("7", 5), ("4.mp4", 6), ("3", 7)]

    (tmp_path / "labels.json").write_text('{"Up": "0", "Down": "1"}')
    official = tmp_path / "train.json"
    official.write_text('[{"id": "12", "template": "Down"}, {"id": "3", "template": "Up"}]')
    entries, _ = read_annotations(official, tmp_path / "videos")
    assert named(entries) == [("12", 1), ("3", 0)]


def test_shrink_and_check_know_folders_of_images(tmp_path):
    expected = write_images(tmp_path / "videos" / "wave" / "7.5")
    write_images(tmp_path / "videos" / "wave" / "8", count=3)
    (tmp_path / "videos" / "wave" / "8" / "2.png").write_text("hello")
    reason, = data.check([tmp_path / "videos"], "", workers=0)
    assert "8/2.png" in reason
    reason, = data.shrink(tmp_path / "videos", tmp_path / "small", 32, 8, workers=0)
    assert "8/2.png" in reason
    small = tmp_path / "small" / "wave" / "7.5.mp4"
    assert [path for path in (tmp_path / "small").rglob("*") if path.is_file()] == [small]
    assert decode(small).shape == (len(expected), 32, 42, 3)

    # A list of the folders finds what they have become
    listed = tmp_path / "list.txt"
    listed.write_text("wave/7.5 3\n")
    assert read_annotations(listed, tmp_path / "small") == ([data.Entry(str(small), 3)], None)


# --- Lists and folders of all kinds -----------------------------------------


def named(entries):
    return [(Path(path).name, label) for path, label in entries]


def write_files(root, files):
    """{name: text} or names of empty files."""
    for name in files:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(files[name] if isinstance(files, dict) else "", encoding="utf-8")


def assert_outcome(outcome, source, root=""):
    """The entries [(name, label), ...], or the sentence of the UserError."""
    if isinstance(outcome, str):
        with pytest.raises(UserError, match=outcome):
            read_annotations(source, root)
    else:
        entries, _ = read_annotations(source, root)
        assert named(entries) == outcome


C_AND_D = [("c.mp4", 0), ("d.mp4", 1)]
EXPECTED = "expected `path label`, `path,label` or `path`. The label is one number.*Found: "
LISTS = {
    "blanks": ("c.mp4 0\nd.mp4 1\n", C_AND_D),
    "tabs": ("c.mp4\t0\nd.mp4\t1\n", C_AND_D),
    "commas": ("c.mp4,0\nd.mp4,1\n", C_AND_D),
    "commas and blanks": ("c.mp4, 0\nd.mp4 ,1\n", C_AND_D),
    "semicolons": ("c.mp4;0\nd.mp4;1\n", C_AND_D),
    "lines of Windows, a mark at the start": ("\ufeffc.mp4 0\r\nd.mp4 1\r\n", C_AND_D),
    "empty lines": ("\n\nc.mp4 0\n\n  \nd.mp4 1", C_AND_D),
    "blanks in a name": ("a b.mp4 3\nc.mp4 0\n", [("a b.mp4", 3), ("c.mp4", 0)]),
    "commas in a name": ("a,1.mp4,3\nc.mp4,0\n", [("a,1.mp4", 3), ("c.mp4", 0)]),
    "paths": ("c.mp4\nd.mp4\n", [("c.mp4", None), ("d.mp4", None)]),
    "what was shrunk": ("c.avi 0\nd.MTS 1\n", C_AND_D),
    "a missing video": ("c.mp4 0\ngone.mp4 7\nd.mp4 1\n", C_AND_D),

    "a header": ("path label\nc.mp4 0\n", f"list.txt:1: {EXPECTED}path label; if it is a header"),
    "a header with a comma": ("path,label\nc.mp4,0\n",
                              f"list.txt:1: {EXPECTED}path,label; if it is a header, remove it"),
    "a header of one word": ("video\nc.mp4\n", f"list.txt:1: {EXPECTED}video; if it is a header"),
    "several labels": ("c.mp4 0 1 5\nd.mp4 2\n", f"list.txt:1: {EXPECTED}c.mp4 0 1 5"),
    "several labels below": ("d.mp4 2\nc.mp4 0 1 5\n", f"list.txt:2: {EXPECTED}c.mp4 0 1 5$"),
    "several labels, commas": ("c.mp4,0,1\n", f"list.txt:1: {EXPECTED}c.mp4,0,1"),
    "a number of frames": ("c.mp4 120 0\nd.mp4 99 1\n", f"list.txt:1: {EXPECTED}c.mp4 120 0"),
    "a name as label": ("c.mp4 waving\n", f"list.txt:1: {EXPECTED}c.mp4 waving"),
    "a name as label, comma": ("c.mp4,waving\n", f"list.txt:1: {EXPECTED}c.mp4,waving"),
    "a negative label": ("c.mp4 0\nd.mp4 -1\n", f"list.txt:2: {EXPECTED}d.mp4 -1"),
    "a fraction as label": ("c.mp4 0.5\n", f"list.txt:1: {EXPECTED}c.mp4 0.5"),
    "the label first": ("0 c.mp4\n", "none of its 1 videos .*first: 0 c.mp4"),
    "quotes": ('"c.mp4",0\n', f'list.txt:1: {EXPECTED}"c.mp4",0'),
    "a comma, then a blank": ("c.mp4,0\nd.mp4 1\n", "list.txt:2: expected `path,label`, as in"),
    "a blank, then a comma": ("c.mp4 0\nd.mp4,1\n", "list.txt:2: expected `path label`, as in"),
    "a comma, then a semicolon": ("c.mp4,0\nd.mp4;1\n", "list.txt:2: expected `path,label`, as"),
    "a label, then none": ("c.mp4 0\nd.mp4\n", "list.txt:2: expected `path label`, as in"),
    "no label, then one": ("c.mp4\nd.mp4 1\n", "list.txt:2: expected `path`, as in the lines bef"),
    "a comment": ("c.mp4 0\n# the end\n", f"list.txt:2: {EXPECTED}# the end$"),
    "no such folder": ("wave/7 0\n", f"list.txt:1: {EXPECTED}wave/7 0"),
    "nothing": ("\n", "list.txt: the annotation file is empty"),
    "only missing videos": ("gone.mp4 0\n", "none of its 1 videos is under .*set data.root"),
}


@pytest.mark.parametrize("text, outcome", LISTS.values(), ids=LISTS)
def test_a_list_is_read_or_refused_as_a_whole(tmp_path, capsys, text, outcome):
    write_files(tmp_path / "videos", ["c.mp4", "d.mp4", "a b.mp4", "a,1.mp4"])
    write_files(tmp_path, {"list.txt": text})
    assert_outcome(outcome, tmp_path / "list.txt", tmp_path / "videos")
    printed = capsys.readouterr().err
    if "gone" in text and isinstance(outcome, list):
        assert "1 of 3 videos are not under" in printed
        assert "first gone.mp4" in printed
    else:
        assert printed == ""


HEADER = "label,youtube_id,time_start,time_end,split"
ROWS = 'zumba,abc,10,20,train\n"air, drumming",x-y,0,10,train\n'
AIR_AND_ZUMBA = [("abc_000010_000020.mp4", 1), ("x-y_000000_000010.mp4", 0)]
NO_ROW = "expected a label, a youtube_id and two times, found: "
KINETICS = {
    "as published": (f"{HEADER}\n{ROWS}", AIR_AND_ZUMBA),
    "capitals": (f"Label,YouTube_ID,Time_Start,TIME_END,Split\n{ROWS}", AIR_AND_ZUMBA),
    # A blank after each comma, but no second one in the class "air, drumming"
    "blanks": (f"{HEADER}\n{ROWS}".replace(",", ", ").replace("air,  ", "air, "), AIR_AND_ZUMBA),
    "blanks before commas": (f"{HEADER}\n{ROWS}".replace(",", " ,").replace("air ,", "air,"),
                             AIR_AND_ZUMBA),
    "semicolons": (f"{HEADER.replace(',', ';')}\nzumba;abc;10;20;train\n"
                   "air, drumming;x-y;0;10;train\n", AIR_AND_ZUMBA),
    "tabs": (f"{HEADER.replace(',', chr(9))}\nzumba\tabc\t10\t20\ttrain\n"
             "air, drumming\tx-y\t0\t10\ttrain\n", AIR_AND_ZUMBA),
    "quotes": ('"label","youtube_id","time_start","time_end"\n"zumba","abc","10","20"\n'
               '"air, drumming","x-y","0","10"\n', AIR_AND_ZUMBA),
    "another order, a mark at the start": (
        "\ufeffyoutube_id,time_start,time_end,label\r\nabc,10,20,zumba\r\n"
        'x-y,0,10,"air, drumming"\r\n', AIR_AND_ZUMBA),
    "times with decimals": (f"{HEADER}\nzumba,abc,10.0,20.0,train\n",
                            [("abc_000010_000020.mp4", 0)]),

    "no label": ("youtube_id,time_start,time_end\nabc,10,20\n", "the column label is missing in"),
    "a time is a word": (f"{HEADER}\nzumba,abc,ten,20,train\n",
                         f"list.csv:2: {NO_ROW}zumba,abc,ten,20,train"),
    "a time is endless": (f"{HEADER}\nzumba,abc,inf,20,train\n", f"list.csv:2: {NO_ROW}"),
    "a short row": (f"{HEADER}\n{ROWS}zumba,abc\n", f"list.csv:4: {NO_ROW}zumba,abc"),
    "commas, then semicolons": (f"{HEADER}\nzumba;abc;10;20\n", f"list.csv:2: {NO_ROW}zumba;abc"),
}


@pytest.mark.parametrize("text, outcome", KINETICS.values(), ids=KINETICS)
def test_kinetics_lists_of_all_kinds(tmp_path, text, outcome):
    write_files(tmp_path, {"list.csv": text, "abc_000010_000020.mp4": "",
                           "deep/x-y_000000_000010.mp4": ""})
    assert_outcome(outcome, tmp_path / "list.csv")


CLASS_FOLDERS = ["wave/a.mp4", "clap/b.mp4"]
A_AND_B = [("b.mp4", 0), ("a.mp4", 1)]
SUFFIXES = ["mp4", "MTS", "m2ts", "ogv", "asf", "3g2"]
FOLDERS = {
    "class folders": (CLASS_FOLDERS, A_AND_B),
    "what notebooks leave": ([*CLASS_FOLDERS, ".ipynb_checkpoints/a-checkpoint.mp4",
                              "wave/.ipynb_checkpoints/a-checkpoint.mp4"], A_AND_B),
    "a bin": ([*CLASS_FOLDERS, ".Trash-1000/files/c.mp4"], A_AND_B),
    "what macOS adds": ([*CLASS_FOLDERS, "__MACOSX/wave/._a.mp4", "__MACOSX/c.mp4",
                         "wave/._a.mp4", "._c.mp4", "wave/.DS_Store"], A_AND_B),
    "what Unix hides": ([*CLASS_FOLDERS, ".c.mp4", "wave/.b.mp4"], A_AND_B),
    "other files": ([*CLASS_FOLDERS, "readme.txt", "wave/a.wav", "clap/b.json", "notes/x.md",
                     "classes.png"], A_AND_B),
    "many suffixes": ([f"wave/a.{suffix}" for suffix in SUFFIXES],
                     [(f"a.{suffix}", 0) for suffix in sorted(SUFFIXES)]),
    "videos, and class folders": ([*CLASS_FOLDERS, "c.mp4"],
                                  [("c.mp4", None), ("b.mp4", None), ("a.mp4", None)]),
    "parts beside classes": (["train/a.mp4", "car/b.mp4"], A_AND_B),

    "train and val": (["train/wave/a.mp4", "val/wave/b.mp4"],
                      "parts of a data set, not classes: name one of them, for example .*/train"),
    "Train, Test": (["Train/a.mp4", "Test/b.mp4"], "parts of a data set, not classes"),
    "only train": (["train/wave/a.mp4"], "parts of a data set, not classes: name one of them"),
    "nothing": (["readme.txt"], "there are no videos in this folder or below it"),
    "only hidden ones": ([".cache/a.mp4", "wave/._a.mp4"], "there are no videos in this folder"),
}


@pytest.mark.parametrize("files, outcome", FOLDERS.values(), ids=FOLDERS)
def test_folders_of_all_kinds(tmp_path, files, outcome):
    write_files(tmp_path, files)
    assert_outcome(outcome, tmp_path)


UP = '[{"id": "7", "template": "Moving [something] up"}]'
UP_CLASSES = '{"Moving something up": "0"}'
OFFICIAL = {
    "as published": ({"x-labels.json": UP_CLASSES}, [("7.webm", 0)]),
    "what macOS adds": ({"x-labels.json": UP_CLASSES, "._x-labels.json": "?"}, [("7.webm", 0)]),
    "two files of classes": ({"a-labels.json": UP_CLASSES, "b-labels.json": UP_CLASSES},
                             "labels.json must be beside it, once; found a-labels.json, b-label"),
    "no file of classes": ({}, "labels.json must be beside it, once; found none"),
}


@pytest.mark.parametrize("files, outcome", OFFICIAL.values(), ids=OFFICIAL)
def test_something_something_takes_one_file_of_classes(tmp_path, files, outcome):
    write_files(tmp_path, {**files, "train.json": UP, "7.webm": ""})
    assert_outcome(outcome, tmp_path / "train.json")


def test_of_two_files_of_one_video_it_is_said_which_is_used(tmp_path, capsys):
    """Once, with a count."""
    files = {"7.mp4": "", "7.webm": "", "deep/7.avi": "", "8.mp4": "", "a/9.mp4": "", "b/9.mp4": ""}
    write_files(tmp_path, {**files, "x-labels.json": UP_CLASSES, "train.json": UP})
    assert_outcome([("7.mp4", 0)], tmp_path / "train.json")
    printed = capsys.readouterr().err
    assert printed.count("\n") == 1
    assert "3 videos have the name of another one" in printed
    assert f"{tmp_path}/7.mp4 and not {tmp_path}/7.webm" in printed


# --- Two runs in one folder -------------------------------------------------


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(toy, tmp_path):
    """A second run of either script. It changes nothing. A killed run leaves no lock behind."""
    output = tmp_path / "run"
    arguments = [*toy_lists(toy), "pretrain.epochs=6", "run.save_minutes=0"]
    first = Script("train_pretrain.py", *arguments, output=output)
    first.wait_for_steps(2)
    first.send_signal(signal.SIGSTOP)
    time.sleep(0.05)                            # a signal takes a moment to arrive
    before = contents(output)
    for script in ("train_pretrain.py", "train_finetune.py"):
        second = Script(script, *arguments, "pretrain.lr=1e-5", "finetune.init=scratch",
                        output=output)
        _, printed = second.finish(status=1)
        assert f"{output}: another run is writing here" in printed
        assert "Traceback" not in printed
    assert contents(output) == before

    first.kill()
    checkpoint, out, _ = pretrain(output, *arguments)
    assert checkpoint["step"] == 18
    assert int(re.search(r"from step (\d+) on", out)[1]) > 0


@pytest.mark.slow
def test_of_two_runs_that_begin_at_once_one_is_refused(toy, tmp_path):
    """Mostly before there is a folder to lock. The other run is not disturbed."""
    output = tmp_path / "run"
    arguments = [*toy_lists(toy), "pretrain.epochs=3"]
    scripts = [Script("train_pretrain.py", *arguments, output=output) for _ in range(2)]
    printed = [script.finish(status=None)[1] for script in scripts]
    assert sorted(script.process.exitcode for script in scripts) == [0, 1]
    refused = [text for text in printed if "another run is writing here" in text]
    assert len(refused) == 1
    assert scripts[0].steps_logged() == 9
    assert torch.load(output / "last.pt", weights_only=True)["step"] == 9


# --- Many reads -------------------------------------------------------------


def resident_megabytes():
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2 ** 20


def test_a_file_system_without_locks_is_no_second_run(tmp_path, monkeypatch, capsys):
    def lockf(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(train_pretrain.fcntl, "lockf", lockf)
    train_pretrain.lock_folder(tmp_path)
    assert "the file system has no locks" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_two_thousand_reads_take_no_more_memory_or_files(tmp_path):
    """By timestamps and by counting, turned, damaged and unreadable, and of images."""
    paths = [encode(tmp_path / "index.mp4", b_frames=2, size=(96, 128)),
             encode(tmp_path / "turned.mp4"),
             encode(tmp_path / "counted.avi", "mpeg4", size=(96, 128)),
             encode(tmp_path / "damaged.mp4"),
             tmp_path / "text.mp4",
             tmp_path / "images"]
    set_matrix(paths[1], 0, 1, -1, 0)
    content = paths[3].read_bytes()
    middle = len(content) // 2
    paths[3].write_bytes(content[:middle] + bytes(300) + content[middle + 300:])
    paths[4].write_text("hello")
    write_images(paths[5])
    refused = 0

    def read_some(count):
        nonlocal refused
        for i in range(count):
            numbers = [i % COUNT, 3 * i % COUNT, COUNT]
            try:
                read_clips(paths[i % len(paths)], lambda count: [numbers])
            except UnreadableVideo:
                refused += 1

    read_some(300)
    memory = resident_megabytes()
    descriptors = len(os.listdir("/proc/self/fd"))
    refused = 0
    read_some(2000)
    # All 333 reads of text.mp4 are refused, and at least one, at most all 333, of damaged.mp4
    assert 333 < refused <= 666
    assert resident_megabytes() - memory < 3
    assert len(os.listdir("/proc/self/fd")) <= descriptors
