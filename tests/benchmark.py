"""
Speed and memory, as ratios measured in turns in one run; absolute times of steps only on a GPU.

    python tests/benchmark.py step [PRESET] [section.key=value ...]     a pretraining step beside VideoMAE's (Table 5)
    python tests/benchmark.py memory [PRESET] [...]                     the same over batch sizes, until none fits
    python tests/benchmark.py finetune [PRESET] [...]                   a fine-tuning step with and without fused attention
    python tests/benchmark.py decode [VIDEO ...]                        clips a second on one core, beside other readers
    python tests/benchmark.py loader [PRESET] [...]                     the DataLoader's clips a second, and what the step takes

The preset is k400 (ViT-B, 16 x 224 x 224) by default. On CUDA the models run in bf16 and compiled, VideoMAE also as
its authors ran it; on the CPU in fp32 and not compiled. --batch and --rounds set how much is measured.
"""

import argparse
import contextlib
import datetime
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import av
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

import arvideo
import data
from arvideo import ARVideo, Encoder, EncoderBlock, LayerNorm, initialise, position_table, take, video_to_cubes
from train_finetune import Classifier, encoder_arguments
from train_pretrain import adamw, load_config, mixed_precision


# ---------------------------------------------------------------------------------------------------
# VideoMAE, from the same blocks


class VideoMAE(nn.Module):
    """VideoMAE's pretraining model (Tong et al. 2022) on our encoder: a tube mask hides 90 % of the tokens, a decoder
    of self-attention over all tokens, half as wide as the encoder, predicts the hidden cubes."""

    def __init__(self, model):
        super().__init__()
        self.encoder = Encoder(**encoder_arguments(model))
        self.grid, self.cube, width, heads = self.encoder.grid, self.encoder.cube, model["width"] // 2, model["heads"] // 2
        self.encoder_to_decoder = nn.Linear(model["width"], width, bias=False)
        self.mask_token = nn.Parameter(torch.empty(width).normal_(std=0.02))
        self.register_buffer("positions", position_table(self.grid, width, model["positions"]), persistent=False)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, model["mlp_ratio"]) for _ in range(4))
        self.norm = LayerNorm(width)
        self.head = nn.Linear(width, 3 * self.cube[0] * self.cube[1] * self.cube[2])
        for part in (self.encoder_to_decoder, self.blocks, self.head):
            part.apply(initialise)

    def draw(self, batch):
        """The visible and the hidden tokens [B, ...]: the same places in every time slice."""
        t, places = self.grid[0], self.grid[1] * self.grid[2]
        order = torch.rand(batch, 1, places, device=self.positions.device).argsort(2)
        tokens = order + places * torch.arange(t, device=order.device)[:, None]                 # [B, t, places]
        visible = places - int(0.9 * places)
        return tokens[:, :, :visible].flatten(1), tokens[:, :, visible:].flatten(1)

    def forward(self, video, visible, hidden):
        cubes = video_to_cubes(video, self.cube)                                                # [B, N, 3, P]
        x = take(self.encoder.patch_embed(cubes) + self.encoder.positions, visible)             # embeds all cubes, as its code does
        for block in self.encoder.blocks:
            x = block(x)                                                                        # [B, 160, D]
        memory = self.encoder_to_decoder(self.encoder.norm(x))                                  # [B, 160, d]
        x = torch.cat([memory + self.positions[visible], self.mask_token + self.positions[hidden]], dim=1)
        for block in self.blocks:
            x = block(x)                                                                        # [B, 1568, d]
        prediction = self.head(self.norm(x[:, visible.shape[1]:])).unflatten(2, (3, -1))        # [B, 1408, 3, P]
        truth = take(cubes, hidden)
        deviation, mean = torch.std_mean(truth, dim=-1, keepdim=True)
        return F.mse_loss(prediction.float(), (truth - mean) / (deviation + 1e-6))


class FineTuning(nn.Module):
    """A classifier with its loss; what it draws are labels."""

    def __init__(self, model):
        super().__init__()
        self.classifier = Classifier(400, 0.1, 0.0, **encoder_arguments(model))

    def draw(self, batch):
        return (torch.randint(400, (batch,), device=self.classifier.positions.device),)

    def forward(self, video, labels):
        return F.cross_entropy(self.classifier(video).float(), labels)


def materialised(q, k, v, heads, mask=None):
    """arvideo.attend with the attention map written out, as VideoMAE's code has it."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


# ---------------------------------------------------------------------------------------------------
# Steps


Contender = namedtuple("Contender", "name build fused precision compiled")     # fused: scaled_dot_product_attention


def contenders(command, device):
    """Who is compared. The first is what the ratios refer to."""
    if command == "finetune":
        dress = ("bf16", True) if device == "cuda" else ("fp32", False)
        return [Contender("attention written out", FineTuning, False, *dress), Contender("fused attention", FineTuning, True, *dress)]
    if device == "cuda":
        return [Contender("VideoMAE, as its authors ran it", VideoMAE, False, "fp16", False),
                Contender("VideoMAE, fused", VideoMAE, True, "bf16", True),
                Contender("ARVideo", pretraining_model, True, "bf16", True)]
    return [Contender("VideoMAE, as its authors ran it", VideoMAE, False, "fp32", False),
            Contender("VideoMAE, fused", VideoMAE, True, "fp32", False),
            Contender("ARVideo", pretraining_model, True, "fp32", False)]


def pretraining_model(model):
    return ARVideo(**model)


@contextlib.contextmanager
def attention(fused):
    usual = arvideo.attend
    arvideo.attend = usual if fused else materialised
    try:
        yield
    finally:
        arvideo.attend = usual


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stepper(contender, config, batch, device):
    """A function that makes one training step, the optimizer's included, and returns its seconds."""
    torch.manual_seed(0)
    size, frames = config["model"]["size"], config["model"]["frames"]
    model = contender.build(config["model"]).to(device)
    forward = torch.compile(model) if contender.compiled else model
    optimizer = adamw(model, config["pretrain"], device)
    autocast, scaler = mixed_precision(contender.precision, device)
    clips = torch.randint(256, (batch, 3, frames, size, size), dtype=torch.uint8, device=device)

    def step():
        synchronise(device)
        began = time.perf_counter()
        with attention(contender.fused), autocast():
            loss = forward(data.normalise(clips, device), *model.draw(batch))
        with attention(contender.fused):                # for activation checkpointing, which goes forward again
            scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        synchronise(device)
        return time.perf_counter() - began
    return step


def forward_flops(contender, config):
    """FLOPs of one video's forward pass, two for each multiply-add, counted on tensors without content."""
    size, frames = config["model"]["size"], config["model"]["frames"]
    with torch.device("meta"), attention(False), FlopCounterMode(display=False) as counter:
        model = contender.build(config["model"])
        model(torch.empty(1, 3, frames, size, size), *model.draw(1))
    return counter.get_total_flops()


def peak_memory(command, name, config, batch, device):
    """Bytes at the peak of two steps, run alone in this process: the allocator's on CUDA; else what the process grows
    by. None if they do not fit."""
    contender, before = next(c for c in contenders(command, device) if c.name == name), most_resident()
    try:
        step = stepper(contender, config, batch, torch.device(device))
        step(), step()
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error):
            return None
        raise
    return torch.cuda.max_memory_allocated() if device == "cuda" else most_resident() - before


def most_resident():
    """Bytes; not from getrusage, whose maximum a process inherits from the one that started it."""
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))


def alone(function, *arguments):
    """function(*arguments) in a process of its own, or None if the system ends that process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            return None


def matrix_rate(precision, device):
    """FLOPs a second of a large matrix product, the best of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype={"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision])
    seconds = []
    for _ in range(10):
        synchronise(device)
        began = time.perf_counter()
        a @ a
        synchronise(device)
        seconds.append(time.perf_counter() - began)
    return 2 * n ** 3 / min(seconds)


def tokens(contender, config):
    """Encoder's and decoder's queries and keys, as in Table 5."""
    if contender.build is VideoMAE:
        model = VideoMAE(config["model"])
        visible, hidden = (index.shape[1] for index in model.draw(1))
        return [visible, visible, visible + hidden, visible + hidden]
    model = ARVideo(**config["model"])
    S, Q = len(model.encoder_mask), len(model.decoder_mask)
    return [S, S, Q, S]


def benchmark_step(options, config, device):
    group, batch = contenders(options.command, device.type), options.batch or (64 if device.type == "cuda" else 2)
    memory = [alone(peak_memory, options.command, contender.name, config, batch, device.type) for contender in group]
    steps = [stepper(contender, config, batch, device) for contender in group]
    for step in steps:
        step(), step()                                  # warm up and compile
    seconds = list(zip(*([step() for step in steps] for _ in range(options.rounds))))           # in turns
    rates = {precision: matrix_rate(precision, device) for precision in {contender.precision for contender in group}}
    first = statistics.median(seconds[0])
    rows = []
    for contender, times, peak in zip(group, seconds, memory):
        median, flops = statistics.median(times), forward_flops(contender, config)
        counts = dict(zip(("encoder Q", "K/V", "decoder Q", "decoder K/V"), tokens(contender, config))) if options.command == "step" else {}
        rows.append({
            "": contender.name, "precision": contender.precision + (", compiled" if contender.compiled else ""), **counts,
            "forward GFLOPs": f"{flops / 1e9:.3g}",
            **(dict(zip(("s a step", "clips/s"), (f"{median:.3f}", f"{batch / median:.1f}"))) if device.type == "cuda" else {}),
            "fastest to slowest": f"{min(times) / median:.2f}-{max(times) / median:.2f}",
            "of the matrix rate": f"{3 * flops * batch / median / rates[contender.precision]:.0%}",     # backward: twice forward
            "peak GiB": f"{peak / 2**30:.2f}" if peak else "does not fit",
            "speed, ratio": f"{first / median:.2f}", "memory, ratio": f"{memory[0] / peak:.2f}" if peak and memory[0] else "-"})
    return f"batch {batch}, {options.rounds} rounds in turns", rows


def benchmark_memory(options, config, device):
    """Doubles the batch until nothing fits; on the CPU also before the next size would not."""
    group, rows, batch = contenders("step", device.type), [], 1
    while group:
        row = {"batch": batch}
        room = next(int(line.split()[1]) * 1024 for line in open("/proc/meminfo") if line.startswith("MemAvailable"))
        for contender in contenders("step", device.type):
            row[contender.name] = "not tried"
            if contender in group:
                peak = alone(peak_memory, "step", contender.name, config, batch, device.type)
                row[contender.name] = f"{peak / 2**30:.2f} GiB" if peak else "does not fit"
                if peak is None or device.type == "cpu" and 2 * peak > room or 0 < options.batch < 2 * batch:
                    group.remove(contender)
        rows.append(row)
        batch *= 2
    return "peak memory of two training steps", rows


# ---------------------------------------------------------------------------------------------------
# Decoding


def synthetic_video(path, frames, height, width, rate, key_frames):
    """H.264 as x264's defaults make it: a camera that drifts and turns over a texture, with a little noise and a sound track."""
    generator = torch.Generator().manual_seed(0)
    texture = sum(F.interpolate(torch.randn(1, 3, n, n, generator=generator), size=(768, 768), mode="bicubic") * 8 / n ** 0.5
                  for n in (8, 16, 32, 64, 128, 256))
    texture = (texture / texture.std() * 0.2 + 0.5).clamp(0, 1)
    with av.open(str(path), "w") as container:
        video = container.add_stream("libx264", rate=rate, options={"g": str(key_frames), "crf": "23"})
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        sound = container.add_stream("aac", rate=44100)
        for i in range(frames):
            time_ = torch.tensor(i / rate)
            angle, zoom = 0.1 * time_.sin(), 0.5 + 0.05 * (0.7 * time_).cos()
            turn = torch.stack([torch.stack([angle.cos() * zoom, -angle.sin() * zoom, 0.2 * (0.5 * time_).sin()]),
                                torch.stack([angle.sin() * zoom, angle.cos() * zoom, 0.2 * (0.3 * time_).cos()])])
            picture = F.grid_sample(texture, F.affine_grid(turn[None], (1, 3, height, width), align_corners=False), align_corners=False)
            picture = (picture + 0.01 * torch.randn(picture.shape, generator=generator)).clamp(0, 1)[0].permute(1, 2, 0)
            frame = av.VideoFrame.from_ndarray((picture * 255).byte().contiguous().numpy(), format="rgb24")
            container.mux(video.encode(frame))
        for _ in range(int(frames / rate * 44100 / 1024)):
            silence = av.AudioFrame(format="fltp", layout="stereo", samples=1024)
            silence.sample_rate = 44100
            for plane in silence.planes:
                plane.update(bytes(plane.buffer_size))
            container.mux(sound.encode(silence))
        container.mux(video.encode())
        container.mux(sound.encode())


def read_ours(path, indices):
    began = time.perf_counter()
    data.read_clips(path, lambda count: [indices])
    return time.perf_counter() - began


def read_everything(path, indices):
    """Decodes and converts all frames."""
    began = time.perf_counter()
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    torch.stack([torch.from_numpy(frames[i]) for i in indices])
    return time.perf_counter() - began


def decode_packets(path, indices):
    """libavcodec's own time for the packets that our reader feeds it: nothing opened, demuxed or converted. Not a
    number where our reader must decode from the start and count."""
    with data.open_video(path) as (container, stream):
        packets = data.read_packets(container, stream)
        if not data.timestamps_are_an_index(container, stream, packets):
            return float("nan")
        shown = sorted(packet.pts for packet in packets if not packet.is_discard)
        wanted, convert = {shown[i] for i in indices}, data.convert
        data.convert = lambda frame: None
        try:
            began = time.perf_counter()
            data.decode_indexed(stream.codec_context, packets, wanted)
            return time.perf_counter() - began
        finally:
            data.convert = convert


def read_decord(path, indices):
    import decord
    began = time.perf_counter()
    decord.VideoReader(str(path), num_threads=1).get_batch(indices).asnumpy()
    return time.perf_counter() - began


def read_torchcodec(path, indices):
    from torchcodec.decoders import VideoDecoder
    began = time.perf_counter()
    VideoDecoder(str(path), num_ffmpeg_threads=1, dimension_order="NHWC").get_frames_at(indices)
    return time.perf_counter() - began


def count_frames(path):
    with data.open_video(path) as (container, stream):
        return sum(not packet.is_discard for packet in data.read_packets(container, stream))


def benchmark_decode(options, config, device):
    """Every reader in turn on the same random clips. `shrunk` is our reader on what `data.py shrink` made of the file."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    readers = {"ours": read_ours, "all frames": read_everything, "libavcodec alone": decode_packets}
    with tempfile.TemporaryDirectory() as folder:
        folder, jobs = Path(folder), []                 # (name, file, stride)
        if not options.videos:
            for name, frames, size, rate, keys, stride in (
                    ("K400-like, key frames 250 apart", 250, (256, 454), 25, 250, 4), ("K400-like, 32 apart", 250, (256, 454), 25, 32, 4),
                    ("SSv2-like, key frames 250 apart", 48, (240, 426), 12, 250, 2), ("SSv2-like, 32 apart", 48, (240, 426), 12, 32, 2)):
                path = folder / f"{len(jobs)}.mp4"
                synthetic_video(path, frames, *size, rate, keys)
                jobs.append((name, path, stride))
        for video in options.videos:
            jobs.append((Path(video).name, Path(video), config["data"]["stride"]))
        for name, read in (("decord", read_decord), ("torchcodec", read_torchcodec)):
            try:
                read(jobs[0][1], [0])
                readers[name] = read
            except (ImportError, RuntimeError, OSError) as error:
                print(f"{name}: not measured ({str(error).strip().splitlines()[0]})")
        rows = []
        for name, path, stride in jobs:
            shrunk = folder / f"shrunk-{path.stem}.mp4"
            if reason := data.shrink_video((path, shrunk), 320, 32):
                raise SystemExit(reason)
            runs = {**{who: partial(read, path) for who, read in readers.items()}, "shrunk": partial(read_ours, shrunk)}
            seconds, count = {who: [] for who in runs}, count_frames(path)
            for i in range(options.rounds + 1):
                indices = data.dense_clips(count, 16, stride)[0]
                indices = [min(index, count - 1) for index in indices]
                for who, run in runs.items():
                    took = run(indices)
                    if i:                               # the first round warms up
                        seconds[who].append(took)
            # A clip's cost depends on its place in the video: means over the same clips
            means = {who: statistics.mean(times) for who, times in seconds.items()}
            rows.append({"clips/s": name, **{who: f"{1 / mean:.1f}" for who, mean in means.items()}})
            rows.append({"clips/s": "ours / this one", **{who: f"{mean / means['ours']:.2f}" for who, mean in means.items()}})
    return f"16 frames a clip, one core, {options.rounds} rounds in turns", rows


def benchmark_loader(options, config, device):
    """The pretraining loader on K400-like files, and what an ARVideo step on this device takes."""
    size, frames, batch = config["model"]["size"], config["model"]["frames"], options.batch or (64 if device.type == "cuda" else 2)
    step = stepper(contenders("step", device.type)[-1], config, batch, device)
    step()
    consumed = batch / statistics.median(step() for _ in range(options.rounds))
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        original, shrunk = Path(folder, "original.mp4"), Path(folder, "shrunk.mp4")
        synthetic_video(original, 250, 256, 454, 25, 250)
        data.shrink_video((original, shrunk), 320, 32)
        for path in (original, shrunk):
            choose = partial(data.dense_clips, frames=frames, stride=config["data"]["stride"])
            videos = data.Videos([(str(path), 0)] * 1000, choose, partial(data.pretraining_clip, size=size, flip=False), 0)
            for workers in (1, 2):
                loader = DataLoader(videos, 4, sampler=data.training_order(1000, 4, 0, 44, 0, 0, 1), num_workers=workers, collate_fn=data.collate)
                batches = iter(loader)
                for _ in range(4):                      # the workers have started
                    next(batches)
                began = time.perf_counter()
                clips = sum(len(clips) for clips, _, _ in batches)
                rate = clips / (time.perf_counter() - began)
                rows.append({"files": path.stem, "workers": workers, "clips/s": f"{rate:.1f}", "clips/s of the step": f"{consumed:.2f}",
                             "ratio": f"{rate / consumed:.1f}"})
    return f"K400-like files, step of batch {batch} on {device}", rows


# ---------------------------------------------------------------------------------------------------


def machine(device):
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        name = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else "no GPU"
    return f"{len(os.sched_getaffinity(0))} cores of {name}, {gpu}, torch {torch.__version__}, PyAV {av.__version__}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("step", "memory", "finetune", "decode", "loader"))
    parser.add_argument("arguments", nargs="*", help="PRESET and section.key=value, or videos for decode")
    parser.add_argument("--batch", type=int, default=0, help="videos a step (default: 64 on CUDA, 2 on the CPU); for memory the largest")
    parser.add_argument("--rounds", type=int, default=0, help="rounds (default: 20 for decode, 10 on CUDA, else 3)")
    options = parser.parse_args()
    options.videos = options.arguments if options.command == "decode" else []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    options.rounds = options.rounds or (20 if options.command == "decode" else 10 if device.type == "cuda" else 3)
    config = load_config((not options.videos and options.arguments) or ["k400"], "pretrain")
    print(f"$ python {shlex.join(sys.argv)}\n{machine(device)}, {datetime.date.today()}")
    run = dict(memory=benchmark_memory, decode=benchmark_decode, loader=benchmark_loader).get(options.command, benchmark_step)
    what, rows = run(options, config, device)
    print(f"{what}\n")
    print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row.values()) + " |")


if __name__ == "__main__":
    main()
