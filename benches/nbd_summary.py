#!/usr/bin/env python3
"""Medians and spreads of `benches/nbd.sh`.

nbd_summary.py FILE [PEER]: FILE has lines `CASE WHO IOPS CPU_US_PER_IO`; ratios are to PEER.
"""

import statistics
import sys

peer_name = sys.argv[2] if len(sys.argv) > 2 else "rublk-loop"
rounds = {}
for line in open(sys.argv[1]):
    case, who, iops, cpu = line.split()
    rounds.setdefault(case, {}).setdefault(who, []).append((float(iops), float(cpu)))

print(f"| case | who | IOPS median (min..max) | server CPU us/IO | ratio to {peer_name} |")
print("|---|---|---|---|---|")
for case, by_who in rounds.items():
    peer = [iops for iops, _ in by_who[peer_name]]
    for who, values in by_who.items():
        iops = [value for value, _ in values]
        ratios = sorted(ours / theirs for ours, theirs in zip(iops, peer))
        ratio = statistics.median(ratios)
        cpu = statistics.median(value for _, value in values)
        print(
            f"| {case} | {who} | {statistics.median(iops):.0f} ({min(iops):.0f}..{max(iops):.0f})"
            f" | {cpu:.1f} | {ratio:.2f} ({ratios[0]:.2f}..{ratios[-1]:.2f}) |"
        )
