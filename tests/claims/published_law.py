"""Our fit of published runs beside the published fit: `python tests/claims/published_law.py svg_extracted_data.csv`.

The file is data/svg_extracted_data.csv of github.com/epoch-research/analyzing-chinchilla: the 245 runs that Besiroglu
et al. 2024 (arXiv:2404.10102) read from figure 4 of Hoffmann et al. 2022. As they do, the five of the highest loss are
left out, and tokens are FLOPs / (6 · parameters). Exit status: 0 where E is within 0.1% and exponents are within 1% of
those of their equation 4.
"""

import csv
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.forecasting.law import Law, Point, fit

PUBLISHED = Law(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
OUTLIERS = 5
NEAR = {"E": 1e-3, "alpha": 1e-2, "beta": 1e-2}


def main(path: Path) -> int:
    with path.open(newline="") as file:
        runs = [[row[name] for name in ("Model Size", "Training FLOP", "loss")] for row in csv.DictReader(file)]
    numbers = [tuple(map(float, run)) for run in runs if all(run)]
    points = sorted((Point(N, C / (6 * N), loss) for N, C, loss in numbers), key=lambda point: point.loss)[:-OUTLIERS]
    found = fit(points)
    print(f"{len(points)} runs: {found}\npublished: {PUBLISHED}")
    off = {name: getattr(found, name) / getattr(PUBLISHED, name) - 1 for name in NEAR}
    print(", ".join(f"{name} {value:+.2%}" for name, value in off.items()))
    return 0 if all(abs(off[name]) <= limit for name, limit in NEAR.items()) else 1


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1])))
