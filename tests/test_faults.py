"""What runs of weeks meet: kills, full disks, damaged checkpoints, mistyped input. Real processes throughout."""

import json
import os
import random
import resource
import shlex
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

ROOT = Path(__file__).parent.parent
TINY = ["model.width=32", "model.depth=2", "model.heads=2", "model.decoder_width=24", "model.decoder_depth=1",
        "model.decoder_heads=2", "pretrain.batch=8", "pretrain.epochs=6", "pretrain.warmup_epochs=0", "finetune.batch=8",
        "finetune.epochs=1", "run.workers=1", "run.device=cpu"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """24 training videos, one of them unreadable, which is 4 %: few enough to go on."""
    root = tmp_path_factory.mktemp("toy") / "set"
    data.make_toy_set(root, {"train": 24, "val": 8})
    (root / "train" / "00023.mp4").write_text("hello")
    return root


def start(toy, output, *arguments, processes=0, **options):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--max-restarts=1"]
    return subprocess.Popen(
        [sys.executable, *(launcher if processes else []), "train_pretrain.py", *TINY, f"data.train={toy}/train.txt",
         f"data.val={toy}/val.txt", f"run.output={output}", *arguments],
        cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


def finish(process, status=0):
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    return out, err


def steps_logged(output):
    path = Path(output, "log.jsonl")
    return path.read_text().count("\n") if path.exists() else 0


def outcome(output):
    """Everything that must not depend on interruptions."""
    checkpoint = torch.load(Path(output, "last.pt"), weights_only=True)
    losses = [json.loads(line)["loss"] for line in Path(output, "log.jsonl").read_text().splitlines()]
    counts = torch.tensor([checkpoint["tried"], checkpoint["unreadable"]])
    return [checkpoint["model"], checkpoint["optimizer"]["state"], torch.tensor(losses), counts]


@pytest.fixture(scope="module")
def undisturbed(toy, tmp_path_factory):
    """The outcome of 18 steps in one process and in two."""
    folder = tmp_path_factory.mktemp("undisturbed")
    for processes in (0, 2):
        finish(start(toy, folder / str(processes), processes=processes))
    return {processes: outcome(folder / str(processes)) for processes in (0, 2)}


def assert_equal(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0)


# Kills


def test_killed_at_random_moments_and_continued_bit_for_bit(toy, undisturbed, tmp_path):
    """One of the kills waits for a checkpoint to be half-written."""
    chance = random.Random(0)
    for attempt in range(4):
        process, reached = start(toy, tmp_path, "run.save_minutes=0", f"run.workers={attempt % 3}"), steps_logged(tmp_path)
        goal = reached + chance.randint(2, 4)
        while process.poll() is None and steps_logged(tmp_path) != goal:
            time.sleep(0.001)
        while attempt == 1 and process.poll() is None and not (tmp_path / "last.pt.tmp").exists():
            pass
        time.sleep(chance.random() * 0.02 if attempt != 1 else 0)
        process.kill()
        process.communicate()
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 5, "lo\0\0\n')                                 # torn by a power cut
    finish(start(toy, tmp_path))
    assert_equal(outcome(tmp_path), undisturbed[0])
    assert outcome(tmp_path)[3].tolist() == [18 * 8 + 6, 6]                 # the unreadable video was met once an epoch


def test_a_killed_rank_is_restarted_by_torchrun(toy, undisturbed, tmp_path):
    process = start(toy, tmp_path, "run.save_minutes=0", processes=2)
    while steps_logged(tmp_path) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.005)
    ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    out, err = finish(process)
    assert "going on from step" in out
    assert_equal(outcome(tmp_path), undisturbed[2])


def test_one_process_goes_on_with_the_run_of_two(toy, undisturbed, tmp_path):
    finish(start(toy, tmp_path, "pretrain.epochs=6", processes=2))
    (tmp_path / "previous.pt").replace(tmp_path / "last.pt")                # after 15 of 18 steps
    out, _ = finish(start(toy, tmp_path))
    assert "going on from step 15" in out
    torch.testing.assert_close(outcome(tmp_path)[0], undisturbed[0][0], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("number, status", [(signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 1)])
def test_a_second_interrupt_kills_but_a_second_sigterm_does_not(toy, tmp_path, number, status):
    """Under torchrun a process that was sent SIGTERM gets another from torchrun."""
    process = start(toy, tmp_path, "pretrain.epochs=500", "pretrain.batch=12", "run.max_batch=1", "model.depth=12")
    while steps_logged(tmp_path) < 1:
        time.sleep(0.002)
    for _ in range(2):                                                      # in the second of an epoch's two steps
        process.send_signal(number)
        time.sleep(0.1)
    _, err = process.communicate(timeout=30)
    assert process.returncode == status, err
    assert (tmp_path / "last.pt").exists() == ("stopped by a signal after step 2" in err) == (status == 1)


def test_one_ranks_failure_ends_all_with_its_message(toy, tmp_path):
    """The second rank alone meets unreadable videos: those at odd places of every step."""
    broken = tmp_path / "broken.mp4"
    broken.write_text("hello")
    order = [i for _, i in data.training_order(24, 8, 0, 3, 0, 1, 2)]
    lines = [f"{toy}/train/{i:05d}.mp4" for i in [*range(23), 0]]
    for i in order[:3]:
        lines[i] = str(broken)
    (tmp_path / "list.txt").write_text("\n".join(lines))
    started = time.monotonic()
    process = start(toy, tmp_path / "run", f"data.train={tmp_path / 'list.txt'}", "pretrain.epochs=100", processes=2)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1 and time.monotonic() - started < 60
    assert "videos tried were unreadable, more than data.max_unreadable" in err and "broken.mp4" in err


def test_a_worker_killed_by_the_system_is_explained(toy, tmp_path):
    process = start(toy, tmp_path, "pretrain.epochs=500")
    while steps_logged(tmp_path) < 2:
        time.sleep(0.005)
    worker = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[-1]
    os.kill(int(worker), signal.SIGKILL)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "set run.workers lower" in err and "Traceback" not in err


# Disks and checkpoints


def test_a_full_disk_is_explained_and_keeps_the_last_checkpoint(toy, undisturbed, tmp_path):
    finish(start(toy, tmp_path, "pretrain.epochs=1"))
    size = (tmp_path / "last.pt").stat().st_size
    kept = (tmp_path / "last.pt").read_bytes()
    process = start(toy, tmp_path, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2)))
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1 and "last.pt could not be written" in err and "Traceback" not in err
    assert (tmp_path / "last.pt").read_bytes() == kept and not (tmp_path / "last.pt.tmp").exists()


def test_a_truncated_checkpoint_falls_back_to_the_one_before(toy, undisturbed, tmp_path):
    finish(start(toy, tmp_path))
    content = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(content[:len(content) // 2])
    out, err = finish(start(toy, tmp_path))
    assert "last.pt: this is not a readable checkpoint" in err and "going on from" in err and "previous.pt" in err
    assert "going on from step 15" in out
    assert_equal(outcome(tmp_path), undisturbed[0])


def test_a_longer_schedule_other_paths_and_workers_may_go_on(toy, tmp_path):
    finish(start(toy, tmp_path / "run", "pretrain.epochs=1"))
    (tmp_path / "moved").symlink_to(toy)
    out, _ = finish(start(tmp_path / "moved", tmp_path / "run", "pretrain.epochs=2", "run.workers=0", "run.save_minutes=1"))
    assert "going on from step 3; the schedule so far was that of 1 epochs" in out and steps_logged(tmp_path / "run") == 6
    _, err = finish(start(toy, tmp_path / "run", "pretrain.epochs=1"), status=1)
    assert "run holds a run of 6 steps, longer than pretrain.epochs=1, which are 3: choose another run.output" in err


# Bad input: each ends with one sentence that names the culprit, and changes nothing


@pytest.fixture(scope="module")
def finished(toy, tmp_path_factory):
    """A finished pretraining run of one epoch, which nobody may change."""
    output = tmp_path_factory.mktemp("finished") / "run"
    finish(start(toy, output, "pretrain.epochs=1"))
    return output


@pytest.fixture(scope="module")
def bad(tmp_path_factory, toy, finished):
    """A folder of bad files, named below as {bad}/..."""
    bad = tmp_path_factory.mktemp("bad")
    for name, text in {
        "empty.txt": "", "words.txt": "00001.mp4 cat\n", "gone.txt": "nothing.mp4 0\n", "high.txt": "00001.mp4 9\n",
        "bare.txt": "00001.mp4\n", "mixed.txt": "00001.mp4 1\n00002.mp4\n", "one.txt": "00001.mp4 1\n", "fewer.txt": "00001.mp4 1\n" * 8, "broken.txt": "broken.mp4 0\n" * 8,
        "columns.csv": "label,youtube_id\nx,y\n", "unknown.json": '[{"id": "00001", "template": "Eating [something]"}]',
        "labels.json": '{"Holding something": "0"}', "text.pt": "hello", "empty.pt": "", "broken.mp4": "hello",
    }.items():
        (bad / name).write_text(text)
    for name in ("00001.mp4", "00002.mp4"):
        (bad / name).write_bytes((toy / "train" / name).read_bytes())
    (bad / "fork.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\nimport train_pretrain\n"
                                 "class Fork(train_pretrain.ARVideo):\n    pass\n"
                                 "train_pretrain.ARVideo = Fork\ntrain_pretrain.main()\n")
    (bad / "binary.txt").write_bytes(bytes(range(256)))
    content = (finished / "last.pt").read_bytes()
    (bad / "cut.pt").write_bytes(content[:len(content) // 3])
    torch.save({"model": Malicious()}, bad / "code.pt")
    return bad


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


PRETRAIN = [
    ("toyy", "preset 'toyy' is unknown; did you mean 'toy'"),
    ("modle.width=3", "section 'modle' is unknown; did you mean 'model'"),
    ("model.widht=3", "key of section model 'widht' is unknown; did you mean 'width'"),
    ("model.width=wide", "model.width must be of kind int"),
    ("'model.cluster=[2, 4, 3]'", "cluster [2, 4, 3] does not divide [4, 8, 8] along the width"),
    ("'model.cluster=[0, 4, 4]'", "along the frames"),
    ("model.order=snake", "order 'snake' is unknown"),
    ("model.mask_ratio=1", "mask_ratio 1.0 is out of range"),
    ("model.mask_ratio=-0.5", "model.mask_ratio=-0.5: it must be greater than 0, or 0"),
    ("model.mask_ratio=1.5", "mask_ratio 1.5 is out of range"),
    ("model.heads=3", "heads 3 does not divide the width 32"),
    ("model.decoder_heads=5", "decoder_heads 5 does not divide the width 24"),
    ("model.frames=7", "along the frames: 7 is not a multiple of 2"),
    ("model.frames=0", "frames"),
    ("pretrain.epochs=0", "pretrain.epochs=0: it must be greater than 0"),
    ("pretrain.batch=0", "pretrain.batch=0"),
    ("pretrain.batch=32", "pretrain.batch=32 is more than the 24 videos"),
    ("pretrain.lr=-1", "pretrain.lr=-1.0: it must be greater than 0"),
    ("pretrain.lr=.nan", "pretrain.lr=nan: it must be greater than 0"),
    ("data.stride=0", "data.stride=0: it must be greater than 0"),
    ("pretrain.betas=[0.9,1]", "pretrain.betas=[0.9, 1.0]: it must be less than 1"),
    ("finetune.rand_augment=[4,-7.0]", "finetune.rand_augment=[4, -7.0]: it must be greater than 0, or 0"),
    ("finetune.crop_area=[1.0,0.5]", "finetune.crop_area=[1.0, 0.5]: it must be two shares of the frame"),
    ("pretrain.clips_per_video=0", "pretrain.clips_per_video=0"),
    ("data.train=nowhere.txt", "nowhere.txt: there is no such annotation file; look at data.root"),
    ("data.train={bad}/empty.txt", "empty.txt: the annotation file is empty"),
    ("data.train={bad}/binary.txt", "binary.txt: this is not a text file"),
    ("data.train={bad}/gone.txt", "none of its 1 videos is under"),
    ("data.train={bad}/words.txt", "words.txt:1: the label is not a number: 00001.mp4 cat"),
    ("data.train={bad}/mixed.txt", "mixed.txt:2: expected `path label`"),
    ("data.train={bad}/one.txt", "pretrain.batch=8 is more than the 1 videos"),
    ("data.train={bad}/columns.csv", "the column time_end, time_start is missing"),
    ("data.train={bad}/unknown.json", "the class 'Eating something' is not among"),
    ("data.root={bad}/nowhere", "nowhere: there is no such folder"),
    ("run.output={finished} pretrain.lr=1.0", "pretrain.lr is 1.0, was 0.006"),
    ("run.output={finished} data.train={bad}/fewer.txt pretrain.batch=8", "videos is 8, was 24"),
    ("run.output={finished} run.resume=false", "holds a run: choose another run.output"),
    ("run.device=tpu", "run.device 'tpu' is unknown"),
    ("run.precision=fp16", "run.precision=fp16 needs a GPU"),
    ("run.workers=-1", "run.workers=-1: it must be greater than 0, or 0"),
    ("run.max_batch=-1", "run.max_batch=-1: it must be greater than 0, or 0"),
    ("model.mlp_ratio=1.0e15", "out of memory"),
]
FINETUNE = [
    ("finetune.init=nowhere.pt", "No such file or directory: 'nowhere.pt'"),
    ("finetune.init={bad}/empty.pt", "empty.pt: this is not a readable checkpoint"),
    ("finetune.init={bad}/text.pt", "text.pt: this is not a readable checkpoint"),
    ("finetune.init={bad}/cut.pt", "cut.pt: this is not a readable checkpoint"),
    ("finetune.init={bad}/code.pt", "code.pt: this is not a readable checkpoint"),
    ("finetune.init={finished}/last.pt model.frames=4", "model.frames is 4, the checkpoint's 8"),
    ("finetune.init={finished}/last.pt model.width=64", "model.width is 64, the checkpoint's 32"),
    ("run.output={finished}", "stage is 'finetune', was 'pretrain'"),
    ("finetune.init={finished}/last.pt finetune.test_only=true", "last.pt holds no classifier of these classes"),
    ("finetune.test_crops=0", "finetune.test_crops=0: it must be greater than 0"),
    ("finetune.probe=cubic", "finetune.probe 'cubic' is unknown"),
    ("finetune.sampling=sparse", "finetune.sampling 'sparse' is unknown"),
    ("data.val=", "data.val= has no labels"),
    ("data.train={bad}/bare.txt", "has no labels"),
    ("data.val={bad}/high.txt", "has the label 9, but there are 8 classes"),
    ("data.train={bad}/fewer.txt", "fewer.txt: no video has the label 0"),
]
COMMANDS = [
    ("python {root}/train_pretrain.py {usual} toyy", "preset 'toyy' is unknown; did you mean 'toy'"),
    ("python {root}/train_pretrain.py {usual} data.train={bad}/broken.txt", "broken.mp4"),
    ("python {root}/train_pretrain.py {usual} run.output={bad}/text.pt/run", "text.pt"),
    ("python {root}/train_finetune.py {usual} finetune.init=scratch run.max_batch=1 finetune.mixup=0.8",
     "mix different videos, but a process takes one at a time"),
    ("python {bad}/fork.py {usual} run.output={finished}", "model_class is 'Fork', was 'ARVideo'"),
    ("python -m torch.distributed.run --standalone --nproc_per_node=2 {root}/train_pretrain.py {usual} pretrain.batch=7",
     "pretrain.batch=7 cannot be shared evenly by 2 processes: try pretrain.batch=6"),
    ("env RANK=0 WORLD_SIZE=1 MASTER_ADDR=127.0.0.1 MASTER_PORT={port} python {root}/train_pretrain.py {usual}",
     "is the port in use? Give torchrun another --master-port"),
]


@pytest.fixture
def usual(toy):
    return [*TINY, f"data.train={toy}/train.txt", f"data.val={toy}/val.txt", "run.output=run"]


def snapshot(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("main, arguments, culprit", [
    *((train_pretrain.main, *row) for row in PRETRAIN), *((train_finetune.main, *row) for row in FINETUNE)])
def test_bad_input_is_refused(main, arguments, culprit, usual, bad, finished, tmp_path, monkeypatch):
    """Called in this process: starting Python takes longer than all the rest. What SystemExit says, Python prints."""
    before = snapshot(finished)
    monkeypatch.chdir(tmp_path)
    typed = shlex.split(arguments.format(bad=bad, finished=finished))
    monkeypatch.setattr(sys, "argv", ["", *usual, "finetune.init=scratch", *typed])
    with pytest.raises(SystemExit) as refusal:
        main()
    sentence, = refusal.value.code.splitlines()
    assert culprit in sentence and not list(tmp_path.iterdir()) and snapshot(finished) == before


@pytest.mark.parametrize("command, culprit", COMMANDS)
def test_a_command_with_bad_input_ends_with_status_1(command, culprit, usual, bad, finished, tmp_path):
    before = snapshot(finished)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = shlex.split(command.format(root=ROOT, usual=shlex.join(usual), bad=bad, finished=finished, port=port))
        process = subprocess.run([sys.executable if word == "python" else word for word in words], cwd=tmp_path, text=True,
                                 stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
    err = process.stderr
    assert process.returncode == 1 and culprit in err and not list(tmp_path.iterdir()) and snapshot(finished) == before, err
    if "torch.distributed" not in command:                                  # torchrun adds its own report
        assert "Traceback" not in err and culprit in err.strip().splitlines()[-1], err


@pytest.mark.parametrize("mistake, culprit", [("  batch: 1024\n  batch: 512", "the key 'batch' stands twice"),
                                              ("\tbatch: 1024", r"found character '\\t'")])
def test_a_mistake_in_the_configuration_file_is_named(mistake, culprit, tmp_path, monkeypatch):
    changed = tmp_path / "config.yaml"
    changed.write_text(train_pretrain.CONFIG.read_text().replace("  batch: 1024", mistake))
    monkeypatch.setattr(train_pretrain, "CONFIG", changed)
    with pytest.raises(SystemExit, match=rf"config.yaml, line \d+: {culprit}"):
        train_pretrain.load_config([], "pretrain")


def test_out_of_memory_proposes_more_accumulation():
    with pytest.raises(SystemExit, match=r"out of memory \(CUDA out of memory.*\): set run.max_batch below"):
        with train_pretrain.one_sentence():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
