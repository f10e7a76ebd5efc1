"""The baseline that speed is measured against is VideoMAE, and the benchmarks run."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import benchmark
import pytest
import torch

import arvideo
from benchmark import VideoMAE, contenders, forward_flops, materialised
from train_pretrain import load_config

ROOT = Path(__file__).parent.parent
PAPER = load_config(["k400"], "pretrain")


def test_videomae_is_videomae():
    with torch.device("meta"):
        model = VideoMAE(PAPER["model"])
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 1) == 94.2
    assert benchmark.tokens(contenders("step", "cpu")[0], PAPER) == [160, 160, 1568, 1568]
    torch.manual_seed(0)
    small = VideoMAE(load_config(["toy"], "pretrain")["model"])
    visible, hidden = small.draw(3)
    assert torch.equal(torch.cat([visible, hidden], 1).sort(1).values, torch.arange(256).expand(3, -1))
    assert torch.equal(visible.view(3, 4, -1) % 64, (visible.view(3, 4, -1) % 64)[:, :1].expand(-1, 4, -1))       # tubes
    video = torch.randn(3, 3, 8, 32, 32)
    torch.nn.init.zeros_(small.head.weight)                                  # predicts zero, where 31 / 32 is the variance left
    assert small(video, visible, hidden).item() == pytest.approx(31 / 32, abs=1e-4)


def test_forward_costs():
    """ViT-B, two FLOPs for each multiply-add: VideoMAE 71 GFLOPs, ARVideo 93."""
    videomae, _, ours = contenders("step", "cpu")
    assert round(forward_flops(videomae, PAPER) / 1e9) == 71 and round(forward_flops(ours, PAPER) / 1e9) == 93


def test_attention_written_out_is_attention():
    torch.manual_seed(0)
    q, k, v, mask = torch.randn(2, 5, 24), torch.randn(2, 7, 24), torch.randn(2, 7, 24), torch.rand(5, 7) < 0.7
    mask[:, 0] = True
    for m in (None, mask):
        torch.testing.assert_close(materialised(q, k, v, 3, m), arvideo.attend(q, k, v, 3, m))


COMMANDS = ["memory toy --batch 2", "loader toy --batch 2 --rounds 1", "step toy --batch 2 --rounds 1",
            "finetune toy --batch 2 --rounds 1", "decode video.mp4 --rounds 1"]


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """What every command came to, two of them at a time: much of it is starting Python."""
    folder = tmp_path_factory.mktemp("benchmarks")
    benchmark.synthetic_video(folder / "video.mp4", 40, 96, 128, 25, 20)

    def run(command):
        return subprocess.run([sys.executable, ROOT / "tests" / "benchmark.py", *command.split()], cwd=folder, text=True,
                              capture_output=True, timeout=300)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(COMMANDS, pool.map(run, COMMANDS)))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_benchmark_runs(command, ran):
    out = ran[command].stdout
    assert ran[command].returncode == 0, ran[command].stderr
    assert out.count("|---") and len(out.splitlines()) >= 6 and "torch" in out
