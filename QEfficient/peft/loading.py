# SPDX-License-Identifier: BSD-3-Clause
"""Loading bases and attaching adapters, with errors that say what is wrong."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, PeftModelForCausalLM
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from QEfficient.errors import AdapterMismatchError, ConfigError
from QEfficient.export.lift import inner_model, moves_base
from QEfficient.export.weights import INDEX_FILE
from QEfficient.peft.adapters import WEIGHTS_FILE, check_name, read_config, read_tensors, resolve
from QEfficient.store import is_local


def load_base(base: str | Path, *, dtype: torch.dtype | str = torch.float32, **kwargs: Any) -> PreTrainedModel:
    """Load a causal LM from a folder or the Hugging Face Hub.

    Args:
        base: Folder or Hub id.
        dtype: Element type of its weights; ``"auto"`` for the checkpoint's.
        **kwargs: Passed to ``AutoModelForCausalLM.from_pretrained``.

    Raises:
        ConfigError: There is no model in that place.
    """
    check_base(base)
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(str(base), dtype=dtype, **kwargs)
    except (OSError, ValueError) as e:
        raise ConfigError(f"cannot load the base {str(base)!r}: {str(e).strip().splitlines()[0]}") from e
    model.eval()  # type: ignore[no-untyped-call]
    return model


def check_base(base: str | Path) -> None:
    """Refuse a base that names a folder which is not there.

    Raises:
        ConfigError: With its name.
    """
    if Path(base).is_file():
        raise ConfigError(f"{str(base)!r} is a file; a base is a folder: give {str(Path(base).parent)!r}")
    if is_local(base) and not Path(base).is_dir():
        raise ConfigError(f"base folder {str(base)!r} does not exist")


def read_base_config(base: str | Path) -> PreTrainedConfig:
    """Return the configuration of a base.

    Raises:
        ConfigError: There is no model in that place.
    """
    check_base(base)
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(str(base))
    except (OSError, ValueError, KeyError) as e:
        raise ConfigError(f"{str(base)!r} is not a model: {str(e).strip().splitlines()[0]}") from e
    return config


def checkpoint_folder(base: str | Path) -> Path | None:
    """Return the local folder that holds the safetensors files of a base, or ``None`` if it has none."""
    folder, names = Path(base), (INDEX_FILE, "model.safetensors")
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        for name in names:
            found = try_to_load_from_cache(str(base), name)
            if isinstance(found, str):
                return Path(found).parent
        return None
    return folder if any((folder / n).is_file() for n in names) else None


def attach(model: PreTrainedModel | PeftModel, adapters: Mapping[str, str | Path]) -> PeftModelForCausalLM:
    """Put adapters on a base; the first becomes active. A rejected adapter leaves no trace.

    Raises:
        AdapterNotFoundError: An adapter is not where it should be.
        ArtifactError: A file of an adapter is damaged.
        AdapterMismatchError: An adapter was not made for this base.
        ConfigError: A name that an adapter cannot have.
    """
    for name, path in adapters.items():
        folder = resolve(path)
        _check_free(model, check_name(name))
        config = read_config(folder)
        _check_shares(model, name, config)
        read_tensors(folder / WEIGHTS_FILE)  # a damaged file must not reach PEFT, which changes the model first
        config.inference_mode = True
        try:
            if isinstance(model, PeftModel):
                _add(model, folder, name)
            else:
                model = PeftModel.from_pretrained(model, str(folder), adapter_name=name, config=config)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise AdapterMismatchError(
                f"adapter {name!r} ({folder}) does not fit the base: {_first_difference(e)}"
            ) from e
    if not isinstance(model, PeftModelForCausalLM):
        raise ConfigError(f"give at least one adapter of a causal LM; the model is {type(model).__name__}")
    return model.eval()


def _check_free(model: torch.nn.Module, name: str) -> None:
    """Refuse a name that is part of the base's own names: PEFT would take it out of every tensor's name on saving."""
    path = next((path for path, _ in inner_model(model).named_parameters() if name in path.split(".")), None)
    if path is not None:
        reason = (
            "the model has an adapter of that name"
            if isinstance(model, PeftModel) and name in model.peft_config
            else path
        )
        raise ConfigError(f"an adapter of this base cannot be called {name!r} ({reason}); choose another name")


def _check_shares(model: PreTrainedModel | PeftModel, name: str, config: PeftConfig) -> None:
    """Refuse adapters beside one whose loading changes the base's weights: they would be another base's."""
    others = model.peft_config if isinstance(model, PeftModel) else {}
    for mover, moves in ((name, config), *others.items()):
        if others and (reason := moves_base(vars(moves))):
            raise AdapterMismatchError(
                f"adapter {mover!r} changes the base's weights when PEFT loads it ({reason}), so it shares the base with no "
                f"other adapter. Load it alone, or convert it to plain LoRA with PEFT"
            )


def _add(model: PeftModel, folder: Path, name: str) -> None:
    try:
        model.load_adapter(str(folder), adapter_name=name)
    except Exception:
        if name in model.peft_config:
            model.delete_adapter(name)
        raise


def _first_difference(error: BaseException) -> str:
    """Return the line of PEFT's or PyTorch's message that tells what differs."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return next(
        (line for line in lines if line.startswith("size mismatch")), lines[0] if lines else type(error).__name__
    )
