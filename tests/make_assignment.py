"""A week's assignment from this repository: the same code with the bodies of some functions taken out.

python tests/make_assignment.py OUT                                 the folder for students: all exercises below
python tests/make_assignment.py OUT --exercises 1-6,guidance        some of them, by number or name
python tests/make_assignment.py --solutions solutions.md            the solution sheet, for teachers
python tests/grade.py SUBMISSION                                    points, and the results.json that Gradescope reads

In OUT a student fills the functions in, in any order, and asks  python -m pytest -q --tb=short -rN tests/test_exercises.py
what is missing or wrong.  Only files that git tracks are copied, and of tests/ only what a student needs: the other
tests hold second implementations.  The working code carries no markers: an exercise is found by its functions' names.
With a part, hand out mix with conversion and euler with heun: each shows the other's answer.
"""
import argparse
import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
NEEDED = (*sorted(path.name for path in ROOT.glob("0?_*.py")), "tests/test_exercises.py", "tests/conftest.py")     # to run the tests
HANDED_OUT = (*NEEDED, "tests/requirements.txt", "README.md", "requirements.txt", ".gitignore")                    # and .github/

class Exercise(NamedTuple):
    number: int
    name: str
    file: str
    functions: tuple
    points: int
    minutes: int
    task: str
    hide: tuple = ()               # phrases of the docstrings that are the answer
    cut: tuple = ()                # functions that are the answer in another form; they are left out

EXERCISES = [Exercise(number, *row) for number, row in enumerate([
    ("crop", "01_data.py", ("center_crop",), 6, 30,
     "ADM's centre crop: halve with BOX while both sides stay at least `size`, BICUBIC to the short side, cut the centre; RGB"),
    ("mix", "02_model.py", ("mix", "velocity_target"), 4, 20,
     "the noised image, and its derivative by time; expand, below, makes one number per image fit a batch",
     (" z = t x + (1-t) e,", " v = x - e,")),
    ("conversion", "02_model.py", ("conversion",), 12, 60,
     "mix and velocity_target are two linear equations: solve them for what is asked; clamp denominators that vanish",
     ("  For x to v that weight is 1 / (1-t)^2.",)),
    ("patchify", "02_model.py", ("patchify",), 5, 20,
     "cut an image into square patches, row by row; inside a patch the channels come last; unpatchify, below it, is the way back"),
    ("rotate", "02_model.py", ("rotate",), 9, 40,
     "the rotary embedding: a 2-D rotation of each pair of adjacent channels; the table of sines has its signs already", (": (x0 cos - x1 sin, x1 cos + x0 sin)",), ("rotate_on_cpu",)),
    ("block", "02_model.py", ("Block.forward",), 9, 40,
     "six signals from adaLN_modulation(c): shift, scale, gate for norm1 and attention (rope goes there; dropout on its output), then for norm2 and the FFN"),
    ("loss", "03_train.py", ("diffusion_loss", "grid_loss"), 9, 40,
     "JiT's loss of each image; and the same for any prediction, space and path: model.PATHS[config.path] has velocity_target and conversion",
     ("\n\n    By the book: convert prediction and truth, square the difference.  With to = u * value + w * z that is\n"
      "    (u out + w z - (u truth + w z))^2 = u^2 (out - truth)^2: z drops out, and the space is a weight over t.",)),
    ("ema", "03_train.py", ("Trainer.update_ema",), 5, 20,
     "move every average of self.ema towards self.weights, in place; both are dicts of tensors, and self.options.ema lists the decays", (": ema += (1 - decay) (weights - ema)",)),
    ("step", "03_train.py", ("Trainer.train_step",), 12, 60,
     "one optimizer step, from loss to EMA; the trainer has indices, loss, summing, scaler (a GradScaler), lr, gradient_norm and update_ema, the module skip_if_not_finite(trainer, norm)"),
    ("guidance", "04_sample.py", ("guided",), 9, 40,
     "combine what predict() says with and without class; leave out the pass that is not needed", (", v_null + w (v_class - v_null)",)),
    ("euler", "04_sample.py", ("euler_step",), 3, 10, "one step along the velocity", (", z + (t_next - t) velocity(z, t)",)),
    ("heun", "04_sample.py", ("heun_step",), 5, 20, "look ahead with Euler, then go with the mean of the two velocities; the last step, to t_next = 1, is Euler's"),
    ("frechet", "05_eval.py", ("frechet_distance",), 7, 45, "the distance between two Gaussians; mind covariances that are singular",
     ("  The root's trace is the sum of the roots of the eigenvalues of R sigma2 R, R R = sigma1:\n"
      "    symmetric, so two eigenvalue problems replace a general matrix root, and singular covariances do no harm.",)),
    ("inception", "05_eval.py", ("inception_score",), 5, 30, "the score of each of ten equal parts of the shuffled images; mean and std of these"),
], 1)]

def choose(text):
    """"1-6,guidance" -> the exercises meant, in order.  Raises ValueError."""
    chosen, names = set(), [exercise.name for exercise in EXERCISES]
    for part in text.replace(" ", "").split(","):
        span = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        numbers = [names.index(part) + 1] if part in names else range(int(span[1]), int(span[2] or span[1]) + 1) if span else []
        if not numbers or not set(numbers) <= set(range(1, len(names) + 1)):
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

def without(text, function):
    """The source text without this function."""
    node, lines = find(text, function), text.splitlines(keepends=True)
    return "".join(lines[:node.lineno - 1] + lines[node.end_lineno + 1:])

def message(exercise):
    """What an empty function says."""
    return f"exercise {exercise.number}, {exercise.name} ({' and '.join(exercise.functions)} in {exercise.file}): {exercise.task}"

def tracked():
    """The files that git tracks and a student gets, as paths relative to ROOT.  Raises ValueError."""
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    names = [name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]
    if done.returncode or not names:
        raise ValueError(f"{ROOT} is not a git checkout, which says which files to copy: clone the repository")
    return [name for name in names if name in HANDED_OUT or name.startswith(".github/")]

def make(out, exercises=EXERCISES, solved=(), names=None):
    """Write the assignment to the new folder `out`; exercises in `solved` keep their bodies.

    names: the files to copy (default: all that a student gets).  Raises ValueError.
    """
    if out.exists():
        raise ValueError(f"{out} exists: give a new folder")
    for name in names or tracked():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, out / name)
    for exercise in exercises:
        if exercise not in solved:
            text = (out / exercise.file).read_text()
            for function in exercise.functions:
                text = empty(text, function, message(exercise), exercise.hide)
            for function in exercise.cut:
                text = without(text, function)
            (out / exercise.file).write_text(text)
    (out / "tests" / "EXERCISES.md").write_text("\n".join([
        "# Exercises", "", "Read a function's docstring and what surrounds it, fill in the body, then ask what is missing or wrong:", "",
        "    python -m pytest -q --tb=short -rN tests/test_exercises.py", "",
        f"One exercise alone: add `-k exercise_{exercises[0].number:02d}`. Each can be solved while the others are empty. Python, numpy and torch are all you need. The times are",
        "for writing; reading what surrounds the functions takes about an hour more. Until all are back, a script stops at the first empty function that it",
        "needs and names it; then README's first command runs. (It does not use crop, euler and heun: they are for `01_data.py --source folder` and",
        "`04_sample.py --solver`.)", "",
        "| | exercise | file | functions | points | time | what to do |", "|---|---|---|---|---|---|---|",
        *(f"| {e.number} | {e.name} | `{e.file}` | {', '.join(f'`{f}`' for f in e.functions)} | {e.points} | {e.minutes} min | {e.task} |" for e in exercises)]) + "\n")

def solutions(exercises):
    """The solution sheet, Markdown."""
    parts = ["# Solutions\n"]
    for exercise in exercises:
        text = (ROOT / exercise.file).read_text()
        nodes = [find(text, function) for function in exercise.functions]
        bodies = ["\n".join(text.splitlines()[node.lineno - 1:node.end_lineno]) for node in nodes]
        parts.append(f"## {exercise.number}. {exercise.name} ({exercise.points} points, `{exercise.file}`)\n\n{exercise.task}\n\n```python\n" + "\n\n".join(bodies) + "\n```\n")
    return "\n".join(parts)

def main(arguments):
    parser = argparse.ArgumentParser(prog="make_assignment.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, help="a new folder, for students")
    parser.add_argument("--exercises", default=f"1-{len(EXERCISES)}", help="numbers, ranges, names, with commas between (default: all)")
    parser.add_argument("--solutions", type=Path, metavar="FILE", help="write the solution sheet to this new file instead")
    options = parser.parse_args(arguments)
    if (options.out is None) == (options.solutions is None):
        parser.error("give either OUT, a new folder, or --solutions FILE")
    try:
        exercises = choose(options.exercises)
        if options.solutions:
            if options.solutions.exists():
                raise ValueError(f"{options.solutions} exists: give a new file")
            with open(options.solutions, "x") as file:
                file.write(solutions(exercises))
        else:
            make(options.out, exercises)
    except (ValueError, OSError) as error:
        return print(f"make_assignment.py: error: {error}", file=sys.stderr) or 1
    told = "the solutions" if options.solutions else f"listed in {options.out}/tests/EXERCISES.md"
    print(f"{options.solutions or options.out}: {len(exercises)} exercise{'s' * (len(exercises) > 1)}, {sum(e.points for e in exercises)} points, "
          f"{sum(e.minutes for e in exercises)} minutes; {told}")
    return 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
