"""
What only a GPU can prove, on one of them.

    python tests/gpu.py                     all checks on the GPU, at full size (ViT-B)
    python tests/gpu.py attention rates     some of them
    python tests/gpu.py --device cpu        what makes sense on a CPU, at tiny size

Prints a table with a row for each check. The exit status is 1 if a check failed. Every
check runs in a process of its own, which is ended if it takes too long. What each check
proves, and within which tolerance, stands in its docstring. Needs Linux, but not pytest,
and runs without torchrun.
"""

import argparse
import csv
import gc
import importlib
import itertools
import json
import math
import multiprocessing
import os
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import time
import traceback
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import arvideo
import benchmark
import data
import train_pretrain
from train_finetune import Classifier, build_model, finetune
from train_pretrain import (
    Machine, accumulate_gradients, build_arvideo, clip_gradients, load_checkpoint, load_config,
    make_optimizer, make_plan, micro_batch_rows, pretrain, wrap_model)

# Seconds after which a check is ended, as one that hangs
LIMIT = 400
# A model that takes a step on a CPU in a moment
TINY = ["toy", "model.width=32", "model.depth=2", "model.heads=2", "model.decoder_width=24",
        "model.decoder_depth=1", "model.decoder_heads=2"]
# Fewer layers, where these are compiled: the time grows with them
SHALLOW = ["model.depth=2", "model.decoder_depth=2"]
STAGES = ("pretrain", "finetune")


# --- What checks share ------------------------------------------------------


class CheckFailed(Exception):
    """A check that did not find what it must find."""


def require(condition, message):
    if not condition:
        raise CheckFailed(message)


def require_close(what, found, expected, tolerance):
    """CheckFailed if `found` is off by more than this share of `expected`, or is no number."""
    error = abs(found / expected - 1)
    require(error <= tolerance, f"{what} is {found:.5g} in place of {expected:.5g}, off by "
            f"{error:.2g}, more than {tolerance}")
    return error


class Setup(NamedTuple):
    """Where the checks run. What a check appends to `rows` is printed as a table of its own."""
    device: str
    folder: Path
    rows: list

    @property
    def is_cuda(self):
        return self.device == "cuda"

    def settings(self, *words):
        """ViT-B for Kinetics on the GPU, a tiny model on the CPU, with more settings."""
        preset = ["k400"] if self.is_cuda else TINY
        return load_config([*preset, f"run.device={self.device}", *words], "pretrain")

    def machine(self, precision="auto", compiled=False):
        run = dict(device=self.device, precision=precision, workers=0, compile=compiled)
        return Machine(run)

    def toy_lists(self):
        """The settings that train on a small toy set, which is made on first use."""
        root = self.folder / "toy"
        # In another process, since one that has computed with several threads must not be
        # forked, and Script forks
        maker = multiprocessing.get_context("fork").Process(
            target=data.make_toy_set, args=(root, {"train": 48, "val": 16}))
        maker.start()
        maker.join()
        return ["data.root=", f"data.train={root / 'train.txt'}", f"data.val={root / 'val.txt'}"]


def make_model(stage, config):
    """The model of a stage, with the same weights at every call."""
    torch.manual_seed(0)
    if stage == "pretrain":
        return build_arvideo(config)
    model = build_model(config, classes=400)
    # A new head's logits are nearly zero, and would hide what the encoder does
    model.head.weight.data *= 5000
    return model


def make_inputs(stage, config, batch, seed=0):
    """Random clips with what loss_of needs beside them, on the CPU, the same at every call."""
    model = make_model(stage, config)
    torch.manual_seed(seed)
    frames = config["model"]["frames"]
    size = config["model"]["size"]
    clips = torch.randint(256, (batch, 3, frames, size, size), dtype=torch.uint8)
    if stage == "pretrain":
        return clips, *model.draw(batch)
    return clips, torch.randint(400, (batch,))


def loss_of(model, inputs, device):
    clips, *others = inputs
    video = data.normalise(clips, device)
    others = [tensor.to(device) for tensor in others]
    if isinstance(model, Classifier):
        return F.cross_entropy(model(video).float(), *others)
    return model(video, *others)


def gradient(model):
    """All gradients as one vector on the CPU, and none are left."""
    vector = torch.cat([parameter.grad.flatten().float().cpu() for parameter in model.parameters()])
    model.zero_grad()
    return vector


def distance(found, expected):
    """The length of their difference, as a share of the expected vector's length."""
    return ((found - expected).norm() / expected.norm()).item()


def read_log(output):
    """The steps of a run's log: a list of dictionaries."""
    lines = Path(output, "log.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "loss" in entry]


# --- Environment ------------------------------------------------------------


def check_environment(setup):
    """The machine has what a training needs.

    On a GPU: bf16, cuDNN, a C compiler for torch.compile, and the memory that the other
    checks need. Everywhere: two cores, for the training and a worker, and the shared memory
    through which workers hand over their batches: two for each worker, as torch reads them
    ahead, of 128 clips.
    """
    machine = Machine(setup.settings()["run"])
    cores = len(os.sched_getaffinity(0))
    require(cores >= 2, f"this process may use {cores} core, but needs 2 or more")
    model = setup.settings()["model"]
    clip_bytes = 3 * model["frames"] * model["size"] ** 2
    needed = 2 * machine.workers * 128 * clip_bytes
    present = shutil.disk_usage("/dev/shm").free
    require(present >= needed, f"/dev/shm has {benchmark.in_gib(present)} GiB free, but "
            f"{machine.workers} workers need {benchmark.in_gib(needed)}; for a container set "
            "--shm-size or --ipc=host")
    found = [f"{cores} cores", f"{machine.workers} workers", f"shared memory "
             f"{present / 2**30:.1f} GiB, {needed / 2**30:.3g} needed"]
    if setup.is_cuda:
        require(torch.cuda.is_bf16_supported(including_emulation=False), "the GPU has no bf16")
        require(torch.backends.cudnn.is_available(), "torch finds no cuDNN")
        require(shutil.which("cc") or shutil.which("gcc"), "torch.compile needs a C compiler")
        driver = Path("/proc/driver/nvidia/version")
        driver = driver.read_text().splitlines()[0] if driver.exists() else "unknown"
        free, total = torch.cuda.mem_get_info()
        free_and_total = f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        # Fine-tuning with batches of 64, in check_memory, takes most
        require(free >= 36 * 2**30, f"the GPU has {free_and_total}, but the checks need 36")
        found += [f"{torch.cuda.get_device_name()}, {free_and_total}", f"driver {driver}",
                  f"CUDA {torch.version.cuda}", f"cuDNN {torch.backends.cudnn.version()}"]
    return ", ".join([f"torch {torch.__version__}", *found])


# --- Attention --------------------------------------------------------------

# The rows of the paper's tables whose masks differ
VARIANTS = {
    "default": {}, "Table 5": {"predict_after": 2},
    "cluster 1, 1, 1": {"cluster": (1, 1, 1)}, "cluster 1, 14, 14": {"cluster": (1, 14, 14)},
    "cluster 1, 7, 7": {"cluster": (1, 7, 7)}, "cluster 8, 1, 1": {"cluster": (8, 1, 1)},
    "cluster 2, 1, 1": {"cluster": (2, 1, 1)}, "mask 75 %": {"mask_ratio": 0.75},
    "mask 90 %": {"mask_ratio": 0.9}, "mask 95 %": {"mask_ratio": 0.95},
    "decoder of width 384": {"decoder_width": 384}, "of width 768": {"decoder_width": 768}}


class Case(NamedTuple):
    """An attention: its batch, heads, width of a head, counts of queries and keys, and mask."""
    name: str
    batch: int
    heads: int
    width: int
    queries: int
    keys: int
    mask: torch.Tensor | None


def attention_cases(setup):
    """Every attention of the paper's rows, of fine-tuning and of probes; a few small on the CPU."""
    sizes = dict(frames=16, size=224, cluster=(2, 7, 7)) if setup.is_cuda else dict(
        frames=8, size=64, cluster=(2, 2, 2))
    variants = VARIANTS if setup.is_cuda else {
        "default": {}, "single tokens": {"cluster": (1, 1, 1)}}
    cases = []
    for name, changes in variants.items():
        model = arvideo.ARVideo(**{**sizes, "depth": 0, "decoder_depth": 0, **changes})
        for part, mask, heads, width in (
                ("encoder", model.encoder_mask, 12, 64),
                ("decoder", model.decoder_mask, 8, changes.get("decoder_width", 512) // 8)):
            cases.append(Case(f"{name}, {part}", 2, heads, width, *mask.shape, mask))
    N = math.prod(model.grid)
    cluster = math.prod(sizes["cluster"])
    cases += [Case("fine-tuning", 2, 12, 64, N, N, None),
              Case("attentive probe", 2, 12, 64, 1, N, None),
              Case("within clusters, Table 9", 30, 8, 64, cluster, cluster, None)]
    # Tables share many masks: the first of equal shapes stands for all
    unique = {}
    for case in cases:
        unique.setdefault((case.heads, case.width, case.queries, case.keys), case)
    return list(unique.values())


def attention_tensors(case, dtype, device):
    """Random q, k, v and a gradient of the output, [batch, n, heads x width]."""
    torch.manual_seed(0)
    lengths = (case.queries, case.keys, case.keys, case.queries)
    return [torch.randn(case.batch, n, case.heads * case.width, dtype=dtype, device=device)
            for n in lengths]


def attention_results(case, tensors):
    """The output of arvideo.attend and the gradients of q, k and v."""
    *inputs, from_above = tensors
    for tensor in inputs:
        tensor.requires_grad_()
    output = arvideo.attend(*inputs, case.heads, case.mask)
    gradients = torch.autograd.grad(output, inputs, from_above)
    return output.detach(), *gradients


def attention_error(case, dtype, device):
    """The largest difference to fp32 maths, as a share of the largest value, over all results."""
    tensors = attention_tensors(case, dtype, device)
    found = attention_results(case, tensors)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    exact = [tensor.detach().float() for tensor in tensors]
    with sdpa_kernel(SDPBackend.MATH):
        expected = attention_results(case, exact)
    torch.set_float32_matmul_precision(precision)
    errors = [((a.float() - b).abs().max() / b.abs().max()).item()
              for a, b in zip(found, expected)]
    # max() would pass over a NaN
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def chosen_backend(case, dtype, device):
    q, k, v, _ = (tensor.unflatten(2, (case.heads, -1)).transpose(1, 2)
                  for tensor in attention_tensors(case, dtype, device))
    choice = torch._fused_sdp_choice(q.requires_grad_(), k, v, case.mask)
    return SDPBackend(choice).name.removesuffix("_ATTENTION").lower()


def attention_time(case, backend, device):
    """Milliseconds of a pass forward and backward in bf16 with 32 samples, "-" if it cannot."""
    tensors = attention_tensors(case._replace(batch=16 * case.batch), torch.bfloat16, device)
    seconds = []
    try:
        for _ in range(5):
            benchmark.synchronise(device)
            began = time.perf_counter()
            with sdpa_kernel(backend):
                attention_results(case, tensors)
            benchmark.synchronise(device)
            seconds.append(time.perf_counter() - began)
    except RuntimeError:                                # no kernel of this kind takes the case
        return "-"
    return f"{1000 * min(seconds):.2f}"


def check_attention(setup):
    """Attention is right forward and backward in bf16 and fp16, for all lengths of the paper.

    Against fp32 maths from the same inputs: output and gradients of q, k and v differ by at
    most 2e-2 of their largest value in bf16, and 4e-3 in fp16. Where this fails, the check
    tries again without cuDNN and says whether that mends it. The table names the kernel that
    torch chooses, and compares the times of cuDNN's and of the memory-efficient one.
    """
    failures = []
    worst = 0.0
    for case in attention_cases(setup):
        if case.mask is not None:
            case = case._replace(mask=case.mask.to(setup.device))
        row = {"attention": case.name, "queries x keys": f"{case.queries} x {case.keys}"}
        for dtype, limit in ((torch.bfloat16, 2e-2), (torch.float16, 4e-3)):
            name = str(dtype).removeprefix("torch.")
            error = attention_error(case, dtype, setup.device)
            row[f"error, {name}"] = f"{error:.1e}"
            worst = max(worst, error)
            if not error <= limit:
                torch.backends.cuda.enable_cudnn_sdp(False)
                without = attention_error(case, dtype, setup.device)
                torch.backends.cuda.enable_cudnn_sdp(True)
                failures.append(f"{case.name} ({case.queries} x {case.keys}, {name}): error "
                                f"{error:.2g}, without cuDNN {without:.2g}")
        row["chosen"] = chosen_backend(case, torch.bfloat16, setup.device)
        if setup.is_cuda:
            for name, backend in (("cuDNN, ms", SDPBackend.CUDNN_ATTENTION),
                                  ("efficient, ms", SDPBackend.EFFICIENT_ATTENTION)):
                row[name] = attention_time(case, backend, setup.device)
        setup.rows.append(row)
    require(not failures, "; ".join(failures))
    return f"{len(setup.rows)} lengths, largest error {worst:.1e}"


# --- Numbers: parity, draws, fp16 -------------------------------------------

# Of loss, gradient's norm and gradient
PARITY = {"fp32": (5e-3, 1e-2, 1e-2), "bf16": (1e-2, 2e-2, 5e-2), "fp16": (1e-2, 2e-2, 5e-2)}


def check_parity(setup):
    """The device computes the loss and gradient that the CPU does in fp32, attention written out.

    In fp32 (TF32 on a GPU) the loss agrees to 5e-3, the gradient's norm to 1e-2 and the
    gradient, by the length of the difference, to 1e-2; in bf16 and fp16 to 1e-2, 2e-2 and
    5e-2. For both trainings, in eval mode, since drop path draws otherwise. fp16 on a GPU only.
    """
    config = setup.settings()
    found = []
    for stage in STAGES:
        model = make_model(stage, config).eval()
        inputs = make_inputs(stage, config, batch=2)
        with benchmark.attention(fused=False):
            expected_loss = loss_of(model, inputs, torch.device("cpu"))
            expected_loss.backward()
        expected = gradient(model)
        for precision in PARITY if setup.is_cuda else ("fp32", "bf16"):
            machine = setup.machine(precision)
            model.to(machine.device)
            scale = 1024 if precision == "fp16" else 1
            with machine.autocast():
                loss = loss_of(model, inputs, machine.device)
            (scale * loss).backward()
            actual = gradient(model) / scale
            what = f"{stage} in {precision}"
            loss_limit, norm_limit, gradient_limit = PARITY[precision]
            off = require_close(f"{what}: the loss", loss.item(), expected_loss.item(), loss_limit)
            require_close(f"{what}: the gradient's norm", actual.norm().item(),
                          expected.norm().item(), norm_limit)
            error = distance(actual, expected)
            require(error <= gradient_limit, f"{what}: the gradient is off by {error:.2g}")
            found.append(f"{what} {off:.0e} and {error:.0e}")
    return "loss and gradient off by: " + ", ".join(found)


def check_draws(setup):
    """What 1, 2 and 8 processes draw for a step, each for its own rows, is the same bit for bit.

    Two clips of each video, in two micro-batches. Every order is a permutation, and visible
    tokens lie in their clusters.
    """
    machine = setup.machine()
    config = setup.settings("pretrain.batch=32", "pretrain.clips_per_video=2")
    model = machine.prepare(make_model("pretrain", config))

    def draw():
        generator = torch.Generator(machine.device).manual_seed(7)
        return model.draw(64, generator)

    order, visible, _ = draw()
    in_order = torch.arange(len(model.clusters), device=machine.device).expand(64, -1)
    require(torch.equal(order.sort(1).values, in_order), "an order is no permutation")
    for c, tokens in enumerate(model.clusters):
        require(torch.isin(visible[:, c], tokens).all(), f"cluster {c}: foreign visible tokens")
    for world_size in (1, 2, 8):
        share = 32 // world_size
        config["run"]["max_batch"] = share // 2
        plan = make_plan(config, "pretrain", 32, world_size)
        orders = torch.zeros_like(order) - 1
        visibles = torch.zeros_like(visible) - 1
        for rank in range(world_size):
            own_order, own_visible, _ = draw()
            for rows in micro_batch_rows(plan, rank, world_size):
                rows = machine.send(rows)
                orders[rows] = own_order[rows]
                visibles[rows] = own_visible[rows]
        require(torch.equal(orders, order) and torch.equal(visibles, visible),
                f"{world_size} processes draw other orders or tokens than one")
    return "1, 2 and 8 processes draw the same 64 rows"


def check_fp16(setup):
    """After an infinite gradient, fp16's scaler skips the update and halves its scale.

    Parameters are then bit for bit as before, and the next step changes them and leaves
    them finite. With and without gradient clipping. On the CPU the scaler runs in fp32.
    """
    machine = setup.machine("fp16" if setup.is_cuda else "fp32")
    machine.scaler = torch.amp.GradScaler(setup.device)
    config = setup.settings()
    inputs = make_inputs("pretrain", config, batch=2)
    for clip_norm in (0.0, 1.0):
        model = machine.prepare(make_model("pretrain", config))
        optimizer = make_optimizer(model, config["pretrain"], machine.device)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3

        def step(poison):
            with machine.autocast():
                loss = loss_of(model, inputs, machine.device)
            machine.scaler.scale(loss).backward()
            if poison:
                model.decoder.head.weight.grad[0, 0] = math.inf
            clip_gradients(machine, model, optimizer, clip_norm)
            machine.update(optimizer)
            return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

        before = step(poison=False)
        scale = machine.scaler.get_scale()
        after = step(poison=True)
        require(torch.equal(after, before), "a poisoned gradient changed the parameters")
        require(machine.scaler.get_scale() == scale / 2, f"the scale went from {scale} to "
                f"{machine.scaler.get_scale()}, not to half")
        later = step(poison=False)
        require(later.isfinite().all(), "parameters are not finite")
        require(not torch.equal(later, after), "the step after the poisoned one changed nothing")
    return f"scale {scale:.0f}, then {scale / 2:.0f}; parameters finite"


# --- Steps: synchronisation, compilation, DDP -------------------------------


class RefuseReads(TorchDispatchMode):
    """On the CPU, in place of CUDA's own guard: no number that is computed reaches Python."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._local_scalar_dense.default and args[0].is_floating_point():
            raise RuntimeError("a tensor's value is read, for which a GPU would be waited for")
        return function(*args, **(kwargs or {}))


def check_synchronisation(setup):
    """In both trainings torch reports nothing that waits for the GPU between the first and the
    last micro-batch of a step.

    The trainings are the real ones, with workers, two micro-batches a step, mixing and, on a
    GPU, compilation. From the third step on torch raises an error at anything that waits.
    On the CPU, which never waits, reading a computed number is refused instead, and clips
    are not mixed, since mixing reads numbers that are drawn on the CPU.
    """
    usual = train_pretrain.accumulate_gradients
    watched = 0

    def watch(forward, batches, step, plan, machine, loss_of):
        nonlocal watched
        arguments = (forward, batches, step, plan, machine, loss_of)
        if step < 2:                                    # these compile, and fill caches
            return usual(*arguments)
        watched += plan.accumulation
        if not setup.is_cuda:
            with RefuseReads():
                return usual(*arguments)
        torch.cuda.set_sync_debug_mode("error")
        try:
            return usual(*arguments)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    train_pretrain.accumulate_gradients = watch
    for stage, train in zip(STAGES, (pretrain, finetune)):
        train(setup.settings(
            *SHALLOW, *setup.toy_lists(), f"{stage}.batch=8", f"{stage}.epochs=1",
            f"{stage}.warmup_epochs=0", "run.max_batch=4", "run.workers=2",
            "finetune.init=scratch", "finetune.test_clips=1", "finetune.test_crops=1",
            f"run.output={setup.folder / 'synchronisation' / stage}"))
    require(watched == 16, f"{watched} micro-batches were watched, not 16")
    return f"none in {watched} micro-batches"


def check_compile(setup):
    """Both models compile as one graph each. They give the loss and gradient of the eager ones.

    The loss agrees to 1e-2, the gradient, by the length of the difference, to 5e-2: both in
    eval mode, since drop path draws otherwise. After one step of training and one validation,
    going back and forth between them compiles nothing again. On the CPU graphs are traced,
    but then run as they are: to compile them would take too long.
    """
    config = setup.settings(*SHALLOW, "finetune.drop_path=0.1")
    machine = setup.machine()
    found = []
    for stage in STAGES:
        model = make_model(stage, config).to(machine.device)
        inputs = [tensor.to(machine.device) for tensor in make_inputs(stage, config, batch=4)]

        def passes():
            """Training, validation, and the loss and gradient in eval mode."""
            model.train()
            with machine.autocast():
                loss = loss_of(model, inputs, machine.device)
            loss.backward()
            model.zero_grad()
            model.eval()
            with torch.no_grad(), machine.autocast():
                loss_of(model, inputs, machine.device)
            with machine.autocast():
                loss = loss_of(model, inputs, machine.device)
            loss.backward()
            return loss.item(), gradient(model)

        eager_loss, eager_gradient = passes()
        model.compile(fullgraph=True)
        began = time.perf_counter()
        compiled_loss, compiled_gradient = passes()
        seconds = time.perf_counter() - began
        with torch.compiler.set_stance("fail_on_recompile"):
            passes()
            passes()
        off = require_close(f"{stage}: the compiled loss", compiled_loss, eager_loss, 1e-2)
        apart = distance(compiled_gradient, eager_gradient)
        require(apart <= 5e-2, f"{stage}: the compiled gradient is off by {apart:.2g}")
        found.append(f"{stage}: loss off by {off:.0e}, gradient by {apart:.0e}, compiled in "
                     f"{seconds:.0f} s")
    return "; ".join(found)


def join_alone(device):
    """A process group of this process alone: NCCL on a GPU, gloo on the CPU."""
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    store = dist.TCPStore("127.0.0.1", 0, world_size=1, is_master=True)
    os.environ["MASTER_PORT"] = str(store.port)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"     # the store runs already
    return store


def check_ddp(setup):
    """DDP, compilation, checkpointing and no_sync together give the plain model's gradients.

    A process group of one process, which is told that there are two, so that it does what
    it would do among several. Two steps of two micro-batches in fp32 (TF32 on a GPU); the
    gradient of each agrees to 1e-2. Gradients are shared with the second micro-batch alone.
    """
    words = [*SHALLOW, "pretrain.batch=8", "run.max_batch=2"]
    config = setup.settings(*words)
    batches = [make_inputs("pretrain", config, batch=2, seed=seed) for seed in range(4)]

    store = join_alone(setup.device)
    machine = setup.machine("fp32", compiled=True)
    require(dist.is_initialized(), "there is no process group")
    machine.world_size = 2
    config = setup.settings(*words, "model.checkpointing=true")
    model = machine.prepare(make_model("pretrain", config))
    optimizer = make_optimizer(model, config["pretrain"], machine.device)
    forward = wrap_model(model, machine)
    shared = []

    def share(state, bucket):
        shared.append(bucket.index())
        return allreduce_hook(None, bucket)

    forward.register_comm_hook(None, share)
    shared_before = []

    def loss_of_batch(forward, batch, step, rows):
        shared_before.append(len(shared))
        return loss_of(forward, batch.clips, machine.device)

    plan = make_plan(config, "pretrain", 8, world_size=2)
    require(plan.accumulation == 2, f"{plan.accumulation} micro-batches a step, not 2")
    plain = make_model("pretrain", setup.settings(*words)).to(machine.device)
    errors = []
    for step in range(2):
        own = batches[2 * step:2 * step + 2]
        loaded = iter([data.Batch(inputs, None, []) for inputs in own])
        accumulate_gradients(forward, loaded, step, plan, machine, loss_of_batch)
        found = torch.cat([p.grad.flatten().cpu() for p in model.parameters()])
        optimizer.zero_grad()
        for inputs in own:
            (loss_of(plain, inputs, machine.device) / 2).backward()
        errors.append(distance(found, gradient(plain)))
    dist.destroy_process_group()
    require(max(errors) <= 1e-2, f"gradients are off by {errors}")
    first, second, third, fourth = shared_before
    require(first == second < third == fourth < len(shared), "not only the last micro-batch of a "
            f"step shares gradients: {shared_before} buckets before each, {len(shared)} in the end")
    return f"gradients off by {max(errors):.0e}, {len(shared)} buckets in two steps"


# --- Workers ----------------------------------------------------------------


def check_workers(setup):
    """Workers that start after NCCL read the same batches as no workers, bit for bit, twice.

    None of them is a fork of this process. It fails by its time limit if they hang.
    """
    config = setup.settings()
    choose = partial(data.dense_clips, frames=config["model"]["frames"], stride=1)
    augment = partial(data.pretraining_clip, size=config["model"]["size"], flip=False)
    setup.toy_lists()
    entries, _ = data.read_annotations(str(setup.folder / "toy" / "train.txt"))
    videos = data.Videos(entries, choose, augment, seed=0)
    keys = [(0, i) for i in range(24)]

    store = join_alone(setup.device)
    machine = setup.machine()
    dist.all_reduce(torch.ones(1, device=machine.device))   # NCCL starts with the first call
    expected = [batch.clips for batch in data.load_batches(videos, 4, keys, 0, data.collate)]
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        batches = data.load_batches(videos, 4, keys, 2, data.collate, pin_memory=setup.is_cuda,
                                    context=machine.worker_context or "forkserver")
        found = [next(batches).clips]
        seconds.append(time.perf_counter() - began)
        workers = multiprocessing.active_children()
        found += [batch.clips for batch in batches]
        require(len(workers) == 2, f"{len(workers)} workers are running, not 2")
        for worker in workers:
            require(worker._start_method == "forkserver", f"a worker started by "
                    f"{worker._start_method}, not by the fork server")
        require(len(found) == len(expected) and all(map(torch.equal, found, expected)),
                "workers read other batches than this process")
    dist.destroy_process_group()
    return f"first batch after {seconds[0]:.1f} s, later after {seconds[1]:.1f} s"


# --- Memory and rates -------------------------------------------------------


def measured_memory(stage, config, batch):
    """Bytes at the peak of two steps on the GPU, in bf16, not compiled."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    build = benchmark.pretraining_model if stage == "pretrain" else benchmark.FineTuning
    contender = benchmark.Contender(stage, build, fused=True, precision="bf16", compiled=False)
    peak = benchmark.peak_memory(contender, config, batch, "cuda")
    require(peak, f"{stage} does not fit at batch {batch}")
    return peak


def check_memory(setup):
    """`benchmark.py estimate` predicts the memory of both trainings within a factor of 1.3.

    At batch 16 and 64, and for pretraining and with checkpointing at 128. On the CPU: what
    it predicts autograd to save is what autograd saves, byte for byte.
    """
    ratios = []
    for stage, checkpointing in itertools.product(STAGES, (False, True)):
        config = setup.settings(f"model.checkpointing={checkpointing}")
        if not setup.is_cuda:
            predicted, _ = benchmark.saved_on_gpu(config, stage)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                one = benchmark.saved_by_training(config, stage, 1)
                two = benchmark.saved_by_training(config, stage, 2)
            require(two[-1] - one[-1] == predicted[-1], f"{stage}: {two[-1] - one[-1]} bytes are "
                    f"saved a clip, {predicted[-1]} were predicted")
            ratios.append(1.0)
            continue
        estimate = benchmark.estimate_memory(config, stage)
        # Fine-tuning at 128 without checkpointing would fill 80 GB
        too_large = stage == "finetune" and not checkpointing
        for batch in (16, 64) if too_large else (16, 64, 128):
            peak = measured_memory(stage, config, batch)
            predicted = estimate.at_batch(batch)
            ratios.append(peak / predicted)
            setup.rows.append({
                "memory": stage + (", checkpointing" if checkpointing else ""), "batch": batch,
                "measured GiB": benchmark.in_gib(peak),
                "estimated GiB": benchmark.in_gib(predicted), "ratio": f"{ratios[-1]:.2f}"})
    require(all(1 / 1.3 <= ratio <= 1.3 for ratio in ratios),
            f"measured / estimated is from {min(ratios):.2f} to {max(ratios):.2f}")
    return f"measured / estimated from {min(ratios):.2f} to {max(ratios):.2f}"


def kinetics_like_list(setup, count):
    """A list that names a file of Kinetics' size, 340 x 256 and ten seconds, `count` times."""
    frames = 250 if setup.is_cuda else 20
    path = setup.folder / "kinetics.mp4"
    benchmark.synthetic_video(path, frames, 256, 340, rate=25, key_frames=frames)
    source = setup.folder / "kinetics.txt"
    source.write_text(f"{path}\n" * count)
    return source


def check_rates(setup):
    """Pretraining is fast: its step, and the whole of `fit` with its loader.

    On a GPU, the compiled step is at least as fast as the eager one and reaches a quarter
    of the rate of a large matrix product. While `fit` does not wait for data, it takes at
    least 0.7 of the clips of the step alone, and at most 1.3 of the estimated memory. On
    the CPU rates are measured, but not judged. Both read files of Kinetics' size.
    """
    config = setup.settings()
    precision = setup.machine().precision
    batch = 64 if setup.is_cuda else 4
    rates = {}
    for compiled in (False, True):
        contender = benchmark.Contender("ARVideo", benchmark.pretraining_model, fused=True,
                                        precision=precision, compiled=compiled)
        step = benchmark.make_step(contender, config, batch, setup.device)
        step()
        step()
        rates[compiled] = batch / statistics.median(step() for _ in range(10))
    flops = 3 * benchmark.forward_flops(contender, config)
    share = rates[True] * flops / benchmark.matrix_rate(precision, setup.device)
    del step
    gc.collect()

    # fit, for 20 steps
    output = setup.folder / "rates"
    if setup.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    pretrain(setup.settings(
        f"data.train={kinetics_like_list(setup, 20 * batch)}", "data.root=", "data.val=",
        f"pretrain.batch={batch}", "pretrain.epochs=1", "pretrain.warmup_epochs=0",
        f"run.output={output}", f"run.compile={setup.is_cuda}"))
    steps = read_log(output)
    require(len(steps) == 20, f"the log has {len(steps)} steps, not 20")
    require(all(math.isfinite(step["loss"]) for step in steps), "a loss is not finite")
    steps = steps[5:]                                   # the first ones compile
    fed = statistics.median(step["clips_per_second"] for step in steps)
    unhindered = statistics.median(
        step["clips_per_second"] / max(1 - step["data_share"], 1e-3) for step in steps)
    waiting = statistics.mean(step["data_share"] for step in steps)
    if setup.is_cuda:
        peak = torch.cuda.max_memory_allocated()
        estimate = benchmark.estimate_memory(config, "pretrain").at_batch(batch)
        require(rates[True] >= rates[False], f"compiled {rates[True]:.0f} clips/s, eager "
                f"{rates[False]:.0f}")
        require(share >= 0.25, f"{share:.0%} of the matrix rate")
        require(unhindered >= 0.7 * rates[True], f"fit takes {unhindered:.0f} clips/s while it "
                f"does not wait for data, its step alone {rates[True]:.0f}")
        require(peak <= 1.3 * estimate, f"fit took {benchmark.in_gib(peak)} GiB, estimated "
                f"{benchmark.in_gib(estimate)}")
    return (f"clips/s: eager {rates[False]:.4g}, compiled {rates[True]:.4g}, {share:.0%} of the "
            f"matrix rate; fit {fed:.4g}, {waiting:.0%} waiting for data, else {unhindered:.4g}")


# --- End to end -------------------------------------------------------------


def run_script(script, words, prefix, memory_limit):
    """In a new process: what `python script words` does, with at most so many more bytes."""
    for stream, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{prefix}.{stream}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    if memory_limit and "run.device=cuda" in words:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(memory_limit / total)
    elif memory_limit:
        used = benchmark.kernel_bytes("/proc/self/status", "VmSize")
        resource.setrlimit(resource.RLIMIT_AS, (used + memory_limit, used + memory_limit))
    sys.argv = [script, *words]
    try:
        importlib.import_module(script.removesuffix(".py")).main()
    finally:
        data.kill_workers()         # an exit does so, but not that of a process by multiprocessing


class Script:
    """A script of ours in a process of its own, forked from this one, which must be idle."""

    def __init__(self, setup, script, *words, output, memory_limit=0):
        self.output = setup.folder / output
        self.prefix = setup.folder / output.replace("/", "-")
        preset = ["toy"] if setup.is_cuda else TINY
        words = [*preset, f"run.device={setup.device}", "run.compile=false", "run.workers=1",
                 *setup.toy_lists(), *words, f"run.output={self.output}"]
        self.process = multiprocessing.get_context("fork").Process(
            target=run_script, args=(script, words, self.prefix, memory_limit))
        self.process.start()

    def printed(self, stream):
        return Path(f"{self.prefix}.{stream}").read_text()

    def finish(self, status=0):
        """Wait for its end. CheckFailed unless it ends with this status."""
        self.process.join()
        if self.process.exitcode != status:
            raise CheckFailed(f"{self.output.name} ended with {self.process.exitcode}: "
                              f"{self.printed('err')[-1000:]}")


def killed_and_resumed(setup):
    """Pretrain, kill it after some steps, and resume. Returns the step that was resumed."""
    words = ["pretrain.batch=8", "pretrain.epochs=8", "run.save_minutes=0"]
    start = partial(Script, setup, "train_pretrain.py", *words, output="pretrain")
    script = start()
    log = script.output / "log.jsonl"
    while not log.exists() or log.read_text().count("\n") < 8:
        if not script.process.is_alive():
            script.finish(status=None)
        time.sleep(0.01)
    script.process.kill()
    script.process.join()
    reached = load_checkpoint(script.output / "last.pt")["step"]
    require(0 < reached < 48, f"pretraining was killed at step {reached} of 48")
    before = read_log(script.output)[:reached]
    start().finish()
    log = read_log(script.output)
    steps = [entry["step"] for entry in log]
    require(steps == list(range(1, 49)), f"the log has the steps {steps}")
    require(log[:reached] == before, "the steps before the checkpoint were made again")
    return reached


def tested(setup, name, *words):
    """Fine-tune from that pretraining as `words` say. Returns the content of results.json."""
    script = Script(setup, "train_finetune.py", "finetune.batch=8", "finetune.epochs=2",
                    f"finetune.init={setup.folder / 'pretrain' / 'last.pt'}", *words, output=name)
    script.finish()
    with open(script.output / "predictions.csv", newline="") as file:
        predictions = list(csv.reader(file))
    results = json.loads((script.output / "results.json").read_text())
    require(results["videos"] == 16 and len(predictions) == 17, f"{name}: {results['videos']} "
            f"results and {len(predictions) - 1} predictions, not 16 of each")
    require(not results["unreadable"], f"{name}: {results['unreadable']}")
    return results


def check_end_to_end(setup):
    """The scripts themselves, at toy size, as processes.

    Pretraining is killed and resumes, and its log has every step once. Fine-tuning with all
    augmentation and mixing, a linear and an attentive probe; each tests all videos, the
    first on 5 clips x 3 crops. A run without enough memory ends with torch's error, at once,
    and the same command with run.max_batch=1 succeeds in the same memory.
    """
    setup.toy_lists()
    reached = killed_and_resumed(setup)
    results = tested(setup, "mixing", "finetune.mixup=0.8", "finetune.cutmix=1.0",
                     "finetune.rand_augment=[4,7.0]", "finetune.erase=0.25",
                     "finetune.drop_path=0.1", "finetune.test_clips=5", "finetune.test_crops=3")
    require(results["views"] == "5 clips x 3 crops", f"views: {results['views']}")
    tested(setup, "linear", "linear")
    tested(setup, "attentive", "attentive")

    # Out of memory: 48 videos x 16 clips at once
    words = ["pretrain.batch=48", "pretrain.clips_per_video=16", "pretrain.epochs=1"]
    start = partial(Script, setup, "train_pretrain.py", *words, memory_limit=500 * 2**20)
    failing = start(output="too-large")
    failing.finish(status=1)
    error = failing.printed("err").strip().splitlines()[-1]
    require("memory" in error, f"without enough memory a run ends with: {error}")
    start("run.max_batch=1", output="small-enough").finish()
    return (f"killed at step {reached} of 48 and resumed; mixing, two probes, 5 x 3 views; out of "
            "memory, then with run.max_batch=1")


# --- The runner -------------------------------------------------------------

CHECKS = {
    "environment": check_environment,
    "attention": check_attention,
    "parity": check_parity,
    "draws": check_draws,
    "synchronisation": check_synchronisation,
    "compile": check_compile,
    "ddp": check_ddp,
    "workers": check_workers,
    "fp16": check_fp16,
    "memory": check_memory,
    "rates": check_rates,
    "end-to-end": check_end_to_end,
}


def run_check(name, setup, connection):
    """In a process of its own: run a check and send (result, what was measured, rows)."""
    os.setsid()                     # a group of processes, which can be ended as a whole
    log = os.open(setup.folder / f"{name}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if not setup.is_cuda:
        torch.set_num_threads(1)
        # Traces graphs as on a GPU, but runs them as they are
        torch.compile = partial(torch.compile, backend="eager")
    try:
        answer = "passed", CHECKS[name](setup)
    except Exception as error:
        traceback.print_exc()
        answer = "failed", f"{type(error).__name__}: {error}"
    connection.send((*answer, setup.rows))


def run_alone(name, device, folder):
    """Run a check in a process of its own: (result, what was measured, rows)."""
    # A fork of this process, which has not touched the GPU, so that a hanging or broken
    # check harms no other, and nothing is imported twelve times
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(
        target=run_check, args=(name, Setup(device, folder, []), there))
    process.start()
    ready = wait([here, process.sentinel], timeout=LIMIT)
    if here.poll():
        answer = here.recv()
        process.join(10)            # NCCL and CUDA say goodbye
    elif ready:
        process.join()
        answer = "failed", f"the process ended with {process.exitcode}", []
    else:
        answer = "failed", f"no answer within {LIMIT} s", []
    try:
        os.killpg(process.pid, signal.SIGKILL)          # and what it has started
    except ProcessLookupError:
        pass
    process.join()
    return answer


def print_row(cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checks", nargs="*", metavar="CHECK", help=", ".join(CHECKS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    if "RANK" in os.environ:
        parser.error("run it without torchrun: it checks one GPU, by processes of its own")
    names = options.checks or list(CHECKS)
    for name in names:
        if name not in CHECKS:
            parser.error(f"there is no check {name}; there are {', '.join(CHECKS)}")

    began = time.perf_counter()
    failed = []
    tables = []
    print_row(["check", "result", "measured", "s"])
    print_row(["---"] * 4)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        for name in names:
            started = time.perf_counter()
            result, measured, rows = run_alone(name, options.device, folder)
            seconds = time.perf_counter() - started
            print_row([name, result, " ".join(measured.split()), f"{seconds:.1f}"])
            if rows:
                tables.append(rows)
            if result == "failed":
                failed.append(name)
        for rows in tables:
            print()
            benchmark.print_table(rows)
        for name in failed:
            print(f"\n{name} printed at its end:\n"
                  f"{(folder / f'{name}.log').read_text(errors='replace')[-3000:]}")
    print(f"\n{len(failed)} of {len(names)} checks failed, "
          f"{time.perf_counter() - began:.0f} s on {options.device}")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
