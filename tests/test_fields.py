import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from genmed.fields import Field, Fields, image_and_label, one_hot, probabilities

FIELDS = image_and_label(("T1", "T2"), ("background", "front", "back"))


def test_split_undoes_join() -> None:
    values = {"image": torch.randn(2, 2, 3, 4, 5), "label": torch.randn(2, 3, 3, 4, 5)}
    z = FIELDS.join(values)
    assert z.shape == (2, FIELDS.channels, 3, 4, 5)
    for name, part in FIELDS.split(z).items():
        assert torch.equal(part, values[name])


def test_each_channel_gets_the_noise_level_of_its_field() -> None:
    assert FIELDS.spread(torch.tensor([[1.0, 2.0]])).tolist() == [[1, 1, 2, 2, 2]]


def test_unknown_or_repeated_names_are_refused() -> None:
    with pytest.raises(KeyError):
        FIELDS.slice("shape")
    with pytest.raises(ValueError, match="differ"):
        Fields(Field("image", "continuous", ("a",)), Field("image", "continuous", ("b",)))


@given(st.lists(st.integers(0, 3), min_size=1, max_size=20))
def test_one_hot_labels_are_certain_probabilities(classes: list[int]) -> None:
    labels = torch.tensor(classes).reshape(1, -1, 1, 1)
    soft = probabilities(one_hot(labels, 4))
    assert torch.equal(soft.argmax(dim=1), labels)
    assert set(soft.unique().tolist()) <= {0.0, 1.0}
    assert torch.equal(soft.sum(dim=1), torch.ones(labels.shape))
