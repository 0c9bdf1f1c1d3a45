"""The linear path against float64 truth and against the logits path, in every plan it may
choose.
"""

import contextlib
import itertools

import pytest
import torch

from rpo_kernels import (
    RPOObjective,
    gemm,
    linear_rpo_loss,
    linear_token_logps,
    linear_token_logps_and_entropy,
    reference,
    rpo_loss,
)
from rpo_kernels.ops.windows import split_into_windows

from ..helpers import HAS_GPU, kernel_dtypes, operator_calls, peak_memory, worst
from .test_preference import OBJECTIVES, batch, in_float64

H = 6
ROW = 5 * (4 + 4)  # bytes of a row of five fp32 logits, and as much again for slack
JAGGED = lambda x: torch.nested.nested_tensor_from_jagged(x, torch.tensor([0, 3, 6, 9, 12]))
# Workspaces of 1 row (every group in two sweeps), a few rows (one group or two at a time), and all
# in one.
WORKSPACES = {"row": 5 * 4, "groups": 12 * 5 * 4, "all": None}


def head(logits, device):
    """Hidden states, weight and bias for labels of these logits' shape."""
    V = logits.shape[-1]
    return (
        torch.randn(*logits.shape[:-1], H, device=device),
        torch.randn(V, H, device=device),
        torch.randn(V, device=device),
    )


def relative(a, b):
    return worst(a, b) / max(float(b.detach().abs().max()), 1e-30)


# a few: test_preference has all of them, and what depends on the workspace is the order of windows
@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("objective", OBJECTIVES[::7])
def test_linear_rpo_loss_equals_the_reference_whatever_the_workspace(
    objective, workspace, backend, device
):
    if backend == "triton" and workspace == "all" and not HAS_GPU:
        pytest.skip(
            "the plan with everything in one chunk runs on the torch backend and in "
            "test_rows_and_packed"
        )
    logits, labels, rewards, kwargs = batch(objective, device, packed=True, ragged=True)
    leaves = [x.requires_grad_() for x in head(logits, device)]
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    options = {"softcap": 20.0, "temperature": 1.3}
    rewards64 = None if rewards is None else rewards.double()
    truth = reference.linear_rpo_loss(
        *doubles[:2], labels, rewards64, objective, bias=doubles[2], **in_float64(kwargs), **options
    )
    truth.loss.backward()
    ours = linear_rpo_loss(
        *leaves[:2],
        labels,
        rewards,
        objective,
        bias=leaves[2],
        workspace_bytes=WORKSPACES[workspace],
        backend=backend,
        **kwargs,
        **options,
    )
    ours.loss.backward()
    for a, b in [
        (ours.loss, truth.loss),
        (ours.losses, truth.losses),
        (ours.rewards, truth.rewards),
        (ours.logps, truth.logps),
    ]:
        assert relative(a, b) < 5e-6
    assert torch.equal(ours.lengths.long(), truth.lengths)
    for leaf, double in zip(leaves, doubles):
        assert relative(leaf.grad, double.grad) < 1e-5


@pytest.mark.parametrize("packed", [False, True])
def test_linear_rpo_loss_of_rows_and_packed_sequences_equals_rpo_loss(packed, backend, device):
    objective = RPOObjective("forward_kl", 0.3, sft_weight=0.1, sft_normalizer="tokens")
    logits, labels, rewards, kwargs = batch(objective, device, packed, ragged=False)
    hidden, weight, bias = (x.requires_grad_() for x in head(logits, device))
    ours = linear_rpo_loss(
        hidden, weight, labels, rewards, objective, bias=bias, backend=backend, **kwargs
    )
    theirs = rpo_loss(
        hidden @ weight.t() + bias, labels, rewards, objective, backend=backend, **kwargs
    )
    for a, b in zip(ours[:6], theirs[:6]):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    # an upstream gradient other than 1
    a = torch.autograd.grad(ours.loss * 3, (hidden, weight, bias))
    b = torch.autograd.grad(theirs.loss * 3, (hidden, weight, bias))
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3)))
@pytest.mark.parametrize("workspace", WORKSPACES)
def test_linear_functions_give_any_subset_of_gradients_from_any_upstream(
    needs, workspace, backend, device
):
    N, V = 7, 5
    hidden, weight, bias = head(torch.empty(N, V), device)
    labels = torch.randint(0, V, (N,), device=device)
    labels[[1, 4]] = -100
    a, b = torch.randn(2, N, device=device)
    leaves = [x.requires_grad_(n) for x, n in zip((hidden, weight, bias), needs)]
    doubles = [x.detach().double().requires_grad_(n) for x, n in zip(leaves, needs)]
    z = doubles[0] @ doubles[1].t() + doubles[2]
    expected = reference.token_logps(z, labels), reference.token_entropy(z, labels)
    options = {"bias": leaves[2], "workspace_bytes": WORKSPACES[workspace], "backend": backend}
    both = linear_token_logps_and_entropy(*leaves[:2], labels, **options)
    alone = linear_token_logps(*leaves[:2], labels, **options)
    assert worst(both[0], expected[0]) < 1e-5 and worst(both[1], expected[1]) < 1e-5
    assert torch.equal(alone, both[0])
    if not any(needs):
        return
    inputs = [x for x, n in zip(leaves, needs) if n]
    truths = [x for x, n in zip(doubles, needs) if n]
    for total, truth in [
        ((both[0] * a + both[1] * b).sum(), (expected[0] * a + expected[1] * b).sum()),
        ((alone * a).sum(), (expected[0] * a).sum()),
    ]:
        for x, y in zip(
            torch.autograd.grad(total, inputs),
            torch.autograd.grad(truth, truths, retain_graph=True),
        ):
            assert relative(x, y) < 1e-5


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_linear_token_logps_and_entropy_has_one_gradient_however_it_is_announced(
    workspace, backend, device
):
    hidden, weight, bias = (x.requires_grad_() for x in head(torch.empty(7, 5), device))
    labels = torch.tensor([0, -100, 2, 3, -100, 1, 4], device=device)
    options = {"bias": bias, "workspace_bytes": WORKSPACES[workspace], "backend": backend}
    gradients = []
    for entropy_grad in (None, True):
        logps, entropies = linear_token_logps_and_entropy(
            hidden, weight, labels, entropy_grad=entropy_grad, **options
        )
        total = (logps * torch.arange(7, device=device)).sum() - 2 * entropies.sum()
        gradients.append(torch.autograd.grad(total, (hidden, weight, bias)))
    for a, b in zip(*gradients):
        assert relative(a, b) < 1e-6
    reported = linear_token_logps_and_entropy(hidden, weight, labels, entropy_grad=False, **options)
    assert reported[0].requires_grad and not reported[1].requires_grad
    with pytest.raises(TypeError, match="`entropy_grad` must be True, False or None, got 1"):
        linear_token_logps_and_entropy(hidden, weight, labels, entropy_grad=1)


@pytest.fixture
def gemms(monkeypatch):
    """Multiply-adds done, in units of one row against the whole head."""
    done = []

    def count(name, rows):
        inner = getattr(gemm, name)

        def counting(*args):
            done.append((name, rows(*args)))
            return inner(*args)

        monkeypatch.setattr(gemm, name, counting)

    count("project", lambda hidden, weight, out: len(hidden))
    count("backproject", lambda p, weight, out: len(p))
    count("weight_gradient", lambda p, x, out, accumulate: len(x))
    return done


ROW_OF_P = 5 * 4  # bytes: fp32 logits and P share their rows


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("trainable", "rows", "dropped"),
    # groups of 6, 3 and 6 rows; one loss per group keeps P of all of them until the backward,
    # beside a chunk that is computed anew
    [
        (True, None, (0, 0)),
        (True, 12, (0, 4)),
        (True, 1, (12, 15)),
        (False, None, (0, 0)),
        (False, 1, (0, 0)),
        (None, 1, (0, 0)),
    ],
)
def test_linear_rpo_loss_costs_three_gemms_and_one_for_rows_whose_p_was_dropped(
    trainable, rows, dropped, reduction, gemms, backend, device, monkeypatch
):
    """Two when the head is frozen, one without gradients; of the scored rows only."""
    monkeypatch.setattr("rpo_kernels.ops.head.CPU_CHUNK_ROWS", 1)
    monkeypatch.setattr("rpo_kernels.ops.head.GPU_CHUNK_ROWS", 1)
    labels = torch.randint(0, 5, (6, 4), device=device)
    labels[:, 0], labels[2] = -100, -100
    hidden, weight, _ = head(torch.empty(6, 4, 5), device)
    hidden.requires_grad_(trainable is not None)
    weight.requires_grad_(bool(trainable))
    out = linear_rpo_loss(
        hidden,
        weight,
        labels,
        torch.randn(6, device=device),
        RPOObjective(),
        ref_logps=torch.zeros(6, device=device),
        reduction=reduction,
        workspace_bytes=rows and rows * ROW_OF_P,
        backend=backend,
    )
    before = len(gemms)
    if trainable is not None:
        out.loss.sum().backward()
    assert reduction == "none" or len(gemms) == before  # the gradients were ready
    expected = {True: 3, False: 2, None: 1}[trainable]
    assert sum(n for _, n in gemms) == expected * 15 + dropped[reduction == "none"]


@pytest.mark.parametrize(
    ("trainable", "rows", "dropped"),
    [(True, 1, 6), (True, 4, 3), (True, None, 0), (False, 1, 0), (False, None, 0), (None, 1, 0)],
)
def test_linear_token_logps_costs_three_gemms_and_one_for_rows_whose_p_was_dropped(
    trainable, rows, dropped, gemms, backend, device, monkeypatch
):
    monkeypatch.setattr("rpo_kernels.ops.head.CPU_CHUNK_ROWS", 1)
    monkeypatch.setattr("rpo_kernels.ops.head.GPU_CHUNK_ROWS", 1)
    labels = torch.randint(0, 5, (9,), device=device)
    labels[:3] = -100
    hidden, weight, _ = head(torch.empty(9, 5), device)
    hidden.requires_grad_(trainable is not None)
    weight.requires_grad_(bool(trainable))
    logps = linear_token_logps(
        hidden, weight, labels, workspace_bytes=rows and rows * ROW_OF_P, backend=backend
    )
    if trainable is not None:
        (logps * torch.randn(9, device=device)).sum().backward()
    expected = {True: 3, False: 2, None: 1}[trainable]
    assert sum(n for _, n in gemms) == expected * 6 + dropped


def test_linear_rpo_loss_with_a_reference_head_equals_its_log_probs(backend, device):
    labels = torch.randint(0, 5, (6, 4), device=device)
    labels[:, 0] = -100
    hidden, weight, bias = head(torch.empty(6, 4, 5), device)
    ref_hidden, ref_weight = (
        torch.randn(6, 4, H + 2, device=device),
        torch.randn(5, H + 2, device=device),
    )
    rewards = torch.randn(6, device=device)
    hidden.requires_grad_()
    for workspace in WORKSPACES.values():
        options = {"bias": bias, "workspace_bytes": workspace, "backend": backend}
        live = linear_rpo_loss(
            hidden,
            weight,
            labels,
            rewards,
            RPOObjective(),
            ref_hidden=ref_hidden,
            ref_weight=ref_weight,
            ref_bias=bias,
            **options,
        )
        ref_logps = linear_token_logps(ref_hidden, ref_weight, labels, **options)
        given = linear_rpo_loss(
            hidden, weight, labels, rewards, RPOObjective(), ref_logps=ref_logps, **options
        )
        torch.testing.assert_close(live.loss, given.loss, rtol=1e-5, atol=1e-6)
        same = linear_rpo_loss(
            hidden, weight, labels, rewards, RPOObjective(), ref_hidden=hidden.detach(), **options
        )
        assert (same.rewards == 0).all()


def test_linear_rpo_loss_of_each_group_takes_any_upstream_gradient(backend, device):
    objective = RPOObjective("backward_kl", 0.3, sft_weight=0.1)
    logits, labels, rewards, kwargs = batch(objective, device, packed=True, ragged=True)
    hidden, weight, _ = (x.requires_grad_() for x in head(logits, device))
    upstream = torch.randn(5, device=device)
    ours = linear_rpo_loss(
        hidden, weight, labels, rewards, objective, reduction="none", backend=backend, **kwargs
    )
    theirs = rpo_loss(
        hidden @ weight.t(), labels, rewards, objective, reduction="none", backend=backend, **kwargs
    )
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=1e-6)
    a = torch.autograd.grad((ours.loss * upstream).sum(), (hidden, weight))
    b = torch.autograd.grad((theirs.loss * upstream).sum(), (hidden, weight))
    for x, y in zip(a, b):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def test_counts_change_nothing_and_wrong_ones_are_refused(backend, device):
    objective = RPOObjective("squared", 0.3)
    logits, labels, rewards, kwargs = batch(objective, device, packed=True, ragged=True)
    hidden, weight, _ = head(logits, device)
    weight.requires_grad_()
    args = (hidden, weight, labels, rewards, objective)
    plain = linear_rpo_loss(*args, backend=backend, **kwargs)
    counts = plain.lengths.tolist()
    given = linear_rpo_loss(*args, counts=counts, backend=backend, **kwargs)
    assert torch.equal(plain.loss, given.loss)
    assert torch.equal(*(torch.autograd.grad(out.loss, weight)[0] for out in (plain, given)))
    logps = linear_token_logps(hidden, weight, labels, backend=backend)
    assert torch.equal(
        logps, linear_token_logps(hidden, weight, labels, count=sum(counts), backend=backend)
    )
    counts[0] += 1
    if HAS_GPU:
        assert linear_rpo_loss(*args, counts=counts, backend=backend, **kwargs).loss.isnan()
    else:
        with pytest.raises(ValueError, match="`counts` must be the scored tokens of each sequence"):
            linear_rpo_loss(*args, counts=counts, backend=backend, **kwargs)
        with pytest.raises(ValueError, match="`count` must be the number of labels"):
            linear_token_logps(hidden, weight, labels, count=sum(counts), backend=backend)


@pytest.mark.parametrize("chunks", [2, 64])
def test_linear_rpo_loss_weight_gradient_over_many_chunks_is_as_good_as_one_gemm(
    chunks, backend, device
):
    for dtype in kernel_dtypes(backend)[2:]:  # bf16
        S, T, V = 128, 2, 31
        hidden, weight = (
            torch.randn(S, T, 16, device=device).to(dtype),
            torch.randn(V, 16, device=device).to(dtype),
        )
        labels = torch.randint(0, V, (S, T), device=device)
        objective, rewards = (
            RPOObjective("squared", 0.5, reference="none"),
            torch.randn(S, device=device),
        )
        h64, w64 = (x.double().requires_grad_() for x in (hidden, weight))
        (exact,) = torch.autograd.grad(
            reference.linear_rpo_loss(h64, w64, labels, rewards, objective).loss, w64
        )
        logits = (hidden.float() @ weight.float().t()).requires_grad_()
        (dlogits,) = torch.autograd.grad(
            rpo_loss(logits, labels, rewards, objective, backend=backend).loss, logits
        )
        one = dlogits.flatten(0, 1).to(dtype).t() @ hidden.flatten(0, 1)
        weight.requires_grad_()
        workspace = V * (4 + 2) * S * T // chunks
        out = linear_rpo_loss(
            hidden, weight, labels, rewards, objective, workspace_bytes=workspace, backend=backend
        )
        (ours,) = torch.autograd.grad(out.loss, weight)
        cast = float((exact - exact.to(dtype).double()).norm())
        assert float((ours.double() - exact).norm()) <= float((one.double() - exact).norm()) + cast


def test_logits_dtype_is_fp32_for_16_bit_inputs_unless_asked_otherwise(backend, device):
    for dtype in kernel_dtypes(backend)[1:]:
        hidden = torch.randn(64, 32, device=device).to(dtype)
        weight = (torch.randn(50, 32, device=device) * 4).to(dtype)
        labels = torch.randint(0, 50, (64,), device=device)
        exact = reference.linear_token_logps(hidden.double(), weight.double(), labels)
        ours = worst(linear_token_logps(hidden, weight, labels, backend=backend), exact)
        rounded = worst(
            linear_token_logps(hidden, weight, labels, logits_dtype=dtype, backend=backend), exact
        )
        assert ours < 1e-4 < 1e-2 < rounded


@pytest.mark.parametrize(
    ("beta", "pairs", "upstream", "size", "options"),
    [
        (1e-5, 4, 65536.0, 1.0, {}),  # dlogits near 1e-9, below the smallest fp16 number
        (0.1, 1, 65536.0, 1.0, {"normalizer": 4096.0}),  # gradient accumulation: 2e-5
        (
            0.1,
            64,
            0.125,
            8.0,
            {"reduction": "sum"},
        ),  # a sum of many pairs: the weight's gradient is large
        (0.1, 64, 1.0, 30.0, {}),  # large hidden states
    ],
    ids=["small beta", "normalizer", "sum", "large hidden"],
)
@pytest.mark.parametrize("workspace", [None, 1 << 12], ids=["one chunk", "chunks"])
def test_linear_rpo_loss_of_fp16_keeps_coefficients_that_a_loss_scaler_reaches_too_late(
    beta, pairs, upstream, size, options, workspace
):
    """The plan does not depend on the backend. Gradients wait for their upstream factor in fp32."""
    hidden = (size * torch.randn(2 * pairs, 3, 32)).half().requires_grad_()
    weight, bias = (
        (0.05 * torch.randn(50, 32)).half().requires_grad_(),
        torch.zeros(50).half().requires_grad_(),
    )
    labels = torch.randint(0, 50, (2 * pairs, 3))
    objective, rewards = RPOObjective("squared", beta, reference="none"), torch.randn(2 * pairs)
    doubles = h, w, b = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    truth = reference.linear_rpo_loss(h, w, labels, rewards, objective, bias=b, **options)
    (truth.loss * upstream).backward()
    ours = linear_rpo_loss(
        hidden,
        weight,
        labels,
        rewards,
        objective,
        bias=bias,
        workspace_bytes=workspace,
        backend="torch",
        **options,
    )
    (ours.loss * upstream).backward()
    for x, exact in zip((hidden, weight, bias), doubles):
        assert x.grad.dtype == torch.float16 and relative(x.grad, exact.grad) < 2**-9
    buffer = torch.ones(50, 32)
    linear_rpo_loss(
        hidden,
        weight,
        labels,
        rewards,
        objective,
        bias=bias,
        weight_grad=buffer,
        backend="torch",
        **options,
    )
    assert relative(upstream * (buffer - 1), w.grad) < 2**-9 + 2**-22 * upstream / float(
        w.grad.norm()
    )


def test_weight_grad_is_added_to_once_under_checkpoints():
    hidden, weight = torch.randn(4, 3, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    labels, buffer = torch.randint(5, (4, 3)), torch.zeros(5, 8)

    def loss(hidden):
        return linear_rpo_loss(
            hidden, weight, labels, None, RPOObjective.simpo(), weight_grad=buffer, backend="torch"
        ).loss

    with pytest.raises(
        RuntimeError, match="`weight_grad` must be None under activation checkpointing"
    ):
        torch.utils.checkpoint.checkpoint(loss, hidden, use_reentrant=False).backward()


@pytest.mark.parametrize("known", [True, False], ids=["oneDNN", "no oneDNN"])
def test_gemm_results_of_16_bits_do_not_depend_on_the_cpu(known, monkeypatch):
    """Inside autocast, which casts what a GEMM gets, and in builds of PyTorch that do not know what
    the CPU has.
    """
    if not known:
        monkeypatch.setattr(torch.ops, "mkldnn", object())
    gemm._has_instructions.cache_clear()
    hidden, weight = torch.randn(5, 16).bfloat16(), torch.randn(24, 16).bfloat16()
    dlogits, exact = torch.randn(5, 24).bfloat16(), torch.empty(5, 24)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            gemm.project(hidden, weight, exact)
            dhidden, total = (
                gemm.backproject(dlogits, weight, torch.empty(5, 16)),
                torch.zeros(24, 16),
            )
            gemm.weight_gradient(dlogits, hidden, total, True)
    finally:
        gemm._has_instructions.cache_clear()
    torch.testing.assert_close(
        exact.double(), hidden.double() @ weight.double().t(), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        total.double(), dlogits.double().t() @ hidden.double(), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        dhidden.double(), dlogits.double() @ weight.double(), rtol=1e-5, atol=1e-5
    )


def test_linear_functions_under_autocast_use_its_dtype_and_return_gradients_of_the_parameters(
    device,
):
    hidden = torch.randn(6, 4, 8, device=device, requires_grad=True)
    weight = torch.randn(5, 8, device=device, requires_grad=True)
    labels = torch.randint(0, 5, (6, 4), device=device)
    objective, rewards = (
        RPOObjective("squared", 0.5, reference="none"),
        torch.randn(6, device=device),
    )
    with torch.autocast(device, dtype=torch.bfloat16):
        out = linear_rpo_loss(hidden, weight, labels, rewards, objective)
    out.loss.backward()
    assert weight.grad.dtype == hidden.grad.dtype == torch.float32
    h, w = (x.detach().bfloat16().double().requires_grad_() for x in (hidden, weight))
    truth = reference.linear_rpo_loss(h, w, labels, rewards, objective)
    truth.loss.backward()
    assert relative(out.loss, truth.loss) < 1e-5
    assert relative(weight.grad, w.grad) < 2**-7 and relative(hidden.grad, h.grad) < 2**-7


@pytest.mark.parametrize("shape", [(0,), (1,), (13,)])
def test_linear_functions_of_empty_batches_one_token_and_nothing_scored(shape, backend, device):
    hidden, weight, _ = (x.requires_grad_() for x in head(torch.empty(*shape, 5), device))
    labels = torch.randint(0, 5, shape, device=device)
    for ignored in (False, True):
        if ignored:
            labels = torch.full_like(labels, -100)
        logps = linear_token_logps(hidden, weight, labels, backend=backend)
        grads = torch.autograd.grad(logps.sum(), (hidden, weight))
        assert logps.shape == shape and all(g.isfinite().all() for g in grads)
        if ignored:
            assert (logps == 0).all() and all((g == 0).all() for g in grads)
        frozen = linear_token_logps(hidden, weight.detach(), labels, backend=backend)
        assert torch.equal(torch.autograd.grad(frozen.sum(), hidden)[0], grads[0])


def test_linear_functions_on_the_meta_device_have_shapes_and_dtypes():
    """Which has no autocast to be asked for."""
    hidden, weight, _ = (x.requires_grad_() for x in head(torch.empty(4, 3, 5), "meta"))
    labels = torch.zeros(4, 3, dtype=torch.int64, device="meta")
    out = linear_rpo_loss(
        hidden, weight, labels, None, RPOObjective.dpo(), ref_logps=torch.zeros(4, device="meta")
    )
    logps = linear_token_logps(hidden, weight, labels)
    (out.loss + logps.sum()).backward()
    assert out.loss.shape == () and out.rewards.shape == (4,) and logps.shape == (4, 3)
    assert (
        hidden.grad.shape == hidden.shape
        and weight.grad.shape == weight.shape
        and weight.grad.is_meta
    )
    with pytest.raises(TypeError, match="`weight` must have the dtype of `hidden`"):
        linear_token_logps(hidden, weight.half(), labels)


def test_linear_rpo_loss_with_nothing_to_compare_is_zero(backend, device):
    hidden, weight, _ = (x.requires_grad_() for x in head(torch.empty(4, 3, 5), device))
    labels = torch.full((4, 3), -100, device=device)
    ref_logps = torch.zeros(4, device=device)
    out = linear_rpo_loss(
        hidden, weight, labels, None, RPOObjective.dpo(), ref_logps=ref_logps, backend=backend
    )
    out.loss.backward()
    assert out.loss == 0 and (hidden.grad == 0).all() and (weight.grad == 0).all()


def test_linear_rpo_loss_second_backward_raises_and_results_repeat_bit_for_bit(backend, device):
    hidden, weight, _ = (x.requires_grad_() for x in head(torch.empty(4, 3, 5), device))
    labels = torch.randint(0, 5, (4, 3), device=device)
    objective, rewards = (
        RPOObjective("squared", 0.5, reference="none"),
        torch.randn(4, device=device),
    )
    runs = []
    for _ in range(2):
        out = linear_rpo_loss(hidden, weight, labels, rewards, objective, backend=backend)
        runs.append((out.loss, *torch.autograd.grad(out.loss, (hidden, weight), retain_graph=True)))
        with pytest.raises(RuntimeError, match="linear_rpo_loss: a second backward is not"):
            out.loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(*runs))


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_linear_token_logps_second_backward_gives_the_same_numbers(workspace, backend, device):
    hidden, weight, bias = (x.requires_grad_() for x in head(torch.empty(4, 3, 5), device))
    labels, rewards = torch.randint(0, 5, (4, 3), device=device), torch.randn(4, device=device)
    options = {"bias": bias, "workspace_bytes": WORKSPACES[workspace], "backend": backend}
    logps = linear_token_logps(hidden, weight, labels, **options).pow(2).sum()
    objective = RPOObjective("squared", 0.5, reference="none")
    losses = (
        linear_rpo_loss(hidden, weight, labels, rewards, objective, reduction="none", **options)
        .loss.pow(2)
        .sum()
    )
    for loss in (logps, losses):
        first, second = (
            torch.autograd.grad(loss, (hidden, weight, bias), retain_graph=True) for _ in range(2)
        )
        assert all(torch.equal(a, b) and a.abs().sum() > 0 for a, b in zip(first, second))


def test_linear_functions_give_a_weight_emptied_after_the_forward_its_gradient(device):
    """As ZeRO-3 does with parameters, whose shape is [0] then until they are gathered again."""
    leaf, hidden = (
        torch.randn(5, H, device=device, requires_grad=True),
        torch.randn(4, 3, H, device=device),
    )
    labels, objective = torch.randint(5, (4, 3), device=device), RPOObjective(reference="none")
    grads = []
    for emptied in (False, True):
        weight = leaf * 1.0
        loss = linear_rpo_loss(
            hidden, weight, labels, torch.arange(4.0, device=device), objective
        ).loss
        if emptied:
            weight.data = weight.new_empty(0)
        grads += torch.autograd.grad(loss, weight)
    assert torch.equal(*grads)


def test_linear_functions_compile_into_one_graph(backend, device):
    objective = RPOObjective("squared", 0.5, reference="none")
    hidden, weight, _ = (x.requires_grad_() for x in head(torch.empty(4, 3, 5), device))
    labels = torch.randint(0, 5, (4, 3), device=device)
    rewards = torch.randn(4, device=device)

    def run(hidden, weight):
        lp, entropy = linear_token_logps_and_entropy(hidden.tanh(), weight, labels, backend=backend)
        return (
            linear_rpo_loss(hidden.tanh(), weight, labels, rewards, objective, backend=backend).loss
            * 2
            + (lp * entropy).sum()
        )

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(run(hidden, weight), (hidden, weight))
    for a, b in zip(torch.autograd.grad(compiled(hidden, weight), (hidden, weight)), expected):
        torch.testing.assert_close(a, b)


def test_linear_rpo_loss_packs_whole_groups_into_windows():
    windows = split_into_windows([3, 2, 0, 0, 9, 1, 1, 1], [0, 2, 4, 6, 6, 8], rows=7)
    expected = [
        (slice(0, 2), slice(0, 4), slice(0, 5)),
        (slice(2, 4), slice(4, 6), slice(5, 15)),
        (slice(4, 5), slice(6, 8), slice(15, 17)),
    ]
    assert [tuple(window) for window in windows] == expected
    (window,) = split_into_windows([0, 0], [0, 2], rows=1)
    assert window.rows == slice(0, 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"weight": torch.zeros(H, 5)},
            ValueError,
            r"`hidden` must be \[..., H\] with H = 5 .* did you mean `weight.t\(\)`\? "
            "If `hidden` holds logits, call rpo_loss",
        ),
        ({"hidden": (torch.zeros(4, 3, H),)}, TypeError, "`hidden` must be .*Tensor, got tuple"),
        (
            {"weight": torch.nn.Linear(H, 5)},
            TypeError,
            r"`weight` must be a torch.Tensor, got Linear; pass its \.weight",
        ),
        (
            {"weight": torch.zeros(5, H, device="meta")},
            ValueError,
            r"`weight` must be on cpu like `hidden`, got meta; pass hidden.to\(weight.device\)",
        ),
        ({"weight": torch.zeros(5)}, ValueError, r"`weight` must be \[V, H\]"),
        (
            {"weight": torch.zeros(5, H, dtype=torch.bfloat16)},
            TypeError,
            "`weight` must have the dtype of `hidden`",
        ),
        ({"bias": torch.zeros(4)}, ValueError, r"`bias` must be \[V\] = \[5\], got \[4\]"),
        (
            {"labels": torch.zeros(4, 4, dtype=torch.int64)},
            ValueError,
            r"did you mean `labels\[:, 1:\]`",
        ),
        ({"labels": torch.full((4, 3), 5)}, ValueError, r"`labels` must lie in \[0, 5\)"),
        (
            {"workspace_bytes": 10},
            ValueError,
            "`workspace_bytes` must hold one row of 5 logits, at least 20; got 10",
        ),
        ({"workspace_bytes": 0}, ValueError, "`workspace_bytes` must be > 0"),
        (
            {"logits_dtype": torch.float16},
            ValueError,
            "`logits_dtype` must be torch.float32 or the dtype of the GEMMs",
        ),
        ({"counts": [1, 2]}, ValueError, "`counts` must be one number >= 0 per sequence, S = 4"),
        ({"counts": torch.ones(4)}, TypeError, "`counts` must be a sequence of ints on the host"),
        (
            {"ref_hidden": torch.zeros(4, 3, H)},
            ValueError,
            "`ref_logps` and `ref_hidden` both say what the reference is",
        ),
        (
            {"ref_weight": torch.zeros(5, H)},
            ValueError,
            r"`ref_weight` must be None without `ref_hidden`, got \[5, 6\]",
        ),
        (
            {
                "ref_logps": None,
                "ref_hidden": torch.zeros(4, 3, H),
                "ref_weight": torch.zeros(7, H),
            },
            ValueError,
            "`ref_weight` must have the vocabulary of `weight`, 5; got 7",
        ),
        (
            {"lora_hidden": torch.zeros(4, 3, 2)},
            ValueError,
            "`lora_weight` must be a tensor where the other is one",
        ),
        (
            {"lora_hidden": torch.zeros(4, 3, 2), "lora_weight": torch.zeros(2, 5)},
            ValueError,
            r"`lora_weight` must be \[V, r\] with V = 5, got \[2, 5\]; did you mean "
            r"`lora_weight.t\(\)`",
        ),
        (
            {"lora_hidden": torch.zeros(4, 2), "lora_weight": torch.zeros(5, 2)},
            ValueError,
            r"`lora_hidden` must be \[4, 3, 2\], .* got \[4, 2\]",
        ),
        (
            {"weight_grad": torch.zeros(H, 5)},
            ValueError,
            r"`weight_grad` must be \[V, H\] = \[5, 6\] like `weight`, got \[6, 5\]",
        ),
        (
            {"weight_grad": torch.zeros(5, H)},
            ValueError,
            "`weight_grad` must be None for a `weight` that requires no gradient",
        ),
        (
            {"weight_grad": torch.zeros(5, H).double()},
            TypeError,
            "`weight_grad` must be float32, float16 or bfloat16",
        ),
        ({"ref_logps": None}, ValueError, "`ref_logps` must be .* got None"),
        (
            {"group_size": 4, "cu_groups": torch.tensor([0, 4], dtype=torch.int32)},
            ValueError,
            "`group_size` and `cu_groups` both say which responses belong together",
        ),
        (
            {"hidden": JAGGED(torch.zeros(12, H))},
            TypeError,
            r"`hidden` must be a plain tensor.* pass hidden.values\(\)",
        ),
        (
            {"labels": JAGGED(torch.zeros(12).long())},
            TypeError,
            r"`labels` must be a plain tensor.* pass labels.values\(\)",
        ),
        (
            {"ref_logps": torch.zeros(3)},
            ValueError,
            r"`ref_logps` must be \[4\] or \[4, 3\], got \[3\]",
        ),
    ],
)
def test_linear_functions_refuse_bad_input(change, error, message):
    arguments = {
        "hidden": torch.zeros(4, 3, H),
        "weight": torch.zeros(5, H),
        "labels": torch.zeros(4, 3, dtype=torch.int64),
        "rewards": torch.zeros(4),
        "objective": RPOObjective(),
        "ref_logps": torch.zeros(4),
    } | change
    with pytest.raises(error, match=f"linear_rpo_loss: .*{message}"):
        linear_rpo_loss(**arguments)


@pytest.mark.parametrize("workspace", [40, None], ids=["rows dropped", "all rows kept"])
@pytest.mark.parametrize("frozen", [False, True])
def test_linear_operators_pass_opcheck(frozen, workspace, device):
    hidden, weight, bias = (x.requires_grad_() for x in head(torch.empty(4, 3, 5), device))
    if frozen:
        weight, bias = weight.detach(), None
    labels = torch.randint(0, 5, (4, 3), device=device)
    labels[0, 1] = -100
    options = {"bias": bias, "workspace_bytes": workspace, "backend": "torch"}
    objective, rewards = RPOObjective("squared", reference="none"), torch.randn(4, device=device)
    with operator_calls() as seen:
        total = linear_token_logps(hidden, weight, labels, **options).sum()
        total = total + sum(
            x.sum() for x in linear_token_logps_and_entropy(hidden, weight, labels, **options)
        )
        for reduction in ("mean", "none"):
            out = linear_rpo_loss(
                hidden, weight, labels, rewards, objective, reduction=reduction, **options
            )
            total = total + out.loss.sum()
        total.backward()
    names = {operator.name for operator, _ in seen}
    assert names >= {
        "linear_token_logps",
        "linear_rpo_loss",
        "linear_rpo_loss_ready",
        "linear_rpo_loss_per_group",
        "linear_settle",
    }
    for operator, args in seen:
        if operator.name.startswith("linear"):
            checks = [
                "test_schema",
                "test_autograd_registration",
                "test_faketensor",
                "test_aot_dispatch_dynamic",
            ]
            if operator.name in ("linear_rpo_loss", "linear_settle"):  # have no derivative
                checks.remove("test_autograd_registration")
                args = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
            torch.library.opcheck(operator._operator, operator.packed(args), test_utils=checks)


@pytest.mark.parametrize("workspace", WORKSPACES)
def test_lora_hidden_and_lora_weight_are_a_wider_head(workspace, backend, device):
    """x W^T + x' W'^T is [x x'] [W W']^T, whose reference knows nothing of a low rank."""
    if backend == "triton" and workspace != "groups" and not HAS_GPU:
        pytest.skip("the plans do not depend on the backend, and the interpreter is slow")
    objective = RPOObjective("squared", 0.3)
    logits, labels, rewards, kwargs = batch(objective, device, packed=True, ragged=True)
    (hidden, weight, bias), (lora_hidden, lora_weight, _) = (
        head(logits, device),
        head(logits, device),
    )
    leaves = [
        x.requires_grad_()
        for x in (hidden, weight, bias, lora_hidden[..., :2].clone(), lora_weight[:, :2].clone())
    ]
    doubles = [x.detach().double().requires_grad_() for x in leaves]
    wide = [torch.cat([doubles[i], doubles[i + 3]], -1) for i in (0, 1)]
    options = {"workspace_bytes": WORKSPACES[workspace], "backend": backend}
    options |= dict(zip(("bias", "lora_hidden", "lora_weight"), leaves[2:]))
    truth = reference.linear_rpo_loss(
        *wide, labels, rewards.double(), objective, bias=doubles[2], **in_float64(kwargs)
    )
    ours = linear_rpo_loss(*leaves[:2], labels, rewards, objective, **options, **kwargs)
    assert relative(ours.loss, truth.loss) < 5e-6
    expected = torch.autograd.grad(truth.loss, doubles, retain_graph=True)
    for a, b in zip(torch.autograd.grad(ours.loss, leaves), expected):
        assert relative(a, b) < 1e-5
    truth = reference.linear_token_logps(*wide, labels, bias=doubles[2])
    ours = linear_token_logps(*leaves[:2], labels, **options)
    assert worst(ours, truth) < 1e-5
    upstream = torch.randn_like(ours)
    for needs in (
        [0, 1, 2, 3, 4],
        [0],
        [4],
        [3, 4],
    ):  # with the head frozen, an adapter on it still learns
        inputs, truths = [leaves[i] for i in needs], [doubles[i] for i in needs]
        expected = torch.autograd.grad((truth * upstream.double()).sum(), truths, retain_graph=True)
        for a, b in zip(
            torch.autograd.grad((ours * upstream).sum(), inputs, retain_graph=True), expected
        ):
            assert relative(a, b) < 1e-5
        ours = linear_token_logps(*leaves[:2], labels, **options)


def test_lora_weight_on_a_frozen_head_gets_gradients(backend, device):
    logits, labels, rewards, kwargs = batch(
        RPOObjective("squared", 0.3), device, packed=True, ragged=True
    )
    hidden, weight, _ = head(logits, device)
    adapter = [
        torch.randn(*hidden.shape[:-1], 2, device=device),
        torch.zeros(len(weight), 2, device=device),
    ]
    adapter = [x.requires_grad_() for x in adapter]
    out = linear_rpo_loss(
        hidden,
        weight,
        labels,
        rewards,
        RPOObjective("squared", 0.3),
        lora_hidden=adapter[0],
        lora_weight=adapter[1],
        backend=backend,
        **kwargs,
    )
    plain = linear_rpo_loss(
        hidden, weight, labels, rewards, RPOObjective("squared", 0.3), backend=backend, **kwargs
    )
    assert torch.equal(out.loss, plain.loss)  # B = 0
    dhidden, dweight = torch.autograd.grad(out.loss, adapter)
    assert (dhidden == 0).all() and (dweight != 0).any()


@pytest.mark.parametrize("workspace", WORKSPACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("free", [False, True], ids=["loss", "token_logps"])
def test_weight_grad_takes_in_the_gradient(free, dtype, workspace, backend, device):
    """Of the weight's dtype or fp32, in one flush or many, beside what it holds already; and weight
    itself gets none.
    """
    if dtype not in kernel_dtypes(backend) or (
        backend == "triton" and workspace != "groups" and not HAS_GPU
    ):
        pytest.skip("the plans do not depend on the backend, and the interpreter is slow")
    objective = RPOObjective("backward_kl", 0.3)
    logits, labels, rewards, kwargs = batch(objective, device, packed=True, ragged=True)
    hidden, weight, _ = (x.to(dtype).requires_grad_() for x in head(logits, device))
    upstream = torch.randn(labels.shape, device=device)
    size = WORKSPACES[workspace] and 2 * WORKSPACES[workspace]

    def run(weight_grad=None, factor=1.0):
        options = {"weight_grad": weight_grad, "workspace_bytes": size, "backend": backend}
        if free:
            return (linear_token_logps(hidden, weight, labels, **options) * upstream).sum() * factor
        return (
            linear_rpo_loss(hidden, weight, labels, rewards, objective, **options, **kwargs).loss
            * factor
        )

    expected = torch.autograd.grad(run(), (hidden, weight))
    for held in {torch.float32, dtype}:
        start = torch.randn(weight.shape, device=device).to(held)
        total = start.clone()
        dhidden, dweight = torch.autograd.grad(run(total), (hidden, weight), allow_unused=True)
        assert dweight is None and torch.equal(dhidden, expected[0])
        bound = (
            torch.finfo(dtype).eps * expected[1].abs() + torch.finfo(held).eps * total.abs() + 1e-6
        )
        assert ((total.double() - start.double() - expected[1].double()).abs() <= bound).all()
    if free:  # the upstream gradient is known when the buffer takes anything in
        return
    refusal = pytest.raises(
        ValueError, match="with `weight_grad` the upstream gradient of the loss must be 1, got 3"
    )
    with contextlib.nullcontext() if HAS_GPU else refusal:
        (dhidden,) = torch.autograd.grad(run(start.clone(), 3.0), hidden)
        assert dhidden.isnan().any()


def test_weight_grad_and_lora_weight_compile_into_one_graph(device):
    objective = RPOObjective("squared", 0.5, reference="none")
    hidden, weight, _ = (x.requires_grad_() for x in head(torch.empty(4, 3, 5), device))
    lora_hidden, lora_weight = (
        torch.randn(*shape, 2, device=device, requires_grad=True) for shape in ((4, 3), (5,))
    )
    labels, rewards = torch.randint(0, 5, (4, 3), device=device), torch.randn(4, device=device)

    def run(total, free):
        options = {
            "lora_hidden": lora_hidden.tanh(),
            "lora_weight": lora_weight,
            "weight_grad": total,
        }
        if free:
            return linear_token_logps(hidden.tanh(), weight, labels, **options).pow(2).sum()
        return linear_rpo_loss(hidden.tanh(), weight, labels, rewards, objective, **options).loss

    for free in (False, True):
        results = []
        for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
            total = torch.ones_like(weight)
            results.append(
                (
                    *torch.autograd.grad(function(total, free), (hidden, lora_hidden, lora_weight)),
                    total,
                )
            )
        for a, b in zip(*results):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_workspace_bytes_bound_the_memory_whatever_the_batch(dtype, device):
    """Beside it: gradients (dweight in fp32 while it is summed), on a CPU the row pass's own fp32
    chunk, or what a GEMM takes for itself: upcast inputs, and oneDNN's memory.
    """
    S, T, V, small = 8, 32, 4096, 8
    hidden, weight = (
        torch.randn(S, T, small, device=device).to(dtype),
        torch.randn(V, small, device=device).to(dtype),
    )
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    labels, rewards = torch.randint(0, V, (S, T), device=device), torch.randn(S, device=device)
    objective = RPOObjective("squared", 0.1, reference="none")

    def ours(workspace, **options):
        options |= {"workspace_bytes": workspace}
        return lambda: linear_rpo_loss(
            hidden, weight, labels, rewards, objective, **options
        ).loss.backward()

    def naive():
        logps = (
            (hidden @ weight.t()).float().log_softmax(-1).gather(-1, labels[..., None]).sum((1, 2))
        )
        ((0.1 * logps - rewards).view(-1, 2).diff(dim=1) ** 2).mean().backward()

    def peak(step):
        for _ in range(2):  # the first one loads code
            hidden.grad = weight.grad = None
            bytes_ = peak_memory(step)
        return bytes_

    fp32 = 4 * V * small
    ceiling = peak(naive)
    for workspace in (1 << 19, 1 << 20):
        row = V * (4 if dtype == torch.float32 else 6)  # bytes of fp32 logits, and of a 16-bit P
        p = torch.randn(workspace // row, V, device=device).to(dtype)
        u = torch.empty(len(p), small, device=device)
        product = peak(lambda p=p, u=u: gemm.backproject(p, weight.detach(), u))
        taken = peak(ours(workspace))
        assert workspace <= taken <= workspace + max(workspace, product) + 4 * fp32 + (1 << 18)
        assert taken <= ceiling / 4
    kept = torch.zeros(weight.shape, dtype=torch.float32, device=device)
    saved = peak(ours(1 << 19)) - peak(ours(1 << 19, weight_grad=kept))
    assert saved >= fp32  # the buffer stands in for the sum
