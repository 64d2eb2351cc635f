"""The PyTorch helper: roles, exact conversion, local training. Small modules, real torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402  only after torch is known to be there
from torch.utils.data import DataLoader, TensorDataset  # noqa: E402

from hierfl.client.params import check_app_model, deltas_of, make_layout, returned_arrays  # noqa: E402
from hierfl.client.task import Declined, Task  # noqa: E402
from hierfl.client.torch import TorchApp, load, roles_of, state_dict  # noqa: E402
from hierfl.errors import AppError, LayoutMismatch  # noqa: E402
from hierfl.layout import Layout, Role  # noqa: E402


class Net(nn.Module):
    """A linear layer, batch norm, and an output tied to the input's parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.decode = nn.Linear(4, 4)
        self.decode.weight = self.encode.weight
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, x: Any) -> Any:
        return self.decode(self.norm(self.encode(x)))


def task_for(module: Any, tensors: str = "all", **changes: Any) -> Task:
    layout, vectors = make_layout(module, tensors)
    fields: dict[str, Any] = {
        "params": {n: a.copy() for n, a in layout.unflatten(vectors).items()},
        "config": {},
        "site_config": {},
        "strategy": {},
        "local": {},
        "layout": layout,
        "seed": 7,
        "round": 1,
        "run": "r",
        "region": "eu",
        "site": "a",
        "client": "c",
    }
    return Task(**{**fields, **changes})


def data(task: Task) -> Any:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(24, 4, generator=generator)
    return DataLoader(TensorDataset(x, (x.sum(1) > 0).long()), batch_size=8, shuffle=True)


def sgd(parameters: Any, config: Mapping[str, Any]) -> Any:
    return torch.optim.SGD(parameters, lr=0.1)


def app_of(model: Callable[[Mapping[str, Any]], Any], **options: Any) -> TorchApp:
    return TorchApp(model, nn.CrossEntropyLoss(), sgd, data, data, **options)


def seeded_net() -> Net:
    torch.manual_seed(0)
    return Net()


def test_roles_follow_from_what_a_tensor_is() -> None:
    assert roles_of(seeded_net()) == {
        "encode.weight": Role.TRAIN,
        "encode.bias": Role.TRAIN,
        "norm.weight": Role.TRAIN,
        "norm.bias": Role.TRAIN,
        "decode.bias": Role.TRAIN,
        "norm.running_mean": Role.MEAN,
        "norm.running_var": Role.MEAN,
        "norm.num_batches_tracked": Role.LOCAL,
    }


def test_a_tied_tensor_counts_once_from_the_module_and_from_its_state_dict() -> None:
    net = seeded_net()
    assert make_layout(net)[0].vectors == {"train": 16 + 4 + 4 + 4 + 4, "mean": 8}
    layout, _ = make_layout(net.state_dict())
    assert [(alias.name, alias.of) for alias in layout.aliases] == [("decode.weight", "encode.weight")]


def test_a_frozen_base_is_fixed_where_only_what_is_trainable_takes_part() -> None:
    net = seeded_net()
    for name, parameter in net.named_parameters():
        parameter.requires_grad = name == "decode.bias"
    layout, _ = make_layout(net, "trainable")
    assert set(layout.slots) == {"decode.bias"}
    assert {spec.role for spec in layout.tensors} == {Role.TRAIN, Role.FIXED, Role.LOCAL} - {Role.LOCAL}


def test_patterns_leave_out_a_frozen_base_too() -> None:
    net = seeded_net()
    net.norm.weight.requires_grad = False
    roles = {s.name: s.role for s in make_layout(net, ("encode.*",))[0].tensors}
    assert (roles["norm.weight"], roles["norm.bias"]) == (Role.FIXED, Role.LOCAL)


def test_training_returns_a_delta_for_every_vector_and_keeps_integer_buffers_local() -> None:
    app = app_of(lambda config: Net())
    task = task_for(seeded_net())
    update = app.train(task)
    assert update.num_examples == 24
    layout, base = make_layout(seeded_net())
    arrays = returned_arrays(layout, update.params)
    assert arrays["norm.num_batches_tracked"] == 3
    deltas = deltas_of(layout, arrays, base)
    assert all(np.abs(deltas[name]).max() > 0 for name in ("train", "mean"))


def trained(app: TorchApp, task: Task) -> dict[str, np.ndarray]:
    return {name: tensor.detach().numpy() for name, tensor in app.train(task).params.items()}


def test_the_same_task_gives_the_same_bits_whatever_was_drawn_before() -> None:
    app = app_of(lambda config: Net(), epochs=2)
    torch.manual_seed(123)
    first = trained(app, task_for(seeded_net()))
    torch.manual_seed(456)
    again = trained(app, task_for(seeded_net()))
    other = trained(app, task_for(seeded_net(), seed=8))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not all(np.array_equal(first[name], other[name]) for name in first)


def test_the_proximal_term_holds_the_model_back() -> None:
    app = app_of(lambda config: Net(), epochs=3)
    start = task_for(seeded_net()).params["encode.weight"]
    free = np.abs(trained(app, task_for(seeded_net()))["encode.weight"] - start).sum()
    held = np.abs(trained(app, task_for(seeded_net(), strategy={"proximal_mu": 5.0}))["encode.weight"] - start).sum()
    assert held < 0.8 * free


def test_the_proximal_gradient_is_mu_times_the_distance() -> None:
    def one_step(mu: float) -> Any:
        x = torch.ones(2, 4)
        app = TorchApp(
            lambda config: nn.Linear(4, 2),
            lambda outputs, targets: outputs.sum() * 0 + 1,
            sgd,
            lambda task: [(x, torch.zeros(2)), (x, torch.zeros(2))],
        )
        return app, task_for(nn.Linear(4, 2), strategy={"proximal_mu": mu})

    app, task = one_step(0.5)
    assert all(np.array_equal(value, task.params[name]) for name, value in trained(app, task).items())


def test_epochs_come_from_the_job_where_it_says_so() -> None:
    app = app_of(lambda config: Net())
    counted = app.train(task_for(seeded_net(), config={"epochs": 2})).params["norm.num_batches_tracked"]
    assert int(counted) == 6


def test_evaluation_gives_loss_and_accuracy_of_a_classifier() -> None:
    app = app_of(lambda config: Net())
    assert app.evaluate is not None
    metrics = app.evaluate(task_for(seeded_net()))
    assert metrics.num_examples == 24
    assert metrics.accuracy is not None
    assert 0 <= metrics.accuracy <= 1
    module = seeded_net().eval()
    x, y = data(task_for(module)).dataset.tensors
    assert metrics.loss == pytest.approx(float(nn.CrossEntropyLoss()(module(x), y).detach()), rel=1e-5)


def test_a_regression_has_no_accuracy_and_an_app_without_test_data_no_evaluate() -> None:
    def pairs(task: Task) -> list[Any]:
        return [(torch.ones(2, 4), torch.zeros(2, 1))]

    app = TorchApp(lambda config: nn.Linear(4, 1), nn.MSELoss(), sgd, pairs, pairs)
    assert app.evaluate is not None
    assert app.evaluate(task_for(nn.Linear(4, 1))).accuracy is None
    assert TorchApp(lambda config: nn.Linear(4, 1), nn.MSELoss(), sgd, pairs).evaluate is None


def test_a_client_without_data_sits_the_round_out() -> None:
    app = TorchApp(lambda config: nn.Linear(4, 1), nn.MSELoss(), sgd, lambda task: [], lambda task: [])
    for function in (app.train, app.evaluate):
        assert function is not None
        with pytest.raises(Declined, match="no examples"):
            function(task_for(nn.Linear(4, 1)))


def test_rounding_to_sixteen_bits_is_not_training() -> None:
    torch.manual_seed(0)
    master = nn.Linear(4, 2)  # float32 values that bfloat16 cannot hold
    app = TorchApp(
        lambda config: nn.Linear(4, 2).bfloat16(),
        nn.MSELoss(),
        lambda parameters, config: torch.optim.SGD(parameters, lr=0.0),
        lambda task: [(torch.ones(2, 4).bfloat16(), torch.zeros(2, 2).bfloat16())],
    )
    layout, base = make_layout(master)
    deltas = deltas_of(layout, returned_arrays(layout, app.train(task_for(master)).params), base)
    assert not deltas["train"].any()


def test_a_tasks_model_loads_into_a_module_under_tied_names_too() -> None:
    net = seeded_net()
    task = task_for(net.state_dict())
    assert (
        state_dict(task)["norm.num_batches_tracked" if "norm.num_batches_tracked" in task.params else "norm.bias"]
        is not None
    )
    other = Net()
    load(other, task)
    assert torch.equal(other.decode.weight, net.encode.weight)
    with pytest.raises(AppError, match="module does not have it"):
        load(nn.Linear(4, 4), task)
    with pytest.raises(AppError, match=r"'weight' in shape \(4, 4\); the app's module has it in shape \(2, 2\)"):
        load(nn.Linear(2, 2), task_for(nn.Linear(4, 4)))


def test_sparse_and_quantised_tensors_are_refused_by_name() -> None:
    with pytest.raises(AppError, match="tensor 'w'"):
        make_layout({"w": torch.eye(2).to_sparse()})


def test_empty_and_scalar_tensors_travel() -> None:
    layout, vectors = make_layout(
        {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.0), "also_empty": torch.zeros(0)}
    )
    assert isinstance(layout, Layout)
    assert vectors["train"].tolist() == [2.0]


class Adapted(nn.Module):
    """A frozen base of 10,000 values with adapters of 204."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(100, 100, bias=False)
        self.base.weight.requires_grad = False
        self.down, self.up = nn.Linear(100, 2, bias=False), nn.Linear(2, 2, bias=False)

    def forward(self, x: Any) -> Any:
        return self.up(self.down(self.base(x)))


def test_a_run_over_adapters_never_ships_its_base_model() -> None:
    torch.manual_seed(0)
    module = Adapted()
    layout, base = make_layout(module, "trainable")
    assert layout.vectors == {"train": 204}
    x = torch.randn(8, 100)
    app = TorchApp(lambda config: module, nn.MSELoss(), sgd, lambda task: [(x, torch.ones(8, 2))])
    task = task_for(module, "trainable")
    assert set(task.params) == {"down.weight", "up.weight"}
    update = app.train(task)
    assert "base.weight" in update.params  # the helper returns all it has; the layout decides
    arrays = returned_arrays(layout, update.params)
    assert "base.weight" not in arrays
    assert {name: vector.size for name, vector in deltas_of(layout, arrays, base).items()} == {"train": 204}


def test_a_site_with_another_base_model_is_told_so() -> None:
    torch.manual_seed(0)
    layout, _ = make_layout(Adapted(), "trainable")
    torch.manual_seed(0)
    check_app_model(layout, Adapted())
    torch.manual_seed(1)
    with pytest.raises(LayoutMismatch, match=r"'base.weight' is fixed, and its values are not those"):
        check_app_model(layout, Adapted())
