"""The assignment kit: empty, every exercise fails in its own words; one put back turns its own tests green; all back is this repository."""
import os
import subprocess
import sys

from conftest import ROOT, shell
from make_assignment import EXERCISES, make

RUNNER = """
import os, sys, numpy, torch, PIL.Image, pytest
for folder in sys.argv[1:]:                               # one import of torch for all folders, a process each
    if not (child := os.fork()):
        os.chdir(folder)
        os.dup2(os.open("answer.txt", os.O_CREAT | os.O_WRONLY), 1)
        os._exit(pytest.main(["-q", "--tb=line", "-p", "no:cacheprovider", "tests/test_exercises.py"]))
    os.waitpid(child, 0)
"""

def test_the_kit(tmp_path):
    names = [name for _, name, _, _ in EXERCISES]
    states = {"empty": [], "full": names, **{name: [name] for name in names}}
    for label, solved in states.items():
        make(tmp_path / label, solved)
    for file in {file for file, _, _, _ in EXERCISES}:
        assert (tmp_path / "full" / file).read_text() == (ROOT / file).read_text()
    folders = [tmp_path / label for label in states]
    done = subprocess.run([sys.executable, "-c", RUNNER, *folders], capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"})
    answers = {label: (tmp_path / label / "answer.txt").read_text() for label in states}
    assert "failed" not in answers["full"] and "13 passed" in answers["full"], answers["full"] + done.stderr
    for number, (file, name, _, task) in enumerate(EXERCISES, 1):
        message = f"NotImplementedError: exercise {number}, {name} in {file}: {task}"
        assert message in answers["empty"]                # each says what is missing
        for label in names:                               # and is gone where, and only where, the solution is back
            assert (message in answers[label]) == (label != name), (label, name, answers[label])
    passed = {label: int(answers[label].split(" passed")[0].split()[-1]) for label in names}
    assert passed == {name: 2 if name == "conversion" else 1 for name in names}

def test_kit_on_the_command_line(there):
    done = shell("tests/make_assignment.py", "out", cwd=there)
    assert done.returncode == 0 and "12 exercises" in done.stdout and (there / "out/tests/EXERCISES.md").exists(), done.stderr
    again = shell("tests/make_assignment.py", "out", cwd=there)
    assert again.returncode == 1 and again.stderr.count("\n") == 1
    assert shell("tests/make_assignment.py", cwd=there).returncode == 2
