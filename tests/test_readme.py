"""README.md and RESULTS.md cannot rot: what they tell to type runs, on tiny sets and models."""

import csv
import glob
import importlib
import io
import json
import re
import runpy
import shlex
import shutil
import sys
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import arvideo
import data
import evidence
import train_finetune
import train_pretrain
from arvideo import ARVideo, Encoder
from conftest import ROOT, TINY, assert_equal
from train_pretrain import make_optimizer

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
    if words[script].startswith("train_") or "videomae" in words:
        arguments += SMALL
    printed = io.StringIO()
    status = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", [words[script], *arguments])
        patch.setattr(train_pretrain, "ARVideo", ARVideo)       # which evidence.py replaces
        patch.setattr(evidence, "STEPS", 2)
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
    # Of three seeds, the files name the commands of one. The others are left to the reader.
    for ran_folder, seeds in (("toy-1", ("toy-0", "toy-2")),
                              ("mini", ("mini-0", "mini-1", "mini-2"))):
        for seed in seeds:
            shutil.copytree(folder / "runs" / ran_folder / "pretrain",
                            folder / "runs" / seed / "pretrain", dirs_exist_ok=True)
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
    train_pretrain.Training(config, "pretrain", machine, model, None, videos, {}).print_plan()
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


# --- Recipes ----------------------------------------------------------------

BEFORE_FORKING, FORKING = README.split("## Forking")
RECIPES = code_blocks(BEFORE_FORKING, "python")


def recipe(words):
    """The one block of python that holds these words."""
    block, = [block for block in RECIPES if words in block]
    return block


@pytest.mark.slow
def test_features_and_a_class_of_a_video(folder, ran, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    names = {}
    exec(recipe("features = encoder(video)"), names)
    exec(recipe("finetuned_classifier"), names)
    assert names["features"].shape == (1, 256, 32)
    assert capsys.readouterr().out.strip() in data.TOY_CLASSES


def perturbed(model):
    """The model in evaluation, with biases and norms that are no longer 0 and 1."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture
def to_export():
    """What the recipe for export starts from: torch, an encoder and a video."""
    settings = train_pretrain.load_config(SMALL, "pretrain")["model"]
    encoder = Encoder(**train_finetune.encoder_arguments(settings))
    return dict(torch=torch, encoder=perturbed(encoder), video=torch.randn(1, 3, 8, 32, 32))


def test_the_exported_program_gives_the_same_features(to_export):
    exec(recipe("torch.export.export").splitlines()[0], to_export)
    video = to_export["video"]
    assert_equal(to_export["program"].module()(video), to_export["encoder"](video))


@pytest.mark.slow
def test_onnx_runtime_gives_the_same_features(to_export, tmp_path, monkeypatch):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    exec(recipe("torch.export.export"), to_export)
    session = onnxruntime.InferenceSession("encoder.onnx")
    video = to_export["video"]
    features, = session.run(None, {"video": video.numpy()})
    torch.testing.assert_close(
        torch.from_numpy(features), to_export["encoder"](video), rtol=0, atol=1e-5)


@torch.no_grad()
def assert_same_features(ours, theirs):
    video = torch.randn(2, 3, 8, 32, 32)
    features = theirs(video.transpose(1, 2)).last_hidden_state
    torch.testing.assert_close(ours(video), features, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_hugging_faces_videomae_and_ours_take_each_others_weights(tmp_path, monkeypatch):
    transformers = pytest.importorskip("transformers", "5.0")
    monkeypatch.chdir(tmp_path)
    config = train_pretrain.load_config([*SMALL, "model.positions=1d", "finetune.probe=linear"],
                                        "finetune")
    # Their default is ViT-B
    small = partial(
        transformers.VideoMAEConfig, num_frames=8, image_size=32, patch_size=4, hidden_size=32,
        num_hidden_layers=2, num_attention_heads=2, intermediate_size=128)
    monkeypatch.setattr(transformers, "VideoMAEConfig", small)

    # Ours as theirs
    model = perturbed(ARVideo(**config["model"]))
    path = tmp_path / "runs" / "k400" / "pretrain" / "last.pt"
    path.parent.mkdir(parents=True)
    torch.save(dict(model=model.state_dict(), config=config), path)
    names = dict(torch=torch, pretrained_encoder=arvideo.pretrained_encoder,
                 load_checkpoint=train_pretrain.load_checkpoint)
    exec(recipe("NAMES = ["), names)
    assert_same_features(model.encoder, names["model"].eval())

    # Theirs as ours: a folder of that name stands in for the file that would be downloaded
    theirs = perturbed(transformers.VideoMAEForPreTraining(small(use_mean_pooling=False)))
    theirs.save_pretrained("MCG-NJU/videomae-base")
    exec(recipe("from_pretrained("), names)
    probe = train_finetune.build_model(config, classes=8)
    train_finetune.load_weights(probe, "videomae-base.pth", data.TOY_CLASSES)
    assert_same_features(probe.encoder, theirs.videomae)


# --- Forks ------------------------------------------------------------------


class MuonAndAdamW:
    """An optimiser for forks: Muon for the matrices, AdamW for the rest.

    Used as train_pretrain.make_optimizer. Both take the learning rates and the weight decay
    of the groups that make_optimizer forms.
    """

    def __init__(self, model, settings, device):
        adamw = make_optimizer(model, settings, device)
        groups = []
        for group in adamw.param_groups:
            matrices = [p for p in group["params"] if p.ndim == 2]
            groups.append({**group, "params": matrices})
            group["params"] = [p for p in group["params"] if p.ndim != 2]
        muon = torch.optim.Muon(groups, adjust_lr_fn="match_rms_adamw")
        self.parts = [muon, adamw]

    @property
    def param_groups(self):
        # Asked for anew each time, since load_state_dict replaces the groups of a part
        return [group for part in self.parts for group in part.param_groups]

    def step(self):
        for part in self.parts:
            part.step()

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()

    def state_dict(self):
        return [part.state_dict() for part in self.parts]

    def load_state_dict(self, states):
        for part, state in zip(self.parts, states):
            part.load_state_dict(state)


class StandIn(SimpleNamespace):
    """In place of the module wandb: it keeps what it is told."""

    def __init__(self):
        super().__init__(runs=[], logged=[])

    def init(self, **settings):
        self.runs.append(settings)

    def log(self, values, step):
        self.logged.append((step, sorted(values)))


@pytest.fixture
def wandb(monkeypatch):
    module = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def mine(wandb, tmp_path, monkeypatch):
    """The section on forking as a module, mine.py."""
    (tmp_path / "mine.py").write_text("\n".join(code_blocks(FORKING, "python")))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    module = importlib.import_module("mine")
    yield module
    del sys.modules["mine"]


def call_main(monkeypatch, call, toy, output, *arguments):
    """Call what reads the command line, for two steps of 8 videos and without pictures."""
    videos = toy / "val.txt"                                    # 13 of them, an epoch of one step
    words = [*SMALL, f"data.train={videos}", f"data.val={videos}", "pretrain.epochs=2",
             "pretrain.picture_epochs=0", "finetune.test_clips=1", f"run.output={output}"]
    monkeypatch.setattr(sys, "argv", ["mine.py", *words, *arguments])
    call()


class Killed(Exception):
    """In place of a kill."""


def kill_in_second_step(training, *values):
    if training.step == 2:
        raise Killed                    # the update is made, and not yet saved


def optimizer_states(checkpoint):
    optimizer = checkpoint["optimizer"]
    parts = optimizer if isinstance(optimizer, list) else [optimizer]
    return [part["state"] for part in parts]


@pytest.mark.parametrize("part, name", [
    ("ARVideo", "CentreFirst"), ("ARVideo", "Teacher"), ("ARVideo", "Growing"), ("Log", "Wandb"),
    ("make_optimizer", "MuonAndAdamW")])
def test_a_fork_resumes_exactly_and_is_fine_tuned(part, name, mine, toy, tmp_path, monkeypatch):
    fork = MuonAndAdamW if name == "MuonAndAdamW" else getattr(mine, name)
    monkeypatch.setattr(train_pretrain, part, fork)
    call_main(monkeypatch, train_pretrain.main, toy, tmp_path / "undisturbed")

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train_pretrain.Training, "log_step", kill_in_second_step)
        call_main(monkeypatch, train_pretrain.main, toy, tmp_path / "run", "run.save_minutes=0")
    assert torch.load(tmp_path / "run" / "last.pt", weights_only=True)["step"] == 1
    call_main(monkeypatch, train_pretrain.main, toy, tmp_path / "run")
    expected, found = (torch.load(tmp_path / run / "last.pt", weights_only=True)
                       for run in ("undisturbed", "run"))
    assert found["step"] == expected["step"] == 2
    assert_equal(found["model"], expected["model"])
    assert_equal(optimizer_states(found), optimizer_states(expected))

    call_main(monkeypatch, train_finetune.main, toy, tmp_path / "finetune",
              f"finetune.init={tmp_path / 'run' / 'last.pt'}")
    assert (tmp_path / "finetune" / "results.json").exists()


def tiny(model_class):
    settings = train_pretrain.load_config(SMALL, "pretrain")["model"]
    torch.manual_seed(0)
    return model_class(**settings)


def test_mine_runs_as_a_script(mine, wandb, toy, tmp_path, monkeypatch):
    for name in ("ARVideo", "Log"):                 # they get their own values back at the end
        monkeypatch.setattr(train_pretrain, name, getattr(train_pretrain, name))
    monkeypatch.setattr(train_pretrain, "learning_rate", lambda step, plan: 1e-3 * (step + 1))
    run_mine = partial(runpy.run_path, str(tmp_path / "mine.py"), run_name="__main__")
    call_main(monkeypatch, run_mine, toy, tmp_path / "run")

    # The teacher's weights are there, and a transfer does without them
    checkpoint = train_pretrain.load_checkpoint(tmp_path / "run" / "last.pt")
    assert checkpoint["model_class"] == "Teacher"
    encoder = arvideo.pretrained_encoder(checkpoint, mine.Teacher)
    assert encoder(torch.randn(1, 3, 8, 32, 32)).shape == (1, 256, 32)
    # What Weights & Biases are told
    settings, = wandb.runs
    assert settings["dir"] == tmp_path / "run"
    assert [step for step, _ in wandb.logged] == [1, 2]
    assert "loss" in wandb.logged[0][1]
    # The schedule that was put in place of ours
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["lr"] for line in lines] == [1e-3, 2e-3]


def test_the_fork_centre_first_begins_near_the_middle(mine):
    """ViT-B's 4 x 2 x 2 clusters are at two distances from it."""
    model = mine.CentreFirst(
        width=8, depth=1, heads=1, decoder_width=8, decoder_depth=1, decoder_heads=1)
    order, *_ = model.draw(2)
    assert_equal(order.sort(1).values, torch.arange(16).expand(2, -1))
    time = torch.unravel_index(order, model.cluster_grid)[0]
    assert set(time[:, :8].flatten().tolist()) == {1, 2}
    assert set(time[:, 8:].flatten().tolist()) == {0, 3}


def test_the_fork_teacher_predicts_normalised_features_and_follows(mine):
    model = tiny(mine.Teacher)
    video = torch.randn(2, 3, 8, 32, 32)
    torch.nn.init.zeros_(model.decoder.head.weight)
    # Normalised features of width D have the mean square 1 - 1 / D
    loss = model(video, *model.draw(2))
    torch.testing.assert_close(loss.item(), 1 - 1 / 32, rtol=1e-4, atol=0)
    # The teacher has no gradient. It moves a little towards the encoder, and stays at the end
    loss.backward()
    teacher = model.teacher.norm.weight
    assert teacher.grad is None
    model.encoder.norm.weight.data.fill_(3.0)
    model.after_step(0, 10)
    assert_equal(teacher, torch.full_like(teacher, 1.02))
    model.after_step(10, 10)
    assert_equal(teacher, torch.full_like(teacher, 1.02))


def test_the_fork_growing_has_larger_clusters_later(mine):
    model = tiny(mine.Growing)
    sizes = []
    for step in range(4):
        model.before_step(step, 4)
        sizes.append(model.clusters.shape[1])
        model(torch.randn(2, 3, 8, 32, 32), *model.draw(2)).backward()
    assert sizes == [8, 8, 32, 32]


def test_muon_takes_the_matrices_at_the_schedules_rate():
    model = tiny(ARVideo)
    settings = train_pretrain.load_config(SMALL, "pretrain")["pretrain"]
    optimizer = MuonAndAdamW(model, settings, torch.device("cpu"))
    muon, adamw = optimizer.parts
    matrices, others = ([p for group in part.param_groups for p in group["params"]]
                        for part in (muon, adamw))
    assert {id(p) for p in matrices} == {id(p) for p in model.parameters() if p.ndim == 2}
    assert len(matrices) + len(others) == len(list(model.parameters()))
    # The groups that a state brings with it are those that the schedule sets
    optimizer.load_state_dict(optimizer.state_dict())
    plan = SimpleNamespace(warmup_steps=0, peak_lr=0.5, final_lr=0.0, steps=10)
    train_pretrain.set_learning_rate(optimizer, 0, plan)
    assert {group["lr"] for part in optimizer.parts for group in part.param_groups} == {0.5}
