"""Writes the demo's raw data next to itself, as a shop would export it: purchases.csv and items.csv.

Synthetic: 240 items in 10 departments of 4 lines of 6 variants, 900 customers with 5 to 9 purchases each. Customers
have three habits: 60% of their purchases go to the line that goes with the line of the last item (bolts, then washers),
in the same variant; 15% stay within the line; 25% go to any item, popular ones first.

    python examples/demo/make_demo.py
"""

import csv
import os
import random
from datetime import datetime, timedelta

DEPARTMENTS = {
    "Fasteners": ["Hex Bolt", "Wood Screw", "Lock Nut", "Flat Washer"],
    "Adhesives": ["Epoxy Resin", "Super Glue", "Thread Sealant", "Masking Tape"],
    "Abrasives": ["Sanding Disc", "Grinding Wheel", "Polishing Pad", "Wire Brush"],
    "3D Printing": ["PLA Filament", "Brass Nozzle", "Build Plate", "Resin Bottle"],
    "Electrical": ["Heat Shrink Tubing", "Ring Terminal", "Cable Tie", "Fuse Holder"],
    "Safety": ["Nitrile Glove", "Dust Mask", "Ear Plug", "Safety Goggle"],
    "Lab": ["Glass Beaker", "Test Tube", "Graduated Cylinder", "Pipette Tip"],
    "Plumbing": ["Ball Valve", "Hose Clamp", "Pipe Elbow", "O-Ring Kit"],
    "Cutting": ["Drill Bit", "End Mill", "Saw Blade", "Deburring Tool"],
    "Measuring": ["Digital Caliper", "Feeler Gauge", "Steel Ruler", "Dial Indicator"],
}
BRANDS = ["Corvex", "Norrland", "Ashby & Co.", "Tamino", "O'Dell", "Brüder", "Kestrel", "Halden"]
VARIANTS = ["Small", "Medium", "Large", "Heavy Duty", "Stainless", "Value Pack"]
CUSTOMERS = 900
START, DAYS = datetime(2024, 1, 1), 365  # of the first purchase


def main() -> None:
    chance = random.Random(7)
    items = []
    for department, nouns in DEPARTMENTS.items():
        for noun in nouns:
            for word in VARIANTS:
                size, count = chance.choice([3, 4, 6, 8, 10, 12, 20, 25]), chance.choice([1, 2, 5, 10, 50, 100])
                brand = chance.choice(BRANDS)
                title = f"{brand} {word} {noun}, {size} mm (Pack of {count})"
                text = f"{noun} for workshop and home, {word.lower()} version, sold in packs of {count}."
                items.append([f"W{1000 + len(items)}", title, text, brand, department])

    # Which line follows which, and how popular an item is.
    variants = len(VARIANTS)
    companion = list(range(len(items) // variants))
    chance.shuffle(companion)
    by_popularity = list(range(len(items)))
    chance.shuffle(by_popularity)
    popularity = [0.0] * len(items)
    for rank, item in enumerate(by_popularity):
        popularity[item] = 1 / (rank + 3)

    def bought_by_one(length: int) -> list[int]:
        bought = chance.choices(range(len(items)), popularity)
        while len(bought) < length:
            (line, variant), habit = divmod(bought[-1], variants), chance.random()
            if habit < 0.6:
                bought.append(companion[line] * variants + variant)
            elif habit < 0.75:
                bought.append(line * variants + chance.randrange(variants))
            else:
                bought += chance.choices(range(len(items)), popularity)
        return bought

    purchases = []
    for customer in range(CUSTOMERS):
        time = START + timedelta(minutes=chance.randrange(DAYS * 24 * 60))
        for item in bought_by_one(chance.randint(5, 9)):
            purchases.append([time.isoformat(" "), f"C{customer + 1}", items[item][0]])
            time += timedelta(minutes=chance.randrange(60, 20 * 24 * 60))
    purchases.sort()
    write("items.csv", ["item", "title", "description", "brand", "category"], items)
    write("purchases.csv", ["time", "customer", "item"], purchases)


def write(name: str, columns: list[str], rows: list[list[str]]) -> None:
    """Writes a CSV file next to this script."""
    with open(
        os.path.join(os.path.dirname(os.path.abspath(__file__)), name), "w", encoding="utf-8", newline=""
    ) as file:
        csv.writer(file, lineterminator="\n").writerows([columns, *rows])


if __name__ == "__main__":
    main()
