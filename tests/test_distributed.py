"""Two ranks with half the batch each train as one process with the whole batch, and do not wait for the dead."""

import os
import socket
import subprocess
import sys
from subprocess import PIPE

import in_ranks
import pandas as pd
import pytest
import torch
from filelock import FileLock
from in_ranks import (
    DROP,
    EQUAL,
    LOADED,
    LOSS_RULES,
    LOSSES,
    STOPPED,
    build,
    conv_batchnorm,
    examples,
    fitted,
    learn,
    learn_dropped,
    learn_loss,
    peaks,
)
from reference import refuses

import memdfa_lab as ml
from memdfa_lab import cli
from memdfa_lab.lab.distributed import Group, RankLost, ranks

ALONE = Group()
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no torch.distributed")


def in_two_ranks(what, folder, timeout_s=300):
    """Run in_ranks.py twice on this machine's loopback, as torchrun would, and return what each printed, errors last.

    When rank 0 has ended, rank 1 is killed. AssertionError if rank 0 failed.
    """
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        ports = {"MASTER_PORT": str(one.getsockname()[1]), "SECOND_PORT": str(other.getsockname()[1])}
    env = {**os.environ, **ports, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    env |= {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    command = [sys.executable, "-W", "error", in_ranks.__file__, what, str(folder)]
    each = [env | {"RANK": rank, "LOCAL_RANK": rank} for rank in ("0", "1")]
    first, second = (subprocess.Popen(command, env=one, text=True, stdout=PIPE, stderr=PIPE) for one in each)
    try:
        out, errors = first.communicate(timeout=timeout_s)
    finally:
        first.kill()
        second.kill()
    assert first.returncode == 0, errors
    return (out, errors), second.communicate()


@pytest.fixture(scope="session")
def both(tmp_path_factory):
    """Return what every case gave on rank 0 and on rank 1, and the folder; pytest's workers share one run."""
    folder = tmp_path_factory.getbasetemp()
    folder = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / "two_ranks"
    with FileLock(f"{folder}.lock"):
        if not (folder / "killed").exists():  # written last
            fitted(ALONE, folder / "one.pt", cut=6, tests=1)
            in_two_ranks("well", folder)
    return *(torch.load(folder / f"cases-{rank}", weights_only=False) for rank in (0, 1)), folder


def assert_same(ours, theirs, rtol=1e-12, atol=1e-12):
    assert ours["state"].keys() == theirs["state"].keys()
    for name, value in theirs["state"].items():
        torch.testing.assert_close(ours["state"][name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")
    if "history" in ours:
        table, other = (pd.DataFrame(result["history"]).drop(columns="seconds") for result in (ours, theirs))
        pd.testing.assert_frame_equal(table, other, rtol=1e-7, atol=0)


@pytest.mark.parametrize("name", EQUAL)
def test_two_ranks_with_half_the_batch_each_are_one_process_with_all_of_it(both, name):
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if name == "layouts" else {"rtol": 1e-12, "atol": 1e-12}
    expected = learn(ALONE, **EQUAL[name])
    for ours in (both[0][name], both[1][name]):
        assert_same(ours, expected, **tolerance)
        losses, theirs = (torch.tensor(one["losses"], dtype=torch.float64) for one in (ours, expected))
        torch.testing.assert_close(losses, theirs, **tolerance)
        torch.testing.assert_close(ours["output"], expected["output"], **tolerance)


@pytest.mark.parametrize("rule", LOSS_RULES)
@pytest.mark.parametrize("name", LOSSES)
def test_two_ranks_learn_by_any_loss_as_one_process_does(both, name, rule):
    expected, (*_, known) = learn_loss(ALONE, name, rule), LOSSES[name]
    ranks_found = [both[rank]["loss", name, rule] for rank in (0, 1)]
    for ours in ranks_found:
        assert_same(ours, expected)
        assert ours["losses"] == pytest.approx(expected["losses"], rel=1e-12, abs=1e-12)
        assert ("the batch" not in ours["exchanged"]) == known
        assert ours["exchanged"].count("the loss") == (1 if known else 2)
    assert [sum(shares) for shares in zip(*(ours["shares"] for ours in ranks_found), strict=True)] == pytest.approx(
        expected["shares"]
    )


@pytest.mark.parametrize(
    ("name", "hint"),
    {
        "the form of y": "ranks differ in y: torch.float32 (n, 2) on rank 0, torch.float32 (n, 3) on rank 1",
        "y that is no tensor": "ValueError: several ranks gather y for this loss: it must be a tensor (n, ...)",
        "y that is no batch": "got torch.float32 (5) for logits (6, 5)",
        "other class weights": "ValueError: ranks differ in weight: [1.0, 1.0",
        "another loss on one rank": "ranks differ in loss: cross_entropy on rank 0, a function of the whole batch",
        "another function on one rank": "ValueError: ranks differ in the loss of one batch: ",
        "random numbers": "let it draw no random numbers",
        "no label that counts": "FloatingPointError: the loss or its gradient is not finite",
    }.items(),
)
def test_losses_that_ranks_cannot_share_are_refused_by_all_of_them(both, name, hint):
    for rank in (0, 1):
        problem, unchanged = both[rank]["losses refused"][name]
        assert hint in problem
        assert "\n" not in problem
        assert unchanged


@pytest.mark.parametrize(("rule", "learns"), DROP)
def test_a_unit_that_some_ranks_drop_learns_from_the_others(both, rule, learns):
    expected = learn_dropped(ALONE, rule, learns)
    for rank in (0, 1):
        ours = both[rank]["dropped", rule, learns]
        assert_same(ours, expected)
        assert ours["losses"] == pytest.approx(expected["losses"], rel=1e-12)


def test_without_synchronising_each_rank_has_statistics_of_its_own(both):
    net, (x, y) = build(conv_batchnorm), examples(12, seed=0)
    for half in (slice(6), slice(6, 12)):
        (torch.nn.functional.cross_entropy(net(x[half]), y[half]) / 2).backward()
    expected = {name: parameter - 0.1 * parameter.grad for name, parameter in net.named_parameters()}
    for rank in (0, 1):
        alone = build(conv_batchnorm)
        alone(x[6 * rank :][:6])
        expected |= {name: value for name, value in alone.state_dict().items() if name == "1.running_mean"}
        ours = dict(zip(alone.state_dict(), both[rank]["own statistics"]["state"].values(), strict=True))
        for name, value in expected.items():
            torch.testing.assert_close(ours[name], value.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rule", ml.RULES)
def test_memory_of_a_rank_is_flat_in_depth_for_memdfa_alone(both, rule):
    block = 8 * (72 * 12 + 12)
    for rank in (0, 1):
        (shallow, deep), gradients = both[rank]["peaks", rule]
        if rule == "memdfa":
            assert shallow == deep
            assert max(gradients) <= block
        else:
            assert deep > 1.5 * shallow
    (alone, _), _ = peaks(ALONE, rule)
    assert both[0]["peaks", rule][0][0] - alone <= block, "more than the gradients that one process need not make"


def test_what_is_not_finite_on_one_rank_stops_all_before_any_weight_changes(both):
    for rank in (0, 1):
        for problem, unchanged in both[rank]["not finite"]:
            assert problem.startswith("FloatingPointError: the loss or its gradient is not finite")
            assert unchanged


def test_fit_on_two_ranks_gives_the_history_and_weights_of_one_process(both):
    expected = fitted(ALONE)
    for rank in (0, 1):
        assert_same(both[rank]["fit"], expected)
    assert both[0]["fit"]["steps"][:4] == [12, 12, 12, 1]
    assert both[1]["fit"]["steps"][:4] == [11, 11, 11, 1]  # the last has none, and takes part all the same
    assert both[0]["files"] == ["fit.pt", "one.pt"]


def test_two_ranks_stop_at_the_same_epoch_by_the_same_metric(both):
    expected = fitted(ALONE, **STOPPED)
    assert len(expected["history"]) < 15
    for rank in (0, 1):
        assert_same(both[rank]["fit, stopped"], expected)


def test_ranks_take_their_parts_of_a_loaders_batches(both):
    expected = fitted(ALONE, **LOADED)
    for rank in (0, 1):
        assert_same(both[rank]["loader"], expected)
    assert both[1]["loader"]["steps"][:4] == [11, 11, 11, 1]


def test_all_ranks_evaluate_one_network_when_statistics_are_their_own(both):
    one, other = (both[rank]["fit, one's own statistics"] for rank in (0, 1))
    assert_same(one, other, rtol=0, atol=0)


def test_a_run_goes_on_with_another_number_of_ranks(both):
    for rank in (0, 1):
        cut = both[rank]["two to one"]
        assert (cut["history"], len(cut["steps"])) == ("interrupted", 7)  # asked in the 6th: the 7th tells the others
        assert len(both[rank]["one to two"]["steps"]) == 6
        assert_same(both[rank]["one to two"], fitted(ALONE, tests=1))
    ours = fitted(ALONE, both[2] / "two.pt")
    assert len(ours["steps"]) == 5
    assert_same(ours, fitted(ALONE))


def test_a_run_with_dropout_that_was_cut_goes_on_bit_for_bit(both):
    for rank in (0, 1):
        never_cut, cut, resumed = both[rank]["dropout"]
        assert cut["history"] == "interrupted"
        assert_same(resumed, never_cut, rtol=0, atol=0)
    assert not torch.equal(both[0]["drawn"], both[1]["drawn"])


@pytest.mark.parametrize("name", ["seed", "weights", "optimizer", "rule", "where training begins"])
def test_ranks_that_differ_are_refused_at_the_start(both, name):
    for rank in (0, 1):
        problem = both[rank]["refused"][name]
        assert problem.startswith(f"ValueError: ranks differ in {name}: ")
        assert "on rank 0, " in problem
        assert "\n" not in problem


def test_the_first_rank_downloads_before_the_others_look(both):
    assert [both[rank]["finds the download"] for rank in (0, 1)] == [False, True]


def assert_lost(folder, how):
    problem, waited_s, step = torch.load(folder / how, weights_only=False)
    assert problem.startswith("rank 0 of 2 waited for the loss of another rank, which has ended or is more than")
    assert step == 2
    assert waited_s < 60  # the timeout of those of whom one is killed, and twenty times that of those of whom one hangs


def test_a_rank_that_is_killed_ends_the_others_with_a_clear_error(both):
    assert_lost(both[2], "killed")


@pytest.mark.slow
def test_ranks_that_differ_or_hang_end_with_one_line_each(tmp_path):
    printed = in_two_ranks("ill", tmp_path)
    assert_lost(tmp_path, "hangs")
    for rank, (out, errors) in enumerate(printed):
        assert torch.load(tmp_path / f"status-{rank}") == 2
        assert out == ""
        assert errors.startswith("memdfa: ranks differ in feedback: ")
        assert errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun_trains_writes_and_prints_once(tmp_path):
    quick = ["train", "--rule", "memdfa", "bp", "--epochs", "1", "--batch-size", "150"]
    command = [*TORCHRUN, "-m", "memdfa_lab", *quick, "--out", str(tmp_path / "two"), "--dist-timeout", "50"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [done.stdout.count(text) for text in ("memdfa ", "histories and checkpoints are in")] == [1, 1]
    assert cli.main([*quick, "--out", str(tmp_path / "one")]) == 0
    for rule in ("memdfa", "bp"):
        two, one = (pd.read_csv(tmp_path / name / rule / "history.csv") for name in ("two", "one"))
        pd.testing.assert_frame_equal(two.drop(columns="seconds"), one.drop(columns="seconds"), rtol=1e-3)
        assert (tmp_path / "two" / rule / "checkpoint.pt").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_no_thread_of_the_ranks_is_left_when_they_part(both):
    """One that is left can abort the interpreter at its end."""
    for rank in (0, 1):
        during, after = both[rank]["threads"]
        assert during > after == 0


def test_without_torchrun_there_is_one_rank_and_no_process_group():
    with ranks() as group:
        assert (group.rank, group.size, group.device) == (0, 1, "cpu")
        assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("timeout_s", [0, -1, float("nan")])
def test_a_timeout_that_makes_no_sense_is_refused(timeout_s):
    with refuses(ValueError, f"above 0, got {timeout_s}"), ranks(timeout_s=timeout_s):
        pass


def test_ranks_that_never_come_and_a_gpu_that_is_not_there_are_named(monkeypatch):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}.items():
        monkeypatch.setenv(name, value)
    with refuses(RankLost, "not all of the 2 ranks have connected within 1 s"), ranks(timeout_s=1):
        pass
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with refuses(ValueError, "device 'cuda' is not there"), ranks("cuda"):
        pass
