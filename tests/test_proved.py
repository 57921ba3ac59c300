"""Operations one by one: measured is never above the allocator, predicted equals measured; the list of those proved."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import EVERY_RULE, OPTIMIZERS, PROBLEMS, STORAGES, Problem, make_rule, rotated, threads
from test_memory import events
from torch import Tensor, nn

from memdfa_lab.core.rules import RULES
from memdfa_lab.memory import measure, predict, shapes
from memdfa_lab.memory.crosscheck import allocator_trace, handed_on_bytes


def words(text: str) -> list[str]:
    return text.split()


SCOPE = {"torch": torch, "F": F, "nn": nn}
# Expressions in a matrix h (6, 4), its entries p between 0 and 1, a square matrix s, a positive definite one d,
# images c (6, 2, 2, 2), sequences t (6, 2, 4), labels y and a mask m
EXPRESSIONS = words(
    """
h.abs() p.log() p.log2() p.log10() p.log1p() h.exp() h.exp2() h.expm1() p.sqrt() p.rsqrt() p.reciprocal() h.sin()
h.cos() h.tan() h.sinh() h.cosh() h.tanh() h.asinh() h.atan() h.erf() h.erfc() p.erfinv() p.lgamma() p.digamma()
p.logit() h.sigmoid() h.sgn() h.sign() h.floor() h.ceil() h.round() h.trunc() h.frac() h.square() h.neg() h.sinc() h**3
p**p 2**h h+h h-2*h h*h p/(p+1) h.atan2(p) torch.hypot(h,p) h.fmod(2) h.remainder(2) torch.maximum(h,p) h.fmin(p)
h.clamp(-1,1) h.clamp_min(0) h.clamp(max=p) h.lerp(p,0.3) torch.addcmul(h,p,h) torch.addcdiv(h,h,p+1) h.logaddexp(p)
h.where(~m,p) torch.where(m,h,0.0) h.masked_fill(m,1.0) h.masked_fill(m,p.sum()) h.masked_select(m) h.nan_to_num()
h.copysign(p) torch.frexp(h)[0] torch.ldexp(h,y[:,None]) h+torch._int_mm(h.to(torch.int8),s.to(torch.int8)) h.sum(1)
h.mean(1) h.prod(1) h.prod() h.var(1) h.std(1) torch.var_mean(h,1)[1] h.norm() h.norm(dim=1) h.norm(1,dim=1)
h.norm(3,dim=1) h.logsumexp(1) h.max() h.max(1)[0] h.min(1)[0] h.amax(1) h.amin(1) h.aminmax(dim=1)[0] h.median(1)[0]
h.median() h.mode(1)[0] h.kthvalue(2,1)[0] h.topk(2)[0] h.sort(1)[0] h.cumsum(1) h.cumprod(1) h.logcumsumexp(1)
h.cummax(1)[0] h.cummin(1)[0] h.diff() h.dist(p) torch.cdist(h,p) F.pdist(h) h.renorm(2,0,1.0) torch.trapezoid(h) h[1:]
h[::2] h[:,1] h[y] h[m] h[y,1:] h[None].expand(3,6,4) h.select(0,2) h.narrow(1,1,2) h.unfold(1,2,1) h.diagonal()
h.tril() h.triu() s.diag() h.index_select(0,y) h.take(y) h.gather(1,y[:,None]%4) torch.take_along_dim(h,y[:,None]%4,1)
h.index_add(0,y,p) h.index_fill(0,y,1.0) h.index_copy(0,y.argsort(),p) h.index_put((y,),p) h.put(y,p[:,0])
h.scatter(1,y[:,None]%4,p[:,:1]) h.scatter_add(1,y[:,None]%4,p[:,:1]) h.scatter_reduce(1,y[:,None]%4,p,"amax")
torch.cat([h,p],1) torch.stack([h,p]) h.split(2,1)[0] torch.hstack(h.split(2)) h.chunk(2,1)[1] h.unbind(1)[2]
h.tensor_split(3)[1] h.flip(0) h.roll(1,0) h.rot90() h.t().contiguous() h.t().reshape(24) h.repeat(2,3)
h.repeat_interleave(2,0) h.tile(2) h.clone() h.double() h.half() h.bfloat16() h.new_zeros(3)+h[0,0]
h.fill_diagonal_(0.0) h.mul_(2) h.relu_() h.exp_() h.sigmoid_() h.add_(p) h.masked_fill_(m,0.0) h.clamp_(0,1)
h.copy_(p) h@p.t() h@h[0] torch.outer(h[0],p[0]) t.bmm(t.mT) torch.baddbmm(t@t.mT,t,t.mT) torch.addmv(h[:,0],h,p[0])
torch.einsum("ni,nj->ij",h,p) torch.kron(s,s) torch.tensordot(h,p,2) s.det() d.inverse() d.logdet()
torch.linalg.cholesky(d) torch.linalg.solve(d,s) torch.linalg.qr(s)[0] torch.linalg.svdvals(s) torch.linalg.eigvalsh(d)
torch.linalg.matrix_exp(s) torch.cross(h[:,:3],p[:,:3]) h.trace() h.softmax(1) h.log_softmax(1) F.softmin(h,1)
F.gumbel_softmax(h) F.relu(h) F.relu6(h) F.elu(h) F.selu(h) F.celu(h) F.gelu(h) F.gelu(h,approximate="tanh") F.silu(h)
F.mish(h) F.softplus(h) F.softsign(h) F.leaky_relu(h) F.rrelu(h,training=True) F.hardtanh(h) F.hardswish(h)
F.hardsigmoid(h) F.hardshrink(h) F.softshrink(h) F.tanhshrink(h) F.threshold(h,0.1,0.2) F.logsigmoid(h) F.glu(h)
F.prelu(h,p[0]) F.dropout(h) F.dropout1d(t) F.dropout2d(c) F.alpha_dropout(h) F.feature_alpha_dropout(c) F.normalize(h)
F.layer_norm(h,(4,)) F.layer_norm(h,(4,),p[0],p[1]) F.rms_norm(h,(4,)) F.group_norm(c,2) F.instance_norm(c)
F.local_response_norm(c,2) F.batch_norm(h,None,None,training=True) F.linear(h,s) F.bilinear(h,p,h[:2,:,None]*p[0])
F.embedding(y,h) F.embedding_bag(y[None],h) F.one_hot(y)*h[0,0] F.cosine_similarity(h,p) F.pairwise_distance(h,p)
F.conv1d(t,t[:,:,:2]) F.conv2d(c,c) F.conv_transpose2d(c,c[:2]) F.conv3d(c[:,None],c[:,None]) F.unfold(c,2)
F.fold(c.flatten(1)[:,:,None],2,2) F.pixel_shuffle(c.repeat(1,2,1,1),2) F.pad(h,(1,1)) F.pad(t,(1,1),"reflect")
F.pad(t,(1,1),"replicate") F.pad(t,(1,1),"circular") F.pad(c,(1,1,1,1),"reflect") F.pad(c,(1,1,1,1),"replicate")
F.max_pool1d(t,2) F.max_pool2d(c,2) F.max_pool3d(c[:,None],2) F.avg_pool1d(t,2) F.avg_pool2d(c,2)
F.avg_pool3d(c[:,None],2) F.lp_pool2d(c,2,2) F.adaptive_avg_pool1d(t,2) F.adaptive_avg_pool2d(c,1)
F.adaptive_max_pool2d(c,1) F.adaptive_avg_pool3d(c[:,None],1) F.adaptive_avg_pool3d(c[:,None],2)
F.fractional_max_pool2d(c,1,1)
F.max_unpool2d(*F.max_pool2d(c,2,return_indices=True),2) F.interpolate(t,scale_factor=2)
F.interpolate(t,scale_factor=2,mode="linear") F.interpolate(c,scale_factor=2)
F.interpolate(c,scale_factor=2,mode="bilinear") F.interpolate(c,scale_factor=2,mode="bicubic")
F.grid_sample(c,c.movedim(1,-1),align_corners=False)
F.affine_grid(c[:,:,:,0].repeat(1,1,2)[:,:,:3],(6,1,2,2),align_corners=False) F.channel_shuffle(c,2) F.mse_loss(h,p)
F.l1_loss(h,p) F.smooth_l1_loss(h,p) F.huber_loss(h,p) F.kl_div(h,p) F.binary_cross_entropy(p,p.detach())
F.binary_cross_entropy_with_logits(h,p) F.cross_entropy(h,y%4) F.cross_entropy(h,p) F.nll_loss(h,y%4)
F.nll_loss(c,y[:,None,None].expand(6,2,2)%2) F.poisson_nll_loss(h,p) F.gaussian_nll_loss(h,p,p)
F.hinge_embedding_loss(h,p) F.margin_ranking_loss(h,p,p) F.triplet_margin_loss(h,p,h+1) F.cosine_embedding_loss(h,p,y)
F.soft_margin_loss(h,y[:,None].expand(6,4)) F.multi_margin_loss(h,y%4) F.multilabel_soft_margin_loss(h,p)
F.multilabel_margin_loss(h,y[:,None].expand(6,4)%4)
F.ctc_loss(t.movedim(0,1).log_softmax(2),y[:,None]%3+1,torch.full((6,),2),torch.full((6,),1))
F.scaled_dot_product_attention(t,t,t) torch.special.i0(h) torch.special.ndtr(h) torch.special.xlog1py(h,p)
torch.xlogy(h,p) torch.special.entr(p) torch.polar(h,p).abs() torch.fft.rfft(h).abs()
torch.stft(h,4,window=torch.ones(4),return_complex=True).abs() torch.complex(h,p).angle()
torch.view_as_real(torch.complex(h,p)) torch.poisson(p) torch.bernoulli(p) torch.rand_like(h) torch.randn_like(h)
torch.nn.utils.rnn.pad_sequence([h,p]) torch.block_diag(h,p) torch.cartesian_prod(h[0],p[0]) torch.combinations(h[0])
torch.meshgrid(h[0],p[0],indexing="ij")[0] torch.corrcoef(h) torch.cov(h) torch.quantile(h,0.3) torch.gradient(h)[0]
"""
)


# What these put out, or run, depends on values, which a prediction does not have
BY_VALUE = words(
    """
h.sgn() h.masked_fill(m,p.sum()) h.masked_select(m) h.prod(1) h.prod() h.max() h.median() h.cumprod(1) h[m]
F.embedding_bag(y[None],h) F.one_hot(y)*h[0,0] F.channel_shuffle(c,2) F.gaussian_nll_loss(h,p,p)
F.multi_margin_loss(h,y%4) F.multilabel_margin_loss(h,y[:,None].expand(6,4)%4)
F.ctc_loss(t.movedim(0,1).log_softmax(2),y[:,None]%3+1,torch.full((6,),2),torch.full((6,),1)) torch.corrcoef(h)
torch.cov(h) torch.quantile(h,0.3)
"""
)


class Of(nn.Module):
    """A block that adds to its output what an expression in it sums to."""

    def __init__(self, expression: str):
        super().__init__()
        self.linear, self.code = nn.Linear(4, 4), compile(expression, expression, "eval")

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        y, p, c, t = torch.arange(6), h.sigmoid(), h.view(6, 2, 2, 1).expand(6, 2, 2, 2) * 1, torch.stack([h, h * 2], 1)
        s, m = h[:4] * 1, x > 0
        d = s @ s.t() + 4 * torch.eye(4)
        names = {"h": h * 1, "p": p, "s": s, "d": d, "c": c, "t": t, "y": y, "m": m}
        return h + eval(self.code, SCOPE, names).sum()


class Last(nn.Module):
    """The last of the sequence that a layer puts out."""

    def __init__(self, layer: nn.Module, queries: int = 1, **options: Any):
        super().__init__()
        self.layer, self.queries, self.options = layer, queries, options

    def forward(self, h: Tensor) -> Tensor:
        out = self.layer(*[h] * self.queries, **self.options)
        return (out if isinstance(out, Tensor) else out[0])[:, -1]


def recurrent(kind: Callable[..., nn.Module], **settings: Any) -> nn.Module:
    return Last(kind(4, 5, batch_first=True, **settings))


def attention(weights: bool, **settings: Any) -> nn.Module:
    return Last(nn.MultiheadAttention(4, 2, batch_first=True, **settings), 3, need_weights=weights)


def encoder(*settings: Any, **options: Any) -> nn.Module:
    return Last(nn.TransformerEncoderLayer(4, 2, 8, *settings, batch_first=True, **options))


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "lstm": partial(recurrent, nn.LSTM),
    "lstm_deep": partial(recurrent, nn.LSTM, num_layers=2, dropout=0.3, bias=False),
    "lstm_both_ways": partial(recurrent, nn.LSTM, bidirectional=True),
    "gru": partial(recurrent, nn.GRU, num_layers=2),
    "gru_both_ways": partial(recurrent, nn.GRU, bidirectional=True, bias=False),
    "rnn": partial(recurrent, nn.RNN),
    "rnn_relu": partial(recurrent, nn.RNN, nonlinearity="relu", dropout=0.2, num_layers=2),
    "attention": partial(attention, False),
    "attention_weights": partial(attention, True, dropout=0.2),
    "encoder": encoder,
    "encoder_norm_first": partial(encoder, 0.0, "gelu", norm_first=True),
}


class Met(frozenset[str]):
    """A list of proved operations that has them all, and notes what it is asked for."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __contains__(self, name: object) -> bool:
        self.names.add(str(name))
        return True


def of(expression: str) -> Problem:
    return Problem(expression, lambda: nn.Sequential(Of(expression), nn.Linear(4, 5)), (4,))


def same(problem: Problem, rule: str, optimizer: Any = "sgd", storage: str = "stored", **options: Any) -> bool:
    """Tell whether the prediction is the measurement, event for event."""
    learner = make_rule(rule, problem, optimizer, storage, **options)
    measured = measure(learner, problem.x, problem.y, warm_up=1)
    make, shape = OPTIMIZERS.get(optimizer, optimizer), tuple(problem.x.shape)
    kind = STORAGES[storage](seed=3)
    predicted = predict(rule, problem.build(), shape, make, kind, loss_fn=problem.loss, **options)
    return events(predicted) == events(measured)


@rotated("layer dtype rule", LAYERS, [torch.float32, torch.float64, torch.bfloat16], ["bp", "memdfa", "dfa"], turns=3)
def test_recurrent_layers_and_attention_are_predicted(layer, dtype, rule):
    def make() -> nn.Sequential:
        with torch.no_grad():
            outputs = LAYERS[layer]()(torch.ones(2, 3, 4)).shape[1]
        return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), LAYERS[layer](), nn.Linear(outputs, 5))

    assert same(Problem(layer, make, (3, 4), dtype=dtype), rule, "adamw")


@pytest.mark.parametrize("rule", ["bp", "memdfa", "last_layer"])
def test_pooling_in_one_dimension_is_predicted_with_and_without_a_graph(rule):
    def make() -> nn.Sequential:
        return nn.Sequential(
            nn.Conv1d(2, 4, 3), nn.MaxPool1d(2), nn.Tanh(), nn.MaxPool1d(2), nn.Flatten(), nn.Linear(4, 5)
        )

    assert same(Problem("pool", make, (2, 6)), rule)


# Optimizers and losses whose operations no other test here meets
ADAMS = [partial(torch.optim.Adam, foreach=True, amsgrad=True), partial(torch.optim.Adam, fused=True)]
OTHERS = [partial(torch.optim.SGD, lr=0.1, momentum=0.9, foreach=True), partial(torch.optim.RMSprop, centered=True)]
KINDS = [
    getattr(torch.optim, name)
    for name in words("Adadelta Adafactor Adagrad Adam AdamW Adamax ASGD RAdam RMSprop Rprop")
]
OTHERS += [*KINDS, *[partial(kind, foreach=True) for kind in KINDS]]


def proved(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, set[str]]]:
    """Yield what was predicted right, and the operations met in it."""
    cases = [(of(expression), "bp", "sgd", "stored") for expression in EXPRESSIONS if expression not in BY_VALUE]
    rules, kinds, optimizers = cycle(EVERY_RULE), cycle(STORAGES), cycle([*OPTIMIZERS, *ADAMS, *OTHERS])
    problems = [problem for problem in PROBLEMS * 2 if problem.name != "frozen_ends"]
    cases += [(problem, next(rules), next(optimizers), next(kinds)) for problem in problems]
    for name, make in LAYERS.items():
        outputs = 10 if "both" in name else 5 if "nn" in name or "gru" in name or "lstm" in name else 4
        net = partial(
            lambda make, outputs: nn.Sequential(nn.Linear(4, 4), make(), nn.Linear(outputs, 5)), make, outputs
        )
        cases += [
            (Problem(name, net, (3, 4), dtype=dtype), "bp", "sgd", "stored") for dtype in (torch.float32, torch.float64)
        ]
    for problem, rule, optimizer, storage in cases:
        met = Met()
        monkeypatch.setattr(shapes, "PROVED", met)
        monkeypatch.setattr(shapes.ShapesAlone, "seen", {})
        if same(problem, rule, optimizer, storage, **{"clip_norm": 0.1} if rule in RULES else {}):
            yield problem.name, met.names
        else:
            yield problem.name, set()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_list_of_proved_operations_is_what_is_predicted_right(monkeypatch):
    listed = shapes.PROVED
    found = list(proved(monkeypatch))
    assert [name for name, names in found if not names] == []
    met = set().union(*[names for _, names in found])
    assert sorted(listed - met) == [], "no test meets these: take them off the list"
    assert sorted(met - listed) == [], "these are proved: put them on the list"


def test_what_no_test_has_proved_is_named_once():
    net = nn.Sequential(Of("torch.special.bessel_j0(h.detach())"), nn.Linear(4, 5))
    shapes.ShapesAlone.warned.clear()
    shapes.ShapesAlone.seen.clear()
    with pytest.warns(UserWarning, match="memory of aten::special_bessel_j0 is"):
        predict("bp", net, (6, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        shapes.ShapesAlone.seen.clear()
        predict("bp", net, (6, 4))


# Under a dispatch mode torch takes other formulas for some of these, and for the rest sums gradients out of place
CONCERNED = words(
    """
h.diff() h.tensor_split(3)[1] torch.trapezoid(h) torch.gradient(h)[0] F.pad(t,(1,1),"circular") h.cumprod(1) h.prod(1)
h.masked_fill(m,1.0) h[y,1:] torch.maximum(h,p) h.norm(3,dim=1) h.sgn() h*h F.scaled_dot_product_attention(t,t,t)
"""
)


@pytest.mark.filterwarnings("ignore:Using torch.cross", "ignore:reduction. 'mean' divides")
@pytest.mark.parametrize(
    "expression", [pytest.param(e, marks=[pytest.mark.slow] * (e not in CONCERNED)) for e in EXPRESSIONS]
)
def test_measured_is_never_above_the_allocator(expression):
    problem = of(expression)
    learner = make_rule("bp", problem)
    with threads(1):
        trace = allocator_trace(learner, problem.x, problem.y)
    measured = measure(learner, problem.x, problem.y).peak_bytes
    assert measured <= trace.peak_bytes
    if "polar" not in expression:  # a conjugate is copied within the operation that reads it, by one that is watched
        assert measured == handed_on_bytes(trace)
