# SPDX-License-Identifier: BSD-3-Clause
"""The demo's base: a byte-pair tokenizer and a small Llama, both trained from the shop's text."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    DataCollatorForLanguageModeling,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from QEfficient.finetune.train import ProgressCallback

VOCAB_SIZE = 1024
BATCH_SIZE = 16
SPECIAL = ("<pad>", "<s>", "</s>")


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that puts ``<s>`` in front of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(documents, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    pad, bos, eos = SPECIAL
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, bos_token=bos, eos_token=eos)


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Return an untrained Llama with grouped-query attention."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            # Wide enough that a token's identity shows through from the start: the model learns to copy in half the steps.
            initializer_range=0.08,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def train_base(documents: list[str], folder: Path, *, seed: int = 0) -> LlamaForCausalLM:
    """Train tokenizer and model on each of ``documents`` once, save both to ``folder`` and return the model."""
    set_seed(seed)
    tokenizer = train_tokenizer(documents)
    model = make_model(tokenizer)
    steps = len(documents) // BATCH_SIZE
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=BATCH_SIZE,
        num_train_epochs=1,
        learning_rate=3e-3,
        warmup_steps=steps // 20,
        adam_beta2=0.98,
        weight_decay=0.1,
        logging_steps=max(1, steps // 10),
        save_strategy="no",
        report_to="none",
        seed=seed,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    rows = [{"input_ids": tokenizer(text + tokenizer.eos_token).input_ids} for text in documents]
    collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    trainer = Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collator)
    trainer.pop_callback(PrinterCallback)
    trainer.add_callback(ProgressCallback("base"))
    trainer.train()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval()
