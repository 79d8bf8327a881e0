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
from QEfficient.contract import Manifest
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
    assert capsys.readouterr().out.split()[1] == str(made / "program")
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


def test_a_chat_that_the_template_refuses(folders, graph, tmp_path, capsys):
    """What the template says is the error."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folders / "base")
    tokenizer.chat_template = "{{ raise_exception('no system message, please') }}"
    tokenizer.save_pretrained(tmp_path)
    assert run("generate", [str(graph), "--use=one", f"--tokenizer={tmp_path}", "--prompt=w5", "--system=w6"]) == 2
    assert "the chat template refuses these messages: no system message, please" in capsys.readouterr().err


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


@pytest.mark.parametrize("how", [["--temperature=2"], ["--set=num_beams=3"]], ids=["sampled", "beams"])
def test_several_results(folders, graph, capsys, how):
    """All of them are shown, numbered, as PyTorch gives them from the same seed."""
    arguments = [str(graph), "--use=one", "--prompt", PROMPT, "--max-new-tokens", str(NEW), "--seed=5"]
    more = ["--set=num_return_sequences=2", "--set=eos_token_id=null", "--set=return_dict_in_generate=true"]
    assert run("generate", [*arguments, *more, *how]) == 0
    captured = capsys.readouterr()
    model = AutoPeftModelForCausalLM.from_pretrained(folders / "one")
    chosen = {"do_sample": True, "temperature": 2.0, "top_p": 1.0} if "--temperature=2" in how else {"num_beams": 3}
    torch.manual_seed(5)
    ids = torch.tensor([[5, 9, 33]])
    rows = model.generate(input_ids=ids, max_new_tokens=NEW, eos_token_id=None, num_return_sequences=2, **chosen)
    texts = [" ".join(f"w{i}" for i in row if i not in (0, 2)) for row in rows[:, 3:].tolist()]
    assert _text(captured.out) == ["[1]", texts[0], "[2]", texts[1]]
    assert f"({2 * NEW} tokens," in captured.err


def test_places(folders, graph, tmp_path, capsys):
    """A graph is found by its model.onnx, a program by its qpc folder; what is nowhere, and adapters that are elsewhere, are said."""
    asked = ["--prompt", PROMPT, "--max-new-tokens", str(NEW)]
    assert run("compile", [str(graph), f"--output={tmp_path}"]) == 0
    program = Path(capsys.readouterr().out.split()[-1])
    for place in (graph / "model.onnx", program, program.parent):
        name = "one" if place.parent == graph else "base"
        assert run("generate", [str(place), f"--use={name}", *asked]) == 0
        assert _text(capsys.readouterr().out) == [_expected(folders, name)]
    assert run("generate", [str(program), *asked]) == 2
    assert f"no adapters lie beside {program}: give its graph" in capsys.readouterr().err
    for nothing in (tmp_path / "nowhere", tmp_path):
        assert run("generate", [str(nothing), "--use=one", *asked]) == 2
        assert f"'{nothing}' holds no base (no config.json), no graph and no program" in capsys.readouterr().err


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
        (["--prompt="], "an empty prompt is no token for this tokenizer"),
        (["--temperature=nan"], "--temperature must be at least 0 and --top-p in (0, 1], not nan"),
        (["--seed=-1"], "--seed must be at least 0 and below 2**63, not -1"),
        (["--set=num_return_sequences=2"], "--set: Greedy methods"),
        (["--use=one", '--set=eos_token_id="w5"'], "transformers refuses these options: "),
        (["--use=one", "--set=bad_words_ids=3"], "`bad_words_ids` has to be a non-empty list, but is 3"),
        (["--use=one", "--set=penalty_alpha=0.6", "--set=top_k=4"], "Contrastive Search requires"),
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


def test_compile_says_how_far_weights_are_off(graph, capsys):
    """A line for each number of bits: weights, mean error, largest error and whose it is."""
    assert run("compile", [str(graph), "--precision=int4", "--keep=lm_head*"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    errors = Manifest.read(Path(first.split()[-1])).options["quantized"]
    four = {name: w["error"] for name, w in errors.items() if w["bits"] == 4}
    worst = max(four, key=four.get)
    mean = sum(four.values()) / len(four)
    said = f"off by {mean:.1%} of their size, {four[worst]:.1%} at most ({worst})"
    eight = f"{errors['lm_head.weight']['error']:.1%}"
    assert lines == [
        f"weights:  {len(four)} at 4 bits, {said}",
        f"weights:  1 at 8 bits, off by {eight} of their size, {eight} at most (lm_head.weight)",
    ]
    assert run("compile", [str(graph)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_compile_mistakes(graph, tmp_path, capsys):
    """What is no graph, a target that is unknown, options without a meaning and a place that cannot be written are said so."""
    (tmp_path / "file").write_text("")
    assert run("compile", [str(graph), f"--output={tmp_path / 'file'}"]) == 2
    assert capsys.readouterr().err == f"error: File exists: {tmp_path / 'file'}\n"
    for option in ("--block-size=64", "--zero-points"):
        assert run("compile", [str(graph), option]) == 2
        assert "precision fp32 has no blocks: leave out their size and zero points" in capsys.readouterr().err
    assert run("compile", [str(graph)]) == 0
    program = capsys.readouterr().out.split()[-1]
    assert run("compile", [program]) == 2
    assert f"{program} is a program, compiled already; give the graph" in capsys.readouterr().err
    assert run("compile", [str(tmp_path)]) == 2
    assert "is not an exported graph" in capsys.readouterr().err
    assert run("compile", [str(graph), "--target=npu"]) == 2
    assert "unknown target 'npu' (known: onnxruntime, onnxruntime-plain)" in capsys.readouterr().err


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
