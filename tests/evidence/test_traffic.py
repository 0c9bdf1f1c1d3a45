"""The cost model as counts: what each kernel reads and writes, element by element, and how often
kernels are launched.

Counted in Triton's interpreter, which sees every address.
"""

import itertools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rpo_kernels import (
    RPOObjective,
    preference_loss,
    rpo_loss,
    token_logps,
    token_logps_and_entropy,
)

from ..helpers import HAS_GPU

if HAS_GPU:
    pytest.skip(
        "traffic is counted in Triton's interpreter, which a machine with a GPU does not use",
        allow_module_level=True,
    )

pytest.importorskip("numpy")  # the interpreter's
import triton
import triton.language as tl

from rpo_kernels.inputs import Groups, LogitTransform, Sequences
from rpo_kernels.kernels import launch as launch_settings_module
from rpo_kernels.kernels import vocabulary_backward as backward_module
from rpo_kernels.kernels import vocabulary_forward as forward_module
from rpo_kernels.kernels.group_pass import group_pass
from rpo_kernels.kernels.rows import row_offset
from rpo_kernels.kernels.scaling import scale
from rpo_kernels.kernels.shards import combine
from rpo_kernels.kernels.vocabulary_backward import vocabulary_backward
from rpo_kernels.kernels.vocabulary_forward import shard_statistics, vocabulary_forward
from rpo_kernels.objectives import PRESETS
from rpo_kernels.tools.ledger import ledger

PLAIN = LogitTransform()
# An odd vocabulary below a tile, and one past the fp32 tile of eight warps.
CASES = [(31, "contiguous"), (31, "transposed"), (2049, "shifted"), (2049, "padded")]


def memory(layout, V, dtype=torch.float32):
    """Logits ``[3, 4, V]``: contiguous, or views into something larger whose gaps must stay
    untouched.
    """
    if layout == "contiguous":
        return torch.randn(3, 4, V).to(dtype)
    if layout == "shifted":
        return torch.randn(3, 5, V).to(dtype)[:, :-1]
    if layout == "transposed":
        return torch.randn(4, 3, V).to(dtype).transpose(0, 1)
    return torch.randn(3, 4, V + 3).to(dtype)[:, :, :V]  # padded rows


def some_labels(V):
    labels = torch.randint(0, V, (3, 4))
    labels[0, 1] = labels[1] = labels[2, 3] = -100
    labels[2, 0] = V - 1
    return labels


def clean(launch):
    return (launch.stray, launch.races) == (0, 0)


def once(counts):
    return (counts == 1).all()


@pytest.mark.parametrize("V, layout", CASES)
def test_vocabulary_forward_reads_each_scored_logit_once_and_no_ignored_row(V, layout):
    for dtype, transform in [(torch.float16, {"softcap": 5.0}), (torch.bfloat16, {})]:
        logits, labels = memory(layout, V, dtype), some_labels(V)
        scored = labels != -100
        with ledger() as launches:
            token_logps(logits, labels, backend="triton", **transform)
            token_logps_and_entropy(logits, labels, backend="triton", **transform)
        for launch in launches:
            loads = torch.as_tensor(launch.loads["logits"].copy())
            expected = scored[..., None].expand(3, 4, V).long().clone()
            # the label's own, again
            expected.scatter_add_(-1, labels.clamp(min=0)[..., None], scored[..., None].long())
            assert torch.equal(loads.view(3, 4, V), expected)
            assert (
                launch.loaded_bytes["logits"] == int(scored.sum()) * (V + 1) * logits.element_size()
            )
            assert (
                once(launch.loads["labels"])
                and once(launch.stores["logps"])
                and once(launch.stores["lse"])
            )
            assert clean(launch)
        without, with_entropy = launches
        assert without.loaded_bytes | {"entropy": 0} == with_entropy.loaded_bytes
        assert once(with_entropy.stores["entropy"])


def test_vocabulary_forward_reads_a_shard_once_and_merges_in_one_small_launch():
    V, R = 2049, 3
    logits, labels = torch.randn(1, 12, V), some_labels(V).flatten()
    labels[5] = -1  # on another shard
    with ledger() as launches:
        statistics = shard_statistics(logits, labels, PLAIN, entropy=True)
        combine(torch.stack([statistics] * R), labels, PLAIN, entropy=True)
    shard, together = launches
    here = int(((labels != -100) & (labels != -1)).sum())
    assert shard.loaded_bytes["logits"] == 4 * (int((labels != -100).sum()) * V + here)
    assert together.loaded_bytes["statistics"] == 4 * 12 * R * 4
    assert (
        once(together.stores["logps"])
        and once(together.stores["lse"])
        and once(together.stores["entropy"])
    )
    assert clean(shard) and clean(together)


@pytest.mark.parametrize("V, layout", CASES)
def test_vocabulary_backward_reads_each_scored_logit_once_and_writes_every_gradient_once(V, layout):
    logits, labels = memory(layout, V), some_labels(V)
    scored = labels != -100
    for entropy, inplace in itertools.product((False, True), (False, True)):
        leaf = (logits.clone() if inplace else logits).requires_grad_()
        x = leaf * 1 if inplace else leaf
        with ledger() as launches:
            logps, entropies = token_logps_and_entropy(
                x, labels, inplace_backward=inplace, backend="triton"
            )
            ((logps + entropies).sum() if entropy else logps.sum()).backward()
        forward, backward = launches
        assert clean(forward) and clean(backward)
        loads = torch.as_tensor(backward.loads["logits"].copy()).view(3, 4, V)
        assert torch.equal(loads, scored[..., None].expand(3, 4, V).long())
        assert once(backward.stores["dlogits"])
        assert backward.stored_bytes["dlogits"] == logits.numel() * 4
        if inplace:
            assert (
                once(backward.stores["logits"])
                and backward.loaded_bytes["dlogits"] == backward.loaded_bytes["logits"]
            )
        for name in ["labels", "coef", *(["entropy_coef"] if entropy else [])]:
            assert once(backward.loads[name])
        for name in ["logps", *(["entropy"] if entropy else [])]:
            assert (backward.loads[name].flatten() == scored.flatten().numpy()).all()
        assert backward.loads["lse"].sum() == 2 * scored.sum()


def test_vocabulary_backward_reads_no_row_without_a_coefficient():
    logits, labels = torch.randn(4, 33, requires_grad=True), torch.tensor([1, 2, 3, 4])
    with ledger() as launches:
        token_logps(logits, labels, backend="triton")[[0, 2]].sum().backward()
    assert launches[1].loads["logits"].reshape(4, 33).sum(1).tolist() == [33, 0, 33, 0]
    assert once(launches[1].stores["dlogits"])


def test_vocabulary_passes_of_labels_outside_the_vocabulary_reach_no_memory():
    """A CPU refuses them; the kernels, which see them on a GPU, must not follow them."""
    V = 37
    logits = torch.randn(1, 6, V + 3)[..., :V]
    for outside in (
        [V, -1, V + 2, -3],
        [2**32 + 5, -(2**32), 2**40, -(2**62)],
    ):  # near ones first: far ones would crash
        labels = torch.tensor([*outside, V - 1, 0])
        with ledger() as launches:
            logps, lse, _ = vocabulary_forward(logits, labels, PLAIN)
            vocabulary_backward(
                logits, labels, logps, lse, torch.ones(6), PLAIN, torch.empty(1, 6, V)
            )
        assert all(map(clean, launches))
        assert launches[0].loads["logits"].sum() == 6 * V + 2
        assert logps.isnan().tolist() == [True] * 4 + [False] * 2


# ---- the group pass ------------------------------------------------------------------------------


def group_batch(packed):
    """Eight sequences of 0 to 40 tokens, some ignored."""
    lengths = [3, 0, 40, 1, 17, 17, 16, 6]
    shape = (sum(lengths),) if packed else (8, 17)
    labels = torch.randint(0, 9, shape)
    labels[torch.rand(shape) < 0.3] = -100
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return torch.where(labels == -100, 0, -torch.rand(shape)), labels, offsets if packed else None


def one_pass(logps, labels, cu_seqlens, objective=None, sequences=8, lengths=None, **changes):
    groups = Groups(
        objective or RPOObjective("squared"),
        torch.randn(8),
        None,
        None,
        None,
        None,
        group_size=2,
        mean=True,
    )
    labels = None if labels is None else labels.flatten()
    with ledger() as launches:
        out = group_pass(
            logps.flatten(),
            labels,
            lengths,
            Sequences(sequences, cu_seqlens),
            groups._replace(**changes),
            -100,
        )
    (launch,) = launches
    return out, launch


@pytest.mark.parametrize("packed", [False, True])
def test_group_pass_reads_log_probs_and_references_once_and_labels_twice(
    packed,
):
    logps, labels, offsets = group_batch(packed)
    scored = (labels != -100).flatten().numpy()
    N = scored.size
    for objective in (
        RPOObjective("squared"),
        RPOObjective(average=True, sft_weight=0.1, sft_normalizer="tokens"),
    ):
        _, launch = one_pass(
            logps, labels, offsets, objective, ref_logps=torch.randn(1, N), ref_per_token=True
        )
        assert clean(launch)
        assert (launch.loads["logps"] == scored).all() and (
            launch.loads["ref_logps"][0] == scored
        ).all()
        assert (launch.loads["labels"] == 2).all()  # to sum, and to spread the coefficients
        assert (
            once(launch.stores["coef"])
            and once(launch.stores["losses"])
            and once(launch.stores["sequence"])
        )
        assert once(launch.stores["lengths"]) and launch.stores["loss"] == 1
        assert launch.loads["coef"].sum() == launch.loads["losses"].sum() == 0
        _, launch = one_pass(logps, labels, offsets, objective, ref_logps=torch.randn(1, 8))
        assert (
            clean(launch)
            and once(launch.loads["ref_logps"])
            and (launch.loads["logps"] == scored).all()
        )


def test_group_pass_reads_log_probs_and_labels_again_for_each_further_reference():
    logps, labels, offsets = group_batch(True)
    scored = (labels != -100).numpy()
    objective = RPOObjective("squared", reference="harmonic")
    _, launch = one_pass(
        logps,
        labels,
        offsets,
        objective,
        ref_logps=torch.randn(3, scored.size),
        ref_per_token=True,
        ref_weights=torch.full((3, 4), 1 / 3),
    )
    assert clean(launch)
    assert (launch.loads["ref_logps"] == scored).all()
    assert (launch.loads["logps"] == 3 * scored).all() and (launch.loads["labels"] == 4).all()


BROKEN = {
    "does not begin at 0": [2, 3, 9, 20, 40, 60, 80, 90, 100],
    "does not end at the end": [0, 3, 9, 20, 40, 60, 80, 90, 99],
    "ends beyond the end": [0, 3, 9, 20, 40, 60, 80, 90, 101],
    "goes back": [0, 3, 9, 5, 40, 60, 80, 90, 100],
    "negative": [0, -3, 9, 20, 40, 60, 80, 90, 100],
    "far beyond": [0, 3, 9, 2**31 - 1, 40, 60, 80, 90, 100],
    "far below": [0, 3, 9, 20, -(2**31), 60, 80, 90, 100],
}


@pytest.mark.parametrize("offsets", BROKEN.values(), ids=BROKEN)
def test_group_pass_of_bad_cu_seqlens_reaches_no_other_memory_and_gives_nan(offsets):
    labels = torch.zeros(100, dtype=torch.int64)
    out, launch = one_pass(
        torch.randn(100),
        labels,
        torch.tensor(offsets, dtype=torch.int32),
        ref_logps=torch.randn(1, 100),
        ref_per_token=True,
    )
    loss, _, _, _, coef = out
    assert clean(launch)
    assert loss.isnan() and coef.isnan().all()


BROKEN_GROUPS = {
    "does not begin at 0": [1, 2, 5, 8],
    "does not end at the end": [0, 2, 5, 7],
    "ends beyond the end": [0, 2, 5, 9],
    "goes back": [0, 5, 2, 8],
    "negative": [0, -2, 5, 8],
    "far beyond": [0, 2**31 - 1, 5, 8],
    "far below": [0, -(2**31), 5, 8],
}


@pytest.mark.parametrize("offsets", BROKEN_GROUPS.values(), ids=BROKEN_GROUPS)
@pytest.mark.parametrize("comparison", ["listwise", "pointwise"])
def test_group_pass_of_bad_cu_groups_reaches_no_other_memory_and_gives_nan(offsets, comparison):
    logps, labels, cu_seqlens = group_batch(True)
    objective = RPOObjective(
        "backward_kl",
        comparison=comparison,
        sft_weight=0.1,
        sft_normalizer="mean",
        reference="geometric",
    )
    out, launch = one_pass(
        logps,
        labels,
        cu_seqlens,
        objective,
        cu_groups=torch.tensor(offsets, dtype=torch.int32),
        ref_logps=torch.randn(2, 8),
        ref_weights=torch.rand(2, 3),
    )
    assert clean(launch)
    assert out[0].isnan() and out[4][labels != -100].isnan().all()


def test_group_pass_of_ragged_groups_with_gaps_stays_within_its_tensors():
    """A group of one, an empty one, one with an empty sequence; more groups than programs have
    lanes in a block.
    """
    logps, labels, cu_seqlens = group_batch(True)
    for offsets in ([0, 1, 1, 6, 8], [0, 0, 0, 8], [0, 8, 8], [0, *[3] * 200, 8]):
        for comparison in ("listwise", "pairwise", "pointwise"):
            out, launch = one_pass(
                logps,
                labels,
                cu_seqlens,
                RPOObjective("forward_kl", comparison=comparison),
                cu_groups=torch.tensor(offsets, dtype=torch.int32),
            )
            assert clean(launch)
            assert (
                once(launch.stores["coef"]) and once(launch.stores["losses"]) and out[0].isfinite()
            )


def test_scaling_by_one_touches_nothing_and_otherwise_each_element_once():
    x, one, two = torch.randn(5000), torch.tensor(1.0), torch.tensor(2.0)
    with ledger() as launches:
        scale(x, one)
        scale(x, two)
    by_one, by_two = launches
    assert by_one.loads["x"].sum() == by_one.stores["x"].sum() == 0
    assert once(by_two.loads["x"]) and once(by_two.stores["x"])
    assert clean(by_one) and clean(by_two)


# ---- launches ------------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
def test_rpo_loss_of_every_preset_takes_two_launches_forward_and_one_backward(preset):
    objective = getattr(RPOObjective, preset)()
    logits, labels = torch.randn(4, 3, 5, requires_grad=True), torch.randint(0, 5, (4, 3))
    rewards = torch.randn(4) if objective.uses_rewards else None
    reference = {} if objective.reference == "none" else {"ref_logps": torch.randn(4)}
    with ledger() as launches:
        loss = rpo_loss(logits, labels, rewards, objective, backend="triton", **reference).loss
        assert [launch.kernel for launch in launches] == [
            "_vocabulary_forward_kernel",
            "_group_pass_kernel",
        ]
        loss.backward()
        assert [launch.kernel for launch in launches[2:]] == ["_vocabulary_backward_kernel"]
    assert all(map(clean, launches))
    lengths = torch.tensor([3, 3, 3, 3])
    with ledger() as launches:
        logps = torch.randn(4, requires_grad=True)
        preference_loss(
            logps, rewards, objective, lengths=lengths, backend="triton", **reference
        ).loss.backward()
    assert [launch.kernel for launch in launches] == ["_group_pass_kernel"]
    assert clean(launches[0])


def test_token_logps_take_one_launch_each_way():
    logits, labels = torch.randn(4, 5, requires_grad=True), torch.tensor([0, 1, 2, -100])
    for call in (
        token_logps,
        lambda *args, **kwargs: sum(token_logps_and_entropy(*args, **kwargs)),
    ):
        with ledger() as launches:
            call(logits, labels, backend="triton").sum().backward()
        assert [launch.kernel for launch in launches] == [
            "_vocabulary_forward_kernel",
            "_vocabulary_backward_kernel",
        ]
    with ledger() as launches:
        token_logps(logits[:0], labels[:0], backend="triton")
    assert launches == []


# ---- offsets of rows -----------------------------------------------------------------------------


@triton.jit
def _row_offset_kernel(out_ptr, row, inner, stride_outer, stride_inner):
    tl.store(out_ptr, row_offset(row, inner, stride_outer, stride_inner))


@pytest.mark.parametrize(
    "row, inner, stride_outer, stride_inner",
    [
        (40_000, 65_536, 7, 151_936),  # beyond 2^31 within one outer row
        (40_000, 1, 151_936, 7),  # as outer rows
        (2**31 - 1, 1000, 1000 * 262_144, 262_144),
        (5, 2, 2**33, 2**32),  # strides that need 64 bits themselves
        (7, 3, 5, 11),
    ],
)
def test_vocabulary_passes_reach_rows_beyond_two_to_the_31_elements(
    row, inner, stride_outer, stride_inner
):
    out = torch.zeros((), dtype=torch.int64)
    _row_offset_kernel[(1,)](out, row, inner, stride_outer, stride_inner)
    assert int(out) == row // inner * stride_outer + row % inner * stride_inner


# ---- the ledger itself ---------------------------------------------------------------------------


@triton.jit
def _probe_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr, RACE: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < size, other=0.0)
    tl.store(out_ptr + i, x, mask=i < size)
    if RACE == 1:  # a neighbour's store, with no barrier between
        tl.store(x_ptr + i, tl.load(out_ptr + (i ^ 1), mask=i < size, other=0.0), mask=i < size)
    if RACE == 2:
        tl.debug_barrier()
        tl.store(x_ptr + i, tl.load(out_ptr + (i ^ 1), mask=i < size, other=0.0), mask=i < size)
    if RACE == 3:  # another program's
        tl.debug_barrier()
        tl.load(out_ptr + tl.arange(0, BLOCK))


@pytest.mark.parametrize("race, expected", [(0, 0), (1, 8), (2, 0), (3, 4)])
def test_ledger_sees_races(race, expected):
    x, out = torch.randn(2, 8)
    with ledger() as launches:
        _probe_kernel[(2,)](x, out, 8, BLOCK=4, RACE=race)
    assert launches[0].races == expected and launches[0].stray == 0


def test_ledger_sees_accesses_outside_and_between_tensors():
    x, out = torch.randn(2, 32)
    with ledger() as launches:
        _probe_kernel[(2,)](x[8:15], out[8:16], 8, BLOCK=4, RACE=0)  # one load past the end
        # as if contiguous: four stores into gaps
        _probe_kernel[(2,)](x[8:16], out[8:24:2], 8, BLOCK=4, RACE=0)
    assert [launch.stray for launch in launches] == [1, 4]
    assert launches[0].loads["x"].tolist() == [1] * 7 and launches[0].loaded_bytes["x"] == 28
    assert launches[1].stores["out"].tolist() == [1] * 4 + [0] * 4


# ---- alignment and parts of rows -----------------------------------------------------------------


@pytest.mark.parametrize("V", [5, 257, 2048 + 777])
def test_vocabulary_passes_of_rows_at_any_offset_touch_them_once_and_nothing_else(V):
    """At every address modulo 16 bytes, in place and beside logits that lie elsewhere; in 16-byte
    accesses but for two edges.
    """
    for offset, dtype in itertools.product((0, 1, 7), (torch.float16, torch.float32)):
        memory = torch.randn(3 * V + 48).to(dtype)
        memory = memory[
            -memory.data_ptr() // memory.element_size() % (16 // memory.element_size()) :
        ]
        logits = memory[offset : offset + 3 * V].view(1, 3, V)
        labels = torch.tensor([0, V // 2, V - 1])
        with ledger() as launches:
            logps, lse, _ = vocabulary_forward(logits, labels, PLAIN)
            for out in (torch.empty(1, 3, V, dtype=dtype), logits):
                vocabulary_backward(logits, labels, logps, lse, torch.ones(3), PLAIN, out)
        forward, beside, inplace = launches
        assert all(map(clean, launches))
        assert forward.loads["logits"].sum() == 3 * (V + 1)
        assert once(beside.loads["logits"]) and once(beside.stores["dlogits"])
        assert once(inplace.loads["logits"]) and once(inplace.stores["dlogits"])


def test_vocabulary_forward_of_split_rows_reads_them_once(monkeypatch):
    """Forward a second launch puts the parts together; it reads three numbers of each part and the
    label's logit.
    """
    monkeypatch.setattr(launch_settings_module, "PART", 512)
    for module in (forward_module, backward_module):
        monkeypatch.setattr(module, "splits_rows", lambda N, device: True)
    V = 2048 + 777
    logits, labels = torch.randn(1, 3, V).half(), torch.tensor([7, -100, V - 1])
    with ledger() as launches:
        logps, lse, _ = vocabulary_forward(logits, labels, PLAIN)
        vocabulary_backward(logits, labels, logps, lse, torch.ones(3), PLAIN, logits)
    forward, merge, backward = launches
    assert [x.kernel for x in launches] == [
        "_vocabulary_forward_kernel",
        "_vocabulary_merge_kernel",
        "_vocabulary_backward_kernel",
    ]
    assert all(map(clean, launches))
    parts = forward.stores["parts"].shape[1]
    assert parts > 1 and forward.loads["logits"].sum() == 2 * (V + parts)
    assert merge.loads["logits"].sum() == 2 and merge.loads["parts"].sum() == 2 * parts * 3
    assert once(merge.stores["logps"]) and once(merge.stores["lse"])
    assert backward.loads["logits"].sum() == 2 * V and once(backward.stores["dlogits"])


def test_vocabulary_forward_reads_only_a_part_far_above_its_label_again(monkeypatch):
    """Once for its maximum, once relative to it; the other parts, and other rows, are read once."""
    monkeypatch.setattr(launch_settings_module, "PART", 512)
    V = 2048 + 777
    logits, labels = torch.zeros(1, 2, V), torch.tensor([5, 5])
    logits[0, 1, V - 3] = 200.0
    with ledger() as launches:
        logps, _, _ = vocabulary_forward(logits, labels, PLAIN)
    loads = launches[0].loads["logits"][0].copy()
    loads[:, 5] -= 1
    assert (
        (loads[0] == 1).all()
        and set(loads[1].tolist()) == {1, 3}
        and loads[1, V - 3] == 3
        and loads[1, 0] == 1
    )
    assert abs(float(logps[1]) + 200) < 1e-4


# ---- memory --------------------------------------------------------------------------------------


class _Allocations(TorchDispatchMode):
    """Bytes of new storages."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        inputs = {
            x.untyped_storage().data_ptr()
            for x in tree_leaves((args, kwargs))
            if isinstance(x, torch.Tensor)
        }
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in inputs:
                self.bytes += x.untyped_storage().nbytes()
        return out


def test_rpo_loss_in_place_allocates_a_few_numbers_per_token():
    """Peak of forward and backward = logits + O(N): a bound on all that is ever allocated bounds
    it.
    """
    S, T = 4, 6
    for V in (300, 3000):
        logits = torch.randn(S, T, V, requires_grad=True)
        labels = torch.randint(0, V, (S, T))
        x = logits * 1
        with _Allocations() as allocations, ledger():
            out = rpo_loss(
                x,
                labels,
                torch.randn(S),
                RPOObjective(),
                ref_logps=torch.zeros(S),
                inplace_backward=True,
                backend="triton",
            )
            (grad,) = torch.autograd.grad(out.loss, x)
        assert grad.data_ptr() == x.data_ptr()
        assert allocations.bytes <= 40 * S * T * 4 < x.numel() * 4, allocations.bytes


class _Unlaunched:
    """A kernel that is not run."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


@pytest.mark.parametrize("packed", [False, True])
def test_rpo_loss_never_reads_values_of_its_device(monkeypatch, packed):
    """Tensors without values go through what runs on a GPU, so any look at a value raises: no sync,
    and a graph may capture it.
    """
    from rpo_kernels.kernels import group_pass as group_module
    from rpo_kernels.ops.rpo_loss import _rpo_loss
    from rpo_kernels.ops.token_logps import _dlogits_inplace_op, _dlogits_op

    for module, kernel in [
        (forward_module, "_vocabulary_forward_kernel"),
        (forward_module, "_vocabulary_merge_kernel"),
        (backward_module, "_vocabulary_backward_kernel"),
        (group_module, "_group_pass_kernel"),
    ]:
        monkeypatch.setattr(module, kernel, _Unlaunched())
    S, T, V = 4, 5, 33
    meta = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device="meta")
    logits, labels = (
        (meta(S * T, V), meta(S * T, dtype=torch.int64))
        if packed
        else (meta(S, T, V), meta(S, T, dtype=torch.int64))
    )
    sequences = Sequences(S, meta(S + 1, dtype=torch.int32) if packed else None)
    groups = Groups(RPOObjective(), meta(S), meta(1, S), None, None, None, group_size=2, mean=True)
    with pytest.raises(RuntimeError, match="meta"):
        logits[0].sum().item()
    loss, *_, coef, logps, lse, _ = _rpo_loss.eager(
        logits, labels, sequences, groups, LogitTransform(), True, "triton", ""
    )
    for backward in (_dlogits_op, _dlogits_inplace_op):
        backward.eager(
            logits, labels, logps, lse, coef, loss, None, None, LogitTransform(), "triton"
        )
