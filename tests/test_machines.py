"""Past one machine: what ranks hold and send; the simulated pipeline, whose times have a closed form."""

import sys

import pytest
from reference import refuses

import memdfa_lab as ml
from memdfa_lab.lab.machines import ORDERS, measure, simulate, steady

SIZES = [(1, 1), (1, 5), (4, 1), (4, 3), (4, 4), (4, 16), (7, 5)]
# the part of the time in which machines compute, M machines and K micro-batches, nothing on the wire
BUSY = {
    "bp": lambda M, K: K / (K + M - 1),
    "fa": lambda M, K: K / (K + M - 1),
    "dfa": lambda M, K: 2 * K / (K + max(K, M)),
    "memdfa": lambda M, K: 3 * K / (2 * K + max(K, M)),
}


@pytest.mark.slow
def test_traffic_is_that_of_a_ring_and_memory_is_flat_in_depth():
    networks = ["784-[32]x4-10", "784-[32]x8-10"]
    table = measure([1, 2], [("memdfa", network) for network in networks], batch=32)
    assert list(table["ranks"]) == [1, 1, 2, 2]
    for _, rows in table.groupby("ranks"):
        assert rows["peak_bytes"].nunique() == 1
    alone, two = table[:2], table[2:]
    weights = [4 * sum(p.numel() for p in ml.models.build(network).parameters()) for network in networks]
    assert list(alone["sent_bytes"]) == [0, 0]
    assert list(two["gradient_bytes"]) == weights
    if sys.platform == "linux":
        assert ((two["sent_bytes"] / two["gradient_bytes"]).between(1, 1.1)).all()  # 2 (R - 1) / R = 1


def test_a_batch_that_is_too_small_for_all_ranks_is_refused():
    with refuses(ValueError, "a batch of 3 has no example for each of 4 ranks"):
        measure([1, 4], [("bp", "784-[32]x4-10")], batch=3)


@pytest.mark.parametrize("rule", ORDERS)
@pytest.mark.parametrize(("machines", "micro_batches"), SIZES)
def test_machines_are_as_busy_as_the_closed_form_says(rule, machines, micro_batches):
    found = steady(simulate(rule, machines, micro_batches, batches=4))
    assert found["busy"] == pytest.approx(BUSY[rule](machines, micro_batches))
    units = {"bp": 3, "fa": 3, "dfa": 2, "memdfa": 3}[rule]
    assert found["rate"] == pytest.approx(found["busy"] / units)
    assert found["held"] == (1 if rule == "memdfa" else micro_batches)


@pytest.mark.parametrize("rule", ORDERS)
def test_nothing_begins_before_what_it_needs_and_no_machine_does_two_things_at_once(rule):
    wire = 0.3
    table = simulate(rule, 3, 4, batches=3, wire=wire, signal=0.1)
    assert len(table) == 3 * 4 * 3 * sum(map(len, ORDERS[rule]))
    at = table.set_index(["machine", "task", "batch", "micro_batch"])
    for (machine, task, batch, micro), start in at["start"].items():
        if task in ("forward", "recompute") and machine:
            assert start >= at.loc[(machine - 1, task, batch, micro), "end"] + wire
        if task == "backward" and machine < 2:
            assert start >= at.loc[(machine + 1, task, batch, micro), "end"] + wire
        if task != "forward":
            assert start >= at.loc[(2, "forward", batch, micro), "end"] + (wire if machine < 2 else 0)
        if task == "local gradient" and rule == "memdfa":
            assert start >= at.loc[(machine, "recompute", batch, micro), "end"]
        if task == "forward" and batch:  # the weights of the batch before are updated
            assert start >= at.xs(machine).xs(batch - 1, level="batch")["end"].max()
    for _, rows in table.sort_values("start").groupby("machine"):
        assert (rows["start"].to_numpy()[1:] >= rows["end"].to_numpy()[:-1]).all()


def test_the_wire_and_the_signal_cost_time():
    free = steady(simulate("dfa", 4, 4, 4))
    assert steady(simulate("dfa", 4, 4, 4, wire=0.5))["rate"] < free["rate"]
    assert steady(simulate("dfa", 4, 4, 4, signal=0.5))["rate"] == pytest.approx(4 / (4 + 4 * 1.5))


@pytest.mark.parametrize(
    ("name", "value"),
    [("rule", "dpa"), ("machines", 0), ("micro_batches", 0), ("batches", 0), ("wire", -1.0), ("signal", "a")],
)
def test_wrong_arguments_are_refused(name, value):
    with refuses(ValueError, name, repr(value)):
        simulate(**{"rule": "dfa", "machines": 2, "micro_batches": 2, name: value})


def test_one_batch_does_not_show_how_a_pipeline_settles():
    with refuses(ValueError, "two batches or more"):
        steady(simulate("bp", 2, 2, batches=1))
