"""The README cannot rot: its commands and its Python run as they stand there, on tiny sets and models."""

import csv
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

import data
import train_pretrain
from arvideo import ARVideo

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
FIRST = "python train_pretrain.py"                      # of the line that also installs
COMMANDS = [FIRST] + [line.split("  #")[0].strip() for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
            for line in block.splitlines() if "pip install" not in line]
FIGURES = [span for span in re.findall(r"`(python tests/figures.py [^`\n]+)`", README) if not re.search("[A-Z]{4}", span)]
TINY = ["model.frames=8", "model.size=32", "model.cube=[2,4,4]", "model.cluster=[2,4,4]", "model.width=32", "model.depth=2",
        "model.heads=2", "model.decoder_width=24", "model.decoder_depth=1", "model.decoder_heads=2", "pretrain.batch=8",
        "pretrain.epochs=1", "pretrain.warmup_epochs=0", "finetune.batch=8", "finetune.epochs=1", "finetune.warmup_epochs=0",
        "run.workers=0", "run.device=cpu"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with a toy set, and the same videos as Kinetics-400 and Something-Something V2 would have them."""
    folder = tmp_path_factory.mktemp("readme")
    data.make_toy_set(folder / "data" / "toy", {"train": 16, "val": 8})
    shutil.copytree(folder / "data" / "toy" / "train", folder / "data" / "mine")
    for split in ("train", "val"):
        (folder / "data" / "mine" / f"{split}.txt").write_text("".join(f"{i:05d}.mp4 {i % 8}\n" for i in range(16)))
    for name in ("k400", "ssv2"):
        (folder / "data" / name).mkdir()
    for split, other, count in (("train", "train", 16), ("val", "validation", 8)):
        rows, items = [["label", "youtube_id", "time_start", "time_end", "split"]], []
        for i in range(count):
            video = folder / "data" / "toy" / split / f"{i:05d}.mp4"
            shutil.copy(video, folder / "data" / "k400" / f"{split}{i:08d}_000003_000013.mp4")
            shutil.copy(video, folder / "data" / "ssv2" / f"{count * 100 + i}.mp4")
            rows.append([data.TOY_CLASSES[i % 8], f"{split}{i:08d}", 3, 13, split])
            items.append({"id": str(count * 100 + i), "template": f"Moving [something] {data.TOY_CLASSES[i % 8]}"})
        csv.writer((folder / "data" / "k400" / f"{split}.csv").open("w", newline="")).writerows(rows)
        (folder / "data" / "ssv2" / f"{other}.json").write_text(json.dumps(items))
    (folder / "data" / "ssv2" / "labels.json").write_text(json.dumps({f"Moving something {name}": str(i) for i, name in enumerate(data.TOY_CLASSES)}))
    return folder


@pytest.fixture(scope="module")
def ran(folder):
    """{command: (status, output)} of every command in the README's order; those of torchrun in one process."""
    outcome = {}
    for command in COMMANDS:
        if "checkpoint.pth" in command:                 # the reader's own file
            shutil.copy(folder / "runs" / "k400" / "finetune" / "last.pt", folder / "checkpoint.pth")
        words = shlex.split(command.replace("/data/", "data/"))
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        outcome[command] = (train if "train_" in words[script] else run)(ROOT / words[script], words[script + 1:], folder)
    return outcome


def run(script, arguments, folder):
    process = subprocess.run([sys.executable, script, *arguments], cwd=folder, text=True, capture_output=True, timeout=120)
    return process.returncode, process.stdout + process.stderr


def train(script, arguments, folder):
    """As run(), but in this process, since starting Python takes longer than a tiny training."""
    printed, status = io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed), redirect_stderr(printed):
        patch.chdir(folder)
        patch.setattr(sys, "argv", [str(script), *arguments, *TINY])
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as ended:
            status = ended.code
    return status, printed.getvalue()


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_run(command, ran):
    assert f"&& {FIRST}\n" in README
    status, output = ran[command]
    assert status == 0, output


@pytest.mark.parametrize("command", FIGURES)
def test_the_figures_are_drawn(command, folder, ran):
    for seed in (0, 2):                                 # the README names seed 1 and leaves these to the reader
        shutil.copytree(folder / "runs" / "toy" / "pretrain", folder / "runs" / f"toy-{seed}" / "pretrain", dirs_exist_ok=True)
    typed = command.replace("python tests", f"{sys.executable} {ROOT}/tests")
    drawn = subprocess.run(typed, shell=True, cwd=folder, text=True, capture_output=True, timeout=120)
    assert drawn.returncode == 0, drawn.stderr
    assert (folder / drawn.stdout.splitlines()[-1]).stat().st_size > 0


def test_the_settings_of_the_papers_tables_exist():
    """Every span of section.key=value in the text makes a configuration, and a model that fits."""
    paper, _, rest = README.partition("## Evidence that it learns")         # where the settings are the toy set's
    for presets, text, least in ((["ssv2", "ablation"], paper, 18), (["toy"], rest, 14)):
        spans = [span.split() for span in re.findall(r"`([^`\n]+)`", text)]
        settings = [words for words in spans if all(re.match(r"[a-z]+\.[a-z_]+=", word) for word in words)]
        assert len(settings) > least
        for words in settings:
            with torch.device("meta"):
                ARVideo(**train_pretrain.load_config([*presets, *words], "pretrain")["model"])


def test_the_python_blocks_run(folder, ran, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    names = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block, names)
    assert names["features"].shape == (1, 256, 32)
    printed = capsys.readouterr().out
    assert sum(bool(re.match(rf"(?:{'|'.join(data.TOY_CLASSES)}): [0-9.]+%$", line)) for line in printed.splitlines()) == 3

    settings = train_pretrain.load_config(TINY, "pretrain")["model"]
    video = torch.randn(3, 3, 8, 32, 32)
    for name in ("CentreFirst", "Motion", "Scattered"):                      # the forks train
        model = names[name](**settings)
        order, visible = model.draw(3)
        assert torch.equal(order.sort(1).values, torch.arange(8).expand(3, -1))
        assert torch.equal(model.clusters.flatten().sort().values, torch.arange(256))
        model(video, order, visible).backward()
        assert model.encoder.patch_embed.proj.weight.grad.abs().sum() > 0
    still = torch.randn(3, 3, 1, 32, 32).expand(-1, -1, 8, -1, -1)
    model = names["Motion"](**settings)
    torch.nn.init.zeros_(model.decoder.head.weight)
    assert model(still, *model.draw(3)).item() == 0                          # nothing changes, nothing is to be predicted


def test_the_names_and_pictures_in_the_text_exist():
    source = "".join(path.read_text() for path in ROOT.glob("*.py"))
    for function in re.findall(r"`([a-z_]+|[A-Z][A-Za-z]+)` in `arvideo.py`|\| `([A-Za-z_]+)`", README):
        for name in filter(None, function):
            assert re.search(rf"\b{name}\b", source) or (ROOT / name).exists() or name in ("train",), name
    config = train_pretrain.load_config([], "pretrain")
    for section, key in re.findall(r"`(data|model|pretrain|finetune|run)\.([a-z_]+)", README):
        if key not in ("py", "pt"):
            assert key in config[section], f"{section}.{key}"
    for picture in re.findall(r"assets/\w+.png", README):
        assert 0 < (ROOT / picture).stat().st_size < 200_000, picture
