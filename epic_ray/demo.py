"""The data and the small network of the offline demo: scikit-learn's handwritten digits, and a net trained on them.

Both are made on the spot, on a CPU, from what is installed; nothing is fetched.
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn

from epic_ray.errors import InputError

VAL_FRACTION = 0.22  # of each class: 395 of the 1,797 digits
EPOCHS = 18
BATCH_SIZE = 64
TRAINING_THREADS = 1  # two that wait for each other take twenty times as long when another program has a core

INPUT_PX = 32
DIGIT_PREPROCESSING: dict[str, Any] = {
    "resize": INPUT_PX,
    "crop": INPUT_PX,
    "interpolation": "bilinear",
    "mean": [0.5, 0.5, 0.5],
    "std": [0.5, 0.5, 0.5],
}


# --------------------------------------------------------------------------------------------- the images
def write_digits(root: Path, size_px: int = INPUT_PX) -> int:
    """The number of PNG files under `root`: the handwritten digits as root/{train,val}/{0..9}/NNNN.png.

    1,797 grey pictures of size_px x size_px; NNNN is the digit's row in scikit-learn's set. Of each class the last
    rows are `val`: the set is in the order of its writers, so most of those hands were not seen in `train`.
    The folder appears whole or not at all; one that is already there and whole is left as it is.

    Raises InputError where `root` exists and holds something else.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    places = _digit_places(digits.target)
    if root.exists():
        _check_written(root, places, size_px)
        return len(places)
    root.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{root.name}-", suffix=".part", dir=root.parent))
    try:
        draft.chmod(0o755)  # mkdtemp's 0700 would follow the folder to its final name
        for place, grey_8x8 in zip(places, digits.images, strict=True):
            (draft / place).parent.mkdir(parents=True, exist_ok=True)
            _enlarge(grey_8x8, size_px).save(draft / place, format="PNG")
        draft.rename(root)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return len(places)


def _digit_places(targets: np.ndarray) -> list[Path]:
    """Where each digit's file goes, relative to the root, in the order of the set."""
    places = [Path()] * len(targets)
    for digit in range(10):
        rows = np.flatnonzero(targets == digit)
        train_count = len(rows) - round(VAL_FRACTION * len(rows))
        for position, row in enumerate(rows):
            split = "train" if position < train_count else "val"
            places[row] = Path(split, str(digit), f"{row:04d}.png")
    return places


def _enlarge(grey_8x8: np.ndarray, size_px: int) -> Image.Image:
    """The 8x8 digit with ink 0..16 as a smooth white-on-black picture with a margin of about a cell."""
    ink = Image.fromarray(np.pad(grey_8x8 / 16, 1).astype(np.float32))
    smooth = np.asarray(ink.resize((size_px, size_px), Image.Resampling.BICUBIC))
    # steeper in the middle: strokes with an edge instead of a haze
    crisp = np.clip((smooth - 0.5) * 1.6 + 0.5, 0, 1)
    return Image.fromarray(np.rint(crisp * 255).astype(np.uint8))


def _check_written(root: Path, places: list[Path], size_px: int) -> None:
    found = {path.relative_to(root) for path in root.rglob("*") if path.is_file()}
    if found != set(places):
        raise InputError(f"{root} exists and is not the demo's digits; name another folder, or remove this one")
    with Image.open(root / places[0]) as image:
        if image.size != (size_px, size_px):
            raise InputError(
                f"{root} holds the digits at {image.width} px, not {size_px} px; name another folder, or remove it"
            )


# -------------------------------------------------------------------------------------------- the network
class DigitNet(nn.Module):
    """Convolutions to an 8x8 map, its mean over the cells, one linear layer. A cell sees 13 of the 32 pixels."""

    def __init__(self, class_count: int = 10, channels: int = 40):
        super().__init__()
        self.features = nn.Sequential(
            *_convolution(3, 16, size=5, stride=2),
            *_convolution(16, 32, size=3, stride=1),
            *_convolution(32, channels, size=3, stride=2),
            *_convolution(channels, channels, size=1, stride=1),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, class_count)

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, class_count) of images (B, 3, 32, 32)."""
        return self.head(self.pool(self.features(images)).flatten(1))


def _convolution(inputs: int, outputs: int, size: int, stride: int) -> tuple[nn.Module, ...]:
    convolution = nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False)
    return convolution, nn.BatchNorm2d(outputs), nn.ReLU()


def digit_net(class_count: int = 10) -> nn.Module:
    """An untrained DigitNet: the factory that the demo's run file names."""
    return DigitNet(class_count)


# ------------------------------------------------------------------------------------------- the training
def train_digit_net(
    root: Path,
    weights_path: Path,
    seed: int = 0,
    on_epoch: Callable[[int, int, float, float], None] | None = None,
    epochs: int = EPOCHS,
) -> float:
    """The accuracy on root/val of a DigitNet trained on root/train, whose float32 weights go to `weights_path`.

    `on_epoch(epoch from 1, epochs, mean training loss, validation accuracy)` is called after each epoch. The same seed
    gives the same weights on the same machine. The weights' file appears whole or not at all.

    Raises InputError where `root` is not the ImageFolder of write_digits.
    """
    images_NHW, labels_N = _read_split(root / "train")
    val_images_NHW, val_labels_N = _read_split(root / "val")
    with torch.random.fork_rng(devices=[]), _threads(TRAINING_THREADS):
        torch.manual_seed(seed)
        net = DigitNet()
        steps = epochs * -(-len(labels_N) // BATCH_SIZE)
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=steps)
        for epoch in range(1, epochs + 1):
            loss = _train_epoch(net, optimizer, schedule, images_NHW, labels_N)
            accuracy = _accuracy(net, val_images_NHW, val_labels_N)
            if on_epoch is not None:
                on_epoch(epoch, epochs, loss, accuracy)
    _write_whole(weights_path, save({name: value.contiguous() for name, value in net.state_dict().items()}))
    return accuracy


def _train_epoch(
    net: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    images_NHW: Tensor,
    labels_N: Tensor,
) -> float:
    net.train()
    loss_sum = 0.0
    for rows in torch.randperm(len(labels_N)).split(BATCH_SIZE):
        logits = net(_normalise(_jitter(images_NHW[rows])))
        loss = F.cross_entropy(logits, labels_N[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        loss_sum += loss.item() * len(rows)
    return loss_sum / len(labels_N)


@torch.no_grad()
def _accuracy(net: nn.Module, images_NHW: Tensor, labels_N: Tensor) -> float:
    net.eval()
    return (net(_normalise(images_NHW)).argmax(dim=1) == labels_N).double().mean().item()


def _jitter(images_NHW: Tensor) -> Tensor:
    """Each image turned by up to 10 degrees, moved by up to 2 px and resized by up to a tenth; black comes in."""
    count = len(images_NHW)
    angle, scale = (torch.rand(count) - 0.5) * 0.35, 1 + (torch.rand(count) - 0.5) * 0.2
    shift = (torch.rand(count, 2) - 0.5) * 0.25
    cosine, sine = angle.cos() * scale, angle.sin() * scale
    rows = [torch.stack([cosine, -sine, shift[:, 0]], dim=1), torch.stack([sine, cosine, shift[:, 1]], dim=1)]
    grid = F.affine_grid(torch.stack(rows, dim=1), [count, 1, *images_NHW.shape[1:]], align_corners=False)
    return F.grid_sample(images_NHW[:, None], grid, align_corners=False)[:, 0]


def _normalise(images_NHW: Tensor) -> Tensor:
    """(N, 3, H, W) as DIGIT_PREPROCESSING has it, of grey images (N, H, W) in 0..1."""
    mean = torch.tensor(DIGIT_PREPROCESSING["mean"]).view(3, 1, 1)
    std = torch.tensor(DIGIT_PREPROCESSING["std"]).view(3, 1, 1)
    return (images_NHW[:, None] - mean) / std


def _read_split(folder: Path) -> tuple[Tensor, Tensor]:
    """Grey images (N, 32, 32) in 0..1 and their digits (N), ordered by class and file name."""
    images, labels = [], []
    for digit in range(10):
        paths = sorted((folder / str(digit)).glob("*.png"))
        if not paths:
            raise InputError(f"no digits in {folder / str(digit)}; write them with `write_digits` first")
        for path in paths:
            with Image.open(path) as image:
                grey = image.convert("L").resize((INPUT_PX, INPUT_PX), Image.Resampling.BILINEAR)
            images.append(np.asarray(grey, dtype=np.float32) / 255)
            labels.append(digit)
    return torch.from_numpy(np.stack(images)), torch.tensor(labels)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _write_whole(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
