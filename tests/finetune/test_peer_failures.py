"""What goes wrong elsewhere, and the test of ours that passes: here, each named after the failure, or where it is tested already.

Seen in Qualcomm's efficient-transformers (its options and `TrainConfig`):

| failure elsewhere | test |
|---|---|
| a local folder as base is refused as a Hub id | `test_a_local_folder_is_a_base` |
| documented options and commands do not exist | `test_docs.py::test_commands_and_options_exist` |
| one option has no kebab form | `test_config.py::test_snake_and_kebab_are_the_same_option` |
| unknown keywords are ignored | `test_finetune.py::test_main_refuses_unknown_options` |
| `save_metrics` off crashes | `test_options.py::test_metrics_switched_off_does_not_crash` |
| float16 whatever the device; the adapter with it | `test_options.py::test_bfloat16_base_keeps_the_adapter_in_float32` |
| gradient checkpointing of a model without it is a traceback | `test_a_model_that_cannot_recompute_is_refused` |
| the step limit counts forward passes | `test_loss_under_a_step_limit_is_the_mean_of_its_steps` |
| no warm-up, no clipping | `test_options.py::test_schedule_and_clipping` |
| `output_dir` gets a suffix, so that its own scripts look elsewhere | `test_the_result_is_where_it_was_asked_for` |
| packing is accepted and ignored | `test_packing_is_not_ignored` |
| sorting with `context_length` and several processes is refused | `test_distributed.py::test_processes_stop_together_and_resume` |
| `context_length` does not cut | `test_context_length_cuts_and_keeps_labels` |
| padding the prompt leaves EOS alone to be learned, and counts as text | `test_context_length_cuts_and_keeps_labels` |
| more tokens than the base has positions | `test_no_example_is_longer_than_the_base` |
| validation is training data | `test_sources.py::test_validation_share_is_never_training_data` |
| a validation file of training data is taken | `test_sources.py::test_validation_file_with_training_data` |
| the place of the data is fixed; a tokenizer without BOS fails | `test_a_tokenizer_without_bos` |
| `context_length` with a dataset is a KeyError | `test_a_dataset_is_cut_like_a_file` |
| number of classes fixed, texts not cut | `test_classes.py::test_classifier_is_trained` |
| an error in the user's function is "not present in the file" | `test_sources.py::test_preprocessing_function` |
| rows never shuffled, the last ones dropped | `test_batches.py::test_order_is_of_seed_and_epoch_alone` |
| masked rows multiply the loss | `test_fully_masked_rows_do_not_inflate_the_loss` |
| LoRA on a BERT finds no modules | `test_a_classifier_under_bert` |
| full fine-tuning raises, or gives NaN | `test_options.py::test_full_fine_tuning_saves_a_base` |
| LoRA alone | `test_methods.py::test_method_is_trained` |
| the method is ignored beside a file | `test_a_method_and_a_file_of_another` |
| `all-linear` and whole numbers are wrong types | `test_all_linear_and_whole_numbers_are_fields` |
| unknown fields reach PEFT as a TypeError; booleans are numbers | `test_model.py::test_wrong_peft_fields_are_refused` |
| a negative rank passes; an empty file is a TypeError | `test_files_that_say_nothing_sensible` |
| no DDP on CPUs | `test_distributed.py::test_two_processes_are_one` |
| no FSDP | `test_distributed.py::test_two_sharding_processes_are_one` |
| no optimizer, schedule or random state in checkpoints; resume restarts them | `test_resume.py::test_killed_and_resumed_is_the_same` |
| a finished epoch is trained again, nothing left to do crashes | `test_nothing_left_to_train_is_no_error` |
| losses divided by one step too many, after a resume by one too few | `test_loss_under_a_step_limit_is_the_mean_of_its_steps` |
| the same after a resume | `test_nothing_left_to_train_is_no_error` |
| perplexity of the mean of means | `test_train.py::test_loss_is_per_token_for_any_batch` |
| early stopping by `==` | `test_options.py::test_early_stopping` |
| best step not kept, checkpoints without end | `test_options.py::test_best_step_is_saved` |
| two trainings share handlers and settings | `test_two_trainings_in_one_process_do_not_mix` |
| the loss curve cannot be drawn from the file that was written | `test_summary.py::test_model_card_of_a_training` |
| evaluation after training does not run | `test_finetune.py::test_the_verdict_follows_the_training` |
| the import takes 12 s and silences warnings | `test_finetune.py::test_help_does_not_load_pytorch` |
| it patches what others use | `test_public_api.py::test_import_loads_and_patches_nothing` |

Complaints about the other tools, and what was measured with `Trainer` and TRL's `SFTTrainer`:

| failure elsewhere | test |
|---|---|
| the loss depends on accumulation | `test_options.py::test_accumulation_is_exact_step_by_step` |
| the loss depends on processes, where lengths differ | `test_distributed.py::test_two_processes_are_one` |
| killed while a checkpoint is written: no resume | `test_resume.py::test_killed_at_a_random_moment` |
| a damaged newest checkpoint ends it, without optimizer it starts anew silently | `test_resume.py::test_damaged_newest_checkpoint_falls_back` |
| resume changes the loss | `test_resume.py::test_resume_after_damage_is_the_same` |
| the best checkpoint has moved or gone: crash at the very end | `test_a_missing_best_checkpoint_does_not_lose_the_training` |
| the model never stops, because padding is EOS | `test_the_model_learns_to_stop_when_padding_is_eos` |
| the prompt is learned, too | `test_data.py::test_formats` |
| the adapter does not load where it is served: DoRA, `modules_to_save`, ranks | `test_methods.py::test_trained_method_passes_the_test` |
| FSDP on CPUs silently is DDP | `test_options.py::test_fsdp_that_does_not_shard_is_refused` |
| raw Alpaca rows are a KeyError | `test_data.py::test_formats` |
| the defaults do not run on a CPU | `test_finetune.py::test_main_trains_and_returns_metrics` |
| an unknown key of a file drowns in another command's usage | `test_config.py::test_unknown_option_of_a_file_is_refused_with_a_suggestion` |

Nothing here to be tried: arguments that each release renames, pinned versions that keep new models out, telemetry, merged QLoRA (no adapter is merged while
it is trained), pipelines over devices (FSDP shards instead), a profiler for one device.
"""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPTNeoXJapaneseConfig

from QEfficient.cloud.finetune import TrainConfig, apply_peft, generate_peft_config, main
from QEfficient.errors import ConfigError, UnsupportedError
from QEfficient.finetune import checkpoints
from QEfficient.finetune import train as training
from QEfficient.finetune.batches import Collator
from QEfficient.finetune.data import IGNORED, Example, load_examples
from QEfficient.finetune.preflight import check_recomputing
from QEfficient.finetune.trainer import AdapterTrainer
from tests.finetune.conftest import make_tokenizer
from tests.finetune.test_train import run
from tests.tiny import make_base

ALPACA = {"instruction": "Add the numbers.", "input": "1 1", "output": "two"}


@pytest.fixture
def needed(base_folder: Path, write_rows: Callable[..., Path], tmp_path: Path) -> dict[str, Any]:
    """The options without which nothing is trained, of a training of six steps."""
    rows = [{"prompt": "p" * i, "completion": "ab" * i} for i in range(1, 13)]
    return {
        "model_name": str(base_folder),
        "train_file": write_rows(*rows),
        "output_dir": tmp_path / "out",
        "train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "lora_r": 2,
    }


def losses(folder: Path) -> list[float]:
    """Return the loss of each step."""
    return [entry["loss"] for entry in json.loads((folder / "train_log.json").read_text()) if "loss" in entry]


def test_a_local_folder_is_a_base(needed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere a folder is refused as an invalid Hub id."""
    folder = Path(needed["model_name"])
    monkeypatch.chdir(folder.parent)
    main(**{**needed, "model_name": f"./{folder.name}"})
    assert (needed["output_dir"] / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("length", [32, 64, 512])
def test_context_length_cuts_and_keeps_labels(write_rows: Callable[..., Path], tokenizer: Any, length: int) -> None:
    """Elsewhere 32 leaves 41 tokens as they are, and 256 pads the prompt so that only EOS is learned."""
    (example,) = load_examples(write_rows(ALPACA), tokenizer, context_length=length)
    assert len(example.input_ids) == len(example.labels) <= length
    assert tokenizer.decode([x for x in example.labels if x != IGNORED]) == "two</s>"
    batch = Collator(tokenizer.pad_token_id)([[example]])
    assert int(batch["attention_mask"].sum()) == len(example.input_ids)


def test_loss_under_a_step_limit_is_the_mean_of_its_steps(needed: dict[str, Any]) -> None:
    """Elsewhere eight steps that average 6.312 are reported as 5.611: divided by one too many."""
    metrics = main(**{**needed, "gradient_accumulation_steps": 2, "num_epochs": 2}, max_train_step=4)
    assert metrics["train_steps"] == len(losses(needed["output_dir"])) == 4  # of two forward passes each
    assert metrics["train_loss"] == pytest.approx(sum(losses(needed["output_dir"])) / 4)


def test_fully_masked_rows_do_not_inflate_the_loss(base_folder: Path, tmp_path: Path, tokenizer: Any) -> None:
    """Elsewhere a batch with one real row of four counts four times."""
    ids = tokenizer("<s>abcd</s>").input_ids
    real, masked = Example(ids, list(ids)), Example(ids, [IGNORED] * len(ids))
    options = {"train_batch_size": 4, "max_train_step": 1}
    _, alone = run(base_folder, tmp_path / "a", [real], **options)
    _, among = run(base_folder, tmp_path / "b", [real, masked, masked, masked], **options)
    assert among["train_loss"] == pytest.approx(alone["train_loss"], abs=1e-5)


def test_nothing_left_to_train_is_no_error(needed: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere resuming after the last step raises UnboundLocalError; a finished epoch is trained again."""

    def full(*args: Any) -> None:
        raise OSError("no space left on device, say")

    with monkeypatch.context() as patch:
        patch.setattr(training, "_write", full)
        with pytest.raises(OSError, match="no space left"):
            main(**needed, save_steps=3)
    newest = checkpoints.listed(checkpoints.folder_for(needed["output_dir"]))[0]
    assert checkpoints.step_of(newest) == 6
    metrics = main(**needed, save_steps=3, resume=True)
    assert metrics["train_steps"] == 6
    assert len(losses(needed["output_dir"])) == 6
    assert metrics["train_loss"] == pytest.approx(sum(losses(needed["output_dir"])) / 6)


def test_two_trainings_in_one_process_do_not_mix(needed: dict[str, Any], tmp_path: Path) -> None:
    """Elsewhere each call adds a log handler and leaves global settings behind."""
    before = (torch.are_deterministic_algorithms_enabled(), torch.get_num_threads())
    main(**needed)
    main(**{**needed, "output_dir": tmp_path / "again"})
    assert losses(needed["output_dir"]) == losses(tmp_path / "again")
    assert (torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()) == before


def test_the_model_learns_to_stop_when_padding_is_eos(write_rows: Callable[..., Path]) -> None:
    """Elsewhere masking the padding token masks the end of the answer as well."""
    tokenizer = make_tokenizer(pad_token="</s>")
    examples = load_examples(write_rows(ALPACA, {**ALPACA, "output": "longer"}), tokenizer, context_length=512)
    labels = Collator(tokenizer.pad_token_id)([[e] for e in examples])["labels"]
    assert [int((row == tokenizer.eos_token_id).sum()) for row in labels] == [1, 1]


def test_every_test_of_the_table_is_there() -> None:
    """A row whose test was renamed or removed says nothing."""
    tests = Path(__file__).parents[1]
    named = re.findall(r"\| `(?:(\w+\.py)::)?(\w+)` \|", __doc__ or "")
    assert len(named) > 50
    for file, name in named:
        found = list(tests.rglob(file or Path(__file__).name))
        assert any(f"def {name}(" in path.read_text(encoding="utf-8") for path in found), f"{file}::{name}"


def test_the_result_is_where_it_was_asked_for(needed: dict[str, Any]) -> None:
    """Elsewhere the folder gets a suffix, and the scripts that come with it look for the one without."""
    main(**needed, max_train_step=1)
    folder = needed["output_dir"]
    assert [path.name for path in folder.parent.glob("out*")] == ["out"]
    assert {"adapter_model.safetensors", "tokenizer.json", "README.md"} <= {path.name for path in folder.iterdir()}


def test_packing_is_not_ignored(needed: dict[str, Any]) -> None:
    """Elsewhere it is accepted, and every example padded all the same."""
    apart = main(**needed)
    packed = main(**{**needed, "output_dir": needed["output_dir"].with_name("packed")}, packing=True, context_length=64)
    assert packed["train_steps"] < apart["train_steps"]


def test_a_tokenizer_without_bos(needed: dict[str, Any], write_rows: Callable[..., Path]) -> None:
    """Elsewhere BOS is added as text, so that a tokenizer without one fails."""
    tokenizer = make_tokenizer(bos_token=None)
    tokenizer.backend_tokenizer.post_processor = None  # type: ignore[assignment]
    (example,) = load_examples(write_rows(ALPACA), tokenizer, context_length=512)
    assert tokenizer.decode([x for x in example.labels if x != IGNORED]) == "two</s>"
    assert not tokenizer.decode(example.input_ids).startswith("<s>")


def test_a_dataset_is_cut_like_a_file(
    needed: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Elsewhere ``context_length`` with question and answer from a dataset is ``KeyError: 'length'``."""
    datasets = pytest.importorskip("datasets", reason="an optional library")
    rows = [{"question": "q" * 30, "answer": "a" * i} for i in range(1, 5)]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(tmp_path / "set")
    (tmp_path / "mine.py").write_text(
        "def pair(row):\n    return {'prompt': row['question'], 'completion': row['answer']}\n"
    )
    given = {"train_file": None, "dataset": str(tmp_path / "set"), "preprocess": f"{tmp_path / 'mine.py'}:pair"}
    assert main(**{**needed, **given}, context_length=16)["train_steps"] == 2
    assert "4 examples, 4 cut to 16 tokens" in capsys.readouterr().out


def test_a_classifier_under_bert(needed: dict[str, Any], tmp_path: Path, write_rows: Callable[..., Path]) -> None:
    """Elsewhere LoRA's modules are named for Llama, and a head is only found under one name; this one has two classes."""
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    BertForSequenceClassification(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    rows = write_rows(*({"text": "ab" * i, "label": i % 3} for i in range(1, 9)), name="classes.jsonl")
    given = {"model_name": str(tmp_path / "bert"), "train_file": rows, "task_mode": "seq_classification"}
    metrics = main(**{**needed, **given}, max_train_step=1)
    assert metrics["classes"] == 3
    assert 0 < metrics["trained_parameters"] < metrics["parameters"]


def test_no_example_is_longer_than_the_base(
    needed: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Elsewhere a row of more tokens than the base has positions is ``IndexError: index out of range in self``."""
    tokenizer = make_tokenizer()
    base = make_base(GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=16))
    base.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    metrics = main(**{**needed, "model_name": str(tmp_path / "gpt2")})
    assert metrics["train_steps"] == 6
    assert "8 cut to 16 tokens, context_length 16, not 512: the base has no more positions" in capsys.readouterr().out
    prompts = {"lora_r": None, "peft_method": "prompt_tuning", "peft_config_file": tmp_path / "prompt.yaml"}
    prompts["peft_config_file"].write_text("num_virtual_tokens: 4\n")
    main(**{**needed, **prompts, "model_name": str(tmp_path / "gpt2"), "output_dir": tmp_path / "prompt"})
    assert "cut to 12 tokens" in capsys.readouterr().out


def test_a_model_that_cannot_recompute_is_refused() -> None:
    """Elsewhere gradient checkpointing of such a model is a RuntimeError in the middle of things."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_multiple_size": 1}
    base = make_base(GPTNeoXJapaneseConfig(vocab_size=32, bos_token_id=1, eos_token_id=2, **sizes))
    model = apply_peft(base, TrainConfig(target_modules=["query_key_value"]))
    with pytest.raises(UnsupportedError, match="GPTNeoXJapaneseForCausalLM cannot compute activations again: leave"):
        check_recomputing(model)
    check_recomputing(apply_peft(make_base(), TrainConfig()))


def test_all_linear_and_whole_numbers_are_fields() -> None:
    """Elsewhere ``all-linear`` is no list and 0 no float, so both are refused."""
    made = generate_peft_config(TrainConfig(), target_modules="all-linear", lora_dropout=0)
    assert (made.target_modules, made.lora_dropout) == ("all-linear", 0)


def test_a_method_and_a_file_of_another(tmp_path: Path) -> None:
    """Elsewhere ``peft_method`` is ignored when there is a file."""
    path = tmp_path / "peft.yaml"
    path.write_text("peft_type: LORA\nr: 2\n")
    with pytest.raises(ConfigError, match=r"peft_method is 'ia3', but .*peft\.yaml says peft_type 'LORA'"):
        generate_peft_config(TrainConfig(peft_method="ia3", peft_config_file=path))
    path.write_text("peft_type: IA3\n")
    assert generate_peft_config(TrainConfig(peft_method="ia3", peft_config_file=path)).peft_type.value == "IA3"
    assert generate_peft_config(TrainConfig(peft_config_file=path)).peft_type.value == "IA3"


def test_files_that_say_nothing_sensible(tmp_path: Path) -> None:
    """Elsewhere a rank below 1 is accepted, and an empty file is a TypeError."""
    path = tmp_path / "peft.yaml"
    path.write_text("r: -1\n")
    with pytest.raises(ConfigError, match="LORA does not fit LlamaForCausalLM: `r` should be a positive integer"):
        apply_peft(make_base(), TrainConfig(peft_config_file=path))
    path.write_text("")
    with pytest.raises(ConfigError, match=r"peft\.yaml: must hold names and values, not NoneType"):
        generate_peft_config(TrainConfig(peft_config_file=path))


def test_a_missing_best_checkpoint_does_not_lose_the_training(
    needed: dict[str, Any], write_rows: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Elsewhere it is an error after the last step, and all is lost; here the last step is saved, and that is said."""
    worse = write_rows(*({"prompt": "p" * i, "completion": "cd" * i} for i in range(1, 4)), name="val.jsonl")
    best: list[str] = []

    class Remove(AdapterTrainer):
        def load_best(self) -> int:
            best.append(f"{checkpoints.PREFIX}{self.state.best_global_step}")
            shutil.rmtree(self.root / best[0])
            return super().load_best()

    given = {"val_file": worse, "eval_steps": 1, "keep_best": True, "lr": 1e-2}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "AdapterTrainer", Remove)
        metrics = main(**needed, **given)
    assert best[0] != "checkpoint-6"
    assert metrics["best_step"] == 6
    assert re.search(f"{best[0]} was never finished.*: saving the last", capsys.readouterr().err)
    assert (needed["output_dir"] / "adapter_model.safetensors").is_file()
