"""Splits by group: stable, disjoint, and in the wanted proportions."""

from __future__ import annotations

import pytest

from cfe_lightning.data.base import Split, check_groups, split_by_group

SHARES: dict[Split, float] = {"train": 0.7, "val": 0.1, "test": 0.2}


def test_shares_are_met_and_groups_stay_together() -> None:
    groups = [f"patient{i % 4000}" for i in range(8000)]
    splits = split_by_group(groups, SHARES)
    assert splits[:4000] == splits[4000:]
    for split, share in SHARES.items():
        assert splits.count(split) / len(splits) == pytest.approx(share, abs=0.02)


def test_more_groups_move_no_other_and_order_does_not_matter() -> None:
    few = [f"{i}" for i in range(100)]
    many = [f"{i}" for i in range(1000)]
    assert split_by_group(many, SHARES)[:100] == split_by_group(few, SHARES)
    assert split_by_group(few[::-1], SHARES)[::-1] == split_by_group(few, SHARES)


def test_another_seed_splits_otherwise() -> None:
    groups = [f"{i}" for i in range(200)]
    assert split_by_group(groups, SHARES, seed=1) != split_by_group(groups, SHARES, seed=0)


def test_a_share_of_zero_gets_nothing() -> None:
    splits = split_by_group([f"{i}" for i in range(1000)], {"train": 0.9, "test": 0.1})
    assert set(splits) == {"train", "test"}


def test_shares_must_sum_to_one() -> None:
    with pytest.raises(ValueError, match="must sum to 1"):
        split_by_group(["a"], {"train": 0.5, "test": 0.4})


def test_a_group_in_two_splits_is_named() -> None:
    check_groups({"train": ["a", "a", "b"], "val": ["c"], "test": []})
    with pytest.raises(ValueError, match="Group 'b' is in both the train and the test split: split by group"):
        check_groups({"train": ["a", "b"], "val": ["c"], "test": ["b"]})
