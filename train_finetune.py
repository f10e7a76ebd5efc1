"""
Fine-tune or probe a pretrained encoder, and test it on several views of every video (section 4).

    python train_finetune.py [PRESET ...] [section.key=value ...]           after train_pretrain.py of that preset
    python train_finetune.py k400 linear                                    a linear probe
    python train_finetune.py k400 finetune.test_only=true                   the test alone
    torchrun --nproc_per_node=8 train_finetune.py ssv2 data.root=/data/ssv2 eight GPUs

Writes last.pt, best.pt (the best on validation), log.jsonl, results.json, predictions.csv and, where classes
are few, confusion.png to run.output.
"""

import argparse
import csv
import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision.ops import StochasticDepth
from torchvision.transforms.v2 import CutMix, MixUp
from torchvision.tv_tensors import Video
from tqdm import tqdm

import data
from arvideo import DecoderBlock, Encoder, LayerNorm, initialise
from train_pretrain import (adamw, fit, give_up, load_checkpoint, load_config, mixed_precision, one_sentence,
                            read_lists, save_checkpoint, start_process, start_workers)

# The keys of section `model` that change the encoder's weights or what they mean
ENCODER_KEYS = ("frames", "size", "cube", "width", "depth", "heads", "mlp_ratio", "positions")
NEW = ("fc_norm.", "head.")                             # of fine-tuning: belong to the classes of a data set
torch.serialization.add_safe_globals([argparse.Namespace])      # VideoMAE's files hold one beside the weights


# --- Models ---------------------------------------------------------------------------------------

def encoder_arguments(model):
    """Encoder's arguments from config.yaml's section `model`."""
    return {key: model[key] for key in (*ENCODER_KEYS, "checkpointing")}


def linear_head(width, classes):
    head = nn.Linear(width, classes)
    nn.init.normal_(head.weight, std=0.02 * 0.001)      # VideoMAE: all classes about equally likely at first
    nn.init.zeros_(head.bias)
    return head


class Classifier(Encoder):
    """The encoder without a mask, the mean over its tokens, a new norm and a linear head; VideoMAE's names."""

    def __init__(self, classes, drop_path, head_dropout, **encoder):
        super().__init__(**encoder)
        self.norm = nn.Identity()                       # the pretrained final norm is discarded
        for i, block in enumerate(self.blocks):
            block.drop_path = StochasticDepth(drop_path * i / max(len(self.blocks) - 1, 1), "row")
        self.fc_norm = LayerNorm(self.width)
        self.dropout = nn.Dropout(head_dropout)
        self.head = linear_head(self.width, classes)

    def forward(self, video):
        """[B, 3, T, H, W] -> logits [B, classes]"""
        return self.head(self.dropout(self.fc_norm(self.features(video).mean(1))))


class Probe(nn.Module):
    """A frozen encoder and a small head on its last layer: norm and linear on the mean token, or, attentive,
    one learned query that attends to all tokens, with an MLP (V-JEPA's evaluation)."""

    def __init__(self, classes, attentive, **encoder):
        super().__init__()
        self.encoder = Encoder(**encoder).requires_grad_(False)
        width = encoder["width"]
        self.norm = LayerNorm(width)
        self.attentive = attentive
        if attentive:
            self.query = nn.Parameter(torch.empty(1, 1, width).normal_(std=0.02))
            self.pool = DecoderBlock(width, encoder["heads"], encoder["mlp_ratio"])
            self.pool.apply(initialise)
        self.head = linear_head(width, classes)

    def forward(self, video):
        """[B, 3, T, H, W] -> logits [B, classes]"""
        with torch.no_grad():
            tokens = self.encoder.features(video)                                   # [B, N, D]
        if not self.attentive:
            return self.head(self.norm(tokens.mean(1)))
        return self.head(self.pool(self.query.expand(len(tokens), -1, -1), self.norm(tokens)).squeeze(1))


def mix_videos(clips, labels, mixes, repeats):
    """MixUp or CutMix, one of the transforms `mixes`: (clips [B R, 3, T, H, W], targets [B R, classes]) of clips and
    labels [B R] in which the R = `repeats` clips of a video follow each other. Each is mixed with another video's."""
    apart = torch.arange(len(clips)).view(-1, repeats).T.flatten()          # the transforms mix neighbours
    mix = mixes[torch.randint(len(mixes), ()).item()]
    clips, targets = mix(Video(clips[apart]), labels[apart])
    return clips.as_subclass(torch.Tensor), targets


def layer_decay(depth, decay):
    """scale(parameter name): 1 for the head and for a probe, times `decay` for every layer below."""
    def scale(name):
        layer = 0 if name.startswith("patch_embed.") else depth + 1
        if name.startswith("blocks."):
            layer = int(name.split(".")[1]) + 1
        return decay ** (depth + 1 - layer)
    return scale


def build_model(config, classes):
    settings, encoder = config["finetune"], encoder_arguments(config["model"])
    if settings["probe"] == "none":
        return Classifier(classes, settings["drop_path"], settings["head_dropout"], **encoder)
    return Probe(classes, settings["probe"] == "attentive", **encoder)


# --- Weights to start from ------------------------------------------------------------------------

def load_weights(model, path, config, classes):
    """Load a checkpoint of ours or VideoMAE's into a Classifier or a Probe; returns a sentence on what was taken, and
    whether that is everything, the head included. Strict: only the head and its norm may be new, and of the encoder
    only its final norm may be left behind. SystemExit lists what is missing, unexpected or of another shape."""
    content = load_checkpoint(path)
    state = content.get("model", content.get("module")) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
        raise SystemExit(f"{path}: there are no weights under the key `model`")
    origin = next((f"{path} after {key} {content[key]}" for key in ("step", "epoch") if key in content), path)
    saved = content.get("config", {}).get("model", {})
    if differing := [f"model.{key} is {config['model'][key]}, the checkpoint's {saved[key]}"
                     for key in ENCODER_KEYS if key in saved and saved[key] != config["model"][key]]:
        raise SystemExit(f"{path} holds another model: {'; '.join(differing)}")

    own = model.state_dict()
    same = content.get("classes", classes) == classes   # our files name them, VideoMAE's do not
    if same and state.keys() == own.keys() and all(state[name].shape == own[name].shape for name in own):
        model.load_state_dict(state)
        return f"all weights, the classifier's too, from {origin}", True

    encoder = model.encoder if isinstance(model, Probe) else model
    prefix = "encoder." if any(name.startswith("encoder.") for name in state) else ""       # pretraining's or a probe's
    new = {name: tensor for name, tensor in encoder.state_dict().items() if name.startswith(NEW)}
    leave = NEW if hasattr(encoder.norm, "weight") else ("norm.", *NEW)
    taken = {name.removeprefix(prefix): tensor for name, tensor in state.items()
             if name.startswith(prefix) and not name.removeprefix(prefix).startswith(leave)}
    try:
        encoder.load_state_dict({**taken, **new})
    except RuntimeError as error:                       # torch lists every tensor that does not fit, a line each
        raise SystemExit(f"{path} does not fit this model: {' '.join(str(error).split())}") from None
    left = {name.removeprefix(prefix) for name in state} - set(taken)
    left = ", ".join(sorted({name.split(".")[0] for name in left})) or "nothing"
    return f"{len(taken)} tensors of the encoder from {origin}; left behind: {left}; the rest is new", False


# --- Evaluation -----------------------------------------------------------------------------------

def finetuned_classifier(checkpoint):
    """(model, class names) of a checkpoint of this file's: model(video [B, 3, T, H, W]) -> logits [B, classes]."""
    model = build_model(checkpoint["config"], len(checkpoint["classes"]))
    model.load_state_dict(checkpoint["model"])
    return model.eval(), checkpoint["classes"]


def frame_chooser(config, dense, segments, clips):
    """The function that chooses frame numbers: `dense` or `segments`, as finetune.sampling says, for `clips` clips."""
    frames = config["model"]["frames"]
    if config["finetune"]["sampling"] == "dense":
        return partial(dense, frames=frames, stride=config["data"]["stride"], clips=clips)
    return partial(segments, frames=frames, clips=clips)


@torch.no_grad()
def evaluate(model, entries, config, process, autocast, clips, crops):
    """[(i, probabilities [classes] or None, reason or None), ...] for every video, in the first process; [] elsewhere.
    A video's probabilities are the mean over its clips x crops views of each view's softmax. Each process takes every
    world-th video: none is padded or counted twice. Unreadable ones have no probabilities."""
    choose = frame_chooser(config, data.dense_views, data.segment_views, clips)
    at_once = config["run"]["max_batch"] or 32          # views; more would fill the workers' queues with gigabytes
    videos = data.Views(entries, choose, config["model"]["size"], crops)
    batches = start_workers(config["run"], process, videos, max(1, at_once // (clips * crops)),
                            range(process.rank, len(entries), process.world), list)
    results = []
    model.eval()
    for batch in tqdm(batches, desc="testing", unit="batch", leave=False, disable=process.rank > 0):
        results += [(i, None, reason) for i, views, reason in batch if views is None]
        if readable := [(i, views) for i, views, _ in batch if views is not None]:
            views = torch.cat([views for _, views in readable])                     # [n x views, 3, T, H, W]
            with autocast():
                logits = torch.cat([model(data.normalise(part, process.device)) for part in views.split(at_once)])
            probabilities = logits.float().softmax(1).unflatten(0, (len(readable), -1)).mean(1).cpu()
            # Cloned: a view would travel to the first process with its whole batch
            results += [(i, p.clone(), None) for (i, _), p in zip(readable, probabilities)]
    if process.world > 1:
        gathered = [None] * process.world if process.rank == 0 else None
        dist.gather_object(results, gathered)
        results = sum(gathered, []) if process.rank == 0 else []
    return sorted(results, key=lambda result: result[0])


def accuracy(results, entries, classes):
    """top-1, top-5 and per-class accuracy in percent; an unreadable video counts as wrong."""
    ranks = {i: p.argsort(descending=True).tolist().index(entries[i][1]) for i, p, _ in results if p is not None}
    total = Counter(entries[i][1] for i, _, _ in results)
    right = Counter(entries[i][1] for i, rank in ranks.items() if rank == 0)
    per_class = {classes[c]: 100 * right[c] / total[c] for c in sorted(total)}
    return dict(top1=100 * right.total() / len(results), top5=100 * sum(r < 5 for r in ranks.values()) / len(results),
                videos=len(results), unreadable=[reason for _, _, reason in results if reason], per_class=per_class)


def write_results(output, results, entries, classes, **about):
    """results.json, predictions.csv and, for up to 50 classes, confusion.png (rows: true class). Returns the former."""
    scores = {**accuracy(results, entries, classes), **about}
    (output / "results.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")
    with open(output / "predictions.csv", "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        table = csv.writer(file)
        table.writerow(["path", "label"] + [f"{what}{n}" for n in range(1, 6) for what in ("class", "probability")])
        for i, p, _ in results:
            top = [] if p is None else zip(*p.topk(min(5, len(classes))))
            table.writerow([entries[i][0], classes[entries[i][1]],
                            *(cell for value, c in top for cell in (classes[c], f"{value:.4f}"))])
    if len(classes) <= 50:
        counts = torch.zeros(len(classes), len(classes))
        for i, p, _ in results:
            if p is not None:
                counts[entries[i][1], p.argmax()] += 1
        shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
        picture = Image.fromarray((255 * (1 - shares)).byte().numpy())
        picture.resize((24 * len(classes),) * 2, Image.Resampling.NEAREST).save(output / "confusion.png")
    return scores


# --- Fine-tuning ----------------------------------------------------------------------------------

def labelled_lists(config):
    """(training videos, validation videos, class names), every video with a label below the number of classes."""
    train, val, classes = read_lists(config)
    for name, entries in (("train", train), ("val", val)):
        if not entries or entries[0][1] is None:
            raise SystemExit(f"data.{name}={config['data'][name]} has no labels, which fine-tuning needs")
    if not classes and all(label > 0 for _, label in train):
        raise SystemExit(f"data.train={config['data']['train']}: no video has the label 0, from which labels count")
    classes = classes or [str(c) for c in range(max(label for _, label in train) + 1)]
    for path, label in train + val:
        if label >= len(classes):
            raise SystemExit(f"{path} has the label {label}, but there are {len(classes)} classes, from 0 on")
    return train, val, classes


def start_from(model, config, classes):
    """Load what finetune.init names, unless a run goes on; returns a sentence on the origin."""
    init, output = config["finetune"]["init"], Path(config["run"]["output"])
    if config["finetune"]["test_only"]:
        sentence, complete = load_weights(model, init, config, classes)
        if not complete:
            raise SystemExit(f"finetune.test_only: {init} holds no classifier of these classes; set finetune.init")
        return sentence
    if any((output / name).exists() for name in ("last.pt", "previous.pt")):
        return f"{output}, if it goes on"               # a run goes on without the file that it started from
    if init.endswith("?"):
        init = init[:-1] if Path(init[:-1]).exists() else "scratch"
    return "scratch" if init == "scratch" else load_weights(model, init, config, classes)[0]


def main():
    config = load_config(sys.argv[1:], "finetune")
    run, settings, output = config["run"], config["finetune"], Path(config["run"]["output"])
    process = start_process(run)
    autocast, scaler = mixed_precision(run["precision"], process.device)
    torch.manual_seed(run["seed"])
    with one_sentence(ValueError):
        train, val, classes = labelled_lists(config)
        model = build_model(config, len(classes)).to(process.device)
        choose = frame_chooser(config, data.dense_clips, data.segment_clips, settings["clips_per_video"])
    origin = start_from(model, config, classes)
    frames, size, stride = config["model"]["frames"], config["model"]["size"], config["data"]["stride"]
    if process.rank == 0:
        million = sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6
        print(f"ARVideo {'fine-tuning' if settings['probe'] == 'none' else settings['probe'] + ' probe'}\n"
              f"  data       {len(train)} videos to train, {len(val)} to test, {len(classes)} classes; "
              f"{settings['sampling']} clips of {frames} frames"
              f"{f' at stride {stride}' if settings['sampling'] == 'dense' else ''}, {size} x {size}, "
              f"flip {'on' if settings['flip'] else 'off'}\n"
              f"  model      {million:.1f} M parameters to train\n"
              f"  start      {origin}")

    repeats = settings["clips_per_video"]
    augment = partial(data.finetuning_clip, size=size, flip=settings["flip"], crop_area=settings["crop_area"],
                      strength=settings["rand_augment"], erase=settings["erase"])
    mixes = [mix(alpha=settings[key], num_classes=len(classes)) for mix, key in ((MixUp, "mixup"), (CutMix, "cutmix"))
             if settings[key] > 0]

    def loss_of(forward, batch, step, rows):
        # Mixing, drop path and dropout depend on the step and the rows alone, so that a resumed run repeats them
        torch.manual_seed(data.seed_of(run["seed"], step, int(rows[0])))
        clips, labels = data.normalise(batch[0], process.device), batch[1].to(process.device)
        if mixes:
            if len(clips) == repeats:
                give_up(process, "finetune.mixup and finetune.cutmix mix different videos, but a process takes one at "
                                 "a time: raise finetune.batch or run.max_batch, or set both to 0")
            clips, labels = mix_videos(clips, labels, mixes, repeats)
        return F.cross_entropy(forward(clips).float(), labels, label_smoothing=settings["label_smoothing"])

    def validate(epoch, last):
        if not last and epoch % settings["validate_epochs"]:
            return
        results = evaluate(model, val, config, process, autocast, clips=1, crops=1)
        if process.rank == 0:
            scores, best = accuracy(results, val, classes), output / "best.pt"
            tqdm.write(f"epoch {epoch}: validation top-1 {scores['top1']:.1f} %, top-5 {scores['top5']:.1f} %")
            if not best.exists() or scores["top1"] > load_checkpoint(best)["top1"]:
                save_checkpoint(best, dict(model=model.state_dict(), config=config, classes=classes, epoch=epoch,
                                           top1=scores["top1"]))
            return dict(top1=scores["top1"], top5=scores["top5"])

    if not settings["test_only"]:
        scale = layer_decay(config["model"]["depth"], settings["layer_decay"])
        videos = data.Videos(train, choose, augment, run["seed"])
        optimizer = adamw(model, settings, process.device, scale)
        trained = fit(config, "finetune", process, autocast, scaler, model, videos, optimizer, loss_of, validate,
                      classes=classes)
        origin = f"{output / 'last.pt'}, {'the last weights' if trained else 'trained before, now only tested'}"

    clips, crops = settings["test_clips"], settings["test_crops"]
    with one_sentence():
        results = evaluate(model, val, config, process, autocast, clips, crops)
        if process.rank == 0:
            output.mkdir(parents=True, exist_ok=True)
            scores = write_results(output, results, val, classes, views=f"{clips} clips x {crops} crops",
                                   weights=origin)
            print(f"top-1 {scores['top1']:.2f} %, top-5 {scores['top5']:.2f} % of {scores['videos']} videos, "
                  f"{len(scores['unreadable'])} of them unreadable and counted as wrong; {scores['views']}; "
                  f"weights: {scores['weights']}; see {output}/results.json")
            for reason in scores["unreadable"]:
                print(f"unreadable: {reason}")
    if process.world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
