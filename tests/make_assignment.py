"""A week's assignment from this repository: the same code with the bodies of twelve functions taken out.

python tests/make_assignment.py OUT          copies everything to OUT, empties the functions of EXERCISES, writes OUT/tests/EXERCISES.md
In OUT a student fills them in, in any order, and asks    python -m pytest -q --tb=line tests/test_exercises.py
what is missing or wrong; when all are back, the whole suite passes again.  The working code carries no markers: an
exercise is found by its name, its signature and docstring stay.
"""
import ast
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXERCISES = [  # file, function, minutes, what to do
    ("01_data.py", "center_crop", 30, "halve with BOX while both sides stay at least `size`, BICUBIC to the short side, cut the centre, RGB first"),
    ("02_model.py", "patchify", 20, "cut an image into square patches, row by row; inside a patch the channels come last"),
    ("02_model.py", "rotate", 40, "turn each adjacent pair of channels by its angle: a 2-D rotation per pair"),
    ("02_model.py", "Block.forward", 40, "six signals from the condition; norm, shift and scale, attention (with rope; dropout on its output), gate, add; the same again with the FFN"),
    ("02_model.py", "conversion", 60, "solve z = a x + s e, v = a' x + s' e for what is asked; clamp denominators that vanish"),
    ("03_train.py", "diffusion_loss", 40, "squared error of the prediction, weighted by the conversion's u^2 for every space asked for"),
    ("03_train.py", "Trainer.update_ema", 20, "move every average towards the weights by 1 - decay, in place"),
    ("04_sample.py", "guided_velocity", 40, "combine the velocities with and without class; skip the one that is not needed"),
    ("04_sample.py", "euler_step", 10, "one step along the velocity"),
    ("04_sample.py", "heun_step", 20, "the mean of the velocities at both ends; the last step is Euler's"),
    ("05_eval.py", "frechet_distance", 45, "between two Gaussians; mind covariances that are singular"),
    ("05_eval.py", "inception_score", 30, "exp of the mean KL from p(y given x) to p(y), over ten parts of the shuffle RandomState(2020).permutation(N)"),
]

def find(text, name):
    """The function `name` ("f" or "Class.f") of a source text, as an ast node."""
    body = ast.parse(text).body
    for part in name.split("."):
        node = next(n for n in body if isinstance(n, (ast.FunctionDef, ast.ClassDef)) and n.name == part)
        body = node.body
    return node

def empty(text, name, message):
    """The source text with the function's body, docstring aside, replaced by one raise."""
    node, lines = find(text, name), text.splitlines(keepends=True)
    documented = isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)
    first = node.body[0].end_lineno if documented else node.lineno + len(ast.unparse(node.args).splitlines()) - 1
    indent = " " * node.body[0].col_offset
    return "".join(lines[:first] + [f"{indent}raise NotImplementedError({message!r})\n"] + lines[node.end_lineno:])

def make(out, solved=()):
    """Write the assignment to the new folder `out`; functions named in `solved` keep their bodies.  Raises ValueError."""
    if out.exists():
        raise ValueError(f"{out} exists: give a new folder")
    shutil.copytree(ROOT, out, ignore=shutil.ignore_patterns(".*", "__pycache__", "data", "runs", Path(__file__).name, "test_assignment.py"))
    shutil.copytree(ROOT / ".github", out / ".github")
    shutil.copy(ROOT / ".gitignore", out)
    for number, (file, name, minutes, task) in enumerate(EXERCISES, 1):
        if name not in solved:
            text = (out / file).read_text()
            (out / file).write_text(empty(text, name, f"exercise {number}, {name} in {file}: {task}"))
    rows = [f"| {i} | `{file}` | `{name}` | {minutes} min | {task} |" for i, (file, name, minutes, task) in enumerate(EXERCISES, 1)]
    (out / "tests" / "EXERCISES.md").write_text("\n".join([
        "# Exercises", "", "Read a function's docstring and what surrounds it, fill in the body, then ask what is missing or wrong:", "",
        "    python -m pytest -q --tb=line tests/test_exercises.py", "", "| | file | function | time | what to do |", "|---|---|---|---|---|", *rows]) + "\n")

def main(arguments):
    if len(arguments) != 1 or arguments[0].startswith("-"):
        return print("usage: python tests/make_assignment.py OUT      (OUT: a new folder)", file=sys.stderr) or 2
    try:
        make(Path(arguments[0]))
    except (ValueError, OSError) as error:
        return print(f"make_assignment.py: error: {error}", file=sys.stderr) or 1
    print(f"{arguments[0]}: {len(EXERCISES)} exercises, about {sum(e[2] for e in EXERCISES) / 60:.0f} hours; they are listed in {arguments[0]}/tests/EXERCISES.md")
    return 0

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
