"""Windows over a latent: they cover it, their weights add up to one, and what is denoised through them is what is denoised whole."""

import pytest
import torch
from torch.nn.functional import conv2d, pad

from latentgen.diffusion.guide import masked
from latentgen.diffusion.level import RectifiedFlow
from latentgen.diffusion.tiles import COLUMNS, ROWS, Grid, Span, Window, spans, turned

FLOW = RectifiedFlow()
LEVEL = FLOW.at(0.5)
DICE = torch.Generator().manual_seed(0)
X = torch.randn(2, 3, 20, 26, generator=DICE)
KERNEL = torch.randn(3, 3, 3, 3, generator=DICE) / 5
GRIDS = [Grid(20, 26, 8, 2), Grid(20, 26, 16, 12), Grid(20, 26, 8, 4, (ROWS,)),
         Grid(20, 26, 9, 3, (COLUMNS,)), Grid(20, 26, 8, 3, (ROWS, COLUMNS)), Grid(20, 26, 20, 10, (COLUMNS,))]


def pointwise(x, level):
    return torch.tanh(3 * x) * level.alpha


@pytest.mark.parametrize(("size", "tile", "overlap", "scale"), [(40, 16, 4, 1), (41, 16, 8, 8), (17, 16, 4, 2), (100, 16, 15, 3),
                                                              (33, 8, 0, 4), (17, 16, 8, 1), (9, 9, 3, 2), (50, 1, 0, 1)])
@pytest.mark.parametrize("wrap", [False, True])
def test_weights_add_up_to_one_everywhere(size, tile, overlap, scale, wrap):
    total, made = torch.zeros(size * scale), list(spans(size, tile, overlap, scale=scale, wrap=wrap))
    for span, weights in made:
        assert span.length == tile and weights.shape == (tile * scale,) and bool((weights >= 0).all())
        for there, own in Span(span.start * scale, span.length * scale).pieces(size * scale):
            total[there] += weights[own]
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-6)
    ends = [span.start + span.length for span, _ in made]
    assert all(after.start <= end - overlap for (after, _), end in zip(made[1:], ends)) and made[0][0].start == 0
    assert ends[-1] == size if not wrap or len(made) == 1 else ends[-1] - size >= overlap  # the last meets the first


@pytest.mark.parametrize("grid", GRIDS)
def test_a_pointwise_denoiser_is_the_same_in_windows(grid):
    assert len(grid.windows) > 1
    torch.testing.assert_close(grid.tiled([pointwise] * len(grid.windows))(X, LEVEL), pointwise(X, LEVEL), rtol=0, atol=1e-6)


def test_one_window_is_the_denoiser_itself():
    for grid in (Grid(20, 26, 26, 4), Grid(20, 26, 30, 4, (ROWS, COLUMNS))):
        assert grid.windows == (Window(Span(0, 20), Span(0, 26)),)
        assert grid.tiled([pointwise]) is pointwise
    with pytest.raises(ValueError, match="shorter|longer"):
        Grid(20, 26, 8, 2).tiled([pointwise])


def test_windows_are_denoised_each_by_its_own_and_blended():
    """Two windows with answers 0 and 1: the mean goes from 0 to 1 across the middle half of what they share."""
    grid = Grid(4, 12, 8, 4)
    assert [window.columns.start for window in grid.windows] == [0, 4]
    x0 = grid.tiled([lambda x, level: torch.zeros_like(x), lambda x, level: torch.ones_like(x)])(X[..., :4, :12], LEVEL)
    assert x0[0, 0, 0].tolist() == [0.0] * 5 + [0.25, 0.75] + [1.0] * 5


def local(x, level):
    """A 3x3 convolution without a border of its own: zeros outside."""
    return conv2d(x, KERNEL, padding=1)


@pytest.mark.parametrize("wrap", [(), (ROWS,), (ROWS, COLUMNS)])
def test_a_local_denoiser_is_exact_where_windows_share_more_than_it_reaches(wrap):
    """It reaches 1; of 4 shared entries the outer quarters, 1 each, are dropped. Along wrapped axes the world has no edge."""
    grid = Grid(20, 26, 8, 4, wrap)
    rows, columns = ("circular" if axis in wrap else "constant" for axis in (ROWS, COLUMNS))
    expected = conv2d(pad(pad(X, (1, 1, 0, 0), mode=columns), (0, 0, 1, 1), mode=rows), KERNEL)
    torch.testing.assert_close(grid.tiled([local] * len(grid.windows))(X, LEVEL), expected, rtol=0, atol=1e-5)


def test_a_window_past_the_edge_and_its_pixels():
    window = Window(Span(18, 4), Span(24, 5))
    numbers = torch.arange(20 * 26).reshape(1, 1, 20, 26)
    assert torch.equal(window.of(numbers), numbers.roll((2, 2), (2, 3))[..., :4, :5])
    big = numbers.repeat_interleave(3, 2).repeat_interleave(3, 3)
    assert torch.equal(window.of(big, unit=3), window.of(numbers).repeat_interleave(3, 2).repeat_interleave(3, 3))
    back = torch.zeros(1, 1, 20, 26)
    window.add(torch.ones(1, 1, 4, 5), to=back)
    assert torch.equal(back.roll((2, 2), (2, 3)), torch.nn.functional.pad(torch.ones(1, 1, 4, 5), (0, 21, 0, 16)))


def test_masked_and_tiled_keeps_what_is_kept():
    mask = torch.zeros(1, 1, 20, 26)
    mask[..., 3:9, 5:20] = 1
    grid = Grid(20, 26, 8, 2)
    x0 = masked(grid.tiled([local] * len(grid.windows)), z0=X, mask=mask, eps=torch.randn(2, 3, 20, 26, generator=DICE))(X, LEVEL)
    assert torch.equal(torch.where(mask.bool(), X, x0), X) and not torch.equal(x0, X)


# Turned around the edges

LEVELS = tuple(FLOW.at(s) for s in (1.0, 0.8, 0.5, 0.2, 0.0))


@pytest.mark.parametrize("axes", [(ROWS,), (COLUMNS,), (ROWS, COLUMNS)])
def test_turning_changes_nothing_for_a_denoiser_without_edges(axes):
    def circular(x, level):
        return conv2d(pad(x, (1, 1, 1, 1), mode="circular"), KERNEL)

    for level in LEVELS[:-1]:
        torch.testing.assert_close(turned(circular, axes=axes, levels=LEVELS)(X, level), circular(X, level), rtol=0, atol=1e-5)


def test_every_level_turns_by_another_whole_patch_and_only_along_its_axes():
    seen = []

    def looking(x, level):
        seen.append(x)
        return x

    numbers = torch.arange(20.0 * 26).reshape(1, 1, 20, 26)
    denoise = turned(looking, axes=(COLUMNS,), levels=LEVELS, unit=2)
    for level in (*LEVELS[:-1], FLOW.at(0.65)):
        assert torch.equal(denoise(numbers, level), numbers)
    by = [int(x[0, 0, 0, 0]) for x in seen]  # the first row, and so no rows were turned
    assert all(n < 26 and n % 2 == 0 for n in by) and len({*by[:4]}) == 4 and by[0] == 0
    assert by[4] == by[1]  # between two levels as at the noisier


def test_turning_spreads_what_edges_do():
    """A denoiser that darkens the first column darkens another at each level."""

    def dark_edge(x, level):
        return x * (torch.arange(x.shape[3]) > 0)

    denoise = turned(dark_edge, axes=(COLUMNS,), levels=LEVELS)
    marks = [int((denoise(torch.ones(1, 1, 2, 26), level)[0, 0, 0] == 0).nonzero()) for level in LEVELS[:-1]]
    assert len(set(marks)) == 4
