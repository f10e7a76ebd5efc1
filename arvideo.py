"""
ARVideo: autoregressive video pretraining (Ren et al. 2024, arXiv 2405.15160).
This file is the paper's method: sections 3.3 and 4.1.

A video is cut into cubes of pixels, and each cube becomes a token. Groups of
neighbouring tokens, called clusters, are what the model predicts one after
another (3.3.1). Every sample draws an order of its clusters, by default at
random (3.3.2). A cluster's *place* is its position in this order, counted from
1. "Earlier" always means earlier in this order, not earlier in time.

    Encoder   takes the visible tokens, a random fifth of each cluster (4.1). The last
              cluster is left out, since no later one would use it. A token attends to
              its own cluster and to earlier ones (3.3.3).
    Decoder   predicts all tokens of a cluster, visible or not, from the encoder's
              output for earlier clusters (3.3.3). The first cluster is not
              predicted, since nothing precedes it.
    Loss      mean squared error of the pixels. Each cube is normalised by its
              own mean and deviation, colour by colour (4.1).

Two attention masks let one pass predict all these clusters.

    model = ARVideo()                               # ViT-B, 16 x 224 x 224
    loss = model(video, *model.draw(len(video)))    # video [B, 3, 16, 224, 224]

Symbols in the shapes. `predict_after` is how many places at the start of the order are
not predicted, 1 by default. The numbers are those of the default model. They agree with
the paper except for Q: its Table 5 has 1372, which predict_after=2 would give.
    B   videos in the batch. (Each is a clip; data.py may cut several from one file.)
    N   tokens of a video                 1568 = 8 x 14 x 14
    P   pixels of a cube                   512 = 2 x 16 x 16, of C = 3 colours
    M   clusters of a video                 16 = 4 x 2 x 2
    K   tokens of a cluster                 98 = 2 x 7 x 7
    V   visible tokens of a cluster         20, a fifth of K
    R   predicted tokens of a cluster       98, all K unless predict_ratio is below 1
    S   tokens that enter the encoder      300 = (M - 1) V
    Q   queries: tokens to predict        1470 = (M - predict_after) R
    D   width of the encoder               768
    d   width of the decoder               512

`python train_pretrain.py` trains it, by default at toy size. This file needs torch alone.
"""

import math
from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward

ORDERS = ("random", "spatial-first", "temporal-first")
POSITIONS = ("1d", "3d")
LayerNorm = partial(nn.LayerNorm, eps=1e-6)


# --- Cubes and clusters (section 3.3.1) -------------------------------------


def blocks_per_axis(whole, block, what):
    """How many blocks of size `block` (t, h, w) fill `whole` (t, h, w).

    `what` names the block in the error. Raises ValueError if blocks do not fit.
    """
    for axis, total, size in zip(("time", "height", "width"), whole, block):
        if size < 1 or total < 1 or total % size:
            raise ValueError(
                f"{what} {list(block)} does not divide {list(whole)} along the "
                f"{axis}: {total} is not a multiple of {size}")
    return tuple(total // size for total, size in zip(whole, block))


def video_to_cubes(video, cube):
    """Cut a video [B, C, T, H, W] into cubes [B, N, C, P].

    Cubes are in raster order: time, then height, then width.
    Raises ValueError if they do not fill the video.
    """
    B, C = video.shape[:2]
    t, h, w = blocks_per_axis(video.shape[2:], cube, "cube")
    pt, ph, pw = cube
    x = video.reshape(B, C, t, pt, h, ph, w, pw)
    x = x.permute(0, 2, 4, 6, 1, 3, 5, 7)           # [B, t, h, w, C, pt, ph, pw]
    return x.reshape(B, t * h * w, C, pt * ph * pw)


def cubes_to_video(cubes, grid, cube):
    """The inverse of video_to_cubes: [B, N, C, P] to [B, C, T, H, W].

    `grid` (t, h, w) counts the cubes along each axis, so that N = t h w.
    """
    B, C = cubes.shape[0], cubes.shape[2]
    t, h, w = grid
    pt, ph, pw = cube
    x = cubes.reshape(B, t, h, w, C, pt, ph, pw)
    x = x.permute(0, 4, 1, 5, 2, 6, 3, 7)           # [B, C, t, pt, h, ph, w, pw]
    return x.reshape(B, C, t * pt, h * ph, w * pw)


def cluster_tokens(grid, cluster):
    """[M, K]: row c holds the token indices (0 .. N-1) of cluster c.

    Clusters are in raster order. They must fill the grid.
    """
    # Cut the grid of token indices as if it were a video of one colour
    tokens = torch.arange(math.prod(grid)).reshape(1, 1, *grid)
    return video_to_cubes(tokens, cluster)[0, :, 0]         # [1, M, 1, K] -> [M, K]


def take(x, index):
    """x [B, n, ...] and index [B, m] -> [B, m, ...]: each sample's own rows of x."""
    sample = torch.arange(len(x), device=x.device)[:, None]
    return x[sample, index]


# --- Prediction orders (3.3.2) and visible tokens (4.1) ---------------------


def prediction_orders(kind, cluster_grid, batch, generator=None, device=None):
    """[B, M]: which cluster (0 .. M-1) is at each place of the prediction order.

    `cluster_grid` counts the clusters along (t, h, w).
    random           each sample has a permutation of its own
    spatial-first    all clusters of a time slice, then those of the next slice
    temporal-first   all times of one spatial location, then the next location
    """
    M = math.prod(cluster_grid)
    if kind == "random":
        noise = torch.rand(batch, M, generator=generator, device=device)
        return noise.argsort(dim=1)
    clusters = torch.arange(M, device=device).reshape(cluster_grid)
    if kind == "temporal-first":
        clusters = clusters.permute(1, 2, 0)
    return clusters.flatten().expand(batch, -1)


def count_share(cluster_size, share):
    """`share` of cluster_size tokens, as a whole number.

    The paper's 19.6 of 98 become 20: rounded half up, and never less than one.
    """
    # A share such as 1 - 0.9 is a little too small in floating point: of 15 tokens it gives
    # 1.4999999999999996. round() makes that 1.5 again, which the next line rounds up to 2.
    count = round(share * cluster_size, 6)
    return max(1, math.floor(count + 0.5))


def draw_tokens(clusters, count, batch, generator=None):
    """[B, M, count]: the indices of `count` tokens of each cluster.

    They are drawn anew for every sample and every cluster of `clusters` [M, K].
    """
    device = clusters.device
    noise = torch.rand(batch, *clusters.shape, generator=generator, device=device)
    chosen = noise.argsort(dim=2)[..., :count]      # [B, M, count], each 0 .. K-1
    return clusters.expand(batch, -1, -1).gather(2, chosen)


def attention_masks(M, R, V, predict_after=1):
    """Who may attend to whom once tokens are lined up by place. True = may attend.

    encoder_mask [S, S]: a visible token sees its own place and earlier ones.
    decoder_mask [Q, S]: a query sees earlier places alone.
    The first `predict_after` places have no queries.
    """
    place = torch.arange(1, M + 1)
    seen_place = place[:-1].repeat_interleave(V)            # [S]: 1 1 .. 2 2 .. M-1
    # With predict_after=1 these are 2 2 .. 3 3 .. M
    queried_place = place[predict_after:].repeat_interleave(R)      # [Q]
    encoder_mask = seen_place[:, None] >= seen_place        # [S, S]
    decoder_mask = queried_place[:, None] > seen_place      # [Q, S]
    return encoder_mask, decoder_mask


# --- Layers: those of VideoMAE's ViT, and cross-attention -------------------


def sine_cosine(positions, width):
    """[n] positions -> [n, width]: sine at even channels, cosine at odd ones.

    The wavelengths are 2 pi 10000^(i / width), for i = 0, 2, 4 and so on.
    """
    channel = torch.arange(width, dtype=torch.float64)
    frequency = 1 / 10000 ** (2 * (channel // 2) / width)
    angle = positions[:, None].double() * frequency
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


def position_table(grid, width, kind):
    """Fixed position embeddings [N, width] for a grid (t, h, w) of tokens.

    1d   VideoMAE's: the position is the token's index in raster order
    3d   time, height and width have a third of the channels each, rounded down to an
         even number; the channels left over stay zero
    """
    tokens = torch.arange(math.prod(grid))
    if kind == "1d":
        return sine_cosine(tokens, width)
    third = width // 6 * 2                          # even: each sine has its cosine
    axes = torch.unravel_index(tokens, grid)
    table = torch.cat([sine_cosine(axis, third) for axis in axes], dim=1)
    return F.pad(table, (0, width - 3 * third))


def interpolate_positions(table, old, new):
    """Embeddings [n, width] of the grid `old` (t, h, w) -> [N, width] of the grid `new`.

    Trilinear over time, height and width: a token halfway through the clip has about
    the same embedding in both grids. The same grid leaves the table as it is.
    """
    if new == old:
        return table
    volume = table.T.reshape(1, -1, *old)                           # [1, width, t, h, w]
    volume = F.interpolate(volume, size=new, mode="trilinear", align_corners=False)
    return volume[0].flatten(1).T.contiguous()


def attend(q, k, v, heads, mask=None):
    """Multi-head attention of q [B, n, width] over k and v [B, m, width] -> [B, n, width].

    mask [n, m] has True where attention is allowed.
    """
    def split_heads(x):
        return x.unflatten(2, (heads, -1)).transpose(1, 2)      # [B, heads, n, width / heads]

    x = F.scaled_dot_product_attention(
        split_heads(q), split_heads(k), split_heads(v), attn_mask=mask)
    return x.transpose(1, 2).flatten(2)


class CubeEmbedding(nn.Module):
    """One linear projection of a cube's pixels (3.3.1)."""

    def __init__(self, cube, width):
        super().__init__()
        # Never called: it only holds the weights, under VideoMAE's name and in its shape
        self.proj = nn.Conv3d(3, width, kernel_size=cube, stride=cube)

    def forward(self, cubes):
        """[B, n, 3, P] -> [B, n, D]"""
        # A convolution would need the whole video, a matrix product only the visible cubes. The
        # flattened kernel is in the order of a cube's pixels: colour, time, height, width.
        weight = self.proj.weight.flatten(1)        # [D, 3 P]
        return F.linear(cubes.flatten(2), weight, self.proj.bias)


class SelfAttention(nn.Module):
    """VideoMAE's attention, with biases on q and v only.

    A bias on k would add the same number to all scores of a query, and the
    softmax would cancel it.
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x, mask=None):
        """x [B, n, width], mask [n, n] -> [B, n, width]"""
        no_k_bias = torch.zeros_like(self.v_bias)
        bias = torch.cat((self.q_bias, no_k_bias, self.v_bias))
        q, k, v = F.linear(x, self.qkv.weight, bias).chunk(3, dim=2)
        return self.proj(attend(q, k, v, self.heads, mask))


class CrossAttention(nn.Module):
    """Queries come from the decoder, keys and values from the encoder's output."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width, bias=False)    # as in SelfAttention
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, memory, mask):
        """x [B, Q, d], memory [B, S, d], mask [Q, S] -> [B, Q, d]"""
        q, k, v = self.q(x), self.k(memory), self.v(memory)
        return self.proj(attend(q, k, v, self.heads, mask))


def mlp(width, ratio):
    """Two linear layers; the hidden one is `ratio` times as wide."""
    hidden = int(width * ratio)
    return nn.Sequential(OrderedDict(
        fc1=nn.Linear(width, hidden),
        gelu=nn.GELU(),
        fc2=nn.Linear(hidden, width)))


def initialise(module):
    """VideoMAE's initialisation in pretraining: linear layers xavier-uniform, their biases 0.

    Conv3d keeps torch's default, as it does in VideoMAE.
    """
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# --- Encoder and decoder (3.3.3) --------------------------------------------


def require_known(name, value, known):
    """Raise ValueError unless `value` is one of `known`."""
    if value not in known:
        raise ValueError(f"{name} '{value}' is unknown: choose one of {', '.join(known)}")


def require_heads(name, heads, width):
    """Raise ValueError unless `heads` divide `width`."""
    if heads < 1 or width < 1 or width % heads:
        raise ValueError(f"{name} {heads} does not divide the width {width}")


class EncoderBlock(nn.Module):
    """ViT's block: x + attention(norm(x)), then the same with an MLP."""

    def __init__(self, width, heads, mlp_ratio):
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.norm2 = LayerNorm(width)
        self.mlp = mlp(width, mlp_ratio)
        self.drop_path = nn.Identity()      # fine-tuning puts stochastic depth here

    def forward(self, x, mask=None):
        """x [B, n, D], mask [n, n] -> [B, n, D]"""
        x = x + self.drop_path(self.attn(self.norm1(x), mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Encoder(nn.Module):
    """A plain ViT over cubes, with VideoMAE's parameter names.

    `pretrained_clip` is (frames, size) of the clips that the weights were pretrained on,
    or (0, 0) if they were pretrained on the `frames` and `size` given here. The table of
    positions is made for the clips of pretraining, then interpolated to `frames` and `size`.
    `checkpointing` computes activations again in the backward pass, which saves
    memory. Raises ValueError if `positions` is unknown, cubes do not fill the video or
    heads do not divide the width.
    """

    def __init__(self, *, frames, size, cube, width, depth, heads, mlp_ratio,
                 positions="1d", pretrained_clip=(0, 0), checkpointing=False):
        super().__init__()
        require_known("positions", positions, POSITIONS)
        require_heads("heads", heads, width)
        self.cube = tuple(cube)
        self.width = width
        self.checkpointing = checkpointing
        # The grid and positions of the pretraining. resize() replaces both by those of this
        # encoder's clips.
        old_frames, old_size = pretrained_clip if any(pretrained_clip) else (frames, size)
        self.grid = blocks_per_axis((old_frames, old_size, old_size), self.cube, "cube")
        table = position_table(self.grid, width, positions)             # [N, D]
        self.register_buffer("positions", table, persistent=False)
        self.resize(frames, size)
        self.patch_embed = CubeEmbedding(self.cube, width)
        blocks = [EncoderBlock(width, heads, mlp_ratio) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = LayerNorm(width)
        self.apply(initialise)

    def resize(self, frames, size):
        """From now on take clips of `frames` x `size` x `size`, with interpolated positions.

        A second call interpolates what the first one made. For several sizes, make an encoder
        for each.
        """
        grid = blocks_per_axis((frames, size, size), self.cube, "cube")
        # Assigned by way of .data: in a fork that learns positions they are a Parameter, and a
        # plain tensor cannot take its place
        self.positions.data = interpolate_positions(self.positions.data, self.grid, grid)
        self.grid = grid

    def encode(self, cubes, index=None, mask=None):
        """Some cubes [B, n, 3, P] of each video -> features [B, n, D].

        index [B, n] says which token (0 .. N-1) each cube is. Without it all N
        tokens are there, in raster order.
        mask [n, n] has True where attention is allowed. Without it every token
        attends to all others, as in transfer.
        """
        positions = self.positions if index is None else self.positions[index]
        # This fp32 table makes the residual stream fp32, also under autocast. In bf16 a sum over
        # many layers would lose small terms.
        x = self.patch_embed(cubes) + positions
        for block in self.blocks:
            if self.checkpointing:
                x = recompute_in_backward(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask)
        return self.norm(x)

    def forward(self, video):
        """All tokens of whole videos, for transfer: [B, 3, T, H, W] -> [B, N, D].

        Raises ValueError if the clips have another size than the encoder's.
        """
        grid = blocks_per_axis(video.shape[2:], self.cube, "cube")
        if grid != self.grid:
            raise ValueError(f"clips of {list(video.shape[2:])} have {list(grid)} cubes, but this "
                             f"encoder takes {list(self.grid)}: see resize()")
        return self.encode(video_to_cubes(video, self.cube))


class DecoderBlock(nn.Module):
    """x + cross-attention(norm(x)), then the same with an MLP.

    With `group_size` (Table 9), the queries of one cluster first attend to one another.
    These `group_size` queries must be adjacent.
    """

    def __init__(self, width, heads, mlp_ratio, group_size=None):
        super().__init__()
        self.group_size = group_size
        if group_size:
            self.norm0 = LayerNorm(width)
            self.self_attn = SelfAttention(width, heads)
        self.norm1 = LayerNorm(width)
        self.cross_attn = CrossAttention(width, heads)
        self.norm2 = LayerNorm(width)
        self.mlp = mlp(width, mlp_ratio)

    def forward(self, x, memory, mask=None):
        """x [B, Q, d], memory [B, S, d], mask [Q, S] -> [B, Q, d]"""
        if self.group_size:
            # [B, Q, d] -> [B (Q / R), R, d], where R is group_size. unflatten() raises if R does
            # not divide Q.
            grouped = self.norm0(x).unflatten(1, (-1, self.group_size)).flatten(0, 1)
            x = x + self.self_attn(grouped).reshape(x.shape)
        x = x + self.cross_attn(self.norm1(x), memory, mask)
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Predicts tokens by cross-attention to the encoder's output.

    `grid` is the encoder's; `outputs` is how many numbers are predicted for a token.
    `group_size` is None or, with self-attention, the number of queries of a cluster.
    """

    def __init__(self, *, grid, width, depth, heads, mlp_ratio, outputs,
                 positions="1d", group_size=None, checkpointing=False):
        super().__init__()
        self.checkpointing = checkpointing
        table = position_table(grid, width, positions)                  # [N, d]
        self.register_buffer("positions", table, persistent=False)
        # One learned vector for all queries; the position added to it says which token to predict
        self.query = nn.Parameter(torch.empty(width).normal_(std=0.02))
        blocks = [DecoderBlock(width, heads, mlp_ratio, group_size)
                  for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = LayerNorm(width)
        self.head = nn.Linear(width, outputs)
        self.apply(initialise)

    def forward(self, memory, index, mask=None):
        """Predictions [B, Q, outputs] of the tokens `index` [B, Q].

        memory [B, S, d] is the encoder's output at the decoder's width.
        mask [Q, S] has True where attention is allowed.
        Raises RuntimeError if, with self-attention, group_size does not divide Q.
        """
        x = self.query + self.positions[index]                          # [B, Q, d]
        for block in self.blocks:
            if self.checkpointing:
                x = recompute_in_backward(block, x, memory, mask, use_reentrant=False)
            else:
                x = block(x, memory, mask)
        return self.head(self.norm(x))


# --- ARVideo (3.3.3, 4.1) ---------------------------------------------------


class ARVideo(nn.Module):
    """The pretraining model: encoder, decoder and loss.

    Its arguments are section `model` of config.yaml, which explains them. The
    paper's ablations (Tables 1 and 6 to 10) vary some of them. `mask_ratio` is the
    share of hidden tokens. `predict_after` is how many places at the start of the
    order are not predicted, 1 or more. `pretrained_clip` is there because fine-tuning
    reads section `model` too; in pretraining it stays (0, 0).
    `predict_ratio` is not in the paper: the share of each cluster's tokens that is
    predicted, drawn anew in every training step.
    Raises ValueError where sizes do not fit or a value is out of range.
    """

    def __init__(
        self, frames=16, size=224, cube=(2, 16, 16), cluster=(2, 7, 7),
        order="random", mask_ratio=0.8, predict_after=1, predict_ratio=1.0,
        width=768, depth=12, heads=12, mlp_ratio=4.0,
        decoder_width=512, decoder_depth=4, decoder_heads=8,
        decoder_self_attention=False, normalise_target=True,
        positions="1d", pretrained_clip=(0, 0), checkpointing=False,
    ):
        super().__init__()
        require_known("order", order, ORDERS)
        require_heads("decoder_heads", decoder_heads, decoder_width)
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio {mask_ratio} is out of range: it is the "
                             "share of hidden tokens, from 0 to below 1")
        if not 0 < predict_ratio <= 1:
            raise ValueError(f"predict_ratio {predict_ratio} is out of range: it is the "
                             "share of tokens that is predicted, above 0 and at most 1")

        self.order_kind = order
        self.mask_ratio = mask_ratio
        self.predict_after = predict_after
        self.predict_ratio = predict_ratio
        self.normalise_target = normalise_target
        self.encoder = Encoder(
            frames=frames, size=size, cube=cube, width=width, depth=depth, heads=heads,
            mlp_ratio=mlp_ratio, positions=positions, pretrained_clip=pretrained_clip,
            checkpointing=checkpointing)
        self.grid = self.encoder.grid
        self.cube = self.encoder.cube
        self.encoder_to_decoder = nn.Linear(width, decoder_width, bias=False)
        initialise(self.encoder_to_decoder)
        if normalise_target and self.target_shape()[-1] == 1:
            raise ValueError("normalise_target needs cubes of more than one pixel: "
                             "a single one has no standard deviation")
        self.set_clusters(cluster)
        self.decoder = Decoder(
            grid=self.grid, width=decoder_width, depth=decoder_depth,
            heads=decoder_heads, mlp_ratio=mlp_ratio,
            outputs=math.prod(self.target_shape()),
            group_size=self.predicted_count if decoder_self_attention else None,
            positions=positions, checkpointing=checkpointing)

    def set_clusters(self, cluster):
        """Divide the tokens into clusters of the shape `cluster` and build both masks.

        It uses mask_ratio, predict_after and predict_ratio. The constructor calls it. A fork
        may call it again to change the shape in training, though not with self-attention in
        the decoder, whose groups are fixed.
        Raises ValueError where sizes do not fit.
        """
        device = self.encoder.positions.device
        self.cluster_grid = blocks_per_axis(self.grid, cluster, "cluster")
        clusters = cluster_tokens(self.grid, cluster)                   # [M, K]
        M, K = clusters.shape
        if not 1 <= self.predict_after < M:
            raise ValueError(
                f"predict_after {self.predict_after} is out of range: it is the number of places "
                f"at the start that are not predicted, 1 or more, and fewer than the {M} clusters")
        self.visible_count = count_share(K, 1 - self.mask_ratio)        # V
        self.predicted_count = count_share(K, self.predict_ratio)       # R

        # Tokens are lined up by place, so these two masks serve every order
        encoder_mask, decoder_mask = attention_masks(
            M, self.predicted_count, self.visible_count, self.predict_after)
        self.register_buffer("clusters", clusters.to(device), persistent=False)
        self.register_buffer("encoder_mask", encoder_mask.to(device), persistent=False)
        self.register_buffer("decoder_mask", decoder_mask.to(device), persistent=False)

    def draw(self, batch, generator=None):
        """What is random in a step, for `batch` videos.

        order [B, M]: which cluster is at each place.
        visible [B, M, V]: row c holds the visible tokens of cluster c, whatever its place.
        predicted [B, M, R]: row c holds the tokens of cluster c to predict, all of them unless
        predict_ratio is below 1.
        """
        device = self.clusters.device
        order = prediction_orders(
            self.order_kind, self.cluster_grid, batch, generator, device)
        visible = draw_tokens(self.clusters, self.visible_count, batch, generator)
        predicted = self.clusters.expand(batch, -1, -1)
        if self.predicted_count < self.clusters.shape[1]:
            predicted = draw_tokens(self.clusters, self.predicted_count, batch, generator)
        return order, visible, predicted

    def line_up(self, order, visible, predicted):
        """Token indices, lined up by place.

        seen [B, S] enter the encoder, queried [B, Q] are predicted.
        """
        # Nothing comes after the last cluster, so it is not encoded
        seen = take(visible, order[:, :-1])                         # [B, M-1, V]
        queried = take(predicted, order[:, self.predict_after:])    # [B, M - predict_after, R]
        return seen.flatten(1), queried.flatten(1)

    def predict(self, cubes, seen, queried):
        """Predict the tokens `queried` [B, Q] from the tokens `seen` [B, S].

        cubes [B, N, 3, P] are all cubes of the videos. Returns [B, Q, 3, P].
        """
        visible_cubes = take(cubes, seen)                                   # [B, S, 3, P]
        encoded = self.encoder.encode(visible_cubes, seen, self.encoder_mask)   # [B, S, D]
        memory = self.encoder_to_decoder(encoded)                           # [B, S, d]
        prediction = self.decoder(memory, queried, self.decoder_mask)       # [B, Q, 3 P]
        return prediction.unflatten(2, self.target_shape())

    def statistics(self, cubes):
        """Mean and deviation over the last dimension, [..., 1]: one for each cube and colour.

        The deviation is the unbiased one. Without normalise_target: 0 and 1.
        """
        if not self.normalise_target:
            return 0.0, 1.0
        deviation, mean = torch.std_mean(cubes, dim=-1, keepdim=True)
        return mean, deviation + 1e-6               # a flat cube must not divide by zero

    def target_shape(self):
        """The shape of a token's target: (3, P).

        The constructor calls this. So an override may use self.encoder, self.cube and
        self.grid, but nothing that a subclass sets after super().__init__().
        """
        return 3, math.prod(self.cube)

    def target(self, video, cubes):
        """The values to predict [B, N, 3, P], before normalisation. Here they are the cubes.

        A subclass overrides this method for another target, which it may take from `video`.
        If its shape is not (3, P), override target_shape() too, and reconstruct() if there are to
        be pictures.
        """
        return cubes

    def forward(self, video, order, visible, predicted):
        """The loss, a scalar.

        video [B, 3, T, H, W] as data.normalise gives it; the others as draw() gives them.
        """
        cubes = video_to_cubes(video, self.cube)                        # [B, N, 3, P]
        seen, queried = self.line_up(order, visible, predicted)         # [B, S], [B, Q]
        prediction = self.predict(cubes, seen, queried)                 # [B, Q, 3, P]
        # Target and loss in fp32, also under autocast
        target = take(self.target(video, cubes), queried).float()       # [B, Q, 3, P]
        if target.shape != prediction.shape:
            raise ValueError(f"target() gives {list(target.shape[2:])} for each token, but "
                             f"target_shape() is {list(prediction.shape[2:])}")
        mean, deviation = self.statistics(target)                       # [B, Q, 3, 1]
        target = (target - mean) / deviation                            # [B, Q, 3, P]
        return F.mse_loss(prediction.float(), target)

    @torch.no_grad()
    def reconstruct(self, video, order, visible, predicted):
        """What the encoder sees and what is predicted: two videos [B, 3, T, H, W].

        All other cubes are zero, which in a normalised video is ImageNet's mean colour. With
        normalise_target a cube's mean and deviation come from the true video, since the model
        predicts the pattern alone.
        Raises ValueError if a subclass has targets of another shape than pixels.
        """
        if self.target_shape() != (3, math.prod(self.cube)):
            raise ValueError("these targets are not pixels and cannot be drawn: set "
                             "pretrain.picture_epochs=0, or override reconstruct")
        cubes = video_to_cubes(video, self.cube)                        # [B, N, 3, P]
        seen, queried = self.line_up(order, visible, predicted)         # [B, S], [B, Q]
        mean, deviation = self.statistics(take(self.target(video, cubes), queried))
        prediction = self.predict(cubes, seen, queried).float() * deviation + mean

        # The inverse of take: write rows where their indices say
        sample = torch.arange(len(cubes), device=cubes.device)[:, None]
        shown = torch.zeros_like(cubes)
        shown[sample, seen] = take(cubes, seen)
        predictions = torch.zeros_like(cubes)
        predictions[sample, queried] = prediction
        return [cubes_to_video(x, self.grid, self.cube) for x in (shown, predictions)]


def pretrained_encoder(checkpoint, model_class=ARVideo, frames=None, size=None):
    """The encoder alone, for transfer (3.3.3), from a checkpoint of train_pretrain.py.

    `checkpoint` is the content of the file, as torch.load gives it, not its path.
    encoder(video [B, 3, T, H, W]), normalised as by data.normalise, gives features
    [B, N, D]; every token attends to all others. `model_class` is the class that was
    trained. `frames` and `size` are those of the clips, by default those of pretraining.
    Raises ValueError if the checkpoint is not from pretraining, or cubes do not fill the clips.
    Raises RuntimeError, naming the tensors, if the weights do not fit the encoder, and
    TypeError if `model_class` lacks an argument that the trained class had.
    """
    # Checkpoints of train_finetune.py have the key `classes`, those of train_pretrain.py have not
    if "config" not in checkpoint or "classes" in checkpoint:
        raise ValueError("pretrained_encoder needs a checkpoint of train_pretrain.py; for a "
                         "fine-tuned one, use finetuned_classifier of train_finetune.py")
    settings = checkpoint["config"]["model"]
    encoder = model_class(**settings).encoder
    # The dot matters: encoder_to_decoder stays behind
    weights = {name.removeprefix("encoder."): tensor
               for name, tensor in checkpoint["model"].items()
               if name.startswith("encoder.")}
    encoder.load_state_dict(weights)
    if frames or size:
        encoder.resize(frames or settings["frames"], size or settings["size"])
    return encoder.eval()
