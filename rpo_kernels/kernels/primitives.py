"""Scalar functions of exp and log that are accurate in fp32 where the textbook forms cancel."""

import triton
import triton.language as tl

# Pointers that may have any alignment, such as slices of batches: kernels are compiled once, not
# per alignment.
ANYWHERE = [
    "logits_ptr",
    "dlogits_ptr",
    "labels_ptr",
    "logps_ptr",
    "lse_ptr",
    "entropy_ptr",
    "parts_ptr",
    "statistics_ptr",
    "coef_ptr",
    "entropy_coef_ptr",
    "upstream_ptr",
    "lengths_in_ptr",
    "cu_seqlens_ptr",
    "cu_groups_ptr",
    "ref_logps_ptr",
    "ref_weights_ptr",
    "group_weights_ptr",
    "rewards_ptr",
    "normalizer_ptr",
    "sft_share_ptr",
    "loss_ptr",
    "losses_ptr",
    "sequence_ptr",
    "lengths_ptr",
    "scratch_ptr",
]
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def log1p_unit(x):
    """log(1 + x) for 0 <= x <= 1: 2 atanh(z), z = x / (2 + x) <= 1/3, up to z^15."""
    z = x / (2.0 + x)
    w = z * z
    series = 1.0 / 13.0 + w * (1.0 / 15.0)
    series = 1.0 / 11.0 + w * series
    series = 1.0 / 9.0 + w * series
    series = 1.0 / 7.0 + w * series
    series = 1.0 / 5.0 + w * series
    series = 1.0 / 3.0 + w * series
    return 2.0 * z * (1.0 + w * series)


@triton.jit
def softplus(x):
    """log(1 + e^x); softplus(-inf) = 0, softplus(inf) = inf."""
    return tl.where(x > 0.0, x, tl.where(x != x, x, 0.0)) + log1p_unit(tl.exp(-tl.abs(x)))


@triton.jit
def exp_minus_1_minus(x):
    """e^x - 1 - x >= 0, by its series for |x| < 1/2."""
    series = 1.0 / 20160.0 + x * (1.0 / 181440.0)
    series = 1.0 / 2520.0 + x * series
    series = 1.0 / 360.0 + x * series
    series = 1.0 / 60.0 + x * series
    series = 1.0 / 12.0 + x * series
    series = 1.0 / 3.0 + x * series
    small = 0.5 * x * x * (1.0 + x * series)
    return tl.where(tl.abs(x) < 0.5, small, tl.exp(x) - 1.0 - x)


@triton.jit
def expm1(x):
    """e^x - 1 for any x, with small relative error near 0."""
    small = x + exp_minus_1_minus(tl.where(tl.abs(x) < 0.5, x, 0.0))
    return tl.where(tl.abs(x) < 0.5, small, tl.exp(x) - 1.0)


@triton.jit
def tanh(x):
    """tanh(x); for |x| < 1/4, where (1 - e) / (1 + e) cancels, an odd polynomial, exact to 1e-8."""
    w = x * x
    series = -17.0 / 315.0 + w * (62.0 / 2835.0)
    series = 2.0 / 15.0 + w * series
    series = -1.0 / 3.0 + w * series
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    root = tl.rsqrt(1.0 + e)
    large = (1.0 - e) * (root * root)
    return tl.where(w < 0.0625, x + x * w * series, tl.where(x < 0.0, -large, large))


@triton.jit
def split_exponent(x):
    """(k, m) with x = 2^k m and 1 <= m < 2, both fp32, for normal x > 0; m = 0 for 0."""
    exponent = (x.to(tl.int32, bitcast=True) >> 23) - 127
    return exponent.to(tl.float32), x * ((127 - exponent) << 23).to(tl.float32, bitcast=True)
