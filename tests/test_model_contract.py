"""The contract of density models, which docs/plugins.md states, held by each model."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from density_models import ACCURATE, MODELS, make
from problems import COPIES
from regularizer_table import weighed
from torch import Tensor, nn
from torchdyn.numerics.solvers.ode import RungeKutta4

from rnode_plugin import (
    Adaptive,
    Exact,
    FixedGrid,
    FlowOutput,
    Hutchinson,
    MultiscaleFlow,
    RegularizedCNF,
    TableFlow,
)
from rnode_plugin.errors import ConfigError, SolverError
from rnode_plugin.plugins.registry import resolve_regularizers
from rnode_plugin.regularizers import kinetic
from rnode_plugin.solvers import GRADIENTS

QUICK = FixedGrid("rk4_38", step=0.5)


@pytest.mark.parametrize("name", MODELS)
def test_latents_and_their_density(name: str) -> None:
    model, x, given = make(name)
    output = model.encode(x, **given)

    def latents(x: Tensor) -> Tensor:
        return model.encode(x, **given, penalties=False).z.flatten(1).sum(0)

    jacobian: Any = torch.autograd.functional.jacobian(latents, x)  # (D, B, *event): samples do not mix
    exact = torch.linalg.slogdet(jacobian.flatten(2).transpose(0, 1)).logabsdet
    assert float(exact.abs().min()) > 0.01
    torch.testing.assert_close(output.logdet, exact, rtol=1e-6, atol=1e-6)
    log_prob = model.base.log_prob(output.z) + exact
    torch.testing.assert_close(model.log_prob(x, **given), log_prob, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.log_prob_of(output), log_prob, rtol=1e-6, atol=1e-6)
    z = output.z
    assert output.x is x
    assert z.shape == (3, *model.base.event_shape)
    torch.testing.assert_close(model.inverse(z, **given), x, rtol=1e-6, atol=1e-6)
    back, of_back = model.inverse_and_log_prob(z, **given)
    torch.testing.assert_close((back, of_back), (x, log_prob), rtol=1e-6, atol=1e-6)
    encoded, decoded = model.encode(x, **given, penalties=True), model.decode(z, **given, penalties=True)
    assert decoded.z is z
    torch.testing.assert_close(decoded.x, x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(model.log_prob_of(decoded), log_prob, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(decoded.logdet, encoded.logdet, rtol=1e-6, atol=1e-6)  # of one map, from x to z
    torch.testing.assert_close(decoded.regularization, encoded.regularization, rtol=1e-4, atol=1e-6)
    if given:  # one context for all counts for each sample, and matters
        one = given["context"][0]
        torch.testing.assert_close(model.log_prob(x, context=one), model.log_prob(x, context=one.expand(3, 2)))
        assert not torch.allclose(model.log_prob(x, context=one + 1), model.log_prob(x, context=one))


@pytest.mark.parametrize("name", MODELS)
def test_penalties_are_followed_if_asked_for_or_in_training(name: str) -> None:
    model, x, given = make(name, QUICK)
    names = {each.name for each in model.regularizers}
    assert names == {"kinetic", "jacfrob"}
    for carry in (model.encode, model.decode):
        start = x if carry == model.encode else model.encode(x, **given).z.detach()
        for training, gradients in ((True, True), (True, False), (False, True)):
            model.train(training)
            with torch.set_grad_enabled(gradients):
                found = [set(carry(start, **given, penalties=each).regularization) for each in (None, True, False)]
            assert found == [names if training and gradients else set(), names, set()]
        for value in carry(start, **given, penalties=True).regularization.values():
            assert value.shape == (3,)


@pytest.mark.parametrize("name", MODELS)
def test_the_solver_of_a_call(name: str) -> None:
    model, x, given = make(name)
    euler = FixedGrid("euler", step=0.25)
    twin, z = model.solved_with(solver=euler), model.encode(x, **given).z
    for one, other in (
        (model.encode(x, **given, solver=euler), twin.encode(x, **given)),
        (model.decode(z, **given, solver=euler), twin.decode(z, **given)),
    ):
        for each in ("x", "z", "logdet"):
            torch.testing.assert_close(getattr(one, each), getattr(other, each), rtol=1e-12, atol=1e-12)
        assert one.nfe == 4 * len(model.block_shapes)
    torch.testing.assert_close(
        model.inverse(z, **given, solver=euler), twin.inverse(z, **given), rtol=1e-12, atol=0
    )
    assert model.solver is ACCURATE
    assert not torch.allclose(model.encode(x, **given, solver=euler).z, z)


@pytest.mark.parametrize("name", MODELS)
def test_a_density_takes_trace_and_training_as_its_solver_says(name: str) -> None:
    model, x, given = make(name, dataclasses.replace(QUICK, quadrature="sampled"))
    full = model.encode(x, **given, solver=QUICK)
    close: dict[str, Any] = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(model.log_prob(x, **given), model.log_prob_of(full), **close)
    _, found = model.inverse_and_log_prob(full.z, **given)
    torch.testing.assert_close(found, model.log_prob_of(model.decode(full.z, **given, solver=QUICK)), **close)
    sampled = model.encode(x, **given)
    assert not torch.allclose(sampled.logdet, full.logdet)
    torch.testing.assert_close(sampled.z, full.z)


@pytest.mark.parametrize("name", MODELS)
def test_a_failed_solve_raises_at_once_or_with_its_health(name: str) -> None:
    model, x, given = make(name, QUICK)
    z = model.encode(x, **given).z.detach()
    for parameter in model.parameters():
        nn.init.constant_(parameter, math.nan)
    for carry, start in ((model.encode, x), (model.decode, z)):
        with pytest.raises(SolverError):
            carry(start, **given)
        output = carry(start, **given, check=False)
        with pytest.raises(SolverError):
            output.check()


@pytest.mark.parametrize("name", MODELS)
def test_evaluations_of_the_last_solve(name: str) -> None:
    model, x, given = make(name, QUICK)
    nfe = 8 * len(model.block_shapes)
    assert model.encode(x, **given).nfe == model.nfe == nfe
    model.sample(2, **{key: value[:2] for key, value in given.items()})
    assert model.nfe == nfe
    output = model.encode(x, **given, solver=FixedGrid("euler", step=0.5))
    assert output.nfe == model.nfe == nfe // 4
    called = model(x, **given)  # what DistributedDataParallel and functional_call call
    assert isinstance(called, FlowOutput)
    torch.testing.assert_close(model.log_prob_of(called), model.log_prob(x, **given))


@pytest.mark.parametrize("name", MODELS)
def test_latents_are_drawn_from_the_base(name: str) -> None:
    model, _, given = make(name, QUICK)
    one = {key: value[0] for key, value in given.items()}
    torch.manual_seed(1)
    x = model.sample(40, **one)
    torch.manual_seed(1)
    z = model.base.sample(torch.Size([40]))
    torch.testing.assert_close(x, model.in_range(model.inverse(z, **one)))


@pytest.mark.parametrize("name", MODELS)
def test_the_base_has_whole_samples_and_follows_the_model(name: str) -> None:
    model, x, given = make(name, QUICK)
    assert model.base.batch_shape == ()
    z, before = model.encode(x, **given).z.detach(), model.log_prob(x, **given)
    wanted = model.base.log_prob(z)
    model.float()
    single = {key: value.float() for key, value in given.items()}
    found = model.base.log_prob(z.float())
    assert found.dtype is model.base.sample().dtype is torch.float32
    torch.testing.assert_close(found, wanted.float())
    torch.testing.assert_close(model.log_prob(x.float(), **single), before.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("estimator", [Exact(), Hutchinson("rademacher"), Hutchinson("gaussian", count=2)], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_noise_has_an_entry_for_each_block_and_repeats_a_value(name: str, estimator: Any) -> None:
    model, x, given = make(name, QUICK)
    model = model.solved_with(trace_estimator=estimator)
    noise = model.draw_noise(3)
    assert len(noise) == len(model.block_shapes)
    for each, shape in zip(noise, model.block_shapes, strict=True):
        if isinstance(estimator, Exact):
            assert each is None
        else:
            assert each is not None
            assert each.shape == (*[2][: estimator.count - 1], 3, *shape)
    first, second = (model.log_prob(x, **given, noise=noise) for _ in range(2))
    assert torch.equal(first, second)
    z = model.encode(x, **given).z.detach()
    first, second = (model.decode(z, **given, noise=noise).logdet for _ in range(2))
    assert torch.equal(first, second)
    if not isinstance(estimator, Exact):
        other = model.log_prob(x, **given, noise=model.draw_noise(3))
        assert not torch.equal(other, model.log_prob(x, **given, noise=noise))


@pytest.mark.parametrize("name", MODELS)
def test_arguments_that_do_not_fit_are_refused(name: str) -> None:
    model, x, given = make(name, QUICK)
    z = model.encode(x, **given).z.detach()
    wrong = torch.zeros(3, 5, dtype=torch.float64)
    noises: list[Any] = [[wrong], [], [None] * 9]
    others: list[Any] = [{"context": wrong}, {} if given else {"context": wrong[:, :2]}]
    for carry, start in ((model.encode, x), (model.decode, z)):
        starts: list[Any] = [start[..., :1], start[0], start.long(), start.tolist()]
        for each, options in (
            *((each, given) for each in starts),
            *((start, {**given, "noise": noise}) for noise in noises),
            *((start, other) for other in others),
        ):
            with pytest.raises(ConfigError):
                carry(each, **options)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "model of a third party"])
def test_a_name_is_a_solver_with_its_defaults(name: str) -> None:
    model, x, given = make(name, QUICK)
    z = model.encode(x, **given).z.detach()
    grid = FixedGrid(step=None if name.startswith("cnf") else 0.25)
    for act in (
        lambda solver: model.solved_with(solver=solver).encode(x, **given).z,
        lambda solver: model.encode(x, **given, solver=solver).z,
        lambda solver: model.decode(z, **given, solver=solver).x,
        lambda solver: model.inverse(z, **given, solver=solver),
    ):
        assert torch.equal(act("rk4_38"), act(grid))
        assert torch.equal(act("dopri5"), act(Adaptive()))
        with pytest.raises(ConfigError, match="NeuralODE"):
            act(RungeKutta4())


@pytest.mark.parametrize("name", MODELS)
def test_other_penalties_belong_to_the_model(name: str) -> None:
    model, x, given = make(name, QUICK)
    penalty = weighed()
    weight = penalty.of.weight  # pyright: ignore[reportFunctionMemberAccess]
    model.keep_regularizers(resolve_regularizers([penalty]))
    assert any(each is weight for each in model.parameters())
    twin = model.solved_with(regularizers=[penalty])
    for carry, start in ((twin.encode, x), (twin.decode, model.encode(x, **given).z.detach())):
        (found,) = carry(start, **given, penalties=True).regularization.values()
        (gradient,) = torch.autograd.grad(found.sum(), weight)
        torch.testing.assert_close(gradient * weight, found.sum())  # the penalty is linear in it


@pytest.mark.parametrize("name", MODELS)
def test_a_copy_takes_its_regularizers_in_every_form(name: str) -> None:
    model, _, _ = make(name, QUICK)
    model.keep_regularizers(resolve_regularizers({"kinetic": 0.3}))
    for one in (kinetic, [kinetic], iter([kinetic])):
        assert model.solved_with(regularizers=one).regularizers.strengths == {"kinetic": 0.3}
    assert model.solved_with(regularizers={kinetic: 0.5}).regularizers.strengths == {"kinetic": 0.5}
    if name == "model of a third party":  # which has no registry
        with pytest.raises(ConfigError, match="regularizer"):
            model.solved_with(regularizers="kinetic")
        return
    for names in ("kinetic", ["kinetic"]):
        assert model.solved_with(regularizers=names).regularizers.strengths == {"kinetic": 0.3}


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("image flow")])
def test_samples_of_the_distribution_are_in_the_models_range(name: str) -> None:
    model, _, _ = make(name, QUICK)
    torch.manual_seed(0)
    found = model.distribution().sample((200,))
    assert (float(found.min()), bool(found.max() <= 1)) == (0.0, True)  # some lay below, in the margin of the logit
    torch.manual_seed(0)
    assert torch.equal(found, model.sample(200))


@pytest.mark.parametrize("name", MODELS)
def test_a_warm_start_belongs_to_a_block_and_a_direction(name: str) -> None:
    model, x, given = make(name)
    warm = model.solved_with(warm_start=True)
    cold, first, again = (each.encode(x, **given) for each in (model, warm, warm))
    assert torch.equal(first.z, cold.z)  # nothing is known yet
    assert again.nfe < cold.nfe == first.nfe
    torch.testing.assert_close(model.log_prob_of(again), model.log_prob_of(cold), rtol=1e-6, atol=1e-6)
    assert model.history.longest_safe_steps is None
    assert warm.history.longest_safe_steps is not None
    steps = warm.history.longest_safe_steps
    ways = [set(each) for each in steps.values()]
    assert ways == [{"forward"}] * len(model.block_shapes)
    if len(ways) == 1:  # to the bit a solve by a solver with this first step
        solver = dataclasses.replace(ACCURATE, first_step=0.9 * steps[0]["forward"])
        expected = model.encode(x, **given, solver=solver)
        assert torch.equal(warm.encode(x, **given).z, expected.z)
    forward = [each["forward"] for each in steps.values()]
    warm.inverse(cold.z.detach(), **given)
    assert [set(each) for each in steps.values()] == [{"forward", "backward"}] * len(ways)
    assert [each["forward"] for each in steps.values()] == forward
    known = copy.deepcopy(warm.history.longest_safe_steps)
    for copied in (how(warm) for how in COPIES.values()):
        assert copied.history.longest_safe_steps == known
        copied.encode(x / 2, **given)
        assert copied.history.longest_safe_steps != known
        assert warm.history.longest_safe_steps == known
        assert warm.state_dict().keys() == copied.state_dict().keys() == model.state_dict().keys()
    assert warm.solved_with().history.longest_safe_steps is None
    assert warm.solved_with(warm_start=True).history.longest_safe_steps == {}
    warm.history.longest_safe_steps.clear()
    assert torch.equal(warm.encode(x, **given).z, cold.z)


def test_a_constructor_takes_a_warm_start() -> None:
    cnf = RegularizedCNF(nn.Linear(2, 2), event_shape=2, warm_start=True)
    models = (cnf, TableFlow(2, hidden=2, warm_start=True), MultiscaleFlow((1, 4, 4), hidden=2, warm_start=True))
    assert [each.history.longest_safe_steps for each in models] == [{}, {}, {}]


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_autograd_in_every_mode(name: str) -> None:
    found = []
    for mode in GRADIENTS:
        model, x, given = make(name, dataclasses.replace(ACCURATE, gradient=mode))
        variables = [x, *given.values(), *model.parameters()]
        for variable in variables:
            variable.requires_grad_()
        loss = model.log_prob(x, **given).sum()
        gradients = torch.autograd.grad(loss, variables, allow_unused=True)
        found.append([torch.zeros(()) if g is None else g for g in gradients])
        close = 1e-10 if mode == "checkpointed" else 1e-4
        torch.testing.assert_close(found[-1], found[0], rtol=close, atol=close, check_dtype=False)


@pytest.mark.parametrize("name", MODELS)
def test_another_solver_shares_the_parameters(name: str) -> None:
    model, x, given = make(name)
    other = model.solved_with(solver=FixedGrid("euler", step=0.5), trace_estimator="rademacher:2")
    assert repr(other.estimator) == repr(Hutchinson("rademacher", count=2))
    before, blocks = model.log_prob(x, **given), len(model.block_shapes)
    assert other.encode(x, **given).nfe == 2 * blocks
    with torch.no_grad():
        next(other.parameters()).mul_(2)
    assert not torch.allclose(model.log_prob(x, **given), before)
    assert model.solver is ACCURATE


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", MODELS)
def test_copies_are_independent(name: str, how: str) -> None:
    model, x, given = make(name, FixedGrid("rk4_38", step=0.5))
    before = model.log_prob(x, **given).detach()
    twin = COPIES[how](model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(twin.log_prob(x, **given), before)
    assert not torch.equal(model.log_prob(x, **given), before)
