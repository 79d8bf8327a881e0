# SPDX-License-Identifier: BSD-3-Clause
"""What people import: exact, lazy, and without side effects."""

import subprocess
import sys

import QEfficient

PROBE = """
import sys, os
env, path = dict(os.environ), list(sys.path)
import warnings
shown = warnings.formatwarning
import QEfficient
heavy = sorted({m.split(".")[0] for m in sys.modules} & {"torch", "transformers", "peft", "onnx", "onnxruntime", "torchvision", "numpy"})
print(heavy, dict(os.environ) == env, sys.path == path, warnings.formatwarning is shown)
"""


def test_public_names_are_exact() -> None:
    """``__all__`` is the public API; every name of it can be had."""
    assert QEfficient.__all__ == ["QEffAutoPeftModelForCausalLM", "__version__"]
    for name in QEfficient.__all__:
        assert getattr(QEfficient, name).__doc__


def test_import_loads_and_patches_nothing() -> None:
    """Importing the package loads no heavy library, and leaves environment, path and warnings alone."""
    out = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["[]", "True", "True", "True"]


def test_names_of_the_reference() -> None:
    """The names that people's code and the seed's tests use are where they look for them."""
    from QEfficient.cloud.finetune import apply_peft, generate_peft_config, load_model_and_tokenizer, main
    from QEfficient.peft import QEffAutoPeftModelForCausalLM
    from QEfficient.peft.onnx_transforms import AdapterWeightsToInputsTransform

    assert QEffAutoPeftModelForCausalLM is QEfficient.QEffAutoPeftModelForCausalLM
    assert [f.__name__ for f in (apply_peft, generate_peft_config, load_model_and_tokenizer, main)] == [
        "apply_peft",
        "generate_peft_config",
        "load_model_and_tokenizer",
        "main",
    ]
    assert callable(AdapterWeightsToInputsTransform.apply)
