"""The demo's digits and its small network: whole, the same every time, and good enough to explain."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from epic_ray import demo
from epic_ray.demo import DIGIT_PREPROCESSING, digit_net, train_digit_net, write_digits
from epic_ray.errors import InputError


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo") / "digits"
    assert write_digits(root) == 1797
    return root


def files_of(root):
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.png")}


def test_digits_are_an_image_folder_of_both_splits(digits):
    names = list(files_of(digits))
    counts = {split: sum(name.startswith(split) for name in names) for split in ("train", "val")}
    assert counts == {"train": 1402, "val": 395}
    for split in ("train", "val"):
        per_class = [len(list((digits / split / str(digit)).iterdir())) for digit in range(10)]
        assert max(per_class) - min(per_class) <= 8
    rows = [name.rsplit("/", 1)[1] for name in names]
    assert len(set(rows)) == 1797  # no digit in both splits


def test_digits_are_the_same_bytes_every_time(digits, tmp_path):
    write_digits(tmp_path / "again")
    assert files_of(tmp_path / "again") == files_of(digits)


def test_a_digit_is_the_bundled_one_enlarged(digits):
    from sklearn.datasets import load_digits

    bundled = load_digits()
    path = next((digits / "val" / "4").iterdir())
    row = int(path.stem)
    assert bundled.target[row] == 4
    with Image.open(path) as image:
        assert image.size == (32, 32)
        shown = np.asarray(image.convert("L").resize((10, 10), Image.Resampling.BOX), dtype=float)[1:-1, 1:-1]
    assert np.corrcoef(shown.ravel(), bundled.images[row].ravel())[0, 1] > 0.9


def test_an_interrupted_write_leaves_no_folder(tmp_path, monkeypatch):
    written = []

    def save_then_stop(image, path, **options):
        written.append(path)
        if len(written) == 20:
            raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        write_digits(tmp_path / "digits")
    assert list(tmp_path.iterdir()) == []


def test_a_whole_folder_is_kept_and_a_strange_one_is_refused(digits, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in digits.rglob("*.png")}
    assert write_digits(digits) == 1797
    assert {path: path.stat().st_mtime_ns for path in digits.rglob("*.png")} == before
    with pytest.raises(InputError, match="32 px, not 16 px"):
        write_digits(digits, size_px=16)
    (tmp_path / "mine.txt").write_text("a user's file")
    with pytest.raises(InputError, match="not the demo's digits"):
        write_digits(tmp_path)


def test_logits_are_the_linear_head_of_the_mean_of_an_8x8_map():
    net = digit_net(7).eval()
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        maps = net.features(images)
        logits = maps.mean(dim=(2, 3)) @ net.head.weight.T + net.head.bias
        assert maps.shape == (3, 40, 8, 8)
        assert maps.min() >= 0
        torch.testing.assert_close(net(images), logits)
    assert [type(layer) for layer in net.children()][1:] == [torch.nn.AdaptiveAvgPool2d, torch.nn.Linear]


def test_a_cell_sees_a_stroke_and_not_the_digit():
    features = digit_net().eval().double().features
    image = torch.randn(1, 3, 32, 32, dtype=torch.float64, requires_grad=True)
    for layer in features:
        if isinstance(layer, torch.nn.ReLU):
            layer.forward = torch.nn.functional.softplus  # so that no path is dead
    features(image)[0, :, 4, 4].sum().backward()
    rows = image.grad.abs().sum(dim=(0, 1, 3)).nonzero().flatten()
    assert rows.max() - rows.min() + 1 == 13


def test_one_epoch_is_the_same_for_a_seed_and_leaves_the_program_as_it_was(digits, tmp_path):
    torch.manual_seed(123)
    expected_draw = torch.rand(1)
    torch.manual_seed(123)
    threads, seen = torch.get_num_threads(), []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        train_digit_net(digits, tmp_path / name, seed=seed, epochs=1, on_epoch=lambda *told: seen.append(told))
    assert torch.rand(1) == expected_draw
    assert torch.get_num_threads() == threads
    assert [told[:2] for told in seen] == [(1, 1)] * 3
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != (tmp_path / "c").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
    weights = load_file(tmp_path / "a")
    assert {value.dtype for name, value in weights.items() if "num_batches" not in name} == {torch.float32}
    digit_net().load_state_dict(weights)


def test_training_without_digits_says_what_to_write(tmp_path):
    with pytest.raises(InputError, match="write_digits"):
        train_digit_net(tmp_path, tmp_path / "weights.safetensors")


def test_the_stated_preprocessing_is_the_one_trained_with():
    grey = torch.rand(2, 32, 32)
    mean, std = (torch.tensor(DIGIT_PREPROCESSING[name])[:, None, None] for name in ("mean", "std"))
    rgb = grey[:, None].expand(2, 3, 32, 32)
    torch.testing.assert_close(demo._normalise(grey), (rgb - mean) / std)


@pytest.mark.slow
def test_the_trained_net_reads_at_least_97_percent_of_the_unseen_digits(digits, tmp_path):
    accuracies = []
    path = tmp_path / "digits.safetensors"
    accuracy = train_digit_net(digits, path, on_epoch=lambda *told: accuracies.append(told[3]))
    assert accuracy == accuracies[-1] >= 0.97
    net = digit_net()
    net.load_state_dict(load_file(path))
    images, labels = demo._read_split(digits / "val")
    assert demo._accuracy(net, images, labels) == accuracy
