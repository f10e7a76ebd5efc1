"""
Pretrain ARVideo: configuration, processes, the training loop, checkpoints and pictures.

    python train_pretrain.py [PRESET ...] [section.key=value ...]                   one process; preset `toy` by default
    torchrun --nproc_per_node=8 train_pretrain.py k400 data.root=/data/k400         eight GPUs
    python train_pretrain.py --help                                                 presets and sections
    python train_pretrain.py k400 large --show                                      the resolved configuration

The same command goes on from the last checkpoint in run.output.
"""

import atexit
import colorsys
import contextlib
import difflib
import itertools
import json
import math
import os
import signal
import sys
import time
from collections import namedtuple
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import yaml
from PIL import Image, ImageDraw
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import data
from arvideo import ARVideo

CONFIG = Path(__file__).with_name("config.yaml")
POSITIVE = ("stride", "epochs", "batch", "clips_per_video", "lr", "picture_epochs", "validate_epochs", "test_clips",
            "test_crops")
BELOW_ONE = ("betas", "drop_path", "head_dropout", "label_smoothing")
as_yaml = partial(yaml.safe_dump, sort_keys=False, default_flow_style=None)
CHOICES = {"run.device": ["auto", "cuda", "mps", "cpu"], "run.precision": ["auto", "bf16", "fp16", "fp32"],
           "finetune.probe": ["none", "linear", "attentive"], "finetune.sampling": ["dense", "segments"]}


# --- Configuration --------------------------------------------------------------------------------

class StrictLoader(yaml.SafeLoader):
    """YAML without code, in which a key that stands twice is an error instead of a silent choice."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' stands twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def read_config_file():
    """config.yaml as it stands there: sections and presets. SystemExit names the line of a mistake."""
    try:
        return yaml.load(CONFIG.read_text(encoding="utf-8"), StrictLoader)
    except (OSError, yaml.MarkedYAMLError) as error:
        line = f", line {error.problem_mark.line + 1}" if getattr(error, "problem_mark", None) else ""
        raise SystemExit(f"{CONFIG}{line}: {getattr(error, 'problem', error)}") from None


def check_known(name, known, what):
    """SystemExit for an unknown name, with the known one that it resembles most."""
    if name not in known:
        close, = difflib.get_close_matches(name, known, n=1, cutoff=0)
        raise SystemExit(f"{what} '{name}' is unknown; did you mean '{close}'? Known: {', '.join(known)}")


def checked(value, default, name):
    """`value` in the kind of `default`; SystemExit if it is of another."""
    kind = type(default)
    if kind is float and type(value) in (int, str):     # YAML reads 1e-3, without a dot, as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if type(value) is not kind or kind is list and len(value) != len(default):
        wanted = f"a list of {len(default)}" if kind is list else f"of kind {kind.__name__}"
        raise SystemExit(f"{name} must be {wanted}, like {default!r}; found {value!r}")
    return [checked(item, like, name) for item, like in zip(value, default)] if kind is list else value


def load_config(arguments, stage):
    """The configuration of a command line: config.yaml, then the presets named, then section.key=value.
    Prints and exits for --help and --show; SystemExit names what is unknown or of the wrong kind."""
    config = read_config_file()
    presets = config.pop("presets")
    if {"-h", "--help"} & set(arguments):
        print(f"usage: python train_{stage}.py [PRESET ...] [section.key=value ...] [--show]\n\n"
              f"presets: {', '.join(presets)} (several may follow each other; none: toy)\nsections and keys:",
              *(f"  {section}: {', '.join(keys)}" for section, keys in config.items()),
              f"\nEvery key is explained in {CONFIG.name}; --show prints the values of this command.", sep="\n")
        raise SystemExit(0)
    names = [a for a in arguments if "=" not in a and a != "--show"] or ["toy"]
    changes = [(section, key, value) for section, keys in config.items() for key, value in keys.items()]
    for name in names:
        check_known(name, presets, "preset")
        changes += [(section, key, value) for section, keys in presets[name].items() for key, value in keys.items()]
    for argument in [a for a in arguments if "=" in a]:
        dotted, _, value = argument.partition("=")
        section, dot, key = dotted.partition(".")
        if not dot:
            raise SystemExit(f"'{argument}' is not of the form section.key=value")
        if not isinstance(config.get(section, {}).get(key), str):
            with contextlib.suppress(yaml.YAMLError):   # what is no YAML is text, and refused as such below
                value = yaml.safe_load(value)
        changes.append((section, key, value))
    for section, key, value in changes:
        check_known(section, config, "section")
        check_known(key, config[section], f"key of section {section}")
        name = f"{section}.{key}"
        config[section][key] = value = checked(value, config[section][key], name)
        check_known(value, CHOICES.get(name, [value]), name)
        numbers = [n for n in (value if type(value) is list else [value]) if type(n) in (int, float)]
        if not all(n > 0 if key in POSITIVE else n >= 0 for n in numbers):              # nor NaN
            raise SystemExit(f"{name}={value}: it must be greater than 0{'' if key in POSITIVE else ', or 0'}")
        if key in BELOW_ONE and max(numbers) >= 1:
            raise SystemExit(f"{name}={value}: it must be less than 1")
        if key == "crop_area" and not value[0] <= value[1] <= 1:
            raise SystemExit(f"{name}={value}: it must be two shares of the frame, the smaller first")
    model_names = [name for name in names if set(presets[name]) != {"finetune"}]    # `toy linear` starts from toy's
    output = config["run"]["output"].replace("{preset}", "-".join(names)).replace("{stage}", stage)
    init = config["finetune"]["init"].replace("{pretrained}", f"runs/{'-'.join(model_names)}/pretrain/last.pt")
    if config["finetune"]["test_only"] and not any(argument.startswith("finetune.init=") for argument in arguments):
        init = f"{output}/last.pt"
    config["run"]["output"], config["finetune"]["init"] = map(os.path.expanduser, (output, init))
    if "--show" in arguments:
        print(as_yaml(config), end="")
        raise SystemExit(0)
    return config


# --- Processes, precision, batch ------------------------------------------------------------------

def ignore_signals(_):
    for number in (signal.SIGINT, signal.SIGTERM):      # the training process decides when its workers end
        signal.signal(number, signal.SIG_IGN)


def start_workers(run, process, videos, at_once, order, collate):
    """Batches of `at_once` videos, read by workers that ignore signals and end with this process, however it ends."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)      # Python 3.14's server of workers inherits this
    batches = iter(DataLoader(videos, at_once, sampler=order, num_workers=run["workers"], collate_fn=collate,
                              pin_memory=process.device.type == "cuda", worker_init_fn=ignore_signals))
    signal.signal(signal.SIGTERM, before)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # torch's raises anywhere; the next batch tells of a dead worker
    # At exit Python sends its children SIGTERM, which ours ignore, and waits; what is registered last runs before that
    atexit.register(data.kill_workers)
    return batches


def line_of(error, number=0):
    return (str(error).strip() or repr(error)).splitlines()[number]


@contextlib.contextmanager
def one_sentence(*kinds):
    """Turn errors that the user can mend, and those of `kinds`, into one sentence and exit status 1."""
    try:
        yield
    except (data.UnreadableVideo, EOFError, OSError, RuntimeError, *kinds) as error:
        exhausted = "DefaultCPUAllocator", "ALLOC_FAILED", "CUDA error: out of memory"
        if isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in exhausted):
            raise SystemExit(f"out of memory ({line_of(error)}): set run.max_batch below the videos that a process "
                             "takes at once now, so that more is accumulated, or model.checkpointing=true") from None
        if isinstance(error, (EOFError, ConnectionError)) or "exited unexpectedly" in str(error):      # a worker
            raise SystemExit(f"a process that decodes has ended ({line_of(error)}). If the system ended it for want of "
                             "memory, set run.workers lower") from None
        if "closed by peer" in str(error) or "reset by peer" in str(error):
            raise SystemExit("another process of this run has ended; its message says why") from None
        if isinstance(error, RuntimeError) and not isinstance(error, kinds):
            raise
        # A worker's error carries its traceback in the message; the last line says what happened
        raise SystemExit(line_of(error, -1).removeprefix("data.UnreadableVideo: ")) from None


Process = namedtuple("Process", "rank world device")


def start_process(run):
    """This process's rank, the number of processes, and its device; joins the others under torchrun."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(filter(present.get, present)) if run["device"] == "auto" else run["device"]
    if not present[name]:
        raise SystemExit(f"run.device is {name}, but this machine has none; use run.device=auto")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if name == "cuda" else name)
    if name == "cuda":
        if device.index >= torch.cuda.device_count():
            raise SystemExit(f"this machine has {torch.cuda.device_count()} GPUs and torchrun starts more processes: "
                             "lower --nproc_per_node")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")      # TF32 where fp32 remains
    if "RANK" not in os.environ:
        return Process(0, 1, device)
    try:
        store, rank, world = next(dist.rendezvous("env://"))
        # Restarted by torchrun: its store still has the addresses of the attempt before, under that one's prefix
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":      # several machines do not count restarts alike
            store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group("nccl" if name == "cuda" else "gloo", store=store, rank=rank, world_size=world,
                                device_id=device if name == "cuda" else None)
    except dist.DistNetworkError as error:
        raise SystemExit(f"the processes cannot meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
                         f"({line_of(error)}); is the port in use? Give torchrun another --master-port") from None
    return Process(rank, world, device)


def mixed_precision(precision, device):
    """(function that makes an autocast context, GradScaler) for run.precision."""
    kinds = {"auto": None, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = kinds[precision] or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if dtype == torch.float16 and device.type != "cuda":
        raise SystemExit(f"run.precision=fp16 needs a GPU; this run is on {device.type}: use bf16 or fp32")
    autocast = partial(torch.autocast, device.type, dtype=dtype, enabled=dtype != torch.float32)
    return autocast, torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)


def split_batch(batch, process, limit, videos, name):
    """(videos a process takes at once, accumulation steps) of a global batch; SystemExit if it cannot be shared."""
    near = max(min(batch, videos) // process.world, 1) * process.world
    if batch % process.world:
        raise SystemExit(f"{name}={batch} cannot be shared evenly by {process.world} processes: try {name}={near}")
    if batch > videos:
        raise SystemExit(f"{name}={batch} is more than the {videos} videos of data.train: try {name}={near}")
    share = batch // process.world
    at_once = next(n for n in range(min(share, limit or share), 0, -1) if share % n == 0)
    return at_once, share // at_once


# --- Optimisation ---------------------------------------------------------------------------------

def learning_rate(step, steps, warmup, peak, floor):
    """Linear from 0 to `peak` over `warmup` steps, then a cosine that reaches `floor` after the last step."""
    if step < warmup:
        return peak * step / warmup
    return floor + (peak - floor) * (1 + math.cos(math.pi * (step - warmup) / max(steps - warmup, 1))) / 2


def adamw(model, settings, device, scale=lambda name: 1.0):
    """AdamW without weight decay on biases, norms and other one-dimensional parameters.
    scale(name) multiplies the learning rate of a parameter; every group carries its own as "scale"."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((scale(name), parameter.ndim > 1), []).append(parameter)
    groups = [dict(params=parameters, scale=factor, weight_decay=settings["weight_decay"] if is_matrix else 0.0)
              for (factor, is_matrix), parameters in groups.items()]
    return torch.optim.AdamW(groups, lr=0.0, betas=settings["betas"], eps=1e-8, fused=device.type in ("cuda", "cpu"))


def over_processes(process, *values):
    """The sum of each value over all processes, as Python numbers."""
    numbers = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=process.device) for value in values])
    if process.world > 1:
        dist.all_reduce(numbers)
    return numbers.tolist()


# --- Stopping, checkpoints, log -------------------------------------------------------------------

def give_up(process, message):
    """End a run for a reason that all processes share; the first one says it."""
    raise SystemExit(message if process.rank == 0 else 1)


@contextlib.contextmanager
def stop_on_signals():
    """A list that becomes non-empty on SIGTERM or SIGINT, so that a run can save first. Any SIGINT after that kills."""
    received = []

    def note(number, _):
        received.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)    # not SIGTERM: torchrun sends again what its processes had too

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    yield received
    for number, handler in before.items():              # not after an error: then the process ends
        signal.signal(number, handler)


def save_checkpoint(path, content):
    """Write a checkpoint, complete or not at all. Of last.pt the one before stays, as previous.pt."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except (OSError, RuntimeError) as error:            # torch says RuntimeError when the disk is full
        temporary.unlink(missing_ok=True)
        reason = line_of(error.__context__ or error)    # after a failed write torch's writer says something else
        raise SystemExit(f"{path} could not be written ({reason}); the checkpoint before it is kept. "
                         "Is the disk full? Make room and run the same command again") from None
    if path.name == "last.pt" and path.exists():
        path.replace(path.with_name("previous.pt"))
    temporary.replace(path)


def load_checkpoint(path):
    """The content of a checkpoint: tensors and plain values, nothing that executes. SystemExit if it is unreadable."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                          # torch raises half a dozen kinds for a damaged file
        raise SystemExit(f"{path}: this is not a readable checkpoint ({line_of(error)})") from None


def last_checkpoint(output, resume):
    """The last complete checkpoint in `output`, or None. SystemExit if there are some and none can be used."""
    paths = [path for path in (Path(output, "last.pt"), Path(output, "previous.pt")) if path.exists()]
    if paths and not resume:
        raise SystemExit(f"{output} holds a run: choose another run.output, or go on with run.resume=true")
    for path in paths:
        try:
            return load_checkpoint(path)
        except SystemExit as error:
            if path == paths[-1]:
                raise
            print(f"warning: {error}; going on from {paths[-1]}", file=sys.stderr)


def check_same_training(config, checkpoint, output, stage, about):
    """SystemExit if going on with `config` would train something else, or in another way than by more epochs."""
    free = {"root", "train", "val", "max_unreadable", "checkpointing", "epochs", "picture_epochs", "keep_epochs",
            "validate_epochs", "test_clips", "test_crops", "test_only"}
    both = {key: (value, checkpoint.get(key)) for key, value in about.items()}
    both |= {f"{section}.{key}": (value, checkpoint["config"][section].get(key, value))     # a key may be newer
             for section in ("data", "model", stage) for key, value in config[section].items() if key not in free}
    both["run.seed"] = config["run"]["seed"], checkpoint["config"]["run"]["seed"]
    differing = [f"{name} is {now!r:.80}, was {before!r:.80}" for name, (now, before) in both.items() if now != before]
    if differing:
        raise SystemExit(f"{output} holds a run of another configuration: {'; '.join(differing)}. "
                         "Restore these values or choose another run.output")


class Log:
    """log.jsonl, one line a step and one a validation, and the same for TensorBoard where it is installed. `step` is
    the first to be written: lines that an earlier run left for it or for later steps are dropped."""

    def __init__(self, output, step):
        path, kept = output / "log.jsonl", output / "log.jsonl.tmp"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        lines = [line for line in lines if line.startswith("{") and line.endswith("}\n")]   # no torn one
        kept.write_text("".join(line for line in lines if json.loads(line)["step"] < step))
        kept.replace(path)
        self.file, self.board = open(path, "a", buffering=1), None
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(output, purge_step=step)

    def write(self, step, **values):
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if self.board and value is not None:
                self.board.add_scalar(name, value, step)


# --- Pictures -------------------------------------------------------------------------------------

def colour_of(place, places):
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(0.8 * place / places, 0.55, 0.85))


def draw_picture(model, video, order, visible):
    """A picture of the first frame of every cube: the true video, what the encoder sees, what is predicted.
    video [B, 3, T, H, W], normalised; order and visible as model.draw gives them. A cluster's colour and number are its
    place in the prediction order."""
    B, size, (kt, kh, kw) = len(video), video.shape[-1], (a // b for a, b in zip(model.grid, model.cluster_grid))
    scale, M = max(1, 128 // size), len(model.clusters)
    rows = torch.stack([video, *model.reconstruct(video, order, visible)], 1)[:, :, :, ::model.cube[0]].cpu()
    pixels = ((rows * data.IMAGENET_STD + data.IMAGENET_MEAN).clamp(0, 1) * 255).byte()
    pixels = pixels.permute(0, 1, 3, 4, 5, 2)                                               # [B, 3 rows, t, H, W, 3]
    side, high, wide = size * scale + 10, kh * model.cube[1] * scale, kw * model.cube[2] * scale
    picture = Image.new("RGB", (model.grid[0] * side + 90, 3 * B * side + 24), "white")
    pen = ImageDraw.Draw(picture)
    from_truth = ". Mean and contrast of predicted cubes: the true video's" if model.normalise_target else ""
    pen.text((90, 4), "Number and colour: place in the order" + from_truth, "black", font_size=12)
    for row, name in enumerate(B * ("true video", "encoder sees", "predicted")):
        pen.text((84, row * side + 24 + side // 2), name, "black", font_size=13, anchor="rm")
    for b, row, frame in itertools.product(range(B), range(3), range(model.grid[0])):
        left, top = frame * side + 90, (3 * b + row) * side + 24
        shown = Image.fromarray(pixels[b, row, frame].numpy())
        picture.paste(shown.resize((size * scale, size * scale), Image.Resampling.NEAREST), (left, top))
        for place, (t, h, w) in enumerate(torch.stack(torch.unravel_index(order[b], model.cluster_grid), 1).tolist()):
            if t == frame // kt:
                empty = (False, place == M - 1, place < model.predict_after)[row]
                x, y = left + w * wide, top + h * high
                pen.rectangle([x, y, x + wide - 1, y + high - 1], "white" if empty else None, colour_of(place, M), 3)
                pen.text((x + 6, y + 3), str(place + 1), "white", font_size=14, stroke_width=2, stroke_fill="black")
    return picture


# --- Training -------------------------------------------------------------------------------------

def read_lists(config):
    """(training videos, validation videos, class names) of data.train and data.val; makes the toy set if asked to."""
    root, train, val = (config["data"][key] for key in ("root", "train", "val"))
    if "toy" in (train, val):
        if os.environ.get("LOCAL_RANK", "0") == "0":
            data.make_toy_set()
        if dist.is_initialized():
            dist.barrier()
    if not train:
        raise SystemExit("data.train is empty: name a list, a CSV, a JSON or a folder of classes")
    train = data.TOY_ROOT / "train.txt" if train == "toy" else train
    val = data.TOY_ROOT / "val.txt" if val == "toy" else val
    videos, classes = data.read_annotations(train, root)
    return videos, data.read_annotations(val, root, classes)[0] if val else [], classes


def fit(config, stage, process, autocast, scaler, model, videos, optimizer, loss_of, end_epoch, **also):
    """Train `model` on `videos` as section `stage` of the configuration says, from the last checkpoint on.
    loss_of(forward, batch, step, rows) is the loss of a micro-batch (clips, labels, unreadable), where rows [b] tells
    which of the global batch's clips these are; forward is the model, compiled and wrapped as the run asks.
    end_epoch(epoch, last) is called in every process after every epoch; what it returns goes into the log, `also` into
    the checkpoints. Returns whether it trained at all: a finished run is left as it is."""
    run, settings, output = config["run"], config[stage], Path(config["run"]["output"])
    batch, repeats = settings["batch"], settings["clips_per_video"]
    at_once, accumulation = split_batch(batch, process, run["max_batch"], len(videos), f"{stage}.batch")
    per_epoch = len(videos) // batch
    steps, warmup = settings["epochs"] * per_epoch, settings["warmup_epochs"] * per_epoch
    peak, floor = settings["lr"] * batch / 256, settings["min_lr"] * batch / 256
    about = dict(stage=stage, videos=len(videos), model_class=type(model).__name__, **also)     # may not change

    # Go on from the last checkpoint
    first, tried, unreadable, going_on = 0, 0, 0, ""
    if checkpoint := last_checkpoint(output, run["resume"]):
        check_same_training(config, checkpoint, output, stage, about)
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        if checkpoint["scaler"]:                        # empty unless the run before had fp16
            scaler.load_state_dict(checkpoint["scaler"])
        first, tried, unreadable = (checkpoint[key] for key in ("step", "tried", "unreadable"))
        going_on = f", going on from step {first}"
        if (before := checkpoint["config"][stage]["epochs"]) != settings["epochs"]:
            going_on += f"; the schedule so far was that of {before} epochs"
    del checkpoint                                      # a second copy of everything
    if process.world > 1:
        everywhere = [None] * process.world
        dist.all_gather_object(everywhere, (first, len(videos)))
        if len(set(everywhere)) > 1:
            give_up(process, f"the processes differ in (step to go on from, videos found): {everywhere}; {output} and "
                             "the videos must be the same for all of them, on all machines")
    if first > steps:
        give_up(process, f"{output} holds a run of {first} steps, longer than {stage}.epochs={settings['epochs']}, "
                         f"which are {steps}: choose another run.output")
    if first == steps:
        return False

    forward = torch.compile(model) if run["compile"] else model
    if process.world > 1:
        forward = DistributedDataParallel(forward)
    if process.rank == 0:
        print(f"  batch      {batch} = {process.world} processes x {accumulation} accumulation steps x {at_once} "
              f"videos, {repeats} clips of each\n"
              f"  schedule   {settings['epochs']} epochs x {per_epoch} steps, {warmup} of them warm-up, "
              f"lr {peak:.3g} = {settings['lr']:.3g} x {batch} / 256, cosine to {floor:.3g}\n"
              f"  device     {process.device}, {str(autocast.keywords['dtype']).removeprefix('torch.')}, "
              f"torch {torch.__version__}, {run['workers']} workers a process\n"
              f"  output     {output}{going_on}")

    # Which clips of the global batch each micro-batch of this process has
    rows = torch.arange(batch * repeats).view(batch, repeats)[process.rank::process.world].flatten().chunk(accumulation)
    reading = data.training_order(len(videos), batch, first, steps, run["seed"], process.rank, process.world)
    named, saved_at = set(), time.monotonic()
    bar = tqdm(range(first, steps), initial=first, total=steps, unit="step", disable=process.rank > 0)
    with one_sentence(), stop_on_signals() as stop:
        batches = start_workers(run, process, videos, at_once, reading, data.collate)
        for step in bar:
            model.train()
            lr, loss, failures = learning_rate(step, steps, warmup, peak, floor), 0.0, []
            for group in optimizer.param_groups:
                group["lr"] = lr * group["scale"]
            began, waited = time.perf_counter(), 0.0
            for i in range(accumulation):
                asked = time.perf_counter()
                micro_batch = next(batches)
                # While the GPU still computes, a wait costs nothing
                if process.device.type != "cuda" or torch.cuda.current_stream().query():
                    waited += time.perf_counter() - asked
                failures += micro_batch[2]
                defer = process.world > 1 and i + 1 < accumulation      # processes share gradients once a step
                with forward.no_sync() if defer else contextlib.nullcontext():
                    with autocast():
                        part = loss_of(forward, micro_batch, step, rows[i]) / accumulation
                    scaler.scale(part).backward()
                loss += part.detach()
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings["clip_norm"] or math.inf).item()

            loss, failed, stopping = over_processes(process, loss / process.world, len(failures), len(stop))
            # fp16's scaler answers an overflow by skipping the step and halving its scale; at 1 it has no answer left
            if not math.isfinite(loss) or not math.isfinite(norm) and scaler.get_scale() <= 1:
                give_up(process, f"step {step}: the loss is {loss}, the gradient's norm {norm}, lr {lr:.3g}. The last "
                                 f"checkpoint is kept: go on with run.precision=fp32, or begin again with a smaller "
                                 f"{stage}.lr or {stage}.clip_norm=1")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()

            tried, unreadable = tried + batch + int(failed), unreadable + int(failed)
            for reason in sorted(set(failures) - named):        # once in each process
                tqdm.write(f"unreadable, another video is drawn: {reason}", file=sys.stderr)
            named.update(failures)
            if tried >= 100 and unreadable > tried * (share := config["data"]["max_unreadable"]):
                give_up(process, f"{unreadable} of {tried} videos tried were unreadable, more than "
                                 f"data.max_unreadable={share}; `python data.py check PRESET` lists them all")
            if process.rank == 0:
                if step == first:                       # not before: what fails before leaves no trace
                    output.mkdir(parents=True, exist_ok=True)
                    (output / "config.yaml").write_text(as_yaml(config))
                    log = Log(output, step + 1)
                elapsed = time.perf_counter() - began
                speed = dict(clips_per_second=batch * repeats / elapsed, data_share=waited / elapsed)
                log.write(step + 1, epoch=step // per_epoch + 1, loss=loss, lr=lr,
                          norm=norm if math.isfinite(norm) else None, **speed)      # JSON knows no infinity
                bar.set_postfix_str(f"loss {loss:.3f}, lr {lr:.1e}, {speed['clips_per_second']:.1f} clips/s, "
                                    f"{speed['data_share']:.0%} waiting for data")

            epoch_ends = (step + 1) % per_epoch == 0
            if epoch_ends:                              # before the checkpoint: what is saved has been validated
                model.eval()
                scores = end_epoch((step + 1) // per_epoch, step + 1 == steps)
                if process.rank == 0 and scores:
                    log.write(step + 1, **scores)
                stopping, = over_processes(process, len(stop))          # a validation takes its time
            if stopping or epoch_ends or time.monotonic() - saved_at > 60 * run["save_minutes"]:
                saved_at = time.monotonic()
                if process.rank == 0:
                    save_checkpoint(output / "last.pt", dict(
                        model=model.state_dict(), optimizer=optimizer.state_dict(), scaler=scaler.state_dict(),
                        step=step + 1, tried=tried, unreadable=unreadable, config=config, **about))
            if stopping:
                if process.world > 1:
                    dist.barrier()                      # nobody leaves before the first process has saved
                give_up(process, f"stopped by a signal after step {step + 1}; "
                                 f"the same command goes on from {output / 'last.pt'}")
    return True


def main():
    config = load_config(sys.argv[1:], "pretrain")
    run, settings, output = config["run"], config["pretrain"], Path(config["run"]["output"])
    process = start_process(run)
    autocast, scaler = mixed_precision(run["precision"], process.device)
    torch.manual_seed(run["seed"])
    with one_sentence(ValueError):
        model = ARVideo(**config["model"]).to(process.device)
        train, val, _ = read_lists(config)
    frames, size, repeats = config["model"]["frames"], config["model"]["size"], settings["clips_per_video"]
    choose = partial(data.dense_clips, frames=frames, stride=config["data"]["stride"], clips=repeats)
    augment = partial(data.pretraining_clip, size=size, flip=settings["flip"])
    videos, val_videos = (data.Videos(entries, choose, augment, run["seed"]) for entries in (train, val or train))
    if process.rank == 0:
        total, encoder = (sum(p.numel() for p in part.parameters()) / 1e6 for part in (model, model.encoder))
        print(f"ARVideo pretraining\n"
              f"  data       {len(videos)} videos; clips of {frames} frames at stride {config['data']['stride']}, "
              f"{size} x {size}, flip {'on' if settings['flip'] else 'off'}\n"
              f"  model      {total:.1f} M parameters, {encoder:.1f} M of them in the encoder; of "
              f"{len(model.encoder.positions)} tokens {model.encoder_mask.shape[0]} enter the encoder and "
              f"{model.decoder_mask.shape[0]} are predicted; order {model.order}")

    generator = torch.Generator(process.device)

    def loss_of(forward, batch, step, rows):
        """Every process draws for the whole global batch and takes its own rows: the draw of a clip depends on
        the step and its row alone (and the kind of GPU), not on the number of processes."""
        order, visible = model.draw(settings["batch"] * repeats, generator.manual_seed(data.seed_of(run["seed"], step)))
        return forward(data.normalise(batch[0], process.device), order[rows], visible[rows])

    def end_epoch(epoch, last):
        if process.rank > 0:
            return
        if settings["keep_epochs"] and epoch % settings["keep_epochs"] == 0:
            content = dict(model=model.state_dict(), config=config, epoch=epoch)
            save_checkpoint(output / f"epoch_{epoch:04d}.pt", content)
        if not last and epoch % settings["picture_epochs"]:
            return
        try:
            clips = torch.cat([val_videos[0, i * len(val_videos) // 2][0][:1] for i in range(2)])
            with autocast():
                picture = draw_picture(model, data.normalise(clips, process.device),
                                       *model.draw(len(clips), generator.manual_seed(run["seed"])))
            picture.save(output / f"predictions_{epoch:04d}.png")
        except (data.UnreadableVideo, OSError) as error:        # no reason to lose a run
            tqdm.write(f"no picture of epoch {epoch}: {error}", file=sys.stderr)

    optimizer = adamw(model, settings, process.device)
    trained = fit(config, "pretrain", process, autocast, scaler, model, videos, optimizer, loss_of, end_epoch)
    if process.rank == 0:
        print(f"{output} is {'now ' if trained else 'already '}finished: last.pt, log.jsonl and pictures are there")
    if process.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
