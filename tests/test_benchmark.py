"""The baseline is VideoMAE, benchmarks run, GPU checks can fail, memory and figures are right."""

import os
import subprocess
import sys
import time
from argparse import Namespace
from functools import partial
from pathlib import Path

import benchmark
import evidence
import figures
import gpu
import pytest
import torch
from benchmark import VideoMAE, contenders, forward_flops, materialised
from conftest import ROOT, SERVER, TINY, USUAL_METHOD, assert_equal, run_main

import arvideo
import data
from train_finetune import Probe, encoder_arguments
from train_pretrain import build_arvideo, load_config

PAPER = load_config(["k400"], "pretrain")


# --- The baseline -----------------------------------------------------------


def test_videomae_has_the_published_size():
    with torch.device("meta"):
        model = VideoMAE(PAPER["model"])
    parameters = sum(p.numel() for p in model.parameters())
    assert round(parameters / 1e6, 1) == 94.2
    videomae = contenders("step", "cpu")[0]
    assert list(benchmark.token_counts(videomae, PAPER).values()) == [160, 160, 1568, 1568]


def test_videomae_hides_tubes_and_predicts_them():
    torch.manual_seed(0)
    model = VideoMAE(load_config(["toy"], "pretrain")["model"])
    visible, hidden = model.draw(3)

    # Every token is visible or hidden, and all 4 time slices of 64 tokens are alike
    tokens = torch.cat([visible, hidden], 1).sort(1).values
    assert torch.equal(tokens, torch.arange(256).expand(3, -1))
    in_slice = visible.view(3, 4, -1) % 64
    assert torch.equal(in_slice, in_slice[:, :1].expand(-1, 4, -1))

    # Where zero is predicted, the loss is what is left of the target's variance: 31 / 32
    video = torch.randn(3, 3, 8, 32, 32)
    torch.nn.init.zeros_(model.head.weight)
    loss = model(video, visible, hidden)
    assert loss.item() == pytest.approx(31 / 32, abs=1e-4)


def test_forward_costs():
    """ViT-B, two FLOPs for each multiply-add: VideoMAE 71 GFLOPs, ARVideo 93, or 75."""
    videomae, _, ours = contenders("step", "cpu")
    half = ours._replace(build=benchmark.half_predicting_model)
    assert round(forward_flops(videomae, PAPER) / 1e9) == 71
    assert round(forward_flops(ours, PAPER) / 1e9) == 93
    assert round(forward_flops(half, PAPER) / 1e9) == 75        # half of the queries


def erased_box(before, after):
    """First and last row and column where two clips [3, T, H, W] differ."""
    rows, columns = (before != after).amax((0, 1)).nonzero().unbind(1)
    return torch.stack((rows.min(), rows.max(), columns.min(), columns.max()))


@pytest.mark.parametrize("masked", [False, True])
def test_attention_written_out_is_attention(masked):
    torch.manual_seed(0)
    q = torch.randn(2, 5, 24)
    k = torch.randn(2, 7, 24)
    v = torch.randn(2, 7, 24)
    mask = None
    if masked:
        mask = torch.rand(5, 7) < 0.7
        mask[:, 0] = True                               # every query attends to something
    expected = arvideo.attend(q, k, v, 3, mask)
    torch.testing.assert_close(materialised(q, k, v, 3, mask), expected)


def test_videomaes_augmentation_is_ours_but_for_rounding():
    """At sizes that only grow, since VideoMAE shrinks without antialiasing."""
    frames = torch.stack(list(benchmark.moving_pictures(2, 60, 80, rate=25)))
    settings = dict(size=112, flip=True, crop_area=[0.08, 1.0], rand_augment_strength=[4, 7.0])
    for seed in range(40):
        torch.manual_seed(seed)
        ours = benchmark.our_normalised_clip(frames, **settings, erase=0.0)
        torch.manual_seed(seed)
        videomae = benchmark.videomae_clip(frames, **settings, erase=0.0)
        # One grey level is some 0.017
        assert (ours - videomae).abs().mean() < 0.01

        # Erasing differs: theirs also takes values that no colour has. The box is the same.
        torch.manual_seed(seed)
        ours_erased = benchmark.our_normalised_clip(frames, **settings, erase=1.0)
        torch.manual_seed(seed)
        videomae_erased = benchmark.videomae_clip(frames, **settings, erase=1.0)
        assert_equal(erased_box(ours, ours_erased), erased_box(videomae, videomae_erased))


def test_a_readout_finds_classes_in_features_and_none_in_noise():
    torch.manual_seed(0)
    features = torch.randn(300, 16)
    labels = features[:, :3].argmax(1)
    noise = torch.randn(300, 16)
    accuracy = {}
    for name, inputs in (("features", features), ("noise", noise)):
        train, val = inputs.split([200, 100])
        penalty = evidence.choose_penalty(train, labels[:200])
        accuracy[name] = evidence.ridge_accuracy(
            train, labels[:200], val, labels[200:], penalty)
    assert accuracy["features"] > 85
    assert accuracy["noise"] < 50                       # chance is 33


def test_the_random_encoder_is_what_the_pretraining_started_from():
    config = load_config(["toy", *TINY], "pretrain")
    torch.manual_seed(data.stream_seed(config["run"]["seed"], "weights"))
    model = build_arvideo(config)
    start = {name: tensor.clone() for name, tensor in model.encoder.state_dict().items()}
    pretrained = {name: tensor + 1 for name, tensor in model.state_dict().items()}
    encoders = evidence.read_encoders(dict(config=config, model=pretrained))
    for name, tensor in start.items():
        assert_equal(encoders["random"].state_dict()[name], tensor)
        assert_equal(encoders["pretrained"].state_dict()[name], tensor + 1)


def test_an_attentive_probe_finds_the_token_that_names_the_class(monkeypatch):
    monkeypatch.setattr(evidence, "STEPS", 300)
    torch.manual_seed(0)
    settings = load_config(["toy", *TINY], "finetune")["model"]
    build_probe = partial(Probe, 3, attentive=True, **encoder_arguments(settings))
    labels = torch.randint(3, (300,))
    noise = torch.randn(300, 16, settings["width"])
    # One token of every clip, anywhere, has two large values: a mark and the class
    tokens = noise.clone()
    rows = torch.arange(300)
    marked = torch.randint(16, (300,))
    tokens[rows, marked, 3] = 8.0
    tokens[rows, marked, labels] = 8.0
    accuracy = {}
    for name, inputs in (("tokens", tokens), ("noise", noise)):
        train, val = inputs.split([200, 100])
        accuracy[name] = evidence.attentive_accuracy(
            train, labels[:200], val, labels[200:], build_probe)
    assert accuracy["tokens"] > 85
    assert accuracy["noise"] < 50                       # chance is 33


# --- Estimated memory -------------------------------------------------------


def test_saved_tensors_are_counted_once_and_without_weights():
    x = torch.randn(2, 4, requires_grad=True)
    layer = torch.nn.Linear(4, 3)

    def forward():
        # Both layers need x [2, 4], GELU its input [2, 3], in four bytes each
        return layer(x).sum() + torch.nn.functional.gelu(layer(x)).sum()

    assert benchmark.count_saved(layer, forward) == [32 + 24]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_the_estimate_is_what_autograd_really_saves(stage, checkpointing):
    """Byte for byte: CUDA tensors without content, and tensors on the CPU that have some."""
    config = load_config([*TINY, f"model.checkpointing={checkpointing}"], "pretrain")
    estimated, once = benchmark.saved_on_gpu(config, stage)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        one = benchmark.saved_by_training(config, stage, 1)
        two = benchmark.saved_by_training(config, stage, 2)
    assert estimated == [more - less for less, more in zip(one, two)]
    assert once == pytest.approx(one[-1] - estimated[-1], rel=0.01)


@pytest.mark.slow
def test_the_estimate_for_the_paper():
    """ViT-B: pretraining saves 214 MiB a clip, 46 with checkpointing; fine-tuning 502 and 60."""
    _, rows = benchmark.benchmark_estimate(None, load_config(["k400"], "pretrain"), "cpu")
    assert [row["saved MiB a clip"] for row in rows] == ["214", "46", "502", "60"]
    assert rows[0]["GiB at batch 128"] == "28.4"


# --- The benchmarks ---------------------------------------------------------


def test_memory_doubles_the_batch_until_nothing_fits(monkeypatch):
    def peak(contender, config, batch, device):
        largest = 4 if contender.fused else 2
        return batch * 2**30 if batch <= largest else None

    monkeypatch.setattr(benchmark, "peak_memory_alone", peak)
    _, rows = benchmark.benchmark_memory(Namespace(batch=0), PAPER, "cuda")
    written_out, fused, ours = [contender.name for contender in contenders("step", "cuda")]
    assert [row["batch"] for row in rows] == [1, 2, 4, 8]
    assert [row[written_out] for row in rows] == [
        "1.00 GiB", "2.00 GiB", "does not fit", "not tried"]
    for name in (fused, ours):
        assert [row[name] for row in rows] == ["1.00 GiB", "2.00 GiB", "4.00 GiB", "does not fit"]


def test_an_unknown_setting_is_refused(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "step", "model.dept=2"])
    with pytest.raises(SystemExit, match="did you mean 'depth'"):
        benchmark.main()


COMMANDS = ["memory toy --batch 1", "estimate toy",
            "loader toy --batch 2 --rounds 1",
            "step toy --batch 2 --rounds 1", "decode video.mp4 --rounds 1",
            "augment toy finetune.rand_augment=[4,7.0] --rounds 1"]
REAL_COMMAND = "finetune toy --batch 2 --rounds 1"      # by python; the others by a fork


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """{command: (its process, prefix of the files with what it prints)}, running at once."""
    folder = tmp_path_factory.mktemp("benchmarks")
    benchmark.synthetic_video(folder / "video.mp4", 40, 96, 128, rate=25, key_frames=20)
    started = {}
    with open(folder / "finetune.out", "w") as out, open(folder / "finetune.err", "w") as err:
        script = ROOT / "tests" / "benchmark.py"
        process = subprocess.Popen([sys.executable, script, *REAL_COMMAND.split()],
                                   cwd=folder, stdout=out, stderr=err)
        started[REAL_COMMAND] = process, folder / "finetune"
    for command in COMMANDS:
        prefix = folder / command.split()[0]
        arguments = ("benchmark.py", command.split(), str(folder), str(prefix), USUAL_METHOD)
        process = SERVER.Process(target=run_main, args=arguments)
        process.start()
        started[command] = process, prefix
    return started


def check_printed(prefix, status):
    assert status == 0, Path(f"{prefix}.err").read_text()
    printed = Path(f"{prefix}.out").read_text()
    assert printed.count("|---") > 0
    assert len(printed.splitlines()) >= 6
    assert "torch" in printed


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_every_benchmark_runs(command, started):
    process, prefix = started[command]
    process.join(300)
    check_printed(prefix, process.exitcode)


@pytest.mark.slow
def test_a_benchmark_runs_as_a_real_command(started):
    process, prefix = started[REAL_COMMAND]
    check_printed(prefix, process.wait(300))


# --- The checks for a GPU ---------------------------------------------------


def fails(setup):
    gpu.require_close("one", 1.0, 2.0, tolerance=0.1)


def dies(setup):
    os._exit(3)


def hangs(setup):
    time.sleep(60)


@pytest.mark.parametrize("check, message", [
    (fails, "CheckFailed: one is 1 in place of 2, off by 0.5, more than 0.1"),
    (dies, "the process ended with 3"), (hangs, "no answer within 1 s")])
def test_a_check_fails_alone(check, message, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "CHECKS", {"check": check})
    monkeypatch.setattr(gpu, "LIMIT", 1)
    result, measured, _ = gpu.run_alone("check", "cpu", tmp_path)
    assert (result, measured) == ("failed", message)


def test_a_number_that_is_none_is_not_close():
    with pytest.raises(gpu.CheckFailed):
        gpu.require_close("a loss", float("nan"), 1.0, tolerance=1.0)


# --- The figures ------------------------------------------------------------


@pytest.mark.parametrize("low, high", [
    (0, 1), (0, 19.9), (0.856, 0.974), (0.9691, 0.9703), (-3, 250), (1, 4), (75, 100000)])
def test_ticks_are_a_few_round_numbers_within_the_range(low, high):
    found = figures.ticks(low, high)
    assert 4 <= len(found) <= 10
    assert low <= min(found) and max(found) <= high
    step = found[1] - found[0]
    assert float(f"{step:.6e}"[:8]) in (1, 2, 5)
    for number in found:
        assert number / step == pytest.approx(round(number / step), abs=1e-6)


def test_a_picture_shows_every_cluster_in_the_colour_of_its_place():
    torch.manual_seed(0)
    model = figures.load_model("random:toy")[0]
    order, *others = model.draw(2)
    video = torch.randn(2, 3, 8, 32, 32)
    picture = figures.draw_picture(model, video, order, *others)

    # 2 x 2 x 2 clusters of 2 columns and 64 x 64 pixels, in 2 x 3 rows of frames
    white = (255, 255, 255)
    for b in range(2):
        for place, cluster in enumerate(order[b].tolist(), 1):
            for row in range(3):
                for column in (cluster // 4 * 2, cluster // 4 * 2 + 1):
                    x = 90 + 138 * column + 64 * (cluster % 2)
                    y = 40 + 138 * (3 * b + row) + 64 * (cluster // 2 % 2)
                    assert picture.getpixel((x, y)) == figures.colour_of(place, 8)
                    is_white = picture.getpixel((x + 32, y + 32)) == white
                    assert is_white == ((row, place) in [(1, 8), (2, 1)])
