"""Each pair of options works, has no effect, or is refused in one line, as reports/options.csv has it."""

from __future__ import annotations

from pathlib import Path

import options
import pandas as pd
import pytest
import torch

import memdfa_lab as ml

COMMITTED = Path(__file__).parents[1] / "reports" / "options.csv"
IGNORED = ["Detected call of `lr_scheduler.step", "autograd runs"]  # the second: blocks that cannot be packed
pytestmark = [pytest.mark.filterwarnings(f"ignore:{words}") for words in IGNORED]


def test_a_message_that_was_changed_is_changed_in_the_table_too():
    """One pair of each outcome."""
    committed = pd.read_csv(COMMITTED)
    for pair in committed[committed["other"] != options.RANKS].drop_duplicates("outcome").itertuples():
        assert options.outcome(pair.one, pair.other) == pair.outcome


@pytest.mark.slow
def test_the_committed_table_is_what_each_pair_does():
    torch.set_num_threads(1)
    found, committed = options.table(), pd.read_csv(COMMITTED)
    pd.testing.assert_frame_equal(found, committed)
    assert not found["outcome"].str.contains("\n").any()


def test_all_rules_and_kinds_of_feedback_are_in_the_table():
    rules = {option.changes["rule"] for option in options.OPTIONS.values() if "rule" in option.changes}
    kinds = {option.changes["feedback"] for option in options.OPTIONS.values() if "feedback" in option.changes}
    assert rules == {*ml.RULES, *ml.BASELINES, *ml.LOCAL_RULES}
    assert kinds | {options.Run().feedback} == {*ml.feedback.KINDS, "learned"}


@pytest.mark.slow
def test_an_option_that_does_not_do_what_it_is_for_would_be_noticed(monkeypatch):
    monkeypatch.setattr(options, "train_alone", options.train_alone.__wrapped__)  # which keeps nothing
    monkeypatch.setitem(options.OPTIONS, "keep_bytes", options.Option("keep", {"of_rule": {"clip_norm": 0.01}}, {}))
    with pytest.raises(AssertionError, match="keep_bytes with MEM-DFA has other results"):
        options.outcome("MEM-DFA", "keep_bytes")
    monkeypatch.setitem(options.OPTIONS, "clip_norm", options.Option("clip", {"of_rule": {"clip_norm": 1e6}}))
    assert options.outcome("DFA", "clip_norm") == "no effect: clip_norm"
