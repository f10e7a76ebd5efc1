"""Real files through real decoders, annotations as downloaded, and the randomness of a sample."""

import json
import os
from concurrent.futures import BrokenExecutor
from fractions import Fraction
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import data
from data import UnreadableVideo, Videos, read_annotations, read_clips


# Decoding. Each frame shows its own number, so that a wrong one shows.


def numbered_frames(count, height, width):
    rng = np.random.default_rng(0)
    ground = rng.integers(0, 255, (height, width + 8 * count, 3), dtype=np.uint8)
    return [np.ascontiguousarray(ground[:, 8 * i:8 * i + width]) for i in range(count)]


def encode(path, count=40, height=48, width=64, codec="libx264", pts=None, rotation=0, **options):
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={k.replace("_", "-"): str(v) for k, v in options.items()})
        stream.codec_context.time_base = Fraction(1, 25)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p" if width % 2 == 0 else "yuv444p"
        if codec == "mpeg4":
            stream.codec_context.max_b_frames = 2
        if rotation:
            stream.set_display_rotation(rotation)
        for i, image in enumerate(numbered_frames(count, height, width)):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = (i if pts is None else pts[i]), Fraction(1, 25)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def decode_everything(path):
    with av.open(str(path), metadata_errors="ignore") as container:
        return [np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
                for frame in container.decode(container.streams.best("video"))]


def with_edit_list(path):
    """A file whose edit list begins in the middle of a group of pictures."""
    whole = encode(path.with_name("whole.mp4"), g=40, bf=2)
    with av.open(str(whole)) as source, av.open(str(path), "w") as target:
        copy = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.dts is not None:
                packet.stream = copy
                shift = 10 * (packet.duration or 1)
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift     # ten frames before time zero
                target.mux(packet)
    return path


FILES = {
    "b-frames.mp4": dict(bf=3, g=12),
    "variable-rate.mp4": dict(bf=2, pts=[i * i // 4 + i for i in range(40)]),
    "open-groups.ts": dict(g=8, bf=3, x264_params="open-gop=1:scenecut=0"),
    "open-groups.mp4": dict(g=8, bf=3, x264_params="open-gop=1:scenecut=0"),
    "intra-refresh.mp4": dict(g=20, bf=2, x264_params="intra-refresh=1"),
    "b-frames.avi": dict(codec="mpeg4", g=12),
    "b-frames.mkv": dict(bf=3, g=12),
    "vp9.webm": dict(codec="libvpx-vp9", g=16, cpu_used=8, count=30),
    "rotated.mp4": dict(rotation=90),
    "upside-down.mp4": dict(rotation=180),
    "odd-size.mp4": dict(height=33, width=47),
    "one-pixel.mp4": dict(height=2, width=2, count=3),
    "short.mp4": dict(count=5),
    "one-frame.mp4": dict(count=1),
}


@pytest.mark.parametrize("name", [*FILES, "edit-list.mp4"])
def test_frames_equal_a_decode_everything_readers(tmp_path, name):
    path = tmp_path / name
    with_edit_list(path) if name == "edit-list.mp4" else encode(path, **FILES[name])
    expected = decode_everything(path)
    whole = read_clips(path, lambda count: [list(range(count))])[0].numpy()
    assert len(whole) == len(expected) and all(np.array_equal(a, b) for a, b in zip(whole, expected))
    rng = np.random.default_rng(1)
    for size in (1, 1, 2, 3, 5, 5):                                     # jumps from anywhere to anywhere
        wanted = rng.integers(0, len(expected) + 3, size).tolist()      # beyond the end: the last frame again
        clip, = read_clips(path, lambda count: [wanted])
        for number, frame in zip(wanted, clip.numpy()):
            assert np.array_equal(frame, expected[min(number, len(expected) - 1)])


def test_edit_list_hides_frames(tmp_path):
    assert len(decode_everything(with_edit_list(tmp_path / "edit-list.mp4"))) == 30


def test_several_clips_from_one_decode(tmp_path):
    path = encode(tmp_path / "video.mp4", g=10)
    first, second = read_clips(path, lambda count: [[3, 5], [5, 30, 31]])
    assert len(first) == 2 and len(second) == 3 and torch.equal(first[1], second[0])


def copy_packets(source, target, first=0, **options):
    with av.open(str(target), "w", **options) as writer, av.open(str(source)) as reader:
        stream = writer.add_stream_from_template(reader.streams.video[0])
        for packet in [packet for packet in reader.demux(reader.streams.video[0]) if packet.dts is not None][first:]:
            packet.stream = stream
            writer.mux(packet)


def broken_files(folder):
    good = encode(folder / "good.mp4", g=40).read_bytes()
    (folder / "cut.mp4").write_bytes(good[:len(good) // 2])             # its index, at the end, is lost
    middle = len(good) // 2
    (folder / "damaged.mp4").write_bytes(good[:middle - 2000] + bytes(4000) + good[middle + 2000:])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("hello")
    (folder / "folder.mp4").mkdir()
    with av.open(str(folder / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    (folder / "codec.mp4").write_bytes(good.replace(b"avc1", b"zzzz"))  # nobody decodes that
    copy_packets(folder / "good.mp4", folder / "headless.mp4", first=1)     # without its key frame
    return ["cut.mp4", "damaged.mp4", "empty.mp4", "text.mp4", "folder.mp4", "sound.mp4", "codec.mp4", "headless.mp4", "absent.mp4"]


def test_unreadable_files_are_refused_by_name(tmp_path):
    for name in broken_files(tmp_path):
        with pytest.raises(UnreadableVideo, match=name):
            read_clips(tmp_path / name, lambda count: [list(range(count))])
        if name not in ("absent.mp4", "folder.mp4"):
            assert name in data.unreadable_reason(tmp_path / name)
    assert data.unreadable_reason(tmp_path / "good.mp4") is None


@pytest.mark.parametrize("name", ["video.mp4", "video.mkv"])                # by timestamps, by counting
def test_damage_spreads_to_the_next_key_frame(tmp_path, name):
    path = encode(tmp_path / name, g=20, height=96, width=128)
    expected, content = decode_everything(path), path.read_bytes()
    at = 3 * len(content) // 8
    path.write_bytes(content[:at] + bytes(4) + content[at + 4:])
    refused = []
    for i in range(40):
        try:
            assert np.array_equal(read_clips(path, lambda count: [[i]])[0][0].numpy(), expected[i])
        except UnreadableVideo:
            refused.append(i)
    assert refused and refused == list(range(refused[0], 20))


def test_a_colon_in_a_name_is_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    encode(tmp_path / "a:b.mp4")
    assert len(read_clips("a:b.mp4", lambda count: [[0]])) == 1


def test_the_beginning_of_a_file_cut_short_is_read(tmp_path):
    whole = encode(tmp_path / "whole.mp4", g=10, movflags="faststart")
    copy_packets(whole, tmp_path / "front.mp4", options={"movflags": "faststart"})
    content = (tmp_path / "front.mp4").read_bytes()
    (tmp_path / "half.mp4").write_bytes(content[:len(content) // 2])
    clip, = read_clips(tmp_path / "half.mp4", lambda count: [[0, 3, 5]])
    expected = decode_everything(whole)
    assert all(np.array_equal(frame, expected[i]) for i, frame in zip((0, 3, 5), clip.numpy()))


def test_two_thousand_reads_leave_no_descriptor_behind(tmp_path):
    good, broken = encode(tmp_path / "good.mp4", count=4), tmp_path / "text.mp4"
    broken.write_text("hello")
    read_clips(good, lambda count: [[0]])
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else pytest.skip("needs /proc")
    for _ in range(1000):
        read_clips(good, lambda count: [[1, 3]])
        with pytest.raises(UnreadableVideo):
            read_clips(broken, lambda count: [[0]])
    assert len(os.listdir("/proc/self/fd")) <= before


# Annotations


@pytest.fixture
def root(tmp_path):
    root = tmp_path / "videos"
    root.mkdir()
    for name in ("abc_000010_000020.mp4", "-x y_000000_000010.mp4", "7.webm", "12.mp4", "a b.mp4", "c.mp4"):
        (root / name).write_bytes(b"")
    return root


def write(path, text):
    path.write_text(text)
    return path


def names(entries):
    return [(Path(path).name, label) for path, label in entries]


def test_kinetics_csv(tmp_path, root, capsys):
    source = write(tmp_path / "train.csv", "label,youtube_id,time_start,time_end,split\n"
                   "zumba,abc,10,20,train\n\"air, drumming\",-x y,0,10,train\nzumba,gone,5,15,train\n")
    entries, classes = read_annotations(source, root)
    assert classes == ["air, drumming", "zumba"]
    assert names(entries) == [("abc_000010_000020.mp4", 1), ("-x y_000000_000010.mp4", 0)]
    assert "1 of 3 videos" in (said := capsys.readouterr().err) and "gone_000005_000015" in said
    assert read_annotations(source, root, classes=["air, drumming", "between", "zumba"])[0][0][1] == 2


def test_something_something_json(tmp_path, root):
    write(tmp_path / "something-something-v2-labels.json", json.dumps({"Moving something up": "1", "Holding something": "0"}))
    source = write(tmp_path / "train.json", json.dumps([
        {"id": "7", "template": "Moving [something] up", "label": "moving pen up"},
        {"id": "12", "template": "Holding [something]"}]))
    entries, classes = read_annotations(source, root)
    assert names(entries) == [("7.webm", 1), ("12.mp4", 0)] and classes == ["Holding something", "Moving something up"]


def test_lists_with_and_without_labels(tmp_path, root):
    source = write(tmp_path / "list.txt", "a b.mp4 3\n\nc.mp4\t0\n")
    assert names(read_annotations(source, root)[0]) == [("a b.mp4", 3), ("c.mp4", 0)]
    source = write(tmp_path / "bare.txt", f"a b.mp4\n{root / 'c.mp4'}\n12.avi\n")      # 12.avi was shrunk to 12.mp4
    assert names(read_annotations(source, root)[0]) == [("a b.mp4", None), ("c.mp4", None), ("12.mp4", None)]


def test_lists_are_relative_to_their_own_folder_too(tmp_path, root):
    source = write(root / "list.txt", "c.mp4 0\n")
    write(root / "classes.txt", "waving\n")
    for given in ("", tmp_path):
        entries, classes = read_annotations(source, given)
        assert names(entries) == [("c.mp4", 0)] and classes == ["waving"]


def test_class_folders(tmp_path):
    for name in ("wave/b.mp4", "wave/a.avi", "clap/deep/c.webm", "clap/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    entries, classes = read_annotations(tmp_path)
    entries_named = names(entries)
    assert entries_named == [("c.webm", 0), ("a.avi", 1), ("b.mp4", 1)] and classes == ["clap", "wave"]
    (tmp_path / "wink").symlink_to(tmp_path / "clap")                       # kept on another disk, say
    (tmp_path / "wave" / "up").symlink_to(tmp_path)                         # round and round
    assert names(read_annotations(tmp_path)[0]) == [*entries_named, ("c.webm", 2)]


def test_a_folder_of_videos_has_no_labels(tmp_path):
    for name in ("b.mp4", "a.webm", "notes.txt"):
        (tmp_path / name).write_bytes(b"")
    assert names(read_annotations(tmp_path)[0]) == [("a.webm", None), ("b.mp4", None)]
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "c.mp4").write_bytes(b"")                          # no class: the others would be lost
    assert names(read_annotations(tmp_path)[0]) == [("a.webm", None), ("b.mp4", None), ("c.mp4", None)]


@pytest.mark.parametrize("name, text, culprit", [
    ("list.txt", "c.mp4 0\na b.mp4\n", r"list.txt:2: expected `path label`.*a b.mp4"),
    ("list.txt", "a b.mp4\nc.mp4 1\n", r"list.txt:2: expected `path`.*c.mp4 1"),
    ("list.txt", "", "the annotation file is empty"),
    ("list.txt", "gone.mp4 0\n", "none of its 1 videos is under .*gone.mp4"),
    ("list.txt", "[1] gone.mp4 0\n", r"none of its 1 videos is under .*\[1\] gone.mp4"),
    ("list.txt", "youtube_id/gone.mp4 0\n", "none of its 1 videos is under .*youtube_id/gone.mp4"),
    ("list.csv", "label,youtube_id,time_start,time_end\n", "it lists no videos"),
    ("list.csv", "label,youtube_id,time_start\n", "the column time_end is missing"),
    ("list.csv", "label,youtube_id,time_start,time_end\na,abc,ten,20\n", "list.csv:2: the times are not numbers"),
    ("list.json", '[{"id": "7"}]', "expected a JSON list of objects with `id` and `template`"),
    ("list.json", '[{"id": "7", "template": "Eating [something]"}]', "class 'Eating something' is not among"),
    ("list.json", "[{", "expected a JSON list"),
    ("labels.json", '[{"id": "7", "template": "Holding [something]"}]', "labels.json: expected a JSON object of class names"),
])
def test_bad_annotations_are_named(tmp_path, root, name, text, culprit):
    write(tmp_path / "labels.json", '{"Holding something": "0"}')
    with pytest.raises(ValueError, match=culprit):
        read_annotations(write(tmp_path / name, text), root)


def test_annotations_that_are_no_text_or_absent(tmp_path):
    (tmp_path / "list.txt").write_bytes(bytes(range(256)))
    with pytest.raises(ValueError, match="list.txt: this is not a text file in UTF-8"):
        read_annotations(tmp_path / "list.txt")
    with pytest.raises(ValueError, match="gone.txt: there is no such annotation file"):
        read_annotations(tmp_path / "gone.txt")


# Sampling and augmentation


def test_dense_clips_have_the_exact_stride_and_start_anywhere():
    starts = {tuple(data.dense_clips(20, 4, 3)[0]) for _ in range(500)}
    assert starts == {(s, s + 3, s + 6, s + 9) for s in range(11)}
    assert data.dense_clips(5, 4, 3, clips=2) == [[0, 3, 6, 9]] * 2         # too short: the reader repeats its last frame


def test_multi_scale_crop_takes_videomaes_sizes_and_positions():
    rows, columns = torch.meshgrid(torch.arange(100.0), torch.arange(160.0), indexing="ij")
    clip = torch.stack((rows, columns, rows))[None]                         # every pixel holds its own place
    heights, corners = set(), set()
    for _ in range(1500):
        crop = data.pretraining_clip(clip, 200, flip=False)[0]             # enlarged: the ends are exact
        top, bottom, left, right = (int(v) for v in (crop[0].min(), crop[0].max() + 1, crop[1].min(), crop[1].max() + 1))
        heights.add((bottom - top, right - left))
        if bottom - top == 66 and right - left == 66:
            corners.add((left / ((160 - 66) // 4), top / ((100 - 66) // 4)))
    sizes = (100, 87, 75, 66)
    assert heights == {(a, b) for i, a in enumerate(sizes) for j, b in enumerate(sizes) if abs(i - j) <= 1}
    assert corners == {(x, y) for x in (0, 2, 4) for y in (0, 2, 4)} | {(1, 1), (3, 1), (1, 3), (3, 3)}


def test_tiny_videos_can_be_cropped():
    assert data.pretraining_clip(torch.zeros(2, 3, 1, 1, dtype=torch.uint8), 32, flip=False).shape == (2, 3, 32, 32)


def test_normalise():
    clips = torch.full((1, 3, 2, 4, 4), 255, dtype=torch.uint8)
    torch.testing.assert_close(data.normalise(clips, "cpu")[0, 2, 0, 0, 0], torch.tensor((1 - 0.406) / 0.225))


# Samples, order, unreadable videos


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy") / "set"
    data.make_toy_set(root, {"train": 24, "val": 8})
    return root


def toy_videos(toy, seed=0, clips=1):
    return Videos(read_annotations(toy / "train.txt")[0], partial(data.dense_clips, frames=8, stride=1, clips=clips),
                  partial(data.pretraining_clip, size=32, flip=True), seed)


def test_the_toy_set_is_the_same_when_made_twice(toy, tmp_path):
    data.make_toy_set(tmp_path / "again", {"train": 24, "val": 8})
    files = sorted(path.relative_to(toy) for path in toy.rglob("*") if path.is_file())
    assert len(files) == 24 + 8 + 4
    assert all((toy / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)


def test_toy_motions_are_what_their_classes_say():
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(40.0) - 19.5, torch.arange(40.0) - 19.5, indexing="ij")
    fields = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "clockwise": (-y / 10, x / 10),
              "anticlockwise": (y / 10, -x / 10), "growing": (x / 10, y / 10), "shrinking": (-x / 10, -y / 10)}
    for motion, name in enumerate(data.TOY_CLASSES):
        votes = 0.0
        for _ in range(4):
            frames = data.toy_clip(motion, generator).float().mean(-1)      # [T, H, W]
            change = frames[1:] - frames[:-1]
            down, right = torch.gradient((frames[1:] + frames[:-1]) / 2, dim=(1, 2))
            flow = {n: -(right * u + down * v) for n, (u, v) in fields.items()}     # brightness constancy
            votes += torch.tensor([(flow[n] * change).mean() / flow[n].norm() for n in data.TOY_CLASSES])
        assert data.TOY_CLASSES[int(votes.argmax())] == name


def test_samples_depend_on_seed_epoch_and_sample_alone(toy):
    order = [(0, 3), (1, 3), (0, 5), (0, 7)]
    here = list(DataLoader(toy_videos(toy), 2, sampler=order, collate_fn=data.collate))
    torch.rand(5)
    workers = list(DataLoader(toy_videos(toy), 2, sampler=order, collate_fn=data.collate, num_workers=2))
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(here, workers))
    alone = toy_videos(toy)[0, 5][0]
    assert torch.equal(alone, here[1][0][:1])
    assert not torch.equal(here[0][0][0], here[0][0][1])                    # another epoch, another clip
    assert not torch.equal(toy_videos(toy, seed=1)[0, 5][0], alone)


def test_sampling_leaves_the_callers_generator_alone(toy):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    toy_videos(toy)[0, 1]
    assert torch.equal(torch.rand(1), expected)


def test_several_clips_of_a_video_share_its_label(toy):
    clips, labels, _ = data.collate([toy_videos(toy, clips=2)[0, i] for i in (1, 2)])
    assert clips.shape == (4, 3, 8, 32, 32) and clips.dtype == torch.uint8 and labels.tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_training_order_is_the_same_for_any_number_of_processes_and_any_restart(world):
    def steps(first, rank_count):
        ranks = [list(data.training_order(22, 4, first, 15, 7, rank, rank_count)) for rank in range(rank_count)]
        assert all(len(rank) == (15 - first) * 4 // rank_count for rank in ranks)
        return list(zip(*ranks))

    whole = [sample for group in steps(0, 1) for sample in group]
    assert [sample for group in steps(0, world) for sample in group] == whole
    assert [sample for group in steps(7, world) for sample in group] == whole[7 * 4:]
    for epoch in range(3):                                                  # 5 steps of 4, nothing twice, 2 left out
        seen = whole[epoch * 20:(epoch + 1) * 20]
        assert {e for e, _ in seen} == {epoch} and len({i for _, i in seen}) == 20
    assert [i for _, i in whole[:20]] != [i for _, i in whole[20:40]]


def test_another_video_is_drawn_for_an_unreadable_one(toy, tmp_path):
    broken = write(tmp_path / "broken.mp4", "hello")
    videos = toy_videos(toy)
    videos.entries[4] = (str(broken), 4)
    clips, label, failures = videos[0, 4]
    assert clips.shape == (1, 3, 8, 32, 32) and len(failures) == 1 and "broken.mp4" in failures[0]
    assert torch.equal(videos[0, 4][0], clips)                              # the same one every time
    videos.entries = [(str(broken), 0)] * 5
    with pytest.raises(UnreadableVideo, match="10 videos in a row.*broken.mp4"):
        videos[0, 0]


# Commands


def test_shrink_keeps_frames_and_times_and_resumes(tmp_path, capsys):
    source, target = tmp_path / "in", tmp_path / "out"
    (source / "deep").mkdir(parents=True)
    encode(source / "deep" / "a.mp4", height=96, width=128, bf=2, pts=[3 * i + i % 2 for i in range(40)])
    encode(source / "b.avi", codec="mpeg4")
    encode(source / "turned.mp4", rotation=90)
    write(source / "broken.webm", "hello")
    reasons = data.shrink(source, target, 48, 8, 2)
    assert len(reasons) == 1 and "broken.webm" in reasons[0]
    assert sorted(str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()) == ["b.mp4", "deep/a.mp4", "turned.mp4"]

    def frames(path):
        with av.open(str(path)) as container:
            return [(float(frame.pts * frame.time_base), frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]

    before, after = frames(source / "deep" / "a.mp4"), frames(target / "deep" / "a.mp4")
    assert [round(time, 4) for time, _ in before] == [round(time, 4) for time, _ in after]
    assert after[0][1].shape == (48, 64, 3)
    assert len(frames(target / "b.mp4")) == 40 and frames(target / "b.mp4")[0][1].shape == (48, 64, 3)
    upright = read_clips(source / "turned.mp4", lambda count: [[0]])[0].float()
    assert (read_clips(target / "turned.mp4", lambda count: [[0]])[0].float() - upright).abs().mean() < 12
    with av.open(str(target / "deep" / "a.mp4")) as container:
        keys = [i for i, packet in enumerate(p for p in container.demux(video=0) if p.size) if packet.is_keyframe]
    assert max(b - a for a, b in zip(keys, keys[1:])) <= 8
    changed = (target / "b.mp4").stat().st_mtime_ns
    data.shrink(source, target, 48, 8, 1)
    assert (target / "b.mp4").stat().st_mtime_ns == changed and "3 of them done already" in capsys.readouterr().out
    for _ in range(2):                                  # never its own output
        data.shrink(source, source / "small", 48, 8, 1)
    assert sorted(path.name for path in (source / "small").rglob("*.mp4")) == ["a.mp4", "b.mp4", "turned.mp4"]


@pytest.mark.parametrize("rotation", [0, 90])
def test_shrink_keeps_colours(tmp_path, rotation):
    """Of a video in BT.709 and full range, as phones write them; untagged players take BT.601 and limited range."""
    (tmp_path / "in").mkdir()
    with av.open(str(tmp_path / "in" / "red.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25, width=64, height=48, colorspace=1, color_range=2)
        stream.set_display_rotation(rotation)
        red = av.VideoFrame.from_ndarray(np.full((48, 64, 3), (200, 20, 20), np.uint8), format="rgb24")
        container.mux(stream.encode(red.reformat(format="yuv420p", dst_colorspace=1, dst_color_range=2)))
        container.mux(stream.encode())
    assert not data.shrink(tmp_path / "in", tmp_path / "out", 48, 8, 1)
    colours = [read_clips(tmp_path / folder / "red.mp4", lambda count: [[0]])[0][0, 20, 20].int() for folder in ("in", "out")]
    assert (colours[0] - torch.tensor([200, 20, 20])).abs().max() < 5 and (colours[0] - colours[1]).abs().max() < 5


def test_check_lists_the_unreadable(tmp_path, capsys):
    good = encode(tmp_path / "good.mp4")
    bad = broken_files(tmp_path)[1]
    reasons = data.failures(data.unreadable_reason, [str(good), str(tmp_path / bad)], 2)
    assert len(reasons) == 1 and bad in reasons[0]


def test_a_killed_process_ends_check():
    with pytest.raises(BrokenExecutor):
        data.failures(os._exit, [1], 2)
