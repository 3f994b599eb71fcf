from __future__ import annotations

import numpy as np
import pytest

from emoscale.data.synthetic import Synthetic


def test_the_same_number_gives_the_same_utterance_in_any_order() -> None:
    one = Synthetic(20, visual_width=4, acoustic_width=3, expressions=2)
    other = Synthetic(20, visual_width=4, acoustic_width=3, expressions=2)
    later = [other[i] for i in reversed(range(20))][::-1]
    for i in range(20):
        assert one[i].record().keys() == later[i].record().keys()
        assert one[i].text == later[i].text
        np.testing.assert_array_equal(one[i].visual, later[i].visual)
        np.testing.assert_array_equal(one[i].acoustic, later[i].acoustic)
    assert one[0].text != Synthetic(20, visual_width=4, acoustic_width=3, expressions=2, seed=1)[0].text


def test_shapes_are_those_of_the_manifest() -> None:
    source = Synthetic(300, visual_width=4, acoustic_width=3, expressions=2, lack=0.3)
    items = list(source)
    assert len(items) == len(source) == source.manifest["counts"]["utterances"] == 300
    assert len({item.id for item in items}) == 300
    for item in items:
        assert item.visual.shape[1] == source.manifest["visual"]["width"] == 4
        assert item.acoustic.shape[1] == source.manifest["acoustic"]["width"] == 3
        assert item.visual_emotion.shape == (len(item.visual), 2)
        assert len(item.visual) <= source.manifest["visual"]["max_frames"]
        assert len(item.acoustic) <= source.manifest["acoustic"]["max_frames"]
        np.testing.assert_allclose(item.visual_emotion.sum(1), 1.0, atol=2e-3)
    for lacking in ([not item.text for item in items], [not len(item.visual) for item in items], [not len(item.acoustic) for item in items]):
        assert 60 <= sum(lacking) <= 120


def test_nothing_lacks_and_no_teacher() -> None:
    source = Synthetic(50, visual_width=4, acoustic_width=3, expressions=0, lack=0.0)
    assert source.manifest["visual_emotion"] is None
    assert all(item.text and len(item.visual) and len(item.acoustic) for item in source)
    assert source[0].visual_emotion.shape == (len(source[0].visual), 0)


def test_it_ends() -> None:
    with pytest.raises(IndexError, match="utterance 3 of 3"):
        Synthetic(3, visual_width=4, acoustic_width=3, expressions=0)[3]
