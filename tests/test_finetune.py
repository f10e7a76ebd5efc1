"""Transfer: weights in and out, what is trained, and a test that counts every video once."""

import argparse
import csv
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import CutMix, MixUp

import data
import train_finetune
from arvideo import ARVideo
from train_finetune import Classifier, Probe, accuracy, build_model, encoder_arguments, evaluate, load_weights
from train_pretrain import Process, load_config, mixed_precision

ROOT = Path(__file__).parent.parent
TINY = ["model.width=32", "model.depth=2", "model.heads=2", "model.decoder_width=24", "model.decoder_depth=1",
        "model.decoder_heads=2", "finetune.batch=8", "finetune.epochs=2", "finetune.warmup_epochs=0", "run.workers=1",
        "run.device=cpu"]
HERE = Process(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """24 training and 13 validation videos, one of the latter unreadable."""
    root = tmp_path_factory.mktemp("toy") / "set"
    data.make_toy_set(root, {"train": 24, "val": 13})
    (root / "val" / "00004.mp4").write_text("hello")
    return [f"data.root={root}", f"data.train={root / 'train.txt'}", f"data.val={root / 'val.txt'}"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A checkpoint as train_pretrain.py writes it, of a model that nobody trained."""
    config = load_config(TINY, "pretrain")
    torch.manual_seed(5)
    model = ARVideo(**config["model"])
    path = tmp_path_factory.mktemp("pretrained") / "last.pt"
    torch.save(dict(model=model.state_dict(), config=config, step=1), path)
    return path, model


def finetune(output, *arguments, processes=0):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes else []
    ran = subprocess.run([sys.executable, *launcher, "train_finetune.py", *TINY, *map(str, arguments), f"run.output={output}"],
                         cwd=ROOT, text=True, capture_output=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return ran.returncode, ran.stdout, ran.stderr


def tiny_config(*arguments):
    return load_config([*TINY, *arguments], "finetune")


# The model


def test_classifier_is_the_bidirectional_encoder_with_a_new_norm(pretrained):
    path, source = pretrained
    config = tiny_config()
    model = build_model(config, 8).eval()
    load_weights(model, path, config, None)
    video = torch.randn(2, 3, 8, 32, 32)
    tokens = data_tokens = source.encoder.patch_embed(train_finetune_cubes(video, source)) + source.encoder.positions
    for block in source.encoder.blocks:
        tokens = block(tokens)
    expected = F.linear(F.layer_norm(tokens.mean(1), (32,), eps=1e-6), model.head.weight, model.head.bias)
    assert data_tokens.shape == (2, 256, 32)
    torch.testing.assert_close(model(video), expected)


def train_finetune_cubes(video, model):
    from arvideo import video_to_cubes
    return video_to_cubes(video, model.cube)


def test_head_starts_near_zero_and_drop_path_grows_with_depth():
    with torch.device("meta"):
        arguments = encoder_arguments(load_config(["k400"], "finetune")["model"])
        model = Classifier(400, 0.1, 0.0, **arguments)
    assert [round(block.drop_path.p, 4) for block in model.blocks] == [round(0.1 * i / 11, 4) for i in range(12)]
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 86.5
    head = train_finetune.linear_head(768, 400)
    assert head.weight.std().item() == pytest.approx(2e-5, rel=0.05) and not head.bias.any()


def test_layer_decay():
    with torch.device("meta"):
        model = Classifier(400, 0.1, 0.0, **encoder_arguments(load_config(["k400"], "finetune")["model"]))
    optimizer = train_finetune.adamw(model, dict(weight_decay=0.05, betas=[0.9, 0.999]), HERE.device,
                                     train_finetune.layer_decay(12, 0.75))
    names = {id(p): name for name, p in model.named_parameters()}
    scales = {names[id(p)]: group["scale"] for group in optimizer.param_groups for p in group["params"]}
    assert scales["patch_embed.proj.weight"] == 0.75 ** 13 and scales["patch_embed.proj.bias"] == 0.75 ** 13
    assert scales["head.weight"] == scales["fc_norm.bias"] == 1
    assert all(scales[f"blocks.{i}.attn.q_bias"] == 0.75 ** (12 - i) for i in range(12))
    decays = {names[id(p)]: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decays["head.weight"] == 0.05 and decays["head.bias"] == decays["fc_norm.weight"] == 0


@pytest.mark.parametrize("attentive", [False, True])
def test_probe_leaves_the_encoder_bit_identical(attentive):
    torch.manual_seed(0)
    model = Probe(8, attentive, **encoder_arguments(tiny_config()["model"])).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = train_finetune.adamw(model, dict(weight_decay=0.05, betas=[0.9, 0.999]), HERE.device)
    for group in optimizer.param_groups:
        group["lr"] = 0.01
    for _ in range(3):
        F.cross_entropy(model(torch.randn(4, 3, 8, 32, 32)), torch.arange(4)).backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith("encoder."), name


# Weights in and out


OFFICIAL_BLOCK = ["norm1.weight", "norm1.bias", "attn.qkv.weight", "attn.q_bias", "attn.v_bias", "attn.proj.weight", "attn.proj.bias",
                  "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"]


def official_names(prefix, last):
    return {f"{prefix}patch_embed.proj.weight", f"{prefix}patch_embed.proj.bias", f"{prefix}{last}.weight", f"{prefix}{last}.bias",
            *(f"{prefix}blocks.{i}.{name}" for i in range(2) for name in OFFICIAL_BLOCK)}


def videomae_file(path, source, **changes):
    """VideoMAE's pretraining file: its names, its decoder, an argparse.Namespace beside the weights."""
    state = {f"encoder.{name}": tensor for name, tensor in source.encoder.state_dict().items()}
    assert set(state) == official_names("encoder.", "norm")
    state |= {"mask_token": torch.zeros(1, 1, 16), "encoder_to_decoder.weight": torch.zeros(16, 32),
              "decoder.blocks.0.attn.qkv.weight": torch.zeros(48, 16), "decoder.norm.weight": torch.ones(16)}
    state |= changes
    torch.save({"model": {name: tensor for name, tensor in state.items() if tensor is not None},
                "args": argparse.Namespace(lr=1.0), "epoch": 3}, path)
    return path


def test_official_files_load_and_ours_have_official_names(pretrained, tmp_path):
    source, config = pretrained[1], tiny_config()
    model = build_model(config, 8)
    sentence, complete = load_weights(model, videomae_file(tmp_path / "official.pth", source), config, None)
    assert "28 tensors of the encoder" in sentence and "left behind: decoder, encoder_to_decoder, mask_token, norm" in sentence
    assert not complete
    assert set(model.state_dict()) == official_names("", "fc_norm") | {"head.weight", "head.bias"}
    for name, tensor in source.encoder.state_dict().items():
        assert name.startswith("norm.") or torch.equal(model.state_dict()[name], tensor)

    torch.save({"model": model.state_dict()}, tmp_path / "ours.pt")           # as VideoMAE's fine-tuning script writes it
    again = build_model(config, 8)
    assert load_weights(again, tmp_path / "ours.pt", config, None)[1]
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    torch.save({"model": model.state_dict(), "classes": list("abcdefgh")}, tmp_path / "named.pt")
    assert load_weights(again, tmp_path / "named.pt", config, list("abcdefgh"))[1]
    assert not load_weights(again, tmp_path / "named.pt", config, list("abcdefgx"))[1]      # as many, but others: a new head
    other = build_model(config, 5)                                            # other classes: a new head
    assert "left behind: fc_norm, head" in load_weights(other, tmp_path / "ours.pt", config, None)[0]
    torch.save({"model": {**model.state_dict(), "teacher.weight": torch.zeros(3)}}, tmp_path / "more.pt")
    with pytest.raises(SystemExit, match='Unexpected key.*"teacher.weight"'):
        load_weights(again, tmp_path / "more.pt", config, None)
    with_teacher = videomae_file(tmp_path / "teacher.pth", source, **{"teacher.weight": torch.zeros(3)})      # a fork's pretraining
    assert "left behind: decoder, encoder_to_decoder, mask_token, norm, teacher" in load_weights(again, with_teacher, config, None)[0]

    probe = build_model(tiny_config("finetune.probe=linear"), 8)
    assert "30 tensors" in load_weights(probe, tmp_path / "official.pth", config, None)[0]       # a probe keeps the final norm
    assert torch.equal(probe.encoder.norm.weight, source.encoder.norm.weight)


@pytest.mark.parametrize("changes, culprit", [
    ({"encoder.blocks.1.attn.q_bias": None}, 'Missing key.*"blocks.1.attn.q_bias"'),
    ({"encoder.blocks.1.attn.k_bias": torch.zeros(32)}, 'Unexpected key.*"blocks.1.attn.k_bias"'),
    ({"encoder.patch_embed.proj.weight": torch.zeros(32, 3, 2, 8, 8)},
     r"size mismatch for patch_embed.proj.weight: .*\[32, 3, 2, 8, 8\].*\[32, 3, 2, 4, 4\]"),
], ids=["missing", "unexpected", "reshaped"])
def test_files_that_do_not_fit_are_refused_by_name(pretrained, tmp_path, changes, culprit):
    path = videomae_file(tmp_path / "file.pth", pretrained[1], **changes)
    with pytest.raises(SystemExit, match=culprit):
        load_weights(build_model(tiny_config(), 8), path, tiny_config(), None)


def test_another_size_is_refused_by_its_key(pretrained):
    config = tiny_config("model.frames=16", "model.size=64")
    with pytest.raises(SystemExit, match="model.frames is 16, the checkpoint's 8; model.size is 64, the checkpoint's 32"):
        load_weights(build_model(config, 8), pretrained[0], config, None)


# Augmentation


@pytest.mark.parametrize("mix", [CutMix(alpha=1.0, num_classes=4), MixUp(alpha=0.8, num_classes=4)], ids=["cutmix", "mixup"])
def test_mixing_takes_the_same_part_of_all_frames_of_another_video_and_corrects_the_target(mix):
    """Four videos, two clips of each: a clip's pixels tell which video they are from, its target how much of it."""
    torch.manual_seed(0)
    labels = torch.arange(4).repeat_interleave(2)
    clips = F.one_hot(labels).float()[:, :3, None, None, None].expand(-1, -1, 4, 16, 16)          # of video 3: black
    for _ in range(20):
        mixed, targets = train_finetune.mix_videos(clips, labels, [mix], repeats=2)
        assert (mixed == mixed[:, :, :1]).all()                               # every frame alike
        torch.testing.assert_close(mixed.mean((2, 3, 4)), targets[:, :3], atol=1e-5, rtol=0)
        assert targets.sum(1).allclose(torch.ones(8)) and ((targets > 0).sum(1) <= 2).all()
        if isinstance(mix, CutMix):
            assert ((mixed == 0) | (mixed == 1)).all()                        # the same box in all colours, nothing blended
        else:
            assert (mixed == mixed[..., :1, :1]).all()
    assert (targets.max(1).values < 1).any()                                  # something was mixed: never a video with itself


def test_erasing_takes_one_box_in_all_frames():
    torch.manual_seed(0)
    clip, sizes = torch.zeros(5, 3, 40, 40, dtype=torch.uint8), []
    for _ in range(200):
        erased = data.random_erasing(clip, 1.0)
        touched = (erased != 0).any(1).any(0)
        rows, columns = touched.any(1).nonzero(), touched.any(0).nonzero()
        box = touched[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
        assert box.all() and (erased[:, :, rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1] != 0).float().mean() > 0.8
        assert not torch.equal(erased[0], erased[1])                          # the noise itself is new in every frame
        sizes.append(box.numel() / 1600)
    assert 0.01 < min(sizes) < 0.05 and 0.25 < max(sizes) < 0.36
    assert torch.equal(data.random_erasing(clip, 0.0), clip)


def test_augmentation_is_the_same_in_all_frames():
    frame = torch.randint(0, 256, (1, 3, 60, 80), dtype=torch.uint8)
    changed = 0
    for seed in range(60):
        torch.manual_seed(seed)
        clip = data.finetuning_clip(frame.expand(4, -1, -1, -1), 32, True, [0.08, 1.0], [4, 7.0], 0.0)
        assert clip.shape == (4, 3, 32, 32) and clip.dtype == torch.uint8 and (clip == clip[:1]).all()
        torch.manual_seed(seed)
        changed += not torch.equal(data.rand_augment(frame, 4, 7.0), frame)
    assert changed > 45                                                       # all four are left out once in sixteen


# Which frames and crops are tested


def test_kinetics_is_tested_on_five_clips_spread_evenly():
    views = data.dense_views(300, 16, 4, 5)
    assert [view[0] for view in views] == [0, 59, 119, 179, 239]              # 239 + 60 is the last frame
    assert all(b - a == 4 for view in views for a, b in zip(view, view[1:]))
    assert data.dense_views(300, 16, 4, 1)[0][0] == 119
    assert data.dense_views(20, 16, 4, 5) == [list(range(0, 64, 4))] * 5      # too short: the reader repeats its last frame


def test_something_something_is_tested_on_even_frames_interleaved():
    first, second = data.segment_views(64, 16, 2)
    assert first == list(range(0, 64, 4)) and second == list(range(2, 64, 4))
    for view in data.segment_views(40, 16, 2) + data.segment_views(40, 16, 1):
        assert len(view) == 16 and view == sorted(view) and view[-1] < 40
    assert data.segment_views(64, 16, 1) == [list(range(2, 64, 4))]


def test_segments_give_one_random_frame_each():
    clips = [data.segment_clips(64, 16)[0] for _ in range(200)]
    assert all(4 * i <= frame < 4 * i + 4 for clip in clips for i, frame in enumerate(clip))
    assert {clip[3] for clip in clips} == {12, 13, 14, 15}


def test_crops_go_from_end_to_end_of_the_long_side():
    columns = torch.arange(160.0).expand(1, 3, 100, 160)
    crops = data.spatial_views(columns, 100, 3)
    assert crops.shape == (3, 1, 3, 100, 100) and [crop[0, 0, 0, 0].item() for crop in crops] == [0, 30, 60]
    assert data.spatial_views(columns.transpose(2, 3), 50, 3).shape == (3, 1, 3, 50, 50)
    assert data.spatial_views(columns, 100, 1)[0, 0, 0, 0, 0].item() == 30


def test_presets_have_the_protocols_sampling_and_views():
    k400, ssv2 = load_config(["k400"], "finetune"), load_config(["ssv2"], "finetune")
    assert [k400["finetune"][key] for key in ("sampling", "flip", "test_clips", "test_crops")] == ["dense", True, 5, 3]
    assert [ssv2["finetune"][key] for key in ("sampling", "flip", "test_clips", "test_crops")] == ["segments", False, 2, 3]
    assert k400["finetune"]["init"] == "runs/k400/pretrain/last.pt"
    assert load_config(["ssv2", "large", "linear"], "finetune")["finetune"]["init"] == "runs/ssv2-large/pretrain/last.pt"


# The test


def test_probabilities_of_views_are_averaged_and_unreadable_videos_count_as_wrong(toy):
    class Looks(torch.nn.Module):
        def forward(self, video):
            return torch.stack([video.mean((1, 2, 3, 4)) * 9, video[:, 0].mean((1, 2, 3)), video.std((1, 2, 3, 4))], 1)

    config = tiny_config(*toy)
    entries = data.read_annotations(toy[2].partition("=")[2])[0]
    results = evaluate(Looks(), entries, config, HERE, mixed_precision("fp32", HERE.device)[0], 3, 2)
    assert [i for i, _, _ in results] == list(range(13))
    for i, probabilities, reason in results:
        if i == 4:
            assert probabilities is None and "00004.mp4" in reason
            continue
        clips = data.read_clips(entries[i][0], partial(data.dense_views, frames=8, stride=1, clips=3))
        views = torch.cat([data.spatial_views(clip.permute(0, 3, 1, 2), 32, 2) for clip in clips]).transpose(1, 2)
        assert len(views) == 6
        torch.testing.assert_close(probabilities, Looks()(data.normalise(views, "cpu")).softmax(1).mean(0))

    certain = [(i, None, "broken") if i == 4 else (i, F.one_hot(torch.tensor(entries[i][1]), 8).float(), None) for i in range(13)]
    scores = accuracy(certain, entries, list("abcdefgh"))
    assert scores["top1"] == scores["top5"] == pytest.approx(100 * 12 / 13) and scores["unreadable"] == ["broken"]
    assert scores["per_class"]["e"] == 50 and scores["per_class"]["a"] == 100      # 4 and 12 are of class e


@pytest.fixture(scope="module")
def finetuned(toy, pretrained, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs") / "reference"
    arguments = [*toy, f"finetune.init={pretrained[0]}", "finetune.mixup=0.8", "finetune.cutmix=1.0", "finetune.drop_path=0.2",
                 "finetune.clips_per_video=2"]
    code, out, err = finetune(output, *arguments)
    assert code == 0, err
    return output, arguments, out


def results_of(output):
    table = list(csv.reader((output / "predictions.csv").open()))
    return json.loads((output / "results.json").read_text()), table


def test_finetuning_writes_results(finetuned):
    output, _, printed = finetuned
    assert "28 tensors of the encoder" in printed and "1 of them unreadable and counted as wrong" in printed
    results, table = results_of(output)
    assert results["videos"] == 13 and len(results["unreadable"]) == 1 and results["views"] == "2 clips x 1 crops"
    assert results["weights"].endswith("last.pt, the last weights") and (output / "best.pt").exists()
    assert len(table) == 14 and len({row[0] for row in table}) == 14 and table[1][1] == "left" and table[1][2] in data.TOY_CLASSES
    assert len(table[5]) == 2                                                 # the unreadable one has no prediction
    assert (output / "confusion.png").stat().st_size > 0
    lines = [json.loads(line) for line in (output / "log.jsonl").open()]
    assert [line["step"] for line in lines if "top1" in line] == [3, 6] and len(lines) == 8


@pytest.mark.parametrize("processes", [2, 3])
def test_every_video_is_tested_once_by_any_number_of_processes(finetuned, toy, tmp_path, processes):
    output, arguments, _ = finetuned
    code, out, err = finetune(tmp_path, *arguments, f"finetune.init={output / 'last.pt'}", "finetune.test_only=true", processes=processes)
    assert code == 0, err
    (results, table), (alone, table_alone) = results_of(tmp_path), results_of(output)
    assert results["top1"] == alone["top1"] and results["per_class"] == alone["per_class"] and len(table) == 14
    for row, row_alone in zip(table[1:], table_alone[1:]):
        assert row[:2] == row_alone[:2]
        assert [float(p) for p in row[3::2]] == pytest.approx([float(p) for p in row_alone[3::2]], abs=1e-3)


def test_resumed_finetuning_equals_uninterrupted(finetuned, tmp_path):
    output, arguments, _ = finetuned
    code, out, err = finetune(tmp_path, *arguments, "run.save_minutes=0", "run.workers=2")
    assert code == 0, err
    (tmp_path / "previous.pt").replace(tmp_path / "last.pt")                  # as if killed before the last step was saved
    step = torch.load(tmp_path / "last.pt", weights_only=True)["step"]
    code, out, err = finetune(tmp_path, *arguments)
    assert code == 0 and f"going on from step {step}" in out and step < 6
    resumed, whole = (torch.load(folder / "last.pt", weights_only=True) for folder in (tmp_path, output))
    torch.testing.assert_close(resumed["model"], whole["model"], rtol=0, atol=0)
    torch.testing.assert_close(resumed["optimizer"]["state"], whole["optimizer"]["state"], rtol=0, atol=0)
    assert results_of(tmp_path)[1] == results_of(output)[1]
