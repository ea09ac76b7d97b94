"""Copies, files, precision, Lightning and two processes: what people do with a model besides calling it."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torchdyn.core import NeuralODE as TorchdynNeuralODE
from torchdyn.models import CNF as TorchdynCNF  # noqa: N811
from torchdyn.models.cnf import hutch_trace
from torchdyn.nn import DataControl, DepthCat, Fourier, GalLinear

from rnode_plugin import CNF, NeuralODE
from rnode_plugin.solvers import GRADIENTS


def speed(t: Tensor, z: Tensor, dz: Tensor) -> Tensor:
    return dz.abs().sum(1)


def layers() -> nn.Module:
    return nn.Sequential(DepthCat(1), nn.Linear(4, 3), nn.Tanh(), DataControl(), nn.Linear(6, 3))


def galerkin() -> nn.Module:
    return nn.Sequential(DepthCat(1), GalLinear(3, 3, expfunc=Fourier(2)), DataControl(), nn.Linear(6, 3))


def hutchinson() -> nn.Module:
    return TorchdynCNF(nn.Linear(2, 2), hutch_trace, MultivariateNormal(torch.zeros(2), torch.eye(2)))


FIELDS = {"galerkin": galerkin, "torchdyn_cnf": hutchinson, "cnf": lambda: CNF(nn.Linear(2, 2), "gaussian")}


def called(field: nn.Module, **options: Any) -> NeuralODE:
    model = NeuralODE(field, "rk4", regularizers=["kinetic", "jacfrob", speed], **options)
    _, sol = model(torch.randn(4, 3), torch.linspace(0, 1, 3))
    (sol[-1].sum() + model.reg_loss()).backward()
    model.zero_grad()
    model(torch.randn(4, 3))
    return model


def solution(model: nn.Module) -> Tensor:
    torch.manual_seed(9)
    return model(torch.ones(4, 3))[1]


@pytest.mark.parametrize("sensitivity", GRADIENTS)
@pytest.mark.parametrize("name", FIELDS)
def test_deepcopy_and_pickle_after_use(name: str, sensitivity: str) -> None:
    torch.manual_seed(0)
    model = called(FIELDS[name](), sensitivity=sensitivity)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert torch.equal(solution(other), solution(model))
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.add_(1)
        assert not torch.equal(solution(other), solution(model))
        other.reg_loss().backward()


@pytest.mark.parametrize("regularizers", [None, ["kinetic", "jacfrob"]])
def test_state_dict_has_torchdyns_keys_and_moves_between_the_two(regularizers: list[str] | None) -> None:
    for field in (galerkin(), hutchinson(), nn.Linear(3, 3)):
        theirs, ours = TorchdynNeuralODE(copy.deepcopy(field)), NeuralODE(field, regularizers=regularizers)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        with torch.no_grad():
            for p in theirs.parameters():
                p.normal_()
        ours.load_state_dict(theirs.state_dict())
        torch.manual_seed(9)
        expected = theirs(torch.ones(4, 3))[1]
        assert torch.equal(solution(ours), expected)


def test_vf_params_are_those_of_now() -> None:
    model = NeuralODE(nn.Linear(3, 3))
    with torch.no_grad():
        model.vf.vf.vf.weight.fill_(2)
    assert torch.equal(model.vf_params[:9], torch.full((9,), 2.0))
    assert model.double().vf_params.dtype == torch.float64


@pytest.mark.parametrize("sensitivity", GRADIENTS)
@pytest.mark.parametrize("solver", ["rk4", "dopri5"])
def test_double_after_construction(solver: str, sensitivity: str) -> None:
    torch.manual_seed(0)
    # torchdyn's Galerkin layers make their weights in single precision
    model = called(layers(), sensitivity=sensitivity).double()
    _, sol = model(torch.ones(4, 3, dtype=torch.float64), torch.linspace(0, 1, 3, dtype=torch.float64))
    (sol[-1].sum() + model.reg_loss()).backward()
    assert sol.dtype == torch.float64
    assert all(p.grad.dtype == torch.float64 for p in model.parameters() if p.grad is not None)


@pytest.mark.gpu
@pytest.mark.parametrize("sensitivity", GRADIENTS)
def test_to_cuda_after_construction(sensitivity: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for make in FIELDS.values():
        model = called(make(), sensitivity=sensitivity).to("cuda")
        _, sol = model(torch.ones(4, 3, device="cuda"), torch.linspace(0, 1, 3))
        (sol[-1].sum() + model.reg_loss()).backward()
        assert sol.is_cuda
        assert all(p.grad is None or p.grad.is_cuda for p in model.parameters())
