"""Categories, tokens and goals: tables, padding, order."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrl_amago.modules import CategoryEmbedding, GoalEmbedding, GridEmbedding, TokenEmbedding


@given(sizes=st.lists(st.integers(1, 7), min_size=1, max_size=5))
def test_every_component_has_rows_of_its_own(sizes):
    embedding = CategoryEmbedding(sizes, embedding_size=3)
    assert embedding.table.num_embeddings == sum(sizes)
    rows = embedding.table.weight.detach().split(sizes)
    value = torch.stack([torch.randint(size, (11,)) for size in sizes], -1)
    expected = torch.cat([row[value[:, i]] for i, row in enumerate(rows)], -1)
    assert torch.equal(embedding(value), expected)
    for bad in (value.clone().index_fill_(1, torch.tensor([len(sizes) - 1]), sizes[-1]), value - 9):
        with pytest.raises(ValueError, match=r"a category must be in \[0, size\)"):
            embedding(bad)


def test_categories_of_any_shape():
    scalar = CategoryEmbedding([4], shape=(), embedding_size=2)
    assert scalar(torch.tensor(3)).shape == (2,)
    grid = CategoryEmbedding([4] * 6, shape=(2, 3), embedding_size=2)
    assert grid(torch.zeros(5, 2, 3, dtype=torch.uint8)).shape == (5, 12)
    assert grid(torch.zeros(0, 2, 3, dtype=torch.long)).shape == (0, 12)


@pytest.mark.parametrize("ordered", [False, True])
@given(data=st.data())
def test_missing_tokens_have_no_influence(ordered, data):
    embedding = TokenEmbedding(6, 9, output_size=4, padding_token=0, ordered=ordered, mask_key="m")
    length = data.draw(st.integers(0, 6))
    there = torch.arange(6) < length
    tokens = torch.randint(1, 9, (1, 6))
    by_token = embedding(torch.where(there, tokens, 0))
    by_mask = embedding(tokens, there.unsqueeze(0))
    # Garbage under the mask, out of range at that.
    garbage = embedding(torch.where(there, tokens, -77), there.unsqueeze(0))
    torch.testing.assert_close(by_token, by_mask)
    torch.testing.assert_close(by_mask, garbage)
    turned = torch.where(there, tokens.flip(-1).roll(length, -1), 0)
    same_order = torch.equal(turned, torch.where(there, tokens, 0))
    if not ordered:
        torch.testing.assert_close(embedding(turned), by_token)
    elif not same_order:
        assert not torch.allclose(embedding(turned), by_token)


def test_the_padding_token_need_not_be_a_token():
    embedding = TokenEmbedding(3, 5, padding_token=-1)
    embedding(torch.tensor([[4, -1, -1]]))
    with pytest.raises(ValueError, match=r"a token must be in \[0, size\) with size 5, .* to 5"):
        embedding(torch.tensor([[5, -1, -1]]))


@pytest.mark.parametrize("padding", [-1.0, math.nan])
@pytest.mark.parametrize("number", [0, 1, 3])
def test_missing_goals_have_no_influence_nor_gradient(padding, number):
    embedding = GoalEmbedding(3, 2, output_size=4, padding=padding)
    goals = torch.full((1, 3, 2), padding)
    goals[:, :number] = torch.rand(1, number, 2)
    goals.requires_grad_()
    out = embedding(goals)
    assert out.isfinite().all()
    masked = GoalEmbedding(3, 2, output_size=4, mask_key="there")
    masked.load_state_dict(embedding.state_dict())
    there = (torch.arange(3) < number).unsqueeze(0)
    torch.testing.assert_close(out, masked(goals, there))
    out.sum().backward()
    assert goals.grad.isfinite().all()
    assert not goals.grad[:, number:].any()
    for name, parameter in embedding.named_parameters():
        assert parameter.grad.isfinite().all(), name


def test_one_padded_number_does_not_make_a_goal_missing():
    embedding = GoalEmbedding(2, 2, padding=0.0)
    goals = torch.tensor([[[0.0, 0.5], [0.0, 0.0]]])
    alone = embedding(goals)
    assert not torch.allclose(alone, embedding(torch.zeros_like(goals)))


def test_how_many_goals_are_left_is_seen():
    embedding = GoalEmbedding(3, 1, padding=-1.0, ordered=False)
    one = embedding(torch.tensor([[[0.5], [-1.0], [-1.0]]]))
    two = embedding(torch.tensor([[[0.5], [0.5], [-1.0]]]))
    assert not torch.allclose(one, two)


def test_goals_of_tokens():
    embedding = GoalEmbedding(2, 3, num_tokens=10, padding=-1, output_size=4)
    assert embedding.table.num_embeddings == 10
    goals = torch.tensor([[[1, 2, 9], [-1, -1, -1]]])
    assert embedding(goals).shape == (1, 4)
    with pytest.raises(ValueError, match=r"a token must be in \[0, size\) with size 10"):
        embedding(goals + 2)


def test_order_of_goals_is_an_argument():
    goals = torch.rand(1, 3, 2)
    ordered, unordered = GoalEmbedding(3, 2), GoalEmbedding(3, 2, ordered=False)
    assert not torch.allclose(ordered(goals), ordered(goals.flip(1)))
    torch.testing.assert_close(unordered(goals), unordered(goals.flip(1)))


@pytest.mark.parametrize("value", [[-1, 2], [3, 2], [2, -1], [2, 5]])
def test_a_value_out_of_range_is_never_another_components_row(monkeypatch, value):
    embedding = CategoryEmbedding([3, 5], embedding_size=4)
    with pytest.raises(ValueError, match=r"in \[0, size\) with size \[3, 5\]"):
        embedding(torch.tensor([value]))
    monkeypatch.setattr(
        torch.compiler, "is_compiling", lambda: True
    )  # as where it isn't looked for
    with pytest.raises(IndexError):
        embedding(torch.tensor([value]))


def test_bytes_are_never_a_negative_padding_number():
    tokens = TokenEmbedding(2, num_tokens=256, output_size=4, padding_token=-1)
    goals = GoalEmbedding(2, 1, num_tokens=256, output_size=4, padding=-1)
    value = torch.tensor([[255, 3]], dtype=torch.uint8)
    assert torch.equal(tokens(value), tokens(value.long()))
    assert torch.equal(goals(value.unsqueeze(-1)), goals(value.long().unsqueeze(-1)))


def test_grid_looks_cells_up():
    """Every cell's features are its categories' rows of the tables, wherever it lies."""
    trunk = torch.nn.Flatten()
    grid = GridEmbedding((2, 3, 2), [4, 5], embedding_size=3, output_size=7, trunk=trunk)
    value = torch.stack([torch.randint(n, (6, 2, 3)) for n in (4, 5)], -1).to(torch.uint8)
    tables = grid.categories.table.weight.split([4, 5])
    cells = torch.cat([table[value[..., n].long()] for n, table in enumerate(tables)], -1)
    expected = grid.image.features(cells.movedim(-1, 1).flatten(1))
    torch.testing.assert_close(grid(value), expected)
    torch.testing.assert_close(grid(value.reshape(2, 3, 2, 3, 2)), expected.reshape(2, 3, 7))


@pytest.mark.parametrize(("shape", "sizes"), [((2, 3), [4]), ((2, 3, 2), [4])])
def test_grid_has_sizes_for_its_categories(shape, sizes):
    with pytest.raises(ValueError, match=r"\[H, W, C\] and C sizes, got shape"):
        GridEmbedding(shape, sizes)


def test_grid_refuses_ids_that_no_table_has():
    with pytest.raises(ValueError, match="must be in"):
        GridEmbedding((3, 3, 1), [4], trunk=torch.nn.Flatten())(torch.full((1, 3, 3, 1), 4))
