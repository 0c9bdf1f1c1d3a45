"""Arguments that do not fit raise before anything is launched, and the message names the operation,
the argument in backticks, what was expected and what came.

No backend can run in this file: whoever asks for one fails the test. Values are looked at on a CPU
only, so all tensors here live on one; what a GPU makes of bad values is for the tests of the
kernels.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys

import pytest
import torch

import rpo_kernels
from rpo_kernels import RPOObjective, backend

from ..helpers import compiling

INF, NAN = math.inf, math.nan
PRESETS_WITH_BETA = [
    "dpo",
    "robust_dpo",
    "simpo",
    "cpo",
    "distill_dpo",
    "exo",
    "softmax_dpo",
    "infonca",
    "rloo",
    "gvpo",
    "sppo",
    "nca",
    "bco",
]

# Four sequences of three tokens, two groups, a vocabulary of five.
LOGITS, LABELS, REWARDS, REF_LOGPS = (
    torch.zeros(4, 3, 5),
    torch.ones(4, 3).long(),
    torch.arange(4.0),
    torch.zeros(4),
)
PACKED = {"logits": torch.zeros(12, 5), "labels": torch.ones(12).long()}
OFFSETS = torch.tensor([0, 3, 6, 9, 12], dtype=torch.int32)
TOKENS = {"logits": LOGITS, "labels": LABELS}
GROUPS = {"rewards": REWARDS, "objective": RPOObjective(), "ref_logps": REF_LOGPS}
GOOD = {
    "token_logps": TOKENS,
    "token_logps_and_entropy": TOKENS,
    "rpo_loss": {**TOKENS, **GROUPS},
    "preference_loss": {"logps": torch.zeros(4), **GROUPS},
    "sequence_logps": {"token_logps": torch.zeros(4, 3)},
    "shift_labels": {"input_ids": LABELS, "mask": LABELS},
}
VOCABULARY_OPS = ["token_logps", "token_logps_and_entropy", "rpo_loss"]
GROUP_OPS = ["preference_loss", "rpo_loss"]
TWO_REFERENCES = {"objective": RPOObjective(reference="geometric"), "ref_logps": torch.zeros(2, 4)}
OWN_TARGET = {"objective": RPOObjective.dpo(), "rewards": None}
NO_REFERENCE = {"objective": RPOObjective(reference="none"), "ref_logps": None}


@pytest.fixture(autouse=True)
def _no_engine(monkeypatch):
    def launched(*_):
        raise AssertionError("something was launched")

    for name, module in list(sys.modules.items()):
        if name.startswith("rpo_kernels.ops.") and hasattr(module, "module_of"):
            monkeypatch.setattr(module, "module_of", launched)


def call(op, changes):
    return getattr(rpo_kernels, op)(**{**GOOD[op], **changes})


def refuses(op, message, error=ValueError, **changes):
    tensors = [x for x in (GOOD[op] | changes).values() if isinstance(x, torch.Tensor)]
    versions = [x._version for x in tensors]
    with pytest.raises(error, match=f"^{re.escape(f'{op}: {message}')}"):
        call(op, changes)
    assert [x._version for x in tensors] == versions, "an argument was written to"


def offsets(*values, dtype=torch.int32):
    return torch.tensor(values, dtype=dtype)


@pytest.mark.parametrize("op", [*VOCABULARY_OPS, "preference_loss"])
def test_public_functions_without_a_bad_argument_reach_the_backend(op):
    """Guards the guard of this file."""
    with pytest.raises(AssertionError, match="something was launched"):
        call(op, {})


# ---- what a tensor is ----------------------------------------------------------------------------

TENSORS = [
    *[(op, name, {}) for op in VOCABULARY_OPS for name in ("logits", "labels")],
    *[(op, name, {}) for op in GROUP_OPS for name in ("rewards", "ref_logps")],
    *[(op, "cu_groups", {"cu_groups": offsets(0, 4)}) for op in GROUP_OPS],
    *[(op, "ref_weights", TWO_REFERENCES | {"ref_weights": torch.ones(2) / 2}) for op in GROUP_OPS],
    ("rpo_loss", "cu_seqlens", PACKED | {"cu_seqlens": OFFSETS}),
    ("preference_loss", "logps", {}),
    ("preference_loss", "lengths", {"lengths": torch.ones(4).int()}),
    ("sequence_logps", "token_logps", {}),
    ("sequence_logps", "labels", {"labels": LABELS}),
    ("sequence_logps", "cu_seqlens", {"token_logps": torch.zeros(12), "cu_seqlens": OFFSETS}),
    ("shift_labels", "input_ids", {}),
    ("shift_labels", "mask", {}),
    (
        "shift_labels",
        "cu_seqlens",
        {"input_ids": LABELS[0], "mask": LABELS[0], "cu_seqlens": offsets(0, 3)},
    ),
]
FIRST = ("logits", "logps", "token_logps", "input_ids")  # the others must be where these are


@pytest.mark.parametrize("op, name, good", TENSORS)
def test_public_functions_refuse_lists_for_tensors(op, name, good):
    refuses(op, f"`{name}` must be a torch.Tensor, got list", TypeError, **good | {name: [1, 2]})


@pytest.mark.parametrize("op, name, good", TENSORS)
def test_public_functions_refuse_jagged_tensors(op, name, good):
    """As verl hands them over."""
    x = (GOOD[op] | good)[name]
    nested = torch.nested.nested_tensor([x.reshape(-1)[:1], x.reshape(-1)[:2]], layout=torch.jagged)
    message = (
        f"`{name}` must be a plain tensor, got a nested one; pass {name}.values(), packed, and "
        f"{name}.offsets().int() as "
    )
    with pytest.raises(TypeError, match=f"^{re.escape(f'{op}: {message}`cu_seqlens`')}"):
        call(op, good | {name: nested})


@pytest.mark.parametrize("op, name, good", [case for case in TENSORS if case[1] not in FIRST])
def test_public_functions_refuse_tensors_on_several_devices(op, name, good):
    elsewhere = (GOOD[op] | good)[name].to("meta")
    refuses(
        op, f"`{name}` must be on cpu like the first argument, got meta", **good | {name: elsewhere}
    )


@pytest.mark.parametrize("op, name, good", [(op, "normalizer", {}) for op in GROUP_OPS])
def test_normalizer_on_another_device_is_refused(op, name, good):
    refuses(
        op,
        "`normalizer` must be on cpu like the first argument, got meta",
        normalizer=torch.ones((), device="meta"),
    )


DTYPES = [
    *[(op, "logits", torch.float64, "float32, float16 or bfloat16") for op in VOCABULARY_OPS],
    ("token_logps", "logits", torch.int64, "float32, float16 or bfloat16"),
    ("preference_loss", "logps", torch.float64, "float32, float16 or bfloat16"),
    ("sequence_logps", "token_logps", torch.float64, "float32, float16 or bfloat16"),
    *[(op, "ref_logps", torch.float64, "float32, float16 or bfloat16") for op in GROUP_OPS],
    *[
        (op, "labels", dtype, "int64 or int32")
        for op in VOCABULARY_OPS
        for dtype in (torch.float32, torch.bool)
    ],
    *[
        (op, "rewards", dtype, "real numbers")
        for op in GROUP_OPS
        for dtype in (torch.bool, torch.complex64)
    ],
    ("shift_labels", "input_ids", torch.float32, "int64 or int32"),
    # in which -100 would be 156
    ("shift_labels", "input_ids", torch.uint8, "int64 or int32"),
]


@pytest.mark.parametrize("op, name, dtype, expected", DTYPES)
def test_public_functions_refuse_wrong_dtypes(op, name, dtype, expected):
    refuses(
        op,
        f"`{name}` must be {expected}, got {dtype}",
        TypeError,
        **{name: GOOD[op][name].to(dtype)},
    )


def test_public_functions_point_float64_to_the_reference():
    message = (
        "`logits` must be float32, float16 or bfloat16, got torch.float64; pass logits.float(): "
        "the kernels compute in float32, rpo_kernels.reference in float64"
    )
    refuses("token_logps", message, TypeError, logits=LOGITS.double())


@pytest.mark.parametrize(
    "op, name, good",
    [case for case in TENSORS if case[1] in ("rewards", "ref_logps", "ref_weights")]
    + [(op, "normalizer", {"normalizer": torch.tensor(2.0)}) for op in GROUP_OPS],
)
def test_public_functions_refuse_tensors_whose_gradient_would_be_lost(op, name, good):
    wants = (GOOD[op] | good)[name].clone().requires_grad_()
    refuses(
        op,
        f"`{name}` gets no gradient, but requires one; pass {name}.detach()",
        **good | {name: wants},
    )
    with torch.no_grad(), pytest.raises(AssertionError, match="launched"):
        call(op, good | {name: wants})  # no gradient is expected here


# ---- logits and labels ---------------------------------------------------------------------------


@pytest.mark.parametrize("op", VOCABULARY_OPS)
def test_labels_one_longer_than_logits_are_refused(op):
    message = (
        "`labels` must be [4, 3], one for each position of `logits`; got [4, 4]; labels[t] is the "
        "token that position "
    )
    refuses(
        op, message + "t predicts, did you mean `labels[:, 1:]`?", labels=torch.ones(4, 4).long()
    )


def test_labels_one_longer_than_packed_logits_are_refused():
    message = (
        "`labels` must be [12], one for each position of `logits`; got [13]; labels[t] is the "
        "token that position "
    )
    changes = PACKED | {"labels": torch.ones(13).long()}
    refuses("token_logps", message + "t predicts, did you mean `labels[1:]`?", **changes)


@pytest.mark.parametrize("op", [*VOCABULARY_OPS, "sequence_logps"])
@pytest.mark.parametrize("shape", [(3, 4), (12,), (4, 3, 1), ()])
def test_labels_of_another_shape_are_refused(op, shape):
    like = next(iter(GOOD[op]))
    message = f"`labels` must be [4, 3], one for each position of `{like}`; got {list(shape)}"
    refuses(op, message, labels=torch.ones(shape).long())


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("op", VOCABULARY_OPS)
@pytest.mark.parametrize("label", [5, -1, 2**40])
def test_labels_outside_the_vocabulary_are_refused(op, backend, label):
    labels = LABELS.clone()
    labels[0, 0], labels[2, 1] = -100, label
    message = f"`labels` must lie in [0, 5) or be ignore_index -100, got {label}"
    refuses(op, message, labels=labels, backend=backend)


def test_labels_of_minus_100_are_refused_under_another_ignore_index():
    message = "`labels` must lie in [0, 5) or be ignore_index -1, got -100"
    refuses("token_logps", message, labels=LABELS.clone().fill_(-100), ignore_index=-1)


@pytest.mark.parametrize("shape", [(4, 3, 0), (0,), ()])
def test_logits_of_no_columns_are_refused(shape):
    message = f"`logits` must be [..., V] with a vocabulary of at least one, got {list(shape)}"
    refuses("token_logps", message, logits=torch.zeros(shape))


@pytest.mark.parametrize("op", VOCABULARY_OPS)
def test_logits_with_strided_columns_are_refused(op):
    message = (
        "the last dimension of `logits` must be contiguous, got strides (30, 10, 2); pass "
        "logits.contiguous()"
    )
    refuses(op, message, logits=torch.zeros(4, 3, 10)[..., ::2])


def test_logits_with_three_leading_strides_are_refused():
    message = (
        "the leading dimensions of `logits` must collapse to two without a copy, got shape [3, 4, "
        "2, 5] with strides (10, 30, 5, 1); pass logits.contiguous()"
    )
    logits = torch.zeros(4, 3, 2, 5).transpose(0, 1)
    refuses("token_logps", message, logits=logits, labels=torch.ones(3, 4, 2).long())


@pytest.mark.parametrize("op", VOCABULARY_OPS)
@pytest.mark.parametrize(
    "logits",
    [torch.zeros(1, 3, 5).expand(4, 3, 5), torch.zeros(64).as_strided((4, 3, 5), (6, 2, 1))],
    ids=["expanded", "overlapping"],
)
def test_inplace_backward_refuses_rows_that_share_memory(op, logits):
    message = (
        "with `inplace_backward` the rows of `logits` must not share memory, got shape [4, 3, 5] "
        "with strides "
    )
    refuses(
        op,
        message + f"{logits.stride()}; pass logits.contiguous()",
        logits=logits,
        inplace_backward=True,
    )


@pytest.mark.parametrize(
    "op, name",
    [*[(op, "inplace_backward") for op in VOCABULARY_OPS], ("sequence_logps", "average")],
)
def test_flags_must_be_bools(op, name):
    refuses(op, f"`{name}` must be True or False, got 'False'", TypeError, **{name: "False"})


@pytest.mark.parametrize("op", [*VOCABULARY_OPS, "shift_labels"])
def test_ignore_index_must_be_in_the_range_of_the_labels(op):
    name = "input_ids" if op == "shift_labels" else "labels"
    labels = {name: GOOD[op][name].int()}
    message = f"`ignore_index` must be one of torch.int32, got {2**40}"
    refuses(op, message, ignore_index=2**40, **labels)


@pytest.mark.parametrize("op", VOCABULARY_OPS)
def test_inplace_backward_refuses_leaves(op):
    message = (
        "`inplace_backward` would overwrite `logits`, a leaf that requires a gradient, with that "
        "gradient; pass logits that a model computed, or inplace_backward=False"
    )
    refuses(op, message, logits=torch.zeros(4, 3, 5, requires_grad=True), inplace_backward=True)


@pytest.mark.parametrize("op", VOCABULARY_OPS)
@pytest.mark.parametrize("name", ["temperature", "logit_scale", "softcap"])
@pytest.mark.parametrize("value", [0, -1.0, INF, NAN, 1e-300])
def test_temperature_and_softcap_and_logit_scale_must_be_positive(op, name, value):
    refuses(op, f"`{name}` must be a finite number > 0 in float32, got {value!r}", **{name: value})


@pytest.mark.parametrize("name", ["temperature", "logit_scale", "softcap"])
@pytest.mark.parametrize("value", ["1", True, torch.tensor(1.0)])
def test_temperature_and_softcap_and_logit_scale_must_be_numbers(name, value):
    refuses("token_logps", f"`{name}` must be a number, got {value!r}", TypeError, **{name: value})


@pytest.mark.parametrize("op", [*VOCABULARY_OPS, "sequence_logps"])
@pytest.mark.parametrize("value", [None, 1.0, True])
def test_ignore_index_must_be_an_int(op, value):
    changes = {"labels": LABELS, "ignore_index": value}
    refuses(op, f"`ignore_index` must be an int, got {value!r}", TypeError, **changes)


@pytest.mark.parametrize("op", [*VOCABULARY_OPS, "preference_loss"])
@pytest.mark.parametrize("value", ["cuda", None])
def test_backend_must_be_known(op, value):
    refuses(op, f"`backend` must be one of 'auto', 'triton', 'torch'; got {value!r}", backend=value)


def test_backend_triton_on_a_cpu_needs_the_interpreter():
    program = (
        "import torch, rpo_kernels as r\n"
        "try: r.token_logps(torch.zeros(2, 5), torch.zeros(2).long(), backend='triton')\n"
        "except RuntimeError as error: print(error)"
    )
    environment = compiling()
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == (
        "token_logps: backend 'triton' on a CPU tensor runs in Triton's interpreter: set "
        "TRITON_INTERPRET=1 in the environment before the first kernel is imported, or pass "
        "backend='torch'"
    ), done.stderr


def test_backend_triton_needs_triton(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    message = (
        "rpo_loss: backend 'auto' on a cuda tensor needs the package triton, which is not "
        "installed; install it or pass"
    )
    with pytest.raises(RuntimeError, match=re.escape(f"{message} backend='torch'")):
        backend.module_of("rpo_loss", "auto", torch.device("cuda"), "vocabulary")


# ---- sequences -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "op, name, tokens",
    [
        ("rpo_loss", "labels", PACKED),
        ("sequence_logps", "token_logps", {"token_logps": torch.zeros(12)}),
    ],
)
def test_cu_seqlens_are_needed_for_packed_tokens(op, name, tokens):
    message = (
        f"`{name}` must be rows [S, T], or packed [N] with `cu_seqlens`; got [12] without "
        "cu_seqlens"
    )
    refuses(op, message, **tokens)


@pytest.mark.parametrize("op, name", [("rpo_loss", "labels"), ("sequence_logps", "token_logps")])
def test_cu_seqlens_with_rows_are_refused(op, name):
    refuses(op, f"with `cu_seqlens`, `{name}` must be packed [N], got [4, 3]", cu_seqlens=OFFSETS)


BAD_OFFSETS = [
    (
        OFFSETS.long(),
        TypeError,
        "`{name}` must be int32 as in FlashAttention, got torch.int64; pass {name}.int()",
    ),
    (
        OFFSETS[:1],
        ValueError,
        "`{name}` must hold the boundaries [0, ..., total], at least two of them; got shape [1]",
    ),
    (
        OFFSETS[None],
        ValueError,
        "`{name}` must hold the boundaries [0, ..., total], at least two of them; got shape [1, 5]",
    ),
    (
        offsets(1, 3, 12),
        ValueError,
        "`{name}` must begin at 0 and end at the number of {what}, {total}; got 1 and 12",
    ),
    (
        offsets(0, 3, 11),
        ValueError,
        "`{name}` must begin at 0 and end at the number of {what}, {total}; got 0 and 11",
    ),
]
PLACES = [
    ("rpo_loss", "cu_seqlens", "tokens", 12, PACKED),
    ("sequence_logps", "cu_seqlens", "tokens", 12, {"token_logps": torch.zeros(12)}),
    (
        "shift_labels",
        "cu_seqlens",
        "tokens",
        12,
        {"input_ids": torch.ones(12).long(), "mask": torch.ones(12)},
    ),
    ("rpo_loss", "cu_groups", "sequences", 4, {}),
    ("preference_loss", "cu_groups", "sequences", 4, {}),
]


@pytest.mark.parametrize("op, name, what, total, good", PLACES)
@pytest.mark.parametrize("bad, error, message", BAD_OFFSETS)
def test_cu_seqlens_and_cu_groups_must_bound_the_batch(
    op, name, what, total, good, bad, error, message
):
    refuses(op, message.format(name=name, what=what, total=total), error, **good | {name: bad})


@pytest.mark.parametrize("op, name, what, total, good", PLACES)
def test_cu_seqlens_and_cu_groups_must_not_decrease(op, name, what, total, good):
    bad = offsets(0, total // 2, 1, total - 1, total)
    refuses(op, f"`{name}` must not decrease, got {bad.tolist()}", **good | {name: bad})


def test_shift_labels_refuses_rows_with_cu_seqlens():
    refuses(
        "shift_labels",
        "`input_ids` must be packed [N] with `cu_seqlens`, got [4, 3]",
        cu_seqlens=OFFSETS,
    )


@pytest.mark.parametrize("shape", [(4, 2), (3,), (12,)])
def test_shift_labels_refuses_a_mask_of_another_shape(shape):
    message = f"`mask` must have the shape of `input_ids`, [4, 3]; got {list(shape)}"
    refuses("shift_labels", message, mask=torch.ones(shape))


def test_sequence_logps_needs_labels_for_averages():
    message = (
        "`labels` must be [4, 3] for average=True, which divides by the number of scored tokens, "
        "got None"
    )
    refuses("sequence_logps", message, average=True)


def test_preference_loss_refuses_logps_of_tokens():
    message = "`logps` must be one number per sequence, [S]; got [2, 2]"
    refuses("preference_loss", message, logps=torch.zeros(2, 2))


@pytest.mark.parametrize("objective", [RPOObjective(average=True), RPOObjective.cpo()])
def test_preference_loss_needs_lengths_where_the_loss_divides_by_them(objective):
    message = (
        "`lengths` must be [S] = [4] for this objective, which divides by the number of scored "
        "tokens, got None; pass (labels != -100).sum(1)"
    )
    refuses("preference_loss", message, objective=objective)


@pytest.mark.parametrize(
    "lengths, error, message",
    [
        (torch.ones(4), TypeError, "`lengths` must be int64 or int32, got torch.float32"),
        (
            torch.ones(3).int(),
            ValueError,
            "`lengths` must be one number per sequence, [S] = [4]; got [3]",
        ),
        (torch.tensor([1, 2, -3, 4]), ValueError, "`lengths` must be >= 0, got -3"),
    ],
)
def test_preference_loss_refuses_bad_lengths(lengths, error, message):
    refuses("preference_loss", message, error, lengths=lengths)


# ---- groups --------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", GROUP_OPS)
def test_group_size_must_divide_the_responses(op):
    refuses(op, "`group_size` must divide the number of sequences, 4, got 3; ", group_size=3)


@pytest.mark.parametrize("comparison, least", [("listwise", 2), ("pairwise", 2), ("pointwise", 1)])
@pytest.mark.parametrize("op", GROUP_OPS)
def test_group_size_of_one_is_refused_by_comparisons(op, comparison, least):
    message = (
        f"`group_size` must be at least {least} for comparison {comparison!r}, got {least - 1}"
    )
    refuses(op, message, group_size=least - 1, objective=RPOObjective(comparison=comparison))


@pytest.mark.parametrize("op", GROUP_OPS)
@pytest.mark.parametrize("size", [2, 4])
def test_group_size_and_cu_groups_exclude_each_other(op, size):
    message = (
        f"`group_size` and `cu_groups` both say which responses belong together, got {size} and "
        "offsets; pass one of them"
    )
    refuses(op, message, group_size=size, cu_groups=offsets(0, 4))


@pytest.mark.parametrize("value", [2.0, True, "2"])
def test_group_size_must_be_an_int(value):
    refuses("rpo_loss", f"`group_size` must be an int, got {value!r}", TypeError, group_size=value)


def test_group_size_must_be_two_for_labels_of_pairs():
    pairs = {"objective": RPOObjective.robust_dpo(), "rewards": None}
    refuses(
        "rpo_loss",
        "`group_size` must be 2 for an objective that labels pairs, got 4",
        group_size=4,
        **pairs,
    )
    message = (
        "`cu_groups` must be None for an objective that labels pairs, got offsets; pass "
        "group_size=2"
    )
    refuses("rpo_loss", message, cu_groups=offsets(0, 4), **pairs)


def test_group_size_needs_at_least_one_group():
    message = "at least one group of `group_size` responses is needed, got S = 0 sequences"
    nothing = {"rewards": REWARDS[:0], "ref_logps": REF_LOGPS[:0]}
    refuses("rpo_loss", message, logits=LOGITS[:0], labels=LABELS[:0], **nothing)
    refuses("preference_loss", message, logps=REWARDS[:0], **nothing)


@pytest.mark.parametrize("op", GROUP_OPS)
@pytest.mark.parametrize("value", ["dpo", None, RPOObjective])
def test_objective_must_be_an_rpo_objective(op, value):
    message = (
        "`objective` must be an RPOObjective, or pairs (weight, RPOObjective) for a weighted sum, "
        f"got {value!r}; for example RPOObjective.dpo(beta=0.1)"
    )
    refuses(op, message, TypeError, objective=value)


@pytest.mark.parametrize("op", GROUP_OPS)
def test_reduction_must_be_known(op):
    refuses(
        op,
        "`reduction` must be one of 'mean', 'sum', 'none'; got 'batchmean'",
        reduction="batchmean",
    )


NORMALIZERS = [
    (0, ValueError, "`normalizer` must be a finite number > 0 in float32, got 0"),
    (-2.0, ValueError, "`normalizer` must be a finite number > 0 in float32, got -2.0"),
    (NAN, ValueError, "`normalizer` must be a finite number > 0 in float32, got nan"),
    (1e-300, ValueError, "`normalizer` must be a finite number > 0 in float32, got 1e-300"),
    (10**400, ValueError, "`normalizer` must be a finite number > 0 in float32, got 1000"),
    (torch.tensor(0.0), ValueError, "`normalizer` must be a finite number > 0 in float32, got 0.0"),
    (torch.tensor(NAN), ValueError, "`normalizer` must be a finite number > 0 in float32, got nan"),
    (torch.ones(2), ValueError, "`normalizer` must be a number or a scalar tensor, got shape [2]"),
    (torch.tensor(True), TypeError, "`normalizer` must be a real number, got torch.bool"),
    ("2", TypeError, "`normalizer` must be a number or a scalar tensor, got '2'"),
    (True, TypeError, "`normalizer` must be a number or a scalar tensor, got True"),
]


@pytest.mark.parametrize("op", GROUP_OPS)
@pytest.mark.parametrize("value, error, message", NORMALIZERS)
def test_normalizer_must_be_positive(op, value, error, message):
    refuses(op, message, error, normalizer=value)


@pytest.mark.parametrize("op", GROUP_OPS)
def test_normalizer_needs_a_mean(op):
    message = "`normalizer` divides a sum, but `reduction` is 'none'; pass None"
    refuses(op, message, normalizer=8, reduction="none")


# ---- rewards and references ----------------------------------------------------------------------


@pytest.mark.parametrize("op", GROUP_OPS)
def test_rewards_that_are_missing_are_asked_for(op):
    message = (
        "`rewards` must be a tensor [S] = [4] for this objective, got None; to train without "
        "rewards, choose one with its own target, such as RPOObjective.dpo()"
    )
    refuses(op, message, rewards=None)


@pytest.mark.parametrize("op", GROUP_OPS)
def test_rewards_that_the_objective_ignores_are_refused(op):
    message = (
        "`rewards` must be None for an objective with its own target (the first response of each "
        "group is the chosen one), got a tensor [4]"
    )
    refuses(op, message, objective=RPOObjective.dpo())


@pytest.mark.parametrize("op", GROUP_OPS)
def test_rewards_by_group_are_refused(op):
    message = (
        "`rewards` must be one number per sequence, [S] = [4]; got [2, 2]; flatten the groups, "
        "rewards.flatten()"
    )
    refuses(op, message, rewards=REWARDS.view(2, 2))


@pytest.mark.parametrize("op", GROUP_OPS)
def test_rewards_of_another_length_are_refused(op):
    refuses(
        op, "`rewards` must be one number per sequence, [S] = [4]; got [2]", rewards=REWARDS[:2]
    )


@pytest.mark.parametrize("op", GROUP_OPS)
def test_rewards_of_nan_are_refused(op):
    refuses(op, "`rewards` must be numbers, got NaN at 2", rewards=torch.tensor([0, 1, NAN, 3]))


@pytest.mark.parametrize("op", GROUP_OPS)
@pytest.mark.parametrize("distance", ["squared", "forward_kl"])
def test_rewards_of_infinity_are_refused_where_the_loss_is_infinite(op, distance):
    message = (
        f"`rewards` must be finite for distance {distance!r}, got an infinite one at 1; distance "
        "'backward_kl' or 'hellinger' takes them"
    )
    infinite = torch.tensor([0, -INF, 0, 0])
    refuses(op, message, rewards=infinite, objective=RPOObjective(distance))
    with pytest.raises(AssertionError, match="launched"):
        call(op, {"rewards": infinite})  # a hard label under backward KL


@pytest.mark.parametrize("op", GROUP_OPS)
@pytest.mark.parametrize(
    "objective",
    [{}, OWN_TARGET, TWO_REFERENCES],
    ids=["rewards", "own target", "several references"],
)
def test_ref_logps_that_are_missing_are_asked_for(op, objective):
    lead = "R, " if objective == TWO_REFERENCES else ""
    expected = f"[{lead}4]" if op == "preference_loss" else f"[{lead}4] or [{lead}4, 3]"
    message = (
        f"`ref_logps` must be {expected} for this objective, got None; pass the reference model's "
        "log-probabilities, or build the objective with reference='none'"
    )
    refuses(op, message, **objective | {"ref_logps": None})


@pytest.mark.parametrize("op", GROUP_OPS)
def test_ref_logps_that_the_objective_ignores_are_refused(op):
    message = "`ref_logps` must be None for an objective without a reference, got a tensor [4]"
    refuses(op, message, **NO_REFERENCE | {"ref_logps": REF_LOGPS})


@pytest.mark.parametrize(
    "op, changes, message",
    [
        ("preference_loss", {"ref_logps": torch.zeros(3)}, "[4], got [3]"),
        ("rpo_loss", {"ref_logps": torch.zeros(4, 2)}, "[4] or [4, 3], got [4, 2]"),
        (
            "rpo_loss",
            PACKED | {"cu_seqlens": OFFSETS, "ref_logps": torch.zeros(4, 3)},
            "[4] or [12], got [4, 3]",
        ),
        (
            "preference_loss",
            {"ref_logps": torch.zeros(2, 4)},
            "[4], got [2, 4]; several references need an objective with reference='harmonic' or "
            "'geometric'",
        ),
        ("preference_loss", TWO_REFERENCES | {"ref_logps": torch.zeros(4)}, "[R, 4], got [4]"),
        (
            "rpo_loss",
            TWO_REFERENCES | {"ref_logps": torch.zeros(0, 4)},
            "[R, 4] or [R, 4, 3], got [0, 4]",
        ),
    ],
)
def test_ref_logps_of_another_shape_are_refused(op, changes, message):
    refuses(op, f"`ref_logps` must be {message}", **changes)


@pytest.mark.parametrize("op", GROUP_OPS)
@pytest.mark.parametrize("changes, kind", [({}, "single"), (NO_REFERENCE, "none")])
def test_ref_weights_without_several_references_are_refused(op, changes, kind):
    message = (
        "`ref_weights` must be None unless the objective has reference='harmonic' or 'geometric', "
        f"got a tensor [1] with reference={kind!r}"
    )
    refuses(op, message, ref_weights=torch.ones(1), **changes)


@pytest.mark.parametrize("op", GROUP_OPS)
@pytest.mark.parametrize(
    "weights, message",
    [
        (torch.ones(3) / 3, "`ref_weights` must be [R] = [2] or [R, G] = [2, 2], got [3]"),
        (torch.ones(2, 4) / 2, "`ref_weights` must be [R] = [2] or [R, G] = [2, 2], got [2, 4]"),
        (torch.tensor([0.5, 0.75]), "`ref_weights` must sum to 1 over the references, got 1.25"),
        (
            torch.tensor([[0.5, 0.5], [0.5, 0.25]]),
            "`ref_weights` must sum to 1 over the references, got 1, 0.75",
        ),
        (torch.tensor([0.5, NAN]), "`ref_weights` must sum to 1 over the references, got nan"),
        (torch.tensor([1.5, -0.5]), "`ref_weights` must be >= 0, got -0.5"),
    ],
)
def test_ref_weights_must_be_a_mixture(op, weights, message):
    refuses(op, message, ref_weights=weights, **TWO_REFERENCES)


# ---- objectives ----------------------------------------------------------------------------------


def objective_refuses(message, error=ValueError, build=RPOObjective, **arguments):
    with pytest.raises(error, match=f"^{re.escape(f'RPOObjective: {message}')}$"):
        build(**arguments)


@pytest.mark.parametrize(
    "name, valid",
    [
        ("distance", "'squared', 'backward_kl', 'forward_kl', 'hellinger'"),
        ("comparison", "'listwise', 'pairwise', 'pointwise'"),
        ("reference", "'single', 'none', 'harmonic', 'geometric'"),
        ("sft_normalizer", "'sum', 'mean', 'tokens'"),
        ("target", "'rewards', 'softmax'"),
    ],
)
def test_rpo_objective_refuses_unknown_names(name, valid):
    objective_refuses(f"`{name}` must be one of {valid}; got 'kl'", **{name: "kl"})


@pytest.mark.parametrize("name", ["beta", "eta", "scale"])
@pytest.mark.parametrize("value", [0, -0.1, INF, NAN])
def test_rpo_objective_factors_must_be_positive(name, value):
    objective_refuses(f"`{name}` must be a finite number > 0, got {value!r}", **{name: value})


@pytest.mark.parametrize("value", [-1, INF, NAN])
def test_rpo_objective_refuses_a_negative_sft_weight(value):
    objective_refuses(f"`sft_weight` must be a finite number >= 0, got {value!r}", sft_weight=value)


@pytest.mark.parametrize("value", [INF, NAN])
def test_rpo_objective_margin_must_be_finite(value):
    objective_refuses(f"`margin` must be a finite number, got {value!r}", margin=value)


@pytest.mark.parametrize("name", ["beta", "eta", "scale", "margin", "sft_weight", "label"])
@pytest.mark.parametrize("value", ["1", True, torch.tensor(1.0)])
def test_rpo_objective_numbers_must_be_numbers(name, value):
    objective_refuses(f"`{name}` must be a number, got {value!r}", TypeError, **{name: value})


@pytest.mark.parametrize("name", ["average", "cross_entropy", "leave_one_out"])
def test_rpo_objective_flags_must_be_bools(name):
    objective_refuses(f"`{name}` must be True or False, got 1", TypeError, **{name: 1})


@pytest.mark.parametrize("distance", ["squared", "forward_kl"])
def test_rpo_objective_refuses_an_infinite_target_where_the_loss_is_infinite(distance):
    objective_refuses(
        "`target` must be a finite number >= 0, got inf", distance=distance, target=INF
    )


@pytest.mark.parametrize(
    "message, arguments",
    [
        ("`target` must be a number >= 0, got nan", {"target": NAN}),
        (
            "`target='softmax'` belongs to distance 'backward_kl' with comparison 'pointwise', "
            "got 'backward_kl' with 'listwise'",
            {"target": "softmax"},
        ),
        (
            "`label` is a pair's target under distance 'backward_kl', in place of `target`; got "
            "distance 'squared', comparison 'listwise', target 'rewards'",
            {"label": 0.5, "distance": "squared"},
        ),
        (
            "`label` must be at most 1 for a KL divergence, got 2.0; pass cross_entropy=True",
            {"label": 2.0},
        ),
        (
            "`cross_entropy` is a form of distance 'backward_kl' (RPO's backward KL is KL(target "
            "|| policy)), got distance 'forward_kl'",
            {"cross_entropy": True, "distance": "forward_kl"},
        ),
        (
            "`leave_one_out=False` belongs to distance 'squared' with comparison 'listwise', got "
            "'squared' with 'pairwise'",
            {"leave_one_out": False, "distance": "squared", "comparison": "pairwise"},
        ),
    ],
)
def test_rpo_objective_refuses_arguments_that_exclude_each_other(message, arguments):
    objective_refuses(message, **arguments)


@pytest.mark.parametrize("preset", PRESETS_WITH_BETA)
@pytest.mark.parametrize("beta", [0, -0.1])
def test_rpo_objective_presets_refuse_a_beta_that_is_not_positive(preset, beta):
    objective_refuses(
        f"`beta` must be a finite number > 0, got {beta!r}",
        build=getattr(RPOObjective, preset),
        beta=beta,
    )


@pytest.mark.parametrize(
    "preset, arguments, message",
    [
        (
            "dpo",
            {"label_smoothing": 1},
            "`label_smoothing` must be a finite number >= 0 and < 0.5, got 1",
        ),
        (
            "dpo",
            {"label_smoothing": -0.1},
            "`label_smoothing` must be a finite number >= 0 and < 0.5, got -0.1",
        ),
        (
            "robust_dpo",
            {"label_smoothing": 0.5},
            "`label_smoothing` must be a finite number >= 0 and < 0.5, got 0.5",
        ),
        (
            "exo",
            {"label_smoothing": 0},
            "`label_smoothing` must be a finite number > 0 and < 0.5, got 0",
        ),
        ("ipo", {"tau": 0}, "`tau` must be a finite number > 0, got 0"),
        ("ipo", {"tau": -1}, "`tau` must be a finite number > 0, got -1"),
        ("rebel", {"eta": 0}, "`eta` must be a finite number > 0, got 0"),
        ("infonca", {"alpha": 0}, "`alpha` must be a finite number > 0, got 0"),
        ("nca", {"alpha": -1}, "`alpha` must be a finite number > 0, got -1"),
        ("cpo", {"sft_weight": -1}, "`sft_weight` must be a finite number >= 0, got -1"),
        ("simpo", {"gamma": INF}, "`margin` must be a finite number, got inf"),
    ],
)
def test_rpo_objective_presets_name_their_own_arguments(preset, arguments, message):
    objective_refuses(message, build=getattr(RPOObjective, preset), **arguments)
