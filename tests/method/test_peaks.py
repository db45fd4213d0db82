"""Peak cells and purity."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epic_ray.method.basis import orthogonal_from_skew, random_basis
from epic_ray.method.peaks import find_peaks, find_peaks_grouped, heat_maps, unit_peak_vectors

seeds = st.integers(0, 2**31)
signs = st.sampled_from([+1, -1])


def cells(p, s, d, seed=0, dtype=torch.float64):
    return torch.randn(p, s, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def naive_peak(cells_SD, channel, basis, sign):
    """The definition, cell by cell, with the norm of the rotated cell as in the paper."""
    rotated = [basis @ cell for cell in cells_SD]
    activations = [sign * float(cell[channel]) for cell in rotated]
    peak = activations.index(max(activations))
    norm = float(rotated[peak].norm())
    return peak, activations[peak] / norm if norm > 0 else 0.0, float(rotated[peak][channel])


@given(seed=seeds, d=st.integers(1, 8), s=st.integers(1, 9), sign=signs)
@settings(deadline=None)
def test_peaks_follow_the_definition(seed, d, s, sign):
    maps, basis = cells(4, s, d, seed), random_basis(d, seed).double()
    slots = torch.randint(0, 4, (10,), generator=torch.Generator().manual_seed(seed))
    channels = torch.randint(0, d, (10,), generator=torch.Generator().manual_seed(seed + 1))
    grouped = find_peaks_grouped(maps, slots, channels, basis, sign)
    single = find_peaks(maps[slots], channels, basis, sign)
    for i, (slot, channel) in enumerate(zip(slots.tolist(), channels.tolist(), strict=True)):
        cell, purity, value = naive_peak(maps[slot], channel, basis, sign)
        for peaks in (grouped, single):
            assert int(peaks.cells[i]) == cell
            assert float(peaks.purity[i]) == pytest.approx(purity, abs=1e-6)
            assert float(peaks.value[i]) == pytest.approx(value, abs=1e-6)


@given(seed=seeds, scale=st.floats(1e-6, 1e6), sign=signs)
@settings(deadline=None)
def test_purity_ignores_the_scale_of_the_features_and_stays_in_range(seed, scale, sign):
    maps, channels, basis = cells(6, 5, 4, seed, torch.float32), torch.arange(6) % 4, random_basis(4, seed)
    peaks, scaled = (find_peaks(factor * maps, channels, basis, sign) for factor in (1.0, scale))
    torch.testing.assert_close(peaks.purity, scaled.purity, rtol=0, atol=1e-5)
    assert (peaks.purity.abs() <= 1).all()


@given(seed=seeds, d=st.integers(1, 8), s=st.integers(1, 9))
@settings(deadline=None)
def test_a_heat_map_has_the_channel_at_every_cell_and_is_largest_at_its_peak(seed, d, s):
    maps, basis = cells(4, s, d, seed), random_basis(d, seed).double()
    slots = torch.randint(0, 4, (10,), generator=torch.Generator().manual_seed(seed))
    channels = torch.randint(0, d, (10,), generator=torch.Generator().manual_seed(seed + 1))
    heat = heat_maps(maps, slots, channels, basis)
    for row, (slot, channel) in enumerate(zip(slots.tolist(), channels.tolist(), strict=True)):
        expected = torch.stack([(basis @ cell)[channel] for cell in maps[slot]])
        torch.testing.assert_close(heat[row], expected)
    assert (heat.argmax(dim=1) == find_peaks_grouped(maps, slots, channels, basis).cells).all()


def test_a_one_hot_cell_is_pure():
    maps = torch.zeros(1, 4, 3)
    maps[0, 2, 1] = 7.0
    peaks = find_peaks(maps, torch.tensor([1]), torch.eye(3))
    assert (peaks.cells.item(), peaks.purity.item(), peaks.value.item()) == (2, 1.0, 7.0)


def test_an_all_zero_map_has_purity_zero_and_no_direction():
    maps, channels, slots = torch.zeros(2, 4, 3), torch.tensor([0, 2]), torch.tensor([0, 1])
    for peaks in (find_peaks(maps, channels, torch.eye(3)), find_peaks_grouped(maps, slots, channels, torch.eye(3))):
        assert peaks.purity.tolist() == [0, 0]
        assert peaks.cells.tolist() == [0, 0]
        assert unit_peak_vectors(maps, slots, peaks).abs().sum() == 0


@pytest.mark.parametrize("sign", [+1, -1])
def test_equal_cells_give_the_first(sign):
    maps = torch.ones(1, 6, 2)
    maps[0, 0] = -sign
    for peaks in (
        find_peaks(maps * 1.0, torch.tensor([0]), torch.eye(2), sign),
        find_peaks_grouped(maps, torch.tensor([0]), torch.tensor([0]), torch.eye(2), sign),
    ):
        assert peaks.cells.item() == (1 if sign > 0 else 0)


def test_the_negative_side_looks_at_the_lowest_cell_and_keeps_the_sign_of_the_value():
    maps = torch.tensor([[[3.0, 4.0], [-3.0, 4.0], [0.0, 1.0]]])
    peaks = find_peaks(maps, torch.tensor([0]), torch.eye(2), sign=-1)
    assert (peaks.cells.item(), peaks.value.item()) == (1, -3.0)
    assert peaks.purity.item() == pytest.approx(0.6)


def test_unit_peak_vectors_are_the_unrotated_cells_at_length_one():
    maps, basis = cells(3, 5, 4, dtype=torch.float32), random_basis(4, seed=0)
    slots, channels = torch.tensor([2, 0, 2]), torch.tensor([1, 1, 3])
    peaks = find_peaks_grouped(maps, slots, channels, basis)
    units = unit_peak_vectors(maps, slots, peaks)
    torch.testing.assert_close(units.norm(dim=1), torch.ones(3))
    torch.testing.assert_close((units * basis[channels]).sum(dim=1), peaks.purity)


def test_no_pairs_no_peaks():
    nothing = torch.zeros(0, dtype=torch.int64)
    peaks = find_peaks_grouped(torch.zeros(2, 3, 4), nothing, nothing, torch.eye(4))
    assert len(peaks.cells) == len(peaks.purity) == len(peaks.value) == 0


def test_nan_in_a_map_is_not_hidden_as_purity_zero():
    maps = torch.ones(1, 3, 2)
    maps[0, 1, 0] = torch.nan
    peaks = find_peaks_grouped(maps, torch.tensor([0]), torch.tensor([0]), torch.eye(2))
    assert peaks.purity.isnan().all()


def test_the_gradient_of_purity_in_the_basis_agrees_with_finite_differences():
    maps, channels, start = cells(5, 4, 3), torch.tensor([0, 1, 2, 0, 1]), torch.eye(3, dtype=torch.float64)
    parameter = 0.2 * torch.randn(3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def mean_purity(parameter):
        return find_peaks(maps, channels, orthogonal_from_skew(parameter, start)).purity.mean()

    assert torch.autograd.gradcheck(mean_purity, parameter.requires_grad_())


def test_a_wrong_sign_is_refused():
    with pytest.raises(ValueError, match="sign"):
        find_peaks(torch.ones(1, 1, 2), torch.tensor([0]), torch.eye(2), sign=2)
