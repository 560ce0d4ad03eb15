"""Grade the assignment that make_assignment.py hands out: one submission, or a class of them.

python tests/grade.py ada                        a student's folder or zip file: prints the points, writes results.json
python tests/grade.py submissions --out marks    a folder of such folders and zip files: a line each, marks/points.csv, marks/NAME.json
python tests/grade.py --head my_head.py          the open exercise: is this auxiliary head accepted?

Only the five scripts of a submission are read, on top or one folder down; whatever else it holds, tests included, is
ignored, and a zip is never unpacked.  Each exercise is a process of its own: the original assignment, with the student's
version of that one script, under the original tests, with a limit in seconds.  So an endless loop costs one exercise, and
a syntax error one script.  These processes are forks of one that has imported torch, four at a time.  An exercise's
points are shared among its tests.  The .json files are Gradescope's results.json.  A file that lies where one is to be
written is replaced only if grade.py wrote it.  It runs the students' code: use a container.  It is not proof against code
that is written to deceive it.
"""
import argparse
import csv
import errno
import gc
import importlib.util
import io
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tokenize
import xml.etree.ElementTree as ET
import zipfile
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

from make_assignment import EXERCISES, NEEDED, ROOT, choose, make

SCRIPTS = sorted({exercise.file for exercise in EXERCISES})
AT_ONCE, LARGEST = 4, 2**20                               # processes; bytes of a script
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch._dynamo", "pytest", "PIL.Image", "tqdm"])             # imported once, for all exercises

# ---- One exercise of one submission ----------------------------------------------------------------------------------
def read_script(submission, name):
    """The bytes of a student's script, from a folder, or from a zip file, which may hold anything.  Raises ValueError."""
    with ExitStack() as stack:
        try:
            files = {path.relative_to(submission).as_posix(): path for path in [submission / name, *submission.glob(f"*/{name}")] if path.is_file()}
            zips, opened = [submission] if submission.is_file() else [*submission.glob("*.zip")], partial(open, mode="rb")
            if not files and len(zips) == 1:
                archive = stack.enter_context(zipfile.ZipFile(zips[0]))
                files, opened = {info.filename.replace("\\", "/"): info for info in archive.infolist()}, archive.open
            found = [place for place in files if place == name] or sorted(place for place in files if re.fullmatch(f"[^/]+/{name}", place))
            text = stack.enter_context(opened(files[found[0]])).read(LARGEST + 1) if len(found) == 1 else b""
        except Exception as error:                        # a damaged zip raises many kinds
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ValueError(f"{submission.name} cannot be read: {reason}")
    if len(found) != 1:
        raise ValueError(f"{name} is there more than once: {', '.join(found)}" if found else f"{name} is missing")
    if len(text) > LARGEST:
        raise ValueError(f"{name} is larger than {LARGEST} bytes")
    try:
        text.decode(tokenize.detect_encoding(io.BytesIO(text).readline)[0])
    except (SyntaxError, LookupError, UnicodeError) as error:
        raise ValueError(f"{name} is not a text that Python reads: {error}")
    return text

def run_tests(place, number):
    """A process of its own: the tests of an exercise in the folder `place`, where they leave output.txt and report.xml."""
    os.setsid()                                           # whatever it starts can be ended with it
    resource.setrlimit(resource.RLIMIT_FSIZE, (10**8, 10**8))              # endless printing fills no disk
    try:
        os.chdir(place)
        output = os.open("output.txt", os.O_WRONLY | os.O_CREAT)
    except FileNotFoundError:                             # grade.py was stopped in starting this process
        os._exit(1)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.dont_write_bytecode = True
    gc.freeze()                                           # pytest collects garbage; torch's objects, 300,000, are none
    import pytest
    os._exit(pytest.main(["-q", "--tb=short", "-p", "no:cacheprovider", "--junitxml=report.xml", "-k", f"exercise_{number:02d}_", "tests/test_exercises.py"]))

def read_report(place, file, code):
    """(share of the tests that passed, what is wrong) of what run_tests() left, whose exit code was `code`."""
    cases, output = [], ""
    with suppress(OSError, ET.ParseError):
        output = (place / "output.txt").read_text(errors="replace")[-20000:]
        cases = list(ET.parse(place / "report.xml").getroot().iter("testcase"))
    if cases and code in (0, 1):                          # 1: some failed; anything else: it did not get that far
        wrong = [(bad.get("message") or bad.tag).removeprefix("Failed: ").partition("\n")[0] for case in cases for bad in case if bad.tag in ("failure", "error", "skipped")]     # no test skips
        return 1 - len(wrong) / len(cases), "\n".join(dict.fromkeys(wrong))
    errors = [line[1:].strip() for line in output.splitlines() if line.startswith("E  ")]
    lines = re.findall(f'{re.escape(file)}(?::|", line )([0-9]+)', output)
    if not errors and shutil.disk_usage(place).free < 10**6:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(place))  # that is not the student's fault
    if not errors:
        return 0.0, f"the tests did not come to an end (exit code {code})"
    return 0.0, f"{file}, line {lines[-1]}: {errors[-1]}" if lines else f"{file}: {errors[-1]}"

def run(jobs, kit, limit):
    """Run jobs, pairs (submission, exercise), in copies of the folder `kit`.  Yields (job, share, what is wrong, seconds) as they end."""
    waiting, running = list(reversed(jobs)), {}
    try:
        while waiting or running:
            while waiting and len(running) < AT_ONCE:
                job = submission, exercise = waiting.pop()
                place = Path(tempfile.mkdtemp(dir=kit.parent))
                shutil.copytree(kit, place, dirs_exist_ok=True)
                try:
                    (place / exercise.file).write_bytes(read_script(submission, exercise.file))
                except ValueError as error:
                    yield job, 0.0, str(error), 0.0
                    continue
                process = FORKS.Process(target=run_tests, args=(place, exercise.number))
                process.start()
                running[process] = job, place, time.monotonic()
            wait([process.sentinel for process in running], 0.1)
            for process, (job, place, start) in [*running.items()]:
                seconds = time.monotonic() - start
                if process.exitcode is not None or seconds > limit:
                    stopped = process.exitcode is None
                    end(process)
                    del running[process]
                    share, wrong = (0.0, f"stopped after {limit:g} seconds: is there an endless loop?") if stopped else read_report(place, job[1].file, process.exitcode)
                    yield job, share, wrong, seconds
                    shutil.rmtree(place, ignore_errors=True)
    finally:
        for process in running:
            end(process)

def end(process):
    """Kill it and whatever it has started."""
    with suppress(ProcessLookupError, PermissionError):                    # nothing is left; macOS says it the second way
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()                                        # if it has only just begun and leads no group yet
    process.join()

def grade(submissions, exercises=EXERCISES, limit=60.0):
    """Yield (submission, what its results.json holds) of each folder or zip file, as they end; the field names are Gradescope's."""
    done = {submission: [] for submission in submissions}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        kit = Path(temporary) / "kit"
        make(kit, exercises, names=NEEDED)
        for (submission, exercise), *result in run([(submission, exercise) for submission in submissions for exercise in exercises], kit, limit):
            done[submission].append((exercise, *result))
            if len(done[submission]) == len(exercises):
                rows = sorted(done[submission])
                tests = [{"number": str(exercise.number), "name": exercise.name, "score": round(exercise.points * share, 2), "max_score": exercise.points,
                          "status": "passed" if share == 1 else "failed", "output": wrong} for exercise, share, wrong, _ in rows]
                yield submission, {"score": round(sum(test["score"] for test in tests), 2), "execution_time": round(sum(row[-1] for row in rows)), "tests": tests}

# ---- An auxiliary head of one's own ----------------------------------------------------------------------------------
BLIND = """from importlib import import_module

import torch

model = import_module("02_model")
for name, Head in list(model.AUX_HEADS.items()):
    class Blind(Head):
        def forward(self, tokens):
            return super().forward(torch.zeros_like(tokens))
    model.AUX_HEADS[name] = Blind
SETTINGS = {}
"""
PACK, TRAIN = [], ["--steps", "500", "--preview-every", "0", "--snapshots", "0"]           # flags of 01 and 03

def judge(head):
    """Train with a head, and with one that sees zeros only: (lowest loss of the one, of the other).  Raises ValueError, OSError."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        shutil.copy(head, Path(temporary) / "my_head.py")
        (Path(temporary) / "blind.py").write_text(BLIND)
        def script(name, *flags):
            done = subprocess.run([sys.executable, ROOT / name, *flags], cwd=temporary, stdin=subprocess.DEVNULL, capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"{head}: {(done.stderr.strip() or 'it was killed').splitlines()[-1]}")
        def lowest(experiment, run):
            script("03_train.py", "--experiment", experiment, "--run", run, *TRAIN)
            with open(Path(temporary) / "runs" / run / "log.csv", newline="") as file:
                return min(float(row["aux"]) for row in csv.DictReader(file))
        script("01_data.py", *PACK)
        sees = lowest("my_head.py", "seeing")
        if not sees:
            raise ValueError(f"{head}: the column aux of the log is 0: does SETTINGS name a head, as {{'aux': 'mine'}}?")
        return sees, lowest("my_head.py,blind.py", "blind")

# ---- Running it ------------------------------------------------------------------------------------------------------
def check_place(path):
    """Raise ValueError if something lies at `path` that grade.py did not write: its .json begin with the score, its list names exercises.

    Raises OSError if nothing can be written there: better now than after the grading.
    """
    text = path.read_text(errors="replace") if path.is_file() else ""
    head = text.partition("\n")[0].split(",")
    ours = text.startswith('{\n "score": ') or head[:2] == ["name", "total"] and {*head[2:]} & {exercise.name for exercise in EXERCISES}
    if path.exists() and not ours:
        raise ValueError(f"{path} is there, and grade.py did not write it: give another --out")
    with whole(path, replace=False):
        pass

@contextmanager
def whole(path, replace=True):
    """with whole(path) as file: write a text, which then takes its place; never half of it."""
    part = path.with_name(path.name + ".jit-part")
    part.unlink(missing_ok=True)                          # if it is a link, what it leads to is not ours
    try:
        with open(part, "w", newline="") as file:
            yield file
        if replace:
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)

def write(path, results):
    with whole(path) as file:
        file.write(json.dumps(results, indent=1))

def grade_one(submission, exercises, limit, out):
    """Print the points of one submission and write results.json."""
    check_place(out)
    [(_, results)] = grade([submission], exercises, limit)
    try:
        show(results, exercises, out)
    finally:                                              # whichever of the two fails, a full disk, say, the other is done
        write(out, results)

def show(results, exercises, out):
    for test in results["tests"]:
        print(f"{test['number']:>2} {test['name']:<11}{test['score']:>6g} of {test['max_score']:>2}   {test['output']}".replace("\n", "\n" + " " * 25).rstrip())
    print(f"{results['score']:g} of {sum(exercise.points for exercise in exercises)} points: {out}", flush=True)

def grade_class(folder, exercises, limit, out):
    """Print a line for each submission in the folder, and write a .json each and points.csv to the folder `out`."""
    submissions = [path for path in sorted(folder.iterdir()) if not path.name.startswith((".", "__MACOSX")) and os.path.realpath(path) != os.path.realpath(out)]
    if not submissions:
        raise ValueError(f"{folder} holds neither scripts nor submissions")
    if os.path.realpath(out) == os.path.realpath(folder):
        raise ValueError(f"--out {out}: there lie the submissions, give another folder")
    out.mkdir(exist_ok=True)
    for name in ("points.csv", *(f"{path.name}.json" for path in submissions)):
        check_place(out / name)
    rows, lost = [], None
    for submission, results in grade(submissions, exercises, limit):
        name = submission.name.encode(errors="replace").decode()           # letters of another encoding
        rows.append([name, results["score"], *(test["score"] for test in results["tests"])])
        failed = {test["name"]: test["output"] for test in results["tests"] if test["status"] == "failed"}
        said = set(failed.values())
        reason = said.pop().partition("\n")[0] if len(said) == 1 else ", ".join(failed)
        line = f"{name:<24}{results['score']:>6g} of {sum(exercise.points for exercise in exercises)}   {reason}".rstrip()
        print(line.encode(errors="replace").decode(), flush=True)
        try:
            write(out / f"{submission.name}.json", results)
        except OSError as error:                          # a full disk, say: the others are graded, and shown, all the same
            lost = error
    with whole(out / "points.csv") as file:
        csv.writer(file).writerows([["name", "total", *(exercise.name for exercise in exercises)], *sorted(rows)])
    if lost:
        raise lost
    print(f"{len(rows)} submissions: {out / 'points.csv'}")

def main(arguments):
    parser = argparse.ArgumentParser(prog="grade.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("submission", nargs="?", type=Path, help="a folder or zip file with a student's scripts, or a folder of those")
    parser.add_argument("--exercises", default=f"1-{len(EXERCISES)}", help="the ones handed out (default: all)")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for each exercise, at least 1 (default: 60)")
    parser.add_argument("--out", type=Path, help="a file NAME.json: SUBMISSION is one student's; a class: a folder (default: results.json, results)")
    parser.add_argument("--head", type=Path, metavar="FILE", help="judge this experiment file instead")
    options = parser.parse_args(arguments)
    if (options.submission is None) == (options.head is None):
        parser.error("give either SUBMISSION or --head FILE")
    code = 1
    try:
        if options.head:
            sees, blind = judge(options.head)
            accepted = sees < blind / 3
            print(f"{options.head}: {'accepted' if accepted else 'not accepted'}: aux fell to {sees:.4g}; with a head that sees nothing to {blind:.4g}, a third of which is {blind / 3:.4g}")
            return 0 if accepted else 1
        code = 2                                          # of a wrong argument
        submission, exercises = options.submission, choose(options.exercises)
        if not submission.exists():
            raise ValueError(f"there is no {submission}")
        if submission.suffix == ".py":
            raise ValueError(f"{submission} is one script: give the folder in which it lies")
        if importlib.util.find_spec("pytest") is None:
            raise ValueError("pytest is missing: pip install -r requirements.txt -r tests/requirements.txt")
        if not options.limit >= 1:
            raise ValueError(f"--limit {options.limit:g}: give seconds, at least 1")
        if options.out and not options.out.parent.is_dir():
            raise ValueError(f"--out {options.out}: there is no folder {options.out.parent}")
        code = 1
        if submission.is_file() or options.out and options.out.suffix == ".json" or any((submission / name).is_file() for name in SCRIPTS):
            grade_one(submission, exercises, options.limit, options.out or Path("results.json"))
        else:
            grade_class(submission, exercises, options.limit, options.out or Path("results"))
    except (ValueError, OSError) as error:
        return print(f"grade.py: error: {error}", file=sys.stderr) or code
    except KeyboardInterrupt:
        return print("grade.py: stopped", file=sys.stderr) or 130
    return 0

if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:    # as nohup has it
            signal.signal(number, signal.default_int_handler)              # as Ctrl-C, which leaves no process behind
    sys.exit(main(sys.argv[1:]))
