"""Two figures of the README that need no training: python tests/figures.py [FOLDER]

weights.png   where a loss looks: its weight over the error of the network's own output, times the density of t
balls.png     precision and recall: points inside the balls of the other set
"""
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).parent))
from conftest import data, evaluate, model

def weights():
    """Three charts, one for each prediction: u^2 p(t) for the loss in x, e and v, each curve with area 1."""
    t = torch.linspace(0.005, 0.995, 199, dtype=torch.float64)
    logit = torch.log(t / (1 - t))
    density = torch.exp(-(logit + 0.8)**2 / (2 * 0.8**2)) / (t * (1 - t))                  # logit-normal, but for a factor
    charts = []
    for pred in "xev":
        curves = {}
        for space in "xev":
            curve = model.conversion(pred, space, t)[0].double()**2 * density
            curves[f"{space}-loss"] = list(zip(t.tolist(), (curve / torch.trapezoid(curve, t)).numpy().round(3).tolist()))
        charts.append(model.chart(f"the network predicts {pred}", "t", curves))
    sheet = Image.new("RGB", (960, 640), "white")
    for i, chart in enumerate(charts):
        sheet.paste(chart, (480 * (i % 2), 320 * (i // 2)))
    return sheet

def balls():
    """Real points on a ring, generated ones on half of it and beside it: the balls to the third neighbour, of either set."""
    random, radius = np.random.default_rng(0), lambda x: torch.cdist(x, x).kthvalue(4, dim=1).values
    ring = lambda angle: np.stack([np.cos(angle), np.sin(angle)], axis=1) + random.normal(size=(len(angle), 2)) * 0.06
    real = torch.tensor(ring(np.linspace(0, 2 * np.pi, 40, endpoint=False)))
    made = torch.tensor(np.concatenate([ring(random.uniform(0, np.pi, 30)), random.uniform(-0.5, 0.5, size=(10, 2))]))
    precision, recall = evaluate.share_inside(made, real), evaluate.share_inside(real, made)
    sheet = Image.new("RGB", (640, 330), "white")
    draw = ImageDraw.Draw(sheet)
    for panel, (title, centres, points) in enumerate([(f"precision {precision:.2f}: generated inside real balls", real, made),
                                                      (f"recall {recall:.2f}: real inside generated balls", made, real)]):
        place = lambda p: (320 * panel + 160 + 105 * float(p[0]), 175 - 105 * float(p[1]))
        for centre, r in zip(centres, radius(centres).tolist()):
            x, y = place(centre)
            draw.ellipse((x - 105 * r, y - 105 * r, x + 105 * r, y + 105 * r), fill="gainsboro")
        for centre in centres:
            x, y = place(centre)
            draw.ellipse((x - 1, y - 1, x + 1, y + 1), fill="gray")
        inside = (torch.cdist(points, centres) <= radius(centres)).any(dim=1)
        for point, hit in zip(points, inside):
            x, y = place(point)
            draw.ellipse((x - 3, y - 3, x + 3, y + 3), fill="seagreen" if hit else "firebrick")
        data.write(draw, (320 * panel + 10, 6), title, 300)
        assert abs(inside.double().mean().item() - (precision, recall)[panel]) < 1e-9
    return sheet

if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    for name, figure in (("weights", weights), ("balls", balls)):
        figure().save(folder / f"{name}.png")
        print(folder / f"{name}.png")
