"""Handwritten digits: a whole client, model and data included. `hierfl client run app.py --kit KIT`"""

from zlib import crc32

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hierfl.client.torch import TorchApp

NAME = "digits"


def data(task, part):  # read your own here: task.site, task.site_config["data"], ...
    images, labels = load_digits(return_X_y=True)
    mine = torch.arange(len(labels)) % 10 == (9 if part == "test" else crc32(task.site.encode()) % 9)
    x, y = torch.tensor(images[mine] / 16, dtype=torch.float32), torch.tensor(labels[mine])
    return DataLoader(TensorDataset(x, y), batch_size=32, shuffle=part == "train")


app = TorchApp(
    model=lambda config: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)),
    loss=nn.CrossEntropyLoss(),
    optimizer=lambda parameters, config: torch.optim.SGD(parameters, lr=config.get("learning_rate", 0.1)),
    data=lambda task: data(task, "train"),
    test_data=lambda task: data(task, "test"),
)
