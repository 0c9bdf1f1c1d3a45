"""Distances between implicit and target reward gaps, in fp32 forms that keep their digits where the
textbook ones cancel.
"""

import triton
import triton.language as tl

from .primitives import exp_minus_1_minus, expm1, softplus

# Codes of an objective's options.
SQUARED, BACKWARD_KL, FORWARD_KL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
LISTWISE, PAIRWISE, POINTWISE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
REWARDS, GAP, LABEL, SOFTMAX = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
SUM, MEAN, TOKENS = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
SEQUENCE_REF, TOKEN_REF = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def gap_of(a, b):
    """a - b, with equal infinities a tie."""
    return tl.where(a == b, 0.0, a - b)


@triton.jit
def exp_difference(a, b, gap):
    """e^a - e^b for a - b = gap, without cancellation; 0 when both are -inf."""
    top = tl.exp(tl.maximum(a, b))
    size = top * -expm1(-tl.abs(gap))
    return tl.where(top == 0.0, 0.0, tl.where(gap > 0.0, size, -size))


@triton.jit
def kl_term(log_q, log_p):
    """q log(q / p) - q + p >= 0, whose sum over outcomes is KL(q || p); p where q = 0."""
    q, p, x = tl.exp(log_q), tl.exp(log_p), log_p - log_q
    far = p - q - q * x  # e^x q = p, where e^x alone would overflow
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
def bernoulli(d, tau, DISTANCE: tl.constexpr, CROSS_ENTROPY: tl.constexpr):
    """D[d || tau] of one gap and its derivative in d."""
    if DISTANCE == SQUARED:
        return 0.5 * (d - tau) * (d - tau), d - tau
    else:
        log_p, log_1p = -softplus(-d), -softplus(d)
        log_q, log_1q = -softplus(-tau), -softplus(tau)
        if DISTANCE == BACKWARD_KL:
            value = kl_term(log_q, log_p) + kl_term(log_1q, log_1p)
            if CROSS_ENTROPY:
                value += entropy_term(log_q) + entropy_term(log_1q)
            # sigma(d) - sigma(tau) = p (1 - q) - q (1 - p)
            return value, exp_difference(log_p + log_1q, log_q + log_1p, gap_of(d, tau))
        else:
            value = kl_term(log_p, log_q) + kl_term(log_1p, log_1q)
            return value, tl.exp(log_p + log_1p) * (d - tau)


@triton.jit
def labelled(d, label, CROSS_ENTROPY: tl.constexpr):
    """Cross-entropy (or KL) of a pair with an explicit label, and its derivative sigma(d) -
    label.
    """
    log_p, log_1p = -softplus(-d), -softplus(d)
    value = tl.where(label == 0.0, 0.0, -label * log_p) + tl.where(
        label == 1.0, 0.0, -(1.0 - label) * log_1p
    )
    if not CROSS_ENTROPY:
        safe = tl.where((label > 0.0) & (label < 1.0), label, 0.5)
        entropy = -safe * tl.log(safe) - (1.0 - safe) * tl.log(1.0 - safe)
        value = tl.maximum(value - tl.where(safe == label, entropy, 0.0), 0.0, tl.PropagateNan.ALL)
    return value, tl.exp(log_p) * (1.0 - label) - label * tl.exp(log_1p)
