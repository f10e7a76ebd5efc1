"""
Fine-tune or probe a pretrained encoder, and test it on several views of each video (section 4).

    python train_finetune.py [PRESET ...] [section.key=value ...]       after train_pretrain.py
    python train_finetune.py k400 linear                                a linear probe
    python train_finetune.py k400 finetune.test_only=true               the test alone
    torchrun --nproc_per_node=8 train_finetune.py ssv2 data.root=/data/ssv2     eight GPUs

Writes last.pt, best.pt (the best on validation), log.jsonl, results.json and
predictions.csv to run.output.
"""

import csv
import json
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
    Machine, fit, load_checkpoint, make_optimizer, run_command, save_checkpoint)

# The keys of section `model` that decide the encoder's weights and what they mean
ENCODER_KEYS = ("frames", "size", "cube", "width", "depth", "heads", "mlp_ratio", "positions")
# What a classifier adds to the encoder; it belongs to the classes of one data set
CLASSIFIER_PARTS = ("fc_norm.", "head.")


# --- Models -----------------------------------------------------------------


def encoder_arguments(settings):
    """Encoder's arguments, from section `model` of the settings."""
    return {key: settings[key] for key in (*ENCODER_KEYS, "checkpointing")}


def linear_head(width, classes):
    head = nn.Linear(width, classes)
    # VideoMAE's 0.02, scaled by 0.001: at first all classes are about equally likely
    nn.init.normal_(head.weight, std=0.02 * 0.001)
    nn.init.zeros_(head.bias)
    return head


class Classifier(Encoder):
    """The encoder, the mean over its tokens, a new norm and a linear head. VideoMAE's names."""

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

    Linear: norm and linear layer on the mean token. Attentive, as V-JEPA evaluates: a
    learned query attends to all tokens, with an MLP, before the linear layer.
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
    """scale(parameter name): 1 for a head or probe, times `decay` for every layer below it."""
    def scale(name):
        # Layer 0 is the cube embedding, 1 to depth are the blocks, depth + 1 is the head
        layer = depth + 1
        if name.startswith("patch_embed.") or name == "positions":      # if a fork learns them
            layer = 0
        elif name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        return decay ** (depth + 1 - layer)
    return scale


# --- Weights to start from --------------------------------------------------


def require_same_encoder(path, content, settings):
    """UserError if a checkpoint of ours holds another encoder than section `model` asks for."""
    saved = content.get("config", {}).get("model", {})
    differing = [f"model.{key} is {settings[key]}, the checkpoint's {saved[key]}"
                 for key in ENCODER_KEYS if key in saved and saved[key] != settings[key]]
    if differing:
        raise UserError(f"{path} holds another model: {'; '.join(differing)}")


def load_weights(model, path, config, classes):
    """Load a checkpoint, ours or VideoMAE's, into a Classifier or a Probe.

    Returns (a sentence on what was loaded, whether it was everything). If the checkpoint is
    of this very model, everything is. Otherwise it is the encoder, and every tensor of it
    must be there and fit. Heads, decoders and, for a Classifier, the encoder's final norm
    are not loaded. UserError names the tensors that do not fit.
    """
    content = load_checkpoint(path)
    weights = content.get("model", content.get("module")) if isinstance(content, dict) else None
    if not isinstance(weights, dict):
        raise UserError(f"{path}: there are no weights under the key `model`")
    require_same_encoder(path, content, config["model"])
    origin = path
    for key in ("step", "epoch"):
        if key in content:
            origin = f"{path} after {key} {content[key]}"

    # A classifier or probe of the same class names: take everything. VideoMAE's files name no
    # classes. Classes without names are the same if they are equally many.
    own = model.state_dict()
    if (content.get("classes", classes) == classes and weights.keys() == own.keys()
            and all(weights[name].shape == own[name].shape for name in own)):
        model.load_state_dict(weights)
        return f"all weights, the classifier's too, from {origin}", True

    # Anything else: take the encoder, without a classifier's parts, and without its final
    # norm if this model has none. Pretraining and probes keep it under `encoder.`
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

    # torch's strict check wants a Classifier's head too, so give it back its own. A Probe's
    # encoder has none.
    own_head = {name: tensor for name, tensor in encoder.state_dict().items()
                if name.startswith(CLASSIFIER_PARTS)}
    try:
        encoder.load_state_dict({**taken, **own_head})
    except RuntimeError as error:                       # torch lists every tensor that does not fit
        raise UserError(f"{path} does not fit this model: {' '.join(str(error).split())}") from None
    return (f"{len(taken)} tensors of the encoder from {origin}; left behind: "
            f"{', '.join(sorted(left)) or 'nothing'}; the rest is new"), False


def finetuned_classifier(checkpoint):
    """(model, class names) of a checkpoint of this file's, for use elsewhere.

    model(video [B, 3, T, H, W]) gives logits [B, classes].
    """
    classes = checkpoint["classes"]
    model = build_model(checkpoint["config"], len(classes))
    model.load_state_dict(checkpoint["model"])
    return model.eval(), classes


# --- Evaluation -------------------------------------------------------------


class Result(NamedTuple):
    """The test of one entry: probabilities [classes], or None and why it is unreadable."""
    entry: data.Entry
    probabilities: torch.Tensor | None
    unreadable: str | None


def frame_chooser(config, dense, segments, clips):
    """The function that finetune.sampling names, `dense` or `segments`, with its arguments.

    It is left to be called with the number of frames of a video.
    """
    frames = config["model"]["frames"]
    if config["finetune"]["sampling"] == "dense":
        return partial(dense, frames=frames, stride=config["data"]["stride"], clips=clips)
    return partial(segments, frames=frames, clips=clips)


@torch.no_grad()
def evaluate(model, entries, config, machine, clips, crops):
    """The Result of every entry, in every process.

    A video's probabilities are the mean over the softmax of each of its clips x crops
    views. Each process takes every world_size-th video: none is padded or counted twice.
    """
    choose = frame_chooser(config, data.dense_views, data.segment_views, clips)
    videos = data.Views(entries, choose, config["model"]["size"], crops)
    view_limit = config["run"]["max_batch"] or 32       # views that a process takes at once
    order = range(machine.rank, len(entries), machine.world_size)
    batches = data.load_batches(
        videos, max(1, view_limit // (clips * crops)), order, machine.workers,
        pin_memory=machine.device.type == "cuda", context=machine.worker_context)
    results = {}
    model.eval()
    for samples in tqdm(batches, desc="testing", unit="batch", leave=False,
                        disable=not machine.is_first):
        readable = {}
        for i, sample in samples:
            if sample.clips is None:
                results[i] = Result(entries[i], None, sample.unreadable[0])
            else:
                readable[i] = machine.send(sample.clips)
        if readable:
            views = torch.cat(list(readable.values()))                  # [n views, 3, T, H, W]
            with machine.autocast():
                logits = [model(data.normalise(part, machine.device))
                          for part in views.split(view_limit)]
            probabilities = torch.cat(logits).float().softmax(1)        # [n views, classes]
            means = probabilities.unflatten(0, (len(readable), -1)).mean(1).cpu()
            for i, mean in zip(readable, means):
                # Cloned, since a row would travel to other processes with its whole batch
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
        videos=len(results),
        unreadable=[result.unreadable for result in results if result.unreadable],
        per_class={classes[c]: 100 * right[c] / total[c] for c in sorted(total)})


def write_results(output, results, classes, **about):
    """Write results.json and predictions.csv. Returns the content of the former."""
    output.mkdir(parents=True, exist_ok=True)
    scores = {**accuracy(results, classes), **about}
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
            row = [entry.path, classes[entry.label]]
            if probabilities is not None:
                for probability, c in zip(*probabilities.topk(min(5, len(classes)))):
                    row += [classes[c], f"{probability:.4f}"]
            table.writerow(row)
    return scores


# --- Fine-tuning ------------------------------------------------------------


def labelled_lists(config):
    """(training entries, validation entries, class names). UserError where labels are missing."""
    train, val, classes = data.read_lists(config["data"])
    for name, entries in (("train", train), ("val", val)):
        if not entries:
            raise UserError(f"data.{name} is empty: fine-tuning needs a list with labels")
        if entries[0].label is None:
            raise UserError(f"data.{name}={config['data'][name]} has no labels, which "
                            "fine-tuning needs")
    if not classes:
        labels = {entry.label for entry in train}
        if 0 not in labels:
            raise UserError(f"data.train={config['data']['train']}: labels must count from 0, "
                            "but no video has the label 0")
        classes = [str(label) for label in range(max(labels) + 1)]
    for entry in train + val:
        if entry.label >= len(classes):
            raise UserError(f"{entry.path} has the label {entry.label}, but there are "
                            f"{len(classes)} classes, from 0 on")
    return train, val, classes


def begin(model, config, classes):
    """Decide how the run begins and load weights if need be. Returns a sentence on it.

    1. finetune.test_only: the classifier in finetune.init, by default in this run's last.pt
    2. run.output holds last.pt: the run resumes from it, in fit
    3. finetune.init=scratch: the weights stay random
    4. else: the encoder in finetune.init, by default in this preset's pretraining
    """
    init = config["finetune"]["init"]
    if config["finetune"]["test_only"]:
        sentence, complete = load_weights(model, init, config, classes)
        if not complete:
            raise UserError(f"finetune.test_only: {init} holds no classifier of these classes; "
                            "set finetune.init")
        return sentence
    path = Path(config["run"]["output"], "last.pt")
    if path.exists():
        return f"{path}, resumed"
    if init == "scratch":
        return "scratch"
    sentence, _ = load_weights(model, init, config, classes)
    return sentence


def mix_videos(clips, labels, mixes, repeats):
    """MixUp or CutMix, one of the transforms `mixes`, of a micro-batch: (clips, targets).

    clips [B R, 3, T, H, W] and labels [B R], the R = `repeats` clips of a video one after
    another; targets [B R, classes]. Every clip is mixed with one of another video.
    """
    # The transforms mix each clip with the one before it, and the first with the last. So the
    # first clips of all videos come first, then the second ones, and so on: neighbours are
    # then never of one video.
    clips = clips.unflatten(0, (-1, repeats)).transpose(0, 1).flatten(0, 1)
    labels = labels.unflatten(0, (-1, repeats)).T.flatten()
    mix = mixes[torch.randint(len(mixes), ()).item()]
    # The transforms take clips of five dimensions only as a Video
    clips, targets = mix(Video(clips), labels)
    return clips.as_subclass(torch.Tensor), targets


def print_start(config, machine, model, train, val, classes, origin):
    """What will happen."""
    settings = config["finetune"]
    probe = settings["probe"]
    size = config["model"]["size"]
    stride = f" at stride {config['data']['stride']}" if settings["sampling"] == "dense" else ""
    million = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
    print(f"ARVideo {'fine-tuning' if probe == 'none' else probe + ' probe'}\n"
          f"  data       {len(train)} videos to train, {len(val)} to test, {len(classes)} classes; "
          f"{settings['sampling']} clips of {config['model']['frames']} frames{stride}, "
          f"{size} x {size}, flip {settings['flip']}\n"
          f"  model      {million:.1f} M parameters to train\n"
          f"  start      {origin}")


def train_classifier(config, machine, model, train, val, classes):
    """Fine-tune or probe. Returns False if the run was finished before."""
    run = config["run"]
    settings = config["finetune"]
    repeats = settings["clips_per_video"]
    last_pt = Path(run["output"], "last.pt")
    best_pt = Path(run["output"], "best.pt")
    # A run that resumes has a best accuracy already, on the data.val of that time
    best_top1 = -1.0
    if last_pt.exists() and best_pt.exists():
        best_top1 = load_checkpoint(best_pt)["top1"]
    choose = frame_chooser(config, data.dense_clips, data.segment_clips, repeats)
    augment = partial(
        data.finetuning_clip, size=config["model"]["size"], flip=settings["flip"],
        crop_area=settings["crop_area"], rand_augment_strength=settings["rand_augment"],
        erase=settings["erase"])
    videos = data.Videos(train, choose, augment, run["seed"])
    mixes = [mix(alpha=settings[key], num_classes=len(classes))
             for mix, key in ((MixUp, "mixup"), (CutMix, "cutmix")) if settings[key] > 0]

    def loss_of(forward, batch, step, rows):
        # Mixing, drop path and dropout depend on the step and the rows alone, so that a
        # resumed run repeats them
        torch.manual_seed(stream_seed(run["seed"], "mixing", step, int(rows[0])))
        clips = data.normalise(batch.clips, machine.device)
        labels = machine.send(batch.labels)
        if mixes:
            if len(clips) == repeats:
                machine.stop("finetune.mixup and finetune.cutmix mix different videos, but a "
                             "process takes one at a time: raise finetune.batch or run.max_batch, "
                             "or set both to 0")
            clips, labels = mix_videos(clips, labels, mixes, repeats)
        logits = forward(clips).float()
        return F.cross_entropy(logits, labels, label_smoothing=settings["label_smoothing"])

    def validate(epoch, is_last, log):
        nonlocal best_top1
        if epoch == 0 or not is_last and epoch % settings["validate_epochs"]:
            return None
        scores = accuracy(evaluate(model, val, config, machine, clips=1, crops=1), classes)
        if machine.is_first:
            tqdm.write(f"epoch {epoch}: validation top-1 {scores['top1']:.1f} %, "
                       f"top-5 {scores['top5']:.1f} %")
            if scores["top1"] > best_top1:
                best_top1 = scores["top1"]
                save_checkpoint(best_pt, dict(model=model.state_dict(), config=config,
                                              classes=classes, epoch=epoch, top1=scores["top1"]))
        return dict(top1=scores["top1"], top5=scores["top5"])

    scale = layer_decay(config["model"]["depth"], settings["layer_decay"])
    optimizer = make_optimizer(model, settings, machine.device, scale)
    return fit(config, "finetune", machine, model, videos, optimizer, loss_of, validate,
               classes=classes)


def finetune(config):
    run = config["run"]
    settings = config["finetune"]
    output = Path(run["output"])
    machine = Machine(run)
    torch.manual_seed(stream_seed(run["seed"], "weights"))
    train, val, classes = machine.from_first(labelled_lists, config)
    model = machine.prepare(build_model(config, len(classes)))
    origin = begin(model, config, classes)
    if machine.is_first:
        print_start(config, machine, model, train, val, classes, origin)

    if not settings["test_only"]:
        trained = train_classifier(config, machine, model, train, val, classes)
        origin = f"{output / 'last.pt'}, {'the last weights' if trained else 'trained before'}"

    # The test on several views: of the last weights, as the protocol has it; with test_only
    # of those in finetune.init
    clips = settings["test_clips"]
    crops = settings["test_crops"]
    results = evaluate(model, val, config, machine, clips, crops)
    if machine.is_first:
        scores = write_results(output, results, classes, views=f"{clips} clips x {crops} crops",
                               weights=origin)
        for reason in scores["unreadable"]:
            print(f"unreadable: {data.printable(reason)}")
        print(f"top-1 {scores['top1']:.2f} %, top-5 {scores['top5']:.2f} % of {scores['videos']} "
              f"videos, {len(scores['unreadable'])} of them unreadable and counted as wrong; "
              f"{scores['views']}; weights: {origin}; see {output}/results.json")


def main():
    run_command("finetune", finetune)


if __name__ == "__main__":
    main()
