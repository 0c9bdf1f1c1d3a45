"""The namespace of the package's operators in `torch.ops`, and the only place that names it.

On the Hugging Face kernels hub (`python -m rpo_kernels hub`) another file takes the place of this
one, with a namespace unique to each build, so that one process can load several.
"""

NAMESPACE = "rpo_kernels"


def add_op_namespace_prefix(op_name: str) -> str:
    return f"{NAMESPACE}::{op_name}"
