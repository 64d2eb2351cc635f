"""The PyTorch helper: from a module, a loss, an optimizer and a DataLoader to a whole app.

The only place of the SDK that knows torch. Parameters get the role ``train``, floating buffers (BatchNorm's
running statistics) ``mean``, integer buffers (its batch counter) ``local``; tied tensors count once.
Training depends on ``task.params``, ``task.config``, ``task.seed`` and the data only: generators are seeded,
algorithms deterministic, and one thread is used, because 1, 2 and 4 threads give three different models.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hierfl.client.task import Declined, Metrics, Task, Update
from hierfl.errors import AppError
from hierfl.layout import Role

__all__ = ["TorchApp", "load", "named_tensors", "roles_of", "seed_torch", "state_dict", "to_arrays"]

Batch = Any
"""``(inputs, targets)``, or ``(input_1, ..., input_n, targets)``, as a DataLoader makes it."""
HALF = (torch.bfloat16, torch.float16)


def seed_torch(seed: int) -> None:
    """Seed torch's generators, on every device."""
    torch.manual_seed(seed)


def be_deterministic(threads: int | None = 1) -> None:
    """Have torch, in this process, give the same bits for the same work; ``None`` leaves its threads alone."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # CUDA refuses determinism without it
    torch.use_deterministic_algorithms(True)
    if threads is not None and torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------- modules and named arrays


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers, in the module's order; a tied tensor once, under its first name."""
    saved = module.state_dict(keep_vars=True)
    buffers = {name: buffer for name, buffer in module.named_buffers() if name in saved}
    return {**dict(module.named_parameters()), **buffers}


def to_arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Tensors as arrays, 16-bit floats as float32, which is what travels.

    Arrays share a CPU tensor's memory where they can, and each other's where tensors do: ties survive.

    Raises:
        AppError: A tensor is no plain block of numbers: quantised, sparse, on the meta device.
    """
    arrays: dict[str, np.ndarray] = {}
    seen: dict[object, np.ndarray] = {}
    for name, tensor in tensors.items():
        try:
            memory = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride()) if tensor.numel() else name
            arrays[name] = seen.setdefault(memory, _to_array(tensor))
        except (TypeError, RuntimeError, NotImplementedError) as error:
            raise AppError(f"tensor {name!r} is no plain array of numbers: {error}") from None
    return arrays


def _to_array(tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    return np.asarray((tensor.float() if tensor.dtype in HALF else tensor).numpy())


def roles_of(module: nn.Module, *, trainable_only: bool = False) -> dict[str, Role]:
    """Each tensor's role: parameters train, floating buffers mean, integer buffers local.

    With ``trainable_only``, as in fine-tuning with adapters (LoRA), parameters that do not require a gradient are
    fixed, and so are the buffers of parts whose parameters are all frozen; a part without parameters counts as
    frozen where anything in the model is.
    """
    parameters = dict(module.named_parameters())
    roles = {name: Role.TRAIN if name in parameters else _buffer_role(t) for name, t in named_tensors(module).items()}
    return {**roles, **dict.fromkeys(_frozen(module) & roles.keys(), Role.FIXED)} if trainable_only else roles


def _frozen(module: nn.Module) -> set[str]:
    frozen_model = any(not parameter.requires_grad for parameter in module.parameters())
    frozen: set[str] = set()
    for prefix, part in module.named_modules():
        own = dict(part.named_parameters(prefix, recurse=False))
        frozen |= {name for name, parameter in own.items() if not parameter.requires_grad}
        if not any(parameter.requires_grad for parameter in own.values()) if own else frozen_model:
            frozen |= {name for name, _ in part.named_buffers(prefix, recurse=False)}
    return frozen


def _buffer_role(buffer: Tensor) -> Role:
    return Role.MEAN if buffer.is_floating_point() or buffer.is_complex() else Role.LOCAL


def state_dict(task: Task) -> dict[str, Tensor]:
    """The task's model as tensors by name, for ``module.load_state_dict(..., strict=False)``."""
    return {name: torch.from_numpy(array) for name, array in task.params.items()}


def load(module: nn.Module, task: Task) -> None:
    """Copy the task's model into a module; tensors that never travel keep the module's values.

    Raises:
        AppError: The module lacks a tensor, or has it in another shape.
    """
    own = module.state_dict(keep_vars=True)  # tied tensors under each of their names
    with torch.no_grad():
        for name, array in task.params.items():
            if name not in own or tuple(own[name].shape) != array.shape:
                found = f"has it in shape {tuple(own[name].shape)}" if name in own else "does not have it"
                raise AppError(f"the run's model has {name!r} in shape {array.shape}; the app's module {found}")
            own[name].copy_(torch.from_numpy(array))


# ---------------------------------------------------------------- a whole app


class TorchApp:
    """``init``, ``train`` and ``evaluate`` for a torch module. In an app file: ``app = TorchApp(...)``.

    Args:
        model: ``model(config)`` makes the module; ``config`` holds the job's ``[app]`` keys.
        loss: ``loss(outputs, targets)``, a mean over the batch, such as ``nn.CrossEntropyLoss()``.
        optimizer: ``optimizer(parameters, config)`` makes one for the round.
        data: ``data(task)`` makes this client's training DataLoader: batches of ``(inputs, targets)``.
        test_data: The same for held-out data; without it the app does not evaluate.
        epochs: Passes over the data in a round, where the job's ``[app]`` has no ``epochs``.
        device: Where to train, such as ``"cuda"``.
        threads: CPU threads of torch in this process; ``None`` leaves them as they are, and then the bits of
            the model depend on the machine.
    """

    def __init__(
        self,
        model: Callable[[Mapping[str, Any]], nn.Module],
        loss: Callable[[Any, Any], Tensor],
        optimizer: Callable[[Iterable[nn.Parameter], Mapping[str, Any]], torch.optim.Optimizer],
        data: Callable[[Task], Iterable[Batch]],
        test_data: Callable[[Task], Iterable[Batch]] | None = None,
        *,
        epochs: int = 1,
        device: str = "cpu",
        threads: int | None = 1,
    ) -> None:
        self.model, self.loss, self.optimizer, self.data, self.test_data = model, loss, optimizer, data, test_data
        self.epochs, self.device, self.threads = epochs, device, threads
        self.evaluate = None if test_data is None else self._evaluate

    def init(self, config: Mapping[str, Any]) -> nn.Module:
        """Version 0 of the model, from the generator that the run's seed has set."""
        be_deterministic(self.threads)
        return self.model(config)

    def train(self, task: Task) -> Update:
        """Local epochs of the optimizer on this client's data, with FedProx's term where the strategy has one."""
        module = self._module(task)
        loader = self.data(task)
        parameters = [p for p in module.parameters() if p.requires_grad]
        optimizer = self.optimizer(parameters, task.config)
        penalty = _proximal(parameters, float(task.strategy.get("proximal_mu", 0.0)))
        epochs = int(task.config.get("epochs", self.epochs))
        module.train()
        for _ in range(epochs):
            num_examples, mean_loss = self._epoch(module, loader, optimizer, penalty)
        if epochs < 1 or num_examples == 0:
            raise Declined("there are no examples to train on")
        return Update(_trained(module, task), num_examples, {"loss": mean_loss})

    def _evaluate(self, task: Task) -> Metrics:
        module = self._module(task)
        assert self.test_data is not None
        loader = self.test_data(task)
        module.eval()
        num_examples, loss_sum, num_correct = 0, 0.0, 0
        scored = True
        with torch.no_grad():
            for inputs, targets in map(self._on_device, loader):
                outputs = module(*inputs)
                num_examples += len(targets)
                loss_sum += float(self.loss(outputs, targets)) * len(targets)
                correct = _num_correct(outputs, targets)
                scored, num_correct = scored and correct is not None, num_correct + (correct or 0)
        if num_examples == 0:
            raise Declined("there are no examples to evaluate on")
        return Metrics(loss_sum / num_examples, num_examples, num_correct / num_examples if scored else None)

    def _module(self, task: Task) -> nn.Module:
        be_deterministic(self.threads)
        module = self.model(task.config).to(self.device)
        load(module, task)
        seed_torch(task.seed)  # again: what the model drew to initialise itself does not matter
        return module

    def _epoch(
        self, module: nn.Module, loader: Iterable[Batch], optimizer: torch.optim.Optimizer, penalty: Callable[[], Any]
    ) -> tuple[int, float]:
        """One pass; examples seen and their mean loss, without the proximal term."""
        num_examples, loss_sum = 0, 0.0
        for inputs, targets in map(self._on_device, loader):
            optimizer.zero_grad()
            loss = self.loss(module(*inputs), targets)
            (loss + penalty()).backward()
            optimizer.step()
            num_examples += len(targets)
            loss_sum += float(loss.detach()) * len(targets)
        return num_examples, loss_sum / max(num_examples, 1)

    def _on_device(self, batch: Batch) -> tuple[list[Any], Any]:
        *inputs, targets = (part.to(self.device) for part in batch)
        return inputs, targets


def _trained(module: nn.Module, task: Task) -> dict[str, Any]:
    """The module's tensors. A 16-bit one is what it was given plus what training changed.

    The global model is a float32 master: without this, rounding it to 16 bits would count as training.
    """
    tensors: dict[str, Any] = dict(named_tensors(module))
    for name, tensor in tensors.items():
        if tensor.dtype in HALF and name in task.params:
            master = torch.from_numpy(task.params[name])
            tensors[name] = master + (tensor.detach().cpu().float() - master.to(tensor.dtype).float())
    return tensors


def _proximal(parameters: list[nn.Parameter], mu: float) -> Callable[[], Tensor | float]:
    """FedProx: ``mu / 2 * ||params - global||^2`` over the trained parameters.

    Source: Li et al. 2020, Federated Optimization in Heterogeneous Networks, equation 2 (arXiv:1812.06127).
    """
    if mu == 0:
        return lambda: 0.0
    anchors = [parameter.detach().clone() for parameter in parameters]

    def penalty() -> Tensor:
        terms = [(p - anchor).square().sum() for p, anchor in zip(parameters, anchors, strict=True)]
        return (mu / 2) * torch.stack(terms).sum()

    return penalty


def _num_correct(outputs: Any, targets: Any) -> int | None:
    """Correct predictions of a classifier: class scores in dimension 1 against class numbers; else ``None``."""
    classified = isinstance(outputs, Tensor) and not targets.is_floating_point() and outputs.dim() == targets.dim() + 1
    return int((outputs.argmax(dim=1) == targets).sum()) if classified else None
