"""The five scripts as a newcomer meets them: in sequence, without input, with --help, and as the README shows them."""
import ast
import json
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields, make_dataclass
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT, TINY_FLAGS, call, data, evaluate, model, sample, shell, train

SCRIPTS = ["01_data.py", "02_model.py", "03_train.py", "04_sample.py", "05_eval.py"]
READMES = ("README.md", "tests/experiments/README.md")

def test_every_bar_ends_at_its_total(there, monkeypatch):
    """Where a part was done before, samples count what is missing, training all steps."""
    bars = []

    class Spy(data.Progress):
        def __init__(self, *args, **more):
            super().__init__(*args, **more)
            bars.append(self)
    monkeypatch.setattr(data, "Progress", Spy)
    assert call(data, "--size", 16, "--count", 300, "--workers", 1) == 0
    assert call(train, *TINY_FLAGS, "--steps", 4) == 0 and call(train, "--resume", "--steps", 6) == 0
    assert call(sample, "--num", 20, "--steps", 1, "--amp", "off", "--batch-size", 6) == 0
    Path("runs/shapes/samples/0000007.png").unlink()
    assert call(sample, "--num", 20, "--steps", 1, "--amp", "off", "--batch-size", 6) == 0 and call(evaluate) == 0
    found = [(bar.desc, bar.total, bar.n) for bar in bars]
    assert found == [(name, n, n) for name, n in (("train_images", 300), ("val_images", 100), ("shapes", 4), ("shapes", 6), ("sampling", 20), ("sampling", 6),
                                                  ("training the classifier", 70), ("real images", 300), ("generated images", 20), ("held-out images", 20))]

@pytest.mark.card
def test_the_five_scripts_in_sequence(there, capsys):
    """By subprocess, tiny; called a second time, training and packing say that their work is done."""
    pack, learn, draw = ["--size", 16, "--count", 200, "--workers", 2], [*TINY_FLAGS, "--steps", 10], ["--num", 20, "--steps", 2]
    for command in (["01_data.py", *pack], ["02_model.py"], ["03_train.py", *learn], ["04_sample.py", *draw], ["05_eval.py"]):
        done = shell(*command, cwd=there)
        assert done.returncode == 0, done.stderr
        assert "Traceback" not in done.stderr and "%|" not in done.stderr               # bars only on a terminal
    assert call(data, *pack) == call(train, *learn) == 0 and capsys.readouterr().out.count("nothing to do") == 2
    assert call(sample, *draw) == call(evaluate) == 0
    for file in ("data/shapes/preview.png", "data/shapes/meta.json", "runs/shapes/config.json", "runs/shapes/log.csv", "runs/shapes/checkpoint.pt", "runs/shapes/samples/0000019.png", "runs/shapes/loss.png",
                 "runs/shapes/grid.png", "runs/shapes/metrics.json"):
        assert (there / file).is_file(), file
    assert not list(there.rglob("*.jit-part"))
    assert json.loads((there / "runs/shapes/metrics.json").read_text())["n_generated"] == 20

@pytest.mark.parametrize("script,words", [("03_train.py", "python 01_data.py"), ("04_sample.py", "python 03_train.py"), ("05_eval.py", "python 04_sample.py")])
def test_called_before_its_input_exists(there, capsys, script, words):
    assert call(import_module(script.removesuffix(".py"))) == 1 and (script != "05_eval.py" or shell(script, cwd=there).returncode == 1)
    said = capsys.readouterr().err
    assert words in said and len(said.strip().splitlines()) == 1 and not list(there.iterdir())

@pytest.mark.parametrize("module", [data, model, train, sample, evaluate], ids=SCRIPTS)
def test_help_has_a_line_for_every_option(module, capsys):
    with pytest.raises(SystemExit):
        call(module, "--help")
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 118
    text = " ".join(text.split())
    for entry in [*(fields(module.Options) if module is not model else []), *(fields(model.JiTConfig) if module is train else fields(sample.Settings) if module is sample else [])]:
        assert not entry.metadata or f"--{entry.name.replace('_', '-')}" in text and entry.metadata["text"][:20] in text

def test_help_may_have_a_percent_sign(capsys):
    """In an option of an experiment of your own, say."""
    options = make_dataclass("Own", [("share", float, data.option(0.5, "50 % of it, or %(prog)"))])
    with pytest.raises(SystemExit):
        data.parse(["--help"], "", options)
    assert "50 % of it, or %(prog)" in capsys.readouterr().out
    assert data.help_text({"text": "x", "default": True, "choices": None}, True) == "x (default: on)"

def test_help_on_a_terminal_without_unicode(there):
    assert shell("05_eval.py", "--help", cwd=there, env={"PYTHONIOENCODING": "ascii"}).returncode == 0

def test_numbers_that_are_none_are_refused_also_without_asserts(work):
    flags = [["--steps", "nan"], ["--cfg", "nan"], ["--shift", "inf"], ["--t-eps", "inf"], ["--interval", "0.9,0.1"], ["--num", "9999999999"]]
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from importlib import import_module; sample = import_module('04_sample')\n" \
           f"print(*[sample.data.run(lambda: sample.main(flags)) for flags in {flags}])"
    done = subprocess.run([sys.executable, "-O", "-c", code], capture_output=True, text=True, cwd=work)
    assert {*done.stdout.split()} <= {"1", "2"} and len(done.stdout.split()) == len(flags), done.stderr
    assert all("--" in line or "no checkpoint" in line for line in done.stderr.splitlines()) and done.stderr.count("\n") == len(flags)

def test_importing_a_stage_has_no_effect(there):
    code = "import sys, random; sys.path.insert(0, %r); sys.argv = ['x', '--nonsense']\n" % str(ROOT) + \
           "import torch, numpy; a = torch.get_rng_state().clone(), numpy.random.get_state()[1].copy(), torch.get_num_threads()\nfrom importlib import import_module\n" + \
           "".join(f"import_module({s[:-3]!r})\n" for s in SCRIPTS) + \
           "assert torch.equal(a[0], torch.get_rng_state()) and (a[1] == numpy.random.get_state()[1]).all() and a[2] == torch.get_num_threads()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=there)
    assert done.returncode == 0 and done.stdout == done.stderr == "" and not list(there.iterdir()), done.stderr

def test_stages_import_only_earlier_ones_and_four_packages():
    allowed = {"torch", "numpy", "PIL", "tqdm"} | set(sys.stdlib_module_names)
    stages = {"01_data": [], "02_model": ["01_data"], "03_train": ["01_data", "02_model", "03_train"], "04_sample": ["01_data", "02_model", "04_sample"], "05_eval": ["01_data", "02_model"]}
    for stage, earlier in stages.items():
        text = (ROOT / f"{stage}.py").read_text()
        names = {n.name.split(".")[0] for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Import) for n in node.names}
        names |= {node.module.split(".")[0] for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)}
        assert names <= allowed, (stage, names - allowed)
        assert re.findall(r'import_module\("(\w+)"\)', text) == earlier
    code = "import importlib, sys; importlib.import_module('01_data'); print('torch' in sys.modules or '02_model' in sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout
    assert loaded == "False\n"                            # 01 does without torch

def test_layout():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()     # what is tracked: a user's own folders do not count
    if not listed:
        pytest.skip("no git checkout")
    shown = {name.split("/")[0] for name in listed if not name.startswith(".")}
    assert shown == {"README.md", "requirements.txt", "tests", *SCRIPTS}

def readme_commands():
    """Every command of the code blocks and in backquotes of both READMEs that runs python or torchrun: (script, arguments)."""
    text = "".join((ROOT / name).read_text() for name in READMES)
    lines = [line for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S) for line in block.splitlines()]
    lines += [" ".join(words.split()) for words in re.findall(r"`(python3? [^`]+)`", re.sub(r"```.*?```", "", text, flags=re.S))]
    for line in lines:
        for part in re.split(r"&&|;", re.sub(r"(^|\s)#.*", "", line)):
            words = shlex.split(re.sub(r"^\s*do\s", "", part))
            script = next((w for w in words if w.endswith(".py") and words[0] in ("python", "torchrun")), None)
            if script:
                yield script, words[words.index(script) + 1:]

STAGES = sorted({(script, *args) for script, args in readme_commands() if script in SCRIPTS and not {"NAME", "FLAGS", "X"} & {*args}})
OTHERS = {  # the commands that are not stages: what makes them short; those without a list are run by another test
    "tests/benchmark.py train": ["--model", "JiT-T/8", "--batch-size", 4, "--seconds", 0.1, "--amp", "off"],
    "tests/benchmark.py profile": ["--model", "JiT-T/8", "--batch-size", 4, "--seconds", 0.1, "--amp", "off"],
    "tests/benchmark.py files": ["--size", 16, "--count", 20],
    "tests/benchmark.py sample": ["--model", "JiT-T/8", "--batch-size", 4, "--steps", 2, "--amp", "off"],
    "tests/benchmark.py data": ["--root", "PHOTOS", "--size", 16, "--seconds", 0.1],
    "tests/benchmark.py scores": ["--count", 500],
    "tests/figures.py": ["."],
    "tests/make_assignment.py": None, "tests/grade.py": None, "tests/test_exercises.py": None,
    **{f"tests/experiments/{path.name}": None for path in (ROOT / "tests" / "experiments").glob("[a-z]*.py")},
}

def test_every_other_command_of_the_readme_is_run_by_a_test():
    for script, args in readme_commands():
        assert script in SCRIPTS or script == "tests/experiments/NAME.py" or any(" ".join([script, *args]).startswith(known) for known in OTHERS), script

@pytest.mark.parametrize("command", [command for command, short in OTHERS.items() if short])
def test_other_commands_at_short_length(there, capsys, monkeypatch, command):
    (there / "PHOTOS").mkdir()
    Image.fromarray(np.zeros((40, 30, 3), np.uint8)).save(there / "PHOTOS" / "a.png")
    script, *words = *command.split(), *map(str, OTHERS[command])
    if script == "tests/figures.py":
        done = shell(script, *words, cwd=there)
        assert done.returncode == 0 and done.stdout, done.stderr
        return
    monkeypatch.setattr(model, "attend", model.attend)    # given back
    import_module("benchmark").main(words)
    assert capsys.readouterr().out

@pytest.mark.parametrize("mode", [["--compile"], ["--plain", "--checkpointing"], ["--amp", "fp16"], ["--amp", "bf16"]], ids=" ".join)
def test_every_way_to_train_in_the_benchmark(there, capsys, monkeypatch, mode):
    if "--compile" in mode and not shutil.which("c++"):
        pytest.skip("no compiler")
    monkeypatch.setattr(model, "attend", model.attend)    # given back
    import_module("benchmark").main(["train", *map(str, OTHERS["tests/benchmark.py train"]), *mode])
    assert "utilisation" in capsys.readouterr().out

def test_the_benchmark_records_on_a_gpu_only(there):
    done = shell("tests/benchmark.py", "train", "--record", "--device", "cpu", cwd=there)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "need a GPU" in done.stderr

@pytest.mark.parametrize("script,args", [pytest.param(c[0], list(c[1:]), id=" ".join(c)) for c in STAGES])
def test_every_command_of_the_readme_parses(there, script, args):
    shutil.copy(ROOT / "tests" / "experiments" / "mean_colour.py", "my_head.py")
    module = {"01_data.py": data, "02_model.py": model, "03_train.py": train, "04_sample.py": sample, "05_eval.py": evaluate}[script]
    args = [re.sub(r"\$\{?\w+\}?", "1", a) if "$" in a and "=" not in a else a for a in args]
    args = ["baseline" if a == "1" and args[i - 1] == "--experiment" else "x" if a == "1" and args[i - 1] in ("--pred", "--loss") else "heun" if a == "1" and args[i - 1] == "--solver" else a for i, a in enumerate(args)]
    if script == "03_train.py":
        train.gather(train.read_flags(args))
    elif script == "04_sample.py":
        data.parse(args, "", sample.Options, sample.Settings)
    elif script == "02_model.py":
        data.parse(args, "")
    else:
        module.Options(**data.parse(args, "", module.Options))

def test_the_readme_has_commands_and_repeats_no_error_of_the_reading():
    assert len(STAGES) > 30
    texts = [(ROOT / name).read_text() for name in READMES]
    assert "## Questions" in texts[0] and "## How to cite" in texts[0] and "## What the reading gets wrong" in texts[1]
    assert len(texts[0].splitlines()) <= 450
    linked = set()
    for name, text in zip(READMES, texts):
        for path in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            assert "://" in path or (ROOT / name).parent.joinpath(path).is_file(), path
            linked.add(Path(path).name)
    assert {path.name for path in (ROOT / ".github" / "figures").iterdir()} <= linked

def test_messages_name_only_flags_and_scripts_that_exist():
    """Also in docstrings: what is advised can be typed."""
    flags = {data.flag(e.name) for cls in (data.Options, train.Options, model.JiTConfig, sample.Options, sample.Settings, evaluate.Options) for e in fields(cls) if e.metadata}
    flags |= {"--no-" + flag[2:] for flag in flags} | {"--help", "--nproc_per_node", "--max-restarts"}
    for path in sorted(ROOT.glob("0*.py")):
        texts = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
        named = {flag for text in texts for flag in re.findall(r"(?<![\w-])--[a-z][a-z_-]*[a-z]", text)}
        assert named <= flags, (path.name, named - flags)
        assert all((ROOT / script).exists() for text in texts for script in re.findall(r"\b0\d_[a-z]+\.py|tests/[a-z_/]+\.py", text))
