"""The assignment kit: nothing but tracked files and no solution in it; empty, every exercise fails in its own words; one put back turns its own
tests green; all back is this repository.  And the grader: points for what is right, nothing for an endless loop, a class in one command."""
import ast
import csv
import json
import multiprocessing
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import grade
import make_assignment
import pytest
from conftest import ROOT, TINY_FLAGS, shell
from make_assignment import DAYS, EXERCISES, NEEDED, answers, choose, find, make, message, mistaken, source, tracked

RUNNER = """
import gc, os, sys, numpy, torch._dynamo, PIL.Image, pytest
gc.freeze()                                               # pytest collects garbage
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
TELLTALES = (r"view_as_complex", r"_foreach_lerp", r"lerp_\(", r"eigvals\(|eigvalsh\(R", r"2020\)\.permutation\(n\)", r"swapped \* sin", r"null \+ w \*",
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
        assert any(re.search(pattern, p.read_text()) for p in [*ROOT.glob("0*.py"), *ROOT.glob("tests/*.py")] if p.name not in ("test_assignment.py", "make_assignment.py")), f"{pattern} finds nothing any more"

def test_the_readme_for_students_names_only_what_is_there(tmp_path):
    make(tmp_path / "out")
    text = (tmp_path / "out/README.md").read_text()
    sections = {re.sub(r"[^a-z0-9 -]", "", line.lower()).replace(" ", "-") for line in re.findall(r"(?m)^#+ (.*)", text)}
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        assert "://" in link or (link[1:] in sections if link.startswith("#") else (tmp_path / "out" / link).is_file()), link
    for name in set(re.findall(r"[\w./-]+\.(?:py|md|txt|npz|sh)\b|\btests/[\w./-]*\w", text)):
        assert (tmp_path / "out" / name).exists(), name
    assert text.count("```") % 2 == 0 and len(text) > 0.6 * len((ROOT / "README.md").read_text())
    assert "## For a course" not in text and "--experiment" not in text and "make_assignment" not in text and "benchmark" not in text
    reading = (tmp_path / "out/tests/EXERCISES.md").read_text()
    for names in re.findall(r'"([^"]+)"', " ".join(day for _, day in DAYS)):
        assert f"**{names}" in text and names in reading, names            # its paragraph is there
    assert DAYS[-1][0] == len(EXERCISES)
    days = dict(re.findall(r"(?m)^\| ([1-5]) \| ([a-z, ]+) \| ", reading))               # each exercise on its day
    assert days == {"1": "crop, mix, conversion", "2": "patchify, rotate, block", "3": "loss, ema, step", "4": "guidance, euler, heun", "5": "frechet, inception"}

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
    for wrong in ("0", "1-99", "1-99999999999999", "7-", "-7", "attention", "", "3-1", "1-2-3"):
        with pytest.raises(ValueError, match="--exercises"):
            choose(wrong)

def test_kit_on_the_command_line(there, capsys):
    done = shell("tests/make_assignment.py", "out", "--exercises", "4-5", cwd=there)
    assert done.returncode == 0 and "2 exercises" in done.stdout and "rotate" in (there / "out/tests/EXERCISES.md").read_text(), done.stderr
    assert "NotImplementedError" not in (there / "out/03_train.py").read_text().replace("OSError, NotImplementedError", "")
    assert make_assignment.main(["out"]) == 1 and capsys.readouterr().err.count("\n") == 1
    assert shell("tests/make_assignment.py", "out", cwd=there).returncode == 1
    for wrong in ([], ["out", "--gradescope", "gs"]):
        with pytest.raises(SystemExit, match="2"):
            make_assignment.main(wrong)
    assert make_assignment.main(["--solutions", "sheet.md", "--exercises", "heun"]) == 0
    assert make_assignment.main(["--solutions", "no/sheet.md", "--exercises", "heun"]) == 1
    assert capsys.readouterr().err.endswith("error: --solutions no/sheet.md: there is no folder no\n")
    sheet = (there / "sheet.md").read_text()
    assert source((ROOT / "04_sample.py").read_text(), "heun_step") in sheet
    assert "- `if False:` for `if t_next == 1:` (2.5 points): heun_step: at t = 1 the velocity is not defined" in sheet
    script = subprocess.run([sys.executable, "02_model.py"], cwd=there / "out", capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert script.returncode == 1 and "Traceback" not in script.stderr and "error: exercise 5, rotate" in script.stderr

# ---- The mistakes of the solution sheet ------------------------------------------------------------------------------
def test_every_mistake_of_the_sheet_can_be_made():
    for e in EXERCISES:
        assert len(e.mistakes) >= 2
        bodies = "\n".join(source((ROOT / e.file).read_text(), function) for function in e.functions)
        for right, wrong in e.mistakes:
            assert right in bodies and wrong != right, (e.name, right)
            ast.parse(mistaken(e, right, wrong))

def test_what_the_tests_say_to_mistakes():
    said = {(right, wrong): answer for (_, right, wrong), answer in answers(choose("mix,step,heun")).items()}
    assert len(said) == 9 and all(share < 1 for share, _ in said.values())
    share, line = said["x - e", "e - x"]
    assert share == pytest.approx(2 / 3) and line == "velocity_target of image 4 and noise 8, at any t; expected [-4.0, -4.0], got [4.0, 4.0]"
    share, line = said["last=index == indices[-1]", "last=True"]
    assert share == pytest.approx(0.9) and "got [True, True, True]" in line            # a part of the step costs its own test only
    share, line = said["(first + second) / 2", "first"]
    assert share == 0.0                                   # Euler's step earns nothing, whatever it asks for

# ---- The grader -------------------------------------------------------------------------------------------------------
def with_body(text, function, body):
    """The source text with another last line, or raise, of this function."""
    node, lines = find(text, function), text.splitlines(keepends=True)
    return "".join(lines[:node.end_lineno - 1] + [body] + lines[node.end_lineno:])

ON_ONE_CPU = """
        n = self.options.batch_size // self.options.micro_batch
        self.optimizer.zero_grad()
        for index in range(n):
            (self.loss(index, *next(feed)) / n).backward()
        self.optimizer.param_groups[0]["lr"] = self.lr(self.step)
        mark_if_not_finite(self, self.gradient_norm())
        self.optimizer.step()
        self.update_ema()
        self.step += 1
"""
ENDLESS = "    while True: __import__('time').sleep(1)\n"

def hand_in(folder, **changed):
    """Write the solved scripts, but for those given as d02_model=text."""
    folder.mkdir(parents=True)
    for name in grade.SCRIPTS:
        (folder / name).write_text(changed.get("d" + name[:-3], (ROOT / name).read_text()))

def pack(archive, folder, top=""):
    with zipfile.ZipFile(archive, "w") as file:
        for path in folder.iterdir():
            file.write(path, top + path.name)

def test_a_class(tmp_path, monkeypatch, capsys):
    chosen, students = choose("mix,step,heun"), tmp_path / "submissions"
    make(tmp_path / "kit", chosen, names=NEEDED)
    empty = {"d" + name[:-3]: (tmp_path / "kit" / name).read_text() for name in grade.SCRIPTS}
    solved = (ROOT / "04_sample.py").read_text()
    hand_in(students / "right")
    hand_in(students / "empty", **empty)
    hand_in(students / "endless", d04_sample=with_body(empty["d04_sample"], "heun_step", ENDLESS))
    hand_in(students / "broken", d04_sample=solved + "\ndef broken(:\n")
    hand_in(students / "printing", d04_sample=solved + "\nwhile True: print('x' * 10**6)\n")
    pack(students / "zipped.zip", students / "right", "assignment/")
    hand_in(students / "deep" / "assignment")
    hand_in(students / "edited", **empty)
    (students / "edited/tests").mkdir()
    (students / "edited/tests/test_exercises.py").write_text("".join(f"def test_exercise_{e.number:02d}_mine(): pass\n" for e in chosen))
    (students / "M\udcfcller.zip").write_text("x")         # a name of another encoding, of a file that cannot be read
    hand_in(students / "missing")
    (students / "missing/03_train.py").unlink()
    (students / "missing/04_sample.py").unlink()
    (students / "damaged.zip").write_bytes((students / "zipped.zip").read_bytes()[:5000])
    hand_in(students / "half", d03_train=with_body(empty["d03_train"], "Trainer.train_step", ON_ONE_CPU),
            d04_sample=with_body(empty["d04_sample"], "heun_step", "    return z + (t_next - t) * velocity(z, t)\n"))
    (students / ".DS_Store").write_text("")
    monkeypatch.chdir(tmp_path)
    assert grade.main(["submissions", "--exercises", "mix,step,heun", "--limit", "6", "--out", "marks"]) == 0
    with open("marks/points.csv", newline="") as file:
        points = {row.pop("name"): {name: float(value) for name, value in row.items()} for row in csv.DictReader(file)}
    full = {"total": 21, "mix": 4, "step": 12, "heun": 5}
    none = dict.fromkeys(full, 0)
    assert points == {
        "right": full, "zipped.zip": full, "deep": full, "empty": none, "edited": none, "damaged.zip": none, "M?ller.zip": none, "endless": full | {"total": 16, "heun": 0},
        "broken": full | {"total": 16, "heun": 0}, "printing": full | {"total": 16, "heun": 0}, "missing": none | {"total": 4, "mix": 4}, "half": {"total": 12.4, "mix": 4, "step": 8.4, "heun": 0}}
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert f"04_sample.py, line {len(solved.splitlines()) + 2}: SyntaxError" in lines["broken"]
    assert "endless loop?" in lines["endless"] and "endless" not in lines["printing"] and "cannot be read: File is not a zip file" in lines["damaged.zip"] and "step, heun" in lines["half"]
    assert lines["right"].split() == ["right", "21", "of", "21"]
    assert {path.name for path in (tmp_path / "marks").iterdir()} == {"points.csv", *(f"{name}.json" for name in points)} - {"M?ller.zip.json"} | {"M\udcfcller.zip.json"}
    assert json.loads((tmp_path / "marks/missing.json").read_text())["tests"][1]["output"] == "03_train.py is missing"
    (tmp_path / "marks/right.json").write_text("mine")    # a foreign file stays
    assert grade.main(["submissions", "--exercises", "euler", "--out", "marks"]) == 1 and (tmp_path / "marks/right.json").read_text() == "mine"
    (tmp_path / "other").mkdir(), (tmp_path / "other/points.csv").write_text("name,total,remark\n")
    assert grade.main(["submissions", "--exercises", "euler", "--out", "other"]) == 1 and "remark" in (tmp_path / "other/points.csv").read_text()
    capsys.readouterr()
    assert grade.main(["submissions", "--exercises", "euler", "--out", "submissions"]) == 1
    assert capsys.readouterr().err.endswith("error: --out submissions: there lie the submissions, give another folder\n") and not (students / "points.csv").exists()

def test_one_submission(tmp_path, monkeypatch, capsys):
    chosen, text = "mix,guidance,euler,heun", (ROOT / "04_sample.py").read_text()
    text = text.replace("    low, high = interval\n", "    low, high = interval\n    if low: raise KeyboardInterrupt\n")        # after the first test has passed
    text = with_body(text, "euler_step", "    import pytest; pytest.xfail()\n")
    text = with_body(text, "heun_step", "    import os; os._exit(0)\n")
    hand_in(tmp_path / "work", d04_sample=text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")                        # git is not needed
    assert grade.main(["work", "--exercises", chosen]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert {test["name"]: test["score"] for test in results["tests"]} == {"mix": 4, "guidance": 0, "euler": 0, "heun": 0}, results        # skipped is not passed
    assert "exit code 2" in results["tests"][1]["output"] and "exit code 0" in results["tests"][3]["output"]
    # the fields that Gradescope documents, with their types
    assert set(results) == {"score", "execution_time", "tests"} and results["score"] == 4 and isinstance(results["execution_time"], int)
    for test in results["tests"]:
        assert set(test) == {"number", "name", "score", "max_score", "status", "output"}
        assert test["status"] in ("passed", "failed") and isinstance(test["number"], str) and 0 <= test["score"] <= test["max_score"]
    assert "4 of 21 points" in capsys.readouterr().out
    hand_in(tmp_path / "deep/assignment")                 # one student's, as the name NAME.json says, and our own file is replaced
    assert grade.main(["deep", "--exercises", "mix", "--out", "results.json"]) == 0
    assert json.loads((tmp_path / "results.json").read_text())["score"] == 4
    for wrong in (["nowhere"], ["deep", "--limit", "-1"], ["deep", "--out", "nodir/r.json"], ["deep", "--exercises", "0"], ["work", "--out", "work/02_model.py"]):
        assert grade.main(wrong) == (1 if "work/02_model.py" in wrong else 2) and capsys.readouterr().err.count("\n") == 1, wrong
    assert grade.main(["work/02_model.py"]) == 2 and "give the folder in which it lies" in capsys.readouterr().err
    assert make_assignment.main(["new", "--exercises", "20"]) == 2 and not Path("new").exists()
    with pytest.raises(SystemExit, match="2"):
        grade.main([])

def test_reading_a_script(tmp_path):
    read = lambda path, name="02_model.py": grade.read_script(path, name)
    hand_in(tmp_path / "ada/old")
    pack(tmp_path / "flat.zip", tmp_path / "ada/old")
    (tmp_path / "moodle").mkdir()
    pack(tmp_path / "moodle/work.zip", tmp_path / "ada/old", "work\\")    # as some Windows programs pack
    right = (ROOT / "02_model.py").read_bytes()
    assert read(tmp_path / "flat.zip") == read(tmp_path / "moodle") == read(tmp_path / "ada") == right
    hand_in(tmp_path / "ada/new", d02_model="x" * (grade.LARGEST + 1))
    locked = bytearray((tmp_path / "flat.zip").read_bytes())
    locked[locked.rindex(b"PK\1\2") + 8] |= 1             # says that its last file is encrypted
    (tmp_path / "locked.zip").write_bytes(locked)
    last = zipfile.ZipFile(tmp_path / "flat.zip").namelist()[-1]
    for path, name, words in ((tmp_path / "ada", "02_model.py", "more than once: new/02_model.py, old/02_model.py"), (tmp_path / "ada/new", "02_model.py", "larger"),
                              (tmp_path / "locked.zip", last, "locked.zip cannot be read: .*encrypted"), (tmp_path / "flat.zip", "06.py", "06.py is missing")):
        with pytest.raises(ValueError, match=words):
            read(path, name)

def test_the_grader_leaves_no_process_behind(tmp_path):
    make(tmp_path / "kit", choose("heun"), names=NEEDED)
    hand_in(tmp_path / "endless", d04_sample=with_body((tmp_path / "kit/04_sample.py").read_text(), "heun_step", ENDLESS))
    going = grade.run([(tmp_path / "endless", choose("heun")[0]), (tmp_path / "nowhere", choose("heun")[0])], tmp_path / "kit", 60.0)
    assert next(going)[0][0].name == "nowhere" and len(multiprocessing.active_children()) == 1
    going.close()                                         # as Ctrl-C does
    left = multiprocessing.active_children()
    for process in left:
        process.kill()                                    # else pytest would wait for it
    assert not left

def test_gradescope(tmp_path):
    place = tmp_path / "autograder"
    assert shell("tests/make_assignment.py", "--gradescope", place / "source", "--exercises", "2", cwd=tmp_path).returncode == 0
    assert all(os.access(place / "source" / name, os.X_OK) for name in ("setup.sh", "run_autograder"))
    (place / "results").mkdir()
    hand_in(place / "submission" / "deep")
    (place / "venv").symlink_to(sys.prefix)               # what setup.sh makes
    script = place / "source/run_autograder"
    script.write_text(script.read_text().replace("/autograder/", f"{place}/"))
    done = subprocess.run([script], cwd="/", capture_output=True, text=True)
    assert json.loads((place / "results/results.json").read_text())["score"] == 4, done.stderr

def run_without_a_head(command, cwd, **_):
    """In place of subprocess.run: what 03_train.py writes when SETTINGS name no head."""
    folder = Path(cwd) / "runs" / "seeing"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "log.csv").write_text("step,aux\n50,0.0\n")
    return subprocess.CompletedProcess(command, 0)

def test_a_head_is_judged(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(grade, "PACK", ["--size", "16", "--count", "200", "--workers", "1"])
    monkeypatch.setattr(grade, "TRAIN", [*TINY_FLAGS, "--steps", "100", "--lr", "6e-3"])
    sees, blind = grade.judge(ROOT / "tests/experiments/mean_colour.py")
    assert 0.1 < sees < 0.75 * blind < 0.3                # the variance of a patch's mean colour here is about 0.2
    with monkeypatch.context() as patch:
        (tmp_path / "my_ffn.py").write_text("SETTINGS = {'ffn': 'bottleneck'}")
        patch.setattr(grade.subprocess, "run", run_without_a_head)
        with pytest.raises(ValueError, match="my_ffn.py: the column aux of the log is 0"):
            grade.judge(tmp_path / "my_ffn.py")
    for numbers, code, word in (((0.3, 1.0), 0, "accepted"), ((0.4, 1.0), 1, "not accepted"), ((0.0, 0.0), 1, "not accepted")):
        monkeypatch.setattr(grade, "judge", lambda head: numbers)
        assert grade.main(["--head", "my_head.py"]) == code and f": {word}: " in capsys.readouterr().out

def test_marks_are_not_written_through_a_link(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "a.json.jit-part").symlink_to("thesis.txt")
    grade.write(tmp_path / "a.json", {})
    assert (tmp_path / "thesis.txt").read_text() == "mine" and (tmp_path / "a.json").read_text() == "{}"

def test_a_full_disk_loses_no_points(tmp_path, monkeypatch, capsys):
    test = {"number": "2", "name": "mix", "score": 4, "max_score": 4, "status": "passed", "output": ""}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(grade, "grade", lambda submissions, *_: [(submission, {"score": 4, "execution_time": 1, "tests": [test]}) for submission in submissions])
    monkeypatch.setattr(grade.json, "dumps", lambda *_, **more: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    for name in ("ada", "class/bob", "class/eve"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "ada/02_model.py").write_text("")
    assert grade.main(["ada", "--exercises", "mix"]) == 1
    said = capsys.readouterr()
    assert "4 of 4 points" in said.out and "No space left" in said.err and not list(tmp_path.glob("*.json*"))
    assert grade.main(["class", "--exercises", "mix", "--out", "marks"]) == 1
    said = capsys.readouterr()
    assert "bob" in said.out and "eve" in said.out and "No space left" in said.err
    assert [path.name for path in (tmp_path / "marks").iterdir()] == ["points.csv"] and (tmp_path / "marks/points.csv").read_text().count(",4") == 4

def test_an_assignment_is_whole_or_not_there(tmp_path, monkeypatch, capsys):
    copied, copy = [], make_assignment.shutil.copy
    def full(old, new):
        copied.append(new)
        if len(copied) > 3:
            raise KeyboardInterrupt if len(copied) > 4 else OSError(28, "No space left on device")
        copy(old, new)
    monkeypatch.setattr(make_assignment.shutil, "copy", full)
    for code, said in ((1, "No space left"), (130, "make_assignment.py: stopped")):
        assert make_assignment.main([str(tmp_path / "out")]) == code and said in capsys.readouterr().err and not list(tmp_path.iterdir())

def test_a_script_that_python_does_not_start_has_no_points(tmp_path):
    """Imported, a letter of another encoding in a comment passes."""
    for text, good in ((b"# \xe9\n", False), (b"# coding: latin-1\n# \xe9\n", True), ("# é\n".encode(), True), (b"# coding: none\n", False), (b"# coding: hex\n", False)):
        (tmp_path / "01_data.py").write_bytes(text)
        if good:
            assert grade.read_script(tmp_path, "01_data.py") == text
        else:
            with pytest.raises(ValueError, match="01_data.py is not a text that Python reads"):
                grade.read_script(tmp_path, "01_data.py")

def test_a_disk_that_is_full_is_nobodys_mistake(tmp_path, monkeypatch):
    assert grade.read_report(tmp_path, "02_model.py", 1)[0] == 0
    monkeypatch.setattr(grade.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    with pytest.raises(OSError, match="No space left"):
        grade.read_report(tmp_path, "02_model.py", 1)
