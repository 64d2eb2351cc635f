"""The demo's app: handwritten digits that sites hold unevenly, and a small CNN that reads them.

What a site has, and what it makes of a model, depends on its name, the job's ``[app]`` keys and the task's
seed: never on its region. So any grouping of the same sites into regions trains the same model.

    [app]
    sites = 12       # site-00 ... site-11 share the data
    data_seed = 0    # of the split

The data come with scikit-learn: 1,797 images of 8 x 8 pixels (Alpaydin and Kaynak 1998, UCI Machine
Learning Repository, doi 10.24432/C50P49), so that nothing is downloaded.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from hierfl.client.task import Metrics, Task, Update
from hierfl.client.torch import TorchApp
from hierfl.errors import ConfigError

__all__ = [
    "NAME",
    "VERSION",
    "Examples",
    "Score",
    "Split",
    "app_config",
    "baseline",
    "evaluate",
    "evaluate_params",
    "init",
    "load_split",
    "model",
    "site_names",
    "train",
]

NAME: Final = "digits"
VERSION: Final = "1"

NUM_CLASSES: Final = 10
TEST_SHARE: Final = 0.45
"""Of each digit, held out from every site: 808 images, so that half a point of accuracy means something."""
HELD_OUT_SHARE: Final = 0.1
"""Of each site's images, kept by it for its own evaluation."""
CONCENTRATION: Final = 0.5
"""Of the Dirichlet distribution that shares out each digit: most sites see few of some digits."""
LEAST_EXAMPLES: Final = 10
"""Of any site."""
PIXEL_MEAN, PIXEL_STD = 0.305, 0.376
"""Of these images, once pixels are scaled to 0 ... 1; public, so no site's data are looked at for them."""

EPOCHS: Final = 3
BATCH_SIZE: Final = 8
LEARNING_RATE: Final = 0.05
RATE_DECAY: Final = 0.9
"""Each round's learning rate over the one before: sites drift apart less as the model settles."""
MOMENTUM: Final = 0.9
BASELINE_BATCH_SIZE: Final = 32
"""Without drift between sites larger batches did better: the baselines are not held back by ours."""


# ---------------------------------------------------------------- data


@dataclass(frozen=True)
class Examples:
    """Images and the digits on them."""

    images: Tensor
    """Shape ``(num_examples, 1, 8, 8)``, float32, standardised."""
    digits: Tensor
    """Shape ``(num_examples,)``, int64, 0 to 9."""

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, chosen: np.ndarray) -> Examples:
        return Examples(self.images[chosen], self.digits[chosen])


@dataclass(frozen=True, kw_only=True)
class Split:
    """Who has what. The three parts do not overlap."""

    train: Mapping[str, Examples]
    """By site."""
    held_out: Mapping[str, Examples]
    """By site, for its own evaluation."""
    test: Examples
    """No site's: all digits in their usual shares."""


def site_names(num_sites: int) -> tuple[str, ...]:
    """``site-00``, ``site-01``, ..."""
    return tuple(f"site-{number:02d}" for number in range(num_sites))


def app_config(num_sites: int, data_seed: int) -> dict[str, Any]:
    """The job's ``[app]`` keys."""
    return {"sites": num_sites, "data_seed": data_seed}


@functools.lru_cache(maxsize=4)
def load_split(num_sites: int, data_seed: int) -> Split:
    """Share the digits out; the same arguments give the same split.

    Raises:
        ConfigError: More sites than there are images for.
    """
    everything = _load()
    rng = np.random.default_rng(data_seed)
    test, pools = _hold_out(everything.digits.numpy(), rng)
    most = sum(map(len, pools)) // LEAST_EXAMPLES
    if not 1 <= num_sites <= most:
        raise ConfigError("app.sites", num_sites, f"must be from 1 to {most}: there are no more images to share out")
    parts = [rng.permutation(part) for part in _share_out(pools, num_sites, rng)]
    kept = [max(1, round(len(part) * HELD_OUT_SHARE)) for part in parts]
    names = site_names(num_sites)
    return Split(
        train={name: everything[part[num:]] for name, part, num in zip(names, parts, kept, strict=True)},
        held_out={name: everything[part[:num]] for name, part, num in zip(names, parts, kept, strict=True)},
        test=everything[test],
    )


def _load() -> Examples:
    from sklearn.datasets import load_digits

    found = load_digits()
    pixels = (found.images[:, None] / 16 - PIXEL_MEAN) / PIXEL_STD
    return Examples(torch.from_numpy(pixels.astype(np.float32)), torch.from_numpy(found.target.astype(np.int64)))


def _hold_out(digits: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, list[np.ndarray]]:
    """Indices of the test set, and of what is left of each digit."""
    test, pools = [], []
    for digit in range(NUM_CLASSES):
        found = rng.permutation(np.flatnonzero(digits == digit))
        num_test = round(len(found) * TEST_SHARE)
        test.append(found[:num_test])
        pools.append(found[num_test:])
    return np.concatenate(test), pools


def _share_out(pools: Sequence[np.ndarray], num_sites: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Each digit's images over the sites in Dirichlet shares; then the largest give to those with too few.

    Source of the split by label: Hsu, Qi and Brown 2019 (arXiv:1909.06335).
    """
    parts: list[list[int]] = [[] for _ in range(num_sites)]
    for pool in pools:
        shares = rng.dirichlet([CONCENTRATION] * num_sites)
        cuts = np.rint(np.cumsum(shares)[:-1] * len(pool)).astype(int)
        for part, indices in zip(parts, np.split(pool, cuts), strict=True):
            part.extend(indices.tolist())
    while len(min(parts, key=len)) < LEAST_EXAMPLES:
        min(parts, key=len).append(max(parts, key=len).pop())
    return [np.array(part) for part in parts]


class _Batches:
    """Examples in batches; shuffled anew at each pass by torch's generator, which the task's seed has set."""

    def __init__(self, examples: Examples, batch_size: int, *, shuffle: bool) -> None:
        self._examples, self._batch_size, self._shuffle = examples, batch_size, shuffle

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        num = len(self._examples)
        order = torch.randperm(num) if self._shuffle else torch.arange(num)
        for chosen in order.split(self._batch_size):
            yield self._examples.images[chosen], self._examples.digits[chosen]


# ---------------------------------------------------------------- the app


def model(config: Mapping[str, Any]) -> nn.Module:
    """Two convolutions and a linear layer, 14,698 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(32 * 4 * 4, NUM_CLASSES),
    )


def _optimizer(parameters: Iterable[nn.Parameter], config: Mapping[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=config["learning_rate"], momentum=MOMENTUM, nesterov=True, fused=True)


def _own(task: Task) -> tuple[Examples, Examples]:
    """What this site trains on, and what it holds out."""
    num_sites = int(task.config.get("sites", 12))
    split = load_split(num_sites, int(task.config.get("data_seed", 0)))
    if task.site not in split.train:
        last = site_names(num_sites)[-1]
        raise ConfigError("site", task.site, f"must be site-00 to {last} to have digits; see the job's [app] sites")
    return split.train[task.site], split.held_out[task.site]


_torch_app = TorchApp(
    model,
    nn.CrossEntropyLoss(),
    _optimizer,
    data=lambda task: _Batches(_own(task)[0], BATCH_SIZE, shuffle=True),
    test_data=lambda task: _Batches(_own(task)[1], 256, shuffle=False),
    epochs=EPOCHS,
)


def init(config: Mapping[str, Any]) -> nn.Module:
    """Version 0 of the model."""
    return _torch_app.init(config)


def train(task: Task) -> Update:
    """A few epochs on the site's own digits, at the round's learning rate."""
    return _torch_app.train(_at_rate(task))


def evaluate(task: Task) -> Metrics:
    """The model on the digits that the site has kept for it."""
    assert _torch_app.evaluate is not None  # it has test_data
    return _torch_app.evaluate(task)


def _at_rate(task: Task) -> Task:
    return replace(task, config={**task.config, "learning_rate": _rate(task.round)})


def _rate(round_number: int) -> float:
    return LEARNING_RATE * float(RATE_DECAY ** (round_number - 1))


# ---------------------------------------------------------------- what it is compared with


@dataclass(frozen=True, kw_only=True)
class Score:
    """On the test set that no site has."""

    accuracy: float
    """Fraction of digits read correctly."""
    loss: float
    """Mean cross-entropy, in nats."""


def evaluate_params(params: Mapping[str, np.ndarray], num_sites: int, data_seed: int) -> Score:
    """Score of a model, as named arrays."""
    module = model({})
    module.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in params.items()})
    return _score(module, load_split(num_sites, data_seed).test)


def _score(module: nn.Module, test: Examples) -> Score:
    module.eval()
    with torch.no_grad():
        outputs = module(test.images)
        loss = float(nn.functional.cross_entropy(outputs, test.digits))
    return Score(accuracy=float((outputs.argmax(dim=1) == test.digits).double().mean()), loss=loss)


def baseline(
    params: Mapping[str, np.ndarray], sites: Sequence[str], *, num_sites: int, data_seed: int, rounds: int, seed: int
) -> list[Score]:
    """What could be had by pooling the data of ``sites`` in one place, which federation does not need.

    From the same first model, as many passes over the data as ``rounds`` rounds make, at the same learning rates.

    Args:
        params: Version 0 of the model.
        sites: A region's, or all of them: "pooled training".
        seed: Of the order of examples and of dropout.
    Returns:
        The score after each round's worth of passes.
    """
    split = load_split(num_sites, data_seed)
    pooled = Examples(
        torch.cat([split.train[site].images for site in sites]), torch.cat([split.train[site].digits for site in sites])
    )
    module = model({})
    module.load_state_dict({name: torch.from_numpy(np.array(array)) for name, array in params.items()})
    torch.manual_seed(seed)
    optimizer = _optimizer(module.parameters(), {"learning_rate": LEARNING_RATE})
    batches = _Batches(pooled, BASELINE_BATCH_SIZE, shuffle=True)
    scores = []
    for number in range(1, rounds + 1):
        optimizer.param_groups[0]["lr"] = _rate(number)
        module.train()
        for _ in range(EPOCHS):
            for images, digits in batches:
                optimizer.zero_grad()
                nn.functional.cross_entropy(module(images), digits).backward()
                optimizer.step()
        scores.append(_score(module, split.test))
    return scores
