"""The assignment kit: nothing but tracked files and no solution in it; empty, every exercise fails in its own words; one put back turns its own
tests green; all back is this repository.  And the grader: points for what is right, nothing for an endless loop."""
import ast
import json
import os
import re
import subprocess
import sys

import pytest
from conftest import ROOT, shell
from grade import grade, main as grade_main
from make_assignment import EXERCISES, choose, find, make, message, solutions, tracked

RUNNER = """
import os, sys, numpy, torch, PIL.Image, pytest
for folder in sys.argv[1:]:                               # one import of torch for all folders, a process each
    if not (child := os.fork()):
        os.chdir(folder)
        os.dup2(os.open("answer.txt", os.O_CREAT | os.O_WRONLY), 1)
        os._exit(pytest.main(["-q", "--tb=short", "-rN", "-p", "no:cacheprovider", "tests/test_exercises.py"]))
    os.waitpid(child, 0)
"""

pytestmark = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="the kit needs a git checkout")

def test_the_kit(tmp_path):
    states = {"empty": [], "full": EXERCISES, **{e.name: [e] for e in EXERCISES}}
    for label, solved in states.items():
        make(tmp_path / label, solved=solved)
    for file in {e.file for e in EXERCISES}:
        assert (tmp_path / "full" / file).read_text() == (ROOT / file).read_text()
    folders = [tmp_path / label for label in states]
    done = subprocess.run([sys.executable, "-c", RUNNER, *folders], capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    answers = {label: (tmp_path / label / "answer.txt").read_text() for label in states}
    assert "failed" not in answers["full"] and "passed" in answers["full"], answers["full"] + done.stderr
    assert "passed" not in answers["empty"]
    for e in EXERCISES:
        text = message(e)
        assert text in answers["empty"]                   # each says what is missing
        for label in states:                              # and is gone where, and only where, the solution is back
            assert (text in answers[label]) == (label not in (e.name, "full")), (label, e.name, answers[label])
    assert sum(int(answers[e.name].split(" passed")[0].split()[-1]) for e in EXERCISES) == int(answers["full"].split(" passed")[0].split()[-1])

def flat(node):
    """Code as one line, whatever its layout and comments."""
    return " ".join(ast.unparse(node).split())

# what gives a solution away: of the bodies, and of their second implementations in the other tests
TELLTALES = (r"view_as_complex", r"_foreach_lerp", r"lerp_\(", r"eigvals", r"2020\)\.permutation\(n\)", r"x0 \* cos", r"null \+ w \*",
             r"\(1 - decay\)", r"gate1 \*", r"modulate\([^(]*norm1", r"scaler\.scale\(", r"Image\.BICUBIC")

def test_nothing_that_solves_travels(tmp_path):
    make(tmp_path / "out")
    files = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    known = set(subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n"))
    assert files - known == {"tests/EXERCISES.md"}
    assert {name for name in files if name.startswith("tests/")} == {"tests/EXERCISES.md", "tests/test_exercises.py", "tests/conftest.py", "tests/requirements.txt"}
    texts = {name: (tmp_path / "out" / name).read_text() for name in files if name.endswith(".py")}
    handed = " ".join(flat(ast.parse(text)) for text in texts.values())
    whole = " ".join(flat(ast.parse((ROOT / name).read_text())) for name in texts)
    for e in EXERCISES:
        original = (ROOT / e.file).read_text()
        assert all(phrase in original for phrase in e.hide), e.name
        for function in e.functions:
            node = find(original, function)
            for statement in (flat(statement) for statement in node.body[1:]):
                assert len(statement) < 40 or handed.count(statement) < whole.count(statement), (e.name, statement)
            docstring, before = (ast.get_docstring(n, clean=False) or "" for n in (find(texts[e.file], function), node))
            assert len(docstring) == len(before) - sum(len(phrase) for phrase in e.hide if phrase in before)
    for pattern in TELLTALES:
        assert not re.search(pattern, "\n".join(texts.values())), pattern
        assert any(re.search(pattern, p.read_text()) for p in [*ROOT.glob("0*.py"), *ROOT.glob("tests/*.py")] if p.name != "test_assignment.py"), f"{pattern} finds nothing any more"

def test_untracked_files_stay(tmp_path):
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    for name in tracked() + ["tests/make_assignment.py"]:  # as they are here, committed or not
        (clone / name).write_bytes((ROOT / name).read_bytes())
    for name in ("assignment/02_model.py", "solved.py", ".venv/bin/python", "data/shapes/meta.json", "solutions.md", "09_mine.py"):
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        (clone / name).write_text("secret")
    subprocess.run(["git", "add", "-f", "solutions.md"], cwd=clone, check=True)          # tracked, and still not for students
    subprocess.run([sys.executable, "tests/make_assignment.py", "out", "--exercises", "4"], cwd=clone, check=True, stdout=subprocess.DEVNULL)
    assert not any(b"secret" in p.read_bytes() for p in (clone / "out").rglob("*") if p.is_file() and p.suffix != ".png"), "an untracked file travelled"
    assert not {"assignment", "solved.py", ".venv", "data", "out", "solutions.md", "09_mine.py"} & {p.name for p in (clone / "out").iterdir()}

def test_choose():
    assert [e.number for e in choose("1-3, heun,5")] == [1, 2, 3, 5, 12]
    for wrong in ("0", "1-99", "7-", "-7", "attention", "", "3-1", "1-2-3"):
        with pytest.raises(ValueError, match="--exercises"):
            choose(wrong)

def test_kit_on_the_command_line(there):
    done = shell("tests/make_assignment.py", "out", "--exercises", "4-5", cwd=there)
    assert done.returncode == 0 and "2 exercises" in done.stdout and "rotate" in (there / "out/tests/EXERCISES.md").read_text(), done.stderr
    assert "NotImplementedError" not in (there / "out/03_train.py").read_text().replace("OSError, NotImplementedError", "")
    again = shell("tests/make_assignment.py", "out", cwd=there)
    assert again.returncode == 1 and again.stderr.count("\n") == 1
    assert shell("tests/make_assignment.py", cwd=there).returncode == 2
    assert shell("tests/make_assignment.py", "--solutions", "sheet.md", "--exercises", "rotate", cwd=there).returncode == 0
    assert (there / "sheet.md").read_text() == solutions(choose("5")) and "x * cos" in solutions(choose("5"))
    script = subprocess.run([sys.executable, "02_model.py"], cwd=there / "out", capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert script.returncode == 1 and "Traceback" not in script.stderr and "error: exercise 5, rotate" in script.stderr

def test_the_grader(tmp_path, monkeypatch, capsys):
    chosen = choose("mix,patchify,euler,heun,guidance")
    make(tmp_path / "work", chosen)
    sampler, network = tmp_path / "work/04_sample.py", tmp_path / "work/02_model.py"
    solved, text = (ROOT / "04_sample.py").read_text(), sampler.read_text()
    for name, body in (("euler_step", "    while True: pass\n"), ("guided", "    import os; os._exit(0)\n"), ("heun_step", "    return velocity(z, t)\n")):
        node = find(text, name)
        lines = text.splitlines(keepends=True)
        text = "".join(lines[:node.end_lineno - 1] + [body] + lines[node.end_lineno:])
    sampler.write_text(text)
    network.write_text((ROOT / "02_model.py").read_text())
    (tmp_path / "work/tests/test_exercises.py").write_text("def test_exercise_12_mine(): pass\n")           # is not what counts
    monkeypatch.chdir(tmp_path)
    assert grade_main(["work", "--exercises", "mix,patchify,euler,heun,guidance", "--limit", "15"]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    points = {test["name"]: test["score"] for test in results["tests"]}
    assert points == {"mix": 4, "patchify": 5, "guidance": 0, "euler": 0, "heun": 0}, results
    outputs = {test["name"]: test["output"] for test in results["tests"]}
    assert "endless" in outputs["euler"] and "exit code" in outputs["guidance"] and "expected [5.125]" in outputs["heun"]
    # the fields that Gradescope documents, with their types
    assert set(results) == {"score", "execution_time", "tests"} and results["score"] == 9 and isinstance(results["execution_time"], int)
    for test in results["tests"]:
        assert set(test) == {"number", "name", "score", "max_score", "status", "output"}
        assert test["status"] in ("passed", "failed") and isinstance(test["number"], str) and 0 <= test["score"] <= test["max_score"]
    assert "9 of 26 points" in capsys.readouterr().out
    # a syntax error costs its own script only; a missing script is named
    sampler.write_text(solved + "\ndef broken(:\n")
    network.unlink()
    wrong = {test["name"]: test["output"] for test in grade(tmp_path / "work", choose("mix,euler"), 60)["tests"]}
    assert "SyntaxError" in wrong["euler"] and wrong["mix"] == "02_model.py is missing"
    # a test that is skipped is not passed; and git is not needed
    monkeypatch.setenv("PATH", "")
    sampler.write_text(solved.replace("    return z + (t_next - t) * velocity(z, t)\n", "    import pytest; pytest.xfail()\n"))
    assert [test["score"] for test in grade(tmp_path / "work", choose("euler"), 60)["tests"]] == [0]
    assert grade_main(["nowhere"]) == 1
