"""Seeds mixed as numpy mixes them, and the checks of what is given."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from reference import refuses

from memdfa_lab.core.checks import (
    check_batch,
    check_int,
    check_number,
    check_type,
    first_difference,
    lookup,
    scalar_loss,
)
from memdfa_lab.core.seeds import mix


def test_mix_gives_the_first_word_of_numpys_seed_sequence():
    draw = random.Random(0)
    for words in (1, 2, 3, 4):
        for _ in range(50):
            numbers = [draw.getrandbits(32) for _ in range(words)]
            assert mix(*numbers) == np.random.SeedSequence(numbers).generate_state(1)[0]
    for numbers in ([0], [2**64 - 1, 7, 5], [2**128 - 1], [1, 2**70], [2**32 - 1] * 4):
        assert mix(*numbers) == np.random.SeedSequence(numbers).generate_state(1)[0]


@pytest.mark.parametrize("numbers", [[2**128], [1, 2, 3, 4, 5], [2**64, 2**32]])
def test_mix_refuses_more_than_128_bits(numbers):
    with refuses(ValueError, "128 bits"):
        mix(*numbers)


def test_first_difference_is_a_line_of_each_text():
    assert first_difference("a\n  b\nc", "a\n  d\ne") == ("b", "d")
    assert first_difference("a", "a\nb") == ("nothing", "b")
    assert first_difference("a\nb", "a") == ("b", "nothing")
    assert first_difference([1], [2]) == ("[1]", "[2]")
    assert first_difference("same", "same") == ("same", "same")


def test_what_is_right_passes():
    assert lookup("thing", "one", {"one": 1}) == 1
    assert (check_int("n", np.int64(3)), check_int("n", 0, 0), check_int("n", 7, 1, 7)) == (3, 0, 7)
    assert check_int("n", 0, 0, 0) == 0
    for number in (0, 1.5, np.float32(2)):
        check_number("x", number)
    check_type("f", 1, int, "a number")
    check_batch(torch.zeros(1, 1))


NAMES = {"mnist": 1, "mnist5k": 2}
X = torch.ones(2, 3)
REFUSED = {
    "another_case": (lambda: lookup("data", "MNIST", NAMES), ValueError, "'MNIST'", "did you mean 'mnist'", "mnist5k"),
    "nothing_near": (
        lambda: lookup("data", "xyz", NAMES),
        ValueError,
        "unknown data 'xyz' (there are: mnist, mnist5k)",
    ),
    "no_name": (lambda: lookup("data", ["mnist"], NAMES), ValueError, "unknown data ['mnist']"),
    "zero": (lambda: check_int("n", 0), ValueError, "n must be", "from 1 on", "got 0"),
    "float": (lambda: check_int("n", 2.0), ValueError, "got 2.0"),
    "bool": (lambda: check_int("n", True), ValueError, "got True"),
    "too_large": (lambda: check_int("n", 2**70, 0, 2**64), ValueError, "from 0 to 18,446,744,073,709,551,616"),
    "at_most_0": (lambda: check_int("n", 1, 0, 0), ValueError, "from 0 to 0", "got 1"),
    "negative": (lambda: check_number("x", -0.1), ValueError, "x must be", "from 0 on", "-0.1"),
    "not_above": (lambda: check_number("x", 0, or_more=False), ValueError, "above 0"),
    "infinite": (lambda: check_number("x", math.inf), ValueError, "inf"),
    "text": (lambda: check_number("x", "1"), ValueError, "'1'"),
    "kind": (lambda: check_type("f", 1, str, "a name"), TypeError, "f must be a name, not a int"),
    "no_tensor": (lambda: check_batch([[1.0]]), TypeError, "a list", "torch.as_tensor"),
    "complex": (lambda: check_batch(X + 1j), TypeError, "torch.complex64"),
    "uint16": (lambda: check_batch(X.to(torch.uint16)), TypeError, "torch.uint16", "x.float()"),
    "sparse": (lambda: check_batch(X.to_sparse()), TypeError, "torch.sparse_coo"),
    "one_example": (lambda: check_batch(X[0]), ValueError, "(N, ...)", "(3,)"),
    "empty": (lambda: check_batch(X[:0]), ValueError, "one example or more", "(0, 3)"),
    "labels": (
        lambda: scalar_loss(torch.nn.functional.cross_entropy, X, torch.tensor([0, 5])),
        ValueError,
        "(2, 3)",
        "from 0 to 5",
        "from 0 to 2",
    ),
    "no_loss": (lambda: scalar_loss(lambda logits, y: 3.0, X, X), ValueError, "scalar", "a float"),
    "constant": (lambda: scalar_loss(lambda logits, y: torch.ones(()), X, X), ValueError, "made from the logits"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_refused_in_one_line_that_says_what_was_given(case):
    check, error, *hints = REFUSED[case]
    with refuses(error, *hints):
        check()
