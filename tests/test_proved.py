"""Operations one by one: measured is never above the allocator, predicted equals measured; the list of those proved."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from problems import OPTIMIZERS, PROBLEMS, Problem, make_rule, threads
from test_memory import events
from torch import Tensor, nn

from memdfa_lab.memory import measure, predict
from memdfa_lab.memory.crosscheck import allocator_trace

SCOPE = {"torch": torch, "F": F, "nn": nn}
# Expressions in a matrix h (6, 4), its entries p between 0 and 1, a square matrix s, a positive definite one d,
# images c (6, 2, 2, 2), sequences t (6, 2, 4), labels y and a mask m
EXPRESSIONS = """
h.abs() h.acos() p.log() p.log2() p.log10() p.log1p() h.exp() h.exp2() h.expm1() p.sqrt() p.rsqrt() p.reciprocal()
h.sin() h.cos() h.tan() h.sinh() h.cosh() h.tanh() h.asinh() h.atan() h.erf() h.erfc() p.erfinv() p.lgamma() p.digamma()
p.logit() h.sigmoid() h.sgn() h.sign() h.floor() h.ceil() h.round() h.trunc() h.frac() h.square() h.neg() h.sinc() h**3
p**p 2**h h+h h-2*h h*h p/(p+1) h.atan2(p) torch.hypot(h,p) h.fmod(2) h.remainder(2) torch.maximum(h,p) h.fmin(p)
h.clamp(-1,1) h.clamp_min(0) h.clamp(max=p) h.lerp(p,0.3) torch.addcmul(h,p,h) torch.addcdiv(h,h,p+1) h.logaddexp(p)
h.where(m,p) torch.where(m,h,0.0) h.masked_fill(m,1.0) h.masked_fill(m,p.sum()) h.masked_select(m) h.nan_to_num() h.copysign(p)
h.sum(1) h.mean(1) h.prod(1) h.prod() h.var(1) h.std(1) torch.var_mean(h,1)[1] h.norm() h.norm(dim=1) h.norm(1,dim=1)
h.norm(3,dim=1) h.logsumexp(1) h.max() h.max(1)[0] h.min(1)[0] h.amax(1) h.amin(1) h.aminmax(dim=1)[0] h.median(1)[0]
h.median() h.mode(1)[0] h.kthvalue(2,1)[0] h.topk(2)[0] h.sort(1)[0] h.cumsum(1) h.cumprod(1) h.logcumsumexp(1)
h.cummax(1)[0] h.cummin(1)[0] h.diff() h.dist(p) torch.cdist(h,p) F.pdist(h) h.renorm(2,0,1.0) torch.trapezoid(h)
h[1:] h[::2] h[:,1] h[y] h[m] h[y,1:] h[None].expand(3,6,4) h.select(0,2) h.narrow(1,1,2) h.unfold(1,2,1) h.diagonal() h.tril() h.triu() s.diag()
h.index_select(0,y) h.take(y) h.gather(1,y[:,None]%4) torch.take_along_dim(h,y[:,None]%4,1) h.scatter(1,y[:,None]%4,p)
h.scatter_add(1,y[:,None]%4,p) h.index_add(0,y,p) h.index_fill(0,y,1.0) h.index_copy(0,y.argsort(),p) h.index_put((y,),p) h.put(y,p[:,0])
h.scatter_reduce(1,y[:,None]%4,p,"amax") torch.cat([h,p],1) torch.stack([h,p]) h.split(2,1)[0] torch.hstack(h.split(2))
h.chunk(2,1)[1] h.unbind(1)[2] h.tensor_split(3)[1] h.flip(0) h.roll(1,0) h.rot90() h.t().contiguous() h.t().reshape(24) h.repeat(2,3)
h.repeat_interleave(2,0) h.tile(2) h.clone() h.double() h.half() h.bfloat16() h.new_zeros(3)+h[0,0] h.fill_diagonal_(0.0) h.mul_(2)
h.relu_() h.exp_() h.sigmoid_() h.add_(p) h.masked_fill_(m,0.0) h.clamp_(0,1) h.copy_(p) h@p.t() h@h[0] torch.outer(h[0],p[0])
t.bmm(t.mT) torch.baddbmm(t@t.mT,t,t.mT) torch.addmv(h[:,0],h,p[0]) torch.einsum("ni,nj->ij",h,p) torch.kron(s,s) torch.tensordot(h,p,2)
s.det() d.inverse() d.logdet() torch.linalg.cholesky(d) torch.linalg.solve(d,s) torch.linalg.qr(s)[0] torch.linalg.svdvals(s) torch.linalg.eigvalsh(d)
torch.linalg.matrix_exp(s) torch.cross(h[:,:3],p[:,:3]) h.trace() h.softmax(1) h.log_softmax(1) F.softmin(h,1) F.gumbel_softmax(h)
F.relu(h) F.relu6(h) F.elu(h) F.selu(h) F.celu(h) F.gelu(h) F.gelu(h,approximate="tanh") F.silu(h) F.mish(h) F.softplus(h) F.softsign(h)
F.leaky_relu(h) F.rrelu(h,training=True) F.hardtanh(h) F.hardswish(h) F.hardsigmoid(h) F.hardshrink(h) F.softshrink(h) F.tanhshrink(h)
F.threshold(h,0.1,0.2) F.logsigmoid(h) F.glu(h) F.prelu(h,p[0]) F.dropout(h) F.dropout1d(t) F.dropout2d(c) F.alpha_dropout(h) F.feature_alpha_dropout(c)
F.normalize(h) F.layer_norm(h,(4,)) F.layer_norm(h,(4,),p[0],p[1]) F.rms_norm(h,(4,)) F.group_norm(c,2) F.instance_norm(c) F.local_response_norm(c,2) F.batch_norm(h,None,None,training=True)
F.linear(h,s) F.bilinear(h,p,h[:2,:,None]*p[0]) F.embedding(y,h) F.embedding_bag(y[None],h) F.one_hot(y)*h[0,0] F.cosine_similarity(h,p) F.pairwise_distance(h,p)
F.conv1d(t,t[:,:,:2]) F.conv2d(c,c) F.conv_transpose2d(c,c[:2]) F.conv3d(c[:,None],c[:,None]) F.unfold(c,2) F.fold(c.flatten(2),2,2) F.pixel_shuffle(c.repeat(1,2,1,1),2)
F.pad(h,(1,1)) F.pad(t,(1,1),"reflect") F.pad(t,(1,1),"replicate") F.pad(t,(1,1),"circular") F.pad(c,(1,1,1,1),"reflect") F.pad(c,(1,1,1,1),"replicate")
F.max_pool1d(t,2) F.max_pool2d(c,2) F.max_pool3d(c[:,None],2) F.avg_pool1d(t,2) F.avg_pool2d(c,2) F.avg_pool3d(c[:,None],2) F.lp_pool2d(c,2,2) F.adaptive_avg_pool1d(t,2)
F.adaptive_avg_pool2d(c,1) F.adaptive_max_pool2d(c,1) F.adaptive_avg_pool3d(c[:,None],1) F.fractional_max_pool2d(c,1,1) F.max_unpool2d(*F.max_pool2d(c,2,return_indices=True),2)
F.interpolate(t,scale_factor=2) F.interpolate(t,scale_factor=2,mode="linear") F.interpolate(c,scale_factor=2) F.interpolate(c,scale_factor=2,mode="bilinear") F.interpolate(c,scale_factor=2,mode="bicubic")
F.grid_sample(c,c.movedim(1,-1),align_corners=False) F.affine_grid(c[:,:,:,0].repeat(1,1,2)[:,:,:3],(6,1,2,2),align_corners=False) F.channel_shuffle(c,2)
F.mse_loss(h,p) F.l1_loss(h,p) F.smooth_l1_loss(h,p) F.huber_loss(h,p) F.kl_div(h,p) F.binary_cross_entropy(p,p.detach()) F.binary_cross_entropy_with_logits(h,p)
F.cross_entropy(h,y%4) F.cross_entropy(h,p) F.nll_loss(h,y%4) F.nll_loss(c,y[:,None,None].expand(6,2,2)%2) F.poisson_nll_loss(h,p) F.gaussian_nll_loss(h,p,p) F.hinge_embedding_loss(h,p)
F.margin_ranking_loss(h,p,p) F.triplet_margin_loss(h,p,h+1) F.cosine_embedding_loss(h,p,y) F.multi_margin_loss(h,y%4) F.multilabel_soft_margin_loss(h,p) F.soft_margin_loss(h,p)
F.multilabel_margin_loss(h,y[:,None].expand(6,4)%4) F.ctc_loss(t.movedim(0,1).log_softmax(2),y[:,None]%3+1,torch.full((6,),2),torch.full((6,),1)) F.scaled_dot_product_attention(t,t,t)
torch.special.i0(h) torch.special.ndtr(h) torch.special.xlog1py(h,p) torch.xlogy(h,p) torch.special.entr(p) torch.polar(h,p).abs() torch.fft.rfft(h).abs() torch.stft(h,4,window=torch.ones(4),return_complex=True).abs() torch.complex(h,p).angle() torch.view_as_real(torch.complex(h,p))
torch.poisson(p) torch.bernoulli(p) torch.rand_like(h) torch.randn_like(h) torch.nn.utils.rnn.pad_sequence([h,p]) torch.block_diag(h,p) torch.cartesian_prod(h[0],p[0]) torch.combinations(h[0]) torch.meshgrid(h[0],p[0],indexing="ij")[0] torch.corrcoef(h) torch.cov(h) torch.quantile(h,0.3) torch.vander(h[0]) torch.gradient(h)[0]
""".split()


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
