"""Metrics compared with values computed by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hyperdreambooth.evaluation import metrics

EYE = torch.eye(3)


def test_ranks_count_who_is_nearer_than_oneself():
    embedded = torch.stack([EYE, EYE.roll(1, 0)], 1)  # two pictures of each person: one like that person, one like the neighbor
    # for the second picture both others count: one is closer, and the other is tied with the person
    assert metrics.ranks(embedded, EYE).tolist() == [[0, 2], [0, 2], [0, 2]]
    assert metrics.similarity(embedded, EYE).tolist() == [[1, 0], [1, 0], [1, 0]]


def test_copying_is_being_nearer_to_a_training_person():
    training = torch.tensor([[0.0, 1.0, 0.0]])
    assert metrics.copied(EYE, EYE.roll(1, 0), training).tolist() == [0, 1, 0]
    assert metrics.copied(EYE, EYE, training).tolist() == [0, 0, 0]


def test_a_context_is_right_only_when_all_that_was_asked_is():
    found = [{"style": "sketch", "background": "red"}] * 3
    asked = [{"style": "sketch"}, {"style": "sketch", "background": "blue"}, {}]
    assert metrics.context_right(found, asked).tolist() == [1, 0, 1]


def test_psnr():
    black, gray = -torch.ones(1, 3, 4, 4), torch.zeros(1, 3, 4, 4)
    assert metrics.psnr(black, gray).item() == pytest.approx(10 * torch.log10(torch.tensor(4.0)).item(), abs=1e-4)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 40), st.integers(1, 5), st.integers(0, 99))
def test_intervals_hold_the_mean_and_repeat(people, each, seed):
    values = torch.rand(people, each, generator=torch.Generator().manual_seed(seed))
    mean, low, high = metrics.interval(values)
    assert low <= mean <= high
    assert metrics.interval(values) == (mean, low, high)
    assert mean == pytest.approx(values.mean().item(), abs=1e-5)


def test_intervals_are_over_people_not_pictures():
    same = torch.tensor([[0.0] * 100, [1.0] * 100])
    _, low, high = metrics.interval(same)
    assert (low, high) == (0, 1)


def test_who_is_not_told_apart_is_not_recognized():
    same = torch.ones(3, 3) / 3**0.5
    assert metrics.ranks(same, same).tolist() == [2, 2, 2]
    assert metrics.ranks(torch.full((3, 2, 3), float("nan")), EYE).tolist() == [[2, 2]] * 3


def test_strangers_fill_the_gallery_up():
    mine, strangers = torch.eye(6)[:3], torch.eye(6)[3:]
    pictures = torch.stack([mine[0], strangers[1], mine[2]])[:, None]
    assert metrics.ranks(pictures, mine)[:, 0].tolist() == [0, 2, 0]  # ties count as wrong
    assert metrics.ranks(pictures, torch.cat([mine, strangers]))[:, 0].tolist() == [0, 5, 0]
    nearly = torch.nn.functional.normalize(mine + 0.9 * strangers, dim=-1)[:, None]
    assert metrics.ranks(nearly, torch.cat([mine, strangers]))[:, 0].tolist() == [0, 0, 0]


def test_lookalikes_are_each_persons_nearest():
    gallery = torch.nn.functional.normalize(torch.tensor([[1.0, 0.1, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0], [-1, 0, 0]]), dim=-1)
    # person 0's look-alike is number 3: a picture that equals the look-alike is wrong, and one that equals person 1 has rank 0
    pictures = torch.stack([gallery[3], gallery[1]])[:, None]
    assert metrics.lookalike_ranks(pictures, gallery, 1)[:, 0].tolist() == [1, 0]
    assert metrics.lookalike_ranks(torch.stack([gallery[2], gallery[1]])[:, None], gallery, 1)[0, 0] == 1
    everyone = metrics.lookalike_ranks(pictures, gallery, 99)
    assert everyone.tolist() == metrics.ranks(pictures, gallery).tolist()


def test_auc_is_the_chance_that_a_right_pair_is_more_alike_than_a_wrong_one():
    gallery = torch.nn.functional.normalize(torch.randn(5, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    pictures = torch.nn.functional.normalize(gallery[:3, None] + torch.randn(3, 2, 4, generator=torch.Generator().manual_seed(1)), dim=-1)
    alike = (pictures @ gallery.mT).flatten(0, 1)
    own = [(picture, picture // 2) for picture in range(6)]
    wrong = [alike[picture, person].item() for picture in range(6) for person in range(5) if (picture, person) not in own]
    by_hand = [sum(score < alike[pair].item() for score in wrong) / len(wrong) for pair in own]
    torch.testing.assert_close(metrics.auc(pictures, gallery).flatten(), torch.tensor(by_hand))
    assert metrics.auc(torch.ones(3, 2, 4) / 2, torch.ones(5, 4) / 2).tolist() == [[0.5, 0.5]] * 3
    assert metrics.auc(EYE, EYE).tolist() == [1, 1, 1]


def test_pictures_without_a_face_are_least_alike_and_make_no_wrong_pairs():
    pictures = torch.stack([EYE, EYE.roll(1, 0)], 1)
    blind = pictures.clone()
    blind[:, 1] = torch.nan
    assert metrics.auc(blind, EYE).tolist() == [[1, 0]] * 3
    assert metrics.ranks(blind, EYE).tolist() == [[0, 2]] * 3


def test_spearman_goes_by_order_alone():
    values = torch.tensor([0.1, 0.5, 0.2, 0.9, 0.7])
    assert metrics.spearman(values, values.exp()) == 1
    assert metrics.spearman(values, -values) == -1
    nan = torch.tensor(torch.nan)
    assert metrics.spearman(torch.cat([values, nan[None]]), torch.cat([values**3, nan[None]])) == 1
    # computed by hand from the ranks 1, 2.5, 2.5, 4 and 1, 3, 2, 4
    tied = metrics.spearman(torch.tensor([0.0, 1, 1, 2]), torch.tensor([0.0, 2, 1, 3]))
    assert tied == pytest.approx(4.5 / (4.5 * 5) ** 0.5, abs=1e-3)
    assert metrics.spearman(torch.ones(4), values[:4]) is None
    assert metrics.spearman(values[:2], values[:2]) is None
