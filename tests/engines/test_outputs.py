"""What a classifier's numbers mean: softmax, sigmoid or nothing."""

import numpy as np
import pytest
from tokexport.engines.outputs import activation_of, class_scores, heading, probabilities, score_words

from tokexport import UsageError

LOGITS = np.float32([[1, 3, 2], [-700, 0, 700]])


def test_softmax_sums_to_one_and_survives_large_logits():
    p = probabilities(LOGITS)
    assert np.allclose(p.sum(1), 1) and np.allclose(p[0], np.exp([1, 3, 2]) / np.exp([1, 3, 2]).sum()) and p[1, 2] == 1


def test_sigmoid_is_of_each_class_alone():
    p = probabilities(LOGITS, "sigmoid")
    assert np.allclose(p[0], 1 / (1 + np.exp(-LOGITS[0].astype(float)))) and p[1].tolist() == [0, 0.5, 1]


def test_one_class_is_never_a_constant_hundred_percent():
    rows = class_scores(np.float32([[0.3], [-2.0]]))
    assert [round(r[0].probability, 4) for r in rows] == [0.5744, 0.1192] and rows[1][0].logit == -2
    assert score_words(rows[0][0], None, 1) == " 57.4%  class 0 (logit 0.3)" and "sigmoid" in heading(None, 1)


def test_the_highest_come_first_with_their_labels():
    rows = class_scores(LOGITS, labels=("a", "b", "c"), top=2)
    assert [(s.label, s.index) for s in rows[0]] == [("b", 1), ("c", 2)]
    assert class_scores(LOGITS, labels=("a",))[0][0].label == "class 1"


def test_without_an_activation_there_are_no_probabilities():
    assert probabilities(LOGITS, "none") is None
    score = class_scores(LOGITS, "none")[0][0]
    assert score.probability is None and score_words(score, "none", 3) == "        3  class 1"
    assert "no probabilities" in heading("none", 3) and "several labels" in heading("sigmoid", 3)


def test_another_word_is_refused():
    assert activation_of(None, 1) == "sigmoid" and activation_of(None, 2) == "softmax"
    with pytest.raises(UsageError, match="wanted softmax, sigmoid or none"):
        activation_of("tanh", 2)
