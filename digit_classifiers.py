"""The instrument of metrics.py: two digit classifiers that share neither training digits nor architecture.

Both name the digit in single frames and give the features that Frechet distance, identity and diversity live in. Each
is trained on 200 real digits per class that no model of this course ever sees: `python metrics.py --train_classifier
first`.
"""

import os
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from checkpoint import fill, load_weights, save_weights
from moving_mnist import WorldConfig, sprites

CHECKPOINTS = Path(__file__).parent / "checkpoints"
NUM_CLASSES = 10
NUM_FEATURES = 64
TRAINING = {  # about 2.5 minutes each on one core
    "first": {"num_steps": 1600, "batch_size": 64, "lr": 4e-3, "seed": 0},
    "second": {"num_steps": 1500, "batch_size": 64, "lr": 5e-3, "seed": 0},
}


def brightness(frames):
    """Frames [N, C, H, W] in [-1, 1] -> [N, H, W] in [0, 1]."""
    return (frames.mean(1) + 1) / 2


def centre_of_mass(ink):
    """Ink [..., H, W] -> (y, x) [..., 2] in pixels; the middle of the canvas where there is no ink."""
    mass = ink.sum((-2, -1)).clamp(min=1e-6)
    middle = (torch.tensor(ink.shape[-2:], device=ink.device) - 1) / 2
    y, x = (torch.arange(n, device=ink.device) - m for n, m in zip(ink.shape[-2:], middle, strict=True))
    return torch.stack([ink.sum(-1) @ y, ink.sum(-2) @ x], dim=-1) / mass[..., None] + middle


def conv(c_in, c_out):
    return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())


class Classifier(nn.Module):
    """3 x 3 convolutions and a global maximum: frames [N, C, H, W] in [-1, 1] -> logits [N, 10].

    It takes any canvas, but knows digits of 14 pixels. `features` [N, 64] is the space of the Frechet
    distance, of identity and of diversity.
    """

    split = "classifier"

    def __init__(self):
        super().__init__()
        layers = [conv(1, 24), conv(24, 24), nn.MaxPool2d(2), conv(24, 48), conv(48, 48), nn.MaxPool2d(2)]
        layers += [conv(48, 96), conv(96, 96), nn.AdaptiveMaxPool2d(1), nn.Flatten()]
        self.body = nn.Sequential(*layers, nn.Linear(96, NUM_FEATURES))
        self.head = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def features(self, frames):
        return self.body(brightness(frames)[:, None])

    def forward(self, frames):
        return self.head(F.relu(self.features(frames)))


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


def kernel(c_in, c_out, size, **options):
    return nn.Sequential(nn.Conv2d(c_in, c_out, size, **options), nn.GELU(), nn.BatchNorm2d(c_out))


class SecondClassifier(nn.Module):
    """A ConvMixer (Trockman and Kolter 2022) on a window around the ink's centre of mass; used like the
    first.

    What pleases one need not please the other: here the place is divided out before the first layer, and
    depthwise 5 x 5 kernels with residuals and GELU do the work of plain 3 x 3 ones with ReLU.
    """

    split = "second_classifier"
    window, dim, num_layers = 18, 80, 4

    def __init__(self):
        super().__init__()
        dim = self.dim
        mixers = [
            nn.Sequential(Residual(kernel(dim, dim, 5, padding=2, groups=dim)), kernel(dim, dim, 1))
            for _ in range(self.num_layers)
        ]
        stem = [kernel(1, 24, 3, padding=1), kernel(24, dim, 3, stride=2, padding=1)]
        pool = [nn.AdaptiveMaxPool2d(1), nn.Flatten()]
        self.body = nn.Sequential(*stem, *mixers, *pool, nn.Linear(dim, NUM_FEATURES))
        self.head = nn.Linear(NUM_FEATURES, NUM_CLASSES)

    def centred(self, ink):
        """Ink [N, H, W] -> the window around each centre of mass [N, 1, window, window], bilinear."""
        side = torch.arange(self.window, device=ink.device) - (self.window - 1) / 2
        y, x = (centre_of_mass(ink)[:, None] + side[:, None]).unbind(-1)  # [n window], in pixels
        grid = torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1)
        grid = (2 * grid + 1) / torch.tensor(ink.shape[:0:-1], device=ink.device) - 1  # (x, y) in [-1, 1]
        return F.grid_sample(ink[:, None], grid, align_corners=False)

    def features(self, frames):
        return self.body(self.centred(brightness(frames)))

    def forward(self, frames):
        return self.head(F.relu(self.features(frames)))


def load_classifier(path=None, second=False):
    """The first (or second) classifier, frozen; by default the one that ships with the repository."""
    kind = SecondClassifier if second else Classifier
    path = Path(path or CHECKPOINTS / f"{kind.split}.safetensors")
    if not path.exists():
        name = "second" if second else "first"
        raise ValueError(f"no {path.name}: `python metrics.py --train_classifier {name}` makes it")
    model = kind()
    fill(model, load_weights(path).state_dict, path)
    return model.to(memory_format=torch.channels_last).eval().requires_grad_(False)


def distorted(digits, digit_size):
    """Digits [n, 20, 20] in [0, 1] -> [n, s, s], each as another hand would draw it: shape, stroke and
    ink."""
    n, size = len(digits), digits.shape[-1]

    def draw(low, high):
        return torch.rand(n).mul(high - low).add(low)

    angle, shear, shift = draw(-0.26, 0.26), draw(-0.25, 0.25), draw(-0.08, 0.08)
    zoom_y, zoom_x = draw(0.87, 1.15), draw(0.87, 1.15)
    rows = [zoom_x * angle.cos(), shear - angle.sin(), shift]
    rows += [angle.sin(), zoom_y * angle.cos(), draw(-0.08, 0.08)]
    grid = F.affine_grid(torch.stack(rows, dim=-1).view(n, 2, 3), (n, 1, size, size), align_corners=False)
    wobble = F.interpolate(torch.randn(n, 2, 5, 5) * 0.05, (size, size), mode="bicubic", align_corners=True)
    image = F.grid_sample(digits[:, None], grid + wobble.permute(0, 2, 3, 1), align_corners=False)

    stroke = draw(-0.5, 0.6).view(n, 1, 1, 1)
    thick, thin = F.max_pool2d(image, 3, 1, 1), -F.max_pool2d(-image, 3, 1, 1)
    image = image + stroke.clamp(min=0) * (thick - image) - stroke.clamp(max=0) * (thin - image)
    blur = draw(-0.3, 0.5).clamp(min=0).view(n, 1, 1, 1)
    image = torch.lerp(image, F.avg_pool2d(image, 3, 1, 1), blur) * draw(0.7, 1.1).view(n, 1, 1, 1)
    image = F.interpolate(image, (digit_size, digit_size), mode="bilinear", antialias=True)
    return image[:, 0].clamp(0, 1)


def placed(digits, canvas):
    """Digits [n, s, s] in [0, 1] -> frames [n, 1, canvas, canvas] in [-1, 1], each at a random place."""
    n, size = digits.shape[:2]
    place = torch.randint(canvas - size + 1, (n, 2, 1)) + torch.arange(size)  # [n 2 s]
    frames = torch.full((n, canvas, canvas), -1.0)
    frames[torch.arange(n)[:, None, None], place[:, 0, :, None], place[:, 1, None, :]] = digits * 2 - 1
    return frames[:, None]


def optimise(model, loss, *, num_steps, lr):
    """Minimise loss(step) by AdamW with one cycle of the learning rate; the model comes back frozen."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=num_steps, pct_start=0.1)
    for step in tqdm(range(num_steps), desc=f"train {type(model).__name__}"):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def train_classifier(second=False, *, world, num_steps, batch_size, lr, seed):
    """Train one of the classifiers on the 200 digits per class of its own split, distorted and anywhere.

    The same seed gives the same weights; the caller's random state stays as it was.
    """
    kind = SecondClassifier if second else Classifier
    digits, labels = sprites(replace(world, split=kind.split, sprites_per_class=200, digit_size=20))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = kind().to(memory_format=torch.channels_last)  # a third faster on a CPU

        def loss(step):
            index = torch.randint(len(digits), (batch_size,))
            frames = placed(distorted(digits[index], world.digit_size), world.canvas)
            return F.cross_entropy(model(frames), labels[index], label_smoothing=0.05)

        return optimise(model, loss, num_steps=num_steps, lr=lr)


def held_out_accuracy(model, split, world):
    """Share of a split's real digits, each at 8 random places, that the model names."""
    digits, labels = sprites(replace(world, split=split))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        frames = placed(digits.repeat(8, 1, 1), world.canvas)
    return (model(frames).argmax(-1) == labels.repeat(8)).float().mean().item()


def make_classifier(name):
    """Train and save a classifier, with a .json beside it that says how it was made and what it scores."""
    world, start = WorldConfig(), time.monotonic()
    model = train_classifier(name == "second", world=world, **TRAINING[name])
    record = {
        "command": f"python metrics.py --train_classifier {name}",
        "seed": TRAINING[name]["seed"],
        "data": {**asdict(world), "split": model.split, "sprites_per_class": 200},
        "config": TRAINING[name],
        "seconds": round(time.monotonic() - start),
        "machine": {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "torch": str(torch.__version__)},
        "metrics": {f"{split}_accuracy": held_out_accuracy(model, split, world) for split in ("validation", "train")},
    }
    path = CHECKPOINTS / f"{model.split}.safetensors"
    save_weights(path, model.state_dict(), record, dtype=torch.float32)
    print(f"{path.name}: {record['metrics']}")
