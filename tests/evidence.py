"""
Evidence on small sets of real video: what RESULTS.md needs beside the two training scripts.

    python tests/evidence.py videomae [PRESET ...] [section.key=value ...]
        pretrain the VideoMAE of benchmark.py with train_pretrain.py's own loop
    python tests/evidence.py readout CHECKPOINT TRAIN VAL [--root DIR]
        ridge regressions on the tokens of the frozen encoder, on those of a random one, and on
        pixels
    python tests/evidence.py attentive CHECKPOINT TRAIN VAL [--root DIR]
        attentive probes on the tokens of both encoders. Each clip is encoded only once, without
        augmentation
"""

import argparse
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F

import benchmark
import data
import train_pretrain
from arvideo import ARVideo, pretrained_encoder
from train_finetune import Probe, encoder_arguments
from train_pretrain import load_checkpoint

# Cross-validation on the training list chooses one of these
PENALTIES = [10.0 ** power for power in range(-4, 3)]
FOLDS = 5
FEW = 10        # videos of each class where labels are few
DRAWS = 3       # of these videos

# Attentive probes. The rate and the number of steps were chosen on a part of the training list of
# mouths (RESULTS.md).
STEPS = 2000
BATCH = 16
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05


class VideoMAE(benchmark.VideoMAE):
    """benchmark.VideoMAE with what train_pretrain.pretrain asks of a model."""
    order_kind = "none"

    def __init__(self, **model):
        super().__init__(model)
        visible, hidden = self.draw(1)
        self.encoder_mask = visible[0]          # train_pretrain prints how many there are
        self.decoder_mask = hidden[0]


# --- Ridge regression -------------------------------------------------------


def ridge_accuracy(train, train_labels, val, val_labels, penalty):
    """Percent of `val` that a ridge regression on `train` gets right. Features are [n, D].

    It predicts 1 for the class and 0 for the others. The largest prediction counts.
    """
    mean = train.mean(0)
    scale = (train.std(0) + 1e-6) * train.shape[1] ** 0.5       # rows of length about 1
    train = ((train - mean) / scale).double()
    val = ((val - mean) / scale).double()
    targets = F.one_hot(train_labels).double()                  # [n, C]
    bias = targets.mean(0)
    # The dual form: its matrix is [n, n] and not [D, D]
    kernel = train @ train.T                                    # [n, n]
    penalties = penalty * torch.eye(len(train))
    weights = torch.linalg.solve(kernel + penalties, targets - bias)
    predictions = val @ train.T @ weights + bias                # [n of val, C]
    return 100 * (predictions.argmax(1) == val_labels).double().mean().item()


def choose_penalty(features, labels):
    """The penalty with the best mean accuracy over folds of the training list."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    folds = order.tensor_split(FOLDS)
    sums = []
    for penalty in PENALTIES:
        scores = []
        for i, held_out in enumerate(folds):
            rest = torch.cat([fold for j, fold in enumerate(folds) if j != i])
            scores.append(ridge_accuracy(
                features[rest], labels[rest], features[held_out], labels[held_out], penalty))
        sums.append(sum(scores))
    return PENALTIES[sums.index(max(sums))]


def tuned_ridge_accuracy(train, train_labels, val, val_labels):
    """ridge_accuracy with the penalty that the training list chooses."""
    penalty = choose_penalty(train, train_labels)
    return ridge_accuracy(train, train_labels, val, val_labels, penalty)


# --- Attentive probe --------------------------------------------------------


def attentive_accuracy(train, train_labels, val, val_labels, build_probe):
    """Percent of `val` that an attentive probe on `train` gets right. Tokens are [n, N, D]."""
    torch.manual_seed(0)
    probe = build_probe()       # its own encoder stays idle: the tokens are given
    parameters = [parameter for parameter in probe.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for _ in range(STEPS):
        rows = torch.randperm(len(train))[:BATCH]
        loss = F.cross_entropy(probe.classify(train[rows]), train_labels[rows])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        predictions = torch.cat([probe.classify(part).argmax(1) for part in val.split(32)])
    return 100 * (predictions == val_labels).double().mean().item()


# --- Many labels and few ----------------------------------------------------


def print_accuracies(name, accuracy, train, train_labels, val, val_labels):
    """Print what `accuracy` gives with all training videos, and with FEW of each class.

    accuracy(train, train_labels, val, val_labels) is a percentage. With few videos it is
    taken for DRAWS choices of them, and the mean is printed.
    """
    all_labels = accuracy(train, train_labels, val, val_labels)
    few_labels = []
    for seed in range(DRAWS):
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(train_labels), generator=generator)
        rows = torch.cat([order[train_labels[order] == label][:FEW]
                          for label in train_labels.unique()])
        few_labels.append(accuracy(train[rows], train_labels[rows], val, val_labels))
    print(f"{name:42} all labels {all_labels:5.1f} %, {FEW} of each class "
          f"{sum(few_labels) / DRAWS:5.1f} %", flush=True)


# --- Features ---------------------------------------------------------------


def read_views(entries, frames, size):
    """One view of every video, and its labels: one frame from each of `frames` segments."""
    choose = partial(data.segment_views, frames=frames, clips=1)
    views = data.Views(entries, choose, size, 1)
    clips = torch.cat([views[i][1] for i in range(len(entries))])           # [n, 3, T, H, W]
    return clips, torch.tensor([entry.label for entry in entries])


@torch.no_grad()
def read_tokens(encoder, clips):
    """The encoder's tokens [n, N, D] of clips uint8 [n, 3, T, H, W]."""
    tokens = [encoder(data.normalise(part, "cpu")) for part in clips.split(32)]
    return torch.cat(tokens)


def pixel_features(clips):
    """{name: features [n, D]} of clips uint8 [n, 3, T, H, W]: 8 x 8 pixels, in grey."""
    small = F.adaptive_avg_pool3d(clips.float().mean(1, keepdim=True), (clips.shape[2], 8, 8))
    middle = small[:, :, clips.shape[2] // 2]
    return {"one frame": middle.flatten(1),
            "differences of frames": small.diff(dim=2).flatten(1)}


def token_features(encoder, clips):
    """{name: features [n, D]} of clips uint8 [n, 3, T, H, W]: three ways to pool the tokens."""
    tokens = read_tokens(encoder, clips)                                # [n, N, D]
    grid = encoder.grid
    cells = tokens.unflatten(1, grid)                                   # [n, t, h, w, D]
    regions = F.adaptive_avg_pool3d(cells.movedim(4, 1), (grid[0], 4, 4))
    return {
        "mean token": tokens.mean(1),
        "means of time slices": cells.mean((2, 3)).flatten(1),
        "means of 4 x 4 regions a slice": regions.flatten(1)}


def read_train_and_val(config, train, val, root):
    """(clips, labels) of the training list, then of the validation list."""
    train_entries, classes = data.read_annotations(train, root)
    val_entries, _ = data.read_annotations(val, root, classes)
    frames = config["model"]["frames"]
    size = config["model"]["size"]
    return read_views(train_entries, frames, size), read_views(val_entries, frames, size)


def read_encoders(checkpoint):
    """{name: encoder}: the checkpoint's, and the random one that its pretraining started from."""
    config = checkpoint["config"]
    pretrained = pretrained_encoder(checkpoint)
    # Seeded after that, since building an encoder draws random numbers
    torch.manual_seed(data.stream_seed(config["run"]["seed"], "weights"))
    random = ARVideo(**config["model"]).encoder.eval()
    return {"pretrained": pretrained, "random": random}


def readout(checkpoint, train, val, root):
    """Print the accuracy on the list `val` of regressions on pixels and on frozen tokens."""
    checkpoint = load_checkpoint(checkpoint)
    config = checkpoint["config"]
    (train, train_labels), (val, val_labels) = read_train_and_val(config, train, val, root)
    sources = {"pixels": pixel_features}
    for name, encoder in read_encoders(checkpoint).items():
        sources[name] = partial(token_features, encoder)
    for name, features_of in sources.items():
        train_features = features_of(train)
        val_features = features_of(val)
        for kind in train_features:
            print_accuracies(f"{name}, {kind}", tuned_ridge_accuracy, train_features[kind],
                             train_labels, val_features[kind], val_labels)


def attentive(checkpoint, train, val, root):
    """Print how much of the list `val` attentive probes on frozen tokens get right."""
    checkpoint = load_checkpoint(checkpoint)
    config = checkpoint["config"]
    (train, train_labels), (val, val_labels) = read_train_and_val(config, train, val, root)
    class_count = train_labels.max().item() + 1
    build_probe = partial(Probe, class_count, attentive=True, **encoder_arguments(config["model"]))
    accuracy = partial(attentive_accuracy, build_probe=build_probe)
    for name, encoder in read_encoders(checkpoint).items():
        print_accuracies(f"{name}, attentive probe", accuracy, read_tokens(encoder, train),
                         train_labels, read_tokens(encoder, val), val_labels)


def videomae(arguments):
    """train_pretrain.py with VideoMAE in place of ARVideo."""
    train_pretrain.ARVideo = VideoMAE
    # Pictures show predictions of clusters, and VideoMAE predicts tubes
    sys.argv[1:] = [*arguments, "pretrain.picture_epochs=0"]
    train_pretrain.main()


def main():
    if sys.argv[1:2] == ["videomae"]:
        videomae(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["readout", "attentive"])
    parser.add_argument("checkpoint")
    parser.add_argument("train")
    parser.add_argument("val")
    parser.add_argument("--root", default="")
    options = parser.parse_args()
    command = {"readout": readout, "attentive": attentive}[options.command]
    command(options.checkpoint, options.train, options.val, options.root)


if __name__ == "__main__":
    main()
