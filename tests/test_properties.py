"""What holds for every network: random chains of layers, drawn by hypothesis, which shrinks what fails.

30 networks a property, always the same ones; HYPOTHESIS_PROFILE=deep (`make test-deep`) draws 500, each time others.
A network is drawn as the text that makes it, so that a failure can be copied into problems.py.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from problems import CLASSES, EVERY_RULE, OPTIMIZERS, STORAGES, Problem, Residual, Skip, make_rule, train
from reference import assert_identical, assert_same_training, train_plainly
from test_ledger import stepping_measured
from test_memory import check_account, events
from torch import Tensor, nn

from memdfa_lab.core.rules import RULES
from memdfa_lab.lab import losses
from memdfa_lab.memory import measure, predict

# Each is held to the measurement here, also where it has an operation that tests/test_proved.py does not meet.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:no test has shown")]

# ------------------------------------------------------------------------------------------------------- networks


def frozen(net: nn.Module, numbers: list[int]) -> nn.Module:
    """Freeze these parameters of a net."""
    for number, parameter in enumerate(net.parameters()):
        parameter.requires_grad_(number not in numbers)
    return net


SCOPE = {"nn": nn, "torch": torch, "Residual": Residual, "Skip": Skip, "frozen": frozen}
SMOOTH = ["Tanh", "Sigmoid", "GELU", "GELU('tanh')", "SiLU", "ELU", "Softplus", "Softsign"]
BENT = ["ReLU", "LeakyReLU", "LeakyReLU(0.3)", "PReLU", "Hardtanh", "ReLU6", "Hardswish", "Identity"]
ACTIVATIONS = [name if "(" in name else f"{name}()" for name in SMOOTH + BENT]
INPLACE = ["ReLU(inplace=True)", "LeakyReLU(0.2, inplace=True)", "ELU(inplace=True)", "Dropout(0.3, inplace=True)"]


CHANNELS, SMALL, STRIDE, GROUPS = st.integers(1, 6), st.integers(1, 3), st.integers(1, 2), st.sampled_from([1, 1, 2, 3])
MODES = st.sampled_from(["zeros", "zeros", "circular", "replicate"])
CONVOLUTION = "Conv{{d}}d({{c}}, {}, {}, {}, {}, {}, groups={}, bias={})".format
SAME = "Conv{{d}}d({{c}}, {}, 3, padding='same', groups={}, bias={}, padding_mode={!r})".format
TRANSPOSED = "ConvTranspose{{d}}d({{c}}, {}, {}, stride={}, groups={}, bias={})".format
POOL = "{}Pool{{d}}d({}, {}, {}, ceil_mode={})".format
BATCH_NORM = "BatchNorm{{b}}d({{c}}, momentum={}, affine={}, track_running_stats={})".format
UNITS = ["Skip(nn.Linear({n}, {n}), nn.Tanh())", "Skip(nn.Conv{d}d({c}, {c}, 3, padding=1), nn.ReLU())"]
OTHERS = ["Dropout(0.3)", "AlphaDropout(0.2)", "Dropout{d}d(0.4)", "Flatten()", "Flatten(2)", "ZeroPad{d}d(1)"]
OTHERS += ["Upsample(scale_factor=2)", "LayerNorm({shape})", "InstanceNorm{d}d({c}, affine=True)"]
OTHERS += [f"Adaptive{kind}Pool{{d}}d({n})" for kind in ("Avg", "Max") for n in (1, 2)]
# {c}: channels; {n}: the last size; {d}: the dimensions of a channel; {b}: the same, as BatchNorm counts them.
LAYERS = st.one_of(
    st.sampled_from(ACTIVATIONS),
    st.sampled_from(INPLACE),
    st.sampled_from(OTHERS),
    st.sampled_from(UNITS),
    st.builds("Residual({{c}}, {}, {}, {})".format, CHANNELS, STRIDE, st.booleans()),
    st.builds("Linear({{n}}, {})".format, st.integers(1, 8)),
    st.builds(CONVOLUTION, CHANNELS, SMALL, STRIDE, st.integers(0, 1), STRIDE, GROUPS, st.booleans()),
    st.builds(SAME, CHANNELS, GROUPS, st.booleans(), MODES),
    st.builds(TRANSPOSED, CHANNELS, SMALL, STRIDE, GROUPS, st.booleans()),
    st.builds(POOL, st.sampled_from(["Max", "Avg"]), SMALL, SMALL, st.integers(0, 1), st.booleans()),
    st.builds(BATCH_NORM, st.sampled_from([0.1, None]), st.booleans(), st.booleans()),
    st.builds("GroupNorm({}, {{c}})".format, SMALL),
    st.builds("Unflatten(1, (-1, {}))".format, SMALL),
    st.builds("Unflatten(1, (-1, {}, {}))".format, SMALL, SMALL),
)


def evaluated(text: str) -> Any:
    return eval(text, SCOPE)


def placed(template: str, h: Tensor, texts: list[str]) -> tuple[str, Tensor] | None:
    """Return the text of a layer behind others that put out h, and its output; None if it does not fit there."""
    d, shape = h.dim() - 2, list(h.shape[1:])
    text = template.format(c=shape[0], n=shape[-1], d=d, b=max(d, 1), shape=shape)
    if template in INPLACE and not (texts and texts[-1].startswith(("nn.Linear", "nn.Conv", "nn.BatchNorm"))):
        return None
    if text.startswith("Residual") and d != 2:
        return None
    text = text if text.startswith(("Skip", "Residual")) else f"nn.{text}"
    try:
        with torch.device("meta"):
            out = evaluated(text)(h)
    except (AttributeError, AssertionError, IndexError, RuntimeError, ValueError):
        return None
    return (text, out) if out.dim() <= 4 and 0 < out[0].numel() <= 150 else None


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    **losses.LOSSES,
    "smooth": partial(F.cross_entropy, label_smoothing=0.1),
}


@st.composite
def problems(draw: Any, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)) -> Problem:
    """Draw a chain of layers, from an input of one, two or three dimensions to CLASSES outputs."""
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=3)))
    h, texts, sizes = torch.empty(2, *shape, device="meta"), [], set(shape)
    for template in draw(st.lists(LAYERS, min_size=3, max_size=14)):
        layer = placed(template, h, texts)
        if layer is not None:
            texts.append(layer[0])
            h = layer[1]
            sizes |= set(h.shape[1:])
    if h.dim() > 2:
        texts.append("nn.Flatten()")
    texts.append(f"nn.Linear({h[0].numel()}, {CLASSES})")
    if draw(st.integers(0, 3)) == 0:
        texts.append(f"nn.{draw(st.sampled_from(ACTIVATIONS))}")
    start, stop = sorted(draw(st.tuples(*[st.integers(0, len(texts))] * 2)))
    if stop - start > 1 and draw(st.booleans()):
        texts[start:stop] = [f"nn.Sequential({', '.join(texts[start:stop])})"]
    text = f"nn.Sequential({', '.join(texts)})"
    with torch.device("meta"):
        count = len(list(evaluated(text).parameters()))
    if draw(st.integers(0, 4)) == 0:
        text = f"frozen({text}, {draw(st.lists(st.integers(0, count - 1), max_size=count - 1, unique=True))})"
    if draw(st.integers(0, 5)) == 0:
        text += ".eval()"
    # Where a size is 1, several strides are right, torch takes other ones without data, and its gradient of bfloat16
    # filters holds numbers that nobody has written.
    if 1 not in sizes and draw(st.integers(0, 3)) == 0:
        text += ".to(memory_format=torch.channels_last)"
    least = 2 if "Norm" in text or "Residual" in text else 1
    loss, batch = draw(st.sampled_from(list(LOSSES.values()))), draw(st.integers(least, 7))
    return Problem(text, partial(evaluated, text), shape, loss, draw(st.sampled_from(dtypes)), batch=batch)


OPTIMIZER = st.sampled_from(
    [
        *OPTIMIZERS.values(),
        partial(torch.optim.SGD, lr=0.05, weight_decay=0.1),
        partial(torch.optim.RMSprop, lr=0.01),
        partial(torch.optim.Adam, lr=0.01, amsgrad=True),
    ]
)
STORAGE = st.builds(
    lambda kind, seed, distribution: STORAGES[kind](seed, "normal" if kind == "shared" else distribution),
    st.sampled_from(list(STORAGES)),
    st.integers(0, 2**31),
    st.sampled_from(["he_normal", "normal", "uniform", "orthogonal"]),
)
CLIP = st.sampled_from([None, None, 0.1])
KEEP = st.sampled_from([0, 0, 500, 5000, math.inf])


def trained(*arguments: Any, **options: Any) -> Any:
    """Return what training leaves behind, or in which step it was refused since something was not finite."""
    rule, steps = make_rule(*arguments, **options), []
    try:
        return train(rule, arguments[1], 3, lambda: steps.append(1))
    except FloatingPointError as problem:
        return len(steps), str(problem)


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, tuple) or isinstance(b, tuple):
        assert a == b
    else:
        assert_same_training(a, b)


# ----------------------------------------------------------------------------------------------------- properties


@given(problems((torch.float32, torch.float64, torch.bfloat16)), OPTIMIZER, STORAGE, CLIP, KEEP)
def test_memdfa_trains_as_dfa_bit_for_bit(problem, optimizer, storage, clip, keep_bytes):
    dfa = trained("dfa", problem, optimizer, storage, clip_norm=clip)
    assert_same(dfa, trained("memdfa", problem, optimizer, storage, clip_norm=clip, keep_bytes=keep_bytes))


@given(problems(), st.sampled_from(list(OPTIMIZERS.values())))
def test_bp_trains_as_plain_autograd(problem, optimizer):
    bp = trained("bp", problem, optimizer)
    if not isinstance(bp, tuple):
        assert_same_training(bp, train_plainly(problem, optimizer, 3))


def check_predicted(problem: Problem, rule: str, optimizer: Any = "sgd", storage: Any = None, **options: Any) -> None:
    """Compare a prediction with the measurement, to the byte, and both with what is true of every account."""
    make, shape = OPTIMIZERS.get(optimizer, optimizer), tuple(problem.x.shape)
    predicted = predict(rule, problem.build(), shape, make, storage, loss_fn=problem.loss, **options)
    measured = measure(make_rule(rule, problem, make, storage, **options), problem.x, problem.y, warm_up=1)
    # The strides of a dimension of size 1 are anybody's choice: a product with it may come out transposed.
    one, other = ([(*e[:6], sorted(e[6]), e[7]) for e in events(trace)] for trace in (predicted, measured))
    assert one == other
    assert predicted.resting_by_category == measured.resting_by_category
    check_account(measured)


@given(problems(), st.sampled_from(list(EVERY_RULE)), OPTIMIZER, STORAGE, CLIP, KEEP)
def test_predicted_equals_measured_and_the_categories_sum(problem, rule, optimizer, storage, clip, keep_bytes):
    options: dict[str, Any] = {} if "step_in_backward" in rule else {"clip_norm": clip}
    if rule == "memdfa":
        options["keep_bytes"] = keep_bytes
    net = problem.build()
    if rule == "last_layer":  # it cannot train what is frozen
        assume(any(p.requires_grad for p in list(net.parameters())[-2:]))
    check_predicted(problem, rule, optimizer, storage, **options)


BIAS_ALONE = "frozen(nn.Sequential(nn.Conv1d(2, 3, 3), nn.Flatten(), nn.Linear(6, 5)), [0])"


LAYERS_OF_ENLARGED = "nn.Conv2d(6, 3, 2), nn.Tanh(), nn.MaxPool2d(2, 1, 1), nn.Flatten(), nn.Linear(12, 5)"
ENLARGED = f"nn.Sequential({LAYERS_OF_ENLARGED}).to(memory_format=torch.channels_last)"


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        pytest.param(BIAS_ALONE, (2, 4), id="bias_alone"),  # oneDNN makes the frozen filter's gradient as well
        pytest.param("nn.Sequential(nn.Linear(4, 5), nn.Mish())", (4,), id="mish"),  # many operations on other devices
        pytest.param(ENLARGED, (6, 2, 2), id="enlarged"),  # 1 x 1 images in channels last have two right strides
    ],
)
@pytest.mark.parametrize("rule", ["bp", "memdfa"])
def test_what_differs_on_other_devices_is_predicted(text, shape, rule):
    check_predicted(Problem(text, partial(evaluated, text), shape), rule)


@given(problems(), st.sampled_from(list(RULES)), OPTIMIZER, STORAGE)
def test_measuring_changes_nothing(problem, rule, optimizer, storage):
    plain, seen = (make_rule(rule, problem, optimizer, storage) for _ in range(2))
    assert_same_training(train(plain, problem, 2), train(stepping_measured(seen), problem, 2))


@given(problems(), st.sampled_from(list(RULES)), OPTIMIZER, STORAGE)
def test_a_saved_state_goes_on_bit_for_bit(problem, rule, optimizer, storage):
    first = make_rule(rule, problem, optimizer, storage)
    train(first, problem, 1)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = make_rule(rule, problem, optimizer, type(storage)(seed=99))
    second.load_state_dict(torch.load(file, weights_only=True))
    assert_identical(second.state_dict(), first.state_dict())
    assert_same_training(train(first, problem, 2), train(second, problem, 2))


@given(problems(), OPTIMIZER, st.integers(1, 3000))
def test_what_is_kept_stays_within_keep_bytes(problem, optimizer, keep_bytes):
    def peak(keep: float) -> int:
        rule = make_rule("memdfa", problem, optimizer, "regenerated", keep_bytes=keep)
        return measure(rule, problem.x, problem.y, warm_up=1).peak_bytes

    assert peak(keep_bytes) <= peak(0) + keep_bytes


@pytest.mark.parametrize("rule", RULES)
def test_a_frozen_filter_is_left_no_gradient(rule):
    problem = Problem(BIAS_ALONE, partial(evaluated, BIAS_ALONE), (2, 4))
    learner = make_rule(rule, problem)
    learner.step(problem.x, problem.y)
    assert all(p.grad is None for p in learner.blocks.parameters())


@pytest.mark.parametrize("wrong", ["bp", "fa"])
def test_the_networks_tell_rules_apart(wrong):
    """Else the properties would hold for nothing."""

    @given(problems())
    @settings(max_examples=30, derandomize=True)
    def trains_as_dfa(problem):
        assert_same(trained("dfa", problem), trained(wrong, problem))

    with pytest.raises(AssertionError):
        trains_as_dfa()
