"""
ARVideo: autoregressive video pretraining (Ren et al. 2024, arXiv 2405.15160), sections 3.3 and 4.1.

A video is cut into cubes of pixels; each cube becomes a token. Clusters of neighbouring tokens are the elements of
the autoregression (3.3.1). Every sample gets an order of its clusters, by default a random one (3.3.2); a cluster's
rank in it is its place, and "earlier" means earlier in it. In every cluster a random fifth of the tokens is visible
(4.1).

    Encoder   takes the visible tokens; a token attends to its own cluster and to earlier ones (3.3.3).
    Decoder   predicts all tokens of a cluster, visible or not, from the encoder's output for earlier clusters (3.3.3).
    Loss      mean squared error of the pixels, each cube normalised, colour by colour, by its mean and deviation (4.1).

With two attention masks one pass predicts all places. The last cluster never enters the encoder, since nothing
comes after it; the first is never predicted.

    model = ARVideo()                                       # ViT-B, 16 x 224 x 224
    loss = model(video, *model.draw(len(video)))            # video [B, 3, 16, 224, 224]

Symbols in the shapes, with the default sizes, the paper's but for Q (1372, as predict_after=2 gives):
    B   videos in the batch
    N   tokens of a video                   1568 = 8 x 14 x 14
    P   pixels of a cube                     512 = 2 x 16 x 16, each with C = 3 colours
    M   clusters of a video                   16 = 4 x 2 x 2
    K   tokens of a cluster                   98 = 2 x 7 x 7
    V   visible tokens of a cluster           20, a fifth of K
    S   tokens that enter the encoder        300 = (M - 1) V
    Q   tokens to predict: queries          1470 = (M - 1) K
    D   width of the encoder                 768
    d   width of the decoder                 512

Places count from 0 here, from 1 in the README and in pictures. Run by `python train_pretrain.py`; this file needs
torch and nothing else.
"""

import math
from collections import OrderedDict
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute      # in the backward pass, instead of keeping activations

ORDERS = ("random", "spatial-first", "temporal-first")
LayerNorm = partial(nn.LayerNorm, eps=1e-6)


# --- Cubes and clusters (section 3.3.1) -----------------------------------------------------------

def blocks_per_axis(whole, block, what):
    """How many blocks of size `block` (t, h, w) fill `whole` (t, h, w). ValueError if they do not fit."""
    for axis, total, size in zip(("frames", "height", "width"), whole, block):
        if size < 1 or total < 1 or total % size:
            raise ValueError(f"{what} {list(block)} does not divide {list(whole)} along the {axis}: "
                             f"{total} is not a multiple of {size}")
    return tuple(total // size for total, size in zip(whole, block))


def video_to_cubes(video, cube):
    """Cut a video [B, C, T, H, W] into cubes [B, N, C, P], in raster order (time, height, width)."""
    B, C = video.shape[:2]
    t, h, w = blocks_per_axis(video.shape[2:], cube, "cube")
    pt, ph, pw = cube
    x = video.reshape(B, C, t, pt, h, ph, w, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)    # [B, t, h, w, C, pt, ph, pw]
    return x.reshape(B, t * h * w, C, pt * ph * pw)


def cubes_to_video(cubes, grid, cube):
    """Inverse of video_to_cubes: [B, N, C, P], N filling `grid` (t, h, w), to [B, C, T, H, W]."""
    B, C = cubes.shape[0], cubes.shape[2]
    t, h, w, pt, ph, pw = *grid, *cube
    x = cubes.reshape(B, t, h, w, C, pt, ph, pw).permute(0, 4, 1, 5, 2, 6, 3, 7)    # [B, C, t, pt, h, ph, w, pw]
    return x.reshape(B, C, t * pt, h * ph, w * pw)


def cluster_tokens(grid, cluster):
    """[M, K]: row c holds the token indices (0 .. N-1) of cluster c, clusters in raster order."""
    tokens = torch.arange(math.prod(grid)).reshape(1, 1, *grid)
    return video_to_cubes(tokens, cluster)[0, :, 0]     # a cluster is to tokens what a cube is to pixels


def take(x, index):
    """x [B, n, ...], index [B, m] -> [B, m, ...]: for every sample its own rows of x."""
    return x[torch.arange(len(x), device=x.device)[:, None], index]


# --- Prediction orders (3.3.2) and visible tokens (4.1) -------------------------------------------

def prediction_orders(kind, cluster_grid, batch, generator=None, device=None):
    """[B, M]: the cluster at every place of the prediction order. `cluster_grid` counts clusters (t, h, w).
    random: a permutation of its own for every sample. spatial-first: all clusters of a time slice, then the next slice.
    temporal-first: all time slices of one spatial location, then the next location."""
    if kind == "random":
        return torch.rand(batch, math.prod(cluster_grid), generator=generator, device=device).argsort(dim=1)
    raster = torch.arange(math.prod(cluster_grid), device=device).reshape(cluster_grid)
    if kind == "temporal-first":
        raster = raster.permute(1, 2, 0)
    return raster.flatten().expand(batch, -1)


def visible_count(tokens, mask_ratio):
    """How many of a cluster's tokens stay visible when mask_ratio of them are hidden: rounded half up, at least one."""
    return max(1, math.floor(tokens - mask_ratio * tokens + 0.5))


def visible_tokens(clusters, count, batch, generator=None):
    """[B, M, V]: the token indices that stay visible, `count` drawn for every sample and cluster."""
    noise = torch.rand(batch, *clusters.shape, generator=generator, device=clusters.device)
    chosen = noise.argsort(dim=2)[..., :count]                                      # [B, M, V], each 0 .. K-1
    return clusters.expand(batch, -1, -1).gather(2, chosen)


# --- Layers (VideoMAE's ViT) ----------------------------------------------------------------------

def sine_cosine(positions, width):
    """[n] positions -> [n, width]: sine at even channels, cosine at odd, wavelengths 2 pi to nearly 20000 pi."""
    channel = torch.arange(width, dtype=torch.float64)
    angle = positions[:, None].double() / 10000 ** (2 * (channel // 2) / width)
    return torch.where(channel % 2 == 0, angle.sin(), angle.cos()).float()


def position_table(grid, width, kind):
    """Fixed positions [N, width]. "1d" (VideoMAE's) counts tokens in raster order; "3d" gives time,
    height and width a third of the channels each (what is left over stays zero)."""
    tokens = torch.arange(math.prod(grid))
    if kind == "1d":
        return sine_cosine(tokens, width)
    third = width // 6 * 2                              # even: every sine has its cosine
    table = torch.cat([sine_cosine(axis, third) for axis in torch.unravel_index(tokens, grid)], dim=1)
    return F.pad(table, (0, width - 3 * third))


def attend(q, k, v, heads, mask=None):
    """Multi-head attention of q [B, n, w] over k, v [B, m, w] -> [B, n, w]; mask [n, m], True = may attend."""
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))      # [B, heads, n or m, w/heads]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


class CubeEmbedding(nn.Module):
    """One linear projection of a cube's pixels (3.3.1). The weight has the shape and name of VideoMAE's Conv3d, which
    would embed the whole video; a matrix product embeds only the cubes that it is given."""

    def __init__(self, cube, width):
        super().__init__()
        self.proj = nn.Conv3d(3, width, kernel_size=cube, stride=cube)

    def forward(self, cubes):
        """[B, n, 3, P] -> [B, n, D]"""
        return F.linear(cubes.flatten(2), self.proj.weight.flatten(1), self.proj.bias)


class SelfAttention(nn.Module):
    """VideoMAE's attention: biases on q and v only, since a bias on k cancels in the softmax."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.proj = nn.Linear(width, width)

    def forward(self, x, mask=None):
        """x [B, n, w], mask [n, n] -> [B, n, w]"""
        bias = torch.cat((self.q_bias, torch.zeros_like(self.v_bias), self.v_bias))
        q, k, v = F.linear(x, self.qkv.weight, bias).chunk(3, dim=2)
        return self.proj(attend(q, k, v, self.heads, mask))


class CrossAttention(nn.Module):
    """Queries from the decoder, keys and values from the encoder's output; biases as in SelfAttention."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width, bias=False)
        self.v = nn.Linear(width, width)
        self.proj = nn.Linear(width, width)

    def forward(self, x, memory, mask):
        """x [B, Q, d], memory [B, S, d], mask [Q, S] -> [B, Q, d]"""
        return self.proj(attend(self.q(x), self.k(memory), self.v(memory), self.heads, mask))


def mlp(width, ratio):
    hidden = int(width * ratio)
    return nn.Sequential(OrderedDict(fc1=nn.Linear(width, hidden), gelu=nn.GELU(), fc2=nn.Linear(hidden, width)))


def initialise(module):
    """VideoMAE's initialisation: linear layers xavier-uniform, their biases 0; Conv3d keeps torch's default."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# --- Encoder and decoder (3.3.3) ------------------------------------------------------------------

class EncoderBlock(nn.Module):
    """ViT's block: norm and self-attention, norm and MLP, each added to its input."""

    def __init__(self, width, heads, mlp_ratio):
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = SelfAttention(width, heads)
        self.norm2 = LayerNorm(width)
        self.mlp = mlp(width, mlp_ratio)
        self.drop_path = nn.Identity()                  # fine-tuning puts its stochastic depth here

    def forward(self, x, mask=None):
        x = x + self.drop_path(self.attn(self.norm1(x), mask))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Encoder(nn.Module):
    """A plain ViT over cubes, with VideoMAE's parameter names."""

    def __init__(self, frames, size, cube, width, depth, heads, mlp_ratio, positions, checkpointing):
        super().__init__()
        self.cube, self.width, self.checkpointing = tuple(cube), width, checkpointing
        self.grid = blocks_per_axis((frames, size, size), cube, "cube")
        self.register_buffer("positions", position_table(self.grid, width, positions), persistent=False)
        self.patch_embed = CubeEmbedding(self.cube, width)
        self.blocks = nn.ModuleList(EncoderBlock(width, heads, mlp_ratio) for _ in range(depth))
        self.norm = LayerNorm(width)
        self.apply(initialise)

    def forward(self, cubes, index=None, mask=None):
        """cubes [B, n, 3, P] -> features [B, n, D].
        index [B, n] says which token (0 .. N-1) each cube is; without it all N are there, in raster order.
        mask [n, n], True = may attend; without it every token attends to all, as in transfer."""
        x = self.patch_embed(cubes) + (self.positions if index is None else self.positions[index])
        for block in self.blocks:
            x = recompute(block, x, mask, use_reentrant=False) if self.checkpointing else block(x, mask)
        return self.norm(x)

    def features(self, video):
        """All tokens of a whole video, for transfer: [B, 3, T, H, W] -> [B, N, D]."""
        return Encoder.forward(self, video_to_cubes(video, self.cube))      # a classifier overrides forward


class DecoderBlock(nn.Module):
    """Cross-attention and MLP. With a `cluster_size` (Table 9) queries first attend to the queries of their cluster."""

    def __init__(self, width, heads, mlp_ratio, cluster_size=None):
        super().__init__()
        self.cluster_size = cluster_size
        if cluster_size:
            self.norm0 = LayerNorm(width)
            self.self_attn = SelfAttention(width, heads)
        self.norm1 = LayerNorm(width)
        self.cross_attn = CrossAttention(width, heads)
        self.norm2 = LayerNorm(width)
        self.mlp = mlp(width, mlp_ratio)

    def forward(self, x, memory, mask=None):
        """x [B, Q, d], memory [B, S, d], mask [Q, S] -> [B, Q, d]"""
        if self.cluster_size:                           # queries stand cluster by cluster
            clusters = self.norm0(x).reshape(-1, self.cluster_size, x.shape[2])     # [B (Q/K), K, d]
            x = x + self.self_attn(clusters).reshape(x.shape)
        x = x + self.cross_attn(self.norm1(x), memory, mask)
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Predicts the pixels of any tokens by cross-attention to the encoder's output."""

    def __init__(self, grid, width, depth, heads, mlp_ratio, positions, cluster_size, outputs, checkpointing):
        super().__init__()
        self.checkpointing = checkpointing
        self.register_buffer("positions", position_table(grid, width, positions), persistent=False)
        self.query = nn.Parameter(torch.empty(width).normal_(std=0.02))             # [d], shared by all queries
        self.blocks = nn.ModuleList(DecoderBlock(width, heads, mlp_ratio, cluster_size) for _ in range(depth))
        self.norm = LayerNorm(width)
        self.head = nn.Linear(width, outputs)
        self.apply(initialise)

    def forward(self, memory, index, mask=None):
        """memory [B, S, d], index [B, Q] of the tokens to predict, mask [Q, S] -> [B, Q, 3 P]"""
        x = self.query + self.positions[index]
        for block in self.blocks:
            x = recompute(block, x, memory, mask, use_reentrant=False) if self.checkpointing else block(x, memory, mask)
        return self.head(self.norm(x))


# --- ARVideo (3.3.3, 4.1) -------------------------------------------------------------------------

class ARVideo(nn.Module):
    """The pretraining model: encoder, decoder and loss. The arguments are config.yaml's section `model`, explained
    there; the ablations of the paper (Tables 1, 6-10) change them. mask_ratio is the share of hidden tokens;
    predict_after is the number of places at the start that are not predicted, 1 or more. Raises ValueError where sizes
    do not fit, an order is unknown or a ratio is out of range."""

    def __init__(self, frames=16, size=224, cube=(2, 16, 16), cluster=(2, 7, 7), order="random", mask_ratio=0.8,
                 predict_after=1, width=768, depth=12, heads=12, mlp_ratio=4.0, decoder_width=512, decoder_depth=4,
                 decoder_heads=8, decoder_self_attention=False, normalise_target=True, positions="1d",
                 checkpointing=False):
        super().__init__()
        for name, kind, known in (("order", order, ORDERS), ("positions", positions, ("1d", "3d"))):
            if kind not in known:
                raise ValueError(f"{name} '{kind}' is unknown: choose one of {', '.join(known)}")
        if not 0 <= mask_ratio < 1:
            raise ValueError(f"mask_ratio {mask_ratio} is out of range: it is the share of hidden tokens, 0 to below 1")
        for name, own_width, own_heads in (("heads", width, heads), ("decoder_heads", decoder_width, decoder_heads)):
            if own_heads < 1 or own_width < 1 or own_width % own_heads:
                raise ValueError(f"{name} {own_heads} does not divide the width {own_width}")
        self.encoder = Encoder(frames, size, cube, width, depth, heads, mlp_ratio, positions, checkpointing)
        self.grid, self.cube, self.order = self.encoder.grid, self.encoder.cube, order
        self.cluster_grid = blocks_per_axis(self.grid, cluster, "cluster")
        M, K = math.prod(self.cluster_grid), math.prod(cluster)
        if not 1 <= predict_after < M:
            raise ValueError(f"predict_after {predict_after} is out of range: it counts the clusters seen first, at "
                             f"least 1 and fewer than all {M}")
        if normalise_target and math.prod(cube) == 1:
            raise ValueError("normalise_target needs cubes of more than one pixel: one has no standard deviation")
        self.predict_after, self.normalise_target = predict_after, normalise_target
        self.visible_count = visible_count(K, mask_ratio)

        self.encoder_to_decoder = nn.Linear(width, decoder_width, bias=False)
        self.decoder = Decoder(self.grid, decoder_width, decoder_depth, decoder_heads, mlp_ratio, positions,
                               K if decoder_self_attention else None, 3 * math.prod(cube), checkpointing)
        initialise(self.encoder_to_decoder)

        # Tokens are lined up by place, so these two masks serve every order. True = may attend.
        self.register_buffer("clusters", cluster_tokens(self.grid, cluster), persistent=False)          # [M, K]
        seen_place = torch.arange(M - 1).repeat_interleave(self.visible_count)      # [S]: 0 0 .. 1 1 .. M-2
        queried_place = torch.arange(predict_after, M).repeat_interleave(K)         # [Q]: 1 1 .. 2 2 .. M-1
        own_or_earlier = seen_place[:, None] >= seen_place                          # [S, S]
        only_earlier = queried_place[:, None] > seen_place                          # [Q, S]
        self.register_buffer("encoder_mask", own_or_earlier, persistent=False)
        self.register_buffer("decoder_mask", only_earlier, persistent=False)

    def draw(self, batch, generator=None):
        """order [B, M]: the cluster at every place; visible [B, M, V]: the visible tokens of every cluster."""
        order = prediction_orders(self.order, self.cluster_grid, batch, generator, self.clusters.device)
        return order, visible_tokens(self.clusters, self.visible_count, batch, generator)

    def line_up(self, order, visible):
        """Token indices lined up by place: `seen` [B, S] enter the encoder, `queried` [B, Q] are predicted."""
        seen = take(visible, order[:, :-1])             # without the last cluster: nothing comes after it
        queried = self.clusters[order[:, self.predict_after:]]
        return seen.flatten(1), queried.flatten(1)

    def predict(self, cubes, seen, queried):
        """The prediction [B, Q, 3, P] of the tokens `queried` from the tokens `seen` of the cubes [B, N, 3, P]."""
        encoded = self.encoder(take(cubes, seen), seen, self.encoder_mask)          # [B, S, D], the README's h
        memory = self.encoder_to_decoder(encoded)                                   # [B, S, d]
        prediction = self.decoder(memory, queried, self.decoder_mask)               # [B, Q, 3 P]
        return prediction.unflatten(2, (3, -1))

    def statistics(self, cubes):
        """Each cube's mean and unbiased deviation [..., 1], for each colour; without normalise_target 0 and 1."""
        if not self.normalise_target:
            return 0.0, 1.0
        deviation, mean = torch.std_mean(cubes, dim=-1, keepdim=True)
        return mean, deviation + 1e-6                   # a flat cube must not divide by zero

    def target(self, video, cubes):
        """What is predicted, before normalisation [B, N, 3, P]: the cubes. Forks with another target override this."""
        return cubes

    def forward(self, video, order, visible):
        """The loss, a scalar. video [B, 3, T, H, W] as data.normalise gives it, order and visible as draw() does."""
        cubes = video_to_cubes(video, self.cube)                                    # [B, N, 3, P]
        seen, queried = self.line_up(order, visible)                                # [B, S], [B, Q]
        prediction = self.predict(cubes, seen, queried)                             # [B, Q, 3, P]
        target = take(self.target(video, cubes), queried)                           # [B, Q, 3, P]
        mean, deviation = self.statistics(target)                                   # [B, Q, 3, 1]
        target = (target - mean) / deviation                                        # [B, Q, 3, P], the README's x
        return F.mse_loss(prediction.float(), target)                               # in fp32, also under autocast

    @torch.no_grad()
    def reconstruct(self, video, order, visible):
        """The tokens that the encoder sees and the predictions, as two videos [B, 3, T, H, W] that are zero elsewhere.
        With normalise_target a cube's mean and deviation come from the true video: only the pattern is predicted."""
        cubes = video_to_cubes(video, self.cube)
        seen, queried = self.line_up(order, visible)
        mean, deviation = self.statistics(take(self.target(video, cubes), queried))
        sample = torch.arange(len(cubes), device=cubes.device)[:, None]
        shown, predicted = torch.zeros_like(cubes), torch.zeros_like(cubes)
        shown[sample, seen] = take(cubes, seen)
        predicted[sample, queried] = self.predict(cubes, seen, queried).float() * deviation + mean
        return [cubes_to_video(picture, self.grid, self.cube) for picture in (shown, predicted)]


def pretrained_encoder(checkpoint, model=ARVideo):
    """The encoder alone, for transfer (3.3.3), from a checkpoint of train_pretrain.py; `model` is the class trained.
    Without a mask every token attends to every other: encoder.features(video [B, 3, T, H, W]) -> [B, N, D].
    Raises RuntimeError, naming the tensors, if the weights do not fit the configuration saved with them."""
    encoder = model(**checkpoint["config"]["model"]).encoder
    encoder.load_state_dict({name.removeprefix("encoder."): tensor for name, tensor in checkpoint["model"].items()
                             if name.startswith("encoder.")})       # with the dot: encoder_to_decoder stays behind
    return encoder.eval()
