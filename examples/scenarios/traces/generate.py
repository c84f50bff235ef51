"""Generate the traces of this folder, the same ones each time: python examples/scenarios/traces/generate.py

Times are scaled to a run of a minute or two: a day lasts 40 seconds.
"""

import random
from pathlib import Path

Row = tuple[float, int, str]
NUM_PEERS, UNTIL_S, DAY_S = 16, 400, 40


def day_and_night(seed: int = 1) -> list[Row]:
    """Volunteers of four time zones who are there by day, some 65 % of it: every second one leaves in the evening, the
    others' machines are suspended."""
    rng, rows = random.Random(f"days {seed}"), list[Row]()
    for peer in range(NUM_PEERS):
        ends, begins = [("leave", "join"), ("hang", "wake")][peer % 2]
        evening_s = DAY_S * (0.6 + peer // 4 / 4) % DAY_S
        while evening_s < UNTIL_S:
            goes_s = evening_s + rng.uniform(0.5, 0.05 * DAY_S)
            rows += [(goes_s, peer, ends), (goes_s + DAY_S * rng.uniform(0.3, 0.4), peer, begins)]
            evening_s += DAY_S
    return rows


def preemptions(seed: int = 1) -> list[Row]:
    """Machines that are taken away without notice after 20 s on average, and replaced after 4: both exponential."""
    rng, rows = random.Random(f"preemptions {seed}"), list[Row]()
    for peer in range(NUM_PEERS):
        now_s = rng.expovariate(1 / 20)
        while now_s < UNTIL_S:
            rows.append((now_s, peer, "crash"))
            now_s += 0.1 + rng.expovariate(1 / 4)
            rows.append((now_s, peer, "join"))
            now_s += 0.1 + rng.expovariate(1 / 20)
    return rows


def text_of(says: str, rows: list[Row], figures: str = "") -> str:
    """The file; `figures` are further columns and the values that all have there, said with the first event of each."""
    names, _, values = figures.partition("=")
    lines, seen = [f"# {says}, by generate.py", "time_s,peer,event" + names], set[int]()
    for time_s, peer, event in sorted(rows):
        lines.append(f"{time_s:.2f},{peer},{event}" + ("," * names.count(",") if peer in seen else values))
        seen.add(peer)
    return "\n".join(lines) + "\n"


FILES = {
    "day-and-night.csv": text_of("Volunteers by day", day_and_night()),
    "preemptions.csv": text_of("Machines that are taken away", preemptions(), ",up_mbit,down_mbit=,200,200"),
}

if __name__ == "__main__":
    for name, text in FILES.items():
        (Path(__file__).parent / name).write_text(text, encoding="utf-8")
