"""Which samples count for conflict heads and which heads are listed: hand examples."""

from __future__ import annotations

import math

import conflict_toy as toy
import pytest
import torch

from decoding.conflict_heads import (
    LENS_HEADS,
    Measured,
    balanced,
    lens_shares,
    list_heads,
    means_of,
    rank_correlation,
    torn,
)
from decoding.conflict_runs import make_record


def made(plain, *, image=1, memory=2, kinds="k", yes_no=False, pushes=None):
    """Samples with these differences, all of them among the ten likeliest."""
    n = len(plain)
    heads = torch.zeros(n, 1, 2) if pushes is None else pushes
    image = torch.tensor(image).expand(n) if isinstance(image, int) else torch.tensor(image)
    return Measured(
        memory=torch.full((n,), memory) if not yes_no else 3 - image,
        image=image,
        plain=torch.tensor(plain),
        among_ten=torch.ones(n, dtype=torch.bool),
        pushes=heads,
        says=heads,
        remembers=heads,
        kinds=tuple(kinds[i % len(kinds)] for i in range(n)),
        yes_no=(yes_no,) * n,
    )


def test_torn_by_hand():
    # The median gap of 1 2 3 4 5 is 3: nearer questions count.
    asked = made([1.0, -2.0, 3.0, -4.0, 5.0], yes_no=True)
    assert torn(asked).tolist() == [True, True, False, False, False]
    # Questions whose answers begin alike have no part in it.
    more = made([1.0, -2.0, 3.0, -4.0, 5.0, *[0.1] * 6], yes_no=True)
    same = more._replace(memory=torch.cat([more.memory[:5], more.image[5:]]))
    assert torn(same).tolist() == [True, True] + [False] * 9
    told = made([1.0, -9.0, 3.0])
    assert torn(told).all()
    assert torn(told._replace(among_ten=torch.tensor([True, False, True]))).tolist() == [
        True, False, True,
    ]  # fmt: skip
    assert not torn(told._replace(memory=told.image)).any()


def test_balanced_by_hand():
    # Four by the image, two by memory: two of each, one per half.
    told = made([1.0, 1.0, 1.0, 1.0, -1.0, -1.0])
    assert balanced(told, torch.ones(6, dtype=torch.bool)) in (([4, 0], [5, 1]), ([0, 4], [1, 5]))
    # Yes (1) is the picture's answer in the first four, no (2) in the others, where memory never
    # wins: a cell stays empty, so nothing is left.
    asked = made([1.0, -1.0] * 2 + [1.0] * 4, image=[1] * 4 + [2] * 4, yes_no=True)
    assert balanced(asked, torch.ones(8, dtype=torch.bool)) == ([], [])
    asked = made([1.0, -1.0] * 4, image=[1] * 4 + [2] * 4, yes_no=True)
    first, second = balanced(asked, torch.ones(8, dtype=torch.bool))
    assert sorted(first + second) == list(range(8))
    for half in (first, second):
        cells = [(int(asked.image[i]), bool(asked.plain[i] > 0)) for i in half]
        assert len(set(cells)) == 4


def test_kinds_are_balanced_one_by_one():
    # Those of the second kind are all by the image; that takes nothing from the first.
    told = made([1.0, 1.0, -1.0, 1.0] * 2, kinds="ab")
    first, second = balanced(told, torch.ones(8, dtype=torch.bool))
    assert sorted(first + second) == [0, 2, 4, 6]


def test_lists_by_hand():
    # Head 0 pushes by 1 in every sample, head 1 by -2; heads of layer 1 cancel out.
    pushes = torch.tensor([[[1.0, -2.0], [3.0, 0.0]], [[1.1, -2.1], [-3.0, 0.0]]]).repeat(4, 1, 1)
    found = list_heads(made([1.0] * 8, pushes=pushes), ([0, 2, 5, 7], [1, 3, 4, 6]),
                       protect_layers=0)  # fmt: skip
    assert found.image == ((0, 0),)
    assert found.memory == ((0, 1),)
    assert found.split_half == {"image": 1.0, "memory": 1.0}
    guarded = list_heads(made([1.0] * 8, pushes=pushes), ([0, 2, 5, 7], [1, 3, 4, 6]),
                         protect_layers=0, protect=((0, 1),))  # fmt: skip
    assert (guarded.image, guarded.memory) == (((0, 0),), ())
    assert guarded.removed["protected"] == ((0, 1),)
    assert list_heads(made([1.0] * 8, pushes=pushes), ([0, 2], [1, 3])).image == ()


def test_heads_that_change_sides_between_the_halves_are_not_listed():
    up, down = torch.tensor([[[4.0, 1.0]]]), torch.tensor([[[-3.0, 1.0]]])
    pushes = torch.cat([up, up + 0.1, up - 0.1] * 10 + [down, down - 0.1, down + 0.1] * 3)
    halves = (list(range(30)), list(range(30, 39)))
    for order in (halves, halves[::-1]):
        found = list_heads(made([1.0] * 39, pushes=pushes), order, protect_layers=0)
        assert found.removed["in the other list in one half"] == ((0, 0),)
        assert found.image == ((0, 1),)


def test_heads_in_both_lists_are_not_listed():
    pushes = torch.tensor([[[2.0, 1.0]], [[2.1, 1.1]]]).repeat(4, 1, 1)
    both = made([1.0] * 8, pushes=pushes)._replace(says=-5 * pushes)
    found = list_heads(both, ([0, 3], [1, 2]), score="sum", protect_layers=0)
    assert (found.image, found.memory) == ((), ())
    assert found.removed["in both lists"] == ((0, 0), (0, 1))


def test_lists_of_the_lens_by_hand():
    # Head 0 prefers the image answer in 6 of 8, head 1 in 2, head 2 never says anything.
    says = torch.zeros(8, 1, 3)
    says[:, 0, 0] = torch.tensor([1.0, 1, 1, -9, 1, 1, 1, -9])
    says[:, 0, 1] = torch.tensor([-1.0, -1, -1, 9, -1, -1, -1, 9])
    assert lens_shares(says).tolist() == [[0.25, -0.25, 0.0]]
    samples = made([1.0] * 8, pushes=torch.zeros(8, 1, 3))._replace(says=says)
    found = list_heads(samples, ([0, 1, 2, 3], [4, 5, 6, 7]), score="lens", protect_layers=0)
    assert (found.image, found.memory) == (((0, 0),), ((0, 1),))
    # How much it says does not matter; no more than twenty of a kind are listed.
    many = torch.linspace(0.1, 3, 30).expand(8, 1, 30)
    found = list_heads(
        samples._replace(says=many), ([0, 1], [2, 3]), score="lens", protect_layers=0
    )
    assert found.image == tuple((0, head) for head in range(LENS_HEADS))
    assert found.memory == ()


def test_the_strongest_head_comes_first():
    pushes = torch.tensor([[[1.0, 3.0, 2.0, -1.0, -3.0]]]).expand(8, 1, 5)
    found = list_heads(made([1.0] * 8, pushes=pushes), ([0, 3], [1, 2]), protect_layers=0)
    assert found.image == ((0, 1), (0, 2), (0, 0))
    assert found.memory == ((0, 4), (0, 3))


def test_errors_of_means_by_hand():
    found = means_of(torch.tensor([1.0, 3.0])[:, None, None])
    assert (float(found.mean), float(found.error)) == (2.0, pytest.approx(1.0))
    # Mean 1 with an error of 0.38: clear of it by 2.6.
    pushes = torch.tensor([0.0, 2.0]).repeat(4)[:, None, None].expand(8, 1, 2)
    samples, halves = made([1.0] * 8, pushes=pushes), ([0, 1, 2, 3], [4, 5, 6, 7])
    for significance, heads in ((2.0, ((0, 0), (0, 1))), (3.0, ())):
        found = list_heads(samples, halves, significance=significance, protect_layers=0)
        assert found.image == heads


def test_recorded_values_are_means_over_both_halves():
    model, _ = toy.build()
    pushes = torch.arange(8.0)[:, None, None] + torch.arange(8.0)  # grows with the head alike
    measured = made([1.0, -1.0] * 4, pushes=pushes)
    record = make_record(model, measured, ([0, 2], [5, 7]), {}, protect_layers=0)
    assert record.values["pushes"] == [[3.5 + head for head in range(8)]]


def test_rank_correlation_by_hand():
    a = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert rank_correlation(a, a**3) == pytest.approx(1)
    assert rank_correlation(a, -a) == pytest.approx(-1)
    # Ranks 1.5 1.5 3 4 against 1 2 3 4: covariance 4.5, squares 4.5 and 5.
    tied = torch.tensor([7.0, 7.0, 8.0, 9.0])
    assert rank_correlation(tied, a) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert rank_correlation(torch.ones(4), a) == 0.0
