# SPDX-License-Identifier: BSD-3-Clause
"""``qefficient compile`` and ``qefficient generate`` on tiny models with a tokenizer of words."""

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from QEfficient.cloud.__main__ import run
from QEfficient.runtime import pages
from tests.tiny import VOCAB, save_adapter, save_base

PROMPT = "w5 w9 w33"
NEW = 6


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Write a base with its tokenizer, and two adapters."""
    root = tmp_path_factory.mktemp("models")
    base = save_base(root / "base")
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2").save_pretrained(base)
    save_adapter(base, root / "one", seed=1)
    save_adapter(base, root / "two", seed=2)
    return root


@pytest.fixture(scope="module")
def graph(folders):
    """Export the base with both adapters."""
    pairs = [f"--adapter=one={folders / 'one'}", f"--adapter=two={folders / 'two'}"]
    assert run("export", [str(folders / "base"), *pairs, f"--output={folders / 'graph'}"]) == 0
    return next(folders.glob("graph-*"))


def _expected(folders: Path, name: str) -> str:
    """Return what PyTorch + PEFT generates."""
    base = name == "base"
    model = (AutoModelForCausalLM if base else AutoPeftModelForCausalLM).from_pretrained(folders / name)
    ids = torch.tensor([[5, 9, 33]])
    new = model.generate(input_ids=ids, do_sample=False, max_new_tokens=NEW)[0, 3:].tolist()
    return " ".join(f"w{i}" for i in new if i > 2)


def _text(out: str) -> list[str]:
    return [line.strip() for line in out.splitlines() if line.strip()]


@pytest.mark.parametrize("name", ["base", "one", "two"])
def test_graph(folders, graph, capsys, name):
    """A graph completes with each of the adapters that were exported with it, and with the base."""
    assert run("generate", [str(graph), "--use", name, "--prompt", PROMPT, "--max-new-tokens", str(NEW)]) == 0
    captured = capsys.readouterr()
    assert _text(captured.out) == [_expected(folders, name)]
    assert "tokens/s)" in captured.err


def test_program_and_all_adapters(folders, graph, capsys, monkeypatch):
    """A program completes a prompt from standard input with every adapter in turn."""
    assert run("compile", [str(graph / "model.onnx"), "--ctx-len=64", "--prefill-seq-len=2"]) == 0
    program = capsys.readouterr().out.removeprefix("program:").strip()
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT))
    assert run("generate", [program, "--prompt=-", f"--max-new-tokens={NEW}"]) == 0
    out = _text(capsys.readouterr().out)
    assert out == ["[one]", _expected(folders, "one"), "[two]", _expected(folders, "two")]


def test_base_with_adapter(folders, capsys):
    """A base and an adapter's folder are exported and compiled on the way."""
    base, one = str(folders / "base"), str(folders / "one")
    arguments = ["--prompt", PROMPT, "--max-new-tokens", str(NEW)]
    assert run("generate", [base, "--adapter", f"one={one}", "--use=one", "--use=base", *arguments]) == 0
    out = _text(capsys.readouterr().out)
    assert out == ["[one]", _expected(folders, "one"), "[base]", _expected(folders, "base")]
    assert run("generate", [base, *arguments]) == 0
    assert _text(capsys.readouterr().out) == [_expected(folders, "base")]


@pytest.mark.parametrize("given", ["graph", "base"])
def test_large_pages(folders, graph, capsys, caplog, monkeypatch, given):
    """The same text; where the system has no large pages, one warning says so, and only if they were asked for."""
    subject = [str(graph)] if given == "graph" else [str(folders / "base"), f"--adapter=one={folders / 'one'}"]
    command = [*subject, "--use=one", "--prompt", PROMPT, "--max-new-tokens", str(NEW)]
    for setting in (pages._SETTING, folders / "nowhere"):
        monkeypatch.setattr(pages, "_SETTING", setting)
        for asked in ([], ["--large-pages"]):
            caplog.clear()
            assert run("generate", [*command, *asked]) == 0
            assert _text(capsys.readouterr().out) == [_expected(folders, "one")]
            warned = [r.getMessage() for r in caplog.records if r.name == "qefficient.pages"]
            assert warned == [f"large pages change nothing here: {pages.why_not()}"] * bool(asked and pages.why_not())
    assert pages.why_not()


def test_precision_and_threads(folders, graph, capsys):
    """They reach the program and its session: generate makes and uses what compile would have made."""
    arguments = [str(graph), "--use=one", "--prompt", PROMPT, "--max-new-tokens", str(NEW)]
    options = ["--precision=int4", "--block-size=16"]
    before = set(graph.glob("qpc-*"))
    assert run("generate", [*arguments, *options, "--threads=1"]) == 0
    shown = _text(capsys.readouterr().out)
    (made,) = set(graph.glob("qpc-*")) - before
    assert run("compile", [str(graph), *options]) == 0
    assert capsys.readouterr().out.split()[-1] == str(made / "program")
    assert run("generate", [str(made / "program"), *arguments[1:]]) == 0
    assert _text(capsys.readouterr().out) == shown
    assert run("generate", [str(made / "program"), *arguments[1:], "--precision=int8"]) == 2
    assert "is a program, compiled already: leave out --precision" in capsys.readouterr().err


def test_an_adapter_that_does_not_fit_the_first(folders, tmp_path, capsys):
    """It is said before anything is generated; without it, the other completes."""
    config = LoraConfig(r=2, target_modules=["q_proj"], use_dora=True, task_type="CAUSAL_LM")
    save_adapter(folders / "base", tmp_path / "other", config=config)
    pairs = [f"--adapter=one={folders / 'one'}", f"--adapter=other={tmp_path / 'other'}"]
    arguments = [str(folders / "base"), *pairs, "--prompt", PROMPT, f"--max-new-tokens={NEW}"]
    assert run("generate", arguments) == 2
    captured = capsys.readouterr()
    assert "adapter 'other' does not fit the graph: use_dora is True, exported with None" in captured.err
    assert captured.out == ""
    assert run("generate", [*arguments, "--use=one"]) == 0
    assert _text(capsys.readouterr().out) == [_expected(folders, "one")]


CHAT = "{% for m in messages %}{{ m['role'][:1] }} {{ m['content'] }} {% endfor %}w7"


def test_chat_messages_and_prompts_from_files(folders, graph, tmp_path, capsys):
    """System message, earlier turns and each line of a file go through the chat template."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folders / "base")
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "chat")
    (tmp_path / "prompts").write_text("w5\n\nw9 w33\n")
    (tmp_path / "turns.json").write_text('[{"role": "user", "content": "w8"}, {"role": "assistant", "content": "w4"}]')
    arguments = ["--use=one", f"--tokenizer={tmp_path / 'chat'}", f"--max-new-tokens={NEW}"]
    files = [f"--prompts={tmp_path / 'prompts'}", f"--messages={tmp_path / 'turns.json'}"]
    assert run("generate", [str(graph), *arguments, *files, "--system=w6"]) == 0
    got = _text(capsys.readouterr().out)
    written = ["s w6 u w8 a w4 u w5 w7", "s w6 u w8 a w4 u w9 w33 w7"]
    plain = [f"--prompt={text}" for text in written]
    assert run("generate", [str(graph), *arguments, *plain]) == 0
    assert got == _text(capsys.readouterr().out)
    assert len(got) == 2


def test_any_generation_option(folders, graph, capsys):
    """``--set`` reaches transformers: beams, and the same sample from the same seed."""
    arguments = [str(graph), "--use=one", "--prompt", PROMPT, "--max-new-tokens", str(NEW)]
    assert run("generate", [*arguments, "--set=num_beams=3", "--set=eos_token_id=null"]) == 0
    model = AutoPeftModelForCausalLM.from_pretrained(folders / "one")
    ids = torch.tensor([[5, 9, 33]])
    new = model.generate(input_ids=ids, do_sample=False, num_beams=3, max_new_tokens=NEW, eos_token_id=None)[0, 3:]
    assert _text(capsys.readouterr().out) == [" ".join(f"w{i}" for i in new.tolist() if i not in (0, 2))]
    texts = []
    for seed in (1, 1, 2):
        assert run("generate", [*arguments, "--temperature=5", "--set=top_k=50", f"--seed={seed}"]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature=-1"], "--temperature must be at least 0"),
        (["--top-p=0.5"], "--top-p changes nothing without --temperature"),
        (["--set=topk=4"], "not 'topk=4'; did you mean 'top_k'?"),
        (["--set=top_k=x"], "the value must be JSON"),
        (["--set=early_stopping=3"], "early_stopping"),
        (["--prompts=nowhere"], "--prompts nowhere cannot be read"),
        (["--messages=pyproject.toml"], "is not JSON"),
        (["--chat"], "has no chat template"),
        (["--use=onne"], "no adapter 'onne'; did you mean 'one'? (there are: one, two, base)"),
        (["--adapter=x=y"], "comes with its adapters: leave out --adapter"),
        (["--threads=-1"], "--threads must be at least 0, not -1"),
        (["--block-size=7", "--precision=int4"], "block_size must be one of"),
        (["--max-new-tokens=0"], "--max-new-tokens must be at least 1, not 0"),
        (["--max-new-tokens=900", "--use=one"], "the context does not fit: prompt and new tokens need 902 positions"),
        (["--max-new-token=9"], "unknown option '--max-new-token'; did you mean '--max-new-tokens'?"),
    ],
)
def test_mistakes(graph, capsys, arguments, message):
    """A mistake is one line on standard error, and exit code 2."""
    assert run("generate", [str(graph), "--prompt", PROMPT, *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_compile_mistakes(graph, tmp_path, capsys):
    """A folder that is no graph, and a target that is unknown, are said so."""
    assert run("compile", [str(tmp_path)]) == 2
    assert "is not an exported graph" in capsys.readouterr().err
    assert run("compile", [str(graph), "--target=npu"]) == 2
    assert "unknown target 'npu' (known: onnxruntime)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["compile", "generate"])
def test_help_is_fast(name):
    """``--help`` loads neither PyTorch nor ONNX Runtime."""
    code = (
        "import sys\nfrom QEfficient.cloud.__main__ import main\n"
        f"try: main([{name!r}, '--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'onnxruntime', 'transformers', 'onnx_ir'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
