"""Grade one submission of the assignment that make_assignment.py hands out.

python tests/grade.py SUBMISSION [--exercises 1-6] [--limit 60] [--out results.json]

SUBMISSION is a student's folder; only its five scripts are read, whatever else it holds, tests included, is ignored.
Each exercise is run by itself: the original assignment, with the student's version of that one script, under the
original tests, with a limit in seconds.  So an endless loop costs one exercise, and a syntax error one script.  An
exercise's points are shared among its tests.  Prints the points and writes results.json in the form that Gradescope
reads.  It runs the student's code: use a container.  It is not proof against code that is written to deceive it.
"""
import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ET
from contextlib import suppress
from pathlib import Path

from make_assignment import EXERCISES, NEEDED, choose, make

def run_tests(kit, exercise, limit):
    """Run the exercise's tests in the folder.  Returns (share that passed, what is wrong)."""
    report = kit / "report.xml"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", f"--junitxml={report.name}",
               "-k", f"exercise_{exercise.number:02d}_", "tests/test_exercises.py"]
    with open(kit / "output.txt", "w+", errors="replace") as output:
        process = subprocess.Popen(command, cwd=kit, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True,
                                   env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"})
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            return 0.0, f"stopped after {limit:g} seconds: is there an endless loop?"
        finally:
            with suppress(ProcessLookupError, PermissionError):            # nothing is left; macOS says it the second way
                os.killpg(process.pid, signal.SIGKILL)                     # and whatever it has started
            process.wait()
        output.seek(0)
        errors = [line for line in output.read()[-20000:].splitlines() if line.startswith("E  ")]
    if process.returncode not in (0, 1) or not report.exists():            # 1: some failed; anything else: it did not get that far
        return 0.0, errors[-1][1:].strip() if errors else f"the tests did not come to an end (exit code {process.returncode})"
    cases = list(ET.parse(report).getroot().iter("testcase"))
    wrong = [(bad.get("message") or bad.tag).splitlines()[0] for case in cases for bad in case if bad.tag in ("failure", "error", "skipped")]     # no test skips
    return (1 - len(wrong) / len(cases), "\n".join(dict.fromkeys(wrong))) if cases else (0.0, "no test was run")

def grade(submission, exercises=EXERCISES, limit=60.0):
    """Grade a folder.  Returns what results.json holds; the field names are Gradescope's."""
    start, tests = time.time(), []
    with tempfile.TemporaryDirectory() as temporary:
        kit = Path(temporary) / "kit"
        make(kit, exercises, names=NEEDED)
        for exercise in exercises:
            script = kit / exercise.file
            original = script.read_bytes()
            try:
                script.write_bytes((submission / exercise.file).read_bytes())
                share, wrong = run_tests(kit, exercise, limit)
            except OSError:
                share, wrong = 0.0, f"{exercise.file} is missing"
            script.write_bytes(original)
            tests.append({"number": str(exercise.number), "name": exercise.name, "score": round(exercise.points * share, 2), "max_score": exercise.points,
                          "status": "passed" if share == 1 else "failed", "output": wrong})
    return {"score": round(sum(test["score"] for test in tests), 2), "execution_time": round(time.time() - start), "tests": tests}

def main(arguments):
    parser = argparse.ArgumentParser(prog="grade.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("submission", type=Path, help="the student's folder")
    parser.add_argument("--exercises", default=f"1-{len(EXERCISES)}", help="the ones handed out (default: all)")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for each exercise, at least 1 (default: 60)")
    parser.add_argument("--out", type=Path, default=Path("results.json"), help="default: results.json")
    options = parser.parse_args(arguments)
    try:
        if not options.submission.is_dir():
            raise ValueError(f"{options.submission} is not a folder")
        if importlib.util.find_spec("pytest") is None:
            raise ValueError("pytest is missing: pip install -r requirements.txt -r tests/requirements.txt")
        if not options.limit >= 1:
            raise ValueError(f"--limit {options.limit:g}: give seconds, at least 1")
        if not options.out.parent.is_dir():
            raise ValueError(f"--out {options.out}: there is no folder {options.out.parent}")
        results = grade(options.submission, choose(options.exercises), options.limit)
        part = options.out.with_name(options.out.name + ".part")
        part.write_text(json.dumps(results, indent=1))
        os.replace(part, options.out)
    except (ValueError, OSError) as error:
        return print(f"grade.py: error: {error}", file=sys.stderr) or 1
    for test in results["tests"]:
        print(f"{test['number']:>2} {test['name']:<11}{test['score']:>6g} of {test['max_score']:>2}   {test['output']}".replace("\n", "\n" + " " * 25).rstrip())
    print(f"{results['score']:g} of {sum(test['max_score'] for test in results['tests'])} points: {options.out}")
    return 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
