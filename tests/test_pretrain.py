"""Configuration, processes started as a user would, and what they leave on disk."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

import data
import train_pretrain
from arvideo import ARVideo
from train_pretrain import load_config

ROOT = Path(__file__).parent.parent
TINY = ["model.width=32", "model.depth=2", "model.heads=2", "model.decoder_width=24", "model.decoder_depth=1",
        "model.decoder_heads=2", "pretrain.batch=8", "pretrain.epochs=2", "pretrain.warmup_epochs=0",
        "pretrain.keep_epochs=1", "run.workers=1", "run.device=cpu"]


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    root = tmp_path_factory.mktemp("toy") / "set"
    data.make_toy_set(root, {"train": 24, "val": 8})
    return [f"data.root={root}", f"data.train={root / 'train.txt'}", f"data.val={root / 'val.txt'}"]


def start(arguments, processes=0, **options):
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.Popen([*launcher, "train_pretrain.py", *map(str, arguments)], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)


def run(arguments, processes=0):
    process = start(arguments, processes)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def train(output, *arguments, processes=0):
    code, out, err = run([*TINY, *arguments, f"run.output={output}"], processes)
    assert code == 0, err
    return torch.load(Path(output, "last.pt"), weights_only=True), out


def log_of(output, *keys):
    lines = [json.loads(line) for line in Path(output, "log.jsonl").read_text().splitlines()]
    return [[line[key] for key in keys] for line in lines]


@pytest.fixture(scope="module")
def reference(toy, tmp_path_factory):
    """An undisturbed run of 6 steps: (folder, checkpoint, what it printed)."""
    output = tmp_path_factory.mktemp("runs") / "reference"
    return output, *train(output, *toy)


# Configuration


def test_presets_and_overrides():
    config = load_config(["ssv2", "large", "pretrain.lr=1e-3", "data.root=a = b: c", "model.cluster=[4, 7, 7]"], "pretrain")
    assert config["data"]["stride"] == 2 and config["finetune"]["flip"] is False
    assert config["model"]["width"] == 1024 and config["model"]["cluster"] == [4, 7, 7]
    assert config["pretrain"]["lr"] == 1e-3 and config["data"]["root"] == "a = b: c"
    assert config["run"]["output"] == "runs/ssv2-large/pretrain"
    assert load_config([], "pretrain") == load_config(["toy"], "pretrain")


def test_the_model_section_is_the_papers_model():
    paper = load_config(["k400"], "pretrain")["model"]
    with torch.device("meta"):
        here, there = ARVideo(**paper), ARVideo()
    assert str(here) == str(there) and here.decoder_mask.shape == there.decoder_mask.shape


@pytest.mark.parametrize("arguments, culprit", [
    (["ssv3"], "preset 'ssv3' is unknown; did you mean 'ssv2'"),
    (["pretrian.lr=1"], "section 'pretrian' is unknown; did you mean 'pretrain'"),
    (["pretrain.batchsize=1"], "key of section pretrain 'batchsize' is unknown; did you mean 'batch'"),
    (["pretrain.batch=many"], "pretrain.batch must be of kind int, like 32; found 'many'"),
    (["pretrain.batch=1.5"], "pretrain.batch must be of kind int"),
    (["pretrain.lr=fast"], "pretrain.lr must be of kind float"),
    (["pretrain.flip=1"], "pretrain.flip must be of kind bool"),
    (["model.cube=[2, 16]"], "model.cube must be a list of 3"),
    (["model.cube=[2, 16, x]"], "model.cube must be of kind int"),
    (["model.cube=[2, 16"], "model.cube must be a list of 3"),
    (["batch=3"], "'batch=3' is not of the form section.key=value"),
])
def test_mistyped_arguments_name_what_was_meant(arguments, culprit):
    with pytest.raises(SystemExit, match=culprit.replace("[", r"\[")):
        load_config(arguments, "pretrain")


def test_help_and_show_print_and_exit(capsys):
    for arguments in (["--help"], ["k400", "run.seed=3", "--show"]):
        with pytest.raises(SystemExit) as ended:
            load_config(arguments, "pretrain")
        assert ended.value.code == 0
    printed = capsys.readouterr().out
    assert "presets: toy, k400, ssv2" in printed and "pretrain: epochs, batch" in printed
    shown = yaml.safe_load(printed[printed.index("\ndata: {"):])
    assert shown == load_config(["k400", "run.seed=3"], "pretrain")


def test_presets_say_only_what_differs():
    base = train_pretrain.read_config_file()
    for preset, sections in base["presets"].items():
        for section, changes in sections.items():
            same = [key for key, value in changes.items() if base[section][key] == value]
            assert not same, f"{preset}: {section}.{', '.join(same)}"


def test_every_key_of_the_configuration_is_read():
    """No flag that nobody reads. The keys of `model` are ARVideo's arguments, checked above."""
    source = "".join((ROOT / name).read_text() for name in ("train_pretrain.py", "train_finetune.py"))
    config = load_config([], "pretrain")
    for section in ("data", "pretrain", "finetune", "run"):
        for key in config[section]:
            assert f'"{key}"' in source or f"'{key}'" in source, f"nobody reads {section}.{key}"


# Schedule, batch, groups


def test_learning_rate_is_linear_then_a_cosine():
    rates = [train_pretrain.learning_rate(step, 100, 10, 2.0, 0.5) for step in range(101)]
    assert rates[0] == 0 and rates[5] == 1.0 and rates[10] == 2.0
    assert rates[55] == pytest.approx(1.25) and rates[100] == pytest.approx(0.5)
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))


def test_global_batch_is_shared():
    def split(batch, world, limit):
        return train_pretrain.split_batch(batch, train_pretrain.Process(0, world, None), limit, 10000, "pretrain.batch")

    assert split(1024, 8, 0) == (128, 1) and split(1024, 8, 48) == (32, 4) and split(1024, 1, 1) == (1, 1024)
    with pytest.raises(SystemExit, match="pretrain.batch=1024 cannot be shared evenly by 6 processes: try pretrain.batch=1020"):
        split(1024, 6, 0)
    with pytest.raises(SystemExit, match="pretrain.batch=16384 is more than the 10000 videos"):
        split(16384, 8, 0)


def test_no_weight_decay_on_vectors():
    model = ARVideo(**load_config([], "pretrain")["model"])
    decayed, free = train_pretrain.adamw(model, dict(weight_decay=0.05, betas=[0.9, 0.95]), torch.device("cpu")).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.05 and free["weight_decay"] == 0
    assert all(names[id(p)].endswith("weight") and "norm" not in names[id(p)] for p in decayed["params"])
    assert {"decoder.query", "encoder.norm.weight", "encoder.blocks.0.attn.q_bias"} <= {names[id(p)] for p in free["params"]}
    assert len(decayed["params"]) + len(free["params"]) == len(names)


# Runs


def test_a_run_leaves_checkpoint_log_and_pictures(reference, toy):
    output, checkpoint, printed = reference
    assert sorted(path.name for path in output.iterdir() if "events" not in path.name) == [
        "config.yaml", "epoch_0001.pt", "epoch_0002.pt", "last.pt", "log.jsonl", "predictions_0002.png", "previous.pt"]
    torch.testing.assert_close(torch.load(output / "epoch_0002.pt", weights_only=True)["model"], checkpoint["model"], rtol=0, atol=0)
    assert yaml.safe_load((output / "config.yaml").read_text()) == checkpoint["config"]
    assert checkpoint["step"] == 6 and "encoder.blocks.1.attn.qkv.weight" in checkpoint["model"]
    assert log_of(output, "step", "epoch") == [[i + 1, i // 3 + 1] for i in range(6)]
    assert {"loss", "lr", "clips_per_second", "data_share"} <= set(json.loads((output / "log.jsonl").open().readline()))
    assert "8 = 1 processes x 1 accumulation steps x 8 videos" in printed and f"lr {0.006 * 8 / 256:.3g} = 0.006 x 8 / 256" in printed
    code, out, err = run([*TINY, *toy, f"run.output={output}"])
    assert code == 0 and "already finished" in out and "step/s" not in err


def assert_same_training(output, checkpoint, reference, exact):
    there, expected, _ = reference
    tolerance = dict(rtol=0, atol=0) if exact else dict(rtol=1e-3, atol=2e-5)
    torch.testing.assert_close(torch.tensor(log_of(output, "loss", "lr")), torch.tensor(log_of(there, "loss", "lr")), **tolerance)
    torch.testing.assert_close(checkpoint["model"], expected["model"], **tolerance)
    if exact:
        torch.testing.assert_close(checkpoint["optimizer"]["state"], expected["optimizer"]["state"], **tolerance)


def test_two_accumulation_steps_equal_one(toy, reference, tmp_path):
    assert_same_training(tmp_path, train(tmp_path, *toy, "run.max_batch=4")[0], reference, exact=False)


def test_two_processes_equal_one(toy, reference, tmp_path):
    assert_same_training(tmp_path, train(tmp_path, *toy, processes=2)[0], reference, exact=False)


def test_a_signal_saves_first(toy, reference, tmp_path):
    process = start([*TINY, *toy, f"run.output={tmp_path}"], start_new_session=True)
    while not (tmp_path / "log.jsonl").exists() or not log_of(tmp_path, "step"):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)                  # the workers too, as a cluster does it
    _, err = process.communicate(timeout=60)
    step = torch.load(tmp_path / "last.pt", weights_only=True)["step"]
    assert process.returncode == 1 and f"stopped by a signal after step {step}" in err and "Traceback" not in err
    assert_same_training(tmp_path, train(tmp_path, *toy)[0], reference, exact=True)


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(toy, tmp_path):
    code, out, err = run([*TINY, *toy, f"run.output={tmp_path}", "pretrain.lr=1e30", "pretrain.clip_norm=0.0", "run.save_minutes=0"])
    assert code == 1 and "the gradient's norm" in err and "Traceback" not in err
    weights = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_too_many_unreadable_videos_stop_the_run(toy, tmp_path):
    lines = (Path(toy[0].partition("=")[2]) / "train.txt").read_text().splitlines()
    for i in range(4):
        (tmp_path / f"broken{i}.mp4").write_text("hello")
    (tmp_path / "list.txt").write_text("\n".join([*lines, *(f"broken{i}.mp4 0" for i in range(4))]))
    arguments = [*TINY, *toy, f"data.train={tmp_path / 'list.txt'}", f"run.output={tmp_path / 'run'}", "pretrain.epochs=6"]
    code, out, err = run(arguments)
    assert code == 1 and "videos tried were unreadable, more than data.max_unreadable=0.05" in err and "Traceback" not in err
    assert err.count(f"{tmp_path}/broken2.mp4: ") <= 1 and "broken" in err
    code, out, err = run([*arguments, "data.max_unreadable=0.5"])
    assert code == 0 and "finished" in out


def test_mixed_precision_and_compilation_agree():
    config = load_config([], "pretrain")["model"]
    torch.manual_seed(0)
    model = ARVideo(**config)
    video, draw = torch.randn(2, 3, 8, 32, 32), model.draw(2)
    exact = model(video, *draw).item()
    autocast, _ = train_pretrain.mixed_precision("bf16", torch.device("cpu"))
    with autocast():
        assert model(video, *draw).item() == pytest.approx(exact, rel=1e-2)
    assert torch.compile(model)(video, *draw).item() == pytest.approx(exact, rel=1e-4)
