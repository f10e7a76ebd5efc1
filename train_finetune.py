"""
Fine-tune or probe a pretrained encoder, and test it on several views of each video (section 4).

    python train_finetune.py [PRESET ...] [section.key=value ...]       after train_pretrain.py
    python train_finetune.py k400 linear                                a linear probe
    python train_finetune.py k400 finetune.test_only=true               the test alone
    python train_finetune.py k400 finetune.test_only=true data.val=FOLDER   classify its videos
    torchrun --nproc_per_node=8 train_finetune.py ssv2 data.root=/data/ssv2     eight GPUs

Writes last.pt, best.pt (the best on validation), config.yaml, log.jsonl, results.json
and predictions.csv to run.output; a test alone writes the last two.
"""

import csv
import hashlib
import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.ops import StochasticDepth
from torchvision.transforms.v2 import CutMix, MixUp
from torchvision.tv_tensors import Video
from tqdm import tqdm

import data
from arvideo import DecoderBlock, Encoder, LayerNorm, initialise
from data import UserError, stream_seed
from train_pretrain import (
    Machine, fit, given_settings, load_checkpoint, make_optimizer, run_command, save_checkpoint)

# Keys of section `model` in which a checkpoint must agree with the settings
ENCODER_KEYS = ("cube", "width", "depth", "heads", "mlp_ratio", "positions")
# The encoder's other arguments. set_pretrained_clip compares pretrained_clip with the checkpoint;
# the rest may differ.
OTHER_ENCODER_KEYS = ("frames", "size", "pretrained_clip", "checkpointing")
# What finetune.test_only takes from the checkpoint, in place of a preset's values. A
# section.key=value of the command line has the last word.
TEST_SETTINGS = ("finetune.sampling", "data.stride", "model.frames", "model.size")
# [frames, size] of VideoMAE's pretraining, assumed for all its files: some do not record it
VIDEOMAE_CLIP = [16, 224]
# Prefixes of the names of a classifier's own weights, which are left behind when the encoder alone
# is loaded
CLASSIFIER_PARTS = ("fc_norm.", "head.")


# --- Models -----------------------------------------------------------------


def encoder_arguments(settings):
    """Encoder's arguments, from section `model` of the settings."""
    # The settings in an older checkpoint may lack a newer key: then Encoder's default holds
    return {key: settings[key] for key in ENCODER_KEYS + OTHER_ENCODER_KEYS if key in settings}


def linear_head(width, classes):
    head = nn.Linear(width, classes)
    # VideoMAE's 0.02, scaled by 0.001: at first all classes are about equally likely
    nn.init.normal_(head.weight, std=0.02 * 0.001)
    nn.init.zeros_(head.bias)
    return head


class Classifier(Encoder):
    """The encoder, the mean over its tokens, a new norm and a linear head.

    Parameters have VideoMAE's names.
    """

    def __init__(self, classes, drop_path, head_dropout, **encoder):
        super().__init__(**encoder)
        self.norm = nn.Identity()                       # the pretrained final norm is discarded
        for i, block in enumerate(self.blocks):
            share = i / max(len(self.blocks) - 1, 1)    # none in the first block, all in the last
            block.drop_path = StochasticDepth(drop_path * share, "row")
        self.fc_norm = LayerNorm(self.width)
        self.dropout = nn.Dropout(head_dropout)
        self.head = linear_head(self.width, classes)

    def forward(self, video):
        """[B, 3, T, H, W] -> logits [B, classes]"""
        tokens = super().forward(video)                                 # [B, N, D]
        return self.head(self.dropout(self.fc_norm(tokens.mean(1))))


class Probe(nn.Module):
    """A small head on the last layer of a frozen encoder.

    Linear: a norm and a linear layer on the mean token. Attentive, as V-JEPA evaluates: a
    norm, then a learned query that attends to all tokens, an MLP and a linear layer. The
    encoder's own final norm stays.
    """

    def __init__(self, classes, attentive, **encoder):
        super().__init__()
        self.encoder = Encoder(**encoder).requires_grad_(False)
        self.attentive = attentive
        width = encoder["width"]
        self.norm = LayerNorm(width)
        if attentive:
            self.query = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
            self.pool = DecoderBlock(width, encoder["heads"], encoder["mlp_ratio"])
            self.pool.apply(initialise)
        self.head = linear_head(width, classes)

    def forward(self, video):
        """[B, 3, T, H, W] -> logits [B, classes]"""
        with torch.no_grad():
            tokens = self.encoder(video)                                # [B, N, D]
        return self.classify(tokens)

    def classify(self, tokens):
        """[B, N, D] -> logits [B, classes]"""
        if not self.attentive:
            return self.head(self.norm(tokens.mean(1)))
        query = self.query.expand(len(tokens), -1, -1)                  # [B, 1, D]
        pooled = self.pool(query, self.norm(tokens))                    # [B, 1, D]
        return self.head(pooled.squeeze(1))


def build_model(config, classes):
    """The Classifier or Probe that the settings ask for. UserError where sizes do not fit."""
    settings = config["finetune"]
    encoder = encoder_arguments(config["model"])
    try:
        if settings["probe"] == "none":
            return Classifier(classes, settings["drop_path"], settings["head_dropout"], **encoder)
        return Probe(classes, settings["probe"] == "attentive", **encoder)
    except ValueError as error:
        raise UserError(str(error)) from None


def layer_decay(depth, decay):
    """Returns scale(name), the factor of a parameter's learning rate.

    It is 1 for a head or probe, and is multiplied by `decay` for each layer further down.
    """
    def scale(name):
        # Layer 0 is the cube embedding, 1 to depth are the blocks, depth + 1 is the head
        layer = depth + 1
        # Positions are fixed, but a fork may learn them
        if name.startswith("patch_embed.") or name == "positions":
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        return decay ** (depth + 1 - layer)
    return scale


# --- Weights to start from --------------------------------------------------


def weights_in(path, content):
    """The weights in the content of a checkpoint. UserError if there are none."""
    # DeepSpeed, which VideoMAE's fine-tuning uses, writes `module`
    weights = content.get("model", content.get("module")) if isinstance(content, dict) else None
    if not isinstance(weights, dict):
        raise UserError(f"{path}: there are no weights under the key `model` or `module`")
    return weights


def settings_in(content):
    """The settings in the content of a checkpoint of ours. Empty for another program's."""
    settings = content.get("config")
    is_ours = isinstance(settings, dict) and isinstance(settings.get("model"), dict)
    return settings if is_ours else {}


def load_weights(model, path, classes):
    """Load a checkpoint, ours or VideoMAE's, into a Classifier or a Probe.

    Loads everything if the checkpoint is of the same model and classes. Otherwise it loads the
    encoder alone. The final norm is left out for a Classifier, which has none. Every other tensor
    of the encoder must be there and fit. Returns (a sentence on what was loaded, whether it was
    everything).
    UserError names the tensors that do not fit.
    """
    content = load_checkpoint(path)
    weights = weights_in(path, content)
    # Our last.pt has a step; our other checkpoints and VideoMAE's have an epoch
    origin = path
    for key in ("step", "epoch"):
        if key in content:
            origin = f"{path} after {key} {content[key]}"

    # Take everything if classes, Python class, and the names and shapes of all tensors agree. What
    # a checkpoint does not record (VideoMAE's has no classes) counts as agreeing. Unnamed classes
    # are called "0", "1" and so on, so they agree if there are equally many.
    own = model.state_dict()
    model_class = type(model).__name__
    if (content.get("classes", classes) == classes
            and content.get("model_class", model_class) == model_class
            and weights.keys() == own.keys()
            and all(weights[name].shape == own[name].shape for name in own)):
        model.load_state_dict(weights)
        return f"all weights, the classifier's too, from {origin}", True

    # Anything else: take the encoder, without a classifier's parts, and without the final norm if
    # this model has none. In checkpoints of pretraining and of probes, the names of the encoder's
    # tensors begin with `encoder.`.
    encoder = model.encoder if isinstance(model, Probe) else model
    prefix = "encoder." if any(name.startswith("encoder.") for name in weights) else ""
    unwanted = CLASSIFIER_PARTS
    if isinstance(encoder.norm, nn.Identity):
        unwanted += ("norm.",)
    taken = {}
    left = set()
    for name, tensor in weights.items():
        short = name.removeprefix(prefix)
        if name.startswith(prefix) and not short.startswith(unwanted):
            taken[short] = tensor
        else:
            left.add(short.split(".")[0])

    # load_state_dict is strict, so add the model's own fc_norm and head (none in a Probe's encoder)
    own_head = {name: tensor for name, tensor in encoder.state_dict().items()
                if name.startswith(CLASSIFIER_PARTS)}
    try:
        encoder.load_state_dict({**taken, **own_head})
    except RuntimeError as error:                       # torch lists every tensor that does not fit
        raise UserError(f"{path} does not fit this model: {' '.join(str(error).split())}") from None
    return (f"{len(taken)} tensors of the encoder from {origin}; left behind: "
            f"{', '.join(sorted(left)) or 'nothing'}; the rest is new"), False


def finetuned_classifier(checkpoint):
    """For other programs: (model, class names) from a checkpoint that this script wrote.

    `checkpoint` is the content of the file, as load_checkpoint gives it, not its path.
    model(video [B, 3, T, H, W]), normalised as by data.normalise, gives logits [B, classes].
    ValueError for any other checkpoint. If a fork trained a Python class of its own, first
    set train_finetune.Classifier (or Probe) to that class.
    """
    if "classes" not in checkpoint:
        raise ValueError("finetuned_classifier needs a checkpoint of train_finetune.py; for one of "
                         "train_pretrain.py, use pretrained_encoder of arvideo.py")
    classes = checkpoint["classes"]
    model = build_model(checkpoint["config"], len(classes))
    saved_class = checkpoint.get("model_class", type(model).__name__)
    if type(model).__name__ != saved_class:
        raise ValueError(f"the checkpoint is of the Python class {saved_class}: first set "
                         "train_finetune.Classifier (or Probe) to this class")
    model.load_state_dict(checkpoint["model"])
    return model.eval(), classes


# --- Evaluation -------------------------------------------------------------


class Result(NamedTuple):
    """The test of one entry: probabilities [classes], or None and why it is unreadable."""
    entry: data.Entry
    probabilities: torch.Tensor | None
    unreadable: str | None


def frame_chooser(config, dense, segments, clips):
    """Returns choose(number of frames) -> a list of frame numbers for each clip.

    finetune.sampling says whether `dense` or `segments` is used. In training they are data.py's
    dense_clips and segment_clips, in tests its dense_views and segment_views.
    """
    frames = config["model"]["frames"]
    if config["finetune"]["sampling"] == "dense":
        return partial(dense, frames=frames, stride=config["data"]["stride"], clips=clips)
    return partial(segments, frames=frames, clips=clips)


@torch.no_grad()
def evaluate(model, entries, config, machine, clips, crops):
    """The Results of all entries. Every process gets all of them.

    A video has clips x crops views. Its probabilities are the mean of the views' softmax. Each
    process takes every world_size-th batch. So the batches are the same with any number of
    processes, and no video is tested twice to fill a batch.
    """
    choose = frame_chooser(config, data.dense_views, data.segment_views, clips)
    videos = data.Views(entries, choose, config["model"]["size"], crops)
    # Views that a process takes at once. (In training, run.max_batch counts videos.)
    view_limit = config["run"]["max_batch"] or 32
    batch_size = max(1, view_limit // (clips * crops))
    # Entry i is in batch i // batch_size, and each process takes every world_size-th batch.
    # Only the very last batch may be short, and it stands at the end of some process's `order`. So
    # load_batches, which cuts `order` into pieces of batch_size, makes just these batches.
    order = [i for i in range(len(entries))
             if i // batch_size % machine.world_size == machine.rank]
    batches = data.load_batches(
        videos, batch_size, order, machine.workers,
        pin_memory=machine.device.type == "cuda", context=machine.worker_context)
    results = {}
    model.eval()
    for batch in tqdm(batches, desc="testing", unit="batch", leave=False,
                      disable=not machine.is_first):
        readable = {}
        for i, views, reason in batch:                  # as data.Views gives them
            if views is None:
                results[i] = Result(entries[i], None, reason)
            else:
                readable[i] = machine.send(views)
        if readable:
            all_views = torch.cat(list(readable.values()))              # [n views, 3, T, H, W]
            with machine.autocast():
                logits = [model(data.normalise(part, machine.device))
                          for part in all_views.split(view_limit)]
            probabilities = torch.cat(logits).float().softmax(1)        # [n views, classes]
            means = probabilities.unflatten(0, (len(readable), -1)).mean(1).cpu()
            for i, mean in zip(readable, means):
                # Cloned, since `mean` is a view: gather() would pickle all of `means` with it
                results[i] = Result(entries[i], mean.clone(), None)
    for others in machine.gather(results):
        results.update(others)
    return [results[i] for i in range(len(entries))]


def accuracy(results, classes):
    """top-1, top-5 and per-class accuracy in percent. An unreadable video counts as wrong."""
    total = Counter()
    right = Counter()
    top5 = 0
    for entry, probabilities, _ in results:
        total[entry.label] += 1
        if probabilities is not None:
            ranking = probabilities.argsort(descending=True).tolist()
            right[entry.label] += ranking[0] == entry.label
            top5 += entry.label in ranking[:5]
    return dict(
        top1=100 * right.total() / len(results),
        top5=100 * top5 / len(results),
        per_class={classes[c]: 100 * right[c] / total[c] for c in sorted(total)})


def write_results(output, results, classes, **about):
    """Write results.json and predictions.csv. Returns the content of the former.

    Videos without labels have no accuracy.
    """
    scores = {} if results[0].entry.label is None else accuracy(results, classes)
    scores.update(
        videos=len(results), **about,
        unreadable=[result.unreadable for result in results if result.unreadable])
    (output / "results.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    header = ["path", "label"]
    for n in range(1, min(5, len(classes)) + 1):
        header += [f"class{n}", f"probability{n}"]
    # A path need not be UTF-8
    with open(output / "predictions.csv", "w", newline="", encoding="utf-8",
              errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(header)
        for entry, probabilities, _ in results:
            row = [entry.path, "" if entry.label is None else classes[entry.label]]
            if probabilities is not None:
                top = probabilities.topk(min(5, len(classes)))
                for probability, c in zip(top.values.tolist(), top.indices.tolist()):
                    row += [classes[c], f"{probability:.4f}"]
            table.writerow(row)
    return scores


# --- Lists ------------------------------------------------------------------


class Lists(NamedTuple):
    """What is trained on, what best.pt is chosen on and what is tested; and the class names."""
    train: list
    val: list
    test: list
    classes: list


def read_labelled_split(settings, split, classes=None):
    """As data.read_split. UserError if data.`split` is empty, or its videos have no labels."""
    entries, classes = data.read_split(settings, split, classes)
    # Either all entries of a list have labels, or none
    if not entries or entries[0].label is None:
        raise UserError(f"data.{split}={settings[split]}: fine-tuning needs a list with labels")
    return entries, classes


def require_known_labels(entries, classes):
    """UserError if a label is not below the number of classes."""
    for entry in entries:
        if entry.label is not None and entry.label >= len(classes):
            raise UserError(f"{entry.path} has the label {entry.label}, but there are "
                            f"{len(classes)} classes, from 0 on")


def read_training_list(settings):
    """(entries, class names) of data.train. Classes without names are named by their numbers."""
    source = settings["train"]
    train, classes = read_labelled_split(settings, "train")
    labels = {entry.label for entry in train}
    if not classes:
        if 0 not in labels:
            raise UserError(f"data.train={source}: labels must count from 0, but no video has "
                            "the label 0")
        classes = [str(label) for label in range(max(labels) + 1)]
    require_known_labels(train, classes)
    if len(labels) == 1:
        raise UserError(f"data.train={source}: all videos are of one class, "
                        f"'{classes[labels.pop()]}'; a classifier needs two or more")
    return train, classes


def read_labelled_lists(settings):
    """The Lists to train with, from section `data`. Test videos may lack labels."""
    train, classes = read_training_list(settings)
    val, _ = read_labelled_split(settings, "val", classes)
    test = val
    if settings["test"]:
        test, _ = data.read_split(settings, "test", classes)
    require_known_labels(val + test, classes)
    return Lists(train, val, test, classes)


def read_test_list(settings, classes):
    """The Lists of a test alone.

    `classes` are the checkpoint's names. If they are None, data.train is read for them.
    """
    split = "test" if settings["test"] else "val"
    if not settings[split]:
        raise UserError("data.test and data.val are empty: name a list, or a folder of videos")
    if not classes:
        _, classes = read_training_list(settings)
    test, _ = data.read_split(settings, split, classes)
    require_known_labels(test, classes)
    return Lists([], [], test, classes)


# --- How a run begins -------------------------------------------------------


def resumes(config):
    """Whether the run resumes from the last.pt in run.output."""
    last_pt = Path(config["run"]["output"], "last.pt")
    return last_pt.exists() and not config["finetune"]["test_only"]


def starting_checkpoint(config):
    """The checkpoint that decides how the run begins. The first of these that applies:

    1. finetune.test_only: the classifier in finetune.init
    2. run.output holds last.pt: the run resumes from it, in fit
    3. finetune.init=scratch: None, the weights stay random
    4. else: the weights in finetune.init

    load_config has filled in what finetune.init is by default.
    """
    init = config["finetune"]["init"]
    if config["finetune"]["test_only"]:
        return init
    if resumes(config):
        return Path(config["run"]["output"], "last.pt")
    if init == "scratch":
        return None
    return init


def require_same_encoder(path, saved, settings):
    """UserError if section `model` asks for another encoder than that of a checkpoint.

    `saved` is the checkpoint's section `model`, empty if it is not ours.
    """
    differing = [f"model.{key} is {settings[key]}, the checkpoint's {saved[key]}"
                 for key in ENCODER_KEYS if key in saved and saved[key] != settings[key]]
    if differing:
        raise UserError(f"{path} holds another model: {'; '.join(differing)}")


def set_pretrained_clip(path, saved, settings):
    """Settle model.pretrained_clip, which is [0, 0] if it was not set. Returns lines to print.

    `saved` is the checkpoint's section `model`, empty if the checkpoint is not ours.
    - ours: its clip is taken. UserError if the setting is another one.
    - not ours: its clip is unknown. The setting is kept, or is VIDEOMAE_CLIP if it was not set.
    """
    asked = settings["pretrained_clip"]
    if not saved:
        if any(asked):
            return []
        settings["pretrained_clip"] = VIDEOMAE_CLIP
        frames, size = VIDEOMAE_CLIP
        return [f"  assumed    {path} was pretrained on clips of {frames} frames, {size} x "
                f"{size}, as VideoMAE's are; model.pretrained_clip sets others"]
    known = saved.get("pretrained_clip", [0, 0])
    if not any(known):          # [0, 0]: on clips of the checkpoint's own frames and size
        known = [saved["frames"], saved["size"]]
    if any(asked) and asked != known:
        raise UserError(f"model.pretrained_clip is {asked}, but {path} was pretrained with {known}")
    settings["pretrained_clip"] = known
    return []


def take_test_settings(path, saved_config, config, given):
    """Take TEST_SETTINGS from a checkpoint's settings, except those whose names are in `given`.

    Returns lines to print.
    """
    taken = []
    for name in TEST_SETTINGS:
        section, key = name.split(".")
        if name not in given and key in saved_config.get(section, {}):
            config[section][key] = saved_config[section][key]
            taken.append(f"{name}={config[section][key]}")
    return [f"  taken      {', '.join(taken)}, from {path}"] if taken else []


def adopt_settings(config, given):
    """Copy into the settings what the starting checkpoint determines, before building the model.

    `given` names the settings that a section.key=value sets. A test does not overwrite these.
    Returns (class names or None, lines to print).
    """
    path = starting_checkpoint(config)
    settings = config["model"]
    if path is None:
        return None, []
    content = load_checkpoint(path)
    weights = weights_in(path, content)         # or a UserError, if this is no checkpoint
    saved = settings_in(content)
    saved_model = saved.get("model", {})

    # A run that resumes takes only pretrained_clip, on which the model's positions depend. Later,
    # fit() refuses settings that belong to another run.
    if resumes(config):
        if not any(settings["pretrained_clip"]):
            settings["pretrained_clip"] = saved_model.get("pretrained_clip", [0, 0])
        return None, []

    require_same_encoder(path, saved_model, settings)
    lines = set_pretrained_clip(path, saved_model, settings)
    if config["finetune"]["test_only"]:
        output = Path(config["run"]["output"])
        if Path(output, "last.pt").exists() and Path(path).resolve().parent != output.resolve():
            raise UserError(f"{output} holds another run, whose results the test of {path} would "
                            "overwrite: choose another run.output")
        if "head.weight" not in weights:
            raise UserError(f"finetune.test_only: {path} holds no classifier; set finetune.init")
        lines += take_test_settings(path, saved, config, given)
    # Only a test uses the class names. A run that trains takes those of data.train.
    return content.get("classes"), lines


def hash_of_start(config):
    """A hash of the weights in finetune.init; "scratch" for random ones.

    If a run resumes and the file finetune.init is gone, this is the hash saved in the run's
    last.pt, or None if none was saved there.
    """
    init = config["finetune"]["init"]
    if init == "scratch":
        return init
    if resumes(config) and not Path(init).exists():
        return load_checkpoint(Path(config["run"]["output"], "last.pt")).get("starting_weights")
    weights = weights_in(init, load_checkpoint(init))
    content = hashlib.sha256()
    for name in sorted(weights):
        content.update(name.encode())
        content.update(weights[name].flatten().view(torch.uint8).numpy())
    return content.hexdigest()[:12]


def begin(model, config, classes):
    """Load the weights that the run begins with. If it resumes, fit loads them instead.

    Returns a sentence on where the weights come from.
    """
    path = starting_checkpoint(config)
    if path is None:
        return "scratch"
    if resumes(config):
        return f"{path}, resumed"
    sentence, complete = load_weights(model, path, classes)
    if config["finetune"]["test_only"] and not complete:
        raise UserError(f"finetune.test_only: {path} holds no {type(model).__name__} of these "
                        "classes; set finetune.init, or finetune.probe as in its training")
    return sentence


# --- Fine-tuning ------------------------------------------------------------


def mix_videos(clips, labels, mixes, repeats):
    """Mix a micro-batch by MixUp or CutMix, one of `mixes` at random: (clips, targets).

    clips [B R, 3, T, H, W] and labels [B R]; the R = `repeats` clips of a video are adjacent.
    Every clip is mixed with one of another video, so B must be at least 2. The result is in
    another order, and its targets are [B R, classes].
    """
    # The transforms mix each clip with the one before it, and the first with the last. So bring
    # them into this order: clip 1 of every video, then clip 2 of every video, and so on. Then
    # neighbours are never of one video.
    clips = clips.unflatten(0, (-1, repeats)).transpose(0, 1).flatten(0, 1)
    labels = labels.unflatten(0, (-1, repeats)).T.flatten()
    mix = mixes[torch.randint(len(mixes), ()).item()]
    # The transforms take five dimensions only as a Video. They mix along the batch and cut in
    # height and width, so the order of channels and frames does not matter.
    clips, targets = mix(Video(clips), labels)
    return clips.as_subclass(torch.Tensor), targets


def print_start(config, model, lists, origin, lines):
    """Print what will happen, then `lines` as they are."""
    settings = config["finetune"]
    probe = settings["probe"]
    frames = config["model"]["frames"]
    size = config["model"]["size"]
    stride = f" at stride {config['data']['stride']}" if settings["sampling"] == "dense" else ""
    million = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    clip = config["model"]["pretrained_clip"]
    if any(clip) and clip != [frames, size]:
        lines = [*lines, "  positions  interpolated from those of clips of "
                         f"{clip[0]} frames, {clip[1]} x {clip[1]}"]
    kind = "fine-tuning" if probe == "none" else f"{probe} probe"
    print(f"ARVideo {kind}{', test alone' if settings['test_only'] else ''}\n"
          f"  data       {len(lists.train)} videos to train, {len(lists.val)} to validate, "
          f"{len(lists.test)} to test, {len(lists.classes)} classes; "
          f"{settings['sampling']} clips of {frames} frames{stride}, "
          f"{size} x {size}, flip {settings['flip']}\n"
          f"  model      {million:.1f} M trainable parameters\n"
          f"  start      {origin}", *lines, sep="\n")


def train_classifier(config, machine, model, lists):
    """Fine-tune or probe. Returns False if the run was finished before.

    In any case the model then holds the weights of last.pt.
    """
    run = config["run"]
    settings = config["finetune"]
    repeats = settings["clips_per_video"]
    best_pt = Path(run["output"], "best.pt")
    # A run that resumes goes on from best.pt's accuracy, even if data.val has changed since
    best_top1 = -1.0
    if resumes(config) and best_pt.exists():
        best_top1 = load_checkpoint(best_pt)["top1"]
    choose = frame_chooser(config, data.dense_clips, data.segment_clips, repeats)
    augment = partial(
        data.finetuning_clip, size=config["model"]["size"], flip=settings["flip"],
        crop_area=settings["crop_area"], rand_augment_strength=settings["rand_augment"],
        erase=settings["erase"])
    videos = data.Videos(lists.train, choose, augment, run["seed"])
    mixes = [mix(alpha=settings[key], num_classes=len(lists.classes))
             for mix, key in ((MixUp, "mixup"), (CutMix, "cutmix")) if settings[key] > 0]

    def loss_of(forward, batch, step, rows):            # as fit calls it
        # Mixing, drop path and dropout get a seed by the step and the micro-batch's first row, so
        # that a resumed run repeats them
        torch.manual_seed(stream_seed(run["seed"], "mixing", step, int(rows[0])))
        clips = data.normalise(batch.clips, machine.device)
        labels = machine.send(batch.labels)
        if mixes:
            if len(clips) == repeats:
                machine.stop("finetune.mixup and finetune.cutmix mix different videos, but a "
                             "process takes one at a time: raise finetune.batch or run.max_batch, "
                             "or set mixup and cutmix to 0")
            clips, labels = mix_videos(clips, labels, mixes, repeats)
        logits = forward(clips).float()
        return F.cross_entropy(logits, labels, label_smoothing=settings["label_smoothing"])

    def validate(epoch, is_last, log):                  # as fit calls it at an epoch's end
        nonlocal best_top1
        is_due = is_last or epoch % settings["validate_epochs"] == 0
        if epoch == 0 or not is_due:        # epoch 0 comes before the first step
            return None
        results = evaluate(model, lists.val, config, machine, clips=1, crops=1)
        scores = accuracy(results, lists.classes)
        if machine.is_first:
            tqdm.write(f"epoch {epoch}: validation top-1 {scores['top1']:.1f} %, "
                       f"top-5 {scores['top5']:.1f} %")
            if scores["top1"] > best_top1:
                best_top1 = scores["top1"]
                save_checkpoint(best_pt, dict(
                    model=model.state_dict(), model_class=type(model).__name__, config=config,
                    classes=lists.classes, epoch=epoch, top1=scores["top1"]))
        return dict(top1=scores["top1"], top5=scores["top5"])

    scale = layer_decay(config["model"]["depth"], settings["layer_decay"])
    optimizer = make_optimizer(model, settings, machine.device, scale)
    return fit(config, "finetune", machine, model, videos, optimizer, loss_of, validate,
               classes=lists.classes, training_list=data.hash_of_list(lists.train),
               starting_weights=machine.from_first(hash_of_start, config))


def print_scores(scores, output):
    """Print the outcome of a test. `scores` is the content of results.json."""
    for reason in scores["unreadable"]:
        print(f"unreadable: {data.printable(reason)}")
    unreadable = len(scores["unreadable"])
    about = f"{scores['views']}; weights: {scores['weights']}"
    if "top1" in scores:
        print(f"top-1 {scores['top1']:.2f} %, top-5 {scores['top5']:.2f} % of {scores['videos']} "
              f"videos, {unreadable} of them unreadable and counted as wrong; {about}; see "
              f"{output}/results.json")
    else:
        print(f"{scores['videos']} videos, {unreadable} of them unreadable; they have no labels, "
              f"so there is nothing to score; {about}; see {output}/predictions.csv")


def finetune(config, given=frozenset()):
    """Train and test as `config` says. `given` names the settings that the command line sets."""
    run = config["run"]
    settings = config["finetune"]
    output = Path(run["output"])
    machine = Machine(run)
    torch.manual_seed(stream_seed(run["seed"], "weights"))
    known_classes, lines = adopt_settings(config, given)
    if settings["test_only"]:
        lists = machine.from_first(read_test_list, config["data"], known_classes)
    else:
        lists = machine.from_first(read_labelled_lists, config["data"])
    model = machine.prepare(build_model(config, len(lists.classes)))
    origin = begin(model, config, lists.classes)
    if machine.is_first:
        print_start(config, model, lists, origin, lines)

    if not settings["test_only"]:
        trained = train_classifier(config, machine, model, lists)
        origin = f"{output / 'last.pt'}, {'the last weights' if trained else 'trained before'}"

    # The test on several views takes the last weights, as VideoMAE's does, and not best.pt. With
    # test_only it takes those in finetune.init. The folder is made before the test, since a failure
    # to make it afterwards would lose the results.
    if machine.is_first:
        output.mkdir(parents=True, exist_ok=True)
    clips = settings["test_clips"]
    crops = settings["test_crops"]
    results = evaluate(model, lists.test, config, machine, clips, crops)
    if machine.is_first:
        scores = write_results(output, results, lists.classes,
                               views=f"{clips} clips x {crops} crops", weights=origin)
        print_scores(scores, output)


def main():
    run_command("finetune", partial(finetune, given=given_settings(sys.argv[1:])))


if __name__ == "__main__":
    main()
