"""How often 80% intervals hold a run of a simulated ladder: `python tests/claims/intervals.py --ladders 80`.

Each ladder is 15 runs of a law of its own, whose losses deviate by 0.5%; the run has eleven times the FLOPs of its
largest member, and deviates as they do. Takes a minute.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from scripts.forecasting.law import fit_many
from tests.scripts.forecasting.test_law import planted, runs

NOISE, PARAMS, TOKENS = 0.005, 1e7, 9e8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ladders", type=int, default=80)
    parser.add_argument("--draws", type=int, default=100, help="of the bootstrap")
    flags = parser.parse_args()
    above = below = 0
    for number, law in enumerate(planted(flags.ladders)):
        ladder = runs(law, np.geomspace(1e5, 3e6, 5), (10, 30, 90), NOISE, 50 + number)
        low, high = fit_many(ladder, draws=flags.draws).interval(PARAMS, TOKENS)
        reached = law.loss(PARAMS, TOKENS) * np.exp(np.random.default_rng(number).normal(0, NOISE))
        above, below = above + (reached > high), below + (reached < low)
    held = flags.ladders - above - below
    print(f"held {held} of {flags.ladders}, {held / flags.ladders:.0%}; {above} runs were above and {below} below")


if __name__ == "__main__":
    main()
