"""Analytic tests of ``search``, ``ranking`` and the benchmark's AttFind (arXiv 2207.07553, Algorithm 1; 2104.13369)."""

from __future__ import annotations

import io
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toy import toy_classifier

from cfe_lightning.classifier import FrozenClassifier
from cfe_lightning.compute.rows import rows_of
from cfe_lightning.methods.stylex.generator import Entering, StyleGenerator, Styles
from cfe_lightning.methods.stylex.layers import channel_table
from cfe_lightning.methods.stylex.ranking import SearchResult, effects, rank_directions
from cfe_lightning.methods.stylex.search import (
    Directions,
    LogitsOfEdits,
    absolute_steps,
    direction_table,
    factor_directions,
    principal_directions,
    rechecked,
)

# AttFind is a benchmark: the package does not need it.
sys.path.append(str(Path(__file__).parents[3] / "benchmarks"))

from stylex import coordinate_shifts, coordinate_table

BOTH_WAYS = torch.tensor([1.0, -1.0])


def points(count: int = 60, seed: int = 0) -> Tensor:
    """Draws points [count, 6] far from the origin with known extents."""
    generator = torch.Generator().manual_seed(seed)
    rotation = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    extents = torch.tensor([8.0, 5.0, 3.0, 2.0, 1.0, 0.5])
    return torch.randn(count, 6, generator=generator) * extents @ rotation.T + 20


def linear_logits(margins: Tensor, normal: Tensor) -> LogitsOfEdits:
    """An identity as generator and a linear classifier of two classes with these margins and this normal."""

    def logits_of(rows: Tensor, change: Tensor) -> Tensor:
        margin = margins[rows] + change @ normal
        return torch.stack([-margin / 2, margin / 2], dim=1)

    return logits_of


def of_margins(margins: Tensor) -> Tensor:
    return torch.stack([-margins / 2, margins / 2], dim=-1)


def from_columns(*columns: list[float]) -> Tensor:
    """Builds scores [n, Q, 2] from those of the sign +; the sign - has the opposite."""
    return torch.tensor(columns).T[:, :, None] * BOTH_WAYS


def toy_generator() -> tuple[StyleGenerator, FrozenClassifier, Tensor]:
    """Builds a generator, a classifier of its pictures and three latents."""
    torch.manual_seed(0)
    widths = channel_table(16, base=64, maximum=8)
    network = StyleGenerator(
        channels=3, num_classes=2, conditioning="none", widths=widths, z_dim=4, w_dim=5, mapping_layers=2
    )
    for layer in network.synthesis.layers():
        nn.init.constant_(layer.noise_strength, 0.2)
    for layer in network.synthesis.to_image:
        layer.weight.data *= 0.5
    return network.eval(), toy_classifier(), torch.randn(3, 5)


# Directions


@pytest.mark.parametrize("found", ["principal", "factor"])
def test_directions_are_orthonormal_with_the_most_important_first(found: str) -> None:
    cloud, weight = points(), points(30, seed=1) - 20
    if found == "principal":
        directions, seen = principal_directions(cloud, 6), cloud - cloud.mean(dim=0)
    else:
        directions, seen = factor_directions(weight, cloud, 6), weight
    vectors = directions.vectors
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(6), atol=1e-5, rtol=0)
    gains = (seen @ vectors.T).norm(dim=0)
    assert (gains[:-1] > gains[1:]).all()
    others = torch.randn(200, 6, generator=torch.Generator().manual_seed(2))
    others = others / others.norm(dim=1, keepdim=True)
    assert ((seen @ others.T).norm(dim=0) <= gains[0] * (1 + 1e-5)).all()


@pytest.mark.parametrize("count", [1, 4, 6, 50])
def test_as_many_directions_as_are_asked_for_and_there_are(count: int) -> None:
    for directions in (principal_directions(points(), count), factor_directions(points(30), points(), count)):
        assert directions.vectors.shape == (min(count, 6), 6)
        assert directions.spread.shape == (min(count, 6),)


def test_principal_directions_are_eigenvectors_of_the_covariance() -> None:
    cloud = points().double()
    values, vectors = torch.linalg.eigh(torch.cov(cloud.T, correction=0))
    directions = principal_directions(cloud.float(), 6)
    torch.testing.assert_close(directions.spread.double(), values.flip(0).sqrt(), atol=1e-4, rtol=1e-4)
    agreement = (directions.vectors.double() * vectors.flip(1).T).sum(dim=1).abs()
    torch.testing.assert_close(agreement, torch.ones(6).double(), atol=1e-5, rtol=0)


def test_the_spread_along_factor_directions_is_that_of_the_latents() -> None:
    cloud = points()
    directions = factor_directions(points(30, seed=1), cloud, 6)
    expected = (cloud @ directions.vectors.T).std(dim=0, unbiased=False)
    torch.testing.assert_close(directions.spread, expected, atol=1e-4, rtol=1e-4)
    moved = factor_directions(points(30, seed=1), 3 * cloud + 7, 6)
    assert torch.equal(moved.vectors, directions.vectors)
    torch.testing.assert_close(moved.spread, 3 * directions.spread, atol=1e-4, rtol=1e-4)


def test_the_sign_of_a_direction_does_not_depend_on_that_of_its_input() -> None:
    cloud, weight = points(), points(30, seed=1)
    for vectors, negated in (
        (principal_directions(cloud, 6).vectors, principal_directions(-cloud, 6).vectors),
        (factor_directions(weight, cloud, 6).vectors, factor_directions(-weight, cloud, 6).vectors),
    ):
        torch.testing.assert_close(vectors, negated, atol=1e-5, rtol=0)
        assert (vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True)) > 0).all()


def test_normalised_rows_count_alike() -> None:
    # One style moves ten times as far along the first axis as three styles along the second one.
    weight = torch.tensor([[10.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, -1.0], [0.0, 0.0]])
    latents = torch.randn(5, 2)
    torch.testing.assert_close(factor_directions(weight, latents, 2).vectors, torch.eye(2))
    torch.testing.assert_close(factor_directions(weight, latents, 2, normalise_rows=True).vectors, torch.eye(2).flip(0))


def test_steps_in_standard_deviations_and_as_they_are() -> None:
    directions = Directions(torch.eye(2), torch.tensor([0.5, 2.0]))
    assert absolute_steps(directions, 3.0, "sigma").tolist() == [1.5, 6]
    assert absolute_steps(directions, 3.0, "abs").tolist() == [3, 3]


# Tables


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_the_table_is_ordered_by_image_direction_and_sign(batch_size: int) -> None:
    changes = torch.tensor([[1.0, 2.0], [10.0, 20.0], [100.0, 0.0]])
    asked: list[int] = []

    def logits_of(rows: Tensor, change: Tensor) -> Tensor:
        asked.append(len(rows))
        return torch.cat([rows[:, None].float(), change], dim=1)

    table = direction_table(logits_of, 4, changes, batch_size)
    assert table.shape == (4, 3, 2, 3)
    assert sum(asked) == 24
    assert max(asked) <= batch_size
    for image in range(4):
        assert (table[image, :, :, 0] == image).all()
        assert torch.equal(table[image, :, 0, 1:], changes)
        assert torch.equal(table[image, :, 1, 1:], -changes)


@torch.no_grad()
def test_no_table_depends_on_the_size_of_a_batch() -> None:
    network, classifier, w = toy_generator()
    condition = torch.eye(2)[[0, 1, 0]]

    def logits_of(rows: Tensor, change: Tensor) -> Tensor:
        return classifier(network(w[rows] + change, condition[rows]).clamp(-1, 1))

    # Tables of directions and of coordinates for several batch sizes.
    changes = 2 * torch.linalg.qr(torch.randn(5, 5)).Q
    styles = network.styles(w, condition)
    flat = network.synthesis.flatten_styles(styles)
    shifts = coordinate_shifts(flat, flat.amin(dim=0) - 1, flat.amax(dim=0) + 1)
    still = logits_of(torch.arange(3), torch.zeros(3, 5))
    by_direction = [direction_table(logits_of, 3, changes, batch_size) for batch_size in (1, 7, 64)]
    by_coordinate = [
        coordinate_table(network.synthesis, classifier, styles, shifts, batch_size, images_at_once).transpose(1, 2)
        for batch_size, images_at_once in ((1, 1), (7, 2), (64, 8))
    ]

    # Equal tables have equal covers.
    for tables in (by_direction, by_coordinate):
        covers = []
        for table in tables:
            torch.testing.assert_close(table, tables[0], atol=1e-4, rtol=0)
            covers.append(rank_directions(*effects(table, still, 1)))
        assert len(covers[0].direction) > 1
        for cover in covers[1:]:
            for name in ("direction", "sign", "alone", "newly", "explained_by"):
                assert torch.equal(getattr(cover, name), getattr(covers[0], name))
            torch.testing.assert_close(cover.mean_change, covers[0].mean_change, atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_table_of_coordinates_equals_full_synthesis() -> None:
    network, classifier, w = toy_generator()
    synthesis = network.synthesis
    styles = network.styles(w, torch.eye(2)[[0, 1, 0]])
    flat = synthesis.flatten_styles(styles)
    shifts = torch.randn(3, 2, 36)
    table = coordinate_table(synthesis, classifier, styles, shifts, batch_size=50, images_at_once=2)
    assert table.shape == (3, 2, 36, 2)
    assert torch.equal(synthesis.flatten_styles(styles), flat)
    for image in range(3):
        same = rows_of(styles, torch.full((36,), image))
        for sign in range(2):
            # One coordinate per row.
            edited = flat[image] + torch.diag(shifts[image, sign])
            expected = classifier(synthesis(synthesis.replace_styles(same, edited)).clamp(-1, 1))
            torch.testing.assert_close(table[image, sign], expected, atol=1e-4, rtol=0)
    pictures = synthesis(styles)
    assert pictures.abs().max() > 1
    before = classifier(pictures.clamp(-1, 1))
    assert ((table - before[:, None, None]).abs().amax(dim=(0, 1, 3)) > 1e-3).all()


def test_shifts_end_at_the_extremes() -> None:
    flat = torch.tensor([[0.0, 1.0, -2.0], [0.5, 3.0, 4.0]])
    low, high = torch.tensor([-1.0, 1.0, -2.5]), torch.tensor([0.5, 4.0, 8.0])
    shifts = coordinate_shifts(flat, low, high)
    assert shifts.shape == (2, 2, 3)
    assert torch.equal(flat + shifts[:, 0], high.expand(2, 3))
    assert torch.equal(flat + shifts[:, 1], low.expand(2, 3))
    assert torch.equal(coordinate_shifts(flat, low, high, 2.5), 2.5 * shifts)


class Painter:
    """Stands for a synthesis: one style shows as the contrast of the two pixels of its picture."""

    layer_sizes = (3, 4)

    def __init__(self, coordinate: int) -> None:
        self.coordinate = coordinate

    def trace(self, styles: Styles) -> tuple[Tensor, list[Entering]]:
        return self._paint(styles), [Entering(styles.start, None), Entering(styles.start, styles.start[:, :1])]

    def synthesize_from(self, layer: int, entering: Entering, styles: Styles) -> Tensor:
        assert (entering.picture is None) == (layer == 0)
        assert len(entering.features) == len(styles.start)
        return self._paint(styles)

    def _paint(self, styles: Styles) -> Tensor:
        shown = torch.cat(list(styles.conv), dim=1)[:, self.coordinate]
        return torch.stack([-shown, shown], dim=1)[:, None, None] / 10


@pytest.mark.parametrize("coordinate", range(7))
@pytest.mark.parametrize("target", [0, 1])
def test_attfind_finds_the_only_coordinate_that_matters(coordinate: int, target: int) -> None:
    torch.manual_seed(0)
    flat = torch.randn(5, 7)
    # Towards the target, away from the other class: none is decided for the target before.
    flat[:, coordinate] = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]) * (1 if target == 0 else -1)
    styles = Styles(flat.split(Painter.layer_sizes, dim=1), [], torch.zeros(5, 2, 4, 4))
    shifts = coordinate_shifts(flat, torch.full((7,), -3.0), torch.full((7,), 3.0))
    table = coordinate_table(Painter(coordinate), lambda picture: picture[:, 0, 0], styles, shifts, 4, 2)  # type: ignore[arg-type]
    before = torch.stack([-flat[:, coordinate], flat[:, coordinate]], dim=1) / 10
    ranking = rank_directions(*effects(table.transpose(1, 2), before, target))
    assert ranking.direction.tolist() == [coordinate]
    assert ranking.sign.tolist() == [1 if target == 1 else -1]
    # The contrast goes from 0.03 on the wrong side on average to 0.3 on the right one; the margin is twice that.
    assert ranking.mean_change.tolist() == pytest.approx([0.66])
    assert ranking.covered == 1


@pytest.mark.parametrize("gaps", [[0.0, 0.07, 0.09, -0.07, 2.0], [0.09, -3.0]])
def test_only_ties_are_judged_again(gaps: list[float]) -> None:
    # A probability within 0.02 of one half is a gap of logits below log(0.52 / 0.48) = 0.080.
    near = [i for i, gap in enumerate(gaps) if abs(gap) < 0.08]
    asked: list[tuple[list[int], list[float]]] = []

    def rough(rows: Tensor, change: Tensor) -> Tensor:
        return torch.tensor([[gap, 0.0] for gap in gaps]).bfloat16()

    def exact(rows: Tensor, change: Tensor) -> Tensor:
        asked.append((rows.tolist(), change[:, 0].tolist()))
        return torch.full((len(rows), 2), 100.0) + change

    # Logits.
    rows = torch.arange(len(gaps)) + 10
    change = torch.arange(2.0 * len(gaps)).unflatten(0, (-1, 2))
    logits = rechecked(rough, exact)(rows, change)
    assert logits.dtype == torch.float32
    assert asked == ([([i + 10 for i in near], [2.0 * i for i in near])] if near else [])

    # Only near ties are those of the exact function.
    expected = rough(rows, change).float()
    for i in near:
        expected[i] = 100 + change[i]
    assert torch.equal(logits, expected)


def test_ties_among_many_classes_are_those_of_the_two_most_probable() -> None:
    logits = torch.tensor([[5.0, 5.0, 0.0], [5.0, 0.0, 0.0], [0.0, 0.02, 0.01]])
    seen: list[int] = []

    def exact(rows: Tensor, change: Tensor) -> Tensor:
        seen.extend(rows.tolist())
        return logits[rows]

    rechecked(lambda rows, change: logits[rows], exact)(torch.arange(3), torch.zeros(3, 1))
    assert seen == [0, 2]


# Ranking


def test_strict_effects_by_hand() -> None:
    before = torch.tensor([[1.0, 0.0], [3.0, 0.0]])
    table = torch.tensor([[[[0.0, 2.0], [0.5, 0.5]]], [[[1.0, 0.5], [3.0, 0.0]]]])
    score, flips = effects(table, before, 1)
    assert score.tolist() == [[[3, 1]], [[2.5, 0]]]
    # A tie is no flip.
    assert flips.tolist() == [[[True, False]], [[False, False]]]
    score, flips = effects(table, before, 0)
    assert score.tolist() == [[[-3, -1]], [[-2.5, 0]]]
    assert flips.tolist() == [[[False, False]], [[True, True]]]


def test_strict_flips_of_three_classes_need_the_largest_logit() -> None:
    # The first is decided for class 1 though the others together outweigh it.
    table = torch.tensor([[[[0.0, 2.0, 1.9], [0.0, 2.0, 3.0]]]])
    _, flips = effects(table, torch.zeros(1, 3), 1)
    assert flips.tolist() == [[[True, False]]]


def test_effects_of_the_published_code_by_hand() -> None:
    # The target's sigmoid alone: 1/2, 3/4, 1/4 and 1/5 are logits 0, log 3, -log 3 and -log 4.
    three, four = math.log(3), math.log(4)
    before = torch.tensor([[9.0, -four], [-9.0, three]])
    table = torch.tensor([[[[9.0, three], [9.0, -three]]], [[[-9.0, -three], [-9.0, three]]]])
    score, flips = effects(table, before, 1, "paper_code")
    torch.testing.assert_close(score, torch.tensor([[[0.55, 0.05]], [[-0.5, 0.0]]]))
    # A fall below one half counts as well.
    assert flips.tolist() == [[[True, False]], [[True, False]]]


def test_steps_of_zero_explain_nothing() -> None:
    margins = torch.tensor([-0.3, -2.0, -1e-4])
    table = direction_table(linear_logits(margins, torch.ones(4)), 3, torch.zeros(5, 4), 7)
    score, flips = effects(table, of_margins(margins), 1)
    assert score.abs().max() == 0
    assert not flips.any()
    ranking = rank_directions(score, flips)
    assert len(ranking.direction) == 0
    assert ranking.explained_by.tolist() == [-1, -1, -1]
    assert ranking.covered == 0


@torch.no_grad()
def test_steps_of_zero_change_no_picture() -> None:
    network, classifier, w = toy_generator()

    def logits_of(rows: Tensor, change: Tensor) -> Tensor:
        return classifier(network(w[rows] + change, torch.eye(2)[rows % 2]).clamp(-1, 1))

    before = logits_of(torch.arange(3), torch.zeros(3, 5))
    table = direction_table(logits_of, 3, torch.zeros(2, 5), batch_size=4)
    torch.testing.assert_close(table, before[:, None, None].expand_as(table), atol=1e-5, rtol=0)
    mine = before.argmax(dim=1) == before[0].argmax()
    target = 1 - int(before[0].argmax())
    assert rank_directions(*effects(table[mine], before[mine], target)).covered == 0


@pytest.mark.parametrize("target", [0, 1])
def test_the_direction_across_the_boundary_ranks_first(target: int) -> None:
    towards = 1 if target == 1 else -1
    margins = torch.tensor([-0.1, -0.5, -1.5, -5.0]) * towards
    logits_of = linear_logits(margins, torch.tensor([0.1, -0.9, 0.3, 0.2]))
    table = direction_table(logits_of, 4, 2 * torch.eye(4))
    ranking = rank_directions(*effects(table, of_margins(margins), target))
    assert ranking.direction.tolist() == [1, 2, 3, 0]
    assert ranking.sign.tolist() == [-towards, towards, towards, towards]
    assert ranking.mean_change.tolist() == pytest.approx([1.8, 0.6, 0.4, 0.2])
    assert ranking.alone.tolist() == [3, 2, 1, 1]
    assert ranking.newly.tolist() == [3, 0, 0, 0]
    assert ranking.explained_by.tolist() == [0, 0, 0, -1]
    assert ranking.covered == 0.75


#: The first two directions help the same two images, the third one the others.
COVER = from_columns([4.0, 4, 1, 1, 0], [3.0, 3, 1, 1, 0], [0.0, 0, 3, 2, 1])


@pytest.mark.parametrize(
    ("reaverage", "directions", "means", "newly", "explained_by"),
    [
        (False, [0, 1, 2], [2.0, 1.6, 1.2], [2, 0, 1], [0, 0, 2, -1, -1]),
        # Of three images left, the second direction gains 2 / 3 and the third 2; of two, 1 / 2.
        (True, [0, 2, 1], [2.0, 2.0, 0.5], [2, 1, 0], [0, 0, 1, -1, -1]),
    ],
)
def test_the_cover_of_a_table_made_by_hand(
    reaverage: bool, directions: list[int], means: list[float], newly: list[int], explained_by: list[int]
) -> None:
    ranking = rank_directions(COVER, COVER > 2, reaverage=reaverage)
    assert ranking.direction.tolist() == directions
    assert ranking.sign.tolist() == [1, 1, 1]
    assert ranking.mean_change.tolist() == pytest.approx(means)
    assert ranking.alone.tolist() == [[2, 2, 1][direction] for direction in directions]
    assert ranking.newly.tolist() == newly
    assert ranking.explained_by.tolist() == explained_by
    assert ranking.covered == pytest.approx(0.6)
    shorter = rank_directions(COVER, COVER > 2, 2, reaverage=reaverage)
    assert shorter.direction.tolist() == directions[:2]
    assert shorter.covered == pytest.approx(sum(newly[:2]) / 5)


@pytest.mark.parametrize(("reaverage", "listed"), [(False, [0, 1]), (True, [0])])
def test_a_list_goes_on_when_all_is_explained_unless_what_remains_is_averaged(
    reaverage: bool, listed: list[int]
) -> None:
    score = from_columns([4.0, 4.0], [1.0, 3.0])
    ranking = rank_directions(score, score > 3.5, reaverage=reaverage)
    assert ranking.direction.tolist() == listed
    assert ranking.newly.tolist() == [2, 0][: len(listed)]


@pytest.mark.parametrize("reaverage", [False, True])
@pytest.mark.parametrize("both_signs", [False, True])
def test_more_directions_never_explain_less(reaverage: bool, both_signs: bool) -> None:
    score = torch.randn(40, 6, 2, generator=torch.Generator().manual_seed(0)) + 0.3
    options = {"reaverage": reaverage, "both_signs": both_signs}
    rankings = [rank_directions(score, score > 1.5, k, **options) for k in range(1, 13)]
    covered = [ranking.covered for ranking in rankings]
    assert covered == sorted(covered)
    assert covered[0] < covered[-1]
    longest = rankings[-1]
    for k, ranking in enumerate(rankings, start=1):
        length = min(k, len(longest.direction))
        assert torch.equal(ranking.direction, longest.direction[:length])
        assert ranking.covered == pytest.approx(longest.newly[:length].sum().item() / 40)
    assert (len(longest.direction) > 6) == both_signs


@pytest.mark.parametrize("reaverage", [False, True])
def test_ties_go_to_the_lower_index(reaverage: bool) -> None:
    score = torch.ones(3, 4, 2)
    ranking = rank_directions(score, score > 2, reaverage=reaverage)
    assert ranking.direction.tolist() == [0, 1, 2, 3]
    assert ranking.sign.tolist() == [1, 1, 1, 1]
    both = rank_directions(score, score > 2, reaverage=reaverage, both_signs=True)
    assert both.direction.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert both.sign.tolist() == [1, -1] * 4


def test_a_direction_is_followed_the_better_way_only() -> None:
    score = torch.tensor([[[1.0, 2.0], [1.5, -1.0]]])
    better = rank_directions(score, score > 0)
    assert list(zip(better.direction.tolist(), better.sign.tolist(), strict=True)) == [(0, -1), (1, 1)]
    both = rank_directions(score, score > 0, both_signs=True)
    assert list(zip(both.direction.tolist(), both.sign.tolist(), strict=True)) == [(0, -1), (1, 1), (0, 1)]


def test_what_does_not_help_on_average_is_dropped() -> None:
    score = from_columns([2.0, -1.0], [3.0, -3.0], [0.0, 0.0])
    score[:, 2] = -1
    ranking = rank_directions(score, score > 0)
    assert ranking.direction.tolist() == [0]
    assert ranking.explained_by.tolist() == [0, -1]


def test_the_published_code_leaves_out_directions_that_help_both_ways() -> None:
    score = torch.tensor([[[1.0, 9.0], [-1.0, 2.0], [3.0, 0.0]]])
    ranking = rank_directions(score, score > 0, scoring="paper_code")
    assert ranking.direction.tolist() == [2, 1]
    assert ranking.sign.tolist() == [1, -1]


@pytest.mark.parametrize("reaverage", [False, True])
def test_no_images_are_ranked_by_no_direction(reaverage: bool) -> None:
    score = torch.zeros(0, 3, 2)
    ranking = rank_directions(score, score > 0, reaverage=reaverage)
    assert [len(value) for value in ranking] == [0] * 6
    assert ranking.covered == 0


# The result


def search_result() -> SearchResult:
    """Builds the result of six images on a line; the reconstruction of the fourth is classified differently."""
    margins = torch.tensor([-0.5, 0.5, -1.5, -0.2, 2.0, -4.0])
    logits_of = linear_logits(margins, torch.tensor([1.0, -2.0]))
    return SearchResult(
        index=torch.tensor([4, 8, 15, 16, 23, 42]),
        vectors=torch.eye(2),
        spread=torch.tensor([0.5, 1.0]),
        steps=torch.ones(2),
        table=direction_table(logits_of, 6, torch.eye(2)),
        before=of_margins(margins),
        predicted=(margins > 0).long(),
        kept=torch.tensor([True, True, True, False, True, True]),
        forward_passes=24,
        seconds=0.25,
    )


def test_a_result_comes_back_from_a_file() -> None:
    result, file = search_result(), io.BytesIO()
    torch.save(result.to_plain(), file)
    file.seek(0)
    plain = torch.load(file, weights_only=True)
    back = SearchResult.from_plain(plain, torch.device("cpu"))
    for name in SearchResult.__dataclass_fields__:
        old, new = getattr(result, name), getattr(back, name)
        assert torch.equal(old, new) if isinstance(old, Tensor) else old == new
    elsewhere = SearchResult.from_plain(plain, torch.device("meta"))
    assert elsewhere.table.device.type == elsewhere.kept.device.type == "meta"
    assert elsewhere.forward_passes == 24


def test_a_result_ranks_images_that_are_kept_and_of_the_source() -> None:
    result = search_result()
    assert result.images(0).tolist() == [0, 2, 5]
    assert result.images(1).tolist() == [1, 4]
    up, down = result.ranking(0, 1, 8), result.ranking(1, 0, 8)
    assert up.direction.tolist() == down.direction.tolist() == [1, 0]
    assert up.sign.tolist() == [-1, 1]
    assert down.sign.tolist() == [1, -1]
    assert up.explained_by.tolist() == [0, 0, -1]
    # A tie at 0 is not decided for the target.
    assert down.explained_by.tolist() == [0, -1]
    assert result.ranking(0, 1, 1).direction.tolist() == [1]
    assert len(replace(result, kept=~result.kept).ranking(1, 0, 8).direction) == 0


def test_a_result_is_ranked_as_is_asked() -> None:
    result = search_result()
    result = replace(
        result,
        table=torch.stack([-COVER / 2, COVER / 2], dim=-1) - 1.25 * torch.tensor([-1.0, 1.0]),
        before=of_margins(torch.full((5,), -2.5)),
        predicted=torch.zeros(5, dtype=torch.int64),
        kept=torch.ones(5, dtype=torch.bool),
    )
    fixed, again = result.ranking(0, 1, 8), result.ranking(0, 1, 8, reaverage=True)
    assert fixed.direction.tolist() == [0, 1, 2]
    assert again.direction.tolist() == [0, 2, 1]
    published = result.ranking(0, 1, 8, scoring="paper_code")
    expected = (result.table[:, 0, 0, 1].sigmoid() - result.before[:, 1].sigmoid()).double().mean().item()
    assert published.mean_change[0].item() == pytest.approx(expected, abs=1e-6)
