"""What runs of weeks meet: kills, full disks, damaged checkpoints and mistyped input."""

import json
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import data
import train_finetune
import train_pretrain
from conftest import ROOT, TINY, Script, assert_equal, pretrain, toy_lists
from data import UserError


@pytest.fixture(scope="module")
def damaged_toy(toy, tmp_path_factory):
    """The toy set with one unreadable video among its 24: 4 %, which a run endures."""
    copy = tmp_path_factory.mktemp("damaged") / "toy"
    shutil.copytree(toy, copy)
    (copy / "train" / "00023.mp4").write_text("hello")
    return copy


def start(toy, output, *arguments, script="train_pretrain.py", **how):
    """A pretraining of 18 steps, 3 for each epoch."""
    return Script(script, *toy_lists(toy), "pretrain.epochs=6", *arguments, output=output, **how)


def logged(output, key):
    """What the log holds under this key, step by step."""
    lines = (output / "log.jsonl").read_text().splitlines()
    return [json.loads(line)[key] for line in lines]


def first_steps(out):
    """The step from which each start trained, as it printed. torchrun may start a run twice."""
    return [int(step) for step in re.findall(r"from step (\d+) on", out)]


def outcome(output):
    """Everything that must not depend on interruptions."""
    checkpoint = torch.load(output / "last.pt", weights_only=True)
    return dict(
        model=checkpoint["model"],
        optimizer=checkpoint["optimizer"]["state"],
        losses=logged(output, "loss"),
        tried=checkpoint["tried"],
        unreadable=checkpoint["unreadable"])


@pytest.fixture(scope="module")
def undisturbed(damaged_toy, tmp_path_factory):
    """The outcome of the undisturbed run in one process."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    start(damaged_toy, output).finish()
    return outcome(output)


@pytest.fixture(scope="module")
def undisturbed_by_two(damaged_toy, tmp_path_factory):
    """The same of two processes."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    start(damaged_toy, output, processes=2).finish()
    return outcome(output)


def children(pid):
    """The processes that a process has started, the youngest last."""
    return [int(pid) for pid in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# --- Kills ------------------------------------------------------------------


def size_of(path):
    """In bytes, or 0 if there is no such file."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def stop_with_half_a_checkpoint(script):
    """Stop the run when it has written a part of a checkpoint and no more."""
    temporary = script.output / "last.pt.tmp"
    whole = size_of(script.output / "last.pt")
    while True:
        while size_of(temporary) == 0:
            assert script.is_running(), script.printed("err")
        script.send_signal(signal.SIGSTOP)
        time.sleep(0.01)                        # a signal takes a moment to arrive
        if 0 < size_of(temporary) < whole:
            return
        script.send_signal(signal.SIGCONT)      # too late: wait for the next checkpoint
        while size_of(temporary) > 0:
            assert script.is_running(), script.printed("err")


@pytest.mark.slow
def test_a_run_killed_at_random_moments_equals_an_undisturbed_one(
        damaged_toy, undisturbed, tmp_path):
    """Bit for bit, whatever the number of workers. One kill comes while a checkpoint is written."""
    output = tmp_path / "run"
    chance = random.Random(0)
    for attempt in range(4):
        script = start(damaged_toy, output, "run.save_minutes=0", f"run.workers={attempt % 3}")
        script.wait_for_steps(script.steps_logged() + chance.randint(1, 3))
        if attempt == 1:
            stop_with_half_a_checkpoint(script)
        else:
            time.sleep(chance.random() * 0.01)
        script.send_signal(signal.SIGKILL)
        script.finish(status=-signal.SIGKILL)
        if attempt == 1:
            assert size_of(output / "last.pt.tmp") > 0      # the kill left its half behind
    with open(output / "log.jsonl", "a") as log:
        log.write('{"step": 5, "lo\0\0\n')      # torn by a power cut

    out, _ = start(damaged_toy, output).finish()
    resumed_from, = first_steps(out)
    assert 0 < resumed_from < 18
    assert_equal(outcome(output), undisturbed)
    assert logged(output, "step") == list(range(1, 19))


@pytest.mark.slow
def test_an_unreadable_video_is_met_and_counted_once_an_epoch(undisturbed):
    assert undisturbed["unreadable"] == 6
    assert undisturbed["tried"] == 18 * 8 + 6


@pytest.mark.slow
def test_a_killed_rank_is_restarted_by_torchrun(damaged_toy, undisturbed_by_two, tmp_path):
    script = start(damaged_toy, tmp_path / "run", "run.save_minutes=0", processes=2)
    script.wait_for_steps(3)
    os.kill(children(script.pid)[-1], signal.SIGKILL)
    out, _ = script.finish()
    begun_from, resumed_from = first_steps(out)
    assert begun_from == 0 and 2 <= resumed_from < 18
    assert_equal(outcome(tmp_path / "run"), undisturbed_by_two)


# Workers start as they do on a GPU
AS_ON_A_GPU = """
import train_pretrain

class Machine(train_pretrain.Machine):
    def __init__(self, run):
        super().__init__(run)
        self.worker_context = "forkserver"

train_pretrain.Machine = Machine
if __name__ == "__main__":
    train_pretrain.main()
"""


@pytest.mark.slow
def test_a_killed_rank_is_restarted_on_two_machines(
        damaged_toy, undisturbed_by_two, tmp_path, monkeypatch):
    """Two agents of torchrun, which meet at a port of this machine, with one process each.

    Their workers come from a fork server, and yet all is bit for bit as with forked ones.
    """
    as_on_a_gpu = tmp_path / "as_on_a_gpu.py"
    as_on_a_gpu.write_text(AS_ON_A_GPU)
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]                          # free until now
    machines = ["--nnodes=2", "--rdzv-backend=c10d", "--rdzv-id=test", "--max-restarts=3",
                f"--rdzv-endpoint=127.0.0.1:{port}"]
    output = tmp_path / "run"
    agents = [
        start(damaged_toy, output, "run.save_minutes=0", script=as_on_a_gpu, processes=1,
              machines=machines)
        for _ in range(2)]
    agents[0].wait_for_steps(3)
    os.kill(children(agents[1].pid)[-1], signal.SIGKILL)
    printed = [agent.finish(timeout=300)[0] for agent in agents]
    # Rank 0 prints. At the restart it may go from one agent to the other.
    begun_from, *_, resumed_from = sorted(first_steps("".join(printed)))
    assert begun_from == 0 and 2 <= resumed_from < 18
    assert_equal(outcome(output), undisturbed_by_two)


@pytest.mark.slow
def test_one_process_resumes_the_run_of_two(
        damaged_toy, undisturbed, undisturbed_by_two, tmp_path):
    output = tmp_path / "run"
    script = start(damaged_toy, output, processes=2)
    script.wait_for_steps(3)
    script.send_signal(signal.SIGTERM)          # torchrun sends it to both ranks
    _, err = script.finish(status=None)
    step = torch.load(output / "last.pt", weights_only=True)["step"]
    assert 3 <= step < 18
    assert err.count(f"stopped by a signal after step {step}") == 1

    out, _ = start(damaged_toy, output).finish()
    assert first_steps(out) == [step]
    assert_close = torch.testing.assert_close
    for result in (outcome(output), undisturbed_by_two):
        assert_close(result["model"], undisturbed["model"], rtol=1e-3, atol=2e-5)
        assert result["tried"] == undisturbed["tried"]
        assert result["unreadable"] == undisturbed["unreadable"]


def catches(pid, number):
    """Whether a process has a handler of its own for a signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    line, = [line for line in status.splitlines() if line.startswith("SigCgt")]
    return bool(int(line.split()[1], 16) >> (number - 1) & 1)


@pytest.mark.slow
@pytest.mark.parametrize("number, status", [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 1)])
def test_a_second_sigint_kills_but_a_second_sigterm_does_not(toy, tmp_path, number, status):
    """Under torchrun a process that was sent SIGTERM gets another from torchrun."""
    output = tmp_path / "run"
    script = start(toy, output, "pretrain.epochs=500", "run.max_batch=1", "model.depth=12")
    script.wait_for_steps(1)
    script.send_signal(number)
    while catches(script.pid, signal.SIGINT):   # until it has noted the first signal
        time.sleep(0.001)
    assert not (output / "last.pt").exists()    # the second one comes in the same long step
    script.send_signal(number)
    _, err = script.finish(status)
    if status == 1:
        step = torch.load(output / "last.pt", weights_only=True)["step"]
        assert f"stopped by a signal after step {step}" in err
    else:
        assert not (output / "last.pt").exists()


@pytest.mark.slow
def test_the_failure_of_one_rank_ends_all_with_its_message(toy, tmp_path):
    """The first rank can read its four videos of the first step, the second one none."""
    broken = tmp_path / "broken.mp4"
    broken.write_text("hello")
    # 4 of 800 are readable, so that the second rank's ten tries hardly ever draw one
    lines = [str(broken)] * 800
    for _, i in data.training_order(800, 8, 0, 1, seed=0, rank=0, world_size=2):
        lines[i] = str(toy / "train" / "00000.mp4")
    (tmp_path / "list.txt").write_text("\n".join(lines))

    script = start(toy, tmp_path / "run", f"data.train={tmp_path / 'list.txt'}", processes=2)
    _, err = script.finish(status=1)            # the first rank does not wait for ever
    assert f"10 videos in a row are unreadable, for example: {broken}" in err
    assert not (tmp_path / "run" / "last.pt").exists()


@pytest.mark.slow
def test_a_worker_killed_by_the_system_is_explained(toy, tmp_path):
    script = start(toy, tmp_path / "run", "pretrain.epochs=500")
    script.wait_for_steps(2)
    worker = children(script.pid)[-1]
    while children(worker):                     # Python 3.14 starts workers from a server
        worker = children(worker)[-1]
    os.kill(worker, signal.SIGKILL)
    _, err = script.finish(status=1)
    assert "a worker process has ended" in err.splitlines()[-1]
    assert "set run.workers (or --workers) lower" in err and "Traceback" not in err


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(toy, tmp_path):
    output = tmp_path / "run"
    first = start(toy, output, "pretrain.epochs=500")
    first.wait_for_steps(1)
    _, err = start(toy, output).finish(status=1)
    assert "run: another run is writing here" in err.splitlines()[-1]
    assert "Traceback" not in err

    count = first.steps_logged()
    first.wait_for_steps(count + 3)             # the first run is undisturbed
    first.kill()
    steps = logged(output, "step")
    assert steps == list(range(1, len(steps) + 1))


# --- Disks and checkpoints --------------------------------------------------


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    """The folder of a finished pretraining of one epoch. Nobody changes it."""
    output = tmp_path_factory.mktemp("finished") / "run"
    settings = [*TINY, *toy_lists(toy), f"run.output={output}", "pretrain.epochs=1"]
    train_pretrain.pretrain(train_pretrain.load_config([*settings, "run.workers=0"], "pretrain"))
    return output


def snapshot(folder):
    """The content of all files below a folder."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_full_disk_keeps_the_last_checkpoint(toy, finished, tmp_path):
    """No file may become larger than half a checkpoint: the end of the disk, for this process."""
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    last = (output / "last.pt").read_bytes()

    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(last) // 2, len(last) // 2))

    process = subprocess.run(
        [sys.executable, "train_pretrain.py", *TINY, *toy_lists(toy), f"run.output={output}"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=limit_files, timeout=120)
    assert process.returncode != 0
    assert first_steps(process.stdout) == [3]
    assert logged(output, "step") == [1, 2, 3, 4, 5, 6]
    assert (output / "last.pt").read_bytes() == last
    assert not (output / "last.pt.tmp").exists()


def test_an_output_that_cannot_be_made_is_named(toy, tmp_path):
    (tmp_path / "file").write_text("hello")
    settings = [*TINY, *toy_lists(toy), f"run.output={tmp_path / 'file' / 'run'}", "run.workers=0"]
    with pytest.raises(OSError, match="file/run"):
        train_pretrain.pretrain(train_pretrain.load_config(settings, "pretrain"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_truncated_checkpoint_is_refused_by_name(toy, finished, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    content = (output / "last.pt").read_bytes()
    (output / "last.pt").write_bytes(content[:len(content) // 2])
    before = snapshot(tmp_path)
    settings = [*TINY, *toy_lists(toy), f"run.output={output}", "run.workers=0"]
    with pytest.raises(UserError, match="run/last.pt: this is not a readable checkpoint"):
        train_pretrain.pretrain(train_pretrain.load_config(settings, "pretrain"))
    assert snapshot(tmp_path) == before


@pytest.mark.slow
def test_a_longer_schedule_other_paths_and_other_workers_may_resume(toy, tmp_path):
    output = tmp_path / "run"
    pretrain(output, *toy_lists(toy), "pretrain.epochs=1")
    moved = tmp_path / "moved"
    moved.symlink_to(toy)
    changed = ["pretrain.epochs=2", "run.workers=0", "run.save_minutes=1"]
    checkpoint, out, _ = pretrain(output, *toy_lists(moved), *changed)
    assert first_steps(out) == [3]
    assert checkpoint["step"] == 6
    assert logged(output, "step") == [1, 2, 3, 4, 5, 6]

    _, _, err = pretrain(output, *toy_lists(toy), "pretrain.epochs=1", status=1)
    assert err.strip().endswith("run holds a run of 6 steps, more than the 3 asked for: "
                                "choose another run.output")


# --- Bad input: each ends with one sentence that names the culprit ----------


class Malicious:
    """Unpickling it makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.fixture(scope="module")
def bad(tmp_path_factory, toy, finished):
    """A folder of bad files, named below as {bad}/..."""
    bad = tmp_path_factory.mktemp("bad")
    texts = {
        "empty.txt": "",
        "words.txt": "00001.mp4 cat\n",
        "gone.txt": "nothing.mp4 0\n",
        "high.txt": "00001.mp4 9\n",
        "bare.txt": "00001.mp4\n",
        "mixed.txt": "00001.mp4 1\n00002.mp4\n",
        "one.txt": "00001.mp4 1\n",
        "fewer.txt": "00001.mp4 1\n" * 8,
        "broken.txt": "broken.mp4 0\n" * 8,
        "columns.csv": "label,youtube_id\nx,y\n",
        "unknown.json": '[{"id": "00001", "template": "Eating [something]"}]',
        "labels.json": '{"Holding something": "0"}',
        "text.pt": "hello",
        "empty.pt": "",
        "broken.mp4": "hello",
        "key.yaml": "model: {widht: 3}\n",
        "kind.yaml": "run: {seed: 1}\nmodel: {width: wide}\n",
        "tab.yaml": "model:\n\twidth: 32\n",
        "list.yaml": "- model\n- run\n",
        "number.yaml": "model: 3\n",
        "empty.yaml": "",
        "mapping.yaml": "{{data}}: {root: x}\n",
        "date.yaml": "run: {output: 2024-13-45}\n",
        "twice.yaml": "model: {width: 32}\nrun: {seed: 1}\nmodel: {depth: 2}\n",
    }
    for name, text in texts.items():
        (bad / name).write_text(text)
    for name in ("binary.txt", "binary.yaml"):
        (bad / name).write_bytes(bytes(range(256)))
    for name in ("00001.mp4", "00002.mp4"):
        shutil.copy(toy / "train" / name, bad)
    content = (finished / "last.pt").read_bytes()
    (bad / "cut.pt").write_bytes(content[:len(content) // 3])
    torch.save({"model": Malicious()}, bad / "code.pt")
    # Files of other programs
    torch.save({"model": {"head.weight": torch.zeros(8, 32)}, "config": "vit-b"}, bad / "vit.pt")
    (bad / "other").mkdir()
    torch.save({"model": {}, "epoch": 7}, bad / "other" / "last.pt")
    # Two classes of one name
    (bad / "doubled").mkdir()
    (bad / "doubled" / "classes.txt").write_text("wave\nclap\nwave\n")
    (bad / "doubled" / "train.txt").write_text("../00001.mp4 1\n../00002.mp4 2\n")
    # The videos of the finished run, in another order
    lines = (toy / "train.txt").read_text().splitlines()
    (bad / "reversed.txt").write_text("\n".join(reversed(lines)) + "\n")
    return bad


PRETRAIN = [
    # Presets and settings
    ("toyy", "preset 'toyy' is unknown; did you mean 'toy'"),
    ("nowhere.yaml", "nowhere.yaml: No such file or directory"),
    ("{bad}/key.yaml", "key of section model 'widht' is unknown; did you mean 'width'"),
    ("{bad}/kind.yaml", "model.width must be of kind int, like 768; found 'wide'"),
    ("{bad}/tab.yaml", r"tab.yaml, line 2: found character '\t'"),
    ("{bad}/list.yaml", "list.yaml: expected sections of settings"),
    ("{bad}/number.yaml", "number.yaml: expected sections of settings"),
    ("{bad}/empty.yaml", "empty.yaml: expected sections of settings"),
    ("{bad}/binary.yaml", "binary.yaml: 'utf-8' codec can't decode"),
    ("{bad}/mapping.yaml", "mapping.yaml, line 1: found unhashable key"),
    ("{bad}/date.yaml", "date.yaml: month must be in 1..12"),
    ("run.seed=2024-13-45", "run.seed must be of kind int, like 0; found '2024-13-45'"),
    ("{bad}/twice.yaml", "the key 'model' stands twice"),
    ("modle.width=3", "section 'modle' is unknown; did you mean 'model'"),
    ("model.widht=3", "key of section model 'widht' is unknown; did you mean 'width'"),
    ("model.width=wide", "model.width must be of kind int"),
    # Sizes of the model
    ("'model.cluster=[2, 4, 3]'", "cluster [2, 4, 3] does not divide [4, 8, 8] along the width"),
    ("'model.cluster=[0, 4, 4]'", "along the time"),
    ("model.order=snake", "order 'snake' is unknown"),
    ("model.mask_ratio=1", "mask_ratio 1.0 is out of range"),
    ("model.mask_ratio=-0.5", "model.mask_ratio=-0.5: it must be 0 or greater"),
    ("model.mask_ratio=1.5", "mask_ratio 1.5 is out of range"),
    ("model.heads=3", "heads 3 does not divide the width 32"),
    ("model.decoder_heads=5", "decoder_heads 5 does not divide the width 24"),
    ("model.frames=7", "along the time: 7 is not a multiple of 2"),
    ("model.frames=0", "along the time: 0 is not a multiple of 2"),
    # Numbers out of range
    ("pretrain.epochs=0", "pretrain.epochs=0: it must be greater than 0"),
    ("pretrain.batch=0", "pretrain.batch=0: it must be greater than 0"),
    ("pretrain.batch=32", "pretrain.batch=32 is more than the 24 videos"),
    ("pretrain.lr=-1", "pretrain.lr=-1.0: it must be greater than 0"),
    ("pretrain.lr=.nan", "pretrain.lr=nan: it must be greater than 0"),
    ("pretrain.min_lr=.nan", "pretrain.min_lr=nan: it must be 0 or greater"),
    ("pretrain.lr=1e400", "pretrain.lr=inf: it must be 0 or greater, and finite"),
    ("data.stride=0", "data.stride=0: it must be greater than 0"),
    ("pretrain.betas=[0.9,1]", "pretrain.betas=[0.9, 1.0]: it must be less than 1"),
    ("finetune.rand_augment=[4,-7.0]", "rand_augment=[4, -7.0]: it must be 0 or greater"),
    ("finetune.crop_area=[1.0,0.5]", "crop_area=[1.0, 0.5]: it must be two shares of the frame"),
    ("pretrain.clips_per_video=0", "pretrain.clips_per_video=0: it must be greater than 0"),
    ("run.workers=-1", "run.workers=-1: it must be 0 or greater"),
    ("run.max_batch=-1", "run.max_batch=-1: it must be 0 or greater"),
    # Annotations
    ("data.train=", "data.train is empty: name a list"),
    ("data.train=nowhere.txt", "nowhere.txt: there is no such annotation file; look at data.root"),
    ("data.train={bad}/empty.txt", "empty.txt: the annotation file is empty"),
    ("data.train={bad}/binary.txt", "binary.txt: this is not a text file"),
    ("data.train={bad}/gone.txt", "none of its 1 videos is under"),
    ("data.train={bad}/words.txt", "words.txt:1: expected `path label`"),
    ("data.train={bad}/mixed.txt", "mixed.txt:2: expected `path label`"),
    ("data.train={bad}/one.txt", "pretrain.batch=8 is more than the 1 videos"),
    ("data.train={bad}/columns.csv", "the column time_end, time_start is missing"),
    ("data.train={bad}/unknown.json", "the class 'Eating something' is not among"),
    ("data.train={bad}/doubled/train.txt", "classes.txt: the class 'wave' stands twice"),
    ("data.root={bad}/nowhere", "nowhere: there is no such folder"),
    # The run of another configuration, and the machine
    ("run.output={finished} pretrain.lr=1.0", "pretrain.lr is 1.0, was 0.006"),
    ("run.output={finished} data.stride=2", "data.stride is 2, was 1"),
    ("run.output={finished} model.mask_ratio=0.5", "model.mask_ratio is 0.5, was 0.8"),
    ("run.output={finished} run.seed=1", "run.seed is 1, was 0"),
    ("run.output={finished} data.train={bad}/fewer.txt", "videos is 8, was 24"),
    ("run.output={finished} data.train={bad}/reversed.txt data.root={toy}",
     "data.train lists other videos, or in another order"),
    ("pretrain.warmup_epochs=3", "pretrain.warmup_epochs=3 is more than pretrain.epochs=2"),
    ("run.output={bad}/other", "last.pt is not a checkpoint that a run can resume from"),
    ("run.device=tpu", "run.device 'tpu' is unknown"),
    ("run.precision=fp16", "run.precision=fp16 needs a GPU"),
]
FINETUNE = [
    # Weights to start from
    ("finetune.init=nowhere.pt", "nowhere.pt: there is no such checkpoint"),
    ("finetune.init=", "runs/toy/pretrain/last.pt: there is no such checkpoint"),
    ("toy linear finetune.init=", "runs/toy/pretrain/last.pt: there is no such checkpoint"),
    ("finetune.init={bad}/empty.pt", "empty.pt: this is not a readable checkpoint"),
    ("finetune.init={bad}/text.pt", "text.pt: this is not a readable checkpoint: it is of another"),
    ("finetune.init={bad}/cut.pt", "cut.pt: this is not a readable checkpoint"),
    ("finetune.init={bad}/code.pt", "code.pt: this is not a readable checkpoint"),
    ("finetune.init={bad}/vit.pt", "vit.pt does not fit this model"),
    ("finetune.init={finished}/last.pt 'model.pretrained_clip=[4, 32]'",
     "model.pretrained_clip is [4, 32], but"),
    ("finetune.init={finished}/last.pt model.width=64", "model.width is 64, the checkpoint's 32"),
    ("finetune.init={finished}/last.pt finetune.test_only=true",
     "last.pt holds no classifier; set finetune.init"),
    ("run.output={finished}", "stage is 'finetune', was 'pretrain'"),
    # Settings and labels
    ("finetune.test_crops=0", "finetune.test_crops=0: it must be greater than 0"),
    ("finetune.probe=cubic", "finetune.probe 'cubic' is unknown"),
    ("finetune.sampling=sparse", "finetune.sampling 'sparse' is unknown"),
    ("data.val=", "data.val=: fine-tuning needs a list with labels"),
    ("data.train={bad}/bare.txt", "bare.txt: fine-tuning needs a list with labels"),
    ("data.val={bad}/high.txt", "has the label 9, but there are 8 classes"),
    ("data.train={bad}/fewer.txt", "fewer.txt: labels must count from 0"),
    ("data.train={bad}/broken.txt", "broken.txt: all videos are of one class, '0'"),
    ("data.test={bad}/high.txt", "has the label 9, but there are 8 classes"),
]
# What is found in the first step
SCRIPTS = [
    ("train_pretrain.py", "data.train={bad}/broken.txt",
     "10 videos in a row are unreadable, for example: {bad}/broken.mp4"),
    ("train_finetune.py", "finetune.init=scratch run.max_batch=1 finetune.mixup=0.8",
     "mix different videos, but a process takes one at a time"),
]


@pytest.fixture
def nothing_changes(tmp_path, finished):
    """A test must leave its own folder empty and the finished run as it was."""
    before = snapshot(finished)
    yield
    assert not list(tmp_path.iterdir())
    assert snapshot(finished) == before


@pytest.mark.parametrize("main, arguments, culprit", [
    *((train_pretrain.main, *row) for row in PRETRAIN),
    *((train_finetune.main, *row) for row in FINETUNE)])
def test_bad_input_is_refused(
        main, arguments, culprit, toy, bad, finished, tmp_path, monkeypatch, nothing_changes):
    """In this process, since starting one takes longer. Python prints what SystemExit says."""
    monkeypatch.chdir(tmp_path)
    words = shlex.split(arguments.format(bad=bad, finished=finished, toy=toy))
    usual = [*TINY, *toy_lists(toy), "run.output=run", "finetune.init=scratch"]
    monkeypatch.setattr(sys, "argv", ["", *usual, *words])
    with pytest.raises(SystemExit) as refusal:
        main()
    sentence, = refusal.value.code.splitlines()
    assert culprit in sentence


def test_a_fork_with_another_model_does_not_resume_the_run(
        toy, finished, tmp_path, monkeypatch, nothing_changes):
    class Fork(train_pretrain.ARVideo):
        pass

    monkeypatch.setattr(train_pretrain, "ARVideo", Fork)
    settings = [*TINY, *toy_lists(toy), f"run.output={finished}"]
    with pytest.raises(UserError, match="model_class is 'Fork', was 'ARVideo'"):
        train_pretrain.pretrain(train_pretrain.load_config(settings, "pretrain"))


@pytest.mark.slow
@pytest.mark.parametrize("script, arguments, culprit", SCRIPTS)
def test_a_fault_of_the_first_step_ends_the_script(
        script, arguments, culprit, toy, bad, tmp_path_factory):
    output = tmp_path_factory.mktemp("printed") / "run"
    words = shlex.split(arguments.format(bad=bad))
    _, err = Script(script, *toy_lists(toy), *words, output=output).finish(status=1)
    assert culprit.format(bad=bad) in err.splitlines()[-1]
    assert "Traceback" not in err
    assert not (output / "last.pt").exists()


@pytest.mark.slow
def test_a_command_with_bad_input_ends_with_status_1(toy, tmp_path, nothing_changes):
    arguments = [*TINY, *toy_lists(toy), "run.output=run", "toyy"]
    process = subprocess.run(
        [sys.executable, ROOT / "train_pretrain.py", *arguments], cwd=tmp_path,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, timeout=120)
    assert process.returncode == 1
    assert "preset 'toyy' is unknown" in process.stderr.splitlines()[-1]
    assert "Traceback" not in process.stderr


@pytest.mark.parametrize("mistake, culprit", [
    ("\tbatch: 1024", r"found character '\\t'"),
    ("  batch: 1024\n  batch: 512", "the key 'batch' stands twice")])
def test_a_mistake_in_the_configuration_file_is_named(mistake, culprit, tmp_path, monkeypatch):
    changed = tmp_path / "config.yaml"
    text = train_pretrain.CONFIG.read_text()
    changed.write_text(text.replace("  batch: 1024", mistake))
    monkeypatch.setattr(train_pretrain, "CONFIG", changed)
    with pytest.raises(UserError, match=rf"config.yaml, line \d+: {culprit}"):
        train_pretrain.load_config([], "pretrain")
