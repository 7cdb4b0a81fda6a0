"""Choose the mini world by its oracle: print accuracy against references for several taste models.

The chosen world is the default of ``prefgen.data.agents.world.TasteModel``; nothing is rendered here.
"""

from __future__ import annotations

import argparse

from prefgen.data.agents.world import TasteModel, oracle_accuracy

REFERENCES = (1, 2, 4, 8, 16)


def main() -> None:
    """Print one line a candidate, the default first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--agents", type=int, default=1000, help="fresh agents per cell")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    candidates = [TasteModel()]
    candidates += [
        TasteModel(beta=beta, min_cared_groups=low, max_cared_groups=high)
        for beta in (2.0, 2.5, 3.0, 3.5)
        for low, high in ((2, 4), (3, 5))
    ]
    print("wanted: .92 to .97 at 8 + 8, at least .80 at 2 + 2")
    print("beta  cared groups  " + "  ".join(f"{n:>2} + {n:<2}" for n in REFERENCES))
    for model in candidates:
        row = [
            oracle_accuracy(model=model, num_references=n, num_agents=args.agents, seed=args.seed)
            for n in REFERENCES
        ]
        cared = f"{model.min_cared_groups} to {model.max_cared_groups}"
        print(f"{model.beta:<5} {cared:<13} " + "  ".join(f"{value:>7.3f}" for value in row))


if __name__ == "__main__":
    main()
