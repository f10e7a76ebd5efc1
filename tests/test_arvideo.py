"""The numbers that the paper states, and the equivalences that its method rests on.

A cluster's place is its position in the prediction order, counted from 1. So `order[:, i]`
is the cluster at place i + 1.
"""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import StochasticDepth

import arvideo
from arvideo import ARVideo, Encoder, cubes_to_video, take, video_to_cubes
from train_finetune import Classifier, Probe

# A model of 2 x 4 x 4 tokens in 8 clusters of 4, of which 2 are visible
SMALL_ENCODER = dict(frames=4, size=16, cube=(2, 4, 4), width=32, depth=2, heads=4)
SMALL = dict(
    **SMALL_ENCODER, cluster=(1, 2, 2), mask_ratio=0.5,
    decoder_width=24, decoder_depth=2, decoder_heads=2)
TOKENS = 32
CLUSTERS = 8
CLUSTER_SIZE = 4


def small_model(**changes):
    torch.manual_seed(0)
    return ARVideo(**{**SMALL, **changes}).eval()


def small_video(videos=2):
    return torch.randn(videos, 3, 4, 16, 16)


@pytest.fixture(scope="module")
def paper():
    """The default model, without memory for its weights."""
    with torch.device("meta"):
        return ARVideo()


# --- The paper's counts (section 3.3 and Table 5) ---------------------------


def test_counts_of_the_paper(paper):
    assert paper.grid == (8, 14, 14)
    assert len(paper.encoder.positions) == 1568
    assert paper.clusters.shape == (16, 98)
    assert paper.encoder_mask.shape == (300, 300)
    assert paper.decoder_mask.shape == (1470, 300)
    with torch.device("meta"):
        later = ARVideo(predict_after=2)
    assert later.decoder_mask.shape == (1372, 300)


def test_visible_tokens_are_a_random_fifth_of_every_cluster():
    clusters = arvideo.cluster_tokens((8, 14, 14), (2, 7, 7))
    count = arvideo.count_share(98, 1 - 0.8)
    visible = arvideo.draw_tokens(clusters, count, 3)
    assert visible.shape == (3, 16, 20)
    choices = set()
    for b, c in product(range(3), range(16)):
        tokens = clusters[c].tolist()
        drawn = set(visible[b, c].tolist())
        assert len(drawn) == 20
        assert drawn <= set(tokens)
        choices.add(tuple(token in drawn for token in tokens))
    # No choice repeats another, be it in the same video or in the same cluster
    assert len(choices) == 3 * 16


@pytest.mark.parametrize("tokens, ratio, count", [
    (98, 0.8, 20),
    (98, 0.75, 25),
    (98, 0.95, 5),
    (15, 0.9, 2),
    (1, 0.8, 1),
    (4, 0.0, 4),
])
def test_visible_tokens_are_rounded_half_up_to_one_or_more(tokens, ratio, count):
    assert arvideo.count_share(tokens, 1 - ratio) == count


def test_clusters_are_blocks_of_neighbouring_tokens():
    clusters = arvideo.cluster_tokens((2, 4, 6), (1, 2, 3))
    blocks = list(product(range(2), range(2), range(2)))        # in raster order
    assert clusters.shape == (len(blocks), 6)
    for tokens, (block_t, block_h, block_w) in zip(clusters, blocks):
        t, h, w = torch.unravel_index(tokens, (2, 4, 6))
        assert (t // 1 == block_t).all()
        assert (h // 2 == block_h).all()
        assert (w // 3 == block_w).all()
    assert sorted(clusters.flatten().tolist()) == list(range(48))


def test_encoder_has_86_million_parameters(paper):
    encoder = sum(p.numel() for p in paper.encoder.parameters())
    head_of_kinetics_400 = 400 * (768 + 1)
    assert round(encoder / 1e6, 1) == 86.2
    assert round((encoder + head_of_kinetics_400) / 1e6, 1) == 86.5


def test_a_view_takes_180_billion_multiply_adds(paper):
    view = torch.empty(1, 3, 16, 224, 224, device="meta")
    # MATH makes attention of plain matrix products, which the counter knows
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        paper.encoder(view)
    multiply_adds = counter.get_total_flops() / 2
    assert 179e9 < multiply_adds < 182e9


# --- Cubes and positions ----------------------------------------------------


def test_cubes_invert():
    video = torch.randn(2, 3, 4, 8, 12)
    grid = (2, 2, 6)
    cube = (2, 4, 2)
    cubes = video_to_cubes(video, cube)
    assert cubes.shape == (2, 24, 3, 16)
    assert torch.equal(cubes_to_video(cubes, grid, cube), video)
    # The token in the first time step, the second row, the second column
    token = 1 * 6 + 1
    assert torch.equal(cubes[1, token, 2], video[1, 2, 0:2, 4:8, 2:4].flatten())


def test_embedding_equals_conv3d():
    embed = small_model().encoder.patch_embed
    video = small_video()
    convolved = embed.proj(video).flatten(2).transpose(1, 2)    # [B, N, D]
    torch.testing.assert_close(embed(video_to_cubes(video, (2, 4, 4))), convolved)


def test_positions_are_videomaes_table():
    table = arvideo.position_table((2, 3, 4), 6, "1d")
    assert table.shape == (24, 6)
    for position, channel in product(range(24), range(6)):
        angle = position / 10000 ** (2 * (channel // 2) / 6)
        expected = math.cos(angle) if channel % 2 else math.sin(angle)
        torch.testing.assert_close(table[position, channel], torch.tensor(expected))


def test_3d_positions_tell_all_tokens_apart():
    table = arvideo.position_table((4, 8, 8), 32, "3d")
    distances = torch.cdist(table, table).fill_diagonal_(1)
    assert distances.min() > 0.1
    # The second ten channels know the row alone: they are the same at two other times and columns
    of_the_row = table.view(4, 8, 8, 32)[..., 10:20]
    assert torch.equal(of_the_row[0, 3, 5], of_the_row[2, 3, 1])


# --- Prediction orders (section 3.3.2) --------------------------------------


def test_spatial_first_goes_through_a_slice_then_to_the_next():
    order = arvideo.prediction_orders("spatial-first", (3, 2, 2), 2)
    t, _, _ = torch.unravel_index(order[0], (3, 2, 2))
    assert t.tolist() == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]
    assert torch.equal(order[0], order[1])


def test_temporal_first_goes_through_a_location_then_to_the_next():
    order = arvideo.prediction_orders("temporal-first", (3, 2, 2), 2)
    t, h, w = torch.unravel_index(order[1], (3, 2, 2))
    assert t.tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 2]
    assert h.tolist() == [0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]
    assert w.tolist() == [0, 0, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1]


def test_random_order_is_a_permutation_of_its_own_for_every_sample():
    generator = torch.Generator().manual_seed(0)
    order = arvideo.prediction_orders("random", (4, 2, 2), 4000, generator)
    assert torch.equal(order.sort(1).values, torch.arange(16).expand(4000, -1))
    assert len(order.unique(dim=0)) == 4000
    # How often each cluster is at each place: always about 1/16
    share = F.one_hot(order, 16).float().mean(0)                # [M places, M clusters]
    assert (share - 1 / 16).abs().max() < 0.02


@pytest.mark.parametrize("kind", arvideo.ORDERS)
def test_a_draw_depends_on_its_generator_alone(kind):
    model = small_model(order=kind, predict_ratio=0.5)
    first = model.draw(2, torch.Generator().manual_seed(7))
    again = model.draw(2, torch.Generator().manual_seed(7))
    assert len(first) == 3
    for one, other in zip(first, again):
        assert torch.equal(one, other)


# --- Causality, and one pass instead of many --------------------------------


def test_attention_masks_of_three_clusters():
    # Each cluster has three tokens, two of them visible; the last is not encoded
    encoder_mask, decoder_mask = arvideo.attention_masks(M=3, R=3, V=2)
    assert encoder_mask.int().tolist() == [
        [1, 1, 0, 0],       # place 1
        [1, 1, 0, 0],
        [1, 1, 1, 1],       # place 2
        [1, 1, 1, 1],
    ]
    assert decoder_mask.int().tolist() == [
        [1, 1, 0, 0],       # place 2
        [1, 1, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 1],       # place 3
        [1, 1, 1, 1],
        [1, 1, 1, 1],
    ]
    same_encoder_mask, later_mask = arvideo.attention_masks(M=3, R=3, V=2, predict_after=2)
    assert torch.equal(same_encoder_mask, encoder_mask)
    assert torch.equal(later_mask, decoder_mask[3:])


def predict_by_place(model, cubes, order, visible):
    """{place: prediction [B, K, 3, P] of the clusters there}, all from one masked pass."""
    all_tokens = model.clusters.expand(len(order), -1, -1)
    seen, queried = model.line_up(order, visible, all_tokens)
    with torch.no_grad():
        prediction = model.predict(cubes, seen, queried)                # [B, Q, 3, P]
    clusters = prediction.unflatten(1, (-1, CLUSTER_SIZE)).unbind(1)    # for every place
    return dict(enumerate(clusters, start=model.predict_after + 1))


@pytest.mark.parametrize("kind", arvideo.ORDERS)
@pytest.mark.parametrize("self_attention", [False, True])
def test_causality_bit_for_bit(kind, self_attention):
    model = small_model(order=kind, decoder_self_attention=self_attention)
    cubes = video_to_cubes(small_video(), model.cube)
    order, visible, _ = model.draw(2)
    before = predict_by_place(model, cubes, order, visible)
    assert list(before) == list(range(2, CLUSTERS + 1))
    for changed_place in range(1, CLUSTERS + 1):
        changed = cubes.clone()
        for b in range(2):
            cluster = order[b, changed_place - 1]
            changed[b, model.clusters[cluster]] += 1.0
        after = predict_by_place(model, changed, order, visible)
        for place, b in product(before, range(2)):
            unchanged = torch.equal(after[place][b], before[place][b])
            assert unchanged == (place <= changed_place)


@torch.no_grad()
def predict_one_cluster(model, cubes, order, visible, place):
    """The prediction [K, 3, P] of the cluster at `place` from those before it, and no more.

    Of one video: cubes [N, 3, P], order [M], visible [M, V].
    """
    # The visible tokens of all clusters before it, and the place of each
    tokens = []
    places = []
    for earlier in range(1, place):
        for token in visible[order[earlier - 1]]:
            tokens.append(token.item())
            places.append(earlier)
    index = torch.tensor([tokens])
    mask = torch.tensor([[other <= own for other in places] for own in places])
    encoded = model.encoder.encode(cubes[index], index, mask)
    memory = model.encoder_to_decoder(encoded)
    # Every query sees all of the memory, so there is no mask
    queried = model.clusters[order[place - 1]]
    prediction = model.decoder(memory, queried[None])                   # [1, K, 3 P]
    return prediction[0].view(CLUSTER_SIZE, 3, -1)


@pytest.mark.parametrize("kind", arvideo.ORDERS)
@pytest.mark.parametrize("self_attention", [False, True])
def test_one_masked_pass_equals_predicting_cluster_after_cluster(kind, self_attention):
    model = small_model(order=kind, decoder_self_attention=self_attention)
    cubes = video_to_cubes(small_video(), model.cube)
    order, visible, _ = model.draw(2)
    parallel = predict_by_place(model, cubes, order, visible)
    for b, place in product(range(2), range(2, CLUSTERS + 1)):
        alone = predict_one_cluster(model, cubes[b], order[b], visible[b], place)
        torch.testing.assert_close(alone, parallel[place][b], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", arvideo.ORDERS)
def test_a_share_of_the_tokens_is_predicted_as_if_all_were(kind):
    whole = small_model(order=kind)
    half = small_model(order=kind, predict_ratio=0.5)           # of the same weights
    cubes = video_to_cubes(small_video(), half.cube)
    order, visible, predicted = half.draw(2)
    assert predicted.shape == (2, CLUSTERS, CLUSTER_SIZE // 2)
    all_of_them = predict_by_place(whole, cubes, order, visible)
    seen, queried = half.line_up(order, visible, predicted)
    assert queried.shape == (2, (CLUSTERS - 1) * CLUSTER_SIZE // 2)
    with torch.no_grad():
        prediction = half.predict(cubes, seen, queried)         # [B, Q, 3, P]
    for b, i in product(range(2), range(queried.shape[1])):
        place = 2 + i // (CLUSTER_SIZE // 2)
        cluster = half.clusters[order[b, place - 1]].tolist()
        token = queried[b, i].item()
        expected = all_of_them[place][b, cluster.index(token)]
        torch.testing.assert_close(prediction[b, i], expected, atol=1e-5, rtol=1e-4)
    assert all(len(row.unique()) == len(row) for row in queried)
    assert half.forward(small_video(), order, visible, predicted).isfinite()


def test_targets_that_are_no_pixels_are_not_drawn():
    class Brightness(ARVideo):
        def target_shape(self):
            return (3,)

        def target(self, video, cubes):
            return cubes.mean(3)

    model = Brightness(**SMALL)
    draw = model.draw(2)
    assert model(small_video(), *draw).isfinite()
    with pytest.raises(ValueError, match="cannot be drawn: set pretrain.picture_epochs=0"):
        model.reconstruct(small_video(), *draw)


def test_a_target_must_have_the_shape_that_is_predicted():
    """Else torch would broadcast it, with no more than a warning."""
    class Mismatched(ARVideo):
        def target_shape(self):
            return (8,)

        def target(self, video, cubes):
            return cubes.mean((2, 3))[..., None]

    model = Mismatched(**SMALL, normalise_target=False)
    with pytest.raises(ValueError, match=r"target\(\) gives \[1\] for each token"):
        model(small_video(), *model.draw(2))
    # A single number has no deviation
    Mismatched.target_shape = lambda self: (1,)
    with pytest.raises(ValueError, match="normalise_target needs"):
        Mismatched(**SMALL)


def test_clusters_of_another_shape_keep_the_shares():
    model = small_model(mask_ratio=0.5, predict_ratio=0.5, predict_after=2)
    model.set_clusters((1, 2, 1))
    assert model.clusters.shape == (TOKENS // 2, 2)
    order, visible, predicted = model.draw(3)
    assert visible.shape == predicted.shape == (3, TOKENS // 2, 1)
    _, queried = model.line_up(order, visible, predicted)
    assert queried.shape == (3, TOKENS // 2 - 2)


def test_self_attention_refuses_queries_that_are_no_whole_clusters():
    """Of 4 videos, 27 queries each would still make groups of 4, across the videos."""
    # As many videos as a cluster has queries, so that all together always are whole groups
    model = small_model(decoder_self_attention=True)
    seen, queried = model.line_up(*model.draw(CLUSTER_SIZE))
    memory = torch.randn(CLUSTER_SIZE, seen.shape[1], model.decoder.query.shape[0])
    assert model.decoder(memory, queried).shape[1] == queried.shape[1]
    with pytest.raises(RuntimeError, match="unflatten"):
        model.decoder(memory, queried[:, 1:])


def test_features_follow_their_tokens_into_another_order():
    encoder = small_model().encoder
    video = small_video()
    cubes = video_to_cubes(video, encoder.cube)
    index = torch.stack([torch.randperm(TOKENS), torch.randperm(TOKENS)])
    with torch.no_grad():
        in_raster_order = encoder(video)
        shuffled = encoder.encode(take(cubes, index), index)
    torch.testing.assert_close(shuffled, take(in_raster_order, index))


def test_prediction_can_start_later():
    model = small_model()
    later_model = small_model(predict_after=3)
    cubes = video_to_cubes(small_video(), model.cube)
    order, visible, _ = model.draw(2)
    every = predict_by_place(model, cubes, order, visible)
    later = predict_by_place(later_model, cubes, order, visible)
    assert list(later) == [4, 5, 6, 7, 8]
    for place, prediction in later.items():
        torch.testing.assert_close(prediction, every[place])


def test_activation_checkpointing_changes_no_gradient():
    def gradients(checkpointing):
        model = small_model(checkpointing=checkpointing).train()
        torch.manual_seed(1)
        model(small_video(), *model.draw(2)).backward()
        return [p.grad for p in model.parameters()]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, recomputed)


# --- Loss (section 4.1) -----------------------------------------------------


def test_predicting_zero_scores_about_one():
    model = small_model()
    torch.nn.init.zeros_(model.decoder.head.weight)
    video = small_video(4) * 0.3 + 2
    loss = model(video, *model.draw(4))
    # The unbiased deviation of 32 pixels leaves 31/32
    assert abs(loss.item() - 31 / 32) < 1e-4


def test_loss_is_the_mean_squared_error_of_normalised_cubes():
    model = small_model()
    video = small_video()
    order, visible, predicted = model.draw(2)
    cubes = video_to_cubes(video, model.cube)
    seen, queried = model.line_up(order, visible, predicted)
    prediction = model.predict(cubes, seen, queried)
    errors = []
    for b, q, colour in product(range(2), range(queried.shape[1]), range(3)):
        x = cubes[b, queried[b, q], colour]
        deviation = x.var(unbiased=True).sqrt()
        target = (x - x.mean()) / (deviation + 1e-6)
        errors.append((prediction[b, q, colour] - target) ** 2)
    torch.testing.assert_close(
        model(video, order, visible, predicted), torch.cat(errors).mean())


def test_reconstruction_puts_predictions_and_visible_cubes_where_they_belong():
    model = small_model()
    video = small_video(1) + 5          # far from the zeros of what is not drawn
    order, visible, predicted = model.draw(1)
    first = order[0, 0]
    last = order[0, -1]
    shown, predictions = model.reconstruct(video, order, visible, predicted)
    cubes = video_to_cubes(video, model.cube)[0]
    shown = video_to_cubes(shown, model.cube)[0]
    predictions = video_to_cubes(predictions, model.cube)[0]

    # The first cluster's visible cubes are shown, and nothing predicts it
    tokens = visible[0, first]
    assert torch.equal(shown[tokens], cubes[tokens])
    assert (predictions[model.clusters[first]] == 0).all()

    # The last cluster never enters the encoder. Its predictions have the true cubes' means, but for
    # the means of what an untrained model predicts, which are small.
    tokens = model.clusters[last]
    assert (shown[tokens] == 0).all()
    torch.testing.assert_close(
        predictions[tokens].mean(-1), cubes[tokens].mean(-1), atol=0.6, rtol=0)


def test_every_parameter_takes_part_in_the_loss():
    model = small_model(decoder_self_attention=True)
    model(small_video(), *model.draw(2)).backward()
    unused = [name for name, parameter in model.named_parameters()
              if parameter.grad is None or not parameter.grad.any()]
    assert unused == []


# --- Layers -----------------------------------------------------------------


def test_linear_layers_begin_xavier_uniform_without_bias():
    for name, layer in small_model(decoder_self_attention=True).named_modules():
        if isinstance(layer, torch.nn.Linear):
            bound = math.sqrt(6 / sum(layer.weight.shape))
            assert 0.95 * bound < layer.weight.abs().max().item() <= bound, name
            assert layer.bias is None or not layer.bias.any(), name


@pytest.mark.parametrize("kind", arvideo.POSITIONS)
def test_encoder_and_decoder_have_the_positions_asked_for(kind):
    model = small_model(positions=kind)
    for part, width in ((model.encoder, 32), (model.decoder, 24)):
        assert torch.equal(part.positions, arvideo.position_table(model.grid, width, kind))


def test_the_bias_of_v_is_added_to_every_value():
    """Weights of attention sum to one, so it shifts the output by a constant."""
    layer = arvideo.SelfAttention(32, 4)
    x = torch.randn(2, 5, 32)
    before = layer(x)
    torch.nn.init.normal_(layer.v_bias)
    torch.testing.assert_close(layer(x), before + layer.v_bias @ layer.proj.weight.T)


def test_stochastic_depth_drops_both_branches_of_a_block():
    block = arvideo.EncoderBlock(32, 4, 4.0)
    block.drop_path = StochasticDepth(1.0, "row")
    x = torch.randn(2, 5, 32)
    assert torch.equal(block.train()(x), x)


# --- The rows of Table 1 ----------------------------------------------------


@pytest.mark.parametrize("changes", [
    dict(frames=16, size=224, cube=(2, 16, 16), cluster=(1, 1, 1)),
    dict(frames=8, size=14, cube=(1, 1, 1), cluster=(1, 1, 1), normalise_target=False),
], ids=["TokenGPT", "pixels"])
def test_token_and_pixel_autoregression_train_a_step(changes):
    model = small_model(**changes, mask_ratio=0.0).train()
    assert model.encoder_mask.shape == (1567, 1567)
    size = changes["size"]
    video = torch.randn(1, 3, changes["frames"], size, size)
    draw = model.draw(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    before = model(video, *draw)
    before.backward()
    optimizer.step()
    assert model(video, *draw) < before


# --- Transfer ---------------------------------------------------------------


def checkpoint_of(model):
    """What train_pretrain.py saves, as far as transfer needs it. YAML has lists, not tuples."""
    arguments = {key: list(value) if isinstance(value, tuple) else value
                 for key, value in SMALL.items()}
    return {"model": model.state_dict(), "config": {"model": arguments}}


def test_pretrained_encoder_is_the_encoder_alone_and_bidirectional():
    model = small_model()
    encoder = arvideo.pretrained_encoder(checkpoint_of(model))
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, model.encoder.state_dict()[name])
    # A pixel of the last token changes, and the features of every token with it
    video = small_video(1)
    changed = video.clone()
    changed[:, :, -1, -1, -1] += 1.0
    before = encoder(video)
    after = encoder(changed)
    assert before.shape == (1, TOKENS, 32)
    assert (before != after).any(-1).all()


class ReversedFeatures(Encoder):
    """A fork's encoder, with other features of whole videos."""

    def forward(self, video):
        return super().forward(video).flip(2)


class ReversedCore(Encoder):
    """A fork's encoder, with another output in pretraining as well."""

    def encode(self, cubes, index=None, mask=None):
        return super().encode(cubes, index, mask).flip(2)


@pytest.mark.parametrize("fork", [ReversedFeatures, ReversedCore])
def test_transfer_uses_a_subclass_of_the_encoder(fork):
    arguments = dict(**SMALL_ENCODER, mlp_ratio=4.0)

    class ForkedARVideo(ARVideo):
        def __init__(self, **model):
            super().__init__(**model)
            self.encoder = fork(**arguments)

    # Classifier's super() is then the fork
    class ForkedClassifier(Classifier, fork):
        pass

    def expected_tokens(encoder):
        """Computed without the fork's methods."""
        cubes = video_to_cubes(video, encoder.cube)
        return Encoder.encode(encoder, cubes).flip(2)

    torch.manual_seed(0)
    video = small_video()

    # The features
    checkpoint = checkpoint_of(ForkedARVideo(**SMALL))
    encoder = arvideo.pretrained_encoder(checkpoint, ForkedARVideo)
    tokens = expected_tokens(encoder)
    assert torch.equal(encoder(video), tokens)

    # A probe of them. Heads start near zero, so they are drawn anew.
    probe = Probe(classes=5, attentive=False, **arguments).eval()
    probe.encoder = encoder
    torch.nn.init.normal_(probe.head.weight)
    assert torch.equal(probe(video), probe.head(probe.norm(tokens.mean(1))))

    # A classifier, whose encoder is the classifier itself
    classifier = ForkedClassifier(classes=5, drop_path=0.0, head_dropout=0.0, **arguments).eval()
    torch.nn.init.normal_(classifier.head.weight)
    tokens = expected_tokens(classifier)
    logits = classifier.head(classifier.fc_norm(tokens.mean(1)))
    assert torch.equal(classifier(video), logits)


def test_pretrained_encoder_names_the_checkpoint_that_it_needs():
    with pytest.raises(ValueError, match="for a fine-tuned one, use finetuned_classifier"):
        arvideo.pretrained_encoder({**checkpoint_of(small_model()), "classes": ["a", "b"]})


# --- Clips of other frames, or of another size ------------------------------


def test_positions_of_the_same_clips_are_the_same_and_others_are_interpolated():
    table = Encoder(**SMALL_ENCODER, mlp_ratio=4.0).positions
    same = Encoder(**SMALL_ENCODER, mlp_ratio=4.0, pretrained_clip=[4, 16])
    assert torch.equal(same.positions, table)

    # A table that holds where a token's middle is, as a share of each axis
    def middles(grid):
        axes = [(torch.arange(count) + 0.5) / count for count in grid]
        return torch.stack([axis.flatten() for axis in torch.meshgrid(*axes, indexing="ij")], 1)

    taken = arvideo.interpolate_positions(middles((4, 8, 8)), (4, 8, 8), (6, 12, 10))
    expected = middles((6, 12, 10))
    # Outside the middles of the old grid's first and last tokens, their values are repeated
    ends = torch.tensor([1 / 4, 1 / 8, 1 / 8]) / 2
    expected = expected.clamp(ends, 1 - ends)
    torch.testing.assert_close(taken, expected)


def test_both_ways_to_other_clips_give_the_same_features():
    """By pretrained_clip, or by resize() afterwards. Clusters need not fill the 5 x 5 tokens."""
    checkpoint = checkpoint_of(small_model())
    resized = arvideo.pretrained_encoder(checkpoint, frames=6, size=20)
    other = {**SMALL_ENCODER, "frames": 6, "size": 20}
    built = Encoder(**other, mlp_ratio=4.0, pretrained_clip=[4, 16]).eval()
    built.load_state_dict(resized.state_dict())
    video = torch.randn(1, 3, 6, 20, 20)
    assert resized(video).shape == (1, 3 * 5 * 5, 32)
    assert torch.equal(resized(video), built(video))


def test_clips_of_another_shape_with_as_many_tokens_are_refused():
    encoder = small_model().encoder
    with pytest.raises(ValueError, match=r"this encoder takes \[2, 4, 4\]: see resize"):
        encoder(torch.randn(1, 3, 16, 8, 16))


def test_learned_positions_of_a_fork_are_interpolated_too():
    class Learned(ARVideo):
        def __init__(self, **model):
            super().__init__(**model)
            table = torch.randn_like(self.encoder.positions)
            del self.encoder.positions
            self.encoder.positions = torch.nn.Parameter(table)

    checkpoint = checkpoint_of(Learned(**SMALL))
    encoder = arvideo.pretrained_encoder(checkpoint, Learned, size=24)
    table = checkpoint["model"]["encoder.positions"]
    expected = arvideo.interpolate_positions(table, (2, 4, 4), (2, 6, 6))
    assert isinstance(encoder.positions, torch.nn.Parameter)
    assert torch.equal(encoder.positions, expected)


def blobs(videos, frames, size, seed):
    """Videos of a soft ball in one of the eight corners of time and space: (videos, corners)."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(8, (videos,), generator=generator)
    sides = torch.stack(torch.unravel_index(corner, (2, 2, 2)), 1)
    centre = (sides + 0.25 + 0.5 * torch.rand(videos, 3, generator=generator)) / 2
    axes = [(torch.arange(count) + 0.5) / count for count in (frames, size, size)]
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"))              # [3, T, H, W]
    distance = (places - centre[:, :, None, None, None]).square().sum(1)    # [B, T, H, W]
    colour = 2 + 2 * torch.rand(videos, 3, 1, 1, 1, generator=generator)
    return colour * torch.exp(-distance[:, None] / 0.045), corner


def test_a_readout_of_one_resolution_serves_others_if_positions_are_interpolated():
    """Where is the ball? With the other grid's own table, its place cannot be read."""
    model = dict(
        frames=8, size=32, cube=(2, 4, 4), cluster=(2, 4, 4), width=48, depth=1, heads=2,
        decoder_width=24, decoder_depth=1, decoder_heads=2, positions="3d")
    torch.manual_seed(0)
    checkpoint = {"model": ARVideo(**model).state_dict(), "config": {"model": model}}

    def features(encoder, videos):
        """Mean over tokens, with a 1 for the offset: [B, D + 1]"""
        with torch.no_grad():
            means = torch.cat([encoder(part).mean(1) for part in videos.split(20)])
        return F.pad((means - centre) / scale, (0, 1), value=1.0)

    # Ridge regression from 8 x 32 x 32
    encoder = arvideo.pretrained_encoder(checkpoint)
    videos, corners = blobs(200, 8, 32, seed=1)
    # First raw, to learn the mean and deviation by which features() then standardises
    centre, scale = 0, 1
    raw = features(encoder, videos)[:, :-1]
    centre, scale = raw.mean(0), raw.std(0)
    known = features(encoder, videos)
    square = known.T @ known + 25 * torch.eye(known.shape[1])
    readout = torch.linalg.solve(square, known.T @ F.one_hot(corners, 8).float())

    def score(encoder, frames, size):
        videos, corners = blobs(100, frames, size, seed=2)
        answers = (features(encoder, videos) @ readout).argmax(1)
        return (answers == corners).float().mean().item()

    assert score(encoder, 8, 32) > 0.95
    for frames, size in ((8, 48), (12, 32)):
        interpolated = arvideo.pretrained_encoder(checkpoint, frames=frames, size=size)
        own_table = ARVideo(**{**model, "frames": frames, "size": size}).encoder
        own_table.load_state_dict(encoder.state_dict())
        assert score(interpolated, frames, size) > 0.9
        assert score(own_table, frames, size) < 0.3


# --- What is refused --------------------------------------------------------


@pytest.mark.parametrize("changes, culprit", [
    (dict(cluster=(2, 7, 5)), "along the width: 14 is not a multiple of 5"),
    (dict(cube=(3, 16, 16)), "along the time: 16 is not a multiple of 3"),
    (dict(order="snake"), "order 'snake' is unknown"),
    (dict(mask_ratio=1.0), "mask_ratio 1.0 is out of range"),
    (dict(mask_ratio=-0.1), "mask_ratio -0.1 is out of range"),
    (dict(heads=7), "heads 7 does not divide the width 768"),
    (dict(decoder_heads=5), "decoder_heads 5 does not divide the width 512"),
    (dict(predict_after=16), "predict_after 16 is out of range"),
    (dict(predict_after=0), "predict_after 0 is out of range"),
    (dict(positions="2d"), "positions '2d' is unknown"),
    (dict(cube=(1, 1, 1), frames=8, size=14),
     "normalise_target needs cubes of more than one pixel"),
])
def test_impossible_sizes_are_refused_by_name(changes, culprit):
    with torch.device("meta"), pytest.raises(ValueError, match=culprit):
        ARVideo(**changes)
