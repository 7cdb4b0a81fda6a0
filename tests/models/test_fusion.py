"""Fusion: one row a part, dropped by its input, the same four tokens whatever the other parts are."""

import pytest
import torch

from prefgen.errors import CheckpointError
from prefgen.models.fusion import FusionShape, UserFusion

SHAPE = FusionShape(parts=("aligned", "core", "image"), widths=(6, 10, 4), cross_width=8)


@pytest.fixture
def fusion():
    torch.manual_seed(0)
    return UserFusion(SHAPE)


def draw_parts(count=5, *, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 3 + 2 * torch.randn(count, width, generator=generator)
        for name, width in zip(SHAPE.parts, SHAPE.widths, strict=True)
    }


def test_rows_hold_one_part_each(fusion):
    parts = draw_parts()
    rows = fusion.rows(parts)
    assert rows.shape == (5, 3, 20)
    expected = torch.zeros(5, 3, 20)
    expected[:, 0, :6], expected[:, 1, 6:16], expected[:, 2, 16:] = (parts[name] for name in SHAPE.parts)
    assert torch.equal(rows, expected)
    assert fusion(rows).shape == (5, SHAPE.num_user_tokens, 8)


def test_dropping_a_part_zeroes_its_input_only(fusion):
    parts = draw_parts()
    keep = {"core": torch.tensor([True, False, True, True, True])}
    rows, full = fusion.rows(parts, keep=keep), fusion.rows(parts)
    changed = (rows != full).flatten(2).any(-1)
    assert changed.nonzero().tolist() == [[1, 1]]
    assert torch.equal(rows[1, 1], torch.zeros(20))
    tokens = fusion(rows)
    torch.testing.assert_close(tokens[1, 4:8], fusion(fusion.null_rows(1))[0, 4:8])
    assert bool(tokens[1, 4:8].any()), "bias and LayerNorm make tokens of a zero row: those mean 'not known'"
    without = fusion.rows({name: value for name, value in parts.items() if name != "core"})
    assert torch.equal(without[:, 1], torch.zeros(5, 20))


def test_dropping_with_values_that_are_not_finite(fusion):
    parts = draw_parts()
    parts["image"][2] = float("nan")
    keep = {"image": torch.tensor([True, True, False, True, True])}
    assert bool(fusion.rows(parts, keep=keep).isfinite().all())


def test_parts_are_standardised_by_training_users(fusion):
    parts = draw_parts(200)
    parts["core"][:, 3] = 7.0
    fusion.standardise(parts)
    rows = fusion.rows(parts)
    for index, span in enumerate((slice(0, 6), slice(6, 16), slice(16, 20))):
        values = rows[:, index, span]
        torch.testing.assert_close(values.mean(0), torch.zeros(values.shape[1]), rtol=0, atol=1e-5)
        assert float(values.std(0).max()) < 1.01
    assert bool(rows.isfinite().all()), "a coordinate that never moves must not be divided by zero"


def test_a_part_may_fill_all_rows():
    shape = FusionShape(parts=("image", "image", "image"), widths=(4, 4, 4), cross_width=8)
    rows = UserFusion(shape).rows({"image": torch.ones(2, 4)})
    assert torch.equal(rows.sum(-1), torch.full((2, 3), 4.0))
    assert shape.num_user_tokens == SHAPE.num_user_tokens


def test_wrong_parts_are_refused_with_words(fusion):
    with pytest.raises(CheckpointError, match="core embedding of width 9 for a user adapter of 10"):
        fusion.rows({**draw_parts(), "core": torch.ones(5, 9)})
    with pytest.raises(CheckpointError, match="at least one of aligned, core, image"):
        fusion.rows({})
    with pytest.raises(CheckpointError, match="'text' is not one of"):
        FusionShape(parts=("text",), widths=(3,), cross_width=8)


def test_aligned_tokens_begin_as_the_embeddings_themselves():
    torch.manual_seed(0)
    fusion = UserFusion(FusionShape(parts=("core", "aligned"), widths=(3, 8), cross_width=8))
    torch.nn.init.zeros_(fusion.proj.weight)
    torch.nn.init.zeros_(fusion.proj.bias)
    aligned = torch.nn.functional.layer_norm(torch.randn(50, 8), (8,)) * 0.7 + 0.2
    fusion.standardise({"aligned": aligned, "core": torch.randn(50, 3)})
    fusion.begin_in_text_space(aligned)
    tokens = fusion(fusion.rows({"aligned": aligned, "core": torch.randn(50, 3)}))
    for token in tokens[:, 4:].unbind(1):
        torch.testing.assert_close(token, aligned, atol=1e-3, rtol=0)
    unknown = fusion(fusion.null_rows(1))[0]
    mean = torch.nn.functional.layer_norm(aligned.mean(0), (8,)) * 0.7 + 0.2
    torch.testing.assert_close(unknown[4], mean, atol=2e-3, rtol=0)
    torch.testing.assert_close(unknown[0], mean, atol=2e-3, rtol=0)


def test_aligned_embeddings_of_another_width_cannot_begin_as_text(fusion):
    with pytest.raises(CheckpointError, match="width 6 cannot begin as text of width 8"):
        fusion.begin_in_text_space(draw_parts()["aligned"])
