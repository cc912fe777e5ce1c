#!/usr/bin/env python3
"""Medians, spreads and ratios of `benches/fio.sh`.

Lines are `ROUND CASE WHO IOPS CPU_US_PER_IO CALLS_PER_IO OWN_ENTERS_PER_IO`. A ratio is ours over
the peer's in the same round: above 1 is better for IOPS, below 1 for the costs.
"""

import statistics
import sys

PEER = "rublk-loop"
MEASURES = [("IOPS", "{:.0f}"), ("CPU us/IO", "{:.2f}"), ("system calls/IO", "{:.3f}")]


def spread(values, form):
    """The median, and the lowest and highest of `values`."""
    low, high = form.format(min(values)), form.format(max(values))
    return f"{form.format(statistics.median(values))} ({low}..{high})"


def main():
    # case -> who -> round -> the four numbers
    cases = {}
    with open(sys.argv[1], encoding="ascii") as lines:
        for line in lines:
            number, case, who, *values = line.split()
            rounds = cases.setdefault(case, {}).setdefault(who, {})
            rounds[number] = [float(value) for value in values]

    names = [name for name, _ in MEASURES]
    print("\nMedian (lowest..highest) of all rounds:\n")
    print(f"| case | who | {' | '.join(names)} | own io_uring_enter/IO, untraced |")
    print("|---" * 6 + "|")
    for case, sides in cases.items():
        for who, rounds in sorted(sides.items()):
            cells = [
                spread([values[at] for values in rounds.values()], form)
                for at, (_, form) in enumerate(MEASURES)
            ]
            own = [values[3] for values in rounds.values()]
            cells.append("-" if who == PEER else spread(own, "{:.3f}"))
            print(f"| {case} | {who} | {' | '.join(cells)} |")

    print(f"\nRatio to {PEER} in the same round, median (lowest..highest):\n")
    print(f"| case | who | {' | '.join(names)} |")
    print("|---" * 5 + "|")
    for case, sides in cases.items():
        peer = sides.get(PEER, {})
        for who, rounds in sorted(sides.items()):
            both = [number for number in rounds if number in peer]
            if who == PEER or not both:
                continue
            cells = []
            for at in range(len(MEASURES)):
                # A cost below the clock's resolution has no ratio.
                pairs = [(rounds[number][at], peer[number][at]) for number in both]
                ratios = [ours / theirs for ours, theirs in pairs if theirs > 0]
                cells.append(spread(ratios, "{:.2f}") if ratios else "-")
            print(f"| {case} | {who} | {' | '.join(cells)} |")


main()
