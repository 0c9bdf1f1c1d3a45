"""The vocabulary pass against float64 truth, forward and gradient, on both backends."""

import json

import pytest
import torch

from rpo_kernels import (
    RPOObjective,
    linear_rpo_loss,
    linear_token_logps,
    reference,
    rpo_loss,
    token_logps,
    token_logps_and_entropy,
)
from rpo_kernels.backend import module_of
from rpo_kernels.inputs import LogitTransform
from rpo_kernels.kernels import launch, vocabulary_backward, vocabulary_forward

from ..helpers import HAS_GPU, kernel_dtypes, poisoned_memory, worst

TRANSFORMS = [
    pytest.param({}, id="plain"),
    pytest.param({"temperature": 0.7, "logit_scale": 1.3}, id="scaled"),
    pytest.param({"softcap": 30.0, "logit_scale": 0.5, "temperature": 1.5}, id="softcap"),
]
# One element; odd below a tile; one past 16 bytes of fp32; one past a whole tile; GPT-2's odd
# vocabulary.
VOCABULARIES = [1, 31, 257, 4097, 50_257]


def truth(logits, labels, entropy_weight=None, logp_weight=None, **transform):
    """(logps, entropies, dlogits) in float64, computed from the logits as stored."""
    x = logits.detach().double().requires_grad_()
    logps = reference.token_logps(x, labels, **transform)
    entropies = reference.token_entropy(x, labels, **transform)
    total = (logps * logp_weight).sum()
    if entropy_weight is not None:
        total = total + (entropies * entropy_weight).sum()
    (grad,) = torch.autograd.grad(total, x)
    return logps.detach(), entropies.detach(), grad


def same_dtype_pytorch(logits, labels, weight, **transform):
    """The same through PyTorch's own operators, in the precision of a careful trainer (logits
    upcast to fp32).
    """
    x = logits.detach().clone().requires_grad_()
    z = x.float() * transform.get("logit_scale", 1.0)
    cap = transform.get("softcap")
    z = (cap * torch.tanh(z / cap) if cap else z) / transform.get("temperature", 1.0)
    safe = labels.clamp(min=0)[..., None]
    logps = torch.where(labels >= 0, z.log_softmax(-1).gather(-1, safe)[..., 0], 0)
    (grad,) = torch.autograd.grad((logps * weight).sum(), x)
    return logps.detach(), grad


def rows(V, dtype, device, scale=8.0):
    """Six rows: flat, ordinary, confident in the label, confident in another token, ignored,
    maximum in the last column.
    """
    x = torch.randn(2, 3, V, device=device) * scale
    labels = torch.randint(0, V, (2, 3), device=device)
    x[0, 0] = 0.25
    x[0, 2, labels[0, 2]] += 40
    x[1, 0, 0] += 40
    labels[1, 1] = -100
    x[1, 2, -1] = x.max() + 3
    return x.to(dtype), labels


@pytest.mark.parametrize("V", VOCABULARIES)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_token_logps_and_gradients_are_as_good_as_pytorch(V, transform, backend, device):
    for dtype in kernel_dtypes(backend):
        x, labels = rows(V, dtype, device)
        weight = torch.randn(labels.shape, device=device)
        logps64, _, grad64 = truth(x, labels, logp_weight=weight.double(), **transform)
        theirs, their_grad = same_dtype_pytorch(x, labels, weight, **transform)
        x.requires_grad_()
        with poisoned_memory():
            ours = token_logps(x, labels, backend=backend, **transform)
            (our_grad,) = torch.autograd.grad((ours * weight).sum(), x)
        # Where PyTorch happens to be exact (V = 1, a lone maximum) ours may still round a few
        # times.
        eps = torch.finfo(torch.float32).eps
        # a chip's exponential and division, of which softcap takes another each, err by 2 units
        units = 4 if "softcap" in transform else 2
        assert worst(ours, logps64) <= 1.5 * worst(theirs, logps64) + units * eps * float(
            logps64.abs().max()
        ), dtype
        ulp = max(4 * eps, torch.finfo(dtype).eps / 2) * float(grad64.abs().max())
        assert worst(our_grad, grad64) <= 1.5 * worst(their_grad, grad64) + ulp, dtype
        assert (ours[labels == -100] == 0).all() and (our_grad[labels == -100] == 0).all()


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_token_logps_and_entropy_match_float64(transform, backend, device):
    for V in (1, 4097):
        x, labels = rows(V, torch.float32, device)
        a, b = torch.randn(2, *labels.shape, device=device)
        _, entropies64, grad64 = truth(x, labels, b.double(), a.double(), **transform)
        x.requires_grad_()
        with poisoned_memory():
            logps, entropies = token_logps_and_entropy(x, labels, backend=backend, **transform)
            (grad,) = torch.autograd.grad((logps * a + entropies * b).sum(), x)
        bound = 4 * torch.finfo(torch.float32).eps * 8.3  # four roundings of log V nats
        assert worst(entropies, entropies64) <= bound
        assert worst(grad, grad64) <= bound
        assert torch.equal(logps, token_logps(x, labels, backend=backend, **transform))


def test_token_logps_of_confident_tokens_keep_their_digits(backend, device):
    """log p = -e^-30 and 1 - p are lost to a subtraction of logsumexps, which gives 0 (and a zero
    gradient).
    """
    x = torch.zeros(1, 64, device=device)
    x[0, 5] = 30.0
    x.requires_grad_()
    logp = token_logps(x, torch.tensor([5], device=device), backend=backend)
    (grad,) = torch.autograd.grad(logp.sum(), x)
    expected = -torch.log1p(63 * torch.exp(torch.tensor(-30.0, dtype=torch.float64)))
    logp = logp.detach()
    assert abs(float(logp) / float(expected) - 1) < 1e-5
    assert abs(float(grad[0, 5]) / -float(expected) - 1) < 1e-5
    assert abs(float(grad.double().sum())) < 1e-5 * -float(expected)


def test_token_logps_treat_infinities_and_nans_as_log_softmax_does(backend, device):
    inf, nan = float("inf"), float("nan")
    x = torch.tensor(
        [
            [1.0, -inf, 2.0, 0.5],  # a banned token elsewhere
            [-inf, 1.0, 2.0, 0.5],  # the label banned: -inf
            [1.5, -inf, -inf, -inf],  # all but the label banned: exactly 0
            [-inf, -inf, -inf, -inf],  # nothing left: nan
            [1.0, inf, 2.0, 0.5],  # nan
            [inf, 1.0, 2.0, 0.5],  # nan
            [1.0, nan, 2.0, 0.5],  # nan
            [1e4, -1e4, 0.0, 1e4],
        ],
        device=device,
    )
    labels = torch.zeros(len(x), dtype=torch.int64, device=device)
    expected = x.double().log_softmax(-1)[:, 0]
    torch.testing.assert_close(
        token_logps(x, labels, backend=backend).double(),
        expected,
        equal_nan=True,
        rtol=1e-6,
        atol=0,
    )
    whole = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(token_logps(whole, labels, backend=backend).sum(), whole)
    assert grad[[3, 4, 5, 6]].isnan().all()
    finite = x[[0, 2, 7]].requires_grad_()
    (grad,) = torch.autograd.grad(token_logps(finite, labels[:3], backend=backend).sum(), finite)
    p = finite.detach().double().softmax(-1)
    onehot = torch.nn.functional.one_hot(labels[:3], 4)
    torch.testing.assert_close(grad.double(), onehot - p, rtol=1e-6, atol=1e-7)


def test_token_logps_do_not_depend_on_the_default_dtype(backend, device):
    x, labels = (
        torch.randn(4, 9, device=device, requires_grad=True),
        torch.tensor([2, 0, -100, 8], device=device),
    )
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            logps, entropies = token_logps_and_entropy(x, labels, backend=backend)
            results.append((logps, entropies, *torch.autograd.grad((logps * entropies).sum(), x)))
        finally:
            torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) and a.dtype == b.dtype == torch.float32 for a, b in zip(*results))


def test_token_logps_of_ignored_rows_are_zero_whatever_they_hold(backend, device):
    x = torch.randn(4, 9, device=device)
    x[1], x[3] = float("nan"), float("inf")
    labels = torch.tensor([2, -100, 3, -100], device=device)
    x.requires_grad_()
    logps, entropies = token_logps_and_entropy(x, labels, backend=backend)
    (grad,) = torch.autograd.grad((logps + entropies).sum(), x)
    assert logps[1] == logps[3] == entropies[1] == 0
    assert (grad[[1, 3]] == 0).all() and grad.isfinite().all()


def test_token_logps_read_views_of_shifted_logits(backend, device):
    full = torch.randn(3, 5, 33, device=device)
    labels = torch.randint(0, 33, (3, 4), device=device)
    view = full[:, :-1].requires_grad_()
    logps = token_logps(view, labels, backend=backend)
    (grad,) = torch.autograd.grad(logps.sum(), view)
    copy = full[:, :-1].contiguous().requires_grad_()
    same = token_logps(copy, labels, backend=backend)
    assert torch.equal(logps, same)
    assert torch.equal(grad, torch.autograd.grad(same.sum(), copy)[0])
    swapped = full.transpose(0, 1)[1:].requires_grad_()
    expected = token_logps(swapped.contiguous(), labels.t(), backend=backend)
    assert torch.equal(token_logps(swapped, labels.t(), backend=backend), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_logps_gradients_are_aligned_as_their_logits(dtype, device):
    """So that rows of an odd vocabulary are read and written 16 bytes at a time."""
    full = torch.randn(2, 3, 5, 33, device=device, dtype=dtype)
    for logits in (full, full[:, :, :-1], full[:, :, 4:], full[0, :, :, :32], full[0, 0, 0]):
        logits = logits.detach().requires_grad_()
        labels = torch.randint(0, 32, logits.shape[:-1], device=device)
        (grad,) = torch.autograd.grad(token_logps(logits, labels, backend="torch").sum(), logits)
        apart = [(a - b) * dtype.itemsize % 16 for a, b in zip(logits.stride(), grad.stride())]
        assert not any(apart), (logits.stride(), grad.stride())
        assert grad.untyped_storage().nbytes() < grad.nbytes + 16 * max(labels.numel(), 1)
        assert grad.is_contiguous() or not logits.is_contiguous()


def test_token_logps_take_any_number_of_leading_dimensions(backend, device):
    x = torch.randn(2, 3, 2, 7, device=device)
    labels = torch.randint(0, 7, (2, 3, 2), device=device)
    expected = reference.token_logps(x.double(), labels)
    assert worst(token_logps(x, labels, backend=backend), expected) < 1e-6
    assert worst(token_logps(x[0, 0], labels[0, 0], backend=backend), expected[0, 0]) < 1e-6
    assert (
        worst(token_logps(x[0, 0, 0], labels[0, 0, 0], backend=backend), expected[0, 0, 0]) < 1e-6
    )
    assert token_logps(x[:, :, :0], labels[:, :, :0], backend=backend).shape == (2, 3, 0)


def test_token_logps_of_a_row_do_not_depend_on_its_batch(backend, device):
    x = torch.randn(9, 4099, device=device) * 5
    labels = torch.randint(0, 4099, (9,), device=device)
    together = token_logps(x, labels, backend=backend)
    assert torch.equal(together, token_logps(x, labels, backend=backend))
    for i in (0, 4, 8):
        assert torch.equal(
            together[i], token_logps(x[i : i + 1], labels[i : i + 1], backend=backend)[0]
        )


def test_token_logps_write_gradients_in_place(backend, device):
    for dtype in kernel_dtypes(backend):
        x, labels = rows(4097, dtype, device)
        expected = x.clone().requires_grad_()
        token_logps(expected, labels, backend=backend).sum().backward()
        leaf = x.clone().requires_grad_()
        logits = leaf * 1
        seen = []
        logits.register_hook(lambda g, seen=seen: seen.append(g.data_ptr()))
        token_logps(logits, labels, inplace_backward=True, backend=backend).sum().backward()
        assert torch.equal(leaf.grad, expected.grad)
        assert seen == [logits.data_ptr()]


def test_token_logps_take_int32_and_strided_labels(backend, device):
    x = torch.randn(4, 3, 11, device=device)
    labels = torch.randint(0, 11, (3, 4), device=device).t()
    expected = token_logps(x, labels.contiguous(), backend=backend)
    assert torch.equal(token_logps(x, labels, backend=backend), expected)
    assert torch.equal(token_logps(x, labels.int(), backend=backend), expected)


@pytest.mark.parametrize(
    "layout", ["every other", "last dimension", "expanded", "every other of one dimension"]
)
def test_token_logps_read_strided_labels_without_a_copy(layout, device):
    """Flattened, these are views with strides 2, 2, 0 and 2."""
    big = torch.randint(0, 11, (4, 6), device=device)
    labels = {
        "every other": big[:, ::2],
        "last dimension": big.view(4, 3, 2)[..., 0],
        "expanded": torch.tensor([[5]], device=device).expand(4, 3),
        "every other of one dimension": big.view(-1)[::2],
    }[layout]
    shape = (*labels.shape, 11)
    x = torch.randn(shape, device=device, requires_grad=True)
    expected, found = (token_logps(x, y, backend="triton") for y in (labels.contiguous(), labels))
    assert torch.equal(found, expected)
    assert all(map(torch.equal, *(torch.autograd.grad(y.sum(), x) for y in (expected, found))))
    hidden, weight = torch.randn(*labels.shape, 8, device=device), torch.randn(11, 8, device=device)
    expected, found = (
        linear_token_logps(hidden, weight, y, backend="triton")
        for y in (labels.contiguous(), labels)
    )
    assert torch.equal(found, expected)
    if labels.dim() == 2:
        rewards = torch.randn(4, device=device)
        objective = RPOObjective(reference="none")
        for loss, inputs in ((rpo_loss, (x,)), (linear_rpo_loss, (hidden, weight))):
            expected, found = (
                loss(*inputs, y, rewards, objective, backend="triton").loss
                for y in (labels.contiguous(), labels)
            )
            assert torch.equal(found, expected)


@pytest.mark.skipif(not HAS_GPU, reason="on a CPU such labels raise (test_bad_input)")
def test_token_logps_of_unchecked_bad_labels_are_nan():
    x = torch.randn(3, 11, device="cuda", requires_grad=True)
    logps = token_logps(x, torch.tensor([2, 11, -1], device="cuda"))
    (grad,) = torch.autograd.grad(logps.sum(), x)
    assert logps.isnan().tolist() == [False, True, True]
    assert grad.isnan().any(-1).tolist() == [False, True, True]


# ---- where rows lie, and how many programs read them ---------------------------------------------


def at_offset(x, elements):
    """A copy of rows ``[N, V]`` that begins so many elements after a multiple of 16 bytes."""
    memory = torch.empty(x.numel() + 32, dtype=x.dtype, device=x.device)
    start = -memory.data_ptr() // x.element_size() % (16 // x.element_size()) + elements
    return memory[start : start + x.numel()].view(x.shape).copy_(x)


def with_gradient(x, labels, backend, **options):
    x = x.detach().requires_grad_()
    logps, entropies = token_logps_and_entropy(x, labels, backend=backend, **options)
    (grad,) = torch.autograd.grad((logps + 0.3 * entropies).sum(), x)
    return logps.detach(), entropies.detach(), grad


@pytest.fixture(params=["sm_90", pytest.param("sm_100", marks=pytest.mark.slow)])
def arch(request):
    """Launches are set up as on a chip, with its tiles."""
    with launch.assumed_arch(request.param):
        yield request.param


@pytest.mark.parametrize("V", [5, 8, 1029, 4096 + 3])
def test_token_logps_have_the_same_bits_wherever_rows_begin(V, arch, device):
    """Rows begin at every offset from 16 bytes; with an odd V each row at another one.

    The kernel, not PyTorch, promises this.
    """
    for dtype in (torch.float16, torch.float32):
        x = (torch.randn(6, V, device=device) * 2).to(dtype)
        labels = torch.tensor([V - 1, V // 2, 0, 1, V - 2, V // 3], device=device)
        # Rows made of columns that share a sum and lie in edges: only there a rounding in another
        # order would show.
        tile = launch.launch_settings("forward", V, x.element_size(), arch).tile
        x[3:, torch.arange(V) % tile > 2] -= 60
        expected = with_gradient(at_offset(x, 0), labels, "triton")
        padded = torch.zeros(6, -(-V // 16) * 16, dtype=dtype, device=device)[:, :V].copy_(x)
        got = with_gradient(padded, labels, "triton")
        assert all(map(torch.equal, got, expected))
        for offset in (1, 3, 16 // x.element_size() - 1):
            got = with_gradient(at_offset(x, offset), labels, "triton")
            assert all(map(torch.equal, got, expected)), (dtype, offset)


@pytest.fixture
def many_parts(monkeypatch):
    """Rows in parts of one tile or a few; yields a switch between one program per row and one per
    part.
    """
    monkeypatch.setattr(launch, "PART", 512)

    def switch(split):
        for module in (vocabulary_forward, vocabulary_backward):
            monkeypatch.setattr(module, "splits_rows", lambda N, device: split)

    return switch


def test_token_logps_have_the_same_bits_however_many_programs_read_a_row(many_parts, device):
    V = 2048 + 777
    x = torch.randn(5, V, device=device) * 6
    # a part that is far above the label's, and one that is beyond all
    x[1, 5], x[2, 2000] = (
        300.0,
        1e6,
    )
    x[3, 700:] = -float("inf")
    labels = torch.tensor([2100, 1000, 3, 4, -100], device=device)
    many_parts(False)
    expected = with_gradient(x, labels, "triton")
    assert worst(expected[0], reference.token_logps(x.double(), labels)) <= 1e-6 * 1e6
    keep = [0, 1, 3, 4]
    assert worst(expected[0][keep], reference.token_logps(x.double(), labels)[keep]) <= 1e-4
    many_parts(True)
    assert all(map(torch.equal, with_gradient(x, labels, "triton"), expected))
    for i in keep:  # and alone
        assert torch.equal(
            with_gradient(x[i : i + 1], labels[i : i + 1], "triton")[0][0], expected[0][i]
        )


BEYOND = {  # logits beside random ones, label, whether NaN is allowed
    "dominates": ({7: 5e6}, 7, False),
    "far below": ({7: 5e6}, 3, False),
    "ties": ({7: 5e6, 9: 5e6}, 7, False),
    "all low": (-4e6, 7, False),
    "masked label": ({7: -1e9}, 7, False),
    "dominates from beyond": ({7: 1e9}, 7, False),
    "dominates from far beyond": ({7: 1e30}, 7, False),
    "another from beyond": ({7: 1e9}, 3, True),
    "ties beyond": ({7: 1e9, 9: 1e9}, 7, True),
    "all masked": (-1e9, 7, True),
}


@pytest.mark.parametrize("name", BEYOND)
def test_token_logps_of_huge_logits_are_right_or_nan(name, device):
    """A chip rounds y * scale2 - shift once: of a product beyond 2^24 it keeps what rounding the
    shift has left.
    """
    logits, label, may_be_nan = BEYOND[name]
    x = torch.randn(1, 300, device=device)
    if isinstance(logits, float):
        x += logits
    else:
        x[0, list(logits)] = torch.tensor(list(logits.values()), device=device)
    ours = x.clone().requires_grad_()
    logps = token_logps(ours, torch.tensor([label], device=device), backend="triton")
    logps.sum().backward()
    truth = x.double().requires_grad_()
    expected = reference.token_logps(truth, torch.tensor([label], device=device))
    expected.sum().backward()
    if may_be_nan:
        assert logps.isnan().all() and ours.grad.isnan().all()
    else:
        assert worst(logps, expected) <= 1e-6 * max(1.0, float(expected.detach().abs().max()))
        assert worst(ours.grad, truth.grad) <= 1e-5


def test_token_logps_of_equal_rows_are_equal_in_any_batch(many_parts, device):
    V = 2048 + 777
    x = (torch.randn(6, V, device=device) * 6).half()
    labels = torch.randint(0, V, (6,), device=device)
    many_parts(False)
    policy = token_logps(x, labels, backend="triton")
    many_parts(True)
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        assert torch.equal(
            token_logps(x[part].clone(), labels[part], backend="triton"), policy[part]
        )


def test_token_logps_of_more_rows_than_programs(monkeypatch, device):
    x, labels = torch.randn(7, 33, device=device), torch.randint(0, 33, (7,), device=device)
    expected = with_gradient(x, labels, "triton")
    for module in (vocabulary_forward, vocabulary_backward):
        monkeypatch.setattr(module, "MAX_PROGRAMS", 3)
    assert all(map(torch.equal, with_gradient(x, labels, "triton"), expected))


def test_token_logps_write_gradients_at_another_alignment(device):
    """Logits in padded rows, gradients in rows without padding: 16-byte writes, and reads as wide
    as the rows allow.
    """
    V = 1029
    plain, backward = LogitTransform(), vocabulary_backward.vocabulary_backward
    x = torch.randn(1, 4, V + 11, device=device).half()[..., 3 : V + 3]
    labels = torch.tensor([0, -100, 517, V - 1], device=device)
    logps, lse, _ = vocabulary_forward.vocabulary_forward(x, labels, plain)
    coef = torch.tensor([1.0, 1.0, -2.0, 0.5], device=device)
    out = torch.full((1, 4, V), float("nan"), dtype=torch.float16, device=device)
    backward(x, labels, logps, lse, coef, plain, out)
    inplace = x.clone()
    backward(inplace, labels, logps, lse, coef, plain, inplace)
    assert torch.equal(out, inplace)
    _, _, truth64 = truth(x[0], labels, logp_weight=coef.double())
    assert worst(out[0], truth64) <= torch.finfo(torch.float16).eps * float(truth64.abs().max())


@pytest.mark.parametrize("entropy", [False, True])
def test_token_logps_of_shards_without_a_finite_column(entropy, backend, device):
    """A vocabulary that is padded with -inf meets them on its last rank; a part of a row may be one
    too.
    """
    inf = float("inf")
    rows = torch.tensor(
        [
            [-inf, -inf, -inf, -inf, -inf, -8.4, -inf, -inf],  # nothing but the label
            [
                -inf,
                -inf,
                -inf,
                -inf,
                -120.0,
                -117.0,
                -118.5,
                -119.0,
            ],  # nothing on the first shard, little on the second
            [-120.0, -117.0, -118.5, -119.0, -inf, -inf, -inf, -inf],
            [1.0, 2.0, 3.0, 4.0, -inf, -inf, -inf, -inf],
            [-inf, -inf, -inf, -inf, 90.0, -3.0, 2.0, 91.0],
        ],
        device=device,
    )
    labels, transform = torch.tensor([5, 5, 1, 2, 5], device=device), LogitTransform()
    modules = {
        x: module_of("test", backend, torch.device(device), x)
        for x in ("vocabulary_forward", "shards")
    }
    statistics = [
        modules["vocabulary_forward"].shard_statistics(
            part[None].contiguous(), local, transform, entropy
        )
        for part, local in (
            (rows[:, :4], torch.where(labels < 4, labels, -1)),
            (rows[:, 4:], torch.where(labels >= 4, labels - 4, -1)),
        )
    ]
    logps, lse, entropies = modules["shards"].combine(
        torch.stack(statistics), labels, transform, entropy
    )
    assert worst(logps, reference.token_logps(rows.double(), labels)) < 1e-5
    assert lse.isfinite().all()
    if entropy:
        assert worst(entropies, reference.token_entropy(rows.double(), labels)) < 1e-5


@pytest.mark.parametrize("split", [False, True])
def test_token_logps_of_parts_without_a_finite_column(split, many_parts, device):
    many_parts(split)
    V = 2048 + 777
    x = torch.full((4, V), float("-inf"), device=device)
    # its label is at -inf
    x[3, 2000:2004] = torch.tensor([-120.0, -117.0, -118.5, -119.0], device=device)
    x[0, 5] = -8.4
    x[1, 2000:2004] = torch.tensor([-120.0, -117.0, -118.5, -119.0], device=device)
    x[2, 7], x[2, 2500:2502] = -90.0, 3.0
    labels = torch.tensor([5, 2001, 7, 0], device=device)
    ours = with_gradient(x, labels, "triton")
    assert worst(ours[0], reference.token_logps(x.double(), labels)) < 1e-5
    assert ours[-1].isfinite().all()


def test_launch_settings_come_from_the_table_and_a_user_s_table_comes_first(monkeypatch, tmp_path):
    own = tmp_path / "table.json"
    row = {
        "arch": "sm_90",
        "op": "forward",
        "element_size": 2,
        "V_at_least": 1000,
        "lanes": 128,
        "vec": 8,
        "num_warps": 4,
        "num_stages": 2,
        "evidence": "mine",
    }
    own.write_text(json.dumps([row]))
    launch.launch_settings.cache_clear()
    package = launch.launch_settings("forward", 2000, 2, "sm_90")
    assert package.evidence != "mine" and package.vec == 8
    assert launch.launch_settings("forward", 2000, 2, "sm_103") == launch.launch_settings(
        "forward", 2000, 2, "sm_100"
    )
    monkeypatch.setenv(launch.OWN_TABLE, str(own))
    launch.launch_settings.cache_clear()
    assert launch.launch_settings("forward", 2000, 2, "sm_90").evidence == "mine"
    assert launch.launch_settings("forward", 10, 2, "sm_90").evidence != "mine"
    own.write_text(json.dumps([row | {"lanes": 100}]))
    launch.launch_settings.cache_clear(), launch._rows.cache_clear()
    with pytest.raises(ValueError, match="`lanes` must be a power of two"):
        launch.launch_settings("forward", 2000, 2, "sm_90")
    launch.launch_settings.cache_clear(), launch._rows.cache_clear()


def test_token_logps_rows_that_one_backend_saved_serve_the_other(device):
    """Both keep the logsumexp in one unit. Triton's exponents are multiples of an fp32 log2 e,
    which is off by up to 2^-25: at logits near 300 the two differ by as much of them.
    """
    x = (torch.randn(1, 6, 1029, device=device) * 5 + 300).requires_grad_()
    labels = torch.randint(0, 1029, (6,), device=device)
    plain, coef = LogitTransform(), torch.randn(6, device=device)
    _, _, truth64 = truth(x[0], labels, logp_weight=coef.double())
    for forward, backward in [("torch", "triton"), ("triton", "torch")]:
        choose = lambda backend, name: getattr(
            module_of("test", backend, torch.device(device), name), name
        )
        logps, lse, _ = choose(forward, "vocabulary_forward")(x.detach(), labels, plain)
        out = torch.full_like(x, float("nan"), requires_grad=False)
        choose(backward, "vocabulary_backward")(x.detach(), labels, logps, lse, coef, plain, out)
        assert worst(out[0], truth64) < 320 * 2**-24 * float(truth64.abs().max())
