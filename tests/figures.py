"""
The pictures of the README, and the paper's Figure 3, from the code and from runs of your own.

    python tests/figures.py method CHECKPOINT VIDEO             clusters, order, masks, predictions
    python tests/figures.py predictions CHECKPOINT VIDEO ...    predictions alone
    python tests/figures.py loss RUN ...                        loss curves of run folders
    python tests/figures.py rank CHECKPOINT VIDEO ...           attention's rank by layer (Figure 3)
    python tests/figures.py sampling                            which frames of a video are used

CHECKPOINT is a last.pt of train_pretrain.py, or `random:PRESET` for an untrained model.
Each figure becomes a PNG of its name in the folder assets, or in --output.
"""

import argparse
import colorsys
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
from data import UserError
from train_pretrain import build_arvideo, load_checkpoint, load_config

LINES = ("#c0392b", "#2563a8", "#2e8b57", "#8e44ad", "#7f6000", "#555555")
ROWS = ("true video", "encoder sees", "predicted")
LABELS = 90             # pixels at the left for the names of the rows
TITLE = 24              # pixels at the top for a line of the title
GAP = 10                # pixels between frames


# --- Checkpoints and videos -------------------------------------------------


def load_model(name):
    """(model, settings) of a checkpoint, or of random:PRESET."""
    torch.manual_seed(0)
    if name.startswith("random:"):
        config = load_config([name.removeprefix("random:")], "pretrain")
        return build_arvideo(config).eval(), config
    checkpoint = load_checkpoint(name)
    try:
        config = checkpoint["config"]
        model = build_arvideo(config)
        model.load_state_dict(checkpoint["model"])
    except (KeyError, RuntimeError, TypeError):
        raise UserError(f"{name}: this is not a checkpoint of arvideo.ARVideo") from None
    return model.eval(), config


def load_clip(path, config):
    """The middle clip of a video, cropped from its centre: normalised [1, 3, T, H, W]."""
    frames = config["model"]["frames"]
    stride = config["data"]["stride"]

    def middle(count):
        return data.dense_views(count, frames, stride, clips=1)

    clip, = data.read_clips(path, middle)                               # [T, H, W, 3]
    views = data.spatial_views(clip.permute(0, 3, 1, 2), config["model"]["size"], crops=1)
    return data.normalise(views.transpose(1, 2), "cpu")


# --- Clusters and their places ----------------------------------------------


def colour_of(place, places):
    """(red, green, blue) of a place, 1 to `places`."""
    hue = 0.8 * (place - 1) / places
    return tuple(round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.55, 0.85))


def first_frames(model, video, *drawn):
    """The first frame of every cube in the three ROWS: uint8 [B, 3 rows, t, H, W, 3].

    `drawn` is what model.draw gives.
    """
    shown, predictions = model.reconstruct(video, *drawn)
    rows = torch.stack([video, shown, predictions], dim=1)              # [B, 3, 3, T, H, W]
    rows = rows[:, :, :, ::model.cube[0]].cpu()
    rows = (rows * data.IMAGENET_STD + data.IMAGENET_MEAN).clamp(0, 1)
    return (rows * 255).byte().permute(0, 1, 3, 4, 5, 2)


def title_lines(model):
    lines = ["Number and colour: place in the order."]
    if model.normalise_target:
        lines[0] += " Mean and contrast of predicted cubes: the true video's"
    columns = model.grid[0] // model.cluster_grid[0]
    if columns > 1:
        lines.append(f"A cluster spans {columns} columns, so each number appears {columns} times "
                     "in every row")
    return lines


def outline_clusters(pen, model, order, row, column, left, top, side):
    """Outline and number the clusters of one frame, `side` pixels wide, of one sample.

    `order` [M] is the sample's. Two kinds of clusters are white: the last one where the
    encoder sees, and the first ones where predictions are.
    """
    M = len(order)
    slices, rows, columns = model.cluster_grid
    columns_of_cluster = model.grid[0] // slices
    height = side // rows
    width = side // columns
    for place, cluster in enumerate(order, 1):
        t, h, w = torch.unravel_index(cluster, model.cluster_grid)
        if t != column // columns_of_cluster:
            continue
        if row == "encoder sees":
            is_empty = place == M
        elif row == "predicted":
            is_empty = place <= model.predict_after
        else:
            is_empty = False
        x = left + int(w) * width
        y = top + int(h) * height
        box = [x, y, x + width - 1, y + height - 1]
        pen.rectangle(box, "white" if is_empty else None, colour_of(place, M), 3)
        pen.text((x + 6, y + 3), str(place), "white", font_size=14,
                 stroke_width=2, stroke_fill="black")


def draw_picture(model, video, order, visible, predicted):
    """Three rows for each video: the truth, what the encoder sees, what is predicted.

    video [B, 3, T, H, W], normalised; order, visible and predicted as model.draw gives them. A
    column is a time step of the token grid, shown by the first of its frames. A
    cluster's colour and number are its place in the prediction order.
    """
    pixels = first_frames(model, video, order, visible, predicted)
    B = len(video)
    t = model.grid[0]
    side = video.shape[-1] * max(1, 128 // video.shape[-1])     # each pixel becomes a square
    title = title_lines(model)
    top = TITLE + 16 * (len(title) - 1)
    width = max(LABELS + t * (side + GAP), 630)                 # the title's
    picture = Image.new("RGB", (width, top + B * len(ROWS) * (side + GAP)), "white")
    pen = ImageDraw.Draw(picture)
    for i, line in enumerate(title):
        pen.text((LABELS, 4 + 16 * i), line, "black", font_size=12)

    for b in range(B):
        for i, row in enumerate(ROWS):
            pen.text((LABELS - 6, top + side // 2), row, "black", font_size=13, anchor="rm")
            for column in range(t):
                left = LABELS + column * (side + GAP)
                frame = Image.fromarray(pixels[b, i, column].numpy())
                frame = frame.resize((side, side), Image.Resampling.NEAREST)
                picture.paste(frame, (left, top))
                outline_clusters(pen, model, order[b], row, column, left, top, side)
            top += side + GAP
    return picture


def draw_mask(picture, left, top, title, mask, rows_of_place, model):
    """Draw a mask [rows, S] in the places' colours. Returns where it ends, in pixels.

    Each `rows_of_place` rows belong to a place, and become a row of the drawing.
    """
    block = 24                                                  # pixels of a place
    M = len(model.clusters)
    colours = [colour_of(place, M) for place in range(1, M)]
    colours = torch.tensor(colours, dtype=torch.uint8)
    colours = colours.repeat_interleave(model.visible_count, 0)         # [S, 3]
    grey = torch.tensor(235, dtype=torch.uint8)
    pixels = torch.where(mask[..., None], colours, grey)                # [rows, S, 3]
    places = len(mask) // rows_of_place
    drawing = Image.fromarray(pixels.numpy())
    drawing = drawing.resize(((M - 1) * block, places * block), Image.Resampling.NEAREST)
    picture.paste(drawing, (left, top + 58))

    pen = ImageDraw.Draw(picture)
    pen.text((left, top + 4), title, "black", font_size=13)
    for i in range(M - 1):
        x = left + (i + 0.5) * block
        pen.text((x, top + 40), str(i + 1), "black", font_size=13, anchor="ma")
    for i in range(places):
        y = top + 58 + (i + 0.5) * block
        pen.text((left - 6, y), str(i + 1), "black", font_size=13, anchor="rm")
    return top + 58 + places * block


def draw_rows(model, config, paths):
    """draw_picture for the middle clips of some videos, with an order drawn for each."""
    video = torch.cat([load_clip(path, config) for path in paths])
    generator = torch.Generator().manual_seed(1)
    return draw_picture(model, video, *model.draw(len(video), generator))


def draw_predictions(checkpoint, videos):
    return draw_rows(*load_model(checkpoint), videos)


def draw_method(checkpoint, video):
    """The predictions for a video beside both attention masks, in the same colours."""
    model, config = load_model(checkpoint)
    rows = draw_rows(model, config, [video])
    M, K = model.clusters.shape
    V = model.visible_count
    left = rows.width + 50
    width = left + max((M - 1) * 24, 220)
    height = max(rows.height, (2 * M - 1) * 24 + 140)
    picture = Image.new("RGB", (width, height), "white")
    picture.paste(rows, (0, 0))

    title = f"The encoder: {M - 1} x {V} visible tokens\n(rows) attend to visible tokens"
    bottom = draw_mask(picture, left, 0, title, model.encoder_mask, V, model)
    title = (f"The decoder: {M - model.predict_after} x {K} queries (rows)\n"
             "attend to the encoder's output")
    # The first places have no queries, which would attend to nothing
    mask = F.pad(model.decoder_mask, (0, 0, model.predict_after * K, 0))
    draw_mask(picture, left, bottom + 10, title, mask, K, model)
    return picture


# --- Curves -----------------------------------------------------------------


def ticks(low, high):
    """Round numbers within [low, high], four to ten of them."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= max(factor for factor in (1, 2, 5) if (high - low) / (factor * step) >= 4)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [step * i for i in range(first, last + 1)]


def chart(curves, title, x_label):
    """{name: [(x, y), ...]} as lines with axes; x counts something."""
    width, height = 720, 360
    left, right = 60, width - 20
    top, bottom = 34, height - 40
    points = [point for curve in curves.values() for point in curve]
    x0 = min(x for x, _ in points)
    x1 = max(x for x, _ in points)
    x1 = x1 if x1 > x0 else x0 + 1
    y0 = min(y for _, y in points)
    y1 = max(y for _, y in points)
    margin = 0.05 * (y1 - y0 or 1)
    y0 -= margin
    y1 += margin

    def on_paper(x, y):
        return (left + (x - x0) / (x1 - x0) * (right - left),
                bottom - (y - y0) / (y1 - y0) * (bottom - top))

    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((left, 6), title, "black", font_size=13)
    pen.text((width // 2, height - 18), x_label, "black", font_size=13)
    for y in ticks(y0, y1):
        pen.line([on_paper(x0, y), on_paper(x1, y)], "#dddddd")
        pen.text((8, on_paper(x0, y)[1] - 7), f"{y:.4g}", "black", font_size=13)
    for x in ticks(x0, x1):
        if x == round(x):                                               # no layer 1.5
            x_on_paper, _ = on_paper(x, y0)
            pen.text((x_on_paper, bottom + 4), f"{x:g}", "black", font_size=13, anchor="ma")
    for i, (name, curve) in enumerate(curves.items()):
        colour = LINES[i % len(LINES)]
        pen.line([on_paper(x, y) for x, y in curve], colour, width=2)
        pen.text((right, top + 16 * i), name, colour, font_size=13, anchor="ra")
    return picture


STEEP = 50              # the first steps of a long run, which would flatten the rest
MEAN = 25               # steps of a mean


def loss_curve(run):
    """[(step, mean loss of the up to 25 steps before it), ...] from the log of a run's folder."""
    path = Path(run, "log.jsonl")
    if not path.is_file():
        raise UserError(f"{path}: there is no such log")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]         # others are validations
    if not losses:
        raise UserError(f"{path}: it holds no training step")
    curve = []
    for start in range(STEEP if len(losses) > STEEP else 0, len(losses), MEAN):
        part = losses[start:start + MEAN]
        curve.append((start + len(part), sum(part) / len(part)))
    return curve


def draw_loss(runs):
    curves = {run: loss_curve(run) for run in runs}
    title = f"pretraining loss, means of {MEAN} steps"
    if all(curve[0][0] > STEEP for curve in curves.values()):
        title += f", without the first {STEEP}"
    return chart(curves, title, "step")


@torch.no_grad()
def attention_ranks(model, videos):
    """The mean rank of each encoder layer's attention maps, over heads and videos.

    All tokens are visible, and there is no mask. The rank counts the singular values
    above torch.linalg.matrix_rank's threshold for the map's size in fp32.
    """
    ranks = []
    usual = arvideo.attend

    def attend(q, k, v, heads, mask=None):
        split_q = q.unflatten(2, (heads, -1)).transpose(1, 2).float()   # [1, heads, N, w]
        split_k = k.unflatten(2, (heads, -1)).transpose(1, 2).float()
        scores = split_q @ split_k.transpose(2, 3) * split_q.shape[-1] ** -0.5
        maps = scores.softmax(-1)                                       # [1, heads, N, N]
        ranks.append(torch.linalg.matrix_rank(maps).float().mean().item())
        return usual(q, k, v, heads, mask)

    arvideo.attend = attend
    try:
        for video in videos:
            model.encoder(video)
    finally:
        arvideo.attend = usual
    return torch.tensor(ranks).view(len(videos), -1).mean(0).tolist()


def draw_rank(checkpoint, videos):
    model, config = load_model(checkpoint)
    ranks = attention_ranks(model, [load_clip(path, config) for path in videos])
    by_layer = list(enumerate(ranks, 1))
    print("layer  mean rank")
    for layer, rank in by_layer:
        print(f"{layer:5d}  {rank:.1f}")
    title = f"rank of the attention map ({math.prod(model.grid)} tokens)"
    return chart({checkpoint: by_layer}, title, "encoder layer")


# --- Sampling ---------------------------------------------------------------


def draw_sampling():
    """The frames of a Something-Something video that pretraining, fine-tuning and the test use."""
    count = 48
    torch.manual_seed(0)
    strips = {
        "pretraining: every second frame, 16 of them, from a random start":
            data.dense_clips(count, frames=16, stride=2),
        "fine-tuning: one random frame from each of 16 segments":
            data.segment_clips(count, frames=16),
        "test: 32 evenly spaced frames, dealt to two clips (red, blue) in turn":
            data.segment_views(count, frames=16, clips=2)}
    cell = 14                                                           # pixels of a frame
    picture = Image.new("RGB", (count * cell + 20, 56 * len(strips) + 24), "white")
    pen = ImageDraw.Draw(picture)
    title = f"a video of {count} frames, one box each; coloured: used"
    pen.text((10, 4), title, "black", font_size=13)
    for row, (title, clips) in enumerate(strips.items()):
        top = 56 * row + 46
        pen.text((10, top - 18), title, "black", font_size=13)
        for frame in range(count):
            colour = "#e8e8e8"
            for i, clip in enumerate(clips):
                if frame in clip:
                    colour = LINES[i]
            left = 10 + frame * cell
            pen.rectangle([left, top, left + cell - 2, top + 22], colour)
    return picture


# --- Command line -----------------------------------------------------------

FIGURES = {
    "method": draw_method,
    "predictions": draw_predictions,
    "loss": draw_loss,
    "rank": draw_rank,
    "sampling": draw_sampling,
}


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="figure", required=True)
    figures = {name: commands.add_parser(name) for name in FIGURES}
    for name in ("method", "predictions", "rank"):
        figures[name].add_argument("checkpoint", metavar="CHECKPOINT")
    figures["method"].add_argument("video", metavar="VIDEO")
    figures["predictions"].add_argument("videos", nargs="+", metavar="VIDEO")
    figures["rank"].add_argument("videos", nargs="+", metavar="VIDEO")
    figures["loss"].add_argument("runs", nargs="+", metavar="RUN")
    for figure in figures.values():
        figure.add_argument("--output", default="assets", help="folder (default: assets)")
    options = vars(parser.parse_args())
    name = options.pop("figure")
    folder = Path(options.pop("output"))
    try:
        picture = FIGURES[name](**options)
    except (UserError, data.UnreadableVideo) as error:
        sys.exit(str(error))
    folder.mkdir(parents=True, exist_ok=True)
    picture.save(folder / f"{name}.png", optimize=True)
    print(folder / f"{name}.png")


if __name__ == "__main__":
    main()
