"""The README's Python runs as it stands there, on checkpoints of tiny runs; its commands name things that exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import data
import train_finetune
import train_pretrain

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
TINY = ["model.width=32", "model.depth=2", "model.heads=2", "model.decoder_width=24", "model.decoder_depth=1", "model.decoder_heads=2",
        "pretrain.batch=8", "pretrain.epochs=1", "finetune.batch=8", "finetune.epochs=1", "run.workers=0", "run.device=cpu"]


def test_the_python_blocks_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data.make_toy_set(clips={"train": 16, "val": 8})
    for main in (train_pretrain.main, train_finetune.main):
        monkeypatch.setattr(sys, "argv", ["script", *TINY])
        main()
    assert "28 tensors of the encoder from runs/toy/pretrain/last.pt" in capsys.readouterr().out
    names = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL):
        exec(block, names)
    assert names["features"].shape == (1, 256, 32)
    assert len(re.findall(r"(?:%s): [0-9.]+%%" % "|".join(data.TOY_CLASSES), capsys.readouterr().out)) == 3


@pytest.mark.parametrize("command", [line for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL) for line in block.splitlines()
                                     if "train_" in line and "venv" not in line])
def test_the_training_commands_have_a_configuration(command, tmp_path):
    words = command.split("#")[0].split()
    script = next(i for i, word in enumerate(words) if word.startswith("train_"))
    shown = subprocess.run([sys.executable, ROOT / words[script], *words[script + 1:], "--show"], cwd=tmp_path, text=True, capture_output=True)
    assert shown.returncode == 0, shown.stderr


def test_the_names_in_the_text_exist():
    source = "".join(path.read_text() for path in ROOT.glob("*.py"))
    for function in re.findall(r"`([a-z_]+|[A-Z][A-Za-z]+)` in `arvideo.py`|\| `([A-Za-z_]+)`", README):
        for name in filter(None, function):
            assert re.search(rf"\b{name}\b", source) or (ROOT / name).exists() or name in ("train",), name
    config = train_pretrain.load_config([], "pretrain")
    for section, key in re.findall(r"`(data|model|pretrain|finetune|run)\.([a-z_]+)", README):
        if key not in ("py", "pt"):
            assert key in config[section], f"{section}.{key}"
