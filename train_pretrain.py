"""
Pretrain ARVideo.

    python train_pretrain.py [PRESET ...] [section.key=value ...]       one process; default: toy
    torchrun --nproc_per_node=8 train_pretrain.py k400 data.root=/data/k400     eight GPUs
    python train_pretrain.py --help                                     presets and settings
    python train_pretrain.py k400 large --show                          the settings that result

The same command resumes from the last checkpoint in run.output.

train_finetune.py uses this file as well: all sections but the last two, Pictures and
Pretraining, serve both scripts.
"""

import contextlib
import difflib
import fcntl
import hashlib
import json
import math
import os
import signal
import sys
import time
import warnings
from argparse import Namespace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

import data
from arvideo import ARVideo
from data import UserError, stream_seed

CONFIG = Path(__file__).with_name("config.yaml")
as_yaml = partial(yaml.safe_dump, sort_keys=False, default_flow_style=None)


# --- Configuration ----------------------------------------------------------

CHOICES = {
    "run.device": ["auto", "cuda", "mps", "cpu"],
    "run.precision": ["auto", "bf16", "fp16", "fp32"],
    "finetune.probe": ["none", "linear", "attentive"],
    "finetune.sampling": ["dense", "segments"],
}
# These settings are either "auto", for what suits the machine, or a value of the same type as the
# example here. (run.device and run.precision, in CHOICES, may be "auto" as well.)
AUTO = {"run.workers": 8, "run.compile": True}
# All numbers must be 0 or greater. Those of POSITIVE must be greater than 0, and those of
# BELOW_ONE less than 1.
POSITIVE = {"stride", "epochs", "batch", "clips_per_video", "lr", "validate_epochs",
            "test_clips", "test_crops"}
BELOW_ONE = {"betas", "drop_path", "head_dropout", "label_smoothing"}


class StrictLoader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error, not a silent choice."""

    def construct_mapping(self, node, deep=False):
        names = []
        for key, _ in node.value:
            if key.value in names:
                raise yaml.MarkedYAMLError(problem=f"the key '{key.value}' stands twice",
                                           problem_mark=key.start_mark)
            names.append(key.value)
        return super().construct_mapping(node, deep)


def read_settings(path):
    """The sections of a YAML file, {section: {key: value}}. UserError for any other form."""
    try:
        with open(path, encoding="utf-8") as file:
            settings = yaml.load(file, StrictLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1
        raise UserError(f"{path}, line {line}: {error.problem}") from None
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = str(getattr(error, "strerror", None) or error)
        # Some of YAML's messages have several lines
        raise UserError(f"{path}: {' '.join(reason.split())}") from None
    if not isinstance(settings, dict) or not all(isinstance(x, dict) for x in settings.values()):
        raise UserError(f"{path}: expected sections of settings, as in {CONFIG.name}")
    return settings


def refuse_unknown(value, known, what):
    """UserError for an unknown value, with the known one that it resembles most."""
    if value not in known:
        # With cutoff=0 there always is one
        close, = difflib.get_close_matches(str(value), known, n=1, cutoff=0)
        raise UserError(f"{what} '{value}' is unknown; did you mean '{close}'? "
                        f"Known: {', '.join(known)}")


def as_kind_of(default, value, name):
    """`value`, of the type of `default`. UserError if it is of another type.

    Where a float is wanted, an int is taken, and text such as 1e-3, which YAML reads as text.
    A list must be as long as its default. If that is empty, as it may be in a fork, any list
    will do.
    """
    kind = type(default)
    if kind is float and type(value) in (int, str):
        with contextlib.suppress(ValueError):
            value = float(value)
    if kind is list and type(value) is list and not default:
        return value
    if kind is list and type(value) is list and len(value) == len(default):
        return [as_kind_of(like, item, name) for like, item in zip(default, value)]
    if kind is list:
        raise UserError(f"{name} must be a list of {len(default)}, like {default}; found {value!r}")
    if type(value) is not kind:
        raise UserError(f"{name} must be of kind {kind.__name__}, like {default!r}; "
                        f"found {value!r}")
    return value


def set_value(config, section, key, value):
    """Set one value. UserError if there is no such key, or if it is of another kind."""
    refuse_unknown(section, config, "section")
    refuse_unknown(key, config[section], f"key of section {section}")
    name = f"{section}.{key}"
    if name in AUTO and value == "auto":
        config[section][key] = value
    else:
        config[section][key] = as_kind_of(AUTO.get(name, config[section][key]), value, name)


def check_ranges(config):
    """UserError for a choice that does not exist, or a number out of range.

    Of section `model`, numbers must only be 0 or greater, and finite. The rest is checked where
    the model is built: in pretraining by ARVideo (see build_arvideo), in fine-tuning by Encoder.
    Encoder gets the encoder's settings alone, so fine-tuning does not check the other ones.
    """
    for section, values in config.items():
        for key, value in values.items():
            name = f"{section}.{key}"
            if name in CHOICES:
                refuse_unknown(value, CHOICES[name], name)
            numbers = value if type(value) is list else [value]
            numbers = [number for number in numbers if type(number) in (int, float)]
            if key in POSITIVE and not all(number > 0 for number in numbers):
                raise UserError(f"{name}={value}: it must be greater than 0")
            if not all(0 <= number < math.inf for number in numbers):   # refuses NaN as well
                raise UserError(f"{name}={value}: it must be 0 or greater, and finite")
            if key in BELOW_ONE and max(numbers) >= 1:
                raise UserError(f"{name}={value}: it must be less than 1")
    low, high = config["finetune"]["crop_area"]
    if not low <= high <= 1:
        raise UserError(f"finetune.crop_area={[low, high]}: it must be two shares of the frame, "
                        "the smaller first")


def fill_in_names(config, presets, stage, init_is_given):
    """Fill in run.output if it is empty, and settle finetune.init.

    `presets` is [(name, sections), ...]. finetune.init is the first of these that applies:
    1. what the command line says. An empty `finetune.init=` asks for case 4.
    2. with test_only, last.pt of run.output
    3. what a preset says
    4. last.pt of the pretraining with the same presets
    """
    run = config["run"]
    finetune = config["finetune"]
    names = [name for name, _ in presets]
    run["output"] = run["output"] or f"runs/{'-'.join(names)}/{stage}"

    # Presets that set nothing but `finetune` are left out of the pretraining's name: `toy linear`
    # begins from runs/toy/pretrain. If all presets are such, all stay, so that there is a name.
    pretraining_names = [name for name, sections in presets if set(sections) != {"finetune"}]
    # finetune.init now holds the command line's value (case 1), else a preset's (3), else ""
    if finetune["test_only"] and not init_is_given:         # case 2
        finetune["init"] = f"{run['output']}/last.pt"
    if not finetune["init"]:                                # case 4
        finetune["init"] = f"runs/{'-'.join(pretraining_names or names)}/pretrain/last.pt"
    run["output"] = os.path.expanduser(run["output"])
    finetune["init"] = os.path.expanduser(finetune["init"])


def given_settings(arguments):
    """The names, section.key, of the settings that a command line sets."""
    return {argument.partition("=")[0] for argument in arguments if "=" in argument}


def load_config(arguments, stage):
    """The settings of a command line: config.yaml, then presets, then section.key=value.

    A preset is named in config.yaml, or is a file of the same form, X.yaml.
    UserError names what is unknown, of the wrong kind or out of range (see check_ranges).
    """
    config = read_settings(CONFIG)
    known_presets = config.pop("presets")

    presets = []
    for word in [argument for argument in arguments if "=" not in argument] or ["toy"]:
        if word.endswith(".yaml"):
            presets.append((Path(word).stem, read_settings(word)))
        else:
            refuse_unknown(word, known_presets, "preset")
            presets.append((word, known_presets[word]))
    for _, sections in presets:
        for section, values in sections.items():
            refuse_unknown(section, config, "section")
            for key, value in values.items():
                set_value(config, section, key, value)

    for argument in [argument for argument in arguments if "=" in argument]:
        name, _, value = argument.partition("=")
        section, dot, key = name.partition(".")
        if not dot:
            raise UserError(f"'{argument}' is not of the form section.key=value")
        # The value is read as YAML, which makes numbers, lists and truth values. But if the
        # default is a text, the value stays a text, even run.output=2024. The settings in
        # AUTO are an exception: their default, "auto", is a text, but they are read as YAML.
        is_text = isinstance(config.get(section, {}).get(key), str) and name not in AUTO
        if not is_text:
            # What is no YAML stays a text, and is refused below
            with contextlib.suppress(yaml.YAMLError, ValueError):
                value = yaml.safe_load(value)
        set_value(config, section, key, value)

    check_ranges(config)
    fill_in_names(config, presets, stage, "finetune.init" in given_settings(arguments))
    return config


def run_command(stage, train):
    """What both scripts do: read the command line and call train(config).

    The message of a UserError is printed, and the exit status is 1.
    """
    arguments = sys.argv[1:]
    try:
        if "--help" in arguments or "-h" in arguments:
            config = read_settings(CONFIG)
            print(f"usage: python train_{stage}.py [PRESET ...] [section.key=value ...] [--show]\n"
                  "without a preset: toy\n")
            for section, values in config.items():
                print(f"{section}: {', '.join(values)}")
            print(f"\nEvery setting is explained in {CONFIG.name}; --show prints their values.")
        elif "--show" in arguments:
            arguments.remove("--show")
            print(as_yaml(load_config(arguments, stage)), end="")
        else:
            train(load_config(arguments, stage))
            if dist.is_initialized():
                dist.destroy_process_group()
    except UserError as error:
        # After Machine.stop, the message is empty in all processes but the first
        sys.exit(str(error) or 1)


# --- The machine ------------------------------------------------------------


def choose_device(name):
    """The device of this process. UserError if the machine has none of this name."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
               "cpu": True}
    if name == "auto":
        name = "cuda" if present["cuda"] else "mps" if present["mps"] else "cpu"
    if not present[name]:
        raise UserError(f"run.device is {name}, but this machine has none; use run.device=auto")
    if name != "cuda":
        return torch.device(name)
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if device.index >= torch.cuda.device_count():
        raise UserError(f"this machine has {torch.cuda.device_count()} GPUs and torchrun starts "
                        "more processes: lower --nproc_per_node")
    torch.cuda.set_device(device)
    torch.set_float32_matmul_precision("high")          # TF32 where fp32 remains
    return device


def join_processes(device):
    """Join the other processes that torchrun has started."""
    store, rank, world_size = next(dist.rendezvous("env://"))
    # After a restart, torchrun's store still holds the addresses of the old processes. On one
    # machine, a prefix that counts the restarts keeps them apart. (GROUP_WORLD_SIZE is torchrun's
    # number of machines.) Several machines may count their restarts differently, and with such a
    # prefix would not find each other. For them the user sets TORCH_DISABLE_SHARE_RDZV_TCP_STORE:
    # see the README's troubleshooting.
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(restarts, store)
    is_cuda = device.type == "cuda"
    dist.init_process_group("nccl" if is_cuda else "gloo", store=store, rank=rank,
                            world_size=world_size, device_id=device if is_cuda else None)


def spare_cores():
    """How many workers this process may start: its share of the cores less one, at least 1."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))            # those that this process may use
    else:
        cores = os.cpu_count()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, cores // processes - 1)


class Machine:
    """This process: its rank among world_size processes, its device and its precision.

    Under torchrun it joins the other processes. autocast() makes the context of a
    forward pass; `scaler` does nothing except in fp16. `workers` is the number of processes
    that decode videos for this one, and worker_context is load_batches' `context`.
    """

    def __init__(self, run):
        self.device = choose_device(run["device"])
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        if "RANK" in os.environ:
            join_processes(self.device)
        self.is_first = self.rank == 0
        is_cuda = self.device.type == "cuda"
        self.workers = spare_cores() if run["workers"] == "auto" else run["workers"]
        # A process that has started CUDA and NCCL must not be forked: a copy may wait forever
        # for a lock that a thread of the original held
        self.worker_context = "forkserver" if is_cuda else None
        self.compiles = is_cuda if run["compile"] == "auto" else run["compile"]

        precision = run["precision"]
        if precision == "auto":
            precision = "bf16" if is_cuda else "fp32"
        if precision == "fp16" and not is_cuda:
            raise UserError(f"run.precision=fp16 needs a GPU; this run is on {self.device.type}: "
                            "use bf16 or fp32")
        self.precision = precision
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
        self.autocast = partial(torch.autocast, self.device.type, dtype=dtype,
                                enabled=precision != "fp32")
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")

    def prepare(self, model):
        """The model on this device; it is compiled at its first call, if run.compile says so."""
        model.to(self.device)
        if self.compiles:
            model.compile()
        return model

    def send(self, tensor):
        """The tensor on this device. From pinned memory, the copy to a GPU is not waited for."""
        return tensor.to(self.device, non_blocking=self.device.type == "cuda")

    def update(self, optimizer):
        """Update the weights by the gradients, and forget these."""
        self.scaler.step(optimizer)
        self.scaler.update()
        optimizer.zero_grad()

    def stop(self, message):
        """End the run. Every process must call this. Only the first one's message is printed."""
        raise UserError(message if self.is_first else "")

    def sum(self, *values):
        """The sum of each value over all processes, as Python numbers.

        The values are numbers or tensors without dimensions. This waits for a GPU once, not once
        for each value.
        """
        # Adding a number to a tensor on the GPU needs no wait. Copying the number there would.
        zero = torch.zeros((), device=self.device)
        numbers = torch.stack([zero + value for value in values])
        if self.world_size > 1:
            dist.all_reduce(numbers)
        return numbers.tolist()

    def gather(self, value):
        """The values of all processes, in the order of their ranks."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def from_first(self, function, *arguments):
        """Call function(*arguments) in the first process alone. Returns its result in all."""
        result = None
        if self.is_first:
            try:
                result = function(*arguments)
            except UserError as error:
                result = error
        if self.world_size > 1:
            box = [result]
            dist.broadcast_object_list(box)
            result, = box
        if isinstance(result, UserError):
            self.stop(str(result))
        return result


# --- Optimisation -----------------------------------------------------------


class Plan(NamedTuple):
    """Batch sizes and schedule, computed once. A batch counts videos, not clips."""
    batch: int                  # of a step, over all processes
    repeats: int                # clips of each video
    micro_batch: int            # videos that a process takes at once, at most run.max_batch
    accumulation: int           # micro-batches of a process in a step
    steps_per_epoch: int
    steps: int
    warmup_steps: int
    peak_lr: float
    final_lr: float


def make_plan(config, stage, video_count, world_size):
    """The Plan of section `stage`.

    UserError if the processes cannot share the batch evenly, if there are fewer videos than
    the batch has, or if the warm-up is longer than the training.
    """
    settings = config[stage]
    batch = settings["batch"]
    if batch % world_size:
        raise UserError(f"{stage}.batch={batch} cannot be shared evenly by {world_size} processes")
    if batch > video_count:
        raise UserError(f"{stage}.batch={batch} is more than the {video_count} videos of "
                        "data.train")
    if settings["warmup_epochs"] > settings["epochs"]:
        raise UserError(f"{stage}.warmup_epochs={settings['warmup_epochs']} is more than "
                        f"{stage}.epochs={settings['epochs']}: the learning rate would never "
                        "reach its peak")
    share = batch // world_size
    limit = min(share, config["run"]["max_batch"] or share)
    # The largest divisor of the share within the limit, so that all micro-batches are of one size
    micro_batch = max(n for n in range(1, limit + 1) if share % n == 0)
    steps_per_epoch = video_count // batch
    return Plan(
        batch=batch,
        repeats=settings["clips_per_video"],
        micro_batch=micro_batch,
        accumulation=share // micro_batch,
        steps_per_epoch=steps_per_epoch,
        steps=settings["epochs"] * steps_per_epoch,
        warmup_steps=settings["warmup_epochs"] * steps_per_epoch,
        peak_lr=settings["lr"] * batch / 256,
        final_lr=settings["min_lr"] * batch / 256)


def micro_batch_rows(plan, rank, world_size):
    """Which rows of the global batch each micro-batch of a process holds: tensors [b].

    Here b is plan.micro_batch x plan.repeats. A row is a clip, and the clips of a video
    follow each other. Process `rank` takes every world_size-th video. For example, with 4
    videos of 2 clips and 2 processes, rank 0 takes videos 0 and 2, which are rows 0, 1, 4
    and 5.
    """
    videos = torch.arange(rank, plan.batch, world_size)
    rows = videos[:, None] * plan.repeats + torch.arange(plan.repeats)
    return rows.flatten().chunk(plan.accumulation)


def learning_rate(step, plan):
    """Linear from 0 over the warm-up, then a cosine that would reach final_lr at plan.steps."""
    if step < plan.warmup_steps:
        return plan.peak_lr * step / plan.warmup_steps
    done = (step - plan.warmup_steps) / (plan.steps - plan.warmup_steps)
    cosine = (1 + math.cos(math.pi * done)) / 2
    return plan.final_lr + (plan.peak_lr - plan.final_lr) * cosine


def set_learning_rate(optimizer, step, plan):
    lr = learning_rate(step, plan)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
    return lr


def clip_gradients(machine, model, optimizer, limit):
    """Scale the gradient down to the norm `limit` (0: no limit).

    Returns the norm before, a tensor of one number.
    """
    machine.scaler.unscale_(optimizer)
    return nn.utils.clip_grad_norm_(model.parameters(), limit or math.inf)


def make_optimizer(model, settings, device, scale=lambda name: 1.0):
    """AdamW, without weight decay on one-dimensional parameters: biases, norms, Decoder's query.

    In a fork that learns positions, these are not decayed either. (The query of an attentive
    probe is decayed: it has three dimensions.) scale(name) multiplies the learning rate of a
    parameter. Every group keeps this factor under the key "scale".
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_decayed = parameter.ndim > 1 and not name.endswith("positions")
            decay = settings["weight_decay"] if is_decayed else 0.0
            groups.setdefault((scale(name), decay), []).append(parameter)
    groups = [dict(params=parameters, scale=factor, weight_decay=decay)
              for (factor, decay), parameters in groups.items()]
    return torch.optim.AdamW(groups, lr=0.0, betas=settings["betas"], eps=1e-8,
                             fused=device.type in ("cuda", "cpu"))


# --- Checkpoints and log ----------------------------------------------------


def save_checkpoint(path, content):
    """Write to a temporary file and rename it, so that a crash leaves the last one intact."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:       # a full disk, say
        temporary.unlink(missing_ok=True)
        raise
    temporary.replace(path)


def load_checkpoint(path):
    """The content of a checkpoint: tensors and plain values, nothing that executes.

    Tensors are read from the file as they are used, so that the processes of a machine do not
    each hold a copy of it. UserError if there is no such file, or if it cannot be read.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: there is no such checkpoint")
    try:
        with torch.serialization.safe_globals([Namespace]):     # VideoMAE's files hold one
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except Exception:           # torch raises half a dozen types, with messages of many lines
        raise UserError(f"{path}: this is not a readable checkpoint: it is of another kind, cut "
                        "short, or holds more than tensors and plain values") from None


def lock_folder(output):
    """Refuse a second run in the same folder. Returns the file whose lock this process holds.

    The system releases the lock when the process ends, however it ends.
    """
    file = open(output / "lock", "a")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"{output}: another run is writing here; wait for its end, or choose "
                        "another run.output") from None
    except OSError as error:
        # Some network file systems are mounted without locks
        print(f"{output}: a second run that writes here would not be noticed, since the file "
              f"system has no locks ({error.strerror})", file=sys.stderr)
    return file


def code_version(model):
    """A hash of the source files of the model's Python classes, without torch's."""
    names = {type(module).__module__ for module in model.modules()}
    content = hashlib.sha256()
    for name in sorted(names):
        # A notebook has no __file__, and a module loaded by hand may be missing from sys.modules
        path = getattr(sys.modules.get(name), "__file__", None)
        if path and not name.startswith("torch"):
            content.update(Path(path).read_bytes())
    return content.hexdigest()[:12]


class Log:
    """log.jsonl, a line for every step and every validation; TensorBoard where installed.

    If the folder exists, it is locked at once. Otherwise open() makes and locks it, so that a
    run which fails before open() leaves no folder.
    """

    def __init__(self, config):
        self.config = config
        self.output = Path(config["run"]["output"])
        self.lock = lock_folder(self.output) if self.output.exists() else None
        self.file = None
        self.board = None

    def open(self, step):
        """Make the folder and continue log.jsonl after `step`."""
        output = self.output
        output.mkdir(parents=True, exist_ok=True)
        self.lock = self.lock or lock_folder(output)
        (output / "config.yaml").write_text(as_yaml(self.config))
        path = output / "log.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        # After a power cut, a line may lack its beginning or its end
        lines = [line for line in lines if line.startswith("{") and line.endswith("}\n")]
        # What a killed run wrote after its last checkpoint will be written again
        lines = [line for line in lines if json.loads(line)["step"] <= step]
        temporary = output / "log.jsonl.tmp"
        temporary.write_text("".join(lines))
        temporary.replace(path)
        self.file = open(path, "a", buffering=1)
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter
            self.board = SummaryWriter(output, purge_step=step + 1)

    def write(self, step, **values):
        # JSON knows neither infinity nor NaN
        values = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            if self.board and value is not None:
                self.board.add_scalar(name, value, step)

    def save_picture(self, name, picture, epoch):
        """Write a picture [3, H, W] of values from 0 to 1 as name_EPOCH.png."""
        save_image(picture, self.output / f"{name}_{epoch:04d}.png")
        if self.board:
            self.board.add_image(name, picture, epoch)


# --- Training ---------------------------------------------------------------

# What may differ when a run resumes:
# - section `run`, except the seed
# - the section of the other stage
# - in the sections `data`, `model` and the run's own stage, these keys
MAY_CHANGE = {
    "root", "train", "val", "test", "max_unreadable", "checkpointing", "init", "epochs",
    "picture_epochs", "keep_epochs", "validate_epochs", "test_clips", "test_crops", "test_only"}
# data.train and finetune.init may be other paths, but must name the same content. So hashes of that
# content must match. The scripts pass them to fit() as `must_match`, under the keys of HASHES. The
# values of HASHES are the error messages for hashes that differ.
HASHES = {
    "training_list": "data.train lists other videos, or in another order or with other labels",
    "starting_weights": "finetune.init holds other weights"}


class Training:
    """A run of one stage: its plan, how far it has come, and its checkpoint.

    `must_match` holds values that are saved in the checkpoint, each under its own key, and
    must be the same when the run resumes. So must most settings.
    """

    def __init__(self, config, stage, machine, model, optimizer, video_count, must_match):
        self.config = config
        self.stage = stage
        self.machine = machine
        self.model = model
        self.optimizer = optimizer
        self.plan = make_plan(config, stage, video_count, machine.world_size)
        self.must_match = dict(
            stage=stage, videos=video_count, model_class=type(model).__name__, **must_match)
        self.path = Path(config["run"]["output"], "last.pt")
        self.code = code_version(model)
        self.step = 0               # steps made
        self.tried = 0              # videos tried, with those drawn in place of unreadable ones
        self.unreadable = 0         # how many of these were unreadable
        self.reported = set()       # the reasons that were printed
        self.bar = None             # made by progress()
        self.log = Log(config) if machine.is_first else None
        self.saved_at = time.monotonic()

    def resume(self):
        """Load the last checkpoint, if there is one. UserError if it is of another run."""
        if self.path.exists():
            checkpoint = load_checkpoint(self.path)
            self.require_same(checkpoint)
            self.model.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            if checkpoint["scaler"]:                    # empty except after fp16
                self.machine.scaler.load_state_dict(checkpoint["scaler"])
            if checkpoint.get("code", self.code) != self.code and self.machine.is_first:
                print(f"The files that define the model have changed since {self.path} was written")
            self.step = checkpoint["step"]
            self.tried = checkpoint["tried"]
            self.unreadable = checkpoint["unreadable"]
        steps = self.machine.gather(self.step)
        if len(set(steps)) > 1:
            self.machine.stop(f"the processes would resume from different steps: {steps}; "
                              "run.output must be the same folder on all machines")
        if self.step > self.plan.steps:
            self.machine.stop(f"{self.path.parent} holds a run of {self.step} steps, more than "
                              f"the {self.plan.steps} asked for: choose another run.output")

    def require_same(self, checkpoint):
        """UserError if must_match, the seed or a setting that is not in MAY_CHANGE has changed."""
        needed = {"config", "optimizer", "step"}
        if not isinstance(checkpoint, dict) or not needed <= checkpoint.keys():
            raise UserError(f"{self.path} is not a checkpoint that a run can resume from: choose "
                            "another run.output")
        # Values that an older checkpoint lacks are skipped, here and among the settings below
        pairs = {name: (value, checkpoint[name]) for name, value in self.must_match.items()
                 if name in checkpoint}
        saved = checkpoint["config"]
        pairs["run.seed"] = (self.config["run"]["seed"], saved["run"]["seed"])
        for section in ("data", "model", self.stage):
            for key, value in self.config[section].items():
                if key not in MAY_CHANGE and key in saved[section]:
                    pairs[f"{section}.{key}"] = (value, saved[section][key])
        differing = [HASHES.get(name, f"{name} is {now!r:.80}, was {before!r:.80}")
                     for name, (now, before) in pairs.items() if now != before]
        if differing:
            raise UserError(f"{self.path.parent} holds a run of another configuration: "
                            f"{'; '.join(differing)}. Restore these values or choose another "
                            "run.output")

    def print_plan(self):
        if not self.machine.is_first:
            return
        plan = self.plan
        machine = self.machine
        settings = self.config[self.stage]
        compiled = "compiled" if machine.compiles else "not compiled"
        print(f"  batch      {plan.batch} = {machine.world_size} processes x "
              f"{plan.accumulation} accumulation steps x {plan.micro_batch} videos, "
              f"{plan.repeats} clips of each\n"
              f"  schedule   {settings['epochs']} epochs x {plan.steps_per_epoch} steps, "
              f"{plan.warmup_steps} of them warm-up, lr {plan.peak_lr:.3g} = {settings['lr']:.3g} "
              f"x {plan.batch} / 256, cosine to {plan.final_lr:.3g}\n"
              f"  device     {machine.device}, {machine.precision}, {compiled}, "
              f"torch {torch.__version__}, {machine.workers} workers a process\n"
              f"  output     {self.path.parent}, from step {self.step} on")

    def require_finite(self, loss, norm, lr):
        """Stop if the loss or the gradient is not finite; the last checkpoint stays good."""
        # In fp16 an infinite norm usually means that the scaler has scaled the gradient up too far.
        # It then skips this update and halves its scale, which is harmless. But at a scale of 1,
        # the gradient itself is too large for fp16, and the run must stop.
        scaler = self.machine.scaler
        can_recover = scaler.is_enabled() and scaler.get_scale() > 1
        norm_is_fine = math.isfinite(norm) or can_recover
        if not (math.isfinite(loss) and norm_is_fine):
            self.machine.stop(
                f"step {self.step + 1}: the loss is {loss}, the gradient's norm {norm}, lr "
                f"{lr:.3g}. The last checkpoint is kept: resume with run.precision=fp32, or begin "
                f"again with {self.stage}.clip_norm=1 or a smaller {self.stage}.lr")

    def count_unreadable(self, reasons, unreadable):
        """Print new reasons of this process, and count the unreadable videos of all processes.

        Stop if more than data.max_unreadable of all videos tried were unreadable, once a hundred
        were tried.
        """
        for reason in set(reasons) - self.reported:
            tqdm.write(f"unreadable, another video is drawn: {data.printable(reason)}",
                       file=sys.stderr)
        self.reported.update(reasons)
        self.tried += self.plan.batch + unreadable      # each unreadable one was replaced
        self.unreadable += unreadable
        limit = self.config["data"]["max_unreadable"]
        if self.tried >= 100 and self.unreadable > limit * self.tried:
            self.machine.stop(
                f"{self.unreadable} of {self.tried} videos tried were unreadable, more than "
                f"data.max_unreadable={limit}; `python data.py check` lists them")

    def open_log(self):
        if self.log:
            self.log.open(self.step)

    def log_step(self, loss, lr, norm, seconds, waited):
        """Log a step that took `seconds`, of which this process waited `waited` for data."""
        if self.log:
            clips_per_second = self.plan.batch * self.plan.repeats / seconds
            # The epoch of the step just made, counted from 1
            epoch = (self.step - 1) // self.plan.steps_per_epoch + 1
            self.log.write(self.step, epoch=epoch, loss=loss, lr=lr, norm=norm,
                           clips_per_second=clips_per_second, data_share=waited / seconds)
            self.bar.set_postfix_str(
                f"loss {loss:.3f}, lr {lr:.1e}, {clips_per_second:.1f} clips/s, "
                f"{waited / seconds:.0%} waiting for data")

    def log_scores(self, scores):
        """Log the scores of a validation. They are None where there was none."""
        if self.log and scores:
            self.log.write(self.step, **scores)

    def progress(self):
        """The steps that are left, with a bar that shows them in the first process."""
        steps = self.plan.steps
        self.bar = tqdm(range(self.step, steps), initial=self.step, total=steps, unit="step",
                        disable=not self.machine.is_first)
        return self.bar

    def stop_by_signal(self):
        self.machine.gather(None)           # a barrier: nobody leaves before the first has saved
        self.machine.stop(f"stopped by a signal after step {self.step}; the same command "
                          f"resumes from {self.path}")

    def save_is_due(self):
        return time.monotonic() - self.saved_at > 60 * self.config["run"]["save_minutes"]

    def save(self):
        self.saved_at = time.monotonic()
        if self.machine.is_first:
            save_checkpoint(self.path, dict(
                model=self.model.state_dict(), optimizer=self.optimizer.state_dict(),
                scaler=self.machine.scaler.state_dict(), step=self.step, tried=self.tried,
                unreadable=self.unreadable, config=self.config, code=self.code,
                **self.must_match))


@contextlib.contextmanager
def note_signals():
    """A list that is empty until SIGTERM or SIGINT comes, so that a run can save first.

    After the first signal of either kind, a Ctrl-C (SIGINT) kills at once. A further SIGTERM does
    not: a scheduler may send one to this process and one to torchrun, which forwards it here.
    """
    received = []

    def note(number, _):
        received.append(number)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def wrap_model(model, machine):
    """The model; with several processes, wrapped so that backward averages their gradients."""
    if machine.world_size == 1:
        return model
    with warnings.catch_warnings():
        # torch 2.14 has another name for broadcast_buffers, and warns at this one. Our oldest
        # torch, 2.11, knows only this one.
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(
            model,
            gradient_as_bucket_view=True,   # no second copy of the gradients
            broadcast_buffers=False)        # masks and positions are the same in all processes


def read_batches(videos, training):
    """This process's micro-batches from the next step on, each a data.Batch.

    `videos` has a length, and videos[(epoch, i)] is a data.Sample. The Sample must depend on the
    key alone, so that a resumed run reads the same. (data.Videos seeds the generator by the key.)
    """
    machine = training.machine
    plan = training.plan
    order = data.training_order(
        len(videos), plan.batch, training.step, plan.steps, training.config["run"]["seed"],
        machine.rank, machine.world_size)
    return data.load_batches(
        videos, plan.micro_batch, order, machine.workers, data.collate,
        pin_memory=machine.device.type == "cuda", context=machine.worker_context)


def accumulate_gradients(forward, batches, step, plan, machine, loss_of):
    """Gradients of a step's global batch. `forward` is the model as wrap_model gives it.

    Returns (loss of this process, reasons of unreadable videos, seconds waited for data).
    """
    loss = 0.0
    reasons = []
    waited = 0.0
    for i, rows in enumerate(micro_batch_rows(plan, machine.rank, machine.world_size)):
        asked = time.perf_counter()
        batch = next(batches)
        # If the GPU still has work after this wait (query() is False), the wait cost no time.
        # Without CUDA every wait counts.
        is_busy = machine.device.type == "cuda" and not torch.cuda.current_stream().query()
        if not is_busy:
            waited += time.perf_counter() - asked
        reasons += batch.unreadable
        if batch.clips is None:
            # Not machine.stop, since the other processes may be fine; torchrun ends them
            raise UserError(f"{data.Videos.TRIES} videos in a row are unreadable, for example: "
                            f"{reasons[-1]}")

        # Processes share their gradients once a step, with the last micro-batch
        is_last = i + 1 == plan.accumulation
        share_later = machine.world_size > 1 and not is_last
        with forward.no_sync() if share_later else contextlib.nullcontext():
            with machine.autocast():
                part = loss_of(forward, batch, step, rows) / plan.accumulation
            machine.scaler.scale(part).backward()
        loss += part.detach()
    return loss, reasons, waited


def call_if_defined(model, method, *arguments):
    """Call a method that a fork's model may have: before_step(step, steps) or after_step.

    `step` counts from 0 in before_step. In after_step it is the number of steps made.
    """
    if hasattr(model, method):
        getattr(model, method)(*arguments)


# Two functions that are given to fit:
# - loss_of(forward, batch, step, rows) is the loss of a micro-batch. `forward` is the model as
#   wrap_model gives it, `batch` a data.Batch, and `rows` [b] are its rows in the global batch.
# - end_epoch(epoch, is_last, log) runs in every process after each epoch and, in a new run, once
#   before the first step, as epoch 0. It returns None or scores, which are logged except for epoch
#   0. `log` is a Log in the first process, and None in the others.


def fit(config, stage, machine, model, videos, optimizer, loss_of, end_epoch, **must_match):
    """Train `model` on `videos` as section `stage` says. Resume if run.output has a checkpoint.

    `videos` are as read_batches needs them; loss_of and end_epoch are described above.
    `must_match` is saved in the checkpoint, each value under its name. A run resumes only if
    they are the same. Returns False if the run was finished before, else True.
    """
    training = Training(config, stage, machine, model, optimizer, len(videos), must_match)
    training.resume()
    plan = training.plan
    if training.step == plan.steps:
        return False
    training.print_plan()
    training.open_log()
    if training.step == 0:
        end_epoch(0, False, training.log)
    forward = wrap_model(model, machine)
    batches = read_batches(videos, training)
    with note_signals() as signals:
        for step in training.progress():
            began = time.perf_counter()
            lr = set_learning_rate(optimizer, step, plan)

            # Gradients of the global batch, micro-batch by micro-batch
            call_if_defined(model, "before_step", step, plan.steps)
            model.train()
            loss, reasons, waited = accumulate_gradients(
                forward, batches, step, plan, machine, loss_of)
            norm = clip_gradients(machine, model, optimizer, config[stage]["clip_norm"])
            # One wait for the GPU, for all four. Loss and norm become means over the processes.
            loss, norm, unreadable, stopping = machine.sum(
                loss / machine.world_size, norm / machine.world_size, len(reasons), len(signals))
            training.require_finite(loss, norm, lr)

            # Update
            machine.update(optimizer)
            training.step = step + 1
            is_last = training.step == plan.steps
            call_if_defined(model, "after_step", training.step, plan.steps)

            # Log
            training.count_unreadable(reasons, int(unreadable))
            training.log_step(loss, lr, norm, time.perf_counter() - began, waited)

            # At an epoch's end: validate, or make a picture and keep a checkpoint
            scores = None
            epoch, step_of_epoch = divmod(training.step, plan.steps_per_epoch)
            if step_of_epoch == 0:
                scores = end_epoch(epoch, is_last, training.log)
                training.log_scores(scores)
                stopping, = machine.sum(len(signals))   # one may have come during end_epoch

            # Save when due, after each validation and at the end; stop if asked to
            if stopping or scores or is_last or training.save_is_due():
                training.save()
            if stopping:
                training.stop_by_signal()
    return True


# --- Pictures ---------------------------------------------------------------


def draw_predictions(model, video, *drawn):
    """A picture [3, height, width]: for each video the truth, what is seen, what is predicted.

    A column is a time step of the token grid, shown by the first of its frames.
    video [B, 3, T, H, W], normalised; `drawn` is what model.draw gives for it.
    """
    model.eval()
    shown, predicted = model.reconstruct(video, *drawn)
    rows = torch.stack([video, shown, predicted], 1).flatten(0, 1).cpu()        # [3 B, 3, T, H, W]
    rows = (rows * data.IMAGENET_STD + data.IMAGENET_MEAN).clamp(0, 1)
    frames = rows[:, :, ::model.cube[0]].transpose(1, 2).flatten(0, 1)          # [3 B t, 3, H, W]
    enlarge = max(1, 128 // video.shape[-1])
    frames = F.interpolate(frames, scale_factor=enlarge)        # each pixel becomes a square
    # nrow is the number of pictures in a row
    return make_grid(frames, nrow=model.grid[0], padding=4, pad_value=1.0)


# --- Pretraining ------------------------------------------------------------


def build_arvideo(config):
    """The model of section `model`. UserError if sizes do not fit or a value is out of range."""
    try:
        return ARVideo(**config["model"])
    except ValueError as error:
        raise UserError(str(error)) from None


def print_start(config, model, video_count):
    """Print what will happen."""
    settings = config["model"]
    total = sum(p.numel() for p in model.parameters()) / 1e6
    encoder = sum(p.numel() for p in model.encoder.parameters()) / 1e6
    print(f"{type(model).__name__} pretraining\n"
          f"  data       {video_count} videos; clips of {settings['frames']} frames at stride "
          f"{config['data']['stride']}, {settings['size']} x {settings['size']}, "
          f"flip {config['pretrain']['flip']}\n"
          f"  model      {total:.1f} M parameters, {encoder:.1f} M of them in the encoder; "
          f"{len(model.encoder_mask)} of {math.prod(model.grid)} tokens enter the encoder, "
          f"{len(model.decoder_mask)} are predicted; order {model.order_kind}")


def pretrain(config):
    run = config["run"]
    settings = config["pretrain"]
    seed = run["seed"]
    output = Path(run["output"])
    repeats = settings["clips_per_video"]
    machine = Machine(run)
    torch.manual_seed(stream_seed(seed, "weights"))
    model = machine.prepare(build_arvideo(config))
    generator = torch.Generator(machine.device)

    # Data
    train, val = machine.from_first(data.read_lists, config["data"])
    choose = partial(data.dense_clips, frames=config["model"]["frames"],
                     stride=config["data"]["stride"], clips=repeats)
    augment = partial(data.pretraining_clip, size=config["model"]["size"], flip=settings["flip"])
    videos = data.Videos(train, choose, augment, seed)
    val_videos = data.Videos(val or train, choose, augment, seed)
    if machine.is_first:
        print_start(config, model, len(videos))

    def loss_of(forward, batch, step, rows):
        # All processes draw alike for the global batch, and each takes its own rows. So a
        # clip's draw depends on the step and its row, not on the number of processes.
        generator.manual_seed(stream_seed(seed, "draw", step))
        drawn = model.draw(settings["batch"] * repeats, generator)
        rows = machine.send(rows)
        video = data.normalise(batch.clips, machine.device)
        return forward(video, *[part[rows] for part in drawn])

    def picture_predictions(epoch, log):
        keys = [(0, 0), (0, len(val_videos) // 2)]              # (epoch, entry)
        samples = [val_videos[key] for key in keys]
        clips = [sample.clips[:1] for sample in samples if sample.clips is not None]
        if clips:
            video = data.normalise(torch.cat(clips), machine.device)
            generator.manual_seed(stream_seed(seed, "picture"))
            with machine.autocast():
                picture = draw_predictions(model, video, *model.draw(len(video), generator))
            log.save_picture("predictions", picture, epoch)

    def end_epoch(epoch, is_last, log):
        if not machine.is_first:
            return
        keep_epochs = settings["keep_epochs"]
        picture_epochs = settings["picture_epochs"]
        if keep_epochs and epoch > 0 and epoch % keep_epochs == 0:
            content = dict(model=model.state_dict(), config=config, epoch=epoch)
            save_checkpoint(output / f"epoch_{epoch:04d}.pt", content)
        # Epoch 0 has a picture too, so that an error in a fork's reconstruct shows before training
        if picture_epochs and (is_last or epoch % picture_epochs == 0):
            picture_predictions(epoch, log)

    optimizer = make_optimizer(model, settings, machine.device)
    trained = fit(config, "pretrain", machine, model, videos, optimizer, loss_of, end_epoch,
                  training_list=data.hash_of_list(train))
    if machine.is_first:
        print(f"{output} is {'now' if trained else 'already'} finished: see last.pt and log.jsonl")


def main():
    run_command("pretrain", pretrain)


if __name__ == "__main__":
    main()
