"""Settings and the schedule, and what runs of train_pretrain.py leave behind."""

import copy
import inspect
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import data
import train_pretrain
from arvideo import ARVideo
from conftest import ROOT, TINY, Script, assert_equal, pretrain, toy_lists
from data import UserError, stream_seed
from train_pretrain import Machine, load_config, make_optimizer, make_plan, micro_batch_rows


def call_main(monkeypatch, *arguments):
    """The command `python train_pretrain.py arguments`, in the test's own process."""
    monkeypatch.setattr(sys, "argv", ["train_pretrain.py", *map(str, arguments)])
    train_pretrain.main()


def log_of(output, *keys):
    """These values of every line of a run's log."""
    lines = Path(output, "log.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    return [[entry[key] for key in keys] for entry in entries]


# --- Settings ---------------------------------------------------------------


def test_presets_and_overrides():
    config = load_config(
        ["ssv2", "large", "pretrain.lr=1e-3", "data.root=a = b: c", "model.cluster=[4, 7, 7]"],
        "pretrain")
    # From ssv2
    assert config["data"]["stride"] == 2
    assert config["finetune"]["flip"] is False
    # From large
    assert config["model"]["width"] == 1024
    # From the command line
    assert config["model"]["cluster"] == [4, 7, 7]
    assert config["pretrain"]["lr"] == 1e-3
    assert config["data"]["root"] == "a = b: c"
    # From the presets' names
    assert config["run"]["output"] == "runs/ssv2-large/pretrain"
    assert config["finetune"]["init"] == "runs/ssv2-large/pretrain/last.pt"


def test_the_default_preset_is_toy():
    assert load_config([], "pretrain") == load_config(["toy"], "pretrain")


def test_the_model_section_is_the_papers_model():
    defaults = {name: parameter.default
                for name, parameter in inspect.signature(ARVideo).parameters.items()}
    defaults = {name: list(value) if isinstance(value, tuple) else value
                for name, value in defaults.items()}
    assert load_config(["k400"], "pretrain")["model"] == defaults


MISTAKES = [
    ("ssv3", "preset 'ssv3' is unknown; did you mean 'ssv2'"),
    ("pretrian.lr=1", "section 'pretrian' is unknown; did you mean 'pretrain'"),
    ("pretrain.batchsize=1",
     "key of section pretrain 'batchsize' is unknown; did you mean 'batch'"),
    ("pretrain.batch=many", "pretrain.batch must be of kind int, like 32; found 'many'"),
    ("pretrain.batch=1.5", "pretrain.batch must be of kind int"),
    ("pretrain.lr=fast", "pretrain.lr must be of kind float"),
    ("pretrain.flip=1", "pretrain.flip must be of kind bool"),
    ("model.cube=[2, 16]", "model.cube must be a list of 3"),
    ("model.cube=[2, 16, x]", "model.cube must be of kind int"),
    ("model.cube=[2, 16", "model.cube must be a list of 3"),
    ("batch=3", "'batch=3' is not of the form section.key=value"),
]


@pytest.mark.parametrize("argument, culprit", MISTAKES)
def test_mistyped_arguments_name_what_was_meant(argument, culprit):
    with pytest.raises(UserError) as refused:
        load_config([argument], "pretrain")
    assert culprit in str(refused.value)


def test_a_command_ends_with_the_sentence_of_its_error(monkeypatch):
    with pytest.raises(SystemExit) as ended:
        call_main(monkeypatch, "ssv3")
    # Python prints a text on stderr and exits with 1
    assert str(ended.value.code).startswith("preset 'ssv3' is unknown")


def test_help_prints_presets_and_keys(monkeypatch, capsys):
    for argument in ("--help", "-h"):
        call_main(monkeypatch, "k400", argument)
        printed = capsys.readouterr().out
        assert "presets: toy, k400, ssv2" in printed
        assert "pretrain: epochs, batch" in printed


def test_show_prints_the_settings_that_result(monkeypatch, capsys):
    call_main(monkeypatch, "k400", "run.seed=3", "--show")
    shown = yaml.safe_load(capsys.readouterr().out)
    assert shown == load_config(["k400", "run.seed=3"], "pretrain")


def test_a_settings_file_is_a_preset(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("data: {stride: 3}\npretrain:\n  lr: 1e-3\n  batch: 64\n")
    config = load_config(["ssv2", str(mine), "pretrain.batch=48"], "pretrain")
    # It changes what the preset before it says, and the command line changes it
    assert config["data"]["stride"] == 3
    assert config["data"]["train"] == "train.json"
    assert config["pretrain"]["lr"] == 1e-3
    assert config["pretrain"]["batch"] == 48
    assert config["run"]["output"] == "runs/ssv2-mine/pretrain"


def test_a_runs_saved_settings_are_a_settings_file(tmp_path):
    config = load_config(["ssv2", "large", "pretrain.lr=1e-5", "data.root=a: b"], "pretrain")
    saved = tmp_path / "config.yaml"
    saved.write_text(train_pretrain.as_yaml(config))
    assert load_config([str(saved)], "pretrain") == config


FILE_MISTAKES = [
    ("pretrian: {lr: 1.0}", "section 'pretrian' is unknown; did you mean 'pretrain'"),
    ("pretrain: {batchsize: 1}", "'batchsize' is unknown; did you mean 'batch'"),
    ("pretrain: {batch: many}", "pretrain.batch must be of kind int, like 1024; found 'many'"),
    ("pretrain: {epochs: 0}", "pretrain.epochs=0: it must be greater than 0"),
    ("run:\n  seed: 1\n output: x", "mine.yaml, line 3: "),
    ("", "mine.yaml: expected sections of settings, as in config.yaml"),
    ("[pretrain, data]", "mine.yaml: expected sections of settings"),
    ("pretrain: 3", "mine.yaml: expected sections of settings"),
    ("batch: 64", "mine.yaml: expected sections of settings"),
]


@pytest.mark.parametrize("text, culprit", FILE_MISTAKES)
def test_mistakes_in_a_settings_file_are_named(tmp_path, text, culprit):
    mine = tmp_path / "mine.yaml"
    mine.write_text(text)
    with pytest.raises(UserError) as refused:
        load_config([str(mine)], "pretrain")
    assert culprit in str(refused.value)


def test_an_absent_settings_file_is_named(tmp_path):
    with pytest.raises(UserError, match="absent.yaml: No such file"):
        load_config([str(tmp_path / "absent.yaml")], "pretrain")


def test_a_list_is_of_any_length_only_where_its_default_is_empty():
    assert train_pretrain.as_kind_of([], [1, "a", 2.5], "fork.list") == [1, "a", 2.5]
    with pytest.raises(UserError, match="fork.list must be a list of 2"):
        train_pretrain.as_kind_of([1, 2], [1, 2, 3], "fork.list")


def test_presets_say_only_what_differs():
    base = train_pretrain.read_settings(train_pretrain.CONFIG)
    for preset, sections in base.pop("presets").items():
        for section, changes in sections.items():
            same = [key for key, value in changes.items() if base[section][key] == value]
            assert not same, f"{preset}: {section}.{', '.join(same)}"


@pytest.mark.parametrize("preset", ["k400", "ssv2"])
def test_pretraining_has_the_papers_recipe(preset):
    recipe = dict(epochs=800, batch=1024, lr=1.5e-4, min_lr=1e-5, warmup_epochs=40,
                  weight_decay=0.05, betas=[0.9, 0.95], clip_norm=0.0, flip=False)
    settings = load_config([preset], "pretrain")["pretrain"]
    assert {key: settings[key] for key in recipe} == recipe


@pytest.mark.parametrize("size, width, depth, heads", [
    ("small", 384, 12, 6), ("base", 768, 12, 12), ("large", 1024, 24, 16), ("huge", 1280, 32, 16)])
def test_sizes_are_those_of_vit(size, width, depth, heads):
    model = load_config(["k400", size], "pretrain")["model"]
    assert (model["width"], model["depth"], model["heads"]) == (width, depth, heads)


def test_every_key_of_the_configuration_is_read():
    """No setting that nobody reads. The keys of `model` are ARVideo's arguments, checked above."""
    read_in_a_loop = {"mixup", "cutmix"}
    splits = {"train", "val", "test"}                   # read by read_split, settings[split]
    names = ("data.py", "train_pretrain.py", "train_finetune.py")
    source = "".join((ROOT / name).read_text() for name in names)
    config = load_config([], "pretrain")
    for section in ("data", "pretrain", "finetune", "run"):
        for key in config[section]:
            is_read = f'["{key}"]' in source or f"['{key}']" in source
            assert is_read or key in read_in_a_loop | splits, f"nobody reads {section}.{key}"


# --- Schedule, batch and parameters -----------------------------------------


def plan_of(*arguments, videos=10000, world_size=1):
    config = load_config(["k400", *arguments], "pretrain")
    return make_plan(config, "pretrain", videos, world_size)


def test_learning_rate_is_linear_then_a_cosine():
    plan = plan_of(
        "pretrain.batch=512", "pretrain.epochs=10", "pretrain.warmup_epochs=1",
        "pretrain.lr=1.0", "pretrain.min_lr=0.25", videos=5200)
    assert plan.steps_per_epoch == 10
    assert plan.steps == 100
    rates = [train_pretrain.learning_rate(step, plan) for step in range(101)]
    assert rates[0] == 0
    assert rates[5] == 1.0
    assert rates[10] == 2.0                         # 1.0 x 512 / 256
    assert rates[55] == pytest.approx(1.25)
    assert rates[100] == pytest.approx(0.5)         # 0.25 x 512 / 256
    for earlier, later in zip(rates[10:], rates[11:]):
        assert earlier > later


def test_clips_of_a_video_do_not_raise_the_learning_rate():
    assert plan_of("pretrain.clips_per_video=4").peak_lr == plan_of().peak_lr == 1.5e-4 * 4


@pytest.mark.parametrize("world_size, max_batch, micro_batch, accumulation", [
    (8, 0, 128, 1),
    (8, 48, 32, 4),         # the greatest divisor of 128 that is at most 48
    (1, 1, 1, 1024),
])
def test_the_global_batch_is_shared(world_size, max_batch, micro_batch, accumulation):
    plan = plan_of(f"run.max_batch={max_batch}", world_size=world_size)
    assert plan.batch == 1024
    assert plan.micro_batch == micro_batch
    assert plan.accumulation == accumulation


def test_a_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(UserError, match="batch=1024 cannot be shared evenly by 6 processes"):
        plan_of(world_size=6)
    with pytest.raises(UserError, match="batch=16384 is more than the 10000 videos"):
        plan_of("pretrain.batch=16384", world_size=8)


def test_each_rank_holds_the_rows_of_every_second_video():
    plan = plan_of("pretrain.batch=4", "pretrain.clips_per_video=2", world_size=2)
    rank0, = micro_batch_rows(plan, rank=0, world_size=2)
    rank1, = micro_batch_rows(plan, rank=1, world_size=2)
    assert rank0.tolist() == [0, 1, 4, 5]
    assert rank1.tolist() == [2, 3, 6, 7]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("max_batch", [0, 1])
def test_rows_of_all_ranks_make_the_global_batch(world_size, max_batch):
    plan = plan_of(
        "pretrain.batch=8", "pretrain.clips_per_video=2", f"run.max_batch={max_batch}",
        videos=20, world_size=world_size)

    def videos_read(rank, world_size):
        """The entries that a process reads in the first step."""
        order = data.training_order(20, plan.batch, 0, 1, 0, rank, world_size)
        return [i for _, i in order]

    global_batch = videos_read(rank=0, world_size=1)
    all_rows = []
    for rank in range(world_size):
        micro_batches = micro_batch_rows(plan, rank, world_size)
        assert len(micro_batches) == plan.accumulation
        for rows in micro_batches:
            assert len(rows) == plan.micro_batch * plan.repeats
        # They name the clips that this rank reads, in the order in which it reads them
        rows = torch.cat(micro_batches).tolist()
        clips = [video for video in videos_read(rank, world_size) for _ in range(plan.repeats)]
        assert clips == [global_batch[row // plan.repeats] for row in rows]
        all_rows += rows
    assert sorted(all_rows) == list(range(plan.batch * plan.repeats))


def test_no_weight_decay_on_vectors_and_learned_positions():
    model = ARVideo(**load_config([], "pretrain")["model"])
    table = model.encoder.positions
    del model.encoder.positions
    model.encoder.positions = torch.nn.Parameter(table)
    settings = dict(weight_decay=0.05, betas=[0.9, 0.95])
    optimizer = make_optimizer(model, settings, torch.device("cpu"))
    name_of = {id(p): name for name, p in model.named_parameters()}
    names = {}
    for group in optimizer.param_groups:
        names[group["weight_decay"]] = [name_of[id(p)] for p in group["params"]]
    assert names.keys() == {0.05, 0.0}
    for name in names[0.05]:
        assert name.endswith("weight") and "norm" not in name
    some = {"decoder.query", "encoder.norm.weight", "encoder.blocks.0.attn.q_bias",
            "encoder.positions"}
    assert some <= set(names[0.0])
    assert len(names[0.05]) + len(names[0.0]) == len(name_of)


def test_every_purpose_has_a_random_stream_of_its_own():
    streams = [
        (0, "sample", 0, 5),
        (0, "sample", 5),
        (0, "sample", 5, 0),
        (0, "sample", 0, 50),
        (0, "sample", 0, 0, 5),
        (1, "sample", 0, 5),
        (0, "epoch", 0, 5),
        (0, "epoch", 5),
        (0, "epoch"),
        (0, "sample"),
    ]
    assert len({stream_seed(*stream) for stream in streams}) == len(streams)
    # The same in every process and in every version of this file, so that results stay
    assert stream_seed(0, "sample", 0, 5) == 62773012501368414


@pytest.mark.parametrize("processes, workers", [(1, 15), (4, 3), (16, 1)])
def test_the_processes_of_a_machine_share_its_cores(monkeypatch, processes, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert train_pretrain.spare_cores() == workers


# --- What a run leaves ------------------------------------------------------


@pytest.fixture(scope="module")
def reference(toy, tmp_path_factory):
    """An undisturbed run of 6 steps: (folder, checkpoint, what it printed)."""
    output = tmp_path_factory.mktemp("runs") / "reference"
    checkpoint, printed, _ = pretrain(output, *toy_lists(toy), "pretrain.keep_epochs=1")
    return output, checkpoint, printed


@pytest.mark.slow
def test_a_run_leaves_checkpoints_log_and_pictures(reference):
    output, checkpoint, printed = reference
    names = [path.name for path in output.iterdir() if "events" not in path.name]
    assert sorted(names) == [
        "config.yaml", "epoch_0001.pt", "epoch_0002.pt", "last.pt", "lock", "log.jsonl",
        "predictions_0000.png", "predictions_0002.png"]
    assert checkpoint["step"] == 6
    assert "encoder.blocks.1.attn.qkv.weight" in checkpoint["model"]
    kept = torch.load(output / "epoch_0002.pt", weights_only=True)
    assert_equal(kept["model"], checkpoint["model"])
    assert yaml.safe_load((output / "config.yaml").read_text()) == checkpoint["config"]
    steps = [[1, 1], [2, 1], [3, 1], [4, 2], [5, 2], [6, 2]]
    assert log_of(output, "step", "epoch") == steps
    first_line = json.loads((output / "log.jsonl").read_text().splitlines()[0])
    assert {"loss", "lr", "norm", "clips_per_second", "data_share"} <= set(first_line)
    assert "8 = 1 processes x 1 accumulation steps x 8 videos" in printed
    assert f"lr {0.006 * 8 / 256:.3g} = 0.006 x 8 / 256" in printed


@pytest.mark.slow
def test_a_finished_run_trains_no_further(reference, monkeypatch, capsys):
    output, _, _ = reference
    before = (output / "last.pt").read_bytes()
    call_main(monkeypatch, output / "config.yaml")       # this run's own settings
    printed = capsys.readouterr()
    assert "already finished" in printed.out
    assert "step/s" not in printed.err
    assert (output / "last.pt").read_bytes() == before


def train_here(toy, output, *arguments):
    """Train in the test's own process, on 13 videos, of which 8 make an epoch of one step."""
    videos = toy / "val.txt"
    config = load_config(
        [*TINY, f"data.train={videos}", f"data.val={videos}", "run.workers=0",
         "pretrain.keep_epochs=0", f"run.output={output}", *arguments], "pretrain")
    train_pretrain.pretrain(config)


class Killed(Exception):
    """In place of a kill."""


@pytest.fixture
def saved(monkeypatch):
    """[(file, step or None), ...] of the checkpoints written from now on."""
    written = []
    save = train_pretrain.save_checkpoint

    def save_and_record(path, content):
        written.append((path.name, content.get("step")))
        save(path, content)

    monkeypatch.setattr(train_pretrain, "save_checkpoint", save_and_record)
    return written


def test_many_short_epochs_write_the_last_checkpoint_once(toy, tmp_path, saved):
    train_here(toy, tmp_path, "pretrain.epochs=8", "run.save_minutes=1000")
    assert saved == [("last.pt", 8)]


def test_without_minutes_between_them_a_checkpoint_follows_every_step(toy, tmp_path, saved):
    train_here(toy, tmp_path, "pretrain.epochs=4", "run.save_minutes=0")
    assert saved == [("last.pt", 1), ("last.pt", 2), ("last.pt", 3), ("last.pt", 4)]


def test_minutes_decide_how_many_checkpoints_twenty_epochs_write(
        toy, tmp_path, saved, monkeypatch):
    """On a clock where a step takes half a minute, five steps take more than 2.4 minutes."""
    steps_done = []
    step_is_logged = train_pretrain.Training.log_step

    def log_step(*arguments):
        steps_done.append(None)
        step_is_logged(*arguments)

    monkeypatch.setattr(train_pretrain.Training, "log_step", log_step)
    clock = SimpleNamespace(
        monotonic=lambda: 30 * len(steps_done), perf_counter=time.perf_counter)
    monkeypatch.setattr(train_pretrain, "time", clock)
    arguments = ["pretrain.epochs=20", "run.save_minutes=2.4"]
    train_here(toy, tmp_path / "undisturbed", *arguments)
    assert saved == [("last.pt", step) for step in (5, 10, 15, 20)]

    # Killed after step 8, a run has lost three steps, and repeats them bit for bit
    def be_killed(model, step, steps):
        if step == 8:
            raise Killed

    monkeypatch.setattr(ARVideo, "after_step", be_killed, raising=False)
    with pytest.raises(Killed):
        train_here(toy, tmp_path / "run", *arguments)
    assert saved[4:] == [("last.pt", 5)]
    monkeypatch.delattr(ARVideo, "after_step")
    train_here(toy, tmp_path / "run", *arguments)
    expected, found = (log_of(tmp_path / name, "step", "loss") for name in ("undisturbed", "run"))
    assert found == expected
    expected, found = (torch.load(tmp_path / name / "last.pt", weights_only=True)["model"]
                       for name in ("undisturbed", "run"))
    assert_equal(found, expected)


def test_weights_of_some_epochs_are_kept(toy, tmp_path, saved):
    train_here(
        toy, tmp_path, "pretrain.epochs=5", "pretrain.keep_epochs=2", "run.save_minutes=1000")
    assert saved == [("epoch_0002.pt", None), ("epoch_0004.pt", None), ("last.pt", 5)]
    early = torch.load(tmp_path / "epoch_0002.pt", weights_only=True)
    late = torch.load(tmp_path / "epoch_0004.pt", weights_only=True)
    assert early["epoch"] == 2
    assert late["epoch"] == 4
    name = "encoder.norm.weight"
    assert not torch.equal(early["model"][name], late["model"][name])


def test_every_clip_of_every_step_has_a_draw_of_its_own(toy, tmp_path, monkeypatch):
    drawn = []

    class Recorder(ARVideo):
        def forward(self, video, order, visible, predicted):
            drawn.append(visible.flatten(1))
            return super().forward(video, order, visible, predicted)

    monkeypatch.setattr(train_pretrain, "ARVideo", Recorder)
    train_here(toy, tmp_path, "pretrain.epochs=3", "pretrain.clips_per_video=2")
    drawn = torch.cat(drawn)
    assert len(drawn) == 3 * 8 * 2          # steps x videos x clips
    assert len(drawn.unique(dim=0)) == len(drawn)


def test_a_resumed_run_goes_on_counting_epochs_and_videos(toy, tmp_path):
    for epochs in (1, 2):
        train_here(toy, tmp_path, "pretrain.batch=4", f"pretrain.epochs={epochs}")
        checkpoint = torch.load(tmp_path / "last.pt", weights_only=True)
        assert checkpoint["tried"] == 3 * 4 * epochs            # steps x videos
    assert log_of(tmp_path, "step", "epoch") == [[1, 1], [2, 1], [3, 1], [4, 2], [5, 2], [6, 2]]


def test_every_step_is_in_training_mode_though_pictures_are_not(toy, tmp_path, monkeypatch):
    modes = []

    class Recorder(ARVideo):
        def forward(self, *arguments):
            modes.append(self.training)
            return super().forward(*arguments)

    monkeypatch.setattr(train_pretrain, "ARVideo", Recorder)
    train_here(toy, tmp_path, "pretrain.epochs=3", "pretrain.picture_epochs=1")
    assert modes == [True] * 3


@pytest.mark.parametrize("flip", [False, True])
def test_size_and_flip_reach_the_crop(toy, tmp_path, monkeypatch, flip):
    asked = set()
    crop = data.pretraining_clip

    def record(clip, size, flip):
        asked.add((size, flip))
        return crop(clip, size, flip)

    monkeypatch.setattr(data, "pretraining_clip", record)
    train_here(toy, tmp_path, "pretrain.epochs=1", f"pretrain.flip={str(flip).lower()}")
    assert asked == {(32, flip)}


def test_pictures_show_videos_of_data_val(toy, tmp_path, monkeypatch):
    paths = []
    read_clips = data.read_clips

    def record(path, choose):
        paths.append(Path(path))
        return read_clips(path, choose)

    monkeypatch.setattr(data, "read_clips", record)
    # toy_lists trains on the videos of val.txt, so here the lists are exchanged
    train_here(toy, tmp_path, f"data.val={toy / 'train.txt'}", "pretrain.epochs=1",
               "pretrain.picture_epochs=1")
    shown = [path.name for path in paths if path.parent.name == "train"]
    assert shown == ["00000.mp4", "00012.mp4"] * 2              # before training and after


# --- Forks ------------------------------------------------------------------


class Fork(ARVideo):
    """A moving average of the encoder, larger clusters later, and one more draw."""
    killed_at = None

    def __init__(self, **model):
        super().__init__(**model)
        self.average = copy.deepcopy(self.encoder).requires_grad_(False)

    def before_step(self, step, steps):
        shape = (2, 2, 2) if step < steps // 2 else (2, 4, 4)
        self.set_clusters(shape)

    @torch.no_grad()
    def after_step(self, step, steps):
        if step == self.killed_at:
            raise Killed
        for slow, fast in zip(self.average.parameters(), self.encoder.parameters()):
            slow.lerp_(fast, 0.1)

    def draw(self, batch, generator=None):
        drawn = super().draw(batch, generator)
        return *drawn, torch.rand(batch, generator=generator)

    def forward(self, video, *drawn):
        *drawn, weight = drawn
        return weight.mean() * super().forward(video, *drawn)

    def reconstruct(self, video, *drawn):
        return super().reconstruct(video, *drawn[:-1])


def test_a_fork_with_state_and_a_schedule_resumes_exactly(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(train_pretrain, "ARVideo", Fork)
    arguments = ["pretrain.epochs=6", "pretrain.picture_epochs=1"]
    train_here(toy, tmp_path / "undisturbed", *arguments)
    for step in (2, 5):                                 # before and after the clusters change
        monkeypatch.setattr(Fork, "killed_at", step)
        with pytest.raises(Killed):
            train_here(toy, tmp_path / "run", *arguments, "run.save_minutes=0")
    monkeypatch.setattr(Fork, "killed_at", None)
    train_here(toy, tmp_path / "run", *arguments)
    expected, found = (torch.load(tmp_path / name / "last.pt", weights_only=True)
                       for name in ("undisturbed", "run"))
    assert found["step"] == 6
    assert_equal(found["model"], expected["model"])
    # The average has moved, and is not the encoder
    slow = found["model"]["average.patch_embed.proj.weight"]
    fast = found["model"]["encoder.patch_embed.proj.weight"]
    assert not torch.equal(slow, fast)


def test_a_picture_that_a_fork_cannot_draw_fails_before_the_first_step(
        toy, tmp_path, monkeypatch):
    monkeypatch.setattr(Fork, "reconstruct", lambda self, video, *, drawn: None)
    monkeypatch.setattr(train_pretrain, "ARVideo", Fork)
    with pytest.raises(TypeError, match="positional arguments"):
        train_here(toy, tmp_path, "pretrain.epochs=2")
    assert (tmp_path / "log.jsonl").read_text() == ""
    train_here(toy, tmp_path, "pretrain.epochs=2", "pretrain.picture_epochs=0")
    assert log_of(tmp_path, "step") == [[1], [2]]
    assert not list(tmp_path.glob("*.png"))


def test_a_run_that_resumes_with_other_code_says_so(toy, tmp_path, monkeypatch, capsys):
    train_here(toy, tmp_path, "pretrain.epochs=1")
    train_here(toy, tmp_path, "pretrain.epochs=2")
    assert "have changed" not in capsys.readouterr().out
    changed = tmp_path / "changed.py"
    changed.write_text((ROOT / "arvideo.py").read_text() + "# A fork\n")
    monkeypatch.setattr(sys.modules["arvideo"], "__file__", str(changed))
    train_here(toy, tmp_path, "pretrain.epochs=3")
    printed = capsys.readouterr().out
    assert printed.count("The files that define the model have changed since") == 1


# --- Equal runs -------------------------------------------------------------


def assert_same_training(output, checkpoint, reference, exact):
    reference_output, expected, _ = reference
    tolerance = dict(rtol=0, atol=0) if exact else dict(rtol=1e-3, atol=2e-5)
    losses = torch.tensor(log_of(output, "loss", "lr"))
    expected_losses = torch.tensor(log_of(reference_output, "loss", "lr"))
    torch.testing.assert_close(losses, expected_losses, **tolerance)
    torch.testing.assert_close(checkpoint["model"], expected["model"], **tolerance)
    if exact:
        assert_equal(checkpoint["optimizer"]["state"], expected["optimizer"]["state"])


@pytest.mark.slow
def test_two_accumulation_steps_equal_one(toy, reference, tmp_path):
    checkpoint, printed, _ = pretrain(tmp_path / "run", *toy_lists(toy), "run.max_batch=4")
    assert "8 = 1 processes x 2 accumulation steps x 4 videos" in printed
    assert_same_training(tmp_path / "run", checkpoint, reference, exact=False)


@pytest.mark.slow
def test_two_processes_equal_one(toy, reference, tmp_path):
    checkpoint, printed, _ = pretrain(tmp_path / "run", *toy_lists(toy), processes=2)
    assert "8 = 2 processes x 1 accumulation steps x 4 videos" in printed
    assert_same_training(tmp_path / "run", checkpoint, reference, exact=False)


def descendants(pid):
    """The processes that a process has started, and those that these have started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    found = []
    for child in map(int, children):
        found += [child, *descendants(child)]
    return found


@pytest.mark.slow
def test_a_signal_saves_first_and_the_resumed_run_equals_the_undisturbed(toy, reference, tmp_path):
    output = tmp_path / "run"
    script = Script("train_pretrain.py", *toy_lists(toy), output=output)
    script.wait_for_steps(1)
    workers = descendants(script.pid)
    assert workers
    for pid in [script.pid, *workers]:                  # the workers too, as a cluster does it
        os.kill(pid, signal.SIGTERM)
    _, err = script.finish(status=1)
    step = torch.load(output / "last.pt", weights_only=True)["step"]
    assert step < 6
    assert f"stopped by a signal after step {step}" in err
    assert "Traceback" not in err
    checkpoint, _, _ = pretrain(output, *toy_lists(toy))
    assert_same_training(output, checkpoint, reference, exact=True)


# --- Runs that stop ---------------------------------------------------------


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(toy, tmp_path):
    checkpoint, _, err = pretrain(
        tmp_path / "run", *toy_lists(toy), "pretrain.lr=1e30", "pretrain.clip_norm=0.0",
        "run.save_minutes=0", status=1)
    assert "the gradient's norm" in err
    assert "Traceback" not in err
    for tensor in checkpoint["model"].values():
        assert tensor.isfinite().all()


def test_a_gradient_that_is_no_number_stops_before_the_update(toy, tmp_path, monkeypatch):
    class Cliff(ARVideo):
        def forward(self, *arguments):
            return 1 + (super().forward(*arguments) * 0).sqrt()     # 1, but its gradient is NaN

    monkeypatch.setattr(train_pretrain, "ARVideo", Cliff)
    with pytest.raises(UserError, match="step 1: the loss is 1.0, the gradient's norm nan"):
        train_here(toy, tmp_path, "pretrain.epochs=1")
    assert not (tmp_path / "last.pt").exists()


@pytest.mark.slow
def test_too_many_unreadable_videos_stop_the_run(toy, tmp_path):
    # Four of 28 videos are no videos
    broken = [f"broken{i}.mp4" for i in range(4)]
    for name in broken:
        (tmp_path / name).write_text("hello")
    lines = (toy / "train.txt").read_text().splitlines()
    lines += [f"{name} 0" for name in broken]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    arguments = [
        f"data.root={toy}", f"data.train={tmp_path / 'list.txt'}", "data.val=",
        "pretrain.epochs=6"]

    _, _, err = pretrain(tmp_path / "run", *arguments, status=1)
    assert "videos tried were unreadable, more than data.max_unreadable=0.05" in err
    assert "Traceback" not in err
    # Each is named, and only once
    for name in broken:
        assert err.count(f"{tmp_path / name}: ") == 1

    _, out, _ = pretrain(tmp_path / "run", *arguments, "data.max_unreadable=0.5")
    assert "finished" in out


# --- Precision and compilation ----------------------------------------------


def tiny_loss():
    """(model, video, what draw gives, the loss in fp32) of a tiny model."""
    torch.manual_seed(0)
    model = ARVideo(**load_config(TINY, "pretrain")["model"])
    video = torch.randn(2, 3, 8, 32, 32)
    draw = model.draw(2)
    return model, video, draw, model(video, *draw).item()


def test_mixed_precision_agrees():
    model, video, draw, exact = tiny_loss()
    machine = Machine(dict(device="cpu", precision="bf16", workers=0, compile=False))
    with machine.autocast():
        loss = model(video, *draw).item()
    assert loss != exact
    assert loss == pytest.approx(exact, rel=1e-2)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")),
                    reason="torch.compile needs a C++ compiler")
def test_compilation_agrees():
    model, video, draw, exact = tiny_loss()
    compiled = torch.compile(model)
    assert compiled(video, *draw).item() == pytest.approx(exact, rel=1e-4)
