"""What all tests share: a tiny configuration, a tiny toy set, and scripts started as processes."""

import atexit
import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import data

# A model and a schedule that take a second
TINY = [
    "model.width=32", "model.depth=2", "model.heads=2",
    "model.decoder_width=24", "model.decoder_depth=1", "model.decoder_heads=2",
    "pretrain.batch=8", "pretrain.epochs=2", "pretrain.warmup_epochs=0",
    "finetune.batch=8", "finetune.epochs=2", "finetune.warmup_epochs=0",
    "run.workers=1", "run.device=cpu"]

torch.set_num_threads(1)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: starts processes or trains for many seconds")


@pytest.fixture(scope="session")
def toy(tmp_path_factory):
    """The folder of a toy set of 24 training and 13 validation videos. Nobody changes it."""
    root = tmp_path_factory.mktemp("toy") / "set"
    data.make_toy_set(root, {"train": 24, "val": 13})
    return root


def toy_lists(toy):
    """The settings that train on this toy set."""
    return [f"data.train={toy / 'train.txt'}", f"data.val={toy / 'val.txt'}"]


# Starting Python and importing torch takes five seconds. So a server imports everything once and
# does nothing else, and scripts run in processes that are forked from it. They are real processes,
# with workers of their own, and can be killed.

USUAL_METHOD = multiprocessing.get_start_method()
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["train_finetune"])
os.environ["PYTHONPATH"] = str(ROOT)        # for the server, and for real commands
os.environ["OMP_NUM_THREADS"] = "1"


def run_main(script, arguments, folder, prefix, start_method):
    """In the new process: what `python script arguments` does in `folder`."""
    for stream, descriptor in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{prefix}.{stream}", os.O_WRONLY | os.O_CREAT), descriptor)
    multiprocessing.set_start_method(start_method, force=True)      # for its workers
    os.chdir(folder)
    sys.argv = [script, *arguments]
    torch.set_num_threads(1)
    try:
        importlib.import_module(script.removesuffix(".py")).main()
    finally:
        atexit._run_exitfuncs()     # before Python 3.13, multiprocessing leaves them out


# One restart, for a test that kills a rank
ONE_MACHINE = ["--standalone", "--max-restarts=1"]


class Script:
    """A script of ours, started as a process of its own or, with `processes`, by torchrun.

    `machines` are torchrun's arguments that say which machines take part.
    """

    count = 0

    def __init__(self, script, *arguments, output, processes=0, machines=ONE_MACHINE):
        Script.count += 1
        self.prefix = f"{output}-{Script.count}"        # of the files that hold what it prints
        self.output = Path(output)
        arguments = [*TINY, *map(str, arguments), f"run.output={output}"]
        if not processes:
            self.process = SERVER.Process(
                target=run_main,
                args=(script, arguments, str(ROOT), self.prefix, USUAL_METHOD))
            self.process.start()
        else:
            with open(f"{self.prefix}.out", "w") as out, open(f"{self.prefix}.err", "w") as err:
                self.process = subprocess.Popen(
                    [sys.executable, "-m", "torch.distributed.run", *machines,
                     f"--nproc_per_node={processes}", ROOT / script, *arguments],
                    cwd=ROOT, stdout=out, stderr=err)
        self.pid = self.process.pid

    def is_running(self):
        if isinstance(self.process, subprocess.Popen):
            return self.process.poll() is None
        return self.process.is_alive()

    def send_signal(self, number):
        os.kill(self.pid, number)

    def kill(self):
        """As the system ends a process. Returns when it is gone."""
        self.send_signal(signal.SIGKILL)
        self.finish(status=None)

    def printed(self, stream):
        return Path(f"{self.prefix}.{stream}").read_text()

    def finish(self, status=0, timeout=120):
        """Wait for its end: (what it printed on stdout, on stderr). `status` None: any."""
        deadline = time.monotonic() + timeout
        while self.is_running():
            assert time.monotonic() < deadline, self.printed("err")
            time.sleep(0.005)
        if isinstance(self.process, subprocess.Popen):
            ended_with = self.process.returncode
        else:
            ended_with = self.process.exitcode
        assert status is None or ended_with == status, self.printed("err")
        return self.printed("out"), self.printed("err")

    def steps_logged(self):
        """Lines in its log: one for each step and, in fine-tuning, one for each validation."""
        log = self.output / "log.jsonl"
        return log.read_text().count("\n") if log.exists() else 0

    def wait_for_steps(self, count):
        """Until so many lines are in its log. It must not end before."""
        while self.steps_logged() < count:
            assert self.is_running(), self.printed("err")
            time.sleep(0.002)


def pretrain(output, *arguments, processes=0, status=0):
    """Run train_pretrain.py to its end: (checkpoint, what it printed on stdout, on stderr)."""
    script = Script("train_pretrain.py", *arguments, output=output, processes=processes)
    return load_last(output, *script.finish(status))


def finetune(output, *arguments, processes=0, status=0):
    """Run train_finetune.py to its end: (checkpoint, what it printed on stdout, on stderr)."""
    script = Script("train_finetune.py", *arguments, output=output, processes=processes)
    return load_last(output, *script.finish(status))


def load_last(output, out, err):
    path = Path(output, "last.pt")
    checkpoint = torch.load(path, weights_only=True) if path.exists() else None
    return checkpoint, out, err


def assert_equal(a, b):
    """Bit for bit."""
    torch.testing.assert_close(a, b, rtol=0, atol=0)
