"""Fits: the closed form, the paper's gradient descent, resuming, several workers."""

import copy
import datetime
import socket
import threading

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from sources import ArraySource, mean_purity, mixed_concepts, rectified_maps
from torch import nn

from epic_ray.method import solvers
from epic_ray.method.basis import orthogonality_error, polar_factor, random_basis
from epic_ray.method.schedule import prototypes_per_round
from epic_ray.method.solvers import (
    FitState,
    NonFiniteError,
    SingleProcess,
    equal_weights,
    fit_adam,
    fit_procrustes,
    pair_order,
    rank_weights,
)

ALONE = SingleProcess()
ADAM = {"seed": 7, "batch_size": 16}


def fit(solver, maps, schedule, start=None, state=None, **options):
    """The final state, and (state, record) of every round."""
    rounds = []
    state = state or FitState.begin(torch.eye(maps.shape[2]) if start is None else start)
    end = solver(
        ArraySource(maps), state, schedule, ALONE, lambda s, r: rounds.append((copy.deepcopy(s), r)), **options
    )
    return end, rounds


# The closed form


class FixedPrototypes(ArraySource):
    """A source whose prototypes stay those of the first search."""

    top = None

    def search(self, basis, n):
        """The first answer, again."""
        self.top = self.top or super().search(basis, n)
        return self.top


weightings = st.sampled_from([equal_weights, rank_weights])


@given(seed=st.integers(0, 2**31), n=st.integers(1, 20), d=st.integers(2, 8), signed=st.booleans(), weigh=weightings)
@settings(deadline=None, max_examples=40)
def test_for_fixed_prototypes_a_round_never_lowers_the_purity_it_started_from(seed, n, d, signed, weigh):
    maps = torch.randn(30, 4, d, generator=torch.Generator().manual_seed(seed))
    maps = maps if signed else maps.relu()
    records = []
    state = FitState.begin(random_basis(d, seed))
    start = state.basis
    state = fit_procrustes(FixedPrototypes(maps), state, [n] * 4, ALONE, lambda s, r: records.append(r), weigh)
    assert all(record.purity_end >= record.purity_start - 1e-6 for record in records)
    # the cells are found anew for each update: they change the objective, never a fixed-cell step
    assert records[0].purity_start == pytest.approx(mean_purity(maps, start, n, weigh(n)), abs=1e-5)
    assert orthogonality_error(state.basis) < 1e-6


def test_concepts_mixed_by_a_rotation_are_separated():
    maps, rotation = mixed_concepts()
    before = mean_purity(maps, torch.eye(8), 20)
    state, rounds = fit(fit_procrustes, maps, prototypes_per_round(100, 20, 10, "linear", exact_end=True))
    assert before < 0.95
    assert mean_purity(maps, state.basis, 20) > 0.99
    assert ((state.basis @ rotation.T).max(dim=1).values > 0.99).all()
    assert [record.prototypes_per_channel for _, record in rounds][-1] == 20


def test_images_without_any_activation_leave_the_basis_where_it_was():
    start = random_basis(5, seed=1)
    state, rounds = fit(fit_procrustes, torch.zeros(10, 4, 5), [3, 3], start)
    torch.testing.assert_close(state.basis, start, rtol=0, atol=1e-6)
    assert rounds[0][1].purity_end == 0


def test_a_round_is_the_polar_factor_of_the_peaks_weighted_by_rank():
    maps = rectified_maps()
    state, _ = fit(fit_procrustes, maps, [7], weigh=rank_weights)
    directions = torch.zeros(6, 6, dtype=torch.float64)
    for channel in range(6):
        strongest = maps[:, :, channel].sum(dim=1).argsort(descending=True, stable=True)[:7]
        peaks = [maps[image, maps[image, :, channel].argmax()].double() for image in strongest]
        weighted = [peak / peak.norm() / rank**0.5 for rank, peak in enumerate(peaks, start=1)]
        directions[channel] = sum(weighted) / sum(rank**-0.5 for rank in range(1, 8))
    expected = polar_factor(directions + 1e-3 * torch.eye(6))
    torch.testing.assert_close(state.basis, expected.float(), rtol=0, atol=1e-5)


def test_the_scale_of_the_weights_is_nothing():
    maps = rectified_maps()
    once, _ = fit(fit_procrustes, maps, [12, 6], weigh=rank_weights)
    tenfold, _ = fit(fit_procrustes, maps, [12, 6], weigh=lambda n: 10 * rank_weights(n))
    torch.testing.assert_close(once.basis, tenfold.basis, rtol=0, atol=1e-6)


def test_more_prototypes_than_images_uses_every_image_once():
    maps = rectified_maps(n=4)
    state, rounds = fit(fit_procrustes, maps, [9])
    expected, _ = fit(fit_procrustes, maps, [4])
    assert torch.equal(state.basis, expected.basis)
    assert rounds[0][1].images == 4


def test_a_round_reports_what_it_did():
    maps = rectified_maps()
    state, rounds = fit(fit_procrustes, maps, [12, 6])
    first, second = (record for _, record in rounds)
    assert (first.round, second.round, state.round) == (0, 1, 2)
    assert (first.prototypes_per_channel, second.prototypes_per_channel) == (12, 6)
    assert 6 <= second.images <= 36
    assert first.purity_end > first.purity_start
    assert first.loss is None
    assert 0 < first.moved < 1


# The paper's gradient descent


def naive_adam(maps, schedule, seed, weight_decay, epochs=2, batch_size=16):
    """The paper's loop written out pair by pair, with Adam by hand; S after every step, U at the end."""
    d = maps.shape[2]
    parameter, mean, square, step, history = torch.zeros(d, d), torch.zeros(d, d), torch.zeros(d, d), 0, []
    for number, n in enumerate(schedule):
        basis = torch.linalg.matrix_exp(parameter - parameter.T)
        sums = torch.einsum("kd,nsd->nk", basis, maps)
        pairs = [(i, k) for k in range(d) for i in sums[:, k].argsort(descending=True, stable=True)[:n].tolist()]
        for epoch in range(epochs):
            order = pair_order(len(pairs), seed, number, epoch).tolist()
            for first in range(0, len(order), batch_size):
                batch = [pairs[i] for i in order[first : first + batch_size]]
                leaf = parameter.clone().requires_grad_()
                basis = torch.linalg.matrix_exp(leaf - leaf.T)
                loss = 0.0
                for image, channel in batch:
                    rotated = maps[image] @ basis.T
                    cell = rotated[rotated[:, channel].argmax()]
                    loss = loss - cell[channel] / cell.norm().clamp(min=1e-8) / len(batch)
                (gradient,) = torch.autograd.grad(loss, leaf)
                step += 1
                gradient = gradient + weight_decay * parameter
                mean = 0.9 * mean + 0.1 * gradient
                square = 0.999 * square + 0.001 * gradient**2
                corrected = (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
                parameter = parameter - 1e-3 * corrected
                history.append(parameter)
    return history, torch.linalg.matrix_exp(parameter - parameter.T)


@pytest.mark.parametrize("weight_decay", [1e-5, 0.5])
def test_adam_follows_the_papers_loop_step_by_step(monkeypatch, weight_decay):
    # No rectified cell here is near a tie, so that rounding does not choose another peak.
    maps, _ = mixed_concepts(n=40, s=4, d=5)
    schedule = prototypes_per_round(20, 5, 5, "linear", exact_end=False)
    history, expected = naive_adam(maps, schedule, ADAM["seed"], weight_decay)
    steps, update = [], torch.optim.Adam.step

    def recorded(self, *args, **kwargs):
        update(self, *args, **kwargs)
        steps.append(self.param_groups[0]["params"][0].detach().clone())

    monkeypatch.setattr(torch.optim.Adam, "step", recorded)
    options = {} if weight_decay == 1e-5 else {"weight_decay": weight_decay}
    state, rounds = fit(fit_adam, maps, schedule, **ADAM, **options)
    assert len(steps) == len(history) == sum(record.steps for _, record in rounds)
    for number, (ours, naive) in enumerate(zip(steps, history, strict=True)):
        torch.testing.assert_close(ours, naive, rtol=0, atol=1e-4, msg=f"step {number}")
    torch.testing.assert_close(state.basis, expected, rtol=0, atol=1e-4)


def test_every_epoch_of_every_round_takes_all_pairs_in_an_order_of_its_own():
    orders = {tuple(pair_order(50, *key).tolist()) for key in [(0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0), (0, 1, 1)]}
    assert len(orders) == 5
    assert all(sorted(order) == list(range(50)) for order in orders)


def test_adam_raises_the_purity_and_reports_it():
    maps, _ = mixed_concepts(n=60)
    state, rounds = fit(fit_adam, maps, [20] * 4, learning_rate=1e-2, **ADAM)
    first, last = rounds[0][1], rounds[-1][1]
    assert first.purity_start == pytest.approx(mean_purity(maps, torch.eye(8), 20), abs=1e-5)
    assert last.purity_end > first.purity_start + 0.05
    assert -last.loss == pytest.approx(last.purity_end, abs=0.05)
    assert orthogonality_error(state.basis) < 1e-6


def test_adam_with_a_start_of_determinant_minus_one_begins_there():
    start = torch.diag(torch.tensor([-1.0, 1, 1, 1, 1, 1]))
    state, _ = fit(fit_adam, rectified_maps(), [5], start, learning_rate=0.0, **ADAM)
    assert torch.equal(state.basis, start)


# Both


@pytest.mark.parametrize(("solver", "options"), [(fit_procrustes, {}), (fit_adam, ADAM)])
@pytest.mark.parametrize("done", [1, 2])
def test_a_fit_resumed_after_any_round_equals_an_undisturbed_one(solver, options, done):
    maps, schedule = rectified_maps(), [12, 8, 4]
    undisturbed, rounds = fit(solver, maps, schedule, **options)
    resumed, again = fit(solver, maps, schedule, state=rounds[done - 1][0], **options)
    assert torch.equal(resumed.basis, undisturbed.basis)
    assert [record for _, record in again] == [record for _, record in rounds[done:]]
    finished, none_left = fit(solver, maps, schedule, state=undisturbed, **options)
    assert torch.equal(finished.basis, undisturbed.basis)
    assert none_left == []


@pytest.mark.parametrize(("solver", "options"), [(fit_procrustes, {}), (fit_adam, ADAM)])
def test_the_state_of_a_round_survives_saving(solver, options, tmp_path):
    maps, schedule = rectified_maps(), [12, 8]
    undisturbed, rounds = fit(solver, maps, schedule, **options)
    torch.save(vars(rounds[0][0]), tmp_path / "state.pt")
    state = FitState(**torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(fit(solver, maps, schedule, state=state, **options)[0].basis, undisturbed.basis)


@pytest.mark.parametrize(("solver", "options"), [(fit_procrustes, {}), (fit_adam, ADAM)])
def test_a_map_that_is_not_finite_stops_the_fit_and_names_the_round(solver, options):
    class Poisoned(ArraySource):
        def search(self, basis, n):
            if n == 4:
                self.maps = torch.full_like(self.maps, torch.inf)
            return super().search(basis, n)

    state = FitState.begin(torch.eye(6))
    with pytest.raises(NonFiniteError, match="round 1, step 0"):
        solver(Poisoned(rectified_maps()), state, [8, 4], ALONE, lambda s, r: None, **options)


class Together:
    """The reducer of two threads of this process: adds in the order of ranks."""

    def __init__(self, rank, world, shared):
        self.rank, self.world, self.shared = rank, world, shared

    def _exchange(self, tensor):
        self.shared["parts"][self.rank] = tensor.clone()
        self.shared["barrier"].wait(timeout=30)
        parts = [self.shared["parts"][rank] for rank in range(self.world)]
        self.shared["barrier"].wait(timeout=30)
        return parts

    def sum_(self, tensor):
        """The sum over ranks."""
        tensor.copy_(torch.stack(self._exchange(tensor)).sum(dim=0))

    def broadcast_(self, tensor):
        """That of rank 0."""
        tensor.copy_(self._exchange(tensor)[0])


def test_three_workers_with_a_third_of_the_images_each_fit_the_same_basis():
    maps, schedule, world = rectified_maps(), [12, 8, 4], 3
    shared, ends = {"parts": {}, "barrier": threading.Barrier(world)}, {}

    def work(rank):
        source = ArraySource(maps, rank=rank, world=world)
        state = FitState.begin(torch.eye(6))
        ends[rank] = fit_procrustes(source, state, schedule, Together(rank, world, shared), lambda s, r: None)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    expected, _ = fit(fit_procrustes, maps, schedule)
    for rank in range(world):
        assert torch.equal(ends[rank].basis, ends[0].basis)
        torch.testing.assert_close(ends[rank].basis, expected.basis, rtol=0, atol=1e-5)


def ddp_worker(rank, port, maps, schedule, folder):
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=False, timeout=datetime.timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    reducer = solvers.DistributedReducer()
    source = ArraySource(maps, rank=rank, world=2)
    records = []
    state = fit_adam(
        source,
        FitState.begin(torch.eye(6)),
        schedule,
        reducer,
        lambda s, r: records.append(r),
        wrap=nn.parallel.DistributedDataParallel,
        **ADAM,
    )
    closed = fit_procrustes(source, FitState.begin(torch.eye(6)), schedule, reducer, lambda s, r: None)
    torch.save((state.parameter, closed.basis, [vars(r) for r in records]), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_under_ddp_fit_what_one_process_fits(tmp_path):
    # 6 channels x 11 = 66 pairs in batches of 16 and a last one of 2; 6 x 5 = 30; 6 x 11 = 66 again
    maps, _ = mixed_concepts(n=40, s=4, d=6)
    schedule = [11, 5]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    master = dist.TCPStore("127.0.0.1", port, 2, is_master=True, wait_for_workers=False)
    mp.spawn(ddp_worker, args=(port, maps, schedule, tmp_path), nprocs=2)
    assert master is not None
    expected, rounds = fit(fit_adam, maps, schedule, **ADAM)
    closed, _ = fit(fit_procrustes, maps, schedule)
    (s0, u0, records0), (s1, u1, records1) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(s0, s1)
    assert torch.equal(u0, u1)
    assert records0 == records1
    torch.testing.assert_close(s0, expected.parameter, rtol=0, atol=1e-5)
    torch.testing.assert_close(u0, closed.basis, rtol=0, atol=1e-5)
    for record, (_, alone) in zip(records0, rounds, strict=True):
        assert record["loss"] == pytest.approx(alone.loss, abs=1e-5)
        assert record["purity_end"] == pytest.approx(alone.purity_end, abs=1e-5)


def test_several_workers_without_averaged_gradients_are_refused():
    reducer = Together(0, 2, {})
    with pytest.raises(ValueError, match="wrap"):
        fit_adam(ArraySource(rectified_maps()), FitState.begin(torch.eye(6)), [4], reducer, lambda s, r: None, seed=0)


def test_the_closed_form_beats_a_random_step_of_the_same_size():
    maps = rectified_maps(n=200, d=12)
    state, _ = fit(fit_procrustes, maps, [20])
    random = polar_factor(torch.eye(12) + 0.1 * torch.randn(12, 12, generator=torch.Generator().manual_seed(0)))
    assert mean_purity(maps, state.basis, 20) > mean_purity(maps, random, 20)
