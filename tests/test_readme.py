"""README.md and RESULTS.md cannot rot: what they tell to type runs, on tiny sets and models."""

import csv
import glob
import importlib
import io
import json
import re
import shlex
import shutil
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

import arvideo
import data
import train_finetune
import train_pretrain
from arvideo import ARVideo
from conftest import ROOT, TINY

README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "RESULTS.md").read_text()
# Appended to every training command: they make it small, whatever its preset is
SMALL = [
    *TINY, "model.frames=8", "model.size=32", "model.cube=[2,4,4]", "model.cluster=[2,4,4]",
    "pretrain.epochs=1", "finetune.epochs=1", "run.workers=0"]


def code_blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def spans(text):
    """The pieces of the text between single backticks, outside code blocks."""
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


def typed_commands():
    """What both files tell to type, in their order, but for the installation."""
    commands = []
    for block in code_blocks(README + RESULTS, "sh"):
        for line in block.splitlines():
            if "venv" not in line:
                commands.append(line.split("  #")[0].strip())
    return commands


COMMANDS = typed_commands()
# Commands in the text whose arguments are no placeholders
FIGURES = [span for span in spans(README + RESULTS)
           if span.startswith("python tests/figures.py ") and not re.search("[A-Z]{4}", span)]


# --- A working folder, in which everything runs once ------------------------


def below(folder, text):
    """The text with the folder's own data in place of those in /data."""
    return text.replace("/data/", f"{folder}/data/")


def make_own_videos(folder):
    """data/mine: videos with two lists, and mine.yaml as the README has it."""
    mine = folder / "data" / "mine"
    shutil.copytree(folder / "data" / "toy" / "train", mine)
    lines = [f"{i:05d}.mp4 {i % 8}\n" for i in range(16)]
    for split in ("train", "val"):
        (mine / f"{split}.txt").write_text("".join(lines))
    settings, = code_blocks(README, "yaml")
    (folder / "mine.yaml").write_text(below(folder, settings))


def make_kinetics(folder):
    """data/k400: the toy set as Kinetics-400 would have it."""
    k400 = folder / "data" / "k400"
    k400.mkdir()
    for split, count in (("train", 16), ("val", 8)):
        rows = [["label", "youtube_id", "time_start", "time_end", "split"]]
        for i in range(count):
            name = f"{split}{i:08d}"
            rows.append([data.TOY_CLASSES[i % 8], name, 3, 13, split])
            shutil.copy(folder / "data" / "toy" / split / f"{i:05d}.mp4",
                        k400 / f"{name}_000003_000013.mp4")
        with open(k400 / f"{split}.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)


def make_something(folder):
    """data/ssv2: the toy set as Something-Something V2 would have it."""
    ssv2 = folder / "data" / "ssv2"
    ssv2.mkdir()
    for split, annotations, count in (("train", "train", 16), ("val", "validation", 8)):
        items = []
        for i in range(count):
            name = str(100 * count + i)
            template = f"Moving [something] {data.TOY_CLASSES[i % 8]}"
            items.append({"id": name, "template": template})
            shutil.copy(folder / "data" / "toy" / split / f"{i:05d}.mp4", ssv2 / f"{name}.mp4")
        (ssv2 / f"{annotations}.json").write_text(json.dumps(items))
    labels = {f"Moving something {name}": str(i) for i, name in enumerate(data.TOY_CLASSES)}
    (ssv2 / "labels.json").write_text(json.dumps(labels))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    data.make_toy_set(folder / "data" / "toy", {"train": 16, "val": 8})
    make_own_videos(folder)
    make_kinetics(folder)
    make_something(folder)
    return folder


def run(command, folder):
    """Run a command as it stands, in this process and alone: (exit status, output).

    Starting Python takes longer than a tiny training, and so does torchrun.
    """
    words = shlex.split(below(folder, command))
    script, = [i for i, word in enumerate(words) if word.endswith(".py")]
    arguments = []
    for word in words[script + 1:]:
        arguments += sorted(glob.glob(word, root_dir=folder)) or [word]
    if words[script].startswith("train_"):
        arguments += SMALL
    printed = io.StringIO()
    status = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", [words[script], *arguments])
        with redirect_stdout(printed), redirect_stderr(printed):
            try:
                importlib.import_module(Path(words[script]).stem).main()
            except SystemExit as ended:
                status = ended.code
    return status, printed.getvalue()


@pytest.fixture(scope="module")
def ran(folder):
    """{command: (exit status, output)}, run in the order of both files."""
    outcome = {}
    for command in COMMANDS:
        if "checkpoint.pth" in command:                 # the reader's own file
            shutil.copy(folder / "runs" / "k400" / "finetune" / "last.pt",
                        folder / "checkpoint.pth")
        outcome[command] = run(command, folder)
    return outcome


# --- Commands ---------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_runs_as_it_stands(command, ran):
    status, output = ran[command]
    assert not status, output


@pytest.mark.slow
@pytest.mark.parametrize("command", FIGURES)
def test_a_figure_is_drawn(command, folder, ran):
    for seed in (0, 2):         # seed 1 is run; these are left to the reader
        shutil.copytree(folder / "runs" / "toy-1" / "pretrain",
                        folder / "runs" / f"toy-{seed}" / "pretrain", dirs_exist_ok=True)
    status, output = run(command, folder)
    assert not status, output
    assert (folder / output.splitlines()[-1]).stat().st_size > 0


def test_the_commands_are_found():
    assert COMMANDS[0] == "python train_pretrain.py"
    assert COMMANDS[1] == "python train_finetune.py"
    assert len(COMMANDS) >= 20
    assert {command.split()[2] for command in FIGURES} >= {
        "method", "predictions", "loss", "sampling", "rank"}


def test_the_test_command_is_the_first_that_names_pytest():
    """.ci/run takes it from there."""
    line = next(line for line in README.splitlines() if "-m pytest" in line)
    assert line.startswith("python3 -m venv .venv && ")
    assert line.endswith(" && .venv/bin/python -m pytest")


def test_the_readme_shows_what_the_first_command_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = train_pretrain.load_config(["run.device=cpu"], "pretrain")
    model = train_pretrain.build_arvideo(config)
    machine = train_pretrain.Machine(config["run"])
    videos = data.TOY_CLIPS["train"]
    train_pretrain.print_start(config, model, videos)
    train_pretrain.Training(config, "pretrain", machine, model, None, videos, {}).begin()
    printed = capsys.readouterr().out.splitlines()
    shown, = code_blocks(README, "text")
    assert len(shown.splitlines()) >= 3
    for line in shown.splitlines():
        assert line in printed


# --- Settings and names -----------------------------------------------------


PAPER, TOY_RESULTS = RESULTS.split("## The toy set")


@pytest.mark.parametrize("presets, text, at_least", [
    (["ssv2", "ablation"], PAPER, 19),
    (["toy"], TOY_RESULTS, 16),
    (["k400"], README, 6),
], ids=["paper", "toy", "readme"])
def test_settings_in_the_text_exist_and_make_a_model(presets, text, at_least):
    count = 0
    for span in spans(text):
        words = span.split()
        if all(re.match(r"[a-z]+\.[a-z_]+=", word) for word in words):
            count += 1
            config = train_pretrain.load_config([*presets, *words], "pretrain")
            model = {**config["model"], "depth": 1}         # any depth fits; 1 is fast
            with torch.device("meta"):
                ARVideo(**model)
    assert count >= at_least


def test_the_names_of_settings_exist():
    config = train_pretrain.load_config([], "pretrain")
    names = [span for span in spans(README + RESULTS)
             if re.fullmatch(r"(data|model|pretrain|finetune|run)\.(?!py$)[a-z_]+", span)]
    assert len(names) > 20
    for name in names:
        section, key = name.split(".")
        is_function = section == "data" and hasattr(data, key)
        assert key in config[section] or is_function, name


def test_the_code_map_names_what_is_there():
    table = re.search(r"\| paper \| in `arvideo.py` \|\n(.*?)\n\n", README, re.DOTALL)[1]
    names = spans(table)
    assert len(names) >= 14
    for name in names:
        if name.endswith(".py"):
            assert (ROOT / name).exists()
            continue
        found = train_finetune if name == "Classifier" else arvideo
        for part in name.split("."):
            found = getattr(found, part)


def test_the_files_in_the_text_exist():
    names = [span for span in spans(README + RESULTS) if re.fullmatch(r"[\w/]+\.py|LICENSE", span)]
    assert len(names) > 10
    for name in names:
        assert (ROOT / name).exists() or name == "mine.py", name


def test_pictures_and_links_lead_somewhere():
    pictures = re.findall(r"assets/\w+\.png", README + RESULTS)
    assert pictures
    for picture in pictures:
        assert 0 < (ROOT / picture).stat().st_size < 200_000, picture
    anchors = {}
    for name, text in (("README.md", README), ("RESULTS.md", RESULTS)):
        headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        anchors[name] = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
                         for heading in headings}
    for name, text in (("README.md", README), ("RESULTS.md", RESULTS)):
        for target, anchor in re.findall(r"\]\(([A-Z]*(?:\.md)?)#([\w-]+)\)", text):
            assert anchor in anchors[target or name], anchor


def test_the_readme_is_short():
    assert len(README.split()) <= 3500


# --- Python -----------------------------------------------------------------


def fork_classes():
    """The classes of the section on forking, by their names."""
    names = {}
    section = README.split("## Forking")[1]
    for block in code_blocks(section, "python"):
        exec(block, names)
    return names


@pytest.mark.slow
def test_the_python_blocks_run(folder, ran, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    names = {}
    for block in code_blocks(README.split("## Forking")[0], "python"):
        exec(block, names)
    assert names["features"].shape == (1, 256, 32)
    assert capsys.readouterr().out.strip() in data.TOY_CLASSES


@pytest.mark.parametrize("name", ["CentreFirst", "Motion", "Scattered"])
def test_a_fork_trains(name):
    settings = train_pretrain.load_config(SMALL, "pretrain")["model"]
    torch.manual_seed(0)
    model = fork_classes()[name](**settings)
    order, visible = model.draw(3)
    assert torch.equal(order.sort(1).values, torch.arange(8).expand(3, -1))
    assert torch.equal(model.clusters.flatten().sort().values, torch.arange(256))
    model(torch.randn(3, 3, 8, 32, 32), order, visible).backward()
    assert model.encoder.patch_embed.proj.weight.grad.abs().sum() > 0


def test_the_fork_centre_first_begins_near_the_middle():
    """ViT-B's 4 x 2 x 2 clusters are at two distances from it."""
    model = fork_classes()["CentreFirst"](
        width=8, depth=1, heads=1, decoder_width=8, decoder_depth=1, decoder_heads=1)
    order, _ = model.draw(2)
    time = torch.unravel_index(order, model.cluster_grid)[0]
    assert set(time[:, :8].flatten().tolist()) == {1, 2}
    assert set(time[:, 8:].flatten().tolist()) == {0, 3}


def test_the_fork_motion_has_nothing_to_predict_in_a_still_video():
    settings = train_pretrain.load_config(SMALL, "pretrain")["model"]
    model = fork_classes()["Motion"](**settings)
    torch.nn.init.zeros_(model.decoder.head.weight)
    still = torch.randn(3, 3, 1, 32, 32).expand(-1, -1, 8, -1, -1)
    assert model(still, *model.draw(3)).item() == 0


@pytest.mark.slow
def test_a_fork_takes_the_place_of_arvideo(folder, ran, monkeypatch):
    """As the README says: train with it, take its features, fine-tune its encoder."""
    motion = fork_classes()["Motion"]
    monkeypatch.setattr(train_pretrain, "ARVideo", motion)
    status, output = run("python train_pretrain.py run.output=runs/motion", folder)
    assert not status, output
    checkpoint = train_pretrain.load_checkpoint(folder / "runs" / "motion" / "last.pt")
    assert checkpoint["model_class"] == "Motion"
    encoder = arvideo.pretrained_encoder(checkpoint, motion)
    assert encoder(torch.randn(1, 3, 8, 32, 32)).shape == (1, 256, 32)
    status, output = run("python train_finetune.py finetune.init=runs/motion/last.pt "
                         "run.output=runs/motion-finetune", folder)
    assert not status, output
