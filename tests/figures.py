"""
The README's pictures and the paper's Figure 3, made from the code and from runs of one's own.

    python tests/figures.py method CHECKPOINT VIDEO     cubes, clusters and their order, both masks, predictions -> method.png
    python tests/figures.py loss RUN [RUN ...]          loss curves of run folders -> loss.png
    python tests/figures.py rank CHECKPOINT VIDEO [...] rank of every encoder layer's attention map (Figure 3) -> rank.png
    python tests/figures.py sampling                    which frames of a Something-Something video are used -> sampling.png

CHECKPOINT is a last.pt of train_pretrain.py, or `random:PRESET` for an encoder that nobody trained. --output names
another folder than assets.
"""

import argparse
import json
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import arvideo
import data
from train_pretrain import colour_of, draw_picture, load_checkpoint, load_config, one_sentence

COLOURS = ("#c0392b", "#2563a8", "#2e8b57", "#8e44ad", "#7f6000", "#555555")


def load_model(name):
    """(model, configuration) of a checkpoint, or of random:PRESET."""
    torch.manual_seed(0)
    if name.startswith("random:"):
        config = load_config([name.removeprefix("random:")], "pretrain")
        return arvideo.ARVideo(**config["model"]).eval(), config
    checkpoint = load_checkpoint(name)
    model = arvideo.ARVideo(**checkpoint["config"]["model"])
    model.load_state_dict(checkpoint["model"])
    return model.eval(), checkpoint["config"]


def load_clip(path, config):
    """The middle clip of a video, cropped from its centre: normalised [1, 3, T, H, W]."""
    model = config["model"]
    clip = data.read_clips(path, lambda count: data.dense_views(count, model["frames"], config["data"]["stride"], 1))[0]
    return data.normalise(data.spatial_views(clip.permute(0, 3, 1, 2), model["size"], 1).transpose(1, 2), "cpu")


# ---------------------------------------------------------------------------------------------------
# Pictures


def method_picture(model, video):
    """draw_picture's three rows beside both attention masks, in the same colours."""
    rows = draw_picture(model, video, *model.draw(1, torch.Generator().manual_seed(1)))
    (M, K), V, block = model.clusters.shape, model.visible_count, 24        # block: a place, in pixels
    colours = torch.tensor([colour_of(place, M) for place in range(M - 1)], dtype=torch.uint8).repeat_interleave(V, 0)
    grey, left, top = torch.tensor(235, dtype=torch.uint8), rows.width + 50, 0
    picture = Image.new("RGB", (left + max((M - 1) * block, 220), max(rows.height, (2 * M - 1) * block + 140)), "white")
    picture.paste(rows, (0, 0))
    pen = ImageDraw.Draw(picture)
    for mask, each, unpredicted, title in (
            (model.encoder_mask, V, 0, f"The encoder: {M - 1} x {V} visible tokens\n(rows) attend to visible tokens"),
            (model.decoder_mask, K, model.predict_after, f"The decoder: {M - model.predict_after} x {K} queries (rows)\nattend to the encoder's output")):
        mask = F.pad(mask, (0, 0, unpredicted * each, 0))                   # rows without queries, which attend to nothing
        pixels = torch.where(mask[..., None], colours, grey)                # [rows, columns, 3]
        height = len(mask) // each * block
        picture.paste(Image.fromarray(pixels.numpy()).resize(((M - 1) * block, height), Image.Resampling.NEAREST), (left, top + 58))
        pen.text((left, top + 4), title, "black", font_size=13)
        for i in range(M - 1):
            pen.text((left + (i + 0.5) * block, top + 40), str(i + 1), "black", font_size=13, anchor="ma")
        for i in range(len(mask) // each):
            pen.text((left - 6, top + 58 + (i + 0.5) * block), str(i + 1), "black", font_size=13, anchor="rm")
        top += height + 68
    return picture


def ticks(low, high):
    """Round numbers within [low, high], four to nine of them."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= max(factor for factor in (1, 2, 5) if (high - low) / (factor * step) >= 4)
    return [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def chart(curves, title, x_label):
    """{name: [(x, y), ...]} as lines with axes."""
    width, height, left, right, top, bottom = 720, 360, 60, 20, 34, 40
    points = [point for curve in curves.values() for point in curve]
    (x0, x1), (y0, y1) = ((min(values), max(values)) for values in zip(*points))
    y0, y1, x1 = y0 - 0.05 * (y1 - y0 or 1), y1 + 0.05 * (y1 - y0 or 1), x1 if x1 > x0 else x0 + 1

    def place(x, y):
        return left + (x - x0) / (x1 - x0) * (width - left - right), height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom)

    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((left, 6), title, "black", font_size=13)
    pen.text((width // 2, height - 18), x_label, "black", font_size=13)
    for y in ticks(y0, y1):
        pen.line([place(x0, y), place(x1, y)], "#dddddd")
        pen.text((8, place(x0, y)[1] - 7), f"{y:.3g}", "black", font_size=13)
    for x in ticks(x0, x1):
        pen.text((place(x, y0)[0], height - bottom + 4), f"{x:.4g}", "black", font_size=13, anchor="ma")
    for i, (name, curve) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        pen.line([place(*point) for point in curve], colour, width=2)
        pen.text((width - right, top + 16 * i), name, colour, font_size=13, anchor="ra")
    return picture


def loss_curve(run):
    """[(step, mean loss of the up to 25 steps before it), ...] of a run's log, without its steep first 50."""
    lines = [json.loads(line) for line in Path(run, "log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]             # the others are validations
    means = [(losses[i:i + 25], i) for i in range(50 if len(losses) > 50 else 0, len(losses), 25)]
    return [(i + len(part), sum(part) / len(part)) for part, i in means]


def sampling_picture(count=48):
    """Frames of a Something-Something video: a pretraining clip, fine-tuning segments, the test's two clips."""
    torch.manual_seed(0)
    strips = [("pretraining: every second frame, 16 of them, from a random start", data.dense_clips(count, 16, 2)),
              ("fine-tuning: one random frame from each of 16 segments", data.segment_clips(count, 16)),
              ("test: 32 evenly spaced frames, dealt to two clips (red, blue) in turn", data.segment_views(count, 16, 2))]
    cell = 14
    picture = Image.new("RGB", (count * cell + 20, 56 * len(strips) + 24), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((10, 4), f"a video of {count} frames, one box each; coloured: used", "black", font_size=13)
    for row, (title, clips) in enumerate(strips):
        pen.text((10, 56 * row + 28), title, "black", font_size=13)
        for frame in range(count):
            owner = next((i for i, clip in enumerate(clips) if frame in clip), None)
            box = [10 + frame * cell, 56 * row + 46, 10 + (frame + 1) * cell - 2, 56 * row + 68]
            pen.rectangle(box, "#e8e8e8" if owner is None else COLOURS[owner])
    return picture


# ---------------------------------------------------------------------------------------------------
# Figure 3


@torch.no_grad()
def attention_ranks(model, videos):
    """The mean rank of each encoder layer's attention maps, over heads and videos, all tokens visible, without a mask.

    The rank counts the singular values above torch.linalg.matrix_rank's threshold for the map's size in fp32.
    """
    ranks, usual = [], arvideo.attend

    def attend(q, k, v, heads, mask=None):
        split_q, split_k = (x.unflatten(2, (heads, -1)).transpose(1, 2).float() for x in (q, k))
        maps = (split_q @ split_k.transpose(2, 3) * split_q.shape[-1] ** -0.5).softmax(-1)      # [1, heads, N, N]
        ranks.append(torch.linalg.matrix_rank(maps).float().mean().item())
        return usual(q, k, v, heads, mask)

    arvideo.attend = attend
    try:
        for video in videos:
            model.encoder.features(video)
    finally:
        arvideo.attend = usual
    return torch.tensor(ranks).view(len(videos), -1).mean(0).tolist()


# ---------------------------------------------------------------------------------------------------


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figure", choices=("method", "loss", "rank", "sampling"))
    parser.add_argument("arguments", nargs="*", metavar="CHECKPOINT, VIDEO or RUN")
    parser.add_argument("--output", default="assets", help="folder of the pictures (default: assets)")
    options = parser.parse_args()
    wanted = dict(method=2, loss=1, rank=2, sampling=0)[options.figure]
    if len(options.arguments) < wanted:
        parser.error(f"{options.figure} needs {wanted} arguments or more")
    with one_sentence(ValueError):
        if options.figure == "method":
            model, config = load_model(options.arguments[0])
            picture = method_picture(model, load_clip(options.arguments[1], config))
        elif options.figure == "loss":
            picture = chart({run: loss_curve(run) for run in options.arguments}, "pretraining loss, means of 25 steps, without the first 50", "step")
        elif options.figure == "rank":
            model, config = load_model(options.arguments[0])
            ranks = attention_ranks(model, [load_clip(path, config) for path in options.arguments[1:]])
            print("layer  mean rank")
            for layer, rank in enumerate(ranks, 1):
                print(f"{layer:5d}  {rank:.1f}")
            tokens = len(model.encoder.positions)
            picture = chart({options.arguments[0]: list(enumerate(ranks, 1))}, f"rank of the attention map ({tokens} tokens)", "encoder layer")
        else:
            picture = sampling_picture()
        folder = Path(options.output)
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{options.figure}.png", optimize=True)
    print(f"{folder / options.figure}.png")


if __name__ == "__main__":
    main()
