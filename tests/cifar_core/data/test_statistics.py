import pytest
import torch
from PIL import Image

from cifar_core.data import channel_statistics, summary
from cifar_core.data.statistics import PUBLISHED_MEANS, PUBLISHED_STDS


def test_channel_statistics_are_those_of_all_pixels(small):
    means, stds = channel_statistics(small.train.images)
    pixels = small.train.images.numpy().reshape(-1, 3) / 255
    assert means == pytest.approx(pixels.mean(0), abs=1e-12)
    assert stds == pytest.approx(pixels.std(0), abs=1e-12)


def test_the_real_images_have_the_published_statistics(real):
    assert (len(real.train), len(real.test)) == (50_000, 10_000)
    assert real.classes == (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
    )  # fmt: skip
    for part, count in ((real.train, 5_000), (real.test, 1_000)):
        assert torch.bincount(part.labels).tolist() == [count] * 10
    means, stds = channel_statistics(real.train.images)
    # JPEG compression changes the third decimal; the official archive must match to the last published digit.
    exact = real.kind == "cifar10"
    assert means == pytest.approx(PUBLISHED_MEANS, abs=1e-9 if exact else 5e-4)
    assert stds == pytest.approx(PUBLISHED_STDS, abs=1e-9 if exact else 3e-3)


def test_the_command_prints_the_summary_and_writes_figure_1(command, tmp_path, small):
    done = command("cifar_core.data", "--data", "synthetic:300", "--figure", tmp_path / "f.png")
    assert done.returncode == 0, done.stderr
    assert summary(small) in done.stdout
    assert "0.491400" in done.stdout
    with Image.open(tmp_path / "f.png") as figure:
        assert figure.width > 800
        assert len(figure.convert("RGB").getcolors(10**7)) > 1000  # pictures and not blank axes


def test_the_command_reports_an_error_in_one_line_with_exit_code_2(command, tmp_path):
    done = command("cifar_core.data", "--data", tmp_path / "nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 1
