"""Distances between gaps of implicit and target rewards, in fp32 forms that do not cancel.

Each distance of `objectives.DISTANCES` has three functions, which begin with its name:

    <name>_of_gap(d, tau)              D of the Bernoulli distributions of sigmoid(d), sigmoid(tau)
                                       (squared: of two numbers), and its derivative in d
    <name>_of_outcome(log_p, log_q)    the term of one outcome in D between softmaxes p and q
    <name>_pull(...)                   the term of response j in dD/ds_i, antisymmetric in i and j

A distance whose listwise form is over pairs of gaps has only the first.
"""

import triton
import triton.language as tl

from ..objectives import DISTANCES
from .primitives import exp_minus_1_minus, expm1, softplus

SQUARED = tl.constexpr(DISTANCES["squared"].code)
BACKWARD_KL = tl.constexpr(DISTANCES["backward_kl"].code)
FORWARD_KL = tl.constexpr(DISTANCES["forward_kl"].code)
HELLINGER = tl.constexpr(DISTANCES["hellinger"].code)


@triton.jit
def distance_of_gap(d, tau, FLAGS: tl.constexpr):
    if FLAGS.distance == SQUARED:
        return squared_of_gap(d, tau)
    elif FLAGS.distance == BACKWARD_KL:
        return backward_kl_of_gap(d, tau, FLAGS.cross_entropy)
    elif FLAGS.distance == FORWARD_KL:
        return forward_kl_of_gap(d, tau)
    else:
        tl.static_assert(FLAGS.distance == HELLINGER)
        return hellinger_of_gap(d, tau)


@triton.jit
def distance_of_outcome(log_p, log_q, FLAGS: tl.constexpr):
    if FLAGS.distance == BACKWARD_KL:
        return backward_kl_of_outcome(log_p, log_q, FLAGS.cross_entropy)
    elif FLAGS.distance == FORWARD_KL:
        return forward_kl_of_outcome(log_p, log_q)
    else:
        tl.static_assert(FLAGS.distance == HELLINGER)
        return hellinger_of_outcome(log_p, log_q)


@triton.jit
def distance_pull(log_p_i, log_q_i, log_p_j, log_q_j, gap, FLAGS: tl.constexpr):
    """gap = u_i - u_j, u = s - t."""
    if FLAGS.distance == BACKWARD_KL:
        return backward_kl_pull(log_p_i, log_q_i, log_p_j, log_q_j, gap)
    elif FLAGS.distance == FORWARD_KL:
        return forward_kl_pull(log_p_i, log_p_j, gap)
    else:
        tl.static_assert(FLAGS.distance == HELLINGER)
        return hellinger_pull(log_p_i, log_q_i, log_p_j, log_q_j, gap)


# ---- squared: 1/2 (d - tau)^2 --------------------------------------------------------------------


@triton.jit
def squared_of_gap(d, tau):
    return 0.5 * (d - tau) * (d - tau), d - tau


# ---- backward KL: KL(q || p), or with the entropy of q the cross-entropy -------------------------


@triton.jit
def backward_kl_of_gap(d, tau, CROSS_ENTROPY: tl.constexpr):
    log_p, log_1p, log_q, log_1q = log_sigmoids(d, tau)
    value = backward_kl_of_outcome(log_p, log_q, CROSS_ENTROPY)
    value += backward_kl_of_outcome(log_1p, log_1q, CROSS_ENTROPY)
    # sigma(d) - sigma(tau) = p (1 - q) - q (1 - p)
    return value, exp_difference(log_p + log_1q, log_q + log_1p, gap_of(d, tau))


@triton.jit
def backward_kl_of_outcome(log_p, log_q, CROSS_ENTROPY: tl.constexpr):
    value = kl_term(log_q, log_p)
    if CROSS_ENTROPY:
        value += entropy_term(log_q)
    return value


@triton.jit
def backward_kl_pull(log_p_i, log_q_i, log_p_j, log_q_j, gap):
    """p_i q_j - q_i p_j"""
    return exp_difference(log_p_i + log_q_j, log_q_i + log_p_j, gap)


# ---- forward KL: KL(p || q) ----------------------------------------------------------------------


@triton.jit
def forward_kl_of_gap(d, tau):
    log_p, log_1p, log_q, log_1q = log_sigmoids(d, tau)
    value = forward_kl_of_outcome(log_p, log_q) + forward_kl_of_outcome(log_1p, log_1q)
    return value, tl.exp(log_p + log_1p) * (d - tau)


@triton.jit
def forward_kl_of_outcome(log_p, log_q):
    return kl_term(log_p, log_q)


@triton.jit
def forward_kl_pull(log_p_i, log_p_j, gap):
    """p_i p_j (u_i - u_j)"""
    return tl.exp(log_p_i + log_p_j) * gap


# ---- squared Hellinger: 2 sum (sqrt p - sqrt q)^2 ------------------------------------------------


@triton.jit
def hellinger_of_gap(d, tau):
    log_p, log_1p, log_q, log_1q = log_sigmoids(d, tau)
    value = hellinger_of_outcome(log_p, log_q) + hellinger_of_outcome(log_1p, log_1q)
    return value, hellinger_pull(log_p, log_q, log_1p, log_1q, gap_of(d, tau))


@triton.jit
def hellinger_of_outcome(log_p, log_q):
    a, b = 0.5 * log_p, 0.5 * log_q
    difference = exp_difference(a, b, gap_of(a, b))
    return 2.0 * difference * difference


@triton.jit
def hellinger_pull(log_p_i, log_q_i, log_p_j, log_q_j, gap):
    """2 sqrt(p_i p_j) (sqrt(p_i q_j) - sqrt(q_i p_j))"""
    a = log_p_i + 0.5 * (log_p_j + log_q_j)
    b = log_p_j + 0.5 * (log_p_i + log_q_i)
    return 2.0 * exp_difference(a, b, 0.5 * gap)


# ---- shared terms --------------------------------------------------------------------------------


@triton.jit
def gap_of(a, b):
    """a - b, 0 for equal infinities."""
    return tl.where(a == b, 0.0, a - b)


@triton.jit
def log_sigmoids(d, tau):
    """log p, log(1 - p), log q, log(1 - q) with p = sigmoid(d), q = sigmoid(tau)."""
    return -softplus(-d), -softplus(d), -softplus(-tau), -softplus(tau)


@triton.jit
def exp_difference(a, b, gap):
    """e^a - e^b for a - b = gap, without cancellation; 0 if both are -inf."""
    top = tl.exp(tl.maximum(a, b))
    size = top * -expm1(-tl.abs(gap))
    return tl.where(top == 0.0, 0.0, tl.where(gap > 0.0, size, -size))


@triton.jit
def kl_term(log_q, log_p):
    """q log(q / p) - q + p >= 0; summed over outcomes it is KL(q || p). p where q = 0."""
    q, p, x = tl.exp(log_q), tl.exp(log_p), log_p - log_q
    far = p - q - q * x  # e^x q = p, without the overflow of e^x
    return tl.where(
        q == 0.0,
        p,
        tl.where(tl.abs(x) < 0.5, q * exp_minus_1_minus(tl.where(tl.abs(x) < 0.5, x, 0.0)), far),
    )


@triton.jit
def entropy_term(log_q):
    """-q log q, with 0 log 0 = 0."""
    q = tl.exp(log_q)
    return tl.where(q == 0.0, 0.0, -q * log_q)


@triton.jit
def labelled(d, label, CROSS_ENTROPY: tl.constexpr):
    """Cross-entropy (or KL) of a pair with an explicit label, and its slope sigma(d) - label."""
    log_p, log_1p = -softplus(-d), -softplus(d)
    value = tl.where(label == 0.0, 0.0, -label * log_p) + tl.where(
        label == 1.0, 0.0, -(1.0 - label) * log_1p
    )
    if not CROSS_ENTROPY:
        safe = tl.where((label > 0.0) & (label < 1.0), label, 0.5)
        entropy = -safe * tl.log(safe) - (1.0 - safe) * tl.log(1.0 - safe)
        value = tl.maximum(value - tl.where(safe == label, entropy, 0.0), 0.0, tl.PropagateNan.ALL)
    return value, tl.exp(log_p) * (1.0 - label) - label * tl.exp(log_1p)
