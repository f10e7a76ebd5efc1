"""The paper's facts and the equivalences that its method rests on."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import arvideo
from arvideo import ARVideo, cubes_to_video, take, video_to_cubes

# 2 x 4 x 4 tokens in 8 clusters of 4, of which 2 are visible
SMALL = dict(frames=4, size=16, cube=(2, 4, 4), cluster=(1, 2, 2), mask_ratio=0.5, width=32, depth=2, heads=4,
             decoder_width=24, decoder_depth=2, decoder_heads=2)


def small_model(**changes):
    torch.manual_seed(0)
    return ARVideo(**{**SMALL, **changes}).eval()


@pytest.fixture(scope="module")
def paper():
    with torch.device("meta"):
        return ARVideo()


# Section 3.3 and Table 5


def test_counts_of_the_paper(paper):
    assert paper.grid == (8, 14, 14) and len(paper.encoder.positions) == 1568
    assert paper.clusters.shape == (16, 98)
    assert paper.encoder_mask.shape == (300, 300)
    assert paper.decoder_mask.shape == (1470, 300)
    with torch.device("meta"):
        assert ARVideo(predict_after=2).decoder_mask.shape == (1372, 300)


def test_visible_tokens_are_a_random_fifth_of_every_cluster():
    clusters = arvideo.cluster_tokens((8, 14, 14), (2, 7, 7))
    visible = arvideo.visible_tokens(clusters, arvideo.visible_count(98, 0.8), 3)
    assert visible.shape == (3, 16, 20)
    for b, c in itertools.product(range(3), range(16)):
        drawn = set(visible[b, c].tolist())
        assert len(drawn) == 20 and drawn <= set(clusters[c].tolist())
    assert not torch.equal(visible[0].sort(1).values, visible[1].sort(1).values)
    positions = (visible[0].unsqueeze(-1) == clusters.unsqueeze(1)).int().argmax(-1).sort(1).values
    assert not torch.equal(positions[0], positions[1])     # nor is it the same choice in every cluster


@pytest.mark.parametrize("tokens, ratio, count", [(98, 0.8, 20), (98, 0.75, 25), (98, 0.95, 5), (15, 0.9, 2), (1, 0.8, 1), (4, 0.0, 4)])
def test_visible_count(tokens, ratio, count):
    assert arvideo.visible_count(tokens, ratio) == count


def test_clusters_are_blocks_of_neighbouring_tokens():
    clusters = arvideo.cluster_tokens((2, 4, 6), (1, 2, 3))
    t, h, w = torch.unravel_index(clusters, (2, 4, 6))
    for c, block in enumerate(itertools.product(range(2), range(2), range(2))):
        assert {(a // 1, b // 2, d // 3) for a, b, d in zip(t[c].tolist(), h[c].tolist(), w[c].tolist())} == {block}
    assert sorted(clusters.flatten().tolist()) == list(range(48))


def test_encoder_has_86_million_parameters(paper):
    parameters = sum(p.numel() for p in paper.encoder.parameters())
    assert round(parameters / 1e6, 1) == 86.2
    assert round((parameters + 400 * 769) / 1e6, 1) == 86.5         # with the head for Kinetics-400


def test_a_view_takes_180_billion_multiply_adds(paper):
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        paper.encoder.features(torch.empty(1, 3, 16, 224, 224, device="meta"))
    assert 179e9 < counter.get_total_flops() / 2 < 182e9


# Cubes


def test_cubes_invert():
    video = torch.randn(2, 3, 4, 8, 12)
    cubes = video_to_cubes(video, (2, 4, 2))
    assert cubes.shape == (2, 2 * 2 * 6, 3, 16)
    assert torch.equal(cubes_to_video(cubes, (2, 2, 6), (2, 4, 2)), video)
    assert torch.equal(cubes[1, 6 + 1, 2], video[1, 2, 0:2, 4:8, 2:4].flatten())


def test_embedding_equals_conv3d():
    model, video = small_model(), torch.randn(2, 3, 4, 16, 16)
    convolved = model.encoder.patch_embed.proj(video).flatten(2).transpose(1, 2)
    torch.testing.assert_close(model.encoder.patch_embed(video_to_cubes(video, model.cube)), convolved)


def test_positions_are_videomaes_table():
    table = arvideo.position_table((2, 3, 4), 6, "1d")
    for position, channel in itertools.product(range(24), range(6)):
        angle = torch.tensor(position / 10000 ** (2 * (channel // 2) / 6), dtype=torch.float64)
        expected = angle.cos() if channel % 2 else angle.sin()
        torch.testing.assert_close(table[position, channel], expected.float())


def test_3d_positions_tell_all_tokens_apart():
    table = arvideo.position_table((4, 8, 8), 32, "3d")
    assert torch.cdist(table, table).fill_diagonal_(1).min() > 0.1
    shifts = table.view(4, 8, 8, 32)
    assert torch.equal(shifts[0, 3, 5, 10:20], shifts[2, 3, 1, 10:20])     # the row's third knows the row alone


# Orders (section 3.3.2)


def test_spatial_first_goes_through_a_slice_then_to_the_next():
    order = arvideo.prediction_orders("spatial-first", (3, 2, 2), 2)
    t, _, _ = torch.unravel_index(order[0], (3, 2, 2))
    assert t.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and torch.equal(order[0], order[1])


def test_temporal_first_goes_through_a_position_then_to_the_next():
    t, h, w = torch.unravel_index(arvideo.prediction_orders("temporal-first", (3, 2, 2), 2)[1], (3, 2, 2))
    assert t.tolist() == [0, 1, 2] * 4
    assert list(zip(h.tolist(), w.tolist())) == [p for p in [(0, 0), (0, 1), (1, 0), (1, 1)] for _ in range(3)]


def test_random_order_is_a_permutation_of_its_own_for_every_sample():
    order = arvideo.prediction_orders("random", (4, 2, 2), 4000, torch.Generator().manual_seed(0))
    assert torch.equal(order.sort(1).values, torch.arange(16).expand(4000, -1))
    assert len(order.unique(dim=0)) == 4000
    share = F.one_hot(order, 16).float().mean(0)                    # [place, cluster]: all about 1/16
    assert (share - 1 / 16).abs().max() < 0.02


# Causality, and one pass instead of many


@pytest.mark.parametrize("order", arvideo.ORDERS)
@pytest.mark.parametrize("self_attention", [False, True])
def test_causality_bit_for_bit(order, self_attention):
    model = small_model(order=order, decoder_self_attention=self_attention)
    B, M = 2, 8
    cubes = video_to_cubes(torch.randn(B, 3, 4, 16, 16), model.cube)
    places, visible = model.draw(B)
    seen, target = model.line_up(places, visible)
    with torch.no_grad():
        before = model.predict(cubes, seen, target).view(B, M - 1, -1)              # of places 1 .. M-1
        for k in range(M):
            changed = cubes.clone()
            rows = torch.arange(B)[:, None]
            changed[rows, model.clusters[places[:, k]]] += 1.0
            after = model.predict(changed, seen, target).view(B, M - 1, -1)
            assert torch.equal(after[:, :k], before[:, :k])                         # places 1 .. k
            assert all((after[b, p] != before[b, p]).any() for b in range(B) for p in range(k, M - 1))


@pytest.mark.parametrize("order", arvideo.ORDERS)
@pytest.mark.parametrize("self_attention", [False, True])
def test_one_masked_pass_equals_predicting_cluster_after_cluster(order, self_attention):
    model = small_model(order=order, decoder_self_attention=self_attention)
    B, M, V = 2, 8, 2
    cubes = video_to_cubes(torch.randn(B, 3, 4, 16, 16), model.cube)
    places, visible = model.draw(B)
    with torch.no_grad():
        parallel = model.predict(cubes, *model.line_up(places, visible)).view(B, M - 1, 4, 3, -1)
        for b, k in itertools.product(range(B), range(1, M)):
            prefix = torch.cat([visible[b, places[b, j]] for j in range(k)])[None]              # [1, k V]
            place = torch.tensor([i // V for i in range(k * V)])
            mask = torch.tensor([[int(p) >= int(q) for q in place] for p in place])
            memory = model.encoder_to_decoder(model.encoder(take(cubes[b:b + 1], prefix), prefix, mask))
            alone = model.decoder(memory, model.clusters[places[b, k]][None])                   # sees the whole prefix
            torch.testing.assert_close(alone.view(4, 3, -1), parallel[b, k - 1], atol=1e-5, rtol=1e-4)


def test_prediction_can_start_later():
    model, later = small_model(), small_model(predict_after=3)
    cubes = video_to_cubes(torch.randn(2, 3, 4, 16, 16), model.cube)
    order, visible = model.draw(2)
    with torch.no_grad():
        every = model.predict(cubes, *model.line_up(order, visible))
        torch.testing.assert_close(later.predict(cubes, *later.line_up(order, visible)), every[:, 2 * 4:])


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = small_model(checkpointing=checkpointing).train()
        video = torch.randn(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(1))
        model(video, *model.draw(2, torch.Generator().manual_seed(2))).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))


# Loss (section 4.1)


def test_predicting_zero_scores_about_one():
    model = small_model()
    torch.nn.init.zeros_(model.decoder.head.weight)
    loss = model(torch.randn(4, 3, 4, 16, 16) * 0.3 + 2, *model.draw(4))
    assert abs(loss.item() - 31 / 32) < 1e-4        # the unbiased deviation of 32 pixels leaves 31/32


def test_loss_is_the_mean_squared_error_of_normalised_cubes():
    model, video = small_model(), torch.randn(2, 3, 4, 16, 16)
    order, visible = model.draw(2)
    cubes, (seen, target) = video_to_cubes(video, model.cube), model.line_up(order, visible)
    prediction, errors = model.predict(cubes, seen, target), []
    for b, q in itertools.product(range(2), range(target.shape[1])):
        for colour in range(3):
            x = cubes[b, target[b, q], colour]
            errors.append((prediction[b, q, colour] - (x - x.mean()) / (x.var(unbiased=True).sqrt() + 1e-6)) ** 2)
    torch.testing.assert_close(model(video, order, visible), torch.cat(errors).mean())


def test_reconstruction_puts_predictions_and_visible_cubes_where_they_belong():
    model, video = small_model(), torch.randn(1, 3, 4, 16, 16)
    order, visible = model.draw(1)
    seen_video, predicted = (video_to_cubes(v, model.cube)[0] for v in model.reconstruct(video, order, visible))
    cubes, first, last = video_to_cubes(video, model.cube)[0], order[0, 0], order[0, -1]
    assert torch.equal(seen_video[visible[0, first]], cubes[visible[0, first]])
    assert (seen_video[model.clusters[last]] == 0).all()            # the last cluster never enters the encoder
    assert (predicted[model.clusters[first]] == 0).all()            # nothing predicts the first
    torch.testing.assert_close(predicted[model.clusters[last]].mean(-1), cubes[model.clusters[last]].mean(-1), atol=0.6, rtol=0)


# The rows of Table 1


@pytest.mark.parametrize("changes", [
    dict(frames=16, size=224, cube=(2, 16, 16), cluster=(1, 1, 1)),
    dict(frames=8, size=14, cube=(1, 1, 1), cluster=(1, 1, 1), normalise_target=False),
], ids=["TokenGPT", "pixels"])
def test_token_and_pixel_autoregression_train_a_step(changes):
    model = small_model(**changes, mask_ratio=0.0).train()
    assert model.encoder_mask.shape == (1567, 1567)
    video = torch.randn(1, 3, changes["frames"], changes["size"], changes["size"])
    draw = model.draw(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    before = model(video, *draw)
    before.backward()
    optimizer.step()
    assert model(video, *draw) < before


def test_pretrained_encoder_is_the_encoder_alone_and_bidirectional():
    model = small_model()
    arguments = {key: list(value) if isinstance(value, tuple) else value for key, value in SMALL.items()}
    encoder = arvideo.pretrained_encoder({"model": model.state_dict(), "config": {"model": arguments}})
    video = torch.randn(1, 3, 4, 16, 16)
    changed = video.clone()
    changed[:, :, -1, -1, -1] += 1.0                                # a pixel of the last token
    before, after = encoder.features(video), encoder.features(changed)
    assert before.shape == (1, 32, 32) and (before != after).any(-1).all()      # every token saw it


@pytest.mark.parametrize("changes, culprit", [
    (dict(cluster=(2, 7, 5)), "along the width: 14 is not a multiple of 5"),
    (dict(cube=(3, 16, 16)), "along the frames: 16 is not a multiple of 3"),
    (dict(order="snake"), "order 'snake' is unknown"),
    (dict(mask_ratio=1.0), "mask_ratio 1.0 is out of range"),
    (dict(mask_ratio=-0.1), "mask_ratio -0.1 is out of range"),
    (dict(heads=7), "heads 7 does not divide the width 768"),
    (dict(decoder_heads=5), "decoder_heads 5 does not divide the width 512"),
    (dict(predict_after=16), "predict_after 16 is out of range"),
    (dict(positions="2d"), "positions '2d' is unknown"),
    (dict(cube=(1, 1, 1), frames=8, size=14), "normalise_target needs cubes of more than one pixel"),
])
def test_impossible_sizes_are_refused_by_name(changes, culprit):
    with torch.device("meta"), pytest.raises(ValueError, match=culprit):
        ARVideo(**changes)
