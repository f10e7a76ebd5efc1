"""
Speed and memory, as ratios between alternatives that are measured in turns in one run.

    python tests/benchmark.py step [PRESET] [section.key=value ...]
        a pretraining step of ARVideo and of VideoMAE (Table 5)
    python tests/benchmark.py memory [PRESET] [section.key=value ...]
        memory of the same, over batch sizes, until none fits
    python tests/benchmark.py estimate [PRESET] [section.key=value ...]
        memory that training takes on a GPU, computed without one
    python tests/benchmark.py finetune [PRESET] [section.key=value ...]
        a fine-tuning step with and without fused attention
    python tests/benchmark.py decode [VIDEO ...]
        clips a second of our reader and of others, on one core
    python tests/benchmark.py loader [PRESET] [section.key=value ...]
        clips a second of data.load_batches, and of the step that takes them
    python tests/benchmark.py augment [PRESET] [section.key=value ...]
        fine-tuning's augmentation, ours and VideoMAE's by Pillow, on one core

The preset is k400 (ViT-B, 16 x 224 x 224) by default. On CUDA the models run in bf16 and
compiled, VideoMAE also as its authors ran it. On the CPU they run in fp32 and not
compiled, and a step's absolute time is left out. --batch and --rounds set how much is
measured. Needs Linux, whose /proc tells the memory.
"""

import argparse
import contextlib
import datetime
import math
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Callable, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import av
import torch
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import to_tensor
from torchvision.transforms.v2 import RandomErasing, RandomResizedCrop

import arvideo
import data
from arvideo import (
    ARVideo, DecoderBlock, Encoder, EncoderBlock, LayerNorm, initialise, position_table, take,
    video_to_cubes)
from data import UserError
from train_finetune import Classifier, build_model, encoder_arguments
from train_pretrain import Machine, build_arvideo, load_config, make_optimizer


# --- Models to compare ------------------------------------------------------


class VideoMAE(nn.Module):
    """VideoMAE's pretraining model (Tong et al. 2022), from our blocks.

    A tube mask hides 90 % of the tokens. A decoder of self-attention over all tokens,
    half as wide as the encoder, predicts the hidden cubes. Without checkpointing.
    """

    def __init__(self, model):
        super().__init__()
        self.encoder = Encoder(**encoder_arguments(model))
        self.grid = self.encoder.grid
        self.cube = self.encoder.cube
        width = model["width"] // 2
        heads = model["heads"] // 2
        table = position_table(self.grid, width, model["positions"])            # [N, d]
        self.register_buffer("positions", table, persistent=False)
        self.encoder_to_decoder = nn.Linear(model["width"], width, bias=False)
        self.mask_token = nn.Parameter(torch.empty(width).normal_(std=0.02))
        blocks = [EncoderBlock(width, heads, model["mlp_ratio"]) for _ in range(4)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = LayerNorm(width)
        self.head = nn.Linear(width, 3 * math.prod(self.cube))
        for part in (self.encoder_to_decoder, self.blocks, self.head):
            part.apply(initialise)

    def draw(self, batch, generator=None):
        """The visible and the hidden tokens [B, ...]: the same ones in every time slice."""
        t, h, w = self.grid
        noise = torch.rand(batch, 1, h * w, device=self.positions.device, generator=generator)
        order = noise.argsort(2)
        first_of_slice = h * w * torch.arange(t, device=order.device)
        tokens = order + first_of_slice[:, None]                                # [B, t, h w]
        visible = h * w - int(0.9 * h * w)
        return tokens[:, :, :visible].flatten(1), tokens[:, :, visible:].flatten(1)

    def forward(self, video, visible, hidden):
        """The loss. The shapes are those of ViT-B."""
        cubes = video_to_cubes(video, self.cube)                                # [B, 1568, 3, P]
        # Embeds all cubes, as its code does
        embedded = self.encoder.patch_embed(cubes) + self.encoder.positions     # [B, 1568, D]
        x = take(embedded, visible)                                             # [B, 160, D]
        for block in self.encoder.blocks:
            x = block(x)
        memory = self.encoder_to_decoder(self.encoder.norm(x))                  # [B, 160, d]
        memory = memory + self.positions[visible]
        masked = self.mask_token + self.positions[hidden]                       # [B, 1408, d]
        x = torch.cat([memory, masked], dim=1)                                  # [B, 1568, d]
        for block in self.blocks:
            x = block(x)
        x = self.head(self.norm(x[:, visible.shape[1]:]))                       # [B, 1408, 3 P]
        prediction = x.unflatten(2, (3, -1))                                    # [B, 1408, 3, P]
        target = take(cubes, hidden)                                            # [B, 1408, 3, P]
        deviation, mean = torch.std_mean(target, dim=-1, keepdim=True)
        target = (target - mean) / (deviation + 1e-6)
        return F.mse_loss(prediction.float(), target)


class FineTuning(nn.Module):
    """A classifier with its loss. What it draws are labels."""

    def __init__(self, model):
        super().__init__()
        encoder = encoder_arguments(model)
        self.classifier = Classifier(400, drop_path=0.1, head_dropout=0.0, **encoder)

    def draw(self, batch):
        device = self.classifier.positions.device
        labels = torch.randint(400, (batch,), device=device)
        return (labels,)

    def forward(self, video, labels):
        return F.cross_entropy(self.classifier(video).float(), labels)


def pretraining_model(model):
    return ARVideo(**model)


def half_predicting_model(model):
    """Not the paper's: each step predicts half of every cluster's tokens."""
    return ARVideo(**{**model, "predict_ratio": 0.5})


def materialised(q, k, v, heads, mask=None):
    """arvideo.attend with the attention map written out, as VideoMAE's code has it."""
    q = q.unflatten(2, (heads, -1)).transpose(1, 2)             # [B, heads, n, w/heads]
    k = k.unflatten(2, (heads, -1)).transpose(1, 2)
    v = v.unflatten(2, (heads, -1)).transpose(1, 2)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)      # [B, heads, n, m]
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


@contextlib.contextmanager
def attention(fused):
    """Inside, attention is scaled_dot_product_attention, or else written out."""
    usual = arvideo.attend
    arvideo.attend = usual if fused else materialised
    try:
        yield
    finally:
        arvideo.attend = usual


class Contender(NamedTuple):
    """A model, built from section `model` of the settings, and how it runs."""
    name: str
    build: Callable
    fused: bool
    precision: str
    compiled: bool


def contenders(command, device):
    """Who is compared. The first is what the ratios refer to."""
    on_gpu = device == "cuda"
    fast = dict(precision="bf16" if on_gpu else "fp32", compiled=on_gpu)
    if command == "finetune":
        return [Contender("attention written out", FineTuning, fused=False, **fast),
                Contender("fused attention", FineTuning, fused=True, **fast)]
    as_published = dict(precision="fp16" if on_gpu else "fp32", compiled=False)
    return [Contender("VideoMAE, as its authors ran it", VideoMAE, fused=False, **as_published),
            Contender("VideoMAE, fused", VideoMAE, fused=True, **fast),
            Contender("ARVideo", pretraining_model, fused=True, **fast)]


# --- Measurements of a step -------------------------------------------------


def synchronise(device):
    if device == "cuda":
        torch.cuda.synchronize()


def make_step(contender, config, batch, device):
    """A function that makes a training step, the optimizer's included, and returns its seconds."""
    torch.manual_seed(0)
    machine = Machine(dict(
        device=device, precision=contender.precision, workers=0, compile=contender.compiled))
    model = machine.prepare(contender.build(config["model"]))
    optimizer = make_optimizer(model, config["pretrain"], machine.device)
    frames = config["model"]["frames"]
    size = config["model"]["size"]
    clips = torch.randint(256, (batch, 3, frames, size, size), dtype=torch.uint8)
    clips = clips.to(machine.device)

    def step():
        synchronise(device)
        began = time.perf_counter()
        # The backward pass is inside, since with checkpointing it goes forward again
        with attention(contender.fused):
            with machine.autocast():
                loss = model(data.normalise(clips, machine.device), *model.draw(batch))
            machine.scaler.scale(loss).backward()
        machine.scaler.step(optimizer)
        machine.scaler.update()
        optimizer.zero_grad()
        synchronise(device)
        return time.perf_counter() - began
    return step


def forward_flops(contender, config):
    """FLOPs of one video's forward pass, two for each multiply-add.

    They are counted on tensors without content.
    """
    frames = config["model"]["frames"]
    size = config["model"]["size"]
    with torch.device("meta"), attention(fused=False):
        model = contender.build(config["model"])
        video = torch.empty(1, 3, frames, size, size)
        with FlopCounterMode(display=False) as counter:
            model(video, *model.draw(1))
    return counter.get_total_flops()


def token_counts(contender, config):
    """Queries and keys of encoder and decoder, as in the paper's Table 5."""
    with torch.device("meta"):
        model = contender.build(config["model"])
    if isinstance(model, VideoMAE):
        visible, hidden = model.draw(1)
        S = visible.shape[1]
        N = S + hidden.shape[1]
        counts = [S, S, N, N]
    else:
        counts = [*model.encoder_mask.shape, *model.decoder_mask.shape]
    return dict(zip(("encoder Q", "K/V", "decoder Q", "decoder K/V"), counts))


def kernel_bytes(file, key):
    """A value that a file in /proc has in kB."""
    for line in Path(file).read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024


def most_resident():
    """The most memory that this process has had."""
    # From getrusage it would be inherited from the process that started this one
    return kernel_bytes("/proc/self/status", "VmHWM")


def peak_memory(contender, config, batch, device):
    """Bytes at the peak of two steps, or None if they do not fit.

    The allocator's on CUDA; else what the process grows by, which must be a new one.
    """
    before = most_resident()
    try:
        step = make_step(contender, config, batch, device)
        step()
        step()
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error):
            return None
        raise
    return torch.cuda.max_memory_allocated() if device == "cuda" else most_resident() - before


def peak_memory_alone(*arguments):
    """peak_memory in a process of its own; also None if the system ends that process."""
    start_anew = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=start_anew) as pool:
        try:
            return pool.submit(peak_memory, *arguments).result()
        except BrokenProcessPool:
            return None


def matrix_rate(precision, device):
    """FLOPs a second of a large matrix product, the best of ten."""
    n = 8192 if device == "cuda" else 2048
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    a = torch.randn(n, n, device=device, dtype=dtype)
    seconds = []
    for _ in range(10):
        synchronise(device)
        began = time.perf_counter()
        a @ a
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    return 2 * n ** 3 / min(seconds)


# --- Commands: step, finetune and memory ------------------------------------


def batch_size(options, device):
    return options.batch or (64 if device == "cuda" else 2)


def in_gib(memory):
    return f"{memory / 2**30:.2f}"


def benchmark_step(options, config, device):
    """`step` and `finetune`: a row for each contender, who take their steps in turns."""
    group = contenders(options.command, device)
    if options.command == "step":
        group.append(group[-1]._replace(
            name="ARVideo, predict_ratio 0.5", build=half_predicting_model))
    batch = batch_size(options, device)
    peaks = [peak_memory_alone(contender, config, batch, device) for contender in group]
    for contender, peak in zip(group, peaks):
        if peak is None:
            raise UserError(f"{contender.name} does not fit at batch {batch}: set --batch lower")
    steps = [make_step(contender, config, batch, device) for contender in group]
    for step in steps:                                  # warm up and compile
        step()
        step()
    seconds = [[] for _ in group]
    for _ in range(options.rounds):
        for times, step in zip(seconds, steps):
            times.append(step())
    precisions = {contender.precision for contender in group}
    rates = {precision: matrix_rate(precision, device) for precision in precisions}

    rows = []
    medians = [statistics.median(times) for times in seconds]
    for contender, times, median, peak in zip(group, seconds, medians, peaks):
        flops = forward_flops(contender, config)
        # A backward pass costs twice a forward pass
        rate = 3 * flops * batch / median
        row = {"": contender.name}
        row["precision"] = contender.precision + (", compiled" if contender.compiled else "")
        if options.command == "step":
            row.update(token_counts(contender, config))
        row["forward GFLOPs"] = f"{flops / 1e9:.3g}"
        if device == "cuda":
            row["s a step"] = f"{median:.3f}"
            row["clips/s"] = f"{batch / median:.1f}"
        row["fastest to slowest"] = f"{min(times) / median:.2f}-{max(times) / median:.2f}"
        row["of the matrix rate"] = f"{rate / rates[contender.precision]:.0%}"
        row["peak GiB"] = in_gib(peak)
        row["speed, ratio"] = f"{medians[0] / median:.2f}"
        row["memory, ratio"] = f"{peaks[0] / peak:.2f}"
        rows.append(row)
    return f"batch {batch}, {options.rounds} rounds in turns", rows


def benchmark_memory(options, config, device):
    """Doubles the batch until nothing fits, or beyond --batch.

    On the CPU a contender also leaves before the next size would not fit.
    """
    group = contenders("step", device)
    remaining = list(group)
    rows = []
    batch = 1
    while remaining:
        row = {"batch": batch}
        room = kernel_bytes("/proc/meminfo", "MemAvailable")
        for contender in group:
            row[contender.name] = "not tried"
            if contender not in remaining:
                continue
            peak = peak_memory_alone(contender, config, batch, device)
            row[contender.name] = f"{in_gib(peak)} GiB" if peak else "does not fit"
            is_near_the_end = peak and device == "cpu" and 2 * peak > room
            is_largest = 0 < options.batch < 2 * batch
            if peak is None or is_near_the_end or is_largest:
                remaining.remove(contender)
        rows.append(row)
        batch *= 2
    return "peak memory of two training steps", rows


# --- Command: estimate ------------------------------------------------------


def cudnn_attention(q, k, v, heads, mask=None):
    """arvideo.attend by one of CUDA's fused kernels, for tensors without content.

    Without a GPU scaled_dot_product_attention would choose the one that keeps the attention
    maps. The fused ones, flash and memory-efficient too, all keep q, k, v, the result and
    one number for each query and head.
    """
    q = q.unflatten(2, (heads, -1)).transpose(1, 2)             # [B, heads, n, w/heads]
    k = k.unflatten(2, (heads, -1)).transpose(1, 2)
    v = v.unflatten(2, (heads, -1)).transpose(1, 2)
    bias = None
    if mask is not None:
        bias = torch.zeros_like(mask, dtype=q.dtype).expand(*q.shape[:2], -1, -1)
    x = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, bias, compute_log_sumexp=True)[0]
    return x.transpose(1, 2).flatten(2)


@contextlib.contextmanager
def pretended_gpu():
    """Inside, tensors are on CUDA and have no content, and autocast is on, in bf16."""
    usual_attention = arvideo.attend
    arvideo.attend = cudnn_attention
    # Without a GPU torch.autocast refuses CUDA. This is what it would do
    torch.set_autocast_enabled("cuda", True)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    try:
        with FakeTensorMode(), torch.device("cuda"):
            yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", False)
        arvideo.attend = usual_attention


def count_saved(model, forward):
    """Bytes that `forward`, which calls the model, makes autograd save, blocks first to last.

    A list of totals: one after each block, and one at the end. Parameters and buffers are
    left out, and tensors that share their memory count once.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*model.parameters(), *model.buffers())}
    storages = {}
    totals = []

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            storages[storage._cdata] = storage          # held, so that its address stays its own
        return tensor

    def add_total(*_):
        totals.append(sum(storage.nbytes() for storage in storages.values()))

    blocks = [module for module in model.modules()
              if isinstance(module, (EncoderBlock, DecoderBlock))]
    hooks = [block.register_forward_hook(add_total) for block in blocks]
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    add_total()
    for hook in hooks:
        hook.remove()
    return totals


def saved_by_training(config, stage, batch):
    """count_saved of a micro-batch of so many clips, on torch's default device."""
    frames = config["model"]["frames"]
    size = config["model"]["size"]
    video = torch.empty(batch, 3, frames, size, size)
    if stage == "pretrain":
        model = build_arvideo(config)
        draw = model.draw(batch)
        return count_saved(model, lambda: model(video, *draw))
    model = build_model(config, classes=400)
    labels = torch.zeros(batch, dtype=torch.int64)
    return count_saved(model, lambda: F.cross_entropy(model(video).float(), labels))


def saved_on_gpu(config, stage):
    """(bytes for each clip, bytes whatever the batch) that autograd saves on a GPU in bf16.

    The first is a list as of count_saved.
    """
    with pretended_gpu():
        one = saved_by_training(config, stage, 1)
        two = saved_by_training(config, stage, 2)
    a_clip = [more - less for less, more in zip(one, two)]
    return a_clip, one[-1] - a_clip[-1]


def training_state(config, stage):
    """Bytes of the weights, their gradients and AdamW's two moments, all in fp32."""
    with torch.device("meta"):
        model = build_arvideo(config) if stage == "pretrain" else build_model(config, classes=400)
    return sum(parameter.nbytes * (4 if parameter.requires_grad else 1)
               for parameter in model.parameters())


class TrainingMemory(NamedTuple):
    """The memory, in bytes, that training takes on a GPU in bf16, not compiled."""
    saved_a_clip: int
    again_a_clip: int           # of the block that is computed again, with checkpointing
    constant: int               # weights, gradients, moments; the weights in bf16; masks

    def at_batch(self, batch):
        return self.constant + batch * (self.saved_a_clip + self.again_a_clip)


def estimate_memory(config, stage):
    """The TrainingMemory of section `stage` of the settings. It needs no GPU.

    Left out is what lives only within an operation or a block, such as gradients of
    activations. With a frozen encoder this is most of the memory.
    """
    saved, saved_once = saved_on_gpu(config, stage)
    again = 0
    if config["model"]["checkpointing"]:
        all_kept = {**config, "model": {**config["model"], "checkpointing": False}}
        plain, _ = saved_on_gpu(all_kept, stage)
        dropped = [all_of_it - kept for all_of_it, kept in zip(plain, saved)]
        again = max(after - before for before, after in pairwise([0, *dropped]))
    return TrainingMemory(saved[-1], again, saved_once + training_state(config, stage))


def benchmark_estimate(options, config, device):
    """A row for both trainings, without and with checkpointing."""
    rows = []
    for stage in ("pretrain", "finetune"):
        for checkpointing in (False, True):
            config["model"]["checkpointing"] = checkpointing
            memory = estimate_memory(config, stage)
            row = {"": stage + (", checkpointing" if checkpointing else "")}
            row["saved MiB a clip"] = f"{memory.saved_a_clip / 2**20:.0f}"
            row["MiB of a block, a clip"] = f"{memory.again_a_clip / 2**20:.0f}"
            row["constant GiB"] = in_gib(memory.constant)
            for batch in (16, 64, 128):
                row[f"GiB at batch {batch}"] = f"{memory.at_batch(batch) / 2**30:.1f}"
            rows.append(row)
    return "computed for CUDA in bf16, not compiled, with fused attention", rows


# --- Command: decode --------------------------------------------------------


def moving_pictures(frames, height, width, rate):
    """Frames uint8 [H, W, 3]: a camera drifts and turns over a texture, with a little noise."""
    generator = torch.Generator().manual_seed(0)
    texture = 0
    for n in (8, 16, 32, 64, 128, 256):
        octave = torch.randn(1, 3, n, n, generator=generator)
        octave = F.interpolate(octave, size=(768, 768), mode="bicubic")
        texture = texture + octave * 8 / n ** 0.5
    texture = (texture / texture.std() * 0.2 + 0.5).clamp(0, 1)
    for i in range(frames):
        seconds = i / rate
        angle = 0.1 * math.sin(seconds)
        zoom = 0.5 + 0.05 * math.cos(0.7 * seconds)
        cosine = zoom * math.cos(angle)
        sine = zoom * math.sin(angle)
        x = 0.2 * math.sin(0.5 * seconds)
        y = 0.2 * math.cos(0.3 * seconds)
        matrix = torch.tensor([[[cosine, -sine, x], [sine, cosine, y]]])
        grid = F.affine_grid(matrix, (1, 3, height, width), align_corners=False)
        picture = F.grid_sample(texture, grid, align_corners=False)
        picture = picture + 0.01 * torch.randn(picture.shape, generator=generator)
        picture = picture.clamp(0, 1)[0].permute(1, 2, 0)
        yield (picture * 255).byte().contiguous()


def synthetic_video(path, frames, height, width, rate, key_frames):
    """H.264 as x264's defaults make it, with a sound track."""
    options = {"g": str(key_frames), "crf": "23"}
    with av.open(str(path), "w") as container:
        video = container.add_stream(
            "libx264", rate=rate, width=width, height=height, options=options)
        video.pix_fmt = "yuv420p"
        sound = container.add_stream("aac", rate=44100)
        for pixels in moving_pictures(frames, height, width, rate):
            frame = av.VideoFrame.from_ndarray(pixels.numpy(), format="rgb24")
            container.mux(video.encode(frame))
        for _ in range(int(frames / rate * 44100 / 1024)):
            silence = av.AudioFrame(format="fltp", layout="stereo", samples=1024)
            silence.sample_rate = 44100
            for plane in silence.planes:
                plane.update(bytes(plane.buffer_size))
            container.mux(sound.encode(silence))
        container.mux(video.encode())
        container.mux(sound.encode())


# A reader takes a path and frame numbers, and returns the seconds that it needed


def read_ours(path, numbers):
    began = time.perf_counter()
    data.read_clips(path, lambda count: [numbers])
    return time.perf_counter() - began


def read_everything(path, numbers):
    """Decodes and converts all frames."""
    began = time.perf_counter()
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    torch.stack([torch.from_numpy(frames[number]) for number in numbers])
    return time.perf_counter() - began


def decode_packets(path, numbers):
    """libavcodec's own time for the packets that our reader feeds it.

    Nothing is opened, demuxed or converted. Not a number where our reader must decode
    from the start and count.
    """
    with data.open_video(path) as (container, stream):
        packets = data.read_packets(container, stream)
        if not data.timestamps_identify_frames(container, stream, packets):
            return math.nan
        shown = sorted(packet.pts for packet in packets if not packet.is_discard)
        wanted = {shown[number] for number in numbers}
        began = time.perf_counter()
        data.decode_indexed(stream.codec_context, packets, wanted, convert=lambda frame: None)
        return time.perf_counter() - began


def read_decord(path, numbers):
    import decord
    began = time.perf_counter()
    decord.VideoReader(str(path), num_threads=1).get_batch(numbers).asnumpy()
    return time.perf_counter() - began


def read_torchcodec(path, numbers):
    from torchcodec.decoders import VideoDecoder
    began = time.perf_counter()
    decoder = VideoDecoder(str(path), num_ffmpeg_threads=1, dimension_order="NHWC")
    decoder.get_frames_at(numbers)
    return time.perf_counter() - began


def usable_readers(path):
    """{name: reader}, without those that cannot read this file here."""
    readers = {
        "ours": read_ours, "all frames": read_everything, "libavcodec alone": decode_packets}
    for name, read in (("decord", read_decord), ("torchcodec", read_torchcodec)):
        try:
            read(path, [0])
            readers[name] = read
        except (ImportError, RuntimeError, OSError) as error:
            print(f"{name}: not measured ({str(error).strip().splitlines()[0]})")
    return readers


def synthetic_videos(folder):
    """[(name, path, stride), ...] of files that resemble those of two data sets."""
    k400 = dict(frames=250, height=256, width=454, rate=25)
    ssv2 = dict(frames=48, height=240, width=426, rate=12)
    videos = []
    for name, like, stride in (("K400", k400, 4), ("SSv2", ssv2, 2)):
        for key_frames in (250, 32):
            path = folder / f"{name}-{key_frames}.mp4"
            synthetic_video(path, key_frames=key_frames, **like)
            videos.append((f"{name}-like, key frames {key_frames} apart", path, stride))
    return videos


def count_frames(path):
    with data.open_video(path) as (container, stream):
        packets = data.read_packets(container, stream)
        return sum(not packet.is_discard for packet in packets)


def mean_seconds(runs, count, stride, rounds):
    """{name: mean seconds} of runs {name: run(numbers)} on random clips of `count` frames."""
    seconds = {name: [] for name in runs}
    for i in range(rounds + 1):
        numbers, = data.clamp(data.dense_clips(count, 16, stride), count)
        for name, run in runs.items():
            took = run(numbers)
            if i > 0:                                   # the first round warms up
                seconds[name].append(took)
    # Means over the same clips, since where a clip lies decides what it costs
    return {name: statistics.mean(times) for name, times in seconds.items()}


def benchmark_decode(options, config, device):
    """Every reader in turn on the same random clips.

    `shrunk` is our reader on what `data.py shrink` makes of the file.
    """
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        stride = config["data"]["stride"]
        videos = [(Path(video).name, Path(video), stride) for video in options.videos]
        videos = videos or synthetic_videos(folder)
        readers = usable_readers(videos[0][1])
        for name, path, stride in videos:
            shrunk = folder / f"shrunk-{path.stem}.mp4"
            reason = data.shrink_video((path, shrunk), short_side=320, key_frames=32)
            if reason:
                raise UserError(reason)
            runs = {reader: partial(read, path) for reader, read in readers.items()}
            runs["shrunk"] = partial(read_ours, shrunk)
            means = mean_seconds(runs, count_frames(path), stride, options.rounds)
            rate = {"clips/s": name}
            ratio = {"clips/s": "ours / this one"}
            for reader, mean in means.items():
                rate[reader] = f"{1 / mean:.1f}"
                ratio[reader] = f"{mean / means['ours']:.2f}"
            rows += [rate, ratio]
    return f"16 frames a clip, one core, {options.rounds} rounds in turns", rows


# --- Command: loader --------------------------------------------------------


def loader_rate(videos, workers, rounds, device):
    """Clips a second from data.load_batches, over ten micro-batches of 4 a round."""
    # As in train_pretrain.Machine: a process that has started CUDA must not be forked
    context = "forkserver" if device == "cuda" else None
    warm_up = 4                                         # micro-batches: the workers start
    order = data.training_order(len(videos), batch=4, first_step=0, end_step=warm_up + 10 * rounds,
                                seed=0, rank=0, world_size=1)
    batches = data.load_batches(videos, 4, order, workers, data.collate, context=context)
    for _ in range(warm_up):
        next(batches)
    began = time.perf_counter()
    clips = 0
    for batch in batches:
        clips += len(batch.clips)
    return clips / (time.perf_counter() - began)


def benchmark_loader(options, config, device):
    """The pretraining loader on K400-like files, beside the clips that ARVideo's step takes."""
    frames = config["model"]["frames"]
    size = config["model"]["size"]
    batch = batch_size(options, device)
    step = make_step(contenders("step", device)[-1], config, batch, device)
    step()                                              # warm up and compile
    consumed = batch / statistics.median(step() for _ in range(options.rounds))
    choose = partial(data.dense_clips, frames=frames, stride=config["data"]["stride"])
    augment = partial(data.pretraining_clip, size=size, flip=False)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        original = Path(folder, "original.mp4")
        shrunk = Path(folder, "shrunk.mp4")
        synthetic_video(original, 250, 256, 454, rate=25, key_frames=250)
        data.shrink_video((original, shrunk), short_side=320, key_frames=32)
        for path in (original, shrunk):
            videos = data.Videos([data.Entry(str(path), 0)] * 1000, choose, augment, seed=0)
            for workers in (1, 2):
                rate = loader_rate(videos, workers, options.rounds, device)
                rows.append({
                    "files": path.stem, "workers": workers, "clips/s": f"{rate:.1f}",
                    "clips/s of the step": f"{consumed:.2f}", "ratio": f"{rate / consumed:.1f}"})
    return f"K400-like files, step of batch {batch} on {device}", rows


# --- Command: augment -------------------------------------------------------


def pillow_operation(image, name, level, sign):
    """One operation of data.rand_augment, of one frame, by Pillow, as timm calls it.

    The sign is that of data.rand_augment; timm turns and moves the other way at a sign.
    """
    factor = max(0.1, 1 + 0.9 * level * sign)
    slope = 0.3 * level * sign
    move = 0.45 * level * sign
    bilinear = dict(resample=Image.Resampling.BILINEAR, fillcolor=(128, 128, 128))
    enhance = {"saturation": ImageEnhance.Color, "contrast": ImageEnhance.Contrast,
               "brightness": ImageEnhance.Brightness, "sharpness": ImageEnhance.Sharpness}
    affine = {"shear x": (1, slope, 0, 0, 1, 0), "shear y": (1, 0, 0, slope, 1, 0),
              "move x": (1, 0, -move * image.width, 0, 1, 0),
              "move y": (1, 0, 0, 0, 1, -move * image.height)}
    if name in affine:
        return image.transform(image.size, Image.Transform.AFFINE, affine[name], **bilinear)
    if name in enhance:
        return enhance[name](image).enhance(factor)
    if name == "rotate":
        return image.rotate(-30 * level * sign, **bilinear)
    if name == "posterize":
        return ImageOps.posterize(image, 4 - int(4 * level))
    if name == "solarize":
        return ImageOps.solarize(image, 256 - int(256 * level))
    if name == "solarize add":
        more = int(110 * level)
        table = [min(255, value + more) if value < 128 else value for value in range(256)]
        return image.point(table * 3)
    plain = {"autocontrast": ImageOps.autocontrast, "equalize": ImageOps.equalize,
             "invert": ImageOps.invert}
    return plain[name](image)


def videomae_clip(frames, size, flip, crop_area, rand_augment_strength, erase):
    """VideoMAE's counterpart of data.finetuning_clip, with the same draws.

    From frames uint8 [T, H, W, 3] to normalised floats [3, T, size, size]. Pillow augments
    the frames one by one. The crop, which is not antialiased, and all else are of floats.
    """
    images = [Image.fromarray(frame.numpy()) for frame in frames]
    for name, level, sign in data.draw_operations(*rand_augment_strength):
        images = [pillow_operation(image, name, level, sign) for image in images]
    clip = torch.stack([to_tensor(image) for image in images]).transpose(0, 1)  # [3, T, H, W]
    clip = (clip - data.IMAGENET_MEAN) / data.IMAGENET_STD

    crop = RandomResizedCrop(size, scale=crop_area, ratio=(3 / 4, 4 / 3))
    box = crop.make_params([clip])
    rows = slice(box["top"], box["top"] + box["height"])
    columns = slice(box["left"], box["left"] + box["width"])
    clip = F.interpolate(
        clip[:, :, rows, columns], size=(size, size), mode="bilinear", align_corners=False)
    if flip:
        clip = data.random_flip(clip)

    if torch.rand(()) < erase:
        box = RandomErasing(scale=(0.02, 1 / 3), ratio=(0.3, 1 / 0.3)).make_params([clip])
        if box["v"] is not None:
            rows = slice(box["i"], box["i"] + box["h"])
            columns = slice(box["j"], box["j"] + box["w"])
            noise = torch.randn(len(frames), 3, box["h"], box["w"])
            clip[:, :, rows, columns] = noise.transpose(0, 1)
    return clip


def our_clip(frames, **settings):
    """[3, T, size, size] in uint8, as a worker process hands it over."""
    return data.finetuning_clip(frames.permute(0, 3, 1, 2), **settings).transpose(0, 1).contiguous()


def our_normalised_clip(frames, **settings):
    return data.normalise(our_clip(frames, **settings), "cpu")


def benchmark_augment(options, config, device):
    """The CPU time of a clip, its best of three turns, with the same draws for all.

    All begin with the same decoded frames. VideoMAE ends with normalised floats. We end
    with uint8, which the device normalises; the last row does this on the CPU.
    """
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    finetune = config["finetune"]
    frames = torch.stack(list(moving_pictures(config["model"]["frames"], 256, 340, rate=25)))
    settings = dict(size=config["model"]["size"], flip=finetune["flip"],
                    crop_area=finetune["crop_area"], erase=finetune["erase"],
                    rand_augment_strength=finetune["rand_augment"])
    runs = {"VideoMAE's, by Pillow": videomae_clip, "ours, to uint8": our_clip,
            "ours, normalised too": our_normalised_clip}
    best = {name: [] for name in runs}
    for seed in range(options.rounds):                  # what is drawn decides what it costs
        seconds = {name: [] for name in runs}
        for _ in range(3):
            for name, run in runs.items():
                torch.manual_seed(seed)
                began = time.process_time()
                run(frames, **settings)
                seconds[name].append(time.process_time() - began)
        for name, times in seconds.items():
            best[name].append(min(times))

    means = {name: statistics.mean(times) for name, times in best.items()}
    reference = means["VideoMAE's, by Pillow"]
    rows = [{"": name, "ms a clip": f"{1000 * mean:.1f}", "ratio": f"{mean / reference:.2f}"}
            for name, mean in means.items()]
    return f"{len(frames)} frames of 340 x 256, one core, mean of {options.rounds} clips", rows


# --- Command line -----------------------------------------------------------

COMMANDS = {
    "step": benchmark_step,
    "memory": benchmark_memory,
    "estimate": benchmark_estimate,
    "finetune": benchmark_step,
    "decode": benchmark_decode,
    "loader": benchmark_loader,
    "augment": benchmark_augment,
}


def describe_machine(device):
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.split(":")[1].strip()
    gpu = torch.cuda.get_device_name() if device == "cuda" else "no GPU"
    return (f"{len(os.sched_getaffinity(0))} cores of {cpu}, {gpu}, torch {torch.__version__}, "
            f"PyAV {av.__version__}")


def print_table(rows):
    print("| " + " | ".join(rows[0]) + " |")
    print("|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(map(str, row.values())) + " |")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("words", nargs="*",
                        help="PRESET and section.key=value; for decode, videos")
    parser.add_argument("--batch", type=int, default=0, help="videos a step (default: 64 on CUDA, "
                        "2 on the CPU); for memory the largest (default: no limit)")
    parser.add_argument("--rounds", type=int, default=0,
                        help="rounds (default: 20 for decode, 60 for augment, where each is "
                        "a clip; of the others 10 on CUDA, else 3)")
    options = parser.parse_args()
    if "RANK" in os.environ:
        parser.error("run it without torchrun: it measures one process")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    is_decode = options.command == "decode"
    options.videos = options.words if is_decode else []
    usual_rounds = {"decode": 20, "augment": 60}.get(options.command)
    options.rounds = options.rounds or usual_rounds or (10 if device == "cuda" else 3)
    settings = [] if is_decode else options.words
    if all("=" in word for word in settings):           # no preset
        settings = ["k400", *settings]
    try:
        config = load_config(settings, "pretrain")
        print(f"$ python {shlex.join(sys.argv)}")
        print(f"{describe_machine(device)}, {datetime.date.today()}", flush=True)
        what, rows = COMMANDS[options.command](options, config, device)
    except (UserError, data.UnreadableVideo) as error:
        sys.exit(str(error))
    print(f"{what}\n")
    print_table(rows)


if __name__ == "__main__":
    main()
