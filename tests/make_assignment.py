"""A week's assignment from this repository: the same code with the bodies of some functions taken out.

python tests/make_assignment.py OUT                                 the folder for students: all exercises below
python tests/make_assignment.py OUT --exercises 1-6,guidance        some of them, by number or name; the others are solved there
python tests/make_assignment.py --solutions solutions.md            the solution sheet, for teachers, with usual mistakes: ten seconds
python tests/make_assignment.py --gradescope autograder             what Gradescope wants: zip the contents of this folder
python tests/grade.py SUBMISSION                                    points, and the results.json that Gradescope reads

In OUT a student fills the functions in, in any order, and asks  python -m pytest -q --tb=short -rN tests/test_exercises.py
what is missing or wrong.  Only files that git tracks are copied, and of tests/ only what a student needs: the other
tests hold second implementations.  README.md loses what is about files that are not there.  The working code carries no
markers: an exercise is found by its functions' names.
With a part, hand out mix with conversion and euler with heun: each shows the other's answer.
"""
import argparse
import ast
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
NEEDED = (*sorted(path.name for path in ROOT.glob("0?_*.py")), "tests/test_exercises.py", "tests/conftest.py")     # to run the tests
HANDED_OUT = (*NEEDED, "tests/requirements.txt", "README.md", "requirements.txt", ".gitignore")                    # and .github/
GRADER = (*NEEDED, "tests/grade.py", "tests/make_assignment.py", "tests/requirements.txt", "requirements.txt")
CUT = ("## An idea of your own", "## Recipes", "## For a course", "### Speed")         # sections of README.md that students do not get

class Exercise(NamedTuple):
    number: int
    name: str
    file: str
    functions: tuple
    points: int
    minutes: int
    task: str
    mistakes: tuple                # usual ones, as pairs: what stands in the solution, what stands there by mistake
    hide: tuple = ()               # phrases of the docstrings that are the answer

EXERCISES = [Exercise(number, *row) for number, row in enumerate([
    ("crop", "01_data.py", ("center_crop",), 6, 30,
     "ADM's centre crop: halve with BOX while both sides stay at least `size`, BICUBIC to the short side, cut the centre; RGB",
     ((">= 2 * size", "> 2 * size"), ('image = image.convert("RGB")', ""))),
    ("mix", "02_model.py", ("mix", "velocity_target"), 4, 20,
     "the noised image, and its derivative by time; expand, below, makes one number per image fit a batch",
     (("t * x + (1 - t) * e", "(1 - t) * x + t * e"), ("x - e", "e - x")),
     (" z = t x + (1-t) e,", " v = x - e,")),
    ("conversion", "02_model.py", ("conversion",), 12, 60,
     "mix and velocity_target are two linear equations: solve them for what is asked; clamp denominators that vanish",
     (("(1 - t).clamp_min(t_eps)", "1 - t"), ("(-t, one)", "(t, one)")),
     ("  For x to v that weight is 1 / (1-t)^2.",)),
    ("patchify", "02_model.py", ("patchify",), 5, 20,
     "cut an image into square patches, row by row; inside a patch the channels come last; unpatchify, below it, is the way back",
     (("permute(0, 2, 4, 3, 5, 1)", "permute(0, 2, 4, 1, 3, 5)"), ("H // p, p, W // p, p)", "p, H // p, p, W // p)"))),
    ("rotate", "02_model.py", ("rotate",), 9, 40,
     "the rotary embedding: a 2-D rotation of each pair of adjacent channels; the table of sines has its signs already",
     (("sin[..., 1::2]", "sin[..., ::2]"), ("x.float().unflatten(-1, (-1, 2))", "x.float().unflatten(-1, (2, -1)).mT.contiguous()")),
     (": (x0 cos - x1 sin, x1 cos + x0 sin)",)),
    ("block", "02_model.py", ("Block.forward",), 9, 40,
     "six signals from adaLN_modulation(c): shift, scale, gate for norm1 and attention (rope goes there; dropout on its output), then for norm2 and the FFN",
     (("shift1, scale1, gate1, shift2, scale2, gate2 =", "scale1, shift1, gate1, scale2, shift2, gate2 ="), ("gate1 * ", ""))),
    ("loss", "03_train.py", ("diffusion_loss", "grid_loss"), 9, 40,
     "JiT's loss of each image; and the same for any prediction, space and path: model.PATHS[config.path] has velocity_target and conversion",
     (("v = (x - z) / time_left", "v = (x - z) / model.expand(1 - t, x)"), ("u**2", "u")),
     ("\n\n    By the book: convert prediction and truth, square the difference.  With to = u * value + b * z that is\n"
      "    (u out + b z - (u truth + b z))^2 = u^2 (out - truth)^2: z drops out, and the space is a weight over t.",)),
    ("ema", "03_train.py", ("Trainer.update_ema",), 5, 20,
     "move every average of self.ema towards self.weights, in place; both are dicts of tensors, and self.options.ema lists the decays",
     ((", 1 - decay)", ", decay)"), ("zip(self.options.ema, self.ema)", "zip(self.options.ema[:1] * 2, self.ema)")),
     (": ema += (1 - decay) (weights - ema)",)),
    ("step", "03_train.py", ("Trainer.train_step",), 12, 60,
     "one optimizer step, from loss to EMA: for every index of self.indices() take a pair from the feed and ask self.loss, forward and backward inside "
     "`with self.summing(last)`; then scaler (a GradScaler), lr, gradient_norm, mark_if_not_finite(self, norm) of this module, and update_ema",
     ((" / len(indices)", ""), ("self.optimizer.zero_grad()", ""), ("self.scaler.unscale_(self.optimizer)", ""), ("last=index == indices[-1]", "last=True"))),
    ("guidance", "04_sample.py", ("guided",), 9, 40,
     "combine what predict() says with and without class; leave out the pass that is not needed",
     (("v_null + w * (v_class - v_null)", "v_class + w * (v_class - v_null)"), ("low == 0 or ", "")),
     (", v_null + w (v_class - v_null)",)),
    ("euler", "04_sample.py", ("euler_step",), 3, 10, "one step along the velocity",
     (("(t_next - t)", "t_next"), ("velocity(z, t)", "velocity(z, t_next)")),
     (", z + (t_next - t) velocity(z, t)",)),
    ("heun", "04_sample.py", ("heun_step",), 5, 20, "look ahead with Euler, then go with the mean of the two velocities; the last step, to t_next = 1, is Euler's",
     (("velocity(ahead, t_next)", "velocity(z, t_next)"), ("if t_next == 1:", "if False:"), ("(first + second) / 2", "first"))),
    ("frechet", "05_eval.py", ("frechet_distance",), 7, 45, "the distance between two Gaussians; mind covariances that are singular",
     (("- 2 * trace_of_root", "- trace_of_root"), ("squares.clamp_min(0)", "squares")),
     ("  The root's trace is the sum of the roots of the eigenvalues of R sigma2 R, R R = sigma1:\n"
      "    symmetric, so two eigenvalue problems replace a general matrix root, and singular covariances do no harm.",)),
    ("inception", "05_eval.py", ("inception_score",), 5, 30, "the score of each of ten equal parts of the shuffled images; mean and std of these",
     (("kl.mean().exp()", "kl.exp().mean()"), ("[shuffle]", ""))),
], 1)]

DAYS = [          # the last exercise of each day of a week, and what to read before its exercises; names in quotes are README's
    (3, "README, \"Noise and data\" to \"Three questions, one answer\"; `01_data.py` as far as its line `first reading ends here`, and the head of `02_model.py`"),
    (6, "README, \"The network\" to \"Positions, twice\"; `02_model.py` as far as that line"),
    (9, "README, \"Why x, then?\" and \"The average of the weights\"; `03_train.py` as far as that line, and the section behind it"),
    (12, "README, \"Guidance, and where\" to \"The clamp\"; `04_sample.py` as far as that line"),
    (14, "README, \"How good is it?\"; `05_eval.py` as far as that line"),
]

SETUP = """#!/usr/bin/env bash
set -e
apt-get update && apt-get install -y python3 python3-venv
python3 -m venv /autograder/venv
/autograder/venv/bin/pip install -r /autograder/source/requirements.txt -r /autograder/source/tests/requirements.txt
"""
RUN = """#!/usr/bin/env bash
/autograder/venv/bin/python /autograder/source/tests/grade.py /autograder/submission --exercises {numbers} --out /autograder/results/results.json
"""

def choose(text):
    """"1-6,guidance" -> the exercises meant, in order.  Raises ValueError."""
    chosen, names = set(), [exercise.name for exercise in EXERCISES]
    for part in text.replace(" ", "").split(","):
        span = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        numbers = [names.index(part) + 1] if part in names else range(int(span[1]), int(span[2] or span[1]) + 1) if span else []
        if not numbers or not 1 <= numbers[0] <= numbers[-1] <= len(names):
            raise ValueError(f"--exercises: {part!r} is neither a number from 1 to {len(names)}, nor a range like 1-6, nor one of {', '.join(names)}")
        chosen |= set(numbers)
    return [exercise for exercise in EXERCISES if exercise.number in chosen]

def find(text, function):
    """The function ("f" or "Class.f") of a source text, as an ast node."""
    body = ast.parse(text).body
    for part in function.split("."):
        node = next(n for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == part)
        body = node.body
    return node

def empty(text, function, message, hide=()):
    """The source text with the function's body, docstring aside, replaced by one raise, and without the phrases of `hide`."""
    node, lines = find(text, function), text.splitlines(keepends=True)
    documented = isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
    first = node.body[0].end_lineno if documented else node.body[0].lineno - 1
    head = "".join(lines[node.lineno - 1:first])
    for phrase in hide:
        head = head.replace(phrase, "")
    indent = " " * node.body[0].col_offset
    return "".join(lines[:node.lineno - 1] + [head, f"{indent}raise NotImplementedError({message!r})\n"] + lines[node.end_lineno:])

def message(exercise):
    """What an empty function says."""
    return f"exercise {exercise.number}, {exercise.name} ({' and '.join(exercise.functions)} in {exercise.file}): {exercise.task}"

def tracked():
    """The files that git tracks and a student gets, as paths relative to ROOT.  Raises ValueError."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    names = [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]
    if done.returncode or not names:
        raise ValueError(f"{ROOT} is not a git checkout, which says which files to copy: clone the repository (git: {done.stderr.partition(chr(10))[0] or 'no files'})")
    return [name for name in names if name in HANDED_OUT or name.startswith(".github/")]

def readme(text, out):
    """README.md for the folder `out`: without the sections of CUT, and without each sentence that names a file or a section that is not there."""
    text = "".join(section for section in re.split(r"(?m)^(?=###? )", text) if not section.startswith(CUT))
    sections = {re.sub(r"[^\w -]", "", line).replace(" ", "-") for line in re.findall(r"(?m)^###? (.*)", text.lower())}
    paragraphs = text.split("\n\n")
    for i, paragraph in enumerate(paragraphs):
        sentences = re.split(r"(?<=[.:])\s+(?=[A-Z`*(\[])", paragraph)
        there = [sentence for sentence in sentences if set(re.findall(r"\(#([\w-]+)\)", sentence)) <= sections
                 and all((out / file).exists() for file in re.findall(r"\btests/[\w/.-]*\w|\b\w+\.py\b", sentence))]
        if there != sentences:
            paragraphs[i] = textwrap.fill(" ".join(there), 120, break_long_words=False, break_on_hyphens=False)
    return "\n\n".join(filter(None, paragraphs))

def make(out, exercises=EXERCISES, solved=(), names=None):
    """Write the assignment to the new folder `out`; exercises in `solved` keep their bodies.

    names: the files to copy (default: all that a student gets).  Raises ValueError.
    """
    copy(names or tracked(), out)
    for exercise in exercises:
        if exercise not in solved:
            text = (out / exercise.file).read_text()
            for function in exercise.functions:
                text = empty(text, function, message(exercise), exercise.hide)
            (out / exercise.file).write_text(text)
    days = [(day, [e for e in exercises if first < e.number <= last], text)
            for day, (first, (last, text)) in enumerate(zip([0, *(last for last, _ in DAYS)], DAYS), 1)]
    (out / "tests" / "EXERCISES.md").write_text("\n".join([
        "# Exercises", "", "Read a function's docstring and what surrounds it, fill in the body, then ask what is missing or wrong:", "",
        "    python -m pytest -q --tb=short -rN tests/test_exercises.py", "",
        f"One exercise alone: add `-k exercise_{exercises[0].number:02d}`. Each can be solved while the others are empty. Python, numpy and torch are all you need. The times are",
        "for writing; reading what surrounds the functions takes about an hour more. Until all are back, a script stops at the first empty function that it",
        "needs and names it; then README's first command runs. (It does not use crop, euler and heun: they are for `01_data.py --source folder` and",
        "`04_sample.py --solver`.)", "",
        "| | exercise | file | functions | points | time | what to do |", "|---|---|---|---|---|---|---|",
        *(f"| {e.number} | {e.name} | `{e.file}` | {', '.join(f'`{f}`' for f in e.functions)} | {e.points} | {e.minutes} min | {e.task} |" for e in exercises), "",
        "| day | exercises | to read before |", "|---|---|---|",
        *(f"| {day} | {', '.join(e.name for e in todo)} | {text} |" for day, todo, text in days if todo)]) + "\n")
    if (out / "README.md").exists():
        (out / "README.md").write_text(readme((out / "README.md").read_text(), out))

def copy(names, out):
    """Copy files of the repository to the new folder `out`.  Raises ValueError."""
    if out.exists():
        raise ValueError(f"{out} exists: give a new folder")
    for name in names:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, out / name)

@contextmanager
def new_folder(out):
    """with new_folder(out) as part: fill the folder `part`, which then is moved to `out`.  Raises ValueError."""
    if out.exists():
        raise ValueError(f"{out} exists: give a new folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        part = Path(temporary) / out.name
        yield part
        os.replace(part, out)

def gradescope(out, exercises):
    """Write what belongs into Gradescope's autograder.zip to the new folder `out`.  Raises ValueError."""
    copy(GRADER, out)
    for name, text in (("setup.sh", SETUP), ("run_autograder", RUN.format(numbers=",".join(str(e.number) for e in exercises)))):
        (out / name).write_text(text)
        (out / name).chmod(0o755)

def source(text, function):
    """The function as it stands in a source text."""
    node = find(text, function)
    return "\n".join(text.splitlines()[node.lineno - 1:node.end_lineno])

def mistaken(exercise, right, wrong):
    """The exercise's file with one mistake in the solution."""
    text = (ROOT / exercise.file).read_text()
    for function in exercise.functions:
        body = source(text, function)
        text = text.replace(body, body.replace(right, wrong))
    return text

def answers(exercises):
    """What the tests say to each mistake, found by making it: {(exercise, right, wrong): (share of the points, line)}."""
    from grade import run                                 # which imports this file
    with tempfile.TemporaryDirectory() as temporary:
        kit, jobs = Path(temporary) / "kit", {}
        make(kit, exercises, names=NEEDED)
        for exercise in exercises:
            for mistake in exercise.mistakes:
                folder = Path(temporary) / f"{len(jobs)}"
                folder.mkdir()
                (folder / exercise.file).write_text(mistaken(exercise, *mistake))
                jobs[folder, exercise] = exercise, *mistake
        return {jobs[job]: (share, wrong.partition("\n")[0]) for job, share, wrong, _ in run(list(jobs), kit, 60.0)}

def solutions(exercises):
    """The solution sheet, Markdown."""
    parts, said = ["# Solutions\n"], answers(exercises)
    for exercise in exercises:
        text = (ROOT / exercise.file).read_text()
        bodies = "\n\n".join(source(text, function) for function in exercise.functions)
        parts.append(f"## {exercise.number}. {exercise.name} ({exercise.points} points, `{exercise.file}`)\n\n{exercise.task}\n\n```python\n{bodies}\n```\n\n"
                     "Usual mistakes, and what the tests say to them:\n")
        for right, wrong in exercise.mistakes:
            share, line = said[exercise, right, wrong]
            parts.append(f"- {f'`{wrong}` for' if wrong else 'without'} `{right}` ({exercise.points * share:.3g} points): {line}")
        parts.append("")
    return "\n".join(parts)

def main(arguments):
    parser = argparse.ArgumentParser(prog="make_assignment.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, help="a new folder, for students")
    parser.add_argument("--exercises", default=f"1-{len(EXERCISES)}", help="numbers, ranges, names, with commas between (default: all)")
    parser.add_argument("--solutions", type=Path, metavar="FILE", help="write the solution sheet to this new file instead")
    parser.add_argument("--gradescope", type=Path, metavar="FOLDER", help="write Gradescope's autograder to this new folder instead")
    options = parser.parse_args(arguments)
    if sum(place is not None for place in (options.out, options.solutions, options.gradescope)) != 1:
        parser.error("give one of OUT, a new folder, --solutions FILE and --gradescope FOLDER")
    code = 2                                              # of a wrong argument
    try:
        exercises = choose(options.exercises)
        code = 1
        if options.gradescope:
            with new_folder(options.gradescope) as part:
                gradescope(part, exercises)
        elif options.solutions:
            if options.solutions.exists():
                raise ValueError(f"{options.solutions} exists: give a new file")
            if not options.solutions.parent.is_dir():
                raise ValueError(f"--solutions {options.solutions}: there is no folder {options.solutions.parent}")
            sheet = solutions(exercises)
            with new_folder(options.solutions) as part:               # a file, as whole as a folder
                part.write_text(sheet)
        else:
            with new_folder(options.out) as part:
                make(part, exercises)
    except (ValueError, OSError) as error:
        return print(f"make_assignment.py: error: {error}", file=sys.stderr) or code
    except KeyboardInterrupt:
        return print("make_assignment.py: stopped", file=sys.stderr) or 130
    told = "the solutions" if options.solutions else "zip its contents" if options.gradescope else f"listed in {options.out}/tests/EXERCISES.md"
    print(f"{options.out or options.solutions or options.gradescope}: {len(exercises)} exercise{'s' * (len(exercises) > 1)}, {sum(e.points for e in exercises)} points, "
          f"{sum(e.minutes for e in exercises)} minutes; {told}")
    return 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
