"""Transfer: weights in and out, what is trained, and a test that counts every video once."""

import argparse
import csv
import json
import shutil
from functools import partial
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, Script, assert_equal, finetune, toy_lists
from torchvision.transforms.v2 import CutMix, MixUp

import data
import train_finetune
import train_pretrain
from arvideo import ARVideo, pretrained_encoder, video_to_cubes
from data import UserError
from train_finetune import (
    Classifier, Probe, Result, accuracy, adopt_settings, begin, build_model, encoder_arguments,
    evaluate, finetuned_classifier, load_weights, read_test_list)
from train_pretrain import Machine, given_settings, load_config, make_optimizer

LETTERS = list("abcdefgh")          # names of eight classes


def tiny_config(*arguments):
    return load_config([*TINY, *map(str, arguments)], "finetune")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """(path, model): what fine-tuning reads of a pretraining's last.pt, of an untrained model."""
    config = load_config(TINY, "pretrain")
    torch.manual_seed(5)
    model = ARVideo(**config["model"])
    path = tmp_path_factory.mktemp("pretrained") / "last.pt"
    torch.save(dict(model=model.state_dict(), config=config, step=1), path)
    return path, model


# --- The model --------------------------------------------------------------


def kinetics_classifier():
    """The classifier of preset k400, without memory for its weights."""
    with torch.device("meta"):
        arguments = encoder_arguments(load_config(["k400"], "finetune")["model"])
        return Classifier(400, 0.1, 0.0, **arguments)


def adamw(model, **scale):
    settings = dict(weight_decay=0.05, betas=[0.9, 0.999])
    return make_optimizer(model, settings, torch.device("cpu"), **scale)


def test_classifier_is_the_bidirectional_encoder_with_a_new_norm(pretrained):
    path, source = pretrained
    config = tiny_config()
    model = build_model(config, 8).eval()
    load_weights(model, path, None)
    video = torch.randn(2, 3, 8, 32, 32)

    cubes = video_to_cubes(video, source.cube)
    tokens = source.encoder.patch_embed(cubes) + source.encoder.positions
    for block in source.encoder.blocks:
        tokens = block(tokens)
    assert tokens.shape == (2, 256, 32)
    pooled = F.layer_norm(tokens.mean(1), (32,), eps=1e-6)
    expected = F.linear(pooled, model.head.weight, model.head.bias)
    torch.testing.assert_close(model(video), expected)


def test_head_starts_near_zero_and_drop_path_grows_with_depth():
    model = kinetics_classifier()
    probabilities = [block.drop_path.p for block in model.blocks]
    assert probabilities == pytest.approx([0.1 * i / 11 for i in range(12)])
    million = sum(p.numel() for p in model.parameters()) / 1e6
    assert round(million, 1) == 86.5
    head = train_finetune.linear_head(768, 400)
    assert head.weight.std().item() == pytest.approx(2e-5, rel=0.05)
    assert not head.bias.any()


def test_layer_decay():
    model = kinetics_classifier()
    optimizer = adamw(model, scale=train_finetune.layer_decay(12, 0.75))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    scale = {}
    weight_decay = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            scale[names[id(parameter)]] = group["scale"]
            weight_decay[names[id(parameter)]] = group["weight_decay"]
    assert scale.keys() == weight_decay.keys() == set(names.values())

    assert scale["patch_embed.proj.weight"] == 0.75 ** 13
    assert scale["patch_embed.proj.bias"] == 0.75 ** 13
    assert train_finetune.layer_decay(12, 0.75)("positions") == 0.75 ** 13      # of a fork
    for i in range(12):
        assert scale[f"blocks.{i}.attn.q_bias"] == 0.75 ** (12 - i)
    assert scale["fc_norm.bias"] == 1
    assert scale["head.weight"] == 1
    assert weight_decay["head.weight"] == 0.05
    assert weight_decay["head.bias"] == 0
    assert weight_decay["fc_norm.weight"] == 0


@pytest.mark.parametrize("attentive", [False, True])
def test_probe_leaves_the_encoder_bit_identical(attentive):
    torch.manual_seed(0)
    model = Probe(8, attentive, **encoder_arguments(tiny_config()["model"])).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = adamw(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    for _ in range(3):
        logits = model(torch.randn(4, 3, 8, 32, 32))
        F.cross_entropy(logits, torch.arange(4)).backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        is_unchanged = torch.equal(tensor, before[name])
        assert is_unchanged == name.startswith("encoder."), name


# --- Weights in and out -----------------------------------------------------


OFFICIAL_BLOCK = [
    "norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.q_bias", "attn.v_bias",
    "attn.proj.weight", "attn.proj.bias", "norm2.weight", "norm2.bias",
    "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"]


def official_names(last_norm):
    """VideoMAE's names of an encoder of two blocks."""
    names = {"patch_embed.proj.weight", "patch_embed.proj.bias",
             f"{last_norm}.weight", f"{last_norm}.bias"}
    for i in range(2):
        names.update(f"blocks.{i}.{name}" for name in OFFICIAL_BLOCK)
    return names


def write_official_file(path, source, **changes):
    """VideoMAE's pretraining file: an encoder, a decoder, and a Namespace beside the weights.

    `changes` are weights to add or, if None, to leave out.
    """
    weights = {}
    assert set(source.encoder.state_dict()) == official_names("norm")
    for name, tensor in source.encoder.state_dict().items():
        weights[f"encoder.{name}"] = tensor
    weights["mask_token"] = torch.zeros(1, 1, 16)
    weights["encoder_to_decoder.weight"] = torch.zeros(16, 32)
    weights["decoder.blocks.0.attn.qkv.weight"] = torch.zeros(48, 16)
    weights["decoder.norm.weight"] = torch.ones(16)
    weights.update(changes)
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    torch.save(dict(model=weights, args=argparse.Namespace(lr=1.0), epoch=3), path)
    return path


def save_weights(path, weights, **about):
    torch.save(dict(model=weights, **about), path)
    return path


def test_official_pretraining_loads_and_our_classifier_has_official_names(pretrained, tmp_path):
    _, source = pretrained
    config = tiny_config()
    model = build_model(config, 8)
    path = write_official_file(tmp_path / "official.pth", source)
    sentence, complete = load_weights(model, path, None)
    assert "28 tensors of the encoder" in sentence
    assert "left behind: decoder, encoder_to_decoder, mask_token, norm" in sentence
    assert not complete
    weights = model.state_dict()
    assert set(weights) == official_names("fc_norm") | {"head.weight", "head.bias"}
    for name, tensor in source.encoder.state_dict().items():
        if not name.startswith("norm."):
            assert_equal(weights[name], tensor)

    # A probe keeps the final norm
    probe = build_model(tiny_config("finetune.probe=linear"), 8)
    sentence, _ = load_weights(probe, path, None)
    assert "30 tensors" in sentence
    assert_equal(probe.encoder.state_dict(), source.encoder.state_dict())


def test_a_classifier_is_taken_whole_only_if_its_classes_are_the_same(tmp_path):
    config = tiny_config()
    model = build_model(config, 8)
    weights = model.state_dict()

    # As VideoMAE's fine-tuning script writes it: without the names of the classes
    unnamed = save_weights(tmp_path / "unnamed.pt", weights)
    again = build_model(config, 8)
    _, complete = load_weights(again, unnamed, None)
    assert complete
    assert_equal(again.state_dict(), weights)

    named = save_weights(tmp_path / "named.pt", weights, classes=LETTERS)
    _, complete = load_weights(again, named, LETTERS)
    assert complete

    # As many classes, but others; and fewer classes: a new head
    _, complete = load_weights(again, named, list("abcdefgx"))
    assert not complete
    fewer = build_model(config, 5)
    sentence, complete = load_weights(fewer, unnamed, None)
    assert "left behind: fc_norm, head" in sentence
    assert not complete


def test_unknown_weights_are_refused_in_a_classifiers_file_but_not_in_a_pretrainings(
        pretrained, tmp_path):
    _, source = pretrained
    config = tiny_config()
    model = build_model(config, 8)
    teacher = {"teacher.weight": torch.zeros(3)}
    path = save_weights(tmp_path / "classifier.pt", {**model.state_dict(), **teacher})
    with pytest.raises(UserError, match='Unexpected key.*"teacher.weight"'):
        load_weights(model, path, None)

    # A fork's pretraining may hold more than ours
    path = write_official_file(tmp_path / "pretraining.pth", source, **teacher)
    sentence, _ = load_weights(model, path, None)
    assert "left behind: decoder, encoder_to_decoder, mask_token, norm, teacher" in sentence


@pytest.mark.parametrize("changes, culprit", [
    ({"encoder.blocks.1.attn.q_bias": None},
     'Missing key.*"blocks.1.attn.q_bias"'),
    ({"encoder.blocks.1.attn.k_bias": torch.zeros(32)},
     'Unexpected key.*"blocks.1.attn.k_bias"'),
    ({"encoder.patch_embed.proj.weight": torch.zeros(32, 3, 2, 8, 8)},
     r"size mismatch for patch_embed.proj.weight: .*\[32, 3, 2, 8, 8\].*\[32, 3, 2, 4, 4\]"),
], ids=["missing", "unexpected", "reshaped"])
def test_weights_that_do_not_fit_are_refused_by_name(pretrained, tmp_path, changes, culprit):
    _, source = pretrained
    config = tiny_config()
    path = write_official_file(tmp_path / "file.pth", source, **changes)
    with pytest.raises(UserError, match=culprit):
        load_weights(build_model(config, 8), path, None)


RECIPES = {
    "k400": dict(epochs=100, batch=512, lr=1e-3, min_lr=1e-6, warmup_epochs=5, weight_decay=0.05,
                 betas=[0.9, 0.999], layer_decay=0.75, drop_path=0.1, head_dropout=0.0,
                 label_smoothing=0.1, mixup=0.8, cutmix=1.0, rand_augment=[4, 7.0], erase=0.25,
                 flip=True),
    "ssv2": dict(epochs=50, batch=512, lr=5e-4, layer_decay=0.75, drop_path=0.1, erase=0.25,
                 flip=False),
    "hmdb51": dict(batch=128, clips_per_video=2, lr=5e-4, min_lr=1e-5, layer_decay=0.7,
                   drop_path=0.2, head_dropout=0.5, flip=True),
    "k400 linear": dict(epochs=20, lr=2e-2, weight_decay=0.0, label_smoothing=0.0, mixup=0.0,
                        cutmix=0.0, rand_augment=[0, 0.0], erase=0.0),
    "k400 attentive": dict(epochs=20, lr=1e-3, weight_decay=0.05, label_smoothing=0.0, mixup=0.0,
                           cutmix=0.0, rand_augment=[0, 0.0], erase=0.0)}
RECIPES["ucf101"] = RECIPES["hmdb51"]


@pytest.mark.parametrize("presets", RECIPES)
def test_presets_have_the_recipes_of_videomae_and_v_jepa(presets):
    settings = load_config(presets.split(), "finetune")["finetune"]
    assert {key: settings[key] for key in RECIPES[presets]} == RECIPES[presets]


# --- How a run begins -------------------------------------------------------


def test_init_is_the_pretraining_of_the_same_presets():
    for words, expected in (
            (["toy"], "runs/toy/pretrain/last.pt"),
            (["toy", "linear"], "runs/toy/pretrain/last.pt"),
            (["ssv2", "large", "linear"], "runs/ssv2-large/pretrain/last.pt"),
            (["hmdb51"], "runs/k400/pretrain/last.pt"),
            (["k400", "finetune.init=scratch"], "scratch"),
            (["k400", "finetune.init=other.pt"], "other.pt")):
        assert load_config(words, "finetune")["finetune"]["init"] == expected


def test_a_run_begins_in_the_first_of_four_ways_that_applies(pretrained, tmp_path):
    """Ways 1 and 2 are tried where later ones would apply, 3 and 4 where no earlier one does."""
    init, source = pretrained
    output = tmp_path / "run"
    output.mkdir()
    last = output / "last.pt"
    torch.manual_seed(6)
    tested = build_model(tiny_config(), 8)
    save_weights(last, tested.state_dict(), classes=LETTERS, step=4)

    def start(*arguments):
        """(sentence, weights) of a new model that begins so."""
        config = tiny_config(f"run.output={output}", *arguments)
        torch.manual_seed(7)
        model = build_model(config, 8)
        sentence = begin(model, config, LETTERS)
        return sentence, model.state_dict()

    torch.manual_seed(7)
    random = build_model(tiny_config(), 8).state_dict()

    # 1. A test takes the classifier of this run, or of finetune.init
    sentence, weights = start("finetune.test_only=true")
    assert f"all weights, the classifier's too, from {last} after step 4" in sentence
    assert_equal(weights, tested.state_dict())
    other = save_weights(tmp_path / "other.pt", random, classes=LETTERS)
    sentence, weights = start("finetune.test_only=true", f"finetune.init={other}")
    assert str(other) in sentence
    assert_equal(weights, random)
    with pytest.raises(UserError, match="last.pt holds no Classifier of these classes"):
        start("finetune.test_only=true", f"finetune.init={init}")

    # 2. A run with a checkpoint resumes; its weights are loaded with the optimizer, later
    for choice in ("scratch", init):
        sentence, weights = start(f"finetune.init={choice}")
        assert sentence == f"{last}, resumed"
        assert_equal(weights, random)

    # 3. From scratch
    last.unlink()
    sentence, weights = start("finetune.init=scratch")
    assert sentence == "scratch"
    assert_equal(weights, random)

    # 4. From the encoder in finetune.init
    sentence, weights = start(f"finetune.init={init}")
    assert f"28 tensors of the encoder from {init} after step 1" in sentence
    for name, tensor in source.encoder.state_dict().items():
        if not name.startswith("norm."):
            assert_equal(weights[name], tensor)
    assert_equal(weights["head.weight"], random["head.weight"])


def save_settings(path, config, **about):
    """A checkpoint without weights that matter, made with these settings."""
    torch.save(dict(model={"head.weight": torch.zeros(8, 32)}, config=config, **about), path)
    return path


def test_dropout_precedes_the_head_in_training_alone():
    torch.manual_seed(0)
    model = build_model(tiny_config("finetune.head_dropout=0.5"), 8)
    video = torch.randn(2, 3, 8, 32, 32)
    seen = []
    model.head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    model.train()(video)
    model.eval()(video)
    assert 0.3 < (seen[0] == 0).float().mean() < 0.7
    assert not (seen[1] == 0).any()


def test_a_forks_classifier_is_not_taken_for_ours(tmp_path, monkeypatch):
    """It has the same parameters, but another forward pass."""
    class FirstToken(train_finetune.Classifier):
        def forward(self, video):
            return self.head(self.fc_norm(self.encode(video_to_cubes(video, self.cube))[:, 0]))

    config = tiny_config("finetune.test_only=true", f"finetune.init={tmp_path / 'fork.pt'}")
    content = dict(model=build_model(config, 8).state_dict(), model_class="FirstToken",
                   config=config, classes=LETTERS)
    torch.save(content, tmp_path / "fork.pt")
    with pytest.raises(ValueError, match="class FirstToken: first set train_finetune.Classifier"):
        finetuned_classifier(content)
    with pytest.raises(UserError, match="fork.pt holds no Classifier of these classes"):
        begin(build_model(config, 8), config, LETTERS)

    monkeypatch.setattr(train_finetune, "Classifier", FirstToken)
    assert isinstance(finetuned_classifier(content)[0], FirstToken)
    assert "all weights" in begin(build_model(config, 8), config, LETTERS)


def test_the_pretrained_clip_comes_from_the_checkpoint(pretrained, tmp_path):
    init, source = pretrained
    output = f"run.output={tmp_path}"

    def adopted(path, *arguments):
        """(model.pretrained_clip, what is printed) of a run that begins from `path`."""
        config = tiny_config(f"finetune.init={path}", output, *arguments)
        _, lines = adopt_settings(config, given=set())
        return config["model"]["pretrained_clip"], lines

    # Ours know it, and those fine-tuned at another size remember it
    assert adopted(init, "model.size=48") == ([8, 32], [])
    tuned = tiny_config("model.size=48", "model.pretrained_clip=[8,32]")
    tuned = save_settings(tmp_path / "tuned.pt", tuned)
    assert adopted(tuned, "model.frames=12") == ([8, 32], [])
    with pytest.raises(UserError, match=r"pretrained_clip is \[8, 48\], but .* with \[8, 32\]"):
        adopted(tuned, "model.pretrained_clip=[8,48]")

    # VideoMAE's do not
    official = write_official_file(tmp_path / "official.pth", source)
    clip, (line,) = adopted(official)
    assert clip == [16, 224]
    assert "official.pth was pretrained on clips of 16 frames, 224 x 224, as VideoMAE's" in line
    assert adopted(official, "model.pretrained_clip=[8,32]") == ([8, 32], [])

    # A run that resumes asks its own checkpoint alone; one from scratch has none
    assert adopted("scratch") == ([0, 0], [])
    save_settings(tmp_path / "last.pt", tiny_config("model.pretrained_clip=[4,16]"))
    assert adopted("gone.pt") == ([4, 16], [])


def test_a_test_takes_its_settings_from_the_checkpoint_but_for_those_given(tmp_path):
    trained = tiny_config("data.stride=3", "finetune.sampling=segments", "model.size=48")
    path = save_settings(tmp_path / "tuned.pt", trained, classes=LETTERS)
    words = [f"finetune.init={path}", "finetune.test_only=true", "model.frames=12"]
    config = tiny_config(*words)
    classes, (line,) = adopt_settings(config, given_settings(words))
    assert classes == LETTERS
    assert line.endswith(
        f"finetune.sampling=segments, data.stride=3, model.size=48, from {path}")
    assert config["finetune"]["sampling"] == "segments"
    assert config["data"]["stride"] == 3
    assert config["model"]["size"] == 48
    assert config["model"]["frames"] == 12
    assert config["model"]["pretrained_clip"] == [8, 48]


def test_labels_of_a_test_are_numbered_by_the_checkpoints_classes(toy, tmp_path):
    settings = {"root": str(toy), "train": "", "val": str(tmp_path / "val.txt"), "test": ""}
    listed = tmp_path / "val.txt"
    listed.write_text("val/00000.mp4 0\nval/00001.mp4 7\n")
    names = tmp_path / "classes.txt"

    def labels():
        return [entry.label for entry in read_test_list(settings, LETTERS).test]

    # Numbers alone, and the same names, agree with the checkpoint's
    assert labels() == [0, 7]
    names.write_text("\n".join(LETTERS))
    assert labels() == [0, 7]
    names.write_text("\n".join("abxdefgh"))
    with pytest.raises(UserError, match="names other classes .*: class 2 is x, not c"):
        labels()
    names.write_text("\n".join("abcdefg"))
    with pytest.raises(UserError, match="class 7 is missing, not h"):
        labels()

    # A folder of class folders
    for name in "ch":
        (tmp_path / "videos" / name).mkdir(parents=True)
        shutil.copy(toy / "val" / "00000.mp4", tmp_path / "videos" / name)
    settings["val"] = str(tmp_path / "videos")
    assert labels() == [2, 7]
    (tmp_path / "videos" / "h").rename(tmp_path / "videos" / "hop")
    with pytest.raises(UserError, match="class 'hop' is not among the 8 known ones, first a, b, c"):
        labels()

    # data.test comes before data.val, and needs no labels
    settings["test"] = str(toy / "val")
    lists = read_test_list(settings, LETTERS)
    assert len(lists.test) == 13
    assert lists.test[0].label is None


def test_a_checkpoint_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments, culprit in (
            ([], "runs/toy/pretrain/last.pt: there is no such checkpoint"),
            (["finetune.init=gone.pt"], "gone.pt: there is no such checkpoint"),
            (["finetune.test_only=true"],
             "runs/toy/finetune/last.pt: there is no such checkpoint")):
        config = tiny_config(*arguments)
        with pytest.raises(UserError, match=culprit):
            begin(build_model(config, 8), config, LETTERS)


# --- Augmentation -----------------------------------------------------------


@pytest.mark.parametrize("kind", [CutMix, MixUp])
def test_mixing_takes_the_same_part_of_all_frames_of_another_video(kind):
    """Four videos, two clips of each. A clip's pixels tell which videos it is mixed from.

    Its target must tell how much of each.
    """
    torch.manual_seed(0)
    mix = kind(alpha=1.0 if kind is CutMix else 0.8, num_classes=4)
    labels = torch.arange(4).repeat_interleave(2)
    colours = F.one_hot(labels)[:, :3].float()                      # video 3 is black
    clips = colours[:, :, None, None, None].expand(-1, -1, 4, 16, 16)
    for _ in range(20):
        mixed, targets = train_finetune.mix_videos(clips, labels, [mix], repeats=2)
        assert (mixed == mixed[:, :, :1]).all()                     # every frame alike
        share = mixed.mean((2, 3, 4))
        torch.testing.assert_close(share, targets[:, :3], atol=1e-5, rtol=0)
        torch.testing.assert_close(targets.sum(1), torch.ones(8))
        assert ((targets > 0).sum(1) <= 2).all()
        is_mixed = targets.max(1).values < 1
        assert is_mixed.all() or not is_mixed.any()         # no clip with one of its own video
        if kind is CutMix:
            assert ((mixed == 0) | (mixed == 1)).all()              # one box, nothing blended
        else:
            assert (mixed == mixed[..., :1, :1]).all()              # no box, all blended
    assert is_mixed.all()                                       # the last time, something was


def test_erasing_takes_one_box_in_all_frames():
    torch.manual_seed(0)
    clip = torch.zeros(5, 3, 40, 40, dtype=torch.uint8)
    areas = []
    for _ in range(200):
        erased = data.random_erasing(clip, 1.0)
        touched = (erased != 0).any(1).any(0)                       # in some frame, [H, W]
        rows = touched.any(1).nonzero()
        columns = touched.any(0).nonzero()
        box = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
        assert touched[box].all()
        # Noise is rarely black: nearly all values of the box have changed in every frame
        assert (erased[(..., *box)] != 0).float().mean() > 0.8
        assert not torch.equal(erased[0], erased[1])                # new noise in every frame
        areas.append(touched[box].numel() / 1600)
    assert 0.01 < min(areas) < 0.05
    assert 0.25 < max(areas) < 0.36
    assert_equal(data.random_erasing(clip, 0.0), clip)


def test_augmentation_is_the_same_in_all_frames():
    frame = torch.randint(0, 256, (1, 3, 60, 80), dtype=torch.uint8)
    augment = partial(
        data.finetuning_clip, size=32, flip=True, crop_area=[0.08, 1.0],
        rand_augment_strength=[4, 7.0], erase=0.0)
    changed = 0
    for seed in range(60):
        torch.manual_seed(seed)
        clip = augment(frame.expand(4, -1, -1, -1))
        assert clip.shape == (4, 3, 32, 32)
        assert clip.dtype == torch.uint8
        assert (clip == clip[:1]).all()
        torch.manual_seed(seed)
        operations = data.draw_operations(4, 7.0)
        whole = data.rand_augment(frame, operations)
        changed += not torch.equal(whole, frame)
    # All four operations are left out once in sixteen
    assert changed > 45


def test_mixup_and_cutmix_take_turns():
    torch.manual_seed(0)
    taken = []

    def recorded(name):
        def mix(clips, labels):
            taken.append(name)
            return clips, labels
        return mix

    for _ in range(100):
        train_finetune.mix_videos(torch.zeros(2, 3, 1, 4, 4), torch.arange(2),
                                  [recorded("mixup"), recorded("cutmix")], repeats=1)
    assert 30 < taken.count("mixup") < 70


# --- A run in the test's own process ----------------------------------------


def finetune_here(toy, output, *arguments):
    """Fine-tune on 24 videos: 3 steps an epoch, 2 epochs."""
    train_finetune.finetune(tiny_config(
        *toy_lists(toy), "finetune.init=scratch", "run.workers=0", f"run.output={output}",
        *arguments))


def test_every_micro_batch_mixes_and_drops_by_a_seed_of_its_own(toy, tmp_path, monkeypatch):
    seeds = []

    class Recorder(train_finetune.Classifier):
        def forward(self, video):
            if self.training:
                seeds.append(torch.initial_seed())
            return super().forward(video)

    monkeypatch.setattr(train_finetune, "Classifier", Recorder)
    finetune_here(toy, tmp_path, "run.max_batch=4")
    assert len(seeds) == len(set(seeds)) == 2 * 3 * 2       # epochs x steps x micro-batches


def test_mixup_and_cutmix_have_parameters_of_their_own(toy, tmp_path, monkeypatch):
    asked = {}

    def recorded(name, kind):
        def make(alpha, num_classes):
            asked[name] = alpha
            return kind(alpha=alpha, num_classes=num_classes)
        return make

    monkeypatch.setattr(train_finetune, "MixUp", recorded("mixup", MixUp))
    monkeypatch.setattr(train_finetune, "CutMix", recorded("cutmix", CutMix))
    finetune_here(toy, tmp_path, "finetune.mixup=0.4", "finetune.cutmix=0.7", "finetune.epochs=1")
    assert asked == {"mixup": 0.4, "cutmix": 0.7}


def test_label_smoothing_changes_the_loss(toy, tmp_path):
    """For logits of about zero it would not, so the classifier is sure of its class."""
    class Sure(train_finetune.Classifier):
        def forward(self, video):
            return super().forward(video) + 9 * torch.eye(8)[0]

    losses = []
    for smoothing in (0.0, 0.5):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_finetune, "Classifier", Sure)
            finetune_here(toy, tmp_path / str(smoothing), "finetune.epochs=1",
                          f"finetune.label_smoothing={smoothing}")
        first, *_ = (tmp_path / str(smoothing) / "log.jsonl").read_text().splitlines()
        losses.append(json.loads(first)["loss"])
    # Half of each target moves to the mean over the classes: one eighth of it is class 0
    assert losses[0] != pytest.approx(losses[1], abs=0.1)


def test_layers_learn_at_rates_of_their_own(toy, tmp_path):
    finetune_here(toy, tmp_path, "finetune.layer_decay=0.5", "finetune.epochs=1")
    checkpoint = torch.load(tmp_path / "last.pt", weights_only=True)
    rates = {group["lr"] for group in checkpoint["optimizer"]["param_groups"]}
    top = max(rates)
    assert top > 0
    # Head, two blocks and the cube embedding
    assert {rate / top for rate in rates} == {1, 0.5, 0.25, 0.125}


def test_validation_takes_data_val_and_the_test_data_test(toy, tmp_path, monkeypatch):
    counts = []
    modes = []

    def record(model, entries, *settings, **views):
        counts.append(len(entries))
        results = evaluate(model, entries, *settings, **views)
        modes.append(model.training)
        return results

    monkeypatch.setattr(train_finetune, "evaluate", record)
    finetune_here(toy, tmp_path, f"data.test={toy / 'train.txt'}")
    assert counts == [13, 13, 24]           # two validations, then the test
    assert modes == [False] * 3


def test_a_checkpoint_follows_every_validation(toy, tmp_path, monkeypatch):
    written = []
    save = train_pretrain.save_checkpoint

    def record(path, content):
        written.append((path.name, content["step"]))
        save(path, content)

    monkeypatch.setattr(train_pretrain, "save_checkpoint", record)
    finetune_here(toy, tmp_path, "run.save_minutes=1000")
    assert written == [("last.pt", 3), ("last.pt", 6)]


def test_a_resumed_run_keeps_the_best_weights(toy, tmp_path, monkeypatch):
    measure = train_finetune.accuracy
    for epochs, top1 in ((1, 50.0), (2, 40.0)):
        monkeypatch.setattr(train_finetune, "accuracy",
                            lambda *results, top1=top1: {**measure(*results), "top1": top1})
        finetune_here(toy, tmp_path, f"finetune.epochs={epochs}")
    best = torch.load(tmp_path / "best.pt", weights_only=True)
    assert (best["epoch"], best["top1"]) == (1, 50.0)


# --- Which frames and crops are tested --------------------------------------


def test_kinetics_is_tested_on_five_clips_spread_evenly():
    views = data.dense_views(300, 16, 4, 5)
    # 239 + 60 is the last frame
    assert [view[0] for view in views] == [0, 59, 119, 179, 239]
    for view in views:
        assert view == list(range(view[0], view[0] + 64, 4))
    assert data.dense_views(300, 16, 4, 1)[0][0] == 119
    # Too short: the reader repeats the last frame
    assert data.dense_views(20, 16, 4, 5) == [list(range(0, 64, 4))] * 5


def test_something_something_is_tested_on_evenly_spread_frames_dealt_out_to_the_clips():
    first, second = data.segment_views(64, 16, 2)
    assert first == list(range(0, 64, 4))
    assert second == list(range(2, 64, 4))
    assert data.segment_views(64, 16, 1) == [list(range(2, 64, 4))]
    for view in data.segment_views(40, 16, 2) + data.segment_views(40, 16, 1):
        assert len(view) == 16
        assert view == sorted(view)
        assert view[-1] < 40


def test_segments_give_one_random_frame_each():
    clips = [data.segment_clips(64, 16)[0] for _ in range(200)]
    for clip in clips:
        assert [frame // 4 for frame in clip] == list(range(16))
    assert {clip[3] for clip in clips} == {12, 13, 14, 15}


def test_crops_go_from_end_to_end_of_the_long_side():
    wide = torch.arange(160.0).expand(1, 3, 100, 160)       # a pixel holds its column
    crops = data.spatial_views(wide, 100, 3)
    assert crops.shape == (3, 1, 3, 100, 100)
    assert crops[:, 0, 0, 0, 0].tolist() == [0, 30, 60]
    assert data.spatial_views(wide, 100, 1)[0, 0, 0, 0, 0].item() == 30
    high = wide.transpose(2, 3)
    assert data.spatial_views(high, 100, 3)[:, 0, 0, 0, 0].tolist() == [0, 30, 60]
    assert data.spatial_views(high, 50, 3).shape == (3, 1, 3, 50, 50)


def test_presets_have_the_protocols_sampling_and_views():
    keys = ("sampling", "flip", "test_clips", "test_crops")
    k400 = load_config(["k400"], "finetune")["finetune"]
    ssv2 = load_config(["ssv2"], "finetune")["finetune"]
    assert [k400[key] for key in keys] == ["dense", True, 5, 3]
    assert [ssv2[key] for key in keys] == ["segments", False, 2, 3]


# --- The test ---------------------------------------------------------------


@pytest.fixture(scope="module")
def lists(toy, tmp_path_factory):
    """The settings of a toy set of which one validation video, number 4, is unreadable."""
    copy = tmp_path_factory.mktemp("toy") / "damaged"
    shutil.copytree(toy, copy)
    (copy / "val" / "00004.mp4").write_text("hello")
    return toy_lists(copy)


class Looks(torch.nn.Module):
    """Three logits that depend on the view."""

    def forward(self, video):
        brightness = video.mean((1, 2, 3, 4)) * 9
        red = video[:, 0].mean((1, 2, 3))
        contrast = video.std((1, 2, 3, 4))
        return torch.stack([brightness, red, contrast], 1)


@pytest.mark.parametrize("max_batch, workers", [
    (0, 0),
    (4, 0),                                         # fewer than the views of a video
    pytest.param(0, 2, marks=pytest.mark.slow),     # from a fork server, as on a GPU
])
def test_probabilities_of_views_are_averaged(lists, max_batch, workers):
    config = tiny_config(*lists, f"run.workers={workers}", f"run.max_batch={max_batch}")
    _, entries = data.read_lists(config["data"])
    machine = Machine(config["run"])
    if workers:
        machine.worker_context = "forkserver"
        forkserver.ensure_running()                 # with what conftest.py preloads
    results = evaluate(Looks(), entries, config, machine, clips=3, crops=2)
    assert [result.entry for result in results] == entries
    choose = partial(data.dense_views, frames=8, stride=1, clips=3)
    for i, (entry, probabilities, unreadable) in enumerate(results):
        if i == 4:
            assert probabilities is None
            assert "00004.mp4" in unreadable
            continue
        views = []
        for clip in data.read_clips(entry.path, choose):            # [T, H, W, 3]
            views.extend(data.spatial_views(clip.permute(0, 3, 1, 2), 32, 2))
        views = torch.stack(views).transpose(1, 2)                  # [6, 3, T, 32, 32]
        assert len(views) == 6
        expected = Looks()(data.normalise(views, "cpu")).softmax(1).mean(0)
        torch.testing.assert_close(probabilities, expected)
        assert unreadable is None


class Crowd(Looks):
    """Three logits that depend on all views of the batch."""

    def forward(self, video):
        return super().forward(video) * video.std()


def test_a_video_is_tested_beside_the_same_others_by_any_number_of_processes(lists):
    """Sums in another order would change the last digits of its probabilities."""
    config = tiny_config(*lists, "run.workers=0", "run.max_batch=3")
    _, entries = data.read_lists(config["data"])

    def probabilities(world_size):
        """{entry number: probabilities} of all processes, one after another."""
        found = {}
        for rank in range(world_size):
            machine = Machine(config["run"])
            machine.rank = rank
            machine.world_size = world_size
            # This rank's results alone. None stands for those that other ranks would send.
            machine.gather = lambda own: [{i: own.get(i) for i in range(len(entries))}]
            results = evaluate(Crowd(), entries, config, machine, clips=1, crops=1)
            for i, result in enumerate(results):
                if result is not None:
                    assert i not in found
                    found[i] = result.probabilities
        return [found[i] for i in range(len(entries))]

    alone = probabilities(1)
    assert_equal(probabilities(2), alone)
    assert_equal(probabilities(7), alone)           # there are five batches


def test_unreadable_videos_count_as_wrong():
    """13 videos of classes a to h; all answers are right but for number 4, of class e."""
    results = []
    for i in range(13):
        answer = F.one_hot(torch.tensor(i % 8), 8).float()
        results.append(Result(data.Entry(f"{i}.mp4", i % 8), answer, None))
    results[4] = results[4]._replace(probabilities=None, unreadable="broken")
    scores = accuracy(results, LETTERS)
    assert scores["top1"] == scores["top5"] == pytest.approx(100 * 12 / 13)
    expected = dict.fromkeys(LETTERS, 100)
    expected["e"] = 50                              # number 12 is of class e, too
    assert scores["per_class"] == expected


@pytest.fixture(scope="module")
def reference(lists, pretrained, tmp_path_factory):
    """An undisturbed run: (folder, its command line, its checkpoint, what it printed)."""
    init, _ = pretrained
    output = tmp_path_factory.mktemp("runs") / "reference"
    arguments = [*lists, f"finetune.init={init}", "finetune.mixup=0.8", "finetune.cutmix=1.0",
                 "finetune.drop_path=0.2", "finetune.clips_per_video=2", "finetune.epochs=3"]
    checkpoint, printed, _ = finetune(output, *arguments)
    return output, arguments, checkpoint, printed


def read_results(output):
    """(content of results.json, rows of predictions.csv)"""
    with open(output / "predictions.csv") as file:
        rows = list(csv.reader(file))
    return json.loads((output / "results.json").read_text()), rows


@pytest.mark.slow
def test_finetuning_writes_results(reference):
    output, _, checkpoint, printed = reference
    assert "28 tensors of the encoder" in printed
    assert "1 of them unreadable and counted as wrong" in printed
    assert checkpoint["step"] == 9
    assert (output / "best.pt").exists()

    results, rows = read_results(output)
    assert results["videos"] == 13
    assert len(results["unreadable"]) == 1
    assert results["views"] == "2 clips x 1 crops"
    assert results["weights"].endswith("last.pt, the last weights")
    header, *videos = rows
    assert header[:4] == ["path", "label", "class1", "probability1"]
    assert len(videos) == len({row[0] for row in videos}) == 13
    assert videos[0][1] == "left"
    assert videos[0][2] in data.TOY_CLASSES
    assert len(videos[4]) == 2                      # the unreadable one has no prediction

    lines = [json.loads(line) for line in (output / "log.jsonl").open()]
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 10))
    assert [line["step"] for line in lines if "top1" in line] == [3, 6, 9]
    assert len(lines) == 12


@pytest.mark.slow
def test_other_starting_weights_or_videos_are_another_run(
        reference, lists, pretrained, tmp_path):
    """Their results are not those of the finished run in this folder, which stays as it was."""
    output, arguments, *_ = reference
    before = {path: path.read_bytes() for path in output.iterdir()}
    train = Path(lists[0].removeprefix("data.train="))
    shutil.copy(train.with_name("classes.txt"), tmp_path)
    as_many_videos = tmp_path / "train.txt"
    as_many_videos.write_text("\n".join(reversed(train.read_text().splitlines())))

    # A checkpoint of the same model after more training
    longer = tmp_path / "longer.pt"
    content = torch.load(pretrained[0], weights_only=True)
    content["model"] = {name: tensor + 1 for name, tensor in content["model"].items()}
    torch.save(content, longer)

    for words, reason in (
            (["finetune.init=scratch"], "finetune.init holds other weights"),
            ([f"finetune.init={longer}"], "finetune.init holds other weights"),
            ([f"data.train={as_many_videos}", f"data.root={train.parent}"],
             "data.train lists other videos")):
        _, _, err = finetune(output, *arguments, *words, status=1)
        assert "holds a run of another configuration" in err
        assert reason in err
        assert {path: path.read_bytes() for path in output.iterdir()} == before

    _, _, err = finetune(output, *arguments, "finetune.test_only=true",
                         f"finetune.init={pretrained[0]}", status=1)
    assert "holds another run, whose results the test of" in err
    assert {path: path.read_bytes() for path in output.iterdir()} == before


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_every_video_is_tested_once_by_any_number_of_processes(reference, tmp_path, processes):
    output, arguments, _, _ = reference
    finetune(tmp_path / "test", *arguments, f"finetune.init={output / 'last.pt'}",
             "finetune.test_only=true", "run.max_batch=4", processes=processes)
    results, rows = read_results(tmp_path / "test")
    results_alone, rows_alone = read_results(output)
    assert results["top1"] == results_alone["top1"]
    assert results["per_class"] == results_alone["per_class"]
    assert len(rows) == len(rows_alone) == 14
    for row, row_alone in zip(rows[1:], rows_alone[1:]):
        assert row[:2] == row_alone[:2]
        probabilities = [float(text) for text in row[3::2]]
        expected = [float(text) for text in row_alone[3::2]]
        assert probabilities == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_resumed_finetuning_equals_uninterrupted(reference, tmp_path):
    """Killed in the first epoch and again in the second, with other numbers of workers."""
    reference_output, arguments, reference_checkpoint, _ = reference
    output = tmp_path / "run"
    for workers, log_lines in ((2, 2), (1, 5)):     # the fourth line is the first validation
        script = Script("train_finetune.py", *arguments, f"run.workers={workers}",
                        "run.save_minutes=0", output=output)
        script.wait_for_steps(log_lines)
        script.kill()
    step = torch.load(output / "last.pt", weights_only=True)["step"]
    assert 3 <= step < 9

    checkpoint, printed, _ = finetune(output, *arguments)
    assert f"from step {step}" in printed
    for key in ("model", "optimizer", "step", "tried", "unreadable"):
        assert_equal(checkpoint[key], reference_checkpoint[key])
    best = torch.load(output / "best.pt", weights_only=True)
    reference_best = torch.load(reference_output / "best.pt", weights_only=True)
    assert_equal(best["model"], reference_best["model"])
    assert best["top1"] == reference_best["top1"]
    assert read_results(output)[1] == read_results(reference_output)[1]


@pytest.mark.slow
def test_finetuning_at_another_size_resumes_without_its_init_and_tests(
        lists, pretrained, tmp_path):
    """data.test differs from data.val. A test alone takes its settings from the checkpoint."""
    init = tmp_path / "init.pt"
    shutil.copy(pretrained[0], init)
    output = tmp_path / "run"
    test_list = lists[0].replace("data.train", "data.test")
    arguments = [*lists, test_list, f"finetune.init={init}"]
    size = "model.size=48"
    script = Script("train_finetune.py", *arguments, size, "run.save_minutes=0", output=output)
    script.wait_for_steps(2)
    script.kill()
    init.unlink()
    checkpoint, printed, _ = finetune(output, *arguments, size)
    assert ("24 videos to train, 13 to validate, 24 to test, 8 classes"
            in printed)
    assert "positions  interpolated from those of clips of 8 frames, 32 x 32" in printed
    assert "from step 0 on" not in printed
    assert checkpoint["step"] == 6
    assert checkpoint["config"]["model"]["pretrained_clip"] == [8, 32]
    results, rows = read_results(output)
    assert results["videos"] == 24

    # The test alone, with the settings and the position table of the checkpoint
    _, printed, _ = finetune(tmp_path / "test", test_list, "data.train=", "data.val=",
                             "finetune.test_only=true", f"finetune.init={output / 'last.pt'}")
    assert "model.frames=8, model.size=48, from" in printed
    assert read_results(tmp_path / "test")[1] == rows
    model, _ = finetuned_classifier(checkpoint)
    source = torch.load(pretrained[0], weights_only=True)
    assert_equal(model.positions, pretrained_encoder(source, size=48).positions)

    # At other clips than those of its fine-tuning
    finetune(tmp_path / "long", *arguments, "finetune.test_only=true", "model.frames=12",
             f"finetune.init={output / 'last.pt'}")
    assert read_results(tmp_path / "long")[1] != rows


@pytest.mark.slow
def test_unlabelled_videos_get_the_same_names_from_any_number_of_processes(
        lists, reference, tmp_path):
    """A folder of 13 videos, of which number 4 is unreadable, in batches of two."""
    output, *_ = reference
    folder = lists[1].removeprefix("data.val=").replace("val.txt", "val")
    arguments = ["data.root=gone", "data.train=", f"data.val={folder}", "run.max_batch=4",
                 f"finetune.init={output / 'last.pt'}", "finetune.test_only=true"]
    _, printed, _ = finetune(tmp_path / "one", *arguments)
    assert "13 videos, 1 of them unreadable; they have no labels, so there is nothing to" in printed
    results, rows = read_results(tmp_path / "one")
    assert "top1" not in results
    for row, labelled in zip(rows[1:], read_results(output)[1][1:], strict=True):
        assert row[:2] == [labelled[0], ""]
        assert row[2:3] == labelled[2:3]

    finetune(tmp_path / "two", *arguments, processes=2)
    for name in ("predictions.csv", "results.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
